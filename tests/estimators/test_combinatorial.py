"""Estimators for discrete solvers: against loops by hand, closed forms, and the function whose gradient they are."""

import copy
import itertools
import math
import pickle
from collections import Counter

import numpy as np
import pytest
import torch
from oracles import closely, exactly, float64, noise
from torch import nn

import gradoverride as go
from gradoverride.estimators import blackbox, imle, perturbed

DYNAMO = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # its own


def grad(result, *inputs, grad_outputs=None):
    found = torch.autograd.grad(result, inputs, grad_outputs)
    return found[0] if len(found) == 1 else found


def draws(seed=0):
    return torch.Generator().manual_seed(seed)


# --- solvers


def shortest_path(costs):
    """By dynamic programming, from corner to corner of a grid, to the right and down: 1 on the path, else 0."""
    rows, columns = costs.shape
    total = np.full((rows + 1, columns + 1), np.inf)
    total[0, 1] = 0
    for i, j in itertools.product(range(rows), range(columns)):
        total[i + 1, j + 1] = costs[i, j] + min(total[i, j + 1], total[i + 1, j])
    path = np.zeros_like(costs)
    i, j = rows - 1, columns - 1
    while (i, j) != (0, 0):
        path[i, j] = 1
        i, j = (i - 1, j) if total[i, j + 1] < total[i + 1, j] else (i, j - 1)
    path[0, 0] = 1
    return path


def ranks(scores):
    """1 for the largest."""
    return (scores.argsort(-1, descending=True).argsort(-1) + 1).to(scores)


def largest(scores):
    return nn.functional.one_hot(scores.argmax(-1), scores.shape[-1]).to(scores)


def smallest(costs):
    return largest(-costs)


def two_largest(scores):
    return torch.zeros_like(scores).scatter(-1, scores.topk(2, -1).indices, 1.0)


# --- blackbox


