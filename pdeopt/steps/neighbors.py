"""Messages between ranks whose steps follow each other."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pdeopt.core.arrays import Array


def as_bytes(tensor: Tensor) -> Array:
    """The memory of a contiguous tensor on the host, as a message without arithmetic: of any dtype, bfloat16 too.

    Args:
        tensor: of any shape; the array shares its memory.
    """
    return tensor.detach().reshape(-1).view(torch.uint8).numpy()


class Neighbors:
    """The rank that owns the steps before those of this rank, and the one that owns the steps after them.

    Rows are tensors of equal shape and type on both ranks; they go through the memory of the host and come back on
    the device of the row that they are received like.

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
            request = self.mpi.Isend(as_bytes(row.cpu().contiguous()), target)
        received = self._receive(row, source) if 0 <= source < self.mpi.size else None
        if request is not None:
            request.Wait()
        return received

    def receive_before(self, like: Tensor) -> Tensor | None:
        """Wait for the row that the rank before sends with `send_after`; None on the first rank."""
        return None if self.is_first else self._receive(like, self.mpi.rank - 1)

    def send_after(self, row: Tensor) -> None:
        """Send `row` to the rank after this one, if there is one."""
        if not self.is_last:
            self.mpi.Send(as_bytes(row.cpu().contiguous()), self.mpi.rank + 1)

    def receive_after(self, like: Tensor) -> Tensor | None:
        """Wait for the row that the rank after sends with `send_before`; None on the last rank."""
        return None if self.is_last else self._receive(like, self.mpi.rank + 1)

    def send_before(self, row: Tensor) -> None:
        """Send `row` to the rank before this one, if there is one."""
        if not self.is_first:
            self.mpi.Send(as_bytes(row.cpu().contiguous()), self.mpi.rank - 1)

    def _receive(self, like: Tensor, source: int) -> Tensor:
        buffer = torch.empty(like.shape, dtype=like.dtype)
        self.mpi.Recv(as_bytes(buffer), source)
        return buffer.to(like.device)
