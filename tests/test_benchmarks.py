"""The benchmarks run and say what they found. Whether limits hold is not tested: that depends on the machine."""

import json

import pytest
import torch

from benchmarks import timing
from benchmarks.__main__ import SUBJECTS, main
from benchmarks.timing import Case, Effort, Pair, Samples

BRIEF = Effort(seconds=0.01, builds=2, processes=1)


def test_a_quick_case_is_measured_printed_and_written(tmp_path, capsys):
    written = tmp_path / "results.json"
    assert main(["--quick", "--only", "eager: two tensors", "--json", str(written)]) == 0
    assert "eager: two tensors" in capsys.readouterr().out
    (case,) = json.loads(written.read_text())["cases"]
    assert case["limit"] == 1.02
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


def test_every_case_has_a_name_of_its_own():
    names = [case.name for subject in SUBJECTS for case in subject.cases()]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("name", ["eager: added to a call under no_grad", "eager: nested", "modules: kept"])
def test_cases_of_other_kinds_are_measured(tmp_path, name):
    written = tmp_path / "results.json"
    assert main(["--quick", "--only", name, "--json", str(written)]) == 0
    assert all(case["samples"] for case in json.loads(written.read_text())["cases"])


def test_the_same_work_on_both_sides_has_ratio_one():
    x = torch.randn(10_000)
    case = timing.ratio("same", 1.0, lambda: Pair(x.exp, x.exp))
    assert case.measure(BRIEF).spread().median == pytest.approx(1, abs=0.3)


def test_twice_the_work_has_ratio_two():
    x = torch.randn(10_000)
    case = timing.ratio("twice", 1.0, lambda: Pair(lambda: (x.exp(), x.exp()), x.exp))
    assert case.measure(BRIEF).spread().median == pytest.approx(2, abs=0.5)


def test_measuring_leaves_threads_as_they_were():
    threads = torch.get_num_threads()
    during = []
    timing.ratio("any", None, lambda: Pair(lambda: during.append(torch.get_num_threads()), int)).measure(BRIEF)
    assert set(during) == {1}
    assert torch.get_num_threads() == threads
