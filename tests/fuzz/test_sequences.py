"""Random sequences of what is done to a model: apply, remove, copy, wrap, parametrize, compile.

A few lines keep account of which rules are in force where (`Account`), and work out the gradients by hand. After each
step every model must give these, and when all is undone it must be as it was.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import pickle
import warnings

import torch
from hypothesis import event, given
from hypothesis import strategies as st
from oracles import closely
from torch import nn
from torch.nn.utils import parametrize

import gradoverride as go
from fuzz.examples import examples

# --- rules, and what each makes of a gradient, where `inner` is what is overridden ---


def tripled(grad_output, vjp):
    return vjp(3 * grad_output)


def clamped(grad_output, vjp):
    return vjp(grad_output.clamp(-1, 2))


def passed(grad_output):
    return grad_output


def all_doubled(grad_output, vjp):
    return {name: 2 * grad for name, grad in vjp.by_name(grad_output).items()}


def _by_vjp(change):
    return lambda inner, grad: (inner(change(grad))[0], inner(grad)[1])


EFFECTS = {
    tripled: _by_vjp(lambda grad: 3 * grad),
    clamped: _by_vjp(lambda grad: grad.clamp(-1, 2)),
    passed: lambda inner, grad: (grad, inner(grad)[1]),
    all_doubled: lambda inner, grad: (
        2 * inner(grad)[0],
        {name: 2 * weight for name, weight in inner(grad)[1].items()},
    ),
}
RULES = list(EFFECTS)


# --- the model, and its gradients by hand ---


class Scale(nn.Module):
    def __init__(self, *weight):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight, dtype=torch.float64))

    def forward(self, x):
        return x * self.weight


class Shifted(Scale):
    def forward(self, x):
        return super().forward(x) + 1


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = Scale(1.0, -2.0, 3.0)
        self.act = nn.ReLU()
        self.inner = nn.Sequential(Shifted(2.0, 1.0, -1.0), nn.ReLU())

    def forward(self, x):
        return self.inner(self.act(self.first(x)))


class Double(nn.Module):
    def forward(self, weight):
        return 2 * weight


X = torch.tensor([[1.0, -2.0, 0.25], [-1.0, 0.5, 0.5]], dtype=torch.float64)
GRAD_OUTPUT = torch.tensor([[2.0, -1.0, 1.0], [3.0, 1.0, -2.0]], dtype=torch.float64)
# By target, how specific it is where, and what it is for a model.
TARGETS = {
    "instance first": ({"first": 5}, lambda model: model.first),
    "instance inner": ({"inner": 5}, lambda model: model.inner),
    "glob f???t": ({"first": 4}, lambda model: "f???t"),
    "glob *ct": ({"act": 4}, lambda model: "*ct"),
    "glob inner.*": ({"inner.0": 4, "inner.1": 4}, lambda model: "inner.*"),
    "predicate": ({"first": 3, "inner.0": 3}, lambda model: lambda name, module: isinstance(module, Scale)),
    "class Scale": ({"first": 2, "inner.0": 1}, lambda model: Scale),
    "class Shifted": ({"inner.0": 2}, lambda model: Shifted),
    "class ReLU": ({"act": 2, "inner.1": 2}, lambda model: nn.ReLU),
}

# Classes that are overridden in the whole process, and which modules they name.
EVERYWHERE = [(Scale, ["first", "inner.0"]), (Shifted, ["inner.0"]), (nn.ReLU, ["act", "inner.1"])]


class Account:
    """A model, and the rules in force on it, as the contract has it."""

    def __init__(self, model, layers=()):
        self.model = model
        self.layers = list(layers)  # by override, from the inner to the outer one: {name: rule}
        self.wrapped = False  # the forward of `first`, by another party
        self.parametrized = False  # the weight of `first`

    def gradients(self):
        """By hand: of the input, and of the parameters by name."""
        self.weight = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64) * (2 if self.parametrized else 1)
        self.hidden = X * self.weight * (2 if self.wrapped else 1)
        self.middle = self.hidden.clamp(min=0)
        grad, weights = self._through("inner", GRAD_OUTPUT)
        grad, _ = self._through("act", grad)
        grad, of_first = self._through("first", 2 * grad if self.wrapped else grad)
        return grad, {**weights, **of_first}

    def _through(self, name, grad):
        rules = [layer[name] for layer in self.layers if name in layer]
        return self._under(rules, name, grad)

    def _under(self, rules, name, grad):
        if not rules:
            return self._plain(name, grad)
        inner = functools.partial(self._under, rules[:-1], name)
        return EFFECTS[rules[-1]](inner, grad)

    def _plain(self, name, grad):
        last = torch.tensor([2.0, 1.0, -1.0], dtype=torch.float64)
        if name == "inner":
            grad, _ = self._through("inner.1", grad)
            return self._through("inner.0", grad)
        if name == "inner.1":
            return grad * (self.middle * last + 1 > 0), {}
        if name == "inner.0":
            return grad * last, {"inner.0.weight": (grad * self.middle).sum(0)}
        if name == "act":
            return grad * (self.hidden > 0), {}
        name, times = ("parametrizations.weight.original", 2) if self.parametrized else ("weight", 1)
        return grad * self.weight, {f"first.{name}": times * (grad * X).sum(0)}

    def check(self, called=None):
        x = X.clone().requires_grad_()
        parameters = dict(self.model.named_parameters())
        result = (self.model if called is None else called)(x)
        found = torch.autograd.grad(result, [x, *parameters.values()], GRAD_OUTPUT)
        grad, weights = self.gradients()
        assert set(weights) == set(parameters)
        closely(found, (grad, *[weights[name] for name in parameters]))


def winners(entries):
    """By module, the rule that wins it: the most specific target, of two alike the later."""
    found = {}
    for target, rule in entries:
        for name, rank in TARGETS[target][0].items():
            if name not in found or rank >= found[name][0]:
                found[name] = (rank, rule)
    return {name: rule for name, (_, rule) in found.items()}


def seen(model):
    """All that an override may change."""
    return [(type(module), dict(module.__dict__)) for module in model.modules()], list(model.state_dict())


# --- the steps ---


class Party:
    """What is done to models, and the account of it."""

    def __init__(self):
        model = Net()
        self.first = Account(model)
        self.before = seen(model)
        self.accounts = [self.first]
        self.was_parametrized = False
        self.handles = []  # with the accounts and the layer of each
        self.everywhere = []  # the layers in force in the whole process

    def apply(self, which, entries):
        account = self.accounts[which % len(self.accounts)]
        rules = {TARGETS[target][1](account.model): rule for target, rule in entries}
        layer = winners(entries)
        try:
            handle = go.override(account.model, rules)
        except go.UnsupportedError:
            if not (account.wrapped and "first" in layer):
                raise
            event("refused: another party has replaced the forward")
            return
        account.layers.append(layer)
        self.handles.append((handle, [account], layer))

    def apply_everywhere(self, which, rule):
        kind, names = EVERYWHERE[which % len(EVERYWHERE)]
        layer = dict.fromkeys(names, rule)
        try:
            handle = go.override({kind: rule})
        except go.UnsupportedError:
            if not (kind is Scale and any(account.wrapped for account in self.accounts)):
                raise
            event("refused: another party has replaced the forward")
            return
        self.handles.append((handle, self.accounts, layer))
        self.everywhere.append(layer)
        for account in self.accounts:
            account.layers.append(layer)

    def remove(self, which):
        if self.handles:
            handle, accounts, layer = self.handles.pop(which % len(self.handles))
            handle.remove()
            self.everywhere = [each for each in self.everywhere if each is not layer]
            for account in accounts:
                account.layers = [each for each in account.layers if each is not layer]

    def remove_all(self, which):
        account = self.accounts[which % len(self.accounts)]
        self.clear(account)

    def clear(self, account):
        go.remove_overrides(account.model)
        account.layers = [layer for layer in account.layers if any(layer is each for each in self.everywhere)]

    def copy(self, which, how):
        account = self.accounts[which % len(self.accounts)]
        if account.wrapped or account.parametrized or len(self.accounts) > 3:
            return  # a closure around the forward knows the original; torch copies no parametrized class
        self.accounts.append(Account(COPIES[how](account.model), account.layers))

    def wrap(self, which):
        account = self.accounts[which % len(self.accounts)]
        module = account.model.first
        if account.wrapped:
            del module.forward
        else:
            forward = module.forward
            module.forward = lambda *args, **kwargs: 2 * forward(*args, **kwargs)
        account.wrapped = not account.wrapped

    def parametrize(self, which):
        account = self.accounts[which % len(self.accounts)]
        if account.wrapped:
            return
        if account.parametrized:
            parametrize.remove_parametrizations(account.model.first, "weight", leave_parametrized=False)
        else:
            parametrize.register_parametrization(account.model.first, "weight", Double())
            self.was_parametrized = True
        account.parametrized = not account.parametrized

    def check(self):
        for account in self.accounts:
            account.check()

    def undo(self, order):
        """All of it, and see whether the models are as they were."""
        for account in self.accounts:
            if account.wrapped:
                del account.model.first.forward
                account.wrapped = False
        for which in order:
            self.remove(which)
            self.check()
        while self.handles:
            self.remove(0)
        for account in self.accounts[1:]:
            self.clear(account)
        for account in self.accounts:
            if account.parametrized:
                self.parametrize(self.accounts.index(account))
        self.check()
        for account in self.accounts:
            assert shape_of(seen(account.model)) == shape_of(self.before)
        if not self.was_parametrized or len(self.accounts) == 1:
            assert [type(module) for module in self.first.model.modules()] == [kind for kind, _ in self.before[0]]
        if not self.was_parametrized:  # torch gives the parameter back in another dict
            assert seen(self.first.model) == self.before


def shape_of(what_was_seen):
    """What a copy has in common with its original. (Where it was parametrized, an inert class may stay beneath.)"""
    modules, keys = what_was_seen
    return [(kind.__qualname__, list(attributes)) for kind, attributes in modules], keys


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "save": lambda model: _saved(model),
}


def _saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


NUMBER = st.integers(0, 5)
ENTRIES = st.lists(st.tuples(st.sampled_from(list(TARGETS)), st.sampled_from(RULES)), min_size=1, max_size=3)
STEPS = st.one_of(
    st.tuples(st.just("apply"), NUMBER, ENTRIES),
    st.tuples(st.just("apply"), st.just(0), ENTRIES),
    st.tuples(st.just("apply_everywhere"), NUMBER, st.sampled_from(RULES)),
    st.tuples(st.just("remove"), NUMBER),
    st.tuples(st.just("copy"), NUMBER, st.sampled_from(sorted(COPIES))),
    st.tuples(st.sampled_from(["remove_all", "wrap", "parametrize"]), NUMBER),
)


def take(party, steps):
    """Take these steps, and check after each."""
    party.check()
    for name, *arguments in steps:
        event(name)
        getattr(party, name)(*arguments)
        party.check()


@contextlib.contextmanager
def party():
    """A party that leaves nothing in force in the process, whatever happens."""
    made = Party()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", go.GradOverrideWarning)  # a rule that another one wins over never runs
        try:
            yield made
        finally:
            for handle, *_ in made.handles:
                handle.remove()


@given(st.lists(STEPS, max_size=10), st.lists(NUMBER, max_size=4))
@examples(120)
def test_models_have_the_gradients_of_the_rules_in_force_and_all_is_undone(steps, order):
    with party() as one:
        take(one, steps)
        one.undo(order)


@given(st.lists(STEPS, max_size=5), st.lists(STEPS, max_size=2))
@examples(6)
def test_compiled_models_have_the_gradients_of_the_rules_in_force(steps, later):
    """Also of those that come and go after it was compiled."""
    with party() as one:
        take(one, steps)
        torch.compiler.reset()
        compiled = torch.compile(one.first.model, backend="aot_eager")
        one.first.check(compiled)
        del one.first.model._is_torch_compile  # a mark of torch's, which undo would find
        for name, *arguments in later:
            getattr(one, name)(*arguments)
            one.first.check(compiled)
        one.undo([])
        one.first.check(compiled)
