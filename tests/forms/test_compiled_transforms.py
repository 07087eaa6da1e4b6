"""torch.compile around torch.func transforms, where torch drops the backward of every autograd.Function.

Each call with a rule is one step of the graph there. Compared is with numbers, or with a Function uncompiled.
"""

import enum

import pytest
import torch
from oracles import closely, exactly, float64, noise
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jvp, stack_module_state, vjp, vmap
from torch.nn import functional as F

import gradoverride as go

pytestmark = pytest.mark.usefixtures("fresh_compiler")


def compiled(function, **options):
    return torch.compile(function, **{"backend": "aot_eager", "fullgraph": True, **options})


def total(function):
    return lambda *inputs: function(*inputs).sum()


# Forms


@go.custom_backward(lambda grad_output: grad_output * 7)
def alone(x):
    return x.sin()


@go.custom_backward(lambda grad_output, x, output, k: grad_output * (7 + 0 * x * output) * k)
def by_values(x, k=1.0, *, mode="same"):
    return x.sin() if mode == "same" else x


@go.custom_backward(lambda grad_output, vjp: vjp(grad_output * 7))
def by_vjp(x):
    return x.clone()


@go.custom_backward(lambda grad_output, mask: grad_output * mask * 7)
def by_residual(x):
    return go.save_for_backward(x.sin(), mask=x == x)


@go.custom_backward(lambda grad_output: {"pair": {"x": grad_output["sum"] * 7, "y": None}})
def in_a_dict(pair, note=None):
    return {"sum": pair["x"] + pair["y"], "count": 2, "note": note, "signs": pair["x"] > 0}


def of_a_dict(x):
    result = in_a_dict({"x": x, "y": torch.ones_like(x)}, note=[None, "text", 3])
    assert (result["count"], result["note"], result["signs"].dtype) == (2, [None, "text", 3], torch.bool)
    return result["sum"]


class Times:
    def __init__(self, factor):
        self.factor = factor

    def __call__(self, grad_output):
        return self.factor * grad_output


TIMES, REVERSE = Times(7.0), go.rules.reverse(7.0)
SEVEN_TIMES = {
    "gradient alone": alone,
    "argument, output and number": by_values,
    "vjp": by_vjp,
    "residual": by_residual,
    "dict": of_a_dict,
    "straight through": lambda x: go_round(x) * 7,
    "surrogate": lambda x: go_sign(x) * 7,
    "edit": lambda x: go.edit_gradient(x, lambda grad_output: 7 * grad_output),
    "edit by an object": lambda x: go.edit_gradient(x, TIMES),
    "edit by one of the rules": lambda x: -go.edit_gradient(x, REVERSE),
    "connect": lambda x: go.connect(x.detach().round(), x) * 7,
    "connect by a rule": lambda x: go.connect(x.detach() ** 2, {"a": x, "k": 3.5}, lambda g, k: {"a": 2 * k * g}),
}
go_round = go.straight_through(torch.round)
go_sign = go.straight_through(torch.sign, surrogate=lambda x: 1.0 * x)
TRANSFORMS = {
    "grad": lambda form: grad(total(form)),
    "vmap of grad": lambda form: lambda x: vmap(grad(total(form)))(x[None])[0],
    "vjp": lambda form: lambda x: vjp(total(form), x)[1](torch.ones_like(x[0]))[0],
    "grad over vmap": lambda form: grad(lambda x: vmap(form)(x[None]).sum()),
    "jvp": lambda form: lambda x: jvp(form, (x,), (torch.ones_like(x),))[1],
    "vmap of jvp": lambda form: lambda x: vmap(lambda one: jvp(form, (x,), (one,))[1])(torch.ones_like(x)[None])[0],
    "jacfwd": lambda form: lambda x: jacfwd(form)(x).sum(0),
    "dual numbers": lambda form: lambda x: tangent_of(form, x),
}


