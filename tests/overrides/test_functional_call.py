"""Overridden modules under `torch.func`: `functional_call`, its transforms, ensembles. Contract, sections 1 and 5."""

import copy

import pytest
import torch
from oracles import closely, exactly, noise
from torch import nn
from torch.func import functional_call, grad, grad_and_value, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap
from torch.nn.utils import parametrizations, parametrize, stateless

import gradoverride as go
from overrides.models import doubled, guided, mlp, negated


def scaled(tensor, factor):
    """The same value; its gradient times `factor`, to the first order."""
    return factor * tensor - (factor - 1) * tensor.detach()


class LinearByHand(nn.Linear):
    """A linear layer whose argument, weight and bias have these multiples of their gradients."""

    factors = (1, 1, 1)

    def forward(self, x):
        of_x, of_weight, of_bias = self.factors
        return nn.functional.linear(scaled(x, of_x), scaled(self.weight, of_weight), scaled(self.bias, of_bias))


class LinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, factors):
        ctx.save_for_backward(x, weight)
        ctx.factors = factors
        return nn.functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, grad_output):
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.factors
        return of_x * grad_output @ weight, of_weight * grad_output.T @ x, of_bias * grad_output.sum(0), None


class LinearToAnyOrder(LinearByHand):
    """For `scaled` is right to the first order alone, and this one not under vmap."""

    def forward(self, x):
        return LinearFunction.apply(x, self.weight, self.bias, self.factors)


def by_hand(model, factors, layer=LinearByHand):
    """A copy of `model` with hand-written linear layers in place of its own."""
    model = copy.deepcopy(model)
    kind = type(layer.__name__, (layer,), {"factors": factors})
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = kind
    return model


def asking_weight(grad_output, input, weight, bias):
    grad_output = grad_output.reshape(-1, grad_output.shape[-1])
    rows = input.reshape(-1, input.shape[-1])
    return {
        "input": (2 * grad_output @ weight).view_as(input),
        "weight": 3 * grad_output.T @ rows,
        "bias": 5 * grad_output.sum(0),
    }


def asking_params(grad_output, params, vjp):
    named = vjp.by_name(grad_output)
    factors = {"input": 2, "weight": 3, "bias": 5}
    return {name: factors[name] * grad for name, grad in named.items()}  # constants are not among them


def reading_module(grad_output, module):
    return 2 * grad_output @ module.weight


def through_forward(grad_output, input, forward):
    alias = input.detach().requires_grad_()
    with torch.enable_grad():
        result = forward(alias)
    return 2 * torch.autograd.grad(result, alias, grad_output)[0]


# rule: the multiples of the gradients of a linear layer that it gives
RULES = {
    "vjp": (doubled, (2, 1, 1)),
    "weight": (asking_weight, (2, 3, 5)),
    "params": (asking_params, (2, 3, 5)),
    "module": (reading_module, (2, 1, 1)),
}
EVERY_RULE = pytest.mark.parametrize(("rule", "factors"), RULES.values(), ids=RULES)
OUTSIDE_TRANSFORMS = {**RULES, "forward": (through_forward, (2, 1, 1))}


def gradients(result, leaves):
    """Of a sum with fixed weights. What computes the tensors that were given is needed again."""
    return torch.autograd.grad(total(result), leaves, retain_graph=True)


def total(result):
    return (result * torch.linspace(-1, 1, result.numel(), dtype=result.dtype).view_as(result)).sum()


def given_to(model):
    """Other tensors for the parameters of `model`, each computed from a leaf."""
    leaves = {name: noise(*p.shape) for name, p in model.named_parameters()}
    return leaves, {name: 2 * leaf for name, leaf in leaves.items()}


@pytest.fixture
def model():
    return mlp()


@pytest.fixture
def x():
    return noise(5, 3)


# --- functional_call ---


@pytest.mark.parametrize(("rule", "factors"), OUTSIDE_TRANSFORMS.values(), ids=OUTSIDE_TRANSFORMS)
@pytest.mark.parametrize("call", [functional_call, stateless.functional_call], ids=["func", "stateless"])
@pytest.mark.filterwarnings("ignore:.*stateless.functional_call.*:FutureWarning")
def test_rule_has_the_tensors_that_were_given_and_the_module_keeps_its_own(model, x, rule, factors, call):
    leaves, given = given_to(model)
    expected = gradients(functional_call(by_hand(model, factors), given, x), [x, *leaves.values()])
    own = list(model.parameters())
    with go.override(model, {nn.Linear: rule}):
        found = gradients(call(model, given, x), [x, *leaves.values()])
    closely(found, expected)
    assert all(one is other for one, other in zip(model.parameters(), own, strict=True))
    assert all(p.grad is None for p in model.parameters())


