"""The founding question: a module class with its own `backward`. Contract, section 2; `founding-question.md`."""

import copy
import pickle
import re
import sys
import threading

import pytest
import torch
from oracles import closely, exactly, float64, noise
from torch import nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

import gradoverride as go
from gradoverride._core.private.modes import in_modes


def some_operation(grad_of_c):
    return 3 * grad_of_c


def another_operation(grad_of_a, grad_of_c):
    return grad_of_a + 2 * grad_of_c


@go.custom_backward
class LayerWithCustomGrad(nn.Module):  # the question's code, this decorator added
    def __init__(self):
        super().__init__()
        self.weights = nn.Parameter(torch.randn(200))

    def forward(self, x):
        return x * self.weights

    def backward(self, grad_of_c):  # called during loss.backward()
        grad_of_a = some_operation(grad_of_c)
        # extra computation
        self.weights.grad = another_operation(grad_of_a, grad_of_c)
        return grad_of_a  # what parameter `a` receives


def ones(value):
    return torch.full((200,), float(value))


@pytest.fixture
def layer():
    return LayerWithCustomGrad()


@pytest.fixture
def a():
    return nn.Parameter(torch.randn(200))


def test_question_runs_as_it_stands(layer, a):
    b = layer(a)
    c = b * 23
    exactly(c.detach(), (a * layer.weights * 23).detach())
    c.sum().backward()
    exactly(a.grad, ones(3 * 23))
    exactly(layer.weights.grad, ones(5 * 23))


def test_question_accumulates_over_two_backward_calls(layer, a):
    for _ in range(2):
        (layer(a) * 23).sum().backward()
    exactly((a.grad, layer.weights.grad), (ones(2 * 69), ones(2 * 115)))


def test_question_accumulates_when_one_graph_is_retained(layer, a):
    loss = (layer(a) * 23).sum()
    loss.backward(retain_graph=True)
    loss.backward()
    exactly((a.grad, layer.weights.grad), (ones(2 * 69), ones(2 * 115)))


def test_question_with_the_layer_used_twice_in_one_graph(layer, a):
    layer(layer(a)).sum().backward()
    exactly((a.grad, layer.weights.grad), (ones(3 * 3), ones(5 + 3 * 5)))


def test_question_with_the_layer_used_twice_side_by_side(layer, a):
    (layer(a) + 10 * layer(2 * a)).sum().backward()
    exactly((a.grad, layer.weights.grad), (ones(3 + 60), ones(5 + 50)))


def test_question_with_an_input_that_needs_no_gradient(layer):
    layer(torch.randn(200)).sum().backward()
    exactly(layer.weights.grad, ones(5))


def test_question_asked_by_autograd_grad_leaves_grad_untouched(layer, a):
    layer.weights.grad = ones(-1)
    (grad,) = torch.autograd.grad(layer(a).sum(), layer.weights)
    exactly(grad, ones(5))
    exactly(layer.weights.grad, ones(-1))
    assert a.grad is None


def test_question_asked_by_autograd_grad_for_the_input_alone(layer, a):
    (grad,) = torch.autograd.grad(layer(a).sum(), a)
    exactly(grad, ones(3))
    assert layer.weights.grad is None


