"""What rules of the gradient alone have in common: of a structure of gradients, each tensor is taken by itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor

from gradoverride._core.call import is_differentiable
from gradoverride._core.structure import flatten, unflatten

__all__ = ["Each", "each", "writes_nothing"]

X = TypeVar("X")
F = TypeVar("F", bound=Callable[..., Any])


def each(edit: Callable[[Tensor], Tensor], grad_output: X) -> X:
    """`edit` of a gradient, or of each in a structure of them."""
    if isinstance(grad_output, Tensor):
        return edit(grad_output)  # type: ignore[return-value]  # X is Tensor
    leaves: list[Tensor] = []
    spec = flatten(grad_output, is_differentiable, leaves)
    edited: X = unflatten(spec, iter([edit(leaf) for leaf in leaves]))
    return edited


class Each:
    """A rule that says `of` one gradient what becomes of it."""

    writes_nothing = True  # so it is given the gradient itself, no copy

    def of(self, grad: Tensor) -> Tensor:
        raise NotImplementedError

    def __call__(self, grad_output: X) -> X:
        """The gradient that goes on."""
        return each(self.of, grad_output)


def writes_nothing(rule: F) -> F:
    """`rule`, known to write into no gradient that it is given."""
    rule.writes_nothing = True  # type: ignore[attr-defined]  # a function may have attributes
    return rule