class TestBlackbox:
    @pytest.mark.parametrize("strength", [0.5, 3.0, 20.0])
    def test_shortest_path_is_that_of_a_loop_by_hand(self, strength):
        costs = np.random.default_rng(0).random((5, 6))
        g = np.random.default_rng(1).standard_normal((5, 6))
        expected = -(shortest_path(costs) - shortest_path(costs + strength * g)) / strength
        assert strength == 0.5 or np.abs(expected).sum() > 0
        x = torch.from_numpy(costs).requires_grad_()
        found = grad(go.bridge(blackbox(strength))(shortest_path)(x), x, grad_outputs=torch.from_numpy(g))
        closely(found, torch.from_numpy(expected))

    @pytest.mark.parametrize("strength", [0.5, 3.0, 20.0])
    def test_it_is_the_gradient_of_the_interpolation_of_the_paper(self, strength):
        """Of (m(w + strength g) - m(w)) / strength, with m(w) the cost of the best path; by finite differences."""
        costs = np.random.default_rng(2).random((4, 4))
        g = np.random.default_rng(3).standard_normal((4, 4))

        def interpolated(costs):
            changed = costs + strength * g
            return ((changed * shortest_path(changed)).sum() - (costs * shortest_path(costs)).sum()) / strength

        expected = np.zeros_like(costs)
        for place in np.ndindex(*costs.shape):
            step = np.zeros_like(costs)
            step[place] = 1e-6
            expected[place] = (interpolated(costs + step) - interpolated(costs - step)) / 2e-6
        x = torch.from_numpy(costs).requires_grad_()
        found = grad(go.bridge(blackbox(strength))(shortest_path)(x), x, grad_outputs=torch.from_numpy(g))
        torch.testing.assert_close(found, torch.from_numpy(expected), rtol=1e-6, atol=1e-8)

    @pytest.mark.parametrize("maximizes", [False, True])
    @pytest.mark.parametrize("solver", [ranks, largest, two_largest], ids=lambda solver: solver.__name__)
    def test_ranking_and_choice_are_those_of_a_loop_by_hand(self, solver, maximizes):
        x, g = noise(7, 5), noise(7, 5, grad=False)
        found = grad(go.custom_backward(blackbox(2.0, maximizes))(solver)(x), x, grad_outputs=g)
        rows = []
        for row, part in zip(x.detach().unbind(), g.unbind(), strict=True):
            if maximizes:
                rows.append((solver(row) - solver(row - 2.0 * part)) / 2.0)
            else:
                rows.append((solver(row + 2.0 * part) - solver(row)) / 2.0)
        closely(found, torch.stack(rows))
        assert found.abs().sum() > 0

    def test_a_maximiser_is_a_minimiser_of_the_negative(self):
        x, g = noise(20, 4), noise(20, 4, grad=False)
        found = grad(go.custom_backward(blackbox(3.0, maximizes=True))(largest)(x), x, grad_outputs=g)
        closely(found, grad(go.custom_backward(blackbox(3.0))(smallest)(-x), x, grad_outputs=g))

    @pytest.mark.parametrize("maximizes", [False, True])
    def test_a_small_strength_gives_the_derivative(self, maximizes):
        """Of softmax, whose Jacobian is symmetric, by autograd."""
        x, g = noise(5), noise(5, grad=False)
        found = grad(go.custom_backward(blackbox(1e-6, maximizes))(lambda x: x.softmax(0))(x), x, grad_outputs=g)
        torch.testing.assert_close(found, grad(x.softmax(0), x, grad_outputs=g), rtol=1e-4, atol=1e-6)

    def test_descent_finds_the_costs_of_a_path(self):
        target = np.zeros((4, 4))
        target[0, :] = target[:, 3] = 1
        costs = torch.ones(4, 4, dtype=torch.float64, requires_grad=True)
        solve = go.bridge(blackbox(5.0))(shortest_path)
        for _ in range(50):
            path = solve(costs)
            (grad_costs,) = torch.autograd.grad((path - torch.from_numpy(target)).abs().sum(), costs)
            costs.data = (costs - 0.3 * grad_costs).clamp(min=0.1)
        exactly(solve(costs.detach()), torch.from_numpy(target))

    def test_several_arguments_pair_with_several_results(self):
        def both(a, b):
            return {"of a": ranks(a), "of b": smallest(b)}

        a, b, g, h = noise(4), noise(5), noise(4, grad=False), noise(5, grad=False)
        found = go.custom_backward(blackbox(2.0))(both)(a, b)
        found = grad([found["of a"], found["of b"]], a, b, grad_outputs=[g, h])
        closely(found[0], (ranks(a + 2 * g) - ranks(a)).detach() / 2)
        closely(found[1], (smallest(b + 2 * h) - smallest(b)).detach() / 2)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    def test_other_dtypes(self, dtype):
        x = torch.tensor([1.0, 2.0, 3.0], dtype=dtype, requires_grad=True)
        g = torch.tensor([1.0, 0.0, 1.0], dtype=dtype)
        found = grad(go.custom_backward(blackbox(16.0))(smallest)(x), x, grad_outputs=g)
        exactly(found, torch.tensor([-0.0625, 0.0625, 0.0], dtype=dtype))

    def test_under_vmap_and_grad(self):
        fn = go.custom_backward(blackbox(2.0))(ranks)
        x, g = noise(6, 4, grad=False), noise(6, 4, grad=False)
        found = torch.func.vmap(torch.func.grad(lambda x, g: (fn(x) * g).sum()))(x, g)
        closely(found, (ranks(x + 2 * g) - ranks(x)) / 2)

    def test_a_result_of_another_shape_is_refused(self):
        x = noise(4)
        y = go.custom_backward(blackbox(1.0))(lambda x: x[:2] * 1)(x)
        with pytest.raises(go.ForwardResultError) as caught:
            y.sum().backward()
        assert "must return a result of the shape of its argument, (4,), for the gradient is added" in str(caught.value)
        assert "it returned (2,). Return the chosen ones as a mask" in str(caught.value)


# --- perturbed and imle: in the mean, against softmax


def rows_of(x, count):
    return x.expand(count, *x.shape).clone().requires_grad_()


def is_unbiased(rows, truth):
    """Whether the mean is within 4 standard errors. (What is always the same must be right.)"""
    error = rows.std(0) / math.sqrt(len(rows))
    return bool(((rows.mean(0) - truth).abs() <= 4 * error + 1e-12).all())


X = torch.tensor([0.3, -0.4, 1.0], dtype=torch.float64)
G = torch.tensor([1.0, -0.5, 0.2], dtype=torch.float64)
MANY = 30_000


def softmax_vjp(x, g, sigma=1.0):
    x = x.clone().requires_grad_()
    return grad((x / sigma).softmax(0), x, grad_outputs=g)


