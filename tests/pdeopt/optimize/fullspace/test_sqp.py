"""Both full-space methods: tolerances, options, and what they return where there is no solution."""

import math

import pytest

from pdeopt.control.reduced import ReducedObjective
from pdeopt.control.verify import randomize
from pdeopt.core.errors import InputError
from pdeopt.core.monitor import History, Reason
from pdeopt.optimize.fullspace.sqp import SQPSolver
from tests.helpers import examples, failing
from tests.helpers.support import entries, random_design, relative

BOTH = pytest.mark.parametrize("method", ["composite", "newton"])


@BOTH
@pytest.mark.parametrize("tolerance", [1e-4, 1e-8])
def test_convergence_is_within_the_tolerances(method, tolerance):
    result = SQPSolver(examples.burgers(), type=method, opt_tol=tolerance, feas_tol=tolerance).solve()
    last = result.history[-1]
    assert result.converged and last.optimality <= tolerance and last.feasibility <= tolerance


@BOTH
def test_the_result_is_a_point_of_the_problem(method):
    problem = examples.dense()
    result = SQPSolver(problem, type=method, opt_tol=1e-10, feas_tol=1e-12).solve()
    assert result.objective == pytest.approx(ReducedObjective(problem).value(entries(result.design)), rel=1e-10)
    assert relative(entries(result.state), entries(problem.solve_state(result.design))) <= 1e-10


@BOTH
def test_iterations_are_numbered_and_monitored_once_each(method):
    seen = []
    result = SQPSolver(examples.burgers(), type=method).solve(monitors=[seen.append])
    assert seen == result.history.records
    assert result.history["iteration"] == list(range(result.iterations + 1))


@BOTH
def test_loose_krylov_tolerances_still_converge(options, method):
    options(
        sqp_kkt_ksp_type="gmres",
        sqp_kkt_ksp_gmres_restart=300,
        sqp_kkt_ksp_max_it=600,
        sqp_kkt_pc_type="none",
        sqp_kkt_rtol=1e-2,
        sqp_multiplier_rtol=1e-1,
        sqp_normal_rtol=1e-1,
        sqp_projection_rtol=1e-2,
        sqp_tangential_rtol=1e-1,
    )
    problem = examples.burgers()
    result = SQPSolver(problem, type=method, opt_tol=1e-6, feas_tol=1e-6).solve()
    assert result.converged, result.message
    assert min(result.history["krylov"][1:]) > 2
    expected = SQPSolver(problem, type=method, prefix="other_").solve()
    assert relative(entries(result.design), entries(expected.design)) <= 1e-4


@BOTH
def test_krylov_counts_are_those_of_ksp(options, monkeypatch, method):
    from pdeopt.optimize.fullspace.kktsolver import KKTSolver

    options(sqp_kkt_mat_type="shell", sqp_kkt_ksp_gmres_restart=300, sqp_kkt_ksp_max_it=600)
    counted, create = [], KKTSolver._create_ksp

    def watched(self):
        ksp = create(self)
        ksp.setMonitor(lambda ksp, iteration, size: counted.append(iteration > 0))
        return ksp

    monkeypatch.setattr(KKTSolver, "_create_ksp", watched)
    result = SQPSolver(examples.burgers(), type=method, opt_tol=1e-6).solve()
    assert result.converged and sum(result.history["krylov"]) == sum(counted)


@BOTH
def test_no_iterations_left_is_a_value_with_a_remedy(method):
    problem = examples.burgers()
    result = SQPSolver(problem, type=method, max_it=1).solve()
    assert result.reason == Reason.DIVERGED_MAX_IT and not result.converged and result.iterations == 1
    assert "-sqp_max_it" in result.message
    expected = problem.at(problem.join(result.state, result.design)).value
    assert result.objective == pytest.approx(expected, rel=1e-14)


@BOTH
def test_no_iterations_at_all_returns_the_start(method):
    problem = examples.burgers()
    x = SQPSolver(problem).start(random_design(problem, 0))
    result = SQPSolver(problem, type=method, max_it=0).solve(x)
    assert result.iterations == 0 and problem.join(result.state, result.design).equal(x)


def assert_good_point(problem, result):
    """The last good iterate: finite, and its objective is the one reported."""
    assert result.reason < 0 and result.message
    for part in (result.state, result.design, result.multiplier):
        assert entries(part).isfinite().all()
    assert math.isfinite(result.objective)


