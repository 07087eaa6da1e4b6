"""Transforms of torch.func, forward mode, torch.jit and torch.fx."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.func import debug_unwrap
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from gradoverride._core.private.marks import evaluated_while_tracing
from gradoverride._core.private.tensors import made_at_import

__all__ = [
    "in_functorch",
    "dual_levels",
    "IN_FORWARD_AD",
    "in_forward_ad",
    "tells_level",
    "at_dual_level",
    "out_of_left_transforms",
    "forward_mode_depth",
    "has_tangent",
    "in_batched_autograd",
    "is_jit_tracing",
    "fx_tracer",
    "jit_tracer",
    "IN_TRACER",
    "may_be_symbolic",
    "SCRIPTING",
]

# --- transforms of torch.func, forward mode ---

_probe = made_at_import(requires_grad=True)


@evaluated_while_tracing
def _probe_functorch() -> bool:
    if is_jit_tracing():  # which would record the probe, and crash
        return False
    try:
        _probe.requires_grad_()  # what it requires already: refused inside of a transform, and otherwise nothing
    except RuntimeError:
        return True
    return False


# True inside vmap, grad, jvp ... (60 ns; to provoke an error and catch it takes 2 us)
in_functorch: Callable[[], bool] = getattr(torch._C, "_are_functorch_transforms_active", _probe_functorch)


class _Levels:
    @property
    def _current_level(self) -> int:
        return 0 if _probe_forward_ad() else -1


@evaluated_while_tracing
def _probe_forward_ad() -> bool:
    if is_jit_tracing() or get_proxy_mode() is not None:  # the same of make_fx and torch.export
        return False
    try:
        forward_ad.make_dual(_probe.detach(), _probe.detach())
    except RuntimeError:
        return False
    return True


# Whether a dual level is entered outside functorch: tensors may then carry tangents without `requires_grad`. As code,
# for what is generated, where a call would cost as much as the rest of the question.
dual_levels: Any = forward_ad if hasattr(forward_ad, "_current_level") else _Levels()
IN_FORWARD_AD = "_go_dual_levels._current_level >= 0"


def in_forward_ad() -> bool:
    """What `IN_FORWARD_AD` says."""
    return bool(dual_levels._current_level >= 0)


@contextlib.contextmanager
def _at_dual_level(level: int) -> Iterator[None]:
    before, dual_levels._current_level = dual_levels._current_level, level
    try:
        yield
    finally:
        dual_levels._current_level = before


# A graph that Dynamo traced enters forward mode beneath Python, which is told by this that a level is entered. If it
# cannot be, calls in forward mode are refused there.
tells_level = not isinstance(dual_levels, _Levels)
at_dual_level: Callable[[int], contextlib.AbstractContextManager[Any]] = (
    _at_dual_level if tells_level else contextlib.nullcontext
)


def out_of_left_transforms(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` without the wrappers of transforms that have been left.

    torch takes them off for its own operations, and not for transforms: it crashes in one that is entered with such a
    tensor. So any operation would do instead.
    """
    if _without_left is None:
        return tensor.view_as(tensor)
    while (inner := _without_left(tensor)) is not tensor:
        tensor = inner
    return tensor


_without_left = getattr(getattr(torch._C, "_functorch", None), "unwrap_if_dead", None)


def forward_mode_depth() -> int:
    """How many forward-mode transforms are around this call."""
    if _transforms is None:
        return 2 if in_functorch() and in_forward_ad() else 0
    return sum("Jvp" in str(interpreter.key()) for interpreter in _transforms() or ())


# Without it all forward mode in `torch.func` is taken for nested, and refused.
_transforms: Any = getattr(getattr(torch._C, "_functorch", None), "get_interpreter_stack", None)


