"""Decorated callables under torch.compile. Conformance, group compile.

Each gradient is one that autograd would not give, so that a rule which is dropped shows.
"""

import collections
import copy
import dataclasses
import functools
import operator
import typing

import numpy
import pytest
import torch
from oracles import closely, exactly, float64, noise, right_or_refused
from torch import nn
from torch._dynamo.convert_frame import register_bytecode_hook
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import functional_call, grad
from torch.utils.checkpoint import checkpoint

import gradoverride as go

pytestmark = pytest.mark.usefixtures("fresh_compiler")


def seven_times(grad_output):
    return 7 * grad_output


class Scale(nn.Module):
    """Weight 2, whose gradient is 5 x; the input's is 7 times the weight."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(float64(2.0, 2.0, 2.0))
        self.shift = nn.Parameter(float64(0.0, 0.0, 0.0))

    @go.custom_backward(lambda grad_output, x, weight: {"x": 3.5 * grad_output * weight, "weight": 5 * grad_output * x})
    def forward(self, x):
        return x * self.weight + self.shift


class ScaleByParams(Scale):
    @go.custom_backward(
        lambda grad_output, x, params: {"x": 7 * grad_output, "weight": 5 * grad_output * x, "shift": grad_output}
    )
    def forward(self, x):
        return x * self.weight + self.shift


class ScaleLeftToAutograd(Scale):
    @go.custom_backward(lambda grad_output, x: {"x": 7 * grad_output})
    def forward(self, x):
        return x * self.weight * 5 + self.shift


class ScaleByVjp(Scale):
    @go.custom_backward(lambda grad_output, vjp, x: {"x": 3.5 * vjp(grad_output), "weight": 5 * grad_output * x})
    def forward(self, x):
        return x * self.weight + self.shift


@go.custom_backward
class ScaleByClass(Scale):
    def forward(self, x):
        return x * self.weight + self.shift

    def backward(self, grad_output, x):
        self.weight.grad = 5 * grad_output * x
        self.shift.grad = grad_output
        return 3.5 * grad_output * self.weight


@go.custom_backward
class ScaleByClassWithVjp(Scale):
    def forward(self, x):
        return x * self.weight + self.shift

    def backward(self, grad_output, x, vjp):
        self.weight.grad = 5 * grad_output * x
        return 3.5 * vjp(grad_output)


MODULES = {
    "method": Scale,
    "params": ScaleByParams,
    "left to autograd": ScaleLeftToAutograd,
    "method with vjp": ScaleByVjp,
    "class": ScaleByClass,
    "class with vjp": ScaleByClassWithVjp,
}


class Holder:
    @go.custom_backward(seven_times)
    @staticmethod
    def static(x):
        return x / 2

    @classmethod
    @go.custom_backward(seven_times)
    def of_class(cls, x):
        return x / 2

    @go.custom_backward(seven_times)
    def method(self, x):
        return x / 2


def halve(x):
    return x / 2


@go.custom_backward(lambda grad_output: 2 * grad_output["a"] + 5 * grad_output["b"][0])
def split(x):
    return {"a": x * 2, "b": (x.floor(), None, "text")}


@go.custom_backward(lambda grad_output: [3 * grad_output, {"y": (4 * grad_output, None)}])
def combine(tree):
    first, rest = tree
    return first + rest["y"][0]


@go.custom_backward(lambda grad_output, x, *, factor=7: factor * grad_output + 0 * x)
def with_option(x, *, shift=0.0):
    return x * x + shift


@go.custom_backward(seven_times)
def in_place(x):
    return x.mul_(2)


def sum_of_split(x):
    parts = split(x)
    return parts["a"] + parts["b"][0]


seven_times_halve = go.custom_backward(seven_times)(halve)
floor_with_module = go.straight_through(torch.floor, surrogate=nn.Hardtanh(-700, 700))
passing_floor = go.straight_through(torch.floor)

FUNCTIONS = {
    "function": go.custom_backward(seven_times)(halve),
    "lambda": go.custom_backward(lambda grad_output: 7 * grad_output)(lambda x: x / 2),
    "builtin": go.custom_backward(seven_times)(torch.floor),
    "argument and output": go.custom_backward(lambda grad_output, x, output: grad_output * (output / x + 6.5))(halve),
    "input": go.custom_backward(lambda grad_output, input: grad_output * (7 + 0 * input))(halve),
    "needs": go.custom_backward(lambda grad_output, needs: 7 * grad_output if needs["x"] else None)(halve),
    "forward": go.custom_backward(lambda grad_output, x, forward: grad_output * 14 * forward(x) / x)(halve),
    "vjp": go.custom_backward(lambda grad_output, vjp: 14 * vjp(grad_output))(halve),
    "vjp of a changed gradient": go.custom_backward(lambda grad_output, vjp: vjp(14 * grad_output))(halve),
    "vjp called twice": go.custom_backward(
        lambda grad_output, vjp: vjp(10 * grad_output) + vjp(4 * grad_output),
    )(halve),
    "vjp.by_name": go.custom_backward(lambda grad_output, vjp: vjp.by_name(14 * grad_output))(halve),
    "residual": go.custom_backward(lambda grad_output, seven: grad_output * seven)(
        lambda x: go.save_for_backward(x / 2, seven=x * 0 + 7)
    ),
    "nested rules": go.custom_backward(lambda grad_output, vjp: vjp(grad_output))(lambda x: seven_times_halve(x)),
    "dict result": sum_of_split,
    "nested arguments": lambda x: combine([x, {"y": (x, "text")}]),
    "options": lambda x: with_option(x, shift=1.5),
    "in place": lambda x: in_place(x * 1),
    "method": Holder().method,
    "static method": Holder.static,
    "class method": Holder.of_class,
    "straight_through": lambda x: 7 * passing_floor(x),
    "surrogate": go.straight_through(torch.floor, surrogate=lambda x: 7 * x),
    "surrogate module": lambda x: 7 * floor_with_module(x),
}


def compiled(form, backend="aot_eager", **options):
    return torch.compile(form, fullgraph=True, backend=backend, **options)


@pytest.fixture
def x():
    return noise(3)


def check(form, x, backend="aot_eager"):
    grad_output = noise(3, grad=False)
    y = compiled(form, backend)(x)
    closely(y.detach(), form(x.detach()))
    y.backward(grad_output)
    closely(x.grad, 7 * grad_output)


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_function_compiled_directly(kind, x):
    check(FUNCTIONS[kind], x)


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_function_in_a_compiled_parent(kind, x):
    form = FUNCTIONS[kind]

    check(lambda x: form(x * 1) * 1, x)


INDUCTOR = ["function", "argument and output", "vjp", "residual", "dict result", "straight_through", "surrogate"]


@pytest.mark.parametrize("kind", INDUCTOR)
def test_function_compiled_by_inductor(kind, x):
    check(FUNCTIONS[kind], x, "inductor")


@pytest.mark.parametrize("kind", MODULES)
def test_module_compiled_directly(kind, x):
    layer = MODULES[kind]()
    run = compiled(layer)
    for _ in range(2):  # the gradients accumulate
        run(x).sum().backward()
    closely(x.grad, torch.full_like(x, 14.0))
    closely((layer.weight.grad, layer.shift.grad), (2 * 5 * x.detach(), torch.full_like(x, 2.0)))


@pytest.mark.parametrize("kind", MODULES)
def test_module_in_a_compiled_parent_used_twice(kind, x):
    class Parent(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = MODULES[kind]()

        def forward(self, x):
            return self.layer(x) + 10 * self.layer(x)

    parent = Parent()
    compiled(parent)(x).sum().backward()
    closely(x.grad, torch.full_like(x, 77.0))
    closely(parent.layer.weight.grad, 11 * 5 * x.detach())


@pytest.mark.parametrize("kind", ["method", "left to autograd", "class", "method with vjp"])
def test_module_compiled_by_inductor(kind, x):
    layer = MODULES[kind]()
    compiled(layer, "inductor")(x).sum().backward()
    closely(x.grad, torch.full_like(x, 7.0))
    closely((layer.weight.grad, layer.shift.grad), (5 * x.detach(), torch.ones_like(x)))


@pytest.mark.parametrize("kind", MODULES)
def test_compiled_module_with_an_input_that_needs_no_gradient(kind, x):
    layer = MODULES[kind]()
    compiled(layer)(x.detach()).sum().backward()
    closely((layer.weight.grad, layer.shift.grad), (5 * x.detach(), torch.ones_like(x)))


@pytest.mark.parametrize("kind", MODULES)
def test_compiled_module_answers_autograd_grad_and_leaves_grad_alone(kind, x):
    layer = MODULES[kind]()
    closely(torch.autograd.grad(compiled(layer)(x).sum(), layer.weight), (5 * x.detach(),))
    assert layer.weight.grad is x.grad is None


@pytest.mark.parametrize("kind", MODULES)
def test_tensor_hook_on_a_parameter_of_a_compiled_module_fires_once(kind, x):
    layer, seen = MODULES[kind](), []
    layer.weight.register_hook(lambda grad: seen.append(grad.clone()))
    compiled(layer)(x).sum().backward()
    closely(seen, [5 * x.detach()])


@pytest.mark.parametrize("kind", MODULES)
def test_frozen_parameter_of_a_compiled_module_stays_none(kind, x):
    layer = MODULES[kind]()
    layer.shift.requires_grad_(False)
    compiled(layer)(x).sum().backward()
    assert layer.shift.grad is None
    closely(x.grad, torch.full_like(x, 7.0))


@pytest.mark.parametrize("kind", MODULES)
def test_functional_call_in_compiled_code(kind, x):
    layer, weight = MODULES[kind](), float64(2.0, 2.0, 2.0)
    compiled(lambda weight, x: functional_call(layer, {"weight": weight}, (x,)))(weight, x).sum().backward()
    closely((x.grad, weight.grad), (torch.full_like(x, 7.0), 5 * x.detach()))
    assert layer.weight.grad is None


@pytest.mark.parametrize("kind", ["function", "vjp", "straight_through", "surrogate"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_compiled_function_where_no_gradient_is_wanted(kind, mode, x):
    with mode():
        y = compiled(FUNCTIONS[kind])(x)
        closely(y, FUNCTIONS[kind](x))
    assert not y.requires_grad


def test_compiled_function_that_is_decorated_afterwards(x):
    decorated = go.custom_backward(seven_times)(torch.compile(halve, backend="aot_eager", fullgraph=True))
    for form in (decorated, torch.compile(decorated, backend="aot_eager")):
        x.grad = None
        form(x).sum().backward()
        closely(x.grad, torch.full_like(x, 7.0))


def test_decorated_function_that_is_wrapped_in_compiled_code(x):  # as jacfwd and jacrev do
    decorated = go.custom_backward(seven_times)(halve)

    def run(x):
        @functools.wraps(decorated)
        def wrapped(x):
            return decorated(x)

        return wrapped(x)

    compiled(run)(x).sum().backward()
    closely(x.grad, torch.full_like(x, 7.0))


def test_dropout_below_a_compiled_vjp_has_the_mask_of_the_forward():
    dropout = go.custom_backward(lambda grad_output, vjp: 7 * vjp(grad_output))(
        lambda x: nn.functional.dropout(x, 0.5, training=True)
    )
    x = torch.ones(1000, dtype=torch.float64, requires_grad=True)
    y = compiled(dropout)(x)
    y.sum().backward()
    assert 0 < int((y == 0).sum()) < 1000
    exactly(x.grad, 7 * y.detach())


def test_compiled_vjp_leaves_constant_arguments_as_torch_does():
    def forward(x, mean, variance):
        return nn.functional.batch_norm(x, mean, variance, training=True)

    weights, start = noise(4, 3, grad=False), noise(4, 3, grad=False)

    def run(forward):
        x, constants = start.clone().requires_grad_(), (torch.zeros_like(start[0]), torch.ones_like(start[0]))
        (forward(x, *constants) * weights).sum().backward()
        return x.grad, constants

    ruled = go.custom_backward(lambda grad_output, vjp: tuple(7 * grad for grad in vjp(grad_output)))(forward)
    grad_x, constants = run(torch.compile(ruled, backend="aot_eager", fullgraph=True))
    plain, plain_constants = run(forward)
    closely(grad_x, 7 * plain)
    closely(constants, plain_constants)


def test_batch_norm_below_a_compiled_vjp_counts_once():
    class Ruled(nn.BatchNorm1d):
        @go.custom_backward(lambda grad_output, vjp: 7 * vjp(grad_output))
        def forward(self, input):
            return super().forward(input)

    layer, plain, x = Ruled(3, dtype=torch.float64), nn.BatchNorm1d(3, dtype=torch.float64), noise(8, 3)
    twin = x.detach().clone().requires_grad_()
    compiled(layer)(x).pow(3).sum().backward()
    plain(twin).pow(3).sum().backward()
    closely(x.grad, 7 * twin.grad)
    assert layer.num_batches_tracked.item() == 1
    closely((layer.running_mean, layer.running_var), (plain.running_mean, plain.running_var))
    closely(layer.weight.grad, plain.weight.grad)


def normed(rule, norm, *, training=True):
    """A function that has torch update the running statistics it is given, and then writes into what it computed."""

    @go.custom_backward(rule)
    def forward(x, running_mean, running_var):
        return norm(x, running_mean, running_var, None, None, training).mul_(2)

    return forward


NORMS = {
    "batch_norm": nn.functional.batch_norm,
    "batch_norm of torch": lambda x, mean, var, weight, bias, training: torch.batch_norm(
        x, weight, bias, mean, var, training, 0.1, 1e-5, False
    ),
    "instance_norm": nn.functional.instance_norm,
}


@pytest.mark.parametrize("norm", NORMS)
def test_running_statistics_that_a_function_is_given_are_updated(norm):
    x, mean, var = noise(4, 3, 5), torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    expected = torch.autograd.grad((NORMS[norm](x, mean, var, None, None, True) * 2).square().sum(), x)
    after, mean, var = mean, torch.zeros_like(mean), torch.ones_like(var)
    forward = normed(lambda grad_output, vjp: vjp(grad_output), NORMS[norm])
    y = torch.compile(forward, backend="aot_eager", fullgraph=True)(x, mean, var)
    closely(torch.autograd.grad(y.square().sum(), x), expected)
    closely(mean, after)


def by_statistics(grad_output, running_mean):
    return {"x": grad_output * running_mean[:, None]}


@pytest.mark.parametrize("norm", NORMS)
def test_running_statistics_are_shown_as_they_were_given_or_refused(norm):
    def gradient(compile_it, training):
        x, mean, var = noise(4, 3, 5), float64(1.0, 2.0, 3.0, grad=False), torch.ones(3, dtype=torch.float64)
        forward = normed(by_statistics, NORMS[norm], training=training)
        run = torch.compile(forward, backend="aot_eager", fullgraph=True) if compile_it else forward
        return torch.autograd.grad(run(x, mean, var).sum(), x)

    closely(gradient(True, False), gradient(False, False))
    with pytest.raises(go.ForwardResultError, match=r"update the running statistics in its argument 'running_mean'"):
        gradient(True, True)


class Traced(nn.Module):
    """Assigns buffers, as code does that does not write into them."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(float64(2.0, 2.0, 2.0))
        self.register_buffer("trace", torch.zeros(3, dtype=torch.float64))
        self.register_buffer("count", torch.tensor(0))

    def forward(self, x):
        self.trace = self.trace * 0.5 + x.detach()
        self.count += 1
        return x * self.weight

    def backward(self, grad_output, x):
        self.weight.grad = 5 * grad_output * x
        return 7 * grad_output


