"""Safe functions against torch's own, at every kind of input: where its gradient is finite, and where it is not."""

import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from oracles import FLOAT64, closely, exactly, float64, noise

import gradoverride as go
from gradoverride import safe

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*should not be instantiated:DeprecationWarning",  # Dynamo's own doing, for any Function
)

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
ONE = {  # and a function of torch
    "sqrt": (safe.sqrt, torch.sqrt),
    "log": (safe.log, torch.log),
    "asin": (safe.asin, torch.asin),
    "acos": (safe.acos, torch.acos),
}
TWO = {"div": (safe.div, torch.div), "xlogy": (safe.xlogy, torch.xlogy)}
ROWS = {
    "norm": (lambda x: safe.norm(x, dim=1), lambda x: torch.linalg.vector_norm(x, dim=1)),
    "norm of one": (lambda x: safe.norm(x.reshape(-1, 1), dim=1), lambda x: x.reshape(-1, 1).norm(dim=1)),
    "max": (lambda x: safe.max(x, 1), lambda x: x.amax(1)),
    "min": (lambda x: safe.min(x, 1), lambda x: x.amin(1)),
}
EVERY = {  # on inputs of three rows
    "sqrt": safe.sqrt,
    "log": safe.log,
    "asin": safe.asin,
    "acos": safe.acos,
    "log1pexp": safe.log1pexp,
    "div": lambda x: safe.div(1.5, x),
    "div by itself": lambda x: safe.div(x, x.flip(-1)),
    "div by a column": lambda x: safe.div(x, x[..., :1]),
    "xlogy": lambda x: safe.xlogy(x, x),
    "xlogy of a number": lambda x: safe.xlogy(0.5, x),
    "norm": lambda x: safe.norm(x, dim=-1),
    "norm of all": safe.norm,
    "normalize": lambda x: safe.normalize(x, dim=-1),
    "max": lambda x: safe.max(x, dim=-1),
    "first max": lambda x: safe.max(x, ties="first"),
    "every max": lambda x: safe.max(x, -1, True, ties="all"),
    "min": lambda x: safe.min(x, dim=-1, ties="first"),
    "where": lambda x: safe.where(x > 0.2, torch.log, lambda v: v * 2, x),
}
SINGULAR = [[0.0, 1.0, -1.0], [0.0, -0.0, 0.0], [math.inf, -math.inf, math.nan]]


def edges(dtype):
    """Zeros, subnormals, both sides of where a reciprocal overflows, ends of domains, large ones, inf, nan."""
    f = torch.finfo(dtype)
    positive = [0.0, f.tiny * f.eps, f.tiny / 4, f.tiny * (0.25 + f.eps), f.tiny, 1e-3, 0.3, 1 - f.eps, 1.0]
    positive += [1 + f.eps, 2.0, f.max**0.5, f.max, math.inf]
    return torch.tensor([*positive, *[-value for value in positive], math.nan], dtype=torch.float64).to(dtype)


def pairs(values):
    return [each.flatten() for each in torch.meshgrid(values, values, indexing="ij")]


def gradients(function, *values):
    """The value, the gradient of each argument, and those of the sum of each gradient."""
    leaves = [value.clone().requires_grad_() for value in values]
    result = function(*leaves)
    first = torch.autograd.grad(result.sum(), leaves, create_graph=True)
    second = []
    for grad in first:
        if grad.requires_grad:
            found = torch.autograd.grad(grad.sum(), leaves, retain_graph=True, materialize_grads=True)
            second.extend(found)
    return result.detach(), [grad.detach() for grad in first], second


def where_finite(gradient):
    return torch.where(torch.isfinite(gradient), gradient, 0)


def nearly(actual, expected):
    """To a few digits in the last place: of another order of operations."""
    torch.testing.assert_close(actual, expected, rtol=8 * torch.finfo(actual.dtype).eps, atol=0)


