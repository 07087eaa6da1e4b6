"""What the rules of an override have missed, though they ran elsewhere: told of when they are taken off."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Mapping, Set
from types import MethodType
from typing import Any

from torch import nn

from gradoverride._core.binding.rule import Rule
from gradoverride._core.in_force import everywhere
from gradoverride._core.in_force.layers import Layer
from gradoverride._core.in_force.targets import class_of
from gradoverride._core.overriding.overridden import has_another_forward, layers_of
from gradoverride._core.python.by_class import BASE
from gradoverride._core.python.scan import python_function, reads_only

__all__ = ["only_read", "passed_by"]


def passed_by(modules: Mapping[str, nn.Module], layers: Iterable[Layer]) -> dict[Layer, str]:
    """The rules of modules that somebody has meanwhile given a forward, or a class, that leads past them, and how."""
    found: dict[Layer, str] = {}
    for layer in layers:
        module = modules.get(layer.path)
        if module is None or layer not in layers_of(module):
            continue
        where = f" at '{layer.path}'" if layer.path else ""
        if not any(BASE in vars(cls) for cls in type(module).__mro__):
            found[layer] = (
                f"is passed by{where}; somebody has given the module another class. Do that before the override, or "
                "derive that class from the one that it has"
            )
        elif _leads_past(module):
            found[layer] = (
                f"is passed by{where}; somebody has put another forward on the instance, which does not call that "
                "of its class. Replace it before the override, or have it call the forward that it replaces"
            )
    return found


def _leads_past(module: nn.Module) -> bool:
    """Whether a forward on this overridden module does not call ours. One that does has taken ours from the module
    before, and holds it somewhere.
    """
    if not has_another_forward(module):
        return False
    bound = [one for one in gc.get_referrers(module) if type(one) is MethodType and one.__self__ is module]
    called: list[Any] = [python_function(module.__dict__["forward"]), *[one.__func__ for one in bound]]
    return not any(one in everywhere.derived_from for one in called)


def only_read(modules: Mapping[str, nn.Module], called: Mapping[Layer, bool], ran: Set[Rule]) -> dict[Layer, str]:
    """The places of rules that `ran`, but not at a module whose parameters the one around it reads, and cannot call.
    Of those that are alike, as in equal blocks, the first.
    """
    found: dict[tuple[Rule, type, str], list[Layer]] = {}
    for layer in [layer for layer, was in called.items() if not was and layer.rule in ran]:
        path, _, name = layer.path.rpartition(".")
        module = modules.get(layer.path)
        if module is None or layer not in layers_of(module):
            continue
        around = modules[path]
        ruled = any(called.get(own) for own in layers_of(around))
        if not ruled and reads_only(class_of(around), name, module._parameters, nn.Module):
            found.setdefault((layer.rule, class_of(around), name), []).append(layer)
    return {
        layers[0]: f"does not reach '{layers[0].path}'{f' and {len(layers) - 1} more' if len(layers) > 1 else ''}; the "
        f"'{around.__name__}' around it reads its parameters and does not call it. Override the module around it"
        for (_, around, _), layers in found.items()
    }
