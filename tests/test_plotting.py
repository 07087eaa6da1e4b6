"""`plot_rule` and the gallery: what the lines show, against closed forms."""

import builtins
import functools
import math
import re
import runpy
from pathlib import Path

import pytest
import torch
from matplotlib import pyplot
from oracles import closely, exactly
from torch import nn

import gradoverride as go
from gradoverride import rules, safe, surrogates


@pytest.fixture(autouse=True)
def figures_closed():
    yield
    pyplot.close("all")


def lines_of(ax):
    """By label, the x and the y of each line."""
    return {
        line.get_label(): (torch.as_tensor(line.get_xdata()), torch.as_tensor(line.get_ydata())) for line in ax.lines
    }


X = torch.arange(-500, 501, dtype=torch.float64) / 250


def test_zero_is_drawn_as_zero_and_no_number_beside_it():
    lines = lines_of(go.plot_rule(safe.log))
    exactly(lines["gradient"], (X, torch.where(X == 0, 0, 1 / X)))


class TestOfASurrogate:
    def test_draws_its_derivative_and_its_primitive(self):
        ax = go.plot_rule(surrogates.atan(alpha=2.0))
        lines = lines_of(ax)
        assert list(lines) == ["primitive", "gradient"]
        closely(lines["primitive"], (X, torch.arctan(math.pi * X) / math.pi + 0.5))
        closely(lines["gradient"], (X, 1 / (1 + (math.pi * X) ** 2)))
        assert ax.get_title() == "atan(alpha=2.0)"
        assert ax.get_xlabel() == "x"
        assert [text.get_text() for text in ax.get_legend().get_texts()] == ["primitive", "gradient"]

    def test_without_a_primitive_draws_its_derivative(self):
        class parabola(surrogates.Surrogate):
            def of(self, grad, x):
                return grad * x**2

        lines = lines_of(go.plot_rule(parabola()))
        assert list(lines) == ["gradient"]
        closely(lines["gradient"], (X, X**2))

    def test_range_and_points(self):
        ((x, y),) = [
            line for name, line in lines_of(go.plot_rule(surrogates.clipped(), low=0, high=4, points=5)).items()
            if name == "gradient"
        ]  # fmt: skip
        exactly(x, x.new_tensor([0, 1, 2, 3, 4]))
        exactly(y, x.new_tensor([1, 1, 0, 0, 0]))


class TestOfAFunction:
    def test_decorated_draws_value_and_gradient(self):
        ax = go.plot_rule(rules.round_ste)
        lines = lines_of(ax)
        assert list(lines) == ["forward", "gradient"]
        exactly(lines["forward"], (X, X.round()))
        exactly(lines["gradient"], (X, torch.ones_like(X)))
        assert ax.get_title() == "round_ste"

    @pytest.mark.parametrize("surrogate", [torch.tanh, surrogates.gaussian()], ids=["function", "Surrogate"])
    def test_with_a_surrogate_draws_the_primitive_too(self, surrogate):
        lines = lines_of(go.plot_rule(go.straight_through(torch.sign, surrogate=surrogate)))
        assert list(lines) == ["forward", "primitive", "gradient"]
        exactly(lines["forward"], (X, X.sign()))
        if surrogate is torch.tanh:
            primitive, gradient = torch.tanh(X), 1 - torch.tanh(X) ** 2
        else:
            normal = torch.distributions.Normal(X.new_tensor(0), X.new_tensor(0.5))
            primitive, gradient = normal.cdf(X), normal.log_prob(X).exp()
        closely(lines["primitive"], (X, primitive))
        closely(lines["gradient"], (X, gradient))

    def test_spike_draws_its_step_and_its_surrogate(self):
        lines = lines_of(go.plot_rule(rules.spike(surrogates.fast_sigmoid(5.0), at_zero=0)))
        exactly(lines["forward"], (X, (X > 0).double()))
        closely(lines["primitive"], (X, X / (1 + 5 * X.abs())))
        closely(lines["gradient"], (X, 1 / (1 + 5 * X.abs()) ** 2))

    def test_made_of_decorated_ones_draws_the_chain_rule_and_no_primitive(self):
        soft_sign = go.straight_through(torch.sign, surrogate=torch.tanh)
        lines = lines_of(go.plot_rule(lambda x: 3 * soft_sign(x * 2)))
        assert list(lines) == ["forward", "gradient"]
        exactly(lines["forward"], (X, 3 * X.sign()))
        closely(lines["gradient"], (X, 6 * (1 - torch.tanh(2 * X) ** 2)))

    def test_with_an_option_of_its_own(self):
        lines = lines_of(go.plot_rule(functools.partial(rules.ternary_ste, threshold=0.5)))
        exactly(lines["forward"], (X, (X > 0.5).double() - (X < -0.5).double()))

    def test_with_the_primitive_that_is_given(self):
        lines = lines_of(go.plot_rule(rules.sign_ste, primitive=torch.sin))
        assert list(lines) == ["forward", "primitive", "gradient"]
        closely(lines["primitive"], (X, X.sin()))

    def test_under_a_rule_that_asks_for_more(self):
        guided = go.custom_backward(rules.guided_relu)(torch.relu)
        lines = lines_of(go.plot_rule(guided))
        exactly(lines["gradient"], (X, (X > 0).double()))

    def test_module(self):
        lines = lines_of(go.plot_rule(nn.Tanh()))
        closely(lines["forward"], (X, X.tanh()))
        closely(lines["gradient"], (X, 1 - X.tanh() ** 2))

    def test_overridden_module(self):
        relu = nn.ReLU()
        with go.override(relu, {relu: rules.smooth_relu(3.0)}):
            lines = lines_of(go.plot_rule(relu))
        closely(lines["gradient"], (X, 1 / (1 + torch.exp(-3 * X))))

    def test_without_any_gradient_draws_zeros(self):
        lines = lines_of(go.plot_rule(nn.Hardtanh(-3, -2.5)))
        exactly(lines["gradient"], (X, torch.zeros_like(X)))

    def test_module_that_cuts_the_graph_draws_zeros(self):
        class Cut(nn.Module):
            def forward(self, x):
                return x.detach().sign()

        lines = lines_of(go.plot_rule(Cut()))
        exactly(lines["forward"], (X, X.sign()))
        exactly(lines["gradient"], (X, torch.zeros_like(X)))


