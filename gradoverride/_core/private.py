"""Every private name of torch that this library uses, with the reason and the public way that stands in for it.

Private names move between releases, so they are named here and nowhere else, and each has a public fallback that is
right, only slower; where there is none, what needs it is refused. `tests/core/test_private.py` runs the suite on the
fallbacks too.

Elsewhere are those alone that everybody's code reads: the tables of a module (`_parameters`, `_buffers`, `_modules`),
and the `_version`, `_is_view()` and two kinds of hooks of a tensor; the names of torch's modules where code is read;
and `_is_replica`, in `forward_pass.py`, for Dynamo guards each constant of a module.
"""

from __future__ import annotations

import contextlib
import functools
import operator
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import CodeType, FrameType, FunctionType
from typing import Any, NamedTuple, NoReturn, TypeVar

import torch
from torch.autograd import Function, forward_ad
from torch.func import debug_unwrap
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.utils.checkpoint import CheckpointFunction

from gradoverride._core.bytecode import codes_in
from gradoverride._core.imports import on_import

__all__ = [
    "evaluated_while_tracing",
    # names that are looked for on modules and functions
    "ORIGINAL",
    "COMPILED_CALL",
    "COMPILED_MARKS",
    "FORMER_PARAMETERS",
    "RNN_WEIGHTS",
    "RNN_REFERENCES",
    "uncompiled",
    "written_as",
    # what torch puts around a Function and the engine, left out
    "fast_apply",
    "call_directly",
    "can_call_directly",
    "pull",
    # tensors and nodes
    "made_at_import",
    "version_of",
    "counted_once",
    "use_count",
    "has_memory_alone",
    "saves_plainly",
    "results_of",
    "function_of",
    "is_freed",
    "hook_on_result",
    # the backward pass that runs now
    "pass_id",
    "keeps_graph",
    "Pass",
    "passes_now",
    "passes_on",
    "comes_to",
    "OWNERS_IF_RETURNED",
    "after_backward",
    # autocast, modes, checkpoints
    "any_autocast",
    "in_modes",
    "put_under_stack",
    "take_off_stack",
    "in_reentrant_checkpoint",
    "in_checkpoint_replay",
    "checkpoints_in_pass",
    "as_part_of_pass",
    "HigherOrderOperator",
    # transforms of torch.func, forward mode
    "in_functorch",
    "dual_levels",
    "IN_FORWARD_AD",
    "in_forward_ad",
    "out_of_left_transforms",
    "forward_mode_depth",
    "in_batched_autograd",
    # tracers: torch.jit, torch.fx
    "is_jit_tracing",
    "fx_tracer",
    "jit_tracer",
    "IN_TRACER",
    "may_be_symbolic",
    # Dynamo: errors
    "fail",
    "as_dynamo_hands_on",
    # Dynamo: what it is to trace
    "hidden_from_dynamo",
    "let_dynamo_show",
    "dynamo_shows",
    "PAD",
    "is_compiled_graph",
    "keep_own_frames_whole",
    # Dynamo: what it knows while it traces
    "note_while_tracing",
    "take_noted",
    "versions_while_tracing",
    "is_updated_while_tracing",
    "defaults_while_tracing",
    # Dynamo: gradients within a traced graph
    "trace_gradients",
]

F = TypeVar("F", bound=Callable[..., Any])


def evaluated_while_tracing(fn: F) -> F:
    """`torch.compiler.assume_constant_result`, which takes 0.8 s to set this mark, for it imports all of Dynamo."""
    fn._dynamo_marked_constant = True  # type: ignore[attr-defined]  # the mark
    return fn


# --- names that are looked for on modules and functions ---

ORIGINAL = "_orig_mod"
"""The part of what `torch.compile(module)` gives that is `module`: it stands in the names of its parameters too."""

COMPILED_CALL = "_compiled_call_impl"
"""The attribute of a module that holds its compiled call, after `module.compile()`. If it bears another name one day,
the stand-in's call meets live parameters, and is refused as one that captured them.
"""

COMPILED_MARKS = "_torchdynamo"
"""What the attributes begin with that Dynamo puts on a function. With those under another name a wrapper is taken for
compiled itself.
"""

FORMER_PARAMETERS = "_former_parameters"
"""The attribute of a replica of DataParallel with its parameters, which are plain attributes besides. If it bears
another name one day, a rule on a replica is refused: its forward has captured them.
"""

RNN_WEIGHTS = "_flat_weights"
"""The list of its weights that an nn.RNNBase has besides its parameters, and that its forward reads. If it bears
another name one day, each forward finds that its weights are others, and makes the list anew.
"""

