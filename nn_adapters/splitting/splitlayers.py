"""Networks as chains of layers that can be split: an affine map, an activation, and a skip where there is one.

    m_l = W_l [a_{l-1}; 1],    a_l = skip a_{l-1} + step h(m_l)    for l = 1 ... L - 1,    outputs m_L

Read from a `torch.nn.Sequential` of `Linear`, activations and `LayerStack`s of dense blocks, and written back to it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from nn_adapters.layers.blocks import LayerStack
from nn_adapters.splitting.proximal import SPLIT_ACTIVATIONS, Activation, PiecewiseLinear
from pdeopt.core.errors import InputError


@dataclass(frozen=True)
class SplitLayer:
    """One layer: a = skip a_before + step h(W [a_before; 1]).

    Attributes:
        linear: the module that has W, (outputs, inputs), and its bias.
        activation: h with its proximal map.
        skip: 1 for a layer of an ODE network, else 0.
        step: length of the layer.
    """

    linear: nn.Linear
    activation: Activation
    skip: float = 0.0
    step: float = 1.0

    @property
    def inputs(self) -> int:
        """Entries of [a_before; 1], or of a_before where the layer has no bias."""
        return self.linear.in_features + (self.linear.bias is not None)

    @property
    def outputs(self) -> int:
        """Entries of a."""
        return self.linear.out_features

    def extended(self, a: Tensor) -> Tensor:
        """[a; 1] for samples a (batch, ...), where the layer has a bias."""
        return a if self.linear.bias is None else torch.cat([a, a.new_ones(len(a), 1)], dim=1)

    def after(self, before: Tensor, z: Tensor) -> Tensor:
        """The state after the layer, (batch, outputs), from the one before and the input z of the activation."""
        h = self.activation(z)
        return self.skip * before + self.step * h if self.skip or self.step != 1.0 else h

    def read(self) -> Tensor:
        """W with the bias as last column, (outputs, inputs); a copy."""
        parts = [self.linear.weight] + ([] if self.linear.bias is None else [self.linear.bias[:, None]])
        return torch.cat([part.detach() for part in parts], dim=1).clone()

    @torch.no_grad()
    def write(self, W: Tensor) -> None:
        """Give the module these weights."""
        self.linear.weight.copy_(W[:, : self.linear.in_features])
        if self.linear.bias is not None:
            self.linear.bias.copy_(W[:, -1])


def split_layers(network: nn.Module) -> list[SplitLayer]:
    """The layers of a network, the last of them linear.

    Args:
        network: a `Sequential` of `Linear`, activations (ReLU, LeakyReLU, Hardtanh(0, 1), Tanh, Softplus, Identity),
            `Flatten` in front, and `LayerStack`s of blocks `Linear`, activation.

    Raises:
        InputError: another module, two affine maps without an activation between them, layers that do not fit.
    """
    layers: list[SplitLayer] = []
    waiting: nn.Linear | None = None
    for module in _modules(network):
        if isinstance(module, nn.Linear):
            if waiting is not None:
                raise InputError("layers to split", "two linear layers in a row", "an activation between them")
            waiting = module
        elif isinstance(module, LayerStack):
            layers += _stacked(module)
        elif waiting is None:
            raise InputError("layers to split", f"{module} without a linear layer before it", "Linear, then activation")
        else:
            layers.append(SplitLayer(waiting, _activation(module)))
            waiting = None
    if waiting is None:
        raise InputError("layers to split", "no linear layer at the end", "a network that ends with Linear")
    layers.append(SplitLayer(waiting, SPLIT_ACTIVATIONS["identity"]))
    for one, other in pairwise(layers):
        if one.outputs != other.linear.in_features:
            raise InputError("layers to split", f"{one.outputs} outputs before {other.linear}", "layers that fit")
    return layers


def _modules(network: nn.Module) -> Iterator[nn.Module]:
    """The modules in order, without containers, and without `Flatten` and `Dropout(0)`."""
    if isinstance(network, nn.Sequential):
        for child in network:
            yield from _modules(child)
    elif not isinstance(network, nn.Flatten):
        yield network


def _stacked(stack: LayerStack) -> Iterator[SplitLayer]:
    """The layers u + dt h(W u + b) of an ODE network."""
    for block in stack.layers:
        children = list(block) if isinstance(block, nn.Sequential) else []
        if len(children) != 2 or not isinstance(children[0], nn.Linear):
            raise InputError("layers to split: block of a LayerStack", block, "Sequential(Linear, activation)")
        yield SplitLayer(children[0], _activation(children[1]), skip=1.0, step=stack.dt)


def _activation(module: nn.Module) -> Activation:
    if isinstance(module, nn.LeakyReLU):
        slope = float(module.negative_slope)
        return PiecewiseLinear(((slope, 0.0, -float("inf"), 0.0), (1.0, 0.0, 0.0, float("inf"))))
    if isinstance(module, nn.Hardtanh) and (module.min_val, module.max_val) == (0.0, 1.0):
        return SPLIT_ACTIVATIONS["hard_sigmoid"]
    names = {nn.ReLU: "relu", nn.Tanh: "tanh", nn.Softplus: "softplus", nn.Identity: "identity"}
    if type(module) not in names:
        raise InputError("layers to split", module, "Linear, ReLU, LeakyReLU, Hardtanh(0, 1), Tanh, Softplus, Identity")
    return SPLIT_ACTIVATIONS[names[type(module)]]
