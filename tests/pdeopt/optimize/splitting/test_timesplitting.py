"""ADMM on windows of time: exact blocks, the optimum of the whole problem, restarts, ranks."""

import numpy as np
import pytest
import torch

import pdeopt as po
from pdeopt.core.errors import InputError
from pdeopt.optimize.splitting import ADMM, CONTROL_DEFAULTS, SplitConstraint, TimeSplitting, TimeSplittingSettings
from problems.burgers import BurgersCase, BurgersSettings
from problems.heat import HeatCase, HeatSettings
from tests.helpers.support import python, relative

PROBLEMS = {
    "heat": lambda: HeatCase(HeatSettings(nx=8, ny=4, nt=8)).problem,
    "heat, theta 1/2": lambda: HeatCase(HeatSettings(nx=8, ny=4, nt=8, theta=0.5, heat_boundary="neumann")).problem,
    "burgers": lambda: BurgersCase(BurgersSettings(nx=12, nt=8)).problem,
    "burgers, theta 1/2": lambda: BurgersCase(BurgersSettings(nx=12, nt=8, theta=0.5, nu=0.1)).problem,
}


def splitting_of(name="heat", windows=3, ends=None, **settings):
    return TimeSplitting(PROBLEMS[name](), TimeSplittingSettings(windows=windows, **settings), ends=ends)


def solve(splitting, **settings):
    with po.core.freed(splitting):
        return ADMM(splitting, **CONTROL_DEFAULTS | settings).solve()


@pytest.fixture(scope="module")
def optima():
    """By Newton's method on the whole problem."""
    found = {
        name: po.SQPSolver(make(), type="newton", opt_tol=1e-11, feas_tol=1e-11).solve()
        for name, make in PROBLEMS.items()
    }
    assert all(result.converged for result in found.values())
    return found


@pytest.mark.parametrize("name", PROBLEMS)
def test_no_block_raises_the_augmented_lagrangian(name):
    splitting = splitting_of(name, ends=[1, 4, 6, 8])
    generator = torch.Generator().manual_seed(0)
    splitting.pair.multiplier = 1e-3 * torch.randn(splitting.pair.multiplier.shape, generator=generator).double()
    values = [splitting.lagrangian()]
    for iteration in range(1, 5):
        for block in splitting.sweep(iteration):
            splitting.update(block)
            values.append(splitting.lagrangian())
    falls = -np.diff(values)
    assert falls.min() > -1e-12 * abs(values[0]) and falls[:2].min() > 1e-3 * abs(values[0])


@pytest.mark.parametrize(
    "name, windows, ends",
    [
        *(("heat", count, None) for count in (1, 2, 5, 8)),
        ("heat, theta 1/2", None, [1, 2, 7, 8]),
        *(("burgers", count, None) for count in (1, 3)),
        ("burgers, theta 1/2", None, [5, 6, 8]),
    ],
)
def test_the_fixed_point_is_the_optimum_of_the_whole_problem(optima, name, windows, ends):
    splitting, expected = splitting_of(name, windows, ends), optima[name]
    result = solve(splitting, rtol=1e-9)
    assert result.converged, result.message
    if windows == 1:
        assert result.iterations <= 4 and set(result.history["feasibility"]) == {0.0}
    assert result.objective == pytest.approx(expected.objective, rel=1e-8)
    for mine, other in ((result.design, expected.design), (result.state, expected.state)):
        assert relative(mine.getArray(), other.getArray()) < 1e-7
    lin, metric = (
        splitting.problem.at(splitting.problem.join(result.state, result.design)),
        po.RieszMetric(splitting.problem),
    )
    assert metric.dual_norm(lin.lagrangian_gradient(result.multiplier)) < 1e-8
    assert metric.residual_norm(lin.residual) < 1e-6
    assert relative(result.multiplier.getArray(), expected.multiplier.getArray()) < 1e-6


@pytest.mark.parametrize(
    "settings", [{"anderson": 0, "relax": 1.6}, {"anderson": 0, "penalty": "spectral"}, {"relax": 1.3}]
)
def test_other_ways_end_at_the_same_optimum(optima, settings):
    result = solve(splitting_of(windows=4), **settings)
    assert result.converged, result.message
    assert relative(result.design.getArray(), optima["heat"].design.getArray()) < 1e-5


