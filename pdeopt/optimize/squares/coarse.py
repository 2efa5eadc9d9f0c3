"""Coarse spaces for conjugate gradients on J'J + lam d: few vectors that stand for what all rows see."""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from pdeopt.optimize.squares.sharedjacobian import SharedJacobian
from pdeopt.squares.gram import add_row_gram
from pdeopt.squares.share import Share

#: As the option says.
COARSE_SPACES = ("rows", "spectral", "parts", "none")


class Coarse(Protocol):
    """An approximate inverse of J'J + lam d that is exact, or nearly so, on a few vectors.

    Vectors are those of this rank's unknowns. All calls are collective where unknowns are shared; multiplications are
    those of all ranks.
    """

    multiplications: float

    def set_damping(self, lam: float) -> None:
        """Prepare for this lam > 0."""

    def solve(self, s: Tensor) -> Tensor:
        """The approximate inverse times s, positive definite."""


class CoarseRows:
    """The inverse for some of the rows, weighted as if they were all: by Woodbury's identity.

        ((m/k) S'S + lam d)^-1 = (1 - W'(WW' + lam)^-1 W) / (lam d),    W = (m / (k d))^1/2 S

    Residuals of an equation at neighboring points have nearly the same gradient, so a few hundred rows tell what J'J
    is in all directions in which it is not small.

    Args:
        S: k rows of J, this rank's columns of them, (k, own).
        rows: m.
        d: mean diagonal of J'J.
        columns: this rank's.
    """

    def __init__(self, S: Tensor, rows: int, d: float, columns: Share) -> None:
        k = len(S)
        self.W, self.d, self.columns = S.double() * math.sqrt(rows / (k * d)), d, columns
        gram = torch.zeros(k, k, dtype=torch.float64)
        add_row_gram(gram, self.W)
        self.gram, self.lam = columns.total_square(gram), math.nan
        self.multiplications = 0.5 * columns.size * k**2

    def set_damping(self, lam: float) -> None:
        self.lam, largest = lam, float(self.gram.diagonal().max())
        for floor in (0.0, 1e-15, 1e-13, 1e-11):  # rounding of WW' must not make it indefinite
            matrix = self.gram.clone()
            matrix.diagonal().add_(max(lam, floor * len(matrix) * largest))
            self.factor, info = torch.linalg.cholesky_ex(matrix)
            if int(info) == 0:
                break
        self.multiplications += len(matrix) ** 3 / 6.0

    def solve(self, s: Tensor) -> Tensor:
        y = torch.cholesky_solve(self.columns.total(self.W @ s)[:, None], self.factor)[:, 0]
        return (s - self.W.T @ y) / (self.lam * self.d)


class CoarseBasis:
    """Galerkin's inverse in the span of orthonormal vectors U that diagonalize U'J'JU = diag(w), and 1 / c elsewhere.

    c = lam d + the least w: for the leading eigenvectors of J'J that is right, and then few steps are left (J.
    Frangella, J. A. Tropp, M. Udell, Randomized Nystrom preconditioning, SIAM J. Matrix Anal. Appl. 44, 2023).

    Args:
        J: the Jacobian, this rank's columns of it.
        vectors: this rank's part of the vectors, (own, k), which are made orthonormal.
        d: mean diagonal of J'J.
        is_spectral: whether they are nearly eigenvectors.
    """

    def __init__(self, J: SharedJacobian, vectors: Tensor, d: float, is_spectral: bool) -> None:
        self.d, self.columns = d, J.columns
        Q = self._orthonormal(vectors.double())
        JQ = J.columns.total((J.matrix @ Q.to(J.matrix.dtype)).double())
        self.w, V = (self.columns.agreed(part) for part in torch.linalg.eigh(JQ.T @ JQ))
        self.U = Q @ V
        self.rest = max(float(self.w[0]), 0.0) if is_spectral and len(self.w) else d
        self.multiplications = float(J.entries * self.U.shape[1])
        self.set_damping(1.0)

    def _orthonormal(self, vectors: Tensor) -> Tensor:
        """The same span, without what is rounding alone."""
        for _ in range(2):
            gram = self.columns.total(vectors.T @ vectors)
            w, V = (self.columns.agreed(part) for part in torch.linalg.eigh(gram))
            keep = w > 1e-14 * len(w) * w[-1]
            vectors = vectors @ (V[:, keep] / w[keep].sqrt())
        return vectors

    def set_damping(self, lam: float) -> None:
        self.inverse, self.beyond = 1.0 / (self.w.clamp(min=0.0) + lam * self.d), 1.0 / (self.rest + lam * self.d)

    def solve(self, s: Tensor) -> Tensor:
        c = self.columns.total(self.U.T @ s)
        found: Tensor = self.U @ ((self.inverse - self.beyond) * c) + self.beyond * s
        return found

    def solve_within(self, s: Tensor) -> Tensor:
        """The part of `solve` in the span alone, positive semidefinite."""
        found: Tensor = self.U @ (self.inverse * self.columns.total(self.U.T @ s))
        return found


def spectral(J: SharedJacobian, k: int) -> Tensor:
    """k vectors of this rank's unknowns near the leading eigenvectors of J'J: J' times random ones, (own, k)."""
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(J.matrix.shape[0], k, generator=generator, dtype=torch.float64)
    return (J.matrix.T @ random.to(J.matrix.dtype)).double()
