"""Whether a function may write into a tensor, as its code tells, and whether it is an expression of a known kind.

It only chooses between two right ways (a copy or the gradient itself; one error sooner or later): nothing is silently
wrong when a function hides what it does, only slower or reported later.
"""

from __future__ import annotations

import dis
from collections.abc import Collection
from types import BuiltinFunctionType, CodeType, FunctionType, MethodDescriptorType, ModuleType
from typing import Any

import torch
from torch import Tensor

from gradoverride._core.python.by_class import once_per_class
from gradoverride._core.python.bytecode import CALLS, CELL, JUMPS, LOCAL, instructions, is_called, uses
from gradoverride._core.python.scan import (
    constants,
    global_names,
    mentions,
    named_values,
    own_methods,
    reachable,
    value_of,
)

__all__ = [
    "builds_dict",
    "class_normalizes",
    "gives_alike",
    "is_algebra",
    "is_arithmetic",
    "normalizes",
    "renormalizes",
    "writes",
    "writes_nothing",
]


def writes(fn: Any, but: str = "", cls: Any = None) -> bool:
    """Whether the code of `fn`, a method of `cls` perhaps, may write into a tensor: `t[...] =`, `t += `, `t.mul_()`,
    `out=`, `self.inplace`.

    The option `but` is taken to be off.
    """
    options = {*_WRITING_OPTIONS} - {but}
    for _, code in reachable(fn, cls=cls):
        if any(_is_inplace_name(name) or name in options for name in code.co_names):
            return True
        if any(constant in options for constant in constants(code)):
            return True
        if any(_is_write(step) for step in instructions(code)):
            return True
    return False


def is_arithmetic(fn: Any, attributes: frozenset[str] = frozenset()) -> bool:
    """Whether `fn` is an expression of its own arguments, constants and these attributes in operators and elementwise
    functions of torch alone, or a tuple or dict of such.

    Such a function writes nowhere, reaches nothing else, stays on its device, and means the same under autocast.
    """
    return _is_expression(fn, _ELEMENTWISE, attributes, _OPERATORS)


def is_algebra(fn: Any) -> bool:
    """The same with matrix products, sums and other shapes besides: not all of it means the same under autocast, and
    what it gives may be a view.
    """
    return _is_expression(fn, _ELEMENTWISE | _ALGEBRA, _TRANSPOSED, _OPERATORS | {"@"})


def _is_expression(
    fn: Any, functions: frozenset[str], attributes: frozenset[str], operators: frozenset[str], free: bool = False
) -> bool:
    if isinstance(fn, BuiltinFunctionType):
        return fn.__name__ in functions and getattr(torch, fn.__name__, None) is fn
    if not isinstance(fn, FunctionType) or (fn.__closure__ and not free) or writes(fn):
        return False
    named = calls = 0
    for step in instructions(fn.__code__):
        known = step.opname in _ARITHMETIC or (free and step.opname in ("COPY_FREE_VARS", "LOAD_DEREF"))
        if step.opname in ("LOAD_METHOD", "LOAD_ATTR"):
            known = step.argval in functions or step.argval in attributes
            named += step.argval in functions
        elif step.opname == "LOAD_GLOBAL":
            known = getattr(fn.__globals__.get(step.argval), "__name__", None) == "torch"
        elif step.opname == "BINARY_OP":
            known = step.argrepr in operators
        elif step.opname in CALLS:
            calls += 1
        if not known:
            return False
    return calls == named  # or it calls one of its arguments


def gives_alike(fn: Any, *, free: bool = False) -> bool:
    """Whether `fn` is an expression of one argument and real numbers in operators and functions that keep a tensor's
    shape and dtype: its result is like the argument. A builtin may have arguments that are no tensors besides.

    If `free`, what is in its closure is taken for such numbers.
    """
    if not _is_expression(fn, _KEEPING, frozenset(), _OPERATORS, free=free):
        return False
    return isinstance(fn, BuiltinFunctionType) or (
        fn.__code__.co_argcount == fn.__code__.co_nlocals == 1
        and not any(step.opname in (*_BUILDS, "COMPARE_OP") for step in instructions(fn.__code__))
        and all(type(constant) in (int, float, type(None), str) for constant in constants(fn.__code__))
    )


def builds_dict(fn: Any) -> bool:
    """Whether an expression such as `is_arithmetic` tells is, or has in it, a dict."""
    return isinstance(fn, FunctionType) and any(step.opname in _DICTS for step in instructions(fn.__code__))


