"""Solving with the matrices of the steps: all at once where they do not interact, in order where they do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import scipy.sparse as sp
import torch
from petsc4py import PETSc
from scipy.sparse.linalg import SuperLU, splu
from torch import Tensor

from pdeopt.core.arrays import Array
from pdeopt.core.errors import SolveFailure
from pdeopt.core.options import set_default
from pdeopt.core.settings import Settings, read, setting
from pdeopt.steps.sparse import StepMatrix, block_diagonal, dense, serial_aij

Solve = Callable[[PETSc.Vec, PETSc.Vec], None]

#: What happened and what to try, where a step cannot be solved.
NOT_FINITE = ("a step matrix dF/du_new is not finite", "check the residual for NaN, log and division")
SINGULAR_STEP = (
    "a step matrix dF/du_new is singular",
    "check that each step has a unique solution; a smaller time step often mends it",
)


#: Nested dissection fills less than a band where the band is wider than this.
NARROW_BAND = 4


@dataclass(frozen=True)
class StepSettings(Settings, prefix="step_"):
    """Linear systems of single steps.

    `-step_ksp_...` and `-step_pc_...` reach PETSc where they are solved by GMRES.
    """

    pc_type: str = setting(
        "lu",
        "solver inside a step: factors, or GMRES with multigrid in space for large meshes",
        choices=("lu", "hypre", "gamg"),
    )


def step_solver(A: StepMatrix) -> StepFactor | StepKrylov:
    """Solves with the matrices of all steps, as `-step_pc_type` says.

    Args:
        A: the matrices, (n, n), one a step or one for all.

    Raises:
        SolveFailure: a step is singular or not finite, where it is factored.
    """
    return StepFactor(A) if read(StepSettings).pc_type == "lu" else StepKrylov(A)


class StepFactor:
    """LU factors of the matrices A_i of all steps, diag(A_1, ..., A_batch), in one factorization.

    A constant A is factored once and applied to all rows at once. PETSc's LU, which does not pivot, where that
    is accurate, else SuperLU's.

    Args:
        A: the matrices.

    Raises:
        SolveFailure: a step is singular or not finite.
    """

    def __init__(self, A: StepMatrix) -> None:
        n, batch = A.shape[0], len(A.values)
        self._blocks = block_diagonal(A)
        #: None where PETSc orders: by nested dissection, which fills less than a wide band
        self._order: Array | None = None
        if A.sparsity.bandwidth <= NARROW_BAND:
            self._order = (np.arange(batch)[:, None] * n + A.sparsity.bandwidth_order).ravel()
            self._blocks = self._blocks[self._order][:, self._order]
        self._factors: dict[bool, PETSc.Mat | None] = {}
        if self._factor(transpose=False) is None:
            _ = self._pivoted

    def solve(self, rows: Tensor, transpose: bool = False) -> Tensor:
        """The inverse (or its transpose) applied to `rows`, shape (batch, n); any batch for a constant A."""
        right = rows.detach().numpy().reshape(-1, self._blocks.shape[0])
        right = np.ascontiguousarray(right) if self._order is None else np.take(right, self._order, axis=1)
        factor = self._factor(transpose)
        if factor is None:
            left = np.asarray(self._pivoted.solve(right.T.copy(), "T" if transpose else "N").T)
        else:
            left = _apply(factor, right)
        solution = left
        if self._order is not None:
            solution = np.empty_like(left)
            solution[:, self._order] = left
        return torch.from_numpy(solution.reshape(rows.shape))

    def _factor(self, transpose: bool) -> PETSc.Mat | None:
        """PETSc's factors; None where a solve with them misses a right-hand side, for want of pivoting."""
        if transpose not in self._factors:
            blocks = sp.csr_matrix(self._blocks.T if transpose else self._blocks)
            if not np.isfinite(blocks.data).all():
                raise SolveFailure(*NOT_FINITE)
            factor = natural_lu(blocks, "nd" if self._order is None else "natural")
            probe = np.cos(np.arange(blocks.shape[0], dtype=float))[None]
            missed = np.abs(blocks @ _apply(factor, probe)[0] - probe[0]).max()
            self._factors[transpose] = factor if missed <= 1e-10 else None
        return self._factors[transpose]

    @cached_property
    def _pivoted(self) -> SuperLU:
        return superlu(self._blocks)


