"""The runner: each cell is right, or refused for a reason that is known, or it fails."""

from __future__ import annotations

import contextlib
import dataclasses
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

import gradoverride as go
from conformance.environment import REFUSALS, Environment
from conformance.environments import ENVIRONMENTS
from conformance.forms import FORMS, Form
from conformance.subjects import Subject

__all__ = ["CELLS", "Cell", "Outcome", "outcome_of", "reason_left_out"]

TOLERANCES = {
    torch.float64: {"rtol": 1e-9, "atol": 1e-11},
    torch.complex128: {"rtol": 1e-9, "atol": 1e-11},
    torch.float32: {"rtol": 1e-4, "atol": 1e-5},
    torch.bfloat16: {"rtol": 3e-2, "atol": 3e-2},
    torch.float16: {"rtol": 4e-3, "atol": 4e-3},
}


@dataclasses.dataclass(frozen=True)
class Cell:
    form: Form
    environment: Environment

    @property
    def id(self) -> str:
        return f"{self.environment.id} / {self.form.name}"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """`verdict` is "right", "refused: <key>" or "fails"; `text` the message or what is wrong."""

    verdict: str
    text: str = ""


def reason_left_out(form: Form, environment: Environment) -> str:
    """Why a column does not apply to a form; empty if it does."""
    if environment.body is not None:
        if form.attach is None:
            return form.reason_without("attach")
        return next((why for trait, why in form.attach.lacks if trait in environment.body.needs), "")
    missing = [trait for trait in environment.needs if trait not in form.traits]
    return form.reason_without(missing[0]) or f"it has no {missing[0]}" if missing else ""


CELLS = [
    Cell(form, environment) for environment in ENVIRONMENTS for form in FORMS if not reason_left_out(form, environment)
]


def outcome_of(cell: Cell) -> Outcome:
    """Run one cell."""
    environment = cell.environment
    ours, by_hand = _makers(cell)
    with _alone() as issued:
        failure: Exception | None = None
        try:
            found = environment.run(ours)
        except Exception as error:
            failure = error
        refused = [str(warning.message) for warning in issued if issubclass(warning.category, go.GradOverrideWarning)]
        other = [warning for warning in issued if not issubclass(warning.category, go.GradOverrideWarning)]
    if refused:
        return _refused(cell, refused[0])  # it has said so, whatever came of it
    if failure is not None:
        return _of_error(cell, failure)
    if other:
        return Outcome("fails", f"warns: {other[0].category.__name__}: {other[0].message}")
    with _alone():
        try:
            expected = (environment.reference or environment.run)(by_hand)
        except Exception as error:
            return Outcome("fails", f"it runs, and what was written by hand does not: {type(error).__name__}: {error}")
    try:
        compare(found, expected, environment.tolerance)
    except AssertionError as error:
        return Outcome("fails", f"differs from what was written by hand: {error}")
    return Outcome("right")


def _makers(cell: Cell) -> tuple[Callable[..., Subject], Callable[..., Subject]]:
    form, body = cell.form, cell.environment.body
    if body is None:
        return form.build, form.twin
    assert form.attach is not None, "such a cell is left out"
    attach = form.attach
    return (
        lambda device="cpu": body.subject(attach.ours(body), device),
        lambda device="cpu": body.subject(attach.by_hand(body), device),
    )


@contextlib.contextmanager
def _alone() -> Iterator[list[warnings.WarningMessage]]:
    """The same start for each cell; the warnings that count are collected."""
    torch.manual_seed(0)
    torch.compiler.reset()
    with warnings.catch_warnings(record=True) as issued:
        warnings.resetwarnings()
        warnings.simplefilter("always")
        for pattern, category in IGNORED:
            warnings.filterwarnings("ignore", pattern, category)
        yield issued


# torch's own doing, for every Function, module or program.
IGNORED: list[tuple[str, type[Warning]]] = [
    (r".*should not be instantiated", DeprecationWarning),
    (r".*torch\.jit.*", DeprecationWarning),
    (r".*torch\.jit.*", FutureWarning),
    (r"Anomaly Detection has been enabled", UserWarning),
    (r"(?s).*Dynamo does not know how to trace", UserWarning),  # it breaks the graph of a compiled backward there
    (r"(?s).*Complex modules are a new feature", UserWarning),
    (r"Guards may run slower on Python 3\.13\.0", RuntimeWarning),
]


def _of_error(cell: Cell, error: Exception) -> Outcome:
    text = "\n".join([str(one) for one in _chain(error)])
    outcome = _refused(cell, text)
    if outcome.verdict == "fails":
        trace = "".join(traceback.format_exception(error))
        return Outcome("fails", f"{type(error).__name__}: {error}\n{trace}")
    return outcome


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _refused(cell: Cell, text: str) -> Outcome:
    for key in cell.environment.refusals:
        if REFUSALS[key].matches(text):
            return Outcome(f"refused: {key}", text)
    return Outcome("fails", text)


def compare(found: Any, expected: Any, tolerance: Mapping[str, float] | None = None, place: str = "") -> None:
    """Raise an AssertionError that says where two results differ."""
    if isinstance(expected, Tensor):
        assert isinstance(found, Tensor), f"{place}: a tensor was expected, and there is {found!r}"
        allowed = tolerance or TOLERANCES.get(expected.dtype, {"rtol": 0, "atol": 0})
        torch.testing.assert_close(found, expected, **allowed, msg=lambda text: f"{place}: {text}")
    elif isinstance(expected, dict):
        assert isinstance(found, dict), f"{place}: {found!r} is no dict"
        assert list(found) == list(expected), f"{place}: {list(found)} != {list(expected)}"
        for key, part in expected.items():
            compare(found[key], part, tolerance, f"{place}[{key!r}]")
    elif isinstance(expected, (tuple, list)):
        assert isinstance(found, (tuple, list)), f"{place}: {found!r} is no sequence"
        assert len(found) == len(expected), f"{place}: {len(found)} != {len(expected)}"
        for index, part in enumerate(expected):
            compare(found[index], part, tolerance, f"{place}[{index}]")
    else:
        assert found == expected, f"{place}: {found!r} != {expected!r}"
