"""Forward and backward substitution over windows of steps, A_i x_i + B_i x_{i-1} = r_i with x = 0 before each.

An LU of the coupled matrix would fill B_i U_{i-1}^-1. Instead, with A_i = L_i U_i and w_i = U_i x_i, the system in
(w_1, x_1, w_2, x_2, ...), each x_i in reverse order, is lower triangular without any fill. PETSc's SOR from a zero
guess is its triangular solve: one call runs through a chunk of steps.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, lru_cache
from itertools import count, pairwise

import numpy as np
import scipy.sparse as sp
import torch
from petsc4py import PETSc
from torch import Tensor

from pdeopt.core.arrays import Array, destroyed_with, index_array
from pdeopt.steps.bands import BandFactor, CoupledBand, band_of, minimum_degree, require_finite
from pdeopt.steps.sparse import StepMatrix, block_diagonal
from pdeopt.steps.sparsity import Sparsity
from pdeopt.steps.stepsolve import StagedSubstitution, is_krylov, superlu
from pdeopt.steps.windows import Stretch, chunks

#: A pivot is exchanged only for one that is larger by the inverse of this.
PIVOT_THRESHOLD = 2.0**-10

#: Entries of a chunk's triangle: of steps that are alike, so that it stays in the cache of a core; of others, so that a
#: call of Python costs nothing beside it.
LIKE_ENTRIES, UNLIKE_ENTRIES = 1 << 15, 1 << 18

#: Unknowns of the chunks whose right-hand sides and solutions stand in one array: so few that it stays there, too.
GATHERED = 1 << 14

#: Matrices of which there are many, as of Newton's method, write their values into memory that they share, that of so
#: many chunks for a layout, until others have taken it from them by turns so many times.
SHARED_CHUNKS, FEW_TURNS = 4, 2

NUMBERS = count()

#: Rows and columns of entries, and where their values stand in an array.
Entries = tuple[Array, Array, Array]

#: Which entry of a row comes first, second, ...: (1 or batch, n), BACK, or None for its own order.
Order = Array | slice | None
BACK = slice(None, None, -1)

SWEEPS = PETSc.Mat.SORType
FORWARD = SWEEPS.LOCAL_FORWARD_SWEEP | SWEEPS.ZERO_INITIAL_GUESS
BACKWARD = SWEEPS.LOCAL_BACKWARD_SWEEP | SWEEPS.ZERO_INITIAL_GUESS


class TriangleLayout:
    """Where the values of L, U and B stand in the triangle of a chunk of steps, and in its transpose.

    The first n unknowns are the state before the chunk; n for w and n for x in reverse follow for each step. Places are
    numbers of unknowns over all steps, in the order of elimination.

    Args:
        n, steps: unknowns of a step, and steps.
        lower, upper: entries of L without its diagonal and of U, at places.
        below: entries of B_i, at places of step i; its columns belong to the step before.
        count: of the values that the entries point into; two more follow them, 1 and -1.
    """

    def __init__(self, n: int, steps: int, lower: Entries, upper: Entries, below: Entries, count: int) -> None:
        self.size = n + 2 * n * steps
        step, place = np.divmod(np.arange(-n, n * steps), n)  # from the state before on
        w, x = n + 2 * n * step + place, n + 2 * n * step + 2 * n - 1 - place
        k = np.arange(n * steps)
        one, minus = np.full(n * steps, count), np.full(n * steps, count + 1)
        parts = [
            (x[:n], x[:n], one[:n]),
            (w[n + lower[0]], w[n + lower[1]], lower[2]),
            (w[n + k], w[n + k], one),
            (w[n + below[0]], x[below[1]], below[2]),  # of the step before
            (x[n + upper[0]], x[n + upper[1]], upper[2]),
            (x[n + k], w[n + k], minus),
        ]
        rows, cols, source = (np.concatenate(each) for each in zip(*parts))
        self._forward = self._sorted(rows, cols, source)
        self._entries = rows, cols, source
        self._shared: dict[tuple[bool, int], tuple[PETSc.Mat, Array, object]] = {}
        self._owned = destroyed_with(self, [])

    @cached_property
    def _backward(self) -> tuple[Array, Array, Array]:
        rows, cols, source = self._entries
        return self._sorted(cols, rows, source)

    def _sorted(self, rows: Array, cols: Array, source: Array) -> tuple[Array, Array, Array]:
        order = np.argsort(rows * self.size + cols)
        starts = np.r_[0, np.cumsum(np.bincount(rows, minlength=self.size))]
        return index_array(starts), index_array(cols[order]), source[order]

    def shared(self, owner: object, place: int, values: Callable[[], Array], transpose: bool) -> tuple[PETSc.Mat, bool]:
        """The triangle, or its transpose, in one of the matrices that others use, too; and whether it was written."""
        key = transpose, place
        matrix, entries, last = self._shared.get(key) or (*self.create(values(), transpose), owner)
        if key not in self._shared:
            self._owned.append(matrix)
        elif last != owner:
            places = (self._backward if transpose else self._forward)[2]
            np.take(values(), places, out=entries, mode="clip")  # by "raise" NumPy would copy once more
            matrix.assemble()  # PETSc keeps inverses of the diagonal
        self._shared[key] = matrix, entries, owner
        return matrix, last != owner

    def create(self, values: Array, transpose: bool) -> tuple[PETSc.Mat, Array]:
        """The triangle, or its transpose, a new one on the memory of its entries, too, and of this layout's indices."""
        starts, columns, source = self._backward if transpose else self._forward
        entries = np.take(values, source)
        csr = (starts, columns, entries)
        matrix = PETSc.Mat().createAIJWithArrays((self.size, self.size), csr, comm=PETSc.COMM_SELF)
        matrix.setOption(PETSc.Mat.Option.USE_INODES, False)
        matrix.assemble()
        return matrix, entries


