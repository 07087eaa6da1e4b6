"""Quantizers against torch's own, the papers' formulas by hand, and the same built of detached parts."""

import math
import pickle

import numpy as np
import pytest
import torch
from oracles import closely, exactly, float64, noise
from torch import nn

import gradoverride as go
from gradoverride import rules

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*should not be instantiated:DeprecationWarning",  # Dynamo's own doing, for any Function
)

NAN, INF = math.nan, math.inf


def leaf(value, dtype=torch.float64):
    return torch.tensor(value, dtype=dtype, requires_grad=True)


def gradients(y, tensors, g=None):
    return torch.autograd.grad(y, tensors, torch.ones_like(y) if g is None else g)


def through(value, soft):
    """The value of one, the gradient of the other: what these functions are built of by hand elsewhere."""
    return soft + (value - soft).detach()


def rounded(x):
    return through(x.round(), x)


# --- fake_quantize ---

BOUNDS = [(-128, 127, 0), (-2, 1, 0), (0, 255, 128), (0, 3, 1), (-8, -1, -3)]


class TestFakeQuantize:
    @pytest.mark.parametrize(("low", "high", "zero_point"), BOUNDS)
    def test_is_that_of_torch(self, low, high, zero_point):
        # Steps of a power of 2: torch multiplies by the reciprocal, which is then the same. Sixteenths meet each tie.
        x = (torch.arange(-3000, 3001) / 64).requires_grad_()
        g = torch.randn_like(x)
        expected = torch.fake_quantize_per_tensor_affine(x, 0.25, zero_point, low, high)
        found = rules.fake_quantize(x, 0.25, zero_point, low, high)
        exactly(found, expected)
        exactly(gradients(found, x, g), gradients(expected, x, g))

    def test_by_channel_is_that_of_torch(self):
        x, g = torch.randn(3, 50, 2, requires_grad=True), torch.randn(3, 50, 2)
        scale, zero_point = torch.tensor([0.125, 0.5, 0.25]), torch.tensor([1, 0, -1], dtype=torch.int32)
        expected = torch.fake_quantize_per_channel_affine(x, scale, zero_point, 0, -4, 3)
        found = rules.fake_quantize(x, scale.view(3, 1, 1), zero_point.view(3, 1, 1), -4, 3)
        exactly(found, expected)
        exactly(gradients(found, x, g), gradients(expected, x, g))

    @pytest.mark.parametrize("as_tensor", [lambda value: torch.tensor(value), lambda value: torch.tensor([value])])
    def test_a_tensor_is_as_a_number(self, as_tensor):
        x, g = noise(40), noise(40, grad=False)
        expected = rules.fake_quantize(x, 0.25, 1, -4, 3)
        (grad_x,) = gradients(expected, x, g)
        for scale, zero_point in [(as_tensor(0.25), 1), (0.25, as_tensor(1)), (as_tensor(0.25), as_tensor(1))]:
            found = rules.fake_quantize(x, scale, zero_point, -4, 3)
            exactly(found, expected)
            exactly(gradients(found, x, g), (grad_x,))

    def test_in_float64_it_divides_in_float64(self):
        x = float64(0.7, -1.2)
        exactly(rules.fake_quantize(x, 0.1).detach(), x.new_tensor([7 * 0.1, -12 * 0.1]))

    def test_at_the_ends_and_beyond(self):
        x = float64(-INF, -2.75, -2.5, -2.0, 1.0, 1.49, 1.5, INF, NAN)  # -2.5 is a tie that goes to -2, 1.5 goes to 2
        y = rules.fake_quantize(x, 1.0, quant_min=-2, quant_max=1)
        exactly(y.detach(), y.new_tensor([-2, -2, -2, -2, 1, 1, 1, 1, NAN]))
        exactly(gradients(y, x), (y.new_tensor([0, 0, 1, 1, 1, 1, 0, 0, 1]),))

    def test_a_scale_that_requires_a_gradient_is_an_error(self):
        for option, given in (("scale", (leaf(0.5),)), ("zero_point", (0.5, leaf(1.0)))):
            with pytest.raises(go.RuleOptionError) as error:
                rules.fake_quantize(noise(3), *given)
            assert str(error.value) == (
                f"fake_quantize: '{option}' must be a tensor that requires no gradient, for it is given none; this one "
                "does. Detach it, or use lsq, which learns its step"
            )


