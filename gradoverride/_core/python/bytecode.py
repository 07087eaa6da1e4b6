"""The steps of Python's bytecode, read alike in each version of Python, and the names in it. `scan.py` says what they
tell.
"""

from __future__ import annotations

import dis
import functools
import sys
from collections.abc import Iterator, Mapping
from types import CodeType
from typing import NamedTuple

__all__ = [
    "CALLS",
    "CELL",
    "GLOBAL",
    "JUMPS",
    "LOCAL",
    "Use",
    "codes_in",
    "instructions",
    "is_called",
    "renamed",
    "uses",
]

CALLS = ("CALL", "CALL_KW")
JUMPS = frozenset({*dis.hasjrel, *dis.hasjabs})


def codes_in(code: CodeType) -> Iterator[CodeType]:
    """`code` and what is nested in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from codes_in(constant)


@functools.lru_cache(maxsize=256)  # each of those who ask reads the same code
def instructions(code: CodeType) -> list[dis.Instruction]:
    """What `code` does, step by step."""
    return [step for step in dis.get_instructions(code) if step.opname != "EXTENDED_ARG"]  # a part of the next one


class Use(NamedTuple):
    """A name in code, the attributes that are looked up behind it, and what is done with the last of these: of
    `self.weight.grad = g` the variable `self`, its attributes `weight` and `grad`, assigned.
    """

    kind: str  # of the name: GLOBAL, CELL, LOCAL; "" of what was computed, which has none
    name: str
    attributes: tuple[str, ...]
    way: str  # LOAD, STORE or DELETE
    is_method: bool  # whether the last attribute is looked up for it to be called
    is_called: bool  # whether it is called; before Python 3.13, it or an item of it
    last: int  # the place of its last step


GLOBAL, CELL, LOCAL = "GLOBAL", "CELL", "LOCAL"
_KINDS = {
    **{f"LOAD_{name}": GLOBAL for name in ("GLOBAL", "NAME")},
    **{f"LOAD_{name}": CELL for name in ("DEREF", "CLASSDEREF")},
}
_OF_ATTRIBUTES = ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR", "STORE_ATTR", "DELETE_ATTR")


@functools.lru_cache(maxsize=2048)  # as many as one search for what a forward asks goes through, and more
def uses(code: CodeType) -> list[Use]:
    """The names in `code`, in order."""
    found: list[Use] = []
    steps = instructions(code)
    for index, step in enumerate(steps):
        kind, way = _KINDS.get(step.opname, ""), step.opname.partition("_")[0]
        called = is_called(steps, index)
        if step.opname in _OF_ATTRIBUTES:
            method = step.opname == "LOAD_METHOD" or "NULL" in step.argrepr
            owner = Use("", "", (), way, False, False, index)
            behind = found and found[-1].last == index - 1 and found[-1].way == "LOAD"
            if behind and step.opname != "LOAD_SUPER_ATTR":  # before which is what `super` is given
                owner = found.pop()
            names = (*owner.attributes, step.argval)
            found.append(Use(owner.kind, owner.name, names, way, method, called or owner.is_called, index))
        elif kind:
            found.append(Use(kind, step.argval, (), way, False, called or "NULL" in step.argrepr, index))
        elif "_FAST" in step.opname:  # two at once perhaps, from Python 3.13 on
            names = step.argval if isinstance(step.argval, tuple) else (step.argval,)
            ways = [part for part in step.opname.split("_") if part in ("LOAD", "STORE", "DELETE")]
            for name, way in zip(names, ways, strict=True):
                found.append(Use(LOCAL, name, (), way, False, called and name is names[-1], index))
    return found


def is_called(steps: list[dis.Instruction], index: int) -> bool:
    """Whether what this step loads, or an item or attribute of it, is called."""
    beside = index - 1 if sys.version_info < (3, 13) else index + 1
    return 0 <= beside < len(steps) and steps[beside].opname == "PUSH_NULL"


def renamed(code: CodeType, names: Mapping[int, str]) -> CodeType | None:
    """`code` whose steps at these offsets have other names, or None where this Python writes them in a way unknown."""
    known = [*code.co_names, *sorted({*names.values()} - {*code.co_names})]
    changed = bytearray(code.co_code)
    for step in instructions(code):
        if step.offset in names:
            index = known.index(names[step.offset])
            if step.opname == "LOAD_ATTR" and sys.version_info >= (3, 12):
                index <<= 1  # the lowest bit tells a method
            if index > 255:
                return None
            changed[step.offset + 1] = index
    made = code.replace(co_code=bytes(changed), co_names=tuple(known))
    asked = [(step.offset, step.opname, names.get(step.offset, step.argval)) for step in instructions(code)]
    try:
        return made if asked == [(step.offset, step.opname, step.argval) for step in instructions(made)] else None
    except IndexError:  # a name that there is not
        return None
