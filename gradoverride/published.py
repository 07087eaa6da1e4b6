"""Registries that packages publish by name, under the entry point group `gradoverride.registries`."""

from __future__ import annotations

import difflib
import functools
import os
import sys
from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from gradoverride._core.binding.signature import kind_of
from gradoverride.errors import TargetError, TargetNotFoundError
from gradoverride.registries import Registry, as_registry

__all__ = ["GROUP", "published"]

GROUP = "gradoverride.registries"


def published(name: str) -> Registry:
    """The registry that an installed package publishes under this name: `override(model, name)` takes it by the name.

    >>> from gradoverride.published import published
    >>> published("guided_backprop").name
    'guided_backprop'

    A package publishes one by an entry point, in its `pyproject.toml`:

        [project.entry-points."gradoverride.registries"]
        my_rules = "my_package.rules:registry"

    Raises `TargetNotFoundError` if none has the name, and `TargetError` if several have, or if it is no registry.
    """
    known = _entries(tuple([(path, _changed(path)) for path in sys.path]))
    found = [entry for entry in known if entry.name == name]
    if not found:
        names = sorted({entry.name for entry in known})
        close = difflib.get_close_matches(name, names, n=1)
        hint = f" Did you mean '{close[0]}'?" if close else ""
        raise TargetNotFoundError(
            f"override: a registry must be published under the name '{name}'; installed packages publish "
            f"{', '.join(map(repr, names)) or 'none'}.{hint} A glob stands in a mapping of targets to rules"
        )
    if len(found) > 1:
        raise TargetError(
            f"override: one package alone must publish a registry '{name}'; {' and '.join(map(_package, found))} do. "
            "Import the one that is meant and give it itself"
        )
    return _loaded(found[0])


@functools.lru_cache(maxsize=1)
def _entries(installed: tuple[tuple[str, int], ...]) -> list[EntryPoint]:
    """What is published by the packages in these directories, as they were at these times. (Of a hundred, 2 ms.)"""
    return list({(entry.name, entry.value): entry for entry in entry_points(group=GROUP)}.values())


def _changed(path: str) -> int:
    try:
        return os.stat(path or os.curdir).st_mtime_ns
    except OSError:  # it need not exist
        return 0


def _loaded(entry: EntryPoint) -> Registry:
    try:
        value: Any = entry.load()
    except (ImportError, AttributeError) as error:
        raise TargetError(
            f"override: the registry '{entry.name}' of {_package(entry)} must be at '{entry.value}'; it cannot be "
            f"loaded from there: {error}"
        ) from error
    if not isinstance(value, (Registry, Mapping)):
        raise TargetError(
            f"override: what {_package(entry)} publishes as '{entry.name}' must be a Registry or a mapping of targets "
            f"to rules; '{entry.value}' is {kind_of(value)}"
        )
    return as_registry(value)


def _package(entry: EntryPoint) -> str:
    return f"'{entry.dist.name}'" if entry.dist is not None else f"'{entry.value}'"
