"""`Registry`: which rule is for which target. It touches no model; `override` applies it."""

from __future__ import annotations

import copy
import functools
import inspect
import operator
import sys
from collections.abc import Callable, Iterator, Mapping
from types import BuiltinFunctionType
from typing import Any, TypeVar, get_origin

import torch
from torch import nn

from gradoverride._core.binding.rule import Rule
from gradoverride._core.binding.signature import RESERVED, kind_of, name_of, takes
from gradoverride._core.in_force.targets import Class, Entry, Function, Glob, ImportPath, Instance, Predicate, Target
from gradoverride._core.python.paths import way_to_apply
from gradoverride._core.python.scan import location
from gradoverride._core.torch_functions.functions import is_of_torch, name_of_function
from gradoverride.errors import TargetError

__all__ = ["Registry", "register", "registry"]

R = TypeVar("R", bound=Callable[..., Any])


class Registry:
    """Rules in order, each for its targets, under a name.

    A target is a module, a glob over dotted names (`"encoder.layers.*.attn"`), a predicate of a name and a module, a
    class of modules (and those derived from it), a function of torch (in all its spellings), or an import path
    (`"package.module:attribute"`). Where several name one module or call, the most specific wins, in this order; a
    later entry wins a tie.

    >>> import torch, gradoverride as go
    >>> guided = go.Registry("guided")
    >>> @guided.register(torch.nn.ReLU)
    ... def guided_relu(grad_output, vjp):
    ...     return vjp(grad_output.clamp(min=0))
    >>> guided
    Registry('guided': class 'ReLU' -> guided_relu)

    `one | other` has the entries of both, those of `other` later. A mapping of targets to rules may stand for a
    registry there, and in `override`. A copy has entries of its own, for the same targets; a pickle takes the rules
    along by the names of their functions.
    """

    def __init__(self, name: str = "", rules: Registry | Mapping[Any, Callable[..., Any]] | None = None) -> None:
        if not isinstance(name, str):
            raise TargetError(
                f"Registry: 'name' must be a string; got {kind_of(name)}. Give the name first, then the rules: "
                "Registry('mine', {nn.ReLU: rule})"
            )
        if rules is not None and not isinstance(rules, (Registry, Mapping)):
            raise TargetError(
                "Registry: 'rules' must be a Registry or a mapping of targets to rules, {nn.ReLU: rule}; got "
                f"{kind_of(rules)}"
            )
        self.name = name
        self._entries: list[Entry] = []
        if isinstance(rules, Registry):
            self._entries.extend(rules._entries)
        else:
            for target, rule in (rules or {}).items():
                self.register(target)(rule)

    def register(self, *targets: Any, optional: bool = False) -> Callable[[R], R]:
        """A decorator that enters a rule for these targets, and gives the rule back.

        `override` raises where none of the targets names anything in the model, unless the entry is `optional`.
        """
        if not targets:
            raise TargetError("register: give at least one target, such as register(nn.ReLU)(rule); got none")
        if not isinstance(optional, bool):
            raise TargetError(
                f"register: 'optional' must be True or False; got {kind_of(optional)}. Several targets of one rule: "
                "register(nn.ReLU, F.relu)(rule)"
            )
        read = tuple(read_target(target) for target in targets)

        def enter(rule: R) -> R:
            self._entries.append(Entry(read, Rule.of(rule, given=_in_words(read)), optional))
            return rule

        return enter

    def __iter__(self) -> Iterator[tuple[Any, Callable[..., Any]]]:
        """Pairs of a target and a rule, in order."""
        return iter([(target.value, entry.rule.fn) for entry in self._entries for target in entry.targets])

    def __len__(self) -> int:
        return len(self._entries)

    def __or__(self, other: Registry | Mapping[Any, Callable[..., Any]]) -> Registry:
        if not isinstance(other, (Registry, Mapping)):
            return NotImplemented
        return self._merged(self, as_registry(other))

    def __ror__(self, other: Mapping[Any, Callable[..., Any]]) -> Registry:
        if not isinstance(other, Mapping):
            return NotImplemented
        return self._merged(as_registry(other), self)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Registry) and self.name == other.name and self._content() == other._content()

    __hash__ = None  # type: ignore[assignment]  # it can change

    def __copy__(self) -> Registry:
        return type(self)(self.name, self)

    def __deepcopy__(self, memo: Any) -> Registry:  # a module that is a target stays that module
        return copy.copy(self)

    def __reduce__(self) -> Any:
        return _again, (type(self), self.name, self._content())

    def __repr__(self) -> str:
        entries = [f"{_in_words(entry.targets)} -> {entry.rule.name}" for entry in self._entries]
        return f"Registry({self.name!r}: {'; '.join(entries) or 'empty'})"

    def _content(self) -> list[tuple[tuple[Any, ...], Callable[..., Any], bool]]:
        """What its entries were made of: which targets share one tells what is to match, and `optional` whether."""
        return [(tuple([target.value for target in e.targets]), e.rule.fn, e.optional) for e in self._entries]

    @staticmethod
    def _merged(one: Registry, other: Registry) -> Registry:
        merged = Registry(" | ".join(filter(None, (one.name, other.name))))
        merged._entries = [*one._entries, *other._entries]
        return merged


