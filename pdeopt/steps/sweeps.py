"""Forward and backward substitution over windows of steps, A_i x_i + B_i x_{i-1} = r_i with x = 0 before each.

An LU of the coupled matrix would fill B_i U_{i-1}^-1. Instead, with A_i = L_i U_i and w_i = U_i x_i, the system in
(w_1, x_1, w_2, x_2, ...), each x_i in reverse order, is lower triangular without any fill. PETSc's SOR from a zero
guess is its triangular solve: one call runs through a chunk of steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import count

import numpy as np
import scipy.sparse as sp
import torch
from petsc4py import PETSc
from torch import Tensor

from pdeopt.core.arrays import Array, destroyed_with, index_array
from pdeopt.core.settings import read
from pdeopt.steps.bands import BandFactor, band_of, minimum_degree, require_finite
from pdeopt.steps.sparse import Sparsity, StepMatrix, block_diagonal
from pdeopt.steps.stepsolve import StagedSubstitution, StepSettings, superlu

#: A pivot is exchanged only for one that is larger by the inverse of this.
PIVOT_THRESHOLD = 2.0**-10

#: Entries of a chunk's triangle: of steps that are alike, so that it stays in the cache of a core; of others, so that a
#: call of Python costs nothing beside it.
LIKE_ENTRIES, UNLIKE_ENTRIES = 1 << 15, 1 << 18

#: As many sweeps with matrices of which there are many, as of Newton's method, write their values into shared memory.
FEW_SWEEPS = 4

NUMBERS = count()

#: Rows and columns of entries, and where their values stand in an array.
Entries = tuple[Array, Array, Array]

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
        self._shared: dict[bool, tuple[PETSc.Mat, Array, object]] = {}
        self._owned = destroyed_with(self, [])

    @cached_property
    def _backward(self) -> tuple[Array, Array, Array]:
        rows, cols, source = self._entries
        return self._sorted(cols, rows, source)

    def _sorted(self, rows: Array, cols: Array, source: Array) -> tuple[Array, Array, Array]:
        order = np.argsort(rows * self.size + cols)
        starts = np.r_[0, np.cumsum(np.bincount(rows, minlength=self.size))]
        return index_array(starts), index_array(cols[order]), source[order]

    def matrix(self, values: Array, transpose: bool) -> PETSc.Mat:
        """The triangle, or its transpose, a new one."""
        return self._create(values, transpose)[0]

    def shared(self, owner: object, values: Callable[[], Array], transpose: bool) -> PETSc.Mat:
        """The triangle, or its transpose, in a matrix that others use, too: their values in it are written over."""
        if transpose not in self._shared:
            self._shared[transpose] = (*self._create(values(), transpose), owner)
            self._owned.append(self._shared[transpose][0])
        matrix, entries, last = self._shared[transpose]
        if last != owner:
            np.take(values(), (self._backward if transpose else self._forward)[2], out=entries)
            matrix.assemble()  # PETSc keeps inverses of the diagonal
            self._shared[transpose] = matrix, entries, owner
        return matrix

    def _create(self, values: Array, transpose: bool) -> tuple[PETSc.Mat, Array]:
        """On the memory of new entries and of this layout's indices."""
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
        return self._layout(steps).matrix(self._values(steps), transpose)

    def shared(self, owner: object, steps: slice, transpose: bool) -> PETSc.Mat:
        """That of some steps, until another owner asks for one."""
        return self._layout(steps).shared((owner, steps.start), lambda: self._values(steps), transpose)

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
        return layout.matrix(values, transpose)

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


