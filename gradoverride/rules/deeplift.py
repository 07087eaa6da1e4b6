"""DeepLIFT: what a result differs from that of a reference, divided among what the inputs differ by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradoverride._core.binding.contract import shape_text, what
from gradoverride._core.binding.options import check, is_integer, is_number
from gradoverride._core.private.dynamo import fail
from gradoverride.errors import UnsupportedError

__all__ = ["deeplift_rescale"]


@dataclass(frozen=True)
class deeplift_rescale:
    """Of an activation, how its result differs from that of a reference by how its input does: `g (y - y') / (x - x')`.

    The model is called once, with the inputs and as many references behind them in the batch. What comes back for the
    inputs are multipliers; times the difference of the inputs they are the contributions, and these sum to the
    difference of the results:

    >>> import torch, gradoverride as go
    >>> from gradoverride.rules import deeplift_rescale
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 1)).double()
    >>> x, reference = torch.rand(2, 3).double(), torch.zeros(2, 3).double()
    >>> both = torch.cat([x, reference]).requires_grad_()
    >>> with go.override(model, {torch.nn.ReLU: deeplift_rescale()}):
    ...     y, y_reference = model(both).chunk(2)
    >>> multipliers = torch.autograd.grad(y.sum(), both)[0].chunk(2)[0]
    >>> contributions = multipliers * (x - reference)
    >>> torch.allclose(contributions.sum(1, keepdim=True), y - y_reference)
    True

    It is for functions with one result for each input: ReLU, tanh, sigmoid, GELU, under a class or a function as the
    target. (`go.presets.deeplift` has them all.) What is linear needs no rule: its gradient is its multiplier. Batch
    normalisation is linear in `eval()` alone. Products of two results, softmax and max pooling have their gradient, and
    then the sum is not exact. It asks for the input, so a ReLU in place is refused.

    `dim` (default 0) is that of the batch. Where x and x' are nearer than `epsilon` (default 1e-7, as in the authors'
    code) it is the gradient. `epsilon` must be larger than 0 and `dim` an integer, else `RuleOptionError`.

    Source: Shrikumar, Greenside, Kundaje, "Learning important features through propagating activation differences"
    (2017), section 3.5.1.
    """

    epsilon: float = 1e-7
    dim: int = 0

    def __post_init__(self) -> None:
        fits = is_number(self.epsilon) and self.epsilon > 0
        check("deeplift_rescale", "epsilon", self.epsilon, fits, "a number larger than 0")
        check("deeplift_rescale", "dim", self.dim, is_integer(self.dim), "an integer")

    def __call__(self, grad_output: Tensor, input: Tensor, output: Tensor, vjp: Any) -> Tensor:
        """The gradients of inputs and references, for which multipliers are the same."""
        self._check(input, output)
        gradient = vjp(grad_output)
        if not isinstance(gradient, Tensor):
            fail(UnsupportedError, "deeplift_rescale is for functions of one tensor; it is in force on one of several")
        difference = _of_halves(input, self.dim)
        near = difference.abs() < self.epsilon
        multiplier = _of_halves(output, self.dim) / difference.masked_fill(near, 1)  # so that no derivative is nan
        return torch.where(_twice(near, self.dim), gradient, grad_output * _twice(multiplier, self.dim))

    def _check(self, input: Tensor, output: Any) -> None:
        if not isinstance(output, Tensor) or output.shape != input.shape:
            fail(
                UnsupportedError,
                "deeplift_rescale is for functions with one result for each input; the input has the shape "
                f"{shape_text(input.shape)}, and the result is {what(output)}",
            )
        if not -input.dim() <= self.dim < input.dim() or input.shape[self.dim] % 2:
            fail(
                UnsupportedError,
                f"deeplift_rescale: the batch, dimension {self.dim}, must hold inputs and as many references, "
                f"torch.cat([x, reference]); a tensor of shape {shape_text(input.shape)} came",
            )


def _of_halves(tensor: Tensor, dim: int) -> Tensor:
    """By how much the first half differs from the second."""
    first, second = tensor.chunk(2, dim)
    return first - second


def _twice(tensor: Tensor, dim: int) -> Tensor:
    return torch.cat([tensor, tensor], dim)
