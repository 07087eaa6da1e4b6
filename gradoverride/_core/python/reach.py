"""What a forward can reach besides its arguments, as its code tells.

Where all of that is known and none of it is a tensor, the forward may run on its arguments as they are, under
`no_grad`: no gradient can get lost. Anywhere else it runs on aliases, whose result shows whether it reached a tensor
that requires grad. The code is read once; what its names stand for is looked at again at each call.
"""

from __future__ import annotations

import builtins
import inspect
import sys
from collections.abc import Collection
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import nn

from gradoverride._core.python import scan
from gradoverride._core.python.by_class import once_per_class, standing
from gradoverride._core.python.bytecode import CALLS, LOCAL, Use, instructions, uses
from gradoverride._core.python.residuals import save_for_backward

__all__ = [
    *("SCALARS", "Name", "Reach", "attribute_names", "attributes_of_first", "calls_unseen", "calls_what_it_is_given"),
    *("methods_called", "names_assigned_by", "names_assigned_in", "names_changed_in", "names_filled_in", "names_in"),
]

SCALARS = frozenset({int, float, bool, complex, str, type(None), torch.dtype, torch.device})
"""Types of values that are no tensor and hold none."""


class Name(NamedTuple):
    """What the dict or cell `where` has there is a number, or still `value`. A class of its own: who asks what holds a
    function is to know it as ours.
    """

    where: Any
    key: str
    value: Any


class Reach:
    """The names that a forward refers to, and what they may stand for.

    `attributes` are those of its `self` that it reads, `methods` those that it calls; it does nothing else with it.
    """

    def __init__(self, names: list[Name], attributes: frozenset[str], methods: frozenset[str]) -> None:
        self.names = names
        self.attributes = attributes
        self.methods = methods

    @classmethod
    def of(cls, fn: Any, *, method: bool, owner: Any = None) -> Reach | None:
        """The reach of `fn`, a method of the class `owner` perhaps, or None if its code does not tell."""
        function = scan.python_function(fn)
        if function is None:  # a builtin
            known = isinstance(fn, BuiltinFunctionType) or type(fn).__name__ == "method_descriptor"
            known = known and _is_of_library(getattr(fn, "__module__", None) or "torch")
            return cls([], frozenset(), frozenset()) if known else None
        if fn is not function:  # a partial, a bound method, an object: they hold values of their own
            return None
        own_methods = methods_called(function, owner) if method else []
        names = [*own_methods, *_in_front_of(own_methods, owner)]
        methods = frozenset([name.key for name in own_methods])
        receivers = [function, *[name.value for name in own_methods]] if method else []
        attributes = frozenset[str]()
        for one in receivers:
            read = attributes_of_first(one.__code__, methods)
            if read is None:
                return None
            attributes |= read
        own = {helper.__module__ for helper, _ in scan.reachable(fn, cls=owner)}
        for helper, code in scan.reachable(fn, cls=owner):
            if _depends_on_grad_mode(code) or (helper is not function and not _is_bare(helper)):
                return None
            if calls_what_it_is_given(code):
                return None
            if _hands_on_a_function(helper, code):
                return None
            in_modules = [*scan.of_modules(helper, code)]
            receiver = code.co_varnames[0] if helper in receivers and code is helper.__code__ else None
            if not all(_is_known_attribute(key, in_modules) for key in _attributes_but_of(receiver, code)):
                return None
            others = _method_names(code, receiver, methods)
            if not all(_is_known_method(key, in_modules) for key in others):
                return None
            found = [*scan.named(helper, code), *in_modules]
            for key in _builtin_names(helper, code):
                value = getattr(builtins, key)  # anybody may put something there
                if type(value) not in SCALARS and not _is_free_of_tensors(value, own):
                    return None
                names.append(Name(helper.__globals__, key, scan.NOTHING))
            for where, key, value in found:
                if value is function:  # whose attributes it may read; a tensor may come to be one at any time
                    return None
                if value is not scan.NOTHING and type(value) not in SCALARS and not _is_free_of_tensors(value, own):
                    return None
                names.append(Name(where, key, value))
        return cls(names, attributes, methods)

    def conditions(self) -> tuple[str, dict[str, Any]]:
        """Code that is true when a name stands for something else now, and the globals of that code."""
        found: list[str] = []
        known: dict[str, Any] = {"_go_SCALARS": SCALARS, "_go_type": type}
        for index, (where, key, value) in enumerate(self.names):
            known[f"_go_where_{index}"], known[f"_go_value_{index}"] = where, value
            now = (
                f"_go_where_{index}.cell_contents" if isinstance(where, CellType) else f"_go_where_{index}.get({key!r})"
            )
            number = value is scan.NOTHING or type(value) in SCALARS
            found.append(f"_go_type({now}) not in _go_SCALARS" if number else f"{now} is not _go_value_{index}")
        return " or ".join(dict.fromkeys(found)), known

    def holds(self) -> bool:
        """Whether none stands for something else now."""
        code, known = self.conditions()
        return not code or not eval(code, known)


