"""Undamped steps of K-FAC are those of the function: no affine change of activities or inputs matters, nor batch norm.

J. Martens, R. Grosse, Optimizing neural networks with Kronecker-factored approximate curvature, ICML 2015, section 10,
theorem 1. Steps of SGD are not: each test asks for that, too, so that it can fail. The loss is one whose factors are
regular; those of cross-entropy are not, as scores may have any common constant.
"""

from copy import deepcopy

import pytest
import torch
from torch import nn

from nn_adapters.curvature.kfac import KFAC
from nn_adapters.curvature.likelihoods import SquaredError
from tests.helpers.curvature import closure_of
from tests.helpers.support import relative

UNDAMPED = dict(fisher="exact", damping=1e-20, least=1e-20, judge_every=0, inverse_every=1)


def samples(count=200):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 4, generator=generator, dtype=torch.float64)
    return x, torch.stack([x[:, 0] * x[:, 1], x[:, 2].sin(), x[:, 3] ** 2], 1)


def invertible(size, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.eye(size).double() + 0.4 * torch.randn(size, size, generator=generator, dtype=torch.float64)


class AffineTanh(nn.Module):
    """W tanh(V s + t) + c with fixed W, V, t, c."""

    def __init__(self, size):
        super().__init__()
        self.W, self.V = invertible(size, 1), invertible(size, 2)
        self.t, self.c = torch.linspace(-0.5, 0.5, size).double(), torch.linspace(1.0, -1.0, size).double()

    def forward(self, s):
        return torch.tanh(s @ self.V.T + self.t) @ self.W.T + self.c


def mlp(*between):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), *between, nn.Tanh(), nn.Linear(5, 3)).double()


def outputs_after(network, x, y, optimizer, steps=3):
    for _ in range(steps):
        optimizer.step(closure_of(optimizer, network, SquaredError(), x, y))
    return network(x).detach()


def differences(network, other, x, x_other, y):
    """Between the outputs of two networks after steps of K-FAC, and of SGD."""
    assert relative(other(x_other).detach(), network(x).detach()) <= 1e-10  # one function at first
    makers = (
        lambda each: KFAC(each, SquaredError(), **UNDAMPED),
        lambda each: torch.optim.SGD(each.parameters(), lr=0.3),
    )
    found = []
    for make in makers:
        pair = [(deepcopy(network), x), (deepcopy(other), x_other)]
        a, b = (outputs_after(each, inputs, y, make(each)) for each, inputs in pair)
        found.append(relative(b, a))
    return found


def test_affine_changes_of_activities():
    x, y = samples()
    network = mlp()
    changed = AffineTanh(5)
    other = nn.Sequential(nn.Linear(4, 5), changed, nn.Linear(5, 3)).double()
    with torch.no_grad():
        back = torch.linalg.inv(changed.V)
        other[0].weight.copy_(back @ network[0].weight)
        other[0].bias.copy_(back @ (network[0].bias - changed.t))
        other[2].weight.copy_(network[2].weight @ torch.linalg.inv(changed.W))
        other[2].bias.copy_(network[2].bias - other[2].weight @ changed.c)
    kfac, sgd = differences(network, other, x, x, y)
    assert kfac <= 1e-5 and sgd >= 1e-2


@pytest.mark.parametrize("norm", [False, True])
def test_affine_changes_of_inputs(norm):
    x, y = samples()
    network = mlp(*([nn.BatchNorm1d(5, eps=1e-12)] if norm else []))
    other, S, shift = deepcopy(network), invertible(4, 3), torch.ones(4).double()
    with torch.no_grad():
        other[0].weight.copy_(network[0].weight @ torch.linalg.inv(S))
        other[0].bias.copy_(network[0].bias - other[0].weight @ shift)
    kfac, sgd = differences(network, other, x, x @ S.T + shift, y)
    assert kfac <= 1e-5 and sgd >= 1e-2


def test_lengths_of_weights_before_a_batch_norm():
    """The function does not depend on them; the effective rate of SGD does, by their square."""
    x, y = samples()
    network = mlp(nn.BatchNorm1d(5, eps=1e-12))
    other = deepcopy(network)
    with torch.no_grad():
        lengths = torch.tensor([0.1, 0.5, 1.0, 2.0, 10.0]).double()
        other[0].weight.mul_(lengths[:, None])
        other[0].bias.mul_(lengths)
    kfac, sgd = differences(network, other, x, x, y)
    assert kfac <= 1e-5 and sgd >= 1e-2
