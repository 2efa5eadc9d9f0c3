"""The precision of a Gaussian prior, the inverse of its covariance: products, solves, samples and variances."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.linalg as la
import scipy.sparse as sp
from scipy.sparse.linalg import splu

from pdeopt.core.arrays import Array
from pdeopt.core.errors import InputError
from pdeopt.steps.sparse import StepMatrix

#: A matrix with a larger part of its entries is stored and factored as a dense one.
DENSE = 0.1

#: Columns of the covariance that are solved for at a time.
COLUMNS = 256


class Precision:
    """P = R R', symmetric and positive definite, sparse or dense.

    A sparse one is factored as L D L' by SuperLU without exchanges of rows, and R is L D^1/2 with its rows in their own
    order. R^-T is P^-1 R, which needs no triangular solve.

    Args:
        matrix: P, scipy or dense, (n, n).
        n: its size.

    Raises:
        InputError: no such matrix.
    """

    def __init__(self, matrix: Any, n: int) -> None:
        csr = StepMatrix.form(matrix, n, "precision").as_csr()
        self.size = n
        self._solve: Callable[[Array], Array]
        self.matrix: sp.csr_matrix | Array
        if csr.nnz > DENSE * n * n:
            self.matrix = csr.toarray()
            self._root = la.cholesky(self.matrix, lower=True)
            self._solve = lambda w: la.cho_solve((self._root, True), w)
        else:
            self.matrix = csr
            words = {"permc_spec": "MMD_AT_PLUS_A", "diag_pivot_thresh": 0.0, "options": {"SymmetricMode": True}}
            factor = splu(csr.tocsc(), **words)
            pivots = factor.U.diagonal()
            if not (pivots > 0).all() or not np.array_equal(factor.perm_r, factor.perm_c):
                raise InputError("precision", "a matrix that is not positive definite to rounding", "one that is")
            self._root = (factor.L @ sp.diags(np.sqrt(pivots))).tocsr()[factor.perm_r]
            self._solve = factor.solve

    def multiply(self, d: Array) -> Array:
        """P d, for (n,) or (n, k)."""
        return np.asarray(self.matrix @ d)

    def solve(self, w: Array) -> Array:
        """P^-1 w, for (n,) or (n, k)."""
        return np.asarray(self._solve(np.ascontiguousarray(w)))

    def sample(self, noise: Array) -> Array:
        """R^-T w: samples of N(0, P^-1) from white noise, for (n,) or (n, k)."""
        return self.solve(np.asarray(self._root @ noise))

    def whiten(self, w: Array) -> Array:
        """R^-1 w, the transpose of `sample`, for (n,) or (n, k)."""
        return np.asarray(self._root.T @ self.solve(w))

    def variance(self) -> Array:
        """The diagonal of P^-1, (n,)."""
        parts = []
        for start in range(0, self.size, COLUMNS):
            stop = min(start + COLUMNS, self.size)
            unit = np.zeros((self.size, stop - start))
            unit[np.arange(start, stop), np.arange(stop - start)] = 1.0
            parts.append(self.solve(unit)[start:stop].diagonal())
        return np.concatenate(parts)
