"""What an override has put somewhere, to be told of and taken off again; one function for each kind of place."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import nn

from gradoverride._core.in_force import everywhere
from gradoverride._core.in_force.layers import ClassLayer, FunctionLayer, Layer, Order
from gradoverride._core.in_force.tally import NoCalls
from gradoverride._core.in_force.targets import Class, class_of, modules_of
from gradoverride._core.overriding import overridden
from gradoverride._core.overriding.class_patch import check_classes, put_on_class, take_off_class
from gradoverride._core.overriding.following import follow, is_class_of_modules, take_off_given_up
from gradoverride._core.overriding.thread_mode import put_on_thread, take_off_thread
from gradoverride._core.python.paths import when_imported

__all__ = ["Put", "Puts", "on_class", "on_copies", "on_modules", "on_none", "on_path", "on_thread"]


class Put(NamedTuple):
    """One layer, put somewhere."""

    layer: Layer
    cls: str  # what it is on
    take_off: Callable[[], None]
    tally: Any = None  # of a module, which may be gone when its calls are asked for


Puts = Sequence[Put]
Placed = Sequence[tuple[nn.Module, Sequence[Layer]]]


def on_modules(model: nn.Module, placed: Placed) -> Puts:
    """Rules for modules of a model, and for functions as far as these modules call them: all of an override at once."""
    take_off = _taking_off(placed)
    try:
        for module, layers in placed:
            overridden.put_on(module, layers)
    except BaseException:
        take_off()
        raise
    return _puts_on(model, placed, take_off)


def on_copies(model: nn.Module, order: Order) -> Puts:
    """What the modules of a copy have taken along of the override that has this place."""
    placed: list[tuple[nn.Module, Sequence[Layer]]] = []
    for module in modules_of(model).values():
        layers: list[Layer] = [*overridden.layers_of(module), *overridden.functions_of(module)]
        placed.append((module, [layer for layer in layers if layer.order == order]))
    return _puts_on(model, placed, _taking_off(placed))


def _puts_on(model: nn.Module, placed: Placed, take_off: Callable[[], None]) -> Puts:
    on = {layer: model if isinstance(layer, FunctionLayer) else module for module, layers in placed for layer in layers}
    return [Put(layer, class_of(module).__name__, take_off, layer.tally) for layer, module in on.items()]


def on_none(model: nn.Module, layer: FunctionLayer) -> Puts:
    """A rule for a function that no module of the model can call: to be told of, and warned of as never called."""
    layer.tally = NoCalls()
    return [Put(layer, class_of(model).__name__, lambda: None)]


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

    return [Put(layer, target.value.__name__, take_off)]


def on_thread(layer: FunctionLayer) -> Puts:
    """A rule for a function of torch in this thread."""
    put_on_thread(layer)
    return [Put(layer, "", lambda: take_off_thread(layer))]


def on_path(path: str, layer: FunctionLayer, *, scoped: bool) -> Puts:
    """A rule for what a path names, now or when it is imported; if `scoped`, in modules that have the layer too."""
    puts: list[Put] = []

    def put_on_first(cls: type) -> None:
        if not puts:
            of_class = ClassLayer(layer.rule, layer.path, layer.target, layer.order)
            puts.extend(on_class(Class(cls), of_class, path))
            layer.tally = of_class.tally  # it is that which is called

    leave = follow(path, layer, scoped=scoped, on_class=None if scoped else put_on_first)

    def take_off() -> None:
        leave()
        for of_class in puts:
            of_class.take_off()

    return [Put(layer, "", take_off)]
