"""What a rule can ask for by name: arguments, residuals, the module's own, the reserved names, and nothing else."""

import copy
import dataclasses
import functools
import itertools
from collections import namedtuple

import pytest
import torch
from forms import elsewhere
from oracles import closely, exactly, float64, noise
from torch import nn

import gradoverride as go

RESERVED = ("input", "output", "vjp", "needs", "params", "module", "forward")


def answer_of(forward, rule, *args, **kwargs):
    """What `rule` returned in the backward of `forward` at these arguments, as one gradient per tensor argument."""
    go.custom_backward(rule)(forward)(*args, **kwargs).sum().backward()
    return [arg.grad for arg in args if isinstance(arg, torch.Tensor) and arg.requires_grad]


def same(actual, expected):
    """Fail unless both are of one type and equal."""
    assert type(actual) is type(expected)
    if isinstance(expected, str) or expected is None:
        assert actual == expected
    else:
        exactly(actual, expected)


class Scale(nn.Module):
    """A module with a parameter and a buffer; its rule is given."""

    def __init__(self, rule):
        super().__init__()
        self.weight = nn.Parameter(float64(3.0))
        self.register_buffer("scale", float64(5.0, grad=False))
        self.rule = rule

    def call(self, x):
        method = go.custom_backward(self.rule)(type(self).forward)
        return method(self, x)

    def forward(self, x):
        return x * self.weight * self.scale


# --- the gradient ---


@pytest.mark.parametrize("name", ["grad_output", "g", "_", "x", "self"])
def test_first_parameter_is_the_gradient_whatever_its_name(name):
    rule = eval(f"lambda {name}: {name} * 7")
    assert answer_of(lambda x: x * 2, rule, float64(1.0))[0].item() == 7.0


Pair = namedtuple("Pair", "a b")


@dataclasses.dataclass
class Record:
    a: torch.Tensor
    b: torch.Tensor


STRUCTURES = {
    "tuple": (lambda a, b: (a, b), lambda g: (g[0], g[1])),
    "list": (lambda a, b: [a, b], lambda g: (g[0], g[1])),
    "dict": (lambda a, b: {"a": a, "b": b}, lambda g: (g["a"], g["b"])),
    "namedtuple": (Pair, lambda g: (g.a, g.b)),
    "dataclass": (Record, lambda g: (g.a, g.b)),
    "nested": (lambda a, b: {"deep": [a, (b,)]}, lambda g: (g["deep"][0], g["deep"][1][0])),
}


@pytest.mark.parametrize(("pack", "unpack"), STRUCTURES.values(), ids=STRUCTURES)
def test_gradient_has_the_structure_of_the_result_and_zeros_where_none_came(pack, unpack):
    seen = []

    @go.custom_backward(lambda grad_output: (seen.append(grad_output), unpack(grad_output)[0])[1])
    def forward(x):
        return pack(x * 2, x * 3)

    x = noise(3)
    first, _ = unpack(forward(x))
    first.backward(torch.full((3,), 4.0, dtype=torch.float64))
    assert type(seen[0]) is type(pack(x, x))
    exactly(unpack(seen[0]), (torch.full_like(x, 4.0), torch.zeros_like(x)))


def test_gradient_of_a_result_that_is_no_tensor_is_none():
    seen = []

    @go.custom_backward(lambda grad_output: (seen.append(grad_output), grad_output[0])[1])
    def forward(x):
        return x * 2, "label", 3

    forward(float64(1.0))[0].backward()
    assert seen[0][1:] == (None, None)


# --- arguments ---


def test_rule_gets_the_value_of_each_argument_it_asks_for():
    def rule(grad_output, b, a):
        return grad_output * b, grad_output * a * 10

    a, b = noise(3), noise(3)
    grads = answer_of(lambda a, b: a * b, rule, a, b)
    closely(grads, [b.detach(), a.detach() * 10])


ARGUMENTS = {
    "number": 3,
    "string": "text",
    "None": None,
    "list": [1, 2.5],
    "integer tensor": torch.tensor([1, 2]),
    "dict with a tensor": {"key": torch.tensor([1.5])},
}


@pytest.mark.parametrize("value", ARGUMENTS.values(), ids=ARGUMENTS)
def test_rule_gets_an_argument_of_any_kind(value):
    seen = []

    def rule(grad_output, option):
        seen.append(option)
        return (grad_output,)

    go.custom_backward(rule)(lambda x, option: x * 2)(float64(1.0), value).backward()
    same(seen[0], value)


def test_rule_gets_the_default_of_an_argument_that_was_not_passed():
    def rule(grad_output, x, factor):
        return grad_output * factor

    assert answer_of(lambda x, factor=7.0: x * factor, rule, float64(1.0))[0].item() == 7.0


def test_rule_gets_a_keyword_only_argument():
    def forward(x, *, factor):
        return x * factor

    def rule(grad_output, factor):
        return grad_output * factor

    assert answer_of(forward, rule, float64(1.0), factor=7.0)[0].item() == 7.0


def test_rule_gets_variadic_arguments_as_a_tuple():
    seen = []

    def forward(*xs):
        return sum(xs)

    def rule(grad_output, xs):
        seen.append(xs)
        return tuple(grad_output * x for x in xs)

    grads = answer_of(forward, rule, float64(2.0), float64(3.0))
    assert type(seen[0]) is tuple
    assert [grad.item() for grad in grads] == [2.0, 3.0]


def test_rule_gets_variadic_keywords_as_a_dict():
    def forward(x, **options):
        return x * options["factor"]

    def rule(grad_output, options):
        return {"x": grad_output * options["factor"] * len(options)}

    assert answer_of(forward, rule, float64(1.0), factor=7.0, other=0)[0].item() == 14.0


def test_variadic_keywords_under_their_own_name_leave_keywords_with_a_name_out():
    def forward(x, *, scale, **options):
        return x * scale * options["factor"]

    def rule(grad_output, options):
        assert options == {"factor": 7.0}
        return {"x": grad_output * options["factor"]}

    assert answer_of(forward, rule, float64(1.0), scale=2.0, factor=7.0)[0].item() == 7.0


def test_argument_asked_for_has_the_value_it_had_in_the_forward():
    seen = []

    def rule(grad_output, x):
        seen.append(x)
        return grad_output

    x = noise(3)
    answer_of(lambda x: x * 2, rule, x)
    exactly(seen[0].detach(), x.detach())


# --- options of the rule's own ---


