"""The class form where its code shows all that it does with `self`: no stand-in is made, and all else is the same."""

import sys
from types import SimpleNamespace

import pytest
import torch
from oracles import closely, exactly, noise
from torch import nn

import gradoverride as go
from gradoverride._core.binding.own_backward import TARGETS, OwnBackward
from gradoverride._core.calls import backward_pass
from gradoverride._core.private.engine import can_call_directly
from gradoverride._core.python.bytecode import instructions, renamed


@pytest.fixture
def stand_ins(monkeypatch):
    """The modules for which a stand-in was made."""
    if not can_call_directly():
        pytest.skip("there is no short path")
    made = []

    class Noting(backward_pass.Collector):
        def __init__(self, module, *rest, **options):
            made.append(module)
            super().__init__(module, *rest, **options)

    monkeypatch.setattr(backward_pass, "Collector", Noting)
    return made


def drawn(*sizes, seed):
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Affine(nn.Module):
    def __init__(self, *, plain=True):
        super().__init__()
        self.weight = nn.Parameter(drawn(4, seed=1))
        self.bias = nn.Parameter(drawn(4, seed=2))
        self.scale = 2.0
        if not plain:  # its calls go the general way
            self.part = nn.Identity()

    def forward(self, x):
        return x * self.weight + self.bias


@go.custom_backward
class Scaled(Affine):
    def backward(self, grad_output, x):
        self.weight.grad = grad_output * x * self.scale
        self.bias.grad = grad_output.cos()
        return grad_output * self.weight.sin()


def gradients(module, x, **options):
    y = module(x)
    return torch.autograd.grad((y * drawn(4, seed=3)).sum(), (x, module.weight, module.bias), **options)


def test_gradients_are_those_of_the_backward(stand_ins):
    module, x, grad = Scaled(), drawn(4, seed=0).requires_grad_(), drawn(4, seed=3)
    found = gradients(module, x)
    for one, truth in zip(found, (grad * module.weight.sin(), grad * x * 2, grad.cos()), strict=True):
        closely(one, truth)
    assert module.weight.grad is None
    assert stand_ins == []


def test_they_accumulate(stand_ins):
    module, x = Scaled(), noise(4).requires_grad_()
    for _ in range(3):
        module(x).sum().backward()
    closely(module.weight.grad, (6 * x).detach())
    closely(module.bias.grad, 3 * torch.ones(4, dtype=torch.float64).cos())
    assert stand_ins == []


@pytest.mark.parametrize("plain", [True, False], ids=["short path", "general path"])
def test_second_derivatives(plain, stand_ins):
    module, x = Scaled(plain=plain), drawn(4, seed=0).requires_grad_()
    first = gradients(module, x, create_graph=True)
    second = torch.autograd.grad(sum(one.sum() for one in first), (x, module.weight))
    grad = drawn(4, seed=3)
    closely(second[0], grad * 2)
    closely(second[1], grad * module.weight.cos())
    assert (stand_ins == []) is plain


@pytest.mark.parametrize("plain", [True, False], ids=["short path", "general path"])
def test_batched_gradients(plain):
    module, x = Scaled(plain=plain), drawn(4, seed=0).requires_grad_()
    y, grads = module(x), drawn(3, 4, seed=5)
    found = torch.autograd.grad(y, (x, module.weight), grads, is_grads_batched=True)
    closely(found[0], grads * module.weight.sin())
    closely(found[1], grads * x * 2)


def test_number_is_read_in_the_backward(stand_ins):
    module, x = Scaled(), noise(4).requires_grad_()
    y = module(x)
    module.scale = 5.0
    y.sum().backward()
    closely(module.weight.grad, (5 * x).detach())
    assert stand_ins == []


def test_number_of_the_class(stand_ins):
    @go.custom_backward
    class Layer(Affine):
        eps = 0.5

        def backward(self, grad_output):
            self.weight.grad = self.bias.grad = self.eps * grad_output
            return grad_output

    module, x = Layer(), noise(4).requires_grad_()
    module(x).sum().backward()
    exactly(module.weight.grad, torch.full((4,), 0.5, dtype=torch.float64))
    assert stand_ins == []
    del Layer.eps
    with pytest.raises(AttributeError, match="eps"):
        module(x).sum().backward()
    module.register_buffer("eps", torch.tensor(3.0, dtype=torch.float64))
    module.zero_grad()
    module(x).sum().backward()
    exactly(module.weight.grad, torch.full((4,), 3.0, dtype=torch.float64))
    assert stand_ins == [module, module]