# --- against torch ---


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
class TestAtTheEdges:
    @pytest.mark.parametrize("name", ONE)
    def test_of_one_number(self, name, dtype):
        ours, plain = [gradients(function, edges(dtype)) for function in ONE[name]]
        exactly(ours[0], plain[0])
        exactly(ours[1][0], where_finite(plain[1][0]))
        known = torch.isfinite(plain[2][0]) | ~torch.isfinite(plain[1][0])  # elsewhere the second overflows
        found, wanted = ours[2][0][known], where_finite(plain[2][0])[known]
        torch.testing.assert_close(found, wanted, rtol=64 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).tiny)

    @pytest.mark.parametrize("name", TWO)
    def test_of_two_numbers(self, name, dtype):
        ours, plain = [gradients(function, *pairs(edges(dtype))) for function in TWO[name]]
        exactly(ours[0], plain[0])
        for found, wanted in zip(ours[1], plain[1], strict=True):
            nearly(found, where_finite(wanted))

    @pytest.mark.parametrize("name", ROWS)
    def test_of_rows(self, name, dtype):
        rows = torch.stack(pairs(edges(dtype)), 1)
        ours, plain = [gradients(function, rows) for function in ROWS[name]]
        exactly(ours[0], plain[0])
        nearly(ours[1][0], where_finite(plain[1][0]))

    def test_normalize(self, dtype):
        rows = torch.stack(pairs(edges(dtype)), 1)
        (value, (first,), _), plain = [gradients(f, rows) for f in (safe.normalize, F.normalize)]
        exactly(value, plain[0])
        length = torch.linalg.vector_norm(rows, dim=1)
        zero = (length == 0) | ~torch.isfinite(length)
        exactly(first[zero], torch.zeros_like(first[zero]))
        if dtype is torch.float16:
            return  # the sum of two gradients is more than it holds, and torch's own is nan
        scale = plain[1][0][~zero].abs() + 1 / length[~zero, None].clamp(min=1e-12)
        assert ((first - plain[1][0])[~zero].abs() <= 16 * torch.finfo(dtype).eps * scale).all()
        assert torch.isfinite(first).all()

    def test_log1pexp(self, dtype):
        x = edges(dtype)
        value, (first,), (second,) = gradients(safe.log1pexp, x)
        smooth = torch.special.log1p(torch.exp(-x.double().abs())) + x.double().clamp(min=0)
        f = torch.finfo(dtype)
        smallest = f.tiny * f.eps  # e^-256 is 0 in float16
        torch.testing.assert_close(value.double(), smooth, rtol=f.eps, atol=smallest, equal_nan=True)
        nearly(first, where_finite(torch.sigmoid(x)))
        assert torch.isfinite(second).all()


def test_log1pexp_is_right_where_softplus_is_not():
    x = float64(20.5, 30.0, 800.0)
    y = safe.log1pexp(x)
    exact = [20.500000001250152, 30.000000000000094, 800.0]  # bc, 30 digits
    exactly(y.detach(), float64(*exact, grad=False))
    assert F.softplus(x).tolist() != exact


SMOOTH = {
    "sqrt": (safe.sqrt, (0.5, 3.0)),
    "log": (safe.log, (0.5, 3.0)),
    "asin": (safe.asin, (-0.9, 0.9)),
    "acos": (safe.acos, (-0.9, 0.9)),
    "log1pexp": (safe.log1pexp, (-3.0, 3.0)),
    "div": (lambda x: safe.div(x, x[:1].square() + x), (0.5, 2.0)),
    "div of a number": (lambda x: safe.div(2.0, x), (-2.0, -0.5)),
    "xlogy": (lambda x: safe.xlogy(x[:, :1], x.square()), (0.5, 2.0)),
    "norm": (lambda x: safe.norm(x, (0, -1), True), (-1.0, 1.0)),
    "norm of all": (safe.norm, (-1.0, 1.0)),
    "normalize": (lambda x: safe.normalize(x), (-1.0, 1.0)),
    "normalize of a tuple": (lambda x: safe.normalize(x, dim=(0, 1)), (-1.0, 1.0)),
    "within eps": (lambda x: safe.normalize(x, eps=100.0), (-1.0, 1.0)),
    "where": (lambda x: safe.where(x > 0, torch.exp, lambda v: v**3, x), (-1.0, 1.0)),
}


