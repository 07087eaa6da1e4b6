"""The plain function that a decorator gives back.

It is generated with the user's own parameter list, so that Python binds keywords and defaults (`inspect` would take
10 us), and Dynamo sees a plain function with a code object of its own (it counts recompilations by code object).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import FunctionType
from typing import Any

from gradoverride._core.plan import Plan

__all__ = ["make_wrapper"]

Dispatch = Callable[..., Any]


def make_wrapper(plan: Plan, original: Any, dispatch: Dispatch) -> FunctionType:
    """A function with the name, signature and docstring of `original` that calls `dispatch(receiver, *values)`."""
    forward = plan.forward
    signature = forward.signature
    fixed: dict[str, Any] = {"_go_call": dispatch, "_go_receiver": forward.receiver}
    if signature is None:
        source = "def wrapper(*args, **kwargs):\n    return _go_call(None, (), args, kwargs)"
    else:
        source = _source(plan, list(signature.parameters.values()), fixed)
    exec(compile(source, f"<gradoverride wrapper of {forward.name}>", "exec"), fixed)
    wrapper: FunctionType = fixed["wrapper"]
    # Not `functools.wraps`: it copies __dict__, and with it the mark by which Dynamo knows compiled functions.
    functools.update_wrapper(wrapper, original, updated=())
    for key, value in getattr(original, "__dict__", {}).items():
        if isinstance(original, FunctionType) and not key.startswith(("_torchdynamo", "__")):
            wrapper.__dict__[key] = value
    if not isinstance(getattr(original, "__name__", None), str):
        wrapper.__name__ = wrapper.__qualname__ = forward.name
    return wrapper


def _source(plan: Plan, parameters: list[inspect.Parameter], fixed: dict[str, Any]) -> str:
    declared: list[str] = []
    positional: list[str] = []
    keywords: list[str] = []
    star = "()"
    rest = ""
    slash = any(p.kind is p.POSITIONAL_ONLY for p in parameters)
    starred = False
    for index, parameter in enumerate(parameters):
        if slash and parameter.kind is not parameter.POSITIONAL_ONLY:
            declared.append("/")
            slash = False
        if parameter.kind is parameter.KEYWORD_ONLY and not starred:
            declared.append("*")
            starred = True
        text = parameter.name
        if parameter.default is not parameter.empty:
            fixed[f"_go_default_{index}"] = parameter.default
            text += f"=_go_default_{index}"
        if parameter.kind is parameter.VAR_POSITIONAL:
            text, star, starred = f"*{parameter.name}", parameter.name, True
        elif parameter.kind is parameter.VAR_KEYWORD:
            text, rest = f"**{parameter.name}", f", **{parameter.name}"
        elif parameter.kind is parameter.KEYWORD_ONLY:
            keywords.append(parameter.name)
        else:
            positional.append(parameter.name)
        declared.append(text)
    if slash:
        declared.append("/")
    receiver = "_go_receiver"
    if plan.forward.takes_self:
        receiver, positional = positional[0], positional[1:]
    head = f"def wrapper({', '.join(declared)}):\n    return _go_call("
    if star == "()" and not rest:
        return head + ", ".join([receiver, *positional, *keywords]) + ")"
    named = ", ".join(f"{name!r}: {name}" for name in keywords)
    return head + f"{receiver}, ({''.join(name + ', ' for name in positional)}), {star}, {{{named}{rest}}})"