# --- lsq ---


def by_the_paper(x, step, low, high, g, grad_scale):
    """Esser et al. (2019): equations 1 and 2, the straight-through gradient and the three cases of equation 3."""
    values, grad_x, grad_step = [], [], 0.0
    for v, gradient in zip(x.tolist(), g.tolist(), strict=True):
        scaled = v / step
        values.append(float(np.rint(min(max(scaled, low), high))) * step)
        if scaled <= low:
            case, passes = low, 0.0
        elif scaled >= high:
            case, passes = high, 0.0
        else:
            case, passes = -scaled + float(np.rint(scaled)), 1.0
        grad_x.append(gradient * passes)
        grad_step += gradient * case
    as_tensor = x.new_tensor
    return as_tensor(values), as_tensor(grad_x), as_tensor(grad_step * grad_scale)


def by_its_pseudo_code(x, step, low, high, grad_scale):
    """Its appendix B: functions `gradscale`, `roundpass` and `quantize`."""
    step = through(step, step * grad_scale)
    return rounded(torch.clamp(x / step, low, high)) * step


RANGES = [(2, True, -2, 1), (3, True, -4, 3), (8, True, -128, 127), (1, False, 0, 1), (2, False, 0, 3)]


class TestLsq:
    @pytest.mark.parametrize(("bits", "signed", "low", "high"), RANGES)
    def test_is_the_three_cases_of_the_paper(self, bits, signed, low, high):
        step = leaf(0.25)  # all values below are met exactly: ties, and both ends
        ends = torch.tensor([low, high, low - 0.5, high + 0.5, low + 0.5, high - 0.5, 0, 0.5, 1.5, -0.5])
        x = torch.cat([torch.randn(100), ends * 0.25]).double().requires_grad_()
        g = torch.randn_like(x)
        values, grad_x, grad_step = by_the_paper(x, 0.25, low, high, g, 1 / math.sqrt(110 * high))
        y = rules.lsq(x, step, bits, signed=signed)
        exactly(y.detach(), values)
        found = gradients(y, (x, step), g)
        exactly(found[0], grad_x)
        closely(found[1], grad_step)

    @pytest.mark.parametrize(("bits", "signed", "low", "high"), RANGES)
    def test_is_its_pseudo_code(self, bits, signed, low, high):
        x, g, step = noise(5, 20), noise(5, 20, grad=False), leaf(0.3)
        expected = by_its_pseudo_code(x, step, low, high, 1 / math.sqrt(100 * high))
        found = rules.lsq(x, step, bits, signed=signed)
        closely(found, expected)
        closely(gradients(found, (x, step), g), gradients(expected, (x, step), g))

    @pytest.mark.parametrize("shape", [(3, 1), (1, 4), (4,), (3, 4), (1, 1)])
    def test_steps_by_channel_are_those_of_each(self, shape):
        x, g = noise(3, 4), noise(3, 4, grad=False)
        steps = (torch.rand(shape, dtype=torch.float64) + 0.2).requires_grad_()
        y = rules.lsq(x, steps, 3)
        grad_x, grad_steps = gradients(y, (x, steps), g)
        places = torch.arange(steps.numel()).view(shape).expand(3, 4)
        for place, (step, grad_step) in enumerate(zip(steps.flatten(), grad_steps.flatten(), strict=True)):
            own = places == place
            part, one = x[own].detach().requires_grad_(), step.detach().requires_grad_()
            z = rules.lsq(part, one, 3)
            exactly(z, y[own])
            found = gradients(z, (part, one), g[own])
            exactly(found[0], grad_x[own])
            closely(found[1], grad_step)

    @pytest.mark.parametrize(("count", "scale"), [(None, 1 / math.sqrt(12 * 3)), (7, 1 / math.sqrt(7 * 3))])
    def test_the_gradient_of_the_step_is_scaled(self, count, scale):
        x, step = noise(3, 4), leaf(0.1)
        (grad_step,) = gradients(rules.lsq(x, step, 3, count=count), step)
        (plain,) = gradients(by_its_pseudo_code(x, step, -4, 3, 1.0), step)
        closely(grad_step, plain * scale)

    def test_at_infinity_it_is_clipped_and_nan_stays(self):
        x, step = float64(-INF, INF), leaf(0.5)
        y = rules.lsq(x, step, 2, count=1)
        exactly(y.detach(), y.new_tensor([-1, 0.5]))
        exactly(gradients(y, (x, step)), (y.new_tensor([0, 0]), y.new_tensor(-2 + 1)))
        y = rules.lsq(float64(NAN, 0.1), step, 2)
        exactly(y.isnan(), torch.tensor([True, False]))
        assert gradients(y, step)[0].isnan()

    @pytest.mark.parametrize(("sizes", "shape"), [((0, 3), ()), ((0, 3), (1, 3)), ((3, 0), (1, 0)), ((3, 0), (3, 1))])
    def test_of_nothing(self, sizes, shape):
        step = torch.full(shape, 0.5, dtype=torch.float64, requires_grad=True)
        y = rules.lsq(noise(*sizes), step, 2)
        assert y.shape == sizes
        exactly(gradients(y, step), (torch.zeros(shape, dtype=torch.float64),))

    def test_a_step_that_is_learnt_fits_the_weights(self):
        w, step = noise(1000, grad=False), nn.Parameter(torch.tensor(3.0, dtype=torch.float64))

        def error():
            return (rules.lsq(w, step, 3) - w).square().mean()

        best = min((rules.lsq(w, torch.tensor(s), 3) - w).square().mean() for s in np.linspace(0.05, 3, 200))
        optimizer = torch.optim.Adam([step], lr=0.05)
        assert error() > 10 * best
        for _ in range(200):
            optimizer.zero_grad()
            error().backward()
            optimizer.step()
        assert error() < 1.05 * best

    @pytest.mark.parametrize(("bits", "signed", "high"), [(4, True, 7), (4, False, 15)])
    def test_the_first_step(self, bits, signed, high):
        w = noise(6, 5)
        array = w.numpy(force=True)
        found = rules.lsq_step(w, bits, signed=signed)
        closely(found, torch.tensor(2 * np.abs(array).mean() / math.sqrt(high)))
        assert not found.requires_grad
        by_row = rules.lsq_step(w, bits, signed=signed, dim=1)
        closely(by_row, torch.from_numpy(2 * np.abs(array).mean(axis=1, keepdims=True) / math.sqrt(high)))


