"""The only `autograd.Function`s, the nodes that they become, and what a rule runs under."""
