"""What a rule may return, and the error by name for everything else: torch would sum, cast or drop it silently."""

import dataclasses
import re
from collections import OrderedDict, defaultdict, namedtuple

import numpy as np
import pytest
import torch
from oracles import closely, exactly, float64, noise
from torch import nn

import gradoverride as go

HERE = r"\(.*test_returns\.py:\d+\)"


def backward_of(forward, answer, *args, **kwargs):
    """Run the backward of `forward` with a rule that returns `answer`, or `answer(grad_output)` if it is a function."""

    def rule(grad_output):
        return answer(grad_output) if callable(answer) else answer

    out = go.custom_backward(rule)(forward)(*args, **kwargs)
    out.backward(torch.ones_like(out))


def refused(text, forward, answer, *args, **kwargs):
    """Fail unless that is a `RuleResultError` which names the rule, its place and the forward, and says `text`."""
    with pytest.raises(go.RuleResultError, match=text) as caught:
        backward_of(forward, answer, *args, **kwargs)
    assert re.match(rf"rule 'rule' {HERE} of '.*' {HERE} must return ", str(caught.value))


def one(x):
    return x * 2


def one_with_options(x, times=2, *, mode="text"):
    return x * times


def two(a, b):
    return a * b


def variadic(first, *rest):
    return first * sum(rest)


def keywords(x, **named):
    return x * sum(named.values())


def nested(pair, scale):
    return pair["a"] * pair["b"][0] * scale


# --- one differentiable argument ---


BARE = {
    "bare": lambda g: g * 7,
    "tuple of one": lambda g: (g * 7,),
    "list of one": lambda g: [g * 7],
    "dict": lambda g: {"x": g * 7},
    "None for each other": lambda g: (g * 7, None, None),
    "trailing None left off": lambda g: (g * 7, None),
}


@pytest.mark.parametrize("answer", BARE.values(), ids=BARE)
def test_gradient_of_the_only_tensor_argument(answer):
    x = noise(3)
    backward_of(one_with_options, answer, x)
    exactly(x.grad, torch.full_like(x, 7.0).detach())


NOTHING = {
    "None": lambda g: None,
    "tuple of None": lambda g: (None,),
    "empty dict": lambda g: {},
    "None in a dict": lambda g: {"x": None},
}


@pytest.mark.parametrize("answer", NOTHING.values(), ids=NOTHING)
def test_none_stops_the_gradient(answer):
    x, y = noise(3), noise(3)
    (go.custom_backward(answer)(one)(x) + y).sum().backward()
    assert x.grad is None or not x.grad.any()
    exactly(y.grad, torch.ones(3, dtype=torch.float64))


def test_bare_gradient_may_follow_a_non_tensor():
    x = noise(3)
    backward_of(lambda name, x: x * 2, lambda g: g * 7, "text", x)
    exactly(x.grad, torch.full((3,), 7.0, dtype=torch.float64))


def test_bare_gradient_may_follow_an_integer_tensor():
    weight = noise(5, 2)
    backward_of(lambda index, weight: weight[index], lambda g: torch.full((5, 2), 7.0), torch.tensor([1, 3]), weight)
    exactly(weight.grad, torch.full((5, 2), 7.0, dtype=torch.float64))


def test_dict_with_none_for_an_integer_tensor_is_fine():
    weight = noise(5)
    answer = {"index": None, "weight": torch.full((5,), 7.0)}
    backward_of(lambda index, weight: weight[index], answer, torch.tensor([1, 3]), weight)
    exactly(weight.grad, torch.full((5,), 7.0, dtype=torch.float64))


DEFAULT = float64(3.0, 3.0, 3.0, grad=False)


