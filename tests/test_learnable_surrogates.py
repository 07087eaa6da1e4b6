"""Surrogates with parameters: their gradients are those of autograd of the primitive, wherever torch follows them."""

import copy
import functools
import pickle
import re
from dataclasses import dataclass

import pytest
import torch
from oracles import FLOAT64, closely, exactly, float64, noise
from torch import nn

import gradoverride as go
from gradoverride import surrogates
from gradoverride.rules import heaviside, spike
from gradoverride.surrogates import Surrogate, atan, clipped, fast_sigmoid, sigmoid

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*should not be instantiated:DeprecationWarning",  # Dynamo's own doing, for any Function
)


def learnt(*values):
    return nn.Parameter(torch.tensor(values if len(values) > 1 else values[0], dtype=torch.float64))


# A surrogate of options, and what it stands for, written out.
EACH = {
    "atan": (atan, (2.0,), lambda x, a: torch.atan(torch.pi * a * x / 2) / torch.pi),
    "sigmoid": (sigmoid, (3.0,), lambda x, k: 1 / (1 + torch.exp(-k * x))),
    "fast_sigmoid": (fast_sigmoid, (5.0,), lambda x, k: x / (1 + k * x.abs())),
    "superspike": (surrogates.superspike, (10.0,), lambda x, k: x / (1 + k * x.abs())),
    "piecewise_quadratic": (
        surrogates.piecewise_quadratic,
        (0.5,),
        lambda x, a: torch.where(x.abs() < 1 / a, a * x - a**2 * x * x.abs() / 2, x.sign() / 2),
    ),
    "triangle": (
        surrogates.triangle,
        (0.3, 1.5),
        lambda x, h, w: h * w / 2 + torch.where(x.abs() < w, h * x - h * x * x.abs() / (2 * w), x.sign() * h * w / 2),
    ),
    "rectangle": (surrogates.rectangle, (1.5,), lambda x, w: torch.where(x.abs() < w / 2, x / w, x.sign() / 2)),
    "gaussian": (surrogates.gaussian, (0.7,), lambda x, s: torch.erf(x / s / 2**0.5) / 2),
    "erf": (surrogates.erf, (1.5,), lambda x, a: torch.erf(a * x) / 2),
    "piecewise_exponential": (
        surrogates.piecewise_exponential,
        (1.2,),
        lambda x, a: x.sign() * (1 - torch.exp(-a * x.abs())) / 2,
    ),
    "multi_gaussian": (
        surrogates.multi_gaussian,
        (0.5, 0.2, 4.0),
        lambda x, d, h, s: (
            (1 + h) * torch.special.ndtr(x / d)
            - h * (torch.special.ndtr((x - d) / (s * d)) + torch.special.ndtr((x + d) / (s * d)))
        ),
    ),
    "leaky": (surrogates.leaky, (0.1,), lambda x, slope: torch.where(x > 0, x, slope * x)),
    "clipped": (clipped, (-0.5, 0.8), lambda x, lo, hi: torch.where(x < lo, lo, torch.where(x > hi, hi, x))),
    "swish_sign": (
        surrogates.swish_sign,
        (2.0,),
        lambda x, b: 2 * torch.sigmoid(b * x) * (1 + b * x * (1 - torch.sigmoid(b * x))),
    ),
}
X = torch.linspace(-2.03, 2.01, 24, dtype=torch.float64)


def test_every_surrogate_with_options_is_here():
    assert {cls.__name__ for cls, *_ in EACH.values()} == {*surrogates.__all__} - {"Surrogate", "approx_sign"}


@pytest.mark.parametrize("make", [lambda s: go.straight_through(torch.sign, surrogate=s), spike], ids=["sign", "spike"])
@pytest.mark.parametrize("name", EACH)
class TestEach:
    def test_gradients_are_those_of_what_it_stands_for(self, name, make):
        cls, values, stands_for = EACH[name]
        options = [learnt(value) for value in values]
        x, came = X.clone().requires_grad_(), noise(24, grad=False)
        y = make(cls(*options))(x)
        expected = torch.autograd.grad(stands_for(x, *options), (x, *options), came)
        closely(torch.autograd.grad(y, (x, *options), came), expected)

    def test_value_is_exact(self, name, make):
        cls, values, _ = EACH[name]
        wanted = X.sign() if make is not spike else (X >= 0).double()
        exactly(make(cls(*[learnt(value) for value in values]))(X.clone().requires_grad_()).detach(), wanted)


