"""A module while it is overridden: the only file that changes a module.

Its `__class__` becomes a class derived from its own, made once per class, whose `forward` looks up in the instance
which rules are in force and otherwise calls that of the base. So copies, pickles and replicas take the rules along and
use their own weights; Dynamo sees a plain function, the same for all modules of a class; what others do to the class
meanwhile (parametrize, FSDP2) stays as it is, and the module can be switched off beneath it.

What is in force is an immutable `Record` in the module's `__dict__`. It is replaced, never changed: copies share it.
"""

from __future__ import annotations

import copy
import functools
import threading
import weakref
from abc import ABC, ABCMeta
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.compiler import is_dynamo_compiling as compiling
from torch.fx import GraphModule
from torch.nn.modules.lazy import LazyModuleMixin

from gradoverride._core import everywhere
from gradoverride._core.chain import chain_of, forward_of, links
from gradoverride._core.functions import calls_that_are, is_of_torch
from gradoverride._core.layers import FunctionLayer, Layer
from gradoverride._core.plan import Plan
from gradoverride._core.signature import Rule, unknown_name
from gradoverride._core.tally import Tally
from gradoverride._core.targets import BASE, RECORD, class_of
from gradoverride._core.tracers import refuse_script
from gradoverride.errors import RuleSignatureError, UnsupportedError

__all__ = [
    "awaits_replay",
    "base_of",
    "calls_under",
    "check",
    "check_order",
    "check_rule",
    "functions_called",
    "functions_of",
    "has_forward",
    "layers_of",
    "put_on",
    "records",
    "take_off",
]

_lock = threading.RLock()


class ModuleTally(Tally):
    """The calls of a module, and what else has happened to it, while it was overridden."""

    __slots__ = ("copied", "traced")

    def __init__(self, copied: bool = False) -> None:
        super().__init__()
        self.copied = copied
        self.traced = False  # whether it was compiled under rules that have changed since


class Record:
    """What is in force on a module. It pickles as its layers."""

    __slots__ = (
        *("__weakref__", "base", "chain", "counted", "forward", "functions", "layers", "leaf", "plain"),
        *("seen", "tally"),
    )

    def __init__(
        self,
        base: Any,
        layers: tuple[Layer, ...],
        functions: tuple[FunctionLayer, ...],
        tally: ModuleTally,
        leaf: bool,
        plain: bool,
    ) -> None:
        self.base = base
        self.layers = layers
        self.functions = functions
        self.tally = tally
        self.leaf = leaf
        self.plain = plain
        self.refresh()
        records.add(self)

    def refresh(self) -> None:
        """Look again at what is in force everywhere, and at the forward of the class."""
        base = self.base
        self.seen = base.forward
        found = links(base, self.layers, self.functions, leaf=self.leaf, plain=self.plain)
        self.counted = found.counted
        self.chain = chain_of(base, found)
        self.forward = self.chain.forward  # as in `chain`, for each step on the way costs a guard in compiled code

    def but(self, layers: tuple[Layer, ...], functions: tuple[FunctionLayer, ...]) -> Record:
        """The same with these layers instead."""
        self.tally.traced |= self.chain.traced
        return Record(self.base, layers, functions, self.tally, self.leaf, self.plain)

    def __deepcopy__(self, memo: Any) -> Record:
        self.tally.copied = True
        layers = tuple([layer.again() for layer in self.layers])
        return Record(
            self.base, layers, copy.deepcopy(self.functions, memo), ModuleTally(copied=True), self.leaf, self.plain
        )

    def __reduce__(self) -> Any:
        return _record_again, (self.base, self.layers, self.functions, self.leaf, self.plain)


records: weakref.WeakSet[Record] = weakref.WeakSet()


def _record_again(
    base: type[nn.Module], layers: tuple[Layer, ...], functions: tuple[FunctionLayer, ...], leaf: bool, plain: bool
) -> Record:
    return Record(base, layers, functions, ModuleTally(), leaf, plain)


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
            if record is not None:
                raise _no_copy(base.__name__, "__reduce__", f"the name '{given}'")
            return given
        make, arguments, *rest = given
        make = base if make is cls else make
        arguments = tuple([base if one is cls else _bare(one) for one in arguments])
        if record is None:
            return make, arguments, *rest
        state, *rest = rest or (None,)
        return _make, (make, arguments, base.__name__), _State(_bare(state), record.layers, record.functions), *rest

    def __setstate__(self: Any, state: Any) -> None:
        if not isinstance(state, _State):
            base.__setstate__(self, state)
            return
        if state.of_base is not None:
            base.__setstate__(self, state.of_base)
        _give(self, state)

    def __deepcopy__(self: Any, memo: Any) -> Any:
        copied = base.__deepcopy__(self, memo)
        return _given(self, copied, "__deepcopy__", lambda state: copy.deepcopy(state, memo))

    def __copy__(self: Any) -> Any:
        return _given(self, base.__copy__(self), "__copy__", lambda state: state)

    functools.update_wrapper(forward, base.forward, updated=())
    everywhere.derived_from[forward] = base

    def __prepare_scriptable__(self: Any) -> Any:
        record = self.__dict__.get(RECORD)
        if record is not None and record.layers:
            who, rule = f"an overridden '{base.__name__}'", record.layers[-1].rule.who
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
    cls = _derived(base, body)
    return cls


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
    layers: tuple[Layer, ...]
    functions: tuple[FunctionLayer, ...]

    def __deepcopy__(self, memo: Any) -> _State:
        return _State(copy.deepcopy(self.of_base, memo), self.layers, copy.deepcopy(self.functions, memo))