# --- pact ---


def pact_by_hand(x, alpha, bits):
    """Choi et al. (2018): equation 1 as it stands, and equation 2 straight-through."""
    y = 0.5 * (x.abs() - (x - alpha).abs() + alpha)
    levels = (2**bits - 1) / alpha.detach()
    return through((y * levels).round() / levels, y)


class TestPact:
    @pytest.mark.parametrize("bits", [1, 2, 4, 8])
    @pytest.mark.parametrize("shape", [(), (1,), (5, 1)])
    def test_is_the_equation_of_the_paper(self, bits, shape):
        x, g = noise(5, 40), noise(5, 40, grad=False)
        alpha = (torch.rand(shape, dtype=torch.float64) + 0.3).requires_grad_()
        expected, found = pact_by_hand(x, alpha, bits), rules.pact(x, alpha, bits)
        closely(found, expected)
        closely(gradients(found, (x, alpha), g), gradients(expected, (x, alpha), g))

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("alpha", [1.0, 6.0, 0.7])
    def test_at_the_ends(self, dtype, alpha):
        alpha = leaf(alpha, dtype)
        last = torch.nextafter(alpha.detach(), alpha.new_tensor(0))
        x = torch.stack([*alpha.new_tensor([-INF, -1.0, 0.0]), last, alpha.detach(), *alpha.new_tensor([50.0, INF])])
        x.requires_grad_()
        for place, (of_x, of_alpha) in enumerate([(0, 0), (0, 0), (0, 0), (1, 0), (0, 1), (0, 1), (0, 1)]):
            y = rules.pact(x, alpha, 2)
            grad_x, grad_alpha = gradients(y[place], (x, alpha))
            assert (grad_x[place].item(), grad_alpha.item()) == (of_x, of_alpha)
        exactly(y[[0, 1, 2, 4, 5, 6]].detach(), torch.stack([alpha.new_tensor(0)] * 3 + [alpha.detach()] * 3))

    def test_levels_are_exact(self):
        alpha = leaf(0.7, torch.float32)
        y = rules.pact(torch.linspace(-1, 1, 99), alpha, 2)
        assert set(y.tolist()) == {float(np.float32(k) / np.float32(3) * np.float32(0.7)) for k in range(4)}


