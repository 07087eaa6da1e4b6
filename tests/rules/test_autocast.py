"""Autocast: a rule runs under the state of its forward, wherever the backward is called."""

import contextlib
import threading

import pytest
import torch
from oracles import exactly
from torch import nn
from torch.utils.checkpoint import checkpoint

import gradoverride as go


def bf16(enabled=True):
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled)


def state():
    return torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")


def leaf(*sizes, dtype=torch.float32):
    return torch.randn(*sizes, dtype=dtype).requires_grad_()


STATES = {
    "none": contextlib.nullcontext,
    "bfloat16": bf16,
    "float16": lambda: torch.autocast("cpu", dtype=torch.float16),
    "switched off": lambda: bf16(enabled=False),
}


def observed(seen):
    return {
        "gradient alone": lambda: go.custom_backward(lambda g: (seen.append(state()), g)[1])(lambda x: x * 2),
        "argument": lambda: go.custom_backward(lambda g, x: (seen.append(state()), g * x)[1])(lambda x: x * 2),
        "vjp": lambda: go.custom_backward(lambda g, vjp: (seen.append(state()), vjp(g))[1])(lambda x: x * 2),
        "residual": lambda: go.custom_backward(lambda g, k: (seen.append(state()), g * k)[1])(
            lambda x: go.save_for_backward(x * 2, k=x)
        ),
        "dict result": lambda: (lambda f: lambda x: f(x)["y"])(
            go.custom_backward(lambda g: (seen.append(state()), g["y"])[1])(lambda x: {"y": x * 2})
        ),
        "method": lambda: observing_module(seen),
        "class": lambda: observing_class(seen),
    }


def observing_module(seen):
    class Observing(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        @go.custom_backward(lambda g, weight, x: (seen.append(state()), {"x": g * weight, "weight": g * x})[1])
        def forward(self, x):
            return x * self.weight

    return Observing()


def observing_class(seen):
    @go.custom_backward
    class Observing(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, x):
            return x * self.weight

        def backward(self, grad_output, x):
            seen.append(state())
            self.weight.grad = grad_output * x
            return grad_output * self.weight

    return Observing()


def expected_state(context):
    with context():
        enabled, dtype = state()
    return enabled, dtype


@pytest.mark.parametrize("around", STATES, ids=lambda name: f"backward in {name}")
@pytest.mark.parametrize("forward", STATES, ids=lambda name: f"forward in {name}")
@pytest.mark.parametrize("kind", observed([]))
def test_rule_runs_under_the_state_of_its_forward(kind, forward, around):
    seen = []
    function = observed(seen)[kind]()
    with STATES[forward]():
        y = function(leaf(3)).sum()
    with STATES[around]():
        before = state()
        y.backward()
        assert state() == before
    ((enabled, dtype),) = seen
    wanted, wanted_dtype = expected_state(STATES[forward])
    assert enabled == wanted
    assert not enabled or dtype == wanted_dtype


def test_state_is_as_before_after_a_rule_that_raised():
    def broken(g):
        raise ArithmeticError

    with bf16():
        y = go.custom_backward(broken)(lambda x: x * 2)(leaf(3)).sum()
    before = state()
    with pytest.raises(ArithmeticError):
        y.backward()
    assert state() == before


def test_state_is_as_before_after_a_forward_that_raised():
    @go.custom_backward(lambda g: g)
    def broken(x):
        raise ArithmeticError

    before = state()
    with bf16():
        inside = state()
        with pytest.raises(ArithmeticError):
            broken(leaf(3))
        assert state() == inside
    assert state() == before


def test_two_calls_in_one_graph_have_their_own_states():
    seen = []
    function = observed(seen)["gradient alone"]()
    x = leaf(3)
    with bf16():
        first = function(x)
    function(first).sum().backward()
    assert [enabled for enabled, _ in seen] == [False, True]


def test_forward_that_switches_autocast_itself_leaves_its_rule_the_callers_state():
    seen = []

    @go.custom_backward(lambda g: (seen.append(state()[0]), g)[1])
    def switching(x):
        with bf16():
            return x * 2

    switching(leaf(3)).sum().backward()
    assert seen == [False]


def test_backward_in_another_thread_has_the_state_of_the_forward():
    seen = []
    with bf16():
        y = observed(seen)["argument"]()(leaf(3)).sum()
    thread = threading.Thread(target=y.backward)
    thread.start()
    thread.join()
    assert seen == [(True, torch.bfloat16)]


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_checkpointed_rule_has_the_state_of_its_forward(use_reentrant):
    seen = []
    function = observed(seen)["argument"]()
    with bf16():
        y = checkpoint(lambda x: function(x) * 1, leaf(3) * 1, use_reentrant=use_reentrant).sum()
    y.backward()
    assert seen == [(True, torch.bfloat16)]


# --- rules of matmul, against plain autograd ---


def by_hand(grad_output, x, weight):
    return grad_output @ weight.t(), x.t() @ grad_output


def matmul(x, weight):
    return x @ weight


RULES = {
    "by hand": by_hand,
    "dict": lambda grad_output, weight, x: {"weight": x.t() @ grad_output, "x": grad_output @ weight.t()},
    "vjp": lambda grad_output, vjp: vjp(grad_output),
    "by_name": lambda grad_output, vjp: vjp.by_name(grad_output),
    "half by hand": lambda grad_output, vjp, x: (vjp(grad_output)[0], x.t() @ grad_output),
}


@pytest.fixture(params=RULES)
def ruled_matmul(request):
    return go.custom_backward(RULES[request.param])(matmul)


@pytest.fixture
def operands():
    return leaf(4, 5), leaf(5, 3)


@pytest.mark.parametrize("inside", [False, True], ids=["backward outside", "backward inside"])
def test_matmul_has_the_value_and_gradients_of_plain_autograd(ruled_matmul, operands, inside):
    def run(function):
        with bf16():
            y = function(*operands)
        with bf16() if inside else contextlib.nullcontext():
            return (y.detach(), *torch.autograd.grad(y.float().sin().sum(), operands))

    value, *gradients = run(ruled_matmul)
    expected_value, *expected = run(matmul)
    assert value.dtype == torch.bfloat16
    assert {gradient.dtype for gradient in gradients} == {torch.float32}
    exactly(value, expected_value)
    exactly(gradients, expected)


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)], ids=str)
def test_matmul_of_mixed_dtypes_gives_each_argument_its_own(ruled_matmul, dtypes):
    operands = leaf(4, 5, dtype=dtypes[0]), leaf(5, 3, dtype=dtypes[1])

    def run(function):
        with bf16():
            y = function(*operands)
        return torch.autograd.grad(y.sum(), operands)

    gradients = run(ruled_matmul)
    assert tuple(gradient.dtype for gradient in gradients) == dtypes
    exactly(gradients, run(matmul))