@EVERY_RULE
def test_tensors_that_are_given_may_be_constants(model, x, rule, factors):
    given = {name: noise(*p.shape, grad=False) for name, p in model.named_parameters()}
    expected = gradients(functional_call(by_hand(model, factors), given, x), x)
    with go.override(model, {nn.Linear: rule}):
        closely(gradients(functional_call(model, given, x), x), expected)


@EVERY_RULE
def test_backward_after_the_call_and_the_override_has_the_tensors_of_the_forward(model, x, rule, factors):
    leaves, given = given_to(model)
    expected = gradients(functional_call(by_hand(model, factors), given, x), [x, *leaves.values()])
    with go.override(model, {nn.Linear: rule}):
        result = functional_call(model, given, x)
    functional_call(model, given_to(model)[1], x)
    closely(gradients(result, [x, *leaves.values()]), expected)


@EVERY_RULE
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # Dynamo
def test_compiled_code_has_the_gradients_of_tensors_that_were_computed_before_it(model, x, rule, factors):
    """As a learned initialisation is, from its leaves."""
    leaves, given = given_to(model)
    expected = gradients(functional_call(by_hand(model, factors), given, x), [x, *leaves.values()])
    compiled = torch.compile(lambda given, x: functional_call(model, given, x), backend="aot_eager", fullgraph=True)
    with go.override(model, {nn.Linear: rule}):
        result = compiled(given, x)
    closely(torch.autograd.grad(total(result), [x, *leaves.values()]), expected)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(self.first(x).tanh())


@EVERY_RULE
@pytest.mark.parametrize("names", [("first.weight",), ("second.weight",), ("first.weight", "second.weight")])
def test_tied_weight_has_the_gradients_of_both_layers(x, rule, factors, names):
    model = Tied().double()
    weight = noise(3, 3)
    expected = torch.autograd.grad(
        total(functional_call(by_hand(model, factors), dict.fromkeys(names, weight), x)), [x, weight]
    )
    with go.override(model, {nn.Linear: rule}):
        closely(gradients(functional_call(model, dict.fromkeys(names, weight), x), [x, weight]), expected)


def test_weights_that_were_tied_may_be_given_apart(x):
    model = Tied().double()
    given = {"first.weight": noise(3, 3), "second.weight": noise(3, 3)}
    leaves = [x, *given.values()]
    expected = torch.autograd.grad(
        total(functional_call(by_hand(model, (2, 3, 5)), given, x, tie_weights=False)), leaves
    )
    with go.override(model, {nn.Linear: asking_weight}):
        closely(gradients(functional_call(model, given, x, tie_weights=False), leaves), expected)


def test_rule_on_the_whole_model_may_ask_for_its_params_under_functional_call(model, x):
    def rule(grad_output, params, vjp):
        named = vjp.by_name(grad_output)
        return {name: 3 * grad for name, grad in named.items()}

    leaves, given = given_to(model)
    expected = [3 * grad for grad in gradients(functional_call(model, given, x), [x, *leaves.values()])]
    with go.override(model, {model: rule}):
        closely(gradients(functional_call(model, given, x), [x, *leaves.values()]), expected)


def test_parametrized_weight_is_computed_from_what_was_given(x):
    model = parametrizations.weight_norm(nn.Linear(3, 3).double())
    leaves, given = given_to(model)
    plain = gradients(functional_call(model, given, x), [x, *leaves.values()])
    with go.override(model, {model: doubled}):
        found = gradients(functional_call(model, given, x), [x, *leaves.values()])
    closely(found, (2 * plain[0], *plain[1:]))
    parametrize.remove_parametrizations(model, "weight")


def test_buffers_that_are_given_are_updated_in_their_place(x):
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).double()
    plain = copy.deepcopy(model)
    theirs = {name: buffer.clone() for name, buffer in model.named_buffers()}
    ours = {name: buffer.clone() for name, buffer in model.named_buffers()}
    expected = gradients(functional_call(plain, theirs, x), x)[0]
    with go.override(model, {nn.BatchNorm1d: doubled, "0": lambda grad_output, vjp: vjp(grad_output)}):
        exactly(gradients(functional_call(model, ours, x), x)[0], 2 * expected)
    for name, buffer in theirs.items():
        exactly(ours[name], buffer)
        assert not torch.equal(model.state_dict()[name], buffer)


