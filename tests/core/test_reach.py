"""Where a forward's reach is taken for known, no tensor that requires grad may hide, whatever is changed later."""

import builtins
import functools
import operator
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from oracles import exactly, float64
from torch import nn

import gradoverride as go
from gradoverride._core.python.reach import Reach

SCALE = 2.0


def times_scale(x):
    return x * SCALE


def test_reach_is_known_for_what_most_forwards_do():
    offset = 1.0

    def forward(x, low=0.0):
        return F.relu(torch.where(x > low, times_scale(x), x)) + offset

    assert Reach.of(forward, method=False) is not None
    assert Reach.of(torch.round, method=False) is not None
    assert Reach.of(torch.Tensor.abs, method=False) is not None
    method = Reach.of(lambda self, x: x * self.weight + self.bias, method=True)
    assert method is not None
    assert method.attributes == {"weight", "bias"}


def default_of_a_helper(weight):
    def helper(x, w=weight):
        return x * w

    return lambda x: helper(x)


def attribute_of_a_helper(weight):
    def helper(x):
        return x * helper.weight

    helper.weight = weight
    return lambda x: helper(x)


def second_of_two_closures_of_one_code(weight):
    def times(factor):
        return lambda x: x * factor

    plain, hidden = times(2.0), times(weight)
    return lambda x: plain(x) + hidden(x)


def nested_function(weight):
    return lambda x: sum(part * weight for part in (x, x))


def module_attribute(weight):
    module = types.ModuleType("of_a_user")
    module.weight = weight
    return lambda x: x * module.weight


def imported_inside(weight):
    sys.modules["gradoverride_test_module"] = types.ModuleType("gradoverride_test_module")
    sys.modules["gradoverride_test_module"].weight = weight

    def forward(x):
        import gradoverride_test_module

        return x * gradoverride_test_module.weight

    return forward


def globals_function(weight):
    globals()["OUT_OF_SIGHT"] = weight
    return lambda x: x * globals()["OUT_OF_SIGHT"]


def partial_of_a_function(weight):
    import functools

    return functools.partial(torch.mul, weight)


def bound_method(weight):
    class Plain:
        def __init__(self):
            self.weight = weight

        def forward(self, x):
            return x * self.weight

    return Plain().forward


def callable_object(weight):
    class Plain:
        def __init__(self):
            self.weight = weight

        def __call__(self, x):
            return x * self.weight

    return Plain()


def class_attribute(weight):
    class Constants:
        pass

    Constants.weight = weight
    return lambda x: x * Constants.weight


HIDDEN = {
    function.__name__: function
    for function in (
        default_of_a_helper,
        attribute_of_a_helper,
        second_of_two_closures_of_one_code,
        nested_function,
        module_attribute,
        imported_inside,
        globals_function,
        partial_of_a_function,
        bound_method,
        callable_object,
        class_attribute,
    )
}
RULES = {"gradient alone": lambda grad_output: grad_output, "vjp": lambda grad_output, vjp: vjp(grad_output)}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("where", HIDDEN)
def test_hidden_tensor_is_found(where, rule):
    forward = go.custom_backward(RULES[rule])(HIDDEN[where](float64(3.0)))
    with pytest.raises(go.CapturedTensorError):
        forward(float64(1.0))


@pytest.mark.parametrize("rule", RULES)
def test_number_that_becomes_a_tensor_is_found(monkeypatch, rule):
    forward = go.custom_backward(RULES[rule])(lambda x: times_scale(x))
    exactly(forward(float64(1.0)).detach(), float64(2.0, grad=False))
    monkeypatch.setitem(globals(), "SCALE", 4)
    exactly(forward(float64(1.0)).detach(), float64(4.0, grad=False))
    monkeypatch.setitem(globals(), "SCALE", float64(3.0))
    with pytest.raises(go.CapturedTensorError, match=r"reached"):
        forward(float64(1.0))


@pytest.mark.parametrize("rule", RULES)
def test_closure_that_becomes_a_tensor_is_found(rule):
    factor = 2.0

    @go.custom_backward(RULES[rule])
    def forward(x):
        return x * factor

    exactly(forward(float64(1.0)).detach(), float64(2.0, grad=False))
    factor = float64(3.0)
    with pytest.raises(go.CapturedTensorError, match=r"reached 'factor'"):
        forward(float64(1.0))


