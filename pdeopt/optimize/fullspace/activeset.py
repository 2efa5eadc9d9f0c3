"""Bounds on the design variables, lower <= [z | p] <= upper, by the primal-dual active set strategy in full space.

M. Hintermueller, K. Ito, K. Kunisch, The primal-dual active set strategy as a semismooth Newton method, SIAM J.
Optim. 13 (2002) 865-888. With the Lagrangian L = J + lam.F the optimality system is

    L_u = 0,   L_d + mu = 0,   F = 0,   mu = max(0, mu + c(d - upper)) + min(0, mu + c(d - lower)),   d = [z | p].

A step fixes the variables of the active sets, mu + c(d - upper) > 0 and mu + c(d - lower) < 0, at their bounds, and
is Newton's for the others, which mu leaves alone. mu = -L_d is no unknown of its own. It is an integral and d a
function: c is the lumped inner product of the design times `THRESHOLD_FACTOR` and its price, 1'J_zz 1 / 1'R_zz 1 for
the controls and the same for p.

Where control is so cheap that full steps throw variables from bound to bound, the price is raised and lowered again:
the path of solutions for J + sigma |z|^2 / 2 is followed to sigma = 0, each solution the start of the next. (For large
prices the strategy converges from anywhere: the first paper, section 4. Paths: M. Hintermueller, K. Kunisch,
Path-following methods for a class of constrained minimization problems in function space, SIAM J. Optim. 17, 2006.)

Where the problem is too nonlinear for full steps, quadratic programs take over, each solved by the same strategy:
M. Hintermueller, M. Hinze, A SQP-semismooth Newton-type algorithm applied to control of the instationary
Navier-Stokes system subject to control constraints, SIAM J. Optim. 16 (2006) 1177-1200.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Any

import torch
from petsc4py import PETSc
from torch import Tensor

from pdeopt.control.linearization import Linearization
from pdeopt.control.objective import ControlCost
from pdeopt.control.problem import ControlProblem
from pdeopt.core.arrays import assign, copy
from pdeopt.core.monitor import ControlResult, History, Reason, Record
from pdeopt.core.ranks import freed
from pdeopt.kkt.operator import Hessian
from pdeopt.optimize.fullspace.newton import NewtonKKT
from pdeopt.optimize.parts.bounds import Bounds

#: The smaller c, the more multipliers of the wrong sign move a variable from one bound to the other at once, and where
#: control is cheap, all of them, set after set (measured: at 1e2 and 1e3; at 1e6 sets settle in more steps).
THRESHOLD_FACTOR = 1e4

#: A full step must bring the residual of the equations below this part of the smallest residual so far.
CONTRACTION = 0.5

#: A residual so many times the smallest one says that active sets do not settle by full steps.
GROWTH = 30.0

#: The prices of control along a path, in parts of its own, and the most active sets for each.
PATH, MAX_ON_PATH = (1e4, 1e3, 1e2, 1e1), 20

#: The part of the design's size that its bounds and equations may be missed by before the price is lowered.
ON_PATH = 0.1

#: Active sets in one quadratic program.
MAX_SETS = 50


class ActiveSetKKT(NewtonKKT):
    """Semismooth Newton: a step solves the KKT system of `NewtonKKT` with the active variables at their bounds.

    Full steps are taken, on quadratic problems to the end. They stop where active sets come back, or where L_u, F and
    L_d of the free variables do not contract. From there on, with d moved into the box, a step is that of a quadratic
    program: active sets of one linearization until they settle. It keeps to the bounds, and the line search of
    `NewtonKKT` serves; the merit function's derivative gains -mu.dd <= 0. Results are in the box to the last bit.

    Args:
        problem, x, lam: the start; both vectors are moved.
        bounds: of the design variables of this rank.
        rtol: relative tolerance of the KKT solves.
        outer: prefix of the linear solver's options, before `kkt_`.
        precond: its default preconditioner; see `KKTSolver`.
        kkt: settings of the linear solver, by the names of `KKTSettings`.

    Attributes:
        side: of the design variables of this rank: 1 at the upper bound, -1 at the lower one, 0 free.
        bound_multiplier: mu of these, an integral; zero where its sign is wrong.
    """

    kind = "active_set"

    def __init__(
        self,
        problem: ControlProblem,
        x: PETSc.Vec,
        lam: PETSc.Vec,
        bounds: Bounds,
        *,
        rtol: float = 1e-8,
        outer: str = "sqp_",
        precond: str = "auto",
        kkt: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(problem, x, lam, rtol=rtol, outer=outer, precond=precond, kkt=kkt)
        self.bounds, self._prices = bounds, self._prices_at_start()
        self._c = self._threshold()
        self._is_sqp, self._best = False, math.inf
        self._seen, self._sets, self._settled = list[bytes](), 0, True
        self._may_follow, self._on_path = True, 0

    def _design_parts(self) -> tuple[slice, slice]:
        """The controls and the parameters of the flat design."""
        controls = self.problem.control_size
        return slice(0, controls), slice(controls, None)

    def _prices_at_start(self) -> list[float]:
        """1'J 1 / 1'R 1 of controls and of parameters."""
        lumped, prices = copy(self.metric.design_lumped()), []
        for part in self._design_parts():
            ones = torch.zeros_like(lumped)
            ones[part] = 1.0
            x, size = self._primal(ones), float(self.problem.grid.sum(lumped[part].sum()))
            prices.append(float(x.dot(self.lin.hvp(None, x, x.duplicate())) / size) if size > 0 else 1.0)
        return prices

    def _threshold(self) -> Tensor:
        """c, (design_size,)."""
        c = copy(self.metric.design_lumped())
        for part, price in zip(self._design_parts(), self._prices):
            c[part] *= THRESHOLD_FACTOR * (price if price > 0 else 1.0)
        return c

    def record(self, iteration: int) -> Record:
        self._evaluate()
        gradient = self._replaced(self._gradient, self._design(self._gradient) + self.bound_multiplier)
        optimality, miss = self.metric.dual_norm(gradient), self.bounds.miss(self._design(self.x), self.side)
        feasibility = math.hypot(self._feasibility, self.metric.norm(self._primal(miss)))
        self._residual = math.hypot(feasibility, optimality)
        self._best = min(self._best, self._residual)
        krylov, self._on_path = self._on_path + sum(s.take_iterations() for s in self._solvers.values()), 0
        count = int(self.problem.grid.sum(float(self.side.count_nonzero())))
        size = self.metric.dual_norm(self._primal(self.bound_multiplier))
        sets = [f"sets {self._sets}"] if self._sets else []
        note = ", ".join([f"{count} active", f"multiplier {size:.2e}", *sets, *filter(None, [self._note])])
        return Record(iteration, self.lin.value, feasibility, optimality, self.step_size, krylov, note)

    def _evaluate(self) -> None:
        """Gradient, residual and active sets at the point."""
        self._gradient = self.lin.lagrangian_gradient(self.lam)
        self._feasibility = self.metric.feasibility(self.lin)
        mu = -self._design(self._gradient)
        self.side = self.bounds.side(self._design(self.x), mu / self._c)
        self.bound_multiplier = torch.where(self.side * mu > 0, mu, 0.0)

    def result(self, reason: Reason, message: str, history: History) -> ControlResult:
        """As of the base, with the design in the box: full steps meet bounds to rounding and to `feas_tol` only."""
        result = super().result(reason, message, history)
        assign(result.design, self.bounds.nearest(copy(result.design)))
        return result

    def step(self) -> Reason:
        if not self._is_sqp:
            if self._may_follow and self._is_lost() and self._follow_path():
                return Reason.ITERATING
            if self._full_step():
                return Reason.ITERATING
            self._is_sqp, self._sets = True, 0
            if self._enter_box():
                return Reason.ITERATING
        self._settled = True
        reason = super().step()
        return Reason.DIVERGED_CYCLE if reason == Reason.DIVERGED_LINE_SEARCH and not self._settled else reason

    def _is_lost(self) -> bool:
        """Whether full steps throw variables from bound to bound: the residual has grown, or earlier sets are back."""
        sets = self._digest(self.side)
        comes_back = sets in self._seen[:-1] and sets != self._seen[-1]
        return comes_back or self._residual > GROWTH * self._best

    def _full_step(self) -> bool:
        """Whether the step to these sets' solution was taken: see the class."""
        sets = self._digest(self.side)
        if sets in self._seen[:-1]:
            return False
        self._seen.append(sets)
        self._note = ""
        dx, dlam, _ = self._with_fixed("full", self.side)
        dx.axpy(1.0, self.x)
        dlam.axpy(1.0, self.lam)
        trial = self.problem.at(dx)
        if not self._equations(trial, dlam) <= CONTRACTION * self._best:  # also for NaN
            return False
        dx.copy(self.x)
        dlam.copy(self.lam)
        self.lin, self._note = trial, self._solver("full").note
        return True

    def _follow_path(self) -> bool:
        """Go to the solution for the last price of the path that has one; whether any has. Once."""
        x, lam, price, self._may_follow = self.x.copy(), self.lam.copy(), self._prices[0], False
        steps = reached = 0
        for factor in PATH if price > 0 else ():
            found, taken = self._solve_with(ControlCost((factor - 1.0) * price, self.problem.control_mass), x, lam)
            steps += taken
            if not found:
                break
            reached += 1
            x.copy(self.x)
            lam.copy(self.lam)
        if reached:
            self.lin, self._best, self._seen = self.problem.at(self.x), math.inf, []
            self._note = f"{reached} dearer prices by {steps} steps"
        return reached > 0

    def _solve_with(self, price: ControlCost, x: PETSc.Vec, lam: PETSc.Vec) -> tuple[bool, int]:
        """Solve with another price of control on top, from a point that is moved; whether it succeeded, and steps."""
        given = self.problem
        problem = ControlProblem(given.constraint, given.objective + price, given.grid, given.control_map)
        method = ActiveSetKKT(
            problem, x, lam, self.bounds, rtol=self.rtol, outer=self.outer, precond=self.precond, kkt=self._kkt
        )
        method._may_follow, reason = False, Reason.ITERATING
        with freed(method):
            for steps in range(MAX_ON_PATH):
                record = method.record(steps)
                self._on_path += record.krylov
                if steps > 0 and record.feasibility <= ON_PATH * self.metric.norm(self._primal(self._design(x))):
                    return True, steps
                if reason != Reason.ITERATING:
                    break
                reason = method.step()
        return False, steps

    def _equations(self, lin: Linearization, lam: PETSc.Vec) -> float:
        """The norm of L_u, F and L_d of the free variables."""
        g = lin.lagrangian_gradient(lam)
        g = self._replaced(g, torch.where(self.side == 0, self._design(g), 0.0))
        return math.hypot(self.metric.dual_norm(g), self.metric.feasibility(lin))

    def _enter_box(self) -> bool:
        """Move the design to the nearest point of the box; whether that is another."""
        design = self._design(self.x)
        near = self.bounds.nearest(design)
        moves = float(self.problem.grid.max((near != design).any().double())) > 0
        if moves:
            self._replaced(self.x, near).copy(self.x)
            self.lin, self._note = self.problem.at(self.x), "into the box"
        return moves

    def _direction(self, hessian: Hessian) -> tuple[PETSc.Vec, PETSc.Vec, float]:
        """dx, dlam and dx'W dx + mu.dd of the quadratic program.

        NaN for the latter where W is not positive, or where active sets do not settle.
        """
        side, seen, design = self.side, list[bytes](), self._design(self.x)
        while (sets := self._digest(side)) not in seen and len(seen) < MAX_SETS:
            seen.append(sets)
            dx, dlam, mu = self._with_fixed(hessian, side)
            curvature = dx.dot(self._solver(hessian).operator.apply_hessian(dx, dx.duplicate()))
            if hessian == "full" and curvature < 0:
                return dx, dlam, math.nan
            moved = self._design(dx)
            side = self.bounds.side(design + moved, mu / self._c)
            miss, wrong = self.bounds.miss(design + moved, side), torch.where(side * mu > 0, 0.0, mu)
            error = math.hypot(self.metric.norm(self._primal(miss)), self.metric.dual_norm(self._primal(wrong)))
            if self._digest(side) == sets or error <= 100.0 * self.rtol * self._residual:  # sets of noise may flicker
                self._sets = len(seen)
                return dx, dlam, curvature + float(self.problem.grid.sum((mu * moved).sum()))
        self._settled = False
        return dx, dlam, math.nan

    def _with_fixed(self, hessian: Hessian, side: Tensor) -> tuple[PETSc.Vec, PETSc.Vec, Tensor]:
        """dx with active variables at their bounds, dlam, and mu = -(L_d + (W dx + F'^T dlam)_d) of the active ones.

        The known part of dx goes to the right-hand side of K (dx, dlam) = -(L_x, F).
        """
        solver, fixed = self._solver(hessian), side != 0
        solver.set_point(self.lin, self.lam, self._held(side))
        W, jvp, vjp = solver.operator.apply_hessian, self.lin.jvp, self.lin.vjp
        dx = self._primal(torch.where(fixed, -self.bounds.miss(self._design(self.x), side), 0.0))
        g, c = W(dx, dx.duplicate()), jvp(dx, self.lam.duplicate())
        g.axpy(1.0, self._gradient)
        c.axpy(1.0, self.lin.residual)
        g = self._replaced(g, torch.where(fixed, 0.0, self._design(g)))
        free, dlam = solver.solve_blocks(g, c, self.rtol)
        dx.axpy(-1.0, free)
        dlam.scale(-1.0)
        g = W(dx, g)
        g.axpy(1.0, vjp(dlam, dx.duplicate()))
        g.axpy(1.0, self._gradient)
        return dx, dlam, torch.where(fixed, -self._design(g), 0.0)

    def _held(self, side: Tensor | None = None) -> Tensor | None:
        """The variables of active sets, default those of the point; None where none is active. Collective."""
        fixed = (self.side if side is None else side) != 0
        return fixed if float(self.problem.grid.max(fixed.any().double())) > 0 else None

    def _design(self, x: PETSc.Vec) -> Tensor:
        """The entries [z | p] of this rank."""
        return copy(x)[self.problem.layout.state_size :]

    def _replaced(self, x: PETSc.Vec, design: Tensor) -> PETSc.Vec:
        """A copy of x with other design variables."""
        out = x.copy()
        assign(out, copy(x)[: self.problem.layout.state_size], design)
        return out

    def _primal(self, design: Tensor) -> PETSc.Vec:
        """[0 | design]."""
        return self._replaced(self.problem.create_primal(), design)

    def _digest(self, side: Tensor) -> bytes:
        """The same for equal sets. Collective."""
        own = hashlib.sha256(side.numpy().tobytes()).digest()
        return b"".join(self.problem.grid.mpi.allgather(own))

    def memory(self) -> dict[str, Any]:
        """What a restart needs beside x and lam; active sets of another number of ranks are not known again."""
        seen = [sets.hex() for sets in self._seen]
        own = {
            "is_sqp": float(self._is_sqp),
            "may_follow": float(self._may_follow),
            "best": self._best,
            "prices": self._prices,
            "seen": seen,
        }
        return super().memory() | own

    def recall(self, memory: dict[str, Any]) -> None:
        """Go on from the `memory` of an earlier run."""
        super().recall(memory)
        self._is_sqp, self._may_follow, self._best = bool(memory["is_sqp"]), bool(memory["may_follow"]), memory["best"]
        self._prices, self._seen = list(memory["prices"]), [bytes.fromhex(sets) for sets in memory["seen"]]
        self._c = self._threshold()
