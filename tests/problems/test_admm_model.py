"""The model of training by splitting counts what real runs do."""

from itertools import pairwise

import pytest
import torch

from nn_adapters.splitting import SplitTrainingSettings, StreamedLayers, WholeLayers
from pdeopt.core.messages import even_parts
from problems.benchmarks.admm_model import Costs, Prediction, streaming_counts, whole_counts
from problems.benchmarks.admm_work import published_network
from tests.helpers.threads import on_threads

WIDTHS, SAMPLES = (20, 12, 9, 7, 3), 50


def counted(form, team):
    """Products, solves and bytes of each of two iterations."""
    rank, ranks = (0, 1) if team is None else (team.rank, team.size)
    parts = even_parts(SAMPLES, ranks)
    own = slice(sum(parts[:rank]), sum(parts[: rank + 1]))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(SAMPLES, WIDTHS[0], generator=generator, dtype=torch.float64)
    y = torch.randint(0, WIDTHS[-1], (SAMPLES,), generator=generator)
    settings = SplitTrainingSettings(form=form, batch=SAMPLES, precision="float64")
    words = (published_network(WIDTHS), x[own], y[own], settings, team)
    splitting = StreamedLayers(2, *words) if form == "streaming" else WholeLayers(*words)
    found = [(splitting.work.products, splitting.work.solves, splitting.work.bytes)]
    if form == "streaming":
        found[0] = (0.0, 0.0, 0)  # its first forward pass is one of the first iteration
    for iteration in (1, 2):
        for block in splitting.sweep(iteration):
            splitting.update(block)
        splitting.ascend()
        found.append((splitting.work.products, splitting.work.solves, splitting.work.bytes))
    return [tuple(now - then for now, then in zip(after, before)) for before, after in pairwise(found)]


@pytest.mark.parametrize("form", ["seed", "streaming"])
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_counts_are_those_of_real_runs(form, ranks):
    real = [counted(form, None)] if ranks == 1 else on_threads(ranks, lambda team: counted(form, team))
    for rank, iterations in enumerate(real):
        for place, found in enumerate(iterations):
            if form == "seed":
                model = whole_counts(WIDTHS, SAMPLES, ranks, rank, 8, first=place == 0)
            else:
                model = streaming_counts(WIDTHS, even_parts(SAMPLES, ranks)[rank], ranks, rank, 8)
            assert found == pytest.approx((model.products, model.solves, model.sent), rel=1e-13)


def test_predictions_are_sums_of_parts():
    """Free messages and solves leave the local work; solves alone are shared down to a row and a factor."""
    linear = [(1, 1.0), (10, 10.0), (100, 100.0)]
    free = Prediction((3, 4, 2), Costs(linear, [0.0, 0.0], [(0.0, 0.0)] * 2, 0.0, 0.0, 1e30))
    assert [free.iteration(1000, ranks).seconds for ranks in (1, 10, 50)] == pytest.approx([1000, 100, 20])
    solves = Prediction((3, 4, 2), Costs([(1, 0.0), (2, 0.0)], [5.0, 3.0], [(0.0, 1.0)] * 2, 0.0, 0.0, 1e30))
    assert solves.iteration(10, 1).seconds == 3 + 4 + 2  # the first matrix stays
    assert solves.iteration(10, 4).seconds == 3 + 1 + 1
    assert solves.iteration(10, 4, published=True).seconds == 8 + 6
    slow = Prediction((3, 4, 2), Costs(linear, [0.0, 0.0], [(0.0, 0.0)] * 2, 0.0, 1.0, 1e30))
    assert slow.crossover(64, [2**k for k in range(7)], "messages") == 8
