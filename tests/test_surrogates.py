"""Surrogates against differences and autograd of functions written here, and against figures of other libraries."""

import copy
import inspect
import math
import pickle
from dataclasses import dataclass, fields

import numpy as np
import pytest
import torch
from oracles import closely, exactly, float64, noise
from torch import nn
from torch.nn.functional import hardtanh

import gradoverride as go
from gradoverride import surrogates
from gradoverride.rules import chain, heaviside, scale
from gradoverride.surrogates import Surrogate

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*should not be instantiated:DeprecationWarning",  # Dynamo's own doing, for any Function
)

INF, NAN = math.inf, math.nan
CLASSES = [getattr(surrogates, name) for name in surrogates.__all__ if name != "Surrogate"]


def normal(x, deviation):
    return 0.5 * math.erfc(-x / (deviation * math.sqrt(2)))


def logistic(x):
    return 1 / (1 + math.exp(-x))


def parabolas(x, height, width):
    x = min(max(x, -width), width)
    return height * (x - math.copysign(x * x, x) / (2 * width))


def swish_sign(x, beta=5.0):
    s = logistic(beta * x)
    return 2 * s * (1 + beta * x * (1 - s)) - 1


# What each stands for, in numbers; where it has a kink; how much it rises between -inf and inf.
EACH = {
    "atan": (surrogates.atan(), lambda x: math.atan(math.pi * x) / math.pi, [], 1),
    "atan 5": (surrogates.atan(5.0), lambda x: math.atan(math.pi * 2.5 * x) / math.pi, [], 1),
    "sigmoid": (surrogates.sigmoid(), lambda x: logistic(4 * x), [], 1),
    "sigmoid 25": (surrogates.sigmoid(25.0), lambda x: logistic(25 * x), [], 1),
    "piecewise_quadratic": (surrogates.piecewise_quadratic(), lambda x: parabolas(x, 1, 1), [-1, 0, 1], 1),
    "piecewise_quadratic 2": (surrogates.piecewise_quadratic(2), lambda x: parabolas(x, 2, 0.5), [-0.5, 0, 0.5], 1),
    "rectangle": (surrogates.rectangle(), lambda x: min(max(x, -0.5), 0.5), [-0.5, 0.5], 1),
    "rectangle 3": (surrogates.rectangle(3.0), lambda x: min(max(x / 3, -0.5), 0.5), [-1.5, 1.5], 1),
    "gaussian": (surrogates.gaussian(), lambda x: normal(x, 0.5), [], 1),
    "gaussian 2": (surrogates.gaussian(2.0), lambda x: normal(x, 2), [], 1),
    "erf": (surrogates.erf(), lambda x: math.erf(2 * x) / 2, [], 1),
    "erf 1": (surrogates.erf(1.0), lambda x: math.erf(x) / 2, [], 1),
    "piecewise_exponential": (
        surrogates.piecewise_exponential(),
        lambda x: math.copysign(1 - math.exp(-abs(x)), x) / 2,
        [0],
        1,
    ),
    "piecewise_exponential 3": (
        surrogates.piecewise_exponential(3.0),
        lambda x: math.copysign(1 - math.exp(-3 * abs(x)), x) / 2,
        [0],
        1,
    ),
    "multi_gaussian": (
        surrogates.multi_gaussian(),
        lambda x: 1.15 * normal(x, 0.5) - 0.15 * (normal(x - 0.5, 3) + normal(x + 0.5, 3)),
        [],
        0.85,
    ),
    "multi_gaussian, no sides": (surrogates.multi_gaussian(1.0, 0.0), lambda x: normal(x, 1), [], 1),
    "fast_sigmoid": (surrogates.fast_sigmoid(), lambda x: x / (1 + 25 * abs(x)), [0], 2 / 25),
    "fast_sigmoid 1": (surrogates.fast_sigmoid(1), lambda x: x / (1 + abs(x)), [0], 2),
    "superspike": (surrogates.superspike(), lambda x: x / (1 + 100 * abs(x)), [0], 2 / 100),
    "triangle": (surrogates.triangle(), lambda x: parabolas(x, 0.3, 1), [-1, 0, 1], 0.3),
    "triangle 1, 2": (surrogates.triangle(1.0, 2.0), lambda x: parabolas(x, 1, 2), [-2, 0, 2], 2),
    "leaky": (surrogates.leaky(), lambda x: max(x, 0.1 * x), [0], INF),
    "leaky 0": (surrogates.leaky(0), lambda x: max(x, 0.0), [0], INF),
    "clipped": (surrogates.clipped(), lambda x: min(max(x, -1), 1), [-1, 1], 2),
    "clipped 0, 6": (surrogates.clipped(0, 6), lambda x: min(max(x, 0), 6), [0, 6], 6),
    "approx_sign": (surrogates.approx_sign(), lambda x: parabolas(x, 2, 1), [-1, 0, 1], 2),
    "swish_sign": (surrogates.swish_sign(), swish_sign, [], 2),
    "swish_sign 1": (surrogates.swish_sign(1.0), lambda x: swish_sign(x, 1), [], 2),
}
each = pytest.mark.parametrize("name", EACH)


