"""Tensors that require grad and are no argument and no parameter: found, named and refused.

The forward runs on cut aliases, so a result that requires grad reached something else. Its gradient would be lost
without a word. Only when that happens are the names looked up.
"""

from __future__ import annotations

import functools
import sys
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence, Set, ValuesView
from types import FunctionType, MappingProxyType, MethodType, ModuleType
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from gradoverride._core.autograd.ambient import unseen_by_hooks
from gradoverride._core.autograd.nodes import leaves_behind, nodes_behind
from gradoverride._core.private.dynamo import fail, note_while_tracing, take_noted
from gradoverride._core.private.marks import evaluated_while_tracing
from gradoverride._core.private.transforms import has_tangent
from gradoverride._core.python import scan
from gradoverride._core.python.reach import SCALARS
from gradoverride._core.values.tensors import is_tensor
from gradoverride.errors import CapturedTensorError

__all__ = [
    "captured_names",
    "foreign_leaf",
    "is_gone",
    "names_of",
    "names_within",
    "refuse",
    "refuse_tangent",
    "requires_grad",
    "tensors_in",
    "tensors_known",
]


def requires_grad(tensor: Tensor) -> bool:
    return tensor.requires_grad


def foreign_leaf(results: list[Tensor], known: set[int], stops: set[Any]) -> Tensor | None:
    """A leaf that the graph of `results` reaches and that is not among `known` (ids of tensors).

    The walk does not go below the nodes `stops`: those of tensors that are known and have a history of their own.
    """
    starts = []
    for result in results:
        if result.grad_fn is not None:
            starts.append(result.grad_fn)
        elif id(result) not in known:
            return result
    for leaf in leaves_behind(starts, stops):
        if id(leaf) not in known:
            return leaf
    return None


def is_gone(leaf: Tensor, results: Sequence[Tensor]) -> bool:
    """Whether nothing but the graph of `results` has this leaf: the forward made it, a first state say, and let it go.
    What would be added to its `grad` nobody could see. (One that C++ has too, as a scripted module that no name leads
    to, looks so.)
    """
    if leaf._backward_hooks or leaf._post_accumulate_grad_hooks:  # they would
        return False
    more = sys.getrefcount(leaf) - _references_of_one_gone()
    return more <= 0 or more <= sum([held is leaf for held in _held_by_calls(results)])


def _held_by_calls(results: Sequence[Tensor]) -> Iterator[Tensor | None]:
    """The arguments that the calls in this graph have, for derivatives of a higher order."""
    starts = {result.grad_fn for result in results if result.grad_fn is not None}
    for node in {node for start in starts for node in nodes_behind(start)}:
        call = getattr(node, "call", None)
        for keeper in (call, getattr(call, "graph", None), getattr(node, "graph", None)):
            yield from getattr(keeper, "outer", ())


def _references_of_one_gone() -> int:
    """Those of such a leaf now: versions of Python and torch count differently, and so does Python under Dynamo."""

    def references(leaf: Tensor) -> int:
        return sys.getrefcount(leaf)

    with torch.enable_grad(), unseen_by_hooks():
        results = [torch.zeros(1, requires_grad=True).exp()]
    leaf = foreign_leaf(results, set(), set())
    assert leaf is not None, "it is in no other graph"
    return references(leaf)


def foreign_while_tracing(results: Sequence[Tensor], known: Sequence[Tensor]) -> bool:
    """Whether there is such a leaf, for tensors that Dynamo traces. `known` may have a history of their own."""
    for tensor in (*results, *known):
        note_while_tracing(tensor)
    return _noted_foreign(len(results))


@evaluated_while_tracing
def _noted_foreign(count: int) -> bool:
    noted = take_noted()
    known = noted[count:]
    stops = {tensor.grad_fn for tensor in known if tensor.grad_fn is not None}
    return foreign_leaf(noted[:count], {id(tensor) for tensor in known}, stops) is not None


