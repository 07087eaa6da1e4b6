"""Forward mode from a rule: it is linear in the gradient, so its transpose is the JVP.

If a rule maps grad_output to J^H grad_output, differentiating <rule(g), v> with respect to g gives J v, at any g. A
rule that is not linear (a clip, a normalisation) has no transpose, and is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NoReturn

import torch
from torch import Tensor
from torch.func import debug_unwrap
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from gradoverride._core.contract import Meta
from gradoverride._core.private import fail
from gradoverride.errors import UnsupportedError

__all__ = ["transpose"]

Gradients = Callable[..., list[Tensor | None]]


def transpose(gradients: Gradients, metas: Sequence[Meta], tangents: Sequence[Tensor | None], who: str) -> list[Tensor]:
    """The tangents of the results, for `tangents` of the inputs whose gradients `gradients(*grad_outputs)` gives."""
    _check_linear(gradients, metas, who)
    zeros = [torch.zeros(meta.shape, dtype=meta.dtype, device=meta.device) for meta in metas]
    answered: list[int] = []

    def wanted(*grads: Tensor) -> tuple[Tensor, ...]:
        found = gradients(*grads)
        answered[:] = [
            index
            for index, (grad, tangent) in enumerate(zip(found, tangents, strict=True))
            if grad is not None and tangent is not None
        ]
        return tuple(found[index] for index in answered)  # type: ignore[misc]  # None has just been sorted out

    _, pullback, *_ = torch.func.vjp(wanted, *zeros)
    if not answered:
        return zeros
    return list(pullback(tuple(tangents[index] for index in answered)))


def _check_linear(gradients: Gradients, metas: Sequence[Meta], who: str) -> None:
    """Additivity at gradients of several sizes: a clip shows at large ones, a threshold at small ones."""
    if get_proxy_mode() is not None:
        _refuse_traced(who)
    for scale in (1e-2, 1.0, 1e4):
        first = [_probe(meta, 1.0, scale) for meta in metas]
        second = [_probe(meta, 2.0, -0.7 * scale) for meta in metas]
        together = gradients(*[a + b for a, b in zip(first, second, strict=True)])
        for a, b, both in zip(gradients(*first), gradients(*second), together, strict=True):
            if a is not None and b is not None and both is not None and not _is_close(a + b, both, who):
                fail(
                    UnsupportedError,
                    f"{who} must be linear in the gradient for forward mode (jvp, jacfwd, hessian), which is its "
                    "transpose; it is not. Use reverse mode, or a rule that is linear",
                )


def _is_close(expected: Tensor, found: Tensor, who: str) -> bool:
    try:
        return _close(expected, found)
    except RuntimeError:  # there are no values to compare
        _refuse_traced(who)


def _refuse_traced(who: str) -> NoReturn:
    fail(
        UnsupportedError,
        f"{who} must be linear in the gradient for forward mode, and that cannot be looked at where it is traced, as "
        "torch.func.linearize does. Use reverse mode there",
    )


def _probe(meta: Meta, seed: float, scale: float) -> Tensor:
    # Not drawn at random: the generator is the user's, and vmap refuses random numbers.
    count = 1
    for size in meta.shape:
        count *= size
    wave = torch.sin(torch.arange(1, count + 1, dtype=torch.float64, device=meta.device) * 12.9898 * seed) * scale
    return wave.reshape(meta.shape).to(meta.dtype)


def _close(expected: Tensor, found: Tensor) -> bool:
    # The plain tensors under all transforms: vmap forbids to look at values.
    expected, found = debug_unwrap(expected).detach(), debug_unwrap(found).detach()
    if not bool(torch.isfinite(expected).all()):
        return True
    size = float(expected.abs().max()) if expected.numel() else 0.0
    tolerance = torch.finfo(expected.dtype).eps ** 0.5 * max(size, torch.finfo(expected.dtype).tiny)
    return bool(((expected - found).abs() <= tolerance).all())
