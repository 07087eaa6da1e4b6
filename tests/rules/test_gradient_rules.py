"""Rules of the gradient alone against torch's own clips, autograd of what they are the transpose of, and NumPy."""

import copy
import functools
import math
import pickle
import re
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracles import closely, exactly, float64, noise
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

import gradoverride as go
from gradoverride import rules

NAN, INF = math.nan, math.inf
MASK = torch.tensor([True, False, True])
WEIGHTS = torch.tensor([0.5, 0.0, -2.0], dtype=torch.float64)


@dataclass
class Pair:
    first: object
    second: object


def edited(rule, grad, value=None):
    """What becomes of `grad` in a graph."""
    x = (torch.zeros_like(grad) if value is None else value).requires_grad_()
    return torch.autograd.grad(go.edit_gradient(x, rule), x, grad)[0]


def seeded(make):
    return make(torch.Generator().manual_seed(7))


LINEAR = {
    "reverse": rules.reverse(2.5),
    "reverse 1": rules.reverse(),
    "scale": rules.scale(-0.3),
    "stop": rules.stop,
    "mask of booleans": rules.mask(MASK),
    "mask of numbers": rules.mask(WEIGHTS),
    "centralize": rules.centralize(0),
    "observe": rules.observe(len),
    "check_finite": rules.check_finite("x"),
    "scrub": rules.scrub(),
    "cast wider": rules.cast(torch.float64),
}
NOT_LINEAR = {
    "clip_value": rules.clip_value(0.7),
    "clip_norm": rules.clip_norm(0.5),
    "normalize": rules.normalize(),
    "sign": rules.sign,
    "cast": rules.cast(torch.bfloat16),
    "quantize": rules.quantize(4, stochastic=False),
}
RANDOM = {
    "add_noise": rules.add_noise(0.5),
    "add_noise by a generator": seeded(lambda generator: rules.add_noise(0.5, generator)),
    "quantize at random": rules.quantize(4),
    "quantize by a generator": seeded(lambda generator: rules.quantize(4, generator=generator)),
}
FIXED = {**LINEAR, **NOT_LINEAR}
ALL = {**FIXED, **RANDOM}
every_rule = pytest.mark.parametrize("rule", ALL.values(), ids=ALL)
every_fixed_rule = pytest.mark.parametrize("rule", FIXED.values(), ids=FIXED)


# --- each against another way to the same gradient ---

FORWARDS = {  # the rule is the transpose of these
    "reverse": lambda x: -2.5 * x,
    "reverse 1": lambda x: -x,
    "scale": lambda x: -0.3 * x,
    "stop": lambda x: x.detach() + 0 * x,
    "mask of booleans": lambda x: torch.stack([x[0], 0 * x[1], x[2]]),
    "mask of numbers": lambda x: torch.stack([x[0] / 2, 0 * x[1], -x[2] - x[2]]),
    "centralize": lambda x: x @ (torch.eye(3, dtype=torch.float64) - 1 / 3),
    "observe": lambda x: x,
    "check_finite": lambda x: x,
    "scrub": lambda x: x,
    "cast wider": lambda x: x,
}


@pytest.mark.parametrize("name", LINEAR)
class TestLinearRules:
    def test_is_the_gradient_of_the_function_it_transposes(self, name):
        x, g = noise(3), noise(3, grad=False)
        (expected,) = torch.autograd.grad(FORWARDS[name](x), x, g)
        closely(edited(LINEAR[name], g), expected)

    def test_forward_mode_is_its_transpose(self, name):
        x, tangent = noise(3, grad=False), noise(3, grad=False)
        _, expected = torch.func.jvp(FORWARDS[name], (x,), (tangent,))
        _, found = torch.func.jvp(lambda x: go.edit_gradient(x, LINEAR[name]), (x,), (tangent,))
        closely(found, expected)

    def test_second_derivatives_go_through_it(self, name):
        def gradient(f, x):
            return torch.autograd.grad(f(x).pow(3).sum(), x, create_graph=True)[0]

        x = noise(3)
        found = gradient(lambda x: go.edit_gradient(x, LINEAR[name]), x)
        if name == "stop":
            assert not found.requires_grad
            return
        (second,) = torch.autograd.grad(found.sum(), x)
        # The edited gradient is T(3 x^2), T a symmetric matrix; its own gradient comes to x the same way, through T.
        (plain,) = torch.autograd.grad(FORWARDS[name](3 * x.square()).sum(), x)
        closely(second, FORWARDS[name](plain))


@pytest.mark.parametrize("name", NOT_LINEAR)
def test_forward_mode_refuses_a_rule_that_is_not_linear(name):
    x = torch.ones(3)
    with pytest.raises(go.UnsupportedError, match="must be linear in the gradient for forward mode"):
        torch.func.jvp(lambda x: go.edit_gradient(x, NOT_LINEAR[name]), (x,), (x,))


def test_clip_value_is_that_of_torch():
    g = torch.tensor([-INF, -3.0, -2.0, -0.5, -0.0, 0.0, 1.9, 2.0, 2.1, INF, NAN], dtype=torch.float64)
    leaf = torch.zeros_like(g).requires_grad_()
    leaf.grad = g.clone()
    nn.utils.clip_grad_value_([leaf], 2.0)
    exactly(edited(rules.clip_value(2.0), g), leaf.grad)


def clipped_by_torch(grads, max_norm):
    leaves = [torch.zeros_like(grad).requires_grad_() for grad in grads]
    for leaf, grad in zip(leaves, grads, strict=True):
        leaf.grad = grad.clone()
    nn.utils.clip_grad_norm_(leaves, max_norm)
    return [leaf.grad for leaf in leaves]


