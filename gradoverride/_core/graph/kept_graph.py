"""The graph behind `vjp`: the gradient as it would be without the rule, and nothing run twice.

In eager mode the forward runs on aliases (`Cut`), so its graph is the inner one, and is kept: `pull` asks it for
gradients. What must hold, and how:

- It keeps what plain autograd keeps, and is freed when plain autograd frees it: the outer node saves a tensor of no
  bytes that holds the ends of the inner graph, so the engine releases it, and `retain_graph` retains it. Where hooks
  on saved tensors would give back another tensor, its history holds them (`Tail`).
- Of a checkpoint it is a part of the backward pass that asks for it (`passes`), for which the block runs again once.
  What that gives back, once in a pass, is held for what else is asked for in it (`unpacked`).
- The derivative of a derivative is that of the rule as written: with `create_graph` the results of `pull` are tied
  to the outer tensors (`Lifted`), to any order.
- An argument that requires no grad is a constant to the graph, as it is to torch, which has no derivative for some
  of them (running statistics, the weights of classes): `vjp` gives zeros for it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from gradoverride._core.autograd.function import CUT, Carry, Cut, Lifted, Tail, refuse_batched, refuse_lost
from gradoverride._core.autograd.nodes import nodes_behind
from gradoverride._core.binding.contract import Meta, shape_text
from gradoverride._core.graph.captured import foreign_leaf
from gradoverride._core.private.dynamo import fail
from gradoverride._core.private.engine import comes_to, fast_apply, keeps_graph, pass_id, pull, roots_if_given_inputs
from gradoverride._core.private.modes import as_part_of_pass, checkpoints_in_pass, in_modes
from gradoverride._core.private.tensors import (
    counted_once,
    hooks_on_saved,
    hooks_over_others,
    made_at_import,
    saves_plainly,
)
from gradoverride._core.python.reach import SCALARS
from gradoverride.errors import UnsupportedError

if TYPE_CHECKING:
    from gradoverride._core.calls.call import Call
    from gradoverride._core.calls.saver import Saver

__all__ = ["KeptGraph", "is_hooked", "outer_of", "shares_versions"]

_cut = fast_apply(Cut)
_carry = fast_apply(Carry)
_tail = fast_apply(Tail)
_lift = fast_apply(Lifted)
_EMPTY = made_at_import(0)


class KeptGraph:
    """The inner graph of one eager call."""

    __slots__ = (
        *("aliases", "apart", "constants", "edges", "ends", "metas", "natural", "node", "outer", "passes", "starts"),
        *("unpacked", "who"),
    )

    def __init__(self, tensors: Sequence[Tensor], may_write: bool, natural: Sequence[Tensor] = ()) -> None:
        """`may_write`: whether the forward may; `natural`: parameters that it meets themselves, no aliases."""
        wanted = [tensor for tensor in tensors if tensor.requires_grad]
        shares = shares_versions(may_write)
        plain = [tensor.detach() if shares else tensor.data for tensor in wanted]
        cut = list(_cut(CUT, *plain)) if wanted else []
        # Without one (an embedding of integers) there is only what the forward met itself.
        node: Any = cut[0].grad_fn if cut else None
        self.node, self.who = node, ""
        self.passes: set[int] | None = None
        self.unpacked: _Unpacked | None = None
        # For those that are not leaves now: keeping them would keep their memory.
        self.natural = [
            (None, tensor) if tensor.is_leaf else (_edge_of(tensor), _carry(tensor)[0]) for tensor in natural
        ]
        self.constants: Sequence[int] = [i for i, tensor in enumerate(tensors) if not tensor.requires_grad]
        self.edges: list[Any] = [GradientEdge(node, index) for index in range(len(cut))]
        self.aliases = cut
        for index in self.constants:
            # What is written there makes it a part of this graph, which its tensor must not be.
            cut.insert(index, tensors[index].detach() if may_write else tensors[index])
            self.edges.insert(index, None)
        self.metas = [Meta(tensor) for tensor in tensors]
        inner = [tensor for tensor in tensors if tensor.requires_grad and not tensor.is_leaf]
        carriers = iter(_carry(*inner) if inner else ())
        self.outer = [
            (tensor if tensor.is_leaf else next(carriers)) if tensor.requires_grad else None for tensor in tensors
        ]

    @classmethod
    def alone(cls, tensors: Sequence[Tensor], may_write: bool) -> KeptGraph:
        """The same where torch's own graph never runs through this one.

        A leaf lives as long as the outer graph: then an alias that is a leaf itself keeps no more, and costs less.
        """
        aliases, shares = [], shares_versions(may_write)
        for tensor in tensors:
            if not (tensor.requires_grad and tensor.is_leaf):
                return cls(tensors, may_write)
            aliases.append((tensor.detach() if shares else tensor.data).requires_grad_())
        graph = cls.__new__(cls)
        graph.aliases = graph.edges = graph.metas = aliases  # type: ignore[assignment]  # a tensor has what a Meta has
        graph.outer = tensors  # type: ignore[assignment]  # never written to
        graph.node, graph.natural, graph.constants, graph.who = None, [], (), ""
        graph.passes = graph.unpacked = None
        return graph

    def start(self) -> list[Tensor]:
        """The aliases, for the forward to run on. They are not kept."""
        aliases, self.aliases = self.aliases, []
        return aliases

    @contextlib.contextmanager
    def unpacked_once(self) -> Iterator[None]:
        """A context for a forward whose graph may be asked several times in a pass."""
        hooks = hooks_on_saved()
        if hooks is None:
            yield
            return
        pack, unpack = hooks
        self.unpacked, self.passes = unpacked, passes = _Unpacked(), set[int]()

        def once(held: _Held) -> Any:
            number = checkpoints_in_pass() if unpacked.again is None else unpacked.again
            if number not in passes:
                return unpack(held.packed)
            if held.number != number:
                with as_part_of_pass(number):
                    held.tensor, held.number = unpack(held.packed), number
                unpacked.held.append(held)
            return held.tensor

        with hooks_over_others(lambda tensor: _Held(pack(tensor)), once):
            yield

    def forget(self) -> None:
        """The backward of the call has run: nothing else is asked for in this pass."""
        if self.unpacked is not None:
            for held in self.unpacked.held:
                held.tensor = held.number = None
            self.unpacked.held.clear()

    def guard(self, who: str) -> None:
        """From now on a gradient that comes to an alias without being asked for is an error: it came to a tensor that
        left the forward otherwise than in its result, and would be lost here.
        """
        self.who = who
        if self.node is not None:
            self.node.who = who
            self.starts = [self.node]
        else:
            aliases = [alias for alias in self.edges if alias is not None]
            self.starts = [_start_of(alias) for alias in aliases]
            for alias in aliases:
                alias.register_post_accumulate_grad_hook(lambda _: refuse_lost(who))

    def stray(self, result: Tensor) -> bool:
        """Whether the graph of `result` reaches a leaf that is none of the aliases."""
        if self.node is None:
            return foreign_leaf([result], {id(leaf) for leaf in self.edges}, set()) is not None
        return foreign_leaf([result], set(), {self.node}) is not None

    def stops(self, leaves: set[int], nodes: set[Any]) -> None:
        """Add where this graph begins: the ids of leaves, or a node."""
        if self.node is None:
            leaves.update(map(id, self.edges))
        else:
            nodes.add(self.node)

    def end(self, results: Sequence[Tensor]) -> Tensor:
        """The forward has run: `results` are where the graph ends. The outer node saves what this returns."""
        self.ends = tuple([index for index, result in enumerate(results) if result.requires_grad])
        if not self.ends:  # a forward may cut all gradients, as torch.detach does
            return _EMPTY
        if saves_plainly():
            # A mode for fake tensors takes no other; without one this is the fastest new tensor.
            token: Any = results[0].new_empty(0) if in_modes() else _EMPTY.data
            token.ends = tuple([_edge_of(results[index]) for index in self.ends])
            return token
        self.apart = False
        if self.passes is None:
            self.passes = set()
        return _tail(*[results[index] for index in self.ends])

    def save(self, call: Call, saver: Saver, outs: Sequence[Tensor], values: Sequence[Any]) -> None:
        """The forward has run. What keeps the graph is the last of the saved tensors (`Call.tensors_to_save`)."""
        call.token = self.end([*outs, *saver.floating])
        self.apart = bool(call.computed)  # these are shown with their history: torch's own pass goes through it
        # A forward that reaches nothing else may still put a tensor into an argument that is none.
        plain = all([isinstance(value, Tensor) or type(value) in SCALARS for value in values])
        if call.plan.reach is None or not plain:
            self.guard(call.plan.forward.who)

    def pull(
        self,
        saved: Sequence[Tensor],
        grads: Sequence[Tensor | None],
        which: Sequence[int],
        parameters: Sequence[GradientEdge] = (),
        last: bool = False,
    ) -> list[Any]:
        """The gradients of the aliases `which`, for the gradients `grads` of the results (of the first ones, at least).

        After them those of `parameters` that the forward met itself, None for one that it did not use. The `last` to
        ask in this backward frees what it has passed, as the backward itself does.
        """
        if self.who and self._is_met():
            refuse_lost(self.who)  # before what is on the way there too has freed what it saved
        asked = [index for index in which if index not in self.constants] if self.constants else which
        edges = [*self.edges_of(asked), *parameters] if parameters else self.edges_of(asked)
        given = [grads[end] if end < len(grads) else None for end in self.ends]
        again = torch.is_grad_enabled()
        cut = _cut_off(given) if again else given
        keep = again or not last or keeps_graph()
        ends = self._ends_of(saved[-1])
        try:
            if self.passes is None:
                found = _pull(ends, cut, edges, keep)
            else:
                with self._in_pass(self.passes):
                    found = _pull(ends, cut, edges, keep)
        except RuntimeError as error:
            if "selective activation checkpoint" in str(error):
                _refuse_selective()
            raise
        if self.constants:
            for place, index in enumerate(which):
                if index in self.constants:
                    found.insert(place, None)
        for place, index in enumerate(which):
            if found[place] is None:  # not reached, or a constant: the derivative is zero
                like = self.metas[index]
                found[place] = torch.zeros(like.shape, dtype=like.dtype, device=like.device)
        if not again:
            return found
        known = [(edge, outer) for edge, outer in zip(self.edges, self.outer, strict=True) if outer is not None]
        known += [(edge or _edge_of(outer), outer) for edge, outer in self.natural]
        return _tied(found, [*known, *_cuts(cut, given)])

    @contextlib.contextmanager
    def _in_pass(self, passes: set[int]) -> Iterator[None]:
        """A context for a gradient: a part of the backward pass that runs now, if that has not come here before.

        A checkpoint gives back what it has saved once in a pass. So for another gradient one within the forward runs
        its block again, and so does one around it, of which nothing is held.
        """
        number = checkpoints_in_pass()
        if self.apart or number == -1 or number in passes:
            again = number if number in passes and not self.apart else None
            with as_part_of_pass(None), contextlib.nullcontext() if self.unpacked is None else self.unpacked.of(again):
                yield
        else:
            passes.add(number)
            with as_part_of_pass(number):
                yield

    def _is_met(self) -> bool:
        """Whether the backward pass that runs now comes to an alias; of one that is given its inputs, and leaves these
        out, whether it would come to one, and an input is behind the arguments.
        """
        roots = roots_if_given_inputs()
        if not roots:
            return any([comes_to(node) for node in self.starts])
        behind = _ids_behind(roots)
        return any([id(node) in behind for node in self.starts]) and any(map(_is_wanted, self.outer))

    def _ends_of(self, token: Tensor) -> Sequence[GradientEdge]:
        if not self.ends:
            return ()
        ends = getattr(token, "ends", None)
        return ends or [GradientEdge(*end) for end in token.grad_fn.next_functions]  # type: ignore[union-attr]

    def edges_of(self, which: Sequence[int]) -> Sequence[Any]:
        """Where the gradients of these aliases are found."""
        return self.edges if len(which) == len(self.edges) else [self.edges[index] for index in which]


def _start_of(leaf: Tensor) -> Any:
    """The node that accumulates the gradient of a leaf: `get_gradient_edge` in half the time, where there are views."""
    try:
        following = leaf.view_as(leaf)
    except RuntimeError:  # sparse tensors, and those of mkldnn, have none
        following = leaf.clone()
    return following.grad_fn.next_functions[0][0]  # type: ignore[union-attr]  # it has one


def _ids_behind(roots: Sequence[Any]) -> set[int]:
    """The ids of the nodes behind the roots of the backward pass that runs now."""
    global _behind
    number, found = pass_id(), _behind  # which another thread may replace
    if number != found[0] or number < 0:
        nodes = [root.node if isinstance(root, GradientEdge) else root.grad_fn for root in roots]
        found = _behind = number, {id(node) for start in nodes if start is not None for node in nodes_behind(start)}
    return found[1]


_behind: tuple[int, set[int]] = -1, set()  # in the last pass that was asked about


def _is_wanted(outer: Tensor | None) -> bool:
    """Whether the gradient of what a tensor leads to is wanted in the backward pass that runs now."""
    if outer is None:
        return False
    node = _edge_of(outer).node if outer.is_leaf else outer.grad_fn.next_functions[outer.output_nr][0]  # type: ignore[union-attr]  # no leaf
    return comes_to(node, leaves=True)


class _Unpacked:
    """What the hooks of others have given back in a pass, for what is asked for again in it."""

    __slots__ = ("again", "held")

    def __init__(self) -> None:
        self.held: list[_Held] = []
        self.again: int | None = None  # the pass in which something is asked for again, now

    @contextlib.contextmanager
    def of(self, number: int | None) -> Iterator[None]:
        """A context for what is asked for again in this pass."""
        before, self.again = self.again, number
        try:
            yield
        finally:
            self.again = before


class _Held:
    """What is saved under the hooks of others: what they made of it, and in which pass they gave which tensor back."""

    __slots__ = ("number", "packed", "tensor")

    def __init__(self, packed: Any) -> None:
        self.packed = packed
        self.number: int | None = None
        self.tensor: Any = None


def shares_versions(forward_may_write: bool) -> bool:
    """Whether aliases count writes together with their tensors, so that a write after the forward into what its graph
    or the rule has saved, or a view of that, raises as ever. (`.data` has a version counter of its own.)
    """
    return not forward_may_write or counted_once is not None


class Tie:
    """How derivatives that end at `ends` depend on outer tensors, each known inside by an edge or an alias."""

    __slots__ = ("ends", "pairs")

    def __init__(self, ends: Sequence[GradientEdge], pairs: Sequence[tuple[Any, Tensor]]) -> None:
        self.ends = ends
        self.pairs = pairs

    def backward(self, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The gradients of the outer tensors, for those of the derivatives."""
        again = torch.is_grad_enabled()
        cut = _cut_off(grads) if again else grads
        for inner, outer in self.pairs:
            if inner is not outer and getattr(getattr(inner, "node", None), "variable", None) is outer:
                _refuse_hooked(outer)
        with as_part_of_pass(None):  # it goes through kept graphs that this pass may come to besides
            found = _pull(self.ends, cut, [inner for inner, _ in self.pairs])
        if again:
            found = _tied(found, [*self.pairs, *_cuts(cut, grads)])
        return found


