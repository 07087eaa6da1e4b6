"""The short path: plain tensors and scalars in, one new tensor out, a rule of arguments and output.

Most calls are such, and some microseconds of overhead would be most of their cost. So the code for them is generated,
as an expert would write it by hand for this signature and this rule: no loops, no structures, no object for each call.
It does all that the general path (`call.py`) does; what it meets that is not plain goes there, after the forward too,
which never runs twice. To read it, print `run_source(...)` and `backward_source(...)`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from gradoverride._core.ambient import Autocast
from gradoverride._core.call import EAGER, Call, differentiate
from gradoverride._core.contract import Meta, read_answer
from gradoverride._core.function import plain_function
from gradoverride._core.plan import Layout, Plan
from gradoverride._core.private import any_autocast, fast_apply, in_functorch, use_count

__all__ = ["Runs", "is_plain"]

_SCALARS = frozenset({int, float, bool, complex, str, type(None), torch.dtype, torch.device})
_FLOATING = frozenset({torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.complex128})


def is_plain(plan: Plan) -> bool:
    """Whether calls of `plan` can take the short path at all."""
    forward = plan.forward
    return (
        forward.parameters is not None
        and bool(forward.parameters)
        and all(p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in forward.parameters)
        and not plan.takes_receiver
        and not plan.hands_over
        and all(source == "argument" or name in ("input", "output") for name, source in plan.sources.items())
    )


class Runs(dict[tuple[type, ...], Callable[..., Any]]):
    """By the types of the arguments, the code for such a call. It is made when they are first met."""

    def __init__(self, plan: Plan, layout: Layout) -> None:
        self.plan = plan
        self.layout = layout

    def __missing__(self, kinds: tuple[type, ...]) -> Callable[..., Any]:
        places = [index for index, kind in enumerate(kinds) if kind is Tensor or kind is nn.Parameter]
        others = [kind for index, kind in enumerate(kinds) if index not in places]
        if places and all(kind in _SCALARS for kind in others):
            run = _Short(self.plan, self.layout, places).run()
        else:
            run = self._general
        self[kinds] = run
        return run

    def _general(self, *values: Any) -> Any:
        return differentiate(self.plan, self.layout, None, values)


class _Short:
    """The code for calls of a plan whose tensors stand at `places`."""

    def __init__(self, plan: Plan, layout: Layout, places: list[int]) -> None:
        self.plan = plan
        self.layout = layout
        self.places = places
        self.names = [f"x{index}" for index in range(len(layout.names))]
        self.tensors = [self.names[place] for place in places]
        self.saves: list[str] = []  # names of tensors, in the order in which they are saved
        self.asks: list[str] = []  # the keywords that the rule is called with
        self.constants: list[str] = []
        for name, source in plan.sources.items():
            place = layout.names.index(name) if source == "argument" else places[0]
            value = "result" if source == "reserved" and name == "output" else self.names[place]
            if value == "result" or place in places:
                if value not in self.saves:
                    self.saves.append(value)
                self.asks.append(f"{name}=saved_{value}")
            else:
                self.constants.append(value)
                self.asks.append(f"{name}=ctx.constants[{len(self.constants) - 1}]")
        self.metas = [name for name in self.tensors if name not in self.saves]

    def run(self) -> Callable[..., Any]:
        shared = {
            "Tensor": Tensor,
            "any_autocast": any_autocast,
            "check": self.check,
            "finish": self.finish,
            "fn": self.plan.fn,
            "FLOATING": _FLOATING,
            "forward_ad": forward_ad,
            "general": lambda *values: differentiate(self.plan, self.layout, None, values),
            "getrefcount": sys.getrefcount,
            "in_functorch": in_functorch,
            "note": self.note,
            "rule": self.plan.rule.fn,
            "SOLE": _SOLE,
            "under_autocast": self.under_autocast,
            "use_count": use_count,
            "written": self.written,
        }
        names = _compiled(self.forward_source() + self.backward_source() + self.run_source(), shared, self.plan)
        function = plain_function(self.plan.forward.name, names["forward"], names["backward"])
        names["apply"] = fast_apply(function)
        return names["run"]  # type: ignore[no-any-return]

    def run_source(self) -> str:
        names, tensors = ", ".join(self.names), self.tensors
        aliased = [f"{name}_alias" if name in tensors else name for name in self.names]
        ambient = "" if self.plan.rule_is_arithmetic else " or any_autocast()"
        lines = [
            f"def run({names}):",
            f"    if in_functorch() or forward_ad._current_level >= 0{ambient}:",
            f"        return general({names})",
            *([f"    {name}_wants = {name}.requires_grad" for name in tensors]),
            f"    if not ({' or '.join(f'{name}_wants' for name in tensors)}):",
            f"        return {self._call(self.names)}",
        ]
        for name in tensors:
            if len(tensors) == 1:
                lines.append(f"    {name}_alias = {name}.data")
                continue
            lines += [
                f"    if {name}_wants:",
                f"        {name}_alias = {name}.data",  # its own version counter shows writes in place
                f"    elif {name}.dtype in FLOATING:",
                f"        {name}_alias = {name}",
                "    else:",
                f"        return general({names})",
            ]
        unusual = ["type(result) is not Tensor", "result.requires_grad", "result._is_view()"]
        for name in tensors:
            unusual.append(f"result is {name}_alias")
            unusual.append(f"{name}_alias._version" + (f" and {name}_wants" if len(tensors) > 1 else ""))
        aliases = ", ".join(f"{name}_alias" for name in tensors)
        lines += [
            f"    result = {self._call(aliased)}",
            f"    if {' or '.join(unusual)}:",
            f"        return finish(({names},), [{aliases}], result)",
            # Somebody else may hold the result (a cached buffer), and would find it turned into an output.
            "    if getrefcount(result) != SOLE or use_count(result) != 1:",
            "        result = result.detach()",
            f"    return apply(({', '.join(['result', *self.constants])},), {', '.join(tensors)})",
        ]
        return "\n".join(lines) + "\n"

    def forward_source(self) -> str:
        lines = [f"def forward(ctx, box, {', '.join(self.tensors)}):", "    result = box[0]"]
        if self.constants:
            lines.append("    ctx.constants = box[1:]")
        if self.saves:
            lines.append(f"    ctx.save_for_backward({', '.join(self.saves)})")
        if self.metas:
            metas = ", ".join(f"{name}.shape, {name}.dtype, {name}.device" for name in self.metas)
            lines.append(f"    ctx.metas = ({metas},)")
        return "\n".join([*lines, "    return result"]) + "\n"

    def backward_source(self) -> str:
        asks, tensors = self.asks, self.tensors
        lines = ["def backward(ctx, grad_output):"]
        if not self.plan.rule_is_arithmetic:
            lines += ["    if any_autocast():", "        return under_autocast(backward, ctx, grad_output)"]
        if self.saves:
            lines.append(f"    {', '.join(f'saved_{name}' for name in self.saves)}, = ctx.saved_tensors")
        handed = "grad_output"
        if self.plan.rule_writes:
            lines.append("    handed = grad_output.clone()")
            handed = "handed"
        watched = not (self.plan.rule_is_arithmetic or self.plan.rule_writes)
        if watched:
            lines.append("    version = grad_output._version")
        lines += [
            "    try:",
            f"        answer = rule({', '.join([handed, *asks])})",
            "    except Exception as error:",
            "        note(error)",
            "        raise",
        ]
        if watched:
            lines += ["    if grad_output._version != version:", "        written()"]
        if self.metas:
            metas = ", ".join(f"{name}_shape, {name}_dtype, {name}_device" for name in self.metas)
            lines.append(f"    {metas}, = ctx.metas" if len(self.metas) > 1 else f"    {metas} = ctx.metas")
        if len(tensors) == 1:
            lines += [
                f"    if type(answer) is Tensor and {self._conforms('answer', tensors[0])}:",
                "        return None, answer",
            ]
        elif len(tensors) == len(self.names):
            grads = [f"grad_{name}" for name in tensors]
            fitting = [
                f"(grad_{name} is None or type(grad_{name}) is Tensor and {self._conforms(f'grad_{name}', name)})"
                for name in tensors
            ]
            lines += [
                f"    if type(answer) is tuple and len(answer) == {len(tensors)}:",
                f"        {', '.join(grads)} = answer",
                f"        if {' and '.join(fitting)}:",
                f"            return None, {', '.join(grads)}",
            ]
        metas = ", ".join(f"({', '.join(self._known(name))})" for name in tensors)
        lines.append(f"    return check(ctx, answer, [{metas}])")
        return "\n".join(lines) + "\n"

    def _known(self, name: str) -> tuple[str, str, str]:
        """Shape, dtype and device of the tensor `name`: of the saved one, or as noted in the forward."""
        dot = f"saved_{name}." if name in self.saves else f"{name}_"
        return f"{dot}shape", f"{dot}dtype", f"{dot}device"

    def _conforms(self, grad: str, name: str) -> str:
        shape, dtype, device = self._known(name)
        if name in self.saves:  # cheaper than two devices or two shapes
            device = f"{grad}.device == {device}"
            return f"{grad}.is_same_size(saved_{name}) and {grad}.dtype is {dtype} and ({grad}.is_cpu and saved_{name}.is_cpu or {device})"
        return f"{grad}.shape == {shape} and {grad}.dtype is {dtype} and {grad}.device == {device}"

    def _call(self, names: Sequence[str]) -> str:
        positional = names[: self.layout.positional]
        keywords = zip(self.layout.keywords, names[self.layout.positional :], strict=True)
        return f"fn({', '.join([*positional, *(f'{keyword}={name}' for keyword, name in keywords)])})"

    # --- what the generated code calls when something is not plain ---

    def finish(self, values: tuple[Any, ...], aliases: list[Tensor], result: Any) -> Any:
        """The general path, for a forward that has run."""
        call = Call(self.plan, self.layout, EAGER)
        leaves = call.take_apart(values)
        return call.finish(None, None, leaves, values, aliases, result, {})

    def check(self, ctx: Any, answer: Any, metas: list[Any]) -> tuple[Any, ...]:
        """Read an answer that is not the usual one: a dict, a list, another dtype, or an error."""
        call = Call(self.plan, self.layout, EAGER)
        call.describe_plain(self.places, [Meta.of(*meta) for meta in metas], ctx.needs_input_grad[1:])
        grads, _ = read_answer(call, answer)
        return None, *grads

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
