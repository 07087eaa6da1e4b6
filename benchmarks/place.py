"""Where everything is measured: the processor, or the device of `--device`."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

__all__ = ["device_name", "here", "leaf", "measure_on", "noise", "ones", "put_here", "wait"]

M = TypeVar("M", bound=nn.Module)

_devices = [torch.device("cpu")]


def measure_on(name: str) -> None:
    """From now on everything is built on this device. Raises what torch says where there is none."""
    torch.empty(0, device=name)
    _devices[:] = [torch.device(name)]


def here() -> torch.device:
    return _devices[0]


def device_name() -> str:
    """What the device calls itself."""
    return torch.cuda.get_device_name(here()) if here().type == "cuda" else here().type


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, device=here())


def ones(*shape: int) -> Tensor:
    return torch.ones(*shape, device=here())


def leaf(*shape: int) -> Tensor:
    return noise(*shape).requires_grad_()


def put_here(module: M) -> M:
    return module.to(here())


def wait() -> None:
    """Until what has been asked of the device is done: a call comes back before that."""
    if here().type == "cuda":
        torch.cuda.synchronize(here())
