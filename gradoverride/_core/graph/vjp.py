"""`vjp` as a rule meets it: the gradient without the rule, in the form that the rule itself may return."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from gradoverride._core.binding.contract import answers_by_name
from gradoverride._core.values.structure import has_leaf, unflatten

if TYPE_CHECKING:
    from gradoverride._core.calls.backward_pass import Backward
    from gradoverride._core.calls.short_function import ShortFunction

__all__ = ["ShortVjp", "Vjp"]


class Vjp:
    """`vjp(g)` is the true gradient of the arguments, `vjp.by_name(g)` that of arguments and parameters by name.

    It may be called several times, with any gradient in the structure of the forward's result.
    """

    def __init__(self, backward: Backward, grad_output: Any) -> None:
        self._backward = backward
        # What is known for it is kept, unless the rule may write into it, or into what it was given for it.
        # Nor that for a tuple where Dynamo traces, which cannot tell whether two of them are the same.
        unknown = backward.plan.rule_writes or (backward.traced and type(grad_output) is tuple)
        self._grad_output = self if unknown else grad_output
        self._kept: list[Tensor] | None = None

    def __call__(self, grad_output: Any) -> Any:
        call = self._backward.call
        if grad_output is not self._grad_output:
            leaves = self._backward.pull_leaves(grad_output, unmodified=False)
        else:
            if self._kept is None:
                self._kept = self._backward.pull_leaves(grad_output, unmodified=True)
            leaves = self._kept
        given = iter(leaves)
        if call.single is not None:
            bare = unflatten(call.specs[call.single], given, constants=False)
            if not answers_by_name(call, bare):
                return bare
            return tuple([bare if index == call.single else None for index in range(len(call.specs))])
        return tuple([unflatten(spec, given, constants=False) for spec in call.specs])

    def by_name(self, grad_output: Any) -> dict[str, Any]:
        """The gradients of the arguments and of the module's trainable parameters, by name, in one pass."""
        call = self._backward.call
        leaves, params = self._backward.pull_all(grad_output, unmodified=grad_output is self._grad_output)
        given = iter(leaves)
        entries = [unflatten(spec, given, constants=False) for spec in call.specs]
        named: dict[str, Any] = {}
        for name, indices in call.groups.items():
            if any(has_leaf(call.specs[index]) for index in indices):
                parts = tuple([entries[index] for index in indices])
                named[name] = parts if name == call.variadic else parts[0]
        # An argument comes before a parameter of its name.
        return {**named, **{name: grad for name, grad in params.items() if name not in call.groups}}


class ShortVjp:
    """The same for a call of plain tensors with one tensor as its result (`short_function.py`): `pull` finds the
    gradients, as that of a kept graph, from what was saved.
    """

    __slots__ = ("_grad_output", "_kept", "_path", "_pull", "_saved")

    def __init__(
        self, path: ShortFunction, pull: Callable[..., list[Tensor]], saved: tuple[Tensor, ...], grad_output: Tensor
    ) -> None:
        self._path = path
        self._pull = pull
        self._saved = saved
        self._grad_output = grad_output
        self._kept: list[Tensor] | None = None

    def __call__(self, grad_output: Any) -> Any:
        grads = self._pulled(grad_output)
        places = self._path.places
        if len(places) == 1:
            return grads[0]
        if len(places) == len(self._path.names):
            return tuple(grads)
        given = iter(grads)
        return tuple(next(given) if index in places else None for index in range(len(self._path.names)))

    def by_name(self, grad_output: Any) -> dict[str, Any]:
        """The gradients of the arguments by name."""
        names = self._path.layout.names
        return {names[place]: grad for place, grad in zip(self._path.places, self._pulled(grad_output), strict=True)}

    def _pulled(self, grad_output: Any) -> list[Tensor]:
        which = range(len(self._path.places))
        last = self._path.plan.calls_vjp_once
        if grad_output is not self._grad_output:
            return self._pull(self._saved, [self._path.conform(grad_output, self._grad_output)], which, last=last)
        if self._kept is None:
            self._kept = self._pull(self._saved, [grad_output], which, last=last)
        return self._kept
