"""Tensors that a forward reaches by a closure or a global are an error, at any call that wants a gradient."""

import collections
import functools
import math
import subprocess
import sys
import types

import pytest
import torch
from oracles import float64
from torch import nn
from torch._dynamo.exc import InternalTorchDynamoError
from torch.utils.checkpoint import checkpoint

import gradoverride as go
from forms import elsewhere

GLOBAL_WEIGHT = float64(3.0)


def closure():
    weight = float64(3.0)

    @go.custom_backward(lambda grad_output: grad_output)
    def forward(x):
        return x * weight

    return forward


def global_variable():
    @go.custom_backward(lambda grad_output: grad_output)
    def forward(x):
        return x * GLOBAL_WEIGHT

    return forward


def closed_over_module():
    linear = nn.Linear(1, 1, dtype=torch.float64)

    @go.custom_backward(lambda grad_output: grad_output)
    def forward(x):
        return linear(x)

    return forward


def attribute_of_a_plain_object():
    class Plain:
        def __init__(self):
            self.weight = float64(3.0)

        @go.custom_backward(lambda grad_output: grad_output)
        def forward(self, x):
            return x * self.weight

    return Plain().forward


def entry_of_a_dict():
    table = {"weight": float64(3.0)}

    @go.custom_backward(lambda grad_output: grad_output)
    def forward(x):
        return x * table["weight"]

    return forward


def computed_from_a_parameter():
    weight = float64(3.0) * 2

    @go.custom_backward(lambda grad_output: grad_output)
    def forward(x):
        return x * weight

    return forward


def straight_through():
    weight = float64(3.0)
    return go.straight_through(lambda x: torch.round(x * weight))


def vjp_rule():
    weight = float64(3.0)
    return go.custom_backward(lambda grad_output, vjp: vjp(grad_output))(lambda x: x * weight)


CAPTURES = {
    "closure": closure,
    "global": global_variable,
    "module in a closure": closed_over_module,
    "attribute of a plain object": attribute_of_a_plain_object,
    "entry of a dict": entry_of_a_dict,
    "non-leaf": computed_from_a_parameter,
    "straight_through": straight_through,
    "vjp": vjp_rule,
}


@pytest.fixture(params=CAPTURES)
def forward(request):
    return CAPTURES[request.param]()


def test_captured_tensor_is_an_error_at_the_call(forward):
    with pytest.raises(go.CapturedTensorError, match=r"test_captured\.py:\d+.*requires.grad"):
        forward(float64(1.0))


def test_original_is_called_where_no_input_needs_a_gradient_and_none_is_lost(forward):
    assert forward(float64(1.0, grad=False)).requires_grad  # by torch's own graph, to the captured tensor


def test_captured_tensor_is_an_error_at_a_later_call_too(forward):
    for _ in range(2):
        with pytest.raises(go.CapturedTensorError, match=r"requires grad"):
            forward(float64(1.0))


def test_captured_tensor_is_fine_where_no_gradient_is_wanted(forward):
    with torch.no_grad():
        assert not forward(float64(1.0)).requires_grad


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (closure, "'weight'"),
        (global_variable, "'GLOBAL_WEIGHT'"),
        (closed_over_module, "linear"),
        (attribute_of_a_plain_object, "weight"),
    ],
    ids=["closure", "global", "module", "attribute"],
)
def test_captured_tensor_is_named(make, name):
    with pytest.raises(go.CapturedTensorError, match=name):
        make()(float64(1.0))


def test_captured_tensor_that_comes_to_require_grad_later_is_found():
    weight = float64(3.0, grad=False)
    forward = go.custom_backward(lambda grad_output: 7 * grad_output)(lambda x: x * weight)
    x = float64(1.0)
    forward(x).backward()
    assert x.grad.item() == 7.0
    weight.requires_grad_()
    with pytest.raises(go.CapturedTensorError, match="weight"):
        forward(x)


def test_captured_tensor_in_a_second_result_is_found():
    weight = float64(3.0)
    forward = go.custom_backward(lambda grad_output: grad_output[0])(lambda x: (x * 2, weight * 2))
    with pytest.raises(go.CapturedTensorError, match="weight"):
        forward(float64(1.0))


def test_captured_tensor_returned_as_it_is_is_found():
    weight = float64(3.0)
    forward = go.custom_backward(lambda grad_output: grad_output)(lambda x: weight)
    with pytest.raises(go.CapturedTensorError, match="weight"):
        forward(float64(1.0))


def test_captured_parameter_of_another_module_is_found():
    class Layer(nn.Module):
        def __init__(self, others):
            super().__init__()
            self.weight = nn.Parameter(float64(2.0))
            self.others = others  # in a list, so not registered

        @go.custom_backward(lambda grad_output: grad_output)
        def forward(self, x):
            return x * self.weight * self.others[0].weight

    with pytest.raises(go.CapturedTensorError, match="weight"):
        Layer([nn.Linear(1, 1, dtype=torch.float64)])(float64(1.0))


