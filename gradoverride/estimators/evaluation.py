"""A forward that is evaluated again, at other arguments, and what is measured there.

The forward runs without a graph: an estimator has no derivative of its own, and what it finds is tied to the arguments
in such a way that a second derivative is refused, not lost.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import torch
from torch import Tensor
from torch.func import debug_unwrap

from gradoverride._core.autograd.function import tied
from gradoverride._core.binding.contract import shape_text
from gradoverride._core.private.dynamo import in_transform
from gradoverride._core.values.precision import wide
from gradoverride._core.values.structure import flatten, leaves_in, unflatten
from gradoverride._core.values.tensors import is_differentiable as is_floating
from gradoverride.errors import ForwardResultError

if TYPE_CHECKING:
    from gradoverride.estimators.binding import Estimator

__all__ = ["BATCHED", "Evaluation", "Points", "batch_of", "is_floating", "leaves_of", "like", "real", "summed"]

BATCHED = (None, "vmap", "stack", "cat")

T = TypeVar("T")

Points = Sequence[Tensor]  # one for each tensor that wants a gradient
Again = Callable[[dict[str, Any]], Any]  # the forward, of its arguments by name


class Evaluation:
    """The forward of one call, to be evaluated again. `points` are its tensors that want a gradient."""

    def __init__(
        self,
        estimator: Estimator,
        who: str,
        again: Again,
        values: dict[str, Any],
        wanted: Mapping[str, bool],
        grad_output: Any,
        output: Any,
    ) -> None:
        self.estimator = estimator
        self.who = f"{who}, evaluated by {type(estimator).__name__},"
        self.again = again
        self.wanted = wanted
        self.leaves: list[Tensor] = []
        self.specs: dict[str, Any] = {}
        self.places: list[int] = []  # of the points among the leaves
        for name, value in values.items():
            start = len(self.leaves)
            self.specs[name] = flatten(value, is_floating, self.leaves)
            self.places += range(start, len(self.leaves)) if wanted.get(name) else ()
        self.constants = [_constant(leaf) for leaf in self.leaves]
        self.points = [self.constants[place] for place in self.places]
        self.grads = leaves_of(grad_output)
        self.results = [_constant(result) for result in leaves_of(output)]
        self.wide_grads = [real(wide(grad)) for grad in self.grads]
        self.batch = batch_of([*self.points, *self.results], estimator.batch_dims, self.who)

    def answer(self, gradients: Sequence[Tensor | None]) -> dict[str, Any]:
        """By name, the gradients in the structure of the arguments."""
        by_place = dict(zip(self.places, gradients, strict=True))
        given = iter([by_place.get(place) for place in range(len(self.leaves))])
        answers = {name: unflatten(spec, given, constants=False) for name, spec in self.specs.items()}
        return {name: answer for name, answer in answers.items() if self.wanted.get(name)}

    # --- evaluating

    def at(self, points: Points) -> list[Tensor]:
        """The floating tensors of the result at other points."""
        return self.opaque(self._plain(points))

    def at_each(self, many: Iterable[Points]) -> Iterator[list[Tensor]]:
        """The same at several points: one after the other, or in one call if that is wanted."""
        batched = self.estimator.batched
        if batched is None:
            for points in many:
                yield self.at(points)
            return
        together = list(many)
        if not together:  # points of no numbers
            return
        found = self._mapped(together) if batched == "vmap" else self._joined(together)
        for row in zip(*self.opaque(found), strict=True):
            yield list(row)

    def _plain(self, points: Points) -> list[Tensor]:
        found = leaves_of(self._call(self._with(points)))
        shapes, expected = [tensor.shape for tensor in found], [result.shape for result in self.results]
        if shapes != expected:
            self._refuse_shapes(shapes, expected)
        return found

    def _with(self, points: Points) -> list[Tensor]:
        """All floating tensors of the arguments, with these for the points."""
        leaves = list(self.constants)
        for place, point in zip(self.places, points, strict=True):
            leaves[place] = point
        return leaves

    def _call(self, leaves: Sequence[Tensor]) -> Any:
        given = iter(leaves)
        with torch.set_grad_enabled(in_transform()):  # transforms look for a graph, and find it opaque
            return self.again({name: unflatten(spec, given) for name, spec in self.specs.items()})

    def _mapped(self, together: Sequence[Points]) -> list[Tensor]:
        """By result, what `vmap` of the forward gives."""

        def one(*points: Tensor) -> tuple[Tensor, ...]:
            return tuple(self._plain(points))

        randomness = "error" if self.estimator.deterministic else "different"
        stacked = [torch.stack(column) for column in zip(*together, strict=True)]
        return list(torch.func.vmap(one, randomness=randomness)(*stacked))

    def _joined(self, together: Sequence[Points]) -> list[Tensor]:
        """By result, what the forward gives for all points at once: stacked, or one after the other."""
        count, cat = len(together), self.estimator.batched == "cat"
        rows = [self._with(points) for points in together]
        if cat and any([tensor.dim() == 0 for tensor in (*rows[0], *self.results)]):
            raise ForwardResultError(
                f"{self.who} must have arguments and results with a first dimension, to be put one after the other "
                "along it (batched='cat'); one is a scalar. Use batched='stack', or 'vmap'"
            )
        join = torch.cat if cat else torch.stack
        found = leaves_of(self._call([join(column) for column in zip(*rows, strict=True)]))
        shapes = [result.shape for result in self.results]
        expected = [(size[0] * count, *size[1:]) if cat else (count, *size) for size in shapes]
        if [tuple(tensor.shape) for tensor in found] != [tuple(size) for size in expected]:
            self._refuse_shapes([tensor.shape for tensor in found], expected)
        if not cat:
            return found
        return [tensor.unflatten(0, (count, size[0])) for tensor, size in zip(found, shapes, strict=True)]

    def _refuse_shapes(self, shapes: Sequence[Sequence[int]], expected: Sequence[Sequence[int]]) -> NoReturn:
        raise ForwardResultError(
            f"{self.who} must return a result of the same shape wherever it is evaluated, here of {_listed(expected)}; "
            f"it returned {_listed(shapes) or 'no floating tensor'}. Pad it to a shape that does not depend on values"
        )

    def opaque(self, found: list[Tensor]) -> list[Tensor]:
        """These, whose derivative is refused."""
        return tied(found, self.leaves, self.refusal)

    @property
    def refusal(self) -> str:
        """Why there are no second derivatives."""
        return f"second derivatives of {self.who} are not known: it is no function of torch"

    def check_repeats(self) -> None:
        """Raise if the forward, evaluated again where it was, gives something else; unless it may be random."""
        if not self.estimator.deterministic:
            return
        for before, after in zip(self.results, self._plain(self.points), strict=True):
            one, two = debug_unwrap(before).detach(), debug_unwrap(after).detach()
            if one.shape != two.shape:  # under vmap, where only one of the two is mapped over
                continue
            tolerance = 100 * torch.finfo(one.dtype).eps
            size = one.abs().nan_to_num(0, 0, 0).amax().item() if one.numel() else 0.0
            if not torch.allclose(one, two, rtol=0, atol=tolerance * size, equal_nan=True):
                raise ForwardResultError(
                    f"{self.who} must return the same for the same arguments, for it is compared with itself at "
                    "others; evaluated again it returned something else. Draw its random numbers beforehand, and give "
                    "them as an argument"
                )

    # --- measuring

    def differences(self, pairs: Iterable[tuple[Points, Points | None, T]]) -> Iterator[tuple[Tensor, T]]:
        """<g, f(one) - f(other)> of each pair, with the result itself for None; and what comes with the pair.

        A difference has the shape of the batch.
        """
        asked: deque[tuple[bool, T]] = deque()  # all at once, if the points are evaluated in one call

        def points() -> Iterator[Points]:
            for one, other, tag in pairs:
                asked.append((other is None, tag))
                yield one
                if other is not None:
                    yield other

        found = self.at_each(points())
        for upper in found:
            alone, tag = asked.popleft()
            lower = self.results if alone else next(found)
            yield self.product([wide(one) - wide(other) for one, other in zip(upper, lower, strict=True)]), tag

    def product(self, directions: Sequence[Tensor]) -> Tensor:
        """<g, directions>, over all dimensions but those of the batch."""
        pairs = zip(self.wide_grads, directions, strict=True)
        first, *others = [summed(grad * real(direction), len(self.batch)) for grad, direction in pairs]
        for term in others:
            first = first + term.to(first)
        return first

    def weighted(self, differences: Iterable[tuple[Tensor, Points]], count: float) -> list[Tensor]:
        """For each point, the sum of the differences times real tensors of its shape, divided by `count`."""
        totals = [torch.zeros_like(wide(real(point))) for point in self.points]
        for difference, weights in differences:
            for k, weight in enumerate(weights):
                sizes = self.batch + (1,) * (weight.dim() - len(self.batch))
                totals[k] = totals[k] + difference.to(weight).reshape(sizes) * weight
        return [like(total / count, point) for total, point in zip(totals, self.points, strict=True)]


def batch_of(tensors: Sequence[Tensor], batch_dims: int, who: str) -> torch.Size:
    """The leading sizes of all these, along which samples are independent."""
    batch = tensors[0].shape[:batch_dims] if tensors else torch.Size()
    if any([len(tensor.shape) < batch_dims or tensor.shape[:batch_dims] != batch for tensor in tensors]):
        shapes = ", ".join([shape_text(tensor.shape) for tensor in tensors])
        raise ForwardResultError(
            f"{who} must have arguments and results whose first {batch_dims} sizes are the same ('batch_dims'); they "
            f"have the shapes {shapes}"
        )
    return batch


def _constant(tensor: Tensor) -> Tensor:
    return tensor if in_transform() else tensor.detach()


def leaves_of(value: Any) -> list[Tensor]:
    """The floating and complex tensors in a structure."""
    return leaves_in(value, is_floating)


def summed(tensor: Tensor, count: int) -> Tensor:
    """The sum over all but the first `count` dimensions."""
    over = tuple(range(count, tensor.dim()))
    return tensor.sum(over) if over else tensor  # of no dimensions torch makes all


def real(tensor: Tensor) -> Tensor:
    """Complex numbers as pairs of real ones."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def like(gradient: Tensor, point: Tensor) -> Tensor:
    """A real gradient in the dtype of the point."""
    if point.is_complex():
        return torch.view_as_complex(gradient.contiguous())
    return gradient.to(point.dtype)


def _listed(shapes: Sequence[Sequence[int]]) -> str:
    return " and ".join(map(shape_text, shapes))
