"""The plain function that a decorator gives back.

It is generated with the user's own parameter list, so that Python binds keywords and defaults (`inspect` would take
10 us), and Dynamo sees a plain function with a code object of its own (it counts recompilations by code object).
For `def scale(x, weight=1.0)` it reads

    def wrapper(x, weight=_go_default_1):
        if not grad_enabled() and not in_functorch() and not in_forward_ad():
            return fn(x, weight)
        if compiling():
            ...  # `traced.py`, for calls that it is for
            return general(None, x, weight)
        if type(x) is not Tensor or type(weight) not in SCALARS:
            return runs[type(x), type(weight)](x, weight)
        ...

and then the code of the short path (`fast.py`) for the types that the signature suggests.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import BuiltinFunctionType, FunctionType, MethodDescriptorType
from typing import Any

import torch

from gradoverride._core.binding.layout import Layout
from gradoverride._core.binding.signature import POSITIONAL
from gradoverride._core.calls.fast import Runs, ShortPath, guessed_places, is_plain
from gradoverride._core.calls.forward_pass import differentiate
from gradoverride._core.calls.plan import Plan
from gradoverride._core.calls.traced import TracedPath
from gradoverride._core.calls.tracers import refuse_script
from gradoverride._core.private.marks import COMPILED_MARKS, OF_NO_MODULE, written_as
from gradoverride._core.private.transforms import IN_FORWARD_AD, dual_levels, in_functorch
from gradoverride._core.python.reach import SCALARS
from gradoverride.errors import RuleSignatureError

__all__ = ["make_refusal", "make_wrapper", "wrapped"]


def make_wrapper(plan: Plan, original: Any, as_function: Any = None) -> FunctionType:
    """A function with the name, signature and docstring of `original` that calls it under the rule of `plan`.

    `as_function` is called instead where what stands for `self` shows that it is no method: it is a tensor, or under
    another name than `self` no module.
    """
    general, runs = _make_paths(plan)
    names: dict[str, Any] = {
        "__name__": OF_NO_MODULE,
        "_go_compiling": torch.compiler.is_dynamo_compiling,
        "_go_fn": plan.fn,
        "_go_as_function": as_function,
        "_go_Module": torch.nn.Module,
        "_go_unrecorded": plan.on_unrecorded,
        "_go_Tensor": torch.Tensor,
        "_go_dual_levels": dual_levels,
        "_go_general": general,
        "_go_grad_enabled": torch.is_grad_enabled,
        "_go_in_functorch": in_functorch,
        "_go_receiver": plan.forward.receiver,
        "_go_runs": runs,
        "_go_SCALARS": SCALARS,
        # A parameter may be called like a builtin.
        "_go_getattr": getattr,
        "_go_isinstance": isinstance,
        "_go_len": len,
        "_go_type": type,
    }
    source = _source(plan, names, short=runs is not None)
    exec(compile(source, f"<gradoverride wrapper of {plan.forward.name}>", "exec"), names)
    wrapper: FunctionType = names["wrapper"]
    wrapped(wrapper, original)
    scripted = isinstance(original, torch.jit.ScriptFunction)  # the first one of all bears that name
    if scripted or not isinstance(getattr(original, "__name__", None), str):
        wrapper.__name__ = wrapper.__qualname__ = plan.forward.name
    elif isinstance(original, BuiltinFunctionType):  # `torch.round` has that of a private class
        wrapper.__qualname__ = wrapper.__name__
    elif isinstance(original, MethodDescriptorType):  # which has none: a pickle would look for it everywhere
        wrapper.__module__ = original.__objclass__.__module__
    if getattr(original, "__isabstractmethod__", False):
        wrapper.__dict__["__isabstractmethod__"] = True
    if scripted or written_as(original) is not original:  # `inspect` finds none
        wrapper.__dict__["__signature__"] = plan.forward.signature
    # torch.jit.script asks for what it is to compile instead.
    refusal = functools.partial(
        refuse_script, plan.forward.who, plan.rule.who, "script the undecorated function, its __wrapped__"
    )
    wrapper.__prepare_scriptable__ = refusal  # type: ignore[attr-defined]  # Dynamo knows no write into `__dict__`
    plan.wrapper = wrapper
    return wrapper


def wrapped(wrapper: FunctionType, original: Any) -> FunctionType:
    """`wrapper` with the name, signature and docstring of `original`, and what somebody has put on it.

    `functools.wraps` would copy the mark too by which Dynamo knows compiled functions.
    """
    functools.update_wrapper(wrapper, written_as(original), updated=())
    wrapper.__wrapped__ = original  # type: ignore[attr-defined]
    marks = vars(original) if isinstance(original, FunctionType) else {}
    if not any(key.startswith(COMPILED_MARKS) for key in marks):  # all of a compiled function's are Dynamo's
        wrapper.__dict__.update({key: value for key, value in marks.items() if not key.startswith("__")})
    return wrapper


def make_refusal(error: RuleSignatureError) -> Callable[..., Any]:
    """What raises `error` when it is called, where it takes the place of a wrapper."""
    text = str(error)

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise RuleSignatureError(text)

    return refuse


def _make_paths(plan: Plan) -> tuple[Callable[..., Any], Runs | None]:
    """The general path of `plan`, as the wrapper calls it, and the short one if its calls can take it."""
    parameters = plan.forward.parameters
    if plan.forward.as_given and parameters is not None:

        def as_given(receiver: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            layout, values = plan.layouts.taken_apart(args, kwargs)
            return differentiate(plan, layout, receiver, values)

        return as_given, None
    if parameters is None or any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):

        def variadic(receiver: Any, positional: tuple[Any, ...], star: tuple[Any, ...], named: dict[str, Any]) -> Any:
            layout = plan.layouts.of(len(star), tuple(named))
            return differentiate(plan, layout, receiver, (*positional, *star, *named.values()))

        return variadic, Runs(plan, None) if parameters is None and is_plain(plan) else None
    layout = plan.layouts.of(0, tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY))

    def fixed(receiver: Any, *values: Any) -> Any:
        return differentiate(plan, layout, receiver, values)

    return fixed, Runs(plan, layout) if is_plain(plan) else None


def _source(plan: Plan, names: dict[str, Any], *, short: bool) -> str:
    signature, forward = plan.forward.signature, plan.forward
    if signature is None:
        general = "return _go_general(None, (), args, kwargs)"
        head = ["def wrapper(*args, **kwargs):", *_without_graph(plan, "None", "*args, **kwargs", general)]
        if short:
            head += [
                "    if not kwargs and not _go_compiling():",
                "        return _go_runs[*map(_go_type, args),](*args)",
                "    if not kwargs and _go_len(args) == 1:",
                "        x0, = args",
                *(f"        {line}" for line in _traced(plan, names, plan.layouts.of(1, ()), [0], ["x0"], general)),
            ]
        return "\n".join([*head, f"    {general}\n"])
    parameters = list(signature.parameters.values())
    positional = [p.name for p in parameters if p.kind in POSITIONAL]
    keywords = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    star = next((p.name for p in parameters if p.kind is p.VAR_POSITIONAL), None)
    rest = next((p.name for p in parameters if p.kind is p.VAR_KEYWORD), None)
    receiver = "_go_receiver"
    if forward.takes_self:
        receiver, *positional = positional
    if not forward.as_given:
        declared = _declared(parameters, names)
    else:
        declared = "*_go_args, **_go_kwargs"
        if forward.takes_self:
            declared, receiver = f"_go_self, /, {declared}", "_go_self"
        positional, keywords, star, rest = [], [], "_go_args", "_go_kwargs"
    stars = ([f"*{star}"] if star else []) + [f"{name}={name}" for name in keywords] + ([f"**{rest}"] if rest else [])
    passed = ", ".join([*([receiver] if plan.takes_receiver else []), *positional, *stars])
    head = [f"def wrapper({declared}):"]
    if names["_go_as_function"] is not None:
        of_function = f"_go_isinstance({receiver}, _go_Tensor)"
        if not forward.named_so:
            of_function = f"not _go_isinstance({receiver}, _go_Module)"
        head += [f"    if {of_function}:", f"        return _go_as_function({passed})"]
    arguments = [*positional, *keywords]
    values = ", ".join(arguments)
    if forward.as_given:
        values = "_go_args, _go_kwargs"
    elif star or rest:
        pairs = [*(f"{name!r}: {name}" for name in keywords), *([f"**{rest}"] if rest else [])]
        values = f"({''.join(name + ', ' for name in positional)}), {star or '()'}, {{{', '.join(pairs)}}}"
    general = f"    return _go_general({receiver}, {values})"
    head += _without_graph(plan, receiver, passed, general.strip())
    return "\n".join([*head, *(_short(plan, names, arguments, receiver, general) if short else [general])]) + "\n"


def _short(plan: Plan, names: dict[str, Any], arguments: list[str], receiver: str, general: str) -> list[str]:
    """The code of calls that may take a short path; `general` is that of others."""
    otherwise = general
    if not plan.takes_receiver:
        kinds = ", ".join(f"_go_type({name})" for name in arguments)
        otherwise = f"    return _go_runs[{kinds},]({', '.join(arguments)})"
    places = guessed_places(plan)
    if not places:
        return ["    if _go_compiling():", f"    {general}", otherwise]
    layout = names["_go_runs"].layout
    path = ShortPath(plan, layout, places)
    names.update({**path.globals(), **names})
    compiled = _traced(plan, names, layout, places, arguments, general.strip(), receiver)
    others = [
        f"_go_type({name}) is not _go_Tensor" if index in places else f"_go_type({name}) not in _go_SCALARS"
        for index, name in enumerate(arguments)
    ]
    head = ["    if _go_compiling():", *(f"        {line}" for line in compiled)]
    return [*head, f"    if {' or '.join(others)}:", f"    {otherwise}", *path.body(arguments, receiver)]


def _traced(
    plan: Plan,
    names: dict[str, Any],
    layout: Layout,
    places: list[int],
    arguments: list[str],
    general: str,
    receiver: str = "None",
) -> list[str]:
    """The code of a call that Dynamo traces."""
    path = TracedPath(plan, layout, places)
    if not path.exists:
        return [general]
    path.define(names)
    return path.body(arguments, receiver, general)


def _without_graph(plan: Plan, receiver: str, passed: str, general: str) -> list[str]:
    """What is done where no graph is recorded: the original is called, by `general` if it hands something over."""
    done = [] if plan.on_unrecorded is None else [f"        if not _go_compiling(): _go_unrecorded({receiver})"]
    done.append(f"        {general}" if plan.hands_over else f"        return _go_fn({passed})")
    return [f"    if not _go_grad_enabled() and not _go_in_functorch() and not {IN_FORWARD_AD}:", *done]


def _declared(parameters: list[inspect.Parameter], names: dict[str, Any]) -> str:
    """The parameter list, with the user's own default values."""
    declared: list[str] = []
    before: Any = None
    for index, parameter in enumerate(parameters):
        if before is parameter.POSITIONAL_ONLY and parameter.kind is not before:
            declared.append("/")
        if parameter.kind is parameter.KEYWORD_ONLY and before not in (
            parameter.KEYWORD_ONLY,
            parameter.VAR_POSITIONAL,
        ):
            declared.append("*")
        text = _STARS.get(parameter.kind, "") + parameter.name
        if parameter.default is not parameter.empty:
            names[f"_go_default_{index}"] = parameter.default
            text += f"=_go_default_{index}"
        declared.append(text)
        before = parameter.kind
    if before is inspect.Parameter.POSITIONAL_ONLY:
        declared.append("/")
    return ", ".join(declared)


_STARS: dict[Any, str] = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
