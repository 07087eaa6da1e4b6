"""What the code of a rule tells: which gradient it may be handed, and which path its calls can take (`purity.py`)."""

from __future__ import annotations

from torch import Tensor

from gradoverride._core import purity, scan
from gradoverride._core.rule import Rule

__all__ = ["RuleCode", "is_known_method"]


class RuleCode:
    """Read once a rule, and not for each forward: it takes longer than all else that a `Plan` decides."""

    __slots__ = (
        *("accumulates", "calls_vjp_once", "gives_alike", "is_algebra", "is_arithmetic", "names_by_name", "strings"),
        "writes",
    )

    def __init__(self, rule: Rule) -> None:
        fn = rule.fn
        known = getattr(fn, "writes_nothing", False) or not purity.renormalizes(fn)
        self.writes = not (known and purity.writes_nothing(fn, is_known_method))  # it is handed a copy
        self.is_arithmetic = purity.is_arithmetic(fn)
        self.is_algebra = self.is_arithmetic or purity.is_algebra(fn)
        self.gives_alike = purity.gives_alike(fn)
        self.strings = scan.strings(fn)  # a rule may answer for parameters whose names are among them
        self.names_by_name = scan.mentions(fn, "by_name")
        self.accumulates = scan.accumulates(fn)
        self.calls_vjp_once = scan.called_once(fn, "vjp")

    @staticmethod
    def of(rule: Rule) -> RuleCode:
        """That of this rule."""
        return rule.once(RuleCode, lambda: RuleCode(rule))


def is_known_method(name: str) -> bool:
    """Whether a method of this name is one of tensors, or of what else a rule is given: see `writes_nothing`.

    Where it is one of lists too, that changes none (`sort` does).
    """
    of_tensors = hasattr(Tensor, name) and not name.startswith("__") and name != "sort"
    return of_tensors or name in ("by_name", "items", "values")
