import numpy as np
import pytest
import scipy.sparse as sp
import torch
from petsc4py import PETSc

from pdeopt.core.errors import InputError, SolveFailure, StepFailure
from pdeopt.steps.bands import BandFactor
from pdeopt.steps.matrices.krylov import loosened
from pdeopt.steps.sparse import StepMatrix
from pdeopt.steps.sparsity import Sparsity
from pdeopt.steps.stepsolve import StepFactor, StepInverse, StepKrylov, is_krylov, step_solver
from tests.helpers.matrices import densify, heat_steps, randn, random_pattern, random_steps
from tests.helpers.support import python


@pytest.mark.parametrize("density", [0.4, 1.0])
@pytest.mark.parametrize("n, batch", [(6, 4), (1, 5), (6, 1), (1, 1)])
def test_factors_solve_with_every_step_and_its_transpose(n, batch, density):
    A = random_steps(random_pattern(n, n, density, diagonal=True), batch, shift=0.2)
    D, r = densify(A), randn(batch, n)
    factor = StepFactor(A)
    assert torch.allclose(factor.solve(r), torch.linalg.solve(D, r), rtol=1e-10, atol=1e-10)
    assert torch.allclose(factor.solve(r, transpose=True), torch.linalg.solve(D.mT, r), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("width", [0, 1, 2, 4])
@pytest.mark.parametrize("n, batch", [(20, 1), (20, 3), (1, 3), (2, 1)])
@pytest.mark.parametrize("kind", ["positive", "indefinite", "general"])
def test_bands_solve_as_dense_factors(kind, n, batch, width):
    A = random_steps(Sparsity.banded(n, width), batch, shift=12.0 if kind == "positive" else 0.5)
    if kind != "general":
        values = densify(A)
        A = StepMatrix(A.sparsity, (values + values.mT)[:, A.sparsity.rows, A.sparsity.cols])
    D, r = densify(A), randn(4 if batch == 1 else batch, n)
    factor = BandFactor(A)
    for transpose, matrix in ((False, D), (True, D.mT)):
        expected = torch.linalg.solve(matrix, r[..., None])[..., 0]
        assert float((factor.solve(r, transpose) - expected).abs().max()) <= 1e-12 * float(expected.abs().max()) * 100


@pytest.mark.parametrize("n", [3, 40, 120])
@pytest.mark.parametrize("width", [1, 9])
def test_the_fastest_factors_solve_alike(n, width):
    A = random_steps(Sparsity.banded(n, width), 1, shift=6.0 + 2 * width)
    D, r = densify(A)[0], randn(5, n)
    solver = step_solver(A)
    assert isinstance(solver, StepInverse if n <= (64 if width == 1 else 128) else BandFactor)
    assert torch.allclose(solver.solve(r), torch.linalg.solve(D, r.T).T, rtol=1e-12, atol=1e-13)
    assert torch.allclose(solver.solve(r, transpose=True), torch.linalg.solve(D.T, r.T).T, rtol=1e-12, atol=1e-13)


def test_a_matrix_close_to_a_singular_one_is_factored_and_not_inverted():
    A = StepMatrix.constant(np.array([[1.0, 1.0], [1.0, 1.0 + 1e-6]]))
    assert isinstance(step_solver(A), BandFactor)


def test_one_factor_of_a_constant_matrix_serves_all_rows():
    A = random_steps(random_pattern(6, 6, 0.4, diagonal=True), 1, shift=3.0)
    D, r = densify(A)[0], randn(5, 6)
    assert torch.allclose(StepFactor(A).solve(r), torch.linalg.solve(D, r.T).T)
    assert torch.allclose(StepFactor(A).solve(r, transpose=True), torch.linalg.solve(D.T, r.T).T)


def test_factors_pivot_where_the_diagonal_is_zero():
    swap = np.array([[0.0, 2.0, 0.0], [1.0, 0.0, 3.0], [0.0, 1.0, 1.0]])
    r = randn(2, 3)
    assert torch.allclose(
        StepFactor(StepMatrix.constant(swap)).solve(r), torch.linalg.solve(torch.from_numpy(swap), r.T).T
    )


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_a_singular_or_not_finite_step_is_a_solve_failure(bad):
    A = random_steps(Sparsity.banded(4), 3, shift=4.0)
    A.values[1] *= bad
    with pytest.raises(SolveFailure):
        StepFactor(A).solve(randn(3, 4))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("pc", ["hypre", "gamg", "bjacobi"])
def test_multigrid_in_space_solves_to_its_tolerance(options, pc, batch):
    if not PETSc.Sys.hasExternalPackage("hypre") and pc == "hypre":
        pytest.skip("this PETSc has no hypre")
    options(step_pc_type=pc, step_ksp_rtol=1e-11)
    A, _ = heat_steps(40, batch)
    D, r = densify(A), randn(3, 40)
    solver = step_solver(A)
    assert isinstance(solver, StepKrylov)
    for transpose, matrix in ((False, D), (True, D.mT)):
        remainder = r - (matrix @ solver.solve(r, transpose)[..., None])[..., 0]
        assert float((remainder.norm(dim=1) / r.norm(dim=1)).max()) <= 2e-11


def test_a_step_that_does_not_converge_says_which_and_why(options):
    options(step_pc_type="bjacobi", step_ksp_max_it=1, step_ksp_rtol=1e-13)
    A = random_steps(random_pattern(40, 40, 0.2, diagonal=True), 3, shift=8.0)
    A.values[:2] = torch.from_numpy((A.sparsity.rows == A.sparsity.cols).astype(float))  # those two are easy
    said = r"after 1 iterations, reason \w+ .*-step_ksp_monitor"
    with pytest.raises(StepFailure, match=said) as failure:
        step_solver(A).solve(randn(3, 40))
    assert failure.value.row == 2


def test_a_looser_tolerance_holds_inside_its_block_alone(options):
    options(step_pc_type="gamg", step_ksp_rtol=1e-11)
    A, _ = heat_steps(60, 1)
    solver, r = step_solver(A), randn(2, 60)

    def misses() -> float:
        return float((A(solver.solve(r)) - r).norm() / r.norm())

    assert misses() <= 1e-11
    with loosened(1e-2):
        assert 1e-9 < misses() <= 1e-2
        with loosened(1e-13):  # not below the user's
            assert 1e-14 < misses() <= 1e-11
    assert misses() <= 1e-11


def cube(m):
    line = sp.diags([-np.ones(m - 1), 2 * np.ones(m), -np.ones(m - 1)], [-1, 0, 1])
    return StepMatrix.constant(sp.csr_matrix(sp.identity(m**3) + sp.kronsum(line, sp.kronsum(line, line))))


def test_auto_takes_multigrid_in_space_and_factors_in_the_plane():
    assert is_krylov(cube(28)) and not is_krylov(cube(16))
    line = sp.diags([-np.ones(199), 2 * np.ones(200), -np.ones(199)], [-1, 0, 1])
    plane = StepMatrix.constant(sp.csr_matrix(sp.identity(40_000) + sp.kronsum(line, line)))
    assert not is_krylov(plane)
    saddle = cube(28)
    saddle.values[0, np.flatnonzero(saddle.sparsity.rows == saddle.sparsity.cols)[-1]] = 0.0
    assert not is_krylov(saddle)


def test_an_unknown_step_solver_names_the_legal_ones(options):
    options(step_pc_type="magic")
    with pytest.raises(InputError, match=r"auto \| lu \| hypre \| gamg \| bjacobi"):
        step_solver(heat_steps(4, 1)[0])


@pytest.mark.mpi
def test_a_matrix_over_several_ranks_is_solved_with():
    """By each preconditioner, also where a rank has no unknown; a singular one says so."""
    done = python("-m", "tests.helpers.parallel", "spread", ranks=2)
    assert done.returncode == 0, done.stderr
