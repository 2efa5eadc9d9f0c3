"""A window of steps at a point: the value of its block, and its reduced gradient."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pdeopt.control.linearization import Linearization
from pdeopt.control.metric import RieszMetric
from pdeopt.control.problem import ControlProblem
from pdeopt.control.state_solve import solve_steps
from pdeopt.control.time_windows import window_from
from pdeopt.core.arrays import assign
from pdeopt.optimize.splitting.splitconstraint import SplitWork
from pdeopt.steps.innerproduct import InnerProduct

#: What the other windows say at the start and at the end, (n,) each; None where nothing is coupled.
Pulls = tuple[Tensor | None, Tensor | None]


class WindowPoint:
    """J_window(u, z) + sum over its ends of <c, x>_M + beta |x|_M^2, x the state there, as a function of v and z.

    v is the state at which the window starts, where another one ends; the states u follow from v and z. Not collective.

    Args:
        problem: of all steps, with one control a step and without global parameters.
        begin, end: numbers of steps, 0 <= begin < end <= N.
        work: is counted on.

    Attributes:
        problem: of the window.
        starts, ends: whether another window goes before it, and after it.
        v, u, z, mu: start (n,), states (k, n), controls (k, m) and multipliers of the steps (k, n).
        metric, mass: norms of the window, and M as a form.
    """

    def __init__(self, problem: ControlProblem, begin: int, end: int, work: SplitWork) -> None:
        self.begin, self.end, self.work = begin, end, work
        self.starts, self.ends = begin > 0, end < problem.grid.num_steps
        start = _Start(problem.initial_state(torch.zeros(0, dtype=torch.float64)))
        self._start, self.problem = start, window_from(problem, begin, end, lambda: start.v)
        self.u, self.z = start.v.expand(end - begin, -1).clone(), torch.zeros(end - begin, problem.m).double()
        self.mu = torch.zeros_like(self.u)
        self.metric = RieszMetric(self.problem)
        self.mass = InnerProduct(torch.ones(1, dtype=torch.float64), self.problem.state_mass)
        self._entries = float(self.problem.constraint.pattern.jacobian.nnz * (end - begin))  # type: ignore[union-attr]
        self._lin: Linearization | None = None

    @property
    def v(self) -> Tensor:
        return self._start.v

    @property
    def lin(self) -> Linearization:
        """The problem at the present point."""
        if self._lin is None:
            u, z = self.problem.create_multiplier(), self.problem.create_design()
            assign(u, self.u)
            assign(z, self.z)
            self._lin = self.problem.at(self.problem.join(u, z))
            self.work.products += 2 * self._entries
        return self._lin

    # -- the block's function --------------------------------------------------------------------------------

    def objective(self) -> float:
        """The objective of the window's steps; that of t_0 is counted in the first window."""
        lin = self.lin
        value = float(self.problem.objective.value(lin.u, lin.z_step, lin.steps).sum())
        return value if self.starts else value + float(lin.initial.value(lin.p))

    def value(self, pulls: Pulls, beta: float) -> float:
        """What `minimize` minimizes.

        Args:
            pulls: c at the start and at the end, (n,) each; None where nothing is coupled.
            beta: the penalty.
        """
        total = self.objective()
        for x, c in zip((self.v, self.u[-1]), pulls):
            if c is not None:
                total += float(torch.dot(self.mass.multiply(x[None])[0], c + beta * x))
        return total

    def gradient(self, pulls: Pulls, beta: float) -> tuple[Tensor, Tensor]:
        """The reduced gradient in v and z; sets the multipliers. Raises `SolveFailure`."""
        lin, (start, end) = self.lin, pulls
        g_u, g_z, _ = lin.gradient_fields
        if end is not None:
            g_u = g_u.clone()
            g_u[-1] += self.mass.multiply((end + 2 * beta * self.u[-1])[None])[0]
        self.mu = self.problem.propagator.backward(lin.jacobian, -g_u)
        w_old, _, w_z, _ = lin.jacobian.vjp(self.mu)
        self.work.products += 2 * self._entries
        g_v = torch.zeros_like(w_old[0])
        if start is not None:
            g_v = w_old[0] + self.mass.multiply((start + 2 * beta * self.v)[None])[0]
        return g_v, g_z.reshape(self.z.shape) + w_z

    def norm(self, g_v: Tensor, g_z: Tensor) -> float:
        """The dual norm of a reduced gradient."""
        square = (g_v[None] * self.mass.solve(g_v[None])).sum() + (g_z * self.metric.control.solve(g_z)).sum()
        return math.sqrt(max(float(square), 0.0)) if math.isfinite(float(square)) else math.nan

    # -- moves -----------------------------------------------------------------------------------------------

    def move(self, v: Tensor, z: Tensor, guess: Tensor, near: Linearization | None = None) -> None:
        """Go to v and z, and to the states that follow from them.

        Args:
            v, z: the point; v only counts after the first window.
            guess: of the states, (k, n).
            near: a point nearby.

        Raises:
            SolveFailure: no states are found; the window then stands anywhere.
        """
        self._start.v, self.z, self._lin = v if self.starts else self.v, z, None
        constraint, steps = self.problem.constraint, self.problem.grid.steps
        jacobian = None if near is None else near.jacobian
        self.u = solve_steps(constraint, self.problem.propagator, self.v, guess, z, steps, jacobian)

    def point(self) -> tuple[Any, ...]:
        """Where the window stands, for `back`."""
        return self.v, self.u, self.z, self.mu, self._lin

    def back(self, point: tuple[Any, ...]) -> None:
        """Stand there again."""
        self._start.v, self.u, self.z, self.mu, self._lin = point


class _Start:
    """The state at which a window starts, as its problem looks it up."""

    def __init__(self, v: Tensor) -> None:
        self.v = v.clone()
