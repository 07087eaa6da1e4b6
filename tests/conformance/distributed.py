"""The distributed part of the table: each form in each way of torch to spread a model over two processes (gloo).

One pair of processes runs all cells, for starting one takes longer than a hundred cells. The reference of a cell is
computed here, in one process, from the same model by hand: the mean over the ranks for data parallelism, the whole for
tensor and pipeline parallelism.

    outcomes = run(folder)            # {cell: Outcome}
"""

from __future__ import annotations

import dataclasses
import os
import traceback
import warnings
from collections import OrderedDict
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from oracles import closely
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, ScheduleInterleavedZeroBubble
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import gradoverride as go
from conformance import processes
from conformance.distributed_forms import FORMS, Form, LinearThen, Net
from conformance.environment import REFUSALS
from conformance.table import Outcome

RANKS = 2
PATIENCE = 20  # seconds that a rank waits for the other
LIMIT = 480  # seconds for all cells: what takes longer hangs

_kept = []  # models: the destructor of DDP may wait for ever for a thread that wants the GIL


# --- a cell ---


@dataclasses.dataclass(frozen=True, eq=False)
class Environment:
    """A column: how the model is spread, and how often it runs."""

    name: str
    run: Callable[[Build, int], dict]
    batches: int = 1
    is_data_parallel: bool = True  # each rank has its own batch
    model: dict = dataclasses.field(default_factory=dict)  # options of `Net`
    skips: tuple[str, ...] = ()  # forms that are not for it: see `reason_left_out`
    has_argument: bool = True

    @property
    def id(self):
        return f"distributed: {self.name}"


@dataclasses.dataclass(frozen=True, eq=False)
class Cell:
    form: Form
    environment: Environment
    first: str  # what comes first, the override or the wrap

    @property
    def id(self):
        order = f", {self.first} first" if self.form.rules else ""
        return f"{self.form.name} / {self.environment.name}{order}"


class Build:
    """The model of a cell, spread by `wrap`, with the overrides of its form before or after."""

    def __init__(self, cell: Cell):
        self.cell = cell

    def spread(self, wrap, model=None):
        cell = self.cell
        model = Net(cell.form.middle(), **cell.environment.model) if model is None else model
        if cell.form.rules and cell.first == "override":
            cell.form.override(model)
        wrapped = wrap(model)
        if cell.form.rules and cell.first == "wrap":
            cell.form.override(wrapped)
        _kept.append(wrapped)
        return model, wrapped

    def batches(self, rank):
        return [
            inputs(rank if self.cell.environment.is_data_parallel else 0, index)
            for index in range(self.cell.environment.batches)
        ]


def inputs(rank, index, rows=4):
    generator = torch.Generator().manual_seed(10 * rank + index)
    return torch.randn(rows, 6, dtype=torch.float64, generator=generator)


def loss_of(result):
    weights = torch.linspace(-1, 1, result.numel(), dtype=result.dtype).view_as(result)
    return (result * weights).sum()


def gradients(model, x=None):
    """Whole gradients by name, without what a wrap puts before the names."""
    found = {} if x is None else {"argument": x.grad}
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        found[name.removeprefix("module.")] = grad.full_tensor() if isinstance(grad, DTensor) else grad
    return {name: None if grad is None else grad.detach().clone() for name, grad in found.items()}


# --- data parallelism ---


def ddp(build, rank, *, no_sync=False, spare=False, compiled=False, **options):
    def wrap(model):
        parallel = DistributedDataParallel(model, **options)
        return _compiled(parallel) if compiled else parallel

    model, parallel = build.spread(wrap)
    batches = build.batches(rank)
    for index, x in enumerate(batches):
        x.requires_grad_()
        synchronised = index == len(batches) - 1 or not no_sync
        with nullcontext() if synchronised else parallel.no_sync():
            loss_of(parallel(x, rank == 0) if spare else parallel(x)).backward()
    return gradients(model, batches[-1])


def fsdp(build, rank, *, parts=(), accumulate=False, compiled=False, **options):
    def shard(model):
        mesh = init_device_mesh("cpu", (RANKS,))
        for part in parts:
            fully_shard(model.get_submodule(part), mesh=mesh, **options)
        sharded = fully_shard(model, mesh=mesh, **options)
        return _compiled(sharded) if compiled else sharded

    model, sharded = build.spread(shard)
    batches = build.batches(rank)
    for index, x in enumerate(batches):
        x.requires_grad_()
        if accumulate:
            sharded.set_requires_gradient_sync(index == len(batches) - 1)
        loss_of(sharded(x)).backward()
    return gradients(model, batches[-1])