def repeated(entries: Entries, n: int, steps: int, stride: int) -> Entries:
    """The entries of one step for all steps; their values are `stride` apart."""
    rows, cols, source = entries
    i = np.arange(steps)[:, None]
    return (i * n + rows).ravel(), (i * n + cols).ravel(), (i * stride + source).ravel()


@lru_cache(maxsize=8)
def band_layout(A: Sparsity, B: Sparsity, steps: int, alike: bool) -> TriangleLayout:
    """The layout for values (bands of the factors, B) of steps with these patterns, or of one step for all."""
    n, width, place = A.shape[0], band_of(A).width, band_of(A).places
    distinct = 1 if alike else steps
    row = np.arange(-width, width + 1)[:, None] + np.arange(n)
    slot, col = np.nonzero((row >= 0) & (row < n))
    row, source = row[slot, col], slot * distinct * n + col
    is_lower, bands = slot > width, (2 * width + 1) * distinct * n
    below = place[B.rows], place[B.cols], bands + np.arange(B.nnz)
    lower, upper = ((row[part], col[part], source[part]) for part in (is_lower, ~is_lower))
    stride = 0 if alike else n
    return TriangleLayout(
        *(n, steps, repeated(lower, n, steps, stride), repeated(upper, n, steps, stride)),
        below=repeated(below, n, steps, 0 if alike else B.nnz),
        count=bands + distinct * B.nnz,
    )


class BandTriangles:
    """Triangles of steps whose factors are bands; all that depends on patterns is kept for the next matrices.

    Args:
        factor: without exchanged rows.
        A, B: the matrices, each one a step or one for all.
    """

    def __init__(self, factor: BandFactor, A: StepMatrix, B: StepMatrix) -> None:
        self._bands, self._A, self._B = factor.bands, A, B
        self.rows = self.columns = None if factor.band.is_natural else factor.band.order[None]
        self.entries = (2 * factor.band.width + 3) * A.shape[0] + B.sparsity.nnz

    def matrix(self, steps: slice, transpose: bool) -> PETSc.Mat:
        """That of some steps, a new one."""
        return self._layout(steps).create(self._values(steps), transpose)[0]

    def shared(self, owner: int, place: int, steps: slice, transpose: bool) -> tuple[PETSc.Mat, bool]:
        """That of some steps, until another owner asks for one at this place; and whether it was written."""
        return self._layout(steps).shared((owner, steps.start), place, lambda: self._values(steps), transpose)

    def _layout(self, steps: slice) -> TriangleLayout:
        return band_layout(self._A.sparsity, self._B.sparsity, steps.stop - steps.start, self._A.is_constant)

    def _values(self, steps: slice) -> Array:
        each = slice(0, 1) if self._A.is_constant else steps
        parts = self._bands[:, each].ravel(), self._B.values[each].numpy().ravel(), [1.0, -1.0]
        return np.concatenate(parts)


