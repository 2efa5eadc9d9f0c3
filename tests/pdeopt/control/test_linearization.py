import pytest
import torch
from torch.func import grad, hessian, jacfwd

from pdeopt.control.verify import adjoint_error, randomize
from tests.helpers import examples
from tests.helpers.oracle import Oracle
from tests.helpers.support import entries, relative


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


def test_one_step_is_a_time_grid_too():
    for make in (examples.dense, examples.layer, examples.heat):
        problem = make(num_steps=1)
        x = randomize(problem.create_primal(), 0)
        assert problem.at(x).value == pytest.approx(float(Oracle(problem).J(entries(x))), rel=1e-14)
