"""`vjp` in a rule: the gradient as it would be without the rule, in any form and to any order."""

import copy
from collections import namedtuple

import pytest
import torch
from oracles import closely, exactly, float64, noise
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import gradoverride as go


def decorate(rule, forward):
    return go.custom_backward(rule)(forward)


def pass_on(grad_output, vjp):
    return vjp(grad_output)


def pass_on_by_name(grad_output, vjp):
    return vjp.by_name(grad_output)


def given_by_vjp(forward, *args, by_name=False, grad=None, **kwargs):
    """What `vjp` (or `vjp.by_name`) gives a rule of `forward`, for the gradient that came or for `grad`."""
    seen = []

    def rule(grad_output, vjp):
        given = (vjp.by_name if by_name else vjp)(grad_output if grad is None else grad)
        seen.append(given)
        return vjp.by_name(grad_output)

    decorate(rule, forward)(*args, **kwargs).sum().backward()
    return seen[0]


# --- forms: one tensor for one tensor argument, otherwise a tuple in signature order ---


def test_one_tensor_argument_gives_a_tensor():
    x = noise(3)
    closely(given_by_vjp(torch.sin, x), x.detach().cos())


def test_several_arguments_give_a_tuple_in_signature_order():
    a, b, c = noise(3), noise(3), noise(3)

    def forward(a, b, c):
        return a * b + c

    closely(given_by_vjp(forward, a, c=c, b=b), (b.detach(), a.detach(), torch.ones_like(c)))


@pytest.mark.parametrize("other", [2, 2.5, "text", None, [1, 2], {"k": 1}], ids=repr)
def test_an_argument_without_a_tensor_leaves_the_single_form(other):
    def forward(x, other):
        return x**2

    x = noise(3)
    given = given_by_vjp(forward, x, other)
    closely(given[0] if isinstance(given, tuple) else given, 2 * x.detach())


@pytest.mark.parametrize("other", [2, "text", None], ids=repr)
def test_what_is_no_tensor_gets_none_in_the_tuple(other):
    def forward(a, other, b):
        return a * b

    a, b = noise(3), noise(3)
    grad_a, grad_other, grad_b = given_by_vjp(forward, a, other, b)
    assert grad_other is None
    closely((grad_a, grad_b), (b.detach(), a.detach()))


def test_integer_tensor_gets_none_in_the_tuple():
    def forward(a, index, b):
        return a[index] * b

    a, b = noise(3), noise(2)
    index = torch.tensor([2, 0])
    grad_a, grad_index, grad_b = given_by_vjp(forward, a, index, b)
    assert grad_index is None
    closely(grad_b, a.detach()[index])
    closely(grad_a, torch.zeros_like(a).index_put((index,), b.detach()))


def test_integer_tensor_has_no_entry_or_none_by_name():
    def forward(a, index):
        return a[index]

    given = given_by_vjp(forward, noise(3), torch.tensor([2, 0]), by_name=True)
    assert given.pop("index", None) is None
    exactly(given, {"a": float64(1.0, 0.0, 1.0, grad=False)})


def test_argument_that_wants_no_gradient_gets_zeros():
    def forward(a, b):
        return a * b

    a, b = noise(3), noise(3, grad=False)
    grad_a, grad_b = given_by_vjp(forward, a, b)
    closely(grad_a, b)
    exactly(grad_b, torch.zeros(3, dtype=torch.float64))
    named = given_by_vjp(forward, b, a, by_name=True)
    exactly(named["a"], torch.zeros(3, dtype=torch.float64))
    closely(named["b"], b)


def test_argument_that_the_forward_does_not_use_gets_zeros():
    def forward(a, unused):
        return a.sin()

    grad_a, grad_unused = given_by_vjp(forward, noise(3), noise(2))
    assert grad_a.abs().sum() > 0
    exactly(grad_unused, torch.zeros(2, dtype=torch.float64))


def test_by_name_gives_the_arguments_by_name():
    def forward(a, *, b):
        return a * b

    a, b = noise(3), noise(3)
    closely(given_by_vjp(forward, a, b=b, by_name=True)["a"], b.detach())
    closely(given_by_vjp(forward, a, b=b, by_name=True)["b"], a.detach())


def test_by_name_of_one_argument_is_a_dict():
    x = noise(3)

    def forward(x):
        return x.sin()

    given = given_by_vjp(forward, x, by_name=True)
    assert list(given) == ["x"]
    closely(given["x"], x.detach().cos())


NESTED = {
    "tuple": lambda a, b: (a, b),
    "list": lambda a, b: [a, "text", b],
    "deep": lambda a, b: (a, {"inside": [b, None]}),
}


def tensors_in(nested):
    return [leaf for leaf in torch.utils._pytree.tree_leaves(nested) if isinstance(leaf, torch.Tensor)]


def product_of(nested):
    first, second = tensors_in(nested)
    return first * second


@pytest.mark.parametrize("pack", NESTED.values(), ids=NESTED)
@pytest.mark.parametrize("by_name", [False, True], ids=["vjp", "by_name"])
def test_nested_argument_gives_its_own_structure(pack, by_name):
    a, b = noise(3), noise(3)
    given = given_by_vjp(product_of, pack(a, b), by_name=by_name)
    given = given["nested"] if by_name else given
    assert type(given) is type(pack(a, b))
    closely(tensors_in(given), [b.detach(), a.detach()])


@pytest.mark.parametrize("pack", NESTED.values(), ids=NESTED)
def test_nested_argument_beside_another_gives_a_tuple(pack):
    def forward(scale, nested):
        return scale * product_of(nested)

    scale, a, b = noise(3), noise(3), noise(3)
    grad_scale, grad_nested = given_by_vjp(forward, scale, pack(a, b))
    closely(grad_scale, (a * b).detach())
    closely(tensors_in(grad_nested), [(scale * b).detach(), (scale * a).detach()])


