"""The reduced objective as a sum of squares: the same function, with products that are adjoint to each other."""

import pytest
import scipy.sparse as sp
import torch

import pdeopt as po
from pdeopt.optimize.squares.reducedsquares import ReducedSquares, TerminalSquares
from tests.helpers.support import relative


class Logistic(po.TimeDependentConstraint):
    """u' = p u (1 - u) + z in two components, from u_0 = p/2."""

    state_dim = control_dim = param_dim = 2

    def initial_state(self, p):
        return 0.5 * p

    def residual(self, u_old, u_new, z, steps):
        return u_new - u_old - steps.dt[:, None] * (steps.p * u_new * (1 - u_new) + z)


MASS = sp.csr_matrix([[2.0, 0.5], [0.5, 1.0]])


def problem(*terms):
    prior = TerminalSquares(lambda u, p: 0.3 * (p - 0.4) * u)
    terms = terms or (po.Tracking([0.3, 0.6], mass=MASS), po.ControlCost(0.1, sp.diags([1.0, 4.0])), prior)
    return po.ControlProblem(Logistic(), sum(terms), po.TimeGrid.uniform(5, 1.0))


def test_it_is_the_reduced_objective_with_products():
    function, reduced = ReducedSquares(problem()), po.ReducedObjective(problem())
    x, d = (torch.linspace(a, 1.0, function.size, dtype=torch.float64) for a in (0.2, -1.0))
    r = function.residual(x)
    w = torch.cos(torch.arange(len(r))).double()
    value, gradient = reduced.value_and_gradient(x)
    assert float(r @ r) == pytest.approx(value, rel=1e-13)
    assert relative(2.0 * function.vjp(x, r), gradient) < 1e-12
    assert float(w @ function.jvp(x, d)) == pytest.approx(float(function.vjp(x, w) @ d), rel=1e-12)
    step = 1e-6 * d
    difference = (function.residual(x + step) - function.residual(x - step)) / 2e-6
    assert relative(function.jvp(x, d), difference) < 1e-8
    rows = torch.tensor([3, 0, 7])
    J = function.jacobian(x)
    assert relative(J @ d, function.jvp(x, d)) < 1e-12
    assert relative(function.jacobian(x, rows), J[rows]) < 1e-12
    assert relative(function.hvp(x, d), reduced.hvp(x, d)) < 1e-12


@pytest.mark.parametrize("linear", ["auto", "cg"])
def test_levenberg_marquardt_finds_the_minimum(linear):
    expected = po.solve(problem(), method="newton", opt_tol=1e-11)
    method = po.LevenbergMarquardt(ReducedSquares(problem()), linear=linear, rtol=1e-9)
    result = method.minimize(torch.zeros(12))
    assert result.converged and result.objective == pytest.approx(expected.objective, rel=1e-9)


def test_what_is_no_sum_of_squares():
    with pytest.raises(po.InputError, match=r"TerminalLoss.*TerminalSquares"):
        ReducedSquares(problem(po.Tracking([0.0, 0.0]), po.TerminalLoss(lambda u, p: u.sum())))