def gradient(surrogate, x, grad=None):
    """The gradient at x of a sign with this surrogate."""
    x = x.detach().requires_grad_()
    y = go.straight_through(torch.sign, surrogate=surrogate)(x)
    return torch.autograd.grad(y, x, torch.ones_like(y) if grad is None else grad)[0]


def test_there_is_one_of_every_kind():
    assert {type(surrogate) for surrogate, *_ in EACH.values()} == {*CLASSES}


# --- each against what it stands for ---


def smooth_points(kinks, count=41):
    points = np.linspace(-3.03, 3.01, count)
    return [float(x) for x in points if all(abs(x - kink) > 1e-3 for kink in kinks)]


@each
class TestDerivative:
    def test_is_that_of_differences(self, name):
        surrogate, stands_for, kinks, _ = EACH[name]
        points, h = smooth_points(kinks), 1e-5
        differences = [(stands_for(x + h) - stands_for(x - h)) / (2 * h) for x in points]
        found = gradient(surrogate, float64(*points))
        torch.testing.assert_close(found, float64(*differences, grad=False), rtol=1e-6, atol=1e-8)

    def test_is_that_of_autograd_of_its_primitive(self, name):
        surrogate, _, kinks, _ = EACH[name]
        x, grad = float64(*smooth_points(kinks)), noise(len(smooth_points(kinks)), grad=False)
        closely(gradient(surrogate, x, grad), torch.autograd.grad(surrogate.primitive(x), x, grad)[0])

    def test_primitive_is_what_it_stands_for_but_for_a_constant(self, name):
        surrogate, stands_for, _, _ = EACH[name]
        points = smooth_points([])
        offset = surrogate.primitive(float64(0.0, grad=False)) - stands_for(0.0)
        expected = float64(*[stands_for(x) for x in points], grad=False) + offset
        closely(surrogate.primitive(float64(*points, grad=False)), expected)

    def test_adds_up_to_the_rise(self, name):
        surrogate, _, _, rise = EACH[name]
        if rise == INF:
            return
        x = torch.cat([-torch.logspace(9, -9, 20001), torch.logspace(-9, 9, 20001)]).double()
        area = torch.trapezoid(gradient(surrogate, x), x)
        assert area.item() == pytest.approx(rise, rel=2e-3)

    def test_second_derivative_is_that_of_autograd(self, name):
        surrogate, _, kinks, _ = EACH[name]
        points = smooth_points(kinks)
        x, grad = float64(*points), noise(len(points))

        def second(y):
            (first,) = torch.autograd.grad(y, x, grad, create_graph=True)
            found = torch.autograd.grad(first.pow(2).sum(), (x, grad), materialize_grads=True)
            return found

        ours = second(go.straight_through(torch.sign, surrogate=surrogate)(x))
        closely(ours, second(surrogate.primitive(x) + 0 * x * x))


