"""A row of numbers in even parts, one for each rank: who has what, and what becomes of the parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch
from mpi4py import MPI
from torch import Tensor

from pdeopt.core.errors import together
from pdeopt.core.messages import even_parts
from pdeopt.core.team import Team

T = TypeVar("T")


class Share:
    """An even part of a row of numbers, for each rank of a team.

    Args:
        team: None for one rank, which has all of them.
        size: how many there are; also an attribute.
        block: neighbors that stay together.

    Attributes:
        own: those of this rank.
    """

    def __init__(self, team: Team | None, size: int, block: int = 1) -> None:
        self.team, self.size = None if team is None or team.size == 1 else team, size
        self.own = slice(0, size)
        if self.team is not None:
            counts = even_parts(-(-size // block), self.team.size)
            begin = sum(counts[: self.team.rank]) * block
            self.own = slice(min(begin, size), min(begin + counts[self.team.rank] * block, size))

    def gather(self, own: Tensor) -> Tensor:
        """The numbers of all ranks in a row. Collective."""
        if self.team is None:
            return own
        return torch.cat([torch.from_numpy(part) for part in self.team.allgather(own.numpy())])

    def total(self, own: Tensor) -> Tensor:
        """The sum over the ranks, in their order: the same bits on all of them. Collective."""
        if self.team is None:
            return own
        parts = [torch.from_numpy(np.asarray(part)) for part in self.team.allgather(own.numpy())]
        return torch.stack(parts).sum(0) if own.ndim < 2 else sum(parts[1:], parts[0])

    def total_square(self, own: Tensor) -> Tensor:
        """The sum over the ranks of symmetric matrices, of which the lower triangles are right; those are sent."""
        if self.team is None:
            return own
        own = own.cpu()
        rows, columns = np.tril_indices(len(own))
        packed = own.numpy()[rows, columns]
        if isinstance(self.team, MPI.Comm):
            self.team.Allreduce(MPI.IN_PLACE, packed)
        else:
            packed = self.team.allreduce(packed)
        own.numpy()[rows, columns] = packed
        return own

    def agreed(self, value: Tensor) -> Tensor:
        """What the first rank has. Collective."""
        return value if self.team is None else torch.from_numpy(np.asarray(self.team.bcast(value.numpy()))).clone()

    def call(self, function: Callable[[], T]) -> T:
        """The value of a function on each rank; a `SolveFailure` on one of them is one on all. Collective."""
        return function() if self.team is None else together(self.team, function)
