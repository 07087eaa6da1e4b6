"""The short path under Dynamo: the same calls as `fast.py`, as few names for Dynamo to guard as by hand.

Each name and attribute that traced code looks up is a guard that every compiled call checks again: the general path
has some hundred, which are 10 us. Loops and branches here run while tracing and cost nothing later.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from gradoverride._core.call import TRACED, Call
from gradoverride._core.contract import Meta, read_answer
from gradoverride._core.forward_pass import ForwardPass, differentiate
from gradoverride._core.function import plain_function
from gradoverride._core.plan import Layout, Plan
from gradoverride._core.private import in_functorch, keep_own_frames_whole

__all__ = ["make_traced"]


def make_traced(plan: Plan, layout: Layout, places: list[int]) -> Callable[..., Any] | None:
    """The function for calls whose tensors stand at `places`, if the rule asks for nothing but tensors."""
    fn, rule, writes = plan.fn, plan.rule.fn, plan.rule_writes
    count, keywords, positional = len(places), layout.keywords, layout.positional
    names: list[str] = []
    saves: list[int] = []  # indices among the tensors; -1 is the output
    for name, source in plan.sources.items():
        place = layout.names.index(name) if source == "argument" else places[0]
        if name == "vjp" or place not in places:
            return None
        names.append(name)
        saves.append(-1 if source == "reserved" and name == "output" else places.index(place))
    if plan.takes_receiver or plan.forward_writes or (plan.straight_through and not names):
        return None

    def forward(ctx: Any, result: Tensor, *tensors: Tensor) -> Tensor:
        output = result.clone()
        ctx.metas = [(tensor.shape, tensor.dtype, tensor.device) for tensor in tensors]
        ctx.save_for_backward(*[output if index < 0 else tensors[index] for index in saves])
        return output

    def backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
        asked = dict(zip(names, ctx.saved_tensors, strict=True))
        answer = rule(grad_output.clone() if writes else grad_output, **asked)
        grads = [answer] if count == 1 and isinstance(answer, Tensor) else answer
        usual = isinstance(grads, (tuple, list)) and len(grads) == count and (count == 1 or count == len(layout.names))
        if usual and not plan.straight_through:
            for grad, (shape, dtype, device) in zip(grads, ctx.metas, strict=True):
                fits = grad is None or (
                    isinstance(grad, Tensor) and grad.shape == shape and grad.dtype == dtype and grad.device == device
                )
                usual = usual and fits
            if usual:
                return None, *grads
        call = Call(plan, layout, TRACED)
        call.describe_plain(places, [Meta.of(*meta) for meta in ctx.metas], ctx.needs_input_grad[1:])
        found, _ = read_answer(call, answer)
        return None, *found

    function = plain_function(plan.forward.name, forward, backward)

    def traced(*values: Any) -> Any:
        tensors = [values[place] for place in places]
        wanted = False
        plain = not in_functorch()
        for index, tensor in enumerate(tensors):
            plain = plain and type(tensor) in (Tensor, nn.Parameter) and tensor.is_floating_point()
            plain = plain and not any(tensor is other for other in tensors[:index])
            wanted = wanted or (plain and tensor.requires_grad)
        if not plain or any(isinstance(v, Tensor) for i, v in enumerate(values) if i not in places):
            return differentiate(plan, layout, None, values)
        if not wanted:
            return plan.undecorated(layout, None, values)
        keep_own_frames_whole()
        aliased = [value.detach() if index in places else value for index, value in enumerate(values)]
        result = fn(*aliased[:positional], **dict(zip(keywords, aliased[positional:], strict=True)))
        aliases = [aliased[place] for place in places]
        plain = type(result) is Tensor and result.is_floating_point() and not result.requires_grad
        if not plain or any(result is alias for alias in aliases):
            call = Call(plan, layout, TRACED)
            leaves = call.take_apart(values)
            return ForwardPass(call, None, None, leaves, values).finish(aliases, result, {})
        return function.apply(result, *tensors)

    return traced
