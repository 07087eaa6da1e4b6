"""Residuals: values that a forward hands over to its rule, and that nobody else sees."""

import gc
import threading
import weakref
from types import SimpleNamespace

import pytest
import torch
from oracles import closely, exactly, float64, noise
from torch import nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import gradoverride as go
from gradoverride._core.calls.forward_pass import ForwardPass
from gradoverride._core.private.engine import can_call_directly
from gradoverride._core.private.tensors import counted_once


def masked(grad_output, mask):
    return grad_output * mask


@go.custom_backward(masked)
def relu(x):
    mask = x > 0
    return go.save_for_backward(x * mask, mask=mask)


def test_rule_gets_the_residual_and_the_caller_the_result_alone():
    x = noise(5)
    y = relu(x)
    y.sum().backward()
    exactly(y.detach(), x.detach().clamp(min=0) + 0.0)
    exactly(x.grad, (x.detach() > 0).double())


# --- where no rule can ask ---


@pytest.mark.parametrize(
    "result", [torch.ones(2), (1, "text"), None, {"a": [torch.ones(1)]}], ids=lambda r: type(r).__name__
)
def test_outside_a_decorated_call_the_first_argument_comes_back(result):
    assert go.save_for_backward(result, mask=torch.ones(2)) is result


def test_undecorated_forward_works_and_has_its_own_gradient():
    x = noise(5)
    relu.__wrapped__(x).sum().backward()
    exactly(x.grad, (x.detach() > 0).double())


def test_after_a_decorated_call_it_is_outside_again():
    relu(noise(5))
    kept = torch.ones(2)
    reference = weakref.ref(kept)
    go.save_for_backward(None, kept=kept)
    del kept
    assert reference() is None


def test_after_a_forward_that_raised_it_is_outside_again():
    @go.custom_backward(masked)
    def broken(x):
        go.save_for_backward(x, mask=x > 0)
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        broken(noise(5))
    kept = torch.ones(2)
    reference = weakref.ref(kept)
    go.save_for_backward(None, kept=kept)
    del kept
    gc.collect()  # of the exception's frames
    assert reference() is None


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_the_result_comes_back(mode):
    x = noise(5)
    with mode():
        y = relu(x)
    assert not y.requires_grad
    exactly(y.clone(), x.detach().clamp(min=0) + 0.0)


def test_what_was_made_in_inference_mode_may_be_handed_over():
    @go.custom_backward(lambda grad_output, mask, scale, same: grad_output * mask * scale + same)
    def masked_in_inference_mode(x):
        with torch.inference_mode():
            mask, scale, result = x > 0, 3 * x, x + 1
        return go.save_for_backward(result, mask=mask, scale=scale, same=result)

    x = noise(5)
    y = masked_in_inference_mode(x)
    (y.sum() + x.sum()).backward()
    value = x.detach()
    closely(x.grad, 3 * value.clamp(min=0) + value + 2)


def test_input_that_wants_no_gradient_gives_the_result():
    x = noise(5, grad=False)
    exactly(relu(x), x.clamp(min=0) + 0.0)


def test_call_under_no_grad_does_not_disturb_one_that_waits_for_its_backward():
    x = noise(5)
    y = relu(x)
    with torch.no_grad():
        relu(-x)
    y.sum().backward()
    exactly(x.grad, (x.detach() > 0).double())


# --- nesting, helpers, several ---


def test_helper_hands_over_for_the_forward_that_called_it():
    def helper(x):
        return go.save_for_backward(x * 2, factor=7)

    through_helper = go.custom_backward(lambda grad_output, factor: factor * grad_output)(lambda x: helper(x) + 1)
    x = noise(3)
    through_helper(x).sum().backward()
    exactly(x.grad, torch.full_like(x, 7.0).detach())


def by_later_helper(x):
    return later_helper(x)


decorated_before_its_helper = go.custom_backward(lambda grad_output, factor: grad_output * factor)(by_later_helper)


