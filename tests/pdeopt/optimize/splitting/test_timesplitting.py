"""ADMM on windows of time: exact blocks, the optimum of the whole problem, restarts, ranks."""

import numpy as np
import pytest
import torch

import pdeopt as po
from pdeopt.core.errors import InputError
from pdeopt.optimize.splitting import (
    ADMM,
    CONTROL_DEFAULTS,
    SplitConstraint,
    TimeSplitting,
    TimeSplittingSettings,
    windowkkt,
)
from pdeopt.precond.direct import KKTDirectPC
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


def test_a_chosen_penalty_and_over_relaxation_end_at_the_same_optimum(optima):
    result = solve(splitting_of(windows=4), anderson=0, relax=1.6, penalty="spectral")
    assert any(note.startswith("penalty x") for note in result.history["note"])
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


@pytest.mark.parametrize("settings", [{}, pytest.param({"penalty": "spectral", "relax": 1.5}, marks=pytest.mark.slow)])
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


def own_direct(pc, layout):
    """What stands for MUMPS where PETSc has none."""
    pc.setType("python")
    pc.setPythonContext(KKTDirectPC(layout))


@pytest.mark.parametrize("has_mumps", [True, False])
def test_factors_are_of_the_matrix_with_penalties_at_both_ends(monkeypatch, has_mumps):
    """K + 2 beta M at start and end, by MUMPS and by PETSc's own LU; equal matrices share factors."""
    if not has_mumps:
        monkeypatch.setattr(windowkkt, "use_direct", own_direct)
    splitting = splitting_of("burgers", windows=4)
    window, mass = splitting.windows.windows[1], splitting.problem.state_mass.as_csr().toarray()
    matrices = []
    for beta in (0.0, 0.25):
        window._operator.set_point(window.lin, window.problem.create_multiplier())
        matrices.append(window._operator.with_penalty(beta)[:, :])
    n, layout = splitting.problem.n, window._operator.unknowns
    penalty = matrices[1] - matrices[0]
    for places in (layout.start, layout.state(np.array([1]), np.arange(n)).ravel()):
        assert np.allclose(penalty[np.ix_(places, places)], 0.5 * mass, atol=1e-14)
    assert np.count_nonzero(penalty) == 2 * np.count_nonzero(mass)
    pool, right = window.pool, torch.linspace(-1, 1, len(penalty)).double()
    (key, factors, is_new), again = pool.take(window._operator, 0.25), pool.take(window._operator, 0.25)
    assert is_new and again == (key, factors, False)
    assert np.allclose(matrices[1] @ factors.solve(right).numpy(), right, atol=1e-10)
    pool.give_back(key)
    pool.give_back(key)
    assert not pool.found


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
@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_find_the_same_solution(tmp_path, ranks):
    """Windows and steps do not end at the same places on the ranks; only messages differ."""
    from problems import burgers

    words = ("-nx", 12, "-nt", 10, "-solver", "admm", "-admm_windows", 5, "-output")
    burgers.main([*map(str, words), str(tmp_path / "1.npz")])
    done = python("-m", "problems.burgers", *words, tmp_path / "n.npz", ranks=ranks)
    assert done.returncode == 0, done.stderr
    one, several = (dict(np.load(tmp_path / name)) for name in ("1.npz", "n.npz"))
    assert all(relative(several[name], one[name]) <= 1e-10 for name in ("objective", "control", "state", "multiplier"))
