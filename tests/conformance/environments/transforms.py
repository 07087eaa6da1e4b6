"""Group "transforms": torch.func, forward mode, checkpoints and autocast."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap
from torch.utils.checkpoint import checkpoint

from conformance.environment import Environment, Make
from conformance.subjects import Subject, loss_of, plain, run_backward

__all__ = ["ENVIRONMENTS"]


def detached(subject: Subject) -> tuple[torch.Tensor, ...]:
    return tuple([leaf.detach() for leaf in subject.inputs])


def loss(subject: Subject) -> Any:
    return lambda *inputs: loss_of(subject(*inputs))


def every(subject: Subject) -> tuple[int, ...]:
    return tuple(range(len(subject.inputs)))


def func_grad(make: Make) -> Any:
    subject = make()
    return grad(loss(subject), argnums=every(subject))(*detached(subject))


def func_vjp(make: Make) -> Any:
    subject = make()
    value, pull = vjp(subject, *detached(subject))
    return value, pull(torch.cos(value))


def vmapped(make: Make) -> Any:
    subject = make()
    return run_backward(subject, vmap(subject)(*subject.inputs))


def vmapped_elsewhere(make: Make) -> Any:
    """Over the last dimension, chunk by chunk."""
    subject = make()
    inputs = [leaf.repeat(WIDTH, 1, 1).movedim(0, -1) for leaf in subject.inputs]
    return run_backward(subject, vmap(subject, in_dims=-1, out_dims=1, chunk_size=2)(*inputs))


WIDTH = 4


def vmap_of_grad(make: Make) -> Any:
    subject = make()
    return vmap(grad(loss(subject), argnums=every(subject)))(*detached(subject))


def grad_over_vmap(make: Make) -> Any:
    subject = make()
    return grad(lambda *inputs: loss_of(vmap(subject)(*inputs)), argnums=every(subject))(*detached(subject))


def func_jacrev(make: Make) -> Any:
    subject = make()
    return jacrev(subject, argnums=every(subject))(*detached(subject))


def grad_of_grad(make: Make) -> Any:
    subject = make()
    inner = grad(loss(subject), argnums=every(subject))
    return grad(lambda *inputs: loss_of(list(inner(*inputs))), argnums=every(subject))(*detached(subject))


def func_hessian(make: Make) -> Any:
    subject = make()
    return hessian(loss(subject), argnums=every(subject))(*detached(subject))


def func_jvp(make: Make) -> Any:
    subject = make()
    return jvp(subject, detached(subject), tuple([torch.cos(leaf) for leaf in detached(subject)]))


def func_jacfwd(make: Make) -> Any:
    subject = make()
    return jacfwd(subject, argnums=every(subject))(*detached(subject))


def vmap_of_jvp(make: Make) -> Any:
    subject = make()
    inputs = detached(subject)
    return vmap(lambda *given: jvp(subject, given, tuple([leaf * 0 + 1 for leaf in given])))(*inputs)


def func_linearize(make: Make) -> Any:
    subject = make()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Attempted to insert a get_attr")  # torch's own, of what it folds
        _, push = linearize(subject, *detached(subject))
    return push(*[torch.cos(leaf) for leaf in detached(subject)])


def by_jvp(make: Make) -> Any:
    """What `linearize` gives, by `jvp`: a hand-written Function is refused there too."""
    return func_jvp(make)[1]


def dual_numbers(make: Make) -> Any:
    subject = make()
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(leaf, torch.cos(leaf)) for leaf in detached(subject)]
        result = forward_ad.unpack_dual(subject(*duals))
        return plain(result.primal), result.tangent


def called_functionally(make: Make) -> Any:
    """The tensors that are given have the gradients; those of the module have none."""
    subject = make()
    given = {name: (2 * p).detach().requires_grad_() for name, p in subject.parameters.items()}
    with subject.scope():
        result = functional_call(subject.module, given, subject.inputs)
    run_backward(subject, result)
    return {name: leaf.grad for name, leaf in given.items()}, [p.grad for p in subject.parameters.values()]


def per_sample_gradients(make: Make) -> Any:
    subject = make()
    given = {name: p.detach() for name, p in subject.parameters.items()}

    def of_one(parameters: Any, x: Any) -> Any:
        return loss_of(functional_call(subject.module, parameters, (x,)))

    with subject.scope():
        return vmap(grad(of_one, argnums=(0, 1)), in_dims=(None, 0))(given, *detached(subject))


def ensemble(make: Make) -> Any:
    subject = make()
    given = {name: torch.stack([p.detach(), 2 * p.detach()]) for name, p in subject.parameters.items()}

    def of_one(parameters: Any, x: Any) -> Any:
        return loss_of(functional_call(subject.module, parameters, (x,)))

    with subject.scope():
        return vmap(grad(of_one, argnums=(0, 1)), in_dims=(0, None))(given, *detached(subject))


def checkpointed(make: Make, *, reentrant: bool, outside: bool = False) -> Any:
    subject = make()
    first, *rest = subject.inputs
    with subject.scope():
        result = checkpoint(subject.call, first * 1, *rest, use_reentrant=reentrant)
        if not outside:
            return run_backward(subject, result)
    return run_backward(subject, result)


def eager_on_copy(make: Make) -> Any:
    subject = make()
    first, *rest = subject.inputs
    return run_backward(subject, subject(first * 1, *rest))


def autocast(make: Make) -> Any:
    subject = make(dtype=torch.float32)
    with torch.autocast(next(iter(subject.wanted.values())).device.type, dtype=torch.bfloat16):
        result = subject()
    found = run_backward(subject, result)
    return {name: value.float() for name, value in found.items()}


def without_autocast(make: Make) -> Any:
    return run_backward(make(dtype=torch.float32))


def second_mode(make: Make) -> Any:
    """A hand-written jvp of a hand-written vjp."""
    subject = make()
    inner = grad(loss(subject), argnums=every(subject))
    inputs = detached(subject)
    return jvp(lambda *given: inner(*given), inputs, tuple([torch.cos(leaf) for leaf in inputs]))[1]


FORWARD = ("not linear", "of arrays")
LOOSE = {"rtol": 5e-2, "atol": 5e-2}
close = functools.partial(Environment, "transforms", tolerance=LOOSE)

ENVIRONMENTS = [
    Environment("transforms", "func.grad", func_grad, quick=True),
    Environment("transforms", "func.vjp", func_vjp, quick=True),
    Environment("transforms", "vmap", vmapped, quick=True),
    Environment("transforms", "vmap over the last dimension, in chunks", vmapped_elsewhere, quick=True),
    Environment("transforms", "vmap(grad)", vmap_of_grad, quick=True),
    Environment("transforms", "grad over vmap", grad_over_vmap, quick=True),
    Environment("transforms", "jacrev", func_jacrev, quick=True),
    Environment("transforms", "grad of grad", grad_of_grad, refusals=("of arrays",), quick=True),
    Environment("transforms", "hessian", func_hessian, refusals=FORWARD, quick=True),
    Environment("transforms", "jvp of grad", second_mode, refusals=FORWARD, quick=True),
    Environment("transforms", "jvp", func_jvp, refusals=FORWARD, quick=True),
    Environment("transforms", "jacfwd", func_jacfwd, refusals=FORWARD, quick=True),
    Environment("transforms", "vmap(jvp)", vmap_of_jvp, refusals=FORWARD, quick=True),
    Environment(
        "transforms",
        "linearize",
        func_linearize,
        by_jvp,
        refusals=(*FORWARD, "nothing to connect"),
        quick=True,
    ),
    Environment("transforms", "dual numbers", dual_numbers, refusals=FORWARD, quick=True),
    Environment("transforms", "functional_call", called_functionally, needs=("module",), quick=True),
    Environment("transforms", "per-sample gradients", per_sample_gradients, needs=("module",), quick=True),
    Environment("transforms", "ensemble by vmap", ensemble, needs=("module",), quick=True),
    Environment(
        "transforms", "checkpoint", functools.partial(checkpointed, reentrant=False), eager_on_copy, quick=True
    ),
    Environment(
        "transforms", "reentrant checkpoint", functools.partial(checkpointed, reentrant=True), eager_on_copy, quick=True
    ),
    Environment(
        "transforms",
        "checkpoint, replayed outside of the context",
        functools.partial(checkpointed, reentrant=False, outside=True),
        eager_on_copy,
        needs=("override",),
        refusals=("replayed without",),
        quick=True,
    ),
    Environment(
        "transforms",
        "reentrant checkpoint, replayed outside of the context",
        functools.partial(checkpointed, reentrant=True, outside=True),
        eager_on_copy,
        needs=("override",),
        refusals=("reentrant",),
        quick=True,
    ),
    close("autocast", autocast, without_autocast, quick=True),
]