def nearly(actual, expected):
    """torch adds 1e-6 to a norm."""
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-9)


class TestNorms:
    @pytest.mark.parametrize("size", [0.1, 1.0, 50.0])
    def test_clip_norm_is_that_of_torch(self, size):
        g = noise(4, 5, grad=False) * size
        nearly(edited(rules.clip_norm(3.0), g), clipped_by_torch([g], 3.0)[0])

    @pytest.mark.parametrize("dim", [0, 1, -1])
    def test_clip_norm_over_a_dimension_is_renorm(self, dim):
        g = noise(4, 5, grad=False) * torch.tensor([0.1, 1.0, 5.0, 20.0], dtype=torch.float64)[:, None]
        expected = torch.renorm(g, p=2, dim=1 - dim % 2, maxnorm=2.0)
        nearly(edited(rules.clip_norm(2.0, dim=dim), g), expected)

    def test_clip_norm_over_several_dimensions(self):
        g = noise(3, 4, 5, grad=False)
        expected = torch.stack([clipped_by_torch([part], 2.0)[0] for part in g])
        nearly(edited(rules.clip_norm(2.0, dim=(1, 2)), g), expected)

    def test_clip_norm_leaves_what_is_short_to_the_last_bit(self):
        g = noise(1000, grad=False, dtype=torch.float32)
        exactly(edited(rules.clip_norm(g.norm().item() * 1.001), g), g)
        exactly(edited(rules.clip_norm(0.3), torch.zeros(3)), torch.zeros(3))

    def test_normalize_is_that_of_torch(self):
        g = noise(4, 5, grad=False)
        closely(edited(rules.normalize(dim=1), g), F.normalize(g, dim=1))
        closely(edited(rules.normalize(), g), F.normalize(g.flatten(), dim=0).view_as(g))

    def test_normalize_is_zero_where_the_gradient_is(self):
        g = torch.tensor([[0.0, 0.0], [0.0, 1e-12]], dtype=torch.float64)
        exactly(edited(rules.normalize(1), g), g.new_tensor([[0, 0], [0, 1]]))
        exactly(edited(rules.normalize(), torch.zeros(2)), torch.zeros(2))

    @pytest.mark.parametrize("rule", [rules.clip_norm(0.5), rules.normalize(), rules.normalize(0)])
    def test_second_derivatives_are_those_by_finite_differences(self, rule):
        assert torch.autograd.gradcheck(rule, noise(3))

    @pytest.mark.parametrize("rule", [rules.clip_norm(0.5), rules.normalize()])
    def test_second_derivatives_at_zero_are_finite(self, rule):
        g = torch.zeros(3, dtype=torch.float64, requires_grad=True)
        (second,) = torch.autograd.grad(rule(g).sum(), g)
        assert second.isfinite().all()

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_a_norm_too_large_for_half_precision(self, dtype):
        g = torch.full((10_000,), 30_000.0, dtype=dtype)
        unit = torch.full((10_000,), 0.01, dtype=dtype)
        exactly(edited(rules.normalize(), g), unit)
        exactly(edited(rules.clip_norm(1.0), g), unit)
        exactly(edited(rules.clip_norm(1.0, dim=0), g), unit)

    def test_a_nan_stays_to_be_seen(self):
        assert edited(rules.clip_norm(1.0), torch.tensor([NAN, 1.0])).isnan().all()
        assert edited(rules.clip_norm(1.0), torch.tensor([INF, 1.0])).isnan().any()

    @pytest.mark.parametrize("size", [0.0, 1e-44, 1e-30, 1e-22, 1e-17, 1e-14, 1.0, 1e15, 1e19, 1e30, 6e37])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
    def test_squares_that_have_no_room_do_no_harm(self, dtype, size):
        g = (torch.tensor([[3.0, 4.0], [4.0, -3.0]], dtype=torch.float64) * size).to(dtype)
        wide = g.to(torch.complex128 if dtype.is_complex else torch.float64)

        def near(found, expected):
            torch.testing.assert_close(
                found, expected.to(dtype), rtol=1e-2 if dtype is torch.bfloat16 else 1e-6, atol=0
            )

        whole, rows = wide.abs().square().sum().sqrt(), wide.abs().square().sum(1, keepdim=True).sqrt()
        near(edited(rules.normalize(), g), wide / whole if whole else wide)
        near(edited(rules.normalize(1), g), wide / rows if whole else wide)
        near(torch.func.vmap(rules.normalize())(g), wide / rows if whole else wide)
        for limit in (1e-3, 1.0, 1e20):
            near(edited(rules.clip_norm(limit), g), wide / (whole / limit).clamp(min=1))
            near(edited(rules.clip_norm(limit, 1), g), wide / (rows / limit).clamp(min=1))
            near(rules.clip_norm(limit)([g[0], (g[1],)])[1][0], wide[1] / (whole / limit).clamp(min=1))
            near(torch.func.vmap(rules.clip_norm(limit))(g), wide / (rows / limit).clamp(min=1))

    def test_squares_have_room_beside_a_wider_dtype(self):
        g = [torch.tensor([3e30, 0.0]), torch.tensor([4e30], dtype=torch.float64), torch.ones(0)]
        one, two, three = rules.clip_norm(1.0)(g)
        closely(one, torch.tensor([0.6, 0.0]))
        torch.testing.assert_close(two, torch.tensor([0.8], dtype=torch.float64), rtol=1e-6, atol=0)
        assert three.shape == (0,)
        directions = rules.normalize()([torch.zeros(2), torch.tensor([1e-200], dtype=torch.float64)])
        exactly(directions, [torch.zeros(2), torch.ones(1, dtype=torch.float64)])

    def test_what_is_long_and_ordinary_stays_to_the_last_bit(self):
        g = noise(1000, grad=False, dtype=torch.float32)
        exactly(edited(rules.clip_norm(0.3), g), g / (torch.linalg.vector_norm(g) / 0.3))

    def test_of_no_values(self):
        for dim in (None, 0, 1):
            assert edited(rules.clip_norm(1.0, dim), torch.ones(0, 3)).shape == (0, 3)
            assert edited(rules.normalize(dim), torch.ones(0, 3)).shape == (0, 3)

    def test_squares_that_have_no_room_do_no_harm_compiled(self):
        def both(g):
            one, (two,) = rules.clip_norm(1.0)((g, [g * 0]))
            return one, two, rules.normalize(0)(g * 1e-35)

        found = torch.compile(both, backend="aot_eager", fullgraph=True)(torch.tensor([3e30, 4e30]))
        closely(found, (torch.tensor([0.6, 0.8]), torch.zeros(2), torch.tensor([0.6, 0.8])))

    def test_of_complex_gradients(self):
        g = torch.tensor([3 + 0j, 4j], dtype=torch.complex128)
        closely(edited(rules.clip_norm(1.0), g), g / 5)
        closely(edited(rules.normalize(), g), g / 5)


