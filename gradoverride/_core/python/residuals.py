"""Values that a forward hands over to its rule: `return save_for_backward(result, mask=mask)`.

Each decorated call whose forward hands values over opens a frame on a stack of its thread, so a helper may do the
handing over, and calls nest. (Dynamo traces `threading.local`; a ContextVar breaks its graph.)
"""

from __future__ import annotations

import threading
from typing import Any, TypeVar

__all__ = ["close_frame", "open_frame", "save_for_backward"]

Result = TypeVar("Result")


class _Frames(threading.local):
    def __init__(self) -> None:
        self.stack: list[dict[str, Any]] = []


_frames = _Frames()


def save_for_backward(result: Result, /, **residuals: Any) -> Result:
    """Give back `result`, and let the rule of the decorated call around it ask for the named values.

    Outside a decorated call it returns `result` and nothing else happens, so the plain forward still works.

    >>> import torch, gradoverride as go
    >>> def backward(grad_output, mask):
    ...     return grad_output * mask
    >>> @go.custom_backward(backward)
    ... def relu(x):
    ...     mask = x > 0
    ...     return go.save_for_backward(x * mask, mask=mask)
    >>> x = torch.tensor([-1.0, 2.0], requires_grad=True)
    >>> relu(x).sum().backward()
    >>> x.grad
    tensor([0., 1.])
    """
    if _frames.stack:
        _frames.stack[-1].update(residuals)
    return result


def open_frame() -> dict[str, Any]:
    """A new frame, which collects what is handed over until it is closed."""
    frame: dict[str, Any] = {}
    _frames.stack.append(frame)
    return frame


def close_frame() -> None:
    """Close the innermost frame."""
    _frames.stack.pop()
