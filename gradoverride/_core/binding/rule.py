"""A rule, read: what it asks for. There is one `Rule` for each rule, and it keeps what is made of it."""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import operator
from collections.abc import Callable, Mapping, Sequence
from types import MethodType
from typing import Any, TypeVar

from torch import nn

from gradoverride._core.binding.contract import what
from gradoverride._core.binding.signature import POSITIONAL, Forward, name_of, read_signature, runs_later
from gradoverride._core.python import purity, scan
from gradoverride.errors import RuleSignatureError

__all__ = ["Made", "Rule", "RuleCode", "passing", "writes_nothing"]

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])

_numbers = itertools.count(1)


class Made(dict[Any, Any]):
    """What was made of a rule, by key. A type of its own: who asks what holds a function is to know our own keys."""


class Rule:
    """A rule as its forward sees it: the names it asks for, and whether it may do without each."""

    def __init__(
        self,
        fn: Callable[..., Any],
        *,
        method: bool = False,
        name: str | None = None,
        place: str | None = None,
        straight_through: bool = False,
        given: str = "",
    ) -> None:
        """`given`: to whom, or for what, as an error begins with it."""
        if isinstance(fn, type) or not callable(fn):
            who = f"{given}: " if given else ""
            raise RuleSignatureError(
                f"{who}a rule is a function of the gradient, `rule(grad_output, ...)`; got {what(fn)}"
            )
        self.fn = fn
        self.number = next(_numbers)
        self.passes = "<locals>" in getattr(fn, "__qualname__", ""), self.number  # see `passing`
        self.made: dict[Any, Any] = Made()  # see `once`
        self.straight_through = straight_through  # it answers for the first differentiable argument alone
        self.jvp: Rule | None = None  # the user's own forward mode
        self.on_first_call: Callable[[Any, Any], None] | None = None  # with its first argument and result
        self.name = name or name_of(fn)
        read = fn.forward if isinstance(fn, nn.Module) else fn  # a module takes what its forward takes
        self.place = place or scan.location(read)
        later = runs_later(read)
        if later is not None:
            raise RuleSignatureError(
                f"rule {self.who} must return the gradient when it is called; it gives {later}, which runs later. Use "
                "'def' and 'return'"
            )
        self.asks: dict[str, bool] = {}  # name -> whether it must exist
        self.first = ""  # the name that the gradient has
        signature = read_signature(read)
        if signature is None:
            self._refuse_wrongly_bound()
            return  # a builtin such as torch.neg: a rule of the gradient alone
        parameters = list(signature.parameters.values())
        if method and parameters and parameters[0].kind in POSITIONAL:
            del parameters[0]
        if not parameters or parameters[0].kind not in POSITIONAL:
            raise RuleSignatureError(
                f"rule {self.who} must take the gradient as its first positional parameter, "
                f"`def {_printable(self.name)}(grad_output, ...)`; it takes {inspect.Signature(parameters)}"
            )
        self.first = parameters[0].name
        bound = _bound_by_partial(fn)
        for parameter in parameters[1:]:
            if parameter.kind is inspect.Parameter.VAR_KEYWORD or parameter.name in bound:
                continue
            if parameter.kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.POSITIONAL_ONLY):
                raise RuleSignatureError(
                    f"rule {self.who} must ask for each value by a name that can be passed as a keyword; "
                    f"'{parameter}' cannot be. Name the values it needs"
                )
            self.asks[parameter.name] = parameter.default is inspect.Parameter.empty

    def _refuse_wrongly_bound(self) -> None:
        """A partial has no signature where it binds what its function does not take, and would fail in the backward."""
        fn = self.fn
        if not isinstance(fn, functools.partial) or (taken := read_signature(fn.func)) is None:
            return
        given = [*map(repr, fn.keywords), *([f"{len(fn.args)} by position"] if fn.args else [])]
        raise RuleSignatureError(
            f"rule {self.who} must be bound to values for names that it takes ({', '.join(taken.parameters)}), but for "
            f"the gradient; functools.partial binds {' and '.join(given)}. Bind those by name"
        )

    @staticmethod
    def of(fn: Callable[..., Any], given: str = "") -> Rule:
        """That of this function: always the same, so that what was made for it, and compiled, serves again."""
        if inspect.isfunction(fn):
            kept = fn.__dict__.get(_KEPT)
            if kept is None or kept.rule.fn is not fn:  # `functools.wraps` has copied it
                kept = fn.__dict__[_KEPT] = _Kept(Rule(fn))
            return kept.rule
        with contextlib.suppress(TypeError):  # it has no hash, or is no rule
            return _of_other(_Same(fn))
        return Rule(fn, given=given)

    def once(self, key: Any, make: Callable[[], T]) -> T:
        """What `make` gives, made once for this key and kept as long as the rule is.

        Kept by the rule, for whatever else kept it would keep the rule, and all that that closes over.
        """
        if key not in self.made:
            if len(self.made) >= 1000:
                self.made.clear()
            self.made[key] = make()
        found: T = self.made[key]
        return found

    def for_forward(self, forward: Forward) -> Rule:
        """This rule for one forward. An object with `bound_to` asks for all its arguments, whatever they are called."""
        bound_to = getattr(self.fn, "bound_to", None)
        return self if bound_to is None else Rule(bound_to(forward), name=self.name, place=self.place)

    def in_copy(self, memo: Mapping[int, Any]) -> Rule:
        """This rule in a copy: of a method of what was copied too, which `copy.deepcopy` notes, that of its copy."""
        fn = self.fn
        if not isinstance(fn, MethodType) or id(fn.__self__) not in memo:
            return self
        return Rule.of(MethodType(fn.__func__, memo[id(fn.__self__)]))

    @functools.cached_property
    def code(self) -> RuleCode:
        """What its code tells. Read once, and not for each forward: it takes longer than all else that a plan needs."""
        return RuleCode(self.fn)

    @property
    def who(self) -> str:
        return f"'{self.name}' ({self.place})"