def test_sign_is_the_value_by_its_size():
    g = torch.tensor([-INF, -2.0, -1e-300, -0.0, 0.0, 1e-300, 3.0, INF, NAN], dtype=torch.float64)
    exactly(edited(rules.sign, g), g.new_tensor([-1, -1, -1, 0, 0, 1, 1, 1, 0]))
    g = torch.tensor([3 + 4j, 0j], dtype=torch.complex128)
    closely(edited(rules.sign, g), g / 5)


@pytest.mark.parametrize(("shape", "axes"), [((3, 4), (1,)), ((3, 4, 2, 2), (1, 2, 3))])
def test_centralize_leaves_no_mean_by_result(shape, axes):
    g = noise(*shape, grad=False)
    found = edited(rules.centralize(), g)
    array = g.numpy()
    closely(found, torch.from_numpy(array - array.mean(axis=axes, keepdims=True)))


@pytest.mark.parametrize("shape", [(), (4,)])
def test_centralize_leaves_a_gradient_of_one_dimension(shape):
    g = noise(shape, grad=False)
    exactly(edited(rules.centralize(), g), g)


@pytest.mark.parametrize(("dtype", "kind"), [(torch.float16, np.float16), (torch.float32, np.float32)])
def test_cast_rounds_as_numpy_does(dtype, kind):
    g = torch.cat([noise(50, grad=False) * 1000, torch.tensor([0.0, INF, NAN, 1e6, 1e-12], dtype=torch.float64)])
    with np.errstate(over="ignore"):
        expected = g.numpy().astype(kind).astype(np.float64)
    exactly(edited(rules.cast(dtype), g), torch.from_numpy(expected))


def test_cast_gives_the_next_rule_its_dtype():
    seen = []
    rule = rules.chain(rules.cast(torch.float64), rules.observe(seen.append), rules.scale(0.5))
    found = edited(rule, torch.ones(2, dtype=torch.bfloat16))
    assert [g.dtype for g in seen] == [torch.float64]
    exactly(found, torch.full((2,), 0.5, dtype=torch.bfloat16))


class TestQuantize:
    def test_the_nearest_is_that_of_torch(self):
        g = noise(1000, grad=False, dtype=torch.float32)
        step = g.abs().max().item() / 7
        expected = torch.fake_quantize_per_tensor_affine(g, step, 0, -7, 7)
        torch.testing.assert_close(edited(rules.quantize(4, stochastic=False), g), expected, rtol=1e-5, atol=1e-6)

    def test_by_dimension_is_one_by_one(self):
        g = noise(3, 100, grad=False)
        rule = rules.quantize(5, stochastic=False)
        expected = torch.stack([edited(rule, row) for row in g])
        closely(edited(rules.quantize(5, dim=1, stochastic=False), g), expected)

    def test_at_random_the_mean_is_right(self):
        draws = 20_000
        g = torch.tensor([1.0, 0.9, 0.35, 0.0, -0.1, -0.77, -1.0], dtype=torch.float64)
        rows = edited(seeded(lambda generator: rules.quantize(3, 1, generator=generator)), g.expand(draws, -1))
        step = 1 / 3
        assert ((rows / step).round() - rows / step).abs().max() < 1e-9  # integers of steps
        assert ((rows - g).abs() < step).all()  # and the two nearest
        # A draw deviates by half a step at most: five standard deviations of the mean.
        torch.testing.assert_close(rows.mean(0), g, rtol=0, atol=5 * step / 2 / math.sqrt(draws))
        exactly(rows[:, [0, 3, 6]], g[[0, 3, 6]].expand(draws, -1))

    def test_at_random_no_value_exceeds_the_largest(self):
        g = torch.ones(100_000, dtype=torch.float32)
        exactly(edited(rules.quantize(16), g), g)

    @pytest.mark.parametrize("stochastic", [False, True])
    @pytest.mark.parametrize("bits", range(2, 17))
    def test_the_largest_value_stays_to_the_last_bit(self, bits, stochastic):
        g = noise(300, 5, grad=False, dtype=torch.float32)
        found = edited(rules.quantize(bits, 1, stochastic), g)
        largest = g.abs().argmax(1, keepdim=True)
        exactly(found.gather(1, largest), g.gather(1, largest))

    def test_of_zeros_and_of_nothing(self):
        exactly(edited(rules.quantize(8), torch.zeros(3)), torch.zeros(3))
        exactly(edited(rules.quantize(8), torch.zeros(0, 2)), torch.zeros(0, 2))


