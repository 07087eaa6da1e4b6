"""Checkpoints that are reentrant, where overrides that are left before the block runs again are warned of, for torch
compares nothing; other Functions that run their block again; and selective ones, which do so once only.
"""

import functools
import inspect
import warnings

import pytest
import torch
import torch.nn.functional as F
from oracles import closely, exactly, noise
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import CheckpointError, checkpoint, create_selective_checkpoint_contexts

import gradoverride as go
from overrides.models import doubled, gradient, mlp, tripled


def halved(x):
    return x / 2


class Relu(nn.Module):
    def forward(self, x):
        return halved(F.relu(x) * 4)


RULES = {
    "class": {nn.ReLU: doubled},
    "function": {F.relu: lambda grad_output, input: 2 * grad_output * (input > 0)},
    "path": {f"{__name__}:halved": lambda grad_output: 3 * grad_output},
}


def model_for(kind):
    return mlp() if kind == "class" else nn.Sequential(nn.Linear(3, 3), Relu()).double()


@pytest.fixture(params=["in a model", "in the whole process"])
def overriding(request):
    """What overrides a model, or all."""
    return go.override if request.param == "in a model" else lambda model, rules: go.override(rules)


def in_checkpoint(model):
    return lambda x: checkpoint(model, x, use_reentrant=True)


@pytest.fixture
def x():
    return noise(5, 3)


@pytest.mark.parametrize("kind", RULES)
def test_override_left_before_the_block_is_run_again_warns_of_its_rule(kind, overriding, x):
    model = model_for(kind)
    with (
        pytest.warns(go.GradOverrideWarning, match=r"no longer in force, and a reentrant checkpoint .*use_reentrant"),
        overriding(model, RULES[kind]),
    ):
        in_checkpoint(model)(x)


@pytest.mark.parametrize("target", [F.gelu, torch.tanh, F.softplus, torch.Tensor.exp])
def test_so_does_one_of_a_function_that_has_no_signature(target, overriding, x):
    class Model(nn.Module):
        def forward(self, x):
            return target(x)

    handle = overriding(model := Model(), {target: doubled})
    result = in_checkpoint(model)(x)
    with pytest.warns(go.GradOverrideWarning, match="no longer in force, and a reentrant checkpoint"):
        handle.remove()
    with warnings.catch_warnings(), overriding(model, {target: doubled}):
        warnings.simplefilter("error")
        result = in_checkpoint(model)(x)
        result.sum().backward()
    plain = x.detach().requires_grad_()
    closely(x.grad, 2 * torch.autograd.grad(target(plain).sum(), plain)[0])


def handing_over(x):
    return go.save_for_backward(x * 1, factor=torch.full_like(x, 5))


def test_so_does_one_of_a_path_whose_function_hands_something_over(overriding, x):
    class Model(nn.Module):
        def forward(self, x):
            return handing_over(x)

    handle = overriding(
        model := Model(), {f"{__name__}:handing_over": lambda grad_output, factor: grad_output * factor}
    )
    in_checkpoint(model)(x)
    with pytest.warns(go.GradOverrideWarning, match="no longer in force, and a reentrant checkpoint"):
        handle.remove()


