"""The gradient without the rule, behind `vjp`; and what leads out of a graph to something else."""
