"""Registries by name: what other packages publish. Contract, section 5."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn

import gradoverride as go


def install(folder, name, entries, source):
    """A package as an installer leaves it: its code, and what it publishes."""
    (folder / f"{name}.py").write_text(textwrap.dedent(source))
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    lines = [f"{key} = {value}" for key, value in entries.items()]
    (info / "entry_points.txt").write_text("\n".join(["[gradoverride.registries]", *lines, ""]))


SOURCE = """
    from torch import nn
    import gradoverride as go

    registry = go.Registry("doubling")

    @registry.register(nn.ReLU)
    def double(grad_output, vjp):
        return 2 * vjp(grad_output)

    mapping = {nn.ReLU: double}
    number = 3
"""
ENTRIES = {
    "doubling": "thirdparty_rules:registry",
    "of_a_mapping": "thirdparty_rules:mapping",
    "of_a_number": "thirdparty_rules:number",
    "of_nothing": "thirdparty_rules:nothing",
    "guided_backprop": "thirdparty_rules:registry",
}


@pytest.fixture
def package(tmp_path, monkeypatch):
    install(tmp_path, "thirdparty_rules", ENTRIES, SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("thirdparty_rules", None)


USE = """
    import torch
    import gradoverride as go

    model = torch.nn.Sequential(torch.nn.ReLU())
    x = torch.ones(2, requires_grad=True)
    with go.override(model, "{name}"):
        model(x).sum().backward()
    assert x.grad.tolist() == [2.0, 2.0], x.grad
"""


@pytest.mark.parametrize("name", ["doubling", "of_a_mapping"])
def test_a_registry_of_another_package_is_given_by_its_name(package, name):
    code = f"import sys; sys.path.insert(0, {str(package)!r})\n" + textwrap.dedent(USE.format(name=name))
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize(
    ("name", "error", "text"),
    [
        ("dubling", go.TargetNotFoundError, r"under the name 'dubling'.*'doubling'.*Did you mean 'doubling'\?"),
        ("of_a_number", go.TargetError, r"'thirdparty_rules' publishes as 'of_a_number' must be a Registry.*is an int"),
        ("of_nothing", go.TargetError, r"'of_nothing' of 'thirdparty_rules' must be at 'thirdparty_rules:nothing'"),
        ("guided_backprop", go.TargetError, r"one package alone must publish.*'gradoverride'"),
    ],
)
def test_what_is_wrong_is_told(name, error, text):
    with pytest.raises(error, match=text):
        go.override(nn.ReLU(), name)


@pytest.mark.parametrize("name", ["guided_backprop", "deconvnet", "epsilon_plus", "epsilon_alpha2_beta1"])
def test_the_presets_are_published(name):
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    with go.override(model, name) as plan:
        model(torch.ones(2, requires_grad=True)).sum().backward()
        assert "1" in [row.calls for row in plan.table if row.cls == "ReLU"]


def test_a_package_that_is_installed_after_a_first_look_is_found(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(go.TargetNotFoundError, match="must be published under the name 'late'"):
        go.override(nn.ReLU(), "late")
    install(tmp_path, "late_rules", {"late": "late_rules:registry"}, SOURCE)
    later = tmp_path.stat().st_mtime_ns + 10**9  # a file system may keep times by some milliseconds alone
    os.utime(tmp_path, ns=(later, later))
    with go.override(model := nn.ReLU(), "late"):
        x = torch.ones(2, requires_grad=True)
        assert torch.autograd.grad(model(x).sum(), x)[0].tolist() == [2, 2]
    sys.modules.pop("late_rules")
