"""Group "wraps": other parties that change the same module, before and after."""

from __future__ import annotations

import functools
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm

from conformance.environment import Environment, Make
from conformance.subjects import Subject, grads_of, loss_of, run_backward

__all__ = ["ENVIRONMENTS"]


class Doubling(nn.Module):
    def forward(self, weight):
        return 2 * weight


def host_of(subject: Subject) -> tuple[nn.Module, str]:
    """The module that has the first parameter, and its name there."""
    name = next(iter(subject.parameters))
    path, _, leaf = name.rpartition(".")
    assert subject.module is not None
    return subject.module.get_submodule(path), leaf


def parametrized_before(make: Make) -> Any:
    subject = make()
    parametrize.register_parametrization(*host_of(subject), Doubling())
    return run_backward(subject)


def parametrized_within(make: Make, *, removed_within: bool) -> Any:
    """Parametrized while the override is in force, and used; then both go, in either order, and it is used again."""
    subject = make()
    host, name = host_of(subject)
    with subject.scope():
        parametrize.register_parametrization(host, name, Doubling())
        under = grads_of(loss_of(subject.call(*subject.inputs)), subject.wanted)
        if removed_within:
            parametrize.remove_parametrizations(host, name)
    if not removed_within:
        parametrize.remove_parametrizations(host, name)
    return under, run_backward(subject), type(host).__name__ in (type(host).__qualname__, "x")


def weight_normed(make: Make) -> Any:
    subject = make()
    host, name = host_of(subject)
    if host._parameters[name].ndim < 2:
        with torch.no_grad():  # a norm of each number would leave its sign alone
            host._parameters[name] = nn.Parameter(host._parameters[name].expand(3, -1).clone())
    with subject.scope():
        weight_norm(host, name)
        under = grads_of(loss_of(subject.call(*subject.inputs)), subject.wanted)
    return under, sorted(subject.parameters)


def forward_wrapped(make: Make, *, first: str) -> Any:
    """As accelerate does it: a `forward` on the instance, around the one that was there."""
    subject = make()
    module: Any = subject.module
    if first == "wrap":
        wrap(module)
        return run_backward(subject)
    with subject.scope():
        wrap(module)
        under = run_backward(subject, module(*subject.inputs))
        unwrap(module)
    return under, run_backward(subject)


def wrap(module: Any) -> None:
    old = module.forward

    @functools.wraps(old)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return 5 * old(*args, **kwargs)

    module._old_forward, module.forward = old, forward


def unwrap(module: Any) -> None:
    del module.forward, module._old_forward


def exception_inside(make: Make) -> Any:
    """The override is gone after an exception: what is computed then is what was without it."""
    subject = make()
    plain = grads_of(loss_of(subject.call(*subject.inputs)), subject.wanted)
    before = state_of(subject.module)
    try:
        with subject.scope():
            run_backward(subject)
            raise KeyError("user")
    except KeyError:
        pass
    after = grads_of(loss_of(subject.call(*subject.inputs)), subject.wanted)
    return {name: after[name] - plain[name] for name in plain}, before == state_of(subject.module)


def undisturbed(make: Make) -> Any:
    return {name: torch.zeros_like(leaf) for name, leaf in make().wanted.items()}, True


def out_of_order(make: Make) -> Any:
    """Two overrides of the same kind, the first removed before the second; then the second."""
    subject = make()
    before = state_of(subject.module)
    first, second = subject.scope(), subject.scope()
    first.__enter__()
    with ExitStack() as stack:
        second.__enter__()
        stack.callback(second.__exit__, None, None, None)
        subject.call(*subject.inputs)
        first.__exit__(None, None, None)
        left = run_backward(subject, subject.call(*subject.inputs))
    return left, before == state_of(subject.module)


def once(make: Make) -> Any:
    return run_backward(make()), True


def state_of(module: Any) -> Any:
    return [
        (type(one), sorted(one.__dict__), [id(p) for p in one._parameters.values()], list(one.state_dict()))
        for one in module.modules()
    ]


ENVIRONMENTS = [
    Environment("wraps", "parametrized before", parametrized_before, needs=("module",), quick=True),
    Environment(
        "wraps",
        "parametrized after, removed first",
        functools.partial(parametrized_within, removed_within=True),
        needs=("module",),
        quick=True,
    ),
    Environment(
        "wraps",
        "parametrized after, removed last",
        functools.partial(parametrized_within, removed_within=False),
        needs=("module",),
        quick=True,
    ),
    Environment("wraps", "weight_norm", weight_normed, needs=("module",), quick=True),
    Environment(
        "wraps",
        "forward wrapped before",
        functools.partial(forward_wrapped, first="wrap"),
        needs=("module",),
        refusals=("forward on the instance",),
        quick=True,
    ),
    Environment(
        "wraps",
        "forward wrapped after",
        functools.partial(forward_wrapped, first="form"),
        needs=("module",),
        quick=True,
    ),
    Environment(
        "wraps", "exception inside of the context", exception_inside, undisturbed, needs=("override",), quick=True
    ),
    Environment("wraps", "removal out of order", out_of_order, once, needs=("override",), quick=True),
]
