"""AttnLRP, rule by rule: gradients times inputs against the paper's rules of relevance."""

import math

import pytest
import torch
import torch.nn.functional as F
from oracles import closely, exactly, noise
from torch import nn

import gradoverride as go
from gradoverride import rules
from rules.relevance import near, relevance, through_layer_norm, through_matmul, through_softmax

ACTIVATIONS = [
    torch.relu,
    torch.tanh,
    torch.sigmoid,
    F.silu,
    F.gelu,
    F.softplus,
    lambda x: F.gelu(x, approximate="tanh"),
]


@pytest.mark.parametrize("function", ACTIVATIONS)
def test_activation_passes_relevance_on_as_it_is(function):
    x, r = torch.randn(20, dtype=torch.float64), torch.randn(20, dtype=torch.float64)
    r = torch.where(function(x) == 0, 0, r)  # a result of 0 has none
    found = relevance(lambda x: go.custom_backward(rules.attn_identity)(function)(x) + (function(x) == 0), x, r=r)
    closely(found, r)


def test_activation_of_0_has_no_relevance():
    x = torch.tensor([0.0, 1.0], dtype=torch.float64, requires_grad=True)
    exactly(torch.autograd.grad(go.custom_backward(rules.attn_identity)(F.softplus)(x)[0], x)[0], torch.zeros_like(x))


# Options of builtins of torch, which have no signature, by position.
BY_POSITION = {
    "softplus": lambda x: F.softplus(x, 2.0),
    "softplus by name": lambda x: F.softplus(x, beta=2.0),
    "softplus, all by name": lambda x: F.softplus(input=x, beta=2.0),
    "softshrink": lambda x: F.softshrink(x, 0.3),
    "hardshrink": lambda x: F.hardshrink(x, 0.3),
    "celu": lambda x: torch.celu(x, 1.0),
    "threshold": lambda x: torch.threshold(x, 0.1, 0.0),
    "rms_norm": lambda x: torch.rms_norm(x, (20,), torch.arange(1.0, 21).double()),
    "rrelu": lambda x: torch.rrelu(x, 0.1, 0.3, False),
}


@pytest.mark.parametrize("name", BY_POSITION)
def test_builtin_with_options_passes_relevance_on_as_it_is(name):
    x, function = noise(3, 20, grad=False), BY_POSITION[name]
    r = torch.where(function(x) == 0, 0, noise(3, 20, grad=False))
    closely(relevance(under_preset(lambda x: function(x) + (function(x) == 0)), x, r=r), r)


POWERS = {
    "x**2": lambda x: x**2,
    "x**3.5": lambda x: x**3.5,
    "pow": lambda x: torch.pow(x, 2),
    "pow by name": lambda x: torch.pow(x, exponent=2),
    "float_power": lambda x: torch.float_power(x, 2),
    "constant tensor": lambda x: x ** torch.full((), 2.0),
    "square": torch.square,
    "x.square()": lambda x: x.square(),
    "by hand": lambda x: x * x,
}


@pytest.mark.parametrize("name", POWERS)
def test_power_passes_relevance_on_as_it_is(name):
    x, r = noise(3, 4, grad=False).abs(), noise(3, 4, grad=False)
    closely(relevance(under_preset(POWERS[name]), x, r=r), r)


def test_power_of_0_and_of_constants():
    x = noise(4)
    exactly(torch.autograd.grad(under_preset(lambda x: x**0 + 0 * x)(x).sum(), x)[0], torch.zeros_like(x))
    powers = 2 ** torch.arange(4.0).double()
    exactly(torch.autograd.grad(under_preset(lambda x: 2 ** torch.arange(4) * x)(x).sum(), x)[0], powers)


def test_power_whose_exponent_is_a_result_is_refused():
    for function in (lambda x: 2**x, lambda x: torch.pow(2.0, x), lambda x: x**x):
        with pytest.raises(go.UnsupportedError, match=r"attn_power: the exponent must be a constant; it is a result"):
            relevance(under_preset(function), noise(3, grad=False).abs())
    with pytest.raises(go.UnsupportedError, match=r"attn_power is for what has one result for each input"):
        relevance(under_preset(lambda x: x ** torch.ones(2, 3)), noise(3, grad=False).abs())


