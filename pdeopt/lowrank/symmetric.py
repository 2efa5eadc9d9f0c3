"""Symmetric factors of hierarchical matrices: H + shift = S S', exact, or of small rank and still positive definite.

A cluster with children 1 and 2 has, with C = S_1^-1 H_12 S_2^-T = P diag(s) Q',

    H + shift = diag(S_1, S_2) (I + Z diag(s, -s) Z') diag(S_1, S_2)',   Z = [P P; Q -Q] / sqrt(2),

so S = diag(S_1, S_2) (I + Z (sqrt(1 + s, 1 - s) - 1) Z'); s < 1, as H + shift is positive definite. Scaled blocks and
their cutting as in J. Xia, Z. Xin, Effective and robust preconditioning of general SPD matrices via structured
incomplete factorization, SIAM J. Matrix Anal. Appl. 38, 2017. A factor of small rank keeps the largest s of each C;
every s that is left is below 1, so that S S' is positive definite whatever is cut. The C themselves are those of the
exact S: cut on the way up, S_1 S_1' would be below H_11 + shift here and there, and s may then reach 1 further up.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pdeopt.core.errors import SolveFailure
from pdeopt.lowrank.clusters import TreeLevel
from pdeopt.lowrank.hodlr import HierarchicalKernel, columns, sibling_svd
from pdeopt.lowrank.kernels import Array

REMEDY = "a larger -lambda, or a smaller -hier_rtol, which is to stay below lambda / |K|"

#: Columns up to which products are NumPy's.
FEW_COLUMNS = 4

EPS = float(np.finfo(float).eps)


class SymmetricFactor:
    """S with S S' = H + shift, or near it, as a product of factors by levels.

    Args:
        matrix: H.
        shift: lambda.
        rank: singular values of a C that are kept at most; 0 for all.
        cut: those up to this are left out, of 0..1; with 0 and rank 0 the factor is exact.

    Attributes:
        ranks: singular values that are kept, by levels, the largest blocks first, as of this rank.

    Raises:
        SolveFailure: H + shift is not positive definite, on all ranks. As K + shift is, H is too coarse.

    Example:
        >>> S = SymmetricFactor(H, 0.1)
        >>> alpha = H.to_points(S.solve(H.from_points(y)))     # (H + 0.1)^-1 y
        >>> sample = H.to_points(S.product(noise))             # of the Gaussian process with covariance H + 0.1
    """

    def __init__(self, matrix: HierarchicalKernel, shift: float, rank: int = 0, cut: float = 0.0) -> None:
        self.matrix, self.shift = matrix, shift
        tree, empty = matrix.tree, np.zeros((len(matrix.tree.order), 0))
        leaves = torch.from_numpy(matrix.diagonals) + shift * torch.eye(tree.leaf, dtype=torch.float64)
        self._leaves, info = torch.linalg.cholesky_ex(leaves)
        self._require(not bool(info.any()))
        # The bases of all levels in one table, those of the largest blocks first; S^-1 of each level comes to them.
        ends = np.cumsum([0, *(each.shape[-1] for each in matrix.bases)])
        table = self._leaf_solve(torch.from_numpy(np.concatenate([empty, *map(_flat, matrix.bases)], axis=1)))
        self._levels: list[_LevelFactor] = []
        definite = True
        for k in reversed(range(tree.depth if tree.leaves else 0)):
            level = tree.levels[k]
            own = table[:, ends[k] : ends[k + 1]].reshape(level.clusters, level.size, -1)
            vectors, s = sibling_svd(level, own.numpy())
            definite &= bool((s < 1.0).all())
            exact = _LevelFactor(level, vectors, np.minimum(s, 1.0 - EPS))
            exact.apply(table[:, : ends[k]], -0.5)
            self._levels.append(exact.kept(rank, cut))
        self._require(definite)
        self.ranks = [each.s.shape[1] for each in reversed(self._levels)]

    @property
    def numbers(self) -> int:
        """That this rank keeps: half the multiplications of a solve."""
        return int(self._leaves.numel() + sum(each.vectors.numel() for each in self._levels))

    @property
    def nbytes(self) -> int:
        """Memory of the factor, in bytes, of all ranks. Collective."""
        return int(self.matrix.tree.sum(8 * self.numbers))

    def solve(self, b: Array) -> Array:
        """(S S')^-1 b of this rank's slots, (slots,) or (slots, k). Collective."""
        return self.half_solve(self.half_solve(b), transpose=True)

    def half_solve(self, b: Array, transpose: bool = False) -> Array:
        """S^-1 b, or S^-T b: of length sqrt(b.(S S')^-1 b). Collective."""
        x = torch.from_numpy(columns(b))
        if transpose:
            x = x.clone()
            for level in reversed(self._levels):
                level.apply(x, -0.5)
            return _array(self._leaf_solve(x, transpose=True), b)
        x = self._leaf_solve(x)
        for level in self._levels:
            level.apply(x, -0.5)
        return _array(x, b)

    def product(self, x: Array, transpose: bool = False) -> Array:
        """S x, or S'x. Collective."""
        y = torch.from_numpy(columns(x)).clone()
        if transpose:
            y = (self._leaves.mT @ self._by_leaves(y)).reshape(y.shape)
            for level in self._levels:
                level.apply(y, 0.5)
            return _array(y, x)
        for level in reversed(self._levels):
            level.apply(y, 0.5)
        return _array(self._leaves @ self._by_leaves(y), x)

    def log_determinant(self) -> float:
        """log det(S S'). Collective."""
        tree = self.matrix.tree
        pivots = torch.log(self._leaves.diagonal(dim1=1, dim2=2)).numpy().reshape(-1)
        own = 2.0 * float(pivots @ tree.real) + sum(level.log_determinant() for level in self._levels)
        return float(tree.sum(own))

    def _by_leaves(self, x: Tensor) -> Tensor:
        return x.reshape(len(self._leaves), self.matrix.tree.leaf, x.shape[1])

    def _leaf_solve(self, x: Tensor, transpose: bool = False) -> Tensor:
        leaves = self._leaves.mT if transpose else self._leaves
        found: Tensor = torch.linalg.solve_triangular(leaves, self._by_leaves(x), upper=transpose)
        return found.reshape(x.shape)

    def _require(self, definite: bool) -> None:
        if self.matrix.tree.comm.allreduce(int(not definite)):
            raise SolveFailure("hierarchical matrix: not positive definite with this shift", REMEDY)


class _LevelFactor:
    """I + Z diag(s, -s) Z' of all pairs of a level, and its powers; s (pairs, q), `vectors` P and Q of the clusters."""

    def __init__(self, level: TreeLevel, vectors: Array, s: Array) -> None:
        self.level, self.s, self.vectors = level, s, torch.from_numpy(np.ascontiguousarray(vectors))

    def kept(self, rank: int, cut: float) -> _LevelFactor:
        """With the largest s only."""
        width = int((self.s > cut).sum(axis=1).max(initial=0))
        width = min(width, rank) if rank else width
        s = np.where(self.s > cut, self.s, 0.0)
        return _LevelFactor(self.level, self.vectors[..., :width].numpy(), s[:, :width])

    def apply(self, x: Tensor, power: float) -> None:
        """Multiply x, (slots, k), by the power of the matrix, in place. Collective."""
        plus, minus = (1.0 + self.s) ** power - 1.0, (1.0 - self.s) ** power - 1.0
        own = x.view(self.vectors.shape[0], self.vectors.shape[1], x.shape[1])
        few = x.shape[1] <= FEW_COLUMNS  # where NumPy is five times as fast as PyTorch
        vectors = self.vectors.numpy()
        products = np.swapaxes(vectors, 1, 2) @ own.numpy() if few else (self.vectors.mT @ own).numpy()
        parts = self.level.pairs(products)  # (pairs, 2, q, k)
        same, other = (0.5 * each[:, None, :, None] for each in (plus + minus, plus - minus))
        mixed = self.level.own(same * parts + other * parts[:, ::-1])
        if few:
            own += torch.from_numpy(vectors @ mixed)
        else:
            own.baddbmm_(self.vectors, torch.from_numpy(mixed))

    def log_determinant(self) -> float:
        """Of this rank's share."""
        total = float(np.sum(np.log1p(-(self.s**2))))
        return total if self.level.team is None else total / self.level.team.size


def _array(found: Tensor, like: Array) -> Array:
    values: Array = found.numpy().reshape(like.shape)
    return values


def _flat(bases: Array) -> Array:
    return bases.reshape(bases.shape[0] * bases.shape[1], bases.shape[2])