@pytest.mark.parametrize("rule", ["vjp", "weight", "params"])
def test_third_order_reaches_the_tensors_that_were_given(model, x, rule):
    rule, factors = RULES[rule]
    leaves, given = given_to(model)

    def orders(model):
        value, found = functional_call(model, given, x).square().sum(), []
        for _ in range(3):
            found += torch.autograd.grad(value, [x, *leaves.values()], create_graph=True, retain_graph=True)
            value = sum(grad.square().sum() for grad in found[-1 - len(leaves) :])
        return found

    expected = orders(by_hand(model, factors, LinearToAnyOrder))
    with go.override(model, {nn.Linear: rule}):
        closely(orders(model), expected)


# --- transforms ---


def parameters_of(model):
    return {name: p.detach() for name, p in model.named_parameters()}


def loss_of(model):
    return lambda params, x: total(functional_call(model, params, (x,)))


TRANSFORMS = {
    "grad": lambda loss, params, x: grad(loss, (0, 1))(params, x),
    "grad_and_value": lambda loss, params, x: grad_and_value(loss, (0, 1))(params, x),
    "vjp": lambda loss, params, x: vjp(loss, params, x)[1](torch.tensor(1.5, dtype=torch.float64)),
    "jacrev": lambda loss, params, x: jacrev(loss, (0, 1))(params, x),
    "jacfwd": lambda loss, params, x: jacfwd(loss, (0, 1))(params, x),
    "jvp": lambda loss, params, x: jvp(loss, (params, x), (params, 2 * x)),
    "vmap of grad": lambda loss, params, x: vmap(grad(loss, (0, 1)), (None, 0))(params, x[:, None]),
    "vmap of grad, one": lambda loss, params, x: vmap(grad(loss, (0, 1)), (None, 0))(params, x),
}


def flat(tree):
    return tuple(torch.utils._pytree.tree_leaves(tree))


@EVERY_RULE
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_transform_of_an_overridden_model_has_its_rules(model, x, rule, factors, transform):
    x = x.detach()
    if rule is asking_weight and transform is TRANSFORMS["vmap of grad, one"]:
        rule = RULES["params"][0]  # its own arithmetic is for matrices
    expected = transform(loss_of(by_hand(model, factors)), parameters_of(model), x)
    with go.override(model, {nn.Linear: rule}):
        found = transform(loss_of(model), parameters_of(model), x)
        closely(flat(found), flat(expected))


@pytest.mark.parametrize("inplace", [False, True], ids=["", "inplace"])
@pytest.mark.parametrize("transform", ["grad", "vjp", "jacrev", "vmap of grad"])
def test_transform_of_guided_relus_is_that_of_hand_written_ones(model, x, transform, inplace):
    x = x.detach()
    model[2][1].inplace = inplace
    expected = TRANSFORMS[transform](loss_of(guided_elementwise(model)), parameters_of(model), x)
    with go.override(model, {nn.ReLU: guided}):
        closely(flat(TRANSFORMS[transform](loss_of(model), parameters_of(model), x)), flat(expected))


class GuidedFunction(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.relu()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx, grad_output):
        (x,) = ctx.saved_tensors
        return grad_output.clamp(min=0) * (x > 0)


class Guided(nn.Module):
    def forward(self, x):
        return GuidedFunction.apply(x)


def guided_elementwise(model):
    model = copy.deepcopy(model)
    model[1] = model[2][1] = Guided()
    return model


def test_rule_that_runs_the_forward_again_is_right_in_grad(model, x):
    def rule(grad_output, input, forward):
        return 2 * vjp(forward, input)[1](grad_output)[0]

    expected = grad(loss_of(by_hand(model, (2, 1, 1))), (0, 1))(parameters_of(model), x.detach())
    with go.override(model, {nn.Linear: rule}):
        closely(flat(grad(loss_of(model), (0, 1))(parameters_of(model), x.detach())), flat(expected))


