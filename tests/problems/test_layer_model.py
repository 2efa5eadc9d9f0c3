"""The layer-parallel model's calls and messages are those of real runs."""

import json

import numpy as np
import pytest

from pdeopt.steps.mgrit import MgritSettings
from pdeopt.steps.transfer import level_offsets, whole_intervals
from problems.benchmarks import video_model
from problems.benchmarks.layer_model import LayerClocks, LayerCosts, predict, schedule
from tests.helpers import sample_counts
from tests.helpers.layer_counts import SETTINGS, STEPS
from tests.helpers.support import python


@pytest.mark.mpi
@pytest.mark.parametrize(
    "ranks", [1, 2, pytest.param(4, marks=pytest.mark.slow), pytest.param(8, marks=pytest.mark.slow)]
)
def test_calls_layers_and_messages_are_those_of_a_real_run(tmp_path, ranks):
    done = python("-m", "tests.helpers.layer_counts", tmp_path / "counts.json", ranks=ranks)
    assert done.returncode == 0, done.stderr
    for (coarsening, levels, relaxation, cycle), real in zip(
        SETTINGS, json.loads((tmp_path / "counts.json").read_text())
    ):
        settings = MgritSettings(levels, coarsening, cycles=2, relaxation=relaxation, cycle=cycle)
        factors = settings.factors(STEPS)
        levels = level_offsets(whole_intervals(STEPS, factors, ranks), factors)
        clocks = schedule(LayerClocks(ranks, (1.0, 0.0), 0.0), levels, factors, settings, 2)
        assert np.array_equal(np.array(real), np.stack([clocks.calls, clocks.layers, clocks.messages], axis=1))


@pytest.mark.mpi
@pytest.mark.parametrize("ranks", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_calls_samples_and_messages_by_samples_are_those_of_a_real_gradient(tmp_path, ranks):
    done = python("-m", "tests.helpers.sample_counts", tmp_path / "counts.json", ranks=ranks)
    assert done.returncode == 0, done.stderr
    for sizes, real in zip(sample_counts.SIZES, json.loads((tmp_path / "counts.json").read_text()), strict=True):
        counted = [video_model.count_samples(sizes, ranks, rank) for rank in range(ranks)]
        assert real == [[each.calls, each.samples, each.calls, each.samples, each.messages] for each in counted]


def test_one_level_is_serial_and_batched_calls_are_what_is_gained():
    costs = LayerCosts((1.0, 0.0), (1.0, 0.0), latency=0.0, bandwidth=1e30)
    assert predict(1024, 1, MgritSettings(1), costs) == 2 * 1024
    # nested start 64, one cycle 16 + 1 + 64, last run 16; twice; long steps evaluate two stages
    settings = MgritSettings(2, "16", adjoint_cycles=1)
    assert predict(1024, 1, settings, costs) == 2 * (2 * 64 + 16 + 2 * (1 + 64) + 16)


def test_more_ranks_are_never_slower_where_messages_are_free():
    costs = LayerCosts((1.0, 0.1), (2.0, 0.3), latency=0.0, bandwidth=1e30)
    times = [predict(4096, 2**k, MgritSettings(3, "8"), costs) for k in range(10)]
    assert times == sorted(times, reverse=True)


def test_videos_in_series_cost_each_step_once_and_ranks_share_what_they_can():
    costs = video_model.Costs((1.0, 0.0), (2.0, 0.0), (4.0, 0.0), (3.0, 5.0), 7.0, 0.0, 0.0, 1e30)
    sizes = video_model.Sizes(64)
    serial = video_model.predict(sizes, 1, MgritSettings(1), costs)
    assert serial == {"disk": 64 * 7, "gates": 2 * 64 * 8, "forward": 2 * 64, "backward": 2 * 64 * 4, "sums": 0.0}
    settings = MgritSettings(2, "4", cycles=1, adjoint_cycles=1)
    four = video_model.predict(sizes, 4, settings, costs)
    assert [serial[name] / four[name] for name in ("disk", "gates")] == [4.0, 4.0]
    # the last rank: nested start 16 long steps of two stages, one cycle 4 + 2 and its 4 of the coarse steps, which come
    # as a wave, last run 4
    assert four["forward"] == 2 * (32 + 4 + 2 + 8 + 4)
    # back twice as dear, weights once more in the last run, and coarse steps evaluated forward: 4 of this rank
    assert four["backward"] == 2 * (2 * (32 + 4 + 2 + 8 + 4) + 4 * 2 + 8)


def test_videos_by_samples_share_all_but_what_a_call_costs():
    costs = video_model.Costs((1.0, 10.0), (2.0, 20.0), (3.0, 30.0), (3.0, 5.0), 7.0, 0.0, 0.0, 1e30)
    sizes = video_model.Sizes(64, batch=100)
    one, four, most = (video_model.predict_by_samples(sizes, ranks, costs) for ranks in (1, 4, 32))
    serial = video_model.predict(sizes, 1, MgritSettings(1), costs)
    assert one == pytest.approx(serial)
    shared = {"disk": 16 * 7, "gates": 2 * 16 * 8, "sums": 0.0}
    assert four == pytest.approx({**shared, "forward": 2 * (64 + 160), "backward": 6 * (64 + 160)})
    assert most["forward"] == pytest.approx(2 * (64 + 0.04 * 640))  # four samples of a hundred
