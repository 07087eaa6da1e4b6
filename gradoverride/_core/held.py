"""Tensors within objects that are not looked into (a cache, a namespace), where a rule would not reach them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gradoverride._core.call import Call
from gradoverride._core.captured import requires_grad, tensors_in
from gradoverride._core.private.dynamo import fail, in_transform
from gradoverride._core.reach import SCALARS
from gradoverride._core.structure import LEAF, Constant, Node, flatten, named_parts
from gradoverride._core.tensors import is_differentiable, may_want_gradient
from gradoverride.errors import CapturedTensorError, GradOverrideWarning, GraphError

__all__ = ["note_held", "refuse_held", "refuse_within"]


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
    if type(value) in SCALARS or isinstance(value, type) or (isinstance(value, nn.Module) and not modules):
        return None
    found = tensors_in(f"'{name}'", value, depth=4, objects=True, modules=modules, counts=counts)
    return next((path for path, _ in found), None)


def _held_within(name: str, spec: Any, counts: Callable[[Tensor], bool]) -> str | None:
    """Where, beside the leaves of a value of this spec, an object is that holds a tensor that counts."""
    if isinstance(spec, Constant):
        return _first_in(name, spec.value, counts)
    if not isinstance(spec, Node) or spec.bare:
        return None
    inner = [*named_parts(spec), *((f".{key}", Constant(value)) for key, value in (spec.more or {}).items())]
    for step, part in inner:
        held = _held_within(f"{name}{step}", part, counts)
        if held is not None:
            return held
    return None