def test_model_may_be_transformed_by_itself_too(model, x):
    x = x.detach()
    reference = by_hand(model, (2, 1, 1))
    with go.override(model, {nn.Linear: doubled}):
        for transform in (lambda f: vmap(jacrev(f)), lambda f: vmap(jacfwd(f)), lambda f: jacrev(vmap(f)), vmap):
            closely(transform(model)(x), transform(reference)(x))


def test_backward_through_vmap_reaches_the_live_parameters(model, x):
    reference = by_hand(model, (2, 3, 5))
    expected = gradients(vmap(reference)(x), [x, *reference.parameters()])
    with go.override(model, {nn.Linear: asking_params}):
        closely(gradients(vmap(model)(x), [x, *model.parameters()]), expected)


def test_rule_on_the_whole_model_is_in_force_in_transforms(model, x):
    x = x.detach()
    of_params, of_x = grad(loss_of(model), (0, 1))(parameters_of(model), x)
    with go.override(model, {model: doubled}):
        found_of_params, found_of_x = grad(loss_of(model), (0, 1))(parameters_of(model), x)
    closely(found_of_x, 2 * of_x)
    closely(flat(found_of_params), flat(of_params))


def test_nested_overrides_multiply_in_transforms(model, x):
    x = x.detach()
    expected = grad(loss_of(by_hand(model, (4, 1, 1))), (0, 1))(parameters_of(model), x)
    with go.override(model, {nn.Linear: doubled}), go.override(model, {nn.Linear: doubled}):
        closely(flat(grad(loss_of(model), (0, 1))(parameters_of(model), x)), flat(expected))


def test_second_order_is_that_of_the_rule_as_written(x):
    """The rule of `y = tanh(x)` says `g * x`, whose own derivative in `x` is `g`."""
    model = nn.Sequential(nn.Tanh())
    x = x.detach()
    with go.override(model, {nn.Tanh: lambda grad_output, input: grad_output * input}):
        closely(grad(lambda x: grad(lambda x: model(x).sum())(x).sum())(x), torch.ones_like(x))
        closely(vmap(vmap(grad(grad(model))))(x), torch.ones_like(x))
        closely(jacfwd(jacrev(model))(x[0, 0]), torch.ones_like(x[0, 0]))


def test_rule_that_is_not_linear_says_so_in_forward_mode(model, x):
    x = x.detach()
    with go.override(model, {nn.ReLU: guided}), pytest.raises(go.GradOverrideError, match="linear"):
        jvp(model, (x,), (torch.ones_like(x),))


# --- ensembles ---


def ensemble():
    torch.manual_seed(4)
    return [nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double() for _ in range(3)]


SKELETONS = {
    "the first": lambda models: models[0],
    "a copy": lambda models: copy.deepcopy(models[0]),
    "a copy without data": lambda models: copy.deepcopy(models[0]).to("meta"),
}


@EVERY_RULE
@pytest.mark.parametrize("skeleton", SKELETONS.values(), ids=SKELETONS)
@pytest.mark.parametrize("copied", ["before", "after"])
def test_ensemble_by_vmap_has_the_gradients_of_its_members(x, rule, factors, skeleton, copied):
    models = ensemble()
    expected = [
        gradients(reference(x), [x, *reference.parameters()])
        for reference in [by_hand(model, factors) for model in models]
    ]
    params, buffers = stack_module_state(models)
    if copied == "after":
        for model in models:
            go.override(model, {nn.Linear: rule})
    base = skeleton(models)
    if copied == "before":
        go.override(base, {nn.Linear: rule})
    results = vmap(lambda params, buffers, x: functional_call(base, (params, buffers), (x,)), (0, 0, None))(
        params, buffers, x
    )
    found = torch.autograd.grad(sum(map(total, results)), [x, *params.values()])
    closely(found[0], sum(grads[0] for grads in expected))
    for index, stacked in enumerate(found[1:], start=1):
        closely(stacked, torch.stack([grads[index] for grads in expected]))


@EVERY_RULE
def test_gradients_of_an_ensemble_by_vmap_of_grad(x, rule, factors):
    models, x = ensemble(), x.detach()
    expected = [grad(loss_of(by_hand(model, factors)), (0, 1))(parameters_of(model), x) for model in models]
    stacked = {name: value.detach() for name, value in stack_module_state(models)[0].items()}
    with go.override(models[0], {nn.Linear: rule}):
        of_params, of_x = vmap(grad(loss_of(models[0]), (0, 1)), (0, None))(stacked, x)
    closely(of_x, torch.stack([found for _, found in expected]))
    for name in of_params:
        closely(of_params[name], torch.stack([params[name] for params, _ in expected]))


