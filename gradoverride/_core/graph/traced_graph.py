"""The graph behind `vjp` in a call that Dynamo traces: aliases, results and what is between are part of what it traces.

So there is nothing to keep: the aliases and the results are inputs of the outer Function, which saves them, and a
compiler sees one graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gradoverride._core.autograd.function import TOKEN, TracedCut
from gradoverride._core.private.dynamo import trace_gradients

if TYPE_CHECKING:
    from gradoverride._core.calls.call import Call
    from gradoverride._core.calls.saver import Saver

__all__ = ["TracedGraph", "cut", "distinct", "pull_short"]


class TracedGraph:
    """The inner graph of one call that Dynamo traces."""

    __slots__ = ("alias_slots", "aliases", "given", "out_slots", "wanted")

    def __init__(self, aliases: list[Tensor], wanted: list[bool]) -> None:
        self.aliases = aliases
        self.given = list(aliases)
        self.wanted = wanted

    @classmethod
    def of(cls, tensors: Sequence[Tensor], *, copies: bool) -> TracedGraph:
        """One that starts at aliases of these; the forward meets `copies` where it may write, for the graph starts at
        what was there before.
        """
        wanted = [tensor.requires_grad for tensor in tensors]
        given = distinct([tensor for tensor in tensors if tensor.requires_grad])
        found = iter(cut(*given) if given else ())
        graph = cls([next(found) if wants else tensor for tensor, wants in zip(tensors, wanted, strict=True)], wanted)
        if copies:
            graph.given = [alias.clone() for alias in graph.aliases]
        return graph

    def start(self) -> list[Tensor]:
        """What the forward is to run on. It is not kept."""
        given, self.given = self.given, []
        return given

    def save(self, call: Call, saver: Saver, outs: Sequence[Tensor], values: Sequence[Any]) -> None:
        """The forward has run. The results come next among the inputs of the Function."""
        self.alias_slots = saver.extras(self.aliases)
        self.aliases = []
        self.out_slots = [saver.slot(len(saver.inputs) + k) for k in range(len(outs))]

    def pull(
        self,
        saved: Sequence[Tensor],
        grads: Sequence[Tensor],
        which: Sequence[int],
        parameters: Sequence[Any] = (),
        last: bool = False,
    ) -> list[Tensor]:
        """The gradients of the aliases `which`, for the gradients `grads` of the results."""
        aliases = [saved[slot] for slot in self.alias_slots]
        results = [saved[slot] for slot in self.out_slots]
        pairs = [(result, grad) for result, grad in zip(results, grads, strict=True) if result.requires_grad]
        asked = [aliases[index] for index in which if self.wanted[index]]
        if not pairs or not asked:
            return [torch.zeros_like(aliases[index]) for index in which]
        found = iter(trace_gradients([result for result, _ in pairs], asked, [grad for _, grad in pairs]))
        return [next(found) if self.wanted[index] else torch.zeros_like(aliases[index]) for index in which]


def cut(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Aliases that start a graph of their own."""
    found: tuple[Tensor, ...] = TracedCut.apply(TOKEN, *tensors)  # type: ignore[no-untyped-call]
    return found


def pull_short(saved: Sequence[Tensor], grads: Sequence[Tensor], which: Sequence[int], last: bool) -> list[Tensor]:
    """The gradients of the aliases that a short call has `saved`, its result behind them (`short_function.py`)."""
    *aliases, result = saved
    if not result.requires_grad:
        return [torch.zeros_like(alias) for alias in aliases]
    return [*trace_gradients([result], aliases, list(grads))]


def distinct(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Dynamo breaks its graph where a Function gets one tensor twice (pytorch issue 183604)."""
    found: list[Tensor] = []
    for tensor in tensors:
        one = tensor
        for other in found:
            if tensor is other:
                one = tensor.view_as(tensor)
        found.append(one)
    return found
