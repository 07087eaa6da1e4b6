"""One forward on the general path: on cut aliases, its result tied to the rule.

The flow, top down: `differentiate` decides whether a gradient is wanted at all, `ForwardPass.run` runs the forward on
aliases of its tensors, `finish` looks at what it gave (`results.py`), `_tie` hands the tensors to the Function. (`tie`
is for what was computed elsewhere.) The inputs of the Function are

    the differentiable tensors among the arguments, the module's trainable parameters (aliased ones first),
    what else the rule asks for, the results of the forward, floating residuals
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import nullcontext
from types import FunctionType, MethodType
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from gradoverride._core.autograd.aliases import (
    alias_of,
    carry_data,
    copy_attributes,
    counted_with,
    places_of,
    share_attributes,
)
from gradoverride._core.autograd.ambient import EAGER, TRACED, TRANSFORMED, note_rule, noted_rules
from gradoverride._core.autograd.function import fresh, trackable
from gradoverride._core.binding.contract import Meta
from gradoverride._core.binding.layout import Layout
from gradoverride._core.binding.signature import unknown_name
from gradoverride._core.calls.beside import cut_off
from gradoverride._core.calls.call import Call
from gradoverride._core.calls.held import note_held, refuse_held
from gradoverride._core.calls.opaque_call import NoGraph, call_opaque, looked_through, refuse_unless_opaque
from gradoverride._core.calls.params import find_params
from gradoverride._core.calls.plan import Plan
from gradoverride._core.calls.results import check_straight_through, refuse_captured, without_gradient
from gradoverride._core.calls.saver import Saver
from gradoverride._core.calls.state import note_state, state_of
from gradoverride._core.calls.tracers import FX, drops_rule, record_call, tracer_now
from gradoverride._core.calls.writes import Writes
from gradoverride._core.graph.inner_graph import inner_graph
from gradoverride._core.graph.kept_graph import KeptGraph, outer_of, shares_versions
from gradoverride._core.graph.replay import replayable
from gradoverride._core.graph.traced_graph import distinct
from gradoverride._core.modules.module_then import Left, LeftBefore, keep_module
from gradoverride._core.modules.standin import Copied, is_parametrized, stand_in, with_parameters, write_back
from gradoverride._core.private.dynamo import (
    changed_while_tracing,
    fail,
    forward_mode_around,
    in_transform,
    keep_own_frames_whole,
    transformed_while_tracing,
)
from gradoverride._core.private.modes import in_modes
from gradoverride._core.private.tensors import counted_once, version_of
from gradoverride._core.private.transforms import forward_mode_depth
from gradoverride._core.python.reach import SCALARS
from gradoverride._core.values.structure import LEAF, flatten, skeleton, unchanged, unflatten
from gradoverride._core.values.tensors import is_differentiable, may_want_gradient
from gradoverride.errors import ForwardResultError, RuleSignatureError, UnsupportedError

__all__ = ["ForwardPass", "differentiate", "tie"]


def differentiate(plan: Plan, layout: Layout, receiver: Any, values: Sequence[Any], rule: Any = None) -> Any:
    """Call the forward of `plan` with its rule in force, or with `rule`, if a gradient is wanted at all."""
    if plan.class_form:
        plan = plan.of_instance(receiver)
    elif plan.own_methods and isinstance(receiver, nn.Module):
        plan = plan.as_read(receiver)
    if plan.make_as_function is not None and isinstance(receiver, Tensor):
        return plan.called_as_function(layout, receiver, values)
    tracer = tracer_now((receiver, *values))
    if tracer == FX:
        return record_call(plan, layout, receiver, values)
    mode = _mode(plan, tracer)
    if mode is None:
        return plan.undecorated(layout, receiver, values)
    if mode == TRANSFORMED and plan.marked:
        note_rule(plan.rule)
    opaque = _is_opaque(plan, receiver, mode)
    changed = changed_while_tracing() if opaque else None
    call = Call(plan, layout, mode, rule, opaque)
    leaves = call.take_apart(values)
    if isinstance(receiver, nn.Module) and "_is_replica" in receiver.__dict__:
        receiver = with_parameters(receiver)
    module = receiver if isinstance(receiver, nn.Module) else None
    if module is not None:
        find_params(call, module)
    else:
        if plan.takes_receiver and plan.asks_params:
            raise unknown_name(plan.rule, plan.forward, "params", ())
        if plan.takes_receiver and plan.sources.get("module") == "reserved" and plan.rule.asks["module"]:
            _refuse_no_module(plan, receiver)
    wanted = opaque or mode == TRANSFORMED or any(call.wanted) or bool(call.params)
    if not wanted or not (leaves or call.params):
        result = plan.undecorated(layout, receiver, values)
        refuse_held(call, receiver, values, result)
        return result
    result = ForwardPass(call, module, receiver, leaves, values).run()
    return call_opaque(plan, layout, receiver, values, result, changed, differentiate) if opaque else result


def _refuse_no_module(plan: Plan, receiver: Any) -> NoReturn:
    cls = receiver if isinstance(receiver, type) else type(receiver)
    fail(
        RuleSignatureError,
        f"rule {plan.rule.who} asks for 'module', and {plan.forward.who} must be a method of an nn.Module for that; it "
        f"is one of the class '{cls.__name__}', which is none. Hand over what the rule needs of the object: "
        "return save_for_backward(result, name=value), and ask for 'name'",
    )


def tie(plan: Plan, layout: Layout, values: Sequence[Any], result: Any, rule: Any) -> Any:
    """A result that was computed elsewhere, with the rule, or `rule`, for its gradient to reach `values`."""
    mode = _mode(plan, tracer_now(values))
    if mode is None:
        return result
    opaque = _is_opaque(plan, None, mode)
    changed = changed_while_tracing() if opaque else None
    call = Call(plan, layout, mode, rule, opaque)
    leaves = call.take_apart(values)
    found = ForwardPass(call, None, None, leaves, values, on_leaves=True).finish(leaves, result, {})
    return call_opaque(plan, layout, None, (*values, result), found, changed, _tie_last) if opaque else found


def _tie_last(plan: Plan, layout: Layout, receiver: Any, values: Sequence[Any]) -> Any:
    """As a step of the graph, which is given the result with the values."""
    return tie(plan, layout, values[:-1], values[-1], None)


def _is_opaque(plan: Plan, receiver: Any, mode: str) -> bool:
    """Whether Dynamo is to look through a call only, which is one step of the graph. Raises if it cannot be."""
    if mode != TRACED or not transformed_while_tracing():
        return False
    refuse_unless_opaque(plan, receiver)
    return True


def _mode(plan: Plan, tracer: str | None) -> str | None:
    """How a call is to be run; None where no gradient is wanted, or `tracer` records the forward alone."""
    transformed = in_transform()
    if not transformed and not torch.is_grad_enabled():
        return None
    if torch.compiler.is_dynamo_compiling():
        keep_own_frames_whole()
        plan.note_trace()
        if forward_mode_around():
            fail(
                UnsupportedError,
                f"{plan.forward.who} is compiled, and called in forward mode that was entered around the compiled "
                "code, which torch does not differentiate there. Enter it in the code that is compiled, or leave that "
                "uncompiled",
            )
        mode = TRACED
    elif not transformed:
        mode = EAGER
    elif forward_mode_depth() > 1:
        fail(
            UnsupportedError,
            f"{plan.forward.who} is called in forward mode within forward mode (jvp of jvp, jacfwd of jacfwd), "
            "where torch loses the tangents of every autograd.Function. Use reverse mode for one of the two",
        )
    else:
        mode = TRANSFORMED
    return None if tracer is not None and drops_rule(plan, tracer) else mode


class ForwardPass:
    """The forward of `call`.

    Of one that has run already, the versions `before` it (see `Writes`); and whether it ran `on_leaves`, on its
    arguments as they are, for it can reach no other tensor (`reach.py`).
    """

    def __init__(
        self,
        call: Call,
        module: nn.Module | None,
        receiver: Any,
        leaves: list[Tensor],
        values: Sequence[Any],
        before: Sequence[int | None] | None = None,
        on_leaves: bool = False,
    ) -> None:
        self.call = call
        self.plan = call.plan
        self.mode = call.mode
        self.module = module
        self.receiver = receiver
        self.leaves = leaves
        self.values = values
        self.on_leaves = on_leaves
        self.writes = Writes(call, leaves, before)
        self.buffer_versions: dict[str, int | None] = {}
        self.left: dict[str, Left] = {}  # in attributes of the module that the rule reads
        self.may_give_data = call.plan.may_give_data or call.plan.reach is None
        self.graph_is_shown = False  # whether there is one for the forward to see alone: nothing asks it for gradients
        # Whether the aliases count writes together with the leaves: of a forward that has run, those of a kept graph.
        self.shares_versions = call.graph is not None
        self.is_given_calls = any([_is_to_be_called(value, call.mode == TRACED) for value in values])
        self.places: list[int] | None = None  # of the aliases, before an eager forward that may give them other data
        self.as_given: dict[int, Tensor] = {}  # copies of leaves that the forward may write into uncounted

    def run(self) -> Any:
        """The forward on aliases, and its result tied to the rule."""
        call, plan, mode = self.call, self.plan, self.mode
        self.shares_versions = mode == EAGER and shares_versions(plan.forward_may_write)
        sources = [*self.leaves, *[param.tensor for param in call.aliased]]
        aliases = self._aliases(sources)
        if plan.asks_module and self.module is not None and mode != TRACED:
            self.buffer_versions = {name: version_of(value) for name, value in self.module.named_buffers()}
        named = plan.attribute_names_of(type(self.receiver)) if mode == TRACED else ()
        if mode != TRACED and (plan.uses_attributes or self.is_given_calls):
            share_attributes(aliases, sources)
        elif named:
            copy_attributes(sources, aliases, named)
        if mode == EAGER and self.may_give_data:
            self.places = places_of(aliases)
        if plan.keeps_given and mode != TRACED:
            for index, leaf in enumerate(self.leaves):
                if not (may_want_gradient(leaf) if mode == TRANSFORMED else leaf.requires_grad):
                    self.as_given[index] = leaf.clone()
        self.writes.watch(aliases, self.values)
        module = self.module if mode == EAGER and call.graph is None else None
        kept = () if module is None else plan.names_kept(type(module))
        state = state_of(module, kept) if module is not None and kept else []
        if mode == TRANSFORMED:
            with noted_rules() as call.rules, replayable(plan) if call.graph is not None else nullcontext():
                result, residuals = self._forward(aliases)
        elif mode == EAGER and isinstance(call.graph, KeptGraph) and not call.asks_once:
            with call.graph.unpacked_once():
                result, residuals = self._forward(aliases)
        else:
            result, residuals = self._forward(aliases)
        if module is not None and kept:
            note_state(plan, module, kept, state)
        if named:
            copy_attributes(aliases, sources, named)
        if mode == TRACED:
            self.writes.carry_statistics(aliases)
            if plan.asks_vjp and self.module is not None and not call.opaque:
                cut_off(self.module, plan.forward.who)
        return self.finish(aliases, result, residuals)

    def finish(self, aliases: list[Tensor], result: Any, residuals: dict[str, Any]) -> Any:
        """The forward has run on `aliases` and gave `result`: look at it, and tie it to the rule."""
        call, leaves = self.call, self.leaves
        if self.may_give_data and self.mode == EAGER and not self.on_leaves:
            sources = [*leaves, *[param.tensor for param in call.aliased]]
            self.writes.carried = carry_data(
                aliases, sources, places_of(sources) if self.places is None else self.places
            )
        outs: list[Tensor] = []
        call.result = flatten(result, is_differentiable, outs)
        if not outs:
            return without_gradient(self, result)
        if self.mode == EAGER:
            outs = [trackable(out) for out in outs]
            if not (self.plan.asks_vjp or self.on_leaves):  # under vjp it is an error where a gradient comes back
                note_held(call, self.values)
        if self.plan.straight_through:
            check_straight_through(self, result, outs)
        if self.plan.on_first_call is not None and self.mode == EAGER:
            if not in_modes():  # a selective checkpoint counts what is computed, and replays no first call
                self.plan.on_first_call(leaves[0], outs[0])
            self.plan.on_first_call = None
        if not self.on_leaves and not call.opaque:
            refuse_captured(self, outs, aliases)
        if self.mode == EAGER and not (self.shares_versions or self.on_leaves):
            outs = [counted_with(out, aliases[: len(leaves)], leaves) for out in outs]
        self.writes.find(outs, aliases)
        if self.graph_is_shown:
            call.graph = None
        return self._tie(aliases, outs, residuals)

    def _aliases(self, sources: list[Tensor]) -> list[Tensor]:
        """What the forward is to meet, which starts a graph of its own where one is needed."""
        call, plan = self.call, self.plan
        needs_graph = plan.asks_vjp or not all([param.asked for param in call.aliased])
        transformed = call.mode == TRANSFORMED or call.opaque
        self.graph_is_shown = not (needs_graph or transformed) and self._asks_grad()
        if call.opaque and needs_graph:
            call.graph = NoGraph(sources)
            aliases = [self._alias(tensor) for tensor in sources]
        elif needs_graph or self.graph_is_shown:
            call.graph = inner_graph(call, self.module, self.receiver, sources, self.values)
            aliases = call.graph.start()
        else:
            aliases = [self._alias(tensor) for tensor in sources]
        if plan.forward_may_write and not transformed:
            for index in call.holders:
                if call.specs[index] is not LEAF and not call.wants(index):  # the caller may have it written into
                    for place in call.places_of(index):
                        aliases[place] = sources[place]
        return aliases

    def _asks_grad(self) -> bool:
        """Whether the forward asks if a tensor requires grad; also what it is given to call may do so."""
        if self.is_given_calls:
            return True
        if self.mode != TRACED:
            return self.plan.asks_grad(self.module)
        parts = () if self.module is None else self.module.modules()
        return self.plan.asks_grad_while_tracing(*[type(part) for part in parts])

    def _alias(self, tensor: Tensor) -> Tensor:
        if self.mode == EAGER and not tensor.requires_grad:
            # What is written there may have a history, of parameters that the rule leaves to autograd: what it answers
            # for this argument is no gradient of theirs.
            return tensor.detach() if self.plan.forward_may_write and self.call.natural else tensor
        if self.mode == EAGER:
            return tensor.detach() if self.shares_versions else tensor.data
        if self.mode == TRACED and not tensor.requires_grad and not self.call.opaque:
            return tensor
        return alias_of(tensor, self.plan.forward_may_write)

    def _forward(self, aliases: list[Tensor]) -> tuple[Any, dict[str, Any]]:
        call, plan, module, receiver = self.call, self.plan, self.module, self.receiver
        given = iter(aliases)
        arguments = [
            unflatten(spec, given) if index in call.holders else value
            for index, (spec, value) in enumerate(zip(call.specs, self.values, strict=True))
        ]
        containers = [index for index in call.holders if call.specs[index] is not LEAF]
        own = [index for index in containers if self._meets_own(index, aliases)]
        for index in own:
            arguments[index] = self.values[index]  # the caller's, who may have it written into
        inner = receiver
        copied: list[Copied] = []
        seen = call.computed if plan.asks_module and self.mode != TRANSFORMED and is_parametrized(module) else None
        if module is not None and (call.aliased or seen is not None):
            tensors = {name: alias for param, alias in zip(call.aliased, given, strict=True) for name in param.names}
            inner = stand_in(module, tensors, copied, seen=seen)
        shown = plan.asks_module and module is not None and self.mode != TRACED
        before = LeftBefore(inner, plan.names_left(type(module))) if shown else None
        residuals: dict[str, Any] = {}
        if self._collects_residuals():
            result, residuals = plan.collecting(call.layout, inner, arguments)
        else:
            result = plan.invoke(call.layout, inner, arguments)
        if plan.forward_may_change:
            for index in containers:
                self._refuse_changed(index, arguments[index], aliases, own=index in own)
        if before is not None:
            self.left = before.left_since(inner)
        write_back(copied)
        return result, residuals

    def _collects_residuals(self) -> bool:
        """Whether what the forward hands over is to be collected."""
        plan, module = self.plan, self.module
        if plan.hands_over or not plan.takes_receiver or self.mode != TRACED:
            return plan.hands_over or plan.takes_receiver
        # Dynamo traces no such collecting inside of a checkpoint, so only where a name can come from nowhere else.
        buffers = module._buffers if module is not None else ()
        known = {name for param in self.call.params for name in param.names}.union(self.call.frozen, buffers)
        return any([source == "deferred" and name not in known for name, source in plan.sources.items()])

    def _meets_own(self, index: int, aliases: Sequence[Tensor]) -> bool:
        """Whether the forward meets the tensors of this argument themselves, for none of them has a gradient."""
        return all([aliases[place] is self.leaves[place] for place in self.call.places_of(index)])

    def _refuse_changed(self, index: int, argument: Any, aliases: Sequence[Tensor], *, own: bool) -> None:
        """A container of tensors with a gradient was given as a copy, with aliases: what was put there would be lost.

        In the caller's `own`, which was given as it is, the rule would not find what the forward met.
        """
        call, name = self.call, self.call.names[index]
        if own and not self.writes.asked_as(name):
            return
        if unchanged(call.specs[index], iter([aliases[place] for place in call.places_of(index)]), argument):
            return
        if own:
            self.writes.refuse_asked(name)
        fail(
            ForwardResultError,
            f"{self.plan.forward.who} must leave the container '{name}' as it is, for it holds tensors that the rule "
            "answers for; it changed what is in it. Return what is new instead, or detach() those tensors, if none of "
            "them is to have a gradient",
        )

    def _tie(self, aliases: list[Tensor], outs: list[Tensor], residuals: dict[str, Any]) -> Any:
        """Hand the tensors to the Function, and put its results into the structure of the forward's."""
        call, mode, leaves = self.call, self.mode, self.leaves
        call.specs = [skeleton(spec) for spec in call.specs]
        inputs: list[Tensor] = [*leaves, *[param.tensor for param in call.params]]
        for index, copy in self.as_given.items():
            if index not in call.alias_of:
                inputs[index] = copy
        saver = Saver(call, inputs, outs, aliases)
        saver.collect(self.module, self.values, residuals)
        if self.plan.asks_module:
            if self.module is not None:
                keep_module(call, self.module, self.buffer_versions)
                call.left = [saver.asked(path, left.value, True, left.known) for path, left in self.left.items()]
            else:
                call.receiver = self.receiver
        floating = saver.floating
        call.n_residuals = len(floating)
        if call.graph is not None:
            call.graph.save(call, saver, outs, self.values)
        elif self.plan.marked and mode == EAGER and saver.positions:
            saver.slot(saver.extra(self.plan.mark))
        call.first_out = len(inputs)
        call.n_outs = len(outs)
        call.out_metas = [Meta(out) for out in outs]
        # With a kept graph it is asked for the gradients of natural parameters, and torch's own never runs into it.
        natural = bool(call.natural) and (call.graph is None or mode != EAGER)
        call.flows = [out.requires_grad for out in outs] if natural else [False] * len(outs)
        flowing = natural or (mode == TRACED and call.graph is not None)
        call.outer = outer_of(leaves) if natural and mode == EAGER else []
        call.residual_metas = [Meta(tensor) for tensor in floating]
        for tensor in outs:
            cut = tensor.requires_grad and not flowing
            inputs.append(tensor if not cut else fresh(tensor) if mode == EAGER else tensor.detach())
        inputs += [tensor.detach() for tensor in floating]
        if mode == TRACED:
            inputs = distinct(inputs)
        call.saved = saver.positions
        if call.dirty and self.shares_versions and counted_once is not None:
            with counted_once([leaves[index] for index in call.dirty]):
                results = self.plan.apply(call, *inputs)
        elif mode == EAGER:
            results = self.plan.apply(call, *inputs)
        elif call.opaque:
            results = looked_through(call, inputs)
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


def _is_to_be_called(value: Any, traced: bool) -> bool:
    """Whether it is a function, or holds one: code that nobody has read."""
    if isinstance(value, Tensor) or type(value) in SCALARS:
        return False
    if isinstance(value, (list, tuple)):
        return any([_is_to_be_called(part, traced) for part in value])
    if isinstance(value, dict):
        return any([_is_to_be_called(part, traced) for part in value.values()])
    return isinstance(value, _CALLED) if traced else callable(value)  # of all else Dynamo does not know it


_CALLED = (FunctionType, MethodType, functools.partial, nn.Module)
