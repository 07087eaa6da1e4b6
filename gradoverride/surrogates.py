"""Surrogates: derivatives for steps and signs, which have none of use. For spiking and for binary networks.

Each is a rule: `g * s'(x)`, where s is a function that stands for the step. One object serves everywhere:

>>> import torch, gradoverride as go
>>> from gradoverride.rules import heaviside
>>> from gradoverride.surrogates import atan
>>> spike = go.straight_through(heaviside, surrogate=atan(2.0))
>>> x = torch.tensor([-1.0, 0.0, 1.0], requires_grad=True)
>>> spike(x)
tensor([0., 1., 1.], grad_fn=<heavisideBackward>)
>>> torch.autograd.grad(spike(x).sum(), x)
(tensor([0.0920, 1.0000, 0.0920]),)

- `straight_through(fn, surrogate=atan())`, `custom_backward(atan())`, an entry of `override` or of a `Registry`: the
  gradient of `fn` is replaced. `edit_gradient(x, atan())`: the gradient of x, times s'(x).
- `surrogate.primitive(x)` is s, for plots and for tests: autograd of it gives the same gradient. It is None for a
  surrogate that has none.
- Input and gradient must have one shape, else `SurrogateError`; complex ones are an `UnsupportedError`.
- The result has the shape and dtype of the two; of half precision it is computed in float32. Where x is inf or nan, and
  g is finite, it is

  |             | -inf      | inf | nan       |
  |-------------|-----------|-----|-----------|
  | `leaky`     | slope * g | g   | slope * g |
  | `clipped`   | 0         | 0   | 0         |
  | `rectangle` | 0         | 0   | g / width |
  | all others  | 0         | 0   | nan       |

  (`fast_sigmoid`, `superspike` and `swish_sign` with a tensor as an option: nan at -inf and inf too.)

- Options out of range are a `RuleOptionError` when the surrogate is made.
- Each is linear in the gradient, so forward mode works, and differentiable again.

The height matters as much as the shape: some have an area of 1, as the step they stand for rises by 1; others a height
of 1. Libraries differ under one name, and each docstring says whose convention it follows. For another factor there is
`chain(scale(factor), surrogate)`.

An option may be a tensor: one for each channel, or an `nn.Parameter` that learns. Its gradient is that of `primitive`,
`sum(g * ds/doption)`; the input's is as ever. What `straight_through` and `rules.spike` make of such a surrogate is an
`nn.Module` with this parameter, to be a part of yours:

>>> class Neuron(torch.nn.Module):
...     def __init__(self):
...         super().__init__()
...         self.fire = go.straight_through(heaviside, surrogate=atan(alpha=torch.nn.Parameter(torch.tensor(2.0))))
...     def forward(self, x):
...         return self.fire(x)
>>> neuron = Neuron()
>>> neuron(x).backward(torch.tensor([1.0, 0.0, 2.0]))
>>> [(name, parameter.grad) for name, parameter in neuron.named_parameters()]
[('fire.surrogate.alpha', tensor(0.0460))]

Elsewhere, as a rule, one with an option that requires grad is refused: a rule has no way to that gradient.

A surrogate of your own derives from `Surrogate` and says what becomes `of` a gradient:

>>> from dataclasses import dataclass
>>> from gradoverride.surrogates import Surrogate
>>> @dataclass(frozen=True)
... class cosine(Surrogate):
...     width: float = 1.0
...     def of(self, grad, x):
...         return grad * torch.cos((x / self.width).clamp(-torch.pi / 2, torch.pi / 2))
>>> torch.autograd.grad(go.straight_through(torch.sign, surrogate=cosine())(x).sum(), x)
(tensor([0.5403, 1.0000, 0.5403]),)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradoverride._core.doors.surrogate_class import (
    Option,
    Surrogate,
    check_interval,
    check_not_negative,
    check_positive,
)
from gradoverride._core.private.transforms import in_batched_autograd, in_functorch

__all__ = [
    "Surrogate",
    "atan",
    "sigmoid",
    "fast_sigmoid",
    "superspike",
    "triangle",
    "piecewise_quadratic",
    "rectangle",
    "gaussian",
    "erf",
    "piecewise_exponential",
    "multi_gaussian",
    "leaky",
    "clipped",
    "approx_sign",
    "swish_sign",
]

# What takes time is each pass over memory, and twice as much if the memory is new. So what is new is written in place,
# and becomes the result at last (`_may_write_into`). There are torch's own derivatives besides, each one kernel. A mask
# of booleans takes nine times as long as one of numbers.
#
# A primitive has no clamp: what that passes at its ends depends on the version of torch.
_aten: Any = torch.ops.aten


# --- steps that rise by 1: the area below s' is 1 ---


@dataclass(frozen=True)
class atan(Surrogate):
    """The derivative of an arc tangent from 0 to 1: `g (alpha / 2) / (1 + (pi alpha x / 2)^2)`.

    >>> import torch, gradoverride as go
    >>> from gradoverride.surrogates import atan
    >>> x = torch.tensor([0.0, 1.0], requires_grad=True)
    >>> torch.autograd.grad(go.straight_through(torch.sign, surrogate=atan())(x).sum(), x)
    (tensor([1.0000, 0.0920]),)

    `alpha` (default 2) is twice the height. This is what spikingjelly and snntorch compute; the formula that snntorch
    documents has 1 / pi in the place of alpha / 2.

    Source: Fang et al., "Incorporating learnable membrane time constant to enhance learning of spiking neural
    networks" (2021).
    """

    alpha: Option = 2.0

    def of(self, grad: Tensor, x: Tensor) -> Tensor:
        # The reciprocal, 2 / alpha + (pi^2 alpha / 2) x^2, is one kernel.
        alpha: Any = self.alpha
        return _over(grad, torch.addcmul(x.new_full((), 2 / alpha), x, x, value=math.pi * math.pi * alpha / 2))

    def primitive(self, x: Tensor) -> Tensor:
        """`atan(pi alpha x / 2) / pi + 1/2`."""
        return torch.atan(math.pi * self.alpha / 2 * x) / math.pi + 0.5


@dataclass(frozen=True)
class sigmoid(Surrogate):
    """The derivative of a sigmoid: `g k s (1 - s)` with `s = sigmoid(k x)`. No x is too large for it.

    >>> import torch, gradoverride as go
    >>> from gradoverride.surrogates import sigmoid
    >>> x = torch.tensor([0.0, 1.0, -1000.0], requires_grad=True)
    >>> torch.autograd.grad(go.straight_through(torch.sign, surrogate=sigmoid())(x).sum(), x)
    (tensor([1.0000, 0.0707, 0.0000]),)

    `k` (default 4, as in spikingjelly; snntorch has 25) is four times the height.

    Source: Neftci, Mostafa, Zenke, "Surrogate gradient learning in spiking neural networks" (2019).
    """

    k: Option = 4.0

    def of(self, grad: Tensor, x: Tensor) -> Tensor:
        s = (x * self.k).sigmoid_()
        if _may_write_into(s, grad):
            _aten.sigmoid_backward.grad_input(grad, s, grad_input=s)
        else:
            s = _aten.sigmoid_backward(grad, s)
        return s.mul_(self.k)

    def primitive(self, x: Tensor) -> Tensor:
        """`sigmoid(k x)`."""
        return torch.sigmoid(self.k * x)


@dataclass(frozen=True)
class piecewise_quadratic(Surrogate):
    """A triangle with an area of 1: `g max(0, alpha - alpha^2 |x|)`.

    >>> import torch, gradoverride as go
    >>> from gradoverride.surrogates import piecewise_quadratic
    >>> x = torch.tensor([0.0, 0.25, 1.0], requires_grad=True)
    >>> torch.autograd.grad(go.straight_through(torch.sign, surrogate=piecewise_quadratic())(x).sum(), x)
    (tensor([1.0000, 0.7500, 0.0000]),)

    `alpha` (default 1) is the height; it ends at -1 / alpha and 1 / alpha.

    Source: Esser et al., "Convolutional networks for fast, energy-efficient neuromorphic computing" (2016).
    """

    alpha: Option = 1.0

    def of(self, grad: Tensor, x: Tensor) -> Tensor:
        return _triangle(grad, x, self.alpha, 1 / self.alpha)

    def primitive(self, x: Tensor) -> Tensor:
        """Two parabolas, from 0 to 1."""
        return _parabolas(x, self.alpha, 1 / self.alpha) + 0.5


@dataclass(frozen=True)
class rectangle(Surrogate):
    """The gradient, where x is nearer to 0 than half of `width`, divided by it: `g / width` where `|x| < width / 2`.

    >>> import torch, gradoverride as go
    >>> from gradoverride.surrogates import rectangle
    >>> x = torch.tensor([0.0, 0.25, 0.5], requires_grad=True)
    >>> torch.autograd.grad(go.straight_through(torch.sign, surrogate=rectangle())(x).sum(), x)
    (tensor([1., 1., 0.]),)

    `width` is 1 by default. spikingjelly's `Rect` has 1 / width for an option.

    Source: Wu et al., "Spatio-temporal backpropagation for training high-performance spiking neural networks" (2018),
    h1 (without the ends, as there; `clipped` has them).
    """

    width: Option = 1.0

    right_in_half = True

    def of(self, grad: Tensor, x: Tensor) -> Tensor:
        found: Tensor = _aten.hardtanh_backward(grad, x, -self.width / 2, self.width / 2)  # without the ends
        return found if self.width == 1 else found.div_(self.width)

    def primitive(self, x: Tensor) -> Tensor:
        """`x / width + 1/2`, between 0 and 1."""
        return torch.where(x.abs() >= self.width / 2, (x > 0).to(x.dtype), x / self.width + 0.5)


@dataclass(frozen=True)
class gaussian(Surrogate):
    """The density of a normal distribution: `g exp(-x^2 / (2 sigma^2)) / (sqrt(2 pi) sigma)`.

    >>> import torch, gradoverride as go
    >>> from gradoverride.surrogates import gaussian
    >>> x = torch.tensor([0.0, 0.5], requires_grad=True)
    >>> torch.autograd.grad(go.straight_through(torch.sign, surrogate=gaussian())(x).sum(), x)
    (tensor([0.7979, 0.4839]),)

    `sigma` is 0.5 by default. Some multiply it by 0.5: `chain(scale(0.5), gaussian())`.

    Source: Yin, Corradi, Bohte, "Effective and efficient computation with multiple-timescale spiking recurrent neural
    networks" (2020).
    """

    sigma: Option = 0.5

    def of(self, grad: Tensor, x: Tensor) -> Tensor:
        return _times(grad, _density(x, self.sigma))

    def primitive(self, x: Tensor) -> Tensor:
        """The distribution, from 0 to 1."""
        return torch.special.ndtr(x / self.sigma)


@dataclass(frozen=True)
class erf(Surrogate):
    """The derivative of an error function from 0 to 1: `g (alpha / sqrt(pi)) exp(-alpha^2 x^2)`.

    That is `gaussian(1 / (sqrt(2) alpha))`.

    >>> import torch, gradoverride as go
    >>> from gradoverride.surrogates import erf
    >>> x = torch.tensor([0.0, 0.5], requires_grad=True)
    >>> torch.autograd.grad(go.straight_through(torch.sign, surrogate=erf())(x).sum(), x)
    (tensor([1.1284, 0.4151]),)

    `alpha` is 2 by default, as in spikingjelly.

    Source: Wu et al. (2018), h4.
    """

    alpha: Option = 2.0

    def of(self, grad: Tensor, x: Tensor) -> Tensor:
        return _times(grad, _density(x, 1 / (math.sqrt(2) * self.alpha)))

    def primitive(self, x: Tensor) -> Tensor:
        """`(erf(alpha x) + 1) / 2`."""
        return torch.erf(self.alpha * x) / 2 + 0.5


@dataclass(frozen=True)
class piecewise_exponential(Surrogate):
    """Exponentials to both sides: `g (alpha / 2) exp(-alpha |x|)`.

    >>> import torch, gradoverride as go
    >>> from gradoverride.surrogates import piecewise_exponential
    >>> x = torch.tensor([0.0, 1.0], requires_grad=True)
    >>> torch.autograd.grad(go.straight_through(torch.sign, surrogate=piecewise_exponential())(x).sum(), x)
    (tensor([0.5000, 0.1839]),)

    `alpha` (default 1) is twice the height.

    Source: Shrestha, Orchard, "SLAYER: spike layer error reassignment in time" (2018).
    """

    alpha: Option = 1.0

    def of(self, grad: Tensor, x: Tensor) -> Tensor:
        alpha: Any = self.alpha
        return _times(grad, x.abs().mul_(-alpha).add_(math.log(alpha / 2)).exp_())

    def primitive(self, x: Tensor) -> Tensor:
        """`exp(alpha x) / 2` below 0, `1 - exp(-alpha x) / 2` above."""
        side = torch.ones_like(x).copysign(x.detach())  # not abs(), whose derivative at 0 is 0
        return (1 + side - side * torch.exp(-self.alpha * side * x)) / 2


@dataclass(frozen=True)
class multi_gaussian(Surrogate):
    """A normal density with two wide ones of negative sign beside it: `g ((1 + h) N(0, sigma) - h N(sigma, s sigma) -
    h N(-sigma, s sigma))`, where N(mean, deviation) is the density at x.

    >>> import torch, gradoverride as go
    >>> from gradoverride.surrogates import multi_gaussian
    >>> x = torch.tensor([0.0, 1.5], requires_grad=True)
    >>> torch.autograd.grad(go.straight_through(torch.sign, surrogate=multi_gaussian())(x).sum(), x)
    (tensor([ 0.8782, -0.0246]),)

    Defaults: sigma 0.5, h 0.15, s 6, as in the paper; the area is 1 - h. The code of its authors multiplies all by 0.5:
    `chain(scale(0.5), multi_gaussian())`. `h` must not be negative.

    Source: Yin, Corradi, Bohte, "Accurate and efficient time-domain classification with adaptive spiking recurrent
    neural networks" (2021).
    """

    sigma: Option = 0.5
    h: Option = 0.15
    s: Option = 6.0

    def __post_init__(self) -> None:
        check_not_negative(self, "h")
        check_positive(self, "sigma")
        check_positive(self, "s")

    def of(self, grad: Tensor, x: Tensor) -> Tensor:
        wide = self.s * self.sigma
        beside = _density(x - self.sigma, wide) + _density(x + self.sigma, wide)
        return grad * ((1 + self.h) * _density(x, self.sigma) - self.h * beside)

    def primitive(self, x: Tensor) -> Tensor:
        """The same sum of distributions, from 0 to 1 - h."""
        wide = self.s * self.sigma
        beside = torch.special.ndtr((x - self.sigma) / wide) + torch.special.ndtr((x + self.sigma) / wide)
        return (1 + self.h) * torch.special.ndtr(x / self.sigma) - self.h * beside


# --- of a height that is chosen apart from the width ---


@dataclass(frozen=True)
class fast_sigmoid(Surrogate):
    """The derivative of `x / (1 + k |x|)`: `g / (1 + k |x|)^2`. Its height is 1 for every k.

    >>> import torch, gradoverride as go
    >>> from gradoverride.surrogates import fast_sigmoid
    >>> x = torch.tensor([0.0, 0.04], requires_grad=True)
    >>> torch.autograd.grad(go.straight_through(torch.sign, surrogate=fast_sigmoid())(x).sum(), x)
    (tensor([1.0000, 0.2500]),)

    `k` is 25 by default, as in snntorch. What spikingjelly computes for `SoftSign(alpha)` is `chain(scale(alpha / 2),
    fast_sigmoid(alpha))`, and for `SuperSpike(alpha)` it is `chain(scale(alpha), fast_sigmoid(1))`.

    Source: Zenke, Ganguli, "SuperSpike: supervised learning in multilayer spiking neural networks" (2018).
    """

    k: Option = 25.0

    def of(self, grad: Tensor, x: Tensor) -> Tensor:
        return _over(grad, x.abs().mul_(self.k).add_(1).square_())

    def primitive(self, x: Tensor) -> Tensor:
        """`x / (1 + k |x|)`, from -1 / k to 1 / k."""
        return x / (1 + self.k * x.abs())


@dataclass(frozen=True)
class superspike(fast_sigmoid):
    """`fast_sigmoid` under the name of the paper it is from, with k = 100, as Norse and its author's tutorials have it.

    >>> import torch, gradoverride as go
    >>> from gradoverride.surrogates import superspike
    >>> x = torch.tensor([0.0, 0.01], requires_grad=True)
    >>> torch.autograd.grad(go.straight_through(torch.sign, surrogate=superspike())(x).sum(), x)
    (tensor([1.0000, 0.2500]),)
    """

    k: Option = 100.0


@dataclass(frozen=True)
class triangle(Surrogate):
    """A triangle: `g height max(0, 1 - |x| / width)`.

    >>> import torch, gradoverride as go
    >>> from gradoverride.surrogates import triangle
    >>> x = torch.tensor([0.0, 0.5, 1.0], requires_grad=True)
    >>> torch.autograd.grad(go.straight_through(torch.sign, surrogate=triangle())(x).sum(), x)
    (tensor([0.3000, 0.1500, 0.0000]),)

    `height` (the papers' gamma, which dampens) is 0.3, `width` 1: x counts from the threshold, in units of it. With
    height 1 it is that of Esser (2016). snntorch's `triangular` is none: it is 1 below 0, and -1 above.

    Source: Bellec et al., "Long short-term memory and learning-to-learn in networks of spiking neurons" (2018).
    """

    height: Option = 0.3
    width: Option = 1.0

    def of(self, grad: Tensor, x: Tensor) -> Tensor:
        return _triangle(grad, x, self.height, self.width)

    def primitive(self, x: Tensor) -> Tensor:
        """Two parabolas, from 0 to height * width."""
        return _parabolas(x, self.height, self.width) + self.height * self.width / 2


@dataclass(frozen=True)
class leaky(Surrogate):
    """The derivative of a leaky ReLU: `g` where `x > 0`, else `slope * g`.

    >>> import torch, gradoverride as go
    >>> from gradoverride.surrogates import leaky
    >>> x = torch.tensor([-1.0, 0.0, 1.0], requires_grad=True)
    >>> torch.autograd.grad(go.straight_through(torch.sign, surrogate=leaky())(x).sum(), x)
    (tensor([0.1000, 0.1000, 1.0000]),)

    `slope` is 0.1 by default, and must not be negative. At 0 it is `slope`, as in torch and in the code of snntorch;
    spikingjelly's `LeakyKReLU` has the other one there.

    Source: Eshraghian et al., "Training spiking neural networks using lessons from deep learning" (2023).
    """

    slope: Option = 0.1

    right_in_half = True

    def __post_init__(self) -> None:
        check_not_negative(self, "slope")

    def of(self, grad: Tensor, x: Tensor) -> Tensor:
        found: Tensor = _aten.leaky_relu_backward(grad, x, self.slope, False)
        return found

    def primitive(self, x: Tensor) -> Tensor:
        """`x` above 0, `slope * x` below."""
        return torch.where(x > 0, x, self.slope * x)


# --- signs, which rise by 2 ---


@dataclass(frozen=True)
class clipped(Surrogate):
    """The gradient where x is in an interval, ends included: `g` where `lo <= x <= hi`, else 0.

    >>> import torch, gradoverride as go
    >>> from gradoverride.surrogates import clipped
    >>> x = torch.tensor([-2.0, -1.0, 0.5], requires_grad=True)
    >>> torch.autograd.grad(go.straight_through(torch.sign, surrogate=clipped())(x).sum(), x)
    (tensor([0., 1., 1.]),)

    Defaults: -1 and 1. `lo` must be less than `hi`. Outside it is 0 even where the gradient is inf or nan.

    Source: Courbariaux et al., "Binarized neural networks" (2016), equation 4.
    """

    lo: Option = -1.0
    hi: Option = 1.0

    right_in_half = True

    def __post_init__(self) -> None:
        check_interval(self, "lo", "hi")

    def of(self, grad: Tensor, x: Tensor) -> Tensor:
        lo: Any = self.lo
        if in_functorch():  # `vmap` has no rule for what follows
            return torch.where((x >= lo) & (x <= self.hi), grad, 0)
        within = x.clamp(lo, self.hi).eq_(x)  # 1 or 0, in the dtype of x
        found: Tensor = _aten.threshold_backward(grad, within, 0)  # 0 where that is not above 0
        return found

    def primitive(self, x: Tensor) -> Tensor:
        """x, between lo and hi."""
        lo, hi = [torch.as_tensor(end, dtype=x.dtype, device=x.device) for end in (self.lo, self.hi)]
        return torch.where((x >= lo) & (x <= hi), x, torch.where(x < lo, lo, hi))


@dataclass(frozen=True)
class approx_sign(Surrogate):
    """The derivative of two parabolas from -1 to 1: `g max(0, 2 - 2 |x|)`. That is `triangle(2, 1)`.

    >>> import torch, gradoverride as go
    >>> from gradoverride.surrogates import approx_sign
    >>> x = torch.tensor([0.0, 0.5, 1.0], requires_grad=True)
    >>> torch.autograd.grad(go.straight_through(torch.sign, surrogate=approx_sign())(x).sum(), x)
    (tensor([2., 1., 0.]),)

    Source: Liu et al., "Bi-Real net: enhancing the performance of 1-bit CNNs with improved representational capability
    and advanced training algorithm" (2018).
    """

    def of(self, grad: Tensor, x: Tensor) -> Tensor:
        return _triangle(grad, x, 2, 1)

    def primitive(self, x: Tensor) -> Tensor:
        """`2 x + x^2` below 0, `2 x - x^2` above, between -1 and 1."""
        return _parabolas(x, 2, 1)


@dataclass(frozen=True)
class swish_sign(Surrogate):
    """The derivative of a sign made of a swish: `g beta (2 - t tanh(t / 2)) / (1 + cosh(t))` with `t = beta x`.

    It is negative where |x| is large. No x is too large for it.

    >>> import torch, gradoverride as go
    >>> from gradoverride.surrogates import swish_sign
    >>> x = torch.tensor([0.0, 1.0, -1000.0], requires_grad=True)
    >>> torch.autograd.grad(go.straight_through(torch.sign, surrogate=swish_sign())(x).sum(), x)
    (tensor([ 5.0000, -0.1950, -0.0000]),)

    `beta` (default 5) is the height.

    Source: Darabi et al., "BNN+: improved binary network training" (2018).
    """

    beta: Option = 5.0

    def of(self, grad: Tensor, x: Tensor) -> Tensor:
        # 1 + cosh(t) has no room for a large t; its reciprocal is (1 - u^2) / 2 with u = tanh(t / 2), which is 0 there.
        beta: Any = self.beta
        end = min(800 / beta, 65504)  # where it is 0 in every dtype
        half = x.clamp(-end, end).mul_(beta / 2)
        u = torch.tanh(half)
        return _aten.tanh_backward(grad, u) * torch.rsub(half * u, beta, alpha=beta)

    def primitive(self, x: Tensor) -> Tensor:
        """`2 s (1 + t (1 - s)) - 1` with `s = sigmoid(t)`, `t = beta x`."""
        t = self.beta * x
        s = torch.sigmoid(t)
        return 2 * s * (1 + t * (1 - s)) - 1


# --- shapes that several share ---


def _triangle(grad: Tensor, x: Tensor, height: Any, width: Any) -> Tensor:
    below = x.abs().sub_(width).clamp_max_(0)
    out = below if _may_write_into(below, grad) else None
    return torch.addcmul(x.new_zeros(()), grad, below, value=-height / width, out=out)  # 0 added: no -0.0


def _parabolas(x: Tensor, height: Any, width: Any) -> Tensor:
    """What `_triangle` is the derivative of; it is 0 at 0."""
    within = torch.where(x.abs() > width, width * torch.sign(x), x)
    return height * within * (1 - within.abs() / (2 * width))


def _density(x: Tensor, sigma: Any) -> Tensor:
    height = 1 / (math.sqrt(2 * math.pi) * sigma)
    return torch.addcmul(x.new_full((), math.log(height)), x, x, value=-0.5 / (sigma * sigma)).exp_()


def _times(grad: Tensor, slope: Tensor) -> Tensor:
    """Their product. `slope` is nobody else's."""
    return slope.mul_(grad) if _may_write_into(slope, grad) else slope * grad


def _over(grad: Tensor, reciprocal: Tensor) -> Tensor:
    """Their quotient. `reciprocal` is nobody else's."""
    return torch.div(grad, reciprocal, out=reciprocal) if _may_write_into(reciprocal, grad) else grad / reciprocal


def _may_write_into(new: Tensor, grad: Tensor) -> bool:
    """Whether what becomes of both fits into the memory of `new`, and no graph needs what is there."""
    # Under vmap, the older one too, the gradient may have more elements; a compiler sees to memory itself.
    recorded = torch.is_grad_enabled() or torch.compiler.is_dynamo_compiling() or in_functorch()
    return not (recorded or in_batched_autograd()) and type(new) is Tensor and new.dtype is grad.dtype
