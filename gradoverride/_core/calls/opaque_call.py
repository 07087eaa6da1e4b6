"""Calls in a torch.func transform inside of torch.compile, where torch drops the backward of every autograd.Function.

(pytorch issue 193279.) There a call becomes one step of the graph. Dynamo does not look into it, and AOTAutograd traces
it later, where the transforms are in force as they are in eager mode.

What Dynamo does not look into it does not guard either, and what Python code does there it does while it is traced and
never again. So Dynamo traces the call as well, its forward and its rule, for all that they read and do besides. Then
the tensors of the step take the place of those that it has seen, and nothing is left of how they were computed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn

from gradoverride._core.autograd.ambient import RandomState, here
from gradoverride._core.binding.signature import name_of
from gradoverride._core.graph.captured import names_of, names_within, tensors_known
from gradoverride._core.private.dynamo import as_dynamo_hands_on, fail, forward_mode_while_tracing
from gradoverride._core.private.marks import evaluated_while_tracing
from gradoverride._core.private.transforms import at_dual_level, dual_levels, tells_level
from gradoverride._core.python import scan
from gradoverride._core.values.structure import LEAF, Constant, Node, flatten, unflatten
from gradoverride._core.values.tensors import is_tensor
from gradoverride.errors import GradOverrideError, UnsupportedError

if TYPE_CHECKING:
    from gradoverride._core.binding.layout import Layout
    from gradoverride._core.calls.call import Call
    from gradoverride._core.calls.plan import Plan
    from gradoverride._core.calls.saver import Saver

__all__ = ["NoGraph", "call_opaque", "looked_through", "refuse_opaque", "refuse_unless_opaque", "step_of"]


def refuse_unless_opaque(plan: Plan, receiver: Any) -> None:
    """Raise the error for a call that cannot be one step of the graph."""
    if plan.rule_comes_with_call:
        refuse_opaque(plan, "its rule is made in the code that is traced, with a closure: make it outside")
    if receiver is not None and not isinstance(receiver, nn.Module):
        refuse_opaque(plan, "its object is no module, whose tensors the step would be given")
    if any([mark not in here.quiet for mark in here.active]):
        refuse_opaque(plan, "rules of functions are in force around it, which are not within a step")
    if not tells_level and forward_mode_while_tracing():
        refuse_opaque(plan, "it would not know that it is in forward mode")


def refuse_opaque(plan: Plan, why: str) -> NoReturn:
    """Raise the error for one."""
    fail(
        UnsupportedError,
        f"{plan.forward.who} is called in a torch.func transform inside of torch.compile, where torch drops the "
        "backward of every autograd.Function (pytorch issue 193279) and a call with a rule must be one step of the "
        f"graph; {why}. Compile the function alone and use backward(), or leave the transform uncompiled",
    )


# --- what Dynamo sees ---


class NoGraph:
    """In place of the graph behind `vjp`, for a rule that is looked through."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = tensors

    def save(self, call: Call, saver: Saver, outs: Sequence[Tensor], values: Sequence[Any]) -> None:
        """There is nothing to save."""

    def pull(
        self,
        saved: Sequence[Tensor],
        grads: Sequence[Tensor],
        which: Sequence[int],
        parameters: Sequence[Any] = (),
        last: bool = False,
    ) -> list[Tensor]:
        """Tensors like the gradients."""
        return [torch.zeros_like(self.tensors[index]) for index in which]


class _Saved:
    """What was saved, as the context of a Function has it."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.saved_tensors = tensors


def looked_through(call: Call, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
    """What the Function of `call` would give; its rule is run too, and the user's own forward mode."""
    if call.copies:
        refuse_opaque(call.plan, "its forward writes into its argument, which would not be the step's result")
    results = call.results(inputs)
    saved = _Saved(call.tensors_to_save(inputs, results))
    call.backward(saved, [torch.zeros_like(result) for result in results])
    if call.plan.jvp is not None and forward_mode_while_tracing():
        call.jvp(saved, [torch.zeros_like(one) for one in inputs])
    return results


def call_opaque(
    plan: Plan,
    layout: Layout,
    receiver: Any,
    values: Sequence[Any],
    seen: Any,
    changed: Any,
    differentiate: Callable[..., Any],
) -> Any:
    """The result of the call as one step of the graph, in the structure of what Dynamo has `seen`."""
    given: list[Any] = []
    arguments = tuple([_as_constant(plan, flatten(value, _is_input, given)) for value in values])
    step = getattr(plan.steps, plan.add_step(layout.key, arguments, changed, differentiate))
    found = step(*given) if receiver is None else step(receiver, *given)
    _raise_noted()
    return unflatten(flatten(seen, is_tensor, []), iter(found))


def _is_input(value: Any) -> bool:
    """Whether the graph has this as the input of a step: a number may be symbolic."""
    return isinstance(value, (Tensor, int, float))