NO_GRADIENT_LOST = {
    "detached": lambda weight: lambda x: x * weight.detach(),
    "item": lambda weight: lambda x: x * weight.item(),
    "frozen": lambda weight: lambda x, frozen=weight.detach(): x * frozen,  # noqa: B008 - a default is what is tested
    "under no_grad": lambda weight: torch.no_grad()(lambda x: x * weight),
    "comparison": lambda weight: lambda x: x * (weight > 0),
    "unused": lambda weight: lambda x: (weight, x * 3)[1],
}


@pytest.mark.parametrize("kind", NO_GRADIENT_LOST)
def test_tensor_whose_gradient_is_not_lost_is_no_error(kind):
    forward = go.custom_backward(lambda grad_output: {"x": 7 * grad_output})(NO_GRADIENT_LOST[kind](float64(3.0)))
    x = float64(1.0)
    forward(x).backward()
    assert x.grad.item() == 7.0


def test_frozen_teacher_in_a_closure_is_no_error():
    teacher = nn.Linear(1, 1, dtype=torch.float64).requires_grad_(False)
    forward = go.custom_backward(lambda grad_output: 7 * grad_output)(lambda x: teacher(x))
    x = float64(1.0)
    forward(x).backward()
    assert x.grad.item() == 7.0


def energy_step(x):
    with torch.enable_grad():
        z = x.detach().requires_grad_()
        (slope,) = torch.autograd.grad((z**3).sum(), z, create_graph=True)
    return 2 * x - 0.1 * slope


def from_first_states(x):
    state, offset = torch.zeros(1, dtype=torch.float64).requires_grad_(), torch.ones(1, dtype=torch.float64)
    return (x * 2 + state).sin() + offset.requires_grad_()


MADE_WITHIN = {"energy": (energy_step, 2.0), "first states": (from_first_states, 2 * math.cos(4.0))}


@pytest.mark.parametrize("made", MADE_WITHIN)
def test_tensor_that_the_forward_makes_and_lets_go_is_no_error(made):
    step, slope = MADE_WITHIN[made]
    x = float64(2.0)
    rule = go.custom_backward(lambda grad_output: grad_output * 5)(step)
    assert torch.equal(rule(x), step(x))
    assert torch.autograd.grad(rule(x), x)[0].item() == 5.0
    doubled = go.custom_backward(lambda grad_output, vjp: vjp(grad_output * 2))(step)
    assert torch.autograd.grad(doubled(x), x)[0].item() == pytest.approx(2 * slope)


WITHIN = {
    "vjp": lambda grad_output, vjp: vjp(grad_output),
    "parameters left": lambda grad_output, module: grad_output * module.weight.detach(),
    "all": lambda grad_output, vjp, params: vjp.by_name(grad_output),
}


@pytest.mark.parametrize("rule", WITHIN)
@pytest.mark.parametrize("kept", [False, True])
def test_tensor_that_the_forward_makes_and_gives_to_parts_with_rules_is_no_error_if_it_lets_it_go(rule, kept):
    """As the encoders of speech have their input require grad, for checkpoints within."""

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(float64(3.0).detach())

        def forward(self, x):
            return x * self.weight

    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([Scaled(), Scaled()])

        def forward(self, x):
            x = x[None].requires_grad_()
            if kept:
                keep(x)
            for layer in self.layers:
                x = layer(x)
            return x

    keep = [].append  # what it has no name leads to
    model = Encoder()
    go.override(model, {Scaled: WITHIN[rule], Encoder: WITHIN["vjp"]})
    x = torch.tensor(2.0, dtype=torch.float64)
    if kept:
        with pytest.raises(go.CapturedTensorError, match="that requires grad by a closure"):
            model(x)
        return
    model(x).sum().backward()
    assert [layer.weight.grad.item() for layer in model.layers] == [6.0, 6.0]


@pytest.mark.parametrize("made", MADE_WITHIN)
def test_such_a_forward_may_be_in_a_checkpoint(made):
    step, slope = MADE_WITHIN[made]
    x = float64(2.0)
    doubled = go.custom_backward(lambda grad_output, vjp: vjp(grad_output * 2))(step)
    checkpoint(doubled, x, use_reentrant=False).backward()
    assert x.grad.item() == pytest.approx(2 * slope)


