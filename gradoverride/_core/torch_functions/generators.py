"""Generators and coroutines, which run after the call that made them: their steps, each called by a function."""

from __future__ import annotations

import types
from collections.abc import Callable, Generator
from types import AsyncGeneratorType, CoroutineType, GeneratorType
from typing import Any

__all__ = ["RUN_LATER", "in_steps"]

RUN_LATER = frozenset({GeneratorType, CoroutineType, AsyncGeneratorType})
"""The classes of what a call gives that has not run yet."""


def in_steps(running: Any, run: Callable[..., Any]) -> Any:
    """What a generator or a coroutine gives, each of its steps called by `run`."""

    def steps() -> Generator[Any, Any, Any]:
        step, value = running.send, None
        while True:
            try:
                found = run(step, value)
            except StopIteration as end:
                return end.value
            try:
                step, value = running.send, (yield found)
            except BaseException as error:  # GeneratorExit too, where it is closed
                step, value = running.throw, error

    async def awaited() -> Any:
        return await types.coroutine(steps)()

    return steps() if isinstance(running, GeneratorType) else awaited()
