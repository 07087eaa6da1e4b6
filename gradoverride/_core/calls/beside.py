"""What a forward under `vjp` leaves in attributes of its module (`self.aux_loss = ...`), while Dynamo traces.

A gradient that comes back from there would not reach the arguments, whose gradients are the rule's. An eager call
raises when one arrives. In a compiled graph each tensor that leaves it gets a gradient, mostly of zeros; so what stands
in an attribute is cut off, and a gradient that is not zero is refused when the graph runs. Which attributes those are,
code tells. (What a list holds, or a hook has kept, is not looked for.)
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from gradoverride._core.autograd.function import TOKEN, Beside
from gradoverride._core.private.marks import evaluated_while_tracing
from gradoverride._core.python.reach import names_assigned_by

__all__ = ["cut_off"]


def cut_off(module: nn.Module, who: str) -> None:
    """The forward has run: no gradient is to come back from what it left in attributes of `module` and its parts."""
    parts = [*module.modules()]
    for part, names in zip(parts, _names_assigned_by(*[type(part) for part in parts]), strict=True):
        for name in names:
            value = getattr(part, name, None)
            if isinstance(value, Tensor) and value.requires_grad and not isinstance(value, nn.Parameter):
                setattr(part, name, Beside.apply(who, TOKEN, value.detach()))  # type: ignore[no-untyped-call]


@evaluated_while_tracing
def _names_assigned_by(*classes: Any) -> tuple[tuple[str, ...], ...]:
    return tuple([names_assigned_by(cls) for cls in classes])