# name: (what is built of three values, the forward)
LAYOUTS = {
    "jagged": (
        lambda values: torch.nested.nested_tensor_from_jagged(values, torch.tensor([0, 1, 3])),
        lambda jagged: jagged.square().values(),
    ),
    "COO": (
        lambda values: torch.sparse_coo_tensor([[0, 1, 2], [1, 2, 0]], values, (3, 3), check_invariants=True),
        lambda sparse: torch.sparse.mm(sparse, torch.eye(3, dtype=sparse.dtype)).square(),
    ),
    "CSR": (
        lambda values: torch.sparse_csr_tensor([0, 1, 2, 3], [1, 2, 0], values, (3, 3), check_invariants=True),
        lambda sparse: torch.sparse.mm(sparse, torch.eye(3, dtype=sparse.dtype)).square(),
    ),
}


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state:UserWarning")
@pytest.mark.parametrize("rule", [pass_on, pass_on_by_name], ids=["vjp", "by_name"])
@pytest.mark.parametrize(("build", "forward"), LAYOUTS.values(), ids=LAYOUTS)
def test_jagged_or_sparse_argument_with_a_history_has_its_gradient(build, forward, rule):
    values = noise(3)
    (grad,) = torch.autograd.grad(decorate(rule, forward)(build(values)).sum(), values)
    closely(grad, 2 * values.detach())


@pytest.mark.parametrize("rule", [pass_on, pass_on_by_name], ids=["vjp", "by_name"])
def test_jagged_result_in_a_checkpoint_has_its_gradient(rule):
    build, _ = LAYOUTS["jagged"]
    square = decorate(rule, lambda jagged: jagged.square())
    values = noise(3)
    result = checkpoint(lambda jagged: square(jagged).values(), build(values), use_reentrant=False)
    (grad,) = torch.autograd.grad(result.sum(), values)
    closely(grad, 2 * values.detach())


@pytest.mark.parametrize("rule", [pass_on, pass_on_by_name], ids=["vjp", "by_name"])
@pytest.mark.parametrize(
    ("forward", "inputs"),
    [
        (lambda x: x.sin(), 1),
        (lambda a, b: a * b.exp(), 2),
        (lambda a, *more, b: a * more[0] * b, 2),
        (lambda pair: pair["a"] * pair["b"] ** 2, 2),
        (lambda a, pair: a * pair[0] / (1 + pair[1][0] ** 2), 3),
        (lambda a, **more: a * more["b"] * more["c"].cos(), 3),
    ],
    ids=["one", "two", "variadic and keyword", "dict", "nested", "keywords"],
)
def test_what_vjp_gives_is_a_form_that_the_rule_may_return(rule, forward, inputs):
    tensors = [noise(3) for _ in range(inputs)]
    names = forward.__code__.co_varnames[: forward.__code__.co_argcount + forward.__code__.co_kwonlyargcount]

    def call(function):
        if names == ("pair",):
            return function(dict(zip("ab", tensors, strict=True)))
        if names == ("a", "pair"):
            return function(tensors[0], (tensors[1], [tensors[2]]))
        if "more" in forward.__code__.co_varnames and names == ("a", "b"):
            return function(tensors[0], tensors[1], b=tensors[1])
        if names == ("a",):
            return function(tensors[0], b=tensors[1], c=tensors[2])
        return function(*tensors)

    expected = torch.autograd.grad(call(forward).sum(), tensors)
    closely(torch.autograd.grad(call(decorate(rule, forward)).sum(), tensors), expected)


def test_several_results_take_a_gradient_of_their_structure():
    @go.custom_backward(lambda grad_output, vjp: vjp({"s": grad_output["s"], "c": [10 * grad_output["c"][0], None]}))
    def both(x):
        return {"s": x.sin(), "c": [x.cos(), "text"]}

    x = noise(3)
    result = both(x)
    (result["s"] + result["c"][0]).sum().backward()
    closely(x.grad, x.detach().cos() - 10 * x.detach().sin())


# --- modules ---


class Affine(nn.Module):
    def __init__(self, scale=None):
        super().__init__()
        self.weight = nn.Parameter(noise(3, grad=False))
        self.shift = nn.Parameter(noise(3, grad=False))
        self.frozen = nn.Parameter(noise(3, grad=False), requires_grad=False)

    def forward(self, x):
        return x * self.weight * self.frozen + self.shift


def ruled(rule, module=Affine):
    return type(module.__name__, (module,), {"forward": go.custom_backward(rule)(module.forward)})


def like_plain(rule):
    """A plain module, and one with the rule and the same parameters."""
    plain, ours = Affine(), ruled(rule)()
    ours.load_state_dict(plain.state_dict())
    return plain, ours


def test_vjp_of_a_module_gives_the_gradient_of_its_input():
    seen = []

    def rule(grad_output, vjp):
        seen.append(vjp(grad_output))
        return 7 * seen[0]

    module, x = ruled(rule)(), noise(3)
    module(x).sum().backward()
    closely(seen[0], (module.weight * module.frozen).detach())
    closely(x.grad, 7 * seen[0])


def test_by_name_of_a_module_gives_its_trainable_parameters_too():
    seen = []

    def rule(grad_output, vjp):
        seen.append(vjp.by_name(grad_output))
        return {name: 7 * grad for name, grad in seen[0].items()}

    module, x = ruled(rule)(), noise(3)
    module(x).sum().backward()
    assert set(seen[0]) == {"x", "weight", "shift"}
    closely(x.grad, 7 * (module.weight * module.frozen).detach())
    closely(module.weight.grad, 7 * (x * module.frozen).detach())
    exactly(module.shift.grad, torch.full((3,), 7.0, dtype=torch.float64))
    assert module.frozen.grad is None


def test_by_name_gives_dotted_names():
    class Deep(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(3, 2, dtype=torch.float64))

        @go.custom_backward(lambda grad_output, vjp: {n: 3 * g for n, g in vjp.by_name(grad_output).items()})
        def forward(self, x):
            return self.inner(x)

    module, x = Deep(), noise(4, 3)
    module(x).sum().backward()
    closely(x.grad, 3 * module.inner[0].weight.detach().sum(0).expand(4, 3))
    closely(module.inner[0].weight.grad, 3 * x.detach().sum(0).expand(2, 3))
    exactly(module.inner[0].bias.grad, torch.full((2,), 12.0, dtype=torch.float64))


def test_parameters_left_to_autograd_get_the_unmodified_gradient_beside_vjp():
    module, x = ruled(lambda grad_output, vjp: vjp(100 * grad_output))(), noise(3)
    module(x).sum().backward()
    closely(x.grad, 100 * (module.weight * module.frozen).detach())
    closely(module.weight.grad, (x * module.frozen).detach())


def test_module_with_vjp_alone_has_the_gradients_of_the_plain_module():
    plain = Affine()
    module = ruled(pass_on)()
    module.load_state_dict(plain.state_dict())
    x = noise(5, 3)

    def gradients(each):
        return torch.autograd.grad(each(x).pow(2).sum(), (x, each.weight, each.shift))

    closely(gradients(module), gradients(plain))


