"""Functions of NumPy arrays as functions of tensors: what goes in, and what comes out.

Tensors become copies, so that what writes into its arguments spares the caller's. Whoever imports this needs NumPy.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import numpy
import torch
from torch import Tensor, nn

from gradoverride._core.autograd.function import ByLoop, tied
from gradoverride._core.binding.contract import shape_text
from gradoverride._core.binding.rule import Rule
from gradoverride._core.binding.signature import Forward, signature_asking
from gradoverride._core.calls.tracers import EXPORT, MAKE_FX, tracer_now
from gradoverride._core.private.dynamo import fail, in_transform
from gradoverride._core.private.transforms import in_batched_autograd
from gradoverride._core.values.structure import leaves_in, taken_apart, unflatten
from gradoverride._core.values.tensors import is_tensor
from gradoverride.errors import ForwardResultError, UnsupportedError

__all__ = ["ArrayForward", "ArrayRule", "Kind"]


@dataclasses.dataclass(frozen=True)
class Kind:
    """What tensors are turned into arrays as: floating ones in `work`, if that is given."""

    work: torch.dtype | None = None

    def array(self, tensor: Tensor, who: str) -> numpy.ndarray[Any, Any]:
        """A copy of `tensor` as an array, for `who`."""
        if hasattr(tensor, "full_tensor"):
            raise UnsupportedError(
                f"a bridge must be given plain tensors, to turn them into arrays; it got a DTensor of shape "
                f"{shape_text(tensor.shape)}, of which this process has a part. Give it tensor.full_tensor(), or "
                "tensor.to_local()"
            )
        if tensor.layout is not torch.strided:
            raise UnsupportedError(
                f"{who} must be given dense tensors by its bridge, to turn them into arrays; it got one of layout "
                f"{tensor.layout} of shape {shape_text(tensor.shape)}. Give it tensor.to_dense()"
            )
        dtype = tensor.dtype
        if dtype.is_floating_point or dtype.is_complex:
            known = self.work or (dtype if dtype in _IN_NUMPY else torch.float32)
            dtype = known.to_complex() if dtype.is_complex else known
        try:
            plain = tensor.detach().resolve_conj().resolve_neg().to("cpu", dtype, copy=True)
            return plain.contiguous().numpy()
        except RuntimeError as error:
            raise UnsupportedError(
                f"{who} must be given tensors with values by its bridge, to turn them into arrays; it got one of shape "
                f"{shape_text(tensor.shape)} on '{tensor.device}' that has none to show ({error}). Leave meta and fake "
                "tensors out"
            ) from error


_IN_NUMPY = (torch.float16, torch.float32, torch.float64, torch.complex64, torch.complex128)


class Like:
    """What arrays are turned into tensors as: on the device of the first of these, and in their common dtype."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.device = tensors[0].device if tensors else torch.device("cpu")
        dtypes = [tensor.dtype for tensor in tensors if tensor.is_floating_point() or tensor.is_complex()]
        self.dtype = functools.reduce(torch.promote_types, dtypes) if dtypes else None

    def tensor(self, array: Any) -> Tensor:
        """A copy of `array` as a tensor. Integers and booleans stay what they are."""
        tensor = torch.from_numpy(numpy.array(array, dtype=_known(array)))  # a copy, with positive strides
        dtype = tensor.dtype
        if self.dtype is not None and dtype.is_complex:
            dtype = self.dtype.to_complex()
        elif self.dtype is not None and dtype.is_floating_point:
            dtype = self.dtype.to_real()
        return tensor.to(self.device, dtype)


def _known(array: Any) -> Any:
    """The dtype of `array` in the byte order of this machine, and with no more digits than torch has."""
    dtype = numpy.asarray(array).dtype.newbyteorder("=")
    widest = _WIDEST.get(dtype.kind, dtype)
    return widest if dtype.itemsize > widest.itemsize else dtype


_WIDEST = {"f": numpy.dtype(numpy.float64), "c": numpy.dtype(numpy.complex128)}


def is_array(value: Any) -> bool:
    """Whether this becomes a tensor: an array of numbers, or a scalar of NumPy's."""
    return isinstance(value, (numpy.ndarray, numpy.generic)) and value.dtype.kind in "biufc"


