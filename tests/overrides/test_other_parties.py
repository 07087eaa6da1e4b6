"""Overrides beside what others do to the same modules: sharding, wraps, hooks, pruning ... Contract, section 5."""

import copy
import functools
import os
import pickle
import types

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import wrapt
from oracles import closely, exactly, noise
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import fusion, prune, skip_init
from torch.utils.checkpoint import checkpoint

import gradoverride as go
from overrides.models import GuidedByHand, doubled, gradient, guided, mlp, tripled

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*is deprecated.*:DeprecationWarning",
    "ignore:.*is deprecated.*:FutureWarning",
    "ignore:.*should not be instantiated:DeprecationWarning",  # Dynamo's own doing, for any Function
    # of torch.distributed without a device
    "ignore:.*no accelerator.*:UserWarning",
    "ignore:.*FSDP.*:UserWarning",
)


class LinearFunction(torch.autograd.Function):
    """A linear layer as one writes it by hand, with multiples of its gradients."""

    @staticmethod
    def forward(ctx, x, weight, bias, factors):
        ctx.save_for_backward(x, weight)
        ctx.factors = factors
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, grad_output):
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.factors
        return of_x * grad_output @ weight, of_weight * grad_output.T @ x, of_bias * grad_output.sum(0), None


class LinearByHand(nn.Linear):
    factors = (1, 1, 1)

    def forward(self, x):
        return LinearFunction.apply(x, self.weight, self.bias, self.factors)


class TwiceFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad_output):
        return 2 * grad_output


def by_hand(model, factors=(1, 1, 1), *, is_guided=False):
    """A copy of `model` with hand-written layers in place of its own."""
    model = copy.deepcopy(model)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                child.__class__ = LinearByHand
                child.factors = factors
            elif is_guided and type(child) is nn.ReLU:
                setattr(module, name, GuidedByHand())
    return model


def asking(grad_output, input, weight, bias):
    return {"input": 2 * grad_output @ weight, "weight": 3 * grad_output.T @ input, "bias": 5 * grad_output.sum(0)}


def by_params(grad_output, params, vjp):
    factors = {"input": 2, "weight": 3, "bias": 5}
    return {name: factors[name] * grad for name, grad in vjp.by_name(grad_output).items()}  # not of frozen ones


def reading_module(grad_output, module):
    return 2 * grad_output @ module.weight


def running_forward(grad_output, input, forward):
    with torch.enable_grad():
        alias = input.detach().requires_grad_()
        return 2 * torch.autograd.grad(forward(alias), alias, grad_output)[0]


LINEAR_RULES = {
    "vjp": (doubled, (2, 1, 1)),
    "weight": (asking, (2, 3, 5)),
    "params": (by_params, (2, 3, 5)),
    "module": (reading_module, (2, 1, 1)),
    "forward": (running_forward, (2, 1, 1)),
}
EVERY_RULE = pytest.mark.parametrize(("rule", "factors"), LINEAR_RULES.values(), ids=LINEAR_RULES)


