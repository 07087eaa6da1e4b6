"""A forward and its rule, and a call of them: the short path and the general one."""
