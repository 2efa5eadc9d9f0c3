"""Newton's method on the KKT system with a line search on the augmented Lagrangian J + lam.F + rho |F|^2.

The search moves x and lam together (P. E. Gill, W. Murray, M. A. Saunders, M. H. Wright, Some theoretical
properties of an augmented Lagrangian merit function, 1986). With F' dx = -F and W dx + F'^T dlam = -L_x the merit
function's derivative along the step is -dx.W dx + 2 dlam.F - 2 rho |F|^2.

Where J has kinks in its derivative, as a penalty max(u - b, 0)^2 has, the Hessian ahead is another one, and J rises
along a full step although the next step, with the Hessian there, comes down: semismooth Newton converges by full steps.
So a few full steps in a row are tried before the search, and taken where they end below (watchdog: R. M. Chamberlain,
M. J. D. Powell, C. Lemarechal, H. C. Pedersen, Math. Programming Study 16, 1982). They are tried only where the
quadratic model of J alone explains the rise: a smooth J in a nonlinear problem costs no solves in vain. Where they have
been in vain once, they are not tried again for the same J.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from petsc4py import PETSc
from torch import Tensor

from pdeopt.control.linearization import Linearization
from pdeopt.control.metric import RieszMetric
from pdeopt.control.problem import ControlProblem
from pdeopt.core.arrays import free_garbage
from pdeopt.core.errors import SolveFailure
from pdeopt.core.monitor import History, Reason, Record
from pdeopt.core.ranks import freed
from pdeopt.kkt.operator import Hessian
from pdeopt.optimize.fullspace.curvature import PRODUCTS, curves_down, is_linear_quadratic
from pdeopt.optimize.fullspace.kktsolver import KKTSolver
from pdeopt.optimize.fullspace.method import FullSpaceMethod
from pdeopt.optimize.parts.linesearch import Backtracking
from pdeopt.optimize.parts.merit import Merit, Point

#: The Hessians in the order in which they are tried, and the step size below which the next one is.
SHORTEST_STEP: dict[Hessian, float] = {"full": 0.1, "gauss-newton": 1e-10}

#: The loosest relative tolerance of a KKT solve.
LOOSEST_RTOL = 1e-2

#: Most full steps over kinks, the first one counted.
MAX_OVER_KINKS = 4


class NewtonKKT(FullSpaceMethod):
    """A step solves [W F'^T; F' 0] (dx, dlam) = -(L_x, F) with the full Hessian W of the Lagrangian.

    Where W gives no descent direction of the merit function, or one along which it soon grows, the step is
    repeated with the Gauss-Newton Hessian, which is positive if the objective is convex.

    Args:
        problem, x, lam: the start; both vectors are moved.
        penalty: rho at the start, relative to |J| there.
        rtol: smallest relative tolerance of the KKT solves; far from the solution they are as loose as the
            convergence allows.
        enough: the |(L_x, F)| to which a linear-quadratic problem is solved at once; 0 to approach it as others.
        outer: prefix of the linear solver's options, before `kkt_`.
        precond: its default preconditioner; see `KKTSolver`.
        kkt: settings of the linear solver, by the names of `KKTSettings`.
        gauss_newton: take the Gauss-Newton Hessian alone.
        loosest: largest relative tolerance of a KKT solve.

    Attributes:
        is_poor: whether the last step was below half its length, or fell back to the Gauss-Newton Hessian.
    """

    kind = "newton"
    _looked_at: Linearization | None = None

    def __init__(
        self,
        problem: ControlProblem,
        x: PETSc.Vec,
        lam: PETSc.Vec,
        *,
        penalty: float = 1e-3,
        rtol: float = 1e-8,
        enough: float = 0.0,
        outer: str = "sqp_",
        precond: str = "auto",
        kkt: Mapping[str, Any] | None = None,
        gauss_newton: bool = False,
        loosest: float = LOOSEST_RTOL,
    ) -> None:
        self.problem, self.x, self.lam, self.is_poor = problem, x, lam, False
        self._hessians = SHORTEST_STEP.copy()
        if gauss_newton:
            del self._hessians["full"]
        self.loosest = loosest
        self.step_size, self.rtol, self.outer, self.precond = 1.0, rtol, outer, precond
        self._kkt = dict(kkt or {})
        self.metric = RieszMetric(problem)
        self._solvers: dict[Hessian, KKTSolver] = {}
        self._note, self._krylov = "", 0
        self.lin = problem.at(x)
        self._residual = self._previous = math.inf  # |(L_x, F)| now and before the last step
        self._in_vain = False  # were full steps over kinks
        self.merit = Merit(self.metric, penalty * max(abs(self.lin.value), 1e-8))
        self._enough = enough if enough > 0 and is_linear_quadratic(self.lin) else math.inf

    def record(self, iteration: int) -> Record:
        free_garbage(self.problem.grid.comm)  # the step, and points that were tried
        self._evaluate()
        krylov = self._krylov = sum(solver.take_iterations() for solver in self._solvers.values())
        feasibility, optimality = self.metric.feasibility(self.lin), self._optimality
        self._residual = self._size
        return Record(iteration, self.lin.value, feasibility, optimality, self.step_size, krylov, self._note)

    def _evaluate(self) -> None:
        """The gradient at the point, and the sizes of what is left."""
        self._gradient = self.lin.lagrangian_gradient(self.lam)
        self._optimality = self.metric.dual_norm(self._gradient)
        self._size = math.hypot(self._optimality, self.metric.feasibility(self.lin))

    def step(self) -> Reason:
        reason = Reason.DIVERGED_LINE_SEARCH
        for hessian, shortest in self._hessians.items():
            dx, dlam, curvature = self._direction(hessian)
            slope = self.merit.slope(self.lin, dlam, curvature)
            curves_down = self._solver(hessian).curves_down
            notes = ["" if hessian == "full" else "Gauss-Newton", "negative curvature" if curves_down else ""]
            notes += [self._solver(hessian).note]
            self._note = ", ".join(filter(None, notes))
            if slope < 0 or self.merit.is_rounding(self.lin, slope):
                reason = self._move(dx, dlam, slope, Backtracking(shortest=shortest))
            if reason == Reason.ITERATING:
                break
        self.is_poor = self.step_size < 0.5 or hessian != next(iter(self._hessians))
        self._previous = self._residual
        return reason

    def _solver(self, hessian: Hessian) -> KKTSolver:
        if hessian not in self._solvers:
            self._solvers[hessian] = KKTSolver(self.metric, hessian, self.outer, self.precond, self._kkt)
        return self._solvers[hessian]

    def _direction(self, hessian: Hessian) -> tuple[PETSc.Vec, PETSc.Vec, float]:
        """dx, dlam and dx'W dx."""
        solver = self._solver(hessian)
        solver.set_point(self.lin, self.lam)
        dx, dlam = solver.solve_blocks(self._gradient, self.lin.residual, self._tolerance(), self._size)
        dx.scale(-1.0)
        dlam.scale(-1.0)
        image = dx.duplicate()
        with freed(image):
            return dx, dlam, dx.dot(solver.operator.apply_hessian(dx, image))

    def _tolerance(self) -> float:
        """A forcing term that keeps the convergence superlinear: 0.9 (|r_k| / |r_{k-1}|)^2.

        Choice 2 of S. C. Eisenstat, H. F. Walker, Choosing the forcing terms in an inexact Newton method, 1996. What
        one system decides is solved at once: a second one would begin its Krylov space again.
        """
        reduction = self._residual / self._previous if math.isfinite(self._previous) else 1.0
        return max(self.rtol, min(self.loosest, 0.9 * reduction**2, self._enough / self._size))

    def _move(self, dx: PETSc.Vec, dlam: PETSc.Vec, slope: float, search: Backtracking) -> Reason:
        here = Point(self.x, self.lam, self.lin)
        start, trials = self.merit(here), {1.0: self.merit.ahead(here, 1.0, dx, dlam)}
        if not slope < 0:  # of which the merit function would see nothing but rounding
            shortens = self.merit.residual(trials[1.0]) < self._residual
            return self._take(trials[1.0], 1.0) if shortens else Reason.DIVERGED_LINE_SEARCH
        enough = search.limit(start, slope, 1.0)
        is_above = self.merit(trials[1.0]) > enough and not self._in_vain
        if is_above and self.merit.has_kinks(here, dx, trials[1.0], start + 0.5 * slope):
            beyond = self._over_kinks(trials[1.0], enough)
            if beyond is not None:
                return self._take(beyond, 1.0)
            self._in_vain = True

        def merit(size: float) -> float:
            point = trials[size] if size in trials else self.merit.ahead(here, size, dx, dlam)
            trials[size] = self.merit.corrected(point, search.limit(start, slope, size))
            return self.merit(trials[size])

        size = search.search(merit, start, slope)
        if size is None:
            finite = all(math.isfinite(point.lin.value) for point in trials.values())
            return Reason.DIVERGED_LINE_SEARCH if finite else Reason.DIVERGED_NAN
        return self._take(trials[size], size)

    def _over_kinks(self, point: Point, enough: float) -> Point | None:
        """The first point of full steps from this one on where the merit function is at most `enough`."""
        here, size = Point(self.x.copy(), self.lam.copy(), self.lin), self.step_size
        with suppress(SolveFailure):
            for count in range(1, MAX_OVER_KINKS):
                self._take(point, 1.0)
                self._evaluate()
                dx, dlam, _ = self._direction("full")
                point = self.merit.ahead(point, 1.0, dx, dlam)
                if self.merit(point) <= enough:
                    self._note = f"{count + 1} steps over kinks"
                    break
        self._take(here, size)
        self._evaluate()
        return point if self.merit(point) <= enough else None

    def _take(self, point: Point, size: float) -> Reason:
        """Go there."""
        point.x.copy(self.x)
        point.lam.copy(self.lam)
        self.lin, self.step_size = point.lin, size
        return Reason.ITERATING

    def curves_down(self, history: History) -> bool:
        """By the inertia of factors: of the last step's, or where these are missing or suspect, of new ones here.

        Conjugate gradients on the reduced Hessian are Lanczos' method: those of the last step count as its products.
        """
        solver = self._solver("full")
        if self._looked_at is not self.lin:
            if solver.is_mumps and solver.descents() != 0:
                solver.set_point(self.lin, self.lam, self._held())
                solver.factor()
            if (descents := solver.descents()) is not None:
                self._is_saddle = descents > 0
            else:
                done = self._krylov if solver.way == "reduced" else 0
                self._is_saddle = curves_down(self.metric, self.lin, self.lam, self._held(), PRODUCTS - done)
            self._looked_at = self.lin
        return self._is_saddle

    def _held(self) -> Tensor | None:
        """Which design variables do not move, see `KKTOperator.set_point`. Collective."""
        return None

    def memory(self) -> dict[str, Any]:
        """What a restart needs beside x and lam."""
        ways = {hessian: solver.choice.stage for hessian, solver in self._solvers.items()}
        last = {"step_size": self.step_size, "previous": self._previous, "in_vain": self._in_vain}
        return {"penalty": self.merit.penalty, **last, "ways": ways}

    def recall(self, memory: dict[str, Any]) -> None:
        """Go on from the `memory` of an earlier run."""
        self.merit.penalty = memory["penalty"]
        self.step_size, self._previous, self._in_vain = memory["step_size"], memory["previous"], memory["in_vain"]
        for hessian, stage in memory["ways"].items():
            self._solver(hessian).choice.resume(stage)

    def destroy(self) -> None:
        """Free the KKT solvers."""
        for solver in self._solvers.values():
            solver.destroy()


def go_on_with(newton: NewtonKKT, problem: ControlProblem) -> None:
    """Let the present point of a method be its start for another objective; linear solvers stay. Collective.

    Args:
        newton: the method.
        problem: the same but for the objective, whose Hessian has the pattern of the one before.
    """
    newton.problem, newton.lin = problem, problem.at(newton.x)
    newton.merit = Merit(RieszMetric(problem), newton.merit.penalty)
    newton.step_size, newton._looked_at, newton._previous, newton._in_vain = 1.0, None, math.inf, False
    newton._evaluate()
    newton._residual = newton._size
