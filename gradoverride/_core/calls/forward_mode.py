"""Forward mode from a rule: it is linear in the gradient, so its transpose is the JVP.

If a rule maps grad_output to J^H grad_output, differentiating <rule(g), v> with respect to g gives J v, at any g but
zero, where a linear rule may branch. A rule that is not linear (a clip, a normalisation) has no transpose, and is
refused; so is one whose derivative autograd does not know (it detaches). That is seen by values. What is traced checks
it when it runs: the check is a part of the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NoReturn

import torch
from torch import Tensor
from torch.func import debug_unwrap
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, get_proxy_mode

from gradoverride._core.autograd.ambient import Autocast
from gradoverride._core.binding.contract import Meta
from gradoverride._core.private.dynamo import fail
from gradoverride._core.private.modes import has_no_values, require_in_graph
from gradoverride._core.private.tensors import hooks_on_saved
from gradoverride._core.private.transforms import in_batched_autograd
from gradoverride._core.values.precision import wide
from gradoverride.errors import UnsupportedError

__all__ = ["transpose"]

Gradients = Callable[..., list[Tensor | None]]
Answer = list[Tensor | None]

_TF32 = (torch.float32, torch.complex64)


def transpose(gradients: Gradients, metas: Sequence[Meta], tangents: Sequence[Tensor | None], who: str) -> list[Tensor]:
    """The tangents of the results, for `tangents` of the inputs whose gradients `gradients(*grad_outputs)` gives."""
    if hooks_on_saved() is not None:  # torch.func would fail, and name what the user did not call
        fail(
            UnsupportedError,
            f"{who} must not be called in forward mode (jvp, jacfwd, hessian) in a checkpoint, or under other hooks on "
            "saved tensors: it is transposed by torch.func, which takes none. Call it outside of them there",
        )
    first, second = ([_probe(meta, seed) for meta in metas] for seed in (1, 2))
    answers = gradients(*first), gradients(*second)
    roundings = _Roundings([*first, *answers[0], *tangents])
    _check_linear(gradients, (first, second), answers, roundings, who)
    answered = [
        index
        for index, (grad, tangent) in enumerate(zip(answers[0], tangents, strict=True))
        if grad is not None and tangent is not None
    ]
    if not answered:
        return [torch.zeros_like(probe) for probe in first]

    def wanted(*grads: Tensor) -> tuple[Tensor, ...]:
        found = gradients(*grads)
        return tuple(found[index] for index in answered)  # type: ignore[misc]  # None has just been sorted out

    _, pullback, *_ = torch.func.vjp(wanted, *first)

    def pulled(values: Sequence[Tensor | None]) -> list[Tensor]:
        return list(pullback(tuple(values[index] for index in answered)))

    results = pulled(tangents)
    signs = [None if grad is None or index not in answered else grad.sgn() for index, grad in enumerate(answers[0])]
    if not in_batched_autograd():  # which lets nobody look at its tangents
        _check_derivative(answers[0], tangents, first, results, roundings, who)
        _check_derivative(answers[1], tangents, second, results, roundings, who)
    _check_derivative(answers[0], signs, first, pulled(signs), roundings, who)  # a sum in which nothing cancels
    return results


class _Roundings:
    """What roundings may come to where these tensors are computed with, and which sizes of them are numbers."""

    def __init__(self, tensors: Sequence[Tensor | None]) -> None:
        dtypes = {tensor.dtype for tensor in tensors if tensor is not None}
        infos = [torch.finfo(dtype) for dtype in (*dtypes, *(dtype for _, dtype in Autocast().states))]
        self.eps = max(info.eps for info in infos)
        # What computes in float64 may do so in float32 somewhere within.
        self.relative = max(self.eps, torch.finfo(torch.float32).eps) ** 0.5
        if any(tensor is not None and tensor.is_cuda and tensor.dtype in _TF32 for tensor in tensors):
            self.relative = max(self.relative, 2.0**-9)  # convolutions round what they multiply to 11 bits
        self.absolute = 32 * max(info.smallest_normal * info.eps for info in infos)  # of the smallest numbers
        # Powers of two, by which a linear rule multiplies its answer to the last bit. Squares of the outermost are
        # still numbers of float32 and bfloat16; float16 has a range of its own.
        self.scales = (2.0**-60, -(2.0**-20), -(2.0**-7), 2.0**13, 2.0**20, -(2.0**60))
        if min(info.max for info in infos) < 1e10:
            self.scales = (2.0**-10, -(2.0**-6), -(2.0**-3), 2.0**4, 2.0**8, -(2.0**12))


def _check_linear(
    gradients: Gradients,
    probes: tuple[list[Tensor], list[Tensor]],
    answers: tuple[Answer, Answer],
    roundings: _Roundings,
    who: str,
) -> None:
    """Additivity, and multiples of many sizes: a clip shows at large ones, a threshold at small ones."""
    together = gradients(*[a + b for a, b in zip(*probes, strict=True)])
    noise = 16 * roundings.eps  # of the probes, which may be all that is left of them: their multiples have it too
    for first, second, both in zip(*answers, together, strict=True):
        _check_sum([first, second], both, 1.0, roundings, who, noise)
    for scale in roundings.scales:
        multiples = gradients(*[probe * scale for probe in probes[0]])
        for first, multiple in zip(answers[0], multiples, strict=True):
            _check_sum([first], multiple, scale, roundings, who)


@torch.no_grad()
def _check_sum(
    parts: Sequence[Tensor | None],
    found: Tensor | None,
    scale: float,
    roundings: _Roundings,
    who: str,
    noise: float = 0.0,
) -> None:
    """Whether `found` is the sum of the parts, times `scale`. None counts as zero."""
    some = next((part for part in (found, *parts) if part is not None), None)
    if some is None or not some.numel():
        return
    terms = [wide(torch.zeros_like(some) if part is None else part) for part in (found, *parts)]
    got, expected = terms[0] / scale, sum(terms[2:], terms[1])
    finite = torch.isfinite(got) & torch.isfinite(expected)  # where it is too large, nothing can be said
    size = torch.stack([term.abs().where(finite, 0.0).amax() for term in (expected, *terms[1:])]).amax()
    tolerance = roundings.relative * size + roundings.absolute / abs(scale) + noise
    _require(
        ((got - expected).abs() <= tolerance) | ~finite,
        f"{who} must be linear in the gradient for forward mode (jvp, jacfwd, hessian), which is its transpose; it is "
        "not. Use reverse mode, or a rule that is linear",
        who,
    )


@torch.no_grad()
def _check_derivative(
    answer: Answer,
    tangents: Sequence[Tensor | None],
    probes: list[Tensor],
    results: list[Tensor],
    roundings: _Roundings,
    who: str,
) -> None:
    """Whether <rule(g), tangents> is <g, results>: if not, the derivative of the rule is not what the rule does."""
    device = probes[0].device
    left = [_terms(*pair, device) for pair in zip(answer, tangents, strict=True)]
    right = [_terms(*pair, device) for pair in zip(probes, results, strict=True)]
    gap = torch.stack([terms.sum() for terms in left]).sum() - torch.stack([terms.sum() for terms in right]).sum()
    size = torch.stack([terms.abs().sum() for terms in (*left, *right)]).sum()
    sizes = [wide(each).abs().amax().to(device) for each in tangents if each is not None and each.numel()]
    noise = 16 * roundings.eps * torch.stack(sizes).amax() if sizes else 0.0
    absolute = (roundings.absolute + noise) * sum(terms.numel() for terms in (*left, *right))
    _require(
        ~(gap.abs() > 2 * roundings.relative * size + absolute),  # of what is not finite nothing can be said
        f"{who} must compute with the gradient what autograd differentiates for forward mode (jvp, jacfwd, hessian), "
        "which is its transpose; its derivative is not what it does, as where it detaches the gradient. Use reverse "
        "mode, or a rule that is differentiable",
        who,
    )


def _terms(a: Tensor | None, b: Tensor | None, device: torch.device) -> Tensor:
    """The terms of a real inner product."""
    if a is None or b is None:
        return torch.zeros((), device=device)
    product = wide(a).conj() * wide(b)
    return (product.real if product.is_complex() else product).to(device)


def _require(holds: Tensor, text: str, who: str) -> None:
    """Raise this error if it does not hold everywhere, and have a graph that is traced raise it when it runs."""
    plain = debug_unwrap(holds).all()  # under all transforms: vmap forbids to look at values
    traced = has_no_values([plain])
    if not traced:
        try:
            with disable_proxy_modes_tracing():
                held = bool(plain)
        except RuntimeError:  # torch's older vmap
            _refuse_unseen(who)
        if not held:
            fail(UnsupportedError, text)
        traced = get_proxy_mode() is not None
    if traced:
        if require_in_graph is None:
            _refuse_unseen(who)
        require_in_graph(plain, text)


def _refuse_unseen(who: str) -> NoReturn:
    fail(
        UnsupportedError,
        f"{who} must be linear in the gradient for forward mode, and that cannot be looked at where it is traced, or "
        "computed for a batch at once by torch.autograd.functional. Use reverse mode there",
    )


def _probe(meta: Meta, seed: int) -> Tensor:
    """Numbers between -1 and 1 without a pattern, none of them zero, the sums of two of which are exact."""
    # Not drawn at random: the generator is the user's, and vmap refuses random numbers.
    count, units = meta.shape.numel(), 1 / torch.finfo(meta.dtype).eps
    parts = []
    for part in range(2 if meta.dtype.is_complex else 1):
        steps = torch.arange(1, count + 1, dtype=torch.float64, device=meta.device)
        wave = torch.sin(steps * 12.9898 * seed + part) * 43758.5453
        whole = torch.floor((wave - torch.floor(wave)) * 2 * units) - units
        parts.append(torch.where(whole == 0, units, whole) / units)
    numbers = torch.complex(*parts) if len(parts) == 2 else parts[0]
    return numbers.reshape(meta.shape).to(meta.dtype)
