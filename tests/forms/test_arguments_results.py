"""Any arguments, any results. Contract, section 2."""

import collections
import dataclasses
import functools
import sys
import types
import typing
import weakref

import numpy as np
import pytest
import torch
from oracles import closely, exactly, float64, noise
from torch import nn

import gradoverride as go
from forms import elsewhere
from gradoverride._core.calls import asking
from gradoverride._core.python.bytecode import codes_in

# Arguments


@go.custom_backward(lambda grad_output, a, b: (grad_output * b * 2, grad_output * a * 3))
def product(a, b=None, *, shift=0.0):
    return a * (1.0 if b is None else b) + shift


WAYS_TO_PASS = {
    "positional": lambda a, b: product(a, b),
    "keyword": lambda a, b: product(a=a, b=b),
    "mixed": lambda a, b: product(a, b=b),
    "keywords in the other order": lambda a, b: product(b=b, a=a),
    "keyword-only option": lambda a, b: product(a, b, shift=1.5),
}


@pytest.mark.parametrize("passing", WAYS_TO_PASS)
def test_gradients_reach_arguments_however_they_are_passed(passing):
    a, b = float64(2.0), float64(5.0)
    WAYS_TO_PASS[passing](a, b).backward()
    assert (a.grad.item(), b.grad.item()) == (10.0, 6.0)


def as_it_was_called(function):
    """A decorator that looks at how it is called, as those of transformers do."""

    @functools.wraps(function)
    def call(*args, **kwargs):
        seen.append((len(args), sorted(kwargs)))
        kwargs.setdefault("bias", torch.full((), 10.0, dtype=torch.float64))
        return function(*args, **kwargs)

    seen: list[tuple[int, list[str]]] = []
    call.seen = seen
    return call


def weighted(x, w=2.0, *rest, bias=0.0, **more):
    return x * w + bias + sum(rest) + sum(more.values())


class Weighted(torch.nn.Module):
    @as_it_was_called
    def forward(self, x, w=2.0, *rest, bias=0.0, **more):
        return weighted(x, w, *rest, bias=bias, **more)


WAYS_TO_CALL = [
    (lambda f, a, b: f(a, b), 10.0, (2, [])),
    (lambda f, a, b: f(a, w=b), 10.0, (1, ["w"])),
    (lambda f, a, b: f(w=b, x=a), 10.0, (0, ["w", "x"])),
    (lambda f, a, b: f(a, b, 7.0, more=1.0), 18.0, (3, ["more"])),
    (lambda f, a, b: f(a, b, bias=3.0), 3.0, (2, ["bias"])),
]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("call", "added", "seen"), WAYS_TO_CALL)
def test_forward_whose_decorator_looks_at_how_it_is_called_is_called_so(call, added, seen, compiled):
    def rule(grad_output, x, w):
        return {"x": 3 * grad_output * w, "w": 5 * grad_output * x}

    bare = as_it_was_called(weighted)
    function = go.custom_backward(rule)(bare)
    if compiled:
        torch.compiler.reset()
        function = torch.compile(function, backend="aot_eager", fullgraph=True)
    a, b = float64(2.0), float64(5.0)
    result = call(function, a, b)
    result.backward()
    assert (result.item(), a.grad.item(), b.grad.item()) == (10.0 + added, 15.0, 10.0)
    assert compiled or bare.seen == [seen]
    with torch.no_grad():
        assert call(function, a, b).item() == 10.0 + added


@pytest.mark.parametrize(("call", "added", "seen"), WAYS_TO_CALL)
def test_method_whose_decorator_looks_at_how_it_is_called_is_called_so(call, added, seen):
    module, (a, b) = Weighted(), (float64(2.0), float64(5.0))
    Weighted.forward.seen.clear()
    with go.override(module, {module: lambda grad_output, vjp: {"x": 2 * vjp.by_name(grad_output)["x"]}}):
        result = call(module, a, b)
    result.backward()
    assert (result.item(), a.grad.item(), b.grad) == (10.0 + added, 10.0, None)
    receiver = 1
    assert Weighted.forward.seen == [(seen[0] + receiver, seen[1])]


def test_argument_that_is_not_given_has_its_default_for_the_rule():
    def rule(grad_output, w):
        return grad_output * 100 * w

    x = float64(3.0)
    go.custom_backward(rule)(as_it_was_called(weighted))(x).backward()
    assert x.grad.item() == 200.0


def test_call_with_arguments_that_do_not_fit_is_a_type_error():
    function = go.custom_backward(lambda grad_output: grad_output)(as_it_was_called(lambda x, w: x * w))
    with pytest.raises(TypeError, match="missing a required argument: 'w'"):
        function(float64(1.0))


def test_default_values_apply():
    @go.custom_backward(lambda grad_output, power: 10 * power * grad_output)
    def raised(x, power=3):
        return x**power

    x = float64(2.0)
    y = raised(x)
    y.backward()
    assert (y.item(), x.grad.item()) == (8.0, 30.0)


def test_default_values_that_are_numbers_all_of_them():
    @go.custom_backward(lambda grad_output, power: 10 * power * grad_output)
    def raised(x=2.0, power=3):
        return x**power

    x = float64(2.0)
    raised(x).backward()
    assert (raised(), raised(3.0), x.grad.item()) == (8.0, 27.0, 30.0)


def test_default_value_that_is_a_tensor_may_be_asked_for():
    weight = float64(3.0, grad=False)

    @go.custom_backward(lambda grad_output, weight: {"x": 10 * weight * grad_output})
    def scaled(x, weight=weight):
        return x * weight

    x = float64(2.0)
    scaled(x).backward()
    assert x.grad.item() == 30.0


def test_keyword_only_tensor_has_its_gradient():
    @go.custom_backward(lambda grad_output, x, weight: (2 * grad_output * weight, 3 * grad_output * x))
    def scaled(x, *, weight):
        return x * weight

    x, weight = float64(2.0), float64(5.0)
    scaled(x, weight=weight).backward()
    assert (x.grad.item(), weight.grad.item()) == (10.0, 6.0)


def test_positional_only_argument_has_its_gradient():
    @go.custom_backward(lambda grad_output, x: grad_output * 10 * x)
    def double(x, /):
        return 2 * x

    x = float64(3.0)
    double(x).backward()
    assert x.grad.item() == 30.0


def test_each_of_the_variable_arguments_counts_as_one():
    @go.custom_backward(lambda grad_output: (grad_output, 2 * grad_output, 3 * grad_output))
    def total(first, *rest):
        return first + sum(rest)

    xs = [float64(1.0) for _ in range(3)]
    total(*xs).backward()
    assert [x.grad.item() for x in xs] == [1.0, 2.0, 3.0]


FACTOR = 3.0


CALLED_LIKE_BUILTINS = {
    "arithmetic": (lambda type, isinstance: type * isinstance, 1.0),
    "a global number": (lambda type, isinstance: type * isinstance * FACTOR, 3.0),
    "what its code does not show": (lambda type, isinstance: (lambda *both: both[0] * both[1])(type, isinstance), 1.0),
}


@pytest.mark.parametrize(
    "rule",
    [
        lambda grad_output, type, isinstance: (grad_output * isinstance, grad_output * type),
        lambda grad_output, vjp: vjp(grad_output),
    ],
    ids=["values", "vjp"],
)
@pytest.mark.parametrize("kind", CALLED_LIKE_BUILTINS)
def test_arguments_may_be_called_like_builtins(kind, rule):
    forward, factor = CALLED_LIKE_BUILTINS[kind]
    scale = go.custom_backward(rule)(forward)
    a, b = float64(2.0), float64(5.0)
    scale(a, b).backward()
    scale(type=a, isinstance=b).backward()
    own = factor if rule.__code__.co_varnames[1] == "vjp" else 1.0
    assert (a.grad.item(), b.grad.item()) == (10.0 * own, 4.0 * own)


