"""A rule for what an import path names: put there now or when its module is imported, and again when that is loaded
again. A copy of a model, which has no handle, keeps it there as long as it lives.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from gradoverride._core.in_force.layers import FunctionLayer, FunctionRule
from gradoverride._core.overriding.path_patch import check_path, put_on_path, take_off_path
from gradoverride._core.python.paths import PENDING, find, when_imported
from gradoverride.errors import GradOverrideWarning

__all__ = ["follow", "is_class_of_modules", "kept_for_copies", "of_paths", "take_off_given_up"]

of_paths: list[FunctionLayer] = []
"""The rules for what paths name, now or when it is imported."""


def follow(
    path: str, layer: FunctionLayer, *, scoped: bool, on_class: Callable[[type], None] | None = None
) -> Callable[[], None]:
    """Put a rule on the function that a path names; if `scoped`, in modules that have the layer too. Gives what takes
    it off. `on_class` is called if it is a class of modules that is named.

    A module that is loaded again has another function there, which has the rule too: the one before, as well.
    """

    def put(value: Any) -> None:
        if not is_class_of_modules(value):
            check_path(path, value, layer.rule)
            put_on_path(path, layer, scoped=scoped)
        elif on_class is not None:
            on_class(value)
        else:
            warnings.warn(
                f"override of path '{path}': its module must be imported before a model is overridden, for it "
                f"names the class of modules '{value.__name__}'; nothing is overridden. Import it first",
                GradOverrideWarning,
                stacklevel=2,
            )

    def take_off() -> None:
        of_paths.remove(layer)
        call_off()
        take_off_path(layer)

    value = find(path)
    if value is not PENDING:
        put(value)
    call_off = when_imported(path, put)
    of_paths.append(layer)
    return take_off


def is_class_of_modules(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, nn.Module)


class _Kept:
    """A rule for what a path names, of copies of a model: on it as long as one of them has it."""

    def __init__(self, layer: FunctionLayer) -> None:
        take_off = follow(layer.key.name, layer.again(), scoped=True)
        weakref.finalize(self, _given_up.append, take_off).atexit = False


_kept: weakref.WeakValueDictionary[FunctionRule, _Kept] = weakref.WeakValueDictionary()
_given_up: list[Callable[[], None]] = []  # to be taken off: not when a copy goes, for that may be at any time
_lock = threading.RLock()


def kept_for_copies(layers: Iterable[FunctionLayer]) -> list[Any]:
    """What keeps the rules of a copy on what their paths name."""
    found: list[_Kept] = []
    with _lock:
        for layer in layers:
            if layer.of_path:
                found.append(_kept.get(layer.key) or _Kept(layer))
                _kept[layer.key] = found[-1]
    return found


def take_off_given_up() -> None:
    """Take off what no copy has any more."""
    with _lock:
        while _given_up:
            _given_up.pop()()