def refuse(
    who: str, names: str, leaf: Tensor | None = None, module: nn.Module | None = None, *, of_call: bool = False
) -> NoReturn:
    """Raise the error for `who`, which captured what `names` lists, or `leaf`, a parameter of the `module` perhaps, or
    something out of the graph of another call.
    """
    remedy = "Pass it as an argument, or detach() it"
    own = next((name for name, known in (module.named_parameters() if module else ()) if known is leaf), None)
    if not names and own is not None:
        what = f"reached its parameter '{own}' by a reference to the module, or made it in this call"
        remedy = "Reach it through 'self', make it before, or detach() it"
    elif names:
        what = f"reached {names}, which requires grad, by a closure, a global or an attribute"
    elif of_call:
        what = "reached a tensor of another call with a rule that is no result of it (by a hook, a list, an attribute)"
        remedy = "Return that tensor there too, detach() it, or leave one of the two without a rule"
    else:
        shape = f" of shape {tuple(leaf.shape)}" if leaf is not None else ""
        what = f"reached a tensor{shape} that requires grad by a closure, a global or an attribute, or made one itself"
        remedy += "; of one that it made, detach() what it computes from it"
    fail(
        CapturedTensorError,
        f"{who} must get each tensor that wants a gradient as an argument, or as a parameter of its module through "
        f"'self'; it {what}, and that gradient would be lost. {remedy}",
    )


def refuse_tangent(who: str, fn: Any, receiver: Any) -> NoReturn:
    """Raise the error for a forward that has reached a tensor with a tangent besides those that it was given."""
    names = ", ".join(captured_names(fn, receiver=receiver, counts=has_tangent)) or "one"
    fail(
        CapturedTensorError,
        f"{who} must get each tensor that has a tangent as an argument, or as a parameter of its module; it reached "
        f"{names} by a closure, a global or an attribute, and that tangent would be lost. Pass it as an argument, give "
        "it to the module by torch.func.functional_call, or detach() it",
    )


def captured_names(
    fn: Any,
    leaf: Tensor | None = None,
    receiver: Any = None,
    arguments: Iterable[tuple[str, Any]] = (),
    counts: Callable[[Tensor], bool] = requires_grad,
    given: Sequence[Tensor] = (),
) -> list[str]:
    """The names under which `fn`, a method of `receiver` perhaps, knows `leaf`, or else any tensor with a gradient.

    A leaf is looked for in more places: whatever else is found there is not it. Of what is `given` in the arguments the
    rule has the gradient.
    """
    answered = {id(tensor) for tensor in given}
    found: list[tuple[str, Tensor]] = []
    objects = leaf is not None
    for name, value in arguments:
        if not isinstance(value, Tensor):
            inside = tensors_in(f"'{name}'", value, depth=3, objects=True, counts=counts)
            found += [(path, tensor) for path, tensor in inside if id(tensor) not in answered]
    for name, value in _names(fn, objects):
        found += tensors_in(f"'{name}'", value, depth=2, objects=objects, counts=counts)
    if receiver is None and scan.python_function(fn) is not fn and not isinstance(fn, functools.partial):
        receiver = getattr(fn, "__self__", fn)  # a bound method, or an object that is called
    for name, value in _attributes(receiver):
        if name not in ("_parameters", "_buffers", "_modules"):  # these are reached through self, as they should be
            found += tensors_in(f"'self.{name}'", value, depth=2, objects=objects, counts=counts)
    if leaf is None:
        return [name for name, _ in found]
    if isinstance(receiver, nn.Module):
        found += [(f"'self.{name}'", buffer) for name, buffer in receiver.named_buffers()]
    exact = [name for name, tensor in found if tensor is leaf]
    inner = [(name, tensor.grad_fn) for name, tensor in found if not tensor.is_leaf]
    leading = [name for name, node in inner if any(start is leaf for start in leaves_behind([node]))]
    return list(dict.fromkeys(exact or leading))


def tensors_known(fn: Any) -> list[str]:
    """The names under which `fn` reaches tensors without being given them, with a gradient or without."""
    found: list[tuple[str, Tensor]] = []
    if scan.python_function(fn) is not fn:  # an object that is called
        found += tensors_in(f"'{type(fn).__name__}'", fn, depth=2, objects=True, counts=is_tensor)
    for name, value in _names(fn, helpers=True):
        found += tensors_in(f"'{name}'", value, depth=2, objects=True, counts=is_tensor)
    return [name for name, _ in found]


