import pytest
import torch

from pdeopt.control.verify import randomize
from pdeopt.core.errors import InputError
from pdeopt.core.settings import read
from pdeopt.kkt.blocks import KKTBlocks
from pdeopt.precond.levels import TimeMultigridSettings, hierarchy
from pdeopt.precond.operator import BlockOperator, GalerkinOperator
from pdeopt.precond.timemg import TimeMultigridPC
from pdeopt.steps.transfer import adjoint_interpolation, injection, interpolation, piecewise_constant, transfer_matrix
from tests.helpers import examples
from tests.helpers.krylov import (
    applied,
    heat,
    history,
    inverse_of_windows,
    iterations,
    matrix_of,
    newton_right_hand_side,
    operator_at_random,
    operator_at_zero,
    preconditioner,
    solver,
)
from tests.helpers.matrices import densify, randn
from tests.helpers.parallel_time import RANKS, check
from tests.helpers.support import dense, entries, relative


def blocks_of_heat(N, hessian="gauss-newton"):
    return KKTBlocks.of(operator_at_zero(heat(N), hessian))


@pytest.mark.parametrize(
    "N, words, steps",
    [
        (16, {}, [16, 8, 4]),
        (17, {}, [17, 9, 5, 3]),
        (64, dict(coarsening=4), [64, 16, 4]),
        (4, {}, [4]),
        (16, dict(levels=2), [16, 8]),
        (5, dict(coarsest=1), [5, 3, 2, 1]),
        (7, dict(coarsening=10), [7, 1]),
    ],
)
def test_levels_are_coarsened_until_few_steps_are_left(N, words, steps):
    levels = hierarchy(blocks_of_heat(N), TimeMultigridSettings(**words))
    assert [level.grid.num_steps for level in levels] == steps
    assert all(level.blocks.grid is level.grid for level in levels)


def test_coarse_levels_may_leave_out_the_control():
    fine, coarse = hierarchy(blocks_of_heat(8), TimeMultigridSettings(operators="no_control"))
    assert bool(densify(fine.blocks.C).any()) and not bool(densify(coarse.blocks.C).any())


def dense_transfers(fine, coarse, kind):
    """P and R of all fields [u | z | lam]."""
    n, m, grid = fine.n, fine.C.shape[1], fine.grid

    def matrix(kinds):
        P = transfer_matrix(grid, coarse.grid, grid.comm, [(T, size) for T, size in zip(kinds, (n, m, n))])
        found = dense(P)
        P.destroy()
        return found

    P = matrix([interpolation(grid, 2), piecewise_constant(grid, 2), adjoint_interpolation(grid, 2)])
    if kind == "variational":
        return P, P.T
    return P, matrix([injection(grid, 2), piecewise_constant(grid, 2), injection(grid, 2, adjoint=True)]).T


@pytest.mark.parametrize(
    "N, operators, transfer",
    [
        (6, "rediscretized", "variational"),
        (7, "rediscretized", "injection"),
        (5, "galerkin", "variational"),
        (6, "galerkin", "injection"),
        (6, "no_control", "variational"),
    ],
)
def test_two_levels_are_smoothing_and_coarse_correction(options, N, operators, transfer):
    """I - B K = (I - S K)(I - P Kc^-1 R K)(I - S K) with S the inverses of windows."""
    options(test_timemg_levels=2, test_timemg_operators=operators, test_timemg_transfer=transfer)
    options(block_jacobi_local="exact", block_jacobi_window=2, test_mg_coarse_ksp_rtol=1e-11)
    operator = BlockOperator(KKTBlocks.of(operator_at_zero(heat(N, n=2))))
    fine = operator.blocks
    coarse = fine.coarsen(2, with_control=operators != "no_control")
    (P, R), K = dense_transfers(fine, coarse, transfer), matrix_of(operator)
    K_c = P.T @ K @ P if operators == "galerkin" else matrix_of(BlockOperator(coarse))
    eye, S = torch.eye(len(K), dtype=K.dtype), inverse_of_windows(operator, 2)
    expected = (eye - S @ K) @ (eye - P @ torch.linalg.solve(K_c, R @ K)) @ (eye - S @ K)
    x = randn(len(K), 3)
    assert relative(x - preconditioner(operator, TimeMultigridPC(), K @ x), expected @ x) <= 1e-6


def test_a_galerkin_operator_is_the_product():
    operator = operator_at_zero(heat(6))
    fine = KKTBlocks.of(operator)
    coarse, piecewise, shell = fine.coarsen(2), piecewise_constant(fine.grid, 2), operator.shell()
    P = transfer_matrix(fine.grid, coarse.grid, fine.grid.comm, [(piecewise, size) for size in (3, 3, 3)])
    found = matrix_of(GalerkinOperator(coarse, shell, P))
    assert relative(found, dense(P).T @ matrix_of(operator) @ dense(P)) <= 1e-14
    assert relative(found, matrix_of(BlockOperator(coarse))) <= 1e-14  # as piecewise constants rediscretize
    shell.destroy(), P.destroy()


