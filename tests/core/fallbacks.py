"""A pytest plugin: the engine as it would be if torch dropped every private name that `_core/private` looks up.

Its files are loaded with a `getattr` and a `hasattr` of their own, which find none of them.
"""

from __future__ import annotations

import sys
from collections.abc import Generator
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType
from typing import Any

import pytest

NAME = "gradoverride._core.private"


class Loader(SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        # Without a default it is asked for a name that is there, by whatever sign of its own.
        module.__dict__["getattr"] = lambda owner, name, *default: default[0] if default else getattr(owner, name)
        module.__dict__["hasattr"] = lambda owner, name: False
        super().exec_module(module)


class Finder(PathFinder):
    @classmethod
    def find_spec(cls, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        spec = super().find_spec(fullname, path, target) if fullname.startswith(f"{NAME}.") else None
        if spec is not None and spec.origin is not None:
            spec.loader = Loader(fullname, spec.origin)
        return spec


assert NAME not in sys.modules, "this must come before the package"
sys.meta_path.insert(0, Finder())

# What is then refused.
REFUSED = (
    "in forward mode within forward mode",  # which cannot be told from forward mode in torch.func
    "does not show functions in place, such as torch.relu_, to a TorchFunctionMode",  # while Dynamo traces
    "must not be compiled inside of a checkpoint, or of other hooks on saved tensors",  # which cannot be told
    "and that cannot be looked at where it is traced",  # torch's older vmap, of torch.autograd.functional
    "Batching rule not implemented",  # the same, of gradients that are differentiated again: an error of torch's own
    "Batching rule not implemented for aten::detach",  # the same
    "it must be made outside of the code that is compiled",  # in an error of torch's own then
    "offers 'args', 'kwargs'",  # an operator of torch.library.custom_op, whose function is not known
    "is a view and is being modified inplace",  # whose it is cannot be told
    "must return each tensor that a gradient is to come back from",  # whether an input is behind it cannot be told
    "has no 'torch._dynamo.nonstrict_trace'",
    "it would not know that it is in forward mode",
    "records the forward of",  # torch.func.linearize cannot be told from make_fx, so it is warned of
)


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    """A test of what is then refused is skipped."""
    try:
        return (yield)
    except Exception as error:
        if any(text in str(error) for text in REFUSED):
            pytest.skip("refused without a private name")
        raise