class TestOfARuleOfTheGradient:
    def test_draws_what_goes_on_against_what_comes(self):
        ax = go.plot_rule(rules.clip_value(0.5), low=-1, high=3, points=9)
        lines = lines_of(ax)
        assert list(lines) == ["unchanged", "gradient"]
        x = torch.linspace(-1, 3, 9, dtype=torch.float64)
        exactly(lines["unchanged"], (x, x))
        exactly(lines["gradient"], (x, x.clamp(-0.5, 0.5)))
        assert (ax.get_xlabel(), ax.get_ylabel()) == ("gradient that comes", "gradient that goes on")

    def test_takes_one_number_at_a_time(self):
        lines = lines_of(go.plot_rule(rules.clip_norm(1.0)))  # of all at once it is another
        closely(lines["gradient"], (X, X.clamp(-1, 1)))

    def test_plain_function_is_one(self):
        ax = go.plot_rule(lambda grad: -3 * grad)
        exactly(lines_of(ax)["gradient"], (X, -3 * X))

    def test_chain_is_one(self):
        ax = go.plot_rule(rules.chain(rules.clip_value(1.0), rules.reverse(0.5)))
        exactly(lines_of(ax)["gradient"], (X, -0.5 * X.clamp(-1, 1)))
        assert ax.get_title() == "chain(clip_value(limit=1.0), reverse(strength=0.5))"


@pytest.mark.parametrize(
    "made", [lambda a: surrogates.atan(a), lambda a: go.straight_through(torch.sign, surrogate=surrogates.atan(a)),
             lambda a: rules.spike(surrogates.atan(a))], ids=["surrogate", "straight_through", "spike"]
)  # fmt: skip
def test_what_learns_is_drawn_as_it_is_now_and_gets_no_gradient(made):
    alpha = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))
    given = made(alpha)
    with torch.no_grad():
        alpha.fill_(3.0)
    lines = lines_of(go.plot_rule(given))
    closely(lines["primitive"], (X, torch.arctan(1.5 * math.pi * X) / math.pi + 0.5))
    closely(lines["gradient"], (X, 1.5 / (1 + (1.5 * math.pi * X) ** 2)))
    assert alpha.grad is None


def test_draws_on_the_axes_that_are_given():
    figure, (left, right) = pyplot.subplots(1, 2)
    assert go.plot_rule(rules.reverse(), ax=right) is right
    assert not left.lines
    assert len(right.lines) == 2
    assert pyplot.get_fignums() == [figure.number]


def test_makes_axes_of_pyplot_where_none_are_given():
    assert go.plot_rule(rules.reverse()) is pyplot.gca()


