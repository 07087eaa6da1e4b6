"""Estimators by evaluating the forward: against autograd and closed forms, in the mean where they are random."""

import copy
import math
import pickle
import re
from collections import Counter
from typing import NamedTuple

import numpy as np
import pytest
import torch
from oracles import closely, exactly, float64, noise
from torch import nn

import gradoverride as go
from gradoverride.estimators import evolution, finite_difference, fixed_point, spsa

BY_DIFFERENCES = {"rtol": 1e-6, "atol": 1e-8}  # central ones, in float64
EVERY = {"finite_difference": finite_difference, "spsa": spsa, "evolution": evolution}
RANDOM = {"spsa": spsa, "evolution": evolution}
DYNAMO = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # its own
every = pytest.mark.parametrize("make", EVERY.values(), ids=EVERY)


def nearly(actual, expected):
    torch.testing.assert_close(actual, expected, **BY_DIFFERENCES)


def grad(result, *inputs, grad_outputs=None):
    found = torch.autograd.grad(result, inputs, grad_outputs)
    return found[0] if len(found) == 1 else found


def scalar(value):
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


def draws(seed=0):
    return torch.Generator().manual_seed(seed)


# --- finite differences against autograd


def smooth(x, y):
    return {"values": (x * y).sin() + x.square().sum(), "pair": (y.exp().sum(), x[0] * y)}


def weighted(result):
    return result["values"].cos().sum() + 3 * result["pair"][0].sin() + result["pair"][1].sum()


def test_several_arguments_and_a_structure_of_results():
    x, y = noise(3), noise(3)
    nearly(
        grad(weighted(go.custom_backward(finite_difference())(smooth)(x, y)), x, y),
        grad(weighted(smooth(x, y)), x, y),
    )


class Two(NamedTuple):
    low: torch.Tensor
    high: torch.Tensor


def all_kinds(first, pair, power=2, /, *, scale, name="text", **rest):
    assert name == "text"
    assert rest["index"].dtype == torch.int64
    return Two(first**power * scale, pair["a"] * pair["b"][0] * rest["factor"][rest["index"]])


def test_arguments_of_all_kinds():
    a, b, c, d = noise(3), noise(3), noise(3), noise(3)
    index = torch.tensor([2, 0, 1])

    def loss(fn):
        found = fn(a, {"a": b, "b": [c, "no tensor"]}, 3, scale=2.0, factor=d, index=index)
        assert type(found) is Two
        return (found.low * found.high.exp()).sum()

    nearly(
        grad(loss(go.custom_backward(finite_difference())(all_kinds)), a, b, c, d),
        grad(loss(all_kinds), a, b, c, d),
    )


def mixed(first, *more, scale, **rest):
    return first * more[0] * scale + more[1] * rest["last"].exp()


def test_variadic_arguments_and_keywords():
    a, b, c, d, e = (noise(3) for _ in range(5))

    def loss(fn):
        return fn(a, b, c, scale=d, last=e).sin().sum()

    nearly(grad(loss(go.custom_backward(finite_difference())(mixed)), a, b, c, d, e), grad(loss(mixed), a, b, c, d, e))


def test_variadic_arguments():
    def total(*parts):
        return sum(part.exp().sum() * (k + 1) for k, part in enumerate(parts))

    parts = [noise(2), noise(3), scalar(0.7)]
    nearly(grad(go.custom_backward(finite_difference())(total)(*parts), *parts), grad(total(*parts), *parts))


def test_only_arguments_that_want_a_gradient_are_moved():
    calls = Counter()

    @go.custom_backward(finite_difference())
    def product(x, y):
        calls["product"] += 1
        return (x * y).sum()

    x, y = noise(3), noise(50, 3, grad=False)
    result = product(x, y)
    calls.clear()
    nearly(grad(result, x), y.sum(0))
    assert calls["product"] == 2 * 3 + 1  # once to see that it repeats


