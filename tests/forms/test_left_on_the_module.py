"""What a forward leaves in attributes of its module for the backward (`self.mask = ...`) is that of its own call, as
what it hands over is. Contract, section 1 (`module`) and section 2 (`self` in a `backward`)."""

import functools
import gc
import operator
import weakref

import pytest
import torch
from oracles import closely, exactly, float64, noise
from torch import nn
from torch.utils.checkpoint import checkpoint

import gradoverride as go
from forms import elsewhere


class KeepsAMask(nn.Module):
    def forward(self, x):
        self.mask = x > 1.5
        return x * self.mask

    def backward(self, grad_output):
        return grad_output * self.mask


class KeepsATuple(nn.Module):
    def forward(self, x):
        self.cache = (x, {"mask": x > 1.5})
        return x * self.cache[1]["mask"]

    def backward(self, grad_output):
        return grad_output * (self.cache[0] > 1.2) * self.read("cache")

    def read(self, name):
        return getattr(self, name)[1]["mask"]


class KeepsByItsBase(KeepsATuple):
    def forward(self, x):
        return super().forward(x)

    def backward(self, grad_output):
        return super().backward(grad_output)

    def read(self, name):
        return super().read(name)


class KeepsElsewhere(nn.Module):
    """The code that leaves it, and that which reads it, is in another module."""

    def forward(self, x):
        elsewhere.keep(self, x)
        return x * self.mask

    def backward(self, grad_output):
        return grad_output * elsewhere.mask_of(self)


class KeepsANumber(nn.Module):
    def forward(self, x):
        self.threshold = 1.5 if len(x) == 3 else 100.0
        return torch.where(x > self.threshold, x, 0.0)

    def backward(self, grad_output, x):
        return torch.where(x > self.threshold, grad_output, 0.0)


class KeepsInAPart(nn.Module):
    def __init__(self):
        super().__init__()
        self.part = nn.Identity()
        self.weight = nn.Parameter(float64(1.0).detach())

    def forward(self, x):
        self.part.mask = x > 1.5
        return x * self.part.mask * self.weight

    def backward(self, grad_output, x):
        self.weight.grad = (grad_output * x * self.part.mask).sum(0, keepdim=True)
        return grad_output * self.part.mask


class KeepsInADict(nn.Module):
    def __init__(self):
        super().__init__()
        self.cache = {}

    def forward(self, x):
        self.cache["mask"] = x > 1.5
        return x * self.cache["mask"]

    def backward(self, grad_output):
        return grad_output * self.cache["mask"]


class KeepsInAList(nn.Module):
    def __init__(self):
        super().__init__()
        self.saved = []

    def forward(self, x):
        self.saved.append((x, {"mask": x > 1.5}))
        return x * self.saved[-1][1]["mask"]

    def backward(self, grad_output):
        x, kept = self.saved[-1]
        return grad_output * kept["mask"] * (x > 1.2)


class KeepsInADictOfAPart(nn.Module):
    def __init__(self):
        super().__init__()
        self.part = KeepsInADict()

    @go.custom_backward(lambda grad_output, module: grad_output * module.part.cache["mask"])
    def forward(self, x):
        return self.part(x)


class ShowsItsMask(nn.Module):
    @go.custom_backward(lambda grad_output, module: grad_output * module.mask)
    def forward(self, x):
        self.mask = x > 1.5
        return x * self.mask


class ByItsName:
    def __init__(self, name):
        self.name = name

    def __call__(self, grad_output, module):
        return grad_output * getattr(module, self.name)


def by_name(grad_output, module, name):
    return grad_output * getattr(module, name)


def by_a_function(grad_output, module, read):
    return grad_output * read(module)


