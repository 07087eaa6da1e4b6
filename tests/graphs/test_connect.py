"""`connect`: a result that was computed outside of autograd gets a gradient."""

import functools
import types
from collections import UserDict, deque

import numpy
import pytest
import torch
from oracles import closely, exactly, noise
from torch import nn

import gradoverride as go

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*should not be instantiated:DeprecationWarning",  # Dynamo's own doing, for any Function
)


def grad(y, *inputs, **options):
    found = torch.autograd.grad(y, inputs, **options)
    return found[0] if len(inputs) == 1 else found


def outside(fn, *tensors):
    """`fn` of arrays, as tensors without a graph."""
    return torch.from_numpy(fn(*[tensor.detach().numpy() for tensor in tensors]))


def cube_rule(grad_output, input):
    return grad_output * 3 * input**2


def cube(x):
    return go.connect(outside(lambda array: array**3, x), x, cube_rule)


# --- one input ---


def test_value_and_gradient():
    x = noise(3, 4)
    y = cube(x)
    exactly(y, torch.from_numpy(x.detach().numpy() ** 3))
    closely(grad(y.sin().sum(), x), (x**3).cos() * 3 * x**2)


def test_result_computed_in_inference_mode():
    x = noise(4)
    with torch.inference_mode():
        result = x**3
    y = go.connect(result, x, cube_rule)
    exactly(y.detach(), x.detach() ** 3)
    closely(grad(y.sum() + x.sum(), x), 3 * x.detach() ** 2 + 1)


def test_gradcheck_and_gradgradcheck():
    x = noise(4)
    assert torch.autograd.gradcheck(cube, x)
    assert torch.autograd.gradgradcheck(cube, x)


def test_create_graph_through_it():
    x = noise(4)

    def third(fn):
        first = grad(fn(x.sin()).exp().sum(), x, create_graph=True)
        second = grad(first.square().sum(), x, create_graph=True)
        return first, second, grad(second.sum(), x)

    closely(third(cube), third(lambda x: x**3))


def test_retain_graph_twice():
    x = noise(4)
    y = cube(x).sum()
    closely(grad(y, x, retain_graph=True), grad(y, x))


def test_input_that_is_not_a_leaf():
    x = noise(4)
    middle = x.exp()
    closely(grad(cube(middle).sum(), x, middle), (3 * middle**3, 3 * middle**2))


def test_gradients_of_intermediate_tensors_leave_no_trace():
    x = noise(4)
    layer = nn.Linear(4, 4).double()
    middle = layer(x)
    y = cube(middle)
    grad(y.sum(), y)
    grad(cube(middle).sum(), middle)
    assert x.grad is None
    assert layer.weight.grad is None


def test_output_needs_and_a_rule_of_the_gradient_alone():
    x = noise(4)
    result = x.detach().exp()
    closely(grad(go.connect(result, x, lambda g, output: g * output).sum(), x), x.exp())
    closely(grad(go.connect(result, x, lambda g: g * 2).sum(), x), torch.full_like(x, 2))
    seen = []
    y = go.connect(result, x, lambda g, needs: (seen.append(dict(needs)), g)[1])
    grad(y.sum(), x)
    assert seen == [{"input": True}]


def test_identity_by_default():
    x = noise(4)
    y = go.connect(x.detach().round(), x)
    exactly(y, x.detach().round())
    closely(grad(y.square().sum(), x), 2 * x.detach().round())


def test_options_of_the_rule():
    x = noise(4)
    rule = functools.partial(lambda g, input, power: g * power * input ** (power - 1), power=3)
    closely(grad(go.connect(x.detach() ** 3, x, rule).sum(), x), 3 * x**2)


def test_only_what_is_asked_for_is_kept():
    x = noise(100)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.nbytes), lambda t: None):
        go.connect(x.detach().exp(), x, lambda g: g)
        assert saved == []
        go.connect(x.detach().exp(), x, cube_rule)
    assert saved == [x.nbytes]


# --- several inputs, several results ---


def test_tuple_of_inputs():
    a, b = noise(3), noise(3)
    rule = lambda g, inputs: (g * inputs[1], g * inputs[0])  # noqa: E731
    y = go.connect((a * b).detach(), (a, b), rule)
    closely(grad(y.sum(), a, b), (b, a))
    y = go.connect((a * b).detach(), [a, b], lambda g, inputs: {"inputs": (g * inputs[1], None)})
    closely(grad(y.sum(), a, b, allow_unused=True)[0], b)


