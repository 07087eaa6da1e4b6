"""`override`: rules for the modules of a model that nobody edits, for as long as they are wanted.

registry or mapping -> `_core/targets.py` says which rule wins which module
                    -> all are checked -> `_core/overridden.py` puts them on, and takes them off again
"""

from __future__ import annotations

import html
import threading
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, NamedTuple

from torch import nn

from gradoverride._core.overridden import Layer, calls_under, check, has_forward, layers_of, put_on, take_off
from gradoverride._core.targets import Match, class_of, matches
from gradoverride.errors import GradOverrideWarning, TargetError
from gradoverride.registries import Registry, as_registry, entries_of, registry

__all__ = ["override", "remove_overrides", "explain", "Override"]

Rules = Registry | Mapping[Any, Callable[..., Any]]


def override(model: nn.Module, rules: Rules | None = None, /) -> Override:
    """Give modules of `model` the backward that `rules` say: now, and until the override is removed.

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

    `rules` is a `Registry`, or a mapping of targets to rules; without it, the default registry. A target is a module,
    a class, a glob or a predicate; the most specific one wins (see `Registry`). A rule is one of `custom_backward`.

    It is decided when a forward runs: a backward after the removal has the rules of its forward. Overrides nest: the
    later one is outside, and its `vjp` is the gradient of the earlier one. Copies and pickles of a module take its
    rules along, and have them for good (`remove_overrides`).

    Raises `TargetNotFoundError` for an entry that names no module, `TargetError` for what cannot be a target,
    `UnsupportedError` for a module that cannot be overridden, `RuleSignatureError` for a rule that asks for a name
    which the module does not have. Then nothing is changed.
    """
    if not isinstance(model, nn.Module):
        raise TargetError(
            f"override: 'model' must be a module; got {_kind(model)}. Give the model first, then the rules"
        )
    if rules is not None and not isinstance(rules, (Registry, Mapping)):
        raise TargetError(f"override: 'rules' must be a Registry or a mapping of targets to rules; got {_kind(rules)}")
    chosen = registry if rules is None else as_registry(rules)
    owner = f"a '{class_of(model).__name__}'"
    if not len(chosen):
        raise TargetError(f"override of {owner}: 'rules' must have an entry; {chosen!r} has none")
    found = _without_containers(matches(entries_of(chosen), model.named_modules(remove_duplicate=False), owner))
    for match in found:
        check(match.module, match.path, match.rule)
    return Override(owner, found)


def _without_containers(found: list[Match]) -> list[Match]:
    """A pattern may name a list of modules by the way, which has no forward. Named alone it is an error (`check`)."""
    called = {match.target for match in found if has_forward(match.module)}
    return [match for match in found if has_forward(match.module) or match.target not in called]


def remove_overrides(model: nn.Module) -> None:
    """Take all rules off the modules of `model`, whoever put them there, those that a copy has brought along too."""
    for module in model.modules():
        for layer in reversed(layers_of(module)):
            take_off(module, layer)


def explain(model: nn.Module) -> Table:
    """A table of the rules in force on the modules of `model` now: an outer one below an inner one."""
    return Table([_row(path, module, layer) for path, module in model.named_modules() for layer in layers_of(module)])


class Override:
    """Rules in force on a model: a context manager, a handle with `remove()`, and a table of what is overridden."""

    def __init__(self, owner: str, found: Sequence[Match]) -> None:
        self._owner = owner
        self._lock = threading.Lock()
        self._put: list[tuple[weakref.ref[nn.Module], Layer]] = []
        self._rows: list[Row] = []
        try:
            for match in found:
                layer = Layer(match.rule, match.path, f"{match.target.kind} {match.target}")
                put_on(match.module, layer)
                self._put.append((weakref.ref(match.module), layer))
        except BaseException:
            self._take_off()
            raise

    @property
    def table(self) -> Table:
        """What is overridden, and how often it has been called; after the removal what it was then."""
        rows = [_row(layer.path, module(), layer) for module, layer in self._put]
        return Table(rows or self._rows)

    def __str__(self) -> str:
        return str(self.table)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return self.table._repr_html_()

    def remove(self) -> None:
        """Take the rules off again. Warns of a rule that never ran. A second time it does nothing."""
        for path, layer in self._take_off():
            warnings.warn(
                f"override of {self._owner}: the rule {layer.rule.who} of the {layer.target} never ran while it was in "
                f"force; '{path}' was not called. Some modules read the weights of a part and do not call it: override "
                "the module around it",
                GradOverrideWarning,
                stacklevel=2,
            )

    def __enter__(self) -> Override:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.remove()
        else:
            self._take_off()

    def _take_off(self) -> list[tuple[str, Layer]]:
        """Take the rules off, and give those that never ran, each with one of its modules."""
        with self._lock:
            if not self._put:
                return []
            self._rows = list(self.table)
            put, self._put = self._put, []
        idle: dict[Any, tuple[str, Layer]] = {}
        ran = set()
        for reference, layer in reversed(put):
            module = reference()
            if module is None or calls_under(module, layer) != 0:
                ran.add(layer.rule)
            else:
                idle[layer.rule] = layer.path, layer
            if module is not None:
                take_off(module, layer)
        return [found for rule, found in idle.items() if rule not in ran]


class Row(NamedTuple):
    """One rule on one module, in words."""

    path: str
    cls: str
    target: str
    rule: str
    calls: str


class Table(list[Row]):
    """Rows that print as a table, in a notebook as one of HTML."""

    heads = Row("module", "class", "target that won", "rule", "calls")

    def __str__(self) -> str:
        if not self:
            return "nothing is overridden"
        lines = [self.heads, *self]
        widths = [max(len(line[column]) for line in lines) for column in range(len(self.heads))]
        padded = [[text.ljust(width) for text, width in zip(line, widths, strict=True)] for line in lines]
        return "\n".join("  ".join(line).rstrip() for line in padded)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        rows = "".join(_cells(row, "td") for row in self)
        return f"<table>{_cells(self.heads, 'th')}{rows}</table>"


def _cells(row: Row, tag: str) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(text)}</{tag}>" for text in row) + "</tr>"


def _row(path: str, module: nn.Module | None, layer: Layer) -> Row:
    if module is None:
        return Row(path, "(gone)", layer.target, layer.rule.who, "")
    calls = calls_under(module, layer)
    said = "compiled" if calls is None else str(calls)
    return Row(path or "(the model)", class_of(module).__name__, layer.target, layer.rule.who, said)


def _kind(value: Any) -> str:
    return f"the class '{value.__name__}'" if isinstance(value, type) else f"a {type(value).__name__}"
