"""A part of the suite without the private names of torch: `parts.py`."""

from core import parts


def test_part_of_the_suite_passes_without_the_private_names_of_torch():
    parts.check(2)