def with_default(grad_output, factor=7.0):
    return grad_output * factor


def with_keyword_default(grad_output, *, factor=7.0):
    return grad_output * factor


OPTIONS = {
    "default": with_default,
    "keyword-only default": with_keyword_default,
    "partial keyword": functools.partial(with_default, factor=7.0),
    "partial of partial": functools.partial(functools.partial(with_default, factor=0.0), factor=7.0),
    "partial of a required name": functools.partial(lambda grad_output, factor: grad_output * factor, factor=7.0),
    "partial of a name offered": functools.partial(lambda grad_output, x: grad_output * x, x=7.0),
    "**kwargs": lambda grad_output, **options: grad_output * (7.0 if not options else 0.0),
}


@pytest.mark.parametrize("rule", OPTIONS.values(), ids=OPTIONS)
def test_name_that_is_bound_or_has_a_default_is_an_option_of_the_rule(rule):
    assert answer_of(lambda x: x * 2, rule, float64(1.0))[0].item() == 7.0


@pytest.mark.parametrize("rule", OPTIONS.values(), ids=OPTIONS)
def test_name_that_is_bound_or_has_a_default_is_an_option_on_a_method_too(rule):
    x = float64(1.0)
    Scale(rule).call(x).backward()
    assert x.grad.item() == 7.0


def test_default_gives_way_to_an_argument_of_that_name():
    assert answer_of(lambda x, factor: x * factor, with_default, float64(1.0), 3.0)[0].item() == 3.0


def test_default_gives_way_to_a_residual_of_that_name():
    def forward(x):
        return go.save_for_backward(x * 2, factor=3.0)

    assert answer_of(forward, with_default, float64(1.0))[0].item() == 3.0


def test_default_gives_way_to_a_buffer_of_that_name():
    x = float64(1.0)
    Scale(lambda grad_output, scale=7.0: grad_output * scale).call(x).backward()
    assert x.grad.item() == 5.0


def test_default_gives_way_to_a_reserved_name():
    def rule(grad_output, output=None):
        return grad_output * output

    assert answer_of(lambda x: x * 2, rule, float64(3.0))[0].item() == 6.0


# --- residuals ---


RESIDUALS = {
    "tensor": lambda: torch.tensor([1.5, 2.5]),
    "boolean tensor": lambda: torch.tensor([True, False]),
    "number": lambda: 3,
    "string": lambda: "text",
    "None": lambda: None,
    "tuple": lambda: (torch.tensor(1.5), 2),
    "dict": lambda: {"key": torch.tensor(1.5)},
}


@pytest.mark.parametrize("make", RESIDUALS.values(), ids=RESIDUALS)
def test_rule_gets_what_the_forward_hands_over(make):
    seen = []

    def rule(grad_output, residual):
        seen.append(residual)
        return grad_output

    answer_of(lambda x: go.save_for_backward(x * 2, residual=make()), rule, float64(1.0))
    same(seen[0], make())


def test_caller_gets_the_result_alone_of_a_forward_that_hands_over():
    forward = go.custom_backward(lambda grad_output: grad_output)(lambda x: go.save_for_backward(x * 2, mask=x > 0))
    exactly(forward(float64(3.0)).detach(), float64(6.0, grad=False))


def hand_over(result, factor):
    return go.save_for_backward(result, factor=factor)


class Helpers:
    def hand_over(self, result, factor):
        return go.save_for_backward(result, factor=factor)

    @staticmethod
    def statically(result, factor):
        return go.save_for_backward(result, factor=factor)

    def __call__(self, x):
        return self.hand_over(x * 2, 5.0)


by_partial = functools.partial(go.save_for_backward, factor=5.0)
UNSEEN = {
    "method of the forward's object": Helpers(),
    "method of another object": lambda x: helpers.hand_over(x * 2, 5.0),
    "static method": lambda x: Helpers.statically(x * 2, 5.0),
    "partial": lambda x: by_partial(x * 2),
}
helpers = Helpers()


@pytest.mark.parametrize("rule", [lambda grad_output, factor: grad_output * factor, with_default])
@pytest.mark.parametrize("how", UNSEEN)
def test_what_nobody_sees_may_hand_over_for_the_forward(how, rule):
    assert answer_of(UNSEEN[how], rule, float64(1.0))[0].item() == 5.0


def test_name_that_nobody_hands_over_is_an_error_at_the_first_call():
    function = go.custom_backward(lambda grad_output, fctor: grad_output)(UNSEEN["method of another object"])
    with torch.no_grad():
        function(float64(1.0))
    with pytest.raises(go.RuleSignatureError, match=r"asks for 'fctor', which does not exist.*Did you mean 'factor'"):
        function(float64(1.0))


def test_helper_may_hand_over_for_the_forward():
    def rule(grad_output, factor):
        return grad_output * factor

    assert answer_of(lambda x: hand_over(x * 2, 7.0), rule, float64(1.0))[0].item() == 7.0


def test_residuals_of_several_hand_overs_come_together():
    def forward(x):
        go.save_for_backward(None, a=3.0)
        return go.save_for_backward(x * 2, b=4.0)

    def rule(grad_output, a, b):
        return grad_output * a * b

    assert answer_of(forward, rule, float64(1.0))[0].item() == 12.0


def test_residuals_of_a_call_inside_do_not_reach_the_rule_outside():
    def rule(grad_output, factor):
        return grad_output * factor

    @go.custom_backward(rule)
    def inside(x):
        return go.save_for_backward(x * 2, factor=3.0)

    @go.custom_backward(rule)
    def outside(x):
        y = go.save_for_backward(x * 2, factor=7.0)
        return y + inside(x)

    x = float64(1.0)
    outside(x).backward()
    assert x.grad.item() == 7.0


@pytest.mark.parametrize("result", [3, "text", None, torch.tensor([1.5])], ids=["number", "string", "None", "tensor"])
def test_save_for_backward_outside_a_decorated_call_returns_its_first_argument(result):
    assert go.save_for_backward(result, anything=1) is result


def test_each_call_has_its_own_residuals():
    def forward(x):
        return go.save_for_backward(x * 2, factor=x.detach() * 1)

    def rule(grad_output, factor):
        return grad_output * factor

    decorated = go.custom_backward(rule)(forward)
    a, b = float64(3.0), float64(4.0)
    (decorated(a) + decorated(b)).backward()
    assert (a.grad.item(), b.grad.item()) == (3.0, 4.0)


