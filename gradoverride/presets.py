"""Ready-made registries of rules, for `override`.

>>> import torch, gradoverride as go
>>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1))
>>> x = torch.rand(4, requires_grad=True)
>>> with go.override(model, go.presets.guided_backprop):
...     model(x).sum().backward()

Each is published under its name too: `go.override(model, "guided_backprop")`.

The LRP composites (`epsilon_plus`, `epsilon_alpha2_beta1`, `epsilon_gamma_box`) are for dense layers, convolutions,
pooling and activations, in chains and with residual connections: all activations of torch with one result for each
input, as modules and as functions, pass the relevance on, and so does what scales by a constant; max pooling gives it
to the largest, as its gradient does; sums, differences and averages that are no modules divide it as dense layers do
(`x + f(x)`, `x.mean((2, 3))`, `F.avg_pool2d`). Normalisations are refused with an `UnsupportedError` until they have a
rule: merge those of batches into the layer before. All else has its gradient, which is no relevance: gates (`F.glu`, a
product of two results, or of one and a parameter that is not frozen), softmax, recurrent layers, and other linear
functions that are not modules. All normalisations of batches are merged in the copy that
`torch.fx.experimental.optimization.fuse(model.eval())` gives. Without a model (`override("epsilon_plus")`) a sum over
the results is one of these sums too: leave the context before it.

The rules of `deeplift` and `attn_lrp` ask for the input of activations, those of the composites for the sums before
them, and refuse one in place, as most models of torchvision and timm have it:

>>> for module in model.modules():
...     if hasattr(module, "inplace"):
...         module.inplace = False
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from gradoverride import rules
from gradoverride._core.private.dynamo import fail
from gradoverride.errors import UnsupportedError
from gradoverride.registries import Registry

__all__ = [
    *("guided_backprop", "deconvnet", "deeplift"),
    *("epsilon_plus", "epsilon_alpha2_beta1", "epsilon_gamma_box"),
    "attn_lrp",
]

_CONVOLUTIONS = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)
# All of torch with one result for each number that comes in. (A class stands for those derived from it.)
_ACTIVATIONS = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish),
    *(nn.Tanh, nn.Sigmoid, nn.LogSigmoid, nn.Softplus, nn.Softsign, nn.Hardtanh, nn.Hardsigmoid, nn.Hardswish),
    *(nn.Hardshrink, nn.Softshrink, nn.Tanhshrink, nn.Threshold),
)
_ACTIVATION_FUNCTIONS = (
    *(F.relu, F.relu6, F.leaky_relu, F.rrelu, F.elu, F.celu, F.selu, F.gelu, F.silu, F.mish),
    *(torch.tanh, torch.sigmoid, F.logsigmoid, F.softplus, F.softsign, F.hardtanh, F.hardsigmoid, F.hardswish),
    *(F.hardshrink, F.softshrink, F.tanhshrink, F.threshold),
)

guided_backprop = Registry("guided_backprop")
"""Guided backpropagation: ReLUs in all spellings pass positive gradients alone, where their input is positive."""
guided_backprop.register(nn.ReLU, F.relu)(rules.guided_relu)

deconvnet = Registry("deconvnet")
"""A deconvolutional network: ReLUs in all spellings pass positive gradients alone."""
deconvnet.register(nn.ReLU, F.relu)(rules.deconv_relu)

deeplift = Registry("deeplift")
"""DeepLIFT, the rescale rule for activations: `rules.deeplift_rescale` tells how the reference is given.

