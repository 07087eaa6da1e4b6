"""Dynamo: its errors, what it is to trace, what it knows meanwhile, and gradients within its graph."""

from __future__ import annotations

import contextlib
import functools
import inspect
import operator
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import CodeType, FrameType, FunctionType
from typing import Any, NoReturn, TypeVar

import torch

from gradoverride._core.private.marks import evaluated_while_tracing
from gradoverride._core.private.transforms import in_forward_ad, in_functorch
from gradoverride._core.python.bytecode import codes_in
from gradoverride._core.python.imports import on_import
from gradoverride.errors import UnsupportedError

__all__ = [
    "fail",
    "step_of_graph",
    "changed_while_tracing",
    "in_transform",
    "transformed_while_tracing",
    "forward_mode_while_tracing",
    "forward_mode_around",
    "as_dynamo_hands_on",
    "hidden_from_dynamo",
    "out_of_graph",
    "MADE_OUTSIDE",
    "let_dynamo_show",
    "on_traced",
    "dynamo_shows",
    "PAD",
    "is_compiled_graph",
    "keep_own_frames_whole",
    "note_while_tracing",
    "take_noted",
    "versions_while_tracing",
    "is_updated_while_tracing",
    "is_named_while_tracing",
    "defaults_while_tracing",
    "trace_gradients",
]

F = TypeVar("F", bound=Callable[..., Any])


# --- errors ---


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


# --- what it is to trace ---


def step_of_graph(fn: F) -> F:
    """`fn`, which Dynamo does not look into: a call of it is one step of the graph, which AOTAutograd traces.

    Only while Dynamo traces. `nonstrict_trace` is documented, but as a name of `torch._dynamo`. If it is gone one day,
    such calls are refused.
    """
    made: Any = getattr(sys.modules.get("torch._dynamo"), "nonstrict_trace", None)
    if made is None:
        text = (
            "a call with a rule in a torch.func transform inside of torch.compile must be one step of the graph, for "
            "which this version of torch has no 'torch._dynamo.nonstrict_trace'. Leave the transform uncompiled"
        )
        raise as_dynamo_hands_on(UnsupportedError(text))
    step: F = made(fn)
    return step


@evaluated_while_tracing
def changed_while_tracing() -> tuple[tuple[int, ...], tuple[str, ...]]:
    """The ids of objects of which the code that Dynamo traces has set attributes, and of lists and dicts that it has
    changed; and the globals that it has set: all others see that when the compiled code has run. If Dynamo notes it
    elsewhere one day, none are known.
    """
    effects = getattr(_output_now(), "side_effects", None)
    changes = getattr(effects, "store_attr_mutations", {})
    changed = [getattr(known, "value", None) for known, attributes in changes.items() if attributes]
    values = getattr(effects, "id_to_variable", {})
    kinds = {number: getattr(variable, "mutation_type", None) for number, variable in values.items()}
    containers = [number for number, kind in kinds.items() if getattr(kind, "is_modified", False)]
    of_globals = [attributes for known, attributes in changes.items() if type(known).__name__ == "NewGlobalVariable"]
    return (
        (*[id(value) for value in changed if value is not None], *containers),
        tuple([name for attributes in of_globals for name in attributes]),
    )


def _output_now() -> Any:
    """What Dynamo makes of the code that it traces now."""
    translator: Any = getattr(sys.modules.get("torch._dynamo.symbolic_convert"), "InstructionTranslator", None)
    return getattr(translator and translator.current_tx(), "output", None)


def in_transform() -> bool:
    """Whether a call is in a transform of torch.func, or in forward mode."""
    return transformed_while_tracing() if torch.compiler.is_dynamo_compiling() else in_functorch() or in_forward_ad()


@evaluated_while_tracing
def transformed_while_tracing() -> bool:
    """The same of code that Dynamo traces.

    To read it there would guard it, and what the code has entered itself is left when it is called again.
    """
    return in_functorch() or in_forward_ad()


@evaluated_while_tracing
def forward_mode_while_tracing() -> bool:
    """The same of forward mode alone."""
    return in_forward_ad()


@evaluated_while_tracing
def forward_mode_around() -> bool:
    """Whether forward mode was entered before the code that Dynamo traces: it is traced again where that is otherwise.

    Without these names all forward mode is taken to be within, and what was compiled before is not traced again.
    """
    guards: Any = sys.modules.get("torch._dynamo.guards")
    output = _output_now()
    if not (hasattr(output, "dual_level") and hasattr(getattr(guards, "GuardBuilder", None), "DUAL_LEVEL")):
        return False
    guards.install_guard(guards.GlobalStateSource().make_guard(guards.GuardBuilder.DUAL_LEVEL))
    return bool(output.dual_level >= 0)


