"""After an override the model is as before, whatever happened meanwhile. Contract, section 5."""

import abc
import copy
import dataclasses
import functools
import gc
import io
import pickle
import types
import typing
import weakref
from contextlib import nullcontext
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from oracles import closely, exactly, noise
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import CheckpointError, checkpoint

import gradoverride as go
from overrides.models import Branching, doubled, gradient, guided, guided_by_hand, mlp, tripled

RULES = {nn.ReLU: guided, nn.Linear: doubled}


@pytest.fixture
def model():
    return mlp()


@pytest.fixture
def x():
    return noise(5, 3)


def state_of(model):
    """All that an override might touch: classes, attributes, tables, hooks, parameters by identity, keys."""
    classes = {cls: dict(cls.__dict__) for module in model.modules() for cls in type(module).__mro__}
    return {
        "types": [type(module) for module in model.modules()],
        "bases": [type(module).__mro__ for module in model.modules()],
        "attributes": [{name: id(value) for name, value in module.__dict__.items()} for module in model.modules()],
        "tables": [
            {
                table: {name: id(v) for name, v in module.__dict__[table].items()}
                for table in ("_parameters", "_modules")
            }
            for module in model.modules()
        ],
        "hooks": [len(module._forward_hooks) + len(module._backward_hooks) for module in model.modules()],
        "state_dict": list(model.state_dict()),
        "parameters": [id(parameter) for parameter in model.parameters()],
        "classes": classes,
    }


@pytest.fixture
def unchanged(model, x):
    """Fails where the model is not as before, in all that can be seen and in its gradient."""
    before, plain = state_of(model), gradient(model, x)
    yield
    assert state_of(model) == before
    exactly(gradient(model, x), plain)


@pytest.mark.usefixtures("unchanged")
class TestModelIsAsBefore:
    def test_after_the_context(self, model, x):
        with go.override(model, RULES):
            gradient(model, x)

    def test_after_remove_twice(self, model, x):
        handle = go.override(model, RULES)
        gradient(model, x)
        handle.remove()
        handle.remove()

    def test_after_remove_inside_the_context(self, model, x):
        with go.override(model, RULES) as handle:
            gradient(model, x)
            handle.remove()

    def test_after_an_exception_in_the_body(self, model):
        with pytest.raises(ZeroDivisionError), go.override(model, RULES):
            raise ZeroDivisionError

    def test_after_an_exception_in_a_forward(self, model):
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), go.override(model, RULES):
            model(noise(5, 7))

    def test_after_an_exception_in_a_rule(self, model, x):
        def raising(grad_output):
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError), go.override(model, {nn.ReLU: raising}):
            gradient(model, x)

    def test_after_removal_in_any_order(self, model, x):
        plain = gradient(model, x)
        first = go.override(model, {"3": doubled})
        second = go.override(model, {"3": tripled})
        third = go.override(model, {"3": doubled})
        closely(gradient(model, x), 12 * plain)
        second.remove()
        exactly(gradient(model, x), 4 * plain)
        first.remove()
        exactly(gradient(model, x), 2 * plain)
        third.remove()

    def test_after_remove_overrides(self, model, x):
        handle = go.override(model, RULES)
        go.override(model, {"3": tripled})
        go.remove_overrides(model)
        assert str(go.explain(model)) == "nothing is overridden"
        handle.remove()

    def test_after_an_override_that_was_refused(self, model):
        with pytest.raises(go.TargetNotFoundError):
            go.override(model, {**RULES, "nowhere": guided})

    def test_after_one_whose_classes_let_nobody_derive_from_them(self, model):
        class Closed(type):
            def mro(cls):
                if any(isinstance(base, Closed) for base in cls.__bases__):
                    raise TypeError("closed")
                return super().mro()

        class Own(nn.ReLU, metaclass=Closed):
            pass

        module = Own()
        before = dict(module.__dict__)
        with pytest.raises(TypeError, match="closed"):
            go.override(nn.Sequential(model, module), {**RULES, "1": guided})
        assert (type(module), module.__dict__) == (Own, before)


# --- what a context decides ---


def test_backward_after_the_context_has_the_rules_of_its_forward(model, x):
    expected = gradient(guided_by_hand(mlp()), x)
    with go.override(model, {nn.ReLU: guided}):
        result = model(x)
    weights = torch.linspace(-1, 1, result.numel(), dtype=result.dtype).view_as(result)
    exactly(torch.autograd.grad((result * weights).sum(), x)[0], expected)


def test_forward_before_the_context_keeps_its_own_gradient(model, x):
    expected = gradient(model, x)
    result = model(x)
    with go.override(model, {nn.ReLU: guided}):
        weights = torch.linspace(-1, 1, result.numel(), dtype=result.dtype).view_as(result)
        exactly(torch.autograd.grad((result * weights).sum(), x)[0], expected)
        model(x)


def test_value_under_an_override_is_the_plain_one(model, x):
    plain = model(x)
    with go.override(model, RULES):
        exactly(model(x), plain)
        with torch.no_grad():
            exactly(model(x), plain)