def test_dict_of_inputs_by_name():
    a, b, frozen = noise(3), noise(3), noise(3, grad=False)
    given = {"a": a, "b": b, "frozen": frozen, "power": 2}

    def rule(g, a, b, frozen, power):
        return {"a": g * power * a * b * frozen, "b": g * a**power * frozen}

    y = go.connect((a**2 * b * frozen).detach(), given, rule)
    closely(grad(y.sum(), a, b), (2 * a * b * frozen, a**2 * frozen))
    y = go.connect((a * b).detach(), {"a": a, "b": b}, lambda g, a, b: (g * b, g * a))
    closely(grad(y.sum(), a, b), (b, a))


def test_several_results():
    x = noise(3)
    result = {"sin": x.detach().sin(), "cos": x.detach().cos(), "count": 3, "index": torch.arange(3)}
    y = go.connect(result, x, lambda g, input: g["sin"] * input.cos() - g["cos"] * input.sin())
    assert y["count"] == 3
    assert not y["index"].requires_grad
    closely(grad((y["sin"] * 2 + y["cos"]).sum(), x, retain_graph=True), 2 * x.cos() - x.sin())
    closely(grad(y["sin"].sum(), x), x.cos())  # the other got no gradient: zeros


def test_several_results_and_inputs_by_the_identity():
    a, b = noise(3), noise(2)
    y = go.connect((a.detach().round(), b.detach().round()), (a, b))
    closely(grad((y[0].sum() * 2 + y[1].sum() * 3), a, b), (torch.full_like(a, 2), torch.full_like(b, 3)))


def test_identity_reaches_inputs_in_containers_beside_options():
    a, b = noise(3), noise(2)
    results = a.detach().round(), b.detach().round()
    for inputs in ({"pair": [a, b], "power": 2}, {"pair": {"a": a, "b": b}}, ([a, {"b": b}], "mode"), [(a, b)]):
        y = go.connect(results, inputs)
        exactly(grad((y[0].sum() * 2 + y[1].sum() * 3), a, b), (torch.full_like(a, 2), torch.full_like(b, 3)))


def test_names_of_inputs_may_be_those_of_a_receiver():
    a, b = noise(3), noise(3)
    for name in ("self", "cls"):
        y = go.connect((a * b).detach(), {name: a, "b": b}, eval(f"lambda g, {name}, b: (g * b, g * {name})"))
        closely(grad(y.sum(), a, b), (b, a))
        exactly(grad(go.connect(a.detach(), {name: a}, lambda g: g * 2).sum(), a), torch.full_like(a, 2))


def test_two_connections_from_one_source():
    x = noise(3)
    y = go.connect(x.detach() ** 2, x, lambda g, input: g * 2 * input)
    z = cube(x)
    closely(grad((y * z).sum(), x), 5 * x**4)


def test_chain_of_connections():
    x = noise(3)
    closely(grad(cube(cube(x)).sum(), x), 9 * x**8)


# --- where no gradient is wanted, and elsewhere ---


def test_without_grad_mode_it_is_the_result_itself():
    x = noise(3)
    result = x.detach() ** 3
    with torch.no_grad():
        assert go.connect(result, x, cube_rule) is result


def test_integers_beside():
    x, index = noise(3), torch.tensor([2, 0, 1])
    y = go.connect(x.detach()[index], {"x": x, "index": index}, lambda g, index: g[index.argsort()])
    closely(grad((y * torch.arange(3)).sum(), x), torch.tensor([1.0, 2, 0], dtype=torch.float64))


def test_compiled():
    def fn(x):
        result = x.detach() ** 3
        return go.connect(result, x, lambda g, input: g * 3 * input**2)

    x = noise(4)
    torch._dynamo.reset()
    compiled = torch.compile(fn, backend="aot_eager", fullgraph=True)
    closely(grad(compiled(x).sin().sum(), x), grad(fn(x).sin().sum(), x))

    def two(x):
        left, right = go.connect(
            (x.detach() ** 2, x.detach() * 2), {"a": x * 1, "b": x * 3}, lambda g, a: (g[0] * a, g[1])
        )
        return left + right

    compiled = torch.compile(two, backend="aot_eager", fullgraph=True)
    closely(grad(compiled(x).sin().sum(), x), grad(two(x).sin().sum(), x))


