"""Modules whose rule asks for no parameter: these keep autograd's own gradient, at the speed of the short path.

The oracle is the module without a rule: its values, its parameters' gradients, and the rule applied by hand.
"""

import functools

import pytest
import torch
from oracles import closely, exactly, noise
from torch import nn
from torch.utils.checkpoint import checkpoint

import gradoverride as go
from gradoverride._core.calls import fast, wrapper


def seven_times(grad_output):
    return 7 * grad_output


def by_input(grad_output, input):
    return grad_output * input


def by_output(grad_output, output):
    return grad_output * output


BY_HAND = {
    seven_times: lambda grad, x, y: 7 * grad,
    by_input: lambda grad, x, y: grad * x,
    by_output: lambda grad, x, y: grad * y,
}


@pytest.fixture
def short_alone(monkeypatch):
    """The general path may not be taken."""

    def refuse(plan, *args, **kwargs):
        raise AssertionError(f"{plan.forward.who} took the general path")

    monkeypatch.setattr(fast, "differentiate", refuse)
    monkeypatch.setattr(wrapper, "differentiate", refuse)


class Weighted(nn.Module):
    """A forward that reads a parameter, a tensor and a number. (It is made in each test: its paths are made once.)"""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(noise(4).detach())
        self.shift = noise(4).detach()
        self.scale = 3.0

    def weighted(self, x):
        return x * self.weight


def made(forward):
    return type("Made", (Weighted,), {"forward": forward})()


MODULES = {
    "Linear": lambda: nn.Linear(4, 4),
    "Linear without a bias": lambda: nn.Linear(4, 4, bias=False),
    "Linear, frozen weight": lambda: frozen(nn.Linear(4, 4), "weight"),
    "Linear, frozen": lambda: nn.Linear(4, 4).requires_grad_(False),
    "Conv1d": lambda: nn.Conv1d(3, 3, 3, padding=1),
    "LayerNorm": lambda: nn.LayerNorm(4),
    "GroupNorm": lambda: nn.GroupNorm(1, 3),
    "RMSNorm": lambda: nn.RMSNorm(4),
    "PReLU": lambda: nn.PReLU(),
    "of one's own": lambda: made(lambda self, x: x * self.weight * self.scale + self.shift),
    "with a method": lambda: made(lambda self, x: self.weighted(x) + self.scale),
}


def frozen(module, name):
    getattr(module, name).requires_grad_(False)
    return module


def trained(module):
    return [param for param in module.parameters() if param.requires_grad]


@pytest.mark.parametrize("computed", [False, True], ids=["leaf", "computed"])
@pytest.mark.parametrize("rule", BY_HAND, ids=lambda rule: rule.__name__)
@pytest.mark.parametrize("name", MODULES)
def test_parameters_keep_their_gradients_and_the_argument_has_that_of_the_rule(short_alone, name, rule, computed):
    module, x, grad = MODULES[name]().double(), noise(2, 3, 4), noise(2, 3, 4).detach()
    given = x * 1 if computed else x
    expected = module(given)
    own = torch.autograd.grad(expected, trained(module), grad, allow_unused=True) if trained(module) else ()
    with go.override(module, {module: rule}):
        y = module(given)
        exactly(y, expected)
        assert y.grad_fn.name() == f"{type(module).__name__}Backward"
        grad_x, *grads = torch.autograd.grad(y, [x, *trained(module)], grad)
    exactly(grad_x, BY_HAND[rule](grad, x, expected).detach())
    for got, reference in zip(grads, own, strict=True):
        exactly(got, reference)


def test_gradients_accumulate_and_hooks_run_once(short_alone):
    module, x = nn.Linear(4, 4).double(), noise(2, 4)
    met = []
    module.weight.register_hook(lambda grad: met.append("hook"))
    module.weight.register_post_accumulate_grad_hook(lambda param: met.append("accumulated"))
    with go.override(module, {module: seven_times}):
        for _ in range(2):
            (module(x).sum() + module(x).sum()).backward()
    assert met == ["hook", "accumulated"] * 2
    closely(module.weight.grad, 4 * torch.ones(4, 2, dtype=x.dtype) @ x.detach())
    exactly(x.grad, torch.full_like(x, 28.0))


def test_gradient_that_reaches_a_parameter_alone_is_its_own(short_alone):
    module, x = nn.Linear(4, 4).double(), noise(2, 4)
    with go.override(module, {module: seven_times}):
        (grad,) = torch.autograd.grad(module(x).sum(), module.weight)
    closely(grad, torch.ones(4, 2, dtype=x.dtype) @ x.detach())
    assert x.grad is None


