"""What wrapt is here for: to find an attribute by its dotted path, and to hear of it when a module is imported.

wrapt takes 30 ms to import, and most programs need neither.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

__all__ = ["on_import", "resolve_path"]


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
