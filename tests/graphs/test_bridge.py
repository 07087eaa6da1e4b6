"""`bridge`: functions of NumPy arrays as functions of tensors."""

import functools
import inspect
import pickle
import sys
from typing import NamedTuple

import numpy
import pytest
import scipy.fft
import torch
from oracles import closely, exactly, float64, noise
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import gradoverride as go


def grad(y, *inputs, **options):
    found = torch.autograd.grad(y, inputs, **options)
    return found[0] if len(inputs) == 1 else found


def cube_rule(grad_output, x):
    assert type(grad_output) is type(x) is numpy.ndarray
    return grad_output * 3 * x**2


@go.bridge(cube_rule)
def cube(x):
    """Cube it."""
    assert type(x) is numpy.ndarray
    return x**3


# --- one array ---


def test_value_and_gradient():
    x = noise(3, 4)
    y = cube(x)
    closely(y, x**3)
    closely(grad(y.sin().sum(), x), (x**3).cos() * 3 * x**2)
    assert torch.autograd.gradcheck(cube, noise(4))


def test_name_signature_docstring_and_pickle():
    assert cube.__name__ == "cube"
    assert cube.__doc__ == "Cube it."
    assert list(inspect.signature(cube).parameters) == ["x"]
    assert pickle.loads(pickle.dumps(cube)) is cube
    assert cube(noise(3)).grad_fn.name() == "cubeBackward"


def test_without_a_tensor_it_is_the_function_of_arrays():
    array = numpy.array([1.0, 2.0])
    found = cube(array)
    assert type(found) is numpy.ndarray
    numpy.testing.assert_array_equal(found, array**3)


def test_where_no_gradient_is_wanted():
    x = noise(3)
    with torch.no_grad():
        y = cube(x)
    assert not y.requires_grad
    closely(y, x**3)
    assert not cube(noise(3, grad=False)).requires_grad


def test_rule_of_scipy():
    """An orthonormal transform, whose adjoint is its inverse; the dense matrix as the oracle."""
    dct = go.bridge(lambda g: scipy.fft.idct(g, norm="ortho"))(lambda x: scipy.fft.dct(x, norm="ortho"))
    x = noise(5)
    matrix = torch.from_numpy(scipy.fft.dct(numpy.eye(5), norm="ortho", axis=0))
    closely(grad(dct(x).exp().sum(), x), grad((matrix @ x).exp().sum(), x))


def test_builtins_and_ufuncs():
    x = noise(4)
    sin = go.bridge(lambda g, x: g * numpy.cos(x))(numpy.sin)
    closely(grad(sin(x).sum(), x), x.cos())
    power = go.bridge(lambda g, x1, x2: (g * x2 * x1 ** (x2 - 1), None))(numpy.power)
    closely(grad(power(x, 3).sum(), x), 3 * x**2)
    closely(
        grad(go.bridge(lambda g, input: numpy.broadcast_to(g, input.shape))(numpy.sum)(x) * 3, x), torch.full_like(x, 3)
    )


def test_partial_of_a_ufunc():
    x = noise(4)
    scaled = go.bridge(lambda g, input: g * 3)(functools.partial(numpy.multiply, 3.0))
    closely(grad(scaled(x).sum(), x), torch.full_like(x, 3))
    by_name = go.bridge(lambda g, x2: g * 2**x2 * numpy.log(2))(functools.partial(numpy.power, 2.0))
    closely(grad(by_name(x).sum(), x), 2**x * torch.log(float64(2.0, grad=False)))


@pytest.mark.parametrize("kind", [numpy.longdouble, ">f8", ">f4", "<f8", ">i4"])
def test_dtypes_of_arrays_that_torch_does_not_know(kind):
    x = float64(1.0, -2.0, 3.0)
    y = go.bridge(lambda g: (g * 2).astype(kind))(lambda x: (x.astype(kind), x * 2))(x)
    exactly(y[0].detach().to(torch.float64), x.detach())
    if kind != ">i4":
        y = go.bridge(lambda g: (g * 2).astype(kind))(lambda x: x.astype(kind))(x)
        closely(grad(y.sum(), x), torch.full_like(x, 2))


