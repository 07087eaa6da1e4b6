"""What a forward wrote into, as the version counters of its tensors tell, and of norms the traced graph.

A rule that asks for a value that is gone by its backward is refused, and so is a write that no result shows: there
would be no gradient for what the argument became.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from gradoverride._core.autograd.aliases import is_laid_out_as
from gradoverride._core.autograd.ambient import EAGER, TRACED
from gradoverride._core.calls.call import Call
from gradoverride._core.graph.kept_graph import shares_versions
from gradoverride._core.private.dynamo import fail, is_updated_while_tracing, versions_while_tracing
from gradoverride._core.private.tensors import version_of
from gradoverride._core.values.structure import leaves_in
from gradoverride._core.values.tensors import is_differentiable, is_tensor
from gradoverride.errors import ForwardResultError

__all__ = ["Writes"]


class Writes:
    """The versions of the tensors of one forward, before and after it.

    `before`: by alias, and then by other tensor that the rule asks for, its version before the forward, None where it
    does not count. None for all in eager mode: each alias has a version counter of its own, which begins at 0.
    """

    def __init__(self, call: Call, leaves: list[Tensor], before: Sequence[int | None] | None) -> None:
        self.call = call
        self.plan = call.plan
        self.leaves = leaves
        self.before = before
        self.carried: Sequence[int] = ()  # those that were given data, or laid out, by the forward
        self.besides: list[tuple[str, Tensor]] = []  # those others, which have no gradient, by argument

    def watch(self, aliases: list[Tensor], values: Sequence[Any]) -> None:
        """The forward is about to run on `aliases`."""
        call, may_write = self.call, self.plan.forward_may_write
        if may_write and self.plan.sources:
            for name, value in zip(call.names, values, strict=True):
                if self._asks_for(name):
                    tensors = leaves_in(value, is_tensor)
                    self.besides += [(name, tensor) for tensor in tensors if not is_differentiable(tensor)]
        shares = call.mode == EAGER and shares_versions(may_write)
        if shares or (may_write and (call.mode != EAGER or self.besides or not all(call.wanted))):
            self.before = self._versions(aliases)

    def carry_statistics(self, aliases: Sequence[Tensor]) -> None:
        """Running statistics that a traced forward has updated: what it met may be a copy."""
        for index, leaf in enumerate(self.leaves):
            alias = aliases[index]
            if self.call.wanted[index] or not is_updated_while_tracing(alias):
                continue
            name = self.call.name_of_leaf(index)
            if self.asked_as(name) is not None:
                fail(
                    ForwardResultError,
                    f"{self.plan.forward.who} has torch update the running statistics in its argument '{name}', and "
                    f"its rule {self.plan.rule.who} asks for them as they were given, of which compiled code keeps "
                    "what they become. Leave this call uncompiled, by torch.compiler.disable",
                )
            if alias is not leaf:
                leaf.copy_(alias)

    def find(self, outs: list[Tensor], aliases: list[Tensor]) -> None:
        """The forward has run: note the results that are arguments as they stand, and the arguments written into."""
        call, leaves, before = self.call, self.leaves, self.before
        call.alias_of = [_place_in(aliases, call.n_leaves, out) for out in outs]
        call.copies = []
        if before is None:
            if call.mode != EAGER:
                return
            before = [None if alias is leaf else 0 for alias, leaf in zip(aliases, leaves, strict=False)]
        after = self._versions(aliases)
        changed = [i for i, version in enumerate(before) if version is not None and after[i] != version]
        if not changed:
            return
        returned = [leaves[index] for index in call.alias_of if index is not None]
        written = [i for i in changed if i < call.n_leaves]
        # A write into a tensor that was passed twice shows in both.
        written = [i for i in written if i in call.alias_of or not any([leaves[i] is leaf for leaf in returned])]
        for index in written:
            name = call.name_of_leaf(index)
            # What needs no gradient may be there to be written into.
            copied = aliases[index] is not leaves[index]
            if call.mode == TRACED and copied and not call.wanted[index] and index not in call.alias_of:
                self.refuse_asked(name)
                leaves[index].copy_(aliases[index])
            elif index not in call.alias_of and (
                aliases[index].requires_grad or call.wanted[index] or (copied and call.mode != EAGER)
            ):
                fail(
                    ForwardResultError,
                    f"{self.plan.forward.who} writes into its argument '{name}' in place and must return it, so that "
                    f"the rule has a gradient for what it became; it returned something else. Return '{name}', or "
                    "work on a copy",
                )
            if self._is_laid_out_anew(index, aliases[index]):
                fail(
                    ForwardResultError,
                    f"{self.plan.forward.who} must leave the shape and the strides of its argument '{name}' as they "
                    "are where it writes into it in place; it changed them (by t_, transpose_, squeeze_ or their "
                    "like), which the caller's own tensor would not show. Return a view instead: t(), squeeze()",
                )
            self.refuse_asked(name)
            if copied or index not in call.alias_of or call.graph is None:
                continue
            if call.mode == TRACED or (leaves[index].requires_grad and not call.wanted[index]):
                fail(
                    ForwardResultError,
                    f"{self.plan.forward.who} writes into a tensor within its argument '{name}' in place and returns "
                    "it, which is not taken where a rule needs the graph of the forward ('vjp', or parameters that it "
                    f"leaves to autograd). Pass that tensor as an argument of its own, or put a new one into '{name}'",
                )
        for index in changed:
            if index >= len(aliases):
                name = self.besides[index - len(aliases)][0]
                self._refuse_overwritten(self._argument(name), name)
        written = [index for index in written if index in call.alias_of]
        if call.mode == EAGER:
            call.dirty = written
        else:
            call.copies = written

    def _is_laid_out_anew(self, index: int, alias: Tensor) -> bool:
        """Whether this leaf would have to be of another shape or of other strides, as its alias is now, and cannot."""
        leaf = self.leaves[index]
        if self.call.mode != EAGER:  # its values are copied
            return alias.detach().shape != leaf.shape  # what Dynamo knows of the alias is what it was
        # A view would be none of what it was a view of.
        return not is_laid_out_as(alias, leaf) or (index in self.carried and leaf._is_view())

    def _versions(self, aliases: list[Tensor]) -> Sequence[int | None]:
        tensors = [*aliases, *[tensor for _, tensor in self.besides]] if self.besides else aliases
        if self.call.mode == TRACED:
            return versions_while_tracing(tensors)
        if self.call.mode == EAGER:  # in no transform
            return [None if tensor.is_inference() else tensor._version for tensor in tensors]
        return [version_of(tensor) for tensor in tensors]

    def _asks_for(self, name: str) -> bool:
        """Whether the rule asks for this argument."""
        return self.plan.sources.get(self._argument(name)) == "argument"

    def asked_as(self, name: str) -> str | None:
        """The name under which the rule asks for this argument, which holds leaves."""
        if self._asks_for(name):
            return self._argument(name)
        is_input = self.plan.sources.get("input") == "reserved" and name == self.call.names[self.call.holders[0]]
        return "input" if is_input else None

    def refuse_asked(self, name: str) -> None:
        """The forward has written into this argument: an error if the rule asks for it."""
        asked = self.asked_as(name)
        if asked is not None:
            self._refuse_overwritten(asked, name)

    def _argument(self, name: str) -> str:
        """The name under which a rule asks for this value: those of `*args` and `**kwargs` have one for all."""
        names, own = self.plan.forward.names, name.partition("[")[0]
        return own if own in names or not names else names[-1]

    def _refuse_overwritten(self, asked: str, name: str) -> None:
        fail(
            ForwardResultError,
            f"{self.plan.forward.who} overwrites its argument '{name}' in place, and its rule "
            f"{self.plan.rule.who} asks for '{asked}', whose value is gone by then. Ask for 'output', "
            "hand a copy over by save_for_backward, or do not write in place",
        )


def _place_in(tensors: Sequence[Tensor], count: int, wanted: Tensor) -> int | None:
    """The last place among the first `count` where `wanted` itself stands."""
    for index in range(count - 1, -1, -1):
        if tensors[index] is wanted:
            return index
    return None