def test_matmul_is_right_to_float32_without_autocast_around_the_forward(ruled_matmul, operands):
    y = ruled_matmul(*operands)
    with bf16():
        gradients = torch.autograd.grad(y, operands, torch.ones_like(y))
    ones = torch.ones(4, 3)
    exactly(gradients, (ones @ operands[1].detach().t(), operands[0].detach().t() @ ones))


def test_gradient_of_the_rule_has_the_dtype_of_the_result(operands):
    seen = []
    function = go.custom_backward(lambda g: (seen.append(g.dtype), (None, None))[1])(matmul)
    with bf16():
        function(*operands).sum().backward()
    assert seen == [torch.bfloat16]


def test_vjp_takes_a_gradient_in_float32_too(operands):
    function = go.custom_backward(lambda g, vjp: vjp(g.float()))(matmul)

    def run(function):
        with bf16():
            return torch.autograd.grad(function(*operands).sum(), operands)

    exactly(run(function), run(matmul))


def test_second_derivative_is_that_of_plain_autograd(ruled_matmul, operands):
    def run(function):
        with bf16():
            y = function(operands[0].tanh(), operands[1])
            (first,) = torch.autograd.grad(y.float().sin().sum(), operands[0], create_graph=True)
        return torch.autograd.grad(first.sum(), operands)

    torch.testing.assert_close(run(ruled_matmul), run(matmul), rtol=2e-2, atol=2e-2)


class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 3))

    def forward(self, x):
        return x @ self.weight


MODULES = {
    "by name": lambda g, x, weight: {"x": g @ weight.t(), "weight": x.t() @ g},
    "left to autograd": lambda g, module: g @ module.weight.t(),
    "vjp": lambda g, vjp: vjp(g),
    "by_name": lambda g, vjp: vjp.by_name(g),
}


