"""Gradients of implicit results: against closed forms, torch's own solvers, and autograd through an unrolled loop."""

import copy
import pickle
import sys
from collections import Counter

import numpy as np
import pytest
import scipy.optimize
import torch
from oracles import closely, float64, noise
from torch import nn

import gradoverride as go
from gradoverride.estimators import fixed_point, implicit_root
from gradoverride.estimators.linear import DENSE_UP_TO

DYNAMO = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # its own
ITERATED = {"rtol": 1e-8, "atol": 1e-9}  # linear equations solved to 4e-11


def grad(result, *inputs, **options):
    found = torch.autograd.grad(result, inputs, **options)
    return found[0] if len(found) == 1 else found


def nearly(actual, expected):
    torch.testing.assert_close(actual, expected, **ITERATED)


def positive(*sizes):
    return noise(*sizes, grad=False).abs().add(0.5).requires_grad_()


# --- a square root by Newton's method


def newton(a, steps=30):
    y = torch.ones_like(a)
    for _ in range(steps):
        y = (y + a / y) / 2
    return y


def square_of(y, a):
    return y * y - a


ROOTS = {
    "dense": implicit_root(square_of),
    "of samples": implicit_root(square_of, batch_dims=1),
    "of numbers": implicit_root(square_of, batch_dims=2),
    "gmres": implicit_root(square_of, solver="gmres"),
    "bicgstab": implicit_root(square_of, solver="bicgstab"),
    "cg": implicit_root(square_of, solver="cg"),  # diagonal, and positive
}
every_root = pytest.mark.parametrize("rule", ROOTS.values(), ids=ROOTS)


@every_root
class TestSquareRoot:
    def test_gradient_is_that_of_the_closed_form(self, rule):
        a, g = positive(2, 3), noise(2, 3, grad=False)
        nearly(grad(go.custom_backward(rule)(newton)(a), a, grad_outputs=g), g / (2 * a.detach().sqrt()))

    def test_gradcheck_of_first_and_second_order(self, rule):
        fn, a = go.custom_backward(rule)(newton), positive(2, 2)
        assert torch.autograd.gradcheck(fn, a)
        assert torch.autograd.gradgradcheck(fn, a)

    def test_third_derivative_is_that_of_the_closed_form(self, rule):
        a = positive(1, 2)
        first = grad(go.custom_backward(rule)(newton)(a).sum(), a, create_graph=True)
        second = grad(first.sum(), a, create_graph=True)
        nearly(second.detach(), -0.25 * a.detach() ** -1.5)
        nearly(grad(second.sum(), a), 0.375 * a.detach() ** -2.5)


def test_an_argument_may_have_the_name_of_the_gradient():
    a = positive(3)
    root = go.custom_backward(implicit_root(lambda y, grad_output: y * y - grad_output))(
        lambda grad_output: newton(grad_output)
    )
    nearly(grad(root(a).sum(), a), 0.5 / a.detach().sqrt())


# --- linear systems and ridge regression, several arguments


def by_elimination(matrix, right):
    """Gauss without pivoting, in place: no way for autograd."""
    matrix, right = matrix.detach().clone(), right.detach().clone()
    n = len(right)
    for i in range(n):
        for j in range(i + 1, n):
            factor = matrix[j, i] / matrix[i, i]
            matrix[j] -= factor * matrix[i]
            right[j] -= factor * right[i]
    for i in reversed(range(n)):
        right[i] = (right[i] - matrix[i, i + 1 :] @ right[i + 1 :]) / matrix[i, i]
    return right


@pytest.mark.parametrize("solver", [None, "gmres", "bicgstab"])
def test_linear_system_is_that_of_torch(solver):
    matrix = (noise(4, 4, grad=False) + 4 * torch.eye(4, dtype=torch.float64)).requires_grad_()
    right = noise(4)
    rule = implicit_root(lambda x, matrix, right: matrix @ x - right, solver=solver)

    def loss(solve):
        return solve(matrix, right).exp().sum()

    solve = go.custom_backward(rule)(by_elimination)
    nearly(grad(loss(solve), matrix, right), grad(loss(torch.linalg.solve), matrix, right))
    assert torch.autograd.gradgradcheck(solve, (matrix, right))


