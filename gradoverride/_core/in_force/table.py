"""What is overridden, in words: a table in a terminal, and in a notebook one of HTML."""

from __future__ import annotations

import html
from typing import NamedTuple

from gradoverride._core.in_force.layers import Layer

__all__ = ["EVERYWHERE", "Row", "Table", "row_of"]

EVERYWHERE = "(everywhere)"


class Row(NamedTuple):
    """One rule on one module, in words."""

    path: str
    cls: str
    target: str
    rule: str
    calls: str


class Table(list[Row]):
    """Rows that print as a table, in a notebook as one of HTML."""

    heads = Row("module", "class", "target that won", "rule", "calls")

    def __str__(self) -> str:
        if not self:
            return "nothing is overridden"
        lines = [self.heads, *self]
        widths = [max(len(line[column]) for line in lines) for column in range(len(self.heads))]
        padded = [[text.ljust(width) for text, width in zip(line, widths, strict=True)] for line in lines]
        return "\n".join("  ".join(line).rstrip() for line in padded)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        rows = "".join(_cells(row, "td") for row in self)
        return f"<table>{_cells(self.heads, 'th')}{rows}</table>"


def _cells(row: Row, tag: str) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(text)}</{tag}>" for text in row) + "</tr>"


def row_of(path: str, cls: str, layer: Layer) -> Row:
    calls = layer.known_calls
    said = "compiled" if calls is None else str(calls)
    return Row(path or "(the model)", cls, layer.target, layer.rule.who, said)
