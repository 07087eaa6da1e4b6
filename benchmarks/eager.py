"""Eager mode: forward and backward of a decorated function against the `autograd.Function` an expert writes.

Both sides do the same arithmetic and save the same tensors. The hand-written ones are without `setup_context`, which is
the faster way, unless a case says otherwise.

The engine recognises a rule that is arithmetic alone (`grad * 2`) and does less for it. So each case with such a rule
has a twin, "by calls", whose rule does as much by calling torch, as most rules do. Both have the limit.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

import gradoverride as go
from benchmarks.place import leaf, noise, ones
from benchmarks.timing import Case, Pair, added_microseconds, forward_and_backward, ratio

Grads = tuple[Tensor | None, ...]

TINY = 4


def cases() -> list[Case]:
    sizes = ((1, 1.00), (10_000, 1.00), (1_000_000, 1.02))
    return [
        *(ratio(f"eager: gradient alone, n={n:g}", limit, partial(gradient_alone, n)) for n, limit in sizes),
        *(ratio(f"eager: gradient alone by calls, n={n:g}", limit, partial(clamped, n)) for n, limit in sizes[:2]),
        ratio("eager: gradient alone, against setup_context", 0.65, against_setup_context),
        ratio("eager: straight through a builtin", 1.10, rounded),
        ratio("eager: two tensors", 1.02, two_tensors),
        ratio("eager: two tensors by calls", 1.02, two_tensors_by_calls),
        ratio("eager: two tensors, one wanted", 1.05, one_wanted),
        ratio("eager: keyword arguments and defaults", 1.05, keywords),
        ratio("eager: a tuple of numbers", 1.10, numbers),
        ratio("eager: values handed over", 1.20, handed_over),
        ratio("eager: module method, two parameters by name", 1.05, lambda: module(Affine)),
        ratio("eager: module method by calls", 1.05, lambda: module(AffineByCalls, AffineByHandByCalls)),
        ratio("eager: module with its own backward", 1.10, lambda: module(AffineWithBackward)),
        ratio("eager: vjp on plain tensors", 1.10, vjp_on_plain_tensors),
        ratio("eager: vjp, forward that names a global", 1.10, vjp_of_forward_with_global),
        ratio("eager: nested containers, dict result", 3.00, nested),
        added_microseconds("eager: added to a call under no_grad", 0.20, under_no_grad),
    ]


def compared(n: int, ours: Callable[..., Any], reference: Callable[..., Any], tensors: int) -> Pair:
    """Both sides on the same `tensors` leaves of `n` elements."""
    leaves = tuple(leaf(n) for _ in range(tensors))
    grad = ones(n)
    return Pair(
        forward_and_backward(ours, *leaves, grad=grad), forward_and_backward(reference, *leaves, grad=grad), leaves
    )


# A rule of the gradient alone.


class Double(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 2


class DoubleWithSetup(Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 2


def doubled() -> Callable[[Tensor], Tensor]:
    @go.custom_backward(lambda grad: grad * 2)
    def double(x: Tensor) -> Tensor:
        return x * 2

    return double


def gradient_alone(n: int) -> Pair:
    return compared(n, doubled(), Double.apply, tensors=1)


def against_setup_context() -> Pair:
    return compared(1, doubled(), DoubleWithSetup.apply, tensors=1)


class DoubleClamped(Double):
    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.clamp(-1, 1)


def clamped(n: int) -> Pair:
    @go.custom_backward(lambda grad: grad.clamp(-1, 1))
    def double(x: Tensor) -> Tensor:
        return x * 2

    return compared(n, double, DoubleClamped.apply, tensors=1)


class Rounded(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.round(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def rounded() -> Pair:
    return compared(TINY, go.straight_through(torch.round), Rounded.apply, tensors=1)


def under_no_grad() -> Pair:
    """Against the undecorated function: nothing else is to happen there."""
    ours, x, calls = doubled(), leaf(1), 200

    def step(function: Callable[[Tensor], Tensor]) -> None:
        with torch.no_grad():
            for _ in range(calls):
                function(x)

    return Pair(partial(step, ours), partial(step, inspect.unwrap(ours)), calls_a_step=calls)


# A rule of two tensors.


class Product(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x * weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Grads:
        x, weight = ctx.saved_tensors
        return grad * weight, grad * x


def product() -> Callable[[Tensor, Tensor], Tensor]:
    @go.custom_backward(lambda grad, x, weight: (grad * weight, grad * x))
    def product(x: Tensor, weight: Tensor) -> Tensor:
        return x * weight

    return product


def two_tensors() -> Pair:
    return compared(TINY, product(), Product.apply, tensors=2)


class ProductByCalls(Product):
    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Grads:
        x, weight = ctx.saved_tensors
        return torch.mul(grad, weight), torch.mul(grad, x)


def two_tensors_by_calls() -> Pair:
    @go.custom_backward(lambda grad, x, weight: (torch.mul(grad, weight), torch.mul(grad, x)))
    def product(x: Tensor, weight: Tensor) -> Tensor:
        return x * weight

    return compared(TINY, product, ProductByCalls.apply, tensors=2)


class ProductOfOneWanted(Product):
    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Grads:
        x, weight = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        return grad * weight if wanted[0] else None, grad * x if wanted[1] else None


def one_wanted() -> Pair:
    @go.custom_backward(
        lambda grad, x, weight, needs: (grad * weight if needs["x"] else None, grad * x if needs["weight"] else None)
    )
    def product(x: Tensor, weight: Tensor) -> Tensor:
        return x * weight

    fixed = noise(TINY)
    reference = ProductOfOneWanted.apply
    return compared(TINY, lambda x: product(x, fixed), lambda x: reference(x, fixed), tensors=1)


class Gated(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        mask, gate = x > 0, x.sigmoid()
        ctx.save_for_backward(mask, gate)
        return x * gate * mask

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        mask, gate = ctx.saved_tensors
        return grad * gate * mask


def handed_over() -> Pair:
    """A mask, and numbers: their second derivatives are refused here, and lost by hand."""

    @go.custom_backward(lambda grad, mask, gate: grad * gate * mask)
    def gated(x: Tensor) -> Tensor:
        mask, gate = x > 0, x.sigmoid()
        return go.save_for_backward(x * gate * mask, mask=mask, gate=gate)

    return compared(TINY, gated, Gated.apply, tensors=1)


class ScaledProduct(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.scale = scale
        return x * weight * scale

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Grads:
        x, weight = ctx.saved_tensors
        return grad * weight * ctx.scale, grad * x * ctx.scale, None


def by_hand(x: Tensor, *, weight: Tensor, scale: float = 2.0, bias: Tensor | None = None) -> Any:
    """`apply` takes no keyword arguments, so this is what an expert puts around it."""
    return ScaledProduct.apply(x, weight, scale)  # type: ignore[no-untyped-call]  # torch leaves it untyped


def keywords() -> Pair:
    @go.custom_backward(lambda grad, x, weight, scale: {"x": grad * weight * scale, "weight": grad * x * scale})
    def ours(x: Tensor, *, weight: Tensor, scale: float = 2.0, bias: Tensor | None = None) -> Tensor:
        return x * weight * scale

    return compared(TINY, lambda x, w: ours(x, weight=w), lambda x, w: by_hand(x, weight=w), tensors=2)


class Weighted(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: tuple[float, float]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weights = weights
        return x * weights[0] + weights[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Grads:
        (x,) = ctx.saved_tensors
        return grad * x * ctx.weights[0], None


def numbers() -> Pair:
    @go.custom_backward(lambda grad, x, weights: grad * x * weights[0])
    def ours(x: Tensor, weights: tuple[float, float] = (1.0, 0.0)) -> Tensor:
        return x * weights[0] + weights[1]

    return compared(TINY, lambda x: ours(x, (2.0, 1.0)), lambda x: Weighted.apply(x, (2.0, 1.0)), tensors=1)  # type: ignore[no-untyped-call]  # as above


# Modules.


class AffineFunction(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x * weight + bias

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Grads:
        x, weight = ctx.saved_tensors
        return grad * weight, grad * x, grad


class AffineFunctionByCalls(AffineFunction):
    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Grads:
        x, weight = ctx.saved_tensors
        return torch.mul(grad, weight), torch.mul(grad, x), grad


class AffineByHand(nn.Module):
    def __init__(self, n: int = TINY) -> None:
        super().__init__()
        self.weight = nn.Parameter(noise(n))
        self.bias = nn.Parameter(noise(n))

    def forward(self, x: Tensor) -> Any:
        return AffineFunction.apply(x, self.weight, self.bias)  # type: ignore[no-untyped-call]  # as above


class Affine(AffineByHand):
    # The values of the weight and of x are needed; the bias is asked for because the rule answers for it.
    @go.custom_backward(lambda grad, x, weight, bias: {"x": grad * weight, "weight": grad * x, "bias": grad})
    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight + self.bias


class AffineByHandByCalls(AffineByHand):
    def forward(self, x: Tensor) -> Any:
        return AffineFunctionByCalls.apply(x, self.weight, self.bias)  # type: ignore[no-untyped-call]  # as above


class AffineByCalls(AffineByHand):
    @go.custom_backward(
        lambda grad, x, weight, bias: {"x": torch.mul(grad, weight), "weight": torch.mul(grad, x), "bias": grad}
    )
    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight + self.bias


@go.custom_backward
class AffineWithBackward(AffineByHand):
    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight + self.bias

    def backward(self, grad: Tensor, x: Tensor) -> Tensor:
        self.weight.grad = grad * x
        self.bias.grad = grad
        return grad * self.weight


def module(kind: type[AffineByHand], by_hand: type[AffineByHand] = AffineByHand) -> Pair:
    ours, reference, x, grad = kind(), by_hand(), leaf(TINY), ones(TINY)
    return Pair(
        forward_and_backward(ours, x, grad=grad),
        forward_and_backward(reference, x, grad=grad),
        (x, *ours.parameters(), *reference.parameters()),
    )


# The gradient as it would be, and containers.


class KeptGraph(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        with torch.enable_grad():
            inputs = x.detach().requires_grad_(), weight.detach().requires_grad_()
            result = inputs[0] * inputs[1]
        ctx.kept = inputs, result
        return result.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Grads:
        inputs, result = ctx.kept
        return torch.autograd.grad(result, inputs, grad * 2, retain_graph=True)


def vjp_on_plain_tensors() -> Pair:
    @go.custom_backward(lambda grad, vjp: vjp(grad * 2))
    def product(x: Tensor, weight: Tensor) -> Tensor:
        return x * weight

    return compared(TINY, product, KeptGraph.apply, tensors=2)


FACTOR = 2.0


class KeptGraphOfForwardWithGlobal(KeptGraph):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        with torch.enable_grad():
            inputs = x.detach().requires_grad_(), weight.detach().requires_grad_()
            result = inputs[0] * inputs[1] * FACTOR
        ctx.kept = inputs, result
        return result.detach()


def vjp_of_forward_with_global() -> Pair:
    """The global may be a tensor that requires grad, for all that can be told from the code: so it is looked for."""

    @go.custom_backward(lambda grad, vjp: vjp(grad * 2))
    def product(x: Tensor, weight: Tensor) -> Tensor:
        return x * weight * FACTOR

    return compared(TINY, product, KeptGraphOfForwardWithGlobal.apply, tensors=2)


class ProductAndSum(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, y)
        return x * y, x + y

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_sum: Tensor) -> Grads:
        x, y = ctx.saved_tensors
        return grad * y + grad_sum, grad * x + grad_sum


def nested() -> Pair:
    def backward(grad: dict[str, Tensor], pair: dict[str, Tensor]) -> dict[str, Any]:
        grad_x = grad["product"] * pair["y"] + grad["sum"]
        grad_y = grad["product"] * pair["x"] + grad["sum"]
        return {"pair": {"x": grad_x, "y": grad_y}}

    @go.custom_backward(backward)
    def ours(pair: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"product": pair["x"] * pair["y"], "sum": pair["x"] + pair["y"]}

    def by_hand(pair: dict[str, Tensor]) -> dict[str, Tensor]:
        product, total = ProductAndSum.apply(pair["x"], pair["y"])  # type: ignore[no-untyped-call]  # as above
        return {"product": product, "sum": total}

    return compared(TINY, lambda x, y: ours({"x": x, "y": y}), lambda x, y: by_hand({"x": x, "y": y}), tensors=2)
