"""Modules as torch and transformers have them: under a rule that gives what autograd gives, nothing changes.

Whatever such a module does with its arguments, its parameters and its parts has then gone through the engine.
"""

import pytest
import torch
from oracles import closely
from torch import nn

import gradoverride as go
from overrides.models import doubled

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*should not be instantiated:DeprecationWarning",  # Dynamo's own doing, for any Function
    "ignore:.*torch.jit.*:DeprecationWarning",
    "ignore::gradoverride.GradOverrideWarning",  # some parts are never called by their parents
    "ignore:.*enable_nested_tensor.*:UserWarning",
)


def as_it_is(grad_output, vjp):
    return vjp(grad_output)


def left_to_autograd_by_name(grad_output, vjp):
    return vjp.by_name(grad_output)


def tokens():
    return torch.randint(0, 10, (2, 5))


def sequence():
    return torch.randn(2, 5, 8, dtype=torch.float64)


def images():
    return torch.randn(2, 3, 8, 8, dtype=torch.float64)


def convolutional():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(36, 3),
    )


class Thrice(nn.Module):
    """Attention asked with one tensor three times."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, dropout=0.1)

    def forward(self, x):
        return self.attention(x, x, x)[0]


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.recurrent = kind(8, 6, 2, batch_first=True, bidirectional=True)

    def forward(self, x):
        return self.recurrent(x)[0]


class Packed(Recurrent):
    """The same of sequences of different lengths."""

    def forward(self, x):
        packed = nn.utils.rnn.pack_padded_sequence(x, [5, 3], batch_first=True)
        return nn.utils.rnn.pad_packed_sequence(self.recurrent(packed)[0])[0]


# name: (model, its argument, targets, whether torch can compile it)
OF_TORCH = {
    "convolutional": (
        convolutional,
        images,
        [nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.Dropout, "*", nn.Sequential],
        True,
    ),
    "encoder layer": (
        lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
        sequence,
        [nn.Linear, nn.MultiheadAttention, nn.LayerNorm, nn.TransformerEncoderLayer, "*"],
        True,
    ),
    "attention": (Thrice, sequence, [nn.MultiheadAttention, "*"], True),
    "LSTM": (lambda: Recurrent(nn.LSTM), sequence, [nn.LSTM], False),
    "GRU": (lambda: Recurrent(nn.GRU), sequence, [nn.GRU], False),
    "packed LSTM": (lambda: Packed(nn.LSTM), sequence, [nn.LSTM], False),
    "packed GRU": (lambda: Packed(nn.GRU), sequence, [nn.GRU], False),
    "embedding": (lambda: nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 3)), tokens, [nn.Embedding, "*"], True),
}


def of_transformers(name):
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    if name == "ResNet":
        config = transformers.ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], num_channels=3)
        return transformers.ResNetModel(config)
    if name == "ViT":
        return transformers.ViTModel(transformers.ViTConfig(**small, image_size=8, patch_size=4))
    if name == "BERT":
        return transformers.BertModel(transformers.BertConfig(**small, vocab_size=10, max_position_embeddings=10))
    config = transformers.LlamaConfig(**small, vocab_size=10, max_position_embeddings=10, num_key_value_heads=2)
    return transformers.LlamaModel(config)


OF_TRANSFORMERS = {
    "ResNet": (images, [nn.ReLU, nn.Conv2d, nn.BatchNorm2d, "encoder.stages.0", "embedder"]),
    "ViT": (images, [nn.Linear, nn.LayerNorm, "*.0"]),
    "BERT": (tokens, [nn.Linear, "encoder.layer.*", "encoder.layer.*.attention", nn.Dropout, "pooler"]),
    "Llama": (tokens, [nn.Linear, "layers.0", "layers.*.self_attn", "layers.*.mlp", "norm"]),
}


def gradients(model, run, x):
    """The gradients of all parameters and of the argument, with the same random numbers each time."""
    model.zero_grad()
    torch.manual_seed(3)
    x = x.detach().requires_grad_(x.is_floating_point())
    result = run(x)
    result = getattr(result, "last_hidden_state", result)
    (result * torch.linspace(-1, 1, result.numel(), dtype=result.dtype).view_as(result)).sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {**found, "argument": x.grad} if x.grad is not None else found


def compare(found, expected):
    assert set(found) == set(expected)
    for name, grad in expected.items():
        closely(found[name], grad)


CASES = [(name, target) for name, (_, _, targets, _) in OF_TORCH.items() for target in targets]


@pytest.mark.parametrize("rule", [as_it_is, left_to_autograd_by_name])
@pytest.mark.parametrize(("name", "target"), CASES)
def test_module_of_torch_has_its_own_gradients_under_a_rule_that_gives_them(name, target, rule):
    make, argument, _, _ = OF_TORCH[name]
    model, x = make().double(), argument()
    expected = gradients(model, model, x)
    with go.override(model, {target: rule}):
        compare(gradients(model, model, x), expected)


@pytest.mark.parametrize(("name", "target"), [case for case in CASES if OF_TORCH[case[0]][3]])
def test_module_of_torch_compiles_under_a_rule(name, target):
    make, argument, _, _ = OF_TORCH[name]
    torch.compiler.reset()
    model, x = make().double(), argument()
    expected = gradients(model, torch.compile(model, backend="aot_eager", fullgraph=True), x)
    with go.override(model, {target: as_it_is}):
        compare(gradients(model, torch.compile(model, backend="aot_eager", fullgraph=True), x), expected)


@pytest.mark.parametrize("rule", [as_it_is, left_to_autograd_by_name])
@pytest.mark.parametrize(("name", "target"), [(n, t) for n, (_, targets) in OF_TRANSFORMERS.items() for t in targets])
def test_model_of_transformers_has_its_own_gradients_under_a_rule_that_gives_them(name, target, rule):
    model, x = of_transformers(name).double(), OF_TRANSFORMERS[name][0]()
    expected = gradients(model, model, x)
    with go.override(model, {target: rule}):
        compare(gradients(model, model, x), expected)


@pytest.mark.parametrize("name", OF_TRANSFORMERS)
def test_model_of_transformers_is_called_as_ever_when_it_has_a_rule_itself(name):
    model, x = of_transformers(name).double(), OF_TRANSFORMERS[name][0]()
    expected = gradients(model, model, x)
    with go.override(model, {model: as_it_is}):
        found = gradients(model, model, x)
    unused = found.keys() - expected.keys()  # what only a part of the result comes from that is not used
    assert not any(found.pop(name).any() for name in unused)
    compare(found, expected)


@pytest.mark.parametrize("name", OF_TRANSFORMERS)
def test_rule_on_a_model_of_transformers_changes_the_gradient_below_it(name):
    model, x = of_transformers(name).double(), OF_TRANSFORMERS[name][0]()
    target = {"ResNet": "encoder", "ViT": "layernorm", "BERT": "encoder", "Llama": "norm"}[name]
    expected = gradients(model, model, x)
    with go.override(model, {target: doubled}):
        found = gradients(model, model, x)
    below = next(iter(expected))
    closely(found[below], 2 * expected[below])