def of_two(x, g, sigma):
    """The gradient of the mean of `largest` of two under normal noise: their difference has variance 2 sigma^2."""
    spread = math.sqrt(2) * sigma
    density = math.exp(-(((x[0] - x[1]) / spread) ** 2) / 2) / (spread * math.sqrt(2 * math.pi))
    return density * (g[0] - g[1]) * torch.tensor([1.0, -1.0], dtype=torch.float64)


def softmax_difference(strength):
    return (X.softmax(0) - (X - strength * G).softmax(0)) / strength


UNBIASED = {  # a rule, its options, the argument, the gradient of the result, and what the mean must be
    "perturbed, Gumbel": (perturbed, {"n": 1, "noise": "gumbel", "batch_dims": 1}, X, G, softmax_vjp(X, G)),
    "perturbed, Gumbel, n": (perturbed, {"n": 3, "noise": "gumbel", "batch_dims": 1}, X, G, softmax_vjp(X, G)),
    "perturbed, Gumbel, sigma": (
        perturbed,
        {"n": 2, "noise": "gumbel", "sigma": 0.5, "batch_dims": 1},
        X,
        G,
        softmax_vjp(X, G, 0.5),
    ),
    "perturbed, normal": (perturbed, {"n": 2, "batch_dims": 1}, X[:2], G[:2], of_two(X, G, 1.0)),
    "perturbed, normal, sigma": (
        perturbed,
        {"n": 2, "sigma": 0.4, "batch_dims": 1},
        X[:2],
        G[:2],
        of_two(X, G, 0.4),
    ),
    "imle": (imle, {"strength": 1.0}, X, G, softmax_difference(1.0)),
    "imle, n": (imle, {"strength": 4.0, "n": 3}, X, G, softmax_difference(4.0)),
}


def gradient_rows(name, as_mean):
    make, options, x, g, _ = UNBIASED[name]
    rule = make(**options, generator=draws())
    rows = rows_of(x, MANY)
    fn = rule.mean(largest) if as_mean else go.custom_backward(rule)(largest)
    return grad(fn(rows), rows, grad_outputs=g.expand(MANY, len(g)))


@pytest.mark.parametrize("as_mean", [False, True], ids=["rule", "mean"])
@pytest.mark.parametrize("name", UNBIASED)
class TestBias:
    def test_the_mean_is_the_gradient(self, name, as_mean):
        assert is_unbiased(gradient_rows(name, as_mean), UNBIASED[name][-1])

    @pytest.mark.parametrize("factor", [2.0, 0.5, -1.0])
    def test_a_planted_scaling_error_is_caught(self, name, as_mean, factor, monkeypatch):
        make, method = UNBIASED[name][0], "from_samples" if as_mean else "gradients"
        right = getattr(make, method)
        monkeypatch.setattr(make, method, lambda *given: [factor * one for one in right(*given)])
        assert not is_unbiased(gradient_rows(name, as_mean), UNBIASED[name][-1])


def test_perturbed_of_two_arguments_and_a_structure():
    """Two arguments of a linear function, whose gradient is known."""
    rule = perturbed(n=2, sigma=0.7, batch_dims=1, generator=draws())
    a, b = rows_of(X, MANY), rows_of(X[:2], MANY)
    w = torch.tensor([[1.0, 2.0], [0.0, -1.0], [0.5, 0.5]], dtype=torch.float64)
    found = go.custom_backward(rule)(lambda a, b: {"matrix": a @ w, "sum": b.sum(-1)})(a, b)
    found = grad(found["matrix"][:, 0].sum() + 3 * found["sum"].sum(), a, b)
    assert is_unbiased(found[0], w[:, 0])
    assert is_unbiased(found[1], 3.0)