# --- the forward runs once ---


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.runs = 0
        self.weight = nn.Parameter(noise(3, grad=False))

    def forward(self, x):
        self.runs += 1
        return (x * self.weight).sin()


RULES_WITH_VJP = {
    "vjp": pass_on,
    "by_name": pass_on_by_name,
    "vjp twice": lambda grad_output, vjp: vjp(grad_output) + vjp(2 * grad_output),
    "vjp and by_name": lambda grad_output, vjp: {**vjp.by_name(grad_output), "x": vjp(grad_output)},
    "vjp and parameter": lambda grad_output, vjp, x, weight: {"x": vjp(grad_output), "weight": grad_output * x},
    "asked and not called": lambda grad_output, vjp: grad_output,
}


@pytest.mark.parametrize("rule", RULES_WITH_VJP.values(), ids=RULES_WITH_VJP)
def test_forward_runs_once_for_all_of_a_first_backward(rule):
    module, x = ruled(rule, Counting)(), noise(3)
    module(x).sum().backward()
    assert module.runs == 1


@pytest.mark.parametrize("rule", [pass_on, pass_on_by_name], ids=["vjp", "by_name"])
def test_forward_runs_once_for_three_orders_and_a_retained_graph(rule):
    module, x = ruled(rule, Counting)(), noise(3)
    y = module(x).sum()
    y.backward(retain_graph=True)
    (first,) = torch.autograd.grad(y, x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x, create_graph=True)
    (third,) = torch.autograd.grad(second.sum(), x)
    weight, value = module.weight.detach(), (x * module.weight).detach()
    closely(third, -(weight**3) * value.cos())
    assert module.runs == 1


@pytest.mark.parametrize("rule", [pass_on, pass_on_by_name], ids=["vjp", "by_name"])
@pytest.mark.parametrize("retain", [False, True], ids=["", "retained"])
def test_rule_runs_once_for_each_use_of_a_shared_module(rule, retain):
    runs = []

    def counted(grad_output, vjp):
        runs.append(grad_output)
        return rule(grad_output, vjp)

    plain, ours = like_plain(counted)
    x = noise(3)
    plain(plain(plain(x))).sum().backward()
    expected, x.grad = x.grad, None
    ours(ours(ours(x))).sum().backward(retain_graph=retain)
    assert len(runs) == 3
    closely(x.grad, expected)
    for name in ("weight", "shift"):
        closely(ours.get_parameter(name).grad, plain.get_parameter(name).grad)


def test_dropout_mask_of_the_backward_is_that_of_the_forward():
    dropped = decorate(lambda grad_output, vjp: 7 * vjp(grad_output), lambda x: F.dropout(x, 0.5))
    x = torch.ones(1000, dtype=torch.float64, requires_grad=True)
    y = dropped(x)
    y.sum().backward()
    assert 0 < (y == 0).sum() < 1000
    exactly(x.grad, 7 * y.detach())


def test_dropout_mask_is_the_same_in_every_call_of_vjp():
    @go.custom_backward(lambda grad_output, vjp: vjp(grad_output) - vjp(2 * grad_output) / 2 + vjp(grad_output * 1))
    def dropped(x):
        return F.dropout(x, 0.5)

    x = torch.ones(1000, dtype=torch.float64, requires_grad=True)
    y = dropped(x)
    y.sum().backward(retain_graph=True)
    exactly(x.grad, y.detach())
    y.sum().backward()
    exactly(x.grad, 2 * y.detach())


@pytest.mark.parametrize("rule", [pass_on, pass_on_by_name], ids=["vjp", "by_name"])
def test_random_numbers_drawn_after_the_call_are_those_of_the_plain_function(rule):
    x = torch.ones(10, requires_grad=True)

    def draw_after(function):
        torch.manual_seed(3)
        function(x).sum().backward()
        return torch.rand(4)

    plain = draw_after(lambda x: F.dropout(x, 0.5))
    exactly(draw_after(decorate(rule, lambda x: F.dropout(x, 0.5))), plain)


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3, dtype=torch.float64)

    def forward(self, x):
        return self.norm(x)


@pytest.mark.parametrize("rule", [pass_on, pass_on_by_name], ids=["vjp", "by_name"])
def test_batchnorm_counts_once_and_has_the_plain_gradient(rule):
    plain, module = Normed(), ruled(rule, Normed)()
    x, weights = noise(6, 3), noise(6, 3, grad=False)
    expected = torch.autograd.grad((plain(x) * weights).sum(), x)
    y = (module(x) * weights).sum()
    closely(torch.autograd.grad(y, x, create_graph=True), expected)
    y.backward()
    assert module.norm.num_batches_tracked.item() == 1
    exactly(module.norm.running_mean, plain.norm.running_mean)
    exactly(module.norm.running_var, plain.norm.running_var)


# --- constants: arguments that require no grad, for some of which torch has no derivative ---


def thrice(grad_output, vjp):
    given = vjp(grad_output)
    return 3 * given if isinstance(given, torch.Tensor) else tuple(None if grad is None else 3 * grad for grad in given)


def statistics():
    return torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)


WITH_CONSTANTS = {
    "batch_norm": (lambda x, mean, variance: F.batch_norm(x, mean, variance, training=True), statistics),
    "instance_norm": (lambda x, mean, variance: F.instance_norm(x.view(-1, 3, 2), mean, variance), statistics),
    "cross_entropy": (
        lambda x, target, weight: F.cross_entropy(x, target, weight),
        lambda: (torch.tensor([0, 1, 2, 0]), float64(0.5, 2.0, 1.0, grad=False)),
    ),
    "soft_margin_loss": (lambda x, y: F.soft_margin_loss(x, y), lambda: (torch.ones(4, 3, dtype=torch.float64),)),
    "product": (lambda x, y: x.sin() * y, lambda: (torch.full((4, 3), 2.0, dtype=torch.float64),)),
}


def weighted(y):
    return (y * torch.linspace(1, 2, y.numel(), dtype=y.dtype).view_as(y)).sum()


