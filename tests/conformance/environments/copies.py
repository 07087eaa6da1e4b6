"""Group "copies": what a copy has, and what is left behind."""

from __future__ import annotations

import atexit
import copy
import functools
import gc
import io
import multiprocessing
import pickle
import weakref
from typing import Any

import torch

from conformance.environment import Environment, Make
from conformance.environments.call import eager
from conformance.subjects import Subject, leaves_of, loss_of, run_backward

__all__ = ["ENVIRONMENTS"]


def of_copy(make: Make, duplicate: Any) -> Any:
    """The copy has its own weights, twice those of the original; it is used when the override has been left."""
    subject = make()
    assert subject.module is not None
    with subject.scope():
        other = duplicate(subject.module)
        subject.call(*subject.inputs)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter *= 2
    found = run_backward(Subject(other, subject.inputs, other))
    return found, [parameter.grad for parameter in subject.parameters.values()]


def deepcopied(make: Make) -> Any:
    return of_copy(make, copy.deepcopy)


def copied(make: Make) -> Any:
    """A shallow copy shares parameters, unless they are replaced, and parts, which have their overrides themselves."""
    subject = make()
    module: Any = subject.module
    with subject.scope():
        other = copy.copy(module)
        other._parameters = {name: torch.nn.Parameter(2 * p.detach()) for name, p in other._parameters.items()}
        found = run_backward(Subject(other, subject.inputs, other))
        subject.call(*subject.inputs)  # an override of which nothing was called says so
    return found, [parameter.grad for parameter in module._parameters.values()]


def pickled(make: Make) -> Any:
    return of_copy(make, lambda module: pickle.loads(pickle.dumps(module)))


def saved(make: Make) -> Any:
    def through_file(module: Any) -> Any:
        file = io.BytesIO()
        torch.save(module, file)
        file.seek(0)
        return torch.load(file, weights_only=False)

    return of_copy(make, through_file)


def pickled_function(make: Make) -> Any:
    subject = make()
    subject.call = pickle.loads(pickle.dumps(copy.deepcopy(subject.call)))
    return run_backward(subject)


def state_dict_keys(make: Make) -> Any:
    subject = make()
    assert subject.module is not None
    with subject.scope():
        subject.call(*subject.inputs)
        state = subject.module.state_dict()
        subject.module.load_state_dict({name: 2 * value for name, value in state.items()})
    return list(state), run_backward(subject)


def replicated(make: Make) -> Any:
    """As DataParallel makes them: parameters as plain attributes that lead to the original's."""
    subject = make()
    module = subject.module
    assert module is not None
    with subject.scope():
        other = replica_of(module)
        result = other(*subject.inputs)
    return run_backward(subject, result)


def replica_of(module: Any) -> Any:
    """What `replicate` does for one device, which need not be one of CUDA."""
    replicas = {one: one._replicate_for_data_parallel() for one in module.modules()}
    for one, replica in replicas.items():
        for name, child in one._modules.items():
            replica._modules[name] = replicas[child]
        replica._former_parameters = {name: parameter * 1 for name, parameter in one._parameters.items()}
        for name, parameter in replica._former_parameters.items():
            setattr(replica, name, parameter)
    return replicas[module]


def in_another_process(make: Make) -> Any:
    subject = make()
    with subject.scope():
        sent = pickle.dumps((subject.module or subject.call, [leaf.detach() for leaf in subject.inputs]))
        subject.call(*subject.inputs)
    return other_process().apply(gradients_there, (sent,))


@functools.cache
def other_process() -> Any:
    """One for all cells: it takes seconds to start."""
    pool = multiprocessing.get_context("spawn").Pool(1)
    atexit.register(pool.terminate)
    return pool


def in_this_process(make: Make) -> Any:
    return as_numbers(run_backward(make()))


def gradients_there(sent: bytes) -> Any:
    call, inputs = pickle.loads(sent)
    module = call if isinstance(call, torch.nn.Module) else None
    return as_numbers(run_backward(Subject(call, tuple([leaf.requires_grad_() for leaf in inputs]), module)))


def as_numbers(found: Any) -> Any:
    return {name: value if value is None else value.numpy().round(9).tolist() for name, value in found.items()}


def released(make: Make) -> Any:
    """Nothing waits for the garbage collector, neither what was saved nor the module."""
    gc.disable()
    try:
        subject = make()
        first, *rest = subject.inputs
        inner = first * 2
        result = subject(inner, *rest)
        watched = [weakref.ref(one) for one in (inner, result, *leaves_of(result))]
        loss_of(result).backward()
        subject.inputs = ()
        del inner, result
        gone = [reference() is None for reference in watched]
        if subject.module is not None:
            module = weakref.ref(subject.module)
            del subject
            gone.append(module() is None)
        return gone
    finally:
        gc.enable()


ENVIRONMENTS = [
    Environment("copies", "deepcopy", deepcopied, needs=("module",), quick=True),
    Environment("copies", "copy.copy", copied, needs=("module",), quick=True),
    Environment("copies", "pickle", pickled, deepcopied, needs=("module",), quick=True),
    Environment("copies", "torch.save and load", saved, deepcopied, needs=("module",), quick=True),
    Environment("copies", "a function pickled by reference", pickled_function, eager, needs=("function",), quick=True),
    Environment("copies", "keys of state_dict", state_dict_keys, needs=("module",), quick=True),
    Environment("copies", "replica of DataParallel", replicated, needs=("module",), quick=True),
    Environment("copies", "another process (spawn)", in_another_process, in_this_process),
    Environment("copies", "released without gc", released, quick=True),
]
