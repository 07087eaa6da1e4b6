"""The benchmarks run and say what they found. Whether limits hold is not tested: that depends on the machine."""

import json
import sys
import types

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from benchmarks import catalogue, compiled, memory, overrides, place, timing
from benchmarks.__main__ import SUBJECTS, main
from benchmarks.timing import Case, Effort, Pair, Samples

BRIEF = Effort(seconds=0.01, builds=2, processes=1)


def test_a_quick_case_is_measured_printed_and_written(tmp_path, capsys):
    written = tmp_path / "results.json"
    assert main(["--quick", "--only", "eager: keyword", "--json", str(written)]) == 0
    assert "eager: keyword" in capsys.readouterr().out
    (case,) = json.loads(written.read_text())["cases"]
    assert case["limit"] == 1.05
    assert 0 < case["low"] <= case["median"] <= case["high"]


@pytest.mark.parametrize(("limit", "status"), [(1e-6, 1), (1e6, 0)])
def test_check_says_whether_limits_hold(monkeypatch, limit, status):
    case = Case("a case", limit, lambda effort: Samples([1.0], [1.0]))
    monkeypatch.setattr("benchmarks.__main__.SUBJECTS", [type("Subject", (), {"cases": staticmethod(lambda: [case])})])
    assert main(["--check"]) == status
    assert main([]) == 0


def test_an_unknown_case_is_refused(capsys):
    assert main(["--only", "no such case"]) == 2
    assert "no such case" in capsys.readouterr().err


@pytest.fixture
def measured_on_the_processor_again():
    yield
    place.measure_on("cpu")


@pytest.mark.usefixtures("measured_on_the_processor_again")
@pytest.mark.parametrize(
    "name",
    ["eager: module method by calls", "edits: with the value", "modules: vjp"],
)
def test_everything_is_built_on_the_device_that_is_asked_for(tmp_path, monkeypatch, name):
    seen = set()
    forward_and_backward = timing.forward_and_backward

    def looked_at(function, *args, grad):
        seen.update(tensor.device.type for tensor in (*args, grad, function(*args)))
        return forward_and_backward(function, *args, grad=grad)

    for module in SUBJECTS:
        if hasattr(module, "forward_and_backward"):
            monkeypatch.setattr(module, "forward_and_backward", looked_at)
    written = tmp_path / "results.json"
    assert main(["--quick", "--device", "meta", "--only", name, "--json", str(written)]) == 0
    results = json.loads(written.read_text())
    assert results["device"] == "meta"
    assert all(case["samples"] for case in results["cases"])
    assert seen == {"meta"}


@pytest.mark.usefixtures("measured_on_the_processor_again")
def test_models_that_are_overridden_are_built_there_too():
    place.measure_on("meta")
    pair = overrides.pair("linear layers", (3, 4))
    pair.ours()
    assert {leaf.grad.device.type for leaf in pair.leaves if leaf.grad is not None} == {"meta"}
    assert {leaf.device.type for leaf in pair.leaves} == {"meta"}


@pytest.mark.parametrize("name", ["nonsense", *([] if torch.cuda.is_available() else ["cuda"])])
def test_a_device_that_is_not_there_is_refused(capsys, name):
    assert main(["--device", name]) == 2
    assert f"--device {name}: " in capsys.readouterr().err


def test_every_case_has_a_name_of_its_own():
    names = [case.name for subject in SUBJECTS for case in subject.cases()]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("name", ["eager: added to a call under no_grad", "eager: nested", "edits: kept", "memory:"])
def test_cases_of_other_kinds_are_measured(tmp_path, name):
    written = tmp_path / "results.json"
    assert main(["--quick", "--only", name, "--json", str(written)]) == 0
    assert all(case["samples"] for case in json.loads(written.read_text())["cases"])


@pytest.fixture
def clock(monkeypatch):
    """A clock that only steps move: a real one would make these tests depend on what else the machine does."""
    pretended = types.SimpleNamespace(now=0.0)
    monkeypatch.setattr(timing, "time", types.SimpleNamespace(perf_counter=lambda: pretended.now))

    def taking(seconds):
        def step():
            pretended.now += seconds

        return step

    return taking


