"""Residual networks of different depth as a hierarchy: half the layers, twice the step.

A residual network is Euler's method for du/dt = F(u; theta(t)); a network of half the layers over the same time is the
same problem on a coarser grid (L. Gaedke-Merzhaeuser, A. Kopanicakova, R. Krause, Multilevel minimization for deep
residual networks, ESAIM: Proc. 71, 2021). The weights are constant on layers, so P gives both of two layers the weights
of their coarse one; what is before and after the layers is the same on all levels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from nn_adapters.layers.blocks import LayerStack
from nn_adapters.losses.network import NetworkLoss
from pdeopt.core.arrays import Array
from pdeopt.core.errors import InputError
from pdeopt.functions.hierarchy import Hierarchy, Transfer
from pdeopt.functions.smooth import SmoothFunction


class ResNet(nn.Module):
    """Opening, layers u + dt F(u; theta_l) with dt = Tf / layers, head, one after the other.

    Args:
        opening: maps samples (batch, ...) to features.
        block: makes F, which maps features to features of the same shape.
        layers: how many.
        head: maps features to outputs.
        Tf: time of the layers, the same for networks of one `depth_hierarchy`.

    Raises:
        InputError: fewer than one layer, or a time that is not positive.
    """

    def __init__(
        self, opening: nn.Module, block: Callable[[], nn.Module], layers: int, head: nn.Module, Tf: float = 1.0
    ) -> None:
        super().__init__()
        self.opening, self.layers, self.head = opening, LayerStack(block, layers, Tf), head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(self.opening(x)))  # type: ignore[no-any-return]


class Rescaled(SmoothFunction):
    """v -> f(v / s) + tikhonov/2 |v|^2: a smooth function in scaled unknowns, with the tally and the costs of f.

    Args:
        function: f.
        scale: s, (size,), positive.
        tikhonov: factor of the regularization.
    """

    def __init__(self, function: SmoothFunction, scale: Tensor, tikhonov: float = 0.0) -> None:
        super().__init__(function.size, function.comm, function.costs, function.tally)
        self.function, self.scale, self.tikhonov = function, scale, tikhonov

    def _value(self, x: Tensor) -> float:
        return self.function.evaluate_value(x / self.scale) + 0.5 * self.tikhonov * self.dot(x, x)

    def _value_and_gradient(self, x: Tensor) -> tuple[float, Tensor]:
        value, gradient = self.function.evaluate(x / self.scale)
        return value + 0.5 * self.tikhonov * self.dot(x, x), gradient / self.scale + self.tikhonov * x

    def _hvp(self, x: Tensor, d: Tensor) -> Tensor:
        return self.function.evaluate_hvp(x / self.scale, d / self.scale) / self.scale + self.tikhonov * d


def depth_hierarchy(losses: Sequence[NetworkLoss], tikhonov: float = 0.0) -> Hierarchy:
    """A `Hierarchy` of the losses of residual networks of decreasing depth, alike in all else; for RMTR and others.

    The unknowns of the finest level are its parameters. Those of a coarse layer are sqrt(k) times its parameters where
    it stands for k layers of the finest: so P has orthonormal columns. A call costs its part of the operations; so
    fewer samples on coarse levels are cheaper, too.

    Source: L. Gaedke-Merzhaeuser, A. Kopanicakova, R. Krause, Multilevel minimization for deep residual networks,
    ESAIM: Proc. 71, 2021, with their prolongation of weights that are constant on layers.

    Args:
        losses: of networks with one `LayerStack` each, finest first; each number of layers divides the one before.
        tikhonov: factor of 1/2 |unknowns|^2, on all levels.

    Returns:
        The hierarchy; as a function it is the loss of the finest network, with the regularization.

    Raises:
        InputError: networks that differ in more than the number of layers, or numbers that do not divide.

    Example:
        >>> networks = [ResNet(nn.Linear(2, 8), lambda: dense(8), layers, nn.Linear(8, 5)) for layers in (32, 16, 8)]
        >>> losses = [NetworkLoss(network, nn.functional.cross_entropy, x, labels) for network in networks]
        >>> result = RMTR(depth_hierarchy(losses)).minimize(losses[0].parameters())
    """
    transfers = [Transfer.aggregates(_parents(fine, coarse)) for fine, coarse in pairwise(losses)]
    scale = torch.ones(losses[0].size, dtype=torch.float64)
    functions: list[SmoothFunction] = []
    whole = operations(losses[0])
    for loss, transfer in zip(losses, [None, *transfers]):
        scale = scale if transfer is None else transfer.restrict(scale)
        functions.append(Rescaled(loss, scale, tikhonov))
        functions[-1].costs = losses[0].costs.times(operations(loss) / whole)
    return Hierarchy(functions, transfers)


def operations(loss: NetworkLoss) -> float:
    """Floating-point operations of matrix products and convolutions in one evaluation, over all samples."""
    with FlopCounterMode(display=False) as counter:
        loss.predict(loss.parameters(), loss.x[:1])
    return float(counter.get_total_flops() * loss.samples)


def _parents(fine: NetworkLoss, coarse: NetworkLoss) -> Array:
    """The parameter of the coarse network for each of the fine one."""
    (name, fine_layers), (_, coarse_layers) = _stack(fine.network), _stack(coarse.network)
    factor, rest = divmod(len(fine_layers), len(coarse_layers))
    if rest:
        got = f"{len(fine_layers)} and {len(coarse_layers)}"
        raise InputError("layers of neighboring levels", got, "numbers that divide")
    prefix = name + ".layers."
    places, start = {}, 0
    for name, parameter in coarse.network.named_parameters():
        places[name] = np.arange(start, start + parameter.numel())
        start += parameter.numel()
    parents = []
    for name, parameter in fine.network.named_parameters():
        if name.startswith(prefix):
            layer, _, rest_of_name = name.removeprefix(prefix).partition(".")
            name = f"{prefix}{int(layer) // factor}.{rest_of_name}"
        if name not in places or len(places[name]) != parameter.numel():
            raise InputError(
                "networks of a depth hierarchy",
                f"{name} of another shape, or on one level alone",
                "networks that differ in the number of layers",
            )
        parents.append(places[name])
    return np.concatenate(parents)


def _stack(network: nn.Module) -> tuple[str, nn.ModuleList]:
    """The name and the layers of the one `LayerStack`."""
    found = [(name, part.layers) for name, part in network.named_modules() if isinstance(part, LayerStack)]
    if len(found) != 1:
        raise InputError("network of a depth hierarchy", f"{len(found)} stacks of layers", "one `LayerStack`")
    return found[0]
