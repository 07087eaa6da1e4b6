"""Presets: guided backpropagation on every ReLU there is, LRP composites. Contract, section 5."""

import operator

import pytest
import torch
import torch.nn.functional as F
from oracles import closely, exactly, float64, noise
from torch import nn

import gradoverride as go
from gradoverride import rules
from overrides.models import RuleByHand, gradient


class Net(nn.Module):
    """`relu` is how it calls its ReLUs."""

    def __init__(self, relu):
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)
        self.act, self.other, self.inplace = nn.ReLU(), nn.ReLU(), nn.ReLU(inplace=True)
        self.relu = relu

    def forward(self, x):
        return self.relu(self, x)


NETS = {
    "plain": lambda net, x, relu: net.second(relu(net.act, net.first(x))),
    "in place": lambda net, x, relu: net.second(relu(net.inplace, net.first(x))),
    "shared": lambda net, x, relu: net.second(relu(net.act, relu(net.act, net.first(x)) - 0.3)),
    "shared in parallel": lambda net, x, relu: net.second(
        relu(net.act, net.first(x)) * relu(net.act, -net.first(x) + 1)
    ),
    "h + relu(h)": lambda net, x, relu: (lambda h: net.second(h + relu(net.act, h)))(net.first(x)),
    "h + relu(h) in place": lambda net, x, relu: (lambda h: net.second(h * 1 + relu(net.inplace, h)))(net.first(x)),
    "F.relu": lambda net, x, relu: net.second(relu(F.relu, net.first(x))),
    "torch.relu": lambda net, x, relu: net.second(relu(torch.relu, net.first(x))),
    "x.relu()": lambda net, x, relu: net.second(relu(torch.Tensor.relu, net.first(x))),
    "relu_": lambda net, x, relu: net.second(relu(torch.relu_, net.first(x))),
    "of all kinds": lambda net, x, relu: net.second(
        relu(net.act, net.first(x)) + relu(F.relu, -net.first(x)) - relu(torch.relu_, net.first(x) * 2)
    ),
}


def net(name):
    torch.manual_seed(2)
    return Net(lambda net, x: NETS[name](net, x, lambda relu, h: relu(h))).double()


def with_hand_made_relus(name):
    torch.manual_seed(2)
    return Net(lambda net, x: NETS[name](net, x, lambda relu, h: RuleByHand.apply(h))).double()


@pytest.mark.parametrize("name", NETS)
class TestGuidedBackprop:
    def test_is_that_of_hand_made_relus(self, name):
        x, model = noise(5, 3), net(name)
        plain = gradient(model, x)
        with go.override(model, go.presets.guided_backprop):
            closely(gradient(model, x), gradient(with_hand_made_relus(name), x))
        exactly(gradient(model, x), plain)

    def test_by_its_name(self, name):
        x, model = noise(5, 3), net(name)
        with go.override(model, "guided_backprop"):
            closely(gradient(model, x), gradient(with_hand_made_relus(name), x))

    def test_everywhere(self, name):
        x, model = noise(5, 3), net(name)
        with go.override("guided_backprop"):
            closely(gradient(model, x), gradient(with_hand_made_relus(name), x))

    @pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo's own doing
    def test_compiled(self, name):
        torch.compiler.reset()
        x, model = noise(5, 3), net(name)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        with go.override(model, "guided_backprop"):
            closely(gradient(compiled, x), gradient(with_hand_made_relus(name), x))

    def test_two_forwards_before_the_first_backward(self, name):
        model, hand_made = net(name), with_hand_made_relus(name)
        inputs = [noise(5, 3), noise(5, 3)]
        with go.override(model, go.presets.guided_backprop):
            results = [model(x) for x in inputs]
        for x, result in zip(inputs, results, strict=True):
            closely(torch.autograd.grad(result.sum(), x), torch.autograd.grad(hand_made(x).sum(), x))


