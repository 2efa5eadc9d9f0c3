"""Cluster trees: points in an order in which neighbors are near, by halves, and who owns which of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray

from pdeopt.core.errors import InputError
from pdeopt.functions.border import described, real
from pdeopt.lowrank.kernels import FEW, Array

Indices = NDArray[np.int64]

#: Steps of the power method for the direction of a cluster in many dimensions.
POWER_STEPS = 8

#: Where a communicator keeps the groups of its ranks that share nodes.
_GROUPS = MPI.Comm.Create_keyval()


@dataclass(frozen=True)
class TreeLevel:
    """The clusters of one depth, as this rank holds them, in pairs of siblings.

    Where there are fewer pairs than ranks, a pair is shared: the first half of `team` has the slots of its first
    cluster, the other half those of the second.

    Attributes:
        depth: 1 for the two halves of all points, and so on.
        clusters: of which this rank has slots; 1 where it shares a pair.
        size: slots that it has of each.
        team: communicator of those that share a pair; None where this rank has whole pairs.
    """

    depth: int
    clusters: int
    size: int
    team: Any = None

    @property
    def side(self) -> int:
        """Of a shared pair: whether this rank belongs to the first cluster, 0, or to the second, 1."""
        return int(self.team.rank >= self.team.size // 2)

    @property
    def slots(self) -> int:
        """Slots of a cluster, on all ranks that share it."""
        return self.size if self.team is None else self.size * self.team.size // 2

    def pairs(self, own: Array) -> Array:
        """Sums of the clusters, (clusters, ...) from the slots of this rank: whole, (pairs, 2, ...). Collective."""
        if self.team is None:
            return own.reshape(len(own) // 2, 2, *own.shape[1:])
        both = np.zeros((1, 2, *own.shape[1:]))
        both[0, self.side] = own[0]
        self.team.Allreduce(MPI.IN_PLACE, both)
        return both

    def own(self, pairs: Array) -> Array:
        """Of values of all pairs, (pairs, 2, ...), those of this rank's clusters: (clusters, ...)."""
        if self.team is None:
            return pairs.reshape(2 * len(pairs), *pairs.shape[2:])
        return pairs[:, self.side]


class ClusterTree:
    """Points, halved again and again across their principal direction, until a leaf has few.

    All leaves have the same number of slots, so that the matrices of a level are one array. A slot without a point
    is empty; a leaf has at most one or two of them. Leaves are dealt out in a row to the largest power of two of
    ranks; further ranks have none.

    Args:
        points: (n, d), all of them on each rank.
        leaf: most slots of a leaf, >= 2.
        comm: mpi4py communicator; default this rank alone.

    Attributes:
        n, dim: points and their dimension.
        depth: 0 where all points are one leaf.
        leaf: slots of a leaf.
        levels: of depth 1 to `depth`.
        order: (slots of this rank,) index of a slot's point, -1 where it is empty.
        points: (slots, d); `real` (slots,): 1, or 0 where a slot is empty.
        team: communicator of the ranks that have leaves; None on the others.

    Raises:
        InputError: points that are no table of finite numbers, or a leaf < 2.

    Example:
        >>> tree = ClusterTree(x)
        >>> x[tree.order[tree.order >= 0]]                     # neighbors are near
    """

    def __init__(self, points: Any, leaf: int = 128, comm: Any = None) -> None:
        table = table_of(points)
        if leaf < 2:
            raise InputError("leaf of a cluster tree", leaf, "an integer >= 2")
        self.comm = MPI.COMM_SELF if comm is None else comm
        self.n, self.dim = table.shape
        self.depth = max(0, math.ceil(math.log2(self.n / leaf)))
        self.leaf = -(-self.n >> self.depth)
        order = self.comm.bcast(_halved(table, self.depth) if self.comm.rank == 0 else None)
        shared = min(self.depth, self.comm.size.bit_length() - 1)  # levels whose clusters several ranks share
        self.team, teams = _teams(self.comm, shared)
        leaves = 0 if self.team is None else 1 << (self.depth - shared)
        begin = self.comm.rank * leaves * self.leaf
        self.order: Indices = order[begin : begin + leaves * self.leaf]
        self.real: Array = (self.order >= 0).astype(float)
        self.points: Array = table[self.order] * self.real[:, None]
        self.levels = [
            TreeLevel(depth, 1, len(self.order), teams[depth - 1])
            if depth <= shared and self.team is not None
            else TreeLevel(depth, leaves >> (self.depth - depth), self.leaf << (self.depth - depth))
            for depth in range(1, self.depth + 1)
        ]

    @property
    def leaves(self) -> int:
        """Leaves of this rank."""
        return len(self.order) // self.leaf

    def sum(self, value: Any) -> Any:
        """The sum of a number over the ranks. Collective."""
        return self.comm.allreduce(value)