def ridge(features, target, penalty, start, *, steps=500, name="ridge"):
    """By gradient descent, in NumPy."""
    assert name == "ridge"
    x, y, w = features.detach().numpy(), target.detach().numpy(), start.detach().numpy().copy()
    a = x.T @ x + penalty.item() * np.eye(x.shape[1])
    rate = 2 / (np.linalg.eigvalsh(a)[[0, -1]]).sum()
    for _ in range(steps):
        w -= rate * (a @ w - x.T @ y)
    return torch.from_numpy(w)


def ridge_residual(w, features, target, penalty):
    return features.T @ (features @ w - target) + penalty * w


@pytest.mark.parametrize("solver", [None, "cg"])
def test_ridge_regression_is_that_of_the_normal_equations(solver):
    features, target, start = noise(20, 3), noise(20), noise(3)
    penalty = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)

    def closed(features, target, penalty):
        matrix = features.T @ features + penalty * torch.eye(3, dtype=torch.float64)
        return torch.linalg.solve(matrix, features.T @ target)

    fit = go.custom_backward(implicit_root(ridge_residual, solver=solver))(ridge)
    w = fit(features, target, penalty, start, name="ridge")
    nearly(w.detach(), closed(features, target, penalty).detach())
    found = grad(w.exp().sum(), features, target, penalty, start, allow_unused=True)
    expected = grad(closed(features, target, penalty).exp().sum(), features, target, penalty)
    nearly(found[:3], expected)
    assert found[3] is None  # where it starts makes no difference


def test_arguments_that_want_no_gradient():
    features, target, penalty, start = noise(20, 3, grad=False), noise(20), float64(1.5, grad=False), noise(3)
    fit = go.custom_backward(implicit_root(ridge_residual))(ridge)
    found = grad(fit(features, target, penalty, start).sum(), target)
    matrix = features.T @ features + 1.5 * torch.eye(3, dtype=torch.float64)
    closely(found, features @ torch.linalg.solve(matrix, torch.ones(3, dtype=torch.float64)))


def test_a_first_guess_that_alone_wants_a_gradient_gets_none_and_nothing_is_solved():
    def residual(w, features, target):
        raise AssertionError("it is asked")

    features, target, start = noise(20, 3, grad=False), noise(20, grad=False), noise(3)
    found = go.custom_backward(implicit_root(residual))(ridge)(features, target, float64(1.5, grad=False), start)
    assert torch.autograd.grad(found.sum(), start, allow_unused=True) == (None,)


# --- structures


def pair_residual(found, coefficients, shift):
    """low and high are the roots of x^2 - p x + q."""
    p, q = coefficients["p"], coefficients["q"][0]
    low, high = found["roots"]
    return {"roots": (low + high - p + shift, low * high - q)}


def both_roots(coefficients, shift):
    p, q = coefficients["p"] - shift, coefficients["q"][0]
    spread = (p * p / 4 - q).sqrt()
    return {"roots": (p / 2 - spread, p / 2 + spread), "count": 2}


@pytest.mark.parametrize("options", [{}, {"batch_dims": 1}, {"solver": "gmres"}], ids=str)
def test_structures_of_arguments_and_results(options):
    p, q, shift = positive(3), positive(3), noise(3)
    p = (p + 6).detach().requires_grad_()

    def loss(fn):
        found = fn({"p": p, "q": [q, "no tensor"]}, shift)
        assert found["count"] == 2
        return found["roots"][0].exp().sum() + found["roots"][1].square().sum()

    fn = go.custom_backward(implicit_root(pair_residual, **options))(both_roots)
    nearly(grad(loss(fn), p, q, shift), grad(loss(both_roots), p, q, shift))


def test_complex_results():
    """The residual is not holomorphic: its derivative is one of pairs of real numbers."""

    def residual(z, a):
        return z + 0.3 * z.conj() * z - a

    def iterate(a):
        z = a
        for _ in range(200):
            z = a - 0.3 * z.conj() * z
        return z

    a = (0.4 * noise(3, dtype=torch.complex128)).detach().requires_grad_()

    def loss(fn):
        return (fn(a).abs().square() * torch.arange(1, 4)).sum() + fn(a).imag.exp().sum()

    closely(grad(loss(go.custom_backward(implicit_root(residual))(iterate)), a), grad(loss(iterate), a))


