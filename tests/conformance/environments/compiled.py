"""Group "compile": torch.compile around, inside, before and after. The reference is the hand-written twin in eager."""

from __future__ import annotations

import functools
from contextlib import ExitStack
from typing import Any

import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import maybe_enable_compiled_autograd
from torch.autograd import forward_ad
from torch.func import grad, hessian, jvp, vmap
from torch.utils.checkpoint import checkpoint

from conformance.environment import Environment, Make
from conformance.environments.call import eager, no_grad
from conformance.environments.transforms import (
    LOOSE,
    autocast,
    detached,
    dual_numbers,
    eager_on_copy,
    every,
    func_grad,
    func_hessian,
    func_jvp,
    vmap_of_grad,
    vmapped,
    without_autocast,
)
from conformance.subjects import Subject, accumulated, grads_of, loss_of, run_backward

__all__ = ["ENVIRONMENTS"]


def compiled(subject: Subject, backend: Any = "aot_eager", **options: Any) -> Subject:
    """The subject, its callable compiled in one graph."""
    subject.call = torch.compile(subject.call, backend=backend, **{"fullgraph": True, **options})
    return subject


def directly(make: Make, **options: Any) -> Any:
    return run_backward(compiled(make(), **options))


def parent(subject: Subject) -> Any:
    call = subject.call
    return lambda first, *rest: torch.sin(call(first * 2, *rest)) + call(first, *rest)


def in_parent(make: Make, **options: Any) -> Any:
    subject = make()
    subject.call = parent(subject)
    return run_backward(compiled(subject, **options))


def eager_parent(make: Make) -> Any:
    subject = make()
    subject.call = parent(subject)
    return run_backward(subject)


def several_calls(make: Make) -> Any:
    """Two forwards, then two backwards, of one graph; then again."""
    subject = compiled(make(), CompileCounterWithBackend("aot_eager"))
    first, *rest = subject.inputs
    results = [subject(), subject(first * 2, *rest)]
    for result in reversed(results):
        run_backward(subject, result)
    return accumulated(subject)


def several_in_eager(make: Make) -> Any:
    subject = make()
    first, *rest = subject.inputs
    results = [subject(), subject(first * 2, *rest)]
    for result in reversed(results):
        run_backward(subject, result)
    return accumulated(subject)


def first_called_without(make: Make) -> Any:
    """The override comes after the compilation, and after a first call of what was compiled."""
    subject = make()
    model = subject.call
    run = torch.compile(model, backend="aot_eager", fullgraph=True)
    run(*subject.inputs)
    subject.call = run
    return run_backward(subject)


def undone(make: Make) -> Any:
    """What was compiled under the override is as before when it has been left."""
    subject = make()
    run = torch.compile(subject.call, backend="aot_eager", fullgraph=True)
    with subject.scope():
        under = grads_of(loss_of(run(*subject.inputs)), subject.wanted)
    after = grads_of(loss_of(run(*subject.inputs)), subject.wanted)
    never = grads_of(loss_of(make().call(*subject.inputs)), {"input 0": subject.inputs[0]})
    return under, after["input 0"] - never["input 0"]


def never_undone(make: Make) -> Any:
    subject = make()
    return grads_of(loss_of(subject()), subject.wanted), torch.zeros_like(subject.inputs[0])


def twelve_instances(make: Make) -> Any:
    subjects = [make() for _ in range(12)]
    counter = CompileCounterWithBackend("aot_eager")
    found = []
    with ExitStack() as stack:
        for subject in subjects:
            stack.enter_context(subject.scope())
            found.append(loss_of(torch.compile(subject.call, backend=counter, fullgraph=True)(*subject.inputs)))
    return [grads_of(one, subject.wanted) for one, subject in zip(found, subjects, strict=True)], counter.frame_count


def twelve_in_eager(make: Make) -> Any:
    subjects = [make() for _ in range(12)]
    return [grads_of(loss_of(subject()), subject.wanted) for subject in subjects], 1


def dynamic_shapes(make: Make) -> Any:
    subject = make()
    counter = CompileCounterWithBackend("aot_eager")
    subject.call = torch.compile(subject.call, backend=counter, fullgraph=True, dynamic=True)
    return of_sizes(subject), counter.frame_count