# Computed by snntorch 1.0.0 and spikingjelly 2.0.0, to six digits, at these places.
PLACES = [-2.0, -0.3, -0.04, 0.0, 0.3, 0.5, 1.0]
FIGURES = {
    "snntorch atan": (surrogates.atan(), [0.024705, 0.529587, 0.984454, 1.0, 0.529587, 0.2884, 0.092]),
    "snntorch fast_sigmoid": (
        surrogates.fast_sigmoid(),
        [0.000384, 0.013841, 0.25, 1.0, 0.013841, 0.005487, 0.001479],
    ),
    "snntorch sigmoid 4": (surrogates.sigmoid(), [0.001341, 0.711578, 0.993627, 1.0, 0.711578, 0.419974, 0.070651]),
    "spikingjelly ATan": (surrogates.atan(), [0.024705, 0.529587, 0.984454, 1.0, 0.529587, 0.2884, 0.092]),
    "spikingjelly Sigmoid": (surrogates.sigmoid(), [0.001341, 0.711578, 0.993627, 1.0, 0.711578, 0.419974, 0.070651]),
    "spikingjelly PiecewiseQuadratic": (surrogates.piecewise_quadratic(), [0.0, 0.7, 0.96, 1.0, 0.7, 0.5, 0.0]),
    "spikingjelly Rect": (surrogates.rectangle(), [0.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0]),
    "spikingjelly Erf": (surrogates.erf(), [0.0, 0.787243, 1.121181, 1.128379, 0.787243, 0.415107, 0.020667]),
    "spikingjelly PiecewiseExp": (
        surrogates.piecewise_exponential(),
        [0.067668, 0.370409, 0.480395, 0.5, 0.370409, 0.303265, 0.18394],
    ),
    "spikingjelly SoftSign": (
        chain(scale(2.0 / 2), surrogates.fast_sigmoid(2.0)),
        [0.04, 0.390625, 0.857339, 1.0, 0.390625, 0.25, 0.111111],
    ),
    "spikingjelly SuperSpike": (
        chain(scale(1.0), surrogates.fast_sigmoid(1)),
        [0.111111, 0.591716, 0.924556, 1.0, 0.591716, 0.444444, 0.25],
    ),
}


@pytest.mark.parametrize("name", FIGURES)
def test_figures_are_those_of_other_libraries(name):
    surrogate, figures = FIGURES[name]
    x = float64(*PLACES)
    y = go.custom_backward(surrogate)(torch.sign)(x)
    found = torch.autograd.grad(y.sum(), x)[0]
    torch.testing.assert_close(found, float64(*figures, grad=False), rtol=0, atol=6e-7)


# --- edges ---

