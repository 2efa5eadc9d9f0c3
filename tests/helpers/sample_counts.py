"""What the ranks of a GRU by samples do: under mpiexec, `python -m tests.helpers.sample_counts FILE` writes counts."""

import json
import sys
from pathlib import Path

import torch
from mpi4py import MPI

from nn_adapters.layers import recurrent
from nn_adapters.layers.parts import samples
from problems.benchmarks.video_model import Sizes

SIZES = [Sizes(24, 3, 4, 2, batch) for batch in (6, 1)]


def count(sizes):
    """Calls and samples in them, forward and back, and messages of each rank, for one gradient."""
    torch.manual_seed(0)
    network = recurrent.GRUParallel(MPI.COMM_WORLD, sizes.features, sizes.hidden, sizes.steps, sizes.layers)
    done = [0] * 5

    class Counting(recurrent.GRULinearized):
        def remember(self, u, rows):
            done[0] += 1
            done[1] += u.shape[0] * u.shape[1]
            return super().remember(u, rows)

        def gradients(self, w, rows):
            done[2] += 1
            done[3] += w.shape[0] * w.shape[1]
            return super().gradients(w, rows)

    def swapped(mpi, parts, shapes):
        done[4] += sum(part.numel() > 0 for rank, part in enumerate(parts) if rank != mpi.rank)
        return kept[1](mpi, parts, shapes)

    kept = recurrent.GRULinearized, samples._swapped
    recurrent.GRULinearized, samples._swapped = Counting, swapped
    network(torch.randn(sizes.batch, sizes.steps, sizes.features)).sum().backward()
    recurrent.GRULinearized, samples._swapped = kept
    return MPI.COMM_WORLD.gather(done)


if __name__ == "__main__":
    found = [count(sizes) for sizes in SIZES]
    if MPI.COMM_WORLD.rank == 0:
        Path(sys.argv[1]).write_text(json.dumps(found))
