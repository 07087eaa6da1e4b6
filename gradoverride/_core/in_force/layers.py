"""One rule, put somewhere by one override: on a module, on a function of torch within a model, on a class.

Layers are ordered by `order`, the place of their override: a later one is outside of an earlier one. All layers of an
override have the same, and keep it in copies and pickles: it tells what belongs together.
"""

from __future__ import annotations

import itertools
import os
import uuid
import weakref
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from gradoverride._core.binding.rule import Rule
from gradoverride._core.in_force.tally import Tally

__all__ = ["ClassLayer", "FunctionLayer", "FunctionRule", "Layer", "ModuleLayer", "Order", "next_order"]

Order = tuple[int, ...]

_orders = itertools.count()
_marks = itertools.count()
_process = uuid.uuid4().hex


def _name_process() -> None:
    """A process that is forked counts on from where this one is."""
    global _process
    _process = uuid.uuid4().hex


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_name_process)

_others: dict[str, Order] = {}  # by process that something was pickled in: when it was first heard of


def next_order() -> Order:
    """The place of a new override among all, outside of those that there are."""
    return (next(_orders),)


def _order_again(process: str, order: Order) -> Order:
    """A place that was pickled: the same in the same process, else one behind what was there when it was loaded."""
    if process == _process:
        return order
    if process not in _others:
        _others[process] = next_order()
    return (*_others[process], *order)


class Layer:
    """One rule, put somewhere."""

    __slots__ = ("order", "path", "rule", "since", "target")

    tally: Any  # of the calls there; None where it is no more

    def __init__(self, rule: Rule, path: str, target: str, order: Order) -> None:
        self.rule = rule
        self.path = path
        self.target = target
        self.order = order
        self.since = 0  # how many calls there were before

    @property
    def known_calls(self) -> int | None:
        """How often it was called. None if that is not known: compiled code, or it is there no more."""
        return None if self.tally is None else self.tally.known(since=self.since)

    @property
    def awaits_replay(self) -> bool:
        """Whether a reentrant checkpoint is still to run again what was called under it."""
        return self.tally is not None and self.tally.awaits_replay


class ModuleLayer(Layer):
    """One rule on a module, which has one tally for all of its rules."""

    __slots__ = ("_tally",)

    def __init__(self, rule: Rule, path: str, target: str, order: Order) -> None:
        super().__init__(rule, path, target, order)
        self.count_by(None)

    @property
    def tally(self) -> Tally | None:
        return None if self._tally is None else self._tally()

    def count_by(self, tally: Tally | None) -> None:
        """It is on the module that has this tally, or on none. (It does not hold it: that goes with the module.)"""
        self._tally = None if tally is None else weakref.ref(tally)

    def again(self, memo: Mapping[int, Any] = MappingProxyType({})) -> ModuleLayer:
        """The same for a copy of the module, with a count of its own."""
        return ModuleLayer(self.rule.in_copy(memo), self.path, self.target, self.order)

    def __reduce__(self) -> Any:
        return _layer_again, (self.rule.fn, self.path, self.target, _process, self.order)


class ClassLayer(Layer):
    """One rule on all modules of a class."""

    __slots__ = ("tally",)

    def __init__(self, rule: Rule, path: str, target: str, order: Order) -> None:
        super().__init__(rule, path, target, order)
        self.tally = Tally()


def _layer_again(rule: Callable[..., Any], path: str, target: str, process: str, order: Order) -> ModuleLayer:
    return ModuleLayer(Rule.of(rule), path, target, _order_again(process, order))


class FunctionRule:
    """A rule for a function of a name. The same for each time that an override is entered: so is the compiled code."""

    __slots__ = ("mark", "name", "nth", "rule", "traced")

    def __init__(self, name: str, rule: Rule, nth: int) -> None:
        self.mark = f"{name} {next(_marks)}"  # what is noted of it while it is in force: of constants Dynamo knows more
        self.name = name
        self.rule = rule
        self.nth = nth  # which of several that are the same and in force together
        self.traced = False  # whether it was compiled into something: calls of compiled code are not counted

    def note_trace(self) -> None:
        """Dynamo traces a call under it."""
        self.traced = True


class FunctionLayer(Layer):
    """One rule for a function in all its spellings, as far as it is called in certain modules."""

    __slots__ = ("key", "tally")

    def __init__(self, name: str, rule: Rule, path: str, target: str, order: Order, nth: int) -> None:
        super().__init__(rule, path, target, order)
        self.key = rule.once((FunctionRule, name, nth), lambda: FunctionRule(name, rule, nth))
        self.tally = Tally()

    @property
    def of_path(self) -> bool:
        """Whether it is for what an import path names, and no function of torch."""
        return ":" in self.key.name

    @property
    def known_calls(self) -> int | None:
        """The same of calls of the function."""
        return self.tally.known(traced=self.key.traced)

    def again(self, memo: Mapping[int, Any] = MappingProxyType({})) -> FunctionLayer:
        """The same for a copy, with a count of its own."""
        rule = self.rule.in_copy(memo)
        return FunctionLayer(self.key.name, rule, self.path, self.target, self.order, self.key.nth)

    def __deepcopy__(self, memo: Any) -> FunctionLayer:
        """One for all modules of the copy."""
        copied = self.again(memo)
        memo[id(self)] = copied
        return copied

    def __reduce__(self) -> Any:
        key = self.key
        return _function_layer_again, (
            *(key.name, self.rule.fn, self.path, self.target),
            *(_process, self.order, key.nth),
        )


def _function_layer_again(
    name: str, rule: Callable[..., Any], path: str, target: str, process: str, order: Order, nth: int
) -> FunctionLayer:
    return FunctionLayer(name, Rule.of(rule), path, target, _order_again(process, order), nth)
