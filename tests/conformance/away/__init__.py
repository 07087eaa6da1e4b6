"""`torch.device("away")`: a device that is not the CPU, for machines that have none. What it is, `device.cpp` says.

away.load()  # for the rest of the process, in which it is the accelerator
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import subprocess
import types
from pathlib import Path

import torch
from torch.utils import cpp_extension

__all__ = ["NAME", "build", "load"]

NAME = "away"
SOURCE = Path(__file__).parent / "device.cpp"


def build() -> Path:
    """The library, compiled for this torch if nobody has done so."""
    text = SOURCE.read_bytes() + torch.__version__.encode()
    library = SOURCE.parent / "build" / f"{hashlib.sha256(text).hexdigest()[:16]}.so"
    if not library.exists():
        library.parent.mkdir(exist_ok=True)
        made = library.with_suffix(f".{os.getpid()}")
        command = [cpp_extension.get_cxx_compiler(), "-shared", "-fPIC", "-O0", "-std=c++20", str(SOURCE)]
        command += [f"-I{path}" for path in cpp_extension.include_paths()]
        command += [f"-L{path}" for path in cpp_extension.library_paths()]
        subprocess.run([*command, "-ltorch_cpu", "-lc10", "-o", str(made)], check=True)
        made.rename(library)
    return library


def load() -> None:
    """Make the device one that torch knows."""
    torch.utils.rename_privateuse1_backend(NAME)
    torch._register_device_module(NAME, _module())
    torch.utils.generate_methods_for_privateuse1_backend()
    torch.ops.load_library(build())


def _module() -> types.ModuleType:
    """`torch.away`, with what torch asks the module of a device for."""
    module = types.ModuleType(f"torch.{NAME}")
    functions = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_is_in_bad_fork": lambda: False,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "device": lambda device=0: contextlib.nullcontext(),
        "synchronize": lambda device=None: None,
        "get_amp_supported_dtype": lambda: [torch.float16, torch.bfloat16],
        "get_rng_state": _rng_state,
        "set_rng_state": _set_rng_state,
        "manual_seed_all": lambda seed: _set_rng_state(torch.Generator().manual_seed(seed).get_state()),
    }
    vars(module).update(functions, _initialized=True)
    return module


# Generators of torch keep their states from transforms.
def _rng_state(device: int = 0) -> torch.Tensor:
    with torch._C._DisableFuncTorch():
        return torch.ops.away.rng_state()


def _set_rng_state(state: torch.Tensor, device: int = 0) -> None:
    with torch._C._DisableFuncTorch():
        torch.ops.away.set_rng_state(state)