@pytest.mark.parametrize("kind", RULES)
def test_override_left_after_backward_is_right_and_says_nothing(kind, overriding, x):
    model = model_for(kind)
    with overriding(model, RULES[kind]):
        expected = gradient(model, x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with overriding(model, RULES[kind]):
            result = in_checkpoint(model)(x)
            result.backward(torch.linspace(-1, 1, result.numel(), dtype=result.dtype).view_as(result))
    closely(x.grad, expected)


def test_the_same_rule_twice_that_is_left_after_backward_says_nothing(overriding, x):
    model = nn.Sequential(nn.ReLU())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with overriding(model, {nn.ReLU: doubled}), overriding(model, {nn.ReLU: doubled}):
            in_checkpoint(model)(x).sum().backward()
    closely(x.grad, 4 * (x > 0).double())


@pytest.mark.parametrize("kind", RULES)
def test_calls_without_a_gradient_say_nothing(kind, overriding, x):
    model = model_for(kind)
    with warnings.catch_warnings():
        warnings.simplefilter("error", go.GradOverrideWarning)
        warnings.filterwarnings("ignore", "None of the inputs have requires_grad", UserWarning)
        with overriding(model, RULES[kind]), torch.no_grad():
            model(x)
            checkpoint(model, x.detach(), use_reentrant=True)


def test_handle_removed_before_backward_warns_too(overriding, x):
    model = mlp()
    handle = overriding(model, {nn.ReLU: doubled})
    in_checkpoint(model)(x)
    with pytest.warns(go.GradOverrideWarning, match="reentrant checkpoint"):
        handle.remove()


# --- Functions of others that run their block again: adjoints of solvers, invertible layers ---


class Solver(torch.autograd.Function):
    """Steps of `y + block(y)`: some without a graph, and all anew, twice as small, in the backward."""

    @staticmethod
    def forward(ctx, block, y, *parameters):
        ctx.block = block
        ctx.save_for_backward(y)
        with torch.no_grad():
            for _ in range(4):
                y = y + block(y)
        return y

    @staticmethod
    def backward(ctx, grad):
        (start,) = ctx.saved_tensors
        with torch.enable_grad():
            start = start.detach().requires_grad_()
            y = start + ctx.block(start)
        return None, *torch.autograd.grad(y, (start, *ctx.block.parameters()), grad)


def block():
    return nn.Sequential(nn.Linear(3, 3), nn.ReLU()).double()


def solve(block):
    return lambda x: Solver.apply(block, x, *block.parameters())


@pytest.mark.parametrize("target", [nn.ReLU, F.relu])
def test_override_left_before_a_function_of_others_runs_its_block_again_warns(target, overriding, x):
    model = block()
    with (
        pytest.warns(go.GradOverrideWarning, match="no longer in force, .* the adjoint of a differential equation"),
        overriding(model, {target: doubled}),
    ):
        solve(model)(x)


@pytest.mark.parametrize("target", [nn.ReLU, F.relu])
def test_override_left_after_a_function_of_others_has_run_its_block_again_says_nothing(target, overriding, x):
    model = block()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with overriding(model, {target: doubled}):
            expected = gradient(lambda x: x + model(x), x)
        with overriding(model, {target: doubled}):
            found = gradient(solve(model), x)
    closely(found, expected)


def test_block_that_a_function_of_others_runs_without_a_gradient_says_nothing(overriding, x):
    model = block().requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with overriding(model, {nn.ReLU: doubled}):
            solve(model)(x.detach())


def test_function_with_a_rule_that_calls_an_overridden_module_says_nothing(overriding, x):
    model = nn.Sequential(nn.ReLU())
    ruled = go.custom_backward(lambda grad_output: 3 * grad_output)(lambda x: model(x))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with overriding(model, {nn.ReLU: doubled}):
            exactly(gradient(ruled, x), gradient(lambda x: 3 * x, x))


def test_function_of_torch_that_a_function_of_others_calls_itself_says_nothing(overriding, x):
    class Gate(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * F.relu(x)

        @staticmethod
        def backward(ctx, grad):
            (x,) = ctx.saved_tensors
            return 2 * grad * x.clamp(min=0)

    class Model(nn.Module):
        def forward(self, x):
            return Gate.apply(F.relu(x) + 1)

    model = Model()
    expected = 2 * gradient(model, x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with overriding(model, {F.relu: doubled}):
            exactly(gradient(model, x), expected)


def by_output(grad_output, output):
    return 3 * grad_output * output


def by_input(grad_output, input):
    return 5 * grad_output * input


@pytest.mark.parametrize("target", [nn.ReLU, F.relu, "*"])
def test_block_that_is_run_again_under_another_rule_is_an_error(target, x):
    model = nn.Sequential(nn.ReLU())
    with go.override(model, {target: by_output}):
        result = checkpoint(model, x, use_reentrant=False)
    with go.override(model, {target: by_input}), pytest.raises(CheckpointError, match="different metadata"):
        result.sum().backward()


@pytest.mark.parametrize("target", [nn.ReLU, F.relu, "*"])
def test_block_that_is_run_again_under_the_same_rule_is_right(target, x):
    model = nn.Sequential(nn.ReLU())
    with go.override(model, {target: by_output}):
        result = checkpoint(model, x, use_reentrant=False)
    with go.override(model, {target: by_output}):
        result.sum().backward()
    closely(x.grad, 3 * x.detach().clamp(min=0))


class Counting(nn.Module):
    """Runs its part in train mode, and counts."""

    def __init__(self, part):
        super().__init__()
        self.part = part
        self.runs = 0

    def forward(self, x):
        self.runs += 1
        return self.part(x)


def normed():
    torch.manual_seed(2)
    return nn.Sequential(
        nn.Linear(3, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Dropout(), nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    ).double()


def through(grad_output, vjp):
    return vjp.by_name(grad_output)


@pytest.mark.parametrize("targets", [[nn.ReLU], [nn.ReLU, nn.Sequential], [Counting, nn.Sequential, nn.BatchNorm1d]])
def test_checkpoint_runs_its_block_again_once_for_all_rules_that_ask_for_vjp(targets, x):
    plain, model = Counting(normed()), Counting(normed())
    torch.manual_seed(3)
    checkpoint(plain, x, use_reentrant=False).sin().sum().backward()
    expected, x.grad = x.grad, None
    with go.override(model, dict.fromkeys(targets, through)):
        torch.manual_seed(3)
        result = checkpoint(model, x, use_reentrant=False).sin().sum()
        for _ in range(2):
            x.grad, before = None, model.runs
            model.zero_grad()
            result.backward(retain_graph=True)
            closely(x.grad, expected)
            assert model.runs == before + 1
    assert plain.runs == 2
    for (_, ours), param in zip(model.named_parameters(), plain.parameters(), strict=True):
        closely(ours.grad, param.grad)
    assert model.part[1].num_batches_tracked == 3


def with_the_module(grad_output, module, vjp):
    return vjp.by_name(grad_output)


def with_the_weight(grad_output, weight, vjp):
    return vjp.by_name(grad_output)


@pytest.mark.parametrize("around", [True, False])
@pytest.mark.parametrize("rule", [with_the_module, with_the_weight])
def test_weight_that_is_computed_is_right_in_a_checkpoint(rule, around, x):
    torch.manual_seed(1)
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 3)), nn.Tanh()).double()
    leaves = [x, *model.parameters()]
    expected = torch.autograd.grad(model(x).sin().sum(), leaves)
    targets = {model[0]: rule, nn.Sequential: through} if around else {model[0]: rule}
    with go.override(model, targets):
        closely(torch.autograd.grad(checkpoint(model, x, use_reentrant=False).sin().sum(), leaves), expected)


def test_vjp_of_several_gradients_is_right_in_a_checkpoint(x):
    def summed(grad_output, vjp):
        return vjp(grad_output) + vjp(grad_output.cos()) - vjp(2 * grad_output)

    model = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Tanh(), nn.Tanh()), nn.Tanh()).double()
    with go.override(model, {nn.Sequential: tripled, nn.Tanh: summed}):
        expected = gradient(model, x)
        closely(gradient(lambda x: checkpoint(model, x, use_reentrant=False), x), expected)


