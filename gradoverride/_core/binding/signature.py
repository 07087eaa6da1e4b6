"""What a forward offers and what a rule asks for. Read once, when a rule is attached.

A rule is a plain function: its first parameter is the gradient with respect to the forward's result, each other one
asks for a value by name. This file has the forward, and what of it meets the rule (`rule.py`): `resolve`, and one error
that lists what exists.
"""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gradoverride._core.private.marks import written_as
from gradoverride._core.python import scan
from gradoverride.errors import RuleSignatureError

if TYPE_CHECKING:
    from gradoverride._core.binding.rule import Rule

__all__ = [
    "POSITIONAL",
    "RESERVED",
    "Forward",
    "kind_of",
    "name_of",
    "resolve",
    "read_signature",
    "runs_later",
    "signature_asking",
    "takes",
    "unknown_name",
    "with_article",
]

RESERVED = {
    "input": "the first differentiable argument",
    "output": "the forward's result",
    "vjp": "the gradient without the rule",
    "needs": "which gradients are wanted",
    "params": "the module's trainable parameters",
    "module": "the module",
    "forward": "the undecorated forward",
}
"""The names that a rule can ask for whatever its forward is, and what they mean."""

POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_RECEIVERS = ("self", "cls", "mcs")
# Of a method that takes all in `*args`, as one does that a decorator without functools.wraps gives.
_RECEIVER_IN_ARGS = inspect.Parameter("_go_self", inspect.Parameter.POSITIONAL_ONLY)


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
        reserved: Iterable[str] = RESERVED,
        lacks: str = "",
        owner: Any = None,
    ) -> None:
        self.fn = fn
        self.owner = owner  # the class that it is a method of, where that is known
        # Whether it is called as its caller calls, with the same keywords and no defaults; else by position.
        self.as_given = _sees_how_it_is_called(fn) if as_given is None else as_given
        written = written_as(fn)
        self.name = name or _node_name(written)
        self.place = scan.location(written) if place is None else place
        self.signature = signature or read_signature(written)
        self.receiver = receiver  # the object that a bound method is bound to
        self.of_arrays = getattr(fn, "__of_arrays__", False)  # see `bridge`
        none = ("vjp", "params") if self.of_arrays else ()
        self.reserved = tuple([name for name in reserved if name not in none])  # those that it has something for
        self.lacks = lacks  # what to say of the others
        parameters = [] if self.signature is None else list(self.signature.parameters.values())
        if method and self.signature is not None and (not parameters or parameters[0].kind not in POSITIONAL):
            parameters.insert(0, _RECEIVER_IN_ARGS)
            self.signature = self.signature.replace(parameters=parameters)
        self.receiver_name = parameters[0].name if parameters else ""  # if it is a method
        first = bool(parameters) and parameters[0].kind in POSITIONAL
        self.named_so = first and parameters[0].name in _RECEIVERS
        reads_so = self.named_so or (first and self._is_in_class)
        self.takes_self = receiver is None and bool(parameters) and (reads_so if method is None else method)
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
                    f"that gradoverride reserves ({RESERVED[name]}). Rename the parameter of the forward, or wrap "
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


def read_signature(fn: Any) -> inspect.Signature | None:
    """That of a callable. None of a builtin that tells of none."""
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


def runs_later(fn: Any) -> str | None:
    """What a call of `fn` gives that has not run yet, if it gives such."""
    return next((kind for kind, gives in _LATER.items() if gives(fn)), None)


_LATER: dict[str, Callable[[Any], bool]] = {
    "a generator": inspect.isgeneratorfunction,
    "a coroutine": inspect.iscoroutinefunction,
    "an async generator": inspect.isasyncgenfunction,
}


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


def _node_name(fn: Any) -> str:
    """The name that the graph shows: a method called `forward` is known by its class."""
    name = name_of(fn)
    qualname = getattr(fn, "__qualname__", name)
    owner = qualname.rpartition(".")[0].rpartition(".")[2]
    if name == "forward" and owner and owner != "<locals>":
        return str(owner)
    return name


def kind_of(value: Any) -> str:
    """What a value of a wrong kind is, in messages."""
    if value is None:
        return "None"
    if isinstance(value, type):
        return f"the class '{value.__name__}'"
    return with_article(type(value).__name__)


def with_article(name: str) -> str:
    """`a Tensor`, `an int`."""
    return f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"