def test_such_a_forward_may_run_before_and_after_it_was_compiled_in_vain():
    """After that Python calls functions in another way, in which an argument has one reference more."""
    script = """
import torch, gradoverride as go
keep = [].append  # what it has no name leads to
def from_first_state(x):
    return x + torch.zeros(1).requires_grad_()
def keeping(x):
    leaf = torch.zeros(1, requires_grad=True)
    keep(leaf)
    return x + leaf
let_go, kept = [go.custom_backward(lambda grad_output: 5 * grad_output)(fn) for fn in (from_first_state, keeping)]
x = torch.ones(1, requires_grad=True)
for _ in range(2):
    assert torch.autograd.grad(let_go(x), x)[0].item() == 5
    try:
        kept(x)
        raise AssertionError("a leaf that is kept must be refused")
    except go.CapturedTensorError as error:
        assert "made one itself" in str(error)
    try:
        torch.compile(lambda: let_go(x), backend="eager")()
        raise AssertionError("compiled code cannot tell, and refuses it")
    except go.CapturedTensorError:
        continue
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_module_that_starts_from_a_state_of_its_own_may_be_overridden():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = nn.GRU(2, 3, dtype=torch.float64)

        def forward(self, x):
            start = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
            return self.cell(x, start)[0]

    torch.manual_seed(0)
    model = Recurrent()
    x = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    wanted = [x, *model.parameters()]
    plain = torch.autograd.grad(model(x).square().sum(), wanted)
    with go.override(model, {model: lambda grad_output, vjp: vjp(grad_output)}):
        y = model(x)
    for found, expected in zip(torch.autograd.grad(y.square().sum(), wanted), plain, strict=True):
        torch.testing.assert_close(found, expected)


def test_state_that_an_earlier_call_has_left_is_refused_though_only_its_graph_has_the_leaves():
    class Neuron(nn.Module):
        state = 0.0

        def forward(self, x):
            self.state = 0.9 * self.state + x
            return self.state.tanh()

    model = nn.Sequential(nn.Sequential(Neuron()))
    with go.override(model, {model: lambda grad_output, vjp: vjp(grad_output)}):
        model(float64(1.0))
        with pytest.raises(go.CapturedTensorError):
            model(float64(2.0))


class Keeper:
    def __init__(self):
        self.kept = [[[[]]]]  # too deep for its name to be found


@pytest.mark.parametrize("vjp", [False, True])
@pytest.mark.parametrize("how", ["kept", "hooked", "returned"])
def test_tensor_that_the_forward_makes_and_that_something_else_has_is_refused_with_its_way_out(how, vjp):
    keeper = Keeper()

    def step(x, end=lambda slope: slope):
        with torch.enable_grad():
            z = x.detach().requires_grad_()
            (slope,) = torch.autograd.grad((z**3).sum(), z, create_graph=True)
        if how == "kept":
            keeper.kept[0][0][0].append(z)
        if how == "hooked":
            z.register_hook(print)
        result = x - 0.1 * end(slope)
        return (result, end(z)) if how == "returned" else result

    rule = go.custom_backward(
        (lambda grad_output, vjp: vjp(grad_output)) if vjp else (lambda grad_output: torch.full((1,), 5.0))
    )
    text = r"a tensor of shape \(1,\) that requires grad .* or made one itself.* detach\(\) what it computes from it$"
    with pytest.raises(go.CapturedTensorError, match=text):
        rule(step)(float64(2.0))
    x = float64(2.0)
    result = rule(lambda x: step(x, torch.detach))(x)
    (result[0] if how == "returned" else result).backward()
    assert x.grad.item() == (1.0 if vjp else 5.0)


# Tensors within an argument that is an object


class Batch:
    def __init__(self, x):
        self.x = x


class Slotted:
    __slots__ = ("x",)

    def __init__(self, x):
        self.x = x


HOLDERS = {
    "object": (Batch, lambda batch: batch.x, "'batch.x'"),
    "slots": (Slotted, lambda batch: batch.x, "'batch.x'"),
    "namespace": (lambda x: types.SimpleNamespace(x=x), lambda batch: batch.x, "'batch.x'"),
    "deque": (lambda x: collections.deque([x]), lambda batch: batch[0], r"'batch\[0\]'"),
    "UserDict": (lambda x: collections.UserDict(x=x), lambda batch: batch["x"], r"'batch.data\['x'\]'"),
    "values of a dict": (lambda x: {"x": x}.values(), lambda batch: next(iter(batch)), r"'batch\[0\]'"),
    "generator": (lambda x: (part for part in [x]), next, "what 'batch' gives"),
    "object in a list": (lambda x: [Batch(x)], lambda batch: batch[0].x, r"'batch\[0\].x'"),
    "object in an object": (lambda x: Batch(Batch(x)), lambda batch: batch.x.x, "'batch.x.x'"),
}


@pytest.mark.parametrize("decorate", [go.custom_backward(lambda grad_output: grad_output), go.straight_through])
@pytest.mark.parametrize("kind", HOLDERS)
def test_tensor_within_an_object_that_is_an_argument_is_an_error_that_names_it(kind, decorate):
    make, get, name = HOLDERS[kind]

    def forward(batch, factor=2.0):
        return get(batch) * factor

    message = rf"(?s)'forward' \(.*test_captured\.py:\d+\).*{name}, which requires grad.*Pass the tensor itself"
    decorated = decorate(forward)
    with pytest.raises(go.CapturedTensorError, match=message):
        decorated(make(float64(1.0)))
    decorated(make(float64(1.0, grad=False)))
    with torch.no_grad():
        decorated(make(float64(1.0)))


def test_tensor_within_an_object_is_named_where_another_argument_wants_a_gradient():
    forward = go.custom_backward(lambda grad_output: {"x": grad_output})(lambda x, batch: x * batch.x)
    with pytest.raises(go.CapturedTensorError, match=r"reached 'batch\.x', which requires grad"):
        forward(float64(1.0), Batch(float64(1.0)))


def test_tensor_within_an_object_is_named_alone_where_those_that_are_given_come_from_the_same_one():
    """As the keys of a cache do, in a block that is given what was rotated."""
    forward = go.custom_backward(lambda grad_output, vjp: vjp(grad_output))(
        lambda x, both, batch: x * both[0] * batch.x
    )
    weight = float64(1.0)
    with pytest.raises(go.CapturedTensorError, match=r"it reached 'batch\.x', which requires grad"):
        forward(weight * 2, (weight * 3, weight * 4), Batch(weight * 5))


def test_tensor_within_an_object_is_an_error_in_compiled_code_and_in_transforms():
    forward = go.custom_backward(lambda grad_output: grad_output)(lambda batch: batch.x * 2)

    def outer(x):
        return forward(Batch(x))

    with pytest.raises(Exception, match=r"'batch\.x', which requires grad"):
        torch.compile(outer, backend="aot_eager", fullgraph=True)(float64(1.0))
    with pytest.raises(go.CapturedTensorError, match=r"'batch\.x', which requires grad"):
        torch.func.grad(outer)(float64(1.0, grad=False))


@pytest.mark.parametrize("grad", [False, True])
def test_parameter_of_a_module_that_is_an_argument_is_an_error_that_names_it(grad):
    forward = go.custom_backward(lambda grad_output: {"x": grad_output * 7})(lambda net, x: net(x))
    with pytest.raises(go.CapturedTensorError, match=r"'net\.weight', which requires grad"):
        forward(nn.Linear(1, 1, bias=False, dtype=torch.float64), float64(1.0, grad=grad))
    frozen = nn.Linear(1, 1, dtype=torch.float64).requires_grad_(False)
    assert forward(frozen, float64(1.0, grad=grad)).requires_grad is grad


class Readout(nn.Module):
    """It reads out a state that another method, or the one who has it, has set."""

    def __init__(self, state, how="attribute"):
        super().__init__()
        if how == "buffer":
            self.register_buffer("state", state)
        elif how == "part":
            self.part = Readout(state)
        else:
            self.state = [state] if how == "list" else state

    @property
    @go.straight_through
    def fired(self):
        return torch.sign(self.state)

    @go.custom_backward(lambda grad_output: 7 * grad_output)
    def read(self, how="attribute", factor=2.0):
        state = self.part.state if how == "part" else self.state
        return (state[0] if how == "list" else state) * factor


@pytest.mark.parametrize(
    ("how", "name"),
    [("attribute", "self.state"), ("buffer", "self.state"), ("list", r"self.state\[0\]"), ("part", "self.part.state")],
)
def test_state_that_a_method_without_arguments_reads_is_an_error_that_names_it(how, name):
    with pytest.raises(go.CapturedTensorError, match=rf"'read' \(.*'{name}', which requires grad.*would be dropped"):
        Readout(float64(1.0) * 2, how).read(how)
    plain = Readout(float64(1.0), how).read(how, torch.ones(1, dtype=torch.float64))
    assert plain.requires_grad  # an argument is there, and wants none: torch's own graph, to the state
    Readout(float64(1.0, grad=False), how).read(how)
    with torch.no_grad():
        Readout(float64(1.0), how).read(how)


def test_state_of_an_object_that_is_no_module_is_an_error_that_names_it():
    class Counter:
        def __init__(self, state):
            self.state = state

        @go.custom_backward(lambda grad_output: None)
        def read(self, factor):
            return self.state * factor

    with pytest.raises(go.CapturedTensorError, match=r"'read' \(.*'self.state', which requires grad.*would be dropped"):
        Counter(float64(1.0)).read(2)
    assert Counter(float64(3.0, grad=False)).read(2).item() == 6.0


def test_state_that_a_property_reads_is_an_error_that_names_it():
    with pytest.raises(go.CapturedTensorError, match=r"'fired' \(.*'self.state', which requires grad"):
        _ = Readout(float64(1.0)).fired
    # As an argument it has the rule, and what is not read is no matter.
    x, neuron = float64(2.0), Readout(float64(1.0))
    go.straight_through(torch.sign)(x).backward()
    assert x.grad.item() == 1.0
    neuron.state, neuron.other = float64(1.0, grad=False), x
    assert not neuron.fired.requires_grad


def test_object_that_holds_no_tensor_with_a_gradient_is_no_error():
    weight = float64(3.0)
    forward = go.custom_backward(lambda grad_output: grad_output)(lambda x, batch: x * weight * batch.x)
    x = float64(1.0, grad=False)
    for other in (Batch(2.0), Batch(float64(2.0, grad=False)), Batch(nn.Linear(1, 1)), Batch(None)):
        other.x = other.x if isinstance(other.x, torch.Tensor) else 2.0
        forward(x, other).backward()
    assert weight.grad.item() == 8.0


# Names


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.other = [float64(1.0)]
        self.weight = nn.Parameter(float64(1.0))
        self.register_buffer("scale", float64(2.0))
        self.settings = Batch(float64(3.0))
        self.ways = [self.helper]

    def helper(self, x):
        return x * self.weight

    @go.custom_backward(lambda grad_output: grad_output)
    def by_buffer(self, x):
        return x * self.scale

    @go.custom_backward(lambda grad_output: grad_output)
    def by_setting(self, x):
        return x * self.settings.x

    @go.custom_backward(lambda grad_output, weight: {"x": grad_output, "weight": grad_output})
    def by_bound_method(self, x):
        return self.ways[0](x)


HELD = Batch(float64(3.0))


def helped(x, factor=float64(5.0)):  # noqa: B008 - a default is what is tested
    return x * factor


def helper(x):
    return x + 1.0


def twice(function, x):
    return function(function.data * x)


READING_A_HELPER = {
    "data": lambda x: helper(x) * helper.data,
    "grad": lambda x: helper(x * helper.grad),
    "T": lambda x: x * helper.T,
    "real": lambda x: helper.real.mul(x),
    "imag": lambda x: (lambda function: function.imag * x)(helper),
    "shape": lambda x: [one.shape * x for one in (helper,)][0],  # noqa: RUF015  # a loop
    "mul": lambda x: getattr(helper, "mul") * x,  # noqa: B009  # another way
    "other": lambda x: helper.other * x,
}


@pytest.mark.parametrize("name", READING_A_HELPER)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_attribute_that_a_helper_gets_later_is_refused_whatever_its_name(name, compiled):
    forward = go.custom_backward(lambda grad_output: grad_output)(READING_A_HELPER[name])
    forward = torch.compile(forward, backend="eager", fullgraph=True) if compiled else forward
    x = float64(2.0)
    try:
        setattr(helper, name, 3.0)
        if name != "real":  # whose method it calls
            forward(x)
        setattr(helper, name, float64(3.0))
        with pytest.raises((go.CapturedTensorError, InternalTorchDynamoError), match=r"must get each tensor .* grad"):
            forward(x)
        setattr(helper, name, torch.tensor(3.0, dtype=torch.float64))
        (found,) = torch.autograd.grad(forward(x).sum(), x)
        assert found == 1.0
    finally:
        vars(helper).clear()


def test_helper_that_is_handed_on_and_gets_an_attribute_later_is_refused():
    forward, x = go.custom_backward(lambda grad_output: grad_output)(lambda x: twice(helper, x)), float64(2.0)
    try:
        helper.data = 3.0
        forward(x)
        helper.data = float64(3.0)
        with pytest.raises(go.CapturedTensorError, match=r"reached 'helper\.data', which requires grad"):
            forward(x)
    finally:
        vars(helper).clear()


def with_attribute(x):
    return (x - with_attribute.mean) * 2


class Called:
    def __init__(self):
        self.weight = float64(2.0)

    def __call__(self, x):
        return x * self.weight


class OfClass:
    weight = float64(2.0)

    @go.custom_backward(lambda grad_output: grad_output)
    def forward(self, x):
        return x * self.weight


class InSlots:
    __slots__ = ("weight",)

    def __init__(self):
        self.weight = float64(2.0)

    @go.custom_backward(lambda grad_output: grad_output)
    def forward(self, x):
        return x * self.weight


CAPTURED_BY = {
    "object that is called": (Called, "'self.weight'"),
    "attribute of the class": (lambda: OfClass().forward, "'self.weight'"),
    "slot": (lambda: InSlots().forward, "'self.weight'"),
    "buffer": (lambda: Named().by_buffer, "'self.scale'"),
    "attribute of an attribute": (lambda: Named().by_setting, "'self.settings.x'"),
    "method bound to the module": (lambda: Named().by_bound_method, r"'self.ways\[0\].__self__.weight'"),
    "attribute of a global": (lambda: lambda x: x * HELD.x * 1, "'HELD.x'"),
    "default of a helper": (lambda: lambda x: helped(x), "'factor'"),
    "argument of a partial": (lambda: functools.partial(lambda w, x: w * x, float64(2.0)), r"'args\[0\]'"),
}


@pytest.mark.parametrize("kind", CAPTURED_BY)
def test_captured_tensor_is_named_where_it_is_and_no_other(kind):
    make, name = CAPTURED_BY[kind]
    forward = make()
    if not isinstance(getattr(forward, "__self__", None), (nn.Module, OfClass, InSlots)):
        forward = go.custom_backward(lambda grad_output: {"x": grad_output})(forward)
    with pytest.raises(go.CapturedTensorError, match=rf"reached {name}, which requires grad"):
        forward(float64(1.0))


@pytest.mark.parametrize("sooner", [False, True])
def test_tensor_on_the_function_itself_is_named_though_every_tensor_has_that_name(sooner):
    vars(with_attribute).clear()
    if sooner:
        with_attribute.mean = float64(0.0)
    forward = go.custom_backward(lambda grad_output: grad_output)(with_attribute)
    with_attribute.mean = 1.0
    forward(float64(1.0))
    with_attribute.mean = float64(0.0)
    with pytest.raises(go.CapturedTensorError, match=r"reached 'with_attribute\.mean', which requires grad"):
        forward(float64(1.0))


class Referring(nn.Module):
    """A module whose forward meets its weight past `self`, in one of several ways."""

    def __init__(self, how):
        super().__init__()
        if how != "made":
            self.weight = nn.Parameter(float64(2.0, 3.0))
        by_part = nn.Identity()
        by_part.whole = [self]
        by_part.register_forward_hook(lambda part, given, result: result * part.whole[0].weight)
        self.part = by_part
        self.by_closure = lambda x: x * self.weight
        self.how = how

    @go.custom_backward(lambda grad_output, params: {"x": grad_output, **params})
    def forward(self, x):
        if self.how == "part":
            return self.part(x)
        if self.how == "closure":
            return self.by_closure(x)
        self.weight = nn.Parameter(float64(2.0, 3.0))
        return x * self.weight


@pytest.mark.parametrize("how", ["part", "closure", "made"])
def test_own_parameter_that_is_reached_past_self_is_an_error_that_names_it(how):
    message = (
        r"^'Referring' \(.*\) must get each .*; it reached its parameter 'weight' by a reference to the module, or "
        r"made it in this call, and that gradient would be lost. Reach it through 'self', make it before, or "
        r"detach\(\) it$"
    )
    with pytest.raises(go.CapturedTensorError, match=message):
        Referring(how)(float64(1.0, 2.0))


def test_argument_that_the_forward_tells_to_require_grad_is_not_captured():
    @go.custom_backward(lambda grad_output: 7 * grad_output)
    def forward(x):
        x.requires_grad_()
        return x * 2

    for x in (float64(1.0), float64(1.0) * 1):
        x.retain_grad()
        forward(x).backward()
        assert x.grad.item() == 7.0


class Forces(nn.Module):
    """An energy and its derivative, as models of molecules have it."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(float64(2.0).detach())

    def forward(self, scale, position):
        position.requires_grad_()
        energy = (self.weight * position**3).sum() * scale
        return torch.autograd.grad(energy, position, create_graph=True)[0]


