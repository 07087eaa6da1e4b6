"""`straight_through`: exact values, and the gradient of the identity or of a surrogate. Contract, section 3."""

import contextlib
import functools
import re

import pytest
import torch
import torch.nn.functional as F
from oracles import closely, exactly, float64, noise
from torch import nn
from torch.utils.checkpoint import checkpoint

import gradoverride as go

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
ids = [str(dtype).removeprefix("torch.") for dtype in FLOATS]
every_float = pytest.mark.parametrize("dtype", FLOATS, ids=ids)

ROUNDINGS = {
    "sign": torch.sign,
    "round": torch.round,
    "floor": torch.floor,
    "heaviside": lambda x: (x > 0).to(x.dtype),
    "levels": lambda x: torch.round(x * 3) / 3,
    "clamp": lambda x: x.clamp(-1, 1),
    "one hot": lambda x: F.one_hot(x.argmax(-1), x.shape[-1]).to(x.dtype),
}
every_rounding = pytest.mark.parametrize("rounding", ROUNDINGS.values(), ids=ROUNDINGS)


def same_bits(actual, expected):
    exactly(actual, expected)
    assert torch.equal(actual.signbit(), expected.signbit())


def awkward(dtype):
    """Values at which the idiom `x + (f(x) - x).detach()` goes wrong, and others."""
    return torch.tensor(
        [300, -300, 0.1, 1e-3, 0.5, -0.5, 2.5, -0.4, 0.0, -0.0, 6e4, float("inf"), -float("inf")], dtype=dtype
    )


@every_float
@every_rounding
def test_value_is_exactly_the_forwards(rounding, dtype):
    x = awkward(dtype)
    same_bits(go.straight_through(rounding)(x.clone().requires_grad_()).detach(), rounding(x))


@every_float
@every_rounding
def test_value_with_a_surrogate_is_exactly_the_forwards(rounding, dtype):
    x = awkward(dtype)
    decorated = go.straight_through(rounding, surrogate=torch.tanh)
    same_bits(decorated(x.clone().requires_grad_()).detach(), rounding(x))


def test_value_of_bfloat16_sign_of_300_is_1():
    x = torch.tensor([300.0], dtype=torch.bfloat16, requires_grad=True)
    assert go.straight_through(torch.sign)(x).item() == 1.0
    assert (x + (torch.sign(x) - x).detach()).item() == 0.0  # the idiom


def test_nan_stays_nan():
    assert go.straight_through(torch.round)(float64(float("nan"))).isnan().all()


@every_float
@every_rounding
def test_gradient_passes_unchanged(rounding, dtype):
    x = awkward(dtype).requires_grad_()
    grad_output = torch.randn(13).to(dtype)
    go.straight_through(rounding)(x).backward(grad_output)
    same_bits(x.grad, grad_output)


SURROGATES = {
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "hardtanh": F.hardtanh,
    "lambda": lambda x: x**3,
    "module": nn.Softplus(),
    "function": lambda x: torch.atan(2 * x) / 2,
    "softmax": lambda x: x.softmax(-1),
}


@pytest.mark.parametrize("surrogate", SURROGATES.values(), ids=SURROGATES)
def test_gradient_is_the_derivative_of_the_surrogate(surrogate):
    x, grad_output = noise(2, 5), noise(2, 5, grad=False)
    go.straight_through(torch.sign, surrogate=surrogate)(x).backward(grad_output)
    twin = x.detach().clone().requires_grad_()
    surrogate(twin).backward(grad_output)
    closely(x.grad, twin.grad)


@every_float
def test_gradient_of_a_surrogate_has_the_dtype_of_the_input(dtype):
    x = torch.randn(5).to(dtype).requires_grad_()
    go.straight_through(torch.sign, surrogate=torch.tanh)(x).sum().backward()
    twin = x.detach().clone().requires_grad_()
    torch.tanh(twin).sum().backward()
    exactly(x.grad, twin.grad)


