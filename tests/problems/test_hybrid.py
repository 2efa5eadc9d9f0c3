"""The planner's bytes are those of real runs, its choices what its formulas say, and its limits are kept."""

import json
import math

import numpy as np
import pytest
from torch import nn

from nn_adapters.parallel.counts import rabenseifner_sum
from pdeopt.steps.mgrit import MgritSettings
from problems.benchmarks import hybrid
from problems.benchmarks.hybrid_kfac import kfac_more, kfac_sent
from problems.benchmarks.hybrid_model import (
    DOMAIN,
    MODEL,
    Link,
    Planner,
    Rates,
    Split,
    crossover_batches,
    overtakes,
    stage_starts,
)
from problems.benchmarks.hybrid_networks import named, table_of
from problems.benchmarks.layer_model import LayerCosts, predict
from tests.helpers.hybrid_counts import (
    BATCH,
    WIDTHS,
    counted,
    data,
    domain,
    even_network,
    images,
    kfac,
    model,
    network,
    pipeline,
)

RATES = Rates(1e12, 1e12, 1e-5, 1e-11, 1, Link(1e-6, 1e10), Link(1e-6, 1e10))
FREE = Rates(1e9, 1e9, 0.0, 0.0, 1, Link(0.0, math.inf), Link(0.0, math.inf))


@pytest.mark.parametrize("ranks", [2, 4])
def test_bytes_are_those_of_real_runs(ranks):
    """Runs are in double precision; each message to an owner has 8 bytes more, its weight."""
    planner = Planner(table_of(network().float(), (WIDTHS[0],)), BATCH, FREE)
    predicted = planner.step(Split(data=ranks)).traffic.between.bytes
    assert sum(counted(data, ranks)) / ranks == 2 * predicted + 8 * (ranks - 1)
    predicted = planner.step(Split(group=ranks, kind=MODEL))
    assert list(predicted.kinds) == [MODEL] * 3
    assert counted(model, ranks) == [2 * predicted.group_traffic.bytes] * ranks
    assert counted(kfac, ranks) == kfac_sent(planner.table, ranks, width=8)


@pytest.mark.parametrize("ranks", [2, 4])
def test_bytes_of_stages_and_slabs_are_those_of_real_runs(ranks):
    """Those of the busiest rank, with two neighbors if there are as many; each message of a sum has 8 bytes more."""
    stages = Planner(table_of(even_network().float(), (16,)), BATCH, FREE).step(Split(stages=ranks, micro=4))
    assert max(counted(pipeline, ranks)) == (stages.stage_traffic.messages, 2 * stages.stage_traffic.bytes)
    body, last = images()
    table = table_of(nn.Sequential(body, nn.Flatten(), last), (2, 16, 16))
    slabs = Planner(table, BATCH, FREE).step(Split(group=ranks, kind=DOMAIN))
    halos, sums = zip(*counted(domain, ranks))
    assert max(halos) == 2 * slabs.group_traffic.bytes
    assert sum(sums) / ranks == 2 * slabs.traffic.between.bytes + 3 * 8 * (ranks - 1)


def test_kfac_sends_one_half_of_a_sum_of_its_factors_more():
    here = Planner(named("mlp"), 64, RATES)
    gradient = here.step(Split(data=4)).traffic.between.bytes
    more = kfac_more(here, 4)
    assert more.sent == 4 * here.table.factors.sum() * 3 / 4
    assert np.mean(kfac_sent(here.table, 4)) == pytest.approx(more.sent + gradient, abs=48.5)  # 8 bytes a message
    assert more.held == 8 * (785**2 + 500**2)


# -- tables of networks ----------------------------------------------------------------------------------------


def test_tables_have_the_numbers_of_the_papers():
    alexnet, mlp = named("alexnet"), named("mlp")
    assert alexnet.weights.sum() == 62_378_344  # without groups
    assert alexnet.inputs[5] == 256 * 6 * 6 and list(alexnet.rows) == [55, 27, 13, 13, 13, 1, 1, 1]
    assert alexnet.halo[0] == (11 - 4) * 3 * 227 + 1 * 96 * 55  # of the windows, and of the pooling
    assert mlp.weights.sum() == 785 * 500 + 501 * 500 + 501 * 10
    assert mlp.products.sum() == 784 * 500 + 500 * 500 + 5000
    assert named("odenet", (8,), 100).weights.sum() == 7200


def test_the_batch_at_which_model_and_data_send_as_much():
    table = named("mlp", (512, 512, 512, 512))
    for layer, batch in enumerate(crossover_batches(table)):
        ends = batch * (table.outputs[layer] + 2 * (layer > 0) * table.inputs[layer])
        assert ends == pytest.approx(2 * table.weights[layer])
    crossing = 2 * table.weights.sum() / (table.outputs + 2 * np.array([0, 1, 1]) * table.inputs).sum()
    for ranks in (4, 64):
        for factor in (0.5, 1.0, 2.0):
            here = Planner(table, crossing * factor, RATES)
            sent = here.step(Split(data=1, group=ranks, kind=MODEL)).group_traffic.bytes
            data = rabenseifner_sum(4 * table.weights.sum(), ranks).bytes
            assert sent / data == pytest.approx(factor)


# -- seconds ---------------------------------------------------------------------------------------------------


