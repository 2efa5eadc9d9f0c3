import pytest
import torch

from pdeopt.control.verify import randomize
from pdeopt.optimize.fullspace.sqp import SQPSolver
from pdeopt.optimize.parts.trustregion import TrustRegion
from tests.helpers import examples
from tests.helpers.oracle import Oracle
from tests.helpers.support import entries, random_design, relative


@pytest.mark.parametrize("name", examples.EXAMPLES)
def test_the_solution_is_a_kkt_point_of_the_loop_over_steps(name):
    problem = examples.EXAMPLES[name]()
    result = SQPSolver(problem, type="composite", opt_tol=1e-10, feas_tol=1e-10).solve()
    assert result.converged, result.message
    k = torch.cat([entries(part) for part in (result.state, result.design, result.multiplier)])
    assert torch.func.grad(Oracle(problem).L)(k).abs().max() <= 1e-9


@pytest.mark.parametrize("name", ["burgers", "burgers nodal", pytest.param("dense", marks=pytest.mark.slow), "heat"])
def test_every_start_leads_to_newtons_optimum(name):
    problem = examples.EXAMPLES[name]()
    expected = SQPSolver(problem, type="newton", opt_tol=1e-11).solve()
    solver = SQPSolver(problem, type="composite", opt_tol=1e-10)
    for seed in range(3):
        found = solver.solve(solver.start(random_design(problem, seed, 0.5)))
        assert found.converged, found.message
        assert relative(entries(found.design), entries(expected.design)) <= 1e-7


def test_the_state_need_not_fit_the_control_at_the_start():
    problem = examples.burgers()
    expected = SQPSolver(problem, type="composite").solve()
    found = SQPSolver(problem, type="composite").solve(randomize(problem.create_primal(), 3))
    assert found.converged
    assert relative(entries(found.design), entries(expected.design)) <= 1e-5


def test_a_small_trust_region_only_takes_longer():
    problem = examples.burgers()
    expected, found = (
        SQPSolver(problem, type="composite").solve(),
        SQPSolver(problem, type="composite", radius=1e-3).solve(),
    )
    assert found.converged and found.iterations > expected.iterations
    assert relative(entries(found.design), entries(expected.design)) <= 1e-5


def test_a_hard_start_with_steep_fronts_converges():
    """Little viscosity, cheap control, a large random control to start from."""
    problem = examples.burgers(nx=20, nt=20, nu=1e-3, alpha=1e-4)
    solver = SQPSolver(problem, type="composite")
    easy, hard = solver.solve(), solver.solve(solver.start(random_design(problem, 0, 10.0)))
    assert easy.converged and hard.converged, hard.message
    assert hard.objective == pytest.approx(easy.objective, rel=1e-6)


def test_gauss_newton_finds_the_same_optimum():
    problem = examples.burgers()
    found = SQPSolver(problem, type="composite", gauss_newton=True).solve()
    assert found.converged
    assert relative(entries(found.design), entries(SQPSolver(problem, type="composite").solve().design)) <= 1e-5


def test_a_quadratic_problem_needs_no_second_order_iterations():
    result = SQPSolver(
        examples.heat(n=6, num_steps=8), type="composite", cg_rtol=1e-8, cg_max_it=200, projection_rtol=1e-10
    ).solve()
    assert result.converged and result.iterations <= 3


def test_radius_rules():
    trust = TrustRegion(1.0)
    assert trust.accepts(0.5) and not trust.accepts(-1.0) and not trust.accepts(float("nan"))
    assert trust.after(0.95, step=1.0, longest_part=1.0) == 7.0
    assert trust.after(0.85, step=1.0, longest_part=1.0) == 2.0
    assert trust.after(0.5, step=1.0, longest_part=1.0) == 1.0
    assert trust.after(-1.0, step=1.0, longest_part=0.6) == trust.after(float("nan"), 1.0, 0.6) == 0.3
