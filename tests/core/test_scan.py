"""What the code of a rule tells: wrong here is a check left out where it is needed."""

import pytest
import torch

import gradoverride as go
from gradoverride._core import scan

factor = torch.ones(3)


def helper(grad):
    return grad


RULES = {
    "operators": (lambda g, x: g * x - g / 2, True, True),
    "elementwise": (lambda g, x: torch.where(x > 0, g.clamp(min=0), 0), True, True),
    "a product of matrices": (lambda g, x, w: {"x": g @ w, "w": g.T @ x}, False, True),
    "sums": (lambda g, x: (g.sum(0), torch.mean(g, -1, keepdim=True).expand_as(x)), False, True),
    "shapes": (lambda g: g.transpose(0, 1).reshape(-1).view(2, 3).mT, False, True),
    "another device": (lambda g: g.to("meta"), False, False),
    "another dtype": (lambda g: g.double(), False, False),
    "a write": (lambda g, x: g.mul_(x), False, False),
    "a write by an option": (lambda g, x: torch.matmul(g, x, out=g), False, False),
    "an item": (lambda g: g[0], False, False),
    "a tensor from elsewhere": (lambda g: g * factor, False, False),
    "a function from elsewhere": (lambda g: helper(g), False, False),
    "an argument that is called": (lambda g, vjp: vjp(g), False, False),
    "a new tensor": (lambda g: torch.zeros(3) + g, False, False),
    "an attribute of an argument": (lambda g, x: g @ x.weight, False, False),
}


@pytest.mark.parametrize("name", RULES)
def test_which_rules_are_expressions_of_their_arguments(name):
    rule, arithmetic, algebra = RULES[name]
    assert (scan.is_arithmetic(rule), scan.is_algebra(rule)) == (arithmetic, algebra)


def test_algebra_is_checked_all_the_same():
    @go.custom_backward(lambda grad_output, x, w: {"x": grad_output @ w, "w": grad_output.T @ x})
    def product(x, w):
        return x @ w.T

    x, w = torch.randn(4, 3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    leaves = x.requires_grad_(), w.requires_grad_()
    found = torch.autograd.grad(product(*leaves).square().sum(), leaves)
    torch.testing.assert_close(found, torch.autograd.grad((x @ w.T).square().sum(), leaves))

    @go.custom_backward(lambda grad_output, x, w: {"x": grad_output @ w, "w": x.T @ grad_output})
    def transposed(x, w):
        return x @ w.T

    with pytest.raises(go.RuleResultError, match=r"shape \(2, 3\) for 'w'.* returned a tensor of shape \(3, 2\)"):
        transposed(*leaves).sum().backward()
