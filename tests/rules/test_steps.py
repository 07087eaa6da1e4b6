"""Roundings, signs, steps and clamps: their values against torch and Python, their gradients against the formula."""

import copy
import inspect
import math
import pickle
from functools import partial

import pytest
import torch
from oracles import closely, exactly, float64, noise
from torch import nn

import gradoverride as go
from gradoverride import rules
from gradoverride.rules import steps
from gradoverride.surrogates import atan, fast_sigmoid, triangle

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*should not be instantiated:DeprecationWarning",  # Dynamo's own doing, for any Function
)

INF, NAN = math.inf, math.nan
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
POINTS = [-INF, -300.0, -2.5, -1.5, -1.0, -0.75, -0.5, -0.0, 0.0, 0.25, 0.5, 1.0, 1.5, 2.5, 300.0, INF]


def sign_of(at_zero):
    return lambda x: float(at_zero if x == 0 or math.isnan(x) else math.copysign(1, x))


def ternary_of(threshold):
    return lambda x: math.copysign(1, x) if abs(x) > threshold else 0.0


def of_torch(function):
    return lambda x: function(torch.tensor(x, dtype=torch.float64)).item()


# Those through which the gradient passes, and what they are, in numbers.
PASSING = {
    "round": (steps.round_ste, of_torch(torch.round)),
    "floor": (steps.floor_ste, of_torch(torch.floor)),
    "ceil": (steps.ceil_ste, of_torch(torch.ceil)),
    "trunc": (steps.trunc_ste, of_torch(torch.trunc)),
    "sign": (steps.sign_ste, sign_of(1)),
    "sign, 0 at 0": (partial(steps.sign_ste, at_zero=0), sign_of(0)),
    "sign, -1 at 0": (partial(steps.sign_ste, at_zero=-1), sign_of(-1)),
    "heaviside": (steps.heaviside_ste, lambda x: float(x >= 0)),
    "heaviside, 0 at 0": (partial(steps.heaviside_ste, at_zero=0), lambda x: float(x > 0)),
    "ternary": (partial(steps.ternary_ste, threshold=0.5), ternary_of(0.5)),
    "ternary 0": (partial(steps.ternary_ste, threshold=0), ternary_of(0)),
    "ternary by a tensor": (lambda x: steps.ternary_ste(x, torch.tensor(0.5, dtype=x.dtype)), ternary_of(0.5)),
    "clamp": (lambda x: steps.clamp_ste(x, -1, 0.5), of_torch(lambda x: x.clamp(-1, 0.5))),
    "clamp below": (lambda x: steps.clamp_ste(x, min=-1.0), of_torch(lambda x: x.clamp(min=-1))),
    "clamp above": (lambda x: steps.clamp_ste(x, max=0.5), of_torch(lambda x: x.clamp(max=0.5))),
    "clamp by a tensor": (
        lambda x: steps.clamp_ste(x, torch.full_like(x, -1), torch.full_like(x, 0.5)),
        of_torch(lambda x: x.clamp(-1, 0.5)),
    ),
}
passing = pytest.mark.parametrize("name", PASSING)


@passing
class TestPassing:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_value_is_exact(self, name, dtype):
        function, expected = PASSING[name]
        wanted = torch.tensor([expected(x) for x in POINTS], dtype=dtype)
        x = torch.tensor(POINTS, dtype=dtype)
        for given in (x, x.clone().requires_grad_()):
            found = function(given)
            exactly(found.detach(), wanted)
            assert found.dtype is dtype

    def test_of_nan_it_is_what_the_plain_one_is(self, name):
        function, expected = PASSING[name]
        found = function(float64(NAN)).item()
        if name.startswith("ternary"):
            assert found == 0 or math.isnan(found)
        else:
            assert found == expected(NAN) or (math.isnan(found) and math.isnan(expected(NAN)))

    def test_gradient_passes_as_it_comes(self, name):
        x = float64(*POINTS, NAN)
        came = torch.cat([noise(len(POINTS), grad=False), float64(NAN, grad=False)])
        came[0] = INF
        exactly(torch.autograd.grad(PASSING[name][0](x), x, came)[0], came)

    def test_input_is_left_as_it_was(self, name):
        x = float64(*POINTS)
        PASSING[name][0](x)
        exactly(x.detach(), float64(*POINTS, grad=False))

    def test_compiled_mapped_and_transformed(self, name):
        function, expected = PASSING[name]
        torch.compiler.reset()
        x, came = float64(*POINTS), noise(len(POINTS), grad=False)
        wanted = float64(*[expected(x) for x in POINTS], grad=False)
        compiled = torch.compile(lambda x: function(x), fullgraph=True, backend="aot_eager")(x)
        exactly(compiled.detach(), wanted)
        exactly(torch.autograd.grad(compiled, x, came)[0], came)
        rows, comes = x.detach().reshape(4, 4), came.reshape(4, 4)
        exactly(torch.func.vmap(function)(rows), wanted.reshape(4, 4))
        gradient = torch.func.vmap(torch.func.grad(lambda x, came: (function(x) * came).nansum()))
        finite = torch.isfinite(rows)
        exactly(gradient(rows, comes)[finite], comes[finite])
        exactly(torch.func.jvp(function, (rows,), (comes,))[1], comes)


