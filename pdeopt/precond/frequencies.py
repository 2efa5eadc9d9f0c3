"""The discrete Fourier transform over all steps, and what is constant in time there.

A system over all steps with blocks A on the diagonal and B below it, and -B in the upper right corner, is block
circulant but for a sign: at the frequencies theta_j = (2j + 1) pi / N it falls apart into A + exp(-i theta_j) B.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from pdeopt.core.arrays import Array
from pdeopt.steps.sparse import StepMatrix
from pdeopt.steps.timegrid import TimeGrid, require_whole_steps


def mean(grid: TimeGrid, matrix: StepMatrix) -> sp.csr_matrix:
    """The mean of a matrix over all steps. Collective.

    Args:
        grid: who owns which steps.
        matrix: one a step of this rank, or one for all; of one pattern on all ranks.
    """
    values, pattern = matrix.values, matrix.sparsity.csr
    own = values.sum(0) * (grid.n_local / len(values))
    entries = (grid.sum(own) / grid.num_steps).numpy()
    return sp.csr_matrix((entries, pattern.indices, pattern.indptr), shape=matrix.shape)


class Frequencies:
    """Real rows over all steps, (n_local, k), and their values at the frequencies of this rank, (own, k), complex.

    Values at theta and -theta are conjugate, so half of the frequencies are enough; ranks share them. Both transforms
    exchange all rows between all ranks, twice.

    Args:
        grid: who owns which steps.

    Attributes:
        angles: theta_j of this rank, each in (0, pi].

    Example:
        S x = r, S block circulant but for the sign:

            frequencies = Frequencies(grid)
            values = frequencies.forward(r)
            for j, theta in enumerate(frequencies.angles):
                values[j] = np.linalg.solve(A + np.exp(-1j * theta) * B, values[j])
            x = frequencies.backward(values)
    """

    def __init__(self, grid: TimeGrid) -> None:
        require_whole_steps(grid, "means over time", "-kkt_precond reduced | wathen | direct, or space_ranks 1")
        self.grid, N = grid, grid.num_steps
        self._half, ranks = (N + 1) // 2, grid.mpi.size
        self._steps = np.r_[0, np.cumsum(grid.mpi.allgather(grid.n_local))]
        self._shares = np.arange(ranks + 1) * self._half // ranks
        own = np.arange(*self._shares[grid.mpi.rank : grid.mpi.rank + 2])
        self.angles: Array = (2 * own + 1) * np.pi / N
        self._twist = np.exp(-1j * np.pi / N * np.arange(N))[:, None]

    def forward(self, rows: Tensor) -> Array:
        """sum_k exp(-i theta_j k) rows_k, k from 0. Collective."""
        columns = self._to_columns(rows.detach().numpy())
        values = np.fft.fft(self._twist * columns, axis=0)[: self._half]
        return self._to_rows(values, self._shares)

    def backward(self, values: Array) -> Tensor:
        """The inverse of `forward`. Collective."""
        columns, N = self._to_columns(values), self.grid.num_steps
        columns[: N // 2] *= 2.0  # for the conjugate ones; of an odd number of steps the last, pi, has none
        found = np.conj(self._twist) * np.fft.ifft(columns, n=N, axis=0)
        return torch.from_numpy(self._to_rows(np.ascontiguousarray(found.real), self._steps))

    def _to_columns(self, rows: Array) -> Array:
        """All rows of a share of the columns, from a share of the rows. Always a copy."""
        if self.grid.mpi.size == 1:
            return rows.copy()
        parts = np.array_split(rows, self.grid.mpi.size, axis=1)
        return np.concatenate(self.grid.mpi.alltoall([part.copy() for part in parts]), axis=0)

    def _to_rows(self, columns: Array, starts: Array) -> Array:
        """The inverse of `_to_columns`; the share of rank r is starts[r]:starts[r+1]."""
        if self.grid.mpi.size == 1:
            return columns
        parts = [columns[begin:end].copy() for begin, end in pairwise(starts)]
        return np.concatenate(self.grid.mpi.alltoall(parts), axis=1)
