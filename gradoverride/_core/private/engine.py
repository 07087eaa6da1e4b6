"""What torch puts around a Function and the engine, left out; the backward pass that runs now."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch.autograd import Function

__all__ = [
    "fast_apply",
    "call_directly",
    "can_call_directly",
    "pull",
    "pass_id",
    "keeps_graph",
    "Pass",
    "passes_now",
    "roots_if_given_inputs",
    "passes_on",
    "comes_to",
    "OWNERS_IF_RETURNED",
    "after_backward",
]

# --- what torch puts around a Function and the engine, left out ---


def fast_apply(function: type[Function]) -> Callable[..., Any]:
    """`function.apply` without its Python layer.

    `Function.apply` runs `inspect.signature` on each call of a Function with `setup_context` (10 us), to bind
    defaults that ours do not have, and asks for functorch, which our callers have already done.
    """
    return getattr(super(Function, function), "apply", function.apply)


def call_directly(function: type[Function], backward: Callable[..., Any]) -> None:
    """Let the engine call `backward(ctx, *grads)` itself.

    torch puts a method between that looks the function up for each call (0.4 us). `ctx.metas` is None unless the
    forward sets it.
    """
    node: Any = function._backward_cls  # torch's metaclass makes it
    node.apply = backward
    node.metas = None


def can_call_directly() -> bool:
    """Whether `call_directly` works here. Where it does not, every call takes the general path."""
    return hasattr(Function, "_backward_cls")


def pull(ends: Any, edges: Any, grads: Any, keep: bool, create_graph: bool) -> tuple[torch.Tensor | None, ...]:
    """`torch.autograd.grad`, None for what is not reached; for gradients already checked.

    The public function looks each argument over again (4 us).
    """
    if _run_backward is None:
        return torch.autograd.grad(ends, edges, grads, retain_graph=keep, create_graph=create_graph, allow_unused=True)
    return _run_backward(ends, grads, keep, create_graph, edges, allow_unreachable=True, accumulate_grad=False)


_engine = getattr(torch.autograd.Variable, "_execution_engine", None)
_run_backward = getattr(_engine, "run_backward", None)


# --- the backward pass that runs now ---

# A number for the backward pass that runs now. Without it `after_backward` is taken to be missing too.
pass_id: Callable[[], int] = getattr(torch._C, "_current_graph_task_id", lambda: -1)

# Whether the backward that runs now is to leave its graph as it is. Without it the answer is yes.
keeps_graph: Callable[[], bool] = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)


class Pass(NamedTuple):
    """A backward pass: whether it accumulates gradients or returns them, of which inputs (of all, if empty), and what
    it starts from.
    """

    accumulates: bool
    inputs: tuple[Any, ...]
    roots: tuple[Any, ...]


def passes_now() -> list[Pass]:
    """The backward pass that runs now. torch says nowhere what it is for, so it is read from the call of the engine.

    Where hooks run in the thread of a device, that call waits in another thread: then it is any of these.
    """
    found = list(_passes(sys._getframe()))[:1]
    if not found:
        found = [one for frame in sys._current_frames().values() for one in list(_passes(frame))[:1]]
    return found


def _passes(frame: FrameType | None) -> Iterator[Pass]:
    """The backward passes around this frame, from the inmost on."""
    while frame is not None:
        if frame.f_code is pull.__code__:  # in kept graphs, which are nobody's to edit
            yield Pass(False, (), ())
        elif frame.f_code is _ENGINE_CODE:
            called = frame.f_locals
            accumulates = bool(called["kwargs"].get("accumulate_grad"))
            yield Pass(accumulates, tuple(called["args"][3]), tuple(called["t_outputs"]))
        frame = frame.f_back


def roots_if_given_inputs() -> Sequence[Any]:
    """What the backward pass that runs now starts from, if it is given its inputs. In less time than `passes_now`.

    Without the name of the engine's call it is read from those of the public functions around it.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is _ENGINE_CODE:
            called = frame.f_locals
            return called["t_outputs"] if called["args"][3] else ()
        if frame.f_code is pull.__code__:
            return ()
        if _ENGINE_CODE is None and frame.f_code in (torch.autograd.grad.__code__, torch.autograd.backward.__code__):
            called = frame.f_locals
            given = called.get("t_inputs", called.get("inputs_tuple", ()))
            return called.get("t_outputs", called.get("tensors", ())) if given else ()
        frame = frame.f_back
    return [root for one in passes_now() if one.inputs for root in one.roots]


_ENGINE_CODE = getattr(getattr(torch.autograd.graph, "_engine_run_backward", None), "__code__", None)


def passes_on(node: Any) -> bool:
    """Whether the backward pass that runs now goes on behind `node`. It then hands out the gradient as it was before
    the hooks on the result of `node`, and otherwise as it is after them.
    """
    will_run = getattr(torch._C, "_will_engine_execute_node", None)
    if will_run is None:
        return True
    for following, _ in node.next_functions:
        try:
            if following is not None and will_run(following):
                return True
        except RuntimeError:  # a leaf whose gradient is returned
            return True
    return False


def comes_to(node: Any, leaves: bool = False) -> bool:
    """Whether the backward pass that runs now comes to `node`; `leaves`: or returns its gradient, or torch has no name
    to ask by. False where compiled autograd has the backward traced.
    """
    if torch.compiler.is_dynamo_compiling():
        return False
    will_run = getattr(torch._C, "_will_engine_execute_node", None)
    try:
        return leaves if will_run is None else bool(will_run(node))
    except RuntimeError:  # there is no such pass, or it returns the gradient of this leaf
        return leaves


OWNERS_IF_RETURNED = 3
"""How many C++ owners the gradient has that a hook is given, where a pass that goes on returns it and nobody else has
it: the engine's list, the results, and its Python object.
"""


def after_backward(callback: Callable[[], None]) -> bool:
    """Run `callback` when the backward pass that runs now has ended, as a part of it. False where there is no way."""
    queue = getattr(_engine, "queue_callback", None)
    if queue is None or pass_id() < 0:
        return False
    queue(callback)
    return True