def methods_called(fn: Any, owner: Any) -> list[Name]:
    """The methods of the class `owner` that this one calls on its `self`, and that these call in turn."""
    found: dict[str, Name] = {}
    waiting = [scan.python_function(fn)] if owner is not None else []
    while waiting:
        function = waiting.pop()
        for key, method in scan.own_methods(function, owner).items() if function is not None else ():
            if key not in found:
                where = next(vars(base) for base in owner.__mro__ if key in vars(base))
                found[key] = Name(where, key, method)
                waiting.append(method)
    return list(found.values())


def _in_front_of(methods: list[Name], owner: Any) -> list[Name]:
    """Where another of their names would come first: in the classes before those that they stand in."""
    found: list[Name] = []
    for method in methods:
        for base in owner.__mro__:
            if method.key in vars(base):
                break
            found.append(Name(vars(base), method.key, scan.NOTHING))
    return found


def calls_unseen(fn: Any) -> bool:
    """Whether `fn` calls what `scan.codes_of` does not show: a method of an object, what is no function, what it has
    computed or was given.
    """
    seen = list(scan.codes_of(fn, None))
    functions = {id(function) for function, _, _ in seen}
    for function, code, _ in seen:
        in_modules = [*scan.of_modules(function, code)]
        if not all(_is_known_method(name, in_modules) for name in _method_names(code)):
            return True
        if calls_what_it_is_given(code) or not _BY_ANY_NAME.isdisjoint(code.co_names):
            return True
        found = [value for _, _, value in (*scan.named(function, code), *in_modules)]
        found += scan.imported(function, code)
        found += [part for value in found for part in scan.parts_of(value)]
        if any(_is_unassigned(value) or (_is_unseen(value) and id(value) not in functions) for value in found):
            return True
    return False


def calls_what_it_is_given(code: CodeType) -> bool:
    """Whether `code` calls a variable of its own, an item of something, or what a call has given."""
    if any(use.is_called and use.kind == LOCAL and not use.attributes for use in uses(code)):
        return True
    steps = instructions(code)
    places = [index for index, step in enumerate(steps) if step.opname == "PUSH_NULL"]
    before = any(steps[index + 1].argrepr.startswith("NULL") for index in places)  # of what is called
    behind = any(steps[index - 1].opname in _GIVING for index in places)
    return before if sys.version_info < (3, 13) else behind


_GIVING = ("BINARY_OP", "BINARY_SUBSCR", *CALLS, "CALL_FUNCTION_EX")  # the first is an item from Python 3.14 on


def attribute_names(fn: Any, *, method: bool, cls: Any = None) -> tuple[str, ...]:
    """The attributes that not every tensor has and that `fn` may read or set on one, as far as code shows it.

    Of a `method` of `cls` those in the methods and properties that it names besides.
    """
    found: set[str] = set()
    for function, code, is_method in scan.codes_of(fn, cls):
        known = [*scan.of_modules(function, code)]
        receives = method and is_method and code is function.__code__ and code.co_varnames
        receiver = code.co_varnames[0] if receives else None
        names = _attributes_but_of(receiver, code) | _given_as_texts(code)
        found |= {name for name in names if not _is_known_attribute(name, known)}
    return tuple(sorted(found))


def names_in(fn: Any, cls: Any) -> frozenset[str] | None:
    """The names in the code of `fn`, and of the methods and properties of `cls` that it names. None where it may ask
    for any: by a name that it computes, or in code that is not seen.
    """
    found: set[str] = set()
    for function, code, _ in scan.codes_of(fn, cls):
        if not _BY_ANY_NAME.isdisjoint(code.co_names) or _calls_what_is_not_seen(function, code, cls):
            return None
        found.update(code.co_names)
    return frozenset(found)


def _calls_what_is_not_seen(function: FunctionType, code: CodeType, cls: Any) -> bool:
    """Whether `code` calls what `codes_of` does not go into, and what is not known to be of a library."""
    in_modules = [*scan.of_modules(function, code)]

    def is_seen(method: str) -> bool:
        own = scan.python_function(standing(cls, method))
        return own is not None or hasattr(nn.Module, method) or _is_known_method(method, in_modules)

    for use in uses(code):
        called = (use.is_method or use.is_called) and use.name not in ("forward", "vjp")
        if called and not (is_seen(use.attributes[-1]) if use.attributes else use.kind != LOCAL):
            return True
    values = [value for _, _, value in (*scan.named(function, code), *in_modules)]
    return any([_is_unassigned(value) or _may_call_any(value) for value in values])