RNN_REFERENCES = "_flat_weight_refs"
"""The list of weak references by which it finds that out."""


def uncompiled(module: Any) -> Any:
    """The module that `torch.compile` has made this one of, or the module itself.

    torch says nowhere which modules are such, and to import their class costs 0.8 s. If they bear other marks one day,
    they are modules like others, whose forward somebody has replaced.
    """
    made = isinstance(module, torch.nn.Module) and ORIGINAL in module._modules and "dynamo_ctx" in module.__dict__
    return module._modules[ORIGINAL] if made else module


def written_as(fn: Any) -> Any:
    """The Python function that `torch.library.custom_op` has made this operator of, or what it is itself.

    The operator has no name, place or signature. Without this it offers rules the reserved names only.
    """
    return getattr(fn, "_init_fn", fn) if type(fn).__name__ == "CustomOpDef" else fn


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


# --- tensors and nodes ---


def made_at_import(*shape: int, requires_grad: bool = False) -> torch.Tensor:
    """A tensor of zeros for all calls to come: one made in inference mode, where this may be imported, would be refused
    by each of them.
    """
    with torch.inference_mode(False):
        return torch.zeros(shape, requires_grad=requires_grad)


def version_of(tensor: torch.Tensor) -> int | None:
    """How often the tensor has been written into. None of one from `inference_mode`, which does not count."""
    inner = debug_unwrap(tensor)
    return None if inner.is_inference() else inner._version


# Sets the versions of tensors. Without it aliases of what a forward may write into have version counters of their own.
_set_versions: Any = getattr(torch._C._autograd, "_unsafe_set_version_counter", None)


@contextlib.contextmanager
def _counted_once(tensors: Sequence[torch.Tensor]) -> Iterator[None]:
    """Have `mark_dirty` count the writes of a forward that has counted them already, so that what is saved of the
    result, and what a kept graph has saved of it before, are of one version.
    """
    versions = [tensor._version for tensor in tensors]
    _set_versions(tensors, [version - 1 for version in versions])
    try:
        yield
    finally:
        _set_versions(tensors, versions)  # tensors that share a counter have counted on


counted_once = None if _set_versions is None else _counted_once

# How many C++ owners a tensor has. Without it a result is taken for shared, and detached.
use_count: Callable[[torch.Tensor], int] = getattr(torch.Tensor, "_use_count", lambda tensor: 2)


def has_memory_alone(view: torch.Tensor) -> bool:
    """Whether nobody else has what this is a view of: a tensor that was made on the way to it, and let go. Without the
    counts it is taken for somebody's.
    """
    return _ALONE is not None and type(view) is torch.Tensor and _owners(view) == _ALONE


def _owners(view: torch.Tensor) -> tuple[int, int, int]:
    """How many there are in Python, and in C++, of what it is a view of, and how many of the memory."""
    base: Any = view._base
    return sys.getrefcount(base), use_count(base), _storage_use_count(view.untyped_storage()._cdata)


_storage_use_count: Any = getattr(torch._C, "_storage_Use_Count", None)
_ALONE = None if _storage_use_count is None else _owners(made_at_import().view(1))


def saves_plainly() -> bool:
    """Whether a saved tensor is given back as the object it was: with hooks on saved tensors it is another."""
    return _hooks is not None and _hooks(True) is None


_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)


def results_of(node: Any) -> list[tuple[torch.Size, torch.dtype, torch.device]] | None:
    """Shape, dtype and device of the results of a node, in order. None where that is not known."""
    known = getattr(node, "_input_metadata", None)
    return known and [(torch.Size(result.shape), result.dtype, result.device) for result in known]


def function_of(node: Any) -> type[Function] | None:
    """The Function whose backward `node` is. None for what is no Function's, and where that is not known."""
    return getattr(type(node), "_forward_cls", None)


def is_freed(node: Any) -> bool:
    """Whether a backward pass has gone through `node` and freed what it had saved. Of one that saves nothing, no."""
    try:
        if hasattr(type(node), "_raw_saved_tensors"):  # of a Python Function
            _ = node._raw_saved_tensors
        else:
            for name in [name for name in dir(node) if name.startswith("_raw_saved_")][:1]:  # of tensors
                getattr(node, name.removeprefix("_raw"))
    except RuntimeError as error:
        return "second time" in str(error)
    return False