def test_a_second_derivative_through_what_is_left_to_autograd_is_refused_and_that_of_the_rule_is_right(short_alone):
    first, second, x = nn.Linear(4, 4).double(), nn.Linear(4, 4).double(), noise(2, 4)
    model = nn.Sequential(first, nn.Tanh(), second)
    with go.override(model, {second: by_input}):
        loss = model(x).square().sum()
    grads = torch.autograd.grad(loss, [x, second.weight], create_graph=True)
    with pytest.raises(go.UnsupportedError, match=r"the second derivative of 'Linear' .* 'by_input' .* leaves to auto"):
        torch.autograd.grad(grads[1].sum(), x, retain_graph=True)
    hidden = first(x).tanh()
    by_hand = 2 * second(hidden.detach()) * hidden  # of the loss, times the input
    (expected,) = torch.autograd.grad(hidden, x, by_hand, create_graph=True)
    exactly(grads[0], expected)


def test_a_forward_that_asks_whether_its_argument_requires_grad_takes_the_right_branch():
    module, x = made(lambda self, x: x * self.weight if x.requires_grad else x * 5), noise(4)
    with go.override(module, {module: seven_times}):
        exactly(module(x), x * module.weight)


UNUSUAL = {
    "a view": lambda self, x: (x * self.weight).view(4),
    "the parameter": lambda self, x: self.weight,
    "a view of the parameter": lambda self, x: self.weight.view(4),
    "a tensor that is no parameter": lambda self, x: self.shift,
    "the argument": lambda self, x: x,
    "a view of the argument": lambda self, x: x.view(4),
    "detached": lambda self, x: (x * self.weight).detach(),
    "without the argument": lambda self, x: self.weight * self.scale,
    "without the parameter": lambda self, x: x * self.scale,
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_results_that_are_something_else_are_tied_to_the_rule_all_the_same(name):
    module, x = made(UNUSUAL[name]), noise(4)
    given = x * 1
    expected = module(given)
    own = torch.autograd.grad(expected.sum(), module.weight, allow_unused=True) if expected.requires_grad else (None,)
    with go.override(module, {module: seven_times}):
        y = module(given)
        exactly(y, expected)
        grad_x, grad_weight = torch.autograd.grad(y.sum(), [x, module.weight], allow_unused=True)
    exactly(grad_x, torch.full_like(x, 7.0))
    assert (grad_weight is None) == (own[0] is None)
    if own[0] is not None:
        exactly(grad_weight, own[0])
    assert module.weight.is_leaf
    assert not module.shift.requires_grad


def test_what_the_graph_has_saved_may_not_be_written_into():
    module, x = nn.Linear(4, 4).double(), noise(2, 4)
    with go.override(module, {module: seven_times}):
        given = x * 1
        y = module(given)
        given.data.add_(0)
        y.sum().backward()
        given = x * 1
        y = module(given)
        with torch.no_grad():
            given.add_(1)
        with pytest.raises(RuntimeError, match=r"modified by an inplace operation"):
            y.sum().backward()


def test_a_result_may_be_written_into(short_alone):
    module, x = nn.Linear(4, 4).double(), noise(2, 4)
    (own,) = torch.autograd.grad(module(x).relu().sum(), module.weight)
    with go.override(module, {module: seven_times}):
        grad_x, grad = torch.autograd.grad(module(x).relu_().sum(), [x, module.weight])
    exactly(grad, own)
    exactly(grad_x, 7.0 * (module(x) > 0).double())


def test_the_gradient_of_an_argument_is_its_own_dtype_under_autocast(short_alone):
    module, x = nn.Linear(4, 4), noise(2, 4).detach().float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        expected = torch.autograd.grad(module(x).float().sum(), module.weight)[0]
        with go.override(module, {module: seven_times}):
            y = module(x)
    assert y.dtype is torch.bfloat16
    grad_x, grad = torch.autograd.grad(y.float().sum(), [x, module.weight])
    exactly(grad_x, torch.full_like(x, 7.0))
    exactly(grad, expected)


@pytest.mark.parametrize("rule", BY_HAND, ids=lambda rule: rule.__name__)
def test_a_checkpointed_module_is_right(short_alone, rule):
    module, x, grad = nn.Linear(4, 4).double(), noise(2, 4), noise(2, 4).detach()
    expected = module(x)
    own = torch.autograd.grad(expected, module.weight, grad)[0]
    with go.override(module, {module: rule}):
        y = checkpoint(module, x * 1, use_reentrant=False)
        grad_x, grad_weight = torch.autograd.grad(y, [x, module.weight], grad)
    exactly(grad_weight, own)
    exactly(grad_x, BY_HAND[rule](grad, x, expected).detach())


def other_parameter(module):
    module.weight = nn.Parameter(2 * module.weight.detach())


def a_tensor_in_its_place(module):
    tensor = 2 * module.weight.detach()
    del module.weight
    module.weight = tensor


def on_the_instance(module):
    module.__dict__["scale"] = 5.0


@pytest.mark.parametrize("change", [other_parameter, a_tensor_in_its_place, on_the_instance])
def test_what_the_module_has_now_counts(change):
    module, x = made(lambda self, x: x * self.weight * self.scale), noise(4)
    with go.override(module, {module: seven_times}):
        module(x).sum().backward()
        change(module)
        y = module(x)
        exactly(y, x * module.weight * module.scale)
        exactly(torch.autograd.grad(y.sum(), x, retain_graph=True)[0], torch.full_like(x, 7.0))
        if module.weight.requires_grad:
            exactly(torch.autograd.grad(y.sum(), module.weight)[0], x.detach() * module.scale)


@pytest.mark.parametrize("name", ["scale", "weight"])
def test_a_tensor_that_is_put_into_an_attribute_later_is_refused(name):
    module, x, captured = made(lambda self, x: x * self.weight * self.scale), noise(4), noise(4)
    with go.override(module, {module: seven_times}):
        module(x).sum().backward()
        module.__dict__[name] = captured
        with pytest.raises(go.CapturedTensorError, match=rf"reached 'self\.{name}', which requires grad"):
            module(x)


def test_a_buffer_comes_before_a_reserved_name():
    module, x = made(lambda self, x: x * self.weight), noise(4)
    module.register_buffer("input", noise(4).detach())
    with go.override(module, {module: by_input}):
        module(x).sum().backward()
    exactly(x.grad, module.input)


def test_an_argument_that_wants_no_gradient_leaves_the_parameters_theirs():
    module, x = nn.Linear(4, 4).double(), noise(2, 4).detach()
    with go.override(module, {module: seven_times}):
        (grad,) = torch.autograd.grad(module(x).sum(), module.weight)
    closely(grad, torch.ones(4, 2, dtype=x.dtype) @ x)


def gives_data(self, x):
    x.data = x.data * 2
    return x * self.weight


def test_data_that_a_forward_gives_its_argument_is_that_of_the_argument():
    module, x = made(gives_data), noise(4)
    before = x.detach().clone()
    with go.override(module, {module: seven_times}):
        grad_x, grad = torch.autograd.grad(module(x).sum(), [x, module.weight])
    exactly(x.detach(), 2 * before)
    exactly(grad, 2 * before)
    exactly(grad_x, torch.full_like(x, 7.0))


def test_a_wrong_answer_is_refused_by_the_name_of_the_argument(short_alone):
    module, x = nn.Linear(4, 3).double(), noise(2, 4)
    with go.override(module, {module: seven_times}):
        y = module(x)
    with pytest.raises(go.RuleResultError, match=r"a gradient of shape \(2, 4\) for 'input'.* shape \(2, 3\)"):
        y.sum().backward()


@pytest.mark.parametrize(
    "rule",
    [
        lambda grad_output: {"x": 7 * grad_output, "weight": 5 * grad_output},
        lambda grad_output, name="weight": {"x": 7 * grad_output, name: 5 * grad_output},
    ],
    ids=["by a constant", "by an option"],
)
def test_a_rule_may_answer_for_a_parameter_that_it_has_not_asked_for(rule):
    module, x = made(lambda self, x: x * self.weight), noise(4)
    with go.override(module, {module: rule}):
        grad_x, grad = torch.autograd.grad(module(x).sum(), [x, module.weight])
    exactly(grad_x, torch.full_like(x, 7.0))
    exactly(grad, torch.full_like(x, 5.0))


def test_a_decorated_method_takes_the_same_path(short_alone):
    class Decorated(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(noise(4).detach())

        @go.custom_backward(seven_times)
        def forward(self, x):
            return x * self.weight

    module, x = Decorated(), noise(4)
    grad_x, grad = torch.autograd.grad(module(x * 1).sum(), [x, module.weight])
    exactly(grad_x, torch.full_like(x, 7.0))
    exactly(grad, x.detach())


def test_nothing_is_kept_of_the_argument_but_what_the_forward_keeps():
    module, kept = made(lambda self, x: x + self.weight), []
    hooks = functools.partial(torch.autograd.graph.saved_tensors_hooks, lambda one: kept.append(one) or one)
    with go.override(module, {module: seven_times}), hooks(lambda one: one):
        module(noise(4) * 1)
    assert kept == []