# --- dorefa ---


class TestDorefa:
    @pytest.mark.parametrize("bits", [2, 3, 8])
    def test_weights_are_those_of_the_paper(self, bits):
        w, g, n = noise(6, 7), noise(6, 7, grad=False), 2**bits - 1
        bounded = w.tanh()
        expected = 2 * rounded(n * (bounded / (2 * bounded.abs().max()) + 0.5)) / n - 1
        found = rules.dorefa_weight(w, bits)
        closely(found, expected)
        closely(gradients(found, w, g), gradients(expected, w, g))
        assert found.abs().max() == 1

    def test_weights_have_the_gradient_without_rounding(self):
        w = noise(4, 5)

        def smooth(w):
            return w.tanh() / w.tanh().abs().max()

        assert torch.autograd.gradcheck(smooth, w)  # so that it may be the oracle
        closely(gradients(rules.dorefa_weight(w, 2), w), gradients(smooth(w), w))

    def test_one_bit_is_the_sign_of_mean_size_and_the_gradient_passes(self):
        w = float64(-3.0, 0.0, -0.0, 1.0)
        y = rules.dorefa_weight(w, 1)
        exactly(y.detach(), y.new_tensor([-1, 1, 1, 1]))
        g = noise(4, grad=False)
        exactly(gradients(y, w, g), (g,))

    def test_weights_of_zeros(self):
        w = torch.zeros(3, requires_grad=True)
        y = rules.dorefa_weight(w, 2)
        assert y.detach().abs().max() <= 1
        assert gradients(y, w)[0].isfinite().all()

    @pytest.mark.parametrize("bits", [1, 2, 4])
    def test_activations_are_those_of_the_paper(self, bits):
        x, g, n = noise(60), noise(60, grad=False), 2**bits - 1
        expected = rounded(x.clamp(0, 1) * n) / n
        found = rules.dorefa_activation(x, bits)
        exactly(found, expected.detach())
        closely(gradients(found, x, g), gradients(expected, x, g))

    def test_activations_at_the_ends(self):
        x = float64(-INF, -1e-9, 0.0, 1.0, 1 + 1e-9, INF)
        y = rules.dorefa_activation(x, 2)
        exactly(y.detach(), y.new_tensor([0, 0, 0, 1, 1, 1]))
        exactly(gradients(y, x), (y.new_tensor([0, 0, 1, 1, 0, 0]),))


# --- magnitude_aware_sign ---


class TestMagnitudeAwareSign:
    @pytest.mark.parametrize(("dim", "over"), [(None, (1, 2)), ((0, 1, 2), (0, 1, 2)), (2, (2,)), ((-1, 0), (0, 2))])
    def test_is_the_sign_and_the_clipped_identity_times_the_mean(self, dim, over):
        w, g = noise(3, 4, 5), noise(3, 4, 5, grad=False)
        size = torch.from_numpy(np.abs(w.numpy(force=True)).mean(axis=over, keepdims=True))
        expected = size * through(w.sign(), w.clamp(-1, 1))
        found = rules.magnitude_aware_sign(w, dim)
        closely(found, expected)
        closely(gradients(found, w, g), gradients(expected, w, g))

    def test_at_the_ends_and_at_zero(self):
        w = float64(-1.0, -0.5, -0.0, 0.0, 1 - 1e-9, 1.0, 3.0)[None].detach().requires_grad_()
        y = rules.magnitude_aware_sign(w, dim=0)
        exactly(y.detach(), w.detach().abs() * w.new_tensor([-1, -1, 1, 1, 1, 1, 1]))
        y = rules.magnitude_aware_sign(w)
        size = w.detach().abs().mean()
        closely(gradients(y, w)[0], size * w.new_tensor([[0, 1, 1, 1, 1, 0, 0]]))

    def test_a_weight_of_one_dimension_has_a_size_for_each(self):
        w = float64(-0.5, 0.25)
        y = rules.magnitude_aware_sign(w)
        exactly(y.detach(), w.detach())
        exactly(gradients(y, w), (w.detach().abs(),))


