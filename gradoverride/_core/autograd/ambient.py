"""What surrounds a call: who runs it; the autocast state, and for a replay the random state and the rules of functions,
which must surround its backward too; hooks on saved tensors, which are for what the user computes alone.
"""

from __future__ import annotations

import contextlib
import pickle
import random
import sys
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from gradoverride._core.private.marks import evaluated_while_tracing
from gradoverride._core.private.modes import any_autocast
from gradoverride._core.private.tensors import saves_plainly

if TYPE_CHECKING:
    from torch.overrides import TorchFunctionMode

    from gradoverride._core.binding.rule import Rule
    from gradoverride._core.in_force.layers import FunctionLayer

__all__ = [
    "EAGER",
    "NO_AUTOCAST",
    "TRACED",
    "TRANSFORMED",
    "Autocast",
    "FunctionRules",
    "RandomState",
    "autocast_while_tracing",
    "here",
    "note_rule",
    "noted_rules",
    "under_traced",
    "unseen_by_hooks",
]

T = TypeVar("T")

EAGER, TRACED, TRANSFORMED = "eager", "traced", "transformed"
"""How a call is run: by torch alone; traced by Dynamo; under torch.func, or in forward mode."""

_NOTHING = contextlib.nullcontext()


def unseen_by_hooks() -> contextlib.AbstractContextManager[Any]:
    """For what is computed beside a call, once: a checkpoint counts the tensors that its block saves each time."""
    return _NOTHING if saves_plainly() else saved_tensors_hooks(_as_it_is, _as_it_is)


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


class Autocast:
    """The autocast state of a forward, for its rule to run under.

    torch restores none: a rule would meet a half-precision gradient and full-precision saved tensors.
    """

    __slots__ = ("states",)

    def __init__(self, *, off: bool = False) -> None:
        """Of now, or where it is `off`."""
        self.states: list[tuple[str, torch.dtype]] = []
        if not off and any_autocast():
            self.states = [
                (kind, torch.get_autocast_dtype(kind)) for kind in _device_types() if torch.is_autocast_enabled(kind)
            ]

    def restored(self) -> contextlib.AbstractContextManager[Any]:
        """A context with this state."""
        if not self.states and not any_autocast():
            return _NOTHING
        stack = contextlib.ExitStack()
        wanted = dict(self.states)
        for kind in _device_types():
            if kind in wanted:
                stack.enter_context(torch.autocast(kind, dtype=wanted[kind]))
            elif torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        return stack


NO_AUTOCAST = Autocast(off=True)


@evaluated_while_tracing
def autocast_while_tracing() -> tuple[tuple[str, torch.dtype | None], ...]:
    """The same of a call that Dynamo traces, by device: None where it is off; empty where no autocast is around it.

    One that is switched off may stand in one that is on, where the compiled backward will be.
    """
    torch.autocast_increment_nesting()
    around = torch.autocast_decrement_nesting() > 0
    if not around and not any_autocast():
        return ()
    return tuple(
        [
            (kind, torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None)
            for kind in _device_types()
        ]
    )


def under_traced(states: tuple[tuple[str, torch.dtype | None], ...], call: Callable[[], T]) -> T:
    """`call()` under this state of autocast, one `with` for each device, which Dynamo traces."""
    if not states:
        return call()
    kind, dtype = states[0]
    with torch.autocast(kind, dtype=dtype, enabled=dtype is not None):
        return under_traced(states[1:], call)


def _device_types() -> tuple[str, ...]:
    accelerator = torch.accelerator.current_accelerator()
    return ("cpu",) if accelerator is None or accelerator.type == "cpu" else ("cpu", accelerator.type)


