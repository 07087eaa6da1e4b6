"""Rules for functions of torch without a model: a mode that stands in a thread until they go.

torch has its modes per thread, and nobody can enter one in another thread. So the thread that asked has it, and each
thread that is started meanwhile, by it or by one that has it: an executor's workers too. Of those that ran before, a
warning tells.
"""

from __future__ import annotations

import functools
import threading
import warnings
import weakref
from collections.abc import Callable
from typing import Any

from gradoverride._core import everywhere
from gradoverride._core.class_patch import refresh
from gradoverride._core.function_mode import FunctionMode
from gradoverride._core.layers import FunctionLayer
from gradoverride._core.private import take_off_stack
from gradoverride.errors import GradOverrideWarning

__all__ = ["put_on_thread", "take_off_thread"]


class _Standing:
    """The mode of a thread and what stands in it: what the thread that started it has, and its own."""

    def __init__(self, parent: _Standing | None = None) -> None:
        self.thread = threading.get_ident()
        self.mode = FunctionMode()
        self.parent = parent
        self.children: weakref.WeakSet[_Standing] = weakref.WeakSet()
        self.own: tuple[FunctionLayer, ...] = ()
        self.layers: tuple[FunctionLayer, ...] = ()
        self.entered = False
        if parent is not None:
            parent.children.add(self)
            self.set(())

    def set(self, own: tuple[FunctionLayer, ...]) -> None:
        """Have these of its own from now on."""
        self.own = own
        self.layers = (*(self.parent.layers if self.parent else ()), *own)
        self.mode.set(tuple([layer.key for layer in self.layers]))
        if threading.get_ident() == self.thread:  # in another thread it stays as it is, and does nothing if it is empty
            self._enter_or_leave()
        for child in list(self.children):
            child.set(child.own)

    def _enter_or_leave(self) -> None:
        if self.layers and not self.entered:
            take_off_stack(self.mode)  # torch has put it back, where it was running when it was taken off
            self.mode.__enter__()  # type: ignore[no-untyped-call]  # torch leaves it without annotations
            self.entered = True
        elif not self.layers and self.entered:
            self.entered = not take_off_stack(self.mode)


_here = threading.local()
_by_layer: dict[FunctionLayer, _Standing] = {}
_lock = threading.RLock()


def put_on_thread(layer: FunctionLayer) -> None:
    """Put a rule on a function, for this thread, those it starts from now on, and the modules that are overridden."""
    with _lock:
        _warn_of_threads(layer)
        if not hasattr(_here, "standing"):
            _here.standing = _Standing()
        standing = _by_layer[layer] = _here.standing
        everywhere.functions.append(layer)
        try:
            refresh()
        except BaseException:
            take_off_thread(layer)
            raise
        standing.set((*standing.own, layer))
        _see_starts()


def take_off_thread(layer: FunctionLayer) -> None:
    """Take it off again."""
    with _lock:
        standing = _by_layer.pop(layer, None)
        if standing is not None:
            everywhere.functions.remove(layer)
            standing.set(tuple([other for other in standing.own if other is not layer]))
            refresh()
        if not _by_layer:
            _see_no_starts()


def _warn_of_threads(layer: FunctionLayer) -> None:
    """Tell of the threads that keep torch's own function; of daemons, a program's background, not."""
    others = [thread for thread in threading.enumerate() if thread is not threading.current_thread()]
    running = [repr(thread.name) for thread in others if not thread.daemon]
    if running:
        warnings.warn(
            f"override of the whole process: torch lets nobody enter a mode in a thread that runs already, so the "
            f"{layer.target} is not overridden in the thread {', '.join(running)}. Override it before the thread is "
            "started, or in a model: override(model, ...) holds in every thread that calls it",
            GradOverrideWarning,
            stacklevel=2,
        )


# --- threads that are started


def _inherit(thread: threading.Thread) -> None:
    """Have a thread that is about to be started run with the rules that stand in this one."""
    standing: _Standing | None = getattr(_here, "standing", None)
    before = thread.__dict__.get("run")  # somebody's own, or none
    if standing is None or not standing.layers or isinstance(before, _Run):
        return
    thread.run = _Run(thread, before, standing)  # type: ignore[method-assign]  # of this one, until it runs


class _Run:
    """The `run` of a thread that inherits."""

    def __init__(self, thread: threading.Thread, before: Any, standing: _Standing) -> None:
        self.thread = thread
        self.before = before
        self.standing = standing

    def __call__(self) -> None:
        thread = self.thread
        if self.before is None:
            del thread.run
        else:
            thread.run = self.before  # type: ignore[method-assign]  # as it was
        with _lock:
            _here.standing = _Standing(self.standing)
        thread.run()


def _starting(original: Callable[[threading.Thread], None]) -> Any:
    @functools.wraps(original)
    def start(self: threading.Thread) -> None:
        _inherit(self)
        original(self)

    return start


# What is in the place of `Thread.start` while rules stand. Where others have wrapped it, it stays, and does nothing.
_starts: list[Any] = []


def _see_starts() -> None:
    if not _starts:
        _starts.append(_starting(threading.Thread.start))
        threading.Thread.start = _starts[0]  # type: ignore[method-assign]  # torch tells nobody of a new thread


def _see_no_starts() -> None:
    while _starts:
        start = _starts.pop()
        if threading.Thread.start is start:
            threading.Thread.start = start.__wrapped__  # type: ignore[attr-defined, method-assign]  # what it was