# --- the module's own ---


def test_rule_gets_a_parameter_and_a_buffer_by_name():
    def rule(grad_output, x, weight, scale):
        return {"x": grad_output * weight * scale * 10, "weight": grad_output * x * scale * 100}

    module, x = Scale(rule), float64(2.0)
    module.call(x).backward()
    assert (x.grad.item(), module.weight.grad.item()) == (150.0, 1000.0)


def test_rule_gets_a_frozen_parameter_by_name():
    module, x = Scale(lambda grad_output, weight: grad_output * weight * 10), float64(2.0)
    module.weight.requires_grad_(False)
    module.call(x).backward()
    assert x.grad.item() == 30.0
    assert module.weight.grad is None


def test_rule_gets_a_parametrized_weight_under_its_plain_name_as_the_forward_saw_it():
    class Double(nn.Module):
        def forward(self, weight):
            return weight * 2

    seen = []

    def rule(grad_output, x, weight):
        seen.append(weight.detach().clone())
        return {"x": grad_output * weight, "weight": grad_output * x * 100}

    module, x = Scale(rule), float64(2.0)
    nn.utils.parametrize.register_parametrization(module, "weight", Double())
    Scale.call(module, x).backward()
    exactly(seen[0], float64(6.0, grad=False))
    # The rule's gradient of the weight, through autograd's own of the doubling.
    assert module.parametrizations.weight.original.grad.item() == 400.0


def test_rule_gets_a_parametrized_weight_that_is_frozen():
    class Double(nn.Module):
        def forward(self, weight):
            return weight * 2

    module, x = Scale(lambda grad_output, weight: grad_output * weight * 10), float64(2.0)
    nn.utils.parametrize.register_parametrization(module, "weight", Double())
    module.requires_grad_(False)
    Scale.call(module, x).backward()
    exactly(x.grad, float64(60.0, grad=False))


def test_a_method_of_another_object_has_no_params():
    class Plain:
        @go.custom_backward(lambda grad_output, params: grad_output)
        def doubled(self, x):
            return 2 * x

    with pytest.raises(go.RuleSignatureError, match=r"asks for 'params', which does not exist\. 'doubled' .* 'module'"):
        Plain().doubled(float64(1.0))


def test_module_on_which_a_plain_attribute_is_set_does_not_offer_it():
    module = Scale(lambda grad_output, rule: grad_output)
    with pytest.raises(go.RuleSignatureError, match="'rule', which does not exist"):
        module.call(float64(1.0))


# --- precedence ---


def test_argument_comes_before_a_residual():
    def forward(x, factor):
        return go.save_for_backward(x * factor, factor=3.0)

    assert answer_of(forward, with_default, float64(1.0), 5.0)[0].item() == 5.0


def test_argument_comes_before_a_buffer():
    class WithArgument(Scale):
        def forward(self, x, scale):
            return x * scale

    rule = go.custom_backward(lambda grad_output, scale: grad_output * scale)
    x = float64(1.0)
    rule(WithArgument.forward)(WithArgument(None), x, 9.0).backward()
    assert x.grad.item() == 9.0


@pytest.mark.parametrize("name", ["weight", "scale"], ids=["parameter", "buffer"])
def test_residual_comes_before_the_modules_own(name):
    class HandsOver(Scale):
        def forward(self, x):
            return go.save_for_backward(x * 2, **{name: 9.0})

    x = float64(1.0)
    rule = {
        "weight": lambda grad_output, weight: {"x": grad_output * weight, "weight": None},
        "scale": lambda grad_output, scale: grad_output * scale,
    }[name]
    HandsOver(rule).call(x).backward()
    assert x.grad.item() == 9.0


class Taken(nn.Module):
    """A module with a parameter that has the name of an argument; it multiplies `x` by both in turn."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(float64(10.0, 20.0))

    def forward(self, x, weight):
        return x * weight + 1000 * self.weight


@pytest.mark.parametrize(
    "rule",
    [
        lambda grad_output, x, weight: {"x": 3 * grad_output * weight, "weight": 5 * grad_output * x},
        lambda grad_output, x, weight: (3 * grad_output * weight, 5 * grad_output * x),
        lambda grad_output, x, weight, vjp: (3 * vjp(grad_output)[0], 5 * grad_output * x),
        lambda grad_output, vjp: {
            name: factor * grad for factor, (name, grad) in zip((3, 5), vjp.by_name(grad_output).items(), strict=True)
        },
        lambda grad_output, module, x: {"x": 3 * grad_output * 2, "weight": 5 * grad_output * x},
    ],
    ids=["dict", "tuple", "vjp", "by_name", "not asked for"],
)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_argument_comes_before_a_parameter_of_its_name_which_keeps_autograds_gradient(rule, compiled):
    method = go.custom_backward(rule)(Taken.forward)
    method = torch.compile(method, backend="aot_eager", fullgraph=True) if compiled else method
    module, x, weight = Taken(), float64(1.0, 1.0), float64(2.0, 2.0)
    method(module, x, weight).sum().backward()
    closely((x.grad, weight.grad), (float64(6.0, 6.0, grad=False), float64(5.0, 5.0, grad=False)))
    closely(module.weight.grad, float64(1000.0, 1000.0, grad=False))


def test_argument_without_a_gradient_comes_before_a_parameter_of_its_name():
    seen = {}

    def rule(grad_output, needs, vjp):
        seen.update(needs)
        return vjp.by_name(grad_output)

    module, x = Taken(), float64(1.0, 1.0)
    go.custom_backward(rule)(Taken.forward)(module, x, 2.0).sum().backward()
    assert seen == {"x": True, "weight": False}
    closely((x.grad, module.weight.grad), (float64(2.0, 2.0, grad=False), float64(1000.0, 1000.0, grad=False)))


def test_params_of_a_module_with_one_that_has_the_name_of_an_argument_are_refused():
    rule = go.custom_backward(lambda grad_output, vjp, params: vjp.by_name(grad_output))
    with pytest.raises(go.RuleSignatureError) as caught:
        rule(Taken.forward)(Taken(), float64(1.0, 1.0), float64(2.0, 2.0))
    for part in ("rule '<lambda>' (", "of 'Taken' (", "asks for 'params'", "parameter 'weight'", "Rename the argument"):
        assert part in str(caught.value)


class Rounded(nn.Module):
    """A module that hands over a value under the name of its parameter, if it is told to."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(float64(10.2, 20.2))

    def forward(self, x, told):
        if told:
            return go.save_for_backward(x * self.weight, weight=self.weight.round())
        return x * self.weight


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_parameter_of_the_name_of_a_residual_keeps_autograds_gradient(compiled):
    method = go.custom_backward(lambda grad_output, weight: (grad_output * weight, None))(Rounded.forward)
    method = torch.compile(method, backend="aot_eager", fullgraph=True) if compiled else method
    module, x = Rounded(), float64(3.0, 4.0)
    method(module, x, True).sum().backward()
    closely((x.grad, module.weight.grad), (float64(10.0, 20.0, grad=False), float64(3.0, 4.0, grad=False)))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_parameter_of_the_name_of_a_residual_that_is_not_handed_over_is_the_rules_to_answer(compiled):
    def rule(grad_output, weight):
        return {"x": grad_output * weight, "weight": 7 * grad_output}

    method = go.custom_backward(rule)(Rounded.forward)
    method = torch.compile(method, backend="aot_eager", fullgraph=True) if compiled else method
    module, x = Rounded(), float64(3.0, 4.0)
    method(module, x, False).sum().backward()
    closely((x.grad, module.weight.grad), (float64(10.2, 20.2, grad=False), float64(7.0, 7.0, grad=False)))


