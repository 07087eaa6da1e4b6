"""Functions of torch as targets: every spelling, in a model and its parts. Contract, section 5."""

import asyncio
import contextlib
import copy
import functools
import inspect
import io
import math
import operator
import pickle
import re
import sys
import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
from oracles import closely, exactly, noise
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._higher_order_ops.map import map as map_over
from torch._higher_order_ops.scan import scan
from torch._higher_order_ops.while_loop import while_loop
from torch.nn.attention.flex_attention import flex_attention
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

import gradoverride as go
from gradoverride._core.torch_functions import functions
from overrides.models import GuidedByHand, doubled, gradient, guided, mlp, negated, tripled

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*should not be instantiated:DeprecationWarning",  # Dynamo's own doing, for any Function
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning",  # the same, in `torch.cond` in eager mode
)


@pytest.fixture(autouse=True)
def _nothing_compiled():
    torch._dynamo.reset()


class Calls(nn.Module):
    """A model that calls one function, within a part of its own."""

    def __init__(self, function, *parts):
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.function = function

    def forward(self, x):
        return self.function(self, x * 1)


@pytest.fixture
def x():
    return noise(5, 3)


RELUS = {
    "F.relu": lambda model, x: F.relu(x),
    "F.relu in place": lambda model, x: F.relu(x, inplace=True),
    "F.relu_": lambda model, x: F.relu_(x),
    "torch.relu": lambda model, x: torch.relu(x),
    "torch.relu_": lambda model, x: torch.relu_(x),
    "x.relu()": lambda model, x: x.relu(),
    "x.relu_()": lambda model, x: x.relu_(),
    "Tensor.relu": lambda model, x: torch.Tensor.relu(x),
    "written into the argument": lambda model, x: [x.relu_(), x][1],
    "nn.ReLU": lambda model, x: model.parts[0](x),
    "nn.ReLU in place": lambda model, x: model.parts[1](x),
}
TARGETS = [F.relu, F.relu_, torch.relu, torch.relu_, torch.Tensor.relu, torch.Tensor.relu_]


def relus(spelling):
    return Calls(RELUS[spelling], nn.ReLU(), nn.ReLU(inplace=True))


@pytest.mark.parametrize("spelling", RELUS)
class TestEverySpelling:
    @pytest.mark.parametrize("target", TARGETS, ids=lambda target: getattr(target, "__qualname__", target.__name__))
    def test_has_the_rule_whichever_is_the_target(self, spelling, target, x):
        model = relus(spelling)
        with go.override(model, {target: guided}) as plan:
            closely(gradient(model, x), gradient(GuidedByHand(), x))
            assert [(row.path, row.target, row.calls) for row in plan.table] == [
                ("(the model)", "function 'relu'", "1")
            ]

    def test_has_a_rule_of_the_gradient_alone(self, spelling, x):
        model = relus(spelling)
        with go.override(model, {F.relu: negated}):
            closely(gradient(model, x), -torch.linspace(-1, 1, 15, dtype=torch.float64).view(5, 3))

    def test_has_one_rule_beside_that_of_the_class(self, spelling, x):
        model = relus(spelling)
        plain = gradient(model, x)
        with go.override(model, {nn.ReLU: doubled, torch.relu: doubled}):
            closely(gradient(model, x), 2 * plain)

    @pytest.mark.parametrize("backend", ["eager", "aot_eager"])
    @pytest.mark.parametrize("rules", [{F.relu: guided}, {nn.ReLU: guided, F.relu: guided}], ids=["F.relu", "both"])
    def test_has_the_rule_in_one_compiled_graph(self, spelling, x, backend, rules):
        model = relus(spelling)
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        plain = gradient(model, x)
        closely(gradient(compiled, x), plain)
        with go.override(model, rules):
            closely(gradient(compiled, x), gradient(GuidedByHand(), x))
        closely(gradient(compiled, x), plain)

    def test_is_the_plain_one_afterwards(self, spelling, x):
        model = relus(spelling)
        plain = gradient(model, x)
        with go.override(model, {F.relu: doubled}):
            gradient(model, x)
        exactly(gradient(model, x), plain)


OPERATORS = {
    torch.add: [lambda x, y: x + y, operator.iadd, torch.Tensor.add, torch.Tensor.add_],
    torch.sub: [lambda x, y: x - y, operator.isub, torch.subtract, torch.Tensor.sub_],
    torch.mul: [lambda x, y: x * y, operator.imul, torch.multiply, torch.Tensor.mul_],
    torch.div: [lambda x, y: x / y, operator.itruediv, torch.true_divide, torch.Tensor.div_],
    torch.pow: [lambda x, y: x**y, operator.ipow, pow, torch.Tensor.pow],
    torch.matmul: [lambda x, y: x @ y, torch.Tensor.matmul],
}


@pytest.mark.parametrize(
    ("target", "operation"), [(target, one) for target, operations in OPERATORS.items() for one in operations]
)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_operators_are_spellings(target, operation, compiled):
    def to_both(grad_output, vjp):
        first, second = vjp(grad_output)
        return 2 * first, 3 * second

    class Pair(nn.Module):
        def forward(self, x, y):
            return operation(x.clone(), y)

    x, y = noise(3, 3).abs().requires_grad_(), (noise(3, 3).abs() + 1).requires_grad_()
    model, weights = Pair(), noise(3, 3)
    model = torch.compile(model, backend="eager", fullgraph=True) if compiled else model
    first, second = torch.autograd.grad((model(x, y) * weights).sum(), [x, y])
    with go.override(model, {target: to_both}):
        found = torch.autograd.grad((model(x, y) * weights).sum(), [x, y])
    closely(found[0], 2 * first)
    closely(found[1], 3 * second)


@pytest.mark.parametrize(
    ("target", "operation"),
    [
        (torch.add, operator.iadd),
        (torch.sub, operator.isub),
        (torch.mul, operator.imul),
        (torch.div, operator.itruediv),
        (torch.pow, lambda x, _: operator.ipow(x, 2)),
        (torch.add, torch.Tensor.add_),
    ],
    ids=["+=", "-=", "*=", "/=", "**=", "add_"],
)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_an_operator_in_place_is_refused_where_the_rule_asks_for_what_it_overwrites(target, operation, compiled):
    class Pair(nn.Module):
        def forward(self, x, y):
            return operation(x * 1, y)

    x, y, model = noise(3, 3).abs().detach().requires_grad_(), noise(3, 3), Pair()
    model = torch.compile(model, backend="eager", fullgraph=True) if compiled else model
    with (
        go.override(model, {target: lambda grad_output, input: (grad_output * input, None)}),
        pytest.raises(Exception, match=r"overwrites its argument '.*' in place, and its rule .* asks for 'input'"),
    ):
        model(x, y)  # Python would take `x + y` in its place, with an x that y has been added to


@pytest.mark.parametrize(
    ("target", "operation"),
    [
        (torch.add, lambda x: 2 + x),
        (torch.sub, lambda x: 2 - x),
        (torch.mul, lambda x: 2 * x),
        (torch.div, lambda x: 2 / x),
        (torch.sub, lambda x: torch.Tensor.__rsub__(x, 2)),
        (torch.div, lambda x: torch.Tensor.__rtruediv__(x, 2)),
        (torch.pow, lambda x: 2**x),
        (torch.pow, lambda x: pow(2, x)),
        (torch.pow, lambda x: pow(x, 2)),
        (torch.pow, lambda x: pow(base=x, exp=2.0)),
        (torch.remainder, lambda x: 5 % x),
        (torch.neg, lambda x: -x),
        (torch.neg, operator.neg),
        (torch.abs, abs),
        (torch.abs, operator.abs),
        (torch.abs, lambda x: x.__abs__()),
        (torch.abs, lambda x: next(map(abs, [x]))),
        (torch.abs, lambda x: functools.partial(abs)(x)),
        (torch.flip, lambda x: x.__reversed__()),
        (torch.sigmoid, torch.special.expit),
        (torch.clamp, lambda x: x.clip(min=0.1)),
        (torch.where, lambda x: x.where(x > 0, 0)),
        (torch.where, lambda x: torch.where(x > 0, x, 0)),
    ],
)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_numbers_and_other_names_too(target, operation, compiled, x):
    model = Calls(lambda _, x: operation(x))
    model = torch.compile(model, backend="eager", fullgraph=True) if compiled else model
    with go.override(model, {target: lambda grad_output: grad_output}):
        closely(gradient(model, x), torch.linspace(-1, 1, 15, dtype=torch.float64).view(5, 3))


@pytest.mark.parametrize("everywhere", [False, True], ids=["in a model", "everywhere"])
def test_builtins_of_python_are_spellings_in_compiled_code(everywhere, x):
    def step(x):
        return abs(x) * pow(x, 2) + abs(x.shape[0] - 7) * pow(2, 3, 5) * pow(x.shape[0], 2)

    model = torch.compile(Calls(lambda _, x: step(x)), backend="aot_eager", fullgraph=True)
    expected = gradient(lambda x: 3 * x.abs() * x.detach() ** 2 + 5 * x**2 * x.detach().abs(), x)
    rules = {torch.abs: tripled, torch.pow: lambda grad_output, vjp: 5 * vjp(grad_output)}
    with go.override(rules) if everywhere else go.override(model, rules):
        closely(gradient(model, x), expected)
    closely(gradient(model, x), gradient(step, x))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("everywhere", [False, True], ids=["in a model", "everywhere"])
