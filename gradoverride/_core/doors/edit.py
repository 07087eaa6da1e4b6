"""The gradient of a value, edited on its way: the rule of `edit_gradient`, and what reads its answers.

For one tensor nothing is generated: one Function serves all rules (`alias_function`), for a rule is often a lambda
that is made anew in each call. Structures, `vjp` and its like go the general way, as a forward that returns its
argument.
"""

from __future__ import annotations

import inspect
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from gradoverride._core.autograd.ambient import EAGER, NO_AUTOCAST, TRACED, autocast_while_tracing, under_traced
from gradoverride._core.autograd.function import alias_function
from gradoverride._core.binding.contract import Meta, read_answer, what
from gradoverride._core.binding.signature import Forward
from gradoverride._core.calls.call import Call
from gradoverride._core.calls.forward_pass import differentiate
from gradoverride._core.calls.held import refuse_within
from gradoverride._core.calls.plan import Plan
from gradoverride._core.calls.reading import (
    Reading,
    Readings,
    holds_numbers,
    keep_own_plan,
    keep_plan,
    kept_plan,
    made_outside,
    unbound,
)
from gradoverride._core.calls.short_function import FLOATING
from gradoverride._core.calls.tracers import FX, exporting, record_function, tracer_now
from gradoverride._core.private.dynamo import fail, forward_mode_around, in_transform, transformed_while_tracing
from gradoverride._core.private.engine import fast_apply
from gradoverride._core.private.marks import evaluated_while_tracing
from gradoverride._core.private.modes import any_autocast
from gradoverride._core.private.transforms import (
    dual_levels,
    fx_tracer,
    in_forward_ad,
    in_functorch,
    is_jit_tracing,
    jit_tracer,
)
from gradoverride._core.values.structure import leaves_in, taken_apart, unflatten
from gradoverride._core.values.tensors import is_differentiable
from gradoverride.errors import GraphError

__all__ = ["ask", "ask_several", "edit"]


def edit(x: Any, rule: Any) -> Any:
    """`x`, whose gradient goes through `rule`."""
    if _compiling():
        return _edit_traced(x, rule)
    bare = type(rule) is FunctionType and rule.__defaults__ is None and rule.__kwdefaults__ is None
    reading = (_known(id(rule.__code__)) if bare else None) or _of_rule(rule)
    kind = type(x)
    if (
        (kind is Tensor or kind is Parameter)
        and reading.of_values
        and not (in_functorch() or dual_levels._current_level >= 0 or fx_tracer._is_fx_tracing_flag)
        and (reading.plain or not any_autocast())
        and jit_tracer._trace_module_map is None
    ):
        if x.requires_grad and _grad_enabled():
            return (_apply_keeping if reading.sources else _apply)((rule, reading), x)
        if x.dtype in FLOATING and not is_jit_tracing():
            return x
    return _general(reading.plan_for(rule), x, rule)


_compiling, _grad_enabled = torch.compiler.is_dynamo_compiling, torch.is_grad_enabled  # each dot takes 20 ns


def _same(x: Any) -> Any:
    if isinstance(x, Tensor) and x.layout is not torch.strided:  # torch would try to make a view of the argument
        return x.clone()
    return x


_readings = Readings(Forward(_same, name="edit_gradient", place=""), is_edit=True)
_of_rule, _known = _readings.of, _readings.get
VALUES = frozenset({"x", "input", "output"})  # names of the value: they are all the same here


def _general(plan: Plan, x: Any, rule: Any) -> Any:
    if tracer_now((x,)) == FX:
        return record_function("edit_gradient", lambda x: edit(x, rule), x)
    spec, leaves = taken_apart(x, is_differentiable)
    if not leaves:
        fail(
            GraphError,
            f"edit_gradient: 'x' must be a floating or complex tensor, or hold one, for its gradient to be edited; "
            f"got {what(x)}{f' of {x.dtype}' if isinstance(x, Tensor) else ''}. Convert it, or leave the edit out",
        )
    refuse_within("edit_gradient", "x", spec, "for their gradients to be edited")
    if not (torch.is_grad_enabled() or in_forward_ad()):  # also in a transform: it goes on as what was given
        return x
    result = differentiate(plan, plan.layouts.of(0, ()), None, (x,), rule)
    if in_transform():  # `requires_grad` does not tell
        return result
    edited = leaves_in(result, is_differentiable)
    # A constant beside what has a gradient stays one.
    kept = [new if old.requires_grad else old for old, new in zip(leaves, edited, strict=True)]
    return unflatten(spec, iter(kept))