# --- ewgs ---


class TestEwgs:
    @pytest.mark.parametrize("delta", [0.0, 0.2, 1.5])
    def test_is_the_formula_of_the_paper(self, delta):
        x, g = noise(50), noise(50, grad=False)
        array, gradient = x.numpy(force=True), g.numpy()
        expected = gradient * (1 + delta * np.sign(gradient) * (array - np.rint(array)))
        quantize = go.custom_backward(rules.ewgs(delta))(torch.round)
        closely(gradients(quantize(x), x, g)[0], torch.from_numpy(expected))
        if delta == 0:
            exactly(gradients(quantize(x), x, g)[0], g)

    def test_what_lags_behind_gets_more(self):
        round_ewgs = go.custom_backward(rules.ewgs())(torch.round)
        x = float64(0.4, 0.6)  # a descent takes both down: one away from its level, one back to it
        ahead, behind = gradients(round_ewgs(x), x)[0]
        closely(torch.stack([ahead, behind]), torch.tensor([1 + 0.2 * 0.4, 1 - 0.2 * 0.4], dtype=torch.float64))

    def test_it_is_refused_in_forward_mode(self):
        round_ewgs = go.custom_backward(rules.ewgs())(torch.round)
        with pytest.raises(go.UnsupportedError, match="must be linear in the gradient for forward mode"):
            torch.func.jvp(round_ewgs, (torch.tensor([0.3]),), (torch.ones(1),))

    def test_it_is_a_value(self):
        rule = rules.ewgs(0.3)
        assert rule == pickle.loads(pickle.dumps(rule)) != rules.ewgs()
        assert repr(rule) == "ewgs(delta=0.3)"


# --- alike in all ---

round_ewgs = go.custom_backward(rules.ewgs())(torch.round)
STEP = torch.tensor(0.3, dtype=torch.float64)
EVERY = {
    "fake_quantize": lambda x, step: rules.fake_quantize(x, 0.3, 0, -2, 1),
    "fake_quantize by channel": lambda x, step: rules.fake_quantize(x, step.detach().expand(x.shape[-1]), 0, -2, 1),
    "lsq": lambda x, step: rules.lsq(x, step, 2),
    "lsq by channel": lambda x, step: rules.lsq(x, step * torch.ones_like(x[..., :1]), 2),
    "lsq unsigned": lambda x, step: rules.lsq(x, step, 2, signed=False),
    "pact": lambda x, step: rules.pact(x, step, 2),
    "dorefa_weight": lambda x, step: rules.dorefa_weight(x, 2),
    "dorefa_weight of one bit": lambda x, step: rules.dorefa_weight(x, 1),
    "dorefa_activation": lambda x, step: rules.dorefa_activation(x, 2),
    "magnitude_aware_sign": lambda x, step: rules.magnitude_aware_sign(x),
    "ewgs": lambda x, step: round_ewgs(x),
}


