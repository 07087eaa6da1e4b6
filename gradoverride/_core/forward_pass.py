"""One forward on the general path: on cut aliases, its result tied to the rule.

The flow, top down: `differentiate` decides whether a gradient is wanted at all, `ForwardPass.run` runs the forward on
aliases of its tensors, `finish` looks at what it gave, `_tie` hands the tensors to the Function. (`tie` is for what
was computed elsewhere.) The inputs of the Function are

    the differentiable tensors among the arguments, the module's trainable parameters (aliased ones first),
    what else the rule asks for, the results of the forward, floating residuals
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import debug_unwrap

from gradoverride._core import captured
from gradoverride._core.call import EAGER, TRACED, TRANSFORMED, Asked, Call, is_differentiable, is_tensor, is_tracked
from gradoverride._core.contract import Meta, what
from gradoverride._core.function import TOKEN, fresh
from gradoverride._core.kept_graph import KeptGraph, Replay, TracedGraph, distinct, outer_of, shares_versions
from gradoverride._core.plan import Layout, Plan
from gradoverride._core.private import (
    fail,
    forward_mode_depth,
    in_forward_ad,
    in_functorch,
    keep_own_frames_whole,
    keep_versions,
    version_of,
    versions_while_tracing,
)
from gradoverride._core.reach import SCALARS
from gradoverride._core.residuals import close_frame, open_frame
from gradoverride._core.signature import unknown_name
from gradoverride._core.standin import (
    Attributes,
    Copied,
    changed_since,
    plain_attributes,
    stand_in,
    with_parameters,
    write_back,
)
from gradoverride._core.structure import LEAF, Constant, Node, alike, flatten, skeleton, unchanged, unflatten
from gradoverride._core.tracers import FX, record_call, says_of, tracer_now
from gradoverride.errors import ForwardResultError, RuleSignatureError, UnsupportedError

__all__ = ["ForwardPass", "differentiate", "tie"]


def differentiate(plan: Plan, layout: Layout, receiver: Any, values: Sequence[Any], rule: Any = None) -> Any:
    """Call the forward of `plan` with its rule in force, or with `rule`, if a gradient is wanted at all."""
    if plan.class_form:
        plan = plan.of_class(type(receiver))
    if plan.make_as_function is not None and isinstance(receiver, Tensor):
        return plan.called_as_function(layout, receiver, values)
    tracer = tracer_now(values)
    if tracer == FX:
        return record_call(plan, layout, receiver, values)
    mode = _mode(plan)
    if tracer is not None and mode is not None and says_of(plan, tracer):
        mode = None
    if mode is None:
        return plan.undecorated(layout, receiver, values)
    call = Call(plan, layout, mode, rule)
    leaves = call.take_apart(values)
    if isinstance(receiver, nn.Module) and "_is_replica" in receiver.__dict__:
        receiver = with_parameters(receiver)
    module = receiver if isinstance(receiver, nn.Module) else None
    if module is not None:
        call.find_params(module)
    elif plan.takes_receiver and plan.asks_params:
        raise unknown_name(plan.rule, plan.forward, "params", ())
    wanted = mode == TRANSFORMED or any(leaf.requires_grad for leaf in leaves) or bool(call.params)
    if not wanted or not (leaves or call.params):
        result = plan.undecorated(layout, receiver, values)
        if any([_may_hold(spec) for spec in call.specs]):
            _refuse_held(call, values, result)
        return result
    return ForwardPass(call, module, receiver, leaves, values).run()


def _may_hold(spec: Any) -> bool:
    """Whether an argument of this structure has a value in it that may hold tensors itself."""
    if isinstance(spec, Constant):
        return type(spec.value) not in SCALARS
    return spec is not LEAF and not spec.bare and any([_may_hold(part) for part in spec.parts])


def _refuse_held(call: Call, values: Sequence[Any], result: Any) -> None:
    """No argument wants a gradient, but the result has one: of a tensor within an object, where it was not looked for.

    Not of one in a closure or global: that has its own gradient by torch, as where nothing is decorated.
    """
    results: list[Tensor] = []
    flatten(result, is_differentiable, results)
    if any([tensor.requires_grad for tensor in results]):
        for name, value in zip(call.names, values, strict=True):
            held = captured.held_by(name, value)
            if held is not None:
                captured.refuse_held(call.plan.forward.who, held)


def tie(plan: Plan, layout: Layout, values: Sequence[Any], result: Any, rule: Any) -> Any:
    """A result that was computed elsewhere, with `rule` for its gradient to reach `values`."""
    mode = _mode(plan)
    tracer = tracer_now(values)
    if tracer is not None and mode is not None and says_of(plan, tracer):
        mode = None
    if mode is None:
        return result
    call = Call(plan, layout, mode, rule)
    leaves = call.take_apart(values)
    forward_pass = ForwardPass(call, None, None, leaves, values)
    forward_pass.versions = [None] * len(leaves)  # nothing ran on them
    return forward_pass.finish(leaves, result, {})


def _mode(plan: Plan) -> str | None:
    """How a call is to be run; None where no gradient is wanted."""
    transformed = in_functorch() or in_forward_ad()
    if not transformed and not torch.is_grad_enabled():
        return None
    if torch.compiler.is_dynamo_compiling():
        keep_own_frames_whole()
        plan.traced()
        if transformed:
            fail(
                UnsupportedError,
                f"{plan.forward.who} is called in a torch.func transform inside of torch.compile, where torch drops "
                "the backward of every autograd.Function (pytorch issue 193279). Compile the function alone and use "
                "backward(), or leave the transform uncompiled",
            )
        return TRACED
    if not transformed:
        return EAGER
    if forward_mode_depth() > 1:
        fail(
            UnsupportedError,
            f"{plan.forward.who} is called in forward mode within forward mode (jvp of jvp, jacfwd of jacfwd), "
            "where torch loses the tangents of every autograd.Function. Use reverse mode for one of the two",
        )
    return TRANSFORMED


class ForwardPass:
    """The forward of `call`."""

    def __init__(
        self, call: Call, module: nn.Module | None, receiver: Any, leaves: list[Tensor], values: Sequence[Any]
    ) -> None:
        self.call = call
        self.plan = call.plan
        self.mode = call.mode
        self.module = module
        self.receiver = receiver
        self.leaves = leaves
        self.values = values
        self.buffers_before: dict[str, Tensor] = {}
        self.attributes_before: Attributes = {}
        self.buffer_versions: dict[str, int | None] = {}
        # By leaf, its version before the forward: where that ran on the leaves themselves (`reach.py`), and then
        # where a gradient is wanted for it.
        self.versions: list[int | None] | None = None
        # By alias, and then by other tensor that the rule asks for, its version before the forward: where that may
        # write, and where the alias counts together with the leaf.
        self.before: Sequence[int | None] | None = None
        self.asked_besides: list[tuple[str, Tensor]] = []  # those others, which have no gradient, by argument

    def run(self) -> Any:
        """The forward on aliases, and its result tied to the rule."""
        call, plan, mode = self.call, self.plan, self.mode
        keeps = plan.asks_vjp or not all([param.asked for param in call.aliased])
        sources = [*self.leaves, *[param.tensor for param in call.aliased]]
        replay, shares = None, False
        if not keeps:
            aliases = [self._alias(tensor) for tensor in sources]
        elif mode == EAGER:
            natural: list[Any] = [param.tensor for param in call.natural]
            shares = shares_versions(plan.forward_may_write)
            call.graph = KeptGraph(sources, shares, natural) if call.params else KeptGraph.alone(sources, shares)
            aliases = call.graph.start()
        elif mode == TRACED:
            call.graph = TracedGraph(sources)
            aliases = call.graph.start(plan.forward_may_write)
        else:
            constants = [index for index, leaf in enumerate(self.leaves) if not _may_want_gradient(leaf)]
            call.graph = replay = Replay(constants)
            aliases = [self._alias(tensor) for tensor in sources]
        if replay is not None and self.module is not None:
            self.attributes_before = plain_attributes(self.module)
            self.buffers_before = {name: value.clone() for name, value in self.module.named_buffers()}
        if plan.asks_module and self.module is not None and mode != TRACED:
            self.buffer_versions = {name: version_of(value) for name, value in self.module.named_buffers()}
        if plan.forward_may_write:
            self.asked_besides = self._asked_without_gradient() if plan.sources else []
        if shares or (plan.forward_may_write and (mode != EAGER or self.asked_besides or not all(call.wanted))):
            self.before = self._versions_of(aliases)
        result, residuals = self._forward(aliases)
        return self.finish(aliases, result, residuals)

    def finish(self, aliases: list[Tensor], result: Any, residuals: dict[str, Any]) -> Any:
        """The forward has run on `aliases` and gave `result`: look at it, and tie it to the rule."""
        call, leaves = self.call, self.leaves
        outs: list[Tensor] = []
        call.result = flatten(result, is_differentiable, outs)
        if not outs:
            return self._without_gradient(result)
        if self.mode == EAGER:
            outs = [_trackable(out) for out in outs]
        if self.plan.straight_through:
            self._check_straight_through(result, outs)
        if self.plan.on_first_call is not None and self.mode == EAGER:
            self.plan.on_first_call(leaves[0], outs[0])
            self.plan.on_first_call = None
        if self.versions is None:
            self._refuse_captured(outs, aliases)
        self._find_inputs_in(outs, aliases)
        return self._tie(aliases, outs, residuals)

    def _alias(self, tensor: Tensor) -> Tensor:
        if self.mode == EAGER:
            # .data has a version counter of its own, which shows a forward that writes in place.
            return tensor.data if tensor.requires_grad else tensor
        if self.mode == TRACED and not tensor.requires_grad:
            return tensor
        return tensor.detach().clone() if self.plan.forward_may_write else tensor.detach()

    def _versions_of(self, aliases: list[Tensor]) -> Sequence[int | None]:
        tensors = [*aliases, *[tensor for _, tensor in self.asked_besides]]
        if self.mode == TRACED:
            return versions_while_tracing(tensors)
        return [version_of(tensor) for tensor in tensors]

    def _asked_without_gradient(self) -> list[tuple[str, Tensor]]:
        """The tensors without a gradient among the arguments that the rule asks for."""
        found = []
        for index, name in enumerate(self.call.names):
            if self.plan.sources.get(self._argument(name)) == "argument":
                tensors: list[Tensor] = []
                flatten(self.values[index], is_tensor, tensors)
                found += [(name, tensor) for tensor in tensors if not is_differentiable(tensor)]
        return found

    def _argument(self, name: str) -> str:
        """The name under which a rule asks for this value: those of `*args` and `**kwargs` have one for all."""
        names, own = self.plan.forward.names, name.partition("[")[0]
        return own if own in names or not names else names[-1]

    def _forward(self, aliases: list[Tensor]) -> tuple[Any, dict[str, Any]]:
        call, plan, module, receiver = self.call, self.plan, self.module, self.receiver
        given = iter(aliases)
        arguments = [
            unflatten(spec, given) if index in call.holders else value
            for index, (spec, value) in enumerate(zip(call.specs, self.values, strict=True))
        ]
        inner = receiver
        copied: list[Copied] = []
        if call.aliased and module is not None:
            tensors = {name: alias for param, alias in zip(call.aliased, given, strict=True) for name in param.names}
            inner = stand_in(module, tensors, copied)
        frame: dict[str, Any] = {}
        if self._may_hand_over():
            frame = open_frame()
            try:
                result = plan.invoke(call.layout, inner, arguments)
            finally:
                close_frame()
        else:
            result = plan.invoke(call.layout, inner, arguments)
        self._refuse_changed(arguments, aliases)
        write_back(copied)
        return result, frame

    def _may_hand_over(self) -> bool:
        """Whether what the forward hands over is to be collected."""
        plan, module = self.plan, self.module
        if plan.hands_over or not plan.takes_receiver or self.mode != TRACED:
            return plan.hands_over or plan.takes_receiver
        # Dynamo traces no such collecting inside of a checkpoint, so only where a name can come from nowhere else.
        buffers = module._buffers if module is not None else ()
        known = {name for param in self.call.params for name in param.names}.union(self.call.frozen, buffers)
        return any([source == "deferred" and name not in known for name, source in plan.sources.items()])

    def _refuse_changed(self, arguments: Sequence[Any], aliases: Sequence[Tensor]) -> None:
        """A container of tensors was given to the forward as a copy, with aliases: what it put there would be lost."""
        call = self.call
        for index in call.holders:
            if call.specs[index] is LEAF:
                continue
            given = aliases[call.ends[index - 1] if index else 0 : call.ends[index]]
            if not unchanged(call.specs[index], iter(given), arguments[index]):
                fail(
                    ForwardResultError,
                    f"{self.plan.forward.who} must leave the container '{call.names[index]}' as it is, for it holds "
                    "tensors that the rule answers for; it changed what is in it. Return what is new instead",
                )

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
        if getattr(self.plan.rule.fn, "needs_floating", False):
            kind = f" of {result.dtype}" if isinstance(result, Tensor) else ""
            fail(
                ForwardResultError,
                f"{self.plan.forward.who} must return a floating tensor, for its rule {self.plan.rule.who} to give it "
                f"a gradient; it returned {what(result)}{kind}. Convert it: .to(torch.get_default_dtype())",
            )
        return result

    def _check_straight_through(self, result: Any, outs: list[Tensor]) -> None:
        """The gradient of the result is to be one of the first differentiable argument."""
        call, plan, who = self.call, self.plan, self.plan.forward.who
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
            given = f"it was given {what(self.values[first])}"
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
            for leaf, out in zip(self.leaves, outs, strict=False):
                call.check_straight_through(leaf.shape, out.shape)
        if any(call.wanted) and not any(call.wanted[: call.ends[first]]):
            plan.warn_of_first(name, ", ".join(f"'{n}'" for i, n in enumerate(call.names) if call.wants(i)))

    def _refuse_captured(self, outs: list[Tensor], aliases: list[Tensor]) -> None:
        call, forward = self.call, self.plan.forward
        if self.mode == TRANSFORMED:
            tracked = [out for out in outs if _requires_grad_anywhere(out)]
        else:
            tracked = [out for out in outs if out.requires_grad]
        if not tracked:
            return
        own_graph = bool(call.natural) or isinstance(call.graph, (KeptGraph, TracedGraph))
        if self.mode != EAGER:
            if self.mode == TRACED and own_graph:
                starts = call.graph.aliases if call.graph is not None else []
                own = [param.tensor for param in call.natural]
                # A decorated call inside starts its graph at TOKEN.
                if not captured.foreign_while_tracing(tracked, [*starts, *own, TOKEN]):
                    return
            captured.refuse(forward.who, self.plan.captured_names())
        stops = {param.tensor.grad_fn for param in call.natural}
        known = {id(param.tensor) for param in call.natural}
        if call.graph is not None:
            call.graph.stops(known, stops)
        # Of an alias that the forward told to require grad none is lost.
        known |= {id(alias) for alias, leaf in zip(aliases, self.leaves, strict=False) if alias is not leaf}
        leaf = captured.foreign_leaf(tracked, known, stops)
        if leaf is not None:
            arguments = zip(call.names, self.values, strict=True)
            names = ", ".join(captured.captured_names(forward.fn, leaf, self.receiver, arguments))
            captured.refuse(forward.who, names, leaf)

    def _find_inputs_in(self, outs: list[Tensor], aliases: list[Tensor]) -> None:
        """Results that are arguments as they stand, and arguments that the forward wrote into."""
        call, leaves = self.call, self.leaves
        call.alias_of = [_place_in(aliases, call.n_leaves, out) for out in outs]
        call.copies = []
        before = self.versions if self.versions is not None and self.mode == EAGER else self.before
        if before is None:
            if self.mode != EAGER:
                return
            # Each alias has a version counter of its own.
            before = [None if alias is leaf else 0 for alias, leaf in zip(aliases, leaves, strict=False)]
        after = self._versions_of(aliases)
        changed = [i for i, version in enumerate(before) if version is not None and after[i] != version]
        if not changed:
            return
        returned = [leaves[index] for index in call.alias_of if index is not None]
        written = [i for i in changed if i < call.n_leaves]
        # A write into a tensor that was passed twice shows in both.
        written = [i for i in written if i in call.alias_of or not any([leaves[i] is leaf for leaf in returned])]
        for index in written:
            name = call.name_of_leaf(index)
            # What needs no gradient and was written into itself may be there to be written into.
            if index not in call.alias_of and (aliases[index] is not leaves[index] or leaves[index].requires_grad):
                fail(
                    ForwardResultError,
                    f"{self.plan.forward.who} writes into its argument '{name}' in place and must return it, so that "
                    f"the rule has a gradient for what it became; it returned something else. Return '{name}', or "
                    "work on a copy",
                )
            if self.plan.sources.get(self._argument(name)) == "argument":
                self._refuse_overwritten(self._argument(name), name)
            if self.plan.sources.get("input") == "reserved" and index < call.ends[call.holders[0]]:
                self._refuse_overwritten("input", name)
        for index in changed:
            if index >= len(aliases):
                name = self.asked_besides[index - len(aliases)][0]
                self._refuse_overwritten(self._argument(name), name)
        written = [index for index in written if index in call.alias_of]
        if self.mode == EAGER:
            call.dirty = written
        else:
            call.copies = written

    def _refuse_overwritten(self, asked: str, name: str) -> None:
        fail(
            ForwardResultError,
            f"{self.plan.forward.who} overwrites its argument '{name}' in place, and its rule "
            f"{self.plan.rule.who} asks for '{asked}', whose value is gone by then. Ask for 'output', "
            "hand a copy over by save_for_backward, or do not write in place",
        )

    def _tie(self, aliases: list[Tensor], outs: list[Tensor], residuals: dict[str, Any]) -> Any:
        """Hand the tensors to the Function, and put its results into the structure of the forward's."""
        call, mode, leaves = self.call, self.mode, self.leaves
        call.specs = [skeleton(spec) for spec in call.specs]
        inputs: list[Tensor] = [*leaves, *[param.tensor for param in call.params]]
        if isinstance(call.graph, Replay):
            for index in call.copies:  # it is needed as it was, and is about to be written into
                inputs[index] = leaves[index].clone()
        if mode == TRACED:
            inputs = [distinct(tensor, inputs[:index]) for index, tensor in enumerate(inputs)]
        saver = _Saver(mode, inputs, outs, aliases)
        self._collect(saver, residuals)
        if isinstance(call.graph, Replay):
            self._prepare_replay(saver, outs)
        floating = saver.floating
        call.n_residuals = len(floating)
        if mode == TRACED and call.graph is not None:
            call.alias_slots = saver.extras(call.graph.aliases)
            call.graph.aliases = []
        if isinstance(call.graph, KeptGraph):
            call.token = call.graph.end([*outs, *floating])
            if self.plan.reach is None:
                call.graph.guard(self.plan.forward.who)
        elif self.plan.marked and mode == EAGER and saver.positions:
            saver.slot(saver.extra(self.plan.mark))
        call.first_out = len(inputs)
        call.n_outs = len(outs)
        call.out_metas = [Meta(out) for out in outs]
        if mode == TRACED and call.graph is not None:
            call.out_slots = [saver.slot(call.first_out + k) for k in range(call.n_outs)]
        # With a kept graph it is asked for the gradients of natural parameters, and torch's own never runs into it.
        natural = bool(call.natural) and not isinstance(call.graph, KeptGraph)
        call.flows = [natural and out.requires_grad for out in outs]
        flowing = natural or (mode == TRACED and call.graph is not None)
        call.outer = outer_of(leaves) if natural and mode == EAGER else []
        call.residual_metas = [Meta(tensor) for tensor in floating]
        for tensor in outs:
            cut = tensor.requires_grad and not flowing
            inputs.append(tensor if not cut else fresh(tensor) if mode == EAGER else tensor.detach())
        inputs += [tensor.detach() for tensor in floating]
        if mode == TRACED:
            inputs = [distinct(tensor, inputs[:index]) for index, tensor in enumerate(inputs)]
        call.saved = saver.positions
        if mode == EAGER and call.dirty and isinstance(call.graph, KeptGraph) and keep_versions is not None:
            with keep_versions(tuple([leaves[index] for index in call.dirty])):
                results = self.plan.apply(call, *inputs)
        elif mode == EAGER:
            results = self.plan.apply(call, *inputs)
        elif mode == TRACED:
            results = self.plan.general.apply(call, *inputs)
        else:
            results = self.plan.transformed.apply(call, *inputs)
        outputs = list(results[: call.n_outs])
        for index in call.copies:
            k = call.alias_of.index(index)
            outputs[k] = leaves[index].copy_(outputs[k])
        result = unflatten(call.result, iter(outputs))
        call.result = skeleton(call.result)
        for param in call.params:
            param.tensor = None
        return result

    def _collect(self, saver: _Saver, residuals: dict[str, Any]) -> None:
        """Find each value that the rule asks for, and say where its tensors are to be saved from."""
        call, plan, module, values = self.call, self.plan, self.module, self.values
        if call.unsettled:
            call.settle_params(residuals)
        own = {name: index for index, param in enumerate(call.params) for name in param.names}
        sources = {**plan.jvp_sources, **plan.sources} if self.mode == TRANSFORMED else plan.sources
        for name, source in sources.items():
            if source == "argument":
                indices = call.groups.get(name, ())
                if name in call.groups and name != call.variadic:
                    self._ask_argument(saver, name, indices[0])
                elif name in call.groups:
                    self._ask(saver, name, tuple(values[index] for index in indices))
                else:  # **kwargs under its own name
                    known, layout = set(plan.forward.names), call.layout
                    named = zip(layout.keywords, values[layout.positional :], strict=True)
                    self._ask(saver, name, {key: value for key, value in named if key not in known})
            elif name in residuals:
                self._ask(saver, name, residuals[name], handed_over=True)
            elif module is not None and name in own:
                self._ask(saver, name, saver.inputs[call.n_leaves + own[name]])
            elif module is not None and name in call.frozen:
                self._ask(saver, name, call.frozen[name])
            elif module is not None and module._buffers.get(name) is not None:
                self._ask(saver, name, module._buffers[name])
            elif source == "reserved":
                if name == "input":
                    self._ask(saver, name, values[call.holders[0]] if call.holders else None)
                elif name == "output":
                    slots = [saver.slot(~k) for k in range(len(saver.outs))]
                    call.asked.append(Asked(name, call.result, slots))
            elif plan.rule.asks.get(name) or (plan.jvp is not None and plan.jvp.asks.get(name)):
                more = [*residuals, *own, *call.frozen, *(module._buffers if module is not None else ())]
                fail(RuleSignatureError, plan.unknown_name(name, *[key for key in more if "." not in key]))
        call.given = {asked.name for asked in call.asked}
        call.module_slots = {}
        if module is not None and (plan.asks_module or plan.asks_params):
            call.module_slots = {
                name: saver.slot(call.n_leaves + index)
                for index, param in enumerate(call.params)
                for name in param.names
            }
        if module is not None and plan.asks_module:
            call.keep_module(module, self.buffer_versions)
        elif plan.asks_module:
            call.receiver = self.receiver

    def _ask_argument(self, saver: _Saver, name: str, index: int) -> None:
        call = self.call
        spec = call.specs[index]
        if spec is LEAF or (type(spec) is Node and spec.bare):
            places = range(call.ends[index - 1] if index else 0, call.ends[index])
            call.asked.append(Asked(name, spec, [saver.slot(place) for place in places]))
        else:  # tensors without a gradient may be in it, and values
            self._ask(saver, name, self.values[index])

    def _ask(self, saver: _Saver, name: str, value: Any, handed_over: bool = False) -> None:
        tensors: list[Tensor] = []
        spec = flatten(value, is_tensor, tensors)
        if handed_over and self.mode != TRACED:
            tensors = [_trackable(tensor) for tensor in tensors]
        places = [saver.place(tensor, handed_over) for tensor in tensors]
        self.call.asked.append(Asked(name, spec, [saver.slot(place) for place in places]))

    def _prepare_replay(self, saver: _Saver, outs: Sequence[Tensor]) -> None:
        """Keep what is needed to run the forward again on tensors that the backward is given."""
        call, plan, module, receiver, values = self.call, self.plan, self.module, self.receiver, self.values
        buffers = self.buffers_before
        names = [param.names for param in call.params]
        others: list[Tensor] = []
        specs = []
        for value in values:
            tensors: list[Tensor] = []
            specs.append((flatten(value, is_tensor, tensors), [is_differentiable(tensor) for tensor in tensors]))
            others += [tensor for tensor in tensors if not is_differentiable(tensor)]
        buffer_names = list(buffers)
        others += list(buffers.values())
        frozen = list(call.frozen)
        others += [call.frozen[name] for name in frozen]
        n_leaves, n_params = call.n_leaves, len(call.params)
        call.replay_slots = [saver.slot(index) for index in range(n_leaves + n_params)]
        call.replay_slots += [saver.slot(saver.extra(tensor)) for tensor in others]
        alias_of = list(call.alias_of)
        attributes = changed_since(self.attributes_before, module) if module is not None else {}

        def forward(tensors: Sequence[Tensor]) -> list[Tensor]:
            rest = iter(tensors[n_leaves + n_params :])
            # Constants may be written into where no code shows it: running statistics are.
            leaves = iter(
                [
                    tensor.clone() if plan.forward_may_write or index in call.graph.constants else tensor
                    for index, tensor in enumerate(tensors[:n_leaves])
                ]
            )
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
                inner = stand_in(module, swapped, attributes=attributes)
            open_frame()
            try:
                result = plan.invoke(call.layout, inner, arguments)
            finally:
                close_frame()
            outs: list[Tensor] = []
            flatten(result, is_differentiable, outs)
            return outs if len(outs) == len(alias_of) else []

        call.graph.ran(forward, outs)