# At 0, at the ends of what has ends, at +-inf, at nan.
ENDS = {
    "atan": [(0, 1)],
    "atan 5": [(0, 2.5)],
    "sigmoid": [(0, 1)],
    "sigmoid 25": [(0, 6.25)],
    "piecewise_quadratic": [(0, 1), (-1, 0), (1, 0)],
    "piecewise_quadratic 2": [(0, 2), (-0.5, 0), (0.5, 0)],
    "rectangle": [(0, 1), (-0.5, 0), (0.5, 0)],
    "rectangle 3": [(0, 1 / 3), (-1.5, 0), (1.5, 0)],
    "gaussian": [(0, 0.7978845608028654)],
    "gaussian 2": [(0, 0.19947114020071635)],
    "erf": [(0, 1.1283791670955126)],
    "erf 1": [(0, 0.5641895835477563)],
    "piecewise_exponential": [(0, 0.5)],
    "piecewise_exponential 3": [(0, 1.5)],
    "multi_gaussian": [(0, 0.8782)],
    "multi_gaussian, no sides": [(0, 0.3989422804014327)],
    "fast_sigmoid": [(0, 1)],
    "fast_sigmoid 1": [(0, 1)],
    "superspike": [(0, 1)],
    "triangle": [(0, 0.3), (-1, 0), (1, 0)],
    "triangle 1, 2": [(0, 1), (-2, 0), (2, 0)],
    "leaky": [(0, 0.1), (-INF, 0.1), (INF, 1), (NAN, 0.1)],
    "leaky 0": [(0, 0), (-INF, 0), (INF, 1), (NAN, 0)],
    "clipped": [(-1, 1), (1, 1), (1.0078125, 0), (-1.0078125, 0), (NAN, 0)],
    "clipped 0, 6": [(0, 1), (6, 1), (6.03125, 0), (-0.0078125, 0), (NAN, 0)],
    "approx_sign": [(0, 2), (-1, 0), (1, 0)],
    "swish_sign": [(0, 5)],
    "swish_sign 1": [(0, 1)],
}
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each
class TestAtTheEdges:
    def test_at_zero_ends_and_infinities(self, name, dtype):
        surrogate = EACH[name][0]
        known = {-0.0: ENDS[name][0][1] if ENDS[name][0][0] == 0 else None, -INF: 0, INF: 0, **dict(ENDS[name])}
        known = {x: value for x, value in known.items() if value is not None}
        found = gradient(surrogate, torch.tensor([*known], dtype=dtype))
        tolerance = max(1e-4 * (name == "multi_gaussian"), 4 * torch.finfo(dtype).eps)
        torch.testing.assert_close(found.double(), float64(*known.values(), grad=False), rtol=tolerance, atol=0)

    def test_nan_is_a_nan_unless_it_only_chooses(self, name, dtype):
        found = gradient(EACH[name][0], torch.tensor([NAN], dtype=dtype))
        if name.startswith("rectangle"):
            assert found.item() == pytest.approx(1 / EACH[name][0].width, rel=torch.finfo(dtype).eps)
        elif not any(math.isnan(x) for x, _ in ENDS[name]):
            assert math.isnan(found.item())

    def test_no_input_is_too_large(self, name, dtype):
        f = torch.finfo(dtype)
        large = [10.0, 300.0, f.max**0.5, f.max]
        x = torch.tensor([*large, *[-value for value in large], f.tiny, -f.tiny, f.tiny * f.eps], dtype=dtype)
        found = gradient(EACH[name][0], x)
        wanted = gradient(EACH[name][0], x.double())
        assert torch.isfinite(found).all()
        height = gradient(EACH[name][0], torch.zeros(1).double()).abs().item() + 0.1
        torch.testing.assert_close(found.double(), wanted, rtol=8 * f.eps, atol=8 * f.eps * height)

    def test_is_that_of_float64_in_its_own_dtype(self, name, dtype):
        _, _, kinks, _ = EACH[name]
        x = torch.tensor(smooth_points(kinks)).to(dtype)
        x = x[~torch.isin(x, torch.tensor(kinks, dtype=dtype))]
        found, wanted = gradient(EACH[name][0], x), gradient(EACH[name][0], x.double())
        assert found.dtype is dtype
        largest = wanted.abs().max().item()
        torch.testing.assert_close(
            found.double(), wanted, rtol=8 * torch.finfo(dtype).eps, atol=8 * torch.finfo(dtype).eps * largest
        )


@each
def test_a_gradient_that_comes_is_multiplied_and_not_written_to(name):
    surrogate, _, kinks, _ = EACH[name]
    x = float64(*smooth_points(kinks))
    came = noise(x.numel(), grad=False)
    kept = came.clone()
    closely(gradient(surrogate, x, came), came * gradient(surrogate, x))
    exactly(came, kept)


def test_outside_of_an_interval_it_is_zero_whatever_comes():
    x, came = float64(-2.0, 0.0, 2.0), float64(INF, INF, NAN, grad=False)
    exactly(gradient(surrogates.clipped(), x, came), float64(0.0, INF, 0.0, grad=False))


