"""The map of files in `CONTRIBUTING.md` is that of the folder."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import gradoverride as go

PACKAGE = Path(go.__file__).parent
TEXT = (Path(__file__).parent.parent / "CONTRIBUTING.md").read_text().partition("## Where to start reading")[2]
TEXT = TEXT.partition("\n## ")[0]


def files(folder: Path) -> set[str]:
    return {path.stem for path in folder.glob("*.py")} - {"__init__", "__main__"}


def test_map_has_every_file_of_the_core_once_and_no_other():
    named: list[str] = []
    for line in TEXT.splitlines():
        row = re.match(r"    (\w+(?:, \w+)*),?(?:\s{2,}|$)", line)
        named += row[1].split(", ") if row else []
    assert sorted(named) == sorted(
        files(PACKAGE / "_core") | {path.parent.name for path in (PACKAGE / "_core").glob("*/__init__.py")}
    )


def test_text_above_it_names_every_other_file_and_folder():
    named = re.findall(r"`(?:gradoverride/)?(\w+(?:\.py|/))`", TEXT)
    folders = {f"{path.parent.name}/" for path in PACKAGE.glob("*/__init__.py")}
    assert set(named) == {f"{name}.py" for name in files(PACKAGE)} | folders


def test_files_of_the_core_import_each_other_at_their_top_alone():
    """So imports point one way."""
    later = []
    for path in (PACKAGE / "_core").rglob("*.py"):
        functions = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]
        imports = [node for function in functions for node in ast.walk(function) if isinstance(node, ast.ImportFrom)]
        later += [f"{path.name}: {node.module}" for node in imports if str(node.module).startswith("gradoverride")]
    assert later == []
