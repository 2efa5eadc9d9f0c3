"""Newton's method, a feasible path where the equations bend too much for it, and the composite step at last.

Newton's method takes one KKT system an iteration and converges fast where its full steps are good. A step's error in
the equations is that of their linearization: where the first ones leave a good part of the residual, the linearized
equations say little of the true ones. `FeasibleNewton` then begins from the state of the first control, with states
that are solved for at each point, which costs more an iteration and keeps to the equations.

Later the line search of Newton's method may also shorten every step, or fall back to the Gauss-Newton Hessian time and
again: the feasible path goes on from there. Where a state cannot be solved for, the composite step does: it has a trust
region, too, and divides the work between feasibility and descent; an iteration takes several projections. It also goes
on where Newton's method ends at a stationary point that is no minimum: J curves down there along some direction of the
design, and a step along it finds a lower point.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from petsc4py import PETSc

from pdeopt.core.errors import SolveFailure
from pdeopt.core.monitor import ControlResult, History, Reason, Record
from pdeopt.optimize.fullspace.composite import CompositeStep
from pdeopt.optimize.fullspace.curvature import off_saddle
from pdeopt.optimize.fullspace.feasible import FeasibleNewton
from pdeopt.optimize.fullspace.method import FullSpaceMethod
from pdeopt.optimize.fullspace.newton import NewtonKKT

#: Poor steps of Newton's method in a row, after which another method goes on.
MAX_POOR = 5

#: The first step of Newton's method is to leave at most so much of the residual of the equations.
BENDS = 0.2

#: With more global parameters than these the feasible path begins: to build their block of the Hessian takes a pass
#: over all steps for each of them, a product of the reduced Hessian two sweeps.
MANY_PARAMETERS = 16

#: The methods one at a time.
Single = NewtonKKT | FeasibleNewton | CompositeStep


class NewtonThenComposite(FullSpaceMethod):
    """Newton's steps as long as they are good, a feasible path where the first ones are not, then composite ones.

    There is no way back. A step of Newton's method is poor where it needs the Gauss-Newton Hessian or less than half
    its length, see `NewtonKKT.is_poor`. Where the start is no state and the first step is poor, or leaves more than
    `BENDS` of the residual, x and lam are moved back, x to the state of its control, and the feasible path begins.
    After `MAX_POOR` poor steps, or where there is no step at all, it begins at the present control. The composite step
    goes on from where a state is not found, or the feasible path finds no step; and after a saddle from a lower point
    beside it, see `beyond_saddles`.

    Args:
        newton, feasible, composite: the methods at a point and multiplier, which they move.
        x, lam: the start; both vectors are moved.
        feas_tol: the start may miss the equations by this much to count as a state.

    Attributes:
        kind: "newton", "feasible" or "composite", the present method.
    """

    def __init__(
        self,
        newton: Callable[[PETSc.Vec, PETSc.Vec], NewtonKKT],
        feasible: Callable[[PETSc.Vec, PETSc.Vec], FeasibleNewton],
        composite: Callable[[PETSc.Vec, PETSc.Vec], CompositeStep],
        x: PETSc.Vec,
        lam: PETSc.Vec,
        feas_tol: float,
    ) -> None:
        self._newton, self._feasible, self._composite = newton, feasible, composite
        self._method = method = newton(x, lam)
        self.problem, self.x, self.lam, self.metric, self.lin = method.problem, x, lam, method.metric, method.lin
        self._first, self._first_lam = self.problem.split(x)[1], lam.copy()
        self._feasibility = self.metric.feasibility(method.lin)
        self._is_first = self._feasibility > feas_tol
        self._poor, self._is_off = 0, False
        self.kind, self._note, self._ways = method.kind, "", dict[str, list[str]]()
        if self.problem.param_dim > MANY_PARAMETERS:
            self._follow_states(x, lam, "feasible path for a field of parameters")

    _method: Single

    def record(self, iteration: int) -> Record:
        record = self._method.record(iteration)
        self.lin = self._method.lin
        note, self._note = self._note, ""
        return replace(record, note=", ".join(filter(None, [record.note, note])))

    def beyond_saddles(self, test: Callable[[Record], Reason]) -> Callable[[Record], Reason]:
        """The test that does not stop where Newton's method converged to no minimum and a lower point is found."""

        def goes_on(record: Record) -> Reason:
            reason = test(record)
            if reason != Reason.CONVERGED_OPTIMALITY or not isinstance(self._method, NewtonKKT):
                return reason
            is_minimum = not self._method.curves_down(History())
            lower = None if is_minimum else off_saddle(self.metric, self.x, self.lin, self.lam)
            if lower is None:
                return reason
            lower.copy(self.x)
            self._use(self._composite, "no minimum before: composite step off it")
            self._is_off = True
            return Reason.ITERATING

        return goes_on

    def step(self) -> Reason:
        if self._is_off:  # the step off a saddle is taken
            self._is_off = False
            return Reason.ITERATING
        try:
            reason = self._method.step()
        except SolveFailure:
            if isinstance(self._method, CompositeStep):
                raise
            reason = Reason.DIVERGED_LINEAR_SOLVE
        if isinstance(self._method, CompositeStep):
            return reason
        is_lost = reason < Reason.ITERATING
        if isinstance(self._method, NewtonKKT):
            self._poor = self._poor + 1 if self._method.is_poor else 0
            is_first, self._is_first = self._is_first, False
            if is_first and (is_lost or self._bends()):
                first = self.problem.join(self.problem.constant_state(self._first), self._first)
                if self._follow_states(first, self._first_lam, "feasible path from the first control"):
                    return Reason.ITERATING
            is_lost |= self._poor >= MAX_POOR
            if is_lost and self._follow_states(self.x, self.lam, "feasible path from here"):
                return Reason.ITERATING
        if is_lost:
            self._use(self._composite, "composite step from here")
        return Reason.ITERATING

    def _bends(self) -> bool:
        """Whether the first step says little of the equations."""
        return self._poor > 0 or self.metric.feasibility(self._method.lin) > BENDS * self._feasibility

    def _follow_states(self, x: PETSc.Vec, lam: PETSc.Vec, note: str) -> bool:
        """Go on by a feasible path from the state of a design, guessed in x; returns whether there is one."""
        guess, design = self.problem.split(x)
        try:
            state = self.problem.solve_state(design, guess)
        except SolveFailure:
            return False
        self.problem.join(state, design).copy(self.x)
        lam.copy(self.lam)
        self._use(self._feasible, note)
        return True

    def _use(self, method: Callable[[PETSc.Vec, PETSc.Vec], Single], note: str) -> None:
        """Go on with a method from the present point."""
        self._ways |= self._method.ways()
        self._method.destroy()
        self._method, self._note = method(self.x, self.lam), note
        self.kind, self.lin = self._method.kind, self._method.lin

    def ways(self) -> dict[str, list[str]]:
        return self._ways | self._method.ways()

    def unsolved(self) -> Record:
        return self._method.unsolved()

    def result(self, reason: Reason, message: str, history: History) -> ControlResult:
        return self._method.result(reason, message, history)

    def memory(self) -> dict[str, Any]:
        """What a restart needs beside x and lam."""
        own = {"poor": self._poor, "is_first": float(self._is_first), "is_off": float(self._is_off)}
        return {"kind": self.kind, **own, "own": self._method.memory()}

    def recall(self, memory: dict[str, Any]) -> None:
        """Go on from the `memory` of an earlier run."""
        self._poor = int(memory["poor"])
        self._is_first, self._is_off = bool(memory["is_first"]), bool(memory["is_off"])
        if memory["kind"] != self.kind:
            self._use(self._composite if memory["kind"] == "composite" else self._feasible, "")
        self._method.recall(memory["own"])

    def destroy(self) -> None:
        """Free the KKT solvers."""
        self._method.destroy()
