"""The functions of torch as targets: all spellings of one, and which function a module is a spelling of.

`F.relu`, `torch.relu`, `x.relu()`, `torch.relu_`, `F.relu(x, inplace=True)` are one function, `relu`. torch hands each
to a mode as an object of its own; here they are found by their names.
"""

from __future__ import annotations

import dis
import functools
import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator
from types import CodeType, FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import get_ignored_functions, resolve_name

from gradoverride._core import scan
from gradoverride._core.bytecode import CALLS, codes_in, instructions, is_method, last_loaded, without_preparations
from gradoverride._core.everywhere import bare_forward, originals
from gradoverride._core.private import PAD
from gradoverride._core.reach import of_modules

__all__ = [
    "INLINED",
    "calls_that_are",
    "every_spelling",
    "is_of_torch",
    "may_call",
    "name_of_function",
    "reaching",
    "signature_of",
    "spellings",
    "turned",
]


def is_of_torch(value: Any) -> bool:
    """Whether this is a function of torch, overridable or not: no predicate."""
    own = str(getattr(value, "__module__", "") or "").partition(".")[0] == "torch"
    return own or (_is_hashable(value) and resolve_name(value) is not None)


def _is_hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


def name_of_function(value: Any) -> str | None:
    """The one name of a function of torch in any spelling: `relu` of `torch.relu_`; None if a mode does not see it."""
    if not _is_hashable(value):
        return None
    value = _NOTHING_BUT.get(value, value)
    hidden = value in get_ignored_functions() and value not in _SHOWN
    full = None if hidden else resolve_name(value)
    if full is None or full.endswith(("__get__", "__set__", "__delete__")):
        return None
    if value in _separate():
        return full
    owner, _, name = full.rpartition(".")
    name = _DUNDERS.get(name, name)
    space = owner.removeprefix("torch").strip(".")
    if name.startswith("_") or space not in _SPACES:
        return None
    name = f"{_SPACES[space]}{name.rstrip('_')}"
    return _ALIASES.get(name, name)


def spellings(name: str) -> tuple[Any, ...]:
    """All functions of this name, as torch hands them to a mode."""
    return tuple(_known().get(name, ()))


def every_spelling() -> Iterator[Any]:
    """All functions that a mode is shown."""
    for group in _known().values():
        yield from group
    yield from _unlisted()


@functools.cache
def _unlisted() -> dict[FunctionType, None]:
    """Functions in Python that torch shows to no mode, for what they call is shown. Dynamo takes them as a whole."""
    names = [*dir(torch.masked), "upsample", "upsample_bilinear", "upsample_nearest"]
    found = [getattr(space, name, None) for space in (torch.masked, F) for name in names if name[0] != "_"]
    return dict.fromkeys([one for one in found if isinstance(one, FunctionType) and name_of_function(one) is None])


@functools.cache
def _known() -> dict[str, dict[Any, None]]:
    found: dict[str, dict[Any, None]] = {}
    for name, value, _ in _listed():
        found.setdefault(name, {}).setdefault(value, None)
    return found


@functools.cache
def _words() -> dict[str, frozenset[str]]:
    """By name of a function, what code says to call it: the names that torch has it under, its own, operators."""
    found: dict[str, set[str]] = {}
    for name, value, attribute in _listed():
        found.setdefault(name, set()).update((attribute, value.__name__))
    for operator, name in _DUNDERS.items():
        found.setdefault(name, set()).add(operator)
    return {name: frozenset(words) for name, words in found.items()}


@functools.cache
def _listed() -> list[tuple[str, Any, str]]:
    """Where torch has functions: the name of each as a target, the function, and what it is called there."""
    found: list[tuple[str, Any, str]] = []
    for space in (F, torch, Tensor, torch.special, torch.linalg, torch.fft):
        for attribute in dir(space):
            value = getattr(space, attribute)
            if callable(value) and not isinstance(value, type):
                name = name_of_function(value)
                if name is not None:
                    found.append((name, value, attribute))
    return found if PAD is None else [*found, ("pad", PAD, "pad")]


