"""Decorated callables in autograd's own machinery. Conformance, group autograd."""

import threading
import warnings

import pytest
import torch
from oracles import closely, exactly, float64, noise
from torch import nn
from torch.utils.checkpoint import checkpoint

import gradoverride as go

# Rules that are true derivatives, so that finite differences are the oracle. Each is (function, number of inputs).


@go.custom_backward(lambda grad_output, x: grad_output * 3 * x**2)
def cube(x):
    return x**3


@go.custom_backward(lambda grad_output, output: grad_output * output)
def exponential(x):
    return x.exp()


@go.custom_backward(lambda grad_output, a, b: (grad_output * b.cos(), grad_output * -a * b.sin()))
def polar(a, b):
    return a * b.cos()


@go.custom_backward(lambda grad_output, vjp: vjp(grad_output))
def through_vjp(a, b):
    return a * b.sin() + a**2


@go.custom_backward(lambda grad_output, vjp: vjp.by_name(grad_output))
def through_vjp_by_name(a, b):
    return a * b.sin() + a**2


@go.custom_backward(lambda grad_output, x: 2 * x * grad_output["square"] + 3 * x**2 * grad_output["more"][0])
def powers(x):
    return {"square": x**2, "more": [x**3, None]}


@go.custom_backward(lambda grad_output, x, mask: grad_output * mask * 3 * x**2)
def masked_cube(x):
    mask = (x > 0).to(x.dtype)
    return go.save_for_backward(mask * x**3, mask=mask)


@go.custom_backward(lambda grad_output, vjp: vjp(grad_output))
def outer_of_two(x):
    return cube(x).sin()


surrogate_tanh = go.straight_through(torch.tanh, surrogate=torch.tanh)
identity = go.straight_through(lambda x: x * 1)

TRUE = {
    "argument": (cube, 1),
    "output": (exponential, 1),
    "two arguments": (polar, 2),
    "vjp": (through_vjp, 2),
    "vjp.by_name": (through_vjp_by_name, 2),
    "dict result": (lambda x: tuple(v for v in (powers(x)["square"], powers(x)["more"][0])), 1),
    "residual": (masked_cube, 1),
    "nested": (outer_of_two, 1),
    "straight_through": (identity, 1),
    "surrogate": (surrogate_tanh, 1),
}


@pytest.fixture(params=TRUE)
def true_case(request):
    function, count = TRUE[request.param]
    return function, tuple(noise(3) for _ in range(count))


def test_gradcheck(true_case):
    function, inputs = true_case
    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("kind", [kind for kind in TRUE if kind != "residual"])
def test_gradgradcheck(kind):
    function, count = TRUE[kind]
    assert torch.autograd.gradgradcheck(function, tuple(noise(3) for _ in range(count)))


def test_gradgradcheck_with_residuals_and_the_graph_that_vjp_keeps():
    @go.custom_backward(lambda grad_output, square, vjp: grad_output * 3 * square)
    def cube(x):
        return go.save_for_backward(x**3, square=x * x)

    assert torch.autograd.gradgradcheck(cube, (noise(3),))


def test_gradgradcheck_with_a_boolean_residual():
    @go.custom_backward(lambda grad_output, x, mask: grad_output * mask * 3 * x**2)
    def masked_cube(x):
        return go.save_for_backward((x > 0) * x**3, mask=x > 0)

    assert torch.autograd.gradgradcheck(masked_cube, (noise(3),))


def test_second_derivative_through_a_residual_without_a_graph_is_refused():
    x = noise(3)
    with pytest.raises(go.UnsupportedError, match=r"(?s)masked_cube.*hands over.*vjp"):
        torch.autograd.grad(masked_cube(x).sum(), x, create_graph=True)[0].sum().backward()


def test_batched_gradients_pass_gradcheck(true_case):
    function, inputs = true_case
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*vmap.*", category=UserWarning)
        assert torch.autograd.gradcheck(function, inputs, check_batched_grad=True)


def test_third_derivative():
    x = noise(3)
    (first,) = torch.autograd.grad(cube(x).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x, create_graph=True)
    (third,) = torch.autograd.grad(second.sum(), x)
    closely(third, torch.full_like(third, 6.0))


