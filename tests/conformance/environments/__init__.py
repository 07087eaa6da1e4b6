"""The columns of the table, by group. A new column is one entry of the list of its group."""

from __future__ import annotations

from conformance.environment import Environment
from conformance.environments import autograd, call, compiled, copies, device, exports, threads, transforms, wraps

__all__ = ["ENVIRONMENTS", "GROUPS"]

GROUPS: dict[str, list[Environment]] = {
    "call": call.ENVIRONMENTS,
    "autograd": autograd.ENVIRONMENTS,
    "transforms": transforms.ENVIRONMENTS,
    "compile": compiled.ENVIRONMENTS,
    "copies": copies.ENVIRONMENTS,
    "wraps": wraps.ENVIRONMENTS,
    "threads": threads.ENVIRONMENTS,
    "export": exports.ENVIRONMENTS,
    "another device": device.ANOTHER,
    "cuda": device.CUDA,
}

ENVIRONMENTS = [environment for group in GROUPS.values() for environment in group]
