"""`vjp` as a rule meets it: the gradient without the rule, in the form that the rule itself may return."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from gradoverride._core.structure import has_leaf, unflatten

if TYPE_CHECKING:
    from gradoverride._core.call import Call

__all__ = ["Vjp"]

Pull = Callable[[Sequence[Tensor], Sequence[int]], list[Tensor]]


class Vjp:
    """`vjp(g)` is the true gradient of the arguments, `vjp.by_name(g)` that of arguments and parameters by name.

    It may be called several times, with any gradient in the structure of the forward's result.
    """

    def __init__(self, call: Call, pull: Pull, grad_output: Any) -> None:
        self._call = call
        self._pull = pull
        self._grad_output = grad_output
        self._kept: list[Tensor] | None = None

    def __call__(self, grad_output: Any) -> Any:
        call = self._call
        count = call.n_leaves
        if grad_output is not self._grad_output:
            leaves = self._pull(call.read_gradient(grad_output), range(count))
        else:
            if self._kept is None:
                self._kept = self._pull(call.read_gradient(grad_output), range(count))
            leaves = self._kept
        given = iter(leaves)
        if call.single is not None:
            return unflatten(call.specs[call.single], given, constants=False)
        return tuple(unflatten(spec, given, constants=False) for spec in call.specs)

    def by_name(self, grad_output: Any) -> dict[str, Any]:
        """The gradients of the arguments and of the module's trainable parameters, by name, in one pass."""
        call = self._call
        given = iter(self._pull(call.read_gradient(grad_output), range(call.n_leaves + len(call.aliased))))
        entries = [unflatten(spec, given, constants=False) for spec in call.specs]
        named: dict[str, Any] = {}
        for name, indices in call.groups.items():
            if any(has_leaf(call.specs[index]) for index in indices):
                parts = tuple(entries[index] for index in indices)
                named[name] = parts if name == call.variadic else parts[0]
        for param in call.aliased:
            named[param.name] = next(given)
        return named


