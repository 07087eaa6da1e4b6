"""What is known of a rule by its code, for forwards whose rule comes with each call: a lambda is made anew every time.

A `Plan` takes 400 us to make, and what it says follows from the code of the rule and the names that it takes. So it
is kept by these; the rule itself, with all that its closure holds, is that of the `Call`.
"""

from __future__ import annotations

import functools
from types import CellType, CodeType, FunctionType, MethodType
from typing import Any

from torch import Tensor, nn

from gradoverride._core.binding.rule import Rule
from gradoverride._core.binding.signature import Forward, resolve
from gradoverride._core.calls.plan import Plan
from gradoverride._core.private.dynamo import as_dynamo_hands_on, defaults_while_tracing, is_named_while_tracing
from gradoverride._core.python.purity import gives_alike
from gradoverride._core.python.scan import content
from gradoverride.errors import RuleSignatureError

__all__ = [
    *("Reading", "Readings", "holds_numbers", "keep_own_plan", "keep_plan", "kept_plan", "made_outside", "unbound"),
]


class Reading:
    """What is known of rules of one code for one forward, whatever their closures, defaults and attributes hold."""

    __slots__ = (
        *("code", "forward", "gives_alike", "holds", "is_edit", "of_values", "plain", "plan", "rule_code", "sources"),
        *("value_second", "writes"),
    )

    def __init__(self, forward: Forward, rule: Any, is_edit: bool) -> None:
        if hasattr(rule, "bound_to"):
            raise RuleSignatureError(
                f"rule {Rule(rule).who} must have a forward with arguments, to evaluate it again; '{forward.name}' has "
                "none. Use it with custom_backward or bridge"
            )
        function = _function_in(rule)
        self.forward = forward
        self.is_edit = is_edit
        self.code = function and function.__code__  # kept, for its id is what this reading is found by
        self.holds = function is not None and bool(function.__closure__)
        read = Rule(rule, given=forward.name)
        self.sources = resolve(read, forward, may_defer=False)
        # Whether it asks for nothing but arguments and the result.
        self.of_values = all(
            source == "argument" or name in ("input", "output") for name, source in self.sources.items()
        )
        # Whether it may be given the value of the only argument by position, which takes less time than by name.
        code = function.__code__ if function is rule and function is not None else None
        names = code.co_varnames[1 : min(2, code.co_argcount)] if code is not None else ()
        self.value_second = self.of_values and tuple(self.sources) == names
        # Writes nothing, and its answer is like the gradient, under autocast too: if its closure holds real numbers.
        self.gives_alike = gives_alike(rule, free=True)
        self.rule_code = read.code
        self.writes = self.rule_code.writes
        # Writes nothing, holds nothing, stays on its device, and means the same under autocast.
        self.plain = self.rule_code.is_arithmetic
        self.plan: Plan | None = None

    def hands_copy(self, rule: Any) -> bool:
        """Whether a rule of this code is to be given a copy of the gradient."""
        if self.writes or not self.holds:
            return self.writes
        function = rule if type(rule) is FunctionType else _function_in(rule)
        cells = function.__closure__  # type: ignore[union-attr]  # it has one
        return not all([type(content(cell)) in _PLAIN for cell in cells or ()])

    def plan_for(self, rule: Any) -> Plan:
        """The plan of the forward and of rules of this code. It does not hold the rule, which is the call's."""
        if self.plan is None:
            read = Rule(rule)
            read.code = self.rule_code
            self.plan = Plan(self.forward, read, is_edit=self.is_edit)
            self.plan.rule.fn = _given_with_the_call
            self.plan.rule_comes_with_call = True
            self.plan.rule_writes = self.writes or self.holds  # and what that is differs
        return self.plan


class Readings(dict[Any, Reading]):
    """The readings for one forward. `is_edit`: see `Plan`."""

    def __init__(self, forward: Forward, *, is_edit: bool = False) -> None:
        self.forward = forward
        self.is_edit = is_edit

    def of(self, rule: Any) -> Reading:
        """What is known of `rule`. Raises `RuleSignatureError`."""
        bare = type(rule) is FunctionType and rule.__defaults__ is None and rule.__kwdefaults__ is None
        key = id(rule.__code__) if bare else _key(rule)
        found = None if key is None else self.get(key)
        if found is None:
            found = Reading(self.forward, rule, self.is_edit)
            if key is not None and not _is_wrapped(rule):
                if len(self) >= 1000:
                    self.clear()
                self[key] = found
        return found