def test_what_python_chooses_has_the_rule_of_no_function(everywhere, compiled, x):
    def step(x):
        first, second, third = x[0, 0], x[0, 1], torch.maximum(x[0, 2], x[1, 0])
        return max(first, second, third) + 2 * min(first, second) + 3 * max(first, -9.0) + 4 * third

    def by_hand(x):
        first, second = x[0, 0], x[0, 1]
        third = x[0, 2] if x[0, 2] > x[1, 0] else x[1, 0]
        third = third.detach() + 3 * (third - third.detach())
        return max(first, second, third) + 2 * min(first, second) + 3 * max(first, -9.0) + 4 * third

    model = Calls(lambda _, x: step(x))
    called = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    rules = {torch.maximum: tripled_each, torch.minimum: tripled_each, torch.clamp: tripled}
    expected = torch.autograd.grad(by_hand(x.requires_grad_()), x)[0]
    told = pytest.warns(go.GradOverrideWarning, match="of the function 'clamp' never ran while it was in force")
    with told, go.override(rules) if everywhere else go.override(model, rules):
        result = called(x)
    closely(torch.autograd.grad(result, x)[0], expected)


class Doubling(torch.Tensor):
    """A tensor with an operator of its own."""

    def __rsub__(self, other):
        return super().__rsub__(other) * 2


def test_operators_called_by_their_names_mean_in_compiled_code_what_they_meant(x):
    def step(x):
        return torch.Tensor.__rsub__(x, 2) + torch.Tensor.__rsub__(x, x + 1) + torch.Tensor.__rtruediv__(x, 2)

    with go.override({torch.relu: doubled}):
        torch.relu(x)
        closely(torch.compile(step, backend="eager", fullgraph=True)(x), (2 - x) + 1 + 2 / x)
    with pytest.raises(Exception, match="__torch_function__ overrides"):  # torch does not find that of the class
        torch.compile(lambda x: 2 - x, backend="eager", fullgraph=True)(x.detach().as_subclass(Doubling))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("everywhere", [False, True], ids=["in a model", "everywhere"])
def test_a_product_of_python_calls_what_is_overridden(everywhere, compiled, x):
    model = Calls(lambda _, x: math.prod([x, x.detach()], start=2) + math.prod([2, 3]))
    called = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    plain = gradient(model, x)
    rules = {torch.mul: tripled_each}
    with go.override(rules) if everywhere else go.override(model, rules):
        result = called(x)
    weights = torch.linspace(-1, 1, 15, dtype=torch.float64).view(5, 3)
    closely(torch.autograd.grad((result * weights).sum(), x)[0], 27 * plain)
    with go.override(model, {torch.add: tripled}):
        closely(gradient(called, x), 3 * plain)


def test_a_rule_for_what_iteration_calls_is_refused_in_compiled_code(x):
    model = Calls(lambda _, x: sum(x))
    with go.override(model, {torch.unbind: lambda grad_output: torch.stack(grad_output) * 3}):
        closely(gradient(model, x), 3 * gradient(lambda x: sum(x), x))
        with pytest.raises(go.UnsupportedError, match="override of function 'unbind': its calls must be seen, and"):
            torch.compile(model, backend="eager", fullgraph=True)(x)


@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.parametrize("everywhere", [False, True], ids=["in a model", "everywhere"])
def test_a_rule_for_iteration_is_refused_in_compiled_code_that_calls_nothing_else(everywhere, fullgraph, x):
    part = torch.compile(lambda x: next(iter(x)), backend="eager", fullgraph=fullgraph)
    model = Calls(lambda _, x: part(x))
    first = F.one_hot(torch.tensor(0), 5).double()[:, None].expand(5, 3)
    weights = torch.linspace(-1, 1, 3, dtype=torch.float64)
    x.requires_grad_()
    closely(torch.autograd.grad((model(x) * weights).sum(), x)[0], first * weights)
    rules = {torch.unbind: lambda grad_output: torch.stack(grad_output) * 3}
    told = pytest.warns(go.GradOverrideWarning, match="never ran")
    refused = pytest.raises(go.UnsupportedError, match="override of function 'unbind': its calls must be seen, and")
    with told, go.override(rules) if everywhere else go.override(model, rules), refused:
        part(x) if everywhere else model(x)
    closely(torch.autograd.grad((model(x) * weights).sum(), x)[0], first * weights)


class Numbers:
    """An object with operators of its own."""

    def __abs__(self):
        return 7

    def __pow__(self, other, mod=None):
        return other if mod is None else other * mod


def test_builtins_of_python_mean_in_compiled_code_what_they_meant(x):
    number = Numbers()

    def step(x):
        found = abs(number) * pow(number, 3) * pow(number, 3, 2) + abs(3 + 4j) + abs(-2.5) + pow(2, -1, 5)
        return x * found * max([1, -3], key=abs) + abs(x) * x.shape[0]

    compiled = torch.compile(step, backend="eager", fullgraph=True, dynamic=True)
    with go.override({torch.relu: doubled}):
        closely(compiled(x), step(x))
        with pytest.raises(Exception, match=r"."):
            torch.compile(lambda x: pow(x, 2, 3), backend="eager", fullgraph=True)(x)
        torch.relu(x)


def test_the_arguments_of_where_stand_in_one_order():
    class Chosen(nn.Module):
        def forward(self, x, y):
            return x.where(x > 0, y), torch.where(x > 0, x, y)

    def swapped(grad_output, vjp):
        condition, first, second = vjp(grad_output)
        assert condition is None
        return None, 2 * first, 3 * second

    x, y, model = noise(4).requires_grad_(), noise(4).requires_grad_(), Chosen()
    for which in (0, 1):
        with go.override(model, {torch.where: swapped}):
            found = torch.autograd.grad(model(x, y)[which].sum(), [x, y])
        closely(found[0], 2 * (x > 0).double())
        closely(found[1], 3 * (x <= 0).double())


@pytest.mark.parametrize(
    "call",
    [
        lambda x, y: x.where(condition=x > 0, other=y),
        lambda x, y: x.where(x > 0, other=y),
        lambda x, y: torch.Tensor.where(x, other=y, condition=x > 0),
        lambda x, y: torch.where(x > 0, x, other=y),
    ],
)
def test_the_arguments_of_where_may_be_given_by_name(call):
    class Chosen(nn.Module):
        def forward(self, x, y):
            return call(x, y)

    x, y, model = noise(4), noise(4), Chosen()
    with go.override(model, {torch.where: tripled_each}):
        found = torch.autograd.grad(model(x, y).sum(), [x, y])
    closely(found, (3 * (x > 0).double(), 3 * (x <= 0).double()))


SPACES = {"F": F, "torch": torch, "Tensor": torch.Tensor}
SEPARATE = {"batch_norm", "bernoulli_", "embedding", "embedding_bag", "instance_norm", "normal_", "unfold"}


@pytest.mark.parametrize("space", SPACES)
def test_each_function_is_known_by_the_name_that_it_has_there_or_by_one_that_is_listed(space):
    for attribute in dir(SPACES[space]):
        value = getattr(SPACES[space], attribute)
        if attribute.startswith("_") or isinstance(value, type) or not callable(value):
            continue
        found = functions.name_of_function(value)
        if found is not None and not found.startswith("_"):
            own = attribute.rstrip("_")
            assert found.rpartition(".")[2].rstrip("_") == functions._ALIASES.get(own, own)


def test_what_bears_one_name_in_two_places_is_one_function():
    for attribute in sorted({name for space in SPACES.values() for name in dir(space)} - SEPARATE):
        found = [getattr(space, attribute, None) for space in SPACES.values()]
        named = {functions.name_of_function(one) for one in found if callable(one) and not isinstance(one, type)}
        assert attribute.startswith("_") or len(named - {None}) <= 1, (attribute, named)


@pytest.mark.parametrize("target", [torch.mm, torch.Tensor.mm, torch.spmm, torch.dsmm])
@pytest.mark.parametrize("call", [torch.mm, torch.Tensor.mm, torch.dsmm])
def test_the_matrix_product_is_one_function_under_its_names(x, target, call):
    other = noise(3, 2, grad=False)
    model = Calls(lambda _, x: call(x, other))
    plain = gradient(model, x)
    with go.override(model, {target: tripled_each}):
        closely(gradient(model, x), 3 * plain)


def tripled_each(grad_output, vjp):
    found = vjp(grad_output)
    return 3 * found if isinstance(found, torch.Tensor) else tuple(None if one is None else 3 * one for one in found)


def test_a_rule_may_go_for_each_function_that_has_a_name_for_its_calls_are_seen():
    for space in (*SPACES.values(), torch.linalg, torch.special, torch.fft):
        for attribute in dir(space):
            value = getattr(space, attribute)
            if callable(value) and not isinstance(value, type) and functions.name_of_function(value) is not None:
                seen = functions.spellings(functions.name_of_function(value))
                assert value in seen or value in (F.sigmoid, F.tanh)


@pytest.mark.parametrize("space", [torch, torch.linalg, torch.special])
def test_what_torch_documents_as_an_alias_is_one_function_with_the_other(space):
    known = {"torch": torch, "torch.linalg": torch.linalg, "torch.special": torch.special, "torch.nn.functional": F}
    for attribute in dir(space):
        value = getattr(space, attribute)
        documented = re.match(r"[^:]*\n\s*Alias for :func:`(torch[\w.]*)\.(\w+)`\.?\s*$", str(value.__doc__))
        if documented is not None and callable(value):
            other = getattr(known[documented[1]], documented[2])
            assert functions.name_of_function(value) == functions.name_of_function(other) is not None


