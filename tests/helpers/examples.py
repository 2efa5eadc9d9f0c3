"""Small problems that between them use every feature of pdeopt."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import scipy.sparse as sp
import torch
from petsc4py import PETSc
from torch import Tensor

from pdeopt.control.constraint import TimeDependentConstraint
from pdeopt.control.controlmap import ControlMap
from pdeopt.control.objective import ControlCost, Objective, TerminalLoss, Tracking
from pdeopt.control.problem import ControlProblem
from pdeopt.control.stepjacobian import SparseStepJacobian
from pdeopt.core.arrays import index_array
from pdeopt.steps.sparse import StepMatrix, StepPattern
from pdeopt.steps.sparsity import Sparsity
from pdeopt.steps.timegrid import Steps, TimeGrid
from problems.benchmarks.small import Rod
from problems.burgers import BurgersCase, BurgersSettings


class Dense(TimeDependentConstraint):
    """Smooth, and everything depends on everything: u_old, u_new, z, p, time. Only the residual is given."""

    state_dim, param_dim = 3, 2

    def __init__(self, control_dim: int = 2) -> None:
        self.control_dim = control_dim
        draw = torch.Generator().manual_seed(7)
        n, m, P = self.state_dim, control_dim, self.param_dim
        self.K = 0.5 * torch.randn(n, 2 * n + m + P, generator=draw, dtype=torch.float64)
        self.C, self.V = (torch.randn(n, k, generator=draw, dtype=torch.float64) for k in (m, P))
        self.u_0 = torch.randn(n, generator=draw, dtype=torch.float64)
        self.state_mass = StepMatrix.constant(sp.diags([0.2, 1.0, 0.2], [-1, 0, 1], shape=(n, n)))
        self.control_mass = StepMatrix.constant(sp.diags([0.1, 0.7, 0.1], [-1, 0, 1], shape=(m, m)))
        self.param_mass = np.array([[2.0, -0.9], [-0.9, 0.7]])

    def initial_state(self, p: Tensor) -> Tensor:
        return self.u_0 + torch.sin(self.V @ p) + 0.1 * p[0] * p[1]

    def residual(self, u_old: Tensor, u_new: Tensor, z: Tensor, steps: Steps) -> Tensor:
        p = steps.p.expand(len(u_new), -1)
        mixed = torch.tanh(torch.cat([u_old, u_new, z, p], dim=1) @ self.K.T + steps.t_mid[:, None])
        return u_new - u_old + steps.dt[:, None] * (u_new + mixed * (1 + 0.3 * mixed) - z @ self.C.T)


class Coupling(Objective):
    """Couples u, z and p in every step, the initial node included: derivatives by the base class."""

    def value(self, u: Tensor, z: Tensor, steps: Steps) -> Tensor:
        return 0.5 * steps.weight * (steps.p[0] * torch.sin(u[:, 0]) + u[:, 1] * steps.p[1] ** 2 - z[:, 0]) ** 2


class ResidualLayer(TimeDependentConstraint):
    """u_new = u_old + dt tanh(W u_old), z the entries of W: explicit, and matrix-free."""

    state_dim, control_dim = 2, 4
    pattern = None

    def initial_state(self, p: Tensor) -> Tensor:
        return torch.tensor([1.0, -0.5], dtype=torch.float64)

    def residual(self, u_old: Tensor, u_new: Tensor, z: Tensor, steps: Steps) -> Tensor:
        W = z.reshape(-1, 2, 2)
        return u_new - u_old - steps.dt[:, None] * torch.tanh((W @ u_old[..., None])[..., 0])


class Heat(TimeDependentConstraint):
    """u_t - u_xx = z with equal steps: linear, one matrix for all of them."""

    def __init__(self, n: int, dt: float) -> None:
        self.state_dim = self.control_dim = n
        h = 1.0 / (n + 1)
        mass = sp.diags([h / 6, 4 * h / 6, h / 6], [-1, 0, 1], shape=(n, n), format="csr")
        stiffness = sp.diags([-1 / h, 2 / h, -1 / h], [-1, 0, 1], shape=(n, n), format="csr")
        A, B, C = mass + dt * stiffness, -mass, -dt * mass
        self.A, self.B, self.C = (StepMatrix.constant(block) for block in (A, B, C))
        self.state_mass = self.control_mass = StepMatrix.constant(mass)
        self.pattern = StepPattern(A, B, C, Sparsity.empty(3 * n, 3 * n))
        stacked = sp.csr_matrix(sp.hstack([B, A, C]))
        stacked.sort_indices()
        self.values = torch.from_numpy(stacked.data).reshape(1, -1)
        self.initial = torch.sin(torch.linspace(0, 3, n, dtype=torch.float64)) + 0.2

    def initial_state(self, p: Tensor) -> Tensor:
        return self.initial

    def residual(self, u_old: Tensor, u_new: Tensor, z: Tensor, steps: Steps) -> Tensor:
        return self.A(u_new) + self.B(u_old) + self.C(z)

    def linearize(self, u_old: Tensor, u_new: Tensor, z: Tensor, steps: Steps) -> SparseStepJacobian:
        return SparseStepJacobian(self, (u_old, u_new, z), steps, self.pattern, self.values)


def dense(nodal: bool = False, num_steps: int = 5, comm: object = None) -> ControlProblem:
    """Unequal steps, tracking at all nodes, a coupling term, and a terminal loss that uses p."""
    grid = TimeGrid(np.cumsum(0.1 + 0.05 * np.sin(np.arange(num_steps + 1))), comm)
    constraint = Dense(4 if nodal else 2)
    draw = torch.Generator().manual_seed(3)
    target = torch.randn(num_steps + 1, constraint.state_dim, generator=draw, dtype=torch.float64)

    def loss(u: Tensor, p: Tensor) -> Tensor:
        return 0.2 * torch.cosh(u[0] - p[0]) + 0.5 * (u[1] * p[1] - u[2]) ** 2 + 0.3 * p @ p

    objective = (
        Tracking(target, constraint.state_mass)
        + ControlCost(0.1, constraint.control_mass)
        + Coupling()
        + TerminalLoss(loss)
    )
    return ControlProblem(constraint, objective, grid, ControlMap.nodal(grid, 2) if nodal else None)


def layer(num_steps: int = 4, comm: object = None) -> ControlProblem:
    """A residual network: a loss on the last state alone, and a price of the weights."""
    label = torch.tensor([-0.3, 0.8], dtype=torch.float64)
    loss = TerminalLoss(lambda u, p: ((u - label) ** 2).sum() + torch.logsumexp(u, 0))
    return ControlProblem(ResidualLayer(), loss + ControlCost(0.05), TimeGrid.uniform(num_steps, 1.0, comm))


def burgers(nodal: bool = False, nx: int = 5, nt: int = 4, comm: object = None, **words) -> ControlProblem:
    """The main problem, tiny."""
    settings = BurgersSettings(nx=nx, nt=nt, control="nodal" if nodal else "interval", **words)
    return BurgersCase(settings, comm).problem


def heat(n: int = 4, num_steps: int = 5, comm: object = None) -> ControlProblem:
    """Linear-quadratic, with a target that depends on time."""
    constraint = Heat(n, 0.5 / num_steps)
    x = torch.linspace(0, 1, n + 2, dtype=torch.float64)[1:-1]
    tracking = Tracking(lambda t: torch.cos(3 * t[:, None]) * x * (1 - x), constraint.state_mass)
    objective = tracking + ControlCost(1e-2, constraint.control_mass)
    return ControlProblem(constraint, objective, TimeGrid.uniform(num_steps, 0.5, comm))


EXAMPLES: dict[str, Callable[[], ControlProblem]] = {
    "dense": dense,
    "dense nodal": lambda: dense(nodal=True),
    "layer": layer,
    "burgers": burgers,
    "burgers theta": lambda: burgers(theta=0.5, flux=1.0),
    "burgers nodal": lambda: burgers(nodal=True),
    "heat": heat,
}
#: those whose KKT matrix can be assembled
PATTERNED = [name for name in EXAMPLES if name != "layer"]


def step_point(name, seed=0):
    """A problem's constraint at random rows of its steps, with random parameters."""
    problem, draw = EXAMPLES[name](), torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    rows, c = problem.grid.n_local, problem.constraint
    steps = problem.grid.steps.with_parameters(0.5 * randn(c.param_dim))
    return c, (randn(rows, c.state_dim), randn(rows, c.state_dim), randn(rows, c.control_dim)), steps, randn


