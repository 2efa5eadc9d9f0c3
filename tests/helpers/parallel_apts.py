"""APTS by several processes: `python -m tests.helpers.parallel_apts BACKEND FILE`; rank 0 writes what it found."""

from __future__ import annotations

import json
import sys

import numpy as np
import torch

from pdeopt.core.errors import SolveFailure
from pdeopt.core.team import team_of
from pdeopt.functions.decomposition import Decomposition
from pdeopt.functions.sharing import share
from pdeopt.functions.smooth import Tally
from pdeopt.optimize.descent.apts import APTS
from tests.helpers.small_network import network


def check(team):
    """The calls of a team, as mpi4py has them."""
    ranks = list(range(team.size))
    assert team.allgather({"rank": team.rank}) == [{"rank": r} for r in ranks]
    assert team.allreduce(team.rank + 1) == sum(ranks) + team.size
    assert team.allreduce(0.5) == 0.5 * team.size
    array = np.array([[1.0, team.rank]])
    assert np.array_equal(team.allreduce(array), [[team.size, sum(ranks)]]) and array[0, 0] == 1.0
    assert team.bcast("word" if team.rank == 0 else None) == "word"
    team.Barrier()
    tally = Tally()

    def work(task):
        tally.gradients += 1
        return task**2

    assert share(team, 5, work, tally) == [0, 1, 4, 9, 16] and tally.gradients == 5

    def fail(task):
        raise SolveFailure("task", "none") if task == 0 else SolveFailure("other", "none")

    try:
        share(team, 1, fail, tally)
        raise AssertionError("a failure of one rank is one of all")
    except SolveFailure as failure:
        assert failure.what == "task"
    parts = Decomposition(5, [torch.arange(3), torch.arange(2, 5)], team=team)
    own = parts.assemble({s: torch.ones(3, dtype=torch.float64) for s in parts.mine()})
    assert np.array_equal(team.allreduce(own.numpy()), np.ones(5)), "the weights are a partition of unity"


def runs(team):
    """Objectives, last points and gradients of a few kinds of parts."""
    found = {}
    for name, words in (
        ("weights", dict(weights=3)),
        ("data", dict(data=4)),
        ("both", dict(weights=2, data=2)),
        ("batches", dict(data=2, batch=24)),
        ("metric", dict(weights=2, data=2, metric="kfac", metric_every=2)),
    ):
        f = network()
        result = APTS(f, team=team, max_it=5, **words).minimize(f.parameters())
        # not the work: features before a part are found once a rank
        found[name] = [result.history["objective"], result.design.tolist(), result.history[-1].gradients]
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    team = team_of(sys.argv[1])
    check(team)
    found = runs(team)
    if team.rank == 0:
        with open(sys.argv[2], "w") as file:
            json.dump(found, file)
    if sys.argv[1] != "mpi":
        torch.distributed.destroy_process_group()
