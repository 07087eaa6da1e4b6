"""`plot_rule`: what a rule does, as a picture. It needs matplotlib, the extra `plot`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction

from gradoverride._core.autograd.nodes import nodes_behind, rule_of
from gradoverride._core.binding.contract import shape_text, what
from gradoverride._core.binding.options import check, check_function, is_integer, is_number
from gradoverride._core.binding.rule import Rule
from gradoverride._core.binding.signature import name_of
from gradoverride._core.doors.surrogate import StraightThrough, SurrogateRule
from gradoverride._core.python.scan import location
from gradoverride.errors import ForwardResultError, MissingExtraError, RuleResultError, RuleSignatureError
from gradoverride.rules.steps import spike
from gradoverride.surrogates import Surrogate

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_rule"]


def plot_rule(
    rule_or_function: Callable[..., Any],
    /,
    *,
    low: float = -2.0,
    high: float = 2.0,
    points: int = 1001,
    primitive: Callable[[Tensor], Tensor] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Axes with what a rule makes of a gradient, at `points` values from `low` to `high`.

    >>> import torch, gradoverride as go
    >>> ax = go.plot_rule(go.straight_through(torch.sign, surrogate=torch.tanh))
    >>> [line.get_label() for line in ax.lines]
    ['forward', 'primitive', 'gradient']

    - A function of one tensor with a backward of its own (decorated, or made of such; a module): its value, and the
      gradient that it gives for a gradient of ones. Each result is to depend on one input.
    - A surrogate, or a function decorated with one: also the smooth function whose derivative it is, or `primitive` in
      its place.
    - Any other callable is taken for a rule of the gradient alone: the gradient that goes on against the one that
      comes, for one number at a time.

    It draws on `ax`, or on a new figure of matplotlib's pyplot. All is computed in float64.

    Raises `RuleSignatureError` for what is none of these, `ForwardResultError` and `RuleResultError` for a result that
    cannot be drawn, `RuleOptionError` for an option out of range, `MissingExtraError` without matplotlib.
    """
    _check_options(low, high, points, primitive, ax)
    given: Any = rule_or_function
    if not callable(given) or isinstance(given, type):
        raise RuleSignatureError(
            f"plot_rule: 'rule_or_function' must be a rule, a surrogate or a function of one tensor; got {what(given)}"
        )
    places = torch.arange(points, dtype=torch.float64)
    x = (low * places.flip(0) + high * places) / (points - 1)  # `linspace` passes 0 by a bit, where some are huge
    labels = {"xlabel": "x"}
    if isinstance(rule_or_function, Surrogate):
        curves = _curves_of_surrogate(rule_or_function, primitive, x)
    elif _is_function(rule_or_function, x):
        curves = _curves_of_function(rule_or_function, primitive, x)
    else:
        fits = primitive is None
        check("plot_rule", "primitive", fits or name_of(primitive), fits, "left out: a rule of the gradient has none")
        curves = {"unchanged": x, "gradient": _gradients_of_rule(rule_or_function, x)}
        labels = {"xlabel": "gradient that comes", "ylabel": "gradient that goes on"}
    axes = _new_axes() if ax is None else ax
    for name, curve in curves.items():
        axes.plot(x, curve, label=name, **_STYLES[name])
    axes.set(title=_title(rule_or_function), **labels)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return axes


# Told apart with any colour vision, and without colours.
_STYLES: dict[str, Any] = {
    "forward": {"color": "#7f7f7f", "linewidth": 1.5},
    "primitive": {"color": "#0072b2", "linewidth": 1.5, "linestyle": "--"},
    "unchanged": {"color": "#7f7f7f", "linewidth": 1, "linestyle": ":"},
    "gradient": {"color": "#e69f00", "linewidth": 2},
}


def _curves_of_surrogate(surrogate: Surrogate, primitive: Any, x: Tensor) -> dict[str, Tensor]:
    options = {option.name: getattr(surrogate, option.name) for option in fields(surrogate)}
    learnt = {name: value.detach() for name, value in options.items() if isinstance(value, Tensor)}
    surrogate = replace(surrogate, **learnt)
    smooth = surrogate.primitive if primitive is None else primitive
    curves = {} if smooth is None else {"primitive": _result_of(smooth, x).detach()}
    return {**curves, "gradient": surrogate(torch.ones_like(x), x).detach()}


