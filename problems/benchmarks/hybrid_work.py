"""Work of `hybrid` on a few ranks: what links take, and what steps of data parallel training take and send.

    mpiexec -n 2 python -m problems.benchmarks.hybrid_work link
    mpiexec -n 2 python -m problems.benchmarks.hybrid_work data mlp 256

prints JSON.
"""

from __future__ import annotations

import json
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

WORLD = MPI.COMM_WORLD


def link() -> dict[str, float]:
    """Least seconds of a message without content, and bytes a second, between two ranks. Collective."""

    def swap(size: int) -> float:
        own, found = np.zeros(size, dtype=np.uint8), np.zeros(size, dtype=np.uint8)
        other = WORLD.rank ^ 1
        WORLD.Barrier()
        return min(seconds_of(lambda: WORLD.Sendrecv(own, other, recvbuf=found, source=other), 200))

    empty, full = swap(8), swap(1 << 22)
    return {"latency": empty, "rate": (1 << 22) / max(full - empty, 1e-9)}


def step_of(network: nn.Module, shape: tuple[int, ...], samples: int) -> Callable[[], None]:
    """A forward and a backward pass of random samples, gradients from zero."""
    x, y = torch.randn(samples, *shape), torch.arange(samples) % 10

    def step() -> None:
        network.zero_grad()
        nn.functional.cross_entropy(network(x), y).backward()

    return step


def seconds_of(function: Callable[[], Any], repeat: int) -> list[float]:
    """Of each call."""
    found = []
    for _ in range(repeat):
        begin = time.perf_counter()
        function()
        found.append(time.perf_counter() - begin)
    return found


def data(name: str, batch: int, repeat: int = 15) -> dict[str, Any]:
    """The least seconds of a step of data parallel training, and bytes sent. Collective."""
    torch.manual_seed(0)
    make, shape = MODULES[name]
    network = make()
    step = step_of(network, shape, batch // WORLD.size)
    sums = GradientSums(network, WORLD) if WORLD.size > 1 else None
    optimizer = torch.optim.SGD(network.parameters(), 1e-3, momentum=0.9)

    def train() -> None:
        WORLD.Barrier()
        step()
        if sums is not None:
            sums.finish()
        optimizer.step()

    seconds = min(seconds_of(train, repeat))
    return {"seconds": seconds, "sent": 0 if sums is None else sums.sent // repeat}


def main() -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    found = link() if sys.argv[1] == "link" else data(sys.argv[2], int(sys.argv[3]))
    if WORLD.rank == 0:
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
