"""An hour's worth of calls in little time: nothing grows, and every gradient is right.

100,000 calls of several forms in eight threads, and 10,000 overrides applied and removed: all of it by `make soak`, a
tenth of it with the other tests. The garbage collector is off meanwhile: what a call has made goes when the call does.
Numbers are small integers in float64, so that gradients are equal to the last bit.
"""

import collections
import contextlib
import ctypes
import gc
import os
import pathlib
import sys
import threading

import pytest
import torch
import torch.nn.functional as F
from oracles import accumulators, in_threads
from torch import nn

import gradoverride as go

CALLS = 100_000
OVERRIDES = 10_000
THREADS = 8
SHARES = [0.1, pytest.param(1.0, marks=pytest.mark.soak)]

WARM_CALLS = 10_000  # the first ones of many threads leave some hundred blocks, the next ones none
WARM_OVERRIDES = 500

# What may be left over. An object left by each call of one form, or by each override, would be more in a tenth too.
SPARE_OBJECTS = 200  # of those that the collector knows
SPARE_BLOCKS = 500  # of Python's memory
SPARE_RESIDENT = 8 * 2**20  # bytes of the process


# --- forms, and what each must give for an input of ones to sixes ---


@go.custom_backward(lambda grad_output, x: grad_output * x)
def square(x):
    return x * x


@go.custom_backward(lambda grad_output, vjp: vjp(2 * grad_output))
def cube(x):
    return x * x * x


@go.custom_backward(lambda grad_output, x: {"x": grad_output["sum"] + 2 * grad_output["parts"][0]})
def as_dict(x, *, names=("a", "b")):
    return {"sum": x + 1, "parts": [x * 5, x.int()], "names": names}


@go.custom_backward(lambda grad_output, mask: grad_output * mask)
def keep_large(x):
    mask = x > 2
    return go.save_for_backward(x * mask, mask=mask)


@go.custom_backward(lambda grad_output, x, weight: {"x": grad_output @ weight, "weight": 3 * grad_output.T @ x})
def linear_of(self, x):
    return F.linear(x, self.weight)


class ByMethod(nn.Linear):
    forward = linear_of


@go.custom_backward
class ByClass(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight)

    def backward(self, grad_output, x):
        self.weight.grad = 3 * grad_output.T @ x
        return grad_output @ self.weight


def doubled(grad_output, vjp):
    return vjp(2 * grad_output)


def guided(grad_output, vjp):
    return vjp(grad_output.clamp(min=0))


def with_weight(kind):
    module = kind(3, 3, bias=False).double()
    with torch.no_grad():
        module.weight.copy_(torch.arange(9.0).view(3, 3))
    return module


round_ste = go.straight_through(torch.round)
sign_ste = go.straight_through(torch.sign, surrogate=lambda x: x * x)


def forms():
    """By name, a function and the gradient of its sum (or of those of its first result) for `x`, by hand."""
    method, by_class, overridden = with_weight(ByMethod), with_weight(ByClass), with_weight(nn.Linear)
    handle = go.override(overridden, {overridden: doubled})
    by_columns = torch.arange(9.0, dtype=torch.float64).view(3, 3).sum(0)
    listed = {
        "a value asked for": (square, lambda x: x),
        "vjp": (cube, lambda x: 6 * x * x),
        "a dict": (lambda x: as_dict(x)["sum"], torch.ones_like),
        "a part of a dict": (lambda x: as_dict(x, names="c")["parts"][0], lambda x: torch.full_like(x, 2)),
        "a residual": (keep_large, lambda x: (x > 2).double()),
        "a method": (method, lambda x: by_columns.expand(2, 3)),
        "a class": (by_class, lambda x: by_columns.expand(2, 3)),
        "an overridden module": (overridden, lambda x: 2 * by_columns.expand(2, 3)),
        "straight_through": (round_ste, torch.ones_like),
        "a surrogate": (sign_ste, lambda x: 2 * x),
        "edit_gradient": (lambda x: go.edit_gradient(x * 3, lambda grad_output: -grad_output), lambda x: -3 + 0 * x),
        "connect": (
            lambda x: go.connect(x.detach() ** 2, x, lambda grad_output, input: 2 * grad_output * input),
            lambda x: 2 * x,
        ),
    }
    return listed, [method, by_class, overridden], handle