def test_argument_without_a_gradient_that_the_forward_tells_to_require_grad_is_an_error_that_says_so():
    model = Forces()
    message = r"'Forces' .* must be given arguments that require grad already.*'position'.*Call requires_grad_"
    with go.override(model, {model: lambda grad_output, vjp: vjp(grad_output)}):
        with pytest.raises(go.UnsupportedError, match=message):
            model(float64(1.0).detach(), float64(3.0).detach())
        position = float64(3.0)
        model(float64(1.0).detach(), position).sum().backward()
    assert model.weight.grad.item() == 27.0
    assert position.grad.item() == 36.0


# --- tensors of the graph that is kept of another call


class Integrator(nn.Module):
    """Keeps a state from one call to the next, as the neurons of a spiking network do."""

    def __init__(self):
        super().__init__()
        self.state = 0.0

    def forward(self, x):
        self.state = 0.5 * self.state + x
        return self.state.sigmoid()


@pytest.mark.parametrize("leaf", [True, False])
def test_state_that_a_module_has_kept_from_a_call_is_an_error_in_the_next_that_names_it(leaf):
    module = Integrator()
    x = float64(1.0, 2.0)
    with go.override(module, {module: lambda grad_output, vjp: vjp(grad_output)}):
        module(x if leaf else x * 1)
        with pytest.raises(go.CapturedTensorError, match=r"'Integrator' .* reached 'self.state', which requires"):
            module(x if leaf else x * 1)
        module.state = x.detach()
        module(x if leaf else x * 1).sum().backward()
    state = 1.5 * x.detach()
    assert torch.allclose(x.grad, state.sigmoid() * (1 - state.sigmoid()))


