"""What the code of a Python function tells of it: where it is, what it names, and what these names stand for.

Read once, at decoration. `purity.py` tells from it whether a function may write.
"""

from __future__ import annotations

import builtins
import functools
import importlib.util
import inspect
import itertools
import sys
from collections.abc import Callable, Collection, Iterator
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import nn

from gradoverride._core.python import bytecode
from gradoverride._core.python.by_class import named_in, standing

__all__ = [
    "NOTHING",
    "accumulates",
    "called_in",
    "called_once",
    "calls",
    "codes_of",
    "constants",
    "content",
    "free_names",
    "global_names",
    "imported",
    "is_of_library",
    "location",
    "mentions",
    "named",
    "named_values",
    "of_modules",
    "own_methods",
    "parts_of",
    "python_function",
    "reachable",
    "reads_only",
    "strings",
    "supers_of_own_class",
    "value_of",
]


def python_function(fn: Any) -> FunctionType | None:
    """The Python function that runs when `fn` is called, if one can be found."""
    while isinstance(fn, functools.partial):
        fn = fn.func
    if isinstance(fn, (MethodType, staticmethod, classmethod)):
        fn = fn.__func__
    if isinstance(fn, FunctionType):
        return fn
    method = standing(type(fn), "__call__")
    return method if isinstance(method, FunctionType) else None


def is_of_library(module: Any) -> bool:
    """Whether a module of this name is of torch, numpy, Python or this library: of what is not read further."""
    return str(module).partition(".")[0] in _LIBRARIES


_LIBRARIES = frozenset({"torch", "numpy", "gradoverride", *sys.stdlib_module_names})


def reachable(
    fn: Any, seen: set[FunctionType] | None = None, cls: Any = None
) -> Iterator[tuple[FunctionType, CodeType]]:
    """The code of `fn`, what is nested in it, and the functions of the same module that it names; of a method of `cls`
    that of the methods besides that it calls on its `self`.
    """
    seen = set() if seen is None else seen
    waiting = [(fn, cls)]
    while waiting:
        one, owner = waiting.pop()
        waiting += [(part, None) for part in getattr(one, "rules", ())]  # a `chain` of them
        function = python_function(one)
        if function is None or function in seen:
            continue
        seen.add(function)
        for code in bytecode.codes_in(function.__code__):
            yield function, code
        for value in named_values(function):
            helper = python_function(value) if isinstance(value, (FunctionType, functools.partial)) else None
            if helper is not None and helper.__module__ == function.__module__:
                waiting.append((helper, None))
        waiting += [(method, owner) for method in own_methods(function, owner).values()]


def own_methods(function: FunctionType, cls: Any) -> dict[str, FunctionType]:
    """By name, the methods of `cls` that a method of it calls on its `self`; not those of all modules."""
    code = function.__code__
    called = [use for use in bytecode.uses(code) if cls is not None and use.kind == bytecode.LOCAL and use.is_method]
    names = [use.attributes[0] for use in called if (use.name,) == code.co_varnames[:1] and len(use.attributes) == 1]
    found = {name: standing(cls, name) for name in names if name not in vars(nn.Module)}
    return {name: method for name, method in found.items() if isinstance(method, FunctionType)}


def codes_of(fn: Any, cls: Any) -> Iterator[tuple[FunctionType, CodeType, bool]]:
    """The code that `fn` shows, function by function, and that of the methods of `cls` named there, and of functions of
    other modules; with whether it is `fn` itself, or such a method.
    """
    seen: set[FunctionType] = set()
    waiting: list[tuple[Any, bool]] = [(fn, True)]
    while waiting:
        root, is_method = waiting.pop()
        for function, code in reachable(root, seen):
            yield function, code, is_method and function is python_function(root)
            values = [value for _, _, value in (*named(function, code), *of_modules(function, code))]
            values += imported(function, code)
            waiting += [(value, False) for value in values if isinstance(value, FunctionType) and _is_own(value)]
            if cls is not None:
                own = [one for name in code.co_names for one in named_in(code, cls, name)]
                methods = [python_function(one.fget if isinstance(one, property) else one) for one in own]
                waiting += [(method, True) for method in methods if method is not None and _is_own(method)]