def full(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def all_gradients(model, x):
    """Of the argument and of all parameters, after a backward."""
    model.zero_grad()
    x = x.detach().requires_grad_()
    result = model(x)
    (result * torch.linspace(-1, 1, result.numel(), dtype=result.dtype).view_as(result)).sum().backward()
    named = {name.removeprefix("module."): full(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    return {"argument": x.grad, **{name: grad.clone() for name, grad in named.items()}}


def compare(found, expected):
    assert set(found) == set(expected)
    for name, grad in expected.items():
        closely(found[name], grad)


def traces_of_ours(model):
    """What is left of an override: attributes, and classes on top. One beneath another party's class is inert."""
    attributes = [name for module in model.modules() for name in module.__dict__ if "gradoverride" in name]
    return attributes + [type(module) for module in model.modules() if "_gradoverride_base" in type(module).__dict__]


@pytest.fixture
def model():
    return mlp()


@pytest.fixture
def x():
    return noise(5, 3)


def plain_linear(module, x):
    return F.linear(x, module.weight, module.bias)


# --- FSDP2 and DistributedDataParallel ---


@pytest.fixture(scope="module")
def group():
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


def sharded(model, parts=("2",)):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for part in parts:
        fully_shard(model.get_submodule(part), mesh=mesh)
    return fully_shard(model, mesh=mesh)


LINEAR_AND_RELU = {
    **{name: ({nn.Linear: rule}, {"factors": factors}) for name, (rule, factors) in LINEAR_RULES.items()},
    "guided": ({nn.ReLU: guided}, {"is_guided": True}),
    "both": ({nn.ReLU: guided, nn.Linear: asking}, {"is_guided": True, "factors": (2, 3, 5)}),
}
WRAPS = {"FSDP2": sharded, "DDP": DistributedDataParallel}


@pytest.mark.parametrize(("rules", "reference"), LINEAR_AND_RELU.values(), ids=LINEAR_AND_RELU)
@pytest.mark.parametrize("first", ["override", "wrap"])
@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
@pytest.mark.usefixtures("group")
def test_children_of_a_wrapped_model_have_their_rules_and_lose_them(model, x, rules, reference, first, wrap):
    expected, plain = all_gradients(by_hand(model, **reference), x), all_gradients(mlp(), x)
    if first == "override":
        handle = go.override(model, rules)
        wrapped = wrap(model)
    else:
        wrapped = wrap(model)
        before = [(type(module), list(module.__dict__)) for module in wrapped.modules()]
        handle = go.override(wrapped, rules)
    for _ in range(2):
        compare(all_gradients(wrapped, x), expected)
    handle.remove()
    compare(all_gradients(wrapped, x), plain)
    assert traces_of_ours(wrapped) == []
    if first == "wrap":
        assert [(type(module), list(module.__dict__)) for module in wrapped.modules()] == before


@pytest.mark.parametrize("rule", [doubled, lambda grad_output, vjp, module: 2 * vjp(grad_output)], ids=["", "module"])
@pytest.mark.parametrize("first", ["override", "wrap"])
@pytest.mark.parametrize("target", ["2", ""], ids=["part", "whole"])
@pytest.mark.usefixtures("group")
def test_module_that_is_sharded_itself_has_its_rule(x, rule, first, target):
    """`2` is sharded on its own. The whole is sharded at once: no part on its own."""
    model = mlp()
    part = model.get_submodule(target)
    reference = mlp()
    plain = all_gradients(mlp(), x)
    if target:
        reference[2] = nn.Sequential(*reference[2], Twice())  # the gradient of what comes before is doubled
        expected = all_gradients(reference, x)
        for name in ("2.0.weight", "2.0.bias"):  # its own parameters keep autograd's own
            expected[name] = plain[name]
    else:
        expected = {**plain, "argument": 2 * plain["argument"]}
    parts = ("2",) if target else ()
    if first == "override":
        handle = go.override(model, {part: rule})
        sharded(model, parts)
    else:
        sharded(model, parts)
    sharded_class = type(part)
    if first != "override":
        handle = go.override(model, {part: rule})
    compare(all_gradients(model, x), expected)
    handle.remove()
    compare(all_gradients(model, x), plain)
    assert type(part) is sharded_class
    assert traces_of_ours(model) == []


class Twice(nn.Module):
    def forward(self, x):
        return TwiceFunction.apply(x)


@pytest.mark.parametrize("rule", [doubled, by_params], ids=["vjp", "params"])
@pytest.mark.parametrize("first", ["override", "wrap"])
@pytest.mark.usefixtures("group")
def test_module_with_a_part_that_is_sharded_on_its_own_is_right_or_refused(model, x, rule, first):
    """Its gradients would have to be known before FSDP2 has the parameters of the part together."""
    plain = all_gradients(mlp(), x)
    if first == "override":
        handle = go.override(model, {model: rule})
        sharded(model)
    else:
        sharded(model)
        handle = go.override(model, {model: rule})
    with pytest.raises(go.UnsupportedError, match=r"2\.0\.weight.*'2' is sharded on its own.*Override '2'"):
        all_gradients(model, x)
    handle.remove()
    compare(all_gradients(model, x), plain)


@pytest.mark.usefixtures("group")
def test_overrides_around_sharding_come_and_go_in_any_order(model, x):
    plain = all_gradients(mlp(), x)
    part = model[2]
    first = go.override(model, {part: lambda grad_output, vjp: vjp(2 * grad_output)})
    sharded(model)
    second = go.override(model, {part: lambda grad_output, vjp: vjp(3 * grad_output)})
    six = all_gradients(model, x)
    closely(six["argument"], 6 * plain["argument"])
    closely(six["0.weight"], 6 * plain["0.weight"])
    closely(six["2.0.weight"], plain["2.0.weight"])
    first.remove()
    closely(all_gradients(model, x)["argument"], 3 * plain["argument"])
    second.remove()
    compare(all_gradients(model, x), plain)
    assert traces_of_ours(model) == []


@pytest.mark.usefixtures("group")
def test_override_after_one_that_sharding_has_kept_is_applied_once(model, x):
    plain = all_gradients(mlp(), x)
    handle = go.override(model, {"2": doubled})
    sharded(model)
    closely(all_gradients(model, x)["argument"], 2 * plain["argument"])
    handle.remove()
    with go.override(model, {"2": tripled}) as plan:
        closely(all_gradients(model, x)["argument"], 3 * plain["argument"])
        assert plan.table[0].calls == "1"
    compare(all_gradients(model, x), plain)
    assert traces_of_ours(model) == []


@pytest.mark.usefixtures("group")
def test_gradients_without_synchronisation_accumulate(model, x):
    expected = all_gradients(by_hand(model, (2, 3, 5)), x)
    parallel = DistributedDataParallel(model)
    with go.override(parallel, {nn.Linear: asking}):
        parallel.zero_grad()
        weights = torch.linspace(-1, 1, 10, dtype=torch.float64).view(5, 2)
        with parallel.no_sync():
            (parallel(x) * weights).sum().backward()
        (parallel(x) * weights).sum().backward()
    for name, parameter in model.named_parameters():
        closely(parameter.grad, 2 * expected[name])


@pytest.mark.parametrize("wrap", WRAPS, ids=WRAPS)
def test_two_ranks_have_the_mean_of_their_gradients(wrap, tmp_path):
    torch.multiprocessing.spawn(one_rank, (wrap, str(tmp_path)), nprocs=2)
    for order in ("override", "wrap"):
        inputs = [torch.load(tmp_path / f"x{rank}") for rank in range(2)]
        by_rank = [all_gradients(by_hand(mlp(), (2, 3, 5), is_guided=True), x) for x in inputs]
        for rank in range(2):
            found = torch.load(tmp_path / f"{order}{rank}")
            closely(found.pop("argument"), by_rank[rank]["argument"])
            compare(found, {name: (by_rank[0][name] + by_rank[1][name]) / 2 for name in found})
            assert len(found) == 6


def one_rank(rank, wrap, folder):
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", rank=rank, world_size=2, store=store)
    torch.manual_seed(rank)
    x = torch.randn(5, 3, dtype=torch.float64)
    torch.save(x, f"{folder}/x{rank}")
    rules = {nn.ReLU: guided, nn.Linear: asking}
    for order in ("override", "wrap"):
        model = mlp()
        if order == "override":
            go.override(model, rules)
        wrapped = WRAPS[wrap](model)
        if order == "wrap":
            go.override(wrapped, rules)
        torch.save(all_gradients(wrapped, x), f"{folder}/{order}{rank}")
    dist.barrier()
    # Not by torch's own end, which may wait for ever: DDP's destructor holds the GIL, and joins a thread that wants it.
    os._exit(0)


# --- forwards replaced on the instance, as accelerate does it ---


def hooked(module, around=lambda result: result):
    old_forward = module.forward
    module._old_forward = old_forward

    def new_forward(module, *args, **kwargs):
        return around(module._old_forward(*args, **kwargs))

    module.forward = functools.update_wrapper(functools.partial(new_forward, module), old_forward)


def unhooked(module):
    module.forward = module._old_forward
    del module._old_forward


@EVERY_RULE
@pytest.mark.parametrize("first_out", ["override", "wrap"])
def test_wrap_of_forward_after_an_override_is_right_whichever_goes_first(x, rule, factors, first_out):
    module = nn.Linear(3, 3).double()
    expected = all_gradients(by_hand(nn.Sequential(module), factors), x)
    plain = all_gradients(nn.Sequential(module), x)
    model = nn.Sequential(module)
    handle = go.override(module, {module: rule})
    hooked(module)
    compare(all_gradients(model, x), expected)
    if first_out == "override":
        handle.remove()
        compare(all_gradients(model, x), plain)
        unhooked(module)
    else:
        unhooked(module)
        compare(all_gradients(model, x), expected)
        handle.remove()
    compare(all_gradients(model, x), plain)
    assert type(module) is nn.Linear
    assert traces_of_ours(module) == []


def test_wrap_around_an_override_is_outside_of_it(x):
    module = nn.Linear(3, 3).double()
    plain = gradient(module, x)
    with go.override(module, {module: doubled}):
        hooked(module, lambda result: 5 * result)
        closely(gradient(module, x), 10 * plain)


def test_wraps_of_the_forward_of_a_class_by_wrapt_stay_around_an_override(x):
    """What wrapt puts there compares equal to what it wraps, and is another object each time that it is asked for."""

    class Own(nn.Linear):
        def forward(self, input):
            return super().forward(input)

    def wrap(factor):
        wrapt.wrap_function_wrapper(Own, "forward", lambda wrapped, _, args, kwargs: factor * wrapped(*args, **kwargs))

    module = Own(3, 3).double()
    plain = gradient(module, x)
    with go.override(module, {module: doubled}):
        closely(gradient(module, x), 2 * plain)
        for factor in (5, 7):
            wrap(factor)
            plain *= factor
            closely(gradient(module, x), 2 * plain)
    closely(gradient(module, x), plain)
    with go.override({Own: doubled}):
        wrap(11)
        closely(gradient(module, x), 11 * 2 * plain)
        with go.override(module, {module: tripled}):
            closely(gradient(module, x), 3 * 11 * 2 * plain)
    with go.override(module, {module: tripled}):
        closely(gradient(module, x), 3 * 11 * plain)


def test_module_whose_forward_was_replaced_before_is_refused(x):
    module = nn.Linear(3, 3).double()
    hooked(module)
    before = dict(module.__dict__)
    text = "somebody has put another one on the instance.*, or undo it and do it again afterwards$"
    with pytest.raises(go.UnsupportedError, match=text):
        go.override(module, {module: doubled})
    assert module.__dict__ == before


def test_override_after_one_that_a_forward_on_the_instance_passes_by_is_refused(x):
    module = nn.Linear(3, 3).double()
    told = pytest.warns(go.GradOverrideWarning, match=r"of the module Linear is passed by; somebody has put another")
    with told, go.override(module, {module: doubled}):
        gradient(module, x)
        module.forward = types.MethodType(nn.Linear.forward, module)
        with pytest.raises(go.UnsupportedError, match="somebody has put another one on the instance"):
            go.override(module, {module: doubled})


class OtherLinear(nn.Linear):
    def forward(self, x):
        return 5 * x


def test_module_that_is_given_another_class_meanwhile_is_told_of(x):
    module = nn.Linear(3, 3).double()
    told = pytest.warns(
        go.GradOverrideWarning, match=r"Linear is passed by; somebody has given the module another class"
    )
    with told, go.override(module, {module: doubled}):
        gradient(module, x)
        module.__class__ = OtherLinear
        exactly(gradient(module, x), gradient(lambda x: 5 * x, x))
    assert type(module) is OtherLinear
    assert "_gradoverride" not in module.__dict__


@EVERY_RULE
@pytest.mark.parametrize("unwrapped", ["before", "meanwhile"])
def test_module_whose_forward_was_replaced_and_put_back_can_be_overridden(x, rule, factors, unwrapped):
    """accelerate leaves a bound method on the instance, which is to pass no override by."""
    module = nn.Linear(3, 3).double()
    expected = all_gradients(by_hand(nn.Sequential(module), factors), x)
    model = nn.Sequential(module)
    plain = all_gradients(model, x)
    if unwrapped == "before":
        hooked(module)
        unhooked(module)
    else:
        with go.override(module, {module: rule}):
            gradient(module, x)
            hooked(module)
            unhooked(module)
    before = dict(module.__dict__)
    with go.override(model, {nn.Linear: rule}):
        compare(all_gradients(model, x), expected)
        compare(all_gradients(copy.deepcopy(model), x), expected)
    assert module.__dict__ == before
    compare(all_gradients(model, x), plain)


def test_function_called_by_a_module_whose_forward_was_put_back_can_be_overridden(x):
    module = nn.ReLU()
    hooked(module)
    unhooked(module)
    plain = gradient(module, x)
    before = dict(module.__dict__)
    with go.override(module, {torch.nn.functional.relu: doubled}):
        exactly(gradient(module, x), 2 * plain)
    assert module.__dict__ == before


def test_forward_that_is_replaced_while_one_that_was_put_back_is_overridden_stays(x):
    module = nn.Linear(3, 3).double()
    hooked(module)
    unhooked(module)
    plain = gradient(module, x)
    handle = go.override(module, {module: doubled})
    hooked(module, lambda result: 5 * result)
    closely(gradient(module, x), 10 * plain)
    handle.remove()
    closely(gradient(module, x), 5 * plain)
    unhooked(module)
    exactly(gradient(module, x), plain)


def test_copy_of_a_wrapped_and_overridden_module_has_its_own_weights(x):
    module = nn.Linear(3, 3).double()
    plain = gradient(module, x)
    with go.override(module, {module: doubled}):
        hooked(module)
        other = copy.deepcopy(module)
        gradient(module, x)
    with torch.no_grad():
        other.weight.mul_(3)
    closely(gradient(other, x), 6 * plain)
    go.remove_overrides(other)
    closely(gradient(other, x), 3 * plain)


def test_parent_of_a_wrapped_module_can_be_overridden(x):
    model = nn.Sequential(nn.Linear(3, 3)).double()
    plain = gradient(model, x)
    hooked(model[0])
    with go.override(model, {model: doubled}):
        exactly(gradient(model, x), 2 * plain)


# --- hooks ---

WHEN = pytest.mark.parametrize("when", ["before", "after"])


def overridden_and(when, module, rule, register):
    """Override, and register hooks before or after it."""
    if when == "before":
        register()
    handle = go.override(module, {module: rule})
    if when == "after":
        register()
    return handle


@WHEN
@EVERY_RULE
def test_forward_hooks_run_once_around_the_rule(x, when, rule, factors):
    module = nn.Linear(3, 3).double()
    order = []

    def register():
        module.register_forward_pre_hook(lambda module, args: (order.append("pre"), (3 * args[0],))[1])
        module.register_forward_hook(lambda module, args, result: (order.append("post"), 5 * result)[1])
        module.register_forward_hook(lambda module, args, result: order.append("always"), always_call=True)
        module.register_forward_pre_hook(
            lambda module, args, kwargs: (order.append("kwargs"), (args, kwargs))[1], with_kwargs=True
        )

    def reference(x):
        return 5 * LinearFunction.apply(3 * x, module.weight, module.bias, factors)

    expected = torch.autograd.grad(reference(x).square().sum(), [x, module.weight, module.bias])
    handle = overridden_and(when, module, rule, register)
    result = module(x)
    assert order == ["pre", "kwargs", "post", "always"]
    closely(torch.autograd.grad(result.square().sum(), [x, module.weight, module.bias]), expected)
    handle.remove()
    assert len(module._forward_hooks) == len(module._forward_pre_hooks) == 2


@WHEN
def test_always_called_hook_runs_when_the_forward_of_an_overridden_module_raises(when):
    module = nn.Linear(3, 3).double()
    called = []
    hook = functools.partial(
        module.register_forward_hook, lambda module, args, result: called.append(result), always_call=True
    )
    handle = overridden_and(when, module, doubled, hook)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        module(noise(5, 7))
    assert called == [None]
    go.remove_overrides(module)
    handle.remove()


@WHEN
@EVERY_RULE
def test_full_backward_hooks_see_the_gradients_of_the_rule(x, when, rule, factors):
    module = nn.Linear(3, 3).double()
    weights = torch.linspace(-1, 1, 15, dtype=torch.float64).view(5, 3)
    seen = []

    def register():
        module.register_full_backward_hook(
            lambda module, grad_input, grad_output: seen.append((grad_input, grad_output))
        )
        module.register_full_backward_pre_hook(lambda module, grad_output: (7 * grad_output[0],))

    handle = overridden_and(when, module, rule, register)
    (module(x) * weights).sum().backward()
    handle.remove()
    (((grad_input,), (grad_output,)),) = seen
    of_x, of_weight, of_bias = factors
    closely(grad_output, 7 * weights)
    closely(grad_input, 7 * of_x * weights @ module.weight.detach())
    closely(x.grad, 7 * of_x * weights @ module.weight.detach())
    closely(module.weight.grad, 7 * of_weight * weights.T @ x.detach())
    closely(module.bias.grad, 7 * of_bias * weights.sum(0))


@EVERY_RULE
def test_hooks_on_parameters_run_once_with_the_gradient_of_the_rule(x, rule, factors):
    module = nn.Linear(3, 3).double()
    seen, accumulated = [], []
    module.weight.register_hook(seen.append)
    module.weight.register_post_accumulate_grad_hook(lambda parameter: accumulated.append(parameter.grad.clone()))
    with go.override(module, {module: rule}):
        module(x).sum().backward()
    expected = factors[1] * torch.ones(3, 5, dtype=torch.float64) @ x.detach()
    closely(seen, [expected])
    closely(accumulated, [expected])


@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_inside_an_overridden_container_run_once(model, x, when):
    forwards, backwards = [], []

    def register():
        model[0].register_forward_hook(lambda module, args, result: forwards.append(result))
        model[0].register_full_backward_hook(lambda module, grads, _: backwards.append(grads))

    plain = gradient(model, x)
    handle = overridden_and(when, model, doubled, register)
    exactly(gradient(model, x), 2 * plain)
    handle.remove()
    assert len(forwards) == len(backwards) == 1
    exactly(backwards[0][0], plain)  # inside, the gradient is not doubled yet


def test_hooks_of_all_modules_see_the_overridden_one(x):
    module = nn.Linear(3, 3).double()
    seen = []
    hook = nn.modules.module.register_module_forward_hook(lambda module, args, result: seen.append(module))
    try:
        with go.override(module, {module: doubled}):
            module(x)
    finally:
        hook.remove()
    assert seen == [module]


# --- what changes weights ---


@pytest.mark.parametrize("first", ["override", "pruning"])
@pytest.mark.parametrize("first_out", ["override", "pruning"])
def test_pruning_and_overrides_come_and_go_in_any_order(x, first, first_out):
    module = nn.Linear(3, 3).double()
    steps = {
        "override": lambda: go.override(module, {module: doubled}),
        "pruning": lambda: prune.l1_unstructured(module, "weight", 0.5),
    }
    order = ["override", "pruning"] if first == "override" else ["pruning", "override"]
    handle = {name: steps[name]() for name in order}["override"]
    mask = module.weight_mask
    assert 0 < mask.sum() < 9
    weights = torch.linspace(-1, 1, 15, dtype=torch.float64).view(5, 3)
    (module(x) * weights).sum().backward()
    closely(x.grad, 2 * weights @ (module.weight_orig * mask).detach())
    closely(module.weight_orig.grad, mask * (weights.T @ x.detach()))
    if first_out == "override":
        handle.remove()
        closely(gradient(module, x), weights @ (module.weight_orig * mask).detach())
        prune.remove(module, "weight")
    else:
        prune.remove(module, "weight")
        closely(gradient(module, x), 2 * weights @ module.weight.detach())
        handle.remove()
    closely(gradient(module, x), weights @ module.weight.detach())
    assert type(module) is nn.Linear
    assert traces_of_ours(module) == []


def test_pruned_weight_under_its_plain_name_is_an_error():
    """It is a plain attribute then, neither a parameter nor a buffer."""
    module = prune.l1_unstructured(nn.Linear(3, 3), "weight", 0.5)
    with pytest.raises(go.RuleSignatureError, match=r"asks for 'weight', which does not exist.*'weight_orig'"):
        go.override(module, {module: asking})


def test_weight_that_is_pruned_while_a_rule_asks_for_it_is_an_error():
    module = nn.Linear(3, 3)
    go.override(module, {module: asking})
    prune.l1_unstructured(module, "weight", 0.5)
    with pytest.raises(go.GradOverrideError):
        module(torch.randn(2, 3))


# name: (what has hooks compute the weight, the weight as they compute it)
BY_HOOKS = {
    "prune": (
        lambda module: prune.l1_unstructured(module, "weight", 0.5),
        lambda module: module.weight_orig * module.weight_mask,
    ),
    "weight_norm": (
        torch.nn.utils.weight_norm,
        lambda module: module.weight_g * module.weight_v / module.weight_v.norm(dim=1, keepdim=True),
    ),
    "spectral_norm": (
        lambda module: torch.nn.utils.spectral_norm(module).eval(),
        lambda module: module.weight_orig / (module.weight_u @ module.weight_orig @ module.weight_v),
    ),
}


@pytest.mark.parametrize(("computed", "weight"), BY_HOOKS.values(), ids=BY_HOOKS)
def test_by_name_gives_the_gradients_of_parameters_that_hooks_compute_a_weight_from(x, computed, weight):
    module = nn.Linear(3, 3).double()
    computed(module)
    inputs = [x, *module.parameters()]

    def expected(factor):
        return torch.autograd.grad(factor * F.linear(x, weight(module), module.bias).square().sum(), inputs)

    with go.override(module, {module: lambda grad_output, vjp: vjp.by_name(3 * grad_output)}):
        for _ in range(2):
            closely(torch.autograd.grad(module(x).square().sum(), inputs), expected(3))
    closely(torch.autograd.grad(module(x).square().sum(), inputs), expected(1))


@pytest.mark.parametrize("name", ["prune", "spectral_norm"])  # that of torch's weight_norm is not right by itself
def test_second_derivative_reaches_parameters_that_hooks_compute_a_weight_from(x, name):
    computed, weight = BY_HOOKS[name]
    module = nn.Linear(3, 3).double()
    computed(module)
    inputs = [x, *module.parameters()]

    def second(result):
        first = torch.autograd.grad(result.square().sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum(grad.square().sum() for grad in first), inputs)

    with go.override(module, {module: lambda grad_output, vjp: vjp.by_name(grad_output)}):
        closely(second(module(x)), second(F.linear(x, weight(module), module.bias)))


def test_rule_that_answers_for_the_bias_beside_a_pruned_weight_is_right_at_each_call(x):
    module = prune.l1_unstructured(nn.Linear(3, 3).double(), "weight", 0.5)
    weight = module.weight_orig * module.weight_mask
    expected = torch.autograd.grad(F.linear(x, weight, module.bias).sum(), [x, module.weight_orig, module.bias])
    name = "bias"  # found when it has answered

    def rule(grad_output, vjp):
        return {"input": vjp(grad_output), name: 7 * grad_output.sum(0)}

    with go.override(module, {module: rule}):
        for _ in range(2):
            found = torch.autograd.grad(module(x).sum(), [x, module.weight_orig, module.bias])
            closely(found, (*expected[:2], 7 * expected[2]))


@pytest.mark.parametrize("first", ["override", "weight_norm"])
def test_weight_norm_by_hooks_beside_an_override(x, first):
    module = nn.Linear(3, 3).double()
    if first == "weight_norm":
        torch.nn.utils.weight_norm(module)
    handle = go.override(module, {module: doubled})
    if first == "override":
        torch.nn.utils.weight_norm(module)
    weight = torch._weight_norm(module.weight_v, module.weight_g, 0)
    expected = torch.autograd.grad(F.linear(x, weight, module.bias).sum(), [x, module.weight_v, module.weight_g])
    found = torch.autograd.grad(module(x).sum(), [x, module.weight_v, module.weight_g])
    closely(found, (2 * expected[0], *expected[1:]))
    torch.nn.utils.remove_weight_norm(module)
    handle.remove()
    assert type(module) is nn.Linear


def to_double(module):
    return module.to(torch.float64)


def assigned(module):
    state = {name: noise(*value.shape, grad=False) for name, value in module.state_dict().items()}
    module.load_state_dict(state, assign=True)
    return module


def filled(module):
    return module.apply(lambda part: nn.init.normal_(part.weight))


def frozen(module):
    return module.requires_grad_(False)


def emptied(module):
    return filled(module.to_empty(device="cpu"))


CHANGES = [to_double, assigned, filled, frozen, emptied, nn.Module.share_memory, nn.Module.eval]


@pytest.mark.parametrize("change", CHANGES)
@EVERY_RULE
def test_module_changed_in_place_keeps_its_override(x, change, rule, factors):
    module = nn.Linear(3, 3)
    if change is not to_double:
        module.double()
    handle = go.override(module, {module: rule})
    change(module)
    if change is emptied:
        nn.init.ones_(module.bias)
    leaves = [x, *(parameter for parameter in module.parameters() if parameter.requires_grad)]
    expected = torch.autograd.grad(LinearFunction.apply(x, module.weight, module.bias, factors).sum(), leaves)
    closely(torch.autograd.grad(module(x).sum(), leaves), expected)
    handle.remove()
    plain = torch.autograd.grad(F.linear(x, module.weight, module.bias).sum(), leaves)
    closely(torch.autograd.grad(module(x).sum(), leaves), plain)
    assert type(module) is nn.Linear


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_module_in_half_precision_has_gradients_of_its_dtype(dtype):
    module = nn.Linear(3, 3)
    with go.override(module, {module: asking}):
        module.to(dtype)
        x = noise(5, 3, dtype=dtype)
        found = torch.autograd.grad(module(x).sum(), [x, module.weight, module.bias])
    expected = torch.autograd.grad(
        LinearFunction.apply(x, module.weight, module.bias, (2, 3, 5)).sum(), [x, module.weight, module.bias]
    )
    exactly(found, expected)


def test_module_made_without_its_init_can_be_overridden(x):
    module = skip_init(nn.Linear, 3, 3, dtype=torch.float64)
    nn.init.normal_(module.weight)
    nn.init.ones_(module.bias)
    plain = gradient(lambda x: plain_linear(module, x), x)
    with go.override(module, {module: doubled}):
        exactly(gradient(module, x), 2 * plain)
    exactly(gradient(module, x), plain)


def test_fused_module_takes_the_rule_of_its_linear_part_along(x):
    """`fuse_linear_bn_eval` works on a deepcopy, which has the rules of the original."""
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).double()
    model(noise(5, 3))
    model.eval()
    plain = gradient(model, x)
    with go.override(model, {"0": doubled, "1": tripled}):
        fused = fusion.fuse_linear_bn_eval(*model)
        closely(gradient(model, x), 6 * plain)
    closely(gradient(fused, x), 2 * plain)
    go.remove_overrides(fused)
    closely(gradient(fused, x), plain)


def test_fake_quantisation_can_be_overridden():
    from torch.ao.quantization import FakeQuantize

    model = nn.Sequential(nn.Linear(3, 3), FakeQuantize(quant_min=0, quant_max=255))
    x = noise(5, 3, dtype=torch.float32)
    model(x)
    plain, result = gradient(model, x), model(x)
    with go.override(model, {FakeQuantize: doubled}):
        exactly(model(x), result)
        closely(gradient(model, x), 2 * plain)
    assert type(model[1]) is FakeQuantize


# --- modules that others hold ---


class Adapter(nn.Module):
    """As LoRA: holds the module that it stands in for."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.down, self.up = nn.Parameter(noise(2, 3)), nn.Parameter(noise(3, 2))

    def forward(self, x):
        return self.base(x) + x @ self.down.T @ self.up.T


@pytest.mark.parametrize("first", ["override", "adapter"])
@EVERY_RULE
def test_adapter_around_a_module_and_its_override_come_and_go(x, first, rule, factors):
    model = nn.Sequential(nn.Linear(3, 3)).double()
    base = model[0]
    before = type(base), list(base.__dict__)
    handle = go.override(model, {nn.Linear: rule}) if first == "override" else None
    adapter = model[0] = Adapter(base)
    handle = handle or go.override(model, {nn.Linear: rule})
    leaves = [x, base.weight, base.bias, adapter.down, adapter.up]
    reference = LinearFunction.apply(x, base.weight, base.bias, factors) + x @ adapter.down.T @ adapter.up.T
    closely(torch.autograd.grad(model(x).sum(), leaves), torch.autograd.grad(reference.sum(), leaves))
    model[0] = base
    compare(all_gradients(model, x), all_gradients(by_hand(nn.Sequential(base_of(base)), factors), x))
    handle.remove()
    assert (type(base), list(base.__dict__)) == before


def base_of(module):
    plain = nn.Linear(3, 3).double()
    plain.load_state_dict(module.state_dict())
    return plain


def test_compile_in_place_and_undone_beside_an_override(x):
    torch.compiler.reset()
    module = Adapter(nn.Linear(3, 3).double())  # torch compiles none of its own modules by itself
    plain = gradient(module, x)
    module.compile(backend="aot_eager", fullgraph=True)
    closely(gradient(module, x), plain)
    handle = go.override(module, {module: doubled})
    closely(gradient(module, x), 2 * plain)
    module._compiled_call_impl = None
    closely(gradient(module, x), 2 * plain)
    module.compile(backend="aot_eager", fullgraph=True)
    closely(gradient(module, x), 2 * plain)
    handle.remove()
    closely(gradient(module, x), plain)
    module._compiled_call_impl = None
    closely(gradient(module, x), plain)
    assert type(module) is Adapter
    torch.compiler.reset()


# --- checkpoints, autocast, and ways to ask for gradients ---


@pytest.mark.parametrize("where", ["whole", "parts"])
@pytest.mark.parametrize("target", ["linear", "checkpointed block"])
def test_checkpointed_blocks_in_the_context_give_what_they_give_without(model, x, where, target):
    rules = {nn.Linear: asking, nn.ReLU: guided} if target == "linear" else {"2": doubled}

    def by_parts(x):
        for part in model:
            x = checkpoint(part, x, use_reentrant=False)
        return x

    def run(x):
        return checkpoint(model, x, use_reentrant=False) if where == "whole" else by_parts(x)

    leaves = [x, *model.parameters()]
    with go.override(model, rules):
        expected = torch.autograd.grad(model(x).square().sum(), leaves)
        closely(torch.autograd.grad(run(x).square().sum(), leaves), expected)
    if target == "linear":
        reference = by_hand(mlp(), (2, 3, 5), is_guided=True)
        closely(expected, torch.autograd.grad(reference(x).square().sum(), [x, *reference.parameters()]))


def test_checkpoint_inside_an_overridden_module_replays_after_the_context(x):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, x):
            return checkpoint(lambda x: self.linear(x).tanh(), x, use_reentrant=False)

    model = Block().double()
    leaves = [x, *model.parameters()]
    plain = torch.autograd.grad(model(x).square().sum(), leaves)
    with go.override(model, {model: doubled}):
        loss = model(x).square().sum()
    closely(torch.autograd.grad(loss, leaves), (2 * plain[0], *plain[1:]))


@EVERY_RULE
def test_module_under_autocast_has_the_gradients_of_the_hand_written_one(rule, factors):
    module = nn.Linear(3, 3)
    x = noise(5, 3, dtype=torch.float32)
    leaves = [x, module.weight, module.bias]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = gradients_by_cast(module, x, factors)
        with go.override(module, {module: rule}):
            result = module(x)
    assert result.dtype == torch.bfloat16
    found = torch.autograd.grad(result.float().sum(), leaves)
    assert all(grad.dtype == torch.float32 for grad in found)
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)


def gradients_by_cast(module, x, factors):
    """With operands rounded to bfloat16, otherwise exact."""
    rows, weight = x.detach().bfloat16().double(), module.weight.detach().bfloat16().double()
    ones = torch.ones(5, 3, dtype=torch.float64)
    grads = (factors[0] * ones @ weight, factors[1] * ones.T @ rows, factors[2] * ones.sum(0))
    return tuple(grad.float() for grad in grads)


@EVERY_RULE
def test_micro_batches_accumulate_to_the_gradient_of_the_batch(x, rule, factors):
    model = mlp()
    reference = by_hand(model, factors)
    reference(x).sum().backward()
    with go.override(model, {nn.Linear: rule}):
        for part in x.detach().split(2):
            model(part).sum().backward()
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        closely(ours.grad, theirs.grad)


@EVERY_RULE
@pytest.mark.parametrize("wanted", ["argument", "weight", "bias", "all"])
def test_backward_to_some_inputs_alone(x, rule, factors, wanted):
    module = nn.Linear(3, 3).double()
    leaves = {"argument": x, "weight": module.weight, "bias": module.bias}
    chosen = list(leaves) if wanted == "all" else [wanted]
    loss = LinearFunction.apply(x, module.weight, module.bias, factors).square().sum()
    expected = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    with go.override(module, {module: rule}):
        module(x).square().sum().backward(inputs=[leaves[name] for name in chosen])
    for name, leaf in leaves.items():
        if name in chosen:
            closely(leaf.grad, expected[name])
        else:
            assert leaf.grad is None


@EVERY_RULE
def test_retained_graph_gives_the_same_twice(x, rule, factors):
    module = nn.Linear(3, 3).double()
    leaves = [x, module.weight, module.bias]
    expected = torch.autograd.grad(LinearFunction.apply(x, module.weight, module.bias, factors).square().sum(), leaves)
    with go.override(module, {module: rule}):
        loss = module(x).square().sum()
    closely(torch.autograd.grad(loss, leaves, retain_graph=True), expected)
    closely(torch.autograd.grad(loss, leaves), expected)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, leaves)


def orders(run, x, leaves, count):
    """The gradients of the first orders, each of the sum of squares of the one before."""
    found = []
    value = run(x).tanh().square().sum()
    for _ in range(count):
        grads = torch.autograd.grad(value, leaves, create_graph=True)
        found += [grad.detach() for grad in grads]
        value = sum(grad.square().sum() for grad in grads)
    return found


@pytest.mark.parametrize(
    ("name", "count"),
    [("vjp", 2), ("weight", 2), ("params", 2), ("weight", 3), ("params", 3), ("vjp", 3)],
)
def test_higher_orders_are_those_of_the_rule_as_written(x, name, count):
    rule, factors = LINEAR_RULES[name]
    module = nn.Linear(3, 3).double()
    leaves = [x, module.weight, module.bias]
    expected = orders(lambda x: LinearFunction.apply(x, module.weight, module.bias, factors), x, leaves, count)
    with go.override(module, {module: rule}):
        closely(orders(module, x, leaves, count), expected)


@pytest.mark.parametrize("count", [2, 3])
def test_higher_orders_of_a_rule_that_gives_what_autograd_gives_are_those_of_autograd(x, count):
    module = nn.Linear(3, 3).double()
    leaves = [x, module.weight, module.bias]
    expected = orders(module, x, leaves, count)
    with go.override(module, {module: lambda grad_output, vjp: vjp(grad_output)}):
        closely(orders(module, x, leaves, count), expected)


def test_second_order_through_a_rule_that_keeps_no_graph_is_refused(x):
    module = nn.Linear(3, 3).double()
    with go.override(module, {module: reading_module}), pytest.raises(go.UnsupportedError, match="second derivative"):
        orders(module, x, [x, module.weight], 2)


# --- torch.fx


class Tanhs(nn.Module):
    """`3 * tanh` of a module and of a function."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x):
        return torch.tanh(3 * self.linear(x))


def negate_the_end(graph_module):
    """Edit the graph of a module: its result is negated."""
    end = next(node for node in graph_module.graph.nodes if node.op == "output")
    with graph_module.graph.inserting_before(end):
        end.args = (graph_module.graph.call_function(torch.neg, (end.args[0],)),)
    graph_module.recompile()


GRAPH_TARGETS = {
    "module": lambda module: module,
    "class": lambda module: torch.fx.GraphModule,
    "predicate": lambda module: lambda name, module: name == "",
    "child": lambda module: "linear",
    "function": lambda module: torch.tanh,
}
GRAPH_COPIES = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "in a deepcopy": lambda module: copy.deepcopy(nn.Sequential(module))[0],
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "copy of a copy": lambda module: copy.deepcopy(copy.copy(pickle.loads(pickle.dumps(copy.deepcopy(module))))),
    "replica": lambda module: module._replicate_for_data_parallel(),
}


@pytest.fixture
def traced():
    torch.manual_seed(2)
    return torch.fx.symbolic_trace(Tanhs().double())


@pytest.mark.parametrize("copied", GRAPH_COPIES.values(), ids=GRAPH_COPIES)
@pytest.mark.parametrize("target", GRAPH_TARGETS.values(), ids=GRAPH_TARGETS)
def test_copy_of_a_graph_module_keeps_its_override(target, copied, traced, x):
    plain, names, cls = gradient(traced, x), list(traced.__dict__), type(traced)
    if target is GRAPH_TARGETS["child"] and copied in (GRAPH_COPIES["copy"], GRAPH_COPIES["replica"]):
        pytest.skip("the copy has the same child")
    handle = go.override(traced, {target(traced): doubled})
    other = copied(traced)
    exactly(gradient(traced, x), 2 * plain)
    handle.remove()
    exactly(gradient(traced, x), plain)
    assert (list(traced.__dict__), type(traced)) == (names, cls)
    exactly(gradient(other, x), 2 * plain)
    negate_the_end(other)
    exactly(gradient(other, x), -2 * plain)
    go.remove_overrides(other)
    exactly(gradient(other, x), -plain)
    exactly(gradient(traced, x), plain)


@pytest.mark.parametrize("target", GRAPH_TARGETS.values(), ids=GRAPH_TARGETS)
def test_graph_module_may_be_recompiled_while_it_is_overridden(target, traced, x):
    plain, cls = gradient(traced, x), type(traced)
    with go.override(traced, {target(traced): doubled}):
        exactly(gradient(traced, x), 2 * plain)
        negate_the_end(traced)
        exactly(gradient(traced, x), -2 * plain)
        closely(gradient(torch.compile(traced, backend="aot_eager", fullgraph=True), x), -2 * plain)
        negate_the_end(traced)
        exactly(gradient(traced, x), 2 * plain)
        assert traced.code.count("torch.neg") == 2
    assert type(traced) is cls
    exactly(gradient(traced, x), plain)
    negate_the_end(traced)
    exactly(gradient(traced, x), -plain)


@pytest.mark.parametrize("cls", [torch.fx.GraphModule, nn.Module])
@pytest.mark.usefixtures("traced")
def test_graph_modules_are_not_overridden_as_a_class_in_the_whole_process(cls):
    text = f"override of the class '{cls.__name__}': a GraphModule.* has a forward of its own.* give the model first"
    with pytest.raises(go.UnsupportedError, match=text):
        go.override({cls: doubled})
    assert not go.explain()
