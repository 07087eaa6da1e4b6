"""After an override all is as before, where it was on functions, import paths, or classes. Contract, section 5.

`test_undo.py` is about rules on the modules of a model. Here each model is one chain of calls, and each rule multiplies
the gradient by a prime: the gradient tells which rules are in force.
"""

import functools
import gc
import importlib
import itertools
import math
import sys
import textwrap
import threading
import types
import weakref
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
import wrapt
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracles import closely, exactly, noise
from torch import nn
from torch.nn.modules import module as module_hooks
from torch.overrides import TorchFunctionMode

import gradoverride as go
from gradoverride._core.overriding import path_patch
from gradoverride._core.python import imports
from overrides.models import gradient

SOURCE = {
    "__init__": "",
    "functions": """
        from torch import nn

        def cube(x):
            return broken(x, 1) ** 3

        def broken(x, size):
            if len(x) == size:
                raise ZeroDivisionError
            return x

        class Block(nn.Module):
            def forward(self, x):
                return self.of_class(self.still(self.step(cube(x))))

            def step(self, x):
                return broken(x, 2) * 1.5

            @staticmethod
            def still(x):
                return broken(x, 3) - 0.5

            @classmethod
            def of_class(cls, x):
                return broken(x, 4) * -2.5

        class Derived(Block):
            def after(self, x):
                return x
    """,
    "users": """
        import torch.nn.functional as F
        from torch import nn
        from elsewhere.functions import Block, cube
        from elsewhere.functions import cube as renamed

        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.linear, self.act, self.block = nn.Linear(3, 3), nn.Tanh(), Block()

            def forward(self, x):
                return self.block(F.relu(self.act(self.linear(x))))

        def uses(x):
            return renamed(x)
    """,
    "late": """
        from elsewhere.functions import cube as imported_later

        def late(x):
            return imported_later(x)
    """,
}
CUBE, BLOCK = "elsewhere.functions:cube", "elsewhere.functions:Block"


class Kind(NamedTuple):
    """A way to override one call of the model: by this target, in the model or in the process."""

    target: Any
    where: str
    holder: str  # where the function that runs then stands, for another party to wrap it
    breaks: int = 2  # how many rows make the function raise, or what it calls

    def enter(self, model, rule):
        rules = {self.target: rule}
        return go.override(model, rules) if self.where == "model" else go.override(rules)


KINDS = {
    "function, in a model": Kind(torch.relu, "model", "torch:relu"),
    "function, in the process": Kind(torch.relu, "process", "torch:relu"),
    "path of a function, in a model": Kind(CUBE, "model", CUBE, 1),
    "path of a function, in the process": Kind(CUBE, "process", CUBE, 1),
    "path of a name that was imported": Kind("elsewhere.users:renamed", "process", CUBE, 1),
    "path of a method, in a model": Kind(f"{BLOCK}.step", "model", f"{BLOCK}.step"),
    "path of a method, in the process": Kind(f"{BLOCK}.step", "process", f"{BLOCK}.step"),
    "path of a static method": Kind(f"{BLOCK}.still", "process", f"{BLOCK}.still", 3),
    "path of a static method, in a model": Kind(f"{BLOCK}.still", "model", f"{BLOCK}.still", 3),
    "path of a class method": Kind(f"{BLOCK}.of_class", "process", f"{BLOCK}.of_class", 4),
    "path of a forward": Kind(f"{BLOCK}.forward", "process", f"{BLOCK}.forward"),
    "path of a class, in a model": Kind(BLOCK, "model", f"{BLOCK}.forward"),
    "path of a class, in the process": Kind(BLOCK, "process", f"{BLOCK}.forward"),
    "class of torch, in the process": Kind(nn.Tanh, "process", "torch.nn:Tanh.forward"),
    "class of torch, in a model": Kind(nn.Tanh, "model", "torch.nn:Tanh.forward"),
    "glob": Kind("act", "model", "torch.nn:Tanh.forward"),
    "all modules of torch": Kind(nn.Linear, "process", "torch.nn:Linear.forward"),
}
each_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
# The name that was imported is no name of what another party puts in place of the function.
WRAPPED = {name: kind for name, kind in KINDS.items() if kind.target != "elsewhere.users:renamed"}
ORDERS = list(itertools.permutations(range(3)))
each_order = pytest.mark.parametrize("order", ORDERS, ids=["".join(map(str, order)) for order in ORDERS])
PRIMES = [2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59]


@functools.cache
def times(factor):
    def rule(grad_output, vjp):
        return factor * vjp(grad_output)

    return rule


# Our caches are not found among what holds a function, because old objects are not searched here.
no_cache_is_found = pytest.mark.filterwarnings("ignore:.*also held by a tuple; :gradoverride.GradOverrideWarning")

# --- what there is to see


