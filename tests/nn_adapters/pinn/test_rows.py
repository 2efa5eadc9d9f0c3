"""Rows of residuals of PINNs: Jacobians and products against torch's differentiation, features, drawn points."""

import math

import pytest
import torch
from torch.func import jacrev

from nn_adapters.pinn.features import Features, periodic
from nn_adapters.pinn.loss import PINN
from nn_adapters.pinn.network import Network
from nn_adapters.pinn.points import uniform_points
from nn_adapters.pinn.terms import Term
from pdeopt.core.errors import InputError
from pdeopt.functions.smooth import Restriction
from pdeopt.optimize.squares import LevenbergMarquardt
from tests.helpers.pinns import burgers, fields, hard, make, points, soft, somewhere, wave
from tests.helpers.support import relative


def rows_by_torch(function, theta):
    """r, all by operations of torch."""
    rows = []
    for term in function.evaluated:
        for chunk, inputs in zip(term.chunks, term.inputs):
            u = chunk.jets(function.network.jets(theta[: function.network.size], term.basis, inputs))
            c = theta[function.network.size :, None].expand(-1, len(chunk.x))
            rows.append((chunk.root * term._residual(chunk, u, c)).T.flatten())
    return torch.cat(rows)


@pytest.mark.parametrize("make", [hard, soft, wave, fields])
def test_rows_and_their_derivatives_are_those_of_the_formula(make, monkeypatch):
    monkeypatch.setattr("nn_adapters.pinn.terms.JETS_IN_CACHE", 24 * 64)  # several chunks, of two sizes
    function = make()
    theta = somewhere(function)
    r, J = function.linearize(theta)
    expected = jacrev(lambda theta: rows_by_torch(function, theta))(theta)
    f, g = function.value_and_gradient(theta)
    assert relative(r, rows_by_torch(function, theta)) < 1e-13 and relative(J, expected) < 1e-12
    assert f == pytest.approx(float(r @ r), rel=1e-14) and relative(g, 2.0 * J.T @ r) < 1e-12
    d, w = somewhere(function, 3), torch.linspace(-1.0, 1.0, function.rows, dtype=torch.float64)
    assert relative(function.jvp(theta, d), J @ d) < 1e-12 and relative(function.vjp(theta, w), J.T @ w) < 1e-12
    again = function.linearize(theta, out=torch.zeros_like(J))[1]
    assert torch.equal(again, J)


@pytest.mark.parametrize("make", [hard, soft, fields])
def test_some_rows_in_any_order(make):
    function = make()
    theta = somewhere(function)
    rows = torch.randperm(function.rows, generator=torch.Generator().manual_seed(0))[:20]
    (r, J), (whole, jacobian) = function.linearize(theta, rows), function.linearize(theta)
    assert relative(r, whole[rows]) < 1e-13 and relative(J, jacobian[rows]) < 1e-13
    assert relative(function.vjp(theta, r, rows), J.T @ r) < 1e-12
    assert relative(function.jvp(theta, theta, rows), J @ theta) < 1e-12


def test_a_jacobian_is_priced():
    costs = hard().costs
    assert 1.0 < costs.jacobian < 10.0 and costs.product == 1.0 and 0.0 < costs.multiplication < 1e-3


def test_points_are_drawn_where_the_residual_and_the_slope_are_large():
    box = [(-1.0, 1.0), (0.0, 1.0)]
    function = wave(draw=lambda n, seed: uniform_points(n, box, seed))
    theta = somewhere(function)
    drawn = function.sample(theta, 500, seed=1, candidates=4000)
    fresh = function.with_points(uniform_points(4000, box, 7))
    assert drawn.rows == 500 and drawn.tally is function.tally
    assert drawn.value(theta) == pytest.approx(fresh.value(theta), rel=0.15)
    many = drawn.residuals(theta).abs().mean() > fresh.residuals(theta).abs().mean()
    assert many and drawn.terms[0].weight.mean() == pytest.approx(1.0, abs=0.1)
    again = function.recalled(drawn.sample_memory())
    assert again.value(theta) == drawn.value(theta)
    assert drawn.sample(theta, 100, 3).rows == 100  # weights of the sample before are not those of new points


def test_points_that_nobody_draws_are_chosen_among_those_of_the_term():
    function = soft()
    theta = somewhere(function)
    drawn = function.sample(theta, 60, seed=0)
    assert drawn.rows == 60 + 30
    values = [function.sample(theta, 60, seed).value(theta) for seed in range(40)]
    assert sum(values) / 40 == pytest.approx(function.value(theta), rel=0.1)


def test_features_make_the_network_as_periodic_as_they_are():
    function = wave()
    x = points(20)
    on = x + torch.tensor([2.0, 0.0], dtype=torch.float64)
    theta = somewhere(function)
    assert (function.predict(theta, x) - function.predict(theta, on)).abs().max() < 1e-12


