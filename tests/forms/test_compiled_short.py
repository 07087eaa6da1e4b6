"""Compiled calls that take the short path (`traced.py`): what each kind of them has, and what sends a call elsewhere.

The oracle is autograd's own derivative of the plain forward, with the rule applied by hand. Conformance, group compile.
"""

import pytest
import torch
import torch.nn.functional as F
from oracles import closely, noise
from torch import nn

import gradoverride as go
from gradoverride._core.calls import wrapper

pytestmark = pytest.mark.usefixtures("fresh_compiler")


class Half(nn.Module):
    """Reads a parameter twice, a buffer and a number."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(noise(4).detach())
        self.register_buffer("shift", noise(4, grad=False))
        self.factor = 3.0

    def forward(self, x):
        return (x * self.weight).sin() * self.weight + self.shift * self.factor


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(noise(4).detach())

    def forward(self, x, other):
        return x.sin() * other * self.weight


MODULES = {
    "linear": lambda: nn.Linear(4, 4),
    "without a bias": lambda: nn.Linear(4, 4, bias=False),
    "prelu": nn.PReLU,
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "own": Half,
    "two inputs": TwoInputs,
}
RULES = {
    "gradient alone": (lambda grad_output: 3 * grad_output, lambda g, y, x: [3 * g] * len(x)),
    "input": (
        lambda grad_output, input: grad_output * input,
        lambda g, y, x: [g * one.detach() for one in x],
    ),
    "vjp": (
        lambda grad_output, vjp: vjp(grad_output * 3),
        lambda g, y, x: torch.autograd.grad(y, x, g * 3, retain_graph=True),
    ),
    "vjp of the gradient": (
        lambda grad_output, vjp: vjp(grad_output),
        lambda g, y, x: torch.autograd.grad(y, x, g, retain_graph=True),
    ),
    "vjp and output": (
        lambda grad_output, output, vjp: vjp(grad_output * output),
        lambda g, y, x: torch.autograd.grad(y, x, g * y.detach(), retain_graph=True),
    ),
}


def rule_for(kind, name):
    if kind != "two inputs":
        return RULES[name]
    if name == "gradient alone":
        return lambda grad_output: (3 * grad_output, 3 * grad_output), RULES[name][1]
    if name == "input":
        return lambda grad_output, x, other: (grad_output * x, grad_output * other), RULES[name][1]
    return RULES[name]


def built(kind):
    torch.manual_seed(1)
    return MODULES[kind]().double()


def arguments(kind):
    torch.manual_seed(2)
    return [noise(3, 4) for _ in range(2 if kind == "two inputs" else 1)]


def refuse(*_):
    raise AssertionError("the general path")


@pytest.mark.parametrize(
    ("kind", "name", "backend"),
    [
        *((kind, name, "aot_eager") for kind in MODULES for name in RULES),
        *(("linear", "vjp", "inductor"), ("own", "gradient alone", "inductor")),
    ],
)
def test_gradient_is_the_rules_and_parameters_have_autograds_own(kind, name, backend, monkeypatch):
    rule, by_hand = rule_for(kind, name)
    module, xs = built(kind), arguments(kind)
    plain, plain_xs = built(kind), arguments(kind)
    y = plain(*plain_xs)
    g = noise(*y.shape, grad=False)
    expected = list(by_hand(g, y, plain_xs))
    trained = list(plain.parameters())
    own = torch.autograd.grad(y, trained, g) if trained else ()
    monkeypatch.setattr(wrapper, "differentiate", refuse)
    with go.override(module, {module: rule}):
        ours = torch.compile(module, backend=backend, fullgraph=True)(*xs)
        ours.backward(g)
    closely(ours.detach(), y.detach())
    closely([x.grad for x in xs], expected)
    for parameter, gradient in zip(module.parameters(), own, strict=True):
        closely(parameter.grad, gradient)


@pytest.mark.parametrize("name", ["gradient alone", "vjp"])
@pytest.mark.parametrize("kind", ["linear", "own"])
def test_frozen_parameters_have_no_gradient(kind, name):
    rule, by_hand = rule_for(kind, name)
    module, (x,) = built(kind), arguments(kind)
    plain, (plain_x,) = built(kind).requires_grad_(False), arguments(kind)
    module.weight.requires_grad_(False)
    y = plain(plain_x)
    with go.override(module, {module: rule}):
        torch.compile(module, backend="aot_eager", fullgraph=True)(x).sum().backward()
    closely([x.grad], list(by_hand(torch.ones_like(y), y, [plain_x])))
    assert module.weight.grad is None
    assert kind == "own" or module.bias.grad.tolist() == [3.0] * 4


@pytest.mark.parametrize("name", RULES)
def test_parameters_have_theirs_where_the_input_wants_none(name):
    module, plain, (x,) = built("own"), built("own"), arguments("own")
    with go.override(module, {module: RULES[name][0]}):
        torch.compile(module, backend="aot_eager", fullgraph=True)(x.detach()).sum().backward()
        frozen = torch.compile(module.requires_grad_(False), backend="aot_eager", fullgraph=True)(x.detach())
    plain(x.detach()).sum().backward()
    closely(module.weight.grad, plain.weight.grad)
    assert not frozen.requires_grad


def test_weight_that_is_no_parameter_is_refused_as_in_eager_mode():
    class Computed(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = noise(4)

        def forward(self, x):
            return x * self.weight

    module, x = Computed(), noise(3, 4)
    with go.override(module, {module: lambda grad_output: 3 * grad_output}):
        for run in (module, torch.compile(module, backend="aot_eager", fullgraph=True)):
            with pytest.raises(
                go.CapturedTensorError,
                match=r"'Computed'.* reached .* which requires grad|'Computed'.* a tensor that requires grad",
            ):
                run(x)


@pytest.mark.parametrize("vjp", [False, True])
def test_rule_that_answers_for_a_parameter_by_a_name_that_its_code_does_not_show_is_told_so(vjp):
    names = ["".join(["wei", "ght"])]

    def with_vjp(grad_output, vjp):
        return {"input": vjp(grad_output), names[0]: torch.zeros(4, 4, dtype=grad_output.dtype)}

    def alone(grad_output):
        return {"input": grad_output, names[0]: torch.zeros(4, 4, dtype=grad_output.dtype)}

    module, (x,) = built("linear"), arguments("linear")
    with (
        go.override(module, {module: with_vjp if vjp else alone}),
        pytest.raises(go.RuleResultError, match=r"'weight'.* must ask for it where it is compiled"),
    ):
        torch.compile(module, backend="aot_eager", fullgraph=True)(x).sum().backward()


def test_vjp_by_name_of_a_module_with_parameters_gives_theirs():
    def rule(grad_output, vjp):
        return {name: 2 * one for name, one in vjp.by_name(grad_output).items()}

    module, plain, (x,) = built("linear"), built("linear"), arguments("linear")
    with go.override(module, {module: rule}):
        torch.compile(module, backend="aot_eager", fullgraph=True)(x).sum().backward()
    (2 * plain(x.detach()).sum()).backward()
    closely([one.grad for one in module.parameters()], [one.grad for one in plain.parameters()])
    closely(x.grad, 2 * plain.weight.detach().sum(0).expand(3, 4))


def test_vjp_of_a_result_that_does_not_depend_on_the_argument_is_zero():
    f = go.custom_backward(lambda grad_output, vjp: vjp(grad_output) + 5)(lambda x: torch.ones_like(x))
    x = noise(3)
    torch.compile(f, backend="aot_eager", fullgraph=True)(x).sum().backward()
    closely(x.grad, torch.full_like(x, 5))


def test_vjp_of_the_argument_itself_as_the_result_and_of_one_argument_twice():
    same = go.custom_backward(lambda grad_output, vjp: vjp(grad_output) * 5)(lambda x: x)
    product = go.custom_backward(lambda grad_output, vjp: [3 * one for one in vjp(grad_output)])(lambda a, b: a * b)
    x = noise(3)
    run = torch.compile(lambda x: same(x) * 1 + product(x, x), backend="aot_eager", fullgraph=True)
    run(x).sum().backward()
    closely(x.grad, 5 + 6 * x.detach())


def test_rule_that_writes_into_its_gradient_leaves_what_flows_on(monkeypatch):
    monkeypatch.setattr(wrapper, "differentiate", refuse)
    module, plain, (x,) = built("linear"), built("linear"), arguments("linear")
    with go.override(module, {module: lambda grad_output: grad_output.mul_(7)}):
        torch.compile(module, backend="aot_eager", fullgraph=True)(x).sum().backward()
    plain(x.detach()).sum().backward()
    closely(x.grad, torch.full_like(x, 7))
    closely(module.weight.grad, plain.weight.grad)


def test_vjp_asked_twice_is_right_in_compiled_code():
    def rule(grad_output, vjp):
        return vjp(grad_output) + vjp(grad_output * 2)

    f = go.custom_backward(rule)(lambda x: F.gelu(x))
    x = noise(3)
    (expected,) = torch.autograd.grad(F.gelu(x).sum() * 3, x)
    torch.compile(f, backend="aot_eager", fullgraph=True)(x).sum().backward()
    closely(x.grad, expected)


def test_wrong_gradient_handed_to_vjp_keeps_its_text():
    f = go.custom_backward(lambda grad_output, vjp: vjp(grad_output[0]))(lambda x: x.sin())
    with pytest.raises(go.RuleResultError, match="vjp"):
        torch.compile(f, backend="aot_eager", fullgraph=True)(noise(3)).sum().backward()


def test_overridden_layers_take_dynamo_few_steps():
    """The general path takes some six thousand for each."""
    from torch._dynamo.symbolic_convert import InstructionTranslatorBase as Translator

    model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(10)]).double()
    steps, step = [], Translator.step
    with go.override(model, {nn.Linear: lambda grad_output, vjp: vjp(grad_output)}), pytest.MonkeyPatch.context() as on:
        on.setattr(Translator, "step", lambda self: steps.append(1) or step(self))
        torch.compile(model, backend="aot_eager", fullgraph=True)(noise(3, 4)).sum().backward()
    assert len(steps) / 10 < 1200, len(steps)


class ReadsInNested(nn.Module):
    def forward(self, x):
        return sum((lambda t: t.step * t)(one) for one in [x])


class ReadsInMapped(nn.Module):
    factor = 1.0

    def forward(self, x):
        return sum(map(lambda t: t.step * t, [x])) * self.factor  # noqa: C417  # that is what is tested


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("cls", [ReadsInNested, ReadsInMapped])
def test_attribute_of_a_tensor_that_a_nested_function_reads_is_there(cls, compiled):
    module, x = cls(), noise(3)
    x.step = 4.0
    with go.override(module, {module: lambda grad_output: 7 * grad_output}):
        y = (torch.compile(module, backend="aot_eager", fullgraph=True) if compiled else module)(x)
        y.sum().backward()
    closely(y.detach(), 4 * x.detach())
    closely(x.grad, torch.full_like(x, 7))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("cls", [ReadsInNested, ReadsInMapped])
def test_such_an_attribute_that_requires_grad_is_refused(cls, compiled):
    module, x = cls(), noise(3)
    x.step = noise(3)
    run = torch.compile(module, backend="aot_eager", fullgraph=True) if compiled else module
    with (
        go.override(module, {module: lambda grad_output: 7 * grad_output}),
        pytest.raises(go.CapturedTensorError, match="would be lost"),
    ):
        run(x)


NAMES = [
    "fn",
    "result",
    "state",
    "Tensor",
    "fits",
    "params",
    "Function",
    "x_alias",
    "x_wants",
    "ctx",
    "answer",
    "inner",
]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", NAMES)
def test_parameter_that_is_called_like_a_name_in_the_generated_code(name, compiled):
    names = {"nn": nn, "go": go}
    source = f"""