ONE_FUNCTION = {
    "unflatten": (torch.unflatten, lambda x: x.unflatten(0, (5, 1))),
    "unflatten as the target": (torch.Tensor.unflatten, lambda x: torch.unflatten(x, 0, (5, 1))),
    "as_strided": (torch.Tensor.as_strided, lambda x: torch.as_strided(x, (2, 2), (1, 1))),
    "inverse": (torch.inverse, lambda x: torch.linalg.inv(x.T @ x)),
    "matrix_power": (torch.linalg.matrix_power, lambda x: (x.T @ x).matrix_power(2)),
    "matrix_exp": (torch.linalg.matrix_exp, lambda x: (x.T @ x).matrix_exp()),
    "slogdet": (torch.linalg.slogdet, lambda x: (x.T @ x).slogdet()[1]),
    "mvlgamma": (torch.special.multigammaln, lambda x: (x.abs() + 2).mvlgamma(2)),
    "polygamma": (torch.special.polygamma, lambda x: torch.polygamma(2, x.abs() + 1)),
    "polygamma of a tensor": (torch.polygamma, lambda x: (x.abs() + 1).polygamma(2)),
    "polygamma by name": (torch.polygamma, lambda x: (x.abs() + 1).polygamma(n=2)),
    "polygamma in place": (torch.polygamma, lambda x: (x.abs() + 1).polygamma_(2)),
}


@pytest.mark.parametrize("name", ONE_FUNCTION)
def test_other_names_of_a_function_have_its_rule(x, name):
    target, call = ONE_FUNCTION[name]
    model = Calls(lambda _, x: call(x))
    plain = gradient(model, x)
    with go.override(model, {target: tripled_each}):
        closely(gradient(model, x), 3 * plain)


POOLS = {
    "max_pool1d": lambda x, **given: F.max_pool1d(x[None], 2, **given),
    "max_pool2d": lambda x, **given: F.max_pool2d(x[None], 2, **given),
    "max_pool3d": lambda x, **given: F.max_pool3d(x[None, None], (1, 2, 2), **given),
    "adaptive_max_pool1d": lambda x, **given: F.adaptive_max_pool1d(x[None], 2, **given),
    "adaptive_max_pool2d": lambda x, **given: F.adaptive_max_pool2d(x[None], 2, **given),
    "adaptive_max_pool3d": lambda x, **given: F.adaptive_max_pool3d(x[None, None], (1, 2, 2), **given),
    "fractional_max_pool2d": lambda x, **given: F.fractional_max_pool2d(x[None], 2, output_size=2, **given),
}


@pytest.mark.parametrize("name", POOLS)
@pytest.mark.parametrize("return_indices", [False, True])
def test_max_pooling_has_its_rule_whether_it_gives_the_indices_or_not(x, name, return_indices):
    def call(_, x):
        torch.manual_seed(0)
        found = POOLS[name](x, return_indices=return_indices)
        return found[0] if return_indices else found

    model = Calls(call)
    plain = gradient(model, x)
    with go.override(model, {getattr(F, name): tripled_each}):
        closely(gradient(model, x), 3 * plain)


class TestWhatIsNotASpelling:
    def test_unfold_of_a_tensor_is_not_that_of_images(self):
        model = Calls(lambda _, x: x.unfold(0, 2, 1).sum((1, 2)))
        x = noise(5, 3)
        plain = gradient(model, x)
        with pytest.warns(go.GradOverrideWarning, match="never ran"), go.override(model, {F.unfold: negated}):
            exactly(gradient(model, x), plain)


class TestWhatTorchCallsItself:
    """Functions of torch in Python call others: these are seen as well."""

    @pytest.fixture
    def attention(self):
        torch.manual_seed(0)
        return nn.MultiheadAttention(4, 2, batch_first=True).double()

    def by_hand(self, attention, x, scale):
        """Self-attention with the gradients of its two projections scaled."""

        def scaled(y):
            return Scaled.apply(y, scale)

        class Scaled(torch.autograd.Function):
            @staticmethod
            def forward(ctx, y, scale):
                ctx.scale = scale
                return y.clone()

            @staticmethod
            def backward(ctx, grad_output):
                return grad_output * ctx.scale, None

        projected = scaled(x @ attention.in_proj_weight.T + attention.in_proj_bias)
        q, k, v = (part.view(2, 3, 2, 2).transpose(1, 2) for part in projected.split(4, -1))
        weights = torch.softmax(q @ k.transpose(-1, -2) / 2**0.5, -1)
        mixed = (weights @ v).transpose(1, 2).reshape(2, 3, 4)
        return scaled(mixed @ attention.out_proj.weight.T + attention.out_proj.bias)

    @pytest.mark.parametrize("need_weights", [True, False])
    @pytest.mark.parametrize("compiled", [False, True])
    def test_the_projections_of_attention_have_the_rule_of_linear(self, attention, need_weights, compiled):
        def tenfold(grad_output, vjp):
            return tuple(None if grad is None else 10 * grad for grad in vjp(grad_output))

        x = noise(2, 3, 4)
        model = Calls(lambda model, x: model.parts[0](x, x, x, need_weights=need_weights)[0], attention)
        expected = gradient(lambda x: self.by_hand(attention, x, 10), x)
        call = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
        with go.override(model, {F.linear: tenfold}) as plan:
            closely(gradient(call, x), expected)
            assert plan.table[0].calls == ("compiled" if compiled else "2")

    def test_the_fast_path_of_an_encoder_layer_is_not_taken_where_it_would_pass_the_rule_by(self):
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True).double().eval()

        def cut(x):
            first = layer.norm1(x + layer.self_attn(x, x, x)[0])
            return layer.norm2(first + layer.linear2(layer.linear1(first).relu().detach()))

        x = noise(2, 3, 4)
        with go.override(layer, {F.relu: lambda grad_output: torch.zeros_like(grad_output)}) as plan:
            closely(gradient(layer, x), gradient(cut, x))
            assert plan.table[0].calls == "1"


def scaled(grad_output, vjp):
    """Three times the gradient, whatever arguments the function takes."""
    return threefold(vjp(grad_output))


def threefold(found):
    if isinstance(found, (tuple, list)):
        return type(found)([threefold(part) for part in found])
    return None if found is None else 3 * found


