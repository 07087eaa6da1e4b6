"""Rules for functions of torch without a model: a mode that stands in the thread that asked for it, until they go."""

from __future__ import annotations

import threading

from gradoverride._core import everywhere
from gradoverride._core.class_patch import refresh
from gradoverride._core.function_mode import FunctionMode
from gradoverride._core.layers import FunctionLayer
from gradoverride._core.private import take_off_stack

__all__ = ["put_on_thread", "take_off_thread"]


class _Standing:
    """The mode of a thread and what stands in it."""

    def __init__(self) -> None:
        self.thread = threading.get_ident()
        self.mode = FunctionMode()
        self.layers: tuple[FunctionLayer, ...] = ()
        self.entered = False

    def set(self, layers: tuple[FunctionLayer, ...]) -> None:
        self.layers = layers
        self.mode.set(tuple([layer.key for layer in layers]))
        if layers and not self.entered:
            take_off_stack(self.mode)  # torch has put it back, where it was running when it was taken off
            self.mode.__enter__()  # type: ignore[no-untyped-call]  # torch leaves it without annotations
            self.entered = True
        elif not layers and self.entered and self.thread == threading.get_ident():
            self.entered = not take_off_stack(self.mode)  # in another thread it stays, and does nothing


_own = threading.local()
_by_layer: dict[FunctionLayer, _Standing] = {}
_lock = threading.RLock()


def put_on_thread(layer: FunctionLayer) -> None:
    """Put a rule on a function, for this thread and for the modules that are overridden."""
    with _lock:
        if not hasattr(_own, "standing"):
            _own.standing = _Standing()
        standing = _by_layer[layer] = _own.standing
        everywhere.functions.append(layer)
        try:
            refresh()
        except BaseException:
            take_off_thread(layer)
            raise
        standing.set((*standing.layers, layer))


def take_off_thread(layer: FunctionLayer) -> None:
    """Take it off again."""
    with _lock:
        standing = _by_layer.pop(layer, None)
        if standing is not None:
            everywhere.functions.remove(layer)
            standing.set(tuple([other for other in standing.layers if other is not layer]))
            refresh()
