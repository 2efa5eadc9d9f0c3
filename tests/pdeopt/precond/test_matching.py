import numpy as np
import pytest
import torch

from pdeopt.kkt.blocks import KKTBlocks
from pdeopt.precond.matching import matched_shift
from pdeopt.precond.operator import SchurOperator
from pdeopt.steps.innerproduct import InnerProduct
from pdeopt.steps.sparse import StepMatrix
from pdeopt.steps.timegrid import TimeGrid
from tests.helpers import examples
from tests.helpers.krylov import heat, matrix_of, operator_at_random, operator_at_zero
from tests.helpers.matrices import densify
from tests.helpers.support import relative


def products(blocks, N):
    """N W^-1 N' and C Wzz^-1 C' of all steps, dense."""
    shift = densify(N)
    W, Wzz = densify(blocks.state.spread()), densify(blocks.control.spread())
    C = densify(blocks.C)
    return shift @ torch.linalg.solve(W, shift.mT.expand_as(W)), C @ torch.linalg.solve(Wzz, C.mT.expand_as(W))


@pytest.mark.parametrize("alpha", [1.0, 1e-4, 1e-8])
def test_the_shift_of_the_heat_equation_matches_what_the_control_does(alpha):
    """N W^-1 N' = C Wzz^-1 C' exactly; at the last step, of half the weight, twice as much."""
    blocks = KKTBlocks.of(operator_at_zero(heat(5, alpha)))
    N = matched_shift(blocks)
    found, expected = products(blocks, N)
    assert N.is_constant
    assert relative(found[:-1], expected[:-1]) <= 1e-12
    assert relative(found[-1], 2 * expected[-1]) <= 1e-12


def test_the_shift_with_the_old_state_matches_the_diagonal_block():
    """A W^-1 A' + N W^-1 N' is the diagonal block of S, for equal weights as the metric's."""
    blocks = KKTBlocks.of(operator_at_random(examples.heat(), "metric")[0])
    S, n = matrix_of(SchurOperator(blocks)), blocks.n
    A, W = densify(blocks.A)[0], densify(blocks.state.spread())[0]
    N = densify(matched_shift(blocks, with_old_state=True))[0]
    expected = A @ torch.linalg.solve(W, A.T) + N @ torch.linalg.solve(W, N.T)
    for i in range(1, blocks.grid.num_steps):
        assert relative(S[i * n : (i + 1) * n, i * n : (i + 1) * n], expected) <= 1e-12


def test_the_shift_of_unequal_steps_is_one_for_each():
    dt = torch.tensor([0.1, 0.2, 0.05, 0.3], dtype=torch.float64)
    steps, grid = [examples.Heat(4, float(h)) for h in dt], TimeGrid(np.r_[0.0, np.cumsum(dt)])
    A, C = (
        StepMatrix(blocks[0].sparsity, torch.cat([block.values for block in blocks]))
        for blocks in ([step.A for step in steps], [step.C for step in steps])
    )
    M = steps[0].state_mass
    blocks = KKTBlocks(grid, A, steps[0].B, C, InnerProduct(grid.steps.weight, M), InnerProduct(1e-3 * dt, M))
    found, expected = products(blocks, matched_shift(blocks))
    assert relative(found, expected) <= 1e-12
