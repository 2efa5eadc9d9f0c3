"""The merit function of Newton's method in full space, J + lam.F + rho |F|^2, and its trial points."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from petsc4py import PETSc

from pdeopt.control.linearization import Linearization
from pdeopt.control.metric import RieszMetric
from pdeopt.core.arrays import assign
from pdeopt.core.errors import SolveFailure
from pdeopt.optimize.parts.linesearch import ROUNDING

#: A residual |F| below this is no reason to raise the penalty: where dlam.F and |F|^2 are small, their quotient is not.
NO_VIOLATION = 1e-8

#: Most corrections of the state at a trial point.
MAX_CORRECTIONS = 6

#: The part of what the merit function is above its model that must be J's for kinks to be the reason.
OF_KINKS = 0.5


class Point(NamedTuple):
    """Unknowns [u | z | p], multiplier, and the linearization there."""

    x: PETSc.Vec
    lam: PETSc.Vec
    lin: Linearization


def augmented_lagrangian(metric: RieszMetric, lin: Linearization, lam: PETSc.Vec, penalty: float) -> float:
    """J + lam.F + penalty |F|^2 at a linearization, in the metric's norm of residuals."""
    return float(lin.value + lam.dot(lin.residual) + penalty * metric.feasibility(lin) ** 2)


class Merit:
    """J + lam.F + rho |F|^2 of points.

    Args:
        metric: whose norm of residuals is meant.
        penalty: rho, which `slope` raises.
    """

    def __init__(self, metric: RieszMetric, penalty: float) -> None:
        self.metric, self.problem, self.penalty = metric, metric.problem, penalty

    def __call__(self, point: Point) -> float:
        """The value at a point."""
        return augmented_lagrangian(self.metric, point.lin, point.lam, self.penalty)

    def residual(self, point: Point) -> float:
        """|(L_x, F)|, which a whole step of Newton's method shortens near a solution."""
        optimality = self.metric.dual_norm(point.lin.lagrangian_gradient(point.lam))
        return math.hypot(optimality, self.metric.feasibility(point.lin))

    def slope(self, lin: Linearization, dlam: PETSc.Vec, curvature: float) -> float:
        """The derivative along a step of Newton's method, after the penalty was raised for descent.

        Args:
            lin: where the step begins.
            dlam: its multiplier.
            curvature: dx.W dx.
        """
        coupling, violation = dlam.dot(lin.residual), self.metric.feasibility(lin) ** 2
        needed = (2.0 * coupling - 0.5 * curvature) / (2.0 * violation) if violation > NO_VIOLATION**2 else 0.0
        if self.penalty < needed:
            self.penalty = 2.0 * needed
        return float(-curvature + 2.0 * coupling - 2.0 * self.penalty * violation)

    def is_rounding(self, lin: Linearization, slope: float) -> bool:
        """Whether a change by the slope is lost in rounding errors of the merit function, as `Backtracking` counts."""
        return abs(slope) <= ROUNDING * max(1.0, abs(lin.value))

    def ahead(self, here: Point, size: float, dx: PETSc.Vec, dlam: PETSc.Vec) -> Point:
        """The point at a part of a step."""
        x, lam = here.x.copy(), here.lam.copy()
        x.axpy(size, dx)
        lam.axpy(size, dlam)
        return Point(x, lam, self.problem.at(x))

    def corrected(self, point: Point, enough: float) -> Point:
        """The point with its state moved toward the equations, u <- u - F_u^-1 F, by a sweep over time each.

        Second-order corrections against the Maratos effect: where a step misses the equations by too much, the search
        would shorten it (R. Fletcher, 1982; J. Nocedal, S. J. Wright, Numerical Optimization, 2006, section 15.6).

        Args:
            point: a trial point.
            enough: corrections end where the merit function is at most this, or no longer falls.
        """
        layout, value = self.problem.layout, self(point)
        for _ in range(MAX_CORRECTIONS):
            if value <= enough or not math.isfinite(value):
                break
            try:
                du = self.problem.propagator.forward(point.lin.jacobian, -layout.rows(point.lin.residual))
            except SolveFailure:
                break
            x, step = point.x.copy(), point.x.duplicate()
            assign(step, du, torch.zeros(layout.design_size, dtype=torch.float64))
            x.axpy(1.0, step)
            nearer = Point(x, point.lam, self.problem.at(x))
            last, value = value, self(nearer)
            if not value < last:
                break
            point = nearer
        return point

    def has_kinks(self, here: Point, dx: PETSc.Vec, whole: Point, model: float) -> bool:
        """Whether J makes most of what the merit function at a full step is above its model: J is no parabola.

        Args:
            here: where the step begins.
            dx: the step.
            whole: the point after it.
            model: of the merit function there.
        """
        excess = self(whole) - model
        if not (math.isfinite(excess) and excess > abs(model) * 1e-12):
            return False
        g = here.lin.lagrangian_gradient(self.problem.create_multiplier())
        curvature = dx.dot(here.lin.hvp(None, dx, dx.duplicate()))
        above = whole.lin.value - here.lin.value - g.dot(dx) - 0.5 * curvature
        return bool(above > OF_KINKS * excess)
