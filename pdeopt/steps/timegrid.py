"""Time grids distributed over the ranks of a communicator: who owns which steps.

Steps are 1..N; rank r owns a contiguous slab of them. A field has one row a step, shape
(n_local, dim). `shift` brings row i-1 to row i, `shift_adjoint` is its transpose; these two
halo exchanges and the reductions are the only messages of an evaluation.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from mpi4py import MPI
from petsc4py import PETSc
from torch import Tensor

from pdeopt.core.arrays import Array, real_array, real_number
from pdeopt.core.autodiff import plainly
from pdeopt.core.errors import InputError, StepFailure
from pdeopt.core.memory import DOUBLE, require_memory
from pdeopt.steps.exchange.neighbors import Neighbors
from pdeopt.steps.exchange.parcels import from_rank


@dataclass(frozen=True)
class Steps:
    """What a batch of steps knows besides its unknowns. All tensors have one entry a step.

    Attributes:
        index: step numbers i in 1..N; the initial node is step 0 with `dt` 0. Shape (batch,).
        t_old, t_new: the interval of each step, in the grid's unit of time. Shape (batch,).
        weight: trapezoidal weight of the node t_new, in the unit of time. Shape (batch,).
        num_steps: N of the whole grid.
        p: the global parameters, shape (param_dim,); empty where a problem has none.
    """

    index: Tensor
    t_old: Tensor
    t_new: Tensor
    weight: Tensor
    num_steps: int
    p: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.float64))

    @property
    def dt(self) -> Tensor:
        """Lengths of the steps, shape (batch,)."""
        return self.t_new - self.t_old

    @property
    def lengths(self) -> Tensor:
        """`dt`, or its mean, (1,), where all steps are equal to the rounding of the times: for matrices of steps."""
        dt = self.dt
        rounding = 4 * torch.finfo(dt.dtype).eps * self.t_new.abs().amax()
        return dt.mean().reshape(1) if dt.amax() - dt.amin() <= rounding else dt

    @property
    def t_mid(self) -> Tensor:
        """Midpoints of the steps, shape (batch,)."""
        return 0.5 * (self.t_old + self.t_new)

    @property
    def has_last(self) -> bool:
        """Whether the last row is the final step N."""
        return len(self) > 0 and int(self.index[-1]) == self.num_steps

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, rows: slice) -> Steps:
        fields = {name: getattr(self, name)[rows] for name in ("index", "t_old", "t_new", "weight")}
        return replace(self, **fields)

    @contextmanager
    def naming(self) -> Iterator[None]:
        """Inside, a `StepFailure` says which of these steps it means, and when."""
        try:
            yield
        except StepFailure as failure:
            if failure.row is None and (len(self) > 1 or self.num_steps == 1):
                raise
            number, t = int(self.index[failure.row or 0]), float(self.t_new[failure.row or 0])
            raise StepFailure(f"{failure.what}: step {number}, to t = {t:.6g}", failure.remedy, failure.row) from None

    def with_parameters(self, p: Tensor) -> Steps:
        """The same steps at the parameters `p`, shape (param_dim,)."""
        return replace(self, p=p)


class TimeGrid:
    """Nodes t_0 < ... < t_N and the distribution of the N steps over a communicator.

    Each rank owns a contiguous slab of steps and holds fields as rows, one a step, (n_local, dim). Every method that
    talks to other ranks says "Collective": all ranks of the communicator must call it.

    Args:
        times: the N + 1 nodes, in any unit of time.
        comm: a PETSc or mpi4py communicator; default PETSc's.
        offsets: rank r owns the 0-based steps offsets[r] to offsets[r + 1]; default even shares.
        space_ranks: so many ranks share each step, k: rank r has the steps of place r // k in time and the rows of
            place r % k in space. Offsets are those of places in time.

    Attributes:
        times, num_steps: the nodes, (N + 1,), and N.
        comm, mpi: the communicator of PETSc and of mpi4py, of all ranks.
        time: that of mpi4py of the ranks that have the same rows, one after the other in time.
        space, space_comm: those of mpi4py and PETSc of the ranks that have the same steps.
        space_ranks: how many these are.
        begin, end, n_local: this rank owns the 0-based steps begin to end - 1, n_local of them.
        is_first, is_last: whether this rank owns step 1, and step N.
        is_root: whether this is the first of all ranks, which has the global parameters.
        steps: these steps, as constraint and objective see them.
        node_zero: the initial node as a step of length 0.
        neighbors: messages to the ranks before and after.

    Raises:
        InputError: fewer than one step, nodes that do not increase, more places in time than steps, or ranks that are
            no multiple of `space_ranks`.

    Example:
        >>> grid = TimeGrid.uniform(100, T=1.0)
        >>> u_old = grid.shift(u, u0)                  # (n_local, dim)
        >>> total = grid.sum(u.square().sum())
    """

    @plainly
    def __init__(
        self, times: Sequence[float] | Array, comm: Any = None, offsets: Array | None = None, space_ranks: int = 1
    ) -> None:
        self.times = real_array(times, "times")
        self.comm = PETSc.COMM_WORLD if comm is None else comm
        self.mpi = self.comm.tompi4py() if isinstance(self.comm, PETSc.Comm) else self.comm
        self.comm = PETSc.Comm(self.mpi)
        self.num_steps = N = self.times.size - 1
        is_masked = isinstance(self.times, np.ma.MaskedArray)
        if (
            self.times.ndim != 1
            or N < 1
            or is_masked
            or not (np.diff(self.times) > 0).all()
            or np.isinf(self.times).any()
        ):
            raise InputError("times", self.times.tolist()[:4], "at least 2 finite, strictly increasing nodes")
        self.space_ranks = _whole_share(space_ranks, self.mpi.size)
        self.time, self.space = _split(self.mpi, self.space_ranks)
        self.space_comm = PETSc.Comm(self.space)
        self.is_root = bool(self.mpi.rank == 0)
        if self.time.size > N:
            got = f"{self.mpi.size} for {N} time steps"
            legal = "at most one rank a step" if space_ranks == 1 else f"at most {space_ranks} ranks a step"
            raise InputError("ranks", got, legal)
        if self.mpi.size > 1 and "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(1)  # ranks that each start a thread a core run slower than one rank
        #: offsets[r] : offsets[r + 1] are the 0-based steps of rank r; of even shares the first ranks hold the surplus.
        self.offsets = _even_shares(N, self.time.size) if offsets is None else np.asarray(offsets)
        self.begin, self.end = (int(n) for n in self.offsets[self.time.rank : self.time.rank + 2])
        self.n_local = self.end - self.begin
        self.is_first, self.is_last = self.begin == 0, self.end == N
        #: the steps of this rank, and the initial node as a step of length 0, so that one function gives every J_i
        self.steps = self._steps(np.arange(self.begin + 1, self.end + 1))
        self.node_zero = self._steps(np.array([0]))
        #: messages to the ranks before and after
        self.neighbors = Neighbors(self.time)
        self._coarser: dict[int | tuple[int, ...], TimeGrid | None] = {}

    @classmethod
    def uniform(cls, num_steps: int, T: float, comm: Any = None, space_ranks: int = 1) -> TimeGrid:
        """N = num_steps equal steps on [0, T].

        Args:
            num_steps: N >= 1.
            T: the end of the time interval, > 0, in any unit of time.
            comm: a PETSc or mpi4py communicator; default PETSc's.
            space_ranks: so many ranks share each step.

        Raises:
            InputError: no whole number of steps, a T that is not positive, or more ranks than steps.
        """
        try:
            N = operator.index(num_steps)
        except TypeError:
            N = 0
        if N < 1:
            raise InputError("num_steps", repr(num_steps), "an integer >= 1")
        require_memory(5 * DOUBLE * N, "num_steps", N, "fewer")  # of the grid alone, on every rank
        return cls(
            np.linspace(0.0, real_number(T, "T", "a finite number > 0", above=0.0), N + 1), comm, None, space_ranks
        )

    def coarsen(self, factor: int, counts: Array | None = None) -> TimeGrid | None:
        """The grid of every `factor`-th node and the last; None on a rank that owns none of them. Collective.

        A coarse step belongs to the rank that owns its last node, so nothing moves between the grids, unless `counts`
        says how many each rank gets; ranks that run out of steps leave the communicator.
        """
        if factor < 1:
            raise InputError("coarsening factor", factor, "an integer >= 1")
        key = factor if counts is None else (factor, *counts.tolist())
        if key not in self._coarser:
            ends = self.window_ends(factor)
            if counts is None:
                counts = np.diff(np.searchsorted(ends, self.offsets, side="right"))
            comm, idle = self.mpi, counts == 0
            if idle.any():
                comm = self.mpi.Split(MPI.UNDEFINED if idle[self.time.rank] else 0, self.mpi.rank)
            offsets, times = np.r_[0, np.cumsum(counts[~idle])], self.times[np.r_[0, ends]]
            mine = counts[self.time.rank] > 0
            self._coarser[key] = TimeGrid(times, comm, offsets, self.space_ranks) if mine else None
        return self._coarser[key]

    def window(self, begin: int, end: int) -> TimeGrid:
        """The steps begin + 1 to end, on this rank alone; they keep their numbers and weights."""
        require_whole_steps(self, "windows of a rank alone")
        grid = TimeGrid(self.times[begin : end + 1], MPI.COMM_SELF)
        grid.steps, grid.node_zero = self._steps(np.arange(begin + 1, end + 1)), self._steps(np.array([begin]))
        return grid

    def window_ends(self, size: int) -> Array:
        """The last steps of windows of `size` steps, counted from step 1; the last window may be shorter."""
        return np.minimum(np.arange(size, self.num_steps + size, size), self.num_steps)

    def samples(self) -> Steps:
        """The first, a middle and the last step, on every rank: for finding sparsities."""
        return self._steps(np.unique([1, (self.num_steps + 1) // 2, self.num_steps]))

    def _steps(self, index: Array) -> Steps:
        dt = np.diff(self.times, prepend=self.times[0], append=self.times[-1])  # dt[i] of step i, 0 at both ends
        as_tensor = torch.from_numpy
        return Steps(
            index=as_tensor(index),
            t_old=as_tensor(self.times[np.maximum(index - 1, 0)]),
            t_new=as_tensor(self.times[index]),
            weight=as_tensor(0.5 * (dt[index] + dt[index + 1])),
            num_steps=self.num_steps,
        )

    def shift(self, rows: Tensor, first: Tensor | None = None) -> Tensor:
        """Row i-1 at row i: u_old from u. Row 1 gets `first`, shape (dim,), or zero. Collective.

        `rows` has shape (n_local, dim), and so has the result. One message a rank.
        """
        before = self.neighbors.exchange(rows[-1], toward=+1)
        if before is None:
            before = torch.zeros_like(rows[0]) if first is None else first
        return torch.cat([before.reshape(1, -1), rows[:-1]])

    def shift_adjoint(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The transpose of `shift`: row i+1 at row i, zero at row N. Collective.

        Returns the rows, shape (n_local, dim), and the cotangent of `first`, shape (dim,), which is
        row 1 on the rank that owns it and zero elsewhere.
        """
        after = self.neighbors.exchange(rows[0], toward=-1)
        if after is None:
            after = torch.zeros_like(rows[0])
        first = rows[0] if self.is_first else torch.zeros_like(rows[0])
        return torch.cat([rows[1:], after.reshape(1, -1)]), first

    # -- all ranks --------------------------------------------------------------------------------------------

    def sum(self, value: Tensor | float) -> Tensor:
        """The sum over ranks of a scalar or tensor of equal shape. Collective."""
        return _summed(self.mpi, value)

    def over_steps(self, value: Tensor) -> Tensor:
        """The sum over the ranks with the same rows, of all steps: of a tensor by unknowns of a step. Collective."""
        return _summed(self.time, value)

    def max(self, value: Tensor) -> Tensor:
        """The maximum over ranks of a scalar; NaN where a rank has NaN. Collective."""
        found = torch.tensor(self.mpi.allgather(float(value)), dtype=torch.float64)
        return found.amax()

    def all(self, flag: bool) -> bool:
        """Whether a flag is set on all ranks. Collective."""
        return bool(self.mpi.allreduce(int(flag), MPI.MIN)) if self.mpi.size > 1 else bool(flag)

    def from_first(self, value: Tensor) -> Tensor:
        """`value` of rank 0 on all ranks; the shape must be the same everywhere. Collective."""
        return from_rank(self.mpi, value, 0)

    def gather(self, rows: Tensor) -> Tensor | None:
        """All rows, (N, dim), on rank 0, where ranks share a step in their order; None on the others. Collective."""
        parts, k = self.mpi.gather(rows.numpy()), self.space_ranks
        if parts is None:
            return None
        whole = [np.concatenate(parts[r : r + k], axis=1) for r in range(0, len(parts), k)] if k > 1 else parts
        return torch.from_numpy(np.concatenate(whole))