_DICTS = ("BUILD_MAP", "BUILD_CONST_KEY_MAP")
_BUILDS = ("BUILD_TUPLE", *_DICTS)
_ARITHMETIC = frozenset(
    {
        *("RESUME", "NOP", "PRECALL", "RETURN_VALUE", "RETURN_CONST"),
        *("LOAD_FAST", "LOAD_FAST_LOAD_FAST", "LOAD_CONST", "UNARY_NEGATIVE", "COMPARE_OP"),
        *("STORE_FAST", "STORE_FAST_STORE_FAST", "STORE_FAST_LOAD_FAST"),
        *("KW_NAMES", "PUSH_NULL"),
        *CALLS,
        *_BUILDS,
    }
)
_ELEMENTWISE = frozenset(
    {
        *("abs", "add", "ceil", "clamp", "clip", "cos", "div", "eq", "floor", "ge", "gt", "le", "lt", "maximum"),
        *("minimum", "mul", "ne", "neg", "ones_like", "relu", "round", "sgn", "sigmoid", "sign", "sin", "sqrt"),
        *("square", "sub", "tanh", "where", "zeros_like"),
    }
)
# Those of tensors alone: numbers are nothing that they take. (The modulus of a complex number is real.)
_KEEPING = frozenset(
    {
        *("ceil", "clamp", "clip", "cos", "floor", "neg", "relu", "round", "sgn", "sigmoid", "sign", "sin", "sqrt"),
        *("square", "tanh"),
    }
)
_OPERATORS = frozenset({"+", "-", "*", "/"})
_ALGEBRA = frozenset(
    {
        *("bmm", "expand", "expand_as", "flatten", "matmul", "mean", "mm", "permute", "reshape", "reshape_as"),
        *("squeeze", "sum", "sum_to_size", "t", "transpose", "unflatten", "unsqueeze", "view", "view_as"),
    }
)
_TRANSPOSED = frozenset({"H", "T", "mH", "mT"})


def writes_nothing(fn: Any, cls: Any = None) -> bool:
    """Whether the code of `fn` shows that it writes into no tensor that it is given.

    It calls only methods that are known, those of its `cls`, what torch computes with, functions of its own module, and
    a few builtins. What calls anything else may write: such a rule is handed a copy.
    """
    if getattr(fn, "writes_nothing", False):  # says so itself
        return True
    found = list(reachable(fn, cls=cls))
    if not found or writes(fn, cls=cls):
        return is_arithmetic(fn)  # a builtin
    own = {function.__module__ for function, _ in found}
    for function, code in found:
        for name in global_names(code):
            if name not in function.__globals__ and name not in _HARMLESS_BUILTINS:
                return False
        if not _calls_what_is_harmless(function, code, own, own_methods(function, cls)):
            return False
    return all(_is_harmless(value, own) for function, _ in found for value in named_values(function))


def _calls_what_is_harmless(function: FunctionType, code: CodeType, own: set[str], methods: Collection[str]) -> bool:
    """What comes out of modules is looked at, what is called on other values is known by its name."""
    steps = instructions(code)
    for index, step in enumerate(steps):
        if step.opname.startswith("IMPORT_") or (step.opname == "CALL_FUNCTION_EX" and step.arg != 0):
            return False  # what is imported, and the names in `**options`, the code does not show
        if step.opname.startswith("BINARY_") and is_called(steps, index):
            return False  # an item
    for use in uses(code):
        value = value_of(function, use)
        called = use.way == "LOAD" and (use.is_method or use.is_called)
        variable = use.name if use.kind in (LOCAL, CELL) else ""
        if called and value is None and variable not in ("", "vjp") and not use.attributes:
            return False
        for place, name in enumerate(use.attributes, 1):
            if isinstance(value, ModuleType):  # a method or not: an imported name is no object to Python's compiler
                value = getattr(value, name, _Unknown)
                if not _is_harmless(value, own):
                    return False
                continue
            held = place == 1 and variable in _HOLDERS
            if held and name in methods:  # the code of which is looked at itself
                continue
            if called and place == len(use.attributes) and (held or not _is_known_method(name) or not _is_plain(value)):
                return False
            value = None
        if _may_be_told_to_write(value, steps, use.last):
            return False
    return True


class _Unknown:
    """What a module does not have: it is not harmless."""


_HOLDERS = ("self", "cls", "module")  # what hangs there may have any name, and do anything


def _may_be_told_to_write(value: Any, steps: list[dis.Instruction], index: int) -> bool:
    """Whether this step loads a function that is told by a position whether to write: `F.relu(x, FLAG)`."""
    if not isinstance(value, FunctionType):
        return False
    names = value.__code__.co_varnames[: value.__code__.co_argcount]
    places = [place for place, name in enumerate(names) if name in _WRITING_OPTIONS]
    if not places:
        return False
    depth = 0
    for step in steps[index + 1 :]:
        if step.opcode in JUMPS:
            break  # which way it goes is not known
        depth += dis.stack_effect(step.opcode, step.arg)
        if step.opname in CALLS and depth <= 0:
            return step.arg is None or step.arg > min(places)
    return True


