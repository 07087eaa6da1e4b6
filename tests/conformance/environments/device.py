"""Groups "another device" and "cuda": the cells of other groups with everything there, and what there is on CUDA alone.

The other device is that of `conformance.away`: these cells run in a process of their own. Those of CUDA are marked so,
and skipped where there is none.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.graph import save_on_cpu

from conformance import away
from conformance.environment import Environment, Make
from conformance.environments import autograd, call, compiled, copies, threads, transforms, wraps
from conformance.environments.transforms import LOOSE
from conformance.subjects import accumulated, run_backward

__all__ = ["ANOTHER", "CUDA"]


def on(device: str, run: Any) -> Any:
    """The same cell with everything on the device."""
    return lambda make: run(functools.partial(make, device=device))


def in_a_stream(make: Make) -> Any:
    """Forward in a stream of its own, backward asked for in the default one."""
    subject = make(device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        result = subject()
    torch.cuda.current_stream().wait_stream(stream)
    return run_backward(subject, result)


def as_it_is(call: Any) -> Any:
    return call


def in_one_graph(call: Any) -> Any:
    return torch.compile(call, backend="aot_eager", fullgraph=True)


def half_autocast(make: Make, compiler: Callable[[Any], Any] = as_it_is) -> Any:
    """Autocast in float16 with a scaled loss, as GradScaler does it."""
    subject = make(dtype=torch.float32, device="cuda")
    subject.call = compiler(subject.call)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**8)
    with torch.autocast("cuda", dtype=torch.float16):
        result = subject()
    scaler.scale(result.float().sum()).backward()
    return {name: None if grad is None else grad / 2.0**8 for name, grad in accumulated(subject).items()}


def without_autocast(make: Make) -> Any:
    subject = make(dtype=torch.float32, device="cuda")
    subject().sum().backward()
    return accumulated(subject)


def offloaded(make: Make) -> Any:
    """Saved tensors in pinned memory of the host."""
    subject = make(device="cuda")
    with save_on_cpu(pin_memory=True):
        result = subject()
    return run_backward(subject, result)


def two_forwards_in_streams(make: Make) -> Any:
    subject = make(device="cuda")
    first, *rest = subject.inputs
    results = []
    for factor in (1.0, 2.0):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            results.append(subject(first * factor, *rest))
        torch.cuda.current_stream().wait_stream(stream)
    for result in results:
        run_backward(subject, result)
    return accumulated(subject)


def shared(group: str, device: str, left_out: tuple[str, ...] = (), quick: tuple[str, ...] = ()) -> list[Environment]:
    """Every environment of the other groups, with all that is computed on the device."""
    groups = (call, autograd, transforms, compiled, copies, wraps, threads)
    return [
        dataclasses.replace(
            environment,
            group=group,
            name=environment.id,
            run=on(device, environment.run),
            reference=None if environment.reference is None else on(device, environment.reference),
            quick=environment.quick and environment.group in quick,
        )
        for one in groups
        for environment in one.ENVIRONMENTS
        if environment.id not in left_out
    ]


NOT_ELSEWHERE = (
    "copies: another process (spawn)",  # it would have to load the device before the tensors
    # Inductor writes code for the devices that it knows:
    "compile: inductor",
    "compile: inside a parent, inductor",
    "compile: no_grad",
    "compile: compiled autograd",
    "compile: compiled autograd of compiled",
)
ANOTHER = shared("another device", away.NAME, NOT_ELSEWHERE, quick=("call", "autograd", "transforms"))

column = functools.partial(Environment, "cuda")
CUDA = [
    *shared("cuda", "cuda"),
    column("a stream of its own", in_a_stream),
    column("two streams", two_forwards_in_streams),
    column("autocast in float16, scaled", half_autocast, without_autocast, tolerance=LOOSE),
    column(
        "autocast in float16, scaled, compiled",
        functools.partial(half_autocast, compiler=in_one_graph),
        without_autocast,
        refusals=("arrays compiled",),
        tolerance=LOOSE,
    ),
    column("saved tensors in pinned memory", offloaded),
]