def _compiled(model):
    torch.compiler.reset()  # each cell has a model of the same code
    return torch.compile(model, backend="aot_eager")


# --- tensor parallelism ---


def tensor_parallel(build, rank, *, plan):
    """`plan` has the layout of `middle`, or of the linear layer in it."""

    def parallelize(model):
        linear = "middle.linear" if isinstance(model.middle, LinearThen) else "middle"
        styles = {linear if name == "middle" else name: style for name, style in plan().items()}
        return parallelize_module(model, init_device_mesh("cpu", (RANKS,)), styles)

    model, parallel = build.spread(parallelize)
    (x,) = build.batches(rank)
    x.requires_grad_()
    loss_of(parallel(x)).backward()
    return gradients(model, x)


def by_columns():
    """`middle` gives each rank some of its columns, as plain tensors, which `last` puts together."""
    return {"middle": ColwiseParallel(), "last": RowwiseParallel()}


def by_rows():
    """`first` gives each rank some of its columns, which `middle` puts together."""
    return {"first": ColwiseParallel(), "middle": RowwiseParallel()}


def by_columns_as_dtensor():
    """What `middle` gives is a DTensor."""
    return {
        "middle": ColwiseParallel(use_local_output=False),
        "last": RowwiseParallel(input_layouts=Shard(-1)),
    }


# --- pipeline ---


def pipeline(build, rank, *, schedule, stages):
    """The stages go to the ranks in turn; four micro-batches."""
    cell = build.cell
    whole = Net(cell.form.middle(), **cell.environment.model)
    _kept.append(whole)
    parts = {index: _stage(whole, names) for index, names in enumerate(stages) if index % RANKS == rank}
    overridden = [part for part in parts.values() if cell.form.rules and hasattr(part, "middle")]
    if cell.first == "override":
        for part in overridden:
            cell.form.override(part)
    made = [PipelineStage(part, index, len(stages), torch.device("cpu")) for index, part in parts.items()]
    if cell.first == "wrap":
        for part in overridden:
            cell.form.override(part)
    single = len(stages) == RANKS
    run = schedule(made[0] if single else made, n_microbatches=4, loss_fn=_loss_of_target, scale_grads=False)
    (x,) = build.batches(rank)
    if rank == 0:
        run.step(x)
    else:
        run.step(target=torch.linspace(-1, 1, 16, dtype=torch.float64).view(4, 4))
    return {name: grad for part in parts.values() for name, grad in gradients(part).items()}


def _stage(whole, names):
    return nn.Sequential(
        OrderedDict({name: nn.Tanh() if name == "tanh" else whole.get_submodule(name) for name in names})
    )


def _loss_of_target(result, target):
    return (result * target).sum()


TWO_STAGES = [("first", "tanh", "middle"), ("last",)]
FOUR_STAGES = [("first",), ("tanh", "middle", "third"), ("fourth",), ("last",)]


_tensor_parallel = partial(Environment, is_data_parallel=False)
_pipeline = partial(Environment, is_data_parallel=False, has_argument=False)

ENVIRONMENTS = [
    _tensor_parallel("tensor parallel, by columns", partial(tensor_parallel, plan=by_columns)),
    _tensor_parallel("tensor parallel, by rows", partial(tensor_parallel, plan=by_rows)),
    _tensor_parallel("tensor parallel, DTensors between", partial(tensor_parallel, plan=by_columns_as_dtensor)),
    _pipeline("pipeline, GPipe", partial(pipeline, schedule=ScheduleGPipe, stages=TWO_STAGES)),
    _pipeline("pipeline, 1F1B", partial(pipeline, schedule=Schedule1F1B, stages=TWO_STAGES)),
    _pipeline(
        "pipeline, zero bubble",
        partial(pipeline, schedule=ScheduleInterleavedZeroBubble, stages=FOUR_STAGES),
        model={"deep": True},
        skips=("custom_backward on forward, a parameter stopped",),
    ),
    Environment("FSDP2, the whole", fsdp),
    Environment("FSDP2, parts", partial(fsdp, parts=("first", "middle"))),
    Environment("FSDP2, kept whole between", partial(fsdp, parts=("middle",), reshard_after_forward=False)),
    Environment("FSDP2, accumulated", partial(fsdp, parts=("middle",), accumulate=True), batches=2),
    Environment("FSDP2, checkpointed", partial(fsdp, parts=("middle",)), model={"checkpointed": True}),
    Environment("FSDP2, compiled", partial(fsdp, parts=("first", "middle"), compiled=True)),
    Environment("DDP", ddp),
    Environment("DDP, no_sync", partial(ddp, no_sync=True), batches=2),
    Environment(
        "DDP, find_unused_parameters", partial(ddp, spare=True, find_unused_parameters=True), model={"spare": True}
    ),
    Environment("DDP, static_graph", partial(ddp, static_graph=True), batches=3),
    Environment("DDP, compiled", partial(ddp, compiled=True)),
    Environment("DDP, checkpointed", partial(ddp, static_graph=True), batches=2, model={"checkpointed": True}),
]
CELLS = [
    Cell(form, environment, first)
    for environment in ENVIRONMENTS
    for form in FORMS
    if form.name not in environment.skips
    for first in (("override", "wrap") if form.rules else ("override",))
]

