"""The class of a module while it is overridden: one for each class of modules, derived from it.

Its `forward` looks up in the instance which rules are in force (`record.py`), and otherwise calls that of the base; so
do the other methods that somebody has written, for rules of functions of torch. So copies, pickles and replicas take
the rules along and use their own weights; Dynamo sees a plain function, the same for all modules of a class; and what
others do to the class meanwhile (parametrize, FSDP2) stays as it is.
"""

from __future__ import annotations

import copy
import functools
import inspect
import threading
from abc import ABC, ABCMeta
from collections.abc import Callable
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.compiler import is_dynamo_compiling as compiling
from torch.fx import GraphModule

from gradoverride._core.calls.tracers import refuse_script
from gradoverride._core.calls.wrapper import wrapped
from gradoverride._core.in_force import everywhere
from gradoverride._core.in_force.layers import FunctionLayer, ModuleLayer
from gradoverride._core.overriding.chain import Subject
from gradoverride._core.overriding.record import ModuleTally, Record
from gradoverride._core.python import scan
from gradoverride._core.python.by_class import BASE, RECORD, once_per_class, standing
from gradoverride.errors import UnsupportedError

__all__ = ["base_of_class", "overridden", "written_methods"]

_lock = threading.RLock()


def overridden(base: Any) -> Any:
    """The class of modules of the class `base` that are overridden."""
    with _lock:  # one for all threads
        return _overridden(base)


@functools.cache
def _overridden(base: Any) -> Any:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        record = getattr(self, RECORD, None)  # of `__dict__` Dynamo would guard more
        if record is None:
            return base.forward(self, *args, **kwargs)
        if not compiling():
            record.tally.calls += 1
            for layer in record.counted:
                layer.tally.calls += 1
            if base.forward is not record.seen:
                record.refresh()
        return record.forward(self, *args, **kwargs)

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        given = base.__reduce_ex__(self, protocol)
        record = self.__dict__.get(RECORD)
        if isinstance(given, str):  # the name of a global, which has no rules
            raise _no_copy(base.__name__, "__reduce__", f"the name '{given}'")
        make, arguments, *rest = given
        make = base if make is cls else make
        arguments = tuple([base if one is cls else _bare(one) for one in arguments])
        if record is None:  # what another party has derived, or a slice of a Sequential: pickle would miss our class
            return _made, (make, arguments), *rest
        state, *rest = rest or (None,)
        return _make, (make, arguments, base.__name__), _State(_bare(state), record.layers, record.functions), *rest

    def __setstate__(self: Any, state: Any) -> None:
        if not isinstance(state, _State):
            base.__setstate__(self, state)
            return
        if state.of_base is not None:
            base.__setstate__(self, state.of_base)
        if RECORD not in self.__dict__:  # or a class has given the one module there is for its copy
            give(self, state)

    def __deepcopy__(self: Any, memo: Any) -> Any:
        copied = base.__deepcopy__(self, memo)
        return _given(self, copied, "__deepcopy__", lambda state: copy.deepcopy(state, memo))

    def __copy__(self: Any) -> Any:
        return _given(self, base.__copy__(self), "__copy__", lambda state: state)

    # Dynamo keeps what it has compiled by the code object, and of the ninth class that shares one it gives up.
    forward.__code__ = forward.__code__.replace()
    functools.update_wrapper(forward, base.forward, updated=())
    everywhere.derived_from[forward] = base

    def __prepare_scriptable__(self: Any) -> Any:
        record = self.__dict__.get(RECORD)
        if record is not None:
            who, rule = f"an overridden '{base.__name__}'", (*record.functions, *record.layers)[-1].rule.who
            refuse_script(who, rule, "script the model without the override")
        made = getattr(base, "__prepare_scriptable__", None)
        return self if made is None else made(self)

    def recompile(self: Any) -> Any:
        """Of a GraphModule: torch puts what it makes of the graph on `type(self)`, which is to be the module's own."""
        if type(self) is not cls:
            return base.recompile(self)
        object.__setattr__(self, "__class__", base)
        try:
            return base.recompile(self)
        finally:
            object.__setattr__(self, "__class__", cls)
            if RECORD in self.__dict__:
                self.__dict__[RECORD].refresh()

    body = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "__reduce_ex__": __reduce_ex__,
        "__setstate__": __setstate__,
        "__prepare_scriptable__": __prepare_scriptable__,
        "forward": forward,
        BASE: base,
        RECORD: None,  # or what looks it up where there is none would get to a `__getattr__` of the class
    }
    # `parametrize` gives its class these where there are none.
    body.update({fn.__name__: fn for fn in (__deepcopy__, __copy__) if hasattr(base, fn.__name__)})
    if issubclass(base, GraphModule):
        body["recompile"] = recompile
    body.update({name: _method(base, name) for name in written_methods(base)})
    cls = _derived(_between(base, body), body)
    return cls


def _between(base: Any, body: dict[str, Any]) -> Any:
    """What a class with this body is to be derived from, for `super(self.__class__, self)` to mean what it did.

    In a method of `base` that is the class after it, and would be `base` itself, without end, in one derived from it.
    So one more stands between, which passes on to what is after `base`. The methods in the body hide it from others.
    """
    passed_on = {}
    for name in scan.supers_of_own_class(base) & vars(base).keys():
        after = next((vars(cls)[name] for cls in base.__mro__[1:] if name in vars(cls)), None)
        if isinstance(after, FunctionType) and isinstance(vars(base)[name], FunctionType):
            passed_on[name] = _to_super(base, name)
            body.setdefault(name, _method(base, name))
    if not passed_on:
        return base
    return _derived(base, {"__module__": base.__module__, "__qualname__": base.__qualname__, BASE: base, **passed_on})


