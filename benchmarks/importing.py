"""`import gradoverride`, once torch is there. Each sample is a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from benchmarks.timing import MILLISECONDS, Case, Effort, Samples

TIMED = """
from time import perf_counter
start = perf_counter()
import torch
torch_is_there = perf_counter()
import gradoverride
print(torch_is_there - start, perf_counter() - torch_is_there)
"""


def cases() -> list[Case]:
    return [Case("importing: beyond import torch", 50, measure, MILLISECONDS)]


def measure(effort: Effort) -> Samples:
    once()  # writes the bytecode, as installing does, and has the disk read
    samples = [once() for _ in range(effort.processes)]
    return Samples([ours * 1e3 for _, ours in samples], [torch for torch, _ in samples])


def once() -> tuple[float, float]:
    """Seconds for `import torch`, and for `import gradoverride` after it."""
    checkout = Path(__file__).parents[1]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(
        [sys.executable, "-c", TIMED], cwd=checkout, env=environment, capture_output=True, text=True, check=True
    )
    torch_seconds, ours = map(float, done.stdout.split())
    return torch_seconds, ours