# --- the Function for one tensor


def _backward(ctx: Any, grad_output: Tensor) -> tuple[None, Any]:
    rule, reading = ctx.rule
    if reading.gives_alike and (not reading.holds or holds_numbers(rule)):
        try:
            answer = rule(grad_output)
        except Exception as error:
            reading.plan_for(rule).note(error)
            raise
        if type(answer) is Tensor:
            return None, answer
    plain = reading.plain
    if not plain and (reading.writes or reading.holds or any_autocast()):
        return None, _ask_without_autocast(rule, reading, grad_output, None)
    version = 0 if plain else grad_output._version
    try:
        answer = rule(grad_output)
    except Exception as error:
        reading.plan_for(rule).note(error)
        raise
    if (  # what `_settled` finds out, in half the time of the call
        type(answer) is Tensor
        and answer.dtype is grad_output.dtype
        and answer.shape == grad_output.shape
        and (plain or (answer.is_cpu and grad_output.is_cpu and grad_output._version == version))
    ):
        return None, answer
    return None, _settled(rule, reading, grad_output, version, answer)


def _backward_keeping(ctx: Any, grad_output: Tensor) -> tuple[None, Any]:
    rule, reading = ctx.rule
    (value,) = ctx.saved_tensors
    plain = reading.plain
    if not reading.value_second or (not plain and (reading.writes or reading.holds or any_autocast())):
        return None, _ask_without_autocast(rule, reading, grad_output, value)
    version = 0 if plain else grad_output._version
    try:
        answer = rule(grad_output, value)
    except Exception as error:
        reading.plan_for(rule).note(error)
        raise
    if (  # what `_settled` finds out, in half the time of the call
        type(answer) is Tensor
        and answer.dtype is grad_output.dtype
        and answer.shape == grad_output.shape
        and (plain or (answer.is_cpu and grad_output.is_cpu and grad_output._version == version))
    ):
        return None, answer
    return None, _settled(rule, reading, grad_output, version, answer)


def _ask_without_autocast(rule: Any, reading: Reading, grad_output: Tensor, value: Tensor | None) -> Tensor | None:
    """There was none in the forward, or the call would have gone the general way."""
    if not any_autocast():
        return ask(rule, reading, grad_output, value)
    with NO_AUTOCAST.restored():
        return ask(rule, reading, grad_output, value)


_apply = fast_apply(alias_function(_backward, keeps=False))
_apply_keeping = fast_apply(alias_function(_backward_keeping, keeps=True))


def ask(rule: Any, reading: Reading, grad_output: Tensor, value: Tensor | None) -> Tensor | None:
    """The answer of `rule` for the gradient of a tensor, checked. `value`: that tensor, if the rule asks for it."""
    handed = grad_output.clone() if reading.hands_copy(rule) else grad_output
    version = grad_output._version
    try:
        if not reading.sources:
            answer = rule(handed)
        elif reading.value_second:
            answer = rule(handed, value)
        else:
            answer = rule(handed, **dict.fromkeys(reading.sources, value))
    except Exception as error:
        reading.plan_for(rule).note(error)
        raise
    return _settled(rule, reading, grad_output, version, answer)


def _settled(rule: Any, reading: Reading, grad_output: Tensor, version: int, answer: Any) -> Tensor | None:
    """An answer, checked; and that the gradient, which had this version, was not written into."""
    if not reading.plain and grad_output._version != version and not _compiling():
        reading.plan_for(rule).refuse_written()
    if (
        type(answer) is Tensor
        and answer.dtype is grad_output.dtype
        and answer.shape == grad_output.shape
        and ((answer.is_cpu and grad_output.is_cpu) or answer.device == grad_output.device)
    ):
        return answer
    return _read(reading.plan_for(rule), EAGER, grad_output, answer)


def _read(plan: Plan, mode: str, grad_output: Tensor, answer: Any) -> Tensor | None:
    call = Call(plan, plan.layouts.of(0, ()), mode)
    call.describe_plain([0], [Meta(grad_output)], [True])
    return read_answer(call, answer)[0][0]


