"""The short path: plain tensors and scalars in, one new tensor out, a rule of arguments and output.

Most calls are such, and some microseconds of overhead would be most of their cost. So the code for them is generated,
as an expert would write it by hand for this signature and this rule: no loops, no structures, no object for each call.
It does all that the general path (`call.py`) does; what it meets that is not plain goes there, after the forward too,
which never runs twice. To read it, print what `ShortPath.body`, `forward_source` and `backward_source` give.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from gradoverride._core.ambient import Autocast
from gradoverride._core.backward_pass import conform_output
from gradoverride._core.call import EAGER, Call
from gradoverride._core.contract import Meta, read_answer, read_params
from gradoverride._core.forward_pass import ForwardPass, differentiate
from gradoverride._core.function import plain_function
from gradoverride._core.kept_graph import KeptGraph
from gradoverride._core.plan import Layout, Plan
from gradoverride._core.private import (
    any_autocast,
    can_call_directly,
    fast_apply,
    in_functorch,
    use_count,
)
from gradoverride._core.reach import SCALARS, Reach
from gradoverride._core.vjp import ShortVjp

__all__ = ["Runs", "ShortPath", "guessed_places", "is_plain"]

_FLOATING = frozenset({torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.complex128})


def is_plain(plan: Plan) -> bool:
    """Whether calls of `plan` can take the short path at all."""
    forward = plan.forward
    return (
        forward.parameters is not None
        and bool(forward.parameters)
        and all(p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in forward.parameters)
        and (not plan.takes_receiver or _is_plain_method(plan))
        and not plan.hands_over
        and not plan.class_form
        and can_call_directly()
        and all(
            source in ("argument", "deferred") or name in ("input", "output", "vjp")
            for name, source in plan.sources.items()
        )
    )


def _is_plain_method(plan: Plan) -> bool:
    return plan.forward.takes_self and plan.reach is not None and not plan.straight_through and not plan.asks_vjp


def guessed_places(plan: Plan) -> list[int]:
    """Where tensors are expected: parameters without a default, or with one that is no scalar."""
    parameters = plan.forward.parameters or []
    return [index for index, p in enumerate(parameters) if p.default is p.empty or type(p.default) not in SCALARS]


class FittingClasses(dict[type, bool]):
    """By class, whether what a method reads of its instances is what stands there."""

    def __init__(self, reach: Reach | None) -> None:
        self.reach = reach

    def __missing__(self, cls: type) -> bool:
        fits = (
            self.reach is not None
            and issubclass(cls, nn.Module)
            and cls.__getattr__ is nn.Module.__getattr__
            and cls.__getattribute__ is nn.Module.__getattribute__
            and all(type(inspect.getattr_static(cls, name, None)) in SCALARS for name in self.reach.attributes)
        )
        self[cls] = fits
        return fits


def _is_number(module: nn.Module, name: str) -> bool:
    """Whether this attribute of `module` is a number, or a buffer, and so has no gradient."""
    value = getattr(module, name, module)
    return type(value) in SCALARS or (type(value) is Tensor and not value.requires_grad)


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


class Unusual(Exception):
    """The forward has run within the Function, and its result is one for the general path."""

    def __init__(self, result: Any, versions: list[int | None] | None) -> None:
        self.result = result
        self.versions = versions


class ShortPath:
    """The code for calls of a plan whose tensors stand at `places`. Its own names begin with `_go_`."""

    def __init__(self, plan: Plan, layout: Layout, places: list[int]) -> None:
        self.plan = plan
        self.layout = layout
        self.reach = plan.reach
        self.places = places
        self.names = [f"x{index}" for index in range(len(layout.names))]
        # What the rule asks for and is no argument can only be a parameter here.
        self.params = [name for name, source in plan.sources.items() if source == "deferred"]
        self.tensors = [self.names[place] for place in places] + [f"p_{name}" for name in self.params]
        self.saves: list[str] = []  # names of tensors, in the order in which they are saved
        self.asks: list[str] = []  # what the rule is called with, besides the gradient
        self.constants: list[int] = []
        for name, source in plan.sources.items():
            if source == "reserved" and name == "vjp":
                self.asks.append("vjp=_go_ShortVjp(_go_path, ctx.graph, token, grad_output)")
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
        self.direct = self.reach is not None and not plan.asks_vjp
        # What the Function is given besides the tensors, in one tuple.
        self.boxed = not self.direct or plan.takes_receiver or len(places) < len(self.names)
        if isinstance(plan.rule.fn, FunctionType) and not hasattr(plan.rule.fn, "__wrapped__"):
            code = plan.rule.fn.__code__
            if code.co_varnames[1 : code.co_argcount][: len(plan.sources)] == tuple(plan.sources):
                self.asks = [asked.partition("=")[2] for asked in self.asks]  # by position, which is faster

    def globals(self) -> dict[str, Any]:
        """The names that the code of a call refers to, with a new Function."""
        common = {
            "_go_any_autocast": any_autocast,
            "_go_FLOATING": _FLOATING,
            "_go_fn": self.plan.fn,
            "_go_getrefcount": sys.getrefcount,
            "_go_plan": self.plan,
            "_go_SOLE": _SOLE,
            "_go_Tensor": Tensor,
            "_go_Unusual": Unusual,
            "_go_use_count": use_count,
        }
        inner = {
            **common,
            "_go_check": self.check,
            "_go_check_straight_through": Call(self.plan, self.layout, EAGER).check_straight_through,
            "_go_compiling": torch.compiler.is_dynamo_compiling,
            "_go_note": self.note,
            "_go_path": self,
            "_go_rule": self.plan.rule.fn,
            "_go_ShortVjp": ShortVjp,
            "_go_under_autocast": self.under_autocast,
            "_go_written": self.written,
        }
        names = _compiled(self.forward_source() + self.backward_source(), inner, self.plan)
        function = plain_function(self.plan.forward.name, names["forward"], names["backward"])
        return {
            **common,
            **(self.reach.conditions()[1] if self.reach is not None else {}),
            "_go_apply": fast_apply(function),
            "_go_finish": self.finish,
            "_go_fits": FittingClasses(self.reach),
            "_go_forward_ad": forward_ad,
            "_go_general": lambda receiver, *values: differentiate(self.plan, self.layout, receiver, values),
            "_go_in_functorch": in_functorch,
            "_go_is_number": _is_number,
            "_go_kept_graph": KeptGraph.alone,
            "_go_Parameter": nn.Parameter,
        }

    def run(self) -> Callable[..., Any]:
        """The code as a function of its own."""
        source = "\n".join([f"def run({', '.join(self.names)}):", *self.body(self.names)]) + "\n"
        return _compiled(source, self.globals(), self.plan)["run"]

    def body(self, arguments: Sequence[str], receiver: str = "None") -> list[str]:
        """The code of a call in which grad mode is on, with these names for the arguments."""
        tensors = [arguments[place] for place in self.places]
        general = f"        return _go_general({receiver}, {', '.join(arguments)})"
        ambient = "" if self.plan.rule_is_arithmetic else " or _go_any_autocast()"
        lines = [f"    if _go_in_functorch() or _go_forward_ad._current_level >= 0{ambient}:", general]
        if self.reach is not None and self.reach.names:
            lines += [f"    if {self.reach.conditions()[0]}:", general]
        if self.plan.takes_receiver:
            return lines + self._method_body(arguments, receiver, general)
        lines += [
            *(f"    {_wants(name)} = {name}.requires_grad" for name in tensors),
            f"    if not ({' or '.join(map(_wants, tensors))}):",
            f"        return {self._call(arguments)}",
        ]
        floating = [f"{name}.dtype in _go_FLOATING" for name in tensors]
        if self.plan.asks_vjp:
            if len(tensors) > 1:
                lines += [f"    if not ({' and '.join(floating)}):", general]
            return lines + self._kept_body(arguments)
        if len(tensors) > 1:
            fits = [f"({_wants(name)} or {is_floating})" for name, is_floating in zip(tensors, floating, strict=True)]
            lines += [f"    if not ({' and '.join(fits)}):", general]
        if self.direct:
            return lines + self._direct_body(arguments, receiver)
        return lines + self._aliased_body(arguments)

    def _direct_body(self, arguments: Sequence[str], receiver: str, more: Sequence[str] = ()) -> list[str]:
        """The forward runs in the Function, as by hand: nothing that it can reach besides has a gradient to lose."""
        tensors = [arguments[place] for place in self.places]
        boxed = [receiver] if self.plan.takes_receiver else []
        boxed += [name for place, name in enumerate(arguments) if place not in self.places]
        given = [f"({', '.join(boxed)},)"] if boxed else []
        return [
            "    try:",
            f"        return _go_apply({', '.join([*given, *tensors, *more])})",
            "    except _go_Unusual as _go_unusual:",
            "        _go_found, _go_versions = _go_unusual.result, _go_unusual.versions",
            f"    _go_given = ({', '.join(arguments)},), [{', '.join(tensors)}]",
            f"    return _go_finish({receiver}, *_go_given, _go_found, None, _go_versions)",
        ]

    def _aliased_body(self, arguments: Sequence[str]) -> list[str]:
        """The forward runs on aliases without a gradient: a result that requires one reached something else."""
        tensors = [arguments[place] for place in self.places]
        aliases = [f"{_alias(name)} = {name}.data if {_wants(name)} else {name}" for name in tensors]
        written = [f"{_wants(name)} and {_alias(name)}._version" for name in tensors]
        if len(tensors) == 1:
            aliases, written = [f"{_alias(tensors[0])} = {tensors[0]}.data"], [f"{_alias(tensors[0])}._version"]
        unusual = [*self._unusual(list(map(_alias, tensors))), "_go_result.requires_grad", *written]
        found = f"({', '.join(arguments)},), [{', '.join(map(_alias, tensors))}], _go_result"
        return [
            *(
                f"    {alias}" for alias in aliases
            ),  # each has a version counter of its own, which shows writes in place
            f"    _go_result = {self._call_on_aliases(arguments)}",
            f"    if {' or '.join(unusual)}:",
            f"        return _go_finish(None, {found}, None, None)",
            # Somebody else may hold the result (a cached buffer), and would find it turned into an output.
            "    if _go_getrefcount(_go_result) != _go_SOLE or _go_use_count(_go_result) != 1:",
            "        _go_result = _go_result.detach()",
            f"    return _go_apply(({', '.join(['_go_result', *self._boxed(arguments)])},), {', '.join(tensors)})",
        ]

    def _kept_body(self, arguments: Sequence[str]) -> list[str]:
        """The forward runs on aliases that start a graph, which is kept for `vjp`."""
        tensors = [arguments[place] for place in self.places]
        aliases = ", ".join(map(_alias, tensors))
        unusual = [*self._unusual(list(map(_alias, tensors))), *(f"{_alias(name)}._version" for name in tensors)]
        if self.reach is None:
            unusual.append("_go_graph.stray(_go_result)")
        boxed = ["_go_result.detach()", "_go_graph", "_go_graph.end((_go_result,))", *self._boxed(arguments)]
        return [
            f"    _go_graph = _go_kept_graph(({', '.join(tensors)},))",
            f"    {aliases}, = _go_graph.start()",
            f"    _go_result = {self._call_on_aliases(arguments)}",
            f"    if {' or '.join(unusual)}:",
            f"        return _go_finish(None, ({', '.join(arguments)},), [{aliases}], _go_result, _go_graph, None)",
            f"    return _go_apply(({', '.join(boxed)},), {', '.join(tensors)})",
        ]

    def _method_body(self, arguments: Sequence[str], receiver: str, general: str) -> list[str]:
        """A method of a module all of whose parameters the rule asks for, and which reads nothing else that counts."""
        assert self.reach is not None, "`is_plain` has looked"
        tensors = [arguments[place] for place in self.places]
        params = [f"_go_{name}" for name in self.params]
        unfit = [f"{receiver}._modules", f"len(_go_parameters) != {len(params)}"]
        for name in self.params:
            unfit.append(f"type(_go_{name} := _go_parameters.get({name!r})) is not _go_Parameter")
            unfit.append(f"not _go_{name}.requires_grad or {name!r} in _go_state")
        unfit += [f"not _go_is_number({receiver}, {name!r})" for name in sorted(self.reach.attributes - {*self.params})]
        lines = [
            f"    if not _go_fits[type({receiver})]:",
            general,
            f"    _go_state = {receiver}.__dict__",
            f"    _go_parameters = {receiver}._parameters",
            f"    if {' or '.join(unfit)}:",
            general,
            *(f"    {_wants(name)} = {name}.requires_grad" for name in tensors),
        ]
        unfit = [f"not {_wants(name)} and {name}.dtype not in _go_FLOATING" for name in tensors]
        if not params:
            unfit.append(f"not ({' or '.join(map(_wants, tensors))})")
        return [*lines, f"    if {' or '.join(unfit)}:", general, *self._direct_body(arguments, receiver, params)]

    def _unusual(self, given: Sequence[str], result: str = "_go_result") -> list[str]:
        """What makes a result one for the general path, if these are what the forward was given."""
        unusual = [f"type({result}) is not _go_Tensor", *(f"{result} is {name}" for name in given)]
        if not self.plan.forward_is_arithmetic:
            unusual.append(f"{result}._is_view()")
        if self.plan.straight_through:
            unusual += [f"{result}.dtype not in _go_FLOATING", "_go_plan.on_first_call is not None"]
        return unusual

    def _call_on_aliases(self, arguments: Sequence[str]) -> str:
        return self._call([_alias(name) if index in self.places else name for index, name in enumerate(arguments)])

    def _boxed(self, arguments: Sequence[str]) -> list[str]:
        return [arguments[place] for place in self.constants]

    def forward_source(self) -> str:
        boxed = ["box"] if self.boxed else []
        lines = [f"def forward({', '.join(['ctx', *boxed, *self.tensors])}):"]
        saves = list(self.saves)
        if self.direct:
            lines += self._run_in_forward()
            constants = [f"box[{self._box_index(place)}]" for place in self.constants]
        else:
            lines.append("    result = box[0]")
            constants = [f"box[{(3 if self.plan.asks_vjp else 1) + index}]" for index in range(len(self.constants))]
        if self.plan.asks_vjp:
            lines.append("    ctx.graph = box[1]")
            saves.append("box[2]")
        if self.constants:
            lines.append(f"    ctx.constants = ({', '.join(constants)},)")
        if saves:
            lines.append(f"    ctx.save_for_backward({', '.join(saves)})")
        if self.unsaved:
            # A gradient is checked against what it belongs to: mostly that is like the result, and so like
            # grad_output, which is at hand in the backward; else it is noted here.
            alike = " and ".join(self._alike("result", name) for name in self.unsaved)
            metas = ", ".join(f"({name}.shape, {name}.dtype, {name}.device)" for name in self.unsaved)
            lines += [f"    if not ({alike}):", f"        ctx.metas = ({metas},)"]
            if self.plan.straight_through and not self.saves:
                lines.append(f"        _go_check_straight_through({self.tensors[0]}.shape, result.shape)")
        return "\n".join([*lines, "    return result"]) + "\n"

    def _run_in_forward(self) -> list[str]:
        """The forward within that of the Function, and a look at what it gave."""
        given = [self.names[place] for place in self.places]
        names = [n if place in self.places else f"box[{self._box_index(place)}]" for place, n in enumerate(self.names)]
        called = self._call(names).replace("_go_fn(", "_go_fn(box[0], " if self.plan.takes_receiver else "_go_fn(", 1)
        unusual, before = self._unusual(given, "result"), []
        versions = ["None"] * len(given)
        if not self.plan.forward_is_arithmetic:
            versions = [_version(name) for name in given]
            before = [f"    {_version(name)} = {name}._version if {name}.requires_grad else None" for name in given]
            unusual += [f"{_version(name)} is not None and {name}._version != {_version(name)}" for name in given]
        lines = [
            *before,
            f"    result = {called}",
            f"    if {' or '.join(unusual)}:",
            f"        raise _go_Unusual(result, [{', '.join(versions)}])",
        ]
        if not self.plan.forward_is_arithmetic or (self.reach is not None and self.reach.attributes):
            # Somebody else may hold the result (a cached buffer), and would find it turned into an output.
            lines += [
                "    if _go_getrefcount(result) != _go_SOLE or _go_use_count(result) != 1:",
                "        result = result.detach()",
            ]
        return lines

    def _box_index(self, place: int) -> int:
        """Where the constant at `place` is in the box of a direct call: after the receiver."""
        return self.plan.takes_receiver + sum(other not in self.places for other in range(place))

    def backward_source(self) -> str:
        tensors = self.tensors
        lines = ["def backward(ctx, grad_output):"]
        none = "None, " if self.boxed else ""
        if not self.plan.rule_is_arithmetic:
            lines += ["    if _go_any_autocast():", "        return _go_under_autocast(backward, ctx, grad_output)"]
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
            lines.append("    version = None if _go_compiling() else grad_output._version")
        lines += [
            "    try:",
            f"        answer = _go_rule({', '.join([handed, *self.asks])})",
            "    except Exception as error:",
            "        _go_note(error)",
            "        raise",
        ]
        if watched:
            lines += ["    if version is not None and grad_output._version != version:", "        _go_written()"]
        alike = "ctx.metas is None and " if self.unsaved else ""
        grads = [f"grad_{name}" for name in tensors]
        fits = " and ".join(
            f"(grad_{name} is None or type(grad_{name}) is _go_Tensor and {self._fits(f'grad_{name}', name)})"
            for name in tensors
        )
        answered = [f"        if {fits}:", f"            return {none}{', '.join(grads)}"]
        if len(tensors) == 1:
            fits = self._fits("answer", tensors[0])
            fits = f"type(answer) is _go_Tensor and {fits}"
            if self.plan.rule_is_scaling:
                fits = "type(answer) is _go_Tensor"  # like grad_output: it is an expression of that and numbers
            elif self.unsaved:
                fits = f"(answer is grad_output or {fits})"
            lines += [f"    if {alike}{fits}:", f"        return {none}answer"]
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
        lines.append(f"    return _go_check(ctx, answer, [{known}])")
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

    def finish(
        self,
        receiver: Any,
        values: tuple[Any, ...],
        given: list[Tensor],
        result: Any,
        graph: KeptGraph | None,
        versions: list[int | None] | None,
    ) -> Any:
        """The general path, for a forward that has run."""
        call = Call(self.plan, self.layout, EAGER)
        call.graph = graph
        leaves = call.take_apart(values)
        if receiver is not None:
            call.find_params(receiver)
        forward_pass = ForwardPass(call, receiver, receiver, leaves, values)
        forward_pass.versions = versions
        return forward_pass.finish(given, result, {})

    def check(self, ctx: Any, answer: Any, like: list[Tensor]) -> tuple[Any, ...]:
        """Read an answer that is not the usual one: a dict, a list, another dtype, or an error."""
        call = Call(self.plan, self.layout, EAGER)
        metas = [Meta(tensor) for tensor in like]
        if self.unsaved and ctx.metas is not None:
            for name, meta in zip(self.unsaved, ctx.metas, strict=True):
                metas[self.tensors.index(name)] = Meta.of(*meta)
        count = len(self.places)
        call.describe_plain(self.places, metas[:count], ctx.needs_input_grad[self.boxed :][:count])
        call.describe_params(self.params, metas[count:])
        grads, named = read_answer(call, answer)
        params = read_params(call, named)
        return *([None] if self.boxed else []), *grads, *(params[name] for name in self.params)

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


def _alias(name: str) -> str:
    return f"_go_{name}_alias"


def _version(name: str) -> str:
    return f"_go_{name}_version"


def _wants(name: str) -> str:
    return f"_go_{name}_wants"


def _compiled(source: str, shared: dict[str, Any], plan: Plan) -> dict[str, Any]:
    exec(compile(source, f"<gradoverride short path of {plan.forward.name}>", "exec"), shared)
    return shared


def _sole() -> int:
    """What `getrefcount` says of an object that one local variable holds: it differs between versions of Python."""
    result = object()
    return sys.getrefcount(result)


_SOLE = _sole()
_NO_AUTOCAST = Autocast.none()
