"""`connect` and `connect_`: two graphs with a gap between them, connected by a rule.

`connect` is for before the downstream graph is built: it gives a result that was computed outside of autograd a
gradient. `connect_` is for after: the downstream graph starts at a leaf, and what arrives there goes on.
"""

from __future__ import annotations

import functools
import inspect
import keyword
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from gradoverride._core.autograd.ambient import Autocast
from gradoverride._core.binding.contract import shape_text, what
from gradoverride._core.binding.signature import RESERVED, Forward
from gradoverride._core.calls.forward_pass import tie
from gradoverride._core.calls.held import refuse_within
from gradoverride._core.calls.reading import Readings, keep_own_plan, keep_plan, kept_plan, made_outside, unbound
from gradoverride._core.calls.tracers import FX, record_function, tracer_now
from gradoverride._core.doors.connection import Connection
from gradoverride._core.private.dynamo import fail, in_transform, transformed_while_tracing
from gradoverride._core.private.marks import evaluated_while_tracing
from gradoverride._core.values.structure import leaves_in, taken_apart, unflatten
from gradoverride._core.values.tensors import is_differentiable, is_tensor
from gradoverride.errors import GraphError, UnsupportedError

__all__ = ["Connection", "connect", "connect_"]

X = TypeVar("X")


def connect(result: X, inputs: Any, rule: Callable[..., Any] | None = None) -> X:
    """`result`, which was computed outside of autograd, with a gradient that reaches `inputs` by `rule`.

    >>> import numpy, torch, gradoverride as go
    >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> result = torch.from_numpy(numpy.square(x.detach().numpy()))
    >>> y = go.connect(result, x, lambda grad_output, input: grad_output * 2 * input)
    >>> y.sum().backward()
    >>> x.grad
    tensor([2., 4.])

    `result` is a tensor or any structure of them. `inputs` is a tensor, which the rule may ask for as `input`; a tuple
    or list of tensors, `inputs`; or a dict of anything, whose keys are the names. The rule returns a gradient for each
    as any rule does: bare for one, a tuple in order, a dict by name. It may ask for `output` and `needs` besides.
    Without a rule the gradient passes unchanged, where results and inputs agree in number and shape.

    Raises `GraphError` if `result` has a graph already, no input needs a gradient, or a tensor is within an object that
    is no tuple, list, dict or dataclass; `RuleSignatureError` for a name that is not there, `RuleResultError` for a
    wrong answer.
    """
    tracer = tracer_now((result, inputs))
    if tracer == FX:
        return record_function("connect", functools.partial(connect, rule=rule), result, inputs)
    _check_result(result)
    if tracer is None:
        _check_wanted(*_named(inputs, "connect"), "connect")
    return _connected(_normal(result), inputs, rule, "connect")


def connect_(leaf: Tensor, inputs: Any, rule: Callable[..., Any] | None = None) -> Connection:
    """Connect a graph that is already built on `leaf`: the gradient of the leaf goes on to `inputs` by `rule`.

    >>> import torch, gradoverride as go
    >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> leaf = torch.tensor([1.0, 4.0], requires_grad=True)
    >>> loss = (leaf * 3).sum()
    >>> handle = go.connect_(leaf, x, lambda grad_output, input: grad_output * 2 * input)
    >>> loss.backward()
    >>> x.grad
    tensor([ 6., 12.])

    Inputs and rule are as in `connect`. It is in force for every `backward()` that reaches the leaf, until it is left
    as a context or removed (`handle.remove()`). Such a pass ends with a second one, from the leaf on: what arrives
    there is passed on once, after all of it has arrived, also where one connection leads to another. Inputs that are
    leaves (parameters) have the values for the rule that they have when the pass runs.

    Limits. `torch.autograd.grad` does not cross the gap: asked for the gradient of an input, or of a leaf behind it, it
    raises (torch's error that the tensor was not used, or a `GraphError` where the tensor is reached in another way, or
    the leaf is asked for too). `allow_unused=True` turns torch's error off: then it answers None, and zeros with
    `materialize_grads=True`. With respect to the leaf and what comes after it it is right, and nothing goes on.
    `backward(inputs=...)` crosses the gap if the leaf is among them. What is neither an input nor a leaf is not
    watched: where it is reached in a way around the inputs, both leave out the share of the leaf. Where the graph of
    the inputs is also a part of the one that runs, that must be kept: `backward(retain_graph=True)`.

    Raises `GraphError` if `leaf` is no leaf that requires grad, if no input needs a gradient, or if the graph of the
    inputs starts at the leaf itself.
    """
    if torch.compiler.is_dynamo_compiling():
        fail(
            UnsupportedError,
            "connect_: it connects a graph that is built already, and compiled code builds none that it could see. Use "
            "connect there, or call connect_ outside of compiled code",
        )
    _check_leaf(leaf)
    names, values = _named(inputs, "connect_")
    _check_wanted(names, values, "connect_")
    value, autocast = leaf.detach(), Autocast()

    def tied() -> Tensor:
        with torch.enable_grad(), autocast.restored():
            return _connected(value, inputs, rule, "connect_")

    end = tied()
    tensors = leaves_in(values, is_tensor)
    # What a pass has saved is freed at its end, and the inputs that it is to be made of are still there.
    return Connection(leaf, end, tensors, tied if all([tensor.is_leaf for tensor in tensors]) else None)


