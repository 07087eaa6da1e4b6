"""Rules for forwards without a derivative: black boxes that are evaluated again, solvers whose result is implicit."""

from gradoverride.estimators.sampling import evolution, finite_difference, spsa

__all__ = [
    "finite_difference",
    "spsa",
    "evolution",
]
