"""Points with slacks and multipliers of inequalities, the merit function J - mu w.log s + rho (|F| + |c + s|), and
steps along which it falls; and the point that violates least, where none keeps all inequalities.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from petsc4py import PETSc
from torch import Tensor

from pdeopt.control.linearization import Linearization
from pdeopt.control.metric import RieszMetric
from pdeopt.control.problem import ControlProblem
from pdeopt.core.arrays import assign
from pdeopt.core.errors import SolveFailure
from pdeopt.core.monitor import Reason
from pdeopt.core.ranks import freed
from pdeopt.optimize.fullspace.newton import NewtonKKT
from pdeopt.optimize.parts.inequalities import Inequalities

#: Slacks begin at no less than this part of the scale of their bounds, and the mean of s nu at so many tolerances.
INTERIOR, LEAST_MU = 0.1, 1e3

#: Sufficient decrease of the merit function, and the part of the residuals' decrease that its slope keeps.
ARMIJO, KEPT = 1e-4, 0.1

#: A step is taken, too, where the whole residual falls to this part.
CONTRACTION = 0.9

#: The shortest step, and rounding errors of the merit function relative to J.
SHORTEST, ROUNDING = 1e-8, 1e-13

#: Multipliers that grow to so many times what they were, or so many short steps in a row, raise the doubt whether there
#: is a feasible point.
EXPLODED, SHORT, MANY = 1e6, 0.02, 4

#: Prices of violations on the path that answers it, in units of |J| over the measure; Newton steps for each, and the
#: reduction of the residual that ends them.
PRICES, STEPS_A_PRICE, REDUCTION = (1e-1, 1e0, 1e1, 1e2, 1e3), 8, 1e-4

#: Violations that a tenfold price leaves at more than this part are there to stay.
STAYS = 0.5


class Iterate(NamedTuple):
    """Unknowns, multiplier, slacks s, multipliers nu of inequalities, the linearization, and c there."""

    x: PETSc.Vec
    lam: PETSc.Vec
    slack: Tensor
    nu: Tensor
    lin: Linearization
    c: Tensor


class Step(NamedTuple):
    """Directions of an `Iterate`, and the mean of s nu that they aim at."""

    dx: PETSc.Vec
    dlam: PETSc.Vec
    ds: Tensor
    dnu: Tensor
    mu: float


class Barrier:
    """The merit function of an interior point method, and what is known of its points. Calls are collective.

    Args:
        metric: whose norms of residuals are meant.
        rows: c.
        tol: residuals far below it do not raise the penalty.

    Attributes:
        penalty: rho, which `slope` raises.
    """

    def __init__(self, metric: RieszMetric, rows: Inequalities, tol: float) -> None:
        self.metric, self.problem, self.rows, self.tol, self.penalty = metric, metric.problem, rows, tol, 0.0

    def begin(
        self, x: PETSc.Vec, lam: PETSc.Vec, lin: Linearization, mu: float | None = None, price: float = 0.0
    ) -> Iterate:
        """The first slacks and multipliers at a point, strictly inside.

        Args:
            x, lam, lin: the point.
            mu: mean of s nu; default |J| over the measure.
            price: of violations at a point of `least_violation`: multipliers that it knows.
        """
        rows, c = self.rows, self.rows.value(lin)
        slack = torch.where(rows.kept, torch.maximum(-c, INTERIOR * rows.scale), 1.0)
        mu = mu or max(abs(lin.value) / rows.measure, LEAST_MU * self.tol)
        nu = torch.where(rows.kept, torch.maximum(mu / slack, price * c / rows.scale.square()), 0.0)
        return Iterate(x, lam, slack, nu, lin, c)

    def mean(self, s: Tensor, nu: Tensor) -> float:
        """The mean of s nu."""
        return self.rows.integral(s * nu) / self.rows.measure

    def gradient(self, point: Iterate) -> PETSc.Vec:
        """L_x, a new vector."""
        g = point.lin.lagrangian_gradient(point.lam)
        g.axpy(1.0, self.rows.vjp(point.lin, self.rows.weight * point.nu))
        return g

    def longest(self, values: Tensor, direction: Tensor, part: float) -> float:
        """The largest a <= 1 with values + a direction >= (1 - part) values."""
        ratios = torch.where(self.rows.kept & (direction < 0), -direction / values, 0.0)
        return min(1.0, part / max(self.rows.largest(ratios), 1e-300))

    def search(self, here: Iterate, step: Step, curvature: float, part: float) -> tuple[Iterate | None, float]:
        """The point along a step, as far as boundary and merit function let it, and how far.

        A point is taken, too, where the residual of all equations falls; and one that misses the state equation by too
        much is tried again with its state corrected, as in `Merit.corrected`. None where there is no such point.

        Args:
            here: where the step begins.
            step: the step.
            curvature: dx'W dx.
            part: of the way to the boundary of s, nu > 0.
        """
        size, to_nu = self.longest(here.slack, step.ds, part), self.longest(here.nu, step.dnu, part)
        slope = min(self._slope(here, step, curvature), 0.0)
        start, residual = self._merit(here, step.mu), self._residual(here, step.mu)
        rounding, found = ROUNDING * abs(here.lin.value), math.inf
        while size > SHORTEST:
            trial: Iterate | None = self._ahead(here, step, size, to_nu)
            for _ in range(2):
                if trial is None or not math.isfinite(found := self._merit(trial, step.mu)):
                    break
                is_lower = found <= start + ARMIJO * size * slope + rounding
                if is_lower or self._residual(trial, step.mu) <= CONTRACTION * residual:
                    return trial, size
                trial = self._corrected(trial)
            size *= 0.5
        return None, size

    def _ahead(self, here: Iterate, step: Step, size: float, to_nu: float) -> Iterate:
        x, lam = here.x.copy(), here.lam.copy()
        x.axpy(size, step.dx)
        lam.axpy(to_nu, step.dlam)
        lin = self.problem.at(x)
        return Iterate(x, lam, here.slack + size * step.ds, here.nu + to_nu * step.dnu, lin, self.rows.value(lin))

    def _slope(self, here: Iterate, step: Step, curvature: float) -> float:
        """The derivative of the merit function along a step, after the penalty was raised for descent."""
        violation = self._violation(here)
        descent = here.lin.gradient.dot(step.dx) - step.mu * self.rows.integral(step.ds / here.slack)
        if violation > 1e-2 * self.tol:
            needed = (descent + 0.5 * curvature) / ((1.0 - KEPT) * violation)
            self.penalty = self.penalty if self.penalty >= needed else 2.0 * needed
        return float(descent - self.penalty * violation)

    def _violation(self, point: Iterate) -> float:
        """|F| + |c + s|."""
        return self.metric.feasibility(point.lin) + self.rows.norm(point.c + point.slack)

    def _merit(self, point: Iterate, mu: float) -> float:
        inside = mu * self.rows.integral(point.slack.log())
        return point.lin.value - inside + self.penalty * self._violation(point)

    def _residual(self, point: Iterate, mu: float) -> float:
        """|(L_x, F, c + s, s nu - mu)|."""
        products = torch.where(self.rows.kept, point.slack * point.nu - mu, 0.0)
        equations = self.metric.dual_norm(self.gradient(point)), self.metric.feasibility(point.lin)
        return math.hypot(*equations, self.rows.norm(point.c + point.slack), self.rows.norm(products))

    def _corrected(self, point: Iterate) -> Iterate | None:
        """The point with its state moved toward the equations by one sweep over time."""
        layout = self.problem.layout
        try:
            du = self.problem.propagator.forward(point.lin.jacobian, -layout.rows(point.lin.residual))
        except SolveFailure:
            return None
        x, move = point.x.copy(), point.x.duplicate()
        assign(move, du, torch.zeros(layout.design_size, dtype=torch.float64))
        x.axpy(1.0, move)
        lin = self.problem.at(x)
        return point._replace(x=x, lin=lin, c=self.rows.value(lin))


class Feasibility:
    """Whether there is a feasible point: a doubt that multipliers and steps raise, and its answer. Collective.

    Args:
        rows: c.
        x, lam: from where the answer is looked for.
        tol: violations below it are none.
        words: of `NewtonKKT`.

    Attributes:
        is_answered: whether the doubt was raised, and answered once.
        first: the largest multiplier at the start.
    """

    def __init__(self, rows: Inequalities, x: PETSc.Vec, lam: PETSc.Vec, tol: float, words: Mapping[str, Any]) -> None:
        self.rows, self.problem, self.tol, self._words = rows, rows.problem, tol, words
        self._start, self._short = (x.copy(), lam.copy()), 0
        self.is_answered, self.first = False, math.inf

    def is_violated(self, point: Iterate) -> bool:
        """Whether an inequality is."""
        return self.rows.largest(point.c) > self.tol

    def is_doubtful(self, point: Iterate, step_size: float) -> bool:
        """Whether it is in doubt, for the first time, that there is a feasible point: see `EXPLODED`."""
        self._short = self._short + 1 if step_size < SHORT else 0
        grows = self._short >= MANY or self.rows.largest(point.nu) > EXPLODED * self.first
        return grows and not self.is_answered and self.is_violated(point)

    def is_hopeless(self, point: Iterate) -> bool:
        """Whether multipliers go to infinity although there was an answer."""
        return self.is_answered and self.is_violated(point) and self.rows.largest(point.nu) > EXPLODED**2 * self.first

    def least_violation(self, objective: float) -> tuple[PETSc.Vec, PETSc.Vec, float, bool]:
        """The point that violates least, its multiplier, the price of violations, and whether it proves infeasibility.

        The path of min J + gamma/2 |max(c / scale, 0)|^2 subject to F = 0 is followed for the `PRICES` gamma
        (`Inequalities.penalty`). Where violations stay, max(c, 0) at its end is the proof: a multiplier that solves
        F'^T lam + c'^T w nu = 0 with nu.c > 0, up to J'/gamma.

        Args:
            objective: J, whose size is the unit of the prices.
        """
        self.is_answered, given, rows = True, self.problem, self.rows
        (x, lam), left, missed = self._start, [math.inf], math.inf
        unit = max(abs(objective), self.tol) / rows.measure
        for price in PRICES:
            priced = given.objective + rows.penalty(price * unit)
            problem = ControlProblem(given.constraint, priced, given.grid, given.control_map, given.initial_state)
            method = NewtonKKT(problem, x, lam, **self._words)
            with freed(method), suppress(SolveFailure):
                missed = _solve_roughly(method)
            left.append(rows.norm(torch.relu(rows.value(given.at(x))) / rows.scale))
        return x, lam, PRICES[-1] * unit, left[-1] > max(STAYS * left[-2], missed)


def _solve_roughly(method: NewtonKKT) -> float:
    """A few steps of a method; |F| at their end."""
    reason, first = Reason.ITERATING, math.inf
    for steps in range(STEPS_A_PRICE + 1):
        record = method.record(steps)
        size = math.hypot(record.optimality, record.feasibility)
        first = size if steps == 0 else first
        if reason != Reason.ITERATING or size <= REDUCTION * first or steps == STEPS_A_PRICE:
            break
        reason = method.step()
    return record.feasibility