# --- copies meanwhile ---


def test_copy_made_in_a_functional_call_is_whole_and_overridden(x):

    class Copying(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 3)
            self.copies = []

        def forward(self, x):
            self.copies.append(copy.deepcopy(self.linear))
            return self.linear(x)

    model = Copying().double()
    value = noise(3, 3)
    with go.override(model, {nn.Linear: doubled}):
        functional_call(model, {"linear.weight": value}, x)
    (made,) = model.copies
    exactly(made.weight, value)
    found = gradients(made(x), [x, made.weight])
    reference = by_hand(nn.Sequential(nn.Linear(3, 3)).double(), (2, 1, 1))
    reference[0].load_state_dict(made.state_dict())
    closely(found, gradients(reference(x), [x, reference[0].weight]))
    go.remove_overrides(made)
    assert type(made) is nn.Linear


def test_override_put_on_in_a_transform_holds_there_and_goes(model, x):
    x = x.detach()

    def loss(params, x):
        with go.override(model, {nn.Linear: doubled}):
            return loss_of(model)(params, x)

    expected = grad(loss_of(by_hand(model, (2, 1, 1))), (0, 1))(parameters_of(model), x)
    closely(flat(grad(loss, (0, 1))(parameters_of(model), x)), flat(expected))
    assert str(go.explain(model)) == "nothing is overridden"


# --- what runs again in the backward of a transform ---


@go.custom_backward(doubled)
def weighed(x):
    return torch.relu(torch.tanh(x)) * x


class Weighing(nn.Module):
    """A model that calls a decorated function, and a part of its own in a decorated method."""

    def __init__(self):
        super().__init__()
        self.part = nn.Tanh()

    @go.custom_backward(doubled)
    def weighed(self, x):
        return torch.relu(self.part(x)) * x

    def forward(self, x):
        return weighed(x) + self.weighed(x)


def slope(x, of_relu=None, of_tanh=None):
    """The derivative of `weighed`, with these for those of relu and tanh."""
    tanh = x.tanh()
    of_relu = (tanh > 0).double() if of_relu is None else of_relu
    of_tanh = 1 - tanh**2 if of_tanh is None else of_tanh
    return 2 * (tanh.clamp(min=0) + x * of_relu * of_tanh)


OF_WHAT_IS_CALLED = {
    "relu": (torch.relu, lambda x: 2 * slope(x, of_relu=-1.0)),
    "tanh": (torch.tanh, lambda x: 2 * slope(x, of_tanh=-1.0)),
    "module": (nn.Tanh, lambda x: slope(x) + slope(x, of_tanh=-1.0)),
}


@pytest.mark.parametrize("everywhere", [False, True])
@pytest.mark.parametrize(("target", "expected"), OF_WHAT_IS_CALLED.values(), ids=OF_WHAT_IS_CALLED)
def test_what_a_decorated_call_calls_has_the_rules_in_force_when_it_runs_again(target, expected, everywhere):
    model, x = Weighing(), noise(5, grad=False)
    rules = {target: negated}
    with go.override(rules) if everywhere else go.override(model, rules):
        closely(grad(lambda x: model(x).sum())(x), expected(x))
        closely(vmap(grad(model))(x), expected(x))
        closely(jvp(model, (x,), (torch.ones_like(x),))[1], expected(x))
        value, pullback = vjp(model, x)
        closely(pullback(torch.ones_like(value))[0], expected(x))


def test_what_a_decorated_call_calls_has_no_rules_that_came_later():
    model, x = Weighing(), noise(5, grad=False)
    value, pullback = vjp(model, x)
    with go.override(model, {torch.relu: negated}) as plan:
        closely(pullback(torch.ones_like(value))[0], 2 * slope(x))
        closely(grad(lambda x: model(x).sum())(x), 2 * slope(x, of_relu=-1.0))
    assert plan.table[0].calls != "0"


OTHERS = {
    "module": lambda model: go.override(model, {nn.Tanh: negated}),
    "class": lambda model: go.override({nn.Tanh: negated}),
    "function": lambda model: go.override({torch.relu: negated}),
}


PART = nn.Tanh()