@pytest.mark.parametrize("leaf", [True, False])
@pytest.mark.parametrize("rule", [lambda grad_output, vjp: vjp(grad_output), lambda grad_output: grad_output])
def test_tensor_that_a_call_captures_of_the_one_around_it_is_found(rule, leaf):
    @go.custom_backward(lambda grad_output, vjp: vjp(grad_output))
    def outer(x):
        doubled = 2 * x
        return go.custom_backward(rule)(lambda y: y * doubled)(x)

    x = float64(1.0, 2.0)
    with pytest.raises(go.CapturedTensorError, match=r"it reached 'doubled', which requires grad"):
        outer(x if leaf else x * 1)


@pytest.mark.parametrize("leaf", [True, False])
def test_what_left_the_forward_of_a_part_beside_its_result_is_found_in_the_call_around_it(leaf):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = Aside()

        def forward(self, x):
            return self.layer(x) + self.layer.aside

    model = Model()
    go.override(model, {nn.Module: lambda grad_output, vjp: vjp(grad_output)})
    x = float64(1.0, 2.0)
    with pytest.raises(go.CapturedTensorError, match=r"'Model' .* it reached a tensor of another call with a rule"):
        model(x if leaf else x * 1)


# --- tensors that leave a forward otherwise than in its result


class Aside(nn.Module):
    """Keeps a loss of its own beside its result, as a mixture of experts does."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(float64(2.0, 3.0).detach())

    def forward(self, x):
        self.aside = (x * x).sum()
        return x * self.weight


def by_attribute():
    module = Aside()
    module.forward = go.custom_backward(lambda grad_output, vjp: vjp(grad_output))(module.forward)
    return module.forward, lambda: module.aside


def by_override(rule=lambda grad_output, vjp: vjp(grad_output)):
    module = Aside()
    go.override(module, {Aside: rule})
    return module, lambda: module.aside


def by_override_that_answers_for_all():
    return by_override(lambda grad_output, vjp, params: vjp.by_name(grad_output))


def by_list():
    kept = []

    @go.custom_backward(lambda grad_output, vjp: vjp(grad_output))
    def forward(x):
        kept.append(x.clone().sum())
        return x * 2

    return forward, kept.pop


def by_argument():
    kept = {}

    @go.custom_backward(lambda grad_output, vjp: vjp(grad_output))
    def forward(x, kept):
        kept["aside"] = x.clone().sum()
        return x * 2

    return lambda x: forward(x, kept), lambda: kept["aside"]


def by_argument_that_grows():
    kept = []

    @go.custom_backward(lambda grad_output, vjp: vjp(grad_output))
    def forward(x, kept):
        kept += [x.clone().sum()]
        return x * 2

    return lambda x: forward(x, kept), lambda: kept[-1]


def by_argument_within_one():
    cache = {}

    @go.custom_backward(lambda grad_output, vjp: vjp(grad_output))
    def forward(x, state):
        state[1]["aside"] = x.clone().sum()
        return x * 2

    return lambda x: forward(x, (3, cache)), lambda: cache["aside"]


def by_hook():
    kept = []
    module = nn.Sequential(nn.Identity(), nn.Tanh())
    module[0].register_forward_hook(lambda *given: kept.append(given[-1].clone().sum()))
    go.override(module, {nn.Sequential: lambda grad_output, vjp: vjp(grad_output)})
    return module, kept.pop


ASIDE = [
    *(by_attribute, by_override, by_override_that_answers_for_all, by_list, by_hook),
    *(by_argument, by_argument_that_grows, by_argument_within_one),
]


@pytest.mark.parametrize("make", ASIDE)
@pytest.mark.parametrize("leaf", [True, False])
def test_gradient_of_what_left_the_forward_beside_its_result_is_an_error_that_says_so(make, leaf):
    forward, aside = make()
    x = float64(1.0, 2.0)
    result = forward(x if leaf else x * 1)
    with pytest.raises(go.UnsupportedError, match="must return each tensor that a gradient is to come back from"):
        (result.sum() + aside()).backward()


@pytest.mark.parametrize("make", ASIDE)
@pytest.mark.parametrize("leaf", [True, False])
@pytest.mark.parametrize("accumulated", [True, False])
def test_so_it_is_where_the_inputs_are_given_whose_gradients_are_wanted(make, leaf, accumulated):
    forward, aside = make()
    x, head = float64(1.0, 2.0), float64(3.0, 4.0)
    result = forward(x if leaf else x * 1)
    loss = (result * head).sum() + aside()
    (of_head,) = torch.autograd.grad(loss, head, retain_graph=True)
    torch.testing.assert_close(of_head, result.detach())
    with pytest.raises(go.UnsupportedError, match="must return each tensor that a gradient is to come back from"):
        loss.backward(inputs=[x, head]) if accumulated else torch.autograd.grad(loss, [head, x])


@pytest.mark.parametrize("leaf", [True, False])
def test_a_parameter_has_the_gradient_of_what_left_the_forward_where_none_is_wanted_of_the_arguments(leaf):
    module = nn.Sequential(nn.Linear(2, 2, dtype=torch.float64), nn.Tanh())
    kept = []
    module[0].register_forward_hook(lambda *given: kept.append(given[-1]))
    weight, x = module[0].weight, float64(1.0, 2.0)
    with go.override(module, {nn.Sequential: lambda grad_output, vjp: 3 * vjp(grad_output)}):
        result = module(x if leaf else x * 1)
    (found,) = torch.autograd.grad(result.sum() + kept[0].sum(), weight, retain_graph=True)
    plain = module(x.detach())
    (expected,) = torch.autograd.grad(plain.sum() + kept[1].sum(), weight)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("rule", [lambda grad_output, vjp: vjp(grad_output), WITHIN["all"]])
@pytest.mark.parametrize("leaf", [True, False])
def test_gradient_of_a_value_on_the_way_to_the_result_is_the_same_error(rule, leaf):
    """A router's scores, or hidden states, that a hook has kept for a loss of their own."""
    module = nn.Sequential(nn.Tanh(), nn.Linear(2, 2, dtype=torch.float64), nn.Tanh())
    kept = []
    module[1].register_forward_hook(lambda *given: kept.append(given[-1]))
    go.override(module, {module: rule})
    x = float64(1.0, 2.0)
    result = module(x if leaf else x * 1)
    with pytest.raises(go.UnsupportedError, match="must return each tensor that a gradient is to come back from"):
        (result.sum() + kept[0].sum()).backward()


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
@pytest.mark.parametrize("convert", [torch.Tensor.to_sparse, torch.Tensor.to_sparse_csr, torch.Tensor.to_mkldnn])
def test_a_leaf_without_views_has_its_gradient(convert):
    def dense(x):
        return x.to_dense() ** 2

    @go.custom_backward(lambda grad_output, vjp: 3 * vjp(grad_output))
    def forward(x):
        return dense(x) * 1

    x = convert(torch.eye(2) * 5).requires_grad_()
    forward(x).sum().backward()
    torch.testing.assert_close(x.grad.to_dense(), 30 * torch.eye(2))


