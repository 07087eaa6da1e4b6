"""The short path: plain tensors and scalars in, one new tensor out, a rule of arguments and output.

Most calls are such, and an overhead of some microseconds would be most of their cost. The path does what the general
one (`call.py`) does, without what such a call does not need: no structures, no parameters, no object for each call.
Whatever it meets that is not plain goes to the general path, after the forward too, which is never run twice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from gradoverride._core.ambient import Autocast
from gradoverride._core.call import EAGER, Call, differentiate
from gradoverride._core.contract import Meta, read_answer
from gradoverride._core.plan import Layout, Plan
from gradoverride._core.private import any_autocast, fast_apply, in_functorch

__all__ = ["fast_dispatch", "is_plain"]

_SCALARS = frozenset({int, float, bool, complex, str, type(None), torch.dtype, torch.device})
_FLOATING = frozenset(
    {torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.complex128}
)


def is_plain(plan: Plan) -> bool:
    """Whether calls of `plan` can take the short path at all."""
    sources = plan.sources.items()
    return (
        not plan.takes_receiver
        and not plan.hands_over
        and all(source == "argument" or name in ("input", "output") for name, source in sources)
    )


def fast_dispatch(plan: Plan, layout: Layout) -> Callable[..., Any]:
    """The function that the wrapper of `plan` calls."""
    fn = _positional(plan.fn, layout)
    apply = fast_apply(plan.fast)
    recipes: dict[int, Recipe] = {}
    compiling, grad_enabled = torch.compiler.is_dynamo_compiling, torch.is_grad_enabled

    def call(receiver: Any, *values: Any) -> Any:
        if compiling() or in_functorch() or forward_ad._current_level >= 0 or any_autocast():
            return differentiate(plan, layout, receiver, values)
        if not grad_enabled():
            return fn(*values)
        wanted = False
        kinds, bit = 0, 1
        tensors, aliases = [], []
        for value in values:
            kind = type(value)
            if kind is Tensor or kind is nn.Parameter:
                tensors.append(value)
                kinds += bit
                if value.requires_grad:
                    wanted = True
                    value = value.data  # its version counter is its own, and shows a forward that writes in place
                elif value.dtype not in _FLOATING:
                    return differentiate(plan, layout, receiver, values)
            elif kind not in _SCALARS:
                return differentiate(plan, layout, receiver, values)
            aliases.append(value)
            bit += bit
        if not wanted:
            return fn(*values)
        result = fn(*aliases)
        recipe = recipes.get(kinds)
        if recipe is None:
            recipe = recipes[kinds] = Recipe(plan, layout, kinds)
        if type(result) is not Tensor or result.requires_grad or result._is_view() or result.dtype not in _FLOATING:
            return _finish(plan, layout, values, aliases, result)
        for alias in aliases:
            if alias is result or (type(alias) is Tensor and not alias.requires_grad and alias._version):
                return _finish(plan, layout, values, aliases, result)
        return apply(recipe, values if recipe.constants else None, result, *tensors)

    return call


def _positional(fn: Callable[..., Any], layout: Layout) -> Callable[..., Any]:
    """`fn` with its keyword-only parameters taken by position."""
    if not layout.keywords:
        return fn
    names = [f"_{index}" for index in range(layout.positional)]
    passed = [*names, *(f"{keyword}={keyword}" for keyword in layout.keywords)]
    source = f"lambda {', '.join([*names, *layout.keywords])}: fn({', '.join(passed)})"
    return eval(source, {"fn": fn})  # type: ignore[no-any-return]  # a lambda over these names


def _finish(plan: Plan, layout: Layout, values: tuple[Any, ...], aliases: list[Any], result: Any) -> Any:
    """The general path, for a forward that has run."""
    call = Call(plan, layout, EAGER)
    leaves = call.take_apart(values)
    tensors = [alias for alias in aliases if isinstance(alias, Tensor)]
    return call.finish(None, None, leaves, values, tensors, result, {})


class Recipe:
    """What is the same for all calls of a plan whose tensors stand at the same places."""

    def __init__(self, plan: Plan, layout: Layout, kinds: int) -> None:
        self.plan = plan
        self.layout = layout
        self.rule = plan.rule.fn
        self.places = [index for index in range(len(layout.names)) if kinds >> index & 1]
        self.single = len(self.places) == 1
        self.count = len(layout.names)
        self.writes = plan.rule_writes
        self.saves: list[int] = []  # indices among the tensors; -1 is the output
        self.constants = False
        passed = []
        for name, source in plan.sources.items():
            place = layout.names.index(name) if source == "argument" else self.places[0]
            if name == "output" and source == "reserved":
                passed.append(f"{name}=saved[{self._saved(-1)}]")
            elif place in self.places:
                passed.append(f"{name}=saved[{self._saved(self.places.index(place))}]")
            else:
                self.constants = True
                passed.append(f"{name}=constants[{place}]")
        source = f"lambda rule, grad_output, saved, constants: rule({', '.join(['grad_output', *passed])})"
        self.ask: Callable[..., Any] = eval(source, {})  # keywords without a dict for each call

    def _saved(self, index: int) -> int:
        if index not in self.saves:
            self.saves.append(index)
        return self.saves.index(index)

    def pick(self, tensors: tuple[Tensor, ...], output: Tensor) -> list[Tensor]:
        """The tensors that the rule asks for."""
        return [output if index < 0 else tensors[index] for index in self.saves]

    def backward(self, ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
        """The gradients of a call: for the recipe, the constants and the result None, then for each tensor."""
        if any_autocast():  # there was none in the forward, or it would have gone the general way
            with _NO_AUTOCAST.restored():
                return self._backward(ctx, grad_output)
        return self._backward(ctx, grad_output)

    def _backward(self, ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
        handed = grad_output.clone() if self.writes else grad_output
        version = handed._version
        try:
            answer = self.ask(self.rule, handed, ctx.saved_tensors if self.saves else (), ctx.constants)
        except Exception as error:
            self._call(ctx).note(error)
            raise
        if handed._version != version and not self.writes:
            self._call(ctx).refuse_written()
        if self.single:
            if type(answer) is Tensor:
                shape, dtype, device = ctx.metas[0]
                if answer.dtype is dtype and answer.shape == shape and answer.device == device:
                    return None, None, None, answer
        elif type(answer) is tuple and len(answer) == self.count == len(self.places):
            for grad, (shape, dtype, device) in zip(answer, ctx.metas, strict=True):
                if grad is not None and not (
                    type(grad) is Tensor and grad.dtype is dtype and grad.shape == shape and grad.device == device
                ):
                    break
            else:
                return None, None, None, *answer
        grads, _ = read_answer(self._call(ctx), answer)
        return None, None, None, *grads

    def _call(self, ctx: Any) -> Call:
        """The call as the general path sees it, for what is checked in full there."""
        call = Call(self.plan, self.layout, EAGER)
        call.describe_plain(self.places, [Meta.of(*meta) for meta in ctx.metas], ctx.needs_input_grad[3:])
        return call


_NO_AUTOCAST = Autocast.__new__(Autocast)
_NO_AUTOCAST.states = []
