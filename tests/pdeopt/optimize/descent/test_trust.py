"""Trust-region methods on whole functions and on batches."""

import math
from itertools import pairwise

import pytest
import torch

from pdeopt.core.errors import InputError
from pdeopt.core.monitor import Reason
from pdeopt.functions.minibatch import Batches
from pdeopt.functions.smooth import SmoothFunction
from pdeopt.optimize.descent.trust import TrustRegionMinimizer
from pdeopt.optimize.parts.trustregion import RatioRule, reduction_ratio
from tests.helpers.functions import Quadratic, quadratic, zeros
from tests.helpers.small_network import network


class Rosenbrock(SmoothFunction):
    """Chained, with its minimum 0 at ones; NaN far away."""

    def _terms(self, x):
        return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()

    def _value_and_gradient(self, x):
        x = x.detach().requires_grad_()
        f = self._terms(x)
        value = float(f.detach()) if x.detach().abs().max() < 3 else math.nan
        return value, torch.autograd.grad(f, x)[0]

    def _hvp(self, x, d):
        x = x.detach().requires_grad_()
        (g,) = torch.autograd.grad(self._terms(x), x, create_graph=True)
        return torch.autograd.grad(g, x, d)[0]


def test_an_exact_model_of_a_quadratic_needs_one_step():
    f = quadratic()
    run = TrustRegionMinimizer(f, model="hvp", radius=1e3, cg_rtol=1e-14, gtol=1e-10)
    result = run.minimize(zeros(f))
    assert result.reason == Reason.CONVERGED_OPTIMALITY and result.history[-1].iteration == 1
    assert torch.allclose(result.design, torch.linalg.solve(f.A, f.b), atol=1e-10)


def test_order_one_is_normalized_steepest_descent():
    f = quadratic()
    run = TrustRegionMinimizer(f, model="first", radius=1e-3, max_it=1, gtol=0.0)
    x = torch.ones(f.size, dtype=torch.float64)
    g = f.value_and_gradient(x)[1]
    assert torch.allclose(run.minimize(x).design - x, -1e-3 * g / g.norm(), rtol=1e-10)
    signs = TrustRegionMinimizer(f, model="first", norm="inf", radius=1e-3, max_it=1).minimize(x).design
    assert torch.allclose(signs - x, -1e-3 * g.sign(), rtol=1e-10)


@pytest.mark.parametrize("norm", ["2", "inf"])
@pytest.mark.parametrize("model, gtol", [("lsr1", 1e-8), ("hvp", 1e-8), ("first", 3.0)])
def test_it_finds_a_minimum_past_what_is_not_finite(model, gtol, norm):
    f = Rosenbrock(6)
    result = TrustRegionMinimizer(f, model=model, norm=norm, gtol=gtol, radius=10.0).minimize(-torch.ones(6).double())
    assert result.reason == Reason.CONVERGED_OPTIMALITY
    values = result.history["objective"]
    assert all(b <= a for a, b in pairwise(values)) and "rejected" in result.history["note"]
    assert gtol > 1 or f.value(result.design) < 1e-12


def test_lsr1_converges_superlinearly_on_a_quadratic():
    f = quadratic(20)
    result = TrustRegionMinimizer(f, memory=20, gtol=1e-8).minimize(zeros(f))
    assert result.reason == Reason.CONVERGED_OPTIMALITY and result.history[-1].iteration <= 35
    assert torch.allclose(result.design, torch.linalg.solve(f.A, f.b), atol=1e-7)


def test_the_first_radius_is_the_length_of_the_cauchy_step():
    f = quadratic()
    run = TrustRegionMinimizer(f, max_it=0)
    run.minimize(zeros(f))
    slope, curvature = float(f.b @ f.b), float(f.b @ f.A @ f.b)
    assert run.radius == pytest.approx(min(slope**1.5 / curvature, 1.0), rel=1e-6)


@pytest.mark.parametrize(
    "words",
    [
        dict(),
        dict(model="first", batch=20),
        dict(model="lsr1", batch=16, noise=0.5),
        dict(model="hvp", batch=20, overlap=0.2, norm="inf"),
        dict(model="first", window=4),
        dict(model="lsr1", batch=16, window=3),
    ],
)
def test_a_restart_goes_on_with_the_same_iterates(words):
    saved = {}

    def save(run, history):
        if history[-1].iteration == 4:
            saved.update(memory=run.memory(), records=list(history.records))

    f = network()
    whole = TrustRegionMinimizer(f, max_it=9, **words)
    expected = whole.minimize(f.parameters(), observers=[save])
    f = network()
    rest = TrustRegionMinimizer(f, max_it=9, **words)
    found = rest.minimize(zeros(f), memory=saved["memory"], history=type(expected.history)(saved["records"]))
    assert torch.equal(found.design, expected.design) and torch.equal(rest.x, whole.x)
    assert found.history["objective"] == expected.history["objective"]
    assert found.history["work"] == pytest.approx(expected.history["work"])


