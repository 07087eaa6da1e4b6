"""A class that is decorated bare: its `backward` is the rule of its `forward`. And what no decorated class may be."""

from __future__ import annotations

import inspect
import itertools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

from gradoverride._core.binding.rule import Rule
from gradoverride._core.binding.signature import Forward
from gradoverride._core.calls.plan import Plan
from gradoverride._core.calls.wrapper import make_wrapper
from gradoverride._core.python.scan import location, mentions
from gradoverride.errors import DecorationError

__all__ = ["place_of", "refuse_function", "refuse_lazy", "text_of", "with_own_backward"]


def with_own_backward(cls: Any) -> Any:
    """`cls`, whose `backward` is the rule of its `forward`; so it is of each subclass that has these of its own."""
    refuse_function(cls)
    given = {name: getattr(cls, name, None) for name in ("forward", "backward")}
    missing = [name for name, fn in given.items() if not callable(fn) or fn is nn.Module.forward]
    if missing:
        raise DecorationError(
            f"custom_backward: {text_of(cls)} must define both 'forward(self, ...)' and "
            f"'backward(self, grad_output, ...)'; it has no '{missing[0]}'. Define it, or give a rule: "
            "@custom_backward(rule)"
        )
    if not issubclass(cls, nn.Module):
        raise DecorationError(
            f"custom_backward: {text_of(cls)} must be an nn.Module to be decorated bare, for "
            "its 'backward' to find parameters; give a rule instead: @custom_backward(rule)"
        )
    for name in ("forward", "backward"):
        if isinstance(inspect.getattr_static(cls, name), (staticmethod, classmethod)):
            raise DecorationError(
                f"custom_backward: '{name}' of {text_of(cls)} must be a method of its "
                "instances, for 'backward' to find their parameters; it is a static method or one of the class. Take "
                "'self' as its first parameter, or give a rule: @custom_backward(rule)"
            )
    if cls in _decorated:  # when it was made
        return cls
    refuse_lazy(cls)
    rule = Rule(cls.backward, method=True)
    forward = Forward(cls.forward, name=cls.__name__, method=True)
    cls.forward = make_wrapper(Plan(forward, rule, class_form=True), cls.forward)
    _decorated.add(cls)
    if not any(base in _decorated for base in cls.__mro__[1:]):
        cls.__init_subclass__ = classmethod(_also_subclasses(cls))
    return cls


# Classes that are decorated bare.
_decorated: weakref.WeakSet[type] = weakref.WeakSet()


def _also_subclasses(base: Any) -> Callable[..., None]:
    """What is called for each subclass of `base`: one with a forward of its own is decorated as well.

    Its forward takes the place of the decorated one, and its backward would never run.
    """
    own = base.__dict__.get("__init_subclass__")

    def __init_subclass__(cls: Any, **kwargs: Any) -> None:
        if own is None:
            super(base, cls).__init_subclass__(**kwargs)
        else:
            own.__get__(None, cls)(**kwargs)
        if _has_own_forward(cls):
            with_own_backward(cls)

    return __init_subclass__


def _has_own_forward(cls: type) -> bool:
    """Whether the forward of `cls` has no rule: it is none of a decorated class, and calls none, as far as code shows.

    With a backward beside it, it is one of its own even if it does.
    """
    owner = next(base for base in cls.__mro__ if "forward" in base.__dict__)
    if owner in _decorated:
        return False
    if owner is cls and "backward" in cls.__dict__:
        return True
    before = itertools.takewhile(lambda base: base not in _decorated, cls.__mro__)
    methods = [fn for base in before for fn in base.__dict__.values() if inspect.isfunction(fn)]
    return not any(mentions(fn, "forward") for fn in methods)


def refuse_function(cls: type) -> None:
    """A Function of torch has its rule already."""
    if issubclass(cls, torch.autograd.Function):
        raise DecorationError(
            f"custom_backward: {text_of(cls)} must be no torch.autograd.Function, whose own "
            f"'backward' is its rule. Decorate a function that calls {cls.__name__}.apply, or the function that its "
            "forward is about"
        )


def refuse_lazy(cls: Any) -> None:
    """A lazy module becomes one of another class when it has its parameters, and would have no rule then."""
    later = getattr(cls, "cls_to_become", None) if issubclass(cls, LazyModuleMixin) else None
    if later is not None and not hasattr(later.forward, "__wrapped__"):
        raise DecorationError(
            f"custom_backward: {text_of(cls)} must stay what it is, for its forward to have a "
            f"rule; it is lazy, and becomes '{later.__name__}' when it has its parameters. Write cls_to_become = None "
            "in it"
        )


def text_of(cls: type) -> str:
    """How messages about a class begin."""
    return f"class '{cls.__name__}' ({place_of(cls)})"


def place_of(cls: type) -> str:
    """Where a class is, by its methods."""
    for name in ("forward", "backward", "__init__"):
        if name in cls.__dict__:
            found = cls.__dict__[name]
            return location(found.__func__ if isinstance(found, (staticmethod, classmethod)) else found)
    return cls.__module__
