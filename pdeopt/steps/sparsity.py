"""Patterns of sparse matrices, and the coloring that lets automatic differentiation fill them.

Columns that share no entry of a row are differentiated at once (A. R. Curtis, M. J. D. Powell, J. K. Reid, On the
estimation of sparse Jacobian matrices, 1974); so are rows, in reverse mode.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, lru_cache
from hashlib import sha256
from typing import Any, Generic, NamedTuple, TypeVar, overload

import numpy as np
import scipy.sparse as sp
import torch
from scipy.optimize._numdiff import group_columns
from torch import Tensor

from pdeopt.core.arrays import Array
from pdeopt.core.autodiff import columns
from pdeopt.core.errors import InputError
from pdeopt.space.layouts.layout import Layout
from pdeopt.steps.matrices.products import Padded, pad

#: Colors of the parameters up to which their derivatives are kept as sparse matrices.
MOST_COLORS = 32

#: Entries up to which a pattern keeps what follows from it; of larger ones that is found anew, in less time than a few
#: products take: kept, it would be several times as large as the matrix.
KEPT_ENTRIES = 1 << 18

#: Numbers in the directions of a coloring, and in the products with those that are taken at once.
FEW_NUMBERS = 1 << 20

T = TypeVar("T")


class kept_if_small(Generic[T]):
    """`cached_property` of a pattern with at most `KEPT_ENTRIES` entries, a plain property of a larger one."""

    def __init__(self, function: Callable[[Any], T]) -> None:
        self.function, self.__doc__ = function, function.__doc__

    @overload
    def __get__(self, pattern: None, owner: Any) -> kept_if_small[T]: ...

    @overload
    def __get__(self, pattern: object, owner: Any) -> T: ...

    def __get__(self, pattern: Any, owner: Any) -> Any:
        if pattern is None:
            return self
        value = self.function(pattern)
        if pattern.nnz <= KEPT_ENTRIES:
            pattern.__dict__[self.function.__name__] = value
        return value


class Entries:
    """Where the entries of a pattern stand, in the forms in which it is asked for.

    Attributes:
        shape, nnz: rows and columns; entries.
        indptr, indices: the first entry of each row, and the column of each entry, of 4 bytes where these do.
    """

    shape: tuple[int, int]
    nnz: int
    indptr: Array
    indices: Array

    @kept_if_small
    def csr(self) -> sp.csr_matrix:
        """The pattern as a matrix of ones."""
        return sp.csr_matrix((np.ones(self.nnz), self.indices, self.indptr), shape=self.shape)

    @kept_if_small
    def rows(self) -> Array:
        """The row of each entry, (nnz,)."""
        return np.repeat(np.arange(self.shape[0]), np.diff(self.indptr))

    @kept_if_small
    def cols(self) -> Array:
        """The column of each entry, (nnz,)."""
        return self.indices.astype(np.int64)

    @property
    def on_diagonal(self) -> Array:
        """Numbers of the entries that stand on the diagonal."""
        return np.flatnonzero(self.rows == self.cols)


class Sparsity(Entries):
    """The pattern of a sparse matrix, entries sorted by row, then column.

    Where a step's unknowns are spread over ranks, a pattern is that of the rows of this rank. Its columns are local
    numbers of a layout, owned unknowns before ghosts; without a layout no row sees an unknown of another rank.

    Args:
        pattern: a scipy sparse or dense matrix; its stored (dense: nonzero) entries count.
        columns: layout of what the columns stand for; one without ghosts on any rank counts as None.
    """

    def __init__(self, pattern: Any, columns: Layout | None = None) -> None:
        csr = sp.csr_matrix(pattern)  # copied: sorting a user's indices in place would leave the values behind
        csr = sp.csr_matrix((np.ones(csr.nnz, dtype=np.int8), csr.indices, csr.indptr), shape=csr.shape, copy=True)
        csr.sum_duplicates()
        self.shape, self.nnz = csr.shape, csr.nnz
        small = max(self.nnz, *self.shape) <= np.iinfo(np.int32).max
        self.indptr, self.indices = (x.astype(np.int32 if small else np.int64) for x in (csr.indptr, csr.indices))
        self.columns = None if columns is None or columns.is_silent else columns
        if self.columns is not None and self.columns.n_all != self.shape[1]:
            raise InputError("columns of a pattern", self.shape[1], f"{self.columns.n_all} owned unknowns and ghosts")
        #: entries of what a matrix with this pattern is multiplied by on this rank: owned columns
        self.domain: int = self.shape[1] if self.columns is None else self.columns.n_owned

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
        one, two = widened(self, other.columns), widened(other, self.columns)
        return Sparsity(one.csr + two.csr, one.columns)

    def covers(self, other: Sparsity) -> bool:
        """Whether every entry of `other` is one of this pattern."""
        if self.columns is None and other.columns is not None:
            return False
        other = widened(other, self.columns)
        return bool(np.isin(other._keys, self._keys, assume_unique=True).all())

    def places(self, other: Sparsity) -> Tensor:
        """Where the entries of `other`, which this pattern covers, stand among its own. Shape (other.nnz,)."""
        return torch.from_numpy(np.searchsorted(self._keys, widened(other, self.columns)._keys))

    @kept_if_small
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
        of_columns = b"" if self.columns is None else self.columns.digest
        found = sha256(repr(self.shape).encode())
        for part in (self.indptr.data, self.indices.data, of_columns):
            found.update(part)
        return found.digest()

    def fill(self, product: Callable[[Tensor], Tensor], at_once: bool = True) -> tuple[Tensor, bool]:
        """Values of the entries, (batch, nnz), and whether they are all: whether they give a product with no zeros.

        `product` maps a direction, (columns,), to the batch of products, (batch, rows); it is vectorized over those of
        the coloring, or, not `at_once`, called for one after the other. So it is where they are long.
        """
        coloring = self.coloring
        if coloring.directions is None:
            return coloring.fill(product)
        directions = coloring.directions
        products = columns(product, directions) if at_once else torch.stack([product(d) for d in directions])
        return coloring.recover(products)

    @kept_if_small
    def coloring(self) -> Coloring:
        """Which columns are differentiated at once."""
        return Coloring(self)

    @kept_if_small
    def transposed(self) -> Sparsity:
        """The pattern of the transpose; its colors are those of the rows."""
        return Sparsity(self.csr.T)

    @kept_if_small
    def padded(self) -> Padded:
        """The entries by rows."""
        return pad(self.rows, self.cols, np.arange(self.nnz), self.shape[0])

    @kept_if_small
    def padded_transpose(self) -> Padded:
        """`padded` of the transpose."""
        order = np.lexsort((self.rows, self.cols))
        return pad(self.cols[order], self.rows[order], order, self.shape[1])


def widened(pattern: Sparsity, columns: Layout | None) -> Sparsity:
    """The same entries among the columns of a layout, of which the pattern has the owned ones or all."""
    if columns is pattern.columns or columns is None:
        return pattern
    if pattern.columns is not None:
        raise InputError("patterns of one matrix", "columns of two layouts", "the same layout")
    csr = pattern.csr
    return Sparsity(sp.csr_matrix((csr.data, csr.indices, csr.indptr), (csr.shape[0], columns.n_all)), columns)


def at_columns(pattern: Sparsity, x: Tensor) -> Tensor:
    """The entry of each row of x, (batch, domain), at the column of each entry, (batch, nnz). Collective."""
    return (x if pattern.columns is None else pattern.columns.extend(x))[:, pattern.cols]


class Coloring:
    """Colors of the columns, so that those of one color share no row, and the entries from products with their sums.

    Args:
        pattern: of the matrices.

    Attributes:
        colors: of the columns, by a greedy choice; -1 for one without entries. Shape (columns,).
        number: of colors.
        directions: the sum of the unit vectors of each color, and a direction without zeros, unless each column has a
            color of its own and shows all its entries. Shape (directions, columns). None where these are more than
            `FEW_NUMBERS` numbers: with 3 n columns, they would be the largest that a pattern has.
    """

    def __init__(self, pattern: Sparsity) -> None:
        width = pattern.shape[1]
        self.colors = _greedy_colors(pattern)
        self.number = int(self.colors.max(initial=-1)) + 1
        self._pattern, is_large = pattern, self.number * width > FEW_NUMBERS
        self._is_probed = is_large or self.number < max(width, 1)  # of no columns, too: their product has a shape
        self.directions: Tensor | None = None
        if not is_large:
            which = range(self.number + int(self._is_probed))
            each = [self.direction(color) for color in which]
            self.directions = torch.stack(each) if each else torch.zeros(0, width, dtype=torch.float64)
            self._color, self._row = torch.from_numpy(self.colors[pattern.cols]), torch.from_numpy(pattern.rows)
            self._weights = self.direction(self.number)[torch.from_numpy(pattern.cols)]

    def direction(self, color: int) -> Tensor:
        """The sum of the unit vectors of a color, or, of the number after the last, a direction without zeros."""
        if color == self.number:
            return torch.linspace(1.0, 2.0, len(self.colors), dtype=torch.float64)
        return torch.from_numpy(self.colors == color).double()

    def fill(self, product: Callable[[Tensor], Tensor]) -> tuple[Tensor, bool]:
        """`Sparsity.fill` with one direction after the other."""
        pattern, probe = self._pattern, self.direction(self.number)
        missed = product(probe)
        size, values = 1 + float(missed.abs().amax()), missed.new_empty(len(missed), pattern.nnz)
        color_of_entry, starts = self.colors[pattern.indices], pattern.indptr
        for color in range(self.number):
            entries, one = np.flatnonzero(color_of_entry == color), product(self.direction(color))
            rows = torch.from_numpy(np.searchsorted(starts, entries, side="right") - 1)
            values[:, entries] = part = one[:, rows]
            missed.index_add_(1, rows, part * probe[pattern.indices[entries]], alpha=-1)
        return values, not bool(missed.abs().amax() > 1e-8 * size)

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
    """Each column in turn takes the first color that none of its neighbors has, in compiled code of SciPy."""
    colors = np.full(pattern.shape[1], -1, dtype=np.int32)
    if pattern.nnz:
        ones = sp.csr_matrix((np.ones(pattern.nnz, dtype=np.int8), pattern.indices, pattern.indptr), pattern.shape)
        seen = np.zeros(pattern.shape[1], dtype=bool)
        seen[pattern.indices] = True
        colors[seen] = group_columns(ones, order=np.arange(pattern.shape[1]))[seen]
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
    largest, number = int(np.bincount(pattern.indices).max(initial=0)), pattern.coloring.number
    return largest <= number and pattern.transposed.coloring.number <= number  # rows of one column differ in color


#: Diagonals on which entries stand up to which a product takes one multiplication for each.
FEW_DIAGONALS = 4


@lru_cache(maxsize=64)
def has_few_diagonals(pattern: Sparsity) -> bool:
    """Whether a `DiagonalProduct` is the fastest."""
    widest = int(np.diff(pattern.indptr).max(initial=0))
    return widest <= FEW_DIAGONALS and len(np.unique(pattern.cols - pattern.rows)) <= FEW_DIAGONALS


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
            int(np.diff(part.indptr).max(initial=0)) <= MOST_COLORS and part.coloring.number <= MOST_COLORS
            for part in self
        )
