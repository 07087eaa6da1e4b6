"""The module as a rule is shown it: as it was in that forward, with the tensors of that."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from gradoverride._core.autograd.ambient import TRACED, RandomState
from gradoverride._core.modules.snapshot import Snapshot
from gradoverride._core.modules.stale import Stale
from gradoverride._core.modules.standin import Copied, stand_in
from gradoverride._core.private.dynamo import fail
from gradoverride._core.private.tensors import version_of
from gradoverride._core.python.purity import class_normalizes
from gradoverride._core.values.structure import Node, flatten, unchanged
from gradoverride._core.values.tensors import is_tensor
from gradoverride.errors import UnsupportedError

if TYPE_CHECKING:
    from gradoverride._core.calls.backward_pass import Backward
    from gradoverride._core.calls.call import Call
    from gradoverride._core.calls.plan import NamesLeft

__all__ = [
    *("Left", "LeftBefore", "as_shown", "carry_items", "changes_then", "forward_then", "keep_module", "module_then"),
]


# --- kept by the forward ---


def keep_module(call: Call, module: nn.Module, before: Mapping[str, int | None]) -> None:
    """Keep what the rule is to be shown of the module besides its trainable parameters: buffers, frozen ones.

    Buffers are shown as the forward left them.

    `before`: the versions of the buffers before the forward. Those that it wrote into will be written into again
    by the next one, so a copy is kept.
    """
    call.module = module
    call.buffers = dict(module.named_buffers())
    if call.mode == TRACED:
        return
    for name, buffer in call.buffers.items():
        if before.get(name, version_of(buffer)) != version_of(buffer):
            call.buffers[name] = buffer.detach().clone()
    for prefix, part in module.named_modules():
        kind: Any = type(part)
        if class_normalizes(kind):  # torch does not count what it writes
            for name in [f"{prefix}.{name}" if prefix else name for name in part._buffers]:
                if name in call.buffers:  # a tied one has one name
                    call.buffers[name] = call.buffers[name].detach().clone()
    call.then = {name: version_of(tensor) for name, tensor in {**call.frozen, **call.buffers}.items()}
    call.training = _training_of(module)


class Left(NamedTuple):
    """What a forward left in an attribute."""

    value: Any
    known: Sequence[Tensor]  # those in it that are to be held as they are, no values of this call


class LeftBefore:
    """What the attributes of a module hold before a forward. What that leaves there for the rule is a value that it
    handed over: the next forward assigns it anew, or puts another into the same container.

    A container that the rule itself takes from is no such value: it is a stack, or a queue, and whose turn it is only
    the user knows.
    """

    def __init__(self, module: Any, names: NamesLeft) -> None:
        self.names = names
        self.attributes = _attributes_of(module, names.read)
        self.contents = {}
        for path, value in self.attributes.items():
            if isinstance(value, (list, dict)) and path.rpartition(".")[2] not in names.changed:
                tensors: list[Tensor] = []
                self.contents[path] = flatten(value, is_tensor, tensors), tensors

    def left_since(self, module: Any) -> dict[str, Left]:
        """By dotted name, what the forward left.

        What is made once (a table) and what is made anew are saved alike, for a checkpoint counts what is saved. So is
        what a dict has under its keys; a list grows from call to call, and only what is new in it is saved.
        """
        found = {}
        for path, value in _attributes_of(module, self.names.read).items():
            name = path.rpartition(".")[2]
            if path not in self.attributes or self.attributes[path] is not value or name in self.names.assigned:
                found[path] = Left(value, ())
            elif path in self.contents:
                spec, tensors = self.contents[path]
                if isinstance(value, dict) and name in self.names.filled:
                    found[path] = Left(value, ())
                elif not unchanged(spec, iter(tensors), value):
                    found[path] = Left(value, tensors)
        return found


def _attributes_of(module: Any, names: Collection[str] | None) -> dict[str, Any]:
    """By dotted name, what `module` and its parts have in attributes of these `names`, or in any of their own."""
    return {
        f"{prefix}.{name}" if prefix else name: vars(part)[name]
        for prefix, part in module.named_modules()
        for name in ([*vars(part)] if names is None else names)
        if name in vars(part) and name not in _OF_ALL_MODULES
    }


_OF_ALL_MODULES = frozenset(vars(nn.Module()))


def _training_of(module: nn.Module) -> dict[str, bool]:
    """By prefix, whether each part of `module` is in training."""
    return {f"{name}." if name else "": part.training for name, part in module.named_modules()}


# --- shown in the backward ---


def module_then(backward: Backward, buffers: dict[str, Any] | None = None, copied: list[Copied] | None = None) -> Any:
    """The module of the call, or None; with these `buffers` if they are given. `copied`: as for `stand_in`."""
    call, saved = backward.call, backward.saved
    if call.module is None:
        return None
    tensors = {name: saved[slot] for name, slot in call.module_slots.items()}
    given = {**as_shown(call, call.frozen), **(as_shown(call, call.buffers) if buffers is None else buffers), **tensors}
    given.update({name: saved[slot] for name, slot in call.computed.items()})
    if backward.again and call.aliased and call.computed:
        given.update(_computed_anew(backward, {name: one for name, one in given.items() if name not in call.computed}))
    shown = None if copied is None else backward.shown
    return stand_in(call.module, given, copied, changes=changes_then(backward, shown))


def _computed_anew(backward: Backward, given: dict[str, Any]) -> dict[str, Tensor]:
    """Parametrized weights that were computed from aliases, as functions of the tensors that these came from.

    One that comes out otherwise than in the forward cannot be shown.
    """
    call = backward.call
    buffers = {name: one.clone() for name, one in given.items() if name in call.buffers and type(one) is not Stale}
    assert call.module is not None, "it has them"
    module = stand_in(call.module, {**given, **buffers}, changes=changes_then(backward))
    shown = {}
    for name, slot in call.computed.items():
        owner, _, own = name.rpartition(".")
        with RandomState().replayed():
            now = getattr(module.get_submodule(owner), own)
        shown[name] = now
        if not torch.allclose(now, backward.saved[slot], equal_nan=True):
            text = (
                f"{backward.plan.who} must read '{name}' of the module as that "
                "forward computed it, and with create_graph that is to be computed again; it came out otherwise (a "
                "parametrization draws random numbers, or updates buffers in training). Ask for it by its name, or "
                "put the module in eval mode"
            )
            shown[name] = Stale.of(now, text)
    return shown


def forward_then(backward: Backward) -> Any:
    """The undecorated forward, of a method that of the module as it was."""
    if not backward.plan.takes_receiver:
        return backward.plan.fn
    call, fn = backward.call, backward.plan.fn

    def forward(*args: Any, **kwargs: Any) -> Any:
        # It may write into buffers, and the forward has counted already.
        shown = as_shown(call, call.buffers)
        buffers = {name: one if isinstance(one, Stale) else one.clone() for name, one in shown.items()}
        then = call.receiver if call.module is None else module_then(backward, buffers)
        return fn(then, *args, **kwargs)

    return forward


def as_shown(call: Call, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The buffers or frozen parameters of the module, as they were: of one that was overwritten, an error."""
    if not call.then or torch.compiler.is_dynamo_compiling():  # the backward alone: compiled autograd
        return dict(tensors)
    shown = dict(tensors)
    for name, tensor in tensors.items():
        if version_of(tensor) != call.then.get(name, version_of(tensor)):
            shown[name] = Stale.of(
                tensor,
                f"{call.plan.who} must read '{name}' of the module as it was "
                "in that forward, and it was written into since. Hand a copy over by save_for_backward, ask for "
                "'vjp', or write after the backward",
            )
    return shown


