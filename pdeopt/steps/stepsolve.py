"""Solving with the matrices of the steps: all at once they do not interact."""

from __future__ import annotations

import math
from functools import cached_property, lru_cache
from typing import Protocol

import numpy as np
import scipy.sparse as sp
import torch
from petsc4py import PETSc
from scipy.sparse.csgraph import breadth_first_order
from scipy.sparse.linalg import SuperLU, splu
from torch import Tensor

from pdeopt.core.arrays import Array
from pdeopt.core.errors import StepFailure, together
from pdeopt.core.settings import read
from pdeopt.space.layouts.matrix import spread_aij
from pdeopt.steps.bands import SINGULAR_STEP, BandFactor, band_of, require_finite
from pdeopt.steps.matrices.krylov import MatrixSolver, StepSettings, factors
from pdeopt.steps.matrices.products import evenly
from pdeopt.steps.sparse import StepMatrix, block_diagonal, dense, serial_aij
from pdeopt.steps.sparsity import Sparsity

#: Unknowns up to which the inverse of one matrix for all steps is the fastest factor, where it is a narrow band or not,
#: and the largest condition number at which it is as exact.
DENSE_UNKNOWNS, DENSE_CONDITION = {True: 64, False: 128}, 1e4

#: Factors are taken up to so many unknowns, and where a front's square is at most so many times the entries. A cube of
#: 24^3 unknowns (.42 times) takes .76 s for factors, 6 ms a solve with them and 23 ms one with multigrid; 32^3 (.54)
#: takes 5.2 s, 21 and 69 ms. Squares of any size have .05.
FEWEST_KRYLOV, MOST_FILL = 20_000, 1 / 3

#: The same for steps that several ranks share: MUMPS solves for one step at a time in many small messages, for which
#: its ranks poll. A cube of 24^3 unknowns and 32 steps on two ranks takes 103 CPU s with factors, 26 with multigrid.
FEWEST_SHARED = 1_000


class StepSolver(Protocol):
    """Solves with the matrices A_i of all steps."""

    def solve(self, rows: Tensor, transpose: bool = False) -> Tensor:
        """The inverse (or its transpose) applied to `rows`, shape (batch, n); any batch for a constant A."""


def step_solver(A: StepMatrix) -> StepSolver:
    """Solves with the matrices of all steps, as `-step_pc_type` says; factors are those of the fastest kind.

    One matrix for all steps keeps its solver, so that linear equations, which have the same at all their points, are
    factored once.

    Args:
        A: the matrices, (n, n), one a step or one for all.

    Raises:
        StepFailure: a step is singular or not finite, where it is factored.
    """
    if not A.is_constant:
        return _new_solver(A)
    words = A.values._version, *_words(A)
    if A.solver is None or A.solver[0] != words:
        A.solver = words, _new_solver(A)
    found: StepSolver = A.solver[1]
    return found


def _words(A: StepMatrix) -> tuple[object, ...]:
    """The options that count; all of them take as long to read as a small matrix to factor."""
    chosen = read(StepSettings).pc_type
    is_factored = chosen == "lu" or (chosen == "auto" and A.shape[0] <= FEWEST_SHARED)
    return (chosen,) if is_factored else (chosen, PETSc.Options("step_").getAll())


def _new_solver(A: StepMatrix) -> StepSolver:
    if A.sparsity.columns is not None or is_krylov(A):
        return StepKrylov(A)
    require_finite(A)
    is_narrow = band_of(A.sparsity).is_narrow
    if A.is_constant and A.shape[0] <= DENSE_UNKNOWNS[is_narrow]:
        inverse = StepInverse(A)
        if inverse.condition <= DENSE_CONDITION:
            return inverse
    return BandFactor(A) if is_narrow else StepFactor(A)


def is_krylov(A: StepMatrix) -> bool:
    """Whether `-step_pc_type` means a Krylov method for these matrices: auto does where factors would fill.

    Multigrid wants a diagonal of one sign; the matrices of steps with constraints, as the incompressibility of a flow,
    are factored.
    """
    chosen = read(StepSettings).pc_type
    columns = A.sparsity.columns
    if columns is None and A.sparsity.nnz <= A.shape[0]:
        return False  # a diagonal
    if columns is not None:  # of all ranks of a step, the same on each
        few = chosen != "auto" or columns.size <= FEWEST_SHARED
    else:
        few = chosen != "auto" or A.shape[0] <= FEWEST_KRYLOV or front(A.sparsity) ** 2 <= MOST_FILL * A.sparsity.nnz
    if few:
        return chosen not in ("auto", "lu")
    on_diagonal = A.values[:, A.sparsity.on_diagonal]
    is_full = on_diagonal.shape[1] == A.shape[0]
    signs = is_full and bool((on_diagonal > 0).all()), is_full and bool((on_diagonal < 0).all())
    return any(signs) if columns is None else any(columns.all(sign) for sign in signs)


