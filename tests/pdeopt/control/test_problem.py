import numpy as np
import pytest
import torch

from pdeopt.control.constraint import TimeDependentConstraint
from pdeopt.control.objective import ControlCost, Objective, TerminalLoss, Tracking
from pdeopt.control.problem import ControlProblem
from pdeopt.core.errors import InputError
from pdeopt.steps.timegrid import TimeGrid
from tests.helpers import examples
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


class Gives(Wrong):
    """A right residual, and an initial state and a residual of any kind."""

    control_dim = 2

    def __init__(self, initial=None, of_numpy=False):
        super().__init__()
        self.given, self.of_numpy = np.zeros(self.state_dim) if initial is None else initial, of_numpy

    def initial_state(self, p):
        return self.given

    def residual(self, u_old, u_new, z, steps):
        moved = u_new - u_old - steps.dt[:, None] * z.sum(1, keepdim=True)
        return torch.from_numpy(moved.numpy().copy()) if self.of_numpy else moved


GRID = TimeGrid.uniform(3, 1.0)
N_STATE = Wrong.state_dim


@pytest.mark.parametrize(
    "initial",
    [
        np.ones(N_STATE, dtype=">f4"),
        [1] * N_STATE,
        torch.ones(N_STATE),
        torch.ones(N_STATE, dtype=torch.int64),
        torch.ones(N_STATE, dtype=torch.float64, requires_grad=True),
    ],
)
def test_initial_states_of_any_kind(initial):
    u0 = ControlProblem(Gives(initial), ControlCost(1.0), GRID).initial_state(torch.zeros(0))
    assert u0.tolist() == [1.0] * N_STATE and u0.dtype == torch.float64 and not u0.requires_grad


@pytest.mark.parametrize("initial", [np.zeros(N_STATE + 1), np.zeros(N_STATE) + 1j, "zero", 0.0, [np.nan] * N_STATE])
def test_what_is_no_initial_state(initial):
    with pytest.raises(InputError, match="initial_state"):
        ControlProblem(Gives(initial), ControlCost(1.0), GRID)


def test_functions_that_hide_their_arguments_from_differentiation_are_named():
    with pytest.raises(InputError, match="residual: got a conversion to NumPy"):
        ControlProblem(Gives(of_numpy=True), ControlCost(1.0), GRID)


def test_arguments_on_the_tape_and_those_of_no_effect_need_no_derivative(monkeypatch):
    asked = []
    monkeypatch.setattr("pdeopt.control.problem.jvp", lambda function, *_: asked.append(function))
    ControlProblem(examples.Heat(3, 0.1), ControlCost(1.0), GRID)  # forward mode loads 50 MB when first asked
    assert not asked  # the price is the same at all states


@pytest.mark.parametrize("name", ["state_mass", "control_mass"])
@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda n: -np.eye(n), "-1 at"),
        (lambda n: np.eye(n) + np.eye(n, k=1), "not symmetric"),
        (lambda n: np.eye(n + 1), "shape"),
        (lambda n: np.full((n, n), np.nan), "finite"),
        (lambda n: 0.5, "two axes"),
    ],
)
def test_masses_are_inner_products(name, make, said):
    constraint = Gives()
    setattr(constraint, name, make(constraint.state_dim if name == "state_mass" else constraint.control_dim))
    with pytest.raises(InputError, match=said) as caught:
        ControlProblem(constraint, ControlCost(1.0), GRID)
    assert f"constraint.{name}" in caught.value.what


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ((Gives, ControlCost(1.0), GRID), "constraint"),
        ((Gives(), lambda u: u, GRID), "objective"),
        ((Gives(), ControlCost(1.0), GRID.times), "grid"),
        ((Gives(), ControlCost(1.0), GRID, np.eye(3)), "control_map"),
        ((Gives(), TerminalLoss(lambda u, p: 0.0), GRID), "loss"),
        ((Gives(), TerminalLoss(lambda u, p: u.new_ones(2)), GRID), "loss"),
        ((Gives(), Tracking(np.zeros(N_STATE), times=[0.5]), GRID), "times"),
        ((Gives(), Tracking([0.0], observe=[N_STATE]), GRID), "observe"),
        ((Gives(), ControlCost(1.0) + Tracking(np.zeros(N_STATE), np.eye(N_STATE + 1)), GRID), "mass of Tracking"),
        ((Gives(), ControlCost(1.0, np.eye(3)), GRID), "mass of ControlCost"),
    ],
)
def test_parts_that_do_not_fit_are_named(arguments, what):
    with pytest.raises(InputError) as caught:
        ControlProblem(*arguments)
    assert what in caught.value.what
