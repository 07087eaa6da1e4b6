"""Which functions of torch call which others, and which modules are nothing but a call of one, as their code tells."""

from __future__ import annotations

import dis
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Set
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from gradoverride._core.in_force.everywhere import bare_forward, originals
from gradoverride._core.python import scan
from gradoverride._core.python.bytecode import CALLS, GLOBAL, codes_in, instructions, uses
from gradoverride._core.torch_functions.functions import (
    every_spelling,
    is_of_torch,
    name_of_function,
    names_among,
    unlisted,
    words,
)

__all__ = ["calls_that_are", "may_call", "names_called_by", "opened", "reaching", "says"]


@functools.lru_cache(maxsize=256)
def reaching(names: frozenset[str]) -> dict[Any, Callable[..., Any]]:
    """Functions of torch in Python from which one of these functions may be called, opened: `opened`."""
    wanted = frozenset[str]().union(*[words().get(name, ()) for name in names])
    return {math.prod: _prod} | {
        function: opened(function)
        for function, mentioned in _mentioned().items()
        if wanted and (wanted & mentioned or _calls_what_it_is_given(function))
        if name_of_function(function) not in names
    }


def _prod(iterable: Iterable[Any], /, *, start: Any = 1) -> Any:
    """What `math.prod` does, which Dynamo takes for one operation."""
    for factor in iterable:
        start = start * factor
    return start


def names_called_by(function: FunctionType) -> frozenset[str]:
    """The functions that one of torch in Python may call by their names: its operators may be those of numbers, and
    there is none that has operators alone.
    """
    return names_among({name for name in _mentioned().get(function, set()) if not name.startswith("__")})


def says(function: FunctionType, words: Set[str]) -> bool:
    """Whether one of these words is in the code of a function of torch, or in that of those in Python that it calls."""
    return not _mentioned().get(function, set()).isdisjoint(words)


def _calls_what_it_is_given(function: FunctionType) -> bool:
    """Whether it takes a function, from which any may be called: `F.triplet_margin_with_distance_loss`."""
    return any(["Callable" in str(kind) for kind in function.__annotations__.values()])


@functools.cache
def _mentioned() -> dict[FunctionType, set[str]]:
    """By function of torch in Python, the names and operators in its code and in that of its helpers."""
    functions = [function for function in every_spelling() if isinstance(function, FunctionType)]
    own: dict[FunctionType, set[str]] = {}

    def within(function: FunctionType, seen: set[FunctionType]) -> set[str]:
        seen.add(function)
        if function not in own:
            own[function] = _names_in(function.__code__)
        found = set(own[function])
        for name in function.__code__.co_names:
            helper = function.__globals__.get(name)
            if isinstance(helper, FunctionType) and helper not in seen and helper.__module__ == function.__module__:
                found |= within(helper, seen)
        return found

    found = {function: within(function, set()) for function in functions}
    by_name: dict[str, set[str]] = {}
    for function, mentioned in found.items():
        if function not in unlisted():  # such as `torch.masked.sum`
            by_name.setdefault(function.__name__, set()).update(mentioned)
    for mentioned in found.values():
        ahead = [*mentioned]
        while ahead:  # one may call another
            further = by_name.get(ahead.pop(), set()) - mentioned
            mentioned |= further
            ahead += further
    return found


def _names_in(code: CodeType) -> set[str]:
    """The names and operators in this code and in what is nested in it."""
    return {name for inner in codes_in(code) for name in (*inner.co_names, *_operators_in(inner))}


_OPERATORS = {
    "+": "add",
    "-": "sub",
    "*": "mul",
    "/": "truediv",
    "**": "pow",
    "@": "matmul",
    "//": "floordiv",
    "%": "mod",
}


def _operators_in(code: CodeType) -> set[str]:
    steps = instructions(code)
    signs = {step.argrepr.rstrip("=") for step in steps if step.opname == "BINARY_OP"}
    negative = ["__neg__"] if any([step.opname == "UNARY_NEGATIVE" for step in steps]) else []
    return {*negative, *[f"__{name}__" for sign, name in _OPERATORS.items() if sign in signs]}


def may_call(cls: Any) -> frozenset[str] | None:
    """The functions of torch that modules of this class may call, by name. None: any.

    It is known of those of `torch.nn` alone, by the names in their code and in that of the functions in Python that
    they call. More names than it calls do no harm.
    """
    return _may_call(cls, bare_forward(cls))


@functools.lru_cache(maxsize=1024)
def _may_call(cls: type, forward: Any) -> frozenset[str] | None:
    if not cls.__module__.startswith("torch.nn.modules."):
        return None
    known = _mentioned()
    bases = cls.__mro__[: cls.__mro__.index(nn.Module)]
    mentioned: set[str] = set()
    seen: set[Any] = set()
    ahead = [forward]
    while ahead:
        function = ahead.pop()
        if function in seen:
            continue
        seen.add(function)
        if not isinstance(function, FunctionType) or not _is_of(function, "torch"):
            return None
        names = _names_in(function.__code__)
        mentioned |= names
        methods = [vars(base)[name] for name in names for base in bases if name in vars(base)]
        ahead += [method.fget if isinstance(method, property) else method for method in methods]
        for _, _, value in (*scan.named(function, function.__code__), *scan.of_modules(function, function.__code__)):
            if isinstance(value, FunctionType) and value not in known and not _is_of(value, *_CALLING_NONE):
                ahead.append(value)
    for function, within in known.items():
        if function.__name__ in mentioned and function not in unlisted():
            if _calls_what_it_is_given(function):
                return None
            mentioned = mentioned | within
    return names_among(mentioned)


