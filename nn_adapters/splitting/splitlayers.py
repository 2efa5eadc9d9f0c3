"""Networks as chains of layers that can be split: an affine map, an activation, and a skip where there is one.

    m_l = W_l [a_{l-1}; 1],    a_l = skip a_{l-1} + step h(m_l)    for l = 1 ... L - 1,    outputs m_L

Read from a `torch.nn.Sequential` of `Linear`, `Conv2d`, activations, averages and `LayerStack`s, and written back to
it. Of a convolution, W acts on the patches of a state.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nn_adapters.layers.blocks import LayerStack
from nn_adapters.splitting.affinemaps import AffineMap, Averaged, Convolution, Dense
from nn_adapters.splitting.proximal import SPLIT_ACTIVATIONS, Activation, PiecewiseLinear
from pdeopt.core.errors import InputError

LEGAL = "Linear, Conv2d, AvgPool2d, Flatten, ReLU, LeakyReLU, Hardtanh(0, 1), Tanh, Softplus, Identity"


@dataclass(frozen=True)
class SplitLayer:
    """One layer: a = skip a_before + step h(W [a_before; 1]).

    Attributes:
        map: the affine map of W, (outputs, inputs).
        activation: h with its proximal map.
        skip: 1 for a layer of an ODE network, else 0.
        step: length of the layer.
    """

    map: AffineMap
    activation: Activation
    skip: float = 0.0
    step: float = 1.0

    @property
    def inputs(self) -> int:
        """Columns of W."""
        return self.map.inputs

    @property
    def outputs(self) -> int:
        """Rows of W: entries of a, or its channels."""
        return self.map.outputs

    def after(self, before: Tensor, z: Tensor) -> Tensor:
        """The state after the layer, (batch, ...), from the one before and the input z of the activation."""
        h = self.activation(z)
        return self.skip * before.reshape(h.shape) + self.step * h if self.skip or self.step != 1.0 else h


def split_layers(network: nn.Module) -> list[SplitLayer]:
    """The layers of a network, the last of them linear.

    Args:
        network: a `Sequential` of `Linear` and `Conv2d`, each with an activation after it (ReLU, LeakyReLU,
            Hardtanh(0, 1), Tanh, Softplus, Identity), `AvgPool2d` and `Flatten` after activations or in front, and
            `LayerStack`s of blocks of a `Linear` or `Conv2d` and an activation.

    Raises:
        InputError: another module, or two affine maps without an activation between them.
    """
    layers: list[SplitLayer] = []
    waiting: AffineMap | None = None
    averages: list[tuple[int, int]] = []
    images = False  # whether the state has channels, which Linear would take for samples
    for module in _modules(network):
        if isinstance(module, nn.Linear | nn.Conv2d):
            if waiting is not None:
                raise InputError("layers to split", "two linear layers in a row", "an activation between them")
            images = _is_of_images(module, images)
            waiting, averages = _averaged(affine_map(module), averages), []
        elif isinstance(module, LayerStack) and waiting is None and not averages:
            layers += _stacked(module)
            images = _is_of_images(layers[-1].map.module, images)
        elif isinstance(module, nn.AvgPool2d | nn.Flatten) and waiting is None:
            images = images and not isinstance(module, nn.Flatten)
            averages += _squares(module)
        elif waiting is None:
            raise InputError("layers to split", f"{module} without a linear layer before it", LEGAL)
        else:
            layers.append(SplitLayer(waiting, _activation(module)))
            waiting = None
    if waiting is None or images:
        raise InputError("layers to split", "no linear layer at the end", "a network that ends with Linear")
    return [*layers, SplitLayer(waiting, SPLIT_ACTIVATIONS["identity"])]


def require_fit(layers: Sequence[SplitLayer], shape: tuple[int, ...]) -> None:
    """Raise `InputError` where samples of a shape, without the batch, do not go through the layers."""
    for layer in layers:
        after = layer.map.shape_after(shape)
        flat = (torch.Size(shape).numel(),)  # a skip may go through Flatten
        if layer.skip and after not in (shape, flat):
            raise InputError(f"layers that fit: shape after {layer.map.module} of a LayerStack", after, f"{shape}")
        shape = after


def affine_map(module: nn.Linear | nn.Conv2d) -> AffineMap:
    """The map of a module; `InputError` for a convolution with groups, dilation or padding other than by zeros."""
    return Dense(module) if isinstance(module, nn.Linear) else Convolution(module)


def _modules(network: nn.Module) -> Iterator[nn.Module]:
    """The modules in order, without containers."""
    if isinstance(network, nn.Sequential):
        for child in network:
            yield from _modules(child)
    else:
        yield network


def _is_of_images(module: nn.Module, images: bool) -> bool:
    """Whether states after an affine map are images; `InputError` where those before are, and are not flattened."""
    if images and isinstance(module, nn.Linear):
        raise InputError("layers to split", f"{module} after images", "Flatten between them")
    return isinstance(module, nn.Conv2d)


def _averaged(map: AffineMap, averages: list[tuple[int, int]]) -> AffineMap:
    """The map after averages, the last of them next to it."""
    for size in reversed(averages):
        map = Averaged(map, size)
    return map


def _squares(module: nn.AvgPool2d | nn.Flatten) -> list[tuple[int, int]]:
    """The squares that a module averages over; none for `Flatten`, which changes no number."""
    if isinstance(module, nn.Flatten):
        if (module.start_dim, module.end_dim) != (1, -1):
            raise InputError("layers to split", module, "Flatten()")
        return []
    size, stride, padding = (
        each if isinstance(each, tuple) else (each, each)
        for each in (module.kernel_size, module.stride, module.padding)
    )
    if size != stride or any(padding) or module.ceil_mode or module.divisor_override:
        raise InputError("layers to split", module, "squares that do not overlap: AvgPool2d(size)")
    return [size]


def _stacked(stack: LayerStack) -> Iterator[SplitLayer]:
    """The layers u + dt h(W u + b) of an ODE network."""
    for block in stack.layers:
        children = list(block) if isinstance(block, nn.Sequential) else []
        if len(children) != 2 or not isinstance(children[0], nn.Linear | nn.Conv2d):
            legal = "Sequential(Linear or Conv2d, activation)"
            raise InputError("layers to split: block of a LayerStack", block, legal)
        yield SplitLayer(affine_map(children[0]), _activation(children[1]), skip=1.0, step=stack.dt)


def _activation(module: nn.Module) -> Activation:
    if isinstance(module, nn.LeakyReLU):
        slope = float(module.negative_slope)
        return PiecewiseLinear(((slope, 0.0, -float("inf"), 0.0), (1.0, 0.0, 0.0, float("inf"))))
    if isinstance(module, nn.Hardtanh) and (module.min_val, module.max_val) == (0.0, 1.0):
        return SPLIT_ACTIVATIONS["hard_sigmoid"]
    names = {nn.ReLU: "relu", nn.Tanh: "tanh", nn.Softplus: "softplus", nn.Identity: "identity"}
    if type(module) not in names:
        raise InputError("layers to split", module, LEGAL)
    return SPLIT_ACTIVATIONS[names[type(module)]]