def test_several_arguments_and_numbers_among_them(stand_ins):
    @go.custom_backward
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(noise(4))

        def forward(self, x, y, power=2):
            return x * self.weight + y**power

        def backward(self, grad_output, y, power, x):
            self.weight.grad = 3 * grad_output * x
            return grad_output * self.weight, power * grad_output * y

    module, x, y = Mixed(), drawn(4, seed=1).requires_grad_(), drawn(4, seed=2).requires_grad_()
    module(x, y, power=3).sum().backward()
    closely(x.grad, module.weight.detach())
    closely(y.grad, (3 * y).detach())
    closely(module.weight.grad, (3 * x).detach())
    assert stand_ins == []


def with_backward(function, *, plain):
    """A module with this `backward`, short or general."""

    class Module(Affine):
        backward = function

    return go.custom_backward(Module)(plain=plain)


def error_of(function, *, plain):
    module = with_backward(function, plain=plain)
    with pytest.raises(go.GradOverrideError) as caught:
        module(noise(4).requires_grad_()).sum().backward()
    return type(caught.value), str(caught.value)


def unassigned(self, grad_output):
    if grad_output is None:
        self.bias.grad = grad_output
    self.weight.grad = grad_output
    return grad_output


def wrong_shape(self, grad_output):
    self.weight.grad = grad_output.sum()
    self.bias.grad = grad_output
    return grad_output


def no_tensor(self, grad_output):
    self.weight.grad = 3.0
    self.bias.grad = grad_output
    return grad_output


def wrong_answer(self, grad_output):
    self.weight.grad = grad_output
    self.bias.grad = grad_output
    return grad_output[:2]


def two_answers(self, grad_output):
    self.weight.grad = grad_output
    self.bias.grad = grad_output
    return grad_output, grad_output


def assigned_and_returned(self, grad_output):
    self.weight.grad = self.bias.grad = grad_output
    return {"x": grad_output, "bias": 2 * grad_output}


@pytest.mark.parametrize(
    "function", [unassigned, wrong_shape, no_tensor, wrong_answer, two_answers, assigned_and_returned]
)
def test_errors_are_the_same(function):
    kind, text = error_of(function, plain=True)
    assert (kind, text) == error_of(function, plain=False)
    assert kind is go.RuleResultError
    assert function.__name__ in text


def test_error_names_the_parameter_that_is_left_out():
    _, text = error_of(unassigned, plain=True)
    assert "must assign self.bias.grad (None stops its gradient)" in text


def test_error_names_the_parameter_that_is_answered_for_twice():
    _, text = error_of(assigned_and_returned, plain=True)
    assert "must give the gradient of the parameter 'bias' once; it assigns self.bias.grad and has 'bias' in" in text


def by_name(self, grad_output):
    self.weight.grad = None
    self.bias.grad = grad_output.float()
    return {"x": 2 * grad_output}


@pytest.mark.parametrize("plain", [True, False], ids=["short path", "general path"])
def test_dict_none_and_other_dtype(plain):
    module, x = with_backward(by_name, plain=plain), noise(4).requires_grad_()
    module(x).sum().backward()
    assert module.weight.grad is None
    assert module.bias.grad.dtype == torch.float64
    exactly(x.grad, torch.full((4,), 2.0, dtype=torch.float64))


def returns_a_weight(self, grad_output):
    self.weight.grad = self.bias.grad = None
    return self.weight


@pytest.mark.parametrize("kind", ["short path", "general path", "frozen"])
def test_parameter_that_is_given_back_as_a_gradient_is_not_added_to(kind):
    module, x = with_backward(returns_a_weight, plain=kind != "general path"), noise(4).requires_grad_()
    module.weight.requires_grad_(kind != "frozen")
    weight = module.weight.detach().clone()
    for _ in range(3):
        module(x).sum().backward()
    exactly((module.weight.detach(), x.grad), (weight, 3 * weight))
    (found,) = torch.autograd.grad(module(x).sum(), x)
    assert type(found) in (torch.Tensor, nn.Parameter)  # and no class of ours


