"""Models whose modules are overridden, against the same models with hand-written Functions in their place.

And how long it takes to put rules on a large model, and to take them off again.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn.grad import conv2d_input, conv2d_weight

import gradoverride as go
from benchmarks import compiled
from benchmarks.place import leaf, ones, put_here
from benchmarks.timing import MILLISECONDS, Case, Effort, Pair, Samples, forward_and_backward, ratio, undisturbed

DEPTH = 12  # overridden modules in a model
MODULES = 1000  # in the large one
ROWS = {"small": (32, 64), "large": (256, 512)}  # and width: where overhead shows, and as it is used
IMAGES = {"small": (2, 8, 8, 8), "large": (16, 64, 16, 16)}

Rules = dict[Any, Callable[..., Any]]


def cases() -> list[Case]:
    return [
        *(
            ratio(f"overrides: {DEPTH} {kind}, {size}", LIMITS[kind][0], functools.partial(pair, kind, shape))
            for kind in MODELS
            for size, shape in sizes_of(kind).items()
        ),
        *(
            ratio(
                f"overrides: {DEPTH} {kind}, {size}, compiled",
                LIMITS[kind][1],
                functools.partial(compiled.pair, functools.partial(sides_of, kind, shape)),
            )
            for kind in MODELS
            for size, shape in sizes_of(kind).items()
        ),
        *(
            Case(
                f"overrides: {what} {name}, {MODULES} modules", 20, functools.partial(timed, rules, place), MILLISECONDS
            )
            for name, rules in APPLIED.items()
            for place, what in enumerate(("apply", "remove"))
        ),
    ]


# Rules, and the same by hand.


def guided(grad_output: Tensor, output: Tensor) -> Tensor:
    return grad_output.clamp(min=0) * (output > 0)


def guided_by_vjp(grad_output: Tensor, vjp: Callable[[Tensor], Tensor]) -> Tensor:
    return vjp(grad_output.clamp(min=0))


class Guided(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        result = x.relu()
        ctx.save_for_backward(result)
        return result

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Tensor:
        (output,) = ctx.saved_tensors
        return grad_output.clamp(min=0) * (output > 0)


class GuidedByHand(nn.Module):
    def forward(self, x: Tensor) -> Any:
        return Guided.apply(x)  # type: ignore[no-untyped-call]  # torch's own


def linear(grad_output: Tensor, input: Tensor, weight: Tensor, bias: Tensor) -> dict[str, Tensor]:
    return {"input": grad_output @ weight, "weight": grad_output.T @ input, "bias": grad_output.sum(0)}


class Linear(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return grad_output @ weight, grad_output.T @ x, grad_output.sum(0)


class LinearByHand(nn.Linear):
    def forward(self, x: Tensor) -> Any:
        return Linear.apply(x, self.weight, self.bias)  # type: ignore[no-untyped-call]  # torch's own


def halved(grad_output: Tensor) -> Tensor:
    return grad_output / 2


class Halved(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        (x,) = ctx.saved_tensors
        return grad_output / 2, grad_output.T @ x, grad_output.sum(0)


class HalvedByHand(nn.Linear):
    def forward(self, x: Tensor) -> Any:
        return Halved.apply(x, self.weight, self.bias)  # type: ignore[no-untyped-call]  # torch's own


def convolution(grad_output: Tensor, input: Tensor, weight: Tensor, bias: Tensor) -> dict[str, Tensor]:
    return dict(zip(("input", "weight", "bias"), of_convolution(grad_output, input, weight), strict=True))


def of_convolution(grad_output: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    into_x = conv2d_input(x.shape, weight, grad_output, padding=1)
    return into_x, conv2d_weight(x, weight.shape, grad_output, padding=1), grad_output.sum((0, 2, 3))


class Convolution(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight, bias, padding=1)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return of_convolution(grad_output, *ctx.saved_tensors)


class ConvolutionByHand(nn.Conv2d):
    def forward(self, x: Tensor) -> Any:
        return Convolution.apply(x, self.weight, self.bias)  # type: ignore[no-untyped-call]  # torch's own


THREE_BY_THREE = {"kernel_size": 3, "padding": 1}

# By kind, the rules, what stands between the ReLUs, and the same two by hand.
MODELS: dict[str, tuple[Rules, Any, Any, type[nn.Module]]] = {
    "ReLUs": ({nn.ReLU: guided}, nn.Linear, nn.Linear, GuidedByHand),
    "ReLUs by vjp": ({nn.ReLU: guided_by_vjp}, nn.Linear, nn.Linear, GuidedByHand),
    "linear layers": ({nn.Linear: linear}, nn.Linear, LinearByHand, nn.ReLU),
    "linear layers left to autograd": ({nn.Linear: halved}, nn.Linear, HalvedByHand, nn.ReLU),
    "convolutions": (
        {nn.Conv2d: convolution},
        functools.partial(nn.Conv2d, **THREE_BY_THREE),
        functools.partial(ConvolutionByHand, **THREE_BY_THREE),
        nn.ReLU,
    ),
}

# Eager, and compiled. Under `vjp` a graph is kept for what by hand, who knows the derivative, is one comparison; what
# is left to autograd is a graph of its own, beside the rule.
LIMITS = {
    "ReLUs": (1.05, 1.02),
    "ReLUs by vjp": (2.00, 1.20),
    "linear layers": (1.05, 1.02),
    "linear layers left to autograd": (1.50, 1.20),
    "convolutions": (1.05, 1.02),
}


def sizes_of(kind: str) -> dict[str, tuple[int, ...]]:
    return dict(IMAGES if kind == "convolutions" else ROWS)


def sides_of(kind: str, shape: tuple[int, ...]) -> tuple[nn.Module, nn.Module, tuple[Any, ...]]:
    rules, layer, layer_by_hand, relu_by_hand = MODELS[kind]
    ours, reference = model(shape[1], layer, nn.ReLU), model(shape[1], layer_by_hand, relu_by_hand)
    go.override(ours, rules)
    return ours, reference, (shape,)


def model(width: int, layer: Any, relu: Any) -> nn.Module:
    return put_here(nn.Sequential(*[part for _ in range(DEPTH) for part in (layer(width, width), relu())]))


def pair(kind: str, shape: tuple[int, ...]) -> Pair:
    ours, reference, _ = sides_of(kind, shape)
    x, grad = leaf(*shape), ones(*shape)
    return Pair(
        forward_and_backward(ours, x, grad=grad),
        forward_and_backward(reference, x, grad=grad),
        (x, *ours.parameters(), *reference.parameters()),
    )


APPLIED: dict[str, Any] = {
    "on two classes": {nn.ReLU: guided, nn.Linear: linear},
    "on a glob": {"*.1": guided},
    "on a function": {F.relu: guided},
    "guided_backprop": "guided_backprop",
    "epsilon_plus": "epsilon_plus",
}


def timed(rules: Any, place: int, effort: Effort) -> Samples:
    """How long it takes to apply (0) or to remove (1), beside a walk over the model."""
    blocks = MODULES // 4
    large = put_here(nn.Sequential(*[nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Tanh()) for _ in range(blocks)]))
    x = leaf(1, 4).detach()
    samples = Samples()
    go.override(large, rules).__exit__(KeyError, KeyError(), None)  # what is looked up once; it warns of nothing
    with undisturbed():
        end = time.perf_counter() + effort.seconds
        # It runs Python in one thread, so its time is that thread's: what else the machine does is not counted.
        while len(samples.values) < 3 or time.perf_counter() < end:
            start = time.thread_time()
            handle = go.override(large, rules)
            applied = time.thread_time()
            large(x)
            ready = time.thread_time()
            handle.remove()
            removed = time.thread_time()
            for _ in large.named_modules():
                pass
            samples.values.append(1e3 * (applied - start, removed - ready)[place])
            samples.references.append(time.thread_time() - removed)
    return samples
