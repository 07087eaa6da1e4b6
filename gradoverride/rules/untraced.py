"""Rules that look at values, draw numbers or have an effect: in compiled code such a rule is one node of the graph."""

from __future__ import annotations

import itertools
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from gradoverride._core.private import evaluated_while_tracing
from gradoverride.errors import UnsupportedError

__all__ = ["untraced"]


def untraced(rule: Any, grad: Tensor, place: str = "") -> Tensor:
    """`rule.untraced(grad, place)`, which Dynamo is not to look into."""
    if torch.compiler.is_dynamo_compiling():
        return _run_rule(grad, _keep(rule), place)
    found: Tensor = rule.untraced(grad, place)
    return found


@torch.library.custom_op(
    "gradoverride::run_rule", mutates_args=(), schema="(Tensor grad, int key, str place) -> Tensor"
)
def _run_rule(grad: Tensor, key: int, place: str) -> Tensor:
    found: Tensor = _kept[key].untraced(grad, place).contiguous()
    return found.clone() if found is grad else found  # torch wants a new one


@_run_rule.register_fake
def _like(grad: Tensor, key: int, place: str) -> Tensor:
    return torch.empty_like(grad, memory_format=torch.contiguous_format)


_kept: dict[int, Any] = {}  # rules in compiled code, which knows them by these numbers
_keys = itertools.count()


@evaluated_while_tracing
def _keep(rule: Any) -> int:
    if not all([hasattr(rule, option.name) for option in fields(rule)]):  # Dynamo has not run what makes it
        raise UnsupportedError(
            f"{type(rule).__name__}: it must be made outside of the code that is compiled; it was made within"
        )
    key = next(_keys)  # another one at each place, or two calls on one gradient would be taken for the same
    _kept[key] = rule
    return key
