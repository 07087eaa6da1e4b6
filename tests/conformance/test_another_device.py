"""Each form on a device that is not the CPU, and what is seen there alone. See `another_device.py` and `away/`."""

import threading
import traceback

import numpy as np
import pytest
import torch
from oracles import closely, exactly
from torch import nn
from torch.nn import functional as F

import gradoverride as go
from conformance import away, processes, report
from conformance.another_device import CELLS, run

COMMITTED = report.committed()


@pytest.fixture(scope="module")
def outcomes(request, tmp_path_factory):
    """What became of the cells that are to be tested: one process runs them all."""
    params = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    cells = [each["elsewhere"] for each in params if "elsewhere" in each]
    return run(tmp_path_factory.mktemp("elsewhere"), cells)


def marked(cell):
    return pytest.param(cell, id=cell.id, marks=[] if cell.environment.quick else [pytest.mark.slow])


@pytest.mark.parametrize("elsewhere", [marked(cell) for cell in CELLS])
def test_gradients_on_another_device_are_those_by_hand_or_refused(elsewhere, outcomes):
    outcome = outcomes[elsewhere.id]
    assert outcome.verdict != "fails", outcome.text
    if f"torch {report.release()}:" in report.PAGE.read_text():
        assert outcome.verdict == COMMITTED[elsewhere.id], "run python -m tests.conformance"


# --- what there is on another device alone: each of these runs in that process ---


def numbers(*size):
    return torch.randn(*size, dtype=torch.float64, device=away.NAME, requires_grad=True)


def what_is_written_into_a_view_stands_where_it_does_on_the_cpu():
    square = torch.zeros(3, 3, device=away.NAME)
    square.diagonal().fill_(1)
    exactly(square.cpu(), torch.eye(3))


def a_rule_runs_in_a_thread_of_the_device():
    threads = []
    double = go.custom_backward(lambda grad_output: threads.append(threading.current_thread()) or 2 * grad_output)(
        torch.sin
    )
    double(numbers(3)).sum().backward()
    assert len(threads) == 1
    assert threads[0] is not threading.main_thread()


def a_rule_that_calls_its_function_is_no_rule_of_that_call():
    x = numbers(5)
    with go.override({F.relu: lambda grad_output, input: grad_output * F.relu(input)}):
        F.relu(x).sum().backward()
    closely(x.grad, x.detach().clamp(min=0))


def replays_the_numbers_that_a_forward_drew():
    noisy = go.custom_backward(lambda grad_output, vjp: 3 * vjp(grad_output))(lambda x: F.dropout(x, 0.5))
    x = numbers(64).detach()
    before = torch.away.get_rng_state()
    after = []

    def loss(x):
        result = noisy(x)
        after.append(torch.away.get_rng_state())
        return (result * x.detach()).sum(), result.detach()

    grad, result = torch.func.grad(loss, has_aux=True)(x)
    closely(grad, 3 * result)
    assert torch.equal(torch.away.get_rng_state(), after[0])
    assert not torch.equal(before, after[0])


def replays_them_where_the_states_of_all_devices_are_asked_for_at_once():
    torch.away.get_rng_state_all = lambda: [torch.away.get_rng_state()]
    torch.away.set_rng_state_all = lambda states: torch.away.set_rng_state(*states)
    try:
        replays_the_numbers_that_a_forward_drew()
    finally:
        del torch.away.get_rng_state_all, torch.away.set_rng_state_all


def refuses_a_gradient_that_is_elsewhere():
    on_the_cpu = go.custom_backward(lambda grad_output: grad_output.cpu())(torch.sin)
    with pytest.raises(
        go.RuleResultError, match=r"on away:0 for .*; it returned one on cpu. Move it with .to\('away:0'\)"
    ):
        on_the_cpu(numbers(3)).sum().backward()


def a_bridge_gives_tensors_of_the_device():
    sine = go.bridge(lambda grad_output, x: grad_output * np.cos(x))(lambda x: np.sin(x))
    x = numbers(3)
    result = sine(x)
    result.sum().backward()
    assert result.device == x.device == x.grad.device
    closely(x.grad, x.detach().cos())


class OverTwo(nn.Module):
    def __init__(self):
        super().__init__()
        self.there = nn.Linear(4, 4, dtype=torch.float64, device=away.NAME)
        self.here = nn.Linear(4, 4, dtype=torch.float64)

    def forward(self, x):
        return F.relu(self.here(F.relu(self.there(x)).cpu()))


def a_model_may_be_on_two_devices():
    model, x = OverTwo(), numbers(2, 4)
    rules = {
        F.relu: lambda grad_output: 2 * grad_output,
        nn.Linear: lambda grad_output, vjp, params: {name: 3 * grad for name, grad in vjp.by_name(grad_output).items()},
    }
    with go.override(model, rules):
        model(x).sum().backward()
    ours = [x.grad, *[parameter.grad for parameter in model.parameters()]]
    hidden = F.relu(model.there(x)).detach().cpu()
    second = torch.full((2, 4), 2.0, dtype=torch.float64)  # of the outer relu, by the rule
    first = (2 * 3 * second @ model.here.weight.detach()).to(away.NAME)
    by_hand = [
        3 * first @ model.there.weight.detach(),
        3 * first.T @ x.detach(),
        3 * first.sum(0),
        3 * second.T @ hidden,
        3 * second.sum(0),
    ]
    for one, other in zip(ours, by_hand, strict=True):
        assert one.device == other.device
        closely(one, other)


ALONE = (
    what_is_written_into_a_view_stands_where_it_does_on_the_cpu,
    a_rule_runs_in_a_thread_of_the_device,
    a_rule_that_calls_its_function_is_no_rule_of_that_call,
    replays_the_numbers_that_a_forward_drew,
    replays_them_where_the_states_of_all_devices_are_asked_for_at_once,
    refuses_a_gradient_that_is_elsewhere,
    a_bridge_gives_tensors_of_the_device,
    a_model_may_be_on_two_devices,
)


def each_alone(index, write):
    away.load()
    for check in ALONE:
        torch.manual_seed(0)
        try:
            check()
        except BaseException:
            write(check.__name__, traceback.format_exc())
        else:
            write(check.__name__, "right")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    away.build()
    [found] = processes.run(each_alone, 1, tmp_path_factory.mktemp("alone"), 120)
    return found


@pytest.mark.parametrize("check", ALONE, ids=lambda check: check.__name__)
def test_on_another_device(check, alone):
    assert alone.get(check.__name__, "it was not come to") == "right", alone[check.__name__]