class RuleCode:
    """What the code of a rule tells: which gradient it may be handed, and which path its calls can take."""

    __slots__ = (
        *("accumulates", "calls_vjp_once", "gives_alike", "gives_no_dict", "is_algebra", "is_arithmetic"),
        *("names_by_name", "strings", "writes"),
    )

    def __init__(self, fn: Any) -> None:
        known = getattr(fn, "writes_nothing", False) or not purity.renormalizes(fn)
        self.writes = not (known and purity.writes_nothing(fn))  # it is handed a copy
        self.is_arithmetic = purity.is_arithmetic(fn)
        self.gives_no_dict = self.is_arithmetic and not purity.builds_dict(fn)  # so it answers for arguments alone
        self.is_algebra = self.is_arithmetic or purity.is_algebra(fn)
        self.gives_alike = purity.gives_alike(fn)
        self.strings = scan.strings(fn)  # a rule may answer for parameters whose names are among them
        self.names_by_name = scan.mentions(fn, "by_name")
        self.accumulates = scan.accumulates(fn)
        self.calls_vjp_once = scan.called_once(fn, "vjp")


def writes_nothing(rule: F) -> F:
    """`rule`, known to write into no gradient that it is given: so it is given the gradient itself, no copy."""
    rule.writes_nothing = True  # type: ignore[attr-defined]  # a function may have attributes
    return rule


class _Same:
    """A rule that is no function as a key. Those of this library are what they compare equal to; others may leave out
    of that what tells them apart, so each is itself alone. A bound method is made anew each time that it is asked for.
    """

    def __init__(self, fn: Any) -> None:
        self.fn = fn
        self.key: Any = id(fn)
        if isinstance(fn, MethodType):
            self.key = id(fn.__self__), id(fn.__func__)
        elif type(fn).__module__.startswith("gradoverride."):
            self.key = fn

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and bool(self.key == other.key)


@functools.lru_cache(maxsize=64)
def _of_other(same: _Same) -> Rule:
    """Of an object, a partial, a builtin."""
    return Rule(same.fn)


_KEPT = "_gradoverride_rule"


class _Kept:
    """The rule of a function, kept by the function: so it goes when that goes. Copies and pickles leave it behind."""

    __slots__ = ("rule",)

    def __init__(self, rule: Rule) -> None:
        self.rule = rule

    def __reduce__(self) -> Any:
        return type(None), ()


def passing(rules: Sequence[Rule]) -> Rule:
    """The one to keep what is made of several: that which goes first, for one that stays would keep it.

    A function that was made in another goes before what stands in a module, a later one before an earlier one.
    """
    return max(rules, key=_passes)


_passes = operator.attrgetter("passes")


def _bound_by_partial(fn: Any) -> set[str]:
    bound: set[str] = set()
    while isinstance(fn, functools.partial):
        bound.update(fn.keywords)
        fn = fn.func
    return bound


def _printable(name: str) -> str:
    return name if name.isidentifier() else "rule"
