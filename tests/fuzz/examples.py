"""How many examples, and which: the same at each run, unless one asks for more and new ones.

FUZZ=20 python -m pytest tests/fuzz      # twenty times as many, at random
"""

import os

from hypothesis import HealthCheck, settings

MORE = int(os.environ.get("FUZZ", "0"))


def examples(count, **options):
    """The settings of a test of so many examples."""
    return settings(
        max_examples=count * max(MORE, 1),
        derandomize=not MORE,
        database=None,
        deadline=None,  # the first example of a kind makes what later ones use
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
        **options,
    )
