"""`po.minimize` against SciPy, on SciPy's and other well-known test functions."""

import warnings

import numpy as np
import pytest
import scipy.optimize
import torch
from scipy.optimize import rosen, rosen_der, rosen_hess_prod

import pdeopt as po

METHODS = ("lbfgs", "ssbroyden", "spqn", "tr", "apts")

#: Functions in plain arithmetic, which arrays and tensors have alike; a start, and the minimizers.
FUNCTIONS = {
    "sphere": (lambda x: (x**2).sum(), [1.0, -2.0, 3.0], [[0.0, 0.0, 0.0]]),
    "rosenbrock": (
        lambda x: (100.0 * (x[1:] - x[:-1] ** 2) ** 2 + (1.0 - x[:-1]) ** 2).sum(),
        [-1.2, 1.0, 0.5],
        [[1.0, 1.0, 1.0]],
    ),
    "booth": (lambda x: (x[0] + 2 * x[1] - 7) ** 2 + (2 * x[0] + x[1] - 5) ** 2, [0.0, 0.0], [[1.0, 3.0]]),
    "matyas": (lambda x: 0.26 * (x[0] ** 2 + x[1] ** 2) - 0.48 * x[0] * x[1], [4.0, -2.0], [[0.0, 0.0]]),
    "beale": (
        lambda x: sum((c - x[0] + x[0] * x[1] ** k) ** 2 for k, c in ((1, 1.5), (2, 2.25), (3, 2.625))),
        [1.0, 0.2],
        [[3.0, 0.5]],
    ),
    "himmelblau": (
        lambda x: (x[0] ** 2 + x[1] - 11) ** 2 + (x[0] + x[1] ** 2 - 7) ** 2,
        [1.0, 1.0],
        [[3.0, 2.0], [-2.805118, 3.131312], [-3.779310, -3.283186], [3.584428, -1.848126]],
    ),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_scipys_optima(name, method):
    fun, start, minimizers = FUNCTIONS[name]
    result = po.minimize(fun, start, method=method, options={"gtol": 1e-7})
    expected = scipy.optimize.minimize(fun, start, method="BFGS")
    assert result.success and result.status > 0 and np.linalg.norm(result.jac) <= 1e-7
    assert abs(result.fun - expected.fun) < 1e-9
    assert min(np.abs(result.x - minimizer).max() for minimizer in minimizers) < 1e-5
    assert result.fun == pytest.approx(float(fun(result.x)), rel=1e-5, abs=1e-15)
    assert result.nit == len(result.history) - 1 and result.nfev >= result.nit


@pytest.mark.parametrize("method", METHODS)
def test_numpys_gradients(method):
    given, start = [], np.array([1.3, 0.7, 0.8])

    def both(x):
        given.append(x)
        value, gradient = rosen(x), rosen_der(x)
        x[:] = np.nan  # the user's copy
        return value, gradient

    words = {"hessp": rosen_hess_prod} if method in ("tr", "apts") else {}
    by_two = po.minimize(rosen, start, jac=rosen_der, method=method, **words)
    by_one = po.minimize(both, start, jac=True, method=method, **words)
    assert by_two.success and np.abs(by_two.x - 1.0).max() < 1e-4
    assert np.array_equal(by_one.x, by_two.x) and by_one.nfev == by_two.njev == len(given)
    assert all(isinstance(x, np.ndarray) and x.dtype == float for x in given)
    assert (by_two.nhev > 0) == bool(words) and list(start) == [1.3, 0.7, 0.8]


def test_kinds_and_types_go_out_as_they_came_in():
    def fun(x):
        assert isinstance(x, torch.Tensor) and x.dtype == torch.float64
        return (x - 3.0).square().sum()

    for start in (torch.zeros(2), torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.int64)):
        result = po.minimize(fun, start)
        assert result.x.dtype == result.jac.dtype == (start.dtype if start.is_floating_point() else torch.float64)
        assert torch.allclose(result.x, torch.full_like(result.x, 3.0)) and isinstance(result.fun, float)
    for start, kind in (([0, 0], float), (np.zeros(2, dtype=np.float32), np.float32), (0.0, float)):
        result = po.minimize(lambda x: ((x - 3.0) ** 2).sum(), start)
        assert result.x.dtype == kind and result.x.shape == (np.size(start),) and np.allclose(result.x, 3.0)
    single = po.minimize(rosen, np.zeros(2), jac=lambda x: rosen_der(x).astype(np.float32), options={"gtol": 1e-4})
    assert single.success and np.abs(single.x - 1.0).max() < 1e-3 and single.x.dtype == float


