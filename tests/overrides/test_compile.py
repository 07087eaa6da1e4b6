"""Overrides before and after `torch.compile`, and undone. Contract, section 5."""

import copy
import functools
import operator

import pytest
import torch
import torch.nn.functional as F
from oracles import closely, noise
from torch import nn
from torch._dynamo.exc import InternalTorchDynamoError
from torch._dynamo.testing import CompileCounterWithBackend

import gradoverride as go
from overrides.models import Branching, doubled, gradient, guided, guided_by_hand, mlp, negated

pytestmark = pytest.mark.usefixtures("fresh_compiler")


@pytest.fixture
def x():
    return noise(5, 3)


def compiled(model, backend="aot_eager"):
    return torch.compile(model, backend=backend, fullgraph=True)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("first", ["override", "compile", "first call"])
def test_override_before_and_after_compiling_is_seen_and_its_undo_too(first, backend, x):
    model = mlp()
    by_hand, plain = gradient(guided_by_hand(mlp()), x), gradient(mlp(), x)
    run = compiled(model, backend) if first != "override" else None
    if first == "first call":
        closely(gradient(run, x), plain)
    handle = go.override(model, {nn.ReLU: guided})
    run = compiled(model, backend) if run is None else run
    closely(gradient(run, x), by_hand)
    closely(gradient(run, x), by_hand)
    handle.remove()
    closely(gradient(run, x), plain)


OF_COMPILED = {
    "class": lambda run, model: {nn.ReLU: guided},
    "class and function": lambda run, model: go.Registry("guided", {nn.ReLU: guided, F.relu: guided}),
    "preset": lambda run, model: "guided_backprop",
    "function": lambda run, model: {F.relu: guided},
    "glob": lambda run, model: {"*1": guided},
    "glob as in the state_dict": lambda run, model: {"_orig_mod.1": guided, "_orig_mod.2.1": guided},
    "predicate": lambda run, model: {(lambda name, module: name in ("1", "2.1")): guided},
}


@pytest.mark.parametrize("called", [False, True], ids=["before the first call", "after it"])
@pytest.mark.parametrize("rules", OF_COMPILED.values(), ids=OF_COMPILED)
def test_compiled_model_is_overridden_as_the_model_itself(rules, called, x):
    model = mlp()
    run = compiled(model)
    by_hand, plain = gradient(guided_by_hand(mlp()), x), gradient(mlp(), x)
    if called:
        closely(gradient(run, x), plain)
    with go.override(run, rules(run, model)) as plan:
        closely(gradient(run, x), by_hand)
        closely(gradient(model, x), by_hand)
        assert not any("_orig_mod" in row.path or "OptimizedModule" in row.cls for row in plan.table)
        assert [row[:4] for row in go.explain(run)] == [row[:4] for row in plan.table]
    closely(gradient(run, x), plain)
    assert [type(module) for module in model.modules()] == [type(module) for module in mlp().modules()]


@pytest.mark.parametrize("target", [lambda run, model: run, lambda run, model: model], ids=["compiled", "original"])
@pytest.mark.parametrize("root", [lambda run, model: run, lambda run, model: model], ids=["compiled", "original"])
def test_compiled_module_as_a_target_is_the_module_it_was_made_of(root, target, x):
    model = mlp()
    run = compiled(model)
    plain = gradient(mlp(), x)
    with go.override(root(run, model), {target(run, model): doubled}) as plan:
        assert str(plan).splitlines()[1].startswith("(the model)  Sequential  module Sequential")
        closely(gradient(run, x), 2 * plain)
    go.override(root(run, model), {target(run, model): doubled})
    go.remove_overrides(run)
    closely(gradient(run, x), plain)
    with pytest.raises(go.TargetNotFoundError, match=r"the module Sequential.*Of this class it has '', '2'"):
        go.override(root(run, model), {compiled(mlp()): doubled})


BLOCKS = {
    "class": lambda blocks: nn.Linear,
    "glob": lambda blocks: "blocks.*",
    "glob as in the state_dict": lambda blocks: "blocks.?._orig_mod",
    "predicate": lambda blocks: lambda name, module: name.startswith("blocks.") and isinstance(module, nn.Linear),
}


