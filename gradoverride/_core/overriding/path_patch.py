"""A function that an import path names, under rules.

A plain function stands in its place (Dynamo would see through a proxy of wrapt), in the module, and in each module that
has imported it by name, or has a method that was bound to it (`spike = Spike.apply`). When the rules are gone it is
taken out again; where somebody has kept it, it calls the original.
"""

from __future__ import annotations

import functools
import gc
import inspect
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from types import (
    BuiltinMethodType,
    CellType,
    ClassMethodDescriptorType,
    FrameType,
    FunctionType,
    MethodType,
    ModuleType,
)
from typing import Any, NamedTuple

from torch import nn
from torch.autograd import Function
from torch.compiler import is_dynamo_compiling as compiling

from gradoverride._core.autograd.ambient import here
from gradoverride._core.binding.rule import Made, Rule
from gradoverride._core.binding.signature import Forward, kind_of, resolve
from gradoverride._core.calls.plan import Plan
from gradoverride._core.calls.wrapper import make_wrapper
from gradoverride._core.in_force import everywhere
from gradoverride._core.in_force.layers import FunctionLayer, FunctionRule, Order
from gradoverride._core.in_force.targets import class_of, family
from gradoverride._core.private.dynamo import fail
from gradoverride._core.python import scan
from gradoverride._core.python.by_class import standing
from gradoverride._core.python.imports import resolve_path
from gradoverride._core.python.paths import PENDING, parts_of, way_to_apply
from gradoverride._core.python.residuals import save_for_backward
from gradoverride._core.torch_functions.function_mode import count, note_unrecorded
from gradoverride.errors import GradOverrideWarning, TargetError, UnsupportedError

__all__ = ["check_names", "check_path", "layers_on_paths", "put_on_path", "take_off_path"]

_lock = threading.RLock()


def check_path(path: str, value: Any, rule: Rule) -> None:
    """Raise what is in the way of an override of the function `value`, before anything is changed."""
    if value is PENDING:
        return
    inner = _within(value)
    if isinstance(inner, type) or not callable(inner):
        raise TargetError(
            f"override of path '{path}': it must name a function, a method or a class of modules; it names "
            f"{kind_of(inner)}{way_to_apply(inner)}"
        )
    owner = getattr(inner, "__self__", inner)
    if isinstance(owner, nn.Module) and any([parameter.requires_grad for parameter in owner.parameters()]):
        kind = class_of(owner).__name__
        raise TargetError(
            f"override of path '{path}': it must name a function, a method or a class of modules; it names "
            f"{'a' if owner is inner else 'a method of a'} '{kind}' that is there, whose parameters would lose their "
            f"gradients. Give the module itself, go.override(module, {{module: rule}}), or the method of its class"
        )
    module_name, attribute = parts_of(path)
    parent, name, _ = resolve_path(sys.modules[module_name], attribute)
    if not hasattr(parent, "__dict__"):
        raise TargetError(
            f"override of path '{path}': it must name what stands in a module, a class or an object with a "
            f"'__dict__'; '{name}' is that of a '{type(parent).__qualname__}', which has none. Give the path of the "
            "function that it holds"
        )
    if isinstance(parent, type) and standing(parent, name) is None:
        raise TargetError(
            f"override of path '{path}': it must name what stands in the class; '{name}' stands in its metaclass, "
            f"'{type(parent).__qualname__}' of {type(parent).__module__}, whose methods are called with the class. "
            "Give the path of that method"
        )
    if _is_of_autograd(parent) and name in _CALLED_BY_APPLY:
        raise TargetError(
            f"override of path '{path}': it must name what is called for a gradient; '{name}' of an autograd.Function "
            f"is called by torch, which takes the gradient of the whole{way_to_apply(parent)}"
        )
    check_names(_forward(value, attribute, in_class="." in attribute), rule)


_CALLED_BY_APPLY = ("forward", "backward", "setup_context", "vmap", "jvp", "vjp")


def check_names(forward: Forward, rule: Rule) -> None:
    """Raise if the rule asks for what a forward does not offer."""
    resolve(rule, forward, may_defer=forward.is_method or scan.calls(forward.fn, save_for_backward))


def _in_models(layer: FunctionLayer, above: Callable[..., Any], beneath: Callable[..., Any]) -> Callable[..., Any]:
    key = layer.key

    def step(*args: Any, **kwargs: Any) -> Any:
        if key.mark not in here.active:
            return beneath(*args, **kwargs)
        if not compiling():
            count([key])
        return above(*args, **kwargs)

    return step


