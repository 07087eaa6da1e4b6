"""The forms by hand: `autograd.Function`s as an expert writes them, and modules that call them.

Nothing here uses the library. Each Function has what `torch.func` asks for, so that the same cell can be run on it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import Function

__all__ = [
    "GateFunction",
    "Guided",
    "LinearByHand",
    "Module",
    "RoundByHand",
    "ScaleByHand",
    "TanhByOutput",
    "Times",
    "TripledLinearFunction",
    "elementwise",
]


class ByHand(Function):
    generate_vmap_rule = True


def elementwise(name: str, value: Callable[..., Any], slope: Callable[..., Any]) -> Callable[..., Any]:
    """A function of one tensor with this value, whose gradient is multiplied by `slope(x)`."""

    class Elementwise(ByHand):
        @staticmethod
        def forward(x):
            return value(x)

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)
            ctx.save_for_forward(*inputs)

        @staticmethod
        def backward(ctx, grad_output):
            (x,) = ctx.saved_tensors
            return grad_output * slope(x)

        @staticmethod
        def jvp(ctx, tangent):
            (x,) = ctx.saved_tensors
            return tangent * slope(x)

    Elementwise.__name__ = name
    return Elementwise.apply


class RoundByHand(ByHand):
    """Rounding whose gradient passes: it keeps nothing."""

    @staticmethod
    def forward(x):
        return x.round()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad_output):
        return grad_output

    @staticmethod
    def jvp(ctx, tangent):
        return tangent.clone()


class Times(ByHand):
    """The identity, whose gradient is multiplied by a number."""

    @staticmethod
    def forward(x, factor):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.factor = inputs[1]

    @staticmethod
    def backward(ctx, grad_output):
        return grad_output * ctx.factor, None


class ScaleByHand(ByHand):
    """`x * weight`: twice the gradient to `x`, three times that to `weight`."""

    @staticmethod
    def forward(x, weight):
        return x * weight

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, grad_output):
        x, weight = ctx.saved_tensors
        return 2 * grad_output * weight.conj(), (3 * grad_output * x.conj()).sum_to_size(weight.shape)

    @staticmethod
    def jvp(ctx, tangent_x, tangent_weight):
        x, weight = ctx.saved_tensors
        zero = torch.zeros_like(x)
        return 2 * tangent_x * weight + 3 * x * (zero if tangent_weight is None else tangent_weight)


class Guided(ByHand):
    """ReLU whose gradient passes where both it and the input are positive: not linear, so without `jvp`."""

    @staticmethod
    def forward(x):
        return x.relu()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad_output):
        (x,) = ctx.saved_tensors
        return grad_output.clamp(min=0) * (x > 0)


class LinearFunction(ByHand):
    """`x @ weight.T + bias`, with twice the gradient to `x` and torch's own to the parameters."""

    @staticmethod
    def forward(x, weight, bias):
        return F.linear(x, weight, bias)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, _ = inputs
        ctx.save_for_backward(x, weight)
        ctx.save_for_forward(x, weight)

    @staticmethod
    def backward(ctx, grad_output):
        x, weight = ctx.saved_tensors
        rows, inputs = grad_output.reshape(-1, grad_output.shape[-1]), x.reshape(-1, x.shape[-1])
        return 2 * grad_output @ weight.conj(), rows.T @ inputs.conj(), rows.sum(0)

    @staticmethod
    def jvp(ctx, tangent_x, tangent_weight, tangent_bias):
        x, weight = ctx.saved_tensors
        total = 2 * tangent_x @ weight.T
        if tangent_weight is not None:
            total = total + x @ tangent_weight.T
        return total if tangent_bias is None else total + tangent_bias


class TanhByOutput(ByHand):
    """tanh with twice its gradient, which is computed from the result."""

    @staticmethod
    def forward(x):
        return torch.tanh(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(output)
        ctx.save_for_forward(output)

    @staticmethod
    def backward(ctx, grad_output):
        (output,) = ctx.saved_tensors
        return 2 * grad_output * (1 - output**2).conj()

    @staticmethod
    def jvp(ctx, tangent):
        (output,) = ctx.saved_tensors
        return 2 * tangent * (1 - output**2)


triple_tanh = elementwise("Tanh", torch.tanh, lambda x: 3 * (1 - torch.tanh(x) ** 2).conj())


class GateFunction(ByHand):
    """`tanh(x) * scale`: twice three times the gradient to `x`, and torch's own to `scale`, in which tanh has three."""

    @staticmethod
    def forward(x, scale):
        return torch.tanh(x) * scale

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, grad_output):
        x, scale = ctx.saved_tensors
        grad_x = 6 * grad_output * ((1 - torch.tanh(x) ** 2) * scale).conj()
        return grad_x, (grad_output * triple_tanh(x).conj()).sum_to_size(scale.shape)

    @staticmethod
    def jvp(ctx, tangent_x, tangent_scale):
        x, scale = ctx.saved_tensors
        total = 6 * tangent_x * (1 - torch.tanh(x) ** 2) * scale
        return total if tangent_scale is None else total + torch.tanh(x) * tangent_scale


class TripledLinearFunction(LinearFunction):
    """The same with three times the gradient to the weight."""

    @staticmethod
    def backward(ctx, grad_output):
        grad_x, grad_weight, grad_bias = LinearFunction.backward(ctx, grad_output)
        return grad_x, 3 * grad_weight, grad_bias

    @staticmethod
    def jvp(ctx, tangent_x, tangent_weight, tangent_bias):
        tripled = None if tangent_weight is None else 3 * tangent_weight
        return LinearFunction.jvp(ctx, tangent_x, tripled, tangent_bias)


class LinearByHand(nn.Linear):
    def forward(self, input):
        return LinearFunction.apply(input, self.weight, self.bias)


class Module(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)
