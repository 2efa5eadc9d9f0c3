"""Training by splitting on many ranks, predicted: counted multiplications and bytes, measured costs.

`counts` repeats what the forms do, from widths and numbers of samples alone; `tests/problems/test_admm_model.py`
compares it with runs on 1, 2, 4 and 8 ranks, to the last multiplication and byte. `Prediction` makes seconds of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from pdeopt.core.messages import even_parts
from pdeopt.squares.gram import factor_work
from pdeopt.squares.gramshares import GramShares


@dataclass(frozen=True)
class Counts:
    """Of one rank in one iteration.

    Attributes:
        products, solves: multiplications, as `SplitWork` has them.
        sent: bytes.
    """

    products: float
    solves: float
    sent: int


def shapes_of(widths: Sequence[int]) -> list[tuple[int, int]]:
    """(inputs, outputs) of dense layers with biases."""
    return [(one + 1, other) for one, other in pairwise(widths)]


def whole_counts(widths: Sequence[int], samples: int, ranks: int, rank: int, width: int, first: bool) -> Counts:
    """An iteration of the form with all samples, with a step of the multipliers.

    Args:
        widths: entries of the states, those of the samples first.
        samples: of all ranks, as evenly dealt out as they can be.
        ranks, rank: how many, and which.
        width: bytes of a number in a message.
        first: in the first iteration the matrix of the samples is summed, sent and factored.
    """
    own, shapes = even_parts(samples, ranks)[rank], shapes_of(widths)
    products, solves, sent = 0.0, 0.0, 0
    for k, (n, m) in enumerate(shapes):
        known = k == 0 and not first
        products += own * (m * n + (0 if known else n * (n + 1) / 2))  # sums for W_k
        if k + 1 < len(shapes):
            products += own * 2 * shapes[k + 1][0] * shapes[k + 1][1]  # m_{k+1} and its adjoint for a_k
            p, s = _states(shapes[k + 1], own)
            products, solves = products + p, solves + s
        shares = GramShares([(n, m)], ranks)
        if shares.layers(rank):
            solves += (0 if known else factor_work(n)) + shares.height(0, rank) * n**2
        products += own * m * n  # m_k for z_k
        sent += _bytes(shares, rank, width, not known)
    n, m = shapes[-1]
    return Counts(products + own * m * n, solves, sent)


def streaming_counts(widths: Sequence[int], own: int, ranks: int, rank: int, width: int) -> Counts:
    """An iteration of the form with batches, of which this rank has so many samples."""
    shapes = shapes_of(widths)
    products = float(sum(own * m * n for n, m in shapes))  # forward
    solves = 0.0
    for n, m in shapes[1:]:
        p, s = _states((n, m), own)
        products, solves = products + p + own * m * n, solves + s
    products += sum(own * (m * n + n * (n + 1) / 2) for n, m in shapes)
    shares = GramShares(shapes, ranks)
    for k in shares.layers(rank):
        solves += factor_work(shapes[k][0]) + shares.height(k, rank) * shapes[k][0] ** 2
    return Counts(products, solves, _bytes(shares, rank, width, True))


def _states(shape: tuple[int, int], own: int) -> tuple[float, float]:
    """Products and solves with the matrix of a state, that of the layer after it, on every rank."""
    inputs, outputs = shape[0] - 1, shape[1]
    small, large = sorted((inputs, outputs))
    products = small * (small + 1) / 2 * large + (2 * own * inputs * outputs if outputs < inputs else 0)
    return products, factor_work(small) + own * small**2


def _bytes(shares: GramShares, rank: int, width: int, matrices: bool) -> int:
    """Numbers, and 8 bytes of each message of sums for the samples in it."""
    return width * sum(shares.numbers(rank, matrices).values()) + 8 * (shares.ranks - 1)


@dataclass(frozen=True)
class Costs:
    """Seconds, measured on one rank, and of messages.

    Attributes:
        local: of an iteration's work on samples, against their number, for some numbers from 1 on; what every rank
            does however few it has is in it.
        factor: of the matrix of each layer.
        row: of a row of X, for each layer: a call, and a row in it.
        number: of a number in a buffer that is packed, or added to a sum.
        latency: of a message.
        bandwidth: bytes a second.
        tree: whether sums go through a tree; else, as here, each rank sends to each other one.
    """

    local: Sequence[tuple[int, float]]
    factor: Sequence[float]
    row: Sequence[tuple[float, float]]
    number: float
    latency: float = 2e-6
    bandwidth: float = 1e10
    tree: bool = False


@dataclass(frozen=True)
class Iteration:
    """Predicted seconds of an iteration on the busiest rank, by parts.

    Attributes:
        beside: of the messages, those of sums for W_k that travel while a_k moves.
        hidden: of these, what takes no longer than that.
    """

    local: float
    solves: float
    messages: float
    beside: float
    hidden: float

    @property
    def seconds(self) -> float:
        """All of it; messages that travel while states move are hidden."""
        return self.local + self.solves + self.messages - self.hidden


class Prediction:
    """The form with all samples on any number of ranks.

    Args:
        widths: entries of the states.
        costs: of the parts.
        width: bytes of a number in a message.
        share_of_states: of the local seconds, that of the updates of a_k, while which sums for W_k travel.
    """

    def __init__(self, widths: Sequence[int], costs: Costs, width: int = 8, share_of_states: float = 0.2) -> None:
        self.shapes, self.costs, self.width, self.share_of_states = shapes_of(widths), costs, width, share_of_states

    def iteration(self, samples: int, ranks: int, published: bool = False) -> Iteration:
        """An iteration after the first.

        Args:
            samples: of all ranks.
            ranks: how many.
            published: every rank factors every matrix, that of the samples in every iteration, and solves for all rows.
        """
        local = self.local(math.ceil(samples / ranks))
        messages = solves = beside = hidden = 0.0
        for k, (n, m) in enumerate(self.shapes):
            known = k == 0 and not published
            rows = m if published else math.ceil(m / min(m, ranks))
            call, row = self.costs.row[k]
            solves += (0.0 if known else self.costs.factor[k]) + call + rows * row
            numbers = m * n + (0 if known else n * (n + 1) // 2)
            sums = self.message(numbers, ranks)
            messages += sums + self.message(m * n, ranks)
            messages += 0.0 if known else self.message(n * (n + 1) // 2, ranks)
            if k + 1 < len(self.shapes):
                beside += sums
                hidden += min(sums, local * self.share_of_states / (len(self.shapes) - 1))
        return Iteration(local, solves, messages, beside, 0.0 if published else hidden)

    def message(self, numbers: int, ranks: int) -> float:
        """Sums or solutions of so many numbers altogether: they are packed, sent, and added or put in place."""
        if ranks == 1:
            return 0.0
        moved = self.width * numbers * (ranks - 1) / ranks / self.costs.bandwidth
        steps = math.ceil(math.log2(ranks)) if self.costs.tree else ranks - 1
        return steps * self.costs.latency + moved + 2 * numbers * self.costs.number

    def local(self, samples: int) -> float:
        """Seconds of the work on samples of one rank, linear between the numbers that were measured."""
        points = list(self.costs.local)
        place = next((k for k in range(1, len(points)) if samples <= points[k][0]), len(points) - 1)
        (one, low), (other, high) = points[place - 1], points[place]
        return low + (high - low) * (samples - one) / (other - one)

    def crossover(self, samples: int, ranks: Sequence[int], is_over: str) -> int | None:
        """The first number of ranks at which a part of the iteration is larger than the local work."""
        return next((n for n in ranks if getattr(self.iteration(samples, n), is_over) > self.local(samples // n)), None)