class TracedByRule(Traced):
    forward = go.custom_backward(lambda grad_output, x, weight: {"x": grad_output, "weight": None})(Traced.forward)


class TracedByClass(Traced):
    forward, backward = Traced.forward, Traced.backward


@pytest.mark.parametrize("cls", [TracedByRule, go.custom_backward(TracedByClass)])
def test_buffers_that_a_compiled_method_assigns_are_those_of_eager(cls, x):
    eager = cls()
    compiled = copy.deepcopy(eager)
    fast = torch.compile(compiled, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        eager(x).sum().backward()
        fast(x).sum().backward()
    assert compiled.count.item() == 2
    exactly(compiled.trace, eager.trace)
    exactly(compiled.weight.grad, eager.weight.grad)
    assert list(compiled.state_dict()) == list(eager.state_dict())


def test_same_tensor_twice_gets_both_gradients(x):
    product = go.custom_backward(lambda grad_output, a, b: (2 * grad_output * b, 3 * grad_output * a))(
        lambda a, b: a * b
    )
    compiled(lambda x: product(x, x))(x).sum().backward()
    closely(x.grad, 5 * x.detach())


def test_tensor_returned_twice_has_a_gradient_for_each_place(x):
    @go.custom_backward(lambda grad_output: 2 * grad_output[0] + 3 * grad_output[1])
    def twice(x):
        y = x * 2
        return y, y

    first, second = compiled(twice)(x)
    (first + 10 * second).sum().backward()
    closely(x.grad, torch.full_like(x, 32.0))


def test_second_result_that_is_a_view_of_the_first_keeps_its_value(x):
    @go.custom_backward(lambda grad_output: 2 * grad_output[0] + 3 * grad_output[1].repeat(3))
    def overlapping(x):
        y = x * 2
        return y, y[:1]

    whole, head = compiled(overlapping)(x)
    closely((whole.detach(), head.detach()), (2 * x.detach(), 2 * x.detach()[:1]))
    (whole.sum() + 10 * head.sum()).backward()
    closely(x.grad, torch.full_like(x, 32.0))


def test_result_that_is_the_input(x):
    same = go.custom_backward(seven_times)(lambda x: x)
    compiled(lambda x: same(x) * 1)(x).sum().backward()
    closely(x.grad, torch.full_like(x, 7.0))


def test_integer_part_of_a_compiled_result_is_not_differentiable(x):
    with_index = go.custom_backward(lambda grad_output: 7 * grad_output[0])(lambda x: (x * 2, x.argmax(), None))
    y, index, nothing = compiled(with_index)(x)
    y.sum().backward()
    assert not index.requires_grad
    assert index.item() == x.argmax().item()
    assert nothing is None
    closely(x.grad, torch.full_like(x, 7.0))


@pytest.mark.parametrize("kind", ["function", "vjp", "straight_through"])
def test_checkpointed_block_in_compiled_code(kind, x):
    form = FUNCTIONS[kind]
    compiled(lambda x: checkpoint(lambda x: form(x) * 1, x, use_reentrant=False))(x).sum().backward()
    closely(x.grad, torch.full_like(x, 7.0))


class OfAClass:
    @classmethod
    @go.custom_backward(seven_times)
    def halve(cls, x):
        return x / 2


def first_calls():
    """Functions whose first call is the one that is compiled, with a slope of 7."""
    return {
        "*args": go.custom_backward(lambda grad_output, xs: tuple(3.5 * grad_output for _ in xs))(lambda *xs: sum(xs)),
        "**kwargs": go.custom_backward(lambda grad_output: {"a": 3.5 * grad_output, "a_b": 3.5 * grad_output})(
            lambda **xs: xs["a"] - xs["a_b"]
        ),
        "builtin": go.custom_backward(seven_times)(torch.neg),
        "class method": OfAClass.halve,
    }


@pytest.mark.parametrize("kind", first_calls())
def test_first_call_of_any_signature_may_be_in_a_compiled_checkpoint(kind, x):
    form = first_calls()[kind]
    call = {"*args": lambda x: form(x, x), "**kwargs": lambda x: form(a=x, a_b=x)}.get(kind, form)
    compiled(lambda x: checkpoint(lambda x: call(x) * 1, x, use_reentrant=False))(x).sum().backward()
    closely(x.grad, torch.full_like(x, 7.0))


def test_layouts_of_one_compiled_function_are_told_apart(x):
    form = go.custom_backward(lambda grad_output, xs: tuple((i + 1) * grad_output for i in range(len(xs))))(
        lambda *xs, **more: sum(xs) + sum(more.values())
    )
    compiled(lambda x: form(x) + form(x * 1, x) + form(x, a=1, b=2) + form(x, a_b=3))(x).sum().backward()
    closely(x.grad, torch.full_like(x, 1.0 + 3.0 + 1.0 + 1.0))


def test_handing_over_in_a_compiled_checkpoint_is_refused_by_torch_or_right_outside_of_one_graph(x):
    form = go.custom_backward(lambda grad_output, factor: factor * grad_output)(
        lambda x: go.save_for_backward(x / 2, factor=x.detach() * 0 + 7)
    )

    def block(x):
        return checkpoint(form, x, use_reentrant=False)

    with pytest.raises(torch._dynamo.exc.Unsupported, match="side effect"):
        compiled(block)(x)
    torch.compile(block, backend="aot_eager")(x).sum().backward()
    closely(x.grad, torch.full_like(x, 7.0))


class Pair(typing.NamedTuple):
    left: torch.Tensor
    right: torch.Tensor


@dataclasses.dataclass
class Record:
    left: torch.Tensor
    right: torch.Tensor


STRUCTURES = {
    "namedtuple": (Pair, lambda r: (r.left, r.right)),
    "dataclass": (Record, lambda r: (r.left, r.right)),
    "OrderedDict": (lambda a, b: collections.OrderedDict(left=a, right=b), lambda r: (r["left"], r["right"])),
}


@pytest.mark.parametrize("kind", STRUCTURES)
def test_structured_result_keeps_its_type_and_gradients(kind, x):
    build, parts = STRUCTURES[kind]
    split = go.custom_backward(lambda grad_output: 5 * parts(grad_output)[0] + 7 * parts(grad_output)[1])(
        lambda x: build(x * 2, x * 3)
    )
    result = compiled(split)(x)
    left, right = parts(result)
    (left + 10 * right).sum().backward()
    assert type(result) is type(build(x, x))
    closely((left.detach(), right.detach()), (2 * x.detach(), 3 * x.detach()))
    closely(x.grad, torch.full_like(x, 75.0))


def test_model_output_keeps_its_type_and_gradients(x):
    outputs = pytest.importorskip("transformers.modeling_outputs")

    @go.custom_backward(lambda grad_output: 5 * grad_output.last_hidden_state + 7 * grad_output.hidden_states[0])
    def encode(x):
        return outputs.BaseModelOutput(last_hidden_state=x * 2, hidden_states=(x * 3,))

    result = compiled(encode)(x)
    (result.last_hidden_state + 10 * result[1][0]).sum().backward()
    assert type(result) is outputs.BaseModelOutput
    assert list(result) == ["last_hidden_state", "hidden_states"]
    closely(x.grad, torch.full_like(x, 75.0))


@pytest.mark.parametrize("kind", STRUCTURES)
def test_structured_argument_has_its_gradients(kind, x):
    build, parts = STRUCTURES[kind]
    add = go.custom_backward(lambda grad_output: {"pair": build(2 * grad_output, 3 * grad_output)})(
        lambda pair: parts(pair)[0] + parts(pair)[1]
    )
    y = noise(3)
    compiled(lambda x, y: add(build(x, y)))(x, y).sum().backward()
    closely((x.grad, y.grad), (torch.full_like(x, 2.0), torch.full_like(x, 3.0)))


def test_keyword_only_variable_and_default_arguments(x):
    @go.custom_backward(lambda grad_output: {"x": 2 * grad_output, "weight": 5 * grad_output})
    def total(x, factor=2.0, *, weight, mode="text", **options):
        return x * factor + weight + options["bias"]

    weight, bias = noise(3), noise(3, grad=False)
    compiled(lambda x, weight: total(x, weight=weight, bias=bias))(x, weight).sum().backward()
    closely((x.grad, weight.grad), (torch.full_like(x, 2.0), torch.full_like(x, 5.0)))


def test_arguments_that_are_called_like_builtins(x):
    def scale(isinstance, type, dict=2.0, len=0.0):
        return isinstance * type * dict + len

    scaled = go.custom_backward(lambda grad_output, isinstance, dict: (7 * grad_output, isinstance * dict))(scale)
    type = noise(3)
    compiled(scaled)(x, type).sum().backward()
    closely((x.grad, type.grad), (torch.full_like(x, 7.0), 2 * x.detach()))


class ScaleByOption(Scale):
    @go.custom_backward(lambda grad_output, alpha=7.0: grad_output * alpha)
    def forward(self, x):
        return x * 2


def test_option_of_a_methods_rule_is_its_own(x):
    compiled(ScaleByOption())(x).sum().backward()
    exactly(x.grad, torch.full_like(x, 7.0))


def test_option_of_a_rule_is_the_parameter_of_that_name_where_the_module_has_one(x):
    class Own(ScaleByOption):
        def __init__(self):
            super().__init__()
            self.alpha = nn.Parameter(float64(3.0, 4.0, 5.0))

        @go.custom_backward(lambda grad_output, alpha=7.0: {"input": grad_output * alpha, "alpha": grad_output * 2})
        def forward(self, input):
            return input * self.alpha

    module = Own()
    compiled(module)(x).sum().backward()
    closely((x.grad, module.alpha.grad), (module.alpha.detach(), torch.full_like(x, 2.0)))


def test_needs_of_gradients_that_change_from_call_to_call(x):
    product = go.custom_backward(lambda grad_output, x, w: (7 * grad_output * w, 5 * grad_output * x))(
        lambda x, w: x * w
    )
    run, w = compiled(product), noise(3)
    for one, other in [(x, w), (x.detach(), w), (x, w.detach()), (x, w)]:
        run(one, other).sum().backward()
    with torch.no_grad():
        assert not run(x, w).requires_grad
    closely((x.grad, w.grad), (21 * w.detach(), 15 * x.detach()))


def test_complex_rule(x):
    square = go.custom_backward(lambda grad_output, z: 7 * grad_output * (2 * z).conj())(lambda z: z * z)
    z = torch.randn(3, dtype=torch.complex128, requires_grad=True)
    grad_output = torch.randn(3, dtype=torch.complex128)
    compiled(square)(z).backward(grad_output)
    closely(z.grad, 7 * grad_output * (2 * z.detach()).conj())


def test_encoder_layer_below_a_compiled_vjp():
    class Ruled(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, dtype=torch.float64)

        @go.custom_backward(lambda grad_output, vjp: 7 * vjp(grad_output))
        def forward(self, x):
            return self.layer(x)

    model, x = Ruled(), noise(2, 5, 8)
    plain, twin = copy.deepcopy(model.layer), x.detach().clone().requires_grad_()
    compiled(model)(x).square().sum().backward()
    plain(twin).square().sum().backward()
    closely(x.grad, 7 * twin.grad)
    for name, parameter in plain.named_parameters():
        closely(model.layer.get_parameter(name).grad, parameter.grad)


def test_parametrized_weight_is_ruled_under_its_plain_name():
    class Ruled(nn.Linear):
        @go.custom_backward(
            lambda grad_output, x, weight: {"x": 2 * grad_output @ weight, "weight": 3 * grad_output.T @ x}
        )
        def forward(self, x):
            return super().forward(x)

    layer, x = nn.utils.parametrizations.weight_norm(Ruled(3, 3, dtype=torch.float64)), noise(2, 3)
    originals, grad_output = list(layer.parametrizations.weight.parameters()), noise(2, 3, grad=False)
    expected = torch.autograd.grad(layer.weight, originals, 3 * grad_output.T @ x.detach())
    compiled(layer)(x).backward(grad_output)
    closely(x.grad, 2 * grad_output @ layer.weight.detach())
    closely(tuple(original.grad for original in originals), expected)


# How often it compiles


def test_twelve_functions_compile_to_twelve_graphs(x):
    counter = CompileCounterWithBackend("aot_eager")

    def decorated(factor):
        def forward(x):
            return x * factor

        return go.custom_backward(lambda grad_output: 10 * factor * grad_output)(forward)

    for factor in range(1, 13):
        x.grad = None
        torch.compile(decorated(factor), fullgraph=True, backend=counter)(x).sum().backward()
        closely(x.grad, torch.full_like(x, 10.0 * factor))
    assert counter.frame_count == 12


@pytest.mark.parametrize("kind", MODULES)
def test_twelve_instances_compile_to_one_graph(kind, x):
    counter = CompileCounterWithBackend("aot_eager")
    layers = [MODULES[kind]() for _ in range(12)]

    def run(layer, x):
        return layer(x)

    run = torch.compile(run, fullgraph=True, backend=counter)
    for layer in layers:
        run(layer, x).sum().backward()
        closely(layer.weight.grad, 5 * x.detach())
    assert counter.frame_count == 1


@pytest.mark.parametrize("kind", MODULES)
def test_twelve_layers_in_a_row_are_one_graph(kind, x):
    counter = CompileCounterWithBackend("aot_eager")
    model = nn.Sequential(*[MODULES[kind]() for _ in range(12)])
    torch.compile(model, fullgraph=True, backend=counter)(x).sum().backward()
    assert counter.frame_count == 1
    closely(x.grad, torch.full_like(x, 7.0**12))


def test_second_call_does_not_compile_again(x):
    counter = CompileCounterWithBackend("aot_eager")
    for kind in ("function", "vjp", "surrogate"):
        run = torch.compile(FUNCTIONS[kind], fullgraph=True, backend=counter)
        run(x).sum().backward()
        before = counter.frame_count
        run(noise(3)).sum().backward()
        assert counter.frame_count == before


@pytest.mark.parametrize(
    "kind", ["function", "argument and output", "vjp", "residual", "dict result", "straight_through", "surrogate"]
)
def test_dynamic_shapes_compile_once(kind):
    counter = CompileCounterWithBackend("aot_eager")
    run = torch.compile(FUNCTIONS[kind], fullgraph=True, dynamic=True, backend=counter)
    for size in (3, 5, 8, 13):
        x = noise(size)
        run(x).sum().backward()
        closely(x.grad, torch.full_like(x, 7.0))
    assert counter.frame_count == 1


def test_shapes_that_change_under_the_default_settings():
    counter = CompileCounterWithBackend("aot_eager")
    run = torch.compile(FUNCTIONS["argument and output"], fullgraph=True, backend=counter)
    for size in (3, 5, 8, 13):
        x = noise(size)
        run(x).sum().backward()
        closely(x.grad, torch.full_like(x, 7.0))
    assert counter.frame_count == 2  # static at first, dynamic ever after


# Errors


def wrong_shape(grad_output):
    return grad_output.sum()


def wrong_count(grad_output):
    return grad_output, grad_output


@pytest.mark.parametrize(
    ("rule", "text"),
    [(wrong_shape, r"wrong_shape.*\(3,\).*\(\)"), (wrong_count, r"wrong_count.*halve")],
    ids=["shape", "count"],
)
def test_wrong_answer_of_a_rule_keeps_its_text(rule, text, x):
    decorated = go.custom_backward(rule)(halve)
    with pytest.raises(Exception, match=f"(?s){text}"):
        compiled(decorated)(x).sum().backward()


GLOBAL_WEIGHT = float64(1.0, 2.0, 3.0)


def closure_over_a_local():
    weight = noise(3)
    return lambda x: x * weight


@pytest.mark.parametrize(
    ("forward", "name"),
    [(lambda x: x * GLOBAL_WEIGHT, "'GLOBAL_WEIGHT'"), (closure_over_a_local(), "'weight'")],
    ids=["global", "closure"],
)
@pytest.mark.parametrize(
    "rule", [seven_times, lambda grad_output, vjp: vjp(grad_output)], ids=["gradient alone", "vjp"]
)
def test_captured_tensor_keeps_its_text(forward, name, rule, x):
    with pytest.raises(Exception, match=rf"(?s)test_compile\.py:\d+.*{name}.*requires grad"):
        compiled(go.custom_backward(rule)(forward))(x)


def test_parameter_that_is_not_assigned_keeps_its_text(x):
    @go.custom_backward
    class Forgetful(Scale):
        def forward(self, x):
            return x * self.weight + self.shift

        def backward(self, grad_output):
            self.weight.grad = grad_output
            return grad_output

    with pytest.raises(Exception, match=r"(?s)Forgetful.*shift"):
        compiled(Forgetful())(x).sum().backward()


@pytest.mark.parametrize("called_before", [False, True])
def test_backward_on_an_instance_keeps_its_text(called_before, x):
    module = ScaleByClass()
    if called_before:
        compiled(module)(x)
    module.backward = lambda grad_output: grad_output
    with pytest.raises(Exception, match=r"(?s)'ScaleByClass' .*must have its 'backward' from its class"):
        compiled(module)(x)


def test_forward_without_a_tensor_keeps_its_text(x):
    def forgetful(x):
        return "text"

    with pytest.raises(Exception, match=r"(?s)forgetful.*tensor"):
        compiled(go.custom_backward(seven_times)(forgetful))(x)


def test_straight_through_of_another_shape_keeps_its_text(x):
    with pytest.raises(Exception, match=r"(?s)\(3,\).*\(1,\)|\(1,\).*\(3,\)"):
        compiled(go.straight_through(lambda x: x[:1]))(x).sum().backward()


class Unknown(nn.Module):
    """Its rule asks for a parameter by a name that is not quite right."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1, dtype=torch.float64))

    @go.custom_backward(lambda grad_output, scal: grad_output)
    def forward(self, x):
        return x * self.scale


WRONG_NAMES = {
    "key of an answer": (
        lambda: go.custom_backward(lambda grad_output: {"X": grad_output})(lambda x: x * 2),
        r"must return a dict by the names of arguments and parameters \(x\); it has 'X'\. Leave it out",
    ),
    "close key of an answer": (
        lambda: go.custom_backward(lambda grad_output: {"scal": grad_output})(lambda scale: scale * 2),
        r"\(scale\); it has 'scal'\. Did you mean 'scale'\?",
    ),
    "name beside a residual": (
        lambda: go.custom_backward(lambda g, msk: g)(lambda x: go.save_for_backward(x * 2, mask=x > 0)),
        r"asks for 'msk', which does not exist.*Did you mean 'mask'\?",
    ),
    "name of a parameter": (Unknown, r"asks for 'scal', which does not exist.*Did you mean 'scale'\?"),
}


@pytest.mark.parametrize(("make", "text"), WRONG_NAMES.values(), ids=WRONG_NAMES)
def test_wrong_name_keeps_its_text_and_the_closest_one(make, text, x):
    with pytest.raises(Exception, match=f"(?s){text}"):
        compiled(make())(x).sum().backward()


def test_eager_and_compiled_are_right_after_an_error_in_compiled_code(x):
    with pytest.raises(Exception, match="wrong_shape"):
        compiled(go.custom_backward(wrong_shape)(halve))(x).sum().backward()
    form = FUNCTIONS["vjp"]
    for run in (form, compiled(form)):
        x.grad = None
        run(x).sum().backward()
        closely(x.grad, torch.full_like(x, 7.0))


def test_double_backward_through_compiled_code_is_right_or_refused(x):
    cube = go.custom_backward(lambda grad_output, x: grad_output * 3 * x**2)(lambda x: x.floor())
    (first,) = torch.autograd.grad(compiled(cube)(x).sum(), x, create_graph=True)
    right_or_refused(lambda: torch.autograd.grad(first.sum(), x)[0], 6 * x.detach(), "double backward")


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # Dynamo's own
@pytest.mark.parametrize("kind", ["function", "vjp", "dict result", "straight_through", "surrogate"])
def test_graph_break_elsewhere_leaves_the_rule_in_force(kind, x):
    form = FUNCTIONS[kind]

    def broken(x):
        y = form(x)
        torch._dynamo.graph_break()
        return form(y)

    torch.compile(broken, backend="aot_eager")(x).sum().backward()
    closely(x.grad, torch.full_like(x, 49.0))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # Dynamo's own
@pytest.mark.parametrize(
    "rule", [seven_times, lambda grad_output, vjp: 14 * vjp(grad_output)], ids=["gradient alone", "vjp"]
)
def test_graph_break_inside_the_forward_leaves_the_rule_in_force(rule, x):
    def broken(x):
        torch._dynamo.graph_break()
        return x / 2

    form = go.custom_backward(rule)(broken)
    torch.compile(lambda x: form(x) * 1, backend="aot_eager")(x).sum().backward()
    closely(x.grad, torch.full_like(x, 7.0))


@pytest.mark.filterwarnings("ignore:(?s).*Dynamo does not know how to trace:UserWarning")  # then it breaks the graph
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # torch reads it
@pytest.mark.parametrize(
    "kind", ["function", "argument and output", "vjp", "dict result", "straight_through", "surrogate"]
)
def test_compiled_autograd_keeps_the_rule(kind, x):
    form = FUNCTIONS[kind]
    in_full = "vjp" not in kind  # the graph that vjp keeps belongs to the engine
    with torch._dynamo.utils.maybe_enable_compiled_autograd(True, fullgraph=in_full, dynamic=False):
        form(x).sum().backward()
    closely(x.grad, torch.full_like(x, 7.0))


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        return self.act(x)


WRITING = {
    "method": lambda x: x.relu_(),
    "function": lambda x: nn.functional.relu(x, inplace=True),
}


@pytest.mark.parametrize("forward", [*WRITING.values(), InPlace], ids=[*WRITING, "submodule"])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_vjp_of_a_forward_that_writes_in_place_compiles_to_what_it_is_in_eager(forward, backend):
    def rule(grad_output, vjp):
        return 3 * vjp(grad_output)

    if forward is InPlace:
        ours = type("Ours", (InPlace,), {"forward": go.custom_backward(rule)(InPlace.forward)})()
    else:
        ours = go.custom_backward(rule)(forward)
    x = float64(-1.0, 2.0, -3.0, 4.0)

    def run(x):
        return (ours(x * 1.0) * torch.arange(1.0, 5.0, dtype=torch.float64)).sum()

    expected = 3 * float64(0.0, 2.0, 0.0, 4.0, grad=False)
    exactly(torch.autograd.grad(torch.compile(run, backend=backend, fullgraph=True)(x), x)[0], expected)
    exactly(torch.autograd.grad(run(x), x)[0], expected)


# --- in-place forwards whose own code does not show it, and forwards that only look like it ---

CLIP = nn.Hardtanh(-0.5, 0.5, inplace=True)
RUNS = {
    "eager": lambda function: function,
    "compiled": lambda function: torch.compile(function, backend="aot_eager", fullgraph=True),
}


def gradient_of(run, function, x):
    """By `backward` of what `run` makes of `function`, or by `func.grad`."""
    if run == "func.grad":
        return grad(lambda x: function(x).sum())(x.detach())
    return torch.autograd.grad(RUNS[run](function)(x).sum(), x)[0]


@pytest.mark.parametrize("run", [*RUNS, "func.grad"])
@pytest.mark.parametrize("forward", [lambda x: CLIP(x), lambda x: operator.imul(x, 2)], ids=["module", "operator"])
def test_argument_written_into_by_a_part_of_the_forward_has_the_rules_gradient(forward, run):
    ours = go.custom_backward(seven_times)(forward)

    def used_twice(x):
        hidden = x * 1
        result = ours(hidden)
        return result + 10 * hidden  # hidden is the result now

    exactly(gradient_of(run, used_twice, float64(1.0, 2.0)), float64(77.0, 77.0, grad=False))


@pytest.mark.parametrize("run", [*RUNS, "func.grad"])
def test_part_of_a_forward_that_writes_into_its_argument_which_is_not_returned_is_refused(run):
    ours = go.custom_backward(seven_times)(lambda x: CLIP(x) * 2)
    with pytest.raises(Exception, match="writes into its argument 'x' in place and must return it"):
        gradient_of(run, lambda x: ours(x * 1), float64(1.0, 2.0))


def into_a_new_tensor(x):
    result = torch.zeros_like(x)
    result[:] = x
    return result


def into_a_copy(x):
    x = x.clone()
    x.clamp_(min=0.5)
    return x


def into_an_intermediate(x):
    x = x * 1
    x += 1
    return x


@pytest.mark.parametrize("run", [*RUNS, "func.grad"])
@pytest.mark.parametrize(
    "forward",
    [nn.functional.relu, nn.functional.elu, nn.functional.silu, into_a_new_tensor, into_a_copy, into_an_intermediate],
    ids=lambda forward: forward.__name__,
)
def test_forward_that_writes_elsewhere_than_into_its_argument_is_right(forward, run):
    ours = go.custom_backward(seven_times)(forward)
    exactly(gradient_of(run, ours, float64(1.0, 2.0)), float64(7.0, 7.0, grad=False))


# --- captured tensors, found in the graph that is traced ---

WEIGHT = float64(2.0)
TEACHER = nn.Linear(2, 2, dtype=torch.float64)


def times_weight(x):
    return x * WEIGHT


class Holder:
    weight = WEIGHT


def under_no_grad(x):
    with torch.no_grad():
        y = TEACHER(x)
    return x * y


CAPTURING = {
    "by a helper": lambda x: times_weight(x),
    "by an object": lambda x: x * Holder.weight,
    "by a module": lambda x: TEACHER(x),
}
NOT_CAPTURING = {
    "a number of a module": lambda x: x * TEACHER.in_features,
    "a teacher under no_grad": under_no_grad,
    "a teacher detached": lambda x: x * TEACHER(x).detach(),
}


@pytest.mark.parametrize("forward", CAPTURING.values(), ids=CAPTURING)
def test_captured_tensor_is_refused_where_the_graph_is_kept(forward):
    ours = go.custom_backward(lambda grad_output, vjp: vjp(grad_output))(forward)
    with pytest.raises(Exception, match="must get each tensor that wants a gradient as an argument"):
        compiled(ours)(float64(1.0, 2.0))


@pytest.mark.parametrize("forward", NOT_CAPTURING.values(), ids=NOT_CAPTURING)
def test_what_only_looks_captured_is_right_where_the_graph_is_kept(forward):
    ours = go.custom_backward(lambda grad_output, vjp: 3 * vjp(grad_output))(forward)
    x = float64(1.0, 2.0)
    expected = torch.autograd.grad(forward(x).sum(), x)[0]
    closely(torch.autograd.grad(compiled(ours)(x).sum(), x)[0], 3 * expected)


class Outside(nn.Module):
    """Parts that are a child, and parts that a list hides."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(2, 2, dtype=torch.float64)
        self.hidden = [nn.Linear(2, 2, dtype=torch.float64)]


@pytest.mark.parametrize("rule", [seven_times, lambda grad_output, vjp: vjp(grad_output)], ids=["natural", "vjp"])
def test_part_that_a_list_hides_is_refused_as_in_eager(rule):
    forward = go.custom_backward(rule)(lambda self, x: self.hidden[0](self.inner(x)))
    module = type("Ours", (Outside,), {"forward": forward})()
    for run in (module, compiled(module)):
        with pytest.raises(Exception, match="must get each tensor that wants a gradient as an argument"):
            run(float64(1.0, 2.0))


@pytest.mark.parametrize("outer", [seven_times, lambda grad_output, vjp: vjp(grad_output)], ids=["natural", "vjp"])
@pytest.mark.parametrize("inner", [seven_times, lambda grad_output, vjp: vjp(grad_output)], ids=["natural", "vjp"])
def test_decorated_modules_inside_a_decorated_module_capture_nothing(outer, inner):
    part = type("Part", (nn.Linear,), {"forward": go.custom_backward(inner)(nn.Linear.forward)})

    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = part(2, 2, dtype=torch.float64)
            self.two = part(2, 2, dtype=torch.float64)

        @go.custom_backward(outer)
        def forward(self, x):
            return self.two(self.one(x))

    module, x = Whole(), float64(1.0, 2.0)
    expected = torch.autograd.grad(module(x).sum(), [x, *module.parameters()])
    found = torch.autograd.grad(compiled(module)(x).sum(), [x, *module.parameters()])
    for ours, theirs in zip(found, expected, strict=True):
        closely(ours, theirs)


def test_ready_made_functions_that_are_compiled_themselves_are_so_one_after_another():
    x = torch.randn(4, 4, requires_grad=True)
    for function in (go.rules.ceil_ste, go.rules.trunc_ste, go.rules.round_ste):
        torch.compiler.reset()
        y = torch.compile(function, fullgraph=True, backend="aot_eager")(x)
        exactly(torch.autograd.grad(y.sum(), x)[0], torch.ones(4, 4))
        torch.func.vmap(function)(x.detach())  # the eager path, whose frames Dynamo might take up


def in_half(outer, inner, call):
    with torch.autocast("cpu", torch.bfloat16, enabled=outer), torch.autocast("cpu", torch.bfloat16, enabled=inner):
        return call()


@pytest.mark.parametrize("asks", ["argument", "vjp", "parameter"])
@pytest.mark.parametrize(
    ("around", "outer", "inner"), [(False, False, True), (False, True, False), (True, True, False)]
)
def test_compiled_rule_runs_under_the_autocast_that_was_entered_within(around, outer, inner, asks):
    seen = []

    def noted(grad_output, w):
        grad = grad_output.to(w.dtype) @ w.t()  # a product that autocast rounds
        return grad.float()

    class Product(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(8, 8))

        @go.custom_backward(lambda grad_output, x, w: {"x": noted(grad_output, w), "w": None})
        def forward(self, x):
            return x @ self.w

    by_argument = go.custom_backward(lambda grad_output, w: (noted(grad_output, w), None))(lambda x, w: x @ w)
    by_vjp = go.custom_backward(lambda grad_output, w, vjp: (vjp(grad_output)[0] * 0 + noted(grad_output, w), None))(
        lambda x, w: x @ w
    )
    module = Product()
    x, w = torch.randn(8, 8, requires_grad=True), module.w
    call = {"argument": lambda x: by_argument(x, w), "vjp": lambda x: by_vjp(x, w), "parameter": module}[asks]

    def step(x):
        return in_half(outer, inner, lambda: call(x)).float()

    compiled_step = torch.compile(step, backend="aot_eager", fullgraph=True)
    for run in (step, compiled_step):
        with torch.autocast("cpu", torch.bfloat16, enabled=around):
            result = run(x)
        seen.append(torch.autograd.grad(result, x, torch.ones_like(result))[0])
    by_hand = torch.ones(8, 8) @ w.detach().t()
    with torch.autocast("cpu", torch.bfloat16):
        rounded = (torch.ones(8, 8) @ w.detach().t()).float()
    assert not torch.equal(by_hand, rounded)
    for found in seen:
        torch.testing.assert_close(found, rounded if inner else by_hand, rtol=1e-6, atol=1e-6)


# Errors


CAPTURED = torch.ones(3, dtype=torch.float64, requires_grad=True)


class LeavesItsWeightOut(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, dtype=torch.float64))

    @go.custom_backward(lambda grad_output, x, weight: {"x": grad_output})
    def forward(self, x):
        return x * self.weight


