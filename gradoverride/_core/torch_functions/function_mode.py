"""Rules for functions of torch: a mode that is entered around the calls of certain modules.

torch shows a mode each function that is called under it, with the mode itself left meanwhile. What is in force is noted
per thread: a module within another that has entered the mode does not enter it again, a call that is under its rule
already is let through, and so is one inside of a module that is nothing but that call and has a rule of its own.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from types import (
    AsyncGeneratorType,
    BuiltinFunctionType,
    FrameType,
    FunctionType,
    MethodDescriptorType,
    WrapperDescriptorType,
)
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling as compiling
from torch.fx import Proxy
from torch.overrides import TorchFunctionMode

from gradoverride._core.autograd.ambient import here
from gradoverride._core.binding.rule import passing
from gradoverride._core.binding.signature import Forward
from gradoverride._core.calls.plan import Plan
from gradoverride._core.calls.tracers import recorded_as
from gradoverride._core.calls.wrapper import make_refusal, make_wrapper
from gradoverride._core.in_force import everywhere
from gradoverride._core.in_force.layers import FunctionRule
from gradoverride._core.private.dynamo import (
    as_dynamo_hands_on,
    dynamo_shows,
    fail,
    is_compiled_graph,
    is_named_while_tracing,
    let_dynamo_show,
    on_traced,
)
from gradoverride._core.private.modes import HigherOrderOperator, in_reentrant_checkpoint, in_replay
from gradoverride._core.torch_functions.callers import opened, reaching
from gradoverride._core.torch_functions.functions import (
    INLINED,
    OF_OPERATORS,
    every_spelling,
    signature_of,
    spellings,
    turned,
)
from gradoverride._core.torch_functions.generators import RUN_LATER, in_steps
from gradoverride._core.torch_functions.higher_order import run_under
from gradoverride.errors import GradOverrideError, RuleSignatureError, UnsupportedError

__all__ = ["FunctionMode", "count", "note_unrecorded", "quieted", "scope_of", "scoped"]


class FunctionMode(TorchFunctionMode):
    """The rules `keys`, the last one outermost."""

    def __init__(self, keys: tuple[FunctionRule, ...] = ()) -> None:
        super().__init__()
        self.set(keys)

    def set(self, keys: tuple[FunctionRule, ...]) -> None:
        """Have these rules from now on."""
        names = frozenset(key.name for key in keys)
        let_dynamo_show(every_spelling())
        runs: dict[Any, Callable[..., Any]] = {}
        for name in names:
            of_name = tuple([key for key in keys if key.name == name])
            keeper = passing([key.rule for key in of_name])
            for function in spellings(name):
                runs[function] = keeper.once((function, of_name), functools.partial(_run, function, of_name))
        own = frozenset(value for value in vars(Tensor).values() if isinstance(value, FunctionType))
        self.keys = keys
        self.unseen = tuple([name for name in names if name in INLINED])  # where Dynamo traces
        if self.unseen:
            on_traced(_refuse_traced)
        self.runs = runs  # all at once: the thread that has it may be running
        self.operators = tuple([(function, run) for function, run in runs.items() if function in own])
        self.bodies = reaching(names)  # what the code of these calls is to be seen too
        self.methods = tuple([(function, body) for function, body in self.bodies.items() if function in own])

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        eager = not compiling()
        if eager:
            for one in types:
                if one is not Tensor and not issubclass(one, (Tensor, Proxy)):
                    with self:
                        return _by_what_is_given(func, types, args, kwargs)
        else:  # Dynamo does not find those that are Python code, as of `x**2`, in a dict
            _refuse_unseen(self.unseen)
            for operator, under_rules in self.operators:
                if operator is func:
                    return under_rules(*args, **kwargs)
            for method, within in self.methods:
                if method is func:
                    with self:
                        return within(*args, **kwargs)
        run = self.runs.get(func)
        if run is not None:
            if not eager and func in _FOR_BUILTINS and not is_named_while_tracing(func):
                return func(*args, **kwargs)
            return run(*args, **kwargs)
        body = self.bodies.get(func)
        if body is not None:
            with self:
                return body(*args, **kwargs)
        if not (eager and type(func) in _FUNCTIONS) and isinstance(func, HigherOrderOperator):
            return run_under(self, func, args, kwargs)
        if eager:
            if func in _RUNNING_BACKWARDS and self.runs and _are_plain(types):
                with _InBackward(self):
                    return opened(func)(*args, **kwargs)
        else:
            name = getattr(func, "__name__", "")
            if getattr(Tensor, name, None) is func:  # Dynamo knows the methods of a tensor, not what is behind some
                return getattr(args[0], name)(*args[1:], **kwargs)
        return func(*args, **kwargs)


# What Dynamo calls where Python's `max` and `min` choose one of two tensors, or a number, and call nothing of torch.
_FOR_BUILTINS = (torch.maximum, torch.minimum, torch.clamp)


def _refuse_unseen(names: tuple[str, ...]) -> None:
    for name in names:
        fail(UnsupportedError, _UNSEEN.format(name))


_UNSEEN = (
    "override of function '{}': its calls must be seen, and torch.compile shows them to no TorchFunctionMode. Leave "
    "the model uncompiled, or override what the function calls"
)


def _refuse_traced() -> None:
    """What Dynamo has traced may have such calls, and no other that a mode was shown."""
    for mode in here.modes:
        for name in getattr(mode, "unseen", ()):
            raise as_dynamo_hands_on(UnsupportedError(_UNSEEN.format(name)))


def _by_what_is_given(func: Any, types: Any, args: Any, kwargs: Any) -> Any:
    """A call with objects of other classes than tensors, as these do it: what they call has the rules."""
    for cls in types:
        result = cls.__torch_function__(func, types, args, kwargs)
        if result is not NotImplemented:
            return result
    name, kinds = getattr(func, "__name__", func), ", ".join([f"'{cls.__name__}'" for cls in types])
    raise TypeError(f"no implementation of '{name}' found for arguments of these classes: {kinds}")


# What is one of these is no operator. To ask torch's class of these is slow: it is an abstract one.
_FUNCTIONS = frozenset({FunctionType, BuiltinFunctionType, MethodDescriptorType, WrapperDescriptorType})
_RUNNING_BACKWARDS = frozenset({Tensor.backward, torch.autograd.backward, torch.autograd.grad})


def _are_plain(types: Any) -> bool:
    """Whether none of these is a subclass of tensors, which may have a backward pass of its own."""
    return all([one in (Tensor, nn.Parameter) for one in types])


class _InBackward(TorchFunctionMode):
    """A mode for as long as a backward pass runs: for checkpoints and what is like them, which run their blocks again.
    What a rule calls there is its own.
    """

    def __init__(self, mode: FunctionMode) -> None:
        super().__init__()
        self.mode = mode

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _RUNNING_BACKWARDS and _are_plain(types):
            with self:
                return opened(func)(*args, **kwargs)
        if (func in self.mode.runs or func in self.mode.bodies) and in_replay():
            return self.mode.__torch_function__(func, types, args, kwargs)
        return func(*args, **kwargs)


def mode_of(keys: tuple[FunctionRule, ...]) -> FunctionMode:
    """The mode of these rules, always the same."""
    return passing([key.rule for key in keys]).once((FunctionMode, keys), lambda: FunctionMode(keys))


def _run(function: Any, keys: tuple[FunctionRule, ...]) -> Callable[..., Any]:
    """What is called for `function` under these rules."""
    other_way = turned(function)
    bare = function if other_way is None else other_way[0]
    outermost, marks = bare, _marks_of(keys)
    for key in keys:
        outermost = _under(key, outermost, function, marks)
    several = len(keys) > 1
    some = _step_by_step(bare, keys, function) if several else bare
    internal = keys[0].name in _USED_BY_THE_ENGINE
    of_operator = keys[0].name in OF_OPERATORS

    def run(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("out") is not None:  # which torch refuses where a gradient is wanted
            return bare(*args, **kwargs)
        before = here.quiet
        now = [key for key in keys if key.mark not in before]
        if not now:
            return bare(*args, **kwargs)
        if not compiling():
            if _is_not_of_the_model(sys._getframe(2), internal):
                return bare(*args, **kwargs)
            count(now)
        try:
            if several and len(now) < len(keys):
                return some(*args, **kwargs)
            here.quiet = (*before, *marks)
            return outermost(*args, **kwargs)
        except GradOverrideError as error:
            # torch hears a TypeError of an operator as "not this way", and Python tries another: `x + y`, after
            # `x += y` has written into x.
            if of_operator and isinstance(error, TypeError):
                raise UnsupportedError(str(error)) from error
            raise
        finally:
            here.quiet = before

    if other_way is None:
        return run
    in_order = other_way[1]
    return lambda *args, **kwargs: run(*in_order(*args, **kwargs))


def _step_by_step(bare: Any, keys: tuple[FunctionRule, ...], function: Any) -> Callable[..., Any]:
    """The same where some of the rules are quiet: each step looks whether it is."""
    step = quieted(bare, keys)
    for key in keys:
        step = functools.update_wrapper(_one_step(key, step, function, _marks_of(keys)), bare, updated=())
    return step


def _one_step(
    key: FunctionRule, beneath: Callable[..., Any], function: Any, marks: tuple[str, ...]
) -> Callable[..., Any]:
    above = _under(key, beneath, function, marks)
    mark = key.mark
    return lambda *args, **kwargs: (beneath if mark in here.quiet else above)(*args, **kwargs)


def _marks_of(keys: tuple[FunctionRule, ...]) -> tuple[str, ...]:
    return tuple([key.mark for key in keys])


def _under(key: FunctionRule, forward: Callable[..., Any], function: Any, marks: tuple[str, ...]) -> Callable[..., Any]:
    """`forward`, which is the spelling `function` or stands for it, under the rule of `key`; `marks`: of all that the
    function has, which what it runs is not under once more.
    """
    signature = signature_of(function, key.rule.asks)
    try:
        plan = Plan(Forward(forward, name=key.name, method=False, signature=signature), key.rule)
    except RuleSignatureError as error:  # this spelling does not offer what another does
        return make_refusal(error)
    plan.marked = True
    plan.on_trace = functools.partial(_traced, key)
    plan.on_unrecorded = functools.partial(note_unrecorded, key)
    wrapper = make_wrapper(plan, forward)
    plan.recorded = recorded_as(key.name, functools.partial(_once, wrapper, marks))
    return wrapper


def _once(wrapper: Callable[..., Any], marks: tuple[str, ...], *args: Any, **kwargs: Any) -> Any:
    """A call that torch.fx has recorded: no mode has made it, and one that is in force is to leave it at that."""
    before = here.quiet
    here.quiet = (*before, *marks)
    try:
        return wrapper(*args, **kwargs)
    finally:
        here.quiet = before


def _traced(key: FunctionRule) -> None:
    if key.name in ("detach", "view_as"):
        raise UnsupportedError(
            f"override of function '{key.name}': the rule {key.rule.who} must run uncompiled, for gradoverride uses "
            "this function itself in compiled code"
        )
    key.note_trace()


def note_unrecorded(key: FunctionRule, _: Any = None) -> None:
    """A call under this rule records no graph."""
    if any([layer.key is key for layer in here.layers]) and in_reentrant_checkpoint(
        unless=functools.partial(_enters, key)
    ):
        raise UnsupportedError(
            f"override of function '{key.name}': the rule {key.rule.who} must be in force when a reentrant checkpoint "
            "runs its block again; this call is in a block that is a function, no module or method of the model, and "
            "is run again outside of the modules that have the rule. Make the block a module and checkpoint that, "
            "or override without a model, for the whole process: go.override({...})"
        )
    for layer in (*here.layers, *everywhere.functions):
        if layer.key is key:
            layer.tally.note_unrecorded()


def _enters(key: FunctionRule, frame: FrameType) -> bool:
    """Whether this is the call of a module that has this rule in force, as it will have when it is called again.

    Not by its code alone: what Dynamo makes of it, where its graph breaks, is of a similar name.
    """
    own = frame.f_globals.get("__name__") == __name__ and "scope" in frame.f_code.co_name
    return own and key in frame.f_locals.get("keys", (key,))


_USED_BY_THE_ENGINE = frozenset({"clone", "copy", "detach", "view_as", "zeros_like", "ones_like", "as_subclass"})
_PYTHON_OF_TORCH = ("torch.overrides", "torch.nn.functional", "torch.functional", "torch._tensor")
_HOME = str(Path(__file__).parent.parent)


def _is_not_of_the_model(caller: FrameType, internal: bool) -> bool:
    """Whether the engine calls this for itself, or compiled code, which has the rules within."""
    while caller.f_globals.get("__name__") in _PYTHON_OF_TORCH and caller.f_back is not None:
        caller = caller.f_back
    filename = caller.f_code.co_filename
    if internal and filename.startswith((_HOME, "<gradoverride")):
        return True
    return filename.startswith("<eval_with_key>") and is_compiled_graph(caller)


def count(keys: list[FunctionRule]) -> None:
    """Count a call under these rules."""
    for layer in (*here.layers, *everywhere.functions):
        if layer.key in keys:
            layer.tally.calls += 1


# --- around modules


def scope_of(keys: tuple[FunctionRule, ...], layers_of: Any) -> Callable[..., Any]:
    """What calls a method of a module with these rules in force for what is called in it."""
    mode, marks = mode_of(keys), _marks_of(keys)

    def scope(method: Callable[..., Any], self: Any, /, *args: Any, **kwargs: Any) -> Any:
        active, layers = here.active, here.layers
        modes: tuple[TorchFunctionMode, ...] = ()
        if all([mark in active for mark in marks]):
            return method(self, *args, **kwargs)
        here.active = (*active, *marks)
        if not compiling():
            modes = here.modes
            here.layers = tuple(dict.fromkeys((*layers, *layers_of(self))))
            here.modes = (*modes, mode)
        try:
            if not mode.runs:
                return method(self, *args, **kwargs)
            if compiling() and not dynamo_shows():
                fail(UnsupportedError, _NOT_SHOWN)
            if compiling():
                _refuse_unseen(mode.unseen)
            with mode:
                result = method(self, *args, **kwargs)
        finally:
            here.active = active
            if not compiling():
                here.layers, here.modes = layers, modes
        return result if type(result) not in RUN_LATER else _in_scope(scope, self, result)

    return scope


def _in_scope(scope: Callable[..., Any], module: Any, running: Any) -> Any:
    """A generator or a coroutine that a method of a module has given, under the rules for what it calls."""
    if compiling() or isinstance(running, AsyncGeneratorType):
        fail(
            UnsupportedError,
            f"an override of functions of torch must be in force when a generator of '{type(module).__name__}' takes "
            "its steps, after the call that made it; under torch.compile, and in an asynchronous generator, it cannot "
            "be. Have the method return a list, or leave the call uncompiled",
        )
    return in_steps(running, lambda step, *args: scope(_take, module, step, *args))


def _take(_: Any, step: Callable[..., Any], *args: Any) -> Any:
    return step(*args)


def scoped(forward: Callable[..., Any], scope: Callable[..., Any]) -> Callable[..., Any]:
    """`forward`, which `scope` calls."""

    def in_scope(self: Any, *args: Any, **kwargs: Any) -> Any:
        return scope(forward, self, *args, **kwargs)

    return functools.update_wrapper(in_scope, forward, updated=())


_NOT_SHOWN = (
    "an override of functions of torch must see the calls of all of them; this release of torch.compile does not show "
    "functions in place, such as torch.relu_, to a TorchFunctionMode. Leave the model uncompiled"
)


def quieted(forward: Callable[..., Any], keys: tuple[FunctionRule, ...]) -> Callable[..., Any]:
    """The forward of a module that has a rule for what is one call of a function: that has no other rule then."""
    marks = _marks_of(keys)

    def quiet(*args: Any, **kwargs: Any) -> Any:
        before = here.quiet
        here.quiet = (*before, *marks)
        try:
            return forward(*args, **kwargs)
        finally:
            here.quiet = before

    return functools.update_wrapper(quiet, forward, updated=())
