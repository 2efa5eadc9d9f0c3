"""Weights of terms that follow their sizes."""

import pytest
import torch

from nn_adapters.pinn.balance import balanced_factors
from nn_adapters.pinn.loss import PINN
from nn_adapters.pinn.network import Network
from nn_adapters.pinn.terms import Term
from pdeopt.core.errors import InputError
from pdeopt.optimize.squares import LevenbergMarquardt
from tests.helpers.pinns import burgers, points, somewhere


def unbalanced(rule, weight=1e6):
    border = points(30, 5)
    border[:, 1] = 0.0
    start = Term(border, lambda u, d, x: u + x[:, 0], weight=weight)
    return PINN(Network(2, (6, 6)), [Term(points(), burgers, ("x", "t", "xx")), start], "xt", balance=rule)


def sizes(function, theta, rule):
    """Of the two terms, by the formulas."""
    r, J = function.linearize(theta)
    parts = [slice(0, 150), slice(150, 180)]
    if rule == "ntk":
        return [float(J[part].square().sum()) for part in parts]
    return [float((J[part].T @ r[part]).norm()) for part in parts]


@pytest.mark.parametrize("rule", ["ntk", "gradients"])
def test_sizes_become_equal_whatever_the_weights_are(rule):
    function = unbalanced(rule)
    theta = somewhere(function)
    first, second = sizes(function, theta, rule)
    assert second > 100.0 * first
    once = function.balanced(theta)
    assert once.factors[0] == 1.0 and once.factors[1] == pytest.approx((first / second) ** 0.5, rel=1e-9)
    for _ in range(40):
        function = function.balanced(theta)
    first, second = sizes(function, theta, rule)
    assert second == pytest.approx(first, rel=1e-6)
    other = unbalanced(rule, 1e-2)
    for _ in range(40):
        other = other.balanced(theta)
    assert other.value(theta) == pytest.approx(function.value(theta), rel=1e-6)


def test_methods_that_draw_points_balance_and_restart():
    """The weights are those of the last drawing, also after a restart; without a rule they are the user's."""
    function = unbalanced("ntk")
    found = LevenbergMarquardt(function, max_it=9, resample_every=3, rows=90)
    found.minimize(function.initial(0))
    assert found.function.factors[1] < 1e-2 and function.factors == (1.0, 1.0)
    again = function.recalled(found.function.sample_memory())
    assert again.factors == found.function.factors and again.value(found.x) == found.function.value(found.x)
    plain = unbalanced("none")
    assert plain.sample(function.initial(0), 60, 0).factors == (1.0, 1.0)


def test_work_is_counted_and_bad_rules_are_named():
    function = unbalanced("gradients")
    before = function.tally.work
    balanced_factors(function, function.initial(0), "gradients")
    assert 1.0 < function.tally.work - before < 3.0
    with pytest.raises(InputError, match=r"balance.*'adam'.*none \| ntk \| gradients"):
        unbalanced("adam")


def test_a_term_that_does_not_depend_on_the_network_has_no_size():
    constant = Term(points(10), lambda u, d, x: 0.0 * u + 1.0)
    function = PINN(Network(2, (4,)), [Term(points(), burgers, ("x", "t", "xx")), constant], "xt", balance="ntk")
    factors = function.balanced(somewhere(function)).factors
    assert factors == (1.0, 1.0) and torch.isfinite(torch.tensor(factors)).all()
