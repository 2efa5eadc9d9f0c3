"""The nonlinear state equation over all steps: Newton's method on all of them at once, or on shorter and shorter
stretches, one after the other. And the adjoint of a stretch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pdeopt.control.constraint import TimeDependentConstraint
from pdeopt.control.objective import Objective
from pdeopt.control.propagator import Propagator, from_rank_to_rank
from pdeopt.control.stepjacobian import StepJacobian
from pdeopt.core.errors import SolveFailure
from pdeopt.steps.timegrid import Steps

#: Corrections with an old Jacobian that cost no more than a new one: it is kept while so many more are enough.
WORTH_A_JACOBIAN = 5

#: The first correction with a new Jacobian after which the next one is worth trying with it, relative to 1 + |u|.
SMALL_CORRECTION = 1e-2

#: The size of a last correction with a new Jacobian relative to 1 + |u|, where the next one would be about 1e-16; with
#: an old one, that of the next correction as the rate of contraction foretells it.
NEWTON_TOLERANCE, CHORD_TOLERANCE = 1e-8, 2e-13

#: Most linear solves of Newton's method; where they do not do, later steps wait for earlier ones.
MAX_CORRECTIONS = 40

#: Fewest steps that are looked at while later ones wait.
SHORTEST_WINDOW = 16

#: A correction above this, relative to 1 + |u|, is wild; and the most corrections without a step less that is.
WILD, PATIENCE = 1.0, 15


@dataclass(frozen=True)
class StateEquation:
    """F_i(u_{i-1}, u_i, z_i) = 0 for consecutive steps.

    Attributes:
        constraint, z, steps: F, the controls (batch, m), and the steps.
        old: u -> the states before the steps, both (batch, n).
        forward: (jacobian, r) -> J_u^-1 r.
        largest: of the numbers of all ranks.
    """

    constraint: TimeDependentConstraint
    z: Tensor
    steps: Steps
    old: Callable[[Tensor], Tensor]
    forward: Callable[[StepJacobian, Tensor], Tensor]
    largest: Callable[[Tensor], float]

    def newton(self, u: Tensor, jacobian: StepJacobian | None = None) -> Tensor | None:
        """The states by Newton's method on all steps at once, from a guess; None where it does not contract.

        A Jacobian near the solution may be given; one is kept while it contracts fast.
        """
        size, fresh = math.inf, False
        for _ in range(MAX_CORRECTIONS):
            u_old = self.old(u)
            try:
                if jacobian is None:
                    jacobian, fresh = self.constraint.linearize(u_old, u, self.z, self.steps), True
                    r = jacobian.residual
                else:
                    r = self.constraint.residual(u_old, u, self.z, self.steps)
                du = self.forward(jacobian, -r)
            except SolveFailure:
                return None
            last, size = size, self.largest((du.abs() / (1 + u.abs())).amax())
            rate = size / last if math.isfinite(last) else min(size / SMALL_CORRECTION, 1.0) if fresh else math.nan
            if size <= NEWTON_TOLERANCE if fresh else size * min(rate, 1.0) <= CHORD_TOLERANCE:
                return u + du
            if fresh and not size < 2 * last:  # also for NaN
                return None
            if rate >= 1 and not fresh:  # the step of an old Jacobian is not worth taking
                jacobian, size = None, last
                continue
            u = u + du
            is_slow = size * rate**WORTH_A_JACOBIAN > CHORD_TOLERANCE
            jacobian, fresh = (None if is_slow else jacobian), False
        return None

    def in_turn(self, u: Tensor) -> Tensor | None:
        """The states of one rank by Newton's method on all steps, the later ones waiting; None where it does not do.

        What a step is wrong by grows in those after it, while the first ones converge whatever the later ones do. So
        the steps from the first wild correction on are put to the state before it, and begin again from there; and
        neither those that have converged nor those far behind that step are looked at.
        """
        u, total = u.clone(), len(u)
        start, width, best, waited = 0, total, (0, 0), 0
        while waited < PATIENCE:
            rows = slice(start, start + width)
            jacobian = self.constraint.linearize(self.old(u)[rows], u[rows], self.z[rows], self.steps[rows])
            try:
                du = self.forward(jacobian, -jacobian.residual)
            except SolveFailure:
                return None
            size = self.constraint.largest((du.abs() / (1 + u[rows].abs())).amax(dim=1)).nan_to_num(nan=math.inf)
            settled, tame = (int((size <= limit).int().cumprod(0).sum()) for limit in (NEWTON_TOLERANCE, WILD))
            u[start : start + tame] += du[:tame]
            if tame == settled < width:  # wild although the state before it is known
                u[start + tame] += (WILD / size[tame] * du[tame]).nan_to_num(0.0)
                tame += 1
            is_wild, settled, tame = tame < width, start + settled, start + tame
            if settled == total:
                return u
            u[tame:] = u[tame - 1]
            ahead = 2 * (tame - settled) if is_wild else 2 * width
            width = min(total, max(SHORTEST_WINDOW, 2 ** math.ceil(math.log2(ahead))))  # few lengths, few patterns
            start = min(settled, total - width)
            best, waited = ((settled, tame), 0) if (settled, tame) > best else (best, waited + 1)
        return None


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
    grid, found = propagator.grid, None
    if constraint.pattern is not None:  # matrix-free sweeps are loops: marching costs the same and is safer
        whole = StateEquation(
            *(constraint, z, steps),
            old=lambda u: grid.shift(u, u0),
            forward=propagator.forward,
            largest=lambda size: float(grid.max(size)),
        )
        found = whole.newton(u, jacobian)
    if found is not None:
        return found
    return from_rank_to_rank(grid, u0, z, lambda before: march(constraint, before, z, steps, u))


def march(
    constraint: TimeDependentConstraint, before: Tensor, z: Tensor, steps: Steps, guess: Tensor | None = None
) -> Tensor:
    """The states of consecutive steps, (batch, n), from that before them, (n,).

    Newton's method on all of them, in turn; where that does not do, on both halves, one after the other, each halved
    again where it does not contract; single steps are solved by `advance`, with step halving.

    Args:
        constraint: whose `advance` solves a step.
        before: the state before the steps, (n,).
        z: controls, (batch, m).
        steps: the steps.
        guess: (batch, n); default the state before.

    Raises:
        SolveFailure: a step has no solution.
    """
    if len(z) == 1:
        return constraint.advance(before[None], z, steps)
    if constraint.pattern is not None:
        guess = before.expand(len(z), -1) if guess is None else guess
        if (found := _alone(constraint, before, z, steps).in_turn(guess)) is not None:
            return found
    half = -(-len(z) // 2)
    return solve_stretches(constraint, before, None, z, steps, [slice(0, half), slice(half, len(z))])


def solve_stretches(
    constraint: TimeDependentConstraint,
    before: Tensor,
    u: Tensor | None,
    z: Tensor,
    steps: Steps,
    stretches: Sequence[slice],
) -> Tensor:
    """The states of consecutive steps, (batch, n), by Newton's method on one stretch of them after the other.

    No more than the Jacobian of a stretch is kept. Where Newton's method does not contract, the stretch is marched.

    Args:
        constraint, before, z, steps: as in `march`.
        u: a guess, (batch, n); None for the state before a stretch.
        stretches: rows, in their order; all of them.

    Raises:
        SolveFailure: a step has no solution.
    """
    found = before.new_empty(len(z), len(before))
    for rows in stretches:
        part = z[rows], steps[rows]
        new = None
        if constraint.pattern is not None and len(part[0]) > 1:
            guess = before.expand(len(part[0]), -1) if u is None else u[rows]
            new = _alone(constraint, before, *part).newton(guess)
        found[rows] = march(constraint, before, *part) if new is None else new
        before = found[rows][-1]
    return found


def _alone(constraint: TimeDependentConstraint, before: Tensor, z: Tensor, steps: Steps) -> StateEquation:
    """Steps of one rank, from the state before them."""
    return StateEquation(
        *(constraint, z, steps),
        old=lambda u: torch.cat([before[None], u[:-1]]),
        forward=lambda jacobian, r: jacobian.forward_sweep(r),
        largest=lambda size: float(constraint.largest(size)),
    )


def adjoint_of_steps(
    constraint: TimeDependentConstraint,
    objective: Objective,
    before: Tensor,
    u: Tensor,
    z: Tensor,
    steps: Steps,
    following: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The adjoint of consecutive steps, A_i'lam_i + B_{i+1}'lam_{i+1} = -dJ_i/du_i, and what it says of the gradient.

    Args:
        constraint, objective: the F_i and J_i.
        before: the state before the steps, (n,).
        u: their states, which solve F_i = 0, (batch, n).
        z: controls, (batch, m).
        steps: the steps.
        following: B_{i+1}'lam_{i+1} of the step after them, (n,); zero where there is none.

    Returns:
        lam_i, (batch, n); dJ_i/dz_i + C_i'lam_i, (batch, m); dJ/dp + F_p'lam, summed over the steps, (param_dim,); and
        B_1'lam_1 of the first of them, (n,).

    Raises:
        SolveFailure: a singular step.
    """
    j_u, j_z, j_p = objective.gradient(u, z, steps)
    r = -j_u
    r[-1] -= following
    jacobian = constraint.linearize(torch.cat([before[None], u[:-1]]), u, z, steps)
    lam = jacobian.backward_sweep(r)
    w_old, _, w_z, w_p = jacobian.vjp(lam)
    return lam, j_z + w_z, j_p + w_p, w_old[0]
