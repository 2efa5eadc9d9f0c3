"""Global numbers of the unknowns in a KKT vector, which is per rank [u | z | p | lam].

`VectorLayout` says how many entries of each kind a rank has; this is where they stand among those of all ranks.
"""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp
from petsc4py import PETSc

from pdeopt.control.problem import ControlProblem
from pdeopt.core.arrays import Array
from pdeopt.space.layouts.layout import Layout


class KKTLayout:
    """Where the unknowns of each step stand. Steps are counted from 0 here; -1 gives no place (-1).

    Where ranks share a step, unknowns of it are given by their local numbers, ghosts after owned ones.

    Args:
        problem: the control problem; collective when made, local afterwards.

    Attributes:
        global_size, local_size: entries of a KKT vector on all ranks and on this one.

    Example:
        >>> layout = KKTLayout(problem)
        >>> layout.state(step, np.arange(problem.n))          # numbers of u_{step + 1}
        >>> layout.index_sets()["multiplier"]                 # for PCFIELDSPLIT
    """

    def __init__(self, problem: ControlProblem) -> None:
        self.problem, self.grid = problem, problem.grid
        mpi, rank = self.grid.mpi, self.grid.mpi.rank
        own = problem.layout
        self._sizes = np.array(mpi.allgather((own.state_size, own.control_size, own.param_size)))  # (ranks, 3)
        ends = np.cumsum(self._sizes.sum(1) + self._sizes[:, 0])
        self._starts = np.r_[0, ends[:-1]]
        self.global_size, self.local_size = int(ends[-1]), int(ends[rank] - self._starts[rank])
        self._start, self._owned = int(self._starts[rank]), self._sizes[rank]
        self._design_starts = np.r_[0, np.cumsum(self._sizes[:, 1])]
        #: for each unknown of a step: its place in space, its number there, and how many unknowns a step has there
        self._of_states, self._of_controls = (_owners(each, n) for each, n in spaces(problem))

    def state(self, step: Array, dof: Array) -> Array:
        """Numbers of u; `step` and `dof` are broadcast."""
        return self._of_step(step, dof, np.zeros_like(self._starts))

    def old_state(self, step: Array, dof: Array) -> Array:
        """Numbers of what the step has for u_old; `step` and `dof` are broadcast."""
        return self.state(step - 1, dof)

    def multiplier(self, step: Array, dof: Array) -> Array:
        """Numbers of lam; `step` and `dof` are broadcast."""
        return self._of_step(step, dof, self._sizes.sum(1))

    def _of_step(self, step: Array, dof: Array, field_start: Array) -> Array:
        return self._place(self._of_states, step, dof, field_start)

    def _place(self, of: tuple[Array, Array, Array], step: Array, dof: Array, field_start: Array) -> Array:
        space, number, width = (each[dof] for each in of)
        time = np.searchsorted(self.grid.offsets, np.maximum(step, 0), side="right") - 1
        owner = time * self.grid.space_ranks + space
        place = self._starts[owner] + field_start[owner] + (step - self.grid.offsets[time]) * width + number
        return np.where(step >= 0, place, -1)

    def controls(self, place: Array) -> Array:
        """Numbers of the controls, given by their place among the flat controls of all ranks."""
        owner = self._control_owner(place)
        return np.asarray(self._starts[owner] + self._sizes[owner, 0] + place - self._design_starts[owner])

    def control_step(self, place: Array) -> Array:
        """The step to which a control belongs: where it stands in its rank's slab."""
        owner = self._control_owner(place)
        own, steps = place - self._design_starts[owner], np.diff(self.grid.offsets)[owner]
        return np.asarray(self.grid.offsets[owner] + own * steps // self._sizes[owner, 1])

    def own_controls(self) -> Array:
        """Numbers of the flat controls of this rank."""
        return self.controls(np.arange(*self._design_starts[self.grid.mpi.rank : self.grid.mpi.rank + 2]))

    def _control_owner(self, place: Array) -> Array:
        return np.searchsorted(self._design_starts, place, side="right") - 1

    def parameters(self) -> Array:
        """Numbers of p, which stand on rank 0."""
        start = self._sizes[0, 0] + self._sizes[0, 1]
        return np.arange(start, start + self.problem.param_dim)

    def control_rows(self) -> sp.csr_matrix:
        """The local rows of z_step = E z, ghosts among them, with the columns of a KKT vector."""
        if self.grid.space_ranks > 1:
            step, dof = np.arange(self.grid.begin, self.grid.end)[:, None], np.arange(len(self._of_controls[0]))
            return selection(self._place(self._of_controls, step, dof, self._sizes[:, 0]), self.global_size)
        if self.problem.control_map is None:
            return selection(self.own_controls(), self.global_size)
        indptr, place, values = self.problem.control_map.matrix.getValuesCSR()
        return sp.csr_matrix((values, self.controls(place), indptr), shape=(len(indptr) - 1, self.global_size))

    def pairing(self) -> tuple[Array, Array]:
        """Rows and columns of a KKT matrix in an order of nonzero pivots, step by step: F_i with u_i, the
        equation of z_i with z_i, the adjoint equation of u_i with lam_i; p comes last."""
        rows, cols, step = (np.concatenate(parts) for parts in zip(*self._pairs()))
        by_step, last = np.argsort(step, kind="stable"), self.parameters()
        return np.r_[rows[by_step], last], np.r_[cols[by_step], last]

    def _pairs(self) -> list[tuple[Array, Array, Array]]:
        """Rows, their columns and their steps, in the order within a step."""
        step, dof = np.arange(self.grid.num_steps)[:, None], np.arange(self.problem.n)
        u, lam, steps = self.state(step, dof).ravel(), self.multiplier(step, dof).ravel(), np.repeat(step, len(dof))
        place = np.arange(self._design_starts[-1])
        z = self.controls(place)
        return [(lam, u, steps), (z, z, self.control_step(place)), (u, lam, steps)]

    def index_sets(self, two: bool = False) -> dict[str, PETSc.IS]:
        """The fields as index sets for PCFIELDSPLIT: state, control (with p) and multiplier.

        With `two`, as a Schur complement wants them: primal and multiplier.
        """
        states = int(self._owned[0])
        design = int(self._owned[1] + self._owned[2])
        lengths = {"state": states, "control": design, "multiplier": states}
        if two:
            lengths = {"primal": states + design, "multiplier": states}
        sets, start = {}, self._start
        for name, length in lengths.items():
            sets[name] = PETSc.IS().createStride(length, start, 1, comm=self.grid.comm)
            start += length
        return sets


def spaces(problem: ControlProblem) -> list[tuple[Layout | None, int]]:
    """The layouts of a step's states and of its controls, None where rows are whole, and how many a rank sees."""
    found, sizes = list[tuple[Layout | None, int]](), (problem.n, problem.m)
    for layout, n in zip((problem.constraint.layout, problem.constraint.controls), sizes):
        is_whole = layout is None or problem.grid.space_ranks == 1
        found.append((None, n) if layout is None or is_whole else (layout, layout.n_all))
    return found


def _owners(layout: Layout | None, n: int) -> tuple[Array, Array, Array]:
    if layout is None:
        return np.zeros(n, dtype=np.int64), np.arange(n), np.full(n, n)
    rank, number = layout.owners
    return rank, number, np.diff(layout.starts)[rank]


def selection(cols: Array, width: int) -> sp.csr_matrix:
    """The matrix whose row k picks entry cols[k]."""
    cols = cols.ravel()
    return sp.csr_matrix((np.ones(cols.size), cols, np.arange(cols.size + 1)), shape=(cols.size, width))
