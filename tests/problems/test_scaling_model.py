"""The scaling model's schedule is that of real runs: the same clocks, step solves, messages and sums on each rank."""

import json

import numpy as np
import pytest

from problems.benchmarks.clocks import (
    Clocks,
    Costs,
    Inner,
    Layout,
    cycles,
    propagate,
    reduced,
    sequential_solves,
    solve,
)
from problems.benchmarks.tracing import play
from tests.helpers.support import python

STEPS = 32
#: window, cycles and levels: several levels, a window over several ranks, a coarsest level over many.
LAYOUTS = [(4, 2, 20), (8, 1, 20), (2, 2, 3)]
NOTHING = dict.fromkeys(("coarse", "couple", "multiply", "blocks", "schur", "operator", "vector", "design"), (0.0, 0.0))
#: so unlike one another that no other schedule has the same sums
COSTS = Costs({"sweep": (1.0, 1e-3)} | NOTHING, message=100.0, reduction=0.0)


@pytest.mark.mpi
@pytest.mark.parametrize(
    "ranks", [1, pytest.param(2, marks=pytest.mark.slow), 4, pytest.param(8, marks=pytest.mark.slow)]
)
def test_the_schedule_is_that_of_a_real_run(tmp_path, ranks):
    layouts, file = [",".join(map(str, layout)) for layout in LAYOUTS], tmp_path / "trace.json"
    words = ("-nx", 4, "-ny", 3, "-nt", STEPS, "-layouts", ";".join(layouts), "-trace", file)
    done = python("-m", "problems.benchmarks.tracing", *words, ranks=ranks)
    assert done.returncode == 0, done.stderr
    traces = json.loads(file.read_text())
    for words in [each for each in traces if " x " in each]:  # two ranks a step
        real, places = traces.pop(words), ranks // 2
        clocks = solve(Layout(STEPS, places, *LAYOUTS[-1]), COSTS, real["iterations"], Inner(**real["inner"]))
        for space in (0, 1):  # either goes along time as the ranks of whole steps do
            same_counts(clocks, real["kkt"][space::2])
        assert [clocks.reductions] * ranks == real["reductions"]
    for words, real in traces.items():
        layout = Layout(STEPS, ranks, *map(int, words.split(",")))
        clocks = Clocks(layout, COSTS)
        propagate(clocks)
        np.testing.assert_allclose(clocks.time, play(real["propagator"], COSTS), rtol=1e-12)
        clocks = solve(layout, COSTS, real["iterations"], Inner(**real["inner"]))
        assert real["iterations"] * real["inner"]["applications"] > 1
        same_counts(clocks, real["kkt"])
        assert [clocks.reductions] * ranks == real["reductions"]
        real = real["reduced"]
        assert len(real["cycles"]) == 2 * real["iterations"] + 3 and max(real["cycles"]) > 1
        same_counts(reduced(layout, COSTS, real["iterations"], real["cycles"]), real["kkt"])


def same_counts(clocks, traces):
    """Sweeps, step solves in them, and messages of each rank."""
    solves = [[rows for event, _, rows in trace if event == "solve"] for trace in traces]
    assert clocks.sweeps.tolist() == list(map(len, solves))
    assert clocks.solves.tolist() == list(map(sum, solves))
    assert clocks.messages.tolist() == [sum(event == "send" for event, _, _ in trace) for trace in traces]


@pytest.mark.parametrize("window, cycle, levels", [(16, 2, 20), (4, 2, 20), (4, 1, 3), (64, 3, 2)])
def test_on_one_rank_the_step_solves_in_a_row_are_those_of_the_formula(window, cycle, levels):
    """Cycles + 1 sweeps through each level, which is visited by as many cycles; the coarsest in one go."""
    expected, steps, visits, level = 0, 4096, 1, 1
    while level < levels and steps > window:
        expected += visits * (cycle + 1) * steps
        steps, visits, level = steps // window, visits * cycle, level + 1
    assert sequential_solves(Layout(4096, 1, window, cycle, levels)) == expected + visits * steps


def test_more_ranks_never_do_more_solves_in_a_row_and_substitution_does_all():
    counts = [sequential_solves(Layout(4096, 2**k, 16)) for k in range(13)]
    assert counts == sorted(counts, reverse=True)
    assert sequential_solves(Layout(4096, 8, levels=1)) == 4096


def test_one_rank_sends_nothing_and_waits_for_nobody():
    clocks = solve(Layout(256, 1), COSTS, 3, Inner())
    assert clocks.messages.tolist() == [0]
    rows = Costs(COSTS.parts | {"sweep": (0.0, 1.0)}, 0.0, 0.0)
    one, two = (solve(Layout(256, ranks), rows, 3, Inner()) for ranks in (1, 2))
    assert two.time.max() < one.time.max()


def test_substitution_over_ranks_waits_for_each_of_them():
    clocks = Clocks(Layout(64, 8, levels=1), COSTS)
    cycles(clocks, +1)
    np.testing.assert_allclose(clocks.time, [1.008 * (rank + 1) + 100.0 * rank for rank in range(8)])
