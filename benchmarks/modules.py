"""Modules at sizes of use: overrides of a whole block against the same block under plain autograd.

A rule with `vjp` does not run the forward again. What it keeps in memory is measured in `memory.py`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradoverride as go
from benchmarks.place import leaf, put_here
from benchmarks.timing import Case, Pair, forward_and_backward, ratio

BATCH, WIDTH = 256, 512

Rule = Callable[..., Any]


# Rules. A parameter that a rule does not answer for keeps autograd's own gradient.


def gradient_alone(grad_output: Tensor) -> Tensor:
    return grad_output


def unchanged(grad_output: Tensor, vjp: Any) -> Any:
    return vjp(grad_output)


def unchanged_by_name(grad_output: Tensor, vjp: Any) -> Any:
    return vjp.by_name(grad_output)


def changed(grad_output: Tensor, vjp: Any) -> Any:
    """The parameters keep the gradient for the unchanged `grad_output`, so that theirs is a pass of its own."""
    return vjp(grad_output * 2)


def cases() -> list[Case]:
    encoders = {
        "gradient alone": (1.05, lambda: override(encoder(), gradient_alone)),
        "vjp of a changed gradient": (1.35, lambda: override(encoder(), changed)),
    }
    return [
        *(timed(f"modules: vjp on two linear layers, {form}", 1.15, build) for form, build in BLOCKS.items()),
        *(timed(f"modules: encoder layer, {rule}", limit, build) for rule, (limit, build) in encoders.items()),
    ]


class Sides:
    """Something overridden and its equal under plain autograd, each a function of the same `inputs`."""

    def __init__(
        self, ours: Callable[..., Tensor], plain: Callable[..., Tensor], *inputs: Tensor, parameters: Any = ()
    ) -> None:
        self.ours, self.plain, self.inputs = ours, plain, inputs
        self.leaves = (*inputs, *parameters)


def timed(name: str, limit: float, build: Callable[[], Sides]) -> Case:
    def pair() -> Pair:
        sides = build()
        grad = torch.ones_like(sides.plain(*sides.inputs))
        return Pair(
            forward_and_backward(sides.ours, *sides.inputs, grad=grad),
            forward_and_backward(sides.plain, *sides.inputs, grad=grad),
            sides.leaves,
        )

    return ratio(name, limit, pair)


def override(inner: nn.Module, rule: Rule) -> Sides:
    class Overridden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = copy.deepcopy(inner)

        @go.custom_backward(rule)
        def forward(self, x: Tensor) -> Any:
            return self.inner(x)

    ours, x = Overridden(), leaf(*INPUTS[type(inner)])
    return Sides(ours, inner, x, parameters=(*ours.parameters(), *inner.parameters()))


INPUTS = {nn.Sequential: (BATCH, WIDTH), nn.TransformerEncoderLayer: (32, 64, 128)}


def block() -> nn.Module:
    return put_here(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH)))


def encoder() -> nn.Module:
    return put_here(nn.TransformerEncoderLayer(128, nhead=4, dim_feedforward=256, dropout=0.1, batch_first=True))


def two_layers(x: Tensor, weight_1: Tensor, bias_1: Tensor, weight_2: Tensor, bias_2: Tensor) -> Tensor:
    return F.linear(F.relu(F.linear(x, weight_1, bias_1)), weight_2, bias_2)


def block_of_tensors() -> Sides:
    parameters = [parameter.detach().requires_grad_() for parameter in block().parameters()]
    return Sides(go.custom_backward(unchanged)(two_layers), two_layers, leaf(BATCH, WIDTH), *parameters)


BLOCKS: dict[str, Callable[[], Sides]] = {
    "function of tensors": block_of_tensors,
    "module": lambda: override(block(), unchanged),
    "module, by name": lambda: override(block(), unchanged_by_name),
}