def _anywhere(layer: FunctionLayer, above: Callable[..., Any], _: Callable[..., Any]) -> Callable[..., Any]:
    def called() -> None:
        layer.tally.calls += 1

    def step(*args: Any, **kwargs: Any) -> Any:
        if not compiling():
            called()
        return above(*args, **kwargs)

    return step


class _Form(NamedTuple):
    """What others may have of a function, and what of ours."""

    theirs: Any
    ours: Any


class _Place(NamedTuple):
    """Where something stands under a name, in its own right or inherited."""

    holder: Any
    name: str
    own: bool
    value: Any


class _Replacement:
    """Our function where another stands, and the rules in force on it."""

    def __init__(self, path: str, inherited: _Replacement | None) -> None:
        module_name, self.attribute = parts_of(path)
        self.path = path
        self.layers: tuple[tuple[FunctionLayer, bool], ...] = inherited.layers if inherited else ()
        parent, name, stands = resolve_path(sys.modules[module_name], self.attribute)
        self.parent = parent
        self.original: Any = inherited.original if inherited else everywhere.without_inert(stands)
        self.kind = _kind(self.original)
        self.function = _within(self.original)
        self.in_class = isinstance(parent, type)
        theirs = [self.original, *self._other_forms()]
        self.places = [_Place(parent, name, name in vars(parent), self.original), *self._aliases(name)]
        self.places += [place for place in _named_so([*theirs, stands]) if place[:2] != (parent, name)]
        if stands is self.original:
            self._warn_of_others(theirs)
        self.backward = _Backward(path, parent) if name == "apply" and _is_of_autograd(parent) else None

        run = self.function

        def stand_in(*args: Any, **kwargs: Any) -> Any:
            return run(*args, **kwargs)

        def run_from_now_on(under_rules: Callable[..., Any]) -> None:
            nonlocal run  # Dynamo may see no object of ours here
            run = under_rules

        self.run_from_now_on = run_from_now_on

        functools.update_wrapper(stand_in, self.function, updated=())
        self.stand_in: Any = stand_in if self.kind is None else self.kind(stand_in)
        self.forms = [_Form(value, self._ours(value, stand_in)) for value in theirs]
        ours = {id(stands): self.stand_in, **{id(form.theirs): form.ours for form in self.forms}}
        try:
            for place in self.places:
                setattr(place.holder, place.name, ours[id(place.value)])
        except BaseException:  # a module may let nothing be set
            self.take_out()
            raise

    def set(self, layers: tuple[tuple[FunctionLayer, bool], ...]) -> None:
        """Have these rules, the last one outermost; each with whether it is for certain models only."""
        self.layers = layers
        run = self.function
        # The rule of a model and that of its copies is one.
        steps = {layer.key if scoped else layer: (layer, scoped) for layer, scoped in sorted(layers, key=_place_among)}
        for layer, scoped in steps.values():
            run = self._step(layer, scoped, run)
        self.run_from_now_on(run)
        if self.backward is not None:
            self.backward.refuse([None if not scoped else layer.key for layer, scoped in layers])
        self._tell()

    def _tell(self) -> None:
        """What was made of the function before is made anew."""
        if self.in_class:
            everywhere.refresh_records()
        everywhere.forget_compiled()

    def _step(self, layer: FunctionLayer, scoped: bool, beneath: Callable[..., Any]) -> Callable[..., Any]:
        plan = Plan(_forward(self.original, self.attribute, in_class=self.in_class, fn=beneath), layer.rule)
        plan.marked = True
        plan.on_trace = layer.key.note_trace
        plan.on_unrecorded = functools.partial(note_unrecorded, layer.key) if scoped else layer.tally.note_unrecorded
        step = (_in_models if scoped else _anywhere)(layer, make_wrapper(plan, beneath), beneath)
        return functools.update_wrapper(step, beneath, updated=())

    def _aliases(self, name: str) -> list[_Place]:
        """Where the same stands in its class under other names: `__call__ = step`."""
        if not self.in_class:
            return []
        names = {other for cls in self.parent.__mro__ for other, value in vars(cls).items() if value is self.original}
        names = {other for other in names - {name} if standing(self.parent, other) is self.original}
        return [_Place(self.parent, other, other in vars(self.parent), self.original) for other in sorted(names)]

    def _other_forms(self) -> list[Any]:
        """Of one in a class: the function of a static method, and methods that were bound when they were looked up."""
        if not self.in_class:
            return []
        if self.kind is staticmethod:
            return [self.function]
        in_c = isinstance(self.original, ClassMethodDescriptorType)  # which its methods do not lead to
        found = gc.get_referrers(*family(self.parent) if in_c else [self.function])
        bound = [value for value in found if isinstance(value, (MethodType, BuiltinMethodType))]
        name = self.function.__name__
        return [one for one in bound if one.__name__ == name and self.parent in _classes_of(one.__self__)]

    def _ours(self, theirs: Any, stand_in: Any) -> Any:
        if theirs is self.original:
            return self.stand_in
        return stand_in if theirs is self.function else MethodType(stand_in, theirs.__self__)

    def inherits(self, base: _Replacement) -> bool:
        """Whether ours stands where the name had what it has in a class that this one is derived from."""
        inherited = self.in_class and self.original is base.original and not self.places[0].own
        return inherited and self is not base and issubclass(self.parent, base.parent)

    def take_out(self) -> None:
        """Put the original back wherever ours stands."""
        self.set(())
        everywhere.inert[getattr(self.stand_in, "__func__", self.stand_in)] = self.original
        theirs = {id(form.ours): everywhere.without_inert(form.theirs) for form in self.forms}
        for place in [*self.places, *_named_so([form.ours for form in self.forms])]:
            found = id(vars(place.holder).get(place.name))
            if found not in theirs:
                continue  # somebody has put another one there
            if place.own:
                setattr(place.holder, place.name, theirs[found])
            else:
                delattr(place.holder, place.name)
        if self.backward is not None:
            self.backward.take_out()
        self._tell()

    def _warn_of_others(self, theirs: list[Any]) -> None:
        """What holds the function otherwise than by a name of a module goes on calling it."""
        others = sorted(set(_holders(theirs, [place.holder for place in self.places])))
        if others:
            warnings.warn(
                f"override of path '{self.path}': it is also held by {', '.join(others)}; what is called through that "
                "is not overridden. Override before it is handed out, or what calls it",
                GradOverrideWarning,
                stacklevel=5,
            )


