"""`custom_backward` and `straight_through`: start here.

A decorated callable is a plain function (`wrapper.py`), made for a `Plan` (`plan.py`): what its forward offers and its
rule asks for (`_core/binding/`). Most calls run code that was generated for them (`fast.py`, `traced.py`). The others
go to `forward_pass.py`, which runs the forward and ties its result to the rule by a Function (`function.py` in
`_core/autograd/`); the engine then calls `backward_pass.py`. These files are in `_core/calls/`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar, overload

import torch
from torch import nn

from gradoverride._core.binding.contract import what
from gradoverride._core.binding.rule import Rule
from gradoverride._core.binding.signature import Forward, kind_of, name_of
from gradoverride._core.calls.class_form import place_of, refuse_function, refuse_lazy, text_of, with_own_backward
from gradoverride._core.calls.plan import Plan
from gradoverride._core.calls.wrapper import make_refusal, make_wrapper
from gradoverride._core.doors.surrogate import StraightThrough, SurrogateRule, is_learnable, pass_through
from gradoverride._core.doors.surrogate_class import Learnable, Surrogate, has_tensors
from gradoverride._core.modules.standin import around
from gradoverride._core.private.dynamo import MADE_OUTSIDE, hidden_from_dynamo, out_of_graph
from gradoverride._core.private.marks import uncompiled
from gradoverride._core.python.scan import location
from gradoverride.errors import DecorationError, RuleSignatureError

__all__ = ["custom_backward", "straight_through"]

F = TypeVar("F", bound=Callable[..., Any])
C = TypeVar("C", bound=type)


@overload
def custom_backward(rule: C, /) -> C: ...
@overload
def custom_backward(rule: Callable[..., Any], /, *, jvp: Callable[..., Any] | None = None) -> Callable[[F], F]: ...
def custom_backward(rule: Any, /, *, jvp: Any = None) -> Any:
    """Give a function, a method or a module the backward that `rule` says.

    A rule is a plain function. Its first parameter is the gradient with respect to the result; every other one asks
    for a value by name: an argument of the forward, a parameter or buffer of its module, a value that the forward
    handed over (`save_for_backward`), or `input`, `output`, `vjp`, `needs`, `params`, `module`, `forward`. Only what
    it asks for is kept. It returns one gradient for each argument, or a dict by name.

    >>> import torch, gradoverride as go
    >>> def scale_backward(grad_output, x, weight):
    ...     return grad_output * weight, grad_output * x
    >>> @go.custom_backward(scale_backward)
    ... def scale(x, weight):
    ...     return x * weight
    >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> y = scale(x, torch.tensor(3.0).expand(2))
    >>> y.sum().backward()
    >>> x.grad
    tensor([3., 3.])

    On a class, `rule` is for its `forward`. Bare, on a module class that defines `backward(self, grad_output, ...)`,
    that method is the rule: it returns the gradient of the input and assigns `self.<parameter>.grad`. Its `self`, like
    `module` of a rule, has the tensors of the forward, and what that assigned to attributes which the rule reads by
    name (`self.mask`). Other attributes, and what is in containers, are as they are when the backward runs (in compiled
    code as they were in the forward): ask for what may change in between as an argument, or hand it over.

    Forward mode (`jvp`, `jacfwd`, `hessian`) is the rule transposed, so it needs nothing more, unless the rule is not
    linear in the gradient. `jvp` says it instead: a function of the tangents of the arguments, which come in the form
    in which a rule returns gradients (of a module with parameters in a dict by name), and of values by name. It
    returns the tangent of the result.

    >>> clipped = go.custom_backward(lambda grad_output: grad_output.clamp(-1, 1), jvp=lambda tangent: 2 * tangent)
    >>> torch.func.jvp(clipped(lambda x: 2 * x), (torch.ones(2),), (torch.ones(2),))[1]
    tensor([2., 2.])

    What comes back is a function, so a bound method or a module that is decorated stays bound: `copy.deepcopy` of what
    holds the function holds the same one, with the original's weights. Decorate the method in its class, or use
    `override`, whose copies have their own.

    Shapes and dtypes: a gradient has the shape and device of what it belongs to; a differing floating dtype is cast.

    Raises `RuleSignatureError` for a name that does not exist, `RuleResultError` for a wrong answer,
    `CapturedTensorError` for a tensor that the forward reaches by a closure, `DecorationError` for what cannot be
    decorated.
    """
    if torch.compiler.is_dynamo_compiling():
        return _rule_out_of_graph(rule, jvp=jvp)
    if jvp is not None and (isinstance(jvp, type) or not callable(jvp)):
        raise DecorationError(f"custom_backward: 'jvp' must be a function of the tangents; got {what(jvp)}")
    if isinstance(rule, type):
        if jvp is not None:
            raise DecorationError(
                "custom_backward: 'jvp' goes with a rule; it came with a class that has a backward. Give a rule: "
                "custom_backward(rule, jvp=...)"
            )
        return with_own_backward(rule)
    read = Rule(rule, given="custom_backward")
    read.jvp = None if jvp is None else Rule(jvp)

    def attach(*given: Any, **named: Any) -> Any:
        if len(given) == 1 and not named:
            return _attach(read, given[0])
        # A function that was decorated without a rule is called, with more than a tensor.
        _refuse_to_attach(read, f"{len(given) + len(named)} arguments")

    return attach


@overload
def straight_through(fn: F, /, *, surrogate: Callable[..., Any] | None = None) -> F: ...
@overload
def straight_through(*, surrogate: Callable[..., Any] | None = None) -> Callable[[F], F]: ...
def straight_through(fn: Any = None, /, *, surrogate: Callable[..., Any] | None = None) -> Any:
    """Let the gradient through a function that has none, as if it were the identity, or as that of `surrogate`.

    The value is exactly that of `fn`, in every dtype. With several arguments the gradient goes to the first that is
    floating or complex (a warning says so where that wants none and another does); its shape must be the result's.
    What is no floating tensor may be returned beside the one that is, in a tuple or dict.

    >>> import torch, gradoverride as go
    >>> round_ste = go.straight_through(torch.round)
    >>> x = torch.tensor([0.4, 1.6], requires_grad=True)
    >>> y = round_ste(x)
    >>> y.sum().backward()
    >>> y.tolist(), x.grad.tolist()
    ([0.0, 2.0], [1.0, 1.0])
    >>> step = go.straight_through(torch.sign, surrogate=torch.tanh)

    `surrogate` is a differentiable function of one tensor, with a result of its shape; its derivative at the input is
    used. One of `gradoverride.surrogates` is that derivative already, and so faster. Raises `SurrogateError` if the
    shapes differ.

    A surrogate may learn: an `nn.Module`, one of `gradoverride.surrogates` with a parameter as an option, or a function
    that reaches a tensor that requires grad. Its tensors then get the gradients that they would have if it stood where
    `fn` does, and what is returned is an `nn.Module` with the parameters, to be a part of yours:

    >>> alpha = torch.nn.Parameter(torch.tensor(1.0))
    >>> fire = go.straight_through(torch.sign, surrogate=go.surrogates.sigmoid(k=alpha))
    >>> fire(torch.tensor([0.0, 2.0])).sum().backward()
    >>> alpha.grad
    tensor(0.2100)

    Source: Bengio, Leonard, Courville, "Estimating or propagating gradients through stochastic neurons" (2013).
    """
    if torch.compiler.is_dynamo_compiling():
        return _through_out_of_graph(fn, surrogate=surrogate)
    if surrogate is not None and not isinstance(surrogate, Surrogate):
        _check_surrogate(surrogate)
    if fn is None:
        return functools.partial(_straight_through, surrogate)
    return _straight_through(surrogate, fn)


_rule_out_of_graph = out_of_graph(custom_backward, MADE_OUTSIDE)
_through_out_of_graph = out_of_graph(straight_through, MADE_OUTSIDE)


def _straight_through(surrogate: Callable[..., Any] | None, fn: Any) -> Any:
    inner = fn.__func__ if isinstance(fn, (staticmethod, classmethod)) else fn
    if isinstance(surrogate, Surrogate) and has_tensors(surrogate):
        return _learnable(Learnable(surrogate), fn)
    if surrogate is not None and not isinstance(surrogate, Surrogate) and is_learnable(surrogate):
        return _learnable(surrogate, fn)
    name = "straight_through" if surrogate is None else f"straight_through(surrogate={name_of(surrogate)})"
    place = location(inner if surrogate is None else surrogate)
    if surrogate is None or isinstance(surrogate, Surrogate):
        return _attach(Rule(surrogate or pass_through, name=name, place=place, straight_through=True), fn)
    through = SurrogateRule(inner, surrogate)
    rule = Rule(through, name=name, place=place, straight_through=True)
    rule.on_first_call = through.check
    return _attach(rule, fn)


def _check_surrogate(surrogate: Any) -> None:
    got = kind_of(surrogate)
    if callable(surrogate) and not isinstance(surrogate, type):
        signature = Forward(surrogate).signature
        try:
            if signature is not None:  # as that of a builtin may be
                signature.bind(None)
            return
        except TypeError:
            got = f"'{name_of(surrogate)}' ({location(surrogate)}), which takes {signature}"
    raise DecorationError(
        "straight_through: 'surrogate' must be a function of one tensor, such as torch.tanh or surrogates.atan(); "
        f"got {got}"
    )


def _learnable(surrogate: Callable[..., Any], fn: Any) -> StraightThrough:
    """A module: the surrogate has parameters."""
    if isinstance(fn, (type, staticmethod, classmethod)) or (callable(fn) and Forward(fn).takes_self):
        kind, place = ("class", place_of(fn)) if isinstance(fn, type) else ("method", location(fn))
        raise DecorationError(
            f"straight_through: the surrogate '{name_of(surrogate)}' has parameters, so what it gives is a module, "
            f"which a {kind} cannot be ('{name_of(fn)}', {place}). Make it of a function, where an instance is "
            "made: self.fire = straight_through(torch.sign, surrogate=...)"
        )
    return StraightThrough(fn, surrogate, straight_through)


def _attach(rule: Rule, target: Any) -> Any:
    """`target` with `rule` as its backward."""
    if isinstance(target, (staticmethod, classmethod)):
        return type(target)(_attach(rule, target.__func__))
    if isinstance(target, type):
        return _attach_to_class(rule, target)
    if not callable(target):
        _refuse_to_attach(rule, what(target), type(target))
    forward = _forward_of(target)
    plan = Plan(forward, rule)
    make = functools.partial(_attach_to_function, rule, target)
    other = None
    if forward.may_be_function:  # what it is called with will tell
        other = make()
    elif forward.takes_self:  # of a class of tensors perhaps
        plan.read_as_function(make)
    return _wrapper(plan, target, as_function=other)


def _refuse_to_attach(rule: Rule, given: str, kind: type = object) -> NoReturn:
    who = "straight_through" if rule.straight_through else f"custom_backward: the rule {rule.who}"
    if kind in (property, functools.cached_property, functools.partialmethod, functools.singledispatchmethod):
        way_out = f". Decorate the function that the {kind.__name__} is made of"
    elif rule.straight_through:
        way_out = ". What it gives for a function is called with tensors"
    else:
        way_out = f". If '{rule.name}' is what is to be decorated, it needs a rule: @custom_backward(rule)"
    raise DecorationError(
        f"{who} must be given a function, a method or a class with a 'forward'; it was given {given}{way_out}"
    )


def _attach_to_class(rule: Rule, cls: Any) -> Any:
    """`cls`, whose forward has `rule` as its backward."""
    refuse_function(cls)
    refuse_lazy(cls)
    forward = getattr(cls, "forward", None)
    if not callable(forward) or forward is nn.Module.forward:
        raise DecorationError(
            f"{text_of(cls)} must have a 'forward', for the rule {rule.who} to be its "
            "backward; it has none. Define it, or decorate a function"
        )
    defined = inspect.getattr_static(cls, "forward")
    if isinstance(defined, (staticmethod, classmethod)):
        cls.forward = _attach(rule, defined)
    else:
        cls.forward = _wrapper(Plan(Forward(forward, name=cls.__name__, method=True), rule), forward)
    return cls


def _attach_to_function(rule: Rule, target: Any) -> Any:
    """`target` with `rule`, as a function of all its parameters. What is wrong with that is known when it is called."""
    try:
        plan = Plan(Forward(target, method=False), rule)
    except RuleSignatureError as error:
        return make_refusal(error)
    return make_wrapper(plan, target)


def _wrapper(plan: Plan, original: Any, as_function: Any = None) -> Any:
    """What takes the place of `original`; Dynamo does not look into it if the rule says so, and why."""
    wrapper = make_wrapper(plan, original, as_function=as_function)
    reason = getattr(plan.rule.fn, "not_traced", None)
    return wrapper if reason is None else hidden_from_dynamo(wrapper, reason)


def _forward_of(target: Any) -> Forward:
    """How a callable is called: a bound method or an object by its function and its receiver."""
    bound_to = getattr(target, "__self__", None)
    function = getattr(target, "__func__", None)
    if function is not None and bound_to is not None:
        return Forward(function, receiver=bound_to, signature=Forward(target).signature, name=Forward(function).name)
    if isinstance(target, nn.Module):
        original = uncompiled(target)  # whose names the parameters have
        called = Forward(original.forward)
        return Forward(
            type(target).__call__ if original is target else _compiled_call(target, original),
            receiver=original,
            signature=called.signature,
            as_given=called.as_given,
            name=_class_name(original),
            place=location(getattr(type(original), "forward", None)),
        )
    return Forward(target)


def _compiled_call(compiled: nn.Module, original: nn.Module) -> Callable[..., Any]:
    """The call of `compiled`, made of `original`, with the module that stands for that as its first argument."""

    def call(module: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():  # which would meet the original in two ways
            return module(*args, **kwargs)
        if module is original:
            return compiled(*args, **kwargs)
        return around(compiled, module)(*args, **kwargs)  # a stand-in: what was compiled has the original's parameters

    return call


def _class_name(module: nn.Module) -> str:
    """The user's name for the class of a module, scripted ones included."""
    name = getattr(module, "original_name", None) if isinstance(module, torch.jit.ScriptModule) else None
    return name or type(uncompiled(module)).__name__
