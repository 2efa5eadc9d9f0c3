import pytest
import torch

from pdeopt.control.constraint import TimeDependentConstraint
from pdeopt.control.objective import ControlCost, Objective
from pdeopt.control.problem import ControlProblem
from pdeopt.core.errors import InputError
from pdeopt.steps.timegrid import TimeGrid
from tests.helpers.support import entries, random_design, relative


def test_the_state_solves_the_constraint(problem):
    design = random_design(problem, 1, 0.5)
    state = problem.solve_state(design)
    assert problem.at(problem.join(state, design)).residual.norm() <= 1e-12


def test_a_guess_does_not_change_the_state(problem):
    design = random_design(problem, 1, 0.5)
    state = problem.solve_state(design)
    again = problem.solve_state(design, guess=state)
    assert relative(entries(again), entries(state)) <= 1e-12


def test_the_adjoint_makes_the_lagrangian_stationary_in_the_state(problem, x):
    lin = problem.at(x)
    lam = problem.solve_adjoint(lin)
    g = lin.vjp(lam, problem.create_primal())
    g.axpy(1.0, lin.gradient)
    assert entries(g)[: problem.layout.state_size].abs().max() <= 1e-12 * (1 + lam.norm())


class Wrong(TimeDependentConstraint):
    """A constraint and objective whose shapes can be spoilt."""

    state_dim, control_dim, pattern = 2, 1, None

    def __init__(self, initial=2, columns=2, value=0.0):
        self.initial, self.columns, self.value = initial, columns, value

    def initial_state(self, p):
        return torch.full((self.initial,), self.value, dtype=torch.float64)

    def residual(self, u_old, u_new, z, steps):
        return torch.zeros(len(steps), self.columns, dtype=torch.float64)


class Scalar(Objective):
    def value(self, u, z, steps):
        return (u**2).sum()


@pytest.mark.parametrize(
    "constraint, objective, what",
    [
        (Wrong(initial=3), ControlCost(1.0), "initial_state"),
        (Wrong(value=float("nan")), ControlCost(1.0), "initial_state"),
        (Wrong(columns=5), ControlCost(1.0), "residual"),
        (Wrong(), Scalar(), "objective"),
    ],
)
def test_functions_of_wrong_shape_are_named(constraint, objective, what):
    with pytest.raises(InputError, match=what):
        ControlProblem(constraint, objective, TimeGrid.uniform(3, 1.0))
