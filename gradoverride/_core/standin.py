"""A stand-in for a module: the same class, attributes and buffers, but other tensors for some parameters.

Forwards reach parameters through `self`. To give a rule the say over their gradients, the forward must meet aliases
of them, and the live module must not be touched: another thread may be in it. So the forward gets a stand-in, made
without `__init__`; `super()`, `isinstance`, hooks and submodules work on it. What the forward assigns to plain
attributes and buffers, and only that, is written back. Only modules on the way to a replaced parameter are copied.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from types import MemberDescriptorType, MethodType
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from gradoverride._core.private import COMPILED_CALL, ORIGINAL, fail, in_modes, uncompiled, versions_while_tracing
from gradoverride._core.structure import flatten
from gradoverride._core.targets import RECORD
from gradoverride.errors import UnsupportedError

__all__ = [
    "MISSING",
    "Attributes",
    "Collector",
    "Copied",
    "Stale",
    "changed_since",
    "plain_attributes",
    "stand_in",
    "with_parameters",
    "write_back",
]

_TABLES = ("_parameters", "_buffers", "_modules")
_RNN_WEIGHTS = "_flat_weights"  # nn.RNNBase keeps its weights in this list besides, and its forward reads it
_NOT_OF_THE_FORWARD = (*_TABLES, _RNN_WEIGHTS, "_flat_weight_refs", RECORD)  # weak references to the same
MISSING = object()
"""Of an attribute that is not there."""
Attributes = Mapping[str, Mapping[str, Any]]
_NOTHING: Mapping[str, Any] = {}


class Copied(NamedTuple):
    """A module that a stand-in has a copy of."""

    module: nn.Module
    clone: nn.Module
    attributes: dict[str, Any]  # of the clone, before the forward
    buffers: dict[str, Tensor | None]
    slots: list[tuple[Any, Any]]  # that the class has, and their values


class _Given(nn.Module):
    """Stands in for a `ParametrizationList`: gives the value that was computed once."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value

    def forward(self) -> Tensor:
        return self.value


@functools.cache
def _without_cache(cls: Any, names: tuple[str, ...]) -> Any:
    """`cls`, whose parametrized weights `names` are computed, not looked up in the cache of `parametrize.cached`.

    That cache knows the module, not its stand-in.
    """
    return type(cls.__name__, (cls,), {name: property(_computed(name)) for name in names})


def _computed(name: str) -> Callable[[Any], Any]:
    return lambda self: self.parametrizations[name]()


def stand_in(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    copied: list[Copied] | None = None,
    prefix: str = "",
    attributes: Attributes = _NOTHING,
) -> nn.Module:
    """A stand-in for `module` with `tensors`, by dotted name, in place of its parameters and buffers.

    What is copied for it is added to `copied`, for `write_back`. Plain `attributes`, by prefix, are other than now.
    """
    if isinstance(module, torch.jit.ScriptModule):
        _refuse_script(module, prefix)
    state = dict(module.__dict__)
    for name, value in attributes.get(prefix, _NOTHING).items():
        if value is MISSING:
            state.pop(name, None)
        else:
            state[name] = value
    # What was compiled has the live module's parameters: the stand-in is called uncompiled.
    state.pop(COMPILED_CALL, None)
    table = state["_modules"].get("parametrizations")
    given = () if table is None else tuple(name for name in table._modules if prefix + name in tensors)
    own: Any = type(module)
    cls = own if not given or torch.compiler.is_dynamo_compiling() else _without_cache(own, given)
    clone: nn.Module = object.__new__(cls)
    parameters = state["_parameters"]
    swapped = {name: tensors.get(prefix + name, value) for name, value in parameters.items()}
    state["_parameters"] = swapped
    buffers = {name: tensors.get(prefix + name, value) for name, value in state["_buffers"].items()}
    state["_buffers"] = buffers
    children: dict[str, nn.Module | None] = {}
    for name, child in state["_modules"].items():
        path = f"{prefix}{name}."
        if child is None:
            children[name] = None
        elif name == "parametrizations":
            children[name] = _parametrizations(child, tensors, copied, prefix, path)
        elif any(key.startswith(path) for key in (*tensors, *attributes)):
            children[name] = stand_in(child, tensors, copied, path, attributes)
        else:
            children[name] = child
    state["_modules"] = children
    if _RNN_WEIGHTS in state:
        state[_RNN_WEIGHTS] = [_counterpart(item, parameters, swapped) for item in state[_RNN_WEIGHTS]]
    if "forward" in state:
        _move_methods(module, clone, state)
    clone.__dict__.update(state)
    slots = _copy_slots(module, clone)
    if copied is not None:
        copied.append(Copied(module, clone, state, dict(buffers), slots))
    return clone


