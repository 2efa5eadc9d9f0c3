"""Solving with the matrices of the steps: all at once where they do not interact, in order where they do."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import scipy.sparse as sp
import torch
from petsc4py import PETSc
from scipy.sparse.linalg import SuperLU, splu
from torch import Tensor

from pdeopt.arrays import Array, index_array
from pdeopt.errors import SolveFailure
from pdeopt.sparse import StepMatrix, block_diagonal

Solve = Callable[[PETSc.Vec, PETSc.Vec], None]

#: What happened and what to try, where a step cannot be solved.
NOT_FINITE = ("a step matrix dF/du_new is not finite", "check the residual for NaN, log and division")
SINGULAR_STEP = (
    "a step matrix dF/du_new is singular",
    "check that each step has a unique solution; a smaller time step often mends it",
)


class StepFactor:
    """PETSc's LU of the matrices A_i of all steps, diag(A_1, ..., A_batch), in one factorisation.

    A constant A is factored once and applied to all rows at once.

    Args:
        A: the matrices.

    Raises:
        SolveFailure: a step is singular or not finite.
    """

    def __init__(self, A: StepMatrix) -> None:
        if not A.values.isfinite().all():
            raise SolveFailure(*NOT_FINITE)
        self._blocks, self._size = block_diagonal(A), A.shape[0] * len(A.values)
        pivots = np.arange(len(A.values))[:, None] * A.shape[0] + A.sparsity.bandwidth_order
        self._ordering = PETSc.IS().createGeneral(index_array(pivots.ravel()), comm=PETSc.COMM_SELF)
        self._factors: dict[bool, PETSc.Mat] = {}

    def solve(self, rows: Tensor, transpose: bool = False) -> Tensor:
        """The inverse (or its transpose) applied to `rows`, shape (batch, n); any batch for a constant A."""
        factor = self._factor(transpose)
        source = rows.detach().contiguous().numpy()
        result = np.empty_like(source)
        many = (self._size, source.size // self._size)  # columns of right-hand sides, in Fortran's order
        b = PETSc.Mat().createDense(many, array=source.reshape(-1, self._size).T, comm=PETSc.COMM_SELF)
        x = PETSc.Mat().createDense(many, array=result.reshape(-1, self._size).T, comm=PETSc.COMM_SELF)
        b.assemble()
        x.assemble()
        factor.matSolve(b, x)
        b.destroy()
        x.destroy()
        return torch.from_numpy(result)

    def _factor(self, transpose: bool) -> PETSc.Mat:
        if transpose not in self._factors:
            factor = aij(sp.csr_matrix(self._blocks.T) if transpose else self._blocks)
            try:
                factor.factorLU(self._ordering, self._ordering, {"zeropivot": 1e-300})
            except PETSc.Error:
                raise SolveFailure(*SINGULAR_STEP) from None
            self._factors[transpose] = factor
        return self._factors[transpose]

    def __del__(self) -> None:
        for factor in getattr(self, "_factors", {}).values():
            factor.destroy()


class Substitution:
    """Forward and backward substitution over the steps, A_i x_i + B_i x_{i-1} = r_i with x_0 = 0.

    An LU of the coupled matrix would fill B_i U_{i-1}^-1. Instead, with A_i = L_i U_i and w_i = U_i x_i, the
    system in (w_1, x_1, w_2, x_2, ...), each x_i in reverse order, is lower triangular without any fill, and
    PETSc's triangular solve runs through all steps at once. The factors come from SuperLU, which shows them.
    """

    def __init__(self, A: StepMatrix, B: StepMatrix) -> None:
        n, batch = A.shape[0], len(A.values)
        k = np.arange(n * batch)
        step, place = np.divmod(k, n)
        w, x = step * 2 * n + place, step * 2 * n + 2 * n - 1 - place
        order = (np.arange(batch)[:, None] * n + A.sparsity.bandwidth_order).ravel()
        lu = superlu(block_diagonal(A)[order][:, order])
        rows, cols = order[np.argsort(lu.perm_r)], order[lu.perm_c]
        inverse_rows, inverse_cols = np.argsort(rows), np.argsort(cols)
        L, U, below = lu.L.tocoo(), lu.U.tocoo(), block_diagonal(B, batch, lag=1).tocoo()
        entries = [
            (w[L.row], w[L.col], L.data),
            (w[inverse_rows[below.row]], x[inverse_cols[below.col]], below.data),
            (x[U.row], x[U.col], U.data),
            (x, w, np.full(k.size, -1.0)),
        ]
        row, col, value = (np.concatenate(parts) for parts in zip(*entries))
        triangle = sp.csr_matrix((value, (row, col)), shape=(2 * k.size, 2 * k.size))
        triangle.sort_indices()
        self._matrix = aij(triangle)
        natural = PETSc.IS().createStride(2 * k.size, 0, 1, comm=PETSc.COMM_SELF)
        self._matrix.factorLU(natural, natural, {"zeropivot": 1e-300})  # no fill: it is triangular
        self._right, self._left = self._matrix.createVecs()
        self._w, self._x, self._rows, self._cols = w, x, rows, cols

    def forward(self, rows: Tensor) -> Tensor:
        """x for the right-hand sides r, both (batch, n)."""
        return self._run(rows, self._matrix.solve, self._rows, self._w, self._x, self._cols)

    def backward(self, rows: Tensor) -> Tensor:
        """x with A_i'x_i + B_{i+1}'x_{i+1} = r_i, x_{batch+1} = 0."""
        return self._run(rows, self._matrix.solveTranspose, self._cols, self._x, self._w, self._rows)

    def _run(self, rows: Tensor, solve: Solve, take: Array, put: Array, get: Array, give: Array) -> Tensor:
        """Put rows[take] at `put` of the right-hand side; the solution's `get` becomes result[give]."""
        source = rows.detach().contiguous().numpy().ravel()
        with self._right as right:
            right[:] = 0.0
            right[put] = source[take]
        solve(self._right, self._left)
        result = np.empty_like(source)
        result[give] = self._left.getArray(readonly=True)[get]
        return torch.from_numpy(result.reshape(rows.shape))

    def __del__(self) -> None:
        for part in ("_matrix", "_right", "_left"):
            if hasattr(self, part):
                getattr(self, part).destroy()


