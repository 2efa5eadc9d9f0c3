"""Entries of matrices that ranks assemble over their cells, summed for the owners of rows: all steps in one message."""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from pdeopt.core.arrays import Array
from pdeopt.space.layouts.layout import Layout
from pdeopt.steps.sparsity import Sparsity


class SharedEntries:
    """The entries of owned rows from what each rank has of the rows that it sees.

    Entries are exchanged as unknowns are: those of owned rows are a layout's owned numbers, those that a rank has of
    rows of others its ghosts, and `Layout.collect` adds them up. Collective when made.

    Args:
        rows, columns: layouts of the unknowns of both sides.
        pattern: the entries of this rank, local numbers, sorted: (rows seen, columns seen).

    Attributes:
        sparsity: of the owned rows.
    """

    def __init__(self, rows: Layout, columns: Layout, pattern: sp.csr_matrix) -> None:
        row, col = np.repeat(np.arange(pattern.shape[0]), np.diff(pattern.indptr)), pattern.indices
        owner, number = rows.owners
        self._is_own = row < rows.n_owned
        others = [np.flatnonzero((owner[row] == rank) & ~self._is_own) for rank in range(rows.mpi.size)]
        sends = [np.stack([number[row[k]], columns.global_numbers[col[k]]]) if len(k) else None for k in others]
        asked = rows.mpi.alltoall(sends)
        own = np.stack([row[self._is_own], col[self._is_own]])
        theirs = {r: _local(pairs, columns) for r, pairs in enumerate(asked) if pairs is not None}
        places = np.concatenate([own, *theirs.values()], axis=1)
        shape = (rows.n_owned, columns.n_all)
        self.sparsity = Sparsity(sp.csr_matrix((np.ones(places.shape[1]), tuple(places)), shape=shape), columns)
        keys = self.sparsity.rows * shape[1] + self.sparsity.cols

        def place(pairs: Array) -> Array:
            places: Array = np.searchsorted(keys, pairs[0] * shape[1] + pairs[1])
            return places

        self._place = torch.from_numpy(place(own))
        answers = rows.mpi.alltoall([place(theirs[r]) if r in theirs else None for r in range(rows.mpi.size)])
        starts, ghosts = np.r_[0, np.cumsum(rows.mpi.allgather(len(keys)))], np.zeros(len(row), dtype=np.int64)
        for rank, answer in enumerate(answers):
            if answer is not None:
                ghosts[others[rank]] = starts[rank] + answer
        self._entries = Layout(rows.mpi, len(keys), ghosts[~self._is_own])

    def collect(self, values: Tensor) -> Tensor:
        """Entries of this rank, (batch, entries), to those of `sparsity`, (batch, nnz). Collective."""
        out = values.new_zeros(len(values), self._entries.n_all)
        out[:, self._place] = values[:, self._is_own]
        out[:, self._entries.n_owned :] = values[:, ~self._is_own]
        return self._entries.collect(out)


def _local(pairs: Array, columns: Layout) -> Array:
    """Rows and global columns, (2, k), as rows and local columns."""
    order = np.argsort(columns.global_numbers)
    found = order[np.searchsorted(columns.global_numbers[order], pairs[1])]
    assert (columns.global_numbers[found] == pairs[1]).all()  # `Unknowns` has what cells of other ranks couple
    return np.stack([pairs[0], found])