def test_keyword_arguments_dict_results_and_residual_use(x):
    model = Branching().double()
    by_hand = guided_by_hand(model)
    with go.override(model, {nn.ReLU: guided}):
        exactly(gradient(model, x), gradient(by_hand, x))
    plain = gradient(lambda x: model(x, scale=2.0), x)
    with go.override(model, {model: doubled}):
        exactly(gradient(lambda x: model(x, scale=2.0), x), 2 * plain)


def test_outer_rule_has_the_gradient_of_the_inner_one_as_its_vjp(model, x):
    seen = []

    def outer(grad_output, vjp):
        seen.append(vjp(grad_output))
        return seen[-1]

    by_hand = guided_by_hand(mlp())
    with go.override(model, {nn.ReLU: guided}), go.override(model, {nn.ReLU: outer}):
        exactly(gradient(model, x), gradient(by_hand, x))
    assert len(seen) == 2


def test_parameters_keep_their_gradients_and_an_optimizer_its_parameters(model, x):
    plain = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with go.override(model, {nn.Linear: lambda grad_output, vjp: vjp(grad_output)}):
        model(x).sum().backward()
        optimizer.step()
    plain(x).sum().backward()
    torch.optim.SGD(plain.parameters(), lr=0.1).step()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        exactly(ours.grad, theirs.grad)
        exactly(ours.data, theirs.data)


# --- copies ---

COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": lambda model: saved_and_loaded(model),
    "state_dict of a deepcopy": lambda model: reloaded(model),
}


def saved_and_loaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def reloaded(model):
    other = copy.deepcopy(model)
    other.load_state_dict(model.state_dict())
    return other


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_copy_has_the_override_for_good_and_its_own_weights(model, x, copied):
    by_hand = guided_by_hand(mlp())
    with go.override(model, {nn.ReLU: guided, "0": doubled}):
        other = copied(model)
        gradient(model, x)
    with torch.no_grad():
        other[0].weight.mul_(3)
        by_hand[0].weight.mul_(3)
    exactly(gradient(other, x), 2 * gradient(by_hand, x))
    assert list(other.state_dict()) == list(model.state_dict())
    go.remove_overrides(other)
    assert [type(module) for module in other.modules()] == [type(module) for module in mlp().modules()]


