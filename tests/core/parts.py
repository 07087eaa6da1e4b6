"""The suite without the private names of torch (`fallbacks.py`), in parts: a file of tests is run in one process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent.parent
# What a compiler costs, and what tensors the fallbacks keep themselves, is not the question here. (That compiled calls
# are right too was looked at by hand.)
LEFT_OUT = [
    *("forms/test_compile.py", "forms/test_compiled_short.py", "forms/test_compiled_transforms.py"),
    "rules/test_memory.py",
]
COUNT = 4


def files_of(part: int) -> list[Path]:
    """The files of a part. Large and small ones are dealt out to all."""
    files = [path for folder in ("forms", "rules") for path in (TESTS / folder).glob("test_*.py")]
    files = [path for path in files if str(path.relative_to(TESTS)) not in LEFT_OUT]
    return sorted(files, key=lambda path: (path.stat().st_size, path))[part::COUNT]


def check(part: int) -> None:
    """Run a part, in a process of its own."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.core.fallbacks", *map(str, files_of(part))]
    run = subprocess.run(command, cwd=TESTS.parent, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-1000:]
    assert " passed" in run.stdout