@BOTH
@pytest.mark.parametrize("evaluations", [2, 3, 5, 8])
def test_a_residual_that_becomes_nan_ends_with_a_reason(method, evaluations):
    problem = failing.blow_up()
    problem.constraint.pattern  # noqa: B018  (found before the end of the evaluations)
    problem.constraint.left = evaluations
    result = SQPSolver(problem, type=method, start="initial").solve()
    assert_good_point(problem, result)


@BOTH
def test_a_wall_of_nan_before_the_optimum_ends_with_a_reason(method):
    """The residual is NaN where the target would draw the state to."""
    problem = failing.blow_up(target=2.0, limit=0.9)
    result = SQPSolver(problem, type=method).solve()
    assert_good_point(problem, result)
    assert entries(result.state).abs().max() <= 0.9


@BOTH
def test_a_wall_of_nan_behind_the_optimum_does_not_matter(method):
    problem = failing.blow_up(target=0.6, alpha=1.0, limit=1.5)
    assert SQPSolver(problem, type=method).solve().converged


@BOTH
def test_an_objective_that_is_nan_from_the_start_ends_with_a_reason(method):
    problem = failing.blow_up(evaluations=0)
    problem.constraint.left = 0
    result = SQPSolver(problem, type=method, start="initial").solve()
    assert result.reason < 0


@BOTH
def test_singular_steps_are_a_value(method):
    problem = failing.singular()
    result = SQPSolver(problem, type=method).solve()
    assert isinstance(result.reason, Reason) and result.reason != 0 and result.message


@BOTH
def test_a_start_without_a_state_begins_at_the_initial_state(method):
    problem = failing.blow_up()
    design = problem.create_design()
    design.set(50.0)
    solver = SQPSolver(problem, type=method)
    x = solver.start(design)
    assert problem.split(x)[0].equal(problem.constant_state(design))
    assert isinstance(solver.solve(x).reason, Reason)


@BOTH
@pytest.mark.parametrize("k", [1, 2, 3])
def test_a_run_from_memory_goes_on_with_the_same_iterates(method, k):
    problem = examples.burgers()
    whole = SQPSolver(problem, type=method).solve()
    saved = {}

    def save(method, history):
        saved.update(x=method.x.copy(), lam=method.lam.copy(), memory=method.memory(), records=list(history.records))

    SQPSolver(problem, type=method, max_it=k).solve(observers=[save])
    rest = SQPSolver(problem, type=method).solve(
        saved["x"], saved["lam"], memory=saved["memory"], history=History(saved["records"])
    )
    assert rest.iterations == whole.iterations
    for name in ("objective", "radius"):
        assert rest.history[name] == pytest.approx(whole.history[name], rel=1e-12)
    assert relative(entries(rest.design), entries(whole.design)) <= 1e-12


def test_unknown_settings_are_refused():
    with pytest.raises(InputError, match="opt_tol"):
        SQPSolver(examples.heat(), tolerance=1.0)
    with pytest.raises(InputError, match=r"composite \| newton"):
        SQPSolver(examples.heat(), type="lbfgs")


def test_options_win_over_defaults(options):
    options(sqp_type="newton", sqp_max_it=1)
    solver = SQPSolver(examples.burgers(), type="composite", max_it=9)
    assert solver.settings.type == "newton" and solver.solve().iterations == 1


def test_monitor_and_view_print(options, capfd):
    options(sqp_monitor="", sqp_view="")
    SQPSolver(examples.heat()).solve()
    out = capfd.readouterr().out
    assert "objective" in out and "opt_tol" in out and "converged" in out


@pytest.mark.slow
def test_many_solves_do_not_grow_the_memory():
    """Mat, KSP and factors are freed: 50 solves after the first ones take no room."""
    import gc
    from pathlib import Path

    def resident():
        gc.collect()
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20

    problem = examples.burgers(nx=32, nt=32)
    sizes = []
    for k in range(60):
        for method in ("composite", "newton"):
            assert SQPSolver(problem, type=method).solve().converged
        if k >= 10:
            sizes.append(resident())
    assert sizes[-1] - sizes[0] <= 20.0


def test_a_random_start_of_everything_is_no_problem():
    problem = examples.heat()
    result = SQPSolver(problem).solve(randomize(problem.create_primal(), 1), randomize(problem.create_multiplier(), 2))
    assert result.converged
