"""What forwards in other files call: an engine that reads one file alone does not see what they do."""

from torch import nn


def doubled_if_a_gradient_is_wanted(x):
    return sum([x, x]) if x.requires_grad else x * 5


def handed_on(x):
    return doubled_if_a_gradient_is_wanted(x)


class Doubling:
    def __call__(self, x):
        return self.doubled(x)

    def doubled(self, x):
        return handed_on(x)


class Part(nn.Module):
    def forward(self, x):
        return sum([x, x]) if getattr(x, "requires_grad") else x * 5  # noqa: B009  # as some code reads it
