"""PINNs as smooth functions: against torch's differentiation, by parts, by samples."""

import math

import pytest
import torch
from torch.func import grad

from nn_adapters.pinn.loss import PINN, LocalPINN
from nn_adapters.pinn.network import Network
from nn_adapters.pinn.terms import Term
from pdeopt.core.errors import InputError
from pdeopt.functions.decomposition import Decomposition
from pdeopt.functions.smooth import Restriction
from tests.helpers.networks import network_by_formula
from tests.helpers.pinns import burgers, hard, make, points, soft, somewhere
from tests.helpers.support import relative


def oracle(function, theta):
    """The loss by its formula, all by torch."""
    total = 0.0
    for term in function.terms:
        net = network_by_formula(function.network, theta)

        def u(x, net=net):
            product = net(x) if function.factor is None else function.factor(x) * net(x)
            return product if function.lift is None else product + function.lift(x)

        def along(f, i):
            unit = torch.eye(2, dtype=torch.float64)[i]
            return lambda y: torch.func.jvp(f, (y,), (unit.expand_as(y),))[1]

        x = term.points
        d = {"x": along(u, 0)(x), "t": along(u, 1)(x), "xx": along(along(u, 0), 0)(x)}
        total = total + (term.weight * term.residual(u(x), d, x) ** 2).mean()
    return total


@pytest.mark.parametrize("make", [hard, soft])
def test_value_and_gradient_are_those_of_the_formula(make, monkeypatch):
    monkeypatch.setattr("nn_adapters.pinn.terms.JETS_IN_CACHE", 24 * 64)  # several chunks, of two sizes
    function = make()
    theta = somewhere(function)
    value, gradient = function.value_and_gradient(theta)
    assert value == pytest.approx(float(oracle(function, theta)), rel=1e-13)
    assert function.value(theta) == pytest.approx(value, rel=1e-14)
    assert relative(gradient, grad(lambda theta: oracle(function, theta))(theta)) < 1e-12
    direction = somewhere(function, 7)
    product = function.hvp(theta, direction)
    ahead, behind = (function.value_and_gradient(theta + e * direction)[1] for e in (1e-5, -1e-5))
    assert relative(product, (ahead - behind) / 2e-5) < 1e-6
    assert torch.dot(product, theta) == pytest.approx(float(torch.dot(function.hvp(theta, theta), direction)), rel=1e-9)


def test_calls_are_counted_with_their_costs():
    function = hard()
    theta = function.initial()
    function.value(theta), function.value_and_gradient(theta), function.value_and_gradient(theta)
    assert (function.tally.values, function.tally.gradients) == (1, 2)
    assert function.tally.work == pytest.approx(2 + function.costs.value) and 0.2 < function.costs.value < 0.5


@pytest.mark.parametrize("parts, overlap", [(4, 0), (2, 0), (2, 1), (3, 1), (1, 0)])
@pytest.mark.parametrize("make", [hard, soft])
def test_a_part_of_whole_layers_is_the_restriction(make, parts, overlap):
    function = make()
    theta, decomposition = somewhere(function), function.decompose(parts, overlap)
    for part in range(parts):
        local = function.local(decomposition, part, theta)
        expected = Restriction(function, decomposition.parts[part], theta)
        d = 0.1 * torch.randn(local.size, generator=torch.Generator().manual_seed(part), dtype=torch.float64)
        assert isinstance(local, LocalPINN)
        (f, g), (f0, g0) = local.value_and_gradient(d), expected.value_and_gradient(d)
        assert f == pytest.approx(f0, rel=1e-13) and local.value(d) == pytest.approx(f0, rel=1e-13)
        assert relative(g, g0) < 1e-12
        assert relative(local.hvp(d, d), expected.hvp(d, d)) < 1e-12