def test_masked_values_are_refused():
    def fn(x, masked):
        return numpy.ma.masked_array(x, [masked, False, False])

    x = noise(3)
    exactly(go.bridge(lambda g: g)(fn)(x, False), x)
    with pytest.raises(go.UnsupportedError, match=r"'fn' \(.*\) must return arrays without masked .*: array.filled\("):
        go.bridge(lambda g: g)(fn)(x, True)


def test_floats_of_python_are_results_wherever_they_stand():
    x = noise(4)
    norms = go.bridge(lambda g, x: 2 * x * g[0] + g[1]["sum"])(lambda x: (float((x**2).sum()), {"sum": float(x.sum())}))
    square, parts = norms(x)
    closely([square, parts["sum"]], [x.square().sum(), x.sum()])
    closely(grad(square.exp() + 3 * parts["sum"], x), 2 * x * x.square().sum().exp() + 3)


def test_scalar_results():
    x = noise(4)

    def rule(g, x):
        assert g.shape == ()
        return g * 2 * x

    for fn in (lambda x: numpy.sum(x**2), lambda x: float(numpy.sum(x**2)), lambda x: numpy.asarray(numpy.sum(x**2))):
        y = go.bridge(rule)(fn)(x)
        assert y.shape == ()
        assert y.dtype == torch.float64
        closely(grad(y.exp(), x), 2 * x * (x**2).sum().exp())


# --- several arrays, other arguments ---


class Split(NamedTuple):
    low: object
    high: object


def test_several_arrays_in_and_out():
    def rule(g, a, b):
        return g["product"] * b + g["sum"], g["product"] * a + g["sum"]

    @go.bridge(rule)
    def combine(a, b):
        return {"product": a * b, "sum": a + b, "count": 3}

    a, b = noise(3), noise(3)
    found = combine(a, b)
    assert found["count"] == 3
    closely(grad((found["product"] * 2 + found["sum"]).sum(), a, b), (2 * b + 1, 2 * a + 1))
    closely(grad(combine(a, b)["sum"].sum(), a, b), (torch.ones_like(a), torch.ones_like(b)))


def test_namedtuple_and_containers():
    def rule(g, pair):
        return [g.low * 2, g.high * 3]

    split = go.bridge(rule)(lambda pair: Split(pair[0] * 2, pair[1] * 3))
    a, b = noise(3), noise(2)
    found = split([a, b])
    assert type(found) is Split
    closely(grad(found.low.sum() + found.high.sum(), a, b), (torch.full_like(a, 2), torch.full_like(b, 3)))


def test_arguments_that_are_no_arrays():
    def rule(grad_output, x, power, *, scale):
        assert power == 3
        assert scale == 2.0
        return {"x": grad_output * scale * power * x ** (power - 1)}

    @go.bridge(rule)
    def power_of(x, power, name=None, *, scale):
        assert name == "text"
        return scale * x**power

    x = noise(3)
    closely(grad(power_of(x, 3, "text", scale=2.0).sum(), x), 6 * x**2)


def test_integers_and_arrays_beside():
    def rule(g, x, index, weight):
        assert index.dtype == numpy.int64
        answer = numpy.zeros_like(x)
        numpy.add.at(answer, index, g * weight)
        return answer, None, None

    take = go.bridge(rule)(lambda x, index, weight: x[index] * weight)
    x, index, weight = noise(4), torch.tensor([1, 1, 3]), numpy.array([1.0, 2.0, 3.0])
    closely(grad(take(x, index, weight).sum(), x), torch.tensor([0.0, 3, 0, 3], dtype=torch.float64))


def test_integer_results_are_not_differentiable():
    order = go.bridge(lambda g, x: g[0])(lambda x: (x * 1, numpy.argsort(x)))
    x = noise(4)
    values, index = order(x)
    assert index.dtype == torch.int64
    assert not index.requires_grad
    closely(grad(values.sum(), x), torch.ones_like(x))


