"""One backward: the rule is asked, its answer is read, and what it leaves to autograd is added.

`Backward.run` reads top down: the gradients that came, the values the rule asks for, the rule, its answer, the
parameters it did not answer for. What those parameters get is always the gradient for the unmodified `grad_output`:

- *natural* ones without a kept graph: it flows on into torch's own graph, which the result is tied to;
- with a kept graph: it is asked, in one pass with `vjp(grad_output)` if the rule called that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from gradoverride._core.autograd.ambient import EAGER, TRACED, TRANSFORMED, under_traced
from gradoverride._core.autograd.function import tied
from gradoverride._core.binding.contract import apart, conform_output, read_answer, read_params, what
from gradoverride._core.graph.kept_graph import KeptGraph, is_hooked
from gradoverride._core.graph.vjp import Vjp
from gradoverride._core.modules.collector import Collector
from gradoverride._core.modules.module_then import as_shown, carry_items, changes_then, forward_then, module_then
from gradoverride._core.modules.standin import Copied, write_back
from gradoverride._core.private.dynamo import fail
from gradoverride._core.private.engine import pull
from gradoverride._core.private.transforms import out_of_left_transforms
from gradoverride._core.values.structure import LEAF, Node, alike, describe, in_order_of, taken_apart, unflatten
from gradoverride.errors import RuleResultError, UnsupportedError

if TYPE_CHECKING:
    from gradoverride._core.calls.call import Call
    from gradoverride._core.calls.params import Param

__all__ = ["Backward"]

Gradients = list[Tensor | None]


class Backward:
    """The backward of `call`, in the context that torch keeps for its node."""

    def __init__(self, call: Call, ctx: Any) -> None:
        self.call = call
        self.plan = call.plan
        self.ctx = ctx
        # Where nothing was saved, a second pass needs no retained graph.
        self.saved: Sequence[Tensor] = ctx.saved_tensors if call.saved or call.graph is not None else ()
        self.eager = call.mode == EAGER
        self.traced = call.mode == TRACED
        self.again = torch.is_grad_enabled()
        if call.mode == TRANSFORMED:
            # In the backward of a forward that was replayed, its transform has been left.
            self.saved = [out_of_left_transforms(tensor) for tensor in self.saved]
        self.lent = list(self.saved)  # what the rule is given
        self.own: dict[str, Tensor | None] = {}  # parameters left to autograd whose gradients are known already
        self.copied: list[Copied] = []  # what the rule may set attributes on: the `module` that it asks for
        self.shown: dict[str, Any] = {}  # what the forward left in attributes there

    def run(self, grad_outputs: Sequence[Tensor | None]) -> Gradients:
        """One gradient for each input of the Function."""
        call = self.call
        if call.transposed and call.n_residuals:
            self.plan.refuse_residuals()
        grads = [
            meta.zeros() if grad is None else grad
            for grad, meta in zip(grad_outputs[: call.n_outs], call.out_metas, strict=True)
        ]
        if self.traced:
            leaf_grads, param_grads, flowing = under_traced(call.autocast, lambda: self.gradients(grads))
        else:
            # What leads to results without a gradient alone has none of autograd's, rather than zeros.
            came = grad_outputs[: call.n_outs] if self.eager else grads
            with call.autocast.restored():
                leaf_grads, param_grads, flowing = self.gradients(grads, came)
        residual_grads = list(grad_outputs[call.n_outs :])
        if residual_grads and any(grad is not None for grad in residual_grads):
            leaf_grads, param_grads = self._through_residuals(residual_grads, leaf_grads, param_grads)
        if isinstance(call.graph, KeptGraph):
            call.graph.forget()
        n_extra = call.first_out - call.n_leaves - len(call.params)
        return [*leaf_grads, *param_grads, *[None] * n_extra, *flowing, *[None] * len(residual_grads)]

    def gradients(
        self, grads: list[Tensor], came: Sequence[Tensor | None] | None = None
    ) -> tuple[Gradients, Gradients, Gradients]:
        """The gradients of the leaves, of the parameters, and what flows on into torch's own graph.

        `came`: of `grads`, those that came.
        """
        call, plan = self.call, self.plan
        self.came = grads if came is None else came
        handed = [grad.clone() for grad in grads] if plan.rule_writes else grads
        grad_output = unflatten(call.result, iter(handed), constants=False)
        if plan.straight_through and call.specs[call.holders[0]] is LEAF:
            grad_output = handed[0]  # of the one tensor, whatever it was returned with
        vjp = Vjp(self, grad_output) if call.graph is not None else None
        if call.held is not None:
            call.held.refuse_written(call)
        supplied = self._supply(vjp)
        plain = self.eager and not torch.compiler.is_dynamo_compiling()
        versions = [grad._version for grad in handed] if plain and not plan.rule_writes else []
        answer, collected = self._ask_rule(grad_output, supplied)
        if versions and versions != [grad._version for grad in handed]:
            plan.refuse_written()
        leaf_grads, named = read_answer(call, answer)
        answered = read_params(call, named, collected) if call.params else {}
        if plain:
            leaf_grads = apart(leaf_grads, self.lent)
            answered = dict(zip(answered, apart(answered.values(), self.lent), strict=True))
        if call.held is not None and self.again:
            leaf_grads = call.held.tied(call, leaf_grads, self.saved)
            answered = dict(zip(answered, call.held.tied(call, [*answered.values()], self.saved), strict=True))
        if not call.params:
            return leaf_grads, [], [None] * call.n_outs
        return leaf_grads, *self._with_own(answered)

    def tangents(self, jvp: Any, tangents: Sequence[Tensor | None]) -> list[Tensor]:
        """The tangents of the results, by the user's own forward mode."""
        call = self.call
        metas = [*call.metas, *[param.meta for param in call.params]]
        filled = [meta.zeros() if tangent is None else tangent for tangent, meta in zip(tangents, metas, strict=True)]
        given = iter(filled[: call.n_leaves])
        parts = [unflatten(spec, given, constants=False) for spec in call.specs]
        first: Any = parts[call.single] if call.single is not None else tuple(parts)
        if call.params:
            by_name = {name: parts[indices[0]] for name, indices in call.groups.items() if name != call.variadic}
            first = {**by_name, **{p.name: one for p, one in zip(call.params, filled[call.n_leaves :], strict=True)}}
        supplied = {asked.name: asked.value(self.saved) for asked in call.asked if asked.name in self.plan.jvp_sources}
        try:
            answer = jvp.fn(first, **supplied)
        except Exception as error:
            self.plan.note(error)
            raise
        spec, found = taken_apart(in_order_of(call.result, answer), lambda part: isinstance(part, Tensor))
        shapes = [tuple(one.shape) for one in found]
        if not alike(call.result, spec) or shapes != [tuple(meta.shape) for meta in call.out_metas]:
            fail(
                RuleResultError,
                f"jvp {jvp.who} of {self.plan.forward.who} must return the tangent of the result in its structure, "
                f"{' and '.join(meta.text for meta in call.out_metas)}; it returned {what(answer)}",
            )
        return [one.to(meta.dtype) for one, meta in zip(found, call.out_metas, strict=True)]

    # --- the rule ---

    def _supply(self, vjp: Vjp | None) -> dict[str, Any]:
        call, saved = self.call, self.saved
        own = self.plan.sources  # a `jvp` may have asked for more
        supplied = {asked.name: asked.value(saved) for asked in call.asked if asked.name in own}
        for name, source in self.plan.sources.items():
            if source != "reserved" or name in call.given:
                continue
            if name == "vjp":
                supplied[name] = vjp
            elif name == "needs":
                supplied[name] = call.needs()
            elif name == "params":
                supplied[name] = {param.name: saved[call.module_slots[param.name]] for param in call.params}
            elif name == "module":
                supplied[name] = module_then(self, copied=self.copied)
            elif name == "forward":
                supplied[name] = forward_then(self)
        return supplied

    def _ask_rule(self, grad_output: Any, supplied: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """The rule's answer, and for the class form what it assigned to parameters."""
        rule = self.call.rule
        collector = self._collector() if self.plan.class_form else None
        first = (grad_output,) if collector is None else (collector.stand_in, grad_output)
        # (In the class form it is collected: other threads may be accumulating meanwhile.)
        looks = self.plan.rule_code.accumulates and collector is None and self.eager
        looks = looks and not torch.compiler.is_dynamo_compiling()
        accumulated = self._accumulated(supplied) if looks else {}
        if self.traced:
            answer = rule(*first, **supplied)
        else:
            try:
                answer = rule(*first, **supplied)
            except Exception as error:
                self.plan.note(error)
                raise
        if self.copied:
            write_back(self.copied)
        if self.shown:
            carry_items(self)
        if accumulated:
            self._refuse_accumulated(accumulated)
        return answer, {} if collector is None else self._collected(collector)

    def _accumulated(self, supplied: dict[str, Any]) -> dict[str, tuple[Tensor, Tensor | None, int]]:
        """By name, the leaves that the rule has, those of its module too, and what was accumulated in each."""
        found = {**supplied, **{name: self.saved[slot] for name, slot in self.call.module_slots.items()}}
        tensors = [(name, one) for name, one in found.items() if isinstance(one, Tensor)]
        grads = [(name, one, one.grad) for name, one in tensors if one.requires_grad and one.is_leaf]
        return {name: (one, grad, 0 if grad is None else grad._version) for name, one, grad in grads}

    def _refuse_accumulated(self, before: dict[str, tuple[Tensor, Tensor | None, int]]) -> None:
        """Raise the error for a rule that has changed what was accumulated: autograd would add to that."""
        for name, (tensor, grad, version) in before.items():
            if tensor.grad is not grad or (grad is not None and grad._version != version):
                fail(
                    RuleResultError,
                    f"{self.plan.who} must return gradients, for autograd to accumulate each once, run hooks and "
                    f"answer torch.autograd.grad; it has changed the grad of '{name}' itself (a backward() in it does "
                    "so, and torch.autograd.grad does not). Return that gradient, in a dict by name; ask for a "
                    "parameter by its name, or by 'params'",
                )

    def _collector(self) -> Collector:
        call = self.call
        assert call.module is not None, "the class form is for modules"
        return Collector(
            call.module,
            as_shown(call, call.frozen),
            as_shown(call, call.buffers),
            {param.name: (param.names, self.saved[call.module_slots[param.name]]) for param in call.params},
            traced=self.traced,
            changes=changes_then(self, self.shown),
            attributes=self.plan.attribute_names_in_backward(type(call.module)) if self.traced else (),
        )

    def _collected(self, collector: Collector) -> dict[str, Any]:
        self.lent += collector.lent
        collected = collector.collected()
        for param in self.call.params:
            if param.name not in collected and not self.plan.asks_vjp:
                self.plan.refuse_unassigned(param.name)
        return collected

    # --- gradients that are autograd's own ---

    def pull_leaves(self, grad_output: Any, *, unmodified: bool) -> list[Tensor]:
        """The true gradients of the leaves: what `vjp(grad_output)` gives.

        For the unmodified gradient those of the parameters left to autograd are found in the same pass: apart, each
        layer would be gone through twice.
        """
        call = self.call
        count = call.n_leaves
        if not (unmodified and self.eager):
            read = self._read_gradient(grad_output)
            return self._pull(read, range(count), last=call.asks_once)  # type: ignore[return-value]  # as below
        left = [index for index, param in enumerate(call.aliased) if not param.asked]
        found = self._pull(self.came, range(count), call.natural, left, last=self.plan.calls_vjp_once)
        own = [*[call.aliased[index] for index in left], *call.natural]
        self.own.update({param.name: grad for param, grad in zip(own, found[count:], strict=True)})
        return found[:count]  # type: ignore[return-value]  # only those of natural parameters may be None

    def pull_all(self, grad_output: Any, *, unmodified: bool) -> tuple[list[Tensor], dict[str, Tensor | None]]:
        """The true gradients of the leaves and of all parameters: what `vjp.by_name(grad_output)` gives."""
        call = self.call
        which = range(call.n_leaves + len(call.aliased))
        natural = call.natural if self.eager else []
        last = call.asks_once or (unmodified and self.plan.calls_vjp_once)
        found = self._pull(self._read_gradient(grad_output), which, natural, last=last)
        named = dict(zip([p.name for p in [*call.aliased, *natural]], found[call.n_leaves :], strict=True))
        if unmodified:
            self.own.update(named)
        return found[: call.n_leaves], named  # type: ignore[return-value]  # as above

    def _with_own(self, answered: dict[str, Tensor | None]) -> tuple[Gradients, Gradients]:
        """The gradients of all parameters, and what flows on into torch's own graph."""
        call = self.call
        results = {**self.own, **answered}
        left = [index for index, param in enumerate(call.aliased) if param.name not in results]
        natural = [param for param in call.natural if param.name not in results]
        flowing: Gradients = [None] * call.n_outs
        if any(call.flows):
            flowing = self._natural(answered, results, natural)
        elif call.graph is not None and (left or natural):
            natural = natural if self.eager else []
            found = self._pull(self.came, [], natural, left, last=True)
            names = [call.aliased[index].name for index in left] + [param.name for param in natural]
            results.update(zip(names, found, strict=True))
        return [results.get(param.name) for param in call.params], flowing

    def _natural(
        self, answered: dict[str, Tensor | None], results: dict[str, Tensor | None], natural: list[Param]
    ) -> Gradients:
        """What flows on, unless the rule answered for a parameter that it would flow to."""
        call, grads = self.call, self.came
        overruled = [param.name for param in call.natural if param.name in answered]
        if overruled and self.traced:
            self.plan.refuse_answered(overruled[0])
        if self.eager and torch.is_grad_enabled() and any(call.wanted):
            text = self.plan.second_derivative_is_unknown
            known = iter(tied([grad for grad in grads if grad is not None], call.outer, text))
            grads = [None if grad is None else next(known) for grad in grads]
        if not overruled:
            return [grad if flows else None for grad, flows in zip(grads, call.flows, strict=True)]
        self.plan.through_aliases = True  # from now on
        ends = [
            (GradientEdge(*self.ctx.next_functions[call.first_out + k]), grad)
            for k, grad in enumerate(grads)
            if call.flows[k] and grad is not None
        ]
        if natural and ends:
            found = pull(
                tuple(end for end, _ in ends),
                tuple(self._edges(natural)),
                tuple(grad for _, grad in ends),
                True,
                torch.is_grad_enabled(),
            )
            results.update({param.name: grad for param, grad in zip(natural, found, strict=True)})
        return [None] * call.n_outs

    def _edges(self, natural: Sequence[Param]) -> list[GradientEdge]:
        """Where the gradients of natural parameters go: they are inputs of the node."""
        call = self.call
        first = call.n_leaves + len(call.aliased)
        edges = [GradientEdge(*self.ctx.next_functions[first + call.natural.index(param)]) for param in natural]
        for param, edge in zip(natural, edges, strict=True):
            if is_hooked(edge):
                fail(
                    UnsupportedError,
                    f"{self.plan.forward.who} must have run after the hook was registered on its parameter "
                    f"'{param.name}', or torch would run the hook twice: once where the gradient is found that the "
                    f"rule {self.plan.rule.who} leaves to autograd. It ran before. Register the hook before the "
                    "forward",
                )
        return edges

    def _pull(
        self,
        grads: Sequence[Tensor | None],
        which: Sequence[int],
        natural: Sequence[Param] = (),
        own: Sequence[int] = (),
        *,
        last: bool = False,
    ) -> Gradients:
        """The gradients of leaves and aliased parameters, as they would be without the rule; then those of parameters
        that are autograd's own, None for what is not reached: of aliased ones, then of natural ones.
        """
        # Where a parametrized weight is shown with its history, the engine goes through that besides.
        last = last and not self.call.n_residuals and not self.call.computed
        graph, edges = self.call.graph, self._edges(natural)
        own = [self.call.n_leaves + index for index in own]
        if isinstance(graph, KeptGraph):
            return graph.pull(self.saved, grads, list(which), [*graph.edges_of(own), *edges], last)
        return graph.pull(self.saved, grads, [*which, *own], edges, last)

    def _through_residuals(
        self, residual_grads: Gradients, leaf_grads: Gradients, param_grads: Gradients
    ) -> tuple[Gradients, Gradients]:
        """Second derivatives reach what the forward handed over: the kept graph knows how it was computed."""
        call = self.call
        if not isinstance(call.graph, KeptGraph):
            self.plan.refuse_residuals()
        which = list(range(call.n_leaves + len(call.aliased)))
        padded = [*[None] * call.n_outs, *residual_grads]
        found = call.graph.pull(self.saved, padded, which, self._edges(call.natural))
        total = [_sum(old, new) for old, new in zip([*leaf_grads, *param_grads], found, strict=True)]
        return total[: call.n_leaves], total[call.n_leaves :]

    def _read_gradient(self, value: Any) -> list[Tensor]:
        """A gradient in the structure of the result, taken apart and checked: what a rule hands to `vjp`."""
        call = self.call
        spec, found = taken_apart(in_order_of(call.result, value), lambda part: isinstance(part, Tensor))
        if len(found) != call.n_outs or not alike(call.result, spec):
            got = describe(spec) if isinstance(spec, Node) else what(value)
            fail(
                RuleResultError,
                f"vjp in the {self.plan.who} takes a gradient in the structure "
                f"of the forward's result, {describe(call.result)} with a tensor for each *; it got {got}. "
                "Hand over grad_output, or what is made of it part by part (zeros for one that gets none)",
            )
        return [conform_output(self.plan, tensor, meta) for tensor, meta in zip(found, call.out_metas, strict=True)]


def _sum(old: Tensor | None, new: Tensor | None) -> Tensor | None:
    if old is None or new is None:
        return new if old is None else old
    return old + new
