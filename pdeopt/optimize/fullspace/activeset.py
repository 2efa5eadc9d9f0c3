"""Bounds on the controls, lower <= z <= upper, by the primal-dual active set strategy in full space.

M. Hintermueller, K. Ito, K. Kunisch, The primal-dual active set strategy as a semismooth Newton method, SIAM J.
Optim. 13 (2002) 865-888. With the Lagrangian L = J + lam.F the optimality system is

    L_u = 0,   L_p = 0,   L_z + mu = 0,   F = 0,   mu = max(0, mu + c(z - upper)) + min(0, mu + c(z - lower)).

A step fixes the controls of the active sets, mu + c(z - upper) > 0 and mu + c(z - lower) < 0, at their bounds, and
is Newton's for the others, which mu leaves alone. mu = -L_z is no unknown of its own. It is an integral and z a
function: c is the lumped inner product of the controls times `THRESHOLD_FACTOR` and the price of control,
1'J_zz 1 / 1'R_zz 1.

Where the problem is too nonlinear for full steps, quadratic programs take over, each solved by the same strategy:
M. Hintermueller, M. Hinze, A SQP-semismooth Newton-type algorithm applied to control of the instationary
Navier-Stokes system subject to control constraints, SIAM J. Optim. 16 (2006) 1177-1200.
"""

from __future__ import annotations

import hashlib
import math

import torch
from petsc4py import PETSc
from torch import Tensor

from pdeopt.control.linearization import Linearization
from pdeopt.control.problem import ControlProblem
from pdeopt.core.monitor import Reason, Record
from pdeopt.kkt.operator import Hessian
from pdeopt.optimize.fullspace.newton import NewtonKKT
from pdeopt.optimize.parts.bounds import Bounds

#: The smaller c, the more multipliers of the wrong sign move a control from one bound to the other at once.
THRESHOLD_FACTOR = 100.0

#: A full step must bring the residual of the equations below this part of the smallest residual so far.
CONTRACTION = 0.5

#: Active sets in one quadratic program.
MAX_SETS = 50