def test_residuals():
    def rule(grad_output, factor, x):
        assert factor["matrix"] is kept[0]
        return numpy.linalg.solve(factor["matrix"].T, grad_output)

    kept = []

    @go.bridge(rule)
    def solve(x):
        matrix = numpy.array([[2.0, 1.0], [0.0, 3.0]])
        kept.append(matrix)
        return go.save_for_backward(numpy.linalg.solve(matrix, x), factor={"matrix": matrix})

    x = noise(2)
    matrix = torch.tensor([[2.0, 1.0], [0.0, 3.0]], dtype=torch.float64)
    closely(grad(solve(x).exp().sum(), x), grad(torch.linalg.solve(matrix, x).exp().sum(), x))
    with pytest.raises(go.UnsupportedError, match=r"hands values over \(save_for_backward\), which vmap"):
        torch.func.vmap(solve)(noise(3, 2, grad=False))


class Scaled(nn.Module):
    def forward(self, grad_output, k):
        return grad_output * k


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (functools.partial(lambda grad_output, k: grad_output * k, k=3.0), 3.0),
        (functools.partial(numpy.multiply, 3.0), 3.0),
        (numpy.negative, -1.0),
        (Scaled(), 10.0),
    ],
)
def test_rule_may_be_any_callable_and_its_options_are_its_own(rule, expected):
    x = noise(3)
    exactly(grad(go.bridge(rule)(lambda x, k: x * k)(x, 10.0).sum(), x), torch.full_like(x, expected))


def test_output_input_and_needs():
    def rule(grad_output, output, input, needs):
        assert needs == {"x": True, "y": False}
        return grad_output * output, None

    fn = go.bridge(rule)(lambda x, y: numpy.exp(x) + 0 * y)
    x = noise(3)
    closely(grad(fn(x, noise(3, grad=False)).sum(), x), x.exp())


def test_rule_may_call_the_function_again():
    """Central differences, by the function itself."""

    def rule(grad_output, x, forward):
        return grad_output * (forward(x + 1e-5) - forward(x - 1e-5)) / 2e-5

    x = noise(4)
    fn = go.bridge(rule)(lambda x: numpy.sin(x) * x)
    torch.testing.assert_close(grad(fn(x).sum(), x), x.cos() * x + x.sin(), rtol=1e-8, atol=1e-8)


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

    @go.bridge(lambda g, x, weight: {"x": g * weight, "weight": (g * x).sum()})
    def forward(self, x):
        return self.weight.detach().numpy() * x


def test_method_of_a_module():
    layer, x = Scale(), noise(3)
    closely(grad(layer(x).exp().sum(), x, layer.weight), grad((layer.weight * x).exp().sum(), x, layer.weight))


def test_methods_of_other_classes():
    class Tools:
        @go.bridge(lambda g: g * 2)
        def double(self, x):
            return x * 2

        @staticmethod
        @go.bridge(lambda g: g * 3)
        def triple(x):
            return x * 3

        @go.bridge(lambda g: g * 4)
        @classmethod
        def four(cls, x):
            return x * 4

    x = noise(3)
    for fn, factor in ((Tools().double, 2), (Tools.triple, 3), (Tools.four, 4)):
        closely(grad(fn(x).sum(), x), torch.full_like(x, factor))


# --- copies ---


def test_writing_into_arrays_spares_the_tensors():
    def rule(grad_output, x):
        grad_output *= 2
        x *= 3
        return grad_output * x / 3

    @go.bridge(rule)
    def double(x):
        x *= 2
        return x

    x = noise(3)
    before, cotangent = x.detach().clone(), noise(3, grad=False)
    handed = cotangent.clone()
    y = double(x)
    closely(y, before * 2)
    closely(grad(y, x, grad_outputs=cotangent), 2 * handed * before)
    exactly(x.detach(), before)
    exactly(cotangent, handed)


