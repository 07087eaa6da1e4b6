"""What a forward offers and what a rule asks for. Read once, when a rule is attached.

A rule is a plain function: its first parameter is the gradient with respect to the forward's result, each other one
asks for a value by name. This file turns that into two values, `Forward` and `Rule`, and into one error that lists
what exists. It imports no torch: a second framework reads rules the same way.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import itertools
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MethodType
from typing import Any, TypeVar

from torch import nn

from gradoverride._core import scan
from gradoverride._core.private import written_as
from gradoverride.errors import RuleSignatureError

__all__ = [
    "RESERVED",
    "Forward",
    "Made",
    "Rule",
    "kind_of",
    "name_of",
    "passing",
    "resolve",
    "signature_asking",
    "takes",
    "unknown_name",
    "writes_nothing",
]

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])

_numbers = itertools.count(1)

RESERVED = ("input", "output", "vjp", "needs", "params", "module", "forward")

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_RECEIVERS = ("self", "cls", "mcs")


def name_of(fn: Any) -> str:
    """The user's name for a callable, for messages and for the node in the graph."""
    while isinstance(fn, functools.partial):
        fn = fn.func
    name = getattr(fn, "__name__", None)
    if (name is None or name == type(fn).__name__) and type(fn).__module__.startswith("torch."):
        name = getattr(fn, "name", None)  # a scripted function may have that of its class for its own
    return name if isinstance(name, str) else type(fn).__name__


class Forward:
    """A callable as its rule sees it: name, place, parameters, and whether a receiver (`self`) comes first.

    `parameters` leaves the receiver out. It is None for a builtin without a signature, which offers no names.
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        *,
        name: str | None = None,
        receiver: Any = None,
        signature: inspect.Signature | None = None,
        place: str | None = None,
        method: bool | None = None,
        as_given: bool | None = None,
        reserved: Sequence[str] = RESERVED,
        lacks: str = "",
    ) -> None:
        self.fn = fn
        # Whether it is called as its caller calls, with the same keywords and no defaults; else by position.
        self.as_given = _sees_how_it_is_called(fn) if as_given is None else as_given
        written = written_as(fn)
        self.name = name or _node_name(written)
        self.place = scan.location(written) if place is None else place
        self.signature = signature or _signature(written)
        self.receiver = receiver  # the object that a bound method is bound to
        self.of_arrays = getattr(fn, "of_arrays", False)  # see `bridge`
        none = ("vjp", "params") if self.of_arrays else ()
        self.reserved = tuple([name for name in reserved if name not in none])  # those that it has something for
        self.lacks = lacks  # what to say of the others
        parameters = [] if self.signature is None else list(self.signature.parameters.values())
        self.receiver_name = parameters[0].name if parameters else ""  # if it is a method
        self.named_so = bool(parameters) and parameters[0].name in _RECEIVERS
        self.read_so = self.named_so or (bool(parameters) and parameters[0].kind in _POSITIONAL and self._is_in_class)
        self.takes_self = receiver is None and bool(parameters) and (self.read_so if method is None else method)
        self.parameters = None if self.signature is None else parameters[1 if self.takes_self else 0 :]
        self.is_method = self.takes_self or receiver is not None

    @property
    def _is_in_class(self) -> bool:
        """Whether it is a function that was defined in a class."""
        owner = self.fn.__qualname__.rpartition(".")[0] if inspect.isfunction(self.fn) else ""
        return bool(owner) and not owner.endswith("<locals>")

    @property
    def may_be_function(self) -> bool:
        """Whether its first parameter's name and the class it is in do not both say that it is a method."""
        return self.takes_self and not (self.named_so and self._is_in_class)

    @property
    def names(self) -> list[str]:
        return [] if self.parameters is None else [p.name for p in self.parameters]

    @property
    def who(self) -> str:
        """`'scale' (file.py:3)`: how messages begin. What is this library's own has no place."""
        return f"'{self.name}' ({self.place})" if self.place else f"'{self.name}'"


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
    ) -> None:
        if isinstance(fn, type) or not callable(fn):
            raise RuleSignatureError(
                f"a rule is a function of the gradient, `rule(grad_output, ...)`; got {kind_of(fn)}"
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
        self.asks: dict[str, bool] = {}  # name -> whether it must exist
        self.first = ""  # the name that the gradient has
        signature = _signature(read)
        if signature is None:
            return  # a builtin such as torch.neg: a rule of the gradient alone
        parameters = list(signature.parameters.values())[1 if method else 0 :]
        if not parameters or parameters[0].kind not in _POSITIONAL:
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

    @staticmethod
    def of(fn: Callable[..., Any]) -> Rule:
        """That of this function: always the same, so that what was made for it, and compiled, serves again."""
        if inspect.isfunction(fn):
            kept = fn.__dict__.get(_KEPT)
            if kept is None or kept.rule.fn is not fn:  # `functools.wraps` has copied it
                kept = fn.__dict__[_KEPT] = _Kept(Rule(fn))
            return kept.rule
        try:
            return _of_other(_Same(fn))
        except TypeError:  # it has no hash
            return Rule(fn)

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

    @property
    def who(self) -> str:
        return f"'{self.name}' ({self.place})"


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


def signature_asking(
    asks: Mapping[str, bool], *, first: str = "grad_output", by_name: bool = False
) -> inspect.Signature:
    """That of a rule that asks for these names, and must have those for which this is True. `by_name`: its gradient may
    be given by name, unless that is the name of an argument.
    """
    while first in asks:  # an argument of the forward may be called so
        first = f"_{first}"
    by_name = by_name and first == "grad_output"
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD if by_name else inspect.Parameter.POSITIONAL_ONLY
    parameters = [inspect.Parameter(first, kind)]
    for name, required in asks.items():
        default = inspect.Parameter.empty if required else None
        parameters.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default))
    return inspect.Signature(parameters)


