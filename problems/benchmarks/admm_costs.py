"""Costs of training by splitting on one rank of this machine, for `admm_model`."""

from __future__ import annotations

import statistics
import time
from functools import partial

import torch

from nn_adapters.splitting import SplitTrainingSettings, WholeLayers
from pdeopt.squares.gram import GramSum
from problems.benchmarks.admm_model import Costs, shapes_of
from problems.benchmarks.admm_work import WIDTHS, published_network
from problems.benchmarks.processes import median_seconds

#: Median of the processor's seconds that a call takes.
cpu_seconds = partial(median_seconds, repeat=15, clock=time.process_time)

#: Samples of a rank whose seconds are measured.
MEASURED = (1, 4, 16, 64, 160, 640, 2560)


def measured_costs(latency: float, bandwidth: float) -> tuple[Costs, float]:
    """Costs on one rank of this machine, and which share of the work on samples the updates of a_k are."""
    torch.set_num_threads(1)
    local, shares = [], []
    for samples in MEASURED:
        x, y = torch.rand(samples, WIDTHS[0], dtype=torch.float64), torch.randint(0, WIDTHS[-1], (samples,))
        splitting = WholeLayers(published_network(), x, y, SplitTrainingSettings(form="seed", precision="float64"))
        found = [_by_kinds(splitting, iteration) for iteration in range(1, 3 + max(2, 320 // samples))][1:]
        each = {kind: statistics.median(one[kind] for one in found) for kind in found[0]}
        local.append((samples, sum(seconds for kind, seconds in each.items() if kind != "weights")))
        shares.append(each["a"] / local[-1][1])
    solves = [_of_solves(n, m) for n, m in shapes_of(WIDTHS)]
    buffer = torch.rand(10**6, dtype=torch.float64)
    number = cpu_seconds(lambda: buffer + buffer) / len(buffer)
    factor, row = [each[0] for each in solves], [each[1:] for each in solves]
    return Costs(local, factor, row, number, latency, bandwidth), statistics.median(shares)


def _of_solves(n: int, m: int) -> tuple[float, float, float]:
    """Seconds of a factor, of a solve for any rows, and of each of them."""
    seconds = {}
    for rows in (1, m):
        sums = GramSum(n, rows)
        sums.add(torch.rand(2 * n, n, dtype=torch.float64), torch.rand(2 * n, rows, dtype=torch.float64))
        seconds[rows] = cpu_seconds(partial(sums.solve, 0.1, factor=sums.factor(0.1)))
    slope = (seconds[m] - seconds[1]) / (m - 1)
    return cpu_seconds(partial(sums.factor, 0.1)), max(seconds[1] - slope, 0.0), slope


def _by_kinds(splitting: WholeLayers, iteration: int) -> dict[str, float]:
    """CPU seconds of the blocks of an iteration by kinds."""
    found = dict.fromkeys(("sums", "a", "weights", "z"), 0.0)
    for block in splitting.sweep(iteration):
        begin = time.process_time()
        splitting.update(block)
        found[block[0]] += time.process_time() - begin  # type: ignore[index]
    begin = time.process_time()
    splitting.ascend()
    return found | {"ascend": time.process_time() - begin}
