"""A Jacobian as a matrix of which each rank has some rows, or some columns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pdeopt.squares.share import Share


@dataclass(frozen=True)
class SharedJacobian:
    """J, (m, n), by rows or by columns of the ranks of a team; all vectors are whole, on every rank.

    Products with d and w are of double precision and on the host outside, inside of the precision of the matrix, and
    where it is: a device keeps its rows.

    Attributes:
        matrix: this rank's part.
        rows, columns: this rank's; all, but for one of the two.
    """

    matrix: Tensor
    rows: Share
    columns: Share

    @classmethod
    def alone(cls, matrix: Tensor) -> SharedJacobian:
        """That of one rank."""
        return cls(matrix, Share(None, matrix.shape[0]), Share(None, matrix.shape[1]))

    @property
    def entries(self) -> int:
        """Of the whole."""
        return self.rows.size * self.columns.size

    def forward(self, d: Tensor) -> Tensor:
        """J d, (m,). Collective."""
        return self.rows.gather(self.forward_own(d[self.columns.own]))

    def backward(self, w: Tensor) -> Tensor:
        """J'w, (n,). Collective."""
        return self.columns.gather(self.rows.total(self.backward_own(w[self.rows.own])))

    def forward_own(self, d: Tensor) -> Tensor:
        """The rows of this rank of J d, from its columns of d. Collective where columns are shared."""
        return self.columns.total((self.matrix @ d.to(self.matrix)).double().cpu())

    def backward_own(self, w: Tensor) -> Tensor:
        """This rank's part of J'w, from its rows of w."""
        return (self.matrix.T @ w.to(self.matrix)).double().cpu()

    def diagonal(self) -> Tensor:
        """Of J'J, (n,). Collective."""
        own = torch.linalg.vector_norm(self.matrix, dim=0, dtype=torch.float64).square().cpu()
        return self.columns.gather(self.rows.total(own))

    def masked(self, free: Tensor) -> SharedJacobian:
        """With zeros in the columns that are not free.

        Args:
            free: (n,), 1 or 0.
        """
        return SharedJacobian(self.matrix * free[self.columns.own].to(self.matrix), self.rows, self.columns)
