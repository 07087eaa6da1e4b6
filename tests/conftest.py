"""What every test starts from: the same random numbers, and little that others have left in the process."""

import gc

import pytest
import torch

# Imported, to look for doctests, it would change the engine for all tests.
collect_ignore = ["core/fallbacks.py"]

# The collector goes through all that torch holds, again and again: a quarter of the time of tests that compile.
gc.set_threshold(200_000, 20, 100)


def pytest_collection_modifyitems(items):
    """What looks at all that there is comes first: later that is what compilers leave in the process."""
    items.sort(key=lambda item: not _looks_at_all(item.path))


def _looks_at_all(path):
    """An override looks for what refers to a function; a soak counts objects."""
    if path.stem in ("test_soak", "test_memory"):
        return True
    return "overrides" in path.parts and path.stem not in ("test_compile", "test_presets")


@pytest.fixture(autouse=True)
def same_random_numbers():
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="module")
def nothing_is_left_to_the_collector():
    """What a file has left goes with it: who looks for what refers to a function goes through all that there is."""
    yield
    gc.collect()


@pytest.fixture
def fresh_compiler():
    """Dynamo knows nothing before, and nothing is left of what it has compiled."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()
