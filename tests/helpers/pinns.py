"""Small physics-informed networks for Burgers' equation."""

import math

import torch

from nn_adapters.pinn.features import periodic
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


def wave(**words):
    features = periodic("xt", {"x": 2.0}, order=2)
    lift, factor = (lambda x: -torch.sin(math.pi * x[:, 0])), (lambda x: x[:, 1])
    term = Term(points(), burgers, ("x", "t", "xx"), **words)
    return PINN(Network(features.size, (6, 6, 6), "mlp", "sin"), [term], "xt", lift, factor, features=features)


def fields():
    """Two fields and two equations of third order with two coefficients, and measurements of one field."""

    def residual(u, d, x):
        (v, w), (v_t, w_t), (v_xxx, w_xxx) = u, d["t"], d["xxx"]
        return v_t + d["c"] * v_xxx - w.square(), w_t + w_xxx * v - d["speed"].exp() * x[:, 0]

    seen = points(150, 4)[:, 0]
    measured = Term(points(150, 3), lambda u, d, x: u[0] * d["c"] - d["seen"], weight=3.0, given={"seen": seen})
    network = Network(2, (6, 5, 6), adaptive=True, outputs=2)

    def lift(x):
        return torch.stack([torch.sin(x[:, 0]), x[:, 0] * x[:, 1]], 1)

    terms, start = [Term(points(), residual, ("t", "xxx")), measured], {"c": 0.3, "speed": -0.2}
    return PINN(network, terms, "xt", lift, lambda x: x[:, 1].exp(), coefficients=start)


def somewhere(function, seed=0):
    theta = function.initial(seed)
    return theta + 0.1 * torch.randn(len(theta), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