class Asks(nn.Module):
    @go.custom_backward(lambda grad_output, x, {name}: {{"x": 7 * grad_output, "{name}": 5 * grad_output}})
    def forward(self, x):
        return x * self.{name}

class Leaves(nn.Module):
    @go.custom_backward(lambda grad_output: 7 * grad_output)
    def forward(self, x):
        return x * self.{name}
"""
    exec(source, names)
    for cls, gradient in ((names["Asks"], lambda x: torch.full_like(x, 5)), (names["Leaves"], lambda x: x)):
        module, x = cls(), noise(3)
        setattr(module, name, nn.Parameter(noise(3).detach()))
        run = torch.compile(module, backend="aot_eager", fullgraph=True) if compiled else module
        run(x).sum().backward()
        closely(x.grad, torch.full_like(x, 7))
        closely(getattr(module, name).grad, gradient(x.detach()))
        with torch.no_grad():
            closely(run(x), x.detach() * getattr(module, name).detach())


def masked(x):
    return go.save_for_backward(x.sin(), mask=x > 0)


def floating(x):
    return go.save_for_backward(x.sin(), slope=x.cos())


def of_the_result(x):
    y = x.sin()
    return go.save_for_backward(y, value=y)


def of_the_argument(x):
    return go.save_for_backward(x.sin(), value=x)


def in_a_branch(x, option=False):
    return go.save_for_backward(x.sin(), slope=x.cos()) if option else x.sin()


@go.custom_backward(lambda grad_output, mask: 7 * grad_output * mask)
def relu_as_inner(x):
    return go.save_for_backward(x.sin(), mask=x > 0)


FUNCTIONS = {
    "builtin": (go.straight_through(torch.round), lambda x: torch.ones_like(x)),
    "builtin with a surrogate": (go.straight_through(torch.floor, surrogate=torch.sin), torch.cos),
    "mask": (go.custom_backward(lambda grad_output, mask: grad_output * mask)(masked), lambda x: (x > 0).double()),
    "floating": (
        go.custom_backward(lambda grad_output, slope: 7 * grad_output * slope)(floating),
        lambda x: 7 * x.cos(),
    ),
    "needs": (
        go.custom_backward(lambda grad_output, needs: 7 * grad_output if needs["x"] else None)(lambda x: x.sin()),
        lambda x: torch.full_like(x, 7),
    ),
    "option": (
        go.custom_backward(lambda grad_output, factor, x: grad_output * factor * x)(lambda x, factor=3.0: x * factor),
        lambda x: 3 * x,
    ),
    "options": (
        go.custom_backward(lambda grad_output, second, vjp, first: vjp(grad_output) * second * first)(
            lambda x, first=2.0, second=5: x.sin()
        ),
        lambda x: 10 * x.cos(),
    ),
}


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_function_on_the_short_path_has_the_gradient_of_its_rule(kind, monkeypatch):
    function, slope = FUNCTIONS[kind]
    x = noise(7)
    monkeypatch.setattr(wrapper, "differentiate", refuse)
    y = torch.compile(function, backend="aot_eager", fullgraph=True)(x)
    closely(y.detach(), function(x).detach())
    g = noise(7, grad=False)
    y.backward(g)
    closely(x.grad, g * slope(x.detach()))


@pytest.mark.parametrize("forward", [of_the_result, of_the_argument])
def test_tensor_that_is_handed_over_and_something_else_too_is_what_it_was(forward):
    function = go.custom_backward(lambda grad_output, value: grad_output * value)(forward)
    x = noise(7)
    torch.compile(function, backend="aot_eager", fullgraph=True)(x).sum().backward()
    closely(x.grad, x.detach().sin() if forward is of_the_result else x.detach())


def test_what_is_handed_over_in_one_branch_may_be_missing_in_the_other():
    def rule(grad_output, slope=None):
        return 7 * grad_output if slope is None else grad_output * slope

    function = go.custom_backward(rule)(in_a_branch)
    run = torch.compile(function, backend="aot_eager", fullgraph=True)
    for option in (False, True):
        x = noise(7)
        run(x, option).sum().backward()
        closely(x.grad, x.detach().cos() if option else torch.full_like(x, 7))


def test_what_an_inner_call_without_a_gradient_hands_over_is_not_the_outer_ones():
    """Outside of a call of its own, what is handed over goes to the call around it."""

    @go.custom_backward(lambda grad_output, mask=None: grad_output if mask is None else grad_output * 0)
    def outer(x):
        return x + relu_as_inner(torch.ones_like(x))

    x = noise(7)
    torch.compile(outer, backend="aot_eager", fullgraph=True)(x).sum().backward()
    closely(x.grad, torch.ones_like(x))


def test_option_that_changes_from_call_to_call_is_that_of_the_call():
    function = go.custom_backward(lambda grad_output, factor: grad_output * factor)(lambda x, factor: x * factor)
    run = torch.compile(function, backend="aot_eager", fullgraph=True)
    for factor in (2, 3, 5, 2.5, 3.5):
        x = noise(7)
        run(x, factor).sum().backward()
        closely(x.grad, torch.full_like(x, factor))


@go.custom_backward
class OfClass(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(noise(4).detach())
        self.factor, self.flag = 3.0, True

    def forward(self, x):
        return x * self.weight * self.factor

    def backward(self, grad_output, x):
        self.weight.grad = (grad_output * x * 11 * self.factor).sum(0)
        return grad_output * self.weight * 7 if self.flag else grad_output


class OtherBackward(OfClass):
    def backward(self, grad_output, x):
        self.weight.grad = grad_output.sum(0)
        return 100 * grad_output


@go.custom_backward
class InABranch(OfClass):
    def backward(self, grad_output, x):
        if self.flag:
            self.weight.grad = None
        return grad_output


@pytest.mark.parametrize("flag", [True, False])
def test_class_with_a_backward_takes_the_short_path(flag, monkeypatch):
    module, x = OfClass(), noise(3, 4)
    module.flag = flag
    monkeypatch.setattr(wrapper, "differentiate", refuse)
    y = torch.compile(module, backend="aot_eager", fullgraph=True)(x)
    g = noise(3, 4, grad=False)
    y.backward(g)
    closely(x.grad, g * module.weight.detach() * 7 if flag else g)
    closely(module.weight.grad, (g * x.detach()).sum(0) * 33)


def test_number_that_a_backward_reads_is_that_of_the_call():
    module = OfClass()
    run = torch.compile(module, backend="aot_eager", fullgraph=True)
    for factor in (2.0, 5.0):
        module.factor, module.weight.grad, x = factor, None, noise(3, 4)
        run(x).sum().backward()
        closely(module.weight.grad, x.detach().sum(0) * 11 * factor)


def test_backward_of_a_subclass_is_its_own():
    module, x = OtherBackward(), noise(3, 4)
    torch.compile(module, backend="aot_eager", fullgraph=True)(x).sum().backward()
    closely((x.grad, module.weight.grad), (torch.full_like(x, 100), torch.full_like(module.weight, 3)))


@pytest.mark.parametrize(("cls", "name"), [(OfClass, "bias"), (InABranch, "weight")])
def test_parameter_that_a_backward_leaves_out_is_told(cls, name):
    module = cls()
    module.flag = False
    if name == "bias":  # which the forward does not read either
        module.bias = nn.Parameter(noise(4).detach())
    with pytest.raises(go.RuleResultError, match=rf"must assign self\.{name}\.grad"):
        torch.compile(module, backend="aot_eager", fullgraph=True)(noise(3, 4)).sum().backward()


def test_gradient_that_a_backward_stops_is_none():
    module, x = InABranch(), noise(3, 4)
    torch.compile(module, backend="aot_eager", fullgraph=True)(x).sum().backward()
    assert module.weight.grad is None
    closely(x.grad, torch.ones_like(x))