def test_empty_results():
    a = torch.zeros(0, 3, dtype=torch.float64, requires_grad=True)
    for rule in (implicit_root(square_of), implicit_root(square_of, solver="gmres")):
        assert grad(go.custom_backward(rule)(newton)(a).sum(), a).shape == (0, 3)


# --- fixed points, against autograd through the loop


def layer(z, x, weight):
    return torch.tanh(z @ weight + x)


def iterated(x, weight, steps=150):
    z = torch.zeros_like(x)
    for _ in range(steps):
        z = layer(z, x, weight)
    return z


POINTS = {
    "dense": fixed_point(layer),
    "of samples": fixed_point(layer, batch_dims=1),
    "neumann": fixed_point(layer, solver="neumann"),
    "neumann of samples": fixed_point(layer, solver="neumann", batch_dims=1),
    "gmres": fixed_point(layer, solver="gmres"),
    "as a root": implicit_root(lambda z, x, weight: layer(z, x, weight) - z, batch_dims=1),
}


@pytest.mark.parametrize("rule", POINTS.values(), ids=POINTS)
class TestFixedPoint:
    def test_gradient_is_that_through_the_loop(self, rule):
        x, weight = noise(5, 3), (0.2 * noise(3, 3)).detach().requires_grad_()
        fn = go.custom_backward(rule)(iterated)
        nearly(grad(fn(x, weight).exp().sum(), x, weight), grad(iterated(x, weight).exp().sum(), x, weight))

    def test_second_and_third_order_are_those_through_the_loop(self, rule):
        x, weight = noise(2, 3), (0.2 * noise(3, 3)).detach().requires_grad_()

        def third(fn):
            first = grad(fn(x, weight).exp().sum(), x, weight, create_graph=True)
            second = grad(first[0].sin().sum() + first[1].square().sum(), x, weight, create_graph=True)
            return (*second, *grad(second[0].square().sum() + second[1].exp().sum(), x, weight))

        found, expected = third(go.custom_backward(rule)(iterated)), third(iterated)
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)


