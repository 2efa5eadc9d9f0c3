"""The Kronecker factors of a network as the metric of its loss: what `-tr_metric kfac` measures steps in."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nn_adapters.curvature.factors import KroneckerFactors
from nn_adapters.curvature.layers import curved_layers
from nn_adapters.curvature.likelihoods import CrossEntropy, Likelihood, SquaredError
from nn_adapters.curvature.products import flat
from nn_adapters.layers.parallelmodule import ParallelModule
from pdeopt.core.errors import InputError
from pdeopt.core.settings import Settings, setting
from pdeopt.lowrank.kronecker import KroneckerBlocks, KroneckerMetric


@dataclass(frozen=True)
class FactorSettings(Settings, prefix="metric_"):
    """Kronecker factors as the metric of a trust region."""

    fisher: str = setting("sampled", "targets of the factors G", choices=("sampled", "exact"))
    average: float = setting(0.5, "factor of the weights of older points in the factors", at_least=0, at_most=1)
    damping: float = setting(1e-3, "damping of the factors, beside that of a Tikhonov term", at_least=0)
    seed: int = setting(0, "seed of sampled targets")


class NetworkMetric:
    """diag(G (x) A) + damping of a network, at the point where it was refreshed; the parameters are theta of the loss.

    A refresh takes the samples of the function that it is given, a batch perhaps, into averages. It counts as as many
    gradients as it takes backward passes.

    Args:
        network: whose every parameter belongs to a layer with a block of curvature; a copy is made.
        loss: a `Likelihood`, or `nn.functional.cross_entropy` or `mse_loss`.
        x: one sample or more, in the precision of the evaluation.
        settings: of the factors.

    Raises:
        InputError: another loss; layers without a block, or in parallel.
    """

    def __init__(self, network: nn.Module, loss: Any, x: Tensor, settings: FactorSettings) -> None:
        if any(isinstance(part, ParallelModule) for part in network.modules()):
            raise InputError("network with metric kfac", "layers in parallel", "layers one after the other")
        self.settings, self.network = settings, deepcopy(network).to(x.device, x.dtype).requires_grad_(True)
        layers = curved_layers(self.network)
        with torch.no_grad():
            likelihood = likelihood_of(loss, self.network(x[:1])[0].numel())
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.factors = KroneckerFactors(self.network, layers, likelihood, settings.fisher, self.generator)
        numbers, places = 0, {}
        for p in self.network.parameters():
            places[id(p)] = torch.arange(numbers, numbers + p.numel()).reshape(p.shape)
            numbers += p.numel()
        self.order = flat(layers, [[places[id(p)] for p in layer.parameters] for layer in layers])
        self._now: KroneckerMetric | None = None

    @torch.no_grad()
    def refresh(self, function: Any, x: Tensor) -> None:
        """Take in the samples of a `NetworkLoss` at x."""
        for p, part in zip(self.network.parameters(), x.split([p.numel() for p in self.network.parameters()])):
            p.copy_(part.view_as(p))
        passes = 1 if self.settings.fisher == "sampled" else self._outputs(function.x)
        self.factors.average([(part,) for part in function.x.split(function.chunk)], (), self.settings.average)
        function.tally.gradients += passes
        function.tally.work += passes * function.costs.gradient
        self._take(self.settings.damping + function.tikhonov)

    def _outputs(self, x: Tensor) -> int:
        return len(self.factors.likelihood.columns(self.network(x[:1])))

    def _take(self, damping: float) -> None:
        blocks, self._damping = self.factors.blocks(), damping
        A, G = ([each.double().cpu() for each in factors] for factors in (blocks.A, blocks.G))
        self._now = KroneckerMetric(KroneckerBlocks(A, G), damping, self.order)

    @property
    def now(self) -> KroneckerMetric:
        """The metric of the last refresh."""
        if self._now is None:
            raise InputError("metric kfac", "no refresh", "a refresh at a point before")
        return self._now

    def root(self, v: Tensor) -> Tensor:
        return self.now.root(v)

    def root_solve(self, w: Tensor) -> Tensor:
        return self.now.root_solve(w)

    def adjoint(self, w: Tensor) -> Tensor:
        return self.now.adjoint(w)

    def adjoint_solve(self, g: Tensor) -> Tensor:
        return self.now.adjoint_solve(g)

    def local(self, indices: Tensor) -> KroneckerMetric:
        return self.now.local(indices)

    def memory(self) -> dict[str, Any]:
        if self._now is None:
            return {}
        return self.factors.memory() | {"damping": self._damping, "random": self.generator.get_state()}

    def recall(self, memory: dict[str, Any]) -> None:
        if memory:
            self.factors.recall(memory)
            self.generator.set_state(memory["random"])
            self._take(float(memory["damping"]))


def likelihood_of(loss: Any, outputs: int) -> Likelihood:
    """The likelihood that a loss of `NetworkLoss` is.

    Args:
        loss: (outputs, targets) -> their mean loss.
        outputs: numbers of a sample.

    Raises:
        InputError: one that is not known.
    """
    if isinstance(loss, Likelihood) and loss.reduction == "mean":
        return loss
    if loss is nn.functional.cross_entropy:
        return CrossEntropy()
    if loss is nn.functional.mse_loss:
        return SquaredError(factor=2.0 / outputs)
    legal = "CrossEntropy() | SquaredError() | nn.functional.cross_entropy | nn.functional.mse_loss"
    raise InputError("loss of a network with metric kfac", getattr(loss, "__name__", type(loss).__name__), legal)