def test_a_factor_that_does_not_match_the_features_is_refused():
    features = periodic("xt", {"x": 2.0})
    term, network = Term(points(), burgers, ("x", "t", "xx")), Network(3, (5,))
    legal = dict(lift=lambda x: torch.cos(math.pi * x[:, 0]), factor=lambda x: x[:, 1] * (1 - x[:, 0] ** 2))
    with pytest.raises(InputError, match=r"factor.*x \+ 2.*period of the features"):
        PINN(network, [term], "xt", **legal, features=features)
    with pytest.raises(InputError, match="lift"):
        PINN(network, [term], "xt", lambda x: x[:, 0], features=features)
    with pytest.raises(InputError, match=r"features.*itself"):
        PINN(network, [term], "xt", features=Features(lambda x: torch.cat([x, x[:, :1]], 1), 3, {"x": 2.0}))
    with pytest.raises(InputError, match=r"shape \(16, 2\).*\(16, 3\)"):
        PINN(network, [term], "xt", features=Features(lambda x: x, 3))
    with pytest.raises(InputError, match="inputs of the network"):
        PINN(Network(2, (5,)), [term], "xt", features=features)
    with pytest.raises(InputError, match="periods > 0"):
        periodic("xt", {"y": 2.0})


def test_weights_below_zero_have_no_root():
    with pytest.raises(InputError, match=">= 0"):
        PINN(Network(2, (3,)), [Term(points(), burgers, ("x", "t", "xx"), -1.0)], "xt")


def test_products_with_the_hessian_and_parts_of_several_fields():
    function = fields()
    theta, d = somewhere(function), somewhere(function, 7)
    ahead, behind = (function.value_and_gradient(theta + e * d)[1] for e in (1e-5, -1e-5))
    assert relative(function.hvp(theta, d), (ahead - behind) / 2e-5) < 1e-6
    decomposition = function.decompose(2)
    for part in range(2):
        local, own = function.local(decomposition, part, theta), decomposition.parts[part]
        zero = torch.zeros(local.size, dtype=torch.float64)
        f, g = local.value_and_gradient(zero)
        whole, gradient = function.value_and_gradient(theta)
        assert f == pytest.approx(whole, rel=1e-13) and relative(g, gradient[own]) < 1e-12
        assert local.value(d[own]) == pytest.approx(Restriction(function, own, theta).value(d[own]), rel=1e-12)


def test_coefficients_are_the_last_unknowns():
    function = fields()
    theta = function.initial(3)
    assert function.size == function.network.size + 2 and function.coefficients_at(theta) == {"c": 0.3, "speed": -0.2}
    assert function.predict(theta, points(7)).shape == (2, 7) and function.residuals(theta).shape == (2, 150)
    assert function.rows == 2 * 150 + 150 and function.samples == 150


def test_measurements_tell_a_coefficient_to_rounding():
    """u = exp(-x), with measurements all but exact: of u_x = -k u, k follows."""
    x = torch.linspace(0.0, 1.0, 40, dtype=torch.float64)[:, None]
    decay = Term(x, lambda u, d, x: d["x"] + d["k"] * u, ("x",))
    seen = Term(x, lambda u, d, x: u - d["seen"], given={"seen": (-1.5 * x[:, 0]).exp()})
    function = PINN(Network(1, (8,)), [decay, seen], "x", coefficients={"k": 0.2})
    found = LevenbergMarquardt(function, max_it=60).minimize(function.initial(0)).design
    assert function.coefficients_at(found)["k"] == pytest.approx(1.5, rel=1e-5)


def test_numbers_at_points_go_with_them():
    x, network = points(60), Network(2, (4,))
    seen = Term(x, lambda u, d, x: u - d["seen"], given={"seen": x[:, 0] ** 2})
    function = PINN(network, [seen], "xt")
    theta = somewhere(function)
    drawn = function.sample(theta, 20, seed=1)
    assert torch.equal(drawn.terms[0].given["seen"], drawn.terms[0].points[:, 0] ** 2) and drawn.rows == 20
    assert function.recalled(drawn.sample_memory()).value(theta) == drawn.value(theta)
    with pytest.raises(InputError, match="given"):
        function.with_points(points(5))


@pytest.mark.parametrize(
    "residual, words, message",
    [
        (lambda u, d, x: u[:, None], {}, r"residual.*\(2,\) at 2 points"),
        (lambda u, d, x: u.sum(), {}, "residual"),
        (lambda u, d, x: u, dict(coefficients={"xt": 1.0}), "no derivative"),
        (lambda u, d, x: u, dict(lift=lambda x: x), r"lift.*\(150,\)"),
        (lambda u, d, x: u, dict(factor=lambda x: x[:3, 0]), "factor"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(residual, words, message):
    network = Network(2, (3,), outputs=3 if "lift" in words else 1)
    with pytest.raises(InputError, match=message):
        PINN(network, [Term(points(), residual)], "xt", **words)


def test_numbers_for_other_points_are_refused():
    with pytest.raises(InputError, match=r"seen.*\(4,\).*\(150,\)"):
        PINN(Network(2, (3,)), [Term(points(), burgers, ("x", "t", "xx"), given={"seen": torch.ones(4)})], "xt")


@pytest.mark.parametrize("precision", [torch.float64, torch.float32])
def test_columns_of_the_jacobian_are_those_of_the_whole(precision):
    for function in (hard(), soft(), make(hidden=(5, 3), body="mlp")):
        x, n = somewhere(function), function.size
        J = function.jacobian(x)
        for begin, end in ((0, n), (0, 10), (7, min(60, n)), (n - 9, n), (n // 2, n // 2 + 1)):
            out = torch.empty(function.rows, end - begin, dtype=precision)
            function.columns(x, begin, out)
            assert relative(out.double(), J[:, begin:end]) < (1e-13 if precision == torch.float64 else 1e-6)
    with pytest.raises(InputError, match="columns of PINN"):
        function.columns(x, n - 1, torch.empty(function.rows, 2))