@functools.cache
def _separate() -> frozenset[Any]:
    """What bears the name of another function, and means something else or takes its tensors in another order."""
    same_name = (torch.embedding, torch.embedding_bag, torch.batch_norm, torch.instance_norm)
    return frozenset({*same_name, Tensor.unfold, Tensor.bernoulli_, Tensor.normal_})


# Where torch has its functions, and what their names begin with then.
_SPACES = {
    **dict.fromkeys(("", "functional", "nn.functional", "Tensor"), ""),
    **{space: f"{space}." for space in ("special", "linalg", "fft")},
}
# Nothing but a call of the other, which a mode sees.
_NOTHING_BUT: dict[Any, Any] = {F.tanh: torch.tanh, F.sigmoid: torch.sigmoid}
# torch says that these cannot be overridden, and shows them to a mode.
_SHOWN = frozenset({F.hardsigmoid, F.hardswish, Tensor.unflatten, torch.as_strided, torch.fill})

# Dynamo traces into these without a word to a mode.
INLINED = frozenset(
    {"linear_cross_entropy", "lu", "triplet_margin_with_distance_loss", *(["pad"] if PAD is None else [])}
)

_ARITHMETIC = ("add", "sub", "mul", "matmul", "pow")
_DUNDERS = {
    **{f"__{prefix}{name}__": name for name in _ARITHMETIC for prefix in ("", "r", "i")},
    **{f"__{prefix}{name}__": "div" for name in ("truediv", "div") for prefix in ("", "r", "i")},
    **{f"__{prefix}floordiv__": "floor_divide" for prefix in ("", "r", "i")},
    **{f"__{prefix}mod__": "remainder" for prefix in ("", "r", "i")},
    **{"__neg__": "neg", "__abs__": "abs", "__pos__": "positive"},
}
_MAX = ("max", "adaptive_max", "fractional_max")
# torch documents these as other names of the same functions.
_ALIASES = {
    **{"absolute": "abs", "arccos": "acos", "arccosh": "acosh", "arcsin": "asin", "arcsinh": "asinh"},
    **{"arctan": "atan", "arctan2": "atan2", "arctanh": "atanh", "clip": "clamp", "concat": "cat"},
    **{"concatenate": "cat", "divide": "div", "true_divide": "div", "fix": "trunc", "ger": "outer"},
    **{"linalg.det": "det", "linalg.matmul": "matmul", "moveaxis": "movedim", "multiply": "mul", "negative": "neg"},
    **{"row_stack": "vstack", "special.digamma": "digamma", "special.erf": "erf", "special.erfc": "erfc"},
    **{"special.erfinv": "erfinv", "special.exp2": "exp2", "special.expit": "sigmoid", "special.expm1": "expm1"},
    **{"special.gammaln": "lgamma", "special.i0": "i0", "special.log1p": "log1p", "special.log_softmax": "log_softmax"},
    **{"special.logit": "logit", "special.logsumexp": "logsumexp", "special.psi": "digamma", "special.round": "round"},
    **{"special.sinc": "sinc", "special.softmax": "softmax", "special.xlogy": "xlogy", "subtract": "sub"},
    **{"swapaxes": "transpose", "swapdims": "transpose", "trapz": "trapezoid", "linalg.inv": "inverse"},
    **{"linalg.householder_product": "orgqr", "linalg.matrix_exp": "matrix_exp", "linalg.pinv": "pinverse"},
    **{"linalg.matrix_power": "matrix_power", "linalg.slogdet": "slogdet", "special.gammainc": "igamma"},
    **{"special.gammaincc": "igammac", "special.multigammaln": "mvlgamma", "special.polygamma": "polygamma"},
    **{"greater": "gt", "greater_equal": "ge", "less": "lt", "less_equal": "le", "not_equal": "ne"},
    # What a pooling is shown as when it gives the indices too.
    **{f"{name}_pool{n}d_with_indices": f"{name}_pool{n}d" for name in _MAX for n in (1, 2, 3)},
    # One object under two names, which it may be found under in either.
    **{"spmm": "mm", "dsmm": "mm", "hsmm": "hspmm", "saddmm": "sspaddmm"},
}