def _is_own(function: FunctionType) -> bool:
    """Whether it was written by a user: `functools.wraps` copies where a function says that it is."""
    return not is_of_library(function.__globals__.get("__name__"))


def named_values(function: FunctionType) -> Iterator[Any]:
    """What the function's free and global names stand for now."""
    for code in bytecode.codes_in(function.__code__):
        for _, _, value in named(function, code):
            yield value


NOTHING = object()
"""What a global name stands for that nobody has assigned."""


def named(function: FunctionType, code: CodeType) -> Iterator[tuple[Any, str, Any]]:
    """Where the free names of `function` and the global ones of its `code` are, and what they stand for now."""
    yield from free_names(function)
    for key in global_names(code):
        if key in function.__globals__ or not hasattr(builtins, key):
            yield function.__globals__, key, function.__globals__.get(key, NOTHING)


def free_names(function: FunctionType) -> Iterator[tuple[CellType, str, Any]]:
    for key, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        yield cell, key, content(cell)


def content(cell: CellType) -> Any:
    """What a cell of a closure holds. Of a name that is not assigned yet, the cell: what it will hold nobody knows."""
    try:
        return cell.cell_contents
    except ValueError:
        return cell


def global_names(code: CodeType) -> list[str]:
    """The globals that `code` reads (`co_names` has the attributes too)."""
    return list(dict.fromkeys(use.name for use in bytecode.uses(code) if use.kind == bytecode.GLOBAL))


def of_modules(function: FunctionType, code: CodeType) -> Iterator[tuple[Any, str, Any]]:
    """What `code` takes from modules, as `named`: `F.relu` is where `F` has its `relu`, and may be replaced there."""
    for use in bytecode.uses(code):
        module = value_of(function, use)
        for key in use.attributes:
            if not isinstance(module, ModuleType):
                break
            where, module = vars(module), vars(module).get(key, NOTHING)
            if module is not NOTHING:
                yield where, key, module


def imported(function: FunctionType, code: CodeType) -> Iterator[Any]:
    """What `code` may use of the modules that it imports itself; NOTHING for one that is not loaded so far."""
    steps = bytecode.instructions(code)
    for index, step in enumerate(steps):
        if step.opname == "IMPORT_NAME":
            name = "." * steps[index - 2].argval + step.argval
            try:
                name = importlib.util.resolve_name(name, str(function.__globals__.get("__package__") or ""))
            except ImportError:  # it would fail itself
                continue
            if not is_of_library(name):
                found = getattr(sys.modules.get(name), "__dict__", None)
                yield from [NOTHING] if found is None else [found[key] for key in code.co_names if key in found]


def parts_of(value: Any) -> list[Any]:
    """The first parts of a dict, a list or a tuple; of anything else none. More of them are data."""
    # Some dicts load what they have when they are asked for it.
    parts = dict.values(value) if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [*itertools.islice(parts, _MANY)]


_MANY = 100


def value_of(function: FunctionType, use: bytecode.Use) -> Any:
    """What the global or free name of a use stands for now; None if nothing does, and of what a call has made."""
    if use.kind == bytecode.GLOBAL:
        return function.__globals__.get(use.name)
    if use.kind != bytecode.CELL:
        return None
    return next((value for cell, name, value in free_names(function) if name == use.name and value is not cell), None)


def called_in(function: FunctionType, use: bytecode.Use) -> FunctionType | None:
    """The function of a user that a use names, under a name of its own or as one of a module."""
    value = value_of(function, use)
    for name in use.attributes:
        value = vars(value).get(name) if isinstance(value, ModuleType) else None
    return value if isinstance(value, FunctionType) and _is_own(value) else None


def mentions(fn: Any, *names: str, cls: Any = None) -> bool:
    """Whether the code that `fn` shows has one of these names (of a global, an attribute, a method)."""
    return any(not frozenset(code.co_names).isdisjoint(names) for _, code, _ in codes_of(fn, cls))


