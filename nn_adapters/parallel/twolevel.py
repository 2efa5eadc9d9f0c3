"""Sums over ranks in two levels: rings inside the nodes, recursive halving and doubling between them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from mpi4py import MPI
from torch import Tensor

from nn_adapters.parallel.counts import Count, Traffic
from pdeopt.core.errors import InputError
from pdeopt.core.messages import Arrival, Course, even_parts
from pdeopt.steps.exchange.parcels import as_message


class TwoLevelSums:
    """Sums of buffers over all ranks, on all ranks, with few bytes between nodes. Collective.

    1. A ring inside the node reduces the buffer to parts, one a rank.
    2. Ranks of different nodes that have the same part sum it by recursive halving and doubling (R. Rabenseifner,
       Optimization of collective reduction operations, ICCS 2004).
    3. A ring inside the node brings the parts to all its ranks.

    So each number is summed in one place and then copied: the sum is the same on all ranks to the last bit. Nodes may
    have different numbers of ranks; then those beyond the smallest one's have no part in the second phase.

    Args:
        comm: an mpi4py communicator.
        node_size: ranks of a node, in a row; 0 for those that share memory (`MPI.COMM_TYPE_SHARED`).

    Attributes:
        inside, between: communicators of the ranks of this node, and of those with its part in other nodes.
        traffic: what this rank has sent so far.

    Raises:
        InputError: a size below 0, or above the number of ranks.

    Example:
        >>> sums = TwoLevelSums(MPI.COMM_WORLD)
        >>> arrival = sums.begin_sum(buffer)
        >>> total, _ = arrival.finish()
    """

    def __init__(self, comm: Any, node_size: int = 0) -> None:
        if not 0 <= node_size <= comm.size:
            raise InputError("ranks of a node", node_size, f"0 ... {comm.size}")
        if node_size:
            self.inside = comm.Split(comm.rank // node_size, comm.rank)
        else:
            self.inside = comm.Split_type(MPI.COMM_TYPE_SHARED, comm.rank)
        self.lanes: int = comm.allreduce(self.inside.size, MPI.MIN)
        self.between = comm.Split(min(self.inside.rank, self.lanes), comm.rank)
        self.traffic = Traffic()

    @property
    def sent(self) -> int:
        """Bytes that this rank has sent so far."""
        return round(self.traffic.inside.bytes + self.traffic.between.bytes)

    @property
    def sends(self) -> int:
        """Messages that this rank has sent so far."""
        return self.traffic.inside.messages + self.traffic.between.messages

    def sum(self, buffer: Tensor) -> Tensor:
        """The sum over the ranks, (size,), on all of them. Collective."""
        return self.begin_sum(buffer).finish()[0]

    def begin_sum(self, buffer: Tensor, weight: float = 0.0, tag: int = 0) -> Arrival[tuple[Tensor, float]]:
        """The sums of the buffers and of the weights, of which only the first messages leave here. Collective.

        Args:
            buffer: this rank's share of the sum, (size,); it may change at once.
            weight: a number that goes along, in the precision of the buffer.
            tag: another one for each sum that is on its way at the same time.
        """
        numbers = torch.cat([buffer.detach().cpu(), torch.tensor([weight], dtype=buffer.dtype)])

        def course() -> Course[tuple[Tensor, float]]:
            yield from self._sum(numbers, tag)
            return numbers[:-1].to(buffer.device), float(numbers[-1])

        return Arrival(course())

    def _sum(self, numbers: Tensor, tag: int) -> Course[None]:
        idle = self.inside.size - self.lanes
        pieces = numbers.split(even_parts(len(numbers), self.lanes) + [0] * idle)
        yield from self._reduce_around(pieces, tag)
        if self.inside.rank < self.lanes:
            yield from self._halve_and_double(pieces[self.inside.rank], tag)
        yield from self._gather_around(pieces, tag)

    # -- inside a node: a ring ----------------------------------------------------------------------------

    def _reduce_around(self, pieces: Sequence[Tensor], tag: int) -> Course[None]:
        """The sum of piece k stands on rank k of the node, then."""
        rank, size = self.inside.rank, self.inside.size
        for step in range(1, size):
            found = torch.empty_like(pieces[(rank - step - 1) % size])
            yield self._swap(
                self.inside, pieces[(rank - step) % size], (rank + 1) % size, found, (rank - 1) % size, tag
            )
            pieces[(rank - step - 1) % size].add_(found)

    def _gather_around(self, pieces: Sequence[Tensor], tag: int) -> Course[None]:
        """All pieces stand on all ranks of the node, then."""
        rank, size = self.inside.rank, self.inside.size
        for step in range(size - 1):
            own, found = pieces[(rank - step) % size], pieces[(rank - step - 1) % size]
            yield self._swap(self.inside, own, (rank + 1) % size, found, (rank - 1) % size, tag)

    # -- between nodes: halves ----------------------------------------------------------------------------

    def _halve_and_double(self, part: Tensor, tag: int) -> Course[None]:
        """The sum over the nodes; nodes beyond a power of two give their share to another one, and wait."""
        comm, rank = self.between, self.between.rank
        power = 1 << (comm.size.bit_length() - 1)
        if rank >= power:
            yield [self._send(comm, part, rank - power, tag)]
            yield [self._receive(comm, part, rank - power, tag)]
            return
        if rank + power < comm.size:
            found = torch.empty_like(part)
            yield [self._receive(comm, found, rank + power, tag)]
            part.add_(found)
        halves, whole, distance = [], part, power // 2
        while distance:
            low, high = whole.split(even_parts(len(whole), 2))
            kept, given = (low, high) if rank & distance == 0 else (high, low)
            found = torch.empty_like(kept)
            yield self._swap(comm, given, rank ^ distance, found, rank ^ distance, tag)
            kept.add_(found)
            halves.append((distance, kept, given))
            whole, distance = kept, distance // 2
        for distance, kept, given in reversed(halves):
            yield self._swap(comm, kept, rank ^ distance, given, rank ^ distance, tag)
        if rank + power < comm.size:
            yield [self._send(comm, part, rank + power, tag)]

    # -- one message --------------------------------------------------------------------------------------

    def _swap(self, comm: Any, own: Tensor, to: int, found: Tensor, source: int, tag: int) -> list[Any]:
        return [self._receive(comm, found, source, tag), self._send(comm, own, to, tag)]

    def _send(self, comm: Any, own: Tensor, to: int, tag: int) -> Any:
        count = Count(1, own.numel() * own.element_size())
        self.traffic += Traffic(inside=count) if comm is self.inside else Traffic(between=count)
        return comm.Isend(as_message(own), to, tag)

    def _receive(self, comm: Any, found: Tensor, source: int, tag: int) -> Any:
        return comm.Irecv(as_message(found), source, tag)
