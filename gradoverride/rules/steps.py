"""Functions whose own derivative is 0 or none: rounding, signs, steps. With one that lets a gradient through.

The value is torch's, to the last bit, in the dtype of the input. The gradient:

- `round_ste`, `floor_ste`, `ceil_ste`, `trunc_ste`, `sign_ste`, `ternary_ste`, `heaviside_ste` and `clamp_ste` pass
  it on as it comes (Bengio, Leonard, Courville, "Estimating or propagating gradients through stochastic neurons for
  conditional computation", 2013);
- `clamp_toward` stops what would push a value further out;
- `spike` is a step with the gradient of a surrogate;
- `heaviside` has none: it is the step itself, to be decorated.

>>> import torch
>>> from gradoverride.rules import steps
>>> x = torch.tensor([0.4, 1.6], requires_grad=True)
>>> y = steps.round_ste(x)
>>> torch.autograd.grad(y.sum(), x)
(tensor([1., 1.]),)
>>> y.tolist()
[0.0, 2.0]

What a step is at 0 matters, for potentials and weights often start there, and libraries differ: `at_zero=1` is `x >= 0`
(spikingjelly), `at_zero=0` is `x > 0` (snntorch, Norse). Of nan a step is 0; a sign, as in torch, is what it is of 0.

Bounds and options that are tensors get no gradient. An option out of range is a `RuleOptionError`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradoverride._core.binding.contract import what
from gradoverride._core.binding.options import is_number, refuse
from gradoverride._core.doors.surrogate import with_gradient_of
from gradoverride._core.doors.surrogate_class import Learnable, Surrogate, has_tensors
from gradoverride._core.private.transforms import in_forward_ad, in_functorch
from gradoverride.decorators import custom_backward, straight_through
from gradoverride.errors import RuleOptionError
from gradoverride.surrogates import atan

__all__ = [
    "round_ste",
    "floor_ste",
    "ceil_ste",
    "trunc_ste",
    "sign_ste",
    "ternary_ste",
    "heaviside_ste",
    "clamp_ste",
    "clamp_toward",
    "spike",
    "heaviside",
]

Bound = float | Tensor | None


# --- rounding ---


@straight_through
def round_ste(x: Tensor) -> Tensor:
    """`torch.round(x)`, halves to even; the gradient passes.

    >>> import torch
    >>> from gradoverride.rules.steps import round_ste
    >>> round_ste(torch.tensor([0.5, 1.5, 1.6]))
    tensor([0., 2., 2.])
    """
    return torch.round(x)


@straight_through
def floor_ste(x: Tensor) -> Tensor:
    """`torch.floor(x)`; the gradient passes.

    >>> import torch
    >>> from gradoverride.rules.steps import floor_ste
    >>> floor_ste(torch.tensor([-0.5, 1.6]))
    tensor([-1.,  1.])
    """
    return torch.floor(x)


@straight_through
def ceil_ste(x: Tensor) -> Tensor:
    """`torch.ceil(x)`; the gradient passes.

    >>> import torch
    >>> from gradoverride.rules.steps import ceil_ste
    >>> ceil_ste(torch.tensor([-1.5, 1.4]))
    tensor([-1.,  2.])
    """
    return torch.ceil(x)


@straight_through
def trunc_ste(x: Tensor) -> Tensor:
    """`torch.trunc(x)`, towards 0; the gradient passes.

    >>> import torch
    >>> from gradoverride.rules.steps import trunc_ste
    >>> trunc_ste(torch.tensor([-1.6, 1.6]))
    tensor([-1.,  1.])
    """
    return torch.trunc(x)


# --- steps and signs ---


def heaviside(x: Tensor, at_zero: float = 1) -> Tensor:
    """1 above 0, 0 below, `at_zero` at 0 and at -0.0: 1, which is `x >= 0`, or 0, which is `x > 0`. It has no gradient.

    It is made to be decorated: `straight_through(heaviside, surrogate=...)`. (`spike` is that, and pickles.)

    >>> import torch
    >>> from gradoverride.rules.steps import heaviside
    >>> x = torch.tensor([-1.0, 0.0, 1.0])
    >>> heaviside(x), heaviside(x, at_zero=0)
    (tensor([0., 1., 1.]), tensor([0., 0., 1.]))
    """
    from_zero = _is_one("heaviside", x, at_zero)
    recorded = torch.is_grad_enabled() and x.requires_grad
    return _STEPS[from_zero, _is_plain(x) and not recorded](x)


def heaviside_ste(x: Tensor, at_zero: float = 1) -> Tensor:
    """`heaviside`; the gradient passes.

    >>> import torch
    >>> from gradoverride.rules.steps import heaviside_ste
    >>> x = torch.tensor([-1.0, 0.0, 1.0], requires_grad=True)
    >>> heaviside_ste(x, at_zero=0).tolist()
    [0.0, 0.0, 1.0]
    >>> torch.autograd.grad(heaviside_ste(x).sum(), x)
    (tensor([1., 1., 1.]),)
    """
    return _STE[_is_one("heaviside_ste", x, at_zero), _is_plain(x)](x)


class spike(nn.Module):
    """`heaviside` with the gradient of a surrogate, as a module: for a neuron that keeps it, or an `nn.Sequential`.

    >>> import torch
    >>> from gradoverride.rules.steps import spike
    >>> from gradoverride.surrogates import fast_sigmoid
    >>> fire = spike(fast_sigmoid(25.0), at_zero=0)
    >>> fire
    spike(fast_sigmoid(k=25.0), at_zero=0)
    >>> x = torch.tensor([-0.04, 0.0, 0.04], requires_grad=True)
    >>> fire(x).tolist()
    [0.0, 0.0, 1.0]
    >>> torch.autograd.grad(fire(x).sum(), x)
    (tensor([0.2500, 1.0000, 0.2500]),)

    `surrogate` is one of `gradoverride.surrogates` (default `atan()`); `at_zero` is 1 or 0 (default 1). Where an option
    of the surrogate is a parameter, it is one of this module:

    >>> fire = spike(fast_sigmoid(k=torch.nn.Parameter(torch.tensor(25.0))))
    >>> fire(x).sum().backward()
    >>> fire.surrogate.k.grad
    tensor(0.)
    """

    def __init__(self, surrogate: Surrogate | None = None, at_zero: float = 1) -> None:
        super().__init__()
        if not isinstance(surrogate, (Surrogate, type(None))):
            raise RuleOptionError(f"spike: 'surrogate' must be one of gradoverride.surrogates; got {what(surrogate)}")
        self.surrogate: Any = atan() if surrogate is None else surrogate
        self.at_zero = at_zero
        if has_tensors(self.surrogate):
            self.surrogate = Learnable(self.surrogate)
        self._fire, self._fire_plain = self._make()

    def _make(self) -> list[Callable[[Tensor], Tensor]]:
        from_zero = _is_from_zero("spike", self.at_zero)
        if isinstance(self.surrogate, Surrogate):
            return [_spike_by(self.surrogate, from_zero, plain) for plain in (False, True)]
        return [_STE[from_zero, plain] for plain in (False, True)]

    def forward(self, x: Tensor) -> Tensor:
        """The step at x."""
        if isinstance(self.surrogate, nn.Module) and (torch.is_grad_enabled() or in_functorch() or in_forward_ad()):
            x = with_gradient_of(self.surrogate, x)
        return self._fire_plain(x) if _is_plain(x) else self._fire(x)

    def extra_repr(self) -> str:
        """The options."""
        shown = f"at_zero={self.at_zero}"
        return shown if isinstance(self.surrogate, nn.Module) else f"{self.surrogate}, {shown}"

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_fire", "_fire_plain")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]  # torch has not typed it
        self._fire, self._fire_plain = self._make()


@functools.cache  # equal ones share a function, which takes 400 us to make
def _spike_by(surrogate: Surrogate, from_zero: bool, plain: bool) -> Callable[[Tensor], Tensor]:
    return straight_through(_STEPS[from_zero, plain], surrogate=surrogate)


def sign_ste(x: Tensor, at_zero: float = 1) -> Tensor:
    """1 above 0, -1 below, `at_zero` at 0 and at -0.0: 1, 0 or -1; the gradient passes.

    >>> import torch
    >>> from gradoverride.rules.steps import sign_ste
    >>> x = torch.tensor([-2.0, 0.0, 2.0])
    >>> sign_ste(x), sign_ste(x, at_zero=0)
    (tensor([-1.,  1.,  1.]), tensor([-1.,  0.,  1.]))

    1, the default, is that of binary networks, whose weights have two values; 0 is that of `torch.sign`.
    """
    if not is_number(at_zero) or at_zero not in (1, 0, -1):
        refuse("sign_ste", "at_zero", at_zero, "1, 0 or -1")
    return _sign_ste(x) if at_zero == 0 else _sign_without_zero_ste(x, 0.5 * at_zero)


def ternary_ste(x: Tensor, threshold: float | Tensor) -> Tensor:
    """1 above `threshold`, -1 below its negative, 0 between and at both; the gradient passes.

    >>> import torch
    >>> from gradoverride.rules.steps import ternary_ste
    >>> ternary_ste(torch.tensor([-0.8, -0.5, 0.1, 0.6]), 0.5)
    tensor([-1.,  0.,  0.,  1.])

    `threshold` is a number that is not negative, or a tensor that broadcasts with x. The paper's is
    `0.7 * x.detach().abs().mean()`.

    Source: Li, Zhang, Liu, "Ternary weight networks" (2016), equation 3.
    """
    if isinstance(threshold, Tensor):
        return _ternary_by_tensor_ste(x, threshold)
    if not (is_number(threshold) and threshold >= 0):
        refuse("ternary_ste", "threshold", threshold, "a number that is not negative, or a tensor")
    return _ternary_ste(x, threshold)


# --- clamps ---


def clamp_ste(x: Tensor, min: Bound = None, max: Bound = None) -> Tensor:
    """`torch.clamp(x, min, max)`; the gradient passes, outside of the bounds too.

    >>> import torch
    >>> from gradoverride.rules.steps import clamp_ste
    >>> x = torch.tensor([-2.0, 0.5], requires_grad=True)
    >>> clamp_ste(x, -1, 1).tolist()
    [-1.0, 0.5]
    >>> torch.autograd.grad(clamp_ste(x, -1, 1).sum(), x)
    (tensor([1., 1.]),)

    Numbers, tensors or None as for `torch.clamp`, which takes no number beside a tensor; but one of numbers that is
    larger than the other is an error here.
    """
    _check_bounds("clamp_ste", x, min, max)
    return _clamp_ste(x, min, max)


def clamp_toward(x: Tensor, min: Bound = None, max: Bound = None) -> Tensor:
    """`torch.clamp(x, min, max)`; outside, the gradient passes that a descent would follow back in, and no other.

    So nothing drives a value on that is out already, and nothing keeps it there: below `min` the gradient is
    `min(g, 0)`, above `max` it is `max(g, 0)`. Within, and at the bounds, it is g.

    >>> import torch
    >>> from gradoverride.rules.steps import clamp_toward
    >>> x = torch.tensor([-2.0, -2.0, 0.5], requires_grad=True)
    >>> torch.autograd.grad(clamp_toward(x, -1, 1), x, torch.tensor([1.0, -1.0, 1.0]))
    (tensor([ 0., -1.,  1.]),)

    Bounds as for `clamp_ste`. It is not linear in the gradient, so forward mode is refused.

    Source: Crowson et al., "VQGAN-CLIP: open domain image generation and editing with natural language guidance"
    (2022), in its code.
    """
    _check_bounds("clamp_toward", x, min, max)
    if isinstance(min, Tensor) or isinstance(max, Tensor):
        return _clamp_toward_tensors(x, min, max)
    return _clamp_toward(x, min, max)


# --- what is decorated: options are settled, so the short path can be taken ---


def _from_zero(x: Tensor) -> Tensor:
    return (x >= 0).to(x.dtype)


def _above_zero(x: Tensor) -> Tensor:
    return (x > 0).to(x.dtype)


def _plain_from_zero(x: Tensor) -> Tensor:
    # Compared in the dtype of x, which takes a quarter of the time.
    return torch.ge(x, 0, out=torch.empty_like(x))


def _plain_above_zero(x: Tensor) -> Tensor:
    return torch.gt(x, 0, out=torch.empty_like(x))


def _is_plain(x: Any) -> bool:
    """Whether torch is called at once: transforms and subclasses have no `out`, a compiler sees to memory itself."""
    transformed = torch.compiler.is_dynamo_compiling() or in_functorch() or in_forward_ad()
    return type(x) in (Tensor, nn.Parameter) and not transformed


_STEPS = {  # by whether it is 1 at 0, and whether x is plain
    (True, False): _from_zero,
    (True, True): _plain_from_zero,
    (False, False): _above_zero,
    (False, True): _plain_above_zero,
}
_STE = {which: straight_through(step) for which, step in _STEPS.items()}


@straight_through
def _sign_ste(x: Tensor) -> Tensor:
    return torch.sign(x)


@straight_through
def _sign_without_zero_ste(x: Tensor, of_zero: float = 0.5) -> Tensor:
    return torch.sign(x).add_(of_zero).sign_()


@straight_through
def _ternary_ste(x: Tensor, threshold: float = 0.0) -> Tensor:
    return F.hardshrink(x, threshold).sign_()


@straight_through
def _ternary_by_tensor_ste(x: Tensor, threshold: Tensor) -> Tensor:
    return torch.sign(x) * (x.abs() > threshold)


@straight_through
def _clamp_ste(x: Tensor, min: Any = None, max: Any = None) -> Tensor:
    return torch.clamp(x, min, max)


def _toward(grad_output: Tensor, x: Tensor, output: Tensor) -> Tensor:
    # -1 where a step against the gradient leads further out. Of nan it is 0, so that nan passes.
    direction = torch.sign(x - output).mul(grad_output).sign_()
    found: Tensor = torch.ops.aten.threshold_backward(grad_output, direction, -0.5)  # 0 where that is not above -0.5
    return found


@custom_backward(_toward)
def _clamp_toward(x: Tensor, min: Any = None, max: Any = None) -> Tensor:
    return torch.clamp(x, min, max)


@custom_backward(lambda grad_output, x, output: {"x": _toward(grad_output, x, output)})
def _clamp_toward_tensors(x: Tensor, min: Any, max: Any) -> Tensor:
    return torch.clamp(x, min, max)


# --- options ---


def _is_one(function: str, x: Any, at_zero: Any) -> bool:
    if not isinstance(x, Tensor):
        refuse(function, "x", x, "a tensor")
    return _is_from_zero(function, at_zero)


def _is_from_zero(function: str, at_zero: Any) -> bool:
    if not is_number(at_zero) or at_zero not in (1, 0):
        refuse(function, "at_zero", at_zero, "1 (for x >= 0) or 0 (for x > 0)")
    return bool(at_zero == 1)


def _check_bounds(function: str, x: Any, low: Any, high: Any) -> None:
    if not isinstance(x, Tensor):
        refuse(function, "x", x, "a tensor")
    for option, value in (("min", low), ("max", high)):
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and value == value  # not nan
        if not (number or value is None or isinstance(value, Tensor)):
            refuse(function, option, value, "a number, a tensor or None")
    if low is None and high is None:
        refuse(function, "min' and 'max", (low, high), "a number or a tensor, one of them at least")
    if low is None or high is None:
        return
    if isinstance(low, Tensor) != isinstance(high, Tensor):
        refuse(function, "min' and 'max", (low, high), "two numbers or two tensors")
    if not isinstance(low, Tensor) and not low <= high:
        refuse(function, "min' and 'max", (low, high), "numbers with min <= max")