def calls_of(listed, count):
    """Call the forms in turn; raise at the first gradient that is not right."""
    cases = []
    for name, (function, gradient) in listed.items():
        x = torch.arange(1.0, 7.0, dtype=torch.float64).view(2, 3).requires_grad_()
        cases.append((name, function, x, gradient(x.detach())))
    for index in range(count):
        name, function, x, expected = cases[index % len(cases)]
        (found,) = torch.autograd.grad(function(x).sum(), x)
        if not torch.equal(found, expected):
            raise AssertionError(f"call {index}, {name}: {found} instead of {expected}")


# --- what must not grow ---


@pytest.fixture(autouse=True)
def _settled():
    """What tests before have left, compiled code above all, goes before anything is counted, in several rounds."""
    torch._dynamo.reset()
    for _ in range(5):
        gc.collect()


def objects():
    """Live objects by type."""
    return collections.Counter(type(each).__qualname__ for each in gc.get_objects())


def classes():
    """Classes of autograd and of modules that are alive."""
    found, new = set(), [torch.autograd.Function, nn.Module]
    while new:
        derived = [cls for parent in new for cls in type.__subclasses__(parent) if cls not in found]
        found.update(derived)
        new = derived
    return found


def resident():
    """Bytes of the process in memory, without what is free in it; None where the system does not say."""
    give_back = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if give_back is not None:  # the C library keeps a pool for threads, and each new one may get another
        give_back(0)
    path = pathlib.Path("/proc/self/statm")
    return int(path.read_text().split()[1]) * 4096 if path.exists() else None


@contextlib.contextmanager
def nothing_grows():
    gc.collect()
    gc.disable()
    try:
        before, memory, made, blocks = objects(), resident(), len(classes()), sys.getallocatedblocks()
        yield
        grown = {name: count - before[name] for name, count in objects().items() if count > before[name] + 20}
        assert sum(grown.values()) < SPARE_OBJECTS, grown
        assert len(classes()) == made
        if memory is not None:
            assert resident() - memory < SPARE_RESIDENT
        del before, grown
        gc.collect()  # which also empties Python's lists of objects to be used again: they grow to their size
        assert sys.getallocatedblocks() - blocks < SPARE_BLOCKS
    finally:
        gc.enable()


# --- calls ---


