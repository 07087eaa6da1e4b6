"""Methods of modules, and the parameters that they reach through `self`. Contract, sections 1 and 2."""

import contextlib
import copy
import functools
import gc
import inspect
import re
import types
import weakref
from typing import Any

import pytest
import torch
from oracles import closely, exactly, float64, noise, right_or_refused
from torch import nn
from torch.func import functional_call

import gradoverride as go
from forms import elsewhere


def scale_module(rule):
    """A module `x * weight + shift` whose forward has this rule; weight 2, shift 1."""

    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(float64(2.0, 2.0))
            self.shift = nn.Parameter(float64(1.0, 1.0))

        @go.custom_backward(rule)
        def forward(self, x):
            return x * self.weight + self.shift

    return Scale()


def by_name(grad_output, x, weight):
    return {"x": 3 * grad_output * weight, "weight": 5 * grad_output * x}


def by_params_alone(grad_output, params):
    return {"input": grad_output, **{name: 5 * param for name, param in params.items()}}


def left_to_autograd(grad_output):
    return 3 * grad_output


def by_params(grad_output, params):
    return {"x": 3 * grad_output, **dict.fromkeys(params, 5 * grad_output)}


def through_vjp(grad_output, vjp):
    return 3 * vjp(grad_output)


RULES = {
    # rule: gradient of x, of weight and of shift, for x = (3, 4), weight = 2, a gradient of ones
    "by name": (by_name, (6.0, 6.0), (15.0, 20.0), (1.0, 1.0)),
    "left to autograd": (left_to_autograd, (3.0, 3.0), (3.0, 4.0), (1.0, 1.0)),
    "params": (by_params, (3.0, 3.0), (5.0, 5.0), (5.0, 5.0)),
    "vjp": (through_vjp, (6.0, 6.0), (3.0, 4.0), (1.0, 1.0)),
}


@pytest.fixture(params=RULES)
def case(request):
    rule, *grads = RULES[request.param]
    return scale_module(rule), float64(3.0, 4.0), [float64(*grad, grad=False) for grad in grads]


def test_gradients_of_input_and_parameters(case):
    layer, x, (grad_x, grad_weight, grad_shift) = case
    layer(x).sum().backward()
    exactly((x.grad, layer.weight.grad, layer.shift.grad), (grad_x, grad_weight, grad_shift))


def test_gradients_accumulate_over_backward_calls(case):
    layer, x, (grad_x, grad_weight, grad_shift) = case
    for _ in range(3):
        layer(x).sum().backward()
    exactly((x.grad, layer.weight.grad, layer.shift.grad), (3 * grad_x, 3 * grad_weight, 3 * grad_shift))


def test_gradients_add_up_when_the_module_is_used_twice_in_one_graph(case):
    layer, x, (grad_x, grad_weight, grad_shift) = case
    (layer(x) + 10 * layer(x)).sum().backward()
    closely((x.grad, layer.weight.grad, layer.shift.grad), (11 * grad_x, 11 * grad_weight, 11 * grad_shift))


def test_autograd_grad_gives_parameter_gradients_and_leaves_grad_alone(case):
    layer, x, (_, grad_weight, grad_shift) = case
    grads = torch.autograd.grad(layer(x).sum(), (layer.weight, layer.shift))
    exactly(grads, (grad_weight, grad_shift))
    assert x.grad is layer.weight.grad is layer.shift.grad is None


def test_parameters_have_gradients_when_the_input_needs_none(case):
    layer, x, (_, grad_weight, grad_shift) = case
    layer(x.detach()).sum().backward()
    exactly((layer.weight.grad, layer.shift.grad), (grad_weight, grad_shift))


def test_frozen_parameters_stay_none(case):
    layer, x, (grad_x, _, grad_shift) = case
    layer.weight.requires_grad_(False)
    layer(x).sum().backward()
    exactly((x.grad, layer.shift.grad), (grad_x, grad_shift))
    assert layer.weight.grad is None


def test_module_with_every_parameter_frozen_still_rules_its_input(case):
    layer, x, (grad_x, *_) = case
    layer.requires_grad_(False)
    layer(x).sum().backward()
    exactly(x.grad, grad_x)
    assert layer.weight.grad is layer.shift.grad is None


def test_tensor_hooks_on_parameters_fire_once(case):
    layer, x, (_, grad_weight, grad_shift) = case
    seen = {"weight": [], "shift": []}
    layer.weight.register_hook(seen["weight"].append)
    layer.shift.register_hook(seen["shift"].append)
    layer(x).sum().backward()
    exactly(seen["weight"], [grad_weight])
    exactly(seen["shift"], [grad_shift])


def test_post_accumulate_hooks_on_parameters_fire_once(case):
    layer, x, _ = case
    fired = []
    layer.weight.register_post_accumulate_grad_hook(lambda weight: fired.append(weight.grad.clone()))
    layer(x).sum().backward()
    exactly(fired, [layer.weight.grad])


def left_to_autograd_and_vjp(grad_output, vjp):
    return vjp(grad_output)


def answered_unasked(grad_output, module):
    return {"x": None, "".join(["wei", "ght"]): grad_output}  # the name cannot be told from the code


def a_hook(weight, seen):
    return weight.register_hook(seen.append)


def a_hook_of_several(weight, seen):
    return torch.autograd.graph.register_multi_grad_hook([weight], seen.append)


@pytest.mark.parametrize("register", [a_hook, a_hook_of_several])
@pytest.mark.parametrize("rule", [left_to_autograd_and_vjp, answered_unasked])
def test_hook_on_a_parameter_after_the_forward_is_refused_where_it_would_run_twice(rule, register):
    layer, x = scale_module(rule), float64(3.0, 4.0)
    result = layer(x)
    handle = register(layer.shift, [])
    with pytest.raises(go.UnsupportedError) as caught:
        result.sum().backward(retain_graph=True)
    for part in ("'Scale' (", "parameter 'shift'", f"the rule '{rule.__name__}' (", "before the forward"):
        assert part in str(caught.value)
    handle.remove()
    result.sum().backward()
    closely(layer.shift.grad, float64(1.0, 1.0, grad=False))