class OwnRule(nn.Module):
    """A model with a method for a rule, which reads what the model holds."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
        self.tanh = nn.Tanh()

    def forward(self, x):
        return self.tanh(x) + torch.sin(x)

    def scaled(self, grad_output, vjp):
        return vjp(grad_output * self.scale.detach())


def sum_gradient(model, x):
    return gradient(model, x, weights=torch.ones_like(x))


@pytest.mark.parametrize("target", ["tanh", torch.sin], ids=["module", "function"])
@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_rule_that_is_a_method_of_the_model_is_in_a_copy_that_of_the_copy(copied, target, x):
    model = OwnRule()
    plain = {"tanh": 1 - x.tanh() ** 2, torch.sin: torch.cos(x)}
    ruled = plain.pop(target)
    (rest,) = plain.values()
    handle = go.override(model, {target: model.scaled})
    other = copied(model)
    with torch.no_grad():
        other.scale.fill_(5.0)
    closely(sum_gradient(model, x), 2 * ruled + rest)
    closely(sum_gradient(other, x), 5 * ruled + rest)
    handle.remove()
    closely(sum_gradient(copied(other), x), 5 * ruled + rest)


def test_rule_that_is_a_method_of_something_else_is_shared_by_a_copy(x):
    holder, model = OwnRule(), OwnRule()
    handle = go.override(model, {"tanh": holder.scaled})
    other = copy.deepcopy(model)
    with torch.no_grad():
        holder.scale.fill_(5.0)
    for module in (model, other):
        closely(sum_gradient(module, x), 5 * (1 - x.tanh() ** 2) + torch.cos(x))
    handle.remove()


def test_shallow_copy_has_the_override_of_its_own(x):
    module = nn.Linear(3, 3).double()
    plain = gradient(module, x)
    handle = go.override(module, {module: doubled})
    other = copy.copy(module)
    gradient(module, x)
    handle.remove()
    exactly(gradient(other, x), 2 * plain)
    exactly(gradient(module, x), plain)
    go.remove_overrides(other)
    exactly(gradient(other, x), plain)


class Owning(nn.Linear):
    """A module that knows how it was made."""

    def __init__(self, width=3):
        super().__init__(width, width)
        self.double()
        self.width = width

    def forward(self, x):
        return super().forward(x).tanh()

    def again(self):
        made = type(self)(self.width)
        made.load_state_dict(self.state_dict())
        return made


class ByName(Owning):
    def __deepcopy__(self, memo):
        made = ByName(self.width)
        made.load_state_dict(self.state_dict())
        return made

    def __copy__(self):
        return self.again()


class ByDict(Owning):
    def __deepcopy__(self, memo):
        made = self.__class__.__new__(self.__class__)
        memo[id(self)] = made
        made.__dict__ = copy.deepcopy(self.__dict__, memo)
        return made

    def __copy__(self):
        made = type(self).__new__(type(self))
        made.__dict__.update(self.__dict__)
        return made


class ByState(Owning):
    def __getstate__(self):
        return {"width": self.width, "tensors": self.state_dict()}

    def __setstate__(self, state):
        self.__init__(state["width"])
        self.load_state_dict(state["tensors"])


class ByWholeState(Owning):
    def __getstate__(self):
        return self.__dict__

    def __setstate__(self, state):
        self.__dict__ = dict(state)


class ByStateWithin(Owning):
    def __getstate__(self):
        return {"all": dict(self.__dict__)}

    def __setstate__(self, state):
        self.__dict__.update(state["all"])


class ByArguments(Owning):
    def __reduce__(self):
        return type(self), (self.width,), self.state_dict()

    def __setstate__(self, state):
        self.load_state_dict(state)


class ByFunction(Owning):
    def __reduce_ex__(self, protocol):
        return made_by_function, (self.width, self.state_dict())


def made_by_function(width, tensors):
    made = ByFunction(width)
    made.load_state_dict(tensors)
    return made


class ByNewArguments(Owning):
    def __new__(cls, width=3):
        assert width == 3
        return super().__new__(cls)

    def __getnewargs_ex__(self):
        return (), {"width": 3}


class Knowing(Owning):
    """A module with itself in its state."""

    def __init__(self, width=3):
        super().__init__(width)
        self.myself = [self]


OWNING = [
    Owning,
    ByName,
    ByDict,
    ByState,
    ByWholeState,
    ByStateWithin,
    ByArguments,
    ByFunction,
    ByNewArguments,
    Knowing,
]
SINGLY = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "in a deepcopy": lambda module: copy.deepcopy(nn.Sequential(module))[0],
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "pickle of protocol 0": lambda module: pickle.loads(pickle.dumps(module, protocol=0)),
    "torch.save": lambda module: saved_and_loaded(module),
    "copy of a copy": lambda module: copy.copy(copy.deepcopy(pickle.loads(pickle.dumps(module)))),
}


@pytest.mark.parametrize("target", [Owning, torch.tanh], ids=["class", "function"])
@pytest.mark.parametrize("copied", SINGLY.values(), ids=SINGLY)
@pytest.mark.parametrize("cls", OWNING)
def test_module_that_copies_itself_in_its_own_way_keeps_the_override(cls, copied, target, x):
    torch.manual_seed(3)
    module = cls()
    plain = gradient(module, x)
    handle = go.override(module, {target: doubled})
    other = copied(module)
    exactly(gradient(module, x), 2 * plain)
    handle.remove()
    exactly(gradient(module, x), plain)
    assert type(module) is cls
    exactly(gradient(other, x), 2 * plain)
    assert isinstance(other, cls)
    if cls is Knowing and copied is not copy.copy:
        assert other.myself[0] is not module
    if copied is not copy.copy:  # which shares the weights
        with torch.no_grad():
            other.weight.mul_(3)
        exactly(gradient(module, x), plain)
    go.remove_overrides(other)
    assert type(other) is cls
    assert "_gradoverride" not in other.__dict__


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy])
def test_parametrized_module_that_copies_itself_keeps_the_override(copied, x):
    class Tripled(nn.Module):
        def forward(self, weight):
            return 3 * weight

    module = ByDict()
    parametrize.register_parametrization(module, "weight", Tripled())
    plain = gradient(module, x)
    handle = go.override(module, {module: doubled})
    other = copied(module)
    gradient(module, x)
    handle.remove()
    exactly(gradient(module, x), plain)
    exactly(gradient(other, x), 2 * plain)


class ToAnother(Owning):
    def __deepcopy__(self, memo):
        return "a copy"

    def __reduce__(self):
        return "ONLY_ONE"


ONLY_ONE = ToAnother()


def test_copy_that_cannot_keep_the_override_is_an_error(x):
    start = "override of a 'ToAnother': a copy must be a module that runs the forward of its class.*; "
    with go.override(ONLY_ONE, {ONLY_ONE: doubled}):
        gradient(ONLY_ONE, x)
        with pytest.raises(go.UnsupportedError, match=start + "__deepcopy__ of its class gives a str"):
            copy.deepcopy(ONLY_ONE)
        for copied in (copy.copy, pickle.dumps):
            with pytest.raises(go.UnsupportedError, match=start + "__reduce__ of its class gives the name 'ONLY_ONE'"):
                copied(ONLY_ONE)
    assert copy.deepcopy(ONLY_ONE) == "a copy"
    assert copy.copy(ONLY_ONE) is ONLY_ONE


def replica_of(module):
    """As DataParallel makes it: the parameters are plain attributes, computed from those of the module."""
    replica = module._replicate_for_data_parallel()
    replica._former_parameters = {}
    for name, parameter in module.named_parameters():
        copied = 2 * parameter
        setattr(replica, name, copied)
        replica._former_parameters[name] = copied
    return replica


def asking(grad_output, input, weight, bias):
    return {"input": 2 * grad_output @ weight, "weight": 2 * grad_output.T @ input, "bias": 2 * grad_output.sum(0)}


@pytest.mark.parametrize("rule", [doubled, asking], ids=["vjp", "by name"])
def test_replica_for_data_parallel_has_the_override_and_its_own_weights(rule, x):
    module = nn.Linear(3, 3).double()
    plain = copy.deepcopy(module)
    left = 1 if rule is doubled else 2  # parameters that the rule does not answer for keep autograd's own gradient
    expected = [
        factor * grad for factor, grad in zip((2, left, left), gradients_of(replica_of(plain), plain, x), strict=True)
    ]
    with go.override(module, {module: rule}):
        found = gradients_of(replica_of(module), module, x)
    for ours, theirs in zip(found, expected, strict=True):
        closely(ours, theirs)


def gradients_of(replica, module, x):
    return torch.autograd.grad(replica(x).square().sum(), [x, *module.parameters()])


def test_lambda_in_a_pickle_is_an_error(model):
    with go.override(model, {"3": lambda grad_output, vjp: vjp(grad_output)}):
        with pytest.raises((AttributeError, pickle.PicklingError)):
            pickle.dumps(model)
        model(noise(5, 3))


def test_slice_of_an_overridden_module_is_pickled_as_one_of_its_class(x):
    model = nn.Sequential(nn.Tanh(), nn.ReLU(), nn.Tanh())
    with go.override(model, {model: doubled}):
        part = model[:2]
        model(x)
    for copied in (copy.deepcopy(part), pickle.loads(pickle.dumps(part))):
        assert type(copied) is nn.Sequential
        exactly(gradient(copied, x), gradient(nn.Sequential(nn.Tanh(), nn.ReLU()), x))


def test_module_is_freed_without_the_collector(x):
    gc.collect()
    gc.disable()
    try:
        model = mlp()
        handle = go.override(model, RULES)
        model(x).sum().backward()
        reference = weakref.ref(model[1])
        del model
        assert reference() is None
        handle.remove()
    finally:
        gc.enable()


ENTERED = {
    "after it was left": (["with", "with"], "entered before"),
    "inside itself": (["with", "inside"], "entered before"),
    "after it was removed": (["remove", "with"], "removed"),
    "removed inside": (["with", "remove", "with"], "entered before"),
}


@pytest.mark.parametrize("where", ["model", "process"])
@pytest.mark.parametrize(("steps", "why"), ENTERED.values(), ids=ENTERED)
def test_override_that_is_entered_again_is_an_error(steps, why, where, x):
    module = nn.Tanh()
    plain = gradient(module, x)
    rules = {nn.Tanh: doubled}
    handle = go.override(module, rules) if where == "model" else go.override(rules)
    exactly(gradient(module, x), 2 * plain)
    for step in steps[:-1]:
        if step == "remove":
            handle.remove()
        else:
            with handle:
                exactly(gradient(module, x), 2 * plain)
                if steps[-1] == "inside":
                    _refused(handle, why)
                    exactly(gradient(module, x), 2 * plain)
    _refused(handle, why)
    handle.remove()
    exactly(gradient(module, x), plain)


def _refused(handle, why):
    text = rf"override of .*: it must be entered when it is made, and once; it has been {why}, .*Call go\.override\("
    with pytest.raises(go.UnsupportedError, match=text), handle:
        pytest.fail("entered")


# --- other parties ---


PARAMETRIZED = {
    "weight_norm": (parametrizations.weight_norm, lambda m: parametrize.remove_parametrizations(m, "weight")),
    "spectral_norm": (parametrizations.spectral_norm, lambda m: parametrize.remove_parametrizations(m, "weight")),
}


@pytest.mark.parametrize(("add", "drop"), PARAMETRIZED.values(), ids=PARAMETRIZED)
@pytest.mark.parametrize("first", ["override", "parametrization"])
@pytest.mark.parametrize("first_out", ["override", "parametrization"])
def test_parametrizations_and_overrides_come_and_go_in_any_order(add, drop, first, first_out, x):
    module = nn.Linear(3, 3).double().eval()
    original = type(module)
    if first == "override":
        handle = go.override(module, {module: doubled})
        add(module)
    else:
        add(module)
        parametrized = type(module)
        bases = parametrized.__bases__
        handle = go.override(module, {module: doubled})
    module.eval()
    weight, bias = module.weight.detach(), module.bias.detach()
    plain = gradient(lambda x: nn.functional.linear(x, weight, bias), x)
    exactly(gradient(module, x), 2 * plain)
    if first_out == "override":
        handle.remove()
        exactly(gradient(module, x), plain)
        if first == "parametrization":
            assert type(module) is parametrized
            assert parametrized.__bases__ == bases
        drop(module)
    else:
        drop(module)
        exactly(gradient(module, x), 2 * gradient(lambda x: nn.functional.linear(x, module.weight, module.bias), x))
        handle.remove()
    plain = gradient(lambda x: nn.functional.linear(x, module.weight, module.bias), x)
    exactly(gradient(module, x), plain)
    if (first, first_out) != ("override", "override"):
        assert type(module) is original


def test_copy_of_a_parametrized_module_keeps_its_override_when_the_original_loses_it(x):
    module = parametrizations.weight_norm(nn.Linear(3, 3).double())
    plain = gradient(module, x)
    handle = go.override(module, {module: doubled})
    other = copy.deepcopy(module)
    gradient(module, x)
    handle.remove()
    exactly(gradient(module, x), plain)
    exactly(gradient(other, x), 2 * plain)
    go.remove_overrides(other)
    exactly(gradient(other, x), plain)


class Listed(nn.Module):
    known: ClassVar = {}

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        Listed.known[cls.__name__] = cls


class Asking(nn.Module):
    def __init_subclass__(cls, *, tag):
        cls.tag = tag


class Final(nn.Module):
    def __init_subclass__(cls):
        if cls.__bases__ != (Final,):
            raise TypeError("it is final")


class Meta(type):
    made: ClassVar = []

    def __new__(mcs, name, bases, body, *, option):
        return super().__new__(mcs, name, bases, body)

    def __init__(cls, name, bases, body, *, option):
        super().__init__(name, bases, body)
        Meta.made.append(cls)

    def __setattr__(cls, name, value):
        raise TypeError("it is fixed")


class OfAbstract(nn.Module, abc.ABC):
    @abc.abstractmethod
    def forward(self, x): ...


class ListedAbstract(abc.ABC, nn.Module):
    def __init_subclass__(cls):
        Listed.known[cls.__name__] = cls


class MetaOfAbstract(abc.ABCMeta):
    def __new__(mcs, name, bases, body):
        raise TypeError("no more of them")


def class_with(base, **keywords):
    def fill(body):
        body["forward"] = lambda self, x: x.tanh()

    return types.new_class("Own", (base,), keywords, fill)


PARTICULAR = {
    "registry": lambda: class_with(Listed),
    "keyword": lambda: class_with(Asking, tag=1),
    "final": lambda: class_with(Final),
    "metaclass": lambda: class_with(nn.Module, metaclass=Meta, option=1),
    "abstract": lambda: class_with(OfAbstract),
    "abstract first, and registry": lambda: class_with(ListedAbstract),
    "metaclass of abstract classes": lambda: abc.ABCMeta.__new__(
        MetaOfAbstract, "Own", (nn.Module,), {"forward": lambda self, x: x.tanh()}
    ),
    "generic": lambda: types.new_class("Own", (nn.Tanh, typing.Generic[typing.TypeVar("T")])),
    "generic first": lambda: types.new_class("Own", (typing.Generic[typing.TypeVar("T")], nn.Tanh)),
    "slots": lambda: type("Own", (nn.Tanh,), {"__slots__": ("more",)}),
}


@pytest.mark.parametrize("make", PARTICULAR.values(), ids=PARTICULAR)
def test_class_is_not_told_of_the_one_that_its_modules_have_meanwhile(make, x):
    cls = make()
    known, made = dict(Listed.known), list(Meta.made)
    module = cls()
    plain = gradient(torch.tanh, x)
    with go.override(module, {cls: doubled}):
        assert isinstance(module, cls)
        assert type(type(module)) is type(cls)
        assert type(module).__bases__ == (cls,)
        assert type(module).__name__ == "Own"
        exactly(gradient(module, x), 2 * plain)
        assert (Listed.known, Meta.made) == (known, made)
    assert type(module) is cls
    exactly(gradient(module, x), plain)
    with pytest.raises(TypeError) if cls.__base__ is Final or type(cls) in (Meta, MetaOfAbstract) else nullcontext():
        types.new_class("Further", (cls,), {"tag": 1} if hasattr(cls, "tag") else {})  # as without an override


class Delegating(nn.Module):
    """A module that asks the one within for what it does not have."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, x):
        return 10 * self.inner(x)