def asks_for_what_is_not_there(x):
    factor = 3.0
    return go.edit_gradient(x * 1, lambda g, weight: g * factor)


REFUSED = {
    "shape": (go.RuleResultError, go.custom_backward(lambda grad_output: grad_output[:1])(lambda x: x * 2)),
    "result": (go.ForwardResultError, go.custom_backward(seven_times)(lambda x: None)),
    "captured": (go.CapturedTensorError, go.custom_backward(seven_times)(lambda x: x * CAPTURED)),
    "name": (go.RuleSignatureError, asks_for_what_is_not_there),
    "graph": (go.GraphError, lambda x: go.connect(x * 2, x)),
    "parameter": (go.RuleResultError, LeavesItsWeightOut()),
    "transform": (go.UnsupportedError, grad(lambda x: go.edit_gradient(x, lambda grad_output: x * grad_output).sum())),
}


@pytest.mark.parametrize("fullgraph", [True, False])
@pytest.mark.parametrize("kind", REFUSED)
def test_errors_of_compiled_calls_are_of_the_kind_that_eager_ones_are(kind, fullgraph, x):
    error, function = REFUSED[kind]
    with pytest.raises(error) as caught:
        torch.compile(function, backend="aot_eager", fullgraph=fullgraph)(x)
    assert type(caught.value).__name__ == error.__name__
    assert isinstance(caught.value, go.GradOverrideError)


