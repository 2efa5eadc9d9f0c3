"""Proximal maps against a search on a fine grid, for all pieces and all losses."""

import numpy as np
import pytest
import torch

from nn_adapters.splitting.proximal import LOSSES, SPLIT_ACTIVATIONS, require_classes
from pdeopt.core.errors import InputError

POINTS = 10_000


def numbers(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (4 * torch.rand(POINTS, 2, generator=generator, dtype=torch.float64) - 2).unbind(1)


@pytest.mark.parametrize("name", SPLIT_ACTIVATIONS)
@pytest.mark.parametrize("beta, gamma", [(1.0, 1.0), (0.01, 1.0), (1.0, 0.1), (0.02, 20.0)])
def test_activations_against_a_grid(name, beta, gamma):
    h, (m, a) = SPLIT_ACTIVATIONS[name], numbers()

    def value(z):
        return beta * (z - m).square() + gamma * (a - h(z)).square()

    z = h.proximal(m, a, beta, gamma)
    grid = torch.linspace(-30.0, 30.0, 601, dtype=torch.float64)
    least = torch.stack([value(point) for point in grid]).min(0).values
    assert float((value(z) - least).max()) < 1e-9
    assert float(value(z).max()) < np.inf


@pytest.mark.parametrize("name", ["relu", "leaky_relu", "hard_sigmoid"])
def test_minima_are_on_all_pieces(name):
    """So that the search above tries each: inside of all intervals, and at the kinks that point down."""
    h, (m, a) = SPLIT_ACTIVATIONS[name], numbers()
    z = h.proximal(m, a, 1.0, 1.0)
    for _, _, lower, upper in h.pieces:
        assert int(((z > lower) & (z < upper)).sum()) > 100
    assert int((z == 0.0).sum()) > 100


@pytest.mark.parametrize("name", ["tanh", "softplus"])
def test_smooth_activations_are_stationary(name):
    h, (m, a) = SPLIT_ACTIVATIONS[name], numbers()
    z = h.proximal(m, a, 0.1, 1.0)
    value, slope, _ = h.function(z)
    assert float((0.1 * (z - m) - (a - value) * slope).abs().max()) < 1e-8


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("beta", [0.01, 0.2, 1.0, 100.0])
def test_losses_are_least_in_random_directions(name, beta):
    """The functions are convex, so that no step from the minimum goes down, however short."""
    generator = torch.Generator().manual_seed(1)
    m = 3 * torch.randn(POINTS // 10, 5, generator=generator, dtype=torch.float64)
    y = torch.randint(5, (len(m),), generator=generator)
    loss = LOSSES[name]
    z = loss.proximal(m, y, beta)

    def value(z):
        return loss.value(z, y) + beta * (z - m).square().sum(1)

    for size in (1.0, 1e-2, 1e-4):
        for _ in range(10):
            other = z + size * torch.randn(z.shape, generator=generator, dtype=torch.float64)
            assert float((value(z) - value(other)).max()) < 1e-12


def test_squared_loss_takes_targets():
    m, y = torch.tensor([[1.0, 2.0]]).double(), torch.tensor([[3.0, 0.0]]).double()
    assert torch.allclose(LOSSES["squared"].proximal(m, y, 1.0), torch.tensor([[2.0, 1.0]]).double())


@pytest.mark.parametrize("name", LOSSES)
def test_no_sample_is_no_obstacle(name):
    """As on a rank that has none of a batch."""
    m, y = torch.empty(0, 3), torch.empty(0, dtype=torch.int64)
    assert LOSSES[name].proximal(m, y, 1.0).shape == LOSSES[name].value(m, y)[:, None].expand(0, 3).shape


def test_labels_outside_are_named():
    with pytest.raises(InputError, match="0 to 9"):
        require_classes(torch.tensor([3, 10]), 10)
    with pytest.raises(InputError, match="integers"):
        require_classes(torch.ones(3), 10)
