"""Levenberg-Marquardt: its steps are what they say, and what is no usual problem behaves as documented."""

import math

import numpy as np
import pytest
import torch

from nn_adapters.pinn.terms import Term
from pdeopt.core.errors import InputError
from pdeopt.core.monitor import Reason
from pdeopt.functions.smooth import SmoothFunction
from pdeopt.optimize.parts.bounds import Bounds
from pdeopt.optimize.squares.dampedsteps import PROBE
from pdeopt.optimize.squares.damping import Normal, Products, Singular, Woodbury, chosen
from pdeopt.optimize.squares.levenberg import LevenbergMarquardt
from tests.helpers.pinns import burgers, make, points, somewhere
from tests.helpers.residuals import Curve, Rows
from tests.helpers.support import python, relative


def matrix(m, n, seed=0):
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def linear(m, n):
    A, b = matrix(m, n), matrix(m, 1, 1)[:, 0]
    return Rows(lambda x: A @ x - b, n, m), A, b


def systems(J, D):
    yield Normal(J, D)
    yield Woodbury(J, D)
    yield Singular(J, D)
    yield Products(lambda d: J @ d, lambda w: J.T @ w, D, 1e-13, 1000)


@pytest.mark.parametrize("m, n", [(30, 8), (8, 30), (12, 12)])
def test_all_ways_solve_the_same_damped_system(m, n):
    J, D, q = matrix(m, n), matrix(n, 1, 2)[:, 0].square() + 0.5, matrix(m, 1, 3)[:, 0]
    for lam in (1.0, 1e-3):
        expected = -torch.linalg.solve(J.T @ J + lam * D.diag(), J.T @ q)
        for system in systems(J, D):
            assert relative(system.solve(lam, q), expected) < 1e-9, type(system).__name__
            assert relative(system.solve(lam, 2.0 * q), 2.0 * expected) < 1e-9


def test_single_precision_serves_much_damping():
    J, D, q = matrix(60, 20), torch.full((20,), 3.0, dtype=torch.float64), matrix(60, 1, 3)[:, 0]
    exact, single = Normal(J, D), Normal(J, D, single=1e-2)
    p, expected = single.solve(0.1, q), exact.solve(0.1, q)
    assert relative(p, expected) < 1e-5 and p.dtype == torch.float64 and torch.float32 in single.grams
    assert single.multiplications < 0.6 * exact.multiplications
    assert torch.equal(single.solve(1e-3, q), exact.solve(1e-3, q))  # less damping is for double precision


def test_one_factorization_serves_all_dampings_of_singular_values():
    normal, _, singular, _ = systems(matrix(9, 4), torch.ones(4, dtype=torch.float64))
    for system, count in ((normal, 2), (singular, 1)):
        for lam in (0.1, 0.2):
            system.solve(lam, torch.ones(9).double()), system.solve(lam, torch.zeros(9).double())
        assert system.factorizations == count and system.multiplications > 0


@pytest.mark.parametrize("linear_solver", ["svd", "normal", "cg"])
def test_linear_problems_are_least_squares_in_one_step(linear_solver):
    function, A, b = linear(40, 7)
    method = LevenbergMarquardt(function, linear=linear_solver, damping=1e-14, cg_rtol=1e-14, rtol=1e-10)
    result = method.minimize(torch.zeros(7))
    assert result.converged and result.iterations == 1
    assert relative(result.design, torch.linalg.lstsq(A, b).solution) < 1e-9


def test_more_unknowns_than_rows_give_the_solution_of_least_norm():
    function, A, b = linear(5, 12)
    result = LevenbergMarquardt(function, linear="woodbury", damping=1e-12, gtol=1e-9).minimize(torch.zeros(12))
    assert result.converged and relative(result.design, torch.linalg.pinv(A) @ b) < 1e-8


def test_the_acceleration_is_the_second_order_term_of_the_path_of_steps():
    function = Rows(lambda x: torch.stack([x[0] ** 2 + x[1], torch.sin(x[1]) * x[0], x[0] * x[1] - 1.0]), 2, 3)
    x, lam = torch.tensor([0.8, 0.5], dtype=torch.float64), 1.0
    r, J = function.linearize(x)
    system = Singular(J, torch.ones(2).double())
    p = system.solve(lam, r)
    q = (2.0 / PROBE) * ((function.residual(x + PROBE * p) - r) / PROBE - J @ p)
    second = torch.func.jvp(lambda y: torch.func.jvp(function._residual, (y,), (p,))[1], (x,), (p,))[1]
    assert relative(q, second) < PROBE  # a difference of first order
    expected = -torch.linalg.solve(J.T @ J + lam * torch.eye(2).double(), J.T @ second)
    assert relative(system.solve(lam, second), expected) < 1e-12
    method = LevenbergMarquardt(function, damping=8.0 * lam / float(J.square().sum()), max_it=1)
    moved = method.minimize(x).design - x
    assert relative(moved, p + 0.5 * system.solve(lam, q)) < 1e-12


