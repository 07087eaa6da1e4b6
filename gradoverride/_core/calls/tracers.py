"""Tracers other than Dynamo: they record a forward, which is then run elsewhere, without its Functions.

- `torch.fx.symbolic_trace` records what is called, so the call itself is recorded, and has its rule in the graph.
- `torch.export`, `make_fx` and `torch.jit.trace` record operations, and no graph of theirs can hold a rule. What is
  traced has the forward alone, and a warning says so. (`make_fx` of a function that asks for gradients itself records
  the operations of the rule, which is right.)

Under `no_grad` no gradient is wanted, and nothing is said.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import nn
from torch.fx import Proxy
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from gradoverride._core.private.marks import evaluated_while_tracing
from gradoverride._core.private.modes import in_modes
from gradoverride._core.private.transforms import in_forward_ad, in_functorch, is_jit_tracing, may_be_symbolic
from gradoverride._core.values.structure import leaves_in
from gradoverride.errors import GradOverrideWarning, UnsupportedError

if TYPE_CHECKING:
    from gradoverride._core.binding.layout import Layout
    from gradoverride._core.calls.plan import Plan

__all__ = [
    "EXPORT",
    "FX",
    "MAKE_FX",
    "drops_rule",
    "exporting",
    "record_call",
    "record_function",
    "recorded_as",
    "refuse_script",
    "tracer_now",
    "warn",
]

EXPORT, FX, JIT, MAKE_FX = "torch.export", "torch.fx.symbolic_trace", "torch.jit.trace", "make_fx"


def tracer_now(values: Sequence[Any]) -> str | None:
    """Which tracer records a call with these arguments; None for none, and for Dynamo, which compiles."""
    if torch.compiler.is_dynamo_compiling():
        return EXPORT if exporting() else None
    if in_modes():
        if torch.compiler.is_exporting():
            return EXPORT
        if get_proxy_mode() is not None and not in_forward_ad():  # torch.func.linearize takes the derivative within
            return MAKE_FX
    if may_be_symbolic() and _proxies(values):
        return FX
    return JIT if is_jit_tracing() else None


@evaluated_while_tracing
def exporting() -> bool:
    """Whether Dynamo traces for torch.export."""
    return torch.compiler.is_exporting()


def drops_rule(plan: Plan, tracer: str) -> bool:
    """Whether the forward alone is to be traced. Warns that what is traced has no rule, if that is so."""
    if torch.compiler.is_dynamo_compiling():
        plan.warn_of_export()
        return True
    if tracer == MAKE_FX and in_functorch():
        return False  # torch.func takes the gradient within
    warn(plan, tracer)
    return tracer != MAKE_FX  # which may see the backward too


def warn(plan: Plan, tracer: str) -> None:
    """Say that what is traced has no rule."""
    ways = "Trace the function that takes the gradient, or compile" if tracer == MAKE_FX else "Compile"
    warnings.warn(
        f"{tracer} records the forward of {plan.forward.who} and not its rule {plan.rule.who}: what is traced has the "
        f"gradients of autograd, or none. {ways} with torch.compile to train it, or trace under torch.no_grad() "
        "what needs no gradient",
        GradOverrideWarning,
        stacklevel=3,
    )


def refuse_script(who: str, rule: str, way: str) -> NoReturn:
    """What `torch.jit.script` is told when it asks for something to compile: TorchScript has no Python rules."""
    raise UnsupportedError(
        f"{who} must run Python code for its rule {rule}, and torch.jit.script compiles none. Use torch.compile, or "
        f"{way}"
    )


def record_call(plan: Plan, layout: Layout, receiver: Any, values: Sequence[Any]) -> Any:
    """The call as a node in the graph of torch.fx: of the decorated function, or of the module."""
    tracer = _proxies((receiver, *values))[0].tracer
    arguments = tuple(values[: layout.positional])
    keywords = dict(zip(layout.keywords, values[layout.positional :], strict=True))
    if not plan.forward.takes_self:
        return tracer.create_proxy("call_function", plan.recorded, arguments, keywords)
    if isinstance(receiver, Proxy):  # of a function, whatever it calls its first argument
        return tracer.create_proxy("call_function", plan.recorded, (receiver, *arguments), keywords)
    if not isinstance(receiver, nn.Module):
        bound = recorded_as(plan.forward.name, functools.partial(plan.wrapper, receiver))
        return tracer.create_proxy("call_function", bound, arguments, keywords)
    path = tracer.path_of_module(receiver)
    if not path:
        raise UnsupportedError(
            f"{plan.forward.who} must be a part of the model that {FX} traces, for the graph to call it under its rule "
            f"{plan.rule.who}; it is the model itself. Trace torch.nn.Sequential(model)"
        )
    return tracer.create_proxy("call_module", path, arguments, keywords)


def record_function(name: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """The call of a function of this library as a node in the graph of torch.fx."""
    tracer = _proxies(arguments)[0].tracer
    return tracer.create_proxy("call_function", recorded_as(name, lambda *args: function(*args)), arguments, {})


def _proxies(values: Sequence[Any]) -> list[Any]:
    return leaves_in(tuple(values), lambda value: isinstance(value, Proxy))


def recorded_as(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A function to be recorded. torch.fx writes code that finds functions of torch by their names, and lambdas not."""
    named = isinstance(function, FunctionType) and function.__name__.isidentifier()
    if named and function.__module__.partition(".")[0] != "torch":
        return function

    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    call.__name__ = call.__qualname__ = name if name.isidentifier() else "ruled"
    call.__module__ = "gradoverride.recorded"
    return call