def _may_call_any(value: Any) -> bool:
    if isinstance(value, type):
        return not scan.is_of_library(value.__module__)
    return _is_unseen(value) and not isinstance(value, FunctionType)


def names_assigned_in(fn: Any, cls: Any) -> frozenset[str]:
    """The names of attributes that `fn` assigns, or one of those methods."""
    found: set[str] = set()
    for _, code, _ in scan.codes_of(fn, cls):
        found |= {use.attributes[-1] for use in uses(code) if use.attributes and use.way == "STORE"}
        found |= _given_as_texts(code)
    return frozenset(found)


@once_per_class
def names_assigned_by(cls: Any) -> tuple[str, ...]:
    """The names of attributes that the forward of a `cls` assigns, or one that stands there behind it."""
    forwards = [vars(base)["forward"] for base in cls.__mro__ if isinstance(vars(base).get("forward"), FunctionType)]
    found = [names_assigned_in(inspect.unwrap(forward), cls) for forward in forwards]
    return tuple(sorted(frozenset[str]().union(*found)))


def names_filled_in(fn: Any, cls: Any) -> frozenset[str]:
    """The names in code of `fn`, or of those methods, that puts something into a container under a key."""
    found: set[str] = set()
    for _, code, _ in scan.codes_of(fn, cls):
        if any(step.opname == "STORE_SUBSCR" or step.argval in _FILLING for step in instructions(code)):
            found.update(code.co_names)
    return frozenset(found)


_FILLING = ("setdefault", "update")


def names_changed_in(fn: Any, cls: Any) -> frozenset[str]:
    """The attributes whose container `fn`, or one of those methods, changes by a method of it, such as `pop`.

    `self.saved[key].pop()` changes what is in it, and so does `saved = self.saved` with `saved.pop()`.
    """
    found: set[str] = set()
    for _, code, _ in scan.codes_of(fn, cls):
        read: set[str] = set()  # since something was stored
        origins: dict[str, set[str]] = {}  # by variable, the attributes that its value comes from
        for index, step in enumerate(instructions(code)):
            for use in (use for use in uses(code) if use.last == index):
                for place, name in enumerate(use.attributes):
                    if name in _CHANGING:
                        found |= read | (origins.get(use.name, set()) if place == 0 else set())
                    read.add(name)
                if use.way == "STORE" and not use.attributes:
                    origins.setdefault(use.name, set()).update(read)
                    read = set()
            if step.opname == "DELETE_SUBSCR":
                found |= read
            elif step.opname.startswith("STORE_"):
                read = set()
    return frozenset(found)


_CHANGING = frozenset(
    {
        *("append", "clear", "extend", "insert", "pop", "popitem", "remove", "reverse", "setdefault", "sort", "update"),
        "move_to_end",
    }
)


def _given_as_texts(code: CodeType) -> set[str]:
    """What may be the name of an attribute in `code` that asks for them so."""
    if _BY_NAME.isdisjoint(code.co_names):
        return set()
    return {text for text in code.co_consts if isinstance(text, str) and text.isidentifier()}


def _attributes_but_of(receiver: str | None, code: CodeType) -> set[str]:
    """The attributes in `code` that are no called methods, but those of its `self`."""
    found: set[str] = set()
    for use in uses(code):
        names = use.attributes[:-1] if use.is_method else use.attributes
        found.update(names[1:] if (use.kind, use.name) == (LOCAL, receiver) else names)
    return found


_BY_NAME = frozenset({"__getattribute__", "attrgetter", "delattr", "getattr", "hasattr", "setattr"})
_BY_ANY_NAME = _BY_NAME | {"__dict__", "vars"}


def _is_unassigned(value: Any) -> bool:
    """Whether it stands for a name that is not assigned yet, as one of a function that the module defines below."""
    return value is scan.NOTHING or isinstance(value, CellType)


def _is_unseen(value: Any) -> bool:
    if isinstance(value, FunctionType):
        return not _is_of_library(value.__module__)
    if not callable(value) or isinstance(value, (type, torch.Tensor)):
        return False
    return not isinstance(value, BuiltinFunctionType) and not _is_of_library(type(value).__module__)


def _method_names(code: CodeType, receiver: str | None = None, own: Collection[str] = ()) -> set[str]:
    """The names of the methods that `code` calls, but for its `own` on its `self`."""
    called = [use for use in uses(code) if use.is_method]
    return {use.attributes[-1] for use in called if not _is_own_method(use, receiver, own)}


