"""Hierarchical matrices: a symmetric kernel matrix whose off-diagonal blocks have low rank, on every level.

HODLR: S. Ambikasaran, E. Darve, An O(N log N) fast direct solver for partial hierarchically semi-separable matrices,
J. Sci. Comput. 57, 2013, section 2.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from pdeopt.core.errors import InputError
from pdeopt.lowrank.clusters import ClusterTree, TreeLevel
from pdeopt.lowrank.cross import cross_bases
from pdeopt.lowrank.kernels import Array, Kernel


class HierarchicalKernel:
    """K ~ H of all points: dense blocks at the leaves, U V' between siblings of each level.

    With r the rank of the blocks: n (leaf + r log2(n / leaf)) numbers, and as many multiplications a product. Blocks
    of kernels in few dimensions have low rank; in many, as of images, they have not, and H is no gain: `ranks` says.

    Vectors are in the order of the tree's slots, this rank's part, (slots,) or (slots, k), with 0 in empty slots;
    `from_points` and `to_points` are between these and the points in their own order.

    Args:
        kernel: k.
        points: (n, d), all of them on each rank.
        leaf: most points of a leaf.
        rtol: the Frobenius norm of the error of a block is at most rtol times that of the block and its diagonal.
        most_rank: no block gets more columns, however large the error; 0 for no limit.
        comm: mpi4py communicator of the ranks that share H; default this one alone.

    Attributes:
        tree: the clusters.
        diagonals: (leaves, leaf, leaf) matrices of the leaves, 1 on the diagonal of empty slots.
        bases: for each level (clusters, size, r), U of the first of two siblings and V of the second.

    Raises:
        InputError: points that are no table of finite numbers, or numbers out of range.

    Example:
        >>> H = HierarchicalKernel(Gaussian(0.2), x, rtol=1e-8)
        >>> y = H.to_points(H.product(H.from_points(weights)))
    """

    def __init__(
        self, kernel: Kernel, points: Any, leaf: int = 128, rtol: float = 1e-8, most_rank: int = 0, comm: Any = None
    ) -> None:
        if not 0.0 < rtol < 1.0:
            raise InputError("rtol of a hierarchical matrix", rtol, "a number > 0 and < 1")
        if most_rank < 0:
            raise InputError("most_rank of a hierarchical matrix", most_rank, "an integer >= 0")
        self.kernel, self.rtol, self.tree = kernel, rtol, ClusterTree(points, leaf, comm)
        tree = self.tree
        x = tree.points.reshape(tree.leaves, tree.leaf, tree.dim)
        present = tree.real.reshape(tree.leaves, tree.leaf)
        self.diagonals = kernel.block(x, x)
        empty = np.nonzero(present == 0.0)
        self.diagonals[empty] = 0.0
        self.diagonals[empty[0], :, empty[1]] = 0.0
        self.diagonals[empty[0], empty[1], empty[1]] = 1.0
        scale = tree.sum(float(np.sum((kernel.diagonal(tree.points) * tree.real) ** 2))) / tree.n
        self.bases: list[Array] = []
        self._ranks: list[int] = []
        self._errors: list[float] = []
        for level in tree.levels:
            bases, left = cross_bases(tree, level, kernel, rtol, most_rank or tree.n, scale)
            tolerance = 0.1 * rtol * np.sqrt(level.slots * scale)
            self.bases.append(_shortened(level, bases, tolerance))
            self._ranks.append(self.bases[-1].shape[-1])
            self._errors.append(float(np.sum(left**2)) / (1 if level.team is None else level.team.size))

    @property
    def ranks(self) -> list[int]:
        """Largest rank of a block, by levels, the largest blocks first. Collective."""
        return [max(each) for each in zip(*self.tree.comm.allgather(self._ranks))]

    def block_ranks(self) -> list[list[int]]:
        """Of all blocks of each level, in order, the largest blocks first; on each rank. Collective."""
        own: list[list[int]] = []
        for level, bases in zip(self.tree.levels, self.bases):
            filled = (level.pairs(np.abs(bases).sum(axis=1)) > 0.0).sum(axis=-1)[:, 0]
            own.append([int(rank) for rank in filled] if level.team is None or level.team.rank == 0 else [])
        return [[rank for part in level for rank in part] for level in zip(*self.tree.comm.allgather(own))]

    @property
    def error(self) -> float:
        """Estimate of the Frobenius norm of K - H, from sampled rows. Collective."""
        return float(np.sqrt(2.0 * self.tree.sum(sum(self._errors))))

    @property
    def nbytes(self) -> int:
        """Memory of H, in bytes, of all ranks. Collective."""
        return int(self.tree.sum(self.diagonals.nbytes + sum(each.nbytes for each in self.bases)))

    def product(self, x: Array) -> Array:
        """H x. Collective."""
        width = columns(x).shape[1]
        y: Array = (self.diagonals @ x.reshape(*self.diagonals.shape[:2], width)).reshape(len(x), width)
        for level, bases in zip(self.tree.levels, self.bases):
            parts = level.pairs(np.swapaxes(bases, 1, 2) @ x.reshape(*bases.shape[:2], width))
            y += (bases @ level.own(parts[:, ::-1])).reshape(y.shape)
        return y.reshape(x.shape)

    def diagonal(self) -> Array:
        """Of this rank's slots, (slots,)."""
        found: Array = np.diagonal(self.diagonals, axis1=1, axis2=2).reshape(-1)
        return found

    def from_points(self, values: Any) -> Array:
        """Values of all points, (n,) or (n, k) on each rank, by this rank's slots."""
        values = np.asarray(values, dtype=float)
        if values.shape[:1] != (self.tree.n,) or values.ndim > 2:
            raise InputError(
                "values at the points of a hierarchical matrix", values.shape, f"({self.tree.n},) or (.., k)"
            )
        found: Array = (values[self.tree.order].T * self.tree.real).T
        return found

    def to_points(self, slots: Array) -> Array:
        """Values of this rank's slots, of all ranks and by points: the same (n, ...) on each. Collective."""
        found = np.zeros((self.tree.n, *slots.shape[1:]))
        present = self.tree.order >= 0
        found[self.tree.order[present]] = slots[present]
        total: Array = self.tree.sum(found)
        return total


