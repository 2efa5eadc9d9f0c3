import pytest
import torch

from pdeopt.core.errors import InputError
from pdeopt.core.settings import read_inner
from pdeopt.kkt.blocks import KKTBlocks
from pdeopt.precond.levels import TimeMultigridSettings
from pdeopt.precond.matching import matched_shift
from pdeopt.precond.operator import SchurOperator
from pdeopt.precond.schur import MatchedBlock, PropagatedSchur, use_schur_multigrid
from pdeopt.precond.wathen import WathenPC
from pdeopt.steps.transfer import adjoint_interpolation, transfer_matrix
from tests.helpers.krylov import applied, heat, iterations, matrix_of, operator_at_zero, preconditioner, solver
from tests.helpers.matrices import densify, randn
from tests.helpers.support import dense, relative


def test_the_smoother_of_the_schur_complement_is_its_matched_diagonal_block():
    """(A + N) W^-1 (A + N)' with N W^-1 N' = B W^-1 B' + C Wzz^-1 C': within a factor of 2 of the block, as the
    eigenvalues say; for equal weights."""
    operator = SchurOperator(KKTBlocks.of(operator_at_zero(heat(6), "metric")))
    S, blocks, n = matrix_of(operator), operator.blocks, operator.blocks.n
    own = slice(n, 2 * n)
    inverse = preconditioner(operator, MatchedBlock(), torch.eye(len(S), dtype=S.dtype)[:, own])
    A, W = densify(blocks.A)[0], densify(blocks.state.spread())[0]
    N = densify(matched_shift(blocks, with_old_state=True))[0]
    assert relative(inverse[own], torch.linalg.inv((A + N) @ torch.linalg.solve(W, (A + N).T))) <= 1e-10
    assert not inverse[:n].any() and not inverse[2 * n :].any()
    values = torch.linalg.eigvals(inverse[own] @ S[own, own]).real
    assert float(values.min()) >= 0.5 and float(values.max()) <= 1.0


@pytest.mark.parametrize("N", [6, 7])
def test_two_levels_on_the_schur_complement(options, N):
    """I - M S = G^2 (I - P S_c^-1 P'S) G^2 with G the smoother and P the multiplier's linear interpolation."""
    options(schur_timemg_levels=2, schur_mg_coarse_ksp_rtol=1e-13)
    fine = KKTBlocks.of(operator_at_zero(heat(N)))
    coarse, grid = fine.coarsen(2), fine.grid
    S, S_c = matrix_of(SchurOperator(fine)), matrix_of(SchurOperator(coarse))
    interpolation = transfer_matrix(grid, coarse.grid, grid.comm, [(adjoint_interpolation(grid, 2), fine.n)])
    P, eye = dense(interpolation), torch.eye(len(S), dtype=S.dtype)
    smooth = torch.matrix_power(eye - 1.3 * preconditioner(SchurOperator(fine), MatchedBlock()) @ S, 2)
    expected = smooth @ (eye - P @ torch.linalg.solve(S_c, P.T @ S)) @ smooth
    with solver(SchurOperator(fine), None, kind="preonly", prefix="schur_") as ksp:
        coarser = use_schur_multigrid(ksp.getPC(), read_inner(TimeMultigridSettings, "schur_"))
        ksp.setFromOptions()
        ksp.setUp()
        x = randn(len(S), 3)
        assert relative(x - applied(ksp.getPC(), S @ x), expected @ x) <= 1e-7
    interpolation.destroy()
    for matrix in coarser:
        matrix.destroy()


@pytest.mark.parametrize("alpha", [1.0, 1e-4])
def test_multigrid_on_the_schur_complement_is_flat(options, alpha):
    options(wathen_propagator="multigrid", test_wathen_timemg_coarsening=4)
    counts = [iterations(operator_at_zero(heat(N, alpha)), WathenPC()) for N in (16, 64)]
    assert max(counts) - min(counts) <= 1 and max(counts) <= 6


def test_multigrid_on_the_schur_complement_with_many_levels(options):
    options(wathen_propagator="multigrid")
    assert iterations(operator_at_zero(heat(17)), WathenPC()) <= 4


@pytest.mark.parametrize(
    "words, legal", [(("magic",), "new_state | old_new | matched"), (("matched", "magic"), "window | forward | mgrit")]
)
def test_a_word_that_is_none_names_the_legal_ones(words, legal):
    with pytest.raises(InputError, match=legal.replace("|", r"\|")):
        PropagatedSchur(*words)
