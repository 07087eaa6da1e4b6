"""Forwards of other kinds, for the cells of the group "call", and how each form is put around one.

A body is a forward with its gradient times three, written by hand for arrays and tensors alike.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

import gradoverride as go
from conformance.subjects import Subject
from conformance.twins import Times, elementwise

__all__ = ["BODIES", "Attach", "Body"]


@dataclasses.dataclass(frozen=True)
class Body:
    """A forward: as a function, as a module, and its gradient times three as a rule."""

    name: str
    fn: Callable[..., Any]
    host: type[nn.Module]
    rule: Callable[..., Any]
    arguments: Callable[..., Any]  # from two leaves
    needs: tuple[str, ...] = ()  # "forward": one that the form runs; "structure": of results; "parameters"

    def subject(self, attached: Any, device: str = "cpu") -> Subject:
        """What has this body, ready to be called on two leaves."""
        if not isinstance(attached, Subject):
            attached = Subject(attached, module=attached if isinstance(attached, nn.Module) else None)
        leaves = torch.tensor([[0.7, -1.2, 2.3, -0.4]] * 3, dtype=torch.float64), torch.linspace(1, 2, 12).double()
        inputs = tuple([leaf.reshape(3, 4).to(device, copy=True).requires_grad_() for leaf in leaves])
        if attached.module is not None:
            attached.module.to(device)
        return dataclasses.replace(attached, inputs=inputs, arguments=self.arguments)


def mapped(function: Callable[[Tensor], Any], value: Any) -> Any:
    """`function` of each floating tensor in a structure."""
    if isinstance(value, Tensor):
        return function(value) if value.is_floating_point() else value
    if isinstance(value, dict):
        parts = {key: mapped(function, part) for key, part in value.items()}
        return type(value)(**parts) if isinstance(value, ModelOutput) else parts
    if isinstance(value, (tuple, list)):
        return type(value)([mapped(function, part) for part in value])
    return value


# --- the bodies ---


def keywords(x, *, scale):
    return x * scale


class Keywords(nn.Module):
    def forward(self, x, *, scale):
        return x * scale


def keywords_rule(grad_output, x, scale):
    return {"x": 3 * grad_output * scale, "scale": 3 * grad_output * x}


def nested(tree):
    return {"sum": tree["a"] + 2 * tree["b"][0], "rest": [tree["a"] * 5, "text", None, 7]}


class Nested(nn.Module):
    def forward(self, tree):
        return {"sum": tree["a"] + 2 * tree["b"][0], "rest": [tree["a"] * 5, "text", None, 7]}


def nested_rule(grad_output, tree):
    of_sum, of_rest = grad_output["sum"], grad_output["rest"][0]
    return {"tree": {"a": 3 * of_sum + 15 * of_rest, "b": [6 * of_sum, None]}}


@dataclasses.dataclass
class Output(ModelOutput):
    value: Any = None
    twice: Any = None
    extra: Any = None


def output(x):
    return Output(value=x * 5, twice=x * 2)


class WithOutput(nn.Module):
    def forward(self, x):
        return Output(value=x * 5, twice=x * 2)


def output_rule(grad_output):
    return 15 * grad_output["value"] + 6 * grad_output["twice"]


def product(a, b):
    return a * b


class Product(nn.Module):
    def forward(self, a, b):
        return a * b


def product_rule(grad_output, a, b):
    return 3 * grad_output * b, 3 * grad_output * a


def mixed(x):
    return x * 5, (x > 0) * 1, None


class Mixed(nn.Module):
    def forward(self, x):
        return x * 5, (x > 0) * 1, None


def mixed_rule(grad_output):
    return 15 * grad_output[0]


def inplace(x):
    x *= 5
    return x


class Inplace(nn.Module):
    def forward(self, x):
        x *= 5
        return x


def inplace_rule(grad_output):
    return 15 * grad_output


def same(x):
    return x


class Same(nn.Module):
    def forward(self, x):
        return x


def same_rule(grad_output):
    return 3 * grad_output


class Tied(nn.Module):
    """One of its results is its parameter, which the rule leaves to autograd."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(3, 4))

    def forward(self, x):
        return x * 5, self.weight


