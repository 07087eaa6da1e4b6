"""The command line: `python -m gradoverride demo`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

DEMO_PACKAGES = {"matplotlib", "numpy", "rich", "sklearn"}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status."""
    options = parser().parse_args(argv)
    try:
        from gradoverride import demo
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in DEMO_PACKAGES:
            raise
        print(f'The demo needs {package}: pip install "gradoverride[demo]"', file=sys.stderr)
        return 2
    return demo.main(options.quick, options.output)


def parser() -> argparse.ArgumentParser:
    """The commands and their options."""
    top = argparse.ArgumentParser(prog="python -m gradoverride", description="Override gradients in PyTorch.")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    demo = commands.add_parser(
        "demo",
        help="train networks that cannot be differentiated, with and without overrides",
        description="Trains networks of binary inputs and four-level weights on handwritten digits: as they "
        "stand, and with three overrides. The exit status is 1 if an override did not help clearly.",
    )
    demo.add_argument("--quick", action="store_true", help="fewer epochs and one seed")
    demo.add_argument(
        "--output",
        type=figure_path,
        default=Path("gradoverride-demo.png"),
        metavar="FILE.png",
        help="where the figure goes (default: %(default)s)",
    )
    return top


def figure_path(text: str) -> Path:
    """The path, if its folder exists: better to learn that before the networks are trained."""
    path = Path(text)
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {path.parent}")
    return path


if __name__ == "__main__":
    sys.exit(main())
