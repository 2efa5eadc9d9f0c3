"""Energies of linear elements on nested meshes."""

import numpy as np
import scipy.sparse as sp
import torch

from pdeopt.functions.hierarchy import Hierarchy, Transfer
from pdeopt.functions.smooth import Costs, SmoothFunction


class Energy(SmoothFunction):
    """int u'^2/2 + w u^4/4 - u of linear elements on n inner nodes of (0,1), the quartic lumped."""

    def __init__(self, n, w=0.0, costs=None):
        super().__init__(n, costs=costs)
        self.h, self.w = 1.0 / (n + 1), w
        self.A = sp.diags([-1.0, 2.0, -1.0], [-1, 0, 1], shape=(n, n)).tocsr() / self.h

    def _value_and_gradient(self, x):
        Ax = torch.from_numpy(self.A @ x.numpy())
        h, w = self.h, self.w
        value = 0.5 * x @ Ax + h * (0.25 * w * x**4 - x).sum()
        return float(value), Ax + h * (w * x**3 - 1.0)

    def _hvp(self, x, d):
        return torch.from_numpy(self.A @ d.numpy()) + 3 * self.h * self.w * x**2 * d

    def solution(self):
        """Of w = 0, by a direct solve."""
        return torch.from_numpy(np.linalg.solve(self.A.toarray(), np.full(self.size, self.h)))


def interpolation(n):
    """Linear from (n - 1) / 2 inner nodes to n; iterates are projected by injection."""
    coarse = (n - 1) // 2
    rows = 2 * np.arange(coarse)[:, None] + np.arange(3)
    columns = np.repeat(np.arange(coarse), 3)
    P = sp.csr_matrix((np.tile([0.5, 1.0, 0.5], coarse), (rows.ravel(), columns)), shape=(n, coarse))
    injection = sp.csr_matrix((np.ones(coarse), (np.arange(coarse), 2 * np.arange(coarse) + 1)), shape=(coarse, n))
    return Transfer(P, injection)


def poisson(n, levels, w=0.0, kind=Energy):
    """Energies on meshes that are halved from level to level."""
    sizes = [(n + 1) // 2**level - 1 for level in range(levels)]
    functions = [kind(size, w, Costs().times(2.0**-level)) for level, size in enumerate(sizes)]
    return Hierarchy(functions, [interpolation(size) for size in sizes[:-1]])
