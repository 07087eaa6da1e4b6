"""`edit_gradient` and `edit_gradient_`: a gradient on its way through a graph, before that is built and after.

In x -> operation -> more operations -> result, what comes back from `more operations` is edited before `operation`
has it.
"""

from __future__ import annotations

import fnmatch
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node, get_gradient_edge

from gradoverride._core.autograd.ambient import Autocast
from gradoverride._core.autograd.nodes import hook_on, leaf_of, nodes_behind
from gradoverride._core.binding.contract import Meta, what
from gradoverride._core.binding.rule import Rule
from gradoverride._core.binding.signature import Forward
from gradoverride._core.calls.reading import Reading, Readings
from gradoverride._core.doors.edit import ask, ask_several, edit
from gradoverride._core.doors.edited_result import EditedLeaf, EditedResult
from gradoverride._core.private.dynamo import fail
from gradoverride._core.private.tensors import hook_on_result, is_freed, results_of
from gradoverride._core.values.tensors import is_differentiable
from gradoverride.errors import GraphError, RuleSignatureError, UnsupportedError

__all__ = ["GradientEdit", "edit_gradient", "edit_gradient_", "find_nodes"]

X = TypeVar("X")


def edit_gradient(x: X, rule: Callable[..., Any]) -> X:
    """`x`, with a gradient that goes through `rule` on its way to it. The value is the same.

    >>> import torch, gradoverride as go
    >>> x = torch.tensor([3.0, 4.0], requires_grad=True)
    >>> y = go.edit_gradient(x * 2, lambda grad_output: grad_output / grad_output.norm())
    >>> y.backward(torch.tensor([3.0, 4.0]))
    >>> x.grad
    tensor([1.2000, 1.6000])

    `x` is a tensor or any structure of them: the rule is given the structure of `x` and returns it, with None for
    what is no tensor and for a gradient that is to stop; a tensor in it without a gradient stays as it is. A rule may
    ask for the value besides, as `x` (or `input`, `output`), and a rule of the gradient alone keeps nothing.

    Shapes, dtypes: a gradient has the shape and device of its tensor; a differing floating dtype is cast.

    The result is a view of `x`, so torch refuses to write into it in place: write into `.clone()`. Raises `GraphError`
    if there is no floating or complex tensor in `x`, or one that requires grad is within an object that is no tuple,
    list, dict or dataclass; `RuleSignatureError` and `RuleResultError` for a wrong rule.
    """
    result: X = edit(x, rule)
    return result


def edit_gradient_(tensor_or_node: Tensor | Node, rule: Callable[..., Any]) -> GradientEdit:
    """Edit a gradient in a graph that is already built: that of a tensor, or of the result of a node.

    >>> import torch, gradoverride as go
    >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> middle = x * 3
    >>> loss = (middle * 5).sum()
    >>> with go.edit_gradient_(middle, lambda grad_output: -grad_output):
    ...     loss.backward(retain_graph=True)
    >>> x.grad
    tensor([-15., -15.])

    What comes back can be left or removed (`handle.remove()`), and is in force until then: for every backward pass,
    and for `torch.autograd.grad` with respect to the tensor itself. Of a leaf (a parameter) it is the gradient of each
    backward pass, before it is accumulated. Several edits of one tensor follow each other in the order in which they
    were made; where its node has edits besides, all of the tensor's come at the place of the first of them.

    The rule of a tensor may ask for its value, as in `edit_gradient`; that of a leaf is the one that it has when the
    pass runs. After a write in place the edit stays with what was before the write. The exception is a view: where it,
    or what it is a view of, is written into, torch gives it another node, and an edit that was made before has no
    effect on what is computed from it after. Make it after the write.

    The rule of a node is given the gradient of the node's result; of one with several (a `chunk`) a tuple of them,
    zeros where there is none, and returns a tuple. Rules run under the autocast state in which the edit was made.

    What compiled code has computed is one node: an edit of its result sees the gradient that comes from outside. Within
    such code it raises `UnsupportedError`.

    Raises `GraphError` for a tensor that needs no gradient, and for a graph that a backward pass has freed.
    """
    if torch.compiler.is_dynamo_compiling():
        fail(
            UnsupportedError,
            "edit_gradient_: what compiled code builds is one node, and a tensor within it has no gradient of its own. "
            "Use edit_gradient there, or call edit_gradient_ outside of compiled code",
        )
    if isinstance(tensor_or_node, Tensor):
        return _edit_tensor(tensor_or_node, rule)
    if not isinstance(tensor_or_node, Node):
        raise GraphError(
            f"edit_gradient_: 'tensor_or_node' must be a tensor that requires grad, or a node of a graph "
            f"(tensor.grad_fn, or one of find_nodes); got {what(tensor_or_node)}"
        )
    leaf = leaf_of(tensor_or_node)
    if leaf is not None:  # the node lives as long as a graph does
        return _edit_tensor(leaf, rule)
    return _edit_node(tensor_or_node, rule)