class ConstantSubstitution:
    """`Substitution` for steps with one A and one B: a factor for all of them, and a loop."""

    def __init__(self, A: StepMatrix, B: StepMatrix) -> None:
        self._order = A.sparsity.bandwidth_order
        self._solve = superlu(block_diagonal(A)[self._order][:, self._order]).solve
        self._B = block_diagonal(B)[self._order][:, self._order]
        self._B_transpose = self._B.T.tocsr()

    def forward(self, rows: Tensor) -> Tensor:
        """x for the right-hand sides r, both (batch, n)."""
        return self._sweep(rows, "N", self._B)

    def backward(self, rows: Tensor) -> Tensor:
        """x with A'x_i + B'x_{i+1} = r_i, x_{batch+1} = 0."""
        return self._sweep(rows.flip(0), "T", self._B_transpose).flip(0)

    def _sweep(self, rows: Tensor, mode: str, B: sp.csr_matrix) -> Tensor:
        right = rows.detach().numpy()[:, self._order]
        x = np.zeros_like(right)
        last = np.zeros_like(right[0])
        for i, r in enumerate(right):
            x[i] = last = self._solve(r - B @ last, mode)
        result = np.empty_like(x)
        result[:, self._order] = x
        return torch.from_numpy(result)


def superlu(matrix: sp.csr_matrix) -> SuperLU:
    """LU in the given order; rows are exchanged only for pivots a thousand times too small."""
    if not np.isfinite(matrix.data).all():
        raise SolveFailure(*NOT_FINITE)
    try:
        options = {"SymmetricMode": True}
        return splu(matrix.tocsc(), permc_spec="NATURAL", diag_pivot_thresh=1e-3, options=options)
    except RuntimeError:
        raise SolveFailure(*SINGULAR_STEP) from None


def aij(matrix: sp.csr_matrix) -> PETSc.Mat:
    """A scipy matrix as a PETSc matrix of this rank alone."""
    matrix.sort_indices()
    csr = (index_array(matrix.indptr), index_array(matrix.indices), matrix.data)
    return PETSc.Mat().createAIJ(matrix.shape, csr=csr, comm=PETSc.COMM_SELF)