def everything(model=None):
    """All that an override might touch, here and elsewhere. By identity: to hold a function would be told of."""
    seen: dict[str, Any] = {
        "modes": [id(mode) for mode in torch.overrides._get_current_function_mode_stack()],
        "number of modes": torch._C._len_torch_function_stack(),
        "finders": [id(finder) for finder in sys.meta_path],
        "what is in force": str(go.explain()),
        "global hooks": {
            name: list(value) for name, value in vars(module_hooks).items() if name.startswith("_global_") and value
        },
        "relu": [id(function) for function in (torch.relu, torch.relu_, F.relu, torch.Tensor.relu)],
    }
    modules = [F, nn, *[module for name, module in sys.modules.items() if name.partition(".")[0] == "elsewhere"]]
    for module in modules:
        seen[f"names of {module.__name__}"] = names_in(module)
    classes = {nn.Module, nn.Linear, nn.Tanh, nn.ReLU, torch.Tensor}
    classes |= {cls for module in modules[2:] for cls in vars(module).values() if isinstance(cls, type)}
    for module in () if model is None else model.modules():
        classes |= set(type(module).__mro__)
    for cls in classes - {object}:
        seen[f"{cls.__module__}.{cls.__qualname__}, {id(cls)}"] = (names_in(cls), cls.__mro__, cls.__bases__)
    if model is not None:
        seen["model"] = [everything_of(module) for module in model.modules()]
        seen["state_dict"] = list(model.state_dict())
        seen["explained"] = str(go.explain(model))
    return seen


def names_in(space):
    return [(name, id(value)) for name, value in vars(space).items() if name != "__warningregistry__"]


def everything_of(module):
    tables = {name: value for name, value in vars(module).items() if isinstance(value, (dict, set))}
    contents = {name: list(map(id, getattr(table, "values", list)())) for name, table in tables.items()}
    return type(module), names_in(module), {name: list(table) for name, table in tables.items()}, contents


def differences(before, after):
    return [key for key in before.keys() | after.keys() if before.get(key) != after.get(key)]


@pytest.fixture(scope="module", autouse=True)
def _finder_of_wrapt():
    """`wrapt` puts its finder into `sys.meta_path` when it is first asked for a module, and leaves it there."""
    wrapt.register_post_import_hook(lambda module: None, __name__)


@pytest.fixture(autouse=True)
def _old_objects_are_not_searched():
    """What other tests have left is not asked, each time anew, whether it holds a function."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def _old_objects_are_collected_afterwards():
    yield
    gc.unfreeze()


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package `elsewhere`, of which nothing is imported yet."""
    for name, source in SOURCE.items():
        file = tmp_path / "elsewhere" / f"{name}.py"
        file.parent.mkdir(exist_ok=True)
        file.write_text(textwrap.dedent(source))
    monkeypatch.syspath_prepend(tmp_path)
    before = everything()
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "elsewhere"]:
        del sys.modules[name]
    assert not differences(before, {key: value for key, value in everything().items() if key in before})


@pytest.fixture
def model(package):
    return importlib.import_module("elsewhere.users").Model().double()


@pytest.fixture
def x():
    return noise(5, 3)


@pytest.fixture
def unchanged(model, x):
    """Fails where anything is not as before."""
    before, plain = everything(model), gradient(model, x)
    yield
    assert not differences(before, everything(model))
    exactly(gradient(model, x), plain)


def functions():
    return importlib.import_module("elsewhere.functions")


def users():
    return importlib.import_module("elsewhere.users")


def holder_of(path):
    """What has the function at a path among its names, and the name."""
    module, _, attribute = path.partition(":")
    owner = importlib.import_module(module)
    *classes, name = attribute.split(".")
    for cls in classes:
        owner = getattr(owner, cls)
    return owner, name


