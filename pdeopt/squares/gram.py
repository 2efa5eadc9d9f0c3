"""Running sums aa' and za' over samples and ranks, and the least-squares problems that they state.

One home for what training by splitting (its weights), the factor A of Kronecker curvature, the last layer of a network
and random features share: everything that linear least squares min sum |X a - z|^2 has to know of its samples.
"""

from __future__ import annotations

import warnings

import torch
from scipy.linalg import blas
from torch import Tensor

from pdeopt.core.errors import InputError, SolveFailure

#: Symmetric rank-k updates of BLAS: half the multiplications of a product, which PyTorch does not offer.
_SYRK = {torch.float32: blas.ssyrk, torch.float64: blas.dsyrk}


def factor_work(n: int) -> int:
    """Multiplications of a Cholesky factorization of n x n numbers, n^3/3 rounded down.

    Counts of work are whole numbers: their sums are then exact (below 2^53) and so the same in any order, as after a
    restart, or over ranks.
    """
    return n**3 // 3


def add_gram(lower: Tensor, a: Tensor) -> None:
    """Add a'a to the lower triangle of a matrix; what is above the diagonal is of no meaning.

    Args:
        lower: (inputs, inputs), contiguous.
        a: (batch, inputs).
    """
    if a.dtype in _SYRK and a.device.type == "cpu" and len(a):
        # the same memory by columns: the transpose, of which the upper triangle is this one's lower
        rows, sums = a.detach().contiguous().numpy(), lower.numpy()
        _SYRK[a.dtype](1.0, rows.T, beta=1.0, c=sums.T, overwrite_c=1)
    else:
        lower.addmm_(a.T, a)


def add_row_gram(lower: Tensor, a: Tensor) -> None:
    """Add aa' to the lower triangle of a matrix; what is above the diagonal is of no meaning.

    Args:
        lower: (rows, rows), contiguous.
        a: (rows, inputs).
    """
    if a.dtype in _SYRK and a.device.type == "cpu" and a.numel():
        rows, sums = a.detach().contiguous().numpy(), lower.numpy()
        _SYRK[a.dtype](1.0, rows.T, beta=1.0, c=sums.T, trans=1, overwrite_c=1)
    else:
        lower.addmm_(a, a.T)


