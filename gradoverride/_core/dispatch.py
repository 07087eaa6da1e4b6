"""From a call of the wrapper to the path it takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gradoverride._core.call import differentiate
from gradoverride._core.fast import fast_dispatch, is_plain
from gradoverride._core.plan import Plan

__all__ = ["make_dispatch"]


def make_dispatch(plan: Plan) -> Callable[..., Any]:
    """The function that the wrapper of `plan` calls."""
    parameters = plan.forward.parameters
    if parameters is None or any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):

        def variadic(receiver: Any, positional: tuple[Any, ...], star: tuple[Any, ...], named: dict[str, Any]) -> Any:
            layout = plan.layout(len(star), tuple(named))
            return differentiate(plan, layout, receiver, (*positional, *star, *named.values()))

        return variadic
    layout = plan.layout(0, tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY))
    if is_plain(plan):
        return fast_dispatch(plan, layout)

    def fixed(receiver: Any, *values: Any) -> Any:
        return differentiate(plan, layout, receiver, values)

    return fixed