# 0 on both sides, and the ends of what has ends.
EDGES = [0.0, -0.0, 2.0, -2.0, 1.5, -1.5, 0.75, -0.75, -0.5, 0.8, 1e30, -1e30, float("nan")]


@pytest.mark.parametrize("name", EACH)
def test_at_ends_at_zero_and_nan_an_option_that_is_a_tensor_is_as_a_number(name):
    cls, values, _ = EACH[name]
    x = float64(*EDGES)

    def gradient(surrogate):
        y = go.straight_through(torch.sign, surrogate=surrogate)(x)
        return torch.autograd.grad(y, x, torch.ones_like(x))[0]

    expected = gradient(cls(*values))
    for as_tensor in (lambda value: torch.tensor(value, dtype=torch.float64), learnt):
        found = gradient(cls(*map(as_tensor, values)))
        torch.testing.assert_close(found, expected, equal_nan=True, **FLOAT64)


@dataclass(frozen=True)
class hat(Surrogate):
    width: float = 1.0

    def of(self, grad, x):
        return grad * (1 - x.abs() / self.width).clamp(min=0)


class Neuron(nn.Module):
    """An alpha of its own, twice in use."""

    def __init__(self):
        super().__init__()
        self.alpha = learnt(2.0)
        self.fire = go.straight_through(torch.sign, surrogate=atan(self.alpha))
        self.spike = spike(sigmoid(self.alpha), at_zero=0)

    def forward(self, x):
        return self.fire(x) + 2 * self.spike(x)


class Smooth(nn.Module):
    """What `Neuron` stands for."""

    def __init__(self):
        super().__init__()
        self.alpha = learnt(2.0)

    def forward(self, x):
        return torch.atan(torch.pi * self.alpha * x / 2) / torch.pi + 2 * torch.sigmoid(self.alpha * x)


class TestInAModule:
    def test_it_is_a_parameter_of_the_module(self):
        neuron = Neuron()
        assert [name for name, _ in neuron.named_parameters()] == ["alpha"]
        assert list(neuron.state_dict()) == ["alpha", "fire.surrogate.alpha", "spike.surrogate.k"]
        lines = [line.strip() for line in repr(neuron).splitlines()]
        assert "(surrogate): atan(alpha=2.0)" in lines
        assert "(surrogate): sigmoid(k=2.0)" in lines

    def test_it_learns(self):
        neuron, smooth, x = Neuron(), Smooth(), noise(7, grad=False)
        for module in (neuron, smooth):
            optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
            for _ in range(3):  # of the gradients alone: the values differ
                module(x).sum().backward()
                optimizer.step()  # they accumulate
        closely(neuron.alpha.detach(), smooth.alpha.detach())
        assert neuron.alpha.item() != 2.0

    def test_input_that_wants_no_gradient(self):
        neuron, smooth, x = Neuron(), Smooth(), noise(7, grad=False)
        closely(*[torch.autograd.grad(m(x).sum(), m.alpha) for m in (neuron, smooth)])

    def test_hooks_on_the_parameter_are_called(self):
        neuron, seen = Neuron(), []
        neuron.alpha.register_hook(lambda grad: seen.append(grad) or 2 * grad)
        x = noise(7)
        neuron(x).sum().backward()
        smooth = Smooth()
        (expected,) = torch.autograd.grad(smooth(x).sum(), smooth.alpha)
        assert len(seen) == 1
        closely(neuron.alpha.grad, 2 * expected)

    def test_frozen_it_has_no_gradient(self):
        neuron, x = Neuron(), noise(7)
        neuron.alpha.requires_grad_(False)
        neuron(x).sum().backward()
        assert neuron.alpha.grad is None
        closely(x.grad, torch.autograd.grad(Smooth()(x).sum(), x)[0])

    @pytest.mark.parametrize("twin", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
    def test_copies_have_parameters_of_their_own(self, twin):
        neuron, x = Neuron(), noise(7)
        other = twin(neuron)
        assert other.alpha is other.fire.surrogate.alpha is other.spike.surrogate.k
        assert other.alpha is not neuron.alpha
        other(x).sum().backward()
        assert neuron.alpha.grad is None
        smooth = Smooth()
        closely(other.alpha.grad, torch.autograd.grad(smooth(x).sum(), smooth.alpha)[0])

    def test_functional_call_and_func_grad(self):
        x, alpha = noise(7, grad=False), torch.tensor(3.0, dtype=torch.float64)

        def loss(module):
            return lambda alpha: torch.func.functional_call(module, {"alpha": alpha}, (x,)).sum()

        for transform in (torch.func.grad, torch.func.jacfwd, torch.func.hessian):
            found, expected = [transform(loss(module))(alpha) for module in (Neuron(), Smooth())]
            closely(found, expected)
        alphas = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
        closely(*[torch.func.vmap(torch.func.grad(loss(module)))(alphas) for module in (Neuron(), Smooth())])

    def test_second_derivatives(self):
        x, neuron, smooth = noise(7), Neuron(), Smooth()

        def second(module):
            first = torch.autograd.grad(module(x).sum(), (x, module.alpha), create_graph=True)
            return torch.autograd.grad(first[0].square().sum() + first[1].square(), (x, module.alpha))

        closely(second(neuron), second(smooth))

    def test_compiled_is_eager(self):
        torch.compiler.reset()
        neuron, x = Neuron(), noise(7)
        compiled = torch.compile(neuron, fullgraph=True, backend="aot_eager")
        y = compiled(x)
        exactly(y.detach(), neuron(x).detach())
        smooth = Smooth()
        expected = torch.autograd.grad(smooth(x).sum(), (x, smooth.alpha))
        closely(torch.autograd.grad(y.sum(), (x, neuron.alpha)), expected)

    def test_nothing_is_recorded_where_no_gradient_is_wanted(self):
        with torch.no_grad():
            assert not Neuron()(noise(7)).requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_parameter_for_each_channel_in_other_dtypes(dtype):
    alpha = nn.Parameter(torch.tensor([[1.0], [2.0], [4.0]]))
    x = noise(3, 50, dtype=torch.float32).detach().to(dtype).requires_grad_()
    y = go.straight_through(heaviside, surrogate=atan(alpha))(x)
    assert y.dtype is dtype
    found = torch.autograd.grad(y.float().sum(), (x, alpha))
    assert [grad.dtype for grad in found] == [dtype, torch.float32]
    wide, wide_alpha = x.detach().double().requires_grad_(), alpha.detach().double().requires_grad_()
    expected = torch.autograd.grad(atan(2.0).primitive(wide * wide_alpha / 2).sum(), (wide, wide_alpha))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=0, atol=50 * torch.finfo(dtype).eps)