def test_compiled_rule_may_be_a_method_of_the_module():
    class Rounded(nn.Module):
        def __init__(self):
            super().__init__()
            self.factor = 2.0

        def rule(self, grad_output, input):
            return grad_output * self.factor * input

        def forward(self, x):
            return go.connect(x.detach().round(), x, self.rule)

    x = noise(4)
    torch._dynamo.reset()
    for run in (Rounded(), torch.compile(Rounded(), backend="aot_eager", fullgraph=True)):
        closely(grad(run(x).sum(), x), 2 * x)


def test_vmap_and_grad():
    def fn(x):
        return go.connect(x.detach() ** 3, x, cube_rule).sum()

    x = noise(3, 4, grad=False)
    closely(torch.func.grad(fn)(x), 3 * x**2)
    closely(torch.func.vmap(torch.func.grad(fn))(x), 3 * x**2)


def test_compiled_rule_with_a_closure_and_an_option_of_its_own():
    def fn(x):
        factor = 4.0
        return go.connect(x.detach(), x, lambda g, scale=2.0: g * scale * factor)

    x = noise(4)
    torch._dynamo.reset()
    exactly(grad(torch.compile(fn, backend="aot_eager", fullgraph=True)(x).sum(), x), torch.full_like(x, 8.0).detach())


def test_graph_of_numpy_in_a_network():
    """A sort by NumPy between two layers, whose gradient is the permutation turned round."""
    x = noise(5, 4)
    first, last = nn.Linear(4, 3).double(), nn.Linear(3, 1).double()

    def loss(sort):
        return last(sort(first(x).tanh())).square().sum()

    def by_numpy(h):
        order = torch.from_numpy(numpy.argsort(h.detach().numpy(), axis=1))
        rule = lambda g, order: {"h": torch.zeros_like(g).scatter_(1, order, g)}  # noqa: E731
        return go.connect(h.detach().gather(1, order), {"h": h, "order": order}, rule)

    params = [*first.parameters(), *last.parameters()]
    closely(grad(loss(by_numpy), *params), grad(loss(lambda h: h.sort(1).values), *params))


# --- errors ---


def test_result_with_a_graph():
    x = noise(3)
    with pytest.raises(
        go.GraphError, match=r"'result' must have been computed outside .* \(3,\) has a graph already.*edit_gradient"
    ):
        go.connect(x * 2, x)
    with pytest.raises(go.GraphError, match=r"is a leaf that requires grad"):
        go.connect(noise(3), x)


def test_result_without_a_gradient():
    with pytest.raises(go.GraphError, match=r"'result' must be a floating or complex tensor.*; got a tensor of shape"):
        go.connect(torch.arange(3), noise(3))
    with pytest.raises(go.GraphError, match=r"'result' must .*; got ndarray|got a ndarray|got an ndarray"):
        go.connect(numpy.ones(3), noise(3))


def test_inputs_that_need_no_gradient():
    with pytest.raises(
        go.GraphError, match=r"'inputs' must hold a tensor that requires grad.*\(3,\) and none requires grad"
    ):
        go.connect(torch.ones(3), noise(3, grad=False))
    with pytest.raises(go.GraphError, match=r"'inputs' must hold a tensor that requires grad"):
        go.connect(torch.ones(3), {"a": noise(3, grad=False), "n": 3})


def test_connection_in_a_forward_that_has_a_rule_needs_a_vjp_there_and_says_so():
    def layer(x):
        return go.connect(x.detach().round(), x, lambda grad_output: 5 * grad_output)

    x = noise(3)
    with pytest.raises(go.GraphError, match=r"in a forward that has a rule, let that ask for 'vjp'"):
        go.custom_backward(lambda grad_output: 2 * grad_output)(layer)(x)
    decorated = go.custom_backward(lambda grad_output, vjp: vjp(2 * grad_output))(layer)
    closely(grad(decorated(x).sum(), x), torch.full_like(x, 10))


HOLDERS = {
    "namespace": (lambda t: types.SimpleNamespace(t=t), r"\.t"),
    "deque": (lambda t: deque([t]), r"\[0\]"),
    "set": (lambda t: {t}, r"\[0\]"),
    "UserDict": (lambda t: UserDict(t=t), r"\.data\['t'\]"),
    "object in a list": (lambda t: [types.SimpleNamespace(t=t)], r"\[0\]\.t"),
}


