"""Options of ready-made rules: what is out of range is an error when the rule is made."""

from __future__ import annotations

import functools
import math
from typing import Any, NoReturn

import torch
from torch import Tensor

from gradoverride._core.binding.contract import shape_text, what
from gradoverride._core.binding.signature import name_of, read_signature
from gradoverride._core.private.dynamo import fail
from gradoverride._core.python.scan import location
from gradoverride.errors import RuleOptionError

__all__ = [
    "check",
    "check_broadcasts",
    "check_dim",
    "check_dim_of",
    "check_flag",
    "check_floating",
    "check_function",
    "check_generator",
    "is_integer",
    "is_number",
    "printed",
    "refuse",
    "shown",
]


def check(rule: str, option: str, value: Any, fits: bool, required: str) -> None:
    """Raise `RuleOptionError` unless the value fits."""
    if not fits:
        refuse(rule, option, value, required)


def refuse(rule: str, option: str, value: Any, required: str) -> NoReturn:
    """Raise `RuleOptionError` for a value that does not fit."""
    fail(RuleOptionError, f"{rule}: '{option}' must be {required}; got {shown(value)}")


def check_flag(rule: str, option: str, value: Any) -> None:
    """Raise `RuleOptionError` unless it is True or False."""
    check(rule, option, value, isinstance(value, bool), "True or False")


def check_dim(rule: str, dim: Any) -> None:
    """Raise `RuleOptionError` unless it names dimensions, or is None."""
    fits = dim is None or is_integer(dim) or (isinstance(dim, tuple) and bool(dim) and all(map(is_integer, dim)))
    check(rule, "dim", dim, fits, "None, an integer or a tuple of integers")


def check_dim_of(rule: str, dim: Any, tensor: Tensor, name: str) -> None:
    """Raise `RuleOptionError` unless the tensor that is called `name` has these dimensions, or `dim` is None."""
    count = tensor.dim()
    room = max(count, 1)  # torch gives one without dimensions the dimension 0
    if dim is not None and not all([-room <= one < room for one in (dim if isinstance(dim, tuple) else (dim,))]):
        refuse(rule, "dim", dim, f"within the dimensions of {name}, which has {count}")


def check_floating(rule: str, option: str, value: Any, required: str = "a real floating tensor") -> None:
    """Raise `RuleOptionError` unless it is a real floating tensor."""
    if not isinstance(value, Tensor):
        refuse(rule, option, value, required)
    if not value.is_floating_point():
        refuse(rule, option, value.dtype, required)


def check_function(rule: str, option: str, value: Any, count: int, required: str) -> None:
    """Raise `RuleOptionError` unless it is a function, and no class, that takes so many arguments by position."""
    check(rule, option, value, callable(value) and not isinstance(value, type), required)
    if torch.compiler.is_dynamo_compiling():  # which does not know signatures
        return
    signature = read_signature(value)
    try:
        if signature is not None:  # as that of a builtin may be
            signature.bind(*[None] * count)
    except TypeError:
        got = f"'{name_of(value)}' ({location(value)}), which takes {signature}"
        fail(RuleOptionError, f"{rule}: '{option}' must be {required}; got {got}")


def check_generator(rule: str, generator: Any) -> None:
    """Raise `RuleOptionError` unless it is a generator of random numbers, or None."""
    fits = generator is None or isinstance(generator, torch.Generator)
    check(rule, "generator", generator, fits, "None or a torch.Generator")


def check_broadcasts(
    rule: str, option: str, value: Tensor, to: Tensor, name: str, kind: type[Exception] = RuleOptionError
) -> None:
    """Raise `kind` unless the value broadcasts to the shape of the tensor that is called `name`."""
    sizes = zip(reversed(value.shape), reversed(to.shape), strict=False)
    if value.dim() > to.dim() or not all([own == 1 or own == size for own, size in sizes]):
        fail(
            kind,
            f"{rule}: '{option}' must broadcast to the shape of {name}, {shape_text(to.shape)}; it has shape "
            f"{shape_text(value.shape)}. Give it sizes of 1 where it is the same for all",
        )


def is_number(value: Any) -> bool:
    """Whether it is a finite real number. (True and False are none.)"""
    # Not math.isfinite: Dynamo cannot ask it of a number that it does not know.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -math.inf < value < math.inf


def is_integer(value: Any) -> bool:
    """Whether it is an integer. (True and False are none.)"""
    return isinstance(value, int) and not isinstance(value, bool)


def shown(value: Any) -> str:
    """An option as it was written, if it is short; else what it is. Never what a tensor or a module prints."""
    parts = value if isinstance(value, (tuple, list)) else [value]
    return repr(value) if len(parts) <= 4 and all([isinstance(part, _WRITTEN) for part in parts]) else what(value)


_WRITTEN = (type(None), bool, int, float, complex, str, torch.dtype, torch.device, torch.layout)


def printed(value: Any) -> str:
    """A function by its name, a module by that of its class, anything else as it prints itself."""
    name = getattr(value, "__name__", None) or (type(value).__name__ if isinstance(value, torch.nn.Module) else None)
    if isinstance(value, functools.partial):  # prints what it holds
        name = f"partial({printed(value.func)})"
    return name or repr(value)