def test_tensors_that_do_not_learn_are_buffers():
    scales, x = torch.tensor([1.0, 2.0], dtype=torch.float64), noise(2)
    fire = go.straight_through(torch.sign, surrogate=sigmoid(scales))
    assert [name for name, _ in fire.named_buffers()] == ["surrogate.k"]
    assert [*fire.parameters()] == []
    expected = torch.autograd.grad(torch.sigmoid(scales * x).sum(), x)
    closely(torch.autograd.grad(fire(x).sum(), x), expected)
    closely(torch.autograd.grad(go.edit_gradient(x, sigmoid(scales)).sum(), x), expected)  # and as a rule


def test_an_override_replaces_the_gradient_of_the_input_alone():
    alpha, x = learnt(2.0), noise(5)
    model = nn.Sequential(spike(atan(alpha)))
    with go.override(model, {spike: fast_sigmoid(2.0)}):
        y = model(x)
    found = torch.autograd.grad(y.sum(), (x, alpha))
    closely(found[0], torch.autograd.grad((x / (1 + 2 * x.abs())).sum(), x)[0])
    closely(found[1], torch.autograd.grad((torch.atan(torch.pi * alpha * x / 2) / torch.pi).sum(), alpha)[0])


# --- other surrogates ---


class Tanh(nn.Module):
    def __init__(self):
        super().__init__()
        self.slope = learnt(1.5)

    def forward(self, x):
        return torch.tanh(self.slope * x)


def tanh_gradients(x, slope):
    return torch.autograd.grad(torch.tanh(slope * x).sum(), (x, slope))


def test_a_module_as_a_surrogate():
    surrogate, x = Tanh(), noise(5)
    fire = go.straight_through(torch.sign, surrogate=surrogate)
    assert [name for name, _ in fire.named_parameters()] == ["surrogate.slope"]
    closely(torch.autograd.grad(fire(x).sum(), (x, surrogate.slope)), tanh_gradients(x, surrogate.slope))
    bound = go.straight_through(torch.sign, surrogate=surrogate.forward)
    closely(torch.autograd.grad(bound(x).sum(), (x, surrogate.slope)), tanh_gradients(x, surrogate.slope))