# --- one object everywhere ---


def by_decorator(surrogate, x):
    return go.straight_through(heaviside, surrogate=surrogate)(x)


def by_rule(surrogate, x):
    return go.custom_backward(surrogate)(torch.sign)(x)


def by_edit(surrogate, x):
    return go.edit_gradient(x, surrogate)


def by_override_of_a_class(surrogate, x):
    model = nn.Sequential(nn.Hardtanh())
    with go.override(model, {nn.Hardtanh: surrogate}):
        return model(x)


def by_registry_of_a_function(surrogate, x):
    registry = go.Registry("binary")
    registry.register(hardtanh)(surrogate)
    model = nn.Hardtanh()
    with go.override(model, registry):
        return model(x)


def by_chain(surrogate, x):
    return go.custom_backward(chain(surrogate, scale(1.0)))(torch.sign)(x)


PLACES_OF_USE = [by_decorator, by_rule, by_edit, by_override_of_a_class, by_registry_of_a_function, by_chain]


@pytest.mark.parametrize("use", PLACES_OF_USE, ids=lambda use: use.__name__)
@each
def test_one_object_serves_everywhere(name, use):
    surrogate, _, kinks, _ = EACH[name]
    x, grad = float64(*smooth_points(kinks)), noise(len(smooth_points(kinks)), grad=False)
    found = torch.autograd.grad(use(surrogate, x), x, grad)[0]
    closely(found, torch.autograd.grad(surrogate.primitive(x), x, grad)[0])


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_compiled_is_eager(cls):
    torch.compiler.reset()
    function = go.straight_through(torch.sign, surrogate=cls())
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    x = float64(-3.0, -0.3, 0.01, 0.4, 0.6, 0.0, INF, -INF, NAN, 1.0, -1.0)
    grad = noise(x.numel(), grad=False)
    found, wanted = [torch.autograd.grad(f(x), x, grad)[0] for f in (compiled, function)]
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0, equal_nan=True)


@each
class TestTransforms:
    def setting(self, name):
        surrogate, _, kinks, _ = EACH[name]
        points = [*smooth_points(kinks, 24)][:20]
        return go.straight_through(torch.sign, surrogate=surrogate), surrogate.primitive, float64(*points, grad=False)

    def test_func_grad_and_vmap(self, name):
        function, primitive, x = self.setting(name)
        closely(torch.func.grad(lambda x: function(x).sum())(x), torch.func.grad(lambda x: primitive(x).sum())(x))
        rows = x.reshape(4, -1)
        found = torch.func.vmap(torch.func.grad(lambda row: (function(row) * row).sum()))(rows)
        signs = rows.sign()
        expected = signs + rows * torch.func.grad(lambda x: primitive(x).sum())(x).reshape(rows.shape)
        closely(found, expected)

    def test_batch_of_gradients(self, name):
        function, primitive, x = self.setting(name)
        found, expected = [torch.autograd.functional.jacobian(f, x, vectorize=True) for f in (function, primitive)]
        closely(found, expected)

    def test_forward_mode(self, name):
        function, primitive, x = self.setting(name)
        tangent = noise(x.numel(), grad=False)
        found, expected = [torch.func.jvp(f, (x,), (tangent,))[1] for f in (function, primitive)]
        closely(found, expected)


# --- as objects ---


@each
def test_pickles_copies_compares_and_prints(name):
    surrogate = EACH[name][0]
    for twin in (pickle.loads(pickle.dumps(surrogate)), copy.deepcopy(surrogate)):
        assert twin == surrogate
        assert hash(twin) == hash(surrogate)
    assert eval(repr(surrogate), vars(surrogates)) == surrogate
    options = {option.name: getattr(surrogate, option.name) for option in fields(surrogate)}
    assert repr(surrogate) == f"{type(surrogate).__name__}({', '.join(f'{k}={v}' for k, v in options.items())})"


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_docstring_states_formula_default_and_source(cls):
    text = inspect.getdoc(cls)
    assert "Source: " in text or "the paper it is from" in text
    assert ">>> " in text
    for option in fields(cls):
        assert f"{option.name}" in text


