"""The `backward` of a class as a plain function, where its code shows all that it does with `self`.

It reads parameters and numbers there, and assigns the `grad` of parameters: those are answers, and no module has to
stand in for `self`. So its calls can take the short path. For the two to be told apart at no cost, the function has the
same code but for two names: where `backward` says `self.weight.grad = ...` it says `self.<TARGETS>.weight = ...`.
"""

from __future__ import annotations

from types import FunctionType
from typing import Any

from gradoverride._core.python import purity, scan
from gradoverride._core.python.bytecode import CELL, GLOBAL, LOCAL, instructions, renamed, uses
from gradoverride._core.python.reach import Name, attributes_of_first

__all__ = ["TARGETS", "UNASSIGNED", "OwnBackward"]

TARGETS = "_go_targets"
UNASSIGNED = object()
"""What stands for the gradient of a parameter until it is assigned."""


class OwnBackward:
    """The function, the parameters whose `grad` it assigns, what else it reads of `self`, and what it calls: where the
    name of that is, as in `Reach`, for something else may come to stand there that assigns a `grad` too.
    """

    def __init__(self, function: FunctionType, assigned: list[str], read: list[str], called: list[Name]) -> None:
        self.function = function
        self.assigned = assigned
        self.read = read
        self.called = called
        # What is `self` in it, and what the gradients are assigned to.
        self.self_class: Any = type("Self", (), {"__slots__": (TARGETS, *read)})
        self.targets_class: Any = type("Targets", (), dict.fromkeys(assigned, UNASSIGNED))

    @classmethod
    def of(cls, backward: Any) -> OwnBackward | None:
        """That of a method, or None if its code does not show all."""
        if not isinstance(backward, FunctionType) or not purity.writes_nothing(backward):
            return None
        code = backward.__code__
        if attributes_of_first(code) is None:
            return None
        steps = instructions(code)
        names: dict[int, str] = {}  # by offset, the new ones
        assigned: set[str] = set()
        read: set[str] = set()
        for use in uses(code):
            if (use.kind, use.name) != (LOCAL, code.co_varnames[0]):
                continue
            if use.way == "STORE" and use.attributes[1:] == ("grad",):
                names[steps[use.last - 1].offset], names[steps[use.last].offset] = TARGETS, use.attributes[0]
                assigned.add(use.attributes[0])
            else:
                read.add(use.attributes[0])
        changed = renamed(code, names) if assigned and not _asks_elsewhere(backward, names) else None
        if changed is None or "training" in read:  # which is shown as it was in the forward
            return None
        if any([name.startswith("__") for name in read]):  # which each class has of its own
            return None
        function = FunctionType(changed, backward.__globals__, None, backward.__defaults__, backward.__closure__)
        function.__kwdefaults__ = backward.__kwdefaults__
        return cls(function, sorted(assigned), sorted(read), _called(backward))


def _called(backward: Any) -> list[Name]:
    found: list[Name] = []
    for function, code in scan.reachable(backward):
        names = {use.name for use in uses(code) if use.is_called and use.kind in (GLOBAL, CELL) and not use.attributes}
        found += [Name(*one) for one in scan.named(function, code) if one[1] in names]
    return found


def _asks_elsewhere(backward: FunctionType, known: dict[int, str]) -> bool:
    """Whether it, or a helper, asks for a `grad` but at these offsets: what has been accumulated is nothing it sees."""
    return any(
        not {"grad", "backward"}.isdisjoint(use.attributes)
        for _, code in scan.reachable(backward)
        for use in uses(code)
        if not (code is backward.__code__ and instructions(code)[use.last].offset in known)
    )
