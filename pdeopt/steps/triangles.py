"""The triangles of forward and backward substitution over chunks of steps, and which matrices of PETSc hold them.

See `sweeps`: where the entries of L_i, U_i and B_i stand depends on the patterns alone, and is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, lru_cache

import numpy as np
import scipy.sparse as sp
from petsc4py import PETSc

from pdeopt.core.arrays import Array, destroyed_with, index_array
from pdeopt.steps.bands import BandFactor, band_of, minimum_degree, require_finite
from pdeopt.steps.sparse import StepMatrix, block_diagonal
from pdeopt.steps.sparsity import Sparsity
from pdeopt.steps.stepsolve import superlu

#: A pivot is exchanged only for one that is larger by the inverse of this.
PIVOT_THRESHOLD = 2.0**-10

#: Rows and columns of entries, and where their values stand in an array.
Entries = tuple[Array, Array, Array]


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

    def matrix(self, values: Array, transpose: bool) -> PETSc.Mat:
        """The triangle, or its transpose, a new one."""
        return self._create(values, transpose)[0]

    def shared(self, owner: object, place: int, values: Callable[[], Array], transpose: bool) -> tuple[PETSc.Mat, bool]:
        """The triangle, or its transpose, in one of the matrices that others use, too; and whether it was written."""
        key = transpose, place
        if key not in self._shared:
            self._shared[key] = (*self._create(values(), transpose), owner)
            self._owned.append(self._shared[key][0])
            return self._shared[key][0], True
        matrix, entries, last = self._shared[key]
        if last != owner:
            np.take(values(), (self._backward if transpose else self._forward)[2], out=entries)
            matrix.assemble()  # PETSc keeps inverses of the diagonal
            self._shared[key] = matrix, entries, owner
        return matrix, last != owner

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


def triangles(A: StepMatrix, B: StepMatrix) -> BandTriangles | SparseTriangles:
    """The triangles of all steps: of bands, where the steps are narrow and need no pivots."""
    if band_of(A.sparsity).is_narrow:
        factor = BandFactor(A, PIVOT_THRESHOLD)
        if not factor.exchanged:
            return BandTriangles(factor, A, B)
    return SparseTriangles(A, B)