@pytest.mark.parametrize("rule", RULES)
def test_name_that_is_defined_after_the_decoration_is_found(rule):
    @go.custom_backward(RULES[rule])
    def forward(x):
        return x * later

    later = float64(3.0)
    with pytest.raises(go.CapturedTensorError, match=r"reached 'later'"):
        forward(float64(1.0))


@pytest.mark.parametrize("rule", RULES)
def test_global_that_is_defined_after_the_decoration_is_found(monkeypatch, rule):
    forward = go.custom_backward(RULES[rule])(lambda x: x * LATER)  # noqa: F821 - that is what is tested
    monkeypatch.setitem(globals(), "LATER", float64(3.0))
    with pytest.raises(go.CapturedTensorError, match=r"reached 'LATER'"):
        forward(float64(1.0))


@pytest.mark.parametrize("rule", RULES)
def test_helper_that_is_patched_is_looked_at_anew(monkeypatch, rule):
    forward = go.custom_backward(RULES[rule])(lambda x: times_scale(x))
    weight = float64(3.0)
    monkeypatch.setitem(globals(), "times_scale", lambda x: x * weight)
    with pytest.raises(go.CapturedTensorError, match=r"reached"):
        forward(float64(1.0))


def named(forward, **attributes):
    """A module with parameter `weight` and a rule that asks for it, whose class has these attributes."""

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(float64(2.0, grad=False))

    for name, value in attributes.items():
        setattr(Layer, name, value)

    def rule(grad_output, x, weight):
        return {"x": grad_output * weight * 10, "weight": grad_output * x * 10}

    Layer.forward = go.custom_backward(rule)(forward)
    return Layer()


def tensor_attribute():
    layer = named(lambda self, x: x * self.weight * self.extra)
    layer.extra = float64(3.0)
    return layer


def class_tensor():
    return named(lambda self, x: x * self.weight * self.extra, extra=float64(3.0))


def class_property():
    weight = float64(3.0)
    return named(lambda self, x: x * self.weight * self.extra, extra=property(lambda self: weight))


def looked_up_attribute():
    weight = float64(3.0)

    def look_up(self, name):
        return weight if name == "extra" else nn.Module.__getattr__(self, name)

    return named(lambda self, x: x * self.weight * self.extra, __getattr__=look_up)


def shadowed_parameter():
    layer = named(lambda self, x: x * self.weight)
    layer.__dict__["weight"] = float64(3.0)
    return layer


def buffer_with_a_gradient():
    layer = named(lambda self, x: x * self.weight * self.extra)
    layer.register_buffer("extra", float64(3.0))
    return layer


def helper_method():
    weight = float64(3.0)
    return named(lambda self, x: self.helper(x) * self.weight, helper=lambda self, x: x * weight)


HIDDEN_IN_MODULES = {
    function.__name__: function
    for function in (
        tensor_attribute,
        class_tensor,
        class_property,
        looked_up_attribute,
        shadowed_parameter,
        buffer_with_a_gradient,
        helper_method,
    )
}


def bound_method_of_a_tensor(weight):
    times = weight.mul
    return lambda x: times(x)


def method_of_a_dict(weight):
    get = {"weight": weight}.get
    return lambda x: x * get("weight")


def function_that_says_it_is_torchs(weight):
    @functools.wraps(F.relu)
    def act(x):
        return torch.relu(x) * weight

    return lambda x: act(x)


def function_of_torch_that_holds_it(weight):
    _, pull = torch.func.vjp(lambda v: v * weight, torch.ones(2, dtype=torch.float64))
    return lambda x: pull(x)[0]


@pytest.mark.parametrize("rule", [lambda grad_output: 3 * grad_output, lambda grad_output, vjp: vjp(grad_output)])
@pytest.mark.parametrize(
    "hidden",
    [bound_method_of_a_tensor, method_of_a_dict, function_that_says_it_is_torchs, function_of_torch_that_holds_it],
)
def test_tensor_held_by_what_looks_like_a_function_of_torch_is_found(hidden, rule):
    weight = float64(2.0, 3.0)
    with pytest.raises(go.CapturedTensorError):
        go.custom_backward(rule)(hidden(weight))(float64(1.0, 2.0))


