"""Layouts from what describes a step as a whole: a structured grid of PETSc, the sparsity of a matrix."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp
from petsc4py import PETSc

from pdeopt.core.arrays import Array, index_array
from pdeopt.core.errors import InputError
from pdeopt.space.layouts.layout import Layout


def petsc_comm(comm: Any) -> PETSc.Comm:
    """A communicator of PETSc for one of PETSc or of mpi4py."""
    return comm if isinstance(comm, PETSc.Comm) else PETSc.Comm(comm)


class Patch(NamedTuple):
    """A box of a structured grid that a rank owns, with the ghosts around it.

    Attributes:
        layout: of its nodes; owned ones first, then ghosts.
        box: first and last node + 1 that the rank owns, by axis, as slices of the whole grid.
        padded: the same with ghosts, as slices of the whole grid.
        shape: nodes of the whole grid by axis.
        width, has_corners: how far a node sees along the axes, and whether into corners.
        order: local numbers of the nodes of the padded box, in its shape; so rows[:, order] is a batch of boxes. A
            node outside the grid, and a corner that no message brings, has the number n_all: pad rows by one zero.
    """

    layout: Layout
    box: tuple[slice, ...]
    padded: tuple[slice, ...]
    order: Array
    shape: tuple[int, ...]
    width: int
    has_corners: bool

    def stencil(self) -> sp.csr_matrix:
        """The pattern of rows that see their neighbors up to the width, (n_owned, n_all)."""
        w, axes = self.width, self.order.ndim
        inner = tuple(slice(w, n - w) for n in self.order.shape)
        rows, cols = [], []
        for shift in itertools.product(range(-w, w + 1), repeat=axes):
            if self.has_corners or np.count_nonzero(shift) <= 1:
                seen = self.order[tuple(slice(each.start + d, each.stop + d) for each, d in zip(inner, shift))]
                is_there = seen.ravel() < self.layout.n_all
                rows.append(self.order[inner].ravel()[is_there])
                cols.append(seen.ravel()[is_there])
        places = np.concatenate(rows), np.concatenate(cols)
        return sp.csr_matrix((np.ones(len(places[0])), places), shape=(self.layout.n_owned, self.layout.n_all))


def grid_layout(comm: Any, shape: Sequence[int], width: int = 1, stencil: str = "star") -> Patch:
    """The nodes of a structured grid of one to three axes, cut into boxes as PETSc's DMDA cuts it. Collective.

    Args:
        comm: of the ranks that share a step, `grid.space_comm`.
        shape: nodes by axis, the first axis slowest, as arrays have it.
        width: how far a node sees along an axis.
        stencil: `star` sees along the axes, `box` the corners, too.

    Raises:
        InputError: more ranks than nodes along the axes.

    Example:
        >>> patch = grid_layout(grid.space_comm, (24, 24, 24))
        >>> u = patch.layout.extend(u)                                         # (batch, n_owned + ghosts)
        >>> v = torch.nn.functional.pad(u, (0, 1))[:, torch.from_numpy(patch.order)]   # zeros outside the grid
        >>> Lu = v[:, 2:, 1:-1, 1:-1] + v[:, :-2, 1:-1, 1:-1] - 2 * v[:, 1:-1, 1:-1, 1:-1]
    """
    nodes = tuple(int(n) for n in shape)
    if stencil not in ("star", "box") or not 1 <= len(nodes) <= 3 or min(nodes) < 1:
        raise InputError("grid", f"shape {tuple(shape)}, stencil {stencil}", "one to three axes; star | box")
    mpi = petsc_comm(comm).tompi4py()
    da = _dmda(nodes, width, stencil == "box", petsc_comm(comm))
    lower, size = da.getCorners()
    box = tuple(slice(a, a + n) for a, n in zip(reversed(lower), reversed(size)))
    da.destroy()
    return _patch(mpi, nodes, box, width, stencil == "box")


def petsc_grid(patch: Patch, comm: Any) -> PETSc.DMDA:
    """The structured grid of PETSc whose vectors have the owned unknowns of a patch in their order. Collective."""
    return _dmda(patch.shape, patch.width, patch.has_corners, petsc_comm(comm))


def _dmda(shape: tuple[int, ...], width: int, has_corners: bool, comm: PETSc.Comm) -> PETSc.DMDA:
    axes = shape[::-1]  # PETSc's first axis is the fastest
    kind = PETSc.DMDA.StencilType.BOX if has_corners else PETSc.DMDA.StencilType.STAR
    parts, edges = _parts(axes, comm.getSize(), width), ["none"] * len(axes)
    return PETSc.DMDA().create(axes, 1, parts, boundary_type=edges, stencil_type=kind, stencil_width=width, comm=comm)


def _parts(axes: tuple[int, ...], ranks: int, width: int) -> tuple[int, ...]:
    """Ranks along each axis, so that boxes share as few faces as possible and no box is thinner than the stencil."""
    found = [
        parts for parts in _factors(ranks, len(axes)) if all(p == 1 or n // p >= width for n, p in zip(axes, parts))
    ]
    if not found:
        raise InputError("ranks of a step", f"{ranks} for {axes[::-1]} nodes", "fewer ranks, or a finer grid")
    nodes = np.prod(axes)
    return min(found, key=lambda parts: (sum((p - 1) * nodes / n for n, p in zip(axes, parts)), parts))


def _factors(number: int, count: int) -> list[tuple[int, ...]]:
    """All ways to write a number as a product of so many factors."""
    if count == 1:
        return [(number,)]
    return [(k, *rest) for k in range(1, number + 1) if number % k == 0 for rest in _factors(number // k, count - 1)]


def _patch(mpi: Any, shape: tuple[int, ...], box: tuple[slice, ...], width: int, corners: bool) -> Patch:
    """Ghosts of a box: nodes of its surroundings, in the numbers of their owners' boxes."""
    axes = [np.arange(each.start - width, each.stop + width) for each in box]
    place = np.stack(np.meshgrid(*axes, indexing="ij"))  # (axes, padded box)
    own = [each.reshape([-1 if i == k else 1 for i in range(len(box))]) for k, each in enumerate(axes)]
    inside = [(at >= each.start) & (at < each.stop) for at, each in zip(own, box)]
    outside = sum((~each).astype(int) for each in inside)
    is_there = np.logical_and.reduce([(at >= 0) & (at < n) for at, n in zip(place, shape)])
    is_ghost = is_there & ((outside >= 1) if corners else (outside == 1))
    starts = np.r_[0, np.cumsum(mpi.allgather(int(np.prod([each.stop - each.start for each in box]))))]
    number = np.zeros(is_ghost.sum(), dtype=np.int64)
    at = place[:, is_ghost]
    for rank, other in enumerate(mpi.allgather(box)):
        here = np.logical_and.reduce([(x >= each.start) & (x < each.stop) for x, each in zip(at, other)])
        lengths = [each.stop - each.start for each in other]
        local = np.ravel_multi_index([(x - each.start)[here] for x, each in zip(at, other)], lengths)
        number[here] = starts[rank] + local
    natural = np.ravel_multi_index(place[:, outside == 0], shape)
    layout = Layout(mpi, int((outside == 0).sum()), number, natural)
    order = np.full(is_ghost.shape, layout.n_all)
    order[outside == 0] = np.arange(layout.n_owned)
    order[is_ghost] = layout.n_owned + np.arange(layout.n_ghost)
    padded = tuple(slice(each.start - width, each.stop + width) for each in box)
    return Patch(layout, box, padded, order, shape, width, corners)