class SparseTriangles:
    """Triangles of steps whose factors fill less than a band, or need pivots: those of SuperLU, which shows them.

    Args:
        A, B: the matrices, each one a step or one for all.
    """

    def __init__(self, A: StepMatrix, B: StepMatrix) -> None:
        require_finite(A)
        self._n, self._B, self._alike = A.shape[0], B, A.is_constant
        n, batch = A.shape[0], len(A.values)
        start = n * np.arange(batch)[:, None]
        order = (start + minimum_degree(A.sparsity)).ravel()
        lu = superlu(block_diagonal(A)[order][:, order], n)
        self.rows, self.columns = (order[p].reshape(batch, n) - start for p in map(np.argsort, (lu.perm_r, lu.perm_c)))
        self._lower, self._upper = sp.tril(lu.L, -1, "csr"), lu.U.tocsr()
        self.entries = (self._lower.nnz + self._upper.nnz) // batch + B.sparsity.nnz + 2 * n
        self._layouts: dict[tuple[int, int], tuple[TriangleLayout, Array]] = {}

    def matrix(self, steps: slice, transpose: bool) -> PETSc.Mat:
        """That of some steps."""
        key = (0, steps.stop - steps.start) if self._alike else (steps.start, steps.stop)
        if key not in self._layouts:
            self._layouts[key] = self._layout(steps)
        layout, values = self._layouts[key]
        return layout.create(values, transpose)[0]

    def _layout(self, steps: slice) -> tuple[TriangleLayout, Array]:
        n, number, B, distinct = self._n, steps.stop - steps.start, self._B, slice(0, 1) if self._alike else steps
        part = slice(n * distinct.start, n * distinct.stop)
        L, U = (factor[part, part].tocoo() for factor in (self._lower, self._upper))
        place_of_row, place_of_column = (np.argsort(order[distinct], axis=1) for order in (self.rows, self.columns))
        i = np.arange(len(place_of_row))[:, None]
        rows, cols = place_of_row[:, B.sparsity.rows] + n * i, place_of_column[:, B.sparsity.cols] + n * i
        values = np.r_[L.data, U.data, B.values[distinct].numpy().ravel(), 1.0, -1.0]
        starts = np.cumsum([0, L.nnz, U.nnz, rows.size])
        source = np.arange(starts[-1])
        parts = ((L.row, L.col), (U.row, U.col), (rows.ravel(), cols.ravel()))
        entries = [(*part, source[a:b]) for part, a, b in zip(parts, starts, starts[1:])]
        lower, upper, below = (repeated(each, n, number if self._alike else 1, 0) for each in entries)
        return TriangleLayout(n, number, lower, upper, below, int(starts[-1])), values


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


def triangles(A: StepMatrix, B: StepMatrix) -> BandTriangles | SparseTriangles:
    """The triangles of all steps: of bands, where the steps are narrow and need no pivots."""
    if band_of(A.sparsity).is_narrow:
        factor = BandFactor(A, PIVOT_THRESHOLD)
        if not factor.exchanged:
            return BandTriangles(factor, A, B)
    return SparseTriangles(A, B)


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
    """Substitution by factors, or stage by stage where steps are solved by Krylov methods, as `-step_pc_type` says.

    Args:
        A, B: the matrices, one a step or one for all.
        batch: steps.
        starts: rows at which a window starts, the first of them 0; None for one window.

    Raises:
        StepFailure: a step is singular or not finite.
    """
    if A.sparsity.columns is not None or is_krylov(A):
        return StagedSubstitution(A, B, batch, starts)
    if CoupledBand.fits(A.shape[0], batch):
        coupled = CoupledBand(A, B, batch, np.zeros(1, dtype=np.int64) if starts is None else starts)
        if coupled.is_regular:
            return coupled
    return Substitution(A, B, batch, starts)