MASK = "mask"
READING = {
    "a helper elsewhere": lambda grad_output, module: grad_output * elsewhere.mask_of(module),
    "an object elsewhere": lambda grad_output, module: grad_output * elsewhere.Reader(module).read(),
    "vars": lambda grad_output, module: grad_output * vars(module)["mask"],
    "its dict": lambda grad_output, module: grad_output * module.__dict__["mask"],
    "the name of an option": functools.partial(by_name, name="mask"),
    "the name of a global": lambda grad_output, module: grad_output * getattr(module, MASK),
    "the name that an object has": ByItsName("mask"),
    "a function that is an option": functools.partial(by_a_function, read=operator.attrgetter("mask")),
    "a chain": go.rules.chain(
        lambda grad_output: grad_output * 1, lambda grad_output, module: grad_output * module.mask
    ),
}


class Masks(nn.Module):
    def forward(self, x):
        self.mask = x > 1.5
        return x * self.mask


@pytest.mark.parametrize("reading", READING)
def test_rule_reads_what_its_own_forward_left_however_it_asks(reading):
    module, a, b = Masks(), float64(1.0, 2.0, 3.0), float64(9.0, 1.0, 9.0, 0.0)
    with go.override(module, {module: READING[reading]}):
        of_a, of_b = plainly(module, a, b)
    exactly(of_a, (a.detach() > 1.5).to(torch.float64))
    exactly(of_b, (b.detach() > 1.5).to(torch.float64))


OWN = [KeepsAMask, KeepsATuple, KeepsByItsBase, KeepsElsewhere, KeepsANumber, KeepsInAPart, KeepsInADict, KeepsInAList]
KEEPING = [*map(go.custom_backward, OWN), KeepsInADictOfAPart, ShowsItsMask]


def plainly(layer, a, b):
    return torch.autograd.grad(layer(a).sum() + layer(b).sum(), (a, b))


def compiled(layer, a, b):
    return plainly(torch.compile(layer, backend="aot_eager"), a, b)


def by_torch_func(layer, a, b):
    return torch.func.grad(lambda a, b: layer(a).sum() + layer(b).sum(), (0, 1))(a.detach(), b.detach())


@pytest.mark.parametrize("differentiate", [plainly, compiled, by_torch_func])
@pytest.mark.parametrize("kind", KEEPING)
def test_backward_reads_what_its_own_forward_left_not_what_a_later_one_did(kind, differentiate):
    a, b = float64(1.0, 2.0, 3.0), float64(9.0, 1.0, 9.0, 0.0)
    of_a, of_b = differentiate(kind(), a, b)
    exactly(of_a, (a.detach() > 1.5).to(torch.float64))
    exactly(of_b, (b.detach() > (100.0 if kind is KeepsANumber else 1.5)).to(torch.float64))


