"""A user's own forward mode, `custom_backward(rule, jvp=...)`: it takes precedence over the rule transposed."""

import pytest
import torch
from oracles import closely, exactly, noise
from torch import nn
from torch.func import functional_call, hessian, jacfwd, jvp, vmap

import gradoverride as go


def clip(grad_output):
    return grad_output.clamp(-0.1, 0.1)  # not linear: forward mode would be refused


@pytest.fixture
def x():
    return noise(4, grad=False)


def test_tangent_of_one_argument_comes_bare(x):
    ours = go.custom_backward(clip, jvp=lambda tangent: 5 * tangent)(lambda x: 2 * x)
    value, found = jvp(ours, (x,), (x * 3,))
    exactly(value, 2 * x)
    closely(found, 15 * x)
    exactly(jacfwd(ours)(x), 5 * torch.eye(4, dtype=torch.float64))


def test_tangents_of_several_come_in_order_and_values_by_name(x):
    def product_jvp(tangents, a, b):
        tangent_a, tangent_b = tangents
        return 2 * tangent_a * b + 3 * tangent_b * a

    ours = go.custom_backward(lambda grad_output: (grad_output, None), jvp=product_jvp)(lambda a, b: a * b)
    tangents = noise(4, grad=False), noise(4, grad=False)
    closely(jvp(ours, (x, x + 1), tangents)[1], 2 * tangents[0] * (x + 1) + 3 * tangents[1] * x)
    closely(jvp(lambda b: ours(x, b), (x,), (tangents[1],))[1], 3 * tangents[1] * x)  # the other one is zero


def test_values_that_only_forward_mode_asks_for_are_not_kept_for_backward(x):
    ours = go.custom_backward(lambda grad_output: grad_output, jvp=lambda tangent, x: tangent * x)(lambda x: x * 1)
    result = ours(x.clone().requires_grad_())
    assert result.grad_fn.saved_tensors == ()
    exactly(jvp(ours, (x,), (x,))[1], x * x)


def test_reverse_mode_is_the_rules(x):
    ours = go.custom_backward(clip, jvp=lambda tangent: 5 * tangent)(lambda x: 2 * x)
    exactly(torch.func.grad(lambda x: ours(x).sum())(x), torch.full_like(x, 0.1))


def test_under_vmap_and_in_a_hessian(x):
    ours = go.custom_backward(lambda grad_output, x: grad_output * 3 * x**2, jvp=lambda tangent, x: tangent * 3 * x**2)(
        lambda x: torch.floor(x)
    )
    closely(vmap(lambda x, t: jvp(ours, (x,), (t,))[1])(x[:, None], x[:, None]), 3 * x[:, None] ** 3)
    closely(hessian(lambda x: ours(x).sum())(x), (6 * x).diag())


def test_results_in_a_structure(x):
    ours = go.custom_backward(
        lambda grad_output: grad_output["a"], jvp=lambda tangent, output: {"a": tangent * output["a"], "text": None}
    )(lambda x: {"a": 2 * x, "text": "text"})
    exactly(jvp(lambda x: ours(x)["a"], (x,), (x,))[1], 2 * x * x)


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(noise(4, grad=False))

    def forward_jvp(tangents, x, weight):
        return 2 * tangents["x"] * weight + 3 * tangents["weight"] * x

    @go.custom_backward(lambda grad_output, x, weight: {"x": grad_output, "weight": grad_output}, jvp=forward_jvp)
    def forward(self, x):
        return x * self.weight


def test_tangents_of_a_module_come_by_name(x):
    module, tangent = Scale(), noise(4, grad=False)
    weight = module.weight.detach()
    found = jvp(lambda x, weight: functional_call(module, {"weight": weight}, (x,)), (x, weight), (tangent, x))[1]
    closely(found, 2 * tangent * weight + 3 * x * x)


def test_wrong_tangent_is_an_error_with_both_shapes(x):
    ours = go.custom_backward(clip, jvp=lambda tangent: tangent.sum())(lambda x: 2 * x)
    with pytest.raises(
        go.RuleResultError, match=r"jvp '<lambda>'.* must return the tangent .*\(4,\); it returned .*\(\)"
    ):
        jvp(ours, (x,), (x,))


def test_an_exception_in_it_passes_with_a_note(x):
    ours = go.custom_backward(clip, jvp=lambda tangent: tangent.nowhere)(lambda x: 2 * x)
    with pytest.raises(AttributeError, match="nowhere") as error:
        jvp(ours, (x,), (x,))
    assert error.value.__notes__[0].startswith("in the rule 'clip' (")


def test_names_that_belong_to_a_backward_are_refused_at_once():
    with pytest.raises(go.RuleSignatureError, match=r"jvp .* asks for 'vjp', which belongs to a backward"):
        go.custom_backward(clip, jvp=lambda tangent, vjp: vjp(tangent))(lambda x: 2 * x)
    with pytest.raises(go.RuleSignatureError, match="'scale'"):
        go.custom_backward(clip, jvp=lambda tangent, scale: tangent)(lambda x: 2 * x)


def test_what_is_no_function_is_refused():
    with pytest.raises(go.DecorationError, match="'jvp' must be a function of the tangents"):
        go.custom_backward(clip, jvp=3)
    with pytest.raises(go.DecorationError, match=r"'jvp' goes with a rule; it came with a class .*\(rule, jvp="):
        go.custom_backward(Scale, jvp=clip)