def test_hook_on_a_parameter_after_the_first_derivative_is_refused_where_it_would_run_twice():
    class Square(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(float64(2.0, 2.0))

        @go.custom_backward(left_to_autograd_and_vjp)
        def forward(self, x):
            return x**2 * self.weight

    layer, x = Square(), float64(3.0, 4.0)
    (grad,) = torch.autograd.grad(layer(x).sum(), x, create_graph=True)
    handle = layer.weight.register_hook(lambda grad: None)
    with pytest.raises(go.UnsupportedError, match=r"a parameter of shape \(2,\).*before the forward"):
        grad.sum().backward(retain_graph=True)
    handle.remove()
    grad.sum().backward()
    closely((x.grad, layer.weight.grad), (float64(4.0, 4.0, grad=False), float64(6.0, 8.0, grad=False)))


@pytest.mark.parametrize("rule", [left_to_autograd, by_name])
def test_hook_on_a_parameter_after_the_forward_runs_once(rule):
    layer, x, seen = scale_module(rule), float64(3.0, 4.0), []
    result = layer(x)
    layer.weight.register_hook(seen.append)
    layer.shift.register_hook(seen.append)
    result.sum().backward()
    assert len(seen) == 2


def test_hook_that_changes_a_parameters_gradient_is_obeyed(case):
    layer, x, (_, grad_weight, _) = case
    layer.weight.register_hook(lambda grad: 10 * grad)
    layer(x).sum().backward()
    exactly(layer.weight.grad, 10 * grad_weight)


def test_optimizer_step_trains_the_parameter(case):
    layer, x, (_, grad_weight, _) = case
    layer(x).sum().backward()
    torch.optim.SGD(layer.parameters(), lr=0.5).step()
    exactly(layer.weight.detach(), 2 - 0.5 * grad_weight)


def test_second_forward_sees_the_changed_parameter():
    layer, x = scale_module(by_name), float64(3.0, 4.0)
    layer(x).sum().backward()
    with torch.no_grad():
        layer.weight.mul_(10)
    x.grad = None
    layer(x).sum().backward()
    exactly(x.grad, float64(60.0, 60.0, grad=False))


def test_parameters_stay_the_same_leaves(case):
    layer, x, _ = case
    before = list(layer.parameters())
    layer(x).sum().backward()
    assert all(now is then and now.is_leaf for now, then in zip(layer.parameters(), before, strict=True))


def test_functional_call_uses_the_tensors_it_was_given(case):
    layer, x, (_, grad_weight, grad_shift) = case
    given = {"weight": float64(2.0, 2.0), "shift": float64(1.0, 1.0)}
    with torch.no_grad():
        layer.weight.zero_()
    y = functional_call(layer, given, (x,))
    exactly(y.detach(), float64(7.0, 9.0, grad=False))
    y.sum().backward()
    exactly((given["weight"].grad, given["shift"].grad), (grad_weight, grad_shift))
    assert layer.weight.grad is layer.shift.grad is None


def test_functional_call_carries_the_gradient_to_what_the_tensors_were_made_of(case):
    layer, x, (_, grad_weight, _) = case
    base = float64(0.5, 0.5)
    functional_call(layer, {"weight": base * 4}, (x,)).sum().backward()
    exactly(base.grad, 4 * grad_weight)
    assert layer.weight.grad is None


def test_parameter_that_is_changed_before_backward_is_an_error():
    for rule in (by_name, through_vjp, lambda grad_output, module: grad_output * module.weight):
        layer = scale_module(rule)
        loss = layer(float64(3.0, 4.0)).sum()
        with torch.no_grad():
            layer.weight.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


GRADIENT_PENALTY = {
    # rule: derivative, by the weight, of the sum of the gradient of x
    "by name": (by_name, 3.0),
    "module": (lambda grad_output, module: 5 * grad_output * module.weight, 5.0),
    "forward": (lambda grad_output, x, forward: {"x": grad_output * (forward(x + 7) - forward(x))}, 7.0),
    "vjp": (through_vjp, 3.0),
}


@pytest.mark.parametrize("kind", GRADIENT_PENALTY)
def test_gradient_penalty_reaches_the_parameter(kind):
    rule, expected = GRADIENT_PENALTY[kind]
    layer, x = scale_module(rule), float64(3.0, 4.0)
    (grad_x,) = torch.autograd.grad(layer(x).sum(), x, create_graph=True)
    grad_x.sum().backward()
    closely(layer.weight.grad, float64(expected, expected, grad=False))


def test_copied_module_uses_its_own_parameters(case):
    layer, x, (_, grad_weight, _) = case
    twin = copy.deepcopy(layer)
    twin(x).sum().backward()
    exactly(twin.weight.grad, grad_weight)
    assert layer.weight.grad is None


# What a rule may ask of a module


def test_answer_for_a_parameter_that_was_not_asked_for_replaces_autograds():
    layer, x = scale_module(lambda grad_output: {"x": grad_output, "weight": 7 * grad_output}), float64(3.0, 4.0)
    layer(x).sum().backward()
    exactly(layer.weight.grad, float64(7.0, 7.0, grad=False))
    exactly(layer.shift.grad, float64(1.0, 1.0, grad=False))


def test_none_stops_the_gradient_of_a_parameter_that_was_asked_for():
    layer = scale_module(lambda grad_output, weight: {"x": grad_output * weight, "weight": None})
    layer(float64(3.0, 4.0)).sum().backward()
    assert layer.weight.grad is None
    exactly(layer.shift.grad, float64(1.0, 1.0, grad=False))


def test_leaving_out_a_parameter_that_was_asked_for_is_an_error_with_the_ways_out():
    layer = scale_module(lambda grad_output, weight: {"x": grad_output * weight})
    loss = layer(float64(3.0, 4.0)).sum()
    with pytest.raises(
        go.RuleResultError, match=r"'Scale.*test_module_methods\.py:\d+.* 'weight'.*; it leaves that out\. "
    ) as caught:
        loss.backward()
    assert all(way_out in str(caught.value) for way_out in ("module.weight", "None", "vjp.by_name"))


def test_module_gives_a_value_without_taking_over_its_gradient():
    layer, x = scale_module(lambda grad_output, module: 3 * grad_output * module.weight), float64(3.0, 4.0)
    layer(x).sum().backward()
    exactly(x.grad, float64(6.0, 6.0, grad=False))
    exactly(layer.weight.grad, float64(3.0, 4.0, grad=False))


def test_module_has_the_tensors_of_that_forward_under_functional_call():
    layer, x = scale_module(lambda grad_output, module: grad_output * module.weight), float64(3.0, 4.0)
    given = {"weight": float64(50.0, 60.0)}
    functional_call(layer, given, (x,)).sum().backward()
    exactly(x.grad, float64(50.0, 60.0, grad=False))


def test_forward_evaluates_the_undecorated_forward_again():
    def numerical(grad_output, x, forward):
        step = 0.5
        return {"x": grad_output * (forward(x + step) - forward(x - step)) / (2 * step)}

    layer, x = scale_module(numerical), float64(3.0, 4.0)
    layer(x).sum().backward()
    closely(x.grad, float64(2.0, 2.0, grad=False))


def test_forward_uses_the_tensors_of_that_call_under_functional_call():
    layer = scale_module(lambda grad_output, x, forward: {"x": grad_output * forward(x)})
    x = float64(3.0, 4.0)
    functional_call(layer, {"weight": float64(50.0, 60.0)}, (x,)).sum().backward()
    exactly(x.grad, float64(151.0, 241.0, grad=False))


def test_needs_says_which_gradients_are_wanted():
    asked = []

    def backward(grad_output, x, weight, needs):
        asked.append(dict(needs))
        return {"x": grad_output * weight if needs["x"] else None, "weight": grad_output * x}

    layer = scale_module(backward)
    layer(float64(3.0, 4.0, grad=False)).sum().backward()
    layer(float64(3.0, 4.0)).sum().backward()
    assert [needs["x"] for needs in asked] == [False, True]


def test_params_are_the_trainable_ones_by_dotted_name():
    names = []

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2)
            self.second.bias.requires_grad_(False)

        @go.custom_backward(lambda grad_output, params: (names.extend(params), dict.fromkeys(params))[1])
        def forward(self, x):
            return self.second(self.first(x))

    Model()(torch.ones(1, 2, requires_grad=True)).sum().backward()
    assert sorted(names) == ["first.bias", "first.weight", "second.weight"]


