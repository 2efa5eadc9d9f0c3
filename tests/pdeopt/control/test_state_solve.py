import pytest
import torch

from pdeopt.control import state_solve
from pdeopt.control.state_solve import march, solve_steps
from pdeopt.core.errors import SolveFailure
from problems.burgers import BurgersCase, BurgersSettings
from tests.helpers import examples
from tests.helpers.support import entries, random_design


def one_by_one(constraint, u0, z, steps):
    """The states by single steps, each with step halving."""
    u = [u0[None]]
    for i in range(len(steps)):
        u.append(constraint.advance(u[-1], z[i : i + 1], steps[i : i + 1]))
    return torch.cat(u[1:])


@pytest.mark.parametrize("name", examples.EXAMPLES)
def test_marching_and_newton_over_all_steps_find_the_same_state(name):
    problem = examples.EXAMPLES[name]()
    design = random_design(problem, 2, 0.5)
    z, p = problem.layout.design_fields(design)
    where = problem.constraint, problem.constraint.initial_state(p), problem.controls(z)
    steps = problem.grid.steps.with_parameters(p)
    expected = one_by_one(*where, steps)
    for found in (entries(problem.solve_state(design)).reshape(expected.shape), march(*where, steps)):
        assert torch.allclose(found, expected, rtol=1e-11, atol=1e-12)


def test_a_state_far_from_the_guess_needs_few_single_steps(monkeypatch):
    problem = BurgersCase(BurgersSettings(nx=32, nt=64)).problem
    constraint, grid = problem.constraint, problem.grid
    u0, draw = constraint.initial, torch.Generator().manual_seed(0)
    z = 60 * torch.randn(1, problem.m, generator=draw, dtype=torch.float64).expand(grid.n_local, -1)
    expected, singles = one_by_one(constraint, u0, z, grid.steps), []
    assert whole_fails(problem, u0, z)
    advance = constraint.advance
    monkeypatch.setattr(constraint, "advance", lambda *words: singles.append(1) or advance(*words))
    found = solve_steps(constraint, problem.propagator, u0, u0.expand(len(z), -1), z, grid.steps)
    assert torch.allclose(found, expected, rtol=1e-11, atol=1e-12)
    assert len(singles) <= grid.num_steps // 4


def whole_fails(problem, u0, z):
    """Newton's method on all steps does not contract."""
    equation = state_solve._alone(problem.constraint, u0, z, problem.grid.steps)
    return equation.newton(u0.expand(len(z), -1)) is None


def test_where_newton_fails_on_all_steps_the_later_ones_wait_for_the_earlier_ones(monkeypatch):
    """At low viscosity: no step is solved for alone, with fewer linearizations than there are steps."""
    problem = BurgersCase(BurgersSettings(nx=32, nt=64, nu=1e-4)).problem
    constraint, u0 = problem.constraint, problem.constraint.initial
    z, steps, counted = torch.zeros(64, problem.m, dtype=torch.float64), problem.grid.steps, []
    expected = one_by_one(constraint, u0, z, steps)
    assert whole_fails(problem, u0, z)
    linearize = constraint.linearize
    monkeypatch.setattr(constraint, "linearize", lambda *words: counted.append(1) or linearize(*words))
    found = state_solve._alone(constraint, u0, z, steps).in_turn(u0.expand(64, -1))
    assert torch.allclose(found, expected, rtol=1e-11, atol=1e-12) and len(counted) < 64


def test_a_step_without_a_solution_is_named():
    problem = BurgersCase(BurgersSettings(nx=8, nt=16)).problem
    z = torch.zeros(16, problem.m, dtype=torch.float64)
    z[11] = torch.nan
    with pytest.raises(SolveFailure, match="step 12"):
        march(problem.constraint, problem.constraint.initial, z, problem.grid.steps)
