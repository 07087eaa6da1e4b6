"""Memory: what waits for the backward is what was asked for, and goes without the garbage collector."""

import gc
import weakref
from dataclasses import dataclass

import pytest
import torch
from oracles import exactly, noise
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import gradoverride as go

SIZE = 100
TENSOR = 8 * SIZE  # bytes of a float64 tensor of that size
MASK = SIZE  # bytes of a boolean one
NUMBER = 8  # bytes: what may stand for an argument that is no leaf, where the forward keeps a graph


class Storages(TorchDispatchMode):
    """Weak references to the storage of each tensor that an operation returns, those of `lasting` tensors apart."""

    def __init__(self, lasting=()):
        super().__init__()
        self.seen = {}
        self.lasting = {tensor.untyped_storage().data_ptr() for tensor in lasting}

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self.lasting:
                    reference = StorageWeakRef(storage)
                    self.seen[reference.cdata] = reference, storage.nbytes()
        return result

    def alive(self):
        return sum(size for reference, size in self.seen.values() if not reference.expired())


@pytest.fixture(autouse=True)
def no_collector():
    gc.disable()
    yield
    gc.enable()


def kept_by(function, *leaves):
    """The bytes that wait for the backward of a call on temporaries, its result aside if it is not asked for."""
    with Storages(lasting(function, *leaves)) as storages:
        graph = tree_graph(function(*(leaf + 0 for leaf in leaves)))
    kept = storages.alive()
    del graph
    assert storages.alive() == 0
    return kept


def lasting(function, *leaves):
    """The tensors that live on anyway: the leaves, and a module's own."""
    owned = function.state_dict().values() if isinstance(function, nn.Module) else ()
    return [*leaves, *owned]


def tree_graph(result):
    return [leaf.grad_fn for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]


def decorate(rule, forward):
    return go.custom_backward(rule)(forward)


def two(grad_output):
    return grad_output, grad_output


def product(a, b):
    return a.sin() * b.exp()


def product_of_more(a, b, *more):  # not of plain tensors alone: the general path
    return a.sin() * b.exp()


def handing(a, b):
    return go.save_for_backward(a.sin() * b.exp(), mask=a > 0, sine=a.sin())


EXACT = {
    "gradient alone": (two, product, 0),
    "first": (lambda g, a: (g, g), product, TENSOR),
    "second": (lambda g, b: (g, g), product, TENSOR),
    "both": (lambda g, a, b: (g, g), product, 2 * TENSOR),
    "output": (lambda g, output: (g, g), product, TENSOR),
    "input": (lambda g, input: (g, g), product, TENSOR),
    "input and its name": (lambda g, input, a: (g, g), product, TENSOR),
    "everything": (lambda g, a, b, output: (g, g), product, 3 * TENSOR),
    "needs": (lambda g, needs: (g, g), product, 0),
    "gradient alone, general path": (two, product_of_more, 0),
    "first, general path": (lambda g, a: (g, g), product_of_more, TENSOR),
    "both and output, general path": (lambda g, b, a, output: (g, g), product_of_more, 3 * TENSOR),
    "residual that is not asked for": (two, handing, 0),
    "mask": (lambda g, mask: (g, g), handing, MASK),
    "mask and sine": (lambda g, mask, sine: (g, g), handing, MASK + TENSOR),
    "mask and argument": (lambda g, mask, b: (g, g), handing, MASK + TENSOR),
}


@pytest.mark.parametrize("kind", EXACT)
def test_bytes_that_are_kept_are_those_of_what_the_rule_asks_for(kind):
    rule, forward, expected = EXACT[kind]
    assert kept_by(decorate(rule, forward), noise(SIZE), noise(SIZE)) == expected


def test_measure_sees_what_a_function_by_hand_keeps():
    class ByHand(torch.autograd.Function):
        @staticmethod
        def forward(ctx, a, b):
            ctx.save_for_backward(a)
            return a * b

        @staticmethod
        def backward(ctx, grad_output):
            return grad_output, grad_output * ctx.saved_tensors[0]

    assert kept_by(ByHand.apply, noise(SIZE), noise(SIZE)) == TENSOR