class TestAddNoise:
    def test_its_mean_and_deviation(self):
        count = 100_000
        g = torch.linspace(-1, 1, count, dtype=torch.float64)
        noise = edited(seeded(lambda generator: rules.add_noise(2.0, generator)), g) - g
        assert abs(noise.mean().item()) < 5 * 2 / math.sqrt(count)
        assert abs(noise.std().item() - 2) < 5 * 2 / math.sqrt(2 * count)
        assert abs(torch.corrcoef(torch.stack([noise, g]))[0, 1].item()) < 5 / math.sqrt(count)

    def test_a_generator_alone_decides(self):
        g, state = torch.zeros(5), torch.get_rng_state()
        one, two = [edited(seeded(lambda generator: rules.add_noise(1.0, generator)), g) for _ in range(2)]
        exactly(one, two)
        exactly(torch.get_rng_state(), state)

    def test_each_backward_and_each_tensor_has_its_own(self):
        rule = rules.add_noise(1.0)
        one, two = rule((torch.zeros(5), torch.zeros(5)))
        assert not torch.equal(one, two)
        assert not torch.equal(edited(rule, torch.zeros(5)), edited(rule, torch.zeros(5)))

    @pytest.mark.parametrize("generator", [None, torch.Generator()])
    def test_under_vmap_the_randomness_is_that_of_vmap(self, generator):
        rule = rules.add_noise(1.0, generator)
        gradient = torch.func.grad(lambda x: go.edit_gradient(x, rule).sum())
        different = torch.vmap(gradient, randomness="different")(torch.zeros(2, 3))
        same = torch.vmap(gradient, randomness="same")(torch.zeros(2, 3))
        assert not torch.equal(different[0], different[1])
        exactly(same[0], same[1])
        with pytest.raises(RuntimeError, match="randomness"):
            torch.vmap(gradient)(torch.zeros(2, 3))


@pytest.mark.parametrize("rule", [rules.clip_norm(0.5), rules.normalize(), rules.clip_norm(0.5, 0)], ids=repr)
def test_norms_are_those_of_each_gradient_of_a_batch(rule):
    x = noise(3)
    grads = torch.tensor([[3.0, 4.0, 0.0], [0.1, 0.0, 0.0]], dtype=torch.float64)
    (found,) = torch.autograd.grad(go.edit_gradient(x, rule), x, grads, is_grads_batched=True)
    closely(found, torch.stack([edited(rule, grad) for grad in grads]))


@pytest.mark.parametrize(
    "make",
    [rules.scrub, rules.check_finite, functools.partial(rules.observe, print)],
    ids=["scrub", "check_finite", "observe"],
)
def test_rules_that_look_at_values_refuse_a_batch_of_gradients(make):
    x, rule = noise(3), make()
    with pytest.raises(go.UnsupportedError, match=f"{type(rule).__name__}: a gradient must have values .*jacrev"):
        torch.autograd.functional.jacobian(lambda x: go.edit_gradient(x, rule), x, vectorize=True)
    assert getattr(rule, "count", 0) == 0


class TestScrub:
    def test_is_nan_to_num_and_counts(self):
        rule = rules.scrub()
        g = torch.tensor([1.0, NAN, -INF, INF, -0.0, 1e308], dtype=torch.float64)
        for times in (1, 2):
            exactly(edited(rule, g), g.nan_to_num(0, 0, 0))
            assert rule.count == 3 * times

    def test_counts_over_a_structure_and_over_dtypes(self):
        rule = rules.scrub()
        found = rule({"a": torch.tensor([NAN, 1.0]), "b": [torch.tensor([INF], dtype=torch.bfloat16), None]})
        exactly(found, {"a": torch.tensor([0.0, 1.0]), "b": [torch.zeros(1, dtype=torch.bfloat16), None]})
        assert rule.count == 2

    def test_counts_under_transforms(self):
        rule = rules.scrub()
        gradient = torch.func.grad(lambda x: go.edit_gradient(x, rule).sqrt().sum())
        found = torch.vmap(gradient)(torch.tensor([[1.0, 0.0, 4.0], [0.0, 0.0, 4.0]]))
        exactly(found, torch.tensor([[0.5, 0.0, 0.25], [0.0, 0.0, 0.25]]))
        assert rule.count == 3
        edited(rule, torch.tensor([NAN]))
        assert rule.count == 4

    def test_a_copy_counts_for_itself(self):
        rule = rules.scrub()
        edited(rule, torch.tensor([NAN]))
        for other in (copy.copy(rule), copy.deepcopy(rule), pickle.loads(pickle.dumps(rule))):
            assert other == rule
            edited(other, torch.tensor([NAN, NAN]))
            assert (rule.count, other.count) == (1, 2)

    def test_of_complex_gradients(self):
        rule = rules.scrub()
        exactly(edited(rule, torch.tensor([complex(1, NAN), 1 + 2j])), torch.tensor([0j, 1 + 2j]))
        assert rule.count == 1