def resolve(rule: Rule, forward: Forward, *, may_defer: bool) -> dict[str, str]:
    """For each name that the rule asks for, where it comes from: "argument", "reserved" or "deferred".

    A deferred name may be a residual or a parameter of the module, which are known when the forward has run.
    A name with a default that matches nothing here is "deferred" if it may yet match, and left out otherwise.
    """
    sources: dict[str, str] = {}
    for name, required in rule.asks.items():
        if name in forward.names:
            if name in RESERVED and not (name == "input" and forward.names[0] == "input"):
                raise RuleSignatureError(
                    f"rule {rule.who} asks for '{name}', which is a parameter of {forward.who} and also a name "
                    f"that gradoverride reserves ({_meaning(name)}). Rename the parameter of the forward, or wrap "
                    f"the forward in a function with another name for it"
                )
            sources[name] = "argument"
        elif name in RESERVED:
            if name not in forward.reserved:
                raise RuleSignatureError(f"rule {rule.who} asks for '{name}', {forward.lacks}")
            sources[name] = "reserved"
        elif may_defer:
            sources[name] = "deferred"
        elif required:
            raise unknown_name(rule, forward, name, ())
    return sources


def unknown_name(rule: Rule, forward: Forward, name: str, more: Iterable[str]) -> RuleSignatureError:
    """The error for a name that nothing supplies; `more` are the names that a module or residuals add."""
    offered: Sequence[str] = [*forward.names, *more]
    always = [other for other in forward.reserved if other != name]  # only a module has `params`
    known = [*offered, *always]
    close = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean '{close[0]}'?" if close else ""
    if name.startswith("grad") and not (close and close[0] in offered):
        hint = f" The gradient is the first parameter of a rule, whatever its name; here it is '{rule.first}'"
    if forward.is_method and name in (forward.receiver_name, "self"):
        hint = (
            f" For '{name}' ask for 'module', which is the module as it was in that forward; of an object of another "
            "class hand over what the rule needs, by save_for_backward"
        )
    if forward.parameters is None:
        own = f"{forward.who} has no signature and offers no names of its own"
    else:
        own = f"{forward.who} offers {', '.join(map(repr, offered)) or 'no names'}"
    return RuleSignatureError(
        f"rule {rule.who} asks for '{name}', which does not exist. {own}; always there are "
        f"{', '.join(map(repr, always))}.{hint}"
    )


def _meaning(name: str) -> str:
    return {
        "input": "the first differentiable argument",
        "output": "the forward's result",
        "vjp": "the gradient without the rule",
        "needs": "which gradients are wanted",
        "params": "the module's trainable parameters",
        "module": "the module",
        "forward": "the undecorated forward",
    }[name]


def _signature(fn: Any) -> inspect.Signature | None:
    try:
        return inspect.signature(fn)
    except (ValueError, TypeError):  # builtins such as torch.round have none
        return _scripted_signature(fn)


def _sees_how_it_is_called(fn: Any) -> bool:
    """Whether a decorator is around it that may look at what is given by position, by keyword or not at all."""
    if not inspect.isroutine(fn) and not isinstance(fn, functools.partial):
        fn = type(fn).__call__ if callable(fn) else None
    while (inner := getattr(fn, "__wrapped__", None)) is not None:
        if not _passes_on(fn) and _shape(fn) != _shape(inner):
            return True
        fn = inner
    return False


def _passes_on(fn: Any) -> bool:
    """Whether this is a wrapper of torch or of this library, which pass on what they are given as it is."""
    names = getattr(fn, "__globals__", {})
    return "_go_fn" in names or str(names.get("__name__")).partition(".")[0] in ("torch", "gradoverride")


def _shape(fn: Any) -> list[tuple[str, Any]] | None:
    try:
        signature = inspect.signature(fn, follow_wrapped=False)
    except (ValueError, TypeError):
        return None
    return [(parameter.name, parameter.kind) for parameter in signature.parameters.values()]


def takes(fn: Any, count: int) -> bool:
    """Whether `fn` may be called with so many positional arguments."""
    try:
        inspect.signature(fn).bind(*[None] * count)
    except (TypeError, ValueError):  # builtins may have no signature
        return False
    return True


def _scripted_signature(fn: Any) -> inspect.Signature | None:
    """That of a scripted function or method, which keeps it as a schema."""
    arguments = getattr(getattr(fn, "schema", None), "arguments", None)
    if arguments is None:
        return None
    parameters = []
    for argument in arguments:
        kind = inspect.Parameter.KEYWORD_ONLY if argument.kwarg_only else inspect.Parameter.POSITIONAL_OR_KEYWORD
        default = argument.default_value if argument.has_default_value() else inspect.Parameter.empty
        if argument.name != "self":
            parameters.append(inspect.Parameter(argument.name, kind, default=default))
    return inspect.Signature(parameters)


def _bound_by_partial(fn: Any) -> set[str]:
    bound: set[str] = set()
    while isinstance(fn, functools.partial):
        bound.update(fn.keywords)
        fn = fn.func
    return bound


def _node_name(fn: Any) -> str:
    """The name that the graph shows: a method called `forward` is known by its class."""
    name = name_of(fn)
    qualname = getattr(fn, "__qualname__", name)
    owner = qualname.rpartition(".")[0].rpartition(".")[2]
    if name == "forward" and owner and owner != "<locals>":
        return str(owner)
    return name


def _printable(name: str) -> str:
    return name if name.isidentifier() else "rule"


def kind_of(value: Any) -> str:
    """What a value of a wrong kind is, in messages."""
    if value is None:
        return "None"
    if isinstance(value, type):
        return f"the class '{value.__name__}'"
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"
