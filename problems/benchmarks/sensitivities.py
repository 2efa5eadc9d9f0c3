"""Derivatives of a solution by one KKT solve, beside differences of two more solutions and their price.

    python -m problems.benchmarks.sensitivities

Reaction and diffusion of the README: 63 unknowns, 100 steps. Parameters are rate, diffusion, the initial state, the
target at all nodes and the price of control, 6,429 numbers. A line of JSON a case: the largest error of a derivative in
the direct mode beside a central difference, relative to the largest one; by how much the adjoint mode disagrees; and
CPU seconds of a solve, of the direct mode with the matrix and its factors, and of one more derivative in each mode.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

import pdeopt as po

#: Of the differences, and of the solves: entries that are hardly active need the second.
STEP, TOL = 1e-4, 1e-11

#: Arguments of `solve` that are limits, by case.
CASES: dict[str, dict[str, Any]] = {
    "free": {},
    "bounded": {"lower": -0.5, "upper": 3.0},
    "on states": {"state_upper": 0.7, "lower": -1.0},
}


class Growth(po.TimeDependentConstraint):
    """u_t = k u_xx + r u (1 - u) + z on (0, 1), u = 0 at both ends; implicit Euler.

    Args:
        n: nodes inside.
        rate, diffusion: r and k, scalars.
        start: u_0, (n,).
    """

    def __init__(self, n: int, rate: Tensor, diffusion: Tensor, start: Tensor) -> None:
        self.h, self.rate, self.diffusion, self.start = 1 / (n + 1), rate, diffusion, start
        self.state_dim = self.control_dim = n
        self.state_mass = self.control_mass = self.h * sp.eye(n)

    def initial_state(self, p: Tensor) -> Tensor:
        return self.start

    def residual(self, u_old: Tensor, u_new: Tensor, z: Tensor, steps: po.Steps) -> Tensor:
        second = torch.diff(torch.nn.functional.pad(u_new, (1, 1)), n=2, dim=1) / self.h**2
        growth = self.rate * u_new * (1 - u_new)
        return self.h * (u_new - u_old - steps.dt[:, None] * (self.diffusion * second + growth + z))


def problem_of(n: int, steps: int, q: Sequence[Tensor]) -> po.ControlProblem:
    """The problem for parameters rate, diffusion, initial state, target and price."""
    rate, diffusion, start, target, price = q
    constraint = Growth(n, rate, diffusion, start)
    objective = po.Tracking(target, constraint.state_mass) + po.ControlCost(price, constraint.control_mass)
    return po.ControlProblem(constraint, objective, po.TimeGrid.uniform(steps, T=1.0))


def parameters(n: int, steps: int) -> list[Tensor]:
    """Those of the README, the target tilted a little in time."""
    x, t = np.linspace(0, 1, n + 2)[1:-1], np.linspace(0, 1, steps + 1)[:, None]
    values = 1.0, 0.02, 0.1 * np.sin(np.pi * x), (0.8 + 0.2 * t) * np.sin(np.pi * x), 1e-3
    return [torch.tensor(each, dtype=torch.float64, requires_grad=True) for each in values]


def clocked(call: Callable[[], Any]) -> tuple[Any, float]:
    """What a call returns, and its CPU seconds."""
    begin = time.process_time()
    return call(), time.process_time() - begin


def measure(name: str, n: int = 63, steps: int = 100) -> dict[str, Any]:
    """A case."""
    words, q = CASES[name], parameters(n, steps)
    draw = torch.Generator().manual_seed(0)
    dq = [0.1 * x.detach() * torch.randn(x.shape, generator=draw, dtype=torch.float64) for x in q]

    def solved(size: float) -> tuple[po.ControlProblem, po.ControlResult]:
        problem = problem_of(n, steps, [(x + size * d).detach() for x, d in zip(q, dq)])
        return problem, po.solve(problem, opt_tol=TOL, **words)

    def flat(problem: po.ControlProblem, result: po.ControlResult) -> Tensor:
        u, z, _ = problem.unpack(result)
        lam = problem.layout.rows(result.multiplier)
        return torch.cat([u.ravel(), z, lam.ravel(), torch.tensor([result.objective], dtype=torch.float64)])

    problem = problem_of(n, steps, q)
    result, of_solve = clocked(lambda: po.solve(problem, opt_tol=TOL, **words))
    how = po.Sensitivity(problem, result, q, **words)
    found, of_first = clocked(lambda: how.direct(*dq))
    _, of_direct = clocked(lambda: how.direct(*dq))
    expected = (flat(*solved(STEP)) - flat(*solved(-STEP))) / (2 * STEP)
    parts = (found.state.ravel(), found.control, found.multiplier.ravel(), found.value.reshape(1))
    error = (torch.cat(parts) - expected).abs().max() / expected.abs().max()
    w = torch.randn(found.state.shape, generator=draw, dtype=torch.float64)
    q_bar, of_adjoint = clocked(lambda: how.adjoint(state=w))
    product = sum(float((x * d).sum()) for x, d in zip(q_bar, dq))
    direct = float((w * found.state).sum())
    seconds = {"solve": of_solve, "direct with factors": of_first, "direct": of_direct, "adjoint": of_adjoint}
    row = {"case": name, "method": result.method, "parameters": sum(x.numel() for x in q), "error": float(error)}
    return row | {"adjoint": abs(product - direct) / abs(direct), "cpu": seconds}


if __name__ == "__main__":
    for case in CASES:
        print(json.dumps(measure(case)), flush=True)
