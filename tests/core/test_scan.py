"""What the code of a rule tells: wrong here is a check left out where it is needed."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from oracles import exactly, float64
from torch import nn
from torch.nn import ReLU

import gradoverride as go
from gradoverride._core.python import purity, scan

factor = torch.ones(3)


def helper(grad):
    return grad


RULES = {
    "operators": (lambda g, x: g * x - g / 2, True, True),
    "elementwise": (lambda g, x: torch.where(x > 0, g.clamp(min=0), 0), True, True),
    "a product of matrices": (lambda g, x, w: {"x": g @ w, "w": g.T @ x}, False, True),
    "sums": (lambda g, x: (g.sum(0), torch.mean(g, -1, keepdim=True).expand_as(x)), False, True),
    "shapes": (lambda g: g.transpose(0, 1).reshape(-1).view(2, 3).mT, False, True),
    "another device": (lambda g: g.to("meta"), False, False),
    "another dtype": (lambda g: g.double(), False, False),
    "a write": (lambda g, x: g.mul_(x), False, False),
    "a write by an option": (lambda g, x: torch.matmul(g, x, out=g), False, False),
    "an item": (lambda g: g[0], False, False),
    "a tensor from elsewhere": (lambda g: g * factor, False, False),
    "a function from elsewhere": (lambda g: helper(g), False, False),
    "an argument that is called": (lambda g, vjp: vjp(g), False, False),
    "a new tensor": (lambda g: torch.zeros(3) + g, False, False),
    "an attribute of an argument": (lambda g, x: g @ x.weight, False, False),
    "a builtin": (torch.neg, True, True),
    "a builtin that gives a view": (torch.transpose, False, True),
    "a builtin that writes": (torch.relu_, False, False),
    "a builtin of Python": (abs, False, False),
}


@pytest.mark.parametrize("name", RULES)
def test_which_rules_are_expressions_of_their_arguments(name):
    rule, arithmetic, algebra = RULES[name]
    assert (purity.is_arithmetic(rule), purity.is_algebra(rule)) == (arithmetic, algebra)


ALIKE = {
    "numbers": lambda g: 2 * g / 3 - 1.5,
    "itself": lambda g: g * g + g,
    "a method": lambda g: g.clamp(-1, 1),
    "options": lambda g: -g.clamp(min=-1, max=1),
    "a function of torch": lambda g: torch.tanh(g) * 2,
    "a builtin": torch.sin,
}
UNLIKE = {
    "another shape": lambda g: g.sum(0),
    "another shape by an operator": lambda g, x: g * x,
    "another dtype": lambda g: g.double(),
    "a comparison": lambda g: g > 0,
    "a comparison by a method": lambda g: g.gt(0),
    "a complex number": lambda g: g * 2j,
    "a modulus": lambda g: g.abs(),
    "a truth": lambda g: g * True,
    "numbers in place of tensors": lambda g: torch.mul(2, 3),
    "another device": lambda g: torch.zeros_like(g, device="meta"),
    "two results": lambda g: (g, g),
    "a tensor from elsewhere": lambda g: g * factor,
    "an option from elsewhere": lambda g: g.clamp(factor),
    "a builtin of two tensors": torch.mul,
}


@pytest.mark.parametrize("name", ALIKE)
def test_which_functions_give_what_is_like_their_argument(name):
    function = ALIKE[name]
    assert purity.gives_alike(function)
    complex_too = [] if name in ("a method", "options") else [torch.complex64]  # which clamp refuses
    for dtype in (torch.float32, torch.bfloat16, torch.float64, *complex_too):
        given = torch.ones(2, 3, dtype=dtype)
        found = function(given)
        assert (found.shape, found.dtype, found.device) == (given.shape, given.dtype, given.device)


@pytest.mark.parametrize("name", UNLIKE)
def test_which_functions_may_give_something_else(name):
    assert not purity.gives_alike(UNLIKE[name])


@pytest.mark.parametrize("forward", [lambda x: x * 2, lambda x: x.tanh()], ids=["operator", "method"])
def test_gradients_of_a_forward_that_gives_what_is_like_its_argument_are_checked(forward):
    x = torch.ones(3, dtype=torch.float64, requires_grad=True)
    for rule, came in (
        (lambda grad_output: grad_output.sum(0), r"shape \(3,\) for 'x'.* returned a tensor of shape \(\)"),
        (lambda grad_output: grad_output * 2j, r"a real gradient for 'x'.* returned torch.complex128"),
        (lambda grad_output: 2 * 3, r"a tensor of shape \(3,\) as the gradient of 'x'; it returned 6"),
    ):
        with pytest.raises(go.RuleResultError, match=came):
            go.custom_backward(rule)(forward)(x).sum().backward()


def test_a_forward_that_gives_another_dtype_has_its_gradients_checked_against_its_argument():
    @go.custom_backward(lambda grad_output: grad_output * 2)
    def turn(x):
        return x * 2j

    with pytest.raises(go.RuleResultError, match=r"a real gradient for 'x'.* returned torch.complex128"):
        turn(torch.ones(3, dtype=torch.float64, requires_grad=True)).abs().sum().backward()


def test_what_runs_when_an_object_is_called_is_not_that_of_its_metaclass():
    class Meta(type):
        def __call__(cls):
            return super().__call__()

    class Plain(metaclass=Meta):
        pass

    assert scan.python_function(Plain()) is None


def test_algebra_is_checked_all_the_same():
    @go.custom_backward(lambda grad_output, x, w: {"x": grad_output @ w, "w": grad_output.T @ x})
    def product(x, w):
        return x @ w.T

    x, w = torch.randn(4, 3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    leaves = x.requires_grad_(), w.requires_grad_()
    found = torch.autograd.grad(product(*leaves).square().sum(), leaves)
    torch.testing.assert_close(found, torch.autograd.grad((x @ w.T).square().sum(), leaves))

    @go.custom_backward(lambda grad_output, x, w: {"x": grad_output @ w, "w": x.T @ grad_output})
    def transposed(x, w):
        return x @ w.T

    with pytest.raises(go.RuleResultError, match=r"shape \(2, 3\) for 'w'.* returned a tensor of shape \(3, 2\)"):
        transposed(*leaves).sum().backward()


# --- what may write: each of these rules makes (-1, 0, 2) times 7 of it, or what ReLU does, in a way of its own ---

IN_PLACE = True
WRITERS = [dist.all_gather]


class Halves:
    factor = 0.5

    def add(self, tensor):
        return tensor.mul_(7)


settings = Halves()


def gather(tensor):
    dist.all_gather([tensor], tensor * 7)


def by_collective(g):  # the compiler takes what an imported module has for no method; and no version is counted
    dist.all_gather([g], g * 7)
    return g


def by_collective_of_torch(g):
    torch.distributed.all_gather([g], g * 7)
    return g


def by_collective_in_a_helper(g):
    gather(g)
    return g


def by_collective_in_a_list(g):
    WRITERS[0]([g], g * 7)
    return g


def by_module_of_another_name(g):
    name = torch.distributed
    name.all_gather([g], g * 7)
    return g


def by_import_within(g):
    from torch.distributed import all_gather as gather

    gather([g], g * 7)
    return g


def by_default(g, write=torch.Tensor.mul_):
    return write(g, 7)


def by_list_of_tensors(g):
    torch._foreach_mul_([g], 7.0)
    return g


def by_real_part(g):
    g.real = g * 7
    return g


def by_method_of_an_operator(g):
    g.__imul__(7)
    return g


def by_options(g):
    options = {"o" + "ut": g}
    return torch.mul(g, 7, **options)


# The compiler of Python 3.11 takes a method of what was imported for an attribute that is called.
imported = {}
exec("import math as settings\nby_imported_object = lambda g: settings.add(g)", imported)
imported["settings"] = settings

WRITING = {
    "collective": by_collective,
    "collective of torch": by_collective_of_torch,
    "collective in a helper": by_collective_in_a_helper,
    "collective in a list": by_collective_in_a_list,
    "module of another name": by_module_of_another_name,
    "import within": by_import_within,
    "foreach": by_list_of_tensors,
    "real part": by_real_part,
    "method of an operator": by_method_of_an_operator,
    "method found by name": lambda g: g.__getattribute__("mul" + "_")(7),
    "method of a global": lambda g: settings.add(g),
    "method of what was imported": imported["by_imported_object"],
    "options": by_options,
    "module": lambda g: ReLU(True)(g),
    "module of torch.nn": lambda g: nn.ReLU(True)(g),
    "flag": lambda g: F.relu(g, IN_PLACE),
    "flag beside a call": lambda g: F.relu(F.leaky_relu(g), IN_PLACE),
    "flag in a list": lambda g: F.relu(*[g, IN_PLACE]),
    "flag at a later place": lambda g: F.threshold(g, 0.0, 0.0, IN_PLACE),
    "operator of torch": lambda g: torch.ops.aten.relu_(g),
    "default": by_default,
    "rows of a largest norm": lambda g: F.embedding(torch.tensor(0), g.unsqueeze(0), None, 1.0),
    "running statistics": lambda g: F.batch_norm(torch.ones(2, 3).double(), g, g.abs(), training=True)[0] + 7 * g,
}


@pytest.fixture(scope="module")
def group():
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


def test_rule_that_has_the_gradient_require_grad_works_on_a_copy():
    def rule(g):
        g.requires_grad = True
        return g.detach() * 7

    x, given = float64(1.0), float64(2.0, grad=False)
    go.custom_backward(rule)(lambda x: x * 2)(x).backward(given)
    assert (x.grad.item(), given.requires_grad) == (14.0, False)


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("name", WRITING)
@pytest.mark.parametrize("form", ["forward", "edit"])
def test_rule_that_writes_in_any_such_way_works_on_a_copy(form, name):
    x, given, rule = float64(1.0, 2.0, 3.0), float64(-1.0, 0.0, 2.0, grad=False), WRITING[name]
    result = go.custom_backward(rule)(lambda x: x * 2)(x) if form == "forward" else go.edit_gradient(x, rule)
    result.backward(given)
    exactly(given, float64(-1.0, 0.0, 2.0, grad=False))
    exactly(x.grad, rule(given.clone()))


HARMLESS = {
    "operators": lambda g, x: g * x,
    "functions of torch": lambda g, x: torch.where(x > 0, torch.linalg.norm(g), torch.Tensor.mul(g, 2)),
    "functions that may work in place": lambda g, x: F.relu(F.linear(g, x)) + F.dropout(g, 0.5, training=True),
    "functions by their whole name": lambda g: torch.nn.functional.leaky_relu(g, 0.1).sum(),
    "a helper": lambda g: helper(g),
    "vjp": lambda g, vjp: [vjp(part) for part in g.unbind()],
    "vjp by name": lambda g, vjp: {**vjp.by_name(g)},
    "values of globals": lambda g: g * factor.abs() * settings.factor,
    "sizes in a list": lambda g, x: g.reshape(*[1] * x.dim()),
    "an empty tuple": lambda g, x: g.expand(() if x is None else x.shape),
    "values of a module": lambda self, g: g * self.weight.abs() * self.scale,
}


@pytest.mark.parametrize("name", HARMLESS)
def test_rule_that_shows_that_it_writes_nothing_is_given_the_gradient_itself(name):
    assert purity.writes_nothing(HARMLESS[name])


ONCE = {
    "alone": (lambda g, vjp: vjp(g), True),
    "by name": (lambda g, vjp: vjp.by_name(g)["x"], True),
    "after another name": (lambda g, x, vjp: x * vjp(g), True),
    "within another call": (lambda g, vjp, identity=abs: identity(vjp(g)), True),
    "twice": (lambda g, vjp: vjp(g) + vjp(g), False),
    "in a loop": (lambda g, vjp: [vjp(part) for part in g], False),
    "given away": (lambda g, vjp, to=helper: to(vjp), False),
    "given away beside a call of it": (lambda g, vjp: max(vjp, vjp(g), key=str), False),
    "given away before a call": (lambda g, vjp: sum(map(vjp, list(g))), False),
    "given away before a call of a parameter": (lambda g, vjp, other=abs: (vjp, other(g)), False),
    "under another name": (lambda g, vjp: (other := vjp, other(g), other(g)), False),
}


@pytest.mark.parametrize("name", ONCE)
def test_which_rules_call_vjp_once(name):
    rule, once = ONCE[name]
    assert scan.called_once(rule, "vjp") == once
