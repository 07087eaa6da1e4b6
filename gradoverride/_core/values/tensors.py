"""What counts as a tensor that may have a gradient, and which of them want one."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.func import debug_unwrap

from gradoverride._core.private.transforms import has_tangent, in_forward_ad

__all__ = ["is_differentiable", "is_tensor", "is_tracked", "may_want_gradient", "requires_grad_anywhere"]


def is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def is_differentiable(value: Any) -> bool:
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def is_tracked(tensor: Tensor) -> bool:
    """Whether a transform tracks this tensor. `requires_grad` does not tell: it is False in forward mode."""
    return debug_unwrap(tensor, recurse=False) is not tensor or (in_forward_ad() and has_tangent(tensor))


def may_want_gradient(tensor: Tensor) -> bool:
    """Whether a transform may want a gradient for it, forward mode too, where `requires_grad` does not tell."""
    return requires_grad_anywhere(tensor) or (in_forward_ad() and is_tracked(tensor))


def requires_grad_anywhere(tensor: Tensor) -> bool:
    """Whether the tensor, or one that a transform has wrapped in it, requires grad."""
    while not tensor.requires_grad:
        inner = debug_unwrap(tensor, recurse=False)
        if inner is tensor:
            return False
        tensor = inner
    return True