class Holding:
    """An object that is called, and that has a module."""

    def __init__(self, part):
        self.part = part

    def __call__(self, x):
        return self.part(x)


def helper(x):
    return torch.tanh(x)


# By how a decorated call reaches what is overridden: a function, the part, and a path that is overridden.
REACHING = {
    "closure": lambda part: go.custom_backward(doubled)(lambda x: part(x)),
    "global": lambda part: go.custom_backward(doubled)(lambda x: PART(x)),
    "object": lambda part: go.custom_backward(doubled)(Holding(part)),
    "argument": lambda part: lambda x: go.custom_backward(doubled)(lambda x, module: module(x))(x, part),
    "bound method": lambda part: go.custom_backward(doubled)(part.__call__),
    "decorated calls": lambda part: go.custom_backward(doubled)(go.custom_backward(halved)(lambda x: part(x))),
}


def halved(grad_output, vjp):
    return vjp(grad_output) / 2


OF_THE_PART = {
    "module": lambda part: go.override(part, {part: negated}),
    "class": lambda part: go.override({nn.Tanh: negated}),
    "function in it": lambda part: go.override(part, {torch.tanh: negated}),
    "function": lambda part: go.override({torch.tanh: negated}),
}


def tanh_slope(x):
    return 1 - x.tanh() ** 2


@pytest.mark.filterwarnings("ignore:.* never ran while it was in force")
@pytest.mark.parametrize("override", OF_THE_PART.values(), ids=OF_THE_PART)
@pytest.mark.parametrize("way", REACHING)
class TestWhatADecoratedCallReachesWhenItRunsAgain:
    """In the backward of a transform, for the gradient without its rule."""

    def decorated(self, way):
        part = PART if way == "global" else nn.Tanh()
        return part, REACHING[way](part), 2 / (1 + (way == "decorated calls"))

    def test_is_overridden_inside(self, way, override):
        part, decorated, factor = self.decorated(way)
        x = noise(5, grad=False)
        with override(part):
            value, pullback = vjp(decorated, x)
            closely(pullback(torch.ones_like(value))[0], torch.full_like(x, -factor))
        value, pullback = vjp(decorated, x)
        closely(pullback(torch.ones_like(value))[0], factor * tanh_slope(x))

    def test_is_refused_when_the_override_has_gone(self, way, override):
        part, decorated, _ = self.decorated(way)
        x = noise(5, grad=False)
        with override(part):
            value, pullback = vjp(decorated, x)
        with pytest.raises(go.UnsupportedError, match=r"must run under the same rules when .* has it run again"):
            pullback(torch.ones_like(value))

    def test_is_refused_or_as_it_was_when_one_has_come(self, way, override):
        part, decorated, factor = self.decorated(way)
        x = noise(5, grad=False)
        value, pullback = vjp(decorated, x)
        with override(part):
            if override is OF_THE_PART["function"]:
                closely(pullback(torch.ones_like(value))[0], factor * tanh_slope(x))
                return
            with pytest.raises(go.UnsupportedError, match=r"must run under the same rules when .* has it run again"):
                pullback(torch.ones_like(value))

    def test_may_have_other_overrides_come_and_go(self, way, override):
        part, decorated, factor = self.decorated(way)
        x = noise(5, grad=False)
        with override(part), go.override({nn.ReLU: doubled, torch.relu: doubled}):
            value, pullback = vjp(decorated, x)
        with override(part):
            closely(pullback(torch.ones_like(value))[0], torch.full_like(x, -factor))


def test_a_function_of_a_path_that_runs_again_without_its_rule_is_refused():
    decorated, x = go.custom_backward(doubled)(lambda x: helper(x)), noise(5, grad=False)
    rules = {f"{__name__}:helper": negated}
    with go.override(rules):
        value, pullback = vjp(decorated, x)
        closely(pullback(torch.ones_like(value))[0], torch.full_like(x, -2.0))
    with pytest.raises(go.UnsupportedError, match=r"must run under the same rules when .* has it run again"):
        pullback(torch.ones_like(value))


def test_a_decorated_method_whose_part_runs_again_without_its_rule_is_refused():
    model, x = Weighing(), noise(5, grad=False)
    with go.override(model, {nn.Tanh: negated}):
        value, pullback = vjp(model, x)
    with pytest.raises(go.UnsupportedError, match=r"'weighed' .* must run under the same rules when .* run again"):
        pullback(torch.ones_like(value))
