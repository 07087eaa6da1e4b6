"""gradoverride: give any function or module the backward you choose."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from gradoverride._core.python.residuals import save_for_backward
from gradoverride.bridges import bridge
from gradoverride.connections import Connection, connect, connect_
from gradoverride.decorators import custom_backward, straight_through
from gradoverride.drawing import GraphDrawing, show_graph
from gradoverride.edits import GradientEdit, edit_gradient, edit_gradient_, find_nodes
from gradoverride.errors import (
    CapturedTensorError,
    ConvergenceError,
    DecorationError,
    DrawingError,
    ForwardResultError,
    GradOverrideError,
    GradOverrideWarning,
    GraphError,
    MissingExtraError,
    NonFiniteGradientError,
    RuleOptionError,
    RuleResultError,
    RuleSignatureError,
    SurrogateError,
    TargetError,
    TargetNotFoundError,
    UnsupportedError,
)
from gradoverride.overrides import Override, explain, override, remove_overrides
from gradoverride.registries import Registry, register, registry

if TYPE_CHECKING:
    from gradoverride import estimators, presets, rules, safe, surrogates
    from gradoverride.plotting import plot_rule

__all__ = [
    "custom_backward",
    "straight_through",
    "save_for_backward",
    "edit_gradient",
    "edit_gradient_",
    "find_nodes",
    "GradientEdit",
    "connect",
    "connect_",
    "Connection",
    "bridge",
    "show_graph",
    "GraphDrawing",
    "plot_rule",
    "override",
    "Override",
    "remove_overrides",
    "explain",
    "Registry",
    "registry",
    "register",
    "rules",
    "surrogates",
    "safe",
    "estimators",
    "presets",
    "GradOverrideError",
    "DecorationError",
    "RuleSignatureError",
    "RuleResultError",
    "RuleOptionError",
    "ForwardResultError",
    "CapturedTensorError",
    "SurrogateError",
    "UnsupportedError",
    "TargetError",
    "TargetNotFoundError",
    "GraphError",
    "NonFiniteGradientError",
    "ConvergenceError",
    "DrawingError",
    "MissingExtraError",
    "GradOverrideWarning",
]

__version__ = "0.1.0"

# What is imported when it is first used: the catalogue holds a hundred decorated functions, which take 100 ms to make.
_LATER = {
    **dict.fromkeys(("estimators", "presets", "rules", "safe", "surrogates"), ""),
    "plot_rule": "plotting",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    module = import_module(f"{__name__}.{_LATER[name] or name}")
    found = globals()[name] = getattr(module, name) if _LATER[name] else module
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})