def test_torch_products_are_exact():
    fun = FUNCTIONS["rosenbrock"][0]
    result = po.minimize(fun, torch.zeros(6, dtype=torch.float64), method="tr")
    assert result.nhev > 0 and result.nit < 25, "Newton's method near the end"
    secant = po.minimize(fun, torch.zeros(6, dtype=torch.float64), method="tr", options={"model": "lsr1"})
    assert secant.nhev == 0 and secant.success


BOUNDS = [(None, None), (0.0, 0.5), (-np.inf, 2.0)]


@pytest.mark.parametrize("bounds", (BOUNDS, scipy.optimize.Bounds([-np.inf, 0.0, -np.inf], [np.inf, 0.5, 2.0])))
def test_bounds(bounds):
    start = np.array([-1.3, 0.7, 0.8])  # outside: it is moved in
    result = po.minimize(rosen, start, jac=rosen_der, bounds=bounds)
    expected = scipy.optimize.minimize(rosen, start, jac=rosen_der, bounds=BOUNDS, method="L-BFGS-B")
    assert result.success and abs(result.fun - expected.fun) < 1e-9
    assert np.abs(result.x - expected.x).max() < 1e-4 and np.abs(result.jac - rosen_der(result.x)).max() < 1e-12
    assert result.x[1] == 0.5 and result.jac[1] < -1.0


def test_an_error_of_the_function_passes_through_tao():
    def fun(x):
        if x[0] > 0.1:
            raise ZeroDivisionError("here")
        return rosen(x), rosen_der(x)

    with pytest.raises(ZeroDivisionError, match="here"):
        po.minimize(fun, np.array([-1.0, 1.0]), jac=True, bounds=[(-2.0, 2.0)] * 2)
    hole = po.minimize(lambda x: -((4.0 - x @ x) ** 0.5), np.array([1.0, 1.0]), jac=None, bounds=[(-5.0, 5.0)] * 2)
    assert hole.success and np.abs(hole.x).max() < 1e-4


@pytest.mark.parametrize("words", ({}, {"bounds": [(-5.0, 5.0)] * 2}), ids=("free", "bounds"))
def test_callbacks(words):
    points, results = [], []

    def stop(intermediate_result):
        results.append(intermediate_result)
        if len(results) == 3:
            raise StopIteration

    whole = po.minimize(rosen, [-1.2, 1.0], jac=rosen_der, callback=points.append, **words)
    assert len(points) == whole.nit and np.array_equal(points[-1], whole.x)
    short = po.minimize(rosen, [-1.2, 1.0], jac=rosen_der, callback=stop, **words)
    assert short.nit == 3 and not short.success and "callback" in short.message
    assert np.array_equal(short.x, points[2]) and results[2].fun == rosen(points[2])


def test_options_and_results(capfd):
    result = po.minimize(rosen, [-1.2, 1.0], jac=rosen_der, options={"maxiter": 2, "disp": True, "memory": 3})
    assert result.nit == 2 and not result.success and result.status == po.Reason.DIVERGED_MAX_IT
    assert "maxiter" in result.message and result["x"] is result.x and "success: False" in repr(result)
    assert "objective" in capfd.readouterr().out
    with pytest.raises(AttributeError, match="nfev"):
        result.nothing  # noqa: B018


@pytest.mark.parametrize(
    "words, legal",
    (
        ({"jac": None}, "jac=True"),
        ({"jac": "2-point"}, "True"),
        ({"method": "bfgs"}, "lbfgs | ssbroyden | spqn | tr | apts"),
        ({"method": 3}, "lbfgs"),
        ({"options": {"maxit": 3}}, "maxiter"),
        ({"options": {"gtol": -1.0}}, "gtol"),
        ({"options": {"line_search": "armijo"}, "bounds": [(0, 1)] * 3}, "memory"),
        ({"method": "tr", "bounds": [(0, 1)] * 3}, "lbfgs"),
        ({"bounds": [(0, 1)] * 2}, "3 unknowns"),
        ({"bounds": [(1, 0)] * 3}, "lowest <= highest"),
        ({"jac": lambda x: x[:2]}, r"\(3,\)"),
        ({"jac": True}, "the pair"),
        ({"fun": lambda x: x}, "a real number"),
        ({"x0": np.zeros((2, 2))}, "a vector"),
        ({"x0": []}, "a vector"),
    ),
)
def test_errors_say_what_is_legal(words, legal):
    with pytest.raises(po.InputError, match=legal):
        po.minimize(**({"fun": rosen, "x0": np.array([1.3, 0.7, 0.8]), "jac": rosen_der} | words))


def test_products_that_are_not_used():
    with pytest.warns(RuntimeWarning, match="hessp"):
        po.minimize(rosen, [0.5, 0.5], jac=rosen_der, hessp=rosen_hess_prod)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        po.minimize(rosen, [0.5, 0.5], jac=rosen_der, hessp=rosen_hess_prod, method="tr")