class StepKrylov:
    """Solves with the matrices A_i by GMRES and a multigrid preconditioner in space, prefix `step_`.

    Args:
        A: the matrices.
    """

    def __init__(self, A: StepMatrix) -> None:
        self._A, self._solvers = A, dict[bool, PETSc.KSP]()

    def solve(self, rows: Tensor, transpose: bool = False) -> Tensor:
        """The inverse (or its transpose) applied to `rows`, shape (batch, n), to `-step_ksp_rtol`.

        Raises:
            SolveFailure: not converged.
        """
        solver = self._solver(transpose)
        right = np.ascontiguousarray(rows.detach().numpy()).reshape(-1, solver.getOperators()[0].getSize()[0])
        left = np.empty_like(right)
        for b, x in zip(right, left):
            vectors = [PETSc.Vec().createWithArray(array, comm=PETSc.COMM_SELF) for array in (b, x)]
            solver.solve(*vectors)
            for vector in vectors:
                vector.destroy()
            if solver.getConvergedReason() < 0:
                raise SolveFailure(
                    f"the solver of a step stopped with reason {solver.getConvergedReason()}",
                    "see -step_ksp_monitor; -step_pc_type lu is direct",
                )
        return torch.from_numpy(left.reshape(rows.shape))

    def _solver(self, transpose: bool) -> PETSc.KSP:
        if transpose not in self._solvers:
            set_default("step_ksp_rtol", "1e-10")
            blocks = block_diagonal(self._A)
            solver = PETSc.KSP().create(PETSc.COMM_SELF)
            solver.setOptionsPrefix("step_")
            solver.setOperators(serial_aij(sp.csr_matrix(blocks.T if transpose else blocks)))
            solver.setType("gmres")
            solver.setFromOptions()
            self._solvers[transpose] = solver
        return self._solvers[transpose]


class Substitution:
    """Forward and backward substitution over windows of steps, A_i x_i + B_i x_{i-1} = r_i with x = 0 before each.

    An LU of the coupled matrix would fill B_i U_{i-1}^-1. Instead, with A_i = L_i U_i and w_i = U_i x_i, the
    system in (w_1, x_1, w_2, x_2, ...), each x_i in reverse order, is lower triangular without any fill, and
    PETSc's triangular solve runs through all steps at once. The factors come from SuperLU, which shows them.

    Args:
        A, B: the matrices.
        starts: rows at which a window starts, the first of them 0; None for one window.
    """

    def __init__(self, A: StepMatrix, B: StepMatrix, starts: Array | None = None) -> None:
        n, batch = A.shape[0], len(A.values)
        k = np.arange(n * batch)
        step, place = np.divmod(k, n)
        w, x = step * 2 * n + place, step * 2 * n + 2 * n - 1 - place
        order = (np.arange(batch)[:, None] * n + A.sparsity.bandwidth_order).ravel()
        lu = superlu(block_diagonal(A)[order][:, order])
        rows, cols = order[np.argsort(lu.perm_r)], order[lu.perm_c]
        inverse_rows, inverse_cols = np.argsort(rows), np.argsort(cols)
        L, U, below = lu.L.tocoo(), lu.U.tocoo(), block_diagonal(_cut(B, batch, starts), batch, lag=1).tocoo()
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


