"""What a module keeps from one call to the next (a membrane potential): a forward that runs without a graph leaves it
without a history, and gradients through time would be cut without a word.

Torch does not tell what a value was computed from then. So code is read: an attribute counts that a forward both reads
and assigns, in this order, unless it says somewhere that gradients are cut.
"""

from __future__ import annotations

import inspect
import itertools
import warnings
import weakref
from collections.abc import Sequence
from types import FunctionType
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from gradoverride._core.python import scan
from gradoverride._core.python.by_class import named_in
from gradoverride._core.python.bytecode import LOCAL, uses
from gradoverride._core.values.tensors import is_differentiable
from gradoverride.errors import GradOverrideWarning

if TYPE_CHECKING:
    from gradoverride._core.calls.plan import Plan

__all__ = ["names_kept", "note_state", "state_of"]


def names_kept(fn: Any, cls: Any) -> tuple[str, ...]:
    """The attributes that `fn`, a method of `cls`, reads before it assigns them, itself or in methods that it calls, or
    in functions that it gives its `self`.
    """
    read_first: dict[str, bool] = {}
    assigned: set[str] = set()
    seen: set[FunctionType] = set()

    def follow(function: FunctionType | None) -> bool:
        """In order; whether no gradients are cut there."""
        if function is None or function in seen:
            return True
        seen.add(function)
        code = function.__code__
        if not _CUTTING.isdisjoint(code.co_names):
            return False
        receiver = code.co_varnames[:1]
        for use, following in itertools.zip_longest(uses(code), uses(code)[1:]):
            helper = scan.called_in(function, use)
            if helper is not None and following is not None and following[:3] == (LOCAL, *receiver, ()):
                if not follow(inspect.unwrap(helper)):
                    return False
                continue
            on_self = use.kind == LOCAL and use.name in receiver
            for place, name in enumerate(use.attributes, 1):
                own = [] if name in _OF_MODULES else named_in(code, cls, name)
                methods = [inspect.unwrap(one) for one in own if isinstance(one, FunctionType)]
                if not all([follow(method) for method in methods]):
                    return False
                if not methods and on_self and place == 1:
                    stored = use.way == "STORE" and len(use.attributes) == 1
                    assigned.update([name] if stored else [])
                    read_first.setdefault(name, not stored)
        return True

    goes_on = follow(scan.python_function(fn))
    return tuple(sorted([name for name in assigned if goes_on and read_first[name]]))


_OF_MODULES = frozenset(vars(nn.Module)) - {"forward"}
_CUTTING = frozenset({"data", "detach", "detach_", "inference_mode", "no_grad", "set_grad_enabled"})


def state_of(module: nn.Module, names: Sequence[str]) -> list[Tensor | None]:
    """What a module has in these attributes."""
    return [_value(module, name) for name in names]


def note_state(plan: Plan, module: nn.Module, names: Sequence[str], before: Sequence[Tensor | None]) -> None:
    """A forward has run without a graph, where these attributes were what they were `before`.

    It has gone on from what a call has kept if that has been replaced. (A table that is made once stays.)
    """
    for name, old, new in zip(names, before, state_of(module, names), strict=True):
        if old is not None and new is not None and old is not new and id(old) in _kept and not plan.told_of_state:
            plan.told_of_state = True
            warnings.warn(
                f"{plan.forward.who} goes on from 'self.{name}', which a call before has kept: that ran without a "
                f"graph, for the rule {plan.rule.who} does not ask for 'vjp', and no gradient goes back to it. Give "
                "the rule to what it calls instead, or pass the state as an argument and return it; if that is meant, "
                "have it detach() what it keeps",
                GradOverrideWarning,
                stacklevel=2,
            )
        if new is not None:
            key = id(new)
            _kept[key] = weakref.ref(new, lambda _, key=key: _kept.pop(key, None))  # type: ignore[misc]  # the key


def _value(module: nn.Module, name: str) -> Tensor | None:
    value = vars(module).get(name, module._buffers.get(name))
    return value if is_differentiable(value) else None


_kept: dict[int, weakref.ref[Tensor]] = {}  # by id, as long as it lives
