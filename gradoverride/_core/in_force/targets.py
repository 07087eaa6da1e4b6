"""What a target names among the modules of a model, and which of several wins.

From the most specific to the least: the module itself, a glob over dotted names, a predicate, a class (the nearer in
the MRO first, so the exact one before its bases), a function of torch. A later entry wins a tie. Pure: nothing is
changed here.
"""

from __future__ import annotations

import difflib
import fnmatch
import functools
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from gradoverride._core.binding.rule import Rule
from gradoverride._core.binding.signature import name_of
from gradoverride._core.private.marks import ORIGINAL, uncompiled
from gradoverride._core.python.by_class import BASE
from gradoverride._core.python.scan import location
from gradoverride.errors import TargetNotFoundError

__all__ = [
    "Class",
    "Entry",
    "Function",
    "Glob",
    "ImportPath",
    "Instance",
    "Match",
    "Predicate",
    "Target",
    "class_of",
    "family",
    "matches",
    "modules_of",
]


class Target:
    """A target, read. Its `rank` is the lower the more specific its kind is."""

    kind: str
    rank: int

    def __init__(self, value: Any) -> None:
        self.value = value

    @functools.cached_property
    def text(self) -> str:
        """What it is called in messages and tables."""
        return f"{self.kind} {self}"

    def distance(self, path: str, module: Any) -> int | None:
        """How far this is from naming just the module at `path`; None if it does not name it."""
        raise NotImplementedError

    def closest(self, modules: Mapping[str, Any]) -> str:
        """The remedy where it names no module."""
        raise NotImplementedError


class Instance(Target):
    """A module of the model."""

    kind, rank = "module", 0

    def __init__(self, value: Any) -> None:
        super().__init__(value)
        self.module = uncompiled(value)

    def distance(self, path: str, module: Any) -> int | None:
        return 0 if module is self.module else None

    def closest(self, modules: Mapping[str, Any]) -> str:
        same = [path for path, module in modules.items() if type(module) is type(self.module)]
        return f"Of this class it has {_listed(same)}" if same else f"Its modules are {_listed(list(modules))}"

    def __str__(self) -> str:
        return f"{type(self.module).__name__}"


class Glob(Target):
    """A pattern over dotted names, as of `fnmatch`: `*` stands for any characters, dots too."""

    kind, rank = "glob", 1

    def __init__(self, value: Any) -> None:
        super().__init__(value)
        # As the names are in a state_dict, and as they are without `torch.compile`: see `modules_of`.
        self.patterns = {value, ".".join([part for part in value.split(".") if part != ORIGINAL])}

    def distance(self, path: str, module: Any) -> int | None:
        named = path in self.patterns or any(fnmatch.fnmatchcase(path, pattern) for pattern in self.patterns)
        return 0 if path and named else None

    def closest(self, modules: Mapping[str, Any]) -> str:
        if not self.value:
            return "The model itself has no name: give the module as the target"
        names = [path for path in modules if path]
        if not names:
            return "It has no modules within: give the module itself as the target, or its class"
        close = difflib.get_close_matches(self.value, names, n=3, cutoff=0.4)
        return f"The closest names are {_listed(close)}" if close else f"Its modules are {_listed(names)}"

    def __str__(self) -> str:
        return f"'{self.value}'"


class Predicate(Target):
    """A function of a module's dotted name and the module."""

    kind, rank = "predicate", 2

    def distance(self, path: str, module: Any) -> int | None:
        return 0 if self.value(path, module) else None

    def closest(self, modules: Mapping[str, Any]) -> str:
        return f"It was asked for {len(modules)} modules, from '{next(iter(modules))}' on, and said no to each"

    def __str__(self) -> str:
        return f"'{name_of(self.value)}' ({location(self.value)})"


class Class(Target):
    """A class of modules, and those derived from it."""

    kind, rank = "class", 3
    path = ""  # that it was named by

    def __init__(self, value: Any) -> None:
        super().__init__(value.__dict__.get(BASE, value))  # `type(module)` of one that is overridden now
        self._known: weakref.WeakKeyDictionary[type, int | None] = weakref.WeakKeyDictionary()

    def distance(self, path: str, module: Any) -> int | None:
        return self.distance_of(type(module))

    def distance_of(self, cls: type) -> int | None:
        """How far up in the MRO of `cls` this class is."""
        if cls not in self._known:
            mro = [base for base in cls.__mro__ if BASE not in base.__dict__]
            self._known[cls] = mro.index(self.value) if self.value in mro else None
        return self._known[cls]

    def name_of_scripted(self, module: Any) -> str:
        """The class that this ScriptModule was made of, if it is this one or derived from it. It knows but a name."""
        name = getattr(module, "original_name", "")
        return name if name in {cls.__name__ for cls in family(self.value)} else ""

    def closest(self, modules: Mapping[str, Any]) -> str:
        names = list(dict.fromkeys(class_of(module).__name__ for module in modules.values()))
        close = difflib.get_close_matches(self.value.__name__, names, n=3, cutoff=0.4)
        return f"The closest classes in it are {_listed(close)}" if close else f"Its classes are {_listed(names)}"

    def __str__(self) -> str:
        return f"'{self.value.__name__}'"


