"""What a forward gave is looked at before a rule is tied to it: what could not have the gradient is refused."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from gradoverride._core.autograd.ambient import EAGER, TRACED, TRANSFORMED
from gradoverride._core.autograd.function import CUT, TOKEN
from gradoverride._core.binding.contract import what
from gradoverride._core.graph import captured
from gradoverride._core.private.dynamo import fail
from gradoverride._core.private.transforms import has_tangent, in_forward_ad
from gradoverride._core.values.structure import LEAF, alike, leaves_in
from gradoverride._core.values.tensors import is_tensor, requires_grad_anywhere
from gradoverride.errors import ForwardResultError, UnsupportedError

if TYPE_CHECKING:
    from gradoverride._core.calls.forward_pass import ForwardPass

__all__ = ["check_straight_through", "refuse_captured", "without_gradient"]


def without_gradient(run: ForwardPass, result: Any) -> Any:
    """A result that no gradient can belong to, if it may be one."""
    tensors = leaves_in(result, is_tensor)
    kind = f" of {result.dtype}" if isinstance(result, Tensor) else ""
    remedy = "Convert it: .to(torch.get_default_dtype())" if kind else "Return the tensor that it makes of its argument"
    if run.plan.straight_through:
        fail(
            ForwardResultError,
            f"{run.plan.forward.who} must return a floating tensor for a gradient to pass straight through it; "
            f"it returned {what(result)}{kind}. {remedy}",
        )
    if not tensors:
        one = "array of numbers" if run.plan.forward.of_arrays else "tensor"
        fail(
            ForwardResultError,
            f"{run.plan.forward.who} must return at least one {one}, for its rule {run.plan.rule.who} to get "
            f"a gradient; it returned {what(result)}. Return the {one} that the rule is about, alone or in a tuple, "
            "list, dict or dataclass",
        )
    if run.plan.needs_floating:
        fail(
            ForwardResultError,
            f"{run.plan.forward.who} must return a floating tensor, for its rule {run.plan.rule.who} to give it "
            f"a gradient; it returned {what(result)}{kind}. Convert it: .to(torch.get_default_dtype())",
        )
    return result


def check_straight_through(run: ForwardPass, result: Any, outs: list[Tensor]) -> None:
    """The gradient of the result is to be one of the first differentiable argument."""
    call, plan, who = run.call, run.plan, run.plan.forward.who
    if not call.holders:
        fail(
            ForwardResultError,
            f"{who} must be given a floating tensor, for a gradient to pass straight through to it; it was given "
            "none, and parameters alone want a gradient. Leave out straight_through, or convert an argument",
        )
    first = call.holders[0]
    name, spec = call.names[first], call.specs[first]
    identity = plan.rule.asks == {}
    if spec is LEAF and len(outs) != 1:
        fail(
            ForwardResultError,
            f"{who} must return one floating tensor for a gradient to pass straight through it to '{name}'; it "
            f"returned {what(result)}. Decorate a function that returns the one alone (what is no floating tensor "
            "may be returned with it), or give a rule: custom_backward(rule)",
        )
    if spec is not LEAF and not (identity and alike(spec, call.result)):
        given = f"it was given {what(run.values[first])}"
        need = f"have one tensor for its first differentiable argument '{name}', which is what a surrogate takes"
        if identity:
            need = f"return what is of the structure of its first differentiable argument '{name}'"
            given += f" and returned {what(result)}"
        fail(
            ForwardResultError,
            f"{who} must {need}, for a gradient to pass straight through; {given}. Decorate a function of one "
            "tensor, or give a rule: custom_backward(rule)",
        )
    if identity:
        for leaf, out in zip(run.leaves, outs, strict=False):
            plan.check_straight_through(leaf.shape, out.shape)
    if any(call.wanted) and not any(call.wanted[: call.ends[first]]):
        plan.warn_of_first(name, ", ".join(f"'{n}'" for i, n in enumerate(call.names) if call.wants(i)))


def refuse_captured(run: ForwardPass, outs: list[Tensor], aliases: list[Tensor]) -> None:
    """Raise the error for a tensor with a gradient that a forward on `aliases` has reached besides: `captured.py`."""
    call, forward = run.call, run.plan.forward
    if run.mode == TRANSFORMED:
        if in_forward_ad() and any(map(has_tangent, outs)):
            captured.refuse_tangent(forward.who, forward.fn, run.receiver)
        tracked = [out for out in outs if requires_grad_anywhere(out)]
    else:
        tracked = [out for out in outs if out.requires_grad]
    if not tracked:
        return
    if run.mode != EAGER:
        if run.mode == TRACED and (call.natural or call.graph is not None):
            starts = call.graph.aliases if call.graph is not None else []
            own = [param.tensor for param in call.natural]
            # A decorated call inside starts its graph at TOKEN.
            if not captured.foreign_while_tracing(tracked, [*starts, *own, TOKEN]):
                return
        captured.refuse(forward.who, run.plan.captured_names())
    stops = {param.tensor.grad_fn for param in call.natural}
    known = {id(param.tensor) for param in call.natural}
    known.add(id(TOKEN))  # where a compiled call inside starts its graph
    if call.graph is not None:
        call.graph.stops(known, stops)
    known |= {id(alias) for alias, leaf in zip(aliases, run.leaves, strict=False) if alias is not leaf}
    _refuse_told(run, aliases)
    gone = []
    while (leaf := captured.foreign_leaf(tracked, known, stops)) is not None:
        arguments = zip(call.names, run.values, strict=True)
        names = ", ".join(captured.captured_names(forward.fn, leaf, run.receiver, arguments, given=run.leaves))
        if names or not captured.is_gone(leaf, tracked):
            captured.refuse(forward.who, names, leaf, run.module, of_call=leaf is CUT)
        gone.append(leaf)  # its id stays its own
        known.add(id(leaf))


def _refuse_told(run: ForwardPass, aliases: list[Tensor]) -> None:
    """Raise the error for an argument, or its alias, that the forward itself has told to require grad."""
    for index, alias in enumerate(aliases[: run.call.n_leaves]):
        if alias.requires_grad and alias.is_leaf and not run.call.wanted[index]:
            fail(
                UnsupportedError,
                f"{run.plan.forward.who} must be given arguments that require grad already, if a gradient is to "
                f"reach them; it told '{run.call.name_of_leaf(index)}' to require grad itself. Call "
                "requires_grad_() on it before",
            )
