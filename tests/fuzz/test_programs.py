"""Random models with decorated calls, under random stacks of overrides, in random environments, several at once.

A model is a list of steps: layers, functions, models within, and decorated functions and methods that call these. Its
twin has the same steps, where each call under a rule is a hand-written Function (`ByHand`) around the call beneath.
"""

from __future__ import annotations

import contextlib
import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st
from oracles import closely, in_threads
from torch import nn
from torch.func import functional_call, grad, jvp, vmap
from torch.utils.checkpoint import checkpoint

import gradoverride as go
from fuzz.examples import examples

# --- rules: of what each makes of a gradient, where `pull(g)` gives the one of the input, and those of the parameters


def tripled(grad_output, vjp):
    return vjp(3 * grad_output)


def clamped(grad_output, vjp):
    return vjp(grad_output.clamp(-0.3, 0.4))


def weighed(grad_output, output, vjp):
    return vjp(grad_output * output.cos())


def negated(grad_output):
    return -grad_output


def doubled(grad_output, vjp):
    return {name: 2 * grad for name, grad in vjp.by_name(grad_output).items()}


EFFECTS = {
    tripled: lambda pull, g, y: (pull(3 * g)[0], pull(g)[1]),
    clamped: lambda pull, g, y: (pull(g.clamp(-0.3, 0.4))[0], pull(g)[1]),
    weighed: lambda pull, g, y: (pull(g * y.cos())[0], pull(g)[1]),
    negated: lambda pull, g, y: (-g, pull(g)[1]),
    doubled: lambda pull, g, y: (2 * pull(g)[0], [2 * grad for grad in pull(g)[1]]),
}
OF_FUNCTIONS = [rule for rule in EFFECTS if rule is not doubled]  # torch's own have no names for their arguments


# --- models


class Model(nn.Module):
    def __init__(self, steps):
        super().__init__()
        self.steps = steps
        parts = [STEPS[step]() if isinstance(step, str) else Model(step) for step in steps]
        self.parts = nn.ModuleList([part for part in parts if part is not None])

    def forward(self, x):
        parts = iter(self.parts)
        for step in self.steps:
            x = self.take(step, x, parts)
        return x

    def take(self, step, x, parts):
        if step == "relu":
            return F.relu(x) + 0.1 * x
        if step == "tanh":
            return x.tanh()
        if step == "function":
            return squashed(x)
        if step == "method":
            return self.through(x, next(parts))
        if step == "checkpoint":
            return checkpoint(next(parts), x, use_reentrant=False)
        part = next(parts)
        return part(x) if isinstance(step, str) else x + part(x)

    @go.custom_backward(lambda grad_output, vjp: vjp(2 * grad_output))
    def through(self, x, part):
        return part(torch.tanh(x))


@go.custom_backward(tripled)
def squashed(x):
    return torch.relu(torch.tanh(x)) + x


STEPS = {
    **{"linear": lambda: nn.Linear(3, 3), "norm": lambda: nn.LayerNorm(3), "layer": nn.Tanh},
    **{"relu": lambda: None, "tanh": lambda: None, "function": lambda: None},
    **{"method": nn.Sigmoid, "checkpoint": lambda: nn.Linear(3, 3)},
}
TARGETS = {  # how near each is, and the names of the modules that it names
    "linear layers": (nn.Linear, 1, lambda name, module: type(module) is nn.Linear),
    "tanh layers": (nn.Tanh, 1, lambda name, module: type(module) is nn.Tanh),
    "models": (Model, 1, lambda name, module: type(module) is Model),
    "sigmoid layers": (nn.Sigmoid, 1, lambda name, module: type(module) is nn.Sigmoid),
    "second parts": ("*.1", 2, lambda name, module: name.endswith(".1") and type(module) is not nn.ModuleList),
    "relu": (F.relu, 0, None),
    "tanh": (torch.Tensor.tanh, 0, None),
}


# --- their twins