@pytest.mark.parametrize(("hold", "path"), HOLDERS.values(), ids=HOLDERS)
def test_tensor_within_an_object_is_refused_by_its_name(hold, path):
    x, other, leaf = noise(3), noise(3), noise(3)
    value = x.detach() * 2
    text = rf"connect: 'result' must hold its tensors in tuples.*; it has 'result\[1\]{path}' within .* leave it out"
    with pytest.raises(go.GraphError, match=text):
        go.connect((value, hold(value * 3)), x, lambda g: g[0])
    text = r"{}: 'inputs' must hold its tensors in tuples.*; it has 'inputs\[{}\]{}', which requires grad, within"
    with pytest.raises(go.GraphError, match=text.format("connect", "'o'", path)):
        go.connect(value, {"x": x, "o": hold(other)}, lambda g, x: {"x": g})
    with pytest.raises(go.GraphError, match=text.format("connect_", 1, path)):
        go.connect_(leaf, (x, hold(other)), lambda g: (g, None))

    # What wants no gradient stays where it is.
    constant = other.detach()
    y, _ = go.connect((value, hold(torch.arange(3))), {"x": x, "o": hold(constant)}, lambda g, x: {"x": g[0] * 5})
    closely(grad(y.sum(), x), torch.full_like(x, 5))
    with torch.no_grad():
        go.connect((value, hold(value)), {"x": x, "o": hold(other)}, lambda g, x: {"x": g[0]})


def test_inputs_of_a_wrong_kind():
    for inputs in (None, 3, {1: noise(3)}):
        with pytest.raises(
            go.GraphError, match=r"'inputs' must be a tensor, a tuple or list of them, or a dict by name"
        ):
            go.connect(torch.ones(3), inputs)
    with pytest.raises(
        go.GraphError, match=r"keys of 'inputs' must be names that a rule can ask for; got 'not a name'"
    ):
        go.connect(torch.ones(3), {"not a name": noise(3)}, lambda g: g)


def test_identity_needs_shapes_that_agree():
    with pytest.raises(go.GraphError, match=r"results have \(\) and inputs \(3,\). Give a rule"):
        go.connect(torch.ones(()), noise(3))
    with pytest.raises(go.GraphError, match=r"results have \(3,\) and inputs \(3,\), \(3,\)"):
        go.connect(torch.ones(3), (noise(3), noise(3)))


@pytest.mark.parametrize("name", ["vjp", "forward", "module", "params"])
def test_names_that_a_connection_has_not(name):
    rule = {
        "vjp": lambda g, vjp: g,
        "forward": lambda g, forward: g,
        "module": lambda g, module: g,
        "params": lambda g, params: g,
    }[name]
    with pytest.raises(go.RuleSignatureError, match=rf"asks for '{name}', and a connection has no forward"):
        go.connect(torch.ones(3), noise(3), rule)


def test_unknown_name():
    with pytest.raises(go.RuleSignatureError, match=r"asks for 'weight'.*'connect' offers 'a'"):
        go.connect(torch.ones(3), {"a": noise(3)}, lambda g, weight: g)


def test_wrong_shape_pollutes_no_grad():
    x = noise(3)
    y = go.connect(torch.ones(2, dtype=torch.float64), x, lambda g: g)
    with pytest.raises(go.RuleResultError, match=r"of 'connect' must return a gradient of shape \(3,\) for 'input'"):
        y.sum().backward()
    assert x.grad is None


@pytest.mark.parametrize(("key", "rest"), [("lambda", ""), ("output", ", by which it asks for something else")])
def test_keys_that_no_rule_can_ask_for(key, rest):
    text = rf"keys of 'inputs' must be names that a rule can ask for; got '{key}'{rest}. Give it another name"
    with pytest.raises(go.GraphError, match=f"connect: the {text}"):
        go.connect(noise(3, grad=False), {key: noise(3)}, lambda g: {key: g})
    with pytest.raises(go.GraphError, match=f"connect_: the {text}"):
        go.connect_(noise(3), {key: noise(3)}, lambda g: {key: g})


def test_integer_result_is_refused_by_its_dtype():
    with pytest.raises(go.GraphError, match=r"got a tensor of shape \(3,\) of torch.int64"):
        go.connect(torch.arange(3), noise(3), cube_rule)


def test_identity_from_complex_to_real_is_refused():
    with pytest.raises(go.GraphError, match=r"a result has torch.complex128 and its input torch.float64. Give a rule"):
        go.connect(noise(3, grad=False) + 0j, noise(3))


def test_result_of_inference_mode():
    x = noise(3)
    with torch.inference_mode():
        result = x.detach() ** 3
    closely(grad((go.connect(result, x, cube_rule) * x).sum(), x), 4 * x**3)
