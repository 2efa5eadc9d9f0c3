"""Sparse matrices that act on batches of rows: one sparsity for all steps, constant or per-step values.

`Sparsity` is a pattern with the coloring that lets automatic differentiation fill it (Curtis, Powell,
Reid 1974: columns that share no row are differentiated at once). `StepMatrix` is a pattern with values,
one set for all steps or one a step. `StepPattern` holds the sparsities of a constraint's step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property, lru_cache
from hashlib import sha256
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from petsc4py import PETSc
from scipy.sparse import get_index_dtype
from torch import Tensor

from pdeopt.core.arrays import Array, index_array
from pdeopt.core.autodiff import columns, is_plain, plainly
from pdeopt.core.errors import InputError
from pdeopt.steps.forms import real_matrix, require_form


class Sparsity:
    """The pattern of a sparse matrix, entries sorted by row, then column.

    Args:
        pattern: a scipy sparse or dense matrix; its stored (dense: nonzero) entries count.
    """

    def __init__(self, pattern: Any) -> None:
        csr = sp.csr_matrix(pattern)  # copied: sorting a user's indices in place would leave the values behind
        csr = sp.csr_matrix((np.ones(csr.nnz), csr.indices, csr.indptr), shape=csr.shape, copy=True)
        csr.sum_duplicates()
        self.csr = csr
        self.shape: tuple[int, int] = csr.shape
        self.nnz: int = csr.nnz
        self.rows = np.repeat(np.arange(csr.shape[0]), np.diff(csr.indptr))
        self.cols = csr.indices.astype(np.int64)

    @classmethod
    def banded(cls, n: int, width: int = 1) -> Sparsity:
        """The n x n pattern with `width` diagonals on either side of the main one."""
        offsets = range(-min(width, n - 1), min(width, n - 1) + 1)
        return cls(sp.diags([np.ones(n - abs(k)) for k in offsets], list(offsets), shape=(n, n)))

    @classmethod
    def empty(cls, rows: int, cols: int) -> Sparsity:
        """The pattern without entries."""
        return cls(sp.csr_matrix((rows, cols)))

    def __or__(self, other: Sparsity) -> Sparsity:
        return Sparsity(self.csr + other.csr)

    def covers(self, other: Sparsity) -> bool:
        """Whether every entry of `other` is one of this pattern."""
        return bool(np.isin(other._keys, self._keys, assume_unique=True).all())

    def places(self, other: Sparsity) -> Tensor:
        """Where the entries of `other`, which this pattern covers, stand among its own. Shape (other.nnz,)."""
        return torch.from_numpy(np.searchsorted(self._keys, other._keys))

    @cached_property
    def _keys(self) -> Array:
        keys: Array = self.rows * self.shape[1] + self.cols
        return keys

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sparsity) and self._digest == other._digest

    def __hash__(self) -> int:
        return hash(self._digest)

    @cached_property
    def _digest(self) -> bytes:
        """Of the entries: what is kept for a pattern serves all that are equal."""
        return sha256(repr(self.shape).encode() + self._keys.tobytes()).digest()

    @cached_property
    def colors(self) -> Array:
        """A color for each column; columns of one color share no row. Greedy. Shape (columns,)."""
        columns = self.csr.tocsc()
        neighbors = sp.csr_matrix(self.csr.T @ self.csr)
        colors = np.full(self.shape[1], -1)
        for j in np.flatnonzero(np.diff(columns.indptr)):
            taken = set(colors[neighbors.indices[neighbors.indptr[j] : neighbors.indptr[j + 1]]])
            colors[j] = next(c for c in range(len(taken) + 1) if c not in taken)
        return colors

    @cached_property
    def seeds(self) -> Tensor:
        """The sum of the unit vectors of each color, shape (colors, columns)."""
        number = int(self.colors.max(initial=-1)) + 1
        return torch.from_numpy((self.colors == np.arange(number)[:, None]).astype(float))

    def fill(self, product: Callable[[Tensor], Tensor]) -> tuple[Tensor, bool]:
        """Values of the entries, (batch, nnz), and whether they are all: whether they give a product with no zeros.

        `product` maps a direction, (columns,), to the batch of products, (batch, rows); it is vectorized over the
        seeds and that direction.
        """
        color, row, col = (torch.from_numpy(x) for x in (self.colors[self.cols], self.rows, self.cols))
        probe = torch.linspace(1.0, 2.0, self.shape[1], dtype=torch.float64)
        *_, expected = products = columns(product, torch.cat([self.seeds, probe[None]]))  # (colors + 1, batch, rows)
        values = products[color, :, row].T.contiguous()
        missed = expected.index_add(1, row, values * probe[col], alpha=-1).abs().amax()
        return values, not bool(missed > 1e-8 * (1 + expected.abs().amax()))

    @cached_property
    def padded(self) -> tuple[Tensor, Tensor]:
        """Row-padded form: entry and column numbers, each (width, rows); padding has entry nnz, column 0."""
        return _pad(self.rows, self.cols, np.arange(self.nnz), self.shape[0])

    @cached_property
    def padded_transpose(self) -> tuple[Tensor, Tensor]:
        """`padded` of the transpose: entry and row numbers, each (width, columns)."""
        order = np.lexsort((self.rows, self.cols))
        return _pad(self.cols[order], self.rows[order], order, self.shape[1])


def _pad(rows: Array, cols: Array, entries: Array, num_rows: int) -> tuple[Tensor, Tensor]:
    counts = np.bincount(rows, minlength=num_rows)
    position = np.arange(rows.size) - np.repeat(np.cumsum(counts) - counts, counts)
    width = int(counts.max(initial=0))
    entry, col = np.full((width, num_rows), rows.size), np.zeros((width, num_rows), dtype=np.int64)
    entry[position, rows], col[position, rows] = entries, cols
    return torch.from_numpy(entry), torch.from_numpy(col)


class PaddedProduct:
    """Products of sparse matrices with rows as a sum of a few gathers: as many as the widest row has entries.

    All its operations are torch's, so it works under every transform of torch.func.

    Args:
        values: of the entries, (batch, nnz).
        entries, columns: the row-padded form of the pattern, each (width, rows).
    """

    def __init__(self, values: Tensor, entries: Tensor, columns: Tensor) -> None:
        extended = torch.cat([values, torch.zeros_like(values[:, :1])], dim=1)  # the value of the padding
        self.values, self.columns = [extended[:, e].contiguous() for e in entries], columns

    def __call__(self, x: Tensor) -> Tensor:
        """The product with each row of x, (..., columns) -> (..., rows)."""
        terms = (v * x[..., c] for v, c in zip(self.values, self.columns))
        total = next(terms, None)
        if total is None:
            return torch.zeros((*x.shape[:-1], self.columns.shape[-1]), dtype=x.dtype)
        for term in terms:
            total = total + term
        return total


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
        self._form: dict[bool, StepMatrix] = {}  # what `form` has found

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
        known = matrix._form.get(semidefinite) if isinstance(matrix, StepMatrix) else None
        if known is None:
            given = matrix.as_csr(what) if isinstance(matrix, StepMatrix) else matrix
            csr = require_form(given, what, semidefinite)
            is_same = given is not matrix and np.array_equal(csr.data, given.data)
            known = matrix if is_same else cls.constant(csr)
            for each in (matrix, known):
                if isinstance(each, StepMatrix):
                    each._form[semidefinite] = known
        if dim is not None and known.shape != (dim, dim):
            raise InputError(f"shape of {what}", known.shape, f"({dim}, {dim})")
        return known

    def as_csr(self, what: str = "matrix") -> sp.csr_matrix:
        """The one matrix of all steps for scipy, on the same memory. Raises `InputError` where steps differ."""
        if not self.is_constant:
            raise InputError(what, f"{len(self.values)} matrices", "one matrix for all steps")
        pattern = self.sparsity.csr
        return sp.csr_matrix((self.values[0].numpy(), pattern.indices, pattern.indptr), shape=pattern.shape)

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) of a step."""
        return self.sparsity.shape

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
        if x.ndim == 2 and is_plain(x):
            return self._product(x, transpose=False)
        return self._by_row(x)

    def transpose(self, y: Tensor) -> Tensor:
        """The transposed product with each row of `y`, (batch, rows) -> (batch, columns)."""
        if y.ndim == 2 and is_plain(y):
            return self._product(y, transpose=True)
        return self._by_column(y)

    def _product(self, x: Tensor, transpose: bool) -> Tensor:
        """Without gathering, ten times faster for one matrix on many rows and three times for one a row."""
        width = self.shape[1 if transpose else 0]
        if not self.is_constant:
            blocks = self._blocks.T if transpose else self._blocks
            return torch.from_numpy(blocks @ x.numpy().ravel()).reshape(len(self.values), width)
        right = np.ascontiguousarray(x.numpy())
        left = np.empty((len(right), width))
        with dense(right) as X, dense(left) as Y:
            self._petsc(transpose).matMult(X, Y)
        return torch.from_numpy(left)

    def _petsc(self, transpose: bool) -> PETSc.Mat:
        if transpose not in self._matrices:
            csr = self.as_csr()
            self._matrices[transpose] = serial_aij(csr.T.tocsr() if transpose else csr)
        return self._matrices[transpose]

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
        return PaddedProduct(self.values, *self.sparsity.padded)

    @cached_property
    def _by_column(self) -> PaddedProduct:
        return PaddedProduct(self.values, *self.sparsity.padded_transpose)


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
    """A scipy matrix with sorted indices as a PETSc matrix of this rank alone."""
    csr.sort_indices()
    arrays = (index_array(csr.indptr), index_array(csr.indices), csr.data)
    return PETSc.Mat().createAIJ(csr.shape, csr=arrays, comm=PETSc.COMM_SELF)


