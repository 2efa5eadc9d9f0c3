"""Training by splitting on several ranks with unequal shares: `python -m tests.helpers.parallel_splitting FILE`."""

import json
import sys

import torch
from mpi4py import MPI
from torch import nn

from nn_adapters.splitting import SplitTrainingSettings, StreamedLayers, WholeLayers
from pdeopt.optimize.splitting import ADMM

FORMS = ("streaming", "seed", "backward")


def samples(count=40, entries=4, classes=3):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, entries, generator=generator, dtype=torch.float64)
    return x, (x[:, 0] * x[:, 1] > 0).long() + (x[:, 2] > 1).long()


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def share(x, rank, ranks):
    """The rows of a rank: none for the second, unequal numbers for the others."""
    ends = [0] + [len(x) * (k + 1) ** 2 // ranks**2 for k in range(ranks)]
    if ranks > 2:
        ends[2] = ends[1]
    return x[ends[rank] : ends[rank + 1]]


def splitting_of(form, iterations, *words):
    return StreamedLayers(iterations, *words) if form == "streaming" else WholeLayers(*words)


def weights(form, team, precision="float64", iterations=8):
    rank, ranks = (0, 1) if team is None else (team.rank, team.size)
    x, y = (share(each, rank, ranks) for each in samples())
    settings = SplitTrainingSettings(form=form, batch=16, precision=precision, step=1.0)
    splitting = splitting_of(form, iterations, network(), x, y, settings, team)
    multipliers = form != "streaming"
    result = ADMM(splitting, max_it=iterations, multipliers=multipliers, warm_up=2, rtol=0.0).solve()
    return result.design.tolist(), result.history["feasibility"]


if __name__ == "__main__":
    found = {form: weights(form, MPI.COMM_WORLD) for form in FORMS}
    if MPI.COMM_WORLD.rank == 0:
        with open(sys.argv[1], "w") as file:
            json.dump(found, file)