@pytest.mark.parametrize("make", ASIDE)
def test_what_left_the_forward_is_no_error_where_its_gradient_is_not_asked_for(make):
    forward, aside = make()
    x = float64(1.0, 2.0)
    result = forward(x)
    assert aside().detach().isfinite()
    (gradient,) = torch.autograd.grad(result.sum(), x)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("leaf", [True, False])
def test_a_forward_may_take_gradients_of_its_own_on_the_way(leaf):
    """An adversarial step within the forward: what it brings to `x` is not the gradient of the result."""

    @go.custom_backward(lambda grad_output, vjp: 2 * vjp(grad_output))
    def attacked(x):
        step = torch.zeros_like(x, requires_grad=True)
        ((x + step) ** 3).sum().backward()
        return (x + step.grad.sign()) ** 2

    x = float64(1.0, 2.0)
    attacked(x if leaf else x * 1).sum().backward()
    torch.testing.assert_close(x.grad, 4 * (x.detach() + 1))


# --- a Function that keeps something under the name that torch has for the leaf of a node


class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.variable = x
        ctx.save_for_backward(x, weight)
        return x * weight

    @staticmethod
    def backward(ctx, grad_output):
        x, weight = ctx.saved_tensors
        return grad_output * weight, (grad_output * x).sum()