def test_options_are_frozen():
    with pytest.raises(AttributeError, match="alpha"):
        surrogates.atan().alpha = 3.0


BAD = {
    "atan 0": (lambda: surrogates.atan(0), "atan: 'alpha' must be a number larger than 0; got 0"),
    "sigmoid -4": (lambda: surrogates.sigmoid(-4.0), "sigmoid: 'k' must be a number larger than 0; got -4.0"),
    "fast_sigmoid nan": (
        lambda: surrogates.fast_sigmoid(NAN),
        "fast_sigmoid: 'k' must be a number larger than 0; got nan",
    ),
    "superspike None": (
        lambda: surrogates.superspike(None),
        "superspike: 'k' must be a number larger than 0; got None",
    ),
    "triangle inf": (lambda: surrogates.triangle(INF), "triangle: 'height' must be a number larger than 0; got inf"),
    "triangle": (lambda: surrogates.triangle(1, -1), "triangle: 'width' must be a number larger than 0; got -1"),
    "piecewise_quadratic": (
        lambda: surrogates.piecewise_quadratic(True),
        "piecewise_quadratic: 'alpha' must be a number larger than 0; got True",
    ),
    "rectangle": (lambda: surrogates.rectangle("1"), "rectangle: 'width' must be a number larger than 0; got '1'"),
    "gaussian": (lambda: surrogates.gaussian(-1.0), "gaussian: 'sigma' must be a number larger than 0; got -1.0"),
    "erf": (lambda: surrogates.erf(0.0), "erf: 'alpha' must be a number larger than 0; got 0.0"),
    "piecewise_exponential": (
        lambda: surrogates.piecewise_exponential(-1),
        "piecewise_exponential: 'alpha' must be a number larger than 0; got -1",
    ),
    "multi_gaussian h": (
        lambda: surrogates.multi_gaussian(h=-0.1),
        "multi_gaussian: 'h' must be a number that is not negative; got -0.1",
    ),
    "multi_gaussian s": (
        lambda: surrogates.multi_gaussian(s=0),
        "multi_gaussian: 's' must be a number larger than 0; got 0",
    ),
    "leaky": (lambda: surrogates.leaky(-0.1), "leaky: 'slope' must be a number that is not negative; got -0.1"),
    "clipped lo": (lambda: surrogates.clipped(-INF), "clipped: 'lo' must be a finite number; got -inf"),
    "clipped": (lambda: surrogates.clipped(1, 1), "clipped: 'lo' and 'hi' must be numbers with lo < hi; got 1 and 1"),
    "swish_sign": (lambda: surrogates.swish_sign(0), "swish_sign: 'beta' must be a number larger than 0; got 0"),
}


@pytest.mark.parametrize("name", BAD)
def test_options_out_of_range_are_errors(name):
    make, text = BAD[name]
    with pytest.raises(go.RuleOptionError) as caught:
        make()
    assert str(caught.value) == text


def test_a_result_of_another_shape_is_an_error():
    x = noise(3)
    y = go.custom_backward(surrogates.atan())(lambda x: x.sum())(x)
    with pytest.raises(go.SurrogateError) as caught:
        y.backward()
    assert str(caught.value) == (
        "surrogate atan(alpha=2.0) must be of a function whose result has the shape of its first differentiable "
        "argument, (3,); the gradient of its result is a tensor of shape (). Give such a function, or another rule"
    )


def test_complex_inputs_are_refused():
    x = torch.ones(2, dtype=torch.complex64, requires_grad=True)
    with pytest.raises(go.UnsupportedError) as caught:
        go.straight_through(torch.sgn, surrogate=surrogates.clipped())(x).backward(torch.ones_like(x))
    assert str(caught.value) == (
        "surrogate clipped(lo=-1.0, hi=1.0) is for real tensors; its input is of torch.complex64. Give "
        "straight_through a function of complex tensors"
    )