@pytest.mark.parametrize("around", [contextlib.nullcontext, torch.autograd.graph.save_on_cpu], ids=["alone", "hooks"])
def test_surrogate_has_second_derivatives(around):
    x, grad_output = noise(5), noise(5)
    y = go.straight_through(torch.sign, surrogate=torch.tanh)(x)
    with around():  # hooks on saved tensors, under which torch.func does not run
        (grad,) = torch.autograd.grad(y, x, grad_output, create_graph=True)
    second_x, second_grad = torch.autograd.grad(grad.sum(), (x, grad_output))
    tanh = x.detach().tanh()
    closely(second_x, grad_output.detach() * -2 * tanh * (1 - tanh**2))
    closely(second_grad, 1 - tanh**2)


def test_gradient_of_the_identity_is_linear_in_the_incoming_one():
    x = noise(5)
    y = go.straight_through(torch.round)(x)
    grad_output = noise(5)
    (grad,) = torch.autograd.grad(y, x, grad_output, create_graph=True)
    exactly(torch.autograd.grad(grad.sum(), grad_output)[0], torch.ones(5, dtype=torch.float64))


# Ways to write it


@go.straight_through
def bare(x):
    """Round."""
    return torch.round(x)


@go.straight_through(surrogate=torch.tanh)
def with_surrogate(x):
    """Round."""
    return torch.round(x)


@go.straight_through()
def with_empty_brackets(x):
    """Round."""
    return torch.round(x)


class Rounder(nn.Module):
    @go.straight_through
    def forward(self, x):
        return torch.round(x)


@go.straight_through
class RounderClass(nn.Module):
    def forward(self, x):
        return torch.round(x)


class Methods:
    @go.straight_through
    @staticmethod
    def static(x):
        return torch.round(x)

    @classmethod
    @go.straight_through
    def of_class(cls, x):
        return torch.round(x)