def _to_super(base: Any, name: str) -> Callable[..., Any]:
    return lambda self, *args, **kwargs: getattr(super(base, self), name)(*args, **kwargs)


def _method(base: Any, name: str) -> FunctionType:
    """That of `base`, under the rules for what it calls. It is looked up each time: somebody may replace it."""

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        record = getattr(self, RECORD, None)
        if record is None or record.scope is None:
            return getattr(base, name)(self, *args, **kwargs)
        return record.scope(getattr(base, name), self, *args, **kwargs)

    function: Any = method
    function.__code__ = method.__code__.replace()  # as that of `forward`
    return wrapped(function, getattr(base, name))


@once_per_class
def written_methods(base: Any) -> tuple[str, ...]:
    """The methods of a class of modules besides those that torch has written, which its own forwards alone call."""
    found = [name for name in dir(base) if not hasattr(nn.Module, name) and not name.startswith("__")]
    found.append("__call__")  # which somebody may have written around that of torch
    functions = [(name, standing(base, name)) for name in found]
    return tuple(
        name
        for name, function in functions
        if isinstance(function, FunctionType) and not _is_of_torch(inspect.unwrap(function))
    )


def _is_of_torch(function: Any) -> bool:
    """Whether torch has written this. (What a decorator of torch gives, as `torch.no_grad()`, is torch's own too.)"""
    return f"{getattr(function, '__globals__', {}).get('__name__')}.".startswith("torch.")


class _Quiet:
    """Keeps `__init_subclass__` of the classes behind it from being called."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        pass


class _QuietAbstract(ABC):  # noqa: B024
    """The same for classes that have ABC first: Python lays these out in another way."""

    __init_subclass__ = _Quiet.__dict__["__init_subclass__"]


def _derived(base: Any, body: dict[str, Any]) -> Any:
    """A class derived from `base` of which `base` and its metaclass are not told.

    What they do then is meant for classes that somebody writes: to enter them in a registry, to ask for keywords, to
    refuse them.
    """
    meta = type(base)
    new = ABCMeta.__new__ if issubclass(meta, ABCMeta) else type.__new__
    for quiet in (_Quiet, _QuietAbstract) if new is ABCMeta.__new__ else (_Quiet,):
        cls = new(meta, base.__name__, (quiet, base), body)
        try:
            type.__setattr__(cls, "__bases__", (base,))
        except TypeError:  # it is laid out in yet another way
            continue
        return cls
    return new(meta, base.__name__, (base,), body)


class _State(NamedTuple):
    """The state of a module in a copy or a pickle: what its class says, and the rules in force."""

    of_base: Any
    layers: tuple[ModuleLayer, ...]
    functions: tuple[FunctionLayer, ...]

    def __deepcopy__(self, memo: Any) -> _State:
        of_base = copy.deepcopy(self.of_base, memo)
        layers = tuple([layer.again(memo) for layer in self.layers])
        return _State(of_base, layers, copy.deepcopy(self.functions, memo))


def _bare(value: Any) -> Any:
    """Where this is the `__dict__` of an overridden module: without what is in force. That goes on its own."""
    return {name: one for name, one in value.items() if name != RECORD} if type(value) is dict else value


def _made(make: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """A module without rules."""
    return make(*arguments)


def _make(make: Callable[..., Any], arguments: tuple[Any, ...], name: str) -> Any:
    """A module that is about to be given rules, from what its class says how it is made."""
    return _of_ours(make(*arguments), name, "__reduce__")


def _of_ours(module: Any, name: str, by: str) -> Any:
    """A copy, of the class of modules that are overridden. A class may copy its modules in its own way."""
    if not isinstance(module, nn.Module) or isinstance(module, torch.jit.ScriptModule):
        raise _no_copy(name, by, f"a {type(module).__name__}")
    if not any(BASE in cls.__dict__ for cls in type(module).__mro__):
        if "forward" in module.__dict__:
            raise _no_copy(name, by, f"a '{type(module).__name__}' with another forward on the instance")
        object.__setattr__(module, "__class__", overridden(type(module)))
    return module


def give(module: nn.Module, state: _State) -> None:
    """Put on a copy what is in force on the module that it was made of."""
    layers = tuple([layer.again() for layer in state.layers])
    cls: Any = type(module)
    base = base_of_class(cls)
    subject, tally = Subject.of(base, module), ModuleTally(copied=True)
    module.__dict__[RECORD] = Record(subject, layers, state.functions, tally, of_copy=True)


def _given(module: nn.Module, copied: Any, by: str, again: Callable[[_State], _State]) -> Any:
    """A copy that the class of a module has made in its own way, with what is in force on the module."""
    record = module.__dict__.get(RECORD)
    if record is not None and copied is not module:
        record.tally.copied = True
        give(_of_ours(copied, record.subject.base.__name__, by), again(_State(None, record.layers, record.functions)))
    return copied


def _no_copy(name: str, by: str, kind: str) -> UnsupportedError:
    return UnsupportedError(
        f"override of a '{name}': a copy must be a module that runs the forward of its class, to keep the override; "
        f"{by} of its class gives {kind}. Copy the module without the override"
    )


@functools.cache
def base_of_class(cls: Any) -> Any:
    """Without ours: that may be beneath, where another party has derived from it, and serves again."""
    ours = next((one for one in cls.__mro__ if BASE in one.__dict__), None)
    return cls if ours is None or cls.forward is not ours.forward else ours.__dict__[BASE]
