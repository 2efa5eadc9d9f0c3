"""Controls that are not one a step: z_step = E z with a sparse matrix E.

Values at the nodes in time, splines, weights shared by several steps: the constraint always sees one
row of controls a step, and a `ControlMap` makes these rows from the design variables. So a price of what neighboring
controls differ by is one of single steps, too: `Jumps` lets a step see that difference, `SmoothCost` prices it.
"""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp
import torch
from petsc4py import PETSc
from torch import Tensor

from pdeopt.control.objective import Objective
from pdeopt.core.arrays import assign, copy, index_array, real_number
from pdeopt.core.errors import InputError
from pdeopt.steps.timegrid import Steps, TimeGrid, require_whole_steps


class ControlMap:
    """z_step = E z and its adjoint, for controls that are not one a step.

    The constraint and the objective see rows z_step, (n_local, control_dim); the design variables of the problem are
    z, distributed as the columns of E.

    Args:
        matrix: E, an assembled AIJ matrix; its rows are distributed as the steps, control_dim rows a step.

    Attributes:
        n_local: design controls of this rank.

    Raises:
        InputError: no assembled matrix of PETSc.

    Example:
        >>> grid = TimeGrid.uniform(100, T=1.0)
        >>> control_map = ControlMap.nodal(grid, dim=3)                  # the constraint's control_dim is 6
        >>> problem = ControlProblem(constraint, objective, grid, control_map)
    """

    def __init__(self, matrix: PETSc.Mat) -> None:
        if not (isinstance(matrix, PETSc.Mat) and bool(matrix) and matrix.isAssembled()):
            raise InputError("control map", type(matrix).__name__, "an assembled PETSc.Mat of type aij")
        self.matrix = matrix
        self._design, self._steps = matrix.createVecs()
        self.n_local: int = matrix.getLocalSize()[1]

    @classmethod
    def nodal(cls, grid: TimeGrid, dim: int) -> ControlMap:
        """Values z_0..z_N at the nodes, `dim` components each; a step sees [z_{i-1} | z_i].

        So the constraint's control_dim is 2 dim. The first rank owns the values at t_0. Collective.

        Args:
            grid: the time steps.
            dim: components of a nodal value.
        """
        require_whole_steps(grid, "control_map", "one control a step, or space_ranks 1")
        nodes = grid.n_local + grid.is_first
        size = ((grid.n_local * 2 * dim, grid.num_steps * 2 * dim), (nodes * dim, (grid.num_steps + 1) * dim))
        step = np.arange(grid.begin, grid.end)[:, None]
        columns = (step * dim + np.arange(2 * dim)).ravel()  # [z_{i-1} | z_i] are neighbors
        csr = (index_array(np.arange(columns.size + 1)), index_array(columns), np.ones(columns.size))
        return cls(PETSc.Mat().createAIJ(size, csr=csr, comm=grid.comm))

    def check(self, grid: TimeGrid, control_dim: int) -> None:
        """Raise `InputError` unless the rows of E are the steps of `grid`."""
        if self.matrix.getLocalSize()[0] != grid.n_local * control_dim:
            raise InputError(
                "rows of the control map on this rank", self.matrix.getLocalSize()[0], f"{grid.n_local * control_dim}"
            )

    def __call__(self, z: Tensor) -> Tensor:
        """E z, flat: (design entries of this rank,) -> (steps of this rank * control_dim,). Collective."""
        assign(self._design, z)
        self.matrix.mult(self._design, self._steps)
        return copy(self._steps)

    def adjoint(self, w: Tensor) -> Tensor:
        """E' w, flat. Collective."""
        assign(self._steps, w)
        self.matrix.multTranspose(self._steps, self._design)
        return copy(self._design)


