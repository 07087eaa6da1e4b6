"""What a module has besides parameters and parts, at one time: attributes, buffers, and what is in its slots.

Two of them show what a forward has changed. What it changed on a stand-in is put on the module; what it changed on the
module is as it was on the stand-in that the forward runs on again.
"""

from __future__ import annotations

from types import MemberDescriptorType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gradoverride._core.private.marks import RNN_REFERENCES, RNN_WEIGHTS, evaluated_while_tracing
from gradoverride._core.python.by_class import RECORD, once_per_class, standing

__all__ = ["Snapshot", "snapshots"]

_NOT_OF_THE_FORWARD = ("_parameters", "_buffers", "_modules", RNN_WEIGHTS, RNN_REFERENCES, RECORD)
_MISSING = object()


class Snapshot(NamedTuple):
    """What a module has, or what is to be changed of it: `_MISSING` of what is to go."""

    attributes: dict[str, Any]
    buffers: dict[str, Any]
    slots: dict[str, Any]

    @classmethod
    def of(cls, module: nn.Module) -> Snapshot:
        attributes = dict(module.__dict__)
        return cls(attributes, dict(attributes["_buffers"]), _in_slots(module))

    def since(self, before: Snapshot) -> Snapshot:
        """What makes this of `before`."""
        return Snapshot(
            _changes(before.attributes, self.attributes),
            _changes(before.buffers, self.buffers),
            _changes(before.slots, self.slots),
        )

    def change(self, changes: Snapshot) -> None:
        """Have it as after these."""
        for table, changed in zip(self, changes, strict=True):
            _put(table, changed)

    def put_on(self, module: nn.Module) -> None:
        """Give these to the module."""
        _put(module.__dict__, self.attributes)
        _put(module.__dict__["_buffers"], {name: _cut(buffer) for name, buffer in self.buffers.items()})
        self.put_in_slots(module)

    def put_in_slots(self, module: nn.Module) -> None:
        """Give what is in slots to the module."""
        for name, value in self.slots.items():
            if value is _MISSING:
                object.__delattr__(module, name)
            else:
                object.__setattr__(module, name, value)


def snapshots(module: nn.Module) -> dict[str, Snapshot]:
    """By prefix, those of `module` and its parts, but of scripted ones: nobody stands in for them."""
    return {
        f"{name}." if name else "": Snapshot.of(part)
        for name, part in module.named_modules()
        if not isinstance(part, torch.jit.ScriptModule)
    }


def _changes(before: dict[Any, Any], now: dict[Any, Any]) -> dict[Any, Any]:
    changed = {
        key: value
        for key, value in now.items()
        if key not in _NOT_OF_THE_FORWARD and before.get(key, _MISSING) is not value
    }
    for key in before:
        if key not in now:
            changed[key] = _MISSING
    return changed


def _put(table: dict[Any, Any], changes: dict[Any, Any]) -> None:
    for key, value in changes.items():
        if value is _MISSING:
            table.pop(key, None)
        else:
            table[key] = value


def _cut(buffer: Any) -> Any:
    return buffer.detach() if isinstance(buffer, Tensor) else buffer


def _in_slots(module: nn.Module) -> dict[str, Any]:
    cls: Any = type(module)
    names = _slots_of(cls)  # an empty one may bear the name of a parameter
    tables: list[Any] = [module._parameters, module._buffers, module._modules] if names else []
    filled = [name for name in names if hasattr(module, name) and not any(name in table for table in tables)]
    return {name: getattr(module, name) for name in filled}


@evaluated_while_tracing
@once_per_class
def _slots_of(cls: Any) -> tuple[str, ...]:
    """The attributes of instances of `cls` that are in `__slots__`, not in `__dict__`."""
    names = {name for base in cls.__mro__ for name in vars(base)}
    return tuple([n for n in sorted(names) if isinstance(standing(cls, n), MemberDescriptorType)])