def test_deconvnet_passes_positive_gradients_alone():
    model, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1)).double(), noise(1, 3)
    expected = (model[2].weight.clamp(min=0) @ model[0].weight).detach()
    with go.override(model, go.presets.deconvnet):
        closely(gradient(model, x, weights=torch.ones(1, 1, dtype=torch.float64)), expected)


def convolutional():
    torch.manual_seed(4)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Conv2d(3, 2, 2), nn.ReLU(inplace=True), nn.AvgPool2d(2), nn.Flatten(),
        nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 3),
    ).double()  # fmt: skip


COMPOSITES = {
    "epsilon_plus": (go.presets.epsilon_plus, rules.lrp_z_plus, rules.lrp_z_plus),
    "epsilon_alpha2_beta1": (go.presets.epsilon_alpha2_beta1, rules.lrp_alpha_beta(), rules.lrp_alpha_beta()),
    "epsilon_gamma_box": (go.presets.epsilon_gamma_box("0", 0.0, 1.0), rules.lrp_z_box(0.0, 1.0), rules.lrp_gamma()),
}


@pytest.mark.parametrize("name", COMPOSITES)
def test_composite_is_its_rules_layer_by_layer(name):
    composite, first, others = COMPOSITES[name]
    model, x = convolutional(), torch.rand(2, 1, 7, 7, dtype=torch.float64)
    r = torch.eye(3, dtype=torch.float64)[:2]
    with go.override(model, composite):
        leaf = x.clone().requires_grad_()
        (found,) = torch.autograd.grad(model(leaf), leaf, r)
    inputs = [x]
    for layer in convolutional():
        inputs.append(layer(inputs[-1].clone()).detach())
    for index in reversed(range(len(model))):
        layer, leaf = convolutional()[index], inputs[index].clone().requires_grad_()
        if isinstance(layer, nn.ReLU):
            continue
        rule = first if index == 0 else others if isinstance(layer, nn.Conv2d) else rules.lrp_epsilon()
        if not isinstance(layer, nn.Flatten):
            layer = alone(layer, rule)
        (r,) = torch.autograd.grad(layer(leaf), leaf, r)
    closely(found, r)


def alone(layer, rule):
    go.override(layer, {layer: rule})
    return layer


class Residual(nn.Module):
    """`join` is how it adds the two branches, `average` how it takes the mean over places."""

    def __init__(self, join, average):
        super().__init__()
        torch.manual_seed(1)
        self.first, self.second = [nn.Conv2d(i, 3, 3, padding=1, bias=False) for i in (2, 3)]
        self.head = nn.Linear(3, 2, bias=False)
        self.join, self.average = join, average
        self.double()

    def forward(self, x):
        before = self.first(x).relu()
        return self.head(self.average(self.join(self.second(before), before).relu()))


def of_residual_by_hand(model, x, r):
    """LRP from the result to the input: epsilon for all but the convolutions, z-plus for those."""

    def divided(contributions, total):
        return contributions / (total + torch.where(total < 0, -1e-6, 1e-6))

    def z_plus(layer, x, r):
        w = layer.weight
        with torch.enable_grad():  # as `conv2d` of the positive contributions, summed by autograd
            above, below = x.clamp(min=0).requires_grad_(), x.clamp(max=0).requires_grad_()
            z = F.conv2d(above, w.clamp(min=0), padding=1) + F.conv2d(below, w.clamp(max=0), padding=1)
            parts = torch.autograd.grad(z, [above, below], r / z)
        return (above * parts[0] + below * parts[1]).detach()

    with torch.no_grad():
        before = model.first(x).relu()
        branch = model.second(before)
        after = (branch + before).relu()
        average = model.average(after)
        r = average * (divided(r, model.head(average)) @ model.head.weight)
        r = after * divided(r, after.sum((2, 3)))[..., None, None]
        of_branch, of_before = [divided(part * r, branch + before) for part in (branch, before)]
        return z_plus(model.first, x, of_before + z_plus(model.second, before, of_branch))


