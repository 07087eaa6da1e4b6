"""The command line: `python -m benchmarks`. The exit status of `--check` says whether every limit holds."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import catalogue, compiled, eager, edits, importing, memory, modules, overrides, place
from benchmarks.timing import FULL, QUICK, Case, Effort, NotMeasured, Samples

SUBJECTS = (eager, compiled, modules, overrides, edits, catalogue, memory, importing)


@dataclass(frozen=True)
class Row:
    """A case and what it gave: samples, or why there are none."""

    case: Case
    samples: Samples | None
    why_not: str = ""

    @property
    def holds(self) -> bool:
        return self.samples is None or self.case.holds(self.samples)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints the table and returns the exit status."""
    options = parser().parse_args(argv)
    try:
        place.measure_on(options.device)
    except (RuntimeError, AssertionError) as error:  # a build without CUDA asserts that it has it
        print(f"--device {options.device}: {error}", file=sys.stderr)
        return 2
    cases = [case for subject in SUBJECTS for case in subject.cases() if options.only in case.name]
    if not cases:
        print(f"No case's name contains {options.only!r}", file=sys.stderr)
        return 2
    console = Console()
    rows = []
    with console.status("") as status:
        for number, case in enumerate(cases, start=1):
            status.update(f"{number} of {len(cases)}: {case.name}")
            rows.append(measure(case, QUICK if options.quick else FULL))
    console.print(table(rows))
    if options.json:
        options.json.write_text(json.dumps(report(rows), indent=2) + "\n")
    return int(options.check and not all(row.holds for row in rows))


def measure(case: Case, effort: Effort) -> Row:
    """Once, whatever comes out: to measure again only where a limit seems broken would favour us."""
    try:
        return Row(case, case.measure(effort))
    except NotMeasured as reason:
        return Row(case, None, str(reason))


def table(rows: Sequence[Row]) -> Table:
    """What is printed. Ratios are ours to the reference's: below 1 is faster."""
    shown = Table(title="Ours to the reference's, forward and backward; medians of neighbouring blocks")
    for heading in ("case", "ratio", "quartiles", "reference", "limit", "holds"):
        shown.add_column(heading, justify="left" if heading == "case" else "right", overflow="fold")
    for row in rows:
        shown.add_row(*cells(row), end_section=row is rows[-1])
    return shown


def cells(row: Row) -> tuple[str, ...]:
    write, limit = row.case.quantity, row.case.limit
    stated = "" if limit is None else f"{limit:.2f}" if limit else "0"
    if row.samples is None:
        return row.case.name, "-", "-", row.why_not, stated, "-"
    spread = row.samples.spread()
    verdict = "" if limit is None else "yes" if row.holds else "[bold red]NO[/]"
    return (
        row.case.name,
        write.write(spread.median),
        "exact" if len(row.samples.values) == 1 else f"{write.write(spread.low)} - {write.write(spread.high)}",
        write.write_reference(row.samples.reference()),
        stated,
        verdict,
    )


def report(rows: Sequence[Row]) -> dict[str, object]:
    """The same as data, with what it was measured on."""
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "device": place.device_name(),
        "cases": [as_data(row) for row in rows],
    }


def as_data(row: Row) -> dict[str, object]:
    data: dict[str, object] = {"case": row.case.name, "limit": row.case.limit}
    if row.samples is None:
        return data | {"not_measured": row.why_not}
    return data | {
        **row.samples.spread()._asdict(),
        "reference": row.samples.reference(),
        "samples": len(row.samples.values),
        "holds": row.holds,
    }


def parser() -> argparse.ArgumentParser:
    """The options."""
    top = argparse.ArgumentParser(
        prog="python -m benchmarks", description="What an override costs, against the same written by hand."
    )
    top.add_argument("--quick", action="store_true", help="fewer samples: a minute, for a first look")
    top.add_argument("--device", default="cpu", help="where the tensors are: cpu, cuda (importing is measured as ever)")
    top.add_argument("--only", default="", metavar="SUBSTRING", help="the cases whose name contains this")
    top.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    top.add_argument("--check", action="store_true", help="exit with 1 if a limit is broken")
    return top


if __name__ == "__main__":
    sys.exit(main())
