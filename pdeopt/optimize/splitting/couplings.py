"""Where windows of steps that ranks share follow each other: the values on both sides, and sums over all places."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pdeopt.steps.exchange.neighbors import Neighbors


class Couplings:
    """The places between `windows` windows, of which each rank has consecutive ones, at least one.

    Place s is the end of window s and the start of window s + 1, counted from 0. A rank holds the rows of all places
    that its windows touch, so that the place between two ranks is held by both, with equal values.

    Args:
        mpi: an mpi4py communicator.
        own: the windows of this rank, begin <= w < end.
        windows: of all ranks.
        multiply: M, rows to rows; inner products are with it.

    Attributes:
        held: the places of this rank's rows.
    """

    def __init__(self, mpi: Any, own: range, windows: int, multiply: Callable[[Tensor], Tensor]) -> None:
        self.mpi, self.neighbors, self.multiply = mpi, Neighbors(mpi), multiply
        self.held = range(max(own.start - 1, 0), min(own.stop, windows - 1))
        #: the places that this rank counts in sums: the ends of its windows
        self._counted = range(own.start - self.held.start, self.held.stop - self.held.start)

    def exchange(self, ends: Tensor, starts: Tensor) -> int:
        """Fetch what the windows of other ranks end and start at, in place. Collective.

        Args:
            ends, starts: rows of the held places, (len(held), n); right where the window is of this rank.

        Returns:
            Bytes that this rank has sent.
        """
        if self.mpi.size == 1:
            return 0
        before = self.neighbors.exchange(ends[-1], toward=+1)
        after = self.neighbors.exchange(starts[0], toward=-1)
        if before is not None:
            ends[0] = before
        if after is not None:
            starts[-1] = after
        return int(ends[0].numel() * ends.element_size() * (2 - self.neighbors.is_first - self.neighbors.is_last))

    def gram(self, columns: Tensor) -> Tensor:
        """Inner products of columns over all places of all ranks, (k, k). Collective.

        The sum goes by places, and is the same to the last bit on any number of ranks.

        Args:
            columns: (k, len(held), parts, n); parts are added.
        """
        parts = []
        for place in self._counted:
            X = columns[:, place].flatten(1)
            MX = self.multiply(columns[:, place].reshape(-1, columns.shape[-1])).reshape(X.shape)
            parts.append(X @ MX.T)
        if self.mpi.size > 1:
            parts = [part for those in self.mpi.allgather(parts) for part in those]
        return sum(parts, torch.zeros(len(columns), len(columns), dtype=columns.dtype))

    def gather(self, rows: Tensor) -> Tensor:
        """All places of rows (len(held), ...), on the first rank; its own on the others. Collective."""
        parts = self.mpi.gather(rows[self._counted.start : self._counted.stop].clone())
        return rows if parts is None else torch.cat(parts)

    def own(self, whole: Tensor) -> Tensor:
        """The held rows of all."""
        return whole[self.held.start : self.held.stop].clone()
