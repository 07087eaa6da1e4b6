"""The rules behind `straight_through`: the identity, or the derivative of a surrogate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gradoverride._core.private import fail
from gradoverride._core.scan import location
from gradoverride._core.signature import name_of
from gradoverride.errors import SurrogateError

__all__ = ["surrogate_rule"]


def pass_through(grad_output: Tensor) -> Tensor:
    """The straight-through estimator: the gradient as it came."""
    return grad_output


def surrogate_rule(fn: Any, surrogate: Callable[..., Any] | None) -> Callable[..., Any]:
    """The rule of `straight_through(fn, surrogate=surrogate)`."""
    if surrogate is None:
        return pass_through
    who = f"surrogate '{name_of(surrogate)}' ({location(surrogate)}) of '{name_of(fn)}' ({location(fn)})"

    def surrogate_backward(grad_output: Tensor, input: Tensor) -> Tensor:
        result, pullback, *_ = torch.func.vjp(surrogate, input)
        if result.shape != grad_output.shape:
            fail(
                SurrogateError,
                f"{who} must give a result of shape {tuple(grad_output.shape)}, the shape of the result it stands "
                f"for; it gives {tuple(result.shape)}",
            )
        (grad_input,) = pullback(grad_output.to(result.dtype))
        return grad_input

    return surrogate_backward
