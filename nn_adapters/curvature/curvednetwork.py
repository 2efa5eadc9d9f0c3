"""A network, its loss and the inputs of a batch, as functions of one flat vector: what second-order optimizers ask."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nn_adapters.curvature.chains import chains, gradient_of, shared_copy
from nn_adapters.curvature.factors import with_buffers
from nn_adapters.curvature.layers import curved_layers
from nn_adapters.curvature.likelihoods import Likelihood
from nn_adapters.curvature.products import FisherMatrix, by_layer, flat
from nn_adapters.layers.batching import is_random
from pdeopt.core.errors import InputError
from pdeopt.core.monitor import logged
from pdeopt.core.team import Team


class CurvedNetwork:
    """The parameters theta of a network as a flat vector, and the quadratic model of its loss on a batch.

    With a team, sums over samples are those of all ranks. With a `LayerParallel` a rank has the entries of its layers
    and of what all ranks have; inner products count the latter once.

    Args:
        network, likelihood: see `KFAC`.
        l2: weight of |theta|^2 / 2, which is added to the loss.
        team: ranks with samples of their own; None for one.

    Attributes:
        serial: the network, or a copy with the same weights whose layers go one after the other.
        layers: of `serial`, in the order of the vector.
        inputs, targets: of the batch, by parts.
        share: weight of this rank's mean in that of all ranks; 1 where losses are sums.
        chain: the layers in parallel, on the ranks that own them; None where there are none.
        samples: of the batch, on all ranks.

    Raises:
        InputError: a network with random numbers in training mode, a layer without a block of curvature, or a team and
            a `LayerParallel` at once.
    """

    def __init__(self, network: nn.Module, likelihood: Likelihood, l2: float = 0.0, team: Team | None = None) -> None:
        noisy = next((part for part in network.modules() if part.training and is_random(part)), None)
        if noisy is not None:
            raise InputError("network", f"{type(noisy).__name__} in training mode", "a network without random numbers")
        self.network, self.likelihood, self.l2, self.team = network, likelihood, l2, team
        self.serial = shared_copy(network)
        self.layers = curved_layers(self.serial)
        self.inputs: list[tuple[Any, ...]] = []
        self.targets: list[Any] = []
        self.samples, self._own_samples, self.share = 0, 0, 1.0
        self.chain = next(iter(chains(self.serial)), None)
        if self.chain is not None and team is not None:
            raise InputError("team of a network with LayerParallel", "one", "None: its ranks share the layers")
        own = set() if self.chain is None else {id(p) for p in self.chain.parameters()}
        sizes = [(layer.shape[0] * layer.shape[1], id(layer.parameters[0]) in own) for layer in self.layers]
        self._own = torch.cat([torch.full((size,), is_own) for size, is_own in sizes])

    def weigh(self) -> None:
        """Count the samples of the batch. Collective."""
        self._own_samples = _count(self.inputs)
        self.samples = round(self.total(self._own_samples))
        self.share = self._own_samples / self.samples if self.likelihood.reduction == "mean" else 1.0

    # -- sums over ranks -----------------------------------------------------------------------------------

    def total(self, own: float) -> float:
        """The sum over the ranks of a team."""
        return own if self.team is None else float(self.team.allreduce(own))

    def is_finite(self, g: Tensor) -> bool:
        """Whether a vector is, on all ranks."""
        comm = self.team if self.chain is None else self.chain.comm
        broken = float(not bool(g.isfinite().all()))
        return not (broken if comm is None else comm.allreduce(broken))

    def dots(self, V: Tensor, W: Tensor) -> Tensor:
        """Inner products of vectors, (rows, size) each, float64."""
        if self.chain is None:
            return (V @ W.T).double().cpu()
        own = (V if self.chain.comm.rank == 0 else V * self._own.to(V.device)) @ W.T
        return torch.from_numpy(self.chain.comm.allreduce(own.double().cpu().numpy()))

    # -- the vector ----------------------------------------------------------------------------------------

    def parameters(self) -> Tensor:
        """theta, (size,)."""
        return flat(self.layers, [[p.detach() for p in layer.parameters] for layer in self.layers])

    def gradient(self) -> Tensor:
        """The gradient that is in `.grad`, with its regularization, (size,); of a team, the part of this rank."""
        g = flat(self.layers, [[gradient_of(p) for p in layer.parameters] for layer in self.layers])
        g = g if self.team is None else self.share * g
        return g + self.l2 / (1 if self.team is None else self.team.size) * self.parameters() if self.l2 else g

    @logged("pdeoptNetUpdate")
    @torch.no_grad()
    def move(self, step: Tensor, decay: float = 0.0) -> None:
        """theta += step; before, weights, that is, matrices, lose a share `decay`."""
        for layer, parts in zip(self.layers, by_layer(self.layers, step)):
            for p, part in zip(layer.parameters, parts):
                if decay and p.dim() > 1:
                    p.mul_(1.0 - decay)
                p.add_(part)

    @contextmanager
    def moved(self, shift: Tensor) -> Iterator[None]:
        """Inside, the parameters are theta + shift, without gradients; then all, and buffers, are as they were."""
        kept = [(p, p.detach().clone()) for layer in self.layers for p in layer.parameters]
        gradients = [(p, p.grad) for p in self.network.parameters()]
        buffers = [(each, each.clone()) for each in self.network.buffers()]
        for p, _ in gradients:
            p.grad = None
        try:
            self.move(shift)
            yield
        finally:
            with torch.no_grad():
                for each, old in (*kept, *buffers):
                    each.copy_(old)
            for p, grad in gradients:
                p.grad = grad

    # -- the batch -----------------------------------------------------------------------------------------

    def loss(self, value: Any) -> float:
        """The loss with its regularization, from what a closure returned."""
        own = self.share * float(torch.as_tensor(value).detach())
        return self.total(own) + (0.5 * self.l2 * self.square(self.parameters()) if self.l2 else 0.0)

    def some(self, most: int) -> tuple[list[tuple[Any, ...]], list[Any]]:
        """Inputs and targets of at most so many samples of all ranks, evenly spaced in each part; 0 for all.

        No targets where they are not one for each sample of each part, as where the loss takes several parts at once.
        """
        sizes = [len(arguments[0]) for arguments in self.inputs]
        targets = self.targets if list(map(len, self.targets)) == sizes else []
        if not 0 < most < self.samples:
            return self.inputs, targets
        rows = [_spaced(size, most / self.samples) for size in sizes]
        inputs = [tuple(_taken(each, len(part[0]), own) for each in part) for part, own in zip(self.inputs, rows)]
        return inputs, [target[own] for target, own in zip(targets, rows)]

    def fisher(self, most: int = 0) -> FisherMatrix:
        """That of this rank's samples, or of some of them, at theta."""
        self.serial.train(self.network.training)
        return FisherMatrix(self.serial, self.layers, self.likelihood, self.some(most)[0])

    def quadratic(self, directions: list[Tensor], g: Tensor, damping: float, most: int = 0) -> tuple[Tensor, Tensor]:
        """b_i = g.d_i and Q_ij = d_i.(F + damping + l2)d_j, float64; F of at most so many samples. Collective."""
        V, fisher = torch.stack(directions), self.fisher(most)
        is_mean = self.likelihood.reduction == "mean"
        weight = self.share if is_mean else self._own_samples / _count(fisher.inputs)  # some stand for all
        b, Q = self.dots(V, g[None]), weight * fisher.gram(directions)
        if self.team is not None:
            whole = self.team.allreduce(torch.cat([b, Q], 1).numpy())
            b, Q = (part.clone() for part in torch.from_numpy(whole).split([1, len(V)], 1))
        self._modeled = fisher, weight
        return b[:, 0], Q + (damping + self.l2) * self.dots(V, V)

    @torch.no_grad()
    def losses(self, step: Tensor, most: int = 0) -> tuple[float, float]:
        """The loss before and after a step, of the samples of the last quadratic model, in which `most` was the same.

        Without its regularization; NaN where targets are not known, as those of another loss are not, or are not those
        of the outputs themselves. Collective.
        """
        inputs, targets = self.some(most)
        fisher, weight = self._modeled
        if not targets or any(y.shape != each.shape[: y.dim()] for each, y in zip(fisher.outputs, targets)):
            return math.nan, math.nan
        with self.moved(step):
            after = [with_buffers(self.serial)(*arguments) for arguments in inputs]
        sums = [
            sum(float(self.likelihood.each(each, y).double().sum()) for each, y in zip(outputs, targets))
            for outputs in (fisher.outputs, after)
        ]
        weight *= self.likelihood.weight(_count(inputs))
        before, then = (self.total(weight * each) for each in sums)
        return before, then

    def square(self, v: Tensor) -> float:
        """|v|^2."""
        return float(self.dots(v[None], v[None]))


def summed(team: Team | None, own: Tensor) -> Tensor:
    """The sum over the ranks of a team of a vector, equal on all to the last bit. Collective.

    Args:
        team: None for one rank.
        own: (size,).
    """
    return own if team is None else torch.from_numpy(team.allreduce(own.cpu().numpy())).to(own)


def _count(inputs: Sequence[tuple[Any, ...]]) -> int:
    """The samples of all parts."""
    return sum(len(arguments[0]) for arguments in inputs)


def _spaced(samples: int, share: float) -> Tensor:
    """Rows, evenly spaced: a batch may be in the order of its classes."""
    count = min(samples, max(1, round(share * samples)))
    return torch.arange(count) * samples // count


def _taken(argument: Any, samples: int, rows: Tensor) -> Any:
    """Rows of what has one for each sample."""
    return argument[rows.to(argument.device)] if isinstance(argument, Tensor) and len(argument) == samples else argument
