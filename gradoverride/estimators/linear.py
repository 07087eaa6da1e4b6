"""Linear equations `apply(u) = right`, with `apply` a function: what lies under the gradient of an implicit result.

`right` has the shape (samples ..., n), and `apply` works on each sample by itself. Dense equations go to LAPACK by way
of torch, large ones to SciPy's Krylov solvers, contractions are iterated. What does not converge is a
`ConvergenceError`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import debug_unwrap

from gradoverride._core.private.transforms import in_functorch
from gradoverride.errors import ConvergenceError, MissingExtraError, UnsupportedError

__all__ = ["DENSE_UP_TO", "SOLVERS", "solve"]

SOLVERS = ("dense", "gmres", "bicgstab", "cg")
DENSE_UP_TO = 500  # unknowns of a sample

Apply = Callable[[Tensor], Tensor]


def solve(solver: str, apply: Apply, right: Tensor, tol: float, max_iter: int, who: str) -> Tensor:
    """The `u` for which `apply(u)` is `right`."""
    if right.numel() == 0:
        return right
    if solver == "dense":
        found = _dense(apply, right, who)
    elif solver == "neumann":
        found = _neumann(apply, right, tol, max_iter, who)
    else:
        found = _krylov(solver, apply, right, tol, max_iter, who)
    if not bool(debug_unwrap(found).isfinite().all()):
        raise ConvergenceError(
            f"{who} must solve a linear equation for the gradient; its solution is not finite. Look at the result and "
            "at the derivatives of the residual there"
        )
    return found


def _dense(apply: Apply, right: Tensor, who: str) -> Tensor:
    n = right.shape[-1]
    units = torch.eye(n, dtype=right.dtype, device=right.device).reshape(n, *[1] * (right.dim() - 1), n)
    columns = torch.func.vmap(apply)(units.expand(n, *right.shape).contiguous())
    found, info = torch.linalg.solve_ex(columns.movedim(0, -1), right.unsqueeze(-1))
    if bool(debug_unwrap(info).any()):
        raise ConvergenceError(
            f"{who} must have an equation with one solution near its result; its derivative by the result is singular "
            "there, so the gradient is not defined. Give an equation that determines the result, or keep away from "
            "where two solutions meet"
        )
    return found.squeeze(-1)


def _neumann(apply: Apply, right: Tensor, tol: float, max_iter: int, who: str) -> Tensor:
    """For `apply` of J - 1 with a contraction J: each step adds what is missing."""
    found = -right
    size = right.norm(dim=-1)
    for _ in range(max_iter):
        rest = apply(found) - right
        found = found + rest
        missing = debug_unwrap(rest.norm(dim=-1) / size.clamp(min=torch.finfo(size.dtype).tiny))
        if bool((missing <= tol).all()):
            return found
        if not bool(missing.isfinite().all()):
            break
    raise ConvergenceError(
        f"{who} must contract near its result, for the gradient to be iterated; the last of {max_iter} steps at most "
        f"was {missing.max().item():.1e} of the gradient, and {tol:.1e} is allowed. Use solver='dense' or 'gmres', or "
        "raise 'max_iter'"
    )


def _krylov(solver: str, apply: Apply, right: Tensor, tol: float, max_iter: int, who: str) -> Tensor:
    if in_functorch():
        raise UnsupportedError(
            f"{who} must be solved by torch alone under vmap and other transforms of torch.func; '{solver}' is of "
            "SciPy. Use solver='dense'"
        )
    try:
        scipy: Any = importlib.import_module("scipy.sparse.linalg")
    except ImportError as error:
        raise MissingExtraError(
            f"{who} with solver='{solver}' needs SciPy: pip install \"gradoverride[solvers]\". Or use solver='dense'"
        ) from error

    def matvec(vector: Any) -> Any:
        return apply(torch.from_numpy(vector.copy()).reshape(right.shape).to(right)).reshape(-1).cpu().numpy()

    # Each sample relative to its own size: one of a small gradient would not be solved at all beside a large one.
    size = torch.linalg.vector_norm(right, dim=-1, keepdim=True)
    size = size.masked_fill(size == 0, 1)
    flat = (right / size).reshape(-1).cpu().numpy()
    operator = scipy.LinearOperator((flat.size, flat.size), matvec=matvec, dtype=flat.dtype)
    steps = {"restart": min(50, flat.size)} if solver == "gmres" else {}
    found, info = getattr(scipy, solver)(operator, flat, rtol=tol, atol=0.0, maxiter=max_iter, **steps)
    if info != 0:
        missing = float(((matvec(found) - flat) ** 2).sum() ** 0.5 / (flat**2).sum() ** 0.5)
        raise ConvergenceError(
            f"{who} must solve a linear equation for the gradient; '{solver}' was {missing:.1e} of the gradient off "
            f"after {max_iter} iterations, and {tol:.1e} is allowed. Use solver='dense' or another, or raise 'max_iter'"
        )
    return torch.from_numpy(found).to(right).reshape(right.shape) * size
