"""ADMM: the blocks of a split constraint in turn, then its multipliers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from petsc4py import PETSc

from pdeopt.core.errors import InputError, SolveFailure
from pdeopt.core.monitor import History, Monitor, Reason, Result, SplitRecord, print_monitor, remedy
from pdeopt.core.settings import Settings, read, setting
from pdeopt.optimize.parts.loop import Observer, iterate
from pdeopt.optimize.splitting.acceleration import Acceleration
from pdeopt.optimize.splitting.splitconstraint import PairedConstraint, SplitConstraint


@dataclass(frozen=True)
class AdmmSettings(Settings, prefix="admm_"):
    """Alternating directions: blocks in turn, then multipliers."""

    max_it: int = setting(1000, "iterations at most", at_least=0)
    warm_up: int = setting(0, "iterations before the multipliers move", at_least=0)
    multipliers: bool = setting(True, "move the multipliers")
    rtol: float = setting(
        1e-6, "residuals, relative to the largest so far, at which a run has converged; 0: it goes on", at_least=0
    )
    relax: float = setting(
        1.0, "over-relaxation: how far the second block sees the first one's move (two blocks)", above=0, at_most=1.95
    )
    penalty: str = setting(
        "fixed",
        "the penalty stays, or is chosen in the first iterations by the curvature that both blocks show (two blocks)",
        choices=("fixed", "spectral"),
    )
    anderson: int = setting(
        0, "iterations that Anderson acceleration looks back on; 0: none (two blocks)", at_least=0, at_most=1000
    )
    monitor: bool = setting(False, "print a line an iteration")


class ADMM:
    """Minimize over the blocks of a `SplitConstraint` in turn, again and again.

    Args:
        constraint: is changed in place.
        settings: by default from the options `-{prefix}admm_*`.
        prefix: of the options.
        **defaults: settings that replace the defaults; options win.

    Raises:
        InputError: settings that a `PairedConstraint` alone has, for another constraint.

    Example:
        >>> result = ADMM(constraint, warm_up=10).solve()
        >>> result.history["feasibility"]
    """

    def __init__(
        self, constraint: SplitConstraint, settings: AdmmSettings | None = None, prefix: str = "", **defaults: Any
    ) -> None:
        self.constraint = constraint
        self.settings = read(AdmmSettings, prefix, **defaults) if settings is None else settings
        self.note = "start"
        self._acceleration = self._accelerated()
        self._iteration = 0
        self._largest = (0.0, 0.0)

    def _accelerated(self) -> Acceleration | None:
        settings = self.settings
        if isinstance(self.constraint, PairedConstraint):
            self.constraint.pair.relaxation = settings.relax
            return Acceleration(self.constraint.pair, settings.penalty, settings.anderson)
        if (settings.relax, settings.penalty, settings.anderson) != (1.0, "fixed", 0):
            got = f"a {type(self.constraint).__name__}, which is no pair of blocks"
            raise InputError("-admm_relax, -admm_penalty, -admm_anderson", got, "1, fixed, 0")
        return None

    def solve(
        self,
        *,
        monitors: Sequence[Monitor] = (),
        observers: Sequence[Observer] = (),
        until: Callable[[ADMM], bool] | None = None,
        history: History | None = None,
    ) -> Result:
        """Iterate until the residuals are small, or the iterations are spent. Collective.

        Args:
            monitors: called with each record.
            observers: called with this object and the history after each record.
            until: of this object: whether the work that was asked for is done.
            history: of an interrupted run, whose `memory` the constraint has recalled.

        Returns:
            The constraint's design; where a number is no longer finite, as it was after the last whole update of a
            block, with that block and iteration in the message.
        """
        if self.settings.monitor:
            monitors = [print_monitor(PETSc.COMM_WORLD, "ADMM"), *monitors]
        if history is not None and len(history):
            self._iteration = int(history[-1].iteration)
            self._largest = tuple(max(history[name], default=0.0) for name in ("feasibility", "optimality"))  # type: ignore[assignment]

        def test(record: SplitRecord) -> Reason:
            reason = self._test(record)
            return Reason.WORK_DONE if reason == Reason.ITERATING and until and until(self) else reason

        return iterate(self, test, monitors=monitors, observers=observers, history=history)

    def record(self, iteration: int) -> SplitRecord:
        """The present blocks in numbers."""
        feasibility, optimality = self.constraint.residuals()
        self._largest = max(self._largest[0], feasibility), max(self._largest[1], optimality)
        work = self.constraint.work
        return SplitRecord(
            iteration,
            self.constraint.objective(),
            feasibility,
            optimality,
            work.products,
            work.solves,
            work.bytes,
            self.note,
        )

    def step(self) -> Reason:
        """One sweep, and one step of the multipliers."""
        self._iteration += 1
        note = self._acceleration.prepare(self._iteration) if self._acceleration is not None else ""
        for block in self.constraint.sweep(self._iteration):
            try:
                self.constraint.update(block)
            except SolveFailure as failure:
                raise SolveFailure(
                    f"iteration {self._iteration}, block {block}: {failure.what}", failure.remedy
                ) from None
        moves = self.settings.multipliers and self._iteration > self.settings.warm_up
        if moves:
            self.constraint.ascend()
        self.note = note if moves else "blocks alone"
        return Reason.ITERATING

    def unsolved(self) -> SplitRecord:
        """What stands for a start without numbers."""
        return SplitRecord(0, math.nan, math.nan, math.nan, 0.0, 0.0, 0, "start")

    def remedy(self, reason: Reason) -> str:
        """What to try next."""
        return remedy(reason, "admm")

    def result(self, reason: Reason, message: str, history: History) -> Result:
        """The design, with why the run ended."""
        return self.constraint.result(reason, message, history)

    def fingerprint(self) -> dict[str, Any]:
        """The settings that must be equal at a restart, by their options."""
        names = ("warm_up", "multipliers", "relax", "penalty", "anderson")
        return {f"{AdmmSettings.prefix}{name}": getattr(self.settings, name) for name in names}

    def memory(self) -> dict[str, Any]:
        """What a restart needs: that of the constraint, and of the acceleration. Collective."""
        own = {} if self._acceleration is None else self._acceleration.memory()
        return self.constraint.memory() | {f"admm.{name}": each for name, each in own.items()}

    def recall(self, memory: dict[str, Any]) -> None:
        """Go on from what `memory` gave; the history goes to `solve`."""
        own = {name[5:]: each for name, each in memory.items() if name.startswith("admm.")}
        self.constraint.recall({name: each for name, each in memory.items() if not name.startswith("admm.")})
        if self._acceleration is not None:
            self._acceleration.recall(own)

    def _test(self, record: SplitRecord) -> Reason:
        if not all(map(math.isfinite, (record.objective, record.feasibility, record.optimality))):
            return Reason.DIVERGED_NAN
        settled = self.settings.multipliers and record.iteration > self.settings.warm_up + 1
        small = (
            record.feasibility <= self.settings.rtol * self._largest[0]
            and record.optimality <= self.settings.rtol * self._largest[1]
        )
        if settled and self.settings.rtol and small:
            return Reason.CONVERGED_OPTIMALITY
        return Reason.DIVERGED_MAX_IT if record.iteration >= self.settings.max_it else Reason.ITERATING
