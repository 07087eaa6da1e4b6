"""Rules for attribution against dense LRP written out by weights, and hand-made Functions."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from oracles import closely, exactly, noise
from torch import nn
from torch.nn.utils import parametrizations

import gradoverride as go
from gradoverride import rules

EPS = 1e-6


def away(z):
    return z + torch.where(z >= 0, EPS, -EPS)


def dense(layer, x):
    """The matrix and the bias of a linear layer for one input of this shape, by columns."""
    plain = copy.deepcopy(layer)
    zero = torch.zeros_like(x)
    offset = plain(zero).detach().flatten()
    columns = []
    for index in range(x.numel()):
        unit = zero.flatten().clone()
        unit[index] = 1
        columns.append(plain(unit.view_as(x)).detach().flatten() - offset)
    return torch.stack(columns, 1), offset


def shares(contributions, z, relevance):
    """Relevance of each input, by its part in each z."""
    parts = torch.where(z[:, None] == 0, 0, contributions / z[:, None])
    return (parts * relevance[:, None]).sum(0)


def epsilon(w, b, x, r):
    return shares(w * x, away(w @ x + b), r)


def gamma(w, b, x, r):
    w, b = w + 0.25 * w.clamp(min=0), b + 0.25 * b.clamp(min=0)
    return shares(w * x, w @ x + b, r)


def alpha_beta(alpha, beta):
    def by_hand(w, b, x, r):
        positive, negative = (w * x).clamp(min=0), (w * x).clamp(max=0)
        found = alpha * shares(positive, positive.sum(1) + b.clamp(min=0), r)
        return found - beta * shares(negative, negative.sum(1) + b.clamp(max=0), r) if beta else found

    return by_hand


def z_box(w, b, x, r):
    contributions = w * x + 2.0 * w.clamp(min=0) - 3.0 * w.clamp(max=0)
    return shares(contributions, contributions.sum(1), r)


def flat(w, b, x, r):
    ones = (w != 0).double()
    return shares(ones, ones.sum(1), r)


def w_square(w, b, x, r):
    return shares(w**2, (w**2).sum(1), r)


BY_HAND = {
    "epsilon": (rules.lrp_epsilon(EPS), epsilon),
    "gamma": (rules.lrp_gamma(0.25), gamma),
    "alpha 2 beta 1": (rules.lrp_alpha_beta(2.0, 1.0), alpha_beta(2, 1)),
    "z-plus": (rules.lrp_z_plus, alpha_beta(1, 0)),
    "z-box": (rules.lrp_z_box(-2.0, 3.0), z_box),
    "flat": (rules.lrp_flat, flat),
    "w-square": (rules.lrp_w_square, w_square),
}
LAYERS = {
    "Linear": (lambda bias: nn.Linear(4, 3, bias=bias), (1, 4)),
    "Conv1d": (lambda bias: nn.Conv1d(2, 3, 2, bias=bias), (1, 2, 4)),
    "Conv2d": (lambda bias: nn.Conv2d(2, 2, 2, stride=2, bias=bias), (1, 2, 4, 4)),
    "ConvTranspose1d": (lambda bias: nn.ConvTranspose1d(2, 3, 2, bias=bias), (1, 2, 3)),
}


def relevance_of(model, x, r):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(model(x), x, r)[0]


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("name", BY_HAND)
def test_relevance_is_that_of_dense_lrp(name, layer, bias):
    torch.manual_seed(3)
    make, shape = LAYERS[layer]
    model, x = make(bias).double(), torch.randn(shape, dtype=torch.float64)
    rule, by_hand = BY_HAND[name]
    r = torch.randn_like(model(x))
    w, b = dense(model, x)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with go.override(model, {model: rule}):
        found = relevance_of(model, x, r)
    closely(found, by_hand(w, b, x.flatten(), r.flatten()).view_as(x))
    exactly(dict(model.state_dict()), state)


@pytest.mark.parametrize("name", ["epsilon", "alpha 2 beta 1", "z-plus", "flat", "w-square"])
def test_relevance_is_conserved_without_a_bias(name):
    torch.manual_seed(0)
    model, x = nn.Linear(6, 4, bias=False).double(), torch.rand(5, 6, dtype=torch.float64)
    r = torch.rand(5, 4, dtype=torch.float64)
    with go.override(model, {model: BY_HAND[name][0]}):
        found = relevance_of(model, x, r)
    torch.testing.assert_close(found.sum(1), r.sum(1), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", BY_HAND)
class TestOfTheMechanism:
    def model(self):
        torch.manual_seed(1)
        return nn.Linear(3, 3).double()

    def test_a_shared_layer_has_the_relevance_of_two_copies(self, name):
        shared = self.model()
        x, r = torch.rand(2, 3, dtype=torch.float64), torch.rand(2, 3, dtype=torch.float64)
        both, apart = nn.Sequential(shared, shared), nn.Sequential(shared, copy.deepcopy(shared))
        rule = BY_HAND[name][0]
        with go.override(both, {nn.Linear: rule}):
            found = relevance_of(both, x, r)
        with go.override(apart, {nn.Linear: rule}):
            closely(found, relevance_of(apart, x, r))

    def test_two_forwards_before_the_first_backward(self, name):
        model, rule = self.model(), BY_HAND[name][0]
        first, second = torch.rand(2, 1, 3, dtype=torch.float64).requires_grad_().unbind()
        r = torch.rand(1, 3, dtype=torch.float64)
        with go.override(model, {model: rule}):
            alone = [torch.autograd.grad(model(x), x, r)[0] for x in (first, second)]
            results = [model(x) for x in (first, second)]
            for result, x, expected in zip(results, (first, second), alone, strict=True):
                exactly(torch.autograd.grad(result, x, r)[0], expected)

    def test_an_optimizer_goes_on_updating_the_model(self, name):
        model = self.model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        x = torch.rand(2, 3, dtype=torch.float64, requires_grad=True)
        with go.override(model, {model: BY_HAND[name][0]}):
            relevance_of(model, x, torch.ones(2, 3, dtype=torch.float64))
        before = model.weight.detach().clone()
        model(x).sum().backward()
        optimizer.step()
        closely(model.weight.detach(), before - 0.1 * x.detach().sum(0).expand(3, 3))

    @pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo's own doing
    def test_compiled_it_is_that_of_eager(self, name):
        torch.compiler.reset()
        model, x = self.model(), torch.rand(2, 3, dtype=torch.float64)
        r = torch.rand(2, 3, dtype=torch.float64)
        with go.override(model, {model: BY_HAND[name][0]}):
            expected = relevance_of(model, x, r)
            closely(relevance_of(torch.compile(model, backend="aot_eager", fullgraph=True), x, r), expected)

    def test_everywhere_it_is_that_of_the_module(self, name):
        model, x = self.model(), torch.rand(2, 3, dtype=torch.float64)
        r, rule = torch.rand(2, 3, dtype=torch.float64), BY_HAND[name][0]
        with go.override(model, {model: rule}):
            expected = relevance_of(model, x, r)
        with go.override({nn.Linear: rule}):
            exactly(relevance_of(model, x, r), expected)

    def test_it_pickles_compares_and_prints(self, name):
        rule = BY_HAND[name][0]
        assert pickle.loads(pickle.dumps(rule)) == rule
        assert name.split("-")[0].split()[0] in repr(rule).replace("_", "-")

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_in_other_dtypes(self, name, dtype):
        model, x = self.model().to(dtype), torch.rand(2, 3, dtype=dtype)
        with go.override(model, {model: BY_HAND[name][0]}):
            found = relevance_of(model, x, torch.ones(2, 3, dtype=dtype))
        assert found.dtype is dtype
        assert found.isfinite().all()


class TestRelus:
    x = torch.tensor([-2.0, -0.0, 0.0, 1.0, 3.0], dtype=torch.float64)
    g = torch.tensor([1.0, 2.0, -3.0, -4.0, 5.0], dtype=torch.float64)

    def by_rule(self, rule):
        x = self.x.clone().requires_grad_()
        return torch.autograd.grad(go.custom_backward(rule)(F.relu)(x), x, self.g)[0]

    def test_guided(self):
        exactly(self.by_rule(rules.guided_relu), self.g.new_tensor([0, 0, 0, 0, 5]))

    def test_deconv(self):
        exactly(self.by_rule(rules.deconv_relu), self.g.new_tensor([1, 2, 0, 0, 5]))

    def test_smooth_is_the_gradient_of_softplus(self):
        x = self.x.clone().requires_grad_()
        (expected,) = torch.autograd.grad(F.softplus(x, beta=7.0, threshold=1e9), x, self.g)
        closely(self.by_rule(rules.smooth_relu(7.0)), expected)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: rules.lrp_epsilon(-1.0), "lrp_epsilon: 'epsilon' must be a number that is not negative; got -1.0"),
        (lambda: rules.lrp_gamma(-1.0), "lrp_gamma: 'gamma' must be a number that is not negative; got -1.0"),
        (lambda: rules.lrp_alpha_beta(2.0, 2.0), "lrp_alpha_beta: 'alpha' and 'beta' must be numbers with alpha - b"),
        (lambda: rules.lrp_z_box(1.0, 0.0), "lrp_z_box: 'low' and 'high' must be numbers of shapes that broadcast"),
        (lambda: rules.lrp_z_box((), 1.0), r"lrp_z_box: 'low' must be a number, or numbers in .*; got \(\)"),
        (lambda: rules.lrp_z_box(0.0, [[], []]), r"lrp_z_box: 'high' must be a number, or numbers in .*; got \[\]"),
        (lambda: rules.lrp_z_box({}, 1.0), "lrp_z_box: 'low' must be a number, .*; got a dict"),
        (lambda: rules.lrp_z_box(iter([0.0]), 1.0), "lrp_z_box: 'low' must be a number, .*; got a list_iterator"),
        (lambda: rules.lrp_z_box(b"a", 200.0), "lrp_z_box: 'low' must be a number, .*; got a bytes"),
        (lambda: rules.smooth_relu(0.0), "smooth_relu: 'beta' must be a number larger than 0; got 0.0"),
    ],
)
def test_options_out_of_range_are_errors_at_once(make, text):
    with pytest.raises(go.RuleOptionError, match=text):
        make()


def test_bounds_of_no_one_shape_are_an_error():
    with pytest.raises(go.RuleOptionError, match="'low' and 'high' must be numbers of shapes that broadcast"):
        rules.lrp_z_box([[1.0], [1.0, 2.0]], 3.0)


@pytest.mark.parametrize(
    ("bounds", "text"),
    [
        (([0.0] * 4, 1.0), r"'low' must broadcast to the shape of the input, \(2, 3\); it has shape \(4,\)"),
        ((0.0, torch.ones(1, 2, 3)), r"'high' must broadcast to the shape of the input, \(2, 3\); it .* \(1, 2, 3\)"),
    ],
)
def test_bounds_that_the_input_does_not_have_are_an_error(bounds, text):
    layer, x = nn.Linear(3, 2), torch.ones(2, 3, requires_grad=True)
    with go.override(layer, {layer: rules.lrp_z_box(*bounds)}):
        y = layer(x)
    with pytest.raises(go.RuleOptionError, match=f"lrp_z_box: {text}. Give it sizes of 1"):
        y.sum().backward()


@pytest.mark.parametrize(
    ("rule", "name"),
    [
        (rules.smooth_relu(), "smooth_relu"),
        (rules.ewgs(), "ewgs"),
        (rules.rotation_trick, "rotation_trick"),
    ],
    ids=["smooth_relu", "ewgs", "rotation_trick"],
)
@pytest.mark.parametrize("results", [1, 2])  # the gradient of one broadcasts to the shape of the input
def test_rule_for_one_result_of_each_input_is_refused_on_another_function(rule, name, results):
    layer, x = nn.Linear(3, results), torch.ones(2, 3, requires_grad=True)
    with go.override(layer, {layer: rule}):
        y = layer(x)
    with pytest.raises(go.UnsupportedError) as caught:
        y.sum().backward()
    assert str(caught.value) == (
        f"{name} is for what has one result for each input; it is in force on another, with an input of shape (2, 3) "
        f"and, as the gradient of its result, a tensor of shape (2, {results})"
    )


def test_z_plus_is_alpha_beta_of_one_and_zero():
    layer, x, r = nn.Linear(3, 3).double(), noise(2, 3), noise(2, 3, grad=False)
    found = []
    for rule in (rules.lrp_z_plus, rules.lrp_alpha_beta(1.0, 0.0)):
        with go.override(layer, {layer: rule}):
            found.append(relevance_of(layer, x, r))
    exactly(*found)


def test_a_parametrized_weight_is_one_weight():
    x, r, plain = noise(2, 3), noise(2, 3, grad=False), nn.Linear(3, 3).double()
    normed = parametrizations.weight_norm(copy.deepcopy(plain))
    found = []
    for layer in (plain, normed):
        with go.override(layer, {layer: rules.lrp_gamma()}):
            found.append(relevance_of(layer, x, r))
    closely(*found)


@pytest.mark.parametrize(
    ("module", "rule", "text"),
    [
        (None, rules.lrp_epsilon(), "lrp_epsilon is for modules; it is in force on a function. Use a module for it"),
        (None, rules.lrp_flat, r"this LRP rule is for modules, .*; it is in force on a function\. Use a module in its"),
        (nn.ReLU(), rules.lrp_flat, r"one weight, .*; a 'ReLU' has no parameters\. Use lrp_epsilon for it"),
        (nn.Sequential(nn.Tanh()), rules.lrp_flat, r"one weight, .*; a 'Sequential' has '0'\. Use lrp_epsilon for it"),
    ],
)
def test_what_is_no_linear_layer_is_refused(module, rule, text):
    x = noise(2, 3)
    decorated = go.custom_backward(rule)(torch.relu if module is None else module)
    with pytest.raises(go.UnsupportedError, match=text):
        decorated(x).sum().backward()


def test_a_layer_that_was_given_more_than_its_input_is_refused():
    layer, x = nn.ConvTranspose1d(1, 1, 2, stride=2).double(), noise(1, 1, 3)
    with go.override(layer, {layer: rules.lrp_z_plus}):
        y = layer(x, output_size=[7])
    with pytest.raises(go.UnsupportedError, match=r"'ConvTranspose1d' calls it again .* such as 'output_size'"):
        y.sum().backward()


@pytest.mark.parametrize("name", BY_HAND)
def test_as_the_backward_of_a_class_it_is_that_of_an_override(name):
    rule = BY_HAND[name][0]

    @go.custom_backward(rule)
    class Decorated(nn.Linear):
        pass

    torch.manual_seed(1)
    model, x = Decorated(3, 3).double(), torch.rand(2, 3, dtype=torch.float64)
    r, plain = torch.rand(2, 3, dtype=torch.float64), nn.Linear(3, 3).double()
    plain.load_state_dict(model.state_dict())
    with go.override(plain, {plain: rule}):
        exactly(relevance_of(model, x, r), relevance_of(plain, x, r))


def test_epsilon_does_not_mind_a_relu_in_place_behind():
    torch.manual_seed(1)
    layer, x = nn.Linear(3, 3).double(), torch.rand(2, 3, dtype=torch.float64)
    r = torch.rand(2, 3, dtype=torch.float64)
    found = []
    for relu in (nn.ReLU(), nn.ReLU(inplace=True)):
        model = nn.Sequential(layer, relu)
        with go.override(model, {nn.Linear: rules.lrp_epsilon(), nn.ReLU: rules.lrp_identity}):
            found.append(relevance_of(model, x, r))
    exactly(*found)