@pytest.mark.parametrize(("seconds", "expected"), [(1e-4, 1.0), (2e-4, 2.0), (5e-5, 0.5)])
def test_ratio_is_ours_to_the_reference(clock, seconds, expected):
    case = timing.ratio("any", expected + 0.01, lambda: Pair(clock(seconds), clock(1e-4)))
    samples = case.measure(BRIEF)
    assert samples.spread() == pytest.approx((expected,) * 3)
    assert samples.reference() == pytest.approx(1e-4)
    assert case.holds(samples)


def test_added_time_is_that_of_one_call_where_a_step_is_several(clock):
    case = timing.added_microseconds("any", 0.01, lambda: Pair(clock(3e-5), clock(1e-5), calls_a_step=100))
    samples = case.measure(BRIEF)
    assert samples.spread().median == pytest.approx(0.2)
    assert not case.holds(samples)


def test_measuring_leaves_threads_as_they_were():
    threads = torch.get_num_threads()
    during = []
    timing.ratio("any", None, lambda: Pair(lambda: during.append(torch.get_num_threads()), int)).measure(BRIEF)
    assert set(during) == {1}
    assert torch.get_num_threads() == threads


def test_what_waits_for_backward_is_kept_and_counted():
    sides = memory.Sides(lambda x: (x + 0).exp().clone(), lambda x: (x + 0) * 2, place.leaf(100))
    assert memory.bytes_kept(sides.ours, sides) == 800  # the result, and what exp keeps
    assert memory.bytes_kept(sides.plain, sides) == 400


def test_a_peak_counts_what_is_freed_again():
    sides = memory.Sides(lambda x: x * 2, lambda x: x.exp().sum() + x * 2, place.leaf(100))
    assert memory.bytes_at_peak(sides.ours, sides) < memory.bytes_at_peak(sides.plain, sides)
    assert sides.leaves[0].grad is None


def test_compiled_sides_are_not_compiled_again_while_they_are_measured(monkeypatch):
    counters = []

    def counter(backend):
        counters.append(CompileCounter())
        return counters[-1]

    monkeypatch.setattr(compiled, "CompileCounterWithBackend", counter)

    def sides():
        return (lambda x: x.sin()), (lambda x: x.sin()), (8,)

    timing.ratio("any", None, lambda: compiled.pair(sides)).measure(BRIEF)
    assert [counter.frame_count for counter in counters] == [1, 1] * BRIEF.builds


def test_each_of_two_compiled_sides_goes_first_in_turn(monkeypatch):
    monkeypatch.setattr(compiled, "CompileCounterWithBackend", lambda backend: CompileCounter())
    order = []

    def sides():
        return (lambda x: order.append("ours") or x.sin()), (lambda x: order.append("reference") or x.sin()), (8,)

    for _ in range(2):
        order.append("build")
        compiled.pair(sides)
    builds = [build.split() for build in " ".join(order).split("build")[1:]]
    assert {build[0] for build in builds} == {"ours", "reference"}


@pytest.mark.parametrize("name", ["atan", "fast_sigmoid", "sigmoid", "triangle"])
def test_what_is_written_by_hand_computes_the_same(name):
    _, by_hand = catalogue.REFERENCES[name]["by hand"]
    x, grad = torch.linspace(-3, 3, 601, dtype=torch.float64, requires_grad=True), torch.ones(601, dtype=torch.float64)
    results = [catalogue.OURS[name]()(x), by_hand()(x)]
    torch.testing.assert_close(*results)
    torch.testing.assert_close(*[torch.autograd.grad(result, x, grad) for result in results])


@pytest.mark.parametrize(
    ("case", "library", "package"),
    [("reverse", "pytorch_revgrad", "pytorch-revgrad"), ("round", "brevitas", "brevitas")],
)
def test_a_library_that_is_not_installed_is_named(tmp_path, monkeypatch, case, library, package):
    monkeypatch.setitem(sys.modules, library, None)  # so that importing it fails, wherever this runs
    written = tmp_path / "results.json"
    assert main(["--quick", "--check", "--only", f"catalogue: {case}", "--json", str(written)]) == 0
    (case,) = json.loads(written.read_text())["cases"]
    assert case["not_measured"] == f"pip install {package}"
