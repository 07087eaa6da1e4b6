"""One harness for every comparison: two things that do the same, run in turn, and the ratio of their times.

A shared machine drifts by more than the few per cent that are to be shown. So the two sides alternate in short blocks,
each pair of neighbouring blocks gives one ratio, and what is reported is the median of the ratios with their quartiles.
Everything is built anew several times in a run, because one build can be lucky in where its memory lies.
"""

from __future__ import annotations

import contextlib
import gc
import operator
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.place import wait

BLOCK = 1e-3  # seconds: long beside the clock's resolution, short beside the machine's drift
WARM_UP = 0.02  # seconds for each side of each build
FEWEST_BLOCKS = 6  # for each build, however long a block takes

Step = Callable[[], object]


@dataclass(frozen=True)
class Effort:
    """How long a case is measured, over how many builds of it."""

    seconds: float
    builds: int
    processes: int  # where every sample takes a process of its own


FULL = Effort(seconds=3, builds=6, processes=7)
QUICK = Effort(seconds=0.4, builds=2, processes=3)


@dataclass(frozen=True)
class Pair:
    """The two sides of a comparison, and the leaves whose gradients are cleared before every block."""

    ours: Step
    reference: Step
    leaves: tuple[Tensor, ...] = ()
    calls_a_step: int = 1  # where a step sets up what would drown a single call


class Spread(NamedTuple):
    """The quartiles of what was measured."""

    low: float
    median: float
    high: float


@dataclass(frozen=True)
class Samples:
    """What was measured, and beside it the reference's own figures."""

    values: list[float] = field(default_factory=list)
    references: list[float] = field(default_factory=list)

    def spread(self) -> Spread:
        if len(self.values) == 1:
            return Spread(*self.values * 3)
        return Spread(*statistics.quantiles(self.values, n=4, method="inclusive"))

    def reference(self) -> float:
        return statistics.median(self.references)


@dataclass(frozen=True)
class Quantity:
    """What a case measures, and how that and its reference are written."""

    write: Callable[[float], str]
    write_reference: Callable[[float], str]


def in_seconds(seconds: float) -> str:
    scale, unit = next((s, u) for s, u in ((1, "s"), (1e-3, "ms"), (1e-6, "us")) if seconds >= s or u == "us")
    return f"{seconds / scale:.4g} {unit}"


RATIO = Quantity("{:.3f}".format, in_seconds)
MICROSECONDS = Quantity("{:.3f} us".format, in_seconds)
MILLISECONDS = Quantity("{:.1f} ms".format, in_seconds)
BYTES = Quantity("{:,.0f} bytes".format, "{:,.0f} bytes".format)
COUNT = Quantity("{:.0f}".format, "{:.0f}".format)


class NotMeasured(Exception):
    """This machine lacks what a case needs."""


@dataclass(frozen=True)
class Case:
    """One row of the table. `limit` is the most that the median may be; without one the row is for information."""

    name: str
    limit: float | None
    measure: Callable[[Effort], Samples]
    quantity: Quantity = RATIO

    def holds(self, samples: Samples) -> bool:
        """Whether the median is within the limit as it stands: nothing is rounded in our favour."""
        return self.limit is None or samples.spread().median <= self.limit


def ratio(name: str, limit: float | None, build: Callable[[], Pair]) -> Case:
    """A case that asks how many times as long ours takes as its reference."""
    return Case(name, limit, lambda effort: interleave(build, effort, operator.truediv))


def added_microseconds(name: str, limit: float | None, build: Callable[[], Pair]) -> Case:
    """A case that asks how much longer one call of ours takes."""

    def difference(ours: float, reference: float) -> float:
        return (ours - reference) * 1e6

    return Case(name, limit, lambda effort: interleave(build, effort, difference), MICROSECONDS)


def interleave(build: Callable[[], Pair], effort: Effort, compare: Callable[[float, float], float]) -> Samples:
    """Samples of `compare(ours, reference)`, both in seconds a call, from neighbouring blocks."""
    samples = Samples()
    for _ in range(effort.builds):
        pair = build()
        with undisturbed():
            warm_up(pair.ours)
            steps = max(1, round(BLOCK / warm_up(pair.reference)))
            end = time.perf_counter() + effort.seconds / effort.builds
            blocks = 0
            while blocks < FEWEST_BLOCKS or time.perf_counter() < end:
                times = {}
                for side in ("ours", "reference") if blocks % 2 else ("reference", "ours"):
                    times[side] = seconds_a_step(getattr(pair, side), steps, pair.leaves) / pair.calls_a_step
                samples.values.append(compare(times["ours"], times["reference"]))
                samples.references.append(times["reference"])
                blocks += 1
    return samples


def warm_up(step: Step) -> float:
    """Runs until caches, allocator and code are warm; the seconds that one step takes then."""
    steps = 0
    start = time.perf_counter()
    while steps < 3 or time.perf_counter() - start < WARM_UP:
        step()
        steps += 1
    return seconds_a_step(step, max(1, steps // 4))


def seconds_a_step(step: Step, steps: int, leaves: tuple[Tensor, ...] = ()) -> float:
    for leaf in leaves:
        leaf.grad = None
    wait()
    start = time.perf_counter()
    for _ in range(steps):
        step()
    wait()
    return (time.perf_counter() - start) / steps


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """No garbage collector, and one thread: a second one has nothing to do on what is tiny, and on what is large it
    waits for a core that something else may have."""
    before, collecting = torch.get_num_threads(), gc.isenabled()
    gc.collect()
    gc.disable()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        if collecting:
            gc.enable()


def forward_and_backward(function: Callable[..., Any], *args: Any, grad: Any) -> Step:
    """One call and its backward. A dict result is differentiated by all its values, with `grad` for each."""

    def step() -> None:
        torch.autograd.backward(function(*args), grad)

    def step_of_dict() -> None:
        result = function(*args)
        torch.autograd.backward(tuple(result.values()), (grad,) * len(result))

    return step_of_dict if isinstance(function(*args), dict) else step