def _key(rule: Any) -> Any:
    """The same for rules of the same code that take the same names. None for what is known by no code."""
    if isinstance(rule, FunctionType):
        return id(rule.__code__), len(rule.__defaults__ or ()), *(rule.__kwdefaults__ or ())
    if isinstance(rule, functools.partial):
        inner = _key(rule.func)
        return None if inner is None else (inner, len(rule.args), *sorted(rule.keywords))
    if isinstance(rule, MethodType):
        return (MethodType, _key(rule.__func__)) if isinstance(rule.__func__, FunctionType) else None
    return type(rule) if _is_known_by_class(rule) else None


def _is_known_by_class(rule: Any) -> bool:
    """Whether this is an object that is called by a method of its class, and has no signature of its own."""
    return isinstance(type(rule).__call__, FunctionType) and not hasattr(rule, "__signature__")


def _is_wrapped(rule: Any) -> bool:
    """Whether the code is that of a wrapper, and the names it takes are those of what it wraps."""
    return hasattr(_function_in(rule), "__wrapped__")


def _function_in(rule: Any) -> FunctionType | None:
    while isinstance(rule, functools.partial):
        rule = rule.func
    if isinstance(rule, MethodType):
        rule = rule.__func__
    return rule if isinstance(rule, FunctionType) else None


def holds_numbers(rule: FunctionType) -> bool:
    """Whether its closure holds real numbers alone."""
    return all([type(content(cell)) in _NUMBERS for cell in rule.__closure__ or ()])


_NUMBERS = frozenset({bool, int, float})
_PLAIN = frozenset({*_NUMBERS, Tensor, nn.Parameter, complex, str, type(None)})  # what cannot write for a rule


def _given_with_the_call(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("the rule is that of the call")


# --- while Dynamo traces, where a lambda that is made within is no object yet


def unbound(rule: Any) -> tuple[Any, tuple[Any, ...]]:
    """What stands for a rule as an argument of a function that is evaluated while tracing: it holds no tensors.

    Besides, the names that are bound in it; and last, where only its code is left, `defaults_while_tracing`.
    """
    bound: list[str] = []
    while isinstance(rule, functools.partial) and not rule.args:
        bound += rule.keywords
        rule = rule.func
    if isinstance(rule, FunctionType):
        if rule.__code__.co_freevars:
            return rule.__code__, (*bound, defaults_while_tracing(rule))
        return rule, tuple(bound)
    if isinstance(rule, MethodType) and isinstance(rule.__func__, FunctionType):  # of an object that may hold tensors
        function, defaults = unbound(rule.__func__)
        return (None, function), (*bound, *defaults)
    # An object would be guarded by its identity, and each one compiled anew.
    return ((type(rule),) if _is_known_by_class(rule) else rule), tuple(bound)


def made_outside(rule: Any) -> bool:
    """Whether a rule is what it is without the code that Dynamo traces: nothing of that is in it."""
    if is_named_while_tracing(rule):
        return not isinstance(rule, MethodType)  # which Dynamo binds anew
    return isinstance(rule, FunctionType) and not rule.__code__.co_freevars and defaults_while_tracing(rule) == (0,)


def keep_own_plan(readings: Readings, rule: Any) -> str:
    """Keep a plan that holds this rule, which is made outside, under a name that this returns: `kept_plan`.

    (Dynamo is to see the rule itself, for what is another one the next time.)
    """
    name = f"own_{id(rule)}"
    if not hasattr(_Plans, name):
        try:
            setattr(_Plans, name, Plan(readings.forward, Rule(rule), is_edit=readings.is_edit))
        except RuleSignatureError as error:
            raise as_dynamo_hands_on(error) from None
    return name


def keep_plan(readings: Readings, rule: Any, bound: tuple[Any, ...]) -> str:
    """Keep the plan for an `unbound` rule, under a name that this returns: `kept_plan`.

    Where only the code is there, it has lost what its defaults are; where only the class, its attributes; a method its
    object.
    """
    is_method = isinstance(rule, tuple) and len(rule) == 2
    if is_method:
        rule = rule[1]
    elif isinstance(rule, tuple):
        rule = object.__new__(rule[0])  # an object of this class, with nothing in it
    if isinstance(rule, CodeType):
        (count, *names), bound = bound[-1], bound[:-1]
        rule = FunctionType(rule, {}, None, (None,) * count, tuple([CellType() for _ in rule.co_freevars]))
        rule.__kwdefaults__ = dict.fromkeys(names)
    if is_method:
        rule = MethodType(rule, object())
    if bound:
        rule = functools.partial(rule, **dict.fromkeys(bound))
    try:
        plan = readings.of(rule).plan_for(rule)
    except RuleSignatureError as error:
        raise as_dynamo_hands_on(error) from None
    name = f"plan_{id(plan)}"
    setattr(_Plans, name, plan)
    return name


def kept_plan(name: str) -> Plan:
    """The plan that was kept under this name."""
    plan: Plan = getattr(_Plans, name)
    return plan


class _Plans:
    """Plans as attributes: Dynamo needs a place to know an object by."""
