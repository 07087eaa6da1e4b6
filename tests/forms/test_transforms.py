"""Decorated callables under torch.func. Conformance, group transforms."""

import random

import numpy as np
import pytest
import torch
from oracles import closely, exactly, float64, noise, right_or_refused
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, grad_and_value, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap
from torch.utils.checkpoint import checkpoint

import gradoverride as go

# The forward is not what the rule differentiates, so that a dropped rule shows: the rules say `cube`.


def cube(x):
    return x**3


class NotCube(nn.Module):
    @go.custom_backward(lambda grad_output, x: grad_output * 3 * x**2)
    def forward(self, x):
        return torch.floor(x)


@go.custom_backward
class NotCubeByClass(nn.Module):
    def forward(self, x):
        return torch.floor(x)

    def backward(self, grad_output, x):
        return grad_output * 3 * x**2


FORMS = {
    "function": go.custom_backward(lambda grad_output, x: grad_output * 3 * x**2)(lambda x: torch.floor(x)),
    "residual": go.custom_backward(lambda grad_output, square: grad_output * 3 * square)(
        lambda x: go.save_for_backward(torch.floor(x), square=x * x)
    ),
    "vjp": go.custom_backward(lambda grad_output, vjp: 2 * vjp(grad_output))(lambda x: x**3 / 2),
    "module": NotCube(),
    "class": NotCubeByClass(),
    "surrogate": go.straight_through(torch.floor, surrogate=cube),
}
FORMS["vjp over vjp"] = go.custom_backward(lambda grad_output, vjp: -vjp(grad_output))(lambda x: -FORMS["vjp"](x))
FORMS["vjp over surrogate"] = go.custom_backward(lambda grad_output, vjp: -vjp(grad_output))(
    lambda x: -FORMS["surrogate"](x)
)


@pytest.fixture(params=FORMS)
def form(request):
    return FORMS[request.param]


@pytest.fixture
def x():
    return noise(4, grad=False)


@pytest.fixture
def batch():
    return noise(5, 4, grad=False)


def slope(x):
    return 3 * x**2


def total(form):
    return lambda x: form(x).sum()


def test_grad(form, x):
    closely(grad(total(form))(x), slope(x))


def test_func_vjp(form, x):
    value, pull = vjp(form, x)
    exactly(value, form(x))
    grad_output = noise(4, grad=False)
    closely(pull(grad_output), (grad_output * slope(x),))


def test_vmap_gives_the_value_of_a_loop(form, batch):
    exactly(vmap(form)(batch), torch.stack([form(row) for row in batch]))


def test_vmap_over_the_last_dimension(form, batch):
    exactly(vmap(form, in_dims=1, out_dims=1)(batch), form(batch))


def test_backward_through_vmap(form, batch):
    batch.requires_grad_()
    grad_output = noise(5, 4, grad=False)
    vmap(form)(batch).backward(grad_output)
    closely(batch.grad, grad_output * slope(batch.detach()))


def test_vmap_of_grad(form, batch):
    closely(vmap(grad(total(form)))(batch), slope(batch))


def test_grad_over_vmap(form, batch):
    closely(grad(lambda batch: vmap(form)(batch).sum())(batch), slope(batch))


def test_vmap_of_vmap_of_grad(form):
    cube_of_rows = noise(2, 3, 4, grad=False)
    closely(vmap(vmap(grad(total(form))))(cube_of_rows), slope(cube_of_rows))


def test_jacrev(form, x):
    closely(jacrev(form)(x), slope(x).diag())


def test_jacfwd(form, x):
    closely(jacfwd(form)(x), slope(x).diag())


def test_jvp(form, x):
    tangent = noise(4, grad=False)
    value, derivative = jvp(form, (x,), (tangent,))
    exactly(value, form(x))
    closely(derivative, slope(x) * tangent)


def test_vmap_of_jvp(form, batch):
    tangents = noise(5, 4, grad=False)
    derivative = vmap(lambda x, t: jvp(form, (x,), (t,))[1])(batch, tangents)
    closely(derivative, slope(batch) * tangents)


def test_forward_mode_over_vmap(form, batch):
    value, tangent = jvp(vmap(form), (batch,), (torch.cos(batch),))
    exactly(value, torch.stack([form(row) for row in batch]))
    closely(tangent, slope(batch) * torch.cos(batch))
    closely(jacfwd(total(vmap(form)))(batch), slope(batch))


