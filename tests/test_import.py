"""`import gradoverride` brings what everybody needs; the rest comes when it is first used."""

from __future__ import annotations

import subprocess
import sys

import pytest

import gradoverride as go


def printed(script: str) -> str:
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_the_catalogue_and_extras_are_imported_when_they_are_used():
    script = """
import sys, gradoverride as go
late = ["gradoverride.rules", "gradoverride.safe", "gradoverride.surrogates", "gradoverride.estimators"]
late += ["gradoverride.presets", "gradoverride.plotting", "matplotlib", "wrapt", "torch._dynamo"]
print([name for name in late if name in sys.modules], go.rules.round_ste.__name__, go.safe is sys.modules[late[1]])
"""
    assert printed(script) == "[] round_ste True"


def test_what_comes_later_is_listed_and_can_be_imported_by_name():
    script = (
        "from gradoverride import plot_rule, rules, safe; import gradoverride as go; print({*go.__all__} <= {*dir(go)})"
    )
    assert printed(script) == "True"


def test_every_public_name_is_there():
    assert [name for name in go.__all__ if not hasattr(go, name)] == []


def test_a_name_that_is_not_there_is_an_error_as_of_any_module():
    with pytest.raises(AttributeError, match="module 'gradoverride' has no attribute 'rulez'"):
        _ = go.rulez


@pytest.mark.parametrize("mode", ["inference_mode", "no_grad"])
def test_import_within_a_mode_leaves_rules_as_they_are(mode):
    script = f"""
import torch
with torch.{mode}():
    import gradoverride as go
    from gradoverride import estimators, presets, rules, safe, surrogates
x = torch.ones(2, requires_grad=True)
go.custom_backward(lambda g, vjp: 2 * vjp(g))(lambda x: x * x)(x).sum().backward()
layer = torch.nn.Tanh()
with go.override(layer, {{layer: lambda grad_output, output: 3 * grad_output}}):
    layer(x).sum().backward()
grads = torch.func.grad(lambda x: go.custom_backward(lambda g, vjp: 2 * vjp(g))(lambda x: x * x)(x).sum())(x.detach())
print(x.grad.tolist(), grads.tolist())
"""
    assert printed(script) == "[7.0, 7.0] [4.0, 4.0]"
