"""Networks that cannot be differentiated learn to read handwritten digits: `python -m gradoverride demo`.

Every layer makes its inputs binary and rounds its weights to four levels. The derivative of both is zero, so
that nothing is learnt. Four networks differ in their backward alone; the forward is the same in all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import gradoverride as go

# ---------------------------------------------------------------------- functions without a useful derivative


def binarize(x: Tensor) -> Tensor:
    """+1 or -1: the sign, which here is never 0."""
    return torch.ones_like(x).copysign(x)


def four_levels(weights: Tensor) -> Tensor:
    """Each weight rounded to -3, -1, 1 or 3: two bits."""
    return (2 * weights.floor() + 1).clamp(-3, 3)


# ---------------------------------------------------------------------- the same functions with a gradient

binarize_straight = go.straight_through(binarize)
binarize_tanh = go.straight_through(binarize, surrogate=torch.tanh)
four_levels_straight = go.straight_through(four_levels)


# ---------------------------------------------------------------------- layers


class BinaryLayer(nn.Module):
    """A linear layer of binary inputs and four-level weights."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        binarize: Callable[[Tensor], Tensor] = binarize,
        quantize: Callable[[Tensor], Tensor] = four_levels,
    ) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.randn(inputs, outputs))
        self.scale = 0.5 * inputs**-0.5
        self.binarize = binarize
        self.quantize = quantize

    def forward(self, x: Tensor) -> Tensor:
        return self.binarize(x) @ self.quantize(self.weights) * self.scale


@go.custom_backward
class LayerWithCustomGrad(nn.Module):
    """The same layer, which says itself what its weights and its input receive."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.randn(inputs, outputs))
        self.scale = 0.5 * inputs**-0.5

    def forward(self, x: Tensor) -> Tensor:
        return binarize(x) @ four_levels(self.weights) * self.scale

    def backward(self, grad_output: Tensor, x: Tensor) -> Tensor:
        grad_sum = grad_output * self.scale
        self.weights.grad = binarize(x).T @ grad_sum
        return grad_sum @ four_levels(self.weights).T * (x.abs() < 1)


Layer = Callable[[int, int], nn.Module]

AS_IT_STANDS = "as it stands"
LAYERS: dict[str, Layer] = {
    AS_IT_STANDS: BinaryLayer,
    "straight_through": partial(BinaryLayer, binarize=binarize_straight, quantize=four_levels_straight),
    "surrogate=tanh": partial(BinaryLayer, binarize=binarize_tanh, quantize=four_levels_straight),
    "own backward": LayerWithCustomGrad,
}

# ---------------------------------------------------------------------- training


class Digits(NamedTuple):
    """Images of 8 x 8 pixels between -1 and 1, as rows, and the digit that each shows."""

    train_images: Tensor
    test_images: Tensor
    train_labels: Tensor
    test_labels: Tensor


def read_digits() -> Digits:
    """The 1797 handwritten digits that come with scikit-learn, a quarter of them kept for the test."""
    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images / 8 - 1, labels, test_size=0.25, stratify=labels, random_state=0)
    train_images, test_images, train_labels, test_labels = map(torch.tensor, parts)
    return Digits(train_images.float(), test_images.float(), train_labels, test_labels)


def build(layer: Layer, seed: int) -> nn.Module:
    """A network of three layers; with the same seed, the same weights whatever the layer."""
    torch.manual_seed(seed)
    return nn.Sequential(layer(64, 128), layer(128, 128), layer(128, 10))


def gradient_norm(network: nn.Module, digits: Digits) -> float:
    """How large the gradient of the loss is over all weights."""
    loss = F.cross_entropy(network(digits.train_images), digits.train_labels)
    grads = torch.autograd.grad(loss, list(network.parameters()))
    return torch.cat([grad.flatten() for grad in grads]).norm().item()


def train(network: nn.Module, digits: Digits, epochs: int) -> Iterator[float]:
    """Trains, and yields the test accuracy: first before, then after each epoch."""
    yield accuracy(network, digits)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for batch in torch.randperm(len(digits.train_images)).split(64):
            loss = F.cross_entropy(network(digits.train_images[batch]), digits.train_labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
        yield accuracy(network, digits)


@torch.no_grad()
def accuracy(network: nn.Module, digits: Digits) -> float:
    """The fraction of the test images that the network reads rightly."""
    return (network(digits.test_images).argmax(1) == digits.test_labels).double().mean().item()


# ---------------------------------------------------------------------- what came of it


class Result(NamedTuple):
    """One kind of layer: the norm of its first gradient, and its test accuracies as (seed, epoch + 1)."""

    gradient: float
    accuracies: Tensor

    @property
    def final(self) -> float:
        """The accuracy at the end, in the mean over the seeds."""
        return self.accuracies[:, -1].mean().item()


def run(digits: Digits, epochs: int, seeds: int, console: Console) -> dict[str, Result]:
    """Trains a network per kind of layer and seed, behind one progress bar per kind."""
    columns = TextColumn("{task.description:<18}"), BarColumn(), TextColumn("{task.fields[accuracy]:6.1%}")
    results = {}
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        for name, layer in LAYERS.items():
            bar = progress.add_task(name, total=seeds * (epochs + 1), accuracy=0.0)
            curves: list[list[float]] = []
            for seed in range(seeds):
                curves.append([])
                for value in train(build(layer, seed), digits, epochs):
                    curves[-1].append(value)
                    progress.update(bar, advance=1, accuracy=value)
            results[name] = Result(gradient_norm(build(layer, seed=0), digits), torch.tensor(curves))
    return results


def overrides_helped(accuracies: dict[str, float], margin: float = 0.5) -> bool:
    """Whether each network with an override is better by `margin` than the one without.

    >>> overrides_helped({"as it stands": 0.1, "straight_through": 0.9})
    True
    """
    stuck = accuracies[AS_IT_STANDS]
    return all(value >= stuck + margin for name, value in accuracies.items() if name != AS_IT_STANDS)


def tabulate(results: dict[str, Result]) -> Table:
    """The table that the demo ends with."""
    seeds, points = next(iter(results.values())).accuracies.shape
    after = f"after {points - 1} epochs" + (f", mean of {seeds} seeds" if seeds > 1 else "")
    table = Table(title=f"Digits read rightly {after}", title_justify="left")
    table.add_column("backward")
    table.add_column("first gradient", justify="right")
    table.add_column("test accuracy", justify="right")
    for name, result in results.items():
        style = "red" if name == AS_IT_STANDS else "green"
        table.add_row(name, f"{result.gradient:.3f}", f"{result.final:.1%}", style=style)
    return table


COLORS = dict(zip(LAYERS, ["#c0392b", "#e69f00", "#0072b2", "#009e73"], strict=True))


def draw(results: dict[str, Result]) -> Figure:
    """The learning curves; beside them one layer's forward and the gradients that it sends back."""
    figure = Figure(figsize=(11, 5), layout="constrained")
    axes = figure.subplot_mosaic([["curves", "forward"], ["curves", "gradient"]], width_ratios=[3, 2])
    draw_curves(axes["curves"], results)
    draw_layer(axes["forward"], axes["gradient"])
    for panel in axes.values():
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.25)
    return figure


