"""Problems with kernel matrices as scripts: what their summaries say, and that it is so."""

import json

import numpy as np
import pytest

from pdeopt.lowrank import Gaussian
from problems import kernel_ridge, kernel_svm
from problems.shared.files import DataFiles
from problems.shared.kernel_data import KernelSettings, load, width_of


def summary(script, folder, *words):
    value = script.main([*map(str, words), "-summary", str(folder / "s.json")])
    return value, json.loads((folder / "s.json").read_text())


def test_ridge_regression_finds_the_function_below_the_noise(tmp_path):
    picture = tmp_path / "p.png"
    error, found = summary(kernel_ridge, tmp_path, "-samples", 400, "-lambda", 0.05, "-plot", picture)
    assert found["test_error"] == error < 0.1 < found["parameters"]["noise"] * 1.5
    assert found["method"] == "hodlr" and found["residual"] < 1e-10 and found["exact_residual"] < 1e-3
    assert len(found["ranks_by_level"]) == 2 and found["memory_mb"] < 3 * found["dense_mb"]
    assert found["parameters"]["lambda"] == 0.05 and picture.stat().st_size > 0


@pytest.mark.parametrize("method", ["nystrom", "features"])
def test_features_read_digits(tmp_path, method):
    words = ("-data", "digits", "-samples", 600, "-method", method, "-ridge_centers", 300, "-lambda", 0.01)
    error, found = summary(kernel_ridge, tmp_path, *words, "-plot", tmp_path / "p.png")
    assert found["test_error"] == error < 0.1 and found["method"] == method and found["residual"] is None


@pytest.mark.parametrize("method", ["newton", "admm"])
def test_the_dual_of_support_vectors_is_that_of_scikit_learn(method, tmp_path):
    svm = pytest.importorskip("sklearn.svm")
    words = ("-samples", 300, "-noise", 0.5, "-bound", 2, "-method", method)
    words += ("-hier_rtol", 1e-9) if method == "admm" else ()
    value, found = summary(kernel_svm, tmp_path, *words, "-plot", tmp_path / "p.png")
    samples = load(KernelSettings(samples=300, noise=0.5), DataFiles())
    y, y_test = kernel_svm.labels(samples)
    machine = svm.SVC(C=2.0, gamma=0.5 / 0.2**2, tol=1e-9).fit(samples.x, y)
    a = np.zeros(300)
    a[machine.support_] = machine.dual_coef_[0]
    K = Gaussian(0.2).block(samples.x, samples.x)
    expected = 0.5 * a @ K @ a - np.abs(a).sum()
    assert found["objective"] == value and abs(value - expected) < 1e-6 * abs(expected)
    assert abs(found["offset"] - machine.intercept_[0]) < 1e-3 and found["reason"] == "CONVERGED_OPTIMALITY"
    assert np.isclose(found["test_error"], 1.0 - machine.score(samples.x_test, y_test), atol=2e-3)


def test_the_width_is_half_the_median_distance():
    x = load(KernelSettings(data="digits", samples=400), DataFiles()).x
    distances = np.linalg.norm(x[:, None] - x[None], axis=-1)[np.triu_indices(400, 1)]
    assert np.isclose(width_of(KernelSettings(data="digits"), x), 0.5 * np.median(distances), rtol=1e-6)
