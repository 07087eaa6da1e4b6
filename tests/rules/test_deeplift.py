"""DeepLIFT's rescale rule against multipliers that are chained by hand, layer by layer."""

import pickle

import pytest
import torch
import torch.nn.functional as F
from oracles import closely, exactly
from torch import nn

import gradoverride as go
from gradoverride import rules

ACTIVATIONS = {
    "ReLU": (nn.ReLU, torch.relu),
    "tanh": (nn.Tanh, torch.tanh),
    "sigmoid": (nn.Sigmoid, torch.sigmoid),
    "GELU": (nn.GELU, F.gelu),
    "leaky ReLU": (lambda: nn.LeakyReLU(0.2), lambda x: F.leaky_relu(x, 0.2)),
    "softplus": (nn.Softplus, F.softplus),
}


def network(activation):
    torch.manual_seed(5)
    return nn.Sequential(
        nn.Linear(5, 6), activation(), nn.Linear(6, 4), activation(), nn.Linear(4, 3)
    ).double()  # fmt: skip


def data(n=4):
    torch.manual_seed(6)
    return torch.randn(n, 5, dtype=torch.float64), torch.randn(n, 5, dtype=torch.float64)


def multipliers_by_hand(model, function, x, reference, target):
    """The chain rule for multipliers (equation 3 of the paper), with each layer's written out."""
    found = []
    for one, other in zip(x, reference, strict=True):
        multiplier = torch.eye(5, dtype=torch.float64)
        for layer in model:
            if isinstance(layer, nn.Linear):
                multiplier = layer.weight.detach() @ multiplier
                one, other = layer(one).detach(), layer(other).detach()
            else:
                slopes = [(function(a) - function(b)) / (a - b) for a, b in zip(one, other, strict=True)]
                multiplier = torch.diag(torch.stack(slopes)) @ multiplier
                one, other = function(one), function(other)
        found.append(multiplier[target])
    return torch.stack(found)


def multipliers(model, x, reference, target):
    both = torch.cat([x, reference]).requires_grad_()
    result, of_reference = model(both)[:, target].chunk(2)
    (grad,) = torch.autograd.grad(result.sum(), both)
    return grad[: len(x)], (result - of_reference).detach()


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_multipliers_are_those_chained_by_hand(name):
    activation, function = ACTIVATIONS[name]
    model, (x, reference) = network(activation), data()
    with go.override(model, {type(model[1]): rules.deeplift_rescale()}):
        found, _ = multipliers(model, x, reference, 1)
    closely(found, multipliers_by_hand(model, function, x, reference, 1))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_contributions_sum_to_the_difference_of_the_results(name):
    model, (x, reference) = network(ACTIVATIONS[name][0]), data()
    with go.override(model, go.presets.deeplift):
        found, difference = multipliers(model, x, reference, 2)
    torch.testing.assert_close((found * (x - reference)).sum(1), difference, rtol=1e-13, atol=1e-14)
    plain, _ = multipliers(model, x, reference, 2)
    assert not torch.allclose((plain * (x - reference)).sum(1), difference, rtol=1e-3)


class Called(nn.Module):
    """Functions in place of modules, a convolution, and one ReLU used twice."""

    def __init__(self):
        super().__init__()
        self.convolution, self.act, self.out = nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Linear(3, 2)

    def forward(self, x):
        h = self.act(self.act(self.convolution(x)) - 0.2)
        return self.out(torch.tanh(h.mean((2, 3))) + F.relu(h.amin((2, 3)) - 9))


def test_functions_convolutions_and_a_shared_module():
    model = Called().double()
    x, reference = torch.rand(3, 1, 6, 6, dtype=torch.float64), torch.zeros(3, 1, 6, 6, dtype=torch.float64)
    with go.override(model, go.presets.deeplift):
        found, difference = multipliers(model, x, reference, 0)
    torch.testing.assert_close((found * (x - reference)).sum((1, 2, 3)), difference, rtol=1e-13, atol=1e-14)


