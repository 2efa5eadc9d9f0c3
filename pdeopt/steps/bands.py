"""LU of all steps in one call of LAPACK, for steps whose entries stay near the diagonal.

The matrices A_i of the steps stand one after the other on the diagonal of one banded matrix, with zeros between them:
no pivot is sought in another step. A tridiagonal matrix is factored by `dgttrf`, a wider one by `dgbtrf`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import scipy.sparse as sp
import torch
from scipy.linalg import lapack
from scipy.sparse.csgraph import reverse_cuthill_mckee
from scipy.sparse.linalg import splu
from torch import Tensor

from pdeopt.core.arrays import Array
from pdeopt.core.errors import StepFailure
from pdeopt.steps.matrices.products import evenly
from pdeopt.steps.sparse import StepMatrix
from pdeopt.steps.sparsity import Sparsity

#: What happened and what to try, where a step cannot be solved.
NOT_FINITE = ("a step matrix dF/du_new is not finite", "check the residual for NaN, log and division")
SINGULAR_STEP = (
    "a step matrix dF/du_new is singular",
    "check that each step has a unique solution; a smaller time step often mends it",
)

#: Nested dissection fills less than a band where the band is wider than this, and there are more unknowns.
NARROW_BAND, FEW_UNKNOWNS = 4, 16

#: Up to so many unknowns a step, and in fewer rows than that up to `FEW_UNKNOWNS`, all steps are factored as one band:
#: that takes a fifth to a half of the time for a matrix and its first sweeps.
FEW_STATES, MANY_ROWS = 4, 4096

#: `dgttrf` of this SciPy refuses fewer rows.
FEWEST_ROWS = 4


def require_finite(A: StepMatrix) -> None:
    """Raise `StepFailure` where entries are NaN or infinite."""
    finite = A.values.isfinite()
    if not bool(finite.all()):
        raise StepFailure(*NOT_FINITE, row=None if A.is_constant else int((~finite).any(1).nonzero()[0]))


@dataclass(frozen=True)
class Band:
    """A square pattern in an order that puts entries near the diagonal.

    Attributes:
        order: the unknown at each place, (n,).
        places: of the unknowns, (n,).
        is_natural: the order is that of the unknowns.
        width: the largest distance of an entry from the diagonal.
    """

    order: Array
    places: Array
    width: int
    is_natural: bool

    @property
    def is_narrow(self) -> bool:
        """Whether factors fill no less in another order."""
        return self.width <= NARROW_BAND or len(self.order) <= FEW_UNKNOWNS


@lru_cache(maxsize=64)
def band_of(pattern: Sparsity) -> Band:
    """The band of a square pattern, in its own order or, where that is narrower, in reverse Cuthill-McKee order."""
    symmetric = sp.csr_matrix(pattern.csr + pattern.csr.T + sp.eye(pattern.shape[0]))
    orders = np.arange(pattern.shape[0]), np.asarray(reverse_cuthill_mckee(symmetric, symmetric_mode=True))
    return min((_band(pattern, order) for order in orders), key=lambda band: band.width)


def _band(pattern: Sparsity, order: Array) -> Band:
    places = np.argsort(order)
    width = int(np.abs(places[pattern.rows] - places[pattern.cols]).max(initial=0))
    return Band(order, places, width, bool((order == np.arange(len(order))).all()))


@lru_cache(maxsize=16)
def minimum_degree(pattern: Sparsity) -> Array:
    """An order of a square pattern in which factors fill less than a wide band, (n,)."""
    dominant = sp.csc_matrix(pattern.csr + pattern.csr.T + pattern.shape[0] * sp.eye(pattern.shape[0]))
    return np.argsort(splu(dominant, permc_spec="MMD_AT_PLUS_A", options={"SymmetricMode": True}).perm_c)


class BandFactor:
    """LU factors of the matrices A_i in the order of their band.

    Args:
        A: the matrices, (n, n).
        threshold: a row is exchanged only where its entry, on the next diagonal, is larger than the pivot over this;
            1 for partial pivoting. (The matrix is scaled to D A D^-1 with D_j = threshold^j, whose factors are those of
            A, scaled alike.)

    Attributes:
        band: the order, and the width on either side of the diagonal.
        bands: the factors where nothing was `exchanged`, (2 width + 1, batch, n): [width + k, i, j] is the entry at
            place (j + k, j) of step i, of U for k <= 0 and of L, whose diagonal is 1, for k > 0.
        exchanged: whether rows were.

    Raises:
        StepFailure: a step is singular or not finite.
    """

    def __init__(self, A: StepMatrix, threshold: float = 1.0) -> None:
        require_finite(A)
        self._batch, self._n = len(A.values), A.shape[0]
        self.band = band_of(A.sparsity)
        width = self.band.width
        rows, cols = self.band.places[A.sparsity.rows], self.band.places[A.sparsity.cols]
        total = self._batch * self._n
        self._is_tridiagonal = width == 1 and total >= FEWEST_ROWS
        diagonals = 2 * width + 1 if self._is_tridiagonal else 3 * width + 1
        self._storage = np.zeros((diagonals, total), order="C" if self._is_tridiagonal else "F")
        band = self._storage[-2 * width - 1 :]
        scale = threshold ** (np.arange(-width, width + 1) / max(width, 1))[:, None]
        for k in np.unique(rows - cols):
            place = np.flatnonzero(rows - cols == k)
            band[width + k].reshape(self._batch, self._n)[:, evenly(cols[place])] = A.values.numpy()[:, evenly(place)]
        if threshold != 1.0:
            band *= scale
        self._positive = self._factor_positive() if threshold == 1.0 else None
        self._factor()
        if threshold != 1.0:
            band /= scale
        self.bands = band.reshape(len(band), self._batch, self._n)

    def _factor_positive(self) -> tuple[Array, Array] | None:
        """LDL' of a tridiagonal form, which solves twice as fast; None where A is none."""
        a = self._storage
        if not self._is_tridiagonal or not np.array_equal(a[2, :-1], a[0, 1:]):
            return None
        *factors, info = lapack.dpttrf(a[1], a[2, :-1])
        return None if info else (factors[0], factors[1])

    def _factor(self) -> None:
        a, w = self._storage, self.band.width
        if self._is_tridiagonal:
            *_, self._second, self._pivots, info = lapack.dgttrf(a[2, :-1], a[1], a[0, 1:], 1, 1, 1)
            first = 1
        else:
            _, self._pivots, info = lapack.dgbtrf(a, w, w, overwrite_ab=1)
            first = 0  # f2py counts these from 0
        if info > 0:
            raise StepFailure(*SINGULAR_STEP, row=(info - 1) // self._n if self._batch > 1 else None)
        self.exchanged = bool((self._pivots != np.arange(first, first + len(self._pivots))).any())

    def solve(self, rows: Tensor, transpose: bool = False) -> Tensor:
        """The inverse (or its transpose) applied to `rows`, shape (batch, n); any batch for a constant A."""
        right = rows.detach().numpy()
        if not self.band.is_natural:
            right = right[:, self.band.order]
        right = np.array(right, order="C").reshape(-1, self._storage.shape[1]).T  # a copy, each a column
        a, w = self._storage, self.band.width
        if self._positive is not None:
            left, _ = lapack.dpttrs(*self._positive, right, 1)
        elif self._is_tridiagonal:
            factors = (a[2, :-1], a[1], a[0, 1:], self._second, self._pivots)
            left, _ = lapack.dgttrs(*factors, right, "T" if transpose else "N", 1)
        else:
            left, _ = lapack.dgbtrs(a, w, w, right, self._pivots, trans=int(transpose), overwrite_b=1)
        solution = left.T.reshape(rows.shape)
        if not self.band.is_natural:
            given, solution = solution, np.empty_like(solution)
            solution[:, self.band.order] = given
        return torch.from_numpy(solution)


class CoupledBand:
    """Substitution over windows of steps of few unknowns: LU of the matrix over all of them, a narrow band, by LAPACK.

    A_i stands on its diagonal and B_i below, so that rows are exchanged between a step and the next, too.

    Args:
        A, B: the matrices, each one a step or one for all.
        batch: steps.
        starts: rows at which a window starts, whose B does not count, the first of them 0.

    Attributes:
        is_regular: whether no pivot is zero and all numbers are finite; else there is nothing to solve with.
    """

    def __init__(self, A: StepMatrix, B: StepMatrix, batch: int, starts: Array) -> None:
        n = A.shape[0]
        self._below, self._above = 2 * n - 1, n - 1
        diagonal = self._below + self._above  # its row in the storage of LAPACK, which has a column to a row of this
        band = np.zeros((batch, n, diagonal + self._below + 1))
        of_A, of_B = A.sparsity, B.sparsity
        band[:, of_A.cols, diagonal + of_A.rows - of_A.cols] = A.values.numpy()
        coupled = B.values.numpy().repeat(batch, 0) if B.is_constant else B.values.numpy().copy()
        coupled[starts] = 0.0
        band[:-1, of_B.cols, diagonal + n + of_B.rows - of_B.cols] = coupled[1:]
        flat = band.reshape(batch * n, -1).T
        self.is_regular = bool(np.isfinite(band.sum()))
        if self.is_regular:
            self._factor, self._pivots, info = lapack.dgbtrf(flat, self._below, self._above, overwrite_ab=1)
            self.is_regular = info == 0

    @staticmethod
    def fits(n: int, batch: int) -> bool:
        """Whether `batch` steps of n unknowns are small enough."""
        return n <= FEW_STATES or (n <= FEW_UNKNOWNS and n * batch <= MANY_ROWS)

    def forward(self, rows: Tensor) -> Tensor:
        """x with A_i x_i + B_i x_{i-1} = r_i, both (batch, n), x = 0 before each window."""
        return self._solve(rows, transpose=False)

    def backward(self, rows: Tensor) -> Tensor:
        """x with A_i'x_i + B_{i+1}'x_{i+1} = r_i, x = 0 after each window."""
        return self._solve(rows, transpose=True)

    def _solve(self, rows: Tensor, transpose: bool) -> Tensor:
        right = rows.detach().numpy().reshape(-1, 1)
        left, _ = lapack.dgbtrs(self._factor, self._below, self._above, right, self._pivots, trans=int(transpose))
        return torch.from_numpy(left.reshape(rows.shape))