@go.custom_backward
class KeepsItsArgument(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(float64(2.0, 3.0, 4.0).detach())

    def forward(self, x):
        self.x = x
        return self.weight * x

    def backward(self, grad_output):
        self.weight.grad = grad_output * self.x**2
        return grad_output * self.x**3


def test_second_derivative_goes_through_an_argument_that_the_forward_left():
    layer, x = KeepsItsArgument(), noise(3)
    grads = torch.autograd.grad(layer(x).sum(), (x, layer.weight), create_graph=True)
    (second,) = torch.autograd.grad(sum(grads).sum(), x)
    closely(second, 3 * x.detach() ** 2 + 2 * x.detach())


def test_second_derivative_goes_through_what_the_forward_computed_where_its_graph_is_kept():
    @go.custom_backward
    class Layer(nn.Module):
        def forward(self, x):
            self.s = x.sigmoid()
            return self.s * 1

        def backward(self, grad_output, vjp):
            return vjp(grad_output) * self.s

    x = noise(3)
    y = x.detach().clone().requires_grad_()
    (grad,) = torch.autograd.grad(Layer()(x).sum(), x, create_graph=True)
    s = y.sigmoid()
    closely(torch.autograd.grad(grad.sum(), x), torch.autograd.grad((s * (1 - s) * s).sum(), y))


def test_second_derivative_through_what_the_forward_computed_is_refused_where_no_graph_is_kept():
    @go.custom_backward
    class Layer(nn.Module):
        def forward(self, x):
            self.s = x.sigmoid()
            return self.s * 1

        def backward(self, grad_output):
            return grad_output * self.s * (1 - self.s)

    x = noise(3)
    (grad,) = torch.autograd.grad(Layer()(x).sum(), x, create_graph=True)
    with pytest.raises(go.UnsupportedError, match=r"the second derivative of 'Layer' .* Ask for 'vjp'"):
        grad.sum().backward()


def test_table_that_the_first_forward_makes_is_there_in_a_checkpoint():
    class Layer(nn.Module):
        table = None

        @go.custom_backward(lambda grad_output, module: grad_output * module.table)
        def forward(self, x):
            if self.table is None:
                self.table = torch.arange(3.0, dtype=torch.float64)
            return x * self.table

    layer, x = Layer(), noise(3)
    for _ in range(2):
        (grad,) = torch.autograd.grad(checkpoint(layer, x, use_reentrant=False).sum(), x)
        exactly(grad, layer.table)


def test_what_the_backward_does_not_read_is_not_kept():
    @go.custom_backward
    class Layer(nn.Module):
        def forward(self, x):
            self.seen, self.mask = x.detach() * 2, x > 0
            return x * self.mask

        def backward(self, grad_output):
            return grad_output * self.mask

    layer = Layer()
    first = layer(noise(3))
    seen, mask = weakref.ref(layer.seen), weakref.ref(layer.mask)
    second = layer(noise(3))
    assert seen() is None
    (first + second).sum().backward()
    del first
    assert mask() is None


def test_result_that_the_forward_left_is_released_without_the_garbage_collector():
    @go.custom_backward
    class Layer(nn.Module):
        def forward(self, x):
            self.y = x.exp()
            return self.y

        def backward(self, grad_output):
            return grad_output * self.y

    gc.collect()
    gc.disable()
    try:
        layer, x = Layer(), noise(3)
        result = layer(x)
        node = weakref.ref(result.grad_fn)
        result.sum().backward()
        closely(x.grad, x.detach().exp())
        del result, layer
        assert node() is None
    finally:
        gc.enable()


def test_what_the_backward_sets_is_on_the_module_though_the_forward_had_left_something_there():
    @go.custom_backward
    class Layer(nn.Module):
        def forward(self, x):
            self.x = x
            return 2 * x

        def backward(self, grad_output):
            grad, self.x = grad_output * self.x, None
            return grad

    layer, x = Layer(), float64(3.0)
    layer(x).sum().backward()
    exactly(x.grad, float64(3.0).detach())
    assert layer.x is None


# --- containers that stay, and are changed ---


class Filled(nn.Module):
    """The cube, whose derivative is found by what the forward has put into containers."""

    def __init__(self):
        super().__init__()
        self.saved = []
        self.by_kind = {"squares": []}

    def forward(self, x):
        self.saved.append(x)
        self.by_kind["squares"].append(x * x)
        return x**3


class FromTheEnd(Filled):
    def backward(self, grad_output):
        self.saved.pop()
        return grad_output * 3 * self.last_square()

    def last_square(self):
        squares = self.by_kind["squares"]
        return squares.pop()


class FromTheStart(Filled):
    def backward(self, grad_output):
        del self.saved[0]
        return grad_output * 3 * self.by_kind["squares"].pop(0)


class InALoop(Filled):
    def backward(self, grad_output):
        self.saved.clear()
        for squares in self.by_kind.values():
            grad_output = grad_output * 3 * squares.pop()
        return grad_output


@pytest.mark.parametrize(("kind", "order"), [(FromTheEnd, -1), (FromTheStart, 1), (InALoop, -1)])
def test_stack_or_queue_that_the_backward_takes_from_is_that_of_the_module(kind, order):
    layer = go.custom_backward(kind)()
    for _ in range(2):
        xs = [noise(3), noise(3)]
        ys = [layer(x) for x in xs]
        for x, y in list(zip(xs, ys, strict=True))[::order]:
            y.sum().backward()
            closely(x.grad, 3 * x.detach() ** 2)
    assert layer.by_kind["squares"] == layer.saved == []


def test_list_that_each_forward_makes_may_be_emptied_by_its_backward():
    @go.custom_backward
    class Layer(nn.Module):
        def forward(self, x):
            self.saved = [x, 2 * x]
            return x * x

        def backward(self, grad_output):
            return grad_output * self.saved.pop()

    layer, a, b = Layer(), noise(3), noise(3)
    (layer(a).sum() + layer(b).sum()).backward()
    closely((a.grad, b.grad), (2 * a.detach(), 2 * b.detach()))


def test_what_the_backward_puts_into_a_container_is_in_that_of_the_module():
    @go.custom_backward
    class Layer(Filled):
        def backward(self, grad_output):
            self.by_kind["grads"] = grad_output
            self.by_kind["last"] = self.by_kind["squares"][-1]
            self.saved[-1] = None
            return grad_output * 3 * self.by_kind["last"]

    layer, a, b = Layer(), noise(3), noise(3)
    of_a, of_b = layer(a), layer(b)
    of_a.backward(torch.full((3,), 2.0, dtype=torch.float64))
    exactly(layer.by_kind["grads"], torch.full((3,), 2.0, dtype=torch.float64))
    closely((a.grad, layer.by_kind["last"]), (6 * a.detach() ** 2, a.detach() ** 2))
    assert layer.saved[0] is None
    of_b.sum().backward()
    closely((b.grad, layer.by_kind["last"]), (3 * b.detach() ** 2, b.detach() ** 2))
    assert layer.saved == [None, None]
    assert len(layer.by_kind["squares"]) == 2


def test_container_that_a_backward_takes_from_where_its_code_does_not_show_it_is_refused():
    @go.custom_backward
    class Layer(Filled):
        def backward(self, grad_output):
            return grad_output * 3 * list.pop(self.by_kind["squares"])

    y = Layer()(noise(3))
    with pytest.raises(
        go.UnsupportedError, match=r"must take from the container 'by_kind' of its module.*self\.by_kind\.pop\(\)"
    ):
        y.sum().backward()


def test_what_stays_in_a_list_is_held_as_it_is_and_not_saved():
    """A later forward may count on in it."""

    @go.custom_backward
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.kept = [torch.zeros((), dtype=torch.float64)]

        def forward(self, x):
            self.kept[0].add_(1)
            self.kept.append(x)
            return x * x

        def backward(self, grad_output):
            return grad_output * self.kept[-1] * self.kept[0]

    layer, a, b = Layer(), noise(3), noise(3)
    (layer(a).sum() + layer(b).sum()).backward()
    closely((a.grad, b.grad), (2 * a.detach(), 2 * b.detach()))


@pytest.mark.parametrize("kind", [KeepsInADict, KeepsInAList, KeepsInADictOfAPart])
def test_container_that_a_forward_fills_is_right_in_a_checkpoint(kind):
    layer = kind()
    a, b = float64(1.0, 2.0, 3.0), float64(9.0, 1.0, 0.0)
    (checkpoint(layer, a, use_reentrant=False).sum() + checkpoint(layer, b, use_reentrant=False).sum()).backward()
    exactly((a.grad, b.grad), ((a.detach() > 1.5).double(), (b.detach() > 1.5).double()))


def test_table_that_the_first_forward_puts_into_a_dict_is_there_in_a_checkpoint():
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.tables = {}

        @go.custom_backward(lambda grad_output, module: grad_output * module.tables[3])
        def forward(self, x):
            if len(x) not in self.tables:
                self.tables[len(x)] = torch.arange(3.0, dtype=torch.float64)
            return x * self.tables[len(x)]

    layer, x = Layer(), noise(3)
    for _ in range(2):
        (grad,) = torch.autograd.grad(checkpoint(layer, x, use_reentrant=False).sum(), x)
        exactly(grad, layer.tables[3])
