"""The graph behind `vjp`: the gradient as it would be without the rule, and nothing run twice.

In eager mode the forward runs on aliases (`Cut`), so its graph is the inner one, and is kept: `pull` asks it for
gradients. What must hold, and how:

- It keeps what plain autograd keeps, and is freed when plain autograd frees it: the outer node saves a tensor of no
  bytes (`Tail`) whose history is the inner graph, so the engine releases it, and `retain_graph` retains it.
- The derivative of a derivative is that of the rule as written: with `create_graph` the results of `pull` are tied
  to the outer tensors (`Lifted`), to any order.
- Under Dynamo the same graph is traced, with the aliases and the results as saved tensors.
- Under torch.func a graph does not outlive its transform: there, and only there, the forward runs again in the
  backward, with the same random numbers and on copies of the buffers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from gradoverride._core.ambient import RandomState
from gradoverride._core.contract import Meta
from gradoverride._core.function import TOKEN, Cut, Lifted, Tail, TracedCut
from gradoverride._core.private import fail, fast_apply, trace_gradients
from gradoverride.errors import UnsupportedError

__all__ = ["KeptGraph", "Replay", "TracedGraph"]

_cut = fast_apply(Cut)
_tail = fast_apply(Tail)
_lift = fast_apply(Lifted)


class KeptGraph:
    """The inner graph of one eager call."""

    __slots__ = ("edges", "ends", "metas", "outer", "token")

    @staticmethod
    def aliases_of(tensors: Sequence[Tensor]) -> tuple[KeptGraph, list[Tensor]]:
        """A graph that starts at aliases of `tensors`, and the aliases."""
        # A leaf lives as long as the graph anyhow; anything else is represented by a carrier of one element.
        carried = tuple(tensor.requires_grad and not tensor.is_leaf for tensor in tensors)
        cut = _cut(TOKEN, carried, *tensors)
        graph = object.__new__(KeptGraph)
        carriers = iter(cut[len(tensors) :])
        graph.outer = [
            next(carriers) if carry else (tensor if tensor.requires_grad else None)
            for carry, tensor in zip(carried, tensors, strict=True)
        ]
        node = cut[0].grad_fn
        graph.edges = [GradientEdge(node, index) for index in range(len(tensors))]
        graph.metas = [Meta(tensor) for tensor in tensors]
        graph.token = None
        return graph, list(cut[: len(tensors)])

    def end(self, results: Sequence[Tensor]) -> None:
        """The forward has run: `results` are where the graph ends."""
        self.ends = [index for index, result in enumerate(results) if result.requires_grad]
        if self.ends:
            self.token = _tail(*[results[index] for index in self.ends])

    def take_token(self) -> list[Tensor]:
        """What the outer node saves, to keep the graph."""
        token, self.token = self.token, None
        return [] if token is None else [token]

    def pull(self, token: Sequence[Tensor], grads: Sequence[Tensor | None], which: Sequence[int]) -> list[Tensor]:
        """The gradients of the aliases `which`, for the gradients `grads` of the results."""
        found: Sequence[Tensor | None] = [None] * len(which)
        if self.ends and which:
            ends = token[0].grad_fn.next_functions  # type: ignore[union-attr]  # a Tail always has a node
            found = self._pull([(ends[i], grads[end]) for i, end in enumerate(self.ends)], self._edges(which))
        results = [
            torch.zeros(meta.shape, dtype=meta.dtype, device=meta.device) if grad is None else grad
            for grad, meta in zip(found, [self.metas[index] for index in which], strict=True)
        ]
        return self._lifted(results) if torch.is_grad_enabled() else results

    def pull_parameters(
        self, token: Sequence[Tensor], grads: Sequence[Tensor], parameters: Sequence[GradientEdge]
    ) -> list[Tensor | None]:
        """The gradients of parameters that the graph reaches by themselves, tied to the outer tensors."""
        if not self.ends or not parameters:
            return [None] * len(parameters)
        ends = token[0].grad_fn.next_functions  # type: ignore[union-attr]  # a Tail always has a node
        pairs = [(ends[i], grads[end]) for i, end in enumerate(self.ends) if end < len(grads)]
        return self._tied(self._pull(pairs, parameters))

    def pull_from(self, ends: Sequence[Any], grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The gradients of all outer tensors, for gradients of these ends: the backward of `Lifted`."""
        which = [index for index, outer in enumerate(self.outer) if outer is not None]
        pairs = [(end, grad) for end, grad in zip(ends, grads, strict=True) if end[0] is not None]
        return self._tied(self._pull(pairs, self._edges(which)))

    def _edges(self, which: Sequence[int]) -> list[GradientEdge]:
        return [self.edges[index] for index in which]

    def _tied(self, found: list[Tensor | None]) -> list[Tensor | None]:
        if not torch.is_grad_enabled():
            return found
        given = [index for index, grad in enumerate(found) if grad is not None]
        lifted = iter(self._lifted([grad for grad in found if grad is not None]))
        return [next(lifted) if index in given else None for index in range(len(found))]

    def _pull(self, pairs: Sequence[tuple[Any, Tensor | None]], edges: Sequence[GradientEdge]) -> list[Any]:
        pairs = [(end, grad) for end, grad in pairs if grad is not None]
        if not pairs:
            return [None] * len(edges)
        return list(
            torch.autograd.grad(
                [GradientEdge(*end) for end, _ in pairs],
                edges,
                [grad for _, grad in pairs],
                retain_graph=True,  # the engine frees it with the outer node, as plain autograd would
                create_graph=torch.is_grad_enabled(),
                allow_unused=True,
            )
        )

    def _lifted(self, grads: Sequence[Tensor]) -> list[Tensor]:
        depending = [index for index, grad in enumerate(grads) if grad.requires_grad]
        outer = [tensor for tensor in self.outer if tensor is not None]
        results = list(grads)
        if depending and outer:
            lifted = _lift(self, len(depending), *[grads[index] for index in depending], *outer)
            for index, grad in zip(depending, lifted, strict=True):
                results[index] = grad
        return results


