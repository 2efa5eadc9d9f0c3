"""Multigrid reduction in time: approximate inverses of a state Jacobian and of its adjoint, parallel in time.

T is block lower bidiagonal, A_i on the diagonal and B_i below it. Windows of m steps are solved by substitution,
all at once; what enters a window comes from a coarse problem with one step a window (R. D. Falgout, S. Friedhoff,
T. V. Kolev, S. P. MacLachlan, J. B. Schroder, Parallel time integration with multigrid, SIAM J. Sci. Comput. 36,
2014; in the form of parareal). The coarse step adds up the equations of its window for a state constant in it,

    A_c = sum_j A_j + sum_{j>1} B_j,   B_c = B_1,

which for implicit Euler is the step m times as long, and needs nothing but the matrices. `adjoint` applies the
exact transpose of `forward`, so that products of both are symmetric.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from pdeopt.core.errors import SolveFailure, together
from pdeopt.core.settings import Settings, setting
from pdeopt.steps.bands import CoupledBand
from pdeopt.steps.sparse import StepMatrix, combination
from pdeopt.steps.stepsolve import StagedSubstitution
from pdeopt.steps.sweeps import Substitution, substitution
from pdeopt.steps.timegrid import TimeGrid
from pdeopt.steps.windows import Windows, alike

#: Rows -> rows, collective.
RowMap = Callable[[Tensor], Tensor]

#: Relative residual at which a solve counts as exact.
EXACT_RTOL = 1e-14

#: Relative residual that is enough where rounding stops the cycles: the last one gained less than `STAGNATION`.
ROUNDED_RTOL, STAGNATION = 1e-10, 0.5

#: Growth of the residual that counts as divergence, and the most cycles of a solve.
DIVERGENCE, MAX_CYCLES = 1e3, 200


@dataclass(frozen=True)
class LinearMgritSettings(Settings, prefix="mgrit_"):
    """MGRIT for linear systems over all steps."""

    window: int = setting(16, "steps of a window, which the coarse problem replaces by one", at_least=2)
    cycles: int = setting(2, "cycles; with as many as windows the solve is exact", at_least=1)
    levels: int = setting(20, "largest number of levels; the coarsest is solved exactly", at_least=1)


class TimeSystem:
    """T on a time grid, cut into windows.

    Args:
        grid: who owns which steps.
        A, B: the matrices of the steps of this rank, or one for all.
        window: steps of a window; None for one window of all.

    """

    def __init__(self, grid: TimeGrid, A: StepMatrix, B: StepMatrix, window: int | None = None) -> None:
        self.grid, self.A, self.B = grid, A, B
        self.windows = Windows(grid, min(window or grid.num_steps, grid.num_steps))

    @cached_property
    def _sweeps(self) -> CoupledBand | Substitution | StagedSubstitution:
        with self.grid.steps.naming():
            return substitution(self.A, self.B, self.grid.n_local, self.windows.starts)

    def factor(self) -> TimeSystem:
        """Make the factors now, and return the system. Collective.

        Raises:
            SolveFailure: a step is singular or not finite; on all ranks.
        """
        together(self.grid.mpi, lambda: self._sweeps)
        return self

    def multiply(self, x: Tensor) -> Tensor:
        """T x, rows of shape (n_local, n). Collective."""
        return self.A(x) + self.B(self.grid.shift(x))

    def multiply_adjoint(self, x: Tensor) -> Tensor:
        """T'x. Collective."""
        return self.A.transpose(x) + self.grid.shift_adjoint(self.B.transpose(x))[0]

    def sweep(self, r: Tensor) -> Tensor:
        """The windows solved, each from a zero state. Collective."""
        windows, waits = self.windows, len(self.windows.starts) == 1
        before = self.grid.neighbors.receive_before(r[0]) if windows.enters and waits else None
        if before is not None:
            r = r - self._entering(r, before)
        x = self._sweeps.forward(r)
        if windows.enters and not waits:
            x += self._sweeps.forward(-self._entering(r, self.grid.neighbors.receive_before(r[0])))
        if windows.leaves:
            self.grid.neighbors.send_after(x[-1])
        return x

    def sweep_adjoint(self, r: Tensor) -> Tensor:
        """The transpose of `sweep`. Collective."""
        windows, waits = self.windows, len(self.windows.starts) == 1
        after = self.grid.neighbors.receive_after(r[0]) if windows.leaves and waits else None
        if after is not None:
            r = r - _only_row(r, -1, after)
        x = self._sweeps.backward(r)
        if windows.leaves and not waits:
            x += self._sweeps.backward(-_only_row(r, -1, self.grid.neighbors.receive_after(r[0])))
        if windows.enters:
            self.grid.neighbors.send_before(self.B[:1].transpose(x[:1])[0])
        return x

    def couple(self, values: Tensor) -> Tensor:
        """What states at the ends of the windows, (len(ends), n), put into the next ones: (n_local, n). Collective."""
        before = self.grid.shift(self.at_ends(values))
        out, rows = torch.zeros_like(before), self.windows.coupled
        out[rows] = self.B[rows](before[rows])
        return out

    def couple_adjoint(self, x: Tensor) -> Tensor:
        """The transpose of `couple`. Collective."""
        out, rows = torch.zeros_like(x), self.windows.coupled
        out[rows] = self.B[rows].transpose(x[rows])
        return self.grid.shift_adjoint(out)[0][self.windows.ends]

    def at_ends(self, values: Tensor) -> Tensor:
        """Rows that are zero but for the ends of the windows."""
        out = torch.zeros(self.grid.n_local, values.shape[1], dtype=values.dtype)
        out[self.windows.ends] = values
        return out

    def coarse_matrices(self) -> tuple[StepMatrix, StepMatrix]:
        """A_c and B_c of the windows that end on this rank. Collective."""
        m, N, A, B = self.windows.size, self.grid.num_steps, self.A, self.B
        if alike(self.grid, A, B) and N % m == 0:
            return combination([(m, A), (m - 1, B)]), B
        first = torch.zeros(self.grid.n_local, 1, dtype=torch.float64)
        first[np.flatnonzero(np.arange(self.grid.begin, self.grid.end) % m == 0)] = 1.0
        inside = StepMatrix(B.sparsity, (1 - first) * B.values)
        A_c = combination([(1, StepMatrix(A.sparsity, A.values.expand(len(first), -1))), (1, inside)])
        sums = (self.windows.sum(A_c.values), self.windows.sum(first * B.values))
        return StepMatrix(A_c.sparsity, sums[0]), StepMatrix(B.sparsity, sums[1])

    def _entering(self, like: Tensor, before: Tensor | None) -> Tensor:
        assert before is not None
        return _only_row(like, 0, self.B[:1](before[None])[0])


