"""Logistic regression on random samples, and its optimum."""

import numpy as np
import torch

from nn_adapters.losses.logistic import LogisticLoss


def logistic_samples(N=40, n=6, seed=0):
    """A table, and labels of a plane with noise."""
    rng = np.random.default_rng(seed)
    A = rng.standard_normal((N, n)) * np.linspace(3.0, 0.2, n)
    return A, np.where(A @ rng.standard_normal(n) + rng.standard_normal(N) > 0, 1.0, -1.0)


def logistic_loss(N=40, n=6, seed=0, **words):
    """The loss of these samples."""
    return LogisticLoss(*logistic_samples(N, n, seed), **words)


def newton_optimum(f):
    """The optimum by Newton's method with the dense Hessian."""
    x = torch.zeros(f.size, dtype=torch.float64)
    identity = torch.eye(f.size, dtype=torch.float64)
    for _ in range(30):
        H = torch.stack([f.hvp(x, e) for e in identity])
        value, g = f.value_and_gradient(x)
        d, size = -torch.linalg.solve(H, g), 1.0
        while f.value(x + size * d) > value + 1e-13:
            size *= 0.5
        x = x + size * d
    assert f.norm(f.value_and_gradient(x)[1]) < 1e-13
    return x