class GradientEdit:
    """An edit of a built graph, in force until it is left or removed."""

    def __init__(self, what: str, *parts: Callable[[], object]) -> None:
        self._what = what
        self._parts = parts  # what takes each of them off

    def remove(self) -> None:
        """Take the edit back. Once more does nothing."""
        parts, self._parts = self._parts, ()
        for take_off in parts:
            take_off()

    def __enter__(self) -> GradientEdit:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.remove()

    def __repr__(self) -> str:
        return f"GradientEdit({self._what}{'' if self._parts else ', removed'})"

    def __reduce__(self) -> NoReturn:
        raise UnsupportedError(
            f"edit_gradient_: what edits {self._what} can be neither copied nor pickled, for no copy of that is "
            "edited. Keep it outside of what is copied, and edit the copy anew"
        )


_of_tensor = Readings(
    Forward(
        lambda x: x,
        name="edit_gradient_",
        place="",
        reserved=("input", "output"),
        lacks="which edit_gradient_ does not have: it offers the value of the tensor, as 'x', 'input' or 'output'. Use "
        "edit_gradient before the graph is built",
    )
)
_of_node = Readings(Forward(lambda result: result, name="edit_gradient_", place=""))


def _edit_tensor(tensor: Tensor, rule: Any) -> GradientEdit:
    reading = _of_tensor.of(rule)
    if not tensor.requires_grad:
        if is_differentiable(tensor):
            rest = " that does not. Call requires_grad_() before the graph is built on it"
        else:
            rest = f" of {tensor.dtype}, which has no gradient. Edit that of a floating or complex tensor"
        raise GraphError(
            f"edit_gradient_: 'tensor_or_node' must require grad, for there to be a gradient to edit; got "
            f"{what(tensor)}{rest}"
        )
    value: Callable[[], Tensor | None] | None = None
    if reading.sources:  # a leaf is written into by its optimizer, and edited again
        value = weakref.ref(tensor) if tensor.is_leaf else _Value(tensor)

    removed = threading.Event()
    answer = _asking(rule, reading, removed, value)
    name = f"a tensor of shape {tuple(tensor.shape)}"
    if tensor.grad_fn is None:
        return GradientEdit(name, removed.set, hook_on(tensor, EditedLeaf(rule, answer)))
    _refuse_freed(tensor.grad_fn)
    result = EditedResult(tensor.grad_fn, tensor.output_nr, rule, answer)
    return GradientEdit(name, removed.set, result.forget, hook_on(tensor, result))


def _asking(
    rule: Any, reading: Reading, removed: threading.Event, value: Callable[[], Tensor | None] | None = None
) -> Callable[[Tensor | None], Tensor | None]:
    """What gives the answer of `rule` for a gradient, under the autocast of now.

    A pass that runs when the edit is `removed` has the hook still.
    """
    autocast = Autocast()

    def answer(grad: Tensor | None) -> Tensor | None:
        # It may be one of several results of its node, and others have a gradient.
        if grad is None or removed.is_set():
            return grad
        with autocast.restored():
            return ask(rule, reading, grad, value() if value else None)

    return answer


class _Value:
    """The value of a tensor for the rule of its own hook. The tensor itself would hold its node, which has the hook."""

    def __init__(self, tensor: Tensor) -> None:
        self.live = weakref.ref(tensor)
        self.detached = tensor.detach()
        self.version = tensor._version

    def __call__(self) -> Tensor:
        if self.detached._version != self.version:
            raise GraphError(
                f"edit_gradient_: the tensor of shape {tuple(self.detached.shape)} has been written into in place, and "
                "the rule asks for its value, which is gone. Write into a clone, or edit the gradient of the new value"
            )
        live = self.live()
        if live is None and torch.is_grad_enabled():
            raise UnsupportedError(
                "edit_gradient_: the second derivative through the value of a tensor needs the tensor, which is gone. "
                "Keep a reference to it, or use edit_gradient before the graph is built"
            )
        return self.detached if live is None else live


def _edit_node(node: Node, rule: Any) -> GradientEdit:
    asked = _of_tensor.of(rule).sources
    if asked:
        raise RuleSignatureError(
            f"rule {Rule(rule).who} asks for '{next(iter(asked))}', and a node keeps no value of its result. "
            "Give edit_gradient_ the tensor instead of the node"
        )
    reading = _of_node.of(rule)
    _refuse_freed(node)
    metas = results_of(node)
    if metas is None:
        raise UnsupportedError(
            f"edit_gradient_: what the node '{node.name()}' results in is not known to this version of torch. Give it "
            "the tensor"
        )
    removed = threading.Event()
    several: _Several | None = None
    if len(metas) == 1:
        results = [EditedResult(node, 0, rule, _asking(rule, reading, removed))]
        hooks: list[Callable[[Any], Any]] = [results[0]]
    else:
        several = _Several(rule, reading, metas, removed)
        results = [EditedResult(node, index, rule, several.answer_for(index)) for index in range(len(metas))]
        hooks = [*[several.collector_of(index) for index in range(len(metas))], *results]
    taken = [hook_on_result(node, index % len(metas), hook) for index, hook in enumerate(hooks)]
    offs = [off for off in taken if off is not None]
    if len(offs) < len(taken):
        raise UnsupportedError(
            "edit_gradient_: this version of torch lets nobody edit the gradient of a node's result. Give it the tensor"
        )
    parts: list[Callable[[], object]] = [*[result.forget for result in results], *offs]
    if several is not None:
        parts = [several.taking_off(parts)]
    return GradientEdit(f"the node {node.name()}", removed.set, *parts)


