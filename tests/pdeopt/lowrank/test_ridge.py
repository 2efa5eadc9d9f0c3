"""Kernel ridge regression: scikit-learn's, by each method; features; the choice by measured ranks."""

import numpy as np
import pytest
import torch
from petsc4py import PETSc

from pdeopt.core.errors import InputError
from pdeopt.lowrank import (
    FeatureRidge,
    Gaussian,
    KernelRidge,
    Laplace,
    Matern,
    NystromFeatures,
    Polynomial,
    RandomFeatures,
    RidgeSettings,
    k_means,
)
from tests.helpers.support import relative


def samples(n=400, d=2, seed=0):
    generator = np.random.default_rng(seed)
    x = generator.random((n, d))
    return x, np.stack([np.sin(4.0 * x[:, 0]), x[:, -1] ** 2], axis=1) + 0.1 * generator.standard_normal((n, 2))


def ridge(kernel, shift=0.1, method="auto", **settings):
    return KernelRidge(kernel, shift, method, RidgeSettings(**settings), PETSc.COMM_SELF)


@pytest.mark.parametrize("method", ["hodlr", "nystrom", "auto"])
def test_regression_is_that_of_scikit_learn(method):
    """Nystrom with all points as centers is exact."""
    module = pytest.importorskip("sklearn.kernel_ridge")
    x, y = samples()
    expected = module.KernelRidge(kernel="rbf", gamma=0.5 / 0.2**2, alpha=0.1).fit(x, y)
    model = ridge(Gaussian(0.2), method=method, centers=400).fit(x, y)
    there = samples(50, seed=1)[0]
    assert relative(model.predict(there), expected.predict(there)) < 1e-5
    if method != "nystrom":
        assert relative(model.alpha, expected.dual_coef_) < 1e-4 and model.residual < 1e-10 and model.iterations <= 4
    one = ridge(Gaussian(0.2), method=method, centers=400).fit(x, y[:, 0])
    assert one.predict(there).shape == (50,) and relative(one.predict(there), model.predict(there)[:, 0]) < 1e-9


def test_some_equal_points_are_no_trouble():
    x, y = samples(300)
    x[100:200] = x[0]
    K = Gaussian(0.2).block(x, x)
    alpha = np.linalg.solve(K + 0.1 * np.eye(300), y)
    assert relative(K @ ridge(Gaussian(0.2), method="hodlr").fit(x, y).alpha, K @ alpha) < 1e-5
    assert relative(ridge(Gaussian(0.2), method="nystrom", centers=300).fit(x, y).predict(x), K @ alpha) < 1e-6


@pytest.mark.parametrize("kernel", [Gaussian(1.0), Matern(1.0, 0.5), Matern(1.0, 2.5), Laplace(2.0)])
def test_random_features_are_the_kernel_in_the_mean(kernel):
    x = torch.from_numpy(samples(40, 3)[0])
    phi = RandomFeatures(kernel, 3, 40000).raw(x)
    assert np.abs((phi @ phi.T).numpy() - kernel.block(x.numpy(), x.numpy())).max() < 0.03  # 6 / sqrt(40000)


def test_nystrom_features_are_the_kernel_at_their_centers():
    x = samples(60)[0]
    features = NystromFeatures(Matern(0.5, 1.5), x[:20])
    phi = features.raw(torch.from_numpy(x)) @ features.transform.T
    assert np.allclose((phi @ phi[:20].T).numpy(), Matern(0.5, 1.5).block(x, x[:20]), rtol=0, atol=1e-11)
    left = np.linalg.eigvalsh(Matern(0.5, 1.5).block(x, x) - (phi @ phi.T).numpy())
    assert left[0] > -1e-11  # a Schur complement


def test_least_squares_in_features_and_single_precision():
    x, y = samples()
    features = RandomFeatures(Gaussian(0.3), 2, 30)
    phi = features.raw(torch.from_numpy(x)).numpy()
    expected = np.linalg.solve(phi.T @ phi + 0.1 * np.eye(30), phi.T @ y)
    model = FeatureRidge(features, 0.1)
    model.fit(x, y)
    assert relative(model.weights.numpy().T, expected) < 1e-9
    single = ridge(Gaussian(0.3), method="features", centers=30, single=True).fit(x, y)
    assert 0.0 < relative(single.predict(x), model.predict(x)) < 1e-4


def test_ranks_decide():
    """Blocks of points in the plane have low rank, those of points in 30 dimensions have not."""
    flat, thick = (samples(2100, d)[0] for d in (2, 30))
    model = ridge(Gaussian(0.5))
    model.x = flat
    assert model._choose() == "hodlr" and model.ranks[0] < 60
    model = ridge(Gaussian(1.0), centers=50).fit(thick, samples(2100)[1])
    assert model.method == "nystrom" and model.ranks[0] > 256


@pytest.mark.parametrize(
    "make, what",
    [
        (lambda x, y: ridge(Gaussian(1.0), shift=-1.0), "shift"),
        (lambda x, y: ridge(Gaussian(1.0), method="dense"), "method"),
        (lambda x, y: ridge(Gaussian(1.0)).fit(x, y[:-1]), "as many as points"),
        (lambda x, y: ridge(Gaussian(1.0)).fit(x, y * np.nan), "finite"),
        (lambda x, y: ridge(Gaussian(1.0)).fit(x * np.nan, y), "finite"),
        (lambda x, y: ridge(Gaussian(1.0), method="hodlr").fit(x, y).predict(np.zeros((3, 3))), "coordinates"),
        (lambda x, y: ridge(Polynomial(1.0), method="features").fit(x, y), "random features"),
    ],
)
def test_bad_input_is_named(make, what):
    with pytest.raises(InputError, match=what):
        make(*samples(20))


def test_means_lie_in_their_clusters_and_equal_points_do_no_harm():
    generator = np.random.default_rng(0)
    middles = 100.0 * generator.standard_normal((4, 3))
    x = np.repeat(middles, 50, axis=0) + generator.standard_normal((200, 3))
    far = np.linalg.norm(k_means(x, 40, 3)[:, None] - middles, axis=-1).min(axis=1)
    assert far.max() < 5.0 and len(k_means(np.zeros((30, 2)), 10, 3)) == 10
    assert (k_means(x, 7, 0)[:, None] == x).all(axis=-1).any(axis=1).all()  # no step: points
