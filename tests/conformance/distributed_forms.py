"""The rows of the distributed part of the table: each form in the middle of a small model, and the same by hand."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import gradoverride as go

# --- rules ---


def of_linear(grad_output, x, weight, bias):
    """Twice the gradient of the input, three times that of the weight, five times that of the bias."""
    return {"x": 2 * grad_output @ weight, "weight": 3 * grad_output.T @ x, "bias": 5 * grad_output.sum(0)}


def of_torchs_linear(grad_output, input, weight, bias):
    return {"input": 2 * grad_output @ weight, "weight": 3 * grad_output.T @ input, "bias": 5 * grad_output.sum(0)}


def of_argument(grad_output, module):
    """The parameters are left to autograd."""
    return 2 * grad_output @ module.weight


def stopped_weight(grad_output, x, weight):
    return {"x": grad_output @ weight, "weight": None}


def doubled(grad_output, vjp):
    return vjp(2 * grad_output)


def tripled(grad_output, vjp):
    return vjp(3 * grad_output)


def all_doubled(grad_output, vjp):
    return {name: 2 * grad for name, grad in vjp.by_name(grad_output).items()}


def halved(grad_output):
    return grad_output / 2


def guided(grad_output, vjp):
    return vjp(grad_output.clamp(min=0))


# --- modules with the forms ---


class ByMethod(nn.Linear):
    @go.custom_backward(of_linear)
    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


class ByMethodOfArgument(nn.Linear):
    @go.custom_backward(of_argument)
    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


class ByMethodThatStops(nn.Linear):
    @go.custom_backward(stopped_weight)
    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


class ByMethodWithVjp(nn.Linear):
    @go.custom_backward(all_doubled)
    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


@go.custom_backward
class ByClass(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight, self.bias)

    def backward(self, grad_output, x):
        self.weight.grad = 3 * grad_output.T @ x
        self.bias.grad = 5 * grad_output.sum(0)
        return 2 * grad_output @ self.weight


@go.custom_backward(halved)
def with_half_the_gradient(x):
    return x * 1


class Middle(nn.Linear):
    """A linear layer that a class target can tell from the others."""


class CallsDecorated(nn.Linear):
    def forward(self, input):
        return with_half_the_gradient(F.linear(input, self.weight, self.bias))


class LinearThen(nn.Module):
    """A linear layer and a function."""

    def __init__(self, function):
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.function = function

    def forward(self, x):
        return self.function(self.linear(x))


@go.custom_backward(lambda grad_output, x: grad_output * x)
def square(x):
    return x * x


@go.custom_backward(lambda grad_output, vjp: vjp(grad_output.clamp(-0.1, 0.1)))
def tanh(x):
    return torch.tanh(x)


def doubled_edit(x):
    return go.edit_gradient(x, lambda grad_output: 2 * grad_output)


def connected_sine(x):
    return go.connect(torch.sin(x.detach()), x, lambda grad_output, input: 3 * grad_output * input.cos())


@go.bridge(lambda grad_output, x: 3 * grad_output * numpy.cos(x))
def bridged_sine(x):
    return numpy.sin(x)


# --- the same by hand ---


class LinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, factors):
        ctx.save_for_backward(x, weight)
        ctx.factors = factors
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, grad_output):
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.factors
        grad_weight = None if of_weight is None else of_weight * grad_output.T @ x
        return of_x * grad_output @ weight, grad_weight, of_bias * grad_output.sum(0), None


class LinearByHand(nn.Linear):
    def __init__(self, factors):
        super().__init__(8, 8)
        self.factors = factors

    def forward(self, x):
        return LinearFunction.apply(x, self.weight, self.bias, self.factors)


class FunctionByHand(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, function, gradient):
        ctx.save_for_backward(x)
        ctx.gradient = gradient
        return function(x)

    @staticmethod
    def backward(ctx, grad_output):
        (x,) = ctx.saved_tensors
        return ctx.gradient(grad_output, x), None, None


def applied(function, gradient):
    return lambda x: FunctionByHand.apply(x, function, gradient)


# --- the list ---


class Net(nn.Module):
    """Two linear layers with the form between them; at will more of them, and one that not every rank uses."""

    def __init__(self, middle, *, spare=False, deep=False, checkpointed=False):
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.middle = middle
        if deep:
            self.third = nn.Linear(8, 8)
            self.fourth = nn.Linear(8, 8)
        self.last = nn.Linear(8, 4)
        if spare:
            self.spare = nn.Linear(6, 4)
        self.deep = deep
        self.checkpointed = checkpointed
        self.double()
        generator = torch.Generator().manual_seed(3)
        for _, parameter in sorted(self.named_parameters()):
            parameter.data.normal_(generator=generator)

    def forward(self, x, with_spare=False):
        h = torch.tanh(self.first(x))
        h = checkpoint(self.middle, h, use_reentrant=False) if self.checkpointed else self.middle(h)
        if self.deep:
            h = self.fourth(self.third(h))
        result = self.last(h)
        return result + self.spare(x) if with_spare else result


@dataclasses.dataclass(frozen=True, eq=False)
class Form:
    """A row. `rules` are those of an override, made for a model; a form without them is decorated."""

    name: str
    middle: Callable[[], nn.Module]
    by_hand: Callable[[], nn.Module]
    without: Callable[[], nn.Module]  # with the gradient of torch
    rules: Callable[[nn.Module], Any] | None = None

    def override(self, model):
        """Put the overrides of the form on `model`, from the inner to the outer one."""
        rules = self.rules(model)
        for one in rules if isinstance(rules, list) else [rules]:
            go.override(model, one)


def _middle(model):
    return next(module for name, module in model.named_modules() if name.rpartition(".")[2] == "middle")


def _linear(name, middle, factors, rules=None):
    return Form(name, lambda: middle(8, 8), lambda: LinearByHand(factors), lambda: nn.Linear(8, 8), rules)


def _function(name, function, forward, gradient, rules=None):
    return Form(
        name,
        lambda: LinearThen(function() if isinstance(function, type) else function),  # a module is a new one
        lambda: LinearThen(applied(forward, gradient)),
        lambda: LinearThen(forward),
        rules,
    )


FORMS = [
    _function("custom_backward on a function", square, torch.square, lambda grad, x: grad * x),
    _function(
        "custom_backward with vjp", tanh, torch.tanh, lambda grad, x: grad.clamp(-0.1, 0.1) * (1 - x.tanh() ** 2)
    ),
    _linear("custom_backward on forward, asking for parameters", ByMethod, (2, 3, 5)),
    _linear("custom_backward on forward, parameters left to autograd", ByMethodOfArgument, (2, 1, 1)),
    _linear("custom_backward on forward, a parameter stopped", ByMethodThatStops, (1, None, 1)),
    _linear("custom_backward on forward, with vjp.by_name", ByMethodWithVjp, (2, 2, 2)),
    _linear("class with backward", ByClass, (2, 3, 5)),
    _function("straight_through", go.straight_through(torch.round), torch.round, lambda grad, x: grad),
    _function(
        "straight_through with a surrogate",
        go.straight_through(torch.sign, surrogate=torch.tanh),
        torch.sign,
        lambda grad, x: grad * (1 - x.tanh() ** 2),
    ),
    _function("edit_gradient", doubled_edit, torch.clone, lambda grad, x: 2 * grad),
    _function("connect", connected_sine, torch.sin, lambda grad, x: 3 * grad * x.cos()),
    _function("bridge", bridged_sine, torch.sin, lambda grad, x: 3 * grad * x.cos()),
    _linear("override by instance", Middle, (2, 1, 1), lambda model: {_middle(model): doubled}),
    _linear("override by class", Middle, (2, 3, 5), lambda model: {Middle: of_torchs_linear}),
    _linear("override by glob", Middle, (2, 2, 2), lambda model: {"*middle": all_doubled}),
    _function(
        "override of a function",
        F.relu,
        torch.relu,
        lambda grad, x: grad.clamp(min=0) * (x > 0),
        lambda model: {F.relu: guided},
    ),
    _function(
        "override of a part, with vjp",
        nn.ReLU,
        torch.relu,
        lambda grad, x: grad.clamp(min=0) * (x > 0),
        lambda model: {nn.ReLU: guided},
    ),
    _linear("two nested overrides", Middle, (6, 1, 1), lambda model: [{_middle(model): doubled}, {Middle: tripled}]),
    _linear(
        "a decorated function inside an overridden module",
        CallsDecorated,
        (1, 0.5, 0.5),
        lambda model: {CallsDecorated: doubled},
    ),
]
