import numpy as np
import pytest
import torch

from pdeopt.steps.sparse import StepMatrix
from pdeopt.steps.sparsity import Sparsity
from pdeopt.steps.timegrid import TimeGrid
from pdeopt.steps.windows import Windows, alike, sum_windows
from tests.helpers.matrices import densify, randn, random_pattern, random_steps
from tests.helpers.parallel_time import RANKS, check

CASES = [(8, 4), (7, 3), (5, 5), (5, 9), (6, 1), (1, 1)]


@pytest.mark.parametrize("N, size", CASES)
def test_windows_partition_the_steps(N, size):
    windows = Windows(TimeGrid.uniform(N, 1.0), size)
    assert windows.starts.tolist() == list(range(0, N, size))
    assert windows.ends.tolist() == [min(start + size, N) - 1 for start in range(0, N, size)]
    assert windows.coupled.tolist() == windows.starts.tolist()[1:]
    assert not windows.enters and not windows.leaves


@pytest.mark.parametrize("N, size", CASES)
def test_sums_are_those_of_the_windows(N, size):
    rows = randn(N, 3)
    expected = torch.stack([rows[k : k + size].sum(0) for k in range(0, N, size)])
    assert torch.allclose(Windows(TimeGrid.uniform(N, 1.0), size).sum(rows), expected, atol=1e-14)


@pytest.mark.parametrize("batch", [1, None])
@pytest.mark.parametrize("N, size", CASES)
def test_matrices_add_up_over_windows(N, size, batch):
    matrix = random_steps(random_pattern(3, 4), batch or N)
    found = densify(sum_windows(Windows(TimeGrid.uniform(N, 1.0), size), matrix))
    steps = densify(matrix).expand(N, -1, -1)
    expected = torch.stack([steps[k : k + size].sum(0) for k in range(0, N, size)])
    assert torch.allclose(found.expand_as(expected), expected, atol=1e-13)


def test_a_constant_matrix_stays_constant_where_windows_are_equal():
    matrix = StepMatrix.constant(np.eye(2))
    assert sum_windows(Windows(TimeGrid.uniform(6, 1.0), 3), matrix).is_constant
    assert not sum_windows(Windows(TimeGrid.uniform(7, 1.0), 3), matrix).is_constant


def test_matrices_are_alike_where_all_steps_share_them():
    grid, one = TimeGrid.uniform(3, 1.0), random_steps(Sparsity.banded(3), 1)
    many = StepMatrix(one.sparsity, one.values.expand(3, -1))
    assert alike(grid, one) and alike(grid, one, one) and not alike(grid, one, many)


@pytest.mark.mpi
@pytest.mark.parametrize("ranks", RANKS)
def test_windows_reach_over_the_borders_of_ranks(ranks):
    """Sums of rows and of matrices, and whether matrices are alike, against the whole arrays."""
    check("windows", ranks)