def test_function_of_torch_that_is_replaced_is_looked_at_anew(monkeypatch):
    weight = float64(2.0, 3.0)
    ours = go.custom_backward(lambda grad_output: 3 * grad_output)(lambda x: F.softplus(x))
    ours(float64(1.0, 2.0))
    monkeypatch.setattr(F, "softplus", lambda x: x * weight)
    with pytest.raises(go.CapturedTensorError):
        ours(float64(1.0, 2.0))


@pytest.mark.parametrize("where", HIDDEN_IN_MODULES)
def test_tensor_hidden_in_a_module_is_found(where):
    layer = HIDDEN_IN_MODULES[where]()
    with pytest.raises(go.CapturedTensorError):
        layer(float64(1.0))


@pytest.mark.parametrize("kind", ["number", "class constant", "buffer"])
def test_numbers_and_buffers_of_a_module_are_read(kind):
    if kind == "class constant":
        layer = named(lambda self, x: x * self.weight * self.extra, extra=3.0)
    else:
        layer = named(lambda self, x: x * self.weight * self.extra)
        if kind == "number":
            layer.extra = 3.0
        else:
            layer.register_buffer("extra", float64(3.0, grad=False))
    x = float64(1.0)
    out = layer(x)
    exactly(out.detach(), float64(6.0, grad=False))
    out.backward()
    exactly(x.grad, float64(20.0, grad=False))
    exactly(layer.weight.grad, float64(10.0, grad=False))


def by_pattern(x):
    match x:
        case torch.Tensor(center=found):
            return x * found
    return x * 2.0


ON_TENSOR = {
    "called as a global": lambda x: x * x.SCALE * SCALE,
    "called as a method of texts": lambda x: x * x.center,
    "read by its name": lambda x: x * x.__getattribute__("center"),
    "read by its name by the class": lambda x: x * torch.Tensor.__getattribute__(x, "center"),
    "read by a getter": lambda x: x * operator.attrgetter("center")(x),
    "read by a caller": lambda x: x * operator.methodcaller("__getattribute__", "center")(x),
    "read by a pattern": by_pattern,
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("where", ON_TENSOR)
def test_tensor_on_a_tensor_is_found_whatever_it_is_called(where, rule):
    forward, x = go.custom_backward(RULES[rule])(ON_TENSOR[where]), float64(1.0)
    x.SCALE = x.center = float64(3.0)
    with pytest.raises(go.CapturedTensorError):
        forward(x)


def test_tensor_on_a_tensor_is_found_under_the_name_of_an_attribute_of_the_module():
    layer, x = named(lambda self, x: x * x.extra * self.weight * self.extra, extra=3.0), float64(1.0)
    x.extra = float64(3.0)
    with pytest.raises(go.CapturedTensorError):
        layer(x)


@pytest.mark.parametrize("rule", RULES)
def test_builtin_in_whose_place_the_module_defines_its_own_later_is_looked_at_anew(monkeypatch, rule):
    forward, weight = go.custom_backward(RULES[rule])(lambda x: abs(x) * 2.0), float64(3.0)
    exactly(forward(float64(-1.0)).detach(), float64(2.0, grad=False))
    monkeypatch.setitem(globals(), "abs", lambda x: x * weight)
    with pytest.raises(go.CapturedTensorError):
        forward(float64(1.0))


@pytest.mark.parametrize("rule", RULES)
def test_tensor_that_is_put_among_the_builtins_is_found(monkeypatch, rule):
    monkeypatch.setattr(builtins, "WEIGHT", float64(3.0), raising=False)
    forward = go.custom_backward(RULES[rule])(lambda x: x * WEIGHT)  # noqa: F821
    with pytest.raises(go.CapturedTensorError):
        forward(float64(1.0))


def test_forward_sees_no_grad_mode_and_keeps_it_afterwards():
    seen = []

    class Watching(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(torch.is_grad_enabled())
            return func(*args, **(kwargs or {}))

    forward = go.custom_backward(lambda grad_output: grad_output)(lambda x: torch.exp(x))
    x = float64(1.0)
    with Watching():
        forward(x)
    assert False in seen
    assert torch.is_grad_enabled()
    failing = go.custom_backward(lambda grad_output: grad_output)(lambda x: torch.reshape(x, (7,)))
    with pytest.raises(RuntimeError):
        failing(x)
    assert torch.is_grad_enabled()
