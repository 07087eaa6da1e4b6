"""Attention-aware relevance (AttnLRP): a transformer made so linear that its relevance is the gradient times the input.

Achtibat et al., "AttnLRP: attention-aware layer-wise relevance propagation for transformers" (2024). What flows under
these rules is not the relevance R of a value, but R divided by the value: start it with 1 at the result, and multiply
the gradient with the input. All that is linear (dense layers, convolutions, sums, rotary embeddings, scalings) then
needs no rule, for its gradient is LRP-epsilon with an epsilon of 0. For the rest:

- Activations, powers, and what is divided by a root mean square: R passes as it is. `attn_identity`, `attn_power`.
- A product of two results: half of R for each. `attn_product`, `attn_sum_of_products`, `attn_bilinear`; `attn_glu`, of
  which one factor is an activation; and `attn_attention`, which is two products with a softmax between.
- What something is divided by is a constant. `attn_layer_norm`, `attn_group_norm`, `attn_instance_norm`,
  `attn_quotient`.
- Softmax s of x: `x (R - s sum(R))`, proposition 3.1. That is its gradient times x, so it has no rule. R is not
  conserved there.

`go.presets.attn_lrp` puts them together:

>>> import torch, gradoverride as go
>>> model = torch.nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).requires_grad_(False)
>>> x = torch.randn(1, 5, 8, requires_grad=True)
>>> with go.override(model, go.presets.attn_lrp):
...     y = model(x)[0, 0, 0]
>>> relevance = x * torch.autograd.grad(y, x)[0]

They are not for the same model as the rules named `lrp_`, under which R itself flows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gradoverride._core.private.dynamo import fail
from gradoverride._core.values.precision import wide
from gradoverride.errors import UnsupportedError

__all__ = [
    "attn_attention",
    "attn_bilinear",
    "attn_glu",
    "attn_group_norm",
    "attn_identity",
    "attn_instance_norm",
    "attn_layer_norm",
    "attn_power",
    "attn_product",
    "attn_quotient",
    "attn_sum_of_products",
]

_VARIADIC = "args"  # what builtins of torch, which have no signature, call all their positional arguments


def attn_identity(grad_output: Tensor, input: Tensor, output: Any, needs: Any, params: Any) -> dict[str, Any]:
    """Of what has one input for each result, the quotient of the two: `g y / x`, and 0 where x is 0.

    For activations, and for modules that divide by a root mean square (RMSNorm), with a weight or without.

    >>> import torch, gradoverride as go
    >>> from gradoverride.rules import attn_identity
    >>> x = torch.tensor([2.0, -1.0], requires_grad=True)
    >>> y = go.custom_backward(attn_identity)(torch.tanh)(x)
    >>> torch.equal(x * torch.autograd.grad(y.sum(), x)[0], y)
    True

    Source: Achtibat et al. (2024), equation 9.
    """
    if not isinstance(output, Tensor) or output.shape != input.shape:
        fail(UnsupportedError, "attn_identity is for what has one result for each input; it is in force on another")
    return {_wanted(needs)[0]: _passed_on(grad_output, input, output), **dict.fromkeys(params)}


def attn_power(grad_output: Tensor, input: Tensor, exponent: Any, output: Tensor, needs: Any) -> dict[str, Any]:
    """Of a power, as `attn_identity`: `g y / x`, and 0 where x or the exponent is 0.

    For `torch.pow`, `x**2`. A negative exponent is refused, for it divides by x, and an exponent that wants a gradient.

    >>> import torch, gradoverride as go
    >>> from gradoverride.rules import attn_power
    >>> x = torch.tensor([2.0, -1.0], requires_grad=True)
    >>> power = go.custom_backward(attn_power)(lambda input, exponent: input**exponent)
    >>> torch.autograd.grad(power(x, 2).sum(), x)
    (tensor([ 2., -1.]),)

    Source: Achtibat et al. (2024), equation 9.
    """
    if needs["exponent"]:
        fail(UnsupportedError, "attn_power: the exponent must be a constant; it is a result, which wants relevance")
    if bool((exponent < 0).any()) if isinstance(exponent, Tensor) else exponent < 0:
        fail(
            UnsupportedError,
            "attn_power: the exponent must not be negative, for what something is divided by is a constant; it is "
            "negative. If it is in a normalisation by a root mean square that is written out by hand, give its class a "
            "rule: {TheClass: rules.attn_identity}",
        )
    if output.shape != input.shape:
        fail(UnsupportedError, "attn_power is for what has one result for each input; the exponent has another shape")
    return {"input": _passed_on(grad_output, input, output) * (exponent != 0)}


# --- products ---


def attn_product(grad_output: Tensor, needs: Any, vjp: Any) -> Any:
    """Of a product of several results, the gradient divided by their number n: `vjp(g / n)`.

    For `torch.mul`, `torch.matmul`, `torch.bmm`, `torch.einsum`. What wants no gradient is a constant, and does not
    count: of one result and constants the gradient is as it was. A parameter that wants one counts, and would take half
    of the relevance: `model.requires_grad_(False)` first. (Those of dense layers and norms are in no such product.)
    A list of factors, as for `torch.linalg.multi_dot`, is refused: which of them are constants is not known.

    >>> import torch, gradoverride as go
    >>> from gradoverride.rules import attn_product
    >>> a, b = torch.tensor([2.0], requires_grad=True), torch.tensor([3.0], requires_grad=True)
    >>> product = go.custom_backward(attn_product)(torch.mul)
    >>> torch.autograd.grad(product(a, b), (a, b))
    (tensor([1.5000]), tensor([1.]))
    >>> torch.autograd.grad(product(a, torch.tensor([3.0])), a)
    (tensor([3.]),)

    Source: Achtibat et al. (2024), propositions 3.2 and 3.3.
    """
    found = vjp.by_name(grad_output / max(1, len(_wanted(needs))))
    if any(_has_a_list(name, part, needs) for name, part in found.items()):
        fail(
            UnsupportedError,
            "attn_product: each factor must be an argument of its own, for it to be known which of them are constants; "
            "a list of factors is given, as to torch.linalg.multi_dot or torch.einsum('ij,jk', [a, b]). Write the "
            "product out with '@', or give torch.einsum the factors one by one",
        )
    return found


def attn_sum_of_products(grad_output: Tensor, needs: Any, vjp: Any) -> Any:
    """Of a sum of a tensor and a product of two, `attn_product` for the two and the gradient for the first.

    For `torch.baddbmm`, `torch.addbmm`, `torch.addcmul`, `torch.addmv`, `torch.addr`. (`torch.addmm` and `F.linear` are
    dense layers.)

    >>> import torch, gradoverride as go
    >>> from gradoverride.rules import attn_sum_of_products
    >>> c, a, b = [torch.tensor([number], requires_grad=True) for number in (1.0, 2.0, 3.0)]
    >>> torch.autograd.grad(go.custom_backward(attn_sum_of_products)(torch.addcmul)(c, a, b), (c, a, b))
    (tensor([1.]), tensor([1.5000]), tensor([1.]))

    Source: Achtibat et al. (2024), propositions 3.2 and 3.3.
    """
    added = ("input", f"{_VARIADIC}[0]")
    count = max(1, len([name for name in _wanted(needs) if name not in added]))
    return _weighted(grad_output, needs, vjp, lambda name: 1 if name in added else 1 / count)


def attn_bilinear(grad_output: Tensor, needs: Any, vjp: Any) -> Any:
    """Of a product of two results with weights between, `attn_product` for the two; the weights have their gradient.

    For `F.bilinear`, which `nn.Bilinear` calls. The bias keeps its share of the relevance.

    >>> import torch, gradoverride as go, torch.nn.functional as F
    >>> from gradoverride.rules import attn_bilinear
    >>> a, b = torch.tensor([2.0], requires_grad=True), torch.tensor([3.0], requires_grad=True)
    >>> y = go.custom_backward(attn_bilinear)(F.bilinear)(a, b, torch.tensor([[[5.0]]]))
    >>> torch.autograd.grad(y, (a, b))
    (tensor([7.5000]), tensor([5.]))

    Source: Achtibat et al. (2024), propositions 3.2 and 3.3.
    """
    factors = ("input1", "input2", f"{_VARIADIC}[0]", f"{_VARIADIC}[1]")
    count = max(1, len([name for name in _wanted(needs) if name in factors]))
    return _weighted(grad_output, needs, vjp, lambda name: 1 / count if name in factors else 1)


def attn_glu(grad_output: Tensor, input: Tensor, dim: int = -1) -> dict[str, Any]:
    """Of a gated linear unit, the product of one half and the sigmoid of the other: half of R for each.

    For `F.glu`, which `nn.GLU` calls.

    >>> import torch, gradoverride as go, torch.nn.functional as F
    >>> from gradoverride.rules import attn_glu
    >>> x = torch.tensor([3.0, 1.0], requires_grad=True)
    >>> y = go.custom_backward(attn_glu)(F.glu)(x)
    >>> torch.allclose(x * torch.autograd.grad(y, x)[0], y / 2)
    True

    Source: Achtibat et al. (2024), proposition 3.2 and equation 9.
    """
    value, gate = input.chunk(2, dim)
    factor, half = torch.sigmoid(gate), grad_output / 2
    return {"input": torch.cat([half * factor, _passed_on(half * value, gate, factor)], dim)}


def attn_attention(grad_output: Tensor, needs: Any, vjp: Any) -> Any:
    """Of scaled dot-product attention, what the rules of its two products give: a quarter for queries and for keys,
    half for values.

    For `F.scaled_dot_product_attention`, whichever kernel it takes. Where some of the three are constants, those of the
    others are as `attn_product` has them. A mask that wants a gradient is added to the scores, and has half.

    >>> import torch, gradoverride as go, torch.nn.functional as F
    >>> from gradoverride.rules import attn_attention
    >>> q, k, v = torch.randn(3, 1, 4, 8, requires_grad=True).unbind()
    >>> plain = torch.autograd.grad(F.scaled_dot_product_attention(q, k, v).sum(), (q, k, v))
    >>> attention = go.custom_backward(attn_attention)(F.scaled_dot_product_attention)
    >>> found = torch.autograd.grad(attention(q, k, v).sum(), (q, k, v))
    >>> [torch.allclose(part * n, whole) for part, n, whole in zip(found, (4, 4, 2), plain)]
    [True, True, True]

    Source: Achtibat et al. (2024), proposition 3.3, twice, with 3.1 between.
    """
    names = ("query", "key", "value", "attn_mask")
    place = {**{name: name for name in names}, **{f"{_VARIADIC}[{i}]": name for i, name in enumerate(names)}}
    wanted = {place[name] for name in _wanted(needs)}
    in_scores = len(wanted & {"query", "key"})
    with_values = ("value" in wanted) + (len(wanted - {"value"}) > 0)
    parts = {"query": in_scores * with_values, "key": in_scores * with_values}
    return _weighted(grad_output, needs, vjp, lambda name: 1 / max(1, parts.get(place.get(name, name), with_values)))


# --- normalisation ---


def attn_layer_norm(
    grad_output: Tensor, input: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float = 1e-5
) -> dict[str, Any]:
    """Of layer normalisation, the gradient with the deviation as a constant: `(g w - mean(g w)) / deviation`.

    For `F.layer_norm`, which `nn.LayerNorm` calls. The bias keeps its share of the relevance.

    >>> import torch, gradoverride as go, torch.nn.functional as F
    >>> from gradoverride.rules import attn_layer_norm
    >>> x = torch.tensor([[1.0, 2.0, 6.0]], requires_grad=True)
    >>> y = go.custom_backward(attn_layer_norm)(F.layer_norm)(x, (3,))
    >>> torch.allclose((x * torch.autograd.grad(y[0, 2], x)[0]).sum(), y[0, 2])
    True

    Source: Achtibat et al. (2024), proposition 3.4.
    """
    sizes = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
    dims = tuple(range(-len(sizes), 0))
    grad = grad_output if weight is None else grad_output * weight
    return {"input": _centered(grad, dims) / _deviation(input, dims, eps)}


def attn_group_norm(
    grad_output: Tensor, input: Tensor, num_groups: int, weight: Tensor | None = None, eps: float = 1e-5
) -> dict[str, Any]:
    """The same of group normalisation. For `F.group_norm`, which `nn.GroupNorm` calls.

    >>> import torch, gradoverride as go, torch.nn.functional as F
    >>> from gradoverride.rules import attn_group_norm
    >>> x = torch.tensor([[1.0, 2.0, 6.0, 7.0]], requires_grad=True)
    >>> y = go.custom_backward(attn_group_norm)(F.group_norm)(x, 2)
    >>> torch.allclose((x * torch.autograd.grad(y[0, 2], x)[0]).sum(), y[0, 2])
    True

    Source: Achtibat et al. (2024), proposition 3.4.
    """
    grad = grad_output if weight is None else grad_output * weight.view(-1, *[1] * (input.dim() - 2))
    grads, inputs = [tensor.unflatten(1, (num_groups, -1)).flatten(2) for tensor in (grad, input)]
    found = _centered(grads, (-1,)) / _deviation(inputs, (-1,), eps)
    return {"input": found.reshape(input.shape)}


def attn_instance_norm(
    grad_output: Tensor,
    input: Tensor,
    vjp: Any,
    weight: Tensor | None = None,
    use_input_stats: bool = True,
    eps: float = 1e-5,
) -> dict[str, Any]:
    """The same of instance normalisation. For `F.instance_norm`, which `nn.InstanceNorm2d` and its like call.

    With running statistics, which are constants, it is the gradient.

    >>> import torch, gradoverride as go, torch.nn.functional as F
    >>> from gradoverride.rules import attn_instance_norm
    >>> x = torch.tensor([[[1.0, 2.0, 6.0]]], requires_grad=True)
    >>> y = go.custom_backward(attn_instance_norm)(F.instance_norm)(x)
    >>> torch.allclose((x * torch.autograd.grad(y[0, 0, 2], x)[0]).sum(), y[0, 0, 2])
    True

    Source: Achtibat et al. (2024), proposition 3.4.
    """
    if not use_input_stats:
        return {"input": vjp.by_name(grad_output)["input"]}
    grad = grad_output if weight is None else grad_output * weight.view(-1, *[1] * (input.dim() - 2))
    dims = tuple(range(2, input.dim()))
    return {"input": _centered(grad, dims) / _deviation(input, dims, eps)}


def attn_quotient(grad_output: Tensor, needs: Any, vjp: Any) -> Any:
    """Of a quotient, the gradient of what is divided; what it is divided by is a constant: `g / b`, and none.

    For `torch.div`, as in a normalisation that is written out.

    >>> import torch, gradoverride as go
    >>> from gradoverride.rules import attn_quotient
    >>> a, b = torch.tensor([6.0], requires_grad=True), torch.tensor([2.0], requires_grad=True)
    >>> torch.autograd.grad(go.custom_backward(attn_quotient)(torch.div)(a, b), a)
    (tensor([0.5000]),)

    A constant that is divided by a result is refused: no relevance could go on.

    Source: Achtibat et al. (2024), proposition 3.4.
    """
    divided = ("input", f"{_VARIADIC}[0]")
    if not any(name in divided for name in _wanted(needs)):
        fail(
            UnsupportedError,
            "attn_quotient: what is divided must be a result, for relevance to go on to it; it is a constant. Give the "
            "module that divides it the rule attn_identity, if it has one input for each result",
        )
    return _weighted(grad_output, needs, vjp, lambda name: 1 if name in divided else None)


# --- what they share ---


def _names(needs: Any) -> list[str]:
    """The arguments in the order in which `vjp` gives their gradients: by position first, if a builtin has such."""
    positional = [name for name in needs if name.startswith(f"{_VARIADIC}[")]
    whole = (_VARIADIC, *[name for name in needs if f"{name}[0]" in needs])  # `*args` besides each of them
    return [*positional, *[name for name in needs if name not in whole and name not in positional]]


def _wanted(needs: Any) -> list[str]:
    return [name for name in _names(needs) if needs[name]]


def _has_a_list(name: str, part: Any, needs: Any) -> bool:
    """Whether an argument, or one of those of `*args`, is a container."""
    parts = part if f"{name}[0]" in needs else (part,)
    return any(isinstance(one, (tuple, list, dict)) for one in parts)


def _weighted(grad_output: Tensor, needs: Any, vjp: Any, weight: Callable[[str], float | None]) -> Any:
    """The gradients, each times the weight of its argument. None for one without."""
    found = vjp(grad_output)
    if isinstance(found, Tensor):  # of the only tensor among the arguments
        return _times(found, weight(_wanted(needs)[0]))
    return tuple([_times(grad, weight(name)) for name, grad in zip(_names(needs), found, strict=True)])


def _times(grad: Tensor | None, factor: float | None) -> Tensor | None:
    return None if grad is None or factor is None else grad * factor


def _passed_on(grad: Tensor, input: Tensor, output: Tensor) -> Tensor:
    """The gradient by which relevance passes as it is from one result to its one input."""
    return grad * output / input.masked_fill(input == 0, torch.inf)


def _centered(grad: Tensor, dims: tuple[int, ...]) -> Tensor:
    return grad - grad.mean(dims, keepdim=True)


def _deviation(input: Tensor, dims: tuple[int, ...], eps: float) -> Tensor:
    return (_centered(wide(input), dims).square().mean(dims, keepdim=True) + eps).sqrt()  # var() warns of none
