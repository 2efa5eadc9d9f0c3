"""Transfers between a time grid and its coarsened one, as sparse matrices (fine steps of this rank) x (coarse steps).

A coarse step is a window of fine ones and ends at its last node. Vectors of rows are moved by `transfer_matrix`, the
matrix kron(transfer, identity) between PETSc layouts, so that PETSc sends what must be sent. `Move` brings rows of one
grid to other ranks; who owns which steps of each level says `level_offsets`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from mpi4py import MPI
from petsc4py import PETSc
from torch import Tensor

from pdeopt.core.arrays import Array, index_array
from pdeopt.core.errors import InputError
from pdeopt.steps.exchange.parcels import arrived, as_message, incoming, outgoing
from pdeopt.steps.timegrid import TimeGrid, require_whole_steps


def interpolation(grid: TimeGrid, factor: int) -> sp.csr_matrix:
    """Prolongation of nodal values, linear in time and zero at t_0. Shape (n_local, coarse steps).

    Args:
        grid: the fine grid.
        factor: steps of the fine grid that become one.
    """
    step, window, nodes = _windows(grid, factor)
    start, end = grid.times[nodes[window]], grid.times[nodes[window + 1]]
    share = (grid.times[step] - start) / (end - start)
    row = np.arange(len(step))
    inside = window > 0
    entries = np.r_[share, 1 - share[inside]], (np.r_[row, row[inside]], np.r_[window, window[inside] - 1])
    return sp.csr_matrix(entries, shape=(len(step), len(nodes) - 1))


def adjoint_interpolation(grid: TimeGrid, factor: int) -> sp.csr_matrix:
    """Prolongation of multipliers, linear in time and zero at t_N. Shape (n_local, coarse steps).

    The multiplier of a step belongs to its first node: the adjoint runs from t_N, where it is zero, to t_0, where
    it is free.
    """
    step, window, nodes = _windows(grid, factor)
    start, end = grid.times[nodes[window]], grid.times[nodes[window + 1]]
    share = (grid.times[step - 1] - start) / (end - start)
    row = np.arange(len(step))
    inside = (window < len(nodes) - 2) & (share > 0)
    entries = np.r_[1 - share, share[inside]], (np.r_[row, row[inside]], np.r_[window, window[inside] + 1])
    return sp.csr_matrix(entries, shape=(len(step), len(nodes) - 1))


def piecewise_constant(grid: TimeGrid, factor: int) -> sp.csr_matrix:
    """Prolongation of what is constant on windows, as a control. Shape (n_local, coarse steps)."""
    step, window, nodes = _windows(grid, factor)
    entries = np.ones(len(step)), window, np.arange(len(step) + 1)
    return sp.csr_matrix(entries, shape=(len(step), len(nodes) - 1))


def injection(grid: TimeGrid, factor: int, adjoint: bool = False) -> sp.csr_matrix:
    """The transpose of a restriction by injection at the last (`adjoint`: first) step of each window.

    Block Jacobi leaves a residual just there, where its windows meet. It is taken as it is, the sum over the window:
    a density times the longer step would count it `factor` times, level by level. Shape (n_local, coarse steps).
    """
    step, window, nodes = _windows(grid, factor)
    row = np.flatnonzero(step == (nodes[window] + 1 if adjoint else nodes[window + 1]))
    return sp.csr_matrix((np.ones(len(row)), (row, window[row])), shape=(len(step), len(nodes) - 1))


def _windows(grid: TimeGrid, factor: int) -> tuple[Array, Array, Array]:
    """Steps of this rank (from 1), the window of each (from 0), and the nodes between windows."""
    step = np.arange(grid.begin + 1, grid.end + 1)
    return step, (step - 1) // factor, np.r_[0, grid.window_ends(factor)]


def transfer_matrix(
    grid: TimeGrid | None, coarse: TimeGrid | None, comm: PETSc.Comm, fields: Sequence[tuple[sp.csr_matrix, int]]
) -> PETSc.Mat:
    """The PETSc matrix from vectors of the coarse grid to those of the fine one; the caller destroys it. Collective.

    Args:
        grid, coarse: None on ranks that have no step there.
        comm: of the vectors, which are empty on such ranks.
        fields: for each field of the vector, in the order of its storage on a rank: transfer and unknowns a step.
    """
    mpi = comm.tompi4py()
    if grid is not None:
        require_whole_steps(grid, "multigrid in time", "-kkt_precond reduced | wathen | direct, or space_ranks 1")
    rows, cols = (0 if each is None else each.n_local for each in (grid, coarse))
    width = sum(size for _, size in fields)
    owned = np.array(mpi.allgather(cols))  # coarse steps of each rank
    first, start = np.r_[0, np.cumsum(owned)], np.r_[0, np.cumsum(owned * width)]
    parts, before = [], 0
    for transfer, size in fields:
        T = sp.csr_matrix((0, first[-1])) if grid is None else transfer
        step = np.arange(first[-1])
        owner = np.searchsorted(first, step, side="right") - 1
        place = start[owner] + owned[owner] * before + (step - first[owner]) * size
        whole = sp.csr_matrix(sp.kron(T, sp.eye(size), format="csr"))
        columns = (place[:, None] + np.arange(size)).ravel()[whole.indices]
        parts.append(sp.csr_matrix((whole.data, columns, whole.indptr), shape=(whole.shape[0], start[-1])))
        before += size
    local = sp.csr_matrix(sp.vstack(parts))
    local.sort_indices()
    csr = index_array(local.indptr), index_array(local.indices), local.data
    return PETSc.Mat().createAIJ(((rows * width, None), (cols * width, None)), csr=csr, comm=comm)


def interval_sums(rows: Tensor, factor: int) -> Tensor:
    """Rows of steps added up over intervals of `factor` steps, the last of which may be shorter: (intervals, ...)."""
    sums = rows.new_zeros((-(-len(rows) // factor), *rows.shape[1:]))
    return sums.index_add(0, torch.arange(len(rows), device=rows.device) // factor, rows)


class Move:
    """Rows of steps from the ranks that own them to others, and back: one message between two ranks that share some.

    Args:
        mpi: an mpi4py communicator.
        source, target: rank r owns the steps offsets[r] to offsets[r + 1] - 1, before and after, (ranks + 1,) each.
    """

    def __init__(self, mpi: Any, source: Array, target: Array) -> None:
        self.mpi, self.source, self.target = mpi, source, target
        self.is_needed = not np.array_equal(source, target)

    def there(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """The rows that this rank has after the move, of each tensor; none on a rank that gets none. Collective.

        Args:
            parts: tensors with the rows that it owns, of one shape and type.
        """
        if not self.is_needed:
            return list(parts)
        moved = self._move(torch.stack(tuple(parts), dim=1), self.source, self.target)
        return [part.contiguous() for part in moved.unbind(1)]

    def back(self, rows: Tensor) -> Tensor:
        """The inverse of `there`, of one tensor; a rank without rows gives an empty one, for shape and type."""
        return self._move(rows, self.target, self.source) if self.is_needed else rows

    def _move(self, rows: Tensor, owned: Array, wanted: Array) -> Tensor:
        rank, sent = self.mpi.rank, []
        count = int(wanted[rank + 1] - wanted[rank])
        own, found = outgoing(rows), incoming(rows, (count, *rows.shape[1:]))
        for other, first, last in _shared(owned, rank, wanted):
            part = own[first - owned[rank] : last - owned[rank]]
            if other == rank:
                found[first - wanted[rank] : last - wanted[rank]] = part
            else:
                sent.append((part, self._send(part, other)))
        for other, first, last in _shared(wanted, rank, owned):
            if other != rank:
                self.mpi.Recv(as_message(found[first - wanted[rank] : last - wanted[rank]]), other)
        MPI.Request.Waitall([request for _, request in sent])
        return arrived(found, rows)

    def _send(self, part: Tensor, rank: int) -> MPI.Request:
        request: MPI.Request = self.mpi.Isend(as_message(part), rank)
        return request


def _shared(owned: Array, rank: int, others: Array) -> list[tuple[int, int, int]]:
    """The ranks that own steps of this one in another distribution: (rank, first step, the one after the last)."""
    first, last = np.maximum(others[:-1], owned[rank]), np.minimum(others[1:], owned[rank + 1])
    return [(int(r), int(first[r]), int(last[r])) for r in np.flatnonzero(first < last)]


def whole_intervals(num_steps: int, factors: Sequence[int], ranks: int) -> Array:
    """Offsets of the ranks' steps such that each has whole intervals, on as many levels as that is possible on.

    Args:
        num_steps: of the finest level.
        factors: coarsening factors, finest level first.
        ranks: how many.

    Returns:
        (ranks + 1,): rank r owns the 0-based steps offsets[r] to offsets[r + 1] - 1, as evenly as whole intervals can.

    Raises:
        InputError: more ranks than intervals of the finest level.
    """
    sizes = np.cumprod(np.asarray([1, *factors]))[min(1, len(factors)) :]
    fits = [int(size) for size in sizes if -(-num_steps // size) >= ranks]
    if not fits:
        most = -(-num_steps // int(sizes[0]))
        raise InputError("ranks", f"{ranks} for {num_steps} steps in intervals of {sizes[0]}", f"at most {most}")
    size = fits[-1]
    parts = -(-num_steps // size)
    shares = np.array([r * (parts // ranks) + min(r, parts % ranks) for r in range(ranks + 1)])
    return np.minimum(size * shares, num_steps)


def level_offsets(offsets: Array, factors: Sequence[int]) -> list[tuple[Array, Array]]:
    """Who owns which steps of each level: as the level before leaves them, and where they are solved.

    Args:
        offsets: of the finest level, whole intervals of it on each rank.
        factors: coarsening factors, finest level first.

    Returns:
        Two arrays (ranks + 1,) a level, equal where nothing moves. A rank without steps has an empty range.
    """
    found = [(offsets, offsets)]
    for level, factor in enumerate(factors):
        left, rest = -(-found[-1][1] // factor), factors[level + 1 :]
        starts = left[:-1][np.diff(left) > 0]
        found.append((left, _on_fewer(left, rest) if rest and (starts % rest[0]).any() else left))
    return found


def _on_fewer(left: Array, factors: Sequence[int]) -> Array:
    """Offsets with whole intervals on each rank that has steps: the first owner of its first step, where it can be."""
    ranks, num_steps = len(left) - 1, int(left[-1])
    few = min(int((np.diff(left) > 0).sum()), -(-num_steps // factors[0]))
    shares = whole_intervals(num_steps, factors, few)
    owners, counts = np.searchsorted(left, shares[:-1], side="right") - 1, np.zeros(ranks, dtype=int)
    able = np.flatnonzero(np.diff(left) > 0)
    place = -1
    for j, owner in enumerate(owners):  # each has a rank of its own, among those that had steps
        place = min(max(int(np.searchsorted(able, owner)), place + 1), len(able) - few + j)
        counts[able[place]] = shares[j + 1] - shares[j]
    return np.concatenate([[0], np.cumsum(counts)])
