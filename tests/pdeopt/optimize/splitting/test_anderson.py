"""Anderson acceleration of affine maps, and the curvature that penalties are chosen by."""

import pytest
import torch

from pdeopt.optimize.splitting.anderson import Anderson
from pdeopt.optimize.splitting.penalty import curvature, spectral

SIZE = 6


def affine(contraction):
    generator = torch.Generator().manual_seed(1)
    A = torch.randn(SIZE, SIZE, generator=generator, dtype=torch.float64)
    A = contraction * A / torch.linalg.matrix_norm(A, 2)
    b = torch.randn(SIZE, generator=generator, dtype=torch.float64)
    return A, b, torch.linalg.solve(torch.eye(SIZE).double() - A, b)


@pytest.mark.parametrize("contraction", [0.5, 0.99, 3.0])
def test_an_affine_map_is_solved_in_as_many_steps_as_unknowns(contraction):
    """As GMRES, also where plain iteration diverges."""
    A, b, solution = affine(contraction)
    anderson, x = Anderson(SIZE, lambda columns: columns @ columns.T), torch.zeros(SIZE, dtype=torch.float64)
    if contraction > 1:
        anderson.growth = 1e9
    for _ in range(SIZE + 1):
        x = anderson.next(x, A @ x + b)
    assert torch.allclose(x, solution, rtol=0, atol=1e-6 * float(solution.abs().max()))
    plain = torch.zeros_like(x)
    for _ in range(SIZE + 1):
        plain = A @ plain + b
    assert (plain - solution).norm() > 1e3 * (x - solution).norm()


def test_growing_residuals_empty_the_memory():
    anderson, x = Anderson(3, lambda columns: columns @ columns.T), torch.ones(2, dtype=torch.float64)
    anderson.next(x, 1.5 * x)
    assert len(anderson.x) == 1
    assert torch.equal(anderson.next(x, 9 * x), 9 * x)
    assert len(anderson.x) == 1


def test_curvatures_of_a_quadratic_lie_between_its_eigenvalues():
    H, move = torch.tensor([2.0, 5.0]), torch.tensor([1.0, 1.0])
    change = H * move
    found = curvature(float(move @ move), float(move @ change), float(change @ change))
    assert 2.0 < found < 5.0
    assert curvature(1.0, -1.0, 1.0) is None and curvature(1.0, 0.1, 1.0) is None and curvature(0.0, 0.0, 0.0) is None


def test_the_penalty_is_the_geometric_mean_of_both_curvatures():
    a = torch.tensor([1.0, 2.0])
    columns = torch.stack([a, -4.0 * a, a, 9.0 * a])
    assert spectral(columns @ columns.T) == pytest.approx(6.0)
    columns = torch.stack([a, -4.0 * a, a, -9.0 * a])
    assert spectral(columns @ columns.T) == pytest.approx(4.0)
    assert spectral(torch.zeros(4, 4)) is None
