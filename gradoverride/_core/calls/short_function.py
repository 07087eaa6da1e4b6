"""The Function of a short call: plain tensors and scalars in, one new tensor out, a rule of arguments and output.

Most calls are such, and some microseconds of overhead would be most of their cost. So the code is generated, as an
expert would write it by hand for this signature and this rule: no loops, no structures, no object for each call. It
does all that the general path (`forward_pass.py`) does; what is not plain goes there, after the forward too, which
never runs twice. To read it, print what `forward_source` and `backward_source` give. `fast.py` and `traced.py` call it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from gradoverride._core.autograd.ambient import EAGER, NO_AUTOCAST, TRACED
from gradoverride._core.autograd.function import fresh, plain_function, tied
from gradoverride._core.binding.contract import Meta, apart, conform_output, read_answer, read_params
from gradoverride._core.binding.layout import Layout
from gradoverride._core.binding.own_backward import TARGETS, UNASSIGNED
from gradoverride._core.calls.call import Call
from gradoverride._core.calls.forward_pass import ForwardPass
from gradoverride._core.calls.params import find_params
from gradoverride._core.calls.plan import Plan
from gradoverride._core.graph.kept_graph import KeptGraph
from gradoverride._core.graph.traced_graph import TracedGraph, pull_short
from gradoverride._core.graph.vjp import ShortVjp
from gradoverride._core.private.modes import any_autocast
from gradoverride._core.private.tensors import use_count
from gradoverride._core.python.residuals import close_frame, open_frame

__all__ = ["FLOATING", "SOLE", "ShortFunction", "Unusual", "compiled"]

FLOATING = frozenset({torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.complex128})


class Unusual(Exception):
    """The forward has run within the Function, and its result is one for the general path: that, the versions of the
    tensors before, and what was handed over.
    """


class ShortFunction:
    """The code of a Function for calls of `plan` whose tensors stand at `places`. Its own names begin with `_go_`.

    Before the tensors it takes a `box`, a tuple of all else: the result of a forward that has run, or what that needs
    to run here. (Under Dynamo there is the bare result and what else the rule asks for, and with `vjp` the aliases that
    the forward ran on.) The gradient of the result also flows on to the parameters of these names, `flows_to`, which
    are left to autograd: the result that leads to them is given bare, then what leads to the tensors.
    """

    def __init__(
        self, plan: Plan, layout: Layout, places: list[int], mode: str, flows_to: Collection[str] = ()
    ) -> None:
        self.plan = plan
        self.layout = layout
        self.places = places
        self.mode = mode
        self.flows_to = flows_to
        self.names = [f"x{index}" for index in range(len(layout.names))]
        # What the rule asks for and is no argument can only be handed over, by a function, or a parameter.
        others = [name for name, source in plan.sources.items() if source == "deferred"]
        self.residuals, self.params = (others, []) if plan.hands_over else ([], others)
        self.own = own = plan.own_backward
        if own is not None:
            self.params = own.assigned
        # What a `backward` reads of `self`, and is no parameter.
        self.numbers = [name for name in own.read if name not in own.assigned] if own is not None else []
        self.tensors = [self.names[place] for place in places] + [f"p_{name}" for name in self.params]
        self.others = [name for place, name in enumerate(self.names) if place not in places]
        # Whether the forward runs in this Function: what it can reach besides has no gradient to lose.
        self.direct = mode == EAGER and plan.runs_inside and not flows_to
        self.boxed = list(self.others)
        if self.direct:
            self.boxed[:0] = ["receiver"] if plan.takes_receiver else []
        else:
            self.boxed[:0] = ["result", "ctx.graph", "token"] if plan.asks_vjp else ["result"]
        self.aliases = [f"alias_{self.names[place]}" for place in places] if mode == TRACED and plan.asks_vjp else []
        self.saves: list[str] = []  # names of tensors, in the order in which they are saved
        self.asks: list[str] = []  # what the rule is called with, besides the gradient
        self.constants: list[str] = []
        for name, source in plan.sources.items():
            self._ask(name, source)
        if own is not None:
            self.saves += [f"p_{name}" for name in own.read if name in own.assigned]
            numbers = [f"n_{name}" for name in self.numbers]
            self.constants += numbers if mode == TRACED else ["receiver"] if numbers else []
        # What comes before the tensors: the box, or the bare result and more.
        handed_over = [f"r_{name}" for name in self.residuals]
        self.bare = mode == TRACED or bool(flows_to)
        self.more = [*dict.fromkeys(self.constants), *handed_over, *self.aliases] if self.bare else []
        self.more[:0] = ["outer"] if flows_to and mode == EAGER else []
        self.leading = len(self.more) + (1 if self.boxed else 0)
        self.marked = plan.marked and mode == EAGER and bool(self.saves) and not plan.asks_vjp
        # Of these the rule gets aliases, which are no gradients as they stand: see `apart`. (A trace has no memory.)
        aliases = [name for name in self.saves if name == "result" or name.startswith("r_")]
        self.lent = [f"saved_{name}" for name in aliases] if mode == EAGER else []
        self.unsaved = [name for name in self.tensors if name not in self.saves]
        # Those of them that the result, and so grad_output, may be unlike.
        self.noted = [] if plan.forward_gives_alike and len(self.tensors) == 1 else self.unsaved
        first = 1 if own is None else 2  # after the gradient, and `self`
        if isinstance(plan.rule.fn, FunctionType) and not hasattr(plan.rule.fn, "__wrapped__"):
            code = plan.rule.fn.__code__
            if code.co_varnames[first : code.co_argcount][: len(plan.sources)] == tuple(plan.sources):
                self.asks = [asked.partition("=")[2] for asked in self.asks]  # by position, which is faster

    def _ask(self, name: str, source: str) -> None:
        if source == "reserved" and name == "vjp":
            pull = "ctx.graph.pull" if self.mode == EAGER else "_go_pull_short"
            self.asks.append(f"vjp=_go_ShortVjp(_go_path, {pull}, ({', '.join(self._kept)},), grad_output)")
            return
        if source == "reserved" and name == "needs":
            self.asks.append(f"needs={self._needs()}")
            return
        if name in self.residuals:
            value = f"r_{name}"
        elif source == "deferred":
            value = f"p_{name}"
        elif source == "reserved" and name == "output":
            value = "result"
        else:
            place = self.layout.names.index(name) if source == "argument" else self.places[0]
            value = self.names[place]
        if value in self.others:
            self.asks.append(f"{name}=ctx.constants[{len(self.constants)}]")
            self.constants.append(value)
            return
        if value not in self.saves:
            self.saves.append(value)
        self.asks.append(f"{name}=saved_{value}")

    @property
    def _kept(self) -> list[str]:
        """What is saved for `vjp`."""
        if not self.plan.asks_vjp:
            return []
        return ["token"] if self.mode == EAGER else [*self.aliases, "inner"]

    def _needs(self) -> str:
        """Code that gives what `Call.needs` does."""
        wanted = ["False"] * len(self.names)
        for index, place in enumerate(self.places):
            wanted[place] = f"ctx.needs_input_grad[{index - len(self.tensors)}]"  # they come last
        needs = dict.fromkeys(self.params, "True")
        groups = {name: " or ".join([wanted[place] for place in group]) for name, group in self.layout.groups.items()}
        needs.update({**dict(zip(self.layout.names, wanted, strict=True)), **groups})
        return f"{{{', '.join(f'{name!r}: {value}' for name, value in needs.items())}}}"

    def globals(self) -> dict[str, Any]:
        """The names that the code refers to."""
        return {
            "_go_any_autocast": any_autocast,
            "_go_check": self.check,
            "_go_close_frame": close_frame,
            "_go_check_straight_through": self.plan.check_straight_through,
            "_go_compiling": torch.compiler.is_dynamo_compiling,
            "_go_FLOATING": FLOATING,
            "_go_flowing": self.flowing,
            "_go_fresh": fresh,
            "_go_is_grad_enabled": torch.is_grad_enabled,
            "_go_fn": self.plan.fn,
            "_go_getrefcount": sys.getrefcount,
            "_go_is_tensor": torch.is_tensor,
            "_go_mark": self.plan.mark if self.marked else None,
            "_go_note": self.plan.note,
            "_go_open_frame": open_frame,
            "_go_path": self,
            "_go_plan": self.plan,
            "_go_pull_short": pull_short,
            "_go_refuse_residuals": self.plan.refuse_residuals,
            "_go_rule": self.plan.rule.fn if self.own is None else self.own.function,
            "_go_Self": None if self.own is None else self.own.self_class,
            "_go_Targets": None if self.own is None else self.own.targets_class,
            "_go_ShortVjp": ShortVjp,
            "_go_SOLE": SOLE,
            "_go_Tensor": Tensor,
            "_go_type": type,
            "_go_under_autocast": self.under_autocast,
            "_go_Unusual": Unusual,
            "_go_use_count": use_count,
            "_go_written": self.plan.refuse_written,
            "_go_zeros": lambda meta: Meta.of(*meta).zeros(),
        }

    def make(self, names: dict[str, Any]) -> type[Function]:
        """A new Function of this code, which is defined among these names: those of `globals`."""
        compiled(self.forward_source() + self.backward_source(), names, self.plan)
        return plain_function(self.plan.forward.name, names["forward"], names["backward"])

    def forward_source(self) -> str:
        """The code of its forward."""
        traced = self.mode == TRACED
        first = ["result" if self.bare else "box"] if self.boxed else []
        lines = [f"def forward({', '.join(['ctx', *first, *self.more, *self.tensors])}):"]
        if traced:
            lines += ["    inner = result"] if self.plan.asks_vjp else []
            lines += ["    result = result.clone()", "    ctx.metas = None"]
        elif self.bare:
            lines += ["    result = _go_fresh(result)", "    ctx.outer = outer"]
        elif self.boxed:
            lines.append(f"    {', '.join(self.boxed)}, = box")
        if self.direct:
            lines += self._run()
        if self.constants:
            lines.append(f"    ctx.constants = ({', '.join(self.constants)},)")
        saves = [*self.saves, *self._kept]
        if self.marked:
            saves = ["_go_mark", *saves]
        if saves:
            lines.append(f"    ctx.save_for_backward({', '.join(saves)})")
        if self.noted:
            # A gradient is checked against what it belongs to: mostly that is like the result, and so like
            # grad_output, which is at hand in the backward; else it is noted here.
            alike = " and ".join(self._alike("result", name) for name in self.noted)
            metas = ", ".join(f"({name}.shape, {name}.dtype, {name}.device)" for name in self.noted)
            lines += [f"    if not ({alike}):", f"        ctx.metas = ({metas},)"]
            if self.plan.straight_through and not self.saves:
                lines.append(f"        _go_check_straight_through({self.tensors[0]}.shape, result.shape)")
        returned = "(result, *floating)" if self.residuals and not traced else "result"
        return "\n".join([*lines, f"    return {returned}"]) + "\n"

    def _run(self) -> list[str]:
        """The forward, and a look at what it gave."""
        given = [self.names[place] for place in self.places]
        unusual, before = self.unusual(given, "result"), []
        versions = ["None"] * len(given)
        if not self.plan.forward_is_arithmetic:
            versions = [f"version_{name}" for name in given]
            counts = "{0}.requires_grad"
            if self.plan.forward_may_write:  # into what needs no gradient too
                counts = "({0}.requires_grad or not {0}.is_inference())"
            before = [f"    version_{name} = {name}._version if {counts.format(name)} else None" for name in given]
            unusual += [f"version_{name} is not None and {name}._version != version_{name}" for name in given]
        run, frame = [f"    result = {self.called(self.names, 'receiver')}"], "{}"
        if self.residuals:
            frame = "frame"
            run = [
                "    frame = _go_open_frame()",
                "    try:",
                f"    {run[0]}",
                "    finally:",
                "        _go_close_frame()",
            ]
            for name in self.residuals:
                run.append(f"    r_{name} = frame.get({name!r})")
                unusual += [f"_go_type(r_{name}) is not _go_Tensor", f"r_{name}.requires_grad"]
        lines = [
            *before,
            *run,
            f"    if {' or '.join(unusual)}:",
            f"        raise _go_Unusual(result, [{', '.join(versions)}], {frame})",
        ]
        if not self.plan.forward_is_arithmetic or (self.plan.reach is not None and self.plan.reach.attributes):
            # Somebody else may hold the result (a cached buffer), and would find it turned into an output.
            lines += [
                "    if _go_getrefcount(result) != _go_SOLE or _go_use_count(result) != 1:",
                "        result = result.detach()",
            ]
        return lines + self._hand_over()

    def _hand_over(self) -> list[str]:
        """What has a derivative that nobody knows is a result besides: a gradient that comes there is refused."""
        if not self.residuals:
            return []
        lines = ["    floating = []"]
        for name in self.residuals:
            lines += [
                f"    if r_{name}.dtype in _go_FLOATING:",
                f"        floating.append(r_{name} := r_{name}.detach())",
            ]
        return [
            *lines,
            "    if floating:",
            "        ctx.set_materialize_grads(False)",
            "        ctx.result = result.shape, result.dtype, result.device",
        ]

    def called(self, names: Sequence[str], receiver: str) -> str:
        """Code that calls the forward on what these names stand for."""
        positional = names[: self.layout.positional]
        keywords = zip(self.layout.keywords, names[self.layout.positional :], strict=True)
        first = [receiver] if self.plan.takes_receiver else []
        return f"_go_fn({', '.join([*first, *positional, *(f'{keyword}={name}' for keyword, name in keywords)])})"

    def unusual(self, given: Sequence[str], result: str) -> list[str]:
        """What makes a result one for the general path, if these are what the forward was given."""
        unusual = [f"_go_type({result}) is not _go_Tensor", *(f"{result} is {name}" for name in given)]
        if not self.plan.forward_is_arithmetic:
            unusual.append(f"{result}._is_view()")
        if self.plan.needs_floating:
            unusual.append(f"{result}.dtype not in _go_FLOATING")
        if self.plan.straight_through:
            unusual.append("_go_plan.on_first_call is not None")
        return unusual

    def backward_source(self) -> str:
        """The code of its backward: the rule is asked, and its answer is read."""
        head = ["def backward(ctx, grad_output):"]
        if self.residuals and self.mode == EAGER:
            head = [
                "def backward(ctx, grad_output, *of_residuals):",
                "    if of_residuals:",
                "        if any([grad is not None for grad in of_residuals]):",
                "            _go_refuse_residuals()",
                "        if grad_output is None:",
                "            grad_output = _go_zeros(ctx.result)",
            ]
        return "\n".join([*head, *self._ask_rule(), *self._read_answer()]) + "\n"

    def _ask_rule(self) -> list[str]:
        lines = []
        eager = self.mode == EAGER
        if eager and not self.plan.rule_code.is_arithmetic:
            lines += ["    if _go_any_autocast():", "        return _go_under_autocast(backward, ctx, grad_output)"]
        saved = [*(f"saved_{name}" for name in self.saves), *self._kept]
        if saved:
            lines.append(f"    {'_, ' * self.marked}{', '.join(saved)}, = ctx.saved_tensors")
        handed = "grad_output"
        if self.plan.rule_writes:
            lines.append("    handed = grad_output.clone()")
            handed = "handed"
        watched = eager and not (self.plan.rule_code.is_algebra or self.plan.rule_writes)
        if watched:
            lines.append("    version = None if _go_compiling() else grad_output._version")
        first = []
        if self.own is not None:
            first = ["own"]
            lines += ["    own = _go_Self()", f"    own.{TARGETS} = targets = _go_Targets()"]
            lines += [f"    own.{name} = saved_p_{name}" for name in self.own.read if name in self.params]
            for index, name in enumerate(self.numbers, -len(self.numbers)):
                number = f"ctx.constants[-1].{name}" if eager else f"ctx.constants[{index}]"
                lines.append(f"    own.{name} = {number}")
        asked = f"answer = _go_rule({', '.join([*first, handed, *self.asks])})"
        if eager:
            noted = ["    except Exception as error:", "        _go_note(error)", "        raise"]
            lines += ["    try:", f"        {asked}", *noted]
        else:
            lines.append(f"    {asked}")
        if watched:
            lines += ["    if version is not None and grad_output._version != version:", "        _go_written()"]
        return lines

    def _read_answer(self) -> list[str]:
        tensors = self.tensors
        none = "None, " * self.leading
        flowing = "grad_output"  # on to the result that was given
        if self.flows_to:
            if self.mode == EAGER:
                flowing = "(_go_flowing(ctx, grad_output) if _go_is_grad_enabled() else grad_output)"
            none = f"{flowing}, " + "None, " * (self.leading - 1)
        alike = "ctx.metas is None and " if self.noted else ""
        grads = [f"grad_{name}" for name in tensors]
        fits = " and ".join(
            f"({grad} is None or {self._is_tensor(grad)} and {self._fits(grad, name)})"
            for grad, name in zip(grads, tensors, strict=True)
        )
        answered = [f"        if {fits}:", f"            return {none}{', '.join(grads)}"]
        lines = []
        named = tensors  # those that the answer is of
        if self.own is not None:
            named = tensors[: len(self.places)]
            lines += [f"    grad_p_{name} = targets.{name}" for name in self.params]
        if len(tensors) == 1:
            fits = self._fits("answer", tensors[0])
            fits = f"{self._is_tensor('answer')} and {fits}"
            if self.plan.rule_code.gives_alike:
                fits = self._is_tensor("answer")
            elif self.unsaved:
                fits = f"(answer is grad_output or {fits})"
            lines += [f"    if {alike}{fits}:", f"        return {none}answer"]
        elif len(named) == 1:
            lines += [f"    if {alike}{self._is_tensor('answer')}:", f"        {grads[0]} = answer", *answered]
        elif (self.own is not None or not self.params) and self._answers_in_order():
            # Scalars that come after the tensors may be left out of the answer.
            lines += [
                f"    if {alike}{self._is('tuple')} and len(answer) == {len(named)}:",
                f"        {', '.join(grads[: len(named)])} = answer",
                *answered,
            ]
        if len(tensors) > 1 and self.own is None:
            names = [self.layout.names[place] for place in self.places] + self.params
            present = " and ".join(f"{name!r} in answer" for name in names)
            lines += [
                f"    if {alike}{self._is('dict')} and len(answer) == {len(names)} and {present}:",
                *(f"        {grad} = answer[{name!r}]" for grad, name in zip(grads, names, strict=True)),
                *answered,
            ]
        known = ", ".join(self._known(name) for name in tensors)
        targets = "None" if self.own is None else "targets"
        read = f"_go_check(ctx, answer, [{known}], [{', '.join(self.lent)}], {targets})"
        return [*lines, f"    return {f'({flowing}, *{read}[1:])' if self.flows_to else read}"]

    def _answers_in_order(self) -> bool:
        return not self.plan.straight_through and self.places == list(range(len(self.places)))

    def _is_tensor(self, name: str) -> str:
        """Code that looks whether this is a tensor. (A class that Dynamo meets twice it guards by a slow check.)"""
        return f"type({name}) is _go_Tensor" if self.mode == EAGER else f"_go_is_tensor({name})"

    def _is(self, kind: str) -> str:
        """Code that looks whether an answer is of this kind. (`isinstance` is guarded in traced code anyway.)"""
        return f"type(answer) is {kind}" if self.mode == EAGER else f"isinstance(answer, {kind})"

    def _known(self, name: str) -> str:
        """What the gradient of the tensor `name` must be like."""
        return f"saved_{name}" if name in self.saves else "grad_output"

    def _fits(self, grad: str, name: str) -> str:
        """Code that looks whether `grad` is like the tensor that it is the gradient of, and lies in its own memory."""
        known = self._known(name)
        fits = self._alike(grad, known)
        if self.plan.rule_code.is_algebra:  # which does not move between devices
            fits = f"{grad}.shape == {known}.shape and {grad}.dtype is {known}.dtype"
        return " and ".join([fits, *(f"{grad} is not {lent}" for lent in self.lent)])

    @staticmethod
    def _alike(one: str, other: str) -> str:
        """Code that compares shape, dtype and device. (Two devices take longer to compare than two `is_cpu`.)"""
        same_device = f"({one}.is_cpu and {other}.is_cpu or {one}.device == {other}.device)"
        return f"{one}.shape == {other}.shape and {one}.dtype is {other}.dtype and {same_device}"

    # --- what the generated code calls when something is not plain ---

    def finish(
        self,
        receiver: Any,
        values: tuple[Any, ...],
        given: list[Tensor],
        result: Any,
        graph: KeptGraph | TracedGraph | None,
        before: list[int | None] | None,
        residuals: dict[str, Any] | None = None,
        *,
        on_leaves: bool = False,
    ) -> Any:
        """The general path, for a forward that has run. `before`, `on_leaves`: see `ForwardPass`."""
        call = Call(self.plan, self.layout, self.mode)
        call.graph = graph
        leaves = call.take_apart(values)
        if receiver is not None:
            find_params(call, receiver)
        forward_pass = ForwardPass(call, receiver, receiver, leaves, values, before, on_leaves)
        return forward_pass.finish(given, result, {} if residuals is None else residuals)

    def check(self, ctx: Any, answer: Any, like: list[Tensor], lent: list[Tensor], targets: Any) -> tuple[Any, ...]:
        """Read an answer that is not the usual one: a dict, a list, another dtype, or an error."""
        assigned = {} if targets is None else {name: getattr(targets, name) for name in self.params}
        for name, value in assigned.items():
            if value is UNASSIGNED:
                self.plan.refuse_unassigned(name)
        call = Call(self.plan, self.layout, self.mode)
        metas = [Meta(tensor) for tensor in like]
        if self.noted and ctx.metas is not None:
            for name, meta in zip(self.noted, ctx.metas, strict=True):
                metas[self.tensors.index(name)] = Meta.of(*meta)
        count = len(self.places)
        call.describe_plain(self.places, metas[:count], ctx.needs_input_grad[self.leading :][:count])
        call.describe_params(self.params, metas[count:])
        for name in self.flows_to if isinstance(answer, dict) else ():
            if name in answer and name not in self.layout.names:
                self.plan.refuse_answered(name)
        grads, named = read_answer(call, answer)
        params = read_params(call, named, assigned)
        return *[None] * self.leading, *apart([*grads, *(params[name] for name in self.params)], lent)

    def flowing(self, ctx: Any, grad_output: Tensor) -> Tensor:
        """What flows on to parameters left to autograd, where derivatives of their gradients may be asked for."""
        return tied([grad_output], ctx.outer, self.plan.second_derivative_is_unknown)[0]

    def conform(self, value: Any, like: Tensor) -> Tensor:
        """`value` as a gradient of the result, or an error."""
        if type(value) is Tensor and value.shape == like.shape and value.dtype is like.dtype:
            return value
        return conform_output(self.plan, value, Meta(like))

    def under_autocast(self, backward: Callable[..., Any], ctx: Any, grad_output: Tensor) -> Any:
        """There was no autocast in the forward, or the call would have gone the general way."""
        with NO_AUTOCAST.restored():
            return backward(ctx, grad_output)


def compiled(source: str, names: dict[str, Any], plan: Plan) -> None:
    """Define what `source` defines, among the `names` that it refers to."""
    exec(compile(source, f"<gradoverride short path of {plan.forward.name}>", "exec"), names)


def _sole() -> int:
    """What `getrefcount` says of an object that one local variable holds: it differs between versions of Python."""
    result = object()
    return sys.getrefcount(result)


SOLE = _sole()