def test_parameter_asked_for_that_could_have_been_handed_over_must_be_answered():
    method = go.custom_backward(lambda grad_output, weight: (grad_output * weight, None))(Rounded.forward)
    module, x = Rounded(), float64(3.0, 4.0)
    result = method(module, x, False)
    with pytest.raises(go.RuleResultError, match="must answer for its gradient"):
        result.sum().backward()


def asking_for(name):
    return eval(f"lambda grad_output, {name}: grad_output * {name}")


@pytest.mark.parametrize("name", RESERVED)
def test_residual_comes_before_a_reserved_name(name):
    def forward(x):
        return go.save_for_backward(x * 2, **{name: 9.0})

    assert answer_of(forward, asking_for(name), float64(1.0))[0].item() == 9.0


@pytest.mark.parametrize("name", ["input", "output", "vjp", "needs", "params", "module"])
def test_buffer_comes_before_a_reserved_name(name):
    module, x = Scale(asking_for(name)), float64(1.0)
    module.register_buffer(name, float64(9.0, grad=False))
    module.call(x).backward()
    assert x.grad.item() == 9.0


# --- reserved names ---


@pytest.mark.parametrize(
    ("forward", "args"),
    [
        (lambda anything: anything * 2, (float64(3.0),)),
        (lambda input: input * 2, (float64(3.0),)),
        (lambda name, x: x * 2, ("text", float64(3.0))),
        (lambda index, x: x * 2, (torch.tensor([1]), float64(3.0))),
        (lambda *xs: xs[0] * 2, (float64(3.0),)),
    ],
    ids=["any name", "called input", "after a string", "after an integer tensor", "variadic"],
)
def test_input_is_the_first_differentiable_argument(forward, args):
    seen = []

    def rule(grad_output, input):
        seen.append(input)
        return {}

    go.custom_backward(rule)(forward)(*args).backward()
    exactly(seen[0].detach(), float64(3.0, grad=False))


def test_output_is_the_forwards_result():
    x = noise(3)
    grads = answer_of(torch.exp, lambda grad_output, output: grad_output * output * 10, x)
    closely(grads[0], x.detach().exp() * 10)


def test_output_has_the_structure_of_the_result():
    seen = []

    @go.custom_backward(lambda grad_output, output: (seen.append(output), grad_output["a"])[1])
    def forward(x):
        return {"a": x * 2, "b": [x * 3]}

    forward(float64(1.0))["a"].backward()
    exactly(seen[0]["b"][0].detach(), float64(3.0, grad=False))


def test_vjp_is_the_gradient_without_the_rule():
    x = noise(3)
    grads = answer_of(torch.sin, lambda grad_output, vjp: vjp(grad_output) * 10, x)
    closely(grads[0], x.detach().cos() * 10)


@pytest.mark.parametrize("wanted", [(True, False), (False, True), (True, True)], ids=["first", "second", "both"])
def test_needs_says_by_argument_name_whether_a_gradient_is_wanted(wanted):
    seen = []

    def rule(grad_output, needs):
        seen.append(needs)
        return grad_output, grad_output

    a, b = float64(1.0, grad=wanted[0]), float64(2.0, grad=wanted[1])
    go.custom_backward(rule)(lambda a, b, option=None: a * b)(a, b).backward()
    assert seen == [{"a": wanted[0], "b": wanted[1], "option": False}]


@pytest.mark.parametrize("way", ["short path", "general path"])
@pytest.mark.parametrize("inputs", ["a", "ab"])
def test_needs_is_of_the_call_and_not_of_the_backward(way, inputs):
    seen = []

    def rule(grad_output, needs):
        seen.append({name: needs[name] for name in ("a", "k", "b", "c")})
        return {"a": grad_output, "b": 2 * grad_output}

    forwards = {
        "short path": lambda a, k, c, *, b: a * b * c * k,
        "general path": lambda a, k, c, *, b, **more: a * b * c * k,
    }
    tensors = {"a": float64(1.0), "b": float64(2.0)}
    y = go.custom_backward(rule)(forwards[way])(tensors["a"], 3.0, float64(4.0, grad=False), b=tensors["b"])
    y.backward(inputs=[tensors[name] for name in inputs])
    assert seen == [{"a": True, "k": False, "b": True, "c": False}]
    assert [name for name in "ab" if tensors[name].grad is not None] == list(inputs)


def test_needs_says_so_of_the_parameters_that_a_method_answers_for():
    seen = []

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(float64(3.0))

        @go.custom_backward(lambda g, x, weight, needs: (seen.append(needs), {"x": g * weight, "weight": g * x})[1])
        def forward(self, x):
            return x * self.weight

    layer = Layer()
    for grad in (True, False):
        layer(float64(2.0, grad=grad)).backward()
    assert seen == [{"weight": True, "x": True}, {"weight": True, "x": False}]
    exactly(layer.weight.grad, float64(4.0, grad=False))


def test_needs_says_so_of_parameters_too():
    seen = []

    def rule(grad_output, needs):
        seen.append(needs)
        return grad_output

    module = Scale(rule)
    module.frozen = nn.Parameter(float64(1.0), requires_grad=False)
    module.call(float64(1.0)).backward()
    assert seen == [{"x": True, "weight": True, "frozen": False}]


