"""Compiled by inductor: an override costs no more than the hand-written Function, and breaks no graph."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from benchmarks import eager
from benchmarks.timing import (
    COUNT,
    Case,
    Effort,
    NotMeasured,
    Pair,
    Samples,
    forward_and_backward,
    leaf,
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
    return compiled(sides)[0]


def graphs(name: str, sides: Sides) -> Case:
    def measure(effort: Effort) -> Samples:
        _, ours, reference = compiled(sides)
        return Samples([ours - reference], [reference])

    return Case(name, 0, measure, COUNT)


@functools.cache
def compiled(sides: Sides) -> tuple[Pair, int, int]:
    """Both sides, compiled, and the number of graphs of each. Compiling takes seconds, so it is done once."""
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        raise NotMeasured("inductor needs a C++ compiler")
    ours, reference, sizes = sides()
    leaves = tuple(leaf(size) for size in sizes)
    grad = torch.ones(sizes[0])

    def compile_and_run(function: Callable[..., Any]) -> tuple[Callable[[], object], int]:
        counter = CompileCounterWithBackend("inductor")
        step = forward_and_backward(torch.compile(function, backend=counter, fullgraph=True), *leaves, grad=grad)
        step()
        return step, counter.frame_count

    with undisturbed():  # as it is measured: Dynamo guards the number of threads, inductor compiles it in
        our_step, our_graphs = compile_and_run(ours)
        reference_step, reference_graphs = compile_and_run(reference)
    parameters = [p for side in (ours, reference) if isinstance(side, nn.Module) for p in side.parameters()]
    return Pair(our_step, reference_step, (*leaves, *parameters)), our_graphs, reference_graphs
