"""What wrapt is here for: to find an attribute by its dotted path, and to hear of it when a module is imported. What is
not: to hear of each time that it is, of `importlib.reload` too.

wrapt takes 30 ms to import, and most programs need neither.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any

__all__ = ["on_import", "on_load", "resolve_path"]


def resolve_path(module: ModuleType, attribute: str) -> tuple[Any, str, Any]:
    """The object that has it, its name there, and the value as it stands there: a staticmethod is one."""
    import wrapt

    try:
        found: tuple[Any, str, Any] = wrapt.resolve_path(module, attribute)
        return found
    except Exception as error:  # wrapt has had several classes for this
        raise AttributeError(attribute) from error


def on_import(name: str, then: Callable[[ModuleType], None]) -> None:
    """Call `then` with the module of this name when it is imported; now, if it has been. It is kept for good."""
    import wrapt

    wrapt.register_post_import_hook(then, name)


def on_load(name: str, then: Callable[[ModuleType], None]) -> Callable[[], None]:
    """Call `then` with the module of this name each time that its code has run: when it is imported, by
    `importlib.reload`, and when it is imported after it was taken out of `sys.modules`. Gives what calls that off.
    """
    waiting = (name, then)
    with _lock:
        _waiting.append(waiting)
        if _finder not in sys.meta_path:
            sys.meta_path.insert(0, _finder)

    def call_off() -> None:
        with _lock:
            if waiting in _waiting:
                _waiting.remove(waiting)
            if not _waiting and _finder in sys.meta_path:
                sys.meta_path.remove(_finder)

    return call_off


_lock = threading.RLock()
_waiting: list[tuple[str, Callable[[ModuleType], None]]] = []


class _Finder:
    """Is asked for each module before the finders there are: it asks these, and has itself told of one that it awaits.

    What loads the module is told so by an attribute that goes when it has: nobody is to find another loader later.
    """

    def __init__(self) -> None:
        self.asking: set[tuple[int, str]] = set()  # some finders ask all of them again

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        asked = threading.get_ident(), name
        if asked in self.asking or all([awaited != name for awaited, _ in _waiting]):
            return None
        self.asking.add(asked)
        try:
            others = [finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec")]
            found: Any = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
        finally:
            self.asking.remove(asked)
        if found is not None and hasattr(found.loader, "exec_module"):
            _tell_when_it_has_run(found.loader, name)
        return found


_finder = _Finder()


def _tell_when_it_has_run(loader: Any, name: str) -> None:
    run = loader.exec_module

    def exec_module(module: ModuleType) -> None:
        vars(loader).pop("exec_module", None)
        try:
            run(module)
        finally:
            for awaited, then in [*_waiting]:
                if awaited == name:
                    then(module)

    if not isinstance(loader, type) and hasattr(loader, "__dict__"):  # a built-in module, whose code is not run again
        loader.exec_module = exec_module
