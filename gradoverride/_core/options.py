"""Options of ready-made rules: what is out of range is an error when the rule is made."""

from __future__ import annotations

import math
from typing import Any

from gradoverride.errors import RuleOptionError

__all__ = ["check", "is_number", "printed"]


def check(rule: str, option: str, value: Any, fits: bool, required: str) -> None:
    """Raise `RuleOptionError` unless the value fits."""
    if not fits:
        raise RuleOptionError(f"{rule}: '{option}' must be {required}; got {value!r}")


def is_number(value: Any) -> bool:
    """Whether it is a finite real number. (True and False are none.)"""
    # Not math.isfinite: Dynamo cannot ask it of a number that it does not know.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -math.inf < value < math.inf


def printed(value: Any) -> str:
    """A function by its name, anything else as it prints itself."""
    return getattr(value, "__name__", None) or repr(value)
