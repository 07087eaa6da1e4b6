"""`python -m tests.conformance [pattern]` runs the table, prints it, and writes the page of the documentation.

With a pattern it runs the cells whose id it matches, and writes nothing. Those on another device are run by a process
of their own, and last the distributed ones by a pair of processes.
"""

from __future__ import annotations

import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))  # as pytest has it


def main() -> int:
    import torch

    from conformance import another_device, distributed, report
    from conformance.table import CELLS, Outcome, outcome_of

    pattern = re.compile(sys.argv[1] if len(sys.argv) > 1 else "")
    cells = [cell for cell in CELLS if pattern.search(cell.id)]
    if not torch.cuda.is_available():
        cells = [cell for cell in cells if cell.environment.group != "cuda"]
    elsewhere = [cell for cell in cells if cell.environment.group == another_device.GROUP]
    cells = [cell for cell in cells if cell.environment.group != another_device.GROUP]
    spread = [cell for cell in distributed.CELLS if pattern.search(f"distributed: {cell.id}")]
    outcomes: dict[str, Outcome] = {}
    start = time.perf_counter()
    for cell in cells:
        outcomes[cell.id] = outcome_of(cell)
        tell(cell.id, outcomes[cell.id])
    if elsewhere:
        with tempfile.TemporaryDirectory() as folder:
            for name, outcome in another_device.run(folder, elsewhere).items():
                outcomes[name] = outcome
                tell(name, outcome)
    with tempfile.TemporaryDirectory() as folder:
        over_two = distributed.run(folder, spread) if spread else {}
    for one, outcome in over_two.items():
        tell(f"distributed: {one.id}", outcome)
    seconds = time.perf_counter() - start
    print(f"{report.summary(outcomes)}; distributed: {report.summary(over_two)}; {seconds:.0f} s")
    failed = report.counts(outcomes)["fails"] + report.counts(over_two)["fails"]
    if len(sys.argv) == 1 and not failed:
        report.PAGE.parent.mkdir(exist_ok=True)
        report.PAGE.write_text(report.page(outcomes, over_two))
        print(f"written: {report.PAGE}")
    return 1 if failed else 0


def tell(name: str, outcome: Any) -> None:
    """One line for a cell, and all of the text where it fails."""
    first = outcome.text.splitlines()[0][:160] if outcome.text else ""
    print(f"{outcome.verdict:<28} {name}  {first}".rstrip(), flush=True)
    if outcome.verdict == "fails":
        print("    " + outcome.text.replace("\n", "\n    "))


if __name__ == "__main__":
    sys.exit(main())