def family(cls: type) -> Iterator[type]:
    """A class and those derived from it."""
    yield cls
    subclasses: list[type] = type.__subclasses__(cls)
    for derived in subclasses:
        yield from family(derived)


class Function(Target):
    """A function of torch in all its spellings."""

    kind, rank = "function", 4

    def __init__(self, value: Any, name: str) -> None:
        super().__init__(value)
        self.name = name

    def __str__(self) -> str:
        return f"'{self.name}'"


class ImportPath(Target):
    """What a module has, or will have when it is imported: `"package.module:attribute"`."""

    kind, rank = "path", 5

    def __init__(self, value: str) -> None:
        super().__init__(value)
        self.name = value

    def __str__(self) -> str:
        return f"'{self.value}'"


class Entry(NamedTuple):
    """A rule and its targets. Unless it is optional, one of them must name something."""

    targets: tuple[Target, ...]
    rule: Rule
    optional: bool = False


class Match(NamedTuple):
    """A module, and the target and the rule that won it."""

    path: str
    module: Any
    target: Target
    rule: Rule


def class_of(module: Any) -> type:
    """The class of a module without what an override makes of it."""
    cls = type(module)
    return cls.__dict__.get(BASE, cls)


def modules_of(model: Any) -> dict[str, Any]:
    """All modules of a model by dotted name, shared ones by each of theirs. What `torch.compile` has made of a module
    is left out: the module itself has that place and name.
    """
    named = dict(uncompiled(model).named_modules(remove_duplicate=False))
    made = {path for path, module in named.items() if uncompiled(module) is not module}
    return {_without(path, made): module for path, module in named.items() if path not in made} if made else named


def _without(path: str, made: set[str]) -> str:
    parts = path.split(".")
    return ".".join([part for index, part in enumerate(parts) if ".".join(parts[:index]) not in made])


def matches(entries: Sequence[Entry], modules: Iterable[tuple[str, Any]], owner: str) -> list[Match]:
    """By module, which entry wins it. An entry that names none is an error.

    `modules` are pairs of a dotted name and a module, which may come under several names.
    """
    named = dict(modules)
    ranked: dict[int, list[tuple[tuple[int, int, int], str, Target, Rule]]] = {}
    used: set[int] = set()
    candidates = [
        (index, target, entry.rule)
        for index, entry in enumerate(entries)
        for target in entry.targets
        if not isinstance(target, (Function, ImportPath))  # which are called in modules, and are none
    ]
    of_class: dict[type, list[tuple[int, Target, Rule]]] = {}
    for path, module in named.items():
        cls = type(module)
        if cls not in of_class:  # targets that are classes name all modules of a class, or none
            of_class[cls] = [
                one for one in candidates if not isinstance(one[1], Class) or one[1].distance_of(cls) is not None
            ]
        for index, target, rule in of_class[cls]:
            distance = target.distance(path, module)
            if distance is not None:
                used.add(index)
                order = target.rank, distance, -index
                ranked.setdefault(id(module), []).append((order, path, target, rule))
    for index, entry in enumerate(entries):
        called = any(isinstance(target, (Function, ImportPath)) for target in entry.targets)
        if index not in used and not called and not entry.optional:
            target = entry.targets[0]
            raise TargetNotFoundError(
                f"override of {owner}: the {target.text}, a target of the rule {entry.rule.who}, must name a "
                f"module in it; it names none. {target.closest(named)}"
            )
    found = []
    for path, module in named.items():
        rivals = ranked.pop(id(module), None)
        if rivals is not None:
            _, won_at, target, rule = min(rivals, key=lambda rival: rival[0])
            found.append(Match(won_at or path, module, target, rule))
    return found


def _listed(names: Sequence[str], most: int = 8) -> str:
    shown = ", ".join(f"'{name}'" for name in names[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")