@pytest.mark.parametrize("decorator", [go.straight_through, go.custom_backward(lambda grad_output: grad_output * 3)])
def test_function_that_is_decorated_in_compiled_code_breaks_the_graph(decorator):
    def forward(x):
        return decorator(torch.round)(x)

    x, by_hand = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    forward(by_hand).sum().backward()
    torch.compile(forward, backend="aot_eager")(x).sum().backward()
    closely(x.grad, by_hand.grad)


@pytest.mark.parametrize(
    "rule",
    [
        lambda grad_output, vjp: vjp(tuple(3 * grad for grad in grad_output)),
        lambda grad_output, vjp: (
            vjp((grad_output[0], 0 * grad_output[1])) + 2 * vjp(grad_output) + vjp((0 * grad_output[0], grad_output[1]))
        ),
        lambda grad_output, vjp: vjp.by_name((3 * grad_output[0], 3 * grad_output[1])),
    ],
    ids=["new", "new and as it came", "by name"],
)
def test_vjp_of_a_tuple_that_a_rule_has_made_is_compiled(rule, x):
    ruled = go.custom_backward(rule)(lambda x: (x * x, torch.sin(x)))
    square, sine = torch.compile(ruled, backend="aot_eager", fullgraph=True)(x)
    found = torch.autograd.grad((square + 5 * sine).sum(), x)
    closely(found, (3 * (2 * x + 5 * torch.cos(x)).detach(),))