def _as_constant(plan: Plan, spec: Any) -> Any:
    """A structure in a form that Dynamo can evaluate."""
    if spec is LEAF:
        return None
    if isinstance(spec, Constant):
        if not isinstance(spec.value, _CONSTANTS):
            refuse_opaque(plan, f"an argument of the class '{type(spec.value).__name__}' cannot be an input of one")
        return (spec.value,)
    if spec.more:
        refuse_opaque(plan, f"an argument of the class '{spec.kind.__name__}' cannot be an input of one")
    return spec.kind, spec.keys, tuple([_as_constant(plan, part) for part in spec.parts])


_CONSTANTS = (type(None), str, bytes, complex, torch.dtype, torch.device, torch.memory_format, torch.layout)


# --- the step ---


def step_of(plan: Plan, layout: Layout, arguments: Any, changed: Any, differentiate: Callable[..., Any]) -> Any:
    """A function of the leaves in `arguments` that makes the call, and gives the tensors of its result.

    `changed`: what `changed_while_tracing` gave before the call was looked through.
    """
    specs = [_as_spec(constant) for constant in arguments]
    objects, names = changed
    functions = [plan.fn, plan.rule.fn, *([] if plan.jvp is None else [plan.jvp.fn])]
    stale = [name for name in names if any(scan.mentions(fn, name) for fn in functions)]
    stale += [name_of(fn) for fn in functions if id(fn) in objects]
    stale += [name for fn in functions for name in names_of(fn, objects)]
    known = [found for fn in functions for found in tensors_known(fn)]
    level = dual_levels._current_level

    def step(*given: Any) -> tuple[Tensor, ...]:
        if plan.forward_may_write:  # and has done so, as Dynamo saw
            given = tuple([one.clone() if isinstance(one, Tensor) else one for one in given])
        inputs: Iterator[Any] = iter(given)
        receiver = next(inputs) if plan.takes_receiver else None
        values = [unflatten(spec, inputs) for spec in specs]
        found: list[Tensor] = []
        stale.extend([f"self.{prefix}" for prefix, part in _parts(receiver) if id(part) in objects])
        stale.extend(_containers_of(receiver, objects))
        random = RandomState()
        try:
            with _unchanged(receiver), at_dual_level(level):
                flatten(differentiate(plan, layout, receiver, values), is_tensor, found)
            if stale:
                refuse_opaque(plan, f"the code that is traced has changed '{stale[0].rstrip('.')}', which it reads")
            if random.differs_in_python():
                refuse_opaque(plan, "it draws random numbers of Python or NumPy, which would always be the same")
            captured = [*known, *_plain_tensors(receiver)]
            if captured:
                refuse_opaque(plan, f"it reaches {captured[0]}, a tensor that is no input of one")
        except GradOverrideError as error:  # Dynamo would hide it
            _noted.append(error)
            return ()
        return tuple(found)

    return step


def _as_spec(constant: Any) -> Any:
    if constant is None:
        return LEAF
    if len(constant) == 1:
        return Constant(*constant)
    kind, keys, parts = constant
    return Node(kind, keys, [_as_spec(part) for part in parts])


def _plain_tensors(receiver: nn.Module | None) -> Iterator[str]:
    """The names of tensors that a module has, and are no parameters or buffers."""
    for prefix, part in _parts(receiver):
        for name, value in part.__dict__.items():
            if isinstance(value, Tensor):
                yield f"'{'.'.join(['self', prefix, name] if prefix else ['self', name])}'"


def _containers_of(receiver: nn.Module | None, ids: Sequence[int]) -> Iterator[str]:
    """The names of lists and dicts with these ids in the attributes of a module."""
    for prefix, part in _parts(receiver):
        for name, value in part.__dict__.items():
            if not name.startswith("_"):
                yield from names_within(".".join(["self", prefix, name] if prefix else ["self", name]), value, ids)


def _parts(receiver: nn.Module | None) -> Iterable[tuple[str, nn.Module]]:
    return () if receiver is None else receiver.named_modules()


@contextlib.contextmanager
def _unchanged(receiver: nn.Module | None) -> Iterator[None]:
    """A context for what Dynamo has seen already: what is set on a module there is gone after it, and what is written
    into its buffers is written into copies. (Who runs the step has given the module its buffers, and takes them back.)
    """
    parts = [part for _, part in _parts(receiver)]
    before = [dict(part.__dict__) for part in parts]
    for part in parts:
        part._buffers.update({name: one if one is None else one.clone() for name, one in part._buffers.items()})
    try:
        yield
    finally:
        for part, attributes in zip(parts, before, strict=True):
            for name in part.__dict__.keys() - attributes.keys():
                del part.__dict__[name]
            part.__dict__.update(attributes)


_noted: list[GradOverrideError] = []


@evaluated_while_tracing
def _raise_noted() -> None:
    if _noted:
        raise as_dynamo_hands_on(_noted.pop())
