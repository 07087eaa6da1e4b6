"""What an override costs, against the same written by hand: `python -m benchmarks`."""
