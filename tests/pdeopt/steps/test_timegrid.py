import numpy as np
import pytest
import torch
from mpi4py import MPI

from pdeopt.core.errors import InputError
from pdeopt.steps.timegrid import TimeGrid
from tests.helpers.parallel_time import RANKS, check
from tests.helpers.support import python


@pytest.fixture
def grid():
    return TimeGrid([0.0, 0.1, 0.3, 0.35, 1.0])


def test_steps_know_their_intervals(grid):
    steps = grid.steps
    assert steps.index.tolist() == [1, 2, 3, 4]
    assert torch.equal(steps.t_new - steps.t_old, steps.dt)
    assert torch.equal(torch.from_numpy(np.diff(grid.times)), steps.dt)
    assert torch.allclose(steps.t_mid, 0.5 * (steps.t_old + steps.t_new))
    assert steps.has_last and not steps[:2].has_last and not grid.node_zero.has_last


def test_trapezoidal_weights_integrate_linear_functions(grid):
    w = torch.cat([grid.node_zero.weight, grid.steps.weight])
    t = torch.from_numpy(grid.times)
    assert float(w @ (2 * t + 3)) == pytest.approx(4.0, abs=1e-15)


def test_shift_brings_the_step_before(grid):
    rows, first = torch.arange(8.0).reshape(4, 2), torch.tensor([-1.0, -2.0])
    assert torch.equal(grid.shift(rows, first), torch.cat([first[None], rows[:-1]]))
    assert torch.equal(grid.shift(rows), torch.cat([torch.zeros(1, 2), rows[:-1]]))


def test_shift_adjoint_is_the_transpose_of_shift(grid):
    generator = torch.Generator().manual_seed(0)
    rows, w = (torch.randn(4, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    first = torch.randn(3, generator=generator, dtype=torch.float64)
    back, back_first = grid.shift_adjoint(w)
    left = (grid.shift(rows, first) * w).sum()
    right = (rows * back).sum() + first @ back_first
    assert float(left - right) == pytest.approx(0.0, abs=1e-14)


def test_coarsening_keeps_every_other_node(grid):
    assert np.array_equal(grid.coarsen(2).times, grid.times[::2])
    assert grid.coarsen(4).num_steps == 1
    assert np.array_equal(grid.coarsen(3).times, grid.times[[0, 3, 4]])
    with pytest.raises(InputError, match="factor"):
        grid.coarsen(0)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
def test_windows_end_at_every_so_many_steps_and_at_the_last(grid, size):
    ends = grid.window_ends(size)
    assert ends.tolist() == sorted({min(k, 4) for k in range(size, 4 + size, size)})


def test_a_coarse_grid_is_made_once(grid):
    assert grid.coarsen(2) is grid.coarsen(2)
    assert np.array_equal(grid.coarsen(2).coarsen(2).times, [0.0, 1.0])


def test_weights_and_lengths_of_a_coarse_grid_are_its_own(grid):
    coarse = grid.coarsen(3)
    assert torch.allclose(coarse.steps.dt, torch.tensor([0.35, 0.65], dtype=torch.float64))
    assert float(coarse.steps.weight.sum() + coarse.node_zero.weight.sum()) == pytest.approx(1.0, abs=1e-15)


@pytest.mark.parametrize(
    "times", [[0.0], [], [0.0, 0.0], [1.0, 0.5], [0.0, float("nan")], [0.0, float("inf")], [[0.0, 1.0]]]
)
def test_nodes_that_are_no_time_grid_are_refused(times):
    with pytest.raises(InputError, match="strictly increasing"):
        TimeGrid(times, MPI.COMM_SELF)


@pytest.mark.parametrize("N, T", [(0, 1.0), (-3, 1.0), (4, 0.0), (4, -1.0), (4, float("nan"))])
def test_uniform_grids_need_steps_and_time(N, T):
    with pytest.raises(InputError):
        TimeGrid.uniform(N, T)


def test_communicators_of_both_libraries_are_taken():
    from petsc4py import PETSc

    for comm in (None, PETSc.COMM_SELF, MPI.COMM_SELF):
        assert TimeGrid([0.0, 1.0], comm).mpi.size == 1


@pytest.mark.mpi
@pytest.mark.parametrize("ranks", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_a_grid_on_several_ranks_is_the_same_grid(ranks):
    """Ownership, both shifts, sums, maxima, broadcast and gather, against the whole arrays."""
    done = python("-m", "tests.helpers.parallel", "grid", ranks=ranks)
    assert done.returncode == 0, done.stderr


@pytest.mark.mpi
@pytest.mark.parametrize("ranks", RANKS)
def test_a_coarse_step_belongs_to_the_rank_that_owns_its_last_node(ranks):
    """Ranks without such a node leave; the others keep their order, down to one step."""
    check("timegrid", ranks)