class ByHand(torch.autograd.Function):
    """A call under a rule. The call beneath runs again in the backward, which may itself be differentiated."""

    @staticmethod
    def forward(ctx, call, effect, x, *params):
        ctx.call, ctx.effect = call, effect
        y = call(x, params).clone()
        ctx.save_for_backward(y, x, *params)
        return y

    @staticmethod
    def backward(ctx, g):
        y, *given = ctx.saved_tensors
        twice = torch.is_grad_enabled()
        with torch.enable_grad():
            aliases = [one.view_as(one) if twice and one.requires_grad else one.detach() for one in given]
            aliases = [one if one.requires_grad else one.requires_grad_() for one in aliases]
            again = ctx.call(aliases[0], aliases[1:])

        def pull(grad_output):
            found = torch.autograd.grad(
                again, aliases, grad_output, create_graph=twice, retain_graph=True, materialize_grads=True
            )
            return found[0], list(found[1:])

        of_x, of_params = ctx.effect(pull, g, y)
        return None, None, of_x, *of_params


class Twin:
    """A model, and the layers in force: by module its rule, by function its rule."""

    def __init__(self, model, layers):
        self.model = model
        self.paths = {module: path for path, module in self.model.named_modules()}
        self.layers = layers

    def under(self, rules, call, x, params=()):
        for effect in rules:
            call = self.ruled(effect, call)
        return call(x, params)

    @staticmethod
    def ruled(effect, call):
        return lambda x, params: ByHand.apply(call, effect, x, *params)

    def rules_of(self, name):
        return [EFFECTS[functions[name]] for _, functions in self.layers if name in functions]

    def function(self, name, x):
        return self.under(self.rules_of(name), lambda x, _: getattr(torch, name)(x), x)

    def part(self, module, x):
        path = self.paths[module]
        if type(module) is nn.Tanh:  # nothing but a call of tanh: of each override one rule, the layer's if it has one
            rules = [modules.get(path, functions.get("tanh")) for modules, functions in self.layers]
            return self.under([EFFECTS[rule] for rule in rules if rule], lambda x, _: x.tanh(), x)
        rules = [EFFECTS[modules[path]] for modules, _ in self.layers if path in modules]
        places = [(part, name) for part in module.modules() for name in part._parameters]

        def given(x, params):
            before = [part._parameters[name] for part, name in places]
            try:
                for (part, name), value in zip(places, params, strict=True):
                    part._parameters[name] = value
                return self.plain(module, x)
            finally:
                for (part, name), value in zip(places, before, strict=True):
                    part._parameters[name] = value

        return self.under(rules, given, x, [part._parameters[name] for part, name in places])

    def plain(self, module, x):
        if type(module) is not Model:
            return type(module).forward(module, x)
        parts = iter(module.parts)
        for step in module.steps:
            x = self.step(module, step, x, parts)
        return x

    def step(self, module, step, x, parts):
        if step == "relu":
            return self.function("relu", x) + 0.1 * x
        if step == "tanh":
            return self.function("tanh", x)
        if step == "function":
            squash = lambda x, _: self.function("relu", self.function("tanh", x)) + x  # noqa: E731
            return self.under([EFFECTS[tripled]], squash, x)
        part = next(parts)
        if step == "method":
            twice = lambda pull, g, y: (pull(2 * g)[0], [])  # noqa: E731
            return self.under([twice], lambda x, _: self.part(part, self.function("tanh", x)), x)
        return self.part(part, x) if isinstance(step, str) else x + self.part(part, x)

    def __call__(self, x):
        return self.part(self.model, x)


# --- environments: of each what a model gives, and its twin


def leaves_of(model, x):
    return [x, *model.parameters()]


def gradients(model, x, run=None, twice=False, **_):
    y = (run or model)(x)
    leaves = leaves_of(model, x)
    found = torch.autograd.grad((y * WEIGHTS).sum(), leaves, create_graph=twice, materialize_grads=True)
    if not twice:
        return found
    total = sum([grad.square().sum() for grad in found])
    more = torch.autograd.grad(total, leaves, materialize_grads=True) if total.requires_grad else ()
    return [*found, *more]