def test_third_derivative_through_vjp():
    cubed = go.custom_backward(lambda grad_output, vjp: vjp(grad_output))(lambda x: x**3)
    x = noise(3)
    (first,) = torch.autograd.grad(cubed(x).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x, create_graph=True)
    (third,) = torch.autograd.grad(second.sum(), x)
    closely(third, torch.full_like(third, 6.0))


def test_second_derivative_is_that_of_the_rule_as_written():
    clipped = go.custom_backward(lambda grad_output, vjp: vjp(grad_output) ** 2)(lambda x: x**3)
    x, grad_output = noise(3), noise(3)
    (first,) = torch.autograd.grad(clipped(x), x, grad_output, create_graph=True)
    exact = grad_output.detach() ** 2 * 9 * x.detach() ** 4  # the rule: (grad * 3 x^2)^2
    closely(first.detach(), exact)
    second_x, second_grad = torch.autograd.grad(first.sum(), (x, grad_output))
    closely(second_x, grad_output.detach() ** 2 * 36 * x.detach() ** 3)
    closely(second_grad, 2 * grad_output.detach() * 9 * x.detach() ** 4)


# Forms with gradients of their own, so that a dropped rule shows


def seven_times(grad_output):
    return 7 * grad_output


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(float64(2.0, 2.0, 2.0))

    @go.custom_backward(lambda grad_output, x, weight: {"x": 7 * grad_output, "weight": 5 * grad_output * x})
    def forward(self, x):
        return x * self.weight


