"""Optimizers as TAO types: `-tao_type python -tao_python_type pdeopt.optimize.SPQN`.

TAO makes the object, without arguments, and calls `solve`; the objective, its gradient, Hessian products, limits,
monitors and the convergence test are TAO's. An application context with `smooth_function(tao)` may bring more, a
decomposition or coarser problems, say.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from petsc4py import PETSc
from torch import Tensor

from pdeopt.core.arrays import assign, copy
from pdeopt.functions.smooth import Costs, SmoothFunction

if TYPE_CHECKING:
    from pdeopt.optimize.descent.minimizer import Minimizer

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


class TaoType:
    """The context of a TAO of type python, for a `Minimizer`."""

    def setFromOptions(self, tao: PETSc.TAO) -> None:
        """Read the settings again, with TAO's prefix."""
        type(self).__init__(self, prefix=tao.getOptionsPrefix() or "")  # type: ignore[call-arg]

    def solve(self, tao: PETSc.TAO) -> None:
        """Minimize TAO's objective from TAO's solution, which is overwritten."""
        context = tao.getAppCtx()
        make = getattr(context, "smooth_function", TaoFunction)
        minimizer: Minimizer = self  # type: ignore[assignment]
        minimizer.attach(make(tao))
        minimizer.stop = _Limits()
        run = _Run(minimizer, tao)
        result = minimizer.minimize(copy(tao.getSolution()), until=run)
        assign(tao.getSolution(), result.design)
        if run.reason == CONTINUE:
            run.reason = DIVERGED_NAN if "nan" in result.message else DIVERGED_LS_FAILURE
        tao.setConvergedReason(run.reason)


class _Limits:
    """Stops at nothing: the tests are TAO's."""

    max_it, max_gradients, max_work, gtol, target, monitor = 2**62, 0, 0.0, -1.0, None, False


class _Run:
    """Tells TAO of each iteration, and whether it wants to stop."""

    def __init__(self, minimizer: Minimizer, tao: PETSc.TAO) -> None:
        self.tao, self.reason, self.iteration = tao, CONTINUE, 0
        self.first = float("nan")

    def __call__(self, minimizer: Any) -> bool:
        tao, f, norm = self.tao, minimizer.f, minimizer.optimality()
        if self.iteration == 0:
            self.first = norm
        assign(tao.getSolution(), minimizer.x)
        tao.setIterationNumber(self.iteration)
        tao.monitor(its=self.iteration, f=f, res=norm, cnorm=0.0, step=minimizer.radius)
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