class TestCheckFinite:
    def test_says_what_is_not_finite_and_where(self):
        g = torch.ones(2, 3)
        g[1, 0], g[1, 2] = NAN, INF
        with pytest.raises(
            go.NonFiniteGradientError,
            match=r"check_finite: the gradient of logits must be finite; 2 of its 6 values are not, the first is nan "
            r"at \(1, 0\)\. Look at what uses the value .*, or use scrub to go on with 0 in their place",
        ):
            edited(rules.check_finite("logits"), g)

    def test_without_a_name(self):
        with pytest.raises(go.NonFiniteGradientError, match=r"^check_finite: the gradient must be finite; 1 of its 1"):
            edited(rules.check_finite(), torch.tensor(-INF))

    def test_in_a_structure(self):
        grads = {"a": torch.ones(2), "b": [torch.ones(1), (torch.tensor([0.0, -INF]), None)]}
        with pytest.raises(
            go.NonFiniteGradientError, match=r"the gradient of x\['b'\]\[1\]\[0\] must .* -inf at \(1,\)"
        ):
            rules.check_finite("x")(grads)

    def test_in_an_object(self):
        pair = Pair(torch.ones(1), {"c": torch.tensor([NAN])})
        with pytest.raises(go.NonFiniteGradientError, match=r"the gradient of x\.second\['c'\] must .* nan at \(0,\)"):
            rules.check_finite("x")(pair)

    def test_its_error_is_of_both_families(self):
        assert issubclass(go.NonFiniteGradientError, go.GradOverrideError)
        assert issubclass(go.NonFiniteGradientError, FloatingPointError)

    def test_a_sum_that_overflows_is_no_fault(self):
        g = torch.full((100,), 60_000.0, dtype=torch.float16)
        exactly(edited(rules.check_finite(), g), g)

    def test_under_vmap(self):
        gradient = torch.func.grad(lambda x: go.edit_gradient(x, rules.check_finite("x")).sqrt().sum())
        exactly(torch.vmap(gradient)(torch.ones(2, 3)), torch.full((2, 3), 0.5))
        with pytest.raises(go.NonFiniteGradientError, match=r"inf at \(1, 0\)"):
            torch.vmap(gradient)(torch.tensor([[1.0], [0.0]]))


class TestObserve:
    def test_the_callback_sees_each_gradient_and_it_goes_on(self):
        seen = []
        g = noise(3, grad=False)
        exactly(edited(rules.observe(seen.append), g), g)
        exactly(seen, [g])

    def test_it_sees_the_tensors_of_a_structure_one_by_one(self):
        seen = []
        grads = {"b": torch.ones(2), "a": (torch.zeros(1), None)}
        assert rules.observe(seen.append)(grads).keys() == grads.keys()
        exactly(seen, [torch.ones(2), torch.zeros(1)])

    def test_what_it_keeps_holds_no_graph(self):
        seen = []
        x = noise(3)
        y = go.edit_gradient(x, rules.observe(seen.append)).pow(3).sum()
        torch.autograd.grad(y, x, create_graph=True)
        assert not seen[0].requires_grad

    def test_what_it_returns_is_left_alone(self):
        g = torch.ones(2)
        exactly(edited(rules.observe(lambda g: g * 5), g), g)

    def test_writing_is_an_error(self):
        with pytest.raises(go.RuleResultError, match=r"'observe' .* must not write into the gradient it is given"):
            edited(rules.observe(lambda g: g.mul_(2)), torch.ones(2))


class TestMask:
    def test_false_stops_nan_and_a_zero_does_not(self):
        g = torch.tensor([1.0, NAN])
        exactly(edited(rules.mask(torch.tensor([True, False])), g), torch.tensor([1.0, 0.0]))
        exactly(edited(rules.mask(torch.tensor([1.0, 0.0])), g), g)

    def test_it_broadcasts(self):
        g = noise(4, 3, grad=False)
        for m in (WEIGHTS, WEIGHTS[None], torch.rand(4, 1).double(), torch.tensor(2.0)):
            expected = torch.from_numpy(g.numpy() * m.numpy())
            exactly(edited(rules.mask(m), g), expected)

    @pytest.mark.parametrize(("m", "grad"), [((2,), (3,)), ((2, 3), (3,)), ((3,), (3, 1)), ((3,), ())])
    def test_a_shape_that_does_not_fit_is_an_error(self, m, grad):
        text = f"mask: 'm' must broadcast to the shape of the gradient, {grad}; it has shape {m}. Give it sizes of 1"
        with pytest.raises(go.RuleResultError) as error:
            edited(rules.mask(torch.ones(m)), torch.ones(grad))
        assert text in str(error.value)

    def test_compares_by_value(self):
        assert rules.mask(MASK) == rules.mask(MASK.clone())
        assert hash(rules.mask(MASK)) == hash(rules.mask(MASK.clone()))
        assert rules.mask(MASK) != rules.mask(~MASK)
        assert rules.mask(MASK) != rules.mask(MASK.double())
        assert rules.mask(MASK) != 3


# --- alike in all ---


