"""Support vector machines by Newton's method: the conditions of the optimum with the exact kernel."""

import numpy as np
import pytest

from pdeopt.core.errors import InputError
from pdeopt.core.monitor import Reason
from pdeopt.lowrank import Gaussian, Laplace, PivotedCholesky, Polynomial
from pdeopt.optimize.descent import SupportNewtonSettings, SupportVectorNewton

SETTINGS = SupportNewtonSettings()


def samples(n, noise, seed=0):
    generator = np.random.default_rng(seed)
    x = generator.random((n, 2))
    x[n // 2 : n // 2 + n // 10] = x[0]  # equal points
    return x, np.where(np.sin(7 * x[:, 0]) + x[:, 1] - 0.8 + noise * generator.standard_normal(n) > 0, 1.0, -1.0)


@pytest.mark.parametrize(
    "n, noise, bound, kernel",
    [
        (2, 0.0, 1.0, Gaussian(0.5)),
        (40, 0.0, 1e4, Gaussian(0.3)),  # no sample at its bound
        (300, 3.0, 0.01, Polynomial(1.0, 3)),
        (5000, 0.5, 2.0, Gaussian(0.2)),  # by subsets and working sets
    ],
)
def test_objectives_of_the_machine_and_of_its_dual_enclose_the_optimum(n, noise, bound, kernel):
    x, y = samples(n, noise)
    y[:2] = 1.0, -1.0
    x[1] = 0.9, 0.1
    machine = SupportVectorNewton(PivotedCholesky(kernel, x, 1e-11), y, bound, SETTINGS)
    result = machine.solve()
    a, K = result.design, kernel.block(x, x)
    assert result.reason == Reason.CONVERGED_OPTIMALITY, result.message
    assert (a * y).min() >= 0.0 and (a * y).max() <= bound and abs(a.sum()) <= 1e-9 * bound * n
    f, energy = K @ a + machine.offset, a @ K @ a
    primal, dual = energy / 2 + bound * np.maximum(0.0, 1.0 - y * f).sum(), y @ a - energy / 2
    assert -1e-9 * dual <= primal - dual <= 2e-7 * dual and np.isclose(machine.dual(), -dual, rtol=1e-8)


def test_a_factor_is_the_matrix_up_to_what_it_says():
    x = np.random.default_rng(0).random((200, 2))
    x[50:60] = x[0]
    for kernel in (Gaussian(0.3), Polynomial(1.0, 2), Laplace(0.5)):
        K = kernel.block(x, x)
        factor = PivotedCholesky(kernel, x, 1e-6)
        left = K - factor.phi.T @ factor.phi
        assert np.isclose(np.trace(left), factor.rest * np.trace(K), rtol=1e-3, atol=1e-9 * np.trace(K))
        assert factor.rest <= 1e-6 and np.linalg.eigvalsh(left)[0] > -1e-11 * np.trace(K)
    assert len(PivotedCholesky(Polynomial(1.0, 2), x, 1e-12).phi) == 6  # monomials of degree up to 2


def test_bad_input_is_named():
    x, y = samples(50, 0.1)
    factor = PivotedCholesky(Gaussian(0.3), x)
    for labels in (np.ones(50), y[:-1], 2 * y, np.where(y > 0, y, np.nan)):
        with pytest.raises(InputError, match="labels"):
            SupportVectorNewton(factor, labels, 1.0, SETTINGS)
    with pytest.raises(InputError, match="3 rows"):
        SupportVectorNewton(PivotedCholesky(Gaussian(0.3), x, most=3), y, 1.0, SETTINGS)
    with pytest.raises(InputError, match="bound"):
        SupportVectorNewton(factor, y, -1.0, SETTINGS)