def test_second_derivative_in_a_checkpoint_is_that_without_it(x):
    model = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Tanh(), nn.Sigmoid()), nn.Tanh()).double()

    def second(function):
        (grad,) = torch.autograd.grad(function(x).sin().sum(), x, create_graph=True)
        return torch.autograd.grad(grad.sin().sum() + function(x).sum(), x)[0]

    with go.override(
        model, {nn.Sequential: tripled, nn.Tanh: lambda grad_output, output, vjp: vjp(output * grad_output)}
    ):
        closely(second(lambda x: checkpoint(model, x, use_reentrant=False)), second(model))


def twice(grad_output, vjp):
    return vjp(2 * grad_output)


def twice_in_two_passes(grad_output, vjp):
    return vjp(3 * grad_output) - vjp(grad_output.clone())


def twice_of_all(grad_output, vjp, params):
    return {name: 2 * grad for name, grad in vjp.by_name(grad_output).items()}


@pytest.mark.parametrize("rule", [twice, twice_in_two_passes, twice_of_all])
@pytest.mark.parametrize("retained", [False, True])
@pytest.mark.parametrize("around", [None, tripled], ids=["alone", "within another"])
def test_block_runs_again_once_for_parameters_that_are_left_to_autograd(rule, retained, around, x):
    """Their gradient is for the unmodified gradient of the result, and asked for beside that of the arguments."""

    class Normed(nn.Sequential):
        pass

    def build():
        torch.manual_seed(0)
        parts = nn.Linear(3, 3), Normed(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.5))
        return nn.Sequential(*parts, Normed(nn.Linear(4, 2), nn.BatchNorm1d(2))).double()

    def gradients(model, call):
        torch.manual_seed(1)
        result = call(x)
        for _ in range(1 + retained):
            result.sin().sum().backward(retain_graph=retained)
        found, x.grad = x.grad, None
        return [found, *[param.grad for param in model.parameters()]]

    plain, blocked = build(), build()
    rules = {Normed: rule, **({nn.Sequential: around} if around else {})}
    with go.override(plain, rules), go.override(blocked, rules):
        expected = gradients(plain, plain)
        found = gradients(blocked, lambda x: checkpoint(blocked, x, use_reentrant=False))
    for one, other in zip(found, expected, strict=True):
        closely(one, other)
    assert [part.num_batches_tracked.item() for part in (plain[1][1], plain[2][1])] == [1, 1]
    assert [part.num_batches_tracked.item() for part in (blocked[1][1], blocked[2][1])] == [2 + retained] * 2


