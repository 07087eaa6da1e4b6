"""The rows of the table: each form of the library on a small computation, and the same by hand.

A new row is one entry of `FORMS`. `build` gives the subject that uses the library, `twin` the one that does not; both
draw the same numbers. `attach` puts the form around a forward of another kind: the cells of the group "call".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradoverride as go
from conformance import bodies
from conformance.bodies import Attach
from conformance.subjects import Subject
from conformance.twins import (
    GateFunction,
    Guided,
    LinearByHand,
    Module,
    RoundByHand,
    ScaleByHand,
    TanhByOutput,
    TripledLinearFunction,
    elementwise,
)

__all__ = ["FORMS", "Form", "numbers"]

ROWS, WIDTH = 3, 4


@dataclasses.dataclass(frozen=True)
class Form:
    """A row. `traits` say which columns apply to it."""

    name: str
    build: Callable[..., Subject]
    twin: Callable[..., Subject]
    traits: frozenset[str] = frozenset()
    attach: Attach | None = None
    without: tuple[tuple[str, str], ...] = ()  # traits that it lacks, with the reason in words

    def reason_without(self, trait: str) -> str:
        return dict(self.without).get(trait, "")


def numbers(*sizes: int, dtype: torch.dtype = torch.float64, device: str = "cpu", grad: bool = True) -> Tensor:
    """The same noise in every dtype, none of it near zero or near a half, where roundings and signs step."""
    generator = torch.Generator().manual_seed(sum(sizes))
    whole = torch.randint(-2, 3, sizes, generator=generator).double()
    drawn = whole + 0.1 + 0.3 * torch.rand(*sizes, dtype=torch.float64, generator=generator)
    if dtype.is_complex:
        drawn = drawn + 0.5j * drawn.flip(-1)
    return drawn.to(device=device, dtype=dtype).requires_grad_(grad)


# --- functions ---


def scale_backward(grad_output, x, weight):
    return 2 * grad_output * weight.conj(), 3 * grad_output * x.conj()


@go.custom_backward(scale_backward)
def scale(x, weight):
    return x * weight


def tripled(grad_output, vjp):
    return 3 * vjp(grad_output)


@go.custom_backward(tripled)
def swish(x):
    return x * torch.sigmoid(x)


def swish_slope(x):
    s = torch.sigmoid(x)
    return (3 * (s + x * s * (1 - s))).conj()


@go.straight_through
def rounded(x):
    return torch.round(x)


@go.straight_through(surrogate=torch.tanh)
def signed(x):
    return torch.sgn(x)


def tanh_slope(x):
    return (1 - torch.tanh(x) ** 2).conj()


def edited(x):
    return go.edit_gradient(torch.sin(x), lambda grad_output, input: grad_output * (1 + input.conj()))


edit_by_hand = elementwise("Edit", lambda value: value.clone(), lambda value: 1 + value.conj())


def edited_by_hand(x):
    return edit_by_hand(torch.sin(x))


def connected(x):
    return go.connect(x.detach() ** 3, x, lambda grad_output, input: grad_output * 5 * input.conj())


@go.bridge(lambda grad_output, x: -2 * grad_output * numpy.sin(x))
def bridged(x):
    return numpy.cos(x)


def function_form(name: str, ours: Any, by_hand: Any, traits: str, *, inputs: int = 1, **options: Any) -> Form:
    def subject(function: Any) -> Callable[..., Subject]:
        def build(dtype: torch.dtype = torch.float64, device: str = "cpu") -> Subject:
            given = [numbers(ROWS, WIDTH, dtype=dtype, device=device) for _ in range(inputs)]
            given = [tensor.detach().roll(index).requires_grad_() for index, tensor in enumerate(given)]
            return Subject(function, tuple(given))

        return build

    return Form(name, subject(ours), subject(by_hand), frozenset(traits.split()), **options)


# --- modules ---


class Affine(nn.Module):
    """The rule answers for `x` and `weight`; `bias` keeps the gradient that autograd gives it."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(numbers(WIDTH))
        self.bias = nn.Parameter(numbers(WIDTH).detach() * 0.5)

    @go.custom_backward(
        lambda grad_output, x, weight: {
            "x": 2 * grad_output * weight.conj(),
            "weight": (3 * grad_output * x.conj()).sum_to_size(weight.shape),
        }
    )
    def forward(self, x):
        return x * self.weight + self.bias


