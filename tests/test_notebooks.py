"""The notebooks run from top to bottom, and print as much as they did when they were saved."""

import itertools
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


def shape_of_outputs(notebook):
    """By cell, the kinds of its outputs and their numbers of lines.

    What is printed on one stream counts together: the kernel sends it in pieces of a fifth of a second.
    """
    return [
        [
            (kind, sum(len(output.get("text", "").splitlines()) for output in outputs))
            for kind, outputs in itertools.groupby(
                cell.get("outputs", []), lambda output: output.get("name", output.output_type)
            )
        ]
        for cell in notebook.cells
    ]


@pytest.mark.filterwarnings("ignore:.*(event loop|Proactor|TCP):Warning")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_and_prints_as_much_as_before(path):
    notebook = nbformat.read(path, as_version=4)
    saved = shape_of_outputs(notebook)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(path.parent)}}).execute()
    assert shape_of_outputs(notebook) == saved


def test_there_are_notebooks_and_each_is_numbered():
    assert NOTEBOOKS
    assert all(path.name[0].isdigit() for path in NOTEBOOKS)