def in_selective_checkpoint(model):
    contexts = functools.partial(create_selective_checkpoint_contexts, [torch.ops.aten.addmm.default])
    return lambda x: checkpoint(model, x, use_reentrant=False, context_fn=contexts)


@pytest.mark.parametrize("rule", [twice, twice_in_two_passes, twice_of_all])
@pytest.mark.parametrize("around", [None, tripled], ids=["alone", "within another"])
@pytest.mark.parametrize("steps", ["deep", "beside"])
def test_a_model_with_a_rule_may_have_checkpoints_of_its_own_within_one(rule, around, steps, x):
    """For a second gradient the inner ones run their blocks again, and are given what the outer one has given back."""

    class Inner(nn.Sequential):
        def forward(self, x):
            for part in self:
                x = checkpoint(part, x, use_reentrant=False)
            return x.sin()

    def build():
        torch.manual_seed(0)
        parts = [nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3), nn.Tanh()), nn.Linear(3, 3)]
        return nn.Sequential(Inner(*parts) if steps == "beside" else Inner(parts[0], Inner(*parts[1:]))).double()

    def gradients(model, call):
        call(x).sin().sum().backward()
        found, x.grad = x.grad, None
        return [found, *[param.grad for param in model.parameters()]]

    plain, blocked = build(), build()
    rules = {Inner: rule, **({type(plain): around} if around else {})}
    with go.override(plain, rules), go.override(blocked, rules):
        expected = gradients(plain, plain)
        found = gradients(blocked, lambda x: checkpoint(blocked, x, use_reentrant=False))
    for one, other in zip(found, expected, strict=True):
        closely(one, other)