def test_params_are_the_trainable_parameters_by_dotted_name():
    seen = []

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Scale(None)
            self.frozen = nn.Parameter(float64(1.0), requires_grad=False)

        @go.custom_backward(lambda grad_output, params: (seen.append(params), {"inner.weight": None})[1])
        def forward(self, x):
            return self.inner(x)

    Outer()(float64(1.0)).backward()
    assert list(seen[0]) == ["inner.weight"]
    exactly(seen[0]["inner.weight"].detach(), float64(3.0, grad=False))


def test_module_has_the_values_of_that_forward():
    def rule(grad_output, module):
        return grad_output * module.weight * 10

    module, x = Scale(rule), float64(2.0)
    method = go.custom_backward(rule)(Scale.forward)
    module.forward = functools.partial(method, module)
    torch.func.functional_call(module, {"weight": float64(4.0)}, (x,)).backward()
    assert x.grad.item() == 40.0


class Fixed(nn.Module):
    """A module that multiplies by a buffer or a frozen parameter."""

    def __init__(self, frozen):
        super().__init__()
        if frozen:
            self.scale = nn.Parameter(float64(10.0, 20.0, grad=False), requires_grad=False)
        else:
            self.register_buffer("scale", float64(10.0, 20.0, grad=False))

    def forward(self, x):
        return x * self.scale


class FixedWithBackward(Fixed):
    def forward(self, x):
        return x * self.scale

    def backward(self, grad_output):
        return grad_output * self.scale


READERS = {
    "module": lambda grad_output, module: grad_output * module.scale,
    "a method": lambda grad_output, module: grad_output * module.scale.abs(),
    "forward": lambda grad_output, forward: grad_output * forward(torch.ones_like(grad_output)),
}


@pytest.mark.parametrize("frozen", [False, True], ids=["buffer", "frozen parameter"])
@pytest.mark.parametrize("rule", READERS.values(), ids=READERS)
def test_rule_that_reads_a_tensor_of_the_module_that_was_overwritten_after_the_forward_is_refused(rule, frozen):
    module, x = Fixed(frozen), float64(1.0, 1.0)
    result = go.custom_backward(rule)(Fixed.forward)(module, x)
    module.scale.mul_(100)
    with pytest.raises(go.UnsupportedError) as caught:
        result.sum().backward()
    for part in ("rule '<lambda>' (", "of 'Fixed' (", "read 'scale' of the module", "written into since", "a copy"):
        assert part in str(caught.value)


@pytest.mark.parametrize("frozen", [False, True], ids=["buffer", "frozen parameter"])
def test_backward_that_reads_a_tensor_of_the_module_that_was_overwritten_after_the_forward_is_refused(frozen):
    cls = go.custom_backward(type("Class", (FixedWithBackward,), dict(vars(FixedWithBackward))))
    module, x = cls(frozen), float64(1.0, 1.0)
    result = module(x)
    module.scale.mul_(100)
    with pytest.raises(go.UnsupportedError, match="read 'scale' of the module"):
        result.sum().backward()


def test_tensor_of_the_module_that_was_overwritten_may_be_left_alone():
    module, x = Fixed(False), float64(1.0, 1.0)
    rule = go.custom_backward(lambda grad_output, module: 3 * grad_output * (len(dict(module.named_buffers()))))
    result = rule(Fixed.forward)(module, x)
    module.scale.mul_(100)
    result.sum().backward()
    closely(x.grad, float64(3.0, 3.0, grad=False))


def test_buffer_that_each_forward_writes_into_is_shown_as_that_forward_left_it():
    def rule(grad_output, module, input):
        return grad_output * module.running_mean

    class Norm(nn.Module):  # torch does not count what its own BatchNorm writes
        def __init__(self):
            super().__init__()
            self.register_buffer("running_mean", torch.zeros(2, dtype=torch.float64))

        def forward(self, x):
            with torch.no_grad():
                self.running_mean.copy_(x.mean(0))
            return x - self.running_mean

    norm = Norm()
    first, second = noise(5, 2), noise(5, 2)
    with go.override(norm, {norm: rule}):
        results = norm(first), norm(second)
        sum(result.sum() for result in results).backward()
    closely(first.grad, first.detach().mean(0).expand(5, 2))
    closely(second.grad, second.detach().mean(0).expand(5, 2))


class DropConnect(nn.Module):
    def forward(self, weight):
        return nn.functional.dropout(weight, 0.5)


COMPUTED = {
    "dropout": lambda layer: nn.utils.parametrize.register_parametrization(layer, "weight", DropConnect()),
    "spectral norm": nn.utils.parametrizations.spectral_norm,
    "weight norm": nn.utils.parametrizations.weight_norm,
}


def weight_of(module):
    return (module[0] if isinstance(module, nn.Sequential) else module).weight


READING = {
    "module": lambda g, module: g @ weight_of(module),
    "module, twice": lambda g, module: (g @ weight_of(module) + g @ weight_of(module)) / 2,
    "module and params": lambda g, params, module: {"input": g @ weight_of(module), **dict.fromkeys(params)},
    "module and vjp": lambda g, vjp, module: vjp(g) * 0 + g @ weight_of(module),
    "forward": lambda g, input, forward: torch.func.vjp(forward, input)[1](g)[0],
}
BESIDE = {"module beside a parameter": lambda g, bias, module: {"input": g @ module.weight, "bias": None}}


@pytest.mark.parametrize(
    ("rule", "within"),
    [*itertools.product(READING.values(), (False, True)), *((rule, False) for rule in BESIDE.values())],
    ids=[*(f"{rule} of {part}" for rule in READING for part in ("the module", "a part")), *BESIDE],
)
@pytest.mark.parametrize("kind", COMPUTED)
def test_computed_weight_of_the_module_is_that_of_the_forward_and_stays_as_it_is(kind, rule, within):
    layer, grad = nn.Linear(8, 8, dtype=torch.float64), noise(8, 8, grad=False)
    x = torch.eye(8, dtype=torch.float64, requires_grad=True)
    COMPUTED[kind](layer)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn_like(parameter))  # an optimizer has moved it
    model = nn.Sequential(layer) if within else layer
    with go.override(model, {model: rule}):
        y = model(x)
    weight = (y - layer.bias).detach().T  # that the forward saw
    state, buffers = torch.get_rng_state(), [buffer.clone() for buffer in layer.buffers()]
    for _ in range(2):
        (found,) = torch.autograd.grad(y, x, grad, retain_graph=True)
        closely(found, grad @ weight)
    assert torch.equal(state, torch.get_rng_state())
    exactly(list(layer.buffers()), buffers)


