"""Who sums, factors and solves what, where ranks share the Gram sums of several layers.

The published method inverts every matrix on every rank (G. Taylor, R. Burmeister, Z. Xu, B. Singh, A. Patel,
T. Goldstein, ICML 2016), which is what ended its gain. Here sums are dealt out evenly over all ranks; the ranks of a
layer's group factor its matrix and solve for some rows of X each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

from pdeopt.core.messages import even_parts

#: Multiplications in the time of a number's message: 8 bytes at 10 GB/s against 20 multiplications a nanosecond.
MESSAGE = 16


@dataclass(frozen=True)
class GramShares:
    """The shares of ranks in the sums of layers.

    Args:
        shapes: (inputs, outputs) of each layer.
        ranks: how many there are.

    Attributes:
        groups: ranks of each layer. With fewer ranks than layers a layer belongs to one rank, the largest first to the
            idlest; else the next rank goes where it saves most, as long as the layer has a row for it.
        order: of the layers in messages, by their groups.
        crosses: numbers of the R that each rank sums, and of X that it finds: those of its rows.
        filled: numbers of the triangles, in a row in this order, that each rank sums: so many that all ranks have as
            equal shares of the sums as `crosses` leave.
    """

    shapes: Sequence[tuple[int, int]]
    ranks: int
    groups: list[range] = field(init=False)
    order: list[int] = field(init=False)
    crosses: list[int] = field(init=False)
    filled: list[int] = field(init=False)
    _ends: list[int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        groups = (_owners if self.ranks < len(self.shapes) else _groups)(self.shapes, self.ranks)
        object.__setattr__(self, "groups", groups)
        object.__setattr__(self, "order", sorted(range(len(groups)), key=lambda layer: groups[layer].start))
        object.__setattr__(self, "crosses", [self._solved(rank) for rank in range(self.ranks)])
        object.__setattr__(self, "filled", _fill(self.crosses, sum(map(self.triangle, range(len(groups))))))
        object.__setattr__(self, "_ends", [0, *accumulate(self.filled)])

    def triangle(self, layer: int) -> int:
        """Numbers of the packed triangle of a layer."""
        inputs, _ = self.shapes[layer]
        return inputs * (inputs + 1) // 2

    def layers(self, rank: int) -> list[int]:
        """Layers for which a rank solves, in the order of the messages."""
        return [layer for layer in self.order if rank in self.groups[layer]]

    def rows(self, layer: int, rank: int) -> slice:
        """Rows of X, outputs of the layer, for which a rank solves."""
        group = self.groups[layer]
        ends = [0, *accumulate(even_parts(self.shapes[layer][1], len(group)))]
        place = group.index(rank)
        return slice(ends[place], ends[place + 1])

    def height(self, layer: int, rank: int) -> int:
        """How many rows of X these are."""
        rows = self.rows(layer, rank)
        return int(rows.stop - rows.start)

    def _solved(self, rank: int) -> int:
        return sum(self.height(layer, rank) * self.shapes[layer][0] for layer in self.layers(rank))

    def pieces(self, rank: int) -> list[tuple[int, int, int]]:
        """What a rank sums of the triangles: the layer, from where, and how many numbers."""
        begin, end, start, found = self._ends[rank], self._ends[rank + 1], 0, []
        for layer in self.order:
            stop = start + self.triangle(layer)
            if (lower := max(begin, start)) < (upper := min(end, stop)):
                found.append((layer, lower - start, upper - lower))
            start = stop
        return found

    def numbers(self, rank: int, matrices: bool = True) -> dict[str, int]:
        """Numbers that a rank sends in an iteration.

        Args:
            rank: which.
            matrices: whether G is sent, or was before.

        Returns:
            `sums`: what is reduced; `matrices`: sums of G to those that factor them; `solutions`: X to all.
        """
        moved = sum(size * (len(self.groups[k]) - (rank in self.groups[k])) for k, _, size in self.pieces(rank))
        total = sum(self.crosses) + matrices * self._ends[-1]
        return {
            "sums": total - self.crosses[rank] - matrices * self.filled[rank],
            "matrices": matrices * moved,
            "solutions": (self.ranks - 1) * self.crosses[rank],
        }


def _owners(shapes: Sequence[tuple[int, int]], ranks: int) -> list[range]:
    """A rank for each layer, so that the busiest has little to do: the largest layer first, to the idlest rank."""
    busy, owners = [0.0] * ranks, [0] * len(shapes)
    for layer in sorted(range(len(shapes)), key=lambda layer: -_work(*shapes[layer])):
        owners[layer] = busy.index(min(busy))
        busy[owners[layer]] += _work(*shapes[layer])
    return [range(owner, owner + 1) for owner in owners]


def _groups(shapes: Sequence[tuple[int, int]], ranks: int) -> list[range]:
    """Ranks in a row for each layer: those of a layer share its solves and the sending of X."""
    shared = [m * n**2 + MESSAGE * ranks * m * n for n, m in shapes]
    sizes = [1] * len(shapes)
    for _ in range(ranks - len(shapes)):
        unfilled = [layer for layer, size in enumerate(sizes) if size < shapes[layer][1]]
        if not unfilled:
            break
        sizes[max(unfilled, key=lambda layer: shared[layer] / (sizes[layer] * (sizes[layer] + 1)))] += 1
    return [range(*each) for each in pairwise([0, *accumulate(sizes)])]


def _work(inputs: int, outputs: int) -> float:
    """Multiplications of a factor and of the solves with it."""
    return inputs**3 / 3 + outputs * inputs**2


def _fill(bases: list[int], amount: int) -> list[int]:
    """What to add to each number, `amount` altogether, so that the sums are as even as they can be."""
    heights = sorted(bases)
    low = next(k for k in range(1, len(bases) + 1) if k == len(bases) or amount + sum(heights[:k]) <= k * heights[k])
    level, rest = divmod(amount + sum(heights[:low]), low)
    added = [0] * len(bases)
    for given, place in enumerate(sorted(range(len(bases)), key=lambda place: bases[place])[:low]):
        added[place] = level - bases[place] + (given < rest)
    return added