# --- what sends a call the general way ---


def put(param, grad):
    param.grad = grad


def run_backward(param, grad):
    param.backward(grad)


def by_helper(self, grad_output):
    put(self.bias, grad_output)
    self.weight.grad = grad_output
    return grad_output


def backward_in_helper(self, grad_output):
    run_backward(self.bias, grad_output)
    self.weight.grad = grad_output
    return grad_output


def adds(self, grad_output):
    self.bias.grad = grad_output
    self.bias.grad += grad_output
    self.weight.grad = grad_output
    return grad_output


def reads(self, grad_output):
    self.weight.grad = grad_output
    self.bias.grad = grad_output if self.weight.grad is grad_output else None
    return grad_output


def through_variable(self, grad_output):
    bias = self.bias
    bias.grad = grad_output
    self.weight.grad = grad_output
    return grad_output


def by_setattr(self, grad_output):
    setattr(self.bias, "grad", grad_output)  # noqa: B010
    self.weight.grad = grad_output
    return grad_output


def counts(self, grad_output):
    self.count = 1
    self.bias.grad = self.weight.grad = grad_output
    return grad_output


def in_training(self, grad_output):
    self.bias.grad = self.weight.grad = grad_output * self.training
    return grad_output


def in_a_lambda(self, grad_output):
    self.bias.grad = self.weight.grad = grad_output
    return (lambda: grad_output * self.scale)()


def calls_a_method(self, grad_output):
    self.bias.grad = self.weight.grad = grad_output
    return self.twice(grad_output)


def hands_itself_on(self, grad_output):
    self.bias.grad = self.weight.grad = grad_output
    return identity(self, grad_output)


def identity(module, grad_output):
    return grad_output


def deletes(self, grad_output):
    self.bias.grad = self.weight.grad = 5 * grad_output
    del self.bias.grad
    self.bias.grad = grad_output
    return grad_output


def says_where_its_class_is(self, grad_output):
    self.bias.grad = self.weight.grad = grad_output
    return grad_output if self.__module__ else None


def in_place(self, grad_output):
    self.bias.grad = self.weight.grad = grad_output.clone().mul_(2)
    return grad_output


GENERAL = [
    *(by_helper, adds, reads, through_variable, by_setattr, counts, in_training, in_a_lambda, calls_a_method),
    *(hands_itself_on, in_place, backward_in_helper, deletes, says_where_its_class_is),
]


@pytest.mark.parametrize("function", GENERAL)
def test_code_that_does_more_is_not_taken(function):
    assert OwnBackward.of(function) is None


@pytest.mark.parametrize(
    "function",
    [by_helper, reads, through_variable, by_setattr, backward_in_helper, deletes, says_where_its_class_is],
)
def test_such_gradients_are_collected_all_the_same(function, stand_ins):
    module, x = with_backward(function, plain=True), noise(4).requires_grad_()
    (found,) = torch.autograd.grad(module(x).sum(), module.bias)
    exactly(found, torch.ones(4, dtype=torch.float64))
    assert module.bias.grad is None
    assert stand_ins == [module]


def test_parameter_that_is_not_assigned_or_not_trained(stand_ins):
    module, x = Scaled(), noise(4).requires_grad_()
    module.bias.requires_grad_(False)
    module(x).sum().backward()
    assert module.bias.grad is None
    closely(module.weight.grad, (2 * x).detach())
    assert stand_ins == [module]


def test_number_that_became_a_tensor(stand_ins):
    module, x = Scaled(), noise(4).requires_grad_()
    module.scale = torch.tensor(3.0, dtype=torch.float64)
    module(x).sum().backward()
    closely(module.weight.grad, (3 * x).detach())
    assert stand_ins == [module]


