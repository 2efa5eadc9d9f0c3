"""Additively preconditioned trust regions."""

import json
from itertools import pairwise

import pytest
import torch

from pdeopt.core.errors import InputError
from pdeopt.functions.decomposition import Decomposition
from pdeopt.optimize.descent.apts import APTS
from pdeopt.optimize.descent.trust import TrustRegionMinimizer
from pdeopt.optimize.parts.trustsubproblem import length
from problems import apts_cifar, apts_mnist
from tests.helpers.functions import quadratic, zeros
from tests.helpers.small_network import network

ALONE = dict(local_it=1, global_it=0, overlap=0.5)
WAYS = [dict(weights=3), dict(data=2), dict(weights=2, data=3)]


@pytest.mark.parametrize("norm", ["2", "inf"])
@pytest.mark.parametrize("words", [dict(model="first"), dict(), dict(model="hvp"), dict(model="lsr1", batch=20)])
def test_one_part_and_no_global_step_is_the_plain_trust_region(words, norm):
    f = network()
    plain = TrustRegionMinimizer(f, max_it=8, norm=norm, **words).minimize(f.parameters())
    apts = APTS(f, max_it=8, norm=norm, **ALONE, **words).minimize(f.parameters())
    assert torch.equal(apts.design, plain.design)
    assert apts.history["objective"] == plain.history["objective"]
    assert apts.history["work"] == pytest.approx(plain.history["work"])


@pytest.mark.parametrize("words", WAYS)
def test_local_functions_are_consistent_of_first_order(words):
    f = network()
    run = APTS(f, max_it=0, **words)
    run.minimize(f.parameters())
    for part, indices in enumerate(run.decomposition.parts):
        values = []
        for data in range(run.settings.data):
            local, z, value, _ = run._local(part, data)
            found, gradient = local.value_and_gradient(z)
            assert found == pytest.approx(value, rel=1e-12)
            assert (gradient - run.g[indices]).norm() <= 1e-12 * run.g.norm()
            values.append(value)
        assert sum(values) / len(values) == pytest.approx(run.f, rel=1e-12)


@pytest.mark.parametrize("norm", ["2", "inf"])
@pytest.mark.parametrize("words", [*WAYS, dict(weights=3, local_it=1), dict(data=4, local_it=7)])
def test_the_sum_of_local_steps_stays_within_the_radius(words, norm):
    f = network()

    for overlap in (0, 1):
        given = f.decompose(words["weights"], overlap) if "weights" in words else None
        run = APTS(f, norm=norm, max_it=4, decomposition=given, **words)
        attempt, reached = run.method.attempt, []

        def watched(d, predicted, run=run, attempt=attempt, reached=reached):
            reached.append(length(f, d, norm) / run.method.radius)
            return attempt(d, predicted)

        run.method.attempt = watched
        run.minimize(f.parameters())
        assert 0.1 < max(reached) <= 1 + 1e-10


@pytest.mark.parametrize("model", ["first", "lsr1", "hvp"])
@pytest.mark.parametrize("words", WAYS)
def test_it_goes_down_with_every_kind_of_parts(words, model):
    f = network()
    result = APTS(f, model=model, max_it=15, global_it=1, **words).minimize(f.parameters())
    values = result.history["objective"]
    assert all(b <= a for a, b in pairwise(values)) and values[-1] < 0.93 * values[0]


def test_parts_of_a_separable_quadratic_are_solved_at_once():
    """Blocks that do not interact: local solves are the solve."""
    f = quadratic(9)
    mask = torch.block_diag(*[torch.ones(3, 3, dtype=torch.float64)] * 3)
    f.A = f.A * mask
    parts = Decomposition(9, [torch.arange(k, k + 3) for k in (0, 3, 6)])
    run = APTS(f, model="hvp", decomposition=parts, radius=1e3, cg_rtol=1e-14, global_it=0, local_it=1, gtol=1e-10)
    result = run.minimize(zeros(f))
    assert result.history[-1].iteration == 1
    assert torch.allclose(result.design, torch.linalg.solve(f.A, f.b), atol=1e-10)


def test_all_calls_are_counted():
    f = network()
    run = APTS(f, data=2, local_it=3, global_it=0, max_it=1, model="first", radius=1e-3)
    run.minimize(f.parameters())
    spent = run.spent()
    assert spent.gradients == 2 + 2 * 2 + 2  # start, two local steps of each half, trial
    assert spent.work == pytest.approx(1 + 2 + 1)


@pytest.mark.parametrize("words", [dict(data=2, weights=2), dict(data=2, batch=24, model="first", global_it=1)])
def test_a_restart_goes_on_with_the_same_iterates(words):
    saved = {}

    def save(run, history):
        if history[-1].iteration == 3:
            saved.update(memory=run.memory(), history=type(history)(list(history.records)))

    f = network()
    expected = APTS(f, max_it=6, **words).minimize(f.parameters(), observers=[save])
    f = network()
    found = APTS(f, max_it=6, **words).minimize(zeros(f), **saved)
    assert torch.equal(found.design, expected.design)
    assert found.history["objective"] == expected.history["objective"]


@pytest.mark.parametrize(
    "words, message",
    [
        (dict(weights=7), "1 to 3"),
        (dict(data=20), "at least 4 for each"),
        (dict(local_it=0), ">= 1"),
        (dict(data=0), ">= 1"),
    ],
)
def test_bad_parts_are_named(words, message):
    f = network()
    with pytest.raises(InputError, match=message):
        APTS(f, **words).minimize(f.parameters())


def test_parts_of_samples_need_samples():
    f = quadratic()
    with pytest.raises(InputError, match="SampledFunction"):
        APTS(f, data=2).minimize(zeros(f))


def test_the_networks_have_the_published_numbers_of_parameters():
    assert sum(p.numel() for p in apts_mnist.network().parameters()) == 26_506
    assert sum(p.numel() for p in apts_cifar.network().parameters()) == 62_006


def test_the_script_trains(tmp_path):
    pytest.importorskip("sklearn")
    file = tmp_path / "run.json"
    words = ["-data", "digits", "-opt_max_work", "15", "-apts_data", "2", "-summary", str(file)]
    accuracy = apts_mnist.main(words)
    summary = json.loads(file.read_text())
    assert accuracy == summary["test_accuracy"] > 0.8 and 15 <= summary["work"] < 18
    for other in ("tr", "lbfgs", "sgd", "adam"):
        assert apts_mnist.main(["-data", "digits", "-opt_max_work", "6", "-optimizer", other]) > 0.25
    with pytest.raises(InputError, match="apts"):
        apts_mnist.main(["-data", "digits", "-optimizer", "newton"])
