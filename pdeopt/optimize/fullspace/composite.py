"""Inexact SQP: the matrix-free trust-region composite-step method.

M. Heinkenschloss, D. Ridzal, A Matrix-Free Trust-Region SQP Method for Equality Constrained Optimization,
SIAM J. Optim. 24 (2014) 1507-1541. Symbols as there: quasi-normal step n, tangential step t, radius Delta,
multiplier lam, penalty rho. Every linear system is an augmented system [R F'^T; F' 0], solved to a tolerance relative
to its right-hand side which the algorithm tightens where the predicted reductions disagree (rpred). R is the Riesz
metric, whose norms are meant everywhere, or its part R_d of the design variables alone: a projection into ker F', of
which [-F_u^-1 F_d; I] is a basis, is then exact after a sweep back and one forward in time, n moves the states alone,
and lam is the adjoint.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from petsc4py import PETSc

from pdeopt.control.linearization import Linearization
from pdeopt.control.metric import RieszMetric
from pdeopt.control.problem import ControlProblem
from pdeopt.core.errors import SolveFailure
from pdeopt.core.monitor import Reason, Record
from pdeopt.core.settings import Settings, setting
from pdeopt.kkt.operator import Hessian
from pdeopt.optimize.fullspace.kktchoice import solves_by_sweeps
from pdeopt.optimize.fullspace.kktsolver import KKTSolver
from pdeopt.optimize.fullspace.method import FullSpaceMethod
from pdeopt.optimize.fullspace.quadraticmodel import QuadraticModel, Tangential
from pdeopt.optimize.parts.merit import augmented_lagrangian
from pdeopt.optimize.parts.trustregion import TrustRegion


@dataclass(frozen=True)
class CompositeSettings(Settings, prefix="sqp_"):
    """Composite step: constants of the method and of its inexact solves."""

    radius: float = setting(10.0, "initial trust radius Delta of the composite step", above=0, at_most=1e100)
    radius_min: float = setting(1e-10, "trust radius below which the composite step stagnates", above=0)
    normal_fraction: float = setting(
        0.8, "part of the trust radius that the quasi-normal step may use", above=0, at_most=1
    )
    penalty: float = setting(
        1e-3, "initial penalty rho of the augmented Lagrangian, relative to |J| at the start", above=0
    )
    cg_max_it: int = setting(20, "largest number of projected CG iterations in a tangential step", at_least=1)
    cg_rtol: float = setting(1e-2, "relative tolerance of projected CG in a tangential step", above=0, at_most=1)
    augmented: str = setting(
        "auto",
        "metric of the augmented systems: of states and design, or of the design alone, whose projections are two "
        "sweeps over time; auto is the latter where KKT systems are solved by sweeps (reduced)",
        choices=("auto", "metric", "design"),
    )
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


class CompositeStep(FullSpaceMethod):
    """One iteration: quasi-normal step, tangential step, trial multiplier, penalty, acceptance.

    Args:
        problem, x, lam: the start; both vectors are moved.
        settings: constants of the method.
        gauss_newton: H without the constraint's curvature.
        outer: prefix of the linear solver's options, before `kkt_`.
        kkt: settings of the linear solver, by the names of `KKTSettings`.
    """

    kind = "composite"

    def __init__(
        self,
        problem: ControlProblem,
        x: PETSc.Vec,
        lam: PETSc.Vec,
        settings: CompositeSettings,
        *,
        gauss_newton: bool = False,
        outer: str = "sqp_",
        kkt: Mapping[str, Any] | None = None,
    ) -> None:
        self.problem, self.x, self.lam, self.settings = problem, x, lam, settings
        self.metric, self.gauss_newton = RieszMetric(problem), gauss_newton
        self.lin = problem.at(x)
        self.trust = TrustRegion(settings.radius)
        self.penalty = self._least_penalty = settings.penalty * max(abs(self.lin.value), 1e-8)
        # The trial point has a system of its own, which becomes the current one when a step is taken.
        of_design = settings.augmented == "design" or (
            settings.augmented == "auto" and solves_by_sweeps(problem, outer, kkt or {})
        )
        R: Hessian = "design" if of_design else "metric"
        self._system, self._spare = (KKTSolver(self.metric, R, outer, "auto", kkt) for _ in range(2))
        self._prepared = self._restored = False
        self._non_finite = 0
        self._note = ""

    # -- the loop's view -----------------------------------------------------------------------------------

    def record(self, iteration: int) -> Record:
        if not self._prepared:
            self._system.set_point(self.lin)
            self._correct_multiplier(self._system, self.lin, self.lam)
            self._prepared = True
        gradient, lam = self.lin.lagrangian_gradient(self.lam), None if self.gauss_newton else self.lam
        self._model = QuadraticModel(self.metric, self.lin, lam, gradient, self._system)
        self._feasibility = self.metric.feasibility(self.lin)
        krylov = self._system.take_iterations() + self._spare.take_iterations()
        optimality = self.metric.dual_norm(gradient)
        return Record(iteration, self.lin.value, self._feasibility, optimality, self.trust.radius, krylov, self._note)

    def step(self) -> Reason:
        if self.trust.radius < self.settings.radius_min:
            return self._restore()
        limit = self.settings.normal_fraction * self.trust.radius
        n = self._model.quasi_normal_step(limit, self.settings.normal_rtol)
        tangential, trial, trial_lam, pred = self._tangential_and_prediction(n)
        s = n.copy()
        s.axpy(1.0, tangential.t)
        before = augmented_lagrangian(self.metric, self.lin, self.lam, self.penalty)
        ared = before - augmented_lagrangian(self.metric, trial, trial_lam, self.penalty)
        ratio = ared / pred if pred > 0 else math.nan
        if abs(ared) <= 1e-14 * max(1.0, abs(self.lin.value)) and 0 < pred <= 1e-13 * max(1.0, abs(self.lin.value)):
            ratio = 1.0  # both reductions are rounding: the model is as good as arithmetic allows
        norms = [self.metric.norm(v) for v in (s, n, tangential.t)]
        if self.metric.feasibility(trial) > max(self._feasibility, norms[0]):
            ratio = min(ratio, -1.0)  # the equations bend too much: multipliers there tell nothing; NaN stays
        self.trust = replace(self.trust, radius=self.trust.after(ratio, norms[0], max(norms[1:])))
        if not self.trust.accepts(ratio):
            return self._reject(ratio)
        self._take(trial, trial_lam)
        return Reason.ITERATING

    def memory(self) -> dict[str, Any]:
        """What a restart needs beside x and lam."""
        return {
            "radius": self.trust.radius,
            "penalty": self.penalty,
            "least_penalty": self._least_penalty,
            "restored": float(self._restored),
            "prepared": float(self._prepared),
            "non_finite": float(self._non_finite),
            "ways": [self._system.choice.stage, self._spare.choice.stage],
        }

    def recall(self, memory: dict[str, Any]) -> None:
        """Go on from the `memory` of an earlier run."""
        self.trust = replace(self.trust, radius=memory["radius"])
        self.penalty, self._least_penalty = memory["penalty"], memory["least_penalty"]
        self._restored, self._prepared = bool(memory["restored"]), bool(memory["prepared"])
        self._non_finite = int(memory["non_finite"])
        for system, stage in zip((self._system, self._spare), memory["ways"]):
            system.choice.resume(stage)
        if self._prepared:  # the multiplier is already corrected
            self._system.set_point(self.lin)

    def ways(self) -> dict[str, list[str]]:
        systems = (self._system, self._spare)
        return {systems[0].operator.hessian: max((system.choice.ways for system in systems), key=len)}

    def destroy(self) -> None:
        """Free the KKT solvers."""
        self._system.destroy()
        self._spare.destroy()

    # -- the parts of a step -------------------------------------------------------------------------------

    def _tangential_and_prediction(self, n: PETSc.Vec) -> tuple[Tangential, Linearization, PETSc.Vec, float]:
        """Tangential step, trial point, its multiplier and the predicted reduction (section 4.2, 4.3).

        The tolerances of projection and re-projection shrink until |rpred| <= eta pred.
        """
        settings, radius = self.settings, self.trust.radius
        projection, reprojection = settings.projection_rtol, settings.tangential_rtol
        for _ in range(settings.tightenings + 1):
            tangential = self._model.tangential_step(
                n, radius, settings.cg_max_it, settings.cg_rtol, projection, reprojection
            )
            trial, trial_lam = self._trial(n, tangential.t)
            if trial_lam is None:
                return tangential, trial, self.lam, math.nan
            pred, rpred = self._predictions(n, tangential, trial_lam)
            if abs(rpred) <= settings.rpred_fraction * pred:
                break
            projection, reprojection = 0.1 * projection, 1e-3 * reprojection
            if reprojection < 1e-15:
                break
        return tangential, trial, trial_lam, pred

    def _trial(self, n: PETSc.Vec, t: PETSc.Vec) -> tuple[Linearization, PETSc.Vec | None]:
        """The problem at x + n + t and its multiplier; None where functions are not finite there."""
        point = self.x.copy()
        point.axpy(1.0, n)
        point.axpy(1.0, t)
        trial, self._point = self.problem.at(point), point
        if not (math.isfinite(trial.value) and math.isfinite(trial.residual.norm())):
            return trial, None
        trial_lam = self.lam.copy()
        try:
            self._spare.set_point(trial)
            self._correct_multiplier(self._spare, trial, trial_lam)
        except SolveFailure:
            return trial, None
        return trial, trial_lam

    def _predictions(self, n: PETSc.Vec, tangential: Tangential, trial_lam: PETSc.Vec) -> tuple[float, float]:
        """pred with the penalty raised to make it count, and rpred, what inexact tangency leaves."""
        dlam = trial_lam.copy()
        dlam.axpy(-1.0, self.lam)
        c, gradient = self.lin.residual, self._model.gradient
        J_n, J_t = (self.lin.jvp(v, c.duplicate()) for v in (n, tangential.t))
        J_n.axpy(1.0, c)
        H_n = self._model.hessian(n)
        r = gradient.copy()
        r.axpy(1.0, H_n)
        t = tangential.t_cg
        part = -r.dot(t) - 0.5 * t.dot(tangential.H_t_cg) - gradient.dot(n) - 0.5 * n.dot(H_n) - dlam.dot(J_n)
        normal = self._feasibility**2 - self.metric.residual_norm(J_n) ** 2
        if part + 0.5 * self.penalty * normal < 0 and normal > 0:
            self.penalty = -2.0 * part / normal + self._least_penalty
        weight = self.metric.residual_inverse(J_t, J_t.duplicate())
        left = t.copy()
        left.axpy(-1.0, tangential.t)  # t_cg - t
        rpred = r.dot(left) - dlam.dot(J_t) - self.penalty * (J_t.dot(weight) + 2.0 * J_n.dot(weight))
        return part + self.penalty * normal, rpred

    def _take(self, trial: Linearization, trial_lam: PETSc.Vec) -> None:
        self._point.copy(self.x)  # to the last bit where the linearization is
        trial_lam.copy(self.lam)
        self.lin = trial
        self._system, self._spare = self._spare, self._system
        self._non_finite, self._note = 0, ""

    def _reject(self, ratio: float) -> Reason:
        self._non_finite = self._non_finite + 1 if math.isnan(ratio) else 0
        self._note = "not finite, rejected" if math.isnan(ratio) else "rejected"
        return Reason.DIVERGED_NAN if self._non_finite >= 20 else Reason.ITERATING

    def _restore(self) -> Reason:
        """Stagnation: once, solve the state equation for the present design and start again from there."""
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

    def _correct_multiplier(self, system: KKTSolver, lin: Linearization, lam: PETSc.Vec) -> None:
        """lam <- lam + dlam with |J' + F'^T(lam + dlam)| least: the augmented system with -(L_x, 0)."""
        gradient = lin.lagrangian_gradient(lam)
        gradient.scale(-1.0)
        dlam = system.solve_blocks(gradient, self.problem.create_multiplier(), self.settings.multiplier_rtol)[1]
        lam.axpy(1.0, dlam)
