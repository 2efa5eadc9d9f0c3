import numpy as np
import pytest
import torch

from pdeopt.precond.frequencies import Frequencies, mean
from pdeopt.steps.sparsity import Sparsity
from pdeopt.steps.timegrid import TimeGrid
from tests.helpers.matrices import densify, randn, random_steps
from tests.helpers.parallel_time import RANKS, check
from tests.helpers.support import relative


@pytest.mark.parametrize("N", [1, 2, 7, 8])
def test_a_circulant_system_falls_apart(N):
    """A on the diagonal, B below it, and -B in the corner: values at half of the odd frequencies are enough."""
    n = 3
    A, B, r = 4.0 * torch.eye(n, dtype=torch.float64) + randn(n, n, seed=1), randn(n, n, seed=2), randn(N, n, seed=3)
    before = torch.diag(torch.ones(N - 1, dtype=torch.float64), -1)
    before[0, -1] = -1.0
    whole = torch.kron(torch.eye(N, dtype=torch.float64), A) + torch.kron(before, B)
    frequencies = Frequencies(TimeGrid.uniform(N, 1.0))
    values = frequencies.forward(r)
    assert len(values) == (N + 1) // 2
    for j, theta in enumerate(frequencies.angles):
        values[j] = np.linalg.solve(A.numpy() + np.exp(-1j * theta) * B.numpy(), values[j])
    assert relative(frequencies.backward(values).ravel(), torch.linalg.solve(whole, r.ravel())) <= 1e-12


@pytest.mark.parametrize("batch", [1, 5])
def test_mean_over_the_steps(batch):
    grid, pattern = TimeGrid.uniform(5, 1.0), Sparsity.banded(3)
    M = random_steps(pattern, batch)
    assert relative(torch.from_numpy(mean(grid, M).toarray()), densify(M).mean(0)) <= 1e-15


@pytest.mark.mpi
@pytest.mark.parametrize("ranks", RANKS)
def test_on_several_ranks(ranks):
    check("frequencies", ranks)