def of_sizes(subject: Subject) -> Any:
    found = []
    for rows in (3, 5, 7):
        inputs = [leaf.detach().repeat(3, 1)[:rows].requires_grad_() for leaf in subject.inputs]
        wanted = {**subject.parameters, **{str(index): leaf for index, leaf in enumerate(inputs)}}
        found.append(grads_of(loss_of(subject(*inputs)), wanted))
    return found


def sizes_in_eager(make: Make) -> Any:
    return of_sizes(make()), 1


def graph_break(make: Make) -> Any:
    subject = make()
    call = subject.call

    def broken(first: Any, *rest: Any) -> Any:
        hidden = torch.sin(call(first * 2, *rest))
        torch._dynamo.graph_break()
        return hidden + call(first, *rest)

    subject.call = broken
    return run_backward(compiled(subject, fullgraph=False))


def without_gradient(make: Make) -> Any:
    return no_grad(lambda: compiled(make()))


def compiled_autograd(make: Make) -> Any:
    subject = make()
    with maybe_enable_compiled_autograd(True, fullgraph=False, dynamic=False):
        return run_backward(subject)


def compiled_autograd_of_compiled(make: Make) -> Any:
    subject = compiled(make())
    with maybe_enable_compiled_autograd(True, fullgraph=False, dynamic=False):
        return run_backward(subject)


def compiled_checkpoint(make: Make) -> Any:
    subject = make()
    call = subject.call
    subject.call = lambda first, *rest: checkpoint(call, first * 1, *rest, use_reentrant=False)
    return run_backward(compiled(subject))


def checkpoint_of_compiled(make: Make) -> Any:
    subject = compiled(make())
    call = subject.call
    first, *rest = subject.inputs
    with subject.scope():
        return run_backward(subject, checkpoint(call, first * 1, *rest, use_reentrant=False))


def compiled_transform(make: Make, transform: Any) -> Any:
    subject = make()
    with subject.scope():
        return torch.compile(transform(subject), backend="aot_eager", fullgraph=True)(*detached(subject))


def grad_of(subject: Subject) -> Any:
    return grad(lambda *inputs: loss_of(subject.call(*inputs)), argnums=every(subject))


def vmap_grad_of(subject: Subject) -> Any:
    return vmap(grad_of(subject))


def vjp_of(subject: Subject) -> Any:
    def run(*inputs: Any) -> Any:
        value, pull = torch.func.vjp(subject.call, *inputs)
        return value, pull(torch.cos(value))

    return run


def vmap_of(subject: Subject) -> Any:
    return vmap(lambda *inputs: subject.call(*inputs))  # of a module Dynamo traces no `repr`, which vmap asks for


def jvp_of(subject: Subject) -> Any:
    return lambda *inputs: jvp(subject.call, inputs, tuple([torch.cos(leaf) for leaf in inputs]))


def hessian_of(subject: Subject) -> Any:
    return hessian(lambda *inputs: loss_of(subject.call(*inputs)), argnums=every(subject))


def duals_of(subject: Subject) -> Any:
    def run(*inputs: Any) -> Any:
        with forward_ad.dual_level():
            result = forward_ad.unpack_dual(subject.call(*[forward_ad.make_dual(x, torch.cos(x)) for x in inputs]))
            return result.primal, result.tangent

    return run


def vmapped_value(make: Make) -> Any:
    subject = make()
    return vmap(subject)(*detached(subject))


def vjp_in_eager(make: Make) -> Any:
    subject = make()
    return vjp_of(Subject(subject, subject.inputs))(*detached(subject))


def transformed(make: Make, run: Any) -> Any:
    """A transform around what was compiled."""
    return run(lambda: compiled(make()))


def second_by_backward(subject: Subject) -> Any:
    """Second derivatives by `backward()`, which runs all of a graph: `autograd.grad` leaves out what leads nowhere."""
    first = grads_of(loss_of(subject()), subject.wanted, create_graph=True)
    total = loss_of([grad for grad in first.values() if grad is not None])
    (total + sum([0 * leaf.abs().sum() for leaf in subject.wanted.values()])).backward()
    return {name: None if grad is None else grad.detach() for name, grad in first.items()}, accumulated(subject)


def twice_in_compiled(make: Make) -> Any:
    return second_by_backward(compiled(make()))


def twice_in_eager(make: Make) -> Any:
    return second_by_backward(make())


def compiled_autocast(make: Make) -> Any:
    return autocast(lambda **options: compiled(make(**options)))


def hooks(make: Make) -> Any:
    subject = compiled(make())
    return with_hooks(subject)


