"""Gram sums over the samples of all ranks, factored and solved by groups of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pdeopt.core.errors import InputError, together
from pdeopt.core.messages import Arrival, Messages
from pdeopt.core.team import Team
from pdeopt.squares.gram import GramSum, factor_work
from pdeopt.squares.gramshares import GramShares

#: A difference below this share of its terms is found without them: in double precision it has 14 digits otherwise.
CANCELED = 1e-2


class SharedGrams:
    """Gram sums of several layers over the samples of all ranks, the solves dealt out over these.

    An iteration has three messages: packed sums, each number to the rank that sums it; what the ranks of a layer's
    group need of its matrix, which all of them factor; the rows of the solutions that each of them finds, to all.
    `GramShares` says who does what.

    Args:
        shapes: (inputs, outputs) of each layer.
        team: of ranks, each with its own samples; None for one.
        precision: of the messages, see `Messages`.
        dtype: of the sums.
        rho, cross: forgetting of G and of R at each `reduce`.
        fixed: a is the same in every iteration: G is summed, sent and factored in the first alone; rho is not used.

    Attributes:
        shares: of the ranks.
        sent: bytes that this rank has sent.
        products, solves: multiplications of sums, and of factorizations and solves, of this rank.

    Example:
        >>> grams = SharedGrams([(785, 500), (501, 10)], MPI.COMM_WORLD, rho=0.9, cross=0.0)
        >>> grams.add(0, a, z)                                # this rank's samples
        >>> grams.reduce()                                    # or begin(), other work, and finish()
        >>> W0, W1 = grams.solve(ridge=[0.1, 0.1])
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, int]],
        team: Team | None = None,
        precision: str = "float64",
        dtype: torch.dtype = torch.float64,
        rho: float = 1.0,
        cross: float | None = None,
        fixed: bool = False,
    ) -> None:
        self.shapes, self.dtype, self.fixed = list(shapes), dtype, fixed
        self.rho, self.cross = 1.0 if fixed else rho, rho if cross is None else cross
        self.rank, self.ranks = (0, 1) if team is None else (team.rank, team.size)
        self.shares = shares = GramShares(self.shapes, self.ranks)
        self.layers = shares.layers(self.rank)
        self.sums = {k: GramSum(shapes[k][0], shares.height(k, self.rank), dtype) for k in self.layers}
        # a single rank adds to the sums themselves
        self._fresh = self.sums if self.ranks == 1 else {k: GramSum(*shape, dtype) for k, shape in enumerate(shapes)}
        self._team, self.products, self.solves = team, 0.0, 0.0
        self._added, self._is_faded, self._is_known = [0] * len(shapes), False, False
        self._is_again = False  # whether factors were counted before a restart
        self._factors: dict[int, tuple[float, Tensor | None]] = {}
        self._traffic = GramTraffic(shares, team, precision)
        self._arrival: Arrival[tuple[Tensor, float]] | None = None

    @property
    def sent(self) -> int:
        """Bytes that this rank has sent."""
        return self._traffic.sent

    def add(
        self,
        layer: int,
        a: Tensor,
        z: Tensor | None = None,
        samples: int | None = None,
        product: torch.dtype | None = None,
    ) -> None:
        """Rows of this rank for a layer: a (batch, inputs), z (batch, outputs), each a sample, or of `samples`.

        The products of these rows are in the precision `product`, by default that of the sums.
        """
        inputs, outputs = self.shapes[layer]
        if self.ranks == 1:
            self._fade()
        fresh = self._fresh[layer]
        (fresh.add_cross if self._is_known else fresh.add)(a, z, samples, product)
        self.products += len(a) * ((not self._is_known) * inputs * (inputs + 1) / 2 + outputs * inputs)
        self._added[layer] += len(a) if samples is None else samples

    def reduce(self) -> None:
        """Bring what was added since the last call to those that solve with it. Collective."""
        self.begin()
        self.finish()

    def begin(self) -> None:
        """The first half of `reduce`: the sums leave. Collective."""
        samples, self._added = self._samples, [0] * len(self.shapes)
        self._fade()
        if self.ranks > 1:
            self._arrival = self._traffic.begin(self._fresh, samples, matrices=not self._is_known)
            for fresh in self._fresh.values():
                fresh.forget(0.0)

    def advance(self) -> None:
        """Between the halves of `reduce`, now and then: let messages move."""
        if self._arrival is not None:
            self._arrival.advance()

    def finish(self) -> None:
        """The second half of `reduce`. Collective."""
        self._is_faded = False
        if self._arrival is not None:
            own, samples = self._arrival.finish()
            self._arrival = None
            crosses = sum(sums.cross.numel() for sums in self.sums.values())
            triangles, rest = own.split([len(own) - crosses, crosses])
            for sums, part in zip(self.sums.values(), rest.split([each.cross.numel() for each in self.sums.values()])):
                sums.cross += part.reshape(sums.cross.shape)
                sums.weights = (sums.weights[0], sums.weights[1] + samples)
            for layer, triangle in ({} if self._is_known else self._traffic.spread(triangles)).items():
                sums = self.sums[layer]
                sums.triangle += triangle
                sums.weights = (sums.weights[0] + samples, sums.weights[1])
        self._is_known = self.fixed

    def solve(self, ridge: Sequence[float], share: float = 0.0) -> list[Tensor]:
        """X of each layer, (outputs, inputs), with its own ridge; equal on all ranks to the last bit. Collective.

        Args:
            ridge: of each layer.
            share: what is added to it, relative to the trace of G/w, the mean of |a|^2.

        Raises:
            SolveFailure: sums that are not finite, on all ranks.
        """
        team = self._team

        def solved() -> list[Tensor]:
            return [self._solved(k, _ridge(self.sums[k], ridge[k], share)) for k in self.layers]

        own = solved() if team is None else together(team, solved)
        if self.ranks == 1:
            return [own[self.layers.index(layer)] for layer in range(len(self.shapes))]
        return self._traffic.gather(own, self.dtype)

    def squares(self, found: Sequence[Tensor], ridge: Sequence[float], share: float = 0.0) -> Tensor:
        """The mean of |X a|^2 under G of each layer's X, which `solve` has found with the same ridge, (layers,).

        With X (G/w + ridge) = R/v it is <X, R/v> - ridge |X|^2, at the price of a sum. Where the ridge outweighs G the
        two cancel, and it comes from G itself. This rank's rows of X: the sum over the ranks is asked for.
        """
        own = torch.zeros(len(self.shapes), dtype=torch.float64)
        for layer, sums in self.sums.items():
            X = found[layer][self.shares.rows(layer, self.rank)]
            whole = float((X * sums.cross).sum()) / sums.weights[1]
            own[layer] = whole - _ridge(sums, ridge[layer], share) * float(X.square().sum())
            if not own[layer] > CANCELED * whole:
                own[layer] = sums.square(X)
                self.solves += sums.outputs * sums.inputs**2
        return own

    def footprint(self) -> dict[str, int]:
        """Bytes of this rank at the most.

        Returns:
            `sums`: what stays; `messages`: while sums leave; `solve`: while the largest matrix is solved with.
        """
        item, largest = self.dtype.itemsize, [0]
        kept = [(n, self.shares.height(k, self.rank)) for k, (n, _) in enumerate(self.shapes) if k in self.sums]
        numbers = sum((1 + self.fixed) * n * n + rows * n for n, rows in kept)
        largest += [n * n + 2 * rows * n for n, rows in kept]
        if self.ranks > 1:
            numbers += sum(n * n + m * n for n, m in self.shapes)
        return {"sums": item * numbers, "messages": self._traffic.footprint(item), "solve": item * max(largest)}

    def memory(self) -> dict[str, Tensor]:
        """What a restart with the same ranks needs of this rank."""
        own = {f"{layer}.{name}": each for layer, sums in self.sums.items() for name, each in _tensors(sums).items()}
        return own | self._traffic.memory() | {"known": torch.tensor(self._is_known)}

    def recall(self, memory: dict[str, Tensor]) -> None:
        """Go on from what `memory` gave."""
        for layer, sums in self.sums.items():
            sums.lower.copy_(memory[f"{layer}.gram"])
            sums.cross.copy_(memory[f"{layer}.cross"])
            w, v = memory[f"{layer}.weights"].tolist()
            sums.weights = (w, v)
        self._traffic.recall(memory)
        self._is_known = self._is_again = bool(memory["known"])
        self._factors.clear()

    # -- parts of the above --------------------------------------------------------------------------------

    @property
    def _samples(self) -> float:
        """Samples since the last message, the same for all layers."""
        if len(set(self._added)) > 1:
            raise InputError("samples of the layers of Gram matrices", self._added, "the same number for each layer")
        return float(self._added[0])

    def _fade(self) -> None:
        """The weights of earlier samples, once in an iteration."""
        if not self._is_faded:
            for sums in self.sums.values():
                sums.forget(self.rho, self.cross)
            self._is_faded = True

    def _solved(self, layer: int, ridge: float) -> Tensor:
        """This rank's rows of X."""
        sums, n = self.sums[layer], self.shapes[layer][0]
        known = self._factors.get(layer)
        if known is not None and known[0] == ridge:
            factor = known[1]
        else:
            factor = sums.factor(ridge)
            self.solves += 0 if self._is_again else factor_work(n)
        if self.fixed:
            self._factors[layer] = ridge, factor
        self.solves += sums.outputs * n**2
        return sums.solve(ridge, factor=factor)


