"""Estimators that need no derivative: the forward is evaluated at points around its arguments.

Alike in all of them:

- The forward may be anything that gives the same for the same arguments: NumPy, a simulator, a compiled library. Its
  results may have any shape and structure, its arguments too; those that want a gradient are moved, all at once.
- `batch_dims`: so many leading dimensions are independent samples: `result[i]` depends on `argument[i]` alone, of all
  arguments that want a gradient. Each sample is then measured by itself: `finite_difference` needs as many calls as one
  sample has numbers, and the variance of the others is that of one sample.
- `batched`: how all points are evaluated in one call. None: one call each. "vmap": by `torch.func.vmap`. "stack": all
  floating arguments, and all results, have one more leading dimension. "cat": they are put one after the other along
  their first dimension, as for functions of rows. All results are in memory at once then.
- `generator` is what random numbers are drawn from; without it, it is torch's own. The same for each way to batch.
- The first time, the forward is also evaluated where it was, and a result that differs is a `ForwardResultError`:
  differences of a random function are noise. `deterministic=False` lets it be random; its variance then adds.
- Half precision is measured in float32, but the forward is given its own dtype.
- The parameters of a module are not moved: they keep autograd's own gradient. Pass them as arguments.
- `torch.compile` breaks its graph there. Second derivatives are refused (`UnsupportedError`), for there are none.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gradoverride._core.binding.options import check_flag
from gradoverride._core.values.precision import wide
from gradoverride.estimators.binding import Estimator, check_options
from gradoverride.estimators.evaluation import Evaluation, Points, like, real, summed

__all__ = ["finite_difference", "spsa", "evolution"]


@dataclass(frozen=True)
class finite_difference(Estimator):
    """The gradient by central differences, one number of the arguments after the other.

        <g, f(x + h e) - f(x - h e)> / 2h   for each e,   h = eps * max(1, |x|)

    >>> import torch, gradoverride as go
    >>> @go.custom_backward(go.estimators.finite_difference())
    ... def energy(x):
    ...     return torch.from_numpy(x.numpy() ** 3).sum()
    >>> x = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    >>> energy(x).backward()
    >>> x.grad
    tensor([ 3.0000, 12.0000], dtype=torch.float64)

    `eps` is by default the third root of the precision of the dtype: 6e-6 in float64, 5e-3 in float32. `central=False`
    takes `f(x + h e) - f(x)` instead, and the square root. Where the forward has steps it finds them, or nothing: for
    those, `evolution` smoothes.

    Cost: 2 calls for each number that wants a gradient (1 if not central), or for each in a sample: see `batch_dims`.
    Bias: of order eps^2 (eps); and rounding errors of the forward, divided by eps. Variance: none.
    """

    eps: float | None = None
    central: bool = True
    batch_dims: int = 0
    batched: str | None = None

    def __post_init__(self) -> None:
        check_options(self)
        check_flag("finite_difference", "central", self.central)

    def gradients(self, evaluation: Evaluation) -> list[Tensor]:
        """One for each of the points."""
        points, count = evaluation.points, len(evaluation.batch)
        slopes: list[list[Tensor]] = [[] for _ in points]

        def pairs() -> Iterator[tuple[Points, Points | None, tuple[int, Tensor]]]:
            for k, point in enumerate(points):
                step = self._step(point)
                for one in _units(real(point), count):
                    upper = moved(point, step * one)
                    lower = moved(point, -step * one) if self.central else point
                    width = wide(real(upper)) - wide(real(lower))
                    other = _with(points, k, lower) if self.central else None
                    yield _with(points, k, upper), other, (k, summed(width * one, count))

        for difference, (k, width) in evaluation.differences(pairs()):
            slopes[k].append(difference.to(width) / width)
        return [
            like(torch.stack(slope, -1).reshape(real(point).shape) if slope else torch.zeros_like(real(point)), point)
            for slope, point in zip(slopes, points, strict=True)
        ]

    def _step(self, point: Tensor) -> Tensor:
        precision = torch.finfo(point.dtype).eps
        eps = self.eps or precision ** (1 / 3 if self.central else 1 / 2)
        return real(point).abs().clamp(min=1) * max(eps, 2 * precision)


@dataclass(frozen=True)
class spsa(Estimator):
    """The gradient by moving all numbers at once, each up or down at random; the mean of `n` such estimates.

        <g, f(x + eps d) - f(x - eps d)> / (2 eps d)   d of -1 and 1

    >>> import torch, gradoverride as go
    >>> draws = torch.Generator().manual_seed(0)
    >>> @go.custom_backward(go.estimators.spsa(n=1000, generator=draws))
    ... def energy(x):
    ...     return torch.from_numpy(x.numpy() ** 3).sum()
    >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> energy(x).backward()
    >>> x.grad.round()
    tensor([ 3., 12.])

    `eps` must be smaller than what the forward bends in, and larger than its steps and rounding errors; default 0.01.
    (A number whose dtype cannot tell that far apart is moved by two units of its last digit.)

    Cost: 2 n calls. Bias: of order eps^2. Variance: that of one number is the sum of the squares of the derivatives by
    all others (of a sample, see `batch_dims`), divided by n.

    Source: Spall, "Multivariate stochastic approximation using a simultaneous perturbation gradient approximation"
    (1992).
    """

    n: int = 1
    eps: float = 0.01
    generator: torch.Generator | None = field(default=None, repr=False)
    batch_dims: int = 0
    batched: str | None = None
    deterministic: bool = True

    def __post_init__(self) -> None:
        check_options(self)

    def gradients(self, evaluation: Evaluation) -> list[Tensor]:
        """One for each of the points."""
        return evaluation.weighted(evaluation.differences(self._pairs(evaluation.points)), self.n)

    def _pairs(self, points: Points) -> Iterator[tuple[Points, Points, Points]]:
        steps = [_step(self.eps, point) for point in points]
        for _ in range(self.n):
            offsets = [step * signs(point, self.generator) for step, point in zip(steps, points, strict=True)]
            upper = [moved(point, offset) for point, offset in zip(points, offsets, strict=True)]
            lower = [moved(point, -offset) for point, offset in zip(points, offsets, strict=True)]
            yield upper, lower, [width.reciprocal() for width in widths(upper, lower)]


@dataclass(frozen=True)
class evolution(Estimator):
    """The gradient of the forward as normal noise blurs it: that of `E f(x + sigma d)`. The mean of `n` estimates.

        <g, f(x + sigma d) - f(x - sigma d)> / (2 sigma) d   d of a standard normal distribution

    For forwards with steps and kinks, which have no useful gradient of their own.

    >>> import torch, gradoverride as go
    >>> draws = torch.Generator().manual_seed(0)
    >>> rule = go.estimators.evolution(n=1000, sigma=1.0, generator=draws)
    >>> steps = go.custom_backward(rule)(lambda x: x.round())
    >>> x = torch.tensor(0.2, requires_grad=True)
    >>> steps(x).backward()
    >>> round(x.grad.item(), 1)
    1.0

    `antithetic=False` takes `f(x + sigma d) - f(x)` instead, over sigma. (Where the dtype of a number cannot tell sigma
    apart, it is two units of the number's last digit.)

    Cost: 2 n calls (n if not antithetic). Bias: none for the blurred function; for the forward, where it is smooth, of
    order sigma^2. Variance: as of `spsa` and, for each number, twice the square of its own derivative besides; in
    proportion to 1 / n. Where the forward has steps, it grows as sigma becomes small.

    Source: Nesterov, Spokoiny, "Random gradient-free minimization of convex functions" (2017); antithetic and for
    networks: Salimans et al., "Evolution strategies as a scalable alternative to reinforcement learning" (2017).
    """

    n: int = 16
    sigma: float = 0.1
    antithetic: bool = True
    generator: torch.Generator | None = field(default=None, repr=False)
    batch_dims: int = 0
    batched: str | None = None
    deterministic: bool = True

    def __post_init__(self) -> None:
        check_options(self)
        check_flag("evolution", "antithetic", self.antithetic)

    def gradients(self, evaluation: Evaluation) -> list[Tensor]:
        """One for each of the points."""
        return evaluation.weighted(evaluation.differences(self._pairs(evaluation.points)), self.n)

    def _pairs(self, points: Points) -> Iterator[tuple[Points, Points | None, Points]]:
        sigmas = [wide(_step(self.sigma, point)) for point in points]
        for _ in range(self.n):
            offsets = [sigma * normal(point, self.generator) for sigma, point in zip(sigmas, points, strict=True)]
            upper = [moved(point, offset) for point, offset in zip(points, offsets, strict=True)]
            if self.antithetic:
                lower = [moved(point, -offset) for point, offset in zip(points, offsets, strict=True)]
                apart = zip(widths(upper, lower), sigmas, strict=True)
                yield upper, lower, [width / (2 * sigma) ** 2 for width, sigma in apart]
            else:
                apart = zip(widths(upper, points), sigmas, strict=True)
                yield upper, None, [width / sigma**2 for width, sigma in apart]


# --- moving a point: offsets are real, and of what the dtype can tell apart


def _step(eps: float, point: Tensor) -> Tensor:
    """How far each number is moved: by eps, or what its dtype can tell apart."""
    return (real(point).abs() * (2 * torch.finfo(point.dtype).eps)).clamp(min=eps)


def _units(like: Tensor, count: int) -> Iterator[Tensor]:
    """The unit directions of a sample."""
    sample = like.shape[count:]
    for one in range(math.prod(sample)):
        unit = torch.zeros(math.prod(sample), dtype=like.dtype, device=like.device)
        unit[one] = 1
        yield unit.reshape(sample)


def _with(points: Points, k: int, point: Tensor) -> list[Tensor]:
    return [*points[:k], point, *points[k + 1 :]]


def moved(point: Tensor, offset: Tensor) -> Tensor:
    """The point, moved by a real offset: of a complex one, real and imaginary part."""
    if point.is_complex():
        return torch.view_as_complex((real(point) + offset).contiguous())
    return point + offset.to(point.dtype)


def widths(upper: Points, lower: Points) -> list[Tensor]:
    """How far apart they are, as real numbers: what rounding has left of the offsets."""
    return [wide(real(one)) - wide(real(other)) for one, other in zip(upper, lower, strict=True)]


def normal(point: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard normal noise for each real number of the point."""
    return drawn(torch.randn, wide(real(point)), generator)


def signs(point: Tensor, generator: torch.Generator | None) -> Tensor:
    """-1 or 1 for each real number of the point."""
    bits = drawn(functools.partial(torch.randint, 0, 2), real(point), generator)
    return 2 * bits - 1


def drawn(draw: Callable[..., Tensor], each: Tensor, generator: torch.Generator | None) -> Tensor:
    """A number for each of these, drawn where the generator is."""
    device = each.device if generator is None else generator.device
    return draw(each.shape, generator=generator, dtype=each.dtype, device=device).to(each.device)