# --- what was given ---


def _check_result(result: Any) -> None:
    spec, tensors = taken_apart(result, is_differentiable)
    if not tensors:
        fail(
            GraphError,
            f"connect: 'result' must be a floating or complex tensor, or hold one, for it to have a gradient; got "
            f"{what(result)}{f' of {result.dtype}' if isinstance(result, Tensor) else ''}. Convert it, or leave the "
            "connection out",
        )
    for tensor in tensors:
        if tensor.requires_grad:
            kind = "is a leaf that requires grad" if tensor.is_leaf else "has a graph already"
            fail(
                GraphError,
                f"connect: 'result' must have been computed outside of autograd; {what(tensor)} {kind}. Compute it "
                "from detached inputs, or edit the gradient that it has: edit_gradient",
            )
    refuse_within("connect", "result", spec, "for them to have gradients", constants=True)


def _normal(result: X) -> X:
    """`result`, with copies of tensors that were computed under inference_mode, which no graph may hold."""
    if torch.compiler.is_dynamo_compiling() or torch.is_inference_mode_enabled():
        return result
    spec, tensors = taken_apart(result, is_tensor)
    if not any([tensor.is_inference() for tensor in tensors]):
        return result
    copied: X = unflatten(spec, iter([tensor.clone() if tensor.is_inference() else tensor for tensor in tensors]))
    return copied


def _check_leaf(leaf: Any) -> None:
    state = ""
    if isinstance(leaf, Tensor):
        if leaf.is_leaf and leaf.requires_grad:
            return
        state = " that is no leaf" if leaf.requires_grad else " that requires no grad"
    raise GraphError(
        f"connect_: 'leaf' must be a leaf that requires grad, on which a graph was built; got {what(leaf)}{state}. "
        "For a result that nothing is built on yet use connect"
    )


def _named(inputs: Any, who: str) -> tuple[tuple[str, ...] | None, tuple[Any, ...]]:
    """The names by which a rule asks for the inputs, and their values. No names for a tuple: they are `inputs`."""
    if isinstance(inputs, Tensor):
        return ("input",), (inputs,)
    if isinstance(inputs, (tuple, list)):
        return None, tuple(inputs)
    if isinstance(inputs, Mapping) and all([isinstance(name, str) for name in inputs]):
        return tuple(inputs), tuple(inputs.values())
    fail(
        GraphError, f"{who}: 'inputs' must be a tensor, a tuple or list of them, or a dict by name; got {what(inputs)}"
    )