class _Several:
    """The edit of a node with several results: its hooks see one gradient each, and the rule is to see them all.

    The first hooks collect them, the next ones give the answers; torch runs them in this order, in one thread.
    """

    def __init__(self, rule: Any, reading: Reading, metas: list[Any], removed: threading.Event) -> None:
        self.removed = removed
        self.rule = rule
        self.reading = reading
        self.metas = metas
        self.autocast = Autocast()
        self.local = threading.local()

    def collector_of(self, index: int) -> Callable[[Any], None]:
        def collect(grad: Tensor | None) -> None:
            if index == 0:
                self.local.grads = []
            self.local.grads.append(grad)

        return collect

    def answer_for(self, index: int) -> Callable[[Any], Tensor | None]:
        def answer(grad: Tensor | None) -> Tensor | None:
            if index == 0:
                grads, self.local.grads = self.local.grads, []
                self.local.then = []
                try:
                    self.local.answers = self._answers(grads)
                except BaseException:
                    self._end()
                    raise
            found: Tensor | None = self.local.answers[index]
            self.local.answers[index] = None
            if index == len(self.metas) - 1:
                self._end()
            return found

        return answer

    def taking_off(self, parts: list[Callable[[], object]]) -> Callable[[], None]:
        """What does these: not between two answers, where the rule itself has its edit removed, but after the last."""

        def take_off() -> None:
            then = getattr(self.local, "then", None)
            for part in parts:
                part() if then is None else then.append(part)

        return take_off

    def _end(self) -> None:
        then, self.local.then = self.local.then, None
        for part in then:
            part()

    def _answers(self, grads: list[Tensor | None]) -> list[Tensor | None]:
        if self.removed.is_set():
            return [*grads]
        given = [Meta.of(*meta).zeros() if grad is None else grad for grad, meta in zip(grads, self.metas, strict=True)]
        with self.autocast.restored():
            answers = ask_several(self.rule, self.reading, tuple(given))
        for index, (grad, answer) in enumerate(zip(grads, answers, strict=True)):
            if grad is None and answer is not None and bool(answer.any()):
                raise GraphError(
                    f"edit_gradient_: the rule gives a gradient to result {index} of the node, which has none in "
                    "this backward pass, and torch passes none on. Edit the gradients before they are split"
                )
        return answers


def _refuse_freed(node: Node) -> None:
    if is_freed(node):
        raise GraphError(
            f"edit_gradient_: the graph of the node '{node.name()}' has been freed by a backward pass. Edit it before, "
            "or run that pass with retain_graph=True"
        )


# --- finding nodes ---


def find_nodes(root: Tensor | Node, pattern: str | Tensor | Callable[[Node], bool]) -> list[Node]:
    """The nodes of the graph behind `root` that match, from the root on. Empty if there are none.

    >>> import torch, gradoverride as go
    >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> loss = (x * 3).exp().sum()
    >>> [node.name() for node in go.find_nodes(loss, "Mul*")]
    ['MulBackward0']

    `pattern`: a glob over names of nodes (`"Mul*"`, `"*Gelu*"`, `"AccumulateGrad"`); a tensor, for the node that
    computed it (of a leaf, the one that accumulates its gradient); or a predicate of the node.

    Raises `GraphError` if `root` has no graph.
    """
    if isinstance(pattern, str):
        glob = pattern
        return [node for node in _nodes(root) if _matches(node.name(), glob)]
    if isinstance(pattern, Tensor):
        if not pattern.requires_grad:
            return []
        wanted = get_gradient_edge(pattern).node
        return [node for node in _nodes(root) if node is wanted]
    if isinstance(pattern, (type, nn.Module, Node)) or not callable(pattern):
        raise GraphError(
            f"find_nodes: 'pattern' must be a glob over names of nodes, a tensor or a predicate; got {what(pattern)}"
        )
    return [node for node in _nodes(root) if pattern(node)]


def _matches(name: str, glob: str) -> bool:
    return fnmatch.fnmatchcase(name, glob) or fnmatch.fnmatchcase(name.rpartition("::")[2], glob)


def _nodes(root: Tensor | Node) -> Iterator[Node]:
    """All nodes behind `root`, nearer ones first."""
    if isinstance(root, Tensor) and not root.requires_grad:
        raise GraphError(
            f"find_nodes: 'root' must have a graph, or be a node of one; got {what(root)} that requires no grad. "
            "Give it what backward() is called on"
        )
    start = get_gradient_edge(root).node if isinstance(root, Tensor) else root
    if not isinstance(start, Node):
        raise GraphError(f"find_nodes: 'root' must be a tensor with a graph, or a node of one; got {what(root)}")
    return nodes_behind(start)
