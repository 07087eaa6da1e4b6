"""A module with other tensors, or as it was: what a rule is shown."""