def _refuse_selective() -> NoReturn:
    """A checkpoint runs its block again for each pass of the engine, of which this is one of its own."""
    fail(
        UnsupportedError,
        "the gradient without the rule ('vjp', or that of parameters which the rule leaves to autograd) must be asked "
        "for once in a backward pass, and not be differentiated, in a selective checkpoint "
        "(create_selective_checkpoint_contexts), which runs its block once more only; it was asked for again. "
        "Checkpoint the block without context_fn, leave the ruled call out of it, or compute the gradient in the rule",
    )


def is_hooked(edge: GradientEdge) -> bool:
    """Whether a parameter has hooks that torch runs where its gradient is asked for at this edge."""
    return bool(getattr(getattr(edge.node, "variable", None), "_backward_hooks", None))


def _refuse_hooked(leaf: Tensor) -> None:
    if leaf._backward_hooks:
        fail(
            UnsupportedError,
            f"a second derivative with respect to a parameter of shape {shape_text(leaf.shape)}, of which a rule's "
            "'vjp' has found the first, must be taken of a forward that ran after the parameter's hook was registered, "
            "or torch would run the hook twice. It ran before. Register the hook before the forward",
        )


def _tied(found: Sequence[Tensor | None], pairs: Sequence[tuple[Any, Tensor]]) -> list[Tensor | None]:
    """`found`, computed inside, as functions of the outer tensors of `pairs`."""
    refuse_batched(found)
    depending = [index for index, grad in enumerate(found) if grad is not None and grad.requires_grad]
    results = list(found)
    if depending:
        inner = [grad for grad in found if grad is not None and grad.requires_grad]
        tie = Tie([_edge_of(grad) for grad in inner], pairs)
        given = [grad.detach() for grad in inner]
        for index, grad in zip(depending, _lift(tie, given, *[outer for _, outer in pairs]), strict=True):
            results[index] = grad
    return results