class TwoLayers(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 4, dtype=torch.float64)
        self.second = nn.Linear(4, 3, dtype=torch.float64)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def counts_its_calls(grad_output, module):
    module.first.calls += 1
    module.last = grad_output.sum()
    return grad_output


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # Dynamo's own
@pytest.mark.parametrize("fullgraph", [None, False, True], ids=["eager", "compiled", "compiled in full"])
@pytest.mark.parametrize("parts", [TwoLayers, nn.Identity], ids=["with parameters", "without"])
def test_rule_may_set_attributes_of_the_module(parts, fullgraph):
    class Ruled(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = parts()
            self.first.calls = 0

        @go.custom_backward(counts_its_calls)
        def forward(self, x):
            return x.sin() if parts is nn.Identity else self.first(x).sum(1, keepdim=True) * x

    model = Ruled()
    run = model if fullgraph is None else torch.compile(model, backend="aot_eager", fullgraph=fullgraph)

    def counted():
        for factor in (2.0, 3.0):
            (factor * run(noise(5, 3))).sum().backward()
        return float64(model.first.calls, model.last, grad=False)

    if fullgraph:
        right_or_refused(counted, float64(2.0, 45.0, grad=False), "side effect")
    else:
        exactly(counted(), float64(2.0, 45.0, grad=False))


def scale_backward(grad_output, x, scale):
    return {"x": scale * grad_output, "scale": x * grad_output}


@pytest.mark.parametrize("rule", [counts_its_calls, scale_backward])
def test_a_call_looks_at_classes_itself(rule, monkeypatch):
    """Where a graph breaks, Dynamo takes up what a call uses of Python's; from 3.12 on it warns of a cache in that."""

    def asked(*_):
        raise AssertionError("inspect is asked")

    class Ruled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(float64(1.0))
            self.factor, self.first = 3.0, TwoLayers()
            self.first.calls = 0

        @go.custom_backward(rule)
        def forward(self, x):
            return x * self.scale * self.factor

    model, x = Ruled(), float64(2.0)
    monkeypatch.setattr(inspect, "getattr_static", asked)
    model(x).backward()
    exactly(x.grad, float64(1.0, grad=False))


def test_submodule_parameter_is_answered_by_its_dotted_name():
    class Ruled(TwoLayers):
        @go.custom_backward(lambda grad_output, module: {"first.bias": 7 * module.first.bias})
        def forward(self, x):
            return super().forward(x)

    model = Ruled()
    plain = TwoLayers()
    plain.load_state_dict(model.state_dict())
    x = noise(5, 3, grad=False)
    model(x).square().sum().backward()
    plain(x).square().sum().backward()
    exactly(model.first.bias.grad, 7 * model.first.bias.detach())
    closely(model.first.weight.grad, plain.first.weight.grad)
    closely(model.second.weight.grad, plain.second.weight.grad)


def test_vjp_by_name_gives_arguments_and_submodule_parameters():
    class Ruled(TwoLayers):
        @go.custom_backward(lambda grad_output, vjp, params: vjp.by_name(2 * grad_output))
        def forward(self, x):
            return super().forward(x)

    model, plain = Ruled(), TwoLayers()
    plain.load_state_dict(model.state_dict())
    x = noise(5, 3)
    twin = x.detach().clone().requires_grad_()
    model(x).sum().backward()
    (2 * plain(twin).sum()).backward()
    closely(x.grad, twin.grad)
    for name, parameter in model.named_parameters():
        closely(parameter.grad, plain.get_parameter(name).grad)


def test_buffer_may_be_asked_for_by_name():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mask", float64(0.0, 1.0, grad=False))

        @go.custom_backward(lambda grad_output, mask: grad_output * mask * 7)
        def forward(self, x):
            return x * 2

    x = float64(1.0, 1.0)
    Masked()(x).sum().backward()
    exactly(x.grad, float64(0.0, 7.0, grad=False))


# (One that the forward does not read would be a guard of every compiled call.)
@pytest.mark.parametrize(("read", "compiled"), [(True, False), (True, True), (False, False)])
@pytest.mark.parametrize("name", ["input", "output"])
def test_buffer_comes_before_the_reserved_name_that_it_bears(name, read, compiled):
    rules = {"input": lambda grad_output, input: grad_output * input, "output": lambda grad_output, output: output}

    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer(name, float64(10.0, 20.0, grad=False))

    source = f"def forward(self, x): return x * self.{name}" if read else "def forward(self, x): return x * 2"
    names: dict[str, Any] = {}
    exec(source, names)
    Named.forward = go.custom_backward(rules[name])(names["forward"])
    x, module = float64(3.0, 3.0), Named()
    run = torch.compile(module, backend="aot_eager", fullgraph=True) if compiled else module
    run(x).sum().backward()
    exactly(x.grad, float64(10.0, 20.0, grad=False))


def test_unknown_name_is_an_error_at_the_first_call_with_the_closest_one():
    layer = scale_module(lambda grad_output, wieght: grad_output)
    with pytest.raises(go.RuleSignatureError, match=r"(?s)wieght.*weight"):
        layer(float64(3.0, 4.0))


def test_layer_result_that_is_a_parameter_leaves_the_parameter_a_leaf():
    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(float64(2.0))

        @go.custom_backward(lambda grad_output, weight: {"weight": 7 * grad_output})
        def forward(self, x):
            return self.weight

    layer = Constant()
    y = layer(float64(1.0))
    assert layer.weight.is_leaf
    assert y is not layer.weight
    y.backward()
    assert layer.weight.grad.item() == 7.0


def test_layer_result_that_is_a_parameter_left_to_autograd_has_its_gradient():
    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(float64(2.0))

        @go.custom_backward(lambda grad_output: 3 * grad_output)
        def forward(self, x):
            return self.weight

    layer, x = Constant(), float64(1.0)
    (5 * layer(x)).backward()
    assert layer.weight.is_leaf
    assert (x.grad.item(), layer.weight.grad.item()) == (15.0, 5.0)


def test_cached_buffer_that_is_returned_stays_as_it_is():
    class Cached(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("table", float64(2.0, grad=False))

        @go.custom_backward(lambda grad_output: 7 * grad_output)
        def forward(self, x):
            return self.table

    layer, x = Cached(), float64(1.0)
    layer(x).backward()
    assert not layer.table.requires_grad
    assert x.grad.item() == 7.0


def test_parameter_shared_by_two_names_has_both_uses_in_its_gradient():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.encode = nn.Linear(3, 3, bias=False, dtype=torch.float64)
            self.decode = nn.Linear(3, 3, bias=False, dtype=torch.float64)
            self.decode.weight = self.encode.weight

        def plain(self, x):
            return self.decode(self.encode(x).tanh())

        @go.custom_backward(lambda grad_output: 7 * grad_output)
        def forward(self, x):
            return self.plain(x)

    layer, x = Tied(), noise(2, 3)
    weight = layer.encode.weight
    ruled = torch.autograd.grad(layer(x).square().sum(), weight)
    closely(ruled, torch.autograd.grad(layer.plain(x).square().sum(), weight))


# Weights that are computed


def parametrized():
    linear = nn.Linear(3, 3, dtype=torch.float64)
    nn.utils.parametrize.register_parametrization(linear, "weight", Symmetric())
    return linear


class Symmetric(nn.Module):
    def forward(self, weight):
        return weight.triu() + weight.triu(1).T


COMPUTED_WEIGHTS = {
    "parametrize": parametrized,
    "weight_norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 3, dtype=torch.float64)),
    "spectral_norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3, dtype=torch.float64)).eval(),
}


class Wrapping(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def plain(self, x):
        return self.inner(x)

    @go.custom_backward(lambda grad_output: 7 * grad_output)
    def forward(self, x):
        return self.plain(x)


@pytest.mark.parametrize("kind", COMPUTED_WEIGHTS)
def test_computed_weight_below_a_decorated_forward_keeps_autograds_gradient(kind):
    layer, x = Wrapping(COMPUTED_WEIGHTS[kind]()), noise(3, 3)
    parameters = list(layer.parameters())
    ruled = torch.autograd.grad(layer(x).square().sum(), parameters)
    closely(ruled, torch.autograd.grad(layer.plain(x).square().sum(), parameters))
    layer(x).sum().backward()
    exactly(x.grad, torch.full_like(x, 7.0))


def normed_scale():
    class Ruled(nn.Linear):
        def plain(self, x):
            return super().forward(x)

        @go.custom_backward(
            lambda grad_output, x, weight: {"x": 2 * grad_output @ weight, "weight": 3 * grad_output.T @ x}
        )
        def forward(self, x):
            return self.plain(x)

    return Ruled(3, 3, dtype=torch.float64)


@pytest.mark.parametrize(
    "parametrize",
    [
        nn.utils.parametrizations.weight_norm,
        lambda m: nn.utils.parametrize.register_parametrization(m, "weight", Symmetric()),
    ],
    ids=["weight_norm", "parametrize"],
)
def test_parametrized_weight_is_ruled_under_its_plain_name(parametrize):
    layer, x = parametrize(normed_scale()), noise(3, 3)
    grad_output = noise(3, 3, grad=False)
    originals = list(layer.parametrizations.weight.parameters())
    expected = torch.autograd.grad(layer.weight, originals, 3 * grad_output.T @ x.detach())
    layer(x).backward(grad_output)
    closely(x.grad, 2 * grad_output @ layer.weight.detach())
    for original, grad in zip(originals, expected, strict=True):
        closely(original.grad, grad)


def test_cached_parametrized_weight_is_ruled_under_its_plain_name():
    layer, x = nn.utils.parametrizations.weight_norm(normed_scale()), noise(3, 3)
    grad_output = noise(3, 3, grad=False)
    originals = list(layer.parametrizations.weight.parameters())
    expected = torch.autograd.grad(layer.weight, originals, 3 * grad_output.T @ x.detach())
    with nn.utils.parametrize.cached():
        y = layer(x)
    y.backward(grad_output)
    for original, grad in zip(originals, expected, strict=True):
        closely(original.grad, grad)


@pytest.mark.parametrize("first", ["the ruled call", "the weight itself"])
@pytest.mark.parametrize("rule", [by_params_alone, lambda g, vjp: vjp.by_name(g)], ids=["params", "vjp by name"])
def test_cached_parametrized_weight_is_that_of_the_module_beside_a_ruled_call(rule, first):
    layer, x = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3, dtype=torch.float64)), noise(3, 3)
    originals = [*layer.parametrizations.weight.parameters()]
    expected = torch.autograd.grad(layer.weight.square().sum(), originals)
    with go.override(layer, {layer: rule}), nn.utils.parametrize.cached():
        penalties = [layer.weight.square().sum()] if first == "the weight itself" else []
        y = layer(x)
        penalties.append(layer.weight.square().sum())
    y.sum().backward()
    for penalty in penalties:
        closely(torch.autograd.grad(penalty, originals, retain_graph=True), expected)


# Modules with state


@pytest.mark.parametrize("rule", [left_to_autograd, through_vjp], ids=["gradient alone", "vjp"])
def test_encoder_layer_keeps_autograds_parameter_gradients(rule):
    def encoder():
        torch.manual_seed(1)
        return nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, dtype=torch.float64)

    class Ruled(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = encoder()

        @go.custom_backward(rule)
        def forward(self, x):
            return self.layer(x)

    model, plain, x = Ruled(), encoder(), noise(2, 5, 8)
    target = noise(2, 5, 8, grad=False)
    (model(x) * target).sum().backward()
    twin = x.detach().clone().requires_grad_()
    (plain(twin) * target).sum().backward()
    closely(x.grad, 3 * (target if rule is left_to_autograd else twin.grad))
    for name, parameter in plain.named_parameters():
        closely(model.layer.get_parameter(name).grad, parameter.grad)


@pytest.mark.parametrize("rule", [left_to_autograd, through_vjp], ids=["gradient alone", "vjp"])
def test_batch_norm_counts_the_batch_once(rule):
    class Ruled(nn.BatchNorm1d):
        @go.custom_backward(rule)
        def forward(self, input):
            return super().forward(input)

    layer, plain = Ruled(3, dtype=torch.float64), nn.BatchNorm1d(3, dtype=torch.float64)
    x = noise(8, 3)
    layer(x).sum().backward()
    plain(x)
    assert layer.num_batches_tracked.item() == 1
    exactly(layer.running_mean, plain.running_mean)
    exactly(layer.running_var, plain.running_var)


def test_dropout_of_a_vjp_has_the_mask_of_the_forward():
    class Ruled(nn.Dropout):
        @go.custom_backward(through_vjp)
        def forward(self, input):
            return super().forward(input)

    x = torch.ones(1000, dtype=torch.float64, requires_grad=True)
    y = Ruled(0.5)(x)
    y.sum().backward()
    exactly(x.grad, 3 * y.detach())


def test_attributes_that_the_forward_sets_are_on_the_module():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(float64(2.0))
            self.calls = 0

        @go.custom_backward(by_name)
        def forward(self, x):
            self.calls += 1
            return x * self.weight

    layer = Counting()
    layer(float64(1.0)).backward()
    layer(float64(1.0)).backward()
    assert layer.calls == 2


class Choosing(nn.Module):
    """Runs what was chosen when it was made: a method that reads a parameter, and an attribute that the forward set."""

    def __init__(self, bind):
        super().__init__()
        self.weight = nn.Parameter(float64(2.0))
        self.calls = 0
        self.run = bind(self)

    def scale(self, x):
        return x * self.weight * self.calls

    @go.custom_backward(by_name)
    def forward(self, x):
        self.calls += 1
        return self.run(x) * 1.0


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    "bind", [lambda self: self.scale, lambda self: functools.partial(Choosing.scale, self)], ids=["method", "partial"]
)
def test_method_that_an_attribute_holds_meets_what_the_forward_does(bind, compiled):
    layer, x = Choosing(bind), float64(3.0)
    run = torch.compile(layer, backend="aot_eager", fullgraph=True) if compiled else layer
    y = run(x)
    y.backward()
    assert (y.item(), x.grad.item(), layer.weight.grad.item(), layer.calls) == (6.0, 6.0, 15.0, 1)
    if not compiled:  # which sees another number
        assert run(x).item() == 12.0
    assert layer.run(x).item() == 6.0 * layer.calls


