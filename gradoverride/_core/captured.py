"""Tensors that require grad and are reached by a closure or a global: found, named and refused.

The forward runs on cut aliases, so a result that requires grad reached something else. Its gradient would be lost
without a word. Only when that happens are the names looked up.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from torch import Tensor, nn

from gradoverride._core import scan
from gradoverride._core.private import evaluated_while_tracing, fail, note_while_tracing, take_noted
from gradoverride.errors import CapturedTensorError

__all__ = ["captured_names", "foreign_leaf", "refuse"]


def foreign_leaf(results: list[Tensor], known: set[int], stops: set[Any]) -> Tensor | None:
    """A leaf that the graph of `results` reaches and that is not among `known` (ids of tensors).

    The walk does not go below the nodes `stops`: those of tensors that are known and have a history of their own.
    """
    seen = set(stops)
    stack = []
    for result in results:
        if result.grad_fn is not None:
            stack.append(result.grad_fn)
        elif id(result) not in known:
            return result
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            if id(leaf) not in known:
                return leaf
            continue
        for below, _ in node.next_functions:
            if below is not None:
                stack.append(below)
    return None


def foreign_while_tracing(results: Sequence[Tensor], known: Sequence[Tensor]) -> bool:
    """Whether there is such a leaf, for tensors that Dynamo traces. `known` may have a history of their own."""
    for tensor in (*results, *known):
        note_while_tracing(tensor)
    return _noted_foreign(len(results))


@evaluated_while_tracing
def _noted_foreign(count: int) -> bool:
    noted = take_noted()
    known = noted[count:]
    stops = {tensor.grad_fn for tensor in known if tensor.grad_fn is not None}
    return foreign_leaf(noted[:count], {id(tensor) for tensor in known}, stops) is not None


def refuse(who: str, names: str, leaf: Tensor | None = None) -> NoReturn:
    """Raise the error for `who`, which captured what `names` lists, or `leaf` if no name is known."""
    if names:
        what = f"reached {names}, which requires grad, by a closure or a global"
    else:
        shape = f" of shape {tuple(leaf.shape)}" if leaf is not None else ""
        what = f"reached a tensor{shape} that requires grad by a closure, a global or an attribute, or made one itself"
    fail(
        CapturedTensorError,
        f"{who} must get each tensor that wants a gradient as an argument, or as a parameter of its module through "
        f"'self'; it {what}, and that gradient would be lost. Pass it as an argument, or detach() it"
        f"{'' if names else '; of one that it made, detach() what it computes from it'}",
    )


def captured_names(fn: Any, leaf: Tensor | None = None, receiver: Any = None) -> list[str]:
    """The names under which `fn`, a method of `receiver` perhaps, knows `leaf`, or else any tensor with a gradient."""
    function = scan.python_function(fn)
    found: list[tuple[str, Tensor]] = []
    for name, value in _names(function) if function is not None else ():
        found += _tensors(f"'{name}'", value, depth=2)
    for name, value in getattr(receiver, "__dict__", {}).items():
        if name not in ("_parameters", "_buffers", "_modules"):  # these are reached through self, as they should be
            found += _tensors(f"'self.{name}'", value, depth=2)
    exact = [name for name, tensor in found if leaf is not None and tensor is leaf]
    return exact or [name for name, _ in found]


def _names(function: Any) -> Iterator[tuple[str, Any]]:
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield name, cell.cell_contents
        except ValueError:  # a name that its enclosing function has not assigned yet
            continue
    for name in scan.global_names(function.__code__):
        if name in function.__globals__:
            yield name, function.__globals__[name]


def _tensors(path: str, value: Any, depth: int) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        if value.requires_grad:
            yield path, value
    elif isinstance(value, nn.Module):
        for name, parameter in value.named_parameters():
            if parameter.requires_grad:
                yield f"{path[:-1]}.{name}'", parameter
    elif depth and isinstance(value, (list, tuple)):
        for index, part in enumerate(value):
            yield from _tensors(f"{path[:-1]}[{index}]'", part, depth - 1)
    elif depth and isinstance(value, dict):
        for key, part in value.items():
            yield from _tensors(f"{path[:-1]}[{key!r}]'", part, depth - 1)
