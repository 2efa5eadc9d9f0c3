"""The one iteration loop of the library: record, watch, test, step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

from petsc4py import PETSc

from pdeopt.errors import SolveFailure
from pdeopt.monitor import History, Monitor, Reason, Record, Result, explain
from pdeopt.problem import ControlProblem, Linearization


class Method(Protocol):
    """An optimiser as the loop sees it: a point, a record of it, and a step to the next."""

    problem: ControlProblem
    lin: Linearization
    x: PETSc.Vec
    lam: PETSc.Vec

    def record(self, iteration: int) -> Record:
        """The present point in numbers; also prepares the next step."""

    def step(self) -> Reason:
        """Go on by one iteration: ITERATING, or why there is no next point."""


#: Called with the method and the history after each record, to save a checkpoint, say.
Observer = Callable[[Method, History], None]


def iterate(
    method: Method,
    *,
    max_it: int,
    opt_tol: float,
    feas_tol: float,
    monitors: Sequence[Monitor] = (),
    observers: Sequence[Observer] = (),
    history: History | None = None,
) -> Result:
    """Step until optimality <= opt_tol and feasibility <= feas_tol, or a reason to give up.

    Args:
        history: records of an interrupted run that `method` goes on with.

    Returns:
        the last good point: a step that failed leaves the point as it was.
    """
    history, reason, detail = history or History(), Reason.ITERATING, ""
    try:
        while reason == Reason.ITERATING:
            record = method.record(_next_iteration(history))
            history.append(record)
            for monitor in monitors:
                monitor(record)
            for observer in observers:
                observer(method, history)
            reason = _test(record, max_it, opt_tol, feas_tol)
            if reason == Reason.ITERATING:
                reason = method.step()
    except SolveFailure as failure:
        reason, detail = Reason.DIVERGED_LINEAR_SOLVE, str(failure)
        if not history.records:
            history.append(Record(0, method.lin.value, math.nan, math.nan, math.nan, 0, "start"))
    state, design = method.problem.split(method.x)
    return Result(state, design, method.lam, reason, explain(reason, detail), history)


def _next_iteration(history: History) -> int:
    return int(history[-1].iteration) + 1 if len(history) else 0


def _test(record: Record, max_it: int, opt_tol: float, feas_tol: float) -> Reason:
    if not (math.isfinite(record.objective) and math.isfinite(record.feasibility)):
        return Reason.DIVERGED_NAN
    if record.optimality <= opt_tol and record.feasibility <= feas_tol:
        return Reason.CONVERGED_OPTIMALITY
    return Reason.DIVERGED_MAX_IT if record.iteration >= max_it else Reason.ITERATING
