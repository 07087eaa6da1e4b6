"""One-hot samples against torch's Gumbel-softmax with the same noise, the paper's algorithm, and exact expectations."""

import functools
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from oracles import closely, exactly, noise

import gradoverride as go
from gradoverride import rules
from gradoverride.rules import categorical

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*should not be instantiated:DeprecationWarning",  # Dynamo's own doing, for any Function
)

BOTH = [rules.gumbel_softmax, rules.reinmax]
both = pytest.mark.parametrize("function", BOTH)
DRAWS = 40_000


def seeded(seed=7):
    return torch.Generator().manual_seed(seed)


def worth_of_each(f):
    """What `f` says of each of the four samples."""
    return torch.stack([f(sample) for sample in torch.eye(4, dtype=torch.float64)])


# --- the sample ---


@both
class TestSample:
    def test_is_one_hot_to_the_last_bit(self, function):
        sample = function(noise(1000, 5, dtype=torch.float32), tau=0.1)
        exactly(sample.detach().sort(-1).values, torch.eye(5)[4].expand(1000, 5))

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
    def test_is_distributed_as_the_softmax(self, function, dtype):
        logits = torch.tensor([0.0, 1.0, -2.0, -math.inf, 0.5], dtype=dtype)
        sample = function(logits.expand(DRAWS, 5), generator=seeded())
        assert sample.dtype == dtype
        expected = logits.double().softmax(0)
        deviation = (expected * (1 - expected) / DRAWS).sqrt()
        assert ((sample.double().mean(0) - expected).abs() <= 5 * deviation).all()

    def test_has_no_favourites_in_half_precision(self, function):
        sample = function(torch.zeros(DRAWS, 64, dtype=torch.bfloat16), generator=seeded())
        found, expected = sample.double().mean(0), 1 / 64
        assert ((found - expected).abs() < 5 * math.sqrt(expected / DRAWS)).all()

    @pytest.mark.parametrize("dim", [0, 1, 2, -3])
    def test_lies_along_a_dimension(self, function, dim):
        logits, g = noise(3, 4, 5), noise(3, 4, 5, grad=False)
        sample = function(logits, 0.7, dim, seeded())
        exactly(sample.detach().sum(dim), torch.ones_like(sample.sum(dim)))
        (grad,) = torch.autograd.grad(sample, logits, g)
        closely(grad.sum(dim), torch.zeros_like(grad.sum(dim)))  # a softmax is the same if all logits grow alike

    def test_a_generator_alone_decides(self, function):
        logits, state = noise(50, 5), torch.get_rng_state()
        one, two = function(logits, generator=seeded()), function(logits, generator=seeded())
        exactly(one, two)
        exactly(torch.get_rng_state(), state)
        assert not torch.equal(one, function(logits, generator=seeded(8)))
        assert not torch.equal(function(logits), function(logits))

    def test_under_vmap_the_randomness_is_that_of_vmap(self, function):
        logits = noise(1, 50, 5, grad=False).expand(2, 50, 5)
        for generator in (None, seeded()):
            sample = functools.partial(function, generator=generator)
            one, two = torch.vmap(sample, randomness="different")(logits)
            assert not torch.equal(one, two)
            one, two = torch.vmap(sample, randomness="same")(logits)
            exactly(one, two)
        with pytest.raises(RuntimeError, match="randomness"):
            torch.vmap(function)(logits)

    def test_without_a_gradient_it_is_the_same(self, function):
        logits = noise(50, 5)
        with torch.no_grad():
            found = function(logits, generator=seeded())
        exactly(found, function(logits, generator=seeded()).detach())

    def test_pickles_by_name(self, function):
        assert pickle.loads(pickle.dumps(function)) is function


# --- its gradient ---


