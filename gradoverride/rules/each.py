"""What rules of the gradient alone have in common: of a structure of gradients, each tensor is taken by itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from gradoverride._core.binding.contract import shape_text, what
from gradoverride._core.private.dynamo import fail
from gradoverride._core.values.structure import is_container, leaves_in, taken_apart, unflatten
from gradoverride._core.values.tensors import is_differentiable
from gradoverride.errors import RuleResultError, UnsupportedError

__all__ = ["Each", "check_one_for_each", "each", "gradients_in", "of_values"]

X = TypeVar("X")


def each(edit: Callable[[Tensor], Tensor], grad_output: X) -> X:
    """`edit` of a gradient, or of each in a structure of them."""
    if isinstance(grad_output, Tensor):
        return edit(grad_output)  # type: ignore[return-value]  # X is Tensor
    spec, leaves = gradients_in(grad_output)
    edited: X = unflatten(spec, iter([edit(leaf) for leaf in leaves]))
    return edited


def of_values(edit: Callable[[Tensor], Tensor], grad: Tensor) -> Tensor:
    """`edit` of a gradient, or of the values of one that is sparse: for an edit value by value that leaves 0 alone."""
    if not grad.is_sparse:
        return edit(grad)
    grad = grad.coalesce()  # in which each place occurs once
    return torch.sparse_coo_tensor(
        grad.indices(), edit(grad.values()), grad.shape, check_invariants=False, is_coalesced=True
    )


def check_one_for_each(rule: str, grad_output: Any, input: Tensor) -> None:
    """Raise `UnsupportedError` for a gradient of another shape: broadcast with the input it might fit by chance."""
    if not isinstance(grad_output, Tensor) or grad_output.shape != input.shape:
        fail(
            UnsupportedError,
            f"{rule} is for what has one result for each input; it is in force on another, with an input of shape "
            f"{shape_text(input.shape)} and, as the gradient of its result, {what(grad_output)}",
        )


def gradients_in(grad_output: Any) -> tuple[Any, list[Tensor]]:
    """The structure of what a rule is given, and the tensors in it. An error if there is something, but no tensor."""
    spec, leaves = taken_apart(grad_output, is_differentiable)
    if not leaves and leaves_in(grad_output, _is_something):
        fail(
            RuleResultError,
            "a rule of gradoverride.rules must be given a tensor as the gradient, or a structure of them; it was "
            f"given {what(grad_output)}. Turn arrays into tensors before it (torch.from_numpy), or write the rule "
            "for arrays",
        )
    return spec, leaves


def _is_something(value: Any) -> bool:
    return value is not None and not is_container(value)


class Each:
    """A rule that says `of` one gradient what becomes of it."""

    writes_nothing = True  # so it is given the gradient itself, no copy

    def of(self, grad: Tensor) -> Tensor:
        raise NotImplementedError

    def __call__(self, grad_output: X) -> X:
        """The gradient that goes on."""
        return each(self.of, grad_output)