@pytest.mark.parametrize("kind", COMPUTED)
def test_computed_weight_beside_vjp_needs_no_retained_graph(kind):
    layer, x = nn.Linear(3, 3, dtype=torch.float64), noise(3, 3)
    COMPUTED[kind](layer)
    plain, state = copy.deepcopy(layer), torch.get_rng_state()
    with go.override(layer, {layer: READING["module and vjp"]}):
        y = layer(x)
    y.sum().backward()
    torch.set_rng_state(state)
    plain(x.detach()).sum().backward()
    closely([one.grad for one in layer.parameters()], [one.grad for one in plain.parameters()])
    with pytest.raises(RuntimeError, match="a second time"):
        y.sum().backward()


@pytest.mark.parametrize("kind", ["dropout", "spectral norm"])
def test_computed_weight_that_comes_out_otherwise_for_a_second_derivative_is_refused_where_it_is_read(kind):
    layer, x = nn.Linear(8, 8, dtype=torch.float64), noise(8, 8)
    COMPUTED[kind](layer)
    with torch.no_grad():
        layer.parametrizations.weight.original.normal_()
    with go.override(layer, {layer: BESIDE["module beside a parameter"]}):
        y = layer(x)
    state, buffers = torch.get_rng_state(), [buffer.clone() for buffer in layer.buffers()]
    with pytest.raises(go.UnsupportedError, match="must read 'weight' of the module as that forward computed it"):
        torch.autograd.grad(y.sum(), x, create_graph=True)
    assert torch.equal(state, torch.get_rng_state())
    exactly(list(layer.buffers()), buffers)
    with go.override(layer, {layer: lambda grad_output, bias, module: {"input": grad_output, "bias": None}}):
        torch.autograd.grad(layer(x).sum(), x, create_graph=True)


@pytest.mark.parametrize("rule", [READING["module, twice"], READING["module and vjp"], *BESIDE.values()])
def test_computed_weight_of_a_compiled_module_is_that_of_the_forward(rule):
    layer, x = nn.Linear(8, 8, dtype=torch.float64), torch.eye(8, dtype=torch.float64, requires_grad=True)
    COMPUTED["dropout"](layer)
    grad = noise(8, 8, grad=False)
    with go.override(layer, {layer: rule}):
        y = torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
    (found,) = torch.autograd.grad(y, x, grad)
    closely(found, grad @ (y - layer.bias).detach().T)


@pytest.mark.parametrize("rule", ["module", "module and vjp", "module beside a parameter"])
def test_derivative_of_a_computed_weight_of_the_module_reaches_what_it_is_computed_from(rule):
    layer, x, grad = nn.Linear(3, 3, dtype=torch.float64), noise(3, 3), noise(3, 3, grad=False)
    nn.utils.parametrizations.weight_norm(layer)
    originals = list(layer.parametrizations.weight.parameters())
    with go.override(layer, {layer: {**READING, **BESIDE}[rule]}):
        (found,) = torch.autograd.grad(layer(x), x, grad, create_graph=True)
    plain = grad @ layer.weight
    closely(torch.autograd.grad(found.square().sum(), originals), torch.autograd.grad(plain.square().sum(), originals))


@pytest.mark.parametrize("how", ["eager", "compiled"])
@pytest.mark.parametrize(
    "rule",
    [
        lambda grad_output, module: grad_output / module.running_var,
        lambda grad_output, running_var: grad_output / running_var,
    ],
    ids=["module", "name"],
)
def test_running_statistics_are_shown_as_that_forward_left_them(rule, how):
    norm = nn.BatchNorm1d(2, dtype=torch.float64)
    run = norm if how == "eager" else torch.compile(norm, backend="aot_eager", fullgraph=True)
    first, second = noise(5, 2), noise(5, 2)
    with go.override(norm, {norm: rule}):
        result = run(first)
        left = norm.running_var.clone()
        run(second)
    result.sum().backward()
    closely(first.grad, (1 / left).expand(5, 2))


@pytest.mark.parametrize(
    "forward",
    [
        lambda x, mean, var: nn.functional.batch_norm(x, mean, var, training=True),
        lambda x, mean, var: elsewhere.normalized(x, mean, var),
    ],
    ids=["here", "elsewhere"],
)
def test_running_statistics_that_are_arguments_are_shown_as_they_were_given(forward):
    normalized = go.custom_backward(lambda grad_output, mean: {"x": grad_output * mean})(forward)

    x, mean, var = noise(5, 2), torch.full((2,), 3.0, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    normalized(x, mean, var).sum().backward()
    closely(x.grad, float64(3.0, 3.0, grad=False).expand(5, 2))
    closely(mean, 2.7 + 0.1 * x.detach().mean(0))  # torch's momentum


def test_module_and_its_parts_are_in_training_if_they_were_in_that_forward():
    seen = []

    def rule(grad_output, module):
        seen.append([part.training for part in module.modules()])
        return grad_output

    model = nn.Sequential(nn.Dropout(0.5), nn.Sequential(nn.Dropout(0.5), nn.Linear(2, 2, dtype=torch.float64)))
    with go.override(model, {model: rule}):
        result = model(noise(3, 2))
    model[1].eval()
    result.sum().backward()
    assert seen == [[True] * 5]
    assert [part.training for part in model.modules()] == [True, True, False, False, False]


def test_module_of_a_rule_is_of_the_modules_class():
    seen = []

    def rule(grad_output, module):
        seen.append(module)
        return grad_output

    Scale(rule).call(float64(1.0)).backward()
    assert isinstance(seen[0], Scale)


def test_forward_is_the_undecorated_forward():
    def rule(grad_output, x, forward):
        with torch.enable_grad():
            again = x.detach().requires_grad_()
            return torch.autograd.grad(forward(again), again, grad_output)[0] * 10

    x = noise(3)
    closely(answer_of(lambda x: x.sin(), rule, x)[0], x.detach().cos() * 10)


def test_forward_of_a_method_needs_no_self():
    def rule(grad_output, x, forward):
        return grad_output * forward(x)

    x = float64(2.0)
    Scale(rule).call(x).backward()
    assert x.grad.item() == 30.0


def test_builtin_without_a_signature_offers_the_reserved_names_together():
    x = noise(3)

    def rule(grad_output, input, output, vjp, needs, forward):
        return vjp(grad_output) * output / forward(input) * 10

    closely(answer_of(torch.sin, rule, x)[0], x.detach().cos() * 10)


# --- what is kept ---


KEPT = {
    "gradient alone": (lambda grad_output: {}, 0),
    "one argument": (lambda grad_output, a: {}, 1),
    "both arguments": (lambda grad_output, a, b: {}, 2),
    "input": (lambda grad_output, input: {}, 1),
    "output": (lambda grad_output, output: {}, 1),
    "input under both names": (lambda grad_output, a, input: {}, 1),
    "needs": (lambda grad_output, needs: {}, 0),
    "forward": (lambda grad_output, forward: {}, 0),
}


@pytest.mark.parametrize("form", ["plain", "variadic"])
@pytest.mark.parametrize(("rule", "count"), KEPT.values(), ids=KEPT)
def test_only_what_the_rule_asks_for_is_kept(rule, count, form):
    forwards = {"plain": lambda a, b: torch.sin(a) * b, "variadic": lambda a, b, *rest: torch.sin(a) * b}
    decorated = go.custom_backward(rule)(forwards[form])
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.data_ptr()), t)[1], lambda t: t):
        decorated(noise(3), noise(3))
    assert len(set(kept)) == count


