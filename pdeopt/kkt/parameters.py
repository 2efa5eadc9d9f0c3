"""What global parameters have in the KKT matrix: F_p and the columns of p in W, step by step, by colored products."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pdeopt.control.linearization import Linearization, parameter_column
from pdeopt.control.problem import ControlProblem
from pdeopt.core.autodiff import columns
from pdeopt.core.errors import InputError
from pdeopt.kkt.layout import spaces
from pdeopt.steps.sparsity import ParameterPattern, Sparsity


class ParameterValues(NamedTuple):
    """Entries on the pattern of `Parameters`.

    Attributes:
        F, W: of the steps of this rank, (n_local, nnz).
        W_pp: summed over them, (nnz,).
    """

    F: Tensor
    W: Tensor
    W_pp: Tensor


class Parameters:
    """The derivatives of constraint and objective in the global parameters, as sparse blocks. Collective.

    Args:
        problem: with parameters or without.

    Attributes:
        pattern: covers both at every point, found by differentiating at random ones.
    """

    def __init__(self, problem: ControlProblem) -> None:
        own = problem.constraint.parameter_pattern if problem.param_dim else None
        self.pattern = (own or _full(problem)) | _objective_pattern(problem)

    def values(self, lin: Linearization, lam: Tensor | None) -> ParameterValues:
        """Entries at a linearization.

        Args:
            lin: where.
            lam: rows of the multiplier, (n_local, n); None leaves the constraint's curvature out.

        Raises:
            InputError: the pattern misses nonzero derivatives.
        """
        column, F = partial(parameter_column, lin, lam), self.jacobian(lin)
        if not self.pattern.F.shape[1]:
            return ParameterValues(F, F, F[0])
        W = _filled(self.pattern.W, lambda dp: torch.cat(column(dp)[:3], dim=1))
        return ParameterValues(F, W, _filled(self.pattern.W_pp, lambda dp: column(dp)[3][None])[0])

    def jacobian(self, lin: Linearization) -> Tensor:
        """Entries of F_p at a linearization, (n_local, nnz). Raises `InputError` as `values` does."""
        if not self.pattern.F.shape[1]:
            return torch.zeros(len(lin.steps), 0, dtype=torch.float64)
        return _filled(self.pattern.F, lambda dp: lin.jacobian.jvp(dp=dp))

    def own(self, lin: Linearization) -> Tensor:
        """The objective's Hessian in p alone, dense, summed over the steps of this rank, (param_dim, param_dim)."""
        W_pp = self.pattern.W_pp
        values = _filled(W_pp, lambda dp: parameter_column(lin, None, dp)[3][None])
        dense = torch.zeros(W_pp.shape, dtype=torch.float64)
        dense[torch.from_numpy(W_pp.rows), torch.from_numpy(W_pp.cols)] = values[0]
        return dense


def _filled(pattern: Sparsity, product: Callable[[Tensor], Tensor]) -> Tensor:
    values, are_all = pattern.fill(product, at_once=False)
    if not are_all:
        raise InputError(
            "the sparsity of derivatives in the parameters",
            "a pattern that misses nonzero entries",
            "constraint.parameter_pattern = ParameterPattern.full(n, m, param_dim)",
        )
    return values


def _full(problem: ControlProblem) -> ParameterPattern:
    """All entries; of the rows that this rank owns, and over the unknowns that it sees."""
    P, ((_, n), (_, m)) = problem.param_dim, spaces(problem)
    return ParameterPattern(*(Sparsity(np.ones(shape)) for shape in ((problem.n, P), (2 * n + m, P), (P, P))))


def _objective_pattern(problem: ControlProblem) -> ParameterPattern:
    """That of the second derivatives of J and of the initial map at random points. The same on all ranks."""
    n, m, P = problem.n, problem.m, problem.param_dim
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    p, w = draw(P), draw(n)
    steps = problem.grid.samples().with_parameters(p)
    u, z = draw(len(steps), n), draw(len(steps), m)
    initial = problem.initial

    def column(dp: Tensor) -> tuple[Tensor, Tensor]:
        h_u, h_z, h_p = problem.objective.hvp(u, z, steps, torch.zeros_like(u), torch.zeros_like(z), dp)
        return torch.cat([h_u, h_z], dim=1), torch.stack([h_p, initial.hvp(p, dp), initial.curvature(p, w, dp)])

    if P == 0:
        return _full(problem)
    if problem.grid.space_ranks > 1:
        legal = "-kkt_precond reduced, or space_ranks 1"
        raise InputError("an assembled KKT matrix", f"{P} parameters with several ranks a step", legal)
    mixed, own = columns(column, torch.eye(P, dtype=torch.float64), chunk_size=256)
    W = torch.cat([torch.zeros(n, P, dtype=torch.bool), (mixed != 0).any(1).T])
    return ParameterPattern(
        *(Sparsity(part.numpy()) for part in (torch.zeros(n, P, dtype=torch.bool), W, (own != 0).any(1).T))
    )