def test_parts_cost_what_is_evaluated():
    function = hard()
    theta, decomposition = somewhere(function), function.decompose(4)
    costs = []
    for part in range(4):
        before = function.tally.copy()
        local = function.local(decomposition, part, theta)
        cache = (function.tally - before).work
        local.value_and_gradient(torch.zeros(local.size, dtype=torch.float64))
        spent = function.tally - before
        assert spent.gradients == 1 and spent.work == pytest.approx(cache + local.costs.gradient)
        assert local.costs.value < local.costs.gradient
        costs.append((cache, local.costs.gradient))
    assert costs[0][0] == 0.0 and all(0 < cache < 0.15 for cache, _ in costs[1:])  # a layer at a time: the last is kept
    gradients = [gradient for _, gradient in costs]
    assert gradients == sorted(gradients, reverse=True) and gradients[0] < 1.0 and gradients[-1] < 0.4


def test_jets_before_a_part_are_found_again_where_earlier_layers_moved():
    function = hard()
    theta, decomposition = somewhere(function), function.decompose(4)
    zero = torch.zeros(len(decomposition.parts[3]), dtype=torch.float64)
    function.local(decomposition, 3, theta)
    for index in (0, int(decomposition.parts[2][0]), function.size - 1):
        moved = theta.clone()
        moved[index] += 0.3
        found = function.local(decomposition, 3, moved).value(zero)
        assert found == pytest.approx(function.value(moved), rel=1e-13)


def test_parts_that_are_no_layers_are_restrictions():
    function = hard()
    halves = Decomposition(function.size, list(torch.arange(function.size).split(function.size // 2 + 1)))
    assert isinstance(function.local(halves, 0, function.initial()), Restriction)


def test_more_parts_than_layers():
    with pytest.raises(InputError, match="got 5; legal: 1 to 4"):
        hard().decompose(5)
    assert sum(hard().layers) == hard().size and len(hard().layers) == 4


def test_the_mean_over_subsets_is_the_whole():
    function = soft()
    theta = somewhere(function)
    parts = [function.subset(part) for part in torch.arange(150).split(50)]
    values, gradients = zip(*(part.value_and_gradient(theta) for part in parts))
    value, gradient = function.value_and_gradient(theta)
    assert sum(values) / 3 == pytest.approx(value, rel=1e-13)
    assert relative(sum(gradients) / 3, gradient) < 1e-12
    assert all(part.tally is function.tally and part.samples == 50 for part in parts)
    assert 1 / 3 <= parts[0].costs.gradient < 0.5  # the second term is whole in each


def test_new_points():
    function = hard()
    theta, other = somewhere(function), points(40, 9)
    moved = function.with_points(other)
    expected = function.residuals(theta, other)
    assert moved.tally is function.tally and moved.costs.gradient == pytest.approx(40 / 150)
    assert moved.value(theta) == pytest.approx(float(expected.square().mean()), rel=1e-13)
    assert relative(moved.residuals(theta), expected) < 1e-13


def test_hard_constraints_hold_for_any_parameters():
    function = hard()
    x = points(20)
    x[:10, 1] = 0.0
    x[10:, 0] = torch.tensor([-1.0, 1.0], dtype=torch.float64).repeat(5)
    assert (function.predict(somewhere(function), x) + torch.sin(math.pi * x[:, 0])).abs().max() < 1e-15


def test_values_that_are_not_finite_are_told_as_such():
    function = hard()
    value, _ = function.value_and_gradient(torch.full((function.size,), 1e200, dtype=torch.float64))
    assert not math.isfinite(value)


@pytest.mark.parametrize(
    "words, message",
    [
        (dict(terms=[Term(torch.zeros(0, 2), burgers)]), "n > 0"),
        (dict(terms=[Term(torch.zeros(3, 1), burgers)]), "2"),
        (dict(terms=[Term(torch.full((3, 2), torch.nan), burgers)]), "finite"),
        (dict(terms=[Term(points(), burgers, ("xy",))]), r"xx \| xt"),
    ],
)
def test_bad_terms_are_named(words, message):
    with pytest.raises(InputError, match=message):
        make(**words)


def test_names_and_terms_must_be_there():
    network = Network(2, (3,))
    with pytest.raises(InputError, match="2 letters"):
        PINN(network, [Term(points(), burgers)], "x")
    with pytest.raises(InputError, match="at least one"):
        PINN(network, [], "xt")
