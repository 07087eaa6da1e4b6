"""What an alias has in common with its tensor besides the values: what Python code puts on it, and gives it as `data`.

A forward runs on aliases. The attributes that it finds there (a step size, a learning rate) are those of the tensor,
also those that it sets; and where it has given an alias other `data`, the tensor gets that too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gradoverride._core.private.tensors import shares_memory

__all__ = [
    *("alias_of", "carry_data", "copy_attributes", "counted_with", "has_other_data", "is_laid_out_as", "places_of"),
    "share_attributes",
]


def alias_of(tensor: Tensor, copied: bool) -> Tensor:
    """One for a forward that is traced or transformed; with values of its own, where it may write into it."""
    return tensor.detach().clone() if copied else tensor.detach()


def share_attributes(aliases: Sequence[Tensor], tensors: Sequence[Tensor]) -> None:
    """Have each alias bear the attributes of its tensor. (What a class of tensors keeps in its own ones is left.)"""
    for alias, tensor in zip(aliases, tensors, strict=True):
        if alias is not tensor and type(alias) is Tensor:
            alias.__dict__ = tensor.__dict__


def copy_attributes(sources: Sequence[Tensor], targets: Sequence[Tensor], names: Sequence[str]) -> None:
    """Give each target the attributes with these names that its source has: Dynamo knows no others."""
    for source, target in zip(sources, targets, strict=True):
        if source is not target:
            for name in names:
                if hasattr(source, name):
                    setattr(target, name, getattr(source, name))


def places_of(tensors: Sequence[Tensor]) -> list[int]:
    """Where the data of eager tensors are. 0 where there are none, or not at one place."""
    return [tensor.data_ptr() if type(tensor) in _PLAIN and tensor.layout is torch.strided else 0 for tensor in tensors]


def carry_data(aliases: Sequence[Tensor], tensors: Sequence[Tensor], before: Sequence[int]) -> list[int]:
    """Give each tensor the `data`, or the layout, that its alias was given since both were at the place `before`.

    Gives the indices of those that were given any.
    """
    carried = []
    for index, (alias, tensor, place) in enumerate(zip(aliases, tensors, before, strict=True)):
        if alias is not tensor and place and _has_other_data(alias, tensor, place):
            tensor.data = alias.data
            carried.append(index)
    return carried


def counted_with(result: Tensor, aliases: Sequence[Tensor], tensors: Sequence[Tensor]) -> Tensor:
    """`result`, or if it lies in the memory of an alias that counts for itself, what counts writes with the tensor:
    else nobody would see that its values have become others when that is written into after the call.
    """
    if result.requires_grad or any([result is alias for alias in aliases]):
        return result
    for alias, tensor in zip(aliases, tensors, strict=True):
        if alias is not tensor and shares_memory(result, alias):
            counted = tensor.detach()
            counted.data = result  # its place, its strides, its dtype; the counter stays that of the tensor
            return counted.view_as(counted) if result._is_view() else counted  # torch looks after views
    return result


def has_other_data(alias: Tensor, tensor: Tensor) -> bool:
    """Whether an alias no longer lies where its tensor does."""
    (place,) = places_of((tensor,))
    return place != 0 and _has_other_data(alias, tensor, place)


def is_laid_out_as(alias: Tensor, tensor: Tensor) -> bool:
    """Whether an eager alias still has the shape and the strides of its tensor, which `t_` and its like change."""
    return alias.shape == tensor.shape and (alias.layout is not torch.strided or alias.stride() == tensor.stride())


def _has_other_data(alias: Tensor, tensor: Tensor, place: int) -> bool:
    now = alias.data_ptr()
    if now != place:
        return now != 0  # or it was freed, as FSDP does
    # The tensor may have been moved meanwhile, which is no doing of the forward's.
    return not is_laid_out_as(alias, tensor) and tensor.data_ptr() == place


_PLAIN = (Tensor, nn.Parameter)
