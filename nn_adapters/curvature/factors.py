"""Kronecker factors of all layers of a network: sums over samples, averaged over batches."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from nn_adapters.curvature.chains import chains
from nn_adapters.curvature.layers import CurvedLayer, NormCurved
from nn_adapters.curvature.likelihoods import Likelihood
from pdeopt.core.errors import InputError
from pdeopt.core.messages import PRECISIONS, Arrival, Messages, here
from pdeopt.core.monitor import logged
from pdeopt.core.team import Team
from pdeopt.lowrank.kronecker import KroneckerBlocks
from pdeopt.squares.gram import GramSum

FISHER = ("exact", "sampled", "empirical")

#: A and G of a layer.
Pair: TypeAlias = tuple[GramSum, GramSum]


class KroneckerFactors:
    """E aa' and E gg' of each layer: with them, the Fisher matrix of the loss is about diag(G (x) A).

    - fisher "exact": G is the sum over the columns of H, one backward pass for each output; the Gauss-Newton matrix.
    - "sampled": one backward pass, for targets that the network draws; the same in the mean.
    - "empirical": one, for the targets of the data; another matrix, which is small where the loss is.

    Where a layer has several positions T or uses, A is the mean over them and G the sum ("expand": R. Eschenhagen,
    A. Immer, R. E. Turner, F. Schneider, P. Hennig, Kronecker-factored approximate curvature for modern neural network
    architectures, NeurIPS 2023). Dense blocks of normalization layers are exact.

    Args:
        network: whose outputs of a sample depend on that sample.
        layers: `curved_layers(network)`.
        likelihood: of the loss.
        fisher: as above.
        generator: of sampled targets.
        team: of ranks, each with samples of its own; None for one. A layer belongs to one of them, which alone has its
            averages: the sums of all ranks are reduced to the owners, in one message, which is under way until the
            averages are asked for.
        precision: of that message, see `Messages`.
        late: batches that are not in the averages yet, so that their messages have so many steps to arrive.

    Attributes:
        owners: rank of each layer; the one whose inverses take most is given away first, to the idlest.
        sums: A and G of each layer of this rank, as running sums.

    Raises:
        InputError: another kind of Fisher matrix, or another precision.

    Example:
        >>> factors = KroneckerFactors(network, curved_layers(network), CrossEntropy())
        >>> factors.average([(x,)])
        >>> factors.blocks().solve(gradient, damping=1e-2)
    """

    def __init__(
        self,
        network: nn.Module,
        layers: Sequence[CurvedLayer],
        likelihood: Likelihood,
        fisher: str = "exact",
        generator: torch.Generator | None = None,
        team: Team | None = None,
        precision: str = "float32",
        late: int = 0,
    ) -> None:
        if fisher not in FISHER:
            raise InputError("Fisher matrix", fisher, " | ".join(FISHER))
        self.network, self.layers, self.likelihood = network, list(layers), likelihood
        self.fisher, self.generator, self.team = fisher, generator, team
        self.rank, ranks = (0, 1) if team is None else (team.rank, team.size)
        self.owners = owners([layer.shape for layer in self.layers], ranks)
        fresh = self._empty()
        self.sums = {layer: fresh[layer] for layer in self.own(self.rank)}
        self._order = [layer for rank in range(ranks) for layer in self.own(rank)]
        packed = [sum(map(_packed, pair)) for pair in fresh]
        parts = [sum(packed[layer] for layer in self.own(rank)) for rank in range(ranks)]
        self._statistics = Messages(team, sum(parts), precision, parts)
        self.late, self._under_way = late, deque[tuple[Arrival[list[Pair]], float]]()
        sizes = [sum(layer.shape[0] * layer.shape[1] for layer in self._layers_of(rank)) for rank in range(ranks)]
        self._steps = Messages(team, sum(sizes), _precision(self.layers[0]), sizes, feedback=False)

    @property
    def sent(self) -> int:
        """Bytes that this rank has sent."""
        return self._statistics.sent + self._steps.sent

    def own(self, rank: int) -> list[int]:
        """The layers of a rank."""
        return [layer for layer, owner in enumerate(self.owners) if owner == rank]

    def _layers_of(self, rank: int) -> list[CurvedLayer]:
        return [self.layers[layer] for layer in self.own(rank)]

    def average(
        self,
        inputs: Sequence[tuple[Any, ...]],
        targets: Sequence[Any] = (),
        forget: float = 0.0,
        whole: int | None = None,
    ) -> None:
        """Take a batch into the averages.

        Args:
            inputs: arguments of the network, of each part of the batch.
            targets: of each part, for the empirical Fisher matrix.
            forget: factor of the weights of all batches so far.
            whole: samples of the batch on all ranks, where these are some of them; by default, these.
        """
        samples = sum(len(arguments[0]) for arguments in inputs)
        if whole is None:
            whole = samples if self.team is None else self.team.allreduce(samples)
        fresh = self.fresh(inputs, targets, whole)
        self._take(max(self.late - 1, 0))
        self._under_way.append((self._reduce(fresh, samples), forget))
        if self._statistics.ranks == 1:
            self._take(self.late)

    @logged("pdeoptNetMessages")
    def _reduce(self, fresh: list[Pair], samples: int) -> Arrival[list[Pair]]:
        """Send the sums of all ranks to the owners of the layers. Collective."""
        mine = [fresh[layer] for layer in self.sums]
        if self._statistics.ranks == 1:
            return here(mine)

        def received(come: tuple[Tensor, float]) -> list[Pair]:
            each = [sums for pair in mine for sums in pair]
            for sums, numbers in zip(each, come[0].split(list(map(_packed, each)))):
                sums.triangle, sums.weights = numbers, (come[1], come[1])
            return mine

        buffer = torch.cat([sums.triangle for layer in self._order for sums in fresh[layer]])
        return self._statistics.begin_reduce(buffer, samples).then(received)

    def _take(self, left: int) -> None:
        """Wait for the sums that are under way, but for the last ones, and take them into the averages."""
        while len(self._under_way) > left:
            arrival, forget = self._under_way.popleft()
            for own, fresh in zip(self.sums.values(), _come(arrival)):
                for a, b in zip(own, fresh):
                    a.forget(forget)
                    a.merge(b)

    @logged("pdeoptNetPrecondition")
    def precondition(self, inverse: KroneckerBlocks, g: Tensor, is_whole: bool = False) -> Tensor:
        """The inverse times the gradient, equal on all ranks. Collective.

        Args:
            inverse: that of `blocks()`, the layers of this rank.
            g: this rank's part of the gradient, (size,); they add up to it.
            is_whole: whether each rank has all of it.
        """
        if self.team is None or self.team.size == 1:
            return inverse.apply(g)
        sizes = [layer.shape[0] * layer.shape[1] for layer in self.layers]
        pieces = g.split(sizes)
        buffer, steps = torch.cat([pieces[layer] for layer in self._order]), self._steps
        own = buffer.split(steps.parts)[self.rank] if is_whole else steps.reduce_scatter(buffer)[0]
        whole = steps.allgather(inverse.apply(own) if len(own) else own)
        found = dict(zip(self._order, whole.split([sizes[layer] for layer in self._order])))
        return torch.cat([found[layer] for layer in range(len(sizes))])

    @logged("pdeoptNetFactors")
    def fresh(
        self, inputs: Sequence[tuple[Any, ...]], targets: Sequence[Any] = (), whole: int | None = None
    ) -> list[Pair]:
        """The sums of one batch, those of this rank for all layers, as `average`; `whole` samples on all ranks."""
        if self.fisher == "empirical" and len(targets) != len(inputs):
            got = f"{len(targets)} for {len(inputs)} parts of a batch"
            raise InputError("targets of the empirical Fisher matrix", got, "a loss computed by the likelihood itself")
        sums, samples = self._empty(), whole or sum(len(arguments[0]) for arguments in inputs)
        for number, arguments in enumerate(inputs):
            self._add(sums, arguments, targets[number] if self.fisher == "empirical" else None, samples)
        return sums

    def blocks(self) -> KroneckerBlocks:
        """The averages as a matrix, of the layers of this rank, without the last `late` batches if there are others."""
        has_some = any(a.weights[0] for a, _ in self.sums.values())
        self._take(self.late if has_some else 0)
        A = [torch.ones_like(a.lower) if self.layers[k].is_dense else _mean(a) for k, (a, _) in self.sums.items()]
        return KroneckerBlocks(A, [_mean(g) for _, g in self.sums.values()])

    def memory(self) -> dict[str, Any]:
        """What `recall` takes."""
        self._take(self.late)
        found = _written("", self.sums)
        for number, (arrival, forget) in enumerate(self._under_way):
            found |= _written(f"late{number}.", dict(zip(self.sums, arrival.finish()))) | {f"forget{number}": forget}
        return found | {f"lost.{name}": lost for name, lost in self._statistics.memory().items()}

    def recall(self, memory: dict[str, Any]) -> None:
        """Go on from what `memory` gave."""
        _read(memory, "", self.sums)
        self._under_way.clear()
        for number in range(sum(name.startswith("forget") for name in memory)):
            fresh = self._empty()
            mine = {layer: fresh[layer] for layer in self.sums}
            _read(memory, f"late{number}.", mine)
            self._under_way.append((here(list(mine.values())), float(memory[f"forget{number}"])))
        lost = {name.removeprefix("lost."): value for name, value in memory.items() if name.startswith("lost.")}
        self._statistics.recall(lost)

    def _empty(self) -> list[Pair]:
        return [tuple(GramSum(k, 0, layer.parameters[0].dtype) for k in reversed(layer.shape)) for layer in self.layers]  # type: ignore[misc]

    def _add(self, sums: list[Pair], arguments: tuple[Any, ...], targets: Any, whole: int) -> None:
        """Sums of a part of a batch of `whole` samples."""
        uses: list[list[tuple[Tensor, Tensor]]] = [[] for _ in self.layers]
        with torch.enable_grad(), recorded(self.layers, uses):
            outputs = with_buffers(self.network)(*arguments)
        detached = outputs.detach()
        if self.fisher == "exact":
            cotangents = self.likelihood.columns(detached)
        elif self.fisher == "sampled":
            cotangents = [self.likelihood.sample(detached, self.generator)]
        else:
            cotangents = [self.likelihood.gradient(detached, targets)]
        samples = len(outputs)
        unit = (whole * self.likelihood.weight(whole)) ** 0.5
        for layer, made, (A, _) in zip(self.layers, uses, sums):
            rows = [] if layer.is_dense else [layer.inputs(x).flatten(0, 1) for x, _ in made]
            scale = (samples / max(sum(map(len, rows)), 1)) ** 0.5
            for number, part in enumerate(rows or [A.lower[:0]]):
                A.add(scale * part, samples=samples if number == 0 else 0)
        made = [y for each in uses for _, y in each]
        entries = [chain.entries.pop() for chain in chains(self.network)]
        for number, cotangent in enumerate(cotangents):
            keep = number + 1 < len(cotangents)
            found = torch.autograd.grad(outputs, made + entries, cotangent, retain_graph=keep, allow_unused=True)
            derivatives = iter(torch.zeros_like(y) if g is None else g for g, y in zip(found, made))
            for layer, each, (_, G) in zip(self.layers, uses, sums):
                rows = _rows(layer, [(x, next(derivatives)) for x, _ in each], samples)
                G.add(unit * rows, samples=samples if number == 0 else 0)


def _rows(layer: CurvedLayer, uses: list[tuple[Tensor, Tensor]], samples: int) -> Tensor:
    """The rows that G is the sum of, for as many samples."""
    if isinstance(layer, NormCurved):
        parts = [layer.gradients(layer.inputs(x), g) for x, g in uses]
        return torch.stack(parts).sum(0) if parts else torch.zeros(samples, layer.shape[0])
    if not uses:
        return torch.zeros(samples, layer.shape[0])
    rows = torch.cat([layer.derivatives(g) for _, g in uses], 1)
    return rows.flatten(0, 1)


def owners(shapes: Sequence[tuple[int, int]], ranks: int) -> list[int]:
    """A rank for each layer (m, n), so that the busiest has little to do, of m^3 + n^3 an inverse: the largest first.

    Args:
        shapes: of the layers.
        ranks: their number.
    """
    work = [m**3 + n**3 for m, n in shapes]
    busy, found = [0] * ranks, [0] * len(shapes)
    for layer in sorted(range(len(shapes)), key=lambda layer: -work[layer]):
        found[layer] = busy.index(min(busy))
        busy[found[layer]] += work[layer]
    return found


@logged("pdeoptNetMessages")
def _come(arrival: Arrival[list[Pair]]) -> list[Pair]:
    return arrival.finish()


def _written(head: str, pairs: dict[int, Pair]) -> dict[str, Any]:
    """Sums by name, for a memory."""
    found: dict[str, Any] = {}
    for number, pair in pairs.items():
        for kind, sums in zip("AG", pair):
            found[f"{head}{kind}{number}"] = sums.lower.tril()
            found[f"{head}weight.{kind}{number}"] = sums.weights[0]
    return found


def _read(memory: dict[str, Any], head: str, pairs: dict[int, Pair]) -> None:
    """Sums from what `_written` gave."""
    for number, pair in pairs.items():
        for kind, sums in zip("AG", pair):
            sums.lower.copy_(memory[f"{head}{kind}{number}"])
            weight = float(memory[f"{head}weight.{kind}{number}"])
            sums.weights = weight, weight


def _packed(sums: GramSum) -> int:
    """Numbers of a triangle."""
    return sums.inputs * (sums.inputs + 1) // 2


def _precision(layer: CurvedLayer) -> str:
    return next((name for name, dtype in PRECISIONS.items() if dtype == layer.parameters[0].dtype), "float32")


def _mean(sums: GramSum) -> Tensor:
    return sums.gram / (sums.weights[0] or 1.0)


@contextmanager
def recorded(layers: Sequence[CurvedLayer], uses: list[list[tuple[Tensor, Tensor]]]) -> Iterator[None]:
    """Inside, what each layer is called with and returns is kept, (inputs, outputs) of each use."""

    def hook(number: int) -> Callable[..., Tensor]:
        def keep(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
            uses[number].append((arguments[0].detach(), output))
            return output.clone()  # what follows may change it in place

        return keep

    handles = [layer.module.register_forward_hook(hook(number)) for number, layer in enumerate(layers)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def with_buffers(network: nn.Module) -> Callable[..., Tensor]:
    """The network with copies of its buffers: running means stay as they are."""
    copies = {name: buffer.clone() for name, buffer in network.named_buffers()}

    def call(*arguments: Any) -> Tensor:
        return torch.func.functional_call(network, copies, arguments)  # type: ignore[no-any-return]

    return call