All activations of torch with one result for each input are known, as modules and as functions. What has several inputs
for a result has its gradient: gates (`F.glu`, a product of two results), softmax, max pooling.
"""
deeplift.register(*_ACTIVATIONS, *_ACTIVATION_FUNCTIONS)(rules.deeplift_rescale())


@deeplift.register(F.prelu, optional=True)
def _rescale_of_prelu(grad_output: Any, input: Any, output: Any, vjp: Any) -> Any:
    """Of the first of its two tensors; the slope has its gradient."""
    found, of_slope = vjp(grad_output)
    return rules.deeplift_rescale()(grad_output, input, output, lambda _: found), of_slope


_AVERAGES = (
    *(nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
)


def _identity_of_prelu(grad_output: Any) -> Any:
    """For the first of its two tensors; the slope has no relevance."""
    return grad_output, None


_AVERAGE_FUNCTIONS = (
    *(F.avg_pool1d, F.avg_pool2d, F.avg_pool3d, F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d),
    *(torch.mean, torch.sum),
)


def _epsilon_of_average(grad_output: Any, input: Any, output: Any, vjp: Any) -> Any:
    """What `rules.lrp_epsilon` gives for a module."""
    return input * vjp(grad_output / _stabilised(output))


def _epsilon_of_sum(grad_output: Any, other: Any, output: Any, needs: Any, vjp: Any, alpha: Any = 1) -> Any:
    """The same for a sum of two. What is written into in place is gone, but is what the sum has more than the other."""
    share = grad_output / _stabilised(output)
    parts = {"input": (output - alpha * other) * share, "other": other * share}
    return {name: vjp.by_name(part)[name] for name, part in parts.items() if needs[name]}


def _epsilon_of_difference(grad_output: Any, other: Any, output: Any, needs: Any, vjp: Any, alpha: Any = 1) -> Any:
    """The same for a difference."""
    return _epsilon_of_sum(grad_output, other, output, needs, vjp, -alpha)


def _identity_of_scaling(grad_output: Any, other: Any, needs: Any, vjp: Any) -> Any:
    """For what is scaled by constants; a product of two results has its gradient."""
    gradients = vjp.by_name(grad_output)
    wanted = [name for name in ("input", "other") if needs[name]]
    if len(wanted) == 1:
        (name,) = wanted
        return {name: grad_output.sum_to_size(gradients[name].shape)}
    return {name: gradients[name] for name in wanted}


def _stabilised(output: Any) -> Any:
    return torch.where(output < 0, output - 1e-6, output + 1e-6)


_NORMALISATIONS = (F.batch_norm, F.layer_norm, F.group_norm, F.instance_norm, F.local_response_norm, F.rms_norm)


def _refuse_normalisation(grad_output: Any) -> Any:
    fail(
        UnsupportedError,
        "an LRP composite: a normalisation must be merged into the layer before it or have a rule, for its gradient is "
        "no relevance; one has neither. Merge it (torch.nn.utils.fuse_conv_bn_eval, fuse_linear_bn_eval), or add a "
        "rule: epsilon_plus | {torch.nn.BatchNorm2d: rules.lrp_identity}",
    )


def _composite(name: str, convolution: Any) -> Registry:
    """LRP-epsilon for dense layers and averages, another rule for convolutions; activations pass the relevance on."""
    registry = Registry(name)
    registry.register(*_ACTIVATIONS, *_ACTIVATION_FUNCTIONS)(rules.lrp_identity)
    registry.register(F.prelu, optional=True)(_identity_of_prelu)
    registry.register(nn.Linear, *_AVERAGES, optional=True)(rules.lrp_epsilon())
    registry.register(*_AVERAGE_FUNCTIONS, optional=True)(_epsilon_of_average)
    registry.register(torch.add, optional=True)(_epsilon_of_sum)
    registry.register(torch.sub, optional=True)(_epsilon_of_difference)
    registry.register(torch.mul, torch.div, optional=True)(_identity_of_scaling)
    registry.register(torch.neg, optional=True)(rules.lrp_identity)
    registry.register(*_CONVOLUTIONS, optional=True)(convolution)
    registry.register(*_NORMALISATIONS, optional=True)(_refuse_normalisation)
    return registry


epsilon_plus = _composite("epsilon_plus", rules.lrp_z_plus)
"""LRP: epsilon for dense layers, z-plus for convolutions (Montavon et al. 2019)."""

epsilon_alpha2_beta1 = _composite("epsilon_alpha2_beta1", rules.lrp_alpha_beta(2.0, 1.0))
"""LRP: epsilon for dense layers, alpha-beta (2, 1) for convolutions (Lapuschkin et al. 2017)."""


def epsilon_gamma_box(first: Any, low: Any, high: Any) -> Registry:
    """LRP: epsilon for dense layers, gamma for convolutions, z-box for the first layer (Montavon et al. 2019).

    `first` is the target that names the first layer, such as `"features.0"`, whose inputs lie between `low` and `high`
    (numbers, or tensors that broadcast to the input): no registry can know these.

    >>> import gradoverride as go
    >>> go.presets.epsilon_gamma_box("0", low=0.0, high=1.0).name
    'epsilon_gamma_box'
    """
    registry = _composite("epsilon_gamma_box", rules.lrp_gamma())
    registry.register(first)(rules.lrp_z_box(low, high))
    return registry


attn_lrp = Registry("attn_lrp")
"""AttnLRP for transformers (Achtibat et al. 2024). Relevance is the input times its gradient: `rules/attention.py`.

