import numpy as np
import pytest
import torch
from petsc4py import PETSc

from pdeopt.control.metric import RieszMetric
from pdeopt.kkt.operator import KKTOperator
from pdeopt.precond.direct import KKTBandPC, KKTDirectPC
from tests.helpers import examples


@pytest.mark.parametrize("kind", [KKTBandPC, KKTDirectPC])
def test_factors_solve_the_system(kind):
    problem = examples.dense(num_steps=7)
    x, lam = problem.create_primal(), problem.create_multiplier()
    x.setArray(torch.linspace(-1, 1, x.getLocalSize(), dtype=torch.float64).numpy())
    lam.setArray(np.linspace(0.5, 1.0, lam.getLocalSize()))
    operator = KKTOperator(RieszMetric(problem), "full")
    operator.set_point(problem.at(x), lam)
    matrix = operator.assemble()
    ksp = PETSc.KSP().create(PETSc.COMM_SELF)
    ksp.setOperators(matrix)
    ksp.setType("preonly")
    ksp.getPC().setType("python")
    ksp.getPC().setPythonContext(kind(operator.layout))
    right = matrix.createVecRight()
    right.setArray(np.cos(np.arange(right.getLocalSize())))
    left = right.duplicate()
    ksp.solve(right, left)
    assert (matrix * left - right).norm() <= 1e-9 * right.norm()
    ksp.destroy()
    operator.free()
