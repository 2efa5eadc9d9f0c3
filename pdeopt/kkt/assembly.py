"""KKT matrices assembled as PETSc AIJ: K = T' D T.

D is block diagonal, one block [W J'; J 0] a step over that step's own variables
y_i = [u_{i-1} | u_i | z_i | p | lam_i], whose entries are just the steps' values in a fixed order. Where ranks share a
step, each has a block of its own for the rows of F and W that it owns, over the unknowns that it sees. T copies
the unknowns of the whole problem into these: shifts in time, the control map and the initial map are all in
T, as ghosts are, and PETSc's triple product does the sums and the messages.

The whole diagonal is stored, zero or not: on several ranks PETSc hands MUMPS no row of a symmetric matrix that
stores none.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from petsc4py import PETSc
from torch import Tensor
from torch.func import jacfwd

from pdeopt.control.linearization import Linearization
from pdeopt.control.problem import ControlProblem
from pdeopt.control.stepjacobian import SparseStepJacobian
from pdeopt.core.arrays import Array, index_array
from pdeopt.core.errors import InputError
from pdeopt.kkt.layout import KKTLayout, selection, spaces
from pdeopt.kkt.parameters import ParameterValues
from pdeopt.steps.sparse import StepPattern
from pdeopt.steps.sparsity import ParameterPattern, Sparsity, widened


def require_pattern(problem: ControlProblem) -> StepPattern:
    """The sparsity of the constraint's steps; raises `InputError` where there is none."""
    pattern = problem.constraint.pattern
    if pattern is None:
        raise InputError(
            "an assembled KKT matrix",
            f"{type(problem.constraint).__name__} without a sparsity pattern",
            "declare constraint.pattern = StepPattern(A, B, C, W), or use matrix-free solvers",
        )
    return pattern


