"""Small physics-informed networks for Burgers' equation."""

import math

import torch

from nn_adapters.pinn.loss import PINN
from nn_adapters.pinn.network import Network
from nn_adapters.pinn.terms import Term


def points(n=150, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return 2.0 * torch.rand(n, 2, generator=generator, dtype=torch.float64) - 1.0


def burgers(u, d, x):
    return d["t"] + u * d["x"] - 0.1 * d["xx"]


def make(hidden=(6,) * 4, body="resnet", adaptive=True, terms=None, **words):
    terms = terms or [Term(points(), burgers, ("x", "t", "xx"))]
    return PINN(Network(2, hidden, body, "tanh", adaptive), terms, "xt", **words)


def hard():
    return make(lift=lambda x: -torch.sin(math.pi * x[:, 0]), factor=lambda x: x[:, 1] * (1 - x[:, 0] ** 2))


def soft():
    border = points(30, 5)
    border[:, 1] = 0.0
    start = Term(border, lambda u, d, x: u + torch.sin(math.pi * x[:, 0]), weight=20.0)
    weights = torch.rand(150, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return make(terms=[Term(points(), burgers, ("x", "t", "xx"), weights), start], body="mlp", adaptive=False)


def somewhere(function, seed=0):
    theta = function.initial(seed)
    return theta + 0.1 * torch.randn(len(theta), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