@pytest.mark.parametrize("name", WITH_CONSTANTS)
def test_argument_that_requires_no_grad_is_a_constant(name):
    forward, make_constants = WITH_CONSTANTS[name]
    x = noise(4, 3)

    def run(forward):
        constants = make_constants()
        (first,) = torch.autograd.grad(weighted(forward(x, *constants)), x, create_graph=True)
        (second,) = torch.autograd.grad((first**2).sum(), x)
        return first, second, constants

    first, second, constants = run(decorate(thrice, forward))
    plain_first, plain_second, plain_constants = run(forward)
    closely((first, second), (3 * plain_first, 9 * plain_second))
    exactly(constants, plain_constants)


TRANSFORMS = {
    "grad": lambda forward, x: torch.func.grad(lambda x: weighted(forward(x)))(x),
    "jvp": lambda forward, x: torch.func.jvp(forward, (x,), (x.cos(),))[1],
    "grad over vmap": lambda forward, x: torch.func.grad(lambda x: weighted(torch.vmap(forward)(x)))(x.view(1, 4, 3)),
}


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of a loss under vmap, without ours too
@pytest.mark.parametrize("name", WITH_CONSTANTS)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_argument_that_requires_no_grad_is_a_constant_under_transforms(name, transform):
    forward, make_constants = WITH_CONSTANTS[name]
    if transform == "grad over vmap" and name.endswith("norm"):
        pytest.skip("torch writes statistics of a batch into no tensor without one")
    x = noise(4, 3, grad=False)

    def run(forward):
        constants = make_constants()
        return TRANSFORMS[transform](lambda x: forward(x, *constants), x), constants

    transformed, constants = run(decorate(thrice, forward))
    plain, plain_constants = run(forward)
    closely(transformed, 3 * plain)
    exactly(constants, plain_constants)


@pytest.mark.parametrize("z", [torch.tensor([1 + 2j, -0.5j]), torch.zeros(0).double()], ids=["complex", "empty"])
def test_gradient_of_complex_and_of_no_numbers_under_transforms(z):
    squared = go.custom_backward(thrice)(lambda z: z * z)
    closely(torch.func.grad(lambda z: squared(z).abs().sum())(z), 3 * torch.func.grad(lambda z: (z * z).abs().sum())(z))


def test_constant_argument_may_be_made_an_array():
    def forward(x, table):
        return x * float(table.numpy().sum())

    x = noise(3)
    decorate(thrice, forward)(x, float64(1.0, 2.0, grad=False)).sum().backward()
    exactly(x.grad, torch.full((3,), 9.0, dtype=torch.float64))


def test_constant_argument_may_be_written_into():
    def forward(x, count):
        count.add_(1)
        return x * 2

    x, count = noise(3), float64(1.0, grad=False)
    decorate(thrice, forward)(x, count).sum().backward()
    exactly((x.grad, count), (torch.full((3,), 6.0, dtype=torch.float64), float64(2.0, grad=False)))


def test_module_with_running_statistics_takes_a_rule_with_vjp_for_its_function():
    x, plain, model = noise(4, 3), nn.BatchNorm1d(3, dtype=torch.float64), nn.BatchNorm1d(3, dtype=torch.float64)
    with go.override({F.batch_norm: thrice}):
        y = model(x)
    weighted(y).backward()
    expected = torch.autograd.grad(weighted(plain(x)), [x, *plain.parameters()])
    closely([x.grad, model.weight.grad, model.bias.grad], [3 * grad for grad in expected])
    exactly(list(model.buffers()), list(plain.buffers()))


# --- several calls ---


def test_vjp_takes_other_gradients_in_any_order():
    seen = []

    def rule(grad_output, vjp):
        seen.extend(vjp(g) for g in (3 * grad_output, grad_output, -grad_output, grad_output))
        return seen[0] + seen[2]

    x = noise(3)
    decorate(rule, torch.sin)(x).sum().backward()
    cosine = x.detach().cos()
    closely(seen, [3 * cosine, cosine, -cosine, cosine])
    closely(x.grad, 2 * cosine)


def test_vjp_is_of_the_values_at_the_forward():
    def rule(grad_output, vjp):
        return vjp(torch.full_like(grad_output, 2.0))

    x = noise(3)
    at_forward = x.detach().clone()
    y = decorate(rule, lambda x: (x * 1).sin())(x)
    with torch.no_grad():
        x.add_(1)
    y.sum().backward()
    closely(x.grad, 2 * at_forward.cos())


def test_what_vjp_gave_may_be_changed_without_changing_what_it_gives_next():
    seen = []

    def rule(grad_output, vjp):
        first = vjp(grad_output * 1)
        first.mul_(100)
        seen.append(vjp(grad_output * 1))
        return first

    x = noise(3)
    decorate(rule, torch.sin)(x).sum().backward()
    closely(seen[0], x.detach().cos())
    closely(x.grad, 100 * x.detach().cos())


@pytest.mark.parametrize("forward", [lambda x: x * 2, lambda *x: x[0] * 2], ids=["short path", "general path"])
def test_what_vjp_gave_may_be_changed_for_the_gradient_that_came_too(forward):
    seen = []

    def rule(grad_output, vjp):
        vjp(grad_output).mul_(100)
        seen.append(vjp(grad_output).clone())
        return seen[0]

    x = noise(3)
    try:
        decorate(rule, forward)(x).sum().backward()
    except (RuntimeError, go.GradOverrideError):
        return  # refused
    exactly(seen[0], torch.full((3,), 2.0, dtype=torch.float64))


@pytest.mark.parametrize("forward", [lambda x: x * 2, lambda *x: x[0] * 2], ids=["short path", "general path"])
def test_vjp_takes_the_gradient_as_the_rule_has_changed_it(forward):
    def rule(grad_output, vjp):
        grad_output.mul_(100)
        return vjp(grad_output)

    x = noise(3)
    try:
        decorate(rule, forward)(x).sum().backward()
    except go.GradOverrideError:
        return  # refused
    exactly(x.grad, torch.full((3,), 200.0, dtype=torch.float64))


@pytest.mark.parametrize("rule", [pass_on, pass_on_by_name], ids=["vjp", "by_name"])
@pytest.mark.parametrize("inputs", [1, 2])
def test_graph_retained_twice_gives_the_same_gradient_three_times(rule, inputs):
    tensors = [noise(3) for _ in range(inputs)]

    def forward(x, y=None):
        return (x if y is None else x * y).sin()

    expected = torch.autograd.grad(forward(*tensors).sum(), tensors)
    loss = decorate(rule, forward)(*tensors).sum()
    for retain in (True, True, False):
        closely(torch.autograd.grad(loss, tensors, retain_graph=retain), expected)