class Equilibrium(nn.Module):
    """A deep equilibrium layer, whose cell is a module of its own."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.cell = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4)).double()
        with torch.no_grad():
            for parameter in self.cell.parameters():
                parameter.mul_(0.4)

    def plain(self, x):
        z = torch.zeros_like(x)
        for _ in range(100):
            z = self.cell(z) + x
        return z


def test_parameters_of_a_module_by_params():
    model, x = Equilibrium(), noise(3, 4)
    frozen = next(model.parameters())
    frozen.requires_grad_(False)

    def step(z, x, params, module):
        cell = {name.removeprefix("cell."): value for name, value in params.items()}
        return torch.func.functional_call(module.cell, cell, (z,)) + x

    class Solved(Equilibrium):
        @go.custom_backward(fixed_point(step, batch_dims=1))
        def forward(self, x):
            return self.plain(x)

    solved = Solved()
    solved.load_state_dict(model.state_dict())
    next(solved.parameters()).requires_grad_(False)
    (solved(x) ** 2).sum().backward()
    found, x.grad = x.grad, None
    (model.plain(x) ** 2).sum().backward()
    closely(found, x.grad)
    for own, other in zip(solved.parameters(), model.parameters(), strict=True):
        if own.requires_grad:
            closely(own.grad, other.grad)
        else:
            assert own.grad is None


class Weighted(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter((0.2 * noise(3, 3)).detach())

    @go.custom_backward(fixed_point(layer, batch_dims=1))
    def forward(self, x):
        return iterated(x, self.weight.detach())


def test_a_parameter_of_a_module_by_its_name():
    model, x = Weighted(), noise(5, 3)
    found = grad(model(x).exp().sum(), x, model.weight)
    closely(found, grad(iterated(x, model.weight).exp().sum(), x, model.weight))
    x.requires_grad_(False)
    closely(grad(model(x).exp().sum(), model.weight), found[1])


# --- solvers of other libraries


def test_a_solver_of_scipy_by_bridge():
    def residual(y, a, b):
        return y**3 + a * y - b.exp()

    @go.bridge(implicit_root(residual, batch_dims=1))
    def solve(a, b):
        assert type(a) is np.ndarray
        return scipy.optimize.root(lambda y: y**3 + a * y - np.exp(b), np.ones_like(a), tol=1e-14).x

    a, b = positive(4), noise(4)
    y = solve(a, b)
    found = grad(y.sin().sum(), a, b)
    slope = y.detach().cos() / (3 * y.detach() ** 2 + a.detach())
    nearly(found, (-slope * y.detach(), slope * b.detach().exp()))


# --- overrides


class Root(nn.Module):
    def forward(self, a, steps=30):
        return newton(a.detach(), steps)


def test_in_an_override_of_a_class():
    model, a = nn.Sequential(Root()), positive(2, 3)
    for residual in (square_of, lambda y, input: y * y - input):
        with go.override(model, {Root: implicit_root(residual)}):
            y = model(a)
        closely(grad(y.sum(), a), 0.5 * a.detach() ** -0.5)


# --- samples, sizes, cost


def test_samples_are_equations_of_their_own():
    a = positive(4, 2)

    def residual(y, a):
        return torch.stack([y[..., 0] * y[..., 1] - a[..., 0], y[..., 0] - y[..., 1] * a[..., 1]], -1)

    def solve(a):
        high = (a[:, 0] / a[:, 1]).sqrt()
        return torch.stack([high * a[:, 1], high], -1)

    def loss(fn):
        return (fn(a) * torch.arange(8.0).reshape(4, 2)).sum()

    expected = grad(loss(solve), a)
    for batch_dims in (0, 1):
        closely(grad(loss(go.custom_backward(implicit_root(residual, batch_dims=batch_dims))(solve)), a), expected)


@pytest.mark.parametrize("solver", ["dense", "gmres", "bicgstab", "cg"])
def test_a_sample_whose_gradient_is_small_beside_others_is_solved_as_well(solver):
    torch.manual_seed(0)
    half = torch.randn(3, 20, 20, dtype=torch.float64) * 0.3 + 2 * torch.eye(20)
    matrices = (half @ half.mT).float()
    b, g = torch.randn(3, 20, requires_grad=True), torch.ones(3, 20)
    g[1] *= 1e-6

    def residual(y, b):
        return (matrices @ y[..., None])[..., 0] - b

    rule = implicit_root(residual, solver=solver, batch_dims=1)
    (found,) = torch.autograd.grad(go.custom_backward(rule)(lambda b: torch.linalg.solve(matrices, b))(b), b, g)
    expected = torch.linalg.solve(matrices.double().mT, g.double())
    assert ((found - expected).norm(dim=1) / expected.norm(dim=1)).max() < 1e-3


@pytest.mark.parametrize(("make", "large"), [(implicit_root, "gmres"), (fixed_point, "neumann")])
def test_the_solver_is_chosen_by_the_number_of_unknowns(make, large):
    def damped(y, a):
        return 0.5 * torch.cos(y) + a if make is fixed_point else 0.5 * torch.cos(y) + a - y

    def solve(a):
        y = torch.zeros_like(a)
        for _ in range(100):
            y = 0.5 * torch.cos(y) + a
        return y

    for size, solver in ((DENSE_UP_TO, "dense"), (DENSE_UP_TO + 1, large)):
        rule, a = make(damped), noise(size)
        assert rule._solver_for([a]) == solver
        assert make(damped, batch_dims=1)._solver_for([a.reshape(-1, 1)]) == "dense"
        y = go.custom_backward(rule)(solve)(a)
        nearly(grad(y.sum(), a), 1 / (1 + 0.5 * y.detach().sin()))


@pytest.mark.parametrize("solver", ["dense", "gmres"])
def test_cost_is_as_documented(solver):
    calls = Counter()

    def residual(y, a):
        calls["residual"] += 1
        return y * y - a

    @go.custom_backward(implicit_root(residual, solver=solver))
    def solve(a):
        calls["forward"] += 1
        return a.sqrt()

    a = positive(5)
    solve(a).sum().backward()
    assert calls == {"forward": 1, "residual": 3}  # looked at; by the result; by the arguments


# --- dtypes


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.05), (torch.float16, 0.02)])
@pytest.mark.parametrize("solver", ["dense", "gmres"])
def test_narrow_dtypes(dtype, tolerance, solver):
    a = torch.tensor([0.5, 2.0, 7.0], dtype=dtype, requires_grad=True)  # whose roots no dtype has exactly
    found = grad(go.custom_backward(implicit_root(square_of, solver=solver))(newton)(a).sum(), a)
    assert found.dtype is dtype
    torch.testing.assert_close(found, 0.5 / a.detach().sqrt(), rtol=tolerance, atol=0)


def test_a_large_result_in_float32_is_a_root():
    a = torch.tensor([1e8, 3e7], requires_grad=True)
    found = grad(go.custom_backward(implicit_root(square_of, batch_dims=1))(newton)(a).sum(), a)
    torch.testing.assert_close(found, 0.5 / a.detach().sqrt(), rtol=1e-5, atol=0)


# --- transforms, compiled


def total(x, weight):
    return iterated(x, weight).exp().sum()


class TestTransforms:
    weight = 0.2 * torch.tensor([[1.0, -1, 0.5], [0.3, 0.2, -1], [0.1, 1, 1]], dtype=torch.float64)

    def solved(self, **options):
        fn = go.custom_backward(fixed_point(layer, **options))(iterated)
        return lambda x: fn(x, self.weight).exp().sum()

    def plain(self, x):
        return total(x, self.weight)

    @pytest.mark.parametrize("solver", ["dense", "neumann"])
    def test_grad_under_vmap_and_of_grad(self, solver):
        x, fn = noise(4, 2, 3, grad=False), self.solved(solver=solver, batch_dims=1)
        nearly(torch.func.vmap(torch.func.grad(fn))(x), torch.func.vmap(torch.func.grad(self.plain))(x))

        def twice(fn):
            return torch.func.grad(lambda x: torch.func.grad(fn)(x).sin().sum())(x[0])

        nearly(twice(fn), twice(self.plain))

    def test_forward_mode_and_hessian(self):
        x, tangent, fn = noise(2, 3, grad=False), noise(2, 3, grad=False), self.solved()
        closely(torch.func.jvp(fn, (x,), (tangent,)), torch.func.jvp(self.plain, (x,), (tangent,)))
        closely(torch.func.hessian(fn)(x), torch.func.hessian(self.plain)(x))

    def test_forward_mode_of_iterations_is_refused(self):
        x = noise(2, 3, grad=False)
        with pytest.raises(go.UnsupportedError, match=r"must be solved densely in forward mode .* solver is 'neumann'"):
            torch.func.jvp(self.solved(solver="neumann"), (x,), (x,))

    def test_scipy_under_vmap_is_refused(self):
        x = noise(4, 2, 3, grad=False)
        with pytest.raises(go.UnsupportedError, match=r"by torch alone under vmap .* 'gmres' is of SciPy. Use solver="):
            torch.func.vmap(torch.func.grad(self.solved(solver="gmres")))(x)

    @DYNAMO
    @pytest.mark.parametrize(("solver", "backend"), [("dense", "aot_eager"), ("gmres", "eager")])
    def test_compiled_it_is_as_uncompiled(self, solver, backend):
        torch.compiler.reset()
        x, fn = noise(2, 3), self.solved(solver=solver)
        expected = grad(fn(x * 2).log(), x)
        closely(grad(torch.compile(lambda x: fn(x * 2).log(), backend=backend)(x), x), expected)

    def test_compiled_as_one_graph_it_is_refused(self):
        torch.compiler.reset()
        with pytest.raises(Exception, match="an implicit gradient looks at values"):
            torch.compile(self.solved(), backend="eager", fullgraph=True)(noise(2, 3))


def test_retain_graph_accumulation_and_hooks():
    a = positive(3)
    y = go.custom_backward(implicit_root(square_of))(newton)(a)
    seen = []
    a.register_hook(lambda g: seen.append(g.clone()))
    y.sum().backward(retain_graph=True)
    y.sum().backward()
    closely(a.grad, 1 / a.detach().sqrt())
    assert len(seen) == 2


# --- errors and warnings


def raised(kind, rule, fn, *inputs):
    y = go.custom_backward(rule)(fn)(*inputs)
    with pytest.raises(kind) as caught:
        y.sum().backward()
    return caught.value


def test_argument_that_the_function_does_not_have_is_an_error_that_names_the_equation():
    with pytest.raises(
        go.RuleSignatureError, match=r"rule 'implicit_root\(of_a_cube\)' .* asks for 'b', which does not"
    ):

        @go.custom_backward(implicit_root(of_a_cube))
        def solve(a):
            return a


def of_a_cube(y, b):
    return y**3 - b


def test_a_singular_equation_is_an_error():
    error = raised(go.ConvergenceError, implicit_root(square_of), lambda a: a * 1, float64(0.0, 1.0))
    assert str(error).startswith("implicit_root: 'square_of' (")
    assert "its derivative by the result is singular there, so the gradient is not defined" in str(error)
    assert any("in the rule 'implicit_root(square_of)'" in note for note in error.__notes__)


def hard(x, matrix, right):
    return matrix @ x - right


@pytest.mark.parametrize("solver", ["gmres", "bicgstab"])
def test_iterations_that_do_not_converge_are_an_error(solver):
    matrix = torch.triu(noise(60, 60, grad=False)).requires_grad_()
    right = noise(60)
    rule = implicit_root(hard, solver=solver, max_iter=1, root_tol=1e6)
    error = raised(go.ConvergenceError, rule, lambda matrix, right: torch.linalg.solve(matrix, right), matrix, right)
    assert f"'{solver}' was " in str(error)
    assert "of the gradient off after 1 iterations, and 3.7e-11 is allowed" in str(error)
    assert str(error).endswith("Use solver='dense' or another, or raise 'max_iter'")


@pytest.mark.parametrize("factor", [-1.5, 1.0, 3.0])
def test_a_gradient_that_does_not_contract_is_an_error(factor):
    """z = factor z + (1 - factor) x, whose fixed point is x."""
    rule = fixed_point(lambda z, x: factor * z + (1 - factor) * x, solver="neumann")
    error = raised(go.ConvergenceError, rule, lambda x: x.detach().clone(), noise(3))
    assert "must contract near its result, for the gradient to be iterated" in str(error)
    if factor != 1:
        fn = go.custom_backward(fixed_point(lambda z, x: factor * z + (1 - factor) * x))(lambda x: x.detach().clone())
        x = noise(3)
        closely(grad(fn(x).exp().sum(), x), x.exp())


def test_a_result_that_is_no_root_is_a_warning():
    a = positive(3)
    y = go.custom_backward(implicit_root(square_of))(newton)(a, 1)
    with pytest.warns(go.GradOverrideWarning) as caught:
        y.sum().backward()
    text = str(caught[0].message)
    assert text.startswith("implicit_root: 'square_of' (")
    assert "must be zero at the result of the forward" in text
    assert "and 6.1e-06 is allowed ('root_tol'). Let the solver go on" in text
    tolerant = go.custom_backward(implicit_root(square_of, root_tol=10.0))(newton)
    tolerant(a, 1).sum().backward()  # warnings are errors here


def test_one_sample_that_is_no_root_is_seen_among_many():
    a = positive(1000, 1)

    def solve(a):
        y = newton(a)
        y[7] += 1e-3
        return y

    y = go.custom_backward(implicit_root(square_of, batch_dims=1))(solve)(a)
    with pytest.warns(go.GradOverrideWarning, match="must be zero at the result"):
        y.sum().backward()


def test_the_distance_in_the_warning_is_that_of_the_root():
    a = torch.full((1,), 4.0, dtype=torch.float64, requires_grad=True)
    y = go.custom_backward(implicit_root(square_of))(lambda a: a.sqrt() + 2e-3)(a)
    with pytest.warns(go.GradOverrideWarning, match=r"the root is 1\.0e-03 away, relative to the result"):
        y.sum().backward()


def test_a_result_with_nan_is_a_warning_or_an_error():
    a = float64(-1.0, 4.0)
    y = go.custom_backward(implicit_root(square_of))(lambda a: a.sqrt())(a)
    with pytest.raises(go.ConvergenceError, match="its solution is not finite"):
        y.sum().backward()


def test_a_residual_that_reaches_a_tensor_with_a_gradient_is_refused():
    other = positive(3)
    error = raised(
        go.CapturedTensorError, implicit_root(lambda y, a: y * y - a * other), lambda a: a.sqrt(), positive(3)
    )
    assert "must get each tensor that wants a gradient by a parameter" in str(error)
    assert "it reached one that requires grad by a closure, a global or 'module'" in str(error)


def test_a_residual_of_another_shape_is_refused():
    error = raised(go.RuleResultError, implicit_root(lambda y, a: (y * y - a).sum()), newton, positive(3))
    assert "must return the structure and shapes of the result, (3,); it returned ()" in str(error)
    error = raised(go.RuleResultError, fixed_point(lambda y, a: "nothing"), newton, positive(3))
    assert "it returned no floating tensor" in str(error)


def test_a_name_that_does_not_exist_is_an_error_when_it_is_attached():
    with pytest.raises(go.RuleSignatureError, match=r"asks for 'b', which does not exist. 'newton' .* offers 'a', 'st"):
        go.custom_backward(implicit_root(lambda y, b: y - b))(newton)


def test_input_beside_other_names_is_refused():
    with pytest.raises(go.RuleSignatureError, match="own names, or for 'input' alone; it asks for 'input', 'a'"):
        implicit_root(lambda y, input, a: y - a)


def test_batch_dims_that_do_not_fit_are_refused():
    rule = implicit_root(lambda y, a: y - a.sum(), batch_dims=1)
    error = raised(go.ForwardResultError, rule, lambda a: a.sum(), noise(3))
    assert "whose first 1 sizes are the same ('batch_dims'); they have the shapes ()" in str(error)


def test_without_scipy_an_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.sparse.linalg", None)
    error = raised(go.MissingExtraError, implicit_root(square_of, solver="gmres"), newton, positive(3))
    assert "with solver='gmres' needs SciPy: pip install \"gradoverride[solvers]\". Or use solver='dense'" in str(error)
    closely(
        grad(go.custom_backward(implicit_root(square_of))(newton)(a := positive(3)).sum(), a), 0.5 / a.detach().sqrt()
    )


WRONG = [
    (implicit_root, (3,), {}, "'residual' must be a function of the result and of what it depends on; got 3"),
    (
        implicit_root,
        (nn.Linear,),
        {},
        "'residual' must be a function of the result and of what it depends on; got the c",
    ),
    (fixed_point, (None,), {}, "'fn' must be a function of the result and of what it depends on; got None"),
    (implicit_root, (square_of, "lu"), {}, "'solver' must be None, 'dense', 'gmres', 'bicgstab', 'cg'; got 'lu'"),
    (implicit_root, (square_of, "neumann"), {}, "'solver' must be None, 'dense', 'gmres', 'bicgstab', 'cg'; got 'neu"),
    (implicit_root, (square_of,), {"batch_dims": -1}, "'batch_dims' must be an integer, 0 or larger; got -1"),
    (implicit_root, (square_of,), {"tol": 0.0}, "'tol' must be None or a number larger than 0; got 0.0"),
    (implicit_root, (square_of,), {"root_tol": -1}, "'root_tol' must be None or a number larger than 0; got -1"),
    (fixed_point, (layer,), {"max_iter": 0}, "'max_iter' must be an integer, 1 or larger; got 0"),
]


@pytest.mark.parametrize(("make", "given", "options", "text"), WRONG, ids=[case[-1] for case in WRONG])
def test_options_out_of_range_are_errors_when_it_is_made(make, given, options, text):
    with pytest.raises(go.RuleOptionError) as caught:
        make(*given, **options)
    assert str(caught.value).startswith(f"{make.__name__}: {text}")


@pytest.mark.parametrize(("make", "option"), [(implicit_root, "residual"), (fixed_point, "fn")])
def test_function_that_does_not_take_the_result_is_an_error(make, option):
    with pytest.raises(go.RuleSignatureError) as caught:
        make(lambda *, x: x)
    text = f"{make.__name__}: '{option}' must take the result first, where a rule takes the gradient, and ask for the "
    assert str(caught.value).startswith(f"{text}rest by name: rule '<lambda>' (")
    assert str(caught.value).endswith("; it takes (*, x)")


# --- values


@pytest.mark.parametrize("rule", [implicit_root(square_of, "cg", tol=1e-6), fixed_point(layer, batch_dims=1)], ids=repr)
def test_it_prints_compares_pickles_and_copies(rule):
    name = "square_of, solver='cg'" if type(rule) is implicit_root else "layer, solver=None"
    assert repr(rule).startswith(f"{type(rule).__name__}({name}, batch_dims=")
    for again in (pickle.loads(pickle.dumps(rule)), copy.copy(rule), copy.deepcopy(rule)):
        assert again == rule
        assert again.names == rule.names
    with pytest.raises(AttributeError):
        rule.batch_dims = 2