@every_rule
class TestEachRule:
    @pytest.mark.parametrize("place", ["graph", "backward", "override"])
    def test_keeps_nothing_from_the_forward(self, rule, place):
        forward = functools.partial(go.edit_gradient, rule=rule)
        if place != "graph":
            forward = nn.Tanh() if place == "override" else go.custom_backward(rule)(torch.tanh)
        kept = []
        with go.override(forward, {nn.Tanh: rule}) if place == "override" else nullcontext():
            x = noise(3) * 1
            with saved_tensors_hooks(kept.append, lambda kept: kept):
                y = forward(x)
        assert kept == []
        graph, storages = y.grad_fn, [StorageWeakRef(tensor.untyped_storage()) for tensor in (x, y)]
        del x, y
        assert all([storage.expired() for storage in storages])
        del graph

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
    def test_keeps_dtype_and_shape(self, rule, dtype):
        found = edited(rule, torch.tensor([-2.0, 0.0, 3.0], dtype=dtype))
        assert (found.dtype, found.shape) == (dtype, (3,))
        assert found.isfinite().all()

    def test_writes_into_nothing(self, rule):
        g = noise(3, grad=False)
        before = g.clone()
        edited(rule, g)
        exactly(g, before)

    def test_leaves_the_value_alone(self, rule):
        x = torch.tensor([-0.0, NAN, INF], requires_grad=True)
        y = go.edit_gradient(x, rule)
        assert y.numpy(force=True).tobytes() == x.numpy(force=True).tobytes()

    def test_maps_over_a_structure(self, rule):
        seen = []
        a, b = noise(3), noise(3)
        edit = go.edit_gradient({"a": a, "b": [b, None, "text"]}, lambda g: seen.append(rule(g)) or seen[0])
        (edit["a"].sum() + edit["b"][0].sum()).backward()
        assert edit["b"][1:] == [None, "text"]
        exactly((a.grad, b.grad), (seen[0]["a"].double(), seen[0]["b"][0].double()))

    def test_pickles_copies_compares_and_prints(self, rule):
        name = getattr(rule, "__name__", type(rule).__name__)
        assert name in repr(rule)
        if rule not in (rules.stop, rules.sign) and getattr(rule, "generator", None) is None:
            assert "0x" not in repr(rule)
        for other in (pickle.loads(pickle.dumps(rule)), copy.deepcopy(rule)):
            if getattr(rule, "generator", None) is None:
                assert other == rule
                assert hash(other) == hash(rule)
            else:
                exactly(other(torch.ones(3)), copy.deepcopy(rule)(torch.ones(3)))

    @pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo's own doing
    def test_compiled_it_is_that_of_eager(self, rule):
        torch.compiler.reset()
        x, g = noise(3), noise(3, grad=False)
        again = copy.deepcopy(rule)  # with the state of its generator
        torch.manual_seed(3)
        expected = edited(rule, g)
        compiled = torch.compile(lambda x: go.edit_gradient(x * 1, again), fullgraph=True, backend="aot_eager")
        y = compiled(x)
        torch.manual_seed(3)
        closely(torch.autograd.grad(y, x, g)[0], expected)


@every_fixed_rule
class TestEachFixedRule:
    g = noise(3, grad=False)

    def test_in_every_place_it_is_the_same(self, rule):
        expected = edited(rule, self.g)
        x = noise(3)
        forwards = [go.custom_backward(rule)(torch.tanh)]
        model = nn.Tanh()
        with go.override(model, {nn.Tanh: rule}):
            forwards.append(functools.partial(lambda y, _: y, model(x)))
        registry = go.Registry("edits")
        registry.register(torch.tanh)(rule)
        with go.override(registry):
            forwards.append(functools.partial(lambda y, _: y, torch.tanh(x)))
        for forward in forwards:
            exactly(torch.autograd.grad(forward(x), x, self.g)[0], expected)
        handle = go.edit_gradient_(built := x * 1, rule)
        exactly(torch.autograd.grad(built, x, self.g)[0], expected)
        handle.remove()

    def test_under_grad_and_vmap(self, rule):
        x = noise(2, 3, grad=False)

        def gradient(x):
            return torch.func.grad(lambda x: (go.edit_gradient(x, rule) * self.g).sum())(x)

        exactly(gradient(x[0]), edited(rule, self.g))
        closely(torch.vmap(gradient)(x), torch.stack([edited(rule, self.g)] * 2))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo's own doing
class TestCompiled:
    @pytest.fixture(autouse=True)
    def fresh(self):
        torch.compiler.reset()

    def compiled(self, function):
        return torch.compile(function, fullgraph=True, backend="aot_eager")

    def test_scrub_counts(self):
        rule = rules.scrub()
        run = self.compiled(lambda x: go.edit_gradient(x * 1, rule).sqrt().sum())
        for times in (1, 2):
            x = torch.tensor([0.0, 4.0], requires_grad=True)
            run(x).backward()
            exactly(x.grad, torch.tensor([0.0, 0.25]))
            assert rule.count == times

    def test_check_finite_raises(self):
        run = self.compiled(lambda x: go.edit_gradient(x * 1, rules.check_finite("x")).sqrt().sum())
        x = torch.tensor([4.0, 0.0], requires_grad=True)
        with pytest.raises(go.NonFiniteGradientError, match=r"the gradient of x must be finite; .* inf at \(1,\)"):
            run(x).backward()

    def test_observe_sees_the_values_at_each_place_it_stands(self):
        seen = []
        rule = rules.observe(seen.append)
        run = self.compiled(lambda x: (go.edit_gradient(x * 2, rule) + go.edit_gradient(x * 3, rule)).sum())
        x = torch.ones(2, requires_grad=True)
        run(x).backward()
        exactly(seen, [torch.ones(2), torch.ones(2)])
        exactly(x.grad, torch.full((2,), 5.0))

    def test_a_strength_that_grows_is_not_compiled_each_time(self):
        run = self.compiled(lambda x, strength: go.edit_gradient(x * 1, rules.reverse(strength)).sum())
        for step in range(20):  # more than Dynamo's limit
            x = torch.ones(2, requires_grad=True)
            run(x, step / 7).backward()
            closely(x.grad, torch.full((2,), -step / 7))

    def test_a_mask_that_is_computed_within(self):
        run = self.compiled(lambda x: go.edit_gradient(x * 1, rules.mask(x > 0)).sum())
        x = torch.tensor([1.0, -1.0], requires_grad=True)
        run(x).backward()
        exactly(x.grad, torch.tensor([1.0, 0.0]))

    def test_over_a_structure(self):
        def run(x):
            pair = go.edit_gradient({"a": x * 1, "b": [x * 2]}, rules.clip_norm(1.0))
            return pair["a"].sum() + pair["b"][0].sum()

        grads = []
        for function in (run, self.compiled(run)):
            x = noise(3)
            function(x).backward()
            grads.append(x.grad)
        closely(*grads)

    @pytest.mark.parametrize(
        ("make", "name"),
        [
            (lambda: rules.scrub(), "scrub"),
            (lambda: rules.add_noise(1.0, torch.default_generator), "add_noise"),
            (lambda: rules.quantize(4, generator=torch.default_generator), "quantize"),
            (lambda: rules.observe(repr), "observe"),
        ],
        ids=["scrub", "add_noise", "quantize", "observe"],
    )
    def test_what_has_a_state_is_made_outside(self, make, name):
        run = self.compiled(lambda x: go.edit_gradient(x * 1, make()).sum())
        with pytest.raises(go.UnsupportedError, match=f"{name}: it must be made outside of the code that is compiled"):
            run(torch.ones(2, requires_grad=True)).backward()