The activations of torch and of transformers, and classes whose names end with `RMSNorm`, are known. Another
normalisation that is written out, with `torch.rsqrt`, `torch.reciprocal` or a power, and an activation that is, with
`torch.erf`, are refused in the backward until their class has a rule:
`go.presets.attn_lrp | {T5LayerNorm: rules.attn_identity}`. Where a model multiplies with a parameter itself, freeze it;
`rules.attn_product` says why. Batch normalisation is linear in `eval()` alone. All functions of torch that are products
of two results are known, but for `torch.addmm`, convolutions and `F.linear`, which are dense layers, and `torch.lerp`.
`F.cosine_similarity` is refused. All other functions have their gradient: right if they are linear in all the results
together that they are given.
"""


def _is_of_one_scale(name: str, module: Any) -> bool:
    """An RMSNorm, whoever wrote it, or an activation of transformers: one input for each result."""
    cls = type(module)
    return cls.__name__.endswith("RMSNorm") or cls.__module__ == "transformers.activations"


def _refuse_by_hand(grad_output: Any) -> Any:
    fail(
        UnsupportedError,
        "attn_lrp: a normalisation must be a layer that is known, F.layer_norm, F.group_norm, F.instance_norm, "
        "F.rms_norm or a class '...RMSNorm', for its divisor to be a constant; one is written out by hand with "
        "torch.rsqrt, torch.reciprocal or a native function of torch. If it divides by a root mean square, give its "
        "class a rule: attn_lrp | {TheClass: rules.attn_identity}",
    )


def _refuse_erf(grad_output: Any) -> Any:
    fail(
        UnsupportedError,
        "attn_lrp: an activation must be one that is known, F.gelu or a class of transformers, for all its relevance "
        "to pass; one is written out by hand with torch.erf. Give its class a rule, or its function by its path: "
        "attn_lrp | {TheClass: rules.attn_identity}; if it is torch.erf alone, {torch.erf: rules.attn_identity}",
    )


def _refuse_cosine(grad_output: Any) -> Any:
    fail(
        UnsupportedError,
        "attn_lrp: a similarity must be written as a product of what is divided by its norm, for the norms to be "
        "constants; F.cosine_similarity is all in one. Write (F.normalize(a, dim=-1) * F.normalize(b, dim=-1)).sum(-1)",
    )


def _shared_alike(grad_output: Any, input: Any, output: Any, vjp: Any) -> Any:
    """Of a product of numbers of one result: each has its share, as in `attn_product`."""
    return vjp(grad_output * (output.numel() / max(1, input.numel())))


attn_lrp.register(*_ACTIVATIONS, *_ACTIVATION_FUNCTIONS, optional=True)(rules.attn_identity)
attn_lrp.register(F.rms_norm, _is_of_one_scale, torch.square, optional=True)(rules.attn_identity)
attn_lrp.register(torch.pow, torch.float_power, optional=True)(rules.attn_power)
attn_lrp.register(
    *(torch.mul, torch.matmul, torch.bmm, torch.mm, torch.mv, torch.dot, torch.inner, torch.outer, torch.einsum),
    *(torch.tensordot, torch.linalg.multi_dot, torch.vdot, torch.linalg.vecdot, torch.kron, torch.cross),
    *(torch.linalg.cross, getattr(torch, "chain_matmul", torch.linalg.cross)),  # torch is going to remove it
    optional=True,
)(rules.attn_product)
attn_lrp.register(torch.baddbmm, torch.addbmm, torch.addcmul, torch.addmv, torch.addr, optional=True)(
    rules.attn_sum_of_products
)
attn_lrp.register(torch.prod, optional=True)(_shared_alike)
attn_lrp.register(F.bilinear, optional=True)(rules.attn_bilinear)
attn_lrp.register(F.glu, optional=True)(rules.attn_glu)
attn_lrp.register(F.scaled_dot_product_attention, optional=True)(rules.attn_attention)
attn_lrp.register(F.layer_norm, optional=True)(rules.attn_layer_norm)
attn_lrp.register(F.group_norm, optional=True)(rules.attn_group_norm)
attn_lrp.register(F.instance_norm, optional=True)(rules.attn_instance_norm)
attn_lrp.register(torch.div, optional=True)(rules.attn_quotient)
attn_lrp.register(
    *(torch.rsqrt, torch.reciprocal, torch.native_layer_norm, torch.native_group_norm, torch.instance_norm),
    optional=True,
)(_refuse_by_hand)
attn_lrp.register(torch.erf, torch.erfc, torch.special.ndtr, optional=True)(_refuse_erf)
attn_lrp.register(F.cosine_similarity, optional=True)(_refuse_cosine)
