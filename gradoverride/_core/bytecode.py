"""The steps of Python's bytecode, read alike in each version of Python. `scan.py` says what they tell."""

from __future__ import annotations

import dis
import sys
from collections.abc import Iterator, Mapping
from types import CodeType
from typing import Any

__all__ = [
    "ATTRIBUTES",
    "CALLS",
    "JUMPS",
    "codes_in",
    "instructions",
    "is_called",
    "is_method",
    "last_loaded",
    "loaded",
    "reads_of_first",
    "renamed",
    "without_preparations",
]

CALLS = ("CALL", "CALL_KW")
ATTRIBUTES = ("LOAD_ATTR", "LOAD_METHOD")
JUMPS = frozenset({*dis.hasjrel, *dis.hasjabs})


def codes_in(code: CodeType) -> Iterator[CodeType]:
    """`code` and what is nested in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from codes_in(constant)


def instructions(code: CodeType) -> Iterator[dis.Instruction]:
    """What `code` does, step by step."""
    return (step for step in dis.get_instructions(code) if step.opname != "EXTENDED_ARG")  # a part of the next one


def without_preparations(code: CodeType) -> list[dis.Instruction]:
    """The same without the steps that prepare a call: of which kind these are differs between versions."""
    return [step for step in instructions(code) if step.opname not in ("PRECALL", "PUSH_NULL")]


def loaded(step: dis.Instruction) -> tuple[Any, ...]:
    """The variables that this step loads: two at once perhaps, from Python 3.13 on."""
    return step.argval if isinstance(step.argval, tuple) else (step.argval,)


def last_loaded(step: dis.Instruction) -> Any:
    """The last one of them."""
    return loaded(step)[-1]


def is_method(step: dis.Instruction) -> bool:
    """Whether this step looks up a method, to call it."""
    return step.opname == "LOAD_METHOD" or (step.opname == "LOAD_ATTR" and "NULL" in step.argrepr)


def is_called(steps: list[dis.Instruction], index: int) -> bool:
    """Whether what this step loads, or an item or attribute of it, is called."""
    beside = index - 1 if sys.version_info < (3, 13) else index + 1
    return 0 <= beside < len(steps) and steps[beside].opname == "PUSH_NULL"


def reads_of_first(code: CodeType) -> list[dis.Instruction] | None:
    """The steps that read an attribute of the first parameter, if that is all that `code` does with it."""
    first = code.co_varnames[0]
    if first in code.co_cellvars:
        return None
    found = []
    steps = list(instructions(code))
    for index, step in enumerate(steps):
        if first not in loaded(step) or "FAST" not in step.opname:
            continue
        after = steps[index + 1]
        read = "LOAD_FAST" in step.opname and last_loaded(step) == first and loaded(step).count(first) == 1
        if not read or after.opname != "LOAD_ATTR" or is_method(after):
            return None
        found.append(after)
    return found


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
