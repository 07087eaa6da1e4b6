"""The `self` of a `backward(self, grad_output)`, which collects what is assigned to the `grad` of its parameters.

A live `self.weight.grad = ...` overwrites what was accumulated, skips hooks, is out of reach of `autograd.grad`, and
two threads meet in it. Collected, it is a gradient like any other.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gradoverride._core.autograd.aliases import carry_data, copy_attributes, places_of, share_attributes
from gradoverride._core.modules.snapshot import Snapshot
from gradoverride._core.modules.stale import Stale
from gradoverride._core.modules.standin import Copied, stand_in, write_back
from gradoverride._core.private.dynamo import versions_while_tracing
from gradoverride._core.private.modes import in_modes
from gradoverride._core.private.transforms import in_functorch

__all__ = ["Collector"]


class Collector:
    """A stand-in for the module of a `backward`, and what that assigned to the `grad` of its parameters."""

    def __init__(
        self,
        module: Any,
        frozen: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        params: Mapping[str, tuple[list[str], Tensor]],
        *,
        traced: bool,
        changes: Mapping[str, Snapshot],
        attributes: Sequence[str],
    ) -> None:
        self.params: dict[str, Tensor] = {}
        # The `grad` of each that is a plain alias. If it is another tensor, or was written into, it was assigned.
        self.before: dict[str, Tensor] = {}
        self.traced = torch.compiler.is_dynamo_compiling()  # the backward alone: compiled autograd
        traced = traced or self.traced
        self.tensors = [tensor for _, tensor in params.values()]
        for name, (_, tensor) in params.items():
            # Dynamo knows no properties on tensors, a DTensor is no other subclass besides, and modes that operations
            # are shown to (those of compiled autograd, of FLOP counters) do not know ours.
            if traced or type(tensor) not in (Tensor, nn.Parameter) or in_modes():
                self.params[name] = tensor.detach()
                if not in_functorch():
                    self.params[name].requires_grad_()
                if not traced and torch.is_grad_enabled() and tensor.requires_grad:  # for second derivatives
                    self.params[name] = tensor.view_as(tensor)
                    if not in_functorch():
                        self.params[name].retain_grad()  # or torch warns of a look at its `grad`
                self.params[name].grad = self.before[name] = torch.zeros_like(tensor)
            elif torch.is_grad_enabled() or in_functorch():
                self.params[name] = tensor.view_as(tensor).as_subclass(_Collected)
            else:  # a leaf, or `backward` could not ask for the gradient of what it computes from it
                self.params[name] = tensor.detach().as_subclass(_Collected).requires_grad_()
            if isinstance(self.params[name], _Collected):
                self.params[name].__dict__ = tensor.__dict__
        self.versions = self._versions()
        self.places: list[int] = []
        if not traced:
            share_attributes([*self.params.values()], self.tensors)
            self.places = [] if in_functorch() else places_of(self.tensors)
        elif attributes:
            live = dict(module.named_parameters())
            known = [name for name in self.params if name in live]
            copy_attributes([live[name] for name in known], [self.params[name] for name in known], attributes)
        # A frozen parameter is assigned to as well, and has no gradient to be collected.
        aliases = {name: _alias(tensor) for name, tensor in frozen.items()}
        self.lent = [*self.params.values(), *aliases.values()]
        tensors = {**buffers, **aliases}
        for name, (names, _) in params.items():
            tensors.update(dict.fromkeys(names, self.params[name]))
        self.copied: list[Copied] = []
        self.stand_in = stand_in(module, tensors, self.copied, changes=changes)

    def collected(self) -> dict[str, Any]:
        """By name, the gradients that were assigned. Plain attributes that were are given to the module."""
        write_back(self.copied)
        if self.places:
            carry_data([*self.params.values()], self.tensors, self.places)
        written = dict(zip(self.before, map(operator.ne, self.versions, self._versions()), strict=True))
        return {n: param.grad for n, param in self.params.items() if written.get(n) or self._was_assigned(n, param)}

    def _versions(self) -> Sequence[int]:
        given = list(self.before.values())
        return versions_while_tracing(given) if self.traced else [tensor._version for tensor in given]

    def _was_assigned(self, name: str, param: Tensor) -> bool:
        if name in self.before:
            return param.grad is not self.before[name]
        return hasattr(param, "collected") or param.grad is not None


class _Collected(Tensor):
    """A parameter on the stand-in of a `backward`: what is assigned to its `grad` is collected, and nothing else.

    And what a backward within the `backward` accumulates there, as recomputation does: torch's own `grad` has it.
    """

    __slots__ = ("collected",)  # its other attributes are those of the parameter

    # As for nn.Parameter: operations on it are those of Tensor, and give plain tensors.
    __torch_function__ = nn.Parameter.__torch_function__

    @property
    def grad(self) -> Any:
        accumulated = _OWN_GRAD.__get__(self) if self.is_leaf else None
        given = getattr(self, "collected", None)
        return given if accumulated is None else accumulated if given is None else given + accumulated

    @grad.setter
    def grad(self, value: Any) -> None:
        self.collected = value
        if self.is_leaf:
            _OWN_GRAD.__set__(self, None)

    @grad.deleter
    def grad(self) -> None:
        self.grad = None  # as torch has it


_OWN_GRAD: Any = Tensor.grad


def _alias(tensor: Tensor) -> Tensor:
    if isinstance(tensor, Stale):
        return tensor
    alias = tensor.detach()
    if not torch.compiler.is_dynamo_compiling():
        share_attributes((alias,), (tensor,))
    return alias
