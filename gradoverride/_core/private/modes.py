"""Autocast, the modes that are entered, and checkpoints."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any

import torch
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointFunction

from gradoverride._core.private.engine import _ENGINE_CODE, pass_id

__all__ = [
    "any_autocast",
    "in_modes",
    "put_under_stack",
    "take_off_stack",
    "in_reentrant_checkpoint",
    "module_in_function_of_others",
    "in_replay",
    "checkpoints_in_pass",
    "as_part_of_pass",
    "HigherOrderOperator",
    "Draws",
    "has_no_values",
    "require_in_graph",
]


# One query for all devices; the public one must be asked for each device type.
any_autocast: Callable[[], bool] = getattr(
    torch._C,
    "_is_any_autocast_enabled",
    lambda: any(torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda")),
)

# True where torch may show operations to modes: what torch.export and make_fx trace with is one.
in_modes: Callable[[], Any] = getattr(torch._C, "_len_torch_dispatch_stack", get_proxy_mode)


def put_under_stack(mode: Any) -> None:
    """Enter a mode of functions beneath all others, which are left by taking off whatever is on top.

    The device of `torch.set_default_device` is lowest of all: torch wants it there to take it off. Without these names
    the mode is entered above the others, which must then not be left before it is.
    """
    stack, pop, push = _modes
    if stack is None or pop is None or push is None:
        mode.__enter__()
        return
    lowest = getattr(getattr(torch, "_GLOBAL_DEVICE_CONTEXT", None), "device_context", None)
    above = []
    for other in reversed(stack()):
        if other is lowest:
            break
        above.append(pop())
    for other in (*above, mode)[::-1]:
        push(other)


def take_off_stack(mode: Any) -> bool:
    """Leave a mode of functions that others may have been entered above. `with` can leave only the one on top.

    Without this the mode stays where it is, and whoever asks must have made it do nothing.
    """
    stack, pop, push = _modes
    if stack is None or pop is None or push is None:
        return False
    if any(other is mode for other in stack()):
        above = []
        while (top := pop()) is not mode:
            above.append(top)
        for other in reversed(above):
            push(other)
    return True


_modes = [
    getattr(torch.overrides, name, None) for name in ("_get_current_function_mode_stack", "_pop_mode", "_push_mode")
]


def in_reentrant_checkpoint(unless: Callable[[FrameType], bool] | None = None) -> bool:
    """Whether a reentrant checkpoint runs its block now, under no_grad, to run it again in the backward pass; `unless`
    that is said of a frame within the block.

    torch says so nowhere: it is read from the frames.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if unless is not None and unless(frame):
            return False
        if frame.f_code is _REENTRANT:
            return bool(frame.f_locals["ctx"].next_functions)  # of its node: none where no gradient is wanted
        frame = frame.f_back
    return False


_REENTRANT = CheckpointFunction.forward.__code__


def module_in_function_of_others() -> bool:
    """Whether the `forward(ctx, ...)` of another party's Function runs a module now, and its gradient is wanted. What
    runs there without a graph mostly runs again in its backward: the adjoint of a differential equation, an invertible
    layer, a checkpoint of one's own. This too is read from the frames.
    """
    frame: FrameType | None = sys._getframe(1)
    module = False
    while frame is not None:
        code = frame.f_code
        module = module or code is _CALL_OF_MODULE
        if code.co_name == "forward" and code.co_varnames[:1] == ("ctx",) and code is not _REENTRANT:
            return module and not _is_own(frame) and bool(getattr(frame.f_locals["ctx"], "next_functions", ()))
        frame = frame.f_back
    return False


_CALL_OF_MODULE = torch.nn.Module.__call__.__code__


def in_replay() -> bool:
    """Whether a checkpoint runs its block again now, in the backward pass, or another party's Function runs a module.
    This too is read from the frames.
    """
    frame: FrameType | None = sys._getframe(1)
    module = False
    while frame is not None and frame.f_code is not _ENGINE_CODE:
        code = frame.f_code
        if frame.f_globals.get("__name__") == CheckpointFunction.__module__:
            return True
        module = module or code is _CALL_OF_MODULE
        if code.co_name == "backward" and code.co_varnames[:1] == ("ctx",):
            return module and not _is_own(frame)
        frame = frame.f_back
    return False


def _is_own(frame: FrameType) -> bool:
    """Whether it is one of a Function that has a rule, or of torch: its operators trace what they run there."""
    return str(frame.f_globals.get("__name__", "gradoverride")).startswith(("gradoverride", "torch."))


def checkpoints_in_pass() -> int:
    """The backward pass for which checkpoints run their blocks again now: -1 in none, or where the user says it."""
    group = _group_now()
    return pass_id() if group is None else group if isinstance(group, int) else -1


@contextlib.contextmanager
def as_part_of_pass(number: int | None) -> Iterator[None]:
    """Have checkpoints take the passes of the engine within for parts of this one, for which they run their blocks
    again once; None: each for one of its own.

    It is what the public `GraphExecGroup` says, which the user may be within: then it stays so. Of a pass that has
    begun already it cannot say it. Without these names a block runs again for each pass.
    """
    before = _group_now()
    if _set_group is None or not (before is None or isinstance(before, int)):
        yield
        return
    _set_group(number)
    try:
        yield
    finally:
        _set_group(before)


_group_now: Callable[[], Any] = getattr(torch._C, "_get_graph_exec_group", lambda: None)
_set_group: Callable[[Any], None] | None = getattr(torch._C, "_set_graph_exec_group", None)


# The class of `torch.cond` and what else runs functions that it is given. Without it nothing is such an operator, and
# no rules for functions are in force in what these run.
HigherOrderOperator: Any = getattr(torch._ops, "HigherOrderOperator", ())


# --- values that are not there ---


# Whether a tensor is one of `FakeTensorMode`, under whatever wrappers. If it bears another name one day, none is known
# to be, and what replays a forward for such tensors ends in an error of torch's own.
_is_fake: Any = getattr(torch._subclasses.fake_tensor, "is_fake", lambda value: False)


class Draws(TorchDispatchMode):
    """Notes whether random numbers are drawn that have no values."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch gives no types
        self.of_no_values = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if torch.Tag.nondeterministic_seeded in func.tags and has_no_values([result]):
            self.of_no_values = True
        return result


def has_no_values(results: Sequence[Any]) -> bool:
    """Whether these are tensors without values, as while code is traced."""
    return any([_is_fake(result) for result in results])


# In a graph that is traced: raises an error with a text when that is run and a tensor is False. Without it nothing can
# be required there that is seen by values.
require_in_graph: Callable[[torch.Tensor, str], None] | None = getattr(torch, "_assert_async", None)
