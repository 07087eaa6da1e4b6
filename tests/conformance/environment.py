"""A column of the table, and the refusals that are right."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

from conformance.bodies import Body
from conformance.subjects import Subject

__all__ = ["REFUSALS", "Environment", "Make", "Refusal"]

Make = Callable[..., Subject]


@dataclasses.dataclass(frozen=True)
class Environment:
    """A column. `run(make)` gives what is compared, of the form and of its twin.

    `reference` is run on the twin instead where by hand it is silently wrong itself, as compiled transforms are.
    """

    group: str
    name: str
    run: Callable[[Make], Any]
    reference: Callable[[Make], Any] | None = None
    needs: tuple[str, ...] = ()
    refusals: tuple[str, ...] = ()  # keys of `REFUSALS`: what is right here besides the right gradient
    body: Body | None = None
    quick: bool = False  # in the part that `make test` runs
    tolerance: Mapping[str, float] | None = None  # instead of that of the dtype

    @property
    def id(self) -> str:
        return f"{self.group}: {self.name}"


@dataclasses.dataclass(frozen=True)
class Refusal:
    """An error or warning that names the way out, where torch gives no way to the gradient of eager mode."""

    text: str  # a regular expression
    reason: str
    source: str

    def matches(self, text: str) -> bool:
        return re.search(self.text, text, re.DOTALL) is not None


REFUSALS = {
    "in parts": Refusal(
        r"a bridge must be given plain tensors, .* of which this process has a part. Give it tensor.full_tensor\(\)",
        "arrays are made of a whole tensor, and a process has a part of it",
        "torch.distributed.tensor.DTensor",
    ),
    "overwritten": Refusal(
        r"overwrites its argument '.*' in place, and its rule .* asks for .*Ask for 'output'",
        "the rule asks for a value that the forward overwrites",
        "torch refuses a saved tensor that was written into (its version counter)",
    ),
    "of arrays": Refusal(
        r"works on NumPy arrays, so second derivatives and forward mode are not known. Write the rule with tensors",
        "a rule of NumPy arrays has no derivative that torch could know",
        "NumPy does not differentiate",
    ),
    "not linear": Refusal(
        r"must be linear in the gradient for forward mode .* Use reverse mode, or a rule that is linear",
        "forward mode is the rule transposed, and a rule that is not linear has no transpose",
        "mathematics",
    ),
    "replayed without": Refusal(
        r"torch.utils.checkpoint: .*different",
        "torch replays the block after the override was left; what it saves then is something else, and torch says so",
        "torch.utils.checkpoint compares the metadata of what is saved (use_reentrant=False)",
    ),
    "reentrant": Refusal(
        r"reentrant checkpoint",
        "torch replays the block after the override was left, and compares nothing",
        "torch.utils.checkpoint advises against use_reentrant=True",
    ),
    "arrays compiled": Refusal(
        r"it works on NumPy arrays \(gradoverride.bridge\)",
        "a graph cannot hold a function of NumPy arrays; without fullgraph it is broken there",
        "Dynamo's graph break gb0098, of torch.compiler.disable",
    ),
    "compiled twice": Refusal(
        r"double backward",
        "torch differentiates compiled code once",
        "AOTAutograd: torch.compile does not currently support double backward",
    ),
    "forward on the instance": Refusal(
        r"somebody has put another one on the instance, which would pass the override by. Override the module before",
        "a forward on the instance is called instead of that of the class",
        "nn.Module calls self.forward; accelerate leaves one there",
    ),
    "recorded": Refusal(
        r"records the forward of .* and not its rule .*[Cc]ompile with torch.compile",
        "the program holds operations of torch, and no rule; a warning says that it has the forward alone",
        "torch.export, make_fx and jit.trace look through every autograd.Function",
    ),
    "root": Refusal(
        r"must be a part of the model that torch.fx.symbolic_trace traces, .* Trace torch.nn.Sequential\(model\)",
        "a graph of torch.fx calls modules by their path in the model, and the model itself has none",
        "torch.fx.Tracer.path_of_module",
    ),
    "nothing to connect": Refusal(
        r"connect: 'inputs' must hold a tensor that requires grad, .* Call requires_grad_\(\)",
        "torch calls the function once as it stands, and there the inputs have no gradient to connect to",
        "torch.func.linearize computes the value first",
    ),
    "functions in a compiled checkpoint": Refusal(
        r"HOP: Unsafe side effect.*torch.utils.checkpoint.*skip_fwd_side_effects_in_bwd_under_checkpoint",
        "which rules are in force is noted around a call, and torch traces no note in a checkpoint, unless told to",
        "Dynamo's graph break gb0067, which names the switch",
    ),
    "vjp in compiled autograd": Refusal(
        r"torch.autograd.grad\(\) inside torch.compile is not supported when compiled autograd is enabled",
        "what was compiled asks its own graph for a gradient, which compiled autograd cannot trace",
        "Dynamo's graph break gb0373, which names the ways out",
    ),
    "surrogate in a checkpoint": Refusal(
        r"must not be compiled inside of a checkpoint, .* Compile what has the checkpoint within, or call what is",
        "the derivative of a surrogate that is any function needs torch.func, which does not run under hooks on saved "
        "tensors",
        "torch.func: it does not yet support saved tensor hooks",
    ),
    "transform of compiled": Refusal(
        r"Calling torch.func.\w+\(compiled_fn\) function from eager mode is not supported",
        "torch does not transform compiled code, ours or any",
        "pytorch issue 128711; Dynamo's graph break gb0149",
    ),
}
