"""What the assembled matrix looks like; its entries are compared in test_kkt.py."""

import numpy as np
import pytest
import torch

from pdeopt.control.metric import RieszMetric
from pdeopt.control.stepjacobian import SparseStepJacobian
from pdeopt.control.verify import randomize
from pdeopt.kkt.operator import KKTOperator
from pdeopt.steps.sparse import StepPattern
from pdeopt.steps.sparsity import Sparsity
from problems.klein_gordon import KleinGordonCase, KleinGordonSettings
from tests.helpers import examples
from tests.helpers.support import entries


def assembled(problem, hessian, seed=0):
    operator = KKTOperator(RieszMetric(problem), hessian)
    x, lam = randomize(problem.create_primal(), seed), randomize(problem.create_multiplier(), seed + 1)
    operator.set_point(problem.at(x), lam)
    return operator, operator.assemble()


@pytest.mark.parametrize("hessian", ["metric", "full", "gauss-newton"])
def test_nonzeros_grow_linearly_with_the_steps(hessian):
    counts = []
    for nt in (4, 8, 12):
        operator, matrix = assembled(examples.burgers(nx=8, nt=nt), hessian)
        counts.append(matrix.getInfo()["nz_used"])
        operator.free()
    assert np.diff(counts, 2) == 0


def test_refilling_keeps_the_pattern_and_the_matrix():
    problem = examples.burgers()
    operator, first = assembled(problem, "full")
    pattern = [part.copy() for part in first.getValuesCSR()[:2]]
    operator.set_point(problem.at(randomize(problem.create_primal(), 5)), problem.create_multiplier())
    second = operator.assemble()
    assert second.handle == first.handle
    assert all(np.array_equal(a, b) for a, b in zip(pattern, second.getValuesCSR()[:2]))
    operator.free()


@pytest.mark.parametrize("hessian", ["metric", "full", "gauss-newton"])
def test_the_whole_diagonal_is_stored_also_of_states_that_the_objective_does_not_see(hessian):
    """On several ranks MUMPS would lose a row without it."""
    problem = KleinGordonCase(KleinGordonSettings(nx=4, nt=3)).problem
    operator, matrix = assembled(problem, hessian)
    indptr, cols, _ = matrix.getValuesCSR()
    rows = np.repeat(np.arange(len(indptr) - 1), np.diff(indptr))
    assert np.array_equal(rows[rows == cols], np.arange(len(indptr) - 1))
    operator.free()


class Undeclared(examples.Dense):
    """A pattern that has all of F', but says that F is linear."""

    @property
    def pattern(self):
        n, m = self.state_dim, self.control_dim
        full = np.ones((n, n))
        return StepPattern(full, full, np.ones((n, m)), Sparsity.empty(2 * n + m, 2 * n + m))

    def linearize(self, *where):
        return SparseStepJacobian.colored(self, *where, self.pattern)


def test_a_pattern_without_second_derivatives_of_a_nonlinear_step_does_not_pass_in_silence():
    """Either an error, or a matrix that nevertheless is the Hessian."""
    from pdeopt.control.problem import ControlProblem
    from pdeopt.core.errors import InputError

    base = examples.dense()
    problem = ControlProblem(Undeclared(), base.objective, base.grid)
    try:
        operator, matrix = assembled(problem, "full")
    except InputError as error:
        assert "pattern" in str(error)
        return
    k = randomize(problem.create_kkt(), 3)
    a, b = k.duplicate(), k.duplicate()
    matrix.mult(k, a), operator.mult(None, k, b)
    assert torch.allclose(entries(a), entries(b))
