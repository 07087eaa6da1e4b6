"""The gradient without the rule: `vjp`, and that of parameters which the rule leaves to autograd.

One way to find it for each way that a call is run:

    KeptGraph    eager: the graph of the forward, kept (`kept_graph.py`)
    TracedGraph  the same as Dynamo traces it (`traced_graph.py`)
    Replay       under torch.func, where a graph does not outlive its transform: the forward once more (`replay.py`)

Each gives the aliases that the forward is to run on (`start`), has saved what the backward needs (`save`), and is asked
for gradients there (`pull`). The tensors are those of a call in their order: the leaves, then the aliased parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from gradoverride._core.autograd.ambient import EAGER, TRACED
from gradoverride._core.graph.kept_graph import KeptGraph
from gradoverride._core.graph.replay import Replay
from gradoverride._core.graph.traced_graph import TracedGraph

if TYPE_CHECKING:
    from gradoverride._core.calls.call import Call

__all__ = ["inner_graph"]


def inner_graph(
    call: Call, module: nn.Module | None, receiver: Any, tensors: Sequence[Tensor], values: Sequence[Any]
) -> KeptGraph | TracedGraph | Replay:
    """Such a one for `call`, before its forward runs on `values`."""
    if call.mode == TRACED:
        return TracedGraph.of(tensors, copies=call.plan.forward_may_write)
    if call.mode != EAGER:
        return Replay(call, module, receiver, tensors, values)
    if not call.params:
        return KeptGraph.alone(tensors, call.plan.forward_may_write)
    natural: list[Any] = [param.tensor for param in call.natural]
    return KeptGraph(tensors, call.plan.forward_may_write, natural)
