"""Containers taken apart and put together again: what a forward is given and returns, and what a rule answers.

torch's pytree takes 7 us for a tuple of two tensors and does not know dataclasses; this walks tuples, lists, dicts,
their subclasses (namedtuples, Hugging Face's `ModelOutput`) and dataclasses, and gives each back in its own type.
It knows no tensors: what a leaf is, the caller says.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

__all__ = [
    *("LEAF", "Constant", "Node", "alike", "describe", "flatten", "has_leaf", "holds_value", "in_order_of"),
    *("is_container", "leaves_in", "leaves_out_none", "named_parts", "skeleton", "step_to", "taken_apart", "unchanged"),
    "unflatten",
]


class _Leaf:
    """The place of one leaf. A single object, so that `spec is LEAF` tells."""


LEAF = _Leaf()


class Node:
    """A container: its type, its keys, the specs of its parts, and what an object of this type has besides."""

    __slots__ = ("bare", "keys", "kind", "more", "parts")

    def __init__(
        self, kind: type, keys: tuple[Any, ...] | None, parts: list[Any], more: dict[str, Any] | None = None
    ) -> None:
        self.kind = kind
        self.keys = keys
        self.parts = parts
        self.more = more
        # Whether it is its own skeleton: it holds leaves alone.
        self.bare: bool = more is None and (
            parts.count(LEAF) == len(parts)
            or all([part is LEAF or (type(part) is Node and part.bare) for part in parts])
        )


class Constant:
    """A value that is no leaf."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value


try:
    import numpy

    _ARRAYS: tuple[type, ...] = (numpy.ndarray,)
except ImportError:
    _ARRAYS = ()


def is_container(value: Any) -> bool:
    """Whether `flatten` looks inside. A shape is a value: no `torch.Size` holds anything but numbers."""
    if isinstance(value, (tuple, list, dict)):
        return not isinstance(value, torch.Size)
    if type(value) in _ARRAYS:  # of which Dynamo knows no attributes
        return False
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
    keys, parts = _parts_of(value)
    return Node(kind, keys, [flatten(part, is_leaf, leaves) for part in parts], _attributes(value))


def taken_apart(value: Any, is_leaf: Callable[[Any], bool]) -> tuple[Any, list[Any]]:
    """The spec of `value`, and its leaves in order."""
    leaves: list[Any] = []
    return flatten(value, is_leaf, leaves), leaves


def leaves_in(value: Any, is_leaf: Callable[[Any], bool]) -> list[Any]:
    """The leaves of `value` in order."""
    return taken_apart(value, is_leaf)[1]


def _parts_of(value: Any) -> tuple[tuple[Any, ...] | None, list[Any]]:
    """The keys of a container, if it has such, and its parts."""
    if isinstance(value, dict):
        return tuple(value), list(value.values()) if type(value) is dict else [value[key] for key in value]
    if isinstance(value, (tuple, list)):
        return None, list(value)
    keys = tuple([field.name for field in dataclasses.fields(value) if hasattr(value, field.name)])
    return keys, [getattr(value, key) for key in keys]


def _attributes(value: Any) -> dict[str, Any] | None:
    """What an object has besides its parts: attributes that were set on a dict, or in `__post_init__`."""
    kind = type(value)
    if kind is OrderedDict:
        return None
    if kind is defaultdict:
        return {"default_factory": value.default_factory}
    own: Any = getattr(value, "__dict__", None)
    if own is value:
        return {"__dict__": None}  # its items are its attributes
    fields = [field.name for field in dataclasses.fields(value)] if own and dataclasses.is_dataclass(value) else ()
    more = {name: own[name] for name in own if name not in fields} if own else {}
    if isinstance(value, defaultdict):
        more["default_factory"] = value.default_factory
    return more or None


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
    return _made(spec, kind, parts)