def names_of(fn: Any, ids: Collection[int]) -> Iterator[str]:
    """The names under which `fn` reaches objects with these ids, lists and dicts in such too."""
    for name, value in _names(fn, helpers=True):
        yield from names_within(name, value, ids)


def names_within(name: str, value: Any, ids: Collection[int], depth: int = 3) -> Iterator[str]:
    """The same of `value`, which has this name."""
    if id(value) in ids:
        yield name
    elif depth and isinstance(value, (list, tuple, dict)):
        for part in dict.values(value) if isinstance(value, dict) else value:
            yield from names_within(name, part, ids, depth - 1)


def _attributes(receiver: Any) -> Iterator[tuple[str, Any]]:
    """What an object has, and its classes."""
    yield from getattr(receiver, "__dict__", {}).items()
    yield from _slots(receiver)
    for cls in type(receiver).__mro__:
        if cls.__module__.partition(".")[0] not in ("builtins", "torch"):
            yield from ((name, value) for name, value in vars(cls).items() if isinstance(value, (Tensor, list, dict)))


def _names(fn: Any, helpers: bool) -> Iterator[tuple[str, Any]]:
    """What `fn` knows by name: with `helpers` also what a partial has bound, defaults, and what the functions of its
    module know that it calls.
    """
    while helpers and isinstance(fn, functools.partial):
        yield from ((f"args[{index}]", value) for index, value in enumerate(fn.args))
        yield from fn.keywords.items()
        fn = fn.func
    function = scan.python_function(fn)
    if function is None:
        return
    known = [(function, function.__code__)] if not helpers else scan.reachable(function)
    for function, code in known:
        yield from ((name, value) for _, name, value in scan.named(function, code))
        yield from ((f"{function.__name__}.{name}", value) for name, value in vars(function).items())
        if helpers:
            names = function.__code__.co_varnames[: function.__code__.co_argcount]
            yield from zip(reversed(names), reversed(function.__defaults__ or ()), strict=False)
            yield from (function.__kwdefaults__ or {}).items()


def tensors_in(
    path: str,
    value: Any,
    depth: int,
    *,
    objects: bool = False,
    modules: bool = True,
    counts: Callable[[Tensor], bool] = requires_grad,
) -> Iterator[tuple[str, Tensor]]:
    """The tensors that count in `value`, each with its path: in modules, and in attributes of `objects`."""
    inner: Iterable[tuple[str, Any]] = ()
    if isinstance(value, Tensor):
        if counts(value):
            yield path, value
    elif type(value) in SCALARS:
        pass
    elif isinstance(value, nn.Module):
        if modules:
            inner = [(f".{name}", parameter) for name, parameter in value.named_parameters()]
    elif depth and isinstance(value, (list, tuple)):
        inner = [(f"[{index}]", part) for index, part in enumerate(value)]
    elif depth and isinstance(value, (dict, MappingProxyType)):
        inner = [(f"[{key!r}]", part) for key, part in value.items()]
    elif depth and objects and not isinstance(value, (type, ModuleType, FunctionType)):
        if isinstance(value, (Set, deque, ValuesView)):
            inner = [(f"[{index}]", part) for index, part in enumerate(value)]
        elif isinstance(value, MethodType):
            inner = [(".__self__", value.__self__)]
        else:
            inner = [(f".{name}", part) for name, part in [*getattr(value, "__dict__", {}).items(), *_slots(value)]]
    for step, part in inner:
        yield from tensors_in(f"{path[:-1]}{step}'", part, depth - 1, objects=objects, modules=modules, counts=counts)


def _slots(value: Any) -> Iterator[tuple[str, Any]]:
    for name in _names_of_slots(type(value)):
        if hasattr(value, name):
            yield name, getattr(value, name)


@evaluated_while_tracing  # Dynamo knows no bases of builtins
def _names_of_slots(cls: type) -> tuple[str, ...]:
    slots = [base.__dict__.get("__slots__", ()) for base in cls.__mro__]
    return tuple([name for some in slots for name in ((some,) if isinstance(some, str) else some)])