PRODUCTS = {
    "matmul": (torch.matmul, torch.matmul),
    "bmm": (torch.bmm, torch.matmul),
    "einsum": (lambda a, b: torch.einsum("bij,bjk->bik", a, b), torch.matmul),
    "@": (lambda a, b: a @ b, torch.matmul),
    "a.mm(b)": (lambda a, b: torch.stack([one.mm(other) for one, other in zip(a, b, strict=True)]), torch.matmul),
}


class Calls(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


def under_preset(function):
    model = Calls(function)
    go.override(model, go.presets.attn_lrp)
    return model


@pytest.mark.parametrize("name", PRODUCTS)
def test_product_of_two_results_gives_half_to_each(name):
    a, b = noise(2, 3, 4, grad=False), noise(2, 4, 5, grad=False)
    function, _ = PRODUCTS[name]
    r = noise(2, 3, 5, grad=False)
    found = relevance(under_preset(function), a, b, r=r)
    for part, expected in zip(found, through_matmul(a, b, r), strict=True):
        near(part, expected)
    near(sum([part.sum() for part in found]), r.sum())


@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("which", [0, 1])
def test_product_with_a_constant_gives_all_to_the_result(name, which):
    pair = [noise(2, 3, 4, grad=False), noise(2, 4, 5, grad=False)]
    function, plain = PRODUCTS[name]
    leaf = pair[which].clone().requires_grad_()
    (expected,) = torch.autograd.grad(plain(*[leaf if i == which else x for i, x in enumerate(pair)]).sum(), leaf)
    model = under_preset(function)
    (found,) = torch.autograd.grad(model(*[leaf if i == which else x for i, x in enumerate(pair)]).sum(), leaf)
    closely(found, expected)


ELEMENTWISE = {
    "a * b": lambda a, b: a * b,
    "torch.mul by name": lambda a, b: torch.mul(a, other=b),
    "in place": lambda a, b: (a * 1).mul_(b),
    "a * a": lambda a, b: a * a + 0 * b,
}


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_elementwise_product_gives_half_to_each(name):
    a, b, r = [noise(6, grad=False) for _ in range(3)]
    found = relevance(under_preset(ELEMENTWISE[name]), a, b, r=r)
    closely(found[0] + found[1], r)
    if name != "a * a":
        closely(found[0], r / 2)


# Of two square matrices: half of the plain gradient for each.
BILINEAR = {
    "tensordot": lambda a, b: torch.tensordot(a, b, 1),
    "tensordot of dimensions": lambda a, b: torch.tensordot(a, b, ([0], [1])),
    "chain_matmul": torch.chain_matmul,
    "vdot": lambda a, b: torch.vdot(a[0], b[1]),
    "vecdot": torch.linalg.vecdot,
    "kron": torch.kron,
    "cross": lambda a, b: torch.cross(a, b, dim=1),
    "linalg.cross": torch.linalg.cross,
    "cross by name": lambda a, b: a.cross(other=b, dim=0),
    "mv": lambda a, b: a.mv(b[0]),
    "bilinear": lambda a, b: F.bilinear(a, b, weights()),
    "bilinear by name": lambda a, b: F.bilinear(a, input2=b, weight=weights().requires_grad_()),
    "nn.Bilinear": lambda a, b: nn.Bilinear(3, 3, 1, bias=False).double()(a, b),
}


@pytest.mark.parametrize("dim", [0, -1])
def test_gated_linear_unit_is_the_product_that_is_written_out(dim):
    x = noise(4, 6, grad=False)

    def written_out(x):
        value, gate = x.chunk(2, dim)
        return value * torch.sigmoid(gate)

    r = torch.randn_like(written_out(x))
    expected = relevance(under_preset(written_out), x, r=r)
    closely(expected.sum(), r.sum())
    for glu in (lambda x: F.glu(x, dim), lambda x: F.glu(x, dim=dim), nn.GLU(dim)):
        closely(relevance(under_preset(glu), x, r=r), expected)


@pytest.mark.parametrize("prod", [lambda x: x.prod(-1), lambda x: torch.prod(x, dim=-1), lambda x: x.T.prod(0)])
def test_product_of_numbers_gives_the_same_share_to_each(prod):
    x, r = noise(3, 4, grad=False), noise(3, grad=False)
    closely(relevance(under_preset(prod), x, r=r), (r / 4)[:, None].expand(3, 4))


def weights():
    return torch.arange(18, dtype=torch.float64).view(2, 3, 3).sin()


@pytest.mark.filterwarnings("ignore:torch.chain_matmul is deprecated:UserWarning")
@pytest.mark.parametrize("name", BILINEAR)
def test_each_function_that_is_a_product_of_two_results_gives_half_to_each(name):
    a, b, function = noise(3, 3), noise(3, 3), BILINEAR[name]
    torch.manual_seed(0)
    plain = torch.autograd.grad(function(a, b).sum(), [a, b])
    torch.manual_seed(0)
    found = torch.autograd.grad(under_preset(function)(a, b).sum(), [a, b])
    for half, whole in zip(found, plain, strict=True):
        closely(half, whole / 2)
    torch.manual_seed(0)
    (found,) = torch.autograd.grad(under_preset(function)(a, b.detach()).sum(), a)
    closely(found, plain[0])


@pytest.mark.filterwarnings("ignore:torch.chain_matmul is deprecated:UserWarning")
def test_a_product_of_three_gives_a_third_to_each():
    matrices = [noise(3, 3) for _ in range(3)]
    plain = torch.autograd.grad(torch.chain_matmul(*matrices).sum(), matrices)
    found = torch.autograd.grad(under_preset(torch.chain_matmul)(*matrices).sum(), matrices)
    for third, whole in zip(found, plain, strict=True):
        closely(third, whole / 3)


@pytest.mark.parametrize(
    "product",
    [
        lambda a, b: torch.linalg.multi_dot([a, b]),
        lambda a, b: torch.linalg.multi_dot(tensors=(a, b)),
        lambda a, b: torch.einsum("ij,jk", [a, b]),
        lambda a, b: torch.einsum("ij,jk", (a, b.detach())),
    ],
)
def test_a_list_of_factors_is_refused(product):
    with pytest.raises(go.UnsupportedError, match=r"attn_product: each factor must be .*; a list .* with '@'"):
        relevance(under_preset(product), noise(3, 3), noise(3, 3))


@pytest.mark.parametrize("function", [torch.addmv, torch.addr])
def test_sums_of_a_tensor_and_a_product_give_it_its_gradient_and_half_to_each_of_two(function):
    sizes = {torch.addmv: [(3,), (3, 3), (3,)], torch.addr: [(3, 3), (3,), (3,)]}[function]
    given = [noise(*size) for size in sizes]
    plain = torch.autograd.grad(function(*given).sum(), given)
    found = torch.autograd.grad(under_preset(function)(*given).sum(), given)
    for part, whole, factor in zip(found, plain, (1, 0.5, 0.5), strict=True):
        closely(part, factor * whole)


def test_scaling_leaves_relevance_as_it_is():
    x, r = noise(6, grad=False), noise(6, grad=False)
    scale = torch.tensor(3.0, dtype=torch.float64)
    closely(relevance(under_preset(lambda x: 2 * x * scale * -1 / scale / 7), x, r=r), r)


def test_sum_of_products():
    c, a, b = noise(2, 3, 5, grad=False), noise(2, 3, 4, grad=False), noise(2, 4, 5, grad=False)
    r = noise(2, 3, 5, grad=False)
    z = c + a @ b
    in_product = r * (a @ b) / z
    expected = [c * r / z, *through_matmul(a, b, in_product)]
    for part, right in zip(relevance(under_preset(torch.baddbmm), c, a, b, r=r), expected, strict=True):
        near(part, right)
    constant = relevance(under_preset(lambda a, b: torch.baddbmm(c, a, b)), a, b, r=r)
    for part, right in zip(constant, expected[1:], strict=True):
        near(part, right)


def attention_by_hand(q, k, v, r, mask=None):
    scores = q @ k.mT
    scaled = scores / math.sqrt(q.shape[-1])
    shifted = scaled if mask is None else scaled + mask
    weights = shifted.softmax(-1)
    r_weights, r_v = through_matmul(weights, v, r)
    r_shifted = through_softmax(shifted, weights, r_weights)
    r_scores = r_shifted if mask is None else torch.where(mask.isinf(), 0, scaled * r_shifted / shifted)
    return *through_matmul(q, k.mT, r_scores), r_v


@pytest.mark.parametrize("written_out", [True, False])
@pytest.mark.parametrize("mask", [None, "floating"])
def test_attention_is_two_products_and_a_softmax(mask, written_out):
    q, k, v, r = [noise(2, 3, 4, grad=False) for _ in range(4)]
    mask = None if mask is None else noise(3, 3, grad=False)

    def attend(q, k, v):
        if not written_out:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        scores = q @ k.transpose(-1, -2) / math.sqrt(4)
        return torch.softmax(scores if mask is None else scores + mask, -1) @ v

    found = relevance(under_preset(attend), q, k, v, r=r)
    r_q, r_kt, r_v = attention_by_hand(q, k, v, r, mask)
    for part, expected in zip(found, (r_q, r_kt.mT, r_v), strict=True):
        near(part, expected)


WANTED = ["query", "key", "value", "attn_mask", "query key", "query value", "key value attn_mask", "query key value"]


@pytest.mark.parametrize("by_name", [True, False])
@pytest.mark.parametrize("wanted", WANTED)
def test_attention_counts_what_wants_a_gradient_as_its_products_would(wanted, by_name):
    names = ("query", "key", "value", "attn_mask")
    tensors = {name: noise(2, 3, 3, grad=name in wanted.split()) for name in names}
    leaves = [tensors[name] for name in wanted.split()]

    def in_one(q, k, v, mask):
        given = dict(zip(names, (q, k, v, mask), strict=True))
        return F.scaled_dot_product_attention(**given) if by_name else F.scaled_dot_product_attention(q, k, v, mask)

    def written_out(q, k, v, mask):
        return torch.softmax(q @ k.mT / math.sqrt(3) + mask, -1) @ v

    found, expected = [
        torch.autograd.grad(under_preset(function)(*tensors.values()).square().sum(), leaves)
        for function in (in_one, written_out)
    ]
    closely(found, expected)


def test_softmax_needs_no_rule():
    x, r = noise(3, 5, grad=False), noise(3, 5, grad=False)
    near(relevance(lambda x: x.softmax(-1), x, r=r), through_softmax(x, x.softmax(-1), r))


@pytest.mark.parametrize("affine", [True, False])
def test_layer_norm_divides_by_a_constant(affine):
    layer = nn.LayerNorm(6, elementwise_affine=affine).double().requires_grad_(False)
    if affine:
        layer.weight.copy_(torch.randn(6))
        layer.bias.copy_(torch.randn(6))
    x, r = noise(4, 6, grad=False), noise(4, 6, grad=False)
    z, weight = layer(x), layer.weight if affine else 1
    go.override(layer, go.presets.attn_lrp)
    near(relevance(layer, x, r=r), through_layer_norm(x, weight, z, r))


def test_group_norm_divides_by_a_constant():
    layer = nn.GroupNorm(2, 4).double().requires_grad_(False)
    layer.weight.copy_(torch.randn(4))
    x = noise(3, 4, 5, grad=False)

    def with_constant(x):
        groups = x.view(3, 2, 10)
        deviation = (groups.detach().var(-1, correction=0, keepdim=True) + layer.eps).sqrt()
        return ((groups - groups.mean(-1, keepdim=True)) / deviation).view_as(x) * layer.weight[:, None] + layer.bias[
            :, None
        ]

    expected = relevance(with_constant, x, r=(r := torch.randn_like(x)))
    go.override(layer, go.presets.attn_lrp)
    near(relevance(layer, x, r=r), expected)
    assert relevance(layer, x[:0], r=r[:0]).shape == (0, 4, 5)


NORMS = {
    "layer_norm": (
        lambda x, w, b: F.layer_norm(x, (6,), w, b, 0.1),
        lambda x, w, b: torch.layer_norm(x, (6,), w, b, 0.1),
        lambda x, w, b: torch.layer_norm(x, (6,), weight=w, bias=b, eps=0.1),
        lambda x, w, b: torch.layer_norm(x, (6,), w, b, 0.1, False),
    ),
    "group_norm": (
        lambda x, w, b: F.group_norm(x, 2, w, b, 0.1),
        lambda x, w, b: torch.group_norm(x, 2, w, b, 0.1),
        lambda x, w, b: torch.group_norm(x, num_groups=2, weight=w, bias=b, eps=0.1),
    ),
}


@pytest.mark.parametrize("name", NORMS)
def test_norm_has_one_relevance_in_all_spellings(name):
    x, w, b, r = noise(4, 6, grad=False), *[noise(6, grad=False) for _ in range(2)], noise(4, 6, grad=False)
    expected, *others = [relevance(under_preset(lambda x, f=f: f(x, w, b)), x, r=r) for f in NORMS[name]]
    for found in others:
        closely(found, expected)


@pytest.mark.parametrize("kind", [nn.InstanceNorm1d, nn.InstanceNorm2d])
def test_instance_norm_divides_by_a_constant(kind):
    shape = (3, 4, 5) if kind is nn.InstanceNorm1d else (3, 4, 5, 2)
    layer = kind(4, affine=True, track_running_stats=True).double().requires_grad_(False)
    layer.weight.copy_(torch.randn(4))
    layer.running_var.copy_(torch.rand(4) + 0.5)
    x, r = noise(*shape, grad=False), noise(*shape, grad=False)
    dims = tuple(range(2, x.dim()))

    def with_constant(x):
        deviation = (x.detach().var(dims, correction=0, keepdim=True) + layer.eps).sqrt()
        weight, bias = [p.view(4, *[1] * len(dims)) for p in (layer.weight, layer.bias)]
        return (x - x.mean(dims, keepdim=True)) / deviation * weight + bias

    near(relevance(under_preset(layer), x, r=r), relevance(with_constant, x, r=r))
    layer.eval()  # with running statistics it is linear
    closely(relevance(under_preset(layer), x, r=r), relevance(layer, x, r=r))
    plain = kind(4).double()
    near(relevance(under_preset(plain), x).sum(), plain(x).sum())


def test_layer_norm_of_half_precision_has_the_deviation_of_the_whole():
    x = (torch.randn(4, 64) + 100).bfloat16().requires_grad_()
    (found,) = torch.autograd.grad(under_preset(lambda x: F.layer_norm(x, (64,)))(x)[:, 0].sum(), x)
    wide = x.detach().double()
    expected = (torch.eye(64)[0] - 1 / 64) / (wide.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    assert found.dtype is torch.bfloat16
    torch.testing.assert_close(found.double(), expected, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize(
    "norm",
    [
        lambda x: F.rms_norm(x, (6,), torch.arange(1.0, 7.0).double()),
        lambda x: x / x.square().mean(-1, keepdim=True).sqrt(),
        lambda x: F.normalize(x, dim=-1),
        lambda x: x / (x.norm(dim=-1, keepdim=True) + 0.1),
    ],
)
def test_root_mean_square_is_a_constant(norm):
    x, r = noise(4, 6, grad=False), noise(4, 6, grad=False)
    closely(relevance(under_preset(norm), x, r=r), r)


# --- in models ---


@pytest.mark.parametrize("mask", [None, torch.randn(5, 5, dtype=torch.float64)], ids=["", "mask"])
def test_attention_whose_weights_are_asked_for_has_the_same_relevance(mask):
    attention = nn.MultiheadAttention(8, 2, batch_first=True).double().requires_grad_(False)
    x, found = noise(1, 5, 8), []
    for need_weights in (True, False):
        model = Calls(lambda x, need=need_weights: attention(x, x, x, need_weights=need, attn_mask=mask)[0])
        model.inner = attention
        with go.override(model, go.presets.attn_lrp):
            found.append(torch.autograd.grad(model(x)[0, 1, 2], x)[0])
    closely(*found)


class TestActivationsOfTransformers:
    @pytest.mark.parametrize("name", ["gelu_new", "quick_gelu", "gelu_fast", "silu", "relu2", "gelu_10"])
    def test_pass_relevance_on_as_they_are_however_they_are_written(self, name):
        activations = pytest.importorskip("transformers.activations")
        model = nn.Sequential(activations.ACT2FN[name])
        x = torch.rand(8, dtype=torch.float64) + 0.1
        r = torch.randn_like(x)
        with go.override(model, go.presets.attn_lrp):
            closely(relevance(model, x, r=r), r)


class NormByHand(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(6).double())

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


class GemmaLikeRMSNorm(NormByHand):
    def forward(self, x):
        return (1 + self.weight) * x * (x.square().mean(-1, keepdim=True) + 1e-6).pow(-0.5)


def test_norm_that_is_written_out_is_refused_until_its_class_is_named():
    model, x = nn.Sequential(NormByHand()), noise(2, 6, grad=False)
    with (
        go.override(model, go.presets.attn_lrp),
        pytest.raises(
            go.UnsupportedError, match=r"attn_lrp: a normalisation must .* \{TheClass: rules.attn_identity\}"
        ),
    ):
        relevance(model, x)
    r = noise(2, 6, grad=False)
    with go.override(model, go.presets.attn_lrp | {NormByHand: rules.attn_identity}):
        closely(relevance(model, x, r=r), r)


def mean_square(x):
    return x.pow(2).mean(-1, keepdim=True)


@pytest.mark.parametrize(
    ("norm", "text"),
    [
        (lambda x: x * mean_square(x) ** -0.5, r"attn_power: the exponent must not be negative.*TheClass"),
        (lambda x: x * mean_square(x).pow(torch.tensor(-0.5)), r"attn_power: the exponent must not be negative"),
        (lambda x: x * mean_square(x).sqrt().reciprocal(), r"written out by hand with torch.rsqrt, torch.reciprocal"),
        (lambda x: torch.native_layer_norm(x, (6,), None, None, 1e-5)[0], r"attn_lrp: a normalisation must be"),
        (lambda x: F.cosine_similarity(x[:2], x[2:], dim=-1), r"F.cosine_similarity is all in one. Write \(F.norm"),
        (lambda x: x * 0.5 * (1 + torch.erf(x / 2**0.5)), r"attn_lrp: an activation must be .*hand with torch.erf"),
        (lambda x: x * torch.special.ndtr(x), r"attn_lrp: an activation must be .*hand with torch.erf"),
    ],
)
def test_what_is_written_out_or_all_in_one_is_refused(norm, text):
    with pytest.raises(go.UnsupportedError, match=text):
        relevance(under_preset(norm), noise(4, 6, grad=False))


def test_remedies_of_what_is_refused_keep_the_relevance():
    class ByHand(nn.Module):
        def forward(self, x):
            return x * 0.5 * (1 + torch.erf(x / 2**0.5))

    x, r = noise(4, 6, grad=False), noise(4, 6, grad=False)
    with go.override(model := nn.Sequential(ByHand()), go.presets.attn_lrp | {ByHand: rules.attn_identity}):
        closely(relevance(model, x, r=r), r)
    with go.override(model := Calls(torch.erf), go.presets.attn_lrp | {torch.erf: rules.attn_identity}):
        closely(relevance(model, x, r=r), r)
    cosine = under_preset(lambda x: (F.normalize(x[:2], dim=-1) * F.normalize(x[2:], dim=-1)).sum(-1))
    closely(relevance(cosine, x).sum(), F.cosine_similarity(x[:2], x[2:], dim=-1).sum())


def test_norms_and_powers_compiled_are_those_of_eager():
    def function(x):
        x = torch.layer_norm(x**2 + x, (6,), None, None, 0.1)
        return F.glu(F.softplus(x, 2.0).square(), -1).prod(-1)

    x = noise(4, 6)
    torch.compiler.reset()
    with go.override(model := Calls(function), go.presets.attn_lrp):
        (expected,) = torch.autograd.grad(model(x).sum(), x)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        closely(torch.autograd.grad(compiled(x).sum(), x)[0], expected)


def test_norm_of_a_model_is_known_by_its_name_and_its_weight_gets_no_gradient():
    model, x, r = nn.Sequential(GemmaLikeRMSNorm()), noise(2, 6, grad=False), noise(2, 6, grad=False)
    with go.override(model, go.presets.attn_lrp):
        closely(relevance(model, x, r=r), r)
        model(x.requires_grad_()).sum().backward()
    assert model[0].weight.grad is None


def test_constant_divided_by_a_result_is_refused():
    with pytest.raises(go.UnsupportedError, match="attn_quotient: what is divided must be a result"):
        relevance(under_preset(lambda x: 1 / (1 + x)), noise(3, grad=False))


def test_identity_of_what_has_another_shape_is_refused():
    with pytest.raises(go.UnsupportedError, match="attn_identity is for what has one result for each input"):
        relevance(lambda x: go.custom_backward(rules.attn_identity)(lambda x: x.sum(0, keepdim=True))(x), noise(3))


def test_what_a_model_does_not_have_is_not_warned_of():
    model, x = nn.Sequential(nn.Linear(3, 3), nn.GELU()), torch.randn(2, 3, requires_grad=True)
    with go.override(model, go.presets.attn_lrp):
        model(x).sum().backward()
