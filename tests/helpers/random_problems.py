"""Small control problems with everything drawn: sizes, masses, residuals, parameters, maps, losses, times.

Each is stated twice: with pdeopt's classes, and as formulas of plain torch that a loop over the steps adds up.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
import torch
from petsc4py import PETSc
from torch import Tensor

from pdeopt.control.constraint import TimeDependentConstraint
from pdeopt.control.controlmap import ControlMap
from pdeopt.control.objective import ControlCost, Objective, TerminalLoss, Tracking
from pdeopt.control.problem import ControlProblem
from pdeopt.steps.sparse import StepMatrix
from pdeopt.steps.timegrid import Steps, TimeGrid
from tests.helpers.oracle import Oracle


@dataclass(frozen=True)
class Choice:
    """What a problem is made of."""

    n: int
    m: int
    params: int
    steps: int
    seed: int
    terms: str  # of the residual: linear, tanh, product, sine
    masses: str  # none, dense, sparse, step: how the forms are given
    controls: str  # one a step, nodal, shared
    matrix_free: bool
    target: str  # nodes, all, function
    observed: bool
    coupled: bool
    terminal: bool


#: What each choice may be; `random_problem` takes any combination.
TERMS, MASSES, CONTROLS, TARGETS = (
    ("linear", "tanh", "product", "sine"),
    ("none", "dense", "sparse", "step"),
    ("one a step", "nodal", "shared"),
    ("nodes", "all", "function"),
)


class RandomConstraint(TimeDependentConstraint):
    """M (u_new - u_old) + dt (A u_new + B u_old + g(K [u_old, u_new, z, p], t) - C z - V p) = 0, u_0 = a + sin(G p)."""

    def __init__(self, choice: Choice, draw: torch.Generator) -> None:
        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=draw, dtype=torch.float64)

        n, m, P = choice.n, choice.m * (2 if choice.controls == "nodal" else 1), choice.params
        self.state_dim, self.control_dim, self.param_dim, self.terms = n, m, P, choice.terms
        self.A, self.B = 0.3 * randn(n, n) + torch.eye(n), 0.3 * randn(n, n)
        self.K, self.C = 0.3 * randn(n, 2 * n + m + P), randn(n, m)
        self.V, self.G, self.a = randn(n, P), randn(n, P), randn(n)
        self.M, self.Q = (_spd(k, draw) for k in (n, m))
        self.state_mass, self.control_mass = (_given(form, choice.masses) for form in (self.M, self.Q))
        if choice.masses == "none":
            self.M, self.Q = torch.eye(n, dtype=torch.float64), torch.eye(m, dtype=torch.float64)

    def initial_state(self, p: Tensor) -> Tensor:
        return self.a + torch.sin(self.G @ p)

    def residual(self, u_old: Tensor, u_new: Tensor, z: Tensor, steps: Steps) -> Tensor:
        p = steps.p.expand(len(u_new), -1)
        k = torch.cat([u_old, u_new, z, p], dim=1) @ self.K.T + steps.t_mid[:, None]
        g = {
            "linear": lambda: 0 * k,
            "tanh": lambda: torch.tanh(k),
            "product": lambda: 0.1 * u_new * u_old + 0.1 * z[:, :1] * u_new,
            "sine": lambda: torch.sin(k) * torch.cos(k.roll(1, dims=1)),
        }[self.terms]()
        force = u_new @ self.A.T + u_old @ self.B.T + g - z @ self.C.T - p @ self.V.T
        return (u_new - u_old) @ self.M.T + steps.dt[:, None] * force


class MatrixFree(RandomConstraint):
    """The same without a pattern."""

    pattern = None  # type: ignore[assignment]


class Coupling(Objective):
    """Couples state, control and parameters in every step."""

    def value(self, u: Tensor, z: Tensor, steps: Steps) -> Tensor:
        return coupling(u, z, steps.p, steps.weight)


def coupling(u: Tensor, z: Tensor, p: Tensor, weight: Tensor) -> Tensor:
    return 0.5 * weight * (torch.sin(u).sum(-1) - z.sum(-1) * u[..., 0] + p.sum()) ** 2


def terminal(u: Tensor, p: Tensor) -> Tensor:
    return torch.cosh(0.5 * u).sum() + 0.5 * (u.sum() - p.sum()) ** 2 + 0.3 * p @ p


class Formulas(Oracle):
    """The objective of a random problem written down once more, apart from pdeopt's."""

    def __init__(self, problem: ControlProblem, choice: Choice, times: Tensor, d: Tensor, seen: Tensor) -> None:
        super().__init__(problem)
        self.choice, self.times, self.d, self.seen = choice, times, d, seen
        self.M, self.Q = problem.constraint.M, problem.constraint.Q  # type: ignore[attr-defined]

    def J(self, x: Tensor) -> Tensor:
        u, z, p = self._parts(x)
        dt = self.times.diff()
        zero = torch.zeros(1, dtype=torch.float64)
        w = 0.5 * (torch.cat([zero, dt]) + torch.cat([dt, zero]))  # the trapezoidal rule
        total = torch.zeros((), dtype=torch.float64)
        for i in range(len(u)):
            e = u[i, self.seen] - self.d[i]
            total = total + 0.5 * w[i] * e @ self.M[self.seen][:, self.seen] @ e
            control = z[i - 1] if i else torch.zeros_like(z[0])
            if self.choice.coupled:
                total = total + coupling(u[i], control, p, w[i])
            if i:
                total = total + 0.05 * dt[i - 1] * control @ self.Q @ control
        return total + terminal(u[-1], p) if self.choice.terminal else total

    def metric(self) -> Tensor:
        dt = self.times.diff()
        states, controls = (torch.block_diag(*(h * form for h in dt)) for form in (self.M, self.Q))
        return torch.block_diag(states, self.E.T @ controls @ self.E, torch.eye(self.choice.params, dtype=dt.dtype))


