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
    """LU factors of the matrices A_i of all steps, diag(A_1, ..., A_batch), in one factorisation.

    A constant A is factored once and applied to all rows at once.

    Args:
        A: the matrices.

    Raises:
        SolveFailure: a step is singular or not finite.
    """

    def __init__(self, A: StepMatrix) -> None:
        n, batch = A.shape[0], len(A.values)
        self._order = (np.arange(batch)[:, None] * n + A.sparsity.bandwidth_order).ravel()
        self._blocks = block_diagonal(A)[self._order][:, self._order]
        self._lu = superlu(self._blocks)
        self._without_pivoting: dict[bool, PETSc.Mat] = {}

    def solve(self, rows: Tensor, transpose: bool = False) -> Tensor:
        """The inverse (or its transpose) applied to `rows`, shape (batch, n); any batch for a constant A."""
        right = rows.detach().numpy().reshape(-1, self._order.size)[:, self._order]
        if len(right) == 1:
            left = self._lu.solve(right[0], "T" if transpose else "N")[None]
        else:
            left = self._solve_many(right, transpose)
        solution = np.empty_like(right)
        solution[:, self._order] = left
        return torch.from_numpy(solution.reshape(rows.shape))

    def _solve_many(self, right: Array, transpose: bool) -> Array:
        """By PETSc, eighty times faster on many right-hand sides; by SuperLU where pivots must be exchanged."""
        factor = self._without_pivoting.get(transpose) or self._factor_without_pivoting(transpose)
        right, left = np.ascontiguousarray(right), np.empty(right.shape)  # PETSc shares their memory
        b, x = (PETSc.Mat().createDense(a.T.shape, array=a.T, comm=PETSc.COMM_SELF) for a in (right, left))
        for matrix in (b, x):
            matrix.assemble()
        factor.matSolve(b, x)
        for matrix in (b, x):
            matrix.destroy()
        if np.isfinite(left).all():
            return left
        return np.asarray(self._lu.solve(right.T.copy(), "T" if transpose else "N").T)

    def _factor_without_pivoting(self, transpose: bool) -> PETSc.Mat:
        blocks = self._blocks.T if transpose else self._blocks
        self._without_pivoting[transpose] = natural_lu(sp.csr_matrix(blocks))
        return self._without_pivoting[transpose]


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
        self._factor = natural_lu(triangle)
        self._right, self._left = self._factor.createVecs()
        self._w, self._x, self._rows, self._cols = w, x, rows, cols

    def forward(self, rows: Tensor) -> Tensor:
        """x for the right-hand sides r, both (batch, n)."""
        return self._run(rows, self._factor.solve, self._rows, self._w, self._x, self._cols)

    def backward(self, rows: Tensor) -> Tensor:
        """x with A_i'x_i + B_{i+1}'x_{i+1} = r_i, x_{batch+1} = 0."""
        return self._run(rows, self._factor.solveTranspose, self._cols, self._x, self._w, self._rows)

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


def natural_lu(matrix: sp.csr_matrix) -> PETSc.Mat:
    """PETSc's LU, without pivoting and in the given order, of a matrix of this rank alone.

    (Through a PC: PETSc 3.18's factorisation in place spoils some matrices.)
    """
    full = sp.csr_matrix(matrix + sp.csr_matrix(matrix.shape))  # a copy, with sorted indices
    full.setdiag(full.diagonal())  # PETSc wants every diagonal entry stored, also a zero
    full.sort_indices()
    csr = (index_array(full.indptr), index_array(full.indices), full.data)
    pc = PETSc.PC().create(PETSc.COMM_SELF)
    pc.setOperators(PETSc.Mat().createAIJ(full.shape, csr=csr, comm=PETSc.COMM_SELF))
    pc.setType("lu")
    pc.setFactorSolverType("petsc")
    pc.setFactorOrdering("natural")
    pc.setUp()
    return pc.getFactorMatrix()