def tied_rule(grad_output, x):
    return {"x": 15 * grad_output[0]}


class TiedByHand(Tied):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return Times.apply(x, self.factor) * 5, self.weight


BODIES = [
    Body("keyword-only arguments", keywords, Keywords, keywords_rule, lambda a, b: ((a,), {"scale": b})),
    Body(
        "nested arguments and results",
        nested,
        Nested,
        nested_rule,
        lambda a, b: (({"a": a, "b": [b, "text"]},), {}),
        ("structure",),
    ),
    Body("ModelOutput", output, WithOutput, output_rule, lambda a, b: ((a,), {}), ("structure",)),
    Body("the same tensor twice", product, Product, product_rule, lambda a, b: ((a, a), {})),
    Body("integer and None results", mixed, Mixed, mixed_rule, lambda a, b: ((a,), {}), ("structure",)),
    Body("in-place forward", inplace, Inplace, inplace_rule, lambda a, b: ((a * 1,), {}), ("forward",)),
    Body("result is an input", same, Same, same_rule, lambda a, b: ((a,), {})),
    Body("result is a parameter", same, Tied, tied_rule, lambda a, b: ((a,), {}), ("structure", "parameters")),
]


# --- how a form is put around a body, and the same by hand ---


@dataclasses.dataclass(frozen=True)
class Attach:
    """`ours(body)` and `by_hand(body)`. `lacks`: what bodies must not need, with the reason."""

    ours: Callable[[Body], Any]
    by_hand: Callable[[Body], Any]
    lacks: tuple[tuple[str, str], ...] = ()


def times_by_hand(factor: int) -> Callable[[Body], Any]:
    def make(body: Body) -> Any:
        if body.host is Tied:
            return TiedByHand(factor)
        return lambda *args, **kwargs: mapped(lambda leaf: Times.apply(leaf, factor), body.fn(*args, **kwargs))

    return make


def tripled_all(grad_output, vjp):
    return mapped(lambda grad: 3 * grad, vjp(grad_output))


def of_function(rule_of: Callable[[Body], Any]) -> Callable[[Body], Any]:
    return lambda body: go.custom_backward(rule_of(body))(body.fn)


def of_method(body: Body) -> nn.Module:
    return type("Method", (body.host,), {"forward": go.custom_backward(body.rule)(body.host.forward)})()


def of_class(body: Body) -> nn.Module:
    names = [name for name in inspect.signature(body.rule).parameters if name != "grad_output"]
    if names == ["x"] and body.host is Tied:

        def backward(self, grad_output, x):
            self.weight.grad = grad_output[1]
            return body.rule(grad_output, x)
    elif names:
        source = f"lambda self, grad_output, {', '.join(names)}: rule(grad_output, {', '.join(names)})"
        backward = eval(source, {"rule": body.rule})  # the names are how it asks
    else:

        def backward(self, grad_output):
            return body.rule(grad_output)

    return go.custom_backward(type("Own", (body.host,), {"forward": body.host.forward, "backward": backward}))()


def of_edit(body: Body) -> Any:
    def edit(grad_output):
        return mapped(lambda grad: 3 * grad, grad_output)

    return lambda *args, **kwargs: go.edit_gradient(body.fn(*args, **kwargs), edit)


def of_connect(body: Body) -> Any:
    def call(*args, **kwargs):
        given = inspect.signature(body.fn).bind(*args, **kwargs).arguments
        with torch.no_grad():
            result = mapped(torch.clone, body.fn(*args, **kwargs))
        return go.connect(result, dict(given), body.rule)

    return call


