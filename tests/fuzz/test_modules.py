"""Modules of many kinds under rules that give autograd's own gradient, or a multiple of it, in random environments.

What is right is what the module gives without a rule: gradients (times a factor), buffers, plain attributes, and the
random numbers after it.
"""

from __future__ import annotations

import copy
import dataclasses
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st
from oracles import closely, in_threads
from torch import nn
from torch.func import functional_call, grad, jacrev, jvp, vmap
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

import gradoverride as go
from fuzz.examples import examples
from fuzz.interpreter import Pair, Record

# --- modules, each with the shapes of what it is given


class Weighed(nn.Module):
    """A forward of a few lines, with a layer and a weight to use."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.weight = nn.Parameter(torch.tensor([1.0, -2.0, 0.5]))
        self.unused = nn.Parameter(torch.ones(2))
        self.register_buffer("mean", torch.zeros(3))
        self.runs = 0


def using(body):
    """A module class with this forward."""

    def forward(self, *tensors):
        return body(self, *tensors)

    return type("Weighed", (Weighed,), {"forward": forward})


def centred(self, x):
    self.mean.mul_(0.9).add_(x.detach().mean(0))
    return x - self.mean


def rebound(self, x):
    self.mean = 0.9 * self.mean + x.detach().mean(0)
    return x * self.mean.cos()


def counted(self, x):
    self.runs += 1
    return x * self.weight * self.runs


def written(self, x):
    y = x.clone()
    y[0] = self.weight
    y[y > 0] *= 2
    return y


def without_gradient(self, x):
    with torch.no_grad():
        largest = self.layer(x).max()
    return self.layer(x) - largest


def energy(self, x):
    return grad(lambda x: self.layer(x).tanh().sum())(x)


def hooked(self, x):
    y = x * 2
    if y.requires_grad:
        y.register_hook(lambda grad: 2 * grad)
    return y.sin()


def pruned():
    layer = nn.Linear(3, 3)
    prune.l1_unstructured(layer, "weight", amount=3)
    return nn.Sequential(layer, nn.Tanh())


def hooked_layers():
    model = nn.Sequential(nn.Tanh(), nn.Linear(3, 3), nn.Tanh())
    model[0].register_forward_hook(lambda module, args, result: 2 * result)
    model[1].register_forward_pre_hook(lambda module, args: (3 * args[0],))
    model[1].weight.register_hook(lambda grad: 2 * grad)
    return model


ROWS = (2, 3)
MODULES = {
    "linear": (lambda: nn.Linear(3, 3), ROWS),
    "batch norm": (lambda: nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.ReLU(inplace=True)), (4, 3)),
    "dropout": (lambda: nn.Sequential(nn.Linear(3, 8), nn.Dropout(), nn.Linear(8, 3)), ROWS),
    "convolution": (lambda: nn.Conv1d(2, 4, 2), (2, 2, 5)),
    "lstm": (lambda: nn.LSTM(3, 4, batch_first=True), (2, 5, 3)),
    "attention": (lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.1, batch_first=True), (2, 3, 4)),
    "bilinear": (lambda: nn.Bilinear(3, 2, 4), ROWS, (2, 2)),
    "weight norm": (lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 3)), nn.Tanh()), ROWS),
    "spectral norm": (lambda: parametrizations.spectral_norm(nn.Linear(3, 3)), ROWS),
    "pruned": (pruned, ROWS),
    "hooks": (hooked_layers, ROWS),
    "embedding": (
        using(lambda self, x: F.embedding(torch.tensor([[0, 1], [2, 1]]), self.layer.weight).sum(1) * x),
        ROWS,
    ),
    "buffer": (using(centred), ROWS),
    "another buffer": (using(rebound), ROWS),
    "attribute": (using(counted), ROWS),
    "written into": (using(written), ROWS),
    "no_grad within": (using(without_gradient), ROWS),
    "gradient within": (using(energy), ROWS),
    "vmap within": (using(lambda self, x: vmap(self.layer)(x).tanh()), ROWS),
    "checkpoint within": (using(lambda self, x: checkpoint(self.layer, x.tanh(), use_reentrant=False)), ROWS),
    "hook within": (using(hooked), ROWS),
    "random": (using(lambda self, x: x * torch.rand_like(x) + torch.randn(3) * self.weight), ROWS),
    "sorted": (using(lambda self, x: (x * self.weight).sort(-1)), ROWS),
    "singular values": (using(lambda self, x: torch.linalg.svdvals(x)), ROWS),
    "spectrum": (using(lambda self, x: torch.fft.rfft(x * self.weight)), ROWS),
    "views": (using(lambda self, x: x.unbind(0)), ROWS),
    "itself": (using(lambda self, x: x), ROWS),
    "twice itself": (using(lambda self, x: [x, 2 * x, x]), ROWS),
    "parameter": (using(lambda self, x: Pair(x * 2, self.weight)), ROWS),
    "dict": (using(lambda self, x, y: {"a": self.layer(x), "b": [y.sin(), None, 3], "c": "text"}), ROWS, ROWS),
    "record": (using(lambda self, x: Record(x * self.weight, Record(x.sum(), x.argmax()))), ROWS),
    "nothing": (using(lambda self, x: (x[:0], torch.cat([x, x.new_zeros(2, 0)], 1))), ROWS),
    "number": (using(lambda self, x: x * 2), ()),
}


# --- rules: what each makes of the gradient of the inputs, and of that of the parameters


def mapped(function, value):
    """`value` with `function` on each tensor that a gradient may have, None for all else."""
    if isinstance(value, torch.Tensor):
        return function(value) if value.is_floating_point() or value.is_complex() else None
    if isinstance(value, dict):
        return {key: mapped(function, part) for key, part in value.items()}
    if isinstance(value, (tuple, list)):
        parts = [mapped(function, part) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if dataclasses.is_dataclass(value):
        return Record(mapped(function, value.one), mapped(function, value.other))
    return None


def same(grad_output, vjp):
    return vjp(grad_output)


def tripled(grad_output, vjp):
    return vjp(mapped(lambda grad: 3 * grad, grad_output))


def by_name(grad_output, vjp):
    return mapped(lambda grad: 3 * grad, vjp.by_name(grad_output))


def of_several(grad_output, vjp):
    vjp(mapped(torch.cos, grad_output))
    return vjp(grad_output)


def asking_for_all(grad_output, vjp, input, needs, module, params):
    return vjp.by_name(grad_output)


RULES = {same: (1, 1), tripled: (3, 1), by_name: (3, 3), of_several: (1, 1), asking_for_all: (1, 1)}
OFTEN = (tripled, by_name, of_several)  # more than one pass through the module in each backward pass


def decorated(module, rule):
    base = type(module)
    module.__class__ = type(base.__name__, (base,), {"forward": go.custom_backward(rule)(base.forward)})


FORMS = {
    "override of the module": lambda module, rule: go.override(module, {module: rule}),
    "override of its class": lambda module, rule: go.override(module, {type(module): rule}),
    "override in the process": lambda module, rule: go.override({type(module): rule}),
    "decorated": decorated,
}


# --- environments


def tensors_of(value):
    found = []
    mapped(found.append, value)
    return found


def loss_of(result):
    total = 0.0
    for place, tensor in enumerate(tensors_of(result)):
        real = torch.view_as_real(tensor).square().sum(-1) if tensor.is_complex() else tensor
        total = (
            total + (1 + place) * (real * torch.linspace(-1, 2, real.numel(), dtype=torch.float64).view_as(real)).sum()
        )
    return total


def gradients(module, inputs, run=None):
    leaves = [*inputs, *module.parameters()]
    return torch.autograd.grad(loss_of((run or module.__call__)(*inputs)), leaves, materialize_grads=True)


def accumulated(module, inputs):
    leaves = [*inputs, *module.parameters()]
    loss = loss_of(module(*inputs))
    loss.backward(retain_graph=True)
    loss.backward()
    return [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]


def second(module, inputs):
    leaves = [*inputs, *module.parameters()]
    found = torch.autograd.grad(loss_of(module(*inputs)), leaves, create_graph=True, materialize_grads=True)
    total = sum([grad.square().sum() for grad in found])
    if not total.requires_grad:
        return [torch.zeros_like(leaf) for leaf in leaves]
    return torch.autograd.grad(total, leaves, materialize_grads=True)


def in_checkpoint(module, inputs):
    return gradients(module, inputs, lambda *inputs: checkpoint(module, *inputs, use_reentrant=False))


def saved_elsewhere(module, inputs):
    def run(*inputs):
        with torch.autograd.graph.save_on_cpu():
            return module(*inputs)

    return gradients(module, inputs, run)


def in_a_thread(module, inputs):
    found = []
    in_threads(1, lambda _: found.extend(gradients(module, inputs)))
    return found


def functional(module, inputs):
    params = {name: param.detach() for name, param in module.named_parameters()}
    inputs = tuple([each.detach() for each in inputs])
    of_inputs, of_params = grad(lambda *both: loss_of(functional_call(module, both[1], both[0])), (0, 1))(
        inputs, params
    )
    return [*of_inputs, *of_params.values()]


def batched(module, inputs):
    result = tensors_of(module(*inputs))[-1]
    grads = torch.stack([torch.ones_like(result), result.detach().cos()])
    leaves = [*inputs, *module.parameters()]
    found = torch.autograd.grad(result, leaves, grads, is_grads_batched=True, allow_unused=True)
    return [leaf.new_zeros(2, *leaf.shape) if grad is None else grad for grad, leaf in zip(found, leaves, strict=True)]


def frozen(module, inputs):
    for param in [*module.parameters()][::2]:
        param.requires_grad_(False)
    leaves = [*inputs, *[param for param in module.parameters() if param.requires_grad]]
    return torch.autograd.grad(loss_of(module(*inputs)), leaves, materialize_grads=True)


def copied(module, inputs):
    return gradients(copy.deepcopy(module), inputs)


def of_inputs(environment):
    """Which are gradients of inputs alone."""
    environment.of_inputs = True
    return environment


@of_inputs
def forward_mode(module, inputs):
    inputs = tuple([each.detach() for each in inputs])
    return [jvp(lambda *inputs: loss_of(module(*inputs)), inputs, tuple([each.cos() for each in inputs]))[1]]


@of_inputs
def jacobians(module, inputs):
    inputs = tuple([each.detach() for each in inputs])
    return jacrev(lambda *inputs: loss_of(module(*inputs)), tuple(range(len(inputs))))(*inputs)


ENVIRONMENTS = [gradients, accumulated, second, in_checkpoint, saved_elsewhere, in_a_thread, functional, batched]
ENVIRONMENTS += [frozen, copied, forward_mode, jacobians]


# What is refused, or different, and why.
REFUSED = {
    ("random", jacobians),  # vmap draws nothing anew
    ("dropout", jacobians),
    ("attention", jacobians),
    ("hook within", forward_mode),  # the rule is transposed, and the hook with it
    ("hooks", forward_mode),
    ("no_grad within", forward_mode),  # which it does not stop
    ("checkpoint within", forward_mode),  # its rule is transposed, which torch.func does: it has no hooks
    ("pruned", functional),  # its weight is computed by a hook, of parameters that the forward does not meet
}
COUNTING = ("batch norm", "another buffer", "attribute", "buffer", "spectral norm")  # what they do depends on how often


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@given(
    name=st.sampled_from(sorted(MODULES)),
    rule=st.sampled_from(list(RULES)),
    form=st.sampled_from(sorted(FORMS)),
    environment=st.sampled_from(ENVIRONMENTS),
)
@examples(150)
def test_modules_have_the_gradients_and_the_state_that_they_have_without_a_rule(name, rule, form, environment):
    assume(environment is not second or RULES[rule] == (1, 1))
    # A checkpoint runs its block again for each pass that comes to it again.
    assume(environment is not in_checkpoint or rule not in OFTEN or name not in COUNTING)
    assume((name, environment) not in REFUSED)
    make, *shapes = MODULES[name]
    plain, module = [made(make) for _ in range(2)]
    inputs = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    try:
        expected = state_after(plain, inputs, environment)
    except RuntimeError:
        assume(False)  # torch does not do it
    of_inputs, of_params = RULES[rule]
    count = len(expected[0]) if hasattr(environment, "of_inputs") else len(inputs)
    factors = [of_inputs if place < count else of_params for place in range(len(expected[0]))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", go.GradOverrideWarning)  # that of a copy is not that of its original
        handle = FORMS[form](module, rule)
        try:
            found = state_after(module, inputs, environment)
        finally:
            if handle is not None:
                handle.remove()
    closely(list(found[0]), [factor * grad for factor, grad in zip(factors, expected[0], strict=True)])
    assert found[1] == expected[1]
    closely(found[2], expected[2])


def made(make):
    torch.manual_seed(0)
    return make().double()


def state_after(module, inputs, environment):
    """The gradients, the plain attributes, and the buffers with what is drawn next."""
    torch.manual_seed(1)
    found = environment(module, [each.clone().requires_grad_() for each in inputs])
    attributes = [getattr(part, "runs", None) for part in module.modules()]
    return (
        [each.detach() for each in found],
        attributes,
        [torch.rand(1).double(), *[b.double() for b in module.buffers()]],
    )
