"""Inequalities c(x) <= 0 on states, controls and paths by a primal-dual interior point method in full space.

With slacks s > 0 and multipliers nu > 0, functions as c is (weights w, see `inequalities.py`), the optimality system is

    L_x = J' + F'^T lam + c'^T w nu = 0,   F = 0,   c + s = 0,   s nu = mu,

and mu goes to zero. Without ds and dnu, a step of Newton's method is the KKT system of an unconstrained problem,

    (L'' + c'^T diag(sigma) c') dx + F'^T dlam = -(J' + F'^T lam + c'^T r),   F' dx = -F,
    sigma = w nu/s,   r = w [(mu - ds_a dnu_a)/s + (nu/s)(c + s)],

which the solvers of such systems take as they are: the diagonal weight sigma lies between 1e-11 and 1e14 times w, and
factors as well as matched Schur complements stand that. A first solve with mu = 0 gives (ds_a, dnu_a), a second one
with the same matrix the step, with mu (mu_a/mu)^3 and the correction of second order: S. Mehrotra, On the
implementation of a primal-dual interior point method, SIAM J. Optim. 2 (1992) 575-601. What is around that, fractions
to the boundary, slacks, and a merit function with |.|_1 of the residuals, is J. Nocedal, S. J. Wright, Numerical
Optimization, 2006, chapter 19. For states: M. Hinze, A. Schiela, Discretization of interior point methods for state
constrained elliptic optimal control problems, Comput. Optim. Appl. 48 (2011).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from petsc4py import PETSc
from torch import Tensor

from pdeopt.control.metric import RieszMetric
from pdeopt.control.problem import ControlProblem
from pdeopt.core.errors import SolveFailure
from pdeopt.core.monitor import ControlResult, History, Reason, Record
from pdeopt.core.ranks import freed
from pdeopt.core.settings import Settings, setting
from pdeopt.kkt.operator import Hessian
from pdeopt.optimize.fullspace.barrier import Barrier, Feasibility, Iterate, Step
from pdeopt.optimize.fullspace.kktchoice import is_small
from pdeopt.optimize.fullspace.kktsolver import KKTSolver
from pdeopt.optimize.fullspace.method import FullSpaceMethod
from pdeopt.optimize.fullspace.newton import NewtonKKT
from pdeopt.optimize.parts.inequalities import Inequalities, InequalityReport, own_rows, whole_rows

#: Unknowns of a KKT system above which it is solved by iterations where these are known to be few.
LARGE = 20_000

#: s nu is brought below this part of the tolerance.
CENTERING = 0.05

#: Relative tolerance of the first solve of a step, which only says how far mu can fall.
LOOSE = 1e-2


@dataclass(frozen=True)
class InteriorSettings(Settings, prefix="interior_"):
    """The interior point method for inequalities on states and paths."""

    start: str = setting(
        "newton",
        "where it begins: at the solution without inequalities, by Newton's method, or at the point that is given",
        choices=("newton", "given"),
    )
    start_it: int = setting(20, "most Newton steps without inequalities", at_least=0)
    start_tol: float = setting(1e-4, "reduction of the residual in these steps", above=0, at_most=1)
    mu: float = setting(None, "first mean of slack times multiplier; default |J| over the measure", above=0, kind=float)
    to_boundary: float = setting(0.99, "least part of the way to the boundary of s, nu > 0", above=0, at_most=1)


@dataclass
class InequalityResult(ControlResult):
    """The result of a problem with inequalities.

    Attributes:
        inequalities: by name: multipliers as densities and their integrals, violations, and where they are active.
    """

    inequalities: dict[str, InequalityReport] = field(default_factory=dict)


class InequalityMethod(FullSpaceMethod):
    """What the methods for inequalities c <= 0 share: their results, and where these miss what was asked for.

    Attributes:
        rows: c.
        tol: violations below it are none.
    """

    rows: Inequalities
    tol: float

    @abstractmethod
    def pair(self, c: Tensor) -> tuple[Tensor, Tensor]:
        """Slacks and multipliers, (n_local, K) each, where c has these values."""

    def remedy(self, reason: Reason) -> str:
        told, c = super().remedy(reason), self.rows.value(self.lin)
        if reason >= Reason.ITERATING or self.rows.largest(c) <= self.tol:
            return told
        name, step, time, component = self.rows.where(c)
        missed = f"{name} is missed by {self.rows.largest(c):.3g} in component {component}"
        return "; ".join(filter(None, [f"{missed} at step {step}, t = {time:.6g}", told]))

    def result(self, reason: Reason, message: str, history: History) -> ControlResult:
        found, c = super().result(reason, message, history), self.rows.value(self.lin)
        parts = found.design, reason, found.message, history, found.state, found.multiplier
        return InequalityResult(*parts, inequalities=self.rows.reports(c, *self.pair(c)))


class InteriorPoint(InequalityMethod):
    """See the module. With negative curvature, or where no step is found, it is repeated with the Gauss-Newton Hessian.

    The first iterations are those of Newton's method without inequalities (`InteriorSettings.start`). Optimality is the
    largest of |L_x| and s nu; feasibility of |F|, |c + s| and the entries of c.

    Args:
        problem, x, lam: the start; both vectors are moved.
        inequalities: c.
        settings: of the method.
        tol: to which s nu is to fall.
        rtol: relative tolerance of the KKT solves.
        outer: prefix of the linear solver's options, before `kkt_`.
        kkt: settings of the linear solver, by the names of `KKTSettings`.

    Attributes:
        point: with slacks and multipliers; None while inequalities are left out.
    """

    kind = "interior"

    def __init__(
        self,
        problem: ControlProblem,
        x: PETSc.Vec,
        lam: PETSc.Vec,
        inequalities: Inequalities,
        settings: InteriorSettings | None = None,
        *,
        tol: float = 1e-8,
        rtol: float = 1e-8,
        outer: str = "sqp_",
        kkt: Mapping[str, Any] | None = None,
    ) -> None:
        self.problem, self.x, self.lam, self.rows = problem, x, lam, inequalities
        self.settings, self.tol, self.rtol = settings or InteriorSettings(), tol, rtol
        self.metric, self.lin = RieszMetric(problem), problem.at(x)
        self._words: dict[str, Any] = {"outer": outer, "precond": suited(problem, inequalities), "kkt": kkt}
        words = {"rtol": rtol, **self._words}
        self._barrier = Barrier(self.metric, inequalities, tol)
        self._feasible = Feasibility(inequalities, x, lam, tol, words)
        self._solvers: dict[Hessian, KKTSolver] = {}
        self.point: Iterate | None = None
        self._given, self._first, self._bent, self._note, self.step_size = (
            (x.copy(), lam.copy()),
            math.inf,
            False,
            "",
            1.0,
        )
        begins_free = self.settings.start == "newton" and self.settings.start_it > 0
        self._free = NewtonKKT(problem, x, lam, **words) if begins_free else None

    # -- without inequalities ----------------------------------------------------------------------------------

    def _record_free(self, newton: NewtonKKT, iteration: int) -> Record | None:
        """Of Newton's method without inequalities; None where that is over."""
        record = newton.record(iteration)
        size = math.hypot(record.optimality, record.feasibility)
        self._first = size if iteration == 0 else self._first
        if size <= self.settings.start_tol * self._first or iteration >= self.settings.start_it or size != size:
            return None
        self.lin, note = newton.lin, ", ".join(filter(None, ["without inequalities", record.note]))
        feasibility = max(record.feasibility, self.rows.largest(self.rows.value(self.lin)))
        return replace(record, feasibility=feasibility, note=note)

    def _enter(self) -> Iterate:
        """Slacks and multipliers at the point that Newton's method came to, or at the given one where it failed."""
        if self._free is not None:
            self.lin = self._free.lin
            if not math.isfinite(self.lin.value + self.metric.feasibility(self.lin)):
                self._given[0].copy(self.x)
                self._given[1].copy(self.lam)
                self.lin = self.problem.at(self.x)
            self._free.destroy()
            self._free = None
        self.point = self._barrier.begin(self.x, self.lam, self.lin, self.settings.mu)
        self._feasible.first, self._note, self.step_size = self.rows.largest(self.point.nu), "", 1.0
        return self.point

    # -- with them ---------------------------------------------------------------------------------------------

    def record(self, iteration: int) -> Record:
        if self._free is not None:
            record = self._record_free(self._free, iteration)
            if record is not None:
                return record
        point = self.point or self._enter()
        self._residual = self.metric.feasibility(point.lin)
        miss, violation = self.rows.norm(point.c + point.slack), self.rows.largest(point.c)
        optimality = self.metric.dual_norm(self._barrier.gradient(point))
        krylov = sum(solver.take_iterations() for solver in self._solvers.values())
        note = f"mu {self._barrier.mean(point.slack, point.nu):.1e}" + (f", {self._note}" if self._note else "")
        return Record(
            iteration,
            point.lin.value,
            max(self._residual, miss, violation),
            max(optimality, self.rows.largest(point.slack * point.nu)),
            self.step_size,
            krylov,
            note,
        )

    def step(self) -> Reason:
        if self._free is not None:
            try:
                reason = self._free.step()
            except SolveFailure:
                reason = Reason.DIVERGED_LINEAR_SOLVE
            self.lin = self._free.lin
            if reason != Reason.ITERATING:
                self._enter()
            return Reason.ITERATING
        assert self.point is not None
        if self._feasible.is_hopeless(self.point):
            return Reason.DIVERGED_INFEASIBLE
        if self._feasible.is_doubtful(self.point, self.step_size):
            return self._compromise(self.point)
        try:
            reason = self._interior_step(self.point)
        except SolveFailure:
            if self._feasible.is_answered or not self._feasible.is_violated(self.point):
                raise
            reason = Reason.DIVERGED_LINEAR_SOLVE
        if reason == Reason.ITERATING or self._feasible.is_answered or not self._feasible.is_violated(self.point):
            return reason
        return self._compromise(self.point)

    def _compromise(self, point: Iterate) -> Reason:
        """Go to the point that violates least, and on from there where it does not prove that there is none."""
        x, lam, price, is_proof = self._feasible.least_violation(point.lin.value)
        self.lin, self._note, self.step_size = self.problem.at(x), "from least violations", 1.0
        _take(self, self._barrier.begin(x, lam, self.lin, self.settings.mu, price))
        return Reason.DIVERGED_INFEASIBLE if is_proof else Reason.ITERATING

    def _interior_step(self, point: Iterate) -> Reason:
        part = max(self.settings.to_boundary, 1.0 - self._barrier.mean(point.slack, point.nu))
        hessians: tuple[Hessian, ...] = ("full", "gauss-newton")
        for hessian in hessians:
            step, curvature = self._direction(point, hessian)
            self._bent = hessian == "gauss-newton"
            if curvature >= 0:
                found, self.step_size = self._barrier.search(point, step, curvature, part)
                if found is not None:
                    self._note = "Gauss-Newton" if self._bent else ""
                    _take(self, found)
                    return Reason.ITERATING
        return Reason.DIVERGED_LINE_SEARCH

    def _direction(self, point: Iterate, hessian: Hessian) -> tuple[Step, float]:
        """The step of predictor and corrector, and dx'W dx; -1 where factors say that W is not positive."""
        if hessian not in self._solvers:
            words = self._words
            self._solvers[hessian] = KKTSolver(self.metric, hessian, words["outer"], words["precond"], words["kkt"])
        solver, s, nu = self._solvers[hessian], point.slack, point.nu
        lin = self.rows.with_hessian(point.lin, self.rows.weight * nu / s, nu if hessian == "full" else None)
        solver.set_point(lin, point.lam)
        affine, mu = self._solve(solver, point, torch.zeros_like(s), max(self.rtol, LOOSE)), self._barrier.mean(s, nu)
        sizes = self._barrier.longest(s, affine.ds, 1.0), self._barrier.longest(nu, affine.dnu, 1.0)
        left = self._barrier.mean(s + sizes[0] * affine.ds, nu + sizes[1] * affine.dnu)
        target = max((left / mu) ** 3 * mu, CENTERING * self.tol)
        step = self._solve(solver, point, target - affine.ds * affine.dnu, self.rtol)._replace(mu=target)
        if solver.descents():
            return step, -1.0
        return step, float(step.dx.dot(solver.operator.apply_hessian(step.dx, step.dx.duplicate())))

    def _solve(self, solver: KKTSolver, point: Iterate, target: Tensor, rtol: float) -> Step:
        """The step to s nu = target to first order."""
        rows, s, nu, miss = self.rows, point.slack, point.nu, point.c + point.slack
        g = point.lin.lagrangian_gradient(point.lam)
        g.axpy(1.0, rows.vjp(point.lin, rows.weight * (target + nu * miss) / s))
        dx, dlam = solver.solve_blocks(g, point.lin.residual, rtol)
        dx.scale(-1.0)
        dlam.scale(-1.0)
        ds = torch.where(rows.kept, -miss - rows.jvp(point.lin, dx), 0.0)
        return Step(dx, dlam, ds, torch.where(rows.kept, (target - nu * ds) / s - nu, 0.0), 0.0)

    # -- the end -----------------------------------------------------------------------------------------------

    def pair(self, c: Tensor) -> tuple[Tensor, Tensor]:
        return (-c, torch.zeros_like(c)) if self.point is None else (self.point.slack, self.point.nu)

    def curves_down(self, history: History) -> bool:
        """Whether the last step had to leave the constraint's curvature out, for the Hessian was not positive."""
        return self._bent

    def memory(self) -> dict[str, Any]:
        """What a restart on any number of ranks needs beside x and lam. Collective."""
        if self.point is None:
            return {"slack": [], "first": self._first}
        known = {"slack": whole_rows(self.rows, self.point.slack), "nu": whole_rows(self.rows, self.point.nu)}
        own = {"answered": float(self._feasible.is_answered), "first_nu": self._feasible.first}
        return known | own | {"penalty": self._barrier.penalty, "step_size": self.step_size}

    def recall(self, memory: dict[str, Any]) -> None:
        """Go on from the `memory` of an earlier run."""
        if not memory["slack"]:
            self._first = memory["first"]
            return
        self._enter()
        assert self.point is not None
        slack, nu = (own_rows(self.rows, memory[name]) for name in ("slack", "nu"))
        self.point = self.point._replace(slack=slack, nu=nu)
        self._barrier.penalty, self.step_size = memory["penalty"], memory["step_size"]
        self._feasible.is_answered, self._feasible.first = bool(memory["answered"]), memory["first_nu"]

    def destroy(self) -> None:
        """Free the KKT solvers."""
        with freed(*self._solvers.values(), *([] if self._free is None else [self._free])):
            pass


def _take(method: InteriorPoint, point: Iterate) -> None:
    """Move the vectors of a method to a point."""
    point.x.copy(method.x)
    point.lam.copy(method.lam)
    method.lin, method.point = point.lin, point._replace(x=method.x, lam=method.lam)


def suited(problem: ControlProblem, rows: Inequalities) -> str:
    """Factors, or for large systems of which blocks show all of the Hessian, iterations with a matched complement.

    Conjugate gradients on the reduced Hessian do not stand the spread of sigma.
    """
    is_large = float(problem.grid.sum(float(problem.layout.kkt_size))) > LARGE and not is_small(problem)
    is_plain = problem.control_map is None and problem.param_dim == 0
    return "wathen" if is_large and is_plain and rows.are_bounds else "direct"
