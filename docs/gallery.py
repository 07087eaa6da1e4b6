"""Writes `gallery.svg` and `gallery.md`, with all surrogates at their defaults: `python docs/gallery.py`."""

from __future__ import annotations

import inspect
from pathlib import Path

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import gradoverride as go
from gradoverride import surrogates
from gradoverride.rules import heaviside

SURROGATES = [getattr(surrogates, name)() for name in surrogates.__all__ if name != "Surrogate"]
SIGNS = (surrogates.clipped, surrogates.approx_sign, surrogates.swish_sign)  # the others stand for a step from 0 to 1
REACH = {surrogates.fast_sigmoid: 0.5, surrogates.superspike: 0.1, surrogates.multi_gaussian: 5.0}
COLUMNS = 3

INTRODUCTION = """\
# Surrogates

Each stands for the derivative of a step or of a sign, which have none of use. Grey is the function as it is in the
forward, orange the gradient that it gets, blue the smooth function whose derivative that is.

![All surrogates at their defaults](gallery.svg)

```python
import torch
import gradoverride as go
from gradoverride.surrogates import atan

spike = go.straight_through(go.rules.heaviside, surrogate=atan(2.0))
go.plot_rule(spike)  # draws one of these
```

`python docs/gallery.py` draws them anew, and writes this page from their docstrings.

"""


def draw() -> Figure:
    """The picture."""
    rows = -(-len(SURROGATES) // COLUMNS)
    figure = Figure(figsize=(9, 2.1 * rows + 0.4), layout="constrained")
    panels = figure.subplots(rows, COLUMNS, squeeze=False).ravel()
    for surrogate, panel in zip(SURROGATES, panels, strict=False):
        draw_one(surrogate, panel)
    for panel in panels[len(SURROGATES) :]:
        panel.set_visible(False)
    lines = panels[0].lines
    figure.legend(lines, [line.get_label() for line in lines], loc="outside upper center", ncols=3, frameon=False)
    return figure


def draw_one(surrogate: surrogates.Surrogate, panel: Axes) -> None:
    """One surrogate, and the step or sign that it stands for."""
    step = torch.sign if isinstance(surrogate, SIGNS) else heaviside
    reach = REACH.get(type(surrogate), 1.5)
    go.plot_rule(go.straight_through(step, surrogate=surrogate), low=-reach, high=reach, points=201, ax=panel)
    panel.get_legend().remove()
    panel.set_title(str(surrogate), fontsize=9.5)
    panel.set_xlabel("")
    panel.locator_params(nbins=5)
    panel.tick_params(labelsize=8, labelcolor="#555555", color="#bbbbbb")
    panel.spines[["left", "bottom"]].set_color("#bbbbbb")
    panel.grid(alpha=0.25)
    panel.margins(x=0)


def describe() -> str:
    """The page: the picture, and what each one is."""
    return INTRODUCTION + "\n".join(map(describe_one, SURROGATES)) + "\n"


def describe_one(surrogate: surrogates.Surrogate) -> str:
    """What its docstring begins with, and its source."""
    paragraphs = [" ".join(part.split()) for part in inspect.cleandoc(type(surrogate).__doc__ or "").split("\n\n")]
    source = [part.removeprefix("Source: ") for part in paragraphs if part.startswith("Source: ")]
    return " ".join([f"- **`{surrogate}`** {paragraphs[0]}", *(f"*{part}*" for part in source)])


def write(folder: Path) -> None:
    """Both files."""
    # The same picture each time: no date, no random names; and text as text.
    with matplotlib.rc_context({"svg.hashsalt": "gallery", "svg.fonttype": "none", "font.family": "sans-serif"}):
        draw().savefig(folder / "gallery.svg", metadata={"Date": None})
    (folder / "gallery.md").write_text(describe(), encoding="utf-8")


if __name__ == "__main__":
    write(Path(__file__).parent)
