from functools import cache

import pytest
import torch

from pdeopt.control.reduced import ReducedObjective
from pdeopt.core.errors import InputError
from pdeopt.core.monitor import Reason
from pdeopt.functions.petsc import PetscFunction
from pdeopt.optimize.fullspace.sqp import SQPSolver
from pdeopt.optimize.tao import TaoSolver
from tests.helpers import examples, failing
from tests.helpers.support import entries, python, random_design, relative


def solve(problem, lower=None, upper=None, start=None, **defaults):
    return TaoSolver(ReducedObjective(problem), lower, upper, **defaults).solve(start)


@cache
def optimum(name):
    """By the full-space method."""
    return SQPSolver(examples.EXAMPLES[name](), opt_tol=1e-10).solve()


@pytest.mark.parametrize("name", ["burgers", "burgers nodal", "dense", "layer"])
@pytest.mark.parametrize("method", ["lmvm", "bqnls", "bncg", "nls", "ntr"])
def test_tao_and_sqp_agree(options, method, name):
    expected = optimum(name)
    options(tao_type=method)
    found = solve(examples.EXAMPLES[name](), opt_tol=1e-8)
    assert found.reason == Reason.CONVERGED_OPTIMALITY, found.message
    assert found.objective == pytest.approx(expected.objective, rel=1e-9)
    for name in ("design", "state", "multiplier"):
        assert relative(entries(getattr(found, name)), entries(getattr(expected, name))) <= 1e-5


def test_a_quadratic_problem_takes_newton_one_step(options):
    options(tao_type="nls", tao_nls_ksp_rtol=1e-12, tao_nls_ksp_atol=0, tao_nls_ksp_max_it=500)
    result = solve(examples.heat())
    assert result.converged and result.iterations <= 2


@pytest.mark.parametrize("method", ["blmvm", "bqnls", "bnls"])
def test_bounds_are_kept_and_multipliers_have_the_right_sign(options, method):
    """Of the reduced gradient g: 0 inside, >= 0 at the lower bound, <= 0 at the upper one."""
    options(tao_type=method)
    problem = examples.burgers(nx=8, nt=8)
    free = entries(SQPSolver(problem).solve().design)
    low, high = 0.4 * float(free.min()), 0.4 * float(free.max())
    result = solve(problem, low, high, opt_tol=1e-10 if method != "blmvm" else 1e-8)  # which ends short of rounding
    assert result.converged, result.message
    z, g = entries(result.design), result.design.duplicate()
    PetscFunction(ReducedObjective(problem)).value_and_gradient(result.design, g)
    g = entries(g)
    assert z.min() >= low - 1e-15 and z.max() <= high + 1e-15
    at_low, at_high = z <= low + 1e-9, z >= high - 1e-9
    assert at_low.any() and at_high.any() and not (at_low | at_high).all()
    tolerance = 1e-6 * float(g.abs().max())
    assert g[at_low].min() >= -tolerance and g[at_high].max() <= tolerance
    assert g[~(at_low | at_high)].abs().max() <= tolerance


def test_bounds_may_be_vectors_and_one_sided(options):
    problem = examples.burgers()
    lower = problem.create_design()
    for result in (solve(problem, lower, None), solve(problem, 0.0)):
        assert result.converged and entries(result.design).min() >= -1e-15


def test_wide_bounds_change_nothing():
    problem = examples.burgers()
    expected = SQPSolver(problem, opt_tol=1e-10).solve()
    assert relative(entries(solve(problem, -100.0, 100.0).design), entries(expected.design)) <= 1e-5


def test_crossed_bounds_are_refused():
    with pytest.raises(InputError, match="lower <= upper"):
        solve(examples.burgers(), 1.0, 0.0)


def test_bounds_need_a_solver_that_knows_them(options):
    options(tao_type="lmvm")
    with pytest.raises(InputError, match="blmvm"):
        solve(examples.burgers(), 0.0, 1.0)


def test_a_wrong_option_of_an_optimizer_inside_tao_is_named(options):
    options(tao_type="python", tao_python_type="pdeopt.optimize.RMTR", rmtr_kappa="nan")
    with pytest.raises(InputError, match=r"^-rmtr_kappa: got '?nan"):
        solve(examples.burgers())


def test_no_iterations_left_is_a_value_with_a_remedy(options):
    options(tao_max_it=2)
    result = solve(examples.burgers())
    assert result.reason == Reason.DIVERGED_MAX_IT and "-tao_max_it" in result.message


def test_the_history_is_that_of_tao(options):
    seen = []
    problem = examples.burgers()
    solver = TaoSolver(ReducedObjective(problem))
    result = solver.solve(monitors=[seen.append])
    assert seen == result.history.records
    assert result.history["iteration"] == list(range(result.iterations + 1))
    assert all(a >= b for a, b in zip(result.history["objective"], result.history["objective"][1:]))


@pytest.mark.parametrize("method", ["lmvm", "ntr", "nls"])
def test_designs_without_a_state_are_backed_away_from(options, method):
    options(tao_type=method)
    result = solve(failing.blow_up(target=3.0, alpha=1e-4))
    assert torch.isfinite(entries(result.design)).all() and torch.isfinite(torch.tensor(result.objective))


def test_a_start_without_a_state_is_a_value():
    problem = failing.blow_up()
    bad = problem.create_design()
    bad.set(1e6)
    result = solve(problem, start=bad)
    assert result.reason < 0 and result.message


def test_a_residual_that_becomes_nan_is_a_value():
    problem = failing.blow_up()
    problem.constraint.pattern  # noqa: B018
    problem.constraint.left = 40
    result = solve(problem)
    assert result.reason < 0 and entries(result.design).isfinite().all()


def test_every_start_leads_to_the_same_optimum():
    problem = examples.burgers()
    expected = solve(problem)
    for seed in range(3):
        found = solve(problem, start=random_design(problem, seed))
        assert relative(entries(found.design), entries(expected.design)) <= 1e-5


@pytest.mark.parametrize("method", ["nls", pytest.param("ntr", marks=pytest.mark.slow)])
def test_a_solve_with_failing_states_on_its_way_ends_in_peace(method):
    """A traceback that kept the solver alive to the end of the interpreter ended in a segmentation fault."""
    words = ("-nx", 24, "-nt", 48, "-solver", "tao", "-tao_type", method)
    done = python("-m", "problems.klein_gordon", *words)
    assert done.returncode == 0, done.stderr
    assert "converged" in done.stdout
