"""Every error that gradoverride raises, and its warning. Each error derives from `GradOverrideError` and from
the builtin that fits.

A message says, in this order: who (the user's name, file:line), what was required, what came, and the remedy.
"""

from __future__ import annotations

__all__ = [
    "GradOverrideError",
    "DecorationError",
    "RuleSignatureError",
    "RuleResultError",
    "ForwardResultError",
    "CapturedTensorError",
    "SurrogateError",
    "UnsupportedError",
    "TargetError",
    "TargetNotFoundError",
    "GraphError",
    "RuleOptionError",
    "NonFiniteGradientError",
    "ConvergenceError",
    "DrawingError",
    "MissingExtraError",
    "GradOverrideWarning",
]


class GradOverrideError(Exception):
    """The base of all errors of this library: `except GradOverrideError` catches any of them."""


class DecorationError(GradOverrideError, TypeError):
    """What was decorated cannot be: it is not callable, or a class without the methods that are needed."""


class RuleSignatureError(GradOverrideError, TypeError):
    """A rule asks for a name that does not exist, or that means two things."""


class RuleResultError(GradOverrideError, ValueError):
    """A rule returned a wrong count, structure, shape, device or kind of gradient."""


class ForwardResultError(GradOverrideError, TypeError):
    """A forward returned nothing that a gradient could belong to."""


class CapturedTensorError(GradOverrideError, RuntimeError):
    """A forward reached a tensor that requires grad by a closure or a global: its gradient would be lost."""


class SurrogateError(GradOverrideError, ValueError):
    """A surrogate's shape is not the shape of the result it stands for."""


class GraphError(GradOverrideError, ValueError):
    """A tensor or a node is not where it must be in a graph: it has none, or one already, or needs no gradient."""


class RuleOptionError(GradOverrideError, ValueError):
    """A ready-made rule was given an option out of its range."""


class ConvergenceError(GradOverrideError, ArithmeticError):
    """An equation beneath a gradient has no single solution, or was not solved: the estimator `implicit_root`."""


class NonFiniteGradientError(GradOverrideError, FloatingPointError):
    """A gradient has nan or inf in it: the rule `check_finite`."""


class DrawingError(GradOverrideError, RuntimeError):
    """A picture of a graph cannot be drawn: graphviz is not there, or does not know how."""


class MissingExtraError(GradOverrideError, ImportError):
    """A package is needed that is not installed: one of the extras of this library, or NumPy."""


class UnsupportedError(GradOverrideError, NotImplementedError):
    """Refused: torch gives no way to have the right gradient here, so there is none rather than a wrong one."""


class TargetError(GradOverrideError, TypeError):
    """What was given as a target or as rules cannot be one."""


class TargetNotFoundError(GradOverrideError, LookupError):
    """No module, function or path matches a target."""


class GradOverrideWarning(UserWarning):
    """Something was asked for and had no effect, or a gradient is less exact than it should be."""