class Jumps(ControlMap):
    """Controls z_1..z_N, of which a step sees [z_i | z_i - z_{i-1}], the first one [z_1 | 0].

    So the constraint's control_dim is 2 dim; what it does with the second half is the user's affair, and `SmoothCost` a
    price of it. Every solver that takes control maps, on any number of ranks, so has controls that are smooth in time.

    Args:
        grid: the time steps.
        dim: components of a control.

    Example:
        >>> jumps = Jumps(grid, dim=3)                        # the constraint's control_dim is 6
        >>> problem = ControlProblem(constraint, Tracking(target) + SmoothCost(1e-4, 1e-3), grid, jumps)
    """

    def __init__(self, grid: TimeGrid, dim: int) -> None:
        n, first = grid.n_local, int(grid.is_first)
        size = ((n * 2 * dim, grid.num_steps * 2 * dim), (n * dim, grid.num_steps * dim))
        own, column = np.arange(n * dim).reshape(n, dim), grid.begin * dim + np.arange(n * dim).reshape(n, dim)
        row = own + dim * np.arange(n)[:, None]  # [z_i | jump] are neighbors
        late = slice(first, None)  # the first control of all has none before it
        rows = np.concatenate([row.ravel(), (row + dim)[late].ravel(), (row + dim)[late].ravel()])
        columns = np.concatenate([column.ravel(), column[late].ravel(), (column - dim)[late].ravel()])
        signs = np.repeat([1.0, 1.0, -1.0], [n * dim, (n - first) * dim, (n - first) * dim])
        E = sp.csr_matrix((signs, (rows, columns)), shape=(n * 2 * dim, grid.num_steps * dim))
        E.sort_indices()
        csr = (index_array(E.indptr), index_array(E.indices), E.data)
        super().__init__(PETSc.Mat().createAIJ(size, csr=csr, comm=grid.comm))


class SmoothCost(Objective):
    """sum_i dt_i alpha/2 |z_i|^2 + gamma/2 sum_{i>1} |(z_i - z_{i-1}) / dt_i|^2, of controls that `Jumps` makes.

    (S. Guenther, L. Ruthotto, J. B. Schroder, E. C. Cyr, N. R. Gauger, SIMODS 2, 2020, with gamma as gamma_ddt.)

    Args:
        control_weight: alpha > 0.
        smoothness: gamma > 0.

    Raises:
        InputError: weights that are not finite numbers > 0; an odd number of controls a step.
    """

    is_convex = True

    def __init__(self, control_weight: float, smoothness: float) -> None:
        self.control_weight = real_number(control_weight, "control_weight", "a finite number > 0", above=0.0)
        self.smoothness = real_number(smoothness, "smoothness", "a finite number > 0", above=0.0)

    def check(self, n: int, m: int, grid: TimeGrid) -> None:
        if m % 2:
            raise InputError("controls of a step under SmoothCost", m, "an even number: [z_i | z_i - z_{i-1}] of Jumps")

    def value(self, u: Tensor, z: Tensor, steps: Steps) -> Tensor:
        z, jump = z.chunk(2, dim=-1)
        dt = torch.where(steps.dt > 0, steps.dt, torch.inf)  # the node t_0 is a step of length 0
        price = 0.5 * self.control_weight * steps.dt * z.square().sum(-1)
        return price + 0.5 * self.smoothness * (jump / dt[:, None]).square().sum(-1)


class StepControls:
    """Flat design controls -> controls of the steps of this rank: E z, or z itself where there is no E.

    Args:
        grid: the time steps.
        m: controls of a step.
        control_map: E; None for one control a step.

    Attributes:
        size: flat design controls of this rank.

    Raises:
        InputError: the rows of E are not the steps of `grid`.
    """

    def __init__(self, grid: TimeGrid, m: int, control_map: ControlMap | None = None) -> None:
        if control_map is not None:
            control_map.check(grid, m)
        self.shape, self.control_map = (grid.n_local, m), control_map
        self.size = grid.n_local * m if control_map is None else control_map.n_local

    def __call__(self, z: Tensor) -> Tensor:
        """z_step, (n_local, m), of flat controls z, (size,). Collective."""
        return (z if self.control_map is None else self.control_map(z)).reshape(self.shape)

    def adjoint(self, w: Tensor) -> Tensor:
        """The transpose: (n_local, m) -> (size,). Collective."""
        return w.reshape(-1) if self.control_map is None else self.control_map.adjoint(w.reshape(-1))