def test_a_module_as_a_decorator():
    surrogate = Tanh()

    @go.straight_through(surrogate=surrogate)
    def step(count, x, *, shift=0.0):
        """A step."""
        return torch.round(x + shift) * count

    assert (step.__name__, step.__doc__) == ("step", "A step.")
    x = noise(5)
    for call in (lambda: step(2, x), lambda: step(2, x=x, shift=1.0)):
        closely(torch.autograd.grad(call().sum(), (x, surrogate.slope)), tanh_gradients(x, surrogate.slope))
    exactly(step(2, x.detach(), shift=1.0).detach(), torch.round(x.detach() + 1.0) * 2)


def test_its_first_argument_is_that_of_the_signature_however_it_is_called():
    class Step(nn.Module):
        def forward(self, count, x, shift):
            return torch.round(x + shift) * count

    surrogate, x, shift = Tanh(), noise(5), noise(5)
    compiled = torch.compile(Step(), backend="eager")
    for step in (lambda count, x, shift: torch.round(x + shift) * count, Step(), compiled):
        fire = go.straight_through(step, surrogate=surrogate)
        y = fire(shift=shift, count=2, x=x)
        closely(torch.autograd.grad(y.sum(), (x, surrogate.slope)), tanh_gradients(x, surrogate.slope))


def test_a_container_as_the_first_argument_is_an_error():
    fire = go.straight_through(lambda pair, x: [torch.sign(part) for part in pair], surrogate=Tanh())
    for call in (lambda: fire([noise(3), 1], noise(3)), lambda: fire(x=noise(3), pair=[noise(3), 1])):
        with pytest.raises(go.ForwardResultError) as caught:
            call()
        assert str(caught.value).startswith(f"'<lambda>' ({__file__}:")
        assert str(caught.value).endswith(
            ") must have one tensor for its first differentiable argument 'pair', which is what a surrogate takes, for "
            "a gradient to pass straight through; it was given a list of 2 (a tensor of shape (3,), 1, an int). "
            "Decorate a function of one tensor, or give a rule: custom_backward(rule)"
        )


def test_a_forward_that_is_a_module_keeps_its_own_parameters():
    linear, surrogate, x = nn.Linear(3, 3).double(), Tanh(), noise(2, 3)
    fire = go.straight_through(linear, surrogate=surrogate)
    assert [name for name, _ in fire.named_parameters()] == ["fn.weight", "fn.bias", "surrogate.slope"]
    y = fire(x)
    exactly(y.detach(), linear(x).detach())
    closely(torch.autograd.grad(y.sum(), (x, surrogate.slope), retain_graph=True), tanh_gradients(x, surrogate.slope))
    found = torch.autograd.grad(y.sum(), [*linear.parameters()])
    closely(found, torch.autograd.grad(linear(x).sum(), [*linear.parameters()]))
    twin = copy.deepcopy(fire)
    exactly(torch.autograd.grad(twin(x).sum(), [*twin.fn.parameters()]), found)


def test_a_function_that_captures_a_parameter():
    slope, x = learnt(1.5), noise(5)
    fire = go.straight_through(torch.sign, surrogate=lambda x: torch.tanh(slope * x))
    closely(torch.autograd.grad(fire(x).sum(), (x, slope)), tanh_gradients(x, slope))
    closely(torch.autograd.grad(fire(x.detach()).sum(), slope)[0], tanh_gradients(x, slope)[1])
    assert repr(fire) == "StraightThrough(sign, surrogate=<lambda>)"
    with pytest.raises(go.CapturedTensorError) as caught:
        copy.deepcopy(fire)
    text = str(caught.value)
    assert text.startswith(f"surrogate '<lambda>' ({__file__}:")
    assert text.endswith(
        "of 'sign' must be a module, or have its tensors as options, to be copied or pickled; it reaches 'slope' by a "
        "closure or a global, and the copy would train the original's. Make it an nn.Module"
    )


class Holder:
    """A place where no one looks for a tensor."""


def test_a_partial_that_binds_a_parameter():
    slope, x = learnt(1.5), noise(5)
    fire = go.straight_through(
        torch.sign, surrogate=functools.partial(lambda x, slope: torch.tanh(slope * x), slope=slope)
    )
    closely(torch.autograd.grad(fire(x).sum(), (x, slope)), tanh_gradients(x, slope))
    with pytest.raises(go.CapturedTensorError, match="it reaches an argument of the partial '<lambda>'"):
        copy.deepcopy(fire)