def test_module_that_delegates_has_not_the_rules_of_the_one_within(x):
    module = Delegating(nn.Tanh())
    plain, value = gradient(module, x), module(x)
    handle = go.override(module, {module: doubled})
    exactly(gradient(module, x), 2 * plain)
    module.__class__ = type("FSDPDelegating", (type(module),), {})  # as `fully_shard` does
    handle.remove()
    exactly(gradient(module, x), plain)
    with go.override(module, {nn.Tanh: tripled}):
        exactly(module(x), value)
        closely(gradient(module, x), 3 * plain)
    exactly(gradient(module, x), plain)


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy])
def test_copy_of_a_module_whose_override_is_gone_and_that_another_party_has_derived_from(copied, x):
    module = nn.Linear(3, 3).double()
    plain = gradient(module, x)
    with go.override(module, {module: doubled}):
        module.__class__ = type("Theirs", (type(module),), {})
        gradient(module, x)
    other = copied(module)
    assert type(other) is type(module)
    assert vars(other).keys() == vars(module).keys()
    exactly(gradient(other, x), plain)


def test_forward_that_wraps_ours_on_the_instance_keeps_working_when_we_go(x):
    module = nn.Linear(3, 3).double()
    plain = gradient(module, x)
    handle = go.override(module, {module: doubled})
    inner = module.forward
    module.forward = lambda x: inner(x)
    exactly(gradient(module, x), 2 * plain)
    handle.remove()
    exactly(gradient(module, x), plain)
    del module.forward
    exactly(gradient(module, x), plain)
    assert type(module) is nn.Linear