@pytest.fixture
def threads_that_take_turns_often():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("threads_that_take_turns_often")
def test_question_in_two_threads(layer):
    inputs = [nn.Parameter(torch.randn(200)) for _ in range(2)]
    barrier = threading.Barrier(2)

    def work(x, factor):
        for _ in range(300):
            barrier.wait(60)
            (factor * layer(x)).sum().backward()

    threads = [threading.Thread(target=work, args=(x, factor)) for x, factor in zip(inputs, (1, 10), strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    exactly([x.grad for x in inputs], [ones(300 * 3), ones(300 * 30)])
    exactly(layer.weights.grad, ones(300 * 55))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo's own doing
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_question_compiled(layer, a, backend):
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    for _ in range(2):
        (compiled(a) * 23).sum().backward()
    exactly((a.grad, layer.weights.grad), (ones(2 * 69), ones(2 * 115)))


def test_question_trains_with_an_optimizer(layer, a):
    before = layer.weights.detach().clone()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    layer(a).sum().backward()
    optimizer.step()
    exactly(layer.weights.detach(), before - 0.5 * 5)


def test_question_under_no_grad_is_the_plain_forward(layer, a):
    with torch.no_grad():
        y = layer(a)
    assert y.grad_fn is None
    exactly(y, a.detach() * layer.weights.detach())


# The contract's version, whose gradient is the true one


@go.custom_backward
class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.weights = nn.Parameter(noise(3, grad=False))

    def forward(self, x):
        return x * self.weights

    def backward(self, grad_output, x):
        self.weights.grad = grad_output * x  # collected, then accumulated by autograd as ever
        return grad_output * self.weights


def call_with_weights(layer):
    return lambda x, weights: functional_call(layer, {"weights": weights}, (x,))


def test_true_backward_passes_gradcheck():
    assert torch.autograd.gradcheck(call_with_weights(Scale()), (noise(3), noise(3)))


def test_true_backward_passes_gradgradcheck():
    assert torch.autograd.gradgradcheck(call_with_weights(Scale()), (noise(3), noise(3)))


# One whose gradients autograd would not give: 3 times the true one for x, 5 times for the weights


@go.custom_backward
class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.weights = nn.Parameter(noise(3, grad=False))

    def forward(self, x):
        return x * self.weights

    def backward(self, grad_output, x):
        self.weights.grad = 5 * grad_output * x
        return 3 * grad_output * self.weights


def test_class_stays_a_module_class_of_its_name():
    layer = Odd()
    assert isinstance(Odd, type)
    assert Odd.__name__ == type(layer).__name__ == "Odd"
    assert isinstance(layer, nn.Module)
    assert list(layer.state_dict()) == ["weights"]


def test_subclass_inherits_the_backward():
    class Twice(Odd):
        def forward(self, x):
            return 2 * super().forward(x)

    layer, x = Twice(), noise(3)
    layer(x).sum().backward()
    exactly((x.grad, layer.weights.grad), (6 * layer.weights.detach(), 10 * x.detach()))


def test_subclass_may_override_the_backward_and_call_that_of_its_base():
    class Ten(Odd):
        def backward(self, grad_output, x):
            return 10 * super().backward(grad_output, x)

    layer, x = Ten(), noise(3)
    layer(x).sum().backward()
    closely((x.grad, layer.weights.grad), (30 * layer.weights.detach(), 5 * x.detach()))


class Tripled(Odd):
    def forward(self, x):
        return x * self.weights * 11

    def backward(self, grad_output, x):
        self.weights.grad = 50 * grad_output * x
        return 30 * grad_output * self.weights


class TripledAgain(Tripled):
    pass


@go.custom_backward
class TripledAndDecorated(Odd):
    forward = Tripled.forward.__wrapped__
    backward = Tripled.backward


class AroundBase(Odd):
    def forward(self, x):
        return super().forward(x) * x

    def backward(self, grad_output, vjp):
        grads = vjp.by_name(grad_output)
        self.weights.grad = 10 * grads["weights"]
        return grads["x"]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("kind", [Tripled, TripledAgain, TripledAndDecorated])
def test_subclass_with_a_forward_and_a_backward_of_its_own_has_that_backward(kind, compiled):
    layer, x = kind(), noise(3)
    run = torch.compile(layer, backend="aot_eager", fullgraph=True) if compiled else layer
    run(x).sum().backward()
    exactly((x.grad, layer.weights.grad), (30 * layer.weights.detach(), 50 * x.detach()))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_subclass_with_both_of_its_own_may_call_the_forward_of_its_base_which_has_its_own_backward(compiled):
    layer, x = AroundBase(), noise(3)
    run = torch.compile(layer, backend="aot_eager", fullgraph=True) if compiled else layer
    run(x).sum().backward()
    weights, given = layer.weights.detach(), x.detach()
    # d(w x) is 3 w and 5 x by the rule of the base, and the whole is w x * x.
    closely(x.grad, 3 * weights * given + weights * given)
    closely(layer.weights.grad, 10 * 5 * given * given)


class Counted(Odd):
    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x):
        self.count = self.count + 1
        return super().forward(x) * 2

    def backward(self, grad_output, x):
        return super().backward(2 * grad_output, x)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_subclass_with_a_buffer_that_it_assigns_may_call_the_forward_of_its_base(compiled):
    layer, x = Counted(), noise(3)
    run = torch.compile(layer, backend="aot_eager", fullgraph=True) if compiled else layer
    run(x).sum().backward()
    exactly((x.grad, layer.weights.grad), (6 * layer.weights.detach(), 10 * x.detach()))
    assert layer.count.item() == 1


class Elevenfold(Odd):
    def forward(self, x):
        return x * self.weights * 11


class Through:
    def forward(self, x):
        return x * self.weights * 11


class ThroughAnother(Through, Odd):
    pass


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("kind", [Elevenfold, ThroughAnother])
def test_subclass_with_a_forward_of_its_own_alone_has_the_backward_that_it_inherits(kind, compiled):
    layer, x = kind(), noise(3)
    run = torch.compile(layer, backend="aot_eager", fullgraph=True) if compiled else layer
    run(x).sum().backward()
    exactly((x.grad, layer.weights.grad), (3 * layer.weights.detach(), 5 * x.detach()))


def test_subclass_whose_forward_calls_that_of_its_base_in_another_method_has_the_backward_once():
    class Twice(Odd):
        def forward(self, x):
            return 2 * self.run(x)

        def run(self, x):
            return Odd.forward(self, x)

    layer, x = Twice(), noise(3)
    layer(x).sum().backward()
    exactly((x.grad, layer.weights.grad), (6 * layer.weights.detach(), 10 * x.detach()))


LAZY = {"bare": go.custom_backward, "with a rule": go.custom_backward(lambda grad_output, vjp: 5 * vjp(grad_output))}


def lazy(kind, **attributes):
    def backward(self, grad_output, input):
        self.weight.grad, self.bias.grad = grad_output.T @ input, grad_output.sum(0)
        return 5 * (grad_output @ self.weight)

    return LAZY[kind](type("Lazy", (nn.LazyLinear,), {"backward": backward, **attributes}))


@pytest.mark.parametrize("kind", LAZY)
def test_lazy_class_that_becomes_another_is_refused_for_that_would_have_no_rule(kind):
    with pytest.raises(go.DecorationError, match=r"becomes 'Linear'.*Write cls_to_become = None in it"):
        lazy(kind)


@pytest.mark.parametrize("first", ["called for its gradient", "called without one"])
@pytest.mark.parametrize("kind", LAZY)
def test_lazy_class_that_stays_what_it_is_has_its_rule(kind, first):
    layer, x = lazy(kind, cls_to_become=None)(2, dtype=torch.float64), noise(3, 3)
    if first == "called without one":
        with torch.no_grad():
            layer(x)
    for _ in range(2):
        (grad,) = torch.autograd.grad(layer(x).sum(), x)
        closely(grad, 5 * layer.weight.detach().sum(0).expand(3, 3))


def test_subclass_with_a_rule_that_is_wrong_is_refused_when_it_is_made():
    with pytest.raises(go.RuleSignatureError, match="must take the gradient as its first positional parameter"):

        class Wrong(Odd):
            def forward(self, x):
                return x

            def backward(self):
                return None


@pytest.mark.parametrize("of_subclass", [False, True])
def test_backward_that_is_assigned_to_the_class_later_is_the_rule_from_then_on(of_subclass):
    @go.custom_backward
    class Ruled(nn.Module):
        def forward(self, x):
            return x * 2

        def backward(self, grad_output):
            return grad_output * 3

    cls = type("Sub", (Ruled,), {}) if of_subclass else Ruled
    seen = []
    for factor in (3, 5, 7, 5):
        if factor != 3:
            cls.backward = lambda self, grad_output, factor=factor: grad_output * factor
        x = float64(1.0)
        cls()(x).backward()
        seen.append(x.grad.item())
    assert seen == [3, 5, 7, 5]


@pytest.mark.parametrize("called_before", [False, True])
def test_backward_on_an_instance_is_refused_for_it_would_not_be_called(layer, a, called_before):
    if called_before:
        layer(a)
    layer.backward = lambda grad_of_c: grad_of_c
    with pytest.raises(go.UnsupportedError) as caught:
        layer(a)
    assert re.fullmatch(
        r"'LayerWithCustomGrad' \(.*\) must have its 'backward' from its class; somebody has put another on the "
        r"instance, which would not be called\. Put it on a subclass, or give the instance a rule: "
        r"go\.override\(model, \{module: rule\}\)",
        str(caught.value),
    )
    with torch.no_grad():
        exactly(layer(a), a * layer.weights)


def test_subclass_keeps_an_init_subclass_of_the_users():
    seen = []

    @go.custom_backward
    class Base(nn.Module):
        def __init_subclass__(cls, tag=None, **kwargs):
            super().__init_subclass__(**kwargs)
            seen.append((cls.__name__, tag))

        def forward(self, x):
            return x

        def backward(self, grad_output):
            return 7 * grad_output

    class Below(Base, tag="below"):
        def forward(self, x):
            return x * 2

        def backward(self, grad_output):
            return 70 * grad_output

    x = float64(1.0)
    Below()(x).backward()
    assert (seen, x.grad.item()) == ([("Below", "below")], 70.0)


def test_backward_of_chosen_inputs_leaves_the_others_alone():
    layer, x = Odd(), noise(3)
    layer(x).sum().backward(inputs=[x])
    assert layer.weights.grad is None
    layer(x).sum().backward(inputs=[layer.weights])
    exactly((x.grad, layer.weights.grad), (3 * layer.weights.detach(), 5 * x.detach()))


def test_tensor_hooks_fire_once_with_the_assigned_gradient():
    layer, x, seen = Odd(), noise(3), []
    layer.weights.register_hook(seen.append)
    layer(x).sum().backward()
    exactly(seen, [5 * x.detach()])


def test_post_accumulate_hooks_fire_once():
    layer, fired = Odd(), []
    layer.weights.register_post_accumulate_grad_hook(fired.append)
    layer(noise(3)).sum().backward()
    assert len(fired) == 1
    assert fired[0] is layer.weights


def test_frozen_parameter_stays_none_though_backward_assigns_it():
    layer, x = Odd(), noise(3)
    layer.weights.requires_grad_(False)
    layer(x).sum().backward()
    assert layer.weights.grad is None
    exactly(x.grad, 3 * layer.weights)


def test_backward_uses_the_weights_of_its_forward():
    layer, x = Odd(), noise(3)
    weights = noise(3)
    functional_call(layer, {"weights": weights}, (x,)).sum().backward()
    exactly((x.grad, weights.grad), (3 * weights.detach(), 5 * x.detach()))
    assert layer.weights.grad is None


def test_copy_and_pickle_keep_the_backward():
    layer, x = Odd(), noise(3)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        x.grad = None
        twin(x).sum().backward()
        exactly((x.grad, twin.weights.grad), (3 * layer.weights.detach(), 5 * x.detach()))
    assert layer.weights.grad is None


def test_micro_batches_accumulate_as_the_whole_batch():
    rows = noise(6, 3, grad=False)

    @go.custom_backward
    class Batched(Odd):
        def forward(self, x):
            return x * self.weights

        def backward(self, grad_output, x):
            self.weights.grad = 5 * (grad_output * x).sum(0)
            return grad_output * self.weights

    layer = Batched()
    for batch in rows.split(2):
        layer(batch).sum().backward()
    closely(layer.weights.grad, 5 * rows.sum(0))


# What `backward` may do with `self`


def affine(backward):
    """An undecorated `x * weight + shift` with this backward, then decorated."""

    class Affine(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(float64(2.0, 2.0))
            self.shift = nn.Parameter(float64(1.0, 1.0))
            self.register_buffer("mask", float64(1.0, 0.0, grad=False))
            self.factor = 7

        def forward(self, x):
            return x * self.weight + self.shift

        def helper(self, grad):
            return self.factor * grad

    Affine.backward = backward
    return go.custom_backward(Affine)()


def test_none_stops_the_gradient_of_a_parameter():
    def backward(self, grad_output):
        self.weight.grad = None
        self.shift.grad = 5 * grad_output
        return grad_output

    layer = affine(backward)
    layer(float64(3.0, 4.0)).sum().backward()
    assert layer.weight.grad is None
    exactly(layer.shift.grad, float64(5.0, 5.0, grad=False))


def test_none_leaves_a_gradient_that_was_there():
    def backward(self, grad_output):
        self.weight.grad = self.shift.grad = None
        return grad_output

    layer = affine(backward)
    layer.weight.grad = float64(9.0, 9.0, grad=False)
    layer(float64(3.0, 4.0)).sum().backward()
    exactly(layer.weight.grad, float64(9.0, 9.0, grad=False))


def test_parameter_that_is_not_assigned_is_an_error_that_names_it():
    def backward(self, grad_output):
        self.weight.grad = grad_output
        return grad_output

    loss = affine(backward)(float64(3.0, 4.0)).sum()
    place = r"\(\S+test_class_form\.py:\d+\)"  # of `backward`, which may be inherited, and of the forward
    message = rf"^'backward' {place} of 'Affine' {place} must assign self\.shift\.grad \(None .*; it did neither"
    with pytest.raises(go.RuleResultError, match=message):
        loss.backward()


def test_gradient_left_from_an_earlier_backward_does_not_count_as_assigned():
    def backward(self, grad_output):
        self.weight.grad = grad_output
        return grad_output

    layer = affine(backward)
    layer.shift.grad = float64(1.0, 1.0, grad=False)
    with pytest.raises(go.RuleResultError, match="shift"):
        layer(float64(3.0, 4.0)).sum().backward()


def test_frozen_parameter_need_not_be_assigned():
    def backward(self, grad_output):
        self.weight.grad = 5 * grad_output
        return grad_output

    layer = affine(backward)
    layer.shift.requires_grad_(False)
    layer(float64(3.0, 4.0)).sum().backward()
    exactly(layer.weight.grad, float64(5.0, 5.0, grad=False))


def test_parameter_that_is_not_assigned_keeps_autograds_when_backward_asks_for_vjp():
    def backward(self, grad_output, vjp):
        self.shift.grad = 5 * grad_output
        return 10 * vjp(grad_output)

    layer, x = affine(backward), float64(3.0, 4.0)
    layer(x).sum().backward()
    exactly(x.grad, float64(20.0, 20.0, grad=False))
    exactly(layer.weight.grad, float64(3.0, 4.0, grad=False))
    exactly(layer.shift.grad, float64(5.0, 5.0, grad=False))


def test_backward_that_asks_for_vjp_may_assign_every_parameter():
    @go.custom_backward
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(float64(1.0, 2.0, 3.0))

        def forward(self, x):
            return x * self.weight

        def backward(self, grad_output, x, vjp):
            self.weight.grad = 5 * grad_output * x
            return 3 * vjp(grad_output)

    module, x, grad = Scaled(), noise(3), noise(3)
    for _ in range(2):
        found = torch.autograd.grad(module(x), [x, module.weight], grad)
        closely(found[0], (3 * grad * module.weight).detach())
        closely(found[1], (5 * grad * x).detach())


def test_vjp_by_name_gives_the_true_gradients_to_assign():
    def backward(self, grad_output, vjp):
        grads = vjp.by_name(10 * grad_output)
        self.weight.grad, self.shift.grad = grads["weight"], grads["shift"]
        return grads["x"]

    layer, x = affine(backward), float64(3.0, 4.0)
    layer(x).sum().backward()
    exactly(x.grad, float64(20.0, 20.0, grad=False))
    exactly(layer.weight.grad, float64(30.0, 40.0, grad=False))
    exactly(layer.shift.grad, float64(10.0, 10.0, grad=False))


def test_backward_may_read_buffers_attributes_and_methods():
    def backward(self, grad_output):
        self.weight.grad = self.shift.grad = None
        return self.helper(grad_output) * self.mask

    layer, x = affine(backward), float64(3.0, 4.0)
    layer(x).sum().backward()
    exactly(x.grad, float64(7.0, 0.0, grad=False))


def test_backward_may_set_attributes_of_the_module():
    def backward(self, grad_output):
        self.weight.grad = self.shift.grad = None
        self.factor = 11
        return grad_output

    layer = affine(backward)
    layer(float64(3.0, 4.0)).sum().backward()
    assert layer.factor == 11


def test_backward_sees_its_class():
    kinds = []

    def backward(self, grad_output):
        kinds.append(isinstance(self, nn.Module))
        self.weight.grad = self.shift.grad = None
        return grad_output

    affine(backward)(float64(3.0, 4.0)).sum().backward()
    assert kinds == [True]


def test_backward_asks_for_output_and_input_by_name():
    def backward(self, grad_output, output, input):
        self.weight.grad = self.shift.grad = None
        return grad_output * output * input

    layer, x = affine(backward), float64(3.0, 4.0)
    layer(x).sum().backward()
    exactly(x.grad, float64(21.0, 36.0, grad=False))


def test_wrong_shape_of_an_assigned_gradient_is_an_error_with_both_shapes():
    def backward(self, grad_output):
        self.weight.grad = grad_output.sum()
        self.shift.grad = None
        return grad_output

    loss = affine(backward)(float64(3.0, 4.0)).sum()
    with pytest.raises(go.RuleResultError, match=r"(?s)Affine.*\(2,\).*weight.*\(\)"):
        loss.backward()


def test_assigned_gradient_of_another_dtype_is_cast():
    def backward(self, grad_output):
        self.weight.grad = self.shift.grad = grad_output.float()
        return grad_output

    layer = affine(backward)
    layer(float64(3.0, 4.0)).sum().backward()
    exactly(layer.weight.grad, float64(1.0, 1.0, grad=False))


def test_grad_in_backward_starts_as_none_and_may_be_added_to():
    seen = []

    def backward(self, grad_output):
        seen.append(self.weight.grad)
        self.shift.grad = None
        self.weight.grad = 2 * grad_output
        self.weight.grad += 3 * grad_output
        return grad_output

    layer = affine(backward)
    for _ in range(2):
        layer(float64(3.0, 4.0)).sum().backward()
    exactly(layer.weight.grad, float64(10.0, 10.0, grad=False))
    assert seen == [None, None]


def guarded(self, grad_output, x):
    if self.weight.grad is None:
        self.weight.grad = torch.zeros_like(self.weight)
    self.weight.grad += grad_output * x
    self.weight.grad += 2 * grad_output
    self.shift.grad = None
    return grad_output


def run_plainly(layer, x):
    layer(x).sum().backward()


def run_under_a_mode(layer, x):
    with Shown():
        layer(x).sum().backward()


def run_compiled(layer, x):
    torch.compile(layer, backend="aot_eager", fullgraph=True)(x).sum().backward()


@pytest.mark.parametrize("run", [run_plainly, run_under_a_mode, run_compiled])
def test_what_is_added_in_place_to_a_grad_that_is_zeros_is_collected(run):
    layer = affine(guarded)
    for _ in range(2):
        run(layer, float64(3.0, 4.0))
    exactly(layer.weight.grad, float64(10.0, 12.0, grad=False))
    assert layer.shift.grad is None


def test_what_is_added_to_no_grad_is_an_error_with_a_note():
    def backward(self, grad_output, x):
        self.weight.grad += grad_output * x
        return grad_output

    with pytest.raises(TypeError, match="NoneType") as caught:
        run_plainly(affine(backward), float64(3.0, 4.0))
    (note,) = caught.value.__notes__
    assert "'Affine'" in note
    assert note.endswith("Assign it (=) before anything is added to it (+=)")


class Recomputed(nn.Module):
    """As a reversible or implicit layer: its backward computes again what its forward did, and differentiates that."""

    def __init__(self, pull):
        super().__init__()
        self.inner = nn.Linear(3, 3, dtype=torch.float64)
        self.pull = pull

    def forward(self, x):
        return x + torch.tanh(self.inner(x))

    def backward(self, grad_output, x):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return self.pull(self, x, Recomputed.forward.__wrapped__(self, x), grad_output)


def pull_by_grad(self, x, result, grad_output):
    parameters = list(self.inner.parameters())
    grads = torch.autograd.grad(result, [x, *parameters], grad_output)
    for parameter, grad in zip(parameters, grads[1:], strict=True):
        parameter.grad = grad
    return grads[0]


def pull_by_backward(self, x, result, grad_output):
    result.backward(grad_output)
    return x.grad


def pull_twice(self, x, result, grad_output):
    self.inner.weight.grad = torch.ones_like(self.inner.weight)
    result.backward(grad_output)
    self.inner.weight.grad -= 1
    return x.grad


Recomputed = go.custom_backward(Recomputed)


@pytest.mark.parametrize("run", [run_plainly, run_under_a_mode])
@pytest.mark.parametrize("pull", [pull_by_grad, pull_by_backward, pull_twice])
def test_backward_may_compute_the_forward_again_and_differentiate_that(pull, run):
    module, x = Recomputed(pull), noise(2, 3)
    plain, y = copy.deepcopy(module.inner), x.detach().clone().requires_grad_()
    for _ in range(2):
        run(module, x)
        (y + torch.tanh(plain(y))).sum().backward()
    closely(x.grad, y.grad)
    for ours, theirs in zip(module.inner.parameters(), plain.parameters(), strict=True):
        closely(ours.grad, theirs.grad)


@pytest.mark.parametrize("run", [run_plainly, run_under_a_mode, run_compiled])
def test_parameter_says_in_backward_whether_it_wants_a_gradient(run):
    def backward(self, grad_output, x):
        if self.weight.requires_grad:
            self.weight.grad = 3 * grad_output * x
        if self.shift.requires_grad:
            self.shift.grad = grad_output
        return grad_output * self.weight

    layer, x = affine(backward), float64(3.0, 4.0)
    layer.shift.requires_grad_(False)
    run(layer, x)
    exactly(layer.weight.grad, float64(9.0, 12.0, grad=False))
    exactly(x.grad, layer.weight.detach())
    assert layer.shift.grad is None


@pytest.mark.parametrize("run", [run_plainly, run_under_a_mode, run_compiled])
def test_attributes_that_parameters_bear_are_there_in_backward(run):
    def backward(self, grad_output, x):
        self.weight.grad = grad_output * x * getattr(self.weight, "slower", 1.0)
        self.shift.grad = grad_output * getattr(self.shift, "slower", 1.0)
        return grad_output * self.weight

    layer = affine(backward)
    layer.weight.slower = 0.5
    run(layer, float64(3.0, 4.0))
    exactly(layer.weight.grad, float64(1.5, 2.0, grad=False))
    exactly(layer.shift.grad, float64(1.0, 1.0, grad=False))


def test_backward_may_put_attributes_on_parameters_and_give_them_data():
    def backward(self, grad_output, x):
        self.weight.grad, self.shift.grad = grad_output * x, None
        self.weight.seen = grad_output
        self.weight.data = self.weight.data.clamp(-1, 1)
        return grad_output

    layer = affine(backward)
    run_plainly(layer, float64(3.0, 4.0))
    exactly(layer.weight.seen, float64(1.0, 1.0, grad=False))
    exactly(layer.weight.detach(), float64(1.0, 1.0, grad=False))
    exactly(layer.weight.grad, float64(3.0, 4.0, grad=False))


def test_gradients_of_submodules_are_assigned_where_they_are():
    @go.custom_backward
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(2, 2, bias=False, dtype=torch.float64)

        def forward(self, x):
            return self.inner(x)

        def backward(self, grad_output, x):
            self.inner.weight.grad = 5 * grad_output.T @ x
            return grad_output @ self.inner.weight

    layer, x = Outer(), noise(4, 2)
    grad_output = noise(4, 2, grad=False)
    layer(x).backward(grad_output)
    closely(layer.inner.weight.grad, 5 * grad_output.T @ x.detach())
    closely(x.grad, grad_output @ layer.inner.weight.detach())


def test_several_arguments_are_answered_in_order():
    @go.custom_backward
    class Mix(nn.Module):
        def forward(self, x, y):
            return x + y

        def backward(self, grad_output):
            return 3 * grad_output, 5 * grad_output

    x, y = float64(1.0), float64(1.0)
    Mix()(x, y=y).backward()
    assert (x.grad.item(), y.grad.item()) == (3.0, 5.0)


def test_exception_in_backward_does_not_spoil_the_next_one():
    def backward(self, grad_output):
        self.weight.grad = self.shift.grad = 5 * grad_output
        if self.factor == 7:
            raise ValueError("not yet")
        return grad_output

    layer, x = affine(backward), float64(3.0, 4.0)
    with pytest.raises(ValueError, match="not yet"):
        layer(x).sum().backward()
    assert x.grad is layer.weight.grad is None
    layer.factor = 0
    layer(x).sum().backward()
    exactly((x.grad, layer.weight.grad), (torch.ones_like(x), torch.full_like(x, 5)))


def test_parametrized_weight_is_assigned_under_its_plain_name():
    @go.custom_backward
    class Affine(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(noise(2, 2, grad=False))

        def forward(self, x):
            return x @ self.weight.T

        def backward(self, grad_output, x):
            self.weight.grad = grad_output.T @ x
            return grad_output @ self.weight

    module, plain = Affine(), nn.Linear(2, 2, bias=False, dtype=torch.float64)
    plain.load_state_dict(module.state_dict())
    torch.nn.utils.parametrizations.weight_norm(module)
    torch.nn.utils.parametrizations.weight_norm(plain)
    x, y = noise(3, 2), noise(3, 2)
    y.data.copy_(x)
    module(x).square().sum().backward()
    plain(y).square().sum().backward()
    closely(x.grad, y.grad)
    for ours, theirs in zip(module.parameters(), plain.parameters(), strict=True):
        closely(ours.grad, theirs.grad)


class Shown(TorchDispatchMode):
    """Notes what kinds of tensors operations are called with."""

    def __init__(self):
        super().__init__()
        self.kinds = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.kinds.update(type(arg) for arg in args if isinstance(arg, torch.Tensor))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("create_graph", [False, True])
def test_backward_under_a_mode_that_operations_are_shown_to(create_graph):
    @go.custom_backward
    class Linear(nn.Linear):
        def backward(self, grad_output, input):
            self.weight.grad = 3 * grad_output.T @ input
            self.bias.grad = None
            return 2 * grad_output @ self.weight

    module, x = Linear(2, 2, dtype=torch.float64), noise(3, 2)
    wanted = x, module.weight

    def gradients():
        first = torch.autograd.grad(module(x).square().sum(), wanted, create_graph=create_graph)
        if not create_graph:
            return first
        return torch.autograd.grad(sum(grad.square().sum() for grad in first), wanted)

    expected = gradients()
    with Shown() as shown:
        if not in_modes():
            pytest.skip("other modes are not known without a private name of torch")
        closely(gradients(), expected)
    assert shown.kinds <= {torch.Tensor, nn.Parameter}


@go.custom_backward
class Embedding(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, index):
        return self.weight[index]

    def backward(self, grad_output, index):
        self.weight.grad = 7 * torch.zeros_like(self.weight).index_add(0, index, grad_output)


@pytest.mark.parametrize("compiling", [False, True], ids=["eager", "compiled"])
def test_backward_of_a_layer_without_a_differentiable_argument_may_return_nothing(compiling):
    layer, index, grad_output = Embedding(noise(5, 3, grad=False)), torch.tensor([0, 1, 1]), noise(3, 3, grad=False)
    run = torch.compile(layer, backend="aot_eager", fullgraph=True) if compiling else layer
    run(index).backward(grad_output)
    expected = noise(5, 3)
    nn.functional.embedding(index, expected).backward(7 * grad_output)
    closely(layer.weight.grad, expected.grad)


def test_rule_that_answers_for_parameters_alone_must_still_answer_for_each():
    class Lookup(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(noise(5, 3))

        @go.custom_backward(lambda grad_output, weight: None)
        def forward(self, index):
            return self.weight[index]

    with pytest.raises(go.RuleResultError, match=r"asks for the parameter 'weight' and must answer for its gradient"):
        Lookup()(torch.tensor([0, 1])).sum().backward()


def passing_on(method):
    def anything(*args, **kwargs):  # without functools.wraps
        return method(*args, **kwargs)

    return anything


class TakesAnything(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(float64(2.0, 3.0))

    @passing_on
    def forward(self, x):
        return x * self.weight


class TakesAll(TakesAnything):
    def forward(*args):
        self, x = args
        return x * self.weight


def _with_backward(cls):
    class WithBackward(cls):
        def backward(self, grad_output, input):
            self.weight.grad = 7 * grad_output * input
            return 5 * grad_output

    return go.custom_backward(WithBackward)()


def _with_rule(cls):
    class WithRule(cls):
        forward = cls.forward

    return go.custom_backward(lambda grad_output, vjp: 5 * vjp(grad_output))(WithRule)()


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("decorate", [_with_backward, _with_rule])
@pytest.mark.parametrize("cls", [TakesAnything, TakesAll])
def test_class_whose_forward_takes_its_self_in_args_has_the_rule(cls, decorate, compiled):
    layer, x = decorate(cls), float64(1.0, 10.0)
    run = torch.compile(layer, backend="aot_eager", fullgraph=True) if compiled else layer
    run(x).sum().backward()
    answered = decorate is _with_backward
    exactly(x.grad, float64(5.0, 5.0, grad=False) if answered else 5 * layer.weight.detach())
    exactly(layer.weight.grad, (7 if answered else 1) * x.detach())


def test_backward_that_takes_its_self_in_args_is_refused_with_its_signature():
    with pytest.raises(go.RuleSignatureError, match=r"rule 'anything' .* it takes \(\*args, \*\*kwargs\)$"):

        @go.custom_backward
        class Layer(TakesAnything):
            @passing_on
            def backward(self, grad_output):
                return grad_output
