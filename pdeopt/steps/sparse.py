"""Sparse matrices that act on batches of rows: one sparsity for all steps, constant or per-step values.

`StepMatrix` is a pattern with values, one set for all steps or one a step. `StepPattern` holds the sparsities of a
constraint's step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property, lru_cache
from typing import Any, cast

import numpy as np
import scipy.sparse as sp
import torch
from petsc4py import PETSc
from torch import Tensor

from pdeopt.core.arrays import Array, index_array
from pdeopt.core.autodiff import is_plain, is_recorded, plainly
from pdeopt.core.errors import InputError
from pdeopt.steps.forms import real_matrix, require_form, require_spread_form
from pdeopt.steps.matrices.products import DiagonalProduct, PaddedProduct
from pdeopt.steps.sparsity import KEPT_ENTRIES, Sparsity, has_few_diagonals, widened

#: Steps of so many entries, zeros counted, and so many entries of all steps are multiplied as dense matrices.
SMALL_STEP, SMALL_STEPS = 64, 1 << 18


class StepMatrix:
    """A sparse matrix a step on one sparsity, acting on rows: (batch, columns) -> (batch, rows).

    A value: the matrices of a constraint's step (mass, stiffness, blocks of the Jacobian) are StepMatrices, and user
    code multiplies with them inside residuals, where torch.func differentiates through the product.

    Args:
        sparsity: the pattern, (rows, columns).
        values: of its entries in their order, (batch, nnz), float64; (1, nnz) where all steps share one matrix.

    Example:
        >>> M = StepMatrix.constant(mass)             # the same scipy matrix in all steps
        >>> r = M(u_new - u_old)                      # (batch, rows)
        >>> w = M.transpose(r)                        # (batch, columns)
    """

    def __init__(self, sparsity: Sparsity, values: Tensor) -> None:
        if values.is_complex() or values.shape[1:] != (sparsity.nnz,):
            got = "complex values" if values.is_complex() else f"values of shape {tuple(values.shape)}"
            raise InputError("StepMatrix", got, f"real values of shape (batch, {sparsity.nnz})")
        self.sparsity, self.values = sparsity, values
        self._matrices: dict[bool, PETSc.Mat] = {}
        self._products: dict[bool, DiagonalProduct] = {}
        self._form: dict[bool, StepMatrix] = {}  # what `form` has found
        self.solver: tuple[Any, Any] | None = None  # what `step_solver` has made of one matrix, and for what

    @classmethod
    @plainly
    def constant(cls, matrix: Any, what: str = "StepMatrix.constant") -> StepMatrix:
        """The same scipy or dense matrix, or tensor, in all steps.

        Args:
            matrix: is copied.
            what: it is, for the error.

        Raises:
            InputError: no matrix of finite real numbers.
        """
        csr = real_matrix(matrix, what)
        constant = cls(Sparsity(csr), torch.from_numpy(csr.data).reshape(1, -1))
        _ = constant._by_row, constant._by_column  # now, not inside a vmap or jvp
        return constant

    @classmethod
    def form(cls, matrix: Any, dim: int | None, what: str = "form", semidefinite: bool = False) -> StepMatrix:
        """An inner product on `dim` unknowns: masses, and the forms of own terms, are checked here.

        Args:
            matrix: a scipy or dense matrix, or a StepMatrix, which is checked once; None for the identity.
            dim: number of unknowns; None where it is not known yet.
            what: the form's name, for the error.
            semidefinite: whether directions without length are legal.

        Raises:
            InputError: not real, finite, dim x dim, symmetric to rounding and positive (semi)definite.
        """
        if matrix is None:
            return cls.constant(sp.eye(dim or 0))
        if isinstance(matrix, StepMatrix) and matrix.sparsity.columns is not None:
            return matrix._spread_form(dim, what, semidefinite)
        known = matrix._form.get(semidefinite) if isinstance(matrix, StepMatrix) else None
        if known is None:
            given = matrix.as_csr(what) if isinstance(matrix, StepMatrix) else matrix
            csr = require_form(given, what, semidefinite)
            is_same = given is not matrix and np.array_equal(csr.data, given.data)
            known = matrix if is_same else cls.constant(csr)
            _ = known._by_row, known._by_column  # now, not inside a vmap or jvp
            for each in (matrix, known):
                if isinstance(each, StepMatrix):
                    each._form[semidefinite] = known
        if dim is not None and known.shape != (dim, dim):
            raise InputError(f"shape of {what}", known.shape, f"({dim}, {dim})")
        return known

    def known_as_form(self, semidefinite: bool) -> StepMatrix:
        """This matrix, which `form` takes from here on: rows of a whole one that was checked, maybe none of them."""
        self._form[semidefinite] = self
        _ = self._by_row, self._by_column  # now, not inside a vmap or jvp
        return self

    def _spread_form(self, dim: int | None, what: str, semidefinite: bool) -> StepMatrix:
        """This matrix, its rows spread over ranks, if it is a form; checked once. Collective."""
        columns, (rows, _) = self.sparsity.columns, self.shape
        assert columns is not None
        if not columns.all(rows == columns.n_owned and dim in (None, rows) and self.is_constant):
            raise InputError(
                f"shape of {what}", f"{self.shape} on rank {columns.mpi.rank}", f"({dim}, {dim}), one for all"
            )
        if semidefinite not in self._form:
            require_spread_form(self, columns, what, semidefinite)
            self.known_as_form(semidefinite)
        return self

    def as_csr(self, what: str = "matrix") -> sp.csr_matrix:
        """The one matrix of all steps for scipy, on the same memory. Raises `InputError` where steps differ."""
        if not self.is_constant:
            raise InputError(what, f"{len(self.values)} matrices", "one matrix for all steps")
        pattern = self.sparsity
        return sp.csr_matrix((self.values[0].numpy(), pattern.indices, pattern.indptr), shape=pattern.shape)

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) of a step; those that this rank owns."""
        return self.sparsity.shape[0], self.sparsity.domain

    @property
    def is_constant(self) -> bool:
        """Whether all steps share one matrix."""
        return len(self.values) == 1

    def __getitem__(self, rows: Any) -> StepMatrix:
        """The matrices of some steps."""
        return self if self.is_constant else StepMatrix(self.sparsity, self.values[rows])

    def __call__(self, x: Tensor) -> Tensor:
        """The product with each row of `x`; works under every torch.func transform."""
        if x.shape[-1] != self.shape[1]:
            raise InputError(
                "product with a StepMatrix", f"rows of shape {tuple(x.shape)}", f"(batch, {self.shape[1]})"
            )
        columns = self.sparsity.columns
        return self._of_rows(x if columns is None else columns.extend(x))

    def _of_rows(self, x: Tensor) -> Tensor:
        """The product with rows that have their ghosts."""
        if x.ndim == 2 and is_plain(x):
            return self._product(x, transpose=False)
        if x.ndim == 2 and self._is_recorded(x):
            return recorded(x, self, False)
        return self._by_row(x)

    def transpose(self, y: Tensor) -> Tensor:
        """The transposed product with each row of `y`, (batch, rows) -> (batch, columns)."""
        columns = self.sparsity.columns
        return self._transposed(y) if columns is None else columns.collect(self._transposed(y))

    def _transposed(self, y: Tensor) -> Tensor:
        if y.ndim == 2 and is_plain(y):
            return self._product(y, transpose=True)
        if y.ndim == 2 and self._is_recorded(y):
            return recorded(y, self, True)
        return self._by_column(y)

    def _is_recorded(self, x: Tensor) -> bool:
        """Whether a product with x is to be differentiated by reverse mode alone, and by x alone."""
        return is_recorded(x) and not self.values.requires_grad

    def _product(self, x: Tensor, transpose: bool) -> Tensor:
        """Without gathering, ten times faster for one matrix on many rows and three times for one a row."""
        (rows, cols), width = self.sparsity.shape, self.sparsity.shape[1 if transpose else 0]
        entries = rows * cols
        if entries <= SMALL_STEP and entries * len(self.values) <= SMALL_STEPS:
            full = self._small if transpose else self._small.mT
            return x @ full[0] if self.is_constant else (x[:, None] @ full)[:, 0]
        if has_few_diagonals(self.sparsity):
            return self._by_diagonals(transpose)(x)
        if not self.is_constant:
            blocks = self._blocks.T if transpose else self._blocks
            return torch.from_numpy(blocks @ x.numpy().ravel()).reshape(len(self.values), width)
        if transpose and self.sparsity.nnz > KEPT_ENTRIES:  # slower, but a transpose is as large as the matrix
            return torch.from_numpy(np.ascontiguousarray((self.as_csr().T @ x.numpy().T).T))
        right = np.ascontiguousarray(x.numpy())
        left = np.empty((len(right), width))
        with dense(right) as X, dense(left) as Y:
            self._petsc(transpose).matMult(X, Y)
        return torch.from_numpy(left)

    def _by_diagonals(self, transpose: bool) -> DiagonalProduct:
        if transpose not in self._products:
            rows, cols = self.sparsity.rows, self.sparsity.cols
            rows, cols = (cols, rows) if transpose else (rows, cols)
            self._products[transpose] = DiagonalProduct(self.sparsity.shape[transpose], rows, cols, self.values)
        return self._products[transpose]

    def _petsc(self, transpose: bool) -> PETSc.Mat:
        if transpose not in self._matrices:
            csr = self.as_csr()
            self._matrices[transpose] = serial_aij(csr.T.tocsr() if transpose else csr)
        return self._matrices[transpose]

    @cached_property
    def _small(self) -> Tensor:
        """Dense, (batch or 1, rows, columns)."""
        pattern = self.sparsity
        full = self.values.new_zeros(len(self.values), pattern.shape[0] * pattern.shape[1])
        full[:, torch.from_numpy(pattern.rows * pattern.shape[1] + pattern.cols)] = self.values
        return full.reshape(len(full), *pattern.shape)

    @cached_property
    def _blocks(self) -> sp.csr_matrix:
        return block_diagonal(self)

    def row_sums(self) -> Tensor:
        """Sums of the entries' absolute values by row, (batch, rows)."""
        rows, sums = torch.from_numpy(self.sparsity.rows), self.values.new_zeros(len(self.values), self.shape[0])
        return sums.index_add_(1, rows, self.values.abs())

    def absolute(self) -> StepMatrix:
        """The matrices of absolute values."""
        return StepMatrix(self.sparsity, self.values.abs())

    @cached_property
    def _by_row(self) -> PaddedProduct:
        return PaddedProduct(self.values, self.sparsity.padded)

    @cached_property
    def _by_column(self) -> PaddedProduct:
        return PaddedProduct(self.values, self.sparsity.padded_transpose)


