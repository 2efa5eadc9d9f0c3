"""Transfers between a time grid and its coarsened one, as sparse matrices (fine steps of this rank) x (coarse steps).

A coarse step is a window of fine ones and ends at its last node. Vectors of rows are moved by `transfer_matrix`, the
matrix kron(transfer, identity) between PETSc layouts, so that PETSc sends what must be sent.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import scipy.sparse as sp
from petsc4py import PETSc

from pdeopt.core.arrays import Array, index_array
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
