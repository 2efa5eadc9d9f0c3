"""Anderson acceleration of a fixed-point iteration x <- g(x)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

#: Singular values of the least squares that count as zero, relative to the largest.
RCOND = 1e-10

#: The residual may grow by this from one iteration to the next; where it grows more, the memory is emptied.
GROWTH = 2.0


class Anderson:
    """x = g_k - sum_j gamma_j (g_{j+1} - g_j), where gamma minimizes |f_k - sum_j gamma_j (f_{j+1} - f_j)|, f = g - x.

    D. G. Anderson, Iterative procedures for nonlinear integral equations, J. ACM 12, 1965, in the form of H. F. Walker,
    P. Ni, SIAM J. Numer. Anal. 49, 2011, who show that it is GMRES where g is affine. For ADMM: J. Zhang, Y. Peng,
    W. Ouyang, B. Deng, ACM Trans. Graph. 38, 2019.

    Args:
        depth: differences that are remembered.
        gram: inner products of stacked vectors, (m, ...) -> (m, m), over all ranks.

    Example:
        >>> anderson = Anderson(10, lambda columns: columns @ columns.T)
        >>> for _ in range(20):
        ...     x = anderson.next(x, g(x))
    """

    def __init__(self, depth: int, gram: Callable[[Tensor], Tensor]) -> None:
        self.depth, self.gram = depth, gram
        self.x: list[Tensor] = []
        self.g: list[Tensor] = []
        self.last = float("inf")

    def clear(self) -> None:
        """Forget what was seen, as where g has changed."""
        self.x, self.g, self.last = [], [], float("inf")

    def next(self, x: Tensor, g: Tensor) -> Tensor:
        """The point after x, of which g is the image. Collective.

        Args:
            x, g: of equal shape.
        """
        self.x, self.g = [*self.x, x][-self.depth - 1 :], [*self.g, g][-self.depth - 1 :]
        f = torch.stack(self.g) - torch.stack(self.x)
        gram = self.gram(torch.cat([f.diff(dim=0), f[-1:]]))
        size = max(float(gram[-1, -1]), 0.0) ** 0.5
        grows, self.last = not size <= GROWTH * self.last, size
        if grows:
            self.x, self.g = [x], [g]
        if len(self.x) == 1:
            return g
        scale = gram.diagonal()[:-1].clamp_min(0).sqrt().clamp_min(1e-300)
        normal = torch.linalg.pinv(gram[:-1, :-1] / scale[:, None] / scale, rtol=RCOND, hermitian=True)
        gamma = normal @ (gram[:-1, -1] / scale) / scale
        return g - torch.einsum("j,j...->...", gamma, torch.stack(self.g).diff(dim=0))