def test_vjp_called_twice_in_a_backward_that_is_not_retained():
    x = noise(3)
    twice = decorate(lambda grad_output, vjp: vjp(grad_output) + vjp(3 * grad_output), torch.exp)
    twice(x).sum().backward()
    closely(x.grad, 4 * x.detach().exp())


def under_another_name(grad_output, vjp):
    again = vjp
    return again(grad_output * 2) + again(grad_output)


def in_a_loop(grad_output, vjp):
    total = 0
    for factor in (1, 2):
        total = total + vjp(grad_output * factor)
    return total


def in_a_while_loop(grad_output, vjp):
    total, factor = 0, 2
    while factor:
        total = total + vjp(grad_output * factor)
        factor -= 1
    return total


def in_a_comprehension(grad_output, vjp):
    return sum([vjp(grad_output * factor) for factor in (1, 2)])


def in_a_nested_function(grad_output, vjp):
    def times(factor):
        return vjp(grad_output * factor)

    return times(1) + times(2)


def given_to_a_helper(grad_output, vjp):
    return in_a_loop(grad_output, vjp)


def as_a_bound_method(grad_output, vjp):
    pull = vjp.by_name
    return pull(grad_output)["x"] + pull(grad_output * 2)["x"]


def mapped(grad_output, vjp):
    return sum(map(vjp, (grad_output, grad_output * 2)))


def mapped_over_what_a_call_gives(grad_output, vjp):
    return sum(map(vjp, reversed([grad_output, grad_output * 2])))


def first_of(first, *others):
    return first(*others)


def given_to_a_default(grad_output, vjp, run=in_a_loop, identity=abs):
    return first_of(lambda pull, grad: run(grad, pull), vjp, identity(grad_output))


def given_first_to_a_default(grad_output, vjp, run=lambda pull, grad: in_a_loop(grad, pull)):
    return run(vjp, grad_output)


MANY_TIMES = [
    *(under_another_name, in_a_loop, in_a_while_loop, in_a_comprehension, in_a_nested_function, given_to_a_helper),
    *(as_a_bound_method, mapped, mapped_over_what_a_call_gives, given_to_a_default, given_first_to_a_default),
]


@pytest.mark.parametrize("kind", ["short path", "general path", "module"])
@pytest.mark.parametrize("rule", MANY_TIMES, ids=lambda rule: rule.__name__)
def test_vjp_may_be_called_many_times_however_the_rule_does_it(rule, kind):
    x = noise(3)
    if kind == "module":
        plain, ours = like_plain(rule)
        plain(x).sin().sum().backward()
        expected, x.grad = 3 * x.grad, None
        ours(x).sin().sum().backward()
        closely(x.grad, expected)
        for name in ("weight", "shift"):
            closely(ours.get_parameter(name).grad, plain.get_parameter(name).grad)
        return
    ours = decorate(rule, {"short path": lambda x: x.sin(), "general path": lambda x, *more: x.sin()}[kind])
    ours(x).sum().backward()
    closely(x.grad, 3 * x.cos().detach())


@pytest.mark.parametrize("by_name", [False, True], ids=["vjp", "by_name"])
def test_parameters_keep_their_gradient_after_vjp_of_another_gradient_was_asked_for_once(by_name):
    def doubled(grad_output, vjp):
        return vjp(grad_output * 2)

    def doubled_by_name(grad_output, vjp):
        return {"x": vjp.by_name(grad_output * 2)["x"]}

    x = noise(3)
    plain, ours = like_plain(doubled_by_name if by_name else doubled)
    plain(x).sin().sum().backward()
    expected, x.grad = 2 * x.grad, None
    ours(x).sin().sum().backward()
    closely(x.grad, expected)
    for name in ("weight", "shift"):
        closely(ours.get_parameter(name).grad, plain.get_parameter(name).grad)


def test_vjp_after_the_backward_is_over_is_right_or_an_error():
    leaked = []

    def rule(grad_output, vjp):
        leaked.append((vjp, grad_output))
        return vjp(grad_output)

    x = noise(3)
    decorate(rule, torch.exp)(x).sum().backward()
    vjp, grad_output = leaked[0]
    try:
        later = vjp(2 * grad_output)
    except (RuntimeError, go.GradOverrideError):
        return
    closely(later, 2 * x.detach().exp())


# --- derivatives of derivatives, against formulas ---


def test_rule_may_answer_for_every_parameter_beside_one_vjp():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(float64(1.0, 2.0, 3.0))

        @go.custom_backward(
            lambda grad_output, vjp, weight: {"x": vjp(3 * grad_output), "weight": grad_output * weight}
        )
        def forward(self, x):
            return x * self.weight

    module, x, grad = Scaled(), noise(3), noise(3)
    for _ in range(2):
        found = torch.autograd.grad(module(x), [x, module.weight], grad)
        closely(found[0], (3 * grad * module.weight).detach())
        closely(found[1], (grad * module.weight).detach())


@pytest.mark.parametrize("rule", [pass_on, pass_on_by_name], ids=["vjp", "by_name"])
def test_second_and_third_derivative_of_one_argument(rule):
    x = noise(3)
    y = decorate(rule, lambda x: x**4)(x)
    (first,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x, create_graph=True)
    (third,) = torch.autograd.grad(second.sum(), x)
    at = x.detach()
    closely((first.detach(), second.detach(), third), (4 * at**3, 12 * at**2, 24 * at))


def test_mixed_second_derivatives_of_two_arguments():
    a, b = noise(3), noise(3)
    y = decorate(pass_on, lambda a, b: a**2 * b**3)(a, b)
    grad_a, grad_b = torch.autograd.grad(y.sum(), (a, b), create_graph=True)
    aa, ab = torch.autograd.grad(grad_a.sum(), (a, b), retain_graph=True)
    ba, bb = torch.autograd.grad(grad_b.sum(), (a, b))
    at, bt = a.detach(), b.detach()
    closely((aa, ab, ba, bb), (2 * bt**3, 6 * at * bt**2, 6 * at * bt**2, 6 * at**2 * bt))