def hook_on_result(node: Any, index: int, hook: Callable[[Any], Any]) -> Callable[[], None] | None:
    """Run `hook` on the gradient of a result of `node`, as a tensor's hook is run; gives what takes it off again.

    A public prehook of the node is run only where the node itself is: `torch.autograd.grad` with respect to its result
    would not be edited. None where there is no way.
    """
    register = getattr(node, "_register_hook_dict", None)
    if register is None:
        return None
    # It takes hooks, and the place of the result, from a tensor.
    stands_for = torch.empty(index + 1, requires_grad=True).unbind()[index]
    hooks: dict[int, Callable[[Any], Any]] = OrderedDict({0: hook})
    stands_for._backward_hooks = hooks  # as torch keeps them
    register(stands_for)
    return hooks.clear


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


def comes_to(node: Any) -> bool:
    """Whether the backward pass that runs now comes to `node`. False where torch does not say: where it is told the
    inputs whose gradients are wanted, say, or where compiled autograd has the backward traced.
    """
    if torch.compiler.is_dynamo_compiling():
        return False
    will_run = getattr(torch._C, "_will_engine_execute_node", None)
    try:
        return will_run is not None and bool(will_run(node))
    except RuntimeError:  # there is no such pass
        return False


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


# --- autocast, modes, checkpoints ---

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


