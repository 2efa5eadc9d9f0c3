"""Constraints whose steps ranks share: on one rank they are as any other, on several they give the same numbers."""

import numpy as np
import pytest
import torch
from mpi4py import MPI

import pdeopt as po
from tests.helpers import parallel_space
from tests.helpers.parallel_space import Reaction, problem_of


@pytest.mark.mpi
@pytest.mark.parametrize("ranks", parallel_space.RANKS)
@pytest.mark.parametrize("part", [part.__name__ for part in parallel_space.PARTS[2:]])
def test_several_ranks(part, ranks):
    parallel_space.check(part, ranks)


def test_derivatives_on_one_rank():
    problem = problem_of(MPI.COMM_SELF, 1)
    po.assert_consistent(problem)
    assert problem.constraint.pattern.B.nnz == 12  # an unknown sees only itself before the step


def test_a_pattern_that_is_too_large_to_detect_is_asked_for():
    class Large(Reaction):
        pattern = None

    problem = problem_of(MPI.COMM_SELF, 1, Large)
    with pytest.raises(po.InputError, match="StepPattern"):
        _ = problem.at(problem.create_primal()).jacobian


def test_a_residual_that_is_not_affine_although_it_says_so():
    class Wrong(Reaction):
        is_affine = True

    problem = problem_of(MPI.COMM_SELF, 1, Wrong)
    lin = problem.at(problem.create_primal())
    with pytest.raises(po.InputError, match="not affine"):
        _ = lin.jacobian


def test_a_layout_is_one():
    class None_(Reaction):
        def __init__(self):
            po.SpaceConstraint.__init__(self, np.arange(3))

    with pytest.raises(po.InputError, match="Layout"):
        None_()


def test_few_controls_for_all():
    layout = po.Layout.replicated(MPI.COMM_SELF, 2)
    assert layout.n_owned == 2 and torch.equal(layout.extend(torch.ones(1, 2)), torch.ones(1, 2))
