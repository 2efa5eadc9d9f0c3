import numpy as np
import pytest
import torch

from pdeopt.errors import SolveFailure
from pdeopt.sparse import Sparsity, StepMatrix
from pdeopt.stepsolve import ConstantSubstitution, StepFactor, Substitution
from tests.test_sparse import densify, randn, random_pattern, random_steps


def coupled(A, B):
    """The dense block lower bidiagonal matrix of A_i and B_i."""
    batch, n = len(A), A.shape[1]
    whole = torch.block_diag(*A)
    for i in range(1, batch):
        whole[i * n : (i + 1) * n, (i - 1) * n : i * n] = B[i]
    return whole


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
def test_constant_substitution_inverts_the_coupled_matrix(n, batch):
    A = random_steps(random_pattern(n, n, 0.5, 1, diagonal=True), 1, shift=3.0)
    B = random_steps(random_pattern(n, n, 0.5, 2), 1, seed=5)
    K = coupled(*(densify(part).expand(batch, -1, -1) for part in (A, B)))
    sweeps, r = ConstantSubstitution(A, B), randn(batch, n)
    assert torch.allclose(sweeps.forward(r).ravel(), torch.linalg.solve(K, r.ravel()), atol=1e-12)
    assert torch.allclose(sweeps.backward(r).ravel(), torch.linalg.solve(K.T, r.ravel()), atol=1e-12)


def test_substitution_with_a_constant_coupling_of_varying_steps():
    A = random_steps(Sparsity.banded(4), 3, shift=4.0)
    B = random_steps(random_pattern(4, 4, 0.5, 2), 1, seed=5)
    K, r = coupled(densify(A), densify(B).expand(3, -1, -1)), randn(3, 4)
    assert torch.allclose(Substitution(A, B).forward(r).ravel(), torch.linalg.solve(K, r.ravel()))
