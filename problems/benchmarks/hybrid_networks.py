"""Networks as tables of layers, read from modules that need no memory: what there is to compute and to send."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

POOLS = nn.MaxPool2d, nn.AvgPool2d
#: Place of the halo among what is recorded of a layer.
HALO = 5


@dataclass(frozen=True)
class LayerTable:
    """The layers of a network that have weights, in the order of their calls; numbers of one sample.

    Attributes:
        names: of the modules.
        weights: with biases.
        products: multiplications of a forward pass.
        inputs, outputs: entries of what comes in and goes out.
        halo: entries of the rows that a slab of an image needs from its two neighbors, for the windows of a convolution
            and of the pooling after it; 0 of dense layers.
        rows: of the output image; 1 of dense layers.
        sides: (m, n) of the Kronecker factors, n with the bias.
        positions: at which a weight is used: pixels of the output, else 1.
        is_residual: whether all layers are of one shape, so that multigrid can solve through them.
    """

    names: list[str]
    weights: np.ndarray
    products: np.ndarray
    inputs: np.ndarray
    outputs: np.ndarray
    halo: np.ndarray
    rows: np.ndarray
    sides: np.ndarray
    positions: np.ndarray
    is_residual: bool = False

    @property
    def is_image(self) -> np.ndarray:
        """Whether a layer is a convolution."""
        return self.positions > 1

    @property
    def passes(self) -> np.ndarray:
        """Of a step, in units of a forward pass: the first layer needs no derivative by its inputs."""
        return np.where(np.arange(len(self.names)) > 0, 3.0, 2.0)

    @property
    def factors(self) -> np.ndarray:
        """Numbers of the packed triangles of A and G."""
        m, n = self.sides.T
        return (m * (m + 1) + n * (n + 1)) // 2


def table_of(network: nn.Module, shape: tuple[int, ...]) -> LayerTable:
    """The table of a network of Linear and Conv2d layers, from a pass of one sample.

    Args:
        network: any module; on the device `meta` nothing is computed.
        shape: of a sample.
    """
    found: list[list[Any]] = []
    names = {id(module): name for name, module in network.named_modules()}

    def record(layer: Any, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        x, y = arguments[0][0], output[0]
        halo = 0 if isinstance(layer, nn.Linear) else _halo_rows(layer) * x.shape[0] * x.shape[2]
        if isinstance(layer, POOLS):
            if found:
                found[-1][HALO] += halo
            return
        m, fan, bias = len(layer.weight), layer.weight[0].numel(), layer.bias is not None
        places, rows = y.numel() // m, 1 if isinstance(layer, nn.Linear) else y.shape[1]
        weights, products = m * (fan + bias), places * m * fan
        found.append([names[id(layer)], weights, products, x.numel(), y.numel(), halo, rows, m, fan + bias, places])

    kinds = (nn.Linear, nn.Conv2d, *POOLS)
    handles = [m.register_forward_hook(record) for m in network.modules() if isinstance(m, kinds)]
    device = next(network.parameters()).device
    with torch.no_grad():
        network(torch.zeros(1, *shape, device=device))
    for handle in handles:
        handle.remove()
    labels, *columns = zip(*found)
    numbers = [np.array(column, dtype=float) for column in columns]
    sides = np.stack(numbers[6:8], 1)
    return LayerTable(list(labels), *numbers[:6], sides, numbers[8])


def _halo_rows(layer: Any) -> int:
    """Rows that windows reach beyond those that a slab has, on both of its sides together."""
    size, stride, dilation = (
        each[0] if isinstance(each, tuple) else each
        for each in (layer.kernel_size, layer.stride, getattr(layer, "dilation", 1))
    )
    return max(dilation * (size - 1) + 1 - stride, 0)


def _dense(*widths: int) -> list[nn.Module]:
    layers: list[nn.Module] = [nn.Flatten()]
    for one, other in pairwise(widths):
        layers += [nn.Linear(one, other), nn.ReLU()]
    return layers[:-1]


def _convolution(one: int, other: int, kernel: int = 3, **words: Any) -> list[nn.Module]:
    return [nn.Conv2d(one, other, kernel, **words), nn.ReLU()]


def mlp(*widths: int) -> nn.Sequential:
    """Dense layers, those of the talk by default: 784-500-500-10."""
    return nn.Sequential(*_dense(*(widths or (784, 500, 500, 10))))


def cnn() -> nn.Sequential:
    """Six convolutions of 3x3 and two dense layers for images of 32x32: K. Simonyan, A. Zisserman, ICLR 2015, small."""
    parts: list[nn.Module] = []
    for before, channels in pairwise((3, 64, 128, 256)):
        parts += _convolution(before, channels, padding=1) + _convolution(channels, channels, padding=1)
        parts.append(nn.MaxPool2d(2))
    return nn.Sequential(*parts, *_dense(4096, 512, 10))


def alexnet() -> nn.Sequential:
    """Five convolutions and three dense layers for images of 227x227, without groups: Krizhevsky and others, 2012."""
    parts = [*_convolution(3, 96, 11, stride=4), nn.MaxPool2d(3, 2)]
    parts += [*_convolution(96, 256, 5, padding=2), nn.MaxPool2d(3, 2)]
    parts += [*_convolution(256, 384, padding=1), *_convolution(384, 384, padding=1)]
    parts += [*_convolution(384, 256, padding=1), nn.MaxPool2d(3, 2)]
    return nn.Sequential(*parts, *_dense(9216, 4096, 4096, 1000))


#: Networks with weights, and the shapes of their samples.
MODULES: dict[str, tuple[Callable[..., nn.Sequential], tuple[int, ...]]] = {
    "mlp": (mlp, (784,)),
    "cnn": (cnn, (3, 32, 32)),
    "alexnet": (alexnet, (3, 227, 227)),
}
#: Batches for each, where none is given.
BATCHES = {"mlp": 1024, "cnn": 512, "alexnet": 2048, "odenet": 512}


def named(name: str, widths: tuple[int, ...] = (), depth: int = 4096) -> LayerTable:
    """The table of mlp | cnn | alexnet | odenet.

    Args:
        name: of the network.
        widths: of the dense layers of mlp; the one of odenet.
        depth: of odenet.
    """
    if name == "odenet":
        return odenet(depth, *widths)
    make, shape = MODULES[name]
    with torch.device("meta"):
        return table_of(make(*widths), (widths[0],) if widths else shape)


def odenet(depth: int = 4096, width: int = 8) -> LayerTable:
    """Residual dense layers of one width, as those of `problems.peaks`."""
    numbers = [np.full(depth, float(each)) for each in (width * width + width, width * width, width, width, 0, 1)]
    sides = np.tile([float(width), width + 1.0], (depth, 1))
    return LayerTable([f"layer {k}" for k in range(depth)], *numbers, sides, np.ones(depth), is_residual=True)
