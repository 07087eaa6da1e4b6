"""Routines of SciPy in the middle of a network that learns from real data: a sparse solve, and an assignment."""

import numpy as np
import pytest
import scipy.sparse
import torch
import torch.nn.functional as F
from oracles import closely, noise
from scipy.optimize import linear_sum_assignment
from scipy.sparse.linalg import spsolve
from sklearn.datasets import load_digits
from torch import nn

import gradoverride as go


@pytest.fixture(scope="module")
def images():
    return torch.tensor(load_digits().images, dtype=torch.float32) / 16


# --- a sparse solve, whose derivative is another one ---


PIXELS = np.arange(64).reshape(8, 8)
START = np.concatenate([PIXELS[:, :-1].ravel(), PIXELS[:-1].ravel()])
STOP = np.concatenate([PIXELS[:, 1:].ravel(), PIXELS[1:].ravel()])


def matrix_of(conductances):
    """The identity and the Laplacian of the grid, for a batch as one matrix of blocks."""
    offsets = 64 * np.arange(len(conductances))[:, None]
    places = (offsets + START).ravel(), (offsets + STOP).ravel()
    size = 64 * len(conductances)
    edges = scipy.sparse.coo_array((conductances.ravel(), places), shape=(size, size)).tocsc()
    both = edges + edges.T
    return (scipy.sparse.diags_array(1 + both.sum(1)) - both).tocsc()


def smooth_backward(grad_output, conductances, output):
    adjoint = spsolve(matrix_of(conductances).T.tocsc(), grad_output.ravel()).reshape(grad_output.shape)
    return -(adjoint[:, START] - adjoint[:, STOP]) * (output[:, START] - output[:, STOP]), adjoint


@go.bridge(smooth_backward, dtype="float64")
def smooth(conductances, noisy):
    """Pictures after heat has flowed between neighbouring pixels."""
    return spsolve(matrix_of(conductances), noisy.ravel()).reshape(noisy.shape)


def smooth_densely(conductances, noisy):
    """The same by torch alone."""
    across = torch.zeros(112, 64, dtype=noisy.dtype)
    across[range(112), START], across[range(112), STOP] = 1, -1
    laplacian = torch.einsum("be,ei,ej->bij", conductances, across, across)
    return torch.linalg.solve(torch.eye(64, dtype=noisy.dtype) + laplacian, noisy)


def test_adjoint_is_what_torch_and_finite_differences_say():
    conductances, noisy = torch.rand(2, 112, dtype=torch.float64, requires_grad=True), noise(2, 64)
    assert torch.autograd.gradcheck(smooth, (conductances, noisy), fast_mode=True)
    cotangent = noise(2, 64, grad=False)
    found, expected = [
        torch.autograd.grad(fn(conductances, noisy), (conductances, noisy), cotangent)
        for fn in (smooth, smooth_densely)
    ]
    closely(found, expected)


def test_float32_is_solved_in_float64():
    conductances, noisy = torch.rand(1, 112) * 1e6, torch.randn(1, 64)
    found = smooth(conductances, noisy)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, smooth_densely(conductances.double(), noisy.double()).float())


def test_network_learns_through_a_sparse_solve(images):
    look = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 112), nn.Softplus())
    optimizer = torch.optim.Adam(look.parameters(), lr=1e-2)

    def error(clean):
        noisy = clean + 0.3 * torch.randn(clean.shape)
        return F.mse_loss(smooth(look(noisy), noisy), clean)

    clean = images.flatten(1)
    held_back = clean[1600:]
    with torch.no_grad():
        before = error(held_back)
    for _ in range(40):
        optimizer.zero_grad()
        error(clean[torch.randint(1600, (16,))]).backward()
        optimizer.step()
    with torch.no_grad():
        assert error(held_back) < 0.8 * before


# --- an assignment, whose derivative is zero ---


@go.bridge(go.estimators.blackbox(20.0))
def assign(costs):
    chosen = np.zeros_like(costs)
    for cost, choice in zip(costs, chosen, strict=True):
        choice[linear_sum_assignment(cost)] = 1
    return chosen


def test_estimator_asks_the_solver_where_the_gradient_points():
    costs, cotangent = noise(3, 4, 4), noise(3, 4, 4, grad=False)
    y = assign(costs)
    found = torch.autograd.grad(y, costs, cotangent)[0]
    moved = costs.detach() + 20 * cotangent
    expected = torch.zeros_like(moved)
    for cost, moved_cost, answer in zip(costs.detach().numpy(), moved.numpy(), expected, strict=True):
        answer[linear_sum_assignment(cost)] += 1
        answer[linear_sum_assignment(moved_cost)] -= 1
    closely(found, -expected / 20)


def test_network_learns_through_an_assignment(images):
    """It puts the four pieces of digits in their places."""
    pieces = images.view(-1, 2, 4, 2, 4).transpose(2, 3).reshape(-1, 4, 16)
    cost = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4))
    optimizer = torch.optim.Adam(cost.parameters(), lr=5e-3)

    def put_together(given):
        chosen = assign(F.layer_norm(cost(given).transpose(1, 2), (4, 4)))
        return chosen @ given

    def shuffled(whole):
        order = torch.rand(len(whole), 4).argsort(1)
        return whole[torch.arange(len(whole))[:, None], order]

    for _ in range(60):
        whole = pieces[torch.randint(1600, (50,))]
        optimizer.zero_grad()
        (put_together(shuffled(whole)) - whole).square().sum((1, 2)).mean().backward()
        optimizer.step()
    with torch.no_grad():
        right = torch.isclose(put_together(shuffled(pieces[1600:])), pieces[1600:]).all(2).all(1).float().mean()
    assert right > 0.4  # by chance 1 in 24
