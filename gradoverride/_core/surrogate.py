"""The rules behind `straight_through`: the identity, or the derivative of a surrogate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gradoverride._core import captured
from gradoverride._core.contract import shape_text, what
from gradoverride._core.private import fail, in_functorch
from gradoverride._core.scan import location
from gradoverride._core.signature import name_of
from gradoverride.errors import SurrogateError

__all__ = ["SurrogateRule", "pass_through"]


def pass_through(grad_output: Tensor) -> Tensor:
    """The straight-through estimator: the gradient as it came."""
    return grad_output


class SurrogateRule:
    """The gradient of `surrogate` at the input, in the place of that of `fn`."""

    writes_nothing = True  # into the gradient that it is given: it is passed on to torch alone

    def __init__(self, fn: Any, surrogate: Callable[..., Any]) -> None:
        self.surrogate = surrogate
        self.who = f"surrogate '{name_of(surrogate)}' ({location(surrogate)}) of '{name_of(fn)}' ({location(fn)})"

    def __call__(self, grad_output: Tensor, input: Tensor) -> Tensor:
        if torch.is_grad_enabled() or torch.compiler.is_dynamo_compiling() or in_functorch():
            result, pullback, *_ = torch.func.vjp(self.surrogate, input)  # differentiable again
            self._check_shape(result, grad_output)
            (grad_input,) = pullback(grad_output.to(result.dtype))
            return grad_input
        with torch.enable_grad():
            alias = input.detach().requires_grad_()
            result = self.surrogate(alias)
        self._check_shape(result, grad_output)
        (grad_input,) = torch.autograd.grad(result, alias, grad_output.to(result.dtype), materialize_grads=True)
        return grad_input

    def check(self, input: Tensor, result: Tensor) -> None:
        """Look at the surrogate once before any gradient is asked for: an error then says which call it was."""
        with torch.enable_grad():
            given = self.surrogate(input.detach())
        if isinstance(given, Tensor) and given.requires_grad:
            captured.refuse(self.who, ", ".join(captured.captured_names(self.surrogate)))
        self._check_shape(given, result)

    def _check_shape(self, given: Any, like: Tensor) -> None:
        if not isinstance(given, Tensor) or given.shape != like.shape:
            fail(
                SurrogateError,
                f"{self.who} must give a result of shape {shape_text(like.shape)}, the shape of the result it stands "
                f"for; it gives {what(given)}",
            )