def test_forward_mode_of_parameters_over_vmap(batch):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(float64(1.0, 2.0, 3.0, 4.0))

        @go.custom_backward(lambda grad_output, vjp: 7 * vjp(grad_output))
        def forward(self, x):
            return x * self.weight

    model = Scaled()
    given = {"weight": model.weight.detach()}
    tangent = float64(1.0, -1.0, 2.0, 0.5, grad=False)
    _, found = jvp(
        lambda given: vmap(lambda x: functional_call(model, given, (x,)))(batch), (given,), ({"weight": tangent},)
    )
    closely(found, batch * tangent)  # a parameter that the rule leaves to autograd


def test_jvp_in_a_checkpoint_is_refused_in_words(form, x):
    with pytest.raises(go.UnsupportedError, match=r"must not be called in forward mode .* in a checkpoint, .* outside"):
        jvp(lambda x: checkpoint(form, x, use_reentrant=False), (x,), (x,))


def test_dual_numbers(form, x):
    tangent = noise(4, grad=False)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, tangent)
        result = torch.autograd.forward_ad.unpack_dual(form(dual))
    closely(result.tangent, slope(x) * tangent)


@pytest.fixture(params=[name for name in FORMS if name != "residual"])
def twice_differentiable(request):
    return FORMS[request.param]


def test_hessian(twice_differentiable, x):
    closely(hessian(total(twice_differentiable))(x), (6 * x).diag())


def test_grad_of_grad(twice_differentiable, x):
    closely(grad(lambda x: grad(total(twice_differentiable))(x).sum())(x), 6 * x)


TWICE = {
    "jvp of jvp": lambda form, x: jvp(lambda x: jvp(form, (x,), (x,))[1], (x,), (torch.ones_like(x),))[1],
    "jacfwd of jacfwd": lambda form, x: jacfwd(lambda x: jvp(form, (x,), (x,))[1])(x).sum(1),
    "jacrev of jvp": lambda form, x: jacrev(lambda x: jvp(form, (x,), (x,))[1])(x).sum(1),
    "jvp of grad": lambda form, x: jvp(lambda x: x * grad(total(form))(x), (x,), (torch.ones_like(x),))[1],
    "double backward of jvp": lambda form, x: torch.autograd.grad(
        jvp(form, (leaf := x.clone().requires_grad_(),), (leaf,))[1].sum(), leaf
    )[0],
}


@pytest.mark.parametrize("transform", TWICE)
def test_two_modes_over_each_other_are_right_or_refused(transform, twice_differentiable, x):
    # each differentiates x * slope(x) = 3 x^3
    run = TWICE[transform]
    right_or_refused(lambda: run(twice_differentiable, x), 9 * x**2, "forward mode")


@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr")  # torch's own, of what it folds
def test_linearize(form, x):
    value, push = linearize(form, x)
    exactly(value, form(x))
    for tangent in (noise(4, grad=False), noise(4, grad=False)):
        closely(push(tangent), slope(x) * tangent)


def test_linearize_refuses_a_rule_that_is_not_linear(x):
    form = go.custom_backward(lambda grad_output: grad_output.clamp(-0.1, 0.1))(torch.clone)
    with pytest.raises(go.UnsupportedError, match=r"must be linear in the gradient for forward mode .* it is not"):
        linearize(form, x)


def test_second_derivative_through_a_residual_that_depends_on_the_input_is_refused_with_a_way_out(x):
    with pytest.raises(go.UnsupportedError, match=r"(?s)hands over.*vjp"):
        grad(lambda x: grad(total(FORMS["residual"]))(x).sum())(x)


def test_straight_through_is_the_identity_under_transforms(batch):
    form = go.straight_through(torch.floor)
    exactly(vmap(grad(total(form)))(batch), torch.ones_like(batch))
    exactly(jacfwd(form)(batch[0]), torch.eye(4, dtype=torch.float64))
    exactly(hessian(total(form))(batch[0]), torch.zeros(4, 4, dtype=torch.float64))


# Several arguments


@go.custom_backward(lambda grad_output, a, b: (2 * grad_output * b, 3 * grad_output * a))
def product(a, b):
    return a * b


def test_grad_of_two_arguments(batch):
    a, b = batch[0], batch[1]
    exactly(grad(lambda a, b: product(a, b).sum(), argnums=(0, 1))(a, b), (2 * b, 3 * a))


