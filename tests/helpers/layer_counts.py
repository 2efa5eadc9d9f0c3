"""What the ranks of a real MGRIT solve do: under mpiexec, `python -m tests.helpers.layer_counts FILE` writes counts."""

import json
import sys
from pathlib import Path

import torch
from mpi4py import MPI

from pdeopt.steps.exchange.neighbors import Neighbors
from pdeopt.steps.mgrit import Mgrit, MgritSettings
from pdeopt.steps.timegrid import TimeGrid
from pdeopt.steps.transfer import Move, whole_intervals

STEPS = 64
SETTINGS = [("2", 4, "F", "V"), ("4", 2, "FCF", "V"), ("2", 3, "F", "F"), ("8", 1, "F", "V"), ("4", 3, "FCF", "F")]
SETTINGS += [("4", 3, relaxation, "V") for relaxation in ("F", "FCF")]  # of sequences, see `video_model`
SETTINGS += [("8", 2, "F", "V")]  # of `problems.benchmarks.transformer`


class Counting(Neighbors):
    """Neighbors that count the messages of this rank."""

    sent = 0

    def exchange(self, row, toward):
        Counting.sent += 0 <= self.mpi.rank + toward < self.mpi.size
        return super().exchange(row, toward)

    def send_after(self, row):
        Counting.sent += not self.is_last
        super().send_after(row)

    def send_before(self, row):
        Counting.sent += not self.is_first
        super().send_before(row)


class CountingMove(Move):
    """A move that counts them, too."""

    def _send(self, part, rank):
        Counting.sent += 1
        return super()._send(part, rank)


def count(coarsening, levels, relaxation, cycle):
    """Calls, steps in them and messages of each rank, for one forward solve with two cycles."""
    settings = MgritSettings(levels, coarsening, cycles=2, relaxation=relaxation, cycle=cycle)
    factors = settings.factors(STEPS)
    times = torch.linspace(0, 1, STEPS + 1).numpy()
    grid = TimeGrid(times, MPI.COMM_WORLD, whole_intervals(STEPS, factors, MPI.COMM_WORLD.size))
    mgrit = Mgrit(grid, factors, settings)
    for level in filter(None, mgrit.grids):
        level.neighbors = Counting(level.mpi)
    for move in mgrit.moves:
        move.__class__ = CountingMove
    done = [0, 0]

    def phi(u, rows):
        done[0] += 1
        done[1] += len(u)
        return 0.5 * u

    Counting.sent = 0
    mgrit.solve([phi] * (len(factors) + 1), torch.ones(2))
    return MPI.COMM_WORLD.gather((*done, Counting.sent))


if __name__ == "__main__":
    found = [count(*settings) for settings in SETTINGS]
    if MPI.COMM_WORLD.rank == 0:
        Path(sys.argv[1]).write_text(json.dumps(found))
