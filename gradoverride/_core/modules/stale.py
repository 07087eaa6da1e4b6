"""A tensor that cannot be shown as it was."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from gradoverride._core.private.dynamo import fail
from gradoverride._core.values.structure import leaves_in
from gradoverride.errors import UnsupportedError

__all__ = ["Stale"]


class Stale(Tensor):
    """A tensor that was written into after the forward that a stand-in is to show: whoever uses it is told `text`."""

    @classmethod
    def of(cls, tensor: Tensor, text: str) -> Stale:
        stale = tensor.detach().as_subclass(cls)
        stale.__dict__["text"] = text
        return stale

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = leaves_in((args, kwargs or {}), lambda part: isinstance(part, cls))
        fail(UnsupportedError, found[0].__dict__["text"])
