"""Where torch no longer has its private names, the engine is right, only slower."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from oracles import closely, exactly, float64, noise
from torch import nn

import gradoverride as go
from core import parts
from gradoverride._core.calls import fast, wrapper
from gradoverride._core.calls.forward_pass import ForwardPass
from gradoverride._core.private import engine, modes, tensors, transforms


def test_parts_of_that_suite_are_all_of_it():
    files = [path for part in range(parts.COUNT) for path in parts.files_of(part)]
    assert len(set(files)) == len(files) > 20
    whole = [path for folder in ("forms", "rules") for path in (parts.TESTS / folder).glob("test_*.py")]
    assert {path.relative_to(parts.TESTS).as_posix() for path in {*whole}.difference(files)} == {*parts.LEFT_OUT}
    assert len(list((parts.TESTS / "core").glob("test_fallbacks_*.py"))) == parts.COUNT


def test_fallbacks_are_what_that_suite_ran_on():
    script = "import tests.core.fallbacks; from gradoverride._core.private import engine, tensors, transforms; "
    script += "print(engine.can_call_directly(), transforms.in_functorch.__name__, tensors.use_count.__name__)"
    command = [sys.executable, "-c", script]
    run = subprocess.run(command, cwd=parts.TESTS.parent, capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False", "_probe_functorch", "<lambda>"]


def test_installed_torch_has_each_private_name_that_a_call_is_fast_by():
    fallbacks = [transforms._Tracers, transforms._Levels, type(lambda: None)]
    found = [transforms.fx_tracer, transforms.jit_tracer, transforms.dual_levels, transforms.in_functorch]
    found += [tensors.use_count, engine.keeps_graph, modes.any_autocast]
    assert [value for value in found if type(value) in fallbacks] == []
    assert None not in [
        engine._run_backward,
        engine._ENGINE_CODE,
        tensors._hooks,
        tensors._ALONE,
        transforms._transforms,
    ]
    assert engine.can_call_directly()


@pytest.mark.parametrize("forward", [lambda x: x * 2, torch.exp, torch.sign, torch.Tensor.exp])
@pytest.mark.parametrize("rule", [lambda grad_output, input: 3 * grad_output * input, None])
def test_plain_calls_take_the_short_path(rule, forward, monkeypatch):
    decorated = go.straight_through(forward) if rule is None else go.custom_backward(rule)(forward)
    for module in (wrapper, fast):
        monkeypatch.setattr(module, "differentiate", None)  # the general path: to call it would fail
    x = float64(1.0, 2.0)
    result = decorated(x)
    exactly(result, forward(x.detach()))
    result.sum().backward()
    exactly(x.grad, torch.ones_like(x) if rule is None else 3 * x.detach())


@pytest.mark.parametrize("module", [nn.ReLU(), nn.GELU("tanh"), nn.LeakyReLU(0.2), nn.Softmax(dim=-1)])
def test_calls_of_modules_without_parameters_take_it_under_vjp(module, monkeypatch):
    monkeypatch.setattr(ForwardPass, "finish", None)  # the general path: to call it would fail
    with go.override(module, {module: lambda grad_output, vjp: vjp(grad_output.clamp(min=0))}):
        x, grad = noise(2, 4, 3), noise(2, 4, 3)
        result = module(x)
        found = torch.autograd.grad(result, x, grad.view_as(result))[0]
    known = module(x)
    exactly(result, known)
    closely(found, torch.autograd.grad(known, x, grad.view_as(known).clamp(min=0))[0])


def test_a_tracer_is_seen_while_it_is_at_work():
    def look(x):
        seen.append(transforms.may_be_symbolic())
        return x * 2

    seen: list[bool] = []
    torch.fx.symbolic_trace(look)
    look(torch.ones(1))
    assert seen == [True, False]