class Tripled(torch.autograd.Function):
    """The identity with a threefold gradient, to be put around a call by hand."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad_output):
        return 3 * grad_output


around = Tripled.apply
# By module of torch: a function that it calls, and the module written by hand with a threefold gradient around that.
CALLED_WITHIN = {
    "RNNCell": (
        lambda: nn.RNNCell(3, 3),
        torch.rnn_tanh_cell,
        lambda m, x: around(torch.tanh(F.linear(x, m.weight_ih, m.bias_ih) + m.bias_hh)),
    ),
    "GRUCell": (lambda: nn.GRUCell(3, 3), torch.gru_cell, lambda m, x: around(m(x))),
    "LSTM": (lambda: nn.LSTM(3, 3), torch.lstm, lambda m, x: around(m(x)[0])),
    "GRU": (lambda: nn.GRU(3, 3), torch.gru, lambda m, x: around(m(x)[0])),
    "RNN": (lambda: nn.RNN(3, 3), torch.rnn_tanh, lambda m, x: around(m(x)[0])),
    "Tanhshrink": (nn.Tanhshrink, torch.tanh, lambda m, x: x - around(torch.tanh(x))),
    "Softsign": (nn.Softsign, torch.abs, lambda m, x: x / (1 + around(x.abs()))),
    "Softmin": (lambda: nn.Softmin(dim=-1), torch.neg, lambda m, x: torch.softmax(around(-x), -1)),
    "LPPool1d": (
        lambda: nn.LPPool1d(2, 2),
        F.avg_pool1d,
        lambda m, x: (2 * around(x.pow(2).unfold(1, 2, 2).mean(-1))).sqrt(),
    ),
}


class TestModulesOfTorchThatAreCalledDirectly:
    """Each has the rule for what its code calls, as it has within a parent."""

    @pytest.mark.parametrize("name", CALLED_WITHIN)
    def test_have_the_rules_for_what_they_call(self, name, x):
        make, target, by_hand = CALLED_WITHIN[name]
        model = make().double()

        def run(x):
            result = model(x)
            return result[0] if isinstance(result, tuple) else result

        expected = gradient(lambda x: by_hand(model, x), x)
        with go.override(model, {target: scaled}) as plan:
            closely(gradient(run, x), expected)
        assert [row.calls for row in plan.table] == ["1"]
        with go.override(nn.ModuleList([model]), {target: scaled}):
            closely(gradient(run, x), expected)

    def test_have_them_in_a_loss_too(self, x):
        target = noise(5, 3, grad=False)
        variance = noise(5, 3).detach().exp().requires_grad_()
        by_hand = (0.5 * (around(variance.log()) + (x - target) ** 2 / variance)).mean()
        (expected,) = torch.autograd.grad(by_hand, variance)
        loss = nn.GaussianNLLLoss()
        with go.override(loss, {torch.log: tripled}):
            closely(torch.autograd.grad(loss(x, target, variance), variance)[0], expected)

    def test_have_those_of_an_import_path_in_torch(self):
        model, x = nn.Conv2d(2, 2, 3).double(), noise(1, 2, 5, 5)
        expected = 3 * gradient(model, x)
        with go.override(model, {"torch.nn.modules.conv:Conv2d._conv_forward": scaled}):
            closely(gradient(model, x), expected)

    @pytest.mark.parametrize("where", ["model", "part", "process"])
    def test_have_them_for_what_a_function_calls_that_they_were_given(self, where, x):
        def distance(one, other):
            return 1 - F.cosine_similarity(one, other)

        def by_hand(x):
            near, far = [1 - around(F.cosine_similarity(x, other)) for other in (x.cos(), x.exp())]
            return (near - far + 5).clamp(min=0).mean()

        loss = nn.TripletMarginWithDistanceLoss(distance_function=distance, margin=5.0)
        model = Calls(lambda model, x: model.parts[0](x, x.cos(), x.exp()), loss)
        rules = {F.cosine_similarity: scaled}
        expected = gradient(by_hand, x)
        places = {"model": (model, rules), "part": (loss, rules), "process": (rules,)}
        with go.override(*places[where]) as plan:
            closely(gradient(model, x), expected)
        assert [row.calls for row in plan.table] == ["2"]

    def test_are_left_alone_where_they_do_not_call_it(self):
        model = nn.ModuleList([nn.Linear(3, 3), nn.ReLU(), nn.BatchNorm1d(3), nn.Conv1d(3, 3, 1), nn.LSTM(3, 3)])
        classes = [type(part) for part in model]
        with pytest.warns(go.GradOverrideWarning, match="never ran"), go.override(model, {F.gelu: tripled}):
            assert [type(part) for part in model] == classes


@pytest.mark.parametrize("call", [torch.norm, torch.Tensor.norm], ids=["torch.norm", "Tensor.norm"])
def test_what_functions_of_torch_call_that_call_others_has_its_rule(call, x):
    model = Calls(lambda model, x: call(x, dim=-1))
    expected = gradient(lambda x: around(x.pow(2).sum(-1).sqrt()), x)
    with go.override(model, {torch.linalg.vector_norm: scaled}):
        closely(gradient(model, x), expected)


class TestOrder:
    """Overrides nest: the later one is outside, whichever has the function and whichever the module."""

    @staticmethod
    def told(name, told, factor):
        def rule(grad_output, vjp):
            told.append(name)
            return factor * vjp(grad_output)

        return rule

    def in_order(self, model, x, first, second):
        told = []
        rules = [{target: self.told(name, told, 2)} for name, target in (("first", first), ("second", second))]
        plain = gradient(model, x)
        with go.override(model, rules[0]), go.override(model, rules[1]):
            closely(gradient(model, x), 4 * plain)
        assert told == ["second", "first"]

    @pytest.mark.parametrize("second", [F.relu, nn.ReLU, torch.relu_])
    @pytest.mark.parametrize("first", [F.relu, nn.ReLU, torch.relu_])
    @pytest.mark.parametrize("spelling", ["nn.ReLU", "nn.ReLU in place"])
    def test_the_later_one_is_outside(self, x, spelling, first, second):
        self.in_order(relus(spelling), x, first, second)

    @pytest.mark.parametrize("spelling", ["F.relu", "x.relu_()"])
    def test_of_two_functions_too(self, x, spelling):
        self.in_order(relus(spelling), x, F.relu, torch.relu)

    def test_three_deep_on_a_part_and_the_whole(self, x):
        inner = relus("F.relu")
        model, told = nn.Sequential(inner), []
        with (
            go.override(inner, {F.relu: self.told("part", told, 2)}),
            go.override(model, {F.relu: self.told("whole", told, 3)}),
            go.override(inner, {F.relu: self.told("part again", told, 5)}),
        ):
            gradient(model, x)
        assert told == ["part again", "whole", "part"]

    def test_removal_out_of_order(self, x):
        model = relus("F.relu")
        plain = gradient(model, x)
        first = go.override(model, {F.relu: doubled})
        second = go.override(model, {F.relu: tripled})
        closely(gradient(model, x), 6 * plain)
        first.remove()
        closely(gradient(model, x), 3 * plain)
        second.remove()
        exactly(gradient(model, x), plain)

    def test_one_rule_several_times_where_the_first_has_gone_meanwhile(self, x):
        inner = relus("F.relu")
        model = nn.Sequential(inner)
        plain = gradient(model, x)
        first = go.override(model, {F.relu: doubled})
        with go.override(model, {F.relu: doubled}):
            closely(gradient(model, x), 4 * plain)
            first.remove()
            with go.override(inner, {F.relu: doubled}):
                closely(gradient(model, x), 4 * plain)
            closely(gradient(model, x), 2 * plain)

    def test_a_rule_that_cannot_be_outside_is_refused_and_nothing_is_changed(self, x):
        model = nn.Sequential(nn.Linear(3, 3)).double()
        with go.override(model, {nn.Linear: doubled}):
            gradient(model, x)
            before = copy.copy(model[0].__dict__)
            with pytest.raises(go.UnsupportedError, match=r"(?s)'linear'.*must be outside.*target 'Linear'"):
                go.override(model, {F.linear: tripled})
            assert model[0].__dict__ == before

    def test_what_is_wrong_with_a_rule_that_is_to_be_outside_is_said_and_nothing_is_changed(self, x):
        class Named(nn.Module):
            def forward(self, output):
                return F.relu(output)

        model = nn.Sequential(Named())
        with go.override(model, {Named: doubled}):
            gradient(model, x)
            before = copy.copy(model[0].__dict__)
            with pytest.raises(go.RuleSignatureError, match=r"asks for 'output', which is a parameter of 'Named'"):
                go.override(model, {F.relu: lambda grad_output, output: grad_output})
            assert model[0].__dict__ == before

    def test_a_part_with_a_forward_of_another_party_keeps_it_and_what_that_calls_has_the_rule(self, x):
        model = nn.Sequential(nn.ReLU(), nn.Identity())
        model[0].forward = theirs = lambda x: 5 * F.relu(x)
        plain = gradient(model, x)
        with go.override(model, {F.relu: doubled}):
            assert model[0].__dict__["forward"] is theirs
            closely(gradient(model, x), 2 * plain)
        assert model[0].__dict__["forward"] is theirs

    def test_a_lazy_part_has_the_rule_before_and_after_it_gets_its_parameters(self, x):
        model = nn.Sequential(nn.LazyLinear(3), nn.Identity()).double()
        with go.override(model, {F.linear: lambda grad_output, vjp: vjp(2 * grad_output)}):
            first = gradient(model, x)
            exactly(gradient(model, x), first)
            assert vars(model[0]).keys() == vars(nn.Linear(3, 3)).keys()
        closely(first, 2 * gradient(model, x))

    def test_a_class_of_torch_whose_forward_another_party_has_replaced_may_call_any(self, monkeypatch, x):
        theirs = F.relu
        monkeypatch.setattr(nn.Tanh, "forward", lambda self, x: theirs(x))
        model = nn.Tanh()
        plain = gradient(model, x)
        with go.override(model, {F.relu: doubled}):
            closely(gradient(model, x), 2 * plain)

    def test_the_same_override_has_the_module_of_its_own_rule(self, x):
        model = nn.Sequential(nn.Linear(3, 3)).double()
        plain = gradient(model, x)
        with (
            pytest.warns(go.GradOverrideWarning, match=r"'negated' .* of the function 'linear' never ran"),
            go.override(model, {nn.Linear: doubled, F.linear: negated}),
        ):
            closely(gradient(model, x), 2 * plain)

    def test_a_call_inside_of_an_overridden_container_is_one_of_its_own(self, x):
        class Block(nn.Module):
            def forward(self, x):
                hidden = F.relu(x)
                return hidden + hidden

        model = nn.Sequential(Block())
        plain = gradient(model, x)
        with go.override(model, {Block: doubled, F.relu: tripled}):
            closely(gradient(model, x), 6 * plain)

    def test_of_several_entries_for_a_function_the_later_wins(self, x):
        model = relus("F.relu")
        plain = gradient(model, x)
        with go.override(model, {F.relu: doubled, torch.relu: tripled}):
            closely(gradient(model, x), 3 * plain)


class BySuper(nn.ReLU):
    def forward(self, x):
        return super().forward(x)


class BySuperOfAName(nn.ReLU):
    def forward(self, x):
        return super(BySuperOfAName, self).forward(x)  # noqa: UP008  # as it used to be written


class BySuperTwice(BySuper):
    def forward(self, x):
        y = super().forward(x)
        return y


class Inherited(BySuper):
    """Has no forward of its own."""


class ByName(nn.Module):
    def forward(self, x):
        y = F.relu(x)
        return y


class ByAMethod(nn.Module):
    def forward(self, x):
        return self.apply_to(x)

    def apply_to(self, x):
        return x.relu()


class ByAnAttribute(nn.Module):
    function = staticmethod(F.relu)

    def forward(self, x):
        return self.function(x)


class ByAnAttributeOfAnotherName(nn.Module):
    function = staticmethod(F.relu)

    def forward(self, x):
        y = x
        return self.function(y)


class Holding(nn.Module):
    """Has its function for itself, as the activations of Hugging Face have."""

    def __init__(self, function=F.relu):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def block(x):
    return F.relu(x * 2 - 1).sin()


class CallsBlock(nn.Module):
    def forward(self, x):
        return block(x)


class Scaled(nn.Module):
    def forward(self, x):
        return 1 * F.relu(x)


class ScaledBySuper(nn.ReLU):
    def forward(self, x):
        return super().forward(x) * 1


class Zeroed(nn.Module):
    def forward(self, x):
        y = torch.neg(x)
        y[1:] = 0
        return y


class Positive(nn.Module):
    def forward(self, x):
        return +F.relu(x)


class Turned(nn.Module):
    def forward(self, x):
        y = F.relu(x)
        return y.T


class LargestByName(nn.Module):
    def forward(self, x):
        return x.max(0).values


class LargestUnpacked(nn.Module):
    def forward(self, x):
        values, _ = torch.max(x, 0)
        return values


class InADict(nn.Module):
    def forward(self, x):
        y = F.relu(x)
        return {"sum": y}


class InATuple(nn.Module):
    def forward(self, x):
        return F.relu(x), x.shape


class ManyTimes(nn.Module):
    def forward(self, x):
        for _ in range(1):
            x = F.relu(x)
        return x


class Around(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = ByName()

    def forward(self, x):
        return self.inner(x)


class Standardised(nn.Conv1d):
    def _conv_forward(self, input, weight, bias):
        return F.conv1d(input, weight - weight.mean(), bias)


class OwnForward(nn.Conv1d):
    def forward(self, input):
        return super().forward(input)


def thrice(found):
    if isinstance(found, torch.Tensor):
        return 3 * found
    return type(found)(map(thrice, found)) if isinstance(found, (list, tuple)) else found


class TestOneRulePerCall:
    """A module whose forward is a call of a function and nothing else is that call: it has one rule of an override."""

    @pytest.mark.parametrize(
        "cls",
        [
            *(BySuper, BySuperOfAName, BySuperTwice, Inherited, ByName, ByAMethod, ByAnAttribute),
            *(ByAnAttributeOfAnotherName, nn.ReLU),
        ],
    )
    def test_a_module_that_is_nothing_but_a_call_has_that_of_its_class(self, x, cls):
        def of_the_function(grad_output, vjp):
            return 2 * vjp(grad_output)

        model, rules = cls(), {cls: tripled, F.relu: of_the_function}
        plain = gradient(model, x)
        with pytest.warns(go.GradOverrideWarning, match="of_the_function' .* never ran"), go.override(model, rules):
            closely(gradient(model, x), 3 * plain)
        with pytest.warns(go.GradOverrideWarning, match="of_the_function' .* never ran"), go.override(rules):
            closely(gradient(model, x), 3 * plain)

    @pytest.mark.parametrize("cls", [BySuper, BySuperOfAName, BySuperTwice, Inherited, ByName, ByAMethod])
    def test_a_later_rule_of_the_function_is_outside_of_one_of_the_class(self, x, cls):
        model, told = cls(), []
        plain = gradient(model, x)
        with (
            go.override(model, {cls: TestOrder.told("class", told, 2)}),
            go.override(model, {F.relu: TestOrder.told("function", told, 2)}),
        ):
            closely(gradient(model, x), 4 * plain)
        assert told == ["function", "class"]

    @pytest.mark.parametrize("cls", [Scaled, ScaledBySuper, Zeroed, Positive, Turned, ManyTimes, Around])
    def test_a_call_in_a_module_that_does_more_is_one_of_its_own(self, x, cls):
        model, rules = cls(), {cls: tripled, torch.neg if cls is Zeroed else F.relu: doubled}
        plain = gradient(model, x)
        with go.override(model, rules):
            closely(gradient(model, x), 6 * plain)
        with go.override(rules):
            closely(gradient(model, x), 6 * plain)

    @pytest.mark.parametrize("cls", [InADict, InATuple])
    def test_a_call_whose_result_is_returned_within_another_is_one_of_its_own(self, x, cls):
        model = cls()

        def part(x):
            result = model(x)
            return result["sum"] if isinstance(result, dict) else result[0]

        plain = gradient(part, x)
        passed = {cls: lambda grad_output, vjp: vjp(grad_output)}
        with go.override(model, passed | {F.relu: doubled}):
            closely(gradient(part, x), 2 * plain)
        with go.override(model, passed), go.override(model, {F.relu: doubled}):
            closely(gradient(part, x), 2 * plain)

    @pytest.mark.parametrize("cls", [LargestByName, LargestUnpacked])
    def test_a_call_of_whose_result_a_part_is_returned_is_one_of_its_own(self, x, cls):
        def of_the_function(grad_output, vjp):
            values, indices = grad_output  # as the function has them, not the module
            return vjp(type(grad_output)((2 * values, indices)))

        model = cls()
        plain = gradient(model, x)
        with go.override(model, {cls: tripled, torch.max: of_the_function}):
            closely(gradient(model, x), 6 * plain)
        with go.override(model, {cls: tripled}), go.override(model, {torch.max: of_the_function}):
            closely(gradient(model, x), 6 * plain)

    def test_a_function_that_is_held_by_the_name_of_another_is_the_one_that_is_called(self, x):
        class Held(nn.Module):
            def __init__(self):
                super().__init__()
                self.relu = F.gelu

            def forward(self, x):
                y = x
                return self.relu(y)

        model = Held()
        plain = gradient(model, x)
        with go.override(model, {Held: tripled}), go.override(model, {F.gelu: negated}):
            gradient(model, x)
        warned = pytest.warns(go.GradOverrideWarning, match="'relu' never ran")
        with warned, go.override(model, {Held: tripled}), go.override(model, {F.relu: doubled}):
            closely(gradient(model, x), 3 * plain)

    def test_a_function_that_a_module_of_a_model_holds_is_what_it_calls(self, x):
        def of_the_function(grad_output, vjp):
            return 2 * vjp(grad_output)

        for function, factor in ((F.relu, 3), (lambda x: F.relu(x), 6)):
            model = nn.Sequential(Holding(function))
            plain = gradient(model, x)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", go.GradOverrideWarning)  # the rule of the function never ran
                with go.override(model, {Holding: tripled, F.relu: of_the_function}):
                    closely(gradient(model, x), factor * plain)

    @pytest.mark.parametrize("whole", [False, True], ids=["in a model", "in the whole process"])
    @pytest.mark.parametrize("make", [CallsBlock, lambda: Holding(block), lambda: Holding(CallsBlock())])
    def test_functions_that_are_called_far_inside_have_their_rules_there(self, make, whole, x):
        """Where the rule is applied shows, for it is not linear."""
        model = nn.Sequential(make())
        weights, cls = torch.linspace(-3, 2, x.numel(), dtype=x.dtype).view_as(x), type(model[0])

        def plain(grad_output, vjp):
            return vjp(grad_output)

        def signs(grad_output, vjp):
            return vjp(grad_output.sign())

        def found(*rules):
            with contextlib.ExitStack() as stack:
                for each in rules:
                    stack.enter_context(go.override(each) if whole else go.override(model, each))
                return torch.autograd.grad((model(x) * weights).sum(), x)[0]

        inner = (x.detach() * 2 - 1).requires_grad_()
        (at_relu,) = torch.autograd.grad((F.relu(inner).sin() * weights).sum(), inner)
        outer = torch.autograd.grad((torch.sin(relu := F.relu(inner)) * weights).sum(), relu)[0]
        expected = 2 * outer.sign() * (inner > 0)
        closely(found({cls: plain}), 2 * at_relu)
        closely(found({cls: plain, F.relu: signs}), expected)
        closely(found({cls: plain}, {F.relu: signs}), expected)
        closely(found({F.relu: signs}, {cls: plain}), expected)
        with pytest.warns(go.GradOverrideWarning, match="signs' .* never ran"):
            closely(found({cls: plain}, {F.gelu: signs}), 2 * at_relu)

    @pytest.mark.parametrize("whole", [False, True], ids=["in a model", "in the whole process"])
    @pytest.mark.parametrize(
        ("make", "function"),
        [
            (nn.GRUCell, torch.gru_cell),
            (nn.LSTM, torch.lstm),
            (lambda *sizes: nn.MultiheadAttention(4, 1), F.multi_head_attention_forward),
        ],
        ids=["GRUCell", "LSTM", "MultiheadAttention"],
    )
    @pytest.mark.filterwarnings("ignore:.*never ran:gradoverride.GradOverrideWarning")
    def test_a_recurrent_or_attention_module_is_the_call_of_its_function(self, make, function, whole):
        module, x = make(4, 4).double(), noise(3, 4)

        def run(x):
            found = module(x, x * 1, x * 1) if isinstance(module, nn.MultiheadAttention) else module(x)
            return found[0] if isinstance(found, tuple) else found

        def three(grad_output, vjp):
            return thrice(vjp(grad_output))

        plain, rules = gradient(run, x), {type(module): three, function: three}
        with go.override(rules) if whole else go.override(nn.ModuleList([module]), rules):
            closely(gradient(run, x), 3 * plain)

    @pytest.mark.parametrize(("cls", "factor"), [(nn.Conv1d, 3), (OwnForward, 3), (Standardised, 6)])
    @pytest.mark.filterwarnings("ignore:.*never ran:gradoverride.GradOverrideWarning")
    def test_a_layer_is_the_call_of_its_function_unless_a_method_of_it_does_more(self, cls, factor):
        model, x = cls(2, 2, 3).double(), noise(1, 2, 5)
        plain = gradient(model, x)

        def of_the_function(grad_output, vjp):
            return tuple([None if part is None else 2 * part for part in vjp(grad_output)])

        with go.override(model, {nn.Conv1d: tripled, F.conv1d: of_the_function}):
            closely(gradient(model, x), factor * plain)


class Named:
    """A tensor within an object that torch hands its functions to."""

    def __init__(self, tensor):
        self.tensor = tensor

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is torch.cos:
            return NotImplemented
        return Named(func(*[one.tensor if isinstance(one, Named) else one for one in args], **(kwargs or {})))


class Only(nn.Module):
    """Nothing but a call of this function with what it is given."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class TestObjectsThatTorchHandsItsFunctionsTo:
    @pytest.mark.parametrize("where", ["model", "process"])
    @pytest.mark.parametrize("function", [F.relu, torch.sigmoid, F.softsign])
    def test_what_they_call_has_the_rule(self, where, function, x):
        model = Only(function)
        rules = {function: doubled}
        expected = 2 * gradient(function, x)
        with go.override(model, rules) if where == "model" else go.override(rules) as plan:
            closely(gradient(lambda x: model(Named(x)).tensor, x), expected)
            assert [row.calls for row in plan.table] == ["1"]

    def test_within_functions_of_torch_too(self, x):
        model = Only(F.softsign)
        expected = gradient(lambda x: x / (1 + around(x.abs())), x)
        with go.override(model, {torch.abs: tripled}):
            closely(gradient(lambda x: model(Named(x)).tensor, x), expected)

    def test_where_none_of_them_knows_it_is_an_error_as_ever(self, x):
        model = Only(torch.cos)
        handle = go.override(model, {torch.cos: doubled})
        with pytest.raises(TypeError, match=r"no implementation of 'cos' found for .* 'Named'"):
            model(Named(x))
        with pytest.warns(go.GradOverrideWarning, match="never ran"):
            handle.remove()

    @pytest.mark.parametrize("whole", [False, True], ids=["model", "process"])
    def test_a_rule_for_a_module_that_gets_one_is_refused(self, whole, x):
        model = nn.Sequential(nn.ReLU())
        rules = {nn.ReLU: doubled}
        with go.override(rules) if whole else go.override(model, rules):
            with pytest.raises(
                go.CapturedTensorError, match=r"'ReLU' .* must get each tensor .* got 'input.tensor'.*pass|drop"
            ):
                model(Named(x))
            assert model(Named(x.detach())).tensor.grad_fn is None
            with torch.no_grad():
                assert model(Named(x)).tensor.grad_fn is None


