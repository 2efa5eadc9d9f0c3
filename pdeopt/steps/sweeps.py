"""Forward and backward substitution over windows of steps, A_i x_i + B_i x_{i-1} = r_i with x = 0 before each.

An LU of the coupled matrix would fill B_i U_{i-1}^-1. Instead, with A_i = L_i U_i and w_i = U_i x_i, the system in
(w_1, x_1, w_2, x_2, ...), each x_i in reverse order, is lower triangular without any fill. PETSc's SOR from a zero
guess is its triangular solve: one call runs through a chunk of steps.
"""

from __future__ import annotations

from functools import cached_property
from itertools import count, pairwise

import numpy as np
import torch
from petsc4py import PETSc
from torch import Tensor

from pdeopt.core.arrays import Array, destroyed_with
from pdeopt.core.settings import read
from pdeopt.steps.bands import CoupledBand
from pdeopt.steps.sparse import StepMatrix
from pdeopt.steps.stepsolve import StagedSubstitution, StepSettings
from pdeopt.steps.triangles import BandTriangles, triangles
from pdeopt.steps.windows import Stretch, chunks

#: Entries of a chunk's triangle: of steps that are alike, so that it stays in the cache of a core; of others, so that a
#: call of Python costs nothing beside it.
LIKE_ENTRIES, UNLIKE_ENTRIES = 1 << 15, 1 << 18

#: Unknowns of the chunks whose right-hand sides and solutions stand in one array: so few that it stays there, too.
GATHERED = 1 << 14

#: Matrices of which there are many, as of Newton's method, write their values into memory that they share, that of so
#: many chunks for a layout, until others have taken it from them by turns so many times.
SHARED_CHUNKS, FEW_TURNS = 4, 2

NUMBERS = count()

#: Which entry of a row comes first, second, ...: (1 or batch, n), BACK, or None for its own order.
Order = Array | slice | None
BACK = slice(None, None, -1)

SWEEPS = PETSc.Mat.SORType
FORWARD = SWEEPS.LOCAL_FORWARD_SWEEP | SWEEPS.ZERO_INITIAL_GUESS
BACKWARD = SWEEPS.LOCAL_BACKWARD_SWEEP | SWEEPS.ZERO_INITIAL_GUESS


