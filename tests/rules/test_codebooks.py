"""Vector quantization against the nearest by brute force, and against rotations as matrices."""

import math
import pickle

import pytest
import torch
from oracles import FLOAT32, closely, exactly, noise

import gradoverride as go
from gradoverride import rules

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*should not be instantiated:DeprecationWarning",  # Dynamo's own doing, for any Function
)

both = pytest.mark.parametrize("rotate", [False, True], ids=["straight-through", "rotated"])


def rotation(x, y):
    """The matrix that turns the direction of x into that of y in their plane: Rodrigues' formula."""
    e, q = x / x.norm(), y / y.norm()
    turn = torch.outer(q, e) - torch.outer(e, q)
    return torch.eye(len(x), dtype=x.dtype) + turn + turn @ turn / (1 + e @ q)


def by_the_paper(x, y):
    """Fifty et al. (2024), as its authors compute it: the value, with what is constant detached."""
    e, q = (x / x.norm()).detach(), (y / y.norm()).detach()
    r = ((e + q) / (e + q).norm()).detach()
    return (y.norm() / x.norm()).detach() * (x - 2 * (x @ r) * r + 2 * (x @ e) * q)


# --- the nearest ---


@both
class TestVectorQuantize:
    @pytest.mark.parametrize("shape", [(6,), (50, 6), (2, 3, 4, 6)])
    def test_is_the_nearest_by_brute_force(self, rotate, shape):
        x, codebook = noise(*shape), noise(20, 6)
        codes, index = rules.vector_quantize(x, codebook, rotate=rotate)
        expected = (x[..., None, :] - codebook).square().sum(-1).argmin(-1)
        exactly(index, expected)
        exactly(codes.detach(), codebook.detach()[expected])

    def test_autocast_leaves_the_nearest_what_it_is(self, rotate):
        x, codebook = noise(2000, 16, dtype=torch.float32), noise(300, 16, dtype=torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            _, index = rules.vector_quantize(x, codebook, rotate=rotate)
        exactly(index, (x[:, None] - codebook).double().square().sum(-1).argmin(-1))

    def test_writes_into_nothing(self, rotate):
        x, codebook, g = noise(50, 6), noise(20, 6), noise(50, 6, grad=False)
        before = [tensor.detach().clone() for tensor in (x, codebook, g)]
        torch.autograd.grad(rules.vector_quantize(x, codebook, rotate=rotate)[0], x, g)
        exactly([tensor.detach() for tensor in (x, codebook, g)], before)

    def test_the_codebook_gets_no_gradient_from_it(self, rotate):
        x, codebook = noise(50, 6), noise(20, 6)
        codes, _ = rules.vector_quantize(x, codebook, rotate=rotate)
        codes.sum().backward()
        assert codebook.grad is None

    def test_the_first_of_two_that_are_equally_near(self, rotate):
        codebook = torch.tensor([[5.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [1.0, 0.0]])
        for point in ([0.0, 0.0], [3.0, 0.0], [1.0, 0.0]):
            _, index = rules.vector_quantize(torch.tensor(point), codebook, rotate=rotate)
            assert index == {0.0: 1, 3.0: 0, 1.0: 1}[point[0]]

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_keeps_the_dtype_and_rows_of_the_codebook(self, rotate, dtype):
        x = noise(50, 6, dtype=torch.float32).to(dtype).detach().requires_grad_()
        codebook = noise(20, 6, grad=False).to(dtype)
        codes, index = rules.vector_quantize(x, codebook, rotate=rotate)
        exactly(codes.detach(), codebook[index])
        (grad,) = torch.autograd.grad(codes, x, torch.ones_like(codes))
        assert grad.dtype == dtype
        assert grad.isfinite().all()

    def test_distances_too_large_for_half_precision(self, rotate):
        x = torch.tensor([[300.0, 290.0]], dtype=torch.float16, requires_grad=True)
        codebook = torch.tensor([[400.0, 300.0], [310.0, 300.0]], dtype=torch.float16)
        codes, index = rules.vector_quantize(x, codebook, rotate=rotate)
        assert index.item() == 1
        (grad,) = torch.autograd.grad(codes, x, torch.ones_like(codes))
        torch.testing.assert_close(grad, torch.ones_like(grad), rtol=0.05, atol=0)

    def test_under_grad_and_vmap(self, rotate):
        x, codebook, g = noise(5, 4, 6), noise(20, 6, grad=False), noise(4, 6, grad=False)
        codes, _ = rules.vector_quantize(x, codebook, rotate=rotate)
        (expected,) = torch.autograd.grad(codes, x, g.expand_as(codes))

        def gradient(x):
            return torch.func.grad(lambda x: (rules.vector_quantize(x, codebook, rotate=rotate)[0] * g).sum())(x)

        def gradient_of_one(x, g):  # whose index is a single number
            return torch.func.vjp(lambda x: rules.vector_quantize(x, codebook, rotate=rotate)[0], x)[1](g)[0]

        closely(gradient(x[0].detach()), expected[0])
        closely(torch.vmap(gradient)(x.detach()), expected)
        closely(torch.vmap(torch.vmap(gradient_of_one))(x.detach(), g.expand_as(x)), expected)

    def test_compiled_it_is_that_of_eager(self, rotate):
        torch.compiler.reset()
        x, codebook, g = noise(5, 6), noise(20, 6), noise(5, 6, grad=False)

        def run(x):
            return rules.vector_quantize(x, codebook, rotate=rotate)

        codes, index = run(x)
        found, again = torch.compile(run, fullgraph=True, backend="aot_eager")(x)
        exactly((found.detach(), again), (codes.detach(), index))
        closely(torch.autograd.grad(found, x, g), torch.autograd.grad(codes, x, g))


def test_straight_through_passes_the_gradient():
    x, codebook, g = noise(50, 6), noise(20, 6), noise(50, 6, grad=False)
    codes, _ = rules.vector_quantize(x, codebook)
    exactly(torch.autograd.grad(codes, x, g), (g,))


# --- rotated ---


class TestRotationTrick:
    def test_is_the_transposed_rotation_as_a_matrix(self):
        x, codebook, g = noise(50, 6), noise(20, 6, grad=False), noise(50, 6, grad=False)
        codes, index = rules.vector_quantize(x, codebook, rotate=True)
        (found,) = torch.autograd.grad(codes, x, g)
        for vector, code, gradient, row in zip(x.detach(), codebook[index], g, found, strict=True):
            turn, stretch = rotation(vector, code), code.norm() / vector.norm()
            closely(turn @ turn.T, torch.eye(6, dtype=torch.float64))  # so that it may be the oracle
            closely(stretch * turn @ vector, code)
            closely(row, stretch * turn.T @ gradient)

    def test_is_what_its_authors_compute(self):
        x, y, g = noise(6), noise(6, grad=False), noise(6, grad=False)
        (expected,) = torch.autograd.grad(by_the_paper(x, y), x, g)
        closely(by_the_paper(x, y).detach(), y)
        closely(rules.rotation_trick(g, x.detach(), y), expected)

    def test_the_angle_to_the_gradient_stays(self):
        x, y, g = noise(50, 6, grad=False), noise(50, 6, grad=False), noise(50, 6, grad=False)
        found = rules.rotation_trick(g, x, y)
        cosine = torch.nn.functional.cosine_similarity
        closely(cosine(found, x), cosine(g, y))
        closely(found.norm(dim=-1), g.norm(dim=-1) * y.norm(dim=-1) / x.norm(dim=-1))

    def test_where_the_two_have_one_direction_it_is_stretched(self):
        x, g = noise(4, 6, grad=False), noise(4, 6, grad=False)
        closely(rules.rotation_trick(g, x, 3 * x), 3 * g)

    def test_where_there_is_no_direction(self):
        g, zero, x = noise(6, grad=False), torch.zeros(6, dtype=torch.float64), noise(6, grad=False)
        exactly(rules.rotation_trick(g, zero, x), g)
        exactly(rules.rotation_trick(g, zero, zero), g)
        exactly(rules.rotation_trick(g, x, zero), zero)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    def test_where_they_are_opposite_it_is_reflected(self, dtype):
        x, g = noise(6, grad=False, dtype=dtype), noise(6, grad=False, dtype=dtype)
        e = x / x.norm()
        torch.testing.assert_close(rules.rotation_trick(g, x, -x), g - 2 * e * (e @ g), **FLOAT32)

    def test_is_a_rule_for_any_quantizer(self):
        x, g = noise(5, 4), noise(5, 4, grad=False)
        quantize = go.custom_backward(rules.rotation_trick)(torch.round)
        (found,) = torch.autograd.grad(quantize(x), x, g)
        for vector, gradient, row in zip(x.detach(), g, found, strict=True):
            if vector.round().norm() > 0:
                turn, stretch = rotation(vector, vector.round()), vector.round().norm() / vector.norm()
                closely(row, stretch * turn.T @ gradient)

    def test_second_derivatives_are_those_by_finite_differences(self):
        assert torch.autograd.gradcheck(rules.rotation_trick, (noise(2, 3), noise(2, 3), noise(2, 3)))

    def test_second_derivatives_of_a_vector_without_a_direction(self):
        given = torch.zeros(6, dtype=torch.float64, requires_grad=True), noise(6)
        g = noise(6)
        found = torch.autograd.grad(rules.rotation_trick(g, *given), (g, *given), torch.ones(6, dtype=torch.float64))
        exactly(found, (torch.ones(6, dtype=torch.float64), *[torch.zeros(6, dtype=torch.float64)] * 2))

    def test_forward_mode_is_the_rotation(self):
        x, codebook, tangent = noise(6, grad=False), noise(20, 6, grad=False), noise(6, grad=False)
        code, found = torch.func.jvp(lambda x: rules.vector_quantize(x, codebook, rotate=True)[0], (x,), (tangent,))
        closely(found, code.norm() / x.norm() * rotation(x, code) @ tangent)

    def test_pickles_by_name(self):
        assert pickle.loads(pickle.dumps(rules.rotation_trick)) is rules.rotation_trick
        assert pickle.loads(pickle.dumps(rules.vector_quantize)) is rules.vector_quantize


def test_nan_stays_to_be_seen():
    x = torch.tensor([[math.nan, 1.0], [0.5, 1.0]], requires_grad=True)
    for rotate in (False, True):
        codes, _ = rules.vector_quantize(x, torch.eye(2), rotate=rotate)
        (grad,) = torch.autograd.grad(codes.sum(), x)
        assert grad[1].isfinite().all()
    assert grad[0].isnan().all()


CODEBOOK = (
    "vector_quantize: 'codebook' must be a tensor of shape (vectors, size), with the size of the last dimension of x, "
    "a tensor of shape (5, 3); got "
)


@pytest.mark.parametrize(
    ("codebook", "rotate", "text"),
    [
        (torch.ones(4, 2), False, CODEBOOK + "a tensor of shape (4, 2)"),
        (torch.ones(3), False, CODEBOOK + "a tensor of shape (3,)"),
        (torch.ones(0, 3), False, CODEBOOK + "a tensor of shape (0, 3)"),
        ([1.0], False, CODEBOOK + "a list of 1 (1.0, a float)"),
        (torch.ones(4, 3), 1, "vector_quantize: 'rotate' must be True or False; got 1"),
        (
            torch.ones(4, 3, dtype=torch.int64),
            False,
            "vector_quantize: 'codebook' must be a real floating tensor; got torch.int64",
        ),
    ],
)
def test_what_is_no_codebook_is_an_error(codebook, rotate, text):
    with pytest.raises(go.RuleOptionError) as error:
        rules.vector_quantize(torch.ones(5, 3), codebook, rotate=rotate)
    assert str(error.value) == text


@pytest.mark.parametrize(
    ("x", "got"), [([1.0], "[1.0]"), (None, "None"), (torch.ones(5, 3, dtype=torch.int64), "torch.int64")]
)
def test_what_has_no_vectors_is_an_error(x, got):
    with pytest.raises(go.RuleOptionError) as error:
        rules.vector_quantize(x, torch.ones(4, 3))
    assert str(error.value) == f"vector_quantize: 'x' must be a real floating tensor; got {got}"
