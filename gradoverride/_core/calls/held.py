"""Tensors within objects that are not looked into (a cache, a namespace), where a rule would not reach them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gradoverride._core.autograd.function import tied
from gradoverride._core.calls.call import Call
from gradoverride._core.graph.captured import requires_grad, tensors_in
from gradoverride._core.graph.kept_graph import KeptGraph
from gradoverride._core.private.dynamo import fail, in_transform
from gradoverride._core.private.tensors import version_of
from gradoverride._core.python.reach import SCALARS
from gradoverride._core.values.structure import LEAF, Constant, Node, flatten, named_parts
from gradoverride._core.values.tensors import is_differentiable, is_tensor, may_want_gradient
from gradoverride.errors import CapturedTensorError, GradOverrideWarning, GraphError, UnsupportedError

__all__ = ["HandedOver", "note_held", "refuse_held", "refuse_within"]


def refuse_held(call: Call, receiver: Any, values: Sequence[Any], result: Any) -> None:
    """No argument wants a gradient, but the result has one: of a tensor within an object, where it was not looked for.

    The `self` of a method that is given no tensors is such an object too. Not of one in a closure or global: that has
    its own gradient by torch, as where nothing is decorated.
    """
    alone = receiver is not None and not call.holders
    if not alone and not any([_may_hold(spec) for spec in call.specs]):
        return
    results: list[Tensor] = []
    spec = flatten(result, is_differentiable, results)
    wanting = any([tensor.requires_grad for tensor in results])
    if wanting or (_may_hold(spec) and _held_by("", result) is not None):
        found = [_held_by(name, value) for name, value in zip(call.names, values, strict=True)]
        for held in (*found, _held_by_self(receiver) if wanting and alone else None):
            if held is not None:
                fail(
                    CapturedTensorError,
                    f"{call.plan.forward.who} must get each tensor that wants a gradient as an argument, or in a "
                    f"tuple, list, dict or dataclass; it got {held}, which requires grad, within an object that "
                    "gradoverride does not look into, and the rule would be dropped. Pass the tensor itself, or "
                    "detach() it",
                )


def note_held(call: Call, values: Sequence[Any]) -> None:
    """Warn, once, of a tensor within an object in the result: no rule is given its gradient, and it has no graph.

    An object that was given (a cache) is the caller's, and what was there before cannot be told from what is computed.
    """
    plan = call.plan
    if plan.told_of_held or plan.is_edit or not _may_hold(call.result):
        return
    held = _held_within("result", _without(call.result, [id(value) for value in values]), is_differentiable)
    if held is not None:
        plan.told_of_held = True
        warnings.warn(
            f"{plan.forward.who} returns {held} within an object that gradoverride does not look into, beside what its "
            f"rule {plan.rule.who} is given the gradient of; no gradient goes back from there, for the forward runs "
            "without a graph. Return it in a tuple, list, dict or dataclass, if one is to",
            GradOverrideWarning,
            stacklevel=2,
        )


def _without(spec: Any, ids: Sequence[int]) -> Any:
    """The spec without values that have these ids."""
    if isinstance(spec, Constant):
        return Constant(None) if id(spec.value) in ids else spec
    if not isinstance(spec, Node) or spec.bare:
        return spec
    return Node(spec.kind, spec.keys, [_without(part, ids) for part in spec.parts], spec.more)


def refuse_within(who: str, name: str, spec: Any, purpose: str, *, constants: bool = False) -> None:
    """Raise the error for the argument `name` of this spec, if a tensor that wants a gradient is within an object in
    it, where it would be left out. With `constants` one that may have a gradient is enough.
    """
    transformed = in_transform()
    if not transformed and not torch.is_grad_enabled():
        return

    def wants_gradient(tensor: Tensor) -> bool:
        return tensor.requires_grad or (transformed and may_want_gradient(tensor))

    held = _held_within(name, spec, is_differentiable if constants else wants_gradient)
    if held is not None:
        fail(
            GraphError,
            f"{who}: '{name}' must hold its tensors in tuples, lists, dicts and dataclasses, {purpose}; it has "
            f"{held}{'' if constants else ', which requires grad,'} within an object of another kind. Turn that into "
            f"one of these, or {'leave it out' if constants else 'detach() the tensor'}",
        )


class HandedOver:
    """Tensors within an object that a forward hands over: torch saves none of them. So a later write is looked for
    here, and gradients of what the rule computes with them are known to nobody.
    """

    def __init__(self) -> None:
        self.found: list[tuple[str, Tensor, int | None]] = []
        self.outer: list[Tensor] = []  # what leads to the inputs
        self.slots: list[int] = []  # in a transform, where these are saved

    def look_at(self, name: str, spec: Any) -> None:
        """The value of this spec has been handed over under this name."""
        for path, tensor in _tensors_within(name, spec, is_tensor):
            self.found.append((path, tensor, version_of(tensor)))

    def refuse_written(self, call: Call) -> None:
        """Raise the error for one that was written into since."""
        for path, tensor, version in self.found:
            if version_of(tensor) != version:
                fail(
                    UnsupportedError,
                    f"{call.plan.who} must have {path} as its forward handed it over, and it was written into "
                    "since, within an object that gradoverride does not look into. Hand over a copy, or write after "
                    "the backward",
                )

    def tied(self, call: Call, grads: Sequence[Tensor | None], saved: Sequence[Tensor]) -> list[Tensor | None]:
        """The gradients that the rule gave, whose own derivatives raise: they may depend on such a tensor.

        A kept graph tells which do. Without one any with floating values may be computed from the arguments.
        """
        counts = requires_grad if isinstance(call.graph, KeptGraph) else is_differentiable
        path = next((path for path, tensor, _ in self.found if counts(tensor)), None)
        given = [grad for grad in grads if grad is not None]
        if path is None or not given:
            return list(grads)
        text = (
            f"the second derivative of {call.plan.forward.who} through {path}, which its forward hands over within an "
            "object that gradoverride does not look into, is not known. Hand over the tensor itself "
            "(save_for_backward(result, name=tensor)), or in a tuple, list, dict or dataclass, and ask for 'vjp' "
            "besides if it is computed"
        )
        inputs = [saved[slot] for slot in self.slots]
        found = iter(tied([*given, *inputs], self.outer, text))
        return [None if grad is None else next(found) for grad in grads]


def _may_hold(spec: Any) -> bool:
    """Whether an argument of this structure has a value in it that may hold tensors itself."""
    if isinstance(spec, Constant):
        return type(spec.value) not in SCALARS and not isinstance(spec.value, Tensor)
    return spec is not LEAF and not spec.bare and any([_may_hold(part) for part in spec.parts])


def _held_by(name: str, value: Any) -> str | None:
    """Where in an argument, which has no tensors in its structure, one is that requires grad; or that none can see."""
    if isinstance(value, Iterator):
        return f"what '{name}' gives"
    return _first_in(name, value, requires_grad, modules=isinstance(value, nn.Module))


def _held_by_self(receiver: Any) -> str | None:
    """Where in the object of a method a tensor is that requires grad, beside the parameters of a module."""
    if isinstance(receiver, (type, Tensor)) or torch.compiler.is_dynamo_compiling():
        return None
    if not isinstance(receiver, nn.Module):
        return _first_in("self", receiver, requires_grad)
    for path, module in receiver.named_modules(prefix="self"):
        for name, value in {**vars(module), **module._buffers}.items():
            held = None if name.startswith("_") else _first_in(f"{path}.{name}", value, requires_grad)
            if held is not None:
                return held
    return None


def _first_in(name: str, value: Any, counts: Callable[[Tensor], bool], modules: bool = False) -> str | None:
    return next((path for path, _ in _within(name, value, counts, modules)), None)


def _within(
    name: str, value: Any, counts: Callable[[Tensor], bool], modules: bool = False
) -> Iterator[tuple[str, Tensor]]:
    if type(value) in SCALARS or isinstance(value, type) or (isinstance(value, nn.Module) and not modules):
        return iter(())
    return tensors_in(f"'{name}'", value, depth=4, objects=True, modules=modules, counts=counts)


def _held_within(name: str, spec: Any, counts: Callable[[Tensor], bool]) -> str | None:
    """Where, beside the leaves of a value of this spec, an object is that holds a tensor that counts."""
    return next((path for path, _ in _tensors_within(name, spec, counts)), None)


def _tensors_within(name: str, spec: Any, counts: Callable[[Tensor], bool]) -> Iterator[tuple[str, Tensor]]:
    """All of them, each with its path."""
    if isinstance(spec, Constant):
        yield from _within(name, spec.value, counts)
    elif isinstance(spec, Node) and not spec.bare:
        for step, part in (*named_parts(spec), *((f".{key}", Constant(one)) for key, one in (spec.more or {}).items())):
            yield from _tensors_within(f"{name}{step}", part, counts)
