"""A module while it is overridden: the only file that changes a module.

Its `__class__` becomes a class derived from its own, made once per class, whose `forward` looks up in the instance
which rules are in force and otherwise calls that of the base. So copies, pickles and replicas take the rules along and
use their own weights; Dynamo sees a plain function, the same for all modules of a class; what others do to the class
meanwhile (parametrize, FSDP2) stays as it is, and the module can be switched off beneath it.

What is in force is an immutable `Record` in the module's `__dict__`. It is replaced, never changed: copies share it.
"""

from __future__ import annotations

import copyreg
import functools
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.compiler import is_dynamo_compiling as compiling
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils.parametrize import is_parametrized

from gradoverride._core.plan import Plan
from gradoverride._core.signature import Forward, Rule, unknown_name
from gradoverride._core.targets import BASE
from gradoverride._core.wrapper import make_wrapper
from gradoverride.errors import RuleSignatureError, UnsupportedError

__all__ = ["Layer", "calls_under", "check", "has_forward", "layers_of", "put_on", "take_off"]

RECORD = "_gradoverride"
_new_object: Any = copyreg.__newobj__  # type: ignore[attr-defined]  # how objects without a recipe are pickled
_lock = threading.RLock()


class Layer:
    """One rule on a module, put there by one override."""

    __slots__ = ("path", "rule", "since", "target")

    def __init__(self, rule: Rule, path: str, target: str) -> None:
        self.rule = rule
        self.path = path
        self.target = target
        self.since = 0  # what the module's tally was

    def __reduce__(self) -> Any:
        return _layer_again, (self.rule.fn, self.path, self.target)


def _layer_again(rule: Callable[..., Any], path: str, target: str) -> Layer:
    return Layer(Rule(rule), path, target)


class Tally:
    """What has happened to a module while it was overridden."""

    __slots__ = ("calls", "copied")

    def __init__(self, copied: bool = False) -> None:
        self.calls = 0
        self.copied = copied


class Chain:
    """The forward of a class under rules, the last one outermost. Modules of a class under the same rules share it."""

    __slots__ = ("forward", "innermost", "traced")

    def __init__(self, base: Any, innermost: Any, rules: tuple[Rule, ...]) -> None:
        self.innermost = innermost  # the forward of the base, which somebody may replace
        self.forward = innermost
        self.traced = False  # whether it was compiled: calls of compiled code are not counted

        def on_trace() -> None:
            self.traced = True
            if base.forward is not innermost:
                raise UnsupportedError(
                    f"'{base.__name__}' must keep its 'forward' while one is overridden and compiled; it has been "
                    "replaced since. Override the module after that"
                )

        for rule in rules:
            plan = Plan(forward_of(base, self.forward), rule)
            plan.on_trace, plan.marked = on_trace, True
            self.forward = make_wrapper(plan, self.forward)


_chain = functools.lru_cache(maxsize=1024)(Chain)


def forward_of(base: Any, fn: Any = None) -> Forward:
    """The forward of a class of modules, or what stands for it, as a rule sees it."""
    return Forward(base.forward if fn is None else fn, name=base.__name__, method=True)


class Record:
    """What is in force on a module. It pickles as its layers."""

    __slots__ = ("base", "chain", "forward", "layers", "tally")

    def __init__(self, base: Any, layers: tuple[Layer, ...], tally: Tally) -> None:
        self.base = base
        self.layers = layers
        self.tally = tally
        self.chain = chain = _chain(base, base.forward, tuple([layer.rule for layer in layers]))
        self.forward = chain.forward  # as in `chain`, for each step on the way costs a guard in compiled code

    def __deepcopy__(self, memo: Any) -> Record:
        self.tally.copied = True
        layers = [Layer(layer.rule, layer.path, layer.target) for layer in self.layers]
        return Record(self.base, tuple(layers), Tally(copied=True))

    def __reduce__(self) -> Any:
        return _record_again, (self.base, self.layers)


def _record_again(base: type[nn.Module], layers: tuple[Layer, ...]) -> Record:
    return Record(base, layers, Tally())