class TestScope:
    def test_other_models_are_as_ever(self, x):
        model, other = relus("F.relu"), relus("F.relu")
        plain = gradient(other, x)
        with go.override(model, {F.relu: doubled}):
            gradient(model, x)
            exactly(gradient(other, x), plain)
            exactly(gradient(F.relu, x), plain)

    @pytest.mark.parametrize("compiled", [False, True])
    def test_a_part_called_by_itself_has_the_rule(self, x, compiled):
        model = nn.Sequential(nn.Sequential(relus("F.relu")), nn.ReLU())
        plain = gradient(model[0], x)
        with go.override(model, {F.relu: doubled}):
            part = torch.compile(model[0], backend="aot_eager", fullgraph=True) if compiled else model[0]
            closely(gradient(part, x), 2 * plain)
            closely(gradient(model[1], x), 2 * plain)

    def test_a_compiled_part_of_a_model_that_is_not_has_the_rule(self, x):
        model = nn.Sequential(relus("F.relu"), relus("torch.relu"))
        plain = gradient(model, x)
        model[0].compile(backend="aot_eager", fullgraph=True)
        with go.override(model, {F.relu: doubled}):
            closely(gradient(model, x), 4 * plain)
            closely(gradient(model[0], x), 2 * plain)

    def test_a_checkpoint_is_replayed_within(self, x):
        inner = relus("F.relu")
        model = Calls(lambda model, x: checkpoint(model.parts[0], x, use_reentrant=False), inner)
        plain = gradient(model, x)
        with go.override(model, {F.relu: doubled}):
            closely(gradient(model, x), 2 * plain)

    def test_a_checkpoint_replayed_after_it_is_an_error(self, x):
        inner = relus("F.relu")
        model = Calls(lambda model, x: checkpoint(model.parts[0], x, use_reentrant=False), inner)
        x = x.requires_grad_()
        with go.override(model, {F.relu: guided}):
            y = model(x)
        with pytest.raises(torch.utils.checkpoint.CheckpointError):
            y.sum().backward()

    def test_backward_after_it_has_the_rule_of_the_forward(self, x):
        model, x = relus("F.relu"), x.requires_grad_()
        with go.override(model, {F.relu: lambda grad_output: 7 * grad_output}):
            y = model(x)
        exactly(torch.autograd.grad(y.sum(), x)[0], torch.full_like(x, 7.0))

    def test_modes_of_others_are_seen(self, x):
        seen = []

        class Listening(TorchFunctionMode):
            def __torch_function__(self, func, types, args=(), kwargs=None):
                seen.append(getattr(func, "__name__", ""))
                return func(*args, **(kwargs or {}))

        model = relus("torch.relu")
        plain = gradient(model, x)
        with go.override(model, {F.relu: doubled}), Listening():
            closely(gradient(model, x), 2 * plain)
        assert "relu" in seen

    @pytest.mark.parametrize(
        ("target", "calls"),
        [
            (F.tanh, [F.tanh, torch.tanh, nn.Tanh(), lambda x: x.tanh(), lambda x: (1 * x).tanh_()]),
            (torch.sigmoid, [F.sigmoid, nn.Sigmoid()]),
            (F.hardswish, [F.hardswish, nn.Hardswish()]),
            (F.hardsigmoid, [F.hardsigmoid, nn.Hardsigmoid()]),
        ],
        ids=["tanh", "sigmoid", "hardswish", "hardsigmoid"],
    )
    @pytest.mark.parametrize("compiled", [False, True])
    def test_functions_that_torch_does_not_list_as_overridable(self, target, calls, compiled, x):
        for call in calls:
            model = Calls(lambda model, x, call=call: call(x))
            run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
            with go.override(model, {target: lambda grad_output: 7 * grad_output}):
                exactly(torch.autograd.grad(run(x).sum(), x)[0], torch.full_like(x, 7.0))

    def test_threads_do_not_meet(self, x):
        model, plain = relus("F.relu"), gradient(relus("F.relu"), x)
        failures = []

        def work():
            for _ in range(20):
                if not torch.allclose(gradient(model, x), 2 * plain):
                    failures.append("overridden")
                if not torch.allclose(gradient(F.relu, x), plain):
                    failures.append("plain")

        with go.override(model, {F.relu: doubled}):
            threads = [threading.Thread(target=work) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert not failures

    def test_an_exception_in_the_forward_leaves_nothing_behind(self, x):
        def fail(model, x):
            F.relu(x)
            raise ZeroDivisionError

        model = Calls(fail)
        with pytest.raises(ZeroDivisionError), go.override(model, {F.relu: doubled}):
            model(x)
        exactly(gradient(F.relu, x), gradient(relus("F.relu"), x))
        assert torch.overrides._get_current_function_mode_stack() == []

    def test_functional_transforms(self, x):
        model = relus("F.relu")
        with go.override(model, {F.relu: tripled}):
            found = torch.func.grad(lambda x: model(x).sum())(x)
            closely(found, 3 * (x > 0).double())
            each = torch.func.vmap(torch.func.grad(lambda row: model(row).sum()))(x)
            closely(each, 3 * (x > 0).double())


COPIES = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": lambda model: torch.load(saved(model), weights_only=False),
}


