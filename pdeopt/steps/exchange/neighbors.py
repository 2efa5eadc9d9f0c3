"""Messages between a rank and those that own the steps before and after its own."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pdeopt.steps.exchange.parcels import as_message, outgoing, receive, send


class Neighbors:
    """The rank that owns the steps before those of this rank, and the one that owns the steps after them.

    Rows are tensors of equal shape and type on both ranks; they come on the device of the row that they are received
    like.

    Args:
        mpi: an mpi4py communicator whose ranks own the steps in their order.
    """

    def __init__(self, mpi: Any) -> None:
        self.mpi, self.is_first, self.is_last = mpi, mpi.rank == 0, mpi.rank == mpi.size - 1

    def exchange(self, row: Tensor, toward: int) -> Tensor | None:
        """Send `row` to rank + toward and receive that of rank - toward; None where there is none. Collective."""
        if self.mpi.size == 1:
            return None
        source, target = self.mpi.rank - toward, self.mpi.rank + toward
        request = None
        if 0 <= target < self.mpi.size:
            request = self.mpi.Isend(as_message(outgoing(row)), target)
        received = receive(self.mpi, row, source) if 0 <= source < self.mpi.size else None
        if request is not None:
            request.Wait()
        return received

    def receive_before(self, like: Tensor) -> Tensor | None:
        """Wait for the row that the rank before sends with `send_after`; None on the first rank."""
        return None if self.is_first else receive(self.mpi, like, self.mpi.rank - 1)

    def send_after(self, row: Tensor) -> None:
        """Send `row` to the rank after this one, if there is one."""
        if not self.is_last:
            send(self.mpi, row, self.mpi.rank + 1)

    def receive_after(self, like: Tensor) -> Tensor | None:
        """Wait for the row that the rank after sends with `send_before`; None on the last rank."""
        return None if self.is_last else receive(self.mpi, like, self.mpi.rank + 1)

    def send_before(self, row: Tensor) -> None:
        """Send `row` to the rank before this one, if there is one."""
        if not self.is_first:
            send(self.mpi, row, self.mpi.rank - 1)