def _is_own_method(use: Use, receiver: str | None, own: Collection[str]) -> bool:
    return (use.kind, use.name) == (LOCAL, receiver) and len(use.attributes) == 1 and use.attributes[0] in own


def _builtin_names(function: FunctionType, code: CodeType) -> list[str]:
    """The builtins that `code` names: its module may yet get something of its own of that name."""
    return [name for name in scan.global_names(code) if name not in function.__globals__ and hasattr(builtins, name)]


def _is_known_attribute(name: str, in_modules: list[tuple[Any, str, Any]]) -> bool:
    """Whether this is a tensor's, or what was found in a module: anybody may put a tensor on a tensor."""
    return hasattr(torch.Tensor, name) or any(key == name for _, key, _ in in_modules)


def _is_known_method(name: str, in_modules: list[tuple[Any, str, Any]]) -> bool:
    """The same of what is called, on texts too."""
    return hasattr(str, name) or _is_known_attribute(name, in_modules)


def _is_free_of_tensors(value: Any, own: set[str], depth: int = 3) -> bool:
    """Whether `value` is a library's, or a function whose code is looked at itself."""
    if isinstance(value, ModuleType):  # what is taken from it is looked at itself
        return _is_of_library(value.__name__) or value.__name__ == "gradoverride"
    if value is save_for_backward:
        return True
    if isinstance(value, FunctionType):
        if value.__module__ in own:
            return True
        # By where it was written, not by where it says: `functools.wraps` copies that.
        held = [*map(scan.content, value.__closure__ or ()), *(value.__defaults__ or ())]
        known = depth > 0 and _is_of_library(value.__globals__.get("__name__"))
        return known and all(type(part) in SCALARS or _is_free_of_tensors(part, own, depth - 1) for part in held)
    if isinstance(value, type):
        return _is_of_library(value.__module__)
    if isinstance(value, BuiltinFunctionType):  # or a bound method of an object, such as a tensor
        return isinstance(value.__self__, (ModuleType, type, type(None)))
    return type(value).__name__ == "method_descriptor" or value is None


def _is_of_library(module: str | None) -> bool:
    return str(module).partition(".")[0] in {"torch", "math", "operator", "builtins", "numpy"}


def _is_bare(helper: FunctionType) -> bool:
    """Whether a function holds no values: as defaults or as attributes."""
    defaults = (*(helper.__defaults__ or ()), *(helper.__kwdefaults__ or {}).values())
    return not vars(helper) and all(type(value) in SCALARS for value in defaults)


def _hands_on_a_function(function: FunctionType, code: CodeType) -> bool:
    """Whether `code` does anything else with a function that it names than to call it: it may read its attributes, and
    a tensor may come to be one at any time, under a name that every tensor has too.
    """
    others = [use for use in uses(code) if use.attributes or not use.is_called]
    values = [scan.value_of(function, use) for use in others]
    return any([isinstance(value, FunctionType) and not _is_of_library(value.__module__) for value in values])


def _depends_on_grad_mode(code: CodeType) -> bool:
    """Whether code may do another thing with a tensor that requires grad, or reach what its names do not show."""
    return any(name in _TELLING for name in code.co_names) or any(
        step.opname == "MATCH_CLASS" or (step.opname == "IMPORT_NAME" and not _is_of_library(step.argval))
        for step in instructions(code)
    )


_TELLING = frozenset(
    {
        *("autograd", "backward", "enable_grad", "func", "grad", "grad_fn", "inference_mode", "is_grad_enabled"),
        *("is_leaf", "register_hook", "requires_grad", "requires_grad_", "retain_grad", "set_grad_enabled", "vmap"),
        *("__dlpack__", "from_dlpack", "to_dlpack", "compile", "jit", "new_tensor", "resize_", "tensor"),
        *("__getattribute__", "attrgetter", "methodcaller"),
        *("__dict__", "__import__", "eval", "exec", "getattr", "globals", "locals", "super", "vars"),
    }
)


def attributes_of_first(code: CodeType, own: Collection[str] = ()) -> frozenset[str] | None:
    """The attributes of its first parameter that a function reads, if it does nothing else with it than to call these
    methods of its `own`.
    """
    if not code.co_argcount:
        return None
    first = code.co_varnames[0]
    if first in code.co_cellvars:
        return None
    found = [use for use in uses(code) if (use.kind, use.name) == (LOCAL, first)]
    found = [use for use in found if not (use.is_method and _is_own_method(use, first, own))]
    if not all([len(use.attributes) > use.is_method + (use.way != "LOAD") for use in found]):
        return None
    return frozenset([use.attributes[0] for use in found])