class TestGumbelSoftmax:
    @pytest.mark.parametrize("tau", [1.0, 0.3, 2])
    @pytest.mark.parametrize("dim", [-1, 0])
    def test_is_that_of_torch_with_the_same_noise(self, tau, dim):
        logits, g = noise(6, 5), noise(6, 5, grad=False)
        torch.manual_seed(3)
        expected = F.gumbel_softmax(logits, tau, hard=True, dim=dim)
        torch.manual_seed(3)
        found = rules.gumbel_softmax(logits, tau, dim)
        exactly(found.detach(), expected.detach().round())
        closely(torch.autograd.grad(found, logits, g), torch.autograd.grad(expected, logits, g))

    def test_a_temperature_can_be_learnt(self):
        logits, g = noise(6, 5), noise(6, 5, grad=False)
        tau = torch.tensor(0.6, dtype=torch.float64, requires_grad=True)
        torch.manual_seed(3)
        soft = ((logits - torch.empty_like(logits).exponential_().log()) / tau).softmax(-1)
        torch.manual_seed(3)
        found = rules.gumbel_softmax(logits, tau)
        closely(torch.autograd.grad(found, (logits, tau), g), torch.autograd.grad(soft, (logits, tau), g))

    def test_second_derivatives_are_those_of_the_softmax(self):
        logits = noise(4)

        def second(sample):
            (first,) = torch.autograd.grad((sample * torch.arange(4)).sum(), logits, create_graph=True)
            return torch.autograd.grad(first.square().sum(), logits)[0]

        torch.manual_seed(3)
        found = second(rules.gumbel_softmax(logits))
        torch.manual_seed(3)
        closely(found, second(F.gumbel_softmax(logits, hard=True)))


def algorithm_2(logits, sample, tau):
    """Liu et al. (2023), as the paper writes it, for the sample that was drawn."""
    p = logits.softmax(-1)
    mean = (sample + (logits / tau).softmax(-1)) / 2
    mean = ((mean.log() - logits).detach() + logits).softmax(-1)
    second = 2 * mean - p / 2
    return second - second.detach() + sample


def exact_and_estimated(worth, rule):
    """The gradient of the mean of `worth` over all samples; and the mean of what `rule` says for each sample."""
    logits = noise(4)
    p = logits.softmax(0)
    (exact,) = torch.autograd.grad((p * worth_of_each(worth)).sum(), logits)
    estimated = torch.zeros_like(exact)
    for probability, sample in zip(p.tolist(), torch.eye(4, dtype=torch.float64), strict=True):
        g = torch.func.grad(worth)(sample)
        estimated += probability * rule(g, logits.detach(), sample)
    return exact, estimated


def reinmax_rule(g, logits, sample):
    return categorical._reinmax_backward(g, logits, sample, 1.0, 0)[0]


def straight_through_rule(g, logits, sample):
    return categorical._softmax_backward(g, logits, 0)


A = torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
B = torch.randn(4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
WORTH = {
    1: lambda d: (B * d).sum(),
    2: lambda d: d @ A @ d + (B * d).sum(),
    3: lambda d: (B * d).sum() ** 3 + (B * d.square()).sum(),
}


class TestReinmax:
    @pytest.mark.parametrize("tau", [1.0, 1.3, 2])
    def test_is_the_algorithm_of_the_paper(self, tau):
        logits, g = noise(6, 5), noise(6, 5, grad=False)
        found = rules.reinmax(logits, tau)
        expected = algorithm_2(logits, found.detach(), tau)
        closely(torch.autograd.grad(found, logits, g), torch.autograd.grad(expected, logits, g))

    @pytest.mark.parametrize(
        ("rule", "order"), [(straight_through_rule, 1), (reinmax_rule, 2)], ids=["straight-through", "reinmax"]
    )
    def test_is_right_in_the_mean_to_its_order_and_no_further(self, rule, order):
        for degree in range(1, order + 1):
            closely(*reversed(exact_and_estimated(WORTH[degree], rule)))
        exact, estimated = exact_and_estimated(WORTH[order + 1], rule)
        assert (estimated - exact).norm() > 0.05 * exact.norm()

    def test_the_mean_of_its_samples_is_right_where_the_worth_is_quadratic(self):
        logits = torch.tensor([0.3, -0.5, 1.0, 0.0], dtype=torch.float64, requires_grad=True)
        (exact,) = torch.autograd.grad((logits.softmax(0) * worth_of_each(WORTH[2])).sum(), logits)
        each = logits.detach().expand(DRAWS, 4).clone().requires_grad_()
        torch.vmap(WORTH[2])(rules.reinmax(each, generator=seeded())).sum().backward()
        deviation = each.grad.std(0) / math.sqrt(DRAWS)
        assert ((each.grad.mean(0) - exact).abs() < 5 * deviation).all()
        assert ((each.grad.mean(0) - 1.1 * exact).abs() > 5 * deviation).any()  # so the bound tells

    def test_second_derivatives_are_those_by_finite_differences(self):
        sample = torch.eye(4, dtype=torch.float64)[2]
        assert torch.autograd.gradcheck(lambda g, logits: reinmax_rule(g, logits, sample), (noise(4), noise(4)))


@both
class TestEachGradient:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
    def test_keeps_the_dtype(self, function, dtype):
        logits = torch.tensor([[0.0, 1.0, -math.inf], [3.0, 0.0, 300.0]], dtype=dtype, requires_grad=True)
        (grad,) = torch.autograd.grad(function(logits, 0.5)[:, 1].sum(), logits)
        assert grad.dtype == dtype
        assert grad.isfinite().all()

    def test_under_grad_and_vmap(self, function):
        logits, g = noise(2, 3, 5, grad=False), noise(3, 5, grad=False)

        def gradient(x):
            return torch.func.grad(lambda x: (function(x, generator=seeded()) * g).sum())(x)

        one_by_one = []
        for part in logits.unbind():
            x = part.clone().requires_grad_()
            one_by_one += torch.autograd.grad(function(x, generator=seeded()), x, g)
        closely(gradient(logits[0]), one_by_one[0])
        found = torch.vmap(gradient, randomness="same")(logits)
        closely(found, torch.stack(one_by_one))

    def test_compiled_it_is_that_of_eager(self, function):
        torch.compiler.reset()
        logits, g = noise(6, 5), noise(6, 5, grad=False)
        compiled = torch.compile(lambda x: function(x, 0.7), fullgraph=True, backend="aot_eager")
        results = []
        for run in (compiled, lambda x: function(x, 0.7)):
            torch.manual_seed(3)
            y = run(logits)
            results.append((y.detach(), *torch.autograd.grad(y, logits, g)))
        closely(*results)

    def test_compiled_with_a_generator_each_call_has_its_own_noise(self, function):
        torch.compiler.reset()
        logits = noise(50, 5, grad=False)

        def run(x, generator):
            return function(x, generator=generator), function(x, generator=generator)

        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
        for seed in (1, 2):  # another generator is taken where another is given
            exactly(compiled(logits, seeded(seed)), run(logits, seeded(seed)))
        generator = seeded()
        one, two = compiled(logits, generator)
        three, _ = compiled(logits, generator)
        assert not torch.equal(one, two)
        assert not torch.equal(one, three)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (
            lambda x: rules.gumbel_softmax(x, 0),
            "gumbel_softmax: 'tau' must be a tensor or a number larger than 0; got 0",
        ),
        (lambda x: rules.reinmax(x, -1.0), "reinmax: 'tau' must be a number larger than 0; got -1.0"),
        (
            lambda x: rules.reinmax(x, torch.ones(())),
            "reinmax: 'tau' must be a number larger than 0; got a tensor of shape ()",
        ),
        (
            lambda x: rules.gumbel_softmax(x, dim=2),
            "gumbel_softmax: 'dim' must be a dimension of the logits, which have 2; got 2",
        ),
        (
            lambda x: rules.reinmax(x, dim=(0,)),
            "reinmax: 'dim' must be a dimension of the logits, which have 2; got (0,)",
        ),
        (
            lambda x: rules.reinmax(x, generator=3),
            "reinmax: 'generator' must be None or a torch.Generator; got 3",
        ),
        (
            lambda x: rules.gumbel_softmax(x.long()),
            "gumbel_softmax: 'logits' must be a real floating tensor; got torch.int64",
        ),
        (
            lambda x: rules.reinmax(x.tolist()[0]),
            "reinmax: 'logits' must be a real floating tensor; got [0.0, 0.0, 0.0]",
        ),
    ],
)
def test_options_out_of_range_are_errors(call, text):
    with pytest.raises(go.RuleOptionError) as error:
        call(torch.zeros(2, 3))
    assert str(error.value) == text