def turned(fn: Any) -> tuple[Callable[..., Any], Callable[..., tuple[Any, ...]]] | None:
    """For a spelling whose first two arguments stand the other way round: a function of them in the usual order, and
    what gives them in that order.
    """
    if fn is Tensor.where:

        def where(condition: Any, input: Any, other: Any) -> Any:
            return Tensor.where(input, condition, other)

        def of_where(self: Any, condition: Any, other: Any) -> tuple[Any, ...]:
            return condition, self, other

        return where, of_where
    if fn in (Tensor.polygamma, Tensor.polygamma_):

        def polygamma(n: Any, input: Any) -> Any:
            return fn(input, n)

        def of_polygamma(self: Any, n: Any) -> tuple[Any, ...]:
            return n, self

        return polygamma, of_polygamma
    if fn is PAD:
        return F.pad, lambda input, pad, mode="constant", value=None: (input, pad, mode, value)
    if fn is Tensor.__rpow__:

        def power(input: Any, exponent: Any) -> Any:
            return fn(exponent, input)

        return power, lambda self, other: (other, self)
    if fn in _TURNED:

        def swapped(input: Any, other: Any) -> Any:
            return fn(other, input)

        swapped.__name__ = swapped.__qualname__ = str(name_of_function(fn))
        return swapped, lambda self, other: (other, self)
    return None


_TURNED = frozenset(
    {
        *(Tensor.__rsub__, Tensor.__rtruediv__, Tensor.__rmatmul__),
        *(Tensor.__rfloordiv__, Tensor.__rmod__),
    }
)


def signature_of(function: Any, asked: Iterable[str]) -> inspect.Signature | None:
    """What a builtin of torch takes, which has no signature to tell, if something of it is among the names `asked`."""
    arguments = _TAKES.get(name_of_function(function) or "")
    if arguments is None:
        return None
    try:
        inspect.signature(function)
    except ValueError:
        found = inspect.signature(arguments)
        return None if found.parameters.keys().isdisjoint({*asked} - {"input"}) else found
    return None


# Of those builtins alone whose rules in `presets` ask for more than the input.
_TAKES: dict[str, Callable[..., None]] = {
    "layer_norm": lambda input, normalized_shape, weight=None, bias=None, eps=1e-5, cudnn_enable=True: None,
    "group_norm": lambda input, num_groups, weight=None, bias=None, eps=1e-5, cudnn_enabled=True: None,
    **dict.fromkeys(("pow", "float_power"), lambda input, exponent: None),
}


# --- functions of torch that are Python code and call others


@functools.lru_cache(maxsize=256)
def reaching(names: frozenset[str]) -> dict[Any, Callable[..., Any]]:
    """Functions of torch in Python from which one of these functions may be called, opened: `opened`."""
    wanted = frozenset[str]().union(*[_words().get(name, ()) for name in names])
    return {
        function: opened(function)
        for function, mentioned in _mentioned().items()
        if wanted and (wanted & mentioned or _calls_what_it_is_given(function))
        if name_of_function(function) not in names
    }


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
        if function not in _unlisted():  # such as `torch.masked.sum`
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
    steps = list(instructions(code))
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
        for _, _, value in (*scan.named(function, function.__code__), *of_modules(function, function.__code__)):
            if isinstance(value, FunctionType) and value not in known and not _is_of(value, *_CALLING_NONE):
                ahead.append(value)
    for function, within in known.items():
        if function.__name__ in mentioned and function not in _unlisted():
            if _calls_what_it_is_given(function):
                return None
            mentioned = mentioned | within
    return frozenset(name for name, words in _words().items() if words & mentioned)


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
    values = [value for _, _, value in (*scan.named(function, code), *of_modules(function, code))]
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
    for before, step in itertools.pairwise(without_preparations(code)):
        # What a global has is called so or so, if it was imported.
        called = is_method(step) or (step.opname == "LOAD_ATTR" and before.opname == "LOAD_GLOBAL")
        if called and before.opname.endswith(_LOADS) and last_loaded(before) == owner:
            yield step.argval


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
    steps = list(instructions(function.__code__))
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
    *("RETURN_", "POP_TOP", "COPY", "DUP"),
)
_LOADS = ("LOAD_FAST", "LOAD_FAST_CHECK", "LOAD_FAST_BORROW", "LOAD_GLOBAL")
_VIEWS = frozenset({"T", "mT", "H", "mH", "real", "imag"})