def test_the_multiplier_of_continuity_is_the_adjoint_where_a_window_starts(optima):
    """M lambda = B' mu with the first step of the window; B = -M for implicit Euler."""
    splitting = splitting_of("burgers", ends=[3, 8])
    solve(splitting, rtol=1e-10)
    problem = splitting.problem
    mu = problem.layout.rows(optima["burgers"].multiplier)[3]
    assert relative(splitting.pair.multiplier[0], -mu) < 1e-6


def test_a_block_of_an_indefinite_matrix_descends_by_a_convex_one():
    """With the sign of the multiplier that makes the Hessian of the Lagrangian indefinite."""

    class Square(po.TimeDependentConstraint):
        state_dim = control_dim = 1

        def residual(self, u_old, u_new, z, steps):
            return u_new - u_old - z**2 - 0.1 * z

        def initial_state(self, p):
            return torch.zeros(1, dtype=torch.float64)

    objective = po.Tracking(torch.ones(1).double(), weight=1.0) + po.ControlCost(1e-3)
    problem = po.ControlProblem(Square(), objective, po.TimeGrid.uniform(4, 1.0))
    splitting = TimeSplitting(problem, TimeSplittingSettings(windows=2))
    before = splitting.lagrangian()
    splitting.update("odd")
    middle = splitting.lagrangian()
    splitting.update("even")
    assert splitting.lagrangian() < middle < before
    result = solve(splitting)
    assert result.converged and result.objective < 0.6


@pytest.mark.parametrize("settings", [{}, {"penalty": "spectral", "relax": 1.5}])
def test_restarts_bit_for_bit(settings):
    words = CONTROL_DEFAULTS | settings | {"rtol": 0.0}
    whole, first, second = (splitting_of("burgers") for _ in range(3))
    expected = ADMM(whole, **words | {"max_it": 7}).solve()
    before = ADMM(first, **words | {"max_it": 4})
    done = before.solve()
    after = ADMM(second, **words | {"max_it": 7})
    after.recall(before.memory())
    found = after.solve(history=done.history)
    assert np.array_equal(found.design.getArray(), expected.design.getArray())
    assert found.history.columns() == expected.history.columns()


def test_numbers_that_are_not_finite_name_iteration_block_and_window():
    splitting = splitting_of("burgers", ends=[3, 5, 8])
    splitting.pair.multiplier[1] = np.nan
    before = splitting.design().getArray().copy()
    result = ADMM(splitting).solve()
    assert result.reason == po.Reason.DIVERGED_LINEAR_SOLVE
    assert "iteration 1, block odd: window of steps 6 to 8: a gradient that is not finite" in result.message
    assert np.array_equal(result.design.getArray(), before)


@pytest.mark.parametrize(
    "words, match",
    [
        ({"windows": 9}, "admm_windows: got 9; legal: at most 8"),
        ({"ends": [4, 4, 8]}, "increasing"),
        ({"ends": [4, 7]}, "the last 8"),
    ],
)
def test_windows_that_do_not_fit_are_refused(words, match):
    with pytest.raises(InputError, match=match):
        splitting_of(**words)


def test_problems_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match="a control map"):
        TimeSplitting(BurgersCase(BurgersSettings(nx=8, nt=4, control="nodal")).problem)


def test_settings_of_pairs_are_refused_for_other_constraints():
    class Other(SplitConstraint):
        sweep = update = ascend = lagrangian = objective = residuals = design = memory = recall = None

    with pytest.raises(InputError, match="Other, which is no pair"):
        ADMM(Other(), anderson=3)


@pytest.mark.mpi
@pytest.mark.parametrize("ranks", [3, pytest.param(2, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_find_the_same_solution(tmp_path, ranks):
    """Windows and steps do not end at the same places on the ranks; only messages differ."""
    from problems import burgers

    words = ("-nx", 12, "-nt", 10, "-solver", "admm", "-admm_windows", 5, "-output")
    burgers.main([*map(str, words), str(tmp_path / "1.npz")])
    done = python("-m", "problems.burgers", *words, tmp_path / "n.npz", ranks=ranks)
    assert done.returncode == 0, done.stderr
    one, several = (dict(np.load(tmp_path / name)) for name in ("1.npz", "n.npz"))
    assert all(relative(several[name], one[name]) <= 1e-10 for name in ("objective", "control", "state", "multiplier"))
