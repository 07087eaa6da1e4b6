"""What a cell works on: a form made ready to be called, or the same computation by hand."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Subject", "grads_of", "leaves_of", "loss_of", "run_backward", "weights_for"]


@dataclasses.dataclass
class Subject:
    """A callable, its inputs, and what must be in force while it is called."""

    call: Callable[..., Any]
    inputs: tuple[Tensor, ...] = ()  # leaves that require grad
    module: nn.Module | None = None
    scope: Callable[[], AbstractContextManager[Any]] = nullcontext
    # For the cells of the group "call": how the inputs become arguments.
    arguments: Callable[..., tuple[tuple[Any, ...], dict[str, Any]]] = lambda *inputs: (inputs, {})

    @property
    def parameters(self) -> dict[str, Tensor]:
        return {} if self.module is None else dict(self.module.named_parameters())

    @property
    def wanted(self) -> dict[str, Tensor]:
        """All that a gradient is asked for."""
        given = {f"input {index}": tensor for index, tensor in enumerate(self.inputs) if tensor.requires_grad}
        return {**given, **{name: p for name, p in self.parameters.items() if p.requires_grad}}

    def __call__(self, *inputs: Any) -> Any:
        """The result, with the override in force while it is computed."""
        args, kwargs = self.arguments(*(inputs or self.inputs))
        with self.scope():
            return self.call(*args, **kwargs)


def leaves_of(value: Any) -> list[Tensor]:
    """The floating and complex tensors in a result, in order."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() or value.is_complex() else []
    if isinstance(value, dict):
        return [leaf for part in value.values() for leaf in leaves_of(part)]
    if isinstance(value, (tuple, list)):
        return [leaf for part in value for leaf in leaves_of(part)]
    return []


def weights_for(tensor: Tensor) -> Tensor:
    """Fixed numbers like `tensor`, of both signs, and no two alike: the gradient that is sent back."""
    steps = torch.arange(tensor.numel(), dtype=torch.float64)
    return (torch.cos(steps * 1.3) * 1.5).reshape(tensor.shape).to(tensor)


def loss_of(result: Any) -> Tensor:
    """A real number that all of the result counts in."""
    parts = [(leaf * weights_for(leaf)).sum() for leaf in leaves_of(result)]
    total: Any = sum(parts)
    return total.real if total.is_complex() else total


def grads_of(loss: Tensor, wanted: dict[str, Tensor], **options: Any) -> dict[str, Tensor | None]:
    """Gradients by name, by `torch.autograd.grad`."""
    found = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True, **options)
    return dict(zip(wanted, found, strict=True))


def run_backward(subject: Subject, result: Any = None) -> dict[str, Any]:
    """The value, and by `backward()` the gradients of all that wants one."""
    result = subject() if result is None else result
    loss_of(result).backward()
    return {"value": plain(result), **accumulated(subject)}


def accumulated(subject: Subject) -> dict[str, Tensor | None]:
    return {name: None if leaf.grad is None else leaf.grad.clone() for name, leaf in subject.wanted.items()}


def plain(value: Any) -> Any:
    """A result for comparison: its tensors without a graph."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, (tuple, list)):
        return [plain(part) for part in value]
    return value


def alike(tensors: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
    return tuple([tensor.detach().to(dtype).requires_grad_() for tensor in tensors])