@lru_cache(maxsize=16)
def front(pattern: Sparsity) -> float:
    """The mean number of unknowns at one distance from an outermost one, as many as separate the others.

    About n^(1/2) in the plane and n^(2/3) in space, whose square an LU in nested dissection fills.
    """
    graph = pattern.csr
    order, _ = breadth_first_order(graph, 0, directed=False)
    order, before = breadth_first_order(graph, order[-1], directed=False)
    levels, last = 1, order[-1]
    while before[last] >= 0:
        levels, last = levels + 1, before[last]
    return len(order) / levels


class StepInverse:
    """The inverse of a small matrix that all steps share.

    Args:
        A: the matrix.

    Attributes:
        condition: |A| |A^-1| in the 1-norm; infinite where A is singular.
    """

    def __init__(self, A: StepMatrix) -> None:
        dense = torch.from_numpy(A.as_csr().toarray())
        self._inverse, info = torch.linalg.inv_ex(dense)
        norms = [float(matrix.abs().sum(0).amax()) if matrix.numel() else 0.0 for matrix in (dense, self._inverse)]
        self.condition = norms[0] * norms[1] if not info and math.isfinite(norms[1]) else math.inf

    def solve(self, rows: Tensor, transpose: bool = False) -> Tensor:
        return torch.matmul(rows.detach(), self._inverse if transpose else self._inverse.T)


class StepFactor:
    """LU factors of the matrices A_i of all steps, diag(A_1, ..., A_batch), in one factorization.

    A constant A is factored once and applied to all rows at once. PETSc's LU in nested dissection, which does not
    pivot, where that is accurate, else SuperLU's.

    Args:
        A: the matrices.

    Raises:
        StepFailure: a step is singular or not finite.
    """

    def __init__(self, A: StepMatrix) -> None:
        require_finite(A)
        self._n, self._blocks = A.shape[0], block_diagonal(A)
        self._factors: dict[bool, PETSc.Mat | None] = {}
        if self._factor(transpose=False) is None:
            _ = self._pivoted

    def solve(self, rows: Tensor, transpose: bool = False) -> Tensor:
        """The inverse (or its transpose) applied to `rows`, shape (batch, n); any batch for a constant A."""
        right = np.ascontiguousarray(rows.detach().numpy()).reshape(-1, self._blocks.shape[0])
        factor = self._factor(transpose)
        if factor is None:
            left = np.asarray(self._pivoted.solve(right.T.copy(), "T" if transpose else "N").T)
        else:
            left = _apply(factor, right)
        return torch.from_numpy(left.reshape(rows.shape))

    def _factor(self, transpose: bool) -> PETSc.Mat | None:
        """PETSc's factors; None where a solve with them misses a right-hand side, for want of pivoting."""
        if transpose not in self._factors:
            blocks = sp.csr_matrix(self._blocks.T if transpose else self._blocks)
            factor = natural_lu(blocks, "nd")
            probe = np.cos(np.arange(blocks.shape[0], dtype=float))[None]
            missed = np.abs(blocks @ _apply(factor, probe)[0] - probe[0]).max()
            self._factors[transpose] = factor if missed <= 1e-10 else None
        return self._factors[transpose]

    @cached_property
    def _pivoted(self) -> SuperLU:
        return superlu(self._blocks, self._n)