JOINS = {
    "x + f(x)": lambda f, x: x + f,
    "y += x": operator.iadd,
    "torch.add": torch.add,
    "sum": lambda f, x: sum([f, x]),
}
AVERAGES = {
    "mean": lambda x: x.mean((2, 3)),
    "sum": lambda x: x.sum((2, 3)),
    "adaptive": lambda x: F.adaptive_avg_pool2d(x, 1).flatten(1),
    "pool": lambda x: F.avg_pool2d(x, 4).flatten(1),
}


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo's own doing
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize(
    ("join", "average"), [*[(join, "mean") for join in JOINS], *[("x + f(x)", average) for average in AVERAGES]]
)
def test_composite_divides_relevance_between_the_branches_of_a_sum_and_over_an_average(join, average, compiled):
    torch.compiler.reset()
    model, x = Residual(JOINS[join], AVERAGES[average]), noise(2, 2, 4, 4)
    called = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    with go.override(model, go.presets.epsilon_plus):
        y = called(x)
    r = y.detach()
    (found,) = torch.autograd.grad(y, x, r)
    torch.testing.assert_close(found, of_residual_by_hand(model, x, r), rtol=1e-4, atol=1e-6)  # epsilon has its share
    torch.testing.assert_close(found.sum((1, 2, 3)), r.sum(1), rtol=1e-3, atol=1e-4)


BY_ELEMENTS = {  # of x = (1, 3) and y = (4): a function, and the relevance of both where that of each result is 1
    "x + 2": (lambda x, y: x + 2.0, [1 / 3, 3 / 5], None),  # a constant keeps its share
    "2 + x": (lambda x, y: 2.0 + x, [1 / 3, 3 / 5], None),
    "x + constant": (lambda x, y: x + y.detach(), [1 / 5, 3 / 7], None),
    "x + y": (lambda x, y: x + y, [1 / 5, 3 / 7], [4 / 5 + 4 / 7]),
    "y + 2 x": (lambda x, y: torch.add(y, x, alpha=2), [2 / 6, 6 / 10], [4 / 6 + 4 / 10]),
    "x - 2 y": (lambda x, y: x.add(other=y, alpha=-2), [-1 / 7, -3 / 5], [8 / 7 + 8 / 5]),
    "x - y": (lambda x, y: x - y, [-1 / 3, -3.0], [4 / 3 + 4.0]),
    "x -= y": (lambda x, y: operator.isub(x.clone(), y), [-1 / 3, -3.0], [4 / 3 + 4.0]),
    "2 - x": (lambda x, y: 2.0 - x, [-1.0, 3.0], None),
    "2 x": (lambda x, y: 2.0 * x, [1.0, 1.0], None),
    "x *= 2": (lambda x, y: operator.imul(x.clone(), 2), [1.0, 1.0], None),
    "x / constant": (lambda x, y: x / y.detach(), [1.0, 1.0], None),
    "3 copies of 2 y": (lambda x, y: y * torch.full((3, 1), 2.0), None, [3.0]),
    "-x": (lambda x, y: -x, [1.0, 1.0], None),
    "a gate": (lambda x, y: x * y, [4.0, 4.0], [1.0 + 3.0]),  # which has its gradient
}


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo's own doing
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", BY_ELEMENTS)
def test_composite_divides_relevance_in_proportion_to_what_is_added_and_passes_on_what_is_scaled(name, compiled):
    torch.compiler.reset()
    function, *expected = BY_ELEMENTS[name]
    x, y = float64(1.0, 3.0), float64(4.0)
    model = Calls(function, y)
    called = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    with go.override(model, go.presets.epsilon_plus):
        result = called(x)
    found = torch.autograd.grad(result, [x, y], torch.ones_like(result), allow_unused=True)
    for relevance, numbers in zip(found, expected, strict=True):
        assert relevance is None if numbers is None else relevance.tolist() == pytest.approx(numbers, rel=1e-5)


def test_composite_needs_no_convolution():
    model, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double(), noise(2, 3)
    with go.override(model, go.presets.epsilon_plus):
        assert gradient(model, x).isfinite().all()


