"""Quantizers with a gradient: for training with the weights and activations that will be stored in few bits.

- `fake_quantize` has a scale that is given, `lsq` one that is learnt; `pact` learns where activations are clipped;
  `dorefa_weight` and `dorefa_activation` need neither; `magnitude_aware_sign` has one bit and a size for each filter;
- `ewgs` is a rule, for a quantizer of your own.

>>> import torch
>>> from gradoverride.rules import lsq, lsq_step
>>> w = torch.tensor([-0.9, -0.2, 0.1, 0.6], requires_grad=True)
>>> step = torch.nn.Parameter(torch.tensor(0.5))
>>> y = lsq(w, step, bits=2)
>>> y.tolist()
[-1.0, -0.0, 0.0, 0.5]
>>> torch.autograd.grad(y.sum(), (w, step))
(tensor([1., 1., 1., 0.]), tensor(0.5000))

Alike in all of them:

- Values are rounded to the nearest, halves to even, and are those of the levels to the last bit of the dtype. Half
  precision is computed in float32: it cannot tell which of many levels is nearest.
- Scales, steps and bounds are numbers, or tensors that broadcast to the shape of x: one for each channel of a weight
  (results, inputs) has the shape (results, 1). What learns them must keep them larger than 0.
- The result has the dtype of x, whatever that of its scale is.
- nan stays nan. Where there are bounds, inf is clipped to them, and the gradient of x is 0 beyond; each says what it is
  at the ends.
- Options out of range are a `RuleOptionError`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gradoverride._core.binding.options import (
    check,
    check_broadcasts,
    check_dim,
    check_dim_of,
    check_flag,
    check_floating,
    is_integer,
    is_number,
)
from gradoverride._core.binding.rule import writes_nothing
from gradoverride._core.private.dynamo import fail
from gradoverride._core.values.precision import wide
from gradoverride.decorators import custom_backward, straight_through
from gradoverride.errors import RuleOptionError
from gradoverride.rules.each import check_one_for_each
from gradoverride.surrogates import clipped

__all__ = [
    "fake_quantize",
    "lsq",
    "lsq_step",
    "pact",
    "dorefa_weight",
    "dorefa_activation",
    "magnitude_aware_sign",
    "ewgs",
]

# `hardtanh_backward` is g strictly between two bounds, else 0, in one kernel. (`hardtanh_` stands for `clamp_`, which
# vmap runs one by one.)
_aten: Any = torch.ops.aten


# --- a scale that is given ---


def fake_quantize(
    x: Tensor,
    scale: float | Tensor,
    zero_point: int | Tensor = 0,
    quant_min: int = -128,
    quant_max: int = 127,
) -> Tensor:
    """x as it is after quantization to integers from `quant_min` to `quant_max` and back; clipped straight-through.

    The value is `(clamp(round(x / scale) + zero_point, quant_min, quant_max) - zero_point) * scale`. The gradient is g
    where the integer is not clipped, else 0.

    >>> import torch
    >>> from gradoverride.rules import fake_quantize
    >>> x = torch.tensor([-0.3, 0.24, 0.9], requires_grad=True)
    >>> y = fake_quantize(x, 0.25, quant_min=-2, quant_max=1)
    >>> y.tolist()
    [-0.25, 0.25, 0.25]
    >>> torch.autograd.grad(y.sum(), x)
    (tensor([1., 1., 0.]),)

    Bounds and order are those of `torch.fake_quantize_per_tensor_affine`, and so is where the gradient passes: up to
    half a step beyond the ends, for that is still rounded to them. (In TensorFlow, and in `lsq`, it passes up to the
    ends alone.) That function takes 1 / scale in float32; this one divides, in float32 or float64.

    `scale` is larger than 0, `zero_point` an integer within the bounds. Neither gets a gradient: a tensor that requires
    one is an error.

    Source: Jacob et al., "Quantization and training of neural networks for efficient integer-arithmetic-only
    inference" (2018).
    """
    fits = is_integer(quant_min) and is_integer(quant_max) and quant_min < quant_max
    check("fake_quantize", "quant_min' and 'quant_max", (quant_min, quant_max), fits, "integers with min < max")
    check_floating("fake_quantize", "x", x)
    if isinstance(scale, Tensor):
        _check_tensor("fake_quantize", "scale", scale, x)
    else:
        check("fake_quantize", "scale", scale, is_number(scale) and scale > 0, "a tensor or a number larger than 0")
    if isinstance(zero_point, Tensor):
        _check_tensor("fake_quantize", "zero_point", zero_point, x)
    else:
        fits = is_integer(zero_point) and quant_min <= zero_point <= quant_max
        check("fake_quantize", "zero_point", zero_point, fits, "a tensor or an integer within the bounds")
    if isinstance(scale, Tensor) or isinstance(zero_point, Tensor):
        scale, zero_point = _as_tensor(scale, x), _as_tensor(zero_point, x)
        return _fake_quantize_by_tensors(x, scale, zero_point, quant_min, quant_max)
    return _fake_quantize(x, scale, zero_point, quant_min, quant_max)


@writes_nothing
def _fake_quantize_backward(
    grad_output: Tensor, x: Tensor, scale: Any, zero_point: Any, quant_min: int, quant_max: int
) -> Tensor:
    level = _level(x, scale, zero_point)
    grad_x: Tensor = _aten.hardtanh_backward(grad_output.to(level.dtype), level, quant_min - 0.5, quant_max + 0.5)
    return grad_x.to(x.dtype)


@writes_nothing
def _fake_quantize_by_tensors_backward(
    grad_output: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int
) -> tuple[Tensor, None, None]:
    return _fake_quantize_backward(grad_output, x, scale, zero_point, quant_min, quant_max), None, None


def _level(x: Tensor, scale: Any, zero_point: Any) -> Tensor:
    level: Tensor = (wide(x) / scale).round_().add_(zero_point)
    return level


@custom_backward(_fake_quantize_backward)
def _fake_quantize(x: Tensor, scale: float, zero_point: int, quant_min: int, quant_max: int) -> Tensor:
    level = F.hardtanh_(_level(x, scale, zero_point), quant_min, quant_max)
    return level.sub_(zero_point).mul_(scale).to(x.dtype)


@custom_backward(_fake_quantize_by_tensors_backward)
def _fake_quantize_by_tensors(x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int) -> Tensor:
    level = F.hardtanh_(_level(x, scale, zero_point), quant_min, quant_max)
    return level.sub_(zero_point).mul_(scale).to(x.dtype)


# --- a step that is learnt ---


def lsq(x: Tensor, step: Tensor, bits: int, *, signed: bool = True, count: int | None = None) -> Tensor:
    """x in `bits` bits: `clamp(round(x / step), -Qn, Qp) * step`. The gradient teaches `step` too.

    Signed, `Qn = 2^(bits - 1)` and `Qp = 2^(bits - 1) - 1`; unsigned, for what comes from a ReLU, 0 and `2^bits - 1`.
    The gradients are

    - of x: `g` where `-Qn < x / step < Qp`, else 0;
    - of step: the sum over `g * (round(x / step) - x / step)` there, `-Qn g` below and `Qp g` above, at the ends
      too; times `1 / sqrt(N Qp)`, so that steps and weights learn alike.

    >>> import torch
    >>> from gradoverride.rules import lsq
    >>> x = torch.tensor([0.2, 3.0], requires_grad=True)
    >>> step = torch.tensor(0.5, requires_grad=True)
    >>> y = lsq(x, step, bits=2, signed=False, count=3)
    >>> y.tolist()
    [0.0, 1.5]
    >>> torch.autograd.grad(y.sum(), (x, step))
    (tensor([1., 0.]), tensor(0.8667))

    `bits` is from 2 (unsigned 1) to 16. `lsq_step` gives a step to begin with. `count` is the paper's N, by default how
    many values of x share a step, as in most code; for activations the paper has the features of one example alone.
    At the ends others let the gradient of x pass.

    Source: Esser et al., "Learned step size quantization" (2019), equations 1 to 5.
    """
    high = _largest("lsq", bits, signed)
    low = -high - 1 if signed else 0
    check_floating("lsq", "x", x)
    check_floating("lsq", "step", step, "a real floating tensor (for a number there is fake_quantize)")
    check_broadcasts("lsq", "step", step, x, "x")
    fits = count is None or (is_integer(count) and count > 0)
    check("lsq", "count", count, fits, "None or an integer larger than 0")
    if count is None:
        count = max(x.numel() // max(step.numel(), 1), 1)  # of no values too
    return _lsq(x, step, low, high, 1 / math.sqrt(count * high))


@writes_nothing
def _lsq_backward(
    grad_output: Tensor, x: Tensor, step: Tensor, low: int, high: int, grad_scale: float
) -> tuple[Tensor, Tensor]:
    scaled = F.hardtanh_(wide(x) / step, low, high)
    grad_output = grad_output.to(scaled.dtype)
    grad_x: Tensor = _aten.hardtanh_backward(grad_output, scaled, low, high)
    # Where x is clipped, grad_x is 0, and `round(scaled)` is -Qn or Qp.
    grad_step = grad_output * scaled.round() - grad_x * scaled
    return grad_x.to(x.dtype), (grad_step.sum_to_size(step.shape) * grad_scale).to(step.dtype)


@custom_backward(_lsq_backward)
def _lsq(x: Tensor, step: Tensor, low: int, high: int, grad_scale: float) -> Tensor:
    return F.hardtanh_(wide(x) / step, low, high).round_().mul_(step).to(x.dtype)


def lsq_step(x: Tensor, bits: int, *, signed: bool = True, dim: int | tuple[int, ...] | None = None) -> Tensor:
    """A step for `lsq` to begin with: `2 mean(|x|) / sqrt(Qp)`, without a gradient.

    >>> import torch
    >>> from gradoverride.rules import lsq_step
    >>> w = torch.tensor([[0.5, -1.5], [2.0, 2.0]])
    >>> lsq_step(w, bits=2)
    tensor(3.)
    >>> lsq_step(w, bits=2, dim=1)
    tensor([[2.],
            [4.]])

    `dim`: over which dimensions the mean is, which stay with a size of 1; by default all.

    Source: Esser et al. (2019), section 2.1.
    """
    high = _largest("lsq_step", bits, signed)
    check_dim("lsq_step", dim)
    check_floating("lsq_step", "x", x)
    check_dim_of("lsq_step", dim, x, "x")
    size = x.detach().abs()
    mean = size.mean() if dim is None else size.mean(dim, keepdim=True)
    return mean * (2 / math.sqrt(high))


# --- activations whose clip is learnt ---


def pact(x: Tensor, alpha: Tensor, bits: int) -> Tensor:
    """x clipped to 0 and `alpha`, in `2^bits` levels from one to the other. The gradient teaches `alpha` too.

    The value is `round(clamp(x / alpha, 0, 1) n) / n * alpha`, `n = 2^bits - 1`. The gradient of x is g where
    `0 < x < alpha`, else 0; that of alpha is the sum of g where `x >= alpha`.

    >>> import torch
    >>> from gradoverride.rules import pact
    >>> x = torch.tensor([-1.0, 2.4, 9.0], requires_grad=True)
    >>> alpha = torch.tensor(6.0, requires_grad=True)
    >>> y = pact(x, alpha, bits=2)
    >>> y.tolist()
    [0.0, 2.0, 6.0]
    >>> torch.autograd.grad(y.sum(), (x, alpha))
    (tensor([0., 1., 0.]), tensor(1.))

    It stands in the place of a ReLU. `bits` is from 1 to 16. The paper keeps alpha small by a weight decay of its own.

    Source: Choi et al., "PACT: parameterized clipping activation for quantized neural networks" (2018), equations 1 to
    3 (which leave the gradient of x at the ends open: here it is 0, as that of a ReLU and as alpha has it).
    """
    _check_bits("pact", bits, 1)
    check_floating("pact", "x", x)
    check_floating("pact", "alpha", alpha, "a real floating tensor (for a number there is fake_quantize)")
    check_broadcasts("pact", "alpha", alpha, x, "x")
    return _pact(x, alpha, 2**bits - 1)


@writes_nothing
def _pact_backward(grad_output: Tensor, x: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    ratio = wide(x) / alpha
    grad_output = grad_output.to(ratio.dtype)
    grad_x: Tensor = _aten.hardtanh_backward(grad_output, ratio, 0, 1)
    below_one = 1 - torch.finfo(ratio.dtype).eps / 2  # the next number
    above: Tensor = _aten.threshold_backward(grad_output, ratio, below_one)  # g where it is larger, else 0
    return grad_x.to(x.dtype), above.sum_to_size(alpha.shape).to(alpha.dtype)


@custom_backward(_pact_backward)
def _pact(x: Tensor, alpha: Tensor, top: int) -> Tensor:
    return F.hardtanh_(wide(x) / alpha, 0, 1).mul_(top).round_().div_(top).mul_(alpha).to(x.dtype)


# --- without anything to be learnt or given ---


def dorefa_weight(w: Tensor, bits: int) -> Tensor:
    """Weights in `2^bits` levels from -1 to 1: `2 round(n u) / n - 1`, where `u = tanh(w) / (2 max |tanh(w)|) + 1/2`
    and `n = 2^bits - 1`. The gradient is that of the same without `round`.

    >>> import torch
    >>> from gradoverride.rules import dorefa_weight
    >>> w = torch.tensor([-2.0, 0.1, 0.5], requires_grad=True)
    >>> y = dorefa_weight(w, bits=2)
    >>> y.tolist()
    [-1.0, 0.3333333432674408, 0.3333333432674408]
    >>> torch.autograd.grad(y[1], w)
    (tensor([0.0076, 1.0270, 0.0000]),)

    The maximum is over all of w and has its share of the gradient, as in the authors' code. With `bits` 1 the value is
    `sign(w) mean(|w|)`, 0 counting as positive, and the gradient passes as it comes. `bits` is from 1 to 16.

    For the gradients, which the paper quantizes too, there is the rule `quantize`, whose levels are symmetric and have
    0 among them.

    Source: Zhou et al., "DoReFa-Net: training low bitwidth convolutional neural networks with low bitwidth gradients"
    (2016), equations 5 to 9.
    """
    _check_bits("dorefa_weight", bits, 1)
    check_floating("dorefa_weight", "w", w)
    if bits == 1:
        return _signs_of_mean_size(w)
    bounded = torch.tanh(wide(w))
    if w.numel() == 0:  # which has no largest value
        return bounded.to(w.dtype)
    largest = bounded.abs().max().clamp(min=torch.finfo(bounded.dtype).tiny)  # of zeros 0 / 0 is to be 0
    return _to_levels(bounded / largest, 2**bits - 1).to(w.dtype)


@straight_through
def _signs_of_mean_size(w: Tensor) -> Tensor:
    return torch.sign(w).add_(0.5).sign_().mul_(w.abs().mean())


@straight_through
def _to_levels(x: Tensor, top: int = 1) -> Tensor:
    # From -1 to 1: as one quotient of integers each is right to the last bit.
    return (x / 2).add_(0.5).mul_(top).round_().mul_(2).sub_(top).div_(top)


def dorefa_activation(x: Tensor, bits: int) -> Tensor:
    """x clipped to 0 and 1, in `2^bits` levels: `round(n clamp(x, 0, 1)) / n`, `n = 2^bits - 1`.

    The gradient is g where `0 <= x <= 1`, else 0.

    >>> import torch
    >>> from gradoverride.rules import dorefa_activation
    >>> x = torch.tensor([-0.5, 0.0, 0.6, 2.0], requires_grad=True)
    >>> y = dorefa_activation(x, bits=1)
    >>> y.tolist()
    [0.0, 0.0, 1.0, 1.0]
    >>> torch.autograd.grad(y.sum(), x)
    (tensor([0., 1., 1., 0.]),)

    `bits` is from 1 to 16.

    Source: Zhou et al. (2016), equations 5, 6 and 11. The paper leaves open how x is bounded; its code clips.
    """
    _check_bits("dorefa_activation", bits, 1)
    check_floating("dorefa_activation", "x", x)
    return _clipped_to_levels(x, 2**bits - 1)


def _between_0_and_1(x: Tensor, top: int = 1) -> Tensor:
    return wide(x).clamp(0, 1).mul_(top).round_().div_(top).to(x.dtype)


# Not torch's own gradient of a clamp, which at the ends is another one from version 2.14 on.
_clipped_to_levels = straight_through(_between_0_and_1, surrogate=clipped(0.0, 1.0))


# --- one bit ---


def magnitude_aware_sign(w: Tensor, dim: int | tuple[int, ...] | None = None) -> Tensor:
    """The sign of w, times the mean of `|w|`. The gradient knows that mean: `g mean(|w|)` where `|w| < 1`, else 0.

    Without `dim` the mean is over all but the first, as for a weight of (results, inputs, ...): one for each filter.

    >>> import torch
    >>> from gradoverride.rules import magnitude_aware_sign
    >>> w = torch.tensor([[-0.5, 0.3], [0.0, 1.0]], requires_grad=True)
    >>> y = magnitude_aware_sign(w)
    >>> y
    tensor([[-0.4000,  0.4000],
            [ 0.5000,  0.5000]], grad_fn=<_magnitude_aware_signBackward>)
    >>> torch.autograd.grad(y.sum(), w)
    (tensor([[0.4000, 0.4000],
            [0.5000, 0.0000]]),)

    0 counts as positive, as in Larq; it is 0 in the authors' code, whose gradient has no mean either: for that there
    is `straight_through` with the surrogate `clipped()`. `dim` is an integer or a tuple of them.

    Source: Liu et al., "Bi-Real net: enhancing the performance of 1-bit CNNs with improved representational capability
    and advanced training algorithm" (2018), on the magnitude-aware gradient.
    """
    check_dim("magnitude_aware_sign", dim)
    check_floating("magnitude_aware_sign", "w", w)
    check_dim_of("magnitude_aware_sign", dim, w, "w")
    if dim is None:
        dim = tuple(range(1, w.dim()))
    size = w.detach().abs()
    return _magnitude_aware_sign(w, size.mean(dim, keepdim=True) if dim != () else size)


@writes_nothing
def _magnitude_aware_backward(grad_output: Tensor, w: Tensor, size: Tensor) -> tuple[Tensor, None]:
    return _aten.hardtanh_backward(grad_output * size, w, -1, 1), None


@custom_backward(_magnitude_aware_backward)
def _magnitude_aware_sign(w: Tensor, size: Tensor) -> Tensor:
    return torch.sign(w).add_(0.5).sign_().mul_(size)


# --- a rule for any quantizer ---


@dataclass(frozen=True)
class ewgs:
    """The gradient scaled by how far each value is moved: `g (1 + delta sign(g) (x - y))`, y the quantized x.

    So a value that a step against the gradient takes nearer to the next level gets less, one that lags behind more.

    >>> import torch, gradoverride as go
    >>> from gradoverride.rules import ewgs
    >>> round_ewgs = go.custom_backward(ewgs(0.2))(torch.round)
    >>> x = torch.tensor([0.4, 0.6], requires_grad=True)
    >>> torch.autograd.grad(round_ewgs(x).sum(), x)
    (tensor([1.0800, 0.9200]),)

    `delta` must not be negative. Of 0 it is straight-through. The default, 0.2, is a constant to start with: the paper
    computes it anew while training, from the Hessian. There x and y are scaled to levels whose distance is `1 / n`;
    with other levels, delta is to be scaled with them.

    It is not linear in the gradient, so forward mode is refused.

    Source: Lee, Kim, Ham, "Network quantization with element-wise gradient scaling" (2021), equation 5.
    """

    delta: float = 0.2

    def __post_init__(self) -> None:
        fits = is_number(self.delta) and self.delta >= 0
        check("ewgs", "delta", self.delta, fits, "a number that is not negative")

    writes_nothing = True  # so it is given the gradient itself, no copy

    def __call__(self, grad_output: Tensor, input: Tensor, output: Tensor) -> Tensor:
        """The gradient of the input."""
        check_one_for_each("ewgs", grad_output, input)
        return torch.addcmul(grad_output, grad_output.abs(), input - output, value=self.delta)


# --- options ---


def _largest(function: str, bits: Any, signed: Any) -> int:
    """Qp."""
    check_flag(function, "signed", signed)
    _check_bits(function, bits, 2 if signed else 1)
    return int(2 ** (bits - 1) - 1 if signed else 2**bits - 1)


def _check_bits(function: str, bits: Any, least: int) -> None:
    check(function, "bits", bits, is_integer(bits) and least <= bits <= 16, f"an integer from {least} to 16")


def _check_tensor(function: str, option: str, value: Tensor, x: Tensor) -> None:
    """It broadcasts, and nobody expects a gradient of it."""
    if value.requires_grad:
        fail(
            RuleOptionError,
            f"{function}: '{option}' must be a tensor that requires no gradient, for it is given none; this one does. "
            "Detach it, or use lsq, which learns its step",
        )
    check_broadcasts(function, option, value, x, "x")


def _as_tensor(value: Any, x: Tensor) -> Tensor:
    return value if isinstance(value, Tensor) else torch.tensor(value, dtype=x.dtype, device=x.device)
