"""Kernels: scikit-learn's values, no negative eigenvalue, exact at equal points, batches."""

import numpy as np
import pytest

from pdeopt.core.errors import InputError
from pdeopt.lowrank import Gaussian, Laplace, Matern, Polynomial, kernel_of

ALL = [Gaussian(0.7), Matern(0.7, 0.5), Matern(0.7, 1.5), Matern(0.7, 2.5), Laplace(0.7), Polynomial(0.7, 3, 0.5)]


def points(n, d, seed=0):
    return np.random.default_rng(seed).normal(size=(n, d))


@pytest.mark.parametrize("d", [2, 20])
@pytest.mark.parametrize("kernel", ALL, ids=lambda each: type(each).__name__)
def test_kernels_are_positive_semidefinite_and_one_at_equal_points(kernel, d):
    x = points(60, d)
    x[7] = x[3]
    K = kernel.block(x, x)
    assert np.allclose(K, K.T, rtol=1e-13, atol=0) and np.linalg.eigvalsh(K)[0] > -1e-12 * np.abs(K).max()
    assert np.allclose(K.diagonal(), kernel.diagonal(x), rtol=1e-13) and np.allclose(K[7, 3], K[3, 3], rtol=1e-13)
    y = points(40, d, seed=1)
    batch = kernel.block(np.stack([x[:30], x[30:]]), np.stack([y, y]))
    assert np.allclose(batch.reshape(60, 40), kernel.block(x, y), rtol=1e-12)


@pytest.mark.parametrize("d", [2, 20])
def test_values_are_those_of_scikit_learn(d):
    pairwise = pytest.importorskip("sklearn.metrics.pairwise")
    gaussian_process = pytest.importorskip("sklearn.gaussian_process.kernels")
    x, y = points(20, d), points(30, d, seed=1)
    expected = {
        Gaussian(0.7): pairwise.rbf_kernel(x, y, gamma=0.5 / 0.49),
        Laplace(0.7): pairwise.laplacian_kernel(x, y, gamma=1 / 0.7),
        Polynomial(0.7, 2, 0.5): pairwise.polynomial_kernel(x, y, degree=2, gamma=1 / 0.49, coef0=0.5),
    }
    expected |= {Matern(0.7, nu): gaussian_process.Matern(0.7, nu=nu)(x, y) for nu in (0.5, 1.5, 2.5)}
    for kernel, values in expected.items():
        assert np.allclose(kernel.block(x, y), values, rtol=1e-12), kernel


@pytest.mark.parametrize(
    "make",
    [
        lambda: Gaussian(0.0),
        lambda: Gaussian(float("nan")),
        lambda: Matern(1.0, 1.0),
        lambda: Polynomial(1.0, 0),
        lambda: Polynomial(1.0, 2, -1.0),
        lambda: kernel_of("sigmoid", 1.0),
    ],
)
def test_what_is_no_kernel_is_refused(make):
    with pytest.raises(InputError, match="legal"):
        make()
