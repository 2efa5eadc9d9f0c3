"""Gradients that are not those of f, and f and x in any unit: every optimizer ends soon, or converges alike."""

import numpy as np
import pytest
import torch

import pdeopt as po
from pdeopt.core.monitor import Reason
from pdeopt.functions.hierarchy import Hierarchy, Transfer
from pdeopt.functions.smooth import SampledFunction
from pdeopt.optimize.descent.adam import Adam
from pdeopt.optimize.parts.progress import SETTLED, Doubt, Stagnation
from tests.helpers.functions import Quadratic, Rosenbrock, start, zeros

METHODS = [
    (po.LBFGS, {}),
    (po.LBFGS, dict(line_search="armijo")),
    (po.LBFGS, dict(line_search="cubic")),
    (po.SSBroyden, {}),
    (po.SPQN, {}),
    (po.SPQN, dict(type="multiplicative")),
    (po.SPQN, dict(sync="line", local="ssbroyden", method="ssbroyden")),
    (po.TrustRegionMinimizer, {}),
    (po.TrustRegionMinimizer, dict(norm="inf", model="first")),
    (po.APTS, {}),
    (po.APTS, dict(weights=3)),
    (po.MGOPT, {}),
    (po.RMTR, {}),
]

FAST = [
    (po.LBFGS, {}),
    (po.SSBroyden, {}),
    (po.SPQN, dict(parts=2, local_it=1)),
    (po.TrustRegionMinimizer, {}),
    (po.APTS, {}),
    (po.RMTR, {}),
]


class Scaled(Rosenbrock):
    """unit f(x / length), with the factors `wrong` of the gradient's entries."""

    def __init__(self, size, unit=1.0, length=1.0, wrong=1.0):
        super().__init__(size)
        self.unit, self.length, self.wrong = unit, length, wrong

    def _value_and_gradient(self, x):
        value, gradient = super()._value_and_gradient(x / self.length)
        return self.unit * value, self.unit / self.length * self.wrong * gradient


class Samples(SampledFunction):
    """The mean of (a.x - 1)^2 over the rows a, times unit, with a factor of its gradient."""

    def __init__(self, A, unit=1.0, wrong=1.0, tally=None):
        super().__init__(A.shape[1], len(A), tally=tally)
        self.A, self.unit, self.wrong = A, unit, wrong

    def _value_and_gradient(self, x):
        r = self.A @ x - 1.0
        return self.unit * float(r @ r) / len(r), self.wrong * 2.0 * self.unit / len(r) * (self.A.T @ r)

    def _hvp(self, x, d):
        return self.wrong * 2.0 * self.unit / len(self.A) * (self.A.T @ (self.A @ d))

    def subset(self, indices):
        return Samples(self.A[indices], self.unit, self.wrong, self.tally)


