"""Smooth functions on PETSc vectors, and in scaled unknowns."""

import pytest
import torch
from petsc4py import PETSc

from pdeopt.control.verify import randomize, taylor_rates, taylor_remainders
from pdeopt.functions.petsc import PetscFunction
from pdeopt.functions.smooth import ScaledFunction, SmoothFunction
from tests.helpers.functions import start
from tests.helpers.support import entries, relative


class Quartic(SmoothFunction):
    """sum x^4 / 4 + (sum x)^2 / 2."""

    def _value_and_gradient(self, x):
        return float((x**4).sum() / 4 + x.sum() ** 2 / 2), x**3 + x.sum()

    def _hvp(self, x, d):
        return 3 * x**2 * d + d.sum()


def vector(size, seed):
    return randomize(PETSc.Vec().createSeq(size), seed)


def test_values_and_derivatives_are_those_of_the_function_and_counted_once():
    f, x, d, g = Quartic(8), vector(8, 1), vector(8, 2), vector(8, 3)
    expected, gradient = Quartic(8).value_and_gradient(entries(x))
    bridge = PetscFunction(f)
    assert bridge.value(x) == bridge.value_and_gradient(x, g) == expected and torch.equal(entries(g), gradient)
    assert torch.equal(entries(bridge.hvp(x, d, g)), Quartic(8).hvp(entries(x), entries(d)))
    assert (f.tally.values, f.tally.gradients, f.tally.hessian_products) == (1, 1, 1)


def test_taylor_remainders_of_any_smooth_function():
    remainders = taylor_remainders(Quartic(8), vector(8, 1), vector(8, 2), start=1e-2)
    for name, order in (("value", 1), ("gradient", 2), ("hessian", 3)):
        assert taylor_rates(remainders[name])[-1] == pytest.approx(order, abs=0.1)


def test_scaling_is_a_change_of_variables():
    """Of g(y) = f(y / s): the gradient is f' / s, the Hessian f'' / (s s'), also of its local functions."""
    f, s, y, d = Quartic(8), 1.0 + start(8, 2).abs(), start(8), start(8, 1)
    g = ScaledFunction(f, s)
    value, gradient = f.value_and_gradient(y / s)
    assert g.value(y) == value and torch.equal(g.value_and_gradient(y)[1], gradient / s)
    assert relative(g.hvp(y, d), f.hvp(y / s, d / s) / s) == 0.0
    parts = g.decompose(2)
    local, step = g.local(parts, 1, y), torch.full((len(parts.parts[1]),), 0.1, dtype=torch.float64)
    assert local.value(step) == pytest.approx(g.value(y + parts.prolong(1, step)), rel=1e-12)
    assert g.tally is f.tally