class LinearMgrit:
    """T^-1 and T^-T by cycles over levels of windows. Rows are of shape (n_local, n); every verb is collective.

    Args:
        grid, A, B: the system, see `TimeSystem`.
        settings: windows, cycles, levels.

    Raises:
        SolveFailure: a step, or a coarse step, is singular or not finite; on all ranks.

    Example:
        >>> cycles = LinearMgrit(grid, A, B, LinearMgritSettings(window=16, cycles=2))
        >>> x = cycles.forward(r)                             # T x = r, approximately
        >>> y = cycles.adjoint(r)                             # by the exact transpose
        >>> x = cycles.solve(r, rtol=1e-6)                    # as many cycles as that takes
    """

    def __init__(self, grid: TimeGrid, A: StepMatrix, B: StepMatrix, settings: LinearMgritSettings) -> None:
        self.is_coarsest = settings.levels == 1 or grid.num_steps <= settings.window
        self.system = TimeSystem(grid, A, B, None if self.is_coarsest else settings.window).factor()
        self.cycles = settings.cycles
        self.coarse: LinearMgrit | None = None
        if not self.is_coarsest:
            matrices, coarse = self.system.coarse_matrices(), grid.coarsen(settings.window)
            if coarse is not None:  # this rank has a step there
                less = LinearMgritSettings(settings.window, settings.cycles, settings.levels - 1)
                self.coarse = LinearMgrit(coarse, *matrices, less)

    def forward(self, r: Tensor) -> Tensor:
        """T^-1 r, approximately: states e at the ends of windows are corrected, then the windows are solved."""
        system = self.system
        x = system.sweep(r)
        if self.is_coarsest:
            return x
        e = self._correction(x[system.windows.ends])
        for _ in range(self.cycles - 1):
            x = system.sweep(r - system.couple(e))
            e = e + self._correction(x[system.windows.ends] - e)
        return system.sweep(r - system.couple(e))

    def adjoint(self, r: Tensor) -> Tensor:
        """The exact transpose of `forward`."""
        system = self.system
        x = system.sweep_adjoint(r)
        if self.is_coarsest:
            return x
        e = self._correction_adjoint(system.couple_adjoint(x))
        for _ in range(self.cycles - 1):
            x = system.sweep_adjoint(r - system.at_ends(e))
            e = e + self._correction_adjoint(system.couple_adjoint(x) - e)
        return system.sweep_adjoint(r - system.at_ends(e))

    def solve(self, r: Tensor, rtol: float = EXACT_RTOL) -> Tensor:
        """x with |r - T x| <= rtol |r|, a sweep a cycle.

        Args:
            r: rows, (n_local, n).
            rtol: relative residual; `EXACT_RTOL` is rounding.

        Returns:
            (n_local, n).

        Raises:
            SolveFailure: the cycles diverge, or stop before they are there; on all ranks.
        """
        system = self.system
        return self._cycle(r, rtol, system.sweep, lambda x: x[system.windows.ends], system.couple, self._correction)

    def solve_adjoint(self, r: Tensor, rtol: float = EXACT_RTOL) -> Tensor:
        """x with |r - T'x| <= rtol |r|; see `solve`."""
        system = self.system
        read, put = system.couple_adjoint, system.at_ends
        return self._cycle(r, rtol, system.sweep_adjoint, read, put, self._correction_adjoint)

    def _cycle(self, r: Tensor, rtol: float, sweep: RowMap, read: RowMap, put: RowMap, correction: RowMap) -> Tensor:
        """x = sweep(r - put(e)) with e = read(x), where windows meet: what e misses is all the residual there is."""
        x = sweep(r)
        e = torch.zeros(len(self.system.windows.ends), r.shape[1], dtype=r.dtype)
        first, last, size = self._size(r), math.inf, math.inf
        for _ in range(MAX_CYCLES):
            defect = read(x) - e
            last, size = size, self._size(put(defect))
            if size <= rtol * first or (size <= ROUNDED_RTOL * first and size > STAGNATION * last):
                return x
            if not size < DIVERGENCE * first:  # also for NaN
                break
            e = e + correction(defect)
            x = sweep(r - put(e))
        raise SolveFailure(
            f"MGRIT: relative residual {size / first:.1e} where {rtol:.1e} was asked for",
            "more -mgrit_cycles, a smaller -mgrit_window, or -propagator serial, as waves need it",
        )

    def _size(self, rows: Tensor) -> float:
        return float(self.system.grid.sum(rows.square().sum()) ** 0.5)

    def _correction(self, defect: Tensor) -> Tensor:
        """T_c^-1 A_c of what the states at the ends miss."""
        return defect if self.coarse is None else self.coarse.forward(self.coarse.system.A(defect))

    def _correction_adjoint(self, defect: Tensor) -> Tensor:
        if self.coarse is None:
            return defect
        return self.coarse.system.A.transpose(self.coarse.adjoint(defect))


def _only_row(like: Tensor, row: int, value: Tensor | None) -> Tensor:
    assert value is not None
    rows = torch.zeros_like(like)
    rows[row] = value
    return rows