@pytest.mark.parametrize("in_dims", [(0, None), (None, 0), (0, 0)], ids=["first", "second", "both"])
def test_vmap_of_grad_where_some_arguments_have_the_batch(in_dims, batch):
    a, b = (batch if dim == 0 else batch[0] for dim in in_dims)
    got = vmap(grad(lambda a, b: product(a, b).sum(), argnums=(0, 1)), in_dims=in_dims)(a, b)
    exactly(got, (2 * b.expand(5, 4), 3 * a.expand(5, 4)))


def test_backward_through_vmap_sums_the_gradient_of_what_has_no_batch(batch):
    weight = noise(4)
    vmap(product, in_dims=(0, None))(batch, weight).sum().backward()
    closely(weight.grad, 3 * batch.sum(0))


def test_jvp_of_two_arguments(batch):
    a, b, tangent_a, tangent_b = batch[:4]
    exactly(jvp(product, (a, b), (tangent_a, tangent_b))[1], 2 * b * tangent_a + 3 * a * tangent_b)


def test_dict_results_under_vmap_of_grad(batch):
    @go.custom_backward(lambda grad_output: 7 * grad_output["a"] + 5 * grad_output["b"])
    def split(x):
        return {"a": 2 * x, "b": 3 * x, "name": "text"}

    got = vmap(grad(lambda x: (split(x)["a"] + 10 * split(x)["b"]).sum()))(batch)
    exactly(got, torch.full_like(batch, 57.0))


def test_rule_that_is_not_linear_raises_in_forward_mode_and_says_so(x):
    clipped = go.custom_backward(lambda grad_output: grad_output.clamp(-0.1, 0.1))(lambda x: x * 2)
    with pytest.raises(go.UnsupportedError, match="linear"):
        jvp(clipped, (x,), (torch.ones_like(x) * 10,))


# Each is 3 g, and branches where a part of the gradient, or all of it, is zero.
LINEAR_BUT_FOR_A_BRANCH_AT_ZERO = {
    "where": lambda grad_output: torch.where(grad_output == 0, 0.0, 3 * grad_output),
    "mask": lambda grad_output: 3 * grad_output * (grad_output != 0),
    "early exit": lambda grad_output: 3 * grad_output if grad_output.any() else torch.zeros_like(grad_output),
    "nothing for nothing": lambda grad_output: 3 * grad_output if grad_output.any() else None,
    "sign and size": lambda grad_output: 3 * grad_output.abs() * grad_output.sgn(),
}
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", LINEAR_BUT_FOR_A_BRANCH_AT_ZERO)
def test_forward_mode_of_a_linear_rule_that_branches_at_zero(rule, dtype):
    tripled = go.custom_backward(LINEAR_BUT_FOR_A_BRANCH_AT_ZERO[rule])(lambda x: x * 1)
    x, tangent = torch.ones(4, dtype=dtype), torch.arange(4).to(dtype)
    closely(jvp(tripled, (x,), (tangent,))[1], 3 * tangent)
    if not dtype.is_complex:  # jacfwd takes none
        exactly(jacfwd(tripled)(x), 3 * torch.eye(4, dtype=dtype))


# What the forward is, whose true gradient the rule gives: sums that cancel, numbers near the ends of the dtype.
HONEST = {
    "mean": torch.mean,
    "mean of few": lambda x: x.mean(0),
    "difference": lambda x: (x[1:] - x[:-1]) * 50,
    "centred": lambda x: x - x.mean(0),
    "small": lambda x: x * 1e-4,
    "small and back": lambda x: x * 1e-3 * 1e3,
    "softmax": lambda x: x.softmax(-1),
    "layer norm": lambda x: torch.nn.functional.layer_norm(x, (16,)),
    "wider": lambda x: 3 * x.float(),
    "narrower": lambda x: 3 * x.half(),
    "narrower within": lambda x: 3 * x.float().to(x.dtype),
    "nothing but roundings": lambda x: x.softmax(-1).sum(-1),
    "something and roundings": lambda x: torch.stack([x.softmax(-1).sum(-1), x.mean(-1)]),
}


@pytest.mark.parametrize("dtype", DTYPES[:4], ids=str)
@pytest.mark.parametrize("function", HONEST)
def test_forward_mode_of_linear_rules_raises_no_false_alarm_in_any_dtype(function, dtype):
    plain = HONEST[function]
    ours = go.custom_backward(lambda grad_output, vjp: vjp(grad_output))(plain)
    for rows in (2, 300):
        x = noise(rows, 16, grad=False).to(dtype)
        for tangent in (torch.ones_like(x), noise(rows, 16, grad=False).to(dtype)):
            found, expected = (jvp(f, (x,), (tangent,))[1] for f in (ours, plain))
            size = jvp(plain, (x,), (x.abs(),))[1].abs().max().double() + 1
            tolerance = float(torch.finfo(found.dtype).eps) ** 0.5
            torch.testing.assert_close(found / size, expected / size, rtol=0, atol=tolerance, check_dtype=False)