@functools.cache
def _slots_of(cls: Any) -> tuple[Any, ...]:
    """The attributes of instances of `cls` that are in `__slots__`, not in `__dict__`."""
    return tuple(
        member for base in cls.__mro__ for member in vars(base).values() if isinstance(member, MemberDescriptorType)
    )


def _copy_slots(module: nn.Module, clone: nn.Module) -> list[tuple[Any, Any]]:
    if torch.compiler.is_dynamo_compiling():  # which knows no slots
        return []
    cls: Any = type(module)
    slots = [(slot, _slot_value(slot, module)) for slot in _slots_of(cls)]
    for slot, value in slots:
        if value is not MISSING:
            slot.__set__(clone, value)
    return slots


def _slot_value(slot: Any, module: nn.Module) -> Any:
    try:
        return slot.__get__(module)
    except AttributeError:  # it is empty
        return MISSING


def _move_methods(module: nn.Module, clone: nn.Module, state: dict[str, Any]) -> None:
    """A forward that is put on an instance may be bound to it, or to what it stood in for: to the live module."""
    if uncompiled(module) is not module:
        state["forward"] = state["_modules"][ORIGINAL]
        return
    for name, value in state.items():
        if isinstance(value, MethodType) and value.__self__ is module:
            state[name] = MethodType(value.__func__, clone)
        elif isinstance(value, functools.partial) and any(argument is module for argument in value.args):
            given = [clone if argument is module else argument for argument in value.args]
            state[name] = functools.partial(value.func, *given, **value.keywords)


def _refuse_script(module: nn.Module, prefix: str) -> NoReturn:
    part = f"'{prefix[:-1]}'" if prefix else "the module"
    fail(
        UnsupportedError,
        f"{part} must run on other tensors than its own parameters, for a rule to answer for them; it is a "
        f"{type(module).__name__} and keeps to its own. Put the module there that was scripted or traced, ask for no "
        "parameters of it in the rule, or override the other parts alone",
    )


def plain_attributes(module: nn.Module) -> dict[str, dict[str, Any]]:
    """By prefix, the attributes of `module` and its parts that hold no parameters, buffers or parts."""
    return {
        f"{name}." if name else "": {key: one for key, one in part.__dict__.items() if key not in _NOT_OF_THE_FORWARD}
        for name, part in module.named_modules()
    }


def changed_since(before: Attributes, module: nn.Module) -> dict[str, dict[str, Any]]:
    """Those attributes that are others now, as they were."""
    now = plain_attributes(module)
    changed = {}
    for prefix, own in before.items():
        theirs = now.get(prefix, {})
        differing = {name: value for name, value in own.items() if theirs.get(name, MISSING) is not value}
        differing.update({name: MISSING for name in theirs if name not in own})
        if differing:
            changed[prefix] = differing
    return changed


def with_parameters(replica: nn.Module) -> nn.Module:
    """A stand-in for a replica of DataParallel, which has its parameters as plain attributes, with parameters."""
    state = dict(replica.__dict__)
    former = state.get("_former_parameters") or {}
    state["_parameters"] = {**state["_parameters"], **former}
    for name in former:
        state.pop(name, None)
    children = state["_modules"].items()
    state["_modules"] = {name: None if child is None else with_parameters(child) for name, child in children}
    clone: nn.Module = object.__new__(type(replica))
    clone.__dict__.update(state)
    _copy_slots(replica, clone)
    return clone


def _parametrizations(
    child: nn.Module, tensors: Mapping[str, Tensor], copied: list[Copied] | None, prefix: str, path: str
) -> nn.Module:
    """The table of parametrizations, where a value given under a plain name is not computed again."""
    clone = stand_in(child, tensors, copied, path)
    for name in child._modules:
        if prefix + name in tensors:
            clone._modules[name] = _Given(tensors[prefix + name])
    return clone


def _counterpart(item: Any, before: Mapping[str, Any], after: Mapping[str, Any]) -> Any:
    for name, value in before.items():
        if value is item:
            return after[name]
    return item