def test_free_messages_make_speedups_ideal():
    """Of what can be dealt out; a pipeline is idle for (p - 1)/m of its work."""
    free = Planner(named("odenet", (8,), 64), 256, FREE)
    one = free.step(Split()).seconds
    assert free.step(Split(data=16)).seconds == pytest.approx(one / 16)
    assert free.step(Split(group=8, kind=MODEL)).seconds == pytest.approx(one / 8)
    for micro in (1, 4, 16):
        found = free.step(Split(stages=4, micro=micro))
        assert found.seconds == pytest.approx(one / 4 * (micro + 3) / micro, rel=0.02)  # the first layer does less
        assert found.stage_traffic.messages == 2 * micro


def test_image_slabs_need_rows_and_send_halos():
    images = Planner(named("cnn"), 64, RATES)
    found = images.step(Split(group=4, kind=DOMAIN))
    assert list(found.kinds[:6]) == [DOMAIN] * 6 and DOMAIN not in found.kinds[6:]
    halo = images.table.halo[:6]
    gather = images.table.inputs[6] * 3 / 4
    assert found.group_traffic.bytes == 4 * 64 * (halo[0] + 2 * halo[1:].sum() + gather)
    assert images.step(Split(group=64, kind=DOMAIN)) is None


def test_layers_in_parallel_are_those_of_the_layer_model():
    free = Planner(named("odenet", (8,), 1024), 100, FREE)
    seconds = 64 * 100 / 1e9
    costs = LayerCosts((0.0, seconds), (0.0, 2 * seconds), 0.0, math.inf, 8, 100)
    assert free.step(Split(layers=4)).seconds == pytest.approx(predict(1024, 4, MgritSettings(3, "16"), costs))


def test_the_best_is_never_slower_than_a_split_of_one_kind_and_than_fewer_ranks():
    here = Planner(named("alexnet"), 512, RATES)
    before = math.inf
    for ranks in (1, 4, 64, 1024, 16_384):
        best = here.best(ranks).seconds
        assert best <= before and all(best <= step.seconds * (1 + 1e-12) for step in here.pure(ranks).values())
        before = best
    assert here.pure(1024).keys() == {"model"}  # more ranks than samples, layers and rows
    assert overtakes(here, [2**k for k in range(12)]) <= 1024


def test_memory_falls_where_weights_are_shared():
    here = Planner(named("mlp"), 64, FREE)
    whole, weights = here.step(Split()).memory, 12 * here.table.weights.sum()
    assert whole == weights + 4 * 64 * here.table.outputs.sum()
    assert here.step(Split(data=2)).memory == weights + (whole - weights) / 2
    assert here.step(Split(group=2, kind=MODEL)).memory == weights / 2 + (whole - weights)


@pytest.mark.parametrize("stages", [1, 2, 3, 7])
def test_stages_are_rows_of_layers_of_about_equal_work(stages):
    work = np.array([5.0, 1, 1, 1, 1, 1, 8])
    first = stage_starts(work, stages)
    assert first[0] == 0 and (np.diff([*first, len(work)]) > 0).all()
    assert np.add.reduceat(work, first).max() <= work.sum() / stages + work.max()


# -- the program -----------------------------------------------------------------------------------------------


def test_the_program_writes_its_table_and_picture(tmp_path, capsys):
    words = ["-network", "cnn", "-ranks", "256", "-rate", "1e12", "-node", "4"]
    rows = hybrid.main([*words, "-json", str(tmp_path / "rows.json"), "-plot", str(tmp_path / "plot.png")])
    assert len(json.loads((tmp_path / "rows.json").read_text())) == len(rows)
    assert (tmp_path / "plot.png").stat().st_size > 10_000
    assert "a hybrid is faster than data alone from" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["mlp", "-ranks", "1"], ["mlp", "-widths", "3", "2", "-ranks", "32"]])
def test_networks_that_nothing_can_be_gained_for(words, tmp_path):
    rows = hybrid.main(["-network", *words, "-rate", "1e12", "-plot", str(tmp_path / "plot.png")])
    assert rows[-1].measured is not None and (tmp_path / "plot.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    "words, message",
    [
        (["-ranks", "100"], "a power of two"),
        (["-network", "cnn", "-widths", "3"], "belongs to mlp"),
        (["-network", "mlp", "-widths", "3"], "two or more"),
        (["-latency", "0"], "numbers > 0"),
        (["-batch", "-1"], "numbers >= 0"),
        (["-check"], "with mlp and cnn"),
    ],
)
def test_bad_options_are_refused(words, message, capsys):
    with pytest.raises(SystemExit):
        hybrid.main(words)
    assert message in capsys.readouterr().err


def test_rates_are_measured(monkeypatch):
    """Of calls whose seconds are known: 1 ms, and 10 us a sample of the dense probe."""
    found = iter([1e-3 + 8e-5, 1e-3 + 512e-5, 1e-3 + 1e-5, 1e-3 + 8e-5, 2e-3])
    monkeypatch.setattr(hybrid, "cpu_seconds", lambda function, **words: next(found))
    rates = hybrid.measured_rates(RATES.inside, RATES.between, 1)
    assert rates.dense == pytest.approx((2 + 3) * 500 * 500 / 1e-5)
    assert rates.image == pytest.approx((2 + 3) * 16 * 16 * 64 * 64 * 9 / 1e-5)
    assert rates.call == pytest.approx(5e-4) and rates.update == pytest.approx(2e-9)