def of_bridge(body: Body) -> Any:
    return go.bridge(body.rule)(body.fn)


def pass_by_hand(slope: Callable[[Tensor], Tensor]) -> Callable[[Body], Any]:
    """The gradient of the result goes to the first argument alone."""

    def make(body: Body) -> Any:
        def call(first, *args, **kwargs):
            with torch.no_grad():
                value = body.fn(first.clone(), *args, **kwargs)
            return elementwise("Pass", lambda x: value.clone(), slope)(first)

        return call

    return make


def under(*rules_of: Callable[[nn.Module, Body], dict[Any, Any]]) -> Callable[[Body], Any]:
    """The host as a part of a model, with these overrides."""

    def make(body: Body) -> Any:
        model = nn.Sequential()
        model.add_module("part", body.host())
        part: Any = model.part

        @contextmanager
        def scope():
            with ExitStack() as stack:
                for rules in rules_of:
                    stack.enter_context(go.override(model, rules(part, body)))
                yield

        return Subject(part, module=part, scope=scope)

    return make


def around_decorated(body: Body) -> Any:
    """A decorated function in a module that is overridden besides."""
    inner = go.custom_backward(body.rule)(body.fn)

    class Around(body.host):  # type: ignore[name-defined,misc]
        pass

    parameters = inspect.signature(body.host.forward)
    source = f"def forward{parameters}: return inner({_passed(parameters)})"
    names = {"inner": inner}
    exec(source, names)
    Around.forward = names["forward"]
    return under(lambda part, _: {part: doubled_all})(dataclasses.replace(body, host=Around))


def _passed(signature: inspect.Signature) -> str:
    own = [p for name, p in signature.parameters.items() if name != "self"]
    return ", ".join([f"{p.name}={p.name}" if p.kind is p.KEYWORD_ONLY else p.name for p in own])


def doubled_all(grad_output, vjp):
    return mapped(lambda grad: 2 * grad, vjp(grad_output))


NO_PARAMETERS = ("parameters", "it is a function, without parameters")
ONE_TENSOR = ("structure", "it is for one tensor: its result has the shape of its argument")
VALUE_ONLY = ("forward", "it is given a value, and runs no forward")

BY_RULE = Attach(of_function(lambda body: body.rule), times_by_hand(3), (NO_PARAMETERS,))
BY_VJP = Attach(of_function(lambda body: tripled_all), times_by_hand(3), (NO_PARAMETERS,))
METHOD = Attach(of_method, times_by_hand(3))
OWN_BACKWARD = Attach(of_class, times_by_hand(3))
PASSED = Attach(lambda body: go.straight_through(body.fn), pass_by_hand(torch.ones_like), (NO_PARAMETERS, ONE_TENSOR))
SURROGATE = Attach(
    lambda body: go.straight_through(body.fn, surrogate=torch.tanh),
    pass_by_hand(lambda x: 1 - torch.tanh(x) ** 2),
    (NO_PARAMETERS, ONE_TENSOR),
)
EDIT = Attach(of_edit, times_by_hand(3), (NO_PARAMETERS, VALUE_ONLY))
CONNECT = Attach(of_connect, times_by_hand(3), (NO_PARAMETERS, VALUE_ONLY))
BRIDGE = Attach(of_bridge, times_by_hand(3), (NO_PARAMETERS,))
BY_INSTANCE = Attach(under(lambda part, body: {part: body.rule}), times_by_hand(3))
BY_CLASS = Attach(under(lambda part, body: {type(part): body.rule}), times_by_hand(3))
BY_GLOB = Attach(under(lambda part, body: {"par*": tripled_all}), times_by_hand(3))
NESTED = Attach(
    under(lambda part, body: {type(part): body.rule}, lambda part, body: {part: doubled_all}), times_by_hand(6)
)
WITHIN = Attach(around_decorated, times_by_hand(6), (("parameters", "the function within has no parameters"),))