class TestMean:
    @pytest.mark.parametrize("rule", [perturbed(n=1, noise="gumbel"), imle(1.0)], ids=["perturbed", "imle"])
    def test_the_value_is_the_mean_of_samples(self, rule):
        values = rule.mean(largest)(X.expand(MANY, 3))
        assert is_unbiased(values, X.softmax(0))
        exactly(values.unique(), float64(0.0, 1.0, grad=False))
        many = type(rule)(**{**vars(rule), "n": 4}).mean(largest)(X.expand(50, 3))
        exactly((many * 4).frac(), torch.zeros_like(many))
        assert not torch.equal(many, many.round())

    def test_several_samples_have_less_variance_than_the_formula_of_the_paper(self):
        """Without the mean taken off: <g, y> s / sigma, of the same samples."""
        rule = perturbed(n=8, noise="gumbel", batch_dims=1, generator=draws())
        rows = rows_of(X, MANY)
        g = (G + 5).expand(MANY, 3)  # a constant in the gradient changes nothing in the mean
        found = grad(rule.mean(largest)(rows), rows, grad_outputs=g)
        z = -torch.log(torch.empty(8, MANY, 3, dtype=torch.float64).exponential_())
        plain = ((largest(X + z) * g).sum(-1, keepdim=True) * (1 - torch.exp(-z))).mean(0)
        assert is_unbiased(plain, softmax_vjp(X, G))
        assert is_unbiased(found, softmax_vjp(X, G))
        assert (found.var(0) < 0.5 * plain.var(0)).all()

    def test_other_arguments_are_passed_on(self):
        def solver(scores, count, *, factor):
            """Choose."""
            return {"chosen": torch.zeros_like(scores).scatter(-1, scores.topk(count, -1).indices, 1.0) * factor}

        fn = perturbed(n=4, batch_dims=1).mean(solver)
        assert (fn.__name__, fn.__doc__) == ("solver", "Choose.")
        x = noise(100, 5)
        found = fn(x, 2, factor=torch.tensor(3.0))["chosen"]
        closely(found.sum(-1), torch.full((100,), 6.0, dtype=torch.float64))
        assert grad(found[:, 0].sum(), x).abs().sum() > 0
        again = imle(1.0).mean(solver)(scores=x, count=1, factor=2.0)["chosen"]
        assert grad(again, x, grad_outputs=noise(100, 5, grad=False)).abs().sum() > 0

    def test_a_gradient_for_another_argument_is_refused(self):
        y = perturbed().mean(lambda x, y: x * y)(noise(3), noise(3))
        with pytest.raises(go.UnsupportedError, match=r"for its first argument alone, 'x', .* wanted for 'y'. Detach"):
            y.sum().backward()

    def test_what_has_no_first_parameter_is_refused(self):
        with pytest.raises(go.DecorationError, match=r"perturbed.mean: .* must have a first parameter"):
            perturbed().mean(lambda *args: args[0])
        with pytest.raises(go.DecorationError, match=r"imle.mean: 'argmax' \(built in\) must have a first parameter"):
            imle(1.0).mean(torch.argmax)

    def test_a_method_is_refused(self):
        class Solver:
            def solve(self, scores):
                return scores

        with pytest.raises(go.DecorationError, match=r"imle.mean: 'solve' \(.*\) must be a function; it is a method"):
            imle(1.0).mean(Solver.solve)

    def test_what_has_no_floating_argument_is_refused(self):
        with pytest.raises(go.DecorationError, match="must have floating tensors in its argument 'x'"):
            imle(1.0).mean(lambda x: x)(torch.tensor([1, 2]))

    @pytest.mark.parametrize("rule", [perturbed(n=2), imle(1.0, n=2)])
    @pytest.mark.parametrize(
        ("fn", "given"),
        [
            (lambda x: x.argmax(), "a tensor of shape () of torch.int64"),
            (lambda x: x.argmax().item(), "0, an int"),
        ],
    )
    def test_of_integers_there_is_none(self, rule, fn, given):
        with pytest.raises(go.ForwardResultError) as error:
            rule.mean(fn)(torch.tensor([100.0, 0.0], requires_grad=True))
        assert str(error.value).endswith(
            f"must return a floating tensor, for there to be a mean of its samples; it returned {given}. Convert it: "
            ".to(torch.get_default_dtype())"
        )

    def test_without_a_gradient_it_is_just_the_mean(self):
        with torch.no_grad():
            assert not imle(1.0).mean(largest)(noise(3)).requires_grad

    @pytest.mark.parametrize("rule", [perturbed(n=20, noise="gumbel"), imle(0.1, n=20)], ids=["perturbed", "imle"])
    def test_under_vmap_and_grad_each_in_the_batch_draws_for_itself(self, rule):
        def chosen(scores):  # one_hot looks at values
            return torch.zeros_like(scores).scatter(-1, scores.argmax(-1, keepdim=True), 1.0)

        fn = rule.mean(chosen)
        found = torch.func.vmap(torch.func.grad(lambda x: (fn(x) * G).sum()), randomness="different")(X.expand(400, 3))
        truth = softmax_vjp(X, G) if type(rule) is perturbed else (X.softmax(0) - (X - 0.1 * G).softmax(0)) / 0.1
        assert is_unbiased(found, truth)
        assert not is_unbiased(2 * found, truth)

    @DYNAMO
    def test_compiled_it_is_as_uncompiled(self):
        torch.compiler.reset()
        generator = draws()
        fn = perturbed(n=4, generator=generator).mean(largest)
        x = noise(3)
        expected = grad(fn(x * 2).exp().sum(), x)
        generator.manual_seed(0)
        closely(grad(torch.compile(lambda x: fn(x * 2).exp().sum(), backend="eager")(x), x), expected)


