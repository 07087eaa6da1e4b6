"""The short path under Dynamo: the same calls as `fast.py`, with as few names for Dynamo to guard as by hand.

Each name and attribute that traced code looks up is a guard that every compiled call checks again: the general path
has some hundred, which are 10 us. So this code is generated too, with all that is known written into it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from gradoverride._core.autograd.ambient import TRACED, autocast_while_tracing
from gradoverride._core.binding.layout import Layout
from gradoverride._core.calls.fast import FittingClasses, is_number, of_module, reach_of
from gradoverride._core.calls.plan import Plan
from gradoverride._core.calls.short_function import ShortFunction
from gradoverride._core.graph.traced_graph import TracedGraph, cut
from gradoverride._core.private.dynamo import forward_mode_around, keep_own_frames_whole, transformed_while_tracing
from gradoverride._core.private.marks import evaluated_while_tracing
from gradoverride._core.python.reach import SCALARS

__all__ = ["TracedPath"]


class TracedPath:
    """The code for calls of a plan whose tensors stand at `places`. Its own names begin with `_go_`.

    Where the rule asks for parameters, the forward runs without a graph, on the module as it is. Else it runs on
    aliases, and its result leads to the parameters that it has read, whose gradients are left to autograd.
    """

    def __init__(self, plan: Plan, layout: Layout, places: list[int]) -> None:
        self.plan = plan
        self.layout = layout
        self.places = places
        self.function = ShortFunction(plan, layout, places, TRACED)
        self.params = {of_module(name): name for name in self.function.params}
        # What the module has under these names; parameters that the rule may answer for without asking are aliased.
        attributes = plan.reach.attributes if plan.reach is not None and plan.takes_receiver else frozenset[str]()
        self.numbers = attributes - {*self.params.values()} - ({"inplace"} if plan.inplace_tells else set())
        self.natural = frozenset[str]() if self.params else self.numbers - plan.may_answer

    @property
    def exists(self) -> bool:
        """Whether there are calls for it at all."""
        plan = self.plan
        writes = plan.forward_may_write and not plan.inplace_tells
        needs_stand_in = plan.class_form and plan.own_backward is None
        unknown_graph = plan.asks_vjp and (plan.reach is None or bool(self.params))
        return not (writes or needs_stand_in or unknown_graph or plan.attribute_names)

    def define(self, names: dict[str, Any]) -> None:
        """Put what the code refers to among the names of the wrapper, which has `_go_general` already."""
        plan, reach, fitting = self.plan, reach_of(self.plan), FittingClasses(self.plan)

        # One name for all that is known while tracing: of no instance, or it would be guarded by identity.
        @evaluated_while_tracing
        def fits(receiver: type) -> bool:
            keep_own_frames_whole()
            plan.note_trace()
            if not plan.rule_code.is_arithmetic and autocast_while_tracing():
                return False
            if plan.forward_asks_grad is None and plan.reach is None and plan.asks_grad_while_tracing():
                return False
            if plan.attribute_names_of(receiver if plan.takes_receiver else None):  # its module may define one below
                return False
            if self.natural and plan.through_aliases:
                return False
            known = reach is None or (reach.holds() and (not plan.takes_receiver or fitting[receiver]))
            usual = not (transformed_while_tracing() or forward_mode_around() or torch.compiler.is_exporting())
            return known and usual

        names.update(self.function.globals())
        names.update(
            _go_traced_finish=self.function.finish,
            _go_traced_fits=fits,
            _go_cut=cut,
            _go_TracedGraph=TracedGraph,
            _go_is_number=is_number,
            _go_no_grad=torch.no_grad,
            _go_own_rule=plan.rule.fn,
            _go_Parameter=nn.Parameter,
            _go_Scalar=tuple(SCALARS),
        )
        names["_go_Function"] = self.function.make(names)
        if self.natural:
            flowing = ShortFunction(plan, self.layout, self.places, TRACED, self.natural)
            names["_go_Flowing"] = flowing.make({**names, **flowing.globals()})

    def body(self, arguments: Sequence[str], receiver: str, general: str) -> list[str]:
        """The code of a call, with these names for the arguments; `general` is that of one on the general path."""
        tensors = [arguments[place] for place in self.places]
        given = tensors if self.params else [f"_go_{name}_alias" for name in tensors]
        handed_over = [f"_go_r_{name}" for name in self.function.residuals]
        graph = f"_go_TracedGraph([{', '.join(given)}], {[True] * len(given)})" if self.plan.asks_vjp else "None"
        found = f"({', '.join(arguments)},), [{', '.join(given)}], _go_result, {graph}, None"
        found += ", _go_frame" if handed_over else ""
        aliases = given if self.plan.asks_vjp else []
        inputs = [*self._constants(arguments, receiver), *handed_over, *aliases, *tensors, *self.params]
        return [
            *self._elsewhere(arguments, tensors, receiver, general),
            *self._run(arguments, tensors, given, receiver),
            f"if {' or '.join(self._unusual(given, handed_over))}:",
            f"    return _go_traced_finish({receiver}, {found}, on_leaves={bool(self.params)})",
            *self._flowing(inputs),
            f"return _go_Function.apply(_go_result, {', '.join(inputs)})",
        ]

    def _elsewhere(self, arguments: Sequence[str], tensors: list[str], receiver: str, general: str) -> list[str]:
        """The code of calls that are not for this path, or have no gradient."""
        # Dynamo breaks its graph where a Function gets one tensor twice (pytorch issue 183604).
        inputs = [*tensors, *self.params]
        twice = [f"{one} is {other}" for index, one in enumerate(inputs) for other in inputs[:index]]
        lines = [f"if {' or '.join(self._unfit(arguments, tensors, receiver))}:", f"    {general}"]
        lines += [f"if {' or '.join(twice)}:", f"    {general}"] if twice else []
        if self.params:
            return lines
        wanted = " or ".join([*(f"{name}.requires_grad" for name in tensors), *self._leads()])
        without = general if self.plan.hands_over else f"return {self.function.called(arguments, receiver)}"
        return [*lines, f"if not ({wanted}):", f"    {without}"]

    def _run(self, arguments: Sequence[str], tensors: list[str], given: list[str], receiver: str) -> list[str]:
        """The forward, and what it hands over."""
        if self.params:
            return ["with _go_no_grad():", f"    _go_result = {self.function.called(arguments, receiver)}"]
        lines = [f"{alias} = {name}.detach()" for alias, name in zip(given, tensors, strict=True)]
        if self.plan.asks_vjp:
            lines = [f"{', '.join(given)}, = _go_cut({', '.join(tensors)})"]
        aliases = dict(zip(tensors, given, strict=True))
        run = f"_go_result = {self.function.called([aliases.get(name, name) for name in arguments], receiver)}"
        names = self.function.residuals
        if not names:
            return [*lines, run]
        framed = ["_go_frame = _go_open_frame()", "try:", f"    {run}", "finally:", "    _go_close_frame()"]
        return [*lines, *framed, *(f"_go_r_{name} = _go_frame.get({name!r})" for name in names)]

    def _unusual(self, given: list[str], handed_over: list[str]) -> list[str]:
        """What makes a result, or what was handed over, one for the general path."""
        unusual = ["not _go_is_tensor(_go_result)", "not _go_result.is_floating_point()"]
        unusual += [] if self.plan.reach is not None else ["_go_result.requires_grad"]
        unusual += [f"_go_result is {name}" for name in given]
        for index, value in enumerate(handed_over):
            unusual += [f"not _go_is_tensor({value})", f"{value}.requires_grad"]
            unusual += [f"{value} is {other}" for other in ("_go_result", *given, *handed_over[:index])]
        return unusual

    def _constants(self, arguments: Sequence[str], receiver: str) -> list[str]:
        """Code for what the rule asks for and is no tensor."""
        known = dict(zip(self.function.names, arguments, strict=True))
        known.update({f"n_{name}": f"{receiver}.{name}" for name in self.function.numbers})
        return [known[name] for name in dict.fromkeys(self.function.constants)]

    def _unfit(self, arguments: Sequence[str], tensors: list[str], receiver: str) -> list[str]:
        """What makes a call one for the general path."""
        plan = self.plan
        # torch's own code, traced with every Function, has these builtins guarded already.
        isinstance_, getattr_ = [f"_go_{name}" if name in arguments else name for name in ("isinstance", "getattr")]
        unfit = [f"not _go_traced_fits({receiver}.__class__)"]
        # An array passes `torch.is_tensor` while it is traced.
        unfit += [f"not {isinstance_}({name}, _go_Tensor)" for name in tensors]
        unfit += [f"not {name}.is_floating_point()" for name in tensors]
        unfit += [f"not {isinstance_}({name}, _go_Scalar)" for name in arguments if name not in tensors]
        if plan.asks_vjp:
            unfit += [f"not {name}.requires_grad" for name in tensors]
        elif plan.straight_through and len(tensors) > 1:  # for the first alone
            unfit.append(f"not {tensors[0]}.requires_grad")
        for variable, name in self.params.items():
            value = f"{variable} := {getattr_}({receiver}, {name!r}, None)"  # it may be an option of the rule's own
            unfit.append(f"not {isinstance_}({value}, _go_Parameter)")  # not a computed one
            unfit.append(f"not {variable}.requires_grad")
        for name in sorted(self.numbers):
            fits = f"_go_is_number({receiver}, {name!r})"
            if name in self.natural:
                value = f"{of_module(name)} := {getattr_}({receiver}, {name!r}, None)"
                fits = f"({isinstance_}({value}, _go_Parameter) or {fits})"
            unfit.append(f"not {fits}")
        if plan.takes_receiver and plan.reach is not None:
            unfit += [f"{name!r} in {receiver}.__dict__" for name in sorted(plan.reach.methods)]
        if plan.class_form:  # a subclass may have another
            unfit.append(f"{receiver}.__class__.backward is not _go_own_rule")
            # Dynamo guards what an instance lacks where that is looked up, and not where its dict is.
            unfit.append(f"{receiver}.backward is None or 'backward' in {receiver}.__dict__")
            numbers = [f"{getattr_}({receiver}, {name!r}, _go_Tensor)" for name in self.function.numbers]
            unfit += [f"not {isinstance_}({number}, _go_Scalar)" for number in numbers]
            unfit.append(f"{receiver}._modules or _go_len({receiver}._parameters) != {len(self.params)}")
        if plan.inplace_tells:
            unfit.append(f"{receiver}.inplace is not False")
        return unfit

    def _leads(self) -> list[str]:
        """What is true where the result leads to a parameter that is left to autograd."""
        values = [of_module(name) for name in sorted(self.natural)]
        return [f"(_go_isinstance({value}, _go_Parameter) and {value}.requires_grad)" for value in values]

    def _flowing(self, inputs: Sequence[str]) -> list[str]:
        """The code of a call whose result does so."""
        if not self.natural:
            return []
        return [f"if {' or '.join(self._leads())}:", f"    return _go_Flowing.apply(_go_result, {', '.join(inputs)})"]