def test_backward_of_a_subclass():
    class Doubled(Scaled):
        def backward(self, grad_output, x):
            self.weight.grad = 10 * grad_output
            self.bias.grad = 20 * grad_output
            return 30 * grad_output

    module, base, x = Doubled(), Scaled(), noise(4).requires_grad_()
    for made, truth in ((base, (2 * x).detach()), (module, torch.full((4,), 10.0, dtype=torch.float64))):
        made(x).sum().backward()
        closely(made.weight.grad, truth)


def test_backward_that_is_replaced_later():
    @go.custom_backward
    class Layer(Affine):
        def backward(self, grad_output):
            self.weight.grad = self.bias.grad = grad_output
            return grad_output

    module, x = Layer(), noise(4).requires_grad_()
    module(x).sum().backward()

    def backward(self, grad_output):
        self.weight.grad = self.bias.grad = 7 * grad_output
        return grad_output

    Layer.backward = backward
    module.zero_grad()
    module(x).sum().backward()
    exactly(module.weight.grad, torch.full((4,), 7.0, dtype=torch.float64))


helper = extra = None  # what stands there is called


def calls_what_stands_there(self, grad_output):
    self.weight.grad = self.bias.grad = grad_output
    helper(self.weight, 7 * grad_output)
    if extra is not None:
        extra(self.weight, 7 * grad_output)
    return grad_output


@pytest.mark.parametrize("name", ["helper", "extra"])
def test_helper_that_comes_to_assign_a_grad(name, stand_ins, monkeypatch):
    monkeypatch.setitem(globals(), "helper", identity)
    module, x = with_backward(calls_what_stands_there, plain=True), noise(4).requires_grad_()
    module(x).sum().backward()
    exactly(module.weight.grad, torch.ones(4, dtype=torch.float64))
    assert stand_ins == []
    monkeypatch.setitem(globals(), name, put)
    module.zero_grad()
    for _ in range(2):
        module(x).sum().backward()
    exactly(module.weight.grad, torch.full((4,), 14.0, dtype=torch.float64))
    assert stand_ins == [module, module]


def test_traceback_shows_the_line_of_the_backward():
    def failing(self, grad_output):
        self.weight.grad = self.bias.grad = grad_output
        raise ValueError("mine")

    module = with_backward(failing, plain=True)
    with pytest.raises(ValueError, match="mine") as caught:
        module(noise(4).requires_grad_()).sum().backward()
    assert caught.traceback[-1].path.name == "test_class_form_short.py"
    assert "raise ValueError" in str(caught.traceback[-1].statement)
    assert "failing" in caught.value.__notes__[0]


# --- the code of the function ---


def test_names_are_changed_where_a_grad_is_assigned_alone():
    code = Scaled.backward.__code__
    own = OwnBackward.of(Scaled.backward)
    assert own.assigned == ["bias", "weight"]
    assert own.read == ["scale", "weight"]
    assert own.function.__code__.co_names == (*code.co_names, TARGETS)
    assert own.function.__code__.co_firstlineno == code.co_firstlineno


def test_code_with_too_many_names_is_not_changed():
    lines = [f"    grad = grad + self.n{index}" for index in range(300)]
    names = {}
    exec("\n".join(["def backward(self, grad):", *lines, "    self.weight.grad = grad", "    return grad"]), names)
    assert OwnBackward.of(names["backward"]) is None


def test_code_that_this_python_writes_otherwise_is_not_changed(monkeypatch):
    code = Scaled.backward.__code__
    loads = [step for step in instructions(code) if step.opname == "LOAD_ATTR" and step.argval == "bias"]
    asked = [{loads[0].offset: name} for name in ("other", code.co_names[1])]
    assert [renamed(code, names).co_names for names in asked] == [(*code.co_names, "other"), code.co_names]
    other = (3, 11) if sys.version_info >= (3, 12) else (3, 12)  # which has no flag beside such a name, or has one
    monkeypatch.setattr("gradoverride._core.python.bytecode.sys", SimpleNamespace(version_info=other))
    assert [renamed(code, names) for names in asked] == [None, None]


def test_backward_on_an_instance_is_refused_here_too(stand_ins):
    module, x = Scaled(), noise(4)
    module(x)
    module.backward = lambda grad_output: grad_output
    with pytest.raises(go.UnsupportedError, match="must have its 'backward' from its class"):
        module(x)
    assert stand_ins == []
