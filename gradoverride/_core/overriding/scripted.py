"""Which functions of torch TorchScript calls, as its graphs tell: it runs no Python code, and no mode sees them."""

from __future__ import annotations

import gc
import sys
from collections import OrderedDict
from collections.abc import Collection, Iterator
from types import FunctionType, ModuleType
from typing import Any

from torch import nn
from torch.jit import ScriptFunction, ScriptModule

from gradoverride._core.in_force.everywhere import originals
from gradoverride._core.in_force.targets import class_of, family
from gradoverride._core.overriding.overridden import functions_called
from gradoverride._core.python.scan import codes_of, named, of_modules, python_function
from gradoverride._core.torch_functions.callers import names_called_by, says
from gradoverride._core.torch_functions.functions import names_among, spellings

__all__ = ["called_in", "is_scripted", "name_of_scripted", "scripted_callers", "scripted_in"]


def is_scripted(value: Any) -> bool:
    """Whether it is called, and runs no Python code then."""
    return issubclass(type(value), (ScriptModule, ScriptFunction))  # `isinstance` would ask proxies


def name_of_scripted(value: Any) -> str:
    """The name that it had before."""
    return str(getattr(value, "original_name", None) or getattr(value, "name", None) or type(value).__name__)


def scripted_in(module: nn.Module, seen: set[Any]) -> Iterator[tuple[str, Any]]:
    """Of TorchScript what a module is, has as an attribute that is no module of it, or names in its forward.

    `seen`: what was found before, and the classes whose forward was looked at.
    """
    if is_scripted(module):
        if module not in seen:  # as a part of another, in whose graph it is
            yield "it", module
        seen.update(module.modules())
        return
    for name, value in vars(module).items():
        if type(value) not in _PLAIN and is_scripted(value):
            yield f"its '{name}'", value
    cls: Any = class_of(module)
    if cls not in seen:
        seen.add(cls)
        if functions_called(module) is None:
            forward = python_function(cls.forward)
            for fn, code, _ in codes_of(originals.get(forward, forward), cls):
                found = [*named(fn, code), *of_modules(fn, code)]
                yield from [(f"'{name}'", value) for _, name, value in found if is_scripted(value)]


# Of the attributes that each module has.
_PLAIN = frozenset({bool, int, float, str, tuple, dict, set, OrderedDict, type(None)})


def called_in(scripted: Any, names: Collection[str]) -> list[str]:
    """Those of the functions `names` that it may call. One that is Python code is not to be found in the graph of what
    was traced, so it is taken to be there if something is that it calls.
    """
    try:
        words = set(_words_in(scripted.inlined_graph))
    except (AttributeError, RuntimeError):  # it has no forward, and other methods may be called
        return list(names)
    if any([word.startswith("_") and not word.startswith("__") for word in words]):  # what it stands for nobody knows
        return list(names)
    found = names_among(words)
    telling = words - _OF_PYTHON
    return [name for name in names if name in found or _calls_one(name, telling, names_among(telling))]


def _calls_one(name: str, words: set[str], found: frozenset[str]) -> bool:
    own = [one for one in spellings(name) if isinstance(one, FunctionType)]
    return any([not names_called_by(one).isdisjoint(found) or says(one, words) for one in own])


# What an operator after a number becomes: `1 - x` where it is traced and where it is scripted, `1 / x`.
_OF_NUMBER = {"rsub": "sub", "neg": "sub", "reciprocal": "div"}
# Operations on what is no tensor.
_OF_PYTHON = frozenset({"append", "dim", "format", "len", "size", "warn"})


def _words_in(block: Any) -> Iterator[str]:
    """What operations, and functions that were scripted with it, are called in a graph."""
    for node in block.nodes():
        space, _, kind = node.kind().partition("::")
        if space == "aten" or kind == "abs":
            yield kind
            yield _OF_NUMBER.get(kind, kind)
        if kind == "Constant" and node.hasAttribute("name"):
            yield node.s("name")
        for inner in node.blocks():
            yield from _words_in(inner)


def scripted_callers(names: Collection[str]) -> dict[str, str]:
    """What there is of TorchScript now that may call one of these functions: by its name that of the function. Of
    functions those that a Python module has under some name.
    """
    kinds = [*family(ScriptModule), ScriptFunction]
    references = [sys.getrefcount(kind) for kind in kinds]
    if references == _where_there_was_none:  # an instance has its class: to look for one takes a tenth of a second
        return {}
    found = [module for module in gc.get_referrers(*kinds[:-1]) if is_scripted(module)]
    modules: list[Any] = [*sys.modules.values()]
    for module in modules:
        if isinstance(module, ModuleType):
            found += [value for value in [*vars(module).values()] if type(value) is ScriptFunction]
    _where_there_was_none[:] = [] if found else references
    calls = [(name_of_scripted(one), called_in(one, names)) for one in found if hasattr(one, "inlined_graph")]
    return {name: called[0] for name, called in calls if called}


_where_there_was_none: list[int] = []  # how often each of these classes was referred to then
