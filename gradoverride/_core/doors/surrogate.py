"""What is behind `straight_through`: the identity, or the derivative of a surrogate, which may have parameters.

The derivative is a rule. Parameters need more, for a rule answers for what its forward is given, and they are not: so
the surrogate itself runs in the forward, as torch records it, and its result lends the input its graph
(`with_gradient_of`). Every way in which torch follows a parameter then reaches those of a surrogate.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from gradoverride._core.autograd.ambient import unseen_by_hooks
from gradoverride._core.binding.contract import shape_text, what
from gradoverride._core.binding.rule import Rule
from gradoverride._core.binding.signature import Forward, name_of
from gradoverride._core.calls.plan import Plan
from gradoverride._core.calls.wrapper import make_wrapper
from gradoverride._core.graph import captured
from gradoverride._core.private.dynamo import fail, in_transform
from gradoverride._core.private.marks import evaluated_while_tracing, uncompiled
from gradoverride._core.private.tensors import saves_plainly
from gradoverride._core.private.transforms import in_functorch
from gradoverride._core.python.scan import location
from gradoverride._core.values.structure import leaves_in
from gradoverride._core.values.tensors import is_differentiable
from gradoverride.errors import CapturedTensorError, ForwardResultError, SurrogateError, UnsupportedError

__all__ = ["StraightThrough", "SurrogateRule", "is_learnable", "pass_through", "with_gradient_of"]


@evaluated_while_tracing
def _hooks_save() -> bool:
    """Whether hooks on saved tensors are in force where this is compiled."""
    return not saves_plainly()


def pass_through(grad_output: Tensor) -> Tensor:
    """The straight-through estimator: the gradient as it came."""
    return grad_output


class SurrogateRule:
    """The gradient of `surrogate` at the input, in the place of that of `fn`."""

    writes_nothing = True  # into the gradient that it is given: it is passed on to torch alone

    def __init__(self, fn: Any, surrogate: Callable[..., Any]) -> None:
        self.surrogate = surrogate
        self.who = f"surrogate '{name_of(surrogate)}' ({location(surrogate)}) of '{name_of(fn)}' ({location(fn)})"

    def __call__(self, grad_output: Tensor, input: Tensor) -> Tensor:
        if torch.compiler.is_dynamo_compiling() and _hooks_save():  # torch.func would fail, and stay half entered
            fail(
                UnsupportedError,
                f"{self.who} must not be compiled inside of a checkpoint, or of other hooks on saved tensors, under "
                "which torch.func does not run. Compile what has the checkpoint within, or call what is compiled once "
                "outside of it, or use one of gradoverride.surrogates, which are derivatives already",
            )
        if torch.compiler.is_dynamo_compiling() or in_functorch():
            result, pullback, *_ = torch.func.vjp(self.surrogate, input)  # differentiable again
            _check_shape(self.who, result, grad_output)
            (grad_input,) = pullback(grad_output.to(result.dtype))
            return grad_input
        again = torch.is_grad_enabled()
        with torch.enable_grad():
            alias = input.view_as(input) if again and input.requires_grad else input.detach().requires_grad_()
            result = self.surrogate(alias)
        _check_shape(self.who, result, grad_output)
        self._check_differentiable(result)
        self._check_captured(result, alias)
        (grad_input,) = torch.autograd.grad(
            result, alias, grad_output.to(result.dtype), create_graph=again, materialize_grads=True
        )
        return grad_input

    def check(self, input: Tensor, result: Tensor) -> None:
        """Look at the surrogate once before any gradient is asked for: an error then says which call it was."""
        with torch.enable_grad(), unseen_by_hooks():
            alias = input.detach().requires_grad_()
            try:
                given = self.surrogate(alias)
            except Exception as error:
                error.add_note(f"in the {self.who}")
                raise
        _check_shape(self.who, given, result)
        self._check_differentiable(given)
        self._check_captured(given, alias)

    def _check_differentiable(self, given: Tensor) -> None:
        if not given.requires_grad:
            fail(
                SurrogateError,
                f"{self.who} must be a differentiable function of its argument; what it gives does not depend on it by "
                "any function that torch knows the derivative of. Compute it of the argument, without detach() or "
                "no_grad()",
            )

    def _check_captured(self, given: Tensor, input: Tensor) -> None:
        """Refuse a tensor that `is_learnable` did not find, or that requires grad only since."""
        stops = {input.grad_fn} - {None}
        leaf = captured.foreign_leaf([given], {id(input)}, stops) if given.requires_grad else None
        if leaf is not None:
            names = ", ".join(captured.captured_names(self.surrogate, leaf)) or what(leaf)
            fail(
                CapturedTensorError,
                f"{self.who} must be an nn.Module to have a parameter; it reached {names}, which requires grad, in "
                "another way or only since straight_through was called, and that gradient would be lost. Make it a "
                "module, or detach() the tensor",
            )


class StraightThrough(nn.Module):
    """`fn` with the gradient of a surrogate that has parameters. They are parameters of this module.

    It is what `straight_through` gives for such a surrogate: a module, so that it can be a part of one.
    """

    def __init__(self, fn: Any, surrogate: Any, make: Callable[[Any], Any]) -> None:
        super().__init__()
        self.fn = fn
        self.surrogate = surrogate
        if not isinstance(fn, nn.Module):  # which would be a part of this one twice
            functools.update_wrapper(self, fn, updated=())
        self._names = Forward(uncompiled(fn).forward if isinstance(fn, nn.Module) else fn).names
        self._make = make
        self._through = make(fn)  # with the gradient passed on
        self._captures = not isinstance(surrogate, nn.Module)  # tensors that are not this module's

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What `fn` gives, with the gradient of the surrogate at the first differentiable argument."""
        if not (torch.is_grad_enabled() or in_transform()):
            return self.fn(*args, **kwargs)
        in_order = {name: kwargs[name] for name in self._names if name in kwargs}  # whatever the caller's is
        given: dict[Any, Any] = {**dict(enumerate(args)), **in_order, **kwargs}
        for place, value in given.items():
            held = leaves_in(value, is_differentiable)
            if not held:
                continue
            if held[0] is not value:
                name = dict(enumerate(self._names)).get(place, place)
                fail(
                    ForwardResultError,
                    f"'{name_of(self.fn)}' ({location(self.fn)}) must have one tensor for its first differentiable "
                    f"argument '{name}', which is what a surrogate takes, for a gradient to pass straight through; it "
                    f"was given {what(value)}. Decorate a function of one tensor, or give a rule: "
                    "custom_backward(rule)",
                )
            given[place] = with_gradient_of(self.surrogate, value)
            break
        return self._through(*[given[index] for index in range(len(args))], **{name: given[name] for name in kwargs})

    def extra_repr(self) -> str:
        """What it is made of, where that is not printed as a module."""
        parts = {"": self.fn, "surrogate=": self.surrogate}
        return ", ".join(f"{key}{name_of(part)}" for key, part in parts.items() if not isinstance(part, nn.Module))

    def __getstate__(self) -> dict[str, Any]:
        if self._captures:
            raise CapturedTensorError(
                f"surrogate '{name_of(self.surrogate)}' ({location(self.surrogate)}) of '{name_of(self.fn)}' must be a "
                "module, or have its tensors as options, to be copied or pickled; it reaches "
                f"{', '.join(_tensor_names(self.surrogate))} by a closure or a global, and the copy would train the "
                "original's. Make it an nn.Module"
            )
        return {name: value for name, value in self.__dict__.items() if name != "_through"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]  # torch has not typed it
        self._through = self._make(self.fn)


