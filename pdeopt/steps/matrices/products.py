"""Products of sparse matrices of steps with rows, by operations of torch: gathers, or a multiplication a diagonal."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pdeopt.core.arrays import Array


def evenly(places: Array) -> slice | Array:
    """Numbers as a slice where they are equally far apart, as those of a band's diagonal: it is read much faster."""
    step = int(places[1] - places[0]) if len(places) > 1 else 1
    is_slice = step > 0 and bool((np.diff(places) == step).all())
    return slice(int(places[0]), int(places[-1]) + 1, step) if is_slice and len(places) else places


class Padded(NamedTuple):
    """Entries in as many vectors as the widest row has entries, one of each row in each vector.

    Attributes:
        entries, columns: of each vector, numbers of entries and their columns, (rows,); padding has entry nnz, column
            0. Numbers that are equally far apart are a slice, which takes no memory and is read much faster.
        num_rows: rows.
        is_uneven: whether there is padding.
    """

    entries: list[slice | Tensor]
    columns: list[slice | Tensor]
    num_rows: int
    is_uneven: bool


def pad(rows: Array, cols: Array, entries: Array, num_rows: int) -> Padded:
    """The padded form of entries at rows and columns, (nnz,) each, sorted by row."""
    counts = np.bincount(rows, minlength=num_rows)
    position = np.arange(rows.size) - np.repeat(np.cumsum(counts) - counts, counts)
    width = int(counts.max(initial=0))
    entry, col = np.full((width, num_rows), rows.size), np.zeros((width, num_rows), dtype=np.int64)
    entry[position, rows], col[position, rows] = entries, cols
    return Padded(_evenly(entry), _evenly(col), num_rows, bool((counts < width).any()))


def _evenly(rows: Array) -> list[slice | Tensor]:
    return [each if isinstance(each, slice) else torch.from_numpy(each) for each in map(evenly, rows)]


class PaddedProduct:
    """Products of sparse matrices with rows as a sum of a few gathers: as many as the widest row has entries.

    All its operations are torch's, so it works under every transform of torch.func.

    Args:
        values: of the entries, (batch, nnz).
        form: the row-padded form of the pattern.
    """

    def __init__(self, values: Tensor, form: Padded) -> None:
        if form.is_uneven:
            values = torch.cat([values, torch.zeros_like(values[:, :1])], dim=1)  # the value of the padding
        self.values, self._form = [values[:, e].contiguous() for e in form.entries], form

    def __call__(self, x: Tensor) -> Tensor:
        """The product with each row of x, (..., columns) -> (..., rows)."""
        terms = (v * x[..., c] for v, c in zip(self.values, self._form.columns))
        total = next(terms, None)
        if total is None:
            return torch.zeros((*x.shape[:-1], self._form.num_rows), dtype=x.dtype)
        for term in terms:
            total = total + term
        return total


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