class ActiveSetKKT(NewtonKKT):
    """Semismooth Newton: a step solves the KKT system of `NewtonKKT` with the active controls at their bounds.

    Full steps are taken, on quadratic problems to the end. They stop where active sets come back, or where L_u, L_p,
    F and L_z of the free controls do not contract. From there on, with z moved into the box, a step is that of a
    quadratic program: active sets of one linearization until they settle. It keeps to the bounds, and the line
    search of `NewtonKKT` serves; the merit function's derivative gains -mu.dz <= 0.

    Args:
        problem, x, lam: the start; both vectors are moved.
        bounds: of the flat controls of this rank.
        rtol: relative tolerance of the KKT solves.
        outer: prefix of the linear solver's options, before `kkt_`; the preconditioner is "wathen",
            with a control map "direct".

    Attributes:
        side: of the flat controls of this rank: 1 at the upper bound, -1 at the lower one, 0 free.
        bound_multiplier: mu of these, an integral; zero where its sign is wrong.
    """

    def __init__(
        self,
        problem: ControlProblem,
        x: PETSc.Vec,
        lam: PETSc.Vec,
        bounds: Bounds,
        *,
        rtol: float = 1e-8,
        outer: str = "sqp_",
    ) -> None:
        precond = "wathen" if problem.control_map is None else "direct"
        super().__init__(problem, x, lam, rtol=rtol, outer=outer, precond=precond)
        self.bounds, self._c = bounds, self._threshold()
        self._is_sqp, self._best = False, math.inf
        self._seen, self._sets, self._settled = list[bytes](), 0, True

    def _threshold(self) -> Tensor:
        """c, (control_size,)."""
        lumped, _ = self.problem.layout.design_fields(self.metric.design_lumped())
        ones = self._primal(torch.ones_like(lumped))
        price = ones.dot(self.lin.hvp(None, ones, ones.duplicate())) / float(self.problem.grid.sum(lumped.sum()))
        return THRESHOLD_FACTOR * (price if price > 0 else 1.0) * lumped

    def record(self, iteration: int) -> Record:
        self._evaluate()
        u, z, p = self.problem.fields(self._gradient)
        gradient = self.problem.layout.pack(self._gradient.duplicate(), u, z + self.bound_multiplier, p)
        optimality, miss = self.metric.dual_norm(gradient), self.bounds.miss(self.lin.z, self.side)
        feasibility = math.hypot(self._feasibility, self.metric.control_norm(miss))
        self._residual = math.hypot(feasibility, optimality)
        self._best = min(self._best, self._residual)
        krylov = sum(solver.take_iterations() for solver in self._solvers.values())
        count = int(self.problem.grid.sum(float(self.side.count_nonzero())))
        size = self.metric.dual_norm(self._primal(self.bound_multiplier))
        sets = [f"sets {self._sets}"] if self._sets else []
        note = ", ".join([f"{count} active", f"multiplier {size:.2e}", *sets, *filter(None, [self._note])])
        return Record(iteration, self.lin.value, feasibility, optimality, self.step_size, krylov, note)

    def _evaluate(self) -> None:
        """Gradient, residual and active sets at the point."""
        self._gradient = self.lin.lagrangian_gradient(self.lam)
        self._feasibility = self.metric.residual_norm(self.lin.residual)
        mu = -self.problem.fields(self._gradient)[1]
        self.side = self.bounds.side(self.lin.z, mu / self._c)
        self.bound_multiplier = torch.where(self.side * mu > 0, mu, 0.0)

    def step(self) -> Reason:
        if not self._is_sqp:
            if self._full_step():
                return Reason.ITERATING
            self._is_sqp, self._sets = True, 0
            if self._enter_box():
                return Reason.ITERATING
        self._settled = True
        reason = super().step()
        return Reason.DIVERGED_CYCLE if reason == Reason.DIVERGED_LINE_SEARCH and not self._settled else reason

    def _full_step(self) -> bool:
        """Whether the step to these sets' solution was taken: see the class."""
        sets = self._digest(self.side)
        if sets in self._seen[:-1]:
            return False
        self._seen.append(sets)
        dx, dlam, _ = self._with_fixed("full", self.side)
        dx.axpy(1.0, self.x)
        dlam.axpy(1.0, self.lam)
        trial = self.problem.at(dx)
        if not self._equations(trial, dlam) <= CONTRACTION * self._best:  # also for NaN
            return False
        dx.copy(self.x)
        dlam.copy(self.lam)
        self.lin = trial
        return True

    def _equations(self, lin: Linearization, lam: PETSc.Vec) -> float:
        """The norm of L_u, L_p, F and L_z of the free controls."""
        g = lin.lagrangian_gradient(lam)
        u, z, p = self.problem.fields(g)
        g = self.problem.layout.pack(g, u, torch.where(self.side == 0, z, 0.0), p)
        return math.hypot(self.metric.dual_norm(g), self.metric.residual_norm(lin.residual))

    def _enter_box(self) -> bool:
        """Move z to the nearest point of the box; whether that is another."""
        u, z, p = self.problem.fields(self.x)
        near = self.bounds.nearest(z)
        moves = float(self.problem.grid.max((near != z).any().double())) > 0
        if moves:
            self.lin, self._note = self.problem.at(self.problem.layout.pack(self.x, u, near, p)), "into the box"
        return moves

    def _direction(self, hessian: Hessian) -> tuple[PETSc.Vec, PETSc.Vec, float]:
        """dx, dlam and dx'W dx + mu.dz of the quadratic program.

        NaN for the latter where W is not positive, or where active sets do not settle.
        """
        side, seen = self.side, list[bytes]()
        while (sets := self._digest(side)) not in seen and len(seen) < MAX_SETS:
            seen.append(sets)
            dx, dlam, mu = self._with_fixed(hessian, side)
            curvature = dx.dot(self._solver(hessian).operator.apply_hessian(dx, dx.duplicate()))
            if hessian == "full" and curvature < 0:
                return dx, dlam, math.nan
            dz = self.problem.fields(dx)[1]
            side = self.bounds.side(self.lin.z + dz, mu / self._c)
            miss, wrong = self.bounds.miss(self.lin.z + dz, side), torch.where(side * mu > 0, 0.0, mu)
            error = math.hypot(self.metric.control_norm(miss), self.metric.dual_norm(self._primal(wrong)))
            if self._digest(side) == sets or error <= 100.0 * self.rtol * self._residual:  # sets of noise may flicker
                self._sets = len(seen)
                return dx, dlam, curvature + float(self.problem.grid.sum((mu * dz).sum()))
        self._settled = False
        return dx, dlam, math.nan

    def _with_fixed(self, hessian: Hessian, side: Tensor) -> tuple[PETSc.Vec, PETSc.Vec, Tensor]:
        """dx with active controls at their bounds, dlam, and mu = -(L_z + (W dx + F'^T dlam)_z) of the active ones.

        The known part of dx goes to the right-hand side of K (dx, dlam) = -(L_x, F).
        """
        solver, fixed = self._solver(hessian), side != 0
        some = float(self.problem.grid.max(fixed.any().double())) > 0
        solver.set_point(self.lin, self.lam, fixed if some else None)
        W, jvp, vjp = solver.operator.apply_hessian, self.lin.jvp, self.lin.vjp
        dx = self._primal(torch.where(fixed, -self.bounds.miss(self.lin.z, side), 0.0))
        g, c = W(dx, dx.duplicate()), jvp(dx, self.lam.duplicate())
        g.axpy(1.0, self._gradient)
        c.axpy(1.0, self.lin.residual)
        u, z, p = self.problem.fields(g)
        free, dlam = solver.solve_blocks(self.problem.layout.pack(g, u, torch.where(fixed, 0.0, z), p), c, self.rtol)
        dx.axpy(-1.0, free)
        dlam.scale(-1.0)
        g = W(dx, g)
        g.axpy(1.0, vjp(dlam, dx.duplicate()))
        g.axpy(1.0, self._gradient)
        return dx, dlam, torch.where(fixed, -self.problem.fields(g)[1], 0.0)

    def _primal(self, z: Tensor) -> PETSc.Vec:
        """[0 | z | 0]."""
        x = self.problem.create_primal()
        u, _, p = self.problem.fields(x)
        return self.problem.layout.pack(x, u, z, p)

    def _digest(self, side: Tensor) -> bytes:
        """The same for equal sets. Collective."""
        own = hashlib.sha256(side.numpy().tobytes()).digest()
        return b"".join(self.problem.grid.mpi.allgather(own))

    def memory(self) -> dict[str, float]:
        """What a restart needs beside x and lam."""
        return super().memory() | {"is_sqp": float(self._is_sqp), "best": self._best}

    def recall(self, memory: dict[str, float]) -> None:
        """Go on from the `memory` of an earlier run."""
        super().recall(memory)
        self._is_sqp, self._best = bool(memory["is_sqp"]), memory["best"]