def require_whole_steps(grid: TimeGrid, what: str, legal: str = "space_ranks 1") -> None:
    """Raise `InputError` where ranks share a step, for what takes the rows of a rank for whole ones."""
    if grid.space_ranks > 1:
        raise InputError(what, f"{grid.space_ranks} ranks a step", legal)


def _whole_share(k: Any, ranks: int) -> int:
    if not (isinstance(k, (int, np.integer)) and not isinstance(k, bool) and k >= 1 and ranks % k == 0):
        raise InputError("space_ranks", k, f"an integer >= 1 of which the number of ranks, {ranks}, is a multiple")
    return int(k)


def _split(mpi: Any, space_ranks: int) -> tuple[Any, Any]:
    """The communicators of the ranks with the same rows, and of those with the same steps. Collective."""
    if space_ranks == 1:
        return mpi, MPI.COMM_SELF
    time, place = divmod(mpi.rank, space_ranks)
    return mpi.Split(place, time), mpi.Split(time, place)


def _summed(mpi: Any, value: Tensor | float) -> Tensor:
    total = torch.as_tensor(value, dtype=torch.float64).detach().clone().contiguous()
    if mpi.size > 1 and total.numel() > 0:
        mpi.Allreduce(total.numpy().copy(), total.numpy())
    return total


def _even_shares(N: int, ranks: int) -> Array:
    return np.array([r * (N // ranks) + min(r, N % ranks) for r in range(ranks + 1)])
