"""The gradient without the rule under torch.func, where a graph does not outlive its transform.

There, and only there, the forward runs again in the backward: on the tensors that the backward is given, with the same
random numbers, and on copies of the buffers and the attributes as they were. That its result is the same is looked at,
for a state that nobody knows of (a generator of one's own) shows in nothing else.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import debug_unwrap

from gradoverride._core.autograd.aliases import alias_of
from gradoverride._core.autograd.ambient import FunctionRules, RandomState, noted_rules
from gradoverride._core.modules.snapshot import snapshots
from gradoverride._core.modules.standin import stand_in
from gradoverride._core.private.dynamo import fail
from gradoverride._core.private.modes import Draws, has_no_values, in_modes
from gradoverride._core.python.residuals import close_frame, open_frame
from gradoverride._core.values.structure import leaves_in, taken_apart, unflatten
from gradoverride._core.values.tensors import is_differentiable, is_tensor, may_want_gradient
from gradoverride.errors import UnsupportedError

if TYPE_CHECKING:
    from gradoverride._core.calls.call import Call
    from gradoverride._core.calls.plan import Plan
    from gradoverride._core.calls.saver import Saver

__all__ = ["Replay", "replayable"]


@contextlib.contextmanager
def replayable(plan: Plan) -> Iterator[None]:
    """A context for a forward that is to run again: what it draws without values cannot be drawn again."""
    if not in_modes():
        yield
        return
    with Draws() as draws:
        yield
    if draws.of_no_values:
        fail(
            UnsupportedError,
            f"{plan.forward.who} draws random numbers, and must draw them again under torch.func for the gradient that "
            "is autograd's own ('vjp', or of parameters left to it), which is impossible where it is traced without "
            "values. Leave the transform uncompiled, or answer for every parameter and ask for no 'vjp'",
        )


class Replay:
    """One forward, to be run again."""

    def __init__(
        self, call: Call, module: nn.Module | None, receiver: Any, tensors: Sequence[Tensor], values: Sequence[Any]
    ) -> None:
        """Before the forward, which may put something into a container among its arguments `values`.

        `tensors`: its leaves, then the parameters that it is to meet as aliases.
        """
        self.plan = call.plan
        self.tensors = tensors
        self.layout = call.layout
        self.module = module
        self.receiver = receiver
        # Places of tensors without a gradient:
        self.constants = [i for i, leaf in enumerate(tensors[: call.n_leaves]) if not may_want_gradient(leaf)]
        self.before = {} if module is None else snapshots(module)
        self.buffers: dict[str, Tensor] = {}
        if module is not None:
            self.buffers = {name: value.clone() for name, value in module.named_buffers()}
        # By argument, its structure, and by tensor in it whether it is one of the leaves.
        self.arguments: list[tuple[Any, list[bool]]] = []
        self.others: list[Tensor] = []
        for value in values:
            spec, held = taken_apart(value, is_tensor)
            self.arguments.append((spec, [is_differentiable(tensor) for tensor in held]))
            self.others += [tensor for tensor in held if not is_differentiable(tensor)]
        self.leaves = tensors[: call.n_leaves]
        self.random = RandomState()
        self.around = FunctionRules()

    def start(self) -> list[Tensor]:
        """What the forward is to run on the first time."""
        tensors, self.tensors = self.tensors, []
        return [alias_of(tensor, self.plan.forward_may_write) for tensor in tensors]

    def save(self, call: Call, saver: Saver, outs: Sequence[Tensor], values: Sequence[Any]) -> None:
        """The forward has run and gave `outs`."""
        self.rules = call.rules
        for index in call.copies:  # it is needed as it was, and is about to be written into
            saver.inputs[index] = saver.inputs[index].clone()
        self.drew = not has_no_values(outs) and self.random.differs()
        self.first = [debug_unwrap(result) for result in outs]
        self.versions = [_writes(one) for one in self.first]
        if self.module is not None:
            now = snapshots(self.module)
            back = {prefix: was.since(now[prefix]) for prefix, was in self.before.items() if prefix in now}
            self.before = {prefix: changes for prefix, changes in back.items() if any(changes)}
        self.n_leaves = call.n_leaves
        self.params = [param.names for param in call.params]
        leaves, others = self.leaves, [*self.others, *self.buffers.values(), *call.frozen.values()]
        self.copied, self.frozen = list(self.buffers), list(call.frozen)
        self.leaves, self.others, self.buffers = [], [], {}  # torch is to save them
        # The tensors that come back may be others.
        self.attributes = [tensor.__dict__ for tensor in (*leaves, *[param.tensor for param in call.params])]
        self.slots = [saver.slot(index) for index in range(call.n_leaves + len(call.params))] + saver.extras(others)

    def pull(
        self,
        saved: Sequence[Tensor],
        grads: Sequence[Tensor],
        which: Sequence[int],
        parameters: Sequence[Any] = (),
        last: bool = False,
    ) -> list[Tensor]:
        """The gradients of the tensors `which`, for the gradients `grads` of the results."""
        tensors = [saved[slot] for slot in self.slots]
        asked = [index for index in which if index not in self.constants]

        def part(*chosen: Tensor) -> tuple[Tensor, ...]:
            given = list(tensors)
            for index, tensor in zip(asked, chosen, strict=True):
                given[index] = tensor
            return tuple(self._forward(given))

        chosen = [tensors[index] for index in asked]
        try:
            if self.drew:
                with self.random.replayed():
                    again, pullback, *_ = torch.func.vjp(part, *chosen)
            else:
                again, pullback, *_ = torch.func.vjp(part, *chosen)
        except RuntimeError as error:
            if not self.drew or "random" not in str(error):
                raise
            fail(
                UnsupportedError,
                f"{self.plan.forward.who} draws random numbers, and this transform allows no replay of them: {error}",
            )
        self._compare(again)
        found = iter(pullback(tuple(grads)))
        return [torch.zeros_like(tensors[i]) if i in self.constants else next(found) for i in which]

    def _forward(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The forward on the tensors that were saved, in their order: what is differentiable in its result."""
        plan = self.plan
        given = iter(tensors)
        # Constants may be written into where no code shows it: running statistics are.
        leaves = [next(given) for _ in range(self.n_leaves)]
        leaves = [
            leaf.clone() if plan.forward_may_write or index in self.constants else leaf
            for index, leaf in enumerate(leaves)
        ]
        params = [next(given) for _ in self.params]
        for tensor, attributes in zip([*leaves, *params], self.attributes, strict=True):
            if type(tensor) is Tensor:
                tensor.__dict__ = attributes
        swapped = {name: tensor for names, tensor in zip(self.params, params, strict=True) for name in names}
        arguments = []
        rest = iter(leaves)
        for spec, kinds in self.arguments:
            parts = [next(rest) if differentiable else next(given) for differentiable in kinds]
            arguments.append(unflatten(spec, iter(parts)))
        inner = self.receiver
        if self.module is not None:
            swapped.update({name: next(given).clone() for name in self.copied})
            swapped.update({name: next(given) for name in self.frozen})
            inner = stand_in(self.module, swapped, changes=self.before)
        open_frame()
        try:
            with self.around.restored(), noted_rules() as rules:
                result = plan.invoke(self.layout, inner, arguments)
        finally:
            close_frame()
        if rules != self.rules:
            fail(
                UnsupportedError,
                f"{plan.forward.who} must run under the same rules when torch.func has it run again for the gradient "
                "that is autograd's own ('vjp', or of parameters left to it); what it calls has been overridden since, "
                "or is no longer. Leave the override after the backward: call what torch.func.vjp gave inside of it",
            )
        return leaves_in(result, is_differentiable)

    def _compare(self, again: Sequence[Tensor]) -> None:
        """What is no state that is known of (a generator of one's own) shows in another result."""
        results = [debug_unwrap(result) for result in again]
        same = len(results) == len(self.first)
        if same and not in_modes():  # in which there may be no values
            same = all([_same(*pair) for pair in zip(self.first, self.versions, results, strict=True)])
        if not same:
            fail(
                UnsupportedError,
                f"{self.plan.forward.who} must give the same result when torch.func has it run again for the gradient "
                "that is autograd's own ('vjp', or of parameters left to it); it gave another. Let it draw from the "
                "default generators, keep what it counts in attributes or buffers of its module, or ask for no 'vjp' "
                "and answer for every parameter",
            )


def _same(first: Tensor, version: int, now: Tensor) -> bool:
    """Whether a result is the first one again, unless that cannot be told: it was written into, or is of a batch."""
    return _writes(first) != version or now.shape != first.shape or _alike(first.detach(), now.detach())


def _alike(first: Tensor, again: Tensor) -> bool:
    """Whether two results are the same, up to the order in which they are summed up, and in which a batch lies."""
    if first.is_meta or not first.numel() or first.layout is not torch.strided:
        return True
    if first.is_cuda and torch.cuda.is_current_stream_capturing():
        return True
    if first.is_complex():
        first, again = torch.view_as_real(first.resolve_conj()), torch.view_as_real(again.resolve_conj())
    tolerance = max(torch.finfo(first.dtype).eps ** 0.5, 1e-5)
    if first.dtype.itemsize < 4:
        first, again = first.float(), again.float()
    largest = float(first.abs().nan_to_num(0.0, 0.0).max())  # of what is a number
    near: dict[str, Any] = {"rtol": tolerance, "atol": tolerance * largest, "equal_nan": True}
    if bool(torch.allclose(first, again, **near)):
        return True
    return bool(torch.allclose(first.flatten().sort()[0], again.flatten().sort()[0], **near))


def _writes(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
