"""Each cell of the table is right, or refused for a reason that is known; and the page in docs/ says which."""

import re

import pytest
import torch

from conformance import another_device, distributed, mutants, report
from conformance.environment import REFUSALS
from conformance.environments import ENVIRONMENTS
from conformance.forms import FORMS
from conformance.mutants import MUTANTS
from conformance.table import CELLS, outcome_of, reason_left_out

COMMITTED = report.committed()


def marks_of(environment):
    marks = [] if environment.quick else [pytest.mark.slow]
    if environment.group == "cuda":
        marks += [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
    return marks


HERE = [cell for cell in CELLS if cell.environment.group != another_device.GROUP]


@pytest.mark.parametrize("cell", [pytest.param(cell, id=cell.id, marks=marks_of(cell.environment)) for cell in HERE])
def test_cell(cell):
    outcome = outcome_of(cell)
    assert outcome.verdict != "fails", outcome.text
    if f"torch {report.release()}:" in report.PAGE.read_text():
        said = COMMITTED.get(cell.id, "nothing")
        assert outcome.verdict == said, f"docs/conformance.md says {said}: run python -m tests.conformance"


def test_every_cell_is_in_the_table_or_has_a_reason_why_not():
    for environment in ENVIRONMENTS:
        for form in FORMS:
            in_table = any(cell.form is form and cell.environment is environment for cell in CELLS)
            assert in_table != bool(reason_left_out(form, environment))


def test_page_has_every_cell_and_no_other():
    on_cuda = {cell.id for cell in CELLS if cell.environment.group == "cuda"}
    spread = {f"{cell.environment.id} / {cell.form.name}" for cell in distributed.CELLS}
    assert set(COMMITTED) | on_cuda == {cell.id for cell in CELLS} | spread | on_cuda


def test_page_says_of_the_distributed_cells_what_their_test_holds():
    for cell in distributed.CELLS:
        key = distributed.REFUSED.get((cell.form.name, cell.environment.name))
        said = COMMITTED[f"{cell.environment.id} / {cell.form.name}"]
        assert said == ("right" if key is None else f"refused: {key}")


def test_readme_has_the_counts_of_the_page():
    readme = " ".join((report.PAGE.parent.parent / "README.md").read_text().split())
    (right, refused), (right_of_two, refused_of_two) = re.findall(
        r"(\d+) right, (\d+) refused", report.PAGE.read_text()
    )
    assert f"{right} cells are right and {refused} are refused" in readme
    assert f"{right_of_two} are right and {refused_of_two} refused" in readme


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_planted_defect_still_applies_and_has_cells(mutant):
    text = (mutants.ROOT / "gradoverride" / mutant.file).read_text()
    assert [text.count(old) for old, _ in ((mutant.old, mutant.new), *mutant.more)] == [1] * (1 + len(mutant.more))
    assert any(re.search(mutant.cells, cell.id) for cell in CELLS)


def test_names_are_unique():
    assert len({form.name for form in FORMS}) == len(FORMS)
    assert len({environment.id for environment in ENVIRONMENTS}) == len(ENVIRONMENTS)


def test_every_refusal_is_used():
    used = {verdict.removeprefix("refused: ") for verdict in COMMITTED.values()}
    assert used >= REFUSALS.keys()
