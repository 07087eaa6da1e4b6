"""What `connect_` makes: a leaf whose gradient goes on, once for each backward pass.

A leaf's gradient is complete when it is about to be accumulated. The pass is then asked to call back at its end, and
there all leaves that were reached are passed on together, so that graphs which they share are gone through once. Where
one connection leads to the leaf of another, the other waits until all has arrived.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from gradoverride._core.autograd.nodes import hook_on, leaves_behind, nodes_behind
from gradoverride._core.private.engine import after_backward, keeps_graph, pass_id, passes_now
from gradoverride.errors import GraphError, UnsupportedError

__all__ = ["Connection", "ends_of_connections"]


class Connection:
    """A connection to a graph that was built on a leaf, in force until it is left or removed."""

    def __init__(self, leaf: Tensor, end: Tensor, inputs: Sequence[Tensor], anew: Callable[[], Tensor] | None) -> None:
        """`end`: the value of `leaf`, with the graph of the `inputs` that it is connected to. `anew` gives another."""
        self._leaf = weakref.ref(leaf)
        self._end = end
        self._anew = anew
        starts = list(leaves_behind([_node_of(end)]))
        self._starts = [weakref.ref(start) for start in starts]
        self._waits_for: _Passing | None = None
        self._shape = tuple(leaf.shape)
        if any(start is leaf for connection in self._reached() for start in connection._live_starts()):
            raise GraphError(
                f"connect_: the graph of 'inputs' must not start at 'leaf' itself; the tensor of shape {self._shape} "
                "leads to them, and its gradient would go round for ever. Detach what leads back"
            )
        self._take_off: Callable[[], None] | None = hook_on(leaf, self._arrive)
        watched = {id(tensor): tensor for tensor in (*inputs, *starts) if tensor.requires_grad}
        self._watches = [_Watch(self, tensor) for tensor in watched.values()]
        _connections.add(self)

    def remove(self) -> None:
        """Take the connection away. Once more does nothing."""
        take_off, self._take_off = self._take_off, None
        if take_off is None:
            return
        _connections.discard(self)
        take_off()
        for watch in self._watches:
            watch.end()

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.remove()

    def __repr__(self) -> str:
        return f"Connection(a leaf of shape {self._shape}{'' if self._take_off else ', removed'})"

    def __reduce__(self) -> NoReturn:
        raise UnsupportedError(
            f"connect_: what connects a leaf of shape {self._shape} can be neither copied nor pickled, for no copy of "
            "that is connected. Keep it outside of what is copied, and connect the copy anew"
        )

    # --- where it leads ---

    def _live_starts(self) -> list[Tensor]:
        return [start for reference in self._starts if (start := reference()) is not None]

    def leads_to(self) -> list[Connection]:
        """The connections of the leaves that the graph of its inputs starts at."""
        starts = self._live_starts()
        return [other for other in list(_connections) if any(other._leaf() is start for start in starts)]

    def _reached(self) -> list[Connection]:
        """This one, and all that it leads to by way of others."""
        reached = [self]
        for connection in reached:  # which grows
            reached += [other for other in connection.leads_to() if other not in reached]
        return reached

    # --- when a gradient arrives ---

    def _arrive(self, grad: Tensor) -> None:
        """The hook on the leaf."""
        now = passes_now()
        if now and not any(found.accumulates for found in now):
            self._refuse_across([asked for found in now for asked in found.inputs])
            return
        leaf = self._leaf()
        assert leaf is not None, "its hook runs"
        number = pass_id()

        def complete(grads: tuple[Tensor | None, ...]) -> None:
            """Hooks of others on the leaf have run: this is what is about to be accumulated."""
            if pass_id() != number:  # one that has raised in between
                return
            hook.remove()
            if grads[0] is not None:
                with _lock:
                    (self._waits_for or _passing_now()).add(self, grads[0])

        hook = _node_of(leaf).register_prehook(complete)

    def _refuse_across(self, inputs: list[Any]) -> None:
        edges = [_edge_of(one) for one in inputs]
        nodes = {node for connection in self._reached() for node in nodes_behind(_node_of(connection._end))}
        if any(edge.node in nodes for edge in edges):
            raise GraphError(
                f"connect_: torch.autograd.grad does not go on from the leaf of shape {self._shape} to what is "
                "connected to it. Use backward(), or connect before the graph is built"
            )


class _Watch:
    """The hook on an input, or on a leaf behind it. A pass that is asked for certain gradients alone may come by on
    another way, and leave out the share of the leaf.
    """

    def __init__(self, connection: Connection, tensor: Tensor) -> None:
        self.connection = weakref.ref(connection)
        self.end = hook_on(tensor, self)
        weakref.finalize(connection, self.end).atexit = False

    def __call__(self, grad: Tensor) -> None:
        connection = self.connection()
        leaf = None if connection is None else connection._leaf()
        if leaf is None:
            return
        for found in passes_now():
            if not found.inputs or any(_edge_of(one).node is _node_of(leaf) for one in found.inputs):
                continue  # it goes all ways, or to the leaf, which sees for itself
            starts = [_edge_of(root).node for root in found.roots]
            if any(node is _node_of(leaf) for start in starts for node in nodes_behind(start)):
                way = "backward(inputs=...)" if found.accumulates else "torch.autograd.grad"
                raise GraphError(
                    f"connect_: {way} is not asked for the leaf of shape {tuple(leaf.shape)}, so what it finds for "
                    f"'inputs' or behind them, of shape {tuple(grad.shape)}, would lack the share of the leaf. Use "
                    "backward(), or connect before the graph is built"
                )


def _edge_of(tensor_or_edge: Any) -> GradientEdge:
    return tensor_or_edge if isinstance(tensor_or_edge, GradientEdge) else get_gradient_edge(tensor_or_edge)


def _node_of(tensor: Tensor) -> Node:
    return get_gradient_edge(tensor).node


_connections: weakref.WeakSet[Connection] = weakref.WeakSet()


def ends_of_connections(leaf: Tensor) -> list[GradientEdge]:
    """Where the gradient of `leaf` goes on."""
    return [get_gradient_edge(connection._end) for connection in list(_connections) if connection._leaf() is leaf]


class _Passing:
    """The gradients that one backward pass has brought to connected leaves, and what becomes of them at its end."""

    def __init__(self) -> None:
        self.grads: dict[Connection, Tensor] = {}
        self.keeps = keeps_graph()
        self.creates = torch.is_grad_enabled()
        self.inputs = [one for found in passes_now()[:1] for one in found.inputs]

    def add(self, connection: Connection, grad: Tensor) -> None:
        """One that arrives in the pass itself, or in one that this makes."""
        self.grads[connection] = self.grads[connection] + grad if connection in self.grads else grad

    def run(self) -> None:
        """Pass all of them on, each connection after those that lead to it."""
        left = [*dict.fromkeys(reached for connection in self.grads for reached in connection._reached())]
        for connection in left:
            connection._waits_for = self
        try:
            while left:
                led_to = {other for connection in left for other in connection.leads_to()}
                ready = [connection for connection in left if connection not in led_to]
                left = [connection for connection in left if connection in led_to]
                self._pass_on([connection for connection in ready if connection in self.grads])
        finally:
            for connection in [*left, *self.grads]:
                connection._waits_for = None

    def _pass_on(self, ready: list[Connection]) -> None:
        for connection in ready:
            connection._waits_for = None
        ends = [connection._end if connection._anew is None else connection._anew() for connection in ready]
        arrived = [self.grads.pop(connection) for connection in ready]
        # (There may be none: all inputs have been frozen since.)
        open_ends = [(end, grad) for end, grad in zip(ends, arrived, strict=True) if end.requires_grad]
        try:
            torch.autograd.backward(
                [end for end, _ in open_ends],
                [grad for _, grad in open_ends],
                retain_graph=self.keeps,
                create_graph=self.creates,
                inputs=self.inputs or None,
            )
        except RuntimeError as error:
            if "second time" not in str(error):
                raise
            raise GraphError(
                "connect_: the graph of 'inputs' has been freed, by an earlier backward pass or by the one that runs "
                "now, of which it is also a part. Run that with retain_graph=True, or connect before the graph is built"
            ) from error


_lock = threading.RLock()
_running: weakref.WeakValueDictionary[int, _Passing] = weakref.WeakValueDictionary()  # the engine holds them


def _passing_now() -> _Passing:
    """What the backward pass that runs now will pass on."""
    number = pass_id()
    passing = _running.get(number)
    if passing is None:
        passing = _running[number] = _Passing()
        if not after_backward(passing.run):
            raise UnsupportedError(
                "connect_: this version of torch does not say when a backward pass ends. Connect before the graph is "
                "built: connect"
            )
    return passing
