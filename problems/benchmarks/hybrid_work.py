"""Work of `hybrid` on a few ranks: what links take, and what steps of data parallel training take and send.

    mpiexec -n 2 python -m problems.benchmarks.hybrid_work link
    mpiexec -n 2 python -m problems.benchmarks.hybrid_work data mlp 256

prints JSON.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from mpi4py import MPI
from torch import nn

from nn_adapters.parallel import GradientSums
from problems.benchmarks.hybrid_networks import MODULES
from problems.benchmarks.processes import median_seconds

WORLD = MPI.COMM_WORLD


def link() -> dict[str, float]:
    """Seconds of a message without content, and bytes a second, between two ranks. Collective."""

    def swap(size: int) -> float:
        own, found = np.zeros(size, dtype=np.uint8), np.zeros(size, dtype=np.uint8)
        other = WORLD.rank ^ 1
        WORLD.Barrier()
        return median_seconds(lambda: WORLD.Sendrecv(own, other, recvbuf=found, source=other), 200)

    empty, full = swap(8), swap(1 << 22)
    return {"latency": empty, "rate": (1 << 22) / max(full - empty, 1e-9)}


def step_of(network: nn.Module, shape: tuple[int, ...], samples: int) -> Callable[[], None]:
    """A forward and a backward pass of random samples, gradients from zero."""
    x, y = torch.randn(samples, *shape), torch.arange(samples) % 10

    def step() -> None:
        network.zero_grad()
        nn.functional.cross_entropy(network(x), y).backward()

    return step


def data(name: str, batch: int, repeat: int = 7) -> dict[str, Any]:
    """Median seconds of a step of data parallel training, wall and of this process, and bytes sent. Collective."""
    torch.manual_seed(0)
    make, shape = MODULES[name]
    network = make()
    step = step_of(network, shape, batch // WORLD.size)
    sums = GradientSums(network, WORLD) if WORLD.size > 1 else None
    optimizer = torch.optim.SGD(network.parameters(), 1e-3, momentum=0.9)
    wall, own = [], []
    for _ in range(repeat):
        WORLD.Barrier()
        begin = time.perf_counter(), time.process_time()
        step()
        if sums is not None:
            sums.finish()
        optimizer.step()
        wall.append(time.perf_counter() - begin[0])
        own.append(time.process_time() - begin[1])
    sent = 0 if sums is None else sums.sent // repeat
    return {"seconds": statistics.median(wall), "cpu_seconds": statistics.median(own), "sent": sent}


def main() -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    found = link() if sys.argv[1] == "link" else data(sys.argv[2], int(sys.argv[3]))
    if WORLD.rank == 0:
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