def _curves_of_function(function: Callable[..., Any], primitive: Any, x: Tensor) -> dict[str, Tensor]:
    value, gradient = _value_and_gradient(function, x)
    smooth = _primitive_of(function, x) if primitive is None else primitive
    curves = {} if smooth is None else {"primitive": _result_of(smooth, x).detach()}
    return {"forward": value, **curves, "gradient": gradient}


def _gradients_of_rule(rule: Callable[..., Any], x: Tensor) -> Tensor:
    """Number by number: a rule such as `clip_norm` looks at all that it is given."""
    read = Rule(rule)
    asked = [name for name, must in read.asks.items() if must]
    if asked:
        raise RuleSignatureError(
            f"plot_rule: 'rule_or_function' must be a rule of the gradient alone, or a function of one tensor with a "
            f"backward of its own; {read.who} asks for {', '.join(map(repr, asked))} too. Give the function that the "
            "rule is for, custom_backward(rule)(fn), or bind what is asked for with functools.partial"
        )
    found = [rule(number) for number in x.split(1)]
    for gradient in found:
        if not isinstance(gradient, Tensor) or gradient.shape != (1,):
            raise RuleResultError(
                f"plot_rule: the rule {read.who} must give one gradient for one, of shape (1,); it gave "
                f"{what(gradient)}"
            )
    return torch.cat(found).detach()


def _is_function(callable_: Callable[..., Any], x: Tensor) -> bool:
    """Whether it is a function with a backward of its own, and no rule: there is such a node in its graph."""
    if isinstance(callable_, nn.Module):
        return True
    if any(_is_required(parameter) for parameter in _parameters(callable_)[1:]):
        return False
    last = _last_node(callable_, x)
    return last is not None and any(isinstance(node, BackwardCFunction) for node in nodes_behind(last))


def _last_node(function: Callable[..., Any], x: Tensor) -> Any:
    return getattr(function(x.clone().requires_grad_()), "grad_fn", None)


def _primitive_of(function: Callable[..., Any], x: Tensor) -> Any:
    """The function that the gradient is the derivative of, if a surrogate is all that is behind the function."""
    if isinstance(function, (StraightThrough, spike)):
        given = function.surrogate
        return given.primitive if isinstance(given, Surrogate) else given
    node = _last_node(function, x)
    if node is None or any(after is not None and after.next_functions for after, _ in node.next_functions):
        return None  # more than one node
    rule, _ = rule_of(node)
    if isinstance(rule, SurrogateRule):
        return rule.surrogate
    return rule.primitive if isinstance(rule, Surrogate) else None


def _value_and_gradient(function: Callable[..., Any], x: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.clone().requires_grad_()
    value = _result_of(function, leaf)
    if not value.requires_grad:
        return value, torch.zeros_like(x)
    (gradient,) = torch.autograd.grad(value, leaf, torch.ones_like(value), materialize_grads=True)
    return value.detach(), gradient


def _result_of(function: Callable[..., Any], x: Tensor) -> Tensor:
    result = function(x)
    if not isinstance(result, Tensor) or result.shape != x.shape:
        raise ForwardResultError(
            f"plot_rule: the function '{name_of(function)}' ({location(function)}) must give a result of the shape of "
            f"its input, {shape_text(x.shape)}; it gave {what(result)}"
        )
    return result


def _title(rule_or_function: Callable[..., Any]) -> str:
    """The name of a function; an object with options as it prints itself."""
    return repr(rule_or_function) if is_dataclass(rule_or_function) else name_of(rule_or_function)


def _parameters(callable_: Callable[..., Any]) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(callable_).parameters.values())
    except (TypeError, ValueError):  # a builtin without one
        return []


def _is_required(parameter: inspect.Parameter) -> bool:
    positional = parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    return parameter.default is parameter.empty and (positional or parameter.kind is parameter.KEYWORD_ONLY)


# --- options ---


def _new_axes() -> Axes:
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise MissingExtraError('plot_rule needs matplotlib: pip install "gradoverride[plot]"') from error
    return pyplot.subplots(figsize=(5, 3.2), layout="constrained")[1]


def _check_options(low: Any, high: Any, points: Any, primitive: Any, ax: Any) -> None:
    fits = is_number(low) and is_number(high) and low < high
    check("plot_rule", "low' and 'high", (low, high), fits, "numbers with low < high")
    check("plot_rule", "points", points, is_integer(points) and points >= 2, "an integer, 2 at least")
    if primitive is not None:
        check_function("plot_rule", "primitive", primitive, 1, "a function of one tensor")
    check("plot_rule", "ax", ax, ax is None or hasattr(ax, "plot"), "Axes of matplotlib")