def test_first_call_of_a_surrogate_may_be_in_a_selective_checkpoint(x):
    """What is computed in one call alone would be given back in the place of another result."""
    sign = go.straight_through(torch.sign, surrogate=torch.tanh)

    def block(x):
        return torch.tanh(0.3 * sign(x)) + torch.tanh(x).sin()

    contexts = functools.partial(create_selective_checkpoint_contexts, [torch.ops.aten.tanh.default])
    first = checkpoint(block, x, use_reentrant=False, context_fn=contexts)
    (found,) = torch.autograd.grad(first.sum(), x)
    value, slope = torch.tanh(x.detach()), 1 - torch.tanh(x.detach()) ** 2
    outer = 0.3 * (1 - torch.tanh(0.3 * torch.sign(x.detach())) ** 2)
    closely(found, (outer + value.cos()) * slope)


class OnDisk:
    """Hooks on saved tensors that count what they are given."""

    def __init__(self):
        self.count = 0

    def pack(self, tensor):
        self.count += 1
        return tensor.numpy(force=True).copy()

    def unpack(self, array):
        return torch.from_numpy(array)


@pytest.mark.parametrize("respects", [None, True, False])
def test_selective_checkpoint_takes_no_hooks_of_a_rule_for_those_of_the_user(respects, x):
    options = {} if respects is None else {"respect_saved_tensors_hooks": respects}
    if options and "respect_saved_tensors_hooks" not in inspect.signature(checkpoint).parameters:
        pytest.skip("torch has no such option before 2.15")
    contexts = functools.partial(create_selective_checkpoint_contexts, [torch.ops.aten.addmm.default])
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    wanted = [x, *model.parameters()]
    with go.override(model, {nn.Linear: twice}):
        expected = torch.autograd.grad(model(x).sum(), wanted)
        result = checkpoint(model, x, use_reentrant=False, context_fn=contexts, **options)
        exactly(torch.autograd.grad(result.sum(), wanted), expected)
        disk = OnDisk()
        if options:
            with torch.autograd.graph.saved_tensors_hooks(disk.pack, disk.unpack):
                result = checkpoint(model, x, use_reentrant=False, context_fn=contexts, **options)
            assert (disk.count > 1) == respects  # the results of both layers; the input of the block in any case
            exactly(torch.autograd.grad(result.sum(), wanted), expected)


def test_rule_in_a_selective_checkpoint_is_in_force_and_one_of_a_function_that_asks_for_a_second_gradient_is_refused():
    model, x = nn.Sequential(nn.Linear(3, 3), nn.Tanh()).double(), noise(2, 3)
    (expected,) = torch.autograd.grad(model(x).sum(), x)
    for rule in (
        lambda grad_output, output: 2 * grad_output * (1 - output**2),
        lambda grad_output, vjp: vjp(2 * grad_output),
        lambda grad_output, vjp: vjp(grad_output) + vjp(grad_output.clone()),
    ):
        with go.override(model, {nn.Tanh: rule}):
            (actual,) = torch.autograd.grad(in_selective_checkpoint(model)(x).sum(), x)
        closely(actual, 2 * expected)
    with go.override(model, {torch.tanh: lambda grad_output, vjp: vjp(grad_output) + vjp(grad_output.cos())}):
        result = in_selective_checkpoint(model)(x)
        with pytest.raises(go.UnsupportedError) as caught:
            result.sum().backward()
    for part in ("('vjp', or", "once in a backward pass", "it was asked for again", "without context_fn"):
        assert part in str(caught.value)
    assert "in the rule '<lambda>'" in caught.value.__notes__[0]


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("run", [torch.Tensor.backward, torch.autograd.backward, torch.autograd.grad])
@pytest.mark.parametrize("kind", RULES)
def test_block_is_run_again_under_the_rules_of_the_whole_process(kind, run, reentrant, x):
    if reentrant and run is torch.autograd.grad:
        pytest.skip("torch refuses it")
    model, given = model_for(kind), x * 1
    with go.override(model, RULES[kind]):
        expected = gradient(model, x)
    given.retain_grad()
    with go.override(RULES[kind]):
        result = checkpoint(model, given, use_reentrant=reentrant)
        weights = torch.linspace(-1, 1, result.numel(), dtype=result.dtype).view_as(result)
        loss = (result * weights).sum()
        found = run(loss, given) if run is torch.autograd.grad else run(loss)
    closely(found[0] if found else given.grad, expected)


