import pytest
import torch

from pdeopt.control.objective import Objective
from pdeopt.control.problem import ControlProblem
from pdeopt.control.reduced import ReducedObjective
from pdeopt.control.verify import randomize
from pdeopt.core.monitor import Reason
from pdeopt.optimize.fullspace.curvature import is_linear_quadratic
from pdeopt.optimize.fullspace.sqp import SQPSolver
from pdeopt.optimize.tao import TaoSolver
from problems.burgers import BurgersCase, BurgersSettings
from tests.helpers import examples
from tests.helpers.oracle import Oracle
from tests.helpers.support import entries, random_design, relative


def test_a_quadratic_problem_takes_exactly_one_step():
    problem = examples.heat(n=6, num_steps=8)
    for start in (None, randomize(problem.create_primal(), 0)):
        result = SQPSolver(problem, type="newton", kkt_rtol=1e-12).solve(start)
        assert result.converged and result.iterations == 1


@pytest.mark.parametrize("name", ["burgers", "dense", "layer"])
def test_convergence_is_quadratic(name):
    result = SQPSolver(examples.EXAMPLES[name](), type="newton", kkt_rtol=1e-12, opt_tol=1e-12).solve()
    errors = [a + b for a, b in zip(result.history["optimality"], result.history["feasibility"])]
    assert result.converged
    last = [e for e in errors if e > 1e-13]
    assert last[-1] <= 1e4 * last[-2] ** 2 or last[-1] < 1e-11


@pytest.mark.parametrize("name", examples.EXAMPLES)
def test_the_solution_is_a_kkt_point_of_the_loop_over_steps(name):
    problem = examples.EXAMPLES[name]()
    result = SQPSolver(problem, type="newton", opt_tol=1e-11, feas_tol=1e-11).solve()
    assert result.reason == Reason.CONVERGED_OPTIMALITY
    oracle = Oracle(problem)
    k = torch.cat([entries(part) for part in (result.state, result.design, result.multiplier)])
    assert torch.func.grad(oracle.L)(k).abs().max() <= 1e-10
    assert result.objective == pytest.approx(float(oracle.J(k)), rel=1e-13)


@pytest.mark.parametrize("name", ["burgers", "dense nodal", "heat"])
def test_every_start_leads_to_the_same_optimum(name):
    problem = examples.EXAMPLES[name]()
    solver = SQPSolver(problem, type="newton", opt_tol=1e-11)
    expected = solver.solve()
    for seed in range(3):
        found = solver.solve(solver.start(random_design(problem, seed, 0.5)))
        assert found.converged, found.message
        assert relative(entries(found.design), entries(expected.design)) <= 1e-8


def test_the_start_is_not_moved():
    problem = examples.burgers()
    x, lam = randomize(problem.create_primal(), 0), randomize(problem.create_multiplier(), 1)
    before = x.copy(), lam.copy()
    SQPSolver(problem, type="newton").solve(x, lam)
    assert x.equal(before[0]) and lam.equal(before[1])


@pytest.mark.parametrize("nu", [1e-3, pytest.param(1e-4, marks=pytest.mark.slow)])
def test_low_viscosity_converges_from_both_starts(nu):
    """To minima; full steps alone diverge, and a search without second-order corrections takes 100 short steps."""
    problem = BurgersCase(BurgersSettings(nx=32, nt=32, nu=nu)).problem
    results = [SQPSolver(problem, type="newton", start=start).solve() for start in ("state", "initial")]
    assert all(result.reason == Reason.CONVERGED_OPTIMALITY for result in results)
    assert all("no minimum" not in result.message for result in results)
    assert results[0].iterations <= 25
    expected = TaoSolver(ReducedObjective(problem)).solve()
    assert results[0].objective == pytest.approx(expected.objective, rel=1e-8)


class Ceiling(Objective):
    """gamma / 2 |max(u - limit, 0)|^2."""

    def __init__(self, gamma, limit):
        self.gamma, self.limit = gamma, limit

    def value(self, u, z, steps):
        return 0.5 * self.gamma * steps.weight * torch.relu(u - self.limit).square().sum(-1)


@pytest.mark.parametrize(("name", "gamma"), [("heat", 1e2), ("heat", 1e6), ("burgers", 1e4)])
def test_kinks_of_a_penalty_on_states_do_not_shorten_steps(name, gamma):
    plain = examples.EXAMPLES[name]()
    limit = 0.5 * float(entries(SQPSolver(plain, type="newton").solve().state).max())
    problem = ControlProblem(plain.constraint, plain.objective + Ceiling(gamma, limit), plain.grid)
    result = SQPSolver(problem, type="newton").solve()
    assert result.converged and result.iterations <= 12, result.message
    assert (
        0.0 < float(entries(result.state).max()) - limit < 100.0 / gamma
    )  # binds; the violation is of order 1 / gamma
    k = torch.cat([entries(part) for part in (result.state, result.design, result.multiplier)])
    assert torch.func.grad(Oracle(problem).L)(k).abs().max() <= 1e-7


def test_steps_below_rounding_of_the_merit_function_go_on_to_the_last_digits():
    """And a tolerance that no arithmetic reaches is not said to be met."""
    result = SQPSolver(examples.burgers(), type="newton", opt_tol=1e-30, feas_tol=1e-30, max_it=8).solve()
    errors = [a + b for a, b in zip(result.history["optimality"], result.history["feasibility"])]
    assert not result.converged and max(errors[5:]) <= 1e-14


def test_a_linear_quadratic_problem_is_one_system():
    """Also iteratively, to the tolerance asked for; with curvature in J or in F the approach is that of Newton."""
    problem = examples.heat()
    result = SQPSolver(problem, type="newton", precond="wathen").solve()
    assert result.converged and result.iterations == 1
    assert is_linear_quadratic(problem.at(SQPSolver(problem).start()))
    bent = examples.burgers(nt=7)
    assert not is_linear_quadratic(bent.at(SQPSolver(bent).start()))