class Recorded(torch.autograd.Function):
    """Products with a `StepMatrix` for reverse mode, to any order: their derivatives are such products, too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: StepMatrix, transpose: bool) -> Tensor:
        ctx.matrix, ctx.transpose = matrix, transpose
        return matrix._product(x.detach(), transpose)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor, None, None]:
        product = ctx.matrix._of_rows if ctx.transpose else ctx.matrix._transposed
        return product(*cotangents), None, None


def recorded(x: Tensor, matrix: StepMatrix, transpose: bool) -> Tensor:
    """The product, or that with the transpose, with rows that require gradients."""
    return cast(Tensor, Recorded.apply(x, matrix, transpose))  # type: ignore[no-untyped-call]


def combination(terms: list[tuple[float, StepMatrix]]) -> StepMatrix:
    """The sum of number times matrix, on the union of the patterns; constant if all terms are."""
    pattern = terms[0][1].sparsity
    for _, matrix in terms[1:]:
        if matrix.sparsity is not pattern and not pattern.covers(matrix.sparsity):
            pattern = pattern | matrix.sparsity
    batch = max(len(matrix.values) for _, matrix in terms)
    values = torch.zeros(batch, pattern.nnz, dtype=torch.float64)
    for factor, matrix in terms:
        values[:, pattern.places(matrix.sparsity)] += factor * matrix.values
    return StepMatrix(pattern, values)


@contextmanager
def dense(rows: Array) -> Iterator[PETSc.Mat]:
    """Rows, shape (batch, n) and C-contiguous, as the columns of a PETSc matrix on the same memory."""
    matrix = PETSc.Mat().createDense(rows.T.shape, array=rows.T, comm=PETSc.COMM_SELF)
    matrix.assemble()
    try:
        yield matrix
    finally:
        matrix.destroy()


def serial_aij(csr: sp.csr_matrix) -> PETSc.Mat:
    """A scipy matrix, whose indices are sorted, as a PETSc matrix of this rank alone, on the same memory."""
    csr.sort_indices()
    arrays = (index_array(csr.indptr), index_array(csr.indices), csr.data)
    return PETSc.Mat().createAIJWithArrays(csr.shape, arrays, comm=PETSc.COMM_SELF)


def block_diagonal(matrix: StepMatrix, batch: int | None = None, lag: int = 0) -> sp.csr_matrix:
    """The matrix with block (i, i - lag) = that of step i, for `batch` steps."""
    (n, m), batch = matrix.sparsity.shape, len(matrix.values) if batch is None else batch
    values = matrix.values.expand(batch, -1)[lag:].detach().numpy().ravel()
    return sp.csr_matrix((values, *_block_pattern(matrix.sparsity, batch, lag)), shape=(batch * n, batch * m))


@lru_cache(maxsize=16)
def _block_pattern(pattern: Sparsity, batch: int, lag: int) -> tuple[Array, Array]:
    """Columns and row starts of a block diagonal matrix."""
    (n, m), largest = pattern.shape, batch * max(*pattern.shape, pattern.nnz)
    kind = np.int32 if largest <= np.iinfo(np.int32).max else np.int64  # as SciPy chooses
    i = np.arange(batch - lag)[:, None]
    columns, ends = i * m + pattern.cols, i * pattern.nnz + pattern.csr.indptr[1:]
    return columns.ravel().astype(kind), np.r_[np.zeros(lag * n + 1), ends.ravel()].astype(kind)


class StepPattern:
    """The sparsities of a step: A = dF/du_new, B = dF/du_old, C = dF/dz and W, the Hessian of lam.F.

    A constraint that declares its pattern gets sparse Jacobians by colored differentiation, direct step solvers,
    assembled KKT matrices and preconditioners.

    Args:
        A, B: (n, n); a `Sparsity`, or a scipy or dense matrix whose stored (dense: nonzero) entries count.
        C: (n, m).
        W: (2n + m, 2n + m) over the stacked variables [u_old | u_new | z], both triangles.

    Raises:
        InputError: shapes that do not belong together.

    Example:
        >>> pattern = StepPattern(Sparsity.banded(9), np.eye(9), np.eye(9), Sparsity.empty(27, 27))  # a linear step
    """

    def __init__(self, A: Any, B: Any, C: Any, W: Any) -> None:
        self.A, self.B, self.C, self.W = (s if isinstance(s, Sparsity) else Sparsity(s) for s in (A, B, C, W))
        n, m = self.A.shape[0], self.C.shape[1]
        all_n = n if self.A.columns is None else self.A.columns.n_all  # with ghosts
        shapes = [s.shape for s in (self.A, widened(self.B, self.A.columns), self.C, self.W)]
        legal = [(n, all_n), (n, all_n), (n, m), (2 * all_n + m, 2 * all_n + m)]
        if shapes != legal:
            raise InputError("StepPattern shapes of A, B, C, W", shapes, str(legal))

    @cached_property
    def jacobian(self) -> Sparsity:
        """The stacked pattern [B A C]."""
        return Sparsity(sp.hstack([widened(self.B, self.A.columns).csr, self.A.csr, self.C.csr]))

    def split(self, values: Tensor) -> dict[str, StepMatrix]:
        """The blocks A, B and C from values on the stacked pattern, (batch, jacobian.nnz)."""
        return {k: StepMatrix(getattr(self, k), values.index_select(1, part)) for k, part in self._entries.items()}

    @cached_property
    def _entries(self) -> dict[str, Tensor]:
        """Those of each block in the stacked pattern."""
        cols, n = self.jacobian.cols, self.A.shape[1]
        masks = {"B": cols < n, "A": (cols >= n) & (cols < 2 * n), "C": cols >= 2 * n}
        return {name: torch.from_numpy(np.flatnonzero(mask)) for name, mask in masks.items()}