def _bare(value: Any) -> Any:
    """Where this is the `__dict__` of an overridden module: without what is in force. That goes on its own."""
    return {name: one for name, one in value.items() if name != RECORD} if type(value) is dict else value


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


def _give(module: nn.Module, state: _State) -> None:
    """Put on a copy what is in force on the module that it was made of."""
    layers = tuple([layer.again() for layer in state.layers])
    leaf, plain = not module._modules, not module._parameters
    cls: Any = type(module)
    module.__dict__[RECORD] = Record(
        _base_of_class(cls), layers, state.functions, ModuleTally(copied=True), leaf, plain
    )


def _given(module: nn.Module, copied: Any, by: str, again: Callable[[_State], _State]) -> Any:
    """A copy that the class of a module has made in its own way, with what is in force on the module."""
    record = module.__dict__.get(RECORD)
    if record is not None and copied is not module:
        record.tally.copied = True
        _give(_of_ours(copied, record.base.__name__, by), again(_State(None, record.layers, record.functions)))
    return copied


def _no_copy(name: str, by: str, kind: str) -> UnsupportedError:
    return UnsupportedError(
        f"override of a '{name}': a copy must be a module that runs the forward of its class, to keep the override; "
        f"{by} of its class gives {kind}. Copy the module without the override"
    )


def layers_of(module: nn.Module) -> tuple[Layer, ...]:
    """The rules in force on a module, the last one outermost."""
    record = module.__dict__.get(RECORD)
    return () if record is None else record.layers


def functions_of(module: nn.Module) -> tuple[FunctionLayer, ...]:
    """The rules in force for functions of torch that are called in a module."""
    record = module.__dict__.get(RECORD)
    return () if record is None else record.functions


def check(module: nn.Module, path: str) -> None:
    """Raise what is in the way of an override of this module, before anything is changed."""
    obstacle = _obstacle(module)
    if obstacle:
        raise UnsupportedError(f"{_who(module, path)}: a module must {obstacle}")


def _obstacle(module: nn.Module) -> str:
    if isinstance(module, (torch.jit.ScriptModule, torch.jit.ScriptFunction)):
        return (
            "run Python code to be overridden; it is a ScriptModule. Override the module before it is scripted, or its "
            "parent"
        )
    if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():
        return (
            "have its parameters to be overridden; it is lazy, and would drop the override when it gets them. Call the "
            "model once before"
        )
    if "forward" in module.__dict__:
        return (
            "have the forward of its class to be overridden; somebody has put another one on the instance, which would "
            "pass the override by. Override the module before that is done"
        )
    if not has_forward(module):
        return "have a 'forward' to be overridden; it is a container only"
    other = everywhere.no_method(base_of(module))
    return f"have a method 'forward' to be overridden; it has {other}" if other else ""


def check_rule(module: nn.Module, path: str, rule: Rule) -> None:
    """Raise what is wrong with this rule for this module, before anything is changed."""
    base = base_of(module)
    try:
        wanted = _names_asked(base, everywhere.bare_forward(base), rule)
        if wanted:
            offered = _names_of(module)
            for name in wanted:
                if name not in offered:
                    raise unknown_name(rule, forward_of(base), name, offered)
    except RuleSignatureError as error:
        raise RuleSignatureError(f"{_who(module, path)}: {error}") from None


def check_order(module: nn.Module, added: Sequence[Layer | FunctionLayer]) -> None:
    """Raise if these cannot be put on it as they should be: outside of what is there."""
    if not added or not (RECORD in module.__dict__ or everywhere.classes or everywhere.functions):
        return
    links(
        base_of(module),
        (*layers_of(module), *[layer for layer in added if isinstance(layer, Layer)]),
        (*functions_of(module), *[layer for layer in added if isinstance(layer, FunctionLayer)]),
        leaf=not module._modules,
        plain=not module._parameters,
    )


def functions_called(module: nn.Module) -> frozenset[str] | None:
    """The functions of torch that a module may call and have rules for, by name. None: it may call any."""
    if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():
        return frozenset()
    if "forward" in module.__dict__ or not has_forward(module):
        return frozenset()
    base = base_of(module)
    if everywhere.no_method(base):
        return frozenset()
    return calls_that_are(base) if is_of_torch(base) and not module._modules else None