class Codec(nn.Module):
    """A model that is called by its methods."""

    def encode(self, x):
        return self._activated(x * 2)

    def decode(self, z, scale=3):
        return torch.relu(z).sin() * scale

    def _activated(self, x):
        return F.relu(x)

    @staticmethod
    def by_no_module(x):
        return F.relu(x)

    @property
    def width(self):
        return 3


class CodecWithForward(Codec):
    def encode(self, x):
        return super().encode(x) * 5

    def forward(self, x):
        return self.decode(self.encode(x))


class Steps(nn.Module):
    """A model whose methods run after they were called, step by step."""

    def stream(self, x):
        for scale in (1.0, 2.0):
            sent = yield F.relu(x * (scale + 1))
            try:
                yield F.relu(x * (scale if sent is None else sent))
            except ValueError:
                yield F.relu(x * 100)
        return F.relu(x * 1000)

    async def wait(self, x):
        await asyncio.sleep(0)
        return F.relu(x * 3)

    async def each(self, x):
        yield F.relu(x)


class Stream(Steps):
    forward = Steps.stream


class Wait(Steps):
    forward = Steps.wait


class TestSteps:
    @pytest.mark.parametrize("method", ["stream", "__call__"])
    def test_of_a_generator_have_the_rule_and_what_runs_between_them_has_not(self, method, x):
        model = Stream()

        def run(x):
            steps, found = getattr(model, method)(x), []
            for step in range(4):
                found += [next(steps), F.tanh(F.relu(x) * (step + 1))]
            return found

        plain = [gradient(lambda x, index=index: run(x)[index], x) for index in range(8)]
        with go.override(model, {F.relu: doubled}):
            for index in range(8):
                closely(gradient(lambda x, index=index: run(x)[index], x), (1 if index % 2 else 2) * plain[index])

    def test_of_a_generator_are_sent_values_and_errors_and_it_returns_and_closes(self, x):
        model = Steps()
        with go.override(model, {F.relu: doubled}):
            steps = model.stream(x)
            exactly(next(steps), F.relu(x * 2))
            exactly(steps.send(7.0), F.relu(x * 7))
            exactly(steps.throw(ValueError()), F.relu(x * 100))
            steps.close()
            steps = model.stream(x)
            next(steps)
            with pytest.raises(KeyError, match="mine"):
                steps.throw(KeyError("mine"))

            def returned(x):
                return (yield from model.stream(x))

            def last(x):
                steps = returned(x)
                while True:
                    try:
                        next(steps)
                    except StopIteration as end:
                        return end.value

            with_rule = gradient(last, x)
        closely(with_rule, 2 * gradient(last, x))

    @pytest.mark.parametrize("method", ["wait", "__call__"])
    def test_of_a_coroutine_have_the_rule_and_other_tasks_have_not(self, method, x):
        model = Wait()

        async def other(x):
            await asyncio.sleep(0)
            return F.relu(x * 5)

        async def both(x):
            return await asyncio.gather(getattr(model, method)(x), other(x))

        plain = [gradient(lambda x, index=index: asyncio.run(both(x))[index], x) for index in range(2)]
        with go.override(model, {F.relu: doubled}):
            closely(gradient(lambda x: asyncio.run(both(x))[0], x), 2 * plain[0])
            exactly(gradient(lambda x: asyncio.run(both(x))[1], x), plain[1])

    def test_of_an_asynchronous_generator_and_under_torch_compile_are_refused(self, x):
        model = Steps()
        with go.override(model, {F.relu: doubled}):
            with pytest.raises(go.UnsupportedError, match=r"generator of 'Steps'.*asynchronous.*return a list"):
                model.each(x)
            compiled = torch.compile(lambda x: sum(model.stream(x)), backend="aot_eager")
            with pytest.raises(go.UnsupportedError, match=r"under torch\.compile"):
                compiled(x.requires_grad_())
            gradient(lambda x: next(model.stream(x)), x)