@pytest.mark.parametrize("name", EVERY)
class TestEach:
    def gradient(self, name, x, step):
        y = EVERY[name](x, step)
        return torch.autograd.grad(y, (x, step), torch.ones_like(y), allow_unused=True)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
    def test_keeps_dtype_and_shape(self, name, dtype):
        x = torch.linspace(-2, 2, 12, dtype=dtype).view(3, 4).requires_grad_()
        step = leaf(0.25, dtype)
        y = EVERY[name](x, step)
        assert (y.dtype, y.shape) == (dtype, (3, 4))
        found = self.gradient(name, x, step)
        assert all(part.dtype == dtype and part.isfinite().all() for part in found if part is not None)

    def test_writes_into_nothing(self, name):
        x, step, g = noise(3, 4), leaf(0.3), noise(3, 4, grad=False)
        before = [tensor.detach().clone() for tensor in (x, step, g)]
        torch.autograd.grad(EVERY[name](x, step), (x, step), g, allow_unused=True)
        exactly([tensor.detach() for tensor in (x, step, g)], before)

    def test_compiled_it_is_that_of_eager(self, name):
        torch.compiler.reset()
        x, step = noise(3, 4), leaf(0.3)
        dynamic = name.startswith("lsq")  # it computes with the sizes
        compiled = torch.compile(EVERY[name], fullgraph=True, backend="aot_eager", dynamic=dynamic)
        y = compiled(x, step)
        closely(y, EVERY[name](x, step))
        found = torch.autograd.grad(y, (x, step), torch.ones_like(y), allow_unused=True)
        for part, expected in zip(found, self.gradient(name, x, step), strict=True):
            assert (part is None) == (expected is None)
            if part is not None:
                closely(part, expected)

    def test_under_grad_and_vmap(self, name):
        x, step = noise(2, 3, 4, grad=False), STEP

        def gradient(x):
            return torch.func.grad(lambda x: EVERY[name](x, step).sum())(x)

        one_by_one = [self.gradient(name, part.requires_grad_(), leaf(0.3))[0] for part in x.unbind()]
        closely(gradient(x[0].detach()), one_by_one[0])
        closely(torch.vmap(gradient)(x), torch.stack(one_by_one))


@pytest.mark.parametrize("name", sorted(EVERY.keys() - {"ewgs"}))  # which is not linear, and refused: see above
def test_forward_mode_is_its_transpose(name):
    x, tangent, g = noise(3, 4), noise(3, 4, grad=False), noise(3, 4, grad=False)
    _, found = torch.func.jvp(lambda x: EVERY[name](x, STEP), (x.detach(),), (tangent,))
    (grad_x,) = torch.autograd.grad(EVERY[name](x, STEP), x, g)
    closely((found * g).sum(), (tangent * grad_x).sum())


@pytest.mark.parametrize(
    "function", [rules.fake_quantize, rules.lsq, rules.pact, rules.dorefa_weight, rules.magnitude_aware_sign]
)
def test_functions_pickle_by_name(function):
    assert pickle.loads(pickle.dumps(function)) is function


@pytest.mark.parametrize("name", ["fake_quantize", "lsq", "pact"])
def test_only_what_is_given_is_kept(name):
    x, step, kept = noise(3, 4), leaf(0.3), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.data_ptr()) or tensor, lambda t: t):
        EVERY[name](x, step)
    assert x.data_ptr() in kept
    assert {*kept} <= {x.data_ptr(), step.data_ptr()}


class Quantized(nn.Linear):
    def __init__(self):
        super().__init__(4, 3, dtype=torch.float64)
        self.step = nn.Parameter(rules.lsq_step(self.weight, 2, dim=1))
        self.alpha = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))

    def forward(self, x):
        return nn.functional.linear(rules.pact(x, self.alpha, 4), rules.lsq(self.weight, self.step, 2))


def test_parameters_of_a_module_are_learnt_and_the_module_pickles():
    model, x = Quantized(), noise(20, 4)
    model(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for name, p in model.named_parameters() if name != "bias")
    again = pickle.loads(pickle.dumps(model))
    exactly(again(x), model(x))