def _who(module: nn.Module, path: str) -> str:
    kind = class_of(module).__name__
    return f"override of '{path}', a '{kind}'" if path else f"override of a '{kind}'"


def _names_asked(base: Any, innermost: Any, rule: Rule) -> tuple[str, ...]:
    """What the rule asks of a module of this class beyond the arguments of its forward. May raise for one of these."""
    return rule.once((_names_asked, base, innermost), lambda: _asked(base, innermost, rule))


def _asked(base: Any, innermost: Any, rule: Rule) -> tuple[str, ...]:
    plan = Plan(forward_of(base, innermost), rule)
    deferred = [name for name, source in plan.sources.items() if source == "deferred" and plan.rule.asks[name]]
    return () if plan.hands_over else tuple(deferred)


def has_forward(module: nn.Module) -> bool:
    """Whether it can be called: `nn.ModuleList` cannot."""
    if isinstance(module, torch.jit.ScriptModule) or "forward" in module.__dict__:
        return True
    return base_of(module).forward is not nn.Module.forward


def _names_of(module: nn.Module) -> list[str]:
    parametrized = getattr(module, "parametrizations", {})
    named = [name for name, _ in (*module.named_parameters(remove_duplicate=False), *module.named_buffers())]
    return [*parametrized, *named]


def base_of(module: nn.Module) -> Any:
    """The class that an override of this module is derived from: for a parametrized module that beneath its own."""
    record = module.__dict__.get(RECORD)
    if record is not None:
        return record.base
    cls: Any = _beneath(module) if "parametrizations" in module._modules else type(module)
    return _base_of_class(cls)


@functools.cache
def _base_of_class(cls: Any) -> Any:
    """Without ours: that may be beneath, where another party has derived from it, and serves again."""
    ours = next((one for one in cls.__mro__ if BASE in one.__dict__), None)
    return cls if ours is None or cls.forward is not ours.forward else ours.__dict__[BASE]


def _beneath(module: nn.Module) -> Any:
    """`parametrize` gives each module a class of its own, and expects to find it on top."""
    cls = type(module)
    return cls.__bases__[0] if _is_parametrized_class(module) else cls


def _is_parametrized_class(module: nn.Module) -> bool:
    # `is_parametrized` asks by `hasattr`, which for a module that is none takes 2 us.
    return "parametrizations" in module._modules and type(module).__name__.startswith("Parametrized")


def put_on(module: nn.Module, added: Sequence[Layer | FunctionLayer]) -> None:
    """Put rules on a module, outside of those that it has, and for functions that it calls."""
    with _lock:
        record = module.__dict__.get(RECORD)
        layers: tuple[Layer, ...] = ()
        functions: tuple[FunctionLayer, ...] = ()
        if record is not None:
            layers, functions = record.layers, record.functions
        for layer in added:
            if isinstance(layer, FunctionLayer):
                functions = (*functions, layer)
            else:
                layer.since = 0 if record is None else record.tally.calls
                layers = (*layers, layer)
        if record is not None:
            module.__dict__[RECORD] = record.but(layers, functions)
        else:
            base = base_of(module)
            leaf, plain = not module._modules, not module._parameters
            module.__dict__[RECORD] = Record(base, layers, functions, ModuleTally(), leaf, plain)
            _derive(module, base, overridden(base))


def calls_under(module: nn.Module, layer: Layer) -> int | None:
    """How often `module` was called under `layer`. None if that is not known: compiled code does not count."""
    record = module.__dict__.get(RECORD)
    if record is None or layer not in record.layers:
        return None
    return record.tally.known(traced=record.tally.traced or record.chain.traced, since=layer.since)


def awaits_replay(module: nn.Module) -> bool:
    """Whether a reentrant checkpoint is still to run `module` again."""
    record = module.__dict__.get(RECORD)
    return record is not None and record.tally.awaits_replay


def take_off(module: nn.Module, gone: Sequence[Layer | FunctionLayer]) -> None:
    """Take rules off a module. They may be gone already: `remove_overrides`."""
    with _lock:
        record = module.__dict__.get(RECORD)
        if record is None:
            return
        layers = tuple([layer for layer in record.layers if layer not in gone])
        functions = tuple([layer for layer in record.functions if layer not in gone])
        if len(layers) == len(record.layers) and len(functions) == len(record.functions):
            return
        if layers or functions:
            module.__dict__[RECORD] = record.but(layers, functions)
        else:
            del module.__dict__[RECORD]
            _derive(module, overridden(record.base), record.base, record.tally.copied)


def _derive(module: nn.Module, before: Any, after: Any, copied: bool = False) -> None:
    """Put the class `after` where `before` is. Where others have derived from it, theirs stays as it is."""
    cls: Any = type(module)
    if cls is before:
        object.__setattr__(module, "__class__", after)  # that of modules looks parameters up before
    elif _is_parametrized_class(module) and cls.__bases__ == (before,) and not copied:
        cls.__bases__ = (after,)  # copies share a parametrized class
