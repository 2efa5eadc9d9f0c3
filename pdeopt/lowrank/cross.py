"""Blocks of low rank by crosses: a block from a few of its rows and columns, all blocks of a level at once.

Partially pivoted adaptive cross approximation: M. Bebendorf, Approximation of boundary element matrices, Numer. Math.
86, 2000, algorithm 2. Its stopping test, the size of the last cross, is known to stop early where a row of what is
left vanishes. Here a small cross only asks the question: what is left in some rows that were never looked at answers
it, and where that is too much, the worst of them is the next row.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pdeopt.lowrank.clusters import ClusterTree, TreeLevel
from pdeopt.lowrank.kernels import Array, Kernel

#: Rows of a block that a test looks at, at least; all of them where there are few.
SAMPLES, FEW_SLOTS = 16, 128

#: Part of full rank from which on a test looks at all rows.
NEARLY_FULL = 0.25

#: Steps of a sequence that fills 0..1 evenly, whatever its length.
GOLDEN = 0.6180339887498949


def cross_bases(
    tree: ClusterTree, level: TreeLevel, kernel: Kernel, rtol: float, most: int, scale: float
) -> tuple[Array, Array]:
    """U and V with K_12 ~ U V' for all pairs of siblings of a level. Collective over those that share a pair.

    Args:
        tree, level, kernel: whose blocks.
        rtol: the Frobenius norm of what is left is at most that of K_12 and of `scale` a slot, times this.
        most: columns of U and V at most.
        scale: mean square of k(x, x).

    Returns:
        The bases of this rank's clusters, (clusters, size, r), U of the first of a pair, V of the second; columns
        beyond the rank of a pair are 0. The estimated remainder of each pair in the Frobenius norm, (pairs,).
    """
    work = _Crosses(tree, level, kernel)
    most = min(most, level.slots)
    found: list[Any] = []
    active, done = np.arange(work.pairs), np.zeros(work.pairs, dtype=bool)
    while work.pairs:
        cross = work.add()
        tolerance = rtol**2 * (work.square + level.slots * scale)
        asked = np.flatnonzero(~done & ((cross <= tolerance) | (work.rank >= most)))
        if len(asked):
            missing = work.ask(asked)
            ends = (missing <= tolerance[asked]) | (work.rank >= most)
            if ends.any():
                found.append((active[asked[ends]], *work.take(asked[ends]), np.sqrt(missing[ends])))
            done[asked[ends]] = True
        if 2 * done.sum() >= len(done):  # those that have ended go along until they are half of all
            work.keep(~done)
            active, done = active[~done], done[~done]
    return _assembled(level, found)


def _assembled(level: TreeLevel, found: list[Any]) -> tuple[Array, Array]:
    """Bases and remainders of all pairs from those of the pairs that ended together: (which, U, V, remainder)."""
    width = max((each[1].shape[1] for each in found), default=0)
    bases = np.zeros((level.clusters, level.size, width))
    left = np.zeros(sum(len(each[0]) for each in found))
    for which, u, v, missing in found:
        left[which] = missing
        if level.team is None:
            bases[2 * which, :, : u.shape[1]] = np.swapaxes(u, -1, -2)
            bases[2 * which + 1, :, : v.shape[1]] = np.swapaxes(v, -1, -2)
        else:
            bases[:, :, : u.shape[1]] = np.swapaxes(v if level.side else u, -1, -2)
    return bases, left


class _Crosses:
    """The crosses so far of several pairs: rows U (pairs, columns, slots of the first cluster), V of the second.

    Attributes:
        square: estimate of |K_12|^2 in the Frobenius norm, (pairs,).
        rank: columns of U and V.
    """

    def __init__(self, tree: ClusterTree, level: TreeLevel, kernel: Kernel) -> None:
        self.kernel, self.level, self.team, self.rank, self.looked = kernel, level, level.team, 0, 1
        points = tree.points.reshape(level.clusters, level.size, tree.dim)
        present = tree.real.reshape(level.clusters, level.size)
        if level.team is None:
            self.x, self.y, self.x_real, self.y_real = points[::2], points[1::2], present[::2], present[1::2]
        else:  # the side that is another rank's is empty here
            sizes = [level.size, 0] if level.side == 0 else [0, level.size]
            self.x, self.y = (points[:, :size] for size in sizes)
            self.x_real, self.y_real = (present[:, :size] for size in sizes)
        self.U, self.V = (np.zeros((self.pairs, 8, each.shape[1])) for each in (self.x, self.y))
        self.marks = _mark(self.x)
        self.unused = self.x_real > 0
        self.square = np.zeros(self.pairs)
        self.row, self.row_of_u = np.zeros((self.pairs, tree.dim)), np.zeros((self.pairs, 0))
        self.square = self.ask(np.arange(self.pairs))

    @property
    def pairs(self) -> int:
        """How many."""
        return len(self.x)

    def add(self) -> Array:
        """One more cross, through the row that was chosen: |u|^2 |v|^2."""
        k, dim = self.rank, self.x.shape[-1]
        self._grow(k + 1)
        self.unused &= self.marks != _mark(self.row)[:, None]  # equal points have equal rows
        v, u = self.V[:, k], self.U[:, k]
        v[:] = self.kernel.block(self.row[:, None], self.y)[:, 0]
        v -= (self.row_of_u[:, None] @ self.V[:, :k])[:, 0]
        v *= self.y_real
        column, _ = self._largest(np.abs(v), v, self.y, self.V[:, :k], np.zeros((self.pairs, 0)))
        pivot, y, column_of_v = np.split(column, [1, 1 + dim], axis=-1)
        u[:] = self.kernel.block(y[:, None], self.x)[:, 0]
        u -= (column_of_v[:, None] @ self.U[:, :k])[:, 0]
        u *= self.x_real
        u *= np.divide(1.0, pivot, out=np.zeros_like(pivot), where=pivot != 0.0)
        self.rank = k + 1
        squares = np.stack([np.einsum("pn,pn->p", u, u), np.einsum("pn,pn->p", v, v)], axis=-1)
        row, sums = self._largest(np.abs(u) * self.unused, u, self.x, self.U[:, : k + 1], squares)
        _, self.row, self.row_of_u = np.split(row, [1, 1 + dim], axis=-1)
        cross: Array = sums[:, 0] * sums[:, 1]
        return cross

    def ask(self, which: Any) -> Array:
        """|K_12 - U V'|^2 of some pairs by rows that were not looked at before; the worst are the next rows."""
        size, slots = self.x.shape[1], self.level.slots
        if slots <= FEW_SLOTS or self.rank > NEARLY_FULL * slots:  # what is left may be in a single row
            sample = np.arange(slots)
        else:
            sample = self.looked + np.arange(max(SAMPLES, self.rank // 2))
            self.looked += len(sample)
            sample = (sample * GOLDEN % 1.0 * slots).astype(int)
        count = len(sample)
        begin = 0 if self.team is None else self.team.rank * self.level.size
        here = (sample >= begin) & (sample < begin + size)
        at = sample[here] - begin
        own = np.zeros((len(which), count, self.x.shape[-1] + 1 + self.rank))
        of_u = np.swapaxes(self.U[which, : self.rank][..., at], 1, 2)
        own[:, here] = np.concatenate([self.x[which][:, at], self.x_real[which][:, at, None], of_u], axis=-1)
        rows, present, rows_of_u = np.split(self._sum(own), [self.x.shape[-1], self.x.shape[-1] + 1], axis=-1)
        left = self.kernel.block(rows, self.y[which])
        left -= rows_of_u @ self.V[which, : self.rank]
        left *= present * self.y_real[which][:, None]
        squares = self._sum(np.einsum("psn,psn->ps", left, left))
        pairs, worst = np.arange(len(which)), np.argmax(squares, axis=-1)
        self.row[which], self.row_of_u[which] = rows[pairs, worst], rows_of_u[pairs, worst]
        estimate: Array = squares.sum(axis=-1) * (slots / count)
        return estimate

    def take(self, which: Any) -> tuple[Array, Array]:
        """U and V of some pairs."""
        return self.U[which, : self.rank], self.V[which, : self.rank]

    def keep(self, which: Any) -> None:
        """Go on with some pairs only."""
        for name, value in vars(self).items():
            if isinstance(value, np.ndarray):
                setattr(self, name, value[which])

    def _sum(self, own: Array) -> Array:
        """Over the ranks that share the pair."""
        return own if self.team is None else self.team.allreduce(own)

    def _largest(self, size: Array, values: Array, points: Array, rows: Array, own: Array) -> tuple[Array, Array]:
        """Value, point and entries of `rows` at the largest `size` on all ranks, (pairs, 1 + d + k); sums of `own`."""
        if size.shape[1]:
            pairs, at = np.arange(self.pairs), np.argmax(size, axis=-1)
            best = np.concatenate([values[pairs, at][:, None], points[pairs, at], rows[pairs, :, at]], axis=-1)
            most = size[pairs, at]
        else:
            best, most = np.zeros((self.pairs, 1 + points.shape[-1] + rows.shape[1])), np.full(self.pairs, -2.0)
        if self.team is None:
            return best, own
        found = np.stack(self.team.allgather(np.concatenate([most[:, None], best, own], axis=-1)))
        winner = np.argmax(found[..., 0], axis=0)
        width = 1 + best.shape[-1]
        return found[winner, np.arange(self.pairs), 1:width], found[..., width:].sum(axis=0)

    def _grow(self, columns: int) -> None:
        """Room for more crosses."""
        if columns > self.U.shape[1]:
            self.U, self.V = (np.concatenate([each, np.zeros_like(each)], axis=1) for each in (self.U, self.V))


def _mark(points: Array) -> Array:
    """A number of each point, (..., d): (...), that is equal for equal points, and for hardly any others."""
    found: Array = points[..., 0] * GOLDEN
    for k in range(1, points.shape[-1]):
        found = found + points[..., k] * ((k + 1) * GOLDEN % 1.0)
    return found
