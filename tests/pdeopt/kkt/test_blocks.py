import numpy as np
import pytest
import torch
from petsc4py import PETSc

from pdeopt.control.objective import TerminalLoss, Tracking
from pdeopt.control.problem import ControlProblem
from pdeopt.control.verify import randomize
from pdeopt.core.errors import InputError, SolveFailure
from pdeopt.kkt.blocks import KKTBlocks
from pdeopt.precond.operator import BlockOperator, SchurOperator, blocks_of
from pdeopt.steps.timegrid import TimeGrid
from pdeopt.steps.transfer import piecewise_constant, transfer_matrix
from tests.helpers import examples
from tests.helpers.krylov import fields, heat, matrix_of, operator_at_random, vector_of
from tests.helpers.matrices import densify
from tests.helpers.oracle import Oracle
from tests.helpers.parallel_time import RANKS, check
from tests.helpers.support import dense, relative

HESSIANS = ["metric", "gauss-newton", "full"]
#: those with neither control map nor global parameters
PLAIN = ["burgers", "burgers theta", "heat"]


def blocks_at_random(name, hessian):
    """Blocks at a random point, and the dense KKT matrix there (Gauss-Newton's for the full one)."""
    problem = examples.EXAMPLES[name]()
    operator, k = operator_at_random(problem, hessian)
    return KKTBlocks.of(operator), Oracle(problem).kkt(k, "gauss-newton" if hessian == "full" else hessian)


def expected_matrix(blocks, K):
    """K with W made block diagonal: no terms of u, z and p together, and a positive form of p."""
    u, z, p, lam = fields(blocks)
    expected = torch.zeros_like(K)
    for own in (u, z, p):
        expected[own[:, None], own] = K[own][:, own]
    values, vectors = torch.linalg.eigh(K[p][:, p])
    expected[p[:, None], p] = vectors @ torch.diag(values.abs()) @ vectors.T
    expected[lam], expected[:, lam] = K[lam], K[:, lam]
    return expected


@pytest.mark.parametrize("hessian", HESSIANS)
@pytest.mark.parametrize("name", examples.PATTERNED)
def test_blocks_are_the_dense_matrix_but_for_terms_of_several_fields(name, hessian):
    """So they are K itself for the metric, and of Gauss-Newton where the objective does not couple u, z and p."""
    blocks, K = blocks_at_random(name, hessian)
    found = matrix_of(BlockOperator(blocks))
    assert relative(found, expected_matrix(blocks, K)) <= 1e-13
    if hessian == "metric" or not name.startswith("dense"):
        assert relative(found, K) <= 1e-13


@pytest.mark.parametrize("hessian", ["metric", "gauss-newton"])
@pytest.mark.parametrize("name", examples.PATTERNED)
def test_the_schur_complement_is_the_dense_one(name, hessian):
    blocks, K = blocks_at_random(name, hessian)
    lam = fields(blocks)[3]
    F, W = K[lam][:, : lam[0]], expected_matrix(blocks, K)[: lam[0], : lam[0]]
    assert relative(matrix_of(SchurOperator(blocks)), F @ torch.linalg.solve(W, F.T)) <= 1e-12