class Substitution:
    """Substitution by factors of the steps: LAPACK's where they are narrow bands without small pivots, else SuperLU's.

    Where all steps are alike, one factor serves all chunks and windows.

    Args:
        A, B: the matrices, one a step or one for all.
        batch: steps.
        starts: rows at which a window starts, the first of them 0; None for one window.

    Raises:
        StepFailure: a step is singular or not finite.
    """

    def __init__(self, A: StepMatrix, B: StepMatrix, batch: int, starts: Array | None = None) -> None:
        self._alike = A.is_constant and B.is_constant
        starts = np.zeros(1, dtype=np.int64) if starts is None else starts
        if not self._alike:
            A, B = spread(A, batch), cut(spread(B, batch), starts)
            starts = starts[:1]
        self._n, self._triangles = A.shape[0], triangles(A, B)
        most = (LIKE_ENTRIES if self._alike else UNLIKE_ENTRIES) // self._triangles.entries
        windows = zip(starts, [*starts[1:], batch])
        runs = [run for window in windows for run in chunks(*window, max(most, GATHERED // self._n))]
        self._runs = [
            [Stretch(each.begin, each.end, each.begin in starts) for each in chunks(run.begin, run.end, most)]
            for run in runs
        ]
        self._chunks = [chunk for run in self._runs for chunk in run]
        self._matrices: dict[tuple[int, int, bool], PETSc.Mat] = {}
        self._work, self._owned = dict[tuple[int, ...], Work](), destroyed_with(self, [])
        self._number, self._writes = next(NUMBERS), 0
        self._most_writes = 0 if self._alike else 2 * FEW_TURNS * len(self._chunks)

    @cached_property
    def _orders(self) -> tuple[Order, Order, Order, Order]:
        """Which unknown stands at each place of w and of x, and which place is that of each unknown."""
        rows, columns = self._triangles.rows, self._triangles.columns
        w = (None, None) if rows is None else (rows, np.argsort(rows, axis=1))
        x = (BACK, BACK) if columns is None else (columns[:, ::-1], self._n - 1 - np.argsort(columns, axis=1))
        return w[0], x[0], w[1], x[1]

    def forward(self, rows: Tensor) -> Tensor:
        """x for the right-hand sides r, both (batch, n)."""
        r, (to_w, _, _, from_x) = rows.detach().numpy(), self._orders
        x, before = np.empty_like(r), np.zeros(self._n)
        for run in self._runs:
            work, here = self._space(run), slice(run[0].begin, run[-1].end)
            work.right[1:, 0], work.right[1:, 1] = taken(r, to_w, here), 0.0
            work.left[0, 1] = 0.0 if run[0].is_first else before
            for chunk, first, vectors in zip(run, work.firsts, work.vectors):
                work.right[first, 1] = work.left[first, 1]
                self._matrix(chunk, transpose=False).SOR(*vectors, sortype=FORWARD)
            x[here], before = taken(work.left[1:, 1], from_x, here, here.start), work.left[-1, 1].copy()
        return torch.from_numpy(x)

    def backward(self, rows: Tensor) -> Tensor:
        """x with A_i'x_i + B_{i+1}'x_{i+1} = r_i in each window, x = 0 after it."""
        r, (_, to_x, from_w, _) = rows.detach().numpy(), self._orders
        x, after = np.empty_like(r), np.zeros(self._n)
        for run in reversed(self._runs):
            work, here = self._space(run), slice(run[0].begin, run[-1].end)
            work.right[1:, 0], work.right[1:, 1], work.right[0, 1] = 0.0, taken(r, to_x, here), 0.0
            work.right[-1, 1] += after
            for chunk, first, vectors in reversed(list(zip(run, work.firsts, work.vectors))):
                self._matrix(chunk, transpose=True).SOR(*vectors, sortype=BACKWARD)
                work.right[first, 1] = work.left[first, 1]  # less what the steps after it say
            x[here] = taken(work.left[1:, 0], from_w, here, here.start)
            after = np.zeros(self._n) if run[0].is_first else work.left[0, 1].copy()
        return torch.from_numpy(x)

    def _space(self, run: list[Stretch]) -> Work:
        lengths = tuple(chunk.end - chunk.begin for chunk in run)
        if lengths not in self._work:
            self._work[lengths] = Work(self._n, lengths)
        return self._work[lengths]

    def _matrix(self, chunk: Stretch, transpose: bool) -> PETSc.Mat:
        length = chunk.end - chunk.begin
        key, steps = (0 if self._alike else chunk.begin, length, transpose), slice(chunk.begin, chunk.end)
        if key not in self._matrices:
            if self._writes < self._most_writes and isinstance(self._triangles, BandTriangles):
                place = chunk.begin // length % SHARED_CHUNKS
                matrix, is_written = self._triangles.shared(self._number, place, steps, transpose)
                self._writes += is_written
                return matrix
            self._matrices[key] = self._triangles.matrix(steps, transpose)
            self._owned.append(self._matrices[key])
        return self._matrices[key]


class Work:
    """Right-hand sides and solutions of the triangles of consecutive chunks, (1 + steps, 2, n), w and x of each step.

    The state before a chunk is the last one of the chunk before; of its row the triangle sees x only.

    Args:
        n: unknowns of a step.
        lengths: steps of each chunk.

    Attributes:
        right, left: the arrays.
        firsts: the row before each chunk.
        vectors: the parts of both that each chunk sees.
    """

    def __init__(self, n: int, lengths: tuple[int, ...]) -> None:
        self.right, self.left = np.zeros((2, 1 + sum(lengths), 2, n))
        ends = np.cumsum((0, *lengths)).tolist()
        self.firsts = ends[:-1]
        parts = [slice((2 * a + 1) * n, (2 * b + 2) * n) for a, b in pairwise(ends)]
        flat = self.right.reshape(-1), self.left.reshape(-1)
        self.vectors = [[PETSc.Vec().createWithArray(x[part], comm=PETSc.COMM_SELF) for x in flat] for part in parts]
        destroyed_with(self, [vector for pair in self.vectors for vector in pair])


def taken(rows: Array, order: Order, here: slice, start: int = 0) -> Array:
    """Some steps, each in an order.

    Args:
        rows: of the steps from `start` on, (steps, n).
        order: of all steps.
        here: the steps.
    """
    rows = rows[here.start - start : here.stop - start]
    if isinstance(order, slice):
        backward: Array = rows[:, order]
        return backward
    if order is None:
        return rows
    chosen: Array = np.take(rows, order[0], axis=1) if len(order) == 1 else np.take_along_axis(rows, order[here], 1)
    return chosen


def spread(matrix: StepMatrix, batch: int) -> StepMatrix:
    """One matrix for each step."""
    return StepMatrix(matrix.sparsity, matrix.values.expand(batch, -1))


def cut(B: StepMatrix, starts: Array) -> StepMatrix:
    """B without the couplings to the step before a window."""
    if len(starts) == 1:
        return B
    values = B.values.clone()
    values[starts] = 0.0
    return StepMatrix(B.sparsity, values)


def substitution(
    A: StepMatrix, B: StepMatrix, batch: int, starts: Array | None = None
) -> CoupledBand | Substitution | StagedSubstitution:
    """Substitution by factors, or stage by stage where steps are solved by GMRES, as `-step_pc_type` says.

    Args:
        A, B: the matrices, one a step or one for all.
        batch: steps.
        starts: rows at which a window starts, the first of them 0; None for one window.

    Raises:
        StepFailure: a step is singular or not finite.
    """
    if read(StepSettings).pc_type != "lu":
        return StagedSubstitution(A, B, batch, starts)
    if CoupledBand.fits(A.shape[0], batch):
        coupled = CoupledBand(A, B, batch, np.zeros(1, dtype=np.int64) if starts is None else starts)
        if coupled.is_regular:
            return coupled
    return Substitution(A, B, batch, starts)
