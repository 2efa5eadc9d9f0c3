"""Optimizers as TAO types: `-tao_type python -tao_python_type pdeopt.optimize.SPQN`.

TAO makes the object, without arguments, and calls `solve`; the objective, its gradient, Hessian products, limits,
monitors and the convergence test are TAO's. An application context with `smooth_function(tao)` may bring more, a
decomposition or coarser problems, say.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from petsc4py import PETSc
from torch import Tensor

from pdeopt.core.arrays import assign, copy
from pdeopt.core.monitor import Reason, Result
from pdeopt.functions.smooth import Costs, SmoothFunction

# TaoConvergedReason
CONTINUE, CONVERGED_GATOL, CONVERGED_GRTOL, CONVERGED_GTTOL = 0, 3, 4, 5
DIVERGED_MAXITS, DIVERGED_NAN, DIVERGED_LS_FAILURE, DIVERGED_USER = -2, -4, -6, -8


class TaoFunction(SmoothFunction):
    """The objective that a TAO was given."""

    def __init__(self, tao: PETSc.TAO) -> None:
        solution = tao.getSolution()
        super().__init__(solution.getLocalSize(), tao.getComm().tompi4py(), Costs(0.5, 1.0, 1.0))
        self.tao, self._x, self._out = tao, solution.duplicate(), solution.duplicate()

    def _value(self, x: Tensor) -> float:
        assign(self._x, x)
        return float(self.tao.computeObjective(self._x))

    def _value_and_gradient(self, x: Tensor) -> tuple[float, Tensor]:
        assign(self._x, x)
        value = self.tao.computeObjectiveGradient(self._x, self._out)
        return float(value), copy(self._out)

    def _hvp(self, x: Tensor, d: Tensor) -> Tensor:
        hessian = self.tao.getHessian()[0]
        assign(self._x, x)
        self.tao.computeHessian(self._x, hessian)
        assign(self._x, d)
        hessian.mult(self._x, self._out)
        return copy(self._out)


class Solver(Protocol):
    """An optimizer as TAO needs it: its point in numbers, and a run that asks after each step whether to stop.

    Attributes:
        x, f: the present point, (size,), and its value in the unit.
        unit: of values and gradients.
        radius: step size or trust radius of the last step.
        stop: when to stop; TAO's limits replace it.
    """

    x: Tensor
    f: float
    unit: float
    radius: float
    stop: Any

    def attach(self, function: SmoothFunction) -> None:
        """Make `function` the one that is minimized."""

    def optimality(self) -> float:
        """|f'| at x."""

    def minimize(self, x: Tensor, *, until: Callable[[Any], bool]) -> Result:
        """Go down from x until the callback, called with this object, says so."""


def solve(solver: Solver, tao: PETSc.TAO) -> None:
    """Minimize TAO's objective from TAO's solution, which is overwritten. Collective.

    Args:
        tao: with an objective and its gradient; limits, tolerances, monitors and the convergence test are its own. Its
            application context may offer `smooth_function(tao)`, the objective with more than TAO can say of it.
    """
    context = tao.getAppCtx()
    make = getattr(context, "smooth_function", TaoFunction)
    solver.attach(make(tao))
    solver.stop = _Limits()
    run = _Run(tao)
    result = solver.minimize(copy(tao.getSolution()), until=run)
    assign(tao.getSolution(), result.design)
    if run.reason == CONTINUE:
        run.reason = DIVERGED_NAN if "nan" in result.message else DIVERGED_LS_FAILURE
    tao.setConvergedReason(run.reason)


class _Limits:
    """Stops at nothing: the tests are TAO's."""

    max_it, max_gradients, max_work, gtol, rtol, target, monitor = 2**62, 0, 0.0, -1.0, None, None, False

    def tolerance(self, first: float) -> float:
        """None that a norm meets."""
        return self.gtol

    def stalled(self) -> Reason:
        """A failure: the tolerances are TAO's."""
        return Reason.DIVERGED_STAGNATION


class _Run:
    """Tells TAO of each iteration, and whether it wants to stop."""

    def __init__(self, tao: PETSc.TAO) -> None:
        self.tao, self.reason, self.iteration = tao, CONTINUE, 0
        self.first = float("nan")

    def __call__(self, solver: Solver) -> bool:
        tao, f, norm = self.tao, solver.f * solver.unit, solver.optimality() * solver.unit
        if self.iteration == 0:
            self.first = norm
        assign(tao.getSolution(), solver.x)
        tao.setIterationNumber(self.iteration)
        tao.monitor(its=self.iteration, f=f, res=norm, cnorm=0.0, step=solver.radius)
        self.reason = self._test(f, norm)
        self.iteration += 1
        return self.reason != CONTINUE

    def _test(self, f: float, norm: float) -> int:
        own = self.tao.getConvergenceTest()
        if own is not None:
            test, args, kargs = own
            return int(test(self.tao, *args, **kargs) or 0)
        gatol, grtol, gttol = self.tao.getTolerances()
        if norm <= gatol:
            return CONVERGED_GATOL
        if f != 0 and norm <= grtol * abs(f):
            return CONVERGED_GRTOL
        if norm <= gttol * self.first:
            return CONVERGED_GTTOL
        return DIVERGED_MAXITS if self.iteration >= self.tao.getMaximumIterations() else CONTINUE