@pytest.mark.parametrize("rule", [rules.scale(2.0), rules.stop, rules.clip_norm(1.0), rules.check_finite("x")])
def test_what_holds_no_tensor_is_an_error(rule):
    text = (
        r"a rule of gradoverride.rules must be given a tensor as the gradient, or a structure of them; it was given a "
        r"ndarray\. Turn arrays into tensors before it \(torch.from_numpy\)"
    )
    with pytest.raises(go.RuleResultError, match=text):
        rule(torch.ones(2).numpy())
    assert rule((None, None)) == (None, None)


def test_a_structure_is_clipped_together_as_torch_does():
    grads = [noise(3, grad=False), noise(2, 2, grad=False), noise(1, grad=False)]
    leaves = [torch.zeros_like(grad).requires_grad_() for grad in grads]
    a, (b, c) = go.edit_gradient((leaves[0], [leaves[1], leaves[2]]), rules.clip_norm(0.5))
    torch.autograd.backward([a, b, c], grads)
    nearly([leaf.grad for leaf in leaves], clipped_by_torch(grads, 0.5))
    directions = rules.normalize()(grads)
    closely(
        torch.cat([part.flatten() for part in directions]), F.normalize(torch.cat([g.flatten() for g in grads]), dim=0)
    )


def test_a_structure_of_several_dtypes_is_clipped_together():
    found = rules.clip_norm(1.0)((float64(3.0, grad=False), torch.tensor([4.0], dtype=torch.float16), None, "text"))
    closely(found[0], float64(0.6, grad=False))
    exactly(found[1], torch.tensor([0.8], dtype=torch.float16))
    assert found[2:] == (None, "text")


def test_with_a_dimension_each_tensor_of_a_structure_is_by_itself():
    one, two = noise(2, 3, grad=False), noise(4, 3, grad=False)
    found = rules.clip_norm(0.5, dim=1)([one, two])
    closely(found, [rules.clip_norm(0.5, dim=1)(one), rules.clip_norm(0.5, dim=1)(two)])


def test_a_complex_gradient_in_a_real_dtype_is_an_error():
    with pytest.raises(
        go.UnsupportedError, match=r"cast: a gradient of torch.complex64 must have a complex 'dtype', or"
    ):
        edited(rules.cast(torch.float32), torch.ones(2, dtype=torch.complex64))


NUMBER = "a number larger than 0"


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: rules.reverse(-1.0), "reverse: 'strength' must be a number that is not negative; got -1.0"),
        (lambda: rules.reverse(NAN), "reverse: 'strength' must be a number that is not negative; got nan"),
        (lambda: rules.reverse(True), "reverse: 'strength' must be a number that is not negative; got True"),
        (lambda: rules.reverse("1"), "reverse: 'strength' must be a number that is not negative; got '1'"),
        (lambda: rules.scale(INF), "scale: 'factor' must be a finite number; got inf"),
        (lambda: rules.scale(1j), "scale: 'factor' must be a finite number; got 1j"),
        (lambda: rules.mask([1, 0]), "mask: 'm' must be a real tensor; got [1, 0]"),
        (
            lambda: rules.mask(torch.ones(2, dtype=torch.complex64)),
            "mask: 'm' must be a real tensor; got torch.complex64",
        ),
        (lambda: rules.clip_value(0.0), f"clip_value: 'limit' must be {NUMBER}; got 0.0"),
        (lambda: rules.clip_value(-1), f"clip_value: 'limit' must be {NUMBER}; got -1"),
        (lambda: rules.clip_norm(0), f"clip_norm: 'max_norm' must be {NUMBER}; got 0"),
        (lambda: rules.clip_norm(NAN), f"clip_norm: 'max_norm' must be {NUMBER}; got nan"),
        (
            lambda: rules.clip_norm(1.0, "0"),
            "clip_norm: 'dim' must be None, an integer or a tuple of integers; got '0'",
        ),
        (lambda: rules.normalize(()), "normalize: 'dim' must be None, an integer or a tuple of integers; got ()"),
        (lambda: rules.normalize(True), "normalize: 'dim' must be None, an integer or a tuple of integers; got True"),
        (lambda: rules.centralize([0]), "centralize: 'dim' must be None, an integer or a tuple of integers; got [0]"),
        (lambda: rules.add_noise(-0.1), "add_noise: 'std' must be a number that is not negative; got -0.1"),
        (lambda: rules.add_noise(1.0, 3), "add_noise: 'generator' must be None or a torch.Generator; got 3"),
        (lambda: rules.cast("float16"), "cast: 'dtype' must be a floating or complex dtype of torch; got 'float16'"),
        (
            lambda: rules.cast(torch.int8),
            "cast: 'dtype' must be a floating or complex dtype of torch; got torch.int8",
        ),
        (lambda: rules.quantize(1), "quantize: 'bits' must be an integer from 2 to 16; got 1"),
        (lambda: rules.quantize(4.0), "quantize: 'bits' must be an integer from 2 to 16; got 4.0"),
        (lambda: rules.quantize(4, stochastic=1), "quantize: 'stochastic' must be True or False; got 1"),
        (lambda: rules.quantize(4, generator=0), "quantize: 'generator' must be None or a torch.Generator; got 0"),
        (lambda: rules.check_finite(3), "check_finite: 'name' must be a string; got 3"),
        (lambda: rules.observe(3), "observe: 'callback' must be a function of one tensor; got 3"),
        (lambda: rules.observe(list), "observe: 'callback' must be a function of one tensor; got the class 'list'"),
        (lambda: rules.observe(nn.ReLU), "observe: 'callback' must be a function of one tensor; got the class 'ReLU'"),
    ],
)
def test_options_out_of_range_are_errors_at_once(make, text):
    with pytest.raises(go.RuleOptionError) as error:
        make()
    assert str(error.value) == text