def _made(spec: Node, kind: Any, parts: list[Any]) -> Any:
    """An object of this type that holds these parts, made without its constructor.

    That may take something else than the parts, check them, or do more: `PackedSequence` does all three.
    """
    keys, more = spec.keys or (), spec.more or {}
    if kind is OrderedDict:
        return OrderedDict(zip(keys, parts, strict=True))
    if kind is defaultdict:
        return defaultdict(more.get("default_factory"), zip(keys, parts, strict=True))
    from_items = leaves_out_none(kind)  # a `ModelOutput`, which has keys and fields
    if from_items:
        made = kind(**dict(zip(keys, parts, strict=True)))
    elif issubclass(kind, tuple):
        # A named result of torch, as of `torch.max`, refuses the second way.
        made = kind(parts) if hasattr(kind, "n_sequence_fields") else tuple.__new__(kind, parts)
    else:
        made = kind.__new__(kind)
    for name, value in more.items():  # first, for a dict of the user's own may need them to take its items
        if name == "__dict__":
            made.__dict__ = made
        else:
            object.__setattr__(made, name, value)
    if issubclass(kind, list):
        made.extend(parts)
    elif not from_items:
        for key, part in zip(keys, parts, strict=False):  # a tuple has no keys
            if issubclass(kind, dict):
                made[key] = part
            else:
                object.__setattr__(made, key, part)  # a frozen dataclass too
    return made


def unchanged(spec: Any, leaves: Iterator[Any], value: Any) -> bool:
    """Whether `value`, which was made of this spec and these leaves, still holds just them."""
    if spec is LEAF:
        return value is next(leaves)
    if isinstance(spec, Constant):
        return value is spec.value
    if type(value) is not spec.kind:
        return False
    keys, parts = _parts_of(value)
    if keys != spec.keys or len(parts) != len(spec.parts):
        return False
    pairs = zip(spec.parts, parts, strict=True)
    return all([inner is next(leaves) if part is LEAF else unchanged(part, leaves, inner) for part, inner in pairs])


def alike(one: Any, other: Any) -> bool:
    """Whether leaves stand at the same places of the same containers."""
    if one is LEAF or other is LEAF:
        return one is other
    if not isinstance(one, Node) or not isinstance(other, Node):
        return not has_leaf(one) and not has_leaf(other)
    if one.kind is not other.kind:
        return False
    if one.keys != other.keys and leaves_out_none(one.kind):
        one, other = _of_leaves(one), _of_leaves(other)
    return (
        one.keys == other.keys
        and len(one.parts) == len(other.parts)
        and all(alike(a, b) for a, b in zip(one.parts, other.parts, strict=True))
    )


def leaves_out_none(kind: type) -> bool:
    """Whether objects of this type have no key for what is None: a `ModelOutput`."""
    return issubclass(kind, dict) and dataclasses.is_dataclass(kind)


def _of_leaves(node: Node) -> Node:
    """The same without the parts that hold no leaf."""
    kept = [(key, part) for key, part in zip(node.keys or (), node.parts, strict=True) if has_leaf(part)]
    return Node(node.kind, tuple([key for key, _ in kept]), [part for _, part in kept])


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
    """The spec without its constants, and what else may hold a tensor: for what is kept until the backward."""
    if spec is LEAF:
        return LEAF
    if isinstance(spec, Constant):
        return Constant(None)
    if spec.bare:
        return spec
    more = spec.more
    if more is not None:
        # What counts or names something stays: a dict of the user's own may need it to take its items.
        more = {name: value if _is_plain(value) else None for name, value in more.items()}
    parts = [part if type(part) is Constant and _is_plain(part.value) else skeleton(part) for part in spec.parts]
    return Node(spec.kind, spec.keys, parts, more)


def _is_plain(value: Any) -> bool:
    """Whether it is of numbers and text alone, and so holds no tensor."""
    if isinstance(value, (tuple, list)):
        return all([_is_plain(part) for part in value])
    if isinstance(value, dict):
        return all([_is_plain(part) for part in value.values()])
    return value is None or isinstance(value, _PLAIN)


_PLAIN = (bool, int, float, complex, str)


def holds_value(spec: Any, value: Any) -> bool:
    """Whether `value` itself is what stands at one of its places."""
    if isinstance(spec, Constant):
        return spec.value is value
    return isinstance(spec, Node) and any([holds_value(part, value) for part in spec.parts])


def has_leaf(spec: Any) -> bool:
    """Whether there is a leaf anywhere in it."""
    if spec is LEAF:
        return True
    return isinstance(spec, Node) and (spec.parts.count(LEAF) > 0 or any([has_leaf(part) for part in spec.parts]))


def step_to(node: Node, key: Any) -> str:
    """How the part at this key or index is reached: `.x`, `['x']`, `[0]`."""
    return f".{key}" if node.keys is not None and not issubclass(node.kind, dict) else f"[{key!r}]"


def named_parts(node: Node) -> Iterator[tuple[str, Any]]:
    """The parts, each with how it is reached."""
    for key, part in zip(range(len(node.parts)) if node.keys is None else node.keys, node.parts, strict=True):
        yield step_to(node, key), part


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
