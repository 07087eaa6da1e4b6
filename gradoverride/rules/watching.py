"""Rules that look at the gradient: `scrub` and `check_finite` for nan and inf, `observe` for whatever you like.

Like those of `rules.gradient` they keep nothing from the forward, and take each tensor of a structure by itself. They
have effects: a count, an error, a callback. So in compiled code each is one node of the graph, which runs with the
values.

They are linear in the gradient, as long as all is finite, so forward mode works. It tries them out on gradients of its
own, which a callback of `observe` sees too.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.func import debug_unwrap

from gradoverride._core.binding.options import check, check_function, printed
from gradoverride._core.private.transforms import in_batched_autograd
from gradoverride._core.values.structure import LEAF, Node, named_parts, unflatten
from gradoverride.errors import NonFiniteGradientError, UnsupportedError
from gradoverride.rules.each import gradients_in, of_values
from gradoverride.rules.untraced import Untraced, untraced

__all__ = ["scrub", "check_finite", "observe"]

X = TypeVar("X")


@dataclass(frozen=True)
class scrub(Untraced):
    """The gradient with 0 in place of nan and inf. `count` says how many values that were, so far.

    >>> import torch, gradoverride as go
    >>> from gradoverride.rules import scrub
    >>> x, finite = torch.ones(3, requires_grad=True), scrub()
    >>> go.edit_gradient(x, finite).backward(torch.tensor([1.0, float("nan"), float("inf")]))
    >>> x.grad, finite.count
    (tensor([1., 0., 0.]), 2)

    Reading `count` waits for the device; counting does not. A copy counts for itself, from 0.
    """

    _counts: dict[torch.device, Tensor] = field(default_factory=dict, init=False, compare=False, repr=False)

    @property
    def count(self) -> int:
        """How many values have been replaced."""
        return sum(int(count) for count in self._counts.values())

    def untraced(self, grad: Tensor) -> Tensor:
        return of_values(self._scrubbed, grad)

    def _scrubbed(self, grad: Tensor) -> Tensor:
        _refuse_batch(self, grad)
        wrong = grad.isfinite().logical_not()
        # Plain numbers, which outlive the transforms (`vmap`, `grad`) around this.
        found = debug_unwrap(debug_unwrap(wrong).sum())
        with _COUNTING:
            known = self._counts.get(found.device)
            self._counts[found.device] = found if known is None else debug_unwrap(known + found)
        return grad.masked_fill(wrong, 0)

    def __reduce__(self) -> Any:
        return scrub, ()


_COUNTING = threading.Lock()


@dataclass(frozen=True)
class check_finite:
    """The gradient, if it is finite; else a `NonFiniteGradientError` that says where nan or inf is.

    >>> import torch, gradoverride as go
    >>> from gradoverride.rules import check_finite
    >>> x = torch.tensor([0.0, 4.0], requires_grad=True)
    >>> y = go.edit_gradient(x, check_finite("the input"))
    >>> y.sqrt().sum().backward()
    Traceback (most recent call last):
        ...
    gradoverride.errors.NonFiniteGradientError: check_finite: the gradient of the input must be finite; ...

    `name`: what the message calls it. Each look waits for the device. Under `vmap` the place it names counts the
    dimensions that are mapped over.
    """

    name: str = ""

    writes_nothing = True  # so it is given the gradient itself, no copy

    def __post_init__(self) -> None:
        check("check_finite", "name", self.name, isinstance(self.name, str), "a string")

    def __call__(self, grad_output: X) -> X:
        """The gradient as it came."""
        named = f" of {self.name}" if self.name else ""
        spec, leaves = gradients_in(grad_output)
        looked_at = [untraced(self, leaf, named + place) for leaf, place in zip(leaves, _places(spec), strict=True)]
        result: X = unflatten(spec, iter(looked_at))
        return result

    def untraced(self, grad: Tensor, place: str) -> Tensor:
        _refuse_batch(self, grad)
        plain = debug_unwrap(grad).detach()
        if not bool(plain.sum().isfinite()):  # in one pass: no sum is finite that has nan or inf in it
            self._refuse(plain, place)
        return grad

    def _refuse(self, grad: Tensor, place: str) -> None:
        wrong = grad.isfinite().logical_not().nonzero()
        if len(wrong) == 0:  # the sum alone was too large
            return
        first = tuple(wrong[0].tolist())
        raise NonFiniteGradientError(
            f"check_finite: the gradient{place} must be finite; {len(wrong)} of its {grad.numel()} values are "
            f"not, the first is {grad[first].item()} at {first}. Look at what uses the value (torch.autograd."
            "detect_anomaly names it), or use scrub to go on with 0 in their place"
        )


def _places(spec: Any, path: str = "") -> Iterator[str]:
    """How each tensor of a structure is reached: `['a'][0]`."""
    if spec is LEAF:
        yield path
    elif isinstance(spec, Node):
        for step, part in named_parts(spec):
            yield from _places(part, path + step)


@dataclass(frozen=True, repr=False)
class observe(Untraced):
    """The gradient as it is, and `callback(g)` sees it, without its graph: to print it, to keep it, to measure it.

    >>> import torch, gradoverride as go
    >>> from gradoverride.rules import observe
    >>> seen = []
    >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> go.edit_gradient(x, observe(seen.append)).sum().backward()
    >>> seen
    [tensor([1., 1.])]

    What the callback returns is left alone; writing into what it is given is an error. Of a structure it is called
    for each tensor. It is called where the code is compiled too, with the values.
    """

    callback: Callable[[Tensor], Any]

    def __post_init__(self) -> None:
        check_function("observe", "callback", self.callback, 1, "a function of one tensor")

    def untraced(self, grad: Tensor) -> Tensor:
        _refuse_batch(self, grad)
        self.callback(grad.detach())
        return grad

    def __repr__(self) -> str:
        return f"observe({printed(self.callback)})"


def _refuse_batch(rule: Any, grad: Tensor) -> None:
    if in_batched_autograd(grad):
        raise UnsupportedError(
            f"{type(rule).__name__}: a gradient must have values to look at; torch.autograd shows a batch of gradients "
            "at once (is_grads_batched, vectorize=True), which has none. Ask for one after the other, or use "
            "torch.func.jacrev"
        )
