"""Rules for forwards without a derivative: black boxes that are evaluated again, solvers whose result is implicit.

A forward must return a floating tensor, or there is nothing that a gradient could come from: `ForwardResultError`.
"""

from gradoverride.estimators.combinatorial import blackbox, imle, perturbed
from gradoverride.estimators.implicit import fixed_point, implicit_root
from gradoverride.estimators.sampling import evolution, finite_difference, spsa

__all__ = [
    "finite_difference",
    "spsa",
    "evolution",
    "blackbox",
    "perturbed",
    "imle",
    "implicit_root",
    "fixed_point",
]