def with_gradient_of(surrogate: Callable[[Tensor], Tensor], input: Tensor) -> Tensor:
    """The value of `input`, whose gradient goes to the result of the surrogate: to its input, and its parameters."""
    given = surrogate(input)
    _check_shape(surrogate, given, input)
    tied: Tensor = _lend(given, input)
    return tied


def is_learnable(surrogate: Any) -> bool:
    """Whether a surrogate is a module with parameters, or reaches tensors that require grad in another way."""
    return any(True for _ in _tensor_names(surrogate))


def _tensor_names(surrogate: Any) -> Iterator[str]:
    while isinstance(surrogate, functools.partial):
        for part in (*surrogate.args, *surrogate.keywords.values()):
            if isinstance(part, Tensor) and part.requires_grad:
                yield f"an argument of the partial '{name_of(surrogate)}'"
        surrogate = surrogate.func
    owner = surrogate.__self__ if isinstance(surrogate, MethodType) else surrogate
    if isinstance(owner, nn.Module):
        yield from [f"'{name}'" for name, _ in owner.named_parameters()]
        yield from [f"'{name}'" for name, buffer in owner.named_buffers() if buffer.requires_grad]
    else:
        yield from captured.captured_names(surrogate, receiver=owner)


def _second(lent: Tensor, value: Tensor) -> Tensor:
    return value


_pass = Rule(pass_through, name="straight_through", straight_through=True)
_lend = make_wrapper(Plan(Forward(_second, name="surrogate"), _pass), _second)


def _check_shape(who: Any, given: Any, like: Tensor) -> None:
    """`who`: the surrogate, or what to call it."""
    fits = isinstance(given, Tensor) and given.shape == like.shape
    if fits and given.is_complex() == like.is_complex():
        return
    if not isinstance(who, str):
        code = who.forward if isinstance(who, nn.Module) else who
        who = f"surrogate '{name_of(who)}' ({location(code)})"
    if not fits:
        fail(
            SurrogateError,
            f"{who} must give a result of shape {shape_text(like.shape)}, the shape of the result it stands "
            f"for; it gives {what(given)}. Give one with that result",
        )
    needed, came, remedy = "real", "complex", "Take its real part"
    if like.is_complex():
        needed, came, remedy = "complex", "real", "Make it complex"
    fail(
        SurrogateError,
        f"{who} must give a {needed} result, for the result it stands for is {needed}; it gives a {came} one. {remedy}",
    )