@pytest.mark.parametrize("rule", MODULES.values(), ids=MODULES)
@pytest.mark.parametrize("inside", [False, True], ids=["backward outside", "backward inside"])
def test_module_has_the_gradients_of_the_plain_one(rule, inside):
    plain = Linear()
    module = type("Ruled", (Linear,), {"forward": go.custom_backward(rule)(Linear.forward)})()
    module.load_state_dict(plain.state_dict())
    x = leaf(4, 5)

    def run(module):
        with bf16():
            y = module(x)
        with bf16() if inside else contextlib.nullcontext():
            return torch.autograd.grad(y.float().sin().sum(), (x, module.weight))

    exactly(run(module), run(plain))


def test_class_form_has_the_gradients_of_the_plain_module():
    @go.custom_backward
    class ByClass(Linear):
        def forward(self, x):
            return x @ self.weight

        def backward(self, grad_output, x):
            self.weight.grad = x.t() @ grad_output
            return grad_output @ self.weight.t()

    plain, module = Linear(), ByClass()
    module.load_state_dict(plain.state_dict())
    x = leaf(4, 5)

    def run(module):
        with bf16():
            y = module(x)
        return torch.autograd.grad(y.float().sin().sum(), (x, module.weight))

    exactly(run(module), run(plain))


def test_weight_used_by_two_calls_in_one_autocast_has_both_gradients(operands):
    x, weight = operands
    function = go.custom_backward(by_hand)(matmul)

    def run(function):
        with bf16():
            y = function(x, weight) + function(2 * x, weight)
        return torch.autograd.grad(y.float().sum(), operands)

    torch.testing.assert_close(run(function), run(matmul), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("rule", [lambda g: g @ torch.ones(3, 5), lambda g, vjp: vjp(g)], ids=["gradient alone", "vjp"])
def test_weight_that_autocast_casts_before_in_no_grad_keeps_its_gradient(rule):
    """Autocast caches the cast of a leaf; one that was made without a graph must not cut it off."""
    module = type("Ruled", (Linear,), {"forward": go.custom_backward(rule)(Linear.forward)})()
    x = leaf(4, 3) @ torch.randn(3, 5)
    with bf16():
        with torch.no_grad():
            module(x)
        y = module(x)
        plain = x @ module.weight
    got = torch.autograd.grad(y.sum(), module.weight, retain_graph=True)
    exactly(got, torch.autograd.grad(plain.sum(), module.weight))


@pytest.mark.parametrize(
    "rule", [lambda g: (7 * g @ torch.ones(3, 5), None), by_hand], ids=["gradient alone", "by hand"]
)
def test_forward_without_a_graph_does_not_cut_a_plain_use_of_the_same_weight(rule, operands):
    """The forward runs without a graph and autocast caches the cast of `weight`: a later plain use needs its own."""
    x, weight = operands
    with bf16():
        go.custom_backward(rule)(matmul)(x, weight)
        later = x @ weight
    with bf16():
        alone = x @ weight
    exactly(torch.autograd.grad(later.sum(), weight), torch.autograd.grad(alone.sum(), weight))


def test_weight_cast_before_in_a_plain_use_does_not_leak_its_graph_into_the_call(operands):
    x, weight = operands
    function = go.custom_backward(lambda g, x, weight: (7 * g @ weight.t(), 7 * x.t() @ g))(matmul)
    with bf16():
        plain = x @ weight
        y = function(x, weight)
    by_plain = torch.autograd.grad(plain.sum(), operands)
    by_rule = torch.autograd.grad(y.sum(), operands)
    torch.testing.assert_close(by_rule, tuple(7 * g for g in by_plain), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("surrogate", [None, torch.tanh], ids=["identity", "surrogate"])
def test_straight_through_keeps_its_value_and_dtype(surrogate):
    x = torch.tensor([-300.0, 0.5, 300.0], dtype=torch.bfloat16, requires_grad=True)
    with bf16():
        y = go.straight_through(torch.sign, surrogate=surrogate)(x)
    y.sum().backward()
    exactly(y.detach(), torch.tensor([-1.0, 1.0, 1.0], dtype=torch.bfloat16))
    assert x.grad.dtype == torch.bfloat16
