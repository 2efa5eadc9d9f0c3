"""Asynchronous steps of ranks: weights in windows of MPI, which each rank reads and adds to when it is ready."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from mpi4py import MPI
from torch import Tensor, nn

from pdeopt.core.errors import InputError, SolveFailure
from pdeopt.core.messages import even_parts

#: Numbers of the window with the state: updates so far, and 1 + the rank whose update was not finite.
UPDATES, FAILED = 0, 1


class WeightServer:
    """The weights of a network in windows of MPI, a part on each rank; nobody waits for anybody.

    A rank pulls all weights by one-sided messages, takes a step with any optimizer of PyTorch, and pushes what the step
    has changed, which MPI adds to the weights, entry by entry. The change is of weights that others have changed
    meanwhile, and so is late by the updates between (J. Dean et al., Large scale distributed deep networks, NeurIPS
    2012). Every rank has an optimizer of its own, with its own moments.

        for x, y in batches:             # those of this rank, as many as it likes
            server.pull()
            optimizer.zero_grad()
            loss(network(x), y).backward()
            optimizer.step()
            server.push()
        server.finish()                  # the same weights on all ranks

    Args:
        network: of the same parameters on all ranks, in single or double precision; rank 0's weights are the first.
            Buffers are each rank's own.
        comm: an mpi4py communicator.

    Attributes:
        staleness: of each push so far, the updates of other ranks since the pull before it.
        sent, sends: bytes and messages of this rank's pulls and pushes.

    Raises:
        InputError: parameters of several dtypes, or of another one.

    Example:
        >>> server = WeightServer(network, MPI.COMM_WORLD)
    """

    def __init__(self, network: nn.Module, comm: Any) -> None:
        self.parameters = [p for p in network.parameters() if p.requires_grad]
        dtypes = {p.dtype for p in self.parameters}
        if len(dtypes) != 1 or not dtypes <= {torch.float32, torch.float64}:
            raise InputError(
                "parameters", ", ".join(sorted(map(str, dtypes))) or "none", "all of float32, or of float64"
            )
        self.comm, self.staleness = comm.Dup(), list[int]()  # a barrier may stay open where a rank fails
        self.sent, self.sends = 0, 0
        flat = comm.bcast(self._flat().numpy())
        self._parts = even_parts(len(flat), comm.size)
        self._first = np.cumsum([0, *self._parts])
        own = flat[self._between(comm.rank)]
        self._window = MPI.Win.Allocate(own.nbytes, flat.itemsize, comm=comm)
        self._state = MPI.Win.Allocate(16 if comm.rank == 0 else 0, 8, comm=comm)
        for window, first in ((self._window, own), (self._state, np.zeros(2 * (comm.rank == 0), dtype=np.int64))):
            window.Lock_all()
            window.Put(first, comm.rank)
            window.Flush(comm.rank)
        comm.Barrier()
        self._seen = 0
        self.pull()

    def _between(self, rank: int) -> slice:
        return slice(self._first[rank], self._first[rank + 1])

    def _flat(self) -> Tensor:
        return torch.cat([p.detach().cpu().reshape(-1) for p in self.parameters])

    def pull(self) -> None:
        """Take the weights as they are now.

        Raises:
            SolveFailure: an update that was not finite, of any rank.
        """
        updates, failed = self._add(UPDATES, 0), self._add(FAILED, 0)
        if failed:
            raise self._failure(failed - 1)
        self._seen = updates
        found = np.empty(self._first[-1], dtype=self._flat().numpy().dtype)
        for rank in range(self.comm.size):
            self._window.Get(found[self._between(rank)], rank)
        self._window.Flush_all()
        self._pulled = torch.from_numpy(found)
        self._count(found)
        with torch.no_grad():
            parts = self._pulled.split([p.numel() for p in self.parameters])
            for p, part in zip(self.parameters, parts):
                p.copy_(part.reshape(p.shape))

    def push(self) -> None:
        """Add to the weights what has changed here since the last pull.

        Raises:
            SolveFailure: what is not finite; nothing is added, and all other ranks learn of it when they pull.
        """
        change = (self._flat() - self._pulled).numpy()
        if not np.isfinite(change).all():
            self._add(FAILED, 1 + self.comm.rank)
            raise self._failure(self.comm.rank)
        for rank in range(self.comm.size):
            self._window.Accumulate(change[self._between(rank)], rank)
        self._window.Flush_all()
        self._count(change)
        self.staleness.append(self._add(UPDATES, 1) - self._seen)

    def _add(self, place: int, number: int) -> int:
        """Add to the state on rank 0; what it was before."""
        before = np.empty(1, dtype=np.int64)
        self._state.Fetch_and_op(np.array([number], dtype=np.int64), before, 0, place)
        self._state.Flush(0)
        return int(before[0])

    def _count(self, message: Any) -> None:
        self.sent += message.nbytes - message[self._between(self.comm.rank)].nbytes
        self.sends += self.comm.size - 1

    def _failure(self, rank: int) -> SolveFailure:
        return SolveFailure(f"an update of rank {rank} is not finite", "a smaller rate, or fewer ranks")

    def finish(self) -> None:
        """Wait until all ranks are here, and take the weights. Collective.

        Raises:
            SolveFailure: an update that was not finite, on all ranks that have not heard of it.
        """
        self._wait_for_all()
        self.pull()
        self._wait_for_all()

    def _wait_for_all(self) -> None:
        """A barrier, at which a rank that has failed need not arrive."""
        request = self.comm.Ibarrier()
        while not request.Test():
            if failed := self._add(FAILED, 0):
                raise self._failure(failed - 1)

    def close(self) -> None:
        """Give the windows back. Collective."""
        for window in (self._window, self._state):
            window.Unlock_all()
            window.Free()