@pytest.mark.parametrize("kind", BLOCKS)
def test_compiled_blocks_of_a_model_have_their_plain_names(kind, x):
    blocks = [nn.Linear(3, 3), nn.Linear(3, 3)]
    model = nn.ModuleDict({"blocks": nn.Sequential(*blocks)}).double()
    plain = gradient(nn.Sequential(*blocks), x)
    for index, block in enumerate(blocks):
        model["blocks"][index] = compiled(block)
    with go.override(model, {BLOCKS[kind](model): doubled}) as plan:
        assert [(row.path, row.cls) for row in plan.table] == [("blocks.0", "Linear"), ("blocks.1", "Linear")]
        closely(gradient(model["blocks"], x), 4 * plain)
    closely(gradient(model["blocks"], x), plain)


@pytest.mark.parametrize("rule", [doubled, negated, lambda grad_output, output: grad_output * (1 - output**2)])
def test_twelve_equal_blocks_compile_once(rule, x):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 3)
            self.act = nn.Tanh()

        def forward(self, x):
            return self.act(self.linear(x))

    blocks = nn.ModuleList([Block() for _ in range(12)]).double()
    counter = CompileCounterWithBackend("aot_eager")

    def through(x):
        for block in blocks:
            x = block(x)
        return x

    with go.override(blocks, {nn.Tanh: rule}):
        expected = gradient(through, x)
        for block in blocks:
            block.compile(backend=counter, fullgraph=True)
        closely(gradient(through, x), expected)
    assert counter.frame_count == 1
    with go.override(blocks, {nn.Tanh: rule}):
        closely(gradient(through, x), expected)
    assert counter.frame_count == 1


OF_CLASSES = {
    "module": lambda module: go.override(module, {module: negated}),
    "class": lambda module: go.override({type(module): negated}),
    "function": lambda module: go.override(module, {torch.relu: negated}),
}


@pytest.mark.parametrize("override", OF_CLASSES.values(), ids=OF_CLASSES)
def test_a_dozen_classes_that_are_overridden_and_compiled_each_compile(override):
    for scale in range(12):

        class Scaled(nn.Module):
            def forward(self, x, scale=scale):
                return torch.relu(x) * scale

        module, x = Scaled(), torch.ones(2, requires_grad=True)
        with override(module):
            expected = gradient(module, x)
            closely(gradient(compiled(module), x), expected)


def test_nested_overrides_compile_to_what_they_are_in_eager(x):
    model = mlp()
    with go.override(model, {nn.ReLU: guided}), go.override(model, {"1": doubled, "3": doubled}):
        expected = gradient(model, x)
        closely(gradient(compiled(model), x), expected)


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # Dynamo looks for one
@pytest.mark.parametrize("first", ["override", "compile"])
@pytest.mark.parametrize("outer", [doubled, negated])
def test_overridden_module_may_have_compiled_ones_within_that_have_rules_of_their_own(outer, first, x):
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3)).double()

    def compile_parts():
        for part in model:
            part.compile(backend="aot_eager", fullgraph=True)

    if first == "compile":
        compile_parts()
    go.override(model, {nn.ReLU: doubled, nn.Linear: doubled})
    go.override(model, {model: outer})
    eager = copy.deepcopy(model)
    if first == "override":
        compile_parts()
    closely(gradient(model, x), gradient(eager, x))


def test_override_of_a_model_with_keywords_and_a_dict_compiles(x):
    model = Branching().double()
    with go.override(model, {nn.ReLU: guided, model: doubled}):
        expected = gradient(model, x)
        closely(gradient(compiled(model), x), expected)


def test_rule_that_ran_in_compiled_code_alone_is_not_reported(x):
    model = mlp()
    with go.override(model, {nn.ReLU: guided}) as plan:
        gradient(compiled(model), x)
        assert str(plan).splitlines()[1].endswith("compiled")


PLACES = {
    "a class in the model": lambda model, rule: go.override(model, {nn.Tanh: rule}),
    "a function in the model": lambda model, rule: go.override(model, {torch.tanh: rule}),
    "a class in the process": lambda model, rule: go.override({nn.Tanh: rule}),
    "a function in the process": lambda model, rule: go.override({torch.tanh: rule}),
}


@pytest.mark.parametrize("second", PLACES)
@pytest.mark.parametrize("first", PLACES)
def test_none_of_two_rules_that_ran_in_compiled_code_alone_is_reported(x, first, second):
    model = nn.Sequential(nn.Tanh())
    plain = gradient(model, x)
    run = compiled(model)
    rules = functools.partial(doubled), functools.partial(guided)  # of no other test: that they were compiled is kept
    for _ in range(2):
        with PLACES[first](model, rules[0]) as one, PLACES[second](model, rules[1]) as two:
            gradient(run, x)
            assert [row.calls for row in (*one.table, *two.table)] == ["compiled", "compiled"]
    closely(gradient(run, x), plain)