@go.custom_backward
class ScaleByClass(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(float64(2.0, 2.0, 2.0))

    def forward(self, x):
        return x * self.weight

    def backward(self, grad_output, x):
        self.weight.grad = 5 * grad_output * x
        return 7 * grad_output


FORMS = {
    "function": lambda: go.custom_backward(seven_times)(lambda x: x**2),
    "function with x": lambda: go.custom_backward(lambda grad_output, x: grad_output * (x + (7 - x)))(lambda x: x**2),
    "vjp": lambda: go.custom_backward(lambda grad_output, vjp: vjp(grad_output) * 3.5)(lambda x: 2 * x),
    "module": Scale,
    "class": ScaleByClass,
    "straight_through": lambda: lambda x: go.straight_through(torch.sign)(x) * 7,
    "surrogate": lambda: go.straight_through(torch.sign, surrogate=lambda x: 7 * x),
}


@pytest.fixture(params=FORMS)
def form(request):
    return FORMS[request.param]()


@pytest.fixture
def x():
    return noise(3)


def sevens(factor=1.0):
    return torch.full((3,), 7.0 * factor, dtype=torch.float64)


def test_autograd_grad_of_an_input(form, x):
    closely(torch.autograd.grad(form(x).sum(), x), (sevens(),))
    assert x.grad is None


def test_retained_graph_gives_the_same_gradient_three_times(form, x):
    loss = form(x).sum()
    for retain in (True, True, False):
        closely(torch.autograd.grad(loss, x, retain_graph=retain), (sevens(),))


@pytest.mark.parametrize("vectorize", [False, True], ids=["loop", "vectorized"])
def test_functional_jacobian(form, x, vectorize):
    jacobian = torch.autograd.functional.jacobian(form, x.detach(), vectorize=vectorize)
    closely(jacobian, torch.diag(sevens()))


def test_batch_of_incoming_gradients(form, x):
    rows = noise(5, 3, grad=False)
    closely(torch.autograd.grad(form(x), x, rows, is_grads_batched=True), (7 * rows,))


class SineOfWeighted(nn.Module):
    """Its rule leaves the weight to autograd."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(float64(1.0, 2.0, 3.0))

    @go.custom_backward(lambda grad_output: grad_output)
    def forward(self, x):
        return torch.sin(x * self.weight)


def with_vjp(x):
    return go.custom_backward(lambda grad_output, vjp: 3 * vjp(grad_output))(lambda x: x**3)(x)


@pytest.mark.parametrize("make", [lambda: with_vjp, SineOfWeighted], ids=["vjp", "parameter left to autograd"])
@pytest.mark.parametrize("batched", [False, True], ids=["one at a time", "a batch at once"])
def test_second_derivative_of_gradients_of_a_batch_is_right_or_refused(make, batched, x):
    call = make()
    wanted = [x, *(call.parameters() if isinstance(call, nn.Module) else ())]
    rows = torch.eye(3, dtype=torch.float64)

    def second():
        if batched:
            first = torch.autograd.grad(call(x), wanted, rows, is_grads_batched=True, create_graph=True)
        else:
            first = torch.autograd.grad(call(x), wanted, rows[0] + rows[1] + rows[2], create_graph=True)
        return torch.autograd.grad(sum([grad.sum() for grad in first]), wanted[-1])

    if batched:
        with pytest.raises(go.UnsupportedError, match=r"computed for a batch at once .* Leave that out"):
            second()
    elif call is with_vjp:
        closely(second(), (18 * x.detach(),))
    else:  # of x * cos(x * weight) with respect to the weight
        closely(second(), (-(x**2).detach() * torch.sin(x * call.weight).detach(),))


def test_second_derivative_of_a_batch_is_right_where_the_rule_is_a_formula(x):
    ruled = go.custom_backward(lambda grad_output, x: 5 * grad_output * x**2)(lambda x: x**3)
    (found,) = torch.autograd.functional.jacobian(ruled, (x,), create_graph=True, vectorize=True)
    closely(torch.autograd.grad(found.sum(), x), (10 * x.detach(),))


def test_graph_that_was_not_retained_is_freed(x):
    loss = cube(x).sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_graph_behind_a_vjp_that_was_not_retained_is_freed(x):
    loss = go.custom_backward(lambda grad_output, vjp: vjp(grad_output))(torch.exp)(x).sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_two_forwards_then_two_backwards(form):
    first, second = noise(3), noise(3)
    y, z = form(first), form(second)
    (10 * z).sum().backward()
    y.sum().backward()
    closely(first.grad, sevens())
    closely(second.grad, sevens(10))


def test_two_uses_in_one_graph_add_up(form, x):
    (form(x) + 10 * form(x)).sum().backward()
    closely(x.grad, sevens(11))


def test_two_uses_in_a_row_multiply(form, x):
    form(form(x)).sum().backward()
    closely(x.grad, sevens(7))


def test_anomaly_mode_changes_nothing(form, x):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Anomaly Detection", category=UserWarning)
        with torch.autograd.detect_anomaly():
            form(x).sum().backward()
    closely(x.grad, sevens())


def test_anomaly_mode_finds_a_nan_of_the_rule(x):
    broken = go.custom_backward(lambda grad_output: grad_output * float("nan"))(torch.exp)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        with torch.autograd.detect_anomaly(), pytest.raises(RuntimeError, match=r"expBackward.* nan"):
            broken(x).sum().backward()


def test_tensor_hooks_on_input_and_result_fire_once(form, x):
    at_input, at_result = [], []
    x.register_hook(at_input.append)
    y = form(x)
    y.register_hook(at_result.append)
    (10 * y).sum().backward()
    closely(at_input, [sevens(10)])
    exactly([grad / 10 for grad in at_result], [torch.ones(3, dtype=torch.float64)])


def test_hook_that_changes_the_results_gradient_is_obeyed(form, x):
    y = form(x)
    y.register_hook(lambda grad: 10 * grad)
    y.sum().backward()
    closely(x.grad, sevens(10))


def test_retained_grad_of_the_result(form, x):
    y = form(x)
    y.retain_grad()
    (10 * y).sum().backward()
    exactly(y.grad, torch.full((3,), 10.0, dtype=torch.float64))


@pytest.mark.parametrize("module", [Scale, ScaleByClass], ids=["module", "class"])
def test_module_hooks_fire_as_ever(module, x):
    layer, seen = module(), []
    layer.register_forward_pre_hook(lambda module, args: seen.append("pre"))
    layer.register_forward_hook(lambda module, args, output: seen.append("post"))
    layer.register_full_backward_hook(lambda module, grad_input, grad_output: seen.append(grad_input[0].clone()))
    layer(x).sum().backward()
    assert seen[:2] == ["pre", "post"]
    closely(seen[2:], [sevens()])


@go.custom_backward(lambda grad_output, x: 7 * grad_output * x)
def ruled_square(x):
    return x.floor()


def test_saved_tensors_hooks_see_what_the_rule_asks_for(x):
    packed, unpacked = [], []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: (packed.append(t.detach().clone()), t)[1], lambda t: (unpacked.append(1), t)[1]
    ):
        y = ruled_square(x)
    y.sum().backward()
    exactly(packed, [x.detach()])
    assert len(unpacked) == 1


def test_saved_tensors_hooks_may_replace_what_was_saved(x):
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach() * 10, lambda t: t):
        y = ruled_square(x)
    y.sum().backward()
    closely(x.grad, 7 * 10 * x.detach())


def test_saved_tensors_hooks_see_nothing_of_a_rule_of_the_gradient_alone(x):
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t), lambda t: t):
        go.custom_backward(seven_times)(torch.exp)(x)
        go.straight_through(torch.sign)(x)
    assert packed == []


def test_save_on_cpu_changes_nothing(form, x):
    with torch.autograd.graph.save_on_cpu():
        y = form(x)
    y.sum().backward()
    closely(x.grad, sevens())


# Kinds of numbers


def square_of_complex_backward(grad_output, z):
    return grad_output * (2 * z).conj()


def test_complex_rule_passes_gradcheck():
    square = go.custom_backward(square_of_complex_backward)(lambda z: z * z)
    z = torch.randn(3, dtype=torch.complex128, requires_grad=True)
    assert torch.autograd.gradcheck(square, (z,))
    assert torch.autograd.gradgradcheck(square, (z,))


def test_complex_vjp_passes_gradcheck():
    product = go.custom_backward(lambda grad_output, vjp: vjp(grad_output))(lambda z, w: z * w.conj())
    z, w = (torch.randn(3, dtype=torch.complex128, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(product, (z, w))
    assert torch.autograd.gradgradcheck(product, (z, w))


def test_real_result_of_a_complex_argument_passes_gradcheck():
    @go.custom_backward(lambda grad_output, z: 2 * grad_output * z)
    def power(z):
        return z.real**2 + z.imag**2

    assert torch.autograd.gradcheck(power, (torch.randn(3, dtype=torch.complex128, requires_grad=True),))


FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("kind", ["function", "vjp", "straight_through", "surrogate"])
def test_gradient_has_the_dtype_of_its_input(kind, dtype):
    x = torch.tensor([0.5, -2.0, 3.0], dtype=dtype, requires_grad=True)
    y = FORMS[kind]()(x)
    y.sum().backward()
    assert y.dtype == dtype
    exactly(x.grad, torch.full((3,), 7.0, dtype=dtype))


def test_forward_that_changes_the_dtype_gives_a_gradient_in_that_of_the_input():
    x = torch.randn(3, requires_grad=True)
    y = go.custom_backward(seven_times)(lambda x: x.double())(x)
    y.sum().backward()
    assert y.dtype == torch.float64
    exactly(x.grad, torch.full((3,), 7.0))


@pytest.mark.parametrize("shape", [(), (0,), (1, 1), (2, 0, 3)], ids=str)
def test_scalars_and_empty_tensors(shape):
    x = torch.randn(shape, requires_grad=True)
    go.custom_backward(lambda grad_output, x: 7 * grad_output + 0 * x)(lambda x: x**2)(x).sum().backward()
    exactly(x.grad, torch.full(shape, 7.0))


# Replays


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_checkpointed_block_keeps_the_rule(form, x, use_reentrant):
    y = checkpoint(lambda x: 10 * form(x).sin(), x * 1, use_reentrant=use_reentrant)
    y.sum().backward()
    closely(x.grad, 70 * torch.cos(form(x.detach()).detach()))


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_checkpointed_module_has_its_parameter_gradients(x, use_reentrant):
    for layer in (Scale(), ScaleByClass()):
        checkpoint(layer, x * 1, use_reentrant=use_reentrant).sum().backward()
        exactly(layer.weight.grad, 5 * x.detach())


def test_checkpoint_inside_a_decorated_forward_with_vjp(x):
    @go.custom_backward(lambda grad_output, vjp: 7 * vjp(grad_output))
    def forward(x):
        return checkpoint(lambda x: x.sin(), x, use_reentrant=False)

    forward(x).sum().backward()
    closely(x.grad, 7 * x.detach().cos())


# Threads


def test_four_threads_through_one_module_do_not_meet():
    layer = ScaleByClass()
    inputs = [noise(3) for _ in range(4)]
    barrier, errors = threading.Barrier(4), []

    def work(x, factor):
        try:
            for _ in range(20):
                barrier.wait()
                (grad_x, grad_weight) = torch.autograd.grad((factor * layer(x)).sum(), (x, layer.weight))
                exactly((grad_x, grad_weight), (sevens(factor), factor * 5 * x.detach()))
        except BaseException as error:  # carried to the main thread
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=work, args=(x, 2.0**i)) for i, x in enumerate(inputs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert layer.weight.grad is None


def test_four_threads_through_one_function_with_vjp_do_not_meet():
    form = go.custom_backward(lambda grad_output, vjp: vjp(7 * grad_output))(torch.sin)
    inputs, results = [noise(100) for _ in range(4)], {}

    def work(index):
        for _ in range(20):
            results[index] = torch.autograd.grad(form(inputs[index]).sum(), inputs[index])[0]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, x in enumerate(inputs):
        closely(results[index], 7 * x.detach().cos())


def test_backward_in_another_thread_than_the_forward(form, x):
    loss = form(x).sum()
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()
    closely(x.grad, sevens())


# What must not be touched


def test_rule_does_not_spoil_the_gradient_of_a_sibling(x):
    def writes(grad_output):
        return grad_output.mul_(7)

    y = go.custom_backward(writes)(lambda x: x * 2)(x)
    given = torch.ones(3, dtype=torch.float64)
    try:
        y.backward(given)
    except RuntimeError:
        pass  # "raises, or works on a copy"
    else:
        exactly(x.grad, sevens())
    exactly(given, torch.ones(3, dtype=torch.float64))


def test_result_that_the_rule_asks_for_and_that_is_changed_is_an_error(x):
    y = exponential(x)
    y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_result_that_the_rule_does_not_ask_for_may_be_changed(x):
    y = go.custom_backward(seven_times)(torch.exp)(x)
    y.mul_(3)
    y.sum().backward()
    closely(x.grad, sevens(3))


def test_exception_in_a_rule_leaves_the_next_backward_right(x):
    fail = [True]

    def backward(grad_output, vjp):
        if fail.pop() if fail else False:
            raise ValueError("not yet")
        return 7 * vjp(grad_output)

    form = go.custom_backward(backward)(torch.sin)
    with pytest.raises(ValueError, match="not yet"):
        form(x).sum().backward()
    assert x.grad is None
    form(x).sum().backward()
    closely(x.grad, 7 * x.detach().cos())


@pytest.mark.parametrize("inner", [torch.no_grad, torch.enable_grad], ids=["no_grad", "enable_grad"])
def test_grad_mode_is_as_before_after_the_call(form, x, inner):
    with inner():
        before = torch.is_grad_enabled()
        form(x)
        assert torch.is_grad_enabled() == before


def test_autocast_state_of_the_forward_holds_in_the_rule():
    weight = torch.randn(4, 4)

    def backward(grad_output):
        return (7 * grad_output.float() @ weight).float()

    seen = []
    form = go.custom_backward(
        lambda grad_output: (seen.append(torch.is_autocast_enabled("cpu")), backward(grad_output))[1]
    )
    linear = form(lambda x: x @ weight)
    x = torch.randn(2, 4, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = linear(x)
    outside = linear(x)
    assert inside.dtype == torch.bfloat16
    inside.sum().backward()
    outside.sum().backward()
    assert seen == [True, False]


@pytest.mark.parametrize("forward", [lambda x: x, lambda x: x * 1, lambda x: x.view_as(x)])
@pytest.mark.parametrize("rule", [lambda g, output: g * output.cos(), lambda g, output, vjp: vjp(g * output.cos())])
def test_output_that_is_the_argument_as_it_stands_has_the_derivative_of_the_rule(forward, rule, x):
    (grad,) = torch.autograd.grad(go.custom_backward(rule)(forward)(x).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), x)
    closely(second, -x.detach().sin() * x.detach().cos())