def test_result_that_the_function_keeps_is_a_copy():
    cached = numpy.zeros(3)
    fn = go.bridge(lambda g: g)(lambda x: numpy.add(x, 1, out=cached))
    first = fn(torch.ones(3, dtype=torch.float64, requires_grad=True))
    fn(torch.full((3,), 5.0, dtype=torch.float64, requires_grad=True))
    closely(first, torch.full((3,), 2.0, dtype=torch.float64))


def test_arrays_with_negative_strides_and_readonly_ones():
    turn = go.bridge(lambda g: g[::-1])(lambda x: x[::-1])
    x = noise(4)
    closely(grad((turn(x) * torch.arange(4)).sum(), x), torch.tensor([3.0, 2, 1, 0], dtype=torch.float64))
    spread = go.bridge(lambda g: g.sum(0))(lambda x: numpy.broadcast_to(x, (2, 4)))
    closely(grad(spread(x).sum(), x), torch.full_like(x, 2))


def test_expanded_transposed_and_conjugate_tensors():
    x = noise(3)
    closely(cube(x.expand(2, 3)), x.expand(2, 3) ** 3)
    matrix = noise(2, 3)
    closely(grad(cube(matrix.T).sum(), matrix), 3 * matrix**2)
    z = noise(3, dtype=torch.complex128)
    twice = go.bridge(lambda g: g * 2)(lambda z: z * 2)
    closely(twice(z.conj()), z.conj() * 2)
    closely(grad(twice(z).abs().sum(), z), grad((z * 2).abs().sum(), z))


# --- dtypes ---


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2, torch.complex32]
)
@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
def test_dtype_of_the_tensor_comes_back(dtype):
    seen = []

    def rule(g, x):
        seen.append((g.dtype, x.dtype))
        return g.astype(numpy.float64 if g.dtype.kind == "f" else numpy.complex128) * 2

    def fn(x):
        seen.append(x.dtype)
        return x.astype(numpy.float64 if x.dtype.kind == "f" else numpy.complex128) * 2

    x = torch.ones(3).to(dtype).requires_grad_()
    y = go.bridge(rule)(fn)(x)
    assert y.dtype == dtype
    found = grad(y, x, grad_outputs=torch.ones(3).to(dtype))
    assert found.dtype == dtype
    assert found.to(torch.complex64).tolist() == [2, 2, 2]
    others = {torch.bfloat16: torch.float32, torch.float8_e5m2: torch.float32, torch.complex32: torch.complex64}
    inside = numpy.dtype(str(others.get(dtype, dtype)).removeprefix("torch."))
    assert seen == [inside, (inside, inside)]


@pytest.mark.parametrize("dtype", ["float64", numpy.float64, numpy.dtype("float64"), torch.float64, "double", "f8"])
def test_work_in_float64_on_request(dtype):
    def fn(x):
        assert x.dtype == numpy.float64
        return (x + 1e-12) - x

    def rule(g, x):
        assert g.dtype == x.dtype == numpy.float64
        return g * 2

    x = torch.ones(3, requires_grad=True)
    y = go.bridge(rule, dtype=dtype)(fn)(x)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, torch.full((3,), 1e-12), rtol=1e-3, atol=0)
    assert grad(y.sum(), x).dtype == torch.float32


def test_common_dtype_of_several_and_complex_results():
    add = go.bridge(lambda g: (g, g))(lambda a, b: a + b)
    assert add(torch.ones(2, requires_grad=True), torch.ones(2, dtype=torch.float64)).dtype == torch.float64
    assert add(torch.ones(2, requires_grad=True), torch.arange(2)).dtype == torch.float32
    to_complex = go.bridge(lambda g: g.real)(lambda x: x * 1j)
    assert to_complex(torch.ones(2, requires_grad=True)).dtype == torch.complex64
    assert go.bridge(lambda g, input: g * input)(numpy.abs)(torch.ones(2, dtype=torch.complex64)).dtype == torch.float32


# --- where else it runs ---


