"""Rules that say which parts of an input a result is due to: gradients of a ReLU, edited, and relevance (LRP).

Layer-wise relevance propagation (Bach et al., 2015) goes through the backward pass: what stands for the gradient is
the relevance R of a layer's result, and a rule gives that of its input. Start it with the result itself,
`torch.autograd.grad(y, x, y)`. A layer divides R among the contributions `x * w` that its result z is the sum of:

    R_in = x * vjp(R / z)

The rules differ in the contributions that they count. Alike in all of them:

- They are for linear layers with a bias or without: dense, convolutions, transposed ones; `lrp_epsilon` for pooling
  too. They evaluate the layer again. All but `lrp_epsilon` do so with other weights, and so must know them: one
  parameter, and another one called `bias`. Anything else is refused.
- The bias stands among the contributions where its formula says so, and keeps what falls to it (Bach et al.,
  section 2.3): then the sum of R_in is that of R without the share of the bias.
- Where nothing contributes, nothing is passed on: R / 0 counts as 0.
- Relevance is no gradient of a parameter: those of the layer get none.
- dtype and device are those of the input; a bias or an input of 0 is as good as any other.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gradoverride._core.binding.options import check, check_broadcasts, is_number
from gradoverride._core.in_force.everywhere import bare_forward
from gradoverride._core.in_force.targets import class_of
from gradoverride._core.modules.standin import stand_in
from gradoverride._core.private.dynamo import fail
from gradoverride._core.python.by_class import RECORD
from gradoverride.errors import UnsupportedError
from gradoverride.rules.each import check_one_for_each

__all__ = [
    "guided_relu",
    "deconv_relu",
    "smooth_relu",
    "lrp_epsilon",
    "lrp_z_plus",
    "lrp_gamma",
    "lrp_alpha_beta",
    "lrp_z_box",
    "lrp_flat",
    "lrp_w_square",
    "lrp_identity",
]


# --- gradients of a ReLU ---


def guided_relu(grad_output: Tensor, output: Tensor) -> Tensor:
    """Of a ReLU, positive gradients where its result is positive: `max(g, 0)` where `y > 0`, else 0.

    >>> import torch, gradoverride as go
    >>> from gradoverride.rules import guided_relu
    >>> relu = go.custom_backward(guided_relu)(torch.relu)
    >>> x = torch.tensor([-1.0, 1.0, 1.0], requires_grad=True)
    >>> torch.autograd.grad(relu(x), x, torch.tensor([2.0, 2.0, -2.0]))
    (tensor([0., 2., 0.]),)

    Source: Springenberg et al., "Striving for simplicity: the all convolutional net" (2015).
    """
    return grad_output.clamp(min=0).masked_fill(output <= 0, 0)


def deconv_relu(grad_output: Tensor) -> Tensor:
    """Of a ReLU, positive gradients wherever they are: `max(g, 0)`. Nothing is kept for it.

    >>> import torch, gradoverride as go
    >>> from gradoverride.rules import deconv_relu
    >>> relu = go.custom_backward(deconv_relu)(torch.relu)
    >>> x = torch.tensor([-1.0, 1.0, 1.0], requires_grad=True)
    >>> torch.autograd.grad(relu(x), x, torch.tensor([2.0, 2.0, -2.0]))
    (tensor([2., 2., 0.]),)

    Source: Zeiler, Fergus, "Visualizing and understanding convolutional networks" (2014).
    """
    return grad_output.clamp(min=0)


@dataclass(frozen=True)
class smooth_relu:
    """Of a ReLU, the gradient of a softplus: `sigmoid(beta * x) * g`. The larger `beta` (default 10), the sharper.

    >>> import torch, gradoverride as go
    >>> from gradoverride.rules import smooth_relu
    >>> relu = go.custom_backward(smooth_relu(beta=10))(torch.relu)
    >>> x = torch.tensor([0.0, 10.0], requires_grad=True)
    >>> torch.autograd.grad(relu(x).sum(), x)
    (tensor([0.5000, 1.0000]),)

    It asks for the input, so a ReLU in place is refused. `beta` must be larger than 0, else `RuleOptionError`.

    Source: Dombrowski et al., "Explanations can be manipulated and geometry is to blame" (2019).
    """

    beta: float = 10.0

    def __post_init__(self) -> None:
        check("smooth_relu", "beta", self.beta, is_number(self.beta) and self.beta > 0, "a number larger than 0")

    writes_nothing = True  # so it is given the gradient itself, no copy

    def __call__(self, grad_output: Tensor, input: Tensor) -> Tensor:
        """The gradient of the input."""
        check_one_for_each("smooth_relu", grad_output, input)
        return torch.sigmoid(self.beta * input) * grad_output


# --- relevance ---


@dataclass(frozen=True)
class lrp_epsilon:
    """Relevance in proportion to all contributions, the bias among them: `x * vjp(R / (y + epsilon * sign(y)))`.

    `sign(0)` is 1. `epsilon` (default 1e-6) takes up relevance where contributions cancel: the sum of R_in is that of
    R, but for its share and that of the bias. For anything linear: a layer, pooling by averages.

    >>> import torch, gradoverride as go
    >>> from gradoverride.rules import lrp_epsilon
    >>> layer = torch.nn.Linear(2, 1, bias=False)
    >>> _ = layer.weight.data.copy_(torch.tensor([[1.0, 3.0]]))
    >>> x = torch.ones(2, requires_grad=True)
    >>> with go.override(layer, {layer: lrp_epsilon(1e-6)}):
    ...     y = layer(x)
    >>> torch.autograd.grad(y, x, y)
    (tensor([1.0000, 3.0000]),)

    `epsilon` must not be negative, else `RuleOptionError`.

    Source: Bach et al., "On pixel-wise explanations for non-linear classifier decisions by layer-wise relevance
    propagation" (2015), equation 58.
    """

    epsilon: float = 1e-6

    def __post_init__(self) -> None:
        fits = is_number(self.epsilon) and self.epsilon >= 0
        check("lrp_epsilon", "epsilon", self.epsilon, fits, "a number that is not negative")

    def __call__(
        self, grad_output: Tensor, input: Tensor, module: Any, forward: Any, needs: Any, params: Any
    ) -> dict[str, Any]:
        """The relevance of the input."""
        if module is None:
            fail(UnsupportedError, "lrp_epsilon is for modules; it is in force on a function. Use a module for it")
        # Evaluated again: a ReLU in place may have overwritten the result.
        output, pullback, *_ = torch.func.vjp(forward, input)
        _check_result(output, grad_output, module)
        stabilised = torch.where(output < 0, output - self.epsilon, output + self.epsilon)
        return _of_input(input * pullback(_divided(grad_output, stabilised))[0], needs, params)


def lrp_z_plus(grad_output: Tensor, input: Tensor, module: Any, needs: Any, params: Any) -> dict[str, Any]:
    """Relevance in proportion to the positive contributions, a positive bias among them: `(x * w)+ / z+ * R`.

    That is `lrp_alpha_beta(1, 0)`. Without a bias, all relevance of a result with a positive contribution is passed on.

    >>> import torch, gradoverride as go
    >>> from gradoverride.rules import lrp_z_plus
    >>> layer = torch.nn.Linear(3, 1, bias=False)
    >>> _ = layer.weight.data.copy_(torch.tensor([[1.0, 3.0, -2.0]]))
    >>> x = torch.ones(3, requires_grad=True)
    >>> with go.override(layer, {layer: lrp_z_plus}):
    ...     y = layer(x)
    >>> torch.autograd.grad(y, x, torch.tensor([4.0]))
    (tensor([1., 3., 0.]),)

    Source: Montavon et al., "Explaining nonlinear classification decisions with deep Taylor decomposition" (2017);
    with inputs of both signs and a bias, Bach et al. (2015), equation 60.
    """
    return _of_input(_by_sign(grad_output, input, module, _positive, _negative), needs, params)


@dataclass(frozen=True)
class lrp_gamma:
    """Relevance in proportion to contributions of which the positive ones are favoured: `x * (w + gamma * w+)`.

    The bias is changed like the weights. For inputs that are not negative, as they come from a ReLU. `gamma` (default
    0.25) goes from all contributions (0) to the positive ones alone (large).

    >>> import torch, gradoverride as go
    >>> from gradoverride.rules import lrp_gamma
    >>> layer = torch.nn.Linear(2, 1, bias=False)
    >>> _ = layer.weight.data.copy_(torch.tensor([[1.0, -1.0]]))
    >>> x = torch.ones(2, requires_grad=True)
    >>> with go.override(layer, {layer: lrp_gamma(1.0)}):
    ...     y = layer(x)
    >>> torch.autograd.grad(y, x, torch.tensor([1.0]))
    (tensor([ 2., -1.]),)

    `gamma` must not be negative, else `RuleOptionError`.

    Source: Montavon et al., "Layer-wise relevance propagation: an overview" (2019), section 10.2.3.
    """

    gamma: float = 0.25

    def __post_init__(self) -> None:
        fits = is_number(self.gamma) and self.gamma >= 0
        check("lrp_gamma", "gamma", self.gamma, fits, "a number that is not negative")

    def __call__(self, grad_output: Tensor, input: Tensor, module: Any, needs: Any, params: Any) -> dict[str, Any]:
        """The relevance of the input."""

        def favoured(weight: Tensor) -> Tensor:
            return weight + self.gamma * _positive(weight)

        return _of_input(_distributed(grad_output, module, Part(input, favoured, favoured)), needs, params)


@dataclass(frozen=True)
class lrp_alpha_beta:
    """Relevance by positive and by negative contributions apart: `(alpha (x w)+ / z+ - beta (x w)- / z-) * R`.

    The bias stands among the contributions of its sign. Defaults: 2 and 1.

    >>> import torch, gradoverride as go
    >>> from gradoverride.rules import lrp_alpha_beta
    >>> layer = torch.nn.Linear(3, 1, bias=False)
    >>> _ = layer.weight.data.copy_(torch.tensor([[1.0, 3.0, -2.0]]))
    >>> x = torch.ones(3, requires_grad=True)
    >>> with go.override(layer, {layer: lrp_alpha_beta(2, 1)}):
    ...     y = layer(x)
    >>> torch.autograd.grad(y, x, torch.tensor([4.0]))
    (tensor([ 2.,  6., -4.]),)

    `alpha - beta` must be 1 and `beta` not negative, else `RuleOptionError`.

    Source: Bach et al. (2015), equation 60.
    """

    alpha: float = 2.0
    beta: float = 1.0

    def __post_init__(self) -> None:
        fits = is_number(self.alpha) and is_number(self.beta) and self.beta >= 0
        fits = fits and math.isclose(self.alpha - self.beta, 1)
        required = "numbers with alpha - beta = 1 and beta not negative, or relevance is not kept"
        check("lrp_alpha_beta", "alpha' and 'beta", (self.alpha, self.beta), fits, required)

    def __call__(self, grad_output: Tensor, input: Tensor, module: Any, needs: Any, params: Any) -> dict[str, Any]:
        """The relevance of the input."""
        relevance = self.alpha * _by_sign(grad_output, input, module, _positive, _negative)
        if self.beta:
            relevance = relevance - self.beta * _by_sign(grad_output, input, module, _negative, _positive)
        return _of_input(relevance, needs, params)


@dataclass(frozen=True)
class lrp_z_box:
    """For the first layer, on inputs between `low` and `high`: in proportion to `x w - low w+ - high w-`.

    The bias has no share. The bounds are numbers, or tensors or nested sequences that broadcast with the input: by
    channel of images, `torch.tensor([...]).view(3, 1, 1)`.

    >>> import torch, gradoverride as go
    >>> from gradoverride.rules import lrp_z_box
    >>> layer = torch.nn.Linear(2, 1, bias=False)
    >>> _ = layer.weight.data.copy_(torch.tensor([[1.0, -3.0]]))
    >>> x = torch.tensor([0.0, 0.0], requires_grad=True)
    >>> with go.override(layer, {layer: lrp_z_box(-1, 1)}):
    ...     y = layer(x)
    >>> torch.autograd.grad(y, x, torch.tensor([4.0]))
    (tensor([1., 3.]),)

    `low` must nowhere be above `high`, else `RuleOptionError`.

    Source: Montavon et al. (2017), the rule for a box.
    """

    low: Any
    high: Any

    def __post_init__(self) -> None:
        # As numbers in tuples they compare, hash and print; tensors do not.
        object.__setattr__(self, "low", _read_bound("low", self.low))
        object.__setattr__(self, "high", _read_bound("high", self.high))
        try:
            fits = bool((torch.tensor(self.low) <= torch.tensor(self.high)).all())
        except (RuntimeError, ValueError):  # shapes that do not go together, or rows of different lengths
            fits = False
        required = "numbers of shapes that broadcast, with low <= high everywhere"
        check("lrp_z_box", "low' and 'high", (self.low, self.high), fits, required)

    def __call__(self, grad_output: Tensor, input: Tensor, module: Any, needs: Any, params: Any) -> dict[str, Any]:
        """The relevance of the input."""
        # In this form no contribution is negative and none cancels.
        above_low, below_high = input - _like("low", self.low, input), input - _like("high", self.high, input)
        parts = Part(above_low, _positive, torch.zeros_like), Part(below_high, _negative, torch.zeros_like)
        return _of_input(_distributed(grad_output, module, *parts), needs, params)


def lrp_flat(grad_output: Tensor, input: Tensor, module: Any, needs: Any, params: Any) -> dict[str, Any]:
    """For the first layer: the same relevance for all inputs that a result is made of. The bias has no share.

    >>> import torch, gradoverride as go
    >>> from gradoverride.rules import lrp_flat
    >>> layer = torch.nn.Linear(2, 1)
    >>> x = torch.tensor([0.0, 5.0], requires_grad=True)
    >>> with go.override(layer, {layer: lrp_flat}):
    ...     y = layer(x)
    >>> torch.autograd.grad(y, x, torch.tensor([4.0]))
    (tensor([2., 2.]),)

    Source: Lapuschkin et al., "Unmasking Clever Hans predictors and assessing what machines really learn" (2019).
    """
    part = Part(torch.ones_like(input), torch.ones_like, torch.zeros_like)
    return _of_input(_distributed(grad_output, module, part), needs, params)


def lrp_w_square(grad_output: Tensor, input: Tensor, module: Any, needs: Any, params: Any) -> dict[str, Any]:
    """For the first layer: relevance in proportion to the squared weights, whatever the input. The bias has no share.

    >>> import torch, gradoverride as go
    >>> from gradoverride.rules import lrp_w_square
    >>> layer = torch.nn.Linear(2, 1)
    >>> _ = layer.weight.data.copy_(torch.tensor([[1.0, -2.0]]))
    >>> x = torch.tensor([0.0, 5.0], requires_grad=True)
    >>> with go.override(layer, {layer: lrp_w_square}):
    ...     y = layer(x)
    >>> torch.autograd.grad(y, x, torch.tensor([5.0]))
    (tensor([1., 4.]),)

    Source: Montavon et al. (2017), the rule for an unbounded input.
    """
    part = Part(torch.ones_like(input), torch.square, torch.zeros_like)
    return _of_input(_distributed(grad_output, module, part), needs, params)


def lrp_identity(grad_output: Tensor) -> Tensor:
    """For layers with one input for each result (activations): relevance passes as it is. Nothing is kept for it.

    >>> import torch, gradoverride as go
    >>> from gradoverride.rules import lrp_identity
    >>> tanh = go.custom_backward(lrp_identity)(torch.tanh)
    >>> x = torch.tensor([3.0], requires_grad=True)
    >>> torch.autograd.grad(tanh(x), x, torch.tensor([4.0]))
    (tensor([4.]),)

    Source: Bach et al. (2015), section 2.3.
    """
    return grad_output


# --- how relevance is divided ---


Change = Callable[[Tensor], Tensor]


class Part(NamedTuple):
    """Contributions: an input, and what the weights and the bias that it meets are changed to."""

    input: Tensor
    weight: Change
    bias: Change


def _by_sign(relevance: Tensor, input: Tensor, module: Any, own: Change, other: Change) -> Tensor:
    """By contributions of one sign: of weights of that sign, `own`, above 0, and of the `other` below. Each bias stands
    in one of the parts.
    """
    parts = Part(_positive(input), own, own), Part(_negative(input), other, torch.zeros_like)
    return _distributed(relevance, module, *parts)


def _distributed(relevance: Tensor, module: Any, *parts: Part) -> Tensor:
    """`relevance` in proportion to the contributions of all parts."""
    # Each by itself, and summed outside: within a transform, compiled code could have no rule for sums.
    found = [torch.func.vjp(_forward_with(module, part.weight, part.bias), part.input) for part in parts]
    total = _sum([result for result, *_ in found])
    _check_result(total, relevance, module)
    shared = _divided(relevance, total)
    return _sum([part.input * pullback(shared)[0] for part, (_, pullback, *_) in zip(parts, found, strict=True)])


def _sum(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else tensors[0] + tensors[1]


def _check_result(result: Tensor, relevance: Tensor, module: Any) -> None:
    if result.shape != relevance.shape:
        fail(
            UnsupportedError,
            f"an LRP rule of a '{class_of(module).__name__}' calls it again with its input alone; it had further "
            "arguments, such as 'output_size', and gave another shape. Wrap the call in a module of its own",
        )


def _forward_with(module: Any, on_weight: Change, on_bias: Change) -> Callable[[Tensor], Any]:
    """The layer with other weights, and without the rules that are in force on it."""
    changed = {
        name: (on_bias if name == "bias" else on_weight)(getattr(module, name)) for name in _names_of_layer(module)
    }
    then = stand_in(module, changed)
    then.__dict__.pop(RECORD, None)
    forward = bare_forward(type(then))
    while getattr(getattr(forward, "__code__", None), "co_filename", "").startswith("<gradoverride"):
        forward = forward.__wrapped__  # a decorated class: under the rule it would ask the rule again, for ever
    return lambda input: forward(then, input)


def _names_of_layer(module: Any) -> list[str]:
    """The parameters of a linear layer: a weight, under any name, and perhaps a bias."""
    if not isinstance(module, nn.Module):
        fail(
            UnsupportedError,
            "this LRP rule is for modules, whose weights it must know; it is in force on a function. Use a module in "
            "its place",
        )
    own = [name for name, parameter in module._parameters.items() if parameter is not None]
    within = module._modules
    if "parametrizations" in within:
        own += list(within["parametrizations"]._modules)  # type: ignore[union-attr]  # it is there
    buffers = [name for name, buffer in module.named_buffers() if buffer.is_floating_point()]
    others = [name for name in within if name != "parametrizations"]
    if len([name for name in own if name != "bias"]) != 1 or buffers or others:
        found = ", ".join(map(repr, [*own, *buffers, *others])) or "no parameters"
        fail(
            UnsupportedError,
            f"this LRP rule is for linear layers with one weight, and perhaps a 'bias'; a "
            f"'{class_of(module).__name__}' has {found}. Use lrp_epsilon for it, or name the layers within",
        )
    return own


def _divided(relevance: Tensor, total: Tensor) -> Tensor:
    """`relevance / total`, and 0 where that is 0, with a derivative of 0."""
    return relevance / total.masked_fill(total == 0, math.inf)


def _of_input(relevance: Tensor, needs: Any, params: Any) -> dict[str, Any]:
    """The answer of a rule: relevance for the first argument, no gradient for anything else."""
    return {next(iter(needs)): relevance, **dict.fromkeys(params)}


def _positive(tensor: Tensor) -> Tensor:
    return tensor.clamp(min=0)


def _negative(tensor: Tensor) -> Tensor:
    return tensor.clamp(max=0)


# --- options ---


def _read_bound(name: str, value: Any) -> Any:
    """A number, or numbers in nested tuples."""
    value = value.tolist() if hasattr(value, "tolist") else value  # a tensor, or one of NumPy
    if isinstance(value, (tuple, list)) and value:
        return tuple([_read_bound(name, part) for part in value])
    check("lrp_z_box", name, value, is_number(value), "a number, or numbers in a tensor or in nested sequences")
    return float(value)


def _like(name: str, bound: Any, input: Tensor) -> Any:
    if not isinstance(bound, tuple):
        return bound
    found = torch.tensor(bound, dtype=input.dtype, device=input.device)
    check_broadcasts("lrp_z_box", name, found, input, "the input")
    return found
