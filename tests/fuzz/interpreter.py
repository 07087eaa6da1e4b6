"""What a call must give by the contract, worked out without the library.

A `Case` is one forward with its signature, one call of it, and one rule. The forward is, for the tensors `t[i]` among
its arguments (and the weight of its module) and the results `y[j]`,

    y[j] = ramp[j] * sum over i of factor(i, j) * sum(t[i] ** 2)        ramp: from 1 to 2, in the shape of y[j]

(or an argument as it stands), so that the true gradients have a closed form. The rule gives each `t[i]` a multiple of
`S = sum over j of (j + 1) * sum(grad_output[j])`, times its value where the rule asks for that, or nothing.
"""

from __future__ import annotations

import collections
import dataclasses
import typing

import torch
from torch import Tensor, nn

Pair = collections.namedtuple("Pair", ["one", "other"])


@dataclasses.dataclass
class Record:
    one: typing.Any
    other: typing.Any = None


# --- structures, walked by our own hands ---


def is_floating(value):
    return isinstance(value, Tensor) and value.is_floating_point()


def mapped(function, value):
    """`value` with `function` on each part that is no container."""
    if isinstance(value, Pair):
        return Pair(*[mapped(function, part) for part in value])
    if isinstance(value, Record):
        return Record(mapped(function, value.one), mapped(function, value.other))
    if isinstance(value, dict):
        return {key: mapped(function, part) for key, part in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)([mapped(function, part) for part in value])
    return function(value)


def parts_of(value):
    """What is no container, in order."""
    found = []
    mapped(found.append, value)
    return found


def tensors_of(value):
    """The floating tensors, in order."""
    return [part for part in parts_of(value) if is_floating(part)]


def mirrored(value, entries):
    """The structure of `value` with the next of `entries` for each floating tensor, None for all else."""
    return mapped(lambda part: next(entries) if is_floating(part) else None, value)


# --- templates of results ---


@dataclasses.dataclass(frozen=True)
class Made:
    """A new tensor of this shape."""

    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Same:
    """The floating tensor of the arguments at this place (modulo their number), as it stands."""

    place: int


def factor(i, j):
    return (1 + i + 2 * j) % 4


def ramp(shape):
    return torch.linspace(1, 2, torch.Size(shape).numel(), dtype=torch.float64).view(shape)


# --- a case ---


@dataclasses.dataclass(eq=False)
class Argument:
    """One argument of a call: an entry of its own in the answer of the rule."""

    key: str  # how it is named in a dict of gradients
    value: typing.Any
    factors: list[float | None]  # by floating tensor, the multiple of `S` that is its gradient; None stops it

    @property
    def tensors(self):
        return tensors_of(self.value)