def test_second_derivative_reaches_the_parameters_of_a_module():
    class Cubic(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(noise(3, grad=False))

        @go.custom_backward(pass_on)
        def forward(self, x):
            return self.weight**2 * x**3

    module, x = Cubic(), noise(3)
    (first,) = torch.autograd.grad(module(x).sum(), x, create_graph=True)
    first.sum().backward()
    at, weight = x.detach(), module.weight.detach()
    closely(x.grad, 6 * weight**2 * at)
    closely(module.weight.grad, 6 * weight * at**2)


def test_second_derivative_of_a_parameters_own_gradient_is_refused_without_a_kept_graph():
    class Cubic(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(noise(3, grad=False))

        @go.custom_backward(lambda grad_output: 5 * grad_output)
        def forward(self, x):
            return self.weight**2 * x**3

    module, x = Cubic(), noise(3)
    (grad_weight,) = torch.autograd.grad(module(x).sum(), module.weight, create_graph=True)
    closely(grad_weight.detach(), (2 * module.weight * x**3).detach())
    with pytest.raises(go.UnsupportedError, match="Ask for 'vjp' in the rule"):
        torch.autograd.grad(grad_weight.sum(), (x, module.weight))


def test_second_derivative_of_a_parameters_own_gradient_by_itself_is_right():
    class Cubic(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(noise(3, grad=False))

        @go.custom_backward(lambda grad_output: 5 * grad_output)
        def forward(self, x):
            return self.weight**2 * x**3

    module, x = Cubic(), noise(3)
    (grad_weight,) = torch.autograd.grad(module(x).sum(), module.weight, create_graph=True)
    closely(torch.autograd.grad(grad_weight.sum(), module.weight), (2 * x.detach() ** 3,))


SECOND = {
    # rule: (gradient that it gives, its derivative by x, its derivative by the gradient), for a forward x^3
    "scaled": (lambda g, vjp: 5 * vjp(g), lambda g, x: (15 * g * x**2, 30 * g * x, 15 * x**2)),
    "scaled inside": (lambda g, vjp: vjp(5 * g), lambda g, x: (15 * g * x**2, 30 * g * x, 15 * x**2)),
    "squared": (lambda g, vjp: vjp(g) ** 2, lambda g, x: (9 * g**2 * x**4, 36 * g**2 * x**3, 18 * g * x**4)),
    "squared inside": (lambda g, vjp: vjp(g**2), lambda g, x: (3 * g**2 * x**2, 6 * g**2 * x, 6 * g * x**2)),
    "times x": (lambda g, vjp, x: vjp(g) * x, lambda g, x: (3 * g * x**3, 9 * g * x**2, 3 * x**3)),
    "x inside": (lambda g, vjp, x: vjp(g * x), lambda g, x: (3 * g * x**3, 9 * g * x**2, 3 * x**3)),
    # `output` is the decorated call's: its own derivative is the rule's, 3 x^5
    "output": (
        lambda g, vjp, output: vjp(g) * output,
        lambda g, x: (3 * g * x**5, 6 * g * x**4 + 9 * g * x**7, 3 * x**5),
    ),
    "two calls": (lambda g, vjp: vjp(g) * vjp(2 * g), lambda g, x: (18 * g**2 * x**4, 72 * g**2 * x**3, 36 * g * x**4)),
    "of itself": (lambda g, vjp: vjp(vjp(g)), lambda g, x: (9 * g * x**4, 36 * g * x**3, 9 * x**4)),
    "through itself": (
        lambda g, vjp, x: vjp(x * vjp(g)),
        lambda g, x: (9 * g * x**5, 45 * g * x**4, 9 * x**5),
    ),
    "without vjp": (lambda g, x: 7 * g * x, lambda g, x: (7 * g * x, 7 * g, 7 * x)),
    "added": (lambda g, vjp, x: vjp(g) + x.sin(), lambda g, x: (3 * g * x**2 + x.sin(), 6 * g * x + x.cos(), 3 * x**2)),
}


@pytest.mark.parametrize("kind", SECOND)
def test_second_derivative_is_that_of_the_rule_as_written(kind):
    rule, formula = SECOND[kind]
    x, g = noise(3), noise(3)
    (first,) = torch.autograd.grad(decorate(rule, lambda x: x**3)(x), x, g, create_graph=True)
    by_x, by_g = torch.autograd.grad(first.sum(), (x, g))
    closely((first.detach(), by_x, by_g), formula(g.detach(), x.detach()))


THREE_ORDERS = {
    "as it is": lambda g, vjp, a, b: vjp(g),
    "of itself": lambda g, vjp, a, b: vjp(vjp(g)[0]),
    "of itself three times": lambda g, vjp, a, b: vjp(vjp(vjp(g)[1])[0]),
    "product of calls": lambda g, vjp, a, b: (vjp(g)[0] * vjp(g * b)[1], vjp(a)[0]),
    "chained and mixed": lambda g, vjp, a, b: (vjp(vjp(g)[0] * a + g)[1], vjp(g)[0] * b.sin()),
    "by_name": lambda g, vjp, a, b: (vjp.by_name(vjp(g)[0] * b)["b"], vjp.by_name(g)["a"] ** 2),
    "same gradient twice": lambda g, vjp, a, b: (vjp(g)[0] * vjp(g)[1], vjp(g)[0]),
    "no gradient for one": lambda g, vjp, a, b: (None, vjp(vjp(g)[0])[1]),
}


class WrittenOut:
    """`vjp` with plain autograd."""

    def __init__(self, forward, a, b):
        self.forward, self.inputs = forward, (a, b)

    def __call__(self, g):
        return torch.autograd.grad(self.forward(*self.inputs), self.inputs, g, create_graph=True)

    def by_name(self, g):
        return dict(zip("ab", self(g), strict=True))


@pytest.mark.parametrize("kind", THREE_ORDERS)
@pytest.mark.parametrize("leaves", [True, False], ids=["leaves", "no leaves"])
def test_three_orders_are_those_of_the_rule_with_vjp_written_out(kind, leaves):
    rule = THREE_ORDERS[kind]

    def forward(a, b):
        return (a * b.tanh()).sin() + b * a.exp()

    variables = noise(3), noise(3), noise(3)
    a, b, g = variables if leaves else [(v * 1.5).tanh() for v in variables]
    wanted = [index for index, grad in enumerate(rule(g, WrittenOut(forward, a, b), a, b)) if grad is not None]
    inputs = [(a, b)[index] for index in wanted]

    def orders(first):
        total, found = sum((each * (1 + place)).sum() for place, each in enumerate(first)), list(first)
        for _ in range(2):
            grads = torch.autograd.grad(total, variables, create_graph=True)
            found += grads
            total = sum((grad * grad.detach().cos()).sum() for grad in grads)
        return [each.detach() for each in found]

    ours = torch.autograd.grad(decorate(rule, forward)(a, b), inputs, g, create_graph=True)
    written_out = [rule(g, WrittenOut(forward, a, b), a, b)[index] for index in wanted]
    torch.testing.assert_close(orders(ours), orders(written_out), rtol=1e-8, atol=1e-8)


def test_detached_vjp_has_no_second_derivative():
    x = noise(3)
    y = decorate(lambda grad_output, vjp: vjp(grad_output).detach() + x, lambda x: x**3)(x)
    (first,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    exactly(torch.autograd.grad(first.sum(), x), (torch.ones_like(x),))


def test_second_derivative_through_a_nested_decorated_call():
    inner = decorate(lambda g, x: 5 * g * x, lambda x: x.floor())
    outer = decorate(lambda g, vjp: 3 * vjp(g), lambda x: inner(x) * x)
    x = noise(3)
    (first,) = torch.autograd.grad(outer(x).sum(), x, create_graph=True)
    at = x.detach()
    closely(first.detach(), 3 * (5 * at**2 + at.floor()))
    (second,) = torch.autograd.grad(first.sum(), x)
    closely(second, 3 * (10 * at + 5 * at))  # d floor(x) is 5 x, by the inner rule


def test_gradient_penalty_trains_a_module_with_a_rule_of_vjp():
    plain = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)).double()

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = copy.deepcopy(plain)

        @go.custom_backward(pass_on)
        def forward(self, x):
            return self.net(x)

    def penalised(model):
        (gradient,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        weights = [p for p in model.parameters() if p.dim() == 2]
        return torch.autograd.grad(((gradient.norm(dim=1) - 1) ** 2).mean(), weights)

    x = noise(5, 3)
    closely(penalised(Wrapped()), penalised(plain))


# --- finite differences: rules that are true derivatives ---


def power_backward(grad_output, z):
    return 2 * grad_output * z


@go.custom_backward(power_backward)
def power(z):
    return z.real**2 + z.imag**2


CHECKED = {
    "one argument": (decorate(lambda g, x: g * x.cos(), lambda x: x.sin()), 1, torch.float64),
    "output": (decorate(lambda g, output: g * (1 - output**2), lambda x: x.tanh()), 1, torch.float64),
    "several arguments": (
        decorate(lambda g, a, b, c: (g * b * c, g * a * c, g * a * b), lambda a, b, c: a * b * c),
        3,
        torch.float64,
    ),
    "complex": (decorate(lambda g, z: g * (2 * z).conj(), lambda z: z * z), 1, torch.complex128),
    "complex, several": (
        decorate(lambda g, z, w: (g * w.conj(), g * z.conj()), lambda z, w: z * w),
        2,
        torch.complex128,
    ),
    "complex, conjugated": (
        decorate(lambda g, z, w: (g * w, g.conj() * z), lambda z, w: z * w.conj()),
        2,
        torch.complex128,
    ),
    "complex to real": (power, 1, torch.complex128),
    "vjp": (decorate(pass_on, lambda x: x.sin() * x), 1, torch.float64),
    "vjp, several": (decorate(pass_on, lambda a, b, c: (a * b).sin() / (2 + c.cos())), 3, torch.float64),
    "vjp, complex": (decorate(pass_on, lambda z, w: (z * w.conj()).exp()), 2, torch.complex128),
    "by_name": (decorate(pass_on_by_name, lambda a, b: a * b.sin()), 2, torch.float64),
    "vjp of a matmul": (decorate(pass_on, lambda a, b: a[:, None] @ b[None]), 2, torch.float64),
    "residual beside vjp": (
        decorate(lambda g, square, vjp: 3 * g * square, lambda x: go.save_for_backward(x**3, square=x**2)),
        1,
        torch.float64,
    ),
    "dict answer": (decorate(lambda g, a, b: {"b": g * a, "a": g * b}, lambda a, b: a * b), 2, torch.float64),
}


def inputs_of(kind):
    function, count, dtype = CHECKED[kind]
    return function, tuple(noise(3, dtype=dtype) for _ in range(count))


@pytest.mark.parametrize("kind", CHECKED)
def test_gradcheck(kind):
    assert torch.autograd.gradcheck(*inputs_of(kind))


@pytest.mark.parametrize("kind", CHECKED)
def test_gradgradcheck(kind):
    assert torch.autograd.gradgradcheck(*inputs_of(kind))


@pytest.mark.parametrize("rule", [pass_on, pass_on_by_name], ids=["vjp", "by_name"])
@pytest.mark.parametrize("check", [torch.autograd.gradcheck, torch.autograd.gradgradcheck])
def test_finite_differences_of_a_nested_argument_and_result(rule, check):
    function = decorate(rule, lambda pair: {"p": pair[0] * pair[1][0], "q": [pair[0].sin()]})

    def flat(a, b):
        result = function((a, [b]))
        return result["p"], result["q"][0]

    assert check(flat, (noise(3), noise(3)))


@pytest.mark.parametrize("check", [torch.autograd.gradcheck, torch.autograd.gradgradcheck])
def test_finite_differences_of_a_nested_argument_by_hand(check):
    @go.custom_backward(lambda g, pair: {"pair": {"a": g * pair["b"] ** 2, "b": 2 * g * pair["a"] * pair["b"]}})
    def function(pair):
        return pair["a"] * pair["b"] ** 2

    assert check(lambda a, b: function({"a": a, "b": b}), (noise(3), noise(3)))


def by_hand(grad_output, x, weight, shift):
    return {"x": grad_output * 2 * x * weight, "weight": grad_output * x**2, "shift": grad_output * 1}


@pytest.mark.parametrize("rule", [pass_on, pass_on_by_name, by_hand], ids=["vjp", "by_name", "by hand"])
@pytest.mark.parametrize("check", [torch.autograd.gradcheck, torch.autograd.gradgradcheck])
def test_finite_differences_of_the_parameters_of_a_module(rule, check):
    class Quadratic(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(noise(3, grad=False))
            self.shift = nn.Parameter(noise(3, grad=False))

        @go.custom_backward(rule)
        def forward(self, x):
            return x**2 * self.weight + self.shift

    module = Quadratic()

    def function(x, weight, shift):
        return functional_call(module, {"weight": weight, "shift": shift}, (x,))

    assert check(function, (noise(3), noise(3), noise(3)))


def test_gradcheck_finds_a_rule_that_is_no_derivative():
    wrong = decorate(lambda grad_output, vjp: 1.01 * vjp(grad_output), torch.sin)
    with pytest.raises(RuntimeError, match="Jacobian mismatch"):
        torch.autograd.gradcheck(wrong, (noise(3),))


# --- what vjp may be given ---

WRONG = {
    "shape": lambda g: g[:2],
    "scalar": lambda g: g.sum(),
    "extra dimension": lambda g: g[None],
    "broadcast": lambda g: g[:1],
    "number": lambda g: 1.0,
    "none": lambda g: None,
    "tuple": lambda g: (g,),
    "nothing like a gradient": lambda g: "text",
    "integers": lambda g: g.long(),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("by_name", [False, True], ids=["vjp", "by_name"])
def test_wrong_gradient_handed_to_vjp_is_refused(wrong, by_name):
    def rule(grad_output, vjp):
        (vjp.by_name if by_name else vjp)(wrong(grad_output))
        return grad_output

    with pytest.raises(go.GradOverrideError):
        decorate(rule, torch.sin)(noise(3)).sum().backward()


def test_refusal_of_a_wrong_shape_names_both_shapes_and_the_rule():
    def too_short(grad_output, vjp):
        return vjp(grad_output[:2])

    with pytest.raises(go.GradOverrideError, match=r"(?s)too_short") as caught:
        decorate(too_short, torch.sin)(noise(3)).sum().backward()
    assert "(2,)" in str(caught.value)
    assert "(3,)" in str(caught.value)


@pytest.mark.parametrize("forward", [torch.sin, nn.Sequential(nn.Tanh())], ids=["short", "general"])
@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        (lambda g: g.long(), "takes a floating gradient for the result, .*; it got torch.int64. Convert it with"),
        (lambda g: g * 1j, "takes a real gradient for the result, .*; it got torch.complex128. Take its .real part"),
    ],
    ids=["integers", "complex"],
)
def test_wrong_kind_of_gradient_handed_to_vjp_is_refused_as_vjps(wrong, text, forward):
    def hands_over(grad_output, vjp):
        return vjp(wrong(grad_output))

    result = decorate(hands_over, forward)(noise(3)).sum()
    with pytest.raises(go.RuleResultError, match=rf"^vjp in the rule 'hands_over' \(.*\) of '.*' \(.*\) {text}"):
        result.backward()


def test_refusal_of_a_part_without_a_gradient_shows_it_and_says_zeros():
    @go.custom_backward(lambda grad_output, vjp: vjp({"a": grad_output["a"], "b": None}))
    def both(x):
        return {"a": x.sin(), "b": x.cos()}

    text = r"structure of the forward's result, \{a: \*, b: \*\} .*; it got \{a: \*, b: None\}\. .* \(zeros for"
    with pytest.raises(go.RuleResultError, match=text):
        both(noise(3))["a"].sum().backward()


@pytest.mark.parametrize(
    "wrong",
    [
        lambda g: g["a"],
        lambda g: {"a": g["a"]},
        lambda g: {**g, "c": g["a"]},
        lambda g: {"a": g["a"], "b": g["b"][:1]},
        lambda g: {"p": g["a"], "q": g["b"]},
        lambda g: (g["a"], g["b"]),
    ],
    ids=["one tensor", "missing key", "extra key", "shape", "other keys", "tuple"],
)
def test_wrong_structure_handed_to_vjp_is_refused(wrong):
    @go.custom_backward(lambda grad_output, vjp: vjp(wrong(grad_output)))
    def both(x):
        return {"a": x.sin(), "b": x.cos()}

    x = noise(3)
    with pytest.raises(go.GradOverrideError):
        both(x)["a"].sum().backward()


def test_dict_handed_to_vjp_is_read_by_key():
    @go.custom_backward(lambda grad_output, vjp: vjp({"b": grad_output["b"], "a": grad_output["a"]}))
    def both(x):
        return {"a": x.sin(), "b": x.cos()}

    x = noise(3)
    both(x)["a"].sum().backward()
    closely(x.grad, x.detach().cos())


def test_gradient_of_another_floating_dtype_is_cast():
    x = noise(3)
    decorate(lambda grad_output, vjp: vjp(grad_output.float()), lambda x: 2 * x)(x).sum().backward()
    exactly(x.grad, torch.full((3,), 2.0, dtype=torch.float64))


def test_expanded_and_strided_gradients_are_fine():
    x = noise(3, 4)
    pulled = decorate(lambda g, vjp: vjp(g[:1, :1].expand(3, 4)) + vjp(g.t().contiguous().t()), torch.sin)
    pulled(x).sum().backward()
    closely(x.grad, 2 * x.detach().cos())


def test_forward_without_a_gradient_of_its_own_gives_zeros():
    x = noise(3)
    decorate(lambda grad_output, vjp: vjp(grad_output) + 7, torch.detach)(x).sum().backward()
    exactly(x.grad, torch.full((3,), 7.0, dtype=torch.float64))


def test_gradient_of_another_structure_is_refused_with_the_one_that_is_wanted():
    pair = namedtuple("pair", "one other")
    forward = go.custom_backward(lambda grad_output, vjp: vjp(tuple(grad_output)))(lambda x: pair(x * 2, x * 3))
    result = forward(float64(1.0, 2.0))
    with pytest.raises(go.RuleResultError, match=r"result, pair\(\*, \*\) with a .* it got \(\*, \*\)\. "):
        sum(result).sum().backward()


# Nested tensors


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("target", [nn.Linear, nn.GELU, F.linear, nn.Sequential])
def test_nested_tensors_of_jagged_layout_have_the_gradients_of_the_plain_model(target):
    parts = [noise(2, 3), noise(4, 3)]
    model = nn.Sequential(nn.Linear(3, 3), nn.GELU(), nn.Linear(3, 2)).double()
    wanted = [*parts, *model.parameters()]

    def gradients():
        nested = torch.nested.as_nested_tensor(parts, layout=torch.jagged)
        result = model(nested)
        return torch.autograd.grad(sum(part.square().sum() for part in result.unbind()), wanted)

    plain = gradients()
    with go.override(model, {model if target is nn.Sequential else target: pass_on}):
        closely(gradients(), plain)
