"""The table as text and as a page of the documentation."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from conformance import distributed, table
from conformance.environment import REFUSALS
from conformance.environments import GROUPS
from conformance.forms import FORMS
from conformance.table import Outcome

__all__ = ["PAGE", "committed", "counts", "page", "release", "summary"]

PAGE = Path(__file__).parent.parent.parent / "docs" / "conformance.md"
SIGNS = {"right": "✓", "fails": "✗", "left out": "-", "not run": "?"}


class Part(NamedTuple):
    """What stands on the page as one table."""

    name: str
    environments: Sequence[Any]
    forms: Sequence[Any]
    reason_left_out: Callable[[Any, Any], str]  # why a form does not go into an environment; empty if it does


PARTS = [
    *[Part(name, environments, FORMS, table.reason_left_out) for name, environments in GROUPS.items()],
    Part("distributed", distributed.ENVIRONMENTS, distributed.FORMS, distributed.reason_left_out),
]


def release() -> str:
    """The release of torch, without what was built how."""
    return ".".join(torch.__version__.split(".")[:2])


def counts(outcomes: Mapping[Any, Outcome]) -> Counter[str]:
    return Counter([outcome.verdict.partition(":")[0] for outcome in outcomes.values()])


def summary(outcomes: Mapping[Any, Outcome]) -> str:
    """One line."""
    found = counts(outcomes)
    return f"{found['right']} right, {found['refused']} refused, {found['fails']} failed, of {len(outcomes)} cells"


def page(alone: Mapping[str, Outcome], spread: Mapping[distributed.Cell, Outcome]) -> str:
    """The documentation of these outcomes, in Markdown: of those in one process, and of those over two."""
    outcomes = {**alone, **_of_both_orders(spread)}
    used = sorted({o.verdict.removeprefix("refused: ") for o in outcomes.values() if o.verdict.startswith("refused")})
    numbers = {key: str(index) for index, key in enumerate(used, 1)}
    reasons: dict[str, str] = {}
    there = {name.partition(": ")[0] for name in outcomes}  # there may be no CUDA
    tables = [_drawn(part, outcomes, numbers, reasons) for part in PARTS if part.name in there]
    lines = [
        "# Right everywhere, or refused",
        "",
        "Each form of the library in each environment of torch, against the same computation written by hand. A cell",
        "is right (✓), or refused by an error or a warning that names the way out (the number of its reason), or the",
        "form does not go there (a letter). This page is written by `python -m tests.conformance`, and a test holds it",
        "to the code.",
        "",
        f"torch {release()}: {summary(alone)}.",
        "",
        "*Another device* is a stand-in for an accelerator, whose memory is the host's (`tests/conformance/away/`): as",
        "on CUDA, the backward runs in a thread of the device. The cells of CUDA itself are run where there is one.",
        "",
        f"Distributed, each override before the wrap and after it: {summary(spread)}.",
        "",
        *tables,
        "## What is refused, and why",
        "",
        *[f"{numbers[key]}. {_sentence(REFUSALS[key].reason)} Source: {REFUSALS[key].source}." for key in used],
        "",
        "## What does not apply",
        "",
        *[f"- *{letter}*: {reason}." for reason, letter in reasons.items()],
        "",
    ]
    return "\n".join(lines)


def _of_both_orders(spread: Mapping[distributed.Cell, Outcome]) -> dict[str, Outcome]:
    """One outcome for both orders of an override and a wrap: what is not right, if anything is not."""
    found: dict[str, Outcome] = {}
    for cell, outcome in spread.items():
        key = f"{cell.environment.id} / {cell.form.name}"
        if found.get(key, Outcome("right")).verdict == "right":
            found[key] = outcome
    return found


def _drawn(part: Part, outcomes: Mapping[str, Outcome], numbers: Mapping[str, str], reasons: dict[str, str]) -> str:
    """A part as a table: environments down, forms across, for there are more of the former."""
    heads = [str(index) for index in range(1, len(part.forms) + 1)]
    lines = [f"## {part.name}", "", "| | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for environment in part.environments:
        cells = []
        for form in part.forms:
            why = part.reason_left_out(form, environment)
            if why:
                cells.append(reasons.setdefault(why, chr(ord("a") + len(reasons))))
                continue
            verdict = outcomes.get(f"{environment.id} / {form.name}", Outcome("not run")).verdict
            cells.append(numbers.get(verdict.removeprefix("refused: "), SIGNS.get(verdict, "✗")))
        lines.append(f"| {environment.name} | " + " | ".join(cells) + " |")
    legend = [f"{head} {form.name}" for head, form in zip(heads, part.forms, strict=True)]
    return "\n".join([*lines, "", f"({'; '.join(legend)})", ""])


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def committed() -> dict[str, str]:
    """The verdicts on the page, by environment and form."""
    text = PAGE.read_text()
    keys = dict(_numbered(text))
    found: dict[str, str] = {}
    for part in PARTS:
        rows = {environment.name: environment for environment in part.environments}
        section = text.partition(f"\n## {part.name}\n")[2].partition("\n## ")[0]
        for line in section.splitlines():
            head, *cells = [part.strip() for part in line.strip("|").split(" | ")] if line.startswith("| ") else [""]
            environment = rows.get(head.strip("| "))
            if environment is None:
                continue
            for form, cell in zip(part.forms, cells, strict=True):
                sign = cell.strip(" |")
                verdict = "right" if sign == SIGNS["right"] else f"refused: {keys[sign]}" if sign in keys else ""
                if verdict:
                    found[f"{environment.id} / {form.name}"] = verdict
    return found


def _numbered(text: str) -> list[tuple[str, str]]:
    reasons = {_sentence(refusal.reason): key for key, refusal in REFUSALS.items()}
    listed = re.findall(r"^(\d+)\. (.*?) Source: ", text, re.MULTILINE)
    return [(number, reasons[reason]) for number, reason in listed if reason in reasons]
