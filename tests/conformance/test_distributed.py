"""Each form, distributed over two processes: gradients are those of one process, by hand. See `distributed.py`."""

import pytest
import torch

from conformance.distributed import CELLS, REFUSED, Cell, gradients, inputs, loss_of, run
from conformance.distributed_forms import FORMS, Net


@pytest.fixture(scope="module")
def outcomes(request, tmp_path_factory):
    """What became of the cells that are to be tested: one pair of processes runs them all."""
    params = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    cells = [each["cell"] for each in params if isinstance(each.get("cell"), Cell)]
    return run(tmp_path_factory.mktemp("ranks"), cells)


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.id)
def test_gradients_over_two_processes_are_those_of_one_or_refused(cell, outcomes):
    refusal = REFUSED.get((cell.form.name, cell.environment.name))
    assert outcomes[cell].verdict == ("right" if refusal is None else f"refused: {refusal}"), outcomes[cell].text


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_gradients_by_hand_are_not_those_without_the_rule(form):
    """So that a rule that is lost is seen."""
    model, plain = Net(form.by_hand()), Net(form.without())
    for net in (model, plain):
        loss_of(net(inputs(0, 0))).backward()
    ours, theirs = gradients(model), gradients(plain)
    assert any(not same(ours[name], theirs[name]) for name in ours)


def same(one, other):
    return one is not None and other is not None and torch.allclose(one, other)
