"""Cells that run in processes of their own, which write what came of each and may hang or die.

found = run(function, 2, folder, limit=240)  # by process, {name: result}; `function(number, write)` runs in each
"""

from __future__ import annotations

import gc
import os
import pickle
import time
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["Write", "run"]

Write = Callable[[str, Any], None]


def run(function: Callable[..., None], number: int, folder: Any, limit: float, *args: Any) -> list[dict[str, Any]]:
    """What `number` processes have written until they were done, or died, or the time was up."""
    context = torch.multiprocessing.start_processes(
        _start, (function, str(folder), args), nprocs=number, join=False, start_method="spawn"
    )
    end = time.monotonic() + limit
    try:
        while not context.join(max(end - time.monotonic(), 0)):
            if time.monotonic() >= end:
                break
    except torch.multiprocessing.ProcessExitedException as error:
        print(error)  # the cells that it did not come to say so
    finally:
        for process in context.processes:
            process.kill()
    return [_read(f"{folder}/{index}") for index in range(number)]


def _start(index: int, function: Callable[..., None], folder: str, args: tuple[Any, ...]) -> None:
    gc.set_threshold(200_000, 20, 100)  # as in `conftest.py`
    with open(f"{folder}/{index}", "wb") as file:

        def write(name: str, result: Any) -> None:
            pickle.dump((name, result), file)
            file.flush()

        function(index, write, *args)


def _read(path: str) -> dict[str, Any]:
    """The results that a process has written, one after the other."""
    results: dict[str, Any] = {}
    if os.path.exists(path):
        with open(path, "rb") as file:
            while file.peek(1):
                name, result = pickle.load(file)
                results[name] = result
    return results
