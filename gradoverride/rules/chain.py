"""`chain`: several rules as one. `plain`: no rule, as a link of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from inspect import Parameter
from typing import Any

import torch

from gradoverride._core.binding.options import check, printed
from gradoverride._core.binding.rule import Rule
from gradoverride._core.binding.signature import signature_asking
from gradoverride._core.private.dynamo import fail
from gradoverride._core.python.purity import writes_nothing
from gradoverride.errors import UnsupportedError
from gradoverride.rules.each import each

__all__ = ["chain", "plain"]


@dataclass(frozen=True, init=False, repr=False)
class chain:
    """Several rules as one: the first is given the gradient that comes, each other one what the one before returned.

    >>> import torch, gradoverride as go
    >>> from gradoverride.rules import chain, clip_value, reverse
    >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> go.edit_gradient(x, chain(clip_value(1.0), reverse(0.5))).backward(torch.tensor([9.0, 0.5]))
    >>> x.grad
    tensor([-0.5000, -0.2500])

    It asks for all that its rules ask for, and each is given its own. A `vjp` is that of the forward, in every link:
    it takes a gradient of the result and gives that of the input, so links before it edit the former, links behind it
    the latter. `plain` is the link that does this and nothing else:

    >>> from gradoverride.rules import plain
    >>> square = go.custom_backward(chain(clip_value(1.0), plain))(torch.square)
    >>> torch.autograd.grad(square(x), x, torch.tensor([9.0, 0.5]))
    (tensor([2., 2.]),)

    A link that returns None stops the gradient, and no further one is called. Raises `RuleSignatureError` for what is
    no rule, `RuleOptionError` for none. It is made outside of code that is compiled.
    """

    rules: tuple[Callable[..., Any], ...]

    # Each rule, the names it asks for, and whether it may write into its gradient.
    links: tuple[Any, ...] = field(compare=False)
    writes_nothing = True

    def __init__(self, *rules: Callable[..., Any]) -> None:
        if torch.compiler.is_dynamo_compiling():
            fail(UnsupportedError, "chain: it must be made outside of the code that is compiled; it was made within")
        check("chain", "rules", rules, bool(rules), "one rule or more")
        read = [Rule(rule, given="chain") for rule in rules]
        own = self.__dict__  # it is frozen
        own["rules"] = rules
        own["links"] = tuple([(rule.fn, tuple(rule.asks), _may_write(rule.fn)) for rule in read])
        # What the library asks for on its behalf.
        own["__signature__"] = signature_asking(_asked_by(read), by_name=True)
        own["__name__"] = repr(self)  # how errors call it

    @property
    def bound_to(self) -> Callable[[Any], chain]:
        """What makes this the rule of one forward; only where one of its rules asks for all arguments of that."""
        rules: list[Any] = list(self.rules)
        if not any([hasattr(rule, "bound_to") for rule in rules]):
            raise AttributeError("bound_to")
        return lambda forward: chain(*[rule.bound_to(forward) if hasattr(rule, "bound_to") else rule for rule in rules])

    def __call__(self, grad_output: Any = Parameter.empty, /, **values: Any) -> Any:
        """What the last rule returns."""
        grad = self._by_name(values) if grad_output is Parameter.empty else grad_output
        for rule, names, may_write in self.links:
            if grad is None:
                return None
            handed = each(torch.clone, grad) if may_write else grad  # an earlier link may have shown it to others
            grad = rule(handed, **{name: values[name] for name in names if name in values})
        return grad

    def _by_name(self, values: dict[str, Any]) -> Any:
        """The gradient that is given as `grad_output=`, which may be the name of an argument of the forward too."""
        taken = any(["grad_output" in names for _, names, _ in self.links])
        if taken or "grad_output" not in values:
            why = ", by position, for a link asks for an argument called 'grad_output'" if taken else ""
            raise TypeError(f"{self!r}: it must be given a gradient{why}; it was given none")
        return values["grad_output"]

    def __repr__(self) -> str:
        return f"chain({', '.join(map(printed, self.rules))})"

    def __reduce__(self) -> Any:
        return chain, self.rules


def plain(grad_output: Any, vjp: Any) -> Any:
    """The gradient as it is without a rule: `vjp(g)`. For a `chain`, with links before it and behind it.

    >>> import torch, gradoverride as go
    >>> from gradoverride.rules import chain, plain, scale
    >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> square = go.custom_backward(chain(plain, scale(0.5)))(torch.square)
    >>> torch.autograd.grad(square(x).sum(), x)
    (tensor([1., 2.]),)
    """
    return vjp(grad_output)


def _may_write(rule: Any) -> bool:
    return not writes_nothing(rule)


def _asked_by(rules: list[Rule]) -> dict[str, bool]:
    """All that these ask for. One may do without a name if each that asks for it may."""
    required: dict[str, bool] = {}
    for rule in rules:
        for name, must in rule.asks.items():
            required[name] = required.get(name, False) or must
    return required
