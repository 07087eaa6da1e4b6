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


def packages() -> dict[str, list[str]]:
    """The packages of the core in the order of the map, each with its files there."""
    found: dict[str, list[str]] = {}
    for line in TEXT.splitlines():
        package, row = re.match(r"    (\w+)/", line), re.match(r"      (\w+(?:, \w+)*),?\s*$", line[:32])
        if package:
            found[package[1]] = []
        elif row:
            found[list(found)[-1]] += row[1].split(", ")
    return found


def test_map_has_every_file_of_the_core_once_and_no_other():
    folders = [path.parent for path in (PACKAGE / "_core").glob("*/__init__.py")]
    there = {folder.name: sorted(files(folder)) for folder in folders}
    there["private"] = []  # which has a map of its own
    assert {package: sorted(named) for package, named in packages().items()} == there
    assert files(PACKAGE / "_core") == set()


def test_packages_of_the_core_import_from_those_before_them_alone():
    order = list(packages())
    wrong = []
    for path in (PACKAGE / "_core").rglob("*.py"):
        tree = ast.parse(path.read_text())
        typed = [node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)]
        for_types = {part for node in typed for part in ast.walk(node)}
        for node in ast.walk(tree):
            names = re.match(r"gradoverride\._core\.(\w+)", str(getattr(node, "module", "")))
            if names and node not in for_types and order.index(names[1]) > order.index(path.parent.name):
                wrong.append(f"{path.parent.name}/{path.name}: {node.module}")
    assert wrong == []


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