@pytest.mark.parametrize("compiling", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("rule", [lambda g: g * 7, lambda g, weight: g * 7, lambda g, vjp: g * 7])
def test_default_value_that_is_a_tensor_does_not_count_beside_the_only_argument(rule, compiling):
    @go.custom_backward(rule)
    def forward(x, weight=DEFAULT):
        return x * weight

    x = noise(3)
    run = torch.compile(forward, backend="aot_eager", fullgraph=True) if compiling else forward
    run(x).sum().backward()
    exactly(x.grad, torch.full((3,), 7.0, dtype=torch.float64))


def test_none_stops_the_gradient_of_the_only_argument_beside_a_default_value():
    x, y = noise(3), noise(3)
    (go.custom_backward(lambda g: None)(lambda x, weight=DEFAULT: x * weight)(x) + y).sum().backward()
    assert x.grad is None or not x.grad.any()


def test_default_value_that_is_a_tensor_does_not_count_in_a_transform():
    @go.custom_backward(lambda g: g * 7)
    def forward(x, weight=DEFAULT):
        return x * weight

    x = noise(3, grad=False)
    exactly(torch.func.grad(lambda x: forward(x).sum())(x), torch.full_like(x, 7.0))
    with pytest.raises(go.RuleResultError, match=r"one gradient for each argument \(x, weight\)"):
        torch.func.grad(lambda w: forward(x, w).sum())(DEFAULT)


def test_argument_that_has_a_tensor_as_its_default_counts_where_a_gradient_is_wanted_for_it():
    def forward(x, weight=DEFAULT):
        return x * weight

    refused(r"one gradient for each argument \(x, weight\)", forward, lambda g: g, noise(3), noise(3))


# --- several arguments ---


SEVERAL = {
    "tuple": lambda g: (g * 2, g * 3),
    "list": lambda g: [g * 2, g * 3],
    "namedtuple": lambda g: namedtuple("Grads", "a b")(g * 2, g * 3),
    "dict": lambda g: {"a": g * 2, "b": g * 3},
    "dict in another order": lambda g: {"b": g * 3, "a": g * 2},
}


@pytest.mark.parametrize("answer", SEVERAL.values(), ids=SEVERAL)
def test_one_gradient_for_each_argument(answer):
    a, b = noise(3), noise(3)
    backward_of(two, answer, a, b)
    exactly((a.grad[0].item(), b.grad[0].item()), (2.0, 3.0))


@pytest.mark.parametrize("answer", SEVERAL.values(), ids=SEVERAL)
def test_gradient_for_an_argument_that_needs_none_is_left_unused(answer):
    a, b = noise(3, grad=False), noise(3)
    backward_of(two, answer, a, b)
    assert a.grad is None
    assert b.grad[0].item() == 3.0


@pytest.mark.parametrize(
    "answer", [lambda g: (None, g * 3), lambda g: {"b": g * 3}], ids=["None in a tuple", "left out of a dict"]
)
def test_argument_may_get_no_gradient(answer):
    a, b = noise(3), noise(3)
    backward_of(two, answer, a, b)
    assert a.grad is None or not a.grad.any()
    assert b.grad[0].item() == 3.0


def test_keyword_arguments_count_in_signature_order():
    a, b = noise(3), noise(3)
    backward_of(two, lambda g: (g * 2, g * 3), b=b, a=a)
    exactly((a.grad[0].item(), b.grad[0].item()), (2.0, 3.0))


def test_keyword_only_argument_counts_after_the_others():
    def forward(a, *, b):
        return a * b

    a, b = noise(3), noise(3)
    backward_of(forward, lambda g: (g * 2, g * 3), a, b=b)
    exactly((a.grad[0].item(), b.grad[0].item()), (2.0, 3.0))


def test_none_keeps_the_place_of_what_is_no_tensor():
    a, b = noise(3), noise(3)
    backward_of(lambda a, name, b: a * b, lambda g: (g * 2, None, g * 3), a, "text", b)
    exactly((a.grad[0].item(), b.grad[0].item()), (2.0, 3.0))


def test_trailing_none_may_be_left_off():
    a, b = noise(3), noise(3)
    backward_of(lambda a, b, name="text", mask=None: a * b, lambda g: (g * 2, g * 3), a, b)
    exactly((a.grad[0].item(), b.grad[0].item()), (2.0, 3.0))


def test_trailing_gradient_may_be_left_off_where_none_is_wanted():
    a, b = noise(3), noise(3, grad=False)
    backward_of(two, lambda g: (g * 2,), a, b)
    assert a.grad[0].item() == 2.0


def test_each_of_variadic_arguments_counts_as_one():
    tensors = [noise(3) for _ in range(3)]
    backward_of(variadic, lambda g: (g * 2, g * 3, g * 4), *tensors)
    assert [tensor.grad[0].item() for tensor in tensors] == [2.0, 3.0, 4.0]


@pytest.mark.parametrize("kind", [tuple, list])
def test_dict_answers_for_variadic_arguments_under_their_common_name(kind):
    tensors = [noise(3) for _ in range(3)]
    backward_of(variadic, lambda g: {"first": g * 2, "rest": kind([g * 3, g * 4])}, *tensors)
    assert [tensor.grad[0].item() for tensor in tensors] == [2.0, 3.0, 4.0]


@pytest.mark.parametrize(
    "answer", [lambda g: {"x": g * 2, "b": g * 4, "a": g * 3}, lambda g: (g * 2, g * 3, g * 4)], ids=["dict", "tuple"]
)
def test_answer_for_variadic_keywords_is_by_their_own_names_or_in_order(answer):
    x, a, b = noise(3), noise(3), noise(3)
    backward_of(keywords, answer, x, a=a, b=b)
    assert [tensor.grad[0].item() for tensor in (x, a, b)] == [2.0, 3.0, 4.0]


# --- nested arguments ---


@pytest.mark.parametrize("form", ["tuple", "dict"])
def test_gradient_of_a_nested_argument_mirrors_its_structure(form):
    a, b, scale = noise(3), noise(3), noise(3)

    def answer(g):
        pair = {"a": g * 2, "b": [g * 3, None]}
        return (pair, g * 4) if form == "tuple" else {"pair": pair, "scale": g * 4}

    backward_of(nested, answer, {"a": a, "b": [b, "text"]}, scale)
    assert [tensor.grad[0].item() for tensor in (a, b, scale)] == [2.0, 3.0, 4.0]


Pair = namedtuple("Pair", "a b")


@dataclasses.dataclass
class Record:
    a: torch.Tensor
    b: torch.Tensor


MIRRORED = {
    "tuple": (lambda a, b: (a, b), lambda pair: pair[0] * pair[1]),
    "list": (lambda a, b: [a, b], lambda pair: pair[0] * pair[1]),
    "namedtuple": (Pair, lambda pair: pair.a * pair.b),
    "dataclass": (Record, lambda pair: pair.a * pair.b),
}


@pytest.mark.parametrize(("pack", "forward"), MIRRORED.values(), ids=MIRRORED)
def test_bare_answer_mirrors_the_structure_of_the_only_argument(pack, forward):
    a, b = noise(3), noise(3)
    backward_of(forward, lambda g: pack(g * 2, g * 3), pack(a, b))
    exactly((a.grad[0].item(), b.grad[0].item()), (2.0, 3.0))


def test_dict_answer_for_an_argument_that_is_a_dict_is_by_the_arguments_name():
    a, b = noise(3), noise(3)
    backward_of(lambda pair: pair["a"] * pair["b"], lambda g: {"pair": {"a": g * 2, "b": g * 3}}, {"a": a, "b": b})
    exactly((a.grad[0].item(), b.grad[0].item()), (2.0, 3.0))


def test_dict_answer_in_the_structure_of_a_dict_argument_is_refused():
    text = r"\(pair\); it has 'a'. The gradient of 'pair', which is a dict itself, goes under that name: {'pair': "
    refused(text, lambda pair: pair["a"] * 2, lambda g: {"a": g}, {"a": noise(3)})


class Dict(dict):
    """A dict of a type of its own."""


FORMS = {
    **MIRRORED,
    **{
        kind.__name__: (lambda a, b, kind=kind: kind(a=a, b=b), lambda pair: pair["a"] * pair["b"])
        for kind in (dict, OrderedDict, Dict)
    },
    "defaultdict": (lambda a, b: defaultdict(list, a=a, b=b), lambda pair: pair["a"] * pair["b"]),
}


@pytest.mark.parametrize(("pack", "forward"), FORMS.values(), ids=FORMS)
def test_vjp_of_a_nested_argument_has_a_form_that_the_rule_may_return(pack, forward):
    a, b = noise(3), noise(3)
    go.custom_backward(lambda grad_output, vjp: vjp(grad_output))(forward)(pack(a, b)).sum().backward()
    closely((a.grad, b.grad), (b.detach(), a.detach()))


@dataclasses.dataclass
class Mixed:
    """A record with values of all kinds beside its tensor."""

    x: torch.Tensor
    count: int = 3
    name: str | None = "text"
    index: torch.Tensor = dataclasses.field(default_factory=lambda: torch.arange(3))
    array: np.ndarray = dataclasses.field(default_factory=lambda: np.arange(3.0))
    options: dict = dataclasses.field(default_factory=lambda: {"mode": "text", "mask": torch.ones(3) > 0})


@pytest.mark.parametrize("answered", ["bare", "by name"])
def test_gradient_may_leave_in_a_record_what_is_no_floating_tensor(answered):
    def rule(grad_output, record):
        grad = dataclasses.replace(record, x=grad_output * 7)
        return grad if answered == "bare" else {"record": grad}

    x = noise(3)
    go.custom_backward(rule)(lambda record: record.x * record.count)(Mixed(x)).sum().backward()
    exactly(x.grad, torch.full((3,), 7.0, dtype=torch.float64))


def test_containers_without_a_floating_tensor_may_be_left_where_they_stand():
    def doubled(given):
        return given["x"] * 2

    ids, x = (1, (torch.arange(3), {"mask": torch.ones(3) > 0})), noise(3)
    backward_of(doubled, lambda g: {"given": {"x": 7 * g, "ids": ids}}, {"x": x, "ids": ids})
    exactly(x.grad, torch.full((3,), 7.0, dtype=torch.float64))
    others = (1, (noise(3), None))
    text = r"must return None for 'given\['ids'\]', which holds no floating tensor; it returned a tuple of 2"
    refused(text, doubled, lambda g: {"given": {"x": 7 * g, "ids": others}}, {"x": x, "ids": ids})


@pytest.mark.parametrize("make", [lambda g: (g, 3, "text"), lambda g: [g, None, "text"]], ids=["as given", "with None"])
def test_equal_numbers_and_strings_may_be_left_where_they_stand(make):
    x = noise(3)
    backward_of(lambda parts: parts[0] * parts[1], make, (x, 3, "text"))
    assert x.grad is not None


def test_numbers_and_strings_may_be_left_where_they_stand_in_compiled_code():
    @go.custom_backward(lambda grad_output: (grad_output * 7, 3, "text"))
    def forward(parts):
        return parts[0] * parts[1]

    x = noise(3)
    torch.compile(forward, backend="aot_eager", fullgraph=True)((x, 3, "text")).sum().backward()
    exactly(x.grad, torch.full((3,), 7.0, dtype=torch.float64))


OTHERS = {
    "another number": (4, "returned 4, an int"),
    "a number of another type": (3.0, "returned 3.0, a float"),
    "a string": ("text", "returned 'text', a str"),
    "a gradient": (torch.ones(()), r"returned a tensor of shape \(\)"),
    "an array": (np.ones(3), "returned a.*ndarray"),
}


@pytest.mark.parametrize(("entry", "text"), OTHERS.values(), ids=OTHERS)
def test_something_else_in_place_of_a_number_is_refused(entry, text):
    refused(
        r"None for 'parts\[1\]', which holds no floating tensor; it " + text,
        lambda parts: parts[0] * parts[1],
        lambda g: (g, entry),
        (noise(3), 3),
    )


def test_none_for_a_part_of_a_nested_argument_stops_that_part():
    a, b, scale = noise(3), noise(3), noise(3)
    backward_of(nested, lambda g: ({"a": None, "b": [g * 3]}, None), {"a": a, "b": [b]}, scale)
    assert a.grad is None or not a.grad.any()
    assert b.grad[0].item() == 3.0


# --- dtype ---


FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("given", FLOATS, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_floating_gradient_is_cast_to_the_dtype_of_its_argument(dtype, given):
    x = torch.ones(3, dtype=dtype, requires_grad=True)
    backward_of(one, lambda g: torch.full((3,), 7.5, dtype=given), x)
    exactly(x.grad, torch.full((3,), 7.5, dtype=dtype))


@pytest.mark.parametrize("given", [torch.complex64, torch.complex128, torch.float64], ids=str)
def test_complex_argument_takes_a_gradient_of_any_floating_kind(given):
    x = torch.ones(3, dtype=torch.complex64, requires_grad=True)
    backward_of(lambda x: x * 2, lambda g: torch.full((3,), 7.0, dtype=given), x)
    exactly(x.grad, torch.full((3,), 7.0, dtype=torch.complex64))


# --- wrong kinds of one gradient, on every form of answer ---


WRONG = {
    "shape": (
        lambda g: g.sum(),
        r"shape \(3,\) for '{}', the shape of '{}' itself; .* a tensor of shape \(\)",
    ),
    "shape that torch would sum": (lambda g: g.expand(2, 3), r"shape \(3,\) for '{}'.* a tensor of shape \(2, 3\)"),
    "shape that torch would expand": (lambda g: g[:1], r"shape \(3,\) for '{}'.* a tensor of shape \(1,\)"),
    "device": (lambda g: g.to("meta"), r"on cpu for '{}', where '{}' is; it returned one on meta"),
    "integer": (lambda g: g.long(), r"floating gradient for '{}', which is torch.float64; it returned torch.int64"),
    "boolean": (lambda g: g > 0, r"floating gradient for '{}', which is torch.float64; it returned torch.bool"),
    "complex": (lambda g: g * 1j, r"real gradient for '{}', which is torch.float64; it returned torch.complex128"),
    "number": (lambda g: 1.5, r"tensor of shape \(3,\) as the gradient of '{}'; it returned 1.5, a float"),
    "integer number": (lambda g: 0, r"tensor of shape \(3,\) as the gradient of '{}'; it returned 0, an int"),
    "string": (lambda g: "text", r"tensor of shape \(3,\) as the gradient of '{}'; it returned 'text', a str"),
    "array": (lambda g: g.numpy(), r"tensor of shape \(3,\) as the gradient of '{}'; it returned .*ndarray"),
}
wrong = pytest.mark.parametrize(("bad", "text"), WRONG.values(), ids=WRONG)


@wrong
def test_wrong_gradient_of_the_only_argument_is_refused(bad, text):
    refused(text.replace("{}", "x"), one, bad, noise(3))


@wrong
def test_wrong_gradient_of_the_second_argument_is_refused(bad, text):
    refused(text.replace("{}", "b"), two, lambda g: (g, bad(g)), noise(3), noise(3))


@wrong
def test_wrong_gradient_in_a_dict_is_refused(bad, text):
    refused(text.replace("{}", "b"), two, lambda g: {"b": bad(g)}, noise(3), noise(3))


@wrong
def test_wrong_gradient_of_one_of_variadic_arguments_is_refused(bad, text):
    refused(text.replace("{}", r"rest\[1\]"), variadic, lambda g: (g, g, bad(g)), noise(3), noise(3), noise(3))


@wrong
def test_wrong_gradient_of_a_variadic_keyword_is_refused(bad, text):
    refused(text.replace("{}", "b"), keywords, lambda g: {"b": bad(g)}, noise(3), b=noise(3))


@wrong
def test_wrong_gradient_of_a_part_of_a_nested_argument_is_refused(bad, text):
    def answer(g):
        return {"a": g, "b": [bad(g)]}, g

    path = re.escape("pair['b'][0]")
    refused(text.replace("{}", path), nested, answer, {"a": noise(3), "b": [noise(3)]}, noise(3))


@wrong
def test_wrong_gradient_of_a_parameter_is_refused(bad, text):
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(noise(3))

        @go.custom_backward(lambda grad_output, weight: {"x": grad_output, "weight": bad(grad_output)})
        def forward(self, x):
            return x * self.weight

    out = Layer()(noise(3))
    with pytest.raises(go.RuleResultError, match=text.replace("{}", "weight")):
        out.backward(torch.ones_like(out))


REMEDIES = {
    "shape": (lambda g: g.sum(), "Reduce or expand it"),
    "device": (lambda g: g.to("meta"), r"Move it with \.to\('cpu'\)$"),
    "complex": (lambda g: g * 1j, r"Take its \.real part$"),
}


@pytest.mark.parametrize(("bad", "remedy"), REMEDIES.values(), ids=REMEDIES)
def test_error_says_how_to_put_it_right(bad, remedy):
    refused(remedy, one, bad, noise(3))


# --- wrong count ---


COUNTS = {
    "too many for one": (one, lambda g: (g, g), 1, r"at most 1 gradients, one for each argument \(x\); it returned 2"),
    "too many for two": (two, lambda g: (g, g, g), 2, r"at most 2 gradients.* \(a, b\); it returned 3"),
    "too many with None": (two, lambda g: (g, g, None), 2, r"at most 2 gradients.* \(a, b\); it returned 3"),
    "too few": (two, lambda g: (g,), 2, r"one gradient for each argument \(a, b\); it returned 1, and 'b' holds"),
    "none at all": (two, lambda g: (), 2, r"one gradient for each argument \(a, b\); it returned 0, and 'a' holds"),
    "bare for two": (
        two,
        lambda g: g,
        2,
        r"one gradient for each argument \(a, b\).*returned a tensor of shape \(3,\)",
    ),
    "too few for variadic": (variadic, lambda g: (g, g), 3, r"returned 2, and 'rest\[1\]' holds a tensor"),
    "dict too few for variadic": (variadic, lambda g: {"rest": (g,)}, 3, r"tuple of 2 gradients for '\*rest'"),
    "dict bare for variadic": (variadic, lambda g: {"rest": g}, 3, r"tuple of 2 gradients for '\*rest'.* a tensor"),
}


@pytest.mark.parametrize(("forward", "answer", "count", "text"), COUNTS.values(), ids=COUNTS)
def test_wrong_count_is_refused(forward, answer, count, text):
    refused(text, forward, answer, *[noise(3) for _ in range(count)])


def test_none_alone_for_several_arguments_is_refused():
    refused(r"one gradient for each argument \(a, b\).*it returned None", two, lambda g: None, noise(3), noise(3))


# --- wrong structure ---


STRUCTURES = {
    "bare": lambda g: (g, g),
    "tuple for a dict": lambda g: ((g, [g]), g),
    "missing key": lambda g: ({"a": g}, g),
    "unknown key": lambda g: ({"a": g, "b": [g], "c": g}, g),
    "list too short": lambda g: ({"a": g, "b": []}, g),
    "list too long": lambda g: ({"a": g, "b": [g, g]}, g),
    "bare for a list": lambda g: ({"a": g, "b": g}, g),
}


@pytest.mark.parametrize("answer", STRUCTURES.values(), ids=STRUCTURES)
def test_wrong_structure_of_a_nested_argument_is_refused(answer):
    text = r"mirrors the structure of 'pair(\['b'\])?', (\{a: \*, b: \[\*\]\}|\[\*\]); it returned (a|an) "
    refused(text, nested, answer, {"a": noise(3), "b": [noise(3)]}, noise(3))


def test_container_for_a_tensor_is_refused():
    refused(
        r"shape \(3,\) as the gradient of 'a'; it returned a tuple of 2", two, lambda g: ((g, g), g), noise(3), noise(3)
    )


NO_TENSOR = {"string": "text", "number": 3, "None": None, "integer tensor": torch.tensor([1, 2, 3])}


@pytest.mark.parametrize("value", NO_TENSOR.values(), ids=NO_TENSOR)
@pytest.mark.parametrize("form", ["tuple", "dict"])
def test_gradient_for_what_is_no_floating_tensor_is_refused(value, form):
    def answer(g):
        return (g, g) if form == "tuple" else {"x": g, "other": g}

    text = r"None for 'other', which holds no floating tensor; it returned a tensor of shape \(3,\)"
    refused(text, lambda x, other: x * 2, answer, noise(3), value)


# --- dict keys ---


KEYS = {
    "close to an argument": ({"aa": None}, r"\(a, b\); it has 'aa'\. Did you mean 'a'\?"),
    "close to nothing": ({"zzzz": None}, r"\(a, b\); it has 'zzzz'\. Leave it out$"),
    "of another kind": ({0: None}, r"\(a, b\); it has 0\."),
    "reserved": ({"input": None}, r"\(a, b\); it has 'input'\."),
}


@pytest.mark.parametrize(("answer", "text"), KEYS.values(), ids=KEYS)
def test_unknown_key_is_refused(answer, text):
    refused(text, two, answer, noise(3), noise(3))


def test_unknown_key_is_refused_beside_known_ones():
    refused("it has 'c'", two, lambda g: {"a": g, "b": g, "c": g}, noise(3), noise(3))


# --- parameters ---


class Layer(nn.Module):
    """A layer with two parameters; its rule is given."""

    def __init__(self, rule):
        super().__init__()
        self.weight = nn.Parameter(float64(3.0))
        self.bias = nn.Parameter(float64(5.0))
        self.rule = rule

    def forward(self, x):
        return go.custom_backward(self.rule)(Layer.affine)(self, x)

    def affine(self, x):
        return x * self.weight + self.bias

    def grads(self):
        return [None if p.grad is None else p.grad.item() for p in (self.weight, self.bias)]


PARAMETERS = {
    "not asked for": (lambda grad_output: grad_output * 7, [2.0, 1.0]),
    "not asked for but answered": (lambda grad_output: {"x": grad_output * 7, "weight": grad_output * 9}, [9.0, 1.0]),
    "asked for": (lambda grad_output, weight: {"x": grad_output * 7, "weight": grad_output * 9}, [9.0, 1.0]),
    "stopped": (lambda grad_output, weight: {"x": grad_output * 7, "weight": None}, [None, 1.0]),
    "all asked for": (
        lambda grad_output, params: {"x": grad_output * 7, **dict.fromkeys(params, grad_output * 9)},
        [9.0, 9.0],
    ),
    "autograd's own": (
        lambda grad_output, weight, vjp: {"x": grad_output * 7, "weight": vjp.by_name(grad_output)["weight"] * 10},
        [20.0, 1.0],
    ),
    "all by vjp": (lambda grad_output, vjp: {**vjp.by_name(grad_output), "x": grad_output * 7}, [2.0, 1.0]),
}


@pytest.mark.parametrize(("rule", "expected"), PARAMETERS.values(), ids=PARAMETERS)
def test_parameters_get_the_rules_answer_or_autograds_own(rule, expected):
    layer, x = Layer(rule), float64(2.0)
    layer(x).backward()
    assert x.grad.item() == 7.0
    assert [grad or None for grad in layer.grads()] == expected


MISSING = {
    "bare": lambda grad_output, weight: grad_output,
    "dict": lambda grad_output, weight: {"x": grad_output},
    "params": lambda grad_output, params: {"x": grad_output, "bias": grad_output},
}


@pytest.mark.parametrize("rule", MISSING.values(), ids=MISSING)
def test_parameter_that_was_asked_for_and_left_out_is_refused_with_the_ways_out(rule):
    text = r"'weight' and must answer.*None stops the gradient.*module\.weight.*vjp\.by_name\(grad_output\)\['weight'\]"
    with pytest.raises(go.RuleResultError, match=text):
        Layer(rule)(float64(2.0)).backward()


def test_frozen_parameter_that_was_asked_for_may_be_left_out():
    layer, x = Layer(lambda grad_output, weight: grad_output * weight), float64(2.0)
    layer.weight.requires_grad_(False)
    layer(x).backward()
    assert x.grad.item() == 3.0
    assert layer.grads() == [None, 1.0]


def test_frozen_parameter_may_be_answered_for():
    layer, x = Layer(lambda grad_output: {"x": grad_output, "weight": grad_output}), float64(2.0)
    layer.weight.requires_grad_(False)
    layer(x).backward()
    assert layer.grads() == [None, 1.0]


def test_unknown_parameter_in_a_dict_is_refused_with_those_that_exist():
    with pytest.raises(go.RuleResultError, match=r"\(x, weight, bias\); it has 'weigth'\. Did you mean 'weight'\?"):
        Layer(lambda grad_output: {"x": grad_output, "weigth": grad_output})(float64(2.0)).backward()


# --- what vjp takes and gives ---


def test_vjp_gives_a_tensor_for_one_tensor_argument():
    x = noise(3)
    seen = []
    rule = lambda grad_output, vjp: (seen.append(vjp(grad_output)), seen[0])[1]  # noqa: E731
    go.custom_backward(rule)(lambda name, x: x.sin())("text", x).sum().backward()
    closely(seen[0], x.detach().cos())


def test_vjp_gives_a_tuple_in_signature_order_for_several():
    a, b = noise(3), noise(3)
    seen = []
    rule = lambda grad_output, vjp: (seen.append(vjp(grad_output)), seen[0])[1]  # noqa: E731
    go.custom_backward(rule)(lambda a, name, b: a * b)(a, "text", b).sum().backward()
    assert type(seen[0]) is tuple
    assert seen[0][1] is None
    closely((seen[0][0], seen[0][2]), (b.detach(), a.detach()))


def test_vjp_by_name_gives_a_dict():
    a, b = noise(3), noise(3)
    seen = []
    rule = lambda grad_output, vjp: (seen.append(vjp.by_name(grad_output)), seen[0])[1]  # noqa: E731
    go.custom_backward(rule)(two)(a, b).sum().backward()
    assert list(seen[0]) == ["a", "b"]
    closely((a.grad, b.grad), (b.detach(), a.detach()))


def test_vjp_may_be_called_several_times_with_other_gradients():
    x = noise(3)
    rule = lambda grad_output, vjp: vjp(grad_output) + vjp(grad_output * 10) + vjp(grad_output)  # noqa: E731
    go.custom_backward(rule)(torch.sin)(x).sum().backward()
    closely(x.grad, x.detach().cos() * 12)


BAD_GRADIENTS = {
    "shape": lambda g: g.sum(),
    "container": lambda g: (g, g),
    "number": lambda g: 1.0,
    "None": lambda g: None,
}


@pytest.mark.parametrize("bad", BAD_GRADIENTS.values(), ids=BAD_GRADIENTS)
def test_vjp_of_a_wrong_gradient_is_refused(bad):
    out = go.custom_backward(lambda grad_output, vjp: vjp(bad(grad_output)))(torch.sin)(noise(3))
    with pytest.raises(go.RuleResultError, match=rf"vjp.* rule '<lambda>' {HERE} of 'sin'"):
        out.sum().backward()


# --- *args beside keywords ---


def with_keyword(a, *more, k):
    return a * more[0] * more[1] * k


BY_NAME = {
    "a tuple": lambda g: {"k": 7 * g, "more": (3 * g, 5 * g), "a": 2 * g},
    "each": lambda g: {"a": 2 * g, "more[0]": 3 * g, "more[1]": 5 * g, "k": 7 * g},
}


@pytest.mark.parametrize("rule", BY_NAME.values(), ids=BY_NAME)
def test_dict_answers_for_varargs_before_keywords_whatever_its_order(rule):
    a, b, c, k = (noise(3) for _ in range(4))
    grads = torch.autograd.grad(go.custom_backward(rule)(with_keyword)(a, b, c, k=k).sum(), (a, b, c, k))
    closely(grads, tuple(factor * torch.ones(3, dtype=torch.float64) for factor in (2.0, 3.0, 5.0, 7.0)))


def test_varargs_that_a_dict_leaves_out_get_no_gradient():
    a, b, c, k = (noise(3) for _ in range(4))
    go.custom_backward(lambda g: {"more[1]": g})(with_keyword)(a, b, c, k=k).sum().backward()
    assert (a.grad, b.grad, k.grad) == (None, None, None)
    closely(c.grad, torch.ones(3, dtype=torch.float64))
