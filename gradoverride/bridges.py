"""`bridge`: a function of NumPy arrays in the middle of a network."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from gradoverride._core.binding.contract import what
from gradoverride._core.binding.rule import Rule
from gradoverride._core.private.dynamo import fail, hidden_from_dynamo
from gradoverride._core.python import scan
from gradoverride._core.python.residuals import save_for_backward
from gradoverride.decorators import custom_backward
from gradoverride.errors import DecorationError, MissingExtraError, RuleSignatureError, UnsupportedError

__all__ = ["bridge"]

F = TypeVar("F", bound=Callable[..., Any])


def bridge(rule: Callable[..., Any], *, dtype: Any = None) -> Callable[[F], F]:
    """Make a function of NumPy arrays one of tensors, with the backward that `rule` says.

    >>> import numpy, torch, gradoverride as go
    >>> def cumprod_backward(grad_output, x, output):
    ...     return numpy.cumsum((grad_output * output)[::-1])[::-1] / x
    >>> @go.bridge(cumprod_backward)
    ... def cumprod(x):
    ...     return numpy.cumprod(x)
    >>> x = torch.tensor([2.0, 3.0, 4.0], requires_grad=True)
    >>> cumprod(x).sum().backward()
    >>> x.grad
    tensor([16., 10.,  6.])

    Function and rule are given arrays for tensors, also within containers; all else as it is. They may write into
    them: they are copies. The rule asks for values by name as any rule does, for what the function handed over
    (`save_for_backward`) too, and returns arrays; `vjp` it cannot ask for. Those of `go.rules` and `go.surrogates`, and
    links of a `chain` that are, are given tensors. An estimator (`go.estimators`) as the rule needs no derivative at
    all. Called without a tensor it is the function of arrays, as it was.

    Devices: a result is on the device of the first tensor. Dtypes: arrays have the dtype of their tensor (of
    `bfloat16` and others that NumPy does not know, `float32` or `complex64`); floating results, Python's floats too,
    have the common dtype of the floating tensors that were given; integers stay what they are. `dtype="float64"` has
    the work done in that: floating tensors are cast on their way in, results back on their way out.

    Under `vmap` it is called once for each in the batch. `torch.compile` breaks its graph there. Refused
    (`UnsupportedError`) are second derivatives and forward mode, for the rule has no derivative; `make_fx` and
    `torch.export`, which would record one result for all; and to make one in compiled code.

    Raises `RuleSignatureError` and `RuleResultError` as `custom_backward` does, `DecorationError` for what is no
    function or no dtype, `MissingExtraError` without NumPy.
    """
    if torch.compiler.is_dynamo_compiling():
        fail(UnsupportedError, "bridge: it must be made outside of the code that is compiled; it was made within")
    try:
        from gradoverride._core.doors.arrays import ArrayRule, Kind  # torch does not need NumPy
    except ModuleNotFoundError as error:
        if error.name != "numpy":
            raise
        raise MissingExtraError("bridge needs NumPy: pip install numpy") from error

    read = Rule(rule, given="bridge")
    for name in ("vjp", "params"):
        if name in read.asks:
            raise RuleSignatureError(
                f"rule {read.who} asks for '{name}', which a function of NumPy arrays does not have: torch knows no "
                "gradient of it. Compute it from the arguments, or use an estimator"
            )
    kind = Kind(_floating(dtype))
    attach = custom_backward(_of_tensors(rule, lambda rule: ArrayRule(rule, kind)))
    return functools.partial(_bridged, attach, kind)


def _of_tensors(rule: Any, turn: Callable[[Any], Any]) -> Any:
    """`rule` as one of tensors. Those of this library are; one of arrays is turned into one."""
    if not str(getattr(rule, "__module__", "")).startswith("gradoverride.rules."):
        return rule if getattr(rule, "takes_tensors", False) else turn(rule)
    from gradoverride.rules import chain  # it is imported when it is used

    return chain(*[_of_tensors(link, turn) for link in rule.rules]) if isinstance(rule, chain) else rule


def _bridged(attach: Callable[[Any], Any], kind: Any, fn: Any) -> Any:
    from gradoverride._core.doors.arrays import ArrayForward

    if isinstance(fn, (staticmethod, classmethod)):
        return type(fn)(_bridged(attach, kind, fn.__func__))
    if not callable(fn) or isinstance(fn, (type, torch.nn.Module)):
        raise DecorationError(f"bridge: a function of NumPy arrays is needed; got {what(fn)}")
    run = ArrayForward(fn, kind, scan.calls(fn, save_for_backward))

    def forward(*args: Any, **kwargs: Any) -> Any:
        return run(*args, **kwargs)

    functools.update_wrapper(forward, fn)
    if not hasattr(fn, "__name__"):
        forward.__name__ = type(fn).__name__
    forward.__dict__["__of_arrays__"] = True  # what wraps it is a function of tensors, and does not take this along
    signature = run.signature_of_ufunc()
    if signature is not None:
        forward.__dict__["__signature__"] = signature
    return hidden_from_dynamo(attach(forward), "it works on NumPy arrays (gradoverride.bridge)")


def _floating(dtype: Any) -> torch.dtype | None:
    """A floating dtype, by any of its names."""
    import numpy

    if dtype is None:
        return None
    name = dtype if isinstance(dtype, str) else getattr(dtype, "__name__", str(dtype).removeprefix("torch."))
    # "double", "f8"; "float" is one dtype for NumPy and another for torch.
    with contextlib.suppress(TypeError, ValueError):
        name = name if name == "float" else numpy.dtype(name).name
    found = {"float16": torch.float16, "float32": torch.float32, "float64": torch.float64}.get(name)
    if found is None:
        raise DecorationError(
            f"bridge: 'dtype' must be a floating dtype that NumPy and torch have, such as 'float64'; got {what(dtype)}"
        )
    return found