def test_variable_keywords_are_answered_by_name():
    @go.custom_backward(lambda grad_output: {"x": grad_output, "b": 3 * grad_output, "a": 2 * grad_output})
    def total(x, **terms):
        return x + sum(terms.values())

    x, a, b = (float64(1.0) for _ in range(3))
    total(x, a=a, b=b).backward()
    assert [t.grad.item() for t in (x, a, b)] == [1.0, 2.0, 3.0]


def test_nested_containers_are_mirrored_by_the_gradient():
    @go.custom_backward(lambda grad_output: [grad_output * 2, (grad_output * 3, None), {"unused": None}])
    def combine(tree):
        first, (second, _), _ = tree
        return first + second

    a, b = float64(1.0), float64(1.0)
    combine([a, (b, 7), {"unused": "text"}]).backward()
    assert (a.grad.item(), b.grad.item()) == (2.0, 3.0)


def test_true_rule_over_nested_containers_passes_gradcheck():
    def backward(grad_output, tree):
        # a dict is always by argument name, so one that mirrors an argument stands under that name
        return {"tree": {"a": grad_output * tree["bs"][0], "bs": [grad_output * tree["a"]]}}

    @go.custom_backward(backward)
    def combine(tree):
        return tree["a"] * tree["bs"][0]

    inputs = noise(3), noise(3)
    assert torch.autograd.gradcheck(lambda a, b: combine({"a": a, "bs": [b]}), inputs)
    assert torch.autograd.gradgradcheck(lambda a, b: combine({"a": a, "bs": [b]}), inputs)


def test_forward_may_write_into_a_list_that_it_was_passed():
    @go.custom_backward(lambda grad_output: 7 * grad_output)
    def logged(x, log):
        log.append("called")
        return 2 * x

    log = []
    logged(float64(1.0), log)
    assert log == ["called"]


def grows(xs):
    xs.append(xs[0])
    return xs[0][0] * 3


def has_a_tuple_now(xs):
    xs[0] = tuple(xs[0])
    return xs[0][0] * 3


def is_in_order_now(xs):
    xs.sort(key=len, reverse=True)
    return xs[0][0] * 3


def has_a_name_now(xs):
    xs.name = "new"
    return xs.left * 3


@pytest.mark.parametrize(
    ("forward", "xs"),
    [
        (grows, lambda: [[float64(1.0)], []]),
        (has_a_tuple_now, lambda: [[float64(1.0)], []]),
        (is_in_order_now, lambda: [[float64(1.0)], [float64(1.0), float64(2.0)]]),
        (has_a_name_now, lambda: Record(float64(1.0), float64(2.0))),
    ],
    ids=["appended", "item", "sorted", "attribute"],
)
def test_forward_that_changes_a_container_of_tensors_that_want_a_gradient_is_refused(forward, xs):
    with pytest.raises(
        go.ForwardResultError, match=rf"{forward.__name__}.*'xs'.*Return what is new instead, or detach"
    ):
        go.custom_backward(lambda grad_output: [[7 * grad_output]])(forward)(xs())


def keeps_a_state(x, state):
    state["v"] = state["v"] * 0.5 + x.detach()
    return x * state["v"]


def keeps_a_state_in_place(x, state):
    state["v"].mul_(0.5).add_(x.detach())
    return x * state["v"]


def takes_out_the_name(x, batch):
    name = batch.pop("name", "none")
    return x * batch["mask"] * len(name)


def counts_in_a_record(x, record):
    record.right += 1
    return x * record.left * record.right


def appends_to_a_cache(x, cache):
    cache.append(x.detach())
    return x * sum(cache)


STATES = {
    keeps_a_state: lambda t: {"v": t, "more": [t + 1]},
    keeps_a_state_in_place: lambda t: {"v": t.clone()},
    takes_out_the_name: lambda t: {"name": "image", "mask": t},
    counts_in_a_record: lambda t: Record(t, 5),
    appends_to_a_cache: lambda t: [t],
}


