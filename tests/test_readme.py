"""The README's Python blocks run, in order and in one namespace, and print what their `# ->` comments say."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def namespace():
    return {"__name__": "readme"}


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.splitlines()[0])
def test_block_prints_what_it_says(block, namespace, capsys):
    promised = re.findall(r"# -> (.*)$", block, flags=re.MULTILINE)
    exec(compile(block, "README.md", "exec"), namespace)
    assert capsys.readouterr().out.splitlines() == promised


def test_every_block_promises_something():
    assert BLOCKS
    assert all("# -> " in block for block in BLOCKS)


@pytest.mark.parametrize("decorator", ["go.straight_through", "go.custom_backward("])
def test_the_opening_examples_have_eight_lines_besides_the_imports(decorator):
    block = next(block for block in BLOCKS if decorator in block)
    lines = [line for line in block.splitlines() if line and not line.startswith("import")]
    assert len(lines) <= 8