def changes_then(backward: Backward, shown: dict[str, Any] | None = None) -> dict[str, Snapshot]:
    """By prefix of the parts of the module, what is otherwise now than the forward had it and left it.

    What that left is added to `shown`, for `carry_items`.
    """
    call = backward.call
    if call.module is None or torch.compiler.is_dynamo_compiling():
        return {}
    now = _training_of(call.module)
    then: dict[str, Any] = {
        f"{prefix}training": was for prefix, was in call.training.items() if now.get(prefix, was) is not was
    }
    left = {asked.name: asked.value(backward.saved) for asked in call.left}
    then.update(left)
    if shown is not None:
        shown.update(left)
    changes: dict[str, Snapshot] = {}
    for path, value in then.items():
        prefix, dot, name = path.rpartition(".")
        changes.setdefault(prefix + dot, Snapshot({}, {}, {})).attributes[name] = value
    return changes


def carry_items(backward: Backward) -> None:
    """The rule has run: what it has put into a container that it was shown is put into that of the module.

    One that its forward has made it may empty as it likes.
    """
    call = backward.call
    assert call.module is not None, "it was shown"
    changed = call.plan.names_left(type(call.module)).changed
    for asked in call.left:
        owner, _, name = asked.name.rpartition(".")
        if isinstance(asked.spec, Node) and asked.name in backward.shown and name not in changed:
            live = vars(call.module.get_submodule(owner)).get(name)
            _carry(backward, asked.name, backward.shown[asked.name], asked.value(backward.saved), live)


def _carry(backward: Backward, path: str, shown: Any, before: Any, live: Any) -> None:
    """Put into `live` what was put into `shown`, which was as `before`."""
    if not isinstance(shown, (list, dict)):
        return
    items, old, now = _items(shown), _items(before), _items(live)
    if old.keys() - items.keys() or (isinstance(shown, list) and len(shown) > len(before)):
        fail(
            UnsupportedError,
            f"{backward.plan.who} must take from the container '{path}' of its module, and add to it, by a method of "
            f"it that its code shows (self.{path}.pop()); it did so in another way, and what it is shown is a copy, as "
            "its own forward left it. Do that in the code of the backward itself, or hand over values by "
            "save_for_backward",
        )
    for key, value in items.items():
        if key in old and value is old[key]:
            continue
        if type(value) is type(old.get(key)) and isinstance(value, (list, dict)):
            _carry(backward, path, value, old[key], now.get(key))
        elif type(live) is type(shown) and (isinstance(live, dict) or key in now):
            live[key] = value


def _items(container: Any) -> dict[Any, Any]:
    """By key or index, what is in a container."""
    return dict(container if isinstance(container, dict) else enumerate(container or ()))
