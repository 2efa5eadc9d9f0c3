"""The layer-parallel model's calls and messages are those of real runs."""

import json

import numpy as np
import pytest

from pdeopt.steps.mgrit import MgritSettings
from pdeopt.steps.transfer import level_offsets, whole_intervals
from problems.benchmarks.layer_model import LayerClocks, LayerCosts, predict, schedule
from tests.helpers.layer_counts import SETTINGS, STEPS
from tests.helpers.support import python


@pytest.mark.mpi
@pytest.mark.parametrize("ranks", [1, 2, pytest.param(4, marks=pytest.mark.slow), 8])
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