@pytest.mark.parametrize("share", SHARES)
def test_calls_in_eight_threads_are_right_and_leave_nothing(share):
    listed, modules, handle = forms()
    count = int(CALLS * share) // THREADS
    held = accumulators(*modules)
    in_threads(THREADS, lambda index: calls_of(listed, WARM_CALLS // THREADS))
    with nothing_grows():
        in_threads(THREADS, lambda index: calls_of(listed, count))
    del held
    assert all(module.weight.grad is None for module in modules)
    handle.remove()


# --- overrides ---


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = with_weight(nn.Linear)
        self.relu = nn.ReLU()
        self.inner = nn.Sequential(nn.Identity(), nn.ReLU())

    def forward(self, x):
        return self.inner(self.relu(self.linear(x)) - 20) * 2


PLAIN, DOUBLED, GUIDED = "plain", "doubled", "guided"
RULES = {
    DOUBLED: {nn.Linear: doubled},
    GUIDED: {"relu": guided, "inner.*1": guided},
}
X = torch.arange(1.0, 7.0, dtype=torch.float64).view(2, 3)
GRAD_OUTPUT = torch.tensor([[1.0, -1.0, 2.0], [-1.0, 1.0, -2.0]], dtype=torch.float64)


def by_hand(model, kind):
    """The gradient of `X`, and the weight's."""
    weight = model.linear.weight.detach()
    hidden = X @ weight.T
    grad = 2 * GRAD_OUTPUT
    for mask in (hidden.relu() - 20 > 0, hidden > 0):
        grad = (grad.clamp(min=0) if kind == GUIDED else grad) * mask
    return (2 if kind == DOUBLED else 1) * grad @ weight, grad.T @ X


def gradients(model):
    x = X.clone().requires_grad_()
    return torch.autograd.grad(model(x), [x, model.linear.weight], GRAD_OUTPUT)


def check(model, *kinds):
    """Fail unless the gradients are those of one of these kinds."""
    found = gradients(model)
    wanted = [by_hand(model, kind) for kind in kinds]
    assert any(all(map(torch.equal, found, each)) for each in wanted), (found, wanted)


def seen(model):
    return [(type(module), dict(module.__dict__)) for module in model.modules()]


def applied_and_removed(model, count):
    before = seen(model)
    for index in range(count):
        kind = GUIDED if index % 2 else DOUBLED
        with go.override(model, RULES[kind]):
            check(model, kind)
        if index % 10 == 0:
            check(model, PLAIN)
    assert seen(model) == before


@pytest.mark.parametrize("share", SHARES)
def test_overrides_applied_and_removed_in_eight_threads_leave_nothing(share):
    count = int(OVERRIDES * share) // THREADS
    models = [Model() for _ in range(THREADS)]
    in_threads(THREADS, lambda index: applied_and_removed(models[index], WARM_OVERRIDES // THREADS))
    with nothing_grows():
        in_threads(THREADS, lambda index: applied_and_removed(models[index], count))


@pytest.mark.parametrize("share", SHARES)
def test_overrides_of_new_rules_leave_no_class_and_no_object(share):
    """What belongs to a rule goes with it, when the collector comes: classes refer to themselves."""
    model = Model()

    def round_of(count):
        for factor in range(count):

            def scaled(grad_output, vjp, factor=factor):
                return factor * vjp(grad_output)

            with go.override(model, {"linear": scaled}):
                found, _ = gradients(model)
            assert torch.equal(found, factor * by_hand(model, PLAIN)[0])

    round_of(20)
    gc.collect()
    before, made = objects(), len(classes())
    round_of(int(OVERRIDES * share / 4))
    gc.collect()
    grown = {name: count - before[name] for name, count in objects().items() if count > before[name] + 20}
    assert sum(grown.values()) < SPARE_OBJECTS, grown
    assert len(classes()) == made


@pytest.mark.parametrize("share", SHARES)
def test_a_call_meets_an_override_as_a_whole_or_not_at_all(share):
    """One thread applies and removes, the others call."""
    model, done = Model(), threading.Event()

    def work(index):
        if index:
            while not done.is_set():
                check(model, PLAIN, DOUBLED)
            return
        try:
            for _ in range(int(OVERRIDES * share / 10)):
                with go.override(model, {nn.Linear: doubled}):
                    check(model, DOUBLED)
        finally:
            done.set()

    before, held = seen(model), accumulators(model)
    in_threads(4, work)
    del held
    assert seen(model) == before


# --- that it would be seen ---


def a_cycle():
    cycle = []
    cycle.append(cycle)


KEPT = []


@pytest.mark.parametrize(
    "leave",
    [
        a_cycle,
        lambda: KEPT.append(type("Left", (nn.Module,), {})),
        lambda: KEPT.append(float("1.5")),
        lambda: KEPT.append(torch.ones(2)),
    ],
    ids=["cycle", "class", "number", "tensor"],
)
def test_what_a_call_leaves_is_seen(leave):
    count = int(CALLS * 0.1) // len(forms()[0])
    with pytest.raises(AssertionError), nothing_grows():
        in_threads(1, lambda index: [leave() for _ in range(count)])
    KEPT.clear()


def test_memory_that_a_call_leaves_is_seen():
    with pytest.raises(AssertionError, match="resident"), nothing_grows():
        KEPT.append(torch.ones(2 * SPARE_RESIDENT, dtype=torch.uint8))
    KEPT.clear()