class StagedSubstitution:
    """`Substitution` step by step, for all windows at once: the first steps of all windows, the second, ...

    A constant A is factored once. Takes any solver of a step, see `StepSettings`.

    Args:
        A, B: the matrices.
        batch: steps.
        starts: rows at which a window starts, the first of them 0; None for one window.
    """

    def __init__(self, A: StepMatrix, B: StepMatrix, batch: int, starts: Array | None = None) -> None:
        self._A, self._B, self._batch = A, B, batch
        starts = np.zeros(1, dtype=np.int64) if starts is None else starts
        lengths = np.diff(np.r_[starts, batch])
        #: the rows of each stage
        self._stages = [_regular(starts[lengths > k] + k) for k in range(int(lengths.max()))]
        unlike = self._stages[:1] if A.is_constant else self._stages
        self._solvers = [step_solver(A[rows]) for rows in unlike]

    def _solver(self, stage: int) -> StepFactor | StepKrylov:
        return self._solvers[0 if self._A.is_constant else stage]

    def forward(self, rows: Tensor) -> Tensor:
        """x for the right-hand sides r, both (batch, n)."""
        known, x = rows.clone(), torch.empty_like(rows)
        for k, now in enumerate(self._stages):
            if k:
                known[now] -= self._B[now](x[_before(now)])
            x[now] = self._solver(k).solve(known[now])
        return x

    def backward(self, rows: Tensor) -> Tensor:
        """x with A_i'x_i + B_{i+1}'x_{i+1} = r_i in each window, x = 0 after it."""
        known, x = rows.clone(), torch.empty_like(rows)
        for k, now in reversed(list(enumerate(self._stages))):
            x[now] = self._solver(k).solve(known[now], transpose=True)
            if k:
                known[_before(now)] -= self._B[now].transpose(x[now])
        return x


def _regular(rows: Array) -> slice | Array:
    """Equally spaced rows as a slice, which makes a view and no copy."""
    space = rows[1] - rows[0] if len(rows) > 1 else 1
    return slice(int(rows[0]), int(rows[-1]) + 1, int(space)) if (np.diff(rows) == space).all() else rows


def _before(rows: slice | Array) -> slice | Array:
    return slice(rows.start - 1, rows.stop - 1, rows.step) if isinstance(rows, slice) else rows - 1


def substitution(
    A: StepMatrix, B: StepMatrix, batch: int, starts: Array | None = None
) -> Substitution | StagedSubstitution:
    """The fastest way: one triangular solve where the steps differ, else one factor for all of them.

    Args:
        A, B: the matrices, one a step or one for all.
        batch: steps.
        starts: rows at which a window starts, the first of them 0; None for one window.

    Raises:
        SolveFailure: a step is singular or not finite.
    """
    direct = read(StepSettings).pc_type == "lu"
    if direct and not (A.is_constant and batch > 1):
        return Substitution(A, B, starts)
    return StagedSubstitution(A, B, batch, starts)


def _cut(B: StepMatrix, batch: int, starts: Array | None) -> StepMatrix:
    """B without the couplings to the step before a window."""
    if starts is None or len(starts) == 1:
        return B
    values = B.values.expand(batch, -1).clone()
    values[starts] = 0.0
    return StepMatrix(B.sparsity, values)


def _apply(factor: PETSc.Mat, right: Array) -> Array:
    """PETSc's factors applied to rows, (batch, n) and C-contiguous."""
    left = np.empty_like(right)
    if len(right) == 1:
        vectors = [PETSc.Vec().createWithArray(array[0], comm=PETSc.COMM_SELF) for array in (right, left)]
        factor.solve(*vectors)
        for vector in vectors:
            vector.destroy()
    else:
        with dense(right) as b, dense(left) as x:
            factor.matSolve(b, x)
    return left


def superlu(matrix: sp.csr_matrix) -> SuperLU:
    """LU in the given order; rows are exchanged only for pivots a thousand times too small."""
    if not np.isfinite(matrix.data).all():
        raise SolveFailure(*NOT_FINITE)
    try:
        options = {"SymmetricMode": True}
        return splu(matrix.tocsc(), permc_spec="NATURAL", diag_pivot_thresh=1e-3, options=options)
    except RuntimeError:
        raise SolveFailure(*SINGULAR_STEP) from None


def natural_lu(matrix: sp.csr_matrix, ordering: str = "natural") -> PETSc.Mat:
    """PETSc's LU, without pivoting and in the given order unless told, of a matrix of this rank alone.

    (Through a PC: PETSc 3.18's factorization in place spoils some matrices.)
    """
    full = sp.csr_matrix(matrix + sp.csr_matrix(matrix.shape))  # a copy, with sorted indices
    full.setdiag(full.diagonal())  # PETSc wants every diagonal entry stored, also a zero
    pc = PETSc.PC().create(PETSc.COMM_SELF)
    pc.setOperators(serial_aij(full))
    pc.setType("lu")
    pc.setFactorSolverType("petsc")
    pc.setFactorOrdering(ordering)
    pc.setUp()
    return pc.getFactorMatrix()
