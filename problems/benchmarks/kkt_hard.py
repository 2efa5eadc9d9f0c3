"""Control problems on which solvers of KKT systems differ: a process solves one of them.

    python -m problems.benchmarks.kkt_hard "terminal loss" -nt 64 -alpha 1e-6 -precond auto

The last line is JSON: iterations, Krylov iterations, CPU seconds, or why it failed. The heat problem unless the name
says otherwise, from zero control to optimality 1e-8 by Newton's method, or active sets where there are bounds.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import scipy.sparse as sp
import skfem
import torch
from petsc4py import PETSc
from torch import Tensor

import pdeopt as po
from pdeopt.core.arrays import Array
from problems.burgers import BurgersCase, BurgersSettings
from problems.heat import Heat, HeatCase, HeatSettings, Space
from problems.klein_gordon import KleinGordonCase, KleinGordonSettings

#: CPU seconds after which a process gives up, and what it says then.
LIMIT = 240
FAILED = {
    "converged": False,
    "why": f"not within {LIMIT} CPU s",
    "iterations": 0,
    "krylov": 0,
    "most": 0,
    "cpu": float(LIMIT),
}


class TimeVaryingHeat(Heat):
    """The conductivity is (1 + 0.9 sin 2 pi t) times what it was."""

    def residual(self, u_old: Tensor, u_new: Tensor, z: Tensor, steps: po.Steps) -> Tensor:
        factor, dt = (1 + 0.9 * torch.sin(2 * torch.pi * steps.t_new))[:, None], steps.dt[:, None]
        return self.state_mass(u_new - u_old) + dt * (factor * self.S(u_new) - self.B(z) - self.f)

    linearize = po.TimeDependentConstraint.linearize  # type: ignore[assignment]


class HeatOfTwo(Heat):
    """Two sources of unknown strength p beside the control."""

    param_dim = 2
    sources: Tensor

    def residual(self, u_old: Tensor, u_new: Tensor, z: Tensor, steps: po.Steps) -> Tensor:
        return super().residual(u_old, u_new, z, steps) - steps.dt[:, None] * (steps.p @ self.sources)

    linearize = po.TimeDependentConstraint.linearize  # type: ignore[assignment]


class Ceiling(po.Objective):
    """factor / 2 |max(u - limit, 0)|^2, lumped: a soft bound on states.

    Args:
        factor, limit: of the penalty.
        lumped: row sums of the mass, (n,).
    """

    def __init__(self, factor: float, limit: float, lumped: Array) -> None:
        self.factor, self.limit, self.lumped = factor, limit, torch.from_numpy(lumped)

    def value(self, u: Tensor, z: Tensor, steps: po.Steps) -> Tensor:
        above = torch.relu(u - self.limit)
        return 0.5 * self.factor * steps.weight * (above.square() * self.lumped).sum(-1)


class Problem:
    """The heat problem with parts that can be exchanged.

    Args:
        settings: sizes, alpha, theta.
    """

    def __init__(self, settings: HeatSettings) -> None:
        self.settings, self.case = settings, HeatCase(settings)
        self.space: Space = self.case.space
        self.x, self.y = self.space.points[:, self.space.free]
        self.grid = po.TimeGrid.uniform(settings.nt, settings.T)

    def make(
        self,
        kind: type[Heat] = Heat,
        S: Any = None,
        control: Array | None = None,
        objective: po.Objective | None = None,
        grid: po.TimeGrid | None = None,
        **fields: Any,
    ) -> po.ControlProblem:
        """The problem with another constraint, operator, control, tracking term, or time grid."""
        space, keep = self.space, np.arange(self.space.Q.shape[0]) if control is None else control
        Q, B = space.Q[keep][:, keep], space.B[:, keep]
        S = self.settings.kappa * space.A if S is None else S
        constraint = kind(space.M, S, Q, B, np.zeros(len(space.free)), self.settings.theta)
        for name, value in fields.items():
            setattr(constraint, name, value)
        objective = po.Tracking(self.case.target, space.M) if objective is None else objective
        price = po.ControlCost(self.settings.alpha, Q)
        return po.ControlProblem(constraint, objective + price, grid or self.grid)

    def observed(self, nodes: Array, mass: Any) -> po.Objective:
        """Tracking at some nodes alone."""
        return po.Tracking(lambda t: self.case.target(t)[:, torch.from_numpy(nodes)], mass, observe=nodes)


def subregion(p: Problem) -> po.ControlProblem:
    """Control where x < 1 alone."""
    return p.make(control=np.flatnonzero(p.space.points[0, p.space.control] < 1.0))


def observed_part(p: Problem) -> po.ControlProblem:
    """Observation where x > 2 alone."""
    nodes = np.flatnonzero(p.x > 2.0)
    return p.make(objective=p.observed(nodes, p.space.M[nodes][:, nodes]))


def nine_points(p: Problem) -> po.ControlProblem:
    """Observation at the nodes nearest to a grid of three by three."""
    goals = [(x, y) for x in (0.75, 1.5, 2.25) for y in (0.25, 0.5, 0.75)]
    nodes = np.unique([np.hypot(p.x - x, p.y - y).argmin() for x, y in goals])
    return p.make(objective=p.observed(nodes, sp.eye(len(nodes))))


def terminal(p: Problem) -> po.ControlProblem:
    """A loss of the last state alone."""
    M, d = po.StepMatrix.constant(p.space.M), torch.exp(-8 * torch.from_numpy((p.x - 1.5) ** 2 + (p.y - 0.5) ** 2))
    return p.make(objective=po.TerminalLoss(lambda u, _: 0.5 * ((u - d) * M((u - d)[None])[0]).sum()))


def advection(p: Problem) -> po.ControlProblem:
    """Transport in x at a cell Peclet number b h / (2 kappa) of 100."""
    transport = sp.csr_matrix(skfem.BilinearForm(lambda u, v, w: u.grad[0] * v).assemble(p.space.basis))
    h, b = p.settings.length / p.settings.nx, 1.0
    return p.make(S=b * h / 200.0 * p.space.A + b * transport[p.space.free][:, p.space.free])


def random_steps(p: Problem) -> po.ControlProblem:
    """Time steps over two decades."""
    dt = 10.0 ** np.random.default_rng(0).uniform(-2.0, 0.0, p.settings.nt)
    return p.make(grid=po.TimeGrid(np.r_[0.0, np.cumsum(dt)] / dt.sum() * p.settings.T))


def two_parameters(p: Problem) -> po.ControlProblem:
    """Two strengths of sources beside the control."""
    M = p.space.M
    sources = [M @ np.exp(-8 * ((p.x - x) ** 2 + (p.y - 0.5) ** 2)) for x in (0.75, 2.25)]
    price = po.TerminalLoss(lambda u, strength: 0.5e-3 * (strength**2).sum())
    return p.make(
        kind=HeatOfTwo, objective=po.Tracking(p.case.target, M) + price, sources=torch.from_numpy(np.stack(sources))
    )


def ceiling(p: Problem) -> po.ControlProblem:
    """A penalty of 1e4 on states above 0.2."""
    lumped = np.asarray(p.space.M.sum(1)).ravel()
    return p.make(objective=po.Tracking(p.case.target, p.space.M) + Ceiling(1e4, 0.2, lumped))


#: Heat by name: how the problem is made, and settings.
HEAT: dict[str, tuple[Callable[[Problem], po.ControlProblem], dict[str, Any]]] = {
    "base": (Problem.make, {}),
    "control on a subregion": (subregion, {}),
    "boundary control": (Problem.make, {"heat_control": "boundary"}),
    "observation on a subregion": (observed_part, {}),
    "observation at 9 points": (nine_points, {}),
    "terminal loss": (terminal, {}),
    "theta 1/2": (Problem.make, {"theta": 0.5, "nx": 30, "ny": 10}),
    "advection": (advection, {}),
    "random steps": (random_steps, {}),
    "coefficients in time": (lambda p: p.make(kind=TimeVaryingHeat), {}),
    "two parameters": (two_parameters, {}),
    "bounds": (Problem.make, {}),
    "penalty on states": (ceiling, {}),
    "240x80, hypre": (Problem.make, {"nx": 240, "ny": 80}),
}

OTHERS = ("Klein-Gordon", "Klein-Gordon, Gauss-Newton", "Burgers, nu 1e-3", "Burgers, nu 1e-4")

NAMES = (*HEAT, *OTHERS)


def problem_of(name: str, nt: int, alpha: float) -> po.ControlProblem:
    """The problem of a name."""
    if name.startswith("Klein-Gordon"):
        return KleinGordonCase(KleinGordonSettings(nx=32, nt=nt, alpha=alpha)).problem
    if name.startswith("Burgers"):
        return BurgersCase(BurgersSettings(nx=64, nt=nt, alpha=alpha, nu=float(name.split()[-1]))).problem
    make, words = HEAT[name]
    settings = replace(HeatSettings(nx=15, ny=5, nt=nt, alpha=alpha), **words)
    return make(Problem(settings))


def solve(name: str, nt: int, alpha: float, precond: str, kind: str, start: str) -> dict[str, Any]:
    """The optimization by one way to solve KKT systems."""
    problem = problem_of(name, nt, alpha)
    bounds = {"lower": -1.0, "upper": 1.0} if name == "bounds" else {}
    words = {"type": kind, "start": start, "precond": precond, "gauss_newton": name.endswith("Gauss-Newton")}
    words |= {"type": "active_set", "gauss_newton": False} if bounds else {}
    begin = time.process_time()
    result = po.SQPSolver(problem, **words, **bounds).solve()  # type: ignore[arg-type]
    krylov = result.history["krylov"]
    return {
        "converged": bool(result.converged),
        "why": result.message,
        "iterations": int(result.iterations),
        "krylov": int(sum(krylov)),
        "most": int(max(krylov)),
        "cpu": time.process_time() - begin,
        "objective": float(result.objective),
    }


def _give_up(number: int, frame: Any) -> None:
    print(json.dumps(FAILED), flush=True)
    os._exit(0)


def main() -> None:
    """Solve the problem of the command line and print what was found."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGXCPU, _give_up)
    resource.setrlimit(resource.RLIMIT_CPU, (LIMIT, LIMIT + 10))
    own, name = PETSc.Options(), sys.argv[1]
    if name.endswith("hypre"):
        own.setValue("step_pc_type", "hypre")
    nt, alpha = own.getInt("nt", 64), own.getReal("alpha", 1e-3)
    defaults = {"precond": "auto", "kind": "newton", "start": "initial"}
    found = solve(name, nt, alpha, *(own.getString(key, value) for key, value in defaults.items()))
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