def in_checkpoint_replay() -> bool:
    """Whether a checkpoint runs its block again now, in the backward pass. This too is read from the frames."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not _ENGINE_CODE:
        if frame.f_globals.get("__name__") == CheckpointFunction.__module__:
            return True
        frame = frame.f_back
    return False


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


def in_batched_autograd() -> bool:
    """Whether `torch.autograd.functional` runs for a batch at once, by a vmap that is older than that of torch.func.

    It tells its depth by its changes alone. Without them the answer is no, and what then looks at values raises.
    """
    deeper = getattr(torch._C, "_vmapmode_increment_nesting", None)
    if deeper is None:
        return False
    depth: int = deeper() - 1
    torch._C._vmapmode_decrement_nesting()
    return depth > 0


# --- tracers: torch.jit, torch.fx ---

# `torch.jit.is_tracing` asks whether it is itself scripted before.
is_jit_tracing: Callable[[], bool] = getattr(torch._C, "_is_tracing", torch.jit.is_tracing)  # type: ignore[attr-defined]  # it is public


class _Tracers:
    """What stands for the flags of tracers: each call is looked at, on the general path."""

    _is_fx_tracing_flag = True

    @property
    def _trace_module_map(self) -> Any:
        return {} if is_jit_tracing() else None


class _OfThread:
    """The flag of torch.fx as torch 2.15 keeps it: one for each thread, and none before the first trace."""

    @property
    def _is_fx_tracing_flag(self) -> bool:
        found: bool = _by_thread.__dict__.get("flag", False)  # `getattr` takes 20 times as long where there is none
        return found


_symbolic = getattr(torch.fx, "_symbolic_trace", None)
_by_thread = getattr(_symbolic, "_is_fx_tracing_tls", None)
_jit = getattr(torch.jit, "_trace", None)

# The flags of torch.fx and make_fx, and of torch.jit.trace for modules. As code, like IN_FORWARD_AD.
fx_tracer: Any = (
    _symbolic if hasattr(_symbolic, "_is_fx_tracing_flag") else _Tracers() if _by_thread is None else _OfThread()
)
jit_tracer: Any = _jit if hasattr(_jit, "_trace_module_map") else _Tracers()
IN_TRACER = "_go_fx_tracer._is_fx_tracing_flag or _go_jit_tracer._trace_module_map is not None"


def may_be_symbolic() -> bool:
    """Whether a tracer of torch.fx may be at work. Without its flag arguments are looked through each time."""
    return bool(fx_tracer._is_fx_tracing_flag)


# --- Dynamo: errors ---


def fail(kind: type[Exception], text: str) -> NoReturn:
    """Raise `kind(text)`. Under Dynamo a plain raise loses its kind and its text ("Observed exception"); a call that
    it evaluates while tracing keeps both.
    """
    if torch.compiler.is_dynamo_compiling():
        _raise_while_tracing(kind, text)
    raise kind(text)


@evaluated_while_tracing
def _raise_while_tracing(kind: type[Exception], text: str) -> None:
    raise as_dynamo_hands_on(kind(text))


def as_dynamo_hands_on(error: Exception) -> Exception:
    """`error`, of a kind that Dynamo hands on: it makes its InternalTorchDynamoError of others, with their text."""
    handed_on: Any = getattr(sys.modules.get("torch._dynamo.exc"), "ShortenTraceback", None)
    kind: Any = type(error)
    if handed_on is None or isinstance(error, handed_on):
        return error
    try:
        return _of_both(handed_on, kind)(*error.args, first_useful_frame=None)
    except TypeError:  # it is made in another way by now
        return error


@functools.cache
def _of_both(handed_on: Any, kind: Any) -> Any:
    return type(kind.__name__, (handed_on, kind), {"__module__": kind.__module__, "__doc__": kind.__doc__})


# --- Dynamo: what it is to trace ---


def hidden_from_dynamo(fn: F, reason: str) -> F:
    """`fn`, which Dynamo breaks its graph for and never traces: `torch.compiler.disable`, which takes 1 s to import all
    of Dynamo, once it is there.
    """
    name = f"fn_{id(fn)}"

    @evaluated_while_tracing
    def hide() -> str:
        if not hasattr(_Hidden, name):
            setattr(_Hidden, name, staticmethod(torch.compiler.disable(fn, reason=reason)))
        return name

    @functools.wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            return getattr(_Hidden, hide())(*args, **kwargs)
        return fn(*args, **kwargs)

    return call  # type: ignore[return-value]  # with the signature of `fn`


class _Hidden:
    """Functions as attributes: Dynamo needs a place to know an object by."""


def let_dynamo_show(functions: Iterable[Any]) -> None:
    """Have Dynamo show these functions to modes, as torch does.

    It knows which functions it is to show from a list of torch that lacks those in place, such as `torch.relu_`: a
    mode that is traced would not see them.
    """

    def add(module: Any) -> None:
        known: set[Any] = getattr(module, "get_overridable_functions", set)()
        known.update(functions)
        _shown.append(module)

    if not _shown:
        on_import("torch._dynamo.variables.torch", add)
        on_import("torch._dynamo", _let_dynamo_show_builtins)


_shown: list[Any] = []


def _let_dynamo_show_builtins(_: Any) -> None:
    """The same of what Python's own `abs` and `pow` are for a tensor: Dynamo takes them for operations of the graph. By
    the public door for that, where nobody else has been there.
    """

    def absolute(x: Any, /) -> Any:
        return operator.abs(x)

    def power(base: Any, exp: Any, mod: Any = None) -> Any:
        return operator.pow(base, exp) if mod is None else base.__pow__(exp, mod)

    for builtin, instead, folds in ((abs, absolute, False), (pow, power, True)):
        with contextlib.suppress(ValueError):
            torch.compiler.substitute_in_graph(builtin, can_constant_fold_through=folds)(instead)


@evaluated_while_tracing
def dynamo_shows(function: Any = torch.relu_) -> bool:
    """Whether Dynamo, which traces now, shows a function in place to modes."""
    return any(function in getattr(module, "get_overridable_functions", set)() for module in _shown)


# What Dynamo shows to modes instead of `F.pad`. Without it a rule for that is refused in compiled code.
PAD: Any = getattr(torch._C._nn, "pad", None)


def is_compiled_graph(frame: FrameType | None) -> bool:
    """Whether this frame runs a graph that Dynamo has traced, as its backend "eager" does, in Python.

    The rules are in that graph already. Dynamo marks it with why it ended; what torch.fx makes of a model otherwise
    looks the same.
    """
    while frame is not None:
        if hasattr(frame.f_locals.get("self"), "compile_subgraph_reason"):
            return True
        frame = frame.f_back
    return False


@evaluated_while_tracing
def keep_own_frames_whole() -> None:
    """Tell Dynamo, once it traces a decorated call, not to compile this library's own functions one by one.

    It inlines them. But where the graph breaks inside (in a forward that cannot be traced), it runs the call
    uncompiled and would take up each function within anew, in the middle of an eager call.
    """
    global _comptime
    if not _OWN_FRAMES:
        from torch._dynamo.comptime import comptime
        from torch._dynamo.eval_frame import skip_code

        _comptime = comptime

        for name, module in list(sys.modules.items()):
            if name.startswith(_ENGINE):
                _OWN_FRAMES.extend(_codes_in(module))
        for code in _OWN_FRAMES:
            skip_code(code)


_OWN_FRAMES: list[CodeType] = []

# What is not in here are rules and forwards, which people compile.
_ENGINE = ("gradoverride._core", "gradoverride.bridges", "gradoverride.connections", "gradoverride.edits")


def _codes_in(module: Any) -> Iterator[CodeType]:
    for value in vars(module).values():
        for member in (value, *(vars(value).values() if isinstance(value, type) else ())):
            function = getattr(member, "__func__", member)
            # What is hidden is to be traced: it breaks the graph, and what it calls stays as it is.
            hides = function is hidden_from_dynamo
            if isinstance(function, FunctionType) and function.__module__ == module.__name__ and not hides:
                yield from codes_in(function.__code__)


# --- Dynamo: what it knows while it traces ---

# Dynamo's own door to what it knows while it traces. To import it costs 0.8 s, so that is done when Dynamo is there.
_comptime: Any = None
_noted: list[Any] = []


def note_while_tracing(tensor: torch.Tensor) -> None:
    """Note what stands for this tensor while tracing, for a function that is evaluated then: `take_noted`."""
    _comptime(lambda context: _noted.append(context.get_local("tensor").as_fake()))


def take_noted() -> list[torch.Tensor]:
    """What was noted since, in order."""
    noted = list(_noted)
    _noted.clear()
    return noted


def versions_while_tracing(tensors: Sequence[torch.Tensor]) -> tuple[int, ...]:
    """How often each tensor has been written into, as numbers that are known while tracing (`_version` is not)."""
    for tensor in tensors:
        note_while_tracing(tensor)
    return _noted_versions()


@evaluated_while_tracing
def _noted_versions() -> tuple[int, ...]:
    return tuple([tensor._version for tensor in take_noted()])


def is_updated_while_tracing(tensor: torch.Tensor) -> bool:
    """Whether traced code has a norm update this tensor, its running statistics: a write that no version counts."""
    _comptime(lambda context: _noted.append(_is_updated(context.get_local("tensor").as_proxy().node)))
    return _noted_update()


@evaluated_while_tracing
def _noted_update() -> bool:
    return bool(take_noted()[-1])


def _is_updated(node: Any) -> bool:
    for user in node.users:
        keyword = _NORMS.get(getattr(user.target, "__name__", ""))
        if keyword is not None:
            first = 1 if user.target.__module__ == torch.nn.functional.__name__ else 3
            statistics = [*user.args[first : first + 2], *map(user.kwargs.get, ("running_mean", "running_var"))]
            on = user.args[5] if len(user.args) > 5 else user.kwargs.get(keyword, keyword != "training")
            if on is not False and any(one is node for one in statistics):
                return True
    return False


# Functions that update running statistics, and the option that tells them to.
_NORMS = {"batch_norm": "training", "instance_norm": "use_input_stats"}


def defaults_while_tracing(function: Any) -> tuple[Any, ...]:
    """How many defaults a function has that Dynamo traces, and the names of those that are given by keyword.

    Dynamo of torch 2.13 crashes on `__defaults__` of one that is made within. Where its own door is shut, all
    parameters are taken to have one: a missing argument is then found by the call.
    """
    keep_own_frames_whole()
    _comptime(lambda context: _noted.append(_defaults_of(context.get_local("function"))))
    return _noted_defaults(function.__code__)


@evaluated_while_tracing
def _noted_defaults(code: CodeType) -> tuple[Any, ...]:
    found: Any = take_noted()[-1]
    return found or (code.co_argcount - 1, *code.co_varnames[code.co_argcount :][: code.co_kwonlyargcount])


def _defaults_of(variable: Any) -> tuple[Any, ...] | None:
    door = getattr(variable, "_i_will_not_complain_if_bc_breaks_VariableTracker", None)
    if door is None:
        return None
    known = door().realize()
    if hasattr(known, "fn"):
        return len(known.fn.__defaults__ or ()), *(known.fn.__kwdefaults__ or ())
    if not (hasattr(known, "defaults") and hasattr(known, "kwdefaults")):
        return None
    by_keyword = known.kwdefaults.keys_as_python_constant() if known.kwdefaults else ()
    return len(known.defaults.items) if known.defaults else 0, *by_keyword


# --- Dynamo: gradients within a traced graph ---


def trace_gradients(outputs: Any, inputs: Any, grad_outputs: Any) -> Any:
    """`torch.autograd.grad` as part of a traced graph. Dynamo breaks the graph there unless told otherwise; there
    is no public switch, so the switch is set around this one call.
    """
    _set_trace_gradients()
    found = torch.autograd.grad(
        outputs, inputs, grad_outputs, retain_graph=True, allow_unused=True, materialize_grads=True
    )
    _restore_trace_gradients()
    return found


@evaluated_while_tracing
def _set_trace_gradients() -> None:
    from torch._dynamo import callback, config  # costs 0.5 s, and only a program that compiles gets here

    handler = callback.callback_handler
    if _restore_trace_gradients not in handler.end_callbacks:
        # Where tracing fails, Dynamo leaves the traced code without its `finally`.
        handler.register_end_callback(_restore_trace_gradients)
    _overridden.append(config.trace_autograd_ops)
    config.trace_autograd_ops = True


@evaluated_while_tracing
def _restore_trace_gradients(_: Any = None) -> None:
    from torch._dynamo import config

    while _overridden:
        config.trace_autograd_ops = _overridden.pop()


_overridden: list[bool] = []  # what the switch was before, while it is set