class Growing(nn.Module):
    """Makes what it needs at its first call, and parts of its own."""

    def __init__(self, declared):
        super().__init__()
        self.weight = nn.Parameter(float64(2.0, 2.0))
        if declared:
            self.mask = self.part = None

    @go.custom_backward(by_name)
    def forward(self, x):
        if getattr(self, "mask", None) is None:
            self.mask = nn.Parameter(torch.rand(2, dtype=torch.float64), requires_grad=False)
            self.part = nn.Linear(2, 2, dtype=torch.float64).requires_grad_(False)
        return self.part(x * self.weight * self.mask)


@pytest.mark.parametrize("declared", [True, False])
def test_parameters_and_parts_that_the_forward_makes_stay(declared):
    layer, x = Growing(declared), float64(3.0, 4.0)
    first = layer(x)
    exactly(layer(x), first)
    assert [*layer.state_dict()] == ["weight", "mask", "part.weight", "part.bias"]
    layer.eval()
    assert not layer.part.training
    with torch.no_grad():
        exactly(layer(x), first.detach())


def test_parameters_and_parts_that_the_forward_deletes_are_gone():
    class Shedding(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.start = nn.Parameter(float64(2.0)), nn.Parameter(float64(3.0))
            self.part = nn.Tanh()

        @go.custom_backward(by_name)
        def forward(self, x):
            if hasattr(self, "part"):
                del self.part, self.start
            return x * self.weight

    layer = Shedding()
    layer(float64(1.0))
    assert ([*layer._parameters], [*layer._modules]) == (["weight"], [])


def test_method_that_is_not_forward_reaches_the_parameters_too():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(float64(2.0))

        @go.custom_backward(by_name)
        def scale(self, x):
            return x * self.weight

        def forward(self, x):
            return 10 * self.scale(x)

    model, x = Model(), float64(3.0)
    model(x).backward()
    assert (x.grad.item(), model.weight.grad.item()) == (60.0, 150.0)


def test_decorated_method_that_calls_another_takes_the_rules_of_both():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(float64(2.0))

        @go.custom_backward(by_name)
        def scale(self, x):
            return x * self.weight

        @go.custom_backward(lambda grad_output, vjp: 10 * vjp(grad_output))
        def forward(self, x):
            return self.scale(x)

    model, x = Model(), float64(3.0)
    model(x).backward()
    assert (x.grad.item(), model.weight.grad.item()) == (60.0, 15.0)


def test_list_of_parameters_is_reached_by_dotted_name():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.weights = nn.ParameterList([float64(2.0, grad=False), float64(3.0, grad=False)])

        @go.custom_backward(lambda grad_output: {"x": grad_output, "weights.1": 7 * grad_output})
        def forward(self, x):
            return x * self.weights[0] * self.weights[1]

    model, x = Model(), float64(5.0)
    model(x).backward()
    assert (model.weights[0].grad.item(), model.weights[1].grad.item()) == (15.0, 7.0)


def test_parameter_that_the_forward_does_not_use_stays_none():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Parameter(float64(2.0)), nn.Parameter(float64(3.0))

        @go.custom_backward(left_to_autograd)
        def forward(self, x):
            return x * self.used

    model = Model()
    model(float64(5.0)).backward()
    assert (model.used.grad.item(), model.unused.grad) == (5.0, None)


# --- gradients that a rule puts on tensors itself ---


def on_the_module(grad_output, x, module):
    module.weight.grad = 5 * grad_output * x
    return 3 * grad_output


def into_what_was_accumulated(grad_output, x, module):
    module.weight.grad.add_(5 * grad_output * x)
    return 3 * grad_output


def on_a_parameter(grad_output, x, weight):
    weight.grad = 5 * grad_output * x
    return {"x": 3 * grad_output, "weight": None}


def on_the_argument(grad_output, x):
    x.grad = 3 * grad_output
    return 3 * grad_output


def by_a_helper(grad_output, x, module):
    put(module, 5 * grad_output * x)
    return 3 * grad_output


def put(module, grad):
    module.weight.grad = grad


def by_a_helper_elsewhere(grad_output, x, module):
    elsewhere.put(module, 5 * grad_output * x)
    return 3 * grad_output


class ByItsMethod:
    __name__ = "ByItsMethod"

    def __call__(self, grad_output, x, module):
        return self.answer(grad_output, x, module)

    def answer(self, grad_output, x, module):
        module.weight.grad = 5 * grad_output * x
        return 3 * grad_output


def by_a_pass_for_all(grad_output, x, weight):
    with torch.enable_grad():
        elsewhere.pass_within(weight, x)
    return {"x": grad_output * weight, "weight": grad_output * x}


def by_a_pass_within(grad_output, x, forward):
    with torch.enable_grad():
        alias = x.detach().requires_grad_()
        forward(alias).backward(grad_output)
    return alias.grad


@pytest.mark.parametrize(
    ("rule", "name"),
    [
        (on_the_module, "weight"),
        (into_what_was_accumulated, "weight"),
        (on_a_parameter, "weight"),
        (on_the_argument, "x"),
        (by_a_helper, "weight"),
        (by_a_helper_elsewhere, "weight"),
        (ByItsMethod(), "weight"),
        (by_a_pass_within, "weight"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
@pytest.mark.parametrize("overridden", [False, True], ids=["decorated", "overridden"])
def test_rule_that_accumulates_a_gradient_itself_is_refused(rule, name, overridden):
    module, x = scale_module(left_to_autograd if overridden else rule), float64(3.0, 4.0)
    module.weight.grad = float64(1.0, 1.0, grad=False)
    told = f"{rule.__name__}.* must return gradients.* it has changed the grad of '{name}' itself .*Return that "
    with go.override(module, {type(module): rule}) if overridden else contextlib.nullcontext():
        result = module(x).sum()
    with pytest.raises(go.RuleResultError, match=told):
        result.backward()


def by_a_pass(grad_output, x):
    with torch.enable_grad():
        (x**2).sum().backward()
    return grad_output


@pytest.mark.parametrize("rule", [on_the_argument, by_a_pass])
def test_rule_of_a_function_that_accumulates_a_gradient_itself_is_refused(rule):
    result = go.custom_backward(rule)(lambda x: x * 2)(float64(3.0, 4.0))
    with pytest.raises(go.RuleResultError, match="has changed the grad of 'x' itself"):
        result.sum().backward()


def test_rule_that_answers_for_all_and_accumulates_a_gradient_itself_is_refused():
    class Weighted(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(float64(2.0, 2.0))

        @go.custom_backward(by_a_pass_for_all)
        def forward(self, x):
            return x * self.weight

    result = Weighted()(float64(3.0, 4.0))
    with pytest.raises(go.RuleResultError, match=r"has changed the grad of '(weight|x)' itself"):
        result.sum().backward()


def test_rule_may_find_gradients_by_a_pass_of_its_own():
    def rule(grad_output, x, forward):
        with torch.enable_grad():
            alias = x.detach().requires_grad_()
            (alias * 7).backward(grad_output)
            (found,) = torch.autograd.grad(forward(alias), alias, grad_output)
        return alias.grad + found

    module, x = scale_module(rule), float64(3.0, 4.0)
    module(x).sum().backward()
    exactly(x.grad, float64(9.0, 9.0, grad=False))
    exactly(module.weight.grad, float64(3.0, 4.0, grad=False))


# --- names ---


def test_receiver_of_a_class_may_have_any_name():
    @go.custom_backward
    class Odd(nn.Module):
        def __init__(this):
            super().__init__()
            this.weight = nn.Parameter(float64(2.0, 2.0))

        def forward(this, x):
            return x * this.weight

        def backward(this, grad_output, x):
            this.weight.grad = 5 * grad_output * x
            return 7 * grad_output

    module, x = Odd(), float64(3.0, 4.0)
    module(x).sum().backward()
    exactly(x.grad, float64(7.0, 7.0, grad=False))
    exactly(module.weight.grad, float64(15.0, 20.0, grad=False))


class Unusual(nn.Module):
    def __init__(this):
        super().__init__()
        this.weight = nn.Parameter(float64(2.0, 2.0))

    @go.custom_backward(lambda grad_output, x, weight: {"x": 7 * grad_output * weight, "weight": 5 * grad_output * x})
    def forward(this, x):
        return x * this.weight

    @staticmethod
    @go.custom_backward(lambda grad_output, x: 5 * grad_output * x)
    def double(x):
        return 2 * x

    @staticmethod
    @go.custom_backward(lambda grad_output: [5 * grad_output, None])
    def first(parts, factor=2.0):
        return parts[0] * factor

    @classmethod
    @go.custom_backward(lambda grad_output, x: 5 * grad_output * x)
    def triple(kind, x):
        return 3 * x


@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_receiver_of_a_method_may_have_any_name(backend):
    def as_it_runs(fn):
        return torch.compile(fn, backend=backend, fullgraph=True) if backend else fn

    module, x = Unusual(), float64(3.0, 4.0)
    grads = torch.autograd.grad(as_it_runs(module)(x).sum(), (x, module.weight))
    closely(grads, (float64(14.0, 14.0, grad=False), float64(15.0, 20.0, grad=False)))


@pytest.mark.parametrize("owner", [Unusual, Unusual()], ids=["class", "instance"])
def test_static_and_class_methods_are_told_from_methods_by_what_they_are_given(owner):
    x = float64(3.0, 4.0)
    for method in (owner.double, owner.triple):
        closely(torch.autograd.grad(method(x).sum(), x), (float64(15.0, 20.0, grad=False),))
    closely(torch.autograd.grad(owner.first([x, "label"]).sum(), x), (float64(5.0, 5.0, grad=False),))


def test_wrong_name_in_the_rule_of_a_static_method_is_an_error_when_it_is_called():
    class Wrong:
        @staticmethod
        @go.custom_backward(lambda grad_output, xx: grad_output)
        def double(x):
            return 2 * x

    with pytest.raises(go.RuleSignatureError, match=r"asks for 'xx', which does not exist.*Did you mean 'x'"):
        Wrong.double(float64(3.0))


def test_function_whose_first_parameter_is_called_self_is_one_when_it_is_given_a_tensor():
    @go.custom_backward(lambda grad_output, self: 5 * grad_output * self)
    def relu(self, type="a", len=1, isinstance=None):
        return self.clamp(min=0)

    x = float64(3.0, 4.0)
    relu(x).sum().backward()
    exactly(x.grad, float64(15.0, 20.0, grad=False))


def test_method_defined_outside_of_its_class_is_one():
    @go.custom_backward(lambda grad_output, weight: {"x": 3 * grad_output, "weight": 5 * grad_output})
    def forward(self, x):
        return x * self.weight

    module = type("Own", (type(scale_module(by_name)),), {"forward": forward})()
    x = float64(3.0, 4.0)
    module(x).sum().backward()
    exactly(x.grad, float64(3.0, 3.0, grad=False))
    exactly(module.weight.grad, float64(5.0, 5.0, grad=False))
    with pytest.raises(go.RuleSignatureError, match="asks for 'weight', which does not exist"):
        forward(x, x)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.one = nn.Parameter(float64(2.0, 2.0))
        self.other = self.one


TIED = {
    "asked by the other name": (lambda grad_output, x, other: {"x": grad_output, "other": 5 * grad_output}, 5.0),
    "answered by the other name": (lambda grad_output, x: {"x": grad_output, "other": 5 * grad_output}, 5.0),
    "both": (None, 7.0),
}


@pytest.mark.parametrize(("rule", "expected"), TIED.values(), ids=TIED)
def test_tied_parameter_is_known_by_each_of_its_names(rule, expected):
    def by_names(grad_output, x, one, other):
        return {"x": grad_output, "one": 5 * grad_output, "other": 2 * grad_output}

    rule = by_names if expected == 7.0 else rule
    module = type("Ours", (Tied,), {"forward": go.custom_backward(rule)(lambda self, x: x * self.other)})()
    module(float64(3.0, 4.0)).sum().backward()
    exactly(module.one.grad, float64(expected, expected, grad=False))


@pytest.mark.parametrize("of_other", [2.0, None])
def test_tied_parameter_that_is_answered_under_both_names_gets_the_sum(of_other):
    def rule(grad_output, x, one, other, needs):
        return {"x": grad_output, "one": 5 * grad_output, "other": None if of_other is None else of_other * grad_output}

    module = type("Ours", (Tied,), {"forward": go.custom_backward(rule)(lambda self, x: x * self.other)})()
    module(float64(3.0, 4.0)).sum().backward()
    exactly(module.one.grad, torch.full((2,), 5.0 + (of_other or 0), dtype=torch.float64))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_scripted_module_has_the_rule_and_its_own_gradients():
    plain = nn.Linear(2, 2).double()
    scripted = torch.jit.script(copy.deepcopy(plain))
    x, y = float64(3.0, 4.0), float64(3.0, 4.0)
    go.custom_backward(lambda grad_output: 3 * grad_output)(scripted)(x).sum().backward()
    plain(y).sum().backward()
    exactly(x.grad, float64(3.0, 3.0, grad=False))
    closely(dict(scripted.named_parameters())["weight"].grad, plain.weight.grad)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("made", [torch.jit.script, lambda plain: torch.jit.trace(plain, noise(2, 3, grad=False))])
def test_rule_of_a_scripted_module_may_ask_for_vjp(made):
    plain, x = nn.Linear(3, 3, dtype=torch.float64), noise(2, 3)
    scripted = made(copy.deepcopy(plain))
    go.custom_backward(lambda grad_output, vjp: 3 * vjp(grad_output))(scripted)(x).sum().backward()
    y = x.detach().clone().requires_grad_()
    plain(y).sum().backward()
    closely(x.grad, 3 * y.grad)
    closely(dict(scripted.named_parameters())["weight"].grad, plain.weight.grad)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_name_that_a_scripted_module_does_not_have_is_an_error_that_lists_those_it_has():
    scripted = torch.jit.script(nn.BatchNorm1d(3, dtype=torch.float64))
    with pytest.raises(go.RuleSignatureError, match=r"'running_meen'.*'running_var'.*Did you mean 'running_mean'\?"):
        go.custom_backward(lambda grad_output, running_meen: grad_output)(scripted)(noise(2, 3))


RULES_OF_A_LINEAR = {
    "by name": (
        lambda g, input, weight, bias: {"input": 2 * g @ weight, "weight": 3 * g.T @ input, "bias": None},
        2,
        3,
    ),
    "params": (lambda g, params, vjp: {name: 7 * grad for name, grad in vjp.by_name(g).items()}, 7, 7),
    "module": (lambda g, module: 5 * g @ module.weight, 5, 1),
    "left to autograd": (lambda g, vjp: 3 * vjp(g), 3, 1),
}


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # Dynamo's own
@pytest.mark.parametrize("within", [False, True], ids=["called as it is", "compiled again"])
@pytest.mark.parametrize("rule", RULES_OF_A_LINEAR)
def test_rule_of_a_compiled_module_knows_the_parameters_by_the_names_that_they_have_in_it(rule, within):
    plain, x = nn.Linear(3, 3, dtype=torch.float64), noise(2, 3)
    module = copy.deepcopy(plain)
    rule, of_input, of_weight = RULES_OF_A_LINEAR[rule]
    torch.compiler.reset()
    ruled = go.custom_backward(rule)(torch.compile(module, backend="aot_eager"))
    (torch.compile(ruled, backend="aot_eager") if within else ruled)(x).sum().backward()
    y = x.detach().clone().requires_grad_()
    plain(y).sum().backward()
    closely(x.grad, of_input * y.grad)
    closely(module.weight.grad, of_weight * plain.weight.grad)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # Dynamo's own
def test_hooks_of_a_compiled_module_run_once_for_each_call_whatever_the_rule_asks_for():
    compiled = torch.compile(nn.Linear(3, 3, dtype=torch.float64), backend="aot_eager")
    calls = []
    compiled.register_forward_hook(lambda module, args, result: calls.append("hook"))
    for rule in (lambda g, vjp: vjp(g), lambda g, params, vjp: vjp.by_name(g)):
        go.custom_backward(rule)(compiled)(noise(2, 3)).sum().backward()
    assert calls == ["hook", "hook"]


# --- parts that have more than the attributes of a module ---


class Parent(nn.Module):
    """`part(x) * scale`."""

    def __init__(self, part):
        super().__init__()
        self.part = part
        self.scale = nn.Parameter(float64(2.0, 3.0, 4.0))

    def forward(self, x):
        return self.part(x) * self.scale


def linear():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Linear(3, 3, dtype=torch.float64)


def compiled_in_place(part):
    part.compile(backend="aot_eager")
    return part


def bound_to_it(part):
    part.forward = types.MethodType(lambda self, x: nn.functional.linear(x, self.weight, self.bias), part)
    return part


def wrapped_as_accelerate_does(part):
    part.former = part.forward
    part.forward = functools.partial(lambda module, x: module.former(x), part)
    return part


PARTS = [compiled_in_place, lambda part: torch.compile(part, backend="aot_eager"), bound_to_it]
PARTS.append(wrapped_as_accelerate_does)


@pytest.mark.parametrize("make", PARTS, ids=["compile()", "torch.compile", "own forward", "wrapped forward"])
def test_rule_answers_for_the_parameters_of_a_part_that_runs_by_another_call(make):
    x, plain, model = float64(1.0, 2.0, 3.0), Parent(linear()), Parent(make(linear()))
    plain(x).sum().backward()
    expected = [p.grad for p in plain.parameters()]

    def rule(grad_output, vjp, params):
        grads = vjp.by_name(grad_output)
        return {name: grad if name == "x" else 10 * grad for name, grad in grads.items()}

    with go.override(model, {model: rule}):
        model(x.detach().requires_grad_()).sum().backward()
    for actual, grad in zip(model.parameters(), expected, strict=True):
        closely(actual.grad, 10 * grad)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("make", [torch.jit.script, lambda part: torch.jit.trace(part, noise(1, 3))])
def test_rule_that_asks_for_the_parameters_of_a_scripted_or_traced_part_is_refused(make):
    model = Parent(make(linear()))
    rule = {model: lambda grad_output, vjp, params: vjp.by_name(grad_output)}
    with go.override(model, rule), pytest.raises(go.UnsupportedError) as caught:
        model(float64(1.0, 2.0, 3.0))
    for part in ("'part' must run on other tensors", "ScriptModule|TopLevelTracedModule", "ask for no parameters"):
        assert re.search(part, str(caught.value))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_module_refers_to_its_own_weights_after_a_rule_that_answered_for_them(kind):
    module = kind(2, 2)
    before = dict(module.__dict__)
    with go.override(module, {module: lambda grad_output, vjp, params: vjp.by_name(grad_output)}):
        module(torch.ones(1, 1, 2))[0].sum().backward()
    assert all(module.__dict__[name] is value for name, value in before.items())
    assert [ref() for ref in module._flat_weight_refs] == list(module.parameters())


class Slots(nn.Module):
    __slots__ = ("__calls", "empty", "factor")

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(float64(2.0, 2.0))
        self.factor = 3.0
        self.__calls = 0

    @go.custom_backward(lambda grad_output, x, weight: {"x": grad_output * weight * 3, "weight": grad_output * x * 7})
    def forward(self, x):
        self.__calls += 1
        return x * self.weight * self.factor

    @property
    def calls(self):
        return self.__calls


def test_module_with_slots_keeps_them_before_the_rule_and_what_the_forward_puts_there():
    module, x = Slots(), float64(1.0, 2.0)
    module(x).sum().backward()
    closely((x.grad, module.weight.grad), (float64(6.0, 6.0, grad=False), float64(7.0, 14.0, grad=False)))
    assert module.calls == 1
    assert not hasattr(module, "empty")


def test_slot_that_the_forward_empties_is_empty():
    class Once(nn.Module):
        __slots__ = ("factor",)

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(float64(2.0))
            self.factor = 3.0

        @go.custom_backward(lambda grad_output, x, weight: {"x": grad_output * weight, "weight": grad_output * x})
        def forward(self, x):
            factor = self.factor
            del self.factor
            return x * self.weight * factor

    module = Once()
    exactly(module(float64(1.0)), float64(6.0, grad=False))
    assert not hasattr(module, "factor")


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_slots_are_there_in_the_forward_and_in_the_rule_in_compiled_code_too(compiled):
    class Scaled(nn.Module):
        __slots__ = ("factor", "seen")

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(float64(2.0, 2.0))
            self.factor = 3.0

        @go.custom_backward(
            lambda grad_output, x, weight, module: {
                "x": grad_output * weight * getattr(module, "factor", 100.0),
                "weight": grad_output * x * 7,
            }
        )
        def forward(self, x):
            self.seen = hasattr(self, "seen")
            return x * self.weight * getattr(self, "factor", 100.0)  # it must not look as if there were none

    module = Scaled()
    run = torch.compile(module, backend="aot_eager", fullgraph=True) if compiled else module
    for seen in (False, True):
        module.zero_grad()
        x = float64(1.0, 2.0)
        y = run(x)
        y.sum().backward()
        exactly(y.detach(), float64(6.0, 12.0, grad=False))
        closely((x.grad, module.weight.grad), (float64(6.0, 6.0, grad=False), float64(7.0, 14.0, grad=False)))
        assert module.seen is seen


class ByItsClass(nn.Module):
    factor = 3.0

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(float64(2.0, 2.0))
        self.register_buffer("seen", float64(0.0, 0.0, grad=False))

    def tripled(self, x):
        return self.factor * x

    @classmethod
    def grown(cls, x):
        return cls.factor * x

    @go.custom_backward(lambda grad_output, x, weight: {"x": grad_output * weight, "weight": grad_output * x * 7})
    def forward(self, x):
        self.seen = self.seen + x.detach()
        factor = self.factor if hasattr(type(self), "factor") else 100.0
        return type(self).tripled(self, x) * type(self).grown(x) * factor * self.weight


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_forward_of_a_module_with_buffers_may_look_at_its_class(compiled):
    module, x = ByItsClass(), float64(1.0, 2.0)
    run = torch.compile(module, backend="aot_eager", fullgraph=True) if compiled else module
    y = run(x)
    y.sum().backward()
    exactly(y.detach(), float64(54.0, 216.0, grad=False))
    exactly((x.grad, module.weight.grad), (float64(2.0, 2.0, grad=False), float64(7.0, 14.0, grad=False)))
    exactly(module.seen, x.detach())


def test_class_with_slots_is_let_go():
    def used():
        class Scaled(nn.Module):
            __slots__ = ("factor",)

            def __init__(self):
                super().__init__()
                self.weight = nn.Parameter(float64(2.0))

            @go.custom_backward(lambda grad_output, module: {"x": grad_output * module.weight, "weight": None})
            def forward(self, x):
                return x * self.weight

        Scaled()(float64(1.0)).backward()
        return weakref.ref(Scaled)

    gone = used()
    gc.collect()
    assert gone() is None


def test_forward_may_take_away_a_buffer_and_an_attribute():
    class Once(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(float64(2.0))
            self.first = True
            self.register_buffer("start", float64(5.0, grad=False))

        @go.custom_backward(lambda grad_output, weight: {"x": grad_output * weight, "weight": grad_output})
        def forward(self, x):
            del self.first, self.start
            return x * self.weight

    module = Once()
    module(float64(1.0)).sum().backward()
    assert not hasattr(module, "first")
    assert not hasattr(module, "start")


def test_override_of_a_module_with_slots_is_right():
    class Plain(nn.Module):
        __slots__ = ("factor",)

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(float64(2.0, 2.0))
            self.factor = 3.0

        def forward(self, x):
            return x * self.weight * self.factor

    module, x = Plain(), float64(1.0, 2.0)
    with go.override(module, {module: lambda grad_output, vjp, params: vjp.by_name(grad_output)}):
        module(x).sum().backward()
    closely((x.grad, module.weight.grad), (float64(6.0, 6.0, grad=False), float64(3.0, 6.0, grad=False)))


# What Python code puts on a tensor, and gives it as `data`


def answer(grad_output, x, weight):
    return {"x": grad_output * weight, "weight": grad_output * x}


WEIGHT_RULES = {
    "asks": answer,
    "left to autograd": lambda grad_output: {"x": grad_output},
    "vjp": lambda grad_output, vjp: vjp.by_name(grad_output),
}


class Marked(nn.Module):
    """A weight with attributes of its own."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(float64(3.2, 0.5, -2.2))
        self.weight.bits = 2

    def rounded(self):
        return self.weight.round() if getattr(self.weight, "bits", 32) < 32 else self.weight


def read_attribute(self, x):
    return x * self.weight * self.weight.bits


def read_attribute_elsewhere(self, x):
    return x * self.rounded()


class MarkedByABase(Marked):
    def rounded(self):
        return super().rounded()


def read_attribute_in_another_module(self, x):
    return torch.round(x / elsewhere.step_of(x)) * elsewhere.step_of(x) * self.weight


def set_attribute(self, x):
    if not hasattr(self.weight, "original"):
        self.weight.original = self.weight.detach().clone()
    return x * self.weight.original.sign()


def read_attribute_of_argument(self, x):
    return torch.round(x / x.step) * x.step if hasattr(x, "step") else torch.round(x) * self.weight


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("rule", WEIGHT_RULES.values(), ids=WEIGHT_RULES)
@pytest.mark.parametrize(
    ("base", "forward"),
    [
        *((Marked, forward) for forward in (read_attribute, read_attribute_elsewhere, set_attribute)),
        (Marked, read_attribute_of_argument),
        (Marked, read_attribute_in_another_module),
        (MarkedByABase, read_attribute_elsewhere),
    ],
)
def test_attributes_that_tensors_bear_are_there_in_the_forward(base, forward, rule, compiled):
    plain = type("Plain", (base,), {"forward": forward})()
    ruled = type("Ruled", (base,), {"forward": go.custom_backward(rule)(forward)})()
    torch.compiler.reset()
    run = torch.compile(ruled, backend="aot_eager", fullgraph=True) if compiled else ruled
    for step in (0.25, None):
        x = float64(0.3, 0.7, 1.1)
        if step is not None:
            x.step = step
        exactly(run(x).detach(), plain(x).detach())
    assert hasattr(ruled.weight, "original") == hasattr(plain.weight, "original")


@pytest.mark.parametrize("compiled", [False, True])
def test_attributes_that_tensors_bear_are_there_in_a_function_that_is_defined_below(compiled):
    @go.custom_backward(lambda grad_output: grad_output)
    def ruled(x):
        return scaled(x)

    def scaled(x):
        return x * elsewhere.step_of(x)

    run = torch.compile(ruled, backend="aot_eager", fullgraph=True) if compiled else ruled
    x = float64(1.0, 2.0)
    x.step = 3.0
    exactly(run(x).detach(), 3 * x.detach())


def test_attributes_that_tensors_bear_are_there_where_torch_func_has_the_forward_run_again():
    ruled = type("Ruled", (Marked,), {"forward": go.custom_backward(WEIGHT_RULES["vjp"])(read_attribute)})()
    exactly(torch.func.grad(lambda x: ruled(x).sum())(float64(1.0, 1.0, 1.0)).detach(), 2 * ruled.weight.detach())


def give_data(self, x):
    self.weight.data = self.weight.data.clamp(-1, 1)
    return x * self.weight


def give_data_elsewhere(self, x):
    if self.training:
        clip(self)
    return x * self.weight


def clip(module):
    module.weight.data = module.weight.data.clamp(-1, 1)


def give_data_of_another_layout(self, x):
    self.weight.data = self.weight.data[::2]
    return x[::2] * self.weight


@pytest.mark.parametrize("rule", WEIGHT_RULES.values(), ids=WEIGHT_RULES)
@pytest.mark.parametrize("forward", [give_data, give_data_elsewhere, give_data_of_another_layout])
def test_data_that_a_forward_gives_to_a_parameter_stay(forward, rule):
    plain = type("Plain", (Marked,), {"forward": forward})()
    ruled = type("Ruled", (Marked,), {"forward": go.custom_backward(rule)(forward)})()
    kept = ruled.weight
    exactly(ruled(float64(1.0, 2.0, 3.0)).detach(), plain(float64(1.0, 2.0, 3.0)).detach())
    exactly(ruled.weight.detach(), plain.weight.detach())
    assert ruled.weight is kept


@pytest.mark.parametrize("rule", WEIGHT_RULES.values(), ids=WEIGHT_RULES)
def test_data_that_a_compiled_forward_gives_to_a_parameter_stay_or_are_refused(rule):
    torch.compiler.reset()
    ruled = type("Ruled", (Marked,), {"forward": go.custom_backward(rule)(give_data)})()

    def run():
        torch.compile(ruled, backend="aot_eager", fullgraph=True)(float64(1.0, 1.0, 1.0))
        return ruled.weight.detach()

    right_or_refused(run, float64(1.0, 0.5, -1.0, grad=False), "mutate tensor data")


def double_data(x):
    x.data = 2 * x.data
    return 3 * x


@pytest.mark.parametrize("rule", [lambda grad_output: grad_output, lambda grad_output, vjp: vjp(grad_output)])
@pytest.mark.parametrize(
    "forward",
    [double_data, lambda x: elsewhere.double_data(x), lambda x: elsewhere.Doubling().double_data(x)],
    ids=["here", "elsewhere", "a method elsewhere"],
)
def test_data_that_a_forward_gives_to_its_argument_stay(rule, forward):
    x = float64(1.0, 2.0)
    exactly(go.custom_backward(rule)(forward)(x).detach(), float64(6.0, 12.0, grad=False))
    exactly(x.detach(), float64(2.0, 4.0, grad=False))


class TwoResults(nn.Module):
    """As a model that gives its states and what a head makes of them."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(3, 3, dtype=torch.float64), nn.Linear(3, 2, dtype=torch.float64)
        self.scale = nn.Parameter(torch.ones(3, dtype=torch.float64))

    def forward(self, x):
        states = self.body(x) * self.scale
        return states, self.head(states)


FOR_TWO = {
    "vjp": lambda grad_output, vjp: vjp(grad_output),
    "vjp of another": lambda grad_output, vjp: vjp(tuple(1.0 * part for part in grad_output)),
    "without vjp": lambda grad_output, module: grad_output[0] * module.scale @ module.body.weight,
    "a parameter by name": lambda grad_output, x, module, scale, vjp: {
        "x": vjp(grad_output),
        "scale": (grad_output[0] * module.body(x)).sum(0),
    },
    "one that was not asked for": lambda grad_output, x, module, vjp: {
        "x": vjp(grad_output),
        "scale": (grad_output[0] * module.body(x)).sum(0),
    },
}


@pytest.mark.parametrize("again", [False, True], ids=["once", "create_graph"])
@pytest.mark.parametrize("rule", FOR_TWO.values(), ids=FOR_TWO)
def test_parameters_of_a_result_without_a_gradient_have_none_as_without_a_rule(rule, again):
    """And no zeros: an optimizer with momentum or weight decay would move them."""
    model, x = TwoResults(), noise(2, 3)
    inputs = [x, *model.parameters()]

    def gradients():
        return torch.autograd.grad(model(x)[0].sum(), inputs, create_graph=again, allow_unused=True)

    expected = gradients()
    with go.override(model, {TwoResults: rule}):
        found = gradients()
    assert [one is None for one in found] == [one is None for one in expected]
    for one, other in zip(found, expected, strict=True):
        if one is not None:
            closely(one, other)