# --- clamp_toward ---


def toward(x, came, low, high):
    """The formula, in numbers."""
    if x < low:
        return min(came, 0.0)
    if x > high:
        return max(came, 0.0)
    return came


BOUNDS = {
    "numbers": (lambda x: steps.clamp_toward(x, -1, 0.5), -1, 0.5),
    "below": (lambda x: steps.clamp_toward(x, min=-1), -1, INF),
    "above": (lambda x: steps.clamp_toward(x, max=0.5), -INF, 0.5),
    "tensors": (lambda x: steps.clamp_toward(x, torch.full_like(x, -1), torch.full_like(x, 0.5)), -1, 0.5),
    "one tensor": (lambda x: steps.clamp_toward(x, torch.tensor(-1.0, dtype=x.dtype), torch.tensor(0.5)), -1, 0.5),
}


@pytest.mark.parametrize("name", BOUNDS)
class TestClampToward:
    def test_is_the_formula(self, name):
        function, low, high = BOUNDS[name]
        for came in (2.0, -2.0, 0.0, INF, -INF):
            x = float64(*POINTS)
            y = function(x)
            exactly(y.detach(), x.detach().clamp(low, high))
            found = torch.autograd.grad(y, x, torch.full_like(y, came))[0]
            exactly(found, float64(*[toward(x, came, low, high) for x in POINTS], grad=False))

    def test_descent_comes_back_and_is_not_driven_on(self, name):
        function, low, high = BOUNDS[name]
        x = float64(-3.0, 3.0)
        for _ in range(60):
            (grad,) = torch.autograd.grad((function(x) - 0.25).square().sum(), x)
            x = (x - 0.2 * grad).detach().requires_grad_()
        torch.testing.assert_close(x.detach(), float64(0.25, 0.25, grad=False), rtol=0, atol=1e-3)
        x = float64(-3.0, 3.0)
        (grad,) = torch.autograd.grad(function(x), x, float64(1.0, -1.0, grad=False))
        expected = [0.0 if low > -INF else 1.0, 0.0 if high < INF else -1.0]
        exactly(grad, float64(*expected, grad=False))

    def test_compiled_is_eager(self, name):
        torch.compiler.reset()
        function = BOUNDS[name][0]
        x, came = float64(*POINTS), noise(len(POINTS), grad=False)
        found, wanted = [
            torch.autograd.grad(f(x), x, came)[0]
            for f in (torch.compile(lambda x: function(x), fullgraph=True, backend="aot_eager"), function)
        ]
        exactly(found, wanted)

    def test_func_grad_and_vmap(self, name):
        function, low, high = BOUNDS[name]
        points, came = float64(*POINTS[1:-1], grad=False).reshape(2, 7), noise(2, 7, grad=False)
        found = torch.func.vmap(torch.func.grad(lambda x, came: (function(x) * came).sum()))(points, came)
        pairs = zip(points.flatten().tolist(), came.flatten().tolist(), strict=True)
        exactly(found.flatten(), float64(*[toward(x, c, low, high) for x, c in pairs], grad=False))


def test_forward_mode_refuses_clamp_toward_which_is_not_linear():
    x = noise(3, grad=False)
    with pytest.raises(go.UnsupportedError, match="must be linear in the gradient for forward mode"):
        torch.func.jvp(lambda x: steps.clamp_toward(x, -0.1, 0.1), (x,), (x,))


# --- heaviside, spike ---