def _cut_off(grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Aliases of gradients that have a history: what is computed of them is tied to them by `Tie`, and only so."""
    return [grad.detach().requires_grad_() if grad is not None and grad.requires_grad else grad for grad in grads]


def _cuts(cut: Sequence[Tensor | None], grads: Sequence[Tensor | None]) -> list[tuple[Any, Tensor]]:
    pairs = zip(cut, grads, strict=True)
    return [(alias, grad) for alias, grad in pairs if grad is not None and alias is not None and alias is not grad]


def _pull(ends: Sequence[Any], grads: Sequence[Tensor | None], edges: Sequence[Any], keep: bool = True) -> list[Any]:
    for grad in grads:
        if grad is None:
            ends = [end for end, given in zip(ends, grads, strict=True) if given is not None]
            grads = [given for given in grads if given is not None]
            break
    if not ends or not edges:
        return [None] * len(edges)
    return list(pull(tuple(ends), tuple(edges), tuple(grads), keep, torch.is_grad_enabled()))


def outer_of(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Tensors that lead to those of `tensors` that require grad, and keep no memory of theirs."""
    wanted = [tensor for tensor in tensors if tensor.requires_grad]
    inner = [tensor for tensor in wanted if not tensor.is_leaf]
    leaves = [tensor for tensor in wanted if tensor.is_leaf]
    return [*leaves, *(_carry(*inner) if inner else ())]


def _edge_of(tensor: Tensor) -> GradientEdge:
    node = tensor.grad_fn
    return get_gradient_edge(tensor) if node is None else GradientEdge(node, tensor.output_nr)