def test_complex_arguments_and_results():
    def fn(z, x):
        return (z * z.conj().exp() * x, z.abs())

    def loss(pair):
        return pair[0].abs().sum() + (pair[0] * (1 + 2j)).real.sum() + pair[1].square().sum()

    z, x = noise(3, dtype=torch.complex128), noise(3)
    nearly(grad(loss(go.custom_backward(finite_difference())(fn)(z, x)), z, x), grad(loss(fn(z, x)), z, x))


def test_one_sided_differences():
    x = noise(4)
    found = grad(go.custom_backward(finite_difference(central=False))(lambda x: x.sin())(x).sum(), x)
    torch.testing.assert_close(found, x.cos(), rtol=1e-6, atol=1e-7)


def test_error_of_a_given_step_is_that_of_the_series():
    """The central difference of x^3 is 3 x^2 + h^2, the one-sided one 3 x^2 + 3 x h + h^2."""
    x, h = float64(0.5, -0.25), 0.1
    cube = lambda x: x**3  # noqa: E731
    closely(
        grad(go.custom_backward(finite_difference(eps=h, batch_dims=1))(cube)(x).sum(), x), (3 * x**2 + h**2).detach()
    )
    found = grad(go.custom_backward(finite_difference(eps=h, central=False))(cube)(x).sum(), x)
    closely(found, (3 * x**2 + 3 * x * h + h**2).detach())


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.float16, 0.05), (torch.bfloat16, 0.2)], ids=str
)
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_narrow_dtypes_at_all_sizes(dtype, tolerance, size):
    x = (torch.tensor([0.5, -1.5, 2.5]) * size).to(dtype).requires_grad_()
    found = grad(go.custom_backward(finite_difference())(lambda x: 3 * x)(x).sum(), x)
    assert found.dtype is dtype
    torch.testing.assert_close(found, torch.full_like(x, 3), rtol=tolerance, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@every
def test_a_step_is_never_lost_in_rounding(make, dtype):
    """1000 has neighbours 8 away in bfloat16; a step of 1e-12 would be none."""
    x = torch.tensor([1000.0, -1000.0], dtype=dtype, requires_grad=True)
    option, tolerance = {"eps": 1e-12}, 0.02
    if make is evolution:
        option, tolerance = {"sigma": 1e-12, "n": 4000, "generator": draws(), "batched": "stack"}, 0.1
    for more in [{}] if make is spsa else [{}, {"central" if make is finite_difference else "antithetic": False}]:
        rule = make(**option, **more, batch_dims=1)
        found = grad(go.custom_backward(rule)(lambda x: 2 * x)(x).sum(), x)
        torch.testing.assert_close(found, torch.full_like(x, 2), rtol=tolerance, atol=0)


def test_empty_and_scalar_tensors():
    for batched in (None, "vmap", "stack", "cat"):
        x = torch.zeros(0, 3, dtype=torch.float64, requires_grad=True)
        found = grad(go.custom_backward(finite_difference(batched=batched))(lambda x: x * 2)(x).sum(), x)
        assert found.shape == (0, 3)
    y = scalar(0.7)
    nearly(grad(go.custom_backward(finite_difference())(torch.nn.functional.silu)(y), y), grad(y.sigmoid() * y, y))


# --- random ones: in the mean


def estimates(make, fn, x, count, **options):
    """Independent estimates of the gradient of `fn` at x, each a row: samples of one batch."""
    rows = x.detach().expand(count, *x.shape).clone().requires_grad_()
    generator = draws()
    rule = make(batch_dims=1, generator=generator, **options)
    return grad(go.custom_backward(rule)(fn)(rows).sum(), rows)


def is_unbiased(rows, truth):
    """Whether the mean is within 4 standard errors: in a fair test of 20 numbers once in 800 times it is not."""
    error = rows.std(0) / math.sqrt(len(rows))
    return bool(((rows.mean(0) - truth).abs() <= 4 * error).all())


A = torch.tensor([[2.0, 1.0, -1.0], [1.0, -3.0, 0.5], [-1.0, 0.5, 1.0]], dtype=torch.float64)
X = torch.tensor([0.3, -0.8, 1.2], dtype=torch.float64)


def quadratic(x):
    """Vectors: (x A x) and x, row by row."""
    return torch.cat([((x @ A) * x).sum(-1, keepdim=True), 2 * x], -1)


TRUTH = 2 * A @ X + 2

UNBIASED = {  # a function, options, and the gradient that is estimated without bias
    "spsa of a quadratic": (spsa, quadratic, {"eps": 0.3}, TRUTH),
    "spsa, n": (spsa, quadratic, {"n": 3}, TRUTH),
    "evolution of a quadratic": (evolution, quadratic, {"n": 1, "sigma": 0.5}, TRUTH),
    "evolution, n": (evolution, quadratic, {"n": 3}, TRUTH),
    "evolution, one-sided": (evolution, quadratic, {"n": 1, "sigma": 0.5, "antithetic": False}, TRUTH),
    "evolution of sin, blurred": (evolution, lambda x: x.sin(), {"n": 1, "sigma": 0.8}, X.cos() * math.exp(-0.32)),
    "evolution of a cube, blurred": (evolution, lambda x: x**3, {"n": 2, "sigma": 0.7}, 3 * X**2 + 3 * 0.49),
    "evolution of a step, blurred": (
        evolution,
        lambda x: (x >= 0).to(x.dtype),
        {"n": 4, "sigma": 0.6},
        torch.exp(-((X / 0.6) ** 2) / 2) / (0.6 * math.sqrt(2 * math.pi)),
    ),
}


@pytest.mark.parametrize("name", UNBIASED)
class TestBias:
    def test_the_mean_is_the_gradient(self, name):
        make, fn, options, truth = UNBIASED[name]
        assert is_unbiased(estimates(make, fn, X, 20_000, **options), truth)

    @pytest.mark.parametrize("factor", [2.0, 0.5, -1.0, 0.9])
    def test_a_planted_scaling_error_is_caught(self, name, factor, monkeypatch):
        make, fn, options, truth = UNBIASED[name]
        right = make.gradients
        monkeypatch.setattr(make, "gradients", lambda *given: [factor * one for one in right(*given)])
        assert not is_unbiased(estimates(make, fn, X, 20_000, **options), truth)


def test_the_bias_of_spsa_is_that_of_the_series():
    """Of x^3 summed: 3 x^2 + eps^2."""
    rows = estimates(spsa, lambda x: x**3, X, 4000, eps=0.5)
    assert is_unbiased(rows, 3 * X**2 + 0.25)
    assert not is_unbiased(rows, 3 * X**2)


@pytest.mark.parametrize("n", [1, 4])
def test_variances_are_as_documented(n):
    """Of a linear function with the derivatives w."""
    w = torch.tensor([3.0, -2.0, 1.0], dtype=torch.float64)
    others = w.square().sum() - w.square()
    found = estimates(spsa, lambda x: x * w, X, 8000, n=n).var(0)
    torch.testing.assert_close(found, others / n, rtol=0.1, atol=0)
    found = estimates(evolution, lambda x: x * w, X, 8000, n=n).var(0)
    torch.testing.assert_close(found, (others + 2 * w.square()) / n, rtol=0.1, atol=0)


@pytest.mark.parametrize("name", RANDOM)
def test_without_batch_dims_it_is_unbiased_too(name):
    """The whole batch is one sample then, with more variance."""
    rule = RANDOM[name](n=100, generator=draws())
    fn = go.custom_backward(rule)(quadratic)
    x = torch.stack([X, -X]).requires_grad_()
    rows = torch.stack([grad(fn(x).sum(), x) for _ in range(20)])
    assert is_unbiased(rows, torch.stack([TRUTH, -2 * A @ X + 2]))


# --- options alike in all


@pytest.mark.parametrize("batched", [None, "vmap", "stack", "cat"])
class TestBatched:
    @every
    def test_gives_the_same_in_one_call(self, batched, make):
        calls = Counter()

        def fn(x, factor, name):
            calls[name] += 1
            return {"a": (x * factor).sin(), "b": x.flip(-1).exp()}

        def gradient(batched):
            options = {} if make is finite_difference else {"n": 3, "generator": draws()}
            rule = make(batched=batched, **options)
            found = go.custom_backward(rule)(fn)(x, factor, "fn")
            calls.clear()
            return grad(found["a"].sum() + found["b"].square().sum(), x)

        x, factor = noise(2, 3), noise(2, 3, grad=False)
        expected = gradient(None)
        assert calls["fn"] == (12 if make is finite_difference else 6) + 1
        closely(gradient(batched), expected)
        if batched:
            assert calls["fn"] == 1 + 1

    def test_a_function_of_rows(self, batched):
        def rows(x, y):
            return (x @ x.new_tensor([[1.0, 2.0], [0.5, -1.0]])).sin() * y

        x, y = noise(5, 2), noise(5, 2)
        rule = finite_difference(batch_dims=1, batched=batched)
        if batched == "stack":
            rule = finite_difference(batched=batched)
        nearly(grad(go.custom_backward(rule)(rows)(x, y).exp().sum(), x, y), grad(rows(x, y).exp().sum(), x, y))


def test_batch_dims_needs_as_many_calls_as_one_sample_has_numbers():
    calls = Counter()

    @go.custom_backward(finite_difference(batch_dims=2))
    def fn(x):
        calls["fn"] += 1
        return x.sin().cumsum(-1)

    x = noise(4, 5, 3)
    y = fn(x)
    calls.clear()
    nearly(grad(y.exp().sum(), x), grad(x.sin().cumsum(-1).exp().sum(), x))
    assert calls["fn"] == 2 * 3 + 1


COSTS = {
    "finite_difference": (finite_difference(), 2 * 6),
    "finite_difference, one-sided": (finite_difference(central=False), 6),
    "finite_difference of samples": (finite_difference(batch_dims=1), 2 * 3),
    "finite_difference of numbers": (finite_difference(batch_dims=2), 2),
    "spsa": (spsa(), 2),
    "spsa, n": (spsa(n=5), 10),
    "evolution": (evolution(), 32),
    "evolution, n": (evolution(n=3), 6),
    "evolution, one-sided": (evolution(n=3, antithetic=False), 3),
}


@pytest.mark.parametrize("name", COSTS)
def test_cost_is_as_documented(name):
    rule, cost = COSTS[name]
    calls = Counter()

    @go.custom_backward(rule)
    def fn(x):
        calls["fn"] += 1
        return x * 2

    x = noise(2, 3)
    for first in (1, 0):  # the first time it is looked at whether it repeats
        y = fn(x)
        assert calls["fn"] == 1
        y.sum().backward()
        assert calls["fn"] == 1 + cost + first
        calls.clear()


@pytest.mark.parametrize("name", RANDOM)
def test_the_generator_decides_and_torchs_own_is_left_alone(name):
    fn = lambda x: x.sin()  # noqa: E731
    x = noise(5)

    def gradient(**options):
        return grad(go.custom_backward(RANDOM[name](**options))(fn)(x).sum(), x)

    state = torch.get_rng_state()
    exactly(gradient(generator=draws(1)), gradient(generator=draws(1)))
    assert not torch.equal(gradient(generator=draws(1)), gradient(generator=draws(2)))
    exactly(torch.get_rng_state(), state)
    assert not torch.equal(gradient(), gradient())


# --- forwards of all kinds


def test_code_of_numpy_by_bridge():
    @go.bridge(finite_difference())
    def sorted_cumsum(x, k):
        assert type(x) is np.ndarray
        return np.cumsum(np.sort(x)) * k

    x = noise(5)
    nearly(grad(sorted_cumsum(x, 3).exp().sum(), x), grad((x.sort().values.cumsum(0) * 3).exp().sum(), x))


def test_method_of_a_module_leaves_its_parameters_to_autograd():
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(float64(2.0, -1.0, 0.5, grad=False))

        @go.custom_backward(finite_difference())
        def forward(self, x):
            return (self.weight * x).sin()

    layer, x = Layer(), noise(3)
    nearly(grad(layer(x).exp().sum(), x, layer.weight), grad((layer.weight * x).sin().exp().sum(), x, layer.weight))


class Simulator:
    factor = 3.0

    def run(self, x):
        return torch.from_numpy(self.factor * x.numpy() ** 2)

    @go.custom_backward(finite_difference())
    def decorated(self, x):
        return self.run(x)


def test_bound_method_of_any_object():
    x = noise(3)
    nearly(grad(go.custom_backward(finite_difference())(Simulator().run)(x).sum(), x), 6 * x)


def test_method_of_any_object():
    x = noise(3)
    nearly(grad(Simulator().decorated(x).sum(), x), 6 * x)


def test_builtin_without_a_signature_is_refused():
    with pytest.raises(go.RuleSignatureError, match=r"'round' \(built in\) must have a signature, for an estimator"):
        go.custom_backward(spsa())(torch.round)


class Square(nn.Module):
    def forward(self, x):
        return x.square()


class Power(nn.Module):
    def forward(self, x, power=2):
        return x**power


def test_override_of_modules():
    model, x = nn.Sequential(nn.Linear(3, 3).double(), Square(), Power()), noise(2, 3)
    expected = grad(model(x).exp().sum(), x, *model.parameters())
    for target in (Square, Power, nn.Linear):  # whose parameters keep autograd's own
        with go.override(model, {target: finite_difference(batch_dims=1)}):
            y = model(x)
        nearly(grad(y.exp().sum(), x, *model.parameters()), expected)


def test_override_of_a_function():
    x = noise(3)
    with go.override({nn.functional.silu: finite_difference()}):
        y = nn.functional.silu(x)
    nearly(grad(y.exp().sum(), x), grad(nn.functional.silu(x).exp().sum(), x))


def test_in_a_chain():
    rule = go.rules.chain(go.rules.scale(3.0), finite_difference())
    for fn in (nn.functional.silu, mixed):
        more = () if fn is nn.functional.silu else (noise(3), noise(3))
        named = {} if fn is nn.functional.silu else {"scale": noise(3), "last": noise(3)}
        x = noise(3)
        nearly(
            grad(go.custom_backward(rule)(fn)(x, *more, **named).sum(), x, *more, *named.values()),
            grad(3 * fn(x, *more, **named).sum(), x, *more, *named.values()),
        )
    assert pickle.loads(pickle.dumps(rule)) == rule


def test_an_argument_may_have_the_name_of_the_gradient():
    x, scale = noise(3), noise(3)

    def fn(grad_output, _grad_output):
        return grad_output.sin() * _grad_output

    for rule in (finite_difference(), go.rules.chain(finite_difference())):
        nearly(grad(go.custom_backward(rule)(fn)(x, scale).sum(), x, scale), grad(fn(x, scale).sum(), x, scale))


def test_called_by_another_rule_it_serves_one_argument():
    estimate = finite_difference()

    def halved(grad_output, forward, input, output, needs, module):
        return estimate(grad_output, forward, input, output, needs, module)["x"] / 2

    x = noise(3)
    nearly(grad(go.custom_backward(halved)(lambda x: x.sin())(x).sum(), x), x.cos() / 2)
    y = go.custom_backward(halved)(lambda x, power: x**power)(x, 2)
    with pytest.raises(go.UnsupportedError, match=r"must have one argument; it has 'x', 'power'\. Decorate a function"):
        y.sum().backward()


# --- transforms, compiled, second derivatives


def bumps(x):
    return x.sin().sum(-1)


def test_vmap_and_grad():
    fn = go.custom_backward(finite_difference())(bumps)
    x = noise(4, 3, grad=False)
    nearly(torch.func.vmap(torch.func.grad(fn))(x), x.cos())
    nearly(torch.func.grad(lambda x: torch.func.vmap(fn)(x).sum())(x), x.cos())
    nearly(torch.func.jacrev(go.custom_backward(finite_difference())(lambda x: x.sin()))(x[0]), x[0].cos().diag())


@pytest.mark.parametrize("shape", [(0, 3), (4, 0, 3)])
def test_vmap_over_an_empty_batch_gives_an_empty_gradient(shape):
    fn = torch.func.grad(go.custom_backward(finite_difference())(bumps))
    for _ in shape[1:]:
        fn = torch.func.vmap(fn)
    found = fn(torch.zeros(shape, dtype=torch.float64))
    assert found.shape == shape
    assert found.dtype is torch.float64


@pytest.mark.parametrize("name", RANDOM)
def test_vmap_draws_for_each_in_the_batch_if_told_to(name):
    rule = RANDOM[name](n=200, generator=draws())
    fn, x = go.custom_backward(rule)(bumps), noise(4, 3, grad=False)
    found = torch.func.vmap(torch.func.grad(fn), randomness="different")(x)
    torch.testing.assert_close(found, x.cos(), rtol=0, atol=0.5)
    with pytest.raises(RuntimeError, match="randomness error mode"):
        torch.func.vmap(torch.func.grad(fn))(x)


def test_forward_mode_of_finite_differences():
    x, tangent = noise(3, grad=False), noise(3, grad=False)
    fn = go.custom_backward(finite_difference())(bumps)
    nearly(torch.func.jvp(fn, (x,), (tangent,))[1], x.cos() @ tangent)


@pytest.mark.parametrize("name", RANDOM)
def test_forward_mode_refuses_what_is_drawn_anew(name):
    x = noise(3, grad=False)
    with pytest.raises(go.UnsupportedError, match="must be linear in the gradient for forward mode"):
        torch.func.jvp(go.custom_backward(RANDOM[name]())(bumps), (x,), (x,))


@every
class TestSecondDerivatives:
    text = "second derivatives of 'bumps' .* are not known"

    def test_are_refused(self, make):
        x = noise(3)
        y = go.custom_backward(make())(bumps)(x)
        (first,) = torch.autograd.grad(y, x, create_graph=True)
        with pytest.raises(go.UnsupportedError, match=self.text):
            first.sum().backward()

    def test_are_refused_under_transforms(self, make):
        fn = go.custom_backward(make())(bumps)
        with pytest.raises(go.UnsupportedError, match=self.text):
            torch.func.grad(lambda x: torch.func.grad(fn)(x).sum())(noise(3, grad=False))

    def test_by_the_gradient_alone_are_right(self, make):
        """Linear in the gradient: its derivative by that is the estimate for 1."""
        options = {} if make is finite_difference else {"generator": draws()}
        x, factor = noise(3), scalar(0.7)
        y = go.custom_backward(make(**options))(bumps)(x)
        (first,) = torch.autograd.grad(y * factor, x, create_graph=True)
        closely(grad(first.sum(), factor) * factor.detach(), first.sum().detach())


@DYNAMO
@pytest.mark.parametrize(("make", "backend"), [(finite_difference, "aot_eager"), (spsa, "eager"), (evolution, "eager")])
def test_compiled_it_is_as_uncompiled(make, backend):
    torch.compiler.reset()
    options = {} if make is finite_difference else {"generator": draws()}
    fn = go.custom_backward(make(**options))(bumps)

    def whole(x):
        return (fn(x * 2) * 3).exp()

    x = noise(3)
    expected = grad(whole(x), x)
    if make is not finite_difference:
        options["generator"].manual_seed(0)
    closely(grad(torch.compile(whole, backend=backend)(x), x), expected)


@DYNAMO
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # its own, too
@pytest.mark.parametrize("door", ["override", "chain"])
def test_compiled_by_other_doors(door):
    torch.compiler.reset()
    x = noise(3)
    expected = grad((2 * x).square().exp().sum(), x)
    if door == "override":
        model = nn.Sequential(nn.Identity(), Square())
        with go.override(model, {Square: finite_difference()}):
            found = grad(torch.compile(lambda x: model(2 * x).exp().sum(), backend="eager")(x), x)
    else:
        fn = go.custom_backward(go.rules.chain(go.rules.scale(1.0), finite_difference()))(lambda x: x.square())
        found = grad(torch.compile(lambda x: fn(2 * x).exp().sum(), backend="eager")(x), x)
    nearly(found, expected)


@DYNAMO
def test_compiled_as_one_graph_it_is_refused():
    torch.compiler.reset()
    fn = go.custom_backward(spsa())(bumps)
    with pytest.raises(Exception, match="an estimator evaluates its forward again"):
        torch.compile(lambda x: fn(x * 2), backend="eager", fullgraph=True)(noise(3))


# --- errors


@every
def test_a_random_forward_is_refused(make):
    fn = go.custom_backward(make())(lambda x: nn.functional.dropout(x, 0.5))
    y = fn(torch.ones(50, requires_grad=True))
    with pytest.raises(go.ForwardResultError) as caught:
        y.sum().backward()
    assert "must return the same for the same arguments" in str(caught.value)
    assert str(caught.value).endswith("Draw its random numbers beforehand, and give them as an argument")


@pytest.mark.parametrize("name", RANDOM)
def test_a_random_forward_may_be_let_through(name):
    """Its noise has mean 0, so the mean is right all the same."""
    fn = lambda x: quadratic(x) + 0.1 * torch.randn(len(x), 4, dtype=x.dtype)  # noqa: E731
    rows = (
        estimates(RANDOM[name], fn, X, 4000, eps=0.3, deterministic=False)
        if name == "spsa"
        else estimates(RANDOM[name], fn, X, 4000, n=1, sigma=0.3, deterministic=False)
    )
    assert is_unbiased(rows, TRUTH)


def test_a_result_whose_shape_depends_on_values_is_refused():
    fn = go.custom_backward(finite_difference(eps=1.0))(lambda x: x[x > 0])
    y = fn(float64(0.5, 1.5, -2.0))
    with pytest.raises(go.ForwardResultError, match=r"result of the same shape wherever .* \(2,\); it returned \(1,\)"):
        y.sum().backward()


def test_batch_dims_that_do_not_fit_are_refused():
    y = go.custom_backward(spsa(batch_dims=1))(lambda x, y: (x * y).sum())(noise(3), noise(3))
    with pytest.raises(go.ForwardResultError, match=r"first 1 sizes are the same .* shapes \(3,\), \(3,\), \(\)"):
        y.backward()


def test_batched_calls_that_do_not_fit_are_refused():
    x = noise(3)
    y = go.custom_backward(spsa(batched="stack"))(lambda x: x.sum())(x)
    with pytest.raises(
        go.ForwardResultError, match=r"must return a result of the same shape .* \(2,\); it returned \(\)"
    ):
        y.backward()
    y = go.custom_backward(spsa(batched="cat"))(lambda x: x.sum())(x)
    with pytest.raises(go.ForwardResultError, match=r"one is a scalar. Use batched='stack', or 'vmap'"):
        y.backward()


def test_a_module_that_writes_into_its_buffers_has_written_once():
    class Normalised(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        @go.custom_backward(finite_difference())
        def forward(self, x):
            return self.norm(x)

    model, x = Normalised().double(), noise(4, 3)
    found = grad(model(x).exp().sum(), x, *model.parameters())
    assert model.norm.num_batches_tracked == 1
    after = model.norm.running_mean.clone()
    model.norm.reset_running_stats()
    nearly(found, grad(model.norm(x).exp().sum(), x, *model.parameters()))
    exactly(model.norm.running_mean, after)


def test_a_result_of_integers_alone_is_refused():
    def ranks(x):
        return x.argsort()

    estimated = go.custom_backward(spsa())(ranks)
    with pytest.raises(go.ForwardResultError) as caught:
        estimated(noise(3))
    assert re.fullmatch(
        r"'.*ranks' \(.*\) must return a floating tensor, for its rule 'spsa' \(.*\) to give it a gradient; it "
        r"returned a tensor of shape \(3,\) of torch\.int64\. Convert it: \.to\(torch\.get_default_dtype\(\)\)",
        str(caught.value),
    )
    assert estimated(noise(3).detach()).dtype is torch.int64  # nobody asks for a gradient


@pytest.mark.parametrize("make", [finite_difference, evolution, lambda: fixed_point(lambda y, x: y)])
def test_every_estimator_refuses_a_result_of_integers_alone(make):
    with pytest.raises(go.ForwardResultError, match=r"must return a floating tensor, .* of torch\.int64"):
        go.custom_backward(make())(lambda x: x.argsort())(noise(3))


def test_a_result_that_is_no_tensor_is_told_from_one_of_integers():
    with pytest.raises(go.ForwardResultError, match="must return at least one tensor"):
        go.custom_backward(spsa())(lambda x: 0.5)(noise(3))


WRONG = [
    (spsa, {"n": 0}, "spsa: 'n' must be an integer, 1 or larger; got 0"),
    (spsa, {"n": 1.5}, "spsa: 'n' must be an integer, 1 or larger; got 1.5"),
    (evolution, {"n": True}, "evolution: 'n' must be an integer, 1 or larger; got True"),
    (evolution, {"sigma": 0.0}, "evolution: 'sigma' must be a number larger than 0; got 0.0"),
    (evolution, {"sigma": -1}, "evolution: 'sigma' must be a number larger than 0; got -1"),
    (evolution, {"antithetic": 1}, "evolution: 'antithetic' must be True or False; got 1"),
    (spsa, {"eps": 0}, "spsa: 'eps' must be a number larger than 0; got 0"),
    (spsa, {"eps": None}, "spsa: 'eps' must be a number larger than 0; got None"),
    (finite_difference, {"eps": math.nan}, "finite_difference: 'eps' must be None or a number larger than 0; got nan"),
    (finite_difference, {"central": None}, "finite_difference: 'central' must be True or False; got None"),
    (finite_difference, {"batch_dims": -1}, "finite_difference: 'batch_dims' must be an integer, 0 or larger; got -1"),
    (spsa, {"batched": True}, "spsa: 'batched' must be None, 'vmap', 'stack' or 'cat'; got True"),
    (spsa, {"generator": 3}, "spsa: 'generator' must be None or a torch.Generator; got 3"),
    (spsa, {"deterministic": 0}, "spsa: 'deterministic' must be True or False; got 0"),
]


@pytest.mark.parametrize(("make", "options", "text"), WRONG, ids=lambda value: value if isinstance(value, str) else "")
def test_options_out_of_range_are_errors_when_it_is_made(make, options, text):
    with pytest.raises(go.RuleOptionError) as caught:
        make(**options)
    assert str(caught.value) == text


# --- values


@every
def test_it_prints_compares_pickles_and_copies(make):
    rule = make(batch_dims=1)
    assert repr(rule).startswith(f"{make.__name__}(")
    assert "batch_dims=1" in repr(rule)
    assert rule == make(batch_dims=1) != make()
    for again in (pickle.loads(pickle.dumps(rule)), copy.copy(rule), copy.deepcopy(rule)):
        assert again == rule
    with pytest.raises(AttributeError):
        rule.batch_dims = 2


def test_a_generator_pickles_with_its_state():
    generator = draws(3)
    torch.rand(5, generator=generator)
    again = pickle.loads(pickle.dumps(spsa(generator=generator)))
    exactly(torch.rand(3, generator=again.generator), torch.rand(3, generator=generator))


def test_a_decorated_function_pickles_and_keeps_its_name():
    assert pickle.loads(pickle.dumps(decorated)) is decorated
    assert decorated(noise(3)).grad_fn.name() == "decoratedBackward"


@go.custom_backward(spsa())
def decorated(x):
    return x * 2