@pytest.mark.parametrize(
    "function",
    [go.straight_through(torch.sign), go.straight_through(torch.round), decorate(lambda g: 7 * g, torch.exp)],
    ids=["sign", "round", "builtin"],
)
def test_straight_through_and_builtins_keep_nothing(function):
    assert kept_by(function, noise(SIZE)) == 0


def test_surrogate_keeps_the_input_alone():
    assert kept_by(go.straight_through(torch.sign, surrogate=torch.tanh), noise(SIZE)) == TENSOR


def test_nested_argument_that_is_not_asked_for_is_not_kept():
    forward = decorate(lambda g: {"pair": [g, g]}, lambda pair: pair[0] * pair[1])
    assert kept_by(lambda a, b: forward([a, b]), noise(SIZE), noise(SIZE)) == 0


def test_nested_argument_that_is_asked_for_is_kept_whole():
    forward = decorate(lambda g, pair: {"pair": [g, g]}, lambda scale, pair: scale * pair[0] * pair[1])
    assert kept_by(lambda a, b, c: forward(a, [b, c]), noise(SIZE), noise(SIZE), noise(SIZE)) == 2 * TENSOR


def test_several_results_that_are_not_asked_for_are_not_kept():
    forward = decorate(lambda g: g["s"] + g["c"], lambda x: {"s": x.sin(), "c": x.cos()})
    assert kept_by(forward, noise(SIZE)) == 0


@dataclass
class Batch:
    """With an attribute besides its fields."""

    x: torch.Tensor

    def __post_init__(self):
        self.mask = torch.zeros(SIZE, dtype=torch.float64)


class Dict(dict):
    """With an attribute besides its items."""

    def __init__(self, **items):
        super().__init__(**items)
        self.mask = torch.zeros(SIZE, dtype=torch.float64)


ATTRIBUTES = {
    "dataclass argument": lambda x: decorate(lambda g: {"b": Batch(g)}, lambda b: b.x.sin())(Batch(x)),
    "dict argument": lambda x: decorate(lambda g: {"b": Dict(x=g)}, lambda b: b["x"].sin())(Dict(x=x)),
    "dataclass result": lambda x: decorate(lambda g: g.x, lambda x: Batch(x.sin()))(x).x,
    "dict result": lambda x: decorate(lambda g: g["x"], lambda x: Dict(x=x.sin()))(x)["x"],
}


@pytest.mark.parametrize("function", ATTRIBUTES.values(), ids=ATTRIBUTES)
def test_attributes_that_a_container_has_besides_its_parts_are_not_kept(function):
    assert kept_by(function, noise(SIZE)) == 0


def test_call_without_gradient_keeps_nothing():
    x = noise(SIZE)
    function = decorate(lambda g, x, output: g * x * output, lambda x: x.exp())
    with torch.no_grad(), Storages() as storages:
        y = function(x + 0)
    assert storages.alive() == TENSOR
    del y
    assert storages.alive() == 0


# --- modules ---