@functools.cache
def overridden(base: Any) -> Any:
    """The class of modules of the class `base` that are overridden."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        record = self.__dict__.get(RECORD)
        if record is None:
            return base.forward(self, *args, **kwargs)
        if not compiling():
            record.tally.calls += 1
            if base.forward is not record.chain.innermost:
                record = Record(base, record.layers, record.tally)
        return record.forward(self, *args, **kwargs)

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        make, arguments, *rest = base.__reduce_ex__(self, protocol)
        if make is _new_object and arguments[0] is type(self):
            return _new, (base, *arguments[1:]), *rest
        return make, arguments, *rest

    body = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "__reduce_ex__": __reduce_ex__,
        "forward": functools.update_wrapper(forward, base.forward, updated=()),
        BASE: base,
    }
    return type(base)(base.__name__, (base,), body)


def _new(base: Any, *arguments: Any) -> Any:
    cls = overridden(base)
    return cls.__new__(cls, *arguments)


def layers_of(module: nn.Module) -> tuple[Layer, ...]:
    """The rules in force on a module, the last one outermost."""
    record = module.__dict__.get(RECORD)
    return () if record is None else record.layers


def check(module: nn.Module, path: str, rule: Rule) -> None:
    """Raise what is wrong with this rule for this module, before anything is changed."""
    who = f"override of '{path}', a '{type(module).__name__}'" if path else f"override of a '{type(module).__name__}'"
    if isinstance(module, (torch.jit.ScriptModule, torch.jit.ScriptFunction)):
        raise UnsupportedError(
            f"{who}: a module must run Python code to be overridden; it is a ScriptModule. Override the module before "
            "it is scripted, or its parent"
        )
    if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():
        raise UnsupportedError(
            f"{who}: a module must have its parameters to be overridden; it is lazy, and would drop the override when "
            "it gets them. Call the model once before"
        )
    if "forward" in module.__dict__:
        raise UnsupportedError(
            f"{who}: a module must have the forward of its class to be overridden; somebody has put another one on "
            "the instance, which would pass the override by. Override the module before that is done"
        )
    base = base_of(module)
    if not has_forward(module):
        raise UnsupportedError(f"{who}: a module must have a 'forward' to be overridden; it is a container only")
    try:
        wanted = _names_asked(base, base.forward, rule)
        if wanted:
            offered = _names_of(module)
            for name in wanted:
                if name not in offered:
                    raise unknown_name(rule, forward_of(base), name, offered)
    except RuleSignatureError as error:
        raise RuleSignatureError(f"{who}: {error}") from None


@functools.lru_cache(maxsize=1024)
def _names_asked(base: Any, innermost: Any, rule: Rule) -> tuple[str, ...]:
    """What the rule asks of a module of this class beyond the arguments of its forward. May raise for one of these."""
    plan = Plan(forward_of(base, innermost), rule)
    deferred = [name for name, source in plan.sources.items() if source == "deferred" and rule.asks[name]]
    return () if plan.hands_over else tuple(deferred)


def has_forward(module: nn.Module) -> bool:
    """Whether it can be called: `nn.ModuleList` cannot."""
    return isinstance(module, torch.jit.ScriptModule) or base_of(module).forward is not nn.Module.forward


def _names_of(module: nn.Module) -> list[str]:
    parametrized = getattr(module, "parametrizations", {})
    named = [name for name, _ in (*module.named_parameters(remove_duplicate=False), *module.named_buffers())]
    return [*parametrized, *named]


def base_of(module: nn.Module) -> Any:
    """The class that an override of this module is derived from: for a parametrized module that beneath its own."""
    record = module.__dict__.get(RECORD)
    if record is not None:
        return record.base
    cls: Any = _beneath(module)
    return cls.__dict__.get(BASE, cls)


def _beneath(module: nn.Module) -> Any:
    """`parametrize` gives each module a class of its own, and expects to find it on top."""
    cls = type(module)
    return cls.__bases__[0] if _is_parametrized_class(module) else cls


def _is_parametrized_class(module: nn.Module) -> bool:
    return is_parametrized(module) and type(module).__name__.startswith("Parametrized")


def put_on(module: nn.Module, layer: Layer) -> None:
    """Put a rule on a module, outside of those that it has."""
    with _lock:
        record = module.__dict__.get(RECORD)
        if record is None:
            base = base_of(module)
            module.__dict__[RECORD] = Record(base, (layer,), Tally())
            _derive(module, base, overridden(base))
        else:
            layer.since = record.tally.calls
            module.__dict__[RECORD] = Record(record.base, (*record.layers, layer), record.tally)


def calls_under(module: nn.Module, layer: Layer) -> int | None:
    """How often `module` was called under `layer`. None if that is not known: compiled code does not count."""
    record = module.__dict__.get(RECORD)
    if record is None or layer not in record.layers:
        return None
    return record.tally.calls - layer.since or (None if record.chain.traced else 0)


def take_off(module: nn.Module, layer: Layer) -> None:
    """Take a rule off a module. It may be gone already: `remove_overrides`."""
    with _lock:
        record = module.__dict__.get(RECORD)
        if record is None or layer not in record.layers:
            return
        left = tuple(other for other in record.layers if other is not layer)
        if left:
            module.__dict__[RECORD] = Record(record.base, left, record.tally)
        else:
            del module.__dict__[RECORD]
            _derive(module, overridden(record.base), record.base, record.tally.copied)


def _derive(module: nn.Module, before: Any, after: Any, copied: bool = False) -> None:
    """Put the class `after` where `before` is. Where others have derived from it, theirs stays as it is."""
    cls: Any = type(module)
    if cls is before:
        module.__class__ = after
    elif _is_parametrized_class(module) and cls.__bases__ == (before,) and not copied:
        cls.__bases__ = (after,)  # copies share a parametrized class