# --- alike in all

EVERY = {"blackbox": blackbox(2.0), "perturbed": perturbed(n=3), "imle": imle(2.0, n=3)}
COSTS = {  # forward calls in the backward; of `mean`: in the forward and in the backward
    "blackbox": (blackbox(2.0), 1, None),
    "perturbed": (perturbed(n=5), 5, (5, 0)),
    "imle": (imle(2.0, n=5), 10, (5, 5)),
    "imle in one call": (imle(2.0, n=5, batched="stack"), 2, (5, 1)),
    "perturbed in one call": (perturbed(n=5, batched="vmap"), 1, (5, 0)),
}


@pytest.mark.parametrize("name", COSTS)
def test_cost_is_as_documented(name):
    rule, cost, of_mean = COSTS[name]
    calls = Counter()

    def fn(x):
        calls["fn"] += 1
        return x.softmax(-1)

    decorated, x = go.custom_backward(rule)(fn), noise(2, 3)
    for first in (1, 0):  # the first time it is looked at whether it repeats
        y = decorated(x)
        assert calls["fn"] == 1
        y.sum().backward()
        assert calls["fn"] == 1 + cost + first
        calls.clear()
    if of_mean is not None:
        y = rule.mean(fn)(x)
        assert calls["fn"] == of_mean[0]
        y.sum().backward()
        assert calls["fn"] == sum(of_mean)


@pytest.mark.parametrize("batched", ["vmap", "stack", "cat"])
@pytest.mark.parametrize("make", [perturbed, lambda **options: imle(1.0, **options)], ids=["perturbed", "imle"])
def test_batched_is_the_same(make, batched):
    x, g = noise(4, 3), noise(4, 3, grad=False)

    def gradient(batched):
        fn = go.custom_backward(make(n=3, batched=batched, generator=draws()))(largest)
        return grad(fn(x), x, grad_outputs=g)

    closely(gradient(batched), gradient(None))


@pytest.mark.parametrize("name", EVERY)
class TestSecondDerivatives:
    text = "second derivatives of .* are not known"

    def test_are_refused(self, name):
        x, g = noise(3), noise(3)
        y = go.custom_backward(EVERY[name])(lambda x: x.softmax(0))(x)
        (first,) = torch.autograd.grad(y, x, g, create_graph=True)
        with pytest.raises(go.UnsupportedError, match=self.text):
            torch.autograd.grad(first.sum(), x, retain_graph=True)
        if name != "perturbed":  # which is linear in the gradient
            with pytest.raises(go.UnsupportedError, match=self.text):
                torch.autograd.grad(first.sum(), g)

    def test_are_refused_under_transforms(self, name):
        fn = go.custom_backward(EVERY[name])(lambda x: x.softmax(0))
        with pytest.raises(go.UnsupportedError, match=self.text):
            torch.func.grad(lambda x: torch.func.grad(lambda x: fn(x).exp().sum())(x).sum())(noise(3, grad=False))

    def test_of_the_mean_are_refused(self, name):
        if name == "blackbox":
            assert not hasattr(EVERY[name], "mean")
            return
        x = noise(3)
        y = EVERY[name].mean(lambda x: x.softmax(0))(x)
        (first,) = torch.autograd.grad(y.exp().sum(), x, create_graph=True)
        with pytest.raises(go.UnsupportedError, match=self.text):
            first.sum().backward()


@DYNAMO
@pytest.mark.parametrize("name", EVERY)
def test_compiled_it_is_as_uncompiled(name):
    torch.compiler.reset()
    fn, x = go.custom_backward(EVERY[name])(ranks), noise(4)
    torch.manual_seed(1)
    expected = grad(fn(x * 2).exp().sum(), x)
    torch.manual_seed(1)
    closely(grad(torch.compile(lambda x: fn(x * 2).exp().sum(), backend="eager")(x), x), expected)


