"""What is found out about a class once, and kept as long as the class is.

torch makes a class for each parametrized module, and that class holds the module: what kept it, as `functools.cache`
does, would keep the parameters of a model that is gone.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from types import CodeType
from typing import Any, TypeVar

__all__ = ["BASE", "RECORD", "all_standing", "named_in", "once_per_class", "standing"]

RECORD = "_gradoverride"  # the attribute of a module that says what is in force on it
BASE = "_gradoverride_base"  # a class that stands in for another while it is overridden has it under this name

T = TypeVar("T")


def standing(cls: Any, name: str) -> Any:
    """What stands in a class under this name, be it that of a base; None if nothing does.

    As `inspect.getattr_static` says. That Dynamo takes up where a graph breaks, and warns of the cache within.
    """
    return next((vars(base)[name] for base in cls.__mro__ if name in vars(base)), None)


def all_standing(cls: Any, name: str) -> list[Any]:
    """The same, and what stands behind it, which `super()` gives."""
    return [vars(base)[name] for base in cls.__mro__ if name in vars(base)]


def named_in(code: CodeType, cls: Any, name: str) -> list[Any]:
    """What `code` may mean by this attribute of a `cls`: by `super()` also what stands there behind another."""
    return all_standing(cls, name) if "super" in code.co_names else [standing(cls, name)]


def once_per_class(find: Callable[[Any], T]) -> Callable[[Any], T]:
    """`find`, a function of a class that runs once for each. What it gives must not hold the class."""
    found: weakref.WeakKeyDictionary[Any, T] = weakref.WeakKeyDictionary()

    @functools.wraps(find)
    def of(cls: Any) -> T:
        try:
            return found[cls]
        except KeyError:
            return found.setdefault(cls, find(cls))

    return of
