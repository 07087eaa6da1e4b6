"""The demo: its networks differ in their backward alone; the exit status says whether overrides helped."""

import contextlib
import io
import sys
from pathlib import Path

import pytest
import torch

from gradoverride import demo
from gradoverride.__main__ import main

CLEARLY_LEARNT = 0.75
NEAR_CHANCE = 0.25


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory):
    """The status, the printed text and the figure of one quick run."""
    figure = tmp_path_factory.mktemp("demo") / "figure.png"
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        status = main(["demo", "--quick", "--output", str(figure)])
    return status, printed.getvalue(), figure


@pytest.fixture(scope="module")
def digits():
    return demo.read_digits()


def test_quick_demo_succeeds(quick_run):
    status, _, _ = quick_run
    assert status == 0


def test_table_shows_zero_gradient_and_chance_for_the_network_as_it_stands(quick_run):
    gradient, accuracy = table_row(quick_run, demo.AS_IT_STANDS)
    assert gradient == 0
    assert accuracy < NEAR_CHANCE


@pytest.mark.parametrize("name", [name for name in demo.LAYERS if name != demo.AS_IT_STANDS])
def test_table_shows_that_each_override_learns(quick_run, name):
    gradient, accuracy = table_row(quick_run, name)
    assert gradient > 0
    assert accuracy > CLEARLY_LEARNT


def table_row(quick_run, name):
    _, text, _ = quick_run
    (row,) = [line for line in text.splitlines() if line.startswith(f"│ {name} ")]
    _, _, gradient, accuracy, _ = (cell.strip() for cell in row.split("│"))
    return float(gradient), float(accuracy.rstrip("%")) / 100


def test_figure_is_a_png(quick_run):
    _, text, figure = quick_run
    assert figure.read_bytes().startswith(b"\x89PNG\r\n")
    assert str(figure.name) in text.replace("\n", "")


@pytest.mark.parametrize("name", demo.LAYERS)
def test_every_network_computes_the_same_forward(name, digits):
    network = demo.build(demo.LAYERS[name], seed=0)
    as_it_stands = demo.build(demo.BinaryLayer, seed=0)
    assert torch.equal(network(digits.test_images), as_it_stands(digits.test_images))


def test_forward_is_binary_and_weights_have_four_levels():
    assert demo.binarize(torch.tensor([-2.0, 0.0, 0.5])).tolist() == [-1, 1, 1]
    assert demo.four_levels(torch.linspace(-4, 4, 100)).unique().tolist() == [-3, -1, 1, 3]


def test_own_backward_agrees_with_straight_through_inside_its_window():
    torch.manual_seed(0)
    x = (2 * torch.rand(5, 3) - 1).requires_grad_()
    own = demo.LayerWithCustomGrad(3, 2)
    straight = demo.LAYERS["straight_through"](3, 2)
    straight.load_state_dict(own.state_dict())
    grad_output = torch.randn(5, 2)
    grads_own = torch.autograd.grad(own(x), [x, own.weights], grad_output)
    grads_straight = torch.autograd.grad(straight(x), [x, straight.weights], grad_output)
    torch.testing.assert_close(grads_own, grads_straight)


def test_own_backward_stops_the_gradient_outside_its_window():
    x = torch.tensor([[-1.5, 0.5, 2.0]], requires_grad=True)
    demo.LayerWithCustomGrad(3, 2)(x).sum().backward()
    assert (x.grad != 0).tolist() == [[False, True, False]]


@pytest.mark.parametrize(
    ("override", "helped"),
    [(0.9, True), (0.61, True), (0.59, False), (0.1, False)],
)
def test_an_override_helps_if_it_is_better_by_half(override, helped):
    accuracies = {demo.AS_IT_STANDS: 0.1, "straight_through": 0.95, "own backward": override}
    assert demo.overrides_helped(accuracies) is helped


@pytest.mark.parametrize(("learnt", "status"), [(0.9, 0), (0.2, 1)])
def test_exit_status_is_1_if_an_override_did_not_help(monkeypatch, tmp_path, capsys, learnt, status):
    def pretend(digits, epochs, seeds, console):
        finals = dict.fromkeys(demo.LAYERS, learnt) | {demo.AS_IT_STANDS: 0.1}
        return {name: demo.Result(0.0, torch.tensor([[0.1, final]])) for name, final in finals.items()}

    monkeypatch.setattr(demo, "run", pretend)
    assert demo.main(quick=True, output=tmp_path / "figure.png") == status
    assert ("did not beat" in capsys.readouterr().out) is bool(status)


@pytest.mark.parametrize("missing", ["rich", "sklearn", "matplotlib"])
def test_missing_package_is_answered_with_the_extra_to_install(monkeypatch, capsys, missing):
    for name in [name for name in sys.modules if name.partition(".")[0] == missing]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "gradoverride.demo")
    monkeypatch.delattr("gradoverride.demo")
    monkeypatch.setitem(sys.modules, missing, None)
    assert main(["demo"]) == 2
    assert capsys.readouterr().err == f'The demo needs {missing}: pip install "gradoverride[demo]"\n'


def test_default_figure_lies_in_the_current_directory(monkeypatch):
    asked = {}
    monkeypatch.setattr(demo, "main", lambda quick, output: asked.update(quick=quick, output=output) or 0)
    assert main(["demo"]) == 0
    assert asked == {"quick": False, "output": Path("gradoverride-demo.png")}


def test_figure_in_a_missing_folder_is_refused_before_training(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["demo", "--output", str(tmp_path / "missing" / "figure.png")])
    assert f"there is no folder {tmp_path / 'missing'}" in capsys.readouterr().err
