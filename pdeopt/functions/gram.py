"""Running sums aa' and za' over samples and ranks, and the least-squares problems that they state.

One home for what training by splitting (its weights), the factor A of Kronecker curvature, the last layer of a network
and random features share: everything that linear least squares min sum |X a - z|^2 has to know of its samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pdeopt.core.errors import InputError, SolveFailure, together
from pdeopt.core.messages import Messages
from pdeopt.core.team import Team


class GramSum:
    """G = sum_s w_s a_s a_s' and R = sum_s v_s z_s a_s' of the samples so far, with the sums of their weights.

    The weights are 1 when a sample comes and fade with `forget`: with `forget(rho)` before each batch, G / sum w is an
    exponential mean without the bias of its start. G and R may forget differently: methods that add increments to
    X keep G over many batches and R for one.

    Args:
        inputs: n, entries of a.
        outputs: m, entries of z; 0 where only G is asked for.
        dtype: of the sums.

    Attributes:
        gram: G, (inputs, inputs).
        cross: R, (outputs, inputs).
        weights: sum w and sum v.

    Raises:
        InputError: sizes that are no sizes.

    Example:
        >>> sums = GramSum(784, 10)
        >>> sums.add(a, z)                                    # (batch, 784) and (batch, 10)
        >>> X = sums.solve(ridge=1e-3)                        # (10, 784)
    """

    def __init__(self, inputs: int, outputs: int = 0, dtype: torch.dtype = torch.float64) -> None:
        if inputs < 1 or outputs < 0:
            raise InputError("inputs and outputs of a Gram matrix", f"{inputs} and {outputs}", ">= 1 and >= 0")
        self.inputs, self.outputs = inputs, outputs
        self.gram, self.cross = torch.zeros(inputs, inputs, dtype=dtype), torch.zeros(outputs, inputs, dtype=dtype)
        self.weights = (0.0, 0.0)
        rows, columns = torch.tril_indices(inputs, inputs)
        self._triangle = rows * inputs + columns

    def add(self, a: Tensor, z: Tensor | None = None, samples: int | None = None) -> None:
        """Rows a (batch, inputs) with z (batch, outputs), each of weight 1; or all together of `samples` samples."""
        a = a.to(self.gram)
        self.gram.addmm_(a.T, a)
        if z is not None:
            self.cross.addmm_(z.to(self.cross).T, a)
        samples = len(a) if samples is None else samples
        self.weights = (self.weights[0] + samples, self.weights[1] + samples)

    def forget(self, rho: float, cross: float | None = None) -> None:
        """Multiply the weights of all samples so far, w by rho and v by `cross`, by default rho; in [0, 1]."""
        cross = rho if cross is None else cross
        if not (0.0 <= rho <= 1.0 and 0.0 <= cross <= 1.0):
            raise InputError("forgetting of a Gram matrix", f"{rho} and {cross}", "0 to 1")
        self.gram *= rho
        self.cross *= cross
        self.weights = (rho * self.weights[0], cross * self.weights[1])

    def merge(self, other: GramSum) -> None:
        """Add the sums of other samples."""
        self.gram += other.gram
        self.cross += other.cross
        self.weights = (self.weights[0] + other.weights[0], self.weights[1] + other.weights[1])

    def solve(self, ridge: float = 0.0, prox: float = 0.0, center: Tensor | None = None) -> Tensor:
        """X (G/w + (ridge + prox) I) = R/v + prox center, w and v the sums of the weights; (outputs, inputs).

        Where both forget alike, the minimum of the mean of |X a_s - z_s|^2 plus ridge |X|^2 + prox |X - center|^2.
        Where several X are minima, as with entries of a that are always 0, the one of least norm.

        Args:
            ridge, prox: >= 0.
            center: (outputs, inputs), of the proximal term; default 0.

        Raises:
            InputError: no samples, or negative numbers.
            SolveFailure: sums that are not finite.
        """
        if min(self.weights) <= 0.0:
            raise InputError("samples of a Gram matrix", 0, ">= 1")
        if not (ridge >= 0.0 and prox >= 0.0):
            raise InputError("ridge and prox of a Gram matrix", f"{ridge} and {prox}", ">= 0")
        right = self.cross / self.weights[1]
        if center is not None:
            right = right + prox * center.to(right)
        matrix = self.gram / self.weights[0]
        matrix.diagonal().add_(ridge + prox)
        factor, info = torch.linalg.cholesky_ex(matrix)
        if int(info) == 0 and self._is_regular(factor):
            return torch.cholesky_solve(right.T, factor).T
        return self._of_least_norm(matrix, right)

    @property
    def singular(self) -> bool:
        """Whether G is singular to rounding, as with entries of a that are always 0."""
        factor, info = torch.linalg.cholesky_ex(self.gram)
        return int(info) != 0 or not self._is_regular(factor)

    def packed(self) -> Tensor:
        """The sums in a row, (packed_size,): the lower triangle of G by rows, then R."""
        return torch.cat([self.gram.reshape(-1)[self._triangle], self.cross.reshape(-1)])

    @property
    def packed_size(self) -> int:
        """Numbers of a packed sum."""
        return self.inputs * (self.inputs + 1) // 2 + self.outputs * self.inputs

    def unpack(self, numbers: Tensor, weights: tuple[float, float]) -> None:
        """Take the sums that `packed` made, and their weights, instead of those that are here."""
        triangle, cross = numbers.split([len(self._triangle), self.cross.numel()])
        self.gram.reshape(-1)[self._triangle] = triangle.to(self.gram)
        lower = self.gram.tril(-1)
        self.gram.copy_(self.gram.tril() + lower.T)
        self.cross.copy_(cross.reshape(self.cross.shape))
        self.weights = weights

    def _is_regular(self, factor: Tensor) -> bool:
        """Whether the pivots of a Cholesky factor stand above rounding."""
        pivots = factor.diagonal().square()
        return bool(pivots.min() > len(pivots) * torch.finfo(pivots.dtype).eps * pivots.max())

    def _of_least_norm(self, matrix: Tensor, right: Tensor) -> Tensor:
        if not (bool(matrix.isfinite().all()) and bool(right.isfinite().all())):
            raise SolveFailure("least squares: the sums are not finite", "smaller steps, or scaled samples")
        values, vectors = torch.linalg.eigh(matrix)
        keep = values > len(values) * torch.finfo(values.dtype).eps * values[-1]
        inverse = torch.where(keep, 1.0 / values, 0.0)
        solution: Tensor = (right @ vectors * inverse) @ vectors.T
        return solution


class SharedGrams:
    """Gram sums of several layers over the samples of all ranks, each solved by the rank that owns it.

    An iteration sends two messages: the packed sums to their owners, the solutions back to all (transpose reduction:
    G. Taylor, R. Burmeister, Z. Xu, B. Singh, A. Patel, T. Goldstein, ICML 2016; there every rank factors every
    matrix). Owners are dealt out by the multiplications of a solve, the largest first.

    Args:
        shapes: (inputs, outputs) of each layer.
        team: of ranks, each with its own samples; None for one.
        precision: of the messages, see `Messages`.
        dtype: of the sums.
        rho, cross: forgetting of G and of R at each `reduce`.

    Attributes:
        owners: rank of each layer.
        sent: bytes that this rank has sent.

    Example:
        >>> grams = SharedGrams([(785, 500), (501, 10)], MPI.COMM_WORLD, rho=0.9, cross=0.0)
        >>> grams.add(0, a, z)                                # this rank's samples
        >>> grams.reduce()
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
    ) -> None:
        self.shapes, self.dtype = list(shapes), dtype
        self.rho, self.cross = rho, cross
        self.rank, ranks = (0, 1) if team is None else (team.rank, team.size)
        self._comm = team
        self.owners = _owners(self.shapes, ranks)
        self._order = sorted(range(len(shapes)), key=lambda layer: self.owners[layer])
        self._fresh = [GramSum(*shape, dtype) for shape in shapes]
        self.sums = {layer: GramSum(*shapes[layer], dtype) for layer in self._order if self.owners[layer] == self.rank}
        there = [sum(self._fresh[k].packed_size for k in self._of(rank)) for rank in range(ranks)]
        back = [sum(self._fresh[k].cross.numel() for k in self._of(rank)) for rank in range(ranks)]
        self._sums = Messages(team, sum(there), precision, there)
        self._solutions = Messages(team, sum(back), precision, back)

    @property
    def sent(self) -> int:
        """Bytes that this rank has sent."""
        return self._sums.sent + self._solutions.sent

    def add(self, layer: int, a: Tensor, z: Tensor | None = None, samples: int | None = None) -> None:
        """Rows of this rank for a layer: a (batch, inputs), z (batch, outputs), each a sample, or of `samples`."""
        self._fresh[layer].add(a, z, samples)

    def reduce(self) -> None:
        """Bring what was added since the last call to the owners. Collective."""
        buffer = torch.cat([self._fresh[layer].packed() for layer in self._order])
        own, weight = self._sums.reduce_scatter(buffer, self._samples)
        layers = self._of(self.rank)
        for layer, numbers in zip(layers, own.split([self._fresh[layer].packed_size for layer in layers])):
            self._fresh[layer].unpack(numbers, (weight, weight))
            self.sums[layer].forget(self.rho, self.cross)
            self.sums[layer].merge(self._fresh[layer])
        for fresh in self._fresh:
            fresh.forget(0.0)

    @property
    def _samples(self) -> float:
        """Samples since the last message, the same for all layers."""
        counts = {sums.weights[0] for sums in self._fresh}
        if len(counts) > 1:
            raise InputError("samples of the layers of Gram matrices", sorted(counts), "the same number for each layer")
        return counts.pop()

    def solve(self, ridge: Sequence[float]) -> list[Tensor]:
        """X of each layer, (outputs, inputs), with its own ridge; equal on all ranks to the last bit. Collective.

        Raises:
            SolveFailure: sums that are not finite, on all ranks.
        """
        own = self._together(lambda: [self.sums[k].solve(ridge[k]).reshape(-1) for k in self._of(self.rank)])
        whole = self._solutions.allgather(torch.cat([*own, torch.zeros(0, dtype=self.dtype)]))
        sizes = [self._fresh[layer].cross.numel() for layer in self._order]
        found = dict(zip(self._order, whole.split(sizes)))
        return [found[layer].reshape(self._fresh[layer].cross.shape) for layer in range(len(self.shapes))]

    def memory(self) -> dict[str, Tensor]:
        """What a restart with the same ranks needs of this rank."""
        own = {f"{layer}.{name}": each for layer, sums in self.sums.items() for name, each in _tensors(sums).items()}
        lost = ((kind, messages.memory()) for kind, messages in (("there", self._sums), ("back", self._solutions)))
        return own | {f"{kind}.{name}": each for kind, memory in lost for name, each in memory.items()}

    def recall(self, memory: dict[str, Tensor]) -> None:
        """Go on from what `memory` gave."""
        for layer, sums in self.sums.items():
            sums.gram.copy_(memory[f"{layer}.gram"])
            sums.cross.copy_(memory[f"{layer}.cross"])
            w, v = memory[f"{layer}.weights"].tolist()
            sums.weights = (w, v)
        for kind, messages in (("there", self._sums), ("back", self._solutions)):
            start = f"{kind}."
            messages.recall({name.removeprefix(start): each for name, each in memory.items() if name.startswith(start)})

    def _together(self, function: Callable[[], list[Tensor]]) -> list[Tensor]:
        return function() if self._comm is None else together(self._comm, function)

    def _of(self, rank: int) -> list[int]:
        """The layers of a rank, in the order of the messages."""
        return [layer for layer in self._order if self.owners[layer] == rank]


def _tensors(sums: GramSum) -> dict[str, Tensor]:
    weights = torch.tensor(sums.weights, dtype=torch.float64)
    return {"gram": sums.gram.clone(), "cross": sums.cross.clone(), "weights": weights}


def _owners(shapes: Sequence[tuple[int, int]], ranks: int) -> list[int]:
    """A rank for each layer, so that the busiest has little to do: the largest layer first, to the idlest rank."""
    work = [inputs**3 / 3 + 2 * outputs * inputs**2 for inputs, outputs in shapes]
    busy, owners = [0.0] * ranks, [0] * len(shapes)
    for layer in sorted(range(len(shapes)), key=lambda layer: -work[layer]):
        owners[layer] = busy.index(min(busy))
        busy[owners[layer]] += work[layer]
    return owners
