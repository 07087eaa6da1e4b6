"""AttnLRP: gradients times inputs against relevance that is propagated by hand, layer by layer, as in the paper."""

import math

import pytest
import torch
import torch.nn.functional as F
from oracles import closely, exactly, noise
from torch import nn

import gradoverride as go
from gradoverride import rules

NEAR = {"rtol": 1e-8, "atol": 1e-10}  # of quotients by sums that nearly cancel


def near(found, expected):
    torch.testing.assert_close(found, expected, **NEAR)


# --- the paper's rules, of relevance (with an epsilon of 0) ---


def through_linear(x, weight, z, r):
    """z = x @ weight.T, perhaps with a bias, which keeps its share."""
    return x * ((r / z) @ weight)


def through_sum(a, b, r):
    return a * r / (a + b), b * r / (a + b)


def through_matmul(a, b, r):
    """Half for each: the uniform rule."""
    part = r / (2 * (a @ b))
    return a * (part @ b.mT), b * (a.mT @ part)


def through_softmax(x, s, r):
    return torch.where(s == 0, 0, x * (r - s * r.sum(-1, keepdim=True)))


def through_layer_norm(x, weight, z, r, eps=1e-5):
    """A linear layer, of the matrix that takes the mean off and divides by the deviation there is."""
    n = x.shape[-1]
    deviation = (x.var(-1, correction=0, keepdim=True) + eps).sqrt()
    center = torch.eye(n, dtype=x.dtype) - 1 / n
    return x * ((r / z * weight / deviation) @ center)