@pytest.mark.parametrize("compiling", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("rule", [lambda g: {"x": 7 * g}, lambda g, vjp: {"x": 7 * vjp.by_name(g)["x"]}])
@pytest.mark.parametrize("forward", STATES, ids=lambda forward: forward.__name__)
def test_container_of_tensors_without_a_gradient_may_be_changed_by_the_forward(forward, rule, compiling):
    decorated = go.custom_backward(rule)(forward)
    if compiling:
        torch.compiler.reset()
        decorated = torch.compile(decorated, backend="aot_eager", fullgraph=True)
    factor = noise(3, grad=False)
    ours, bare = STATES[forward](factor), STATES[forward](factor)
    kept = ours
    for _ in range(2):
        a = noise(3)
        b = a.detach().clone().requires_grad_()
        result, expected = decorated(a, ours), forward(b, bare)
        result.sum().backward()
        expected.sum().backward()
        closely(result, expected)
        closely(a.grad, 7 * b.grad if "vjp" in rule.__code__.co_varnames else torch.full_like(b, 7.0))
        assert ours is kept
        assert str(ours) == str(bare)


@pytest.mark.parametrize("rule", [lambda g, state: {"x": 7 * g}, lambda g, input: {"state": None}])
@pytest.mark.parametrize("forward", [keeps_a_state, keeps_a_state_in_place])
def test_rule_that_asks_for_a_container_which_the_forward_changes_is_an_error(forward, rule):
    asked = rule.__code__.co_varnames[1]
    changes = forward if asked == "state" else lambda state, x: forward(x, state)
    given = (noise(3), {"v": noise(3, grad=False)})
    message = (
        rf"test_arguments_results.py:\d+\) overwrites its argument 'state' .*asks for '{asked}'.*save_for_backward"
    )
    with pytest.raises(go.ForwardResultError, match=message):
        go.custom_backward(rule)(changes)(*(given if asked == "state" else reversed(given)))


def test_compiled_forward_that_returns_what_it_wrote_into_within_a_container_has_eager_gradients_or_is_refused():
    def doubles(x, state):
        state["v"].mul_(2.0)
        return x * state["v"], state["v"]

    decorated = go.custom_backward(lambda g, vjp: {"x": vjp.by_name(g)["x"]})(doubles)
    torch.compiler.reset()
    with pytest.raises(Exception, match=r"(?s)doubles.*within its argument 'state'.*Pass that tensor as an argument"):
        torch.compile(decorated, backend="aot_eager", fullgraph=True)(noise(3), {"v": noise(3, grad=False)})


@pytest.mark.parametrize("build", [lambda t: Record(t, 5), lambda t: Pair(t, 5)], ids=["dataclass", "namedtuple"])
def test_record_as_an_argument_is_mirrored_by_the_gradient(build):
    @go.custom_backward(lambda grad_output, record: type(record)(7 * grad_output, None))
    def left_times_right(record):
        return record.left * record.right

    x = float64(1.0)
    y = left_times_right(build(x))
    y.backward()
    assert (y.item(), x.grad.item()) == (5.0, 7.0)


@pytest.mark.parametrize(
    "hide", [lambda t: {t}, lambda t: iter([t]), lambda t: collections.deque([t])], ids=["set", "iterator", "deque"]
)
def test_tensor_in_something_that_is_not_looked_into_is_an_error(hide):
    @go.custom_backward(lambda grad_output: {"x": 7 * grad_output})
    def product(x, others):
        return x * next(iter(others))

    with pytest.raises(go.CapturedTensorError, match="product"):
        product(float64(1.0), hide(noise(1)))


@pytest.mark.parametrize(
    "extra",
    [None, "text", 3, 2.5, np.arange(3.0), object(), torch.float32, slice(None), torch.Size([2]), torch.tensor([1, 2])],
    ids=["None", "string", "int", "float", "array", "object", "dtype", "slice", "shape", "integer tensor"],
)
def test_argument_without_a_gradient_passes_through_untouched(extra):
    seen = []

    @go.custom_backward(lambda grad_output, extra: (seen.append(extra), 7 * grad_output)[1])
    def double(x, extra):
        seen.append(extra)
        return 2 * x

    x = float64(1.0)
    double(x, extra).backward()
    assert x.grad.item() == 7.0
    assert type(seen[0]) is type(seen[1]) is type(extra)
    assert torch.equal(seen[1], extra) if isinstance(extra, torch.Tensor) else seen[1] is extra


Factors = collections.namedtuple("Factors", "first second")
NUMBERS = {
    "numbers": (2, 3.0),
    "others beside": (2, 3.0, None, "same", True),
    "none": (),
    "nested": (2, 3.0, (1, 1)),
    "of a kind of their own": Factors(2, 3.0),
}


def times_all(x, factors):
    for factor in factors:
        x = x * factor if isinstance(factor, int | float) else x
    return x


@pytest.mark.parametrize("asks", ["the gradient", "the tuple", "vjp", "needs"])
@pytest.mark.parametrize("passing", ["by position", "by keyword", "by default"])
@pytest.mark.parametrize("given", NUMBERS.values(), ids=NUMBERS)
def test_tuple_of_numbers_is_no_argument_with_a_gradient(given, passing, asks):
    seen = []
    rules = {
        "the gradient": lambda grad_output: 5 * grad_output,
        "the tuple": lambda grad_output, factors: (seen.append(factors), 5 * grad_output)[1],
        "vjp": lambda grad_output, vjp: 5 * vjp(grad_output),
        "needs": lambda grad_output, needs: (seen.append(needs), {"x": 5 * grad_output})[1],
    }

    @go.custom_backward(rules[asks])
    def forward(x, factors=given):
        return times_all(x, factors)

    x = float64(1.0, 2.0)
    calls = {
        "by position": lambda: forward(x, given),
        "by keyword": lambda: forward(x, factors=given),
        "by default": lambda: forward(x),
    }
    for _ in range(2):
        result = calls[passing]()
        exactly(result.detach(), times_all(x.detach(), given))
        expected = 5 * torch.ones_like(x)
        exactly(torch.autograd.grad(result.sum(), x)[0], times_all(expected, given) if asks == "vjp" else expected)
    assert seen == {"the tuple": [given, given], "needs": 2 * [{"x": True, "factors": False}]}.get(asks, [])
    assert all(type(one) in (type(given), dict) for one in seen)


def test_tuple_that_holds_a_tensor_with_a_gradient_at_a_later_call_has_its_gradient():
    @go.custom_backward(lambda grad_output, factors: {"x": grad_output, "factors": (7 * grad_output, None)})
    def forward(x, factors):
        return x * factors[0]

    x, factor = float64(1.0, 2.0), float64(3.0, 4.0)
    with pytest.raises(go.RuleResultError, match="'factors'"):
        forward(x, (2.0, 1)).sum().backward()
    forward(x, (factor, 1)).sum().backward()
    exactly(factor.grad, torch.full_like(x, 7))


@pytest.mark.parametrize("compiling", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("ask", [lambda g, vjp: vjp(g), lambda g, vjp: vjp.by_name(g)], ids=["vjp", "by name"])
def test_shape_among_the_arguments_has_no_gradient(ask, compiling):
    @go.custom_backward(ask)
    def scaled(x, weight, shape):
        return (x * weight).view(shape)

    x, weight = float64(1.0, 2.0), float64(5.0, 7.0, grad=False)
    run = torch.compile(scaled, backend="aot_eager", fullgraph=True) if compiling else scaled
    run(x, weight, torch.Size([2, 1])).sum().backward()
    exactly(x.grad, weight)


def test_integer_index_is_not_counted_among_the_arguments_with_gradients():
    @go.custom_backward(lambda grad_output, table, index: torch.zeros_like(table).index_add(0, index, grad_output))
    def lookup(index, table):
        return table[index]

    index = torch.tensor([2, 0, 2])
    assert torch.autograd.gradcheck(lambda table: lookup(index, table), (noise(4, 2),))


def test_argument_that_requires_no_grad_stays_without():
    a, b = float64(2.0), float64(5.0, grad=False)
    product(a, b).backward()
    assert a.grad.item() == 10.0
    assert b.grad is None


def test_same_tensor_twice_gets_the_sum_of_both_gradients():
    a = float64(3.0)
    product(a, a).backward()
    assert a.grad.item() == 2 * 3.0 + 3 * 3.0


def test_two_views_of_one_tensor_each_have_their_gradient():
    a = float64(2.0, 5.0)
    product(a[:1], a[1:]).backward()
    exactly(a.grad, float64(10.0, 6.0, grad=False))


def test_non_leaf_and_non_contiguous_arguments_have_their_gradient():
    x, grad_output = noise(3, 4), noise(4, 3, grad=False)
    product((5 * x).T, torch.ones(4, 3, dtype=torch.float64)).backward(grad_output)
    exactly(x.grad, 5 * 2 * grad_output.T)


# Results


class Pair(typing.NamedTuple):
    left: torch.Tensor
    right: torch.Tensor


@dataclasses.dataclass
class Record:
    left: torch.Tensor
    right: torch.Tensor
    name: str | None = None


@dataclasses.dataclass(frozen=True)
class FrozenRecord:
    left: torch.Tensor
    right: torch.Tensor


class Sorted(Pair):
    """A namedtuple whose constructor takes something else than its parts."""

    def __new__(cls, parts):
        return super().__new__(cls, *parts)


class Several(tuple):
    """A tuple that is made of its parts one by one."""

    def __new__(cls, *parts):
        return super().__new__(cls, parts)


@dataclasses.dataclass(slots=True)
class SlotsRecord:
    left: torch.Tensor
    right: torch.Tensor


@dataclasses.dataclass(frozen=True, slots=True)
class FrozenSlotsRecord:
    left: torch.Tensor
    right: torch.Tensor


@dataclasses.dataclass
class Derived:
    """A field that no constructor takes, and an attribute that is no field."""

    left: torch.Tensor
    scale: dataclasses.InitVar[float]
    right: torch.Tensor = dataclasses.field(init=False)

    def __post_init__(self, scale):
        self.right = self.left * scale
        self.note = "derived"


class Labelled(list):
    """A list whose constructor takes more than its items."""

    def __init__(self, items, label):
        super().__init__(items)
        self.label = label


class Attributes(dict):
    """A dict whose items are its attributes."""

    def __init__(self, **items):
        super().__init__(**items)
        self.__dict__ = self


class Both(dict):
    """A dict that keeps each item as an attribute too, and can take none before it is set up."""

    def __init__(self, **items):
        super().__init__()
        self.order = []
        for key, value in items.items():
            self[key] = value

    def __setitem__(self, key, value):
        super().__setitem__(key, value)
        object.__setattr__(self, key, value)
        self.order = [*self.order, key]


def model_output(left, right):
    transformers = pytest.importorskip("transformers")
    return transformers.modeling_outputs.BaseModelOutput(last_hidden_state=left, hidden_states=(right,))


RESULTS = {
    "tuple": (lambda a, b: (a, b), lambda r: r[0], lambda r: r[1]),
    "list": (lambda a, b: [a, b], lambda r: r[0], lambda r: r[1]),
    "namedtuple": (Pair, lambda r: r.left, lambda r: r.right),
    "namedtuple with a constructor": (lambda a, b: Sorted((a, b)), lambda r: r.left, lambda r: r.right),
    "tuple with a constructor": (Several, lambda r: r[0], lambda r: r[1]),
    "named result of torch": (lambda a, b: torch.return_types.aminmax((a, b)), lambda r: r.min, lambda r: r.max),
    "with a shape": (lambda a, b: (a, a.shape, b), lambda r: r[0], lambda r: r[2]),
    "dict": (lambda a, b: {"left": a, "right": b}, lambda r: r["left"], lambda r: r["right"]),
    "OrderedDict": (
        lambda a, b: collections.OrderedDict(left=a, right=b),
        lambda r: r["left"],
        lambda r: r["right"],
    ),
    "dataclass": (lambda a, b: Record(a, b, "set"), lambda r: r.left, lambda r: r.right),
    "frozen dataclass": (FrozenRecord, lambda r: r.left, lambda r: r.right),
    "dataclass with slots": (SlotsRecord, lambda r: r.left, lambda r: r.right),
    "frozen dataclass with slots": (FrozenSlotsRecord, lambda r: r.left, lambda r: r.right),
    "list with a constructor": (lambda a, b: Labelled([a, b], "text"), lambda r: r[0], lambda r: r[1]),
    "defaultdict": (
        lambda a, b: collections.defaultdict(list, left=a, right=b),
        lambda r: r["left"],
        lambda r: r["right"],
    ),
    "dict of attributes": (lambda a, b: Attributes(left=a, right=b), lambda r: r.left, lambda r: r["right"]),
    "dict and attributes": (lambda a, b: Both(left=a, right=b), lambda r: r.left, lambda r: r["right"]),
    "nested": (lambda a, b: {"x": [a, ({"y": b},)]}, lambda r: r["x"][0], lambda r: r["x"][1][0]["y"]),
    "with non-tensors": (lambda a, b: (None, a, "text", {"n": 3, "b": b}), lambda r: r[1], lambda r: r[3]["b"]),
    "ModelOutput": (model_output, lambda r: r.last_hidden_state, lambda r: r.hidden_states[0]),
}


@pytest.fixture(params=RESULTS)
def structure(request):
    return RESULTS[request.param]


def test_result_keeps_its_type_and_the_rule_gets_its_structure(structure):
    build, left, right = structure
    types = []

    def backward(grad_output):
        types.append(type(grad_output))
        return left(grad_output) + 10 * right(grad_output)

    @go.custom_backward(backward)
    def split(x):
        return build(2 * x, 3 * x)

    x = float64(1.0, 2.0)
    result = split(x)
    types.append(type(result))
    exactly(left(result).detach(), 2 * x.detach())
    exactly(right(result).detach(), 3 * x.detach())
    (left(result).sum() + 5 * right(result).sum()).backward()
    exactly(x.grad, float64(51.0, 51.0, grad=False))
    assert types == [type(build(x, x))] * 2


def test_part_without_a_gradient_reaches_the_rule_as_zeros(structure):
    build, left, right = structure
    parts = []

    @go.custom_backward(lambda grad_output: (parts.append(grad_output), left(grad_output))[1])
    def split(x):
        return build(2 * x, 3 * x)

    left(split(float64(1.0, 2.0))).sum().backward()
    exactly(right(parts[0]), float64(0.0, 0.0, grad=False))


def test_structured_result_with_vjp_has_autograds_gradient(structure):
    build, left, right = structure

    @go.custom_backward(lambda grad_output, vjp: vjp(grad_output))
    def split(x):
        return build(x**2, x**3)

    x = noise(3)
    result = split(x)
    grad_x = torch.autograd.grad((left(result) * right(result)).sum(), x)[0]
    closely(grad_x, 5 * x.detach() ** 4)


def test_shape_beside_a_tensor_is_none_for_the_rule():
    parts = []

    @go.custom_backward(lambda grad_output: (parts.append(grad_output), 7 * grad_output[0])[1])
    def with_shape(x):
        return 2 * x, x.shape

    x = float64(1.0, 3.0)
    y, shape = with_shape(x)
    y.sum().backward()
    exactly(x.grad, float64(7.0, 7.0, grad=False))
    assert type(shape) is torch.Size
    assert parts[0][1] is None


def test_non_tensors_of_the_result_round_trip():
    marker = object()

    @go.custom_backward(lambda grad_output: grad_output[0])
    def annotated(x):
        return 2 * x, None, "text", 7, marker, [1, 2]

    result = annotated(float64(1.0))
    assert result[1:] == (None, "text", 7, marker, [1, 2])


def test_dataclass_keeps_its_plain_fields():
    @go.custom_backward(lambda grad_output: grad_output.left)
    def record(x):
        return Record(2 * x, 3 * x, name="given")

    assert record(float64(1.0)).name == "given"


def with_attribute(value):
    value.note = "derived"
    return value


NOTED = {
    "dataclass": lambda x: Derived(x, 3.0),
    "list": lambda x: with_attribute(Labelled([x], "text")),
    "tuple": lambda x: with_attribute(Several(x)),
    "dict": lambda x: with_attribute(Both(left=x)),
}


@pytest.mark.parametrize("compiling", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("build", NOTED.values(), ids=NOTED)
def test_attribute_that_is_no_part_round_trips(build, compiling):
    @go.custom_backward(lambda grad_output, vjp: vjp(grad_output))
    def built(x):
        return build(2 * x)

    x = float64(1.0)
    result = (torch.compile(built, backend="aot_eager", fullgraph=True) if compiling else built)(x)
    assert result.note == "derived"
    assert type(result) is type(build(x))


class Defaults(collections.defaultdict):
    """One of the user's own, with an attribute."""

    note = ""


@pytest.mark.parametrize("kind", [collections.defaultdict, Defaults])
def test_default_of_a_dict_round_trips(kind):
    def doubled(x):
        made = kind(list, y=2 * x)
        if kind is Defaults:
            made.note = "set"
        return made

    result = go.custom_backward(lambda grad_output: grad_output["y"])(doubled)(float64(1.0))
    assert type(result) is kind
    assert getattr(result, "note", "set") == "set"
    assert result["missing"] == []


@pytest.mark.parametrize("compiling", [False, True], ids=["eager", "compiled"])
def test_container_of_a_type_of_its_own_as_an_argument_has_autograds_gradient_by_vjp(structure, compiling):
    build, left, right = structure

    @go.custom_backward(lambda grad_output, vjp: vjp(grad_output))
    def product(pair):
        return left(pair) * right(pair) ** 2

    run = torch.compile(product, backend="aot_eager", fullgraph=True) if compiling else product
    a, b = noise(3), noise(3)
    if compiling and isinstance(build(a, b), Attributes):
        pytest.skip("Dynamo does not know that the items of such a dict are its attributes")
    run(build(a, b)).sum().backward()
    closely((a.grad, b.grad), (b.detach() ** 2, 2 * a.detach() * b.detach()))


def causal_output(**parts):
    return pytest.importorskip("transformers").modeling_outputs.CausalLMOutput(**parts)


@pytest.mark.parametrize("compiling", [False, True], ids=["eager", "compiled"])
def test_model_output_with_a_part_that_is_no_tensor_has_autograds_gradient_by_vjp(compiling):
    make = pytest.importorskip("transformers").modeling_outputs.CausalLMOutput

    @go.custom_backward(lambda grad_output, vjp: vjp(grad_output))
    def read(given):
        return given.logits * 3

    @go.custom_backward(lambda grad_output, vjp: vjp(make(logits=7 * grad_output.logits)))
    def written(x):
        return make(loss=1.0, logits=x * 2)

    def tripled(x):
        return written(read(make(loss=1, logits=x)))

    x = noise(3)
    result = (torch.compile(tripled, backend="aot_eager", fullgraph=True) if compiling else tripled)(x)
    assert result.loss == 1.0
    result.logits.sum().backward()
    closely(x.grad, torch.full((3,), 7 * 2 * 3.0, dtype=torch.float64))


def test_gradient_of_a_model_output_may_leave_out_a_part_but_name_no_other():
    def read(given):
        return given.logits * 3

    x = noise(3)
    given = causal_output(loss=noise(1), logits=x)
    go.custom_backward(lambda g: {"given": causal_output(logits=7 * g)})(read)(given).sum().backward()
    closely(x.grad, torch.full((3,), 7.0, dtype=torch.float64))
    assert given.loss.grad is None
    wrong = go.custom_backward(lambda g: {"given": causal_output(logits=g, attentions=g)})(read)
    with pytest.raises(go.RuleResultError, match=r"mirrors the structure of 'given'.*a CausalLMOutput with the keys"):
        wrong(given).sum().backward()


def test_model_output_keeps_its_access_by_name_index_and_key():
    @go.custom_backward(lambda grad_output: 7 * grad_output.last_hidden_state)
    def encode(x):
        return model_output(2 * x, 3 * x)

    x = float64(1.0)
    output = encode(x)
    assert output.attentions is None
    assert list(output.keys()) == ["last_hidden_state", "hidden_states"]
    assert output[0] is output["last_hidden_state"] is output.last_hidden_state
    output[0].backward()
    assert x.grad.item() == 7.0


@pytest.mark.parametrize("make", [torch.argmax, lambda x: x > 0], ids=["integer", "boolean"])
def test_integer_and_boolean_parts_are_not_differentiable(make):
    @go.custom_backward(lambda grad_output: 7 * grad_output[0])
    def with_index(x):
        return 2 * x, make(x)

    x = float64(1.0, 3.0)
    y, index = with_index(x)
    assert not index.requires_grad
    exactly(index, make(x.detach()))
    y.sum().backward()
    exactly(x.grad, float64(7.0, 7.0, grad=False))


def test_none_among_the_results_stays_none():
    @go.custom_backward(lambda grad_output: 7 * grad_output[0])
    def with_none(x):
        return 2 * x, None

    x = float64(1.0)
    y, nothing = with_none(x)
    y.backward()
    assert nothing is None
    assert x.grad.item() == 7.0


@pytest.mark.parametrize(
    "result", [None, "text", 3.0, {"a": [None]}, ()], ids=["None", "text", "float", "nested None", "empty"]
)
def test_forward_without_a_tensor_is_an_error_that_names_it(result):
    @go.custom_backward(lambda grad_output: grad_output)
    def forgetful(x):
        return result

    with pytest.raises(go.ForwardResultError, match=r"forgetful.*test_arguments_results\.py:\d+"):
        forgetful(float64(1.0))


def in_a_namespace(x):
    return [x * 2, 7, types.SimpleNamespace(hidden=[x * 3])]


def test_tensor_in_an_object_beside_the_result_is_warned_of_once():
    form = go.custom_backward(lambda grad_output: grad_output[0] * 5)(in_a_namespace)
    x = noise(3)
    with pytest.warns(
        go.GradOverrideWarning, match=r"returns 'result\[2\].hidden\[0\]' within an object .*no gradient goes"
    ):
        first = form(x)
    for y, _, rest in (first, form(x)):
        exactly(torch.autograd.grad(y.sum(), x), (torch.full_like(x, 5),))
        assert not rest.hidden[0].requires_grad


def test_tensor_in_an_object_beside_the_result_is_an_error_under_vjp_where_a_gradient_comes_back():
    form = go.custom_backward(lambda grad_output, vjp: vjp(grad_output))(in_a_namespace)
    y, _, rest = form(noise(3))
    with pytest.raises(go.UnsupportedError, match="must return each tensor that a gradient is to come back from"):
        (y.sum() + rest.hidden[0].sum()).backward()


def test_object_that_was_given_is_not_warned_of_where_it_is_returned():
    form = go.custom_backward(lambda grad_output: grad_output[0])(lambda x, cache: (x * 2, cache))
    cache = types.SimpleNamespace(keys=torch.ones(3))
    assert form(noise(3), cache)[1] is cache


def test_tensor_returned_twice_has_a_gradient_for_each_place():
    @go.custom_backward(lambda grad_output: 2 * grad_output[0] + 3 * grad_output[1])
    def twice(x):
        y = x * 1
        return y, y

    x = float64(1.0)
    first, second = twice(x)
    (10 * first + 100 * second).backward()
    assert x.grad.item() == 2 * 10 + 3 * 100


def test_second_result_that_is_a_view_of_the_first_keeps_its_value():
    @go.custom_backward(lambda grad_output: grad_output[0].index_add(0, torch.tensor([0]), 3 * grad_output[1]))
    def with_view(x):
        y = x * 2
        return y, y[:1]

    x = float64(1.0, 2.0)
    whole, head = with_view(x)
    exactly(head.detach(), float64(2.0, grad=False))
    (whole.sum() + 10 * head.sum()).backward()
    exactly(x.grad, float64(31.0, 1.0, grad=False))


# Results that are inputs, views or parameters


def test_result_that_is_the_input_has_the_gradient_of_the_rule():
    @go.custom_backward(lambda grad_output: 7 * grad_output)
    def same(x):
        return x

    x = float64(1.0)
    y = same(x)
    y.backward()
    assert x.is_leaf
    assert x.grad.item() == 7.0


def test_result_that_is_one_of_two_inputs_has_the_gradient_of_the_rule():
    @go.custom_backward(lambda grad_output: (7 * grad_output[0] + grad_output[1], 5 * grad_output[1]))
    def mixed(x, y):
        return x, x + y

    x, y = float64(1.0), float64(2.0)
    first, second = mixed(x, y)
    (first + 10 * second).backward()
    assert (x.grad.item(), y.grad.item()) == (17.0, 50.0)


@pytest.mark.parametrize(
    "view", [lambda x: x[1:], lambda x: x.view(2, 2), lambda x: x.expand(3, 4)], ids=["slice", "view", "expand"]
)
def test_result_that_is_a_view_of_the_input_has_the_gradient_of_the_rule(view):
    @go.custom_backward(lambda grad_output, vjp: 7 * vjp(grad_output))
    def viewed(x):
        return view(x)

    x, twin = noise(4), noise(4)
    viewed(x).sum().backward()
    view(twin).sum().backward()
    exactly(x.grad, 7 * twin.grad)


def _in_inference_mode(x):
    with torch.inference_mode():
        return torch.floor(x)


class _FloorInInferenceMode(nn.Module):
    @go.custom_backward(lambda grad_output: 5 * grad_output)
    def forward(self, x):
        return _in_inference_mode(x)


with torch.inference_mode():
    TABLE = torch.arange(8, dtype=torch.float64).view(2, 4)

MADE_IN_INFERENCE_MODE = {
    "function": (go.custom_backward(lambda grad_output: 5 * grad_output)(_in_inference_mode), 5),
    "output": (
        go.custom_backward(lambda grad_output, output: 2 * grad_output * output)(lambda x: TABLE[1]),
        TABLE[1] * 2,
    ),
    "vjp": (go.custom_backward(lambda grad_output, vjp: vjp(grad_output) + 5)(_in_inference_mode), 5),
    "straight through": (go.straight_through(_in_inference_mode), 1),
    "module": (_FloorInInferenceMode(), 5),
    "decorated": (go.custom_backward(lambda grad_output: 5 * grad_output)(torch.inference_mode()(torch.floor)), 5),
}


@pytest.mark.parametrize("kind", MADE_IN_INFERENCE_MODE)
def test_result_made_in_inference_mode_has_the_gradient_of_the_rule(kind):
    form, slope = MADE_IN_INFERENCE_MODE[kind]
    x = noise(4)
    y = form(x)
    exactly(y.detach(), TABLE[1].clone() if kind == "output" else torch.floor(x.detach()))
    (y.sum() + x.sum()).backward()
    exactly(x.grad, torch.ones(4, dtype=torch.float64) * slope + 1)


def test_captured_inference_tensor_is_not_changed_by_being_a_result():
    result = MADE_IN_INFERENCE_MODE["output"][0](noise(4))
    assert result.requires_grad
    assert TABLE.is_inference()
    assert not TABLE.requires_grad


def test_result_that_was_an_input_may_be_written_afterwards():
    @go.custom_backward(lambda grad_output: 7 * grad_output)
    def same(x):
        return x

    x = float64(1.0)
    y = same(x * 1)
    (y + 0).mul_(3).backward()
    assert x.grad.item() == 21.0


# Forwards that write


def doubling_in_place(rule):
    @go.custom_backward(rule)
    def double_(x):
        return x.mul_(2)

    return double_


def test_in_place_forward_changes_the_tensor_and_takes_the_rule():
    x = float64(1.0, 3.0)
    y = x * 1
    result = doubling_in_place(lambda grad_output: 7 * grad_output)(y)
    exactly(y.detach(), float64(2.0, 6.0, grad=False))
    exactly(result.detach(), y.detach())
    result.sum().backward()
    exactly(x.grad, float64(7.0, 7.0, grad=False))


def test_in_place_forward_rules_the_argument_that_it_wrote_too():
    x = float64(1.0)
    y = x * 1
    doubling_in_place(lambda grad_output: 7 * grad_output)(y)
    y.sum().backward()
    assert x.grad.item() == 7.0


def test_in_place_forward_on_a_view_reaches_the_base():
    x = float64(1.0, 2.0)
    base = x * 1
    doubling_in_place(lambda grad_output: 7 * grad_output)(base[:1])
    exactly(base.detach(), float64(2.0, 2.0, grad=False))
    base.sum().backward()
    exactly(x.grad, float64(7.0, 1.0, grad=False))


def test_in_place_forward_that_needs_its_old_value_elsewhere_fails_as_in_torch():
    x = float64(3.0)
    y = x * 1
    square = y * y
    doubling_in_place(lambda grad_output: grad_output)(y)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.backward()


def test_in_place_forward_on_a_leaf_is_refused_as_in_torch():
    with pytest.raises(RuntimeError, match="leaf"):
        doubling_in_place(lambda grad_output: grad_output)(float64(1.0))


def test_in_place_forward_with_vjp_has_autograds_gradient():
    x = float64(1.0, 3.0)
    doubling_in_place(lambda grad_output, vjp: 10 * vjp(grad_output))(x * 1).sum().backward()
    exactly(x.grad, float64(20.0, 20.0, grad=False))


TURNED_IN_PLACE = {
    "t_": lambda x: x.t_(),
    "transpose_": lambda x: x.transpose_(0, 1),
    "unsqueeze_": lambda x: x.unsqueeze_(0),
    "doubled and turned": lambda x: x.mul_(2).t_(),
}


class TurningItself(nn.Module):
    def forward(self, x):
        return x.t_()


@pytest.mark.parametrize("asks", ["grad_output", "vjp"])
@pytest.mark.parametrize("forward", TURNED_IN_PLACE.values(), ids=TURNED_IN_PLACE)
@pytest.mark.parametrize("shape", [(2, 2), (2, 3)], ids=str)
def test_in_place_forward_that_changes_shape_or_strides_is_right_as_in_autograd(forward, shape, asks):
    """The argument is turned as well, and its gradient is of the shape that it had."""
    x = noise(*shape)
    twin = x.detach().clone().requires_grad_()
    given, expected = x * 1, twin * 1
    forward(expected)
    weight = noise(*expected.shape, grad=False)

    def by_hand(grad_output):
        slope = 2 if forward is TURNED_IN_PLACE["doubled and turned"] else 1
        return slope * (grad_output[0] if forward is TURNED_IN_PLACE["unsqueeze_"] else grad_output.t())

    rules = {"grad_output": by_hand, "vjp": lambda grad_output, vjp: vjp(grad_output)}
    result = go.custom_backward(rules[asks])(forward)(given)
    assert result is given
    exactly(result.detach(), expected.detach())
    ((result * weight).sum() + (given**2).sum()).backward()
    ((expected * weight).sum() + (expected**2).sum()).backward()
    closely(x.grad, twin.grad)


def turned_by_statement(x):
    x.squeeze_()
    return x


@pytest.mark.parametrize("where", ["a view", "compiled", "a transform"])
@pytest.mark.parametrize("asks", ["grad_output", "vjp"])
@pytest.mark.parametrize("turn", [lambda x: x.unsqueeze_(0), turned_by_statement, lambda x: x.t_()])
def test_in_place_forward_that_changes_the_shape_is_refused_where_the_argument_cannot_be_changed_so(turn, asks, where):
    rules = {"grad_output": lambda grad_output: grad_output, "vjp": lambda grad_output, vjp: vjp(grad_output)}
    turned = go.custom_backward(rules[asks])(turn)
    x = noise(2, 1)
    runs = {
        "a view": lambda: turned((x * 1)[:]),
        "compiled": lambda: torch.compile(lambda x: turned(x * 1), backend="eager")(x),
        "a transform": lambda: torch.func.grad(lambda x: turned(x * 1).sum())(x.detach()),
    }
    with pytest.raises(
        (go.ForwardResultError, RuntimeError), match=r"must leave the shape and the strides of .*'x'.*Return a view"
    ):
        runs[where]()


def test_module_that_turns_its_argument_in_place_is_right():
    x = noise(2, 3)
    given, layer = x * 1, TurningItself()
    with go.override(layer, {TurningItself: lambda grad_output: 3 * grad_output.t()}):
        result = layer(given)
    assert result.shape == given.shape == (3, 2)
    result.sum().backward()
    exactly(x.grad, torch.full_like(x, 3))


def test_in_place_forward_that_leaves_the_shape_as_it_was_has_autograds_gradient():
    @go.custom_backward(lambda grad_output, vjp: 10 * vjp(grad_output))
    def back_and_forth(x):
        return x.t_().mul_(2).t_()

    x, weight = noise(2, 2), noise(2, 2, grad=False)
    result = back_and_forth(x * 1)
    (result * weight).sum().backward()
    exactly(result, 2 * x)
    exactly(x.grad, 20 * weight)


def test_in_place_forward_may_ask_for_its_output():
    x = noise(3)

    @go.custom_backward(lambda grad_output, output: 7 * grad_output * output)
    def exp_(x):
        return x.exp_()

    exp_(x * 1).sum().backward()
    closely(x.grad, 7 * x.detach().exp())


def test_rule_that_asks_for_an_overwritten_argument_is_an_error():
    double_ = doubling_in_place(lambda grad_output, x: grad_output * x)
    with pytest.raises(go.GradOverrideError, match=r"(?s)double_.*\bx\b.*in place"):
        double_(float64(1.0) * 1).backward()


class Writer:
    """A call of its method shows in the code of a forward, what the method does does not."""

    def write_into(self, tensor):
        return tensor.fill_(9)


WRITER = Writer()


@go.custom_backward(lambda grad_output, y: (grad_output * y, None))
def overwrites_a_factor(x, y):
    result = x * y
    y.mul_(100)
    return result


@go.custom_backward(lambda grad_output, y: (grad_output * y, None))
def overwrites_a_factor_elsewhere(x, y):
    result = x * y
    WRITER.write_into(y)
    return result


@go.custom_backward(lambda grad_output, y, vjp: {"x": vjp(grad_output)[0]})
def overwrites_a_factor_and_keeps_its_graph(x, y):
    result = x * 2
    y.add_(1)
    return result


@go.custom_backward(lambda grad_output, y: {"x": grad_output * y[0]})
def overwrites_a_factor_in_a_tuple(x, *y):
    result = x * y[0]
    y[0].mul_(100)
    return result


@go.custom_backward(lambda grad_output, y: {"x": grad_output * y["factor"]})
def overwrites_a_named_factor(x, **y):
    result = x * y["factor"]
    y["factor"].mul_(100)
    return result


OVERWRITING = {
    "in sight": overwrites_a_factor,
    "out of sight": overwrites_a_factor_elsewhere,
    "vjp": overwrites_a_factor_and_keeps_its_graph,
    "args": overwrites_a_factor_in_a_tuple,
    "kwargs": lambda x, factor: overwrites_a_named_factor(x, factor=factor),
}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.int64])
@pytest.mark.parametrize("kind", OVERWRITING)
def test_rule_that_asks_for_an_overwritten_argument_without_a_gradient_is_an_error(kind, dtype, compiled):
    forward = OVERWRITING[kind]
    if compiled:
        forward = torch.compile(forward, backend="aot_eager")
    message = r"(?s)overwrites_a_\w*factor\w*' \(.*test_arguments_results\.py:\d+\) (over)?writes.*its argument '\w"
    with pytest.raises(Exception, match=message):
        forward(noise(3), torch.ones(3, dtype=dtype))


def test_argument_without_a_gradient_may_be_written_into_where_the_rule_does_not_ask_for_it():
    @go.custom_backward(lambda grad_output, x: {"x": 7 * grad_output * x})
    def count(x, calls, total):
        calls.add_(1)
        total.add_(x.detach())
        return x * 2

    calls, total, x = torch.zeros((), dtype=torch.int64), float64(0.0, grad=False), float64(3.0)
    for _ in range(2):
        count(x, calls, total).backward()
    assert (calls.item(), total.item(), x.grad.item()) == (2, 6.0, 42.0)


class AddInto(torch.autograd.Function):
    @staticmethod
    def forward(ctx, total, x):
        ctx.mark_dirty(total)
        return total.add_(x)

    @staticmethod
    def backward(ctx, grad):
        return grad, 5 * grad


@pytest.mark.parametrize("rule", [lambda grad: (grad, 5 * grad), lambda grad, vjp: (grad, 5 * vjp(grad)[1])])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_argument_without_a_gradient_that_is_written_into_and_returned_has_one_then_as_by_hand(rule, compiled):
    ours = go.custom_backward(rule)(lambda total, x: total.add_(x))
    found = []
    for add_into in (ours, AddInto.apply):
        if compiled and add_into is ours:
            add_into = torch.compile(add_into, backend="aot_eager", fullgraph=True)
        total, x, factor = float64(1.0, 2.0, grad=False), float64(3.0, 4.0), float64(5.0, 6.0)
        assert add_into(total, x) is total
        assert total.requires_grad
        (total * factor).sum().backward()
        found.append((total.detach(), x.grad, factor.grad))
    exactly(*found)


def test_tensor_of_inference_mode_may_be_an_argument_of_a_forward_that_writes():
    with torch.inference_mode():
        y = torch.full((3,), 2.0, dtype=torch.float64)

    @go.custom_backward(lambda grad_output: (7 * grad_output, None))
    def scaled(x, y):
        result = torch.empty_like(x)
        result[:] = x * y
        return result

    x = noise(3)
    scaled(x, y).sum().backward()
    exactly(x.grad, torch.full((3,), 7.0, dtype=torch.float64))


def test_forward_that_writes_into_an_argument_and_does_not_return_it_is_refused():
    @go.custom_backward(lambda grad_output: 7 * grad_output)
    def write_and_read(x):
        x.mul_(2)
        return x + 1

    with pytest.raises(go.ForwardResultError, match=r"(?s)write_and_read.*'x' in place.*[Rr]eturn 'x'"):
        write_and_read(float64(1.0) * 1)


def test_in_place_forward_on_a_buffer_that_needs_no_gradient():
    count = torch.zeros(())

    @go.custom_backward(lambda grad_output: 7 * grad_output)
    def counted(x):
        count.add_(1)
        return 2 * x

    x = float64(1.0)
    counted(x).backward()
    counted(x).backward()
    assert (count.item(), x.grad.item()) == (2.0, 14.0)


def test_tensor_saved_for_the_rule_and_changed_afterwards_is_an_error():
    x = float64(1.0)
    y = x * 1
    result = product(y, float64(2.0))
    y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.backward()


def by_position(x, /, **options):
    return x * options["x"]


def by_star(*x, **options):
    return x[0] * options["x"]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("function", [by_position, by_star])
def test_keyword_that_is_named_as_a_parameter_without_one_is_refused(function, compiled):
    forward = go.custom_backward(lambda grad_output, x: {"x": grad_output})(function)
    run = torch.compile(forward, backend="eager", fullgraph=True) if compiled else forward
    kinds = (go.UnsupportedError, RuntimeError) if compiled else go.UnsupportedError  # torch's, without a private name
    with pytest.raises(kinds, match=rf"'{function.__name__}' .* given another 'x' by keyword\. Rename"):
        run(float64(1.0), x=float64(2.0))
    with torch.no_grad():
        assert forward(float64(1.0), x=float64(2.0)).item() == 2.0


# What a forward sees of its arguments


def doubled_if_a_gradient_is_wanted(x):
    return sum([x, x]) if x.requires_grad else x * 5


def by_weight_if_it_is_trained(self, x):
    return sum([x * self.weight, x]) if self.weight.requires_grad else x * 7


class Trained(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.full((2,), 4.0, dtype=torch.float64))

    forward = by_weight_if_it_is_trained


COMPILED = {
    "eager": lambda function: function,
    "compiled": functools.partial(torch.compile, backend="aot_eager", fullgraph=True),
}


@pytest.mark.parametrize("run", COMPILED)
@pytest.mark.parametrize("leaf", [True, False], ids=["leaf", "computed"])
def test_forward_sees_whether_an_argument_requires_grad(run, leaf):
    forward = go.custom_backward(lambda grad_output: grad_output * 3)(doubled_if_a_gradient_is_wanted)
    called = COMPILED[run](lambda x: forward(x if leaf else x * 1))
    x = float64(1.0, 2.0)
    y = called(x)
    exactly(y.detach(), x.detach() * 2)
    (grad_x,) = torch.autograd.grad(y.sum(), x)
    exactly(grad_x, torch.full_like(x, 3))
    exactly(called(x.detach()), x.detach() * 5)


class ByMethods(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, dtype=torch.float64))

    def forward(self, x):
        return self.doubled(x)

    def doubled(self, x):
        return sum([x, x]) if x.requires_grad else x * 5


