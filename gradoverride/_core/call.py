"""One invocation on the general path: tensors apart from the rest, the forward on aliases, the result tied to a rule.

The flow, top down: `differentiate` takes the call apart, `_run` runs the forward on cut aliases, `_tie` hands the
tensors to the Function; `Call.backward` asks the rule and `Call.jvp` transposes it. The inputs of the Function are

    the differentiable tensors among the arguments, the module's trainable parameters (aliased ones first),
    what else the rule asks for, the results of the forward, floating residuals

A parameter is *aliased* when the rule, or the kept graph, answers for it, and *natural* when its gradient flows
through torch's own graph: then the forward met the parameter itself, and its results are tied to both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gradoverride._core import captured
from gradoverride._core.ambient import Autocast
from gradoverride._core.contract import Meta, conform, read_answer, read_params, shape_text, what
from gradoverride._core.forward_mode import transpose
from gradoverride._core.function import Refused, fresh
from gradoverride._core.kept_graph import KeptGraph, Replay, TracedGraph
from gradoverride._core.plan import Layout, Plan
from gradoverride._core.private import fail, fast_apply, in_forward_ad, in_functorch, is_tracked
from gradoverride._core.residuals import close_frame, open_frame
from gradoverride._core.signature import unknown_name
from gradoverride._core.standin import Collector, stand_in, write_back
from gradoverride._core.structure import LEAF, Constant, flatten, has_leaf, skeleton, unflatten
from gradoverride._core.vjp import Vjp
from gradoverride.errors import ForwardResultError, RuleResultError, UnsupportedError

__all__ = ["Call", "differentiate"]

EAGER, TRACED, TRANSFORMED = "eager", "traced", "transformed"


def is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def is_differentiable(value: Any) -> bool:
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


class Param:
    """A trainable parameter of the module, in one call."""

    __slots__ = ("asked", "meta", "name", "names", "tensor")

    def __init__(self, name: str, tensor: Any, meta: Meta) -> None:
        self.name = name
        self.names = [name]  # a tied parameter has several
        self.tensor = tensor
        self.meta = meta
        self.asked = False


class Asked:
    """One value that the rule asks for: its structure, and where its tensors are among the saved ones."""

    __slots__ = ("name", "slots", "spec")

    def __init__(self, name: str, spec: Any, slots: list[int]) -> None:
        self.name = name
        self.spec = spec
        self.slots = slots

    def value(self, saved: Sequence[Tensor]) -> Any:
        if self.spec is LEAF:
            return saved[self.slots[0]]
        return unflatten(self.spec, iter([saved[slot] for slot in self.slots]))


def differentiate(plan: Plan, layout: Layout, receiver: Any, values: Sequence[Any]) -> Any:
    """Call the forward of `plan` with its rule in force, if a gradient is wanted at all."""
    if plan.class_form:
        plan = plan.of_class(type(receiver))
    transformed = in_functorch() or in_forward_ad()
    if not transformed and not torch.is_grad_enabled():
        return plan.undecorated(layout, receiver, values)
    mode = EAGER
    if torch.compiler.is_dynamo_compiling():
        if transformed:
            fail(
                UnsupportedError,
                f"{plan.forward.who} is called in a torch.func transform inside of torch.compile, where torch drops "
                "the backward of every autograd.Function (pytorch issue 193279). Compile the function and "
                "transform the compiled one outside, or leave the transform uncompiled",
            )
        mode = TRACED
    elif transformed:
        mode = TRANSFORMED
    call = Call(plan, layout, mode)
    leaves = call.take_apart(values)
    module = receiver if isinstance(receiver, nn.Module) else None
    if module is not None:
        call.find_params(module)
    elif plan.takes_receiver and plan.asks_params:
        raise unknown_name(plan.rule, plan.forward, "params", ())
    wanted = mode == TRANSFORMED or any(leaf.requires_grad for leaf in leaves) or bool(call.params)
    if not wanted or not (leaves or call.params):
        return plan.undecorated(layout, receiver, values)
    return call.run(module, receiver, leaves, values)


class Call:
    """What is known of one call, from its forward to its backward. It holds no tensors that torch should save."""

    def __init__(self, plan: Plan, layout: Layout, mode: str) -> None:
        self.plan = plan
        self.layout = layout
        self.mode = mode
        self.names = layout.names
        self.groups = layout.groups
        self.variadic = layout.variadic
        self.autocast = Autocast() if mode != TRACED else None
        self.params: list[Param] = []
        self.aliased: list[Param] = []
        self.natural: list[Param] = []
        self.frozen: dict[str, Tensor] = {}
        self.dirty: list[int] = []
        self.asked: list[Asked] = []
        self.saved: list[int] = []
        self.graph: Any = None
        self.token: Tensor | None = None
        self.module: nn.Module | None = None
        self.buffers: dict[str, Any] = {}

    # --- taking the call apart ------------------------------------------------------------------------------

    def take_apart(self, values: Sequence[Any]) -> list[Tensor]:
        """The differentiable tensors among the arguments; notes their structure and what their gradients look like."""
        leaves: list[Tensor] = []
        self.specs: list[Any] = []
        self.ends: list[int] = []  # by argument, the number of leaves up to its last
        holders = []
        for index, value in enumerate(values):
            before = len(leaves)
            self.specs.append(flatten(value, is_differentiable, leaves))
            self.ends.append(len(leaves))
            if len(leaves) > before:
                holders.append(index)
        self.holders = holders
        self.single = holders[0] if len(holders) == 1 else None
        self.n_leaves = len(leaves)
        self.metas = [Meta(leaf) for leaf in leaves]
        self.wanted = [self.mode == TRANSFORMED or leaf.requires_grad for leaf in leaves]
        return leaves

    def describe_plain(self, places: Sequence[int], metas: list[Meta], wanted: Sequence[bool]) -> None:
        """As `take_apart`, for a call whose arguments at `places` were tensors and the others scalars."""
        self.specs = [LEAF if index in places else Constant(None) for index in range(len(self.names))]
        self.ends = [sum(place <= index for place in places) for index in range(len(self.names))]
        self.holders = list(places)
        self.single = places[0] if len(places) == 1 else None
        self.n_leaves = len(places)
        self.metas = metas
        self.wanted = list(wanted)

    def describe_params(self, names: Sequence[str], metas: Sequence[Meta]) -> None:
        """As `find_params`, for parameters that the rule asks for."""
        self.params = [Param(name, None, meta) for name, meta in zip(names, metas, strict=True)]
        for param in self.params:
            param.asked = True

    def find_params(self, module: nn.Module) -> None:
        """Sort the trainable parameters of `module` into those the rule answers for and those left to autograd."""
        plan = self.plan
        found: dict[Tensor, Param] = {}
        for name, tensor in module.named_parameters(remove_duplicate=False):
            if tensor in found:
                found[tensor].names.append(name)
            elif tensor.requires_grad or (self.mode == TRANSFORMED and is_tracked(tensor)):
                found[tensor] = Param(name, tensor, Meta(tensor))
            else:
                self.frozen[name] = tensor
        params = list(found.values())
        params = self._with_parametrized(module, params)
        for param in params:
            param.asked = plan.asks_params or plan.class_form or param.name in plan.sources
        # Left to autograd, but reached through an alias: where the rule may answer for it all the same, and where
        # torch would run the parameter's hooks once more when the kept graph is asked for its gradient.
        explicit = self.mode == TRANSFORMED or plan.names_all
        explicit = explicit or any(name in plan.may_answer for param in params for name in param.names)
        explicit = explicit or (self.mode == EAGER and any(param.tensor._backward_hooks for param in params))
        self.aliased = [param for param in params if explicit or param.asked]
        self.natural = [param for param in params if not (explicit or param.asked)]
        if plan.class_form and plan.asks_vjp:
            for param in params:
                param.asked = False
        self.params = [*self.aliased, *self.natural]

    def _with_parametrized(self, module: nn.Module, params: list[Param]) -> list[Param]:
        """A parametrized weight that the rule asks for under its plain name stands in for what it is computed from."""
        table = module._modules.get("parametrizations")
        if table is None:
            return params
        for name, source in self.plan.sources.items():
            if source == "deferred" and name in table._modules:
                prefix = f"parametrizations.{name}."
                value = getattr(module, name)
                params = [param for param in params if not param.name.startswith(prefix)]
                if value.requires_grad or self.mode == TRANSFORMED:
                    params.append(Param(name, value, Meta(value)))
                else:
                    self.frozen[name] = value
        return params

    # --- the forward ----------------------------------------------------------------------------------------

    def run(self, module: nn.Module | None, receiver: Any, leaves: list[Tensor], values: Sequence[Any]) -> Any:
        plan, mode = self.plan, self.mode
        keeps = plan.asks_vjp or any(not param.asked for param in self.aliased)
        sources = [*leaves, *(param.tensor for param in self.aliased)]
        replay = None
        if not keeps:
            aliases = [self._alias(tensor) for tensor in sources]
        elif mode == EAGER:
            self.graph = KeptGraph(sources) if self.params else KeptGraph.alone(sources)
            aliases = self.graph.start()
        elif mode == TRACED:
            self.graph, aliases = TracedGraph.aliases_of(sources)
        else:
            self.graph = replay = Replay()
            aliases = [self._alias(tensor) for tensor in sources]
        state = self._snapshot_buffers(module) if replay is not None else None
        result, residuals = self._forward(module, receiver, aliases)
        return self.finish(module, receiver, leaves, values, aliases, result, residuals, state)

    def finish(
        self,
        module: nn.Module | None,
        receiver: Any,
        leaves: list[Tensor],
        values: Sequence[Any],
        aliases: list[Tensor],
        result: Any,
        residuals: dict[str, Any],
        buffers_before: dict[str, Any] | None = None,
    ) -> Any:
        """The forward has run on `aliases` and gave `result`: look at it, and tie it to the rule."""
        outs: list[Tensor] = []
        self.result = flatten(result, is_differentiable, outs)
        if not outs:
            return self._without_gradient(result)
        if self.plan.straight_through and self.plan.rule.asks == {}:
            self.check_straight_through(leaves[0].shape, outs[0].shape)
        self._refuse_captured(outs)
        self._find_inputs_in(outs, leaves, aliases)
        return self._tie(module, receiver, leaves, values, aliases, outs, residuals, buffers_before)

    def _alias(self, tensor: Tensor) -> Tensor:
        if self.mode == EAGER:
            # .data has a version counter of its own, which shows a forward that writes in place.
            return tensor.data if tensor.requires_grad else tensor
        return tensor.detach().clone() if self.plan.forward_writes else tensor.detach()

    def _forward(self, module: nn.Module | None, receiver: Any, aliases: list[Tensor]) -> tuple[Any, dict[str, Any]]:
        plan, layout = self.plan, self.layout
        given = iter(aliases)
        arguments = [unflatten(spec, given) for spec in self.specs]
        inner = receiver
        if self.aliased and module is not None:
            tensors = {name: alias for param, alias in zip(self.aliased, given, strict=True) for name in param.names}
            inner = stand_in(module, tensors)
        frame: dict[str, Any] = {}
        if plan.hands_over or plan.takes_receiver:
            frame = open_frame()
            try:
                result = plan.invoke(layout, inner, arguments)
            finally:
                close_frame()
        else:
            result = plan.invoke(layout, inner, arguments)
        if inner is not receiver and module is not None:
            write_back(inner, module)
        return result, frame

    def _without_gradient(self, result: Any) -> Any:
        tensors: list[Tensor] = []
        flatten(result, is_tensor, tensors)
        if self.plan.straight_through:
            fail(
                ForwardResultError,
                f"{self.plan.forward.who} must return a floating tensor for a gradient to pass straight through it; "
                f"it returned {what(result)}",
            )
        if not tensors:
            fail(
                ForwardResultError,
                f"{self.plan.forward.who} must return at least one tensor, for its rule {self.plan.rule.who} to get "
                f"a gradient; it returned {what(result)}. Return the tensor that the rule is about",
            )
        return result

    def check_straight_through(self, argument: Any, result: Any) -> None:
        """The identity as a gradient needs a result of the shape of the argument."""
        if argument != result:
            fail(
                ForwardResultError,
                f"{self.plan.forward.who} must return a tensor of shape {shape_text(argument)}, the shape of its first "
                f"differentiable argument, for the gradient to pass straight through; it returned one of shape "
                f"{shape_text(result)}. Give a surrogate with that result: straight_through(surrogate=...)",
            )

    def _refuse_captured(self, outs: list[Tensor]) -> None:
        tracked = [out for out in outs if out.requires_grad]
        if not tracked:
            return
        expected = self.natural or isinstance(self.graph, (KeptGraph, TracedGraph))
        if self.mode != EAGER:
            if not expected:
                captured.refuse(self.plan.forward, None)
            return
        stops = {param.tensor.grad_fn for param in self.natural}
        known = {id(param.tensor) for param in self.natural}
        if self.graph is not None:
            self.graph.stops(known, stops)
        leaf = captured.foreign_leaf(tracked, known, stops)
        if leaf is not None:
            captured.refuse(self.plan.forward, leaf)

    def _find_inputs_in(self, outs: list[Tensor], leaves: list[Tensor], aliases: list[Tensor]) -> None:
        """Results that are arguments as they stand, and arguments that the forward wrote into."""
        self.alias_of: list[int | None] = []
        for out in outs:
            match = None
            for index in range(self.n_leaves):
                if out is aliases[index]:
                    match = index
            self.alias_of.append(match)
        self.copies: list[int] = []
        if self.mode == EAGER:
            written = [i for i in range(self.n_leaves) if aliases[i] is not leaves[i] and aliases[i]._version]
        elif self.plan.forward_writes:
            written = [index for index in self.alias_of if index is not None]
        else:
            return
        for index in written:
            name = self.name_of_leaf(index)
            if index not in self.alias_of:
                fail(
                    ForwardResultError,
                    f"{self.plan.forward.who} writes into its argument '{name}' in place and must return it, so that "
                    f"the rule has a gradient for what it became; it returned something else. Return '{name}', or "
                    "work on a copy",
                )
            if self.plan.sources.get(name.partition("[")[0]) == "argument":
                self._refuse_overwritten(name.partition("[")[0], name)
            if self.plan.sources.get("input") == "reserved" and index < self.ends[self.holders[0]]:
                self._refuse_overwritten("input", name)
        if self.mode == EAGER:
            self.dirty = written
        else:
            self.copies = written

    def _refuse_overwritten(self, asked: str, name: str) -> None:
        fail(
            ForwardResultError,
            f"{self.plan.forward.who} overwrites its argument '{name}' in place, and its rule "
            f"{self.plan.rule.who} asks for '{asked}', whose value is gone by then. Ask for 'output', "
            "hand a copy over by save_for_backward, or do not write in place",
        )

    # --- tying the result to the inputs -----------------------------------------------------------------------

    def _tie(
        self,
        module: nn.Module | None,
        receiver: Any,
        leaves: list[Tensor],
        values: Sequence[Any],
        aliases: list[Tensor],
        outs: list[Tensor],
        residuals: dict[str, Any],
        buffers_before: dict[str, Any] | None,
    ) -> Any:
        mode = self.mode
        self.specs = [skeleton(spec) for spec in self.specs]
        inputs: list[Tensor] = [*leaves, *(param.tensor for param in self.params)]
        if mode == TRACED:
            inputs = [_distinct(tensor, inputs[:index]) for index, tensor in enumerate(inputs)]
        saver = _Saver(self, inputs, outs, aliases)
        self._collect(saver, module, values, residuals)
        if isinstance(self.graph, Replay):
            self._prepare_replay(saver, module, receiver, values, buffers_before)
        floating = saver.floating
        self.n_residuals = len(floating)
        if mode == TRACED and self.graph is not None:
            self.alias_slots = saver.extras(aliases)
        if isinstance(self.graph, KeptGraph):
            self.token = self.graph.end([*outs, *floating])
        self.first_out = len(inputs)
        self.n_outs = len(outs)
        self.out_metas = [Meta(out) for out in outs]
        if mode == TRACED and self.graph is not None:
            self.out_slots = [saver.slot(self.first_out + k) for k in range(self.n_outs)]
        flowing = bool(self.natural) or (mode == TRACED and self.graph is not None)
        self.flows = [bool(self.natural) and out.requires_grad for out in outs]
        inputs += outs if flowing else [out.detach() if out.requires_grad else out for out in outs]
        inputs += [tensor.detach() for tensor in floating]
        self.saved = saver.positions
        if mode == EAGER:
            results = fast_apply(self.plan.general)(self, *inputs)
        elif mode == TRACED:
            results = self.plan.general.apply(self, *inputs)
        else:
            results = self.plan.transformed.apply(self, *inputs)
        outputs = list(results[: self.n_outs])
        for index in self.copies:
            k = self.alias_of.index(index)
            outputs[k] = leaves[index].copy_(outputs[k])
        result = unflatten(self.result, iter(outputs))
        self.result = skeleton(self.result)
        for param in self.params:
            param.tensor = None  # type: ignore[assignment]  # torch saves what is needed
        return result

    def results(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The forward of the Function: new tensor objects with the values of the forward's results."""
        results = []
        taken = set()
        for k, index in enumerate(self.alias_of):
            out = tensors[self.first_out + k]
            if self.mode != EAGER:
                results.append(out.clone())
            elif index is None or index in taken:
                results.append(fresh(out))
            else:
                taken.add(index)  # torch makes a view of it, or its next version if it was written into
                results.append(tensors[index])
        for residual in tensors[self.first_out + self.n_outs :]:
            results.append(residual.clone() if self.mode != EAGER else residual.detach())
        return tuple(results)

    def tensors_to_save(self, inputs: Sequence[Any], output: Sequence[Tensor]) -> list[Tensor]:
        """What the rule asks for, in the order of its slots, and the kept graph."""
        saved = [inputs[1 + place] if place >= 0 else output[~place] for place in self.saved]
        if isinstance(self.graph, KeptGraph):
            saved.append(self.token)
            self.token = None
        return saved

    def _collect(
        self, saver: _Saver, module: nn.Module | None, values: Sequence[Any], residuals: dict[str, Any]
    ) -> None:
        """Find each value that the rule asks for, and say where its tensors are to be saved from."""
        plan = self.plan
        own = {param.name: index for index, param in enumerate(self.params)}
        for name, source in plan.sources.items():
            if source == "argument":
                indices = self.groups[name] if name in self.groups else ()
                if name in self.groups and name != self.variadic:
                    self._ask(saver, name, values[indices[0]])
                elif name in self.groups:
                    self._ask(saver, name, tuple(values[index] for index in indices))
                else:  # **kwargs under its own name
                    known = set(plan.forward.names)
                    named = dict(zip(self.names, values, strict=True))
                    self._ask(saver, name, {key: value for key, value in named.items() if key not in known})
            elif name in residuals:
                self._ask(saver, name, residuals[name], handed_over=True)
            elif module is not None and name in own:
                self._ask(saver, name, saver.inputs[self.n_leaves + own[name]])
            elif module is not None and name in self.frozen:
                self._ask(saver, name, self.frozen[name])
            elif module is not None and module._buffers.get(name) is not None:
                self._ask(saver, name, module._buffers[name])
            elif source == "reserved":
                if name == "input":
                    self._ask(saver, name, values[self.holders[0]] if self.holders else None)
                elif name == "output":
                    slots = [saver.slot(~k) for k in range(len(saver.outs))]
                    self.asked.append(Asked(name, self.result, slots))
            elif plan.rule.asks[name]:
                more = [*residuals, *own, *self.frozen, *(module._buffers if module is not None else ())]
                error = unknown_name(plan.rule, plan.forward, name, [key for key in more if "." not in key])
                fail(type(error), str(error))
        self.given = {asked.name for asked in self.asked}
        self.module_slots: dict[str, int] = {}
        if module is not None and (plan.asks_module or plan.asks_params):
            self.module_slots = {
                name: saver.slot(self.n_leaves + index)
                for index, param in enumerate(self.params)
                for name in param.names
            }
        if module is not None and plan.asks_module:
            self.module = module
            self.buffers = {name: value for name, value in module.named_buffers() if value is not None}

    def _ask(self, saver: _Saver, name: str, value: Any, handed_over: bool = False) -> None:
        tensors: list[Tensor] = []
        spec = flatten(value, is_tensor, tensors)
        places = [saver.place(tensor, handed_over) for tensor in tensors]
        self.asked.append(Asked(name, spec, [saver.slot(place) for place in places]))

    # --- the backward ---------------------------------------------------------------------------------------

    def backward(self, ctx: Any, grad_outputs: Sequence[Tensor | None]) -> list[Tensor | None]:
        """One gradient for each input of the Function, by the rule."""
        saved = ctx.saved_tensors
        grads = self._materialized(grad_outputs)
        extra = list(grad_outputs[self.n_outs :])
        if self.autocast is None:
            leaf_grads, param_grads, flowing = self._gradients(ctx, saved, grads)
        else:
            with self.autocast.restored():
                leaf_grads, param_grads, flowing = self._gradients(ctx, saved, grads)
        if any(grad is not None for grad in extra):
            leaf_grads, param_grads = self._through_residuals(saved, grads, extra, leaf_grads, param_grads)
        n_extra = self.first_out - self.n_leaves - len(self.params)
        return [*leaf_grads, *param_grads, *[None] * n_extra, *flowing, *[None] * len(extra)]

    def _materialized(self, grad_outputs: Sequence[Tensor | None]) -> list[Tensor]:
        return [
            torch.zeros(meta.shape, dtype=meta.dtype, device=meta.device) if grad is None else grad
            for grad, meta in zip(grad_outputs[: self.n_outs], self.out_metas, strict=True)
        ]

    def _gradients(
        self, ctx: Any, saved: Sequence[Tensor], grads: list[Tensor]
    ) -> tuple[list[Tensor | None], list[Tensor | None], list[Tensor | None]]:
        """The gradients of the leaves, of the parameters, and what flows on into torch's own graph."""
        plan = self.plan
        handed = [grad.clone() for grad in grads] if plan.rule_writes else grads
        grad_output = unflatten(self.result, iter(handed), constants=False)
        vjp = None
        if self.graph is not None:
            vjp = Vjp(self, lambda gs, which: self._pull(saved, gs, which), grad_output)
        supplied = self._supply(saved, vjp)
        versions = [grad._version for grad in handed] if self.mode == EAGER else []
        answer, collected = self._ask_rule(grad_output, supplied, saved)
        if versions and versions != [grad._version for grad in handed]:
            self.refuse_written()
        leaf_grads, named = read_answer(self, answer)
        answered = read_params(self, {**named, **collected})
        return self._complete(ctx, saved, grads, leaf_grads, answered)

    def _supply(self, saved: Sequence[Tensor], vjp: Vjp | None) -> dict[str, Any]:
        supplied = {asked.name: asked.value(saved) for asked in self.asked}
        for name, source in self.plan.sources.items():
            if source != "reserved" or name in self.given:
                continue
            if name == "vjp":
                supplied[name] = vjp
            elif name == "needs":
                supplied[name] = self.needs()
            elif name == "params":
                supplied[name] = {param.name: saved[self.module_slots[param.name]] for param in self.params}
            elif name == "module":
                supplied[name] = self._module_then(saved)
            elif name == "forward":
                supplied[name] = self._forward_then(saved)
        return supplied

    def needs(self) -> dict[str, bool]:
        """By argument name, whether a gradient is wanted; by dotted name for parameters."""
        wanted = {name: any(self.wants(index) for index in indices) for name, indices in self.groups.items()}
        return {**wanted, **{name: False for name in self.frozen}, **{param.name: True for param in self.params}}

    def wants(self, index: int) -> bool:
        """Whether a gradient is wanted for the argument at `index`."""
        return any(self.wanted[self.ends[index - 1] if index else 0 : self.ends[index]])

    def _module_then(self, saved: Sequence[Tensor]) -> Any:
        if self.module is None:
            return None
        tensors = {name: saved[slot] for name, slot in self.module_slots.items()}
        return stand_in(self.module, {**self.frozen, **self.buffers, **tensors})

    def _forward_then(self, saved: Sequence[Tensor]) -> Any:
        if not self.plan.takes_receiver:
            return self.plan.fn
        then = self._module_then(saved)
        fn = self.plan.fn
        return lambda *args, **kwargs: fn(then, *args, **kwargs)

    def _ask_rule(
        self, grad_output: Any, supplied: dict[str, Any], saved: Sequence[Tensor]
    ) -> tuple[Any, dict[str, Any]]:
        rule = self.plan.rule.fn
        if not self.plan.class_form:
            if self.mode == TRACED:
                return rule(grad_output, **supplied), {}
            try:
                return rule(grad_output, **supplied), {}
            except Exception as error:
                self.note(error)
                raise
        collector = Collector(
            self.module,
            {**self.frozen, **self.buffers},
            {param.name: (param.names, saved[self.module_slots[param.name]]) for param in self.params},
            traced=self.mode == TRACED,
        )
        if self.mode == TRACED:
            return rule(collector.stand_in, grad_output, **supplied), self._collected(collector)
        try:
            answer = rule(collector.stand_in, grad_output, **supplied)
        except Exception as error:
            self.note(error)
            raise
        return answer, self._collected(collector)

    def _collected(self, collector: Collector) -> dict[str, Any]:
        collected = collector.collected()
        for param in self.params:
            if param.name not in collected and not self.plan.asks_vjp:
                none = "" if self.mode == TRACED else " (None stops its gradient)"
                fail(
                    RuleResultError,
                    f"'backward' of {self.plan.forward.who} must assign self.{param.name}.grad{none}, or ask for 'vjp' "
                    f"as a further parameter, which leaves '{param.name}' to autograd; it did neither",
                )
        return collected

    def note(self, error: Exception) -> None:
        note = f"in the rule {self.plan.rule.who} of {self.plan.forward.who}"
        if hasattr(error, "add_note"):
            error.add_note(note)
        else:  # Python 3.10
            error.__notes__ = [*getattr(error, "__notes__", []), note]

    def refuse_written(self) -> None:
        fail(
            RuleResultError,
            f"rule {self.plan.rule.who} of {self.plan.forward.who} must not write into the gradient it is given, "
            "which other gradients share; it did. Write into grad_output.clone()",
        )

    def _complete(
        self,
        ctx: Any,
        saved: Sequence[Tensor],
        grads: list[Tensor],
        leaf_grads: list[Tensor | None],
        answered: dict[str, Tensor | None],
    ) -> tuple[list[Tensor | None], list[Tensor | None], list[Tensor | None]]:
        """Add autograd's own gradients for the parameters that the rule has not answered for."""
        results: dict[str, Tensor | None] = dict(answered)
        left = [index for index, param in enumerate(self.aliased) if param.name not in answered]
        if left:
            pulled = self._pull(saved, grads, [self.n_leaves + index for index in left])
            results.update({self.aliased[index].name: grad for index, grad in zip(left, pulled, strict=True)})
        flowing: list[Tensor | None] = [
            grad if flows else None for grad, flows in zip(grads, self.flows, strict=True)
        ]
        if self.natural:
            flowing = self._natural(ctx, saved, grads, flowing, answered, results)
        return leaf_grads, [results.get(param.name) for param in self.params], flowing

    def _natural(
        self,
        ctx: Any,
        saved: Sequence[Tensor],
        grads: list[Tensor],
        flowing: list[Tensor | None],
        answered: dict[str, Tensor | None],
        results: dict[str, Tensor | None],
    ) -> list[Tensor | None]:
        """What flows into torch's own graph, unless the gradients left to it must be computed here."""
        overruled = any(param.name in answered for param in self.natural)
        second = self.mode == EAGER and torch.is_grad_enabled() and any(self.wanted)
        if not overruled and not second:
            return flowing
        if self.mode == TRACED:
            named = [param.name for param in self.natural if param.name in answered]
            fail(
                RuleResultError,
                f"rule {self.plan.rule.who} of {self.plan.forward.who} answers for the parameter '{named[0]}' and "
                "must ask for it where it is compiled, by its name or by 'params'",
            )
        if second and self.graph is None:
            text = (
                f"the second derivative of {self.plan.forward.who} with respect to its arguments, through parameters "
                f"that the rule {self.plan.rule.who} leaves to autograd, needs the graph of the forward. "
                "Ask for 'vjp' in the rule, which keeps it"
            )
            grads = [Refused.apply(text, grad) for grad in grads]
            if not overruled:
                return [grad if flows else None for grad, flows in zip(grads, self.flows, strict=True)]
        self.plan.names_all = self.plan.names_all or overruled  # from now on, through aliases
        left = [param for param in self.natural if param.name not in answered]
        places = [self.n_leaves + len(self.aliased) + self.natural.index(param) for param in left]
        if self.graph is not None:
            found = self.graph.pull_parameters(saved[len(self.saved)], grads, self._natural_edges(ctx, places))
        else:
            found = self._pull_natural(ctx, grads, places)
        results.update({param.name: grad for param, grad in zip(left, found, strict=True)})
        return [None] * len(flowing)

    def _natural_edges(self, ctx: Any, places: Sequence[int]) -> list[Any]:
        return [torch.autograd.graph.GradientEdge(*ctx.next_functions[place]) for place in places]

    def _pull_natural(self, ctx: Any, grads: Sequence[Tensor], places: Sequence[int]) -> list[Tensor | None]:
        pairs = [
            (torch.autograd.graph.GradientEdge(*ctx.next_functions[self.first_out + k]), grads[k])
            for k in range(self.n_outs)
            if self.flows[k]
        ]
        if not places:
            return []
        return list(
            torch.autograd.grad(
                [edge for edge, _ in pairs],
                self._natural_edges(ctx, places),
                [grad for _, grad in pairs],
                retain_graph=True,
                create_graph=torch.is_grad_enabled(),
                allow_unused=True,
            )
        )

    def _pull(self, saved: Sequence[Tensor], grads: Sequence[Tensor], which: Sequence[int]) -> list[Tensor]:
        """The gradients of leaves and aliased parameters by the kept graph."""
        which = list(which)
        if self.mode == EAGER:
            padded = [*grads, *[None] * self.n_residuals]
            return self.graph.pull(saved[len(self.saved)], padded, which)  # type: ignore[no-any-return]
        if self.mode == TRACED:
            aliases = [saved[slot] for slot in self.alias_slots]
            results = [saved[slot] for slot in self.out_slots]
            return self.graph.pull(aliases, results, grads, which)  # type: ignore[no-any-return]
        tensors = [saved[slot] for slot in self.replay_slots]
        return self.graph.pull(tensors, grads, which, self.plan.forward.who)  # type: ignore[no-any-return]

    def _through_residuals(
        self,
        saved: Sequence[Tensor],
        grads: list[Tensor],
        extra: list[Tensor | None],
        leaf_grads: list[Tensor | None],
        param_grads: list[Tensor | None],
    ) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """Second derivatives reach what the forward handed over: the kept graph knows how it was computed."""
        if not isinstance(self.graph, KeptGraph):
            fail(
                UnsupportedError,
                f"the second derivative of {self.plan.forward.who} through the values that its forward hands over "
                f"needs the graph of the forward. Ask for 'vjp' in the rule {self.plan.rule.who}, which keeps it, or "
                "compute them in the rule",
            )
        which = list(range(self.n_leaves + len(self.aliased)))
        found = self.graph.pull(saved[len(self.saved)], [*[None] * len(grads), *extra], which)
        leaves, params = found[: self.n_leaves], found[self.n_leaves :]
        leaf_grads = [_sum(old, new) for old, new in zip(leaf_grads, leaves, strict=True)]
        rest = param_grads[len(params) :]
        return leaf_grads, [*(_sum(old, new) for old, new in zip(param_grads, params, strict=False)), *rest]

    def read_gradient(self, value: Any) -> list[Tensor]:
        """A gradient in the structure of the result, taken apart and checked: what a rule hands to `vjp`."""
        found: list[Any] = []
        spec = flatten(value, is_tensor, found)
        if len(found) != self.n_outs or has_leaf(spec) != has_leaf(self.result):
            fail(
                RuleResultError,
                f"vjp in the rule {self.plan.rule.who} of {self.plan.forward.who} takes a gradient in the structure "
                f"of the forward's result, with {self.n_outs} tensors; it got {len(found)}",
            )
        return [self.conform_output(tensor, meta) for tensor, meta in zip(found, self.out_metas, strict=True)]

    def conform_output(self, value: Any, meta: Meta) -> Tensor:
        """`value` as a gradient of the result, in the dtype of the result, or an error."""
        if not isinstance(value, Tensor) or value.shape != meta.shape:
            fail(
                RuleResultError,
                f"vjp in the rule {self.plan.rule.who} of {self.plan.forward.who} takes a gradient of shape "
                f"{meta.text}, the shape of the result; it got {what(value)}",
            )
        return conform(self, "output", value, meta)

    # --- transforms -----------------------------------------------------------------------------------------

    def jvp(self, ctx: Any, tangents: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        """Forward mode: the rule is linear in the gradient, and its transpose is the JVP."""
        saved = ctx.saved_tensors
        count = self.n_leaves + len(self.params)
        if self.n_residuals:
            fail(
                UnsupportedError,
                f"forward mode through {self.plan.forward.who} would lose the tangents of the values that its "
                "forward hands over. Compute them in the rule, from what it may ask for",
            )

        def gradients(*grads: Tensor) -> list[Tensor | None]:
            leaf_grads, param_grads, _ = self._gradients(ctx, saved, list(grads))
            return [*leaf_grads, *param_grads]

        who = f"rule {self.plan.rule.who} of {self.plan.forward.who}"
        return tuple(transpose(gradients, self.out_metas, list(tangents[:count]), who))

    def _snapshot_buffers(self, module: nn.Module | None) -> dict[str, Any]:
        if module is None:
            return {}
        return {name: value.clone() for name, value in module.named_buffers() if value is not None}

    def _prepare_replay(
        self,
        saver: _Saver,
        module: nn.Module | None,
        receiver: Any,
        values: Sequence[Any],
        buffers: dict[str, Any] | None,
    ) -> None:
        """Keep what is needed to run the forward again on tensors that the backward is given."""
        plan, layout = self.plan, self.layout
        names = [param.names for param in self.params]
        others: list[Tensor] = []
        specs = []
        for value in values:
            tensors: list[Tensor] = []
            specs.append((flatten(value, is_tensor, tensors), [is_differentiable(tensor) for tensor in tensors]))
            others += [tensor for tensor in tensors if not is_differentiable(tensor)]
        buffer_names = list(buffers or {})
        others += list((buffers or {}).values())
        frozen = list(self.frozen)
        others += [self.frozen[name] for name in frozen]
        n_leaves, n_params = self.n_leaves, len(self.params)
        self.replay_slots = [saver.slot(index) for index in range(n_leaves + n_params)]
        self.replay_slots += [saver.slot(saver.extra(tensor)) for tensor in others]
        alias_of = list(self.alias_of)

        def forward(tensors: Sequence[Tensor]) -> list[Tensor]:
            given, rest = iter(tensors[:n_leaves]), iter(tensors[n_leaves + n_params :])
            copied = [tensor.clone() if plan.forward_writes else tensor for tensor in given]
            leaves = iter(copied)
            arguments = []
            for spec, kinds in specs:
                parts = [next(leaves) if differentiable else next(rest) for differentiable in kinds]
                arguments.append(unflatten(spec, iter(parts)))
            inner = receiver
            if module is not None:
                given_params = dict(zip(map(tuple, names), tensors[n_leaves : n_leaves + n_params], strict=True))
                swapped = {name: tensor for group, tensor in given_params.items() for name in group}
                swapped.update({name: next(rest).clone() for name in buffer_names})
                swapped.update({name: next(rest) for name in frozen})
                inner = stand_in(module, swapped)
            open_frame()
            try:
                result = plan.invoke(layout, inner, arguments)
            finally:
                close_frame()
            outs: list[Tensor] = []
            flatten(result, is_differentiable, outs)
            return outs if len(outs) == len(alias_of) else []

        self.graph.ran(forward)

    def metas_of(self, name: str) -> list[Meta]:
        index = self.names.index(name)
        return self.metas[self.ends[index - 1] if index else 0 : self.ends[index]]

    def name_of_leaf(self, leaf: int) -> str:
        for name, end in zip(self.names, self.ends, strict=True):
            if leaf < end:
                return name
        raise AssertionError("a leaf belongs to an argument")


class _Saver:
    """Where the tensors that are saved come from: an input of the Function (its place) or an output (`~place`)."""

    def __init__(self, call: Call, inputs: list[Tensor], outs: list[Tensor], aliases: list[Tensor]) -> None:
        self.call = call
        self.inputs = inputs
        self.outs = outs
        self.aliases = aliases
        self.positions: list[int] = []
        self.floating: list[Tensor] = []

    def slot(self, place: int) -> int:
        """The index among the saved tensors of what is at `place`."""
        if place in self.positions:
            return self.positions.index(place)
        self.positions.append(place)
        return len(self.positions) - 1

    def place(self, tensor: Tensor, handed_over: bool) -> int:
        """Where `tensor` is or becomes an input, or which output it is."""
        for index, known in enumerate(self.inputs):
            if known is tensor:
                return index
        if not handed_over:
            return self.extra(tensor)
        for index, out in enumerate(self.outs):
            if out is tensor:
                return ~index
        for index, alias in enumerate(self.aliases):
            if alias is tensor:
                return index
        # As an output of its own it is known to second derivatives, which compiled code has not.
        if is_differentiable(tensor) and self.call.mode != TRACED:
            for index, known in enumerate(self.floating):
                if known is tensor:
                    return ~(len(self.outs) + index)
            self.floating.append(tensor)
            return ~(len(self.outs) + len(self.floating) - 1)
        return self.extra(tensor)

    def extra(self, tensor: Tensor) -> int:
        self.inputs.append(tensor)
        return len(self.inputs) - 1

    def extras(self, tensors: Sequence[Tensor]) -> list[int]:
        return [self.slot(self.extra(tensor)) for tensor in tensors]


def _distinct(tensor: Tensor, before: Sequence[Tensor]) -> Tensor:
    """Dynamo breaks its graph where a Function gets one tensor twice (pytorch issue 183604)."""
    return tensor.view_as(tensor) if any(tensor is other for other in before) else tensor


def _sum(old: Tensor | None, new: Tensor) -> Tensor:
    return new if old is None else old + new