def test_forward_mode_under_autocast_raises_no_false_alarm():
    product = go.custom_backward(lambda grad_output, x, w: (grad_output @ w.T, x.T @ grad_output))(lambda x, w: x @ w)
    x, w = noise(30, 16, grad=False, dtype=torch.float32), noise(16, 8, grad=False, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = jvp(lambda x: product(x, w), (x,), (x,))[1]
        torch.testing.assert_close(found, x @ w)


NOT_LINEAR = {
    "clip at a large value": lambda g: 3 * g.clamp(-1e5, 1e5),
    "clip of a large norm": lambda g: g * (1e6 / (g.norm() + 1e-6)).clamp(max=1),
    "threshold at a small value": lambda g: torch.where(g.abs() < 1e-4, 0.0, 3 * g),
    "offset": lambda g: g + 1e-9,
    "size": torch.abs,
    "nothing for what is small": lambda g: g if g.abs().max() > 1e-3 else None,
}


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("rule", NOT_LINEAR)
def test_rule_that_is_linear_for_gradients_of_usual_size_alone_raises_in_forward_mode(rule, dtype):
    x = torch.ones(2, dtype=dtype)
    with pytest.raises(go.UnsupportedError, match="must be linear in the gradient for forward mode"):
        jvp(go.custom_backward(NOT_LINEAR[rule])(lambda x: x * 2), (x,), (x,))


def test_clip_of_the_imaginary_part_raises_in_forward_mode():
    x = torch.ones(2, dtype=torch.complex64)
    clipped = go.custom_backward(lambda g: torch.complex(g.real, g.imag.clamp(-1, 1)))(lambda x: x * 2)
    with pytest.raises(go.UnsupportedError, match="must be linear in the gradient for forward mode"):
        jvp(clipped, (x,), (x,))


def test_clip_beside_an_infinite_gradient_raises_in_forward_mode():
    x = torch.tensor([0.0, 1.0])
    clipped = go.custom_backward(lambda g, x: g.clamp(-1, 1) / x)(lambda x: x * 2)
    with pytest.raises(go.UnsupportedError, match="must be linear in the gradient for forward mode"):
        jvp(clipped, (x,), (x,))


@pytest.mark.parametrize("size", [1, 1000])
def test_rule_whose_derivative_is_not_what_it_does_raises_in_forward_mode_and_says_so(size):
    x = torch.ones(size)
    tripled = go.custom_backward(lambda grad_output: 3 * grad_output.detach())(lambda x: x * 3)
    text = (
        r"rule '<lambda>' \(.*\.py:\d+\) of .* must compute with the gradient what autograd differentiates .*detaches"
    )
    with pytest.raises(go.UnsupportedError, match=text):
        jvp(tripled, (x,), (x,))
    one = torch.eye(size)[0]
    of_one = go.custom_backward(lambda grad_output: torch.cat([grad_output[:1].detach(), grad_output[1:]]))
    with pytest.raises(go.UnsupportedError, match=text):
        jvp(of_one(lambda x: x * 1), (x,), (one,))


def test_forward_mode_along_an_argument_without_a_gradient_is_zero(x):
    half = go.custom_backward(lambda grad_output, b: (grad_output * b, None))(lambda a, b: a * b)
    exactly(jvp(lambda b: half(x, b), (x,), (x,))[1], torch.zeros_like(x))
    exactly(jvp(half, (x, x), (2 * x, x))[1], 2 * x * x)
    stopped = go.custom_backward(lambda grad_output: None)(lambda x: 2 * x)
    exactly(jacfwd(lambda x: stopped(x) + x)(x), torch.eye(4, dtype=torch.float64))
    exactly(vmap(lambda t: jvp(stopped, (x,), (t,))[1])(torch.ones(3, 4)), torch.zeros(3, 4, dtype=torch.float64))


# Modules


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(noise(4, grad=False))
        self.shift = nn.Parameter(noise(4, grad=False))

    @go.custom_backward(lambda grad_output, x, weight: {"x": 2 * grad_output * weight, "weight": 3 * grad_output * x})
    def forward(self, x):
        return x * self.weight + self.shift


@go.custom_backward
class ScaleByClass(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(noise(4, grad=False))
        self.shift = nn.Parameter(noise(4, grad=False))

    def forward(self, x):
        return x * self.weight + self.shift

    def backward(self, grad_output, x):
        self.weight.grad = 3 * grad_output * x
        self.shift.grad = grad_output
        return 2 * grad_output * self.weight


class ScaleByVjp(Scale):
    @go.custom_backward(lambda grad_output, vjp, x: {"x": 2 * vjp(grad_output), "weight": 3 * grad_output * x})
    def forward(self, x):
        return x * self.weight + self.shift


@pytest.fixture(params=[Scale, ScaleByClass, ScaleByVjp], ids=["method", "class", "vjp"])
def model(request):
    return request.param()


def loss_of(model):
    return lambda params, x: functional_call(model, params, (x,)).sum()


def test_functional_call_under_grad(model, x):
    params = {name: parameter.detach() * 2 for name, parameter in model.named_parameters()}
    grads, grad_x = grad(loss_of(model), argnums=(0, 1))(params, x)
    exactly(grads, {"weight": 3 * x, "shift": torch.ones_like(x)})
    exactly(grad_x, 2 * params["weight"])
    assert model.weight.grad is None


def test_per_sample_gradients(model, batch):
    params = {name: parameter.detach() for name, parameter in model.named_parameters()}
    grads = vmap(grad(loss_of(model)), in_dims=(None, 0))(params, batch)
    exactly(grads, {"weight": 3 * batch, "shift": torch.ones_like(batch)})


def test_ensemble_of_models(model, x):
    params = {name: torch.stack([p.detach(), 10 * p.detach()]) for name, p in model.named_parameters()}
    grads = vmap(grad(loss_of(model), argnums=1), in_dims=(0, None))(params, x)
    closely(grads, 2 * params["weight"])


def test_vmap_of_a_module_reaches_its_parameters(model, batch):
    vmap(model)(batch).sum().backward()
    closely(model.weight.grad, 3 * batch.sum(0))
    closely(model.shift.grad, torch.full((4,), 5.0, dtype=torch.float64))


def test_grad_of_a_module_with_respect_to_its_input(model, x):
    exactly(grad(lambda x: model(x).sum())(x), 2 * model.weight.detach())
    assert model.weight.grad is None


# Random numbers and buffers under transforms: the forward is run again with the same state


def test_dropout_below_a_vjp_has_one_mask_under_grad():
    dropout = go.custom_backward(lambda grad_output, vjp: 7 * vjp(grad_output))(
        lambda x: nn.functional.dropout(x, 0.5, training=True)
    )
    x = torch.ones(1000, dtype=torch.float64)
    got, value = grad(lambda x: (lambda y: (y.sum(), y))(dropout(x)), has_aux=True)(x)
    exactly(got, 7 * value)


def test_buffer_is_counted_once_below_a_vjp_under_grad():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("count", torch.zeros(()))

        @go.custom_backward(lambda grad_output, vjp: 7 * vjp(grad_output))
        def forward(self, x):
            self.count.add_(1)
            return 2 * x

    def loss(x):
        count = torch.zeros(())  # torch lets a transform write into what was made inside alone
        return functional_call(Counting(), {"count": count}, (x,)).sum(), count

    got, count = grad(loss, has_aux=True)(float64(1.0, grad=False))
    exactly(got, float64(14.0, grad=False))
    assert count.item() == 1


CAPTURING = {
    "grad": lambda form, x: grad(total(form))(x),
    "backward through vmap": lambda form, x: vmap(form)(x[None].clone().requires_grad_()),
    "vmap of grad": lambda form, x: vmap(grad(total(form)))(x[None]),
    "jvp": lambda form, x: jvp(form, (x,), (x,)),
}


@pytest.mark.parametrize(
    "rule", [lambda grad_output: grad_output, lambda grad_output, vjp: vjp(grad_output)], ids=["gradient alone", "vjp"]
)
@pytest.mark.parametrize("transform", CAPTURING)
def test_captured_tensor_under_a_transform_is_an_error(transform, rule, x):
    weight = noise(4)
    captured = go.custom_backward(rule)(lambda x: x * weight)
    with pytest.raises(go.CapturedTensorError, match="weight"):
        CAPTURING[transform](captured, x)


def in_dual_level(form, primal, tangent):
    with forward_ad.dual_level():
        return form(forward_ad.make_dual(primal, tangent))


FORWARD = {
    "jvp": lambda form, w: jvp(form, (w,), (w,)),
    "dual numbers": lambda form, w: in_dual_level(form, w, w),
    "vmap of jvp": lambda form, w: vmap(lambda w: jvp(form, (w,), (w,)))(w[None]),
    "jvp over vmap": lambda form, w: jvp(vmap(form), (w[None],), (w[None],)),
    "jvp over vmap that does not have it": lambda form, w: jvp(lambda w: vmap(lambda _: form(w))(w), (w,), (w,)),
    "jvp over grad": lambda form, w: jvp(lambda w: grad(lambda y: (form(w) * y).sum())(w), (w,), (w,)),
    "grad over jvp": lambda form, w: grad(lambda w: jvp(form, (w,), (w,))[1].sum())(w),
}


@pytest.mark.parametrize(
    "rule", [lambda grad_output: grad_output, lambda grad_output, vjp: vjp(grad_output)], ids=["gradient alone", "vjp"]
)
@pytest.mark.parametrize("mode", FORWARD)
def test_captured_tensor_with_a_tangent_is_an_error(mode, rule, x):
    def captures(weight):
        return go.custom_backward(rule)(lambda x: x * weight)(x)

    with pytest.raises(go.CapturedTensorError, match=r"reached 'weight' by a closure, .* that tangent would be lost"):
        FORWARD[mode](captures, noise(4, grad=False))


def test_dual_tensors_in_place_of_the_parameters_of_a_module_are_an_error(x):
    model = nn.Linear(4, 2, dtype=torch.float64)
    with go.override(model, {model: lambda grad_output, vjp: vjp(grad_output)}), forward_ad.dual_level():
        for name, parameter in list(model.named_parameters()):
            delattr(model, name)
            setattr(model, name, forward_ad.make_dual(parameter.detach(), torch.ones_like(parameter)))
        with pytest.raises(go.CapturedTensorError, match=r"'self.weight', 'self.bias' .* torch.func.functional_call"):
            model(x)


def test_captured_tensor_under_vmap_of_an_input_without_gradient_is_an_error_or_keeps_its_own(x):
    weight = noise(4)
    try:
        vmap(go.custom_backward(lambda grad_output: grad_output)(lambda x: x * weight))(x[None]).sum().backward()
    except go.CapturedTensorError:
        return
    exactly(weight.grad, x)


def test_value_of_grad_and_value_reaches_the_live_parameters(model, x):
    _, value = grad_and_value(total(model))(x)
    value.backward()
    exactly((model.weight.grad, model.shift.grad), (3 * x, torch.ones_like(x)))


def test_gradient_of_grad_reaches_the_live_parameters(model, x):
    grad(total(model))(x).sum().backward()
    exactly(model.weight.grad, torch.full_like(x, 2.0))


def test_wrong_shape_under_grad_is_an_error_with_both_shapes(x):
    wrong = go.custom_backward(lambda grad_output: grad_output.sum())(lambda x: 2 * x)
    with pytest.raises(go.RuleResultError, match=r"\(4,\).*\(\)"):
        grad(total(wrong))(x)


def test_batchnorm_below_a_vjp_counts_once_under_grad_and_has_the_plain_gradient(batch):
    class Ruled(nn.BatchNorm1d):
        @go.custom_backward(lambda grad_output, vjp: 7 * vjp(grad_output))
        def forward(self, x):
            return super().forward(x)

    weights = noise(5, 4, grad=False)

    def run(norm):
        params = {name: parameter.detach() for name, parameter in norm.named_parameters()}

        def loss(params, x):
            buffers = {name: buffer.clone() for name, buffer in norm.named_buffers()}
            return (functional_call(norm, (params, buffers), (x,)) * weights).sum(), buffers

        return grad(loss, argnums=(0, 1), has_aux=True)(params, batch)

    (params, grad_x), buffers = run(Ruled(4, dtype=torch.float64))
    (plain_params, plain_grad_x), plain_buffers = run(nn.BatchNorm1d(4, dtype=torch.float64))
    exactly(buffers, plain_buffers)
    closely(grad_x, 7 * plain_grad_x)
    for name, expected in plain_params.items():  # left to autograd
        closely(params[name], expected)
    assert buffers["num_batches_tracked"].item() == 1


def test_vjp_of_what_vjp_gave_is_right_in_grad_of_grad(x):
    twice = go.custom_backward(lambda grad_output, vjp: vjp(vjp(grad_output)))(lambda x: x**3)
    closely(grad(total(twice))(x), 9 * x**4)
    closely(grad(lambda x: grad(total(twice))(x).sum())(x), 36 * x**3)


# --- the forward runs again for `vjp`, with what it met ---


def value_and_gradient(fn, *args):
    """Of a sum, with respect to the first argument."""
    gradient, value = grad_and_value(lambda *args: fn(*args).sum())(*args)
    return value, gradient


DRAWS = {
    "torch": lambda x: x * torch.rand(1, dtype=torch.float64),
    "python": lambda x: x * random.random(),
    "numpy": lambda x: x * float(np.random.rand()),
    "normal": lambda x: x * float(np.random.randn()) * random.gauss(0, 1),
}


def random_states():
    return torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state(legacy=False))


@pytest.mark.parametrize("forward", DRAWS.values(), ids=DRAWS)
def test_forward_that_draws_random_numbers_has_the_gradient_of_those_it_drew(forward):
    ruled = go.custom_backward(lambda grad_output, vjp: vjp(grad_output))(forward)
    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    forward(torch.ones(1, dtype=torch.float64))
    after = random_states()
    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    value, gradient = value_and_gradient(ruled, torch.ones(1, dtype=torch.float64))
    closely(gradient.sum(), value)
    assert random_states() == after


class Counter(nn.Module):
    step = 0

    def forward(self, x):
        self.step += 1
        return x * self.step


class SlotCounter(nn.Module):
    __slots__ = ("step",)

    def forward(self, x):
        self.step = getattr(self, "step", 0) + 1
        return x * self.step


class BufferCounter(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("step", None)

    def forward(self, x):
        self.step = torch.ones(1, dtype=torch.float64) if self.step is None else self.step + 1
        return x * self.step


class LateBufferCounter(nn.Module):
    def forward(self, x):
        step = self.step if hasattr(self, "step") else torch.zeros(1, dtype=torch.float64)
        self.register_buffer("step", step + 1)
        return x * self.step


class Counting(nn.Module):
    """The n-th call multiplies by n; a part without tensors of its own counts."""

    def __init__(self, counter, rule):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, dtype=torch.float64))
        self.counter = counter
        self.rule = rule

    def forward(self, x):
        return go.custom_backward(self.rule)(Counting.call)(self, x)

    def call(self, x):
        self.last = self.weight.item() if hasattr(self, "last") else 1.0
        return self.counter(x) * self.weight


