"""Matrices of steps and random numbers, for tests."""

from __future__ import annotations

import numpy as np
import torch

from pdeopt.steps.sparse import StepMatrix
from pdeopt.steps.sparsity import Sparsity


def random_pattern(rows, cols, density=0.3, seed=0, diagonal=False):
    """A pattern with about this share of the entries, and with all of the diagonal."""
    mask = np.random.default_rng(seed).random((rows, cols)) < density
    return Sparsity(mask | np.eye(rows, cols, dtype=bool) if diagonal else mask)


def random_steps(pattern, batch, seed=0, shift=0.0):
    """Matrices with this pattern, `shift` added to the diagonal."""
    draw = torch.Generator().manual_seed(seed)
    values = torch.randn(batch, pattern.nnz, generator=draw, dtype=torch.float64)
    values[:, torch.from_numpy(pattern.rows == pattern.cols)] += shift
    return StepMatrix(pattern, values)


def densify(matrix):
    """The dense matrices of a `StepMatrix`, (batch, rows, cols)."""
    out = torch.zeros(len(matrix.values), *matrix.shape, dtype=torch.float64)
    out[:, matrix.sparsity.rows, matrix.sparsity.cols] = matrix.values
    return out


def randn(*shape, seed=1):
    """Normal random numbers, the same for each call."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def coupled(A, B):
    """The dense block lower bidiagonal matrix of A_i and B_i."""
    batch, n = len(A), A.shape[1]
    whole = torch.block_diag(*A)
    for i in range(1, batch):
        whole[i * n : (i + 1) * n, (i - 1) * n : i * n] = B[i]
    return whole


def heat_steps(n, batch):
    """Step matrices as of a heat equation, symmetric and dominant, and a coupling of all."""
    A = StepMatrix(Sparsity.banded(n), torch.full((batch, 3 * n - 2), -0.4, dtype=torch.float64))
    diagonal = torch.from_numpy(A.sparsity.rows == A.sparsity.cols)
    A.values[:, diagonal] = 1.0 + torch.linspace(0.1, 1.0, batch, dtype=torch.float64)[:, None]
    return A, random_steps(Sparsity.banded(n), 1, seed=5)