def hidden_from_dynamo(fn: F, reason: str) -> F:
    """`fn`, which Dynamo breaks its graph for and never traces."""
    hidden = out_of_graph(fn, reason)

    @functools.wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            return hidden(*args, **kwargs)
        return fn(*args, **kwargs)

    return call  # type: ignore[return-value]  # with the signature of `fn`


def out_of_graph(fn: F, reason: str) -> F:
    """The same for where Dynamo traces alone: `torch.compiler.disable`, which takes 1 s to import all of Dynamo, once
    it is there.
    """
    name = f"fn_{id(fn)}"

    @evaluated_while_tracing
    def hide() -> str:
        if not hasattr(_Hidden, name):
            setattr(_Hidden, name, staticmethod(torch.compiler.disable(fn, reason=reason)))
        return name

    def call(*args: Any, **kwargs: Any) -> Any:
        return getattr(_Hidden, hide())(*args, **kwargs)

    return call  # type: ignore[return-value]  # with the signature of `fn`


MADE_OUTSIDE = "rules are given outside of what is compiled, or where its graph may break (gradoverride)"
"""Why Dynamo breaks a graph where a function is decorated in it, or something overridden."""


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

    if not _awaited:  # what waits for it stays, also where Dynamo is never imported
        _awaited.append(True)
        on_import("torch._dynamo.variables.torch", add)
        on_import("torch._dynamo", _let_dynamo_show_builtins)


_awaited: list[bool] = []
_shown: list[Any] = []


@functools.cache
def on_traced(then: Callable[[], None]) -> None:
    """Call `then` each time that Dynamo has traced code, before that runs: by its hook for those who log that."""
    on_import("torch._dynamo.convert_frame", lambda module: module.register_bytecode_hook(lambda *_: then()))


def _let_dynamo_show_builtins(_: Any) -> None:
    """The same of Python's own `abs` and `pow`, which Dynamo takes for operations of the graph, and of two operators of
    tensors in Python, which it traces into where they are called by name. By the public door for that, where nobody
    else has been there.
    """

    def absolute(x: Any, /) -> Any:
        return operator.abs(x)

    def power(base: Any, exp: Any, mod: Any = None) -> Any:
        return operator.pow(base, exp) if mod is None else base.__pow__(exp, mod)

    # (A subclass of tensors may call it in an operator of its own. Dynamo refuses these, and does so for this.)
    def minus(self: Any, other: Any) -> Any:
        return self.__rsub__(other) if type(self) in (torch.Tensor, torch.nn.Parameter) else NotImplemented

    def over(self: Any, other: Any) -> Any:
        return self.__rtruediv__(other) if type(self) in (torch.Tensor, torch.nn.Parameter) else NotImplemented

    operators = ((torch.Tensor.__rsub__, minus, False), (torch.Tensor.__rtruediv__, over, False))
    for function, instead, folds in ((abs, absolute, False), (pow, power, True), *operators):
        with contextlib.suppress(ValueError):
            torch.compiler.substitute_in_graph(function, can_constant_fold_through=folds)(instead)


@evaluated_while_tracing
def dynamo_shows() -> bool:
    """Whether Dynamo, which traces now, shows functions in place to modes."""
    return any(torch.relu_ in getattr(module, "get_overridable_functions", set)() for module in _shown)


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
            function = inspect.unwrap(getattr(member, "__func__", member))  # what a cache or the like is around
            # What is hidden is to be traced: it breaks the graph, and what it calls stays as it is.
            hides = function in (hidden_from_dynamo, out_of_graph)
            if isinstance(function, FunctionType) and function.__module__ == module.__name__ and not hides:
                yield from codes_in(function.__code__)


# --- what it knows while it traces ---

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


def is_named_while_tracing(function: Any) -> bool:
    """Whether a name in traced code leads to this function. Otherwise Dynamo has put it in the place of something else:
    `torch.maximum`, where Python's `max` chooses one of two tensors.
    """
    keep_own_frames_whole()
    _comptime(lambda context: _noted.append(_door_of(context.get_local("function"))))
    return _noted_name()


@evaluated_while_tracing
def _noted_name() -> bool:
    return getattr(take_noted()[-1], "source", True) is not None


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


def _door_of(variable: Any) -> Any:
    """What Dynamo knows of a variable; None if it does not tell."""
    door = getattr(variable, "_i_will_not_complain_if_bc_breaks_VariableTracker", None)
    return door and door().realize()


def _defaults_of(variable: Any) -> tuple[Any, ...] | None:
    known = _door_of(variable)
    if hasattr(known, "fn"):
        return len(known.fn.__defaults__ or ()), *(known.fn.__kwdefaults__ or ())
    if not (hasattr(known, "defaults") and hasattr(known, "kwdefaults")):
        return None
    by_keyword = known.kwdefaults.keys_as_python_constant() if known.kwdefaults else ()
    return len(known.defaults.items) if known.defaults else 0, *by_keyword


# --- gradients within a traced graph ---


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
