"""Memory: what is kept from forward to backward, and the most there is at any moment of both.

Counted in bytes of the tensors that operations return, so there is no noise. The garbage collector is off: what only
it would free counts as kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import eager
from benchmarks.modules import BLOCKS, Sides
from benchmarks.place import leaf
from benchmarks.timing import BYTES, Case, Effort, Samples, undisturbed

SIZE = 1000

Weigh = Callable[[Callable[..., Tensor], Sides], int]


def cases() -> list[Case]:
    by_hand = {
        "gradient alone": lambda: of_temporaries(eager.doubled(), eager.Double.apply, 1),
        "two tensors": lambda: of_temporaries(eager.product(), eager.Product.apply, 2),
    }
    return [
        *(beyond(f"memory: kept beyond by hand, {rule}", bytes_kept, build) for rule, build in by_hand.items()),
        *(beyond(f"memory: kept beyond autograd's, {form}", bytes_kept, build) for form, build in BLOCKS.items()),
        *(beyond(f"memory: peak beyond autograd's, {form}", bytes_at_peak, build) for form, build in BLOCKS.items()),
    ]


def beyond(name: str, weigh: Weigh, build: Callable[[], Sides]) -> Case:
    def measure(effort: Effort) -> Samples:
        sides = build()
        reference = weigh(sides.plain, sides)
        return Samples([weigh(sides.ours, sides) - reference], [reference])

    return Case(name, 0, measure, BYTES)


def of_temporaries(ours: Callable[..., Tensor], by_hand: Callable[..., Tensor], tensors: int) -> Sides:
    """Both sides on arguments that nobody else holds, so that an argument which is kept shows."""

    def on_temporaries(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *leaves: function(*(leaf + 0 for leaf in leaves))

    return Sides(on_temporaries(ours), on_temporaries(by_hand), *(leaf(SIZE) for _ in range(tensors)))


def bytes_kept(function: Callable[..., Tensor], sides: Sides) -> int:
    """What is given back when the result of a call is dropped: it and all that waits for its backward."""
    with undisturbed():
        with Storages(known=sides.leaves) as storages:
            result = function(*sides.inputs)
        with_result = storages.bytes_alive()
        del result
        return with_result - storages.bytes_alive()


def bytes_at_peak(function: Callable[..., Tensor], sides: Sides) -> int:
    """The most that is alive at once in forward and backward, gradients included."""
    clear(sides)
    grad = torch.ones_like(function(*sides.inputs))
    with undisturbed(), Storages(known=sides.leaves) as storages:
        function(*sides.inputs).backward(grad)
    clear(sides)
    return storages.peak


def clear(sides: Sides) -> None:
    for each in sides.leaves:
        each.grad = None


class Storages(TorchDispatchMode):
    """Weak references to the storage of every tensor that an operation returns, but for aliases of what is `known`."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self.known = {StorageWeakRef(tensor.untyped_storage()).cdata for tensor in known}
        self.seen: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                reference = StorageWeakRef(storage)
                if reference.cdata not in self.known:
                    self.seen[reference.cdata] = reference, storage.nbytes()
        self.peak = max(self.peak, self.bytes_alive())
        return result

    def bytes_alive(self) -> int:
        return sum(size for reference, size in self.seen.values() if not reference.expired())
