import math

import pytest

from pdeopt.control.objective import Tracking
from pdeopt.control.problem import ControlProblem
from pdeopt.control.stepjacobian import SparseStepJacobian
from pdeopt.control.verify import DerivativeError, adjoint_error, assert_consistent, symmetry_error, taylor_rates
from tests.helpers import examples


@pytest.mark.parametrize("name", examples.EXAMPLES)
def test_right_derivatives_pass(name):
    errors = assert_consistent(examples.EXAMPLES[name]())
    assert set(errors) == {"adjoint", "jacobian", "gradient", "hessian"}


class WrongA(examples.Heat):
    def linearize(self, *where):
        return SparseStepJacobian(self, where[:3], where[3], self.pattern, 1.01 * self.values)


class WrongGradient(Tracking):
    def gradient(self, u, z, steps):
        u, z, p = super().gradient(u, z, steps)
        return 1.001 * u, z, p


class WrongHessian(Tracking):
    def hvp(self, u, z, steps, du, dz, dp):
        return super().hvp(u, z, steps, 1.001 * du, dz, dp)


def test_a_wrong_jacobian_is_found():
    base = examples.heat()
    problem = ControlProblem(WrongA(base.n, 0.1), base.objective, base.grid)
    with pytest.raises(DerivativeError, match="jacobian"):
        assert_consistent(problem)


@pytest.mark.parametrize("term, name", [(WrongGradient, "gradient"), (WrongHessian, "hessian")])
def test_a_wrong_objective_is_found(term, name):
    base = examples.burgers()
    target = base.constraint.initial
    problem = ControlProblem(base.constraint, term(target, base.constraint.state_mass), base.grid)
    with pytest.raises(DerivativeError, match=name):
        assert_consistent(problem)


def test_rates_of_powers_are_their_exponents():
    for order in (1, 2, 3):
        assert taylor_rates([0.5**k for k in range(0, 5 * order, order)]) == pytest.approx([order] * 4)
    assert taylor_rates([1.0, 0.0, 0.0]) == [math.inf, math.inf]


def test_a_matrix_and_itself_are_adjoint_only_if_symmetric():
    from petsc4py import PETSc

    for entries, small in (([[2, 1], [1, 3]], True), ([[2, 1], [0, 3]], False)):
        A = PETSc.Mat().createDense((2, 2), array=[float(v) for row in entries for v in row])
        A.assemble()
        assert (symmetry_error(A) <= 1e-15) == small
        assert adjoint_error(A.mult, A.multTranspose, *A.createVecs()) <= 1e-15