WAYS = {
    "bare": bare,
    "empty brackets": with_empty_brackets,
    "call": go.straight_through(torch.round),
    "lambda": go.straight_through(lambda x: torch.round(x)),
    "forward": Rounder(),
    "class": RounderClass(),
    "static method": Methods.static,
    "class method": Methods.of_class,
    "bound": go.straight_through(Rounder().forward),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_every_way_to_write_it_passes_the_gradient(way):
    x = float64(0.4, 1.6)
    y = way(x)
    exactly(y.detach(), float64(0.0, 2.0, grad=False))
    y.backward(float64(3.0, 5.0, grad=False))
    exactly(x.grad, float64(3.0, 5.0, grad=False))


@pytest.mark.parametrize("decorated", [bare, with_surrogate, with_empty_brackets], ids=lambda f: f.__name__)
def test_decorated_function_keeps_its_docstring(decorated):
    assert decorated.__doc__ == "Round."
    exactly(decorated.__wrapped__(float64(1.6, grad=False)), float64(2.0, grad=False))


def test_surrogate_given_in_brackets_is_used():
    x = float64(0.4)
    with_surrogate(x).backward()
    closely(x.grad, 1 - x.detach().tanh() ** 2)


# Arguments


def test_gradient_goes_to_the_first_differentiable_argument():
    @go.straight_through
    def quantize(levels, x, bias):
        return torch.round(x * levels) / levels + 0 * bias

    x, bias = noise(3), noise(3)
    quantize(4, x, bias).backward(float64(1.0, 2.0, 3.0, grad=False))
    exactly(x.grad, float64(1.0, 2.0, 3.0, grad=False))
    assert bias.grad is None or not bias.grad.any()


def test_keyword_options_reach_the_forward():
    @go.straight_through
    def quantize(x, *, levels=2, mode="round"):
        return getattr(torch, mode)(x * levels) / levels

    x = float64(0.3, 0.9)
    y = quantize(x, levels=4, mode="floor")
    exactly(y.detach(), float64(0.25, 0.75, grad=False))
    y.sum().backward()
    exactly(x.grad, float64(1.0, 1.0, grad=False))


def test_argument_passed_by_keyword_gets_the_gradient():
    x = float64(0.4)
    bare(x=x).backward()
    assert x.grad.item() == 1.0


def test_integer_argument_before_it_is_passed_over():
    @go.straight_through
    def pick(index, x):
        return torch.zeros_like(x).index_fill(0, index, 1.0)

    x = noise(3)
    pick(torch.tensor([1]), x).backward(float64(1.0, 2.0, 3.0, grad=False))
    exactly(x.grad, float64(1.0, 2.0, 3.0, grad=False))


def test_identity_of_another_shape_is_an_error_with_both_shapes():
    @go.straight_through
    def shrink(x):
        return torch.round(x[:2])

    text = r"shrink' \(.*test_straight_through\.py:\d+\) must return a tensor of shape \(3,\), .* one of shape \(2,\)"
    with pytest.raises(go.ForwardResultError, match=text):  # by the call
        shrink(noise(3))


def test_result_that_would_broadcast_is_an_error():
    @go.straight_through
    def spread(x):
        return torch.round(x).expand(4, 3)

    with pytest.raises(
        go.ForwardResultError, match=r"spread' .* must .* \(3,\), .* it returned one of shape \(4, 3\)\. Give"
    ):
        spread(noise(3))


def test_surrogate_of_another_shape_is_an_error_with_both_shapes():
    def total(x):
        return x.sum()

    decorated = go.straight_through(torch.round, surrogate=total)
    who = rf"surrogate 'total' \({re.escape(__file__)}:\d+\) of 'round' \(built in\)"
    text = r"must give a result of shape \(3,\), .*; it gives a tensor of shape \(\)\. Give one with that result"
    with pytest.raises(go.SurrogateError, match=f"{who} {text}"):
        decorated(noise(3)).sum().backward()


def test_first_differentiable_argument_that_wants_no_gradient_is_warned_of():
    @go.straight_through
    def quantize(scale, x):
        return torch.round(x * scale) / scale

    x, scale = noise(3), torch.full((3,), 4.0, dtype=torch.float64)
    message = r"'quantize' \(.*test_straight_through\.py:\d+\).*'scale', which wants none: so none gets to 'x'"
    with pytest.warns(go.GradOverrideWarning, match=message):
        quantize(scale, x)
    with pytest.warns(go.GradOverrideWarning, match=message):
        torch.compile(quantize, backend="aot_eager", fullgraph=True)(scale, x)
    quantize(scale, x.detach())  # nothing is lost where nothing is wanted
    quantize(scale.clone().requires_grad_(), x)


# Results


SURROGATES = {"identity": None, "function": torch.tanh, "derivative": go.surrogates.atan()}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("kind", SURROGATES)
@pytest.mark.parametrize("pack", [lambda *parts: parts, lambda *parts: dict(zip("abc", parts, strict=True))])
def test_one_floating_tensor_may_be_returned_with_what_is_none(pack, kind, compiled):
    def quantize(x):
        return pack(torch.round(x), torch.round(x).long(), "nearest")

    decorated = go.straight_through(quantize, surrogate=SURROGATES[kind])
    alone = go.straight_through(torch.round, surrogate=SURROGATES[kind])
    x, twin = float64(0.4, 1.6), float64(0.4, 1.6)
    run = torch.compile(decorated, backend="aot_eager", fullgraph=True) if compiled else decorated
    result = run(x)
    value, index, word = result.values() if isinstance(result, dict) else result
    assert (type(result), index.tolist(), word) == (type(pack(1, 2, 3)), [0, 2], "nearest")
    factor = float64(3.0, 5.0, grad=False)
    (value * factor).sum().backward()
    (alone(twin) * factor).sum().backward()
    exactly(x.grad, twin.grad)


@pytest.mark.parametrize("kind", SURROGATES)
def test_several_floating_tensors_in_a_result_are_an_error_at_the_call(kind):
    def quantize(x):
        return torch.round(x), x * 2

    decorated = go.straight_through(quantize, surrogate=SURROGATES[kind])
    message = r"(?s)'quantize' \(.*\) must return one floating tensor .*to 'x'; it returned a tuple of 2 .*custom_back"
    with pytest.raises(go.ForwardResultError, match=message):
        decorated(noise(3))


def test_identity_of_a_container_passes_to_a_container_of_its_structure_and_no_other():
    pair = [float64(0.4), float64(1.6)]
    first, second = go.straight_through(lambda pair: [torch.round(part) for part in pair])(pair)
    (3 * first + 5 * second).backward()
    assert [part.grad.item() for part in pair] == [3.0, 5.0]
    for forward in (lambda pair: torch.round(pair[0]), lambda pair: tuple(map(torch.round, pair))):
        message = r"must return what is of the structure of its first differentiable argument 'pair'.* was given a list"
        with pytest.raises(go.ForwardResultError, match=message):
            go.straight_through(forward)(pair)
    with pytest.raises(go.ForwardResultError, match=r"must have one tensor for its first .*'pair'.*given a list of 2"):
        go.straight_through(lambda pair: pair[0].sign(), surrogate=torch.tanh)(pair)


def test_result_that_is_no_floating_tensor_is_an_error_that_says_how_to_convert_it():
    def positive(x):
        return x > 0

    message = r"'positive' \(.*\) must return a floating tensor .* of shape \(3,\) of torch.bool. Convert it: .to"
    with pytest.raises(go.ForwardResultError, match=message):
        go.straight_through(positive)(noise(3))


def test_result_that_is_no_tensor_is_an_error_that_says_what_to_return():
    message = r" must return a floating tensor .*; it returned None. Return the tensor that it makes of its argument$"
    with pytest.raises(go.ForwardResultError, match=message):
        go.straight_through(lambda x: None)(noise(3))


def test_method_of_a_module_that_is_given_no_floating_tensor_is_an_error():
    class Look(nn.Embedding):
        @go.straight_through
        def forward(self, index):
            return self.weight[index].round()

    with pytest.raises(go.ForwardResultError, match=r"'Look' \(.*\) must be given a floating tensor.*given none"):
        Look(3, 2)(torch.tensor([1]))


CONSTANT = {
    "constant": torch.ones_like,
    "detached": lambda x: x.tanh().detach(),
    "no_grad": torch.no_grad()(torch.tanh),
}


@pytest.mark.parametrize("kind", CONSTANT)
def test_surrogate_that_has_no_derivative_is_an_error_at_the_call(kind):
    message = r"(?s)surrogate '.*of 'sign'.* must be a differentiable function of its argument.*without detach"
    with pytest.raises(go.SurrogateError, match=message):
        go.straight_through(torch.sign, surrogate=CONSTANT[kind])(noise(3))


def test_surrogate_of_another_kind_of_number_is_an_error_at_the_call():
    with pytest.raises(go.SurrogateError, match=r"must give a real result.*gives a complex one. Take its real part"):
        go.straight_through(torch.sign, surrogate=lambda x: x * 1j)(noise(3))
    with pytest.raises(go.SurrogateError, match=r"must give a complex result.*gives a real one. Make it complex"):
        go.straight_through(torch.sgn, surrogate=torch.abs)(noise(3, dtype=torch.complex128))


def test_surrogate_that_is_not_callable_is_refused():
    text = "straight_through: 'surrogate' must be a function of one tensor, such as torch.tanh or .*; got "
    with pytest.raises(go.DecorationError, match=f"^{text}an int$"):
        go.straight_through(torch.round, surrogate=3)
    with pytest.raises(go.DecorationError, match=f"^{text}the class 'atan'$"):
        go.straight_through(surrogate=go.surrogates.atan)


def distance(x, y):
    return (x - y).square()


@pytest.mark.parametrize(
    "surrogate", [distance, lambda: 1.0, functools.partial(distance, 1.0, 2.0)], ids=["two", "none", "a partial"]
)
def test_surrogate_that_does_not_take_one_tensor_is_refused_when_it_is_given(surrogate):
    text = r"straight_through: 'surrogate' must be a function of one tensor, such as torch.tanh or .*; got '\S+' \(.*\)"
    with pytest.raises(go.DecorationError, match=rf"^{text}, which takes \("):
        go.straight_through(torch.round, surrogate=surrogate)
    go.straight_through(torch.round, surrogate=functools.partial(distance, y=1.0))


def test_class_without_forward_is_refused():
    class Nothing:
        pass

    with pytest.raises(go.DecorationError, match="Nothing"):
        go.straight_through(Nothing)


def test_parameters_of_a_straight_through_module_keep_autograds_gradient():
    class Quantized(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(float64(2.0))

        @go.straight_through
        def forward(self, x):
            return torch.round(x) * self.scale

    layer, x = Quantized(), float64(2.6)
    layer(x).backward()
    assert (x.grad.item(), layer.scale.grad.item()) == (1.0, 3.0)


def test_forward_that_already_has_a_gradient_gets_the_surrogates_alone():
    x = noise(4)
    go.straight_through(torch.sin, surrogate=torch.tanh)(x).sum().backward()
    closely(x.grad, 1 - x.detach().tanh() ** 2)


def test_in_place_forward_is_exact_and_passes_the_gradient():
    x = float64(0.4, 1.6)
    y = x * 1
    z = go.straight_through(lambda x: x.round_())(y)
    exactly(z.detach(), float64(0.0, 2.0, grad=False))
    z.backward(float64(3.0, 5.0, grad=False))
    exactly(x.grad, float64(3.0, 5.0, grad=False))


def test_complex_values_pass_exactly():
    x = torch.randn(4, dtype=torch.complex128, requires_grad=True)
    grad_output = torch.randn(4, dtype=torch.complex128)
    y = go.straight_through(lambda z: torch.complex(z.real.round(), z.imag.round()))(x)
    exactly(y.detach(), torch.complex(x.detach().real.round(), x.detach().imag.round()))
    y.backward(grad_output)
    exactly(x.grad, grad_output)


def test_one_hot_of_logits_trains_through_softmax():
    logits, grad_output = noise(2, 5), noise(2, 5, grad=False)
    sample = go.straight_through(ROUNDINGS["one hot"], surrogate=lambda x: x.softmax(-1))
    sample(logits).backward(grad_output)
    soft = logits.detach().softmax(-1)
    closely(logits.grad, soft * (grad_output - (grad_output * soft).sum(-1, keepdim=True)))


def test_surrogate_runs_not_at_all_where_no_gradient_is_wanted():
    calls = []
    decorated = go.straight_through(torch.round, surrogate=lambda x: (calls.append(1), x)[1])
    with torch.no_grad():
        decorated(float64(0.4))
    decorated(float64(0.4, grad=False))
    assert calls == []
    decorated(float64(0.4)).backward()
    assert calls


def test_same_node_is_used_over_two_backward_calls():
    x = float64(0.4)
    y = go.straight_through(torch.round, surrogate=torch.tanh)(x)
    y.backward(retain_graph=True)
    y.backward()
    closely(x.grad, 2 * (1 - x.detach().tanh() ** 2))


@pytest.mark.parametrize("reentrant", [False, True])
def test_first_call_of_all_may_be_in_a_checkpoint(reentrant):
    """The look that is taken at the surrogate then is no part of the block."""
    forward, x = go.straight_through(torch.round, surrogate=torch.tanh), float64(0.4)
    checkpoint(forward, x, use_reentrant=reentrant).backward()
    closely(x.grad, 1 - x.detach().tanh() ** 2)
