"""AttnLRP in whole models: gradients times inputs against relevance that is propagated by hand, layer by layer."""

import math

import pytest
import torch
import torch.nn.functional as F
from oracles import closely, noise
from torch import nn

import gradoverride as go
from gradoverride import rules
from rules.relevance import (
    near,
    relevance,
    through_layer_norm,
    through_linear,
    through_matmul,
    through_softmax,
    through_sum,
)


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


OTHERS = {
    "Llama": {"num_key_value_heads": 2},
    "Gemma": {"num_key_value_heads": 2, "head_dim": 8},
    "Qwen3": {"num_key_value_heads": 2, "head_dim": 8},
    "Bert": {},
    "ViT": {"image_size": 8, "patch_size": 4},
}


def relevance_in(name, attention, trained=False):
    """Of the input of a small model of transformers, for a number of its result."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
    words = {} if name == "ViT" else {"vocab_size": 11, "max_position_embeddings": 16}
    config = getattr(transformers, f"{name}Config")(**sizes, **words, **OTHERS[name], attn_implementation=attention)
    torch.manual_seed(7)
    model = getattr(transformers, f"{name}Model")(config).double().eval().requires_grad_(trained)
    shape, key = ((1, 3, 8, 8), "pixel_values") if name == "ViT" else ((1, 6, 16), "inputs_embeds")
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    with go.override(model, go.presets.attn_lrp):
        y = model(**{key: x}).last_hidden_state[0, -1, 0]
    return (x * torch.autograd.grad(y, x)[0]).detach()


@pytest.mark.parametrize("name", OTHERS)
def test_both_implementations_of_attention_have_the_same_relevance(name):
    found, written_out = relevance_in(name, "sdpa"), relevance_in(name, "eager")
    torch.testing.assert_close(found, written_out, rtol=1e-4, atol=1e-6)  # some have their softmax in float32


@pytest.mark.parametrize("name", OTHERS)
def test_parameters_that_are_trained_take_nothing_where_they_are_of_layers_that_are_known(name):
    closely(relevance_in(name, "sdpa", trained=True), relevance_in(name, "sdpa"))


def test_model_with_a_norm_of_its_own_is_refused_until_that_has_a_rule():
    transformers = pytest.importorskip("transformers")
    from transformers.models.t5.modeling_t5 import T5LayerNorm

    config = transformers.T5Config(d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, vocab_size=11)
    model = transformers.T5EncoderModel(config).double().eval().requires_grad_(False)
    x = torch.randn(1, 5, 16, dtype=torch.float64)

    def run(x):
        return model(inputs_embeds=x).last_hidden_state[0, -1, 0]

    with (
        go.override(model, go.presets.attn_lrp),
        pytest.raises(go.UnsupportedError, match="attn_lrp: a normalisation must be a layer that is known"),
    ):
        relevance(run, x)
    with go.override(model, go.presets.attn_lrp | {T5LayerNorm: rules.attn_identity}):
        found = relevance(run, x)
    assert found.isfinite().all()
    assert (found - relevance(run, x)).norm() > 0.1 * found.norm()  # that of the plain gradient is another


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
