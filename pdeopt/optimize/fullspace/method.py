"""What the methods share whose unknowns are state, design and multiplier: their results, and when they stop."""

from __future__ import annotations

import math
from collections.abc import Callable

from petsc4py import PETSc

from pdeopt.control.linearization import Linearization
from pdeopt.control.problem import ControlProblem
from pdeopt.core.monitor import ControlResult, History, Reason, Record


class FullSpaceMethod:
    """What methods with state, design and multiplier as unknowns share.

    Attributes:
        problem: the control problem.
        lin: its linearization at x.
        x: state and design.
        lam: the multiplier.
    """

    problem: ControlProblem
    lin: Linearization
    x: PETSc.Vec
    lam: PETSc.Vec

    def unsolved(self) -> Record:
        return Record(0, self.lin.value, math.nan, math.nan, math.nan, 0, "start")

    def result(self, reason: Reason, message: str, history: History) -> ControlResult:
        state, design = self.problem.split(self.x)
        return ControlResult(design, reason, message, history, state, self.lam)


def full_space_test(max_it: int, opt_tol: float, feas_tol: float) -> Callable[[Record], Reason]:
    """Stop at optimality <= opt_tol and feasibility <= feas_tol, after max_it iterations, or at NaN."""

    def test(record: Record) -> Reason:
        if not (math.isfinite(record.objective) and math.isfinite(record.feasibility)):
            return Reason.DIVERGED_NAN
        if record.optimality <= opt_tol and record.feasibility <= feas_tol:
            return Reason.CONVERGED_OPTIMALITY
        return Reason.DIVERGED_MAX_IT if record.iteration >= max_it else Reason.ITERATING

    return test
