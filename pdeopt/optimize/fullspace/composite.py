"""Inexact SQP: the matrix-free trust-region composite-step method.

M. Heinkenschloss, D. Ridzal, A Matrix-Free Trust-Region SQP Method for Equality Constrained Optimization,
SIAM J. Optim. 24 (2014) 1507-1541. Symbols as there: quasi-normal step n, tangential step t, radius Delta,
multiplier lam, penalty rho. Every linear system is an augmented system [R F'^T; F' 0] with the Riesz
metric R, solved to a tolerance relative to its right-hand side which the algorithm tightens where the
predicted reductions disagree (rpred); norms are those of the metric.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from petsc4py import PETSc

from pdeopt.control.linearization import Linearization
from pdeopt.control.metric import RieszMetric
from pdeopt.control.problem import ControlProblem
from pdeopt.core.errors import SolveFailure
from pdeopt.core.monitor import Reason, Record
from pdeopt.core.settings import Settings, setting
from pdeopt.optimize.fullspace.kktsolver import KKTSolver
from pdeopt.optimize.fullspace.method import FullSpaceMethod
from pdeopt.optimize.parts.trustregion import TrustRegion


@dataclass(frozen=True)
class CompositeSettings(Settings, prefix="sqp_"):
    """Composite step: constants of the method and of its inexact solves."""

    radius: float = setting(10.0, "initial trust radius Delta of the composite step", above=0)
    radius_min: float = setting(1e-10, "trust radius below which the composite step stagnates", above=0)
    normal_fraction: float = setting(
        0.8, "part of the trust radius that the quasi-normal step may use", above=0, at_most=1
    )
    penalty: float = setting(
        1e-3, "initial penalty rho of the augmented Lagrangian, relative to |J| at the start", above=0
    )
    cg_max_it: int = setting(20, "largest number of projected CG iterations in a tangential step", at_least=1)
    cg_rtol: float = setting(1e-2, "relative tolerance of projected CG in a tangential step", above=0, at_most=1)
    multiplier_rtol: float = setting(1e-3, "relative tolerance of the multiplier's linear solves", above=0, at_most=1)
    normal_rtol: float = setting(
        1e-3, "relative tolerance of the quasi-normal step's linear solves", above=0, at_most=1
    )
    projection_rtol: float = setting(
        1e-3, "relative tolerance of projections into the null space of F'", above=0, at_most=1
    )
    tangential_rtol: float = setting(
        1e-3, "relative tolerance of the last projection of a tangential step", above=0, at_most=1
    )
    rpred_fraction: float = setting(
        0.5, "largest part of the predicted reduction that inexact tangency may take", above=0, at_most=1
    )
    tightenings: int = setting(10, "largest number of times that tolerances are tightened in one iteration", at_least=0)


@dataclass
class _Tangential:
    """A tangential step before (`t_cg`) and after (`t`) its last projection, and H t_cg."""

    t_cg: PETSc.Vec
    H_t_cg: PETSc.Vec
    t: PETSc.Vec


class CompositeStep(FullSpaceMethod):
    """One iteration: quasi-normal step, tangential step, trial multiplier, penalty, acceptance.

    Args:
        problem, x, lam: the start; both vectors are moved.
        settings: constants of the method.
        gauss_newton: H without the constraint's curvature.
        outer: prefix of the linear solver's options, before `kkt_`.
    """

    def __init__(
        self,
        problem: ControlProblem,
        x: PETSc.Vec,
        lam: PETSc.Vec,
        settings: CompositeSettings,
        *,
        gauss_newton: bool = False,
        outer: str = "sqp_",
    ) -> None:
        self.problem, self.x, self.lam, self.settings = problem, x, lam, settings
        self.metric, self.gauss_newton = RieszMetric(problem), gauss_newton
        self.lin = problem.at(x)
        self.trust = TrustRegion(settings.radius)
        self.penalty = self._least_penalty = settings.penalty * max(abs(self.lin.value), 1e-8)
        # The trial point has a system of its own, which becomes the current one when a step is taken.
        self._system, self._spare = (KKTSolver(self.metric, "metric", outer, "auto") for _ in range(2))
        self._prepared = self._restored = False
        self._non_finite = 0
        self._note = ""

    # -- the loop's view -----------------------------------------------------------------------------------

    def record(self, iteration: int) -> Record:
        if not self._prepared:
            self._system.set_point(self.lin)
            self._correct_multiplier(self._system, self.lin, self.lam)
            self._prepared = True
        self._gradient = self.lin.lagrangian_gradient(self.lam)
        self._feasibility = self.metric.residual_norm(self.lin.residual)
        krylov = self._system.take_iterations() + self._spare.take_iterations()
        optimality = self.metric.dual_norm(self._gradient)
        return Record(iteration, self.lin.value, self._feasibility, optimality, self.trust.radius, krylov, self._note)

    def step(self) -> Reason:
        if self.trust.radius < self.settings.radius_min:
            return self._restore()
        n = self._quasi_normal_step()
        tangential, trial, trial_lam, pred = self._tangential_and_prediction(n)
        s = n.copy()
        s.axpy(1.0, tangential.t)
        merit = self.metric.augmented_lagrangian
        ared = merit(self.lin, self.lam, self.penalty) - merit(trial, trial_lam, self.penalty)
        ratio = ared / pred if pred > 0 else math.nan
        if abs(ared) <= 1e-14 * max(1.0, abs(self.lin.value)) and 0 < pred <= 1e-13 * max(1.0, abs(self.lin.value)):
            ratio = 1.0  # both reductions are rounding: the model is as good as arithmetic allows
        norms = [self.metric.norm(v) for v in (s, n, tangential.t)]
        self.trust = replace(self.trust, radius=self.trust.after(ratio, norms[0], max(norms[1:])))
        if not self.trust.accepts(ratio):
            return self._reject(ratio)
        self._take(trial, trial_lam, s)
        return Reason.ITERATING

    def memory(self) -> dict[str, float]:
        """What a restart needs beside x and lam."""
        factored = all(system.settings.precond == "direct" for system in (self._system, self._spare))
        return {
            "radius": self.trust.radius,
            "penalty": self.penalty,
            "restored": float(self._restored),
            "factored": float(factored),
        }

    def recall(self, memory: dict[str, float]) -> None:
        """Go on from the `memory` of an earlier run, whose multiplier is already corrected."""
        self.trust = replace(self.trust, radius=memory["radius"])
        self.penalty, self._restored = memory["penalty"], bool(memory["restored"])
        if memory.get("factored"):
            for system in (self._system, self._spare):
                if system.settings.precond == "auto":
                    system.factor_instead()
        self._system.set_point(self.lin)
        self._prepared = True

    def destroy(self) -> None:
        """Free the KKT solvers."""
        self._system.destroy()
        self._spare.destroy()

    # -- the parts of a step -------------------------------------------------------------------------------

    def _quasi_normal_step(self) -> PETSc.Vec:
        """n: the dogleg from the Cauchy point of |F'n + F|^2 / 2 to the shortest Newton step."""
        limit = self.settings.normal_fraction * self.trust.radius
        n, c = self.problem.create_primal(), self.lin.residual
        if self._feasibility == 0.0:
            return n
        g = self.lin.vjp(self.metric.residual_inverse(c, c.duplicate()), self.problem.create_primal())
        cauchy = self.metric.primal_inverse(g, g.duplicate())
        slope = g.dot(cauchy)
        if slope == 0.0:  # F' F = 0: no way to first order
            return n
        J_cauchy = self.lin.jvp(cauchy, c.duplicate())
        step_size = slope / self.metric.residual_norm(J_cauchy) ** 2
        cauchy.scale(-step_size)
        J_cauchy.scale(-step_size)
        length = self.metric.norm(cauchy)
        if length >= limit:
            cauchy.scale(limit / length)
            return cauchy
        J_cauchy.axpy(1.0, c)
        J_cauchy.scale(-1.0)
        R_cauchy = self.metric.primal(cauchy, cauchy.duplicate())
        R_cauchy.scale(-1.0)
        to_newton = self._solve(R_cauchy, J_cauchy, self.settings.normal_rtol)[0]
        cauchy.axpy(self._to_boundary(cauchy, to_newton, limit), to_newton)
        return cauchy

    def _tangential_and_prediction(self, n: PETSc.Vec) -> tuple[_Tangential, Linearization, PETSc.Vec, float]:
        """Tangential step, trial point, its multiplier and the predicted reduction (section 4.2, 4.3).

        The tolerances of projection and re-projection shrink until |rpred| <= eta pred.
        """
        projection, reprojection = self.settings.projection_rtol, self.settings.tangential_rtol
        for _ in range(self.settings.tightenings + 1):
            tangential = self._tangential_step(n, projection, reprojection)
            trial, trial_lam = self._trial(n, tangential.t)
            if trial_lam is None:
                return tangential, trial, self.lam, math.nan
            pred, rpred = self._predictions(n, tangential, trial_lam)
            if abs(rpred) <= self.settings.rpred_fraction * pred:
                break
            projection, reprojection = 0.1 * projection, 1e-3 * reprojection
            if reprojection < 1e-15:
                break
        return tangential, trial, trial_lam, pred

    def _tangential_step(self, n: PETSc.Vec, projection_rtol: float, reprojection_rtol: float) -> _Tangential:
        t_cg, H_t = self._projected_cg(n, projection_rtol)
        R_t = self.metric.primal(t_cg, t_cg.duplicate())
        t = self._solve(R_t, self.problem.create_multiplier(), reprojection_rtol)[0]
        return _Tangential(t_cg, H_t, t)

    def _projected_cg(self, n: PETSc.Vec, rtol: float) -> tuple[PETSc.Vec, PETSc.Vec]:
        """Steihaug's CG for min q(t) in ker F' with |n + t| <= Delta, all directions kept conjugate.

        Returns t and H t. Inexact projections lose conjugacy, hence the full orthogonalization. The residual
        is kept in its projected form R w, lest its part in the range of F'^T drown the rest in rounding
        (N. Gould, M. Hribar, J. Nocedal, SIAM J. Sci. Comput. 23, 2001, section 6).
        """
        r = self._gradient.copy()
        r.axpy(1.0, self._hessian(n))
        t, H_t = self.problem.create_primal(), self.problem.create_primal()
        w = self._project(r, rtol)
        r = self.metric.primal(w, r)
        size = start = r.dot(w)
        directions: list[tuple[PETSc.Vec, PETSc.Vec, float]] = []
        tolerance = min(self.settings.cg_rtol, math.sqrt(math.sqrt(max(start, 0.0)))) ** 2
        for _ in range(self.settings.cg_max_it):
            if size <= tolerance * start or size <= 0.0:
                break
            p = w.copy()
            p.scale(-1.0)
            for q, H_q, curvature in directions:
                p.axpy(w.dot(H_q) / curvature, q)
            H_p = self._hessian(p)
            curvature, total = p.dot(H_p), n.copy()
            total.axpy(1.0, t)
            to_boundary = self._to_boundary(total, p, self.trust.radius, longest=math.inf)
            alpha = -r.dot(p) / curvature if curvature > 0 else math.inf
            t.axpy(min(alpha, to_boundary), p)
            H_t.axpy(min(alpha, to_boundary), H_p)
            if alpha >= to_boundary:
                self._note = "boundary" if curvature > 0 else "negative curvature"
                break
            r.axpy(alpha, H_p)
            directions.append((p, H_p, curvature))
            w = self._project(r, rtol)
            r = self.metric.primal(w, r)
            size = r.dot(w)
        return t, H_t

    def _trial(self, n: PETSc.Vec, t: PETSc.Vec) -> tuple[Linearization, PETSc.Vec | None]:
        """The problem at x + n + t and its multiplier; None where functions are not finite there."""
        point = self.x.copy()
        point.axpy(1.0, n)
        point.axpy(1.0, t)
        trial = self.problem.at(point)
        if not (math.isfinite(trial.value) and math.isfinite(trial.residual.norm())):
            return trial, None
        trial_lam = self.lam.copy()
        try:
            self._spare.set_point(trial)
            self._correct_multiplier(self._spare, trial, trial_lam)
        except SolveFailure:
            return trial, None
        return trial, trial_lam

    def _predictions(self, n: PETSc.Vec, tangential: _Tangential, trial_lam: PETSc.Vec) -> tuple[float, float]:
        """pred with the penalty raised to make it count, and rpred, what inexact tangency leaves."""
        dlam = trial_lam.copy()
        dlam.axpy(-1.0, self.lam)
        c = self.lin.residual
        J_n, J_t = (self.lin.jvp(v, c.duplicate()) for v in (n, tangential.t))
        J_n.axpy(1.0, c)
        H_n = self._hessian(n)
        r = self._gradient.copy()
        r.axpy(1.0, H_n)
        t = tangential.t_cg
        part = -r.dot(t) - 0.5 * t.dot(tangential.H_t_cg) - self._gradient.dot(n) - 0.5 * n.dot(H_n) - dlam.dot(J_n)
        normal = self._feasibility**2 - self.metric.residual_norm(J_n) ** 2
        if part + 0.5 * self.penalty * normal < 0 and normal > 0:
            self.penalty = -2.0 * part / normal + self._least_penalty
        weight = self.metric.residual_inverse(J_t, J_t.duplicate())
        left = t.copy()
        left.axpy(-1.0, tangential.t)  # t_cg - t
        rpred = r.dot(left) - dlam.dot(J_t) - self.penalty * (J_t.dot(weight) + 2.0 * J_n.dot(weight))
        return part + self.penalty * normal, rpred

    def _take(self, trial: Linearization, trial_lam: PETSc.Vec, s: PETSc.Vec) -> None:
        self.x.axpy(1.0, s)
        trial_lam.copy(self.lam)
        self.lin = trial
        self._system, self._spare = self._spare, self._system
        self._non_finite, self._note = 0, ""

    def _reject(self, ratio: float) -> Reason:
        self._non_finite = self._non_finite + 1 if math.isnan(ratio) else 0
        self._note = "not finite, rejected" if math.isnan(ratio) else "rejected"
        return Reason.DIVERGED_NAN if self._non_finite >= 20 else Reason.ITERATING

    def _restore(self) -> Reason:
        """Stagnation: once, solve the state equation for the present design and begin anew from there."""
        if self._restored or self._feasibility <= 1e-12:
            return Reason.DIVERGED_STAGNATION
        self._restored = True
        _, design = self.problem.split(self.x)
        try:
            state = self.problem.solve_state(design)
        except SolveFailure:
            return Reason.DIVERGED_STAGNATION
        self.problem.join(state, design).copy(self.x)
        self.lin = self.problem.at(self.x)
        self.trust, self._prepared, self._note = TrustRegion(self.settings.radius), False, "restored"
        return Reason.ITERATING

    # -- pieces --------------------------------------------------------------------------------------------

    def _solve(self, g: PETSc.Vec, c: PETSc.Vec, rtol: float) -> tuple[PETSc.Vec, PETSc.Vec]:
        return self._system.solve_blocks(g, c, rtol)

    def _project(self, r: PETSc.Vec, rtol: float) -> PETSc.Vec:
        """W r: the Riesz representative of r, projected into ker F'."""
        return self._solve(r, self.problem.create_multiplier(), rtol)[0]

    def _correct_multiplier(self, system: KKTSolver, lin: Linearization, lam: PETSc.Vec) -> None:
        """lam <- lam + dlam with |J' + F'^T(lam + dlam)| least: the augmented system with -(L_x, 0)."""
        gradient = lin.lagrangian_gradient(lam)
        gradient.scale(-1.0)
        dlam = system.solve_blocks(gradient, self.problem.create_multiplier(), self.settings.multiplier_rtol)[1]
        lam.axpy(1.0, dlam)

    def _hessian(self, v: PETSc.Vec) -> PETSc.Vec:
        return self.lin.hvp(None if self.gauss_newton else self.lam, v, v.duplicate())

    def _to_boundary(self, start: PETSc.Vec, step: PETSc.Vec, limit: float, longest: float = 1.0) -> float:
        """The largest theta <= longest with |start + theta step| <= limit."""
        R_step = self.metric.primal(step, step.duplicate())
        a, b, c = step.dot(R_step), start.dot(R_step), self.metric.norm(start) ** 2 - limit**2
        if a <= 0.0:
            return 0.0
        root = math.sqrt(max(b * b - a * c, 0.0))
        theta = -c / (b + root) if b > 0 else (root - b) / a
        return float(min(max(theta, 0.0), longest))
