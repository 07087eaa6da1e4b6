"""The part of the table on a device that is not the CPU: in a process of its own, where it is torch's accelerator.

outcomes = run(folder)  # by the id of the cell
"""

from __future__ import annotations

from typing import Any

from conformance import away, processes
from conformance.table import CELLS as ALL
from conformance.table import Cell, Outcome, outcome_of

__all__ = ["CELLS", "GROUP", "run"]

GROUP = "another device"
LIMIT = 900  # seconds for all cells: what takes longer hangs
CELLS = [cell for cell in ALL if cell.environment.group == GROUP]


def run(folder: Any, cells: list[Cell] = CELLS, limit: float = LIMIT) -> dict[str, Outcome]:
    """What became of each cell, by its id."""
    away.build()  # what a compiler says is said here
    [found] = processes.run(_in_a_process, 1, folder, limit, [cell.id for cell in cells])
    lost = Outcome("fails", "the process has not come to it: it died, or hangs")
    return {cell.id: found.get(cell.id, lost) for cell in cells}


def _in_a_process(index: int, write: processes.Write, names: list[str]) -> None:
    import torch

    torch.set_num_threads(1)
    away.load()
    wanted = set(names)
    for cell in CELLS:
        if cell.id in wanted:
            write(cell.id, outcome_of(cell))