class KKTAssembly:
    """Assembles [W J'; J 0] over [u | z | p | lam] for one sparsity of the steps' Hessian.

    Args:
        problem: whose constraint has a pattern.
        W: sparsity of a step's Hessian over [u_old | u_new | z].
        parameters: sparsities of what p has in it.
        layout: of the unknowns; default [u | z | p | lam].
        extra: (T, D) of this rank, rows over all unknowns and a square matrix with sorted indices: T' D T is added.

    Raises:
        InputError: the constraint has no pattern.
    """

    def __init__(
        self,
        problem: ControlProblem,
        W: Sparsity,
        parameters: ParameterPattern,
        layout: KKTLayout | None = None,
        extra: tuple[sp.csr_matrix, sp.csr_matrix] | None = None,
    ) -> None:
        self.problem, self.W, self.parameters, self.pattern = problem, W, parameters, require_pattern(problem)
        self.layout = layout or KKTLayout(problem)
        (_, n), (_, m) = spaces(problem)  # with ghosts, where ranks share a step
        self.lengths = (n, n, m, problem.param_dim, problem.n)  # of the parts of y_i
        self.size = sum(self.lengths)
        self._step, self._order = self._step_structure()
        self._extra = extra or (sp.csr_matrix((0, self.layout.global_size)), sp.csr_matrix((0, 0)))
        self._blocks: PETSc.Mat | None = None
        self._T: PETSc.Mat | None = None

    def matrix(
        self, lin: Linearization, W_values: Tensor, parameters: ParameterValues, out: PETSc.Mat | None
    ) -> PETSc.Mat:
        """The KKT matrix; `out` of an earlier call with this object is refilled. Collective.

        Args:
            lin: gives A, B and C, and the derivative of the initial map.
            W_values: Hessian entries of the steps, (n_local, W.nnz).
            parameters: entries of what p has in them.
        """
        parts = [W_values, *self._jacobian_values(lin), *self._parameter_values(parameters)]
        values = torch.cat([*parts, torch.zeros_like(W_values[:, :1])], dim=1)
        data = np.r_[values[:, self._order].numpy().ravel(), self._extra[1].data]
        if self._blocks is None:
            self._blocks = self._create_blocks(data)
        else:
            self._blocks.setValuesCSR(*self._csr, data)
            self._blocks.assemble()
        K = self._blocks.ptap(self._copies(lin), result=out)
        K.setOption(PETSc.Mat.Option.SYMMETRIC, True)
        return K

    def _create_blocks(self, data: Array) -> PETSc.Mat:
        grid, block, (_, extra) = self.problem.grid, self._step, self._extra
        steps = np.arange(grid.n_local)[:, None] * self.size
        rows = steps.size * self.size
        start = grid.mpi.exscan(rows + extra.shape[0]) or 0  # None on the first rank
        counts = np.r_[0, np.tile(np.diff(block.indptr), grid.n_local), np.diff(extra.indptr)]
        columns = np.r_[(steps + block.indices).ravel(), rows + extra.indices]
        self._csr = index_array(np.cumsum(counts)), index_array(start + columns)
        sizes = (rows + extra.shape[0], None)
        return PETSc.Mat().createAIJ((sizes, sizes), csr=(*self._csr, data), comm=grid.comm)

    def _step_structure(self) -> tuple[sp.csr_matrix, Tensor]:
        """The pattern of one block of D, and for each of its entries the number of its value."""
        pattern = self.pattern
        B = widened(pattern.B, pattern.A.columns)
        numbers = _numbered([self.W, pattern.A, B, pattern.C, *self.parameters])
        W, A, B, C, F_p, W_p, W_pp = numbers
        J = sp.hstack([B, A, C, F_p])
        block = sp.csr_matrix(sp.bmat([[sp.bmat([[W, W_p], [W_p.T, W_pp]]), J.T], [J, None]]))
        zero = 1 + sum(part.nnz for part in numbers)  # the number of the value that stands for nothing
        block = sp.csr_matrix(block + sp.diags(np.where(block.diagonal() == 0, zero, 0.0)))
        block.sort_indices()
        return block, torch.from_numpy(block.data.astype(np.int64) - 1)

    def _jacobian_values(self, lin: Linearization) -> list[Tensor]:
        jacobian = lin.jacobian
        assert isinstance(jacobian, SparseStepJacobian)  # the constraint has a pattern
        return [jacobian.blocks[name].values.expand(len(lin.steps), -1) for name in "ABC"]

    def _parameter_values(self, values: ParameterValues) -> list[Tensor]:
        """F_p and W_p of each step, and W_pp in the first local one."""
        W_pp = values.W_pp.new_zeros(len(values.F), len(values.W_pp))
        W_pp[0] = values.W_pp
        return [values.F, values.W, W_pp]

    def _copies(self, lin: Linearization) -> PETSc.Mat:
        """T: from [u | z | p | lam] to the variables y_i of the steps of this rank."""
        if self._T is None:
            T, sizes = self._copies_matrix(lin.p)
            csr = (index_array(T.indptr), index_array(T.indices), T.data)
            self._T = PETSc.Mat().createAIJ(sizes, csr=csr, comm=self.problem.grid.comm)
        elif self.problem.param_dim:
            T, _ = self._copies_matrix(lin.p)
            self._T.setValuesCSR(index_array(T.indptr), index_array(T.indices), T.data)
            self._T.assemble()
        return self._T

    def _copies_matrix(self, p: Tensor) -> tuple[sp.csr_matrix, Any]:
        problem, grid, layout = self.problem, self.problem.grid, self.layout
        n, width = self.lengths[0], layout.global_size
        step, dof = np.arange(grid.begin, grid.end)[:, None], np.arange(n)
        old = layout.old_state(step, dof)
        parts = [
            *([self._initial_rows(p)] if (old < 0).any() else []),
            selection(old[old >= 0], width),
            selection(layout.state(step, dof), width),
            layout.control_rows(),
            selection(np.tile(layout.parameters(), grid.n_local), width),
            selection(layout.multiplier(step, np.arange(problem.n)), width),
        ]
        starts = np.r_[0, np.cumsum(self.lengths)]
        place = [step * self.size + start + np.arange(length) for start, length in zip(starts, self.lengths)]
        by_step = np.argsort(np.concatenate([rows.ravel() for rows in place]))  # `parts` go field by field
        T = sp.csr_matrix(sp.vstack([sp.csr_matrix(sp.vstack(parts))[by_step], self._extra[0]]))
        return T, ((T.shape[0], None), (layout.local_size, width))

    def _initial_rows(self, p: Tensor) -> sp.csr_matrix:
        """u_old of step 1 is G(p): its rows are G'(p), empty without parameters."""
        n, parameters = self.lengths[0], self.layout.parameters()
        if parameters.size == 0:
            return sp.csr_matrix((n, self.layout.global_size))
        derivative = jacfwd(self.problem.initial_state)(p).numpy()
        csr = (derivative.ravel(), np.tile(parameters, n), np.arange(n + 1) * parameters.size)
        return sp.csr_matrix(csr, shape=(n, self.layout.global_size))


def _numbered(patterns: list[Sparsity]) -> list[sp.csr_matrix]:
    """The patterns with their entries numbered through from 1 (scipy would drop a zero)."""
    starts = np.cumsum([1] + [pattern.nnz for pattern in patterns])
    return [
        sp.csr_matrix((start + np.arange(s.nnz, dtype=float), s.csr.indices, s.csr.indptr), shape=s.shape)
        for s, start in zip(patterns, starts)
    ]
