"""`SpreadConstraint`: an equation that is written for whole steps, spread over ranks by its sparsity."""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from pdeopt.control.constraint import TimeDependentConstraint
from pdeopt.core.arrays import Array
from pdeopt.core.errors import InputError
from pdeopt.space.layouts.partition import parts_layout, row_ranks
from pdeopt.space.spaceconstraint import SpaceConstraint
from pdeopt.steps.sparse import StepMatrix, StepPattern
from pdeopt.steps.sparsity import Sparsity
from pdeopt.steps.timegrid import Steps, TimeGrid


class SpreadConstraint(SpaceConstraint):
    """The rows that a rank owns of a constraint written for whole steps.

    PETSc partitions the graph of A and B; a control goes to the rank of a row that sees it. Vectors, matrices, factors
    and solves are spread; a residual is evaluated whole on each rank, of its rows and their ghosts, and what it
    does not own is dropped. That is right for equations whose matrices are what costs; one that is to see its own
    part alone derives from `SpaceConstraint`. Collective when made.

    Args:
        whole: with a pattern.
        grid: with `space_ranks`.
        is_affine: as of `SpaceConstraint`.

    Attributes:
        own, own_controls: numbers in a whole step of the states and the controls that this rank owns.

    Raises:
        InputError: a constraint without a pattern, or whose steps ranks share already.

    Example:
        >>> constraint = SpreadConstraint(Burgers(...), grid)
        >>> objective = Tracking(target[constraint.own], constraint.state_mass) + ControlCost(1e-3)
    """

    def __init__(self, whole: TimeDependentConstraint, grid: TimeGrid, is_affine: bool = False) -> None:
        pattern = whole.pattern if isinstance(whole, TimeDependentConstraint) and whole.layout is None else None
        if pattern is None:
            got = f"{type(whole).__name__} without a pattern of whole steps"
            raise InputError("constraint to spread", got, "one with pattern = StepPattern(A, B, C, W)")
        self.whole, self.is_affine = whole, is_affine
        self.param_dim, self.param_mass, self.conservative = whole.param_dim, whole.param_mass, whole.conservative
        A, B, C, W = (each.csr for each in (pattern.A, pattern.B, pattern.C, pattern.W))
        M, Q = _form(whole.state_mass, A.shape[0]), _form(whole.control_mass, C.shape[1])
        parts = grid.time.bcast(row_ranks(grid.space_comm, A + B + abs(M)))  # one cut for all steps
        of_controls = parts[_first_rows(C)]
        layout, self._seen = parts_layout(grid.space_comm, parts, [(parts, A), (parts, B), (parts, M)])
        controls, seen_controls = parts_layout(grid.space_comm, of_controls, [(parts, C), (of_controls, Q)])
        super().__init__(layout, controls)
        self.own, self.own_controls = self._seen[: layout.n_owned], seen_controls[: controls.n_owned]
        every = np.r_[self._seen, A.shape[0] + self._seen, 2 * A.shape[0] + seen_controls]
        A, B = (part[self.own][:, self._seen] for part in (A, B))
        C, W = C[self.own][:, seen_controls], W[every][:, every]
        self.pattern: StepPattern | None = self.step_pattern(A, B, C, W)
        self.state_mass = _spread(M[self.own][:, self._seen], self._own(M[self.own][:, self._seen]))
        self.control_mass = _spread(
            Q[self.own_controls][:, seen_controls], Sparsity(Q[self.own_controls][:, seen_controls], controls)
        )
        self._places = [torch.from_numpy(each) for each in (self._seen, seen_controls, self.own)]
        start = whole.initial_state(torch.zeros(whole.param_dim, dtype=torch.float64)).detach()
        self._elsewhere = start, start.new_zeros(Q.shape[1])

    def local_residual(self, u_old: Tensor, u_new: Tensor, z: Tensor, steps: Steps) -> Tensor:
        states, controls, own = self._places
        (u, none), rows = self._elsewhere, len(u_new)
        x_old, x_new, every_z = (
            base.expand(rows, -1).index_copy(1, place, x.expand(rows, -1))
            for base, place, x in ((u, states, u_old), (u, states, u_new), (none, controls, z))
        )
        return self.whole.residual(x_old, x_new, every_z, steps)[:, own]

    def initial_state(self, p: Tensor) -> Tensor:
        return self.whole.initial_state(p)[self._places[2]]

    def form(self, matrix: Any) -> StepMatrix:
        """The owned rows of a matrix over whole states, such as the mass of a part of them. Collective.

        Args:
            matrix: the same on all ranks, (n, n), symmetric positive semidefinite. A rank may have no entries of it.

        Raises:
            InputError: another matrix.
        """
        whole = StepMatrix.form(matrix, self._elsewhere[0].numel(), "SpreadConstraint.form", semidefinite=True)
        local = whole.as_csr()[self.own][:, self._seen]
        return _spread(local, self._own(local)).known_as_form(semidefinite=True)


def _form(mass: Any, n: int) -> sp.csr_matrix:
    return StepMatrix.form(mass, n).as_csr()


def _spread(local: sp.csr_matrix, pattern: Sparsity) -> StepMatrix:
    """A matrix of owned rows on its pattern, which may have no columns of ghosts."""
    entries = sp.csr_matrix(local[:, : pattern.shape[1]])
    entries.sort_indices()
    return StepMatrix(pattern, torch.from_numpy(entries.data).reshape(1, -1))


def _first_rows(C: sp.csr_matrix) -> Array:
    """For each column of a matrix the first row with an entry there; 0 for one without."""
    rows, cols = C.nonzero()
    found = np.zeros(C.shape[1], dtype=np.int64)
    found[cols[::-1]] = rows[::-1]
    return found