def _is_harmless(value: Any, own: set[str]) -> bool:
    if isinstance(value, ModuleType):
        return value.__name__ in _HARMLESS_MODULES
    if isinstance(value, FunctionType) and value.__module__ in own:
        return True
    if isinstance(value, (tuple, list, set, frozenset)):
        return all(_is_harmless(part, own) for part in value)
    if isinstance(value, dict):
        return all(_is_harmless(part, own) for part in dict.values(value))
    if callable(value):
        if not isinstance(value, (type, *_FUNCTIONS)):  # a module, an object: what it does is not known
            return False
        if isinstance(value, MethodDescriptorType):  # which says nothing of its module
            return value.__objclass__.__module__ == "torch._C" and not _is_inplace_name(value.__name__)
        if value.__module__ == "builtins":
            return value.__name__ in _HARMLESS_BUILTINS
        return value.__module__ in _HARMLESS_MODULES and not _is_inplace_name(value.__name__)
    return True


def _is_known_method(name: str) -> bool:
    """Whether a method of this name is one of tensors, or of what else a rule is given. Where it is one of lists too,
    that changes none (`sort` does).
    """
    of_tensors = hasattr(Tensor, name) and not name.startswith("__") and name != "sort"
    return of_tensors or name in ("by_name", "items", "values")


def _is_plain(value: Any) -> bool:
    """Whether methods of this value are those of tensors, or of numbers, texts and containers."""
    return isinstance(value, type) or type(value).__module__ in ("builtins", "torch", "torch.nn.parameter")


_FUNCTIONS = (FunctionType, BuiltinFunctionType, MethodDescriptorType)
# Where torch keeps functions that compute. Elsewhere are modules, which may be told to work in place, collectives,
# which write and say so neither by their names nor by the version of a tensor, and operators of others.
_HARMLESS_MODULES = frozenset(
    {
        *("math", "torch", "torch.functional", "torch.linalg", "torch.special", "torch.fft", "torch._linalg_utils"),
        *("torch._C._fft", "torch._C._linalg", "torch._C._nn", "torch._C._special"),
        *("torch.nn", "torch.nn.functional", "torch.nn.grad", "torch.nn.modules.utils"),
        *("gradoverride", "gradoverride._core.python.residuals"),
        *("torch.amp", "torch.amp.autocast_mode", "torch.autograd.grad_mode", "torch.compiler"),
    }
)
_HARMLESS_BUILTINS = frozenset(
    {
        *("abs", "bool", "complex", "dict", "enumerate", "float", "int", "isinstance", "len", "list", "max", "min"),
        *("print", "range", "reversed", "sorted", "str", "sum", "tuple", "type", "zip", "ValueError", "RuntimeError"),
    }
)


_WRITING_OPTIONS = ("out", "inplace")  # the names of keywords are among the constants


def _is_inplace_name(name: str) -> bool:
    return (name.endswith("_") and not name.endswith("__")) or name in _INPLACE_NAMES


_INPLACE_OPERATORS = (
    *("iadd", "iand", "ifloordiv", "ilshift", "imatmul", "imod", "imul", "ior", "ipow", "irshift", "isub", "itruediv"),
    "ixor",
)
_INPLACE_NAMES = frozenset(
    {
        *("__setitem__", "data", "numpy", "__array__", "copyto", "set_data"),
        *_INPLACE_OPERATORS,
        *(f"__{name}__" for name in _INPLACE_OPERATORS),
    }
)


def _is_write(instruction: dis.Instruction) -> bool:
    name = instruction.opname
    if name in {"STORE_SUBSCR", "STORE_SLICE", "DELETE_SUBSCR"}:
        return True
    if name == "STORE_ATTR":
        return instruction.argval in ("real", "imag", "requires_grad")  # two views of the tensor, and what it is
    return name == "BINARY_OP" and instruction.argrepr.endswith("=")


# --- writes that torch does not count ---


def normalizes(fn: Any, cls: Any = None) -> bool:
    """Whether the code of `fn` may update running statistics, a write that torch does not count."""
    return mentions(fn, *_NORMS, cls=cls)


_NORMS = ("batch_norm", "instance_norm")


def renormalizes(fn: Any) -> bool:
    """The same, or scale rows of a table down to a largest norm: a rule may give the gradient for one of these."""
    return normalizes(fn) or mentions(fn, "embedding", "embedding_bag")


@once_per_class
def class_normalizes(cls: Any) -> bool:
    """The same of the methods of a class of modules."""
    bases = [base for base in cls.__mro__ if base.__module__ != "torch.nn.modules.module"]
    methods = [value for base in bases for value in vars(base).values() if isinstance(value, FunctionType)]
    return any(map(normalizes, methods))