def pattern_layout(comm: Any, pattern: Any, seen: Any = None) -> tuple[Layout, Array]:
    """The unknowns of a global matrix, cut by PETSc's partitioning of its graph so that few couplings are cut.

    Each rank gives the same matrix; it keeps its own rows alone. Collective.

    Args:
        comm: of the ranks that share a step, `grid.space_comm`.
        pattern: a scipy matrix, (n, n): unknown j is seen where an owned row i has an entry (i, j).
        seen: more such matrices, (n, n), for instance of a mass beside a stiffness.

    Returns:
        The layout, and the numbers in the matrix of all local unknowns, (n_all,), owned ones first: so that
        `matrix[numbers[:layout.n_owned]][:, numbers]` is the part of this rank.

    Raises:
        InputError: no square matrix, or fewer rows than ranks.
    """
    mpi = petsc_comm(comm).tompi4py()
    graph = sp.csr_matrix(abs(sp.csr_matrix(pattern)))
    for each in seen or ():
        graph = graph + abs(sp.csr_matrix(each))
    n = graph.shape[0]
    if graph.shape != (n, n):
        raise InputError("pattern of a layout", f"shape {graph.shape}", "(n, n)")
    parts = row_ranks(mpi, graph)
    return parts_layout(mpi, parts, [(parts, graph)])


