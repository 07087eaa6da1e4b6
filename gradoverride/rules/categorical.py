"""Samples of a categorical distribution, one-hot, with a gradient for its logits: biased, but of low variance.

- `gumbel_softmax` is straight-through: the gradient is that of a softmax with the noise of the sample in it;
- `reinmax` costs as much, and is right to the second order where the former is to the first.

>>> import torch
>>> from gradoverride.rules import reinmax
>>> logits = torch.tensor([0.0, 0.0, 0.0, 1.0], requires_grad=True)
>>> losses = torch.tensor([1.0, 2.0, 3.0, 9.0])
>>> samples = reinmax(logits.expand(100_000, 4), generator=torch.Generator().manual_seed(0))
>>> (samples @ losses).mean().backward()
>>> torch.allclose(logits.grad, torch.func.grad(lambda logits: logits.softmax(0) @ losses)(logits), atol=0.05)
True

Alike in both:

- The sample is 1 at one place along `dim` and 0 elsewhere, to the last bit, in the shape and dtype of the logits, which
  are log probabilities up to a constant. One of -inf is never taken.
- Noise and softmax are computed in float32 at least: half precision has too few digits, and so ties.
- `generator` is on the device of the logits; without it, it is torch's own. Under `vmap`, its option `randomness`
  decides whether all are given the same.
- Options out of range are a `RuleOptionError`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradoverride._core.binding.options import check, check_floating, check_generator, is_integer, is_number
from gradoverride._core.values.precision import wide
from gradoverride.decorators import custom_backward
from gradoverride.rules.untraced import untraced

__all__ = ["gumbel_softmax", "reinmax"]


def gumbel_softmax(
    logits: Tensor, tau: float | Tensor = 1.0, dim: int = -1, generator: torch.Generator | None = None
) -> Tensor:
    """A one-hot sample; the gradient is that of `softmax((logits + noise) / tau)`, whose largest place it is.

    >>> import torch
    >>> from gradoverride.rules import gumbel_softmax
    >>> logits = torch.zeros(2, 3, requires_grad=True)
    >>> gumbel_softmax(logits, tau=0.5).sum(-1)
    tensor([1., 1.], grad_fn=<SumBackward1>)

    `tau` is larger than 0: small, the gradient has less bias and more variance. A tensor gets a gradient. The gradient
    is that of `torch.nn.functional.gumbel_softmax(hard=True)`, whose value may differ from 0 and 1 in the last bit.

    Source: Jang, Gu, Poole, "Categorical reparameterization with Gumbel-softmax" (2017), section 2.2; and Maddison,
    Mnih, Teh, "The concrete distribution" (2017).
    """
    fits = isinstance(tau, Tensor) or (is_number(tau) and tau > 0)
    check("gumbel_softmax", "tau", tau, fits, "a tensor or a number larger than 0")
    _check("gumbel_softmax", logits, dim, generator)
    noisy = (wide(logits) + _gumbel_noise(logits, generator)) / tau
    return _largest_place(noisy, dim).to(logits.dtype)


def reinmax(logits: Tensor, tau: float = 1.0, dim: int = -1, generator: torch.Generator | None = None) -> Tensor:
    """A one-hot sample d; the gradient is `2 J(q) g - J(p) g / 2`, where `p = softmax(logits)`,
    `q = (softmax(logits / tau) + d) / 2`, and `J(p) g = p (g - <p, g>)` is the vjp of a softmax that is p.

    With `tau` 1, its mean over all samples is the gradient of the mean of f, where f is quadratic: Heun's method, where
    straight-through is Euler's.

    >>> import torch
    >>> from gradoverride.rules import reinmax
    >>> logits = torch.zeros(2, 3, requires_grad=True)
    >>> reinmax(logits, tau=1.1).sum(-1)
    tensor([1., 1.], grad_fn=<SumBackward1>)

    `tau` is a number larger than 0. The paper finds that 1 or a bit more is best, where Gumbel-softmax wants less.

    Source: Liu et al., "Bridging discrete and backpropagation: straight-through and beyond" (2023), algorithm 2.
    """
    check("reinmax", "tau", tau, is_number(tau) and tau > 0, "a number larger than 0")
    _check("reinmax", logits, dim, generator)
    return _sample(wide(logits), _gumbel_noise(logits, generator), tau, dim).to(logits.dtype)


# --- what is decorated ---


def _softmax_vjp(grad_output: Tensor, soft: Tensor, dim: int) -> Tensor:
    return soft * (grad_output - (grad_output * soft).sum(dim, keepdim=True))


def _softmax_backward(grad_output: Tensor, logits: Tensor, dim: int) -> Tensor:
    return _softmax_vjp(grad_output, logits.softmax(dim), dim)


def _reinmax_backward(grad_output: Tensor, logits: Tensor, output: Tensor, tau: float, dim: int) -> tuple[Tensor, None]:
    mean = ((logits / tau).softmax(dim) + output) / 2
    second = 2 * _softmax_vjp(grad_output, mean, dim)
    return second - _softmax_vjp(grad_output, logits.softmax(dim), dim) / 2, None


@custom_backward(_softmax_backward)
def _largest_place(logits: Tensor, dim: int = -1) -> Tensor:
    return torch.zeros_like(logits).scatter(dim, logits.argmax(dim, keepdim=True), 1.0)


@custom_backward(_reinmax_backward)
def _sample(logits: Tensor, noise: Tensor, tau: float = 1.0, dim: int = -1) -> Tensor:
    place = (logits + noise).argmax(dim, keepdim=True)
    return torch.zeros_like(logits).scatter(dim, place, 1.0)


# --- noise ---


def _gumbel_noise(logits: Tensor, generator: torch.Generator | None) -> Tensor:
    """Whose largest place, once the logits are added, is distributed as their softmax."""
    like = torch.empty_like(wide(logits.detach()))
    exponential = like.exponential_() if generator is None else untraced(_EXPONENTIAL, like, generator)
    return exponential.clamp(min=torch.finfo(like.dtype).tiny).log_().neg_()


@dataclass(frozen=True)
class _Exponential:
    """Numbers of an exponential distribution, of a generator: Dynamo knows none."""

    def untraced(self, like: Tensor, generator: torch.Generator) -> Tensor:
        return torch.empty_like(like).exponential_(generator=generator)


_EXPONENTIAL = _Exponential()


# --- options ---


def _check(function: str, logits: Any, dim: Any, generator: Any) -> None:
    check_floating(function, "logits", logits)
    fits = is_integer(dim) and -logits.dim() <= dim < logits.dim()
    check(function, "dim", dim, fits, f"a dimension of the logits, which have {logits.dim()}")
    check_generator(function, generator)
