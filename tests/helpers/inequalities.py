"""Problems with inequalities on states and paths, and their optima."""

import math

import numpy as np
import scipy.sparse as sp
import torch
from mpi4py import MPI

import pdeopt as po

INF = math.inf


class VanDerPol(po.TimeDependentConstraint):
    """The midpoint rule."""

    state_dim, control_dim = 2, 1

    def initial_state(self, p):
        return torch.tensor([0.0, 1.0], dtype=torch.float64)

    def residual(self, u_old, u_new, z, steps):
        x, y = (0.5 * (u_old + u_new)).chunk(2, dim=1)
        return u_new - u_old - steps.dt[:, None] * torch.cat([(1 - y**2) * x - y + z, x], dim=1)


class ReactionDiffusion(po.TimeDependentConstraint):
    """The README's."""

    def __init__(self, n):
        h = 1 / (n + 1)
        self.state_dim = self.control_dim = n
        self.state_mass = self.control_mass = h * sp.eye(n)
        self.h, self.x = h, h * np.arange(1, n + 1)
        self.second = po.StepMatrix.constant(sp.diags([1.0, -2.0, 1.0], [-1, 0, 1], (n, n)) / h**2)

    def initial_state(self, p):
        return torch.zeros(self.state_dim, dtype=torch.float64)

    def residual(self, u_old, u_new, z, steps):
        f = 0.02 * self.second(u_new) + u_new * (1 - u_new) + z
        return self.h * (u_new - u_old - steps.dt[:, None] * f)


def van_der_pol(steps=200, comm=None):
    objective = po.Tracking(np.zeros(2)) + po.ControlCost(1.0)
    return po.ControlProblem(VanDerPol(), objective, po.TimeGrid.uniform(steps, 10.0, comm))


def reaction_diffusion(n=63, steps=100):
    constraint = ReactionDiffusion(n)
    objective = po.Tracking(np.sin(np.pi * constraint.x), constraint.state_mass)
    objective = objective + po.ControlCost(1e-3, constraint.control_mass)
    return po.ControlProblem(constraint, objective, po.TimeGrid.uniform(steps, T=1.0))


def iterations(result):
    """Those with inequalities."""
    return sum("without" not in note for note in result.history["note"]) - 1


def mixed(u, z, steps):
    return u[:, 0] + z[:, 0] - 0.7


#: Problem, inequalities, and the optimum of IPOPT.
CASES = {
    "bound": (van_der_pol, {"state_lower": [-0.25, -INF]}, 1.8082076166),
    "mixed": (van_der_pol, {"state_lower": [-0.25, -INF], "path": mixed}, 1.8084422625),
    "both": (reaction_diffusion, {"state_upper": 0.5, "lower": -1, "upper": 3}, 0.0576754623),
}


def inequalities():
    """Bounds on states and a path by both methods, on ranks over time: the iterates of one rank. Collective."""
    for method in ("interior", "moreau_yosida"):
        problems = van_der_pol(30), van_der_pol(30, MPI.COMM_SELF)
        found, expected = (po.solve(each, method, state_lower=[-0.25, -INF], path=mixed) for each in problems)
        assert found.converged and found.message == expected.message
        assert found.history["note"] == expected.history["note"]
        for name in ("objective", "optimality", "feasibility"):
            columns = (result.history[name] for result in (found, expected))
            assert np.allclose(*columns, rtol=1e-6, atol=1e-9), (method, name)
        assert abs(found.objective - expected.objective) <= 1e-10, (method, found.objective, expected.objective)
        own, whole = problems[0].grid, problems[1].unpack(expected)[0]
        assert np.allclose(problems[0].unpack(found)[0], whole[own.begin : own.end], atol=1e-7)