def later_helper(x):
    return go.save_for_backward(x * 2, factor=x * 7)


@pytest.mark.parametrize("within", [False, True])
def test_helper_that_is_defined_later_hands_over_for_the_forward_that_calls_it(within):
    @go.custom_backward(lambda grad_output, factor: grad_output * factor)
    def forward(x):
        return helper(x)

    helper = later_helper
    x = float64(2.0)
    (forward if within else decorated_before_its_helper)(x).backward()
    exactly(x.grad, float64(14.0, grad=False))


def test_helper_in_a_submodule_hands_over_for_the_method_that_called_it():
    class Gate(nn.Module):
        def forward(self, x):
            return go.save_for_backward(x * 2, factor=7)

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate = Gate()

        @go.custom_backward(lambda grad_output, factor: factor * grad_output)
        def forward(self, x):
            return self.gate(x)

    x = noise(3)
    Outer()(x).sum().backward()
    exactly(x.grad, torch.full_like(x, 7.0).detach())


@pytest.mark.parametrize("asks_for_vjp", [False, True], ids=["plain", "vjp"])
@pytest.mark.parametrize("order", ["before", "after"])
def test_nested_decorated_calls_keep_their_residuals_apart(order, asks_for_vjp):
    inner_seen, outer_seen = [], []

    @go.custom_backward(lambda grad_output, k: (inner_seen.append(k), k * grad_output)[1])
    def inner(x):
        return go.save_for_backward(x * 2, k=3)

    def plain_rule(grad_output, k):
        outer_seen.append(k)
        return k * grad_output

    def vjp_rule(grad_output, k, vjp):
        outer_seen.append(k)
        return k * vjp(grad_output)

    @go.custom_backward(vjp_rule if asks_for_vjp else plain_rule)
    def outer(x):
        if order == "before":
            go.save_for_backward(None, k=5)
            return inner(x)
        return go.save_for_backward(inner(x), k=5)

    x = noise(3)
    outer(x).sum().backward()
    exactly(x.grad, torch.full_like(x, 15.0 if asks_for_vjp else 5.0).detach())
    assert outer_seen == [5]
    assert inner_seen == ([3] if asks_for_vjp else [])


def test_inner_rule_that_asks_for_nothing_hides_no_residual_of_the_outer_one():
    inner = go.custom_backward(lambda grad_output: grad_output)(lambda x: x * 2)

    @go.custom_backward(lambda grad_output, before, after: before * after * grad_output)
    def outer(x):
        go.save_for_backward(None, before=5)
        y = inner(x)
        return go.save_for_backward(y, after=7)

    x = noise(3)
    outer(x).sum().backward()
    exactly(x.grad, torch.full_like(x, 35.0).detach())


def test_residual_of_an_inner_rule_that_does_not_ask_stays_inside():
    @go.custom_backward(lambda grad_output: grad_output)
    def inner(x):
        return go.save_for_backward(x * 2, k=3)

    @go.custom_backward(lambda grad_output, k=5: k * grad_output)
    def outer(x):
        return inner(x) * 1

    x = noise(3)
    outer(x).sum().backward()
    exactly(x.grad, torch.full_like(x, 5.0).detach())


def test_recursive_forward_has_the_residuals_of_each_depth():
    seen = []

    @go.custom_backward(lambda grad_output, depth, vjp: (seen.append(depth), vjp(grad_output))[1])
    def nested(x, levels):
        y = nested(x, levels - 1) if levels else x
        return go.save_for_backward(y * 2, depth=levels)

    x = noise(3)
    nested(x, 2).sum().backward()
    assert seen == [2, 1, 0]
    exactly(x.grad, torch.full_like(x, 8.0).detach())


def test_two_calls_before_two_backwards_keep_their_own():
    x, z = noise(5), noise(5)
    y, w = relu(x), relu(z)
    w.sum().backward()
    y.sum().backward()
    exactly((x.grad, z.grad), ((x.detach() > 0).double(), (z.detach() > 0).double()))


