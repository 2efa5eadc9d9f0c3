"""The quadratic model of a composite step, and its two minimizers: the quasi-normal and the tangential step.

Symbols of M. Heinkenschloss, D. Ridzal, SIAM J. Optim. 24 (2014) 1507-1541: quasi-normal step n, tangential step t.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from petsc4py import PETSc

from pdeopt.control.linearization import Linearization
from pdeopt.control.metric import RieszMetric
from pdeopt.optimize.fullspace.kktsolver import KKTSolver


@dataclass(frozen=True)
class Tangential:
    """A tangential step before (`t_cg`) and after (`t`) its last projection, and H t_cg."""

    t_cg: PETSc.Vec
    H_t_cg: PETSc.Vec
    t: PETSc.Vec


@dataclass(frozen=True)
class QuadraticModel:
    """q(s) = g.s + s'H s / 2 with the linearized constraint F's + F at a point, g the Lagrangian's gradient.

    Attributes:
        metric: Riesz metric R of the problem; all norms are its.
        lin: objective, constraint and derivatives at the point.
        lam: multiplier of the constraint's curvature in H; None leaves that out (Gauss-Newton).
        gradient: g.
        system: the augmented system [R F'^T; F' 0] at the point; its R may be that of the design alone.
    """

    metric: RieszMetric
    lin: Linearization
    lam: PETSc.Vec | None
    gradient: PETSc.Vec
    system: KKTSolver

    def hessian(self, v: PETSc.Vec) -> PETSc.Vec:
        """H v, a new vector."""
        return self.lin.hvp(self.lam, v, v.duplicate())

    def augmented(self, v: PETSc.Vec, out: PETSc.Vec) -> PETSc.Vec:
        """out = R v with the R of the augmented system."""
        return self.system.operator.apply_hessian(v, out)

    def project(self, r: PETSc.Vec, rtol: float) -> PETSc.Vec:
        """W r: the Riesz representative of r, projected into ker F'."""
        return self.system.solve_blocks(r, _zero(self.lin.residual), rtol)[0]

    def to_boundary(self, start: PETSc.Vec, step: PETSc.Vec, limit: float, longest: float = 1.0) -> float:
        """The largest theta <= longest with |start + theta step| <= limit."""
        R_step = self.metric.primal(step, step.duplicate())
        a, b, c = step.dot(R_step), start.dot(R_step), self.metric.norm(start) ** 2 - limit**2
        if a <= 0.0:
            return 0.0
        root = math.sqrt(max(b * b - a * c, 0.0))
        theta = -c / (b + root) if b > 0 else (root - b) / a
        return float(min(max(theta, 0.0), longest))

    def quasi_normal_step(self, limit: float, rtol: float) -> PETSc.Vec:
        """n: the dogleg from the Cauchy point of |F'n + F|^2 / 2 to the shortest Newton step, with |n| <= limit.

        Args:
            limit: the part of the trust radius that n may use.
            rtol: relative tolerance of the linear solve.
        """
        lin, metric, c = self.lin, self.metric, self.lin.residual
        n = _zero(self.gradient)
        if metric.residual_norm(c) == 0.0:
            return n
        g = lin.vjp(metric.residual_inverse(c, c.duplicate()), n.duplicate())
        cauchy = metric.primal_inverse(g, g.duplicate())
        slope = g.dot(cauchy)
        if slope == 0.0:  # F' F = 0: no way to first order
            return n
        J_cauchy = lin.jvp(cauchy, c.duplicate())
        step_size = slope / metric.residual_norm(J_cauchy) ** 2
        cauchy.scale(-step_size)
        J_cauchy.scale(-step_size)
        length = metric.norm(cauchy)
        if length >= limit:
            cauchy.scale(limit / length)
            return cauchy
        J_cauchy.axpy(1.0, c)
        J_cauchy.scale(-1.0)
        R_cauchy = self.augmented(cauchy, cauchy.duplicate())
        R_cauchy.scale(-1.0)
        to_newton = self.system.solve_blocks(R_cauchy, J_cauchy, rtol)[0]
        cauchy.axpy(self.to_boundary(cauchy, to_newton, limit), to_newton)
        return cauchy

    def tangential_step(
        self, n: PETSc.Vec, radius: float, max_it: int, cg_rtol: float, projection_rtol: float, reprojection_rtol: float
    ) -> Tangential:
        """t, about the minimizer of q(n + t) in ker F' with |n + t| <= radius.

        Args:
            n: the quasi-normal step.
            radius: the trust radius.
            max_it, cg_rtol: limits of projected CG.
            projection_rtol, reprojection_rtol: relative tolerances of projections in and after it.
        """
        t_cg, H_t = self._projected_cg(n, radius, max_it, cg_rtol, projection_rtol)
        R_t = self.augmented(t_cg, t_cg.duplicate())
        return Tangential(t_cg, H_t, self.project(R_t, reprojection_rtol))

    def _projected_cg(
        self, n: PETSc.Vec, radius: float, max_it: int, cg_rtol: float, rtol: float
    ) -> tuple[PETSc.Vec, PETSc.Vec]:
        """Steihaug's CG for min q(n + t) in ker F' with |n + t| <= radius, all directions kept conjugate.

        Returns t and H t. Inexact projections lose conjugacy, hence the full orthogonalization. The residual
        is kept in its projected form R w, so that its part in the range of F'^T does not drown the rest in rounding
        (N. Gould, M. Hribar, J. Nocedal, SIAM J. Sci. Comput. 23, 2001, section 6).
        """
        r = self.gradient.copy()
        r.axpy(1.0, self.hessian(n))
        t, H_t = _zero(n), _zero(n)
        w = self.project(r, rtol)
        r = self.augmented(w, r)
        size = start = r.dot(w)
        directions: list[tuple[PETSc.Vec, PETSc.Vec, float]] = []
        tolerance = min(cg_rtol, math.sqrt(math.sqrt(max(start, 0.0)))) ** 2
        for _ in range(max_it):
            if size <= tolerance * start or size <= 0.0:
                break
            p = w.copy()
            p.scale(-1.0)
            for q, H_q, curvature in directions:
                p.axpy(w.dot(H_q) / curvature, q)
            H_p = self.hessian(p)
            curvature, total = p.dot(H_p), n.copy()
            total.axpy(1.0, t)
            to_boundary = self.to_boundary(total, p, radius, longest=math.inf)
            alpha = -r.dot(p) / curvature if curvature > 0 else math.inf
            t.axpy(min(alpha, to_boundary), p)
            H_t.axpy(min(alpha, to_boundary), H_p)
            if alpha >= to_boundary:
                break
            r.axpy(alpha, H_p)
            directions.append((p, H_p, curvature))
            w = self.project(r, rtol)
            r = self.augmented(w, r)
            size = r.dot(w)
        return t, H_t


def _zero(like: PETSc.Vec) -> PETSc.Vec:
    out = like.duplicate()
    out.set(0.0)
    return out
