"""Images whose rows are on several ranks: who has which, and the messages between them, as functions of autograd."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any, TypeAlias

import torch
from torch import Tensor

from pdeopt.core.errors import InputError
from pdeopt.core.messages import even_parts
from pdeopt.steps.exchange.parcels import arrived, as_message, incoming, outgoing

#: First row and the one after the last.
Range: TypeAlias = tuple[int, int]


class ImageRows:
    """Rows of images dealt out to ranks, as evenly as they can be. Rows are the last axis but one.

    All calls are collective, and so are their backward passes.

    Args:
        comm: an mpi4py communicator.

    Attributes:
        sent, sends: bytes and messages that this rank has sent so far.
    """

    def __init__(self, comm: Any) -> None:
        self.comm, self.sent, self.sends = comm, 0, 0

    def ranges(self, height: int) -> list[Range]:
        """The rows of each rank.

        Raises:
            InputError: fewer rows than ranks.
        """
        if height < self.comm.size:
            raise InputError("ranks that share an image", self.comm.size, f"at most its {height} rows")
        return list(pairwise([0, *accumulate(even_parts(height, self.comm.size))]))

    def cut(self, x: Tensor) -> Tensor:
        """This rank's rows of images (..., height, width) that all ranks have.

        A gradient of the images comes back whole, the same on all ranks.
        """
        found: Tensor = _Cut.apply(x, self)
        return found

    def join(self, own: Tensor, height: int) -> Tensor:
        """All rows, on all ranks, which go on with them in the same way.

        Args:
            own: this rank's, (..., rows, width).
            height: of the image.
        """
        found: Tensor = _Join.apply(own, height, self)
        return found

    def fetch(self, own: Tensor, height: int, wanted: Sequence[Range]) -> Tensor:
        """The rows that this rank wants, (..., rows, width); ranges of ranks may overlap: halos.

        Args:
            own: this rank's rows.
            height: of the image.
            wanted: by each rank; not empty.
        """
        found: Tensor = _Fetch.apply(own, height, wanted, self)
        return found

    # -- messages ------------------------------------------------------------------------------------------

    def gather(self, own: Tensor, height: int) -> Tensor:
        """All rows from those of each rank."""
        return self.move(own, self.ranges(height), [(0, height)] * self.comm.size)

    def move(self, rows: Tensor, there: Sequence[Range], wanted: Sequence[Range]) -> Tensor:
        """Rows go from where they are to where they are wanted.

        Args:
            rows: those of `there[rank]`.
            there, wanted: ranges of each rank.

        Returns:
            the rows of `wanted[rank]`; those that several ranks have are added up, in the order of the ranks.
        """
        rank, rows = self.comm.rank, rows.detach().contiguous()
        first, last = wanted[rank]
        found = rows.new_zeros(*rows.shape[:-2], last - first, rows.shape[-1])
        coming = {k: each for k, own in enumerate(there) if (each := _overlap(own, wanted[rank]))}
        going = {k: each for k, other in enumerate(wanted) if (each := _overlap(there[rank], other))}
        parts = {k: _between(rows, each, there[rank][0]) for k, each in going.items()}
        received = {k: incoming(rows, _between(found, each, first).shape) for k, each in coming.items() if k != rank}
        requests = [self.comm.Irecv(as_message(part), k) for k, part in received.items()]
        requests += [self._send(part, k) for k, part in parts.items() if k != rank]
        for request in requests:
            request.Wait()
        for k, each in coming.items():
            _between(found, each, first).add_(parts[k] if k == rank else arrived(received[k], rows))
        return found

    def _send(self, part: Tensor, rank: int) -> Any:
        self.sent += part.numel() * part.element_size()
        self.sends += 1
        return self.comm.Isend(as_message(outgoing(part)), rank)


def _overlap(one: Range, other: Range) -> Range | None:
    low, high = max(one[0], other[0]), min(one[1], other[1])
    return (low, high) if low < high else None


def _between(rows: Tensor, wanted: Range, first: int) -> Tensor:
    """Rows `wanted` of those that begin with `first`."""
    return rows[..., wanted[0] - first : wanted[1] - first, :]


class _Fetch(torch.autograd.Function):
    """Halos forward; backward, their derivatives are added to the rows they are copies of."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, height: int, wanted: Sequence[Range], rows: ImageRows) -> Tensor:
        ctx.there, ctx.wanted, ctx.rows = rows.ranges(height), wanted, rows
        return rows.move(own, ctx.there, wanted)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:  # type: ignore[override]
        return ctx.rows.move(g, ctx.wanted, ctx.there), None, None, None


class _Cut(torch.autograd.Function):
    """The transpose of what `_Join` does, where each rank has the same derivatives."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: ImageRows) -> Tensor:
        ctx.height, ctx.rows = x.shape[-2], rows
        return _between(x, rows.ranges(ctx.height)[rows.comm.rank], 0).clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:  # type: ignore[override]
        return ctx.rows.gather(g, ctx.height), None


class _Join(torch.autograd.Function):
    """All ranks go on with all rows, and come back with the same derivatives, of which each takes its own."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, height: int, rows: ImageRows) -> Tensor:
        ctx.range = rows.ranges(height)[rows.comm.rank]
        return rows.gather(own, height)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:  # type: ignore[override]
        return _between(g, ctx.range, 0).contiguous(), None, None
