"""Vector quantization: the nearest vector of a codebook, with a gradient for what it stands for.

- `vector_quantize` is straight-through, or with the rotation trick;
- `rotation_trick` is a rule, for a quantizer of vectors of your own.

>>> import torch, torch.nn.functional as F
>>> from gradoverride.rules import vector_quantize
>>> codebook = torch.nn.Parameter(torch.tensor([[0.0, 1.0], [2.0, 0.0]]))
>>> x = torch.tensor([[1.5, 0.5]], requires_grad=True)
>>> codes, indices = vector_quantize(x, codebook)
>>> codes, indices
(tensor([[2., 0.]], grad_fn=<_codeBackward>), tensor([1]))
>>> commitment = F.mse_loss(x, codebook[indices].detach())  # the two other losses of a VQ-VAE
>>> nearness = F.mse_loss(codebook[indices], x.detach())
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gradoverride._core.binding.contract import what
from gradoverride._core.binding.options import check_flag, check_floating
from gradoverride._core.binding.rule import writes_nothing
from gradoverride._core.private.dynamo import fail
from gradoverride._core.values.precision import wide
from gradoverride.decorators import custom_backward, straight_through
from gradoverride.errors import RuleOptionError
from gradoverride.rules.each import check_one_for_each

__all__ = ["vector_quantize", "rotation_trick"]


def vector_quantize(x: Tensor, codebook: Tensor, *, rotate: bool = False) -> tuple[Tensor, Tensor]:
    """For each vector of x the nearest of the codebook, and its index. The gradient goes to x.

    Vectors lie along the last dimension of x (of a picture, `x.movedim(1, -1)`); the codebook has the shape
    (vectors, size). The values are rows of the codebook to the last bit; the first of two that are equally near is
    taken. (Distances are those of `torch.cdist`, in float32 at least: where all vectors are much farther from 0 than
    from each other, take their mean off first.) The gradient is g or, if `rotate`, that of the `rotation_trick`.

    >>> import torch
    >>> from gradoverride.rules import vector_quantize
    >>> x = torch.tensor([3.0, 0.0], requires_grad=True)
    >>> codes, index = vector_quantize(x, torch.tensor([[0.0, 6.0], [6.0, 0.1]]), rotate=True)
    >>> index
    tensor(1)

    The codebook gets no gradient from here: it learns by a loss of its own, as above, or as a running mean.

    Source: van den Oord, Vinyals, Kavukcuoglu, "Neural discrete representation learning" (2017), equation 2.
    """
    _check(x, codebook, rotate)
    vectors, codes = wide(x.detach()), wide(codebook.detach())
    # A matrix product of one's own would have the few digits of autocast.
    index = torch.cdist(vectors.reshape(-1, x.shape[-1]), codes).argmin(-1).reshape(x.shape[:-1])
    return (_code_by_rotation if rotate else _code)(x, codebook, index), index


@writes_nothing
def rotation_trick(grad_output: Tensor, input: Tensor, output: Tensor) -> Tensor:
    """`|y| / |x| R^T g`, where R is the rotation that takes the direction of the vector x to that of y, its code.

    So the angle between the gradient and the code is kept as that between what reaches x and x. With `e = x / |x|`,
    `q = y / |y|` and `r = (e + q) / |e + q|`, it is `R = I - 2 r r^T + 2 q e^T`; it counts as a constant.

    >>> import torch, gradoverride as go
    >>> from gradoverride.rules import rotation_trick
    >>> codebook = torch.tensor([[0.0, 4.0], [-9.0, 0.0]])
    >>> nearest = go.custom_backward(rotation_trick)(lambda x: codebook[torch.cdist(x, codebook).argmin(-1)])
    >>> x = torch.tensor([[2.0, 0.0]], requires_grad=True)
    >>> torch.autograd.grad(nearest(x), x, torch.tensor([[0.0, 1.0]]))  # along the code: so along x
    (tensor([[2., 0.]]),)

    Vectors lie along the last dimension. Where x is 0 there is no rotation: the gradient passes as it comes. Where y is
    opposite to x there are many: the gradient is reflected then.

    Source: Fifty et al., "Restructuring vector quantization with the rotation trick" (2024), section 4.
    """
    check_one_for_each("rotation_trick", grad_output, input)
    grad, x, y = wide(grad_output), wide(input), wide(output)
    size, size_of_code = _norm(x), _norm(y)
    e = x / size.masked_fill(size == 0, 1)
    q = y / size_of_code.masked_fill(size_of_code == 0, 1)
    r = e + q
    reflected = r * (_dot(r, grad) / _dot(r, r).clamp(min=1e-12))  # 0 where they are opposite
    turned = grad + 2 * (e * _dot(q, grad) - reflected)
    return torch.where(size == 0, grad, turned * (size_of_code / size.masked_fill(size == 0, 1))).to(grad_output.dtype)


# --- what is decorated ---


@straight_through
def _code(x: Tensor, codebook: Tensor, index: Tensor) -> Tensor:
    return F.embedding(index, codebook)  # `codebook[index]` is refused under vmap, for a single vector


@writes_nothing
def _rotation_backward(grad_output: Tensor, x: Tensor, output: Tensor) -> dict[str, Tensor]:
    return {"x": rotation_trick(grad_output, x, output)}


@custom_backward(_rotation_backward)
def _code_by_rotation(x: Tensor, codebook: Tensor, index: Tensor) -> Tensor:
    return F.embedding(index, codebook)  # `codebook[index]` is refused under vmap, for a single vector


def _norm(vectors: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    return norm


def _dot(one: Tensor, two: Tensor) -> Tensor:
    return (one * two).sum(-1, keepdim=True)


# --- options ---


def _check(x: Any, codebook: Any, rotate: Any) -> None:
    check_flag("vector_quantize", "rotate", rotate)
    check_floating("vector_quantize", "x", x)
    fits = isinstance(codebook, Tensor) and codebook.dim() == 2 and len(codebook) > 0
    if not fits or x.dim() == 0 or x.shape[-1] != codebook.shape[-1]:
        required = f"a tensor of shape (vectors, size), with the size of the last dimension of x, {what(x)}"
        fail(RuleOptionError, f"vector_quantize: 'codebook' must be {required}; got {what(codebook)}")
    check_floating("vector_quantize", "codebook", codebook)
