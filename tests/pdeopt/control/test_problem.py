import pytest
import torch
from torch.func import grad, hessian, jacfwd

from pdeopt.control.constraint import TimeDependentConstraint
from pdeopt.control.objective import ControlCost, Objective
from pdeopt.control.problem import ControlProblem
from pdeopt.control.verify import adjoint_error, randomize
from pdeopt.core.errors import InputError
from pdeopt.steps.timegrid import TimeGrid
from tests.helpers import examples
from tests.helpers.oracle import Oracle
from tests.helpers.support import entries, random_design, relative


@pytest.fixture(params=examples.EXAMPLES)
def problem(request):
    return examples.EXAMPLES[request.param]()


@pytest.fixture
def x(problem):
    x = randomize(problem.create_primal(), 4)
    x.scale(0.5)
    return x


def test_value_and_residual_are_those_of_a_loop_over_steps(problem, x):
    oracle, lin = Oracle(problem), problem.at(x)
    assert lin.value == pytest.approx(float(oracle.J(entries(x))), rel=1e-14)
    assert relative(entries(lin.residual), oracle.F(entries(x))) <= 1e-14


def test_first_derivatives_are_those_of_a_loop_over_steps(problem, x):
    oracle, lin = Oracle(problem), problem.at(x)
    dx, lam = randomize(problem.create_primal(), 1), randomize(problem.create_multiplier(), 2)
    F = jacfwd(oracle.F)(entries(x))
    assert relative(entries(lin.gradient), grad(oracle.J)(entries(x))) <= 1e-13
    assert relative(entries(lin.jvp(dx, problem.create_multiplier())), F @ entries(dx)) <= 1e-13
    assert relative(entries(lin.vjp(lam, problem.create_primal())), F.T @ entries(lam)) <= 1e-13


def test_second_derivatives_are_those_of_a_loop_over_steps(problem, x):
    oracle, lin = Oracle(problem), problem.at(x)
    dx, lam = randomize(problem.create_primal(), 1), randomize(problem.create_multiplier(), 2)
    full = hessian(lambda x: oracle.L(torch.cat([x, entries(lam)])))(entries(x))
    assert relative(entries(lin.hvp(lam, dx, x.duplicate())), full @ entries(dx)) <= 1e-12
    assert relative(entries(lin.hvp(None, dx, x.duplicate())), hessian(oracle.J)(entries(x)) @ entries(dx)) <= 1e-12


def test_the_constraint_jacobian_and_its_transpose_are_adjoint(problem, x):
    lin = problem.at(x)
    assert adjoint_error(lin.jvp, lin.vjp, problem.create_primal(), problem.create_multiplier()) <= 1e-14


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


def test_splitting_and_joining_are_inverse(problem, x):
    assert problem.join(*problem.split(x)).equal(x)
    k, lam = problem.create_kkt(), randomize(problem.create_multiplier(), 3)
    problem.layout.join_kkt(x, lam, k)
    y, mu = problem.create_primal(), problem.create_multiplier()
    problem.layout.split_kkt(k, y, mu)
    assert y.equal(x) and mu.equal(lam)
    assert problem.layout.pack(problem.create_primal(), *problem.fields(x)).equal(x)


def test_one_step_is_a_time_grid_too():
    for make in (examples.dense, examples.layer, examples.heat):
        problem = make(num_steps=1)
        x = randomize(problem.create_primal(), 0)
        assert problem.at(x).value == pytest.approx(float(Oracle(problem).J(entries(x))), rel=1e-14)


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
