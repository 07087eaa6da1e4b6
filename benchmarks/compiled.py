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
from benchmarks.timing import GRAPHS, Case, Effort, NotMeasured, Pair, Samples, forward_and_backward, leaf, ratio

N = 10_000

Sides = Callable[[], tuple[Callable[..., Any], Callable[..., Any], int]]


def cases() -> list[Case]:
    subjects: dict[str, Sides] = {
        "gradient alone": lambda: (eager.doubled(), eager.Double.apply, 1),
        "two tensors": lambda: (eager.product(), eager.Product.apply, 2),
        "module method": lambda: (eager.Affine(N), eager.AffineByHand(N), 1),
    }
    return [
        *(
            ratio(f"compiled: {name}, n={N:g}", 1.02, functools.partial(pair, sides))
            for name, sides in subjects.items()
        ),
        *(graphs(f"compiled: graphs beyond the reference's, {name}", sides) for name, sides in subjects.items()),
    ]


def pair(sides: Sides) -> Pair:
    return compiled(sides)[0]


def graphs(name: str, sides: Sides) -> Case:
    def measure(effort: Effort) -> Samples:
        _, ours, reference = compiled(sides)
        return Samples([ours - reference], [reference])

    return Case(name, 0, measure, GRAPHS)


@functools.cache
def compiled(sides: Sides) -> tuple[Pair, int, int]:
    """Both sides, compiled, and the number of graphs of each. Compiling takes seconds, so it is done once."""
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        raise NotMeasured("inductor needs a C++ compiler")
    ours, reference, tensors = sides()
    leaves = tuple(leaf(N) for _ in range(tensors))
    grad = torch.ones(N)

    def compile_and_run(function: Callable[..., Any]) -> tuple[Callable[[], object], int]:
        counter = CompileCounterWithBackend("inductor")
        step = forward_and_backward(torch.compile(function, backend=counter, fullgraph=True), *leaves, grad=grad)
        step()
        return step, counter.frame_count

    our_step, our_graphs = compile_and_run(ours)
    reference_step, reference_graphs = compile_and_run(reference)
    parameters = [p for side in (ours, reference) if isinstance(side, nn.Module) for p in side.parameters()]
    return Pair(our_step, reference_step, (*leaves, *parameters)), our_graphs, reference_graphs