class _Here(threading.local):
    """What is in force in this thread now."""

    def __init__(self) -> None:
        # Of the instance from the start: Dynamo guards whether it has them, and the first traced call would give them.
        # By their marks: in the body of a higher-order operator Dynamo lets what is noted be changed and put back if it
        # is a constant.
        self.active: tuple[str, ...] = ()  # rules of functions, entered by the modules around
        self.quiet: tuple[str, ...] = ()  # of these, not to be applied here
        self.layers: tuple[FunctionLayer, ...] = ()  # whose calls are counted
        self.modes: tuple[TorchFunctionMode, ...] = ()  # that these modules have entered, and the thread
        self.noted: tuple[list[Rule], ...] = ()  # by forward that is to run again, the rules within: `noted_rules`


here = _Here()


class FunctionRules:
    """The rules of functions that are in force where a forward runs."""

    def __init__(self) -> None:
        self.state = here.active, here.quiet, here.layers, here.modes

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """A context in which they are in force, for it to run again."""
        before = here.active, here.quiet, here.layers, here.modes
        with contextlib.ExitStack() as stack:
            for mode in self.state[-1]:  # also where it is entered: torch leaves it for as long as it shows it a call
                stack.enter_context(mode)
            here.active, here.quiet, here.layers, here.modes = self.state
            try:
                yield
            finally:
                here.active, here.quiet, here.layers, here.modes = before


@contextlib.contextmanager
def noted_rules() -> Iterator[list[Rule]]:
    """A context for a forward in a transform, and the rules of overrides that are called in it, in order."""
    before, found = here.noted, list["Rule"]()
    here.noted = (*before, found)
    try:
        yield found
    finally:
        here.noted = before


def note_rule(rule: Rule) -> None:
    """A rule of an override is called in a transform."""
    for found in here.noted:
        found.append(rule)


class RandomState:
    """The state of the generators of torch, Python and NumPy, to replay a forward with the numbers it drew."""

    __slots__ = ("accelerator", "cpu", "numpy", "python")

    def __init__(self) -> None:
        self.cpu = torch.get_rng_state()
        device = _accelerator_in_use()
        if device is None:
            self.accelerator = []
        elif hasattr(device, "get_rng_state_all"):
            self.accelerator = device.get_rng_state_all()
        else:
            self.accelerator = [device.get_rng_state()]  # MPS has but one device
        self.python = random.getstate()
        numpy = _numpy_random()
        self.numpy = None if numpy is None else numpy.get_state(legacy=False)

    def differs(self) -> bool:
        """Whether numbers were drawn since."""
        now = RandomState()
        same = torch.equal(now.cpu, self.cpu) and all(
            torch.equal(a, b) for a, b in zip(now.accelerator, self.accelerator, strict=True)
        )
        return not same or self._differs_in_python(now)

    def differs_in_python(self) -> bool:
        """Whether numbers of Python or NumPy were drawn since."""
        return self._differs_in_python(RandomState())

    def _differs_in_python(self, now: RandomState) -> bool:
        # NumPy's state is a dict with an array in it, which `==` does not take.
        return now.python != self.python or pickle.dumps(now.numpy) != pickle.dumps(self.numpy)

    @contextlib.contextmanager
    def replayed(self) -> Iterator[None]:
        """A context in which the same numbers are drawn again; the generators go on afterwards as if nothing was."""
        before = RandomState()
        try:
            self._restore()
            yield
        finally:
            before._restore()

    def _restore(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.accelerator:
            device = _accelerator_in_use()
            if hasattr(device, "set_rng_state_all"):
                device.set_rng_state_all(self.accelerator)
            else:
                device.set_rng_state(*self.accelerator)
        random.setstate(self.python)
        if self.numpy is not None:
            _numpy_random().set_state(self.numpy)


def _accelerator_in_use() -> Any:
    """The module of torch for the devices where numbers may have been drawn."""
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None:
        return None
    module = torch.get_device_module(accelerator)
    is_in_use = getattr(module, "is_initialized", None) or module.is_available  # MPS is ready where it is there
    return module if is_in_use() else None


def _numpy_random() -> Any:
    """NumPy's global generator, if anybody has imported it."""
    return sys.modules.get("numpy.random")
