"""Group "autograd": the ways to ask for a gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks

from conformance.environment import Environment, Make
from conformance.subjects import accumulated, grads_of, leaves_of, loss_of, run_backward

__all__ = ["ENVIRONMENTS"]


def grad_of_input(make: Make) -> Any:
    subject = make()
    wanted = {name: leaf for name, leaf in subject.wanted.items() if name.startswith("input")}
    found = grads_of(loss_of(subject()), wanted)
    return found, accumulated(subject)


def grad_of_parameter(make: Make) -> Any:
    subject = make()
    found = grads_of(loss_of(subject()), subject.parameters)
    return found, accumulated(subject)


def backward_with_inputs(make: Make) -> Any:
    subject = make()
    loss_of(subject()).backward(inputs=[*subject.inputs[:1]])
    return accumulated(subject)


def accumulation(make: Make) -> Any:
    subject = make()
    for _ in range(3):
        run_backward(subject)
    return accumulated(subject)


def reused(make: Make) -> Any:
    subject = make()
    first, *rest = subject.inputs
    return run_backward(subject, subject(subject(first * 0.5, *rest), *rest) + first)


def two_then_two(make: Make) -> Any:
    subject = make()
    first, *rest = subject.inputs
    results = [subject(), subject(first * 2, *rest)]
    for result in reversed(results):
        run_backward(subject, result)
    return accumulated(subject)


def retain_twice(make: Make) -> Any:
    subject = make()
    loss = loss_of(subject())
    for _ in range(3):
        loss.backward(retain_graph=True)
    return accumulated(subject)


def freed(make: Make) -> Any:
    """A second backward through a freed graph raises, by torch, where something was saved."""
    subject = make()
    loss = subject().sum()  # which itself saves nothing
    loss.backward()
    try:
        loss.backward()
    except RuntimeError as error:
        return "second time" in str(error)
    return False


def create_graph(make: Make) -> Any:
    subject = make()
    first = grads_of(loss_of(subject()), subject.wanted, create_graph=True)
    loss = loss_of([grad for grad in first.values() if grad is not None])
    second = grads_of(loss + sum([0 * leaf.abs().sum() for leaf in subject.wanted.values()]), subject.wanted)
    return first, {
        name: torch.zeros_like(leaf) if (g := second[name]) is None else g for name, leaf in subject.wanted.items()
    }


def anomaly_mode(make: Make) -> Any:
    subject = make()
    with torch.autograd.detect_anomaly(check_nan=True):
        return run_backward(subject)


def tensor_hooks(make: Make) -> Any:
    subject = make()
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in subject.wanted}
    for name, leaf in subject.wanted.items():
        leaf.register_hook(lambda grad, name=name: (seen[name].append(grad.clone()), 10 * grad)[1])
    result = subject()
    result.register_hook(lambda grad: 2 * grad)
    return run_backward(subject, result), {name: list(grads) for name, grads in seen.items()}


def accumulate_hooks(make: Make) -> Any:
    subject = make()
    seen = []
    for name, leaf in subject.wanted.items():
        leaf.register_post_accumulate_grad_hook(lambda leaf, name=name: seen.append((name, leaf.grad.clone())))
    run_backward(subject)
    return sorted(seen, key=lambda pair: pair[0])


def module_hooks(make: Make) -> Any:
    subject = make()
    assert subject.module is not None
    seen = []
    subject.module.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    subject.module.register_forward_hook(lambda module, args, result: result * 3)
    subject.module.register_full_backward_hook(
        lambda module, given, out: seen.append((given[0].clone(), out[0].clone()))
    )
    subject.module.register_full_backward_pre_hook(lambda module, out: (out[0] * 5,))
    return run_backward(subject), list(seen)


def offload(make: Make) -> Any:
    """Saved tensors are packed into arrays."""
    subject = make()

    def pack(tensor: torch.Tensor) -> Any:
        return tensor.detach().cpu().numpy().copy(), tensor.device

    def unpack(packed: Any) -> torch.Tensor:
        array, device = packed
        return torch.from_numpy(array).to(device)

    with saved_tensors_hooks(pack, unpack):
        result = subject()
    return run_backward(subject, result)


def frozen_parameters(make: Make) -> Any:
    subject = make()
    for parameter in subject.parameters.values():
        parameter.requires_grad_(False)
    return run_backward(subject), [parameter.grad for parameter in subject.parameters.values()]


def some_frozen(make: Make) -> Any:
    subject = make()
    for parameter in list(subject.parameters.values())[::2]:
        parameter.requires_grad_(False)
    return run_backward(subject)


def input_without_grad(make: Make) -> Any:
    subject = make()
    subject.inputs[0].requires_grad_(False)
    return run_backward(subject)


def in_dtype(dtype: torch.dtype) -> Any:
    return lambda make: run_backward(make(dtype=dtype))


def noncontiguous(make: Make) -> Any:
    subject = make()
    first, *rest = subject.inputs
    transposed = run_backward(subject, subject(first.t().contiguous().t(), *rest))
    return transposed, run_backward(subject, subject(first[:, [3, 1, 0, 2]].flip(0), *rest))


def undefined_gradient(make: Make) -> Any:
    """No gradient comes: the result is not used for the loss."""
    subject = make()
    _ = subject()
    loss = subject.inputs[0].sum() + 0 * sum(leaf.sum() for leaf in leaves_of(list(subject.wanted.values())))
    loss.backward()
    return accumulated(subject)


ENVIRONMENTS = [
    Environment("autograd", "autograd.grad of an input", grad_of_input, quick=True),
    Environment("autograd", "autograd.grad of a parameter", grad_of_parameter, needs=("module",), quick=True),
    Environment("autograd", "backward(inputs=...)", backward_with_inputs, quick=True),
    Environment("autograd", "accumulation", accumulation, quick=True),
    Environment("autograd", "used twice in one graph", reused, quick=True),
    Environment("autograd", "two forwards, then two backwards", two_then_two, quick=True),
    Environment("autograd", "retain_graph, three times", retain_twice, quick=True),
    Environment("autograd", "second backward without retain_graph", freed, quick=True),
    Environment("autograd", "create_graph", create_graph, refusals=("of arrays",), quick=True),
    Environment("autograd", "anomaly mode", anomaly_mode, quick=True),
    Environment("autograd", "hooks on tensors", tensor_hooks, quick=True),
    Environment("autograd", "hooks after accumulation", accumulate_hooks, quick=True),
    Environment("autograd", "hooks on modules", module_hooks, needs=("module",), quick=True),
    Environment("autograd", "saved_tensors_hooks", offload, quick=True),
    Environment("autograd", "frozen parameters", frozen_parameters, needs=("module",), quick=True),
    Environment("autograd", "some parameters frozen", some_frozen, needs=("module",), quick=True),
    Environment("autograd", "input without grad, parameters with", input_without_grad, needs=("module",), quick=True),
    Environment("autograd", "complex128", in_dtype(torch.complex128), needs=("complex",), quick=True),
    Environment("autograd", "bfloat16", in_dtype(torch.bfloat16), quick=True),
    Environment("autograd", "float16", in_dtype(torch.float16), quick=True),
    Environment("autograd", "float32", in_dtype(torch.float32), quick=True),
    Environment("autograd", "strided inputs", noncontiguous, quick=True),
    Environment("autograd", "a result that is not used", undefined_gradient, quick=True),
]