@pytest.mark.parametrize("at_zero", [1, 0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_step_is_one_from_zero_or_above_it(dtype, at_zero):
    x = torch.tensor([*POINTS, NAN], dtype=dtype)
    wanted = torch.tensor([float(v >= 0 if at_zero else v > 0) for v in [*POINTS, NAN]], dtype=dtype)
    exactly(steps.heaviside(x, at_zero), wanted)
    exactly(steps.spike(at_zero=at_zero)(x), wanted)
    exactly(steps.spike(at_zero=at_zero)(x.requires_grad_()).detach(), wanted)
    exactly(torch.func.vmap(steps.spike(at_zero=at_zero))(x.detach()), wanted)


@pytest.mark.parametrize("surrogate", [atan(), fast_sigmoid(10.0), triangle(1.0)], ids=str)
@pytest.mark.parametrize("at_zero", [1, 0])
class TestSpike:
    def test_gradient_is_that_of_autograd_of_the_primitive(self, surrogate, at_zero):
        x, came = noise(20), noise(20, grad=False)
        fire = steps.spike(surrogate, at_zero)
        expected = torch.autograd.grad(surrogate.primitive(x), x, came)[0]
        closely(torch.autograd.grad(fire(x), x, came)[0], expected)
        gradient = torch.func.vmap(torch.func.grad(lambda x, came: fire(x) * came))
        closely(gradient(x.detach(), came), expected)

    def test_pickles_copies_and_prints(self, surrogate, at_zero):
        fire, x = steps.spike(surrogate, at_zero), noise(5)
        for twin in (pickle.loads(pickle.dumps(fire)), copy.deepcopy(fire)):
            assert (twin.surrogate, twin.at_zero) == (surrogate, at_zero)
            exactly(torch.autograd.grad(twin(x).sum(), x), torch.autograd.grad(fire(x).sum(), x))
        assert repr(fire) == f"spike({surrogate}, at_zero={at_zero})"


def test_spike_is_a_layer():
    model = nn.Sequential(nn.Linear(3, 4), steps.spike(), nn.Linear(4, 2)).double()
    x = noise(5, 3)
    hidden = model[0](x)
    expected = torch.autograd.grad(model[2](atan().primitive(hidden)).sum(), hidden)[0]
    (found,) = torch.autograd.grad(model[2](model[1](hidden)).sum(), hidden)
    closely(found, expected)
    with go.override(model, {steps.spike: fast_sigmoid()}):  # other people's surrogates are overridden by class
        (found,) = torch.autograd.grad(model[2](model[1](hidden)).sum(), hidden)
    closely(found, torch.autograd.grad(model[2](fast_sigmoid().primitive(hidden)).sum(), hidden)[0])


def test_compiled_spikes_are_eager_ones_in_one_graph():
    torch.compiler.reset()
    model = nn.Sequential(steps.spike(atan(), at_zero=0), nn.Linear(6, 6), steps.spike(triangle(2.0))).double()
    x, came = noise(6), noise(6, grad=False)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    closely(torch.autograd.grad(compiled(x), x, came)[0], torch.autograd.grad(model(x), x, came)[0])


# --- options ---

BAD = {
    "at_zero": (
        lambda x: steps.heaviside(x, 0.5),
        "heaviside: 'at_zero' must be 1 (for x >= 0) or 0 (for x > 0); got 0.5",
    ),
    "at_zero, True": (
        lambda x: steps.heaviside_ste(x, True),
        "heaviside_ste: 'at_zero' must be 1 (for x >= 0) or 0 (for x > 0); got True",
    ),
    "sign": (lambda x: steps.sign_ste(x, 2), "sign_ste: 'at_zero' must be 1, 0 or -1; got 2"),
    "spike": (lambda x: steps.spike(at_zero=-1), "spike: 'at_zero' must be 1 (for x >= 0) or 0 (for x > 0); got -1"),
    "surrogate": (
        lambda x: steps.spike(torch.tanh),
        "spike: 'surrogate' must be one of gradoverride.surrogates; got a builtin_function_or_method",
    ),
    "threshold": (
        lambda x: steps.ternary_ste(x, -0.1),
        "ternary_ste: 'threshold' must be a number that is not negative, or a tensor; got -0.1",
    ),
    "no bounds": (
        lambda x: steps.clamp_ste(x),
        "clamp_ste: 'min' and 'max' must be a number or a tensor, one of them at least; got (None, None)",
    ),
    "bounds": (
        lambda x: steps.clamp_ste(x, 1, -1),
        "clamp_ste: 'min' and 'max' must be numbers with min <= max; got (1, -1)",
    ),
    "nan": (lambda x: steps.clamp_toward(x, NAN), "clamp_toward: 'min' must be a number, a tensor or None; got nan"),
    "text": (
        lambda x: steps.clamp_toward(x, 0, "1"),
        "clamp_toward: 'max' must be a number, a tensor or None; got '1'",
    ),
    "a number and a tensor": (
        lambda x: steps.clamp_ste(x, 0, torch.ones(3)),
        "clamp_ste: 'min' and 'max' must be two numbers or two tensors; got a tuple of 2 (0, an int, a tensor of shape "
        "(3,))",
    ),
    "a tensor and a number": (
        lambda x: steps.clamp_toward(x, torch.ones(3), 2.0),
        "clamp_toward: 'min' and 'max' must be two numbers or two tensors; got a tuple of 2 (a tensor of shape (3,), "
        "2.0, a float)",
    ),
    "no tensor": (lambda x: steps.clamp_ste(0.5, -1, 1), "clamp_ste: 'x' must be a tensor; got 0.5"),
    "no tensor, clamp_toward": (
        lambda x: steps.clamp_toward([1.0], -1, 1),
        "clamp_toward: 'x' must be a tensor; got [1.0]",
    ),
    "no tensor, step": (lambda x: steps.heaviside(0.5), "heaviside: 'x' must be a tensor; got 0.5"),
    "no tensor, step through": (
        lambda x: steps.heaviside_ste(x.detach().numpy()),
        "heaviside_ste: 'x' must be a tensor; got a ndarray",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_options_out_of_range_are_errors(name):
    call, text = BAD[name]
    with pytest.raises(go.RuleOptionError) as caught:
        call(noise(3))
    assert str(caught.value) == text


@pytest.mark.parametrize("name", steps.__all__)
def test_each_is_exported_and_documented(name):
    assert getattr(rules, name) is getattr(steps, name)
    assert name in rules.__all__
    assert ">>> " in inspect.getdoc(getattr(steps, name))
    assert pickle.loads(pickle.dumps(getattr(steps, name))) is getattr(steps, name)