class TestMethods:
    @pytest.mark.parametrize("compiled", [False, True])
    @pytest.mark.parametrize("cls", [Codec, CodecWithForward])
    @pytest.mark.parametrize("name", ["encode", "decode", "_activated"])
    def test_of_a_model_have_the_rule_for_what_they_call(self, cls, name, compiled, x):
        model = cls()
        plain = gradient(getattr(model, name), x)
        with go.override(model, {F.relu: doubled}):
            method = getattr(model, name)
            method = torch.compile(method, backend="aot_eager", fullgraph=True) if compiled else method
            closely(gradient(method, x), 2 * plain)
        exactly(gradient(getattr(model, name), x), plain)

    def test_of_a_part_too(self, x):
        model = nn.ModuleList([Codec()])
        plain = gradient(model[0].encode, x)
        with go.override(model, {F.relu: doubled}):
            closely(gradient(model[0].encode, x), 2 * plain)

    def test_apply_it_once_where_one_calls_another_or_the_forward_calls_them(self, x):
        model, count = CodecWithForward(), []
        plain = gradient(model, x)

        def counted(grad_output, vjp):
            count.append(1)
            return 2 * vjp(grad_output)

        with go.override(model, {F.relu: counted}):
            closely(gradient(model, x), 4 * plain)
        assert len(count) == 2

    def test_are_those_of_the_class_once_it_is_removed_and_look_like_them_meanwhile(self, x):
        model = Codec()
        with go.override(model, {F.relu: doubled}):
            assert model.decode.__name__ == "decode"
            assert model.width == 3
            assert str(inspect.signature(model.decode)) == "(z, scale=3)"
            exactly(model.decode(x, scale=2), Codec().decode(x, scale=2))
            with pytest.raises(TypeError, match="unexpected keyword argument 'size'"):
                model.decode(x, size=2)
            gradient(model.encode, x)
        assert model.decode.__func__ is Codec.decode

    def test_are_those_that_the_class_has_then(self, x, monkeypatch):
        model = Codec()
        with go.override(model, {F.relu: doubled}):
            monkeypatch.setattr(Codec, "encode", lambda self, x: F.relu(x) * 11)
            closely(gradient(model.encode, x), 22 * gradient(torch.relu, x))

    def test_of_a_copy_have_it_with_its_own_weights(self, x):
        class Weighted(nn.Module):
            def __init__(self):
                super().__init__()
                self.weight = nn.Parameter(noise(3))

            def encode(self, x):
                return F.relu(x) * self.weight

        model = Weighted()
        with go.override(model, {F.relu: doubled}):
            copied = copy.deepcopy(model)
            gradient(model.encode, x)
        with torch.no_grad():
            copied.weight *= 10
        closely(gradient(copied.encode, x), 20 * gradient(model.encode, x))

    @pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
    def test_written_around_its_call_have_it(self, x, compiled):
        class Called(nn.Module):
            def __call__(self, x):
                return F.relu(super().__call__(x))

            def forward(self, x):
                return F.relu(x) * 3

        def run():
            return torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model

        model = Called()
        plain = gradient(model, x)
        with go.override(model, {F.relu: doubled}):
            closely(gradient(run(), x), 4 * plain)
        with go.override(model, {F.relu: doubled, Called: tripled}):  # which is of its forward alone
            closely(gradient(run(), x), 12 * plain)
        closely(gradient(run(), x), plain)
        assert type(model) is Called

    @pytest.mark.parametrize(
        "decorator",
        [
            torch.enable_grad(),
            torch.set_grad_enabled(True),
            torch.autocast("cpu", enabled=False),
            torch.compiler.disable,
            torch.compile(backend="aot_eager", fullgraph=True),
            torch.profiler.record_function("encode"),
        ],
        ids=["enable_grad", "set_grad_enabled", "autocast", "disable", "compile", "record_function"],
    )
    def test_that_torch_has_decorated_have_it_too(self, decorator, x):
        class Decorated(nn.Module):
            @decorator
            def encode(self, x):
                return F.relu(x) * 3

        model = Decorated()
        plain = gradient(model.encode, x)
        with go.override(model, {F.relu: doubled}):
            closely(gradient(model.encode, x), 2 * plain)
        closely(gradient(model.encode, x), plain)

    def test_that_are_no_methods_of_the_module_are_as_ever(self, x):
        model = Codec()
        plain = gradient(F.relu, x)
        handle = go.override(model, {F.relu: lambda grad_output: 7 * grad_output})
        exactly(gradient(Codec.by_no_module, x), plain)
        with pytest.warns(go.GradOverrideWarning, match="never ran"):
            handle.remove()


class TestCopies:
    @pytest.mark.parametrize("kind", COPIES)
    def test_a_copy_has_the_rules_for_good(self, kind, x):
        model = nn.Sequential(nn.Linear(3, 3), Relu()).double()
        plain = gradient(model, x)
        with go.override(model, {F.relu: doubled}):
            copied = COPIES[kind](model)
            closely(gradient(model, x), 2 * plain)
        closely(gradient(copied, x), 2 * plain)
        exactly(gradient(model, x), plain)
        assert [row.target for row in go.explain(copied)] == ["function 'relu'"]
        go.remove_overrides(copied)
        exactly(gradient(copied, x), plain)
        assert [type(module) for module in copied.modules()] == [type(module) for module in model.modules()]


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return file


class Relu(nn.Module):
    def forward(self, x):
        return F.relu(x)


class TestErrors:
    @pytest.mark.parametrize("target", [math.sin, isinstance, print, len])
    def test_of_a_function_of_python(self, target):
        text = rf"'{target.__name__}' \(built in\) is one of Python's own, .* Give the function of torch that the model"
        with pytest.raises(go.TargetError, match=text):
            go.override(mlp(), {target: guided})

    @pytest.mark.parametrize(
        ("target", "taken"),
        [(lambda name: True, "name"), (lambda: True, ""), (lambda name, module, depth: True, "name, module, depth")],
        ids=["one", "none", "three"],
    )
    def test_of_a_predicate_of_another_number_of_parameters(self, target, taken):
        text = rf"'<lambda>' \(.*test_functions.py:\d+\) is .* takes \({taken}\)\. A predicate takes \(name, module\)$"
        with pytest.raises(go.TargetError, match=text):
            go.override(mlp(), {target: guided})

    def test_of_a_generic_type(self):
        with pytest.raises(go.TargetError, match=r"a target is a module, .*; got a GenericAlias$"):
            go.override(mlp(), {list[int]: guided})

    def test_of_a_function_that_no_override_sees(self):
        with pytest.raises(go.TargetError, match=r"'manual_seed' .* is one of torch that no override can see"):
            go.override(mlp(), {torch.manual_seed: guided})

    @pytest.mark.parametrize(
        "target",
        [torch.Tensor.__getitem__, torch.ops.aten.relu, torch.ops.aten.relu.default, nn.init.uniform_, F._max_pool2d],
        ids=["__getitem__", "aten.relu", "aten.relu.default", "uniform_", "_max_pool2d"],
    )
    def test_of_one_whose_calls_are_shown_to_nobody(self, target):
        text = r"is one of torch that no override can see. Give the module that calls it"
        with pytest.raises(go.TargetError, match=text):
            go.override(mlp(), {target: guided})
        with pytest.raises(go.TargetError, match=text):
            go.Registry().register(target)

    def test_of_a_function_of_ones_own(self):
        def own(x):
            return x

        text = r"'own' \(.*test_functions.py:\d+\) is a function of one's own .* import path: 'package.module:own'"
        with pytest.raises(go.TargetError, match=text):
            go.override(mlp(), {own: guided})

    def test_of_a_rule_whose_names_do_not_fit(self):
        def asks(grad_output, weigth):
            return grad_output

        with pytest.raises(
            go.RuleSignatureError, match=r"asks for 'weigth', which does not exist. 'relu' .* offers 'in"
        ):
            go.override(mlp(), {F.relu: asks})

    def test_of_a_spelling_that_lacks_a_name_at_the_call(self, x):
        def asks(grad_output, inplace):
            return grad_output

        model = relus("torch.relu")
        with (
            pytest.raises(go.RuleSignatureError, match=r"asks for 'inplace'.*has no signature"),
            go.override(model, {F.relu: asks}),
        ):
            model(x.requires_grad_())

    def test_of_a_scripted_part(self):
        model = nn.Sequential(torch.jit.script(nn.ReLU()), nn.ReLU())
        with pytest.raises(go.UnsupportedError, match=r"override of '0': a module must run Python .*; it is a Re"):
            go.override(model, {F.relu: guided})
        assert type(model[1]) is nn.ReLU

    def test_a_rule_that_never_ran_is_told(self, x):
        model = mlp()
        with (
            pytest.warns(go.GradOverrideWarning, match=r"rule 'guided' .* of the function 'tanh' never ran"),
            go.override(model, {torch.tanh: guided}),
        ):
            gradient(model, x)

    @pytest.mark.parametrize("kind", ["a leaf of torch", "a list of them"])
    def test_a_rule_that_no_module_can_call_is_told_too(self, kind, x):
        def idle(grad_output):
            return grad_output

        part = nn.Linear(3, 3).double()
        model = part if kind == "a leaf of torch" else nn.ModuleList([part])
        plan = go.override(model, {F.relu: idle})
        assert [(row.cls, row.target, row.calls) for row in plan.table] == [
            (type(model).__name__, "function 'relu'", "0")
        ]
        assert type(part) is nn.Linear
        with pytest.warns(go.GradOverrideWarning, match=r"rule 'idle' .* of the function 'relu' never ran.*it was not"):
            plan.remove()

    def test_of_one_that_may_go_without_a_call_nobody_is_told(self):
        rules = go.Registry("some")
        rules.register(F.relu, optional=True)(guided)
        with go.override(nn.Linear(3, 3), rules) as plan:
            assert len(plan.table) == 1