class Scaled(torch.autograd.Function):
    """The same value; the gradient times a factor."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad_output):
        return ctx.factor * grad_output, None


def wrap(path, factor):
    """What another party does: its own function in place of what stands there. Gives what puts that back."""
    owner, name = holder_of(path)
    before = vars(owner)[name]
    kind = type(before) if isinstance(before, (staticmethod, classmethod)) else None
    inner = before.__func__ if kind else before

    @functools.wraps(inner)
    def theirs(*args, **kwargs):
        return Scaled.apply(inner(*args, **kwargs), factor)

    setattr(owner, name, kind(theirs) if kind else theirs)
    return lambda: setattr(owner, name, before)


def in_a_thread(work):
    errors = []

    def run():
        try:
            work()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    assert not errors


def left_no_mode(kind, model, x):
    """torch lets nobody reach the modes of another thread, nor one that runs: such a one stays, and does nothing.

    It goes with the next override of a function in its thread.
    """
    if kind is KINDS["function, in the process"]:
        with kind.enter(model, times(3)):
            gradient(model, x)


# --- the ways to leave


@pytest.mark.usefixtures("unchanged")
@each_kind
class TestAllIsAsBefore:
    def test_after_the_context(self, kind, model, x):
        before, plain = everything(model), gradient(model, x)
        with kind.enter(model, times(2)):
            closely(gradient(model, x), 2 * plain)
            assert differences(before, everything(model))

    def test_after_a_second_context(self, kind, model, x):
        plain = gradient(model, x)
        for factor in (2, 3, 2):
            with kind.enter(model, times(factor)):
                closely(gradient(model, x), factor * plain)
            exactly(gradient(model, x), plain)

    def test_after_an_exception_in_the_body(self, kind, model):
        with pytest.raises(ZeroDivisionError), kind.enter(model, times(2)):
            raise ZeroDivisionError

    def test_after_an_exception_in_a_forward(self, kind, model, x):
        with pytest.raises(ZeroDivisionError), kind.enter(model, times(2)):
            model(x[: kind.breaks])

    def test_after_an_exception_in_a_forward_that_was_caught(self, kind, model, x):
        plain = gradient(model, x)
        with kind.enter(model, times(2)):
            with pytest.raises(ZeroDivisionError):
                model(x[: kind.breaks])
            closely(gradient(model, x), 2 * plain)

    def test_after_an_exception_in_a_rule(self, kind, model, x):
        def raising(grad_output):
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError), kind.enter(model, raising):
            gradient(model, x)

    def test_after_remove_twice(self, kind, model, x):
        plain = gradient(model, x)
        other, handle = kind.enter(model, times(3)), kind.enter(model, times(2))
        closely(gradient(model, x), 6 * plain)
        for _ in range(2):
            handle.remove()
            closely(gradient(model, x), 3 * plain)
        other.remove()
        handle.remove()

    def test_after_remove_inside_the_context(self, kind, model, x):
        plain = gradient(model, x)
        with kind.enter(model, times(2)) as handle:
            closely(gradient(model, x), 2 * plain)
            handle.remove()
            exactly(gradient(model, x), plain)

    @each_order
    def test_after_removal_in_any_order(self, kind, order, model, x):
        plain = gradient(model, x)
        handles = [kind.enter(model, times(factor)) for factor in (2, 3, 5)]
        left = {0: 2, 1: 3, 2: 5}
        for index in order:
            closely(gradient(model, x), math.prod(left.values()) * plain)
            handles[index].remove()
            del left[index]

    def test_after_removal_of_the_same_rule_in_any_order(self, kind, model, x):
        plain = gradient(model, x)
        first, second = kind.enter(model, times(2)), kind.enter(model, times(2))
        closely(gradient(model, x), 4 * plain)
        first.remove()
        closely(gradient(model, x), 2 * plain)
        second.remove()

    def test_after_the_handle_was_dropped_and_another_one_took_its_rules_off(self, kind, model, x):
        plain = gradient(model, x)
        with kind.enter(model, times(2)) as outer:
            remove = weakref.ref(outer)
            del outer
            gc.collect()
            closely(gradient(model, x), 2 * plain)
            with kind.enter(model, times(3)):
                closely(gradient(model, x), 6 * plain)
        gc.collect()
        assert remove() is None

    def test_after_removal_before_the_backward(self, kind, model, x):
        plain = gradient(model, x)
        with kind.enter(model, times(2)):
            result = model(x)
        weights = torch.linspace(-1, 1, result.numel(), dtype=result.dtype).view_as(result)
        closely(torch.autograd.grad((result * weights).sum(), x)[0], 2 * plain)

    def test_after_removal_by_a_hook_in_the_backward(self, kind, model, x):
        handle = kind.enter(model, times(2))
        result = model(x)
        result.register_hook(lambda grad: handle.remove())
        torch.autograd.grad(result.sum(), x)
        left_no_mode(kind, model, x)


@each_kind
def test_removed_in_another_thread(kind, model, x):
    before, plain = everything(model), gradient(model, x)
    handle = kind.enter(model, times(2))
    closely(gradient(model, x), 2 * plain)
    in_a_thread(handle.remove)
    exactly(gradient(model, x), plain)
    left_no_mode(kind, model, x)
    assert not differences(before, everything(model))


@each_kind
def test_entered_in_a_thread_that_has_ended(kind, model, x):
    before, plain = everything(model), gradient(model, x)
    handles = []

    def enter():
        handles.append(kind.enter(model, times(2)))
        closely(gradient(model, x), 2 * plain)

    in_a_thread(enter)
    handles[0].remove()
    assert not differences(before, everything(model))
    exactly(gradient(model, x), plain)


@each_kind
def test_model_dropped_while_it_is_in_force(kind, model, x, request):
    before = everything()
    model = users().Model().double()
    gone = weakref.ref(model)
    handle = kind.enter(model, times(2))
    gradient(model, x)
    gc.disable()
    request.addfinalizer(gc.enable)
    del model
    assert gone() is None
    handle.remove()
    assert not differences(before, everything())


# --- other parties


@pytest.mark.parametrize("kind", WRAPPED.values(), ids=WRAPPED)
class TestAnotherParty:
    def test_has_come_and_gone_meanwhile(self, kind, model, x):
        before, plain = everything(model), gradient(model, x)
        with kind.enter(model, times(2)):
            put_back = wrap(kind.holder, 7)
            closely(gradient(model, x), 14 * plain)
            put_back()
            closely(gradient(model, x), 2 * plain)
        assert not differences(before, everything(model))
        exactly(gradient(model, x), plain)

    def test_was_there_before_and_stays(self, kind, model, x):
        before, plain = everything(model), gradient(model, x)
        put_back = wrap(kind.holder, 7)
        wrapped = everything(model)
        with kind.enter(model, times(2)):
            closely(gradient(model, x), 14 * plain)
        assert not differences(wrapped, everything(model))
        closely(gradient(model, x), 7 * plain)
        put_back()
        assert not differences(before, everything(model))

    def test_was_there_before_and_goes_meanwhile(self, kind, model, x):
        before, plain = everything(model), gradient(model, x)
        put_back = wrap(kind.holder, 7)
        with kind.enter(model, times(2)):
            closely(gradient(model, x), 14 * plain)
            put_back()
            gradient(model, x)
        assert not differences(before, everything(model))
        exactly(gradient(model, x), plain)

    def test_comes_meanwhile_and_goes_later(self, kind, model, x):
        before, plain = everything(model), gradient(model, x)
        handle = kind.enter(model, times(2))
        put_back = wrap(kind.holder, 7)
        closely(gradient(model, x), 14 * plain)
        handle.remove()
        closely(gradient(model, x), 7 * plain)
        put_back()  # what it has kept: ours, which does nothing now
        exactly(gradient(model, x), plain)
        with kind.enter(model, times(3)):
            closely(gradient(model, x), 3 * plain)
        assert not differences(before, everything(model))
        exactly(gradient(model, x), plain)

    @each_order
    def test_comes_between_two_and_all_go_in_any_order(self, kind, order, model, x):
        before, plain = everything(model), gradient(model, x)
        first = kind.enter(model, times(2))
        put_back = wrap(kind.holder, 7)
        second = kind.enter(model, times(3))
        closely(gradient(model, x), 42 * plain)
        left = {0: 2, 1: 3, 2: 7}
        leave = [first.remove, second.remove, put_back]
        for index in order:
            leave[index]()
            del left[index]
            if 2 in left:  # what it puts back may be what the second one stands on
                closely(gradient(model, x), math.prod(left.values()) * plain)
        exactly(gradient(model, x), plain)
        del first, second, put_back, leave
        gc.collect()  # who holds ours still would be told of
        with kind.enter(model, times(3)):
            closely(gradient(model, x), 3 * plain)
        assert not differences(before, everything(model))
        exactly(gradient(model, x), plain)


def test_class_hears_of_its_subclasses_as_another_party_has_said_meanwhile(model, x):
    told = []
    block = functions().Block
    with go.override({block: times(2)}):
        gradient(model, x)
        block.__init_subclass__ = classmethod(lambda cls: told.append(cls.__name__))
    type("Later", (block,), {})
    assert told == ["Later"]
    assert isinstance(vars(block)["__init_subclass__"], classmethod)


def test_class_hears_of_its_subclasses_as_it_did(package, x):
    told = []

    class Base(nn.Module):
        def __init_subclass__(cls, word="", **kwargs):
            super().__init_subclass__(**kwargs)
            told.append((cls.__name__, word))

        def forward(self, x):
            return 2 * x

    class Derived(Base, word="before"):
        pass

    before = [names_in(cls) for cls in (Base, Derived)]
    with go.override({Base: times(2)}):

        class Meanwhile(Base, word="meanwhile"):
            def forward(self, x):
                return 5 * super().forward(x)

        closely(gradient(Meanwhile(), x), 2 * 5 * gradient(Base(), x) / 2)
    assert [names_in(cls) for cls in (Base, Derived)] == before
    closely(gradient(Meanwhile(), x), 5 * gradient(Base(), x))

    class Later(Base, word="later"):
        pass

    assert told == [("Derived", "before"), ("Meanwhile", "meanwhile"), ("Later", "later")]


@pytest.mark.usefixtures("unchanged")
class TestModesOfOthers:
    class Listening(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    def test_entered_above_and_left_after(self, model, x):
        plain = gradient(model, x)
        first, second = go.override({F.relu: times(2)}), go.override({F.relu: times(3)})
        with self.Listening() as listening:
            closely(gradient(model, x), 6 * plain)
            first.remove()
            closely(gradient(model, x), 3 * plain)
            second.remove()
            assert torch.overrides._get_current_function_mode_stack() == [listening]
            exactly(gradient(model, x), plain)

    def test_entered_beneath_and_left_before(self, model, x):
        plain = gradient(model, x)
        listening = self.Listening()
        with listening:
            before = everything(model)
            handle = go.override({F.relu: times(2)})
            closely(gradient(model, x), 2 * plain)
            handle.remove()
            assert not differences(before, everything(model))

    @pytest.mark.parametrize("inner_of_model", [False, True])
    def test_left_while_the_model_runs(self, model, x, inner_of_model):
        plain = gradient(model, x)
        handle = go.override(*[model] * inner_of_model, {F.relu: times(2)})
        hook = model.block.register_forward_hook(lambda module, args, result: handle.remove())
        closely(gradient(model, x), 2 * plain)
        hook.remove()


@pytest.mark.parametrize("call", ["torch.autograd.grad", "backward"])
def test_function_removed_by_a_hook_in_a_backward_leaves_no_mode_when_it_comes_again(model, x, call):
    before, plain = everything(model), gradient(model, x)
    for _ in range(2):
        handle = go.override({F.relu: times(2)})
        result = model(x)
        result.register_hook(lambda grad, handle=handle: handle.remove())
        if call == "backward":
            result.sum().backward(inputs=[x])
        else:
            torch.autograd.grad(result.sum(), x)
        exactly(gradient(model, x), plain)
    with go.override({F.relu: times(3)}):
        closely(gradient(model, x), 3 * plain)
    assert not differences(before, everything(model))


# --- several on the same call

SAME_CALL = {
    "relu": ["function, in a model", "function, in the process"],
    "cube": [
        "path of a function, in a model",
        "path of a function, in the process",
        "path of a name that was imported",
    ],
    "step": ["path of a method, in a model", "path of a method, in the process"],
    "still": ["path of a static method", "path of a static method, in a model"],
    "forward": ["path of a forward", "path of a class, in a model", "path of a class, in the process"],
    "tanh": ["glob", "class of torch, in a model", "class of torch, in the process"],
}


@no_cache_is_found
@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize("names", SAME_CALL.values(), ids=SAME_CALL)
def test_overrides_of_several_kinds_come_and_go_in_any_order(names, model, x):
    plain = gradient(model, x)
    kinds = [(KINDS[name], prime) for name, prime in zip(names, PRIMES, strict=False)]
    orders = [*itertools.permutations(kinds)]
    if names[0] == "path of a forward":  # it would stay inside of an earlier rule for the class, and is refused
        orders = [coming for coming in orders if coming[0] == kinds[0]]
    for coming in orders:
        for going in (coming, coming[::-1], coming[1:] + coming[:1]):
            handles = {kind: kind.enter(model, times(prime)) for kind, prime in coming}
            left = dict(kinds)
            for kind, _ in going:
                closely(gradient(model, x), math.prod(left.values()) * plain)
                handles[kind].remove()
                del left[kind]


@pytest.mark.usefixtures("unchanged")
def test_what_an_override_holds_is_not_told_of(model, x, request):
    gc.unfreeze()
    request.addfinalizer(gc.freeze)
    plain = gradient(model, x)
    handles = [go.override({f"{BLOCK}.forward": times(7)})]
    handles += [go.override(model, {BLOCK: times(2), CUBE: times(3)}), go.override({BLOCK: times(5)})]
    closely(gradient(model, x), 30 * 7 * plain)
    handles += [go.override({CUBE: times(11)})]
    closely(gradient(model, x), 30 * 77 * plain)
    for handle in handles:
        handle.remove()
    with go.override({CUBE: times(2)}), go.override({f"{BLOCK}.forward": times(3)}):
        closely(gradient(model, x), 6 * plain)


@no_cache_is_found
@pytest.mark.usefixtures("unchanged")
def test_all_kinds_at_once_go_in_the_order_in_which_they_came(model, x):
    plain, factor, handles = gradient(model, x), 1.0, []
    for kind, prime in zip(KINDS.values(), PRIMES, strict=True):
        handles.append(kind.enter(model, times(prime)))
        factor *= prime
        closely(gradient(model, x), factor * plain)
    for handle, prime in zip(handles, PRIMES, strict=True):
        handle.remove()
        factor /= prime
        closely(gradient(model, x), factor * plain)


@no_cache_is_found
@given(steps=st.lists(st.integers(0, len(KINDS) - 1), min_size=2, max_size=8))
@settings(
    derandomize=True,
    deadline=None,
    max_examples=40,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@pytest.mark.usefixtures("unchanged")
def test_any_that_come_and_go_give_the_gradient_of_those_in_force(model, x, steps):
    kinds = list(KINDS.values())
    before, plain, in_force = everything(model), gradient(model, x), {}
    for step in steps:
        if step in in_force:
            in_force.pop(step).remove()
        elif kinds[step].target == f"{BLOCK}.forward" and any(kinds[index].target == BLOCK for index in in_force):
            with pytest.raises(go.UnsupportedError, match="would stay inside"):
                kinds[step].enter(model, times(PRIMES[step]))
        else:
            in_force[step] = kinds[step].enter(model, times(PRIMES[step]))
        closely(gradient(model, x), float(math.prod(PRIMES[index] for index in in_force)) * plain)
    for handle in in_force.values():
        handle.remove()
    assert not differences(before, everything(model))


METHODS = {"method": "step", "static method": "still", "class method": "of_class"}


@pytest.mark.parametrize("name", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("last_out", ["base", "derived"])
@pytest.mark.parametrize("first_in", ["base", "derived"])
def test_method_of_a_class_and_of_one_derived_from_it(name, first_in, last_out, model, x):
    block, derived = functions().Block(), functions().Derived()
    before, plain = everything(model), gradient(getattr(block, name), x)
    rules = {"base": {f"{BLOCK}.{name}": times(2)}, "derived": {f"elsewhere.functions:Derived.{name}": times(3)}}
    handles = {which: go.override(rules[which]) for which in sorted(rules, key=lambda which: which != first_in)}
    closely(gradient(getattr(block, name), x), 2 * plain)
    closely(gradient(getattr(derived, name), x), 6 * plain)
    for which in sorted(rules, key=lambda which: which == last_out):
        handles.pop(which).remove()
        closely(gradient(getattr(block, name), x), (2 if "base" in handles else 1) * plain)
        left = (2 if "base" in handles else 1) * (3 if "derived" in handles else 1)
        closely(gradient(getattr(derived, name), x), left * plain)
    assert not differences(before, everything(model))
    assert name not in vars(functions().Derived)


# --- names that others have


@pytest.mark.usefixtures("unchanged")
def test_names_by_which_others_have_imported_it(model, x):
    plain = gradient(users().uses, x)
    for path in (CUBE, "elsewhere.users:cube", "elsewhere.users:renamed"):
        with go.override({path: times(2)}):
            for call in (functions().cube, users().uses, users().cube):
                closely(gradient(call, x), 2 * plain)


@each_order
def test_name_of_a_module_that_is_imported_while_it_is_in_force(order, model, x):
    before, plain = everything(model), gradient(users().uses, x)
    original = functions().cube
    handles = [go.override({path: times(factor)}) for path, factor in ((CUBE, 2), ("elsewhere.users:cube", 3))]
    late = importlib.import_module("elsewhere.late")
    handles.append(go.override({"elsewhere.late:imported_later": times(5)}))
    left = {0: 2, 1: 3, 2: 5}
    for index in order:
        for call in (late.late, users().uses):
            closely(gradient(call, x), math.prod(left.values()) * plain)
        handles[index].remove()
        del left[index]
    assert late.imported_later is original
    assert set(differences(before, everything(model))) == {"names of elsewhere.late", "names of elsewhere"}


def test_names_of_others_are_reached_again_when_another_party_has_put_ours_back(model, x):
    before, plain = everything(model), gradient(users().uses, x)
    with go.override({CUBE: times(2)}):
        gradient(model, x)
        put_back = wrap(CUBE, 7)
    put_back()
    exactly(gradient(users().uses, x), plain)
    with go.override({CUBE: times(2)}):
        for call in (functions().cube, users().uses, users().cube):
            closely(gradient(call, x), 2 * plain)
    assert not differences(before, everything(model))


def test_class_is_again_one_call_of_its_function_when_another_party_has_put_ours_back(x):
    plain = gradient(F.relu, x)
    with go.override({nn.ReLU: times(2)}):
        gradient(nn.ReLU(), x)
        put_back = wrap("torch.nn:ReLU.forward", 7)
    put_back()
    with go.override({nn.ReLU: times(2), F.relu: times(2)}):
        closely(gradient(nn.ReLU(), x), 2 * plain)
        closely(gradient(F.relu, x), 2 * plain)
    exactly(gradient(nn.ReLU(), x), plain)


# --- what is imported later


def quietly(handle):
    with pytest.warns(go.GradOverrideWarning, match="never ran"):
        handle.remove()


@pytest.mark.usefixtures("package")
class TestWhatIsImportedLater:
    @each_order
    def test_some_go_before_the_import_and_the_others_in_any_order(self, order, x):
        handles = [go.override({CUBE: times(factor)}) for factor in (2, 3, 5)]
        quietly(handles[order[0]])
        plain = gradient(lambda x: x**3, x)
        left = {index: (2, 3, 5)[index] for index in order[1:]}
        for index in order[1:]:
            closely(gradient(functions().cube, x), math.prod(left.values()) * plain)
            handles[index].remove()
            del left[index]
        exactly(gradient(functions().cube, x), plain)
        assert functions().cube.__code__.co_filename.endswith("functions.py")

    @pytest.mark.parametrize("path", [CUBE, BLOCK, f"{BLOCK}.step", f"{BLOCK}.still", f"{BLOCK}.of_class"])
    def test_is_as_if_it_had_been_imported_without(self, path, x):
        shape = {cls: list(vars(cls)) for cls in (functions().Block, functions().Derived)}
        names = list(vars(functions()))
        for name in ("elsewhere.functions", "elsewhere.users"):
            sys.modules.pop(name, None)
        handle = go.override({path: times(2)})
        model = users().Model().double()
        found = gradient(model, x)
        handle.remove()
        closely(found, 2 * gradient(model, x))
        assert {name: list(vars(vars(functions())[name])) for name in ("Block", "Derived")} == {
            cls.__name__: names for cls, names in shape.items()
        }
        assert list(vars(functions())) == names

    def test_imported_in_another_thread(self, x):
        handle = go.override({CUBE: times(2)})
        in_a_thread(functions)
        found = gradient(functions().cube, x)
        handle.remove()
        closely(found, 2 * gradient(functions().cube, x))

    def test_is_overridden_when_the_handle_was_dropped(self, x):
        go.override({CUBE: times(2)})
        gc.collect()
        closely(gradient(functions().cube, x), 2 * gradient(lambda x: x**3, x))
        for layer in path_patch.layers_on_paths():  # nobody else can
            path_patch.take_off_path(layer)
        imports._waiting.clear()
        sys.meta_path.remove(imports._finder)

    def test_name_that_is_not_there_is_not_told_of_when_the_override_has_gone(self):
        quietly(go.override({"elsewhere.functions:cub": times(2)}))
        functions()

    def test_class_that_a_model_was_to_have_is_told_of_and_others_are_as_ever(self, x):
        model = nn.Sequential(nn.ReLU())
        handle = go.override(model, {BLOCK: times(2), nn.ReLU: times(3)})
        with pytest.warns(go.GradOverrideWarning, match=r"path 'elsewhere.functions:Block'.*class of modules"):
            block = functions().Block()
        plain = gradient(lambda x: -2.5 * (1.5 * x**3 - 0.5), x)
        closely(gradient(block, x), plain)
        closely(gradient(model, x), 3 * gradient(F.relu, x))
        quietly(handle)
        closely(gradient(block, x), plain)


# --- what is refused half-way


class Frozen(types.ModuleType):
    def __setattr__(self, name, value):
        raise ZeroDivisionError


def refused_by_a_module_that_lets_nothing_be_set(monkeypatch):
    frozen = Frozen("elsewhere_frozen")
    frozen.__dict__["broken"] = functions().broken
    monkeypatch.setitem(sys.modules, "elsewhere_frozen", frozen)
    return {"elsewhere.functions:broken": times(2)}, ZeroDivisionError


def refused_by_a_class_that_cannot_be_changed(monkeypatch):
    return {"builtins:str.upper": times(2)}, TypeError


def refused_for_what_somebody_has_put_on_an_instance(monkeypatch):
    module = nn.Softplus()
    module.forward = lambda x: x
    monkeypatch.setattr(functions(), "kept", module, raising=False)
    return {nn.Softplus: times(2)}, go.UnsupportedError


def asking(grad_output, nothing_of_this_name):
    return grad_output


REFUSED = {
    "module that lets nothing be set": refused_by_a_module_that_lets_nothing_be_set,
    "class that cannot be changed": refused_by_a_class_that_cannot_be_changed,
    "forward on an instance": refused_for_what_somebody_has_put_on_an_instance,
    "name of a path": lambda monkeypatch: ({f"{BLOCK}.stp": times(2)}, go.TargetNotFoundError),
    "module of a path": lambda monkeypatch: ({"elsewhere.nowhere:cube": times(2)}, go.TargetNotFoundError),
    "no path": lambda monkeypatch: ({"elsewhere:functions:cube": times(2)}, go.TargetError),
    "rule of a path": lambda monkeypatch: ({CUBE: asking}, go.RuleSignatureError),
    "rule of a function": lambda monkeypatch: ({torch.tanh: asking}, go.RuleSignatureError),
    "glob without a model": lambda monkeypatch: ({"act": times(2)}, go.TargetError),
}


@no_cache_is_found
@pytest.mark.parametrize("refused", REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("in_force", [False, True])
def test_override_of_several_of_which_the_last_is_refused_has_changed_nothing(refused, in_force, model, x, monkeypatch):
    handles = [go.override({nn.Tanh: times(2), CUBE: times(3), F.relu: times(5)})] if in_force else []
    rules, error = refused(monkeypatch)
    gradients = gradient(model, x)
    apart = (*rules, f"{BLOCK}.forward")  # which goes with no rule for the class
    several = {kind.target: times(7) for kind in KINDS.values() if kind.where == "process" and kind.target not in apart}
    for first in ({}, several):
        before = everything(model)
        with pytest.raises(error):
            go.override({**first, **rules})
        assert not differences(before, everything(model))
        exactly(gradient(model, x), gradients)
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize(
    "rules",
    [{f"{BLOCK}.stp": times(2)}, {CUBE: asking}, {"nowhere": times(2)}, {nn.Linear: asking}, {torch.tanh: asking}],
    ids=["name of a path", "rule of a path", "glob", "rule of a class", "rule of a function"],
)
@pytest.mark.usefixtures("unchanged")
def test_override_in_a_model_of_which_the_last_is_refused_has_changed_nothing(rules, model):
    several = {kind.target: times(7) for kind in KINDS.values() if kind.where == "model"}
    with pytest.raises(go.GradOverrideError):
        go.override(model, {**several, **rules})


@pytest.mark.usefixtures("unchanged")
def test_warning_that_is_an_error_has_changed_nothing(model, x):
    plain, kept = gradient(model, x), [functions().Block.step]
    with pytest.raises(go.GradOverrideWarning, match="also held by a list"):
        go.override({nn.Tanh: times(2), F.relu: times(3), CUBE: times(5), f"{BLOCK}.step": times(7)})
    exactly(gradient(model, x), plain)
    assert kept


# --- presets and registries

PRESETS = ["guided_backprop", "deconvnet", "epsilon_plus", "epsilon_alpha2_beta1"]


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("by_name", [True, False])
@pytest.mark.parametrize("in_the_process", [True, False])
@pytest.mark.filterwarnings("ignore:.*never ran:gradoverride.GradOverrideWarning")
class TestPresets:
    def entered(self, model, name, by_name, in_the_process):
        rules = name if by_name else getattr(go.presets, name)
        return go.override(rules) if in_the_process else go.override(model, rules)

    def test_come_and_go(self, model, x, name, by_name, in_the_process):
        plain, before = gradient(model, x), everything(model)
        with self.entered(model, name, by_name, in_the_process):
            assert not torch.equal(gradient(model, x), plain)
            assert differences(before, everything(model))

    def test_go_with_an_exception(self, model, x, name, by_name, in_the_process):
        with pytest.raises(ZeroDivisionError), self.entered(model, name, by_name, in_the_process):
            model(x[:2])

    def test_go_out_of_order_with_others(self, model, x, name, by_name, in_the_process):
        plain = gradient(model, x)
        first = go.override({CUBE: times(2)})
        preset = self.entered(model, name, by_name, in_the_process)
        second = go.override(model, {f"{BLOCK}.step": times(3)})
        gradient(model, x)
        first.remove()
        gradient(model, x)
        preset.remove()
        closely(gradient(model, x), 3 * plain)
        second.remove()


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize("in_the_process", [True, False])
def test_registry_of_several_kinds_comes_and_goes(model, x, in_the_process):
    plain = gradient(model, x)
    registry = go.Registry("several", {torch.relu: times(2), CUBE: times(3)})
    registry.register(nn.Tanh, f"{BLOCK}.step")(times(5))
    for _ in range(2):
        with go.override(registry) if in_the_process else go.override(model, registry | {nn.Linear: times(7)}):
            closely(gradient(model, x), 2 * 3 * 5 * 5 * (1 if in_the_process else 7) * plain)
        exactly(gradient(model, x), plain)


@pytest.mark.usefixtures("unchanged")
def test_rule_that_a_registry_gets_meanwhile_is_not_in_force_and_goes_with_it(model, x):
    plain, registry = gradient(model, x), go.Registry("growing", {torch.relu: times(2)})
    with go.override(registry):
        registry.register(CUBE)(times(3))
        closely(gradient(model, x), 2 * plain)
        with go.override(registry):
            closely(gradient(model, x), 2 * 2 * 3 * plain)
        closely(gradient(model, x), 2 * plain)


@pytest.mark.usefixtures("unchanged")
def test_remove_overrides_of_the_model_leaves_the_process_and_what_is_left_goes(model, x):
    plain = gradient(model, x)
    handles = [go.override(model, {CUBE: times(2), F.relu: times(3)}), go.override({CUBE: times(5), nn.Tanh: times(7)})]
    closely(gradient(model, x), 210 * plain)
    go.remove_overrides(model)
    closely(gradient(model, x), 35 * plain)
    for handle in handles:
        handle.remove()
