"""What the methods share whose unknowns are state, design and multiplier: their results, and when they stop."""

from __future__ import annotations

import math
from collections.abc import Callable

from petsc4py import PETSc

from pdeopt.control.linearization import Linearization
from pdeopt.control.metric import RieszMetric
from pdeopt.control.problem import ControlProblem
from pdeopt.control.verify import prices_controls
from pdeopt.core.monitor import ControlResult, History, Reason, Record, remedy
from pdeopt.kkt.operator import Hessian
from pdeopt.optimize.fullspace.curvature import NO_MINIMUM, curves_down
from pdeopt.optimize.fullspace.kktsolver import KKTSolver


class FullSpaceMethod:
    """What methods with state, design and multiplier as unknowns share; `iterate` runs them.

    A method writes `record`, which evaluates the present point and prepares a step, and `step`, which moves x and lam
    in place and leaves them where it fails; `memory` and `recall` for what it remembers beside both, so that an
    interrupted run goes on with the same iterates; and `destroy`, which frees its linear solvers. All are collective
    over the ranks of the grid. Optimality is |L_x| in the dual norm of the Riesz metric, feasibility |F| in that of
    residuals, and does not depend on mesh and time step.

        method = NewtonKKT(problem, x, lam)
        result = iterate(method, full_space_test(100, 1e-8, 1e-8))
        method.destroy()

    Attributes:
        kind: what `-sqp_type` calls it.
        problem: the control problem.
        x: [u | z | p], the present state and design, a vector of `problem.create_primal`.
        lam: the multiplier of F = 0, (n_local, n) on each rank, a vector of `problem.create_multiplier`.
        lin: the problem's linearization at x.
        metric: its norms.
    """

    kind: str
    _solvers: dict[Hessian, KKTSolver]
    problem: ControlProblem
    metric: RieszMetric
    lin: Linearization
    x: PETSc.Vec
    lam: PETSc.Vec

    def unsolved(self) -> Record:
        return Record(0, self.lin.value, math.nan, math.nan, math.nan, 0, "start")

    def remedy(self, reason: Reason) -> str:
        return remedy(reason, "sqp")

    def ways(self) -> dict[str, list[str]]:
        """How KKT systems were solved, by their Hessian: the words of `-sqp_kkt_precond` in the order of their use."""
        return {hessian: solver.choice.ways for hessian, solver in self._solvers.items()}

    def result(self, reason: Reason, message: str, history: History) -> ControlResult:
        state, design = self.problem.split(self.x)
        if reason == Reason.CONVERGED_OPTIMALITY and self.curves_down(history):
            message = f"{message}: {NO_MINIMUM}"
        return ControlResult(design, reason, with_price(message, reason, self.problem), history, state, self.lam)

    def curves_down(self, history: History) -> bool:
        """Whether the point that the method ends at is seen to be no minimum. Collective.

        A method that follows negative curvature looks only where it never moved.
        """
        return len(history) == 1 and curves_down(self.metric, self.lin, self.lam)


def with_price(message: str, reason: Reason, problem: ControlProblem) -> str:
    """The message of a solver, with what is missing where it diverged and a control has no price. Collective."""
    if reason >= 0 or "ControlCost" in message or prices_controls(problem):
        return message
    return f"{message}; a control has no price: add ControlCost to the objective"


def full_space_test(max_it: int, opt_tol: float, feas_tol: float) -> Callable[[Record], Reason]:
    """The test that stops at optimality <= opt_tol and feasibility <= feas_tol, after max_it iterations, or at NaN."""

    def test(record: Record) -> Reason:
        if not (math.isfinite(record.objective) and math.isfinite(record.feasibility)):
            return Reason.DIVERGED_NAN
        if record.optimality <= opt_tol and record.feasibility <= feas_tol:
            return Reason.CONVERGED_OPTIMALITY
        return Reason.DIVERGED_MAX_IT if record.iteration >= max_it else Reason.ITERATING

    return test
