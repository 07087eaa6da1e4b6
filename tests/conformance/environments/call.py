"""Group "call": what goes in and what comes out."""

from __future__ import annotations

from typing import Any

import torch

from conformance.bodies import BODIES
from conformance.environment import Environment, Make
from conformance.subjects import plain, run_backward

__all__ = ["ENVIRONMENTS"]


def eager(make: Make) -> Any:
    return run_backward(make())


def no_grad(make: Make) -> Any:
    subject = make()
    with torch.no_grad():
        result = subject()
    return {"value": plain(result), "requires grad": result.requires_grad}


def inference_mode(make: Make) -> Any:
    subject = make()
    with torch.inference_mode():
        result = subject()
        return {"value": plain(result), "requires grad": result.requires_grad, "is inference": result.is_inference()}


ENVIRONMENTS = [
    Environment("call", "eager", eager, quick=True),
    Environment("call", "no_grad", no_grad, quick=True),
    Environment("call", "inference_mode", inference_mode, quick=True),
    *[
        Environment(
            "call",
            body.name,
            eager,
            body=body,
            refusals=("overwritten",) if "in-place" in body.name else (),
            quick=True,
        )
        for body in BODIES
    ],
]