class TracedGraph:
    """The inner graph of one call that Dynamo traces. Its aliases and results are inputs of the outer Function."""

    @staticmethod
    def aliases_of(tensors: Sequence[Tensor]) -> tuple[TracedGraph, list[Tensor]]:
        """A graph that starts at aliases of `tensors`, and the aliases."""
        return TracedGraph(), list(TracedCut.apply(TOKEN, *tensors))

    def pull(
        self, aliases: Sequence[Tensor], results: Sequence[Tensor], grads: Sequence[Tensor], which: Sequence[int]
    ) -> list[Tensor]:
        """The gradients of the aliases `which`, for the gradients `grads` of the results."""
        pairs = [(result, grad) for result, grad in zip(results, grads, strict=True) if result.requires_grad]
        if not pairs:
            return [torch.zeros_like(aliases[index]) for index in which]
        return list(
            trace_gradients([r for r, _ in pairs], [aliases[index] for index in which], [g for _, g in pairs])
        )


class Replay:
    """Under torch.func: the forward, to be run again on the tensors that the backward is given."""

    __slots__ = ("drew", "forward", "random")

    def __init__(self) -> None:
        self.random = RandomState()
        self.drew = False
        self.forward: Callable[[Sequence[Tensor]], list[Tensor]] | None = None

    def ran(self, forward: Callable[[Sequence[Tensor]], list[Tensor]]) -> None:
        """The forward has run; `forward` runs it again on other tensors and gives the results that have gradients."""
        self.forward = forward
        self.drew = self.random.differs()

    def pull(self, tensors: Sequence[Tensor], grads: Sequence[Tensor], which: Sequence[int], who: str) -> list[Tensor]:
        """The gradients of the tensors `which`, for the gradients `grads` of the results."""
        forward = self.forward
        if forward is None:
            raise AssertionError("a replay is asked for before the forward has run")

        def part(*chosen: Tensor) -> tuple[Tensor, ...]:
            given = list(tensors)
            for index, tensor in zip(which, chosen, strict=True):
                given[index] = tensor
            return tuple(forward(given))

        chosen = [tensors[index] for index in which]
        try:
            if self.drew:
                with self.random.replayed():
                    _, pullback = torch.func.vjp(part, *chosen)
            else:
                _, pullback = torch.func.vjp(part, *chosen)
        except RuntimeError as error:
            if not self.drew or "random" not in str(error):
                raise
            fail(UnsupportedError, f"{who} draws random numbers, and this transform allows no replay of them: {error}")
        return list(pullback(tuple(grads)))
