"""Which coefficients of a function are unknowns of a step, and which ranks have them: layouts of function spaces.

On a mesh that is spread over ranks, each assembles over its own cells. Their matrices have entries in rows of ghosts,
that go to the owners, and columns that the owners would not know from their own cells: they see these, too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from mpi4py import MPI

from pdeopt.core.arrays import Array
from pdeopt.core.errors import InputError
from pdeopt.space.fenicsx import cell_coefficients, coefficients, default_partitioner, fixed_dofs, list_of, node_places
from pdeopt.space.layouts.layout import Layout
from pdeopt.steps.timegrid import TimeGrid

#: Coordinates are compared by their first nine digits: a scale that has no mesh's coordinates halfway between numbers.
RESOLUTION = 0.7548776662466927e9


class Unknowns:
    """The unknowns among the coefficients of the functions of a space. Collective when made.

    Args:
        space: of DOLFINx.
        rows: spaces of test functions whose rows see these unknowns; default this one.

    Attributes:
        size: coefficients that this rank has, ghosts counted.
        coefficients: the layout of all coefficients.
        dofs: numbers of the unknowns among the coefficients of this rank, owned ones first.
        layout: of the unknowns: those of `dofs`, and after them ghosts that only rows of this rank's matrices see.
    """

    def __init__(self, space: Any, rows: Sequence[Any] = ()) -> None:
        self.space = space
        mpi, owned, ghosts = coefficients(space)
        self.size = owned + len(ghosts)
        self.coefficients = Layout(mpi, owned, ghosts)
        if mpi.size > 1:
            own = [(self.coefficients, cell_coefficients(space))]
            others = [(Layout(*coefficients(row)), cell_coefficients(row)) for row in rows if row is not space]
            more = [_seen_by_owners(*each, *own[0]) for each in own + others]
            self.coefficients = Layout(mpi, owned, np.r_[ghosts, np.unique(np.concatenate(more))])
        self.choose(np.ones(owned, dtype=bool))

    def choose(self, is_unknown: Array) -> None:
        """Take these of the owned coefficients, (owned,), as unknowns. Collective."""
        whole, own = self.coefficients, np.flatnonzero(is_unknown)
        if whole.mpi.size > 1:  # the order of DOLFINx depends on when messages arrive
            own = own[np.lexsort(self._keys[own].T)]
        numbers = np.full(whole.n_owned, -1)
        numbers[own] = (whole.mpi.exscan(len(own)) or 0) + np.arange(len(own))
        seen = whole.extend(torch.from_numpy(numbers)[None])[0].numpy()
        known, more = (
            np.sort(part[part >= 0]) for part in np.split(seen[whole.n_owned :], [self.size - whole.n_owned])
        )
        place = whole.n_owned + np.argsort(seen[whole.n_owned : self.size])
        self.dofs: Array = np.r_[own, place[len(place) - len(known) :]]
        self.layout = Layout(whole.mpi, len(own), np.r_[known, more], natural=self._natural)

    @cached_property
    def _keys(self) -> Array:
        """What coefficients of this rank are sorted by: component, x, y, z, rounded, the last first; (size, 4).

        Without places all are alike. Collective.
        """
        places, mpi = node_places(self.space), self.coefficients.mpi
        if places is None:
            return np.zeros((self.size, 4))
        corner = abs(places[:, :3]).max(initial=0.0)
        scale = RESOLUTION / (mpi.allreduce(corner, MPI.MAX) or 1.0)
        keys: Array = np.c_[np.round(places[:, 2::-1] * scale), places[:, 3]]
        return keys

    def exclude(self, bcs: Sequence[Any]) -> None:
        """Take what no Dirichlet condition fixes as unknowns. Collective.

        Raises:
            InputError: conditions of another space, or such that a rank knows of an unknown and its owner does not.
        """
        is_free, whole = np.ones(self.size, dtype=bool), self.coefficients
        is_free[fixed_dofs(bcs, self.space)] = False
        of_owners = whole.extend(torch.from_numpy(is_free[: whole.n_owned])[None])[0].numpy()
        if not whole.all(bool((of_owners[: self.size] == is_free).all())):
            legal = (
                "dofs by locate_dofs_geometrical, or by locate_dofs_topological with remote=True, on all ranks alike"
            )
            raise InputError("bcs", "conditions that ranks which share an unknown do not have alike", legal)
        self.choose(is_free[: whole.n_owned])

    def _natural(self) -> Array:
        """Numbers of the owned unknowns in the order of their places in the mesh, whatever ranks have them. Collective.

        Where unknowns share a place, as those of discontinuous elements do, there is no such order on several ranks:
        then all numbers are -1, which files and checkpoints refuse.
        """
        mpi, own = self.coefficients.mpi, self.dofs[: self.layout.n_owned]
        whole, start = np.concatenate(mpi.allgather(self._keys[own])), int(self.layout.starts[mpi.rank])
        order = np.lexsort(whole.T)
        if mpi.size > 1 and bool((np.diff(whole[order], axis=0) == 0).all(axis=1).any()):
            return np.full(len(own), -1)
        return np.argsort(order)[start : start + len(own)]


def function_layout(space: Any, bcs: Sequence[Any] = ()) -> tuple[Layout, Array]:
    """The unknowns of a function space of DOLFINx, as its mesh has them on ranks. Collective.

    Args:
        space: on a mesh made with `grid.space_comm`.
        bcs: Dirichlet conditions, whose coefficients are no unknowns.

    Returns:
        The layout, and the numbers of the unknowns among the coefficients of this rank, owned ones first: so that
        `u.x.array[dofs]` are those of a function. Ghosts beyond them, which the layout has, too, are unknowns that
        owned rows of matrices see, but no cell of this rank.

    Raises:
        InputError: no DOLFINx; conditions on another space, or not the same on all ranks.
    """
    unknowns = Unknowns(space)
    unknowns.exclude(bcs)
    return unknowns.layout, unknowns.dofs


def mesh_partitioner(grid: TimeGrid) -> Callable[..., Any]:
    """A partitioner for the meshes of DOLFINx that cuts them alike for all steps: as the ranks of the first steps do.

    DOLFINx's own cuts differ from run to run, and between the groups of ranks that share steps. All ranks of the grid
    make their meshes at the same time.

    Args:
        grid: whose ranks share each step.

    Returns:
        A function for the argument `partitioner` of what makes or reads a mesh.

    Example:
        >>> cube = create_box(grid.space, corners, [8, 8, 8], partitioner=po.mesh_partitioner(grid))
    """
    cut = default_partitioner()

    def partition(*args: Any) -> Any:
        found = cut(*args)
        return list_of(*grid.time.bcast((np.array(found.array), np.array(found.offsets))))

    return partition


def _seen_by_owners(rows: Layout, row_lists: Array, columns: Layout, column_lists: Array) -> Array:
    """Coefficients that cells of other ranks couple with those of this one, and that it does not know. Collective.

    Args:
        rows, columns: layouts of the coefficients of test and trial functions.
        row_lists, column_lists: those of each cell of this rank, local numbers, (cells, k).
    """
    owner, sends = rows.owners[0][row_lists], []
    for rank in range(rows.mpi.size):
        cells = (owner == rank).any(axis=1) if rank != rows.mpi.rank else np.zeros(len(owner), dtype=bool)
        sends.append(np.unique(columns.global_numbers[column_lists[cells]]) if cells.any() else None)
    received = [part for part in rows.mpi.alltoall(sends) if part is not None]
    found: Array = np.setdiff1d(np.concatenate([np.array([], dtype=np.int64), *received]), columns.global_numbers)
    return found
