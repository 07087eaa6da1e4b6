"""A class of modules while it is overridden in the whole process: its `forward`, and that of each class derived from
it, is replaced on the class.

The forward that is put there looks the class of the module up: a class that defines a forward and calls `super()` in
it is called under its rule once. Classes that are derived later are found by `__init_subclass__`.
"""

from __future__ import annotations

import functools
import gc
import threading
import warnings
from collections.abc import Callable, Collection, Sequence
from types import FunctionType
from typing import Any

from torch.compiler import is_dynamo_compiling as compiling
from torch.fx import GraphModule
from torch.jit import ScriptModule

from gradoverride._core.calls.tracers import refuse_script
from gradoverride._core.in_force import everywhere
from gradoverride._core.in_force.layers import ClassLayer
from gradoverride._core.in_force.targets import Class, class_of, family
from gradoverride._core.overriding.chain import Subject, chain_of, links
from gradoverride._core.python.by_class import BASE, RECORD
from gradoverride._core.torch_functions.callers import calls_that_are
from gradoverride.errors import GradOverrideWarning, UnsupportedError

__all__ = ["check_classes", "put_on_class", "refresh", "take_off_class"]

_lock = threading.RLock()
_patches: dict[type, _Patch] = {}
_watched: dict[type, tuple[Any, Any]] = {}  # by class, our `__init_subclass__` and the one that it had itself
_unscripted: dict[type, tuple[Any, Any]] = {}  # the same of what torch.jit.script asks a module for


class _Patch:
    """Our forward on a class that defines one."""

    def __init__(self, cls: Any) -> None:
        self.cls = cls
        self.original = everywhere.without_inert(cls.__dict__["forward"])
        # Another descriptor than a function may have to be asked for what is called.
        original = self.original if type(self.original) is FunctionType else cls.forward
        self.runs: dict[type, Callable[..., Any]] = {}
        self.counted: dict[type, Sequence[Any]] = {}
        runs, counted = self.runs, self.counted

        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            cls = type(self)
            if cls not in runs and hasattr(cls, BASE) and getattr(self, RECORD, None) is None:
                cls = getattr(cls, BASE)  # a slice of an overridden Sequential is of our class, and not overridden
            run = runs.get(cls, original)  # a module that is overridden has the rules of its class itself
            if not compiling():
                for layer in counted.get(cls, ()):
                    layer.tally.calls += 1
            return run(self, *args, **kwargs)

        self.forward = functools.update_wrapper(forward, original, updated=())
        everywhere.originals[self.forward] = original
        cls.forward = self.forward

    def set(self, classes: Collection[type]) -> None:
        """Have the rules that are in force on these classes now. Modules of theirs may run meanwhile, in threads."""
        for cls in classes:
            found = links(Subject(cls, calls_that_are(cls), plain=True), (), ())
            chain = chain_of(cls, found)
            for layer in found.counted:
                chain.trace.tell(layer.tally)
            self.counted[cls], self.runs[cls] = found.counted, chain.forward
        for table in (self.runs, self.counted):
            for cls in table.keys() - classes:
                del table[cls]

    def take_off(self) -> None:
        """Put the original back; where somebody has replaced ours, ours does nothing from now on."""
        self.set(())
        del everywhere.originals[self.forward]
        everywhere.inert[self.forward] = self.original
        standing = self.cls.__dict__.get("forward")
        original = everywhere.without_inert(self.original if standing is self.forward else standing)
        if standing is not original:
            self.cls.forward = original


def check_classes(targets: Sequence[Class]) -> None:
    """Raise what is in the way of an override of all modules of these classes, before anything is changed."""
    for target in targets:
        if issubclass(target.value, GraphModule) or issubclass(GraphModule, target.value):  # a base of it: `nn.Module`
            raise UnsupportedError(
                f"{_who(target)}: a GraphModule, which is one of its modules, has a forward of its own, which torch "
                "makes anew when the graph changes; a class to be overridden in the whole process must have one. Name "
                "other classes, or give the model first"
            )
        for cls in _to_be_patched(target.value):
            other = everywhere.no_method(cls)
            if other:
                raise UnsupportedError(f"{_who(target)}: '{cls.__name__}' must have a method 'forward'; it has {other}")
    if not any(_passing_by(targets)):
        return
    gc.collect()  # they may be garbage
    replaced, scripted = _passing_by(targets)
    for target, name in replaced.items():
        raise UnsupportedError(
            f"{_who(target)}: its modules must have the forward of their class; somebody has put another one on one of "
            f"them, a '{name}', which would pass the override by. Override the class before that is done"
        )
    for target, name in scripted.items():
        warnings.warn(
            f"{_who(target)}: its modules must run Python code to be overridden; there is a scripted '{name}', "
            "which keeps its own gradient. Override the class before that is scripted",
            GradOverrideWarning,
            stacklevel=4,
        )


def _who(target: Class) -> str:
    return f"override of the class '{target.value.__name__}'"


