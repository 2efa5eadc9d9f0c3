"""`po.least_squares` against SciPy's, on MINPACK's problems."""

import numpy as np
import pytest
import scipy.optimize
import torch

import pdeopt as po
from tests.helpers.minpack import PROBLEMS


def for_numpy(name):
    fun, start = PROBLEMS[name]
    jac = torch.func.jacfwd(fun)
    return (lambda x: fun(torch.from_numpy(x)).numpy()), (lambda x: jac(torch.from_numpy(x)).numpy()), np.array(start)


def compare(names):
    """Calls of ours and of SciPy's two methods; the optima must be the same."""
    calls = []
    for name in names:
        fun, jac, start = for_numpy(name)
        own = po.least_squares(fun, start, jac)
        scipys = [scipy.optimize.least_squares(fun, start, jac, method=method) for method in ("trf", "lm")]
        best = min(each.cost for each in scipys)
        assert own.success and own.cost <= best * (1.0 + 1e-6) + 1e-9, name
        most = max(each.nfev for each in scipys)
        assert own.nfev <= most + 2, (name, own.nfev, most)  # two more at the end of four problems
        calls.append([own.nfev, *(each.nfev for each in scipys)])
    return np.array(calls)


def test_scipys_optima_of_minpacks_problems_by_about_as_many_calls():
    calls = compare(("Rosenbrock", "Powell singular", "Bard", "Box", "Kowalik and Osborne", "Beale")).sum(0)
    assert calls[0] <= calls[1:].min()


@pytest.mark.slow
def test_fewer_calls_in_all():
    calls = compare(PROBLEMS).sum(0)
    assert calls[0] <= calls[1:].min()


def test_scipys_names_and_its_values():
    fun, jac, start = for_numpy("Bard")
    own, theirs = po.least_squares(fun, start, jac), scipy.optimize.least_squares(fun, start, jac)
    assert set(theirs) - set(own) == set() and np.allclose(own.x, theirs.x, atol=1e-5)
    assert own.cost == pytest.approx(0.5 * own.fun @ own.fun) and np.allclose(own.grad, own.jac.T @ own.fun)
    assert own.optimality == np.abs(own.grad).max() and own.x.dtype == float and own.njev == own.nit + 1
    assert own.status == po.Reason.CONVERGED_DECREASE and own.history["jacobians"][-1] == own.njev


@pytest.mark.parametrize("how", ["torch", "2-point", "3-point", "tensor"])
def test_where_the_jacobian_comes_from(how):
    fun, start = PROBLEMS["Box"]
    given = fun if how in ("torch", "tensor") else lambda x: fun(torch.from_numpy(x)).numpy()
    x0 = torch.tensor(start, dtype=torch.float32) if how == "tensor" else start
    found = po.least_squares(given, x0, jac=None if how in ("torch", "tensor") else how)
    assert found.success and found.cost < 1e-12
    if how == "tensor":
        assert isinstance(found.x, torch.Tensor) and found.x.dtype == torch.float32


def test_bounds_are_scipys():
    fun, jac, start = for_numpy("Rosenbrock")
    for bounds in (([-np.inf, 1.5], np.inf), scipy.optimize.Bounds([-2.0, -2.0], [0.5, 2.0])):
        own = po.least_squares(fun, start, jac, bounds)
        ends = bounds if isinstance(bounds, tuple) else (bounds.lb, bounds.ub)
        inside = np.clip(start, *ends) + 1e-3 * np.where(start <= ends[0], 1.0, 0.0)
        theirs = scipy.optimize.least_squares(fun, inside, jac, bounds)
        assert own.success and np.allclose(own.x, theirs.x, atol=1e-4) and own.cost <= theirs.cost + 1e-9
        assert (own.active_mask != 0).sum() == 1 and np.abs(own.active_mask).max() == 1
    with pytest.raises(po.InputError, match="lowest <= highest"):
        po.least_squares(fun, start, jac, ([2.0, 2.0], [1.0, 3.0]))


def test_limits_and_callbacks():
    fun, jac, start = for_numpy("Meyer")
    short = po.least_squares(fun, start, jac, max_nfev=5)
    assert not short.success and short.nfev >= 5 and "max_nfev" in short.message
    seen = []

    def stop(x):
        seen.append(x)
        raise StopIteration

    stopped = po.least_squares(fun, start, jac, callback=stop)
    assert len(seen) == 1 and stopped.nit == 1 and "callback" in stopped.message
    exact = po.least_squares(lambda x, a, b=0.0: x - a - b, [1.0], args=(2.0,), kwargs={"b": 1.0})
    assert exact.x == pytest.approx([3.0])
    assert po.least_squares(lambda x: [x[0] - 1.0, 10.0 * x[1]], [3.0, 4.0]).x == pytest.approx([1.0, 0.0], abs=1e-8)


def test_many_unknowns_search_for_the_damping():
    n = 320
    found = po.least_squares(
        lambda x: torch.cat([10.0 * (x[1:] - x[:-1] ** 2), 1.0 - x]),
        torch.linspace(0.5, 1.5, n),
        jac=lambda x: torch.cat([10.0 * (torch.eye(n)[1:] - 2.0 * x * torch.eye(n)[:-1]), -torch.eye(n)]),
    )
    assert found.success and found.cost < 1e-8 and found.history["factorizations"][-1] >= found.nit


def test_minimize_knows_the_method():
    fun, start = PROBLEMS["Rosenbrock"]
    found = po.minimize(fun, start, method="lm", options={"gtol": 1e-9})
    assert found.success and found.x == pytest.approx([1.0, 1.0]) and found.fun == pytest.approx(0.0, abs=1e-18)
    assert found.nfev <= 30 and found.jac == pytest.approx([0.0, 0.0], abs=1e-9)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda f, j, x: po.least_squares(f, x), "2-point"),
        (lambda f, j, x: po.least_squares(f, x, "5-point"), "2-point"),
        (lambda f, j, x: po.least_squares(f, x, lambda x: np.ones((3, 3))), r"\(2, 2\)"),
        (lambda f, j, x: po.least_squares(lambda x: [[x, x]], x, j), r"\(m,\)"),
        (lambda f, j, x: po.least_squares(f, x, j, options={"lam": 1}), "damping"),
        (lambda f, j, x: po.least_squares(f, x, j, x_scale="unit"), "jac | identity"),
        (lambda f, j, x: po.least_squares(f, x, j, ([0.0] * 3, 1.0)), "bounds"),
        (lambda f, j, x: po.least_squares(3, x, j), "function"),
    ],
)
def test_what_is_not_legal(call, message):
    with pytest.raises(po.InputError, match=message):
        call(*for_numpy("Rosenbrock"))