def _is_of(function: FunctionType, *packages: str) -> bool:
    """Whether it was written in one of these: `functools.wraps` copies where it says that it is."""
    module = f"{function.__globals__.get('__name__')}."
    return any([module.startswith(f"{package}.") for package in packages])


_CALLING_NONE = ("torch.jit", "torch._jit_internal", "torch.overrides", "torch.compiler", "warnings")


@functools.cache
def opened(function: FunctionType) -> Callable[..., Any]:
    """`function` of torch without its question at the top whether somebody overrides it: its body runs.

    A mode that has seen it may so enter itself again, to see what its body calls.
    """
    # Without `__name__` Dynamo takes the names from here, and not from the module.
    known = {key: value for key, value in function.__globals__.items() if key != "__name__"}
    known.update({key: _nobody for key in known if key.startswith("has_torch_function")})
    body = FunctionType(function.__code__, known, function.__name__, function.__defaults__, function.__closure__)
    body.__kwdefaults__ = function.__kwdefaults__
    return body


def _nobody(*_: Any) -> bool:
    return False


# --- modules that are nothing but a call of such a function


def calls_that_are(cls: Any, module: Any = None) -> frozenset[str]:
    """The functions of torch that a module of this class is another spelling of: `linear` for `nn.Linear`.

    A forward of torch is one of what it calls itself, another one if it is one call and no more: of a function, of a
    method of its own, of `super()`; or of a function that the `module`, if that is given, has as an attribute.
    """
    found = _calls_that_are(cls, bare_forward(cls))
    if not any([name.startswith(".") for name in found]):
        return found
    names = [name_of_function(getattr(module, name[1:], None)) if name[0] == "." else name for name in found]
    return frozenset([name for name in names if name is not None])


@functools.lru_cache(maxsize=1024)
def _calls_that_are(cls: type, fn: Any) -> frozenset[str]:
    forward = scan.python_function(fn)
    return frozenset(() if forward is None else _spelt_by(cls, forward, set()))


def _spelt_by(cls: type, function: FunctionType, seen: set[FunctionType]) -> set[str]:
    """The names for this method of such a module; ".name" for what it has as an attribute of that name."""
    seen.add(function)
    one_call, of_torch = _is_one_call(function), is_of_torch(function)
    parts = {f".{name}" for name in _called_of(function, "self") if not hasattr(cls, name)}
    if not one_call and (parts or not of_torch):  # what calls its parts does more than this
        return set()
    code = function.__code__
    values = [value for _, _, value in (*scan.named(function, code), *scan.of_modules(function, code))]
    values += [getattr(torch, name, None) for name in _called_of(function, "_VF")]  # another way to functions of torch
    names = [name_of_function(value) for value in values if callable(value) and not isinstance(value, type)]
    methods = list(_methods_of(cls, function))
    found = {name for name in names if name is not None}
    for method in methods:
        if method not in seen:
            found |= _spelt_by(cls, method, seen)
    if found or methods or not one_call:
        return found
    names = [name_of_function(getattr(Tensor, name, None)) for name in function.__code__.co_names]
    return parts or {name for name in names if name is not None}


def _called_of(function: FunctionType, owner: str) -> Iterator[str]:
    """The attributes of what has this name in a function that it calls: `head` of `self.head(x)`."""
    code = function.__code__
    owner = code.co_varnames[0] if owner == "self" and code.co_argcount else owner
    for use in uses(code):
        # What a global has is called so or so, if it was imported.
        called = use.is_method and len(use.attributes) == 1
        if use.name == owner and use.attributes and (called or use.kind == GLOBAL):
            yield use.attributes[0]


def _methods_of(cls: type, function: FunctionType) -> Iterator[FunctionType]:
    """The methods of a module of this class that this one calls, by their names or by `super()`."""
    names = function.__code__.co_names
    for name in names:
        method = getattr(cls, name, None)
        if isinstance(method, FunctionType) and not hasattr(nn.Module, name):
            yield method
    if "super" in names:
        name = function.__name__
        known = [vars(base)[name] for base in cls.__mro__ if name in vars(base)]
        known = [originals.get(method, method) for method in known]
        inherited = known[known.index(function) + 1 :] if function in known else []
        if inherited and isinstance(inherited[0], FunctionType):
            yield inherited[0]


def _is_one_call(function: FunctionType) -> bool:
    """Whether it makes one call, and does nothing else with what that gives than to return it as it is."""
    steps = instructions(function.__code__)
    calls = sum([step.opname in _CALLS for step in steps])
    for step in reversed(steps):
        if step.opname in _CALLS:
            break
        if not step.opname.startswith(_HANDED_ON):  # a part of it, a tuple or a dict around it
            return False
    calls -= sum([step.opname == "LOAD_GLOBAL" and step.argval == "super" for step in steps])  # called for its method
    return calls == 1 and not any([_is_work(step) for step in steps])


def _is_work(step: dis.Instruction) -> bool:
    return step.opname.startswith(_WORK) or (step.opname == "LOAD_ATTR" and step.argval in _VIEWS)


# The last one is what calls `super`, from Python 3.12 on.
_CALLS = (*CALLS, "CALL_FUNCTION_EX", "LOAD_SUPER_ATTR")
_WORK = ("BINARY_", "UNARY_", "COMPARE_", "FOR_", "STORE_ATTR", "STORE_SUBSCR", "STORE_SLICE", "POP_JUMP")
_HANDED_ON = (
    *("LOAD_FAST", "STORE_FAST", "DELETE_FAST", "LOAD_DEREF", "STORE_DEREF"),
    *("RETURN_", "POP_TOP", "COPY"),
)
_VIEWS = frozenset({"T", "mT", "H", "mH", "real", "imag"})