@dataclasses.dataclass(eq=False)
class _Run:
    """A function of arrays on plain tensors: all that it is given besides is in it."""

    fn: Callable[..., Any]
    kind: Kind
    like: Like
    spec: Any
    who: str
    refusal: str
    result: Any = None  # its structure

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        if tracer_now(()) in (EXPORT, MAKE_FX):
            fail(
                UnsupportedError,
                f"{self.who} must not be recorded by make_fx or torch.export: it works on NumPy arrays "
                "(gradoverride.bridge), and what comes out would be a constant of the graph. Trace what is before it "
                "and what is after it",
            )
        args, kwargs = unflatten(self.spec, iter([self.kind.array(tensor, self.who) for tensor in tensors]))
        result = self.fn(*args, **kwargs)
        self.result, arrays = taken_apart(result, lambda value: is_array(value) or isinstance(value, (float, complex)))
        if any([numpy.ma.is_masked(array) for array in arrays]):
            fail(
                UnsupportedError,
                f"{self.who} must return arrays without masked values, for a tensor has none; one of numpy.ma with "
                "some came. Fill them: array.filled(value)",
            )
        return tuple([self.like.tensor(array) for array in arrays])

    def stacked(self, results: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """The results for a batch, each as one tensor."""
        for column in zip(*results, strict=True):
            shapes = {tuple(tensor.shape) for tensor in column}
            if len(shapes) > 1:
                given = " and ".join(shape_text(shape) for shape in sorted(shapes))
                fail(
                    ForwardResultError,
                    f"{self.who} must return arrays of one shape under vmap, which calls it once for each in the "
                    f"batch; it returned some of shape {given}. Pad them",
                )
        return tuple([torch.stack(column) for column in zip(*results, strict=True)])

    def refuse_empty(self) -> NoReturn:
        """An empty batch, for which it is never called: what it would return is not known."""
        fail(
            UnsupportedError,
            f"{self.who} must have a batch of one or more under vmap, which calls it once for each to know its result; "
            "it has one of 0. Leave the call out there",
        )

    def refuse_derivative(self) -> NoReturn:
        fail(UnsupportedError, self.refusal)

    def on(self, tensors: Sequence[Tensor]) -> Any:
        """The result, in its structure, with tensors for arrays."""
        if in_batched_autograd():
            fail(
                UnsupportedError,
                f"{self.who} works on NumPy arrays, and torch.autograd shows it a batch of gradients at once, of which "
                "no array can be made (is_grads_batched, vectorize=True). Ask for one gradient after the other, or use "
                "torch.func.jacrev",
            )
        by_loop = tensors and in_transform()
        found = ByLoop.apply(self, *tensors) if by_loop else self(*tensors)  # type: ignore[no-untyped-call]
        return unflatten(self.result, iter(found))


class ArrayForward:
    """A function of arrays as one of tensors. Without a tensor among its arguments it is the function itself."""

    def __init__(self, fn: Any, kind: Kind, hands_over: bool) -> None:
        self.fn = fn
        self.kind = kind
        self.hands_over = hands_over
        self.who = Forward(fn).who

    def signature_of_ufunc(self) -> inspect.Signature | None:
        """Of a ufunc, or a partial of one, the inputs alone, by the names that NumPy's documentation has for them.

        Its other parameters cannot all be given, be it their defaults.
        """
        fn: Any = self.fn
        given = 0
        while isinstance(fn, functools.partial):
            fn, given = fn.func, given + len(fn.args)
        if not hasattr(fn, "nin"):
            return None
        names = ["x"] if fn.nin == 1 else [f"x{index + 1}" for index in range(fn.nin)]
        names = names[given:]
        return inspect.Signature([inspect.Parameter(name, inspect.Parameter.POSITIONAL_ONLY) for name in names])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        spec, tensors = taken_apart((args, kwargs), is_tensor)
        if not tensors:
            return self.fn(*args, **kwargs)
        if self.hands_over and in_transform():
            fail(
                UnsupportedError,
                f"{self.who} hands values over (save_for_backward), which vmap and other transforms of torch.func "
                "would mix up, for they call it several times. Compute them in the rule",
            )
        refusal = f"{self.who} works on NumPy arrays, and has no derivative but its rule"
        return _Run(self.fn, self.kind, Like(tensors), spec, self.who, refusal).on(tensors)


class ArrayRule:
    """A rule of arrays as one of tensors. Its own derivative is not known, and is refused."""

    of_arrays = True
    writes_nothing = True  # into the gradient that it is given: the rule gets copies

    def __init__(self, rule: Callable[..., Any], kind: Kind) -> None:
        read = Rule(rule)
        self.rule = rule
        self.kind = kind
        self.who = read.who
        self.__wrapped__ = rule.forward if isinstance(rule, nn.Module) else rule
        self.__name__ = read.name
        self.__signature__ = signature_asking(read.asks, first=read.first or "grad_output")
        self.refusal = (
            f"rule {self.who} works on NumPy arrays, so second derivatives and forward mode are not known. Write the "
            "rule with tensors: custom_backward"
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        spec, tensors = taken_apart((args, kwargs), is_tensor)
        grads = leaves_in(args[0], is_tensor)
        answer = _Run(self.rule, self.kind, Like(grads), spec, f"rule {self.who}", self.refusal).on(tensors)
        shape, found = taken_apart(answer, is_tensor)
        return unflatten(shape, iter(tied(found, tensors, self.refusal)))