# What torch gives no way to: a key of `REFUSALS`.
REFUSED = {("bridge", "tensor parallel, DTensors between"): "in parts"}


def reason_left_out(form: Form, environment: Environment) -> str:
    """Why a column does not apply to a form; empty if it does."""
    return "torch asks there for a gradient of each parameter, by hand too" if form.name in environment.skips else ""


# --- the reference ---


def expected(cell: Cell) -> list[dict]:
    """By rank, what the model by hand gives in one process."""
    environment = cell.environment
    by_rank = [_by_hand(cell, rank) for rank in range(RANKS)]
    if not environment.is_data_parallel:
        return by_rank
    means = {name: _mean([grads[name] for grads in by_rank]) for name in by_rank[0] if name != "argument"}
    return [{"argument": grads["argument"], **means} for grads in by_rank]


def _by_hand(cell, rank):
    environment = cell.environment
    model = Net(cell.form.by_hand(), **environment.model)
    for x in Build(cell).batches(rank):
        x.requires_grad_()
        loss_of(model(x, rank == 0) if environment.model.get("spare") else model(x)).backward()
    return gradients(model, x if environment.has_argument else None)


def _mean(grads):
    """What a rank does not use counts as zero."""
    given = [grad for grad in grads if grad is not None]
    return sum(given) / RANKS if given else None


# --- the run ---


def run(folder, cells=CELLS, limit=LIMIT) -> dict[Cell, Outcome]:
    """What became of each cell."""
    found = processes.run(_rank, RANKS, folder, limit, [cell.id for cell in cells], str(folder))
    return {cell: _verdict(cell, [by_name.get(cell.id) for by_name in found]) for cell in cells}


def _rank(rank, write, names, folder):
    torch.set_num_threads(1)
    warnings.simplefilter("error", go.GradOverrideWarning)
    store = dist.FileStore(f"{folder}/store", RANKS)
    dist.init_process_group("gloo", rank=rank, world_size=RANKS, store=store, timeout=timedelta(seconds=PATIENCE))
    for cell in CELLS:
        if cell.id not in names:
            continue
        try:
            result = cell.environment.run(Build(cell), rank)
        except Exception as error:
            result = f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
        write(cell.id, result)
        # Ranks that are not at the same place would wait for each other in vain.
        store.set(f"{cell.id}/{rank}", "error" if isinstance(result, str) else "done")
        if len({store.get(f"{cell.id}/{other}") for other in range(RANKS)}) > 1:
            break
    dist.barrier()
    os._exit(0)  # see `_kept`


def _verdict(cell, results):
    for rank, result in enumerate(results):
        if result is None:
            return Outcome("fails", f"rank {rank} has not come to it, or hangs")
        if isinstance(result, str):
            key = REFUSED.get((cell.form.name, cell.environment.name))
            known = key is not None and result.startswith("UnsupportedError") and REFUSALS[key].matches(result)
            return Outcome(f"refused: {key}" if known else "fails", result)
    for rank, (found, wanted) in enumerate(zip(results, expected(cell), strict=True)):
        for name, grad in found.items():
            want = wanted[name]
            if grad is None or want is None:
                if not _is_zero(grad) or not _is_zero(want):
                    return Outcome("fails", f"the gradient of '{name}' on rank {rank}")
                continue
            try:
                closely(grad, want)
            except AssertionError as error:
                return Outcome("fails", f"the gradient of '{name}' on rank {rank}: {error}")
    missing = set(expected(cell)[0]) - set().union(*results)
    return Outcome("fails", f"no gradient of {missing}") if missing else Outcome("right")


def _is_zero(grad):
    return grad is None or not grad.any()