def test_class_forward_replaced_while_overridden_is_refused_in_compiled_code(x):
    class Own(nn.Linear):
        pass

    module = Own(3, 3).double()
    with go.override(module, {module: doubled}):
        Own.forward = lambda self, input: 5 * nn.functional.linear(input, self.weight, self.bias)
        with pytest.raises(Exception, match="'Own' must keep its 'forward' while one is overridden and compiled"):
            compiled(module)(x)
        gradient(module, x)


@pytest.mark.filterwarnings("ignore:.*not a leaf Tensor is being accessed:UserWarning")  # by Dynamo itself
def test_a_weight_that_is_computed_is_no_parameter_to_ask_for(x):
    def tripled(grad_output, input, weight, bias):
        return {"input": grad_output @ weight, "weight": 3 * grad_output.T @ input, "bias": grad_output.sum(0)}

    module = nn.Linear(3, 2).double()
    go.override(module, {nn.Linear: tripled})
    run = compiled(module)
    _, weight, _ = torch.autograd.grad(run(x).sum(), [x, module.weight, module.bias])
    closely(weight, 3 * torch.ones(2, 5, dtype=torch.float64) @ x)
    original = module.weight
    del module.weight
    module.weight = 2 * original  # as `prune` leaves it
    for call in (module, run):
        with pytest.raises(
            (go.CapturedTensorError, InternalTorchDynamoError), match="must get each tensor that wants a gradient"
        ):
            call(x)


OPERATORS = {
    "x**2": (torch.pow, lambda x: x**2),
    "2**x": (torch.pow, lambda x: 2**x),
    "x**=2": (torch.pow, lambda x: operator.ipow(x * 1, 2)),
    "1 / x": (torch.div, lambda x: 1 / x),
    "1 - x": (torch.sub, lambda x: 1 - x),
    "x / 2": (torch.div, lambda x: x / 2),
}


class Calls(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@pytest.mark.parametrize("name", OPERATORS)
def test_operator_in_compiled_code_has_the_rule_of_its_function(name, x):
    target, function = OPERATORS[name]
    x = x.detach().abs().requires_grad_()
    expected = 10 * gradient(Calls(function), x)
    with go.override(model := Calls(function), {target: lambda grad_output, vjp: vjp(grad_output * 10)}):
        closely(gradient(compiled(model), x), expected)


UNLISTED = {
    "F.pad": (F.pad, lambda x: F.pad(x, (1, 1), value=2.0), True),
    "F.pad by name": (F.pad, lambda x: F.pad(input=x, pad=(1, 1), mode="reflect"), True),
    "masked.softmax": (F.softmax, lambda x: torch.masked.softmax(x, -1, mask=x > -1), False),
    "masked.sum": (torch.sum, lambda x: torch.masked.sum(x, -1, mask=x > 0), False),
    "F.upsample_nearest": (F.interpolate, lambda x: F.upsample_nearest(x[None], scale_factor=2), False),
}


@pytest.mark.parametrize("name", UNLISTED)
@pytest.mark.filterwarnings("ignore:.*not a leaf Tensor is being accessed:UserWarning")  # by Dynamo itself
@pytest.mark.filterwarnings("ignore:.*is deprecated:UserWarning")
def test_function_that_dynamo_shows_to_no_mode_has_its_rule_in_compiled_code(name, x):
    target, function, in_one_graph = UNLISTED[name]
    expected = 10 * gradient(Calls(function), x)
    with go.override(model := Calls(function), {target: lambda grad_output, vjp: vjp(grad_output * 10)}):
        torch.compiler.reset()
        closely(gradient(torch.compile(model, backend="aot_eager", fullgraph=in_one_graph), x), expected)


@pytest.mark.parametrize("whole", [False, True], ids=["in a model", "in the whole process"])
@pytest.mark.filterwarnings("ignore:.*never ran:gradoverride.GradOverrideWarning")
def test_function_that_dynamo_traces_into_unseen_is_refused_in_compiled_code(whole, x):
    model = Calls(lambda x: F.triplet_margin_with_distance_loss(x, x + 1, x - 1))
    rules = {F.triplet_margin_with_distance_loss: doubled}
    text = "override of function 'triplet_margin_with_distance_loss': its calls must be seen, and torch.compile shows"
    with go.override(rules) if whole else go.override(model, rules), pytest.raises(Exception, match=text):
        compiled(model)(x)
