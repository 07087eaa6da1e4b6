"""A stand-in for a module: the same class, attributes and buffers, but other tensors for some parameters.

Forwards reach parameters through `self`. To give a rule the say over their gradients, the forward must meet aliases
of them, and the live module must not be touched: another thread may be in it. So the forward gets a stand-in, made
without `__init__`; `super()`, `isinstance`, hooks and submodules work on it. What the forward assigns to plain
attributes and buffers, and only that, is written back. Only modules on the way to a replaced parameter are copied.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from types import MethodType
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from gradoverride._core.modules.snapshot import Snapshot
from gradoverride._core.private.dynamo import fail
from gradoverride._core.private.marks import (
    COMPILED_CALL,
    FORMER_PARAMETERS,
    ORIGINAL,
    RNN_WEIGHTS,
    evaluated_while_tracing,
    uncompiled,
)
from gradoverride.errors import UnsupportedError

__all__ = ["Copied", "around", "is_parametrized", "stand_in", "with_parameters", "write_back"]

_NONE: Mapping[str, Snapshot] = {}
_TABLES = ("_parameters", "_modules")


class Copied(NamedTuple):
    """A module that a stand-in has a copy of."""

    module: nn.Module
    clone: nn.Module
    before: Snapshot  # of the clone
    given: dict[str, dict[str, Any]]  # its parameters and parts, by the name of their table


class _Given(nn.Module):
    """Stands in for a `ParametrizationList`: gives the value that was computed once."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value

    def forward(self) -> Tensor:
        return self.value


@evaluated_while_tracing
def _noting(cls: Any, names: tuple[str, ...]) -> Any:
    return _reading(cls, names, _noted)


def _reading(cls: Any, names: tuple[str, ...], read: Callable[[Any, str], Callable[[Any], Any]]) -> Any:
    """`cls`, whose parametrized weights `names` are read by `read(cls, name)`. Kept by `cls`: see `by_class`."""
    made = cls.__dict__.get(_READING)
    if made is None:
        setattr(cls, _READING, made := {})
    if (read, names) not in made:
        properties = {name: getattr(cls, name).getter(read(cls, name)) for name in names}
        made[read, names] = type(cls.__name__, (cls,), properties)
    return made[read, names]


_READING = "_gradoverride_reading"


def _computed(_: Any, name: str) -> Callable[[Any], Any]:
    """Computes it: the cache of `parametrize.cached` knows the module, not its stand-in."""
    return lambda self: self.parametrizations[name]()


def _noted(cls: Any, name: str) -> Callable[[Any], Any]:
    """Reads it as `cls` does, and notes what it is."""
    read = getattr(cls, name).fget

    def noted(self: Any) -> Any:
        prefix, seen = self.__dict__[_SEEN]
        seen[prefix + name] = value = read(self)
        return value

    return noted


_SEEN = "_gradoverride_seen"


def is_parametrized(module: nn.Module | None) -> bool:
    """Whether weights of it or of its parts are computed."""
    return module is not None and any(["parametrizations" in part._modules for part in module.modules()])


@evaluated_while_tracing
def _has_assigning(cls: Any) -> bool:
    """Whether `cls` has a class of its own for stand-ins, as `_Assigning`: unless it assigns in its own way.

    Dynamo reads that as an attribute: of a class that it does not know by a name it knows no methods.
    """
    plain = cls.__setattr__ is nn.Module.__setattr__ and cls.register_buffer is nn.Module.register_buffer
    if plain and _ASSIGNING not in cls.__dict__:
        setattr(cls, _ASSIGNING, type(cls.__name__, (_Assigning, cls), {"__module__": cls.__module__}))
    return plain


_ASSIGNING = "_gradoverride_assigning"


class _Assigning:
    """Assigns a buffer where it is kept: what `nn.Module` does then Dynamo cannot trace for a stand-in."""

    __slots__ = ()

    def __init_subclass__(cls) -> None:
        """No class of the user's is told: this is none of its subclasses."""

    def __setattr__(self: Any, name: str, value: Any) -> None:
        if name in self._buffers and (value is None or torch.is_tensor(value)) and not isinstance(value, nn.Parameter):
            self._buffers[name] = value
        else:
            nn.Module.__setattr__(self, name, value)


