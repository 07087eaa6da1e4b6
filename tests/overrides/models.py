"""Models and rules that the tests of overrides share."""

import torch
from torch import nn


def guided(grad_output, vjp):
    return vjp(grad_output.clamp(min=0))


def doubled(grad_output, vjp):
    return 2 * vjp(grad_output)


def tripled(grad_output, vjp):
    return 3 * vjp(grad_output)


def negated(grad_output):
    return -grad_output


class Branching(nn.Module):
    """`h + relu(h)`, keyword arguments and a dict as the result."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.relu = nn.ReLU()

    def forward(self, x, *, scale=1.0):
        hidden = self.linear(x)
        return {"hidden": hidden, "sum": hidden + scale * self.relu(hidden)}


def mlp():
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(3, 4), nn.ReLU(), nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True)), nn.Linear(4, 2)
    ).double()


def gradient(model, x, *, weights=None):
    """The gradient of `x` for a sum of the result with fixed weights."""
    x = x.detach().requires_grad_()
    result = model(x)
    result = result["sum"] if isinstance(result, dict) else result
    weights = torch.linspace(-1, 1, result.numel(), dtype=result.dtype).view_as(result) if weights is None else weights
    (found,) = torch.autograd.grad((result * weights).sum(), x)
    return found


class RuleByHand(torch.autograd.Function):
    """Guided ReLU as one writes it by hand."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.relu()

    @staticmethod
    def backward(ctx, grad_output):
        (x,) = ctx.saved_tensors
        return grad_output.clamp(min=0) * (x > 0)


class GuidedByHand(nn.Module):
    def forward(self, x):
        return RuleByHand.apply(x)


def guided_by_hand(model):
    """A copy of `model` with hand-written guided ReLUs in place of its own."""
    import copy

    model = copy.deepcopy(model)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.ReLU):
                setattr(module, name, GuidedByHand())
    return model
