"""Group "export": tracers that record a forward, to be run elsewhere. The rule goes along, or a warning says not."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from conformance.environment import Environment, Make
from conformance.subjects import Subject, loss_of, plain

__all__ = ["ENVIRONMENTS"]


class Host(nn.Module):
    """A model that calls the subject."""

    def __init__(self, subject: Subject) -> None:
        super().__init__()
        if subject.module is not None:
            self.part = subject.module
        self.call = subject.call

    def forward(self, first, second):
        return (self.call(first) if second is None else self.call(first, second)) * 2


class HostOfOne(Host):
    def forward(self, first):
        return self.call(first) * 2


def host_of(subject: Subject) -> nn.Module:
    return HostOfOne(subject) if len(subject.inputs) == 1 else Host(subject)


def gradients(traced: Any, subject: Subject) -> Any:
    """The value, and the gradients of the inputs. (Parameters may be copies.)"""
    result = traced(*subject.inputs)
    found = torch.autograd.grad(loss_of(result), subject.inputs)
    return plain(result), found


def in_eager(make: Make) -> Any:
    subject = make()
    with subject.scope():
        return gradients(host_of(subject), subject)


def traced_by(trace: Any) -> Any:
    def run(make: Make) -> Any:
        subject = make()
        given = tuple([leaf.detach() for leaf in subject.inputs])
        with subject.scope():
            return gradients(trace(host_of(subject), given), subject)

    return run


def itself(make: Make) -> Any:
    """The model that is traced is the subject itself."""
    subject = make()
    with subject.scope():
        return gradients(torch.fx.symbolic_trace(subject.module), subject)


def itself_in_eager(make: Make) -> Any:
    subject = make()
    with subject.scope():
        return gradients(subject.module, subject)


def gradient_traced(make: Make) -> Any:
    """make_fx of a function that takes the gradient itself."""
    subject = make()

    def gradient(*inputs: Any) -> Any:
        return torch.func.grad(lambda *inputs: loss_of(subject.call(*inputs)), tuple(range(len(inputs))))(*inputs)

    with subject.scope():
        return make_fx(gradient)(*[leaf.detach() / 2 for leaf in subject.inputs])(*subject.inputs)


def gradient_in_eager(make: Make) -> Any:
    subject = make()
    return torch.autograd.grad(loss_of(subject()), subject.inputs)


def exported(strict: bool) -> Any:
    return traced_by(lambda model, given: torch.export.export(model, given, strict=strict).module())


def symbolic(model: nn.Module, given: Any) -> Any:
    return torch.fx.symbolic_trace(model)


def retraced(model: nn.Module, given: Any) -> Any:
    """A graph that was traced is a model, and is traced again."""
    return torch.fx.symbolic_trace(torch.fx.symbolic_trace(model))


def through_make_fx(mode: str) -> Any:
    return traced_by(lambda model, given: make_fx(model, tracing_mode=mode, _allow_non_fake_inputs=True)(*given))


def jit_traced(model: nn.Module, given: Any) -> Any:
    return torch.jit.trace(model, given)


def jit_traced_function(make: Make) -> Any:
    subject = make()
    given = tuple([leaf.detach() for leaf in subject.inputs])
    return gradients(torch.jit.trace(lambda *inputs: subject.call(*inputs), given), subject)


def scripted(model: nn.Module, given: Any) -> Any:
    return torch.jit.script(model)


column = functools.partial(Environment, "export")
ENVIRONMENTS = [
    column("torch.export", exported(strict=False), in_eager, refusals=("recorded",), quick=True),
    column("torch.export, strict", exported(strict=True), in_eager, refusals=("recorded", "arrays compiled")),
    column("fx.symbolic_trace", traced_by(symbolic), in_eager, quick=True),
    column("fx.symbolic_trace of what was traced", traced_by(retraced), in_eager, quick=True),
    column(
        "fx.symbolic_trace of the form itself",
        itself,
        itself_in_eager,
        needs=("module",),
        refusals=("root",),
        quick=True,
    ),
    column("make_fx", through_make_fx("real"), in_eager, refusals=("recorded",), quick=True),
    column("make_fx, fake", through_make_fx("fake"), in_eager, refusals=("recorded",), quick=True),
    column("make_fx of the gradient", gradient_traced, gradient_in_eager, refusals=("arrays compiled",), quick=True),
    column("jit.trace", traced_by(jit_traced), in_eager, refusals=("recorded",), quick=True),
    column(
        "jit.trace of a function",
        jit_traced_function,
        gradient_in_eager,
        needs=("function",),
        refusals=("recorded",),
        quick=True,
    ),
]
