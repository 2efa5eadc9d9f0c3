"""What the tests of messages run on several ranks: `python -m tests.helpers.parallel_grams BACKEND FILE`."""

import json
import sys

import torch

from pdeopt.core.messages import PRECISIONS, Messages
from pdeopt.core.team import team_of
from pdeopt.squares.sharedgrams import SharedGrams

SHAPES = [(20, 9), (11, 6), (7, 3)]
BATCHES, SAMPLES = 4, 30


def solutions(team, precision):
    """X of all layers after some batches, of which each rank has its samples; and the bytes of all ranks."""
    generator = torch.Generator().manual_seed(0)
    rank, ranks = (0, 1) if team is None else (team.rank, team.size)
    grams = SharedGrams(SHAPES, team, precision, rho=0.9, cross=0.5)
    for _ in range(BATCHES):
        for layer, (inputs, outputs) in enumerate(SHAPES):
            a = torch.randn(SAMPLES, inputs, generator=generator, dtype=torch.float64)
            z = torch.randn(SAMPLES, outputs, generator=generator, dtype=torch.float64)
            own = slice(rank**2, (rank + 1) ** 2 if rank + 1 < ranks else None)  # unequal shares
            grams.add(layer, a[own], z[own])
        grams.reduce()
        found = grams.solve([0.1] * len(SHAPES))
    sent = grams.sent if team is None else team.allreduce(grams.sent)
    return torch.cat([X.reshape(-1) for X in found]).tolist(), sent


def drift(team, feedback):
    """The error of the sum of a hundred sums of 1 + 2^-10, which bfloat16 does not have."""
    exact = torch.full((4,), 1.0 + 2.0**-10, dtype=torch.float64)
    messages, total = Messages(team, 4, "bfloat16", feedback=feedback), torch.zeros(4, dtype=torch.float64)
    for _ in range(100):
        total += messages.sum(exact)
    return float((total - 100 * team.size * exact).abs().max())


if __name__ == "__main__":
    team = team_of(sys.argv[1])
    result = {precision: solutions(team, precision) for precision in PRECISIONS}
    drifts = [drift(team, feedback) for feedback in (True, False)]
    everyone = team.allgather(result)
    if team.rank == 0:
        with open(sys.argv[2], "w") as file:
            json.dump({"equal": all(each == result for each in everyone), "found": result, "drift": drifts}, file)
