"""Limited-memory BFGS in a box, by TAO, for smooth functions of tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from petsc4py import PETSc
from torch import Tensor

from pdeopt.core.arrays import assign, copy
from pdeopt.core.errors import InputError
from pdeopt.core.monitor import DescentRecord, History, Reason, Result, explain, print_monitor, remedy
from pdeopt.core.options import defaults
from pdeopt.core.ranks import freed
from pdeopt.functions.smooth import SmoothFunction
from pdeopt.functions.units import in_units, unit_of
from pdeopt.optimize.descent.minimizer import StopSettings
from pdeopt.optimize.parts.loop import Observer
from pdeopt.optimize.parts.progress import Doubt, Stagnation

#: Before the options of this TAO, so that those of other solvers do not reach it.
PREFIX = "bounded_"
#: TaoConvergedReason.
CONTINUE, CONVERGED_USER, DIVERGED_USER = 0, 8, -8


class BoundedLBFGS:
    """min f(x) with lower <= x <= upper, by TAO's `blmvm` (projected limited-memory BFGS).

    It stops at |x - P(x - f'(x))| <= gtol, P the projection onto the box.

    Args:
        function: f, with its unknowns on the ranks of its communicator.
        lower, upper: (n,), infinite for no bound.
        memory: pairs of L-BFGS.
        stop: when to stop.

    Attributes:
        x, f, g: the present point, its value and gradient, in `unit`; see `Minimizer`.

    Raises:
        InputError: bounds of another size than the unknowns, or a lower one above the upper one.
    """

    def __init__(
        self, function: SmoothFunction, lower: Tensor, upper: Tensor, memory: int = 10, stop: StopSettings | None = None
    ) -> None:
        self.function, self.lower, self.upper = function, lower, upper
        self._given, self.unit = function, 1.0
        self.memory, self.stop = memory, stop or StopSettings()
        if lower.shape != (function.size,) or upper.shape != (function.size,):
            raise InputError("bounds", f"shapes {tuple(lower.shape)}, {tuple(upper.shape)}", f"({function.size},)")
        if not bool((lower <= upper).all()):
            raise InputError("bounds", "a lowest value above the highest", "lowest <= highest")

    def minimize(
        self, x: Tensor, *, observers: Sequence[Observer] = (), until: Callable[[Any], bool] | None = None
    ) -> Result:
        """Go down from x, (n,), moved into the box. Collective.

        Args:
            observers: called with this object and the history after each record.
            until: of this object: whether to stop as converged.
        """
        self._begin = self.function.tally.copy()
        self._observers, self._until = observers, until
        self.history, self.reason = History(), Reason.ITERATING
        self._error: Exception | None = None
        self._doubt, self._stagnation = Doubt(), Stagnation()
        self.x = x.double().clamp(self.lower, self.upper)
        f, g = self._given.value_and_gradient(self.x)
        self.unit = self._unit(f, self._given.norm(g))
        self.function = self._given if self.unit == 1.0 else in_units(self._given, self.unit)
        self.f, self.g = f / self.unit, g / self.unit
        self._last = self.x, self.f, self.g
        self._gtol = self.stop.tolerance(self.optimality() * self.unit) / self.unit
        if math.isfinite(self.f) and math.isfinite(self.optimality()):
            self._run()
        else:
            self.reason = Reason.DIVERGED_NAN
            self.history.append(self._record(0))
        if self._error is not None:
            raise self._error
        if self.reason == Reason.ITERATING:
            self.reason = Reason.DIVERGED_LINE_SEARCH
        return Result(self.x, self.reason, explain(self.reason, remedy=remedy(self.reason, "opt")), self.history)

    def _unit(self, f: float, slope: float) -> float:
        """In which f has a usual curvature: TAO compares that, and nothing else, with a number of its own."""
        length = max(self._given.norm(self.x), abs(f) / slope if slope > 0 else 0.0)
        return unit_of(slope / length, 0.0, usual=1e4) if 0.0 < length < math.inf else 1.0

    def optimality(self) -> float:
        """|x - P(x - f'(x))|, without the cancellation of x."""
        return self.function.norm(self.g.clamp(self.x - self.upper, self.x - self.lower))

    def _run(self) -> None:
        solution = PETSc.Vec().createMPI((self.function.size, None), comm=self.function.comm)
        lower, upper = solution.duplicate(), solution.duplicate()
        for vec, values in ((solution, self.x), (lower, self.lower), (upper, self.upper)):
            assign(vec, values.clamp(PETSc.NINFINITY, PETSc.INFINITY))
        tao = PETSc.TAO().create(self.function.comm)
        with freed(tao):  # PETSc objects with Python contexts must not live on to the end of the interpreter
            tao.setOptionsPrefix(PREFIX)
            tao.setType("blmvm")
            tao.setObjective(lambda tao, x: self._evaluate(x)[0])
            tao.setObjectiveGradient(self._value_and_gradient, solution.duplicate())
            tao.setVariableBounds((lower, upper))
            tao.setMaximumIterations(2**31 - 2)
            lmvm = {"mat_lmvm_scale_type": "scalar", "mat_lmvm_hist_size": str(self.memory)}
            with defaults({f"{PREFIX}tao_blmvm_{name}": value for name, value in lmvm.items()}):
                tao.setFromOptions()
            tao.setConvergenceTest(self._test)
            tao.setSolution(solution)
            tao.solve()

    def _value_and_gradient(self, tao: PETSc.TAO, x: PETSc.Vec, g: PETSc.Vec) -> float:
        value, gradient = self._evaluate(x)
        assign(g, gradient)
        return value

    def _evaluate(self, vec: PETSc.Vec) -> tuple[float, Tensor]:
        """f and f'; where they are not finite, or after an error, a steep paraboloid about the last good point.

        TAO's line search interpolates values and slopes, and infinity would lose them. An error of `function` is kept
        until TAO has ended.
        """
        x = copy(vec)
        if self._error is None:
            try:
                f, g = self.function.value_and_gradient(x)
                if math.isfinite(f) and math.isfinite(self.function.norm(g)):
                    d = x - self.x
                    self._doubt.judge(self.f, f, self.function.dot(self.g, d), lambda: self.function.dot(g, d))
                    self._last = x, f, g
                    return f, g
            except Exception as error:  # it must not pass through TAO
                self._error = error
        away, height = x - self.x, 10.0 * (1.0 + abs(self.f))
        return self.f + height, away * (2.0 * height / max(self.function.dot(away, away), 1e-300))

    def _test(self, tao: PETSc.TAO) -> int:
        """Record the point that TAO has come to, and tell whether to stop."""
        if self._error is not None:
            return DIVERGED_USER
        iteration, x = tao.getIterationNumber(), copy(tao.getSolution())
        if not torch.equal(x, self._last[0]):  # TAO's own gradient has zeros at the bounds
            self._last = (x, *self.function.value_and_gradient(x))
        self.x, self.f, self.g = self._last
        self.history.append(self._record(iteration))
        for observer in self._observers:
            observer(self, self.history)
        self.reason = self._reason(iteration)
        return CONTINUE if self.reason == Reason.ITERATING else CONVERGED_USER if self.reason > 0 else DIVERGED_USER

    def _record(self, iteration: int) -> DescentRecord:
        spent = self.function.tally - self._begin
        record = DescentRecord(
            iteration,
            self.f * self.unit,
            self.optimality() * self.unit,
            math.nan,
            spent.values,
            spent.gradients,
            0,
            spent.work,
        )
        if self.stop.monitor:
            print_monitor(PETSc.COMM_WORLD, type(self).__name__)(record)
        return record

    def _reason(self, iteration: int) -> Reason:
        if self.optimality() <= self._gtol:
            return Reason.CONVERGED_OPTIMALITY
        if self.stop.target is not None and self.f * self.unit <= self.stop.target:
            return Reason.CONVERGED_TARGET
        if iteration >= self.stop.max_it:
            return Reason.DIVERGED_MAX_IT
        last = self.history[-1]
        if 0 < self.stop.max_gradients <= last.gradients or 0 < self.stop.max_work <= last.work:
            return Reason.WORK_DONE
        if self._until is not None and self._until(self):
            return Reason.CONVERGED_TARGET
        if self._stagnation.take(last):
            return self.stop.stalled()
        return Reason.DIVERGED_STAGNATION if self._doubt.is_settled else Reason.ITERATING