def tangent_of(form, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(form(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


@pytest.mark.parametrize("form", SEVEN_TIMES)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_rule_holds_in_a_compiled_transform(form, transform):
    x = noise(3, grad=False)
    exactly(compiled(TRANSFORMS[transform](SEVEN_TIMES[form]))(x), torch.full_like(x, 7))


def times(factor):
    return lambda grad_output: factor * grad_output


EDITS = {
    "edit": lambda x, rule: go.edit_gradient(x, rule),
    "connect": lambda x, rule: go.connect(x.detach(), x, rule),
}


@pytest.mark.parametrize("edited", EDITS)
@pytest.mark.parametrize("make", [times, Times], ids=["function", "object"])
def test_rule_that_is_made_outside_may_be_another_in_each_call(edited, make):
    x, rule = noise(3, grad=False), None
    run = compiled(grad(lambda x: EDITS[edited](x, rule).sum()))
    for factor in (3.0, 5.0, 5.0, 7.0):
        rule = make(factor)
        exactly(run(x), torch.full_like(x, factor))


def test_object_that_is_a_rule_may_change_between_calls():
    x, rule = noise(3, grad=False), Times(3.0)
    run = compiled(grad(lambda x: go.edit_gradient(x, rule).sum()))
    for rule.factor in (3.0, 5.0):
        exactly(run(x), torch.full_like(x, rule.factor))


def test_rule_holds_with_inductor():
    x = noise(3, grad=False)
    closely(compiled(vmap(grad(alone)), backend="inductor")(x), torch.full_like(x, 7))


@pytest.mark.parametrize("form", [alone, by_vjp], ids=["gradient alone", "vjp"])
def test_rule_holds_for_a_backward_after_a_compiled_vmap(form):
    x = noise(4, 3)
    (found,) = torch.autograd.grad(compiled(vmap(form))(x).sum(), x)
    exactly(found, torch.full_like(x, 7))


class Affine(nn.Module):
    """The weight's gradient is 5 times its own, the input's twice; the shift keeps autograd's."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(noise(3).detach())
        self.shift = nn.Parameter(noise(3).detach())

    @go.custom_backward(
        lambda grad_output, x, weight: {"x": 2 * grad_output * weight, "weight": 5 * grad_output * x},
    )
    def forward(self, x):
        return x * self.weight + self.shift


class ByHand(Affine):
    def forward(self, x):
        weight = self.weight
        return weight * x + self.shift + Extra.apply(x, weight)


class Extra(torch.autograd.Function):
    """0, whose gradients are what `Affine` has besides autograd's."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, weight):
        return 0 * x * weight

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad_output):
        x, weight = ctx.saved_tensors
        return grad_output * weight, 4 * grad_output * x


def of_two_layers(kind):
    torch.manual_seed(0)
    return nn.Sequential(kind(), nn.Tanh(), kind())


def gradient_of_parameters(model):
    return grad(lambda parameters, x: functional_call(model, parameters, (x,)).square().sum(), argnums=(0, 1))


def adapted(model):
    """The gradient through a step of gradient descent, as in meta-learning."""

    def loss(parameters, x):
        return functional_call(model, parameters, (x,)).square().sum()

    def after_a_step(parameters, x):
        step = grad(loss)(parameters, x)
        return loss({name: value - 0.1 * step[name] for name, value in parameters.items()}, x)

    return grad(after_a_step, argnums=(0, 1))


@pytest.mark.parametrize("make", [gradient_of_parameters, adapted])
def test_parameters_of_a_functional_call(make):
    model, by_hand, x = of_two_layers(Affine), of_two_layers(ByHand), noise(3, grad=False)
    parameters = {name: 1.5 * value.detach() for name, value in model.named_parameters()}
    found = compiled(make(model))(parameters, x)
    expected = make(by_hand)(parameters, x)  # uncompiled: compiled it would be wrong
    closely(found[1], expected[1])
    for name in parameters:
        closely(found[0][name], expected[0][name])


def test_ensemble_of_models():
    models, by_hand = [of_two_layers(Affine) for _ in range(3)], of_two_layers(ByHand)
    for seed, model in enumerate(models):
        torch.manual_seed(seed)
        for parameter in model.parameters():
            nn.init.normal_(parameter)
    parameters, _ = stack_module_state(models)
    parameters = {name: value.detach() for name, value in parameters.items()}
    x = noise(3, grad=False)
    found = compiled(vmap(gradient_of_parameters(models[0]), in_dims=(0, None)))(parameters, x)
    expected = vmap(gradient_of_parameters(by_hand), in_dims=(0, None))(parameters, x)
    for name in parameters:
        closely(found[0][name], expected[0][name])


def test_gradient_penalty_has_the_second_derivative():
    model, by_hand = of_two_layers(Affine), of_two_layers(ByHand)
    x = noise(3)

    def penalty(model):
        return lambda x: grad(total(model))(x).square().sum()

    found = torch.autograd.grad(compiled(penalty(model))(x), [x, *model.parameters()], allow_unused=True)
    expected = torch.autograd.grad(penalty(by_hand)(x), [x, *by_hand.parameters()], allow_unused=True)
    for ours, reference in zip(found, expected, strict=True):
        closely(torch.zeros(3) if ours is None else ours, torch.zeros(3) if reference is None else reference)


def test_class_with_a_backward_of_its_own():
    @go.custom_backward
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(float64(2.0, 3.0))

        def forward(self, x):
            return x * self.weight

        def backward(self, grad_output, x):
            self.weight.grad = 3 * grad_output * x
            return 5 * grad_output * self.weight

    weight, x = float64(2.0, 3.0, grad=False), float64(1.0, 4.0, grad=False)
    found, grad_x = compiled(gradient_of_parameters(Layer()))({"weight": weight}, x)
    exactly(found["weight"], 3 * 2 * weight * x * x)
    exactly(grad_x, 5 * 2 * weight * x * weight)


OVERRIDES = {
    "function": ({F.relu: lambda grad_output: grad_output * 5}, 5),
    "class": ({nn.Linear: lambda grad_output, vjp: vjp(grad_output * 2)}, 2),
    "two nested": ({nn.ReLU: lambda grad_output: grad_output * 5, "0": lambda g, vjp: vjp(g * 2)}, 10),
}


@pytest.mark.parametrize("kind", OVERRIDES)
def test_override_holds_in_a_compiled_transform_and_is_gone_after_it(kind):
    model, x = nn.Sequential(nn.Linear(3, 3), nn.ReLU()).double(), noise(3, grad=False)
    nn.init.constant_(model[0].bias, 9.0)
    run = compiled(grad(total(model)))
    plain = model[0].weight.detach().sum(0)
    rules, factor = OVERRIDES[kind]
    with go.override(model, rules):
        exactly(run(x), factor * plain)
    exactly(run(x), plain)


# Forward mode


@go.custom_backward(lambda grad_output, x: 3 * grad_output * x.cos())
def thrice_by_values(x):
    return x.sin()


@go.custom_backward(lambda grad_output, vjp: 3 * vjp(grad_output))
def thrice_by_vjp(x):
    return x.sin()


@go.custom_backward(lambda grad_output, x: 3 * grad_output * x.cos(), jvp=lambda tangent, x: 3 * tangent * x.cos())
def thrice_by_jvp(x):
    return x.sin()


MIXED = {
    "hessian": lambda form: lambda x: hessian(lambda x: form(x).sum())(x).sum(0),
    "jvp of grad": lambda form: lambda x: jvp(grad(total(form)), (x,), (torch.ones_like(x),))[1],
    "grad of jvp": lambda form: grad(lambda x: jvp(form, (x,), (torch.ones_like(x),))[1].sum()),
}


@pytest.mark.parametrize("transform", MIXED)
@pytest.mark.parametrize("form", [thrice_by_values, thrice_by_vjp, thrice_by_jvp], ids=["values", "vjp", "jvp"])
def test_second_derivatives_by_both_modes_are_those_of_the_rule(form, transform):
    x = noise(3, grad=False)
    closely(compiled(MIXED[transform](form))(x), -3 * x.sin())  # of 3 cos(x)


def test_a_forward_mode_of_the_users_own_comes_before_the_rule():
    x = noise(3, grad=False)
    form = go.custom_backward(
        lambda grad_output: grad_output.clamp(-1, 1), jvp=lambda tangent, input: 5 * tangent * input
    )(torch.sin)
    closely(compiled(TRANSFORMS["jvp"](form))(x), 5 * x)


def test_a_forward_mode_of_the_users_own_follows_what_it_reads():
    factors = {"now": 5.0}
    form = go.custom_backward(lambda grad_output: grad_output, jvp=lambda tangent: factors["now"] * tangent)(torch.sin)
    run = compiled(TRANSFORMS["jvp"](form))
    x = noise(3, grad=False)
    for factors["now"] in (5.0, 7.0):
        exactly(run(x), torch.full_like(x, factors["now"]))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_rule_that_is_not_linear_raises_when_the_compiled_code_runs(backend):
    def rule(grad_output, input):
        return torch.where(input > 0, grad_output * 7, grad_output.clamp(-0.1, 0.1))

    form = go.custom_backward(rule)(torch.clone)
    run = compiled(TRANSFORMS["jvp"](form), backend=backend)
    closely(run(torch.ones(3)), torch.full((3,), 7.0))
    with pytest.raises(
        RuntimeError, match=r"rule 'rule' .* must be linear in the gradient for forward mode .* it is not"
    ):
        run(-torch.ones(3))


def test_a_rule_that_detaches_raises_when_the_compiled_code_runs():
    form = go.custom_backward(lambda grad_output: 7 * grad_output.detach())(torch.clone)
    with pytest.raises(
        RuntimeError, match=r"must compute with the gradient what autograd differentiates for forward mode"
    ):
        compiled(TRANSFORMS["jvp"](form))(noise(3, grad=False))


@pytest.mark.parametrize("before", [False, True], ids=["first call", "compiled before"])
@pytest.mark.parametrize("form", ["gradient alone", "vjp"])
def test_forward_mode_that_is_entered_around_compiled_code_is_refused(form, before):
    run = compiled(SEVEN_TIMES[form])
    x = noise(3, grad=False)
    if before:
        exactly(run(x), SEVEN_TIMES[form](x))
    with pytest.raises(
        go.UnsupportedError, match="forward mode that was entered around the compiled code, which torch"
    ):
        tangent_of(run, x)
    exactly(run(x), SEVEN_TIMES[form](x))


def test_forward_mode_is_traced_once():
    calls = CompileCounterWithBackend("aot_eager")
    run = compiled(TRANSFORMS["dual numbers"](by_vjp), backend=calls)
    x = noise(3, grad=False)
    for _ in range(3):
        exactly(run(x), torch.full_like(x, 7))
    assert calls.frame_count == 1


# What the compiled code depends on, and what it does besides


class Stepped(nn.Module):
    def __init__(self):
        super().__init__()
        self.slope = 2.0
        self.dropout = nn.Dropout(1.0)

    @go.custom_backward(lambda grad_output, x, module: grad_output * module.slope)
    def forward(self, x):
        return torch.sign(self.dropout(x)) * self.slope


FACTOR = 2.0


@go.custom_backward(lambda grad_output: grad_output * FACTOR)
def by_a_global(x):
    return x * FACTOR


def test_rule_sees_an_attribute_and_a_global_that_change_between_calls(monkeypatch):
    module, x = Stepped(), noise(3, grad=False)
    of_module, of_function = compiled(grad(total(module))), compiled(grad(total(by_a_global)))
    for value in (3.0, 5.0):
        module.slope = value
        monkeypatch.setitem(globals(), "FACTOR", value)
        exactly(of_module(x), torch.full_like(x, value))
        exactly(of_function(x), torch.full_like(x, value))


def test_forward_sees_whether_its_module_is_in_training():
    module, x = Stepped(), noise(3, grad=False)
    exactly(compiled(vmap(lambda x: module(x), randomness="same"))(x[None])[0], torch.zeros_like(x))
    module.eval()
    exactly(compiled(vmap(lambda x: module(x)))(x[None])[0], 2 * x.sign())


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.calls = 0

    @go.custom_backward(lambda grad_output: grad_output * 3)
    def forward(self, x):
        self.calls += 1
        return x * 2


class CountingInABuffer(nn.Module):  # alone: torch 2.13 loses the write where an attribute is set too
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    @go.custom_backward(lambda grad_output: grad_output * 3)
    def forward(self, x):
        self.calls.add_(1)
        return x * 2


@pytest.mark.parametrize("kind", [Counting, CountingInABuffer])
def test_what_a_forward_counts_is_counted_once_a_call(kind):
    module, batch = kind(), noise(4, 3, grad=False)
    run = compiled(vmap(lambda x: module(x)))
    for calls in range(1, 6):  # in a later one the number is no constant any more
        exactly(run(batch), 2 * batch)
        assert int(module.calls) == calls


def test_what_a_forward_writes_into_an_argument_without_a_gradient_is_written_once_a_call():
    @go.custom_backward(lambda grad_output: grad_output * 3)
    def counting(x, seen):
        seen.add_(1)
        return x * 2

    seen = torch.zeros(4, dtype=torch.long)
    run = compiled(vmap(counting))
    for calls in (1, 2):
        exactly(run(torch.ones(4, 3), seen), torch.full((4, 3), 2.0))
        exactly(seen, torch.full((4,), calls))


def test_random_numbers_are_others_in_each_call():
    @go.custom_backward(lambda grad_output, output: grad_output * output)
    def noisy(x):
        return F.dropout(torch.ones_like(x), 0.5)

    run = compiled(grad(total(noisy)))
    x = torch.zeros(64, dtype=torch.float64)
    first, second = run(x), run(x)
    assert set(first.tolist()) == set(second.tolist()) == {0.0, 2.0}
    assert first.tolist() != second.tolist()


def test_sizes_may_be_symbolic():
    @go.custom_backward(lambda grad_output, n: grad_output * n)
    def repeated(x, n):
        return x.expand(n, *x.shape).sum(0)

    run = compiled(grad(lambda x: repeated(x, x.shape[0]).sum()), dynamic=True)
    for size in (3, 4, 6):
        exactly(run(torch.ones(size)), torch.full((size,), float(size)))


# Refused


WEIGHT = float64(2.0, grad=False)
LEARNT = float64(2.0)


class Kind(enum.Enum):
    FIRST = 1


class Options:
    factor = 2.0


OPTIONS = Options()


@go.custom_backward(lambda grad_output, options: grad_output * options.factor)
def by_an_object(x, options):
    return x * options.factor


class Plain:
    @go.custom_backward(lambda grad_output: grad_output * 3)
    def method(self, x):
        return x * 2


class KeepsATensor(nn.Module):
    def __init__(self):
        super().__init__()
        self.mask = torch.ones(3, dtype=torch.float64)

    @go.custom_backward(lambda grad_output: grad_output * 3)
    def forward(self, x):
        return x * self.mask


def ruled(forward, rule=lambda grad_output: grad_output * 3):
    return go.custom_backward(rule)(forward)


def changes_its_module_before():
    module = Stepped()

    def run(x):
        module.slope = 5.0
        return grad(total(module))(x)

    return run


def changes_its_global_before(x):
    global FACTOR
    FACTOR = FACTOR * 1.0
    return grad(total(by_a_global))(x)


def changes_its_rule_before(x):
    TIMES.factor = 5.0
    return grad(lambda x: go.edit_gradient(x, TIMES).sum())(x)


def changes_its_list_before(x):
    SCALES[0]["by"] = 5.0
    return grad(total(by_a_list))(x)


def changes_a_list_of_its_module_before():
    module = ScalesByAList()

    def run(x):
        module.scales.append(5.0)
        return grad(total(module))(x)

    return run


def changes_another_list_before(x):
    OTHERS.append(5.0)
    return grad(total(by_a_list))(x)


def its_scale():
    return SCALES[0]["by"]


class ScalesByAList(nn.Module):
    def __init__(self):
        super().__init__()
        self.scales = [2.0]

    @go.custom_backward(lambda g, module: g * module.scales[-1])
    def forward(self, x):
        return x * self.scales[-1]


SCALES, OTHERS = [{"by": 2.0}], []
by_a_list = ruled(lambda x: x * its_scale(), lambda g: g * its_scale())


def test_list_that_the_call_does_not_read_may_be_changed_before_it():
    x = noise(3, grad=False)
    exactly(compiled(changes_another_list_before)(x), torch.full_like(x, 2.0))
    assert OTHERS == [5.0]


PLAIN = Plain()
STEP = "a call with a rule must be one step of the graph; "
REFUSED = {
    "edit with a closure": (
        grad(lambda x: go.edit_gradient(x, lambda g, k=x.shape: 3 * g if k == x.shape else g).sum()),
        STEP + "its rule is made in the code that is traced, with a closure",
    ),
    "edit with a default": (
        grad(lambda x: go.edit_gradient(x, lambda g, k=3: k * g).sum()),
        STEP + "its rule is made in the code that is traced",
    ),
    "edit by a method": (
        grad(lambda x: go.edit_gradient(x, TIMES.__call__).sum()),
        STEP + "its rule is made in the code",
    ),
    "edit by an object made within": (
        grad(lambda x: go.edit_gradient(x, go.rules.reverse(2.0)).sum()),
        STEP + "its rule is made in the code that is traced",
    ),
    "edit by an object that is changed": (
        changes_its_rule_before,
        STEP + "the code that is traced has changed 'Times'",
    ),
    "a constant tensor": (grad(total(ruled(lambda x: x * WEIGHT))), STEP + "it reaches 'WEIGHT', a tensor that is no"),
    "one of the rule": (grad(total(ruled(torch.sin, lambda g: g * WEIGHT))), STEP + "it reaches 'WEIGHT', a tensor"),
    "one of the jvp": (lambda x: jvp(ruled_with_jvp, (x,), (x,))[1], STEP + "it reaches 'WEIGHT', a tensor"),
    "one of the module": (grad(total(KeepsATensor())), STEP + "it reaches 'self.mask', a tensor that is no input"),
    "in place": (grad(lambda x: ruled_in_place(x * 1).sum()), STEP + "its forward writes into its argument"),
    "object": (grad(lambda x: by_an_object(x, OPTIONS).sum()), STEP + "an argument of the class 'Options' cannot"),
    "enum": (grad(lambda x: ruled_by_kind(x, Kind.FIRST).sum()), STEP + "an argument of the class 'Kind' cannot"),
    "no module": (grad(total(PLAIN.method)), STEP + "its object is no module"),
    "module that is changed": (changes_its_module_before(), STEP + "the code that is traced has changed 'self'"),
    "list that is changed": (changes_its_list_before, STEP + "the code that is traced has changed 'SCALES'"),
    "list of the module that is changed": (
        changes_a_list_of_its_module_before(),
        STEP + r"the code that is traced has changed 'self\.scales'",
    ),
    "global that is changed": (changes_its_global_before, STEP + "the code that is traced has changed 'FACTOR'"),
    "random numbers again": (
        grad(total(ruled(lambda x: F.dropout(x, 0.5), lambda g, vjp: vjp(g)))),
        "draws random numbers, and must draw them again under torch.func for the gradient that is autograd's own",
    ),
}
ruled_with_jvp = go.custom_backward(lambda g: g, jvp=lambda tangent: tangent * WEIGHT)(torch.sin)
ruled_in_place = ruled(lambda x: x.mul_(2))
ruled_by_kind = ruled(lambda x, kind: x * kind.value)


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_a_step_is_refused(kind):
    run, text = REFUSED[kind]
    with pytest.raises(go.UnsupportedError, match=text) as caught:
        compiled(run)(noise(3, grad=False))
    assert "eave the transform uncompiled" in str(caught.value)


@pytest.mark.filterwarnings("ignore:.*never ran")  # for it was refused before
def test_a_rule_of_a_function_within_a_module_that_has_one_is_refused():
    class Inner(nn.Module):
        def forward(self, x):
            return F.relu(x) + x

    model = nn.Sequential(Inner())
    refused = pytest.raises(go.UnsupportedError, match=STEP + "rules of functions are in force around it")
    with go.override(model, {F.relu: lambda g: g * 5, Inner: lambda g, vjp: vjp(g) * 7}), refused:
        compiled(grad(total(model)))(noise(3, grad=False))


def test_captured_tensor_is_the_error_that_it_is_elsewhere():
    with pytest.raises(go.CapturedTensorError, match="it reached 'LEARNT', which requires grad"):
        compiled(grad(total(ruled(lambda x: x * LEARNT))))(noise(3, grad=False))


def test_wrong_result_of_a_rule_is_the_error_that_it_is_elsewhere():
    with pytest.raises(go.RuleResultError, match=r"must return a gradient of shape \(3,\) for 'x'"):
        compiled(grad(total(ruled(lambda x: x.sin(), lambda g: g[:1]))))(noise(3, grad=False))
