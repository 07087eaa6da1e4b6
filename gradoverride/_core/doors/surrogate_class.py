"""What all surrogates have in common: the class, its options, and what becomes of options that are tensors."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gradoverride._core.binding.contract import shape_text, what
from gradoverride._core.binding.options import is_number, shown
from gradoverride._core.private.dynamo import fail
from gradoverride._core.private.transforms import in_functorch
from gradoverride._core.values.precision import wide
from gradoverride.errors import CapturedTensorError, RuleOptionError, SurrogateError, UnsupportedError

__all__ = ["Learnable", "Option", "Surrogate", "check_interval", "check_not_negative", "check_positive", "has_tensors"]

Option = float | Tensor

_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Surrogate:
    """What all surrogates have in common. Derive from it to write your own: see `gradoverride.surrogates`.

    Options are larger than 0, unless the class says otherwise in its `__post_init__`.
    """

    primitive: ClassVar[Callable[..., Tensor] | None] = None
    writes_nothing: ClassVar[bool] = True  # into the gradient: so it is given the gradient itself, no copy
    takes_tensors: ClassVar[bool] = True  # in a `bridge` too
    right_in_half: ClassVar[bool] = False  # whether `of` needs no more digits and no more room: else it gets float32

    def __post_init__(self) -> None:
        for option in fields(self):
            check_positive(self, option.name)

    def __call__(self, grad_output: Any, input: Tensor) -> Tensor:
        """The gradient of the input."""
        if not isinstance(grad_output, Tensor) or grad_output.shape != input.shape or input.is_complex():
            _refuse(self, grad_output, input)
        if has_tensors(self):
            return _by_primitive(self, grad_output, input)
        if input.dtype in _HALF and not self.right_in_half:
            return self.of(wide(grad_output), wide(input)).to(torch.promote_types(grad_output.dtype, input.dtype))
        return self.of(grad_output, input)

    def of(self, grad: Tensor, x: Tensor) -> Tensor:
        """The gradient times the derivative at x, as a new tensor. The options are numbers then."""
        raise NotImplementedError(f"{type(self).__name__} must define `of(self, grad, x)`")


# --- options that are tensors ---


def has_tensors(surrogate: Surrogate) -> bool:
    """Whether an option of it is a tensor."""
    return any([isinstance(getattr(surrogate, option), Tensor) for option in surrogate.__dataclass_fields__])


class Learnable(nn.Module):
    """The primitive of a surrogate whose tensors are parameters and buffers of this module."""

    def __init__(self, surrogate: Surrogate) -> None:
        super().__init__()
        self.kind = type(surrogate)
        self.__name__ = self.kind.__name__
        self.options = tuple(option.name for option in fields(surrogate))
        if surrogate.primitive is None:
            raise RuleOptionError(
                f"{self.__name__}: it must have a 'primitive' for straight_through to take an option that is a tensor; "
                "it has none. Define `primitive(self, x)`, whose derivative it is"
            )
        for name in self.options:
            value = getattr(surrogate, name)
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        """The primitive at x."""
        value: Tensor = self.now().primitive(wide(x))  # type: ignore[misc]  # it has one
        return value.to(x.dtype) if x.dtype in _HALF else value

    def now(self) -> Surrogate:
        """The surrogate with the tensors that this module has now."""
        surrogate = object.__new__(self.kind)  # unchecked: what has been learnt is not an option that somebody chose
        for name in self.options:
            object.__setattr__(surrogate, name, getattr(self, name))
        return surrogate

    def _get_name(self) -> str:
        return self.__name__

    def extra_repr(self) -> str:
        """The options."""
        return options_text(self.now())


def _by_primitive(surrogate: Surrogate, grad: Tensor, x: Tensor) -> Tensor:
    for option in fields(surrogate):
        value = getattr(surrogate, option.name)
        if isinstance(value, Tensor) and value.requires_grad:
            fail(
                CapturedTensorError,
                f"surrogate {type(surrogate).__name__}: its option '{option.name}' requires grad, which it can get "
                "where it is a parameter of a module alone: give the surrogate to straight_through or rules.spike; or "
                "detach() it",
            )
    if surrogate.primitive is None:
        return surrogate.of(grad, x)
    value, pullback, *_ = torch.func.vjp(surrogate.primitive, wide(x))
    if value.shape != x.shape:
        fail(
            SurrogateError,
            f"surrogate {_printed(surrogate)}: its options must broadcast to the shape of the input, "
            f"{shape_text(x.shape)}; with them it has shape {shape_text(value.shape)}. Give them sizes of 1 where they "
            "are the same for all, and no dimensions more",
        )
    found: Tensor = pullback(wide(grad))[0]
    return found.to(torch.promote_types(grad.dtype, x.dtype))


# --- errors ---


def check_positive(surrogate: Surrogate, option: str) -> None:
    """Raise `RuleOptionError` unless this option is larger than 0."""
    _check(surrogate, option, lambda value: value > 0, "a number larger than 0")


def check_not_negative(surrogate: Surrogate, option: str) -> None:
    """Raise `RuleOptionError` unless this option is 0 or larger."""
    _check(surrogate, option, lambda value: value >= 0, "a number that is not negative")


def check_interval(surrogate: Surrogate, low: str, high: str) -> None:
    """Raise `RuleOptionError` unless both options are finite, and one is less than the other."""
    for option in (low, high):
        _check(surrogate, option, lambda value: abs(value) < math.inf, "a finite number")
    lo, hi = getattr(surrogate, low), getattr(surrogate, high)
    if _known(lo) and _known(hi) and not _everywhere(lo < hi):
        fail(
            RuleOptionError,
            f"{type(surrogate).__name__}: '{low}' and '{high}' must be numbers with {low} < {high}; got {_shown(lo)} "
            f"and {_shown(hi)}",
        )


def _check(surrogate: Surrogate, option: str, fits: Callable[[Any], Any], required: str) -> None:
    value = getattr(surrogate, option)
    if isinstance(value, Tensor):
        right = value.is_floating_point() and (not _known(value) or _everywhere(fits(value) & torch.isfinite(value)))
        required += ", or a tensor of such"
    else:
        right = is_number(value) and fits(value)
    if not right:
        fail(RuleOptionError, f"{type(surrogate).__name__}: '{option}' must be {required}; got {_shown(value)}")


def _known(value: Any) -> bool:
    """Whether it can be looked at: not where a tensor stands for others."""
    return not (isinstance(value, Tensor) and (value.is_meta or torch.compiler.is_compiling() or in_functorch()))


def _everywhere(fits: Any) -> bool:
    return bool(fits.all()) if isinstance(fits, Tensor) else fits


def _shown(value: Any) -> str:
    if not isinstance(value, Tensor):
        return shown(value)
    return repr(value.tolist()) if value.dim() == 0 and _known(value) else what(value)


def _refuse(surrogate: Surrogate, grad_output: Any, input: Tensor) -> None:
    if input.is_complex():
        fail(
            UnsupportedError,
            f"surrogate {_printed(surrogate)} is for real tensors; its input is of {input.dtype}. Give "
            "straight_through a function of complex tensors",
        )
    fail(
        SurrogateError,
        f"surrogate {_printed(surrogate)} must be of a function whose result has the shape of its first differentiable "
        f"argument, {shape_text(input.shape)}; the gradient of its result is {what(grad_output)}. "
        "Give such a function, or another rule",
    )


def _printed(surrogate: Surrogate) -> str:
    return f"{type(surrogate).__name__}({options_text(surrogate)})"


def options_text(surrogate: Surrogate) -> str:
    return ", ".join([f"{option.name}={_shown(getattr(surrogate, option.name))}" for option in fields(surrogate)])
