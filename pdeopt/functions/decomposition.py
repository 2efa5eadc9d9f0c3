"""Decompositions of a vector of unknowns into overlapping parts: index sets, a partition of unity, colors, owners."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from mpi4py import MPI
from torch import Tensor

from pdeopt.core.errors import InputError

#: Parts where nobody says how many.
DEFAULT_PARTS = 8


class Decomposition:
    """Parts of the unknowns, which cover them all and may overlap.

    With R_s the restriction to part s and W_s its diagonal of weights, sum_s R_s' W_s R_s = 1. Methods that split the
    unknowns (SPQN, APTS) solve on each part and add the corrections by `assemble`::

        parts = Decomposition(5, [torch.arange(0, 3), torch.arange(2, 5)])           # index 2 is in both
        d = parts.assemble({s: solve(s) for s in parts.mine()})                      # sum_s R_s' W_s d_s, (5,)
        parts = Decomposition.blocks(layer_sizes, parts=4, overlap=1)                # whole layers

    There are two ways to be parallel. Unknowns that are distributed over `comm` have parts that reach over ranks: each
    rank states its indices of every part, and all work on every part together. Unknowns that every rank has are
    decomposed alike on all of them, and a `team` shares the parts.

    Args:
        size: unknowns on this rank.
        parts: indices of each part on this rank, int64, sorted; every rank states all parts, those without unknowns
            here as empty ones.
        comm: communicator over which the unknowns are distributed.
        team: ranks that share the parts among them, where the unknowns are on every rank: a rank works on its own parts
            alone and corrections are summed. None: all ranks work on every part together.
        owners: the rank of the team that works on each part; default an even share of them.

    Attributes:
        parts: their indices on this rank.
        weights: partition of unity, a tensor a part; an index in k parts has 1/k in each.

    Raises:
        InputError: a part without unknowns on any rank, an index out of range or twice in a part, unknowns in no part.
    """

    def __init__(
        self,
        size: int,
        parts: Sequence[Tensor],
        comm: Any = MPI.COMM_SELF,
        team: Any = None,
        owners: Sequence[int] | None = None,
    ) -> None:
        self.size, self.parts, self.comm, self.team, self._owners = size, tuple(parts), comm, team, owners
        count = torch.zeros(size)
        for number, part in enumerate(self.parts):
            if len(part) and (part.min() < 0 or part.max() >= size or bool((part.diff() <= 0).any())):
                raise InputError(
                    f"part {number} of a decomposition",
                    f"indices {part.min()} to {part.max()}",
                    f"increasing indices from 0 to {size - 1}",
                )
            count[part] += 1
        self._check(comm, count)
        self.weights = tuple(1.0 / count[part].double() for part in self.parts)

    def _check(self, comm: Any, count: Tensor) -> None:
        sizes = comm.allreduce(torch.tensor([len(part) for part in self.parts]).numpy())
        uncovered = comm.allreduce(int((count == 0).sum()))
        if not self.parts or 0 in sizes:
            empty = [number for number, total in enumerate(sizes) if total == 0]
            raise InputError("parts of a decomposition", f"no unknowns in {empty or 'any'}", "parts with unknowns")
        if uncovered:
            raise InputError(
                "parts of a decomposition", f"{uncovered} unknowns in none", "parts that cover all unknowns"
            )

    @classmethod
    def blocks(
        cls, sizes: Sequence[int], parts: int | None = None, overlap: int = 0, team: Any = None
    ) -> Decomposition:
        """Neighboring blocks, layers or time steps, in `parts` nearly equal groups.

        Args:
            sizes: unknowns of each block, in order.
            parts: how many groups; see `number_of_parts`.
            overlap: blocks that a part takes from each neighbor.
            team: ranks that share the parts among them.

        Raises:
            InputError: more parts than blocks.
        """
        number = len(sizes)
        parts = number_of_parts(parts, number, "blocks")
        starts = torch.tensor([0, *sizes]).cumsum(0).tolist()
        cuts = [round(number * s / parts) for s in range(parts + 1)]
        ranges = [(starts[max(a - overlap, 0)], starts[min(b + overlap, number)]) for a, b in pairwise(cuts)]
        return cls(starts[-1], [torch.arange(a, b) for a, b in ranges], team=team)

    @classmethod
    def even(
        cls, size: int, parts: int | None = None, overlap: int = 0, comm: Any = MPI.COMM_SELF, team: Any = None
    ) -> Decomposition:
        """Neighboring unknowns in nearly equal parts, over all ranks of `comm`. Collective.

        Args:
            size: unknowns on this rank.
            parts: how many; see `number_of_parts`.
            overlap: unknowns that a part takes from each neighbor.
            comm, team: as for the decomposition itself.

        Raises:
            InputError: more parts than unknowns.
        """
        sizes = comm.allgather(size)
        total, begin = sum(sizes), sum(sizes[: comm.rank])
        parts = number_of_parts(parts, total, "unknowns")
        cuts = [round(total * s / parts) for s in range(parts + 1)]
        own = [(max(a - overlap - begin, 0), min(b + overlap - begin, size)) for a, b in pairwise(cuts)]
        return cls(size, [torch.arange(a, max(a, b)) for a, b in own], comm, team)

    def __len__(self) -> int:
        return len(self.parts)

    def owner(self, part: int) -> int:
        """The rank of the team that works on a part."""
        if self._owners is not None:
            return self._owners[part]
        return 0 if self.team is None else part * self.team.size // len(self)

    def mine(self) -> list[int]:
        """The parts that this rank works on."""
        rank = 0 if self.team is None else self.team.rank
        return [s for s in range(len(self)) if self.owner(s) == rank]

    def prolong(self, part: int, d: Tensor) -> Tensor:
        """R' d: the unknowns of a part among all, zero elsewhere."""
        return torch.zeros(self.size, dtype=d.dtype).index_copy(0, self.parts[part], d)

    @property
    def is_replicated(self) -> bool:
        """Whether every rank has all unknowns."""
        return bool(self.comm.size == 1)

    def assemble(self, corrections: dict[int, Tensor], weighted: bool = True) -> Tensor:
        """sum_s R_s' W_s d_s over these corrections, (size,), or sum_s R_s' d_s without the weights.

        Args:
            corrections: d_s by the number of the part, (unknowns of the part on this rank,) each.
            weighted: whether common unknowns take the mean of their parts.
        """
        total = torch.zeros(self.size, dtype=torch.float64)
        for part, d in sorted(corrections.items()):
            total.index_add_(0, self.parts[part], self.weights[part] * d if weighted else d)
        return total

    def colors(self, number: int) -> list[list[int]]:
        """Groups of parts without common unknowns, to be worked on at the same time in a multiplicative sweep.

        Args:
            number: of groups, parts s mod number in one; more where those share unknowns. 0: a group a part.
        """
        groups: list[list[int]] = []
        shared = self._shared()
        for first in range(min(number or len(self), len(self))):
            own: list[list[int]] = []
            for part in range(first, len(self), number or len(self)):
                free = next((group for group in own if not bool(shared[part, group].any())), None)
                if free is None:
                    own.append([part])
                else:
                    free.append(part)
            groups += own
        return groups

    def _shared(self) -> Tensor:
        """(parts, parts) whether two parts share unknowns, on any rank."""
        masks = torch.zeros(len(self), self.size, dtype=torch.float64)
        for number, indices in enumerate(self.parts):
            masks[number, indices] = 1.0
        return torch.as_tensor(self.comm.allreduce((masks @ masks.T).numpy())) > 0


def number_of_parts(parts: int | None, most: int, what: str) -> int:
    """How many parts to make.

    Args:
        parts: asked for; None for `DEFAULT_PARTS`, or `most` where that is fewer.
        most: parts that there can be.
        what: is divided, in the plural.

    Raises:
        InputError: none, or more than there can be.
    """
    if parts is None:
        return max(min(DEFAULT_PARTS, most), 1)
    if not 1 <= parts <= most:
        raise InputError("parts of a decomposition", parts, f"1 to {most}, the number of {what}")
    return parts
