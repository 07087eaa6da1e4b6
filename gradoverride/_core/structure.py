"""Containers taken apart and put together again: what a forward is given and returns, and what a rule answers.

torch's pytree takes 7 us for a tuple of two tensors and does not know dataclasses; this walks tuples, lists, dicts,
their subclasses (namedtuples, Hugging Face's `ModelOutput`) and dataclasses, and gives each back in its own type.
It knows no tensors: what a leaf is, the caller says.
"""

from __future__ import annotations

import copy
import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

__all__ = ["LEAF", "Node", "alike", "flatten", "in_order_of", "is_container", "skeleton", "unchanged", "unflatten"]


class _Leaf:
    """The place of one leaf. A single object, so that `spec is LEAF` tells."""

    def __repr__(self) -> str:
        return "*"


LEAF = _Leaf()


class Node:
    """A container: its type, its keys, the specs of its parts, and an example to be copied where a type needs one."""

    __slots__ = ("bare", "example", "keys", "kind", "parts")

    def __init__(self, kind: type, keys: tuple[Any, ...] | None, parts: list[Any], example: Any = None) -> None:
        self.kind = kind
        self.keys = keys
        self.parts = parts
        self.example = example
        # Whether it is its own skeleton: it holds leaves alone.
        self.bare: bool = example is None and (
            parts.count(LEAF) == len(parts)
            or all([part is LEAF or (type(part) is Node and part.bare) for part in parts])
        )


