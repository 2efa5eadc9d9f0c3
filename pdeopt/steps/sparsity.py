"""Patterns of sparse matrices, and the coloring that lets automatic differentiation fill them.

Columns that share no entry of a row are differentiated at once (A. R. Curtis, M. J. D. Powell, J. K. Reid, On the
estimation of sparse Jacobian matrices, 1974); so are rows, in reverse mode.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, lru_cache
from hashlib import sha256
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from pdeopt.core.arrays import Array
from pdeopt.core.autodiff import columns

#: Colors of the parameters up to which their derivatives are kept as sparse matrices.
MOST_COLORS = 32


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

    def fill(self, product: Callable[[Tensor], Tensor], at_once: bool = True) -> tuple[Tensor, bool]:
        """Values of the entries, (batch, nnz), and whether they are all: whether they give a product with no zeros.

        `product` maps a direction, (columns,), to the batch of products, (batch, rows); it is vectorized over those of
        the coloring, or, not `at_once`, called for one after the other.
        """
        directions = self.coloring.directions
        products = columns(product, directions) if at_once else torch.stack([product(d) for d in directions])
        return self.coloring.recover(products)

    @cached_property
    def coloring(self) -> Coloring:
        """Which columns are differentiated at once."""
        return Coloring(self)

    @cached_property
    def transposed(self) -> Sparsity:
        """The pattern of the transpose; its colors are those of the rows."""
        return Sparsity(self.csr.T)

    @cached_property
    def padded(self) -> tuple[Tensor, Tensor]:
        """Row-padded form: entry and column numbers, each (width, rows); padding has entry nnz, column 0."""
        return _pad(self.rows, self.cols, np.arange(self.nnz), self.shape[0])

    @cached_property
    def padded_transpose(self) -> tuple[Tensor, Tensor]:
        """`padded` of the transpose: entry and row numbers, each (width, columns)."""
        order = np.lexsort((self.rows, self.cols))
        return _pad(self.cols[order], self.rows[order], order, self.shape[1])


class Coloring:
    """Colors of the columns, so that those of one color share no row, and the entries from products with their sums.

    Args:
        pattern: of the matrices.

    Attributes:
        colors: of the columns, by a greedy choice; -1 for one without entries. Shape (columns,).
        seeds: the sum of the unit vectors of each color, shape (colors, columns).
        directions: the seeds, and one without zeros, unless each column has a color of its own and shows all its
            entries. Shape (directions, columns).
    """

    def __init__(self, pattern: Sparsity) -> None:
        width = pattern.shape[1]
        self.colors = _greedy_colors(pattern)
        number = int(self.colors.max(initial=-1)) + 1
        self.seeds = torch.from_numpy((self.colors == np.arange(number)[:, None]).astype(float))
        probe = torch.linspace(1.0, 2.0, width, dtype=torch.float64)[None]
        self._is_probed = number < width
        self.directions = torch.cat([self.seeds, probe]) if self._is_probed else self.seeds
        self._color, self._row = torch.from_numpy(self.colors[pattern.cols]), torch.from_numpy(pattern.rows)
        self._weights = probe[0, torch.from_numpy(pattern.cols)]

    def recover(self, products: Tensor) -> tuple[Tensor, bool]:
        """Values of the entries, (batch, nnz), and whether they are all, from products (directions, batch, rows)."""
        values = products[self._color, :, self._row].T.contiguous()
        if self._is_probed:
            expected, probed = products[-1], values * self._weights
        else:
            expected, probed = products.sum(0), values
        missed = expected.index_add(1, self._row, probed, alpha=-1).abs().amax()
        return values, not bool(missed > 1e-8 * (1 + expected.abs().amax()))


def _greedy_colors(pattern: Sparsity) -> Array:
    by_column = pattern.csr.tocsc()
    neighbors = sp.csr_matrix(pattern.csr.T @ pattern.csr)
    colors = np.full(pattern.shape[1], -1)
    for j in np.flatnonzero(np.diff(by_column.indptr)):
        taken = set(colors[neighbors.indices[neighbors.indptr[j] : neighbors.indptr[j + 1]]])
        colors[j] = next(c for c in range(len(taken) + 1) if c not in taken)
    return colors


def fill_by_rows(pattern: Sparsity, product: Callable[[Tensor], Tensor]) -> tuple[Tensor, bool]:
    """`Sparsity.fill` by products with the transpose, (rows,) -> (batch, columns), called for one after the other."""
    values, are_all = pattern.transposed.fill(product, at_once=False)
    return values[:, _places_in_transpose(pattern)], are_all


@lru_cache(maxsize=64)
def _places_in_transpose(pattern: Sparsity) -> Tensor:
    """Where the entries stand among those of the transpose."""
    return torch.from_numpy(np.argsort(np.lexsort((pattern.rows, pattern.cols))))


@lru_cache(maxsize=64)
def has_fewer_row_colors(pattern: Sparsity) -> bool:
    """Whether the rows need no more colors than the columns."""
    largest, number = int(np.bincount(pattern.cols).max(initial=0)), len(pattern.coloring.seeds)
    return largest <= number and len(pattern.transposed.coloring.seeds) <= number  # rows of one column differ in color


def _pad(rows: Array, cols: Array, entries: Array, num_rows: int) -> tuple[Tensor, Tensor]:
    counts = np.bincount(rows, minlength=num_rows)
    position = np.arange(rows.size) - np.repeat(np.cumsum(counts) - counts, counts)
    width = int(counts.max(initial=0))
    entry, col = np.full((width, num_rows), rows.size), np.zeros((width, num_rows), dtype=np.int64)
    entry[position, rows], col[position, rows] = entries, cols
    return torch.from_numpy(entry), torch.from_numpy(col)


class ParameterPattern(NamedTuple):
    """The sparsities of what a step's derivatives have in the global parameters p, P of them.

    Attributes:
        F: of dF/dp, (n, P).
        W: of the mixed second derivatives, (2n + m, P), rows over [u_old | u_new | z].
        W_pp: of the second derivatives in p alone, (P, P), summed over the steps.
    """

    F: Sparsity
    W: Sparsity
    W_pp: Sparsity

    @classmethod
    def full(cls, n: int, m: int, P: int) -> ParameterPattern:
        """All entries."""
        return cls(*(Sparsity(np.ones(shape)) for shape in ((n, P), (2 * n + m, P), (P, P))))

    def __or__(self, other: ParameterPattern) -> ParameterPattern:
        return ParameterPattern(*(own | its for own, its in zip(self, other)))

    @property
    def is_sparse(self) -> bool:
        """Whether products with entries are cheaper than differentiation: few colors."""
        return all(
            int(np.bincount(part.rows).max(initial=0)) <= MOST_COLORS and len(part.coloring.seeds) <= MOST_COLORS
            for part in self
        )
