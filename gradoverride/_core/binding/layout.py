"""How the values of a call stand for the parameters of the forward: the same for all calls of one form."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, NoReturn

import torch

from gradoverride._core.binding.signature import POSITIONAL, Forward
from gradoverride._core.private.dynamo import as_dynamo_hands_on
from gradoverride._core.private.marks import evaluated_while_tracing
from gradoverride.errors import UnsupportedError

__all__ = ["Layout", "Layouts"]


class Layout:
    """How the values of one call stand for the parameters of the forward: static but for `*args` and `**kwargs`.

    `given`: how many values were given by position, and the names of those that were given by keyword, where the
    forward is to be called in the same way.
    """

    __slots__ = ("given", "groups", "key", "keywords", "names", "positional", "variadic")

    def __init__(
        self,
        names: Sequence[str],
        keywords: Sequence[str],
        variadic: str | None,
        extra: int,
        given: tuple[int, tuple[str, ...]] | None,
    ) -> None:
        self.key = extra, tuple(keywords), given
        self.positional = len(names) + extra
        self.keywords = tuple(keywords)
        self.variadic = variadic
        self.names = (*names, *(f"{variadic}[{i}]" for i in range(extra)), *keywords)
        # By parameter name, the indices of its values, in order: all of `*args` belong to one name.
        self.groups: dict[str, tuple[int, ...]] = {name: (index,) for index, name in enumerate(names)}
        if variadic is not None:
            self.groups[variadic] = tuple(range(len(names), self.positional))
        self.groups.update({name: (self.positional + index,) for index, name in enumerate(keywords)})
        self.given: tuple[int, list[tuple[str, int]]] | None = None
        if given is not None:
            self.given = given[0], [(name, self.groups[name][0]) for name in given[1]]


class Layouts:
    """The layouts of the calls of one forward."""

    def __init__(self, forward: Forward) -> None:
        self.forward = forward
        self.found: dict[Any, Layout] = {}
        self._own_signature = inspect.Signature(forward.parameters) if forward.as_given else None

    def of(self, extra: int, keywords: tuple[str, ...], given: tuple[int, tuple[str, ...]] | None = None) -> Layout:
        """The layout of a call with this many values for `*args` and these names."""
        if torch.compiler.is_dynamo_compiling():  # which traces no new entry inside of a checkpoint
            kept: Layout = getattr(self, self._kept_layout(extra, keywords, given))
            return kept
        key = (extra, keywords, given)
        found = self.found.get(key)
        if found is None:
            parameters = self.forward.parameters or ()
            names = [p.name for p in parameters if p.kind in POSITIONAL]
            variadic = next((p.name for p in parameters if p.kind is p.VAR_POSITIONAL), None)
            if self.forward.parameters is None:
                variadic = "args"
            for name in keywords:
                if name in names or name == variadic:
                    self._refuse_twice(name)
            found = self.found[key] = Layout(names, keywords, variadic, extra, given)
        return found

    def _refuse_twice(self, name: str) -> NoReturn:
        text = (
            f"{self.forward.who} must have a name for each argument, for a rule to tell them apart; it has a parameter "
            f"'{name}' that takes no keyword, and was given another '{name}' by keyword. Rename one of them"
        )
        raise as_dynamo_hands_on(UnsupportedError(text))  # layouts are made while it evaluates

    @evaluated_while_tracing
    def _kept_layout(self, extra: int, keywords: tuple[str, ...], given: tuple[int, tuple[str, ...]] | None) -> str:
        """The attribute under which a layout is kept: Dynamo needs a place to know an object by."""
        layout = self.of(extra, keywords, given)
        name = f"layout_{[*self.found].index((extra, keywords, given))}"
        setattr(self, name, layout)
        return name

    def taken_apart(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Layout, list[Any]]:
        """The layout of a call as its caller made it, and its values. Raises a TypeError as any call does."""
        assert self._own_signature is not None, "a forward of another kind is called by position"
        bound = self._own_signature.bind(*args, **kwargs)
        bound.apply_defaults()
        positional: list[Any] = []
        keywords: dict[str, Any] = {}
        extra = 0
        for name, parameter in self._own_signature.parameters.items():
            value = bound.arguments[name]
            if parameter.kind is parameter.VAR_POSITIONAL:
                positional += value
                extra = len(value)
            elif parameter.kind is parameter.VAR_KEYWORD:
                keywords.update(value)
            elif parameter.kind is parameter.KEYWORD_ONLY:
                keywords[name] = value
            else:
                positional.append(value)
        layout = self.of(extra, tuple(keywords), (len(args), tuple(kwargs)))
        return layout, [*positional, *keywords.values()]
