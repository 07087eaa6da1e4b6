"""Gradients of a solver's result by the implicit function theorem: of how it was found, nothing is needed.

Where `residual(y, a) = 0` defines y as a function of a, a gradient g of y becomes

    the vjp of the residual by a, at u    with u of    (d residual / d y)^T u = -g

The residual is a differentiable function of tensors; the solver may be anything: a loop with breaks, a library, code
of NumPy (`bridge`). Like a rule, the residual asks for what it needs by name: its first parameter is the result, each
other one an argument of the forward, a parameter of its module, or `params`. What it does not ask for (a first guess, a
tolerance) gets no gradient, and what it reads by a closure must want none.

Second and higher derivatives are those of the theorem again: u is itself the root of a residual.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.func import debug_unwrap

from gradoverride._core.binding.contract import shape_text
from gradoverride._core.binding.options import check, is_integer, printed
from gradoverride._core.binding.rule import Rule
from gradoverride._core.binding.signature import name_of, signature_asking
from gradoverride._core.private.dynamo import hidden_from_dynamo, in_transform
from gradoverride._core.private.transforms import in_forward_ad
from gradoverride._core.python.scan import location
from gradoverride._core.values.precision import wide
from gradoverride._core.values.structure import taken_apart, unflatten
from gradoverride.decorators import custom_backward
from gradoverride.errors import (
    CapturedTensorError,
    GradOverrideWarning,
    RuleResultError,
    RuleSignatureError,
    UnsupportedError,
)
from gradoverride.estimators.evaluation import batch_of, is_floating, leaves_of, real
from gradoverride.estimators.linear import DENSE_UP_TO, SOLVERS, solve

__all__ = ["implicit_root", "fixed_point"]

Tensors = Sequence[Tensor]
Residual = Callable[[Tensors, Tensors], list[Tensor]]  # of the result and of what it depends on

NOT_TRACED = "an implicit gradient looks at values (gradoverride.estimators)"


class _Implicit:
    """What both rules have in common. `zero` is what the residual is: the function itself, or less the result."""

    takes_tensors = True  # in a `bridge` too: the residual is one of tensors
    needs_floating = True  # a result of integers alone solves nothing
    writes_nothing = True
    not_traced = NOT_TRACED

    large: ClassVar[str] = "gmres"  # the solver, where there are many unknowns
    who: str
    solver: str | None
    batch_dims: int
    tol: float | None
    max_iter: int
    root_tol: float | None

    def _prepare(self, fn: Any, option: str, solvers: tuple[str, ...]) -> None:
        """Check the options, and read what the function asks for."""
        kind = type(self).__name__
        fits = callable(fn) and not isinstance(fn, type)
        check(kind, option, fn, fits, "a function of the result and of what it depends on")
        named = ", ".join(map(repr, solvers))
        check(kind, "solver", self.solver, self.solver in (None, *solvers), f"None, {named}")
        for name in ("tol", "root_tol"):
            value = getattr(self, name)
            fits = value is None or (isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0)
            check(kind, name, value, fits, "None or a number larger than 0")
        for name, least in (("batch_dims", 0), ("max_iter", 1)):
            value = getattr(self, name)
            check(kind, name, value, is_integer(value) and value >= least, f"an integer, {least} or larger")
        try:
            read = Rule(fn)
        except RuleSignatureError as error:
            raise RuleSignatureError(
                f"{kind}: '{option}' must take the result first, where a rule takes the gradient, and ask for the rest "
                f"by name: {error}"
            ) from None
        if "input" in read.asks and len(read.asks) > 1:
            raise RuleSignatureError(
                f"{kind}: {read.who} must ask for arguments by their own names, or for 'input' alone; it asks for "
                f"{', '.join(map(repr, read.asks))}"
            )
        own = self.__dict__  # it is frozen
        own["names"] = tuple(read.asks)
        own["who"] = f"{kind}: {name_of(fn)!r} ({location(fn)})"
        own["__signature__"] = signature_asking({"output": True, "needs": True, **read.asks})
        own["__name__"] = f"{kind}({name_of(fn)})"  # how errors call it

    def _zero(self, result: Any, values: dict[str, Any]) -> list[Tensor]:
        """What is zero at the result: its floating tensors."""
        raise NotImplementedError

    def __call__(self, grad_output: Any, /, output: Any, needs: Any, **values: Any) -> Any:
        """By name, the gradients of what the residual asks for."""
        return _untraced(self, grad_output, output, needs, values)

    def gradients(self, residual: Residual, result: list[Tensor], given: list[Tensor], g: list[Tensor]) -> Tensors:
        """The implicit function theorem."""
        if not given:
            return []
        batch_of(result, self.batch_dims, self.who)
        zero = self._look(residual, result, given)
        u = self._adjoint(residual, result, given, g)
        self._check_root(zero, u, g, result)
        pullback = torch.func.vjp(lambda *of: tuple(residual(result, of)), *given)[1]
        return list(pullback(tuple(u)))

    def _look(self, residual: Residual, result: Tensors, given: Tensors) -> list[Tensor]:
        """The residual at the result, if it is what it should be."""
        transformed = in_transform()
        constants = [[each if transformed else each.detach() for each in tensors] for tensors in (result, given)]
        with torch.enable_grad():
            zero = residual(*constants)
        shapes, expected = [tensor.shape for tensor in zero], [tensor.shape for tensor in result]
        if shapes != expected:
            raise RuleResultError(
                f"{self.who} must return the structure and shapes of the result, "
                f"{' and '.join(map(shape_text, expected))}; it returned "
                f"{' and '.join(map(shape_text, shapes)) or 'no floating tensor'}"
            )
        if not transformed and any([tensor.requires_grad for tensor in zero]):
            raise CapturedTensorError(
                f"{self.who} must get each tensor that wants a gradient by a parameter, under the name that the "
                "forward has for it; it reached one that requires grad by a closure, a global or 'module', and that "
                "gradient would be lost. Ask for it, or detach() it"
            )
        return zero

    def _adjoint(self, residual: Residual, result: list[Tensor], given: list[Tensor], g: list[Tensor]) -> list[Tensor]:
        """The u of (d residual / d y)^T u = -g."""

        def transposed(u: Any, g: Any, result: Any, given: Any) -> list[Tensor]:
            pullback = torch.func.vjp(lambda *found: tuple(residual(found, given)), *result)[1]
            return [each + one for each, one in zip(pullback(tuple(u)), g, strict=True)]

        def found(g: Any, result: Any, given: Any) -> list[Tensor]:
            return self._solve(residual, result, given, g)

        solver = self._solver_for(result)
        if solver == "dense" or not (torch.is_grad_enabled() or in_forward_ad()):
            return found(g, result, given)
        if in_forward_ad():
            raise UnsupportedError(
                f"{self.who} must be solved densely in forward mode (jvp, jacfwd, hessian), which would go on from one "
                f"linear equation to the next without end; the solver is '{solver}'. Use solver='dense' there"
            )
        # Iterations have no derivative; what they find is the root of an equation too.
        options = (solver, self.batch_dims, self.tol, self.max_iter)
        root: list[Tensor] = custom_backward(self._again(transposed, options))(found)(g, result, given)
        return root

    def _again(self, transposed: Callable[..., list[Tensor]], options: tuple[Any, ...]) -> _Implicit:
        """The rule for the solution of the linear equation."""
        raise NotImplementedError

    def _solver_for(self, result: Tensors) -> str:
        """The solver, by the number of unknowns if none was named."""
        unknowns = sum([real(tensor)[(0,) * self.batch_dims].numel() for tensor in result if tensor.numel()])
        return self.solver or ("dense" if unknowns <= DENSE_UP_TO else self.large)

    def _solve(self, residual: Residual, result: Tensors, given: Tensors, g: Tensors) -> list[Tensor]:
        """u, in the shapes of the result."""
        count = self.batch_dims
        pullback = torch.func.vjp(lambda *found: tuple(residual(found, given)), *result)[1]

        def apply(vector: Tensor) -> Tensor:
            return _vector(pullback(tuple(_apart(vector, result, count))), count)

        right = -_vector(g, count)
        tol = self.tol or _precision(result) ** (2 / 3)
        u = solve(self._solver_for(result), apply, right, tol, self.max_iter, self.who)
        return _apart(u, result, count)

    def _check_root(self, zero: Tensors, u: Tensors, g: Tensors, result: Tensors) -> None:
        """Warn if the result is no root: to first order, it is <u, residual> / |g| away, seen along the gradient."""
        zeros, steps, grads, found = [_vector(tensors, self.batch_dims) for tensors in (zero, u, g, result)]
        if zeros.numel() == 0:
            return
        off = (zeros * steps).sum(-1).abs() / grads.norm(dim=-1).clamp(min=torch.finfo(grads.dtype).tiny)
        off = debug_unwrap(off / found.abs().amax(-1).clamp(min=1)).detach()
        allowed = self.root_tol or _precision(result) ** (1 / 3)
        if not bool((off <= allowed).all()):  # a nan is not
            warnings.warn(
                f"{self.who} must be zero at the result of the forward, for its gradient to be that of the root; seen "
                f"along the gradient the root is {off.max().item():.1e} away, relative to the result (or to 1), and "
                f"{allowed:.1e} is allowed ('root_tol'). Let the solver go on",
                GradOverrideWarning,
                stacklevel=2,
            )

    def __repr__(self) -> str:
        fn, *options = [field.name for field in fields(self)]  # type: ignore[arg-type]  # each of both is a dataclass
        named = [f"{name}={getattr(self, name)!r}" for name in options]
        return f"{type(self).__name__}({', '.join([printed(getattr(self, fn)), *named])})"

    def __reduce__(self) -> Any:
        values = [getattr(self, field.name) for field in fields(self)]  # type: ignore[arg-type]  # as above
        return type(self), tuple(values)


def _gradients_of(
    rule: _Implicit, grad_output: Any, output: Any, needs: dict[str, bool], values: dict[str, Any]
) -> Any:
    """By name, the gradients of what the residual asks for; bare, if that is `input`."""
    shape, result = taken_apart(output, is_floating)
    wanted = {name: value for name, value in values.items() if _is_wanted(name, value, needs)}
    others = {name: value for name, value in values.items() if name not in wanted}
    spec, given = taken_apart(wanted, is_floating)

    def residual(found: Tensors, of: Tensors) -> list[Tensor]:
        changed = {**others, **unflatten(spec, iter(of))}
        return rule._zero(unflatten(shape, iter(found)), changed)

    gradients = rule.gradients(residual, result, given, leaves_of(grad_output))
    answer: dict[str, Any] = unflatten(spec, iter(gradients), constants=False)
    if "input" in answer:
        return answer["input"]
    for name, gradient in list(answer.items()):
        if name not in needs:  # `params`, or the `**kwargs` of the forward
            del answer[name]
            answer.update(gradient)
    return answer


def _is_wanted(name: str, value: Any, needs: dict[str, bool]) -> bool:
    if name in needs or not isinstance(value, dict):
        return needs.get(name, name == "input")
    return any([needs.get(inner) for inner in value])


_untraced = hidden_from_dynamo(_gradients_of, NOT_TRACED)


def _precision(tensors: Tensors) -> float:
    """That of the shortest dtype among them."""
    return max([torch.finfo(tensor.dtype).eps for tensor in tensors])


def _vector(tensors: Tensors, count: int) -> Tensor:
    """The real numbers of each sample, as one vector."""
    each = [real(wide(tensor)) for tensor in tensors]
    flat = [tensor.reshape(*tensor.shape[:count], math.prod(tensor.shape[count:])) for tensor in each]
    return torch.cat([tensor.to(flat[0].device) for tensor in flat], -1)


def _apart(vector: Tensor, like: Tensors, count: int) -> list[Tensor]:
    """A vector taken apart into tensors like these."""
    sizes = [math.prod(real(tensor).shape[count:]) for tensor in like]
    parts = []
    for part, tensor in zip(vector.split(sizes, -1), like, strict=True):
        shaped = part.reshape(real(tensor).shape).to(tensor.device)
        parts.append(torch.view_as_complex(shaped) if tensor.is_complex() else shaped.to(tensor.dtype))
    return parts


@dataclass(frozen=True, repr=False)
class implicit_root(_Implicit):
    """The gradient of a solver's result, at which `residual` is zero.

    >>> import torch, gradoverride as go
    >>> @go.custom_backward(go.estimators.implicit_root(lambda y, a: y * y - a, batch_dims=1))
    ... def root(a, steps=30):
    ...     y = torch.ones_like(a)
    ...     for _ in range(steps):
    ...         y = (y + a / y) / 2
    ...     return y
    >>> a = torch.tensor([4.0, 25.0], requires_grad=True)
    >>> root(a).sum().backward()
    >>> a.grad
    tensor([0.2500, 0.1000])

    `residual`: a differentiable function; its first parameter is the result, each other one asks by name for an
    argument of the forward, a parameter of its module, or `params`. It returns the structure and shapes of the result.

    `solver` of the linear equation: "dense" (LU by torch), "gmres", "bicgstab" or "cg" (by SciPy, the extra `solvers`,
    of products with the transposed derivative; "cg" for one that is symmetric and positive). None: dense up to 500
    unknowns, else "gmres". `tol`: its relative error, by default the precision of the dtype to the power of 2/3;
    `max_iter`: its iterations. SciPy's work on the CPU, all samples at once.

    `batch_dims`: so many leading dimensions of the result are independent samples, each an equation of its own.

    Cost: dense, one vjp of the residual for each unknown of a sample, all in one call of `vmap`; else one for each
    iteration. Two more, of each. No call of the forward. Bias: the error of the solver, and that of the root.

    Errors and warnings: `ConvergenceError` for an equation that is singular or not solved. A result that is no root is
    a `GradOverrideWarning`, if along the gradient it is more than `root_tol` off, relative to the result or to 1
    (default: the third root of the precision). What the residual reaches by a closure must not require grad:
    `CapturedTensorError`.

    Source: the implicit function theorem; for layers: Bai, Kolter, Koltun, "Deep equilibrium models" (2019); as a
    decorator: Blondel et al., "Efficient and modular implicit differentiation" (2022).
    """

    residual: Callable[..., Any]
    solver: str | None = None
    batch_dims: int = 0
    tol: float | None = None
    max_iter: int = 1000
    root_tol: float | None = None

    def __post_init__(self) -> None:
        self._prepare(self.residual, "residual", SOLVERS)

    def _zero(self, result: Any, values: dict[str, Any]) -> list[Tensor]:
        return leaves_of(self.residual(result, **values))

    def _again(self, transposed: Callable[..., list[Tensor]], options: tuple[Any, ...]) -> _Implicit:
        return implicit_root(transposed, *options)


@dataclass(frozen=True, repr=False)
class fixed_point(_Implicit):
    """The gradient of a fixed point, where `fn` gives the result back: of a deep equilibrium model, an iteration.

    >>> import torch, gradoverride as go
    >>> def layer(z, x, weight):
    ...     return torch.tanh(z @ weight + x)
    >>> @go.custom_backward(go.estimators.fixed_point(layer, batch_dims=1))
    ... def equilibrium(x, weight):
    ...     z = torch.zeros_like(x)
    ...     for _ in range(100):
    ...         z = layer(z, x, weight)
    ...     return z
    >>> x, weight = torch.ones(1, 2), torch.full((2, 2), 0.2, requires_grad=True)
    >>> equilibrium(x, weight).sum().backward()
    >>> weight.grad
    tensor([[0.2280, 0.2280],
            [0.2280, 0.2280]])

    All is as for `implicit_root`, with the residual `fn(y, ...) - y`. `solver` may be "neumann" besides: the gradient
    is iterated as the result was, `u = J^T u + g`, which converges where `fn` contracts. None: dense up to 500 unknowns
    of a sample, else "neumann", which needs torch alone and stays on its device.

    Source: as of `implicit_root`.
    """

    fn: Callable[..., Any]
    solver: str | None = None
    batch_dims: int = 0
    tol: float | None = None
    max_iter: int = 1000
    root_tol: float | None = None

    large: ClassVar[str] = "neumann"

    def __post_init__(self) -> None:
        self._prepare(self.fn, "fn", (*SOLVERS, "neumann"))

    def _zero(self, result: Any, values: dict[str, Any]) -> list[Tensor]:
        following, now = leaves_of(self.fn(result, **values)), leaves_of(result)
        if [each.shape for each in following] != [each.shape for each in now]:
            return following  # whose shapes are refused
        return [one - other for one, other in zip(following, now, strict=True)]

    def _again(self, transposed: Callable[..., list[Tensor]], options: tuple[Any, ...]) -> _Implicit:
        def following(u: Any, g: Any, result: Any, given: Any) -> list[Tensor]:
            return [each + zero for each, zero in zip(u, transposed(u, g, result, given), strict=True)]

        return fixed_point(following, *options)