def test_later_hand_over_of_a_name_wins():
    @go.custom_backward(lambda grad_output, k: k * grad_output)
    def twice(x):
        go.save_for_backward(None, k=1)
        return go.save_for_backward(x * 2, k=9)

    x = noise(3)
    twice(x).sum().backward()
    exactly(x.grad, torch.full_like(x, 9.0).detach())


def test_hand_over_may_go_around_a_part_of_the_result():
    @go.custom_backward(lambda grad_output, k: k * grad_output[0])
    def parts(x):
        return go.save_for_backward(x * 2, k=9), "text"

    x = noise(3)
    parts(x)[0].sum().backward()
    exactly(x.grad, torch.full_like(x, 9.0).detach())


def test_threads_do_not_meet():
    barrier, errors = threading.Barrier(4), []

    @go.custom_backward(lambda grad_output, k: k * grad_output)
    def handing(x, k):
        barrier.wait()
        go.save_for_backward(None, k=k)
        barrier.wait()
        return x * 2

    @go.custom_backward(lambda grad_output, residual: residual * grad_output)
    def handing_tensor(x, k):
        barrier.wait()
        result = go.save_for_backward(x * 2, residual=torch.full_like(x, k))
        barrier.wait()
        return result

    def work(k):
        try:
            for function in (handing, handing_tensor) * 5:
                x = torch.ones(3, requires_grad=True)
                function(x, k).sum().backward()
                exactly(x.grad, torch.full((3,), float(k)))
        except BaseException as error:  # carried to the main thread
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=work, args=(k,)) for k in (2, 3, 5, 7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors


# --- any value ---

VALUES = {
    "number": 3.0,
    "text": "text",
    "none": None,
    "list of tensors": [torch.ones(2), torch.zeros(3)],
    "dict": {"a": torch.arange(3), "b": "text"},
    "integer tensor": torch.arange(4),
    "sparse": torch.eye(3).to_sparse(),
    "function": torch.sin,
    "empty tuple": (),
}


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
def test_residual_of_any_kind_arrives_as_it_was(value):
    seen = []

    @go.custom_backward(lambda grad_output, value: (seen.append(value), grad_output)[1])
    def handing(x):
        return go.save_for_backward(x * 2, value=value)

    handing(noise(3)).sum().backward()
    assert type(seen[0]) is type(value)
    given, expected = (torch.utils._pytree.tree_leaves(each) for each in (seen[0], value))
    assert len(given) == len(expected)
    for one, other in zip(given, expected, strict=True):
        if isinstance(other, torch.Tensor):
            exactly(one.detach().to_dense(), other.to_dense())
        else:
            assert one == other


@pytest.mark.parametrize("what", ["input", "output", "view of the input", "inner result"])
def test_residual_that_is_no_tensor_of_its_own_arrives(what):
    @go.custom_backward(lambda grad_output, kept: 7 * grad_output * kept.sum())
    def handing(x):
        y = x * 2
        z = y * 1
        kept = {"input": x, "output": z, "view of the input": x[1:], "inner result": y}[what]
        return go.save_for_backward(z, kept=kept)

    x = noise(3)
    handing(x).sum().backward()
    at = x.detach()
    total = {"input": at.sum(), "view of the input": at[1:].sum()}.get(what, 2 * at.sum())
    closely(x.grad, (7 * total).expand(3))


def test_residual_changed_in_place_before_the_backward_is_refused():
    mask = torch.ones(3, dtype=torch.float64)
    handing = go.custom_backward(lambda grad_output, mask: grad_output * mask)(
        lambda x: go.save_for_backward(x * 2, mask=mask)
    )
    y = handing(noise(3))
    mask.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_residual_is_the_same_in_each_of_two_retained_backwards():
    x = noise(5)
    loss = relu(x).sum()
    loss.backward(retain_graph=True)
    loss.backward()
    exactly(x.grad, 2 * (x.detach() > 0).double())


def test_saved_tensors_hooks_see_the_residual():
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (packed.append(t.clone()), t)[1], lambda t: ~t):
        x = noise(5)
        y = relu(x)
    y.sum().backward()
    exactly(packed, [x.detach() > 0])
    exactly(x.grad, (x.detach() <= 0).double())


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_checkpointed_call_hands_over_again(use_reentrant):
    x = noise(5)
    checkpoint(lambda x: relu(x).sin(), x * 1, use_reentrant=use_reentrant).sum().backward()
    at = x.detach()
    closely(x.grad, (at > 0) * at.clamp(min=0).cos())


