"""Newton's method in the design alone: the state of every point is solved for, steps are kept in a trust region.

Full steps in state, design and multiplier together are cheapest where the equations are nearly linear. Where they bend,
as at low viscosity, these steps end far from the equations, and a search along them finds little. Here a point is a
state (a feasible path): minimize J(u(z), z) by conjugate gradients on the reduced Hessian, preconditioned by the inner
product of the design, until they are accurate enough, leave the region, or meet negative curvature (T. Steihaug, SIAM
J. Numer. Anal. 20, 1983; A. R. Conn, N. I. M. Gould, P. L. Toint, Trust-Region Methods, 2000, chapter 7). A state is
solved for from the linearized one, by a few Newton steps over all of time.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

from petsc4py import PETSc

from pdeopt.control.linearization import Elimination
from pdeopt.control.metric import RieszMetric
from pdeopt.control.problem import ControlProblem
from pdeopt.control.reduced import reduced_gradient
from pdeopt.core.arrays import assign, copy
from pdeopt.core.errors import SolveFailure
from pdeopt.core.monitor import History, Reason, Record
from pdeopt.optimize.fullspace.curvature import PRODUCTS, curves_down
from pdeopt.optimize.fullspace.method import FullSpaceMethod
from pdeopt.optimize.parts.trustregion import RatioRule, has_vanished, reduction_ratio
from pdeopt.optimize.parts.trustsubproblem import TrustStep, steihaug

#: The loosest relative residual of conjugate gradients, and their most iterations in a step.
LOOSEST_RTOL, MAX_PRODUCTS = 0.1, 200

#: How the radius follows the agreement of J with its model.
RADIUS = RatioRule(shrink=0.25)


class FeasibleNewton(FullSpaceMethod):
    """A step minimizes the quadratic model of z -> J(u(z), z) in a ball, and is taken where J falls with the model.

    Args:
        problem: the control problem.
        x: the start, and a guess of its state; moved.
        lam: the adjoint is written here.
        gauss_newton: leave the constraint's curvature out of the Hessian.

    Attributes:
        radius: of the trust region, in the norm of the design; that of the first step of conjugate gradients at first.
    """

    kind = "feasible"

    def __init__(self, problem: ControlProblem, x: PETSc.Vec, lam: PETSc.Vec, *, gauss_newton: bool = False) -> None:
        self.problem, self.x, self.lam, self.gauss_newton = problem, x, lam, gauss_newton
        self.metric, self.lin = RieszMetric(problem), problem.at(x)
        self.radius: float | None = None
        self._is_state, self._products, self._note = False, 0, ""

    def record(self, iteration: int) -> Record:
        if not self._is_state:
            state, design = self.problem.split(self.x)
            self.problem.join(self.problem.solve_state(design, state), design).copy(self.x)
            self.lin, self._is_state = self.problem.at(self.x), True
        self.problem.solve_adjoint(self.lin).copy(self.lam)
        self._optimality = self.metric.dual_norm(self.lin.lagrangian_gradient(self.lam))
        feasibility = self.metric.feasibility(self.lin)
        radius = self.radius or math.nan
        return Record(iteration, self.lin.value, feasibility, self._optimality, radius, self._products, self._note)

    def step(self) -> Reason:
        lam = None if self.gauss_newton else self.problem.layout.rows(self.lam)
        reduced = Elimination(self.lin, self.problem.propagator, partial(self.lin.hvp_fields, lam))
        trial = self._minimum_of_model(reduced)
        self._products = trial.products
        _, design = self.problem.split(self.x)
        try:
            x = self._ahead(reduced, trial, design)
            lin = self.problem.at(x)
            value = lin.value
        except SolveFailure:
            value = math.inf
        ratio = reduction_ratio(self.lin.value, value, trial.decrease)
        radius = trial.length if self.radius is None else self.radius
        self.radius = RADIUS.after(ratio, radius, trial.length)
        self._note = "" if ratio >= RADIUS.accept else "rejected" if math.isfinite(value) else "no state, rejected"
        if ratio >= RADIUS.accept:
            x.copy(self.x)
            self.lin = lin
        elif has_vanished(self.radius, self.metric.control_norm(self.lin.z)):
            return Reason.DIVERGED_STAGNATION
        return Reason.ITERATING

    def _minimum_of_model(self, reduced: Elimination) -> TrustStep:
        """Of J + g.d + d.H d / 2 in the ball, to a part of |g| that makes the convergence superlinear."""
        rtol, scaled = min(LOOSEST_RTOL, math.sqrt(self._optimality)), self.problem.create_design()

        def inverse(r: Any) -> Any:
            assign(scaled, r)
            return copy(self.metric.design_inverse(scaled, scaled))

        g = reduced_gradient(self.lin, self.lam)
        return steihaug(self.problem.grid, lambda d: -reduced(d).rest, g, self.radius, rtol, MAX_PRODUCTS, inverse)

    def _ahead(self, reduced: Elimination, trial: TrustStep, design: PETSc.Vec) -> PETSc.Vec:
        """The state and design of a step. Raises `SolveFailure`."""
        guess = self.problem.create_multiplier()
        assign(guess, self.lin.u + reduced.state(trial.d))
        assign(design, copy(design) + trial.d)
        return self.problem.join(self.problem.solve_state(design, guess), design)

    def ways(self) -> dict[str, list[str]]:
        return {"gauss-newton" if self.gauss_newton else "full": ["reduced"]}

    def curves_down(self, history: History) -> bool:
        """Conjugate gradients are Lanczos' method: those of the last step count as its products."""
        return curves_down(self.metric, self.lin, self.lam, products=PRODUCTS - self._products)

    def memory(self) -> dict[str, Any]:
        """What a restart needs beside x and lam."""
        return {"radius": self.radius or 0.0, "is_state": float(self._is_state)}

    def recall(self, memory: dict[str, Any]) -> None:
        """Go on from the `memory` of an earlier run."""
        self.radius, self._is_state = memory["radius"] or None, bool(memory["is_state"])

    def destroy(self) -> None:
        """There are no KKT solvers to be freed."""
