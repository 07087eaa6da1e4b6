"""What is in force in the whole process: layers on classes, and on functions; and which modules are overridden. Only
the state and how to ask it.

`class_patch.py`, `thread_mode.py` and `record.py` put things here; the chains of modules that are overridden ask
(`chain.py`).
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
import weakref
from collections.abc import Collection
from types import FunctionType
from typing import Any

import torch

from gradoverride._core.in_force.layers import ClassLayer, FunctionLayer, Layer, Order
from gradoverride._core.in_force.targets import Class
from gradoverride._core.python.by_class import standing

__all__ = [
    "all_records",
    "bare_forward",
    "classes",
    "derived_from",
    "farther_than",
    "forget_compiled",
    "functions",
    "inert",
    "layers_on",
    "no_method",
    "originals",
    "records",
    "records_lock",
    "refresh_records",
    "without_inert",
]

classes: list[tuple[Class, ClassLayer]] = []
functions: list[FunctionLayer] = []
originals: dict[Any, Any] = {}  # by forward that was put on a class: the one that it replaced
derived_from: dict[Any, Any] = {}  # by forward of a class of overridden modules: the class that it is derived from
inert: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()  # the same of what does nothing any more
_given: weakref.WeakKeyDictionary[Any, tuple[Any, Any]] = weakref.WeakKeyDictionary()  # by class, see `bare_forward`
records: weakref.WeakSet[Any] = weakref.WeakSet()  # what is in force on each module: `record.py`
records_lock = threading.RLock()  # a set lets nothing be added while it is gone through


def bare_forward(cls: Any) -> Any:
    """The forward of a class without ours. As long as it is that, the same object."""
    forward = cls.forward
    if type(forward) is not FunctionType:  # wrapt gives a new object each time, which compares equal to what is within
        own = standing(cls, "forward")
        if cls not in _given or _given[cls][0] is not own:
            _given[cls] = own, forward
        return _given[cls][1]
    base = derived_from.get(forward)
    if base is not None:  # others have derived theirs from a class of overridden modules
        return bare_forward(base)
    return originals.get(forward, forward)


def no_method(cls: Any) -> str:
    """What the forward of a class is where it is no method, which a module passes itself to, and the way out."""
    owner = next(base for base in cls.__mro__ if "forward" in base.__dict__)
    forward = owner.__dict__["forward"]
    if type(forward) is FunctionType:
        return ""
    kinds = {staticmethod: "a static method", classmethod: "a class method", property: "a property"}
    kinds[functools.singledispatchmethod] = "a singledispatchmethod"
    kind = next((name for of, name in kinds.items() if isinstance(forward, of)), "")
    if not kind and hasattr(type(forward), "__get__") and callable(cls.forward):
        return ""
    way_out = "Define it as a method"
    if isinstance(forward, (staticmethod, classmethod)) and "<locals>" not in owner.__qualname__:
        way_out += f", or give its import path as the target: '{owner.__module__}:{owner.__qualname__}.forward'"
    return f"{kind or f'an object of the class {type(forward).__name__}'}, which is not told of the module. {way_out}"


def without_inert(value: Any) -> Any:
    """A function, or what it stood for if it is one of ours that does nothing any more: who had replaced it in the
    meantime has put it back.
    """
    function = getattr(value, "__func__", value)
    original = inert.get(function) if type(function) is FunctionType else None  # what wrapt makes is equal to one
    return value if original is None or type(original) is not type(value) else without_inert(original)


def layers_on(cls: Any) -> list[ClassLayer]:
    """The layers in force on modules of this class: of each override the one whose target is nearest."""
    best: dict[Order, tuple[int, ClassLayer]] = {}
    for target, layer in classes:
        distance = target.distance_of(cls)
        if distance is not None and distance <= best.get(layer.order, (distance, layer))[0]:
            best[layer.order] = distance, layer
    return [best[order][1] for order in sorted(best)]


def farther_than(called: Collection[Layer]) -> list[Layer]:
    """The layers on classes of whose modules some were called under one that is nearer: of these, in one override."""
    nearer = [(target, layer) for target, layer in classes if layer in called]
    return [
        layer
        for target, layer in classes
        if any(
            [one.order == layer.order and issubclass(of.value, target.value) for of, one in nearer if one is not layer]
        )
    ]


def forget_compiled() -> None:
    """Have all compiled code compiled anew: Dynamo does not see that the forward of a class was replaced."""
    if "torch._dynamo" in sys.modules:
        # Torch says so at the end, where another thread is about to compile something: it finds nothing by then.
        with contextlib.suppress(AssertionError):
            torch.compiler.reset()


def all_records() -> list[Any]:
    """What is in force on each module that is overridden."""
    with records_lock:
        return list(records)


def refresh_records() -> None:
    """Have all modules that are overridden look again at what is in force everywhere."""
    with records_lock:
        for record in all_records():
            record.refresh()