V = dict(test_pc_mg_cycle_type="v")
WAYS = {
    "V": ((16, 64, 256), V),
    "V, injection": ((16, 64, 256), V | dict(test_timemg_transfer="injection")),
    "V, without control": ((16, 64), V | dict(test_timemg_operators="no_control")),
    "V, factors of windows": ((16, 64, 256), V | dict(block_jacobi_local="exact")),
    "V, Krylov iterations in windows": ((16, 64), V | dict(block_jacobi_local="krylov", block_jacobi_iterations=2)),
    "V, by three": ((16, 64), V | dict(test_timemg_coarsening=3, block_jacobi_window=6)),
    "W, by four": ((16, 64, 256), dict(test_timemg_coarsening=4)),
    "W, by four, injection": ((16, 64), dict(test_timemg_coarsening=4, test_timemg_transfer="injection")),
}


@pytest.mark.parametrize("way", WAYS)
def test_iterations_do_not_grow_with_the_steps(options, way):
    """Where the coarsening factor divides the smoother's windows; else they meet inside coarse steps."""
    options(block_jacobi_window=4)
    steps, words = WAYS[way]
    options(**words)
    counts = [iterations(operator_at_zero(heat(N)), TimeMultigridPC()) for N in steps]
    assert max(counts) - min(counts) <= 3 and max(counts) <= 9


def test_products_as_coarse_operators_are_as_good(options):
    options(block_jacobi_window=4, test_pc_mg_cycle_type="v", test_timemg_operators="galerkin")
    counts = []
    for N in (8, 20):
        operator = operator_at_zero(heat(N))
        blocks, rhs = BlockOperator(KKTBlocks.of(operator)), newton_right_hand_side(operator.problem)
        counts.append(iterations(blocks, TimeMultigridPC(), rhs))
    assert max(counts) - min(counts) <= 3 and max(counts) <= 7


def test_the_transpose_is_that_of_the_matrix(options):
    """By PCMG: restriction by injection is not the transpose of prolongation, so the cycle is not symmetric."""
    options(block_jacobi_local="exact", block_jacobi_window=3, test_timemg_transfer="injection")
    with solver(operator_at_zero(heat(10, n=2)), TimeMultigridPC()) as ksp:
        ksp.setUp()
        P = applied(ksp.getPC())
        x, y = (randn(len(P), 1, seed=seed) for seed in (1, 2))
        right, left = ksp.getOperators()[0].createVecs()
        right.setArray(y.numpy())
        ksp.getPC().applyTranspose(right, left)
    assert relative(P, P.T) > 1e-3
    assert float(x[:, 0] @ entries(left)) == pytest.approx(float(y[:, 0] @ P @ x[:, 0]), rel=1e-7)


def test_w_cycles_over_many_levels(options):
    options(block_jacobi_window=4)
    assert iterations(operator_at_zero(heat(17)), TimeMultigridPC()) <= 6


@pytest.mark.parametrize("alpha", [1.0, 1e-4, 1e-6])
def test_iterations_hardly_depend_on_the_price_of_control(options, alpha):
    options(block_jacobi_window=4, test_pc_mg_cycle_type="v")
    assert iterations(operator_at_zero(heat(50, alpha)), TimeMultigridPC()) <= 7


@pytest.mark.parametrize("hessian", ["metric", "gauss-newton", "full"])
def test_unlike_steps_and_any_hessian(options, hessian):
    options(block_jacobi_window=4, test_pc_mg_cycle_type="v")
    operator, _ = operator_at_random(examples.burgers(nt=16), hessian)
    rhs = randomize(operator.problem.create_kkt(), 6)
    assert iterations(operator, TimeMultigridPC(), rhs) <= 25


@pytest.mark.parametrize("name", ["dense", "burgers nodal"])
def test_parameters_and_control_maps_have_no_levels(options, name):
    options(test_timemg_coarsest=1)
    operator, _ = operator_at_random(examples.EXAMPLES[name](), "metric")
    with pytest.raises(InputError, match="control map"):
        preconditioner(operator, TimeMultigridPC())


def test_it_follows_the_point(options):
    options(block_jacobi_window=2, test_pc_mg_cycle_type="v")
    problem = examples.burgers(nt=8)
    operator, _ = operator_at_random(problem, "gauss-newton")
    other, _ = operator_at_random(problem, "gauss-newton", seed=11)
    r, s = randomize(problem.create_kkt(), 6), problem.create_kkt()
    with solver(operator, TimeMultigridPC()) as ksp:
        ksp.solve(r, s)
        operator.set_point(other.lin)
        ksp.getOperators()[0].stateIncrease()
        ksp.solve(r, s)
        moved = ksp.getConvergenceHistory()[-ksp.getIterationNumber() - 1 :]
    fresh = history(other, TimeMultigridPC(), r)
    assert len(moved) == len(fresh) and relative(moved, fresh) <= 1e-10


@pytest.mark.parametrize(
    "field, bad, legal",
    [
        ("transfer", "magic", r"injection \| variational"),
        ("operators", "magic", r"rediscretized \| galerkin \| no_control"),
        ("coarsening", 1, ">= 2"),
        ("levels", 1, ">= 2"),
        ("coarsest", 0, ">= 1"),
    ],
)
def test_settings_that_are_none_name_the_legal_ones(options, field, bad, legal):
    options(**{f"timemg_{field}": bad})
    with pytest.raises(InputError, match=f"timemg_{field}.*{legal}"):
        read(TimeMultigridSettings)


@pytest.mark.mpi
@pytest.mark.parametrize("ranks", RANKS)
def test_cycles_are_the_same_on_several_ranks(ranks):
    """Whole residual histories, down to levels with fewer steps than ranks."""
    check("timemg", ranks)
