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
from scipy.optimize._numdiff import group_columns
from torch import Tensor

from pdeopt.core.arrays import Array
from pdeopt.core.autodiff import columns
from pdeopt.core.errors import InputError
from pdeopt.space.layouts.layout import Layout

#: Colors of the parameters up to which their derivatives are kept as sparse matrices.
MOST_COLORS = 32


class Sparsity:
    """The pattern of a sparse matrix, entries sorted by row, then column.

    Where a step's unknowns are spread over ranks, a pattern is that of the rows of this rank. Its columns are local
    numbers of a layout, owned unknowns before ghosts; without a layout no row sees an unknown of another rank.

    Args:
        pattern: a scipy sparse or dense matrix; its stored (dense: nonzero) entries count.
        columns: layout of what the columns stand for; one without ghosts on any rank counts as None.
    """

    def __init__(self, pattern: Any, columns: Layout | None = None) -> None:
        csr = sp.csr_matrix(pattern)  # copied: sorting a user's indices in place would leave the values behind
        csr = sp.csr_matrix((np.ones(csr.nnz), csr.indices, csr.indptr), shape=csr.shape, copy=True)
        csr.sum_duplicates()
        self.csr = csr
        self.shape: tuple[int, int] = csr.shape
        self.nnz: int = csr.nnz
        self.rows = np.repeat(np.arange(csr.shape[0]), np.diff(csr.indptr))
        self.cols = csr.indices.astype(np.int64)
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
        of_columns = b"" if self.columns is None else self.columns.digest
        return sha256(repr(self.shape).encode() + self._keys.tobytes() + of_columns).digest()

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
        seeds: the sum of the unit vectors of each color, shape (colors, columns).
        directions: the seeds, and one without zeros, unless each column has a color of its own and shows all its
            entries. Shape (directions, columns).
    """

    def __init__(self, pattern: Sparsity) -> None:
        width = pattern.shape[1]
        self.colors = _greedy_colors(pattern)
        number = int(self.colors.max(initial=-1)) + 1
        probe = torch.linspace(1.0, 2.0, width, dtype=torch.float64)[None]
        self._is_probed = number < width
        self.directions = torch.zeros(number + int(self._is_probed), width, dtype=torch.float64)
        self.seeds = self.directions[:number]  # the same memory: with 3 n columns, these are the largest of a pattern
        seen = np.flatnonzero(self.colors >= 0)
        self.seeds[self.colors[seen], seen] = 1.0
        self.directions[number:] = probe
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
    """Each column in turn takes the first color that none of its neighbors has, in compiled code of SciPy."""
    colors = np.full(pattern.shape[1], -1)
    if pattern.nnz:
        colors = np.asarray(group_columns(pattern.csr, order=np.arange(pattern.shape[1])), dtype=colors.dtype)
        colors[np.bincount(pattern.cols, minlength=pattern.shape[1]) == 0] = -1
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


def evenly(places: Array) -> slice | Array:
    """Numbers as a slice where they are equally far apart, as those of a band's diagonal: it is read much faster."""
    step = int(places[1] - places[0]) if len(places) > 1 else 1
    is_slice = step > 0 and bool((np.diff(places) == step).all())
    return slice(int(places[0]), int(places[-1]) + 1, step) if is_slice and len(places) else places


#: Diagonals on which entries stand up to which a product takes one multiplication for each.
FEW_DIAGONALS = 4


class DiagonalProduct:
    """Products of matrices whose entries stand on a few diagonals with rows.

    Args:
        num_rows: of a matrix.
        rows, cols: of the entries, (nnz,).
        values: of them, (batch, nnz).
    """

    def __init__(self, num_rows: int, rows: Array, cols: Array, values: Tensor) -> None:
        self._rows, self._diagonals, distance = num_rows, list[tuple[slice, slice, Tensor]](), cols - rows
        for k in np.unique(distance):
            place = np.flatnonzero(distance == k)
            begin, end = int(rows[place].min()), int(rows[place].max()) + 1
            if len(place) == end - begin:
                entries = values[:, evenly(place)].contiguous()
            else:
                entries = values.new_zeros(len(values), end - begin)
                entries[:, rows[place] - begin] = values[:, place]
            self._diagonals.append((slice(begin, end), slice(begin + k, end + k), entries))
        self._diagonals.sort(key=lambda each: each[0].start - each[0].stop)  # the longest first

    def __call__(self, x: Tensor) -> Tensor:
        whole, rest = self._diagonals[:1], self._diagonals[1:]
        if whole and whole[0][0] == slice(0, self._rows):
            out = x[:, whole[0][1]] * whole[0][2]
        else:
            out, rest = x.new_zeros(len(x), self._rows), self._diagonals
        for rows, cols, entries in rest:
            out[:, rows].addcmul_(x[:, cols], entries)
        return out


@lru_cache(maxsize=64)
def has_few_diagonals(pattern: Sparsity) -> bool:
    """Whether a `DiagonalProduct` is the fastest."""
    return len(np.unique(pattern.cols - pattern.rows)) <= FEW_DIAGONALS


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
