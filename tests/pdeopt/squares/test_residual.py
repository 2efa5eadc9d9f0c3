"""Sums of squares: rows, Jacobians, products and samples agree with each other, and every call is counted."""

import math

import pytest
import torch

from pdeopt.core.errors import InputError
from pdeopt.functions.smooth import Costs
from pdeopt.squares.residual import RowSample
from pdeopt.squares.rows import density, draw_rows
from tests.helpers.residuals import Curve
from tests.helpers.support import relative

X = torch.tensor([0.7, -0.4], dtype=torch.float64)


def by_hand(t, x=X):
    return torch.stack([torch.exp(x[1] * t), x[0] * t * torch.exp(x[1] * t)], 1)


@pytest.mark.parametrize("m", [1, 2, 30])
def test_derivatives_are_those_of_the_formula(m):
    function = Curve(m)
    J, w, d = by_hand(function.t), torch.arange(1.0, m + 1).double(), torch.tensor([0.3, 2.0]).double()
    r, found = function.linearize(X)
    assert torch.equal(r, function.residual(X)) and relative(found, J) < 1e-14
    assert relative(function.jvp(X, d), J @ d) < 1e-14 and relative(function.vjp(X, w), J.T @ w) < 1e-14
    f, g = function.value_and_gradient(X)
    assert f == pytest.approx(float(r @ r), rel=1e-15) and relative(g, 2.0 * J.T @ r) < 1e-13
    assert function.verify(X)["hessian"] < 1e-6


def test_some_rows():
    function, rows = Curve(), torch.tensor([7, 3, 3, 29])
    r, J = function.linearize(X, rows)
    assert relative(r, function.residual(X)[rows]) == 0.0 and relative(J, function.jacobian(X)[rows]) < 1e-15
    assert relative(function.vjp(X, r, rows), J.T @ r) < 1e-14 and relative(function.jvp(X, X, rows), J @ X) < 1e-14


def test_calls_are_counted_by_their_rows():
    function = Curve(costs=Costs(value=0.5, jacobian=6.0, product=1.5))
    half = torch.arange(15)
    function.residual(X, half), function.linearize(X), function.jacobian(X, half), function.jvp(X, X)
    tally = function.tally
    assert (tally.values, tally.jacobians, tally.products) == (1, 2, 1)
    assert tally.work == pytest.approx(0.25 + 6.0 + 3.0 + 1.5)
    assert Curve(30).costs.jacobian == 2.0 and Curve(1).costs.jacobian == 1.0  # by columns, by rows


def test_the_mean_over_subsets_is_the_whole():
    function = Curve()
    parts = [function.subset(part) for part in torch.arange(30).split(10)]
    values, gradients = zip(*(part.value_and_gradient(X) for part in parts))
    f, g = function.value_and_gradient(X)
    assert sum(values) / 3 == pytest.approx(f, rel=1e-13) and relative(sum(gradients) / 3, g) < 1e-13
    assert parts[0].tally is function.tally and parts[0].costs.gradient == pytest.approx(1 / 3)
    r, J = parts[1].linearize(X)
    assert relative(r, math.sqrt(3) * function.residual(X)[10:20]) < 1e-14
    assert relative(parts[1].vjp(X, r), J.T @ r) < 1e-14 and relative(parts[1].jvp(X, X), J @ X) < 1e-14


def test_samples_keep_the_mean_and_take_more_where_rows_are_large():
    y = torch.where(torch.arange(400) < 40, 5.0, 0.0).double()
    function = Curve(400, y)
    samples = [function.sample(X, 80, seed, floor=0.5) for seed in range(60)]
    mean = sum(sample.value(X) for sample in samples) / 60
    assert mean == pytest.approx(function.value(X), rel=0.05)
    assert sum((sample.indices < 40).double().mean() for sample in samples) / 60 > 0.2  # a tenth of all
    again = function.recalled(samples[3].sample_memory())
    assert isinstance(again, RowSample) and again.value(X) == samples[3].value(X)
    assert function.recalled({}) is function and function.sample(X, 10, 0, candidates=20).rows == 10


def test_weights_of_drawn_rows():
    q = density([torch.tensor([1.0, 3.0, 0.0, 0.0]).double()], 1.0)
    assert q.tolist() == [2.0, 4.0, 1.0, 1.0]
    rows, weights = draw_rows(q, 2, 0)
    assert len(set(rows.tolist())) == 2 and torch.allclose(weights, 2.0 / q[rows])
    assert draw_rows(q, 9, 0)[1].tolist() == [1.0] * 4
    with pytest.raises(InputError, match="not finite"):
        density([torch.tensor([math.nan])], 1.0)


def test_what_is_no_residual_is_told_as_such():
    class Wrong(Curve):
        def _residual(self, x, rows=None):
            return x

    with pytest.raises(InputError, match=r"residual of Wrong.*\(30,\)"):
        Wrong().residual(X)
    with pytest.raises(InputError, match="rows >= 0"):
        Curve(0).__class__(-1)