def relevance(run, *inputs, r=None):
    """What the rules give: the gradient times each input, for a relevance r of the result."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    y = run(*leaves)
    start = torch.ones_like(y) if r is None else r / y.detach()
    found = torch.autograd.grad(y, leaves, start)
    parts = [(leaf * grad).detach() for leaf, grad in zip(leaves, found, strict=True)]
    return parts[0] if len(parts) == 1 else parts


# --- rule by rule ---

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


PRODUCTS = {
    "matmul": (torch.matmul, torch.matmul),
    "bmm": (torch.bmm, torch.matmul),
    "einsum": (lambda a, b: torch.einsum("bij,bjk->bik", a, b), torch.matmul),
    "@": (lambda a, b: a @ b, torch.matmul),
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


# --- models ---


def llama(attention):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=11,
        max_position_embeddings=16,
        attn_implementation=attention,
    )
    torch.manual_seed(7)
    model = transformers.LlamaForCausalLM(config).double().eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.copy_(torch.randn_like(parameter) * 0.4 + (parameter.dim() == 1))
    return model


def rotated(x, cos, sin):
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def through_rotation(x, cos, sin, r):
    part = r / rotated(x, cos, sin)
    first, second = (part * sin).chunk(2, -1)
    return x * (part * cos + torch.cat([second, -first], -1))


class LlamaByHand:
    """The forward of the model, and the relevance of its inputs; `kept` is what the softmaxes keep of it."""

    def __init__(self, model):
        self.model = model
        self.kept = 0.0

    def heads(self, x):
        return x.unflatten(-1, (-1, 4)).transpose(0, 1)

    def attention(self, layer, x):
        q, k, v = [self.heads(x @ getattr(layer, f"{name}_proj").weight.T) for name in "qkv"]
        turned_q, turned_k = rotated(q, *self.turn), rotated(k, *self.turn)
        keys, values = [part.repeat_interleave(2, 0) for part in (turned_k, v)]
        scores = turned_q @ keys.mT / 2
        weights = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -math.inf).softmax(-1)
        mixed = weights @ values
        flat = mixed.transpose(0, 1).flatten(1)
        result = flat @ layer.o_proj.weight.T

        def back(r):
            r = self.heads(through_linear(flat, layer.o_proj.weight, result, r))
            r_weights, r_values = through_matmul(weights, values, r)
            r_scores = through_softmax(scores, weights, r_weights)
            self.kept += (r_weights.sum() - r_scores.sum()).item()
            r_q, r_keys = through_matmul(turned_q, keys.mT, r_scores)
            r_k = r_keys.mT.unflatten(0, (2, 2)).sum(1)
            of_values = r_values.unflatten(0, (2, 2)).sum(1)
            parts = zip(
                "qkv",
                (q, k, v),
                (through_rotation(q, *self.turn, r_q), through_rotation(k, *self.turn, r_k), of_values),
                strict=True,
            )
            return sum(
                [
                    through_linear(
                        x,
                        getattr(layer, f"{name}_proj").weight,
                        z.transpose(0, 1).flatten(1),
                        r.transpose(0, 1).flatten(1),
                    )
                    for name, z, r in parts
                ]
            )

        return result, back

    def mlp(self, layer, x):
        gate, up = x @ layer.gate_proj.weight.T, x @ layer.up_proj.weight.T
        product = F.silu(gate) * up
        result = product @ layer.down_proj.weight.T

        def back(r):
            r = through_linear(product, layer.down_proj.weight, result, r) / 2
            return through_linear(x, layer.gate_proj.weight, gate, r) + through_linear(x, layer.up_proj.weight, up, r)

        return result, back

    def run(self, embedded, token):
        model = self.model.model
        positions = torch.arange(len(embedded))[None]
        self.turn = [part[0] for part in model.rotary_emb(embedded[None], positions)]
        x, steps = embedded, []
        for layer in model.layers:
            for norm, part, block in (
                (layer.input_layernorm, layer.self_attn, self.attention),
                (layer.post_attention_layernorm, layer.mlp, self.mlp),
            ):
                added, back = block(part, norm(x))  # the norm passes relevance on as it is
                steps.append((x, added, back))
                x = x + added
        last = model.norm(x)
        logit = last[-1] @ self.model.lm_head.weight[token]
        r = torch.zeros_like(x)
        r[-1] = last[-1] * self.model.lm_head.weight[token]
        for before, added, back in reversed(steps):
            r_before, r_added = through_sum(before, added, r)
            r = r_before + back(r_added)
        return logit, r


def embedded(n=6):
    torch.manual_seed(8)
    return torch.randn(n, 16, dtype=torch.float64)


TOKEN = 3


def relevance_of_tokens(run, x):
    leaf = x[None].clone().requires_grad_()
    logit = run(inputs_embeds=leaf, use_cache=False).logits[0, -1, TOKEN]
    return logit.detach(), (leaf * torch.autograd.grad(logit, leaf)[0])[0].detach()


def test_relevance_in_llama_is_that_of_the_paper_by_hand():
    model, x = llama("sdpa"), embedded()
    by_hand = LlamaByHand(model)
    logit, expected = by_hand.run(x, TOKEN)
    with go.override(model, go.presets.attn_lrp):
        found_logit, found = relevance_of_tokens(model, x)
    near(found_logit, logit)
    near(found, expected)
    _, plain = relevance_of_tokens(model, x)
    assert (plain - expected).norm() > 0.1 * expected.norm()


def test_relevance_in_llama_sums_to_the_logit_but_for_what_softmaxes_keep():
    model, x = llama("sdpa"), embedded()
    by_hand = LlamaByHand(model)
    by_hand.run(x, TOKEN)
    with go.override(model, go.presets.attn_lrp):
        logit, found = relevance_of_tokens(model, x)
    near(found.sum() + by_hand.kept, logit)


def test_relevance_of_one_token_alone_is_conserved():
    model, x = llama("sdpa"), embedded(1)  # its softmaxes are of one number, and keep what their scores would get
    by_hand = LlamaByHand(model)
    _, expected = by_hand.run(x, TOKEN)
    with go.override(model, go.presets.attn_lrp):
        logit, found = relevance_of_tokens(model, x)
    near(found, expected)
    near(found.sum() + by_hand.kept, logit)


def test_both_implementations_of_attention_have_the_same_relevance():
    x, found = embedded(), []
    for attention in ("sdpa", "eager"):
        model = llama(attention)
        with go.override(model, go.presets.attn_lrp):
            found.append(relevance_of_tokens(model, x)[1])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)  # eager has its softmax in float32


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo's own doing
def test_compiled_it_is_that_of_eager():
    torch.compiler.reset()
    model, x = Encoder(norm_first=True), noise(1, 5, 8)
    with go.override(model, go.presets.attn_lrp):
        (expected,) = torch.autograd.grad(model(x)[0, 2, 3], x)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        (found,) = torch.autograd.grad(compiled(x)[0, 2, 3], x)
    closely(found, expected)


class Encoder(nn.Module):
    """Two layers of torch's own, or attention written by `nn.MultiheadAttention` with its weights asked for."""

    def __init__(self, **options):
        super().__init__()
        torch.manual_seed(9)
        layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True, activation=F.gelu, **options)
        self.layer = layer.double().requires_grad_(False)
        for parameter in layer.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5 + (parameter.dim() == 1))

    def forward(self, x):
        return self.layer(x)


