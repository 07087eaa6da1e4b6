"""Whether a forward may ask if a tensor requires grad (`x.requires_grad`), itself or in what it calls.

Without `vjp` it runs on aliases that do not, and would take the other branch in silence. So the code of all that it may
call is looked through, in whatever module that is: functions, methods of the objects it names, parts of its module.
It rather finds too much than too little, and gives up where that is too much to look through: then the aliases require
grad, which costs time alone. Libraries are left out.
"""

from __future__ import annotations

import builtins
import functools
from collections.abc import Sequence
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn

from gradoverride._core.private.marks import OF_NO_MODULE
from gradoverride._core.python import scan
from gradoverride._core.python.by_class import all_standing, standing
from gradoverride._core.python.bytecode import codes_in, uses
from gradoverride._core.python.reach import SCALARS, calls_what_it_is_given

__all__ = ["asks_grad"]


def asks_grad(fn: Any, *owners: Any) -> bool | None:
    """Whether `fn`, a method of one of the `owners` (objects or classes) perhaps, may ask so. None if that cannot be
    told yet, for it names what is not assigned so far, a function that its module defines below, or imports a module
    that is not loaded.
    """
    return _Search(fn, owners).found()


class _Search:
    def __init__(self, fn: Any, owners: Sequence[Any]) -> None:
        self.waiting: list[Any] = [fn]
        self.seen: dict[int, Any] = {}
        self.names = {"__call__", "forward"}  # that the code so far may look up
        self.any_method = False  # whether it may look up any, by a name that it computes
        self.behind: set[str] = set()  # those of them that it may look up by `super()`
        self.owners: list[Any] = []  # and where it may do so
        self.unassigned = False
        self.functions = 0  # that were looked at
        for owner in owners:
            self.seen[id(owner)] = owner
            self._add_owner(owner)

    def found(self) -> bool | None:
        while self.waiting:
            value = self.waiting.pop()
            if id(value) not in self.seen and type(value) not in SCALARS and not isinstance(value, Tensor):
                self.seen[id(value)] = value
                if self._asks(value):
                    return True
        return None if self.unassigned else False

    def _asks(self, value: Any) -> bool:
        """Whether `value` is a function that asks so itself. What else it leads to is looked at next."""
        if isinstance(value, FunctionType):
            return self._function_asks(value)
        if isinstance(value, functools.partial):
            self.waiting += [value.func, *value.args, *value.keywords.values()]
        elif isinstance(value, MethodType):
            self.waiting += [value.__func__, value.__self__]
        elif isinstance(value, (staticmethod, classmethod)):
            self.waiting.append(value.__func__)
        elif isinstance(value, property):
            self.waiting.append(value.fget)
        elif isinstance(value, (dict, list, tuple)):
            self.waiting += scan.parts_of(value)
        elif not isinstance(value, ModuleType):
            self._add_owner(value)
        return False

    def _function_asks(self, function: FunctionType) -> bool:
        self.functions += 1
        if self.functions > _MANY:
            return True
        home = function.__globals__.get("__name__")
        if home == OF_NO_MODULE:  # of ours: it asks itself, and calls another
            self.waiting.append(getattr(function, "__wrapped__", None))
            return False
        self.waiting += [scan.content(cell) for cell in function.__closure__ or ()]
        if scan.is_of_library(home):
            return False
        self.waiting += [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
        for code in codes_in(function.__code__):
            if _asks_in(code):
                return True
            read = scan.global_names(code)
            self.waiting += [function.__globals__[name] for name in read if name in function.__globals__]
            self.unassigned |= any(name not in function.__globals__ and not hasattr(builtins, name) for name in read)
            self.waiting += [value for _, _, value in scan.of_modules(function, code)]
            imported = [*scan.imported(function, code)]
            self.unassigned |= any(value is scan.NOTHING for value in imported)
            self.waiting += imported
            behind = {*code.co_names}.difference(self.behind, read) if "super" in read else set()
            self.behind |= behind
            new = {*code.co_names}.difference(self.names, read) | behind
            self.names |= new
            if "getattr" in read and calls_what_it_is_given(code):
                if not self.any_method:
                    self.any_method = True
                    for owner in self.owners:
                        self._look_up_all(owner)
                modules = [one for _, _, one in scan.named(function, code) if isinstance(one, ModuleType)]
                texts = [text for text in scan.constants(code) if isinstance(text, str)]
                self.waiting += [vars(one)[text] for one in modules for text in texts if text in vars(one)]
            for owner in self.owners if new else ():
                self._look_up(owner, new)
        self.unassigned |= any(isinstance(scan.content(cell), CellType) for cell in function.__closure__ or ())
        return False

    def _add_owner(self, owner: Any) -> None:
        if isinstance(owner, nn.Module):
            self.waiting += owner.children()
        cls = owner if isinstance(owner, type) else type(owner)
        if _is_own(cls):
            self.owners.append(owner)
            self._look_up(owner, self.names)
            if self.any_method:
                self._look_up_all(owner)

    def _look_up(self, owner: Any, names: set[str]) -> None:
        own = {} if isinstance(owner, type) else getattr(owner, "__dict__", {})
        cls = owner if isinstance(owner, type) else type(owner)
        self.waiting += [own[name] if name in own else standing(cls, name) for name in names]
        self.waiting += [one for name in names & self.behind for one in all_standing(cls, name)]

    def _look_up_all(self, owner: Any) -> None:
        cls = owner if isinstance(owner, type) else type(owner)
        self.waiting += [one for base in cls.__mro__ if _is_own(base) for one in vars(base).values()]


def _is_own(cls: type) -> bool:
    return not scan.is_of_library(cls.__module__)


def _asks_in(code: CodeType) -> bool:
    if _NAME in code.co_consts and not _BY_TEXT.isdisjoint(code.co_names):
        return True
    return _NAME in code.co_names and any(use.way == "LOAD" and _NAME in use.attributes for use in uses(code))


_MANY = 300  # functions: code that leads to more leads through whole packages, for a minute
_NAME = "requires_grad"
_BY_TEXT = frozenset({"attrgetter", "getattr", "hasattr"})
