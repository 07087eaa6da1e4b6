"""`make mutants`: planted defects, one at a time. Each turns at least one cell of the table red.

A defect is applied to a copy of the package in a temporary folder; then the cells that it should break are run in a new
process, against what docs/conformance.md says of them, until one differs.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


@dataclasses.dataclass(frozen=True)
class Mutant:
    """`old` becomes `new` in a file of the package. `cells`: a pattern of the ids of cells that may see it."""

    name: str
    file: str
    old: str
    new: str
    cells: str
    more: tuple[tuple[str, str], ...] = ()  # that belongs to it, in the same file


MUTANTS = [
    Mutant(
        "wrapt on the traced path: Dynamo takes the wrapper for the wrapped",
        "_core/calls/wrapper.py",
        "    plan.wrapper = wrapper\n    return wrapper\n",
        "    plan.wrapper = wrapper\n    import wrapt\n\n    made = wrapper\n"
        "    return wrapt.FunctionWrapper(original, lambda wrapped, self, args, kwargs: made(*args, **kwargs))\n",
        "compile: inside a compiled parent / custom_backward",
    ),
    Mutant(
        "an attribute of the context instead of save_for_backward",
        "_core/calls/short_function.py",
        "ctx.save_for_backward({', '.join(saves)})",
        "ctx.kept = ({', '.join(saves)},)",
        "autograd: second backward without retain_graph / custom_backward$",
        (("}, = ctx.saved_tensors", "}, = ctx.kept"),),
    ),
    Mutant(
        "no stand-in for self: the forward meets the live parameters",
        "_core/calls/forward_pass.py",
        "            inner = stand_in(module, tensors, copied, seen=seen)\n",
        "            inner = module\n",
        "call: eager / (class with|method)",
    ),
    Mutant(
        "a missing detach: a parameter that is returned becomes the output of the node",
        "_core/autograd/function.py",
        "has_memory_alone(tensor)\n    alias = tensor.detach()\n",
        "has_memory_alone(tensor)\n    alias = tensor\n",
        "(call: result is a parameter|autograd: accumulation)",
    ),
    Mutant(
        "what the forward wrote into is not marked dirty",
        "_core/autograd/function.py",
        "    if call.dirty:\n",
        "    if False:\n",
        "call: in-place forward",
    ),
    Mutant(
        "compiled code passes the override by",
        "_core/overriding/overridden_class.py",
        "        if record is None:\n            return base",
        "        if record is None or compiling():\n            return base",
        "compile: aot_eager / override by",
    ),
    Mutant(
        "no recipe for pickles of overridden modules",
        "_core/overriding/overridden_class.py",
        '        "__reduce_ex__": __reduce_ex__,\n',
        "",
        "copies: pickle / override",
    ),
    Mutant(
        "the class of an overridden module is not put back",
        "_core/overriding/overridden.py",
        "            _derive(module, overridden(base), base, record.tally.copied)\n",
        "            pass\n",
        "wraps: (exception|removal)",
    ),
    Mutant(
        "nested overrides in the wrong order",
        "_core/overriding/chain.py",
        "enumerate(found.rules, 1)",
        "enumerate(reversed(found.rules), 1)",
        "call: eager / two nested",
    ),
    Mutant(
        "a rule that is not linear is transposed all the same",
        "_core/calls/forward_mode.py",
        "    _check_linear(gradients, (first, second), answers, roundings, who)\n",
        "",
        "transforms: jvp / override by glob",
    ),
    Mutant(
        "nothing is required of a rule that is compiled in forward mode",
        "_core/calls/forward_mode.py",
        "        require_in_graph(plain, text)\n",
        "        pass\n",
        "compile: compile\\(jvp\\) / override by glob",
    ),
    Mutant(
        "compiled transforms are let through",
        "_core/calls/forward_pass.py",
        "    if mode != TRACED or not transformed_while_tracing():\n        return False\n",
        "    return False\n",
        "compile: compile\\((func|vmap\\(g)",
    ),
    Mutant(
        "no rule for vmap",
        "_core/autograd/function.py",
        "    generate_vmap_rule = True\n\n    @staticmethod\n    def forward(call: Any",
        "    generate_vmap_rule = False\n\n    @staticmethod\n    def forward(call: Any",
        "transforms: vmap / custom_backward",
    ),
    Mutant(
        "autocast is not restored for the rule",
        "_core/calls/backward_pass.py",
        "            with call.autocast.restored():\n",
        "            if True:\n",
        "transforms: autocast / class with",
    ),
    Mutant(
        "the kept graph is freed by the first question",
        "_core/graph/kept_graph.py",
        "        keep = again or not last or keeps_graph()\n",
        "        keep = False\n",
        "autograd: retain_graph",
    ),
    Mutant(
        "the derivative of a kept graph is cut off",
        "_core/graph/kept_graph.py",
        "        if not again:\n            return found\n",
        "        return [grad.detach() if grad is not None else None for grad in found]\n",
        "autograd: create_graph",
    ),
    Mutant(
        "what an override saves is not marked",
        "_core/overriding/chain.py",
        "            plan.on_trace, plan.marked = on_trace, True\n",
        "            plan.on_trace, plan.marked = on_trace, False\n",
        "transforms: checkpoint, replayed outside",
    ),
    Mutant(
        "a reentrant checkpoint is not noticed",
        "_core/in_force/tally.py",
        "        return self.awaited > recorded or self.foreseen == recorded",
        "        return False",
        "transforms: reentrant checkpoint, replayed outside",
    ),
    Mutant(
        "tracers go unnoticed",
        "_core/calls/tracers.py",
        "    if torch.compiler.is_dynamo_compiling():\n        return EXPORT if exporting() else None\n",
        "    if values is not None:\n        return None\n",
        "export: (torch.export|fx.symbolic_trace) /",
    ),
    Mutant(
        "parameters that the rule leaves to autograd get nothing",
        "_core/calls/forward_pass.py",
        "        call.flows = [out.requires_grad for out in outs] if natural else [False] * len(outs)\n",
        "        call.flows = [False] * len(outs)\n",
        "call: result is a parameter / method",
    ),
    Mutant(
        "what is in force in a thread belongs to all threads",
        "_core/autograd/ambient.py",
        "class _Here(threading.local):\n",
        "class _Here:\n",
        "threads: ",
    ),
    Mutant(
        "what a thread has is not there from the start: Dynamo guards it",
        "_core/autograd/ambient.py",
        "        # By their marks: in the body of a higher-order operator Dynamo lets what is noted be changed and put "
        "back if it\n"
        "        # is a constant.\n"
        "        self.active: tuple[str, ...] = ()  # rules of functions, entered by the modules around\n"
        "        self.quiet: tuple[str, ...] = ()  # of these, not to be applied here\n"
        "        self.layers: tuple[FunctionLayer, ...] = ()  # whose calls are counted\n"
        "        self.modes: tuple[TorchFunctionMode, ...] = ()  # that these modules have entered, and the thread\n",
        "        pass\n\n    active = quiet = layers = modes = ()\n",
        "compile: (aot_eager|inside a compiled parent|override after .*|graph break .*) / override by function",
    ),
    Mutant(
        "the kept graph hangs on an attribute of a saved tensor, where hooks give back another",
        "_core/private/tensors.py",
        "    return _hooks is not None and _hooks(True) is None\n",
        "    return True\n",
        "autograd: saved_tensors_hooks / custom_backward with vjp",
    ),
    Mutant(
        "the gradients of two arguments are exchanged",
        "_core/calls/short_function.py",
        """return {none}{', '.join(grads)}\"]""",
        """return {none}{', '.join(reversed(grads))}\"]""",
        "call: eager / custom_backward$",
    ),
]