def test_leaves_the_gradients_of_a_module_alone():
    prelu = nn.PReLU().double()
    go.plot_rule(prelu)
    assert prelu.weight.grad is None


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"low": 1, "high": 1}, r"plot_rule: 'low' and 'high' must be numbers with low < high; got \(1, 1\)"),
        ({"low": "a"}, r"plot_rule: 'low' and 'high' must be numbers with low < high; got \('a', 2.0\)"),
        ({"high": math.inf}, r"plot_rule: 'low' and 'high' must be numbers with low < high; got \(-2.0, inf\)"),
        ({"points": 1}, "plot_rule: 'points' must be an integer, 2 at least; got 1"),
        ({"points": 10.0}, "plot_rule: 'points' must be an integer, 2 at least; got 10.0"),
        ({"primitive": 3}, "plot_rule: 'primitive' must be a function of one tensor; got 3"),
        (
            {"primitive": lambda: 1},
            r"plot_rule: 'primitive' must be a function of .*; got '<lambda>' .*which takes \(\)",
        ),
        (
            {"primitive": torch.tanh},
            "plot_rule: 'primitive' must be left out: a rule of the gradient has none; got 'tanh'",
        ),
        ({"ax": 3}, "plot_rule: 'ax' must be Axes of matplotlib; got 3"),
    ],
)
def test_bad_options_are_errors_by_their_names(options, text):
    with pytest.raises(go.RuleOptionError, match=text):
        go.plot_rule(rules.reverse(), **options)
    assert not pyplot.get_fignums()


@pytest.mark.parametrize(
    ("given", "error", "text"),
    [
        (
            3,
            go.RuleSignatureError,
            "'rule_or_function' must be a rule, a surrogate or a function of one tensor; got 3, an",
        ),
        (surrogates.atan, go.RuleSignatureError, "a function of one tensor; got the class 'atan'"),
        (
            rules.smooth_relu(),
            go.RuleSignatureError,
            r"'smooth_relu' .* asks for 'input' too. .*custom_backward\(rule\)",
        ),
        (rules.ternary_ste, go.RuleSignatureError, r"'ternary_ste' .* asks for 'threshold' too. .*functools.partial"),
        (
            lambda g: g.sum(),
            go.RuleResultError,
            r"must give one gradient for one, of shape \(1,\); it gave a tensor of sh",
        ),
        (lambda g: None, go.RuleResultError, r"must give one gradient for one, of shape \(1,\); it gave None"),
        (nn.Linear(1001, 1).double(), go.ForwardResultError, r"'Linear' .* input, \(1001,\); it gave .* shape \(1,\)"),
    ],
)
def test_what_cannot_be_drawn_is_an_error(given, error, text):
    with pytest.raises(error, match=text):
        go.plot_rule(given)


def test_without_matplotlib_it_says_how_to_get_it(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(go.MissingExtraError, match=r'plot_rule needs matplotlib: pip install "gradoverride\[plot\]"'):
        go.plot_rule(rules.reverse())


GALLERY = Path(__file__).parent.parent / "docs" / "gallery.py"


@pytest.fixture(scope="module")
def gallery():
    return runpy.run_path(str(GALLERY))


@pytest.fixture(scope="module")
def panels(gallery):
    return {panel.get_title(): panel for panel in gallery["draw"]().axes if panel.get_visible()}


class TestGallery:
    def test_is_as_the_surrogates_are(self, gallery, tmp_path):
        gallery["write"](tmp_path)
        for name in ("gallery.md", "gallery.svg"):
            kept, drawn = (path.joinpath(name).read_text(encoding="utf-8") for path in (GALLERY.parent, tmp_path))
            # Of the picture its titles: the lines of another release of matplotlib may differ.
            kept, drawn = (re.findall(r">(\w+\(.*\))</text>", text) or text for text in (kept, drawn))
            assert kept == drawn, f"run: python docs/gallery.py ({name})"

    def test_has_a_panel_for_each(self, panels):
        assert {title.partition("(")[0] for title in panels} == set(surrogates.__all__) - {"Surrogate"}
        for panel in panels.values():
            assert [line.get_label() for line in panel.lines] == ["forward", "primitive", "gradient"]

    def test_shows_what_each_does(self, panels):
        x, gradient = lines_of(panels["approx_sign()"])["gradient"]
        closely(gradient, (2 - 2 * x.abs()).clamp(min=0))
        exactly(lines_of(panels["approx_sign()"])["forward"], (x, x.sign()))
