"""Newton's method along states, in a trust region."""

from itertools import pairwise

import pytest
import torch

import pdeopt as po
from pdeopt.optimize.fullspace.feasible import FeasibleNewton
from problems.burgers import BurgersCase, BurgersSettings
from tests.helpers import examples
from tests.helpers.support import entries, random_design, relative


@pytest.mark.parametrize("name", ["burgers", "heat"])
def test_it_finds_newtons_optimum_with_all_points_states_and_j_falling(name):
    problem = examples.EXAMPLES[name]()
    result = po.SQPSolver(problem, type="feasible", opt_tol=1e-10).solve()
    expected = po.SQPSolver(problem, type="newton", opt_tol=1e-10).solve()
    assert result.converged and relative(entries(result.design), entries(expected.design)) <= 1e-7
    assert max(result.history["feasibility"]) <= 1e-10
    J = result.history["objective"]
    assert all(after <= before + 1e-14 * abs(before) for before, after in pairwise(J))


def test_a_quadratic_model_is_met_to_the_last_digit():
    """Heat is linear: J falls by what the model says, and no step is refused."""
    problem = examples.heat(n=6, num_steps=8)
    method = FeasibleNewton(problem, po.SQPSolver(problem).start(), problem.create_multiplier())
    for iteration in range(4):
        before = method.record(iteration).objective
        gradient, x = method.lin.lagrangian_gradient(method.lam), method.x.copy()
        method.step()
        s = method.x.copy()
        s.axpy(-1.0, x)
        model = before + gradient.dot(s) + 0.5 * s.dot(method.lin.hvp(method.lam, s, s.duplicate()))
        assert method.lin.value == pytest.approx(model, rel=1e-12)


@pytest.mark.parametrize("nu", [1e-3, 1e-4])
def test_low_viscosity_is_no_trouble_from_the_default_start(nu):
    problem = BurgersCase(BurgersSettings(nx=32, nt=32, nu=nu, alpha=0.05)).problem
    solver = po.SQPSolver(problem)
    result = solver.solve()
    assert result.converged and solver.kind == "feasible" and result.iterations <= 20


def test_a_design_without_a_state_is_backed_away_from():
    """u' = u^2 + z: a full step towards the target has no state, as it blows up in between."""
    problem = po.ControlProblem(
        Explosion(), po.Tracking(torch.full((1,), 1.5)) + po.ControlCost(1e-3), po.TimeGrid.uniform(10, 1.0)
    )
    start = po.SQPSolver(problem).start(random_design(problem, 0, 1.0))
    result = po.SQPSolver(problem, type="feasible").solve(start)
    assert result.converged, result.message
    assert any("no state" in record.note for record in result.history.records)


class Explosion(po.TimeDependentConstraint):
    state_dim = control_dim = 1

    def initial_state(self, p):
        return torch.full((1,), 0.5, dtype=torch.float64)

    def residual(self, u_old, u_new, z, steps):
        return u_new - u_old - steps.dt[:, None] * (u_new**2 + z)