RUN = """
import re, sys
sys.path.insert(0, {tests!r})
import gradoverride
assert gradoverride.__file__.startswith({folder!r}), gradoverride.__file__
from conformance import report
from conformance.table import CELLS, outcome_of
committed = report.committed()
for cell in CELLS:
    if re.search({pattern!r}, cell.id) and cell.environment.group != "device":
        outcome = outcome_of(cell)
        if outcome.verdict != committed.get(cell.id):
            print("red:", cell.id, "|", (outcome.text.strip() or outcome.verdict).splitlines()[0][:120])
            sys.exit(1)
"""


def is_caught(mutant: Mutant) -> str | None:
    """The first cell that turned red, or None."""
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "gradoverride"
        shutil.copytree(ROOT / "gradoverride", package)
        path = package / mutant.file
        text = path.read_text()
        for old, new in ((mutant.old, mutant.new), *mutant.more):
            if text.count(old) != 1:
                return f"NOT APPLIED: {old.strip()!r} is {text.count(old)} times in {mutant.file}"
            text = text.replace(old, new)
        path.write_text(text)
        code = RUN.format(tests=str(ROOT / "tests"), folder=str(Path(folder).resolve()), pattern=mutant.cells)
        environment = {**os.environ, "PYTHONPATH": folder}
        run = subprocess.run(
            [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
        if run.returncode == 0:
            return None
        found = re.search(r"^red: (.*)", run.stdout, re.MULTILINE)
        # A defect that breaks the import of the forms is caught too.
        return found[1] if found else (run.stderr.strip().splitlines() or ["?"])[-1][:160]


def main() -> int:
    pattern = sys.argv[1] if len(sys.argv) > 1 else ""
    missed = 0
    for mutant in MUTANTS:
        if not re.search(pattern, mutant.name):
            continue
        caught = is_caught(mutant)
        missed += caught is None or caught.startswith("NOT APPLIED")
        print(
            f"{'MISSED' if caught is None else 'caught'}  {mutant.name}\n        {caught or 'by no cell'}", flush=True
        )
    print(f"{len(MUTANTS)} defects, {missed} missed")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