def second(model, x, run=None, **_):
    return gradients(model, x, run, twice=True)


def checkpointed(model, x, **_):
    return gradients(model, x, lambda x: checkpoint(model, x, use_reentrant=False))


def removed(model, x, remove, **_):
    def run(x):
        y = model(x)
        remove()
        return y

    return gradients(model, x, run)


def functional(model, x, **_):
    def loss(x, params):
        return (functional_call(model, params, (x,)) * WEIGHTS).sum()

    params = {name: param.detach() for name, param in model.named_parameters()}
    of_x, of_params = grad(loss, argnums=(0, 1))(x.detach(), params)
    return [of_x, *of_params.values()]


def row_by_row(model, x, **_):
    return [vmap(grad(lambda row, weights: (model(row) * weights).sum()))(x.detach(), WEIGHTS)]


def forward_mode(model, x, **_):
    return [jvp(model, (x.detach(),), (torch.ones_like(x),))[1]]


def transposed(model, x, run):
    y = run(x)
    rows = [torch.autograd.grad(each, x, retain_graph=True)[0].sum() for each in y.flatten()]
    return [torch.stack(rows).view_as(y)]


WEIGHTS = torch.linspace(-1, 2, 6, dtype=torch.float64).view(2, 3)
ENVIRONMENTS = {  # with that of the twin, and whether they take a checkpoint in the model
    "eager": (gradients, gradients, True),
    "second derivatives": (second, second, True),
    "checkpoint": (checkpointed, gradients, True),
    "removed before the backward": (removed, gradients, False),
    "torch.func": (functional, gradients, False),
    "vmap": (row_by_row, lambda *args, **kwargs: gradients(*args, **kwargs)[:1], False),
    "forward mode": (forward_mode, transposed, False),
}

STEP = st.sampled_from(sorted(STEPS))
MODEL = st.lists(st.one_of(STEP, STEP, st.lists(STEP, min_size=1, max_size=3)), min_size=2, max_size=5)
LAYER = st.lists(st.tuples(st.sampled_from(sorted(TARGETS)), st.sampled_from(list(EFFECTS))), min_size=1, max_size=3)


@contextlib.contextmanager
def overridden(model, overrides):
    """`model` under these, one in the other: gives its twin by hand, and what removes them all."""
    layers = []
    twin = Twin(copy.deepcopy(model), layers)
    with warnings.catch_warnings(), contextlib.ExitStack() as stack:
        warnings.simplefilter("ignore", go.GradOverrideWarning)  # a rule of a function may have no calls
        for entries in overrides:
            targets, layer = layer_of(twin.model, entries)
            if targets:
                stack.enter_context(go.override(model, targets))
                layers.append(layer)
        yield twin, stack.close


def layer_of(model, entries):
    """The rules for `override`, and which of them win what: by module, and by function."""
    rules, modules, functions = {}, {}, {}
    for target, rule in dict(entries).items():
        value, near, names = TARGETS[target]
        if names is None and rule in OF_FUNCTIONS:
            rules[value] = functions[target] = rule
        named = [path for path, module in model.named_modules() if names is not None and names(path, module)]
        for path in named:
            rules[value] = rule
            if modules.get(path, (near,))[0] <= near:
                modules[path] = near, rule
    return rules, ({path: rule for path, (_, rule) in modules.items()}, functions)


