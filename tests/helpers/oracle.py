"""Slow and obviously right: a control problem as plain torch functions of one stacked vector.

Loops over the steps, builds dense matrices, knows one rank only. The vector is k = [u | z | p | lam].
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.func import hessian, jacfwd

from pdeopt.control.problem import ControlProblem


class Oracle:
    """J, F and L of a problem, and their dense derivatives."""

    def __init__(self, problem: ControlProblem) -> None:
        self.problem, grid = problem, problem.grid
        layout = problem.layout
        self.sizes = [layout.state_size, layout.control_size, layout.param_size, layout.state_size]
        n_rows = grid.n_local * problem.m
        unit = torch.eye(layout.control_size, dtype=torch.float64)
        self.E = torch.zeros(n_rows, layout.control_size, dtype=torch.float64)
        for k, z in enumerate(unit):
            self.E[:, k] = problem.controls(z).reshape(-1)
        assert self.E.shape == (n_rows, layout.control_size)

    def _parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        u, z, p = x[: sum(self.sizes[:3])].split(self.sizes[:3])
        u_0 = self.problem.constraint.initial_state(p)
        levels = torch.cat([u_0[None], u.reshape(-1, self.problem.n)])
        return levels, (self.E @ z).reshape(self.problem.grid.n_local, self.problem.m), p

    def J(self, x: Tensor) -> Tensor:
        u, z, p = self._parts(x)
        objective, grid = self.problem.objective, self.problem.grid
        total = objective.value(u[:1], torch.zeros_like(z[:1]), grid.node_zero.with_parameters(p))[0]
        for i in range(grid.num_steps):
            step = grid.steps[i : i + 1].with_parameters(p)
            total = total + objective.value(u[i + 1 : i + 2], z[i : i + 1], step)[0]
        return total

    def F(self, x: Tensor) -> Tensor:
        u, z, p = self._parts(x)
        rows = []
        for i in range(self.problem.grid.num_steps):
            step = self.problem.grid.steps[i : i + 1].with_parameters(p)
            rows.append(self.problem.constraint.residual(u[i : i + 1], u[i + 1 : i + 2], z[i : i + 1], step)[0])
        return torch.cat(rows)

    def L(self, k: Tensor) -> Tensor:
        x, lam = k.split([sum(self.sizes[:3]), self.sizes[3]])
        return self.J(x) + lam @ self.F(x)

    def metric(self) -> Tensor:
        """R, from dense masses."""
        problem, dt = self.problem, self.problem.grid.steps.dt
        M, Q = (
            torch.eye(size, dtype=torch.float64) if mass is None else mass(torch.eye(size, dtype=torch.float64))
            for mass, size in ((problem.constraint.state_mass, problem.n), (problem.constraint.control_mass, problem.m))
        )
        design = self.E.T @ torch.block_diag(*(h * Q for h in dt)) @ self.E
        P = torch.eye(problem.param_dim) if problem.constraint.param_mass is None else problem.constraint.param_mass
        return torch.block_diag(*(h * M for h in dt), design, torch.as_tensor(P, dtype=torch.float64))

    def kkt(self, k: Tensor, which: str) -> Tensor:
        """[W F''; F' 0] with W = L'', J'' or R."""
        if which == "full":
            return hessian(self.L)(k)
        x = k[: sum(self.sizes[:3])]
        W = self.metric() if which == "metric" else hessian(self.J)(x)
        F = jacfwd(self.F)(x)
        return torch.cat([torch.cat([W, F.T], 1), torch.cat([F, torch.zeros(len(F), len(F))], 1)])

    def reduced(self, design: Tensor) -> Tensor:
        """J(u(z, p), z, p) with u by Newton's method in exact arithmetic's derivatives."""
        n = self.sizes[0]
        u = torch.zeros(n, dtype=torch.float64)
        with torch.no_grad():
            for _ in range(60):
                F = self.F(torch.cat([u, design]))
                u = u - torch.linalg.solve(jacfwd(lambda v: self.F(torch.cat([v, design])))(u), F)
        return self.J(torch.cat([u, design]))
