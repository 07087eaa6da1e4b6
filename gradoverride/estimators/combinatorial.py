"""Estimators for solvers whose results are discrete: shortest paths, rankings, assignments, the k largest.

Their derivative is zero wherever it exists. What these give instead comes from solving again, where the incoming
gradient points, or at random points around. A solver's result has the shape of its argument: which edges are taken,
which rank each has. It is a minimiser of costs or a maximiser of scores: `maximizes` says which.

`batch_dims`, `batched`, `generator`, and what else is alike, are as in `estimators.sampling`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gradoverride._core.autograd.function import tied
from gradoverride._core.binding.contract import shape_text, what
from gradoverride._core.binding.options import check, check_flag, check_function
from gradoverride._core.binding.signature import POSITIONAL, Forward
from gradoverride._core.python.residuals import save_for_backward
from gradoverride._core.values.precision import wide
from gradoverride._core.values.structure import taken_apart, unflatten
from gradoverride.decorators import custom_backward
from gradoverride.errors import DecorationError, ForwardResultError, UnsupportedError
from gradoverride.estimators.binding import NOT_TRACED, Estimator, check_options
from gradoverride.estimators.evaluation import Evaluation, Points, is_floating, leaves_of, real
from gradoverride.estimators.sampling import drawn, moved, normal

__all__ = ["blackbox", "perturbed", "imle"]

Noise = Callable[[Tensor, "torch.Generator | None"], Tensor]


@dataclass(frozen=True)
class blackbox(Estimator):
    """The solver's answer to costs that are changed by the gradient, against its answer.

        -(y - f(x + strength * g)) / strength

    >>> import torch, gradoverride as go
    >>> @go.custom_backward(go.estimators.blackbox(20.0))
    ... def cheapest(costs):
    ...     return torch.nn.functional.one_hot(costs.argmin(), len(costs)).to(costs)
    >>> costs = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    >>> chosen = cheapest(costs)
    >>> chosen.backward(torch.tensor([1.0, 0.0, 1.0]))  # not the first
    >>> costs.grad
    tensor([-0.0500,  0.0500,  0.0000])

    (Descent raises the cost of what was chosen, and lowers that of what should have been.)

    `strength` is the paper's lambda, larger than 0: so large that changed costs lead to other answers. For a maximiser
    of scores, `maximizes=True` moves them the other way, `(y - f(x - strength * g)) / strength`.

    Cost: 1 call. Bias: it is the gradient of a piecewise affine function between the loss's values, for a solver that
    minimises what is linear in the costs. Variance: none.

    Source: Vlastelica et al., "Differentiation of blackbox combinatorial solvers" (2020), algorithm 1.
    """

    strength: float
    maximizes: bool = False

    def __post_init__(self) -> None:
        check_options(self)
        check_flag("blackbox", "maximizes", self.maximizes)

    def gradients(self, evaluation: Evaluation) -> list[Tensor]:
        """One for each of the points."""
        step = -self.strength if self.maximizes else self.strength
        (answers,) = _at_each(evaluation, [_along(evaluation, evaluation.points, step)])
        pairs = zip(answers, evaluation.results, evaluation.points, strict=True)
        return [((wide(answer) - wide(result)) / step).to(point) for answer, result, point in pairs]


class _Perturbing(Estimator):
    """An estimator by answers to perturbed arguments."""

    def mean(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """The function whose value is the mean over `n` samples, its first argument perturbed.

        What it returns besides floating tensors is that of the first sample.
        """
        return _mean(self, fn)  # type: ignore[arg-type]  # one of both below


@dataclass(frozen=True)
class perturbed(_Perturbing):
    """The gradient of the mean of a solver's answers to perturbed arguments, `E f(x + sigma z)`; from `n` samples.

        <g, f(x + sigma z) - y> s(z) / sigma   s(z) = z for normal noise, 1 - exp(-z) for Gumbel's

    As a rule it leaves the value as it is: the solver's own answer. `mean` makes the function whose value is the mean
    too, as in the paper; its gradient comes from the same samples, and costs no further calls.

    >>> import torch, gradoverride as go
    >>> def largest(scores):
    ...     return torch.nn.functional.one_hot(scores.argmax(-1), scores.shape[-1]).to(scores)
    >>> draws = torch.Generator().manual_seed(0)
    >>> softer = go.estimators.perturbed(n=1000, noise="gumbel", generator=draws).mean(largest)
    >>> scores = torch.tensor([0.0, 1.0, 2.0])
    >>> (softer(scores) - scores.softmax(-1)).abs().max() < 0.05
    tensor(True)

    `noise`: "normal" or "gumbel". `y` is subtracted to lower the variance, the mean of the samples in `mean`.

    Cost: n calls (`mean`: n in the forward). Bias: none, for the mean; in `mean` with n of 1 none either, but nothing
    is subtracted. Variance: in proportion to 1 / n; it grows as sigma becomes small.

    Source: Berthet et al., "Learning with differentiable perturbed optimizers" (2020).
    """

    n: int = 16
    sigma: float = 1.0
    noise: str = "normal"
    generator: torch.Generator | None = field(default=None, repr=False)
    batch_dims: int = 0
    batched: str | None = None
    deterministic: bool = True

    def __post_init__(self) -> None:
        check_options(self)
        check("perturbed", "noise", self.noise, self.noise in ("normal", "gumbel"), "'normal' or 'gumbel'")

    def gradients(self, evaluation: Evaluation) -> list[Tensor]:
        """One for each of the points."""
        points = evaluation.points

        def pairs() -> Iterator[tuple[Points, None, Points]]:
            for _ in range(self.n):
                noise = self.draw(points)
                yield _moved(points, noise, self.sigma), None, self._scores(noise)

        return evaluation.weighted(evaluation.differences(pairs()), self.n * self.sigma)

    def draw(self, points: Points) -> list[Tensor]:
        """Noise for each of the points."""
        return [_NOISES[self.noise](point, self.generator) for point in points]

    def from_samples(self, evaluation: Evaluation, noises: Sequence[Points], answers: Sequence[Points]) -> list[Tensor]:
        """The gradients, from samples that were drawn in the forward."""
        baseline = [wide(result) if self.n > 1 else torch.zeros_like(wide(result)) for result in evaluation.results]

        def differences() -> Iterator[tuple[Tensor, Points]]:
            for noise, answer in zip(noises, answers, strict=True):
                changes = [wide(one) - mean for one, mean in zip(answer, baseline, strict=True)]
                yield evaluation.product(changes), self._scores(noise)

        # The mean of the same samples was subtracted.
        return evaluation.weighted(differences(), max(self.n - 1, 1) * self.sigma)

    def _scores(self, noises: Points) -> Points:
        return noises if self.noise == "normal" else [1 - torch.exp(-noise) for noise in noises]


@dataclass(frozen=True)
class imle(_Perturbing):
    """The mean difference between answers to perturbed arguments, and to those with the gradient taken off besides.

        (f(x + e) - f(x - strength * g + e)) / strength   e = sigma * noise, the same in both; the mean of `n`

    As a rule it leaves the value as it is: the solver's own answer. `mean` makes the function whose value is the mean
    of the perturbed answers, as in the paper; the backward uses the same noise then.

    >>> import torch, gradoverride as go
    >>> def largest(scores):
    ...     return torch.nn.functional.one_hot(scores.argmax(-1), scores.shape[-1]).to(scores)
    >>> rule = go.estimators.imle(1.0, n=1000, generator=torch.Generator().manual_seed(0))
    >>> scores = torch.zeros(2, requires_grad=True)
    >>> rule.mean(largest)(scores).backward(torch.tensor([1.0, 0.0]))  # not the first
    >>> scores.grad.sign()
    tensor([ 1., -1.])

    `strength` is the paper's lambda, larger than 0. (The paper leaves out the division by it, which makes this an
    estimate of the gradient as strength becomes small: `chain` with `scale(strength)` undoes it.) `noise`: "gumbel",
    "normal", or a function `noise(tensor, generator)` that gives noise of the tensor's shape. For a minimiser of costs,
    `maximizes=False` adds the gradient instead.

    Cost: 2 n calls (`mean`: n in the forward, n in the backward). Bias: of the order of strength, for the mean.
    Variance: in proportion to 1 / n; smaller than that of `perturbed`, for both answers share their noise.

    Source: Niepert, Minervini, Franceschi, "Implicit MLE: backpropagating through discrete exponential family
    distributions" (2021), algorithm 1.
    """

    strength: float
    n: int = 1
    sigma: float = 1.0
    noise: str | Noise = "gumbel"
    maximizes: bool = True
    generator: torch.Generator | None = field(default=None, repr=False)
    batched: str | None = None
    deterministic: bool = True

    def __post_init__(self) -> None:
        check_options(self)
        check_flag("imle", "maximizes", self.maximizes)
        if self.noise not in ("normal", "gumbel"):
            required = "'normal', 'gumbel' or a function of a tensor and a generator"
            check_function("imle", "noise", self.noise, 2, required)

    def gradients(self, evaluation: Evaluation) -> list[Tensor]:
        """One for each of the points."""
        return self.from_samples(evaluation, [self.draw(evaluation.points) for _ in range(self.n)], None)

    def draw(self, points: Points) -> list[Tensor]:
        """Noise for each of the points."""
        draw = self.noise if callable(self.noise) else _NOISES[self.noise]
        noises: list[Any] = [draw(real(point), self.generator) for point in points]
        for noise, point in zip(noises, points, strict=True):
            if not isinstance(noise, Tensor) or noise.shape != real(point).shape:
                raise ForwardResultError(
                    f"imle: 'noise' must return a tensor of the shape that it is given, "
                    f"{shape_text(real(point).shape)}; it returned {what(noise)}"
                )
        return noises

    def from_samples(
        self, evaluation: Evaluation, noises: Sequence[Points], answers: Sequence[Points] | None
    ) -> list[Tensor]:
        """The gradients, from samples that were drawn in the forward, or whose answers are not known yet."""
        step = -self.strength if self.maximizes else self.strength
        near = [_moved(evaluation.points, noise, self.sigma) for noise in noises]
        far = [_along(evaluation, points, step) for points in near]
        known = evaluation.at_each(near) if answers is None else iter(answers)
        totals = [torch.zeros_like(wide(point)) for point in evaluation.points]
        for first, second in zip(list(known), _at_each(evaluation, far), strict=True):
            for k, (one, other) in enumerate(zip(first, second, strict=True)):
                totals[k] = totals[k] + (wide(other) - wide(one)).to(totals[k])
        return [(total / (step * self.n)).to(point) for total, point in zip(totals, evaluation.points, strict=True)]


def _gumbel(point: Tensor, generator: torch.Generator | None) -> Tensor:
    uniform = drawn(torch.rand, wide(real(point)), generator)
    tiny = torch.finfo(uniform.dtype).tiny
    exponential = -torch.log(uniform.clamp(min=tiny))
    return -torch.log(exponential.clamp(min=tiny))


_NOISES: dict[str, Noise] = {"normal": normal, "gumbel": _gumbel}


def _moved(points: Points, noise: Sequence[Tensor], sigma: float) -> list[Tensor]:
    return [moved(point, sigma * each) for point, each in zip(points, noise, strict=True)]


def _along(evaluation: Evaluation, points: Points, step: float) -> list[Tensor]:
    """The points, moved along the gradient of the result, which must be of their shapes."""
    shapes, expected = [grad.shape for grad in evaluation.grads], [point.shape for point in points]
    if shapes != expected:
        raise ForwardResultError(
            f"{evaluation.who} must return a result of the shape of its argument, "
            f"{' and '.join(map(shape_text, expected))}, for the gradient is added to that; it returned "
            f"{' and '.join(map(shape_text, shapes))}. Return the chosen ones as a mask, or use perturbed or evolution"
        )
    return [point + step * grad.to(point) for point, grad in zip(points, evaluation.grads, strict=True)]


def _at_each(evaluation: Evaluation, many: Sequence[Points]) -> Iterator[list[Tensor]]:
    """The results at points that depend on the gradient: that has no derivative either."""
    for answer in evaluation.at_each(many):
        yield tied(answer, evaluation.grads, evaluation.refusal)


# --- the mean as the value


def _mean(estimator: perturbed | imle, fn: Callable[..., Any]) -> Callable[..., Any]:
    kind = type(estimator).__name__
    read = Forward(fn, method=False)  # a lambda that is written in the body of a class is none
    parameters = read.parameters or []
    if not parameters or parameters[0].kind not in POSITIONAL:
        raise DecorationError(
            f"{kind}.mean: {read.who} must have a first parameter, which is perturbed; it has none. Give a function "
            f"that calls it, such as `lambda x: {read.name}(x)`"
        )
    if read.named_so:  # `self`
        raise DecorationError(
            f"{kind}.mean: {read.who} must be a function; it is a method. Give a function that calls it"
        )
    name = parameters[0].name

    def mean_of_samples(*args: Any, **kwargs: Any) -> Any:
        first, *others = args if args else (kwargs.pop(name),)
        spec, points = taken_apart(first, is_floating)
        if not points:
            raise DecorationError(f"{kind}.mean: {read.who} must have floating tensors in its argument '{name}'")
        noises = [estimator.draw(points) for _ in range(estimator.n)]
        answers, results = [], []
        for noise in noises:
            results.append(fn(unflatten(spec, iter(_moved(points, noise, estimator.sigma))), *others, **kwargs))
            answers.append(leaves_of(results[-1]))
            if not answers[-1]:
                came = f"{what(results[-1])}{f' of {results[-1].dtype}' if isinstance(results[-1], Tensor) else ''}"
                raise ForwardResultError(
                    f"{kind}.mean: {read.who} must return a floating tensor, for there to be a mean of its samples; it "
                    f"returned {came}. Convert it: .to(torch.get_default_dtype())"
                )
        means = [torch.stack(list(map(wide, column))).mean(0).to(column[0]) for column in zip(*answers, strict=True)]
        result = unflatten(taken_apart(results[0], is_floating)[0], iter(means))
        given = (others, kwargs)
        return save_for_backward(result, first=first, given=given, noises=noises, answers=answers, mean=result)

    def rule(
        grad_output: Any, /, first: Any, given: Any, noises: Any, answers: Any, mean: Any, needs: Any
    ) -> dict[str, Any]:
        more = [other for other, wanted in needs.items() if wanted and other != name]
        if more:
            raise UnsupportedError(
                f"{kind}.mean: {read.who} gets a gradient for its first argument alone, '{name}', which is perturbed; "
                f"one is wanted for '{more[0]}'. Detach that, or use {kind} as a rule"
            )
        others, kwargs = given

        def again(values: dict[str, Any]) -> Any:
            return fn(values[name], *others, **kwargs)

        evaluation = Evaluation(estimator, read.who, again, {name: first}, {name: True}, grad_output, mean)
        known = [evaluation.opaque(list(found)) for found in answers]
        return evaluation.answer(estimator.from_samples(evaluation, noises, known))

    rule.writes_nothing = True  # type: ignore[attr-defined]  # into what it is given
    rule.not_traced = NOT_TRACED  # type: ignore[attr-defined]  # by Dynamo
    rule.__name__ = rule.__qualname__ = f"{kind}.mean"
    return custom_backward(rule)(functools.update_wrapper(mean_of_samples, fn, updated=()))
