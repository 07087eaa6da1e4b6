"""Group "threads": several threads through one form."""

from __future__ import annotations

import sys
import threading
from typing import Any

import torch
from oracles import accumulators, in_threads

from conformance.environment import Environment, Make
from conformance.subjects import accumulated, grads_of, loss_of, plain, run_backward

__all__ = ["ENVIRONMENTS"]


def four_threads(make: Make) -> Any:
    """Each with inputs of its own, forty times; the gradients of what they share add up."""
    subject = make()
    found: list[Any] = [None] * 4

    def run(index: int) -> None:
        for _ in range(40):
            inputs = [(leaf * (index + 1)).detach().requires_grad_() for leaf in subject.inputs]
            result = subject.call(*inputs)
            found[index] = [plain(result), torch.autograd.grad(loss_of(result), inputs)]

    held = accumulators(*subject.wanted.values())
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # or a thread is done before another one begins
    try:
        with subject.scope():
            in_threads(4, run)
    finally:
        sys.setswitchinterval(interval)
    del held
    return found


def context_here_forward_there(make: Make) -> Any:
    """The context is entered in one thread, the forward runs in a second, the backward in a third."""
    subject = make()
    results: list[Any] = []
    with subject.scope():
        in_threads(1, lambda index: results.append(subject.call(*subject.inputs)))
    in_threads(1, lambda index: loss_of(results[0]).backward())
    return plain(results[0]), accumulated(subject)


def context_there_forward_here(make: Make) -> Any:
    subject = make()
    results: list[Any] = []
    entered, done = threading.Event(), threading.Event()

    def hold(index: int) -> None:
        with subject.scope():
            entered.set()
            done.wait(20)

    def use(index: int) -> None:
        entered.wait(20)
        try:
            results.append(subject.call(*subject.inputs))
        finally:
            done.set()

    in_threads(2, lambda index: (hold, use)[index](index))
    return run_backward(subject, results[0])


def two_backwards_at_once(make: Make) -> Any:
    """Graphs that share leaves, in two threads."""
    subject = make()
    results = [subject(), subject()]
    found: list[Any] = [None, None]

    def run(index: int) -> None:
        found[index] = grads_of(loss_of(results[index]), subject.wanted)

    in_threads(2, run)
    return found


ENVIRONMENTS = [
    Environment("threads", "four threads", four_threads, quick=True),
    Environment("threads", "forward and backward in other threads", context_here_forward_there, quick=True),
    Environment("threads", "context in another thread", context_there_forward_here, needs=("override",), quick=True),
    Environment("threads", "two backwards at once", two_backwards_at_once, quick=True),
]
