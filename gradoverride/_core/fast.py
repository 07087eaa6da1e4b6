"""The short path: plain tensors and scalars in, one new tensor out, a rule of arguments and output.

Most calls are such, and some microseconds of overhead would be most of their cost. So the code for them is generated,
as an expert would write it by hand for this signature and this rule: no loops, no structures, no object for each call.
It does all that the general path (`call.py`) does; what it meets that is not plain goes there, after the forward too,
which never runs twice. To read it, print what `ShortPath.body`, `forward_source` and `backward_source` give.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from gradoverride._core import scan
from gradoverride._core.ambient import Autocast
from gradoverride._core.backward_pass import conform_output
from gradoverride._core.call import EAGER, Call
from gradoverride._core.contract import Meta, read_answer, read_params
from gradoverride._core.forward_pass import ForwardPass, differentiate
from gradoverride._core.function import plain_function
from gradoverride._core.kept_graph import KeptGraph
from gradoverride._core.plan import Layout, Plan
from gradoverride._core.private import any_autocast, can_call_directly, fast_apply, in_functorch, use_count
from gradoverride._core.vjp import ShortVjp

__all__ = ["SCALARS", "Runs", "ShortPath", "guessed_places", "is_plain"]

SCALARS = frozenset({int, float, bool, complex, str, type(None), torch.dtype, torch.device})
_FLOATING = frozenset({torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.complex128})


def is_plain(plan: Plan) -> bool:
    """Whether calls of `plan` can take the short path at all."""
    forward = plan.forward
    return (
        forward.parameters is not None
        and bool(forward.parameters)
        and all(p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in forward.parameters)
        and (not plan.takes_receiver or (forward.takes_self and not plan.straight_through and not plan.asks_vjp))
        and not plan.hands_over
        and not plan.class_form
        and can_call_directly()
        and all(
            source in ("argument", "deferred") or name in ("input", "output", "vjp")
            for name, source in plan.sources.items()
        )
    )


def guessed_places(plan: Plan) -> list[int]:
    """Where tensors are expected: parameters without a default, or with one that is no scalar."""
    parameters = plan.forward.parameters or []
    return [index for index, p in enumerate(parameters) if p.default is p.empty or type(p.default) not in SCALARS]


class FittingClasses(dict[type, bool]):
    """By class, whether the short path can stand in for its instances in this forward."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def __missing__(self, cls: type) -> bool:
        fits = issubclass(cls, nn.Module) and not scan.stores_attributes(self.plan.fn, cls)
        self[cls] = fits
        return fits


class Runs(dict[tuple[type, ...], Callable[..., Any]]):
    """By the types of the arguments, the code for such a call. It is made when they are first met."""

    def __init__(self, plan: Plan, layout: Layout) -> None:
        self.plan = plan
        self.layout = layout

    def __missing__(self, kinds: tuple[type, ...]) -> Callable[..., Any]:
        places = [index for index, kind in enumerate(kinds) if kind is Tensor or kind is nn.Parameter]
        others = [kind for index, kind in enumerate(kinds) if index not in places]
        if places and all(kind in SCALARS for kind in others):
            run = ShortPath(self.plan, self.layout, places).run()
        else:
            run = self._general
        self[kinds] = run
        return run

    def _general(self, *values: Any) -> Any:
        return differentiate(self.plan, self.layout, None, values)


