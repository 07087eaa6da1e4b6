"""Group "device": the cells of four other groups on CUDA, and what there is on CUDA alone.

Marked `cuda`, and skipped without a device.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.graph import save_on_cpu

from conformance.environment import Environment, Make
from conformance.environments import autograd, call, compiled, transforms
from conformance.environments.transforms import LOOSE
from conformance.subjects import accumulated, run_backward

__all__ = ["ENVIRONMENTS"]


def on_cuda(run: Any) -> Any:
    """The same cell with everything on the device."""
    return lambda make: run(functools.partial(make, device="cuda"))


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


# Their own way to the same is below.
LEFT_OUT = ("autograd: saved_tensors_hooks", "transforms: autocast", "compile: autocast")


def shared() -> list[Environment]:
    """Every environment of these groups, with all that is computed on the device."""
    groups = (call, autograd, transforms, compiled)
    return [
        dataclasses.replace(
            environment,
            group="device",
            name=environment.id,
            run=on_cuda(environment.run),
            reference=None if environment.reference is None else on_cuda(environment.reference),
            quick=False,
        )
        for group in groups
        for environment in group.ENVIRONMENTS
        if environment.id not in LEFT_OUT
    ]


column = functools.partial(Environment, "device")
ENVIRONMENTS = [
    *shared(),
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