def conductor(n: int = 7, num_steps: int = 6) -> ControlProblem:
    """The field is sought that makes the rod warm in its left half; H1 prior."""
    rod = Rod(n)
    P = torch.from_numpy(rod.param_mass.toarray())
    x = rod.h * np.arange(1, n + 1)
    target = 0.15 * np.sin(np.pi * x) + 0.1 * (x < 0.5)
    prior = TerminalLoss(lambda u, p: 0.5e-4 * p @ P @ p)
    return ControlProblem(rod, Tracking(target, rod.state_mass) + prior, TimeGrid.uniform(num_steps, 1.0))


def held_and_seen_at_one_end(comm: object = None) -> ControlProblem:
    """Controls that are the same in all steps, which rank 0 owns, and a loss of the last state: the other ranks have no
    design variables, and those before the last have nothing to observe."""
    constraint, grid = Heat(3, 0.05), TimeGrid.uniform(9, 0.45, comm)
    m = constraint.control_dim
    rows, columns = grid.n_local * m, m if grid.is_first else 0
    csr = (index_array(np.arange(rows + 1)), index_array(np.arange(rows) % m), np.ones(rows))
    E = PETSc.Mat().createAIJ(((rows, 9 * m), (columns, m)), csr=csr, comm=grid.comm)
    loss = TerminalLoss(lambda u, p: 0.5 * (u - 1).square().sum())
    return ControlProblem(constraint, loss + ControlCost(1e-2, constraint.control_mass), grid, ControlMap(E))
