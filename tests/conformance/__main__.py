"""`python -m tests.conformance [pattern]` runs the table, prints it, and writes the page of the documentation.

With a pattern it runs the cells whose id it matches, and writes nothing.
"""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # as pytest has it


def main() -> int:
    import torch

    from conformance import report
    from conformance.table import CELLS, Outcome, outcome_of

    pattern = re.compile(sys.argv[1] if len(sys.argv) > 1 else "")
    cells = [cell for cell in CELLS if pattern.search(cell.id)]
    if not torch.cuda.is_available():
        cells = [cell for cell in cells if cell.environment.group != "device"]
    outcomes: dict[str, Outcome] = {}
    start = time.perf_counter()
    for cell in cells:
        outcome = outcomes[cell.id] = outcome_of(cell)
        message = (
            "" if outcome.verdict == "right" else f"  {outcome.text.splitlines()[0][:160]}" if outcome.text else ""
        )
        print(f"{outcome.verdict:<28} {cell.id}{message}", flush=True)
        if outcome.verdict == "fails":
            print("    " + outcome.text.replace("\n", "\n    "))
    print(f"{report.summary(outcomes)}, {time.perf_counter() - start:.0f} s")
    failed = report.counts(outcomes)["fails"]
    if len(sys.argv) == 1 and not failed:
        report.PAGE.parent.mkdir(exist_ok=True)
        report.PAGE.write_text(report.page(outcomes))
        print(f"written: {report.PAGE}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