class ShortPath:
    """The code for calls of a plan whose tensors stand at `places`. Its own names begin with `_go_`."""

    def __init__(self, plan: Plan, layout: Layout, places: list[int]) -> None:
        self.plan = plan
        self.layout = layout
        self.places = places
        self.names = [f"x{index}" for index in range(len(layout.names))]
        # What the rule asks for and is no argument can only be a parameter here.
        self.params = [name for name, source in plan.sources.items() if source == "deferred"]
        self.tensors = [self.names[place] for place in places] + [f"p_{name}" for name in self.params]
        self.saves: list[str] = []  # names of tensors, in the order in which they are saved
        self.asks: list[str] = []  # the keywords that the rule is called with
        self.constants: list[int] = []
        for name, source in plan.sources.items():
            if source == "reserved" and name == "vjp":
                self.asks.append("vjp=ShortVjp(path, ctx.graph, token, grad_output)")
                continue
            if source == "deferred":
                self.saves.append(f"p_{name}")
                self.asks.append(f"{name}=saved_p_{name}")
                continue
            place = layout.names.index(name) if source == "argument" else places[0]
            value = "result" if source == "reserved" and name == "output" else self.names[place]
            if value == "result" or place in places:
                if value not in self.saves:
                    self.saves.append(value)
                self.asks.append(f"{name}=saved_{value}")
            else:
                self.constants.append(place)
                self.asks.append(f"{name}=ctx.constants[{len(self.constants) - 1}]")
        self.unsaved = [name for name in self.tensors if name not in self.saves]

    def globals(self) -> dict[str, Any]:
        """The names that the code of a call refers to, with a new Function."""
        shared = {
            "check": self.check,
            "path": self,
            "ShortVjp": ShortVjp,
            "check_straight_through": Call(self.plan, self.layout, EAGER).check_straight_through,
            "note": self.note,
            "any_autocast": any_autocast,
            "compiling": torch.compiler.is_dynamo_compiling,
            "rule": self.plan.rule.fn,
            "Tensor": Tensor,
            "under_autocast": self.under_autocast,
            "written": self.written,
        }
        names = _compiled(self.forward_source() + self.backward_source(), shared, self.plan)
        function = plain_function(self.plan.forward.name, names["forward"], names["backward"])
        return {
            "_go_apply": fast_apply(function),
            "_go_any_autocast": any_autocast,
            "_go_finish": self.finish,
            "_go_finish_method": self.finish_method,
            "_go_FLOATING": _FLOATING,
            "_go_fn": self.plan.fn,
            "_go_forward_ad": forward_ad,
            "_go_fits": FittingClasses(self.plan),
            "_go_general": lambda receiver, *values: differentiate(self.plan, self.layout, receiver, values),
            "_go_new": object.__new__,
            "_go_Parameter": nn.Parameter,
            "_go_getrefcount": sys.getrefcount,
            "_go_in_functorch": in_functorch,
            "_go_kept_graph": KeptGraph.alone,
            "_go_plan": self.plan,
            "_go_SOLE": _SOLE,
            "_go_Tensor": Tensor,
            "_go_use_count": use_count,
        }

    def run(self) -> Callable[..., Any]:
        """The code as a function of its own."""
        source = "\n".join([f"def run({', '.join(self.names)}):", *self.body(self.names)]) + "\n"
        return _compiled(source, self.globals(), self.plan)["run"]

    def body(self, arguments: Sequence[str], receiver: str = "None") -> list[str]:
        """The code of a call in which grad mode is on, with these names for the arguments."""
        values = ", ".join(arguments)
        if self.plan.takes_receiver:
            return self._method_body(arguments, receiver, values)
        tensors = [arguments[place] for place in self.places]
        alias = {name: f"_go_{name}_alias" for name in tensors}
        wants = {name: f"_go_{name}_wants" for name in tensors}
        ambient = "" if self.plan.rule_is_arithmetic else " or _go_any_autocast()"
        lines = [
            f"    if _go_in_functorch() or _go_forward_ad._current_level >= 0{ambient}:",
            f"        return _go_general(None, {values})",
            *(f"    {wants[name]} = {name}.requires_grad" for name in tensors),
            f"    if not ({' or '.join(wants.values())}):",
            f"        return {self._call(arguments)}",
        ]
        aliases = ", ".join(alias.values())
        called = self._call([alias.get(name, name) for name in arguments])
        unusual = ["type(_go_result) is not _go_Tensor", "_go_result._is_view()"]
        unusual += [f"_go_result is {alias[name]}" for name in tensors]
        if self.plan.straight_through:
            unusual += ["_go_result.dtype not in _go_FLOATING", "_go_plan.on_first_call is not None"]
        if self.plan.asks_vjp:
            if len(tensors) > 1:
                floating = " and ".join(f"{name}.dtype in _go_FLOATING" for name in tensors)
                lines += [f"    if not ({floating}):", f"        return _go_general(None, {values})"]
            unusual += [f"{alias[name]}._version" for name in tensors]
            if self.plan.may_capture:
                unusual.append("_go_graph.stray(_go_result)")
            boxed = ["_go_result.detach()", "_go_graph", "_go_graph.end((_go_result,))"]
            return [
                *lines,
                f"    _go_graph = _go_kept_graph(({', '.join(tensors)},))",
                f"    {aliases}, = _go_graph.start()",
                f"    _go_result = {called}",
                f"    if {' or '.join(unusual)}:",
                f"        return _go_finish(({values},), [{aliases}], _go_result, _go_graph)",
                f"    return _go_apply(({', '.join([*boxed, *self._boxed(arguments)])}), {', '.join(tensors)})",
            ]
        for name in tensors:
            if len(tensors) == 1:
                lines.append(f"    {alias[name]} = {name}.data")
                continue
            lines += [
                f"    if {wants[name]}:",
                f"        {alias[name]} = {name}.data",  # its own version counter shows writes in place
                f"    elif {name}.dtype in _go_FLOATING:",
                f"        {alias[name]} = {name}",
                "    else:",
                f"        return _go_general(None, {values})",
            ]
        unusual.append("_go_result.requires_grad")  # it reached a tensor that it was not given
        for name in tensors:
            unusual.append((f"{wants[name]} and " if len(tensors) > 1 else "") + f"{alias[name]}._version")
        return [
            *lines,
            f"    _go_result = {called}",
            f"    if {' or '.join(unusual)}:",
            f"        return _go_finish(({values},), [{aliases}], _go_result, None)",
            # Somebody else may hold the result (a cached buffer), and would find it turned into an output.
            "    if _go_getrefcount(_go_result) != _go_SOLE or _go_use_count(_go_result) != 1:",
            "        _go_result = _go_result.detach()",
            f"    return _go_apply(({', '.join(['_go_result', *self._boxed(arguments)])},), {', '.join(tensors)})",
        ]

    def _method_body(self, arguments: Sequence[str], receiver: str, values: str) -> list[str]:
        """The same for a method of a module all of whose parameters the rule asks for."""
        tensors = [arguments[place] for place in self.places]
        params = [f"_go_{name}" for name in self.params]
        ambient = "" if self.plan.rule_is_arithmetic else " or _go_any_autocast()"
        general = f"        return _go_general({receiver}, {values})"
        lines = [
            f"    if _go_in_functorch() or _go_forward_ad._current_level >= 0{ambient}:",
            general,
            f"    if not _go_fits[type({receiver})] or {receiver}._modules:",
            general,
            f"    _go_parameters = {receiver}._parameters",
            f"    if len(_go_parameters) != {len(params)}:",
            general,
        ]
        for name, variable in zip(self.params, params, strict=True):
            lines.append(f"    {variable} = _go_parameters.get({name!r})")
        unfit = [f"type({name}) is not _go_Parameter or not {name}.requires_grad" for name in params]
        unfit += [f"not {name}.requires_grad and {name}.dtype not in _go_FLOATING" for name in tensors]
        if not params:
            unfit.append(f"not ({' or '.join(f'{name}.requires_grad' for name in tensors)})")
        inner = "_go_self" if params else receiver
        lines += [f"    if {' or '.join(unfit)}:", general]
        alias = {name: f"_go_{name}_alias" for name in [*tensors, *params]}
        lines += [f"    {alias[name]} = {name}.data if {name}.requires_grad else {name}" for name in tensors]
        if params:
            swapped = ", ".join(
                f"{name!r}: {variable}.data" for name, variable in zip(self.params, params, strict=True)
            )
            lines += [
                f"    _go_self = _go_new(type({receiver}))",
                "    _go_state = _go_self.__dict__",
                f"    _go_state.update({receiver}.__dict__)",
                f'    _go_state["_parameters"] = _go_aliases = {{{swapped}}}',
            ]
        called = self._call([alias.get(name, name) for name in arguments]).replace("_go_fn(", f"_go_fn({inner}, ")
        unusual = ["type(_go_result) is not _go_Tensor", "_go_result._is_view()", "_go_result.requires_grad"]
        for name in tensors:
            unusual += [f"_go_result is {alias[name]}", f"{name}.requires_grad and {alias[name]}._version"]
        aliases = ", ".join(alias[name] for name in tensors)
        given = "_go_aliases" if params else "{}"
        boxed = ", ".join(["_go_result", *self._boxed(arguments)])
        return [
            *lines,
            f"    _go_result = {called}",
            f"    if {' or '.join(unusual)}:",
            f"        return _go_finish_method({receiver}, ({values},), [{aliases}], {given}, _go_result)",
            "    if _go_getrefcount(_go_result) != _go_SOLE or _go_use_count(_go_result) != 1:",
            "        _go_result = _go_result.detach()",
            f"    return _go_apply(({boxed},), {', '.join([*tensors, *params])})",
        ]

    def _boxed(self, arguments: Sequence[str]) -> list[str]:
        return [arguments[place] for place in self.constants]

    def forward_source(self) -> str:
        lines = [f"def forward(ctx, box, {', '.join(self.tensors)}):", "    result = box[0]"]
        saves = list(self.saves)
        if self.plan.asks_vjp:
            lines.append("    ctx.graph = box[1]")
            saves.append("box[2]")
        if self.constants:
            lines.append(f"    ctx.constants = box[{3 if self.plan.asks_vjp else 1}:]")
        if saves:
            lines.append(f"    ctx.save_for_backward({', '.join(saves)})")
        if self.unsaved:
            # A gradient is checked against what it belongs to: mostly that is like the result, and so like
            # grad_output, which is at hand in the backward; else it is noted here.
            alike = " and ".join(self._alike("result", name) for name in self.unsaved)
            metas = ", ".join(f"({name}.shape, {name}.dtype, {name}.device)" for name in self.unsaved)
            lines += [f"    if not ({alike}):", f"        ctx.metas = ({metas},)"]
            if self.plan.straight_through and not self.saves:
                lines.append(f"        check_straight_through({self.tensors[0]}.shape, result.shape)")
        return "\n".join([*lines, "    return result"]) + "\n"

    def backward_source(self) -> str:
        tensors = self.tensors
        lines = ["def backward(ctx, grad_output):"]
        if not self.plan.rule_is_arithmetic:
            lines += ["    if any_autocast():", "        return under_autocast(backward, ctx, grad_output)"]
        saved = [f"saved_{name}" for name in self.saves]
        if self.plan.asks_vjp:
            saved.append("token")
        if saved:
            lines.append(f"    {', '.join(saved)}, = ctx.saved_tensors")
        handed = "grad_output"
        if self.plan.rule_writes:
            lines.append("    handed = grad_output.clone()")
            handed = "handed"
        watched = not (self.plan.rule_is_arithmetic or self.plan.rule_writes)
        if watched:
            lines.append("    version = None if compiling() else grad_output._version")
        lines += [
            "    try:",
            f"        answer = rule({', '.join([handed, *self.asks])})",
            "    except Exception as error:",
            "        note(error)",
            "        raise",
        ]
        if watched:
            lines += ["    if version is not None and grad_output._version != version:", "        written()"]
        alike = "ctx.metas is None and " if self.unsaved else ""
        grads = [f"grad_{name}" for name in tensors]
        fits = " and ".join(
            f"(grad_{name} is None or type(grad_{name}) is Tensor and {self._fits(f'grad_{name}', name)})"
            for name in tensors
        )
        answered = [f"        if {fits}:", f"            return None, {', '.join(grads)}"]
        if len(tensors) == 1:
            fits = self._fits("answer", tensors[0])
            fits = f"type(answer) is Tensor and {fits}"
            if self.plan.rule_is_scaling:
                fits = "type(answer) is Tensor"  # like grad_output: it is an expression of that and numbers
            elif self.unsaved:
                fits = f"(answer is grad_output or {fits})"
            lines += [f"    if {alike}{fits}:", "        return None, answer"]
        elif not self.params and not self.plan.straight_through and self.places == list(range(len(tensors))):
            # Scalars that come after the tensors may be left out of the answer.
            lines += [
                f"    if {alike}type(answer) is tuple and len(answer) == {len(tensors)}:",
                f"        {', '.join(grads)} = answer",
                *answered,
            ]
        if len(tensors) > 1 or self.params:
            names = [self.layout.names[place] for place in self.places] + self.params
            present = " and ".join(f"{name!r} in answer" for name in names)
            lines += [
                f"    if {alike}type(answer) is dict and len(answer) == {len(names)} and {present}:",
                *(f"        {grad} = answer[{name!r}]" for grad, name in zip(grads, names, strict=True)),
                *answered,
            ]
        known = ", ".join(self._known(name) for name in tensors)
        lines.append(f"    return check(ctx, answer, [{known}])")
        return "\n".join(lines) + "\n"

    def _known(self, name: str) -> str:
        """What the gradient of the tensor `name` must be like."""
        return f"saved_{name}" if name in self.saves else "grad_output"

    def _fits(self, grad: str, name: str) -> str:
        """Code that looks whether `grad` is like the tensor that it is the gradient of."""
        known = self._known(name)
        if self.plan.rule_is_arithmetic:  # which does not move between devices
            return f"{grad}.shape == {known}.shape and {grad}.dtype is {known}.dtype"
        return self._alike(grad, known)

    @staticmethod
    def _alike(one: str, other: str) -> str:
        """Code that compares shape, dtype and device. (Two devices take longer to compare than two `is_cpu`.)"""
        same_device = f"({one}.is_cpu and {other}.is_cpu or {one}.device == {other}.device)"
        return f"{one}.shape == {other}.shape and {one}.dtype is {other}.dtype and {same_device}"

    def _call(self, names: Sequence[str]) -> str:
        positional = names[: self.layout.positional]
        keywords = zip(self.layout.keywords, names[self.layout.positional :], strict=True)
        return f"_go_fn({', '.join([*positional, *(f'{keyword}={name}' for keyword, name in keywords)])})"

    # --- what the generated code calls when something is not plain ---

    def finish(self, values: tuple[Any, ...], aliases: list[Tensor], result: Any, graph: KeptGraph | None) -> Any:
        """The general path, for a forward that has run."""
        call = Call(self.plan, self.layout, EAGER)
        call.graph = graph
        leaves = call.take_apart(values)
        return ForwardPass(call, None, None, leaves, values).finish(aliases, result, {})

    def finish_method(
        self,
        module: nn.Module,
        values: tuple[Any, ...],
        aliases: list[Tensor],
        swapped: dict[str, Tensor],
        result: Any,
    ) -> Any:
        """The general path, for a method that has run on a stand-in."""
        call = Call(self.plan, self.layout, EAGER)
        leaves = call.take_apart(values)
        call.find_params(module)
        aliases = [*aliases, *(swapped[param.name] for param in call.aliased)]
        return ForwardPass(call, module, module, leaves, values).finish(aliases, result, {})

    def check(self, ctx: Any, answer: Any, like: list[Tensor]) -> tuple[Any, ...]:
        """Read an answer that is not the usual one: a dict, a list, another dtype, or an error."""
        call = Call(self.plan, self.layout, EAGER)
        metas = [Meta(tensor) for tensor in like]
        if self.unsaved and ctx.metas is not None:
            for name, meta in zip(self.unsaved, ctx.metas, strict=True):
                metas[self.tensors.index(name)] = Meta.of(*meta)
        count = len(self.places)
        call.describe_plain(self.places, metas[:count], ctx.needs_input_grad[1 : 1 + count])
        call.describe_params(self.params, metas[count:])
        grads, named = read_answer(call, answer)
        params = read_params(call, named)
        return None, *grads, *(params[name] for name in self.params)

    def conform(self, value: Any, like: Tensor) -> Tensor:
        """`value` as a gradient of the result, or an error."""
        if type(value) is Tensor and value.shape == like.shape and value.dtype is like.dtype:
            return value
        return conform_output(Call(self.plan, self.layout, EAGER), value, Meta(like))

    def note(self, error: Exception) -> None:
        Call(self.plan, self.layout, EAGER).note(error)

    def written(self) -> None:
        Call(self.plan, self.layout, EAGER).refuse_written()

    def under_autocast(self, backward: Callable[..., Any], ctx: Any, grad_output: Tensor) -> Any:
        """There was no autocast in the forward, or the call would have gone the general way."""
        with _NO_AUTOCAST.restored():
            return backward(ctx, grad_output)


def _compiled(source: str, shared: dict[str, Any], plan: Plan) -> dict[str, Any]:
    exec(compile(source, f"<gradoverride short path of {plan.forward.name}>", "exec"), shared)
    return shared


def _sole() -> int:
    """What `getrefcount` says of an object that one local variable holds: it differs between versions of Python."""
    result = object()
    return sys.getrefcount(result)


_SOLE = _sole()
_NO_AUTOCAST = Autocast.none()
