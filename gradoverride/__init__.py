"""gradoverride: give any function or module the backward you choose."""

from gradoverride._core.residuals import save_for_backward
from gradoverride.decorators import custom_backward, straight_through
from gradoverride.errors import (
    CapturedTensorError,
    DecorationError,
    ForwardResultError,
    GradOverrideError,
    RuleResultError,
    RuleSignatureError,
    SurrogateError,
    TargetNotFoundError,
    UnsupportedError,
)

__all__ = [
    "custom_backward",
    "straight_through",
    "save_for_backward",
    "GradOverrideError",
    "DecorationError",
    "RuleSignatureError",
    "RuleResultError",
    "ForwardResultError",
    "CapturedTensorError",
    "SurrogateError",
    "UnsupportedError",
    "TargetNotFoundError",
]

__version__ = "0.1.0"
