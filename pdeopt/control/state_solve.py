"""The nonlinear state equation over all steps: Newton's method on all of them at once, or one step after the other."""

from __future__ import annotations

import math

from torch import Tensor

from pdeopt.control.constraint import TimeDependentConstraint
from pdeopt.control.propagator import Propagator
from pdeopt.control.serial_sweeps import march
from pdeopt.control.stepjacobian import StepJacobian
from pdeopt.core.errors import SolveFailure
from pdeopt.steps.timegrid import Steps

#: An old Jacobian is kept while each correction is smaller than the last by this factor.
FAST_CONTRACTION = 0.2

#: Sizes of a last correction relative to 1 + |u|: with a new Jacobian, where the next one would be about 1e-16, and
#: with an old one.
NEWTON_TOLERANCE, CHORD_TOLERANCE = 1e-8, 1e-12

#: Most linear solves of Newton's method; where they do not do, steps are solved one by one.
MAX_CORRECTIONS = 40


def solve_steps(
    constraint: TimeDependentConstraint,
    propagator: Propagator,
    u0: Tensor,
    u: Tensor,
    z: Tensor,
    steps: Steps,
    jacobian: StepJacobian | None = None,
) -> Tensor:
    """u_1..u_N with F_i(u_{i-1}, u_i, z_i) = 0, rows of this rank, (n_local, n). Collective.

    Args:
        constraint: F.
        propagator: solves with the state Jacobian over all steps.
        u0: the initial state, (n,).
        u: a guess, (n_local, n).
        z: controls of the steps of this rank, (n_local, m).
        steps: the steps of this rank.
        jacobian: step Jacobians near the solution; used while they contract.

    Raises:
        SolveFailure: no solution found in some step; on all ranks.
    """
    found = newton_over_time(constraint, propagator, u0, u, z, steps, jacobian)
    return march(propagator.grid, constraint, u0, z, steps) if found is None else found


def newton_over_time(
    constraint: TimeDependentConstraint,
    propagator: Propagator,
    u0: Tensor,
    u: Tensor,
    z: Tensor,
    steps: Steps,
    jacobian: StepJacobian | None = None,
) -> Tensor | None:
    """As `solve_steps`, by Newton's method on all steps; None where it does not contract. Collective.

    Each linear solve is one forward substitution, without a loop over evaluations of steps. A Jacobian is kept while
    it contracts fast.
    """
    if constraint.pattern is None:
        return None  # matrix-free sweeps are loops: marching costs the same and is safer
    grid, size, fresh = propagator.grid, math.inf, False
    for _ in range(MAX_CORRECTIONS):
        u_old = grid.shift(u, u0)
        r = constraint.residual(u_old, u, z, steps)
        try:
            if jacobian is None:
                jacobian, fresh = constraint.linearize(u_old, u, z, steps), True
            du = propagator.forward(jacobian, -r)
        except SolveFailure:
            return None
        last, size = size, float(grid.max((du.abs() / (1 + u.abs())).amax()))
        if fresh and not size < 2 * last:  # also for NaN
            return None
        if not size < FAST_CONTRACTION * last and not fresh:  # the step of an old Jacobian is not worth taking
            jacobian, size = None, last
            continue
        u = u + du
        if size <= (NEWTON_TOLERANCE if fresh else CHORD_TOLERANCE):
            return u
        jacobian, fresh = (jacobian if size < FAST_CONTRACTION * last < math.inf else None), False
    return None
