"""A module while it is overridden: what is in the way, how rules are put on it, and how they are taken off.

It gets a class derived from its own (`overridden_class.py`) and, in its `__dict__`, what is in force (`record.py`).
Without the class the module is as it was; where others have derived from it, the class stays beneath and does nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

from gradoverride._core.binding.rule import Rule
from gradoverride._core.binding.signature import unknown_name
from gradoverride._core.calls.plan import Plan
from gradoverride._core.in_force import everywhere
from gradoverride._core.in_force.layers import FunctionLayer, Layer, ModuleLayer
from gradoverride._core.in_force.targets import class_of
from gradoverride._core.overriding.chain import Subject, forward_of, links
from gradoverride._core.overriding.overridden_class import base_of_class, overridden, written_methods
from gradoverride._core.overriding.record import ModuleTally, Record
from gradoverride._core.python.by_class import BASE, RECORD, standing
from gradoverride._core.torch_functions.callers import may_call
from gradoverride.errors import RuleSignatureError, UnsupportedError

__all__ = [
    "base_of",
    "check",
    "check_order",
    "check_rule",
    "functions_called",
    "functions_of",
    "has_another_forward",
    "has_forward",
    "layers_of",
    "put_on",
    "take_off",
]

_lock = threading.RLock()


def layers_of(module: nn.Module) -> tuple[ModuleLayer, ...]:
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
    if has_another_forward(module):
        return (
            "have the forward of its class to be overridden; somebody has put another one on the instance, which would "
            "pass the override by. Override the module before that is done, or undo it and do it again afterwards"
        )
    if not has_forward(module):
        return "have a 'forward' to be overridden; it is a container only"
    if standing(type(module), "__class__") is not vars(object)["__class__"]:
        return "say itself which class it is of, for another to be put in its place; its class has its own '__class__'"
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


def check_order(module: nn.Module, added: Sequence[Layer]) -> None:
    """Raise if these cannot be put on it as they should be: outside of what is there."""
    if not added or not (RECORD in module.__dict__ or everywhere.classes or everywhere.functions):
        return
    links(
        Subject.of(base_of(module), module),
        (*layers_of(module), *[layer for layer in added if not isinstance(layer, FunctionLayer)]),
        (*functions_of(module), *[layer for layer in added if isinstance(layer, FunctionLayer)]),
    )


def functions_called(module: nn.Module) -> frozenset[str] | None:
    """The functions of torch that a module may call and have rules for, by name. None: it may call any."""
    if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():
        return frozenset()
    if has_another_forward(module):
        return frozenset()
    base = base_of(module)
    if everywhere.no_method(base):
        return frozenset()
    if written_methods(base):
        return None
    if base.forward is nn.Module.forward:
        return frozenset()
    return None if module._modules else may_call(base)


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


def has_another_forward(module: nn.Module) -> bool:
    """Whether there is one on the instance that passes ours by, or would: that of its class can be put away."""
    forward = module.__dict__.get("forward")
    if type(forward) is not MethodType or forward.__self__ is not module:
        return forward is not None
    base = base_of(module)
    own = forward.__func__ is base.forward and RECORD not in module.__dict__
    return not own and everywhere.derived_from.get(forward.__func__) is not base


def _names_of(module: nn.Module) -> list[str]:
    parametrized = getattr(module, "parametrizations", {})
    named = [name for name, _ in (*module.named_parameters(remove_duplicate=False), *module.named_buffers())]
    return [*parametrized, *named]


def base_of(module: nn.Module) -> Any:
    """The class that an override of this module is derived from: for a parametrized module that beneath its own."""
    record = module.__dict__.get(RECORD)
    if record is not None:
        return record.subject.base
    cls: Any = type(module)
    return base_of_class(cls.__bases__[0] if _is_parametrized_class(module) else cls)


def _is_parametrized_class(module: nn.Module) -> bool:
    """Whether `parametrize` has given it a class of its own, which it expects to find on top."""
    # `is_parametrized` asks by `hasattr`, which for a module that is none takes 2 us.
    return "parametrizations" in module._modules and type(module).__name__.startswith("Parametrized")


def put_on(module: nn.Module, added: Sequence[Layer]) -> None:
    """Put rules on a module, outside of those that it has, and for functions that it calls."""
    with _lock:
        record = module.__dict__.get(RECORD)
        layers, functions = layers_of(module), functions_of(module)
        for layer in added:
            if isinstance(layer, ModuleLayer):
                layer.since = 0 if record is None else record.tally.calls
                layers = (*layers, layer)
            elif isinstance(layer, FunctionLayer):
                functions = (*functions, layer)
        if record is not None:
            module.__dict__[RECORD] = record.but(layers, functions)
            record.leave()
        else:
            base = base_of(module)
            derived = overridden(base)  # a metaclass may refuse it: before anything is changed
            subject, tally = Subject.of(base, module), ModuleTally()
            tally.forward = module.__dict__.pop("forward", None)
            module.__dict__[RECORD] = Record(subject, layers, functions, tally)
            _derive(module, base, derived)


def take_off(module: nn.Module, gone: Sequence[Layer]) -> None:
    """Take rules off a module. They may be gone already: `remove_overrides`."""
    with _lock:
        record = module.__dict__.get(RECORD)
        if record is None:
            # Ours may be there still: another party has put back what it had found, or made a slice of a `Sequential`.
            cls: Any = type(module)
            if BASE in cls.__dict__:
                _derive(module, cls, base_of_class(cls))
            return
        for layer in record.layers:
            if layer in gone:
                layer.count_by(None)
        layers = tuple([layer for layer in record.layers if layer not in gone])
        functions = tuple([layer for layer in record.functions if layer not in gone])
        if layers or functions:
            module.__dict__[RECORD] = record.but(layers, functions)
        else:
            del module.__dict__[RECORD]
            base = record.subject.base
            _derive(module, overridden(base), base, record.tally.copied)
            if record.tally.forward is not None:
                module.__dict__.setdefault("forward", record.tally.forward)
        record.leave()


def _derive(module: nn.Module, before: Any, after: Any, copied: bool = False) -> None:
    """Put the class `after` where `before` is. Where others have derived from it, theirs stays as it is."""
    cls: Any = type(module)
    if cls is before:
        object.__setattr__(module, "__class__", after)  # that of modules looks parameters up before
    elif _is_parametrized_class(module) and cls.__bases__ == (before,) and not copied:
        cls.__bases__ = (after,)  # copies share a parametrized class