def test_where_input_and_reference_agree_it_is_the_gradient():
    tanh = go.custom_backward(rules.deeplift_rescale())(torch.tanh)
    x = torch.tensor([0.3, 0.3, 1.0, 0.3, 0.3 + 1e-9, 2.0], dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(tanh(x).sum(), x)
    slope = (torch.tanh(x[2]) - torch.tanh(x[5])) / (x[2] - x[5])
    closely(found, torch.where(x.detach() < 0.5, 1 - torch.tanh(x) ** 2, slope).detach())


def test_epsilon_says_how_near_that_is():
    relu = go.custom_backward(rules.deeplift_rescale(epsilon=0.5))(torch.relu)
    x = torch.tensor([0.2, 3.0, -0.2, -1.0], dtype=torch.float64, requires_grad=True)
    exactly(torch.autograd.grad(relu(x).sum(), x)[0], x.new_tensor([1, 0.75, 0, 0.75]))


def test_batch_in_another_dimension():
    model, (x, reference) = network(nn.ReLU), data()
    rule = rules.deeplift_rescale(dim=1)
    with go.override(model, {nn.ReLU: rule}):
        both = torch.stack([torch.cat([x, reference])] * 2).requires_grad_()
        (found,) = torch.autograd.grad(model(both)[:, :4, 1].sum(), both)
    closely(found[0, :4], multipliers_by_hand(model, torch.relu, x, reference, 1))


def test_second_derivative_is_finite_and_that_of_the_function_where_they_agree():
    x = torch.tensor([0.5, -0.4, -0.2, -0.4], dtype=torch.float64, requires_grad=True)
    tanh = go.custom_backward(rules.deeplift_rescale())(torch.tanh)
    (found,) = torch.autograd.grad(tanh(x).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(found.sum(), x)
    assert second.isfinite().all()
    y = torch.tanh(x.detach())[1]
    closely(second[1], -2 * y * (1 - y**2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_other_dtypes(dtype):
    relu = go.custom_backward(rules.deeplift_rescale())(torch.relu)
    x = torch.tensor([1.0, 0.0, -1.0, -1.0], dtype=dtype, requires_grad=True)
    exactly(torch.autograd.grad(relu(x).sum(), x)[0], torch.tensor([0.5, 0.0, 0.5, 0.0], dtype=dtype))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo's own doing
def test_compiled_it_is_that_of_eager():
    torch.compiler.reset()
    model, (x, reference) = network(nn.ReLU), data()
    with go.override(model, go.presets.deeplift):
        expected, _ = multipliers(model, x, reference, 0)
        found, _ = multipliers(torch.compile(model, backend="aot_eager", fullgraph=True), x, reference, 0)
    closely(found, expected)


def test_under_transforms_it_is_that_of_autograd():
    model, (x, reference) = network(nn.Tanh), data()
    both = torch.cat([x, reference])
    with go.override(model, go.presets.deeplift):
        expected, _ = multipliers(model, x, reference, 0)
        grad = torch.func.grad(lambda both: model(both)[:4, 0].sum())
        closely(grad(both)[:4], expected)
        closely(torch.func.vmap(grad)(torch.stack([both + 1, both]))[1, :4], expected)


def test_it_pickles_compares_and_prints():
    rule = rules.deeplift_rescale(epsilon=1e-5)
    assert pickle.loads(pickle.dumps(rule)) == rule
    assert repr(rule) == "deeplift_rescale(epsilon=1e-05, dim=0)"


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (
            lambda: rules.deeplift_rescale(epsilon=0),
            "deeplift_rescale: 'epsilon' must be a number larger than 0; got 0",
        ),
        (lambda: rules.deeplift_rescale(dim=0.5), "deeplift_rescale: 'dim' must be an integer; got 0.5"),
    ],
)
def test_options_out_of_range_are_errors_at_once(make, text):
    with pytest.raises(go.RuleOptionError, match=text):
        make()


@pytest.mark.parametrize(
    ("fn", "shape", "text"),
    [
        (
            torch.relu,
            (3, 2),
            r"the batch, dimension 0, must hold inputs and as many references, .*of shape \(3, 2\) came",
        ),
        (torch.relu, (), r"the batch, dimension 0, must hold .* of shape \(\) came"),
        (lambda x: x.sum(1), (2, 2), r"one result for each input; the input has the shape \(2, 2\), and the result is"),
        (lambda x: (x, x), (2, 2), r"one result for each input; the input has the shape \(2, 2\), and the result is"),
    ],
)
def test_what_is_no_batch_of_pairs_is_refused(fn, shape, text):
    x = torch.ones(shape, requires_grad=True)
    result = go.custom_backward(rules.deeplift_rescale())(fn)(x)
    with pytest.raises(go.UnsupportedError, match=text):
        torch.autograd.grad(result[0].sum() if isinstance(result, tuple) else result.sum(), x)


def test_function_of_two_tensors_is_refused():
    prelu = go.custom_backward(rules.deeplift_rescale())(lambda x, weight: F.prelu(x, weight))
    x, weight = torch.ones(2, 1, requires_grad=True), torch.ones(1)
    with pytest.raises(go.UnsupportedError, match="deeplift_rescale is for functions of one tensor"):
        prelu(x, weight).sum().backward()