def has_tangent(tensor: torch.Tensor) -> bool:
    """Whether forward mode tracks `tensor`, at any level of transforms. Only the inmost is asked of without private
    names.
    """
    stack = _transforms() if _transforms is not None else None
    try:
        if forward_ad.unpack_dual(tensor).tangent is not None:
            return True
    except RuntimeError:  # vmap does not know this operation
        pass
    if not stack or _without_inmost is None:
        return False
    inner = debug_unwrap(tensor, recurse=False) if _level_of(tensor) == stack[-1].level() else tensor
    with _without_inmost():
        return has_tangent(inner)


_functorch = getattr(torch._C, "_functorch", None)
_level_of: Callable[[torch.Tensor], int] = getattr(_functorch, "maybe_get_level", lambda tensor: -1)
_interpreters = getattr(getattr(torch, "_functorch", None), "pyfunctorch", None)
_without_inmost: Any = getattr(_interpreters, "temporarily_pop_interpreter_stack", None)


def in_batched_autograd(*tensors: torch.Tensor) -> bool:
    """Whether `torch.autograd.functional` runs for a batch at once, by a vmap that is older than that of torch.func.

    It tells its depth by its changes alone. Without them the answer is no, and what then looks at values raises; so do
    `tensors` of a batch, for that vmap cannot detach them.
    """
    if torch.compiler.is_dynamo_compiling():  # which would take the changes into its graph
        return False
    deeper = getattr(torch._C, "_vmapmode_increment_nesting", None)
    if deeper is None:
        for tensor in tensors:
            tensor.detach()
        return False
    depth: int = deeper() - 1
    torch._C._vmapmode_decrement_nesting()
    return depth > 0


# --- torch.jit, torch.fx ---

# `torch.jit.is_tracing` asks whether it is itself scripted before.
is_jit_tracing: Callable[[], bool] = getattr(torch._C, "_is_tracing", torch.jit.is_tracing)  # type: ignore[attr-defined]  # it is public


_symbolic = getattr(torch.fx, "_symbolic_trace", None)
_by_thread = getattr(_symbolic, "_is_fx_tracing_tls", None)
_jit = getattr(torch.jit, "_trace", None)


class _Tracers:
    """What stands for the flags of tracers: each call is looked at, on the general path."""

    _is_fx_tracing_flag = True

    @property
    def _trace_module_map(self) -> Any:
        return {} if is_jit_tracing() else None


class _OfThread:
    """The flag of torch.fx as torch 2.15 keeps it: one for each thread, and none before the first trace."""

    flags: Any = _by_thread

    @property
    def _is_fx_tracing_flag(self) -> bool:
        found: bool = self.flags.__dict__.get("flag", False)  # `getattr` takes 20 times as long where there is none
        return found


fx_tracer: Any = (
    _symbolic if hasattr(_symbolic, "_is_fx_tracing_flag") else _Tracers() if _by_thread is None else _OfThread()
)
jit_tracer: Any = _jit if hasattr(_jit, "_trace_module_map") else _Tracers()
# The flags of torch.fx and make_fx, and of torch.jit.trace for modules. As code, like IN_FORWARD_AD.
_IN_FX = "flags.__dict__.get('flag')" if isinstance(fx_tracer, _OfThread) else "_is_fx_tracing_flag"
IN_TRACER = f"_go_fx_tracer.{_IN_FX} or _go_jit_tracer._trace_module_map is not None"


def _places_of_scripting() -> Iterator[tuple[Any, str]]:
    public = torch.jit
    for module, name, stands_for in (
        (getattr(public, "_script", None), "_script_impl", "script"),
        (getattr(public, "_serialization", None), "wrap_cpp_module", "load"),
    ):
        yield (module, name) if hasattr(module, name) else (public, stands_for)


SCRIPTING = tuple(_places_of_scripting())
"""What `torch.jit.script` and `torch.jit.load` call, under whichever names they were imported, for what they give:
modules and names in them. Without these the functions themselves, as others find them in `torch.jit`.
"""


def may_be_symbolic() -> bool:
    """Whether a tracer of torch.fx may be at work. Without its flag arguments are looked through each time."""
    return bool(fx_tracer._is_fx_tracing_flag)
