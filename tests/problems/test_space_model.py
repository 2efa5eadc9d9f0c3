"""The model of space x time: boxes as PETSc cuts them, and what must hold for any costs."""

import pytest

from pdeopt.space.layouts.partition import _parts
from problems.benchmarks.clocks import Inner, Layout, solve
from problems.benchmarks.scaling_model import Network
from problems.benchmarks.space_model import Exchange, Prediction, StepSolve, boxes

NAMES = ("coarse", "couple", "multiply", "blocks", "schur", "operator", "vector", "sweep")
#: Seconds in proportion to the unknowns.
PARTS = {n: dict.fromkeys(NAMES, (0.0, 1e-07 * n**3)) for n in (4, 8, 16)}
STEP = StepSolve(1.0, 1.0, {8: 20.0, 16: 38.0}, 4.0)
KRYLOV = {"iterations": 2, "inner": {"kind": "fcg", "applications": 6, "products": 6}, "exchanges": 40.0}


def prediction(latency=2e-6, bandwidth=1e10, n=16, steps=64):
    return Prediction(n, steps, PARTS, STEP, KRYLOV, Network(latency, bandwidth), window=4)


@pytest.mark.parametrize("ranks", [1, 2, 4, 8, 16, 64])
def test_boxes_have_the_edges_of_those_of_a_grid(ranks):
    n = 16
    assert sorted(boxes(n, ranks)) == sorted(_parts((n, n, n), ranks, 1))
    here = Exchange.of(n, ranks)
    assert here.unknowns * ranks == n**3
    assert here.neighbors == {1: 0, 2: 1, 4: 3, 8: 7, 16: 11, 64: 26}[ranks]


def test_one_rank_a_step_is_the_model_of_ranks_in_time():
    ours = prediction()
    expected = solve(Layout(64, 8, 4), ours.costs(1), 2, Inner(**KRYLOV["inner"])).time.max()
    assert ours.seconds(8, 1) == expected


def test_without_a_price_of_messages_ranks_in_space_are_ideal():
    free = prediction(latency=0.0, bandwidth=float("inf"))
    for space in (2, 8, 64):
        assert free.seconds(4, space) == pytest.approx(free.seconds(4, 1) / space)
    splits = free.splits(32)  # and ranks in time do some work twice: space goes first
    assert min(splits, key=splits.get) == (1, 32)


def test_messages_cost_and_the_best_split_shares_both_directions():
    free, dear = prediction(latency=0.0), prediction(latency=1e-6)
    splits = dear.splits(64)
    assert set(splits) == {(64 // space, space) for space in (1, 2, 4, 8, 16, 32, 64)}
    assert all(seconds > free.seconds(*split) for split, seconds in splits.items())
    assert min(splits.values()) < min(splits[64, 1], splits[1, 64])
    assert set(dear.splits(2048)) == {(64, 32), (32, 64)}  # at most a rank a step, and boxes of 4^3 nodes


def test_more_levels_send_more():
    assert STEP.to_a_neighbor(16) == 38.0
    assert STEP.to_a_neighbor(64) == 74.0
