"""Hierarchies of smooth functions: the same function with fewer layers, time steps, elements or samples.

Level 0 is the finest. Corrections are prolonged, x + P d; gradients are restricted by R = P'; iterates are projected
by an operator of their own, which undoes P.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from pdeopt.core.arrays import Array
from pdeopt.core.errors import InputError
from pdeopt.functions.decomposition import Decomposition
from pdeopt.functions.smooth import Operator, SampledFunction, SmoothFunction
from pdeopt.steps.timegrid import TimeGrid


class Transfer:
    """Between the unknowns of a level and those of the next coarser one, each rank its own.

    Args:
        P: prolongation of corrections, (fine, coarse).
        projection: of iterates, (coarse, fine), with projection P = 1. By default (P'P)^-1 P', for a P with orthogonal
            columns: the coarse iterate that is nearest.

    Attributes:
        norm: sqrt |P'P|_inf >= |P|_2, and equal where the columns are orthogonal.
        is_identity: whether both levels have the same unknowns.

    Raises:
        InputError: a projection that does not undo P, or none for a P without orthogonal columns.
    """

    def __init__(self, P: sp.spmatrix, projection: sp.spmatrix | None = None) -> None:
        self.P = sp.csr_matrix(P, dtype=float)
        self.R = sp.csr_matrix(self.P.T)
        self.fine, self.coarse = self.P.shape
        self.is_identity = self.fine == self.coarse and abs(self.P - sp.identity(self.fine)).nnz == 0
        gram = sp.csr_matrix(self.R @ self.P)
        self.norm = math.sqrt(abs(gram).sum(axis=1).max()) if self.coarse else 0.0
        if projection is None:
            squares = gram.diagonal()
            if (abs(gram - sp.diags(squares))).max() > 1e-12 * self.norm**2 or not (squares > 0).all():
                raise InputError(
                    "prolongation without a projection",
                    "columns that are not orthogonal, or zero",
                    "orthogonal columns, or a projection",
                )
            projection = sp.diags(1.0 / squares) @ self.R
        self.projection = sp.csr_matrix(projection, dtype=float)
        if self.projection.shape != (self.coarse, self.fine):
            raise InputError("projection", f"shape {self.projection.shape}", f"{(self.coarse, self.fine)}")
        if abs(self.projection @ self.P - sp.identity(self.coarse)).max() > 1e-10:
            raise InputError("projection", "a matrix that does not undo the prolongation", "projection P = 1")

    @classmethod
    def aggregates(cls, parents: Tensor | Array, weights: Tensor | Array | None = None) -> Transfer:
        """Piecewise constant: fine unknowns that share a coarse one. The columns of P are orthonormal.

        So distances, gradients and trust radii mean the same on both levels: a coarse unknown is sqrt(k) times the
        value that its k fine ones share.

        Args:
            parents: the coarse unknown of each fine one, 0.. without gaps.
            weights: of the fine unknowns in their aggregate, > 0; equal by default.
        """
        parents = np.asarray(parents)
        weights = np.ones(len(parents)) if weights is None else np.asarray(weights, dtype=float)
        if parents.size and (parents.min() != 0 or len(np.unique(parents)) != parents.max() + 1):
            raise InputError("parents", f"{parents.min()} to {parents.max()} with gaps", "0, 1, ... without gaps")
        entries = weights / np.sqrt(np.bincount(parents, weights**2))[parents]
        return cls(sp.csr_matrix((entries, parents, np.arange(len(parents) + 1))))

    def prolong(self, d: Tensor) -> Tensor:
        """P d, (fine,)."""
        return torch.from_numpy(self.P @ d.numpy())

    def restrict(self, g: Tensor) -> Tensor:
        """R g = P'g, (coarse,)."""
        return torch.from_numpy(self.R @ g.numpy())

    def project(self, x: Tensor) -> Tensor:
        """The coarse iterate for x, (coarse,); that of P y is y."""
        return torch.from_numpy(self.projection @ x.numpy())


class Hierarchy(SmoothFunction):
    """A smooth function with coarser versions of itself; as a function it is the finest.

    Level 0 is the finest. The function of level l + 1 is that of level l with fewer layers, time steps, elements or
    samples; `transfers[l]` takes corrections, gradients and iterates from one to the other. Multilevel methods (MG/OPT,
    RMTR) go through all levels, SPQN begins on the second, quasi-Newton methods use levels that share their unknowns::

        hierarchy = Hierarchy([fine, coarse], [Transfer.aggregates(parents)])        # parents[i]: coarse index of i
        MGOPT(hierarchy, smoother="lbfgs", gtol=1e-6).minimize(x)

    No relation between the functions is assumed: coarse models get the correction of `FirstOrderConsistent`, and what a
    coarse level proposes is judged on the finer one. Unknowns may be distributed, all levels over as many ranks, each
    rank with its own part of P.

    Args:
        functions: finest first. All calls count in the tally of the finest, by costs that each function states in
            gradients of the finest.
        transfers: between neighbors, one less.

    Raises:
        InputError: no function, a transfer too many or too few, sizes or communicators that do not match.
    """

    def __init__(self, functions: Sequence[SmoothFunction], transfers: Sequence[Transfer] = ()) -> None:
        self.functions, self.transfers = tuple(functions), tuple(transfers)
        if not functions or len(transfers) != len(functions) - 1:
            raise InputError(
                "hierarchy",
                f"{len(functions)} functions and {len(transfers)} transfers",
                "at least one function, and a transfer between neighbors",
            )
        finest = functions[0]
        super().__init__(finest.size, finest.comm, finest.costs, finest.tally)
        for level, transfer in enumerate(transfers):
            sizes, expected = (transfer.fine, transfer.coarse), tuple(f.size for f in functions[level : level + 2])
            if sizes != expected:
                raise InputError(f"transfer from level {level} to {level + 1}", f"sizes {sizes}", f"{expected}")
            if functions[level + 1].comm.size != finest.comm.size:
                raise InputError(
                    f"level {level + 1} of a hierarchy",
                    f"{functions[level + 1].comm.size} ranks",
                    f"{finest.comm.size}, as on the finest level",
                )
            functions[level + 1].tally = finest.tally

    def __len__(self) -> int:
        return len(self.functions)

    @property
    def shares_unknowns(self) -> bool:
        """Whether all levels have the same unknowns."""
        return all(transfer.is_identity for transfer in self.transfers)

    def _value(self, x: Tensor) -> float:
        return self.functions[0].evaluate_value(x)

    def _value_and_gradient(self, x: Tensor) -> tuple[float, Tensor]:
        return self.functions[0].evaluate(x)

    def _hvp(self, x: Tensor, d: Tensor) -> Tensor:
        return self.functions[0].evaluate_hvp(x, d)

    def local(self, decomposition: Decomposition, part: int, x: Tensor) -> SmoothFunction:
        return self.functions[0].local(decomposition, part, x)

    def decompose(self, parts: int | None = None, overlap: int = 0, team: Any = None) -> Decomposition:
        return self.functions[0].decompose(parts, overlap, team)

    def preconditioner(self) -> Operator | None:
        return self.functions[0].preconditioner()


def as_hierarchy(function: SmoothFunction) -> Hierarchy:
    """The function itself where it is one, else the hierarchy of one level."""
    return function if isinstance(function, Hierarchy) else Hierarchy([function])


def sample_hierarchy(function: SampledFunction, sizes: Sequence[int], generator: torch.Generator) -> Hierarchy:
    """Means over nested random subsets of the samples; the unknowns are the same on all levels.

    Args:
        sizes: samples of the coarser levels, decreasing.

    Raises:
        InputError: sizes that do not decrease from the number of samples to 1 or more.
    """
    counts = [function.samples, *sizes]
    if any(not 0 < b < a for a, b in pairwise(counts)):
        raise InputError("samples of the coarser levels", list(sizes), f"numbers that decrease from {counts[0]} to 1")
    order = torch.randperm(function.samples, generator=generator)
    same = Transfer.aggregates(np.arange(function.size))
    return Hierarchy([function, *(function.subset(order[:count]) for count in sizes)], [same] * len(sizes))


def window_transfer(grid: TimeGrid, controls: int, factor: int = 2) -> Transfer:
    """Controls that are constant on time steps to those on windows of `factor` steps, of the grid `coarsen(factor)`.

    The unknowns are y = D z with D^2 the lumped metric of the controls, tau Q: a window's D^2 is the sum of its steps'.

    Args:
        controls: of each step.

    Raises:
        InputError: windows that reach over ranks.
    """
    inside = grid.mpi.allreduce(int(grid.begin % factor == 0 and (grid.end % factor == 0 or grid.is_last)))
    if inside < grid.mpi.size:
        raise InputError(
            "time steps of each rank",
            f"{grid.n_local} on rank {grid.mpi.rank}",
            f"multiples of {factor}, the steps of a window",
        )
    windows = np.arange(grid.n_local) // factor
    parents = (windows[:, None] * controls + np.arange(controls)).ravel()
    return Transfer.aggregates(parents, grid.steps.dt.sqrt().repeat_interleave(controls))
