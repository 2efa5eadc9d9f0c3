"""Kernel ridge regression, which is also the mean of a Gaussian process, by the way that the data have."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from mpi4py import MPI
from petsc4py import PETSc

from pdeopt.core.errors import InputError, SolveFailure
from pdeopt.core.settings import Settings, read, setting
from pdeopt.lowrank.clusters import table_of
from pdeopt.lowrank.features import CHUNK, FeatureRidge, KernelFeatures, NystromFeatures, RandomFeatures, k_means
from pdeopt.lowrank.hierarchical import HierarchicalPC, HierarchicalSettings, KernelMatrix
from pdeopt.lowrank.hodlr import HierarchicalKernel
from pdeopt.lowrank.kernels import Array, Kernel, require_positive

#: Points by which the ranks of blocks are measured, and the part of full rank up to which a hierarchy pays.
MEASURED, LOW = 2048, 0.25

METHODS = ("auto", "hodlr", "nystrom", "features")


@dataclass(frozen=True)
class RidgeSettings(Settings, prefix="ridge_"):
    """Kernel ridge regression."""

    centers: int = setting(1000, "points, or random features, of a method with features, at most", at_least=1)
    k_means: int = setting(3, "steps of k-means that move the points of the method nystrom", at_least=0)
    rtol: float = setting(1e-10, "residual of the system with blocks of low rank, relative", above=0)
    single: bool = setting(False, "features in single precision, their sums in double")
    seed: int = setting(0, "of the points and features that are drawn", at_least=0)


class KernelRidge:
    """f(x) = sum_s k(x, x_s) alpha_s with (K + lambda) alpha = y: min sum_s |f(x_s) - y_s|^2 + lambda |f|^2_k.

    As scikit-learn's class of this name, and as the mean of a Gaussian process with noise of variance lambda. Methods:

    - `hodlr`: K by hierarchical blocks, and CG with their symmetric factor, by default exact: a direct solve;
    - `nystrom`, `features`: f in the span of `centers` features, see `NystromFeatures` and `RandomFeatures`;
    - `auto`, at the first `fit`: hodlr for few points, or where blocks of 2048 of them have at most a quarter of full
      rank; else nystrom, whose features follow the data.

    Args:
        kernel: k.
        shift: lambda.
        method: auto | hodlr | nystrom | features.
        settings: by default from the options -ridge_*.
        comm: PETSc communicator whose ranks share the work; default PETSc.COMM_WORLD.

    Attributes:
        method: that was taken.
        ranks: largest rank of a block by levels, the largest blocks first: of hodlr, or of what auto measured.
        block_ranks: the same of all blocks, see `HierarchicalKernel.block_ranks`; of `measured` points.
        residual: |(K_compressed + lambda) alpha - y| / |y| of hodlr; NaN of the others.
        iterations: of CG, of all columns.
        nbytes: of what the method keeps to solve with, of all ranks.
        alpha: (n, outputs), of hodlr.

    Raises:
        InputError: a shift that is not positive; `fit`: points or values that are not finite, or as many of them.

    Example:
        >>> model = KernelRidge(Gaussian(0.2), 0.1).fit(x, y)
        >>> model.predict(x_test)
    """

    def __init__(
        self,
        kernel: Kernel,
        shift: float,
        method: str = "auto",
        settings: RidgeSettings | None = None,
        comm: Any = None,
    ) -> None:
        if method not in METHODS:
            raise InputError("method of kernel ridge regression", method, " | ".join(METHODS))
        self.kernel, self.shift = kernel, require_positive("shift of kernel ridge regression", shift)
        self.settings = read(RidgeSettings) if settings is None else settings
        self.comm = PETSc.COMM_WORLD if comm is None else comm
        self.mpi = self.comm.tompi4py()
        self.method, self.ranks = method, list[int]()
        self.block_ranks, self.measured = list[list[int]](), 0
        self.residual, self.iterations, self.nbytes = math.nan, 0, 0
        self.alpha = np.zeros((0, 0))

    def fit(self, x: Any, y: Any) -> KernelRidge:
        """Find f. Collective.

        Args:
            x: points (n, d), all of them on each rank.
            y: values (n,) or (n, outputs).

        Raises:
            SolveFailure: blocks too coarse for lambda, or CG without an end.
        """
        self.x = table_of(x)
        values = np.asarray(y, dtype=float)
        self._flat = values.ndim == 1
        y = table_of(values.reshape(len(values), -1) if values.ndim else values, "values")
        if len(y) != len(self.x):
            raise InputError("values of kernel ridge regression", len(y), f"{len(self.x)}, as many as points")
        if self.method == "auto":
            self.method = self._choose()
        if self.method == "hodlr":
            self._solve_blocks(y)
        else:
            own = slice(*(len(y) * (self.mpi.rank + k) // self.mpi.size for k in (0, 1)))
            dtype = torch.float32 if self.settings.single else torch.float64
            self._model = FeatureRidge(self._features(), self.shift, self.mpi, dtype)
            self._model.fit(self.x[own], y[own])
            self.nbytes = 8 * self._model.features.size**2
        return self

    def predict(self, x: Any) -> Array:
        """f at points (n, d): (n,), or (n, outputs) where y had columns; of all ranks, each for some. Collective."""
        x = table_of(x)
        if x.shape[1] != self.x.shape[1]:
            raise InputError("points to predict at", f"{x.shape[1]} coordinates", self.x.shape[1])  # type: ignore[arg-type]
        own = x[slice(*(len(x) * (self.mpi.rank + k) // self.mpi.size for k in (0, 1)))]
        found = self._kernel_sums(own) if self.method == "hodlr" else self._model.predict(own)
        whole: Array = np.concatenate(self.mpi.allgather(found))
        return whole[:, 0] if self._flat else whole

    def _choose(self) -> str:
        """The method for these points."""
        if len(self.x) <= MEASURED:
            return "hodlr"
        rows = np.random.default_rng(self.settings.seed).choice(len(self.x), MEASURED, replace=False)
        own = read(HierarchicalSettings)
        limit = int(LOW * MEASURED / 2)
        sample = HierarchicalKernel(self.kernel, self.x[rows], own.leaf, own.rtol, most_rank=limit + 1)
        self._look_at(sample)
        return "hodlr" if self.ranks[0] <= limit else "nystrom"

    def _look_at(self, hierarchy: HierarchicalKernel) -> None:
        self.ranks, self.block_ranks, self.measured = hierarchy.ranks, hierarchy.block_ranks(), hierarchy.tree.n

    def _features(self) -> KernelFeatures:
        size = min(self.settings.centers, len(self.x))
        if self.method == "features":
            return RandomFeatures(self.kernel, self.x.shape[1], self.settings.centers, self.settings.seed)
        own = k_means(self.x, size, self.settings.k_means, self.settings.seed) if self.mpi.rank == 0 else None
        return NystromFeatures(self.kernel, self.mpi.bcast(own))

    def _solve_blocks(self, y: Array) -> None:
        """alpha by CG, a column at a time."""
        operator = KernelMatrix(self.kernel, self.x, self.shift, comm=self.comm)
        matrix = operator.shell()
        solver = PETSc.KSP().create(self.comm)
        solver.setOptionsPrefix("ridge_")
        solver.setOperators(matrix)
        solver.setType("cg")
        solver.setNormType(PETSc.KSP.NormType.UNPRECONDITIONED)
        solver.setTolerances(rtol=self.settings.rtol, atol=0.0, max_it=1000)
        solver.getPC().setType("python")
        context = HierarchicalPC()
        solver.getPC().setPythonContext(context)
        solver.setFromOptions()
        try:
            self._solve_columns(solver, matrix, y)
            self._look_at(operator.hierarchy)
            self.nbytes = operator.hierarchy.nbytes + context.factor.nbytes
        finally:
            solver.destroy()
            matrix.destroy()

    def _solve_columns(self, solver: PETSc.KSP, matrix: PETSc.Mat, y: Array) -> None:
        right, left = matrix.createVecs()
        own, self.alpha, squares = slice(*right.getOwnershipRange()), np.zeros_like(y), 0.0
        for column in range(y.shape[1]):
            right.setArray(y[own, column])
            solver.solve(right, left)
            if solver.getConvergedReason() < 0:
                reason = f"reason {solver.getConvergedReason()} of KSP"
                raise SolveFailure(f"kernel ridge regression: {reason}", "a larger -hier_rank, or a smaller -hier_cut")
            self.iterations += solver.getIterationNumber()
            self.alpha[own, column] = left.getArray(readonly=True)
            matrix.multAdd(left, -right, right)  # alpha is done: the vector is free
            squares += right.norm() ** 2
        self.mpi.Allreduce(MPI.IN_PLACE, self.alpha)
        self.residual = math.sqrt(squares) / (float(np.linalg.norm(y)) or 1.0)

    def _kernel_sums(self, x: Array) -> Array:
        """sum_s k(x, x_s) alpha_s."""
        rows = max(1, CHUNK * 1024 // len(self.x))
        parts = [self.kernel.block(x[k : k + rows], self.x) @ self.alpha for k in range(0, len(x), rows)]
        return np.concatenate([np.zeros((0, self.alpha.shape[1])), *parts])