@pytest.mark.parametrize("name", ENVIRONMENTS)
@given(steps=MODEL, overrides=st.lists(LAYER, min_size=1, max_size=3))
@examples(40)
def test_gradients_of_random_models_are_those_of_hand_written_ones(name, steps, overrides):
    environment, of_twin, takes_checkpoints = ENVIRONMENTS[name]
    flat = [step for each in steps for step in ([each] if isinstance(each, str) else each)]
    assume(takes_checkpoints or "checkpoint" not in flat)
    rules = {rule for each in overrides for _, rule in each}
    if name in ("forward mode", "second derivatives"):
        assume(clamped not in rules)  # it is not linear: what it makes of a sum depends on where that is summed up
    if name == "second derivatives":
        assume(negated not in rules)  # it keeps no graph of the forward
    torch.manual_seed(0)
    model = Model(steps).double()
    x = torch.linspace(-1.5, 2, 6, dtype=torch.float64).view(2, 3).requires_grad_()
    expected = gradients(model, x)
    with overridden(model, overrides) as (twin, remove):
        found = environment(model, x, remove=remove)
        closely(found, of_twin(twin.model, x, run=twin))
    closely(gradients(model, x), expected)


# --- several environments at once: what is around a call, from the inside out, and leaves its gradients as they are


class Around(nn.Module):
    """A call of `model`, whose parameters it has."""

    def __init__(self, model, call):
        super().__init__()
        self.model, self.call = model, (call,)  # no part, where it is the model itself

    def forward(self, x):
        return self.call[0](x)


def with_computed_parameters(model, call):
    around = Around(model, call)
    return lambda x: functional_call(around, {name: 1 * p for name, p in around.named_parameters()}, (x,))


def under(context):
    def around(model, call):
        def run(x):
            with context():
                return call(x)

        return run

    return around


def in_a_thread(model, call):
    def run(x):
        found = []
        in_threads(1, lambda _: found.append(call(x)))
        return found[0]

    return run


def called_before(model, call):
    def run(x):
        with torch.no_grad():
            call(x)
        return call(x)

    return run


WITHIN_VMAP = {
    "computed parameters": with_computed_parameters,
    "autocast": under(lambda: torch.autocast("cpu", dtype=torch.bfloat16)),  # which leaves float64 alone
    "called before": called_before,
}
AROUND = {
    **WITHIN_VMAP,
    "vmap": lambda model, call: lambda x: vmap(call)(x[None])[0],
    "checkpoint": lambda model, call: lambda x: checkpoint(call, x, use_reentrant=False),
    "saved as copies": under(lambda: torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda saved: saved)),
    "thread": in_a_thread,
}
TAKES_FORWARD_MODE = (*WITHIN_VMAP, "vmap")


@pytest.mark.parametrize("end", ["eager", "second derivatives", "forward mode"])
@given(
    steps=MODEL,
    overrides=st.lists(LAYER, min_size=1, max_size=2),
    names=st.lists(st.sampled_from(sorted(AROUND)), min_size=2, max_size=3, unique=True),
    copied=st.booleans(),
)
@examples(40)
def test_gradients_of_random_models_hold_in_several_environments_at_once(end, steps, overrides, names, copied):
    flat = [step for each in steps for step in ([each] if isinstance(each, str) else each)]
    assume("checkpoint" not in flat)
    rules = {rule for each in overrides for _, rule in each}
    assume(end == "eager" or clamped not in rules)  # see above
    assume(end != "second derivatives" or negated not in rules)
    # A defect of torch: the second derivative of a layer norm with a weight is wrong under vmap.
    assume(end != "second derivatives" or "vmap" not in names or "norm" not in flat)
    assume(end != "forward mode" or set(names) <= set(TAKES_FORWARD_MODE))
    names = sorted(names, key=lambda name: (name not in WITHIN_VMAP, name != "vmap"))
    torch.manual_seed(0)
    model = Model(steps).double()
    x = torch.linspace(-1.5, 2, 6, dtype=torch.float64).view(2, 3).requires_grad_()
    with overridden(model, overrides) as (twin, _):
        if copied:
            model = copy.deepcopy(model)
        run = model
        for name in names:
            run = AROUND[name](model, run)
        environment, of_twin, _ = ENVIRONMENTS[end]
        found = forward_mode(run, x) if end == "forward mode" else environment(model, x, run)
        closely(found, of_twin(twin.model, x, run=twin))