def encoder_by_hand(layer, x, index):
    """The result at `index`, its relevance, and what biases and softmaxes keep of it. (Normalisation comes first.)"""
    attention, kept = layer.self_attn, 0.0

    def kept_by(before, after):
        nonlocal kept
        kept += (before.sum() - sum([part.sum() for part in after])).item()
        return after

    normed = layer.norm1(x)
    projected = normed @ attention.in_proj_weight.T + attention.in_proj_bias
    q, k, v = [part.unflatten(-1, (2, 4)).transpose(0, 1) for part in projected.chunk(3, -1)]
    scores = q @ k.mT / 2
    weights = scores.softmax(-1)
    mixed = (weights @ v).transpose(0, 1).flatten(1)
    attended = attention.out_proj(mixed)
    middle = x + attended
    normed_middle = layer.norm2(middle)
    hidden = layer.linear1(normed_middle)
    acted = F.gelu(hidden)
    made = layer.linear2(acted)
    y = middle + made
    r = torch.zeros_like(y)
    r[index] = y[index]
    r_middle, r_made = through_sum(middle, made, r)
    (r_acted,) = kept_by(r_made, [through_linear(acted, layer.linear2.weight, made, r_made)])
    (r_normed,) = kept_by(r_acted, [through_linear(normed_middle, layer.linear1.weight, hidden, r_acted)])
    (r_norm,) = kept_by(r_normed, [through_layer_norm(middle, layer.norm2.weight, normed_middle, r_normed)])
    r_x, r_attended = through_sum(x, attended, r_middle + r_norm)
    (r_mixed,) = kept_by(r_attended, [through_linear(mixed, attention.out_proj.weight, attended, r_attended)])
    r_weights, r_v = through_matmul(weights, v, r_mixed.unflatten(-1, (2, 4)).transpose(0, 1))
    (r_scores,) = kept_by(r_weights, [through_softmax(scores, weights, r_weights)])
    r_q, r_kt = through_matmul(q, k.mT, r_scores)
    r_projected = torch.cat([part.transpose(0, 1).flatten(1) for part in (r_q, r_kt.mT, r_v)], -1)
    (r_normed,) = kept_by(r_projected, [through_linear(normed, attention.in_proj_weight, projected, r_projected)])
    (r_norm,) = kept_by(r_normed, [through_layer_norm(x, layer.norm1.weight, normed, r_normed)])
    return y[index], r_x + r_norm, kept


def test_relevance_in_an_encoder_of_torch_is_that_of_the_paper_by_hand():
    model, x = Encoder(norm_first=True), noise(5, 8, grad=False)
    y, expected, kept = encoder_by_hand(model.layer, x, (2, 3))
    with go.override(model, go.presets.attn_lrp):
        leaf = x[None].clone().requires_grad_()
        result = model(leaf)[0, 2, 3]
        found = (leaf * torch.autograd.grad(result, leaf)[0])[0].detach()
    near(result.detach(), y)
    near(found, expected)
    near(found.sum() + kept, y)


def gradient_in_an_encoder(model, x):
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(model(leaf)[0, 2, 3], leaf)[0]


@pytest.mark.filterwarnings("ignore:.*batching rule for aten:UserWarning")  # torch's, of its attention kernel
def test_under_transforms_it_is_that_of_autograd():
    model, x = Encoder(norm_first=True), noise(1, 5, 8, grad=False)
    with go.override(model, go.presets.attn_lrp):
        expected = gradient_in_an_encoder(model, x)
        grad = torch.func.grad(lambda x: model(x)[0, 2, 3])
        closely(grad(x), expected)
        closely(torch.func.vmap(grad)(torch.stack([x, x + 1]))[0], expected)


@pytest.mark.parametrize(("dtype", "precision"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_in_other_dtypes(dtype, precision):
    model, x = Encoder(norm_first=True), noise(1, 5, 8, grad=False)
    with go.override(model, go.presets.attn_lrp):
        expected = gradient_in_an_encoder(model, x)
        found = gradient_in_an_encoder(model.to(dtype), x.to(dtype))
    assert found.dtype is dtype
    assert (found.double() - expected).norm() < precision * expected.norm()


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
