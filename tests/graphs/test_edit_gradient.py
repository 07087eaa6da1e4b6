"""`edit_gradient`: the same value, and a gradient that is edited on its way."""

import functools
import gc
import pickle
import re
import types
import weakref
from collections import UserDict, UserList, deque
from dataclasses import dataclass

import numpy
import pytest
import torch
import torch._dynamo.testing
from oracles import closely, exactly, noise
from torch import nn

import gradoverride as go

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*should not be instantiated:DeprecationWarning",  # Dynamo's own doing, for any Function
)


class Times(torch.autograd.Function):
    """By hand: the identity, with a gradient times `factor`."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad_output):
        return grad_output * ctx.factor, None


def double(grad_output):
    return grad_output * 2


def times_value(grad_output, x):
    return grad_output * x


def grad(y, *inputs, **options):
    found = torch.autograd.grad(y, inputs, **options)
    return found[0] if len(inputs) == 1 else found


# --- the question's chain: x -> operation -> more operations -> result ---


def test_gradient_of_more_operations_is_changed_before_it_reaches_operation():
    x = noise(3, 4)
    middle = x.sin()
    edited = go.edit_gradient(middle, lambda grad_of_more_operation: grad_of_more_operation.clamp(-0.1, 0.1))
    result = edited.exp().sum()
    expected = middle.exp().clamp(-0.1, 0.1) * x.cos()
    closely(grad(result, x), expected)


# --- rules ---


FACTOR = 3.0
RULES = {
    "function": double,
    "lambda": lambda g: g * 2,
    "lambda with a closure": (lambda factor: lambda g: g * factor)(2.0),
    "lambda with a tensor in its closure": (lambda factor: lambda g: g * factor)(torch.tensor(2.0)),
    "lambda with a default": lambda g, factor=2.0: g * factor,
    "lambda with a keyword": lambda g, *, factor=2.0: g * factor,
    "partial": functools.partial(torch.mul, other=2.0),
    "partial of a function": functools.partial(lambda g, factor: g * factor, factor=2.0),
    "bound method": type("Scale", (), {"rule": lambda self, g: g * 2})().rule,
    "object": type("Scale", (), {"__call__": lambda self, g: g * 2})(),
    "one that writes": lambda g: g.mul_(2),
    "one that asks for vjp": lambda g, vjp: vjp(g) * 2,
    "one that answers by name": lambda g: {"x": g * 2},
    "one that answers in a tuple": lambda g: (g * 2,),
}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_rule_of_the_gradient_alone(rule):
    x = noise(3, 4)
    cotangent = noise(3, 4, grad=False)
    before = cotangent.clone()
    y = go.edit_gradient(x.sin(), rule)
    exactly(y, x.sin())
    closely(grad(y, x, grad_outputs=cotangent), cotangent * 2 * x.cos())
    exactly(cotangent, before)


def test_builtin_without_a_signature():
    x = noise(3)
    closely(grad(go.edit_gradient(x * 2, torch.neg).sum(), x), torch.full_like(x, -2))


VALUE_RULES = {
    "x": lambda g, x: g * x,
    "input": lambda g, input: g * input,
    "output": lambda g, output: g * output,
    "several": lambda g, output, x: g * (x + output) / 2,
    "an option besides": lambda g, x, factor=1.0: g * x * factor,
    "keyword": lambda g, *, x: g * x,
    "partial": functools.partial(lambda g, x, factor: g * x * factor, factor=1.0),
    "needs": lambda g, x, needs: g * x * needs["x"],
}


@pytest.mark.parametrize("rule", VALUE_RULES.values(), ids=VALUE_RULES)
def test_rule_that_asks_for_the_value(rule):
    x = noise(3, 4)
    y = go.edit_gradient(x.sin(), rule)
    closely(grad(y.exp().sum(), x), x.sin().exp() * x.sin() * x.cos())


def test_two_lambdas_of_the_same_code_are_two_rules():
    x = noise(3)
    first, second = [go.edit_gradient(x, lambda g, x, factor=factor: g * x * factor) for factor in (2.0, 3.0)]
    closely(grad(first.sum(), x), x * 2)
    closely(grad(second.sum(), x), x * 3)


def test_same_code_with_other_defaults_asks_for_other_names():
    def make(code):
        return lambda g, x=None: g if x is None else g * x

    x = noise(3)
    closely(grad(go.edit_gradient(x, make(0)).sum(), x), x)
    bound = functools.partial(make(0), x=None)
    closely(grad(go.edit_gradient(x, bound).sum(), x), torch.ones_like(x))


def test_wrapped_rules_share_their_code_and_not_their_names():
    def logged(rule):
        @functools.wraps(rule)
        def wrapper(*args, **kwargs):
            return rule(*args, **kwargs)

        return wrapper

    x = noise(3)
    closely(grad(go.edit_gradient(x, logged(double)).sum(), x), torch.full_like(x, 2))
    closely(grad(go.edit_gradient(x, logged(times_value)).sum(), x), x)


def test_none_stops_the_gradient():
    x = noise(3)
    y = go.edit_gradient(x, lambda g: None) + x
    closely(grad(y.sum(), x), torch.ones_like(x))


def test_edits_follow_each_other_from_the_result_back():
    x = noise(3)
    order = []

    def first(g):
        order.append("first")
        return g + 1

    def second(g):
        order.append("second")
        return g * 2

    y = go.edit_gradient(go.edit_gradient(x, first), second)
    closely(grad(y.sum(), x), torch.full_like(x, 3))
    assert order == ["second", "first"]


def test_dtype_of_the_answer_is_cast():
    x = noise(3)
    assert grad(go.edit_gradient(x, lambda g: g.float()).sum(), x).dtype == torch.float64
    assert grad(go.edit_gradient(x, lambda g, x: (g * x).float()).sum(), x).dtype == torch.float64
    half = torch.randn(3, dtype=torch.bfloat16, requires_grad=True)
    assert grad(go.edit_gradient(half, lambda g: g.double()).sum(), half).dtype == torch.bfloat16


def test_complex():
    z = noise(3, dtype=torch.complex128)
    y = go.edit_gradient(z, lambda g: g * 1j)
    cotangent = noise(3, dtype=torch.complex128, grad=False)
    closely(grad(y, z, grad_outputs=cotangent), cotangent * 1j)


# --- against a Function by hand ---


def test_as_by_hand_in_a_network_twice_backward():
    x = noise(5, 4)
    layer = nn.Linear(4, 4).double()

    def loss(edit):
        return edit(layer(edit(x).tanh())).pow(3).sum()

    def gradients(edit):
        (first,) = torch.autograd.grad(loss(edit), x, create_graph=True)
        return first, *torch.autograd.grad(first.square().sum(), [x, layer.weight])

    closely(gradients(lambda t: go.edit_gradient(t, lambda g: g * 0.5)), gradients(lambda t: Times.apply(t, 0.5)))


def test_gradcheck_of_a_rule_that_is_the_derivative():
    """exp(x) with a straight path and a rule that supplies the derivative of exp."""
    x = noise(4)

    def exp(x):
        return go.edit_gradient(x, lambda g, x: g * x.exp()) - x.detach() + x.detach().exp()

    assert torch.autograd.gradcheck(exp, x)


def test_gradgradcheck_with_the_value():
    x = noise(4)  # the rule is the identity, by way of the value
    assert torch.autograd.gradgradcheck(lambda x: go.edit_gradient(x, lambda g, x: g * (x + 1) - g * x).sin(), x)


# --- structures ---


@dataclass
class Pair:
    left: torch.Tensor
    right: torch.Tensor
    name: str = "pair"


def test_structure_is_given_and_returned():
    x = noise(3)
    seen = {}

    def rule(g):
        seen.update(g)
        return {"a": g["a"] * 2, "b": [g["b"][0] * 3, None], "c": None}

    given = {"a": x * 1, "b": [x * 1, 7], "c": "text"}
    edited = go.edit_gradient(given, rule)
    assert list(edited) == ["a", "b", "c"]
    assert edited["b"][1] == 7
    assert edited["c"] == "text"
    closely(grad((edited["a"] * edited["b"][0]).sum(), x), x * 5)
    assert seen["c"] is None
    assert seen["b"][1] is None


@pytest.mark.parametrize("kind", [tuple, list])
def test_sequences(kind):
    x = noise(3)
    edited = go.edit_gradient(kind([x * 1, x * 2]), lambda g: kind([g[0], -g[1]]))
    assert type(edited) is kind
    closely(grad((edited[0] + edited[1]).sum(), x), torch.full_like(x, -1))


def test_dataclass():
    x = noise(3)
    edited = go.edit_gradient(Pair(x * 1, x * 2), lambda g: Pair(g.left * 5, None, None))
    assert isinstance(edited, Pair)
    assert edited.name == "pair"
    closely(grad((edited.left + edited.right).sum(), x), torch.full_like(x, 5))


def test_structure_with_its_value():
    x = noise(3)
    edited = go.edit_gradient((x * 1, x * 2), lambda g, x: (g[0] * x[1], g[1] * x[0]))
    closely(grad((edited[0] + edited[1]).sum(), x), 2 * x + 2 * x)


def test_vjp_has_the_structure_too():
    x = noise(3)
    edited = go.edit_gradient({"x": x * 1}, lambda g, vjp: vjp({"x": g["x"] * 2}))
    closely(grad(edited["x"].sum(), x), torch.full_like(x, 2))


def test_part_without_a_gradient_is_zeros_and_stays_a_constant():
    x, constant = noise(3), noise(3, grad=False)
    seen = []

    def rule(g):
        seen.append([part.clone() for part in g])
        return g

    left, same = go.edit_gradient((x * 1, constant), rule)
    assert same is constant
    closely(grad((left * same).sum(), x), constant)
    exactly(seen[0][1], torch.zeros(3, dtype=torch.float64))


def test_integers_pass_through():
    x = noise(3)
    index = torch.arange(3)
    edited, same = go.edit_gradient((x, index), lambda g: (g[0] * 2, None))
    assert same is index
    closely(grad(edited.sum(), x), torch.full_like(x, 2))


# --- tensors without strides ---


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
@pytest.mark.parametrize("layout", ["to_sparse", "to_sparse_csr", "to_mkldnn"])
@pytest.mark.parametrize("rule", [double, lambda g, x: g * 2 if x.shape == g.shape else None, lambda g, needs: g * 2])
def test_layouts_as_by_a_hook(layout, rule):
    def made():
        return getattr(torch.eye(2), layout)().requires_grad_()

    x, by_hook = made(), made()
    (go.edit_gradient(x, rule) * 3).to_dense().sum().backward()
    y = by_hook * 1
    y.register_hook(double)
    (y * 3).to_dense().sum().backward()
    assert x.grad.layout == by_hook.grad.layout
    exactly(x.grad.to_dense(), by_hook.grad.to_dense())


# --- where no gradient is wanted ---


def test_without_a_gradient_it_is_the_tensor_itself():
    x = noise(3, grad=False)
    assert go.edit_gradient(x, double) is x
    leaf = noise(3)
    with torch.no_grad():
        assert go.edit_gradient(leaf, double) is leaf
    with torch.inference_mode():
        assert go.edit_gradient(leaf, double) is leaf


# --- costs ---


def saved_bytes(run):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.nbytes), lambda t: None):
        run()
    return sum(saved)


def test_without_grad_mode_in_a_transform_it_is_the_tensor_itself():
    def unedited(x):
        with torch.no_grad():
            y, pair = go.edit_gradient(x, double), go.edit_gradient((x, 3), lambda g: g)
        assert y is pair[0] is x
        return y.sin().sum()

    x = noise(4, grad=False)
    closely(torch.func.grad(unedited)(x), x.cos())
    closely(torch.func.vmap(torch.func.grad(unedited))(x[:, None])[:, 0], x.cos())


def test_rule_of_the_gradient_alone_saves_nothing():
    x = noise(3, 4)
    assert saved_bytes(lambda: go.edit_gradient(x, double)) == 0
    assert saved_bytes(lambda: go.edit_gradient((x, x), lambda g: g)) == 0
    assert saved_bytes(lambda: go.edit_gradient(x, times_value)) == x.nbytes


def test_rule_is_not_kept_by_the_library():
    def run(big):
        x = noise(4)
        grad(go.edit_gradient(x, lambda g: g * big).sum(), x)
        grad(go.edit_gradient((x,), lambda g, x: (g[0] * big,))[0].sum(), x)
        return weakref.ref(big)

    watched = run(noise(4, grad=False))
    gc.collect()
    assert watched() is None


def test_value_shares_memory():
    x = noise(3) * 1
    assert go.edit_gradient(x, double).data_ptr() == x.data_ptr()


# --- in place ---


IN_PLACE = {
    "gradient": lambda x: go.edit_gradient(x, double),
    "value": lambda x: go.edit_gradient(x, lambda g, x: g + g),
    "structure": lambda x: go.edit_gradient((x,), lambda g: (g[0] * 2,))[0],
}


@pytest.mark.parametrize("edit", IN_PLACE.values(), ids=IN_PLACE)
def test_write_in_place_after_it_is_refused_with_a_way_out(edit):
    x = noise(3)
    y = edit(x * 1)
    with pytest.raises(RuntimeError, match=r"modified inplace.*cloning the output"):
        y.mul_(2)
    closely(grad(edit(x * 1).clone().mul_(2).sum(), x), torch.full_like(x, 4))


def test_write_into_the_original_after_it_is_noticed():
    x = noise(3)
    middle = x * 1
    y = go.edit_gradient(middle, times_value)
    middle.mul_(2)
    with pytest.raises(RuntimeError, match=r"modified in-?place|modified by an inplace operation"):
        y.sum().backward()


# --- where else it runs ---


COMPILED = {
    "function": lambda x: go.edit_gradient(x * 1, double),
    "lambda": lambda x: go.edit_gradient(x * 1, lambda g: g * 2),
    "value": lambda x: go.edit_gradient(x * 1, lambda g, x: g * x),
    "default": lambda x: go.edit_gradient(x * 1, lambda g, x, factor=3.0: g * x * factor),
    "partial": lambda x: go.edit_gradient(x * 1, functools.partial(torch.mul, other=3.0)),
    "structure": lambda x: go.edit_gradient((x * 1, {"a": x * 2}), lambda g: (g[0] * 2, {"a": g[1]["a"]}))[0],
    "constants": lambda x: go.edit_gradient((x * 1, "a", [None, 3]), lambda g: (g[0] * 2, None, [None, None]))[0],
    "none": lambda x: go.edit_gradient(x * 1, lambda g: None) + x,
    "vjp": lambda x: go.edit_gradient(x * 1, lambda g, vjp: vjp(g) * 2),
    "writes": lambda x: go.edit_gradient(x * 1, lambda g: g.mul_(2)),
    "object": lambda x: go.edit_gradient(x * 1, RULES["object"]),
    "dtype": lambda x: go.edit_gradient(x * 1, lambda g: g.float()),
    "answer by name": lambda x: go.edit_gradient(x * 1, lambda g: {"x": g * 2}),
    "answer in a tuple": lambda x: go.edit_gradient(x * 1, lambda g, x: (g * x,)),
    "answer in a list": lambda x: go.edit_gradient(x * 1, lambda g: [g * 2]),
    "none by name": lambda x: go.edit_gradient(x * 1, lambda g: {"x": None}) + x,
    "empty dict": lambda x: go.edit_gradient(x * 1, lambda g: {}) + x,
    "bound method": lambda x: go.edit_gradient(x * 1, RULES["bound method"]),
}


def closure_number(x):
    factor = 3.0
    return go.edit_gradient(x * 1, lambda g: g * factor)


def closure_tensor(x):
    factor = x.detach() * 2
    return go.edit_gradient(x * 1, lambda g, x: g * factor + x)


def closure_structure(x):
    factor = 3.0
    return go.edit_gradient((x * 1, x * 2), lambda g: (g[0] * factor, g[1]))[0]


def partial_with_a_tensor(x):
    factor = x.detach()
    return go.edit_gradient(x * 1, functools.partial(torch.mul, other=factor))


def closure_with_options(x):
    factor = x.detach()
    return go.edit_gradient(x * 1, lambda g, x, scale=2.0, *, more=3.0: g * x * factor * scale * more)


COMPILED |= {
    f.__name__: f
    for f in (closure_number, closure_tensor, closure_structure, closure_with_options, partial_with_a_tensor)
}


@pytest.mark.parametrize("fn", COMPILED.values(), ids=COMPILED)
def test_compiled_in_one_graph_as_eager(fn):
    x = noise(4)
    expected = grad(fn(x).sin().sum(), x)
    torch._dynamo.reset()
    compiled = torch.compile(fn, backend="aot_eager", fullgraph=True)
    closely(grad(compiled(x).sin().sum(), x), expected)


def test_compiled_rule_with_a_closure_is_refused_for_an_unknown_name():
    def forward(x):
        factor = 3.0
        return go.edit_gradient(x, lambda g, weight: g * weight * factor)

    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"asks for 'weight', which does not exist. 'edit_gradient' offers 'x'"):
        torch.compile(forward, backend="aot_eager", fullgraph=True)(noise(4))


class Ruled(nn.Module):
    """It edits a gradient by a method of its own, which reads a parameter, a number and another method."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor
        self.weight = nn.Parameter(torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64))

    def scaled(self, g):
        return g * self.factor

    def rule(self, grad_output, x, *, power=2):
        return self.scaled(grad_output) * self.weight.detach() * x**power

    def forward(self, x):
        return go.edit_gradient(x.sin(), self.rule)


