"""What is in force on a module: a record in its `__dict__`, replaced and never changed, for copies share it."""

from __future__ import annotations

import copy
from typing import Any

from gradoverride._core.in_force import everywhere
from gradoverride._core.in_force.layers import FunctionLayer, Layer, ModuleLayer
from gradoverride._core.in_force.tally import Tally
from gradoverride._core.overriding.chain import Subject, chain_of, links
from gradoverride._core.overriding.following import kept_for_copies

__all__ = ["ModuleTally", "Record"]


class ModuleTally(Tally):
    """The calls of a module, and what else has happened to it, while it was overridden."""

    __slots__ = ("copied", "forward")

    def __init__(self, copied: bool = False) -> None:
        super().__init__()
        self.copied = copied
        self.forward: Any = None  # that of its class, if it was on the instance too, where it would hide the rules


class Record:
    """What is in force on a module. It pickles as its layers."""

    __slots__ = (
        *("__weakref__", "counted", "forward", "functions", "layers", "paths", "scope", "seen", "subject", "tally"),
    )

    # What `refresh` finds:
    seen: Any  # the forward of the class
    counted: tuple[Layer, ...]
    forward: Any
    scope: Any

    def __init__(
        self,
        subject: Subject,
        layers: tuple[ModuleLayer, ...],
        functions: tuple[FunctionLayer, ...],
        tally: ModuleTally,
        *,
        of_copy: bool = False,
    ) -> None:
        """`of_copy`: it is under no handle."""
        self.paths = kept_for_copies(functions) if of_copy else None
        self.subject = subject
        self.layers = layers
        self.functions = functions
        self.tally = tally
        for layer in layers:
            layer.count_by(tally)
        with everywhere.records_lock:
            self.refresh()
            everywhere.records.add(self)

    def refresh(self) -> None:
        """Look again at what is in force everywhere, and at the forward of the class."""
        base = self.subject.base
        self.seen = base.forward
        found = links(self.subject, self.layers, self.functions)
        self.counted = found.counted
        chain = chain_of(base, found)
        self.forward, self.scope = chain.forward, chain.scope  # each step on the way costs a guard in compiled code
        for tally in (self.tally, *[layer.tally for layer in self.counted]):
            chain.trace.tell(tally)

    def but(self, layers: tuple[ModuleLayer, ...], functions: tuple[FunctionLayer, ...]) -> Record:
        """The same with these layers instead."""
        return Record(self.subject, layers, functions, self.tally, of_copy=self.paths is not None)

    def leave(self) -> None:
        """It is on no module any more. Compiled code may keep it alive."""
        with everywhere.records_lock:
            everywhere.records.discard(self)

    def __deepcopy__(self, memo: Any) -> Record:
        self.tally.copied = True
        layers = tuple([layer.again(memo) for layer in self.layers])
        return Record(self.subject, layers, copy.deepcopy(self.functions, memo), ModuleTally(copied=True), of_copy=True)

    def __reduce__(self) -> Any:
        return _record_again, (self.subject, self.layers, self.functions)


def _record_again(subject: Subject, layers: tuple[ModuleLayer, ...], functions: tuple[FunctionLayer, ...]) -> Record:
    return Record(subject, layers, functions, ModuleTally(), of_copy=True)
