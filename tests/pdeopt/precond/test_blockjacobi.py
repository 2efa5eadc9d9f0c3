from dataclasses import replace

import pytest
import torch

from pdeopt.control.verify import randomize
from pdeopt.core.errors import InputError, SolveFailure
from pdeopt.kkt.blocks import KKTBlocks
from pdeopt.precond.blockjacobi import TimeBlockJacobi
from pdeopt.precond.operator import BlockOperator
from pdeopt.steps.sparse import StepMatrix
from tests.helpers import examples
from tests.helpers.krylov import (
    heat,
    inverse_of_windows,
    iterations,
    matrix_of,
    operator_at_random,
    operator_at_zero,
    preconditioner,
    solver,
)
from tests.helpers.matrices import randn
from tests.helpers.parallel_time import RANKS, check
from tests.helpers.support import entries, relative

#: those with neither control map nor global parameters, whose windows have factors
PLAIN = ["burgers", "burgers theta", "heat"]


@pytest.mark.parametrize("window", [1, 2, 3, 9])
@pytest.mark.parametrize("name", PLAIN)
def test_factors_invert_the_windows(options, name, window):
    options(block_jacobi_local="exact", block_jacobi_window=window)
    operator, _ = operator_at_random(examples.EXAMPLES[name](), "metric")
    assert relative(preconditioner(operator, TimeBlockJacobi()), inverse_of_windows(operator, window)) <= 1e-9


@pytest.mark.parametrize("damping", [1.0, 0.5])
def test_as_an_iteration_it_is_that_of_the_dense_matrices(options, damping):
    """x_k of Richardson's iteration from zero: sum_{j<k} (I - w P^-1 K)^j w P^-1 b."""
    options(block_jacobi_local="exact", block_jacobi_window=2, block_jacobi_damping=damping)
    options(test_ksp_norm_type="none")
    operator, _ = operator_at_random(examples.burgers(), "gauss-newton")
    P, K, b = inverse_of_windows(operator, 2), matrix_of(operator), randomize(operator.problem.create_kkt(), 6)
    expected, x = torch.zeros(len(K), dtype=K.dtype), b.duplicate()
    for _ in range(4):
        expected = expected + damping * P @ (entries(b) - K @ expected)
    with solver(operator, TimeBlockJacobi(), kind="richardson", max_it=4) as ksp:
        ksp.solve(b, x)
    assert relative(entries(x), expected) <= 1e-9


@pytest.mark.parametrize("name", examples.PATTERNED)
def test_block_factorization_to_a_tolerance_inverts_the_windows(options, name):
    """Also with control maps, which reach over windows, and global parameters: they are left whole."""
    window = 2
    options(block_jacobi_window=window, test_sub_wathen_ksp_type="cg", test_sub_wathen_ksp_rtol=1e-13)
    options(test_sub_wathen_ksp_norm_type="natural", test_sub_wathen_ksp_max_it=200)
    operator, _ = operator_at_random(examples.EXAMPLES[name](), "metric")
    K = matrix_of(BlockOperator(KKTBlocks.of(operator).cut(window)))
    x = randn(len(K), 3)
    assert relative(preconditioner(operator, TimeBlockJacobi(), K @ x), x) <= 1e-8


@pytest.mark.parametrize("window", [2, 3])
def test_enough_krylov_iterations_invert_the_windows(options, window):
    options(block_jacobi_local="krylov", block_jacobi_iterations=60, block_jacobi_window=window)
    operator = operator_at_zero(heat(5), "metric")
    x = randn(45, 3)
    assert relative(preconditioner(operator, TimeBlockJacobi(), x), inverse_of_windows(operator, window) @ x) <= 1e-8


@pytest.mark.parametrize("local, most", [("exact", 1), ("wathen", 8), ("krylov", 2)])
def test_one_window_is_the_whole_system(options, local, most):
    options(block_jacobi_local=local, block_jacobi_window=100, block_jacobi_iterations=10)
    assert iterations(operator_at_zero(heat(12)), TimeBlockJacobi()) <= most