def _is_of_autograd(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, Function) and isinstance(_backward_of(value), staticmethod)


def _backward_of(function: Any) -> Any:
    return inspect.getattr_static(function, "backward", None)


class _Backward:
    """The backward of a Function whose `apply` has rules. Dynamo knows what `apply` is and passes ours by, and traces
    the backward: which says so there.
    """

    def __init__(self, path: str, function: Any) -> None:
        self.function = function
        self.own = "backward" in vars(function)
        self.original = _backward_of(function)
        run = self.original.__func__
        keys: Sequence[FunctionRule | None] = ()

        def backward(ctx: Any, *grads: Any) -> Any:
            if compiling() and any([key is None or key.mark in here.active for key in keys]):
                fail(
                    UnsupportedError,
                    f"override of path '{path}': the 'apply' of an autograd.Function must be called uncompiled to be "
                    "overridden, for torch.compile knows what it is and passes the rule by. Give the path of a "
                    "function that calls it, or leave that uncompiled",
                )
            return run(ctx, *grads)

        def refuse(found: Sequence[FunctionRule | None]) -> None:
            nonlocal keys  # Dynamo may see no object of ours here
            keys = found

        self.refuse = refuse
        self.stand_in = staticmethod(functools.update_wrapper(backward, run, updated=()))
        function.backward = self.stand_in

    def take_out(self) -> None:
        if vars(self.function).get("backward") is not self.stand_in:
            return  # somebody has put another one there
        if self.own:
            self.function.backward = self.original
        else:
            del self.function.backward


def _forward(original: Any, attribute: str, *, in_class: bool, fn: Any = None) -> Forward:
    """A function as its rule sees it. In a class it is a method, if it is not static."""
    return Forward(fn or _within(original), name=attribute, method=in_class and not isinstance(original, staticmethod))


def _kind(value: Any) -> type | None:
    """Of what stands in a class and is no method of its instances: `staticmethod` or `classmethod`."""
    if isinstance(value, ClassMethodDescriptorType):
        return classmethod
    return type(value) if isinstance(value, (staticmethod, classmethod)) else None


def _within(value: Any) -> Any:
    """The function in a static or class method; for one in C, as `apply` of a Function may be, one that calls it."""
    if isinstance(value, ClassMethodDescriptorType):

        def of_class(cls: Any, /, *args: Any, **kwargs: Any) -> Any:
            return value(cls, *args, **kwargs)

        of_class.__name__ = of_class.__qualname__ = value.__name__
        return of_class
    return value.__func__ if isinstance(value, (staticmethod, classmethod)) else value


def _classes_of(receiver: Any) -> tuple[type, ...]:
    return (receiver if isinstance(receiver, type) else type(receiver)).__mro__