def test_a_tensor_that_is_found_only_by_its_graph_is_an_error():
    holder, x = Holder(), noise(5)
    holder.slope = learnt(1.5)
    fire = go.straight_through(torch.sign, surrogate=lambda x: torch.tanh(holder.slope * x))
    with pytest.raises(go.CapturedTensorError) as caught:
        fire(x)
    assert str(caught.value).endswith(
        "must be an nn.Module to have a parameter; it reached 'holder.slope', which requires grad, in another "
        "way or only since straight_through was called, and that gradient would be lost. Make it a module, or detach() "
        "the tensor"
    )


def test_a_tensor_that_requires_grad_only_later_is_an_error():
    slope, x = float64(1.5, grad=False), noise(5)
    fire = go.straight_through(torch.sign, surrogate=lambda x: torch.tanh(slope * x))
    closely(torch.autograd.grad(fire(x).sum(), x)[0], tanh_gradients(x, learnt(1.5))[0])
    slope.requires_grad_()
    with pytest.raises(go.CapturedTensorError, match="it reached 'slope', which requires grad, in another way or only"):
        fire(x).sum().backward()


def test_without_a_floating_argument_the_function_is_called_and_nothing_else():
    fire = go.straight_through(torch.sign, surrogate=atan(learnt(2.0)))
    exactly(fire(torch.tensor([1, -2])), torch.tensor([1, -1]))


def test_a_tensor_that_does_not_learn_needs_no_primitive():
    x = noise(3)
    (found,) = torch.autograd.grad(go.custom_backward(hat(torch.tensor(2.0).double()))(torch.sign)(x).sum(), x)
    exactly(found, hat(2.0)(torch.ones_like(x), x.detach()))


# --- what is refused ---


def test_as_a_rule_it_is_refused():
    surrogate, x = atan(learnt(2.0)), noise(3)
    text = (
        "surrogate atan: its option 'alpha' requires grad, which it can get where it is a parameter of a module alone: "
        "give the surrogate to straight_through or rules.spike; or detach() it"
    )
    for use in (go.custom_backward(surrogate)(torch.sign), lambda x: go.edit_gradient(x, surrogate)):
        with pytest.raises(go.CapturedTensorError) as caught:
            use(x).sum().backward()
        assert str(caught.value) == text


def test_a_method_or_a_class_cannot_be_a_module():
    with pytest.raises(
        go.DecorationError, match=r"(?s)surrogate 'atan' has parameters.*a method cannot be \('forward'"
    ):

        class Layer(nn.Module):
            @go.straight_through(surrogate=atan(learnt(2.0)))
            def forward(self, x):
                return torch.sign(x)

    with pytest.raises(go.DecorationError, match=rf"which a class cannot be \('Tanh', {re.escape(__file__)}:"):
        go.straight_through(Tanh, surrogate=atan(learnt(2.0)))


def test_a_surrogate_without_a_primitive_cannot_learn():
    with pytest.raises(
        go.RuleOptionError, match=r"hat: it must have a 'primitive' for .*\. Define `primitive\(self, x\)`"
    ):
        go.straight_through(torch.sign, surrogate=hat(learnt(1.0)))


def test_a_surrogate_of_another_shape_is_an_error():
    class Sum(Tanh):
        def forward(self, x):
            return super().forward(x).sum()

    with pytest.raises(go.SurrogateError) as caught:
        go.straight_through(torch.sign, surrogate=Sum())(noise(3))
    assert str(caught.value).startswith(f"surrogate 'Sum' ({__file__}:")
    assert str(caught.value).endswith(
        ") must give a result of shape (3,), the shape of the result it stands for; it gives a tensor of shape (). "
        "Give one with that result"
    )


BAD = {
    "negative": (
        lambda: atan(learnt(-1.0)),
        "atan: 'alpha' must be a number larger than 0, or a tensor of such; got -1.0",
    ),
    "one of several": (
        lambda: fast_sigmoid(learnt(1.0, 0.0)),
        "fast_sigmoid: 'k' must be a number larger than 0, or a tensor of such; got a tensor of shape (2,)",
    ),
    "nan": (
        lambda: sigmoid(torch.tensor(torch.nan)),
        "sigmoid: 'k' must be a number larger than 0, or a tensor of such; got nan",
    ),
    "integers": (
        lambda: sigmoid(torch.tensor(4)),
        "sigmoid: 'k' must be a number larger than 0, or a tensor of such; got 4",
    ),
    "interval": (
        lambda: clipped(1.0, learnt(0.5)),
        "clipped: 'lo' and 'hi' must be numbers with lo < hi; got 1.0 and 0.5",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_tensors_out_of_range_are_errors(name):
    make, text = BAD[name]
    with pytest.raises(go.RuleOptionError) as caught:
        make()
    assert str(caught.value) == text
