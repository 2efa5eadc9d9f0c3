"""Hessian-free steps and natural gradients against dense solves; damping, backtracking, restarts."""

from copy import deepcopy

import pytest
import torch
from torch import nn

from nn_adapters.curvature.hessianfree import NATURAL, HessianFree
from nn_adapters.curvature.likelihoods import CrossEntropy, SquaredError
from tests.helpers.curvature import dense_fisher, flat_gradient, problem, train
from tests.helpers.support import relative


@pytest.mark.parametrize("precond", ["kfac", "none"])
def test_a_step_solves_the_damped_system(precond):
    network, x, y = problem()
    before, loss = deepcopy(network), CrossEntropy()
    optimizer = HessianFree(
        network, loss, damping=0.1, cg_rtol=1e-12, cg_max_it=500, precond=precond, backtrack=False, l2=0.01
    )
    train(optimizer, network, loss, x, y, 1, batch=40)
    g = flat_gradient(before, loss, x, y, l2=0.01)
    F = dense_fisher(before, loss, x) + 0.11 * torch.eye(len(g), dtype=torch.float64)
    assert relative(optimizer.last, -torch.linalg.solve(F, g)) <= 1e-9


def test_the_preconditioner_knows_one_linear_layer():
    """Its Fisher matrix is I (x) E aa', whatever the units of the inputs; only G is sampled."""
    found = {}
    for precond in ("kfac", "none"):
        torch.manual_seed(0)
        network, loss = nn.Linear(12, 2).double(), SquaredError()
        x, y = torch.randn(200, 12).double() * torch.logspace(-1, 1, 12), torch.randn(200, 2).double()
        optimizer = HessianFree(network, loss, precond=precond, cg_rtol=1e-6, damping=1e-6, backtrack=False)
        train(optimizer, network, loss, x, y, 1, batch=200)
        found[precond] = optimizer.iterations
    assert found["kfac"] <= 6 and found["none"] >= 12


@pytest.mark.parametrize("words", [{}, NATURAL])
def test_it_trains_on_the_whole_batch(words):
    network, x, y = problem()
    optimizer = HessianFree(network, loss := CrossEntropy(), **words)
    losses = train(optimizer, network, loss, x, y, 15, batch=40)
    assert losses[-1] < 0.2 * losses[0] and losses == sorted(losses, reverse=True)


def test_a_step_that_does_not_lower_the_loss_is_not_taken():
    class Steep(SquaredError):
        """Its matrix is a thousandth of what it should be."""

        def each(self, outputs, targets):
            return 1000.0 * super().each(outputs, targets)

    torch.manual_seed(0)
    network, x, y = nn.Linear(3, 2).double(), torch.randn(20, 3).double(), torch.randn(20, 2).double()
    before = network.weight.detach().clone()
    optimizer = HessianFree(network, loss := Steep(), damping=1e-3, backtrack=False)
    train(optimizer, network, loss, x, y, 1, batch=20)
    assert torch.equal(network.weight, before) and optimizer.damping > 4e-3 and optimizer.ratio < 0.0


def test_restarts_to_the_last_bit():
    network, x, y = problem()
    optimizer = HessianFree(network, loss := CrossEntropy(), cg_max_it=5)
    train(optimizer, network, loss, x, y, 3, batch=20)
    saved = deepcopy(network.state_dict()), deepcopy(optimizer.state_dict())
    expected = train(optimizer, network, loss, x, y, 3, begin=3, batch=20)
    again, *_ = problem(seed=1)
    other = HessianFree(again, loss, cg_max_it=5)
    again.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    assert train(other, again, loss, x, y, 3, begin=3, batch=20) == expected
