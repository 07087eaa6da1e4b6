"""The short path: which calls can take it, and the generated code between a call and its Function.

To read that code, print what `ShortPath.body` gives.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from gradoverride._core.autograd.aliases import has_other_data
from gradoverride._core.autograd.ambient import EAGER
from gradoverride._core.binding.layout import Layout
from gradoverride._core.calls.forward_pass import differentiate
from gradoverride._core.calls.plan import Plan
from gradoverride._core.calls.short_function import ShortFunction, compiled
from gradoverride._core.graph.kept_graph import KeptGraph, outer_of, shares_versions
from gradoverride._core.private.engine import can_call_directly, fast_apply
from gradoverride._core.private.tensors import shares_memory, version_of
from gradoverride._core.private.transforms import (
    IN_FORWARD_AD,
    IN_TRACER,
    dual_levels,
    fx_tracer,
    in_functorch,
    is_jit_tracing,
    jit_tracer,
)
from gradoverride._core.python.by_class import standing
from gradoverride._core.python.reach import SCALARS, Reach

__all__ = ["FittingClasses", "Runs", "ShortPath", "guessed_places", "is_number", "is_plain", "of_module", "reach_of"]


def is_plain(plan: Plan) -> bool:
    """Whether calls of `plan` can take the short path at all."""
    parameters = plan.forward.parameters
    return (
        parameters != []
        and all(p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters or ())
        and (not plan.takes_receiver or _is_plain_method(plan))
        and (not plan.hands_over or _hands_over_plainly(plan))
        and not plan.keeps_given
        and (plan.class_form or not plan.rule_code.accumulates)
        and not (plan.forward_asks_grad and plan.reach is None and not plan.asks_vjp)
        and can_call_directly()
        and all(
            source in ("argument", "deferred") or name in ("input", "needs", "output", "vjp")
            for name, source in plan.sources.items()
        )
    )


def _is_plain_method(plan: Plan) -> bool:
    return (
        plan.forward.takes_self
        and plan.reach is not None
        and not plan.straight_through
        and (_has_own_backward(plan) if plan.class_form else plan.runs_inside or _asks_vjp_alone(plan))
        and not plan.reach.attributes & plan.reserved  # which comes before the reserved one
    )


def _has_own_backward(plan: Plan) -> bool:
    """Whether no stand-in is needed for the `backward` of a class, which asks for no parameter by name."""
    return plan.own_backward is not None and plan.runs_inside and "deferred" not in plan.sources.values()


def _asks_vjp_alone(plan: Plan) -> bool:
    """Whether the rule asks for no parameter, and for `vjp` once: more than that has its own way in a checkpoint."""
    return plan.asks_vjp and plan.calls_vjp_once and "deferred" not in plan.sources.values()


def _hands_over_plainly(plan: Plan) -> bool:
    """Whether what the rule asks for is handed over, by a forward that runs in the Function."""
    handed_over = "deferred" in plan.sources.values()
    return handed_over and plan.runs_inside and not (plan.takes_receiver or plan.straight_through)


def guessed_places(plan: Plan) -> list[int]:
    """Where tensors are expected: parameters without a default, or with one that is no scalar."""
    parameters = plan.forward.parameters or []
    return [index for index, p in enumerate(parameters) if p.default is p.empty or type(p.default) not in SCALARS]


def reach_of(plan: Plan) -> Reach | None:
    """What a forward can reach, and what the `backward` of its class calls."""
    reach = plan.reach
    if reach is None or plan.own_backward is None:
        return reach
    return Reach([*reach.names, *plan.own_backward.called], reach.attributes, reach.methods)


class FittingClasses(dict[type, bool]):
    """By class, whether what a method, and a `backward`, reads of its instances is what stands there."""

    def __init__(self, plan: Plan) -> None:
        self.known = plan.reach is not None
        self.names = {
            *(plan.reach.attributes if plan.reach is not None else ()),
            *(plan.own_backward.read if plan.own_backward is not None else ()),
        }
        self.others: weakref.WeakSet[type] = weakref.WeakSet()  # torch makes some for one module: see `by_class`

    def __missing__(self, cls: type) -> bool:
        if cls in self.others:
            return False
        fits = (
            self.known
            and issubclass(cls, nn.Module)
            and cls.__getattr__ is nn.Module.__getattr__
            and cls.__getattribute__ is nn.Module.__getattribute__
            and all(type(standing(cls, name)) in SCALARS for name in self.names)
        )
        if fits:
            self[cls] = True
        else:
            self.others.add(cls)
        return fits


def is_number(module: nn.Module, name: str) -> bool:
    """Whether this attribute of `module` is a number, or several, or a buffer, and so has no gradient."""
    value = getattr(module, name, module)
    if type(value) in SCALARS:
        return True
    if type(value) is tuple or type(value) is list:
        return all([type(part) in SCALARS for part in value])
    return type(value) is Tensor and not value.requires_grad


class Runs(dict[tuple[type, ...], Callable[..., Any]]):
    """By the types of the arguments, the code for such a call. It is made when they are first met.

    `layout`: None for a builtin without a signature, which may be given any number of them.
    """

    def __init__(self, plan: Plan, layout: Layout | None) -> None:
        self.plan = plan
        self.layout = layout

    def __missing__(self, kinds: tuple[type, ...]) -> Callable[..., Any]:
        layout = self.plan.layouts.of(len(kinds), ()) if self.layout is None else self.layout
        places = [index for index, kind in enumerate(kinds) if kind is Tensor or kind is nn.Parameter]
        tuples = [index for index, kind in enumerate(kinds) if kind is tuple]
        others = [kind for index, kind in enumerate(kinds) if index not in (*places, *tuples)]

        def general(*values: Any) -> Any:
            return differentiate(self.plan, layout, None, values)

        def of_scalars(*values: Any) -> Any:
            if all([SCALARS.issuperset(map(type, values[index])) for index in tuples]):
                return short(*values)
            return general(*values)

        if not places or not SCALARS.issuperset(others):
            self[kinds] = general
        else:
            short = ShortPath(self.plan, layout, places).run()
            self[kinds] = of_scalars if tuples else short
        return self[kinds]


class ShortPath:
    """The code for calls of a plan whose tensors stand at `places`. Its own names begin with `_go_`."""

    def __init__(self, plan: Plan, layout: Layout, places: list[int]) -> None:
        self.plan = plan
        self.layout = layout
        self.places = places
        self.reach = reach_of(plan)
        self.function = ShortFunction(plan, layout, places, EAGER)
        self.flowing = self._leaving_parameters()

    def _leaving_parameters(self) -> ShortFunction | None:
        """The Function of calls whose rule leaves parameters of the module to autograd, if they can be short too."""
        plan = self.plan
        if plan.reach is None or plan.class_form or self.function.params or not self.function.direct:
            return None
        # On aliases it does what it does on the arguments; and the rule can answer for none of the parameters.
        fits = plan.takes_receiver and not plan.forward_may_write and plan.rule_code.gives_no_dict
        left = plan.reach.attributes if fits else None
        return ShortFunction(plan, self.layout, self.places, EAGER, left) if left else None

    def globals(self) -> dict[str, Any]:
        """The names that the code of a call refers to, with a new Function."""
        names = self.function.globals()
        flowing = self.flowing
        return {
            **names,
            "_go_flow": None if flowing is None else fast_apply(flowing.make({**names, **flowing.globals()})),
            "_go_outer_of": outer_of,
            **(self.reach.conditions()[1] if self.reach is not None else {}),
            "_go_asks_grad": self.plan.asks_grad,
            "_go_apply": fast_apply(self.function.make({**names})),
            "_go_finish": self.function.finish,
            "_go_fits": FittingClasses(self.plan),
            "_go_own_rule": self.plan.rule.fn,
            "_go_dual_levels": dual_levels,
            "_go_general": lambda receiver, *values: differentiate(self.plan, self.layout, receiver, values),
            "_go_has_other_data": has_other_data,
            "_go_in_functorch": in_functorch,
            "_go_fx_tracer": fx_tracer,
            "_go_is_jit_tracing": is_jit_tracing,
            "_go_jit_tracer": jit_tracer,
            "_go_is_number": is_number,
            "_go_kept_graph": KeptGraph.alone,
            "_go_Parameter": nn.Parameter,
            "_go_shares_memory": shares_memory,
            "_go_version_of": version_of,
        }

    def run(self) -> Callable[..., Any]:
        """The code as a function of its own."""
        arguments, names = self.function.names, self.globals()
        compiled("\n".join([f"def run({', '.join(arguments)}):", *self.body(arguments)]) + "\n", names, self.plan)
        run: Callable[..., Any] = names["run"]
        return run

    def body(self, arguments: Sequence[str], receiver: str = "None") -> list[str]:
        """The code of a call in which grad mode is on, with these names for the arguments."""
        tensors = [arguments[place] for place in self.places]
        general = f"        return _go_general({receiver}, {', '.join(arguments)})"
        ambient = "" if self.plan.rule_code.is_arithmetic else " or _go_any_autocast()"
        lines = [f"    if _go_in_functorch() or {IN_FORWARD_AD} or {IN_TRACER}{ambient}:", general]
        if self.reach is not None and self.reach.names:
            lines += [f"    if {self.reach.conditions()[0]}:", general]
        if self.plan.takes_receiver:
            return lines + self._method_body(arguments, receiver, general)
        lines += [
            *(f"    {_wants(name)} = {name}.requires_grad" for name in tensors),
            f"    if not ({' or '.join(map(_wants, tensors))}):",
            "        if _go_is_jit_tracing():",
            f"    {general}",
            general if self.plan.hands_over else f"        return {self.function.called(arguments, receiver)}",
        ]
        floating = [f"{name}.dtype in _go_FLOATING" for name in tensors]
        if self.plan.asks_vjp:
            if len(tensors) > 1:
                lines += [f"    if not ({' and '.join(floating)}):", general]
            return lines + self._kept_body(arguments, receiver)
        if len(tensors) > 1:
            fits = [f"({_wants(name)} or {is_floating})" for name, is_floating in zip(tensors, floating, strict=True)]
            if self.plan.straight_through:  # for the first alone
                fits[0] = _wants(tensors[0])
            lines += [f"    if not ({' and '.join(fits)}):", general]
        if self.function.direct:
            return lines + self._direct_body(arguments, receiver)
        return lines + self._aliased_body(arguments)

    def _direct_body(self, arguments: Sequence[str], receiver: str, more: Sequence[str] = ()) -> list[str]:
        """The forward runs in the Function, as by hand: nothing that it can reach besides has a gradient to lose."""
        tensors = [arguments[place] for place in self.places]
        boxed = [receiver] if self.plan.takes_receiver else []
        boxed += self._others(arguments)
        given = [f"({', '.join(boxed)},)"] if boxed else []
        first = "[0]" if self.function.residuals else ""
        return [
            "    try:",
            f"        return _go_apply({', '.join([*given, *tensors, *more])}){first}",
            "    except _go_Unusual as _go_unusual:",
            "        _go_found, *_go_more = _go_unusual.args",
            f"    _go_given = ({', '.join(arguments)},), [{', '.join(tensors)}]",
            f"    return _go_finish({receiver}, *_go_given, _go_found, None, *_go_more, on_leaves=True)",
        ]

    def _aliased_body(self, arguments: Sequence[str]) -> list[str]:
        """The forward runs on aliases without a gradient: a result that requires one reached something else."""
        tensors = [arguments[place] for place in self.places]
        aliases = [f"{_alias(name)} = {name}.data if {_wants(name)} else {name}" for name in tensors]
        written = [f"{_wants(name)} and {_alias(name)}._version" for name in tensors]
        before = "None"
        lines = []
        if self.plan.forward_asks_grad is None:
            lines = ["    if _go_asks_grad():", f"        return _go_general(None, {', '.join(arguments)})"]
        if len(tensors) == 1:
            aliases, written = [f"{_alias(tensors[0])} = {tensors[0]}.data"], [f"{_alias(tensors[0])}._version"]
        elif self.plan.forward_may_write:  # into what needs no gradient too, and is no alias
            aliases += [
                f"{_version(name)} = 0 if {_wants(name)} else None if {name}.is_inference() else {name}._version"
                for name in tensors
            ]
            written = [
                f"{_version(name)} is not None and {_alias(name)}._version != {_version(name)}" for name in tensors
            ]
            before = f"[{', '.join(map(_version, tensors))}]"
        unusual = self.function.unusual(list(map(_alias, tensors)), "_go_result")
        unusual += ["_go_result.requires_grad", "_go_result.is_inference()", *written, *self._other_data(tensors)]
        if self.plan.may_give_memory:
            unusual += [f"_go_shares_memory(_go_result, {_alias(name)})" for name in tensors]
        found = f"({', '.join(arguments)},), [{', '.join(map(_alias, tensors))}], _go_result"
        return [
            *lines,
            # An alias has a version counter of its own, which shows writes in place.
            *(f"    {alias}" for alias in aliases),
            *self._shared_attributes(tensors),
            f"    _go_result = {self._call_on_aliases(arguments, 'None')}",
            f"    if {' or '.join(unusual)}:",
            f"        return _go_finish(None, {found}, None, {before})",
            # Somebody else may hold the result (a cached buffer), and would find it turned into an output.
            "    if _go_getrefcount(_go_result) != _go_SOLE or _go_use_count(_go_result) != 1:",
            "        _go_result = _go_result.detach()",
            f"    return _go_apply(({', '.join(['_go_result', *self._others(arguments)])},), {', '.join(tensors)})",
        ]

    def _kept_body(self, arguments: Sequence[str], receiver: str) -> list[str]:
        """The forward runs on aliases that start a graph, which is kept for `vjp`."""
        tensors = [arguments[place] for place in self.places]
        aliases = ", ".join(map(_alias, tensors))
        unusual = self.function.unusual(list(map(_alias, tensors)), "_go_result")
        shares, before, versions = shares_versions(self.plan.forward_may_write), [], "None"
        if not shares:
            unusual += [f"{_wants(name)} and {_alias(name)}._version" for name in tensors]
            if len(tensors) == 1:
                unusual[-1] = f"{_alias(tensors[0])}._version"
        elif self.plan.forward_is_arithmetic:  # it writes nowhere
            versions = f"[{', '.join(f'_go_version_of({_alias(name)})' for name in tensors)}]"
        else:
            for name in tensors:
                known, now = _version(name), f"{_alias(name)}._version"
                before.append(f"    {known} = {now} if {_wants(name)} else _go_version_of({_alias(name)})")
                unusual.append(f"{known} is not None and {now} != {known}")
            versions = f"[{', '.join(map(_version, tensors))}]"
        found = f"({', '.join(arguments)},), [{aliases}]"
        if self.reach is None:
            unusual += ["_go_result.is_inference()", "_go_graph.stray(_go_result)"]
        unusual += self._other_data(tensors)
        boxed = ["_go_result.detach()", "_go_graph", "_go_graph.end((_go_result,))", *self._others(arguments)]
        guard = ["    _go_graph.guard(_go_plan.forward.who)"] if self.reach is None else []
        return [
            f"    _go_graph = _go_kept_graph(({', '.join(tensors)},), {shares})",
            f"    {aliases}, = _go_graph.start()",
            *self._shared_attributes(tensors),
            *before,
            f"    _go_result = {self._call_on_aliases(arguments, receiver)}",
            f"    if {' or '.join(unusual)}:",
            f"        return _go_finish({receiver}, {found}, _go_result, _go_graph, {versions})",
            *guard,
            f"    return _go_apply(({', '.join(boxed)},), {', '.join(tensors)})",
        ]

    def _method_body(self, arguments: Sequence[str], receiver: str, general: str) -> list[str]:
        """A method of a module all of whose parameters the rule asks for, and which reads nothing else that counts."""
        assert self.reach is not None, "`is_plain` has looked"
        tensors = [arguments[place] for place in self.places]
        params = [of_module(name) for name in self.function.params]
        unfit = [f"{receiver}._modules", f"_go_len(_go_parameters) != {len(params)}"]
        if self.plan.reserved:  # a buffer may bear that name
            unfit.append(f"{receiver}._buffers")
        left = self._leaving_body(arguments, receiver, general)
        for name in self.function.params:
            unfit.append(f"_go_type({of_module(name)} := _go_parameters.get({name!r})) is not _go_Parameter")
            unfit.append(f"not {of_module(name)}.requires_grad or {name!r} in _go_state")
        unfit += [
            f"not _go_is_number({receiver}, {name!r})"
            for name in sorted(self.reach.attributes - {*self.function.params})
        ]
        unfit += [f"{name!r} in _go_state" for name in sorted(self.reach.methods)]
        if self.plan.class_form:
            unfit.append(f"_go_type({receiver}).backward is not _go_own_rule")  # a subclass may have another
            unfit.append("'backward' in _go_state")
            numbers = self.function.numbers
            unfit += [f"_go_type(_go_getattr({receiver}, {name!r}, _go_state)) not in _go_SCALARS" for name in numbers]
        lines = [
            f"    if not _go_fits[_go_type({receiver})]:",
            general,
            f"    _go_state = {receiver}.__dict__",
            f"    _go_parameters = {receiver}._parameters",
            *left,
            f"    if {' or '.join(unfit)}:",
            general,
            *(f"    {_wants(name)} = {name}.requires_grad" for name in tensors),
        ]
        unfit = [f"not {_wants(name)} and {name}.dtype not in _go_FLOATING" for name in tensors]
        if not params:
            unfit.append(f"not ({' or '.join(map(_wants, tensors))})")
        lines += [f"    if {' or '.join(unfit)}:", general]
        if self.function.direct:
            return lines + self._direct_body(arguments, receiver, params)
        return lines + self._kept_body(arguments, receiver)

    def _leaving_body(self, arguments: Sequence[str], receiver: str, general: str) -> list[str]:
        """The forward runs on aliases of the arguments and on the parameters themselves, to which its result leads."""
        if self.flowing is None or self.reach is None:
            return []
        tensors = [arguments[place] for place in self.places]
        unfit = [f"{receiver}._buffers"] if self.plan.reserved else []  # a buffer may bear that name
        for name in sorted(self.reach.attributes):
            is_parameter = f"_go_type(_go_parameters.get({name!r})) is _go_Parameter and {name!r} not in _go_state"
            unfit.append(f"not ({is_parameter} or _go_is_number({receiver}, {name!r}))")
        unfit += [f"{name!r} in _go_state" for name in sorted(self.reach.methods)]
        unfit += [f"not {name}.requires_grad" for name in tensors]
        known = dict(zip(self.function.names, arguments, strict=True))
        constants = [known[name] for name in self.flowing.more[1:]]
        aliases = ", ".join(map(_alias, tensors))
        versions = ", ".join(f"_go_version_of({_alias(name)})" for name in tensors)
        found = f"({', '.join(arguments)},), [{aliases}], _go_result, None, [{versions}]"
        return [
            "    if _go_parameters:",
            f"        if {' or '.join(unfit)}:",
            f"    {general}",
            *(f"        {_alias(name)} = {name}.detach()" for name in tensors),
            f"        _go_result = {self._call_on_aliases(arguments, receiver)}",
            f"        if {' or '.join(self.flowing.unusual(list(map(_alias, tensors)), '_go_result'))}:",
            f"            return _go_finish({receiver}, {found})",
            f"        _go_outer = _go_outer_of(({', '.join(tensors)},))",
            f"        return _go_flow({', '.join(['_go_result', '_go_outer', *constants, *tensors])})",
        ]

    def _shared_attributes(self, tensors: Sequence[str]) -> list[str]:
        if not self.plan.uses_attributes:
            return []
        return [f"    {_alias(name)}.__dict__ = {name}.__dict__" for name in tensors]

    def _other_data(self, tensors: Sequence[str]) -> list[str]:
        """What is true where the forward has given an alias other data."""
        if not self.plan.may_give_data:
            return []
        return [f"{_alias(name)} is not {name} and _go_has_other_data({_alias(name)}, {name})" for name in tensors]

    def _call_on_aliases(self, arguments: Sequence[str], receiver: str) -> str:
        names = [_alias(name) if place in self.places else name for place, name in enumerate(arguments)]
        return self.function.called(names, receiver)

    def _others(self, arguments: Sequence[str]) -> list[str]:
        return [name for place, name in enumerate(arguments) if place not in self.places]


def _alias(name: str) -> str:
    return f"_go_{name}_alias"


def _version(name: str) -> str:
    return f"_go_{name}_version"


def of_module(name: str) -> str:
    """The variable of the generated code for an attribute of the module: none of its own names begins so."""
    return f"_go_p_{name}"


def _wants(name: str) -> str:
    return f"_go_{name}_wants"
