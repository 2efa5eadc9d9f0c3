"""What sensors say about a field of coefficients, on meshes that get finer: directions, information, work.

    python -m problems.benchmarks.posterior

A rod as in docs/recipes/posterior.md with 50 to 400 coefficients and six sensors, and a plate, u_t = div(exp(p)
grad u) + 1 by finite volumes, with 8 by 8 to 24 by 24 coefficients and nine. The precision of the prior is
gamma (delta - Laplacian), squared on the plate, so that samples are functions whatever the mesh. A line of JSON each.
"""

from __future__ import annotations

import json
import time
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

import pdeopt as po

#: Standard deviation of the noise, steps of time, sensors along a side.
NOISE, STEPS, SENSORS = 1e-3, 20, {1: 6, 2: 3}


class Conductor(po.TimeDependentConstraint):
    """u_t = div(exp(p) grad u) + 1 in `dim` dimensions, u = 0 around and at the start; one p a cell.

    Args:
        side: cells along a side, of which each has a temperature and a coefficient.
        dim: 1 or 2.

    Attributes:
        root: S, (n, n): the parameters are w with p = S w, white noise of the prior.
    """

    control_dim = 0

    def __init__(self, side: int, dim: int) -> None:
        self.side, self.dim, self.h = side, dim, 1 / side
        self.state_dim = self.param_dim = side**dim
        self.volume = self.h**dim
        self.state_mass = self.volume * sp.eye(self.state_dim)
        P = self.precision().toarray()
        self.root = torch.from_numpy(np.linalg.inv(np.linalg.cholesky(P)).T.copy())

    def initial_state(self, p: Tensor) -> Tensor:
        return torch.zeros(self.state_dim, dtype=torch.float64)

    def residual(self, u_old: Tensor, u_new: Tensor, z: Tensor, steps: po.Steps) -> Tensor:
        shape = self.dim * (self.side,)
        k, u = torch.exp(self.root @ steps.p).reshape(shape), u_new.reshape(-1, *shape)
        slope = sum((self._flow(k, u, axis) for axis in range(self.dim)), torch.zeros_like(u))
        rate = slope.reshape(len(u), -1) + 1.0
        return self.volume * (u_new - u_old - steps.dt[:, None] * rate)

    def _flow(self, k: Tensor, u: Tensor, axis: int) -> Tensor:
        """The second difference along an axis, with harmonic means of k between cells and half a cell at the ends."""
        k, u = k.movedim(axis, -1), u.movedim(axis + 1, -1)
        ends = torch.zeros_like(u[..., :1])
        between = torch.cat([2 * k[..., :1], 2 / (1 / k[..., 1:] + 1 / k[..., :-1]), 2 * k[..., -1:]], dim=-1)
        flow = between * torch.diff(torch.cat([ends, u, ends], dim=-1), dim=-1) / self.h**2
        return torch.diff(flow, dim=-1).movedim(-1, axis + 1)

    def precision(self) -> Any:
        """P, (n, n): of p, without boundary conditions."""
        D = sp.diags([-1.0, 1.0], [0, 1], shape=(self.side - 1, self.side)) / self.h
        line, one = D.T @ D, sp.eye(self.side)
        second = line if self.dim == 1 else sp.kron(line, one) + sp.kron(one, line)
        operator = second + 10.0 * sp.eye(self.state_dim)
        return self.volume * (0.4 * operator if self.dim == 1 else 0.01 * operator @ operator)

    def sensors(self) -> sp.csr_matrix:
        """Means over a tenth of the side around points that do not depend on the mesh, (s, n)."""
        x, centers = (
            self.h * (np.arange(self.side) + 0.5),
            np.arange(1, 1 + SENSORS[self.dim]) / (1 + SENSORS[self.dim]),
        )
        hats = np.maximum(1 - np.abs(x - centers[:, None]) / 0.15, 0.0)
        hats /= hats.sum(1, keepdims=True)
        return sp.csr_matrix(hats if self.dim == 1 else np.kron(hats, hats))


def measure(side: int, dim: int) -> dict[str, Any]:
    """A mesh."""
    rod = Conductor(side, dim)
    grid, n = po.TimeGrid.uniform(STEPS, T=1.0), rod.state_dim
    x = rod.h * (np.arange(side) + 0.5)
    wave = 0.6 * np.sin(2 * np.pi * x)
    p = wave if dim == 1 else np.add.outer(wave, -wave).ravel()
    forward = po.ControlProblem(rod, po.Tracking(np.zeros(n)), grid)
    truth = forward.create_design()
    truth.setArray(np.linalg.solve(rod.root.numpy(), p))
    B = rod.sensors()
    data = forward.layout.rows(forward.solve_state(truth)).numpy() @ B.T
    misfit = po.Tracking(data, observe=B, times=grid.times[1:], weight=NOISE**-2)
    problem = po.ControlProblem(rod, misfit + po.TerminalLoss(lambda u, w: 0.5 * w.square().sum()), grid)
    begin = time.process_time()
    result = po.solve(problem, method="tao", tao_type="nls", gauss_newton=True)
    solved = time.process_time()
    posterior = po.Posterior(problem, result, sp.eye(n))
    found = time.process_time()
    row = {
        "dim": dim,
        "coefficients": n,
        "newton": result.iterations,
        "cg": sum(result.history["krylov"]),
        "directions": len(posterior.eigenvalues),
    }
    row |= {"largest": float(posterior.eigenvalues[0]), "information": posterior.information()}
    return row | {"products": posterior.products, "cpu_solve": solved - begin, "cpu_posterior": found - solved}


if __name__ == "__main__":
    for dim, sides in ((1, (50, 100, 200, 400)), (2, (8, 16, 24))):
        for side in sides:
            print(json.dumps(measure(side, dim)), flush=True)
