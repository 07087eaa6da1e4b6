"""Functions with a gradient that is finite at every input: 0 where torch's own is nan or inf.

The value is torch's, to the last bit, inf and nan included. Where the derivative is finite, the gradient is torch's
too. Where it is not (a singularity, a nan, a point outside of the domain, or so near its end that the dtype has no room
for the derivative) the gradient is 0, whatever comes in. A nan or inf that comes in elsewhere passes on: it is not of
this function's making, and a `GradScaler` waits for it. There the further derivatives are 0 too; elsewhere they are
those of the gradient, and overflow where it nearly does.

>>> import torch
>>> from gradoverride import safe
>>> x = torch.tensor([0.0, 4.0], requires_grad=True)
>>> torch.autograd.grad(safe.sqrt(x).sum(), x)
(tensor([0.0000, 0.2500]),)

`sqrt_backward`, `log_backward`, `asin_backward` and `acos_backward` are the rules, for code that you do not edit:

>>> import gradoverride as go
>>> with go.override({torch.sqrt: safe.sqrt_backward}):
...     y = torch.sqrt(x)
>>> torch.autograd.grad(y.sum(), x)
(tensor([0.0000, 0.2500]),)

Integers are taken where torch takes them. Complex tensors are refused, with `UnsupportedError`, but for `where`.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from gradoverride._core.binding.contract import shape_text
from gradoverride._core.binding.options import check, is_integer, is_number, refuse
from gradoverride._core.binding.rule import writes_nothing
from gradoverride._core.private.dynamo import fail
from gradoverride.decorators import custom_backward
from gradoverride.errors import ForwardResultError, UnsupportedError

__all__ = [
    "sqrt",
    "log",
    "asin",
    "acos",
    "div",
    "xlogy",
    "log1pexp",
    "norm",
    "normalize",
    "max",
    "min",
    "where",
    "sqrt_backward",
    "log_backward",
    "asin_backward",
    "acos_backward",
]

Dim = int | tuple[int, ...] | None
Ties = Literal["even", "first", "all"]


# --- of one number ---


@writes_nothing
def sqrt_backward(grad_output: Tensor, output: Tensor) -> Tensor:
    """The rule of `sqrt`: `g / (2 y)`, and 0 at 0 and below. It keeps the result."""
    ok = output > 0
    return grad_output.where(ok, 0) / (2 * output.where(ok, 1))


@custom_backward(sqrt_backward)
def sqrt(input: Tensor) -> Tensor:
    """The square root, with gradient 0 at 0 (torch: inf), at -0.0 and below (torch: nan).

    >>> import torch
    >>> from gradoverride import safe
    >>> x = torch.tensor([-1.0, 0.0, 4.0], requires_grad=True)
    >>> torch.autograd.grad(safe.sqrt(x).nansum(), x)
    (tensor([0.0000, 0.0000, 0.2500]),)
    """
    return torch.sqrt(_real("sqrt", input))


@writes_nothing
def log_backward(grad_output: Tensor, input: Tensor) -> Tensor:
    """The rule of `log`: `g / x`, and 0 at 0. It keeps the input."""
    return _over(grad_output, input)


@custom_backward(log_backward)
def log(input: Tensor) -> Tensor:
    """The natural logarithm, with gradient 0 at 0 (torch: inf). Below, where it is nan, that is 1 / x, as in torch.

    >>> import torch
    >>> from gradoverride import safe
    >>> x = torch.tensor([0.0, 4.0], requires_grad=True)
    >>> torch.autograd.grad(safe.log(x).sum(), x)
    (tensor([0.0000, 0.2500]),)
    """
    return torch.log(_real("log", input))


@writes_nothing
def asin_backward(grad_output: Tensor, input: Tensor) -> Tensor:
    """The rule of `asin`: `g / sqrt(1 - x^2)`, and 0 at -1 and 1 and beyond. It keeps the input."""
    ok = input.abs() < 1
    return grad_output.where(ok, 0) * (1 - input.where(ok, 0).square()).rsqrt()


@custom_backward(asin_backward)
def asin(input: Tensor) -> Tensor:
    """The arc sine, with gradient 0 at -1 and 1 (torch: inf) and beyond (torch: nan).

    >>> import torch
    >>> from gradoverride import safe
    >>> x = torch.tensor([0.0, 0.6, 1.0], requires_grad=True)
    >>> torch.autograd.grad(safe.asin(x).sum(), x)
    (tensor([1.0000, 1.2500, 0.0000]),)
    """
    return torch.asin(_real("asin", input))


@writes_nothing
def acos_backward(grad_output: Tensor, input: Tensor) -> Tensor:
    """The rule of `acos`: `-g / sqrt(1 - x^2)`, and 0 at -1 and 1 and beyond. It keeps the input."""
    return asin_backward(grad_output, input).neg()


@custom_backward(acos_backward)
def acos(input: Tensor) -> Tensor:
    """The arc cosine, with gradient 0 at -1 and 1 (torch: -inf) and beyond (torch: nan).

    >>> import torch
    >>> from gradoverride import safe
    >>> x = torch.tensor([0.0, 0.6, 1.0], requires_grad=True)
    >>> torch.autograd.grad(safe.acos(x).sum(), x)
    (tensor([-1.0000, -1.2500, -0.0000]),)
    """
    return torch.acos(_real("acos", input))


@writes_nothing
def _log1pexp_backward(grad_output: Tensor, x: Tensor) -> Tensor:
    ok = ~torch.isnan(x)
    return grad_output.where(ok, 0) * torch.sigmoid(x.where(ok, 0))


@custom_backward(_log1pexp_backward)
def log1pexp(x: Tensor) -> Tensor:
    """`log(1 + exp(x))`, without overflow: for large x it is x, with gradient 1. At a nan the gradient is 0.

    The value is that of `torch.nn.functional.softplus`, which however takes x for it from 20 on, and so is 1e-10 off in
    float64; here it is x where exp(x) has no room.

    >>> import torch
    >>> from gradoverride import safe
    >>> x = torch.tensor([-1000.0, 0.0, 1000.0], requires_grad=True)
    >>> y = safe.log1pexp(x)
    >>> torch.autograd.grad(y.sum(), x)
    (tensor([0.0000, 0.5000, 1.0000]),)
    >>> y.tolist()
    [0.0, 0.6931471824645996, 1000.0]
    """
    if not torch.is_floating_point(x):
        return torch.log1p(torch.exp(_real("log1pexp", x)))
    return F.softplus(x, threshold=math.log(torch.finfo(x.dtype).max))


# --- of two numbers ---


@writes_nothing
def _div_backward(grad_output: Tensor, dividend: Any, divisor: Any, needs: Any) -> tuple[Tensor | None, Tensor | None]:
    d = _expanded(divisor, grad_output)
    of_dividend = _summed(_over(grad_output, d), dividend) if needs["dividend"] else None
    if not needs["divisor"]:
        return of_dividend, None
    a = _expanded(dividend, grad_output)
    ok = torch.isfinite(a / d / d)
    a, d = a.where(ok, 0), d.where(ok, 1)
    return of_dividend, _summed(-grad_output.where(ok, 0) * (a / d / d), divisor)


@custom_backward(_div_backward)
def div(dividend: Tensor | float, divisor: Tensor | float) -> Tensor:
    """`dividend / divisor`, with gradient 0 where the divisor is 0 (torch: inf or nan). The value there is torch's.

    >>> import torch
    >>> from gradoverride import safe
    >>> x = torch.tensor([0.0, 2.0], requires_grad=True)
    >>> torch.autograd.grad(safe.div(1.0, x).sum(), x)
    (tensor([-0.0000, -0.2500]),)

    Tensors broadcast; either may be a number.
    """
    return _real("div", dividend) / _real("div", divisor)


@writes_nothing
def _xlogy_backward(grad_output: Tensor, x: Any, y: Any, needs: Any) -> tuple[Tensor | None, Tensor | None]:
    b = _expanded(y, grad_output)
    of_x = None
    if needs["x"]:
        ok = torch.isfinite(b.log())
        of_x = _summed(grad_output.where(ok, 0) * b.where(ok, 1).log(), x)
    if not needs["y"]:
        return of_x, None
    a = _expanded(x, grad_output)
    ok = torch.isfinite(a / b)
    return of_x, _summed(grad_output.where(ok, 0) * (a.where(ok, 0) / b.where(ok, 1)), y)


@custom_backward(_xlogy_backward)
def xlogy(x: Tensor | float, y: Tensor | float) -> Tensor:
    """`x * log(y)`, and 0 where x is 0; with gradients 0 where y is 0 (torch: -inf and inf, or nan).

    >>> import torch
    >>> from gradoverride import safe
    >>> p = torch.tensor([0.0, 1.0], requires_grad=True)
    >>> torch.autograd.grad(safe.xlogy(p, p).sum(), p)  # an entropy
    (tensor([0., 1.]),)

    Tensors broadcast; one of the two may be a number.
    """
    return torch.xlogy(_real("xlogy", x), _real("xlogy", y))


# --- of several numbers ---


@writes_nothing
def _norm_backward(grad_output: Tensor, input: Tensor, output: Tensor, dim: Dim, keepdim: bool) -> Tensor:
    if not keepdim:
        grad_output, output = _unreduced(grad_output, input, dim), _unreduced(output, input, dim)
    ok = (output > 0) & (output < math.inf)
    return grad_output.where(ok, 0) * (input.where(ok, 0) / output.where(ok, 1))


@custom_backward(_norm_backward)
def norm(input: Tensor, dim: Dim = None, keepdim: bool = False) -> Tensor:
    """The Euclidean norm over `dim` (all, if None), with gradient 0 where it is 0, inf or nan.

    >>> import torch
    >>> from gradoverride import safe
    >>> x = torch.tensor([[0.0, 0.0], [3.0, 4.0]], requires_grad=True)
    >>> torch.autograd.grad(safe.norm(x, dim=1).sum(), x)
    (tensor([[0.0000, 0.0000],
            [0.6000, 0.8000]]),)

    The value is that of `torch.linalg.vector_norm`, whose gradient is 0 at 0 too, but nan at inf, and whose second
    derivative is nan at 0. Norms of order 1 and inf have no singularity: take torch's.
    """
    return torch.linalg.vector_norm(_real("norm", input), dim=dim, keepdim=keepdim)


@writes_nothing
def _normalize_backward(grad_output: Tensor, input: Tensor, output: Tensor, dim: Any, eps: float) -> Tensor:
    length = norm(input, dim, True)
    ok = (length > 0) & (length < math.inf) & torch.isfinite(1 / length.clamp(min=eps))
    grad, unit, length = grad_output.where(ok, 0), output.where(ok, 0), length.where(ok, 1)
    along = (grad * unit).sum(dim, keepdim=True).where(length >= eps, 0)
    return (grad - unit * along) / length.clamp(min=eps)


@custom_backward(_normalize_backward)
def normalize(input: Tensor, *, dim: int | tuple[int, ...] = 1, eps: float = 1e-12) -> Tensor:
    """`x / |x|` over `dim`, and 0 at 0, with gradient 0 there, and where |x| is inf or nan.

    >>> import torch
    >>> from gradoverride import safe
    >>> x = torch.tensor([[0.0, 0.0], [3.0, 4.0]], requires_grad=True)
    >>> torch.autograd.grad(safe.normalize(x)[:, 0].sum(), x)
    (tensor([[ 0.0000,  0.0000],
            [ 0.1280, -0.0960]]),)

    The value is that of `torch.nn.functional.normalize`: x / eps where |x| is less than `eps`, and so is the gradient
    but for |x| = 0 itself. There torch's is g / eps, 1e12 g: finite, and of no use. `eps` must not be negative, else
    `RuleOptionError`.
    """
    check("normalize", "eps", eps, is_number(eps) and eps >= 0, "a number that is not negative")
    return F.normalize(_real("normalize", input), dim=dim, eps=eps)  # type: ignore[arg-type]  # several dim too


@writes_nothing
def _extremum_backward(
    grad_output: Tensor, input: Tensor, output: Tensor, dim: int | None, keepdim: bool, ties: Ties
) -> Tensor:
    if not keepdim:
        grad_output, output = _unreduced(grad_output, input, dim), _unreduced(output, input, dim)
    found = input == output
    if ties == "even":
        count = found.sum() if dim is None else found.sum(dim, keepdim=True)
        grad_output = grad_output / count.clamp(min=1)  # none equals a nan
    if ties == "first":
        found = found & _first(found, dim)
    return grad_output.where(found, 0)


@custom_backward(_extremum_backward)
def max(input: Tensor, dim: int | None = None, keepdim: bool = False, *, ties: Ties = "even") -> Tensor:
    """The largest value over `dim` (of all, if None), and a choice of whose gradient it is where several are equal.

    `ties`: each has an equal part ("even", as of `torch.amax`), the first has it ("first", as of `torch.max` with
    `dim`), or each has the whole ("all"). A nan has gradient 0.

    >>> import torch
    >>> from gradoverride import safe
    >>> x = torch.tensor([1.0, 3.0, 3.0], requires_grad=True)
    >>> torch.autograd.grad(safe.max(x), x)
    (tensor([0.0000, 0.5000, 0.5000]),)
    >>> torch.autograd.grad(safe.max(x, ties="first"), x)
    (tensor([0., 1., 0.]),)
    >>> torch.autograd.grad(safe.max(x, ties="all"), x)
    (tensor([0., 1., 1.]),)

    Any other `ties` or `dim` is a `RuleOptionError`.
    """
    _check_reduction("max", dim, ties)
    return torch.amax(_real("max", input), () if dim is None else dim, keepdim)


@custom_backward(_extremum_backward)
def min(input: Tensor, dim: int | None = None, keepdim: bool = False, *, ties: Ties = "even") -> Tensor:
    """The smallest value over `dim` (of all, if None), and a choice of whose gradient it is: see `max`.

    >>> import torch
    >>> from gradoverride import safe
    >>> x = torch.tensor([1.0, 1.0, 3.0], requires_grad=True)
    >>> torch.autograd.grad(safe.min(x), x)
    (tensor([0.5000, 0.5000, 0.0000]),)
    """
    _check_reduction("min", dim, ties)
    return torch.amin(_real("min", input), () if dim is None else dim, keepdim)


def _check_reduction(name: str, dim: Any, ties: Any) -> None:
    check(name, "dim", dim, dim is None or is_integer(dim), "an integer, or None for all")
    check(name, "ties", ties, ties in ("even", "first", "all"), "'even', 'first' or 'all'")


def _first(found: Tensor, dim: int | None) -> Tensor:
    """Where the first True is."""
    flat = found.flatten() if dim is None else found
    along = 0 if dim is None else dim
    index = flat.to(torch.uint8).argmax(along, keepdim=True)
    return torch.zeros_like(flat).scatter(along, index, True).view_as(found)


# --- a choice ---


def where(condition: Tensor, if_true: Any, if_false: Any, *inputs: Any) -> Tensor:
    """`if_true(*inputs)` where the condition holds, `if_false(*inputs)` elsewhere: each on its own elements alone.

    `torch.where(c, f(x), g(x))` evaluates both everywhere, and 0 * inf makes the gradient nan where the function that
    was *not* taken has a singularity. Here each is shown only inputs that it is taken for: elsewhere they are those of
    one element where it is. So neither value nor gradient of what is not taken appears anywhere, not even on the way,
    in second derivatives, or in those of other tensors that the function reaches.

    >>> import torch
    >>> from gradoverride import safe
    >>> x = torch.tensor([-1.0, 0.0, 4.0], requires_grad=True)
    >>> y = safe.where(x > 0, torch.log, 0.0, x)
    >>> torch.autograd.grad(y.sum(), x)
    (tensor([0.0000, 0.0000, 0.2500]),)
    >>> z = safe.where(x < 0, torch.exp, lambda v: 1 + v, x)

    The functions are elementwise: `inputs`, tensors that broadcast with the condition or anything else, are all that a
    result depends on. In place of a function there may be a number or a tensor; hand over the function rather than its
    result, whose gradient torch can then only lose. A function that is taken nowhere is shown `inputs` as they are, and
    its result is not used; the gradient of `inputs` is right then too, that of what else it reaches may be nan. At a
    singularity where it *is* taken, a function has its own gradient: give `safe.log` for a 0.

    Raises `RuleOptionError` for a condition that is no tensor of bool and for inputs without a function,
    `ForwardResultError` for a result of another shape.
    """
    kind = getattr(condition, "dtype", condition)
    check("where", "condition", kind, kind is torch.bool, "a tensor of bool")
    if inputs and not callable(if_true) and not callable(if_false):
        refuse("where", "if_true' or 'if_false", (if_true, if_false), "a function of the inputs that are given")
    shape = torch.broadcast_shapes(condition.shape, *[given.shape for given in inputs if isinstance(given, Tensor)])
    holds = condition.expand(shape)
    return torch.where(holds, _taken("if_true", if_true, holds, inputs), _taken("if_false", if_false, ~holds, inputs))


def _taken(name: str, function: Any, chosen: Tensor, inputs: tuple[Any, ...]) -> Any:
    """The function of these inputs where it is chosen, and of those of one such element at all others."""
    if not callable(function):
        return function
    if chosen.numel():
        index = chosen.flatten().to(torch.uint8).argmax().reshape(1)
        inputs = tuple([_where_chosen(chosen, index, given) for given in inputs])
    result = function(*inputs)
    if isinstance(result, Tensor) and result.shape != chosen.shape:
        fail(
            ForwardResultError,
            f"where: '{name}' must be elementwise, with a result of shape {shape_text(chosen.shape)}, that of the "
            f"condition and the inputs; its result has shape {shape_text(result.shape)}. Reduce the result of 'where'",
        )
    return result


def _where_chosen(chosen: Tensor, index: Tensor, given: Any) -> Any:
    if not isinstance(given, Tensor):
        return given
    given = given.expand(chosen.shape)
    example = given.detach().flatten().index_select(0, index).reshape(())
    return torch.where(chosen, given, example)


# --- helpers ---


def _over(grad: Tensor, divisor: Tensor) -> Tensor:
    """g / d, and 0 where 1 / d is not finite."""
    ok = torch.isfinite(divisor.reciprocal())
    return grad.where(ok, 0) / divisor.where(ok, 1)


def _real(name: str, value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_complex():
        fail(UnsupportedError, f"safe.{name}: the input must be real; got {value.dtype}. Use the function of torch")
    return value


def _expanded(value: Any, like: Tensor) -> Tensor:
    """A number or a tensor, in the shape that it has been broadcast to."""
    if not isinstance(value, Tensor):
        return torch.full((), value, dtype=like.dtype, device=like.device).expand(like.shape)
    floating = value if value.is_floating_point() else value.to(like.dtype)
    return floating.to(like.device).expand(like.shape)  # a single number may be on the CPU


def _summed(grad: Tensor, like: Tensor) -> Tensor:
    """The gradient of what has been broadcast."""
    return grad.sum_to_size(like.shape).to(like.device)


def _unreduced(reduced: Tensor, input: Tensor, dim: Dim) -> Tensor:
    """With a size of 1 for each dimension that was reduced."""
    if input.dim() == 0 or dim is None or dim == ():
        return reduced
    dims = (dim,) if isinstance(dim, int) else dim
    for place in sorted([place % input.dim() for place in dims]):
        reduced = reduced.unsqueeze(place)
    return reduced