X = torch.ones(3, 4)
BITS = "an integer from 2 to 16"
DIM = "None, an integer or a tuple of integers"
FLOATING = "a real floating tensor"
TENSOR = "a real floating tensor (for a number there is fake_quantize)"


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (
            lambda: rules.fake_quantize(X, 0.0),
            "fake_quantize: 'scale' must be a tensor or a number larger than 0; got 0.0",
        ),
        (
            lambda: rules.fake_quantize(X, "1"),
            "fake_quantize: 'scale' must be a tensor or a number larger than 0; got '1'",
        ),
        (
            lambda: rules.fake_quantize(X, 1.0, 128),
            "fake_quantize: 'zero_point' must be a tensor or an integer within the bounds; got 128",
        ),
        (
            lambda: rules.fake_quantize(X, 1.0, 0.5),
            "fake_quantize: 'zero_point' must be a tensor or an integer within the bounds; got 0.5",
        ),
        (
            lambda: rules.fake_quantize(X, 1.0, 0, 3, 3),
            "fake_quantize: 'quant_min' and 'quant_max' must be integers with min < max; got (3, 3)",
        ),
        (
            lambda: rules.fake_quantize(X, torch.ones(3)),
            "fake_quantize: 'scale' must broadcast to the shape of x, (3, 4); it has shape (3,). Give it sizes of 1 "
            "where it is the same for all",
        ),
        (
            lambda: rules.lsq(X, torch.ones(2, 3, 4), 2),
            "lsq: 'step' must broadcast to the shape of x, (3, 4); it has shape (2, 3, 4). Give it sizes of 1 where it "
            "is the same for all",
        ),
        (lambda: rules.lsq(X, 0.5, 2), f"lsq: 'step' must be {TENSOR}; got 0.5"),
        (lambda: rules.lsq(X, torch.ones(()), 1), f"lsq: 'bits' must be {BITS}; got 1"),
        (lambda: rules.lsq(X, torch.ones(()), 2.0), f"lsq: 'bits' must be {BITS}; got 2.0"),
        (
            lambda: rules.lsq(X, torch.ones(()), 0, signed=False),
            "lsq: 'bits' must be an integer from 1 to 16; got 0",
        ),
        (lambda: rules.lsq(X, torch.ones(()), 2, signed=1), "lsq: 'signed' must be True or False; got 1"),
        (
            lambda: rules.lsq(X, torch.ones(()), 2, count=0),
            "lsq: 'count' must be None or an integer larger than 0; got 0",
        ),
        (lambda: rules.lsq_step(X, 17), f"lsq_step: 'bits' must be {BITS}; got 17"),
        (
            lambda: rules.lsq_step(X, 2, dim=()),
            "lsq_step: 'dim' must be None, an integer or a tuple of integers; got ()",
        ),
        (
            lambda: rules.pact(X, 6.0, 2),
            f"pact: 'alpha' must be {TENSOR}; got 6.0",
        ),
        (
            lambda: rules.pact(X, torch.ones(3), 2),
            "pact: 'alpha' must broadcast to the shape of x, (3, 4); it has shape (3,). Give it sizes of 1 where it is "
            "the same for all",
        ),
        (lambda: rules.pact(X, torch.ones(()), 0), "pact: 'bits' must be an integer from 1 to 16; got 0"),
        (lambda: rules.dorefa_weight(X, True), "dorefa_weight: 'bits' must be an integer from 1 to 16; got True"),
        (lambda: rules.dorefa_activation(X, 17), "dorefa_activation: 'bits' must be an integer from 1 to 16; got 17"),
        (
            lambda: rules.magnitude_aware_sign(X, "0"),
            f"magnitude_aware_sign: 'dim' must be {DIM}; got '0'",
        ),
        (lambda: rules.ewgs(-0.1), "ewgs: 'delta' must be a number that is not negative; got -0.1"),
        (lambda: rules.ewgs(NAN), "ewgs: 'delta' must be a number that is not negative; got nan"),
        (lambda: rules.fake_quantize(0.5, 0.1), f"fake_quantize: 'x' must be {FLOATING}; got 0.5"),
        (lambda: rules.fake_quantize(X.int(), 0.1), f"fake_quantize: 'x' must be {FLOATING}; got torch.int32"),
        (lambda: rules.lsq(X.to(torch.complex64), X, 2), f"lsq: 'x' must be {FLOATING}; got torch.complex64"),
        (lambda: rules.lsq(X, torch.tensor(1), 2), f"lsq: 'step' must be {TENSOR}; got torch.int64"),
        (lambda: rules.lsq_step(X > 0, 2), f"lsq_step: 'x' must be {FLOATING}; got torch.bool"),
        (lambda: rules.lsq_step(X, 2, dim=2), "lsq_step: 'dim' must be within the dimensions of x, which has 2; got 2"),
        (lambda: rules.pact([1.0], torch.ones(()), 2), f"pact: 'x' must be {FLOATING}; got [1.0]"),
        (lambda: rules.pact(X, torch.tensor(6), 2), f"pact: 'alpha' must be {TENSOR}; got torch.int64"),
        (lambda: rules.dorefa_weight(X.numpy(), 2), f"dorefa_weight: 'w' must be {FLOATING}; got a ndarray"),
        (lambda: rules.dorefa_activation(X.long(), 2), f"dorefa_activation: 'x' must be {FLOATING}; got torch.int64"),
        (
            lambda: rules.magnitude_aware_sign(nn.Linear(2, 2)),
            f"magnitude_aware_sign: 'w' must be {FLOATING}; got a Linear",
        ),
        (
            lambda: rules.magnitude_aware_sign(X, (0, -3)),
            "magnitude_aware_sign: 'dim' must be within the dimensions of w, which has 2; got (0, -3)",
        ),
    ],
)
def test_options_out_of_range_are_errors(call, text):
    with pytest.raises(go.RuleOptionError) as error:
        call()
    assert str(error.value) == text