class ByMethodsOfABase(ByMethods):
    def forward(self, x):
        return super().forward(x)

    def doubled(self, x):
        return super().doubled(x)


class ByFunction(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class ByAFunctionElsewhere(nn.Module):
    def forward(self, x):
        return elsewhere.handed_on(x)


class ByAComputedName(ByMethods):
    def forward(self, x):
        return getattr(self, "dou" + "bled")(x)


def imports_it(x):
    from forms.elsewhere import handed_on

    return handed_on(x)


def imports_its_module(x):
    import forms.elsewhere as other

    return other.handed_on(x)


STEPS = [elsewhere.handed_on]
BY_NAME = {"only": elsewhere.handed_on}
doubling = elsewhere.Doubling()
ASKED_ELSEWHERE = {
    "a function": lambda: lambda x: elsewhere.doubled_if_a_gradient_is_wanted(x),
    "one that it calls": lambda: lambda x: elsewhere.handed_on(x),
    "one among others": lambda: lambda x: STEPS[0](x),
    "one of a dict": lambda: lambda x: BY_NAME["only"](x),
    "one that it imports": lambda: imports_it,
    "one of a module that it imports": lambda: imports_its_module,
    "one by a text": lambda: lambda x: getattr(elsewhere, "handed_on")(x),  # noqa: B009
    "a method by a computed name": ByAComputedName,
    "one that is defined below": lambda: lambda x: defined_below(x),  # noqa: F821
    "an object": lambda: lambda x: doubling(x),
    "a method": lambda: lambda x: doubling.doubled(x),
    "a bound method": lambda: doubling.doubled,
    "a partial": lambda: functools.partial(elsewhere.handed_on),
    "one with a rule": lambda: lambda x: ruled_elsewhere(x),
    "a method of the module": ByMethods,
    "a method of its base": ByMethodsOfABase,
    "a method of the base of a part": lambda: nn.Sequential(ByMethodsOfABase()),
    "from a method": ByAFunctionElsewhere,
    "a part": lambda: nn.Sequential(elsewhere.Part()),
    "a part of a part": lambda: ByFunction(nn.Sequential(nn.Identity(), elsewhere.Part())),
    "an attribute": lambda: ByFunction(elsewhere.handed_on),
}
ruled_elsewhere = go.custom_backward(lambda grad_output: grad_output)(elsewhere.handed_on)


@pytest.mark.parametrize("run", COMPILED)
@pytest.mark.parametrize("name", ASKED_ELSEWHERE)
def test_forward_sees_whether_an_argument_requires_grad_where_what_it_calls_asks(name, run):
    if (name, run) == ("an attribute", "compiled"):
        pytest.skip("Dynamo would guard the module by its identity")
    forward = ASKED_ELSEWHERE[name]()
    if isinstance(forward, nn.Module):
        go.override(forward, {forward: lambda grad_output: grad_output * 3})
    else:
        forward = go.custom_backward(lambda grad_output: grad_output * 3)(forward)
    globals()["defined_below"] = lambda x: elsewhere.handed_on(x)
    try:
        for x in (float64(1.0, 2.0), float64(3.0, 4.0)):
            y = COMPILED[run](forward)(x)
            exactly(y.detach(), x.detach() * 2)
            (grad_x,) = torch.autograd.grad(y.sum(), x)
            exactly(grad_x, torch.full_like(x, 3))
        exactly(forward(x.detach()), x.detach() * 5)
    finally:
        del globals()["defined_below"]


@pytest.mark.parametrize("run", COMPILED)
@pytest.mark.parametrize(
    "given", [lambda fn: fn, lambda fn: [fn], lambda fn: {"only": fn}], ids=["bare", "list", "dict"]
)
def test_function_among_the_arguments_sees_what_the_arguments_are(given, run):
    """Whether a tensor requires grad, and what it bears."""

    @go.custom_backward(lambda grad_output: {"x": grad_output * 3})
    def forward(x, function):
        if isinstance(function, list):
            return function[0](x)
        return function["only"](x) if isinstance(function, dict) else function(x)

    x = float64(1.0, 2.0)
    y = COMPILED[run](lambda x: forward(x, given(elsewhere.handed_on)))(x)
    exactly(y.detach(), x.detach() * 2)
    exactly(torch.autograd.grad(y.sum(), x)[0], torch.full_like(x, 3))
    if run == "eager":
        x.step = 4.0
        exactly(forward(x, given(lambda x: elsewhere.step_of(x) * x)).detach(), x.detach() * 4)


@pytest.mark.parametrize(
    "forward",
    [
        lambda x: elsewhere.with_mask(x),
        lambda x: {"only": elsewhere.with_mask}["only"](x),
        lambda x: getattr(elsewhere, "with_mask")(x),  # noqa: B009
        lambda x: __import__("forms.elsewhere", fromlist=["elsewhere"]).with_mask(x),
    ],
)
def test_what_a_function_elsewhere_hands_over_reaches_the_rule(forward):
    x = float64(1.0, 2.0)
    go.custom_backward(lambda grad_output, mask: grad_output * mask)(forward)(x).sum().backward()
    exactly(x.grad, float64(0.0, 1.0, grad=False))


class Lazy(dict):
    """What it holds is loaded when it is asked for all."""

    def values(self):
        raise AssertionError("all of it was loaded")


LAZY = Lazy(only=elsewhere.handed_on)


def test_dict_that_loads_what_it_has_is_not_made_to():
    @go.custom_backward(lambda grad_output: grad_output * 3)
    def forward(x):
        return LAZY["only"](x)

    x = float64(1.0, 2.0)
    exactly(forward(x).detach(), x.detach() * 2)


def test_forward_may_import_what_is_no_function_and_what_is_not_there():
    @go.custom_backward(lambda grad_output: grad_output * 3)
    def forward(x):
        from forms.elsewhere import NUMBERS

        if x.numel() > 100:
            import nowhere.at.all  # noqa: F401

            from .nowhere import at_all  # noqa: F401
        return x * float(NUMBERS[1])

    x = float64(1.0, 2.0)
    y = forward(x)
    exactly(y.detach(), x.detach() * 2)
    exactly(torch.autograd.grad(y.sum(), x)[0], torch.full_like(x, 3))


def test_forward_sees_whether_an_argument_requires_grad_where_a_function_beside_it_that_is_defined_below_asks():
    @go.custom_backward(lambda grad_output: grad_output * 3)
    def forward(x):
        return below(x)

    def below(x):
        return x * 2 if x.requires_grad else x * 5

    x = float64(1.0, 2.0)
    for _ in range(2):
        exactly(forward(x).detach(), x.detach() * 2)


def package():
    """As large as one: functions that name the next one each, and the last, which they call, and which asks."""
    step = "def step_{0}(x, n=0):\n    return last(x) if n == 0 else step_{1}(x)"
    steps = [step.format(index, index + 1) for index in range(1200)]
    last = "def last(x):\n    return sum([x, x]) if x.requires_grad else x * 5"
    written = types.ModuleType("package_of_functions")
    exec("\n".join([*steps, last]), vars(written))
    return written


@pytest.mark.parametrize("run", COMPILED)
def test_forward_that_leads_through_a_whole_package_is_not_looked_through_to_its_end(run, monkeypatch):
    looked_at = []
    monkeypatch.setattr(asking, "codes_in", lambda code: looked_at.append(code) or codes_in(code))
    written = package()
    monkeypatch.setitem(sys.modules, written.__name__, written)
    forward = go.custom_backward(lambda grad_output: grad_output * 3)(written.step_0)
    x = float64(1.0, 2.0)
    y = COMPILED[run](lambda x: forward(x))(x)
    assert 0 < len(looked_at) < 1000
    exactly(y.detach(), x.detach() * 2)
    exactly(torch.autograd.grad(y.sum(), x)[0], torch.full_like(x, 3))


@pytest.mark.parametrize("run", COMPILED)
@pytest.mark.parametrize(
    "rule",
    [
        lambda grad_output, weight: {"x": grad_output * 3, "weight": grad_output * 2},
        lambda grad_output: grad_output * 3,
    ],
    ids=["answers for the weight", "leaves it"],
)
def test_forward_sees_whether_a_parameter_requires_grad(run, rule):
    module, x = Trained(), float64(1.0, 2.0)
    with go.override(module, {module: rule}):
        y = COMPILED[run](module)(x)
        exactly(y.detach(), x.detach() * 5)
        grad_x, grad_weight = torch.autograd.grad(y.sum(), (x, module.weight))
        exactly(grad_x, torch.full_like(x, 3))
        exactly(grad_weight, torch.full_like(x, 2) if len(rule.__code__.co_varnames) > 1 else x.detach())
        module.weight.requires_grad_(False)
        exactly(COMPILED[run](module)(x).detach(), x.detach() * 7)


def test_residual_that_is_made_only_for_a_gradient_reaches_the_rule():
    @go.custom_backward(lambda grad_output, mask: grad_output * mask)
    def forward(x):
        mask = sum([x > 0, x > 1]) if x.requires_grad else None
        return go.save_for_backward(x.clamp(min=0), mask=mask)

    x = float64(-1.0, 0.5, 2.0)
    forward(x).sum().backward()
    exactly(x.grad, torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64))


def test_forward_that_asks_whether_a_gradient_is_wanted_keeps_nothing_for_it():
    kept = weakref.WeakSet()

    class Packed:
        def __init__(self, tensor):
            self.tensor = tensor.detach()
            kept.add(self)

    @go.custom_backward(lambda grad_output: grad_output)
    def forward(x):
        return sum([x.exp(), x]).sin() if x.requires_grad else x

    with torch.autograd.graph.saved_tensors_hooks(Packed, lambda packed: packed.tensor):
        y = forward(noise(4))
    assert not kept
    assert y.requires_grad


def test_forward_that_asks_whether_a_gradient_is_wanted_may_capture_no_tensor():
    weight = float64(2.0)

    @go.custom_backward(lambda grad_output: grad_output)
    def forward(x):
        return sum([x * weight, x]) if x.requires_grad else x

    with pytest.raises(go.CapturedTensorError, match=r"'forward' .* reached 'weight', which requires grad"):
        forward(float64(1.0))