def with_hooks(subject: Subject) -> Any:
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in subject.wanted}
    for name, leaf in subject.wanted.items():
        leaf.register_hook(lambda grad, name=name: (seen[name].append(grad.clone()), 10 * grad)[1])
    return run_backward(subject), {name: list(grads) for name, grads in seen.items()}


def hooks_in_eager(make: Make) -> Any:
    return with_hooks(make())


def retained(make: Make) -> Any:
    subject = compiled(make())
    total = loss_of(subject())
    for _ in range(2):
        total.backward(retain_graph=True)
    return accumulated(subject)


def retained_in_eager(make: Make) -> Any:
    subject = make()
    total = loss_of(subject())
    for _ in range(2):
        total.backward(retain_graph=True)
    return accumulated(subject)


ARRAYS = ("arrays compiled",)
FORWARD = ("not linear", "of arrays", *ARRAYS)
OF_COMPILED = ("transform of compiled", *ARRAYS)
partial = functools.partial
column = partial(Environment, "compile")

ENVIRONMENTS = [
    column("aot_eager", directly, eager, refusals=ARRAYS, quick=True),
    column("inductor", partial(directly, backend="inductor"), eager, refusals=ARRAYS),
    column("inside a compiled parent", in_parent, eager_parent, refusals=ARRAYS, quick=True),
    column("inside a parent, inductor", partial(in_parent, backend="inductor"), eager_parent, refusals=ARRAYS),
    column("without fullgraph", partial(directly, fullgraph=False), eager),
    column("graph break between two uses", graph_break, eager_parent),
    column("two forwards, then two backwards", several_calls, several_in_eager, refusals=ARRAYS),
    column("override after a first compiled call", first_called_without, eager, needs=("override",), quick=True),
    column("undone after compilation", undone, never_undone, needs=("override",), quick=True),
    column("12 instances are 1 graph", twelve_instances, twelve_in_eager, needs=("module",)),
    column("dynamic shapes are 1 graph", dynamic_shapes, sizes_in_eager, refusals=ARRAYS),
    column("no_grad", without_gradient, no_grad, refusals=ARRAYS),
    column("autocast", compiled_autocast, without_autocast, refusals=ARRAYS, tolerance=LOOSE),
    column("hooks on tensors", hooks, hooks_in_eager, refusals=ARRAYS),
    column("retain_graph", retained, retained_in_eager, refusals=ARRAYS),
    column("create_graph", twice_in_compiled, twice_in_eager, refusals=(*ARRAYS, "compiled twice", "of arrays")),
    column(
        "checkpoint inside",
        compiled_checkpoint,
        eager_on_copy,
        refusals=(*ARRAYS, "functions in a compiled checkpoint"),
    ),
    column("checkpoint around", checkpoint_of_compiled, eager_on_copy, refusals=(*ARRAYS, "surrogate in a checkpoint")),
    column(
        "compile(func.grad)", partial(compiled_transform, transform=grad_of), func_grad, refusals=ARRAYS, quick=True
    ),
    column(
        "compile(vmap(grad))",
        partial(compiled_transform, transform=vmap_grad_of),
        vmap_of_grad,
        refusals=ARRAYS,
    ),
    column("compile(func.vjp)", partial(compiled_transform, transform=vjp_of), vjp_in_eager, refusals=ARRAYS),
    column("compile(vmap)", partial(compiled_transform, transform=vmap_of), vmapped_value, refusals=ARRAYS),
    column("compile(jvp)", partial(compiled_transform, transform=jvp_of), func_jvp, refusals=FORWARD),
    column("compile(hessian)", partial(compiled_transform, transform=hessian_of), func_hessian, refusals=FORWARD),
    column("compile(dual numbers)", partial(compiled_transform, transform=duals_of), dual_numbers, refusals=FORWARD),
    column("func.grad of compiled", partial(transformed, run=func_grad), func_grad, refusals=OF_COMPILED),
    column("vmap(grad) of compiled", partial(transformed, run=vmap_of_grad), vmap_of_grad, refusals=OF_COMPILED),
    column("vmap of compiled", partial(transformed, run=vmapped), vmapped, refusals=OF_COMPILED),
    column("compiled autograd", compiled_autograd, eager),
    column(
        "compiled autograd of compiled",
        compiled_autograd_of_compiled,
        eager,
        refusals=(*ARRAYS, "vjp in compiled autograd"),
    ),
]