def test_class_forward_replaced_while_overridden_is_called(x):
    class Own(nn.Linear):
        pass

    module = Own(3, 3).double()
    plain = gradient(module, x)
    with go.override(module, {module: doubled}):
        Own.forward = lambda self, input: 5 * nn.functional.linear(input, self.weight, self.bias)
        closely(gradient(module, x), 10 * plain)


def test_user_hooks_see_the_overridden_module(model, x):
    seen = []
    model[3].register_forward_hook(lambda module, args, result: seen.append(result))
    model[3].register_forward_pre_hook(lambda module, args: (2 * args[0],))
    plain = gradient(model, x)
    with go.override(model, {"3": doubled}):
        exactly(gradient(model, x), 2 * plain)
    assert len(seen) == 2


# --- the table ---


def test_table_says_what_is_overridden_and_how_often_it_ran(model, x):
    with go.override(model, {nn.ReLU: guided, "3": doubled}) as plan:
        model(x)
        model(x)
        lines = str(plan).splitlines()
        assert [line.split()[:2] for line in lines[1:]] == [["1", "ReLU"], ["2.1", "ReLU"], ["3", "Linear"]]
        assert "class 'ReLU'" in lines[1]
        assert "'guided' (" in lines[1]
        assert "models.py:" in lines[1]
        assert lines[1].endswith("  2")
        assert "glob '3'" in lines[3]
        assert str(go.explain(model)) == str(plan)
        assert plan._repr_html_().count("<tr>") == 4
        assert "&#x27;3&#x27;" in plan._repr_html_()
    assert str(plan).splitlines() == lines
    assert str(go.explain(model)) == "nothing is overridden"