def test_vmap_by_loop():
    calls = []

    @go.bridge(cube_rule)
    def fn(x):
        calls.append(x.shape)
        return x**3

    x = noise(3, 4, grad=False)
    closely(torch.func.vmap(fn)(x), x**3)
    assert calls == [(4,)] * 3
    closely(torch.func.vmap(fn, in_dims=1, out_dims=1)(x), x**3)
    closely(torch.func.vmap(torch.func.vmap(fn))(x), x**3)


def test_grad_jacobian_and_their_vmap():
    x = noise(3, 4, grad=False)
    closely(torch.func.grad(lambda x: cube(x).sum())(x), 3 * x**2)
    closely(torch.func.vmap(torch.func.grad(lambda x: cube(x).sum()))(x), 3 * x**2)
    closely(torch.func.jacrev(cube)(x[0]), torch.diag(3 * x[0] ** 2))


def test_vmap_with_some_arguments_in_common():
    scale = go.bridge(lambda g, x, w: (g * w, (g * x).sum()))(lambda x, w: x * w)
    x, w = noise(3, 4, grad=False), noise(1, grad=False)[0]
    closely(torch.func.vmap(scale, in_dims=(0, None))(x, w), x * w)
    found = torch.func.vmap(torch.func.grad(lambda x, w: scale(x, w).sum(), argnums=(0, 1)), in_dims=(0, None))(x, w)
    closely(found, (w.expand(3, 4), x.sum(1)))


def test_vmap_needs_one_shape():
    ragged = go.bridge(lambda g, x: g)(lambda x: x[: int(x[0])])
    with pytest.raises(go.ForwardResultError, match=r"must return arrays of one shape under vmap.*\(1,\) and \(2,\)"):
        torch.func.vmap(ragged)(torch.tensor([[1.0, 5.0], [2.0, 5.0]]))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo's own doing
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # too
def test_compiled_breaks_the_graph_and_is_right():
    def fn(x):
        return cube(x.sin()).exp()

    x = noise(4)
    torch._dynamo.reset()
    compiled = torch.compile(fn, backend="aot_eager")
    closely(grad(compiled(x).sum(), x), grad(fn(x).sum(), x))
    closely(grad(compiled(x).sum(), x), grad(fn(x).sum(), x))
    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"NumPy arrays \(gradoverride.bridge\)|torch.compiler.disable"):
        torch.compile(fn, backend="aot_eager", fullgraph=True)(x)


@pytest.mark.parametrize("fullgraph", [False, True])
def test_a_bridge_that_is_made_in_compiled_code_is_refused(fullgraph):
    def fn(x):
        return go.bridge(lambda g, x: g * 2 * x)(lambda x: x**2)(x) * 3

    torch._dynamo.reset()
    with pytest.raises(go.UnsupportedError, match="bridge: it must be made outside of the code that is compiled"):
        torch.compile(fn, backend="aot_eager", fullgraph=fullgraph)(float64(1, 2))


def test_what_records_operations_of_torch_is_refused():
    """It would record the result for the tensors that it was traced with."""
    text = r"'cube' \(.*\) must not be recorded by make_fx or torch.export: .* Trace what is before it"
    x = noise(3, grad=False)
    with torch.no_grad(), pytest.raises(go.UnsupportedError, match=text):
        make_fx(cube)(x)
    with pytest.raises(go.UnsupportedError, match=text):
        make_fx(torch.func.grad(lambda x: cube(x).sum()))(x)

    class Model(nn.Module):
        def forward(self, x):
            return cube(x)

    with torch.no_grad(), pytest.raises(go.UnsupportedError, match=text):
        torch.export.export(Model(), (x,), strict=False)


def test_checkpoint():
    from torch.utils.checkpoint import checkpoint

    x = noise(4)
    closely(grad(checkpoint(lambda x: cube(x.sin()), x, use_reentrant=False).sum(), x), 3 * x.sin() ** 2 * x.cos())


def test_estimator_gets_tensors():
    class Differences:
        takes_tensors = True

        def __call__(self, grad_output, input, forward):
            assert isinstance(input, torch.Tensor)
            return grad_output * (forward(input + 1e-5) - forward(input - 1e-5)) / 2e-5

    x = noise(4)
    y = go.bridge(Differences())(numpy.sin)(x)
    torch.testing.assert_close(grad(y.sum(), x), x.cos(), rtol=1e-8, atol=1e-8)


