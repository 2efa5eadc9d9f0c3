"""Kernel matrices as Phi'Phi by Cholesky factorizations with random pivots: smooth kernels in few dimensions.

Y. Chen, E. N. Epperly, J. A. Tropp, R. J. Webber, Randomly pivoted Cholesky, Commun. Pure Appl. Math. 78, 2025.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from mpi4py import MPI

from pdeopt.core.errors import InputError
from pdeopt.lowrank.clusters import table_of
from pdeopt.lowrank.kernels import Array, Kernel

#: Pivots at a time, and the part of the largest eigenvalue of their block below which it is rounding.
BLOCK, ROUNDING = 32, 1e-10

#: What stands for nothing left, where it divides.
LEAST = 1e-200


class PivotedCholesky:
    """K ~ Phi'Phi of all points, Phi (rank, n), with a small trace of what is left, which is positive semidefinite.

    n (rank^2 + rank) multiplications and n rank values of the kernel: no n x n matrix. Pivots are drawn with
    probabilities as the diagonal of what is left, which is near the best choice for any kernel.

    Args:
        kernel: k.
        points: (n, d), all of them on each rank.
        rtol: of the trace of K.
        most: rows of Phi at most.
        comm: mpi4py communicator, each rank of which has the columns of some points; default this one alone.
        seed: of the random numbers.

    Attributes:
        n: points, and `own`, a slice: those of this rank.
        phi: (rank, own).
        rest: trace of what is left, relative to that of K; above `rtol` where `most` rows do not suffice.

    Raises:
        InputError: points that are no table of finite numbers, or numbers out of range.

    Example:
        >>> factor = PivotedCholesky(Gaussian(0.2), x)
        >>> factor.phi.T @ (factor.phi @ weights)              # K weights
    """

    def __init__(
        self, kernel: Kernel, points: Any, rtol: float = 1e-8, most: int = 2000, comm: Any = None, seed: int = 0
    ) -> None:
        x = table_of(points)
        if not 0.0 < rtol < 1.0:
            raise InputError("rtol of a pivoted Cholesky factor", rtol, "a number > 0 and < 1")
        if most < 1:
            raise InputError("most rows of a pivoted Cholesky factor", most, "an integer >= 1")
        self.comm = MPI.COMM_SELF if comm is None else comm
        self.n, self.rtol = len(x), rtol
        self._starts = [self.n * rank // self.comm.size for rank in range(self.comm.size + 1)]
        self.own = slice(*self._starts[self.comm.rank : self.comm.rank + 2])
        generator = np.random.default_rng(seed)
        left = kernel.diagonal(x)  # diagonal of what is left, of all points
        trace, rank = float(left.sum()), 0
        rows = np.empty((min(most, 2 * BLOCK), self.own.stop - self.own.start))
        while left.sum() > rtol * trace and rank < most:
            keys = generator.standard_exponential(self.n) / np.maximum(left, LEAST)
            count = min(BLOCK, most - rank, int(np.count_nonzero(left)))
            pivots = np.argpartition(keys, count - 1)[:count]  # without replacement, by the weights `left`
            new = kernel.block(x[pivots], x[self.own]) - self._columns(rows[:rank], pivots).T @ rows[:rank]
            new = inverse_root(self._columns(new, pivots)) @ new
            if rank + len(new) > len(rows):
                rows = np.concatenate([rows, np.empty_like(rows)])
            rows[rank : rank + len(new)] = new
            rank += len(new)
            own = np.maximum(left[self.own] - np.einsum("kn,kn->n", new, new), 0.0)
            left = np.concatenate(self.comm.allgather(own))
            left[pivots] = 0.0
        self.phi: Array = rows[:rank]
        self.rest = float(left.sum()) / trace if trace else 0.0

    def _columns(self, rows: Array, which: Any) -> Array:
        """Columns of some points, on all ranks. Collective."""
        found = np.zeros((len(rows), len(which)))
        here = np.flatnonzero((which >= self.own.start) & (which < self.own.stop))
        found[:, here] = rows[:, which[here] - self.own.start]
        self.comm.Allreduce(MPI.IN_PLACE, found)
        return found


def inverse_root(matrix: Array) -> Array:
    """T with T'T the pseudoinverse of a positive semidefinite matrix, (r, n): equal points have one eigenvalue.

    Args:
        matrix: (n, n), of a kernel at a few points.
    """
    values, vectors = np.linalg.eigh(0.5 * (matrix + matrix.T))
    kept = values > max(ROUNDING * values[-1], np.finfo(float).tiny)
    root: Array = (vectors[:, kept] / np.sqrt(values[kept])).T
    return root