def write_back(copied: Sequence[Copied]) -> None:
    """Give modules the plain attributes and buffers that a forward assigned on their stand-ins.

    What it has left alone stays: a hook or another thread may have changed it on the module meanwhile.
    """
    for module, clone, attributes, buffers, slots in copied:
        own, theirs = clone.__dict__, module.__dict__
        for name, value in own.items():
            if name not in _NOT_OF_THE_FORWARD and attributes.get(name, MISSING) is not value:
                theirs[name] = value
        for name in attributes:
            if name not in own:
                theirs.pop(name, None)
        for name, buffer in own["_buffers"].items():
            if buffers.get(name) is not buffer:
                theirs["_buffers"][name] = buffer.detach() if isinstance(buffer, Tensor) else buffer
        for slot, before in slots:
            value = _slot_value(slot, clone)
            if value is MISSING and before is not MISSING:
                slot.__delete__(module)
            elif value is not before:
                slot.__set__(module, value)


class Stale(Tensor):
    """A tensor that was written into after the forward that a stand-in is to show: whoever uses it is told `text`."""

    @classmethod
    def of(cls, tensor: Tensor, text: str) -> Stale:
        stale = tensor.detach().as_subclass(cls)
        stale.__dict__["text"] = text
        return stale

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found: list[Stale] = []
        flatten((args, kwargs or {}), lambda part: isinstance(part, cls), found)
        fail(UnsupportedError, found[0].__dict__["text"])


class _Collected(Tensor):
    """A parameter on the stand-in of a `backward`: what is assigned to its `grad` is collected, and nothing else."""

    # As for nn.Parameter: results of operations are plain tensors, and nothing is dispatched.
    # Operations on it are those of Tensor, and give plain tensors.
    __torch_function__ = nn.Parameter.__torch_function__

    @property
    def grad(self) -> Any:
        return self.__dict__.get("collected")

    @grad.setter
    def grad(self, value: Any) -> None:
        self.__dict__["collected"] = value


class Collector:
    """The `self` of a `backward(self, grad_output)`, and what it assigned to the `grad` of its parameters.

    A live `self.weight.grad = ...` overwrites what was accumulated, skips hooks, is out of reach of
    `autograd.grad`, and two threads meet in it. Collected, it is a gradient like any other.
    """

    def __init__(
        self,
        module: Any,
        frozen: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        params: Mapping[str, tuple[list[str], Tensor]],
        *,
        traced: bool,
        attributes: Attributes = _NOTHING,
    ) -> None:
        self.params: dict[str, Tensor] = {}
        # The `grad` of each that is a plain alias, and its version: is it another, or was written into (`+=`), it was
        # assigned.
        self.before: dict[str, Tensor] = {}
        self.versions: Sequence[int] = ()
        self.traced = torch.compiler.is_dynamo_compiling()
        traced = traced or torch.compiler.is_dynamo_compiling()  # the backward alone: compiled autograd
        for name, (_, tensor) in params.items():
            # Dynamo knows no properties on tensors, a DTensor is no other subclass besides, and modes that operations
            # are shown to (those of compiled autograd, of FLOP counters) do not know ours.
            if traced or type(tensor) not in (Tensor, nn.Parameter) or in_modes():
                self.params[name] = tensor.detach()
                if not traced and torch.is_grad_enabled() and tensor.requires_grad:  # for second derivatives
                    self.params[name] = tensor.view_as(tensor)
                    self.params[name].retain_grad()  # or torch warns of a look at its `grad`
                self.params[name].grad = self.before[name] = torch.zeros_like(tensor)
            else:
                self.params[name] = tensor.view_as(tensor).as_subclass(_Collected)
        self.versions = self._versions()
        # A frozen parameter is assigned to as well, and has no gradient to be collected.
        tensors = {**buffers, **{name: _alias(tensor) for name, tensor in frozen.items()}}
        for name, (names, _) in params.items():
            tensors.update(dict.fromkeys(names, self.params[name]))
        self.copied: list[Copied] = []
        self.stand_in = stand_in(module, tensors, self.copied, attributes=attributes)

    def collected(self) -> dict[str, Any]:
        """By name, the gradients that were assigned. Plain attributes that were are given to the module."""
        write_back(self.copied)
        written = dict(zip(self.before, map(operator.ne, self.versions, self._versions()), strict=True))
        return {n: param.grad for n, param in self.params.items() if written.get(n) or self._was_assigned(n, param)}

    def _versions(self) -> Sequence[int]:
        given = list(self.before.values())
        return versions_while_tracing(given) if self.traced else [tensor._version for tensor in given]

    def _was_assigned(self, name: str, param: Tensor) -> bool:
        if name in self.before:
            return param.grad is not self.before[name]
        return "collected" in param.__dict__


def _alias(tensor: Tensor) -> Tensor:
    return tensor if isinstance(tensor, Stale) else tensor.detach()