NORMALISATIONS = {
    "BatchNorm1d": lambda: nn.BatchNorm1d(4).eval(),
    "LayerNorm": lambda: nn.LayerNorm(4),
    "GroupNorm": lambda: nn.GroupNorm(2, 4),
    "RMSNorm": lambda: nn.RMSNorm(4),
}


@pytest.mark.parametrize("name", NORMALISATIONS)
def test_composite_refuses_a_normalisation_until_it_has_a_rule(name):
    layer = NORMALISATIONS[name]()
    model, x = nn.Sequential(nn.Linear(3, 4), layer, nn.ReLU(), nn.Linear(4, 2)).double(), noise(2, 3)
    with (
        go.override(model, go.presets.epsilon_plus),
        pytest.raises(go.UnsupportedError, match=r"must be merged into .* or have a rule.*\| {torch.nn.BatchNorm2d:"),
    ):
        gradient(model, x)
    with go.override(model, go.presets.epsilon_plus | {type(layer): rules.lrp_identity}):
        assert gradient(model, x).isfinite().all()


# Of torch, but for those with several inputs for a result.
SEVERAL = {"GLU", "LogSoftmax", "MultiheadAttention", "Softmax", "Softmax2d", "Softmin"}
MADE_WITH = {"RReLU": (0.2, 0.2), "Threshold": (0.1, -1.0)}
FUNCTIONS = {"LogSigmoid": "logsigmoid", "LeakyReLU": "leaky_relu"}


def activations():
    """Modules, and what a model calls instead of each."""
    for name in sorted({*nn.modules.activation.__all__} - SEVERAL):
        yield name, getattr(nn, name)(*MADE_WITH.get(name, ())).double()
        function = getattr(F, FUNCTIONS.get(name, name.lower()))
        given = {"PReLU": (torch.full((1,), 0.25, dtype=torch.float64),), "RReLU": (0.2, 0.2)}.get(name)
        yield f"F.{name}", Calls(function, *(given or MADE_WITH.get(name, ())))


class Calls(nn.Module):
    def __init__(self, function, *given):
        super().__init__()
        self.function, self.given = function, given

    def forward(self, x):
        return self.function(x, *self.given)


ACTIVATIONS = dict(activations())


@pytest.mark.filterwarnings("ignore:.*never ran")  # that for the others, where F.prelu is the only one
@pytest.mark.parametrize("name", ACTIVATIONS)
class TestEveryActivation:
    def test_has_the_rescale_rule_of_deeplift(self, name):
        act, both = ACTIVATIONS[name], noise(6, 5)
        with torch.no_grad():
            expected = (act(both[:3]) - act(both[3:])) / (both[:3] - both[3:])
        model, r = nn.Sequential(act), noise(3, 5, grad=False)
        with go.override(model, "deeplift"):
            (found,) = torch.autograd.grad(model(both), both, torch.cat([r, r]))
        closely(found, torch.cat([r * expected, r * expected]))

    def test_passes_relevance_on_in_a_composite(self, name):
        model, x, r = nn.Sequential(ACTIVATIONS[name]), noise(3, 5), noise(3, 5, grad=False)
        with go.override(model, "epsilon_plus"):
            (found,) = torch.autograd.grad(model(x), x, r)
        exactly(found, r)

    def test_passes_relevance_on_in_attn_lrp(self, name):
        act, x, r = ACTIVATIONS[name], noise(3, 5), noise(3, 5, grad=False)
        model = nn.Sequential(act).requires_grad_(False)
        expected = r * act(x).detach() / x.detach()
        with go.override(model, "attn_lrp"):
            (found,) = torch.autograd.grad(model(x), x, r)
        closely(found, expected)


@pytest.mark.filterwarnings("ignore:.*never ran")
def test_the_slope_of_a_function_prelu_keeps_its_gradient_under_deeplift():
    x, slope = noise(4, 3), float64(0.3)
    model = Calls(F.prelu, slope)
    (expected,) = torch.autograd.grad(F.prelu(x, slope).sum(), slope)
    with go.override(model, "deeplift"):
        closely(torch.autograd.grad(model(x).sum(), slope)[0], expected)
