"""Newton's method, and the composite step from where Newton's finds no step, or only poor ones.

Newton's method takes one KKT system an iteration and converges fast where its full steps are good; far from the
solution of a nonlinear problem its line search may shorten every step, or fall back to the Gauss-Newton Hessian time
and again. Poor steps soon after a start that misses the equations come from its state: Newton's method then begins
again, once, from the state of its first control, which costs a march.

Newton's method may also end at a stationary point that is no minimum. J curves down there along some direction of the
design: a step along it finds a lower point, and the composite step goes on from that, as it never comes back.

The composite step has a trust region, follows negative curvature, and divides the work between feasibility and
descent; an iteration takes several projections. So the first begins, and hands its point and multiplier on.
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
from pdeopt.optimize.fullspace.method import FullSpaceMethod
from pdeopt.optimize.fullspace.newton import NewtonKKT

#: Poor steps of Newton's method in a row, after which the composite step goes on.
MAX_POOR = 5

#: Poor steps in a row after which Newton's method begins again, and the most steps that it gives up for this.
POOR_AT_START, START = 4, 6


class NewtonThenComposite(FullSpaceMethod):
    """Newton's steps as long as they are good, from another state where the first ones are poor, then composite ones.

    There is no way back. A step of Newton's method is poor where it needs the Gauss-Newton Hessian or less than half
    its length, see `NewtonKKT.is_poor`. After `POOR_AT_START` of these in a row within the first `START`, x is moved to
    the first control with its state, and lam to where it was. After `MAX_POOR`, or where there is no step at all, the
    composite step goes on from the same point; and after a saddle from a lower one beside it, see `beyond_saddles`.

    Args:
        newton, composite: the methods at a point and multiplier, which they move.
        x, lam: the start; both vectors are moved.
        feas_tol: the start may miss the equations by this much to count as a state.

    Attributes:
        kind: "newton" or "composite", the present method.
    """

    def __init__(
        self,
        newton: Callable[[PETSc.Vec, PETSc.Vec], NewtonKKT],
        composite: Callable[[PETSc.Vec, PETSc.Vec], CompositeStep],
        x: PETSc.Vec,
        lam: PETSc.Vec,
        feas_tol: float,
    ) -> None:
        self._newton, self._composite = newton, composite
        self._method = method = newton(x, lam)
        self.problem, self.x, self.lam, self.metric, self.lin = method.problem, x, lam, method.metric, method.lin
        self._first, self._first_lam = self.problem.split(x)[1], lam.copy()
        self._may_begin_again = self.metric.feasibility(method.lin) > feas_tol
        self._poor = self._steps = 0
        self._is_off = False
        self.kind, self._note, self._ways = method.kind, "", dict[str, list[str]]()

    _method: NewtonKKT | CompositeStep

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
        newton = self._method
        if not isinstance(newton, NewtonKKT):
            return newton.step()
        try:
            reason = newton.step()
        except SolveFailure:
            reason = Reason.DIVERGED_LINEAR_SOLVE
        self._poor, self._steps = self._poor + 1 if newton.is_poor else 0, self._steps + 1
        is_lost = reason < Reason.ITERATING or self._poor >= POOR_AT_START
        if is_lost and self._may_begin_again and self._steps <= START and self._begin_again():
            return Reason.ITERATING
        if reason < Reason.ITERATING or self._poor >= MAX_POOR:
            self._hand_over()
        return Reason.ITERATING

    def _begin_again(self) -> bool:
        """Go to the state of the first control; returns whether there is one."""
        self._may_begin_again = False
        try:
            state = self.problem.solve_state(self._first)
        except SolveFailure:
            return False
        self.problem.join(state, self._first).copy(self.x)
        self._first_lam.copy(self.lam)
        self._use(self._newton, "again from the state of the first control")
        self._poor = 0
        return True

    def _use(self, method: Callable[[PETSc.Vec, PETSc.Vec], NewtonKKT | CompositeStep], note: str) -> None:
        """Go on with a method from the present point."""
        self._ways |= self._method.ways()
        self._method.destroy()
        self._method, self._note = method(self.x, self.lam), note
        self.kind, self.lin = self._method.kind, self._method.lin

    def _hand_over(self) -> None:
        """Go on with the composite step from the present point."""
        self._use(self._composite, "composite step from here")

    def ways(self) -> dict[str, list[str]]:
        return self._ways | self._method.ways()

    def unsolved(self) -> Record:
        return self._method.unsolved()

    def result(self, reason: Reason, message: str, history: History) -> ControlResult:
        return self._method.result(reason, message, history)

    def memory(self) -> dict[str, Any]:
        """What a restart needs beside x and lam."""
        own = {"poor": self._poor, "steps": self._steps, "may_begin_again": self._may_begin_again}
        return {"kind": self.kind, **own, "own": self._method.memory()}

    def recall(self, memory: dict[str, Any]) -> None:
        """Go on from the `memory` of an earlier run; its control is the first one if this run still begins again."""
        self._poor, self._steps = int(memory["poor"]), int(memory["steps"])
        self._may_begin_again = bool(memory["may_begin_again"])
        if memory["kind"] == "composite":
            self._hand_over()
            self._note = ""
        self._method.recall(memory["own"])

    def destroy(self) -> None:
        """Free the KKT solvers."""
        self._method.destroy()