@dataclass(frozen=True)
class Stretch:
    """Rows begin to end - 1, which one call runs through; the first of their window or not."""

    begin: int
    end: int
    is_first: bool


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
        self._chunks = [chunk for window in zip(starts, [*starts[1:], batch]) for chunk in chunks(*window, most)]
        self._matrices: dict[tuple[int, int, bool], PETSc.Mat] = {}
        self._work, self._owned = dict[int, Work](), destroyed_with(self, [])
        self._number, self._calls, self._few = next(NUMBERS), 0, FEW_SWEEPS * len(self._chunks)

    def forward(self, rows: Tensor) -> Tensor:
        """x for the right-hand sides r, both (batch, n)."""
        r = taken(rows.detach().numpy(), self._triangles.rows)
        x, before = np.empty_like(r), None
        for chunk in self._chunks:
            work = self._space(chunk)
            work.right[0, 1] = 0.0 if chunk.is_first else before
            work.right[1:, 0], work.right[1:, 1] = r[chunk.begin : chunk.end], 0.0
            self._matrix(chunk, transpose=False).SOR(*work.vectors, sortype=FORWARD)
            x[chunk.begin : chunk.end] = work.left[1:, 1, ::-1]
            before = work.left[-1, 1]
        return torch.from_numpy(put(x, self._triangles.columns))

    def backward(self, rows: Tensor) -> Tensor:
        """x with A_i'x_i + B_{i+1}'x_{i+1} = r_i in each window, x = 0 after it."""
        r = taken(rows.detach().numpy(), self._triangles.columns)[:, ::-1]
        x, after = np.empty_like(r), None
        for chunk in reversed(self._chunks):
            work = self._space(chunk)
            work.right[0, 1] = 0.0
            work.right[1:, 0], work.right[1:, 1] = 0.0, r[chunk.begin : chunk.end]
            if after is not None:
                work.right[-1, 1] += after
            self._matrix(chunk, transpose=True).SOR(*work.vectors, sortype=BACKWARD)
            x[chunk.begin : chunk.end] = work.left[1:, 0]
            after = None if chunk.is_first else work.left[0, 1]
        return torch.from_numpy(put(x, self._triangles.rows))

    def _space(self, chunk: Stretch) -> Work:
        length = chunk.end - chunk.begin
        if length not in self._work:
            self._work[length] = Work(self._n, length)
        return self._work[length]

    def _matrix(self, chunk: Stretch, transpose: bool) -> PETSc.Mat:
        length = chunk.end - chunk.begin
        key, steps = (0 if self._alike else chunk.begin, length, transpose), slice(chunk.begin, chunk.end)
        if key not in self._matrices:
            self._calls += 1
            if not self._alike and isinstance(self._triangles, BandTriangles) and self._calls <= self._few:
                return self._triangles.shared(self._number, steps, transpose)
            self._matrices[key] = self._triangles.matrix(steps, transpose)
            self._owned.append(self._matrices[key])
        return self._matrices[key]


class Work:
    """Right-hand side and solution of a chunk's triangle, (1 + steps, 2, n), w and x of each step.

    Of row 0, the state before the chunk, the triangle sees x only.
    """

    def __init__(self, n: int, steps: int) -> None:
        self.right, self.left = np.zeros((2, 1 + steps, 2, n))
        vectors = (array.reshape(-1)[n:] for array in (self.right, self.left))
        made = [PETSc.Vec().createWithArray(vector, comm=PETSc.COMM_SELF) for vector in vectors]
        self.vectors = destroyed_with(self, made)


def triangles(A: StepMatrix, B: StepMatrix) -> BandTriangles | SparseTriangles:
    """The triangles of all steps: of bands, where the steps are narrow and need no pivots."""
    if band_of(A.sparsity).is_narrow:
        factor = BandFactor(A, PIVOT_THRESHOLD)
        if not factor.exchanged:
            return BandTriangles(factor, A, B)
    return SparseTriangles(A, B)


def chunks(begin: int, end: int, most: int) -> list[Stretch]:
    """A window in chunks of `most` steps or fewer: of one length, where one above half of that divides it."""
    steps, most = end - begin, max(min(most, end - begin), 1)
    length = next((k for k in range(most, most // 2, -1) if steps % k == 0), most)
    return [Stretch(a, min(a + length, end), a == begin) for a in range(begin, end, length)]


def taken(rows: Array, order: Array | None) -> Array:
    """Each row in an order, (batch or 1, n); None for its own."""
    if order is None:
        return rows
    return rows[:, order[0]] if len(order) == 1 else np.take_along_axis(rows, order, axis=1)


def put(rows: Array, order: Array | None) -> Array:
    """The inverse of `taken`."""
    if order is None:
        return rows
    out = np.empty_like(rows)
    if len(order) > 1:
        np.put_along_axis(out, order, rows, axis=1)
    else:
        out[:, order[0]] = rows
    return out


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
) -> Substitution | StagedSubstitution:
    """Substitution by factors, or stage by stage where steps are solved by GMRES, as `-step_pc_type` says.

    Args:
        A, B: the matrices, one a step or one for all.
        batch: steps.
        starts: rows at which a window starts, the first of them 0; None for one window.

    Raises:
        StepFailure: a step is singular or not finite.
    """
    kind = Substitution if read(StepSettings).pc_type == "lu" else StagedSubstitution
    return kind(A, B, batch, starts)
