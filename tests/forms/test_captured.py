"""Tensors that a forward reaches by a closure or a global are an error, at any call that wants a gradient."""

import pytest
import torch
from oracles import float64
from torch import nn

import gradoverride as go

GLOBAL_WEIGHT = float64(3.0)


def closure():
    weight = float64(3.0)

    @go.custom_backward(lambda grad_output: grad_output)
    def forward(x):
        return x * weight

    return forward


def global_variable():
    @go.custom_backward(lambda grad_output: grad_output)
    def forward(x):
        return x * GLOBAL_WEIGHT

    return forward


def closed_over_module():
    linear = nn.Linear(1, 1, dtype=torch.float64)

    @go.custom_backward(lambda grad_output: grad_output)
    def forward(x):
        return linear(x)

    return forward


def attribute_of_a_plain_object():
    class Plain:
        def __init__(self):
            self.weight = float64(3.0)

        @go.custom_backward(lambda grad_output: grad_output)
        def forward(self, x):
            return x * self.weight

    return Plain().forward


def entry_of_a_dict():
    table = {"weight": float64(3.0)}

    @go.custom_backward(lambda grad_output: grad_output)
    def forward(x):
        return x * table["weight"]

    return forward


def computed_from_a_parameter():
    weight = float64(3.0) * 2

    @go.custom_backward(lambda grad_output: grad_output)
    def forward(x):
        return x * weight

    return forward


def straight_through():
    weight = float64(3.0)
    return go.straight_through(lambda x: torch.round(x * weight))


def vjp_rule():
    weight = float64(3.0)
    return go.custom_backward(lambda grad_output, vjp: vjp(grad_output))(lambda x: x * weight)


CAPTURES = {
    "closure": closure,
    "global": global_variable,
    "module in a closure": closed_over_module,
    "attribute of a plain object": attribute_of_a_plain_object,
    "entry of a dict": entry_of_a_dict,
    "non-leaf": computed_from_a_parameter,
    "straight_through": straight_through,
    "vjp": vjp_rule,
}


@pytest.fixture(params=CAPTURES)
def forward(request):
    return CAPTURES[request.param]()


def test_captured_tensor_is_an_error_at_the_call(forward):
    with pytest.raises(go.CapturedTensorError, match=r"test_captured\.py:\d+.*requires.grad"):
        forward(float64(1.0))


def test_original_is_called_where_no_input_needs_a_gradient_and_none_is_lost(forward):
    assert forward(float64(1.0, grad=False)).requires_grad  # by torch's own graph, to the captured tensor


def test_captured_tensor_is_an_error_at_a_later_call_too(forward):
    for _ in range(2):
        with pytest.raises(go.CapturedTensorError, match=r"requires grad"):
            forward(float64(1.0))


def test_captured_tensor_is_fine_where_no_gradient_is_wanted(forward):
    with torch.no_grad():
        assert not forward(float64(1.0)).requires_grad


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (closure, "'weight'"),
        (global_variable, "'GLOBAL_WEIGHT'"),
        (closed_over_module, "linear"),
        (attribute_of_a_plain_object, "weight"),
    ],
    ids=["closure", "global", "module", "attribute"],
)
def test_captured_tensor_is_named(make, name):
    with pytest.raises(go.CapturedTensorError, match=name):
        make()(float64(1.0))


def test_captured_tensor_that_comes_to_require_grad_later_is_found():
    weight = float64(3.0, grad=False)
    forward = go.custom_backward(lambda grad_output: 7 * grad_output)(lambda x: x * weight)
    x = float64(1.0)
    forward(x).backward()
    assert x.grad.item() == 7.0
    weight.requires_grad_()
    with pytest.raises(go.CapturedTensorError, match="weight"):
        forward(x)


def test_captured_tensor_in_a_second_result_is_found():
    weight = float64(3.0)
    forward = go.custom_backward(lambda grad_output: grad_output[0])(lambda x: (x * 2, weight * 2))
    with pytest.raises(go.CapturedTensorError, match="weight"):
        forward(float64(1.0))


def test_captured_tensor_returned_as_it_is_is_found():
    weight = float64(3.0)
    forward = go.custom_backward(lambda grad_output: grad_output)(lambda x: weight)
    with pytest.raises(go.CapturedTensorError, match="weight"):
        forward(float64(1.0))


def test_captured_parameter_of_another_module_is_found():
    class Layer(nn.Module):
        def __init__(self, others):
            super().__init__()
            self.weight = nn.Parameter(float64(2.0))
            self.others = others  # in a list, so not registered

        @go.custom_backward(lambda grad_output: grad_output)
        def forward(self, x):
            return x * self.weight * self.others[0].weight

    with pytest.raises(go.CapturedTensorError, match="weight"):
        Layer([nn.Linear(1, 1, dtype=torch.float64)])(float64(1.0))


NO_GRADIENT_LOST = {
    "detached": lambda weight: lambda x: x * weight.detach(),
    "item": lambda weight: lambda x: x * weight.item(),
    "frozen": lambda weight: lambda x, frozen=weight.detach(): x * frozen,  # noqa: B008 - a default is what is tested
    "under no_grad": lambda weight: torch.no_grad()(lambda x: x * weight),
    "comparison": lambda weight: lambda x: x * (weight > 0),
    "unused": lambda weight: lambda x: (weight, x * 3)[1],
}


@pytest.mark.parametrize("kind", NO_GRADIENT_LOST)
def test_tensor_whose_gradient_is_not_lost_is_no_error(kind):
    forward = go.custom_backward(lambda grad_output: {"x": 7 * grad_output})(NO_GRADIENT_LOST[kind](float64(3.0)))
    x = float64(1.0)
    forward(x).backward()
    assert x.grad.item() == 7.0


def test_frozen_teacher_in_a_closure_is_no_error():
    teacher = nn.Linear(1, 1, dtype=torch.float64).requires_grad_(False)
    forward = go.custom_backward(lambda grad_output: 7 * grad_output)(lambda x: teacher(x))
    x = float64(1.0)
    forward(x).backward()
    assert x.grad.item() == 7.0


def test_tensor_that_the_forward_makes_is_refused_with_its_way_out():
    def step(x, end=lambda slope: slope):
        with torch.enable_grad():
            z = x.detach().requires_grad_()
            (slope,) = torch.autograd.grad((z**3).sum(), z, create_graph=True)
        return x - 0.1 * end(slope)

    rule = go.custom_backward(lambda grad_output: grad_output * 5)
    text = r"a tensor of shape \(1,\) that requires grad .* or made one itself.* detach\(\) what it computes from it$"
    with pytest.raises(go.CapturedTensorError, match=text):
        rule(step)(float64(2.0))
    x = float64(2.0)
    rule(lambda x: step(x, torch.detach))(x).backward()
    assert x.grad.item() == 5.0