@pytest.mark.parametrize("inner", [lambda x: x, torch.exp], ids=["argument", "what is computed of it"])
def test_what_a_function_keeps_in_its_context_is_no_captured_tensor(inner):
    @go.custom_backward(lambda grad_output, vjp: 7 * vjp(grad_output))
    def scale(x):
        return Scaled.apply(inner(x), torch.tensor(3.0, dtype=torch.float64))

    x = float64(1.0, 2.0)
    scale(x).sum().backward()
    (expected,) = torch.autograd.grad((21 * inner(x)).sum(), x)
    torch.testing.assert_close(x.grad, expected)


def test_captured_tensor_behind_a_function_that_keeps_the_argument_in_its_context_is_an_error():
    weight = float64(3.0)

    @go.custom_backward(lambda grad_output, vjp: vjp(grad_output))
    def scale(x):
        return Scaled.apply(x, weight)

    with pytest.raises(go.CapturedTensorError, match="it reached 'weight', which requires grad"):
        scale(float64(1.0, 2.0))


# --- what a module keeps from one call to the next


class Neuron(nn.Module):
    """Goes on from what its call before has left."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(float64(2.0, 3.0).detach())
        self.potential, self.mask = None, None

    def forward(self, x):
        if self.mask is None:
            self.mask = torch.ones_like(x)
        self.charge(x)
        return self.potential**2 * self.mask * self.weight

    def charge(self, x):
        self.potential = x if self.potential is None else self.potential / 2 + x


class Keeping(Neuron):
    """The same with a buffer."""

    def __init__(self):
        super().__init__()
        del self.potential
        self.register_buffer("potential", None, persistent=False)


class Deriving(Neuron):
    """The same by the methods of its base."""

    def forward(self, x):
        return super().forward(x) * 1

    def charge(self, x):
        super().charge(x)


class ChargedElsewhere(Neuron):
    def charge(self, x):
        elsewhere.charge(self, x)


class Cutting(Neuron):
    def charge(self, x):
        self.potential = x if self.potential is None else self.potential.detach() / 2 + x


class Table(Neuron):
    def forward(self, x):
        if self.mask is None:
            self.mask = torch.ones_like(x)
        return x * self.mask


class Shown(Neuron):
    """Keeps what it computes for whoever wants to see it."""

    def forward(self, x):
        self.charge(x)
        return self.potential * 2

    def charge(self, x):
        self.potential = x * self.weight


@pytest.mark.parametrize("kind", [Neuron, Keeping, Deriving, ChargedElsewhere])
@pytest.mark.parametrize("by_name", [True, False])
def test_a_state_that_is_cut_off_from_earlier_calls_is_told_of_once(kind, by_name):
    def of_state(grad_output, x, module):
        return 2 * grad_output * x * module.weight

    rule = of_state if by_name else lambda grad_output: grad_output
    module, x = kind(), float64(1.0, 2.0)
    with go.override(module, {module: rule}):
        first = module(x)
        text = r"'\w+' .* goes on from 'self.potential', which a call before has kept: .*'vjp'.*detach\(\)"
        with pytest.warns(go.GradOverrideWarning, match=text):
            second = module(x)
        module(x)
    (first.sum() + second.sum()).backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("kind", [Cutting, Table, Shown])
def test_a_state_that_is_cut_anyway_a_table_that_is_made_once_and_what_is_shown_are_not(kind):
    module, x = kind(), float64(1.0, 2.0)
    with go.override(module, {module: lambda grad_output: grad_output}):
        for _ in range(3):
            module(x).sum().backward()
    torch.testing.assert_close(x.grad, torch.full_like(x, 3.0))


def test_a_state_under_no_rule_or_where_no_gradient_is_wanted_is_not_told_of():
    module, x = Neuron(), float64(1.0, 2.0)
    with go.override(module, {module: lambda grad_output: grad_output}):
        with torch.no_grad():
            module(x)
            module(x)
        module.potential = None
        module(x)
    module(x)