class Constant:
    """A value that is no leaf."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value


def is_container(value: Any) -> bool:
    """Whether `flatten` looks inside. A shape is a value: no `torch.Size` holds anything but numbers."""
    if isinstance(value, (tuple, list, dict)):
        return not isinstance(value, torch.Size)
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def flatten(value: Any, is_leaf: Callable[[Any], bool], leaves: list[Any]) -> Any:
    """The spec of `value`; its leaves are appended to `leaves` in order."""
    kind = type(value)
    if kind is tuple or kind is list:
        return Node(kind, None, [flatten(part, is_leaf, leaves) for part in value])
    if kind is dict:
        return Node(dict, tuple(value), [flatten(part, is_leaf, leaves) for part in value.values()])
    if is_leaf(value):
        leaves.append(value)
        return LEAF
    if not is_container(value):
        return Constant(value)
    if isinstance(value, dict):
        example = None if _is_made_of_items(kind) else value
        return Node(kind, tuple(value), [flatten(value[key], is_leaf, leaves) for key in value], example)
    if isinstance(value, (tuple, list)):
        return Node(kind, None, [flatten(part, is_leaf, leaves) for part in value])
    keys = _fields(value)
    return Node(kind, keys, [flatten(getattr(value, key), is_leaf, leaves) for key in keys], value)


def unflatten(spec: Any, leaves: Iterator[Any], constants: bool = True) -> Any:
    """The value of `spec` with these leaves; what is no leaf is kept, or None if `constants` is False."""
    if spec is LEAF:
        return next(leaves)
    if isinstance(spec, Constant):
        return spec.value if constants else None
    parts = [next(leaves) if part is LEAF else unflatten(part, leaves, constants) for part in spec.parts]
    kind = spec.kind
    if kind is tuple:
        return tuple(parts)
    if kind is list:
        return parts
    if kind is dict:
        return dict(zip(spec.keys, parts, strict=True))
    if issubclass(kind, tuple):
        # Not by its constructor: that of a PackedSequence, as of any subclass, may do more than hold the parts.
        return kind(parts) if hasattr(kind, "n_sequence_fields") else tuple.__new__(kind, parts)
    if issubclass(kind, list):
        return kind(parts)
    if kind is OrderedDict:
        return OrderedDict(zip(spec.keys, parts, strict=True))
    if issubclass(kind, dict) and spec.example is None:
        return kind(**dict(zip(spec.keys, parts, strict=True)))
    # A copy keeps what a constructor would not (default factories, fields without init, checks in __post_init__).
    result = copy.copy(spec.example)
    for key, part in zip(spec.keys, parts, strict=True):
        if isinstance(result, dict):
            result[key] = part
        else:
            object.__setattr__(result, key, part)  # a frozen dataclass too
    return result


def unchanged(spec: Any, leaves: Iterator[Any], value: Any) -> bool:
    """Whether `value`, which was made of this spec and these leaves, still holds just them."""
    if spec is LEAF:
        return value is next(leaves)
    if isinstance(spec, Constant):
        return value is spec.value
    if type(value) is not spec.kind:
        return False
    parts: Any
    if isinstance(value, dict):
        same, parts = tuple(value) == spec.keys, value.values()
    elif isinstance(value, (tuple, list)):
        same, parts = len(value) == len(spec.parts), value
    else:
        same, parts = _fields(value) == spec.keys, [getattr(value, key, None) for key in spec.keys]
    return same and all([unchanged(part, leaves, inner) for part, inner in zip(spec.parts, parts, strict=True)])


def _fields(value: Any) -> tuple[str, ...]:
    return tuple([field.name for field in dataclasses.fields(value) if hasattr(value, field.name)])


def _is_made_of_items(kind: type) -> bool:
    """Whether such a dict is made anew from its items alone. (Dynamo cannot copy one.)"""
    return kind is OrderedDict or dataclasses.is_dataclass(kind)


def alike(one: Any, other: Any) -> bool:
    """Whether leaves stand at the same places of the same containers."""
    if one is LEAF or other is LEAF:
        return one is other
    if not isinstance(one, Node) or not isinstance(other, Node):
        return not has_leaf(one) and not has_leaf(other)
    return (
        one.kind is other.kind
        and one.keys == other.keys
        and len(one.parts) == len(other.parts)
        and all(alike(a, b) for a, b in zip(one.parts, other.parts, strict=True))
    )


def in_order_of(spec: Any, value: Any) -> Any:
    """`value`, with its dicts in the order of those in `spec`, where they have the same keys."""
    if not isinstance(spec, Node):
        return value
    if spec.kind is dict and type(value) is dict and set(spec.keys or ()) == set(value):
        return {key: in_order_of(part, value[key]) for key, part in zip(spec.keys or (), spec.parts, strict=True)}
    if spec.kind in (tuple, list) and isinstance(value, spec.kind) and len(spec.parts) == len(value):
        parts = [in_order_of(part, item) for part, item in zip(spec.parts, value, strict=True)]
        return tuple(parts) if spec.kind is tuple else parts
    return value


def skeleton(spec: Any) -> Any:
    """The spec without its constants and examples of them: for what is kept until the backward."""
    if spec is LEAF:
        return LEAF
    if isinstance(spec, Constant):
        return Constant(None)
    if spec.bare:
        return spec
    example = spec.example
    if example is not None:
        example = copy.copy(example)
        for key in spec.keys:
            if isinstance(example, dict):
                example[key] = None
            else:
                object.__setattr__(example, key, None)
    return Node(spec.kind, spec.keys, [skeleton(part) for part in spec.parts], example)


def has_leaf(spec: Any) -> bool:
    """Whether there is a leaf anywhere in it."""
    if spec is LEAF:
        return True
    return isinstance(spec, Node) and any(has_leaf(part) for part in spec.parts)


def describe(spec: Any) -> str:
    """The structure in words, for messages: `(*, [*, None])`."""
    if spec is LEAF:
        return "*"
    if isinstance(spec, Constant):
        return "None"
    inner: Sequence[str] = [describe(part) for part in spec.parts]
    if spec.keys is not None:
        inside = ", ".join(f"{key}: {part}" for key, part in zip(spec.keys, inner, strict=True))
        return "{" + inside + "}" if spec.kind is dict else f"{spec.kind.__name__}({inside})"
    inside = ", ".join(inner)
    if spec.kind is list:
        return f"[{inside}]"
    name = "" if spec.kind is tuple else spec.kind.__name__
    return f"{name}({inside})"
