"""Steps of sequences on many ranks, by samples instead: each rank takes its share of a batch through all steps.

    steps of this rank x all samples  <->  all steps x samples of this rank

For steps that share their parameters, equal on all ranks. No rank waits for the steps of another, and what is found is
exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from mpi4py import MPI
from torch import Tensor

from pdeopt.core.arrays import Array
from pdeopt.steps.exchange.parcels import arrived, as_message, incoming, outgoing


def spread(samples: int, ranks: int) -> list[int]:
    """How many samples each rank takes, as evenly as can be; with more ranks than samples some take none."""
    return [(rank + 1) * samples // ranks - rank * samples // ranks for rank in range(ranks)]


class Shares:
    """Who has which steps, and takes which samples of a batch.

    Args:
        mpi: an mpi4py communicator.
        steps: rank r has the steps steps[r] to steps[r + 1] - 1, (ranks + 1,).
        samples: of the batch.

    Attributes:
        steps: of each rank.
        samples: of each rank.
        largest: the share of the batch that a rank has at most; 1 for a batch without samples.
    """

    def __init__(self, mpi: Any, steps: Array, samples: int) -> None:
        self.mpi = mpi
        self.steps = [int(end - begin) for begin, end in pairwise(steps)]
        self.samples = spread(samples, mpi.size)
        self.largest = max(self.samples) / samples if samples else 1.0

    def own(self, rows: Tensor) -> Tensor:
        """All steps of the samples of this rank, (steps, own samples, ...). Collective, and so is the backward pass.

        Args:
            rows: the steps of this rank of all samples, (own steps, samples, ...); a mask, too.
        """
        if self.mpi.size == 1:
            return rows
        found: Tensor = _Own.apply(rows, self)  # type: ignore[no-untyped-call]
        return found

    def all(self, rows: Tensor) -> Tensor:
        """One row for each sample, on all ranks, from those of the samples of each. Collective.

        Args:
            rows: (own samples, ...). Their gradient is this rank's part of that of the result, which is taken to be
                equal on all ranks.
        """
        if self.mpi.size == 1:
            return rows
        found: Tensor = _All.apply(rows, self)  # type: ignore[no-untyped-call]
        return found


class _Own(torch.autograd.Function):
    """See `Shares.own`."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, shares: Shares) -> Tensor:
        ctx.shares = shares
        own = shares.samples[shares.mpi.rank]
        shapes = [(steps, own, *rows.shape[2:]) for steps in shares.steps]
        return torch.cat(_swapped(shares.mpi, rows.split(shares.samples, 1), shapes))

    @staticmethod
    def backward(ctx: Any, w: Tensor) -> tuple[Tensor, None]:
        shares = ctx.shares
        own = shares.steps[shares.mpi.rank]
        shapes = [(own, samples, *w.shape[2:]) for samples in shares.samples]
        return torch.cat(_swapped(shares.mpi, w.split(shares.steps), shapes), 1), None


class _All(torch.autograd.Function):
    """See `Shares.all`."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, shares: Shares) -> Tensor:
        ctx.shares = shares
        shapes = [(samples, *rows.shape[1:]) for samples in shares.samples]
        return torch.cat(_swapped(shares.mpi, [rows] * len(shapes), shapes))

    @staticmethod
    def backward(ctx: Any, w: Tensor) -> tuple[Tensor, None]:
        shares = ctx.shares
        return w.split(shares.samples)[shares.mpi.rank], None


def _swapped(mpi: Any, parts: Sequence[Tensor], shapes: Sequence[Sequence[int]]) -> list[Tensor]:
    """What each rank has for this one, from what this one has for each. Collective.

    Args:
        parts: for each rank, in order; of one type.
        shapes: of what comes from each.
    """
    sent = [part if rank == mpi.rank else outgoing(part) for rank, part in enumerate(parts)]
    found = [incoming(parts[0], shape) for shape in shapes]
    others = [rank for rank in range(mpi.size) if rank != mpi.rank]
    requests = [mpi.Irecv(as_message(found[rank]), rank) for rank in others if found[rank].numel()]
    requests += [mpi.Isend(as_message(sent[rank]), rank) for rank in others if sent[rank].numel()]
    MPI.Request.Waitall(requests)
    found[mpi.rank] = sent[mpi.rank]
    return [arrived(part, parts[0]) for part in found]
