"""What K-FAC adds to a step of data parallel training: messages, products and inverses, memory."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from nn_adapters.curvature.factors import owners
from nn_adapters.parallel.counts import Count
from problems.benchmarks.hybrid_model import WIDTH, Planner
from problems.benchmarks.hybrid_networks import LayerTable


def kfac_sent(table: LayerTable, ranks: int, width: int = WIDTH) -> list[int]:
    """Bytes that each rank sends in a step of K-FAC that takes a batch into the factors.

    Factors f go to their owners, f - f_r; so does the gradient, s - s_r; the owners' steps s_r go to all others. With
    each message to an owner go 8 bytes, the number of samples.

    Args:
        table: the network.
        ranks: that share a batch.
        width: bytes of a number.
    """
    place = np.array(owners([(int(m), int(n)) for m, n in table.sides], ranks))
    f, s = table.factors, table.sides.prod(1)
    own = [(f[place == rank].sum(), s[place == rank].sum()) for rank in range(ranks)]
    weights = 2 * 8 * (ranks - 1)
    return [int(width * (f.sum() - a + s.sum() - b + (ranks - 1) * b)) + weights for a, b in own]


@dataclass(frozen=True)
class KfacMore:
    """What K-FAC adds to a step, on the busiest rank.

    Attributes:
        seconds: of a step, on average.
        sent: bytes of a step, on average; those of the gradient stay as they are.
        held: bytes of averages and inverses of its layers.
    """

    seconds: float
    sent: float
    held: float


def kfac_more(planner: Planner, ranks: int, statistics: int = 1, inverses: int = 5) -> KfacMore:
    """Products of the factors, a backward pass of sampled targets, inverses by their owners, messages and memory.

    Args:
        planner: network, batch and rates.
        ranks: that share a batch.
        statistics, inverses: steps from one batch that is taken into the factors, and one inversion, to the next.
    """
    table, rates = planner.table, planner.rates
    m, n = table.sides.T
    samples = planner.batch / ranks * table.positions
    passes = float((2 * table.products * planner.batch / ranks + samples * (m**2 + n**2) / 2).sum())
    inverse = m**3 + n**3
    owned = max(float(inverse.max()), float(inverse.sum()) / ranks)
    sent = WIDTH * float(table.factors.sum()) * (ranks - 1) / ranks
    talk = rates.link(ranks).seconds(Count(math.ceil(math.log2(ranks)), sent))
    seconds = (passes / rates.dense + talk) / statistics + owned / rates.dense / inverses
    held = WIDTH * 2 * max(float((m**2 + n**2).max()), float((m**2 + n**2).sum()) / ranks)
    return KfacMore(seconds, sent / statistics, held)