class _Saver:
    """Where the tensors that are saved come from: an input of the Function (its place) or an output (`~place`)."""

    def __init__(self, mode: str, inputs: list[Tensor], outs: list[Tensor], aliases: list[Tensor]) -> None:
        self.mode = mode
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
        if is_differentiable(tensor) and self.mode != TRACED:
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


def _place_in(tensors: Sequence[Tensor], count: int, wanted: Tensor) -> int | None:
    """The last place among the first `count` where `wanted` itself stands."""
    for index in range(count - 1, -1, -1):
        if tensors[index] is wanted:
            return index
    return None


def _trackable(tensor: Tensor) -> Tensor:
    """`tensor`, or a copy if it was made in inference mode: to such a one torch gives no node, without a word."""
    return tensor.clone() if tensor.is_inference() else tensor


def _may_want_gradient(tensor: Tensor) -> bool:
    """Whether a transform may want a gradient for it, forward mode too, where `requires_grad` does not tell."""
    return _requires_grad_anywhere(tensor) or (in_forward_ad() and is_tracked(tensor))


def _requires_grad_anywhere(tensor: Tensor) -> bool:
    """Whether the tensor, or one that a transform has wrapped in it, requires grad."""
    while not tensor.requires_grad:
        inner = debug_unwrap(tensor, recurse=False)
        if inner is tensor:
            return False
        tensor = inner
    return True
