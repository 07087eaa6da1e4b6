"""Marks that torch puts on modules and functions, and one that this library does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

__all__ = [
    "evaluated_while_tracing",
    "ORIGINAL",
    "COMPILED_CALL",
    "COMPILED_MARKS",
    "OF_NO_MODULE",
    "FORMER_PARAMETERS",
    "RNN_WEIGHTS",
    "RNN_REFERENCES",
    "uncompiled",
    "written_as",
]

F = TypeVar("F", bound=Callable[..., Any])


def evaluated_while_tracing(fn: F) -> F:
    """`torch.compiler.assume_constant_result`, which takes 0.8 s to set this mark, for it imports all of Dynamo."""
    fn._dynamo_marked_constant = True  # type: ignore[attr-defined]  # the mark
    return fn


ORIGINAL = "_orig_mod"
"""The part of what `torch.compile(module)` gives that is `module`: it stands in the names of its parameters too."""

COMPILED_CALL = "_compiled_call_impl"
"""The attribute of a module that holds its compiled call, after `module.compile()`. If it bears another name one day,
the stand-in's call meets live parameters, and is refused as one that captured them.
"""

COMPILED_MARKS = "_torchdynamo"
"""What the attributes begin with that Dynamo puts on a function. With those under another name a wrapper is taken for
compiled itself.
"""

OF_NO_MODULE = "namedtuple_gradoverride"
"""The name of the module of generated code. Dynamo of torch 2.15 looks for one where traced code has a
`functools.wraps` of such a function; that of 2.13 imports what it finds, unless its name begins like this.
"""

FORMER_PARAMETERS = "_former_parameters"
"""The attribute of a replica of DataParallel with its parameters, which are plain attributes besides. If it bears
another name one day, a rule on a replica is refused: its forward has captured them.
"""

RNN_WEIGHTS = "_flat_weights"
"""The list of its weights that an nn.RNNBase has besides its parameters, and that its forward reads. If it bears
another name one day, each forward finds that its weights are others, and makes the list anew.
"""

RNN_REFERENCES = "_flat_weight_refs"
"""The list of weak references by which it finds that out."""


def uncompiled(module: Any) -> Any:
    """The module that `torch.compile` has made this one of, or the module itself.

    torch says nowhere which modules are such, and to import their class costs 0.8 s. If they bear other marks one day,
    they are modules like others, whose forward somebody has replaced.
    """
    made = isinstance(module, torch.nn.Module) and ORIGINAL in module._modules and "dynamo_ctx" in module.__dict__
    return module._modules[ORIGINAL] if made else module


def written_as(fn: Any) -> Any:
    """The Python function that `torch.library.custom_op` has made this operator of, or what it is itself.

    The operator has no name, place or signature. Without this it offers rules the reserved names only.
    """
    return getattr(fn, "_init_fn", fn) if type(fn).__name__ == "CustomOpDef" else fn
