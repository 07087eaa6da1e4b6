"""What a rule asks for, on its way to the backward: where each value is found, and its tensors are saved from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from gradoverride._core.autograd.ambient import EAGER, TRACED, TRANSFORMED
from gradoverride._core.autograd.function import trackable
from gradoverride._core.calls.call import Asked, Call
from gradoverride._core.calls.held import HandedOver
from gradoverride._core.calls.params import settle_params
from gradoverride._core.graph.kept_graph import outer_of
from gradoverride._core.private.dynamo import fail
from gradoverride._core.python import purity
from gradoverride._core.values.structure import LEAF, Node, taken_apart
from gradoverride._core.values.tensors import is_differentiable, is_tensor
from gradoverride.errors import RuleSignatureError

__all__ = ["Saver"]


class Saver:
    """Where the tensors that are saved come from: an input of the Function (its place) or an output (`~place`)."""

    def __init__(self, call: Call, inputs: list[Tensor], outs: list[Tensor], aliases: list[Tensor]) -> None:
        self.call = call
        self.plan = call.plan
        self.inputs = inputs
        self.outs = outs
        self.aliases = aliases
        self.positions: list[int] = []
        self.floating: list[Tensor] = []

    def collect(self, module: nn.Module | None, values: Sequence[Any], residuals: dict[str, Any]) -> None:
        """Find each value that the rule asks for, and say where its tensors are to be saved from."""
        call, plan = self.call, self.plan
        if call.unsettled:
            settle_params(call, residuals)
        held = HandedOver()
        own = {name: index for index, param in enumerate(call.params) for name in param.names}
        sources = {**plan.jvp_sources, **plan.sources} if call.mode == TRANSFORMED or call.opaque else plan.sources
        for name, source in sources.items():
            if source == "argument":
                self._ask_argument(name, values)
            elif name in residuals:
                self._ask(name, residuals[name], handed_over=True)
                if call.mode != TRACED:
                    held.look_at(name, call.asked[-1].spec)
            elif module is not None and name in own:
                self._ask(name, self.inputs[call.n_leaves + own[name]])
            elif module is not None and name in call.frozen:
                self._ask(name, call.frozen[name])
            elif module is not None and name in module._buffers and module._buffers[name] is not None:
                buffer: Any = module._buffers[name]
                kind: Any = type(module)
                written = call.mode != TRACED and purity.class_normalizes(kind)  # and torch does not count it
                self._ask(name, buffer.detach().clone() if written else buffer)
            elif source == "reserved":
                if name == "input":
                    self._ask(name, values[call.holders[0]] if call.holders else None)
                elif name == "output":
                    slots = [self.slot(~k) for k in range(len(self.outs))]
                    call.asked.append(Asked(name, call.result, slots))
            elif plan.rule.asks.get(name) or (plan.jvp is not None and plan.jvp.asks.get(name)):
                more = [*residuals, *own, *call.frozen, *(module._buffers.keys() if module is not None else ())]
                fail(RuleSignatureError, plan.unknown_name(name, *[key for key in more if "." not in key]))
        if held.found:
            call.held, count = held, call.n_leaves + len(call.params)
            if call.mode == EAGER:
                held.outer = outer_of(self.inputs[:count])
            else:
                held.slots = [self.slot(place) for place in range(count)]
        call.given = {asked.name for asked in call.asked}
        call.module_slots = {}
        if module is not None and (plan.asks_module or plan.asks_params):
            call.module_slots = {
                name: self.slot(call.n_leaves + index)
                for index, param in enumerate(call.params)
                for name in param.names
            }
        if call.computed:
            # The graph of one that is computed from aliases is not the outer one's.
            call.computed = {
                name: self.slot(self.extra(value.detach() if call.aliased else value))
                for name, value in call.computed.items()
            }

    def _ask_argument(self, name: str, values: Sequence[Any]) -> None:
        call = self.call
        if name not in call.groups:  # **kwargs under its own name
            known, layout = set(self.plan.forward.names), call.layout
            named = zip(layout.keywords, values[layout.positional :], strict=True)
            self._ask(name, {key: value for key, value in named if key not in known})
            return
        indices = call.groups[name]
        if name == call.variadic:
            self._ask(name, tuple([values[index] for index in indices]))
            return
        (index,) = indices
        spec = call.specs[index]
        if spec is LEAF or (type(spec) is Node and spec.bare):
            call.asked.append(Asked(name, spec, [self.slot(place) for place in call.places_of(index)]))
        else:  # tensors without a gradient may be in it, and values
            self._ask(name, values[index])

    def _ask(self, name: str, value: Any, handed_over: bool = False) -> None:
        self.call.asked.append(self.asked(name, value, handed_over))

    def asked(self, name: str, value: Any, handed_over: bool, known: Sequence[Tensor] = ()) -> Asked:
        """Where the tensors of `value` are to be saved from. Those that are `known` are held as they are."""
        if known:  # never while tracing: Dynamo would guard each id
            ids = set(map(id, known))
            spec, tensors = taken_apart(value, lambda part: is_tensor(part) and id(part) not in ids)
        else:
            spec, tensors = taken_apart(value, is_tensor)
        if handed_over and self.call.mode != TRACED:
            tensors = [trackable(tensor) for tensor in tensors]
        places = [self.place(tensor, handed_over) for tensor in tensors]
        return Asked(name, spec, [self.slot(place) for place in places])

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
        found = [index for index, alias in enumerate(self.aliases) if alias is tensor]
        if found and found[0] not in self.call.dirty:  # it is the argument, though it may be the result too
            return found[0]
        for index, out in enumerate(self.outs):
            if out is tensor:
                return ~index
        if found:
            return found[0]
        # As an output of its own it is known to second derivatives, which compiled code has not.
        if is_differentiable(tensor) and self.call.mode != TRACED:
            self.floating.append(tensor)
            return ~(len(self.outs) + len(self.floating) - 1)
        return self.extra(tensor)

    def extra(self, tensor: Tensor) -> int:
        self.inputs.append(tensor)
        return len(self.inputs) - 1

    def extras(self, tensors: Sequence[Tensor]) -> list[int]:
        return [self.slot(self.extra(tensor)) for tensor in tensors]
