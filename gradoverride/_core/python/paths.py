"""What an import path names, `"package.module:attribute"`: now, or when its module is imported."""

from __future__ import annotations

import difflib
import importlib.util
import sys
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

from torch.autograd import Function

from gradoverride._core.python.imports import on_load, resolve_path
from gradoverride.errors import GradOverrideError, GradOverrideWarning, TargetError, TargetNotFoundError

__all__ = ["PENDING", "find", "parts_of", "place_of", "way_to_apply", "when_imported"]

PENDING = object()
"""What a path names whose module has not been imported yet."""


def find(path: str) -> Any:
    """What the path names: a class, a function; `PENDING` while its module has not been imported."""
    module_name, attribute = parts_of(path)
    module = sys.modules.get(module_name)
    if module is None:
        _check_module(module_name, path)
        return PENDING
    try:
        return resolve_path(module, attribute)[2]
    except AttributeError:
        owner: Any = module
        parts = attribute.split(".")
        there = 0
        while there < len(parts) - 1 and hasattr(owner, parts[there]):
            owner = getattr(owner, parts[there])
            there += 1
        names = [name for name in dir(owner) if not name.startswith("__")]
        close = difflib.get_close_matches(parts[there], names, n=3, cutoff=0.5)
        hint = (
            f"The closest names are {', '.join(map(repr, close))}"
            if close
            else f"None of its {len(names)} names is like it"
        )
        raise TargetNotFoundError(
            f"override of path '{path}': the module '{module_name}' must have '{'.'.join(parts[: there + 1])}'; it has "
            f"not. {hint}"
        ) from None


def place_of(path: str) -> Any:
    """What is the same for two paths that name one function."""
    module_name, attribute = parts_of(path)
    module = sys.modules.get(module_name)
    if module is None:
        return path
    parent, name, value = resolve_path(module, attribute)
    return (parent, name) if isinstance(parent, type) else id(value)  # a class may have it from another


def parts_of(path: str) -> tuple[str, str]:
    """The module's name, and the attribute's, with dots for one of a class."""
    module_name, _, attribute = path.partition(":")
    if not all(part.isidentifier() for part in (*module_name.split("."), *attribute.split("."))):
        raise TargetError(
            "an import path as a target reads 'package.module:attribute', or 'package.module:Class.attribute'; got "
            f"'{path}'. {_OR_A_GLOB}"
        )
    return module_name, attribute


def way_to_apply(value: Any) -> str:
    """What to say of an `autograd.Function` where it is no target."""
    if not (isinstance(value, type) and issubclass(value, Function)):
        return ""
    if "<locals>" in value.__qualname__:
        return ". Override the module that calls its apply"
    return f". Give the path of its apply: '{value.__module__}:{value.__qualname__}.apply'"


_OR_A_GLOB = "(In a glob over the names of a model's modules, write '?' for a colon)"


def _check_module(name: str, path: str) -> None:
    """Raise if there is no module of this name, as far as that can be known without importing its packages."""
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        prefix = ".".join(parts[:end])
        if prefix in sys.modules:
            continue
        try:
            spec = importlib.util.find_spec(prefix)
        except ImportError:  # what it would be a part of is no package
            spec = None
        if spec is None:
            raise TargetNotFoundError(
                f"override of path '{path}': a module '{prefix}' must be there, to be imported later; there is none. "
                f"{_OR_A_GLOB}"
            )
        return


def when_imported(path: str, then: Callable[[Any], None]) -> Callable[[], None]:
    """Call `then` with what the path names, when its module is imported, and when it is loaded again. Gives what calls
    that off.
    """
    module_name, attribute = parts_of(path)

    def loaded(module: ModuleType) -> None:
        try:
            value = resolve_path(module, attribute)[2]
        except AttributeError:
            warnings.warn(
                f"override of path '{path}': the module '{module_name}' has been imported and has no '{attribute}'; "
                "nothing is overridden",
                GradOverrideWarning,
                stacklevel=2,
            )
            return
        try:
            then(value)
        except GradOverrideError as error:  # whoever imports it has no part in it
            warnings.warn(
                f"override of path '{path}': the module '{module_name}' has been imported, and nothing is "
                f"overridden in it: {error}",
                GradOverrideWarning,
                stacklevel=2,
            )

    return on_load(module_name, loaded)
