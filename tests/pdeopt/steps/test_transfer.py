from functools import partial

import numpy as np
import pytest
import torch

from pdeopt.steps.timegrid import TimeGrid
from pdeopt.steps.transfer import adjoint_interpolation, injection, interpolation, piecewise_constant, transfer_matrix
from tests.helpers.parallel_time import RANKS, check
from tests.helpers.support import dense, relative

KINDS = {
    "linear": interpolation,
    "linear adjoint": adjoint_interpolation,
    "constant": piecewise_constant,
    "injection": injection,
    "adjoint injection": partial(injection, adjoint=True),
}
CASES = [(8, 2), (8, 4), (7, 2), (7, 3), (5, 9), (1, 2)]


@pytest.fixture(params=CASES, ids=str)
def grids(request):
    """A grid of unequal steps, the coarsening factor, and the coarse grid."""
    N, factor = request.param
    grid = TimeGrid(0.3 + np.cumsum(1.0 + 0.5 * np.sin(np.arange(N + 1))))
    return grid, factor, grid.coarsen(factor)


def test_linear_is_exact_for_linear_functions_that_vanish_at_the_start(grids):
    grid, factor, coarse = grids
    found = interpolation(grid, factor) @ (coarse.times[1:] - coarse.times[0])
    assert relative(found, grid.times[1:] - grid.times[0]) <= 1e-14


def test_linear_adjoint_is_exact_for_linear_functions_that_vanish_at_the_end(grids):
    grid, factor, coarse = grids
    found = adjoint_interpolation(grid, factor) @ (coarse.times[-1] - coarse.times[:-1])
    assert relative(found, grid.times[-1] - grid.times[:-1]) <= 1e-14


def test_constant_is_exact_for_constants_of_windows(grids):
    grid, factor, coarse = grids
    window = np.arange(grid.num_steps) // factor
    found = piecewise_constant(grid, factor) @ np.sin(1.0 + np.arange(coarse.num_steps))
    assert np.array_equal(found, np.sin(1.0 + window))


def test_interpolation_keeps_the_values_at_common_nodes(grids):
    grid, factor, coarse = grids
    ends, unit = grid.window_ends(factor), np.eye(coarse.num_steps)
    assert np.allclose(interpolation(grid, factor).toarray()[ends - 1], unit, atol=1e-15)
    assert np.allclose(adjoint_interpolation(grid, factor).toarray()[np.r_[0, ends[:-1]]], unit, atol=1e-15)


def test_interpolation_is_convex_but_where_the_function_vanishes(grids):
    """In the first window of states and the last of multipliers, the missing share is that of the zero value."""
    grid, factor, _ = grids
    last = (grid.num_steps - 1) // factor * factor
    for kind, inside in ((interpolation, slice(factor, None)), (adjoint_interpolation, slice(0, last))):
        P = kind(grid, factor)
        assert P.min() >= 0 and P.sum(1).max() <= 1 + 1e-14
        assert np.allclose(P.sum(1)[inside], 1.0, atol=1e-14)


@pytest.mark.parametrize("adjoint", [False, True])
def test_injection_takes_one_step_of_each_window_as_it_is(grids, adjoint):
    """So it is the sum over the window of a residual that is zero elsewhere."""
    grid, factor, coarse = grids
    R = injection(grid, factor, adjoint).T.tocsr()
    ends = grid.window_ends(factor)
    assert np.array_equal(R.indices, np.r_[0, ends[:-1]] if adjoint else ends - 1)
    assert np.array_equal(R.indptr, np.arange(coarse.num_steps + 1)) and (R.data == 1).all()
    r = np.zeros(grid.num_steps)
    r[R.indices] = np.cos(R.indices)
    assert relative(R @ r, piecewise_constant(grid, factor).T @ r) == 0.0


@pytest.mark.parametrize("N, factor", [(8, 2), (8, 4), (9, 3)])
def test_reversing_time_turns_one_interpolation_into_the_other(N, factor):
    times = np.cumsum(1.0 + 0.5 * np.sin(np.arange(N + 1)))
    P = interpolation(TimeGrid(-times[::-1]), factor).toarray()
    assert np.allclose(adjoint_interpolation(TimeGrid(times), factor).toarray(), P[::-1, ::-1], atol=1e-14)


def test_spread_is_the_kronecker_product_field_by_field(grids):
    grid, factor, coarse = grids
    kinds = [(KINDS[name](grid, factor), size) for name, size in (("linear", 2), ("constant", 1), ("injection", 3))]
    P = transfer_matrix(grid, coarse, grid.comm, kinds)
    expected = torch.block_diag(*(torch.from_numpy(np.kron(T.toarray(), np.eye(size))) for T, size in kinds))
    assert relative(dense(P), expected) == 0.0
    P.destroy()


@pytest.mark.mpi
@pytest.mark.parametrize("ranks", RANKS)
def test_spread_sends_between_ranks(ranks):
    """Products with the matrix and its transpose, with ranks that have no coarse step, against Kronecker products."""
    check("transfer", ranks)