def _ridge(sums: GramSum, ridge: float, share: float) -> float:
    """The ridge with a share of the mean of |a|^2."""
    return ridge + share * float(sums.lower.diagonal().sum()) / sums.weights[0] if share else ridge


def _tensors(sums: GramSum) -> dict[str, Tensor]:
    weights = torch.tensor(sums.weights, dtype=torch.float64)
    return {"gram": sums.gram, "cross": sums.cross.clone(), "weights": weights}


class GramTraffic:
    """The messages of shared Gram sums.

    Args:
        shares: of the ranks.
        team: them.
        precision: of the messages.
    """

    def __init__(self, shares: GramShares, team: Team | None, precision: str) -> None:
        self.shares, self.rank = shares, 0 if team is None else team.rank
        crosses, filled = shares.crosses, shares.filled
        both = [sum(pair) for pair in zip(crosses, filled)]
        self._messages = {
            "sums": Messages(team, sum(both), precision, both),
            "crosses": Messages(team, sum(crosses), precision, crosses),
            "matrices": Messages(team, sum(filled), precision, filled),
            "solutions": Messages(team, sum(crosses), precision, crosses),
        }
        pieces = [shares.pieces(rank) for rank in range(shares.ranks)]
        self._pieces = [
            [(k, begin, size, self._stays(rank, k)) for k, begin, size in each] for rank, each in enumerate(pieces)
        ]

    @property
    def sent(self) -> int:
        """Bytes that this rank has sent."""
        return sum(messages.sent for messages in self._messages.values())

    def begin(self, fresh: Mapping[int, GramSum], samples: float, matrices: bool) -> Arrival[tuple[Tensor, float]]:
        """Sums leave in the order of the ranks: of each its numbers of the triangles, then its rows of the R."""
        triangles = {k: fresh[k].triangle for k in fresh} if matrices else {}
        parts = []
        for rank, pieces in enumerate(self._pieces):
            if matrices:
                parts += [triangles[k][begin : begin + size] for k, begin, size, _ in pieces]
            parts += [fresh[k].cross[self.shares.rows(k, rank)].reshape(-1) for k in self.shares.layers(rank)]
        return self._messages["sums" if matrices else "crosses"].begin_reduce(torch.cat(parts), samples)

    def spread(self, numbers: Tensor) -> dict[int, Tensor]:
        """The triangles that this rank factors, from what each rank has summed of them.

        Where others need a number, too, all take it as it was sent.
        """
        shares, mine = self.shares, self._pieces[self.rank]
        own = numbers.split([size for _, _, size, _ in mine])
        sent = torch.cat([numbers[:0], *(each for each, (_, _, _, stays) in zip(own, mine) if not stays)])
        routes = [[(size, shares.groups[k]) for k, _, size, stays in each if not stays] for each in self._pieces]
        arrived, kept = iter(self._messages["matrices"].spread(sent, routes)), iter(own)
        found = {k: numbers.new_zeros(shares.triangle(k)) for k in shares.layers(self.rank)}
        for rank, pieces in enumerate(self._pieces):
            for layer, begin, size, stays in pieces:
                here = next(kept) if rank == self.rank else sent
                if self.rank in shares.groups[layer]:
                    found[layer][begin : begin + size] = here if stays else next(arrived)
        return found

    def gather(self, own: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
        """X of all layers from the rows that each rank has found."""
        rows = torch.cat([*(X.reshape(-1) for X in own), torch.zeros(0, dtype=dtype)])
        whole = self._messages["solutions"].allgather(rows)
        found = [torch.empty(outputs, inputs, dtype=dtype) for inputs, outputs in self.shares.shapes]
        for rank, numbers in enumerate(whole.split(self.shares.crosses)):
            for layer in self.shares.layers(rank):
                part = found[layer][self.shares.rows(layer, rank)]
                part.copy_(numbers[: part.numel()].reshape(part.shape))
                numbers = numbers[part.numel() :]
        return found

    def footprint(self, item: int) -> int:
        """Bytes while sums leave: triangles, all numbers in a row, and three copies as they are sent and come."""
        if self.shares.ranks == 1:
            return 0
        there, width = self._messages["sums"], self._messages["sums"].rounding.precision.itemsize
        return item * (sum(self.shares.filled) + there.size) + 3 * width * there.size

    def memory(self) -> dict[str, Tensor]:
        """What rounding took of the messages."""
        kinds = ((kind, messages.memory()) for kind, messages in self._messages.items())
        return {f"{kind}.{name}": each for kind, memory in kinds for name, each in memory.items()}

    def recall(self, memory: Mapping[str, Tensor]) -> None:
        """Go on from what `memory` gave."""
        for kind, messages in self._messages.items():
            start = f"{kind}."
            messages.recall({name.removeprefix(start): each for name, each in memory.items() if name.startswith(start)})

    def _stays(self, rank: int, layer: int) -> bool:
        """Whether no other rank needs what this one sums of a matrix."""
        return list(self.shares.groups[layer]) == [rank]
