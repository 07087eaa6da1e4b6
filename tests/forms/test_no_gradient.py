"""Where no gradient is wanted, the original is called and nothing else happens. Contract, section 2."""

import pytest
import torch
from oracles import exactly, float64
from torch import nn

import gradoverride as go


class Spy:
    """A forward that records what it was called with, and in which mode."""

    def __init__(self):
        self.calls = []

    def __call__(self, x):
        self.calls.append((x, torch.is_grad_enabled(), torch.is_inference_mode_enabled()))
        return 2 * x


def forbidden(grad_output):
    raise AssertionError("no gradient was wanted")


def asks_for_vjp(grad_output, vjp):
    raise AssertionError("no gradient was wanted")


DECORATORS = {
    "rule": go.custom_backward(forbidden),
    "vjp": go.custom_backward(asks_for_vjp),
    "straight_through": go.straight_through,
    "surrogate": go.straight_through(surrogate=torch.tanh),
}
NO_GRADIENT = {
    "no_grad": (torch.no_grad, True),
    "inference_mode": (torch.inference_mode, True),
    "nothing requires grad": (torch.enable_grad, False),
    "no_grad and nothing requires grad": (torch.no_grad, False),
}


@pytest.mark.parametrize("situation", NO_GRADIENT)
@pytest.mark.parametrize("decorator", DECORATORS)
def test_original_is_called_once_with_the_callers_own_tensor_and_mode(decorator, situation):
    mode, requires_grad = NO_GRADIENT[situation]
    x, spy = float64(3.0, grad=requires_grad), Spy()
    with mode():
        y = DECORATORS[decorator](spy)(x)
        expected = (torch.is_grad_enabled(), torch.is_inference_mode_enabled())
    assert len(spy.calls) == 1
    assert spy.calls[0][0] is x
    assert spy.calls[0][1:] == expected
    assert not y.requires_grad
    assert y.grad_fn is None
    exactly(y, torch.tensor([6.0], dtype=torch.float64))


def test_result_object_is_the_originals_own():
    result = {"anything": object()}
    decorated = go.custom_backward(lambda grad_output: grad_output)(lambda x: result)
    with torch.no_grad():
        assert decorated(float64(1.0)) is result
    assert decorated(torch.tensor([1, 2])) is result


@pytest.mark.parametrize("result", [None, "text", 3], ids=["None", "string", "number"])
def test_forward_without_a_tensor_is_fine(result):
    decorated = go.custom_backward(lambda grad_output: grad_output)(lambda x: result)
    with torch.no_grad():
        assert decorated(float64(1.0)) == result


def test_exception_of_the_forward_passes_through():
    def fails(x):
        raise KeyError("the user's own")

    with torch.no_grad(), pytest.raises(KeyError, match="the user's own"):
        go.custom_backward(lambda grad_output: grad_output)(fails)(float64(1.0))


def test_forward_may_write_in_place_into_a_leaf():
    x = float64(1.0)
    with torch.no_grad():
        go.custom_backward(lambda grad_output: grad_output)(lambda x: x.mul_(2))(x)
    assert x.item() == 2.0


def test_residuals_leave_the_result_as_it_is():
    decorated = go.custom_backward(lambda grad_output, mask: grad_output * mask)(
        lambda x: go.save_for_backward(x * 2, mask=x > 0)
    )
    with torch.no_grad():
        exactly(decorated(float64(3.0)), torch.tensor([6.0], dtype=torch.float64))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_module_with_parameters_gives_a_plain_result(mode):
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(float64(2.0))

        @go.custom_backward(lambda grad_output, weight: forbidden(grad_output))
        def forward(self, x):
            assert self.weight is own_weight[0]
            return x * self.weight

    layer = Scale()
    own_weight = [layer.weight]
    with mode():
        y = layer(float64(3.0))
    assert not y.requires_grad
    assert y.item() == 6.0


def test_frozen_module_without_input_gradient_gives_a_plain_result():
    class Scale(nn.Linear):
        @go.custom_backward(lambda grad_output, weight: forbidden(grad_output))
        def forward(self, input):
            return super().forward(input)

    assert not Scale(2, 2).requires_grad_(False)(torch.ones(1, 2)).requires_grad


def test_gradient_is_wanted_again_after_no_grad():
    decorated = go.custom_backward(lambda grad_output: 7 * grad_output)(lambda x: 2 * x)
    x = float64(3.0)
    with torch.no_grad():
        decorated(x)
    decorated(x).backward()
    assert x.grad.item() == 7.0


def test_enable_grad_within_no_grad_wants_a_gradient():
    decorated = go.custom_backward(lambda grad_output: 7 * grad_output)(lambda x: 2 * x)
    x = float64(3.0)
    with torch.no_grad(), torch.enable_grad():
        y = decorated(x)
    y.backward()
    assert x.grad.item() == 7.0


def test_inference_tensor_as_an_argument_needs_no_gradient():
    @go.custom_backward(lambda grad_output: (7 * grad_output, None))
    def product(x, weight):
        return x * weight

    with torch.inference_mode():
        weight = torch.ones(1, dtype=torch.float64)
    x = float64(3.0)
    product(x, weight).backward()
    assert x.grad.item() == 7.0


def test_forward_runs_without_a_graph_when_a_gradient_is_wanted():
    states = []

    def inner(x):
        y = x * 2
        states.append(y.grad_fn)
        return y

    go.custom_backward(lambda grad_output: 7 * grad_output)(inner)(float64(1.0)).backward()
    assert states == [None]


def test_forward_runs_once_when_a_gradient_is_wanted():
    for decorator in (go.custom_backward(lambda grad_output, vjp: vjp(grad_output)), go.straight_through):
        spy = Spy()
        decorator(spy)(float64(1.0)).backward()
        assert len(spy.calls) == 1