def test_callback_that_takes_no_tensor_is_an_error_at_once():
    def tick():
        pass

    with pytest.raises(go.RuleOptionError) as error:
        rules.observe(tick)
    text = str(error.value)
    assert text.startswith("observe: 'callback' must be a function of one tensor; got 'tick' (")
    assert text.endswith("), which takes ()")
    for taken in (print, [].append, functools.partial(print, "gradient"), nn.Identity(), torch.isfinite):
        rules.observe(taken)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize(
    ("rule", "name"),
    [
        (rules.clip_norm(1.0, 2), "clip_norm"),
        (rules.normalize((0, 2)), "normalize"),
        (rules.centralize(-3), "centralize"),
        (rules.quantize(4, 2), "quantize"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_dimension_that_the_gradient_does_not_have_is_an_error(rule, name, compiled):
    def edited(x):
        return go.edit_gradient(x, rule).sum()

    torch.compiler.reset()
    x = torch.ones(2, 3, requires_grad=True)
    found = f"{name}: 'dim' must be within the dimensions of the gradient, which has 2; got {rule.dim}"
    with pytest.raises(Exception, match=re.escape(found)) as error:
        (torch.compile(edited, backend="aot_eager") if compiled else edited)(x).backward()
    assert compiled or type(error.value) is go.RuleOptionError
    assert x.grad is None


@pytest.mark.parametrize(
    ("make", "got"),
    [
        (lambda: rules.scale(torch.ones(2)), "a tensor of shape (2,)"),
        (lambda: rules.scale(nn.Linear(2, 2)), "a Linear"),
        (lambda: rules.mask([torch.ones(2)]), "a list of 1 (a tensor of shape (2,))"),
        (
            lambda: rules.normalize((0, 1, 2, 3, 4, 5.0)),
            "a tuple of 6 (0, an int, 1, an int, 2, an int, 3, an int, ...)",
        ),
        (lambda: go.surrogates.atan(nn.Linear(2, 2)), "a Linear"),
        (lambda: rules.fake_quantize(torch.ones(2), nn.Linear(2, 2)), "a Linear"),
        (
            lambda: rules.lrp_z_box(torch.ones(9), torch.zeros(9)),
            "a tuple of 2 (a tuple of 9 (1.0, a float, 1.0, a float, 1.0, a float, 1.0, a float, ...), "
            "a tuple of 9 (0.0, a float, 0.0, a float, 0.0, a float, 0.0, a float, ...))",
        ),
    ],
)
def test_an_option_that_does_not_fit_is_named_in_few_words(make, got):
    with pytest.raises(go.RuleOptionError) as error:
        make()
    assert str(error.value).endswith(f"; got {got}")


def test_an_observed_module_is_called_by_its_class():
    assert repr(rules.observe(nn.Linear(2, 2))) == "observe(Linear)"
    assert repr(rules.observe(functools.partial(torch.add, torch.ones(2)))) == "observe(partial(add))"
    assert repr(rules.chain(rules.observe(nn.Linear(2, 2)), rules.stop)) == "chain(observe(Linear), stop)"


class TestSparseGradients:
    def by(self, rule, sparse):
        embedding = nn.Embedding(10, 4, sparse=sparse, dtype=torch.float64)
        with torch.no_grad():
            embedding.weight.copy_(torch.arange(40.0).view(10, 4))
        handle = go.edit_gradient_(embedding.weight, rule)
        g = torch.arange(12.0, dtype=torch.float64).view(3, 4) - 4
        g[0, 0] = 1e30 if not isinstance(rule, rules.scrub) else NAN
        embedding(torch.tensor([1, 2, 2])).backward(g)
        handle.remove()
        return embedding.weight.grad

    @pytest.mark.parametrize(
        "make",
        [lambda: rules.clip_norm(1.0), rules.normalize, lambda: rules.clip_value(3.0), rules.scrub],
        ids=["clip_norm", "normalize", "clip_value", "scrub"],
    )
    def test_are_edited_as_dense_ones_are(self, make):
        found = self.by(make(), sparse=True)
        assert found.is_sparse
        closely(found.to_dense(), self.by(make(), sparse=False))

    def test_are_measured_beside_dense_ones(self):
        sparse = torch.sparse_coo_tensor([[1, 1]], [1.0, 2.0], (3,), check_invariants=True)
        one, two = rules.clip_norm(1.0)([sparse, torch.tensor([4.0])])
        closely(one.to_dense(), torch.tensor([0.0, 0.6, 0.0]))
        closely(two, torch.tensor([0.8]))

    @pytest.mark.parametrize("rule", [rules.clip_norm(1.0, dim=1), rules.normalize(0)])
    def test_over_a_dimension_are_an_error(self, rule):
        with pytest.raises(go.UnsupportedError, match=r"a gradient over 'dim' must not be sparse.*Leave 'dim' out"):
            self.by(rule, sparse=True)