def block_diagonal(matrix: StepMatrix, batch: int | None = None, lag: int = 0) -> sp.csr_matrix:
    """The matrix with block (i, i - lag) = that of step i, for `batch` steps."""
    (n, m), batch = matrix.shape, len(matrix.values) if batch is None else batch
    values = matrix.values.expand(batch, -1)[lag:].detach().numpy().ravel()
    return sp.csr_matrix((values, *_block_pattern(matrix.sparsity, batch, lag)), shape=(batch * n, batch * m))


@lru_cache(maxsize=16)
def _block_pattern(pattern: Sparsity, batch: int, lag: int) -> tuple[Array, Array]:
    """Columns and row starts of a block diagonal matrix."""
    (n, m), kind = pattern.shape, get_index_dtype(maxval=batch * max(*pattern.shape, pattern.nnz))  # as SciPy chooses
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
        shapes = [s.shape for s in (self.A, self.B, self.C, self.W)]
        legal = [(n, n), (n, n), (n, m), (2 * n + m, 2 * n + m)]
        if shapes != legal:
            raise InputError("StepPattern shapes of A, B, C, W", shapes, str(legal))

    @cached_property
    def jacobian(self) -> Sparsity:
        """The stacked pattern [B A C]."""
        return Sparsity(sp.hstack([self.B.csr, self.A.csr, self.C.csr]))

    def split(self, values: Tensor) -> dict[str, StepMatrix]:
        """The blocks A, B and C from values on the stacked pattern, (batch, jacobian.nnz)."""
        return {k: StepMatrix(getattr(self, k), values.index_select(1, part)) for k, part in self._entries.items()}

    @cached_property
    def _entries(self) -> dict[str, Tensor]:
        """Those of each block in the stacked pattern."""
        cols, n = self.jacobian.cols, self.A.shape[0]
        masks = {"B": cols < n, "A": (cols >= n) & (cols < 2 * n), "C": cols >= 2 * n}
        return {name: torch.from_numpy(np.flatnonzero(mask)) for name, mask in masks.items()}

    @classmethod
    def from_dense(cls, J: Tensor, H: Tensor, state_dim: int) -> StepPattern:
        """From samples of [B A C], shape (samples, n, 2n + m), and of W, shape (samples, 2n + m, 2n + m)."""
        n = state_dim
        jacobian, hessian = (J != 0).any(0).numpy(), (H != 0).any(0).numpy()
        return cls(jacobian[:, n : 2 * n], jacobian[:, :n], jacobian[:, 2 * n :], hessian)