@pytest.mark.parametrize("name", SMOOTH)
def test_first_and_second_derivatives_are_those_of_differences(name):
    function, (low, high) = SMOOTH[name]
    x = (torch.rand(3, 4, dtype=torch.float64) * (high - low) + low).requires_grad_()
    assert torch.autograd.gradcheck(function, x)
    assert torch.autograd.gradgradcheck(function, x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [*ONE, "log1pexp", *TWO, *ROWS, "normalize"])
def test_at_singularities_both_derivatives_are_finite(name, dtype):
    x, y = pairs(torch.tensor([0.0, -0.0, 0.3, 1.0, -1.0, math.inf, -math.inf, math.nan], dtype=dtype))
    if name in TWO:
        _, first, second = gradients(TWO[name][0], x, y)
    else:
        function = ROWS[name][0] if name in ROWS else getattr(safe, name)
        _, first, second = gradients(function, torch.stack([x, y], 1))
    assert len(second) >= (name not in ("max", "min"))
    assert torch.isfinite(torch.stack([*first, *second])).all()


@pytest.mark.parametrize("name", EVERY)
def test_third_derivatives_are_finite_at_singularities(name):
    x = torch.tensor(SINGULAR, dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(EVERY[name](x).sum(), x, create_graph=True)
    if not first.requires_grad:
        assert "max" in name or "min" in name
        return
    (second,) = torch.autograd.grad(first.sum(), x, create_graph=True, materialize_grads=True)
    (third,) = torch.autograd.grad(second.sum(), x, materialize_grads=True) if second.requires_grad else (second,)
    assert torch.isfinite(third).all()


# --- what comes in ---


@pytest.mark.parametrize("came", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("name", ["sqrt", "log", "asin", "acos"])
def test_at_a_singularity_the_gradient_is_zero_whatever_comes_in(name, came):
    x = float64(1.0 if name.startswith("a") else 0.0)
    exactly(torch.autograd.grad(ONE[name][0](x), x, float64(came, grad=False))[0].abs(), float64(0.0, grad=False))


@pytest.mark.parametrize("name", [*ONE, "log1pexp"])
def test_elsewhere_a_nan_that_comes_in_passes_on(name):
    x = float64(0.5, 0.5)
    grad = torch.autograd.grad(getattr(safe, name)(x), x, float64(math.nan, math.inf, grad=False))[0]
    assert torch.isnan(grad[0])
    assert torch.isinf(grad[1])


def test_a_reciprocal_of_a_root_has_no_nan():
    x = float64(0.0, 4.0)
    (1 / safe.sqrt(x)).sum().backward()
    closely(x.grad, float64(0.0, -1 / 16, grad=False))


# --- options, kinds of input ---


@pytest.mark.parametrize("name", [*ONE, *TWO])
def test_integers_are_taken_as_torch_takes_them(name):
    ours, plain = {**ONE, **TWO}[name]
    values = [torch.tensor([0, 1, 2])] * (2 if name in TWO else 1)
    exactly(ours(*values), plain(*values))


def test_other_functions_of_integers():
    x = torch.tensor([3, 1, 3])
    exactly(safe.max(x), torch.tensor(3))
    exactly(safe.log1pexp(x), torch.log1p(torch.exp(x)))
    for function in (safe.norm, lambda x: safe.normalize(x, dim=0)):
        with pytest.raises(RuntimeError, match=r"floating|Float"):
            function(x)


def test_integers_and_numbers_beside_a_tensor_that_has_a_gradient():
    x, n = float64(0.0, 2.0), torch.tensor([[1], [3]])
    for ours, plain in TWO.values():
        for call in (lambda f: f(n, x), lambda f: f(x, n)):  # called at once
            closely(torch.autograd.grad(call(ours).sum(), x), (where_finite(_grad(call, plain, x)),))
    exactly(torch.autograd.grad(safe.div(x, 4).sum(), x)[0], float64(0.25, 0.25, grad=False))
    exactly(torch.autograd.grad(safe.div(torch.tensor(3.0), x).sum(), x)[0], float64(0.0, -0.75, grad=False))


def _grad(call, plain, x):
    return torch.autograd.grad(call(plain).sum(), x)[0]


def test_arguments_that_broadcast_have_gradients_of_their_shape():
    x, y = noise(3, 1), noise(1, 4)
    for name in TWO:
        ours, plain = TWO[name]
        args = (x, y.detach().abs().requires_grad_())
        closely(torch.autograd.grad(ours(*args).sum(), args), torch.autograd.grad(plain(*args).sum(), args))


def test_dtypes_that_differ_have_gradients_of_their_own():
    x, y = noise(3), noise(3, dtype=torch.float32)
    grads = torch.autograd.grad(safe.div(x, y).sum(), (x, y))
    assert [grad.dtype for grad in grads] == [torch.float64, torch.float32]
    closely(grads, torch.autograd.grad((x / y).sum(), (x, y)))


@pytest.mark.parametrize("dim", [None, 0, -1, (0, 2), (-1, 0), (), [1]], ids=str)
@pytest.mark.parametrize("keepdim", [False, True])
def test_norm_takes_the_dimensions_that_torch_takes(dim, keepdim):
    x = noise(2, 3, 4)
    ours, plain = safe.norm(x, dim, keepdim), torch.linalg.vector_norm(x, dim=dim, keepdim=keepdim)
    exactly(ours.detach(), plain.detach())
    closely(torch.autograd.grad(ours.sum(), x), torch.autograd.grad(plain.sum(), x))


def test_of_a_single_number():
    x = float64(-2.0).squeeze().detach().requires_grad_()
    for function in (safe.norm, lambda x: safe.norm(x, 0), lambda x: safe.norm(x, -1, True), lambda x: -safe.max(x, 0)):
        exactly(torch.autograd.grad(function(x), x)[0], torch.tensor(-1.0, dtype=torch.float64))


@pytest.mark.parametrize("extremum", ["max", "min"])
@pytest.mark.parametrize(
    ("ties", "parts"), [("even", [0.5, 0.0, 0.5]), ("first", [1.0, 0.0, 0.0]), ("all", [1.0, 0.0, 1.0])]
)
def test_ties_are_divided_as_stated(extremum, ties, parts):
    row = [3.0, 1.0, 3.0] if extremum == "max" else [1.0, 3.0, 1.0]
    x = torch.tensor([row, [math.nan, 1.0, 3.0]], dtype=torch.float64, requires_grad=True)
    function, grad = getattr(safe, extremum), torch.tensor([2.0, 5.0], dtype=torch.float64)
    expected = torch.tensor([parts, [0.0] * 3], dtype=torch.float64) * 2
    exactly(torch.autograd.grad(function(x, 1, ties=ties), x, grad)[0], expected)
    exactly(torch.autograd.grad(function(x, 1, True, ties=ties), x, grad[:, None])[0], expected)
    exactly(torch.autograd.grad(function(x.T, 0, ties=ties), x, grad)[0], expected)
    whole = x.detach()[:1].requires_grad_()
    exactly(torch.autograd.grad(function(whole, ties=ties), whole, grad[0])[0], expected[:1])


def test_first_is_that_of_torch_with_dim():
    x = torch.randint(3, (5, 7)).double().requires_grad_()
    for dim in (0, 1, -1):
        ours, plain = safe.max(x, dim, ties="first"), x.max(dim).values
        exactly(torch.autograd.grad(ours.sum(), x), torch.autograd.grad(plain.sum(), x))


OPTIONS = {
    "eps": (lambda x: safe.normalize(x, eps=-1.0), "normalize: 'eps' must be a number that is not negative; got -1.0"),
    "eps, True": (lambda x: safe.normalize(x, eps=True), "normalize: 'eps' must be a number that is not negative"),
    "eps, nan": (lambda x: safe.normalize(x, eps=math.nan), "normalize: 'eps' must be a number that is not negative"),
    "ties": (lambda x: safe.max(x, ties="last"), "max: 'ties' must be 'even', 'first' or 'all'; got 'last'"),
    "ties of min": (lambda x: safe.min(x, ties=None), "min: 'ties' must be 'even', 'first' or 'all'; got None"),
    "dim": (lambda x: safe.max(x, (0, 1)), "max: 'dim' must be an integer, or None for all; got (0, 1)"),
    "dim, True": (lambda x: safe.min(x, True), "min: 'dim' must be an integer, or None for all; got True"),
    "condition": (lambda x: safe.where(x, 0, 1), "where: 'condition' must be a tensor of bool; got torch.float64"),
    "no tensor": (lambda x: safe.where(True, 0, x), "where: 'condition' must be a tensor of bool; got True"),
    "inputs of no function": (
        lambda x: safe.where(x > 0, x.log(), 0.0, x),
        "where: 'if_true' or 'if_false' must be a function of the inputs that are given; got a tuple of 2 (a tensor of "
        "shape (2, 3), 0.0, a float)",
    ),
}


@pytest.mark.parametrize("grad", [False, True], ids=["no gradient", "gradient"])
@pytest.mark.parametrize("name", OPTIONS)
def test_options_out_of_range_are_errors(name, grad):
    call, text = OPTIONS[name]
    with pytest.raises(go.RuleOptionError) as caught:
        call(noise(2, 3, grad=grad))
    assert text in str(caught.value)


COMPLEX = [*ONE, "log1pexp", "norm", "normalize", "max", "min", "div", "xlogy"]


@pytest.mark.parametrize("name", COMPLEX)
def test_complex_tensors_are_refused(name):
    x = torch.ones(2, 2, dtype=torch.complex64)
    text = f"safe.{name}: the input must be real; got torch.complex64. Use the function of torch"
    with pytest.raises(go.UnsupportedError) as caught:
        getattr(safe, name)(*([1.0, x] if name in TWO else [x]))
    assert text in str(caught.value)


# --- where ---


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_where_evaluates_each_function_on_its_own_elements():
    seen = []
    x = float64(-1.0, 0.0, 4.0, 9.0)

    def root(v):
        seen.append(v.detach())
        return v.sqrt()

    with torch.autograd.detect_anomaly(check_nan=True):
        y = safe.where(x > 0, root, lambda v: v * 2, x)
        y.sum().backward()
    exactly(y.detach(), float64(-2.0, 0.0, 2.0, 3.0, grad=False))
    closely(x.grad, float64(2.0, 2.0, 0.25, 1 / 6, grad=False))
    exactly(seen[0], float64(4.0, 4.0, 4.0, 9.0, grad=False))


def test_where_gives_other_tensors_of_a_function_no_nan():
    x, w = float64(0.0, 4.0), float64(3.0)
    plain = torch.where(x > 0, x.log() * w, 0)
    assert torch.isnan(torch.autograd.grad(plain.sum(), w)[0])
    y = safe.where(x > 0, lambda v: v.log() * w, 0.0, x)
    exactly(torch.autograd.grad(y.sum(), w)[0], float64(math.log(4.0), grad=False))


def test_where_takes_a_function_nowhere():
    x = float64(0.0, -1.0)
    y = safe.where(x > 0, torch.log, torch.exp, x)
    exactly(torch.autograd.grad(y.sum(), x)[0], x.detach().exp())
    empty = torch.zeros(0, requires_grad=True)
    assert safe.where(empty > 0, torch.log, 0.0, empty).shape == (0,)


def test_where_broadcasts_and_takes_tensors_and_what_is_none():
    x, y = noise(3, 1), noise(4)
    condition = torch.rand(2, 1, 1) > 0.5
    found = safe.where(condition, lambda a, b, power: (a * b) ** power, y, x, y, 2)
    expected = torch.where(condition, (x * y) ** 2, y)
    exactly(found.detach(), expected.detach())
    closely(torch.autograd.grad(found.sum(), (x, y)), torch.autograd.grad(expected.sum(), (x, y)))


def test_where_is_mapped_over_conditions_and_inputs():
    conditions, x = torch.rand(5, 3) > 0.5, noise(3, grad=False).abs()
    rows = torch.func.vmap(lambda condition: safe.where(condition, torch.log, torch.exp, x))(conditions)
    closely(rows, torch.where(conditions, x.log(), x.exp()))
    many = noise(5, 3, grad=False)
    mapped = torch.func.vmap(lambda x: safe.where(conditions[0], torch.sin, torch.exp, x))(many)
    closely(mapped, torch.where(conditions[0], many.sin(), many.exp()))


def test_where_refuses_what_is_not_elementwise():
    x = noise(2, 3)
    with pytest.raises(go.ForwardResultError) as caught:
        safe.where(x > 0, torch.sum, 0.0, x)
    assert str(caught.value) == (
        "where: 'if_true' must be elementwise, with a result of shape (2, 3), that of the condition and the inputs; "
        "its result has shape (). Reduce the result of 'where'"
    )


# --- the mechanism ---


@pytest.mark.parametrize("name", EVERY)
class TestOfTheMechanism:
    x = torch.tensor([*SINGULAR, [0.3, 0.7, 0.5]], dtype=torch.float64)

    def gradient(self, name):
        return gradients(EVERY[name], self.x)[1][0]

    def test_compiled_is_eager(self, name):
        dtype = torch.bfloat16 if name in ("sqrt", "div", "normalize") else torch.float64
        torch.compiler.reset()
        compiled = torch.compile(lambda x: EVERY[name](x), fullgraph=True, backend="aot_eager")
        x = self.x.to(dtype)
        value, (first,), _ = gradients(EVERY[name], x)
        leaf = x.clone().requires_grad_()
        found = compiled(leaf)
        exactly(found.detach(), value)
        exactly(torch.autograd.grad(found.sum(), leaf)[0], first)

    def test_gradient_of_torch_func(self, name):
        closely(torch.func.grad(lambda x: EVERY[name](x).sum())(self.x), self.gradient(name))

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_mapped_over_rows(self, name, dtype):
        x = self.x.to(dtype)
        rows = torch.func.vmap(torch.func.grad(lambda row: EVERY[name](row).sum()))(x)
        nearly(rows, torch.stack([gradients(EVERY[name], row)[1][0] for row in x]))

    def test_mapped_over_gradients(self, name):
        row = self.x[-1]
        jacobian = torch.func.jacrev(EVERY[name])(row)
        torch.testing.assert_close(jacobian, torch.autograd.functional.jacobian(EVERY[name], row), **FLOAT64)

    def test_forward_mode_and_hessian(self, name):
        row = self.x[-1]
        closely(torch.func.jacfwd(EVERY[name])(row), torch.func.jacrev(EVERY[name])(row))
        of_sum = torch.func.hessian(lambda row: EVERY[name](row).sum())(row)
        closely(of_sum, torch.autograd.functional.hessian(lambda row: EVERY[name](row).sum(), row))

    def test_hessian_is_finite_at_singularities(self, name):
        for row in self.x:
            assert torch.isfinite(torch.func.hessian(lambda row: EVERY[name](row).sum())(row)).all()


@pytest.mark.parametrize("name", ["sqrt", "log", "asin", "acos"])
def test_rules_serve_where_the_function_of_torch_is_called(name):
    rule, (ours, plain) = getattr(safe, f"{name}_backward"), ONE[name]
    x = edges(torch.float64).requires_grad_()
    with go.override({plain: rule}):
        result = plain(x)
    exactly(torch.autograd.grad(result.sum(), x), torch.autograd.grad(ours(x).sum(), x))


@pytest.mark.parametrize("name", safe.__all__)
def test_each_pickles(name):
    function = getattr(safe, name)
    assert pickle.loads(pickle.dumps(function)) is function


def test_the_gradient_that_came_is_not_written_to():
    for name in EVERY:
        x = torch.tensor([*SINGULAR], dtype=torch.float64, requires_grad=True)
        result = EVERY[name](x)
        came = torch.ones_like(result)
        torch.autograd.grad(result, x, came)
        exactly(came, torch.ones_like(came))
