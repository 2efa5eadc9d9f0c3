"""Global numbers of the unknowns in a KKT vector, which is per rank [u | z | p | lam]."""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp
from petsc4py import PETSc

from pdeopt.arrays import Array
from pdeopt.problem import ControlProblem


class KKTLayout:
    """Where the unknowns of each step stand. Steps are counted from 0 here; -1 gives no place (-1)."""

    def __init__(self, problem: ControlProblem) -> None:
        self.problem, self.grid = problem, problem.grid
        mpi, rank = self.grid.mpi, self.grid.mpi.rank
        sizes = (problem.state_size, problem.control_size, problem.param_size)
        self._sizes = np.array(mpi.allgather(sizes))  # (ranks, 3)
        ends = np.cumsum(self._sizes.sum(1) + self._sizes[:, 0])
        self._starts = np.r_[0, ends[:-1]]
        self.global_size, self.local_size = int(ends[-1]), int(ends[rank] - self._starts[rank])
        self._start, self._owned = int(self._starts[rank]), self._sizes[rank]

    def state(self, step: Array, dof: Array) -> Array:
        """Numbers of u; `step` and `dof` are broadcast."""
        return self._of_step(step, dof, np.zeros_like(self._starts))

    def multiplier(self, step: Array, dof: Array) -> Array:
        """Numbers of lam; `step` and `dof` are broadcast."""
        return self._of_step(step, dof, self._sizes.sum(1))

    def _of_step(self, step: Array, dof: Array, field_start: Array) -> Array:
        owner = np.searchsorted(self.grid.offsets, np.maximum(step, 0), side="right") - 1
        place = self._starts[owner] + field_start[owner] + (step - self.grid.offsets[owner]) * self.problem.n + dof
        return np.where(step >= 0, place, -1)

    def parameters(self) -> Array:
        """Numbers of p, which stand on rank 0."""
        start = self._sizes[0, 0] + self._sizes[0, 1]
        return np.arange(start, start + self.problem.param_dim)

    def control_rows(self) -> sp.csr_matrix:
        """The local rows of z_step = E z, with the columns of a KKT vector."""
        shape = (self.grid.n_local * self.problem.m, self.global_size)
        if self.problem.control_map is None:
            columns = self._start + self._owned[0] + np.arange(shape[0])
            return sp.csr_matrix((np.ones(shape[0]), columns, np.arange(shape[0] + 1)), shape=shape)
        indptr, columns, values = self.problem.control_map.matrix.getValuesCSR()
        design_starts = np.r_[0, np.cumsum(self._sizes[:, 1])]
        owner = np.searchsorted(design_starts, columns, side="right") - 1
        columns = self._starts[owner] + self._sizes[owner, 0] + columns - design_starts[owner]
        return sp.csr_matrix((values, columns, indptr), shape=shape)

    def pairing(self) -> tuple[Array, Array]:
        """Rows and columns of a KKT matrix in an order of nonzero pivots, step by step: F_i with u_i, the
        equation of z_i with z_i, the adjoint equation of u_i with lam_i; p comes last."""
        n, N, grid = self.problem.n, self.grid.num_steps, self.grid
        step, dof = np.arange(N)[:, None], np.arange(n)
        u, lam = self.state(step, dof).ravel(), self.multiplier(step, dof).ravel()
        z, z_step = [], []  # a control belongs to the step where it stands in its rank's slab
        for rank, (states, controls, _) in enumerate(self._sizes):
            place = np.arange(controls)
            z.append(self._starts[rank] + states + place)
            z_step.append(grid.offsets[rank] + place * (states // n) // max(controls, 1))
        z, z_step = np.concatenate(z), np.concatenate(z_step)
        by_step = np.argsort(
            np.concatenate([np.repeat(np.arange(N), n), z_step, np.repeat(np.arange(N), n)]), kind="stable"
        )
        last = self.parameters()
        return tuple(np.r_[np.concatenate(fields)[by_step], last] for fields in ((lam, z, u), (u, z, lam)))

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
