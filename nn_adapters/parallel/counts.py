"""What sums over ranks send: messages one after the other, and bytes, of the busiest rank; no rank is needed to count.

The models of scaling are built on these; the tests compare them with what is sent.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Count:
    """What the busiest rank sends over one kind of link.

    Attributes:
        messages: one after the other.
        bytes: all together.
    """

    messages: int = 0
    bytes: float = 0.0

    def __add__(self, other: Count) -> Count:
        return Count(self.messages + other.messages, self.bytes + other.bytes)

    def seconds(self, latency: float, rate: float) -> float:
        """Time by the usual model.

        Args:
            latency: seconds a message.
            rate: bytes a second.
        """
        return self.messages * latency + self.bytes / rate


@dataclass(frozen=True)
class Traffic:
    """What the busiest rank sends.

    Attributes:
        inside: to ranks of its node.
        between: to ranks of other nodes.
    """

    inside: Count = field(default_factory=Count)
    between: Count = field(default_factory=Count)

    def __add__(self, other: Any) -> Traffic:
        return Traffic(self.inside + other.inside, self.between + other.between)


def direct_sum(size: float, ranks: int) -> Count:
    """A sum as `Messages` makes it: to the owners of its parts, and back to all.

    Args:
        size: bytes of the buffer.
        ranks: N.
    """
    return Count(2 * (ranks - 1), 2 * size * (ranks - 1) / ranks)


def ring_sum(size: float, ranks: int) -> Count:
    """A sum around a ring: as many messages and bytes as `direct_sum`, all of them to one neighbor.

    Args:
        size: bytes of the buffer.
        ranks: N.
    """
    return direct_sum(size, ranks)


def rabenseifner_sum(size: float, ranks: int) -> Count:
    """A sum by recursive halving and doubling (R. Rabenseifner, ICCS 2004): 2 log2 N messages.

    Of N that is no power of two, the ranks beyond the largest power of two give their share to another one, which
    returns the sum to it.

    Args:
        size: bytes of the buffer.
        ranks: N.
    """
    power = 1 << (ranks.bit_length() - 1)
    core = Count(2 * (power.bit_length() - 1), 2 * size * (power - 1) / power)
    return core if power == ranks else core + Count(1, size)


def two_level_sum(size: float, node_size: int, nodes: int) -> Traffic:
    """A sum as `TwoLevelSums` makes it: rings inside the nodes, and Rabenseifner's between them.

    Each rank of a node has its part of the buffer summed over the nodes; so the bytes between nodes are those of the
    smallest allreduce among nodes, shared by all ranks of a node.

    Args:
        size: bytes of the buffer.
        node_size: ranks of a node.
        nodes: their number.
    """
    return Traffic(ring_sum(size, node_size), rabenseifner_sum(size / node_size, nodes))


def pipeline_traffic(size: float, microbatches: int) -> Count:
    """Features forward and derivatives back, of a `Pipeline`'s rank in the middle.

    Args:
        size: bytes of the features of a batch between two stages.
        microbatches: M.
    """
    return Count(2 * microbatches, 2 * size)


def pipeline_idle(ranks: int, microbatches: int) -> float:
    """The share of the time in which a rank of a `Pipeline` waits, of stages that take the same time.

    Args:
        ranks: S.
        microbatches: M.
    """
    return (ranks - 1) / (microbatches + ranks - 1)


def halo_traffic(row: float, reach: int, stride: int = 1) -> Count:
    """Rows beside its own that a rank of a `DomainParallel` needs for one layer, forward and backward.

    Args:
        row: bytes of a row of the layer's inputs, of all samples and channels.
        reach: rows from the first to the last of a window.
        stride: of the windows.
    """
    rows = max(reach - stride, 0)
    return Count(2 * min(rows, 2), 2 * rows * row)
