"""`edit_gradient` against an identity Function written by hand, and against torch's own hook on the tensor."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

import gradoverride as go
from benchmarks import compiled, memory
from benchmarks.place import leaf, ones
from benchmarks.timing import BYTES, Case, Effort, Pair, Samples, forward_and_backward, ratio

SIZES = (1, 10_000, 1_000_000)

Edit = Callable[[Tensor], Tensor]


def cases() -> list[Case]:
    return [
        *(
            ratio(f"edits: {name}, n={n:g}", LIMITS.get(name, 1.0), functools.partial(pair, *EDITS[name], n))
            for name in EDITS
            for n in SIZES
        ),
        *(ratio(f"edits: against a hook, n={n:g}", None, functools.partial(pair, halved, hooked, n)) for n in SIZES),
        Case("edits: kept beyond by hand", 0, kept, BYTES),
        ratio("edits: compiled, n=10000", 1.02, functools.partial(compiled.pair, sides)),
        compiled.graphs("edits: compiled, graphs beyond by hand", sides),
    ]


def halved(x: Tensor) -> Tensor:
    return go.edit_gradient(x, lambda grad_output: grad_output * 0.5)


class Halved(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Tensor:
        return grad_output * 0.5


def clamped(x: Tensor) -> Tensor:
    return go.edit_gradient(x, lambda grad_output: torch.clamp(grad_output, -1, 1))


class Clamped(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Tensor:
        return torch.clamp(grad_output, -1, 1)


def normalised(x: Tensor) -> Tensor:
    return go.edit_gradient(x, lambda grad_output: grad_output / grad_output.norm())


class Normalised(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Tensor:
        return grad_output / grad_output.norm()


def by_value(x: Tensor) -> Tensor:
    return go.edit_gradient(x, lambda grad_output, x: grad_output * x)


class ByValue(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad_output * x


def hooked(x: Tensor) -> Tensor:
    alias = x.view_as(x)  # a hook on a leaf would stay there
    alias.register_hook(lambda grad_output: grad_output * 0.5)
    return alias


EDITS: dict[str, tuple[Edit, Edit]] = {
    "gradient alone": (halved, Halved.apply),
    "gradient alone by calls": (clamped, Clamped.apply),
    "gradient alone, normalised": (normalised, Normalised.apply),
    "with the value": (by_value, ByValue.apply),
}


# Its code does not settle that it writes nothing, and that it means the same under autocast: both are looked at.
LIMITS = {"gradient alone, normalised": 1.05}


def pair(ours: Edit, reference: Edit, n: int) -> Pair:
    """Both sides on one leaf of `n` elements."""
    x, grad = leaf(n), ones(n)
    return Pair(forward_and_backward(ours, x, grad=grad), forward_and_backward(reference, x, grad=grad), (x,))


def kept(effort: Effort) -> Samples:
    sides = memory.of_temporaries(halved, Halved.apply, 1)
    by_hand = memory.bytes_kept(sides.plain, sides)
    return Samples([memory.bytes_kept(sides.ours, sides) - by_hand], [by_hand])


def sides() -> tuple[Edit, Edit, tuple[int, ...]]:
    return halved, Halved.apply, (10_000,)
