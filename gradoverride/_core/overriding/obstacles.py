"""What is in the way of an override as a whole, seen before anything is changed: calls that no rule would reach, and
two rules for one call. What is in the way at one module, `overridden.py` says, and at a class `class_patch.py`.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from types import FunctionType
from typing import Any

from torch import nn

from gradoverride._core.binding.rule import Rule
from gradoverride._core.in_force import everywhere
from gradoverride._core.in_force.layers import FunctionLayer
from gradoverride._core.in_force.targets import Class, Entry, Function, ImportPath, class_of
from gradoverride._core.overriding.overridden import check, has_forward
from gradoverride._core.overriding.scripted import (
    called_in,
    is_scripted,
    name_of_scripted,
    scripted_callers,
    scripted_in,
)
from gradoverride._core.python.paths import find
from gradoverride.errors import GradOverrideWarning, UnsupportedError

__all__ = ["check_calls", "check_forwards", "check_scripted", "warn_of_made", "warn_of_scripted"]


def check_scripted(entries: Sequence[Entry], modules: Mapping[str, nn.Module]) -> None:
    """Raise if a class names modules that were scripted: they have another class now, and would be passed by."""
    classes = [target for entry in entries for target in entry.targets if isinstance(target, Class)]
    for path, module in modules.items() if classes else ():
        if is_scripted(module) and any(target.name_of_scripted(module) for target in classes):
            raise UnsupportedError(
                f"override of '{path}', a scripted '{module.original_name}': a module must run Python code to be "
                "overridden; it is a ScriptModule. Override the model before it is scripted, or name the modules to be "
                "overridden by a glob"
            )


def check_calls(
    model: nn.Module, modules: Mapping[str, nn.Module], called: Sequence[tuple[Function | ImportPath, Rule]]
) -> None:
    """Raise if calls of functions in this model cannot be seen."""
    if has_forward(model) and not is_scripted(model):
        check(model, "")
    names = [str(target.name) for target, _ in called if isinstance(target, Function)]
    by_path = [str(target.name) for target, _ in called if isinstance(target, ImportPath)]  # nothing tells of these
    seen: set[Any] = set()
    for path, module in modules.items():
        for where, scripted in scripted_in(module, seen):
            found = [*by_path, *called_in(scripted, names)]
            if found:
                owner = f"'{path}'" if path else f"a '{class_of(model).__name__}'"
                raise UnsupportedError(
                    f"override of {owner}: a module must run Python code for the functions that it calls to be "
                    f"overridden, '{found[0]}' among them; {where} is a {type(scripted).__name__}, which runs none. "
                    "Override modules of the model that have none within"
                )


def check_forwards(
    called: Sequence[tuple[Function | ImportPath, Rule]], ruled: Iterable[tuple[Any, Sequence[Any]]]
) -> None:
    """Raise if a path names the forward of modules that have a rule of this override, or of one before, themselves:
    theirs is another rule for the same call, and that of the path would be within it.
    """
    found = [(target, find(target.value)) for target, _ in called if isinstance(target, ImportPath)]
    paths = [(target, everywhere.originals.get(fn, fn)) for target, fn in found if isinstance(fn, FunctionType)]
    for cls, layers in ruled if paths else ():
        for target, value in paths:
            own = next((layer for layer in layers if not isinstance(layer, FunctionLayer)), None)
            if own is not None and type(cls.forward) is FunctionType and value is everywhere.bare_forward(cls):
                raise UnsupportedError(
                    f"override of {target.text}: a call must have one rule of each override, the later one "
                    f"outside; this is the forward of a '{cls.__name__}', which has the rule {own.rule.who} by the "
                    f"{own.target}, and would stay inside. Give the class as the target of both"
                )


def warn_of_scripted(names: Collection[str]) -> None:
    """Tell of TorchScript, where functions keep their own gradient."""
    if not names or not scripted_callers(names):
        return
    gc.collect()  # it may be garbage
    _warn_of_callers(scripted_callers(names))


def warn_of_made(scripted: Any, names: Collection[str]) -> None:
    """The same of what is made now."""
    called = called_in(scripted, names) if is_scripted(scripted) else []
    _warn_of_callers({name_of_scripted(scripted): name for name in called[:1]})


def _warn_of_callers(found: Mapping[str, str]) -> None:
    if found:
        warnings.warn(
            f"override of function '{next(iter(found.values()))}': what calls it must run Python code for it to be "
            f"overridden; there is scripted or traced code that calls it and keeps its own gradient: "
            f"{', '.join([repr(name) for name in found])}. Leave it in Python, or compile it with torch.compile",
            GradOverrideWarning,
            stacklevel=5,
        )