# --- of one's own ---


@dataclass(frozen=True)
class hat(Surrogate):
    width: float = 1.0

    def of(self, grad, x):
        return grad * (1 - x.abs() / self.width).clamp(min=0)


def test_a_surrogate_of_ones_own():
    x = float64(-0.5, 0.0, 3.0)
    exactly(gradient(hat(), x), float64(0.5, 1.0, 0.0, grad=False))
    assert hat.primitive is None
    with pytest.raises(go.RuleOptionError, match="hat: 'width' must be a number larger than 0; got -1"):
        hat(-1)


def test_a_surrogate_without_a_derivative_says_so():
    @dataclass(frozen=True)
    class nothing(Surrogate):
        pass

    with pytest.raises(NotImplementedError, match=r"nothing must define `of\(self, grad, x\)`"):
        gradient(nothing(), noise(2))


def test_error_in_a_surrogate_says_which():
    def broken(x):
        raise KeyError("inside")

    with pytest.raises(KeyError) as error:
        go.straight_through(torch.round, surrogate=broken)(torch.ones(3, requires_grad=True))
    (note,) = error.value.__notes__
    assert note.startswith("in the surrogate 'broken' (")
    assert note.endswith("of 'round' (built in)")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "surrogate",
    [
        surrogates.sigmoid(),
        surrogates.atan(),
        surrogates.fast_sigmoid(),
        surrogates.superspike(),
        surrogates.swish_sign(),
        surrogates.gaussian(),
    ],
    ids=repr,
)
def test_half_precision_loses_digits_of_the_result_alone(surrogate, dtype):
    x = torch.tensor([-100.0, -11.0, -3.0, -2.0, -1.5, -0.3, 0.1, 0.5, 1.0, 1.5, 2.0, 2.5, 11.0, 100.0]).to(dtype)
    g = torch.full_like(x, 1024.0)
    expected = surrogate(g.double(), x.double())
    rtol = 4 * torch.finfo(dtype).eps
    found = surrogate(g, x)
    assert found.dtype is dtype
    torch.testing.assert_close(found.double(), expected, rtol=rtol, atol=2e-3)  # 1 - s rounded in float32, times g


def test_half_precision_with_an_option_that_is_a_tensor_loses_digits_of_the_result_alone():
    x = torch.tensor([-2.0, -1.5, 1.5, 2.0], dtype=torch.bfloat16, requires_grad=True)
    expected = surrogates.sigmoid()(torch.full((4,), 1024.0, dtype=torch.float64), x.detach().double())
    for k in (torch.tensor(4.0), nn.Parameter(torch.tensor(4.0, dtype=torch.bfloat16))):
        fire = go.straight_through(torch.sign, surrogate=surrogates.sigmoid(k))
        y = fire(x)
        assert y.dtype is torch.bfloat16
        (found,) = torch.autograd.grad(y, x, torch.full_like(y, 1024.0))
        torch.testing.assert_close(found.double(), expected, rtol=0.02, atol=0)
    found = surrogates.sigmoid(torch.tensor(4.0))(torch.full_like(x, 1024.0), x.detach())
    assert found.dtype is torch.bfloat16
    torch.testing.assert_close(found.double(), expected, rtol=0.02, atol=0)


def test_an_option_that_does_not_broadcast_to_the_input_is_an_error():
    x = noise(4, 5)
    y = go.custom_backward(surrogates.atan(torch.ones(2, 1, 1)))(torch.sign)(x)
    with pytest.raises(go.SurrogateError) as error:
        y.sum().backward()
    assert str(error.value) == (
        "surrogate atan(alpha=a tensor of shape (2, 1, 1)): its options must broadcast to the shape of the input, "
        "(4, 5); with them it has shape (2, 4, 5). Give them sizes of 1 where they are the same for all, and no "
        "dimensions more"
    )
