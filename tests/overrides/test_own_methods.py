"""Overridden modules whose forward calls methods of its class: what these do is read as if it stood in the forward.

The oracle is the module without a rule: its values, and its gradients with the rule applied by hand.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from oracles import closely, noise
from torch import nn
from torch.nn.grad import conv2d_input, conv2d_weight

import gradoverride as go
from gradoverride._core.calls import wrapper

pytestmark = pytest.mark.usefixtures("fresh_compiler")

OUTSIDE = noise(4)


def seven_times(grad_output):
    return 7 * grad_output


def by_vjp(grad_output, vjp):
    return vjp(7 * grad_output)


class Calls(nn.Module):
    """A forward that calls a method, which calls another."""

    scale = 3.0

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(noise(4).detach())
        self.shape = (3, 4)

    def forward(self, x):
        return self.weighted(x * self.scale)

    def weighted(self, x):
        return self.shifted(x) * self.weight

    def shifted(self, x):
        return x + self.scale


class Inherits(Calls):
    pass


class Otherwise(Calls):
    def shifted(self, x):
        return x.sin()


class Asks(Calls):
    def shifted(self, x):
        return x * 2 if x.requires_grad else x * 5


class Writes(Calls):
    def shifted(self, x):
        return x.mul_(2)


class HandsOn(Calls):
    def forward(self, x):
        return self.weighted(x)


class WritesIntoItsArgument(HandsOn):
    def shifted(self, x):
        x.mul_(2)
        return x * 3


class LaysOut(Calls):
    def shifted(self, x):
        return x.t_().contiguous().t_()


class Keeps(Calls):
    def shifted(self, x):
        self.kept = x.detach()
        return x + 1


class OfAList(Calls):
    def shifted(self, x):
        return x.reshape(self.shape) + len(self.shape)


class CallsItsPart(Calls):
    def __init__(self):
        super().__init__()
        self.part = nn.Linear(4, 4)

    def shifted(self, x):
        return self.part(x)


ALIKE = [Calls, Inherits, Otherwise, Asks, Writes, LaysOut, Keeps, OfAList, CallsItsPart]


def run(module, x, *, compiled, first=lambda x: x):
    def both(x):
        return module(first(x))

    return (torch.compile(both, backend="aot_eager", fullgraph=True) if compiled else both)(x)


def right(module, *, compiled, rule):
    """Fail unless the module has the values of the plain one, the gradient of the rule, and its parameters theirs."""
    plain = copy.deepcopy(module)
    x, like = noise(3, 4), noise(3, 4)
    like.data.copy_(x.detach())
    expected = plain(like * 1)
    g = noise(*expected.shape, grad=False)
    (own,) = torch.autograd.grad(expected, like, 7 * g, retain_graph=True)
    expected.backward(g)
    with go.override(module, {module: rule}):
        y = run(module, x, compiled=compiled, first=lambda x: x * 1)
        y.backward(g)
    closely(y.detach(), expected.detach())
    closely(x.grad, 7 * g if rule is seven_times else own)
    for ours, theirs in zip(module.parameters(), plain.parameters(), strict=True):
        closely(ours.grad, theirs.grad)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("rule", [seven_times, by_vjp])
@pytest.mark.parametrize("cls", ALIKE)
def test_values_and_gradients_are_those_of_the_forward(cls, rule, compiled):
    right(cls().double(), compiled=compiled, rule=rule)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("place", ["class", "replaced on the class", "instance"])
def test_method_that_writes_into_the_argument_is_told_to_return_it(place, compiled):
    class Replaced(HandsOn):
        pass

    module, x = (WritesIntoItsArgument() if place == "class" else Replaced()).double(), noise(3, 4)
    with go.override(module, {module: seven_times}):
        if place == "instance":
            module.shifted = WritesIntoItsArgument.shifted.__get__(module)
        elif place == "replaced on the class":
            module(x)
            Replaced.shifted = WritesIntoItsArgument.shifted
        with pytest.raises(go.ForwardResultError, match="writes into its argument 'x' in place and must return it"):
            run(module, x, compiled=compiled, first=lambda x: x * 1)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("later", [False, True], ids=["before", "between two calls"])
@pytest.mark.parametrize("place", ["instance", "class"])
def test_method_that_somebody_replaces_is_the_new_one(place, later, compiled):
    class Patched(Calls):
        def shifted(self, x):
            return x + 2

    def replace():
        if place == "class":
            Patched.shifted = lambda self, x: x.cos()
        else:
            module.shifted = lambda x: x.cos()

    module, x = Patched().double(), noise(3, 4)
    plain = copy.deepcopy(module)
    with go.override(module, {module: seven_times}):
        if later:
            closely(run(module, x, compiled=compiled).detach(), plain(x).detach())
        replace()
        if compiled:
            torch.compiler.reset()  # of what a class has Dynamo does not see that it was replaced
        closely(run(module, x, compiled=compiled).detach(), ((x * 3).cos() * module.weight).detach())


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("place", ["class", "replaced on the class", "instance"])
def test_tensor_that_such_a_method_reaches_is_refused(place, compiled):
    class Reaches(Calls):
        def shifted(self, x):
            return x + 1

    if place == "class":
        Reaches.shifted = lambda self, x: x * OUTSIDE
    module, x = Reaches().double(), noise(3, 4)
    module.weight.requires_grad_(False)
    with go.override(module, {module: seven_times}):
        if place == "replaced on the class":
            module(x)
            Reaches.shifted = lambda self, x: x * OUTSIDE
        elif place == "instance":
            module(x)
            module.shifted = lambda x: x * OUTSIDE
        with pytest.raises(go.CapturedTensorError, match="would be lost"):
            run(module, x, compiled=compiled)


class Hands(nn.Module):
    def forward(self, x):
        return self.masked(x)

    def masked(self, x):
        return go.save_for_backward(x * 1, mask=x > 0)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_what_such_a_method_hands_over_the_rule_gets(compiled):
    module, x = Hands(), noise(3, 4)
    with go.override(module, {module: lambda grad_output, mask: 7 * grad_output * mask}):
        run(module, x, compiled=compiled).sum().backward()
    closely(x.grad, 7 * (x.detach() > 0).double())


def convolution(grad_output, input, weight, bias):
    return {
        "input": 7 * conv2d_input(input.shape, weight, grad_output),
        "weight": 5 * conv2d_weight(input, weight.shape, grad_output),
        "bias": 3 * grad_output.sum((0, 2, 3)),
    }


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("padding", ["zeros", "circular"])
def test_convolution_by_a_rule_for_its_parameters_takes_the_short_path(padding, compiled, monkeypatch):
    module, x = nn.Conv2d(2, 3, 3).double(), noise(2, 2, 5, 5)
    plain, like = copy.deepcopy(module), noise(2, 2, 5, 5)
    like.data.copy_(x.detach())
    module.padding_mode = padding  # without any padding it is the same
    plain(like).sum().backward()

    def refuse(*_):
        raise AssertionError("the general path")

    monkeypatch.setattr(wrapper, "differentiate", refuse)
    with go.override(module, {module: convolution}):
        run(module, x, compiled=compiled).sum().backward()
    closely(x.grad, 7 * like.grad)
    closely(module.weight.grad, 5 * plain.weight.grad)
    closely(module.bias.grad, 3 * plain.bias.grad)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.Conv1d(4, 2, 2, padding="same", padding_mode="reflect"), (3, 4, 5)),
        (lambda: nn.Conv2d(4, 2, 2, stride=2, bias=False), (3, 4, 5, 5)),
        (lambda: nn.Conv3d(4, 2, 1, groups=2), (3, 4, 2, 2, 2)),
        (lambda: nn.ConvTranspose2d(4, 2, 2), (3, 4, 5, 5)),
        (lambda: nn.LayerNorm((4, 5)), (3, 4, 5)),
    ],
    ids=["reflecting", "without a bias", "groups", "transposed", "layer norm"],
)
def test_convolutions_are_right_under_vjp(make, shape, compiled):
    module, x = make().double(), noise(*shape)
    plain, like = copy.deepcopy(module), noise(*shape)
    like.data.copy_(x.detach())
    y = plain(like)
    g = noise(*y.shape, grad=False)
    y.backward(g)
    with go.override(module, {module: by_vjp}):
        run(module, x, compiled=compiled).backward(g)
    closely(x.grad, 7 * like.grad)
    for ours, theirs in zip(module.parameters(), plain.parameters(), strict=True):
        closely(ours.grad, theirs.grad)


def test_tensor_among_the_numbers_of_a_tuple_is_found():
    class OfTuple(nn.Module):
        def __init__(self):
            super().__init__()
            self.factors = (2.0, noise(4))

        def forward(self, x):
            return F.relu(x) * self.factors[1] * self.factors[0]

    module = OfTuple()
    with go.override(module, {module: seven_times}), pytest.raises(go.CapturedTensorError, match="would be lost"):
        module(noise(3, 4))


class WithoutParameters(nn.Module):
    def forward(self, x):
        return self.shifted(x)

    def shifted(self, x):
        return x + 1


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("place", ["instance", "class", "base"])
def test_method_that_is_replaced_by_one_that_reaches_a_tensor_is_refused_without_parameters_too(place, compiled):
    class Base(WithoutParameters):
        def shifted(self, x):
            return x + 1

    class Derived(Base):
        pass

    module, x = Derived(), noise(3, 4)
    with go.override(module, {module: seven_times}):
        closely(run(module, x, compiled=compiled).detach(), x.detach() + 1)
        if place == "instance":
            module.shifted = lambda x: x * OUTSIDE
        else:
            {"class": Derived, "base": Base}[place].shifted = lambda self, x: x * OUTSIDE
        torch.compiler.reset()  # of what a class has Dynamo does not see that it was replaced
        with pytest.raises(go.CapturedTensorError, match="would be lost"):
            run(module, x, compiled=compiled)