# --- what does not exist ---


def missing(grad_output, wieght):
    return grad_output


def test_unknown_name_is_an_error_when_the_rule_is_attached():
    with pytest.raises(go.RuleSignatureError):
        go.custom_backward(missing)(lambda x, weight: x * weight)


@pytest.mark.parametrize(
    "part",
    [
        r"^rule 'missing' \(.*test_names\.py:\d+\)",
        "'wieght', which does not exist",
        r"'scale_it' \(.*test_names\.py:\d+\) offers 'x', 'weight'",
        "'input', 'output', 'vjp', 'needs', 'params', 'module', 'forward'",
        r"Did you mean 'weight'\?$",
    ],
    ids=["rule and place", "name", "what the forward offers", "reserved names", "closest"],
)
def test_unknown_name_error_says(part):
    def scale_it(x, weight):
        return x * weight

    with pytest.raises(go.RuleSignatureError, match=part):
        go.custom_backward(missing)(scale_it)


def test_unknown_name_close_to_a_reserved_one_is_told_that():
    with pytest.raises(go.RuleSignatureError, match=r"Did you mean 'output'\?"):
        go.custom_backward(lambda grad_output, outptu: grad_output)(lambda x: x)


@pytest.mark.parametrize(
    ("rule", "first"),
    [
        (lambda ctx, grad_output: grad_output, "ctx"),  # as of an autograd.Function
        (lambda module, grad_input, grad_output: grad_input, "module"),  # as a hook
        (lambda x, grad: grad, "x"),
    ],
    ids=["Function", "hook", "order"],
)
def test_rule_that_asks_for_the_gradient_is_told_that_it_has_it(rule, first):
    text = f"which does not exist.* The gradient is the first parameter of a rule, .*; here it is '{first}'$"
    with pytest.raises(go.RuleSignatureError, match=text):
        go.custom_backward(rule)(lambda x: x)
    with pytest.raises(go.RuleSignatureError, match="Did you mean 'gradient_scale'"):
        go.custom_backward(lambda grad_output, grad_scale: grad_output)(lambda x, gradient_scale: x)


def test_unknown_name_close_to_nothing_gets_no_suggestion():
    with pytest.raises(go.RuleSignatureError) as caught:
        go.custom_backward(lambda grad_output, zzzzzz: grad_output)(lambda x: x)
    assert "Did you mean" not in str(caught.value)


def test_unknown_name_on_a_method_is_an_error_at_the_first_call_with_the_modules_names():
    module = Scale(missing)
    with pytest.raises(go.RuleSignatureError, match=r"'x', 'weight', 'scale'.*Did you mean 'weight'"):
        module.call(float64(1.0))


def test_unknown_name_on_a_method_is_an_error_at_each_call():
    module = Scale(missing)
    for _ in range(2):
        with pytest.raises(go.RuleSignatureError):
            module.call(float64(1.0))


def test_unknown_name_on_a_method_is_no_error_where_no_gradient_is_wanted():
    with torch.no_grad():
        exactly(Scale(missing).call(float64(1.0)), float64(15.0, grad=False))


def test_unknown_name_where_residuals_exist_is_an_error_at_the_first_call_with_theirs():
    decorated = go.custom_backward(missing)(lambda x: go.save_for_backward(x * 2, weight=3.0))
    with pytest.raises(go.RuleSignatureError, match=r"'x', 'weight'.*Did you mean 'weight'"):
        decorated(float64(1.0))


def test_residual_of_one_branch_is_missed_at_the_call_that_takes_the_other():
    @go.custom_backward(lambda grad_output, mask: grad_output * mask)
    def forward(x, hand_over):
        return go.save_for_backward(x * 2, mask=7.0) if hand_over else x * 2

    x = float64(1.0)
    forward(x, True).backward()
    assert x.grad.item() == 7.0
    with pytest.raises(go.RuleSignatureError, match="'mask'"):
        forward(x, False)


@pytest.mark.parametrize("builtin", [torch.round, torch.sin, torch.Tensor.add], ids=["round", "sin", "Tensor.add"])
@pytest.mark.parametrize("name", ["x", "self", "decimals"])
def test_builtin_without_a_signature_offers_reserved_names_only(builtin, name):
    rule = eval(f"lambda grad_output, {name}: grad_output")
    with pytest.raises(go.RuleSignatureError, match=r"has no signature and offers no names of its own.*'input'"):
        go.custom_backward(rule)(builtin)


# --- reserved names that mean something else ---


@pytest.mark.parametrize("name", RESERVED[1:])
def test_parameter_with_a_reserved_name_that_the_rule_asks_for_is_a_conflict(name):
    forward = eval(f"lambda x, {name}: x")
    with pytest.raises(go.RuleSignatureError, match=f"asks for '{name}', which is a parameter.*reserves.*Rename"):
        go.custom_backward(asking_for(name))(forward)


@pytest.mark.parametrize("name", RESERVED)
def test_parameter_with_a_reserved_name_is_no_conflict_if_the_rule_does_not_ask_for_it(name):
    forward = eval(f"lambda x, {name}=0: x * 2")
    assert answer_of(forward, lambda grad_output: grad_output * 7, float64(1.0))[0].item() == 7.0


