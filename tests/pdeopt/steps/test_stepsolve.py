import numpy as np
import pytest
import torch
from petsc4py import PETSc

from pdeopt.core.errors import InputError, SolveFailure
from pdeopt.steps.sparse import Sparsity, StepMatrix
from pdeopt.steps.stepsolve import StagedSubstitution, StepFactor, StepKrylov, Substitution, step_solver, substitution
from tests.helpers.matrices import coupled, densify, randn, random_pattern, random_steps


@pytest.mark.parametrize("density", [0.4, 1.0])
@pytest.mark.parametrize("n, batch", [(6, 4), (1, 5), (6, 1), (1, 1)])
def test_factors_solve_with_every_step_and_its_transpose(n, batch, density):
    A = random_steps(random_pattern(n, n, density, diagonal=True), batch, shift=0.2)
    D, r = densify(A), randn(batch, n)
    factor = StepFactor(A)
    assert torch.allclose(factor.solve(r), torch.linalg.solve(D, r), rtol=1e-10, atol=1e-10)
    assert torch.allclose(factor.solve(r, transpose=True), torch.linalg.solve(D.mT, r), rtol=1e-10, atol=1e-10)


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


@pytest.mark.parametrize("n, batch", [(5, 6), (1, 4), (5, 1)])
@pytest.mark.parametrize("pivoting", [False, True])
def test_substitution_inverts_the_coupled_matrix(n, batch, pivoting):
    A = random_steps(random_pattern(n, n, 0.5, 1, diagonal=True), batch, shift=0.0 if pivoting else 3.0)
    B = random_steps(random_pattern(n, n, 0.5, 2), batch, seed=5)
    K, r = coupled(densify(A), densify(B)), randn(batch, n)
    sweeps = Substitution(A, B)
    for found, matrix in ((sweeps.forward(r), K), (sweeps.backward(r), K.T)):
        expected = torch.linalg.solve(matrix, r.ravel())
        assert (found.ravel() - expected).abs().max() <= 1e-10 * expected.abs().max()


@pytest.mark.parametrize("n, batch", [(5, 6), (1, 4)])
def test_staged_substitution_inverts_the_coupled_matrix(n, batch):
    A = random_steps(random_pattern(n, n, 0.5, 1, diagonal=True), 1, shift=3.0)
    B = random_steps(random_pattern(n, n, 0.5, 2), 1, seed=5)
    K = coupled(*(densify(part).expand(batch, -1, -1) for part in (A, B)))
    sweeps, r = StagedSubstitution(A, B, batch), randn(batch, n)
    assert torch.allclose(sweeps.forward(r).ravel(), torch.linalg.solve(K, r.ravel()), atol=1e-12)
    assert torch.allclose(sweeps.backward(r).ravel(), torch.linalg.solve(K.T, r.ravel()), atol=1e-12)


def test_substitution_with_a_constant_coupling_of_varying_steps():
    A = random_steps(Sparsity.banded(4), 3, shift=4.0)
    B = random_steps(random_pattern(4, 4, 0.5, 2), 1, seed=5)
    K, r = coupled(densify(A), densify(B).expand(3, -1, -1)), randn(3, 4)
    assert torch.allclose(Substitution(A, B).forward(r).ravel(), torch.linalg.solve(K, r.ravel()))


def heat_steps(n, batch):
    """Step matrices as of a heat equation, symmetric and dominant, and couplings."""
    A = StepMatrix(Sparsity.banded(n), torch.full((batch, 3 * n - 2), -0.4, dtype=torch.float64))
    diagonal = torch.from_numpy(A.sparsity.rows == A.sparsity.cols)
    A.values[:, diagonal] = 1.0 + torch.linspace(0.1, 1.0, batch, dtype=torch.float64)[:, None]
    return A, random_steps(Sparsity.banded(n), 1, seed=5)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("pc", ["hypre", "gamg"])
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
        sizes = remainder.norm(dim=1) / r.norm(dim=1) if batch == 1 else remainder.norm() / r.norm()
        assert float(sizes.max()) <= 1e-9  # 1e-11 of the preconditioned residual


def test_a_step_that_does_not_converge_is_a_solve_failure(options):
    options(step_pc_type="gamg", step_ksp_max_it=1, step_ksp_rtol=1e-14)
    with pytest.raises(SolveFailure, match="reason"):
        step_solver(random_steps(Sparsity.banded(40), 1, shift=0.5)).solve(randn(1, 40))


def test_an_unknown_step_solver_names_the_legal_ones(options):
    options(step_pc_type="magic")
    with pytest.raises(InputError, match=r"lu \| hypre \| gamg"):
        step_solver(heat_steps(4, 1)[0])


@pytest.mark.parametrize("starts", [[0], [0, 2, 4], [0, 3], [0, 1, 2, 3, 4, 5], [0, 5]])
@pytest.mark.parametrize("batch", [1, 6])
@pytest.mark.parametrize("kind", [Substitution, StagedSubstitution])
def test_windows_are_solved_each_from_a_zero_state(kind, batch, starts):
    N, n = 6, 4
    A = random_steps(random_pattern(n, n, 0.5, 1, diagonal=True), batch, shift=3.0)
    B = random_steps(random_pattern(n, n, 0.5, 2), batch, seed=5)
    dense_B = densify(B).expand(N, -1, -1).clone()
    dense_B[starts] = 0.0
    K, r = coupled(densify(A).expand(N, -1, -1), dense_B), randn(N, n)
    if kind is Substitution:
        A = StepMatrix(A.sparsity, A.values.expand(N, -1))
        sweeps = Substitution(A, B, np.array(starts))
    else:
        sweeps = StagedSubstitution(A, B, N, np.array(starts))
    kept = r.clone()
    assert torch.allclose(sweeps.forward(r).ravel(), torch.linalg.solve(K, r.ravel()), atol=1e-13)
    assert torch.allclose(sweeps.backward(r).ravel(), torch.linalg.solve(K.T, r.ravel()), atol=1e-13)
    assert torch.equal(r, kept)  # right-hand sides stay as they are


@pytest.mark.parametrize("batch", [1, 5])
def test_substitution_takes_multigrid_in_space(options, batch):
    options(step_pc_type="gamg", step_ksp_rtol=1e-13)
    A, B = heat_steps(30, batch)
    sweeps, r = substitution(A, B, 5, np.array([0, 3])), randn(5, 30)
    assert isinstance(sweeps, StagedSubstitution)
    dense_B = densify(B).expand(5, -1, -1).clone()
    dense_B[[0, 3]] = 0.0
    K = coupled(densify(A).expand(5, -1, -1), dense_B)
    assert torch.allclose(sweeps.forward(r).ravel(), torch.linalg.solve(K, r.ravel()), atol=1e-9)
    assert torch.allclose(sweeps.backward(r).ravel(), torch.linalg.solve(K.T, r.ravel()), atol=1e-9)


def test_the_way_of_substitution_follows_the_matrices():
    constant, B = heat_steps(4, 1)
    assert isinstance(substitution(constant, B, 5), StagedSubstitution)
    assert isinstance(substitution(heat_steps(4, 5)[0], B, 5), Substitution)
    assert isinstance(substitution(constant, B, 1), Substitution)
