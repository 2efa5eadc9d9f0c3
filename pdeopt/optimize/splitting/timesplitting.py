"""A control problem split into windows of its time steps: what a window starts at is a copy of the last one's end."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from petsc4py import PETSc

from pdeopt.control.problem import ControlProblem
from pdeopt.core.errors import InputError
from pdeopt.core.monitor import ControlResult, History, Reason
from pdeopt.core.settings import Settings, read, setting
from pdeopt.kkt.assembly import require_pattern
from pdeopt.optimize.splitting.splitconstraint import PairedConstraint, SplitWork
from pdeopt.optimize.splitting.timewindows import EVEN, ODD, TimeWindows
from pdeopt.steps.timegrid import require_whole_steps

#: Settings of `ADMM` that serve these constraints: see docs/benchmarks.md.
CONTROL_DEFAULTS: dict[str, Any] = {"anderson": 20, "rtol": 1e-7}

#: Windows where no number is asked for, if there are so many steps.
WINDOWS = 8


@dataclass(frozen=True)
class TimeSplittingSettings(Settings, prefix="admm_"):
    """Windows of time steps that ADMM solves one by one."""

    windows: int = setting(None, f"windows of time steps; default {WINDOWS}, or the steps", at_least=1, kind=int)
    beta: float = setting(None, "first penalty of continuity; default from the objective", above=0, kind=float)


class TimeSplitting(PairedConstraint):
    """min sum_j J_j(u_j, z_j) over windows j of steps, subject to u_end(j) = v_{j+1}, where window j + 1 starts at v.

    The augmented Lagrangian is sum_j J_j + sum_s <lambda_s, u_end(s) - v_{s+1}>_M + beta |u_end(s) - v_{s+1}|_M^2, M
    the state mass. Its blocks are `"odd"` and `"even"`: windows of one kind are not coupled with each other, and are
    solved for at the same time, each by one rank. So there are two blocks, for which ADMM converges where the problem
    is convex (S. Boyd et al. 2011, section 3.2). Messages are the states at both ends of a rank's windows.

    Args:
        problem: with one control a step, no global parameters, and a sparsity pattern.
        settings: by default from the options `-{prefix}admm_*`.
        prefix: of the options.
        ends: the last steps of all windows, for windows of chosen lengths; default nearly equal ones.

    Attributes:
        windows: those of this rank.
        cuts: 0, and the last steps of all windows.
        fingerprint: what must be equal at a restart.

    Raises:
        InputError: a problem that does not fit; more windows than steps, or more ranks than windows.

    Example:
        >>> result = ADMM(TimeSplitting(problem), **CONTROL_DEFAULTS).solve()
    """

    def __init__(
        self,
        problem: ControlProblem,
        settings: TimeSplittingSettings | None = None,
        prefix: str = "",
        ends: Sequence[int] | None = None,
    ) -> None:
        settings = read(TimeSplittingSettings, prefix) if settings is None else settings
        require_whole_steps(problem.grid, "windows of time by ADMM", "another solver, or space_ranks 1")
        _require_simple(problem)
        self.problem, self.work = problem, SplitWork()
        self.cuts = _cuts(problem, settings.windows, ends, f"-{prefix}admm_windows")
        self.fingerprint = {"windows": self.cuts, "admm_beta": settings.beta}
        self.windows = TimeWindows(problem, self.cuts, self.work)
        self.pair = self.windows.pair(settings.beta)

    def sweep(self, iteration: int) -> Iterator[str]:
        yield ODD
        yield EVEN

    def update(self, block: Any) -> None:
        self.windows.update(block, self.pair)

    def ascend(self) -> None:
        self.pair.ascend()

    def lagrangian(self) -> float:
        return self.objective() + self.pair.penalty()

    def objective(self) -> float:
        return self.windows.sum([window.objective() for window in self.windows.windows])

    def residuals(self) -> tuple[float, float]:
        """|u_end - v|_M over all places, and what is left of the gradient of the Lagrangian.

        The odd windows were solved for with what the even ones were before: 2 beta times their move; and no window is
        solved for to the last bit: its reduced gradient. With all zero, states, controls and multipliers solve the
        optimality system of the whole problem.
        """
        primal, dual = self.pair.residuals()
        return primal, math.sqrt(dual**2 + self.windows.sum([window.size**2 for window in self.windows.windows]))

    def design(self) -> PETSc.Vec:
        """The controls of all windows, as a design of the problem. Collective."""
        return self.windows.vector("z", self.problem.create_design())

    def result(self, reason: Reason, message: str, history: History) -> ControlResult:
        """Controls, states and multipliers of all windows, as vectors of the problem. Collective."""
        state, multiplier = (self.windows.vector(name, self.problem.create_multiplier()) for name in ("u", "mu"))
        return ControlResult(self.design(), reason, message, history, state, multiplier, method="admm")

    def memory(self) -> dict[str, Any]:
        """What a restart needs, whole on the first rank; for any number of ranks. Collective."""
        return self.windows.memory() | self.pair.memory()

    def recall(self, memory: dict[str, Any]) -> None:
        self.pair.recall(memory)
        self.windows.recall(memory)

    def destroy(self) -> None:
        """Free matrices and factors."""
        for window in self.windows.windows:
            window.destroy()


def _require_simple(problem: ControlProblem) -> None:
    if problem.control_map is not None or problem.param_dim:
        what = "a control map" if problem.control_map is not None else "global parameters"
        raise InputError("splitting in time", f"a problem with {what}", "one control a step, no parameters")
    require_pattern(problem)


def _cuts(problem: ControlProblem, windows: int | None, ends: Sequence[int] | None, option: str) -> list[int]:
    """Where windows begin and end, checked."""
    N, ranks = problem.grid.num_steps, problem.grid.mpi.size
    count = windows or min(WINDOWS, N)
    if ends is None and count > N:
        raise InputError(option, count, f"at most {N}, the time steps")
    cuts = [0, *([round(N * (j + 1) / count) for j in range(count)] if ends is None else ends)]
    if cuts[-1] != N or (np.diff(cuts) < 1).any():
        raise InputError("ends of windows", cuts[1:], f"increasing numbers of steps, the last {N}")
    if len(cuts) - 1 < ranks:
        raise InputError(option, f"{len(cuts) - 1} on {ranks} ranks", "a window a rank, or more")
    return cuts