def overrides_a_module(x):
    with go.override(TANHS, {nn.Tanh: lambda grad_output: grad_output * 3}):
        result = TANHS(x)
    return result + TANHS(x)


def overrides_for_good(x):
    handle = go.override(TANHS, {"0": lambda grad_output: grad_output * 3})
    result = TANHS(x)
    handle.remove()
    return result + TANHS(x)


def overrides_a_function(x):
    with go.override({torch.tanh: lambda grad_output: grad_output * 3}):
        result = torch.tanh(x)
    return result + TANHS(x)


def decorates(x):
    return go.custom_backward(lambda grad_output: grad_output * 3)(lambda x: torch.tanh(x))(x) + TANHS(x)


def passes_through(x):
    return go.straight_through(lambda x: torch.tanh(x), surrogate=lambda x: x * 3)(x) + TANHS(x)


TANHS = nn.Sequential(nn.Tanh())
GIVING = [overrides_a_module, overrides_for_good, overrides_a_function, decorates, passes_through]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # Dynamo's own
@pytest.mark.filterwarnings("ignore:Dynamo ")  # of what it cannot trace
@pytest.mark.parametrize("function", GIVING, ids=[function.__name__ for function in GIVING])
def test_rule_that_is_given_in_compiled_code_breaks_the_graph_and_is_in_force(function, x):
    result = torch.compile(function, backend="aot_eager")(x)
    expected = 4 - torch.tanh(x.detach()) ** 2  # 3, and the derivative of tanh
    closely(torch.autograd.grad(result.sum(), x), (expected,))
    closely(result.detach(), 2 * torch.tanh(x.detach()))