def test_batches_go_through_all_samples_and_share_some():
    f = network(60)
    batches = Batches(f, 20, 0.25, seed=3)
    x = f.parameters()
    at, seen = batches.evaluate(x), []
    for _ in range(3):
        pieces = batches._pieces
        assert [len(piece) for piece in pieces] == ([5, 10, 5] if seen else [15, 5])
        direct = batches.batch.value_and_gradient(x)
        assert at.f == pytest.approx(direct[0], rel=1e-13) and torch.allclose(at.g, direct[1], atol=1e-15)
        seen += pieces if not seen else pieces[1:]
        before = f.tally.work
        at = batches.advance(x, at)
        assert torch.equal(batches._pieces[0], pieces[-1])
        assert f.tally.work - before == pytest.approx(15 / 60)  # values at common samples are kept
    drawn = torch.cat(seen)[:60].sort().values
    assert torch.equal(drawn.unique(), drawn)


def test_noisy_batches_grow_to_all_samples():
    f = network(60)
    run = TrustRegionMinimizer(f, model="first", batch=10, noise=0.3, max_it=40)
    result = run.minimize(f.parameters())
    assert run.batches.whole and run.batches.batch is f
    assert f.value(result.design) < f.value(f.parameters())


def test_what_batches_return_is_never_worse_than_the_start():
    f = network()
    best = TrustRegionMinimizer(f, max_it=200, gtol=1e-3).minimize(f.parameters()).design
    found = TrustRegionMinimizer(f, model="first", batch=4, radius=5.0, smallest=5.0, max_it=5).minimize(best).design
    assert torch.equal(found, best)


def test_a_start_that_is_not_finite_is_a_reason():
    f = Rosenbrock(4)
    result = TrustRegionMinimizer(f).minimize(torch.full((4,), 9.0, dtype=torch.float64))
    assert result.reason == Reason.DIVERGED_NAN


def test_a_radius_that_vanishes_is_a_reason():
    class Wrong(Quadratic):
        def _value_and_gradient(self, x):
            value, gradient = super()._value_and_gradient(x)
            return value, -gradient

    f = quadratic()
    f = Wrong(f.A, f.b)
    start = torch.ones(8, dtype=torch.float64)
    result = TrustRegionMinimizer(f, model="first").minimize(start)
    assert result.reason == Reason.DIVERGED_STAGNATION and torch.equal(result.design, start)


@pytest.mark.parametrize(
    "words, message",
    [
        (dict(model="third"), "first | metric | lsr1 | hvp"),
        (dict(norm="1"), "2 | inf"),
        (dict(memory=0), ">= 1"),
        (dict(batch=5), "no samples"),
        (dict(overlap=0.7), "<= 0.5"),
        (dict(learning_rate=1), "learning_rate"),
    ],
)
def test_bad_settings_are_named(words, message):
    f = quadratic()
    with pytest.raises(InputError, match=message.replace("|", r"\|")):
        TrustRegionMinimizer(f, **words).minimize(zeros(f))


def test_the_radius_rule():
    rule = RatioRule(smallest=0.1, largest=4.0)
    assert rule.after(0.9, 1.0, 1.0) == 2.0 and rule.after(0.9, 1.0, 0.5) == 1.0
    assert rule.after(0.5, 1.0, 1.0) == 1.0 and rule.after(0.1, 1.0, 0.6) == 0.3
    assert rule.after(math.nan, 0.1, 0.1) == 0.1 and rule.after(0.9, 3.0, 3.0) == 4.0
    assert reduction_ratio(1.0, math.nan, 1.0) == -math.inf == reduction_ratio(1.0, 0.5, math.nan)
    assert reduction_ratio(1.0, 0.5, 1.0) == 0.5 and reduction_ratio(1.0, 1.0 + 2e-16, 1e-17) == 1.0


def test_a_window_takes_steps_that_go_up_and_returns_the_best_point():
    """A long curved valley: along it the highest of five values may be kept up with."""

    class Valley(SmoothFunction):
        def _value_and_gradient(self, x):
            a, b = float(x[0]), float(x[1])
            g = torch.tensor([-400.0 * a * (b - a * a) - 2.0 * (1.0 - a), 200.0 * (b - a * a)], dtype=torch.float64)
            return 100.0 * (b - a * a) ** 2 + (1.0 - a) ** 2, g

    start = torch.tensor([-1.2, 1.0], dtype=torch.float64)
    plain = TrustRegionMinimizer(Valley(2), max_it=60, gtol=1e-12).minimize(start)
    values = plain.history["objective"]
    assert all(after <= before for before, after in pairwise(values))
    windowed = TrustRegionMinimizer(Valley(2), max_it=60, gtol=1e-12, window=5).minimize(start)
    values = windowed.history["objective"]
    assert any(after > before for before, after in pairwise(values))
    assert all(values[k] <= max(values[max(k - 5, 0) : k]) for k in range(1, len(values)))
    assert Valley(2).value(windowed.design) == min(values)
    rejected = [sum("rejected" in note for note in run.history["note"]) for run in (plain, windowed)]
    assert rejected[1] < rejected[0]
