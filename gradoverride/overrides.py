"""`override`: rules for the modules of a model that nobody edits, for as long as they are wanted.

registry or mapping -> `_core/in_force/targets.py` says which rule wins which module
                    -> all are checked -> `_core/overriding/overridden.py` puts them on, and takes them off again
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain, count
from types import TracebackType
from typing import Any, overload

import torch
from torch import nn

from gradoverride._core.binding.rule import Rule
from gradoverride._core.binding.signature import Forward, kind_of
from gradoverride._core.in_force import everywhere
from gradoverride._core.in_force.layers import ClassLayer, FunctionLayer, Layer, ModuleLayer, next_order
from gradoverride._core.in_force.table import EVERYWHERE, Row, Table, row_of
from gradoverride._core.in_force.targets import (
    Class,
    Entry,
    Function,
    ImportPath,
    Match,
    Target,
    class_of,
    family,
    matches,
    modules_of,
)
from gradoverride._core.overriding.class_patch import check_classes
from gradoverride._core.overriding.following import of_paths, take_off_given_up
from gradoverride._core.overriding.missed import only_read, passed_by
from gradoverride._core.overriding.obstacles import check_calls, check_forwards, check_scripted, warn_of_scripted
from gradoverride._core.overriding.overridden import (
    base_of,
    check,
    check_order,
    check_rule,
    functions_called,
    functions_of,
    has_forward,
    layers_of,
    take_off,
)
from gradoverride._core.overriding.path_patch import check_names, check_path, layers_on_paths
from gradoverride._core.overriding.puts import Put, Puts, on_class, on_copies, on_modules, on_none, on_path, on_thread
from gradoverride._core.overriding.scripted import is_scripted
from gradoverride._core.private.dynamo import MADE_OUTSIDE, out_of_graph
from gradoverride._core.private.marks import uncompiled
from gradoverride._core.python.paths import find, place_of
from gradoverride._core.torch_functions.functions import name_of_function, signature_of
from gradoverride.errors import GradOverrideWarning, TargetError, TargetNotFoundError, UnsupportedError
from gradoverride.registries import Registry, as_registry, entries_of, read_target, registry

__all__ = ["override", "remove_overrides", "explain", "Override"]

Rules = Registry | Mapping[Any, Callable[..., Any]] | str


@overload
def override(model: nn.Module, rules: Rules | None = None, /) -> Override: ...
@overload
def override(rules: Rules, /) -> Override: ...
def override(model: Any, rules: Any = None, /) -> Override:
    """Give modules of `model`, and functions that they call, the backward that `rules` say: until it is removed.

    >>> import torch, gradoverride as go
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU())
    >>> x = torch.ones(2, requires_grad=True)
    >>> with go.override(model, {torch.nn.ReLU: lambda grad_output: grad_output}) as plan:
    ...     y = model(x)
    >>> [(row.path, row.target, row.calls) for row in plan.table]
    [('1', "class 'ReLU'", '1')]
    >>> handle = go.override(model, {"0": lambda grad_output, vjp: 2 * vjp(grad_output)})
    >>> _ = model(x)
    >>> handle.remove()

    `rules` is a `Registry`, or a mapping of targets to rules, or the name of a published registry, such as
    `"guided_backprop"`; without it, the default registry. A target is a module, a class, a glob, a predicate, a
    function of torch, which stands for all its spellings, or an import path `"package.module:attribute"`; the most
    specific one wins (see `Registry`). A rule is one of `custom_backward`.

    Functions and paths are overridden in calls of `model`, its modules, and the methods that their classes define.
    Without a model, classes, functions and paths are overridden in the whole process. (Functions of torch in this
    thread, threads that it starts meanwhile, and tasks that it gives to an executor or a pool; if others run already, a
    warning says that they keep them.)

    It is decided when a forward runs: a backward after the removal has the rules of its forward. Overrides nest: the
    later one is outside, and its `vjp` is the gradient of the earlier one. Copies and pickles of a module take its
    rules along, and have them for good (`remove_overrides`).

    Raises `TargetNotFoundError` for an entry that names nothing, `TargetError` for what cannot be a target,
    `UnsupportedError` for a module that cannot be overridden, `RuleSignatureError` for a rule that asks for a name
    which the module does not have. Then nothing is changed.
    """
    if torch.compiler.is_dynamo_compiling():
        return _override_out_of_graph(model, rules)
    if not isinstance(model, nn.Module):
        if rules is not None or not isinstance(model, (Registry, Mapping, str)):
            raise TargetError(
                f"override: 'model' must be a module; got {kind_of(model)}. Give the model first, then the rules; or "
                "the rules alone, for the whole process"
            )
        return _override_everywhere(_read(model))
    return _override_in(model, registry if rules is None else _read(rules))


_override_out_of_graph = out_of_graph(override, MADE_OUTSIDE)


def _read(rules: Any) -> Registry:
    if isinstance(rules, str):
        from gradoverride.published import published  # reads what is installed

        return published(rules)
    if not isinstance(rules, (Registry, Mapping)):
        raise TargetError(
            f"override: 'rules' must be a Registry or a mapping of targets to rules; got {kind_of(rules)}"
        )
    return as_registry(rules)


def _override_in(model: nn.Module, rules: Registry) -> Override:
    model = uncompiled(model)
    owner = f"a '{class_of(model).__name__}'"
    entries = _entries(rules, owner)
    modules = modules_of(model)
    found = _without_containers(matches(entries, modules.items(), owner), modules)
    check_scripted(entries, modules)
    for match in found:
        check(match.module, match.path)
        check_rule(match.module, match.path, match.rule)
    order = next_order()
    # By identity: modules may compare equal.
    placed: dict[int, tuple[nn.Module, list[Layer]]] = {id(module): (module, []) for module in modules.values()}
    for match in found:
        placed[id(match.module)][1].append(ModuleLayer(match.rule, match.path, match.target.text, order))
    puts: list[Callable[[], Puts]] = []
    called = _called(entries)
    if called:
        check_calls(model, modules, called)
        own = ((class_of(module), [*added, *layers_of(module)]) for module, added in placed.values())
        check_forwards(called, ((cls, [*layers, *everywhere.layers_on(cls)]) for cls, layers in own))
    # Modules of one class call the same functions.
    calling: dict[int, tuple[Any, list[list[Layer]]]] = {}
    for module, added in placed.values() if called else ():
        if is_scripted(module):  # and calls none of them
            continue
        names = functions_called(module)
        calling.setdefault(id(names), (names, []))[1].append(added)
    before = {function for module, _ in placed.values() for function in functions_of(module)}
    before.update(of_paths)
    for target, rule in called:
        name = str(target.name)
        layer = FunctionLayer(name, rule, "", target.text, order, _first_free(count(), before, name, rule))
        in_torch = isinstance(target, ImportPath) and name.startswith("torch.")
        takers = [lists for names, lists in calling.values() if names is None or name in names or in_torch]
        for lists in takers:
            for added in lists:
                added.append(layer)
        if isinstance(target, ImportPath):
            puts.append(partial(on_path, target.value, layer, scoped=True))
        elif not takers:
            puts.append(partial(on_none, model, layer))
    if called or everywhere.functions:
        for module, added in placed.values():
            check_order(module, added)
    puts.insert(0, partial(on_modules, model, [one for one in placed.values() if one[1]]))
    return Override(owner, puts, _optional(entries), model)


def _override_everywhere(rules: Registry) -> Override:
    owner = "the whole process"
    order = next_order()
    puts: list[Callable[[], Puts]] = []
    entries = _entries(rules, owner)
    classes: dict[type, tuple[Class, Rule]] = {}  # a later entry wins
    for entry in entries:
        for target in entry.targets:
            if isinstance(target, Class):
                classes[target.value] = target, entry.rule
            elif not isinstance(target, (Function, ImportPath)):
                raise TargetError(
                    f"override of {owner}: a target must be a class, a function of torch or an import path; the "
                    f"{target.text} names modules of a model. Give the model first"
                )
    check_classes([of_class for of_class, _ in classes.values()])
    warn_of_scripted([target.name for target, _ in _called(entries) if isinstance(target, Function)])
    layers = [ClassLayer(rule, EVERYWHERE, of_class.text, order) for of_class, rule in classes.values()]
    before = [(of_class.value, layer) for of_class, layer in everywhere.classes]
    ruled = ((cls, [layer]) for base, layer in (*before, *zip(classes, layers, strict=True)) for cls in family(base))
    records = everywhere.all_records()
    check_forwards(_called(entries), chain(ruled, ((record.subject.base, record.layers) for record in records)))
    for (of_class, _), layer_of_class in zip(classes.values(), layers, strict=True):
        puts.append(partial(on_class, of_class, layer_of_class, of_class.path))
    for target, rule in _called(entries):
        name = str(target.name)
        nth = _first_free(count(-1, -1), everywhere.functions, name, rule)  # a model has none of these
        layer = FunctionLayer(name, rule, EVERYWHERE, target.text, order, nth)
        if isinstance(target, ImportPath):
            puts.append(partial(on_path, target.value, layer, scoped=False))
        else:
            puts.append(partial(on_thread, layer))
    return Override(owner, puts, _optional(entries))


def _entries(rules: Registry, owner: str) -> list[Entry]:
    """The entries, with what the paths name instead of those whose modules are there; or an error."""
    entries = entries_of(rules)
    if not entries:
        raise TargetError(f"override of {owner}: 'rules' must have an entry; {rules!r} has none")
    return [entry._replace(targets=tuple(_targets_there(entry))) for entry in entries]


def _targets_there(entry: Entry) -> Iterator[Target]:
    for target in entry.targets:
        try:
            yield _resolved(target, entry.rule)
        except TargetNotFoundError:  # of a package that is not installed, say
            if not entry.optional:
                raise


def _optional(entries: Sequence[Entry]) -> frozenset[Rule]:
    """The rules that may go without being called."""
    return frozenset({entry.rule for entry in entries}) - {entry.rule for entry in entries if not entry.optional}


def _resolved(target: Target, rule: Rule) -> Target:
    """A class of modules or a function of torch for a path that names one, checked."""
    if isinstance(target, ImportPath):
        value = find(target.value)
        if (isinstance(value, type) and issubclass(value, nn.Module)) or name_of_function(value) is not None:
            path, target = target.value, read_target(value)
            if isinstance(target, Class):
                target.path = path
        else:
            check_path(target.value, value, rule)
    if isinstance(target, Function):
        signature = signature_of(target.value, rule.asks)
        function = Forward(target.value, name=target.name, method=False, signature=signature)
        rule.once((check_names, target.value), partial(check_names, function, rule))
    return target


def _called(entries: Sequence[Entry]) -> list[tuple[Function | ImportPath, Rule]]:
    """The functions among the targets, each once: a later entry wins."""
    found: dict[Any, tuple[Function | ImportPath, Rule]] = {}
    for entry in entries:
        for target in entry.targets:
            if isinstance(target, (Function, ImportPath)):
                found[place_of(target.name) if isinstance(target, ImportPath) else target.name] = target, entry.rule
    return list(found.values())


def _first_free(numbers: Iterable[int], before: Collection[FunctionLayer], name: str, rule: Rule) -> int:
    """A number for a rule that tells it from the same rule for the same function in an override before."""
    taken = {layer.key.nth for layer in before if layer.key.name == name and layer.rule is rule}
    return next(number for number in numbers if number not in taken)


def _without_containers(found: list[Match], modules: Mapping[str, nn.Module]) -> list[Match]:
    """A pattern may name a list of modules by the way, which has no forward. Named alone it is an error (`check`)."""

    def names_others(target: Target) -> bool:
        callable_ones = ((path, module) for path, module in modules.items() if has_forward(module))
        return any(target.distance(path, module) is not None for path, module in callable_ones)

    return [match for match in found if has_forward(match.module) or not names_others(match.target)]


def remove_overrides(model: nn.Module) -> None:
    """Take all rules off the modules of `model`, whoever put them there, those that a copy has brought along too."""
    _check_model("remove_overrides", model)
    for module in modules_of(model).values():
        take_off(module, (*layers_of(module), *functions_of(module)))
    take_off_given_up()


def _check_model(who: str, model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TargetError(f"{who}: 'model' must be a module; got {kind_of(model)}")


def explain(model: nn.Module | None = None) -> Table:
    """A table of the rules in force on `model` now, an outer one below an inner one; or in the whole process."""
    rows: list[Row] = []
    seen: set[FunctionLayer] = set()
    if model is not None:
        _check_model("explain", model)
        known: set[int] = set()
        for path, module in modules_of(model).items():
            if id(module) in known:
                continue
            known.add(id(module))
            of_class = everywhere.layers_on(base_of(module)) if has_forward(module) else []
            functions = [layer for layer in functions_of(module) if layer not in seen]
            seen.update(functions)
            found = (*of_class, *layers_of(module), *functions)
            rows += [row_of(path, class_of(module).__name__, layer) for layer in found]
    else:
        rows += [row_of(EVERYWHERE, target.value.__name__, layer) for target, layer in everywhere.classes]
    rows += [row_of(EVERYWHERE, "", layer) for layer in (*everywhere.functions, *layers_on_paths())]
    return Table(rows)


class Override:
    """Rules in force: a context manager, a handle with `remove()`, and a table of what is overridden.

    A module may keep the handle of its own override: in a copy or a pickle it is the handle of the copy's rules.
    """

    def __init__(
        self,
        owner: str,
        puts: Sequence[Callable[[], Puts]],
        optional: frozenset[Rule],
        model: nn.Module | None = None,
    ) -> None:
        self._owner = owner
        self._optional = optional
        self._model = None if model is None else weakref.ref(model)
        self._of_copy: Layer | None = None
        self._lock = threading.Lock()
        self._puts: list[Put] = []
        self._rows: list[Row] = []
        self._is_over = ""  # why it cannot be entered
        try:
            for put in puts:
                self._puts.extend(put())
        except BaseException:
            self._take_off()
            raise

    def __getstate__(self) -> dict[str, Any]:
        self._find()
        if self._puts and self._model is None:
            raise UnsupportedError(
                f"override of {self._owner}: a handle that is copied or pickled must be of a model, whose copy has "
                "rules of its own; this one is of the whole process. Keep it outside of what is copied"
            )
        model = self._model() if self._puts and self._model is not None else None
        # A layer says, wherever it comes, which those of the same override are.
        layer = None if model is None else self._puts[0].layer
        return {"owner": self._owner, "rows": list(self.table), "model": model, "layer": layer}

    def __setstate__(self, state: dict[str, Any]) -> None:
        model = state["model"]
        self._owner, self._rows, self._optional = state["owner"], state["rows"], frozenset()
        self._model = None if model is None else weakref.ref(model)
        self._of_copy = state["layer"]
        self._lock = threading.Lock()
        self._puts = []
        self._is_over = "has been removed" if model is None else "is a copy"

    def _find(self) -> None:
        """Find the rules that the copy of a model has taken along, once it is whole: it may be unpickled after this."""
        layer, self._of_copy = self._of_copy, None
        model = None if layer is None or self._model is None else self._model()
        if layer is not None and model is not None:
            self._puts = list(on_copies(model, layer.order))
            self._optional = frozenset({put.layer.rule for put in self._puts})  # a copy need not be called

    @property
    def table(self) -> Table:
        """What is overridden, and how often it has been called; after the removal what it was then."""
        self._find()
        rows = {put.layer: row_of(put.layer.path, put.cls, put.layer) for put in self._puts}
        return Table(list(rows.values()) or self._rows)

    def __str__(self) -> str:
        return str(self.table)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return self.table._repr_html_()

    def remove(self) -> None:
        """Take the rules off again. Warns of one that never ran and is not optional. A second time it does nothing."""
        self._is_over = self._is_over or "has been removed"
        self._remove()

    def _remove(self) -> None:
        idle, awaited, missed = self._take_off()
        for layer in awaited:
            warnings.warn(
                f"override of {self._owner}: the rule {layer.rule.who} of the {layer.target} is no longer in force, "
                "and a reentrant checkpoint (or what is like one: the adjoint of a differential equation, an "
                "invertible layer) is still to run its block again, then without it. Leave the override after "
                "backward(), or give checkpoint(use_reentrant=False), which raises where the two differ",
                GradOverrideWarning,
                stacklevel=3,
            )
        for layer in idle:
            called = f"'{layer.path}' was" if layer.path not in ("", EVERYWHERE) else "it was"
            hint = (
                "Some modules read the weights of a part and do not call it: override the module around it"
                if not isinstance(layer, FunctionLayer)
                else "Some functions are called by another name, or in compiled code of torch's own"
            )
            warnings.warn(
                f"override of {self._owner}: the rule {layer.rule.who} of the {layer.target} never ran while it was in "
                f"force; {called} not called. {hint}",
                GradOverrideWarning,
                stacklevel=3,
            )
        for layer, how in missed.items():
            warnings.warn(
                f"override of {self._owner}: the rule {layer.rule.who} of the {layer.target} {how}",
                GradOverrideWarning,
                stacklevel=3,
            )

    def __enter__(self) -> Override:
        if self._is_over:
            raise UnsupportedError(
                f"override of {self._owner}: it must be entered when it is made, and once; it {self._is_over}, and "
                "would do nothing now. Call go.override(...) again, in the with statement"
            )
        self._is_over = "has been entered before"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._remove()
            return
        self._take_off()
        if isinstance(error, RuntimeError) and "is a view and is being modified inplace" in str(error):
            error.add_note(
                f"under an override of {self._owner}: the result of a module that has a rule and returns its argument "
                "as it is (nn.Identity, a dropout in eval()), or a view of it, must not be written into; what comes "
                "after it does. Have that work out of place (inplace=False), or leave the module out of the targets"
            )

    def _take_off(self) -> tuple[list[Layer], list[Layer], dict[Layer, str]]:
        """Take the rules off, and give those that never ran, and those that are to run again, each with one place; and
        the places that they have missed.
        """
        self._find()
        with self._lock:
            if not self._puts:
                return [], [], {}
            self._rows = list(self.table)
            puts, self._puts = self._puts, []
        idle: dict[Rule, Layer] = {}
        ran: set[Rule] = set()
        awaited = {put.layer.rule: put.layer for put in puts if put.layer.awaits_replay}
        called = [put.layer.known_calls != 0 for put in puts]
        lost = everywhere.farther_than([put.layer for put, was in zip(puts, called, strict=True) if was])
        modules = self._modules()
        missed = passed_by(modules, [put.layer for put in puts])
        for put, was in reversed(list(zip(puts, called, strict=True))):
            if was:
                ran.add(put.layer.rule)
            elif put.layer not in lost and put.layer not in missed:
                idle[put.layer.rule] = put.layer
        missed |= only_read(
            modules, {put.layer: was for put, was in zip(puts, called, strict=True)}, ran - self._optional
        )
        for put in reversed(puts):
            put.take_off()
        never = [layer for rule, layer in idle.items() if rule not in ran and rule not in self._optional]
        return never, list(awaited.values()), missed

    def _modules(self) -> dict[str, nn.Module]:
        model = None if self._model is None else self._model()
        return {} if model is None else modules_of(model)