def test_rule_that_never_ran_is_reported_when_it_is_removed(model, x):
    def unused(grad_output):
        return grad_output

    handle = go.override(model, {nn.ReLU: guided, "3": unused})
    model[:3](x)
    with pytest.warns(go.GradOverrideWarning, match=r"the rule 'unused' \(.*\) of the glob '3' never ran.*'3' was"):
        handle.remove()


def test_optional_rule_that_never_ran_is_not_reported(model, x):
    def unused(grad_output):
        return grad_output

    registry = go.Registry()
    registry.register("3", torch.tanh, optional=True)(unused)
    handle = go.override(model, registry)
    model[:3](x)
    handle.remove()  # a warning would be an error
    registry.register("3")(unused)
    handle = go.override(model, registry)
    with pytest.warns(go.GradOverrideWarning, match="the rule 'unused' .* never ran"):
        handle.remove()


def test_output_projection_of_attention_is_not_called_and_reported():
    attention = nn.MultiheadAttention(4, 2)
    handle = go.override(attention, {"out_proj": doubled})
    attention(*[torch.randn(3, 1, 4, requires_grad=True)] * 3)
    with pytest.warns(go.GradOverrideWarning, match="override the module around it"):
        handle.remove()


def uncompiled(grad_output, vjp):
    """A rule that no test has compiled: calls of compiled code are not counted, and so not missed."""
    return vjp(grad_output * 2)


WHERE = f"{uncompiled.__code__.co_filename}:{uncompiled.__code__.co_firstlineno}"


def test_output_projection_of_attention_is_reported_where_the_rule_has_run_for_other_modules():
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0)
    handle = go.override(layer, {nn.Linear: uncompiled})
    layer(torch.randn(3, 1, 4, requires_grad=True))
    with pytest.warns(go.GradOverrideWarning) as told:
        handle.remove()
    assert [str(warning.message) for warning in told] == [
        f"override of a 'TransformerEncoderLayer': the rule 'uncompiled' ({WHERE}) of the class 'Linear' does "
        "not reach 'self_attn.out_proj'; the 'MultiheadAttention' around it reads its parameters and does not call it. "
        "Override the module around it"
    ]


def test_projections_of_equal_blocks_are_reported_at_once():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0), 3, enable_nested_tensor=False)
    with pytest.warns(go.GradOverrideWarning) as told, go.override(encoder, {nn.Linear: uncompiled}):
        encoder(torch.randn(3, 1, 4, requires_grad=True))
    assert [str(warning.message).partition(" of the class ")[2] for warning in told] == [
        "'Linear' does not reach 'layers.0.self_attn.out_proj' and 2 more; the 'MultiheadAttention' around it reads "
        "its parameters and does not call it. Override the module around it"
    ]


class Heads(nn.Module):
    """One of its heads is not called now; of the last the weight is read besides."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = [nn.Linear(3, 3) for _ in range(3)]

    def forward(self, x, which="first"):
        x = x.to(self.third.weight.dtype)
        return self.third(x) if which == "third" else getattr(self, which)(x)


def test_module_that_may_be_called_and_was_not_is_not_reported():
    model = Heads()
    with go.override(model, {nn.Linear: doubled}):  # a warning would be an error
        model(torch.randn(3, requires_grad=True))


class Dispatching(nn.Module):
    """Reads a weight by the way, and calls what it is told by its name."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x, second=False):
        return getattr(self, "second" if second else "first")(x.to(self.second.weight.dtype))


def test_module_whose_name_is_spelt_out_is_not_reported():
    model = Dispatching()
    with go.override(model, {nn.Linear: doubled}):
        model(torch.randn(3, requires_grad=True))


def test_output_projection_is_not_reported_where_the_attention_has_a_rule():
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0)
    with go.override(layer, {nn.Linear: doubled, nn.MultiheadAttention: lambda grad_output, vjp: vjp(grad_output)}):
        layer(torch.randn(3, 1, 4, requires_grad=True))