class RuledBySuper(Ruled):
    def rule(self, grad_output, x):  # it has a free variable: the class
        return super().rule(grad_output, x) + 1


@pytest.mark.parametrize("kind", [Ruled, RuledBySuper])
def test_compiled_rule_may_be_a_method_of_the_module(kind):
    x, module = noise(4), kind(3.0)
    sine = x.sin().detach()
    expected = (3 * module.weight.detach() * sine**2 + (kind is RuledBySuper)) * x.cos()
    torch._dynamo.reset()
    for run in (module, torch.compile(module, backend="aot_eager", fullgraph=True)):
        closely(grad(run(x).sum(), x), expected)


def test_modules_with_rules_that_are_methods_compile_once():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    blocks = [torch.compile(Ruled(2.0), backend=counter, fullgraph=True) for _ in range(12)]
    x = noise(4)
    for block in blocks:
        closely(grad(block(x).sum(), x), 2 * blocks[0].weight.detach() * x.sin() ** 2 * x.cos())
    assert counter.frame_count <= 2


def test_compiled_rule_runs_under_the_autocast_of_its_place():
    weight = torch.randn(4, 4)

    def rule(g):
        return (g @ weight).float()

    def cast(enabled=True):
        return torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled)

    def within(x):
        with cast():
            return go.edit_gradient(x * 1, rule)

    def asks_for_the_value(x):
        with cast():
            return go.edit_gradient(x * 1, lambda g, x: rule(g * x))

    def without(x):
        with cast(enabled=False):
            return go.edit_gradient(x * 1, rule)

    x, g = torch.ones(4, 4, requires_grad=True), torch.randn(4, 4)
    with cast():
        halved = (g @ weight).float()
    for fn, around, expected in (
        (within, False, halved),
        (within, True, halved),
        (asks_for_the_value, False, halved),
        (without, True, g @ weight),
        (without, False, g @ weight),
        (lambda x: go.edit_gradient(x * 1, rule), True, halved),
    ):
        torch._dynamo.reset()
        compiled = torch.compile(fn, backend="aot_eager", fullgraph=True)
        for run in (fn, compiled):
            with cast(enabled=around):
                y = run(x)
            exactly(grad(y, x, grad_outputs=g), expected)