def test_an_error_keeps_its_text_where_it_is_compiled():
    torch.compiler.reset()
    run = torch.compile(lambda x, step: rules.lsq(x, step, 2), fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match=r"lsq: 'step' must broadcast to the shape of x, \(3, 4\); it has shape \(3,\)"):
        run(X, torch.ones(3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(), (3, 1)])
@pytest.mark.parametrize(
    "quantizer",
    [
        lambda x, s: rules.fake_quantize(x, s.detach(), 1, -2, 3),
        lambda x, s: rules.lsq(x, s, 2),
        lambda x, s: rules.pact(x, s, 2),
    ],
    ids=["fake_quantize", "lsq", "pact"],
)
def test_the_result_has_the_dtype_of_x_whatever_that_of_its_scale_is(quantizer, shape, dtype):
    x = torch.tensor([[-3.0, 0.25, 1.0, 9.0]] * 3)
    for own in (torch.float32, torch.bfloat16, torch.float64):
        low, wide = [x.to(kind, copy=True).requires_grad_() for kind in (dtype, torch.float64)]
        scale, exact = [torch.full(shape, 0.5, dtype=kind, requires_grad=True) for kind in (own, torch.float64)]
        y, expected = quantizer(low, scale), quantizer(wide, exact)
        assert y.dtype is dtype
        exactly(y, expected.to(dtype))
        y.sum().backward()
        expected.sum().backward()
        exactly(low.grad, wide.grad.to(dtype))
        if exact.grad is not None:
            torch.testing.assert_close(scale.grad, exact.grad.to(own), rtol=2e-2, atol=0)


# Of each, with a scale that no value of half precision is a tie of.
FINE = {
    "fake_quantize": lambda x, s: rules.fake_quantize(x, 0.0079),
    "fake_quantize of many levels": lambda x, s: rules.fake_quantize(x, 0.0079, 32768, 0, 65535),
    "fake_quantize by tensors": lambda x, s: rules.fake_quantize(x, s.detach(), 3, -128, 127),
    "lsq": lambda x, s: rules.lsq(x, s, 8),
    "pact": lambda x, s: rules.pact(x, 64 * s, 8),
    "dorefa_weight": lambda x, s: rules.dorefa_weight(x, 4),
    "dorefa_activation": lambda x, s: rules.dorefa_activation(x, 7),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FINE)
def test_in_half_precision_the_nearest_level_is_taken(name, dtype):
    low = torch.linspace(-1.2, 1.2, 5000).to(dtype).requires_grad_()
    scale = torch.tensor(0.0079, dtype=dtype, requires_grad=True)
    exact, exact_scale = [tensor.detach().double().requires_grad_() for tensor in (low, scale)]
    y, expected, g = FINE[name](low, scale), FINE[name](exact, exact_scale), torch.randn(5000).to(dtype)
    exactly(y, expected.float().to(dtype))
    y.backward(g)
    expected.backward(g.double())
    torch.testing.assert_close(low.grad, exact.grad.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    if scale.grad is not None:
        torch.testing.assert_close(scale.grad, exact_scale.grad.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("bits", [2, 3, 4, 7])
def test_levels_of_weights_are_exact(bits):
    found, top = rules.dorefa_weight(noise(2000, dtype=torch.float32), bits), 2**bits - 1
    assert {*found.tolist()} <= {float(np.float32(2 * level - top) / np.float32(top)) for level in range(top + 1)}


def test_weights_without_values_are_quantized_to_none():
    for bits in (1, 2):
        w = torch.ones(0, 3, requires_grad=True)
        y = rules.dorefa_weight(w, bits)
        y.sum().backward()
        assert y.shape == w.grad.shape == (0, 3)
