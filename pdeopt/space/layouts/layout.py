"""The unknowns of a step over the ranks of a communicator: owned ones, ghosts, and the exchange of rows.

A rank owns unknowns of each of its steps and sees some that other ranks own, its ghosts. `Layout.extend` brings their
values, `Layout.collect` is its exact transpose: what a rank found for its ghosts goes to their owners, and is added
there. Both send one message to a neighbor for all rows, and both can be differentiated by torch, to any order and under
every transform: the derivative of one is the other, or itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from hashlib import sha256
from typing import Any, cast

import numpy as np
import torch
from mpi4py import MPI
from petsc4py import PETSc
from torch import Tensor

from pdeopt.core.arrays import Array
from pdeopt.core.errors import InputError

#: Tags of the messages to ghosts, and back.
TO_GHOSTS, TO_OWNERS = 27, 28

_silent = ""  # what is done while messages are refused


@contextmanager
def without_messages(what: str) -> Iterator[None]:
    """Inside, an exchange raises `InputError`: for what ranks do each for itself, where a message would never arrive.

    Args:
        what: is done, for the error.
    """
    global _silent
    before, _silent = _silent, what
    try:
        yield
    finally:
        _silent = before


class Layout:
    """Owned unknowns and ghosts of a step on each rank of a communicator.

    Global numbers go through the ranks: those of rank r are starts[r] to starts[r + 1] - 1. Local numbers are the owned
    unknowns 0 to n_owned - 1, then the ghosts in the order in which they are given. Collective when made.

    Args:
        comm: a PETSc or mpi4py communicator of the ranks that have the same steps: `grid.space_comm`.
        n_owned: unknowns of a step that this rank owns, maybe none.
        ghosts: global numbers of unknowns of other ranks that it sees, (n_ghost,), each once, in any order.
        natural: for each owned unknown its number in a numbering of the whole that does not depend on the ranks, for
            files and checkpoints; default the global number. A function that finds them is called when they are first
            asked for, by all ranks.

    Attributes:
        mpi, comm: the communicator of mpi4py and of PETSc.
        n_owned, n_ghost, n_all: unknowns of this rank, ghosts, and both.
        size: unknowns of all ranks.
        starts: first global number of each rank, and `size` at the end, (ranks + 1,).
        ghosts: as given.
        global_numbers: of all local unknowns, owned ones and ghosts, (n_all,).
        digest: of the local numbering.
        neighbors: ranks to which a message goes or from which one comes.

    Raises:
        InputError: numbers that are none of other ranks, or twice; on the rank that has them.

    Example:
        >>> layout = Layout(grid.space_comm, 4, ghosts=[4] if rank == 0 else [3])      # on two ranks
        >>> layout.extend(u)                                             # (batch, 4) -> (batch, 5)
    """

    def __init__(self, comm: Any, n_owned: int, ghosts: Any = (), natural: Any = None) -> None:
        self.mpi = comm.tompi4py() if isinstance(comm, PETSc.Comm) else comm
        self.n_owned, self.ghosts = int(n_owned), np.asarray(ghosts, dtype=np.int64).reshape(-1)
        self.n_ghost = len(self.ghosts)
        self.n_all = self.n_owned + self.n_ghost
        self.starts = np.r_[0, np.cumsum(self.mpi.allgather(self.n_owned))]
        self.size = int(self.starts[-1])
        self._require_ghosts()
        own = np.arange(*self.starts[self.mpi.rank : self.mpi.rank + 2])
        self.comm, self.global_numbers = PETSc.Comm(self.mpi), np.concatenate([own, self.ghosts])
        self.digest = sha256(self.global_numbers.tobytes() + self.starts.tobytes()).digest()
        self._natural = own if natural is None else natural
        _ = None if callable(natural) else self.natural  # which is checked
        self._owners = np.searchsorted(self.starts, self.ghosts, side="right") - 1
        self._connect()

    def _require_ghosts(self) -> None:
        own = range(*self.starts[self.mpi.rank : self.mpi.rank + 2])
        legal = f"numbers of unknowns of other ranks, 0 to {self.size - 1} but not {own.start} to {own.stop - 1}"
        is_own = (self.ghosts >= own.start) & (self.ghosts < own.stop)
        bad = self.ghosts[is_own | (self.ghosts < 0) | (self.ghosts >= self.size)]
        if bad.size:
            raise InputError("ghosts", f"{bad[0]} on rank {self.mpi.rank}", legal)
        if len(np.unique(self.ghosts)) < self.n_ghost:
            raise InputError("ghosts", "a number twice", "each once")

    def _connect(self) -> None:
        """Tell the owners what is seen of theirs; after that each message is a list of places on both sides."""
        wanted = {int(r): np.flatnonzero(self._owners == r) for r in np.unique(self._owners)}
        requests = [self.ghosts[wanted[r]] - self.starts[r] if r in wanted else None for r in range(self.mpi.size)]
        asked = self.mpi.alltoall(requests)
        #: places of ghosts, counted from the first of all local numbers, that a rank owns; own places that a rank sees
        self._from = {r: torch.from_numpy(self.n_owned + place) for r, place in wanted.items()}
        self._to = {r: torch.from_numpy(place) for r, place in enumerate(asked) if place is not None}
        self.neighbors = sorted(self._from.keys() | self._to.keys())
        self.is_silent = not bool(self.mpi.allreduce(int(bool(self.n_ghost))))

    @classmethod
    def replicated(cls, comm: Any, n: int) -> Layout:
        """n unknowns that rank 0 owns and all others see: a few controls of a step, for instance. Collective."""
        mpi = comm.tompi4py() if isinstance(comm, PETSc.Comm) else comm
        return cls(mpi, *((n, ()) if mpi.rank == 0 else (0, np.arange(n))))

    @cached_property
    def natural(self) -> Array:
        """For each owned unknown its number in the numbering of the whole, (n_owned,)."""
        found = np.asarray(self._natural() if callable(self._natural) else self._natural, dtype=np.int64)
        if found.shape != (self.n_owned,):
            raise InputError("natural numbers", f"shape {found.shape}", f"shape ({self.n_owned},)")
        return found

    @cached_property
    def owners(self) -> tuple[Array, Array]:
        """The rank that owns each local unknown, and its number there, (n_all,) both."""
        rank = np.r_[np.full(self.n_owned, self.mpi.rank), self._owners]
        return rank, self.global_numbers - self.starts[rank]

    @cached_property
    def natural_order(self) -> Array:
        """Natural numbers of all unknowns in the order of the global ones, (size,). Collective at the first call."""
        order: Array = np.concatenate(self.mpi.allgather(self.natural))
        if not np.array_equal(np.sort(order), np.arange(self.size)):
            raise InputError("natural numbers of a layout", "numbers twice or missing", f"each of 0 to {self.size - 1}")
        return order

    # -- messages --------------------------------------------------------------------------------------------------

    def extend(self, x: Tensor) -> Tensor:
        """Rows with the values of ghosts, (..., n_owned) -> (..., n_all). Collective, differentiable."""
        return x if self.is_silent else exchange(x, self, False)

    def collect(self, y: Tensor) -> Tensor:
        """The transpose of `extend`: (..., n_all) -> (..., n_owned). Collective, differentiable."""
        return y if self.is_silent else exchange(y, self, True)

    def sum(self, x: Tensor) -> Tensor:
        """The sum over the ranks of a tensor of equal shape. Collective."""
        return _reduced(self.mpi, x, MPI.SUM)

    def max(self, x: Tensor) -> Tensor:
        """The maximum over the ranks, entry by entry; NaN where a rank has NaN. Collective."""
        nan = _reduced(self.mpi, x.isnan().double(), MPI.MAX) > 0
        found = _reduced(self.mpi, x.nan_to_num(nan=0.0), MPI.MAX)
        return torch.where(nan, torch.nan, found)

    def all(self, flag: bool) -> bool:
        """Whether a flag is set on all ranks. Collective."""
        return bool(self.mpi.allreduce(int(flag), MPI.MIN)) if self.mpi.size > 1 else bool(flag)

    def _extend(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.n_owned) if self.n_owned else x.new_zeros(x.shape[:-1].numel(), 0)
        out = torch.cat([rows, rows.new_empty(len(rows), self.n_ghost)], dim=1)
        received = self._message(rows, self._to, self._from, TO_GHOSTS)
        for rank, values in received.items():
            out[:, self._from[rank]] = values
        return out.reshape(*x.shape[:-1], self.n_all)

    def _collect(self, y: Tensor) -> Tensor:
        rows = y.reshape(-1, self.n_all) if self.n_all else y.new_zeros(y.shape[:-1].numel(), 0)
        out = rows[:, : self.n_owned].clone()
        received = self._message(rows, self._from, self._to, TO_OWNERS)
        for rank, values in received.items():
            out[:, self._to[rank]] += values
        return out.reshape(*y.shape[:-1], self.n_owned)

    def _message(
        self, rows: Tensor, sends: dict[int, Tensor], receives: dict[int, Tensor], tag: int
    ) -> dict[int, Tensor]:
        """Columns of rows to each neighbor, all rows in one message; what comes from each, in the order of ranks."""
        if _silent:
            raise InputError(_silent, "values of neighbors in space", "functions of the unknowns of this rank alone")
        buffers = {rank: rows.new_empty(len(rows), len(place)) for rank, place in sorted(receives.items())}
        requests = [self.mpi.Irecv(buffer.numpy(), rank, tag) for rank, buffer in buffers.items()]
        packed = [(rank, rows[:, place].contiguous()) for rank, place in sends.items()]
        requests += [self.mpi.Isend(values.numpy(), rank, tag) for rank, values in packed]
        MPI.Request.Waitall(requests)
        return buffers


class Exchange(torch.autograd.Function):
    """`Layout.extend`, or `collect`, as a linear function of torch: see the module."""

    @staticmethod
    def forward(x: Tensor, layout: Layout, back: bool) -> Tensor:
        rows = x.detach()
        return layout._collect(rows) if back else layout._extend(rows)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.layout, ctx.back = inputs

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor, None, None]:
        return exchange(cotangents[0], ctx.layout, not ctx.back), None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        return exchange(tangents[0], ctx.layout, ctx.back)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int, None, None], x: Tensor, layout: Layout, back: bool) -> tuple[Tensor, int]:
        return exchange(x.movedim(in_dims[0], 0), layout, back), 0


def exchange(x: Tensor, layout: Layout, back: bool) -> Tensor:
    """Rows extended by ghosts, or, `back`, collected from them. Collective."""
    return cast(Tensor, Exchange.apply(x, layout, back))  # type: ignore[no-untyped-call]


def extended(
    layout: Layout, controls: Layout, u_old: Tensor, u_new: Tensor, z: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """States and controls of steps with their ghosts: one message to a neighbor for both states. Collective."""
    u = torch.cat([u_old.expand(len(u_new), -1), u_new]) if not layout.is_silent else None
    states = (u_old, u_new) if u is None else layout.extend(u).split(len(u_new))
    return states[0], states[1], controls.extend(z)


def _reduced(mpi: Any, x: Tensor, operation: MPI.Op) -> Tensor:
    if mpi.size == 1:
        return x
    total = x.detach().to(torch.float64).clone().contiguous()
    if total.numel():
        mpi.Allreduce(MPI.IN_PLACE, total.numpy(), operation)
    return total