def _named_so(values: Sequence[Any]) -> Iterator[_Place]:
    """Where modules have one of `values` under some name."""
    known = set(map(id, values))
    modules: list[tuple[str, Any]] = list(sys.modules.items())
    for name, module in modules:
        if isinstance(module, ModuleType) and name.partition(".")[0] != "gradoverride":
            for attribute, found in list(vars(module).items()):
                if id(found) in known:
                    yield _Place(module, attribute, True, found)


def _holders(values: list[Any], known: list[Any]) -> Iterator[str]:
    """What else holds a function, or another form of it, in words."""
    modules = [id(vars(place)) for place in known if isinstance(place, ModuleType)]
    classes = [vars(cls).keys() for place in known if isinstance(place, type) for cls in place.__mro__]
    arguments = tuple(values)  # Python 3.13 counts those of the call itself
    for holder in gc.get_referrers(*arguments):
        if any([holder is one for one in (values, arguments, *values)]):  # a form holds another
            continue
        if classes and isinstance(holder, MethodType):  # of an object of another class that has the function
            continue
        if id(holder) in modules or isinstance(holder, FrameType) or _is_ours(holder):
            continue
        if isinstance(holder, CellType):
            # One of a function that runs now is held by no closure; it may be our own.
            closures = [closure for closure in gc.get_referrers(holder) if isinstance(closure, tuple)]
            if not all([_is_in_override(closure) for closure in closures]):
                yield "a closure"
        elif isinstance(holder, dict):
            # A class has its names in a dict that is not to be had; whoever wraps it holds it in a closure as well.
            if holder.keys() not in classes and all([holder.get("__wrapped__") is not value for value in values]):
                yield "a dict"
        elif isinstance(holder, (list, tuple, set)):
            if any([isinstance(owner, (_CACHED, Made)) for owner in gc.get_referrers(holder)]):
                continue  # the arguments of a call whose result is cached, of our own too
            yield f"a {type(holder).__name__}"
        else:
            yield f"an object of class '{type(holder).__name__}'"


_CACHED = type(functools.cache(len))


def _is_in_override(closure: tuple[Any, ...]) -> bool:
    """Whether functions that stand somewhere for an override have this closure. What a decorator gives has not."""
    owners = [owner for owner in gc.get_referrers(closure) if isinstance(owner, FunctionType)]
    return bool(owners) and all([str(owner.__globals__.get("__name__")).startswith(_OVERRIDING) for owner in owners])


_OVERRIDING = ("gradoverride._core.overriding.", "gradoverride._core.torch_functions.")


def _is_ours(holder: Any) -> bool:
    """Whether this is an object of this library, its `__dict__`, or the names of a function that it has generated."""
    owners = [holder]
    if isinstance(holder, dict):
        if "_go_fn" in holder or any(
            [holder is ours for ours in (everywhere.originals, vars(everywhere.inert)["data"])]
        ):
            return True
        owners = [owner for owner in gc.get_referrers(holder) if getattr(owner, "__dict__", None) is holder]
    return any(type(owner).__module__.startswith("gradoverride.") for owner in owners)


def _place_among(layer: tuple[FunctionLayer, bool]) -> Order:
    return layer[0].order


_replacements: list[_Replacement] = []


def layers_on_paths() -> list[FunctionLayer]:
    """The rules in force on what paths name, of the whole process, an inner one before an outer one."""
    found = [layer for one in _replacements for layer, scoped in one.layers if not scoped]
    return sorted(dict.fromkeys(found), key=lambda layer: layer.order)


def put_on_path(path: str, layer: FunctionLayer, *, scoped: bool) -> None:
    """Put a rule on the function that a path names: if `scoped`, where its key is active alone."""
    with _lock:
        module_name, attribute = parts_of(path)
        parent, _, stands = resolve_path(sys.modules[module_name], attribute)
        ours = [replacement for replacement in _replacements if replacement.stand_in is stands]
        found = [replacement for replacement in ours if replacement.parent is parent or not replacement.in_class]
        if not found:
            found = [_Replacement(path, ours[0] if ours else None)]
            _replacements.extend(found)
        found += [replacement for replacement in _replacements if replacement.inherits(found[0])]
        try:
            for replacement in found:
                replacement.set((*replacement.layers, (layer, scoped)))
        except BaseException:  # a generator gives nothing that a rule could be for
            take_off_path(layer)
            raise


def take_off_path(layer: FunctionLayer) -> None:
    """Take it off again."""
    with _lock:
        for replacement in list(_replacements):
            left = tuple([pair for pair in replacement.layers if pair[0] is not layer])
            if not left:
                _replacements.remove(replacement)
                replacement.take_out()
            elif left != replacement.layers:
                replacement.set(left)