def columns(x: Array) -> Array:
    """(slots, k) of (slots,) or (slots, k), also where there are no slots."""
    return x if x.ndim == 2 else x[:, None]


def sibling_svd(level: TreeLevel, left: Array) -> tuple[Array, Array]:
    """Singular vectors and values of U V' of each pair, U and V in `left` (clusters, size, r). Collective.

    Tall QR factorizations, of the parts of all ranks and then of their triangles, and an SVD of R_1 R_2'.

    Returns:
        P of the first and Q of the second of each pair, (clusters, size, q), and s (pairs, q), with U V' = P s Q'.
    """
    basis, triangle = (each.numpy() for each in torch.linalg.qr(torch.from_numpy(left)))
    if level.team is None:
        triangles = triangle.reshape(len(left) // 2, 2, *triangle.shape[1:])
    else:
        parts = np.stack(level.team.allgather(triangle[0]))  # (ranks, q, r), as all have the same number of slots
        half = level.team.size // 2
        small, triangles = np.linalg.qr(parts.reshape(2, half * parts.shape[1], parts.shape[2]))
        own = small[level.side].reshape(half, parts.shape[1], -1)[level.team.rank % half]
        basis, triangles = basis @ own, triangles[None]
    u, s, v = np.linalg.svd(triangles[:, 0] @ np.swapaxes(triangles[:, 1], -1, -2))
    return basis @ level.own(np.stack([u, np.swapaxes(v, -1, -2)], axis=1)), s


def _shortened(level: TreeLevel, bases: Array, tolerance: float) -> Array:
    """Bases of as few columns as the Frobenius norm of the change allows; columns are of length sqrt(s)."""
    if bases.shape[-1] == 0 or len(bases) == 0:
        return bases
    vectors, s = sibling_svd(level, bases)
    tails = np.sqrt(np.cumsum(s[:, ::-1] ** 2, axis=-1))[:, ::-1]
    needed = tails > tolerance
    width = int(needed.sum(axis=-1).max())
    roots = np.sqrt(s * needed)[:, None].repeat(2, axis=1)  # (pairs, 2, q)
    shortened: Array = np.ascontiguousarray((vectors * level.own(roots)[:, None])[..., :width])
    return shortened
