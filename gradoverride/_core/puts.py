"""What an override has put somewhere, to be told of and taken off again; one function for each kind of place."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import nn

from gradoverride._core import everywhere, overridden
from gradoverride._core.class_patch import check_classes, put_on_class, take_off_class
from gradoverride._core.following import follow, is_class_of_modules, take_off_given_up
from gradoverride._core.layers import ClassLayer, FunctionLayer, Layer, Order
from gradoverride._core.paths import when_imported
from gradoverride._core.targets import Class, class_of, modules_of
from gradoverride._core.thread_mode import put_on_thread, take_off_thread

__all__ = ["Put", "Puts", "on_class", "on_copies", "on_modules", "on_none", "on_path", "on_thread"]


class Put(NamedTuple):
    """One layer, put somewhere."""

    layer: Layer | FunctionLayer
    cls: str  # what it is on
    calls: Callable[[], int | None]  # under it; None if that is not known
    take_off: Callable[[], None]
    awaits: Callable[[], bool]  # whether a reentrant checkpoint is to run it again


Puts = Sequence[Put]
Placed = Sequence[tuple[nn.Module, Sequence[Layer | FunctionLayer]]]


def on_modules(model: nn.Module, placed: Placed) -> Puts:
    """Rules for modules of a model, and for functions as far as these modules call them: all of an override at once."""
    take_off = _taking_off(placed)
    shared: dict[Any, Any] = {}
    try:
        for module, layers in placed:
            overridden.put_on(module, layers, shared)
    except BaseException:
        take_off()
        raise
    return _puts_on(model, placed, take_off)


def on_copies(model: nn.Module, order: Order) -> Puts:
    """What the modules of a copy have taken along of the override that has this place."""
    placed: list[tuple[nn.Module, Sequence[Layer | FunctionLayer]]] = []
    for module in modules_of(model).values():
        layers: list[Layer | FunctionLayer] = [*overridden.layers_of(module), *overridden.functions_of(module)]
        placed.append((module, [layer for layer in layers if layer.order == order]))
    return _puts_on(model, placed, _taking_off(placed))


def _puts_on(model: nn.Module, placed: Placed, take_off: Callable[[], None]) -> Puts:
    on: dict[Layer | FunctionLayer, nn.Module] = {}
    for module, layers in placed:
        for layer in layers:
            on.setdefault(layer, module)
    return [
        _of_calls(layer, class_of(model).__name__, take_off)
        if isinstance(layer, FunctionLayer)
        else _of_module(layer, module, take_off)
        for layer, module in on.items()
    ]


def _of_module(layer: Layer, module: nn.Module, take_off: Callable[[], None]) -> Put:
    reference = weakref.ref(module)

    def calls() -> int | None:
        module = reference()
        return None if module is None else overridden.calls_under(module, layer)

    def awaits() -> bool:
        module = reference()
        return module is not None and overridden.awaits_replay(module)

    return Put(layer, class_of(module).__name__, calls, take_off, awaits)


def on_none(model: nn.Module, layer: FunctionLayer) -> Puts:
    """A rule for a function that no module of the model can call: to be told of, and warned of as never called."""
    return [_of_calls(layer, class_of(model).__name__, lambda: None)._replace(calls=lambda: 0)]


def _of_calls(layer: ClassLayer | FunctionLayer, cls: str, take_off: Callable[[], None]) -> Put:
    """One that counts its own calls."""
    return Put(layer, cls, lambda: layer.known_calls, take_off, lambda: layer.tally.awaits_replay)


def _taking_off(placed: Placed) -> Callable[[], None]:
    """What takes off all of them, the last first. A second time it does nothing."""
    remaining = [(weakref.ref(module), layers) for module, layers in placed]

    def take_off() -> None:
        while remaining:
            reference, layers = remaining.pop()
            module = reference()
            if module is not None:
                overridden.take_off(module, layers)
        take_off_given_up()

    return take_off


def on_class(target: Class, layer: ClassLayer, path: str) -> Puts:
    """A rule for all modules of a class: of that which a path names too, when its module is loaded again."""
    put_on_class(target, layer)

    def put_again(value: Any) -> None:
        has_it = [of.value for of, one in everywhere.classes if one is layer]
        if is_class_of_modules(value) and value not in has_it:
            again = Class(value)
            check_classes([again])
            put_on_class(again, layer)

    call_off = when_imported(path, put_again) if path else None

    def take_off() -> None:
        if call_off is not None:
            call_off()
        take_off_class(layer)

    return [_of_calls(layer, target.value.__name__, take_off)]


def on_thread(layer: FunctionLayer) -> Puts:
    """A rule for a function of torch in this thread."""
    put_on_thread(layer)
    return [_of_calls(layer, "", lambda: take_off_thread(layer))]


def on_path(path: str, layer: FunctionLayer, *, scoped: bool) -> Puts:
    """A rule for what a path names, now or when it is imported; if `scoped`, in modules that have the layer too."""
    puts: list[Put] = []

    def put_on_first(cls: type) -> None:
        if not puts:
            of_class = ClassLayer(layer.rule, layer.path, layer.target, layer.order)
            puts.extend(on_class(Class(cls), of_class, path))

    leave = follow(path, layer, scoped=scoped, on_class=None if scoped else put_on_first)

    def take_off() -> None:
        leave()
        for of_class in puts:
            of_class.take_off()

    own = _of_calls(layer, "", take_off)
    return [
        own._replace(
            calls=lambda: (puts or [own])[0].calls(),
            awaits=lambda: (puts or [own])[0].awaits(),
        )
    ]