def test_input_that_is_not_the_first_argument_is_a_conflict():
    with pytest.raises(go.RuleSignatureError, match="'input', which is a parameter"):
        go.custom_backward(asking_for("input"))(lambda x, input: x)


def test_input_that_is_the_first_argument_is_no_conflict():
    assert answer_of(lambda input: input * 2, asking_for("input"), float64(3.0))[0].item() == 3.0


# --- what is no rule ---


NO_RULES = {
    "no parameter": lambda: None,
    "keyword-only gradient": lambda *, grad_output: grad_output,
    "variadic gradient": lambda *grads: grads,
    "number": 3,
    "None": None,
    "string": "rule",
    "variadic names": lambda grad_output, *names: grad_output,
}


@pytest.mark.parametrize("rule", NO_RULES.values(), ids=NO_RULES)
def test_what_cannot_be_a_rule_is_refused_when_it_is_given(rule):
    with pytest.raises(go.RuleSignatureError, match=r"gradient|by a name"):
        go.custom_backward(rule)


def test_message_shows_the_parameters_as_they_are_written():
    def rule(*, grad_output, x=1):
        return grad_output

    with pytest.raises(go.RuleSignatureError, match=r"it takes \(\*, grad_output, x=1\)$"):
        go.custom_backward(rule)


@pytest.mark.parametrize(
    ("bind", "given"),
    [
        (lambda fn: functools.partial(fn, fctor=2.0), r"'fctor'"),
        (lambda fn: functools.partial(functools.partial(fn, factor=2.0), fctor=2.0), r"'factor' and 'fctor'"),
        (lambda fn: functools.partial(fn, 1.0, 2.0, 3.0), r"3 by position"),
    ],
)
def test_partial_that_binds_what_its_rule_does_not_take_is_refused_where_it_is_attached(bind, given):
    text = rf"^rule 'with_default' \(.*test_names\.py:\d+\) must .* \(grad_output, factor\).* binds {given}\. Bind"
    with pytest.raises(go.RuleSignatureError, match=text):
        go.custom_backward(bind(with_default))


def test_positional_only_name_cannot_be_asked_for():
    def rule(grad_output, x, /):
        return grad_output

    with pytest.raises(go.RuleSignatureError, match="as a keyword"):
        go.custom_backward(rule)


@pytest.mark.parametrize("rule", [torch.neg, torch.Tensor.neg], ids=["torch.neg", "Tensor.neg"])
def test_builtin_without_a_signature_is_a_rule_of_the_gradient_alone(rule):
    assert answer_of(lambda x: x * 2, rule, float64(1.0))[0].item() == -1.0


class CallableRule:
    def __call__(self, grad_output, x):
        return grad_output * x * 10

    def method(self, grad_output, x):
        return grad_output * x * 10


@pytest.mark.parametrize("rule", [CallableRule(), CallableRule().method], ids=["object", "bound method"])
def test_callable_object_and_bound_method_ask_by_name(rule):
    assert answer_of(lambda x: x * 2, rule, float64(3.0))[0].item() == 30.0


def test_rule_is_tested_by_calling_it():
    def rule(grad_output, x):
        return grad_output * x

    go.custom_backward(rule)(lambda x: x)
    assert rule(2.0, x=3.0) == 6.0


# --- forwards with *args and **kwargs, and of objects ---


def test_needs_tells_of_each_of_varargs():
    seen = []
    times = go.custom_backward(lambda grad_output, needs, vjp: (seen.append(needs), vjp(grad_output))[1])(torch.mul)
    x, constant = noise(3), noise(3, grad=False)
    times(x, constant).sum().backward()
    times(constant, x).sum().backward()
    assert seen == [
        {"args": True, "args[0]": True, "args[1]": False},
        {"args": True, "args[0]": False, "args[1]": True},
    ]


def test_kwargs_under_their_own_name_leave_varargs_out():
    seen = []
    x = noise(3)
    go.custom_backward(lambda grad_output, rest: seen.append(rest) or {})(lambda a, *more, **rest: a * more[0])(
        x, x.detach(), z=3
    ).sum().backward()
    assert seen == [{"z": 3}]


class Simulator:
    factor = 3.0

    @go.custom_backward(lambda grad_output, forward, x: grad_output * (forward(x + 0.5) - forward(x - 0.5)))
    def run(self, x):
        return self.factor * x


def test_forward_of_a_method_of_a_plain_object_is_bound_to_it():
    x = noise(3)
    Simulator().run(x).sum().backward()
    closely(x.grad, torch.full((3,), 3.0, dtype=torch.float64))


def test_forward_of_a_bound_method_is_bound():
    x, simulator = noise(3), Simulator()
    simulator.factor = 5.0
    rule = lambda grad_output, forward, x: grad_output * (forward(x + 0.5) - forward(x - 0.5))  # noqa: E731
    go.custom_backward(rule)(simulator.run)(x).sum().backward()
    closely(x.grad, torch.full((3,), 5.0, dtype=torch.float64))


def test_forward_that_is_evaluated_again_leaves_the_buffers_of_the_module_as_they_are():
    class Normalised(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(3, affine=False).double()

        @go.custom_backward(lambda grad_output, forward, x: grad_output * (forward(x + 1) - forward(x - 1)))
        def forward(self, x):
            return self.norm(x)

    module, x = Normalised(), noise(4, 3)
    y = module(x)
    counted, mean = module.norm.num_batches_tracked.clone(), module.norm.running_mean.clone()
    y.sum().backward()
    exactly(module.norm.num_batches_tracked, counted)
    exactly(module.norm.running_mean, mean)


class FiveTimes(nn.Module):
    """A rule with a place for state of its own."""

    def forward(self, grad_output, x):
        return 5 * grad_output * x


def test_module_as_a_rule_asks_for_what_its_forward_asks_for():
    x = float64(2.0, 3.0)
    go.custom_backward(FiveTimes())(lambda x: x**2)(x).sum().backward()
    closely(x.grad, float64(10.0, 15.0, grad=False))


def test_module_as_a_rule_is_named_by_the_place_of_its_forward():
    with pytest.raises(go.RuleSignatureError, match=r"^rule 'FiveTimes' \(.*test_names\.py:\d+\) asks for 'x'"):
        go.custom_backward(FiveTimes())(lambda y: y**2)