def accumulates(fn: Any) -> bool:
    """Whether `fn` may change what is accumulated: its code assigns a `grad`, writes into one, or says `backward`."""
    own = None if isinstance(fn, FunctionType) else type(fn)
    for _, code, _ in codes_of(fn, own):
        if "backward" in code.co_names:
            return True
        for use in bytecode.uses(code):
            written = [name for name, following in itertools.pairwise(use.attributes) if following.endswith("_")]
            if "grad" in written or (use.way == "STORE" and use.attributes[-1:] == ("grad",)):
                return True
    return False


def calls(fn: Any, target: Callable[..., Any], cls: Any = None) -> bool:
    """Whether the code of `fn` names `target`, under its own name or another."""
    if mentions(fn, target.__name__, cls=cls):
        return True
    return any(value is target for function, _, _ in codes_of(fn, cls) for value in named_values(function))


def called_once(fn: Any, name: str) -> bool:
    """Whether `fn` uses its parameter `name` at one place only, outside of loops, to call it or a method of it."""
    function = python_function(fn)
    if function is None or name in function.__code__.co_cellvars:  # what is nested in it may use it again
        return False
    code = function.__code__
    if any(step.opcode in bytecode.JUMPS and step.argval <= step.offset for step in bytecode.instructions(code)):
        return False  # a loop
    found = [use for use in bytecode.uses(code) if use.kind == bytecode.LOCAL and use.name == name]
    return [(use.is_method or use.is_called) and len(use.attributes) <= 1 for use in found] == [True]


def constants(code: CodeType) -> Iterator[Any]:
    """The constants in `code`; of a tuple, such as that of the names of keywords, what is in it."""
    for constant in code.co_consts:
        yield from constant if isinstance(constant, tuple) else (constant,)


def strings(fn: Any) -> frozenset[str]:
    """All string constants in the code of `fn`."""
    found = [constant for _, code in reachable(fn) for constant in constants(code)]
    return frozenset([constant for constant in found if isinstance(constant, str)])


def supers_of_own_class(cls: type) -> set[str]:
    """The names in the methods of `cls` that ask for `super(self.__class__, self)`: what they may call of it."""
    found: set[str] = set()
    for owner in cls.__mro__:
        for name, value in vars(owner).items():
            function = None if name in ("__init__", "__new__") else python_function(_unwrapped(value))
            for code in () if function is None else bytecode.codes_in(function.__code__):
                if "super" in code.co_names and _asks_for_own_class(code):
                    found.update(code.co_names)
    return found


def reads_only(cls: type, part: str, attributes: Collection[str], base: type) -> bool:
    """Whether the methods of `cls`, as far as to its `base`, use a part of it for nothing but these of its attributes.

    (`self.out_proj.weight`, and `self.out_proj` nowhere else.) What makes the part does not count.
    """
    found = False
    for owner in itertools.takewhile(lambda owner: owner is not base, cls.__mro__):
        for name, value in vars(owner).items():
            function = None if name in ("__init__", "__new__") else python_function(_unwrapped(value))
            for code in () if function is None else bytecode.codes_in(function.__code__):
                if part in code.co_consts:  # `getattr(self, "out_proj")`
                    return False
                if part not in code.co_names:
                    continue
                for use in bytecode.uses(code):
                    read = use.attributes if use.way == "LOAD" else use.attributes[:-1]
                    for name, following in itertools.zip_longest(read, read[1:]):
                        if name == part:
                            found = True
                            if following not in attributes:
                                return False
    return found


def _unwrapped(value: Any) -> Any:
    return inspect.unwrap(value) if isinstance(value, FunctionType) else None


def _asks_for_own_class(code: CodeType) -> bool:
    """Whether `super(self.__class__, ...)` or `super(type(self), ...)` is in it."""
    return any(
        use[:2] == (bytecode.GLOBAL, "super")
        and (following[:2] == (bytecode.GLOBAL, "type") or following.attributes[:1] == ("__class__",))
        for use, following in itertools.pairwise(bytecode.uses(code))
    )


def location(fn: Any) -> str:
    """`file.py:12` of the code of `fn`, or how it is known if it has none."""
    function = python_function(inspect.unwrap(fn) if callable(fn) else fn)
    if function is None:
        return "built in"
    code = function.__code__
    return f"{code.co_filename}:{code.co_firstlineno}"
