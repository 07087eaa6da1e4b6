"""The suite's tolerances, each named once, and the comparisons that use them."""

import threading

import torch

FLOAT64 = {"rtol": 1e-10, "atol": 1e-12}
FLOAT32 = {"rtol": 1e-5, "atol": 1e-6}


def exactly(actual, expected):
    """Fail unless both are equal to the last bit, in dtype and in structure (a signed zero apart)."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def closely(actual, expected):
    """Fail unless both agree as two orders of the same float64 (or float32) computation do."""
    sample = expected[0] if isinstance(expected, (tuple, list)) else expected
    tolerance = FLOAT32 if sample.dtype in (torch.float32, torch.complex64) else FLOAT64
    torch.testing.assert_close(actual, expected, **tolerance)


def float64(*values, grad=True):
    """A float64 leaf of these values."""
    return torch.tensor(values, dtype=torch.float64, requires_grad=grad)


def noise(*sizes, grad=True, dtype=torch.float64):
    """A leaf of normal noise."""
    return torch.randn(*sizes, dtype=dtype).requires_grad_(grad)


def right_or_refused(run, expected, text):
    """Fail unless `run()` gives what is expected, or raises an error with this text in it."""
    try:
        actual = run()
    except Exception as refusal:
        if text not in str(refusal):
            raise
    else:
        closely(actual, expected)


def accumulators(*owners):
    """What holds the nodes where gradients of these leaves, or of the parameters of these modules, are accumulated.

    Whoever holds it while threads use the same leaves spares torch from making them anew: there it takes a lock and
    then the GIL, and `Function.apply` of any Function takes the two the other way round (torch 2.13: a deadlock). Held
    by graphs, for a node that Python holds is asked for under the GIL too.
    """
    leaves = [leaf for owner in owners for leaf in (owner.parameters() if hasattr(owner, "parameters") else [owner])]
    return [leaf.view_as(leaf) for leaf in leaves if leaf.requires_grad]


def in_threads(count, run):
    """`run(index)` in as many threads; the first error of one is raised."""
    errors = []

    def guarded(index):
        try:
            run(index)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
