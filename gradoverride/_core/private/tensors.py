"""Tensors, and the nodes of their graph: versions, owners, what is saved, hooks on results."""

from __future__ import annotations

import contextlib
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.autograd import Function
from torch.autograd.graph import saved_tensors_hooks
from torch.func import debug_unwrap

__all__ = [
    "made_at_import",
    "version_of",
    "counted_once",
    "use_count",
    "has_memory_alone",
    "shares_memory",
    "saves_plainly",
    "hooks_on_saved",
    "hooks_over_others",
    "results_of",
    "function_of",
    "is_freed",
    "hook_on_result",
]


def made_at_import(*shape: int, requires_grad: bool = False) -> torch.Tensor:
    """A tensor of zeros for all calls to come: one made in inference mode, where this may be imported, would be refused
    by each of them.
    """
    with torch.inference_mode(False):
        return torch.zeros(shape, requires_grad=requires_grad)


def version_of(tensor: torch.Tensor) -> int | None:
    """How often the tensor has been written into. None of one from `inference_mode`, which does not count."""
    inner = debug_unwrap(tensor)
    return None if inner.is_inference() else inner._version


# Sets the versions of tensors. Without it aliases of what a forward may write into have version counters of their own.
_set_versions: Any = getattr(torch._C._autograd, "_unsafe_set_version_counter", None)


@contextlib.contextmanager
def _counted_once(tensors: Sequence[torch.Tensor]) -> Iterator[None]:
    """Have `mark_dirty` count the writes of a forward that has counted them already, so that what is saved of the
    result, and what a kept graph has saved of it before, are of one version.
    """
    versions = [tensor._version for tensor in tensors]
    _set_versions(tensors, [version - 1 for version in versions])
    try:
        yield
    finally:
        _set_versions(tensors, versions)  # tensors that share a counter have counted on


counted_once = None if _set_versions is None else _counted_once

# How many C++ owners a tensor has. Without it a result is taken for shared, and detached.
use_count: Callable[[torch.Tensor], int] = getattr(torch.Tensor, "_use_count", lambda tensor: 2)


def has_memory_alone(view: torch.Tensor) -> bool:
    """Whether nobody else has what this is a view of: a tensor that was made on the way to it, and let go. Without the
    counts it is taken for somebody's.
    """
    return _ALONE is not None and type(view) is torch.Tensor and _owners(view) == _ALONE


def _owners(view: torch.Tensor) -> tuple[int, int, int]:
    """How many there are in Python, and in C++, of what it is a view of, and how many of the memory."""
    base: Any = view._base
    return sys.getrefcount(base), use_count(base), _storage_use_count(view.untyped_storage()._cdata)


_storage_use_count: Any = getattr(torch._C, "_storage_Use_Count", None)
_ALONE = None if _storage_use_count is None else _owners(made_at_import().view(1))


def _shares_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    try:
        return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr() != 0
    except (NotImplementedError, RuntimeError):  # sparse tensors, and those of mkldnn, have no storage
        return False


# Whether two tensors lie in one storage, at whatever places. The public way takes five times as long.
shares_memory: Callable[[torch.Tensor, torch.Tensor], bool] = getattr(torch._C, "_is_alias_of", _shares_memory)


def saves_plainly() -> bool:
    """Whether a saved tensor is given back as the object it was: with hooks on saved tensors it is another."""
    return _hooks is not None and _hooks(True) is None


def hooks_on_saved() -> tuple[Callable[[Any], Any], Callable[[Any], Any]] | None:
    """The hooks on saved tensors, if there are any and it can be told."""
    return None if _hooks is None else _hooks(True)


@contextlib.contextmanager
def hooks_over_others(pack: Callable[[torch.Tensor], Any], unpack: Callable[[Any], torch.Tensor]) -> Iterator[None]:
    """`saved_tensors_hooks` for a `pack` that hands on to the hooks in force.

    A selective checkpoint of torch 2.15 warns of hooks within it, and may give them what it keeps itself. It passes by
    those of checkpoints, which are known by these marks.
    """
    marked: Any = pack
    marked._checkpoint_internal, marked._user_hooks = True, hooks_on_saved()
    try:
        with saved_tensors_hooks(pack, unpack):
            yield
    finally:
        del marked._user_hooks  # the graph keeps `pack`


_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)


def results_of(node: Any) -> list[tuple[torch.Size, torch.dtype, torch.device]] | None:
    """Shape, dtype and device of the results of a node, in order. None where that is not known."""
    known = getattr(node, "_input_metadata", None)
    return known and [(torch.Size(result.shape), result.dtype, result.device) for result in known]


def function_of(node: Any) -> type[Function] | None:
    """The Function whose backward `node` is. None for what is no Function's, and where that is not known."""
    return getattr(type(node), "_forward_cls", None)


def is_freed(node: Any) -> bool:
    """Whether a backward pass has gone through `node` and freed what it had saved. Of one that saves nothing, no."""
    try:
        if hasattr(type(node), "_raw_saved_tensors"):  # of a Python Function
            _ = node._raw_saved_tensors
        else:
            for name in [name for name in dir(node) if name.startswith("_raw_saved_")][:1]:  # of tensors
                getattr(node, name.removeprefix("_raw"))
    except RuntimeError as error:
        return "second time" in str(error)
    return False


def hook_on_result(node: Any, index: int, hook: Callable[[Any], Any]) -> Callable[[], None] | None:
    """Run `hook` on the gradient of a result of `node`, as a tensor's hook is run; gives what takes it off again.

    A public prehook of the node is run only where the node itself is: `torch.autograd.grad` with respect to its result
    would not be edited. None where there is no way.
    """
    register = getattr(node, "_register_hook_dict", None)
    if register is None:
        return None
    # It takes hooks, and the place of the result, from a tensor.
    stands_for = torch.empty(index + 1, requires_grad=True).unbind()[index]
    hooks: dict[int, Callable[[Any], Any]] = OrderedDict({0: hook})
    stands_for._backward_hooks = hooks  # as torch keeps them
    register(stands_for)
    return hooks.clear
