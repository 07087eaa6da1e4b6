"""What a rule returned against what was required: every wrong answer is an error here, by the argument's name.

torch sums a gradient of a wrong shape, casts a wrong dtype and drops an imaginary part without a word, so all of
it is checked first. Pure: it looks at one answer and one call, and changes neither.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from gradoverride._core.binding.signature import kind_of, with_article
from gradoverride._core.private.dynamo import fail
from gradoverride._core.private.marks import evaluated_while_tracing
from gradoverride._core.values.structure import (
    LEAF,
    Node,
    describe,
    has_leaf,
    holds_value,
    leaves_in,
    leaves_out_none,
    step_to,
)
from gradoverride._core.values.tensors import is_differentiable
from gradoverride.errors import RuleResultError

if TYPE_CHECKING:
    from gradoverride._core.calls.call import Call
    from gradoverride._core.calls.params import Param
    from gradoverride._core.calls.plan import Plan

__all__ = ["Meta", "answers_by_name", "apart", "conform_output", "read_answer", "read_params", "shape_text", "what"]


def read_answer(call: Call, answer: Any) -> tuple[list[Tensor | None], dict[str, Any]]:
    """The gradient of each differentiable tensor among the arguments, in order, and what a dict said of parameters."""
    if call.plan.straight_through:
        first = call.holders[0]
        entry = _entry(call, first, answer)
        return [*entry, *[None] * (call.n_leaves - len(entry))], {}
    if answers_by_name(call, answer):
        return _by_name(call, answer)
    names, specs = call.names, call.specs
    if call.single is not None and not (isinstance(answer, (tuple, list)) and not _is_sequence(specs[call.single])):
        return _entry(call, call.single, answer), {}
    if answer is None and not call.holders:  # an embedding: there is no gradient but those of parameters
        return [], {}
    if not isinstance(answer, (tuple, list)):
        alone = call.passed_alone
        if alone is not None:
            entry = _entry(call, alone, answer)
            return [grad for i, spec in enumerate(specs) for grad in (entry if i == alone else _nothing(spec))], {}
        _refuse(
            call.plan,
            f"must return one gradient for each argument ({', '.join(names)}), as a tuple in this order or as a "
            f"dict by name; it returned {what(answer)}. Use None for an argument without a gradient",
        )
    if len(answer) > len(names):
        _refuse(
            call.plan,
            f"must return at most {len(names)} gradients, one for each argument ({', '.join(names)}); "
            f"it returned {len(answer)}. Leave the others out",
        )
    grads: list[Tensor | None] = []
    for index, (name, spec) in enumerate(zip(names, specs, strict=True)):
        if index < len(answer):
            grads += _entry(call, index, answer[index])
        elif has_leaf(spec) and call.wants(index):
            _refuse(
                call.plan,
                f"must return one gradient for each argument ({', '.join(names)}); it returned {len(answer)}, "
                f"and '{name}' holds a tensor that wants a gradient. Return None in its place to stop it",
            )
        else:
            grads += _nothing(spec)
    return grads, {}


def answers_by_name(call: Call, answer: Any) -> bool:
    """Whether this answer holds gradients by the names of arguments and parameters."""
    return not call.answers_dict_bare and isinstance(answer, dict) and not dataclasses.is_dataclass(answer)


def read_params(call: Call, named: dict[str, Any], assigned: dict[str, Any]) -> dict[str, Tensor | None]:
    """The gradients that were answered for parameters, in a dict or assigned to their `grad`, checked; each one asked
    for must be among them.
    """
    answers = {**named, **assigned}
    checked: dict[str, Tensor | None] = {}
    for param in call.params:
        answered = [name for name in param.names if name in answers]
        returned = [name for name in param.names if name in named]
        if returned and param.name in assigned:
            _refuse(
                call.plan,
                f"must give the gradient of the parameter '{param.name}' once; it assigns self.{param.name}.grad and "
                f"has '{returned[0]}' in the dict that it returns. Leave out one",
            )
        if answered:
            value = answers[answered[0]]
            if len(answered) > 1:  # one parameter under several names: its uses add up
                value = _total(call, param, [answers[name] for name in answered])
            checked[param.name] = None if value is None else conform(call.plan, (param.name,), value, param.meta)
        elif param.asked:
            name = next((name for name in param.names if name in call.plan.asked_of_module), param.name)
            _refuse(
                call.plan,
                f"asks for the parameter '{name}' and must answer for its gradient; it leaves that out. Return a dict "
                f"with '{name}' in it (None stops the gradient). To read the value alone ask for 'module' and use "
                f"module.{name}; for autograd's own gradient return vjp.by_name(grad_output)['{param.name}']",
            )
    return checked


def apart(grads: Iterable[Tensor | None], lent: Sequence[Tensor]) -> list[Tensor | None]:
    """These gradients, but copies of those that a rule was lent and gave back as they stand. They are aliases of what
    somebody else has, which torch does not see: it would accumulate other gradients in that memory.
    """
    ids = {id(one) for one in lent}
    return [grad.clone() if grad is not None and id(grad) in ids else grad for grad in grads]


def _total(call: Call, param: Param, values: list[Any]) -> Tensor | None:
    given = [conform(call.plan, (param.name,), value, param.meta) for value in values if value is not None]
    return torch.stack(given).sum(0) if given else None


def conform(plan: Plan, path: tuple[Any, ...], value: Any, meta: Meta) -> Tensor:
    """`value` as the gradient of a tensor with this shape, dtype and device, or an error."""
    alike = isinstance(value, Tensor) and value.shape == meta.shape and value.device == meta.device
    if alike and value.dtype == meta.dtype:
        return value
    name = _text(path)
    if not isinstance(value, Tensor):
        _refuse(
            plan,
            f"must return a tensor of shape {meta.text} as the gradient of '{name}'; it returned {what(value)}. "
            "Return None for a gradient that is to stop",
        )
    if value.shape != meta.shape:
        _refuse(
            plan,
            f"must return a gradient of shape {meta.text} for '{name}', the shape of '{name}' itself; "
            f"it returned {what(value)}. Reduce or expand it: torch would do so silently",
        )
    unfit = _unfit_kind(plan, f"'{name}'", value, meta)
    if unfit is not None:
        _refuse(plan, "must return {}; it returned {}. {}".format(*unfit))
    return value.to(meta.dtype)


def conform_output(plan: Plan, value: Any, meta: Meta) -> Tensor:
    """`value` as a gradient of the result, in the dtype of the result, or an error."""
    if not isinstance(value, Tensor) or value.shape != meta.shape:
        _refuse(
            plan,
            f"takes a gradient of shape {meta.text}, the shape of the result; it got {what(value)}. Hand over "
            "grad_output, or what is made of it",
            "vjp in the ",
        )
    unfit = _unfit_kind(plan, "the result", value, meta)
    if unfit is not None:
        _refuse(plan, "takes {}; it got {}. {}".format(*unfit), "vjp in the ")
    return value.to(meta.dtype)


def _unfit_kind(plan: Plan, name: str, value: Tensor, meta: Meta) -> tuple[str, str, str] | None:
    """If a gradient has another device or kind of number: what it should have been, what it is, and the way out."""
    if value.device != meta.device:
        needed = f"a gradient on {meta.device} for {name}, where {name} is"
        return needed, f"one on {value.device}", f"Move it with .to('{meta.device}')"
    if value.is_complex() and not meta.dtype.is_complex:
        return f"a real gradient for {name}, which is {meta.dtype}", str(value.dtype), "Take its .real part"
    if not (value.is_floating_point() or value.is_complex()):
        needed = f"a floating gradient for {name}, which is {meta.dtype}"
        return needed, str(value.dtype), f"Convert it with {_cast(plan, meta.dtype)}"
    return None


def _cast(plan: Plan, dtype: torch.dtype) -> str:
    """How a rule casts what it returns."""
    of_arrays = getattr(plan.rule.fn, "of_arrays", False)
    return f".astype('{str(dtype).removeprefix('torch.')}')" if of_arrays else f".to({dtype})"


class Meta:
    """What a gradient must look like."""

    __slots__ = ("device", "dtype", "shape")

    def __init__(self, tensor: Tensor) -> None:
        self.shape = tensor.shape
        self.dtype = tensor.dtype
        self.device = tensor.device

    @staticmethod
    def of(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Meta:
        meta = Meta.__new__(Meta)
        meta.shape, meta.dtype, meta.device = shape, dtype, device
        return meta

    @property
    def text(self) -> str:
        return shape_text(self.shape)

    def zeros(self) -> Tensor:
        """The gradient where none came."""
        return torch.zeros(self.shape, dtype=self.dtype, device=self.device)


def shape_text(shape: Any) -> str:
    """A shape as `(3,)`."""
    return str(tuple(shape))


def _by_name(call: Call, answer: dict[str, Any]) -> tuple[list[Tensor | None], dict[str, Any]]:
    known, names = call.groups, call.names
    params = {name for param in call.params for name in param.names} - known.keys() if call.params else ()
    for key in answer:
        if key not in known and key not in names and key not in params and key not in call.frozen:
            _refuse_key(call, key)
    grads: list[Tensor | None] = []
    for name, indices in known.items():
        entry = answer.get(name)
        entries = [entry]
        if call.variadic == name:  # a tuple, with one for each; or each by itself, as "args[0]"
            alone = [answer.get(names[index]) for index in indices]
            entries = alone if entry is None else _variadic_entries(call, name, entry, len(indices))
        for index, part in zip(indices, entries, strict=True):
            grads += _entry(call, index, part)
    return grads, {key: answer[key] for key in params if key in answer}


def _refuse_key(call: Call, key: Any) -> NoReturn:
    names = [*call.groups, *(param.name for param in call.params)]
    close = _closest(str(key), *names)
    hint = f"Did you mean '{close}'?" if close is not None else "Leave it out"
    for name, spec in zip(call.names, call.specs, strict=True):
        if isinstance(spec, Node) and spec.kind is dict and key in (spec.keys or ()):
            hint = f"The gradient of '{name}', which is a dict itself, goes under that name: {{'{name}': {{...}}}}"
    _refuse(
        call.plan,
        f"must return a dict by the names of arguments and parameters "
        f"({', '.join(names) or 'there are none'}); it has {key!r}. {hint}",
    )


@evaluated_while_tracing  # Dynamo cannot trace `difflib`
def _closest(key: str, *names: str) -> str | None:
    return next(iter(difflib.get_close_matches(key, names, n=1)), None)


def _variadic_entries(call: Call, name: str, entry: Any, count: int) -> list[Any]:
    if not isinstance(entry, (tuple, list)) or len(entry) != count:
        _refuse(
            call.plan,
            f"must return a tuple of {count} gradients for '*{name}'; it returned {what(entry)}. "
            "Use None for one without a gradient",
        )
    return list(entry)


def _entry(call: Call, index: int, entry: Any) -> list[Tensor | None]:
    """The gradients of the argument at `index`, which mirror its structure."""
    grads: list[Tensor | None] = []
    _match(call, (call.names[index],), call.specs[index], entry, call.metas_of(index), grads)
    return grads


def _match(
    call: Call, path: tuple[Any, ...], spec: Any, entry: Any, metas: list[Meta], grads: list[Tensor | None]
) -> None:
    """Add what `entry` answers for the leaves of `spec`, at a `path` of a name, and containers and keys in turn."""
    if entry is None:
        grads += _nothing(spec)
    elif spec is LEAF:
        grads.append(conform(call.plan, path, entry, metas[len(grads)]))
    elif not isinstance(spec, Node) or not has_leaf(spec):
        if _is_left(call, path, spec, entry):
            return
        _refuse(
            call.plan,
            f"must return None for '{_text(path)}', which holds no floating tensor; it returned {what(entry)}. "
            "Put None in its place",
        )
    else:
        for key, part, value in _parts(call, path, spec, entry):
            if part is LEAF and value is not None:
                grads.append(conform(call.plan, (*path, spec, key), value, metas[len(grads)]))
            else:
                _match(call, (*path, spec, key), part, value, metas, grads)


def _text(path: tuple[Any, ...]) -> str:
    """A place in an argument, as `pair['x'][0]`. Put into words for a message alone."""
    name, *steps = path
    for spec, key in zip(steps[::2], steps[1::2], strict=True):
        name += step_to(spec, key)
    return str(name)


def _is_sequence(spec: Any) -> bool:
    """Whether a bare gradient that mirrors this is itself a tuple or a list."""
    return isinstance(spec, Node) and issubclass(spec.kind, (tuple, list))


def _parts(call: Call, path: tuple[Any, ...], spec: Node, entry: Any) -> Iterable[tuple[Any, Any, Any]]:
    if spec.keys is None:
        if isinstance(entry, (tuple, list)) and len(entry) == len(spec.parts):
            return zip(range(len(entry)), spec.parts, entry, strict=True)
    elif isinstance(entry, dict):
        may_lack = isinstance(entry, spec.kind) and leaves_out_none(spec.kind)
        if set(entry) == set(spec.keys) or (may_lack and set(spec.keys).issuperset(entry)):
            return zip(spec.keys, spec.parts, [entry.get(key) for key in spec.keys], strict=True)
    elif isinstance(entry, spec.kind):
        return zip(spec.keys, spec.parts, [getattr(entry, key) for key in spec.keys], strict=True)
    _refuse(
        call.plan,
        f"must return a gradient that mirrors the structure of '{_text(path)}', {describe(spec)}; "
        f"it returned {what(entry)}. Use None for a part without a gradient",
    )


def _nothing(spec: Any) -> list[Tensor | None]:
    if spec is LEAF:
        return [None]
    return [none for part in spec.parts for none in _nothing(part)] if isinstance(spec, Node) else []


def _is_left(call: Call, path: tuple[Any, ...], spec: Any, entry: Any) -> bool:
    """Whether `entry` is left there from the argument, as by `dataclasses.replace(record, x=gradient)`."""
    if isinstance(spec, Node):
        return not leaves_in(entry, is_differentiable)
    if len(path) == 1:
        return False
    if isinstance(entry, (bool, int, float, complex, str)):
        return type(entry) is type(spec.value) and bool(entry == spec.value)
    if isinstance(entry, Tensor):
        return not leaves_in(entry, is_differentiable)
    return any([holds_value(asked.spec, entry) for asked in call.asked])


def what(value: Any) -> str:
    """What came, in a few words; never a tensor's repr."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {shape_text(value.shape)}"
    if isinstance(value, (tuple, list)):
        inside = ", ".join(what(part) for part in value[:4]) + (", ..." if len(value) > 4 else "")
        kind = type(value).__name__
        return f"{with_article(kind)} of {len(value)} ({inside})" if len(value) else f"an empty {kind}"
    if isinstance(value, dict):
        return f"{with_article(type(value).__name__)} with the keys {', '.join(map(repr, value)) or '(none)'}"
    if isinstance(value, (int, float, complex, str, bool)):
        return f"{value!r}, {with_article(type(value).__name__)}"
    return kind_of(value)


def _refuse(plan: Plan, text: str, who: str = "") -> NoReturn:
    fail(RuleResultError, f"{who}{plan.who} {text}")