class StepKrylov:
    """Solves with the matrices A_i by a Krylov method and a preconditioner in space, prefix `step_`.

    A matrix that all steps share is set up once. Matrices whose rows are spread over ranks are solved here too where
    they are factored, by MUMPS; auto factors them where multigrid does not converge and factors are not too large.

    Args:
        A: the matrices.
    """

    def __init__(self, A: StepMatrix) -> None:
        columns = A.sparsity.columns
        if columns is None:
            require_finite(A)
        else:
            together(columns.mpi, lambda: require_finite(A))
        numbers = [None] if A.is_constant else list(range(len(A.values)))
        at, values = A.sparsity, A.values.detach().numpy()
        rows = (sp.csr_matrix((entries, at.indices, at.indptr), shape=at.shape) for entries in values)
        matrices = [serial_aij(each) if columns is None else spread_aij(each, columns) for each in rows]
        by_krylov, size = is_krylov(A), A.shape[0] if columns is None else columns.size
        is_open = read(StepSettings).pc_type == "auto"
        direct = factors() if is_open else "lu"
        self._solvers = [MatrixSolver(*each, None if by_krylov else direct) for each in zip(matrices, numbers)]
        self._others: list[MatrixSolver] = []  # factors, where multigrid was not asked for and may not converge
        if by_krylov and columns is not None and size <= FEWEST_KRYLOV and is_open and direct == "lu":
            self._others = [MatrixSolver(*each, direct) for each in zip(matrices, numbers)]

    def solve(self, rows: Tensor, transpose: bool = False) -> Tensor:
        """The inverse (or its transpose) applied to `rows`, shape (batch, n), to `-step_ksp_rtol`.

        Raises:
            StepFailure: not converged.
        """
        right = np.ascontiguousarray(rows.detach().numpy()).reshape(rows.shape[:-1].numel(), rows.shape[-1])
        each = [right] if len(self._solvers) == 1 else right[:, None]
        try:
            left = [solver.solve(some, transpose) for solver, some in zip(self._solvers, each)]
        except StepFailure:  # of all ranks of the step
            if not self._others:
                raise
            self._solvers, self._others = self._others, []
            left = [solver.solve(some, transpose) for solver, some in zip(self._solvers, each)]
        return torch.from_numpy(np.concatenate(left).reshape(rows.shape))


class StagedSubstitution:
    """Substitution over windows of steps, A_i x_i + B_i x_{i-1} = r_i with x = 0 before each, by any solver of a step.

    The first steps of all windows at once, then the second, ...

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
        self._stages = [evenly(starts[lengths > k] + k) for k in range(int(lengths.max()))]
        #: those of its rows after which another one follows
        self._go_on = [evenly(np.flatnonzero(lengths[lengths > k] > k + 1)) for k in range(len(self._stages))]
        unlike = self._stages[:1] if A.is_constant else self._stages
        self._solvers = [step_solver(A[rows]) for rows in unlike]

    def _solve(self, stage: int, rows: Tensor, transpose: bool) -> Tensor:
        try:
            return self._solvers[0 if self._A.is_constant else stage].solve(rows, transpose)
        except StepFailure as failure:  # of a row of the stage
            failure.row = int(np.arange(self._batch)[self._stages[stage]][failure.row or 0])
            raise

    def forward(self, rows: Tensor) -> Tensor:
        """x for the right-hand sides r, both (batch, n)."""
        x = torch.empty_like(rows)
        for k, now in enumerate(self._stages):
            known = rows[now] - self._B[now](x[_before(now)]) if k else rows[now]
            x[now] = self._solve(k, known, transpose=False)
        return x

    def backward(self, rows: Tensor) -> Tensor:
        """x with A_i'x_i + B_{i+1}'x_{i+1} = r_i in each window, x = 0 after it."""
        x, known = torch.empty_like(rows), None
        for k, now in reversed(list(enumerate(self._stages))):
            right = rows[now]
            if known is not None:
                right = right.clone()
                right[self._go_on[k]] -= known
            x[now] = self._solve(k, right, transpose=True)
            known = self._B[now].transpose(x[now]) if k else None
        return x


def _before(rows: slice | Array) -> slice | Array:
    return slice(rows.start - 1, rows.stop - 1, rows.step) if isinstance(rows, slice) else rows - 1


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


def superlu(matrix: sp.csr_matrix, n: int) -> SuperLU:
    """LU of a block diagonal matrix in the given order; rows are exchanged only for pivots a thousand times too small.

    Raises `StepFailure` where one of the blocks of size n is singular.
    """
    try:
        return _superlu(matrix)
    except RuntimeError:
        pass
    batch = matrix.shape[0] // n
    raise StepFailure(
        *SINGULAR_STEP, row=next((i for i in range(batch) if _is_singular(matrix, n, i)), None) if batch > 1 else None
    )


def _superlu(matrix: sp.csr_matrix) -> SuperLU:
    options = {"SymmetricMode": True}
    return splu(matrix.tocsc(), permc_spec="NATURAL", diag_pivot_thresh=1e-3, options=options)


def _is_singular(matrix: sp.csr_matrix, n: int, i: int) -> bool:
    rows = slice(i * n, (i + 1) * n)
    try:
        _superlu(matrix[rows, rows])
    except RuntimeError:
        return True
    return False


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
