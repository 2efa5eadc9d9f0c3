"""The loss of a small network on a few samples."""

import torch
from torch import nn

from nn_adapters.losses.network import NetworkLoss


def network(samples=60):
    """Three layers of five units, two classes."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    x = torch.randn(samples, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return NetworkLoss(net, nn.functional.cross_entropy, x, (x[:, 0] * x[:, 1] > 0).long())
