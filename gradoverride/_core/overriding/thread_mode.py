"""Rules for functions of torch without a model: a mode that stands in a thread until they go.

torch has its modes per thread, and nobody can enter one in another thread. So the thread that asked has it, and what it
hands to others meanwhile: each thread that it starts, each task that it gives to an executor or a pool of threads. Of
threads that ran before, a warning tells.
"""

from __future__ import annotations

import concurrent.futures.thread
import functools
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import FrameType
from typing import Any

from gradoverride._core.autograd.ambient import here
from gradoverride._core.in_force import everywhere
from gradoverride._core.in_force.layers import FunctionLayer
from gradoverride._core.overriding.class_patch import refresh
from gradoverride._core.overriding.obstacles import warn_of_made
from gradoverride._core.private.modes import put_under_stack, take_off_stack
from gradoverride._core.private.transforms import SCRIPTING
from gradoverride._core.torch_functions.function_mode import FunctionMode
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

    def end(self) -> None:
        """Leave it, in the thread that has it."""
        self.parent, self.layers = None, ()
        self._enter_or_leave()

    def _enter_or_leave(self) -> None:
        if self.layers and not self.entered:
            take_off_stack(self.mode)  # torch has put it back, where it was running when it was taken off
            put_under_stack(self.mode)
            here.modes = (self.mode, *here.modes)
            self.entered = True
        elif not self.layers and self.entered:
            self.entered = not take_off_stack(self.mode)
            here.modes = tuple([mode for mode in here.modes if mode is not self.mode])


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
        standing = _by_layer.pop(layer)
        everywhere.functions.remove(layer)
        standing.set(tuple([other for other in standing.own if other is not layer]))
        refresh()
        if not _by_layer:
            _see_no_starts()


def _warn_of_threads(layer: FunctionLayer) -> None:
    """Tell of the threads that keep torch's own function; of daemons, a program's background, not, and not of the main
    thread, which waits for others as a rule.
    """
    # No name for the frames: this one is among them, and would hold itself, and all that its callers hold.
    workers = {thread for thread, frame in sys._current_frames().items() if _is_worker(frame)}
    known = (threading.current_thread(), threading.main_thread())
    others = [thread for thread in threading.enumerate() if thread not in known]
    others = [thread for thread in others if not (thread.daemon or thread.ident in workers)]
    if others:
        warnings.warn(
            f"override of the whole process: torch lets nobody enter a mode in a thread that runs already, so the "
            f"{layer.target} is not overridden in the thread {', '.join([repr(thread.name) for thread in others])}. "
            "Override it before the thread is started, or in a model: override(model, ...) holds in every thread that "
            "calls it",
            GradOverrideWarning,
            stacklevel=2,
        )


def _is_worker(frame: FrameType | None) -> bool:
    """Whether this is the stack of a thread of an executor, which has the rules of each task that it is given."""
    while frame is not None:
        if frame.f_code.co_filename == concurrent.futures.thread.__file__:
            return True
        frame = frame.f_back
    return False


# --- threads that are started, tasks that are given to threads, and what TorchScript is made of


class _Inherited:
    """What runs in another thread, under the rules that stand in this one."""

    def __init__(self, run: Callable[..., Any], standing: _Standing) -> None:
        self.run = run
        self.standing = standing

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        before: _Standing | None = getattr(_here, "standing", None)
        if before is not None and self.standing in (before, before.parent):
            return self.run(*args, **kwargs)
        with _lock:
            _here.standing = _Standing(self.standing)
        try:
            return self.run(*args, **kwargs)
        finally:
            with _lock:
                _here.standing.end()
                _here.standing = before


def _standing_here() -> _Standing | None:
    standing: _Standing | None = getattr(_here, "standing", None)
    return standing if standing is not None and standing.layers else None


def _starting(original: Callable[..., Any]) -> Any:
    """`Thread.start`"""

    @functools.wraps(original)
    def start(self: threading.Thread) -> None:
        standing, own, run = _standing_here(), self.__dict__.get("run"), self.run

        def as_it_was() -> None:
            if own is None:
                del self.run
            else:
                self.run = own  # type: ignore[method-assign]  # somebody has put it there
            run()

        if standing is not None and not isinstance(own, _Inherited):
            self.run = _Inherited(as_it_was, standing)  # type: ignore[method-assign]  # of this one, until it runs
        original(self)

    return start


def _inheriting(task: Callable[..., Any]) -> Callable[..., Any]:
    standing = _standing_here()
    return task if standing is None or isinstance(task, _Inherited) else _Inherited(task, standing)


def _handing(original: Callable[..., Any]) -> Any:
    """`ThreadPoolExecutor.submit`, `ThreadPool.map`, and the other ways in which a pool is given a function first."""

    @functools.wraps(original)
    def hand(self: Any, /, *args: Any, **kwargs: Any) -> Any:
        if args:
            args = (_inheriting(args[0]), *args[1:])
        elif "func" in kwargs:
            kwargs["func"] = _inheriting(kwargs["func"])
        return original(self, *args, **kwargs)

    return hand


def _scripting(original: Callable[..., Any]) -> Any:
    """What `torch.jit.script` calls, and `torch.jit.load`."""

    @functools.wraps(original)
    def make(*args: Any, **kwargs: Any) -> Any:
        made, standing = original(*args, **kwargs), _standing_here()
        if standing is not None:
            warn_of_made(made, [layer.key.name for layer in standing.layers])
        return made

    return make


def _places() -> Iterator[tuple[Any, str, Callable[..., Any]]]:
    from multiprocessing.pool import ThreadPool  # nobody may need it otherwise

    for owner, name in SCRIPTING:
        yield owner, name, _scripting
    yield threading.Thread, "start", _starting
    yield ThreadPoolExecutor, "submit", _handing
    for name in ("apply", "apply_async", "imap", "imap_unordered", "map", "map_async", "starmap", "starmap_async"):
        yield ThreadPool, name, _handing


# What is in these places while rules stand. Where others have wrapped it, it stays, and does nothing.
_ours: list[tuple[Any, str, Any, bool]] = []


def _see_starts() -> None:
    if not _ours:
        for owner, name, wrap in _places():
            ours = wrap(getattr(owner, name))
            _ours.append((owner, name, ours, name in vars(owner)))
            setattr(owner, name, ours)


def _see_no_starts() -> None:
    while _ours:
        owner, name, ours, own = _ours.pop()
        if getattr(owner, name) is not ours:
            continue
        if own:
            setattr(owner, name, ours.__wrapped__)
        else:  # a pool of threads has it of one of processes
            delattr(owner, name)