def _again(cls: type[Registry], name: str, entries: list[tuple[tuple[Any, ...], Callable[..., Any], bool]]) -> Registry:
    """A registry that was pickled."""
    made = cls(name)
    for targets, rule, optional in entries:
        made.register(*targets, optional=optional)(rule)
    return made


def _in_words(targets: tuple[Target, ...]) -> str:
    return ", ".join([target.text for target in targets])


def as_registry(rules: Any) -> Registry:
    """A registry as it is, or one of the entries of a mapping."""
    return rules if isinstance(rules, Registry) else Registry(rules=rules)


def entries_of(registry: Registry) -> tuple[Entry, ...]:
    """The entries as they are now."""
    return tuple(registry._entries)


def read_target(value: Any) -> Target:
    """What kind of target this is, or an error."""
    if isinstance(value, nn.Module):
        return Instance(value)
    if isinstance(value, str):
        return ImportPath(value) if ":" in value else Glob(value)
    if isinstance(value, type):
        if not issubclass(value, nn.Module):
            name = value.__name__
            way = way_to_apply(value) or f". For those derived from it: lambda _, module: isinstance(module, {name})"
            raise TargetError(f"a class as a target must be one of modules; got the class '{name}'{way}")
        return Class(value)
    if callable(value) and get_origin(value) is None:  # list[int] can be called too
        return _read_function(value)
    several = ". Several targets of one rule: register(nn.ReLU, F.relu)(rule)" if isinstance(value, tuple) else ""
    raise TargetError(
        "a target is a module, a class of modules, a glob over dotted names, a predicate (name, module) -> bool, a "
        f"function of torch or an import path 'package.module:attribute'; got {kind_of(value)}{several}"
    )


def _read_function(value: Any) -> Target:
    """A function of torch, or a predicate, which takes two."""
    name = name_of_function(value)
    if name is not None:
        return Function(value, name)
    own = is_of_torch(value) and not isinstance(value, functools.partial)
    if own or isinstance(value, BuiltinFunctionType) or not takes(value, 2):
        kind = _what_else(value, own)
        raise TargetError(
            f"a function as a target must be one of torch that works on tensors, such as F.relu, or a predicate "
            f"(name, module) -> bool; '{name_of(value)}' ({location(value)}) is {kind}"
        )
    names = _names_of_a_rule(value)
    if names:
        raise TargetError(
            f"a function as a target must be one of torch, or a predicate (name, module) -> bool; '{name_of(value)}' "
            f"({location(value)}) asks for {names}, as a rule does. Give the targets first, then the rule: "
            "register(nn.ReLU)(rule), or @register(nn.ReLU) above the rule"
        )
    return Predicate(value)


def _what_else(value: Any, own: bool) -> str:
    """What a function is that can be no target, and what to give instead."""
    way = way_to_apply(getattr(value, "__self__", None))
    if way:
        return f"that of an autograd.Function{way}"
    if own:
        return "one of torch that no override can see. Give the module that calls it"
    if isinstance(value, functools.partial) and name_of_function(value.func) is not None:
        return "a functools.partial of one. Give the function itself: its rule is for all of its calls"
    name = name_of(value)
    if getattr(operator, name, None) is value and hasattr(torch, name):
        return f"an operator of Python. Give the function of torch that it is for tensors: torch.{name}"
    if str(getattr(value, "__module__", "")).partition(".")[0] in sys.stdlib_module_names:
        return "one of Python's own, through which no gradient goes. Give the function of torch that the model calls"
    path = "" if name == "<lambda>" else f"import path: 'package.module:{name}'"
    try:
        taken = ", ".join(inspect.signature(value).parameters)
    except (ValueError, TypeError):  # of C
        return f"a function of one's own. Give its {path}"
    itself = f"; to override the function itself, give its {path}" if path else ""
    return f"a function of one's own that takes ({taken}). A predicate takes (name, module){itself}"


def _names_of_a_rule(value: Any) -> str:
    """The parameters of a function that only rules have: a predicate takes a name and a module."""
    asked = list(inspect.signature(value).parameters)
    found = [name for name in asked if name in _OF_RULES]
    return ", ".join(f"'{name}'" for name in found)


_OF_RULES = frozenset({"grad_output", "grad", *RESERVED}) - {"module"}


registry = Registry("default")


def register(*targets: Any, optional: bool = False) -> Callable[[R], R]:
    """A decorator that enters a rule into the default registry, `go.registry`, for these targets."""
    return registry.register(*targets, optional=optional)