class AffineByHand(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(numbers(WIDTH))
        self.bias = nn.Parameter(numbers(WIDTH).detach() * 0.5)

    def forward(self, x):
        return ScaleByHand.apply(x, self.weight.expand_as(x)) + self.bias


@go.custom_backward
class LinearByClass(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(numbers(WIDTH, WIDTH))
        self.bias = nn.Parameter(numbers(WIDTH).detach() * 0.5)

    def forward(self, x):
        return F.linear(x, self.weight, self.bias)

    def backward(self, grad_output, x):
        rows = grad_output.reshape(-1, WIDTH)
        self.weight.grad = 3 * rows.T @ x.reshape(-1, WIDTH).conj()
        self.bias.grad = rows.sum(0)
        return 2 * grad_output @ self.weight.conj()


class LinearByClassByHand(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(numbers(WIDTH, WIDTH))
        self.bias = nn.Parameter(numbers(WIDTH).detach() * 0.5)

    def forward(self, x):
        return TripledLinearFunction.apply(x, self.weight, self.bias)


class Net(nn.Module):
    """A model as one finds it: a layer, a block with another and its activation, a function of torch."""

    def __init__(self, activation: nn.Module, linear: type[nn.Module] = nn.Linear, last: Any = torch.tanh):
        super().__init__()
        self.first = linear(WIDTH, WIDTH)
        self.block = nn.Sequential()
        self.block.add_module("linear", nn.Linear(WIDTH, WIDTH))
        self.block.add_module("act", activation)
        self.last = last
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(numbers(*parameter.shape, grad=False) * 0.5)

    def forward(self, x):
        return self.last(self.block(self.first(x)))


def doubled_by_output(grad_output, output):
    return 2 * grad_output * (1 - output**2).conj()


def tripled_by_input(grad_output, input):
    return 3 * grad_output * (1 - torch.tanh(input) ** 2).conj()


def guided(grad_output, vjp):
    return vjp(grad_output.clamp(min=0))


def doubled_where_positive(grad_output, input):
    return 2 * grad_output * (input > 0)


def doubled(grad_output, vjp):
    return 2 * vjp(grad_output)


def added(grad_output, vjp):
    return vjp(grad_output) + grad_output


def relu_of(x):
    return F.relu(x)


soft = go.custom_backward(lambda grad_output, x: 3 * grad_output * (1 - torch.tanh(x) ** 2).conj())(
    lambda x: torch.tanh(x)
)


class Gate(nn.Module):
    """A decorated function within; overridden besides."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(numbers(WIDTH))

    def forward(self, x):
        return soft(x) * self.scale


class GateByHand(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(numbers(WIDTH))

    def forward(self, x):
        return GateFunction.apply(x, self.scale)


def module_form(name: str, make: Any, by_hand: Any, traits: str, rules: Any = None, **options: Any) -> Form:
    """`rules(module)` gives the overrides, one after the other."""

    def subject(make: Any, rules: Any) -> Callable[..., Subject]:
        def build(dtype: torch.dtype = torch.float64, device: str = "cpu") -> Subject:
            module = make().to(device=device, dtype=dtype)
            x = numbers(ROWS, WIDTH, dtype=dtype, device=device)
            if rules is None:
                return Subject(module, (x,), module)

            @contextmanager
            def scope():
                with ExitStack() as stack:
                    for each in rules(module):
                        stack.enter_context(go.override(module, each))
                    yield

            return Subject(module, (x,), module, scope)

        return build

    built = frozenset(["module", *traits.split(), *(["override"] if rules is not None else [])])
    without = (*options.pop("without", ()), ("function", "it is a module, which is pickled as one"))
    return Form(name, subject(make, rules), subject(by_hand, None), built, without=without, **options)


def net(activation: type[nn.Module] = nn.Tanh, **options: Any) -> Callable[[], nn.Module]:
    return lambda: Net(activation(), **options)


def net_by_hand(function: Any, **options: Any) -> Callable[[], nn.Module]:
    return lambda: Net(Module(function), **options)


NO_MODULE = ("module", "it is a function: there is no module to copy, wrap or share")
NO_SCOPE = ("override", "it is in force for good: there is no context to leave")
OF_FUNCTION = (NO_MODULE, NO_SCOPE)
REAL = ("complex", "its function is not defined for complex numbers")
SMOOTH = "complex"

FORMS = [
    function_form(
        "custom_backward",
        scale,
        ScaleByHand.apply,
        f"{SMOOTH} function",
        inputs=2,
        attach=bodies.BY_RULE,
        without=OF_FUNCTION,
    ),
    function_form(
        "custom_backward with vjp",
        swish,
        elementwise("Swish", lambda x: x * torch.sigmoid(x), swish_slope),
        f"{SMOOTH} function",
        attach=bodies.BY_VJP,
        without=OF_FUNCTION,
    ),
    module_form("method of a module", Affine, AffineByHand, SMOOTH, attach=bodies.METHOD, without=(NO_SCOPE,)),
    module_form(
        "class with backward",
        LinearByClass,
        LinearByClassByHand,
        SMOOTH,
        attach=bodies.OWN_BACKWARD,
        without=(NO_SCOPE,),
    ),
    function_form(
        "straight_through",
        rounded,
        RoundByHand.apply,
        "function",
        attach=bodies.PASSED,
        without=(*OF_FUNCTION, REAL),
    ),
    function_form(
        "straight_through with surrogate",
        signed,
        elementwise("Sign", torch.sgn, tanh_slope),
        f"{SMOOTH} function",
        attach=bodies.SURROGATE,
        without=OF_FUNCTION,
    ),
    function_form(
        "edit_gradient", edited, edited_by_hand, f"{SMOOTH} function", attach=bodies.EDIT, without=OF_FUNCTION
    ),
    function_form(
        "connect",
        connected,
        elementwise("Connect", lambda x: x**3, lambda x: 5 * x.conj()),
        f"{SMOOTH} function",
        attach=bodies.CONNECT,
        without=OF_FUNCTION,
    ),
    function_form(
        "bridge",
        bridged,
        elementwise("Cos", torch.cos, lambda x: -2 * torch.sin(x)),
        f"{SMOOTH} function",
        attach=bodies.BRIDGE,
        without=OF_FUNCTION,
    ),
    module_form(
        "override by instance",
        net(),
        net_by_hand(TanhByOutput.apply),
        SMOOTH,
        lambda model: [{model.block.act: doubled_by_output}],
        attach=bodies.BY_INSTANCE,
    ),
    module_form(
        "override by class",
        net(),
        net_by_hand(elementwise("Tanh3", torch.tanh, lambda x: 3 * tanh_slope(x))),
        SMOOTH,
        lambda model: [{nn.Tanh: tripled_by_input}],
        attach=bodies.BY_CLASS,
    ),
    module_form(
        "override by glob",
        net(nn.ReLU),
        net_by_hand(Guided.apply),
        "",
        lambda model: [{"blo*.act": guided}],
        attach=bodies.BY_GLOB,
        without=(REAL,),
    ),
    module_form(
        "override by function",
        net(last=relu_of),
        lambda: Net(nn.Tanh(), last=elementwise("Relu2", torch.relu, lambda x: 2 * (x > 0).to(x.dtype))),
        "",
        lambda model: [{F.relu: doubled_where_positive}],
        without=(REAL, ("attach", "a function of torch has arguments and results of its own")),
    ),
    module_form(
        "override with vjp",
        net(),
        lambda: Net(nn.Tanh(), linear=LinearByHand),
        SMOOTH,
        lambda model: [{"first": doubled}],
        attach=bodies.BY_GLOB,
    ),
    module_form(
        "two nested overrides",
        net(),
        net_by_hand(elementwise("Nested", torch.tanh, lambda x: 1 + 2 * tanh_slope(x))),
        SMOOTH,
        lambda model: [{nn.Tanh: doubled}, {model.block.act: added}],
        attach=bodies.NESTED,
    ),
    module_form(
        "decorated function in an overridden module",
        lambda: Gate(),
        lambda: GateByHand(),
        SMOOTH,
        lambda model: [{Gate: doubled}],
        attach=bodies.WITHIN,
    ),
]
