"""ASTROM: the coarse model against dense matrices, samples that grow, batch trust region as a special case."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from nn_adapters.losses.logistic import LogisticLoss
from pdeopt.core.errors import InputError
from pdeopt.core.monitor import Reason
from pdeopt.optimize.descent.astrom import ASTROM, around
from pdeopt.optimize.descent.trust import TrustRegionMinimizer
from pdeopt.optimize.parts.inversehessian import LimitedMemory
from tests.helpers.functions import Quadratic, bfgs_update, hessian, zeros
from tests.helpers.logistic import logistic_loss, newton_optimum


def points(solver, start):
    """All points of a run with their gradients, sizes of the samples, and the result."""
    found = []
    result = solver.minimize(start, observers=[lambda s, _: found.append((s.x.clone(), s.g.clone(), s.samples))])
    return found, result


def test_two_loops_around_a_matrix_are_bfgs_from_that_matrix():
    q = Quadratic.random(5)
    pairs, H = LimitedMemory(q, 3), torch.linalg.inv(q.A + torch.eye(5).double())
    first = H.clone()
    generator = torch.Generator().manual_seed(0)
    for s in torch.randn(3, 5, generator=generator, dtype=torch.float64):
        assert pairs.update(s, q.A @ s)
        H = bfgs_update(H, s, q.A @ s)
    g = torch.randn(5, generator=generator, dtype=torch.float64)
    assert torch.allclose(around(pairs, g, lambda v: first @ v), H @ g, rtol=1e-12, atol=1e-12)
    assert around(pairs, g, lambda v: None) is None


@pytest.mark.parametrize("sampling", ["uniform", "curvature"])
def test_steps_are_those_of_bfgs_from_the_hessian_of_the_sample(sampling):
    f = logistic_loss(N=80, regularization=0.1)
    solver = ASTROM(f, share=0.4, sampling=sampling, radius=1e3, error=10.0, cg_rtol=1e-14, cg_max_it=30, gtol=1e-9)
    found, result = points(solver, zeros(f))
    u = torch.rand(80, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    pairs = []
    for (x, g, samples), (after, g_after, _) in pairwise(found):
        if sampling == "uniform":
            part = f.subset(u.argsort()[:samples].sort()[0])
        else:
            part = solver._nested.of_size(samples, x)
        H = torch.linalg.inv(hessian(part, x))
        for s, y in pairs[-5:]:
            H = bfgs_update(H, s, y)
        assert torch.allclose(after - x, -H @ g, rtol=1e-9, atol=1e-14)
        pairs.append((after - x, g_after - g))
    assert result.converged and len(found) > 4 and {samples for *_, samples in found} == {32}


def test_all_samples_are_batch_trust_region():
    f = logistic_loss(N=60, n=8, regularization=1e-3)
    words = dict(radius=0.3, cg_rtol=0.05, gtol=1e-10)
    found, result = points(ASTROM(f, share=1.0, **words), zeros(f))
    expected = []
    batch = TrustRegionMinimizer(f, model="hvp", grow=3.0, **words)
    reference = batch.minimize(zeros(f), observers=[lambda s, _: expected.append(s.x.clone())])
    assert torch.equal(torch.stack([x for x, *_ in found]), torch.stack(expected))
    assert result.history["hessian_products"] == reference.history["hessian_products"]
    assert result.converged


def test_poor_ratios_let_the_sample_grow_until_it_is_all():
    f = logistic_loss(N=400)
    solver = ASTROM(f, error=1e-6, growth=3.0, gtol=1e-12)
    found, result = points(solver, zeros(f))
    sizes = [samples for *_, samples in found]
    assert sizes[:5] == [4, 12, 36, 108, 324] and sizes[-1] == 400 and result.converged
    assert torch.allclose(result.design, newton_optimum(f), atol=1e-10)


@pytest.mark.parametrize("ratio, size", [(1.0, 10), (0.75, 10), (0.4, 40), (0.55, 23), (-np.inf, 40), (2.0, 40)])
def test_the_next_sample_follows_the_error_of_the_ratio(ratio, size):
    f = logistic_loss(N=1000)
    solver = ASTROM(f, error=0.3, growth=4.0)
    solver.start(zeros(f))
    assert solver.samples == 10
    solver._grow(ratio)
    assert solver.samples == size


@pytest.mark.parametrize("words", [dict(), dict(memory=0), dict(sampling="uniform"), dict(share=0.1, radius=100.0)])
def test_runs_go_down_to_the_optimum_with_a_gradient_an_iteration(words):
    f = logistic_loss(N=300, n=10, seed=3)
    f.tally.work = 0.0
    result = ASTROM(f, gtol=1e-9, **words).minimize(zeros(f))
    values = result.history["objective"]
    assert result.converged and all(a >= b for a, b in pairwise(values))
    assert torch.allclose(result.design, newton_optimum(f), atol=1e-6)
    assert result.history["gradients"] == list(range(1, len(values) + 1)) and not result.history[-1].values


def test_less_work_than_batch_trust_region():
    f = logistic_loss(N=2000, n=30, seed=1)
    norm = f.norm(f.value_and_gradient(zeros(f))[1])
    work = {share: ASTROM(f, share=share, gtol=1e-6 * norm).minimize(zeros(f)).history[-1] for share in (0.01, 1.0)}
    assert work[0.01].work < 0.7 * work[1.0].work


def test_a_restart_gives_the_same_iterates():
    whole, _ = points(ASTROM(logistic_loss(N=300), share=0.05, gtol=1e-8), zeros(logistic_loss()))
    first = ASTROM(logistic_loss(N=300), share=0.05, gtol=1e-8, max_it=4)
    half = first.minimize(zeros(logistic_loss()))
    second, rest = ASTROM(logistic_loss(N=300), share=0.05, gtol=1e-8, seed=7), []
    result = second.minimize(
        zeros(logistic_loss()),
        memory=first.memory(),
        history=half.history,
        observers=[lambda s, _: rest.append(s.x.clone())],
    )
    assert torch.equal(torch.stack(rest), torch.stack([x for x, *_ in whole[4:]]))
    assert result.converged and result.history[-1].gradients == len(whole)


class Cliff(LogisticLoss):
    """NaN beyond |x| = 1/2."""

    def _value_and_gradient(self, x):
        value, g = super()._value_and_gradient(x)
        return (value, g) if float(x @ x) < 0.25 else (float("nan"), g)


def test_trials_that_are_not_finite_are_rejected():
    f = logistic_loss(N=100)
    cliff = Cliff(f.rows, f.labels)
    result = ASTROM(cliff, radius=10.0, max_it=60).minimize(zeros(f))
    assert result.reason in (Reason.DIVERGED_MAX_IT, Reason.DIVERGED_STAGNATION)
    assert np.isfinite(result.objective) and result.objective < result.history[0].objective
    assert any("rejected" in note for note in result.history["note"])


def test_bad_input_is_named():
    with pytest.raises(InputError, match="SampledFunction"):
        ASTROM(Quadratic.random(3))
    with pytest.raises(InputError, match="share"):
        ASTROM(logistic_loss(), share=0.0)
    with pytest.raises(InputError, match="memory"):
        ASTROM(logistic_loss(), memory=-1)
    assert ASTROM().settings.share == 0.01
