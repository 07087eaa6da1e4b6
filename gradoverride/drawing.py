"""`show_graph`: the backward graph, drawn.

graphviz is run as the program that it is (`dot`): the packages that wrap it need it too, and add nothing that is
wanted here. Where it is not installed there is Mermaid text, which GitHub, JupyterLab and many editors draw.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from gradoverride._core.autograd.nodes import leaf_of, rule_of
from gradoverride._core.binding.contract import shape_text, what
from gradoverride._core.binding.signature import name_of
from gradoverride._core.doors.connection import ends_of_connections
from gradoverride._core.doors.edited_result import edits_of
from gradoverride._core.private.tensors import results_of
from gradoverride._core.values.structure import leaves_in
from gradoverride._core.values.tensors import is_tensor
from gradoverride.errors import DrawingError, GraphError

__all__ = ["DrawnEdge", "DrawnNode", "GraphDrawing", "show_graph"]


def show_graph(root: Any, params: nn.Module | Mapping[str, Tensor] | None = None) -> GraphDrawing:
    """A picture of the graph behind `root`, along which gradients flow: from the result on, down to the leaves.

    >>> import torch, gradoverride as go
    >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> loss = go.edit_gradient(x * 3, torch.neg).sum()
    >>> print(go.show_graph(loss, {"x": x}))
    flowchart TD
      n0(["result"])
      n1["SumBackward0"]
      n2["edit_gradient<br>backward: neg"]:::edited
      n3["MulBackward0"]
      n4(["x<br>(2,)"]):::leaf
      n0 -->|"()"| n1
      n1 -->|"(2,)"| n2
      n2 -->|"(2,)"| n3
      n3 -->|"(2,)"| n4
      classDef leaf fill:#dbe9f6,stroke:#5b87b2
      classDef overridden fill:#fde0b8,stroke:#c77700,stroke-width:2px
      classDef edited fill:#dcefd8,stroke:#3f8f3a,stroke-width:2px

    A notebook shows it: as SVG where graphviz is installed (the program `dot`), as Mermaid otherwise. `save(path)`
    writes it, `svg`, `dot` and `mermaid` are its texts.

    On each edge is the shape of the gradient that goes there. What has a backward of this library bears the user's
    name and that of the rule; what is edited (`edit_gradient`, `edit_gradient_`) is marked; a connection that was made
    afterwards (`connect_`) is a dashed edge. `root`: a tensor, any structure of them, or a node. `params` names
    tensors: a model, or a dict of leaves and what is between.

    Raises `GraphError` if `root` has no graph; `svg` and `save` raise `DrawingError` without graphviz.
    """
    return _Drawing(params).of(root)


@dataclass(frozen=True)
class DrawnNode:
    """A node of the graph in a picture. `kind`: "result", "operation" or "leaf"."""

    name: str
    kind: str
    rule: str = ""  # the name of the rule that is its backward, where that is of this library
    edits: tuple[str, ...] = ()  # the names of the rules by which its gradient is edited
    is_edit: bool = False  # an `edit_gradient`
    shape: str = ""  # of a leaf

    @property
    def lines(self) -> list[str]:
        """What stands in its box."""
        backward = [f"backward: {self.rule}"] if self.rule else []
        edited = [f"edited: {', '.join(self.edits)}"] if self.edits else []
        return [self.name, *([self.shape] if self.shape else []), *backward, *edited]

    @property
    def look(self) -> str:
        """How it is marked."""
        if self.is_edit or self.edits:
            return "edited"
        return "overridden" if self.rule else self.kind


@dataclass(frozen=True)
class DrawnEdge:
    """A way that a gradient goes, between two nodes of a picture by their numbers."""

    start: int
    end: int
    label: str  # the shape of the gradient, with the tensor's name if it has one
    connected: bool = False  # afterwards, by `connect_`


@dataclass(frozen=True)
class GraphDrawing:
    """A picture of a graph. It holds no tensors."""

    nodes: tuple[DrawnNode, ...]
    edges: tuple[DrawnEdge, ...]

    @property
    def mermaid(self) -> str:
        """The picture as a Mermaid flowchart."""
        return "\n".join(["flowchart TD", *(f"  {line}" for line in self._mermaid_lines())])

    @property
    def dot(self) -> str:
        """The picture in the language of graphviz."""
        return "\n".join(["digraph {", *(f"  {line}" for line in self._dot_lines()), "}"])

    @property
    def svg(self) -> str:
        """The picture as SVG, drawn by graphviz."""
        text = self._drawn("svg").decode()
        return text[text.index("<svg") :]  # as a part of a page it must not begin with a prolog

    def save(self, path: str | Path) -> None:
        """Write the picture, as the suffix says: `.svg`, `.png`, `.pdf`, `.gv` (graphviz) or `.mmd` (Mermaid)."""
        path = Path(path)
        if path.suffix in (".svg", ".png", ".pdf"):
            path.write_bytes(self._drawn(path.suffix[1:]))
        elif path.suffix in (".gv", ".mmd"):
            path.write_text((self.dot if path.suffix == ".gv" else self.mermaid) + "\n", encoding="utf-8")
        else:
            raise DrawingError(
                f"show_graph: a picture is saved as .svg, .png, .pdf, .gv or .mmd; got '{path.name}'. Give it one of "
                "these suffixes"
            )

    def __str__(self) -> str:
        return self.mermaid

    def __repr__(self) -> str:
        marked = [node.look for node in self.nodes]
        counts = [f"{marked.count(look)} {look}" for look in ("overridden", "edited") if look in marked]
        return f"GraphDrawing({', '.join([f'{len(self.nodes)} nodes', *counts])})"

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, str]:
        if shutil.which("dot"):
            return {"image/svg+xml": self.svg, "text/plain": repr(self)}
        return {"text/vnd.mermaid": self.mermaid, "text/plain": self.mermaid}

    # --- how it is written ---

    def _mermaid_lines(self) -> Iterator[str]:
        for number, node in enumerate(self.nodes):
            text = "<br>".join([_in_mermaid(line) for line in node.lines])
            box = f'["{text}"]' if node.kind == "operation" else f'(["{text}"])'
            yield f"n{number}{box}{f':::{node.look}' if node.look in _LOOKS else ''}"
        for edge in self.edges:
            yield f'n{edge.start} {"-.->" if edge.connected else "-->"}|"{_in_mermaid(edge.label)}"| n{edge.end}'
        for look, (fill, line, width) in _LOOKS.items():
            yield f"classDef {look} fill:{fill},stroke:{line}{f',stroke-width:{width}px' if width > 1 else ''}"

    def _dot_lines(self) -> Iterator[str]:
        yield 'bgcolor="white" nodesep=0.25 ranksep=0.3'
        yield 'node [shape=box style="filled,rounded" fillcolor="#f4f4f4" color="#999999" fontname="Helvetica,Arial"'
        yield '      fontsize=11 height=0.3 margin="0.12,0.05"]'
        yield 'edge [color="#777777" fontcolor="#555555" fontname="Helvetica,Arial" fontsize=9 arrowsize=0.6]'
        for number, node in enumerate(self.nodes):
            fill, line, width = _LOOKS.get(node.look, ("#f4f4f4", "#999999", 1))
            look = f' fillcolor="{fill}" color="{line}" penwidth={width}' if node.look in _LOOKS else ""
            shape = "" if node.kind == "operation" else ' shape=ellipse margin="0.02,0.01"'
            yield f"n{number} [label={_in_dot(node.lines)}{shape}{look}]"
        for edge in self.edges:
            dashed = ' style=dashed color="#c77700" penwidth=1.5 minlen=2' if edge.connected else ""
            yield f"n{edge.start} -> n{edge.end} [label={_in_dot([f' {edge.label}'])}{dashed}]"

    def _drawn(self, kind: str) -> bytes:
        program = shutil.which("dot")
        if program is None:
            raise DrawingError(
                f"show_graph: graphviz draws the picture as {kind}, and its program 'dot' is not installed. Install "
                "graphviz (apt, brew, conda), or take the Mermaid text: str(), .mermaid, save('graph.mmd')"
            )
        try:
            ran = subprocess.run(
                [program, f"-T{kind}"], input=self.dot.encode(), capture_output=True, check=False, timeout=_PATIENCE
            )
        except subprocess.TimeoutExpired:
            raise DrawingError(
                f"show_graph: graphviz has not drawn the {len(self.nodes)} nodes within {_PATIENCE} s. Draw a part: "
                "show_graph(find_nodes(loss, ...)[0]); or take its text: .dot"
            ) from None
        if ran.returncode:
            raise DrawingError(f"show_graph: graphviz failed: {ran.stderr.decode(errors='replace').strip()}")
        return ran.stdout


_LOOKS = {  # fill, line, width
    "leaf": ("#dbe9f6", "#5b87b2", 1),
    "overridden": ("#fde0b8", "#c77700", 2),
    "edited": ("#dcefd8", "#3f8f3a", 2),
}
_PATIENCE = 60


def _in_mermaid(text: str) -> str:
    """What stands between quotes there. A name may be `<lambda>`."""
    return text.replace("#", "#35;").replace('"', "#quot;").replace("<", "#lt;").replace(">", "#gt;")


def _in_dot(lines: list[str]) -> str:
    escaped = [line.replace("\\", "\\\\").replace('"', '\\"') for line in lines]
    return '"' + "\\n".join(escaped) + '"'


# --- the graph as it is ---


class _Drawing:
    """A picture while it is made."""

    def __init__(self, params: Any) -> None:
        self.names: dict[tuple[Node, int], str] = {}  # of results of nodes
        self.nodes: list[DrawnNode] = []
        self.edges: list[DrawnEdge] = []
        self.numbers: dict[Node, int] = {}
        for name, tensor in _named(params):
            if tensor.requires_grad:
                edge = get_gradient_edge(tensor)
                key = edge.node, edge.output_nr
                self.names[key] = f"{self.names[key]}, {name}" if key in self.names else name

    def of(self, root: Any) -> GraphDrawing:
        starts = _starts(root)
        for index, start in enumerate(starts):
            if isinstance(start, GradientEdge):
                self.nodes.append(DrawnNode("result" if len(starts) == 1 else f"result {index}", "result"))
        results = len(self.nodes)
        for start in starts:
            self._add_behind(start.node if isinstance(start, GradientEdge) else start)
        for index, start in enumerate(starts[:results]):
            self._add_edge(index, start.node, start.output_nr)
        for node, number in self.numbers.items():
            for following, index in node.next_functions:
                if following is not None:
                    self._add_edge(number, following, index)
            for end in _connected(node):
                self._add_edge(number, end.node, end.output_nr, connected=True)
        return GraphDrawing(tuple(self.nodes), tuple(self.edges))

    def _add_behind(self, start: Node) -> None:
        queue = [start]
        for node in queue:  # which grows
            if node not in self.numbers:
                self.numbers[node] = len(self.nodes)
                self.nodes.append(self._drawn(node))
                queue += [following for following, _ in node.next_functions if following is not None]
                queue += [end.node for end in _connected(node)]

    def _drawn(self, node: Node) -> DrawnNode:
        edits = _edits_of(node)
        leaf = leaf_of(node)
        if leaf is not None:
            kind = "parameter" if isinstance(leaf, nn.Parameter) else "leaf"
            return DrawnNode(self.names.get((node, 0), kind), "leaf", edits=edits, shape=shape_text(leaf.shape))
        rule, is_edit = rule_of(node)
        name = node.name().rpartition("::")[2]
        if rule is None:
            return DrawnNode(name, "operation", edits=edits)
        return DrawnNode(name.removesuffix("Backward"), "operation", name_of(rule), edits, is_edit)

    def _add_edge(self, start: int, node: Node, index: int, connected: bool = False) -> None:
        results = results_of(node)
        label = "" if results is None else shape_text(results[index][0])
        if results is not None and len(results) > 1:
            label = f"[{index}] {label}"
        name = self.names.get((node, index), "") if leaf_of(node) is None else ""
        self.edges.append(DrawnEdge(start, self.numbers[node], f"{name} {label}".strip(), connected))


def _starts(root: Any) -> list[Any]:
    if isinstance(root, Node):
        return [root]
    tensors = leaves_in(root, is_tensor)
    starts = [get_gradient_edge(tensor) for tensor in tensors if tensor.requires_grad]
    if not starts:
        none = " that requires no grad" if isinstance(root, Tensor) else ""
        raise GraphError(
            f"show_graph: 'root' must be a tensor with a graph, a structure that holds one, or a node; got "
            f"{what(root)}{none}"
        )
    return starts


def _named(params: Any) -> Iterator[tuple[str, Tensor]]:
    if params is None:
        return
    if isinstance(params, nn.Module):
        yield from params.named_parameters(remove_duplicate=False)
        return
    if not isinstance(params, Mapping):
        raise GraphError(f"show_graph: 'params' must be a model, or a dict of tensors by name; got {what(params)}")
    for name, tensor in params.items():
        if not isinstance(tensor, Tensor):
            raise GraphError(f"show_graph: 'params' must hold tensors by name; '{name}' is {what(tensor)}")
        yield str(name), tensor


def _connected(node: Node) -> list[GradientEdge]:
    leaf = leaf_of(node)
    return [] if leaf is None else ends_of_connections(leaf)


def _edits_of(node: Node) -> tuple[str, ...]:
    """The names of the rules by which gradients of `node` are edited: `[1] clip` where it is that of one of several."""
    results = results_of(node) or ()
    places: dict[int, list[int]] = {}
    rules = {}
    for index, rule in edits_of(node):
        places.setdefault(id(rule), []).append(index)
        rules[id(rule)] = rule
    return tuple(
        [
            " ".join([*(f"[{index}]" for index in found if len(found) < len(results)), name_of(rules[key])])
            for key, found in places.items()
        ]
    )
