"""The forward of a class of modules under the layers in force on a module: one rule in another."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from gradoverride._core.binding.rule import Rule, passing
from gradoverride._core.binding.signature import Forward
from gradoverride._core.calls.plan import Plan
from gradoverride._core.calls.wrapper import make_wrapper
from gradoverride._core.in_force import everywhere
from gradoverride._core.in_force.layers import FunctionLayer, FunctionRule, Layer, Order
from gradoverride._core.in_force.tally import Trace
from gradoverride._core.python.by_class import RECORD
from gradoverride._core.torch_functions.callers import calls_that_are
from gradoverride._core.torch_functions.function_mode import quieted, scope_of, scoped
from gradoverride.errors import UnsupportedError

__all__ = ["Chain", "Subject", "chain_of", "forward_of", "links"]


def forward_of(base: Any, fn: Any = None) -> Forward:
    """The forward of a class of modules, or what stands for it, as a rule sees it."""
    return Forward(everywhere.bare_forward(base) if fn is None else fn, name=base.__name__, method=True, owner=base)


class Subject(NamedTuple):
    """What a module is to rules."""

    base: Any  # its class, or that of which ours is derived
    called: frozenset[str]  # the functions of torch that it is nothing but a call of
    plain: bool  # whether it has no parameters

    @classmethod
    def of(cls, base: Any, module: Any) -> Subject:
        return cls(base, calls_that_are(base, module), not module._parameters)


class Links(NamedTuple):
    """What a chain is made of."""

    rules: tuple[Rule, ...]  # the last one outermost
    scope: tuple[FunctionRule, ...]  # for what the forward calls
    quiet: tuple[FunctionRule, ...]  # not for what it calls: it has another rule for that
    counted: tuple[Layer, ...]  # whose rules are among `rules`, and that are not of this module alone


def links(subject: Subject, layers: Sequence[Layer], functions: Sequence[FunctionLayer]) -> Links:
    """What is in force on such a module that has these layers of its own, and in which order.

    A module that is nothing but a call of a function has one rule of each override: its own, not that of the function;
    and where only a later override has one for the function, that is outside of the earlier ones, as a rule of the
    module.
    """
    if not functions and not everywhere.classes and not everywhere.functions:
        return Links(tuple([layer.rule for layer in layers]), (), (), ())
    of_class = everywhere.layers_on(subject.base)
    own = sorted((*layers, *of_class), key=_order)
    within = sorted((*functions, *everywhere.functions), key=_order)
    steps: list[tuple[Order, Rule]] = [(layer.order, layer.rule) for layer in own]
    quiet: list[FunctionRule] = []
    counted: list[Layer] = sorted(of_class, key=_order)
    for layer in within if own else ():
        if layer.key.name not in subject.called:
            continue
        if any(layer.order == other.order for other in own):
            quiet.append(layer.key)
        elif layer.order > own[0].order:
            _check_outside(subject, layer, own[0])
            steps.append((layer.order, layer.rule))
            quiet.append(layer.key)
            counted.append(layer)
    steps.sort(key=lambda step: step[0])
    scope = tuple([layer.key for layer in within if layer.key not in quiet]) if functions else ()
    return Links(tuple([rule for _, rule in steps]), scope, tuple(quiet), tuple(counted))


_order = operator.attrgetter("order")


def _check_outside(subject: Subject, layer: FunctionLayer, earlier: Layer) -> None:
    """Whether a rule for a function can be one for such modules, which are nothing but a call of it."""
    base = subject.base
    forward = forward_of(base)
    if not subject.plain or len(forward.parameters or ()) != 1:
        raise UnsupportedError(
            f"override of function '{layer.key.name}': the rule {layer.rule.who} must be outside of the earlier rule "
            f"{earlier.rule.who} of the '{base.__name__}' that calls it; it is one of the call inside. Give it the "
            f"target '{base.__name__}'"
        )
    Plan(forward, layer.rule)  # raises what is wrong with the rule


class Chain:
    """The forward of a class under rules. Modules of a class under the same rules share it."""

    __slots__ = ("forward", "scope", "trace")

    def __init__(self, base: Any, innermost: Any, found: Links) -> None:
        """`innermost`: the forward of the base, which somebody may replace."""
        self.trace = Trace()
        forward: Callable[..., Any] = innermost
        self.scope = scope_of(found.scope, _functions_on) if found.scope else None  # what calls its other methods
        if self.scope is not None:
            forward = scoped(forward, self.scope)

        def on_trace() -> None:
            self.trace.note()
            if everywhere.bare_forward(base) is not innermost:
                raise UnsupportedError(
                    f"'{base.__name__}' must keep its 'forward' while one is overridden and compiled; it has been "
                    "replaced since. Override the module after that"
                )

        for number, rule in enumerate(found.rules, 1):
            plan = Plan(forward_of(base, forward), rule)
            plan.on_trace, plan.marked = on_trace, True
            if number == len(found.rules):  # which is called first; the same rule may be there twice
                plan.on_unrecorded = _note_unrecorded
            forward = make_wrapper(plan, forward)
        if found.quiet:
            forward = quieted(forward, found.quiet)
        self.forward = forward


def chain_of(base: Any, found: Links) -> Chain:
    """The forward of modules of the class `base` made of these."""
    innermost = everywhere.bare_forward(base)
    rules = (*found.rules, *[key.rule for key in (*found.scope, *found.quiet)])
    # By identity, as long as the chain has it: see `bare_forward`.
    key = (Chain, base, id(innermost), found.rules, found.scope, found.quiet)
    return passing(rules).once(key, lambda: Chain(base, innermost, found))


def _note_unrecorded(module: Any) -> None:
    """A call of a module records no graph."""
    record = module.__dict__.get(RECORD)
    for one in everywhere.layers_on(type(module)) if record is None else (record, *record.counted):
        one.tally.note_unrecorded()


def _functions_on(module: Any) -> Sequence[FunctionLayer]:
    record = module.__dict__.get(RECORD)  # gone where a rule calls the forward again, and the override has been left
    return () if record is None else record.functions