def rows(seed=0):
    return torch.randn(40, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


SAMPLED = [(po.ASTROM, dict(sampling="uniform")), (po.MLVR, dict(sampling="uniform")), (po.APTS, dict(data=2))]


def ends_soon(result, f, first):
    calls = f.tally.values + f.tally.gradients + f.tally.hessian_products
    last = result.history[-1]
    return (
        result.reason == Reason.DIVERGED_STAGNATION
        and "check the derivatives" in result.message
        and "verify" in result.message
        and calls < 200
        and result.objective <= first
        and (last.values, last.gradients) == (f.tally.values, f.tally.gradients)
    )


@pytest.mark.parametrize("method, words", [*METHODS, (Adam, {})])
def test_the_wrong_sign_ends_a_run(method, words):
    for x in (torch.zeros(10), start(10)):
        f = Scaled(10, wrong=-1.0)
        result = method(f, **words).minimize(x)
        assert ends_soon(result, f, Rosenbrock(10).value(x)), (result.message, f.tally)
        assert torch.equal(result.design, x.double()), "no point above the start"


@pytest.mark.parametrize("method, words", SAMPLED)
def test_the_wrong_sign_ends_a_run_on_samples(method, words):
    f = Samples(rows(), wrong=-1.0)
    assert ends_soon(method(f, **words).minimize(zeros(f)), f, 1.0)


@pytest.mark.parametrize("method", (po.MGOPT, po.RMTR))
def test_the_wrong_sign_ends_a_run_on_levels(method):
    f = Hierarchy([Scaled(8, wrong=-1.0), Scaled(4, wrong=-1.0)], [Transfer.aggregates(torch.arange(8) // 2)])
    assert ends_soon(method(f).minimize(zeros(f)), f, 7.0)


@pytest.mark.parametrize("method", (po.LBFGS, po.SSBroyden, po.TrustRegionMinimizer, po.APTS))
def test_other_wrong_gradients_end_a_run(method):
    """A constant function, a kink, a gradient that points elsewhere: never up, and never for long."""

    class Constant(Rosenbrock):
        def _value_and_gradient(self, x):
            return 5.0, torch.ones_like(x)

    class Kink(Rosenbrock):
        def _value_and_gradient(self, x):
            return float((x - 0.3).abs().sum()), (x - 0.3).sign()

    alternating = Scaled(10, wrong=torch.tensor([1.0, -1.0] * 5).double())
    for f in (Constant(10), Kink(10), alternating):
        result = method(f).minimize(torch.zeros(10))
        assert f.tally.gradients < 500 and (result.reason == Reason.DIVERGED_STAGNATION or isinstance(f, Kink))
        assert result.objective <= result.history[0].objective


@pytest.mark.parametrize("method, words", FAST)
@pytest.mark.parametrize("unit", (1e-200, 1e12, 1e200))
def test_the_unit_of_the_function_does_not_matter(method, words, unit):
    first = method(Scaled(4), **words).minimize(torch.zeros(4))
    f = Scaled(4, unit)
    result = method(f, **words).minimize(torch.zeros(4))
    assert first.converged and result.converged and result.objective < 1e-12 * unit
    assert (result.design - 1.0).abs().max() < 1e-5 and result.iterations < 2 * first.iterations + 20
    assert result.history[0].objective == pytest.approx(3.0 * unit) and result.history[-1].work == f.tally.work


def test_a_power_of_two_changes_no_bit_of_the_iterates():
    one, other = (po.LBFGS(Scaled(4, 2.0**k)).minimize(torch.zeros(4)) for k in (300, -300))
    assert torch.equal(one.design, other.design)
    assert np.array_equal(np.array(one.history["objective"]) * 2.0**-600, other.history["objective"])


@pytest.mark.parametrize("method, words", SAMPLED)
@pytest.mark.parametrize("unit", (1e-200, 1e200))
def test_the_unit_does_not_matter_on_samples(method, words, unit):
    expected = torch.linalg.lstsq(rows(), torch.ones(40).double()).solution
    result = method(Samples(rows(), unit), **words).minimize(torch.zeros(6))
    assert result.converged and (result.design - expected).abs().max() < 1e-5


@pytest.mark.parametrize("method, words", FAST)
@pytest.mark.parametrize("length", (1e-8, 1e8))
def test_the_unit_of_the_unknowns_does_not_matter(method, words, length):
    for x in (torch.zeros(4).double(), start(4) * length):
        result = method(Scaled(4, length=length), **words).minimize(x)
        assert result.converged and (result.design / length - 1.0).abs().max() < 1e-5, result.message


def test_a_tolerance_is_relative_unless_it_is_given():
    f, x = Quadratic.random(8), start(8)
    first = f.norm(f.value_and_gradient(x)[1])

    def last(**words):
        return po.LBFGS(f, **words).minimize(x).history[-1].optimality

    assert last() <= 1e-8 * first < last(rtol=1e-2) <= 1e-2 * first
    assert last(gtol=1e-12) <= 1e-12 and 1e-8 * first < last(gtol=0.1) <= 0.1
    assert last(gtol=0.1, rtol=1e-9) == last(gtol=0.1), "of both, what is met first"


@pytest.mark.parametrize("method", (po.LBFGS, po.SSBroyden, po.TrustRegionMinimizer, po.APTS))
def test_a_minimum_to_rounding_is_one(method):
    """From its result a run converges at once, but not if it was to meet an absolute tolerance that rounding hides."""

    class Waves(Rosenbrock):
        def _value_and_gradient(self, x):
            return float(((x - 1.0) ** 2 + x.sin() + 0.7).sum()), 2.0 * (x - 1.0) + x.cos()

    found = method(Waves(4)).minimize(torch.zeros(4))
    again = method(Waves(4)).minimize(found.design)
    assert found.converged and again.converged and again.objective <= found.objective
    assert method(Waves(4), gtol=1e-30).minimize(found.design).reason in (Reason.DIVERGED_STAGNATION, 2)


def test_messages_name_the_options_at_hand():
    limited = po.LBFGS(Rosenbrock(4), max_it=1, prefix="my_").minimize(torch.zeros(4))
    assert "-my_opt_max_it" in limited.message and "-sqp" not in limited.message and "-tao" not in limited.message


def test_doubt_needs_contradictions_in_a_row():
    doubt = Doubt()
    for _ in range(SETTLED - 1):
        doubt.judge(1.0, 1.5, -1.0, lambda: -1.0)
    assert not doubt.is_settled and doubt.shrink < 1.0
    doubt.judge(1.0, 1.5, -1.0, lambda: 1.0)  # there is a minimum on the way
    assert doubt.count == 0 and doubt.shrink == 1.0
    doubt.judge(1.0, 1.0 + 1e-14, -1e-14, lambda: -1e-14)  # rounding errors
    doubt.judge(1.0, float("nan"), -1.0, lambda: -1.0)
    assert doubt.count == 0


def test_stagnation_is_counted_from_the_last_gain():
    class Row:
        def __init__(self, objective, optimality):
            self.objective, self.optimality = objective, optimality

    stagnation = Stagnation()
    assert not any(stagnation.take(Row(1.0 + 1e-17 * k, 1.0 + k)) for k in range(20))
    assert stagnation.take(Row(1.0, 0.99 + 1.0)) and not stagnation.take(Row(1.0, 0.5))
