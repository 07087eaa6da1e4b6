"""Rules that look at values, draw numbers or have an effect: in compiled code such a rule is one node of the graph."""

from __future__ import annotations

import itertools
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from gradoverride._core.private.dynamo import as_dynamo_hands_on
from gradoverride._core.private.marks import evaluated_while_tracing
from gradoverride.errors import UnsupportedError
from gradoverride.rules.each import Each

__all__ = ["Drawing", "Untraced", "untraced"]


class Untraced(Each):
    """A rule that says as `untraced` what becomes of one gradient: Dynamo does not look into that."""

    def of(self, grad: Tensor) -> Tensor:
        return untraced(self, grad)

    def untraced(self, grad: Tensor) -> Tensor:
        raise NotImplementedError


class Drawing(Untraced):
    """One that draws numbers from its `generator`. Torch's own (None) Dynamo knows, and looks into that."""

    generator: torch.Generator | None

    def of(self, grad: Tensor) -> Tensor:
        return self.untraced(grad) if self.generator is None else untraced(self, grad)


def untraced(rule: Any, grad: Tensor, *more: Any) -> Tensor:
    """`rule.untraced(grad, *more)`, which Dynamo is not to look into."""
    if torch.compiler.is_dynamo_compiling():
        return _run_rule(grad, _keep(rule, *more))
    found: Tensor = rule.untraced(grad, *more)
    return found


@torch.library.custom_op("gradoverride::run_rule", mutates_args=(), schema="(Tensor grad, int key) -> Tensor")
def _run_rule(grad: Tensor, key: int) -> Tensor:
    rule, *more = _kept[key]
    found: Tensor = rule.untraced(grad, *more).contiguous()
    return found.clone() if found is grad else found  # torch wants a new one


@_run_rule.register_fake
def _like(grad: Tensor, key: int) -> Tensor:
    return torch.empty_like(grad, memory_format=torch.contiguous_format)


# Rules in compiled code, which knows them by these numbers, with what else each is given there.
_kept: dict[int, tuple[Any, ...]] = {}
_keys = itertools.count()


@evaluated_while_tracing
def _keep(rule: Any, *more: Any) -> int:
    if not all([hasattr(rule, option.name) for option in fields(rule)]):  # Dynamo has not run what makes it
        text = f"{type(rule).__name__}: it must be made outside of the code that is compiled; it was made within"
        raise as_dynamo_hands_on(UnsupportedError(text))
    key = next(_keys)  # another one at each place, or two calls on one gradient would be taken for the same
    _kept[key] = (rule, *more)
    return key