def test_longer_windows_need_fewer_iterations(options):
    options(block_jacobi_local="exact")
    operator, counts = operator_at_zero(heat(16)), []
    for window in (1, 4, 16):
        options(block_jacobi_window=window)
        counts.append(iterations(operator, TimeBlockJacobi()))
    assert counts[0] > counts[1] > counts[2] == 1


def spoilt(kind, step, N=6):
    """The heat equation's operator where `step`, from 0, is singular or not a number."""
    blocks = KKTBlocks.of(operator_at_zero(heat(N), "metric"))
    A, B, C = (StepMatrix(M.sparsity, M.values.repeat(N, 1)) for M in (blocks.A, blocks.B, blocks.C))
    for M in (A, B, C):
        M.values[step, M.sparsity.rows == 1] = 0.0 if kind == "singular" else torch.nan
    return BlockOperator(replace(blocks, A=A, B=B, C=C))


@pytest.mark.parametrize("kind", ["singular", "NaN"])
@pytest.mark.parametrize("step, named", [(0, r"window 1 \(steps 1 to 2\)"), (4, r"window 3 \(steps 5 to 6\)")])
def test_a_window_without_factors_is_a_failure_that_names_it(options, kind, step, named):
    options(block_jacobi_local="exact", block_jacobi_window=2)
    with pytest.raises(SolveFailure, match=named):
        preconditioner(spoilt(kind, step), TimeBlockJacobi())


@pytest.mark.parametrize("kind", ["singular", "NaN"])
def test_a_step_without_factors_is_a_failure_of_the_block_factorization(options, kind):
    options(block_jacobi_window=2)
    with pytest.raises(SolveFailure):
        preconditioner(spoilt(kind, 3), TimeBlockJacobi())


@pytest.mark.parametrize("name", ["dense", "burgers nodal"])
def test_factors_of_windows_with_parameters_or_control_maps_are_refused(options, name):
    options(block_jacobi_local="exact")
    operator, _ = operator_at_random(examples.EXAMPLES[name](), "metric")
    with pytest.raises(InputError, match="block_jacobi_local exact"):
        preconditioner(operator, TimeBlockJacobi())


def test_it_follows_the_point(options):
    options(block_jacobi_local="exact", block_jacobi_window=2)
    problem = examples.burgers()
    operator, _ = operator_at_random(problem, "gauss-newton")
    other, _ = operator_at_random(problem, "gauss-newton", seed=11)
    r, s, t = randomize(problem.create_kkt(), 6), problem.create_kkt(), problem.create_kkt()
    with solver(operator, TimeBlockJacobi()) as ksp, solver(other, TimeBlockJacobi()) as fresh:
        ksp.solve(r, s)
        operator.set_point(other.lin)
        ksp.getOperators()[0].stateIncrease()
        ksp.solve(r, s)
        fresh.solve(r, t)
    assert relative(entries(s), entries(t)) <= 1e-12


def settings_in_use(prefix):
    context = TimeBlockJacobi()
    with solver(operator_at_zero(heat(4)), context, prefix=prefix) as ksp:
        ksp.setUp()
        return context.settings


def test_options_with_the_prefix_come_before_bare_ones(options):
    options(block_jacobi_window=3, block_jacobi_damping=0.5, test_block_jacobi_window=2)
    found = settings_in_use("test_")
    assert (found.window, found.damping) == (2, 0.5)
    assert settings_in_use("").window == 3


@pytest.mark.parametrize("prefix", ["", "test_"])
def test_a_word_that_is_none_names_the_legal_ones(options, prefix):
    options(**{f"{prefix}block_jacobi_local": "magic"})
    with pytest.raises(InputError, match=rf"{prefix}block_jacobi_local.*exact \| wathen \| krylov"):
        settings_in_use(prefix)


@pytest.mark.mpi
@pytest.mark.parametrize("ranks", RANKS)
def test_windows_are_solved_the_same_on_several_ranks(ranks):
    """Residuals with all local solvers; windows over borders; a failure on one rank is one on all."""
    check("blockjacobi", ranks)
