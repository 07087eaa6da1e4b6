"""Relevance by hand, for the tests of AttnLRP: the paper's rules of relevance, with an epsilon of 0."""

import torch

NEAR = {"rtol": 1e-8, "atol": 1e-10}  # of quotients by sums that nearly cancel


def near(found, expected):
    torch.testing.assert_close(found, expected, **NEAR)


def through_linear(x, weight, z, r):
    """z = x @ weight.T, perhaps with a bias, which keeps its share."""
    return x * ((r / z) @ weight)


def through_sum(a, b, r):
    return a * r / (a + b), b * r / (a + b)


def through_matmul(a, b, r):
    """Half for each: the uniform rule."""
    part = r / (2 * (a @ b))
    return a * (part @ b.mT), b * (a.mT @ part)


def through_softmax(x, s, r):
    return torch.where(s == 0, 0, x * (r - s * r.sum(-1, keepdim=True)))


def through_layer_norm(x, weight, z, r, eps=1e-5):
    """A linear layer, of the matrix that takes the mean off and divides by the deviation there is."""
    n = x.shape[-1]
    deviation = (x.var(-1, correction=0, keepdim=True) + eps).sqrt()
    center = torch.eye(n, dtype=x.dtype) - 1 / n
    return x * ((r / z * weight / deviation) @ center)


def relevance(run, *inputs, r=None):
    """What the rules give: the gradient times each input, for a relevance r of the result."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    y = run(*leaves)
    start = torch.ones_like(y) if r is None else r / y.detach()
    found = torch.autograd.grad(y, leaves, start)
    parts = [(leaf * grad).detach() for leaf, grad in zip(leaves, found, strict=True)]
    return parts[0] if len(parts) == 1 else parts