class Affine(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(noise(SIZE, grad=False))
        self.register_buffer("scale", noise(SIZE, grad=False))

    def forward(self, x):
        return self.scale * x


def method_of(rule, module=Affine):
    return type("Ruled", (module,), {"forward": go.custom_backward(rule)(module.forward)})()


class Product(Affine):
    def forward(self, x):
        return self.weight * x


def answer_weight(g, weight, x):
    return {"x": g * weight, "weight": g * x}


@pytest.mark.parametrize(
    ("rule", "module", "expected"),
    [
        (lambda g: g, Affine, 0),
        (lambda g, x: g * x, Affine, TENSOR),
        (lambda g, scale: g * scale, Affine, 0),
        (lambda g, module: g, Affine, 0),
        (lambda g, weight: {"x": g * weight, "weight": g}, Product, 0),
        (answer_weight, Product, TENSOR),
        (lambda g, params: {"x": g, "weight": g}, Product, 0),
        (lambda g: g, Product, TENSOR),
        (lambda g, vjp: vjp(g), Product, TENSOR),
        (lambda g, vjp, x: vjp(g), Product, TENSOR),
    ],
    ids=[
        "gradient alone",
        "input",
        "buffer",
        "module",
        "parameter",
        "parameter and input",
        "params",
        "parameter left to autograd",
        "vjp",
        "vjp and input",
    ],
)
def test_method_keeps_what_it_asks_for_beyond_the_modules_own_tensors(rule, module, expected):
    assert kept_by(method_of(rule, module), noise(SIZE)) in (expected, expected + NUMBER)


@go.custom_backward
class ByClass(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(noise(SIZE, grad=False))

    def forward(self, x):
        return (self.weight * x).sin()

    def backward(self, grad_output, x):
        self.weight.grad = grad_output * x
        return grad_output * self.weight


@go.custom_backward
class ByClassOfTheGradientAlone(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(noise(SIZE, grad=False))

    def forward(self, x):
        return (self.weight * x).sin()

    def backward(self, grad_output):
        self.weight.grad = grad_output
        return grad_output * self.weight


@pytest.mark.parametrize(("cls", "expected"), [(ByClass, TENSOR), (ByClassOfTheGradientAlone, 0)])
def test_class_form_keeps_what_its_backward_asks_for(cls, expected):
    assert kept_by(cls(), noise(SIZE)) == expected


# --- vjp keeps no more than plain autograd ---

PLAIN = {
    "sum": lambda a, b: a + b,
    "exp": lambda a, b: a.exp() + b,
    "product": product,
    "long chain": lambda a, b: ((a * b).tanh() * b).sigmoid().relu(),
    "dropout": lambda a, b: F.dropout(a * b, 0.5),
    "views": lambda a, b: (a.view(10, 10) @ b.view(10, 10)).t(),
    "softmax": lambda a, b: F.softmax(a, 0) * b,
    "temporary in place": lambda a, b: (a * b).mul_(2).relu_(),
}


@pytest.mark.parametrize("forward", PLAIN.values(), ids=PLAIN)
@pytest.mark.parametrize("rule", [lambda g, vjp: vjp(g), lambda g, vjp: vjp.by_name(g)], ids=["vjp", "by_name"])
def test_rule_with_vjp_keeps_what_plain_autograd_keeps(forward, rule):
    a, b = noise(SIZE), noise(SIZE)
    assert kept_by(decorate(rule, forward), a, b) <= kept_by(forward, a, b) + 2 * NUMBER


@pytest.mark.parametrize("rule", [lambda g, vjp: vjp(g), lambda g: g], ids=["vjp", "parameters left to autograd"])
def test_module_with_vjp_keeps_what_the_plain_module_keeps(rule):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(SIZE, 50).double(), nn.Linear(50, SIZE).double()

        def forward(self, x):
            return self.second(self.first(x).tanh()).tanh()

    x = noise(SIZE)
    assert kept_by(method_of(rule, Net), x) <= kept_by(Net(), x) + NUMBER


# --- it goes without the collector ---


@go.custom_backward(lambda g, x, output: g * x * output)
def asks_for_all(x):
    return x.sin()


@go.custom_backward(lambda g, kept, x: g * kept)
def hands_over(x):
    return go.save_for_backward(x.sin(), kept=x.cos())


def inner_and_outer():
    inner = decorate(lambda g, x: g * x, lambda x: x.sin())
    return decorate(lambda g, vjp, x: vjp(g) * x, lambda x: inner(x) * x)


FORMS = {
    "gradient alone": lambda: decorate(lambda g: 2 * g, torch.sin),
    "argument and output": lambda: asks_for_all,
    "residual": lambda: hands_over,
    "vjp": lambda: decorate(lambda g, vjp: vjp(g), lambda x: x.sin().exp()),
    "by_name": lambda: decorate(lambda g, vjp: vjp.by_name(g), lambda x: x.sin().exp()),
    "vjp twice": lambda: decorate(lambda g, vjp: vjp(g) + vjp(2 * g), lambda x: x.sin().exp()),
    "vjp, residual and output": lambda: decorate(
        lambda g, vjp, kept, output: vjp(g) * kept * output,
        lambda x: go.save_for_backward(x.sin().exp(), kept=x.cos()),
    ),
    "nested": inner_and_outer,
    "forward": lambda: decorate(lambda g, forward, x: g * forward(x), lambda x: x.sin()),
    "dict result": lambda: decorate(lambda g, output: g["y"] * output["y"], lambda x: {"y": x.sin(), "z": "text"}),
    "straight_through": lambda: go.straight_through(torch.sign),
    "surrogate": lambda: go.straight_through(torch.sign, surrogate=torch.tanh),
    "method": lambda: method_of(answer_weight, Product),
    "method, module": lambda: method_of(lambda g, module, x: g * module.weight * x, Product),
    "method, vjp": lambda: method_of(lambda g, vjp: vjp.by_name(g), Product),
    "method, left to autograd": lambda: method_of(lambda g: g, Product),
    "class": ByClass,
}


@pytest.fixture(params=FORMS)
def form(request):
    return FORMS[request.param]()


@pytest.fixture
def x():
    return noise(SIZE)


def tensor_of(result):
    return result["y"] if isinstance(result, dict) else result


def grads_of(form, x):
    return [x.grad, *(p.grad for p in getattr(form, "parameters", list)())]


def clear(form, x):
    for leaf in [x, *getattr(form, "parameters", list)()]:
        leaf.grad = None


def test_all_is_freed_after_the_backward(form, x):
    with Storages(lasting(form, x)) as storages:
        tensor_of(form(x + 0)).sum().backward()
        clear(form, x)
    assert storages.alive() == 0


def test_all_is_freed_where_there_was_no_backward(form, x):
    with Storages(lasting(form, x)) as storages:
        result = form(x + 0)
        del result
    assert storages.alive() == 0


def test_backward_frees_what_was_kept_while_the_result_lives_on(form, x):
    with Storages(lasting(form, x)) as storages:
        y = tensor_of(form(x + 0))
        y.backward(torch.ones_like(y))
        clear(form, x)
    assert storages.alive() in (TENSOR, TENSOR + NUMBER)  # y
    assert y.grad_fn is not None


def test_retained_graph_is_freed_with_its_result(form, x):
    with Storages(lasting(form, x)) as storages:
        y = tensor_of(form(x + 0))
        for _ in range(2):
            y.backward(torch.ones_like(y), retain_graph=True)
        del y
        clear(form, x)
    assert storages.alive() == 0


TWICE = [name for name in FORMS if name not in ("residual",)]


@pytest.mark.parametrize("name", TWICE)
def test_graph_of_a_gradient_is_freed_with_it(name, x):
    form = FORMS[name]()
    with Storages(lasting(form, x)) as storages:
        y = tensor_of(form(x + 0))
        (gradient,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        del y, gradient
    assert storages.alive() == 0


def test_all_is_freed_after_a_second_backward(x):
    form = decorate(lambda g, vjp, x: vjp(g) * x, lambda x: x**3)
    with Storages(lasting(form, x)) as storages:
        (gradient,) = torch.autograd.grad(form(x + 0).sum(), x, create_graph=True)
        (gradient**2).sum().backward()
        del gradient
        clear(form, x)
    assert storages.alive() == 0


def test_argument_dies_after_the_backward(form, x):
    argument = x * 1
    reference = weakref.ref(argument)
    y = tensor_of(form(argument))
    del argument
    y.sum().backward()
    assert reference() is None


@pytest.mark.parametrize("kind", ["gradient alone", "first", "needs", "mask", "gradient alone, general path"])
def test_argument_that_is_not_asked_for_dies_before_the_backward(kind):
    rule, forward, _ = EXACT[kind]
    b = noise(SIZE) * 1
    reference = weakref.ref(b)
    y = decorate(rule, forward)(noise(SIZE) * 1, b)
    del b
    assert reference() is None
    y.sum().backward()


def test_result_dies_with_its_last_name(form, x):
    y = tensor_of(form(x * 1))
    reference = weakref.ref(y)
    y.sum().backward()
    del y
    assert reference() is None


@pytest.mark.parametrize("kind", [name for name in FORMS if name.startswith(("method", "class"))])
@pytest.mark.parametrize("backward", [True, False], ids=["after the backward", "without a backward"])
def test_module_dies_with_its_last_name(kind, backward, x):
    module = FORMS[kind]()
    reference = weakref.ref(module)
    y = module(x)
    del module
    if backward:
        y.sum().backward()
    del y
    assert reference() is None


@pytest.mark.parametrize("kind", ["argument", "vjp", "residual"])
def test_all_is_freed_after_a_rule_that_raised(kind, x):
    def fail(*_):
        raise ArithmeticError

    rules = {
        "argument": (lambda g, x: fail(), lambda x: x.sin()),
        "vjp": (lambda g, vjp: fail(vjp(g)), lambda x: x.sin().exp()),
        "residual": (lambda g, kept: fail(), lambda x: go.save_for_backward(x.sin(), kept=x.cos())),
    }
    form = decorate(*rules[kind])
    with Storages(lasting(form, x)) as storages:
        y = form(x + 0)
        try:
            y.sum().backward()
        except ArithmeticError as error:
            error.__traceback__ = None
        del y
    gc.collect()  # an exception's traceback and its frames are a cycle
    assert storages.alive() == 0


def test_rule_and_forward_die_with_the_decorated_function(x):
    def rule(g, vjp):
        return vjp(g)

    def forward(x):
        return x.sin()

    references = [weakref.ref(rule), weakref.ref(forward)]
    function = decorate(rule, forward)
    function(x).sum().backward()
    del rule, forward, function
    gc.collect()  # a function and its closure may be a cycle
    assert [reference() for reference in references] == [None, None]


def test_many_calls_leave_no_more_objects_than_one(form, x):
    def step():
        tensor_of(form(x)).sum().backward()
        clear(form, x)

    for _ in range(3):
        step()
    gc.collect()
    before = len(gc.get_objects())
    for _ in range(50):
        step()
    assert len(gc.get_objects()) - before < 25


def test_gradient_is_right_where_nothing_but_the_graph_holds_on(form, x):
    y = tensor_of(form(x + 0)).sum()
    again = tensor_of(form(x + 0)).sum()
    first = torch.autograd.grad(y, x)
    del y
    exactly(torch.autograd.grad(again, x), first)


class Multiplied(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(noise(2, 2))

    @go.custom_backward(lambda grad_output, weight: {"x": grad_output @ weight.T, "weight": None})
    def forward(self, x):
        return torch.matmul(x, self.weight)


@go.custom_backward
class WithBackward(nn.Linear):
    def backward(self, grad_output):
        self.weight.grad = self.bias.grad = None
        return grad_output @ self.weight


def overridden(rule):
    layer = nn.Linear(2, 2, dtype=torch.float64)
    go.override(layer, {layer: rule})
    return layer


PARAMETRIZED = {
    "decorated method": Multiplied,
    "class form": lambda: WithBackward(2, 2, dtype=torch.float64),
    "override by name": lambda: overridden(lambda grad_output, weight: {"input": grad_output @ weight, "weight": None}),
    "override by params": lambda: overridden(lambda grad_output, params, vjp: vjp.by_name(grad_output)),
    "override with module": lambda: overridden(lambda grad_output, module: grad_output @ module.weight),
}


@pytest.mark.parametrize("kind", PARAMETRIZED)
def test_parametrized_module_dies_with_its_last_name(kind):
    # torch makes a class for each, which holds the module.
    layer = nn.utils.parametrizations.weight_norm(PARAMETRIZED[kind]())
    layer(noise(2, 2)).sum().backward()
    known = weakref.ref(layer)
    del layer
    gc.collect()
    assert known() is None


@pytest.mark.parametrize("by_name", [False, True], ids=["vjp", "by_name"])
def test_peak_of_a_rule_that_asks_for_vjp_once_is_that_of_plain_autograd(by_name):
    def peak(module, x):
        grad = torch.ones(1000, 10)
        with Peak(lasting=[x, grad, *module.parameters()]) as storages:
            module(x).backward(grad)
        return storages.peak

    class Peak(Storages):
        peak = 0

        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            result = super().__torch_dispatch__(operation, types, args, kwargs)
            self.peak = max(self.peak, self.alive())
            return result

    class Layers(torch.nn.Sequential):
        def __init__(self):
            super().__init__(torch.nn.Linear(10, 10), torch.nn.Sigmoid(), torch.nn.Linear(10, 10), torch.nn.Sigmoid())

    class Ours(Layers):
        def forward(self, x):
            return super().forward(x)

    rule = (lambda grad_output, vjp: vjp.by_name(grad_output)) if by_name else lambda grad_output, vjp: vjp(grad_output)
    Ours.forward = go.custom_backward(rule)(Ours.forward)
    x = torch.randn(1000, 10, requires_grad=True)
    assert peak(Ours(), x) == peak(Layers(), x)