def parts_layout(comm: Any, parts: Array, rows: Sequence[tuple[Array, Any]]) -> tuple[Layout, Array]:
    """Unknowns whose ranks are known, and what rows of matrices see of them. Collective.

    Args:
        comm: of the ranks that share a step.
        parts: the rank of each unknown, (n,).
        rows: matrices, (k, n), each with the ranks of its rows, (k,).

    Returns:
        As `pattern_layout`.
    """
    mpi, order = petsc_comm(comm).tompi4py(), np.argsort(parts, kind="stable")  # numbers in the whole by global numbers
    place = np.empty(len(parts), dtype=np.int64)
    place[order] = np.arange(len(parts))
    own = np.flatnonzero(parts == mpi.rank)
    seen = np.unique(np.concatenate([sp.csr_matrix(matrix)[ranks == mpi.rank].indices for ranks, matrix in rows]))
    ghosts = seen[parts[seen] != mpi.rank]
    layout = Layout(mpi, len(own), place[ghosts], natural=own)
    return layout, np.r_[own, ghosts]


def row_ranks(comm: Any, graph: Any) -> Array:
    """The rank of each row of a square matrix, the same on all ranks, so that few of its couplings are cut. Collective.

    By PETSc's MatPartitioning: `-mat_partitioning_type`, default PT-Scotch or ParMETIS, else equal shares in the given
    order.

    Raises:
        InputError: fewer rows than ranks.
    """
    mpi = petsc_comm(comm).tompi4py()
    if graph.shape[0] < mpi.size:
        raise InputError("ranks of a step", f"{mpi.size} for {graph.shape[0]} unknowns", "fewer ranks, or a finer grid")
    return _partition(mpi, sp.csr_matrix(graph + graph.T))


def _partition(mpi: Any, graph: sp.csr_matrix) -> Array:
    n = graph.shape[0]
    if mpi.size == 1:
        return np.zeros(n, dtype=np.int64)
    bounds = [n * r // mpi.size for r in range(mpi.size + 1)]
    own = sp.csr_matrix(graph[bounds[mpi.rank] : bounds[mpi.rank + 1]])
    own.sort_indices()
    csr = index_array(own.indptr), index_array(own.indices), np.ones(own.nnz)
    matrix = PETSc.Mat().createAIJ(((own.shape[0], n), (own.shape[0], n)), csr=csr, comm=PETSc.Comm(mpi))
    adjacency = matrix.convert("mpiadj", PETSc.Mat())
    partitioning = PETSc.MatPartitioning().create(PETSc.Comm(mpi))
    partitioning.setType(_default_type())
    partitioning.setAdjacency(adjacency)
    partitioning.setFromOptions()
    found = PETSc.IS()
    partitioning.apply(found)
    parts: Array = np.concatenate(mpi.allgather(found.getIndices().astype(np.int64)))
    for each in (found, partitioning, adjacency, matrix):
        each.destroy()
    missing = np.setdiff1d(np.arange(mpi.size), parts)
    if missing.size:  # of very few rows a partitioner may leave a rank without any
        parts = np.repeat(np.arange(mpi.size), np.diff(bounds))
    return parts


def _default_type() -> str:
    for kind in ("ptscotch", "parmetis"):
        try:
            PETSc.MatPartitioning().create(PETSc.COMM_SELF).setType(kind)
        except PETSc.Error:
            continue
        return kind
    return "average"