def ask_several(rule: Any, reading: Reading, grads: tuple[Tensor, ...]) -> list[Tensor | None]:
    """The same for a tuple of gradients: of all results of a node."""
    plan = reading.plan_for(rule)
    call = Call(plan, plan.layouts.of(0, ()), EAGER)
    call.describe_tuple([Meta(grad) for grad in grads])
    try:
        answer = rule(tuple([grad.clone() for grad in grads]))  # it may write into them
    except Exception as error:
        plan.note(error)
        raise
    return read_answer(call, answer)[0]


# --- while Dynamo traces


def _edit_traced(x: Any, rule: Any) -> Any:
    """Few names and attributes for a function and a tensor: each is a guard that every compiled call checks again."""
    usual = isinstance(x, Tensor) and x.requires_grad and _grad_enabled() and isinstance(rule, FunctionType)
    names = _names_asked(rule.__code__) if usual else None
    autocast: tuple[tuple[str, torch.dtype | None], ...] = ()
    if names is None:
        names = _names_of_value(rule)
        if names is None or not is_differentiable(x) or _otherwise():
            own = transformed_while_tracing() and made_outside(rule)
            return _general(kept_plan(_name_of_own_plan(rule) if own else _name_of_plan(*unbound(rule))), x, rule)
        if not (x.requires_grad and _grad_enabled()):
            return x
        autocast = autocast_while_tracing()
    return (_Keeping if names else _NotKeeping).apply((rule, names, autocast), x)


@evaluated_while_tracing
def _names_asked(code: CodeType) -> tuple[str, ...] | None:
    """By which names a function of this code asks for the value; None if it asks for more, or any call is special."""
    return None if _otherwise() or autocast_while_tracing() else _names_in(code)


@evaluated_while_tracing
def _otherwise() -> bool:
    """Whether it is traced in a transform, or for an export."""
    return transformed_while_tracing() or forward_mode_around() or exporting()


@evaluated_while_tracing
def _names_in(code: CodeType) -> tuple[str, ...] | None:
    names = code.co_varnames[1 : code.co_argcount]
    plain = code.co_argcount and not code.co_kwonlyargcount and not code.co_flags & _STARRED
    return names if plain and VALUES.issuperset(names) else None


_STARRED = inspect.CO_VARARGS | inspect.CO_VARKEYWORDS


def _names_of_value(rule: Any) -> tuple[str, ...] | None:
    """By which names `rule` asks for the value; None if it asks for anything else."""
    names = _names_in(rule.__code__) if isinstance(rule, FunctionType) else None
    return _names_read(*unbound(rule)) if names is None else names


@evaluated_while_tracing
def _name_of_plan(rule: Any, bound: tuple[str, ...]) -> str:
    name = keep_plan(_readings, rule, bound)
    kept_plan(name).layouts.of(0, ())  # which it keeps: it must be there when the backward is traced
    return name


@evaluated_while_tracing
def _name_of_own_plan(rule: Any) -> str:
    return keep_own_plan(_readings, rule)


@evaluated_while_tracing
def _names_read(rule: Any, bound: tuple[str, ...]) -> tuple[str, ...] | None:
    sources = kept_plan(keep_plan(_readings, rule, bound)).sources
    return tuple(sources) if VALUES.issuperset(sources) else None


def _backward_traced(ctx: Any, grad_output: Tensor) -> tuple[None, Any]:
    rule, names, autocast = ctx.rule
    handed = grad_output.clone()  # a compiler removes the copy where nothing is written
    values = dict.fromkeys(names, ctx.saved_tensors[0]) if names else {}
    answer = under_traced(autocast, lambda: rule(handed, **values)) if autocast else rule(handed, **values)
    if (
        isinstance(answer, Tensor)
        and answer.dtype == grad_output.dtype
        and answer.shape == grad_output.shape
        and answer.device == grad_output.device
    ):
        return None, answer
    return None, _read(kept_plan(_name_of_plan(*unbound(rule))), TRACED, grad_output, answer)


_NotKeeping = alias_function(_backward_traced, keeps=False)
_Keeping = alias_function(_backward_traced, keeps=True)
