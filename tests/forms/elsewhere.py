"""What forwards in other files call: an engine that reads one file alone does not see what they do."""

import numpy as np
from torch import nn
from torch.nn import functional as F

import gradoverride as go

NUMBERS = np.arange(1.0, 4.0)


def doubled_if_a_gradient_is_wanted(x):
    return sum([x, x]) if x.requires_grad else x * 5


def handed_on(x):
    return doubled_if_a_gradient_is_wanted(x)


class Doubling:
    def __call__(self, x):
        return self.doubled(x)

    def double_data(self, x):
        return double_data(x)

    def doubled(self, x):
        return handed_on(x)


class Part(nn.Module):
    def forward(self, x):
        return sum([x, x]) if getattr(x, "requires_grad") else x * 5  # noqa: B009  # as some code reads it


def put(module, grad):
    module.weight.grad = grad


def pass_within(weight, x):
    (weight * x).sum().backward()


def mask_of(module):
    return module.mask


class Reader:
    def __init__(self, module):
        self.module = module

    def read(self):
        return vars(self.module)["mask"]


def keep(module, x):
    module.mask = x > 1.5


def step_of(x):
    return getattr(x, "step", 1.0)


def double_data(x):
    x.data = 2 * x.data
    return 3 * x


def normalized(x, mean, var):
    return F.batch_norm(x, mean, var, training=True)


def with_mask(x):
    return go.save_for_backward(x * 1, mask=x > 1.5)


def charge(module, x):
    module.potential = x if module.potential is None else module.potential / 2 + x