@pytest.mark.parametrize("name", ["shape", "kind", "count", "complex", "integer", "bool"])
def test_compiled_refuses_a_wrong_answer_by_the_text(name):
    rule, text = WRONG[name]
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: go.edit_gradient(x * 1, rule), backend="aot_eager", fullgraph=True)
    with pytest.raises(Exception, match=rf"rule '<lambda>' {HERE} of 'edit_gradient' must.*{text}|{text}"):
        compiled(noise(4)).sum().backward()


def test_vmap_and_grad():
    def loss(x):
        return go.edit_gradient(x.sin(), lambda g, x: g * x).sum()

    x = noise(3, 4, grad=False)
    closely(torch.func.vmap(torch.func.grad(loss))(x), x.sin() * x.cos())
    closely(torch.func.grad(loss)(x), x.sin() * x.cos())


def test_forward_mode_is_the_rule_transposed():
    x, tangent = noise(4, grad=False), noise(4, grad=False)
    _, found = torch.func.jvp(lambda x: go.edit_gradient(x, lambda g: g * 3), (x,), (tangent,))
    closely(found, tangent * 3)


def test_autocast_of_the_forward_is_that_of_the_rule():
    weight = torch.randn(3, 3)
    dtypes = []

    def rule(g):
        dtypes.append((g @ weight).dtype)
        return g

    x = torch.randn(2, 3, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = go.edit_gradient(x, rule)
    y.sum().backward()
    outside = go.edit_gradient(x, rule)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outside.sum().backward()
    assert dtypes == [torch.bfloat16, torch.float32]


def test_checkpoint():
    from torch.utils.checkpoint import checkpoint

    x = noise(4)
    y = checkpoint(lambda x: go.edit_gradient(x.sin(), times_value).exp(), x, use_reentrant=False)
    closely(grad(y.sum(), x), x.sin().exp() * x.sin() * x.cos())


def test_parameter_and_leaf():
    leaf = nn.Parameter(torch.ones(3))
    y = go.edit_gradient(leaf, double)
    assert not y.is_leaf
    assert leaf.is_leaf
    y.sum().backward()
    exactly(leaf.grad, torch.full((3,), 2.0))


def test_node_has_the_name():
    assert go.edit_gradient(noise(3), double).grad_fn.name() == "edit_gradientBackward"


def test_retain_graph():
    x = noise(3)
    y = go.edit_gradient(x, times_value).sum()
    closely(grad(y, x, retain_graph=True), grad(y, x))


# --- errors ---


def test_nothing_to_edit():
    with pytest.raises(go.GraphError, match=r"'x' must be a floating .* tensor of shape \(3,\) of torch.int64"):
        go.edit_gradient(torch.arange(3), double)
    with pytest.raises(go.GraphError, match=r"or hold one.*; got a tuple of 2"):
        go.edit_gradient((1, "a"), lambda g: g)


@pytest.mark.parametrize("kind", [deque, UserList, set, lambda parts: UserDict(enumerate(parts))])
def test_tensors_in_what_is_not_looked_into_are_refused(kind):
    x = noise(3)
    with pytest.raises(go.GraphError, match=r"'x' must hold its tensors in tuples, lists, .*Turn that into one of"):
        go.edit_gradient((x, {"a": kind([x * 2])}), lambda g: g)
    go.edit_gradient((x, kind(["a", 2])), lambda g: g)


class Cache:
    def __init__(self, key):
        self.key = key


class Slotted:
    __slots__ = ("key",)

    def __init__(self, key):
        self.key = key


class Record(dict):
    """A container, with an attribute besides."""


def record(key):
    made = Record()
    made.key = key
    return made


HOLDERS = {
    "object": (Cache, r"x\[1\]\.key"),
    "slots": (Slotted, r"x\[1\]\.key"),
    "namespace": (lambda key: types.SimpleNamespace(key=key), r"x\[1\]\.key"),
    "object in an object": (lambda key: Cache([Cache(key)]), r"x\[1\]\.key\[0\]\.key"),
    "object in a dict": (lambda key: {"cache": Cache(key)}, r"x\[1\]\['cache'\]\.key"),
    "object in a dataclass": (lambda key: Pair(Cache(key), None), r"x\[1\]\.left\.key"),
    "attribute of a dict": (record, r"x\[1\]\.key"),
    "items of a dict": (lambda key: {"key": key}.items(), r"x\[1\]\[0\]\[1\]"),
    "mapping proxy": (lambda key: types.MappingProxyType({"key": key}), r"x\[1\]\['key'\]"),
}


@pytest.mark.parametrize(("hold", "path"), HOLDERS.values(), ids=HOLDERS)
def test_tensor_within_an_object_is_refused_by_its_name(hold, path):
    x = noise(3)
    text = rf"edit_gradient: 'x' must hold .*; it has '{path}', which requires grad.* or detach\(\) the tensor"
    with pytest.raises(go.GraphError, match=text):
        go.edit_gradient((x * 2, hold(x * 3)), lambda g: (g[0], None))
    constant = hold(noise(3, grad=False))
    h, _ = go.edit_gradient((x * 2, constant), lambda g: (g[0] * 5, None))
    closely(grad(h.sum(), x), torch.full_like(x, 10))
    with torch.no_grad():
        go.edit_gradient((x * 2, hold(x)), lambda g: (g[0], None))


def test_modules_and_objects_without_tensors_stay_beside_what_is_edited():
    x = noise(3)
    others = [nn.Linear(2, 2), Cache(3), Cache(nn.Linear(2, 2)), nn.Linear, Cache(3).__init__, noise, {1, 2}, numpy]
    h, kept = go.edit_gradient((x * 2, others), lambda g: (g[0] * 5, None))
    closely(grad(h.sum(), x), torch.full_like(x, 10))
    assert all(one is other for one, other in zip(kept, others, strict=True))


def test_tensor_within_an_object_is_refused_in_compiled_code_and_in_transforms():
    def fn(x, hold=Cache):
        return go.edit_gradient((x * 2, hold(x * 3)), lambda g: (g[0] * 5, None))[0].sum()

    with pytest.raises(Exception, match=r"it has 'x\[1\]\.key', which requires grad"):
        torch.compile(fn, backend="aot_eager", fullgraph=True)(noise(3))
    with pytest.raises(go.GraphError, match=r"it has 'x\[1\]\.key', which requires grad"):
        torch.func.grad(fn)(noise(3, grad=False))
    with pytest.raises(go.GraphError, match=r"it has 'x\[1\]\.key', which requires grad"):
        torch.func.jvp(fn, (noise(3, grad=False),), (noise(3, grad=False),))

    def beside(x):
        return fn(x, lambda key: Cache(constant))

    constant = noise(3, grad=False)
    closely(torch.func.grad(beside)(noise(3, grad=False)), torch.full((3,), 10.0, dtype=torch.float64))
    for other in (Cache(3), types.SimpleNamespace(n=1, t=constant), Slotted("a"), {1, 2}, torch.Size([1]), slice(1)):
        torch._dynamo.reset()
        x = noise(3)
        compiled = torch.compile(lambda x, o: fn(x, lambda key: o), backend="aot_eager", fullgraph=True)
        closely(grad(compiled(x, other), x), torch.full_like(x, 10))


HERE = r"\(.*test_edit_gradient\.py:\d+\)"


def test_unknown_name():
    with pytest.raises(go.RuleSignatureError, match=r"asks for 'values', .* 'edit_gradient' offers 'x'"):
        go.edit_gradient(noise(3), lambda g, values: g)


def test_rule_is_looked_at_where_no_gradient_is_wanted():
    with pytest.raises(go.RuleSignatureError, match="got 3, an int"):
        go.edit_gradient(noise(3, grad=False), 3)


WRONG = {
    "shape": (lambda g: g[:2], r"a gradient of shape \(4,\) for 'x'.*returned a tensor of shape \(2,\)"),
    "kind": (lambda g: 3, r"a tensor of shape \(4,\) as the gradient of 'x'; it returned 3, an int"),
    "count": (lambda g: (g, g), r"at most 1 gradients"),
    "complex": (lambda g: g * 1j, r"must return a real gradient for 'x'"),
    "integer": (lambda g: g.long(), r"must return a floating gradient for 'x'"),
    "bool": (lambda g: g > 0, r"must return a floating gradient for 'x'"),
}


@pytest.mark.parametrize(("rule", "text"), WRONG.values(), ids=WRONG)
def test_wrong_answer(rule, text):
    x = noise(4)
    y = go.edit_gradient(x, rule)
    with pytest.raises(go.RuleResultError, match=rf"rule '<lambda>' {HERE} of 'edit_gradient' must.*{text}|{text}"):
        y.sum().backward()
    assert x.grad is None


def test_wrong_structure():
    x = noise(4)
    y = go.edit_gradient((x, x), lambda g: g[0])
    with pytest.raises(go.RuleResultError, match=r"mirrors the structure of 'x'"):
        (y[0] + y[1]).sum().backward()
    y = go.edit_gradient({"a": x}, lambda g: {"b": g["a"]})
    with pytest.raises(go.RuleResultError, match=r"mirrors the structure of 'x', \{a: \*\}; it returned a dict"):
        y["a"].sum().backward()


class Twice:
    def __mul__(self, tensor):
        return tensor.mul_(2)


twice = Twice()


def test_write_that_the_code_does_not_show_is_refused():
    x = noise(4)
    with pytest.raises(go.RuleResultError, match="must not write into the gradient"):
        (go.edit_gradient(x, lambda g: twice * g) * 2).sum().backward()


def test_error_in_a_rule_says_which():
    def broken(g):
        raise KeyError("inside")

    with pytest.raises(KeyError, match="inside") as error:
        go.edit_gradient(noise(3), broken).sum().backward()
    assert "in the rule 'broken'" in error.value.__notes__[0]
    assert "of 'edit_gradient'" in error.value.__notes__[0]


def test_error_in_arithmetic_says_which():
    with pytest.raises(ZeroDivisionError) as error:
        go.edit_gradient(noise(3), lambda g: g * (1 / 0)).sum().backward()
    (note,) = error.value.__notes__
    assert re.fullmatch(rf"in the rule '<lambda>' {HERE} of 'edit_gradient'", note)


@pytest.mark.parametrize("rule", [lambda g: g.reshape(7), lambda g, x: x.reshape(7)], ids=["alone", "with the value"])
def test_error_in_an_expression_says_which(rule):
    with pytest.raises(RuntimeError, match="shape") as error:
        go.edit_gradient(noise(3), rule).sum().backward()
    (note,) = error.value.__notes__
    assert re.fullmatch(rf"in the rule '<lambda>' {HERE} of 'edit_gradient'", note)


def test_option_called_name_is_not_taken_for_the_name_of_the_rule():
    x = noise(3)
    with pytest.raises(go.NonFiniteGradientError) as error:
        (go.edit_gradient(x, go.rules.check_finite("h")) / 0).sum().backward()
    assert error.value.__notes__[0].startswith("in the rule 'check_finite' (")


def test_rule_that_is_none_is_called_none():
    with pytest.raises(go.RuleSignatureError, match="got None"):
        go.edit_gradient(noise(3), None)


def test_graph_error_is_a_value_error_and_pickles():
    assert issubclass(go.GraphError, ValueError)
    assert issubclass(go.GraphError, go.GradOverrideError)
    assert str(pickle.loads(pickle.dumps(go.GraphError("text")))) == "text"


def test_blocks_with_rule_objects_of_their_own_compile_once():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.rule = go.rules.scale(0.5)

        def forward(self, x):
            return go.edit_gradient(x * 1, self.rule)

    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    blocks = [torch.compile(Block(), backend=counter, fullgraph=True) for _ in range(12)]
    x = noise(3)
    y = x
    for block in blocks:
        y = block(y)
    closely(grad(y.sum(), x), torch.full_like(x, 0.5**12))
    assert counter.frame_count <= 2


def test_estimator_is_refused_for_there_is_no_forward_to_evaluate():
    with pytest.raises(
        go.RuleSignatureError, match=r"must have a forward with arguments.*'edit_gradient' has none\. Use"
    ):
        go.edit_gradient(noise(3), go.estimators.finite_difference())