@pytest.mark.parametrize("hessian", ["metric", "gauss-newton"])
@pytest.mark.parametrize("name", examples.PATTERNED)
def test_inverse_inverts_multiply(name, hessian):
    blocks, _ = blocks_at_random(name, hessian)
    k = randomize(vector_of(blocks), 7)
    x, _ = blocks.layout.kkt_fields(k)
    for found, expected in zip(blocks.inverse(blocks.multiply(x)), x):
        assert torch.allclose(found, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("window", [1, 2, 3, 9])
@pytest.mark.parametrize("name", examples.PATTERNED)
def test_a_cut_drops_what_couples_windows(name, window):
    blocks, K = blocks_at_random(name, "metric")
    u, _, _, lam = fields(blocks)
    N, n = blocks.grid.num_steps, blocks.n
    part = torch.arange(N * n) // n // window
    expected = K.clone()
    expected[lam[:, None], u] *= part[:, None] == part
    expected[u[:, None], lam] *= part[:, None] == part
    cut = blocks.cut(window)
    assert relative(matrix_of(BlockOperator(cut)), expected) <= 1e-13
    coupling = cut.cut_coupling()
    assert torch.equal(densify(coupling)[::window], torch.zeros(len(range(0, N, window)), n, n, dtype=torch.float64))
    assert relative(matrix_of(BlockOperator(blocks)), K) <= 1e-13  # the blocks themselves stay as they were


@pytest.mark.parametrize("hessian", ["metric", "gauss-newton"])
@pytest.mark.parametrize("factor, window", [(2, None), (3, None), (9, None), (2, 2), (2, 3)])
@pytest.mark.parametrize("name", PLAIN)
def test_coarser_blocks_are_the_galerkin_product_for_functions_constant_in_windows(name, factor, window, hessian):
    """P'KP with piecewise constant P: for implicit Euler's heat equation this is the rediscretized system."""
    blocks, K = blocks_at_random(name, hessian)
    if window is not None:
        blocks = blocks.cut(window)
        K = matrix_of(BlockOperator(blocks))
    grid, coarse = blocks.grid, blocks.coarsen(factor)
    piecewise, n = piecewise_constant(grid, factor), blocks.n
    P = transfer_matrix(grid, coarse.grid, grid.comm, [(piecewise, n), (piecewise, blocks.C.shape[1]), (piecewise, n)])
    galerkin = dense(P).T @ K @ dense(P)
    P.destroy()
    assert relative(matrix_of(BlockOperator(coarse)), galerkin) <= 1e-14
    without = matrix_of(BlockOperator(blocks.coarsen(factor, with_control=False)))
    _, z, _, lam = fields(coarse)
    galerkin[lam[:, None], z] = galerkin[z[:, None], lam] = 0.0
    assert relative(without, galerkin) <= 1e-14


def test_coarser_heat_blocks_are_those_of_the_problem_with_longer_steps():
    fine, coarse = (KKTBlocks.of(operator_at_random(examples.heat(4, N), "metric")[0]) for N in (8, 4))
    assert relative(matrix_of(BlockOperator(fine.coarsen(2))), matrix_of(BlockOperator(coarse))) <= 1e-14


@pytest.mark.parametrize("name", ["dense", "burgers nodal"])
def test_parameters_and_control_maps_are_not_coarsened(name):
    blocks, _ = blocks_at_random(name, "metric")
    with pytest.raises(InputError, match="control map"):
        blocks.coarsen(2)


def test_an_unknown_that_the_objective_never_sees_gets_the_price_of_control_times_the_metric():
    alpha, M = 0.03, np.diag([2.0, 3.0])
    problem = heat(5, alpha, n=4, objective=Tracking(np.zeros(2), M, observe=np.array([0, 2])))
    operator, k = operator_at_random(problem, "gauss-newton")
    found, metric = KKTBlocks.of(operator), operator.metric.state
    u = fields(found)[0]
    expected = Oracle(problem).kkt(k, "gauss-newton")[u][:, u]
    unseen = torch.tensor([False, True, False, True]).repeat(problem.grid.num_steps)
    added = alpha * torch.block_diag(*densify(metric.spread()))
    expected += torch.where(unseen & unseen[:, None], added, 0.0)
    assert relative(torch.block_diag(*densify(found.state.spread())), expected) <= 1e-13


def test_a_state_that_only_the_last_step_sees_gets_a_weight_in_all_steps():
    problem = heat(5, 0.03, objective=TerminalLoss(lambda u, p: (u**2).sum()))
    operator, k = operator_at_random(problem, "gauss-newton")
    found, metric = KKTBlocks.of(operator), operator.metric.state
    u = fields(found)[0]
    expected = Oracle(problem).kkt(k, "gauss-newton")[u][:, u] + 0.03 * torch.block_diag(*densify(metric.spread()))
    assert relative(torch.block_diag(*densify(found.state.spread())), expected) <= 1e-13


@pytest.mark.parametrize("hessian", ["gauss-newton", "full"])
def test_a_control_without_a_price_is_a_solve_failure(hessian):
    constraint = examples.Heat(4, 0.1)
    problem = ControlProblem(constraint, Tracking(np.zeros(4)), TimeGrid.uniform(5, 0.5))
    with pytest.raises(SolveFailure, match="price"):
        KKTBlocks.of(operator_at_random(problem, hessian)[0])


def test_a_constraint_without_a_pattern_is_refused():
    problem = examples.layer()
    with pytest.raises(InputError, match="pattern"):
        KKTBlocks.of(operator_at_random(problem, "metric")[0])


@pytest.mark.parametrize(
    "name, hessian", [("heat", "metric"), ("heat", "gauss-newton"), ("burgers", "gauss-newton"), ("dense", "metric")]
)
def test_fixed_controls_and_parameters_do_not_act(name, hessian):
    """Their rows and columns are those of a diagonal; the Schur complement is that of the free ones alone."""
    problem = examples.EXAMPLES[name]()
    operator, k = operator_at_random(problem, hessian)
    fixed = torch.rand(problem.layout.design_size, generator=torch.Generator().manual_seed(2)) < 0.4
    fixed[-1] = True
    operator.set_point(operator.lin, fixed=fixed)
    blocks, K = KKTBlocks.of(operator), Oracle(problem).kkt(k, hessian)
    u, z, p, lam = fields(blocks)
    design = torch.cat([z, p])
    free, held = torch.cat([u, design[~fixed]]), design[fixed]
    F = K[lam][:, free]
    S = F @ torch.linalg.solve(K[free][:, free], F.T)
    assert relative(matrix_of(SchurOperator(blocks)), S) <= 1e-12
    K[held], K[:, held] = 0.0, 0.0
    K[held, held] = operator.pin
    assert relative(matrix_of(BlockOperator(blocks)), K) <= 1e-13


def test_fixed_controls_with_a_control_map_are_refused():
    problem = examples.burgers(nodal=True)
    operator, _ = operator_at_random(problem, "metric")
    operator.set_point(operator.lin, fixed=torch.ones(problem.layout.control_size, dtype=torch.bool))
    with pytest.raises(InputError, match="control map"):
        KKTBlocks.of(operator)


def test_blocks_are_found_behind_a_matrix():
    problem = examples.heat()
    operator, _ = operator_at_random(problem, "metric")
    shell = operator.shell()
    assert blocks_of(shell).grid is problem.grid
    own = BlockOperator(blocks_of(shell))
    again = own.shell()
    assert blocks_of(again) is own.blocks
    shell.destroy(), again.destroy()
    matrix = PETSc.Mat().createAIJ([problem.create_kkt().getSize()] * 2, nnz=1)
    with pytest.raises(InputError, match="KKT operator"):
        blocks_of(matrix)
    matrix.destroy()


@pytest.mark.mpi
@pytest.mark.parametrize("ranks", RANKS)
def test_blocks_are_the_same_on_several_ranks(ranks):
    """Products, shifts and coarser blocks, also where ranks see different parts of the objective."""
    check("blocks", ranks)