def test_residual_of_a_method_and_of_the_class_form():
    class Method(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(noise(3, grad=False))

        @go.custom_backward(
            lambda grad_output, weight, half: {"x": grad_output * half, "weight": 3 * grad_output * half}
        )
        def forward(self, x):
            return go.save_for_backward(x * self.weight, half=x / 2)

    @go.custom_backward
    class Class(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(noise(3, grad=False))

        def forward(self, x):
            return go.save_for_backward(x * self.weight, half=x / 2)

        def backward(self, grad_output, half):
            self.weight.grad = 3 * grad_output * half
            return grad_output * half

    for module in (Method(), Class()):
        x = noise(3)
        module(x).sum().backward()
        closely((x.grad, module.weight.grad), (x.detach() / 2, 1.5 * x.detach()))


# --- second derivatives ---


def squares(grad_output, square):
    return 3 * grad_output * square


def squares_with_vjp(grad_output, square, vjp):
    return 3 * grad_output * square


def cube(x):
    return go.save_for_backward(x**3, square=x**2)


def test_second_derivative_through_a_floating_residual_is_refused_with_a_way_out():
    x = noise(3)
    y = go.custom_backward(squares)(cube)(x)
    with pytest.raises(go.UnsupportedError, match=r"(?s)cube.*vjp"):
        torch.autograd.grad(y.sum(), x, create_graph=True)[0].sum().backward()


def test_first_derivative_with_create_graph_may_be_used_without_a_second():
    x = noise(3)
    y = go.custom_backward(squares)(cube)(x)
    (first,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    closely(first.detach(), 3 * x.detach() ** 2)


def test_second_derivative_by_the_gradient_alone_is_right_or_refused():
    x, g = noise(3), noise(3)
    y = go.custom_backward(squares)(cube)(x)
    try:
        (first,) = torch.autograd.grad(y, x, g, create_graph=True)
        (by_g,) = torch.autograd.grad(first.sum(), g)
    except go.UnsupportedError:
        return
    closely(by_g, 3 * x.detach() ** 2)


@pytest.mark.parametrize("unpack", [lambda k: k[0], lambda k: k["a"]], ids=["list", "dict"])
def test_second_derivative_through_a_nested_floating_residual_is_refused(unpack):
    @go.custom_backward(lambda grad_output, kept: 3 * grad_output * unpack(kept))
    def cube(x):
        return go.save_for_backward(x**3, kept=[x**2] if unpack.__code__.co_consts[-1] == 0 else {"a": x**2})

    x = noise(3)
    with pytest.raises(go.UnsupportedError, match=r"(?s)cube.*vjp"):
        torch.autograd.grad(cube(x).sum(), x, create_graph=True)[0].sum().backward()


def test_second_derivative_through_a_residual_is_right_where_vjp_is_asked_for():
    x, g = noise(3), noise(3)
    (first,) = torch.autograd.grad(go.custom_backward(squares_with_vjp)(cube)(x), x, g, create_graph=True)
    by_x, by_g = torch.autograd.grad(first.sum(), (x, g))
    closely((by_x, by_g), (6 * (g * x).detach(), 3 * x.detach() ** 2))


def test_third_derivative_through_a_residual_is_right_where_vjp_is_asked_for():
    @go.custom_backward(lambda grad_output, kept, vjp: 4 * grad_output * kept)
    def fourth_power(x):
        return go.save_for_backward(x**4, kept=x**3)

    x = noise(3)
    (first,) = torch.autograd.grad(fourth_power(x).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x, create_graph=True)
    (third,) = torch.autograd.grad(second.sum(), x)
    closely((second.detach(), third), (12 * x.detach() ** 2, 24 * x.detach()))


def test_second_derivative_through_a_residual_that_is_the_input_is_right_where_vjp_is_asked_for():
    x = noise(3)
    handing = go.custom_backward(lambda g, kept, vjp: 7 * g * kept)(lambda x: go.save_for_backward(x**3, kept=x))
    (first,) = torch.autograd.grad(handing(x).sum(), x, create_graph=True)
    exactly(torch.autograd.grad(first.sum(), x), (torch.full((3,), 7.0, dtype=torch.float64),))


def test_second_derivative_through_a_detached_residual_is_zero_where_vjp_is_asked_for():
    x = noise(3)
    handing = go.custom_backward(lambda g, x, kept, vjp: g * (kept + 7 * x))(
        lambda x: go.save_for_backward(x**3, kept=x.detach())
    )
    (first,) = torch.autograd.grad(handing(x).sum(), x, create_graph=True)
    exactly(torch.autograd.grad(first.sum(), x), (torch.full((3,), 7.0, dtype=torch.float64),))


@pytest.mark.parametrize(
    "residual",
    [lambda x: x > 0, lambda x: x.long(), lambda x: 3, lambda x: [x > 0]],
    ids=["boolean", "integer", "number", "list of boolean"],
)
def test_second_derivative_beside_a_residual_without_a_derivative_is_right(residual):
    @go.custom_backward(lambda grad_output, x, kept: grad_output * 3 * x**2)
    def cube(x):
        return go.save_for_backward(x**3, kept=residual(x))

    x = noise(3)
    (first,) = torch.autograd.grad(cube(x).sum(), x, create_graph=True)
    closely(torch.autograd.grad(first.sum(), x), (6 * x.detach(),))


def test_one_tensor_handed_over_under_two_names():
    @go.custom_backward(lambda grad_output, x, one, other, vjp: grad_output * one * other)
    def expanded(x):
        kept = x.exp()
        return go.save_for_backward(x * kept, one=kept, other=kept)

    x = noise(3)
    (first,) = torch.autograd.grad(expanded(x).sum(), x, create_graph=True)
    closely(first, (2 * x).exp())
    closely(torch.autograd.grad(first.sum(), x), (2 * (2 * x).exp(),))


def test_second_derivative_reaches_an_argument_by_a_residual_alone_that_the_rule_stops_the_gradient_of():
    @go.custom_backward(lambda grad_output, kept, vjp: {"x": grad_output * kept, "y": None})
    def product(x, y):
        return go.save_for_backward(x * y, kept=(x * y).sin())

    x, y = noise(3), noise(3)
    (first,) = torch.autograd.grad(product(x, y).sum(), x, create_graph=True)
    closely(first.detach(), (x * y).sin().detach())
    closely(torch.autograd.grad(first.sum(), y), ((x * (x * y).cos()).detach(),))


def test_gradient_of_a_tangent_through_a_residual_is_refused():
    @go.custom_backward(lambda grad_output, kept: grad_output * kept)
    def square(x):
        return go.save_for_backward(x**2, kept=2 * x)

    x = noise(3)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(square(forward_ad.make_dual(x, torch.ones_like(x)))).tangent
        closely(tangent.detach(), 2 * x.detach())
        with pytest.raises(go.UnsupportedError, match=r"second derivative of 'square' .* its forward hands over"):
            torch.autograd.grad(tangent.sum(), x)


@pytest.mark.parametrize("options", [{}, {"more": 1}], ids=["short path", "general path"])
def test_argument_that_comes_back_as_the_result_is_handed_over_as_the_argument(options):
    def short(x):
        return go.save_for_backward(x, kept=x)

    def general(x, **options):
        return go.save_for_backward(x, kept=x)

    call = go.custom_backward(lambda grad_output, kept: 5 * grad_output * kept)(general if options else short)
    x = float64(3.0, 4.0)
    (first,) = torch.autograd.grad(call(x, **options).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    exactly((first.detach(), second), (5 * x.detach(), float64(5.0, 5.0, grad=False)))


# --- the short path: a function whose code shows what it reaches, and tensors alone handed over ---


@pytest.fixture
def general_passes(monkeypatch):
    """The forwards, by name, whose result the general path has looked at."""
    if not can_call_directly():
        pytest.skip("there is no short path")
    seen = []
    finish = ForwardPass.finish

    def noting(self, *rest):
        seen.append(self.call.plan.forward.name)
        return finish(self, *rest)

    monkeypatch.setattr(ForwardPass, "finish", noting)
    return seen


@go.custom_backward(lambda grad_output, mask, slope: grad_output * slope * mask)
def leaky(x, factor=3.0):
    mask, slope = x > 0, x.cos()
    return go.save_for_backward(x * slope * factor, slope=slope, mask=mask, unused=slope)


def test_tensors_of_any_dtype_are_handed_over_on_the_short_path(general_passes):
    x = noise(5)
    y = leaky(x, factor=2.0)
    y.sum().backward()
    closely(y.detach(), (x * x.cos() * 2).detach())
    closely(x.grad, (x.cos() * (x > 0)).detach())
    assert not isinstance(y, tuple)
    assert general_passes == []


def test_second_derivatives_there_are_those_of_the_rule_or_refused(general_passes):
    x, grad = noise(5), noise(5)
    first = torch.autograd.grad(leaky(x), x, grad, create_graph=True)[0]
    closely(first.detach(), (grad * x.cos() * (x > 0)).detach())
    closely(torch.autograd.grad(first.sum(), grad, retain_graph=True)[0], (x.cos() * (x > 0)).detach())
    with pytest.raises(go.UnsupportedError, match=r"second derivative of 'leaky' .* its forward hands over"):
        torch.autograd.grad(first.sum(), x)
    assert general_passes == []


class Nothing(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y):
        return y.clone()

    @staticmethod
    def backward(ctx, grad_output):
        return None


def test_no_gradient_is_zeros_there(general_passes):
    x = noise(5)
    (found,) = torch.autograd.grad(Nothing.apply(leaky(x)).sum(), x)
    exactly(found, torch.zeros(5, dtype=torch.float64))
    assert general_passes == []


@go.custom_backward(lambda grad_output, n, kept: grad_output * n * kept)
def handing(x, what):
    if what == "number":
        return go.save_for_backward(x * 2, n=3, kept=x.cos())
    if what == "input":
        return go.save_for_backward(x * 2, n=torch.ones((), dtype=x.dtype), kept=x)
    if what == "view":
        return go.save_for_backward(x.view(-1), n=torch.ones((), dtype=x.dtype), kept=x.cos())
    return go.save_for_backward((x * 2, x), n=torch.ones((), dtype=x.dtype), kept=x.cos())


@pytest.mark.parametrize(
    ("what", "expected"),
    [("number", lambda x: 3 * x.cos()), ("input", lambda x: x), ("view", lambda x: x.cos())],
)
def test_other_values_and_results_go_the_general_way_without_another_forward(what, expected, general_passes):
    x = noise(5)
    handing(x, what).sum().backward()
    closely(x.grad, expected(x).detach())
    assert general_passes == ["handing"]


@go.custom_backward(lambda grad_output, y, mask: grad_output * y * mask)
def exponential(x):
    y = x.exp()
    return go.save_for_backward(y, y=y, mask=y > 1)


def test_result_may_be_handed_over_too(general_passes):
    x = noise(5)
    y = exponential(x)
    y.sum().backward()
    closely(x.grad, (x.exp() * (x > 0)).detach())
    assert general_passes == []


@pytest.mark.parametrize("short", [True, False])
@pytest.mark.parametrize("answer", [lambda kept: (kept,), lambda kept: {"x": kept}])
def test_tensor_that_is_given_back_as_a_gradient_is_not_added_to(answer, short, general_passes):
    def hands_over(x, table):
        return go.save_for_backward(x * 3, kept=table)

    def with_options(x, table, **options):
        return go.save_for_backward(x * 3, kept=table)

    call = go.custom_backward(lambda grad_output, kept: answer(kept))(hands_over if short else with_options)
    x, kept = float64(3.0, 4.0), float64(1.0, 2.0, grad=False)
    for _ in range(3):
        call(x, kept).sum().backward()
    exactly((kept, x.grad), (float64(1.0, 2.0, grad=False), float64(3.0, 6.0, grad=False)))
    assert (general_passes == []) is short


def test_tensor_that_is_given_back_for_the_only_argument_is_not_added_to():
    kept = float64(1.0, 2.0, grad=False)
    call = go.custom_backward(lambda grad_output, kept: kept)(lambda x: go.save_for_backward(x * 3, kept=kept))
    x = float64(3.0, 4.0)
    for _ in range(3):
        call(x).sum().backward()
    exactly((kept, x.grad), (float64(1.0, 2.0, grad=False), float64(3.0, 6.0, grad=False)))


@pytest.mark.parametrize("short", [True, False])
def test_result_that_is_given_back_as_a_gradient_is_not_added_to(short, general_passes):
    call = go.custom_backward(lambda grad_output, output: output)(
        (lambda x: x * 3) if short else (lambda x, **o: x * 3)
    )
    x = float64(3.0, 4.0)
    y = call(x)
    y.sum().backward()
    call(x).sum().backward()
    exactly((y.detach(), x.grad), (float64(9.0, 12.0, grad=False), float64(18.0, 24.0, grad=False)))
    assert (general_passes == []) is short


def test_missing_value_is_the_same_error_there():
    @go.custom_backward(lambda grad_output, mask: grad_output * mask)
    def sometimes(x, hand_over):
        if hand_over:
            return go.save_for_backward(x * 2, mask=x > 0)
        return go.save_for_backward(x * 2, maks=x > 0)

    x = noise(5)
    sometimes(x, True).sum().backward()
    with pytest.raises(go.RuleSignatureError, match=r"asks for 'mask', .* Did you mean 'maks'"):
        sometimes(x, False)
    with pytest.raises(go.RuleSignatureError, match=r"asks for 'mask'"):
        go.custom_backward(lambda grad_output, mask: grad_output * mask)(lambda x: go.save_for_backward(x * 2))(x)


def test_forward_that_raises_there_leaves_nothing_open(general_passes):
    @go.custom_backward(masked)
    def failing(x, fail):
        if fail:
            raise ValueError("mine")
        return go.save_for_backward(x * 2, mask=x > 0)

    with pytest.raises(ValueError, match="mine"):
        failing(noise(3), True)
    kept = torch.ones(2)
    reference = weakref.ref(kept)
    go.save_for_backward(None, kept=kept)
    del kept
    assert reference() is None
    assert general_passes == []


def test_what_an_inner_call_hands_over_stays_with_it_there():
    @go.custom_backward(lambda grad_output, mask: 10 * grad_output * mask)
    def outer(x):
        return go.save_for_backward(relu(x), mask=x < 0)

    x = noise(5)
    outer(x).sum().backward()
    exactly(x.grad, 10 * (x.detach() < 0).double())


def test_what_an_inner_call_hands_over_where_no_graph_is_recorded_stays_with_it():
    @go.custom_backward(lambda grad_output, mask: 10 * grad_output * mask)
    def outer(x):
        go.save_for_backward(None, mask=x < 0)
        with torch.no_grad():
            positive = relu(x)
        return x + positive

    x = noise(5)
    outer(x).sum().backward()
    exactly(x.grad, 10 * (x.detach() < 0).double())


def test_nothing_is_handed_over_without_a_gradient(general_passes):
    x = noise(5, grad=False)
    y = leaky(x)
    assert not y.requires_grad
    with torch.no_grad():
        assert not leaky(noise(5)).requires_grad
    assert general_passes == []


# --- tensors within objects ---


class Slotted:
    __slots__ = ("kept",)

    def __init__(self, kept):
        self.kept = kept


OBJECTS = {
    "a namespace": lambda kept: SimpleNamespace(kept=kept),
    "slots": Slotted,
    "in a list": lambda kept: [SimpleNamespace(kept=kept)],
    "within another": lambda kept: SimpleNamespace(parts=(SimpleNamespace(kept=kept),)),
}


def kept_in(handed):
    handed = handed[0] if isinstance(handed, list) else handed
    return handed.parts[0].kept if hasattr(handed, "parts") else handed.kept


def by_object(grad_output, handed):
    return 2 * grad_output * kept_in(handed)


def by_object_with_vjp(grad_output, handed, vjp):
    return 2 * grad_output * kept_in(handed)


@pytest.mark.parametrize("rule", [by_object, by_object_with_vjp])
@pytest.mark.parametrize("computed", [lambda x: x, lambda x: x * 1], ids=["argument", "computed"])
@pytest.mark.parametrize("within", OBJECTS.values(), ids=OBJECTS)
def test_second_derivative_through_a_tensor_within_an_object_is_refused(within, computed, rule):
    @go.custom_backward(rule)
    def square(x):
        return go.save_for_backward(x**2, handed=within(computed(x)))

    x = noise(3)
    (first,) = torch.autograd.grad(square(x).sum(), x, create_graph=True)
    closely(first.detach(), 2 * x.detach())
    with pytest.raises(go.UnsupportedError, match=r"second derivative of 'square' .* through 'handed.*kept', which"):
        first.sum().backward()


def test_second_derivative_through_a_tensor_within_an_object_is_refused_in_a_transform():
    @go.custom_backward(by_object)
    def square(x):
        return go.save_for_backward(x**2, handed=Slotted(x))

    x = noise(()).detach()
    closely(torch.func.grad(square)(x), 2 * x)
    with pytest.raises(go.UnsupportedError, match=r"second derivative of 'square' .* through 'handed\.kept', which"):
        torch.func.grad(torch.func.grad(square))(x)


@pytest.mark.parametrize(
    ("rule", "constant"),
    [
        (lambda grad_output, x, handed: grad_output * x * handed.kept, torch.tensor([0, 1, 2])),
        (lambda grad_output, x, handed, vjp: grad_output * x * handed.kept, torch.tensor([0.0, 1.0, 2.0])),
    ],
    ids=["integers", "known to the graph as a constant"],
)
def test_second_derivative_beside_a_constant_within_an_object_is_right(rule, constant):
    x = noise(3)
    square = go.custom_backward(rule)(lambda x: go.save_for_backward(x**2, handed=Slotted(constant)))
    (first,) = torch.autograd.grad(square(x).sum(), x, create_graph=True)
    closely(torch.autograd.grad(first.sum(), x), (constant.double(),))


@pytest.mark.skipif(counted_once is None, reason="needs a private name")
def test_tensor_within_an_object_that_is_written_into_before_the_backward_is_refused():
    square = go.custom_backward(by_object)(lambda x: go.save_for_backward(x**2, handed=Slotted(x)))
    given = noise(3) * 1
    y = square(given)
    with torch.no_grad():
        given.mul_(2)
    with pytest.raises(
        go.UnsupportedError, match=r"must have 'handed\.kept' as its forward handed it over.*Hand over a copy"
    ):
        y.sum().backward()


def test_call_that_hands_over_an_object_is_released_without_the_garbage_collector():
    square = go.custom_backward(by_object)(lambda x: go.save_for_backward(x**2, handed=Slotted(x * 1)))
    gc.collect()
    gc.disable()
    try:
        y = square(noise(3))
        node = weakref.ref(y.grad_fn)
        del y
        assert node() is None
    finally:
        gc.enable()