@pytest.mark.parametrize("counter", [Counter, SlotCounter, BufferCounter, LateBufferCounter])
@pytest.mark.parametrize(
    "rule",
    [lambda grad_output, vjp: vjp(grad_output), lambda grad_output: grad_output],
    ids=["vjp", "left to autograd"],
)
def test_forward_that_counts_in_its_module_has_the_gradient_of_that_call_and_has_counted_once(counter, rule):
    module = Counting(counter(), rule)
    params = dict(module.named_parameters())
    for step in (1, 2, 3):
        value, gradients = value_and_gradient(
            lambda p: functional_call(module, p, (torch.ones(1, dtype=torch.float64),)), params
        )
        assert value.item() == gradients["weight"].item() == step
        assert module.counter.step == step


class Caller:
    calls = 0

    def __call__(self, x):
        self.calls += 1
        return x * self.calls


def of_its_own_generator():
    generator = torch.Generator().manual_seed(0)
    return lambda x: x * torch.rand(1, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(
    ("make", "transform"),
    [(of_its_own_generator, lambda fn: fn), (Caller, lambda fn: fn), (Caller, vmap)],
    ids=["a generator", "an object", "an object, vmap"],
)
def test_forward_that_gives_another_result_when_it_runs_again_is_refused(make, transform):
    fn = go.custom_backward(lambda grad_output, vjp: vjp(grad_output))(make())
    with pytest.raises(go.UnsupportedError) as caught:
        transform(grad(lambda x: fn(x).sum()))(torch.ones(3, 1, dtype=torch.float64))
    for part in ("must give the same result", "it gave another", "default generators", "answer for every parameter"):
        assert part in str(caught.value)


def test_complex_forward_that_gives_another_result_is_refused():
    fn = go.custom_backward(lambda grad_output, vjp: vjp(grad_output))(Caller())
    with pytest.raises(go.UnsupportedError, match="must give the same result"):
        grad(lambda x: fn(x * 1j).abs().sum())(torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("transform", [lambda fn: fn, vmap], ids=["grad", "vmap of grad"])
def test_forward_with_results_that_are_no_numbers_has_autograds_gradient(transform, odd):
    fn = go.custom_backward(lambda grad_output, vjp: 3 * vjp(grad_output))(lambda x: x.sin().masked_fill(x > 1, odd))
    x = float64(0.5, 2.0, grad=False).unsqueeze(1)
    closely(transform(grad(lambda x: fn(x).sum()))(x), (3 * x.cos()).masked_fill(x > 1, 0))


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), float("-inf")])
def test_forward_that_gives_another_result_beside_what_is_no_number_is_refused(odd):
    caller = Caller()
    fn = go.custom_backward(lambda grad_output, vjp: vjp(grad_output))(lambda x: caller(x).masked_fill(x > 1, odd))
    with pytest.raises(go.UnsupportedError, match="must give the same result"):
        grad(lambda x: fn(x).sum())(float64(0.5, 2.0, grad=False))