def random_problem(choice: Choice) -> tuple[ControlProblem, Formulas]:
    """The problem of a choice, and its formulas."""
    draw = torch.Generator().manual_seed(choice.seed)
    kind = MatrixFree if choice.matrix_free else RandomConstraint
    constraint = kind(choice, draw)
    dt = 0.05 + 0.2 * torch.rand(choice.steps, generator=draw, dtype=torch.float64)
    times = torch.cat([torch.rand(1, generator=draw, dtype=torch.float64), dt]).cumsum(0)
    grid = TimeGrid(times.numpy())
    seen = (
        torch.randperm(choice.n, generator=draw)[: max(1, choice.n - 1)] if choice.observed else torch.arange(choice.n)
    )
    table = torch.randn(choice.steps + 1, len(seen), generator=draw, dtype=torch.float64)
    target: object = table
    if choice.target == "all":
        table = table[:1].expand(choice.steps + 1, -1)
        target = table[0].numpy()
    elif choice.target == "function":
        rates = torch.arange(1.0, len(seen) + 1, dtype=torch.float64)
        table, target = torch.cos(times[:, None] * rates), lambda t: torch.cos(t[:, None] * rates)
    mass = None if choice.masses == "none" else constraint.M[seen][:, seen]
    observe = seen.numpy() if choice.observed else None
    objective: Objective = Tracking(target, _given(mass, choice.masses), observe)  # type: ignore[arg-type]
    objective = objective + ControlCost(0.1, constraint.control_mass)
    if choice.coupled:
        objective = objective + Coupling()
    if choice.terminal:
        objective = objective + TerminalLoss(terminal)
    problem = ControlProblem(constraint, objective, grid, _map(choice, grid, draw))
    return problem, Formulas(problem, choice, times, table, seen)


def _map(choice: Choice, grid: TimeGrid, draw: torch.Generator) -> ControlMap | None:
    if choice.controls == "nodal":
        return ControlMap.nodal(grid, choice.m)
    if choice.controls == "one a step":
        return None
    columns = max(1, choice.steps * choice.m // 2)  # fewer than rows: steps share their controls
    E = torch.randn(choice.steps * choice.m, columns, generator=draw, dtype=torch.float64).numpy()
    return ControlMap(PETSc.Mat().createDense(E.shape, array=np.asfortranarray(E)).convert("aij"))


def _spd(k: int, draw: torch.Generator) -> Tensor:
    X = torch.randn(k, k, generator=draw, dtype=torch.float64)
    return X @ X.T / k + 0.5 * torch.eye(k, dtype=torch.float64)


def _given(form: Tensor | None, how: str) -> object:
    if form is None or how == "none":
        return None
    return {
        "dense": form.numpy,
        "sparse": lambda: sp.csr_matrix(form.numpy()),
        "step": lambda: StepMatrix.constant(sp.csr_matrix(form.numpy())),
    }[how]()