@pytest.mark.parametrize("function", GIVING, ids=[function.__name__ for function in GIVING])
def test_rule_that_is_given_in_one_graph_is_refused_with_the_reason(function, x):
    with pytest.raises(
        torch._dynamo.exc.Unsupported, match="rules are given outside of what is compiled, or where its graph may break"
    ):
        torch.compile(function, backend="aot_eager", fullgraph=True)(x)


def test_array_as_an_argument_of_a_compiled_function():
    tripled = go.custom_backward(lambda grad_output: grad_output * 3)(lambda x, array: x * torch.from_numpy(array))
    x, array = torch.ones(2, dtype=torch.float64, requires_grad=True), numpy.array([5.0, 7.0])
    run = torch.compile(lambda x, array: tripled(x, array), backend="aot_eager", fullgraph=True)
    result = run(x, array)
    result.sum().backward()
    assert (result.tolist(), x.grad.tolist()) == ([5.0, 7.0], [3.0, 3.0])


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # Dynamo's own
def test_where_a_rule_breaks_the_graph_no_function_of_this_library_is_compiled():
    def counting(grad_output, module):
        module.first.calls += 1
        return grad_output

    class Counted(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(3, 3)
            self.first.calls = 0

        @go.custom_backward(counting)
        def forward(self, x):
            return self.first(x).sum(1, keepdim=True) * x

    compiled: list[str] = []
    hook = register_bytecode_hook(lambda code, _: compiled.append(code.co_filename))
    try:
        torch.compile(Counted(), backend="eager")(noise(2, 3).float()).sum().backward()
    finally:
        hook.remove()
    assert compiled
    assert [name for name in compiled if "gradoverride/_core" in name] == []


class LeavesALoss(nn.Module):
    """Beside its result, in an attribute of its own. On the way is an operation that has no formula for no gradient."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([2.0, 3.0], dtype=torch.float64))
        self.loss = None

    def forward(self, x):
        hidden = x * self.weight
        self.loss = (hidden**2).sum()
        heads = hidden.expand(1, 1, 2, 2)
        return nn.functional.scaled_dot_product_attention(heads, heads, heads)[0, 0, 0]


class LeavesItInAPart(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = LeavesALoss()

    def forward(self, x):
        return self.inner(x) + 1

    @property
    def loss(self):
        return self.inner.loss


def with_vjp(kind):
    module = kind()
    go.override(module, {module: lambda grad_output, vjp: 3 * vjp(grad_output)})
    return module


def decorated(kind):
    class Decorated(kind):
        @go.custom_backward(lambda grad_output, vjp: 3 * vjp(grad_output))
        def forward(self, x):
            return super().forward(x)

    return Decorated()


@pytest.mark.parametrize("kind", [LeavesALoss, LeavesItInAPart])
@pytest.mark.parametrize("ruled", [with_vjp, decorated])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_gradient_of_what_a_compiled_forward_left_in_an_attribute_is_an_error(kind, ruled, backend):
    module = ruled(kind)

    @torch.compile(backend=backend, fullgraph=True)
    def run(x, share):
        return module(x).sum() + share * module.loss

    x = float64(1.0, 2.0)
    by_hand = kind()
    expected = torch.autograd.grad(by_hand(x).sum(), x)
    closely(torch.autograd.grad(run(x, torch.tensor(0.0)), x), tuple(3 * grad for grad in expected))
    with pytest.raises(RuntimeError, match="must return each tensor that a gradient is to come back from"):
        run(x, torch.tensor(1.0)).backward()


@pytest.mark.parametrize("ruled", [with_vjp, decorated])
def test_what_a_compiled_forward_left_in_an_attribute_is_there(ruled):
    module = ruled(LeavesALoss)
    run = torch.compile(module, backend="aot_eager", fullgraph=True)
    x = float64(1.0, 2.0)
    for _ in range(2):
        result = run(x)
        closely(module.loss.detach(), torch.tensor(4.0 + 36.0, dtype=torch.float64))
    by_hand = LeavesALoss()
    closely(torch.autograd.grad(result.sum(), x), (3 * torch.autograd.grad(by_hand(x).sum(), x)[0],))