@dataclasses.dataclass
class Case:
    header: str  # the parameters of the forward, as in its source
    names: list[str]  # of the parameters
    args: tuple
    kwargs: dict
    arguments: list[Argument]  # in signature order, those of *args each, those of **kwargs each
    variadic: str | None
    result: typing.Any  # its template
    asked: list[str]
    answer: str  # "bare", "tuple", "list", "trimmed", "dict", "vjp", "by_name"
    kind: str  # "function", "method", "override"
    weight_factor: float | str | None = "left"  # of a module's parameter; "left" to autograd
    chosen: list[bool] = dataclasses.field(default_factory=list)  # which results the loss knows
    calls: list = dataclasses.field(default_factory=list)  # what the rule was given
    spoil: typing.Callable = lambda entries: entries  # what a wrong rule makes of the entries of the arguments
    spoil_answer: typing.Callable = lambda answer: answer  # or of the answer

    def __repr__(self):
        given = ", ".join([*map(_shown, self.args), *[f"{key}={_shown(value)}" for key, value in self.kwargs.items()]])
        factors = {argument.key: argument.factors for argument in self.arguments}
        return (
            f"{self.kind} f({self.header}) called f({given}) -> {self.result}; rule asks {self.asked}, "
            f"answers {self.answer} with {factors}, weight {self.weight_factor}, loss of {self.chosen}"
        )

    @property
    def leaves_to_autograd(self):
        return self.answer in ("vjp", "by_name") or (self.is_module and self.weight_factor == "left")

    # --- the forward and the rule, as a user would write them ---

    @property
    def is_module(self):
        return self.kind != "function"

    def forward(self):
        """The forward, undecorated: a function, or a class of modules."""
        values = ", ".join(f"{name!r}: {name}" for name in self.names)
        if self.is_module:
            source = (
                "class Module(nn.Module):\n"
                "    def __init__(self):\n"
                "        super().__init__()\n"
                "        self.weight = nn.Parameter(torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64))\n"
                f"    def forward(self, {self.header}):\n"
                f"        return body({{{values}, 'the weight': self.weight}})\n"
            )
        else:
            source = f"def forward({self.header}):\n    return body({{{values}}})\n"
        namespace = {"body": self.body, "nn": nn, "torch": torch}
        exec(source, namespace)
        return namespace["Module" if self.is_module else "forward"]

    def body(self, values):
        tensors = tensors_of(list(values.values()))
        given = tensors[:-1] if self.is_module else tensors
        squares = [tensor.double().square().sum() for tensor in tensors]
        number = -1

        def made(part):
            nonlocal number
            if isinstance(part, Same):
                number += 1
                return given[part.place % len(given)]
            if isinstance(part, Made):
                number += 1
                total = sum(factor(i, number) * square for i, square in enumerate(squares))
                return ramp(part.shape) * total
            return part

        return mapped(made, self.result)

    def rule(self):
        """The rule, which notes what it is given."""
        asked = "".join(f", {name}" for name in self.asked)
        given = ", ".join(f"{name!r}: {name}" for name in self.asked)
        namespace = {"answer_of": self.answer_of}
        exec(f"def the_rule(grad_output{asked}):\n    return answer_of(grad_output, {{{given}}})\n", namespace)
        return namespace["the_rule"]

    def answer_of(self, grad_output, given):
        self.calls.append((grad_output, given))
        if self.answer in ("vjp", "by_name"):
            tripled = mapped(lambda part: 3 * part if is_floating(part) else None, grad_output)
            return given["vjp"](tripled) if self.answer == "vjp" else given["vjp"].by_name(tripled)
        total = sum_of(grad_output)
        entries = []
        for argument in self.arguments:
            grads = iter([self._gradient(argument, place, total, given) for place in range(len(argument.factors))])
            stopped = all(each is None for each in argument.factors)
            entries.append(None if stopped else mirrored(argument.value, grads))
        return self.spoil_answer(self.shaped(self.spoil(entries), total, given))

    def shaped(self, entries, total, given):
        """The entries of the arguments in the form in which this rule answers."""
        if self.answer == "bare":
            return next(entry for entry, argument in zip(entries, self.arguments, strict=True) if argument.tensors)
        if self.answer == "dict":
            answer = {}
            for argument, entry in zip(self.arguments, entries, strict=True):
                if argument.key == self.variadic:
                    answer[argument.key] = (*answer.get(argument.key, ()), entry)
                elif entry is not None:
                    answer[argument.key] = entry
            if self.weight_factor != "left":
                value = given.get("weight", torch.ones(3, dtype=torch.float64))
                answer["weight"] = None if self.weight_factor is None else self.weight_factor * total * value
            return answer
        if self.answer == "trimmed":
            wants = [any(tensor.requires_grad for tensor in argument.tensors) for argument in self.arguments]
            while len(entries) > 1 and entries[-1] is None and not wants[len(entries) - 1]:
                entries.pop()
        return entries if self.answer == "list" else tuple(entries)

    def _gradient(self, argument, place, total, given):
        if argument.factors[place] is None:
            return None
        tensor = argument.tensors[place]
        value = tensor.detach() if self._asks_for(argument) else torch.ones_like(tensor)
        if self._asks_for(argument):  # by what the rule was given, not by what we know
            asked = given[self._parameter_of(argument)]
            value = tensors_of(self._own(argument, asked))[place]
        return argument.factors[place] * total * value.double()  # cast back by the library

    def _parameter_of(self, argument):
        """The parameter of the forward that an argument belongs to."""
        return argument.key if argument.key in self.names else "kwargs"

    def _own(self, argument, value):
        """Of the value of `*args` or `**kwargs`, the part that is this argument."""
        name = self._parameter_of(argument)
        if name == "kwargs":
            return value[argument.key]
        if name == self.variadic:
            return value[[each for each in self.arguments if each.key == name].index(argument)]
        return value

    def _asks_for(self, argument):
        return self._parameter_of(argument) in self.asked

    # --- what must come of it ---

    def grad_output(self):
        """The gradient of the result, in its structure: ones where the loss knows a result, zeros where it does not."""
        chosen = iter(self.chosen)

        def grad(part):
            if isinstance(part, Same):
                tensors = [tensor for argument in self.arguments for tensor in argument.tensors]
                part = tensors[part.place % len(tensors)]
                return torch.full_like(part, 1.0 if next(chosen) else 0.0, requires_grad=False)
            if isinstance(part, Made):
                return torch.full(part.shape, 1.0 if next(chosen) else 0.0, dtype=torch.float64)
            return None

        return mapped(grad, self.result)

    def expected(self, weight=None):
        """By tensor (its id), the gradient; and that of the weight."""
        grads = tensors_of(self.grad_output())
        total = sum_of(grads)
        by_vjp = self.answer in ("vjp", "by_name")
        true = self._true_gradients(grads, weight)
        found: dict[int, Tensor | None] = {}
        number = 0
        for argument in self.arguments:
            for place, tensor in enumerate(argument.tensors):
                if by_vjp:
                    grad = 3 * true[number]
                elif argument.factors[place] is None:
                    grad = None
                else:
                    grad = argument.factors[place] * total * torch.ones_like(tensor, dtype=torch.float64)
                    if self._asks_for(argument):
                        grad = grad * tensor.detach().double()
                number += 1
                if grad is not None:
                    grad = grad.to(tensor.dtype)
                    before = found.get(id(tensor))
                    grad = grad if before is None else before + grad
                    found[id(tensor)] = grad
                else:
                    found.setdefault(id(tensor), None)
        return found, None if weight is None else self._of_weight(true[-1], total, weight)

    def _of_weight(self, true, total, weight):
        if self.answer == "by_name":
            return 3 * true
        if self.weight_factor == "left":
            return true
        if self.weight_factor is None:
            return None
        return self.weight_factor * total * (weight.detach() if "weight" in self.asked else torch.ones(3).double())

    def _true_gradients(self, grads, weight):
        tensors = [tensor.detach() for argument in self.arguments for tensor in argument.tensors]
        given = len(tensors)
        if weight is not None:
            tensors.append(weight.detach())
        templates = [part for part in parts_of(self.result) if isinstance(part, (Made, Same))]
        true = [torch.zeros_like(tensor, dtype=torch.float64) for tensor in tensors]
        for j, (template, grad) in enumerate(zip(templates, grads, strict=True)):
            if isinstance(template, Same):
                true[template.place % given] += grad
                continue
            share = (grad * ramp(template.shape)).sum()
            for i, tensor in enumerate(tensors):
                true[i] += share * factor(i, j) * 2 * tensor.double()
        return true


def sum_of(grad_output):
    return sum((j + 1) * grad.double().sum() for j, grad in enumerate(tensors_of(grad_output)))


def _shown(value):
    def one(part):
        if isinstance(part, Tensor):
            kind = f"{part.dtype}".removeprefix("torch.")
            return f"<{kind}{tuple(part.shape)}{' grad' if part.requires_grad else ''} {id(part) % 9973}>"
        return part

    return str(mapped(one, value))
