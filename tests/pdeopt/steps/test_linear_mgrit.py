import numpy as np
import pytest
import torch

from pdeopt.core.errors import InputError, SolveFailure
from pdeopt.core.settings import read
from pdeopt.steps.linear_mgrit import EXACT_RTOL, LinearMgrit, LinearMgritSettings, TimeSystem
from pdeopt.steps.sparse import StepMatrix
from pdeopt.steps.timegrid import TimeGrid
from problems.benchmarks.processes import counted
from tests.helpers import examples
from tests.helpers.matrices import coupled, densify, randn, random_pattern, random_steps
from tests.helpers.parallel_time import RANKS, check

n = 3
CASES = [(8, 2), (8, 4), (7, 2), (7, 3), (5, 9), (1, 2)]


def system(N, constant):
    """A random system, its grid, and its dense matrix."""
    batch = 1 if constant else N
    A = random_steps(random_pattern(n, n, 0.5, 1, diagonal=True), batch, shift=4.0)
    B = random_steps(random_pattern(n, n, 0.5, 2), batch, seed=5)
    return TimeGrid.uniform(N, 1.0), A, B, coupled(*(densify(part).expand(N, -1, -1) for part in (A, B)))


def matrix_of(verb, rows):
    """The dense matrix of a linear function of `rows` rows."""
    units = torch.eye(rows * n, dtype=torch.float64).reshape(-1, rows, n)
    return torch.stack([verb(unit).ravel() for unit in units], dim=1)


