"""Corrections of a solution, against what they leave."""

import numpy as np
import pytest
from petsc4py import PETSc

from pdeopt.kkt.refinement import Refinement

K = np.array([[2.0, 1.0, 0.0], [1.0, 3.0, 1.0], [0.0, 1.0, 4.0]])
r = np.array([1.0, -2.0, 0.5])


def begin():
    matrix = PETSc.Mat().createDense((3, 3), array=K, comm=PETSc.COMM_SELF)
    matrix.assemble()
    rhs = PETSc.Vec().createWithArray(r.copy(), comm=PETSc.COMM_SELF)
    return matrix, Refinement(rhs, rhs.norm(), PETSc.Vec.norm)


def correct(matrix, refinement, factor):
    """The solution of what is left, times a factor."""
    refinement.room.setArray(factor * np.linalg.solve(K, refinement.remainder.getArray()))
    refinement.add(matrix)


def test_the_first_correction_is_the_solution_and_others_are_added():
    matrix, refinement = begin()
    assert refinement.room is refinement.solution and refinement.remainder is refinement.rhs
    for k in range(1, 4):
        correct(matrix, refinement, 0.5)
        assert refinement.size == pytest.approx(0.5**k * np.linalg.norm(r), rel=1e-12)
        assert np.allclose(K @ refinement.solution.getArray(), (1 - 0.5**k) * r, rtol=1e-12)
    assert np.array_equal(refinement.rhs.getArray(), r)


def test_corrections_that_are_worse_are_taken_back():
    matrix, refinement = begin()
    correct(matrix, refinement, 9.0)
    refinement.take_back(matrix, was_first=True)
    assert not refinement.solution.getArray().any() and refinement.size == np.linalg.norm(r)
    correct(matrix, refinement, 0.5)
    size = refinement.size
    correct(matrix, refinement, 9.0)
    refinement.take_back(matrix, was_first=False)
    assert refinement.size == pytest.approx(size, rel=1e-12)
    correct(matrix, refinement, np.nan)
    refinement.take_back(matrix, was_first=False)
    assert refinement.remainder is refinement.rhs and refinement.size == np.linalg.norm(r)
    refinement.room.setArray(r)
    refinement.leave()
    assert not refinement.solution.getArray().any()