def test_module_that_was_replaced_is_reported_as_never_called(model, x):
    handle = go.override(model, {"3": uncompiled})
    model[3] = nn.Sigmoid()  # nobody else has the module that was there
    model(x)
    with pytest.warns(go.GradOverrideWarning, match="never ran while it was in force; '3' was not called"):
        handle.remove()


def test_module_that_was_called_and_is_gone_is_not_reported(model, x):
    handle = go.override(model, {"3": uncompiled})
    model(x)
    model[3] = nn.Sigmoid()
    assert [row.calls for row in handle.table] == ["1"]
    handle.remove()  # a warning would be an error


@pytest.mark.parametrize("before", [True, False], ids=["called before", "never called"])
def test_forward_that_somebody_has_replaced_on_the_instance_is_reported(x, before):
    model = nn.Sequential(nn.Tanh(), nn.Tanh()).double()
    handle = go.override(model, {nn.Tanh: uncompiled})
    if before:
        model(x)
    model[1].forward = torch.sin
    model(x)
    with pytest.warns(go.GradOverrideWarning) as told:
        handle.remove()
    assert [str(warning.message) for warning in told] == [
        f"override of a 'Sequential': the rule 'uncompiled' ({WHERE}) of the class 'Tanh' is passed by at "
        "'1'; somebody has put another forward on the instance, which does not call that of its class. Replace it "
        "before the override, or have it call the forward that it replaces"
    ]
    assert type(model[1]) is nn.Tanh


def test_forward_that_calls_the_one_which_it_replaces_is_not_reported(x):
    model = nn.Sequential(nn.Tanh(), nn.Tanh(), nn.Tanh()).double()
    with go.override(model, {nn.Tanh: doubled}):
        model[0]._old_forward = model[0].forward  # as accelerate has it
        model[0].forward = functools.partial(lambda module, x: module._old_forward(x), model[0])
        inner = model[1].forward
        model[1].forward = lambda x: inner(x) * 3
        model[2].forward = functools.partial(type(model[2]).forward, model[2])
        found = gradient(model, x)
    closely(found, 8 * gradient(model, x))


def test_class_that_another_party_has_put_back_is_cleared(model):
    handle = go.override(model, {"3": doubled})
    ours = type(model[3])
    model[3].__class__ = type("Theirs", (ours,), {})
    model(noise(5, 3))
    handle.remove()
    model[3].__class__ = ours  # which they have found
    go.remove_overrides(model)
    assert type(model[3]) is nn.Linear


def test_slice_of_an_overridden_container_is_cleared(model, x):
    with go.override(model, {model: doubled}):
        model(x)
        part = model[:2]
    go.remove_overrides(part)
    assert type(part) is nn.Sequential


def test_print_of_an_override_is_its_table(model):
    handle = go.override(model, {"3": doubled})
    assert repr(handle) == str(handle)
    go.remove_overrides(model)
    handle.remove()


# --- checkpoints ---

SAVING = {
    "nothing": lambda grad_output: 3 * grad_output,
    "input": lambda grad_output, input: grad_output * input,
    "output": lambda grad_output, output: grad_output * output,
    "vjp": doubled,
}
PARTS = {"saves its output": nn.Tanh, "saves its input": nn.Softplus, "saves nothing": nn.Identity}


@pytest.mark.parametrize("rule", SAVING.values(), ids=SAVING)
@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
def test_checkpoint_replayed_inside_the_context_is_right(rule, part, x):
    model = nn.Sequential(nn.Linear(3, 3), part(), nn.Linear(3, 3)).double()
    with go.override(model, {"1": rule}):
        expected = gradient(model, x)
        exactly(gradient(lambda x: checkpoint(model, x, use_reentrant=False), x), expected)


@pytest.mark.parametrize("rule", SAVING.values(), ids=SAVING)
@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
def test_checkpoint_replayed_outside_the_context_is_right_or_raises(rule, part, x):
    model = nn.Sequential(nn.Linear(3, 3), part(), nn.Linear(3, 3)).double()
    with go.override(model, {"1": rule}):
        expected = gradient(model, x)
        result = checkpoint(model, x, use_reentrant=False)
    weights = torch.linspace(-1, 1, result.numel(), dtype=result.dtype).view_as(result)
    try:
        found = torch.autograd.grad((result * weights).sum(), x)[0]
    except CheckpointError:
        return
    exactly(found, expected)


# --- memory ---


def keeping(stored):
    """A rule that is made anew each time, and holds a tensor."""

    def rule(grad_output, vjp):
        return vjp(grad_output) + stored.sum()

    return rule


PLACES = {
    "a module": lambda model: (model, "1"),
    "a class": lambda model: (model, nn.ReLU),
    "a function": lambda model: (model, F.relu),
    "a class, everywhere": lambda model: (nn.ReLU,),
    "a function, everywhere": lambda model: (F.relu,),
    "a path, everywhere": lambda model: ("torch.nn.functional:relu",),
}