def cut(T, N, m):
    """The dense matrix without what couples windows."""
    step = torch.arange(N * n) // n
    return torch.where(step[:, None] // m == step // m, T, 0.0)


@pytest.mark.parametrize("constant", [True, False])
@pytest.mark.parametrize("N, m", CASES)
def test_a_sweep_inverts_the_windows(N, m, constant):
    grid, A, B, T = system(N, constant)
    system_ = TimeSystem(grid, A, B, m)
    inverse = torch.linalg.inv(cut(T, N, m))
    assert torch.allclose(matrix_of(system_.multiply, N), T, atol=1e-14)
    assert torch.allclose(matrix_of(system_.multiply_adjoint, N), T.T, atol=1e-14)
    assert torch.allclose(matrix_of(system_.sweep, N), inverse, atol=1e-14)
    assert torch.allclose(matrix_of(system_.sweep_adjoint, N), inverse.T, atol=1e-14)


@pytest.mark.parametrize("constant", [True, False])
@pytest.mark.parametrize("N, m", CASES)
def test_couplings_are_what_a_cut_drops(N, m, constant):
    grid, A, B, T = system(N, constant)
    system_, windows = TimeSystem(grid, A, B, m), -(-N // m)
    ends = matrix_of(system_.at_ends, windows)
    couple = matrix_of(system_.couple, windows)
    assert torch.allclose(couple @ ends.T, T - cut(T, N, m), atol=1e-14)
    assert torch.equal(matrix_of(system_.couple_adjoint, N), couple.T)


@pytest.mark.parametrize("cycles, levels", [(1, 2), (2, 20)])
@pytest.mark.parametrize("constant", [True, False])
@pytest.mark.parametrize("N, m", CASES)
def test_the_adjoint_is_the_transpose(N, m, constant, cycles, levels):
    grid, A, B, _ = system(N, constant)
    mgrit = LinearMgrit(grid, A, B, LinearMgritSettings(m, cycles, levels))
    assert torch.allclose(matrix_of(mgrit.adjoint, N), matrix_of(mgrit.forward, N).T, atol=1e-14)


@pytest.mark.parametrize("constant", [True, False])
@pytest.mark.parametrize("N, m", CASES)
def test_each_cycle_makes_one_more_window_exact(N, m, constant):
    """After k cycles the first k + 1 windows are: with one cycle less than windows, all of them."""
    grid, A, B, T = system(N, constant)
    r = randn(N, n)
    exact = torch.linalg.solve(T, r.ravel()).reshape(N, n)
    for cycles in range(1, max(2, -(-N // m))):
        found = LinearMgrit(grid, A, B, LinearMgritSettings(m, cycles, 2)).forward(r)
        error = (found - exact).abs().amax(1) > 1e-13 * exact.abs().max()
        assert not error[: (cycles + 1) * m].any()
    assert not error.any()


@pytest.mark.parametrize("constant", [True, False])
@pytest.mark.parametrize(
    "settings, N",
    [
        (LinearMgritSettings(window=2, cycles=4), 8),
        (LinearMgritSettings(window=2, cycles=4), 7),
        (LinearMgritSettings(window=2, cycles=1, levels=1), 8),
        (LinearMgritSettings(window=8, cycles=1), 8),
        (LinearMgritSettings(window=100, cycles=1), 8),
    ],
)
def test_enough_cycles_or_one_window_are_exact(settings, N, constant):
    grid, A, B, T = system(N, constant)
    mgrit, inverse = LinearMgrit(grid, A, B, settings), torch.linalg.inv(T)
    assert torch.allclose(matrix_of(mgrit.forward, N), inverse, atol=1e-13)
    assert torch.allclose(matrix_of(mgrit.adjoint, N), inverse.T, atol=1e-13)


@pytest.mark.parametrize("m", [2, 4])
def test_the_coarse_step_of_implicit_euler_is_the_longer_step(m):
    fine, coarse = examples.Heat(4, 0.01), examples.Heat(4, 0.01 * m)
    A, B = TimeSystem(TimeGrid.uniform(8, 0.08), fine.A, fine.B, m).coarse_matrices()
    assert A.is_constant and B.is_constant
    assert torch.allclose(densify(A), densify(coarse.A), atol=1e-15)
    assert torch.allclose(densify(B), densify(coarse.B), atol=1e-15)


def test_unequal_windows_have_coarse_steps_of_their_length():
    dt = np.array([0.1, 0.2, 0.3, 0.05, 0.15])
    steps = [examples.Heat(4, h) for h in dt]
    A = StepMatrix(steps[0].A.sparsity, torch.cat([step.A.values for step in steps]))
    A_c, B_c = TimeSystem(TimeGrid(np.r_[0, np.cumsum(dt)]), A, steps[0].B, 2).coarse_matrices()
    for k, h in enumerate([0.3, 0.35, 0.15]):
        assert torch.allclose(densify(A_c)[k], densify(examples.Heat(4, h).A)[0], atol=1e-15)
        assert torch.allclose(densify(B_c)[k], densify(steps[0].B)[0], atol=1e-15)


def test_two_cycles_on_all_levels_of_a_long_heat_equation_are_close():
    """The coarse step is the longer one, so smooth states pass; the error of parabolic parareal contracts by 0.3."""
    N, heat = 64, examples.Heat(4, 1.0 / 64)
    grid, r = TimeGrid.uniform(N, 1.0), torch.ones(N, 4, dtype=torch.float64)
    exact = TimeSystem(grid, heat.A, heat.B).sweep(r)
    found = [LinearMgrit(grid, heat.A, heat.B, LinearMgritSettings(4, cycles)).forward(r) for cycles in (1, 2, 3)]
    errors = [float((x - exact).abs().max()) for x in found]
    assert errors[0] <= 0.3 * float(exact.abs().max())
    assert errors[1] <= 0.3 * errors[0] and errors[2] <= 0.3 * errors[1]


@pytest.mark.parametrize("name", ["window", "cycles", "levels"])
def test_settings_are_options(options, name):
    options(**{f"mgrit_{name}": 3})
    assert getattr(read(LinearMgritSettings), name) == 3
    options(**{f"mgrit_{name}": 0})
    with pytest.raises(InputError, match=f"mgrit_{name}"):
        read(LinearMgritSettings)


@pytest.mark.mpi
@pytest.mark.parametrize("ranks", RANKS)
def test_cycles_are_the_same_on_several_ranks(ranks):
    """Forward and adjoint, matrices constant or not, windows over borders, levels on fewer ranks."""
    check("mgrit", ranks)


@pytest.mark.parametrize("constant", [True, False])
@pytest.mark.parametrize("N, m", CASES)
def test_what_is_missed_where_windows_meet_is_the_residual(N, m, constant):
    """A solve stops at the first cycle whose true residual is small enough; to rounding where that is asked for."""
    grid, A, B, T = system(N, constant)
    mgrit, r = LinearMgrit(grid, A, B, LinearMgritSettings(m)), randn(N, n)
    for solve, matrix in ((mgrit.solve, T), (mgrit.solve_adjoint, T.T)):
        counts = []
        for rtol in (1.0, 1e-2, 1e-5, EXACT_RTOL):
            with counted(LinearMgrit, "_size") as sizes:
                x = solve(r, rtol)
            counts.append(sizes[0])
            assert (matrix @ x.ravel() - r.ravel()).norm() <= 1.1 * rtol * r.norm()
        assert counts == sorted(counts)
        assert torch.allclose(x.ravel(), torch.linalg.solve(matrix, r.ravel()), rtol=1e-12, atol=1e-13)


def test_cycles_that_diverge_say_so_and_name_the_remedy():
    grid, A, B, _ = system(8, constant=True)
    mgrit = LinearMgrit(grid, A, B, LinearMgritSettings(2))
    mgrit._correction = lambda defect: -3.0 * defect
    with pytest.raises(SolveFailure, match=r"MGRIT: relative residual .* where 1\.0e-06") as failure:
        mgrit.solve(randn(8, n), 1e-6)
    assert "-propagator serial" in str(failure.value)
