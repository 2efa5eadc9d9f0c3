"""Newton's method, and the composite step from where Newton's finds no step, or only poor ones.

Newton's method takes one KKT system an iteration and converges fast where its full steps are good; far from the
solution of a nonlinear problem its line search may shorten every step, or fall back to the Gauss-Newton Hessian time
and again. The composite step has a trust region, follows negative curvature, and divides the work between feasibility
and descent; an iteration takes several projections. So the first begins, and hands its point and multiplier on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from petsc4py import PETSc

from pdeopt.core.errors import SolveFailure
from pdeopt.core.monitor import ControlResult, History, Reason, Record
from pdeopt.optimize.fullspace.composite import CompositeStep
from pdeopt.optimize.fullspace.method import FullSpaceMethod
from pdeopt.optimize.fullspace.newton import NewtonKKT

#: Poor steps of Newton's method in a row, after which the composite step goes on.
MAX_POOR = 5


class NewtonThenComposite(FullSpaceMethod):
    """Newton's steps as long as they are good, then composite ones; there is no way back.

    A step of Newton's method is poor where it needs the Gauss-Newton Hessian or less than half its length, see
    `NewtonKKT.is_poor`. After `MAX_POOR` of these in a row, or where there is none at all, the composite step goes on
    from the same point.

    Args:
        newton: at the start.
        composite: the other method at a point and multiplier, which it moves.

    Attributes:
        kind: "newton" or "composite", the present method.
    """

    def __init__(self, newton: NewtonKKT, composite: Callable[[PETSc.Vec, PETSc.Vec], CompositeStep]) -> None:
        self.problem, self.x, self.lam, self.metric = newton.problem, newton.x, newton.lam, newton.metric
        self._composite, self._method, self._poor = composite, newton, 0
        self.kind, self._note, self._ways = newton.kind, "", dict[str, list[str]]()

    _method: NewtonKKT | CompositeStep

    def record(self, iteration: int) -> Record:
        record = self._method.record(iteration)
        self.lin = self._method.lin
        note, self._note = self._note, ""
        return replace(record, note=", ".join(filter(None, [record.note, note])))

    def step(self) -> Reason:
        newton = self._method
        if not isinstance(newton, NewtonKKT):
            return newton.step()
        try:
            reason = newton.step()
        except SolveFailure:
            reason = Reason.DIVERGED_LINEAR_SOLVE
        self._poor = self._poor + 1 if newton.is_poor else 0
        if reason < Reason.ITERATING or self._poor >= MAX_POOR:
            self._hand_over()
        return Reason.ITERATING

    def _hand_over(self) -> None:
        """Go on with the composite step from the present point."""
        self._ways |= self._method.ways()
        self._method.destroy()
        self._method, self._note = self._composite(self.x, self.lam), "composite step from here"
        self.kind = self._method.kind

    def ways(self) -> dict[str, list[str]]:
        return self._ways | self._method.ways()

    def unsolved(self) -> Record:
        return self._method.unsolved()

    def result(self, reason: Reason, message: str, history: History) -> ControlResult:
        return self._method.result(reason, message, history)

    def memory(self) -> dict[str, Any]:
        """What a restart needs beside x and lam."""
        return {"kind": self.kind, "poor": self._poor, "own": self._method.memory()}

    def recall(self, memory: dict[str, Any]) -> None:
        """Go on from the `memory` of an earlier run."""
        self._poor = int(memory["poor"])
        if memory["kind"] == "composite":
            self._hand_over()
            self._note = ""
        self._method.recall(memory["own"])

    def destroy(self) -> None:
        """Free the KKT solvers."""
        self._method.destroy()