# --- rules of this library ---


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (go.rules.scale(2.0), lambda g: g * 2),
        (go.rules.stop, torch.zeros_like),
        (go.rules.sign, torch.sign),
        (go.rules.clip_norm(1.0), lambda g: g / g.norm()),
        (go.rules.normalize(), lambda g: g / g.norm()),
        (go.rules.deconv_relu, lambda g: g.clamp(min=0)),
        (go.rules.chain(go.rules.scale(2.0), go.rules.clip_value(3.0)), lambda g: (g * 2).clamp(-3, 3)),
    ],
)
def test_rules_of_the_library_edit_the_gradient(rule, expected):
    x, g = noise(3), float64(3.0, -4.0, 0.5, grad=False)
    closely(grad(go.bridge(rule)(lambda x: x + 1)(x), x, grad_outputs=g), expected(g))


def test_links_of_a_chain_are_given_what_each_works_with():
    def tripled(grad_output, x):
        assert type(grad_output) is type(x) is numpy.ndarray
        return grad_output * 3 * x

    x, g = noise(3), float64(3.0, -4.0, 0.5, grad=False)
    for rule in (go.rules.chain(tripled, go.rules.scale(2.0)), go.rules.chain(go.rules.scale(2.0), tripled)):
        closely(grad(go.bridge(rule)(lambda x: x + 1)(x), x, grad_outputs=g), g * 6 * x)


def test_surrogates_give_their_derivative():
    x = noise(4)

    class Bell(go.surrogates.Surrogate):
        def of(self, grad, x):
            return grad * (-x * x).exp()

    closely(grad(go.bridge(Bell())(numpy.sign)(x).sum(), x), (-x * x).exp())
    sigmoid = go.surrogates.sigmoid(k=1.0)
    expected = torch.sigmoid(x) * (1 - torch.sigmoid(x))
    closely(grad(go.bridge(sigmoid)(numpy.sign)(x).sum(), x), expected)


# --- errors ---


def test_second_derivative_is_refused():
    x = noise(3)
    first = grad(cube(x).sum(), x, create_graph=True)
    closely(first, 3 * x**2)
    with pytest.raises(go.UnsupportedError, match=r"rule 'cube_rule' .* works on NumPy arrays, so second derivatives"):
        first.sum().backward()
    with pytest.raises(go.UnsupportedError, match=r"works on NumPy arrays"):
        torch.func.grad(torch.func.grad(lambda x: cube(x).sum()))(x[0].detach())


def test_forward_mode_is_refused():
    x = noise(3, grad=False)
    with pytest.raises(go.UnsupportedError, match=r"works on NumPy arrays"):
        torch.func.jvp(cube, (x,), (x,))


def test_batch_of_gradients_is_refused_and_torch_func_takes_it():
    x = noise(3)
    with pytest.raises(go.UnsupportedError, match=r"'cube_rule' .* no array can be made .* use torch.func.jacrev"):
        torch.autograd.functional.jacobian(cube, x, vectorize=True)
    closely(torch.func.jacrev(cube)(x.detach()), (3 * x**2).diag())


def test_empty_batch_is_refused():
    with pytest.raises(
        go.UnsupportedError, match=r"'cube' .* must have a batch of one or more under vmap, .* one of 0"
    ):
        torch.func.vmap(cube)(torch.zeros(0, 3))


def test_vjp_is_not_there():
    with pytest.raises(go.RuleSignatureError, match=r"asks for 'vjp', which a function of NumPy arrays does not have"):
        go.bridge(lambda g, vjp: g)


def test_vjp_of_what_it_gives_is_its_own_rule():
    doubled = go.custom_backward(lambda grad_output, vjp: 2 * vjp(grad_output))
    x = noise(3, 4)
    closely(grad(doubled(cube)(x).sum(), x), 2 * 3 * x**2)
    with go.override({f"{__name__}:cube": lambda grad_output, vjp: 5 * vjp(grad_output)}):
        closely(grad(cube(x).sum(), x), 5 * 3 * x**2)