@pytest.mark.parametrize("dims", [0, 1])
def test_forward_that_runs_again_in_a_batch_is_known_again_however_the_batch_lies(dims):
    fn = go.custom_backward(lambda grad_output, vjp: 3 * vjp(grad_output))(lambda x: x.sin() * x.sum())
    x = noise(4, 4, grad=False)
    actual = vmap(grad(lambda x: fn(x).sum()), in_dims=dims)(x)
    expected = vmap(grad(lambda x: (x.sin() * x.sum()).sum()), in_dims=dims)(x)
    closely(actual, 3 * expected)


def into_a_dict(x, kept):
    kept["doubled"] = x * 2
    return x.sin()


def into_a_list(x, kept):
    kept.append(x.detach())
    return x.sin() * len(kept)


def by_a_count(x, kept):
    kept["calls"] = kept.get("calls", 0) + 1
    return x.sin() * kept["calls"]


@pytest.mark.parametrize(("forward", "kept"), [(into_a_dict, {}), (into_a_list, []), (by_a_count, {})])
@pytest.mark.parametrize("transform", [lambda fn: fn, vmap], ids=["grad", "vmap of grad"])
def test_forward_runs_again_with_a_container_as_it_met_it(transform, forward, kept):
    fn = go.custom_backward(lambda grad_output, vjp: 3 * vjp(grad_output))(forward)
    kept = type(kept)()
    x = float64(0.5, 2.0, grad=False).unsqueeze(1)
    closely(transform(grad(lambda x: fn(x, kept).sum()))(x), 3 * x.cos())
    assert len(kept) == 1


