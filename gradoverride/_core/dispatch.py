"""From a call of the wrapper to the path it takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gradoverride._core.fast import Runs, is_plain
from gradoverride._core.forward_pass import differentiate
from gradoverride._core.plan import Plan

__all__ = ["make_dispatch"]


def make_dispatch(plan: Plan) -> tuple[Callable[..., Any], Runs | None]:
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