def test_a_restart_goes_on_bit_for_bit_with_the_rows_that_were_drawn():
    words = dict(resample_every=2, rows=12, scaling="diagonal", rtol=0.0, max_it=9, linear="normal")
    whole = LevenbergMarquardt(Curve(60), **words)
    memories = []
    expected = whole.minimize([1.0, 1.0], observers=[lambda method, history: memories.append(method.memory())])
    before = LevenbergMarquardt(Curve(60), **words | {"max_it": 5})
    history = before.minimize([1.0, 1.0]).history
    again = LevenbergMarquardt(Curve(60), **words).minimize([0.0, 0.0], memory=memories[5], history=history)
    assert torch.equal(again.design, expected.design)
    assert again.history.as_rows() == expected.history.as_rows()
    assert expected.history["jacobians"][-1] > expected.history["jacobians"][0] == 1


def test_bounds_hold_and_the_projected_gradient_vanishes():
    function, A, b = linear(20, 4)
    free = torch.linalg.lstsq(A, b).solution
    bounds = Bounds(free - torch.tensor([1.0, -0.1, 1.0, 1.0]), free + torch.tensor([-0.2, 1.0, 1.0, 1.0]))
    result = LevenbergMarquardt(function, bounds=bounds, gtol=1e-10).minimize(torch.zeros(4))
    x = result.design
    assert result.converged and bool((x >= bounds.lower).all() and (x <= bounds.upper).all())
    assert x[0] == bounds.upper[0] and x[1] == bounds.lower[1]
    inner = torch.linalg.lstsq(A[:, 2:], b - A[:, :2] @ x[:2]).solution
    assert relative(x[2:], inner) < 1e-8
    with pytest.raises(InputError, match="bounds"):
        LevenbergMarquardt(linear(20, 3)[0], bounds=bounds)


def test_residuals_that_are_not_finite_are_stepped_back_from():
    function = Rows(lambda x: torch.stack([torch.log(x[0]), 10.0 * (x[0] - 1e-3)]), 1, 2)
    result = LevenbergMarquardt(function, damping=1e-10, gtol=1e-8, geodesic=False).minimize([3.0])
    assert result.converged and 1e-3 < result.design[0] < 1.0
    nowhere = Rows(lambda x: torch.where(x == 3.0, x, math.nan), 1, 1)
    stuck = LevenbergMarquardt(nowhere, geodesic=False).minimize([3.0])
    assert stuck.reason == Reason.DIVERGED_NAN and stuck.design == 3.0
    assert LevenbergMarquardt(Rows(lambda x: x / 0.0 * 0.0, 2, 2)).minimize([1.0, 1.0]).reason == Reason.DIVERGED_NAN


@pytest.mark.parametrize("linear_solver", ["auto", "normal", "woodbury", "cg"])
def test_nothing_to_fit_and_nothing_to_fit_it_with(linear_solver):
    empty = LevenbergMarquardt(Rows(lambda x: x[:0], 3, 0), linear=linear_solver).minimize([1.0, 2.0, 3.0])
    assert empty.converged and empty.objective == 0.0 and empty.design.tolist() == [1.0, 2.0, 3.0]
    A = matrix(10, 2) @ matrix(2, 6, 5)  # rank 2
    x = A.T @ matrix(10, 1, 7)[:, 0]
    method = LevenbergMarquardt(Rows(lambda y: A @ y - A @ x, 6, 10), linear=linear_solver, rtol=1e-9)
    result = method.minimize(torch.zeros(6))
    assert result.converged and relative(result.design, x) < 1e-6  # the one of least norm, from zero


def test_what_is_no_sum_of_squares():
    class Smooth(SmoothFunction):
        def _value_and_gradient(self, x):
            return float(x @ x), 2 * x

    with pytest.raises(InputError, match=r"Smooth.*ResidualFunction"):
        LevenbergMarquardt(Smooth(2))
    with pytest.raises(InputError, match="linear"):
        LevenbergMarquardt(linear(3, 2)[0], linear="qr")


def test_which_way_auto_takes():
    assert [chosen("auto", *sizes) for sizes in ((90, 30), (4000, 900), (800, 13_000), (10**5, 10**5))] == [
        "svd", "normal", "woodbury", "cg"
    ]  # fmt: skip
    with pytest.raises(InputError, match="cg"):
        chosen("normal", 10**6, 10**5)


@pytest.mark.mpi
@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_iterates_do_not_depend_on_the_ranks(tmp_path, ranks):
    found = []
    for number in (1, ranks):
        file = tmp_path / f"{number}.npz"
        done = python("-m", "tests.helpers.parallel_squares", file, ranks=number)
        assert done.returncode == 0, done.stderr
        found.append(np.load(file))
    serial, shared = found
    assert {
        name: relative(shared[name], serial[name]) for name in serial if relative(shared[name], serial[name]) > 1e-10
    } == {}


def test_a_pinn_goes_on_bit_for_bit_with_its_points():
    words = dict(resample_every=2, rows=60, more_rows=90, rtol=0.0, linear="normal")
    term = Term(points(200), burgers, ("x", "t", "xx"), draw=points)
    memories = []
    expected = LevenbergMarquardt(make(hidden=(4, 4), terms=[term], body="mlp"), max_it=6, **words)
    start = somewhere(expected.function)
    expected = expected.minimize(start, observers=[lambda method, history: memories.append(method.memory())])
    for at in (3, 4):  # between two drawings, and at one
        rest = LevenbergMarquardt(make(hidden=(4, 4), terms=[term], body="mlp"), max_it=6, **words)
        history = type(expected.history)(expected.history.records[: at + 1])
        found = rest.minimize(torch.zeros_like(start), memory=memories[at], history=history)
        assert torch.equal(found.design, expected.design)
        assert found.history.as_rows() == expected.history.as_rows()