def stand_in(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    copied: list[Copied] | None = None,
    prefix: str = "",
    changes: Mapping[str, Snapshot] = _NONE,
    seen: dict[str, Tensor] | None = None,
) -> nn.Module:
    """A stand-in for `module` with `tensors`, by dotted name, in place of its parameters and buffers.

    What is copied for it is added to `copied`, for `write_back`. `changes`, by prefix, are what else is other than now.
    Parametrized weights that are read on it are noted in `seen`, unless they are given.
    """
    if isinstance(module, torch.jit.ScriptModule):
        _refuse_script(module, prefix)
    before = Snapshot.of(module)
    if prefix in changes:
        before.change(changes[prefix])
    state, buffers, _ = before
    # What was compiled has the live module's parameters: the stand-in is called uncompiled.
    state.pop(COMPILED_CALL, None)
    table = state["_modules"].get("parametrizations")
    others = () if table is None else _computed_from(table, prefix, tensors)
    cls: Any = type(module)
    if torch.compiler.is_dynamo_compiling():
        cls = getattr(cls, _ASSIGNING) if buffers and _has_assigning(cls) else cls
    elif others:
        cls = _reading(cls, others, _computed)
    if seen is not None and table is not None:
        cls = _noting(cls, tuple([name for name in table._modules if prefix + name not in tensors]))
        state[_SEEN] = prefix, seen
    clone: nn.Module = object.__new__(cls)
    parameters = state["_parameters"]
    swapped = {name: tensors.get(prefix + name, value) for name, value in parameters.items()}
    state["_parameters"] = swapped
    for name, value in buffers.items():
        buffers[name] = tensors.get(prefix + name, value)
    state["_buffers"] = dict(buffers)
    children: dict[str, nn.Module | None] = {}
    for name, child in state["_modules"].items():
        path = f"{prefix}{name}."
        replaced = any(key.startswith(path) for key in (*tensors, *changes))
        if name == "parametrizations":
            children[name] = _parametrizations(child, tensors, copied, prefix, path)
        elif replaced or (seen is not None and is_parametrized(child)):
            children[name] = stand_in(child, tensors, copied, path, changes, seen)
        else:
            children[name] = child
    state["_modules"] = children
    if RNN_WEIGHTS in state:
        state[RNN_WEIGHTS] = [_counterpart(item, parameters, swapped) for item in state[RNN_WEIGHTS]]
    if "forward" in state and uncompiled(module) is not module:
        state["forward"] = children[ORIGINAL]
    _move_methods(module, clone, state)
    clone.__dict__.update(state)
    before.put_in_slots(clone)
    if copied is not None:
        given_tables = {} if torch.compiler.is_dynamo_compiling() else {key: dict(state[key]) for key in _TABLES}
        copied.append(Copied(module, clone, before, given_tables))
    return clone


def _computed_from(table: nn.Module, prefix: str, tensors: Mapping[str, Tensor]) -> tuple[str, ...]:
    """The parametrized weights that are given, or are to be computed from other parameters than those of the module."""

    def is_other(name: str) -> bool:
        start = f"{prefix}parametrizations.{name}."
        return prefix + name in tensors or any(key.startswith(start) for key in tensors)

    return tuple([name for name in table._modules if is_other(name)])


def _move_methods(module: nn.Module, clone: nn.Module, state: dict[str, Any]) -> None:
    """A method that is put on an instance (`self.run = self.run_slowly`, a forward) may be bound to the live module."""
    kinds = [(name, type(value)) for name, value in state.items()]
    for name in [name for name, kind in kinds if kind is MethodType or kind is functools.partial]:
        value = state[name]
        if isinstance(value, MethodType):
            if value.__self__ is module:
                # Dynamo makes no methods.
                bound = functools.partial if torch.compiler.is_dynamo_compiling() else MethodType
                state[name] = bound(value.__func__, clone)
        elif any(argument is module for argument in value.args):
            given = [clone if argument is module else argument for argument in value.args]
            state[name] = functools.partial(value.func, *given, **value.keywords)


def around(compiled: nn.Module, module: nn.Module) -> nn.Module:
    """`compiled`, what `torch.compile` gave, with its hooks, around `module`, which is then called uncompiled."""
    clone = stand_in(compiled, {})
    clone.__dict__["forward"] = clone._modules[ORIGINAL] = module
    return clone


def _refuse_script(module: nn.Module, prefix: str) -> NoReturn:
    part = f"'{prefix[:-1]}'" if prefix else "the module"
    fail(
        UnsupportedError,
        f"{part} must run on other tensors than its own parameters, for a rule to answer for them; it is a "
        f"{type(module).__name__} and keeps to its own. Put the module there that was scripted or traced, ask for no "
        "parameters of it in the rule, or override the other parts alone",
    )


def with_parameters(replica: nn.Module) -> nn.Module:
    """A stand-in for a replica of DataParallel, which has its parameters as plain attributes, with parameters."""
    now = Snapshot.of(replica)
    state = now.attributes
    former = state.get(FORMER_PARAMETERS) or {}
    state["_parameters"] = {**state["_parameters"], **former}
    for name in former:
        state.pop(name, None)
    children = state["_modules"].items()
    state["_modules"] = {name: None if child is None else with_parameters(child) for name, child in children}
    clone: nn.Module = object.__new__(type(replica))
    clone.__dict__.update(state)
    now.put_in_slots(clone)
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
    """Give modules what a forward assigned on their stand-ins or deleted: attributes, buffers, parameters, parts.

    What it has left alone stays: a hook or another thread may have changed it on the module meanwhile.
    """
    for module, clone, before, given in copied:
        Snapshot.of(clone).since(before).put_on(module)
        for key, table in given.items():
            now, live = vars(clone)[key], vars(module)[key]
            made = [pair for pair in now.items() if table.get(pair[0]) is not pair[1] and type(pair[1]) is not _Given]
            live.update(made)
            for name in table.keys() - now.keys():
                live.pop(name, None)
