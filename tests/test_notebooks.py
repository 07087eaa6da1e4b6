"""The notebooks run from top to bottom, and print as much as they did when they were saved."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


def shape_of_outputs(notebook):
    """By cell and output, its kind and its number of lines."""
    return [
        [(output.output_type, len(output.get("text", "").splitlines())) for output in cell.get("outputs", [])]
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
