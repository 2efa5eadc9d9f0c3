"""The entries of sparse matrices of which products alone are known, by a few products for each entry of a row.

Columns are thrown into buckets, and one direction sums those of a bucket, with random weights. Where an entry of a row
is alone in a bucket, the sum weighted by the columns' numbers divided by the plain one tells which it is; a third sum
with other weights confirms it. What was found is taken off, and others are alone after the next throw (M. T. Goodrich
and M. Mitzenmacher, Invertible Bloom lookup tables, 2011).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from pdeopt.core.arrays import Array

#: Buckets for a look at how full rows are, and the most entries of a row: matrices with more are for products alone.
LOOK, FULLEST = 512, 192

#: Throws before what is left is taken for rounding that no throw resolves.
MOST_THROWS = 24

#: A sum is zero below this part of what was taken off it; a bucket's two weighted sums agree to this.
ZERO, AGREEMENT = 1e-9, 1e-9

#: Numbers in the products of a chunk of directions.
CHUNK = 1 << 22

#: (directions, columns) -> (directions, matrices, rows)
Product = Callable[[Tensor], Tensor]


def sparse_pattern(product: Product, matrices: int, shape: tuple[int, int]) -> sp.csr_matrix | None:
    """Where one of a few matrices has an entry; None where rows are too full, or products are not finite.

    Args:
        product: of each direction with all matrices.
        matrices: how many.
        shape: theirs.
    """
    rows, columns = shape
    if 0 in shape:
        return sp.csr_matrix(shape, dtype=bool)
    search = _Search(product, matrices * rows, columns)
    fullest = search.look()
    if fullest is None or fullest > FULLEST:
        return None
    found = search.entries(fullest)
    if found is None:
        return None
    ones = np.ones(len(found[0]), dtype=bool)
    return sp.csr_matrix((ones, (found[0] % rows, found[1])), shape=shape, dtype=bool)


class _Search:
    """The search in the stacked rows of all matrices."""

    def __init__(self, product: Product, rows: int, columns: int) -> None:
        self.product, self.rows, self.columns = product, rows, columns
        self.random = np.random.default_rng(0)

    def look(self) -> float | None:
        """About the number of entries in the fullest row, from the buckets that are not empty. None: not finite."""
        buckets, filled = min(LOOK, self.columns), np.zeros(self.rows)
        place, weights = self.random.integers(buckets, size=self.columns), self._weights()
        for _, sums in self._sums(buckets, place, weights):
            if not np.isfinite(sums).all():
                return None
            filled += (sums != 0).sum(0)
        share = filled.max() / buckets
        return float("inf") if share >= 0.9 else float(-np.log1p(-share) * buckets)

    def entries(self, fullest: float) -> tuple[Array, Array] | None:
        """Rows and columns of the entries; None where some are not found."""
        buckets = max(8, 1 << int(np.ceil(np.log2(1.5 * fullest + 1))))
        found = sp.csr_matrix((self.rows, self.columns))
        for _ in range(MOST_THROWS):
            more, is_rest = self._throw(buckets, found)
            if not is_rest:
                coo = found.tocoo()
                return coo.row, coo.col
            found = found + more
        return None

    def _throw(self, buckets: int, found: sp.csr_matrix) -> tuple[sp.csr_matrix, bool]:
        """Entries that are alone in a bucket, beside those found before, and whether anything was left of these."""
        place, plain, other = self.random.integers(buckets, size=self.columns), self._weights(), self._weights()
        number = (1.0 + np.arange(self.columns)) / self.columns
        parts, is_rest = [], False
        three = zip(*(self._sums(buckets, place, weights, found) for weights in (plain, plain * number, other)))
        for (begin, sums), (_, numbered), (_, check) in three:
            bucket, row = np.nonzero(sums)
            is_rest |= len(row) > 0 or bool(check.any())
            value = sums[bucket, row]
            with np.errstate(invalid="ignore"):
                column = np.rint(numbered[bucket, row] / value * self.columns) - 1
            column = np.where((column >= 0) & (column < self.columns), column, 0).astype(int)
            value = value / plain[column]
            agrees = np.abs(check[bucket, row] - value * other[column]) <= AGREEMENT * np.abs(value)
            is_alone = agrees & (place[column] == begin + bucket)
            parts.append((value[is_alone], row[is_alone], column[is_alone]))
        values, rows, columns = (np.concatenate(each) for each in zip(*parts))
        return sp.csr_matrix((values, (rows, columns)), shape=found.shape), is_rest

    def _weights(self) -> Array:
        """Away from zero, so that no entry gets lost."""
        weights: Array = self.random.uniform(1.0, 2.0, self.columns) * self.random.choice([-1.0, 1.0], self.columns)
        return weights

    def _sums(
        self, buckets: int, place: Array, weights: Array, found: sp.csr_matrix | None = None
    ) -> Iterator[tuple[int, Array]]:
        """The first bucket of a chunk, and the sums of its weighted columns, (buckets, rows), less those found."""
        directions = sp.csr_matrix((weights, (place, np.arange(self.columns))), shape=(buckets, self.columns))
        step = max(1, CHUNK // (self.rows + self.columns))
        for begin in range(0, buckets, step):
            chunk = directions[begin : begin + step]
            sums = self.product(torch.from_numpy(chunk.toarray())).reshape(-1, self.rows).numpy().copy()
            if found is not None and found.nnz:
                known = (chunk @ found.T).toarray()
                size = (abs(chunk) @ abs(found).T).toarray()
                sums -= known
                sums[np.abs(sums) <= ZERO * size] = 0.0
            yield begin, sums