def test_a_random_solver_is_refused():
    y = go.custom_backward(blackbox(1.0))(lambda x: torch.rand_like(x))(torch.ones(4, requires_grad=True))
    with pytest.raises(go.ForwardResultError, match="must return the same for the same arguments"):
        y.sum().backward()


def test_noise_of_ones_own():
    def constant(tensor, generator):
        assert generator is None
        return torch.full_like(tensor, 7.0)

    x, g = noise(4), noise(4, grad=False)
    found = grad(go.custom_backward(imle(2.0, noise=constant, sigma=3.0))(lambda x: x**2)(x), x, grad_outputs=g)
    closely(found, (((x + 21) ** 2 - (x + 21 - 2 * g) ** 2) / 2).detach())
    y = go.custom_backward(imle(2.0, noise=lambda tensor, generator: torch.zeros(2)))(ranks)(x)
    with pytest.raises(
        go.ForwardResultError, match=r"imle: 'noise' must return a tensor .* \(4,\); it .* shape \(2,\)"
    ):
        y.sum().backward()
    y = go.custom_backward(imle(2.0, noise=lambda tensor, generator: 0.5))(ranks)(x)
    with pytest.raises(go.ForwardResultError, match=r"imle: 'noise' must return .* \(4,\); it returned 0.5, a float"):
        y.sum().backward()


def test_a_minimiser_by_imle():
    x, g = noise(4), noise(4, grad=False)
    still = lambda tensor, generator: torch.zeros_like(tensor)  # noqa: E731
    found = grad(go.custom_backward(imle(2.0, noise=still, maximizes=False))(smallest)(x), x, grad_outputs=g)
    closely(found, grad(go.custom_backward(blackbox(2.0))(smallest)(x), x, grad_outputs=g))


WRONG = [
    (blackbox, {"strength": 0.0}, "blackbox: 'strength' must be a number larger than 0; got 0.0"),
    (blackbox, {"strength": "1"}, "blackbox: 'strength' must be a number larger than 0; got '1'"),
    (blackbox, {"strength": 1.0, "maximizes": 1}, "blackbox: 'maximizes' must be True or False; got 1"),
    (perturbed, {"sigma": 0}, "perturbed: 'sigma' must be a number larger than 0; got 0"),
    (perturbed, {"n": 0}, "perturbed: 'n' must be an integer, 1 or larger; got 0"),
    (perturbed, {"noise": "uniform"}, "perturbed: 'noise' must be 'normal' or 'gumbel'; got 'uniform'"),
    (imle, {"strength": -1}, "imle: 'strength' must be a number larger than 0; got -1"),
    (imle, {"strength": 1, "n": 0}, "imle: 'n' must be an integer, 1 or larger; got 0"),
    (imle, {"strength": 1, "sigma": -2}, "imle: 'sigma' must be a number larger than 0; got -2"),
    (imle, {"strength": 1, "batched": "loop"}, "imle: 'batched' must be None, 'vmap', 'stack' or 'cat'; got 'loop'"),
    (
        imle,
        {"strength": 1, "noise": 3},
        "imle: 'noise' must be 'normal', 'gumbel' or a function of a tensor and a generator; got 3",
    ),
    (
        imle,
        {"strength": 1, "noise": torch.distributions.Gumbel},
        "imle: 'noise' must be 'normal', 'gumbel' or a function of a tensor and a generator; got the class 'Gumbel'",
    ),
]


@pytest.mark.parametrize(("make", "options", "text"), WRONG, ids=lambda value: value if isinstance(value, str) else "")
def test_options_out_of_range_are_errors_when_it_is_made(make, options, text):
    with pytest.raises(go.RuleOptionError) as caught:
        make(**options)
    assert str(caught.value) == text


@pytest.mark.parametrize("name", EVERY)
def test_it_prints_compares_pickles_and_copies(name):
    rule = EVERY[name]
    assert repr(rule).startswith(f"{name}(")
    for again in (pickle.loads(pickle.dumps(rule)), copy.copy(rule), copy.deepcopy(rule)):
        assert again == rule
    with pytest.raises(AttributeError):
        rule.strength = 2.0