def test_what_a_rule_calls_in_a_backward_pass_is_not_under_the_rules_of_the_whole_process(x):
    """As within `override(model, ...)`: the second derivative is that of the rule as written."""

    def squared(grad_output, input):
        return F.relu(grad_output) ** 2 * input

    with go.override({F.relu: squared}):
        ones = torch.ones(5, 3, dtype=torch.float64, requires_grad=True)
        (first,) = torch.autograd.grad(F.relu(x), x, ones, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), ones)
    closely(first, x.detach())
    closely(second, 2 * x.detach())


class Within(nn.Module):
    """A forward that has a part of itself run again: a closure, a method or a module."""

    def __init__(self, how):
        super().__init__()
        self.how, self.linear, self.block = how, nn.Linear(3, 3), Relu()
        self.double()

    def inner(self, x):
        return halved(torch.tanh(F.relu(self.linear(x)) * 4))

    def forward(self, x, reentrant=True):
        if reentrant is None:
            return self.inner(x) if "block" not in self.how else torch.tanh(self.block(x))
        run = {
            "closure": lambda x: halved(torch.tanh(F.relu(self.linear(x)) * 4)),
            "method": self.inner,
            "closure of the method": lambda x: self.inner(x * 1),
            "block": self.block,
            "closure of the block": lambda x: self.block(x),
        }[self.how]
        result = checkpoint(run, x, use_reentrant=reentrant)
        return torch.tanh(result) if "block" in self.how else result


WITHIN = {**RULES, "builtin function": {torch.tanh: lambda grad_output, vjp: 2 * vjp(grad_output)}}
del WITHIN["class"]


@pytest.mark.parametrize("kind", WITHIN)
def test_reentrant_block_that_is_a_function_is_refused_under_rules_for_functions_of_a_model(kind, x):
    model = Within("closure")
    rule = next(iter(WITHIN[kind].values()))
    name = "halved" if kind == "path" else "tanh" if "builtin" in kind else "relu"
    place = rf"test_checkpoints\.py:{rule.__code__.co_firstlineno}"
    text = (
        rf"override of function '.*{name}': the rule '<lambda>' \(.*{place}\) must be in force.*Make the block a module"
    )
    with go.override(model, WITHIN[kind]), pytest.raises(go.UnsupportedError, match=text):
        model(x)


@pytest.mark.parametrize("kind", WITHIN)
def test_the_same_without_a_gradient_is_not(kind, x):
    model = Within("closure")
    with go.override(model, WITHIN[kind]), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch's, that nothing is to be run again
        closely(model(x.detach()), model(x.detach(), None).detach())
        with torch.no_grad():
            closely(model(x), model(x, None))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("how", ["method", "closure of the method", "block", "closure of the block"])
@pytest.mark.parametrize("kind", WITHIN)
def test_block_that_is_a_module_or_a_method_is_run_again_under_rules_for_functions_of_a_model(kind, how, reentrant, x):
    model, given = Within(how), x.detach().clone().requires_grad_()
    with go.override(model, WITHIN[kind]):
        model(given, None).sum().backward()
        model(x, reentrant).sum().backward()
    closely(x.grad, given.grad)


@pytest.mark.parametrize("how", ["closure", "method"])
def test_reentrant_block_that_is_no_module_is_run_again_under_rules_of_the_whole_process(how, x):
    model, given = Within(how), x.detach().clone().requires_grad_()
    with go.override(WITHIN["builtin function"]):
        model(given, None).sum().backward()
        model(x).sum().backward()
    closely(x.grad, given.grad)


def test_override_of_a_function_without_a_signature_left_before_the_block_is_run_again_warns_too(x):
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh()).double()
    with pytest.warns(go.GradOverrideWarning, match="no longer in force"), go.override(WITHIN["builtin function"]):
        in_checkpoint(model)(x)
