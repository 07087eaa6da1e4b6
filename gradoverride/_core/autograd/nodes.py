"""The graph behind a result: its nodes, the leaves that it starts at, and the rules of this library in it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

from torch import Tensor
from torch.autograd.graph import Node

from gradoverride._core.autograd.function import Alias, General, KeptAlias, Transformed
from gradoverride._core.private.tensors import function_of

__all__ = ["hook_on", "leaf_of", "leaves_behind", "nodes_behind", "rule_of"]


def nodes_behind(start: Node) -> Iterator[Node]:
    """`start` and all nodes that it leads to, nearer ones first."""
    seen = {start}
    queue = [start]
    for node in queue:  # which grows
        yield node
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                queue.append(following)


def leaves_behind(starts: Iterable[Any], stops: Collection[Any] = ()) -> Iterator[Tensor]:
    """The leaves that the nodes `starts` lead to, not by way of the nodes `stops`, last ones first.

    Apart from `nodes_behind`, for each call with a graph of its own walks through that.
    """
    seen = set(stops)
    stack = list(starts)
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        after = node.next_functions
        for following, _ in after:
            if following is not None:
                stack.append(following)
        if not after and (leaf := getattr(node, "variable", None)) is not None:  # `leaf_of`, in less time
            yield leaf


def leaf_of(node: Any) -> Tensor | None:
    """The leaf whose gradient `node` accumulates. None for any other node."""
    leaf = getattr(node, "variable", None)
    # A Function of somebody's may call so what it keeps in its context, which is the node.
    return leaf if isinstance(leaf, Tensor) and not node.next_functions else None


def hook_on(tensor: Tensor, hook: Callable[[Any], Any]) -> Callable[[], None]:
    """Register `hook`; gives what takes it off again. Once more does nothing."""
    handle, held = tensor.register_hook(hook), weakref.ref(tensor)

    def take_off() -> None:
        handle.remove()
        tensor = held()
        if tensor is not None and tensor.is_leaf and not tensor._backward_hooks:
            tensor._backward_hooks = None  # as it was: torch leaves an empty dict

    return take_off


def rule_of(node: Any) -> tuple[Any, bool]:
    """The rule that is the backward of `node`, and whether it edits a gradient. None where torch's own is."""
    function = function_of(node)
    if function is None or function.__module__ != General.__module__:
        return None, False
    if issubclass(function, (Alias, KeptAlias)):
        return node.rule[0], True
    if issubclass(function, (General, Transformed)):
        return node.call.rule, node.call.plan.is_edit
    return getattr(function.backward, "__globals__", {}).get("_go_rule"), False