def table_of(points: Any, what: str = "points") -> Array:
    """(n, d) double precision of what a user gave.

    Args:
        points: what was given.
        what: it is, for the error.

    Raises:
        InputError: another shape, no points, or numbers that are not finite.
    """
    table = real(points)
    if table is None or table.ndim != 2 or 0 in table.shape:
        raise InputError(what, described(points), "(n, d) real numbers, n and d >= 1")
    table = np.ascontiguousarray(table, dtype=float)
    if not np.isfinite(table).all():
        raise InputError(what, "NaN or infinity", "finite numbers")
    return table


def _teams(comm: Any, shared: int) -> tuple[Any, list[Any]]:
    """The ranks that have leaves, and for each shared level those that share this rank's pair; kept by `comm`."""
    if shared == 0:
        return (MPI.COMM_SELF if comm.rank == 0 else None), []
    kept = comm.Get_attr(_GROUPS) or {}
    if shared not in kept:
        active = comm.rank < 1 << shared
        colors = [comm.rank >> (shared - k) if active else MPI.UNDEFINED for k in range(shared)]
        teams = [comm.Split(color, comm.rank) for color in colors]
        kept[shared] = (teams[0] if active else None, teams)
        comm.Set_attr(_GROUPS, kept)
    found: tuple[Any, list[Any]] = kept[shared]
    return found


def _halved(points: Array, depth: int) -> Indices:
    """Indices of the points by slots, -1 in empty ones, after `depth` halvings."""
    slots = -(-len(points) >> depth) << depth
    order = np.full((1, slots), -1)
    order[0, : len(points)] = np.arange(len(points))
    for _ in range(depth):
        order = _halve(points, order)
    return order.reshape(-1)


def _halve(points: Array, order: Indices) -> Indices:
    """Each cluster, (clusters, slots), in two across its principal direction; empty slots are the last of a cluster."""
    present = order >= 0
    count = present.sum(axis=1, keepdims=True)
    x = np.where(present[..., None], points[order], 0.0)
    x -= (x.sum(axis=1) / np.maximum(count, 1))[:, None]
    x *= present[..., None]
    along = np.where(present, (x @ _principal(x)[..., None])[..., 0], np.inf)
    order = np.take_along_axis(order, np.argsort(along, axis=1, kind="stable"), axis=1)
    half = np.arange(order.shape[1] // 2)
    first = (count + 1) // 2
    second = np.take_along_axis(order, np.minimum(first + half, order.shape[1] - 1), axis=1)
    halves = [np.where(half < first, order[:, : len(half)], -1), np.where(half < count - first, second, -1)]
    both: Indices = np.stack(halves, axis=1).reshape(2 * len(order), len(half))
    return both


def _principal(x: Array) -> Array:
    """Directions in which centered points, (clusters, slots, d), spread most: (clusters, d)."""
    if x.shape[-1] <= FEW:
        vectors: Array = np.linalg.eigh(np.swapaxes(x, -1, -2) @ x)[1]
        return vectors[..., -1]
    far = np.argmax(np.sum(x * x, axis=-1), axis=-1)
    direction = np.take_along_axis(x, far[:, None, None], axis=1)  # (clusters, 1, d)
    for _ in range(POWER_STEPS):
        direction = (x @ np.swapaxes(direction, -1, -2)).swapaxes(-1, -2) @ x
        direction /= np.maximum(np.linalg.norm(direction, axis=-1, keepdims=True), np.finfo(float).tiny)
    return direction[:, 0]
