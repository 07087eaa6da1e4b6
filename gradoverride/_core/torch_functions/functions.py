"""The functions of torch as targets: all spellings of one.

`F.relu`, `torch.relu`, `x.relu()`, `torch.relu_`, `F.relu(x, inplace=True)` are one function, `relu`. torch hands each
to a mode as an object of its own; here they are found by their names.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Set
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import get_ignored_functions, resolve_name

from gradoverride._core.private.dynamo import PAD

__all__ = [
    "INLINED",
    "OF_OPERATORS",
    "every_spelling",
    "is_of_torch",
    "name_of_function",
    "names_among",
    "signature_of",
    "spellings",
    "turned",
    "unlisted",
    "words",
]


def is_of_torch(value: Any) -> bool:
    """Whether this is a function of torch, overridable or not: no predicate."""
    own = str(getattr(value, "__module__", "") or "").partition(".")[0] == "torch"
    return own or (_is_hashable(value) and value in _named_by_torch())


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
    full = None if hidden else _named_by_torch().get(value)
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
    """All functions that a mode is shown, or by Dynamo."""
    for group in _known().values():
        yield from group
    yield from unlisted()
    yield math.prod


@functools.cache
def unlisted() -> dict[FunctionType, None]:
    """Functions in Python that torch shows to no mode, for what they call is shown. Dynamo takes them as a whole."""
    names = [*dir(torch.masked), "upsample", "upsample_bilinear", "upsample_nearest"]
    found = [getattr(space, name, None) for space in (torch.masked, F) for name in names if name[0] != "_"]
    found.append(Tensor.__reversed__)
    return dict.fromkeys([one for one in found if isinstance(one, FunctionType) and name_of_function(one) is None])


@functools.cache
def _known() -> dict[str, dict[Any, None]]:
    found: dict[str, dict[Any, None]] = {}
    for name, value, _ in _listed():
        found.setdefault(name, {}).setdefault(value, None)
    return found


@functools.cache
def words() -> dict[str, frozenset[str]]:
    """By name of a function, what code says to call it: the names that torch has it under, its own, operators."""
    found: dict[str, set[str]] = {}
    for name, value, attribute in _listed():
        found.setdefault(name, set()).update((attribute, value.__name__))
    for operator, name in _DUNDERS.items():
        found.setdefault(name, set()).add(operator)
    return {name: frozenset(words) for name, words in found.items()}


def names_among(said: Set[str]) -> frozenset[str]:
    """The functions that code with these words in it may call."""
    return frozenset([name for name, own in words().items() if not own.isdisjoint(said)])


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
def _named_by_torch() -> dict[Any, str]:
    """What torch calls its functions and the accessors of its attributes.

    It is asked once: for the time of `resolve_name` other filters of warnings hold, and all threads share them.
    """
    spaces = (torch, torch.functional, F, nn.init, Tensor, torch.linalg, torch.fft, torch.special)
    values = [getattr(space, attribute) for space in spaces for attribute in dir(space)]
    accessors = [getattr(value, way, None) for value in values if not callable(value) for way in ("__get__", "__set__")]
    named = [(value, resolve_name(value)) for value in (*values, *accessors) if _is_hashable(value)]
    return {value: name for value, name in named if name is not None}


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

# Dynamo traces into these without a word to a mode; or, where a tensor is iterated over, does what they do.
INLINED = frozenset(
    {"linear_cross_entropy", "lu", "triplet_margin_with_distance_loss", "unbind", *(["pad"] if PAD is None else [])}
)

_ARITHMETIC = ("add", "sub", "mul", "matmul", "pow")
_DUNDERS = {
    **{f"__{prefix}{name}__": name for name in _ARITHMETIC for prefix in ("", "r", "i")},
    **{f"__{prefix}{name}__": "div" for name in ("truediv", "div") for prefix in ("", "r", "i")},
    **{f"__{prefix}floordiv__": "floor_divide" for prefix in ("", "r", "i")},
    **{f"__{prefix}mod__": "remainder" for prefix in ("", "r", "i")},
    **{"__neg__": "neg", "__abs__": "abs", "__pos__": "positive"},
}
# What an operator of Python calls.
OF_OPERATORS = frozenset({*_DUNDERS.values(), "eq", "ge", "gt", "le", "lt", "ne"})
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
    **dict.fromkeys(("add", "sub"), lambda input, other, *, alpha=1: None),
    "mul": lambda input, other: None,
    "div": lambda input, other, **rounding: None,
    **dict.fromkeys(("pow", "float_power"), lambda input, exponent: None),
}