def _passing_by(targets: Sequence[Class]) -> tuple[dict[Class, str], dict[Class, str]]:
    """By target, the class of a module that has another forward than its class, and that of one that was scripted.

    Modules are found by what refers to their classes. Not among all objects that there are: whoever has these has
    tuples that other threads are about to make, and Python lets no tuple grow that somebody else has. One look for all
    targets: it takes some 10 ms, however many classes there are.
    """
    replaced: dict[Class, str] = {}
    scripted: dict[Class, str] = {}
    classes = (*[target.value for target in targets], ScriptModule)
    for module in gc.get_referrers(*{derived for cls in classes for derived in family(cls)}) if targets else ():
        if not issubclass(type(module), classes):  # `isinstance` would ask proxies
            continue
        for target in targets:
            if isinstance(module, ScriptModule):
                if name := target.name_of_scripted(module):
                    scripted.setdefault(target, name)
            elif issubclass(type(module), target.value) and "forward" in vars(module) and RECORD not in vars(module):
                replaced.setdefault(target, class_of(module).__name__)
    return replaced, scripted


def put_on_class(target: Class, layer: ClassLayer) -> None:
    """Put a rule on all modules of a class, those that there are and those to come."""
    with _lock:
        everywhere.classes.append((target, layer))
        try:
            refresh()
        except BaseException:
            take_off_class(layer)
            raise


def take_off_class(layer: ClassLayer) -> None:
    """Take it off again."""
    with _lock:
        left = [pair for pair in everywhere.classes if pair[1] is not layer]
        if len(left) != len(everywhere.classes):
            everywhere.classes[:] = left
            refresh()


def refresh() -> None:
    """Have the forwards of all classes, and those of the modules that are overridden, be as `everywhere` says."""
    with _lock:
        targets = {target.value for target, _ in everywhere.classes}
        wanted: dict[type, set[type]] = {}
        concerned = {derived for target in targets for derived in _to_be_patched(target)}
        for cls in [cls for cls in concerned if not everywhere.no_method(cls)]:
            wanted.setdefault(_definer(cls), set()).add(cls)
        for cls in [cls for cls in _patches if cls not in wanted]:
            _patches.pop(cls).take_off()
        for owner, classes in wanted.items():
            patch = _patches.get(owner)
            if patch is None or owner.__dict__.get("forward") is not patch.forward:
                if patch is not None:
                    patch.take_off()  # what has replaced it may call it
                patch = _patches[owner] = _Patch(owner)
            patch.set(classes)
        # What has an `__init_subclass__` of its own may not tell its super.
        watched = targets | {cls for cls in concerned if "__init_subclass__" in cls.__dict__}
        for cls in [cls for cls in _watched if cls not in watched]:
            _unwatch(cls)
        for cls in watched - _watched.keys():
            _watch(cls)
        for cls in [cls for cls in _unscripted if cls not in targets]:
            _let_script(cls)
        for cls in targets - _unscripted.keys():
            _refuse_to_script(cls)
        everywhere.refresh_records()
        everywhere.forget_compiled()


def _to_be_patched(cls: type) -> list[type]:
    """A class and those derived from it, but for those that are ours."""
    return [derived for derived in family(cls) if BASE not in derived.__dict__]


def _definer(cls: type) -> type:
    """The class whose forward modules of `cls` have."""
    return next(base for base in cls.__mro__ if "forward" in base.__dict__ and BASE not in base.__dict__)


def _watch(cls: Any) -> None:
    """Be told of classes that are derived from this one."""
    own = cls.__dict__.get("__init_subclass__")

    def __init_subclass__(derived: Any, /, **kwargs: Any) -> None:
        if own is not None:
            own.__func__(derived, **kwargs)
        else:
            super(cls, derived).__init_subclass__(**kwargs)
        other = everywhere.no_method(derived)
        if other:
            warnings.warn(
                f"override of the class '{cls.__name__}': '{derived.__name__}', which is derived from it now, must "
                f"have a method 'forward' to be overridden too; it has {other}",
                GradOverrideWarning,
                stacklevel=2,
            )
        refresh()

    ours = classmethod(__init_subclass__)
    _watched[cls] = ours, own
    cls.__init_subclass__ = ours


def _unwatch(cls: Any) -> None:
    _put_back(cls, "__init_subclass__", *_watched.pop(cls))


def _refuse_to_script(cls: Any) -> None:
    """Have torch.jit.script be refused, which reads the code of the forward, and would find that of the original."""

    def __prepare_scriptable__(self: Any) -> Any:
        rule = everywhere.layers_on(class_of(self))[-1].rule
        refuse_script(f"a '{class_of(self).__name__}', whose class is overridden,", rule.who, "script it without that")

    _unscripted[cls] = __prepare_scriptable__, cls.__dict__.get("__prepare_scriptable__")
    cls.__prepare_scriptable__ = __prepare_scriptable__


def _let_script(cls: Any) -> None:
    _put_back(cls, "__prepare_scriptable__", *_unscripted.pop(cls))


def _put_back(cls: Any, name: str, ours: Any, own: Any) -> None:
    """Leave a class with its own, or none; or with what somebody else has put there, which may call ours."""
    if cls.__dict__.get(name) is not ours:
        return
    if own is None:
        delattr(cls, name)
    else:
        setattr(cls, name, own)
