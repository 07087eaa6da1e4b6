"""A result of a node in a built graph, or a leaf, whose gradient is edited: right for `torch.autograd.grad` too.

A tensor's hooks are run once for each gradient. But where a pass goes on behind the node *and* returns the gradient of
its result (`torch.autograd.grad(loss, [middle, x])`), it returns what came before the hooks. So the answer is put into
that very tensor, if nobody else has it; if somebody has, it is refused.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from gradoverride._core.autograd.nodes import leaf_of
from gradoverride._core.private.engine import OWNERS_IF_RETURNED, passes_now, passes_on
from gradoverride._core.private.tensors import use_count
from gradoverride.errors import UnsupportedError

__all__ = ["EditedLeaf", "EditedResult", "edits_of"]

EDITED = "gradoverride"
"""The key in the metadata of a node under which its edited results are listed."""


class EditedResult:
    """The hook on result `index` of `node`. It does not hold the node, which holds it, and is in no cycle: the rule may
    hold what is large, and is to go with the graph.
    """

    def __init__(self, node: Node, index: int, rule: Any, answer: Callable[[Any], Tensor | None]) -> None:
        self.index = index
        self.rule = rule
        self.answer = answer
        self.metadata: dict[Any, Any] = node.metadata  # type: ignore[assignment]  # a property, in truth
        self.metadata.setdefault(EDITED, []).append(weakref.ref(self))

    def forget(self) -> None:
        """Take it off the list of its node."""
        listed = self.metadata.get(EDITED, [])
        if weakref.ref(self) in listed:
            listed.remove(weakref.ref(self))
        if not listed:
            self.metadata.pop(EDITED, None)

    def __call__(self, grad: Tensor | None) -> Tensor | None:
        answer = self.answer(grad)
        if grad is None or answer is grad:
            return None
        if answer is None:  # which would leave the gradient as it is
            answer = torch.zeros_like(grad)
        node = self._returned()
        if node is None or not passes_on(node):
            return answer
        try:
            answer = answer.detach()  # it may be the gradient of another result, which is about to be changed
        except RuntimeError as error:  # a gradient of `is_grads_batched`, for which torch has no such thing
            raise _refusal(grad) from error
        self._put_into_returned(grad, answer)
        return answer

    def _returned(self) -> Node | None:
        """The node, if the pass that runs now returns the gradient of this result."""
        for asked in [asked for found in passes_now() if not found.accumulates for asked in found.inputs]:
            node = asked.node if isinstance(asked, GradientEdge) else asked.grad_fn
            metadata: Any = {} if node is None else node.metadata  # a leaf is no result
            if asked.output_nr == self.index and weakref.ref(self) in metadata.get(EDITED, ()):
                return node
        return None

    def _put_into_returned(self, grad: Tensor, answer: Tensor) -> None:
        before, returned = _last.pair
        original = returned() if before() is grad else grad  # another edit has been here
        if original is None or torch.is_grad_enabled() or use_count(original) != OWNERS_IF_RETURNED:
            raise _refusal(grad)
        original.data = answer
        _last.pair = weakref.ref(answer), weakref.ref(original)


def _refusal(grad: Tensor) -> UnsupportedError:
    return UnsupportedError(
        f"edit_gradient_: torch.autograd.grad is asked for the edited gradient of a tensor of shape "
        f"{tuple(grad.shape)} and for others behind it, and torch would return it as it was before the edit. "
        "Ask for it in a call of its own, with retain_graph=True"
    )


class EditedLeaf:
    """The hook on a leaf."""

    def __init__(self, rule: Any, answer: Callable[[Tensor], Tensor | None]) -> None:
        self.rule = rule
        self.answer = answer

    def __call__(self, grad: Tensor) -> Tensor:
        answer = self.answer(grad)
        return torch.zeros_like(grad) if answer is None else answer  # None would leave it as it is


def edits_of(node: Node) -> list[tuple[int, Any]]:
    """The edits of gradients of `node`: which result, and the rule. Of the node of a leaf, those of the leaf."""
    leaf = leaf_of(node)
    if leaf is not None:
        return [(0, hook.rule) for hook in (leaf._backward_hooks or {}).values() if isinstance(hook, EditedLeaf)]
    metadata: Any = node.metadata
    found = [reference() for reference in metadata.get(EDITED, ())]
    return [(edited.index, edited.rule) for edited in found if edited is not None]


class _Last(threading.local):
    """The last answer that was put into a returned gradient, and that gradient."""

    pair: tuple[Callable[[], Tensor | None], Callable[[], Tensor | None]] = (lambda: None), (lambda: None)


_last = _Last()
