"""Rules of the gradient alone: for `edit_gradient`, where the value stays as it is, or for any forward, whose own
derivative they then stand in the place of (`chain(clip_norm(1.0), plain)` keeps that).

Alike in all of them:

- Nothing is kept for them from the forward.
- Of a structure of gradients (a tuple, a list, a dict, ...) each tensor is taken by itself. `clip_norm` and
  `normalize` without `dim` are the exception: they measure all tensors together.
- The gradient keeps its shape, its device and, but for `cast`, its dtype.
- nan stays nan and inf does not become finite, but for `stop`, `sign`, a mask of True and False, and `clip_value`,
  which takes inf to its limit. Where values are measured together (`clip_norm`, `normalize`, `centralize`,
  `quantize`), nan reaches all of them; inf becomes nan, and the others 0, inf or nan. `scrub` puts 0 in their place.
- Options out of range are a `RuleOptionError` when the rule is made.
- Forward mode needs rules that are linear in the gradient: `reverse`, `scale`, `stop`, `mask` and `centralize` are. The
  others are refused there: `clip_value`, `clip_norm`, `normalize`, `sign`, `add_noise`, `quantize`, and `cast` to fewer
  digits.

Rules that look at the gradient are in `rules.watching`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from gradoverride._core.binding.contract import what
from gradoverride._core.binding.options import (
    check,
    check_broadcasts,
    check_dim,
    check_dim_of,
    check_flag,
    check_generator,
    is_integer,
    is_number,
)
from gradoverride._core.binding.rule import writes_nothing
from gradoverride._core.private.dynamo import fail
from gradoverride._core.private.transforms import in_batched_autograd
from gradoverride._core.values.precision import wide
from gradoverride._core.values.structure import unflatten
from gradoverride.errors import RuleResultError, UnsupportedError
from gradoverride.rules.each import Each, each, gradients_in, of_values
from gradoverride.rules.untraced import Drawing

__all__ = [
    "reverse",
    "scale",
    "stop",
    "mask",
    "clip_value",
    "clip_norm",
    "normalize",
    "sign",
    "centralize",
    "add_noise",
    "cast",
    "quantize",
]

X = TypeVar("X")


# --- linear ---


@dataclass(frozen=True)
class reverse(Each):
    """The gradient reversed: `-strength * g`. For features that are to keep a classifier from its aim.

    >>> import torch, gradoverride as go
    >>> from gradoverride.rules import reverse
    >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> go.edit_gradient(x, reverse(0.5)).sum().backward()
    >>> x.grad
    tensor([-0.5000, -0.5000])

    `strength` (the paper's lambda, default 1) must not be negative. It often grows while training: then make a rule in
    each forward, `go.edit_gradient(x, reverse(strength))`.

    Source: Ganin, Lempitsky, "Unsupervised domain adaptation by backpropagation" (2015).
    """

    strength: float = 1.0

    def __post_init__(self) -> None:
        fits = is_number(self.strength) and self.strength >= 0
        check("reverse", "strength", self.strength, fits, "a number that is not negative")

    def of(self, grad: Tensor) -> Tensor:
        return grad.neg() if self.strength == 1 else grad * -self.strength


@dataclass(frozen=True)
class scale(Each):
    """The gradient times a number: `factor * g`.

    >>> import torch, gradoverride as go
    >>> from gradoverride.rules import scale
    >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> go.edit_gradient(x, scale(0.1)).sum().backward()
    >>> x.grad
    tensor([0.1000, 0.1000])

    `factor` is any finite number. For a factor that is a tensor there is `mask`.
    """

    factor: float

    def __post_init__(self) -> None:
        check("scale", "factor", self.factor, is_number(self.factor), "a finite number")

    def of(self, grad: Tensor) -> Tensor:
        return grad * self.factor


@writes_nothing
def stop(grad_output: X) -> X:
    """No gradient: zeros. (With `x.detach()` in place of a rule there is none at all: `x.grad` stays None.)

    >>> import torch, gradoverride as go
    >>> from gradoverride.rules import stop
    >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> go.edit_gradient(x, stop).sum().backward()
    >>> x.grad
    tensor([0., 0.])
    """
    return each(torch.zeros_like, grad_output)


@dataclass(frozen=True, eq=False, repr=False)
class mask(Each):
    """The gradient times a tensor: `m * g`. Of True and False, the gradient where it is True, 0 elsewhere.

    >>> import torch, gradoverride as go
    >>> from gradoverride.rules import mask
    >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> go.edit_gradient(x, mask(torch.tensor([True, False]))).sum().backward()
    >>> x.grad
    tensor([1., 0.])

    `m` broadcasts with the gradient, on its device. A False stops nan too; a 0 does not, for 0 * nan is nan. Two masks
    are equal if their tensors are.
    """

    m: Tensor

    def __post_init__(self) -> None:
        m: Any = self.m
        check("mask", "m", m, isinstance(m, Tensor), "a real tensor")
        check("mask", "m", m.dtype, not m.is_complex(), "a real tensor")

    def of(self, grad: Tensor) -> Tensor:
        check_broadcasts("mask", "m", self.m, grad, "the gradient", RuleResultError)
        return torch.where(self.m, grad, 0) if self.m.dtype is torch.bool else grad * self.m

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, mask):
            return NotImplemented
        one, two = self.m, other.m
        return one.dtype is two.dtype and one.device == two.device and torch.equal(one, two)

    def __hash__(self) -> int:
        return hash((mask, self.m.shape, self.m.dtype))

    def __repr__(self) -> str:
        return f"mask({what(self.m)}, {self.m.dtype})"


@dataclass(frozen=True)
class centralize(Each):
    """The gradient without its mean over `dim`: `g - mean(g)`.

    Without `dim` that is over all but the first, as for a weight of (results, inputs, ...); a gradient of one
    dimension or none then stays as it is.

    >>> import torch, gradoverride as go
    >>> from gradoverride.rules import centralize
    >>> x = torch.ones(2, 2, requires_grad=True)
    >>> go.edit_gradient(x, centralize()).backward(torch.tensor([[1.0, 3.0], [0.0, 8.0]]))
    >>> x.grad
    tensor([[-1.,  1.],
            [-4.,  4.]])

    `dim` is an integer or a tuple of them.

    Source: Yong et al., "Gradient centralization: a new optimization technique for deep neural networks" (2020).
    """

    dim: int | tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        check_dim("centralize", self.dim)

    def of(self, grad: Tensor) -> Tensor:
        check_dim_of("centralize", self.dim, grad, "the gradient")
        dim = tuple(range(1, grad.dim())) if self.dim is None else self.dim
        return grad if dim == () else grad - grad.mean(dim, keepdim=True)


# --- bounds ---


@dataclass(frozen=True)
class clip_value(Each):
    """The gradient with each value between `-limit` and `limit`.

    >>> import torch, gradoverride as go
    >>> from gradoverride.rules import clip_value
    >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> go.edit_gradient(x, clip_value(1.0)).backward(torch.tensor([-5.0, 0.5]))
    >>> x.grad
    tensor([-1.0000,  0.5000])

    `limit` must be larger than 0. Complex gradients have no order: torch refuses them.
    """

    limit: float

    def __post_init__(self) -> None:
        fits = is_number(self.limit) and self.limit > 0
        check("clip_value", "limit", self.limit, fits, "a number larger than 0")

    def of(self, grad: Tensor) -> Tensor:
        return of_values(lambda values: values.clamp(-self.limit, self.limit), grad)


@dataclass(frozen=True)
class clip_norm:
    """The gradient, made shorter where it is longer than `max_norm`: `g / max(1, |g| / max_norm)`.

    |g| is the Euclidean norm of the whole gradient, of all tensors of a structure together, or over `dim`, of each
    tensor by itself. What is not longer stays as it is, to the last bit.

    >>> import torch, gradoverride as go
    >>> from gradoverride.rules import clip_norm
    >>> x = torch.ones(2, requires_grad=True)
    >>> go.edit_gradient(x, clip_norm(1.0)).backward(torch.tensor([3.0, 4.0]))
    >>> x.grad
    tensor([0.6000, 0.8000])

    `max_norm` must be larger than 0; `dim` is an integer or a tuple of them. A norm is computed in float32 at least.
    One nan makes the norm nan, and so all values: see `scrub`.

    Source: Pascanu et al., "On the difficulty of training recurrent neural networks" (2013), algorithm 1.
    """

    max_norm: float
    dim: int | tuple[int, ...] | None = None

    writes_nothing = True

    def __post_init__(self) -> None:
        fits = is_number(self.max_norm) and self.max_norm > 0
        check("clip_norm", "max_norm", self.max_norm, fits, "a number larger than 0")
        check_dim("clip_norm", self.dim)

    def __call__(self, grad_output: X) -> X:
        """The gradient that goes on."""

        def clipped(grad: Tensor, scaled: Tensor, norm: Tensor, scale: Tensor) -> Tensor:
            short = norm * scale <= self.max_norm
            return torch.where(short, grad, scaled / (norm / self.max_norm).masked_fill(short, 1))

        return _by_norm("clip_norm", grad_output, self.dim, clipped)


@dataclass(frozen=True)
class normalize:
    """The direction of the gradient: `g / |g|`, and 0 where that is 0.

    |g| is the Euclidean norm of the whole gradient, of all tensors of a structure together, or over `dim`, of each
    tensor by itself.

    >>> import torch, gradoverride as go
    >>> from gradoverride.rules import normalize
    >>> x = torch.ones(2, requires_grad=True)
    >>> go.edit_gradient(x, normalize()).backward(torch.tensor([30.0, 40.0]))
    >>> x.grad
    tensor([0.6000, 0.8000])

    `dim` is an integer or a tuple of them. A norm is computed in float32 at least. For another length, `chain` it with
    `scale`.
    """

    dim: int | tuple[int, ...] | None = None

    writes_nothing = True

    def __post_init__(self) -> None:
        check_dim("normalize", self.dim)

    def __call__(self, grad_output: X) -> X:
        """The gradient that goes on."""
        return _by_norm(
            "normalize",
            grad_output,
            self.dim,
            lambda _, scaled, norm, __: scaled / norm.masked_fill(norm == 0, math.inf),
        )


def _by_norm(rule: str, grad_output: X, dim: Any, edit: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> X:
    """`edit(grad, grad / scale, norm of that, scale)` of each gradient. The scale is 1 wherever squares have room."""
    spec, leaves = gradients_in(grad_output)
    if any([leaf.is_sparse for leaf in leaves]):
        return _by_norm_of_values(rule, grad_output, dim, edit)
    for leaf in leaves:
        check_dim_of(rule, dim, leaf, "the gradient")
    edited = list(leaves)
    places = [place for place, leaf in enumerate(leaves) if leaf.numel()]  # of none there is no largest value
    grads = [wide(leaves[place]) for place in places]
    scales = _scales(grads, dim)
    scaled = [grad / scale for grad, scale in zip(grads, scales, strict=True)]
    norms = [torch.linalg.vector_norm(grad, dim=dim, keepdim=dim is not None) for grad in scaled]
    if dim is None and len(norms) > 1:
        whole = torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))
        norms = [whole.to(norm) for norm in norms]
    for place, *parts in zip(places, grads, scaled, norms, scales, strict=True):
        edited[place] = edit(*parts).to(leaves[place].dtype)
    result: X = unflatten(spec, iter(edited))
    return result


def _by_norm_of_values(
    rule: str, grad_output: X, dim: Any, edit: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
) -> X:
    """The same, where some gradients are sparse."""
    if dim is not None:
        fail(
            UnsupportedError,
            f"{rule}: a gradient over 'dim' must not be sparse, as that of nn.Embedding(sparse=True) "
            "is. Leave 'dim' out, or make it dense before (`lambda g: g.to_dense()` in a chain)",
        )
    spec, leaves = gradients_in(grad_output)
    sparse = [leaf.coalesce() if leaf.is_sparse else None for leaf in leaves]
    values = [leaf if of is None else of.values() for leaf, of in zip(leaves, sparse, strict=True)]
    edited = iter(_by_norm(rule, values, None, edit))
    result: X = unflatten(spec, iter([of_values(lambda _: next(edited), leaf) for leaf in leaves]))
    return result


def _scales(grads: list[Tensor], dim: Any) -> list[Tensor]:
    """What each is to be divided by before it is squared: 1, or its largest value where the square of that would not be
    finite, or have too few digits. Without `dim` one for all.
    """
    if not in_batched_autograd():  # which detaches nothing
        grads = [grad.detach() for grad in grads]
    sizes = [torch.linalg.vector_norm(grad, math.inf, dim=dim, keepdim=dim is not None) for grad in grads]
    limits = [torch.finfo(size.dtype) for size in sizes]
    if dim is None and len(sizes) > 1:
        whole = torch.stack([size.to(sizes[0].device) for size in sizes]).amax()
        narrow = min(limits, key=lambda limit: limit.max)
        return [_scale(whole, narrow).to(size).clamp(min=lim.tiny) for size, lim in zip(sizes, limits, strict=True)]
    return [_scale(size, limit).clamp(min=limit.tiny) for size, limit in zip(sizes, limits, strict=True)]


def _scale(size: Tensor, limit: torch.finfo) -> Tensor:
    low, high = math.sqrt(limit.tiny / limit.eps), math.sqrt(limit.max) * 1e-5  # room for a sum of 10^10 squares
    apart = (size < low) | ((size > high) & (size < math.inf))
    return torch.where(apart, size, 1)


# --- rounded, and with noise ---


@writes_nothing
def sign(grad_output: X) -> X:
    """The sign of each value: -1, 0 or 1; of nan 0. Of a complex value its direction, `g / |g|`.

    >>> import torch, gradoverride as go
    >>> from gradoverride.rules import sign
    >>> x = torch.ones(3, requires_grad=True)
    >>> go.edit_gradient(x, sign).backward(torch.tensor([-0.5, 0.0, 9.0]))
    >>> x.grad
    tensor([-1.,  0.,  1.])

    Source: Bernstein et al., "signSGD: compressed optimisation for non-convex problems" (2018).
    """
    return each(torch.sgn, grad_output)


@dataclass(frozen=True)
class cast(Each):
    """The gradient in another dtype: what follows in a `chain` computes in it.

    At the end a gradient has the dtype of its tensor again, as torch wants it: so alone it rounds to the digits of
    `dtype`.

    >>> import torch, gradoverride as go
    >>> from gradoverride.rules import cast
    >>> x = torch.ones(1, requires_grad=True)
    >>> go.edit_gradient(x, cast(torch.bfloat16)).backward(torch.tensor([1.001]))
    >>> x.grad
    tensor([1.])

    `dtype` must be floating or complex; a complex gradient in a real one is an `UnsupportedError`.
    """

    dtype: torch.dtype

    def __post_init__(self) -> None:
        dtype: Any = self.dtype
        fits = isinstance(dtype, torch.dtype) and (dtype.is_floating_point or dtype.is_complex)
        check("cast", "dtype", dtype, fits, "a floating or complex dtype of torch")

    def of(self, grad: Tensor) -> Tensor:
        if grad.is_complex() and not self.dtype.is_complex:
            fail(
                UnsupportedError,
                f"cast: a gradient of {grad.dtype} must have a complex 'dtype', or its imaginary part would be lost; "
                f"got {self.dtype}. Use a rule that takes its real part, if that is meant",
            )
        return grad.to(self.dtype)


@dataclass(frozen=True)
class add_noise(Drawing):
    """The gradient with normal noise: `g + std * n`, n of a standard normal distribution.

    >>> import torch, gradoverride as go
    >>> from gradoverride.rules import add_noise
    >>> x = torch.ones(10000, requires_grad=True)
    >>> go.edit_gradient(x, add_noise(2.0, torch.Generator().manual_seed(0))).backward(torch.zeros(10000))
    >>> round(x.grad.std().item(), 1)
    2.0

    `std` must not be negative. `generator` is on the device of the gradient; without it, it is torch's own. Under
    `vmap`, its option `randomness` decides whether all are given the same.

    Source: Neelakantan et al., "Adding gradient noise improves learning for very deep networks" (2015).
    """

    std: float
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        check("add_noise", "std", self.std, is_number(self.std) and self.std >= 0, "a number that is not negative")
        check_generator("add_noise", self.generator)

    def untraced(self, grad: Tensor) -> Tensor:
        noise = torch.randn(grad.shape, dtype=grad.dtype, device=grad.device, generator=self.generator)
        return torch.add(grad, noise, alpha=self.std)


@dataclass(frozen=True)
class quantize(Drawing):
    """The gradient in integers of so many bits, times a step: those from `-k` to `k`, `k = 2 ** (bits - 1) - 1`.

    The step is `max |g| / k`, of each tensor or over `dim`; 0 stays 0, and so does the largest value. `stochastic`
    (default): rounded up or down at random, so that the mean is right; else to the nearest, which is biased.

    >>> import torch, gradoverride as go
    >>> from gradoverride.rules import quantize
    >>> x = torch.ones(4, requires_grad=True)
    >>> go.edit_gradient(x, quantize(2, stochastic=False)).backward(torch.tensor([8.0, 5.0, 3.0, -8.0]))
    >>> x.grad
    tensor([ 8.,  8.,  0., -8.])

    `bits` is an integer from 2 to 16, `dim` an integer or a tuple of them. `generator` as for `add_noise`. Its own
    derivative is 0, as that of any rounding. Complex gradients have no order: torch refuses them.

    Source: Gupta et al., "Deep learning with limited numerical precision" (2015), on stochastic rounding.
    """

    bits: int
    dim: int | tuple[int, ...] | None = None
    stochastic: bool = True
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        check("quantize", "bits", self.bits, is_integer(self.bits) and 2 <= self.bits <= 16, "an integer from 2 to 16")
        check_dim("quantize", self.dim)
        check_flag("quantize", "stochastic", self.stochastic)
        check_generator("quantize", self.generator)

    def untraced(self, grad: Tensor) -> Tensor:
        check_dim_of("quantize", self.dim, grad, "the gradient")
        if grad.numel() == 0:
            return grad
        largest = 2 ** (self.bits - 1) - 1
        values = wide(grad)
        # By the largest value itself, not by the step, which is rounded: so it is k steps to the last bit.
        top = values.abs().amax(() if self.dim is None else self.dim, keepdim=True)
        steps = values / top.masked_fill(top == 0, 1) * largest
        if self.stochastic:
            up = torch.rand(values.shape, dtype=values.dtype, device=values.device, generator=self.generator)
            steps = (steps + up).floor()
        else:
            steps = steps.round()
        return (steps.clamp(-largest, largest) / largest * top).to(grad.dtype)
