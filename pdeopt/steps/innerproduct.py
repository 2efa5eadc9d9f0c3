"""Symmetric forms of single steps, weight times matrix: masses, metrics and the Hessians of objectives."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from pdeopt.core.errors import SolveFailure
from pdeopt.space.layouts.layout import Layout
from pdeopt.steps.sparse import StepMatrix, combination
from pdeopt.steps.sparsity import Sparsity
from pdeopt.steps.stepsolve import StepSolver, step_solver
from pdeopt.steps.timegrid import TimeGrid
from pdeopt.steps.windows import Windows, alike


class InnerProduct:
    """weight_i M_i for each step i; most often all steps share M, which is then factored once.

    Args:
        weight: weight_i, (batch,).
        matrix: M, (n, n), symmetric; one for all steps, or one a step.
    """

    def __init__(self, weight: Tensor, matrix: StepMatrix) -> None:
        self.weight, self.matrix = weight, matrix

    @classmethod
    def from_values(cls, sparsity: Sparsity, values: Tensor, model: Tensor | None = None) -> InnerProduct:
        """From entries, (batch, nnz); multiples of one matrix, default the largest of them, are recognized as such."""
        if values.numel() == 0 and sparsity.columns is None:
            return cls.zero(sparsity.shape[0], len(values))
        columns = sparsity.columns
        model = _largest(values, columns) if model is None else model
        products = torch.cat([values @ model, (model @ model)[None]])
        products = products if columns is None else columns.sum(products)  # one weight for all rows of a step
        square, rows = float(products[-1]), products[:-1]
        weight = rows / square if square > 0 else torch.zeros_like(rows)
        alike = bool(((values - weight[:, None] * model).abs() <= 1e-14 * model.abs().amax()).all())
        if alike if columns is None else columns.all(alike):
            return cls(weight, StepMatrix(sparsity, model[None]))
        return cls(torch.ones_like(weight), StepMatrix(sparsity, values))

    @classmethod
    def zero(cls, n: int, batch: int) -> InnerProduct:
        """The form that is zero."""
        return cls(
            torch.zeros(batch, dtype=torch.float64),
            StepMatrix(Sparsity.empty(n, n), torch.zeros(1, 0, dtype=torch.float64)),
        )

    def __add__(self, other: InnerProduct) -> InnerProduct:
        for zero, rest in ((self, other), (other, self)):
            pattern = zero.matrix.sparsity
            if pattern.nnz == 0 and pattern.columns is None:  # of rows over ranks, others may have entries
                return rest
        total = combination([(1.0, self.spread()), (1.0, other.spread())])
        return self.from_values(total.sparsity, total.values)

    def __getitem__(self, rows: slice) -> InnerProduct:
        return InnerProduct(self.weight[rows], self.matrix[rows])

    def agreed(self, grid: TimeGrid) -> InnerProduct:
        """The same form in one shape on all ranks: one pattern, and one matrix where all are its multiples. Collective.

        Ranks that look at their own steps alone may see different ones.
        """
        if alike(grid, self.matrix) or grid.mpi.size == 1:
            return self
        own, spread = self.matrix.sparsity, self.spread().values
        keys = np.unique(np.concatenate(grid.time.allgather(own.rows * own.shape[1] + own.cols)))
        places = np.divmod(keys, own.shape[1])
        pattern = Sparsity(sp.csr_matrix((np.ones(keys.size), places), shape=own.shape), own.columns)
        values = torch.zeros(len(spread), pattern.nnz, dtype=spread.dtype)
        values[:, pattern.places(own)] = spread
        models = grid.time.allgather(_largest(values, own.columns).numpy())
        return self.from_values(pattern, values, _largest(torch.from_numpy(np.stack(models)), own.columns))

    def scaled(self, factor: Tensor) -> InnerProduct:
        """The form times a number a step, (batch,)."""
        return InnerProduct(factor * self.weight, self.matrix)

    def spread(self) -> StepMatrix:
        """The matrices weight_i M_i, one a step."""
        return StepMatrix(self.matrix.sparsity, self.weight[:, None] * self.matrix.values)

    def multiply(self, x: Tensor) -> Tensor:
        """weight_i M_i x_i, rows of shape (batch, n)."""
        return self.weight[:, None] * self.matrix(x)

    def solve(self, r: Tensor) -> Tensor:
        """The inverse applied to rows. Raises `SolveFailure` where a step's form is singular."""
        if not r.numel() and self.matrix.sparsity.columns is None:  # no controls: on any of the ranks that would solve
            return r
        if not bool(self.weight.all()):
            step = int((self.weight == 0).nonzero()[0])
            raise SolveFailure(f"a form is zero in row {step} of this rank", "give every step a weight")
        return self._solver.solve(r) / self.weight[:, None]

    def sum(self, windows: Windows) -> InnerProduct:
        """The sums over the windows that end on this rank. Collective."""
        if alike(windows.grid, self.matrix):
            return InnerProduct(windows.sum(self.weight[:, None])[:, 0], self.matrix)
        return InnerProduct.from_values(self.matrix.sparsity, windows.sum(self.spread().values))

    def row_sums(self) -> Tensor:
        """Sums of absolute entries by row, (batch, n): what lumping makes of a mass."""
        return self.weight.abs()[:, None] * self.matrix.row_sums()

    def diagonal(self) -> Tensor:
        """The diagonal entries, (batch, n)."""
        pattern, values = self.matrix.sparsity, self.matrix.values
        rows, place = torch.from_numpy(pattern.rows), torch.from_numpy(pattern.rows == pattern.cols)
        out = torch.zeros(len(values), pattern.shape[0], dtype=values.dtype)
        out[:, rows[place]] = values[:, place]
        return self.weight[:, None] * out

    def zero_rows(self) -> Tensor:
        """Where a row of a step's form is zero, (batch, n)."""
        return self.row_sums() == 0

    @cached_property
    def _solver(self) -> StepSolver:
        return step_solver(self.matrix)


def _largest(rows: Tensor, columns: Layout | None) -> Tensor:
    """The row with the largest entry; of rows that are spread over ranks, the same one on all."""
    sizes = rows.abs().amax(1) if rows.shape[1] else rows.new_zeros(len(rows))
    return rows[int((sizes if columns is None else columns.max(sizes)).argmax())]