def _check_wanted(names: tuple[str, ...] | None, values: tuple[Any, ...], who: str) -> None:
    given = values if names is None else dict(zip(names, values, strict=True))
    spec, tensors = taken_apart(given, is_tensor)
    refuse_within(who, "inputs", spec, "for gradients to reach them")
    if in_transform() or any([tensor.requires_grad for tensor in tensors]):
        return
    if torch.is_grad_enabled() or who == "connect_":
        fail(
            GraphError,
            f"{who}: 'inputs' must hold a tensor that requires grad, for a gradient to reach it; got "
            f"{what(values[0] if len(values) == 1 else given)} and none requires grad. Call requires_grad_(), or "
            "leave the connection out; in a forward that has a rule, let that ask for 'vjp'",
        )


def _identity(result: Any, names: tuple[str, ...] | None, values: tuple[Any, ...], who: str) -> Callable[..., Any]:
    """The rule that passes each gradient on, where there are as many inputs as results, of the same shapes."""
    results = leaves_in(result, is_differentiable)
    spec, tensors = taken_apart(values, is_differentiable)
    shapes = [[tuple(tensor.shape) for tensor in found] for found in (results, tensors)]
    if shapes[0] != shapes[1]:
        of_results, of_inputs = [", ".join(shape_text(shape) for shape in found) for found in shapes]
        fail(
            GraphError,
            f"{who}: 'rule' may be left out where inputs have the shapes of results; results have {of_results} and "
            f"inputs {of_inputs}. Give a rule",
        )
    for one, other in zip(results, tensors, strict=True):
        if one.is_complex() and not other.is_complex():
            fail(
                GraphError,
                f"{who}: 'rule' may be left out where the inputs of complex results are complex; a result has "
                f"{one.dtype} and its input {other.dtype}. Give a rule, which takes the real part",
            )

    if isinstance(result, Tensor) and names is not None and values[0] is tensors[0]:
        return _unchanged

    def identity(grad_output: Any) -> Any:
        grads = leaves_in(grad_output, is_tensor)
        answer = unflatten(spec, iter(grads), constants=False)
        return {"inputs": answer} if names is None else dict(zip(names, answer, strict=True))

    return identity


def _unchanged(grad_output: Tensor) -> Tensor:
    return grad_output


# --- its plan ---


def _connected(result: X, inputs: Any, rule: Callable[..., Any] | None, who: str) -> X:
    names, values = _named(inputs, who)
    if rule is None:
        rule = _identity(result, names, values, who)
    if torch.compiler.is_dynamo_compiling():
        own = transformed_while_tracing() and made_outside(rule)
        plan = kept_plan(_name_of_own_plan(names, rule) if own else _name_of_plan(names, *unbound(rule)))
    else:
        plan = _readings(names, who).of(rule).plan_for(rule)
    layout = plan.layouts.of(len(values), ()) if names is None else plan.layouts.of(0, names)
    tied: X = tie(plan, layout, values, result, rule)
    return tied


def _nothing(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("the result is there already")


@functools.lru_cache(maxsize=256)
def _readings(names: tuple[str, ...] | None, who: str) -> Readings:
    kinds = inspect.Parameter
    if names is None:
        parameters = [kinds("inputs", kinds.VAR_POSITIONAL)]
    else:
        for name in names:
            reserved = name in RESERVED and name != "input"
            if reserved or not name.isidentifier() or keyword.iskeyword(name):
                raise GraphError(
                    f"{who}: the keys of 'inputs' must be names that a rule can ask for; got {name!r}"
                    f"{', by which it asks for something else' if reserved else ''}. Give it another name"
                )
        parameters = [kinds(name, kinds.KEYWORD_ONLY) for name in names]
    return Readings(
        Forward(
            _nothing,
            name=who,
            place="",
            signature=inspect.Signature(parameters),
            method=False,
            reserved=("input", "output", "needs"),
            lacks="and a connection has no forward that could tell. Ask for the inputs by name, for 'input', 'output' "
            "or 'needs'",
        )
    )


@evaluated_while_tracing
def _name_of_own_plan(names: tuple[str, ...] | None, rule: Any) -> str:
    return keep_own_plan(_readings(names, "connect"), rule)


@evaluated_while_tracing
def _name_of_plan(names: tuple[str, ...] | None, rule: Any, bound: tuple[str, ...]) -> str:
    return keep_plan(_readings(names, "connect"), rule, bound)