def draw_curves(axes: Axes, results: dict[str, Result]) -> None:
    """Test accuracy by epoch: the mean of the seeds, and the range between the worst and the best."""
    for name, result in results.items():
        color, percent = COLORS[name], 100 * result.accuracies
        epochs = range(percent.shape[1])
        axes.plot(epochs, percent.mean(0), color=color, linewidth=2, label=f"{name}: {result.final:.1%}")
        axes.fill_between(epochs, percent.amin(0), percent.amax(0), color=color, alpha=0.15, linewidth=0)
    axes.axhline(10, color="gray", linestyle=":", label="chance: 10%")
    axes.set(title="The same forward, four backwards", ylim=(0, 100))
    axes.set(xlabel="epoch", ylabel="test accuracy (%)")
    axes.legend(loc="center right", frameon=False)


def draw_layer(forward: Axes, gradient: Axes) -> None:
    """A layer of one input and one weight: what it computes, and the gradient that reaches its input."""
    for name, layer in LAYERS.items():
        x = torch.linspace(-2, 2, 402).unsqueeze(1).requires_grad_()
        probe = layer(1, 1)
        nn.init.constant_(probe.get_parameter("weights"), 0.5)  # of the level 1
        y = probe(x) / probe.scale
        (grad_x,) = torch.autograd.grad(y.sum(), x)
        forward.plot(x.detach(), y.detach(), color="black")
        width = 5 if grad_x.unique().numel() == 1 else 2  # a constant stays visible beneath the others
        gradient.plot(x.detach(), grad_x, color=COLORS[name], linewidth=width, solid_capstyle="butt")
    forward.set(title="Forward: binarize(x)", yticks=[-1, 0, 1])
    forward.sharex(gradient)
    forward.tick_params(labelbottom=False)
    gradient.set(title="Backward: the gradient that reaches x", yticks=[0, 0.5, 1], ylim=(-0.1, 1.15))
    gradient.set_xlabel("x")


# ---------------------------------------------------------------------- the main job


def main(quick: bool, output: Path) -> int:
    """Runs the demo and returns its exit status: 0 if every override did what it is for."""
    console = Console()
    epochs, seeds = (10, 1) if quick else (30, 3)
    results = run(read_digits(), epochs, seeds, console)
    console.print()
    console.print(tabulate(results))
    draw(results).savefig(output, format="png", dpi=150)
    console.print(f"Figure: {output}")
    if overrides_helped({name: result.final for name, result in results.items()}):
        return 0
    console.print("[red]An override did not beat the network without one clearly.[/]")
    return 1