def test_out_is_left_to_torch(x):
    model = Calls(lambda model, x: torch.sigmoid(x, out=torch.empty_like(x)))
    handle = go.override(model, {torch.sigmoid: negated})
    assert torch.equal(model(x.detach()), torch.sigmoid(x))
    with pytest.raises(RuntimeError, match="out="):
        model(x.requires_grad_())
    with pytest.warns(go.GradOverrideWarning, match="never ran"):
        handle.remove()


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.relu = Relu()

    def forward(self, x):
        return x + self.relu(self.linear(x))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("rules", [{F.relu: guided}, {F.relu: doubled, nn.Linear: doubled}], ids=["one", "two"])
@pytest.mark.parametrize("whole", [False, True])
def test_twelve_equal_blocks_compile_once(x, backend, rules, whole):
    counter = CompileCounterWithBackend(backend)
    blocks = [Block().double() for _ in range(12)]
    model = (nn.Sequential if whole else nn.ModuleList)(*(blocks if whole else [blocks]))

    def through(x):
        for block in blocks:
            x = block(x)
        return x

    call = model if whole else through
    with go.override(model, rules):
        expected = gradient(call, x)
    for block in blocks:
        block.compile(backend=counter, fullgraph=True)
    for _ in range(2):
        with go.override(model, rules):
            closely(gradient(call, x), expected)
    assert counter.frame_count == 1


def test_a_function_that_the_library_uses_itself_has_the_rule_only_where_it_is_called(x):
    model = nn.Sequential(nn.ReLU(inplace=True), Calls(lambda model, x: x.detach() + x.clone()), nn.ReLU()).double()
    with go.override(model, {torch.Tensor.detach: lambda grad_output: grad_output, nn.ReLU: doubled}) as plan:
        closely(gradient(lambda x: model(x * 1), x), 8 * gradient(F.relu, x))
        assert [row.calls for row in plan.table if "detach" in row.target] == ["1"]


def test_a_rule_may_call_the_forward_of_a_model_when_the_override_has_been_left(x):
    def scaled(grad_output, input, forward):
        return grad_output * forward(input)

    model = Calls(lambda model, x: F.relu(x))
    with go.override(model, {F.relu: doubled, model: scaled}):
        result = model(x)
    closely(torch.autograd.grad(result.sum(), x)[0], x.detach().clamp(min=0))


REGION = torch.compiler.nested_compile_region(lambda x: F.relu(x))


class Parts(nn.Module):
    """A model that calls relu itself, and in what it hands to an operator."""

    def __init__(self, call, part=None):
        super().__init__()
        self.call = call
        self.part = nn.Sequential(Relu()) if part is None else part

    def forward(self, x):
        return self.call(self, F.relu(x) + x)


OPERATORS = {
    "checkpoint": lambda model, x: checkpoint(model.part, x, use_reentrant=False),
    "a checkpoint in another": lambda model, x: checkpoint(
        lambda y: checkpoint(model.part, y, use_reentrant=False), x, use_reentrant=False
    ),
    "cond": lambda model, x: torch.cond(x.sum() > -1e9, lambda y: F.relu(y), lambda y: y * 3, (x,)),
    "cond of modules": lambda model, x: torch.cond(x.sum() > -1e9, model.part, model.part, (x,)),
    "cond in another": lambda model, x: torch.cond(
        x.sum() > -1e9,
        lambda y: torch.cond(y.sum() < -1e9, lambda z: z * 3, lambda z: F.relu(z), (y,)),
        lambda y: y * 3,
        (x,),
    ),
    "scan": lambda model, x: scan(lambda carry, y: (carry.clone(), F.relu(y)), x[0], x)[1],
    "map": lambda model, x: map_over(lambda y: F.relu(y), x),
    "while_loop": lambda model, x: while_loop(
        lambda n, y: n < 1, lambda n, y: (n + 1, F.relu(y)), (torch.zeros((), dtype=torch.int64), x)
    )[1],
    "a region compiled once": lambda model, x: REGION(x) + 0 * REGION(2 * x),
}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("name", OPERATORS)
def test_what_an_operator_of_torch_runs_has_the_rule(name, whole, compiled, x):
    model = Parts(OPERATORS[name])
    run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    value = x.detach()
    inner = value.relu() + value
    expected = 3 * (inner > 0) * (3 * (value > 0).double() + 1)
    with go.override({F.relu: tripled}) if whole else go.override(model, {F.relu: tripled}):
        closely(gradient(run, x, weights=1.0), expected)
    closely(gradient(run, x, weights=1.0), (inner > 0) * ((value > 0).double() + 1))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", ["checkpoint", "cond of modules"])
def test_a_module_in_an_operator_of_torch_has_its_own_rule_and_not_that_of_its_function(name, compiled, x):
    model = Parts(OPERATORS[name], nn.Sequential(nn.ReLU()))
    run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    value = x.detach()
    with go.override(model, {F.relu: tripled, nn.ReLU: negated}):
        closely(gradient(run, x, weights=1.0), -1 * (3 * (value > 0).double() + 1))


@pytest.fixture
def _deep():
    """Room for the frames of Dynamo above those of pytest: on Python 3.12 they are more than there may be otherwise."""
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(2 * limit)
    yield
    sys.setrecursionlimit(limit)


@pytest.mark.usefixtures("_deep")
@pytest.mark.parametrize("compiled", [False, True])
def test_rules_of_several_overrides_are_in_force_in_an_operator_of_torch(compiled, x):
    model = Parts(OPERATORS["cond of modules"])
    run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    value = x.detach()
    inner = value.relu() + value
    with go.override({F.relu: tripled}), go.override(model, {F.relu: doubled}):
        closely(gradient(run, x, weights=1.0), 6 * (inner > 0) * (6 * (value > 0).double() + 1))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("compiled", [False, True])
def test_an_operator_that_calls_no_function_with_a_rule_goes_on(compiled, x):
    def both(model, x):
        scores = flex_attention(x.expand(1, 1, 5, 3), x.expand(1, 1, 5, 3), x.expand(1, 1, 5, 3), _scaled)
        return torch.cond(x.sum() > -1e9, lambda y: y.sin(), lambda y: y * 3, (x,)) + scores[0, 0]

    model = Parts(both)
    run = torch.compile(model, backend="eager", fullgraph=True) if compiled else model
    with torch.no_grad():
        plain = model(x)
        with go.override(model, {F.relu: tripled}):
            closely(run(x), plain)


def _scaled(score, *_):
    return score * 2


class TestRecordedByFx:
    """A graph of torch.fx has the rules for what it has recorded, once, in the context and after it."""

    @pytest.mark.parametrize("where", ["process", "model"])
    @pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
    @pytest.mark.parametrize("several", [False, True], ids=["one rule", "two"])
    def test_the_rule_is_applied_once(self, where, compiled, several, x):
        model = Relu()
        plain, factor = gradient(model, x), 6 if several else 2

        def run(graph):
            return torch.compile(graph, backend="aot_eager") if compiled else graph

        first = go.override(model, {F.relu: doubled}) if where == "model" else go.override({F.relu: doubled})
        second = go.override(model, {F.relu: tripled}) if several else contextlib.nullcontext()
        with first, second:
            closely(gradient(model, x), factor * plain)
            graph = torch.fx.symbolic_trace(model)
            closely(gradient(run(graph), x), factor * plain)
        closely(gradient(run(graph), x), factor * plain)
        closely(gradient(model, x), plain)