@pytest.mark.parametrize("beside", [None, "guided_backprop"])
@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
def test_a_rule_goes_with_all_that_it_holds_when_its_override_is_removed(place, beside, model, x):
    alive = []
    for _ in range(5):
        stored = torch.zeros(3)
        alive.append(weakref.ref(stored))
        *of, target = place(model)
        with go.override(*of, {target: keeping(stored)}), go.override(model, beside) if beside else nullcontext():
            model(x).sum().backward()
    del stored
    gc.collect()
    assert [ref() for ref in alive] == [None] * 5


def test_what_wraps_a_rule_is_a_rule_of_its_own(model, x):
    @functools.wraps(guided)
    def louder(grad_output, vjp):
        return 3 * guided(grad_output, vjp)

    def grad_under(rule):
        with go.override(model, {nn.ReLU: rule}):
            return gradient(model, x)

    once, thrice = grad_under(guided), grad_under(louder)
    with go.override(model, {nn.ReLU: lambda grad_output, vjp: 3 * guided(grad_output, vjp)}):
        exactly(thrice, gradient(model, x))
    assert not torch.equal(once, thrice)
    exactly(grad_under(guided), once)


@dataclasses.dataclass(frozen=True)
class Times:
    name: str
    factor: float = dataclasses.field(compare=False)

    def __call__(self, grad_output):
        return self.factor * grad_output


def test_rules_that_compare_equal_are_rules_of_their_own(x):
    module = nn.ReLU()
    ones = gradient(lambda x: x, x)
    for factor in (2, 3):
        for rule in (Times("times", factor), Times("times", factor).__call__):
            with go.override(module, {module: rule}):
                exactly(gradient(module, x), factor * ones)


class KeepsItsHandle(nn.Module):
    """A module that has overridden a part of itself, or takes it back."""

    def __init__(self, rules):
        super().__init__()
        self.net = mlp()
        self.handle = go.override(self.net, rules)

    def forward(self, x):
        return self.net(x)


@pytest.mark.parametrize("rules", [RULES, {F.relu: guided}, {F.relu: guided, "2": doubled}], ids=["1", "2", "3"])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), saved_and_loaded])
def test_copy_of_a_module_that_keeps_its_handle_has_one_for_its_own_rules(copied, rules, x):
    module = KeepsItsHandle(rules)
    expected, plain = gradient(module, x), gradient(mlp(), x)
    other = copied(module)
    assert [row[:4] for row in other.handle.table] == [row[:4] for row in module.handle.table]
    closely(gradient(other, x), expected)
    other.handle.remove()
    exactly(gradient(other, x), plain)
    assert type(other.net[1]) is nn.ReLU
    assert str(go.explain(other)) == "nothing is overridden"
    closely(gradient(module, x), expected)
    third = copied(module)
    module.handle.remove()
    exactly(gradient(module, x), plain)
    closely(gradient(third, x), expected)
    copied(third).handle.remove()
    closely(gradient(third, x), expected)
    third.handle.remove()
    exactly(gradient(third, x), plain)


def test_handle_in_a_copy_removes_its_own_override_alone(x):
    module = KeepsItsHandle({nn.ReLU: guided})
    by_one = gradient(module, x)
    with go.override(module, {"net": doubled}):
        closely(gradient(module, x), 2 * by_one)
        other = copy.deepcopy(module)
    closely(gradient(other, x), 2 * by_one)
    other.handle.remove()
    closely(gradient(other, x), 2 * gradient(mlp(), x))
    module.handle.remove()


def test_handle_in_a_copy_made_after_the_removal_has_nothing_to_remove(x):
    module = KeepsItsHandle({nn.ReLU: guided})
    gradient(module, x)
    module.handle.remove()
    other = copy.deepcopy(module)
    assert [row.calls for row in other.handle.table] == ["1", "1"]
    other.handle.remove()
    exactly(gradient(other, x), gradient(mlp(), x))


def test_handle_in_a_copy_cannot_be_entered():
    module = KeepsItsHandle({nn.ReLU: lambda grad_output: grad_output})
    other = copy.deepcopy(module)
    with pytest.raises(go.UnsupportedError, match=r"and once; it is a copy, .*Call go\.override\("), other.handle:
        pytest.fail("entered")
    with pytest.warns(go.GradOverrideWarning, match="never ran"):
        module.handle.remove()


def test_handle_of_the_whole_process_is_not_copied(x):
    module = nn.Sequential(nn.ReLU())
    with go.override({nn.ReLU: doubled}) as module.handle:
        gradient(module, x)
        with pytest.raises(go.UnsupportedError, match=r"must be of a model.*of the whole process. Keep it outside of"):
            copy.deepcopy(module)


class OnlyOne(nn.Module):
    made = None

    def __new__(cls):
        if cls.made is None:
            cls.made = super().__new__(cls)
        return cls.made

    def forward(self, x):
        return 3 * x


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda model: pickle.loads(pickle.dumps(model))])
def test_the_one_module_of_a_class_that_is_its_own_copy_is_as_before(copied):
    module, x = OnlyOne(), noise(3)
    before = dict(module.__dict__)
    with go.override(module, {module: doubled}):
        assert copied(module) is module
        exactly(torch.autograd.grad(module(x).sum(), x)[0], torch.full_like(x, 6.0))
    exactly(torch.autograd.grad(module(x).sum(), x)[0], torch.full_like(x, 3.0))
    assert type(module) is OnlyOne
    assert module.__dict__ == before
