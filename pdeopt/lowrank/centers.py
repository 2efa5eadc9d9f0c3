"""Preconditioners of kernel matrices by some of the points: low rank of the whole matrix at once.

Z. Frangella, J. A. Tropp, M. Udell, Randomized Nystrom preconditioning, SIAM J. Matrix Anal. Appl. 44, 2023.
"""

from __future__ import annotations

import numpy as np
import scipy.linalg
from mpi4py import MPI

from pdeopt.core.errors import InputError
from pdeopt.lowrank.hodlr import HierarchicalKernel, columns
from pdeopt.lowrank.kernels import Array
from pdeopt.lowrank.pivoted import inverse_root


class CenterFactor:
    """(K_xc K_cc^-1 K_cx + shift)^-1 of some points c, spread evenly over the leaves of the tree. Collective.

    K less the product is positive semidefinite: all eigenvalues of the preconditioned matrix are >= 1, and those beyond
    are few where the eigenvalues of K fall fast. n centers numbers, as a factor by blocks of rank centers / depth.

    Args:
        matrix: H, whose kernel and points are taken.
        shift: lambda.
        centers: number of points c, <= n.

    Attributes:
        ranks: of the product, a list of one.

    Raises:
        InputError: more centers than points.
    """

    def __init__(self, matrix: HierarchicalKernel, shift: float, centers: int) -> None:
        tree = matrix.tree
        if not 1 <= centers <= tree.n:
            raise InputError("-hier_centers", centers, f"1 .. {tree.n}, as many as points")
        self.matrix, self.shift = matrix, shift
        filled = np.flatnonzero(tree.order >= 0)
        begin = sum(tree.comm.allgather(len(filled))[: tree.comm.rank])
        places = (np.arange(centers) + 0.5) * tree.n // centers - begin
        here = np.flatnonzero((places >= 0) & (places < len(filled)))
        points = np.zeros((centers, tree.dim))
        points[here] = tree.points[filled[places[here].astype(int)]]
        tree.comm.Allreduce(MPI.IN_PLACE, points)
        rows = inverse_root(matrix.kernel.block(points, points)) @ matrix.kernel.block(points, tree.points)
        self._rows: Array = rows * tree.real
        core = tree.sum(self._rows @ self._rows.T)
        core[np.diag_indices(len(core))] += shift
        self._core = scipy.linalg.cho_factor(core, lower=True)
        self.ranks = [len(core)]

    @property
    def nbytes(self) -> int:
        """Memory of the factor, in bytes, of all ranks. Collective."""
        return int(self.matrix.tree.sum(self._rows.nbytes + self._core[0].nbytes))

    def solve(self, b: Array) -> Array:
        """The inverse times b, of this rank's slots, (slots,) or (slots, k). Collective."""
        x = columns(b)
        inner = scipy.linalg.cho_solve(self._core, self.matrix.tree.sum(self._rows @ x))
        found: Array = (x - self._rows.T @ inner) / self.shift
        return found.reshape(b.shape)