# --- a batch of tangents at once, as `torch.autograd.functional` runs it

BATCHED = {
    "rule of arguments": (lambda grad_output, x: 2 * grad_output * x, lambda x: x * x),
    "rule of vjp": (lambda grad_output, vjp: vjp(grad_output), lambda x: x * x),
    "rule with a branch": (
        lambda grad_output, x: torch.where(x > 0, 2 * grad_output * x, 2 * x * grad_output),
        lambda x: x * x,
    ),
}


@pytest.mark.parametrize(("rule", "forward"), BATCHED.values(), ids=BATCHED)
def test_vectorised_forward_mode_is_the_rule_transposed(rule, forward):
    x = float64(1.0, -2.0, 3.0)
    ruled = go.custom_backward(rule)(forward)
    found = torch.autograd.functional.jacobian(ruled, x, vectorize=True, strategy="forward-mode")
    closely(found, torch.diag(2 * x.detach()))
    found = torch.autograd.functional.hessian(
        lambda x: ruled(x).sum(), x, vectorize=True, outer_jacobian_strategy="forward-mode"
    )
    closely(found, 2 * torch.eye(3, dtype=torch.float64))
    assert torch.autograd.gradcheck(ruled, x, check_forward_ad=True, check_batched_forward_grad=True)


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        (lambda grad_output: grad_output.clamp(-1, 1), "must be linear in the gradient"),
        (lambda grad_output: grad_output.detach() * 2, "its derivative is not what it does"),
    ],
)
def test_vectorised_forward_mode_of_a_rule_without_a_transpose_is_an_error(rule, text):
    ruled = go.custom_backward(rule)(lambda x: x * 2)
    with pytest.raises(go.UnsupportedError, match=text):
        torch.autograd.functional.jacobian(ruled, float64(1.0, 2.0), vectorize=True, strategy="forward-mode")
