"""In which dtype something is computed."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["wide"]


def wide(tensor: Tensor) -> Tensor:
    """In float32 at least: half precision has too few digits for sums and squares, and no room for those of many."""
    if tensor.dtype in (torch.float16, torch.bfloat16):
        return tensor.float()
    return tensor.to(torch.complex64) if tensor.dtype is torch.complex32 else tensor