class GramSum:
    """G = sum_s w_s a_s a_s' and R = sum_s v_s z_s a_s' of the samples so far, with the sums of their weights.

    The weights are 1 when a sample comes and fade with `forget`: with `forget(rho)` before each batch, G / sum w is an
    exponential mean without the bias of its start. G and R may forget differently: methods that add increments to
    X keep G over many batches and R for one.

    Args:
        inputs: n, entries of a.
        outputs: m, entries of z; 0 where only G is asked for.
        dtype: of the sums.

    Attributes:
        lower: the lower triangle of G, (inputs, inputs); what is above the diagonal is of no meaning.
        cross: R, (outputs, inputs).
        weights: sum w and sum v.

    Raises:
        InputError: sizes that are no sizes.

    Example:
        >>> sums = GramSum(784, 10)
        >>> sums.add(a, z)                                    # (batch, 784) and (batch, 10)
        >>> X = sums.solve(ridge=1e-3)                        # (10, 784)
    """

    def __init__(self, inputs: int, outputs: int = 0, dtype: torch.dtype = torch.float64) -> None:
        if inputs < 1 or outputs < 0:
            raise InputError("inputs and outputs of a Gram matrix", f"{inputs} and {outputs}", ">= 1 and >= 0")
        self.inputs, self.outputs = inputs, outputs
        self.lower, self.cross = torch.zeros(inputs, inputs, dtype=dtype), torch.zeros(outputs, inputs, dtype=dtype)
        self.weights = (0.0, 0.0)

    @property
    def gram(self) -> Tensor:
        """G, (inputs, inputs); a copy."""
        lower = self.lower.tril()
        return lower + lower.tril(-1).T

    def add(
        self, a: Tensor, z: Tensor | None = None, samples: int | None = None, product: torch.dtype | None = None
    ) -> None:
        """Rows a (batch, inputs) with z (batch, outputs), each of weight 1; or all together of `samples` samples.

        The product of a batch with itself is in the precision `product`, by default that of the sums.
        """
        a = a.to(product or self.lower.dtype)
        if a.dtype == self.lower.dtype:
            add_gram(self.lower, a)
        else:
            part = torch.zeros(self.lower.shape, dtype=a.dtype)
            add_gram(part, a)
            self.lower += part
        self.weights = (self.weights[0] + (len(a) if samples is None else samples), self.weights[1])
        self.add_cross(a, z, samples, a.dtype)

    def add_cross(
        self, a: Tensor, z: Tensor | None, samples: int | None = None, product: torch.dtype | None = None
    ) -> None:
        """The same rows for R alone: those whose aa' is in G already."""
        if z is not None:
            a = a.to(product or self.cross.dtype)
            self.cross += z.to(a).T @ a
        self.weights = (self.weights[0], self.weights[1] + (len(a) if samples is None else samples))

    def forget(self, rho: float, cross: float | None = None) -> None:
        """Multiply the weights of all samples so far, w by rho and v by `cross`, by default rho; in [0, 1]."""
        cross = rho if cross is None else cross
        if not (0.0 <= rho <= 1.0 and 0.0 <= cross <= 1.0):
            raise InputError("forgetting of a Gram matrix", f"{rho} and {cross}", "0 to 1")
        self.lower *= rho
        self.cross *= cross
        self.weights = (rho * self.weights[0], cross * self.weights[1])

    def transform(self, T: Tensor) -> None:
        """Make these the sums of the rows T a instead of a, T (inputs, inputs)."""
        self.lower, self.cross = T @ self.gram @ T.T, self.cross @ T.T

    def merge(self, other: GramSum) -> None:
        """Add the sums of other samples."""
        self.lower += other.lower
        self.cross += other.cross
        self.weights = (self.weights[0] + other.weights[0], self.weights[1] + other.weights[1])

    def solve(
        self, ridge: float = 0.0, prox: float = 0.0, center: Tensor | None = None, factor: Tensor | None = None
    ) -> Tensor:
        """X (G/w + (ridge + prox) I) = R/v + prox center, w and v the sums of the weights; (outputs, inputs).

        Where both forget alike, the minimum of the mean of |X a_s - z_s|^2 plus ridge |X|^2 + prox |X - center|^2.
        Where several X are minima, as with entries of a that are always 0, the one of least norm.

        Args:
            ridge, prox: >= 0.
            center: (outputs, inputs), of the proximal term; default 0.
            factor: what `factor(ridge + prox)` has found, where it is at hand.

        Raises:
            InputError: no samples, or negative numbers.
            SolveFailure: sums that are not finite.
        """
        if min(self.weights) <= 0.0:
            raise InputError("samples of a Gram matrix", 0, ">= 1")
        if not (ridge >= 0.0 and prox >= 0.0):
            raise InputError("ridge and prox of a Gram matrix", f"{ridge} and {prox}", ">= 0")
        right = self.cross / self.weights[1]
        if center is not None:
            right = right + prox * center.to(right)
        factor = self.factor(ridge + prox) if factor is None else factor
        if factor is not None:
            return torch.cholesky_solve(right.T, factor).T
        return self._of_least_norm(ridge + prox, right)

    def square(self, X: Tensor) -> float:
        """The mean of |X a|^2 under G/w, X (rows, inputs)."""
        both = 2.0 * float((X @ self.lower.tril() * X).sum())  # the diagonal twice
        return (both - float((X.square() @ self.lower.diagonal()).sum())) / self.weights[0]

    def factor(self, shift: float) -> Tensor | None:
        """The Cholesky factor of G/w + shift I, (inputs, inputs); None where that is singular to rounding."""
        matrix = self.lower / self.weights[0]
        matrix.diagonal().add_(shift)
        return _cholesky(matrix)

    @property
    def singular(self) -> bool:
        """Whether G is singular to rounding, as with entries of a that are always 0."""
        return _cholesky(self.lower) is None

    @property
    def triangle(self) -> Tensor:
        """The lower triangle of G by rows, (inputs (inputs + 1) / 2,)."""
        return self.lower[self._places()]

    @triangle.setter
    def triangle(self, numbers: Tensor) -> None:
        self.lower[self._places()] = numbers.to(self.lower)

    def _places(self) -> Tensor:
        return torch.ones_like(self.lower, dtype=torch.bool).tril_()

    def _of_least_norm(self, shift: float, right: Tensor) -> Tensor:
        matrix = self.lower / self.weights[0]
        matrix.diagonal().add_(shift)
        if not (bool(matrix.tril().isfinite().all()) and bool(right.isfinite().all())):
            raise SolveFailure("least squares: the sums are not finite", "smaller steps, or scaled samples")
        warnings.warn(
            f"a Gram matrix of {self.inputs} inputs is singular, as with entries that are always 0: of all solutions "
            "the one of least norm is taken; a ridge avoids it",
            stacklevel=3,
        )
        values, vectors = torch.linalg.eigh(matrix)
        keep = values > len(values) * torch.finfo(values.dtype).eps * values[-1]
        inverse = torch.where(keep, 1.0 / values, 0.0)
        solution: Tensor = (right @ vectors * inverse) @ vectors.T
        return solution


def _cholesky(matrix: Tensor) -> Tensor | None:
    """The factor of what a lower triangle stands for, unless a pivot is no more than rounding."""
    factor, info = torch.linalg.cholesky_ex(matrix)
    pivots = factor.diagonal().square()
    is_regular = int(info) == 0 and bool(pivots.min() > len(pivots) * torch.finfo(pivots.dtype).eps * pivots.max())
    return factor if is_regular else None