def test_unknown_name():
    with pytest.raises(go.RuleSignatureError, match=r"asks for 'y', which does not exist. 'fn' .* offers 'x'"):

        @go.bridge(lambda g, y: g)
        def fn(x):
            return x


@pytest.mark.parametrize(
    "dtype", ["int64", "float", float, 3, "bfloat16", "longdouble", "nonsense", torch.ones(3), ("a",)]
)
def test_wrong_dtype(dtype):
    with pytest.raises(go.DecorationError, match=r"bridge: 'dtype' must be a floating dtype that NumPy and torch have"):
        go.bridge(cube_rule, dtype=dtype)


@pytest.mark.parametrize("value", [3, Scale, nn.ReLU()])
def test_what_is_no_function(value):
    with pytest.raises(go.DecorationError, match=r"bridge: a function of NumPy arrays is needed; got"):
        go.bridge(cube_rule)(value)


def test_wrong_shape_pollutes_no_grad():
    x = noise(3)
    y = go.bridge(lambda g: g[:2])(lambda x: x * 2)(x)
    with pytest.raises(
        go.RuleResultError, match=r"must return a gradient of shape \(3,\) for 'x'.*a tensor of shape \(2,\)"
    ):
        y.sum().backward()
    assert x.grad is None


def test_result_without_an_array():
    with pytest.raises(go.ForwardResultError, match=r"must return at least one array.*it returned 'text', a str"):
        go.bridge(lambda g: g)(lambda x: "text")(noise(3))


def test_error_in_the_function_passes_through():
    with pytest.raises(numpy.linalg.LinAlgError, match="Singular"):
        go.bridge(lambda g: g)(numpy.linalg.inv)(torch.zeros(2, 2, requires_grad=True))


def test_error_in_the_rule_says_which():
    def broken(g):
        raise KeyError("inside")

    with pytest.raises(KeyError) as error:
        go.bridge(broken)(lambda x: x)(noise(3)).sum().backward()
    assert "in the rule 'broken'" in error.value.__notes__[0]


def test_without_numpy_it_says_how_to_get_it(monkeypatch):
    monkeypatch.delitem(sys.modules, "gradoverride._core.doors.arrays")
    monkeypatch.setitem(sys.modules, "numpy", None)
    with pytest.raises(go.MissingExtraError, match="bridge needs NumPy: pip install numpy"):
        go.bridge(cube_rule)


def test_messages_are_about_arrays():
    x = noise(3)
    with pytest.raises(
        go.RuleSignatureError, match=r"offers 'x'; always there are 'input', 'output', 'needs', 'module'"
    ):
        go.bridge(lambda g, weigth: g)(lambda x: x)
    with pytest.raises(go.RuleResultError, match=r"it returned torch.int64. Convert it with .astype\('float64'\)"):
        go.bridge(lambda g: numpy.ones(3, int))(lambda x: x)(x).sum().backward()
    text = r"must return at least one array of numbers, .*; it returned a ndarray. Return the array of numbers"
    with pytest.raises(go.ForwardResultError, match=text):
        go.bridge(lambda g: g)(lambda x: x.astype(object))(x)


def test_sparse_tensor_is_refused():
    text = r"'.*' \(.*\) must be given dense tensors .*; it got one of layout torch.sparse_coo of .*to_dense\(\)"
    with pytest.raises(go.UnsupportedError, match=text):
        go.bridge(lambda g: g)(lambda x: x)(torch.ones(3).to_sparse().requires_grad_())


def test_tensor_without_values_is_refused():
    cosine = go.bridge(lambda grad_output, x: -grad_output * numpy.sin(x))(lambda x: numpy.cos(x))
    text = r"must be given tensors with values by its bridge, .* of shape \(3,\)"
    with pytest.raises(go.UnsupportedError, match=text):
        cosine(torch.empty(3, device="meta"))
