"""How often a rule was called, and whether a backward pass is still to call it again."""

from __future__ import annotations

import threading
import weakref
from typing import Any

from gradoverride._core.private.modes import in_reentrant_checkpoint, module_in_function_of_others

__all__ = ["NoCalls", "Tally", "Trace"]


class Trace:
    """Whether a forward under rules was compiled, told to all that count its calls: compiled code does not."""

    __slots__ = ("_is_there", "_tallies")

    def __init__(self) -> None:
        self._is_there = False
        self._tallies: weakref.WeakSet[Tally] = weakref.WeakSet()

    def tell(self, tally: Tally) -> None:
        """Calls of that forward count there from now on."""
        with _lock:
            self._tallies.add(tally)
            tally.traced |= self._is_there

    def note(self) -> None:
        """Dynamo traces it."""
        with _lock:
            self._is_there = True
            for tally in self._tallies:
                tally.traced = True


_lock = threading.RLock()


class Tally:
    """The calls under one rule, or of a module while it has rules. Compiled code does not count its own."""

    __slots__ = ("__weakref__", "awaited", "calls", "foreseen", "traced", "unrecorded")

    def __init__(self) -> None:
        self.calls = 0
        self.unrecorded = 0  # those of them without a graph
        self.awaited = 0  # those of these that a reentrant checkpoint is to run again
        self.foreseen = -1  # with a graph, when a Function of others last ran one without, perhaps to run it again
        self.traced = False  # whether compiled code may have called too

    def note_unrecorded(self, _: Any = None) -> None:
        """A call records no graph: a checkpoint may be about to run it again."""
        self.unrecorded += 1
        self.awaited += in_reentrant_checkpoint()
        if module_in_function_of_others():  # it may run fewer again, or more, as a solver with steps of its own
            self.foreseen = self.calls - self.unrecorded

    @property
    def awaits_replay(self) -> bool:
        """Whether some of them are still to be run again. (A call with a graph counts as that.)"""
        recorded = self.calls - self.unrecorded
        return self.awaited > recorded or self.foreseen == recorded

    def known(self, *, traced: bool = False, since: int = 0) -> int | None:
        """How many calls there were after `since`; None if that is not known, for `traced` code may have called too."""
        return self.calls - since or (None if traced or self.traced else 0)


class NoCalls(Tally):
    """Of a rule that nothing can call."""

    __slots__ = ()

    def known(self, *, traced: bool = False, since: int = 0) -> int | None:
        return 0
