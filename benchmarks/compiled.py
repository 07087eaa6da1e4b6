"""Compiled by inductor: an override costs no more than the hand-written Function, and breaks no graph."""

from __future__ import annotations

import functools
import itertools
import shutil
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from benchmarks import eager
from benchmarks.place import leaf, ones
from benchmarks.timing import (
    COUNT,
    Case,
    Effort,
    NotMeasured,
    Pair,
    Samples,
    forward_and_backward,
    ratio,
    undisturbed,
)

SMALL, LARGE = 10_000, 1_000_000  # where guards show, and where they do not

Sides = Callable[[], tuple[Callable[..., Any], Callable[..., Any], tuple[int, ...]]]  # and the sizes of the arguments


def cases() -> list[Case]:
    subjects: dict[str, Sides] = {
        f"gradient alone, n={SMALL:g}": lambda: (eager.doubled(), eager.Double.apply, (SMALL,)),
        f"gradient alone, n={LARGE:g}": lambda: (eager.doubled(), eager.Double.apply, (LARGE,)),
        f"two tensors, n={SMALL:g}": lambda: (eager.product(), eager.Product.apply, (SMALL, SMALL)),
        f"module method, n={SMALL:g}": lambda: (eager.Affine(SMALL), eager.AffineByHand(SMALL), (SMALL,)),
    }
    return [
        *(ratio(f"compiled: {name}", 1.02, functools.partial(pair, sides)) for name, sides in subjects.items()),
        *(graphs(f"compiled: graphs beyond by hand, {name}", sides) for name, sides in subjects.items()),
    ]


def pair(sides: Sides) -> Pair:
    """The two sides. Each is compiled first in turn: that one's guards cost up to 3 per cent of a small step more."""
    return compiled(sides, ours_first=next(turns))[0]


turns = itertools.cycle((True, False))


def graphs(name: str, sides: Sides) -> Case:
    def measure(effort: Effort) -> Samples:
        _, ours, reference = compiled(sides)
        return Samples([ours - reference], [reference])

    return Case(name, 0, measure, COUNT)


def compiled(sides: Sides, ours_first: bool = True) -> tuple[Pair, int, int]:
    """Both sides, compiled, and the number of graphs of each."""
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        raise NotMeasured("inductor needs a C++ compiler")
    ours, reference, sizes = sides()
    leaves = tuple(leaf(size) for size in sizes)
    grad = ones(sizes[0])

    def compile_and_run(function: Callable[..., Any]) -> tuple[Callable[[], object], int]:
        counter = CompileCounterWithBackend("inductor")
        alone = in_a_frame_of_its_own(function)
        step = forward_and_backward(torch.compile(alone, backend=counter, fullgraph=True), *leaves, grad=grad)
        step()
        return step, counter.frame_count

    steps, counts = {}, {}
    with undisturbed():  # as it is measured: Dynamo guards the number of threads, inductor compiles it in
        for side in (ours, reference) if ours_first else (reference, ours):
            steps[side], counts[side] = compile_and_run(side)
    parameters = [p for side in (ours, reference) if isinstance(side, nn.Module) for p in side.parameters()]
    return Pair(steps[ours], steps[reference], (*leaves, *parameters)), counts[ours], counts[reference]


def in_a_frame_of_its_own(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, called from a code object that nothing else shares.

    Dynamo keeps what it has compiled with the code object of the outermost frame. Modules, and what is no function, it
    calls from one frame for all of them: the side compiled first would be found last, after the guards of the others.
    """

    def call(*args: Any) -> Any:
        return function(*args)

    call.__code__ = call.__code__.replace(co_name=f"call_{next(numbers)}")  # code is compared by value
    return call


numbers = itertools.count()
