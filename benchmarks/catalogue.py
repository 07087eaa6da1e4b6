"""Ready-made rules at a million elements: against the libraries that have the same, and against the best Function that
can be written for it by hand.

Each side runs forward and backward. The gradient is asked for, not accumulated: to add it to another one would take
both sides as long again. Options are set alike; where another library has a constant factor more or less, it has it
here too. What is not installed is named in the table. (`triangular` of snntorch is 1 below 0 and -1 above, no triangle:
it is what that library offers under this name.)
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

import gradoverride as go
from benchmarks.place import leaf, noise
from benchmarks.timing import Case, NotMeasured, Pair, Step, ratio
from gradoverride import rules, surrogates

N = 1_000_000

TensorFunction = Callable[[Tensor], Tensor]


def cases() -> list[Case]:
    return [
        ratio(f"catalogue: {name}, against {whose}", limit, functools.partial(pair, OURS[name], reference))
        for name, references in REFERENCES.items()
        for whose, (limit, reference) in references.items()
    ]


def pair(ours: Callable[[], TensorFunction], reference: Callable[[], TensorFunction]) -> Pair:
    x, grad = leaf(N), noise(N)
    return Pair(gradient(ours(), x, grad), gradient(reference(), x, grad))


def gradient(function: TensorFunction, x: Tensor, grad: Tensor) -> Step:
    """One forward and one backward."""

    def step() -> None:
        torch.autograd.grad(function(x), x, grad)

    return step


# Ours, as they are used.

OURS: dict[str, Callable[[], TensorFunction]] = {
    "atan": lambda: rules.spike(surrogates.atan(2.0)),
    "fast_sigmoid": lambda: rules.spike(surrogates.fast_sigmoid(25.0)),
    "sigmoid": lambda: rules.spike(surrogates.sigmoid(4.0)),
    "triangle": lambda: rules.spike(surrogates.triangle(1.0, 1.0)),
    "reverse": lambda: functools.partial(go.edit_gradient, rule=rules.reverse()),
    "scale": lambda: functools.partial(go.edit_gradient, rule=rules.scale(0.5)),
    "round": lambda: rules.round_ste,
    "clamp": lambda: lambda x: rules.clamp_ste(x, -1.0, 1.0),
    "sign": lambda: rules.sign_ste,
}


# By hand. New memory takes as long as two kernels: each of these takes it once for its value and once for its gradient.


def by_hand(derivative: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], TensorFunction]:
    """A Function whose value is a step, and whose gradient is this of its gradient and its input."""

    class ByHand(Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return torch.ge(x, 0, out=torch.empty_like(x))

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            (x,) = ctx.saved_tensors
            return derivative(grad, x)

    return lambda: ByHand.apply


def atan(grad: Tensor, x: Tensor) -> Tensor:
    divisor = torch.addcmul(x.new_ones(()), x, x, value=math.pi**2)
    return torch.div(grad, divisor, out=divisor)


def fast_sigmoid(grad: Tensor, x: Tensor) -> Tensor:
    divisor = x.abs().mul_(25).add_(1).square_()
    return torch.div(grad, divisor, out=divisor)


def sigmoid(grad: Tensor, x: Tensor) -> Tensor:
    s = (x * 4).sigmoid_()
    return s.addcmul_(s, s, value=-1).mul_(grad).mul_(4)


def triangle(grad: Tensor, x: Tensor) -> Tensor:
    return x.abs().sub_(1).clamp_max_(0).mul_(grad).neg_()


# By other libraries.


def library(name: str, package: str = "") -> Any:
    """The module of this name, or what to install for it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        own = name.partition(".")[0]
        missing = (error.name or own).partition(".")[0]  # itself, or something that it needs
        raise NotMeasured(f"pip install {package or own if missing == own else missing}") from error


def snntorch(name: str, **options: float) -> tuple[float, Callable[[], TensorFunction]]:
    return 0.5, lambda: getattr(library("snntorch.surrogate"), name)(**options)


def spikingjelly(name: str, **options: float) -> tuple[float, Callable[[], TensorFunction]]:
    return 0.5, lambda: getattr(library("spikingjelly.activation_based.surrogate"), name)(**options)


def revgrad(alpha: float) -> tuple[float, Callable[[], TensorFunction]]:
    return 0.6, lambda: library("pytorch_revgrad", "pytorch-revgrad").RevGrad(alpha)


def brevitas(name: str, *options: float) -> tuple[float, Callable[[], TensorFunction]]:
    def build() -> TensorFunction:
        function = getattr(library("brevitas.ops.autograd_ste_ops"), name).apply
        return lambda x: function(x, *options)

    return 1.0, build


REFERENCES: dict[str, dict[str, tuple[float, Callable[[], TensorFunction]]]] = {
    "atan": {
        "snntorch": snntorch("atan", alpha=2.0),
        "spikingjelly": spikingjelly("ATan", alpha=2.0),
        "by hand": (1.05, by_hand(atan)),
    },
    "fast_sigmoid": {
        "snntorch": snntorch("fast_sigmoid", slope=25),
        "spikingjelly": spikingjelly("SoftSign", alpha=25.0),
        "by hand": (1.05, by_hand(fast_sigmoid)),
    },
    "sigmoid": {
        "snntorch": snntorch("sigmoid", slope=4),
        "spikingjelly": spikingjelly("Sigmoid", alpha=4.0),
        "by hand": (1.05, by_hand(sigmoid)),
    },
    "triangle": {
        "snntorch": snntorch("triangular", threshold=1),
        "spikingjelly": spikingjelly("PiecewiseQuadratic", alpha=1.0),
        "by hand": (1.05, by_hand(triangle)),
    },
    "reverse": {"pytorch-revgrad": revgrad(1.0)},
    "scale": {"pytorch-revgrad": revgrad(-0.5)},
    "round": {"brevitas": brevitas("RoundSteFn")},
    "clamp": {"brevitas": brevitas("ScalarClampSteFn", -1.0, 1.0)},
    "sign": {"brevitas": brevitas("BinarySignSteFn")},
}
