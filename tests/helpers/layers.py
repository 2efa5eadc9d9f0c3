"""Layers in parallel, and what compares them with the same layers in series."""

import torch
from torch import nn

from nn_adapters.layers.blocks import Direct, LayerStack, conv, dense
from nn_adapters.layers.layerparallel import LayerParallel
from nn_adapters.layers.recurrent import GRUParallel


def transformer():
    return nn.TransformerEncoderLayer(4, 2, 8, dropout=0, batch_first=True, norm_first=True)


BLOCKS = {
    "dense": (lambda: dense(4), (6, 4)),
    "convolution": (lambda: conv(2), (3, 2, 5, 5)),
    "by vmap": (lambda: nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4), nn.Dropout(0.0), nn.GELU()), (6, 4)),
    "feedforward": (lambda: Direct(dense(4)), (6, 4)),
    "attention": (transformer, (3, 5, 4)),
}
X = torch.randn(6, 4, generator=torch.Generator().manual_seed(5))


def converged(block=lambda: dense(4), layers=11, **words):
    """Layers in parallel with as many cycles as it takes."""
    torch.manual_seed(0)
    words = {"coarsening": "4", "cycles": 4, "adjoint_cycles": 4, "serial": "never", **words}
    return LayerParallel(None, block, layers, 2.0, **words)


def rough(**words):
    """Layers in parallel whose one cycle is visibly off."""
    network = converged(layers=24, coarsening="8", cycles=1, adjoint_cycles=1, **words)
    network.scale(1.5)
    return network


def sequences(kind="classic", **words):
    torch.manual_seed(1)
    words = {"coarsening": "4", "levels": 2, "cycles": 6, "adjoint_cycles": 6, "serial": "never", **words}
    return GRUParallel(None, 5, 4, 20, 2, kind, **words), torch.randn(3, 20, 5)


def gradients(network, x, **autocast):
    """Of the sum of squares: those of a serial network stacked as those of the parallel one, and the value."""
    network.zero_grad(set_to_none=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=bool(autocast)):
        value = network(x)
    value.float().square().sum().backward()
    found = [p.grad for p in network.parameters() if p.grad is not None]
    if not isinstance(network, LayerStack):
        return value.detach(), found
    count = len(found) // len(network)
    return value.detach(), [torch.stack(found[at::count]) for at in range(count)]


def same(found, expected, tolerance):
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        a, b = a.detach(), b.detach()
        assert a.numel() == 0 or (a - b).abs().max() <= tolerance * max(1.0, float(b.abs().max()))


def alike(network, x, tolerance, **autocast):
    """Values and gradients are those of the serial network."""
    (value, found), (other, expected) = gradients(network, x, **autocast), gradients(network.serial(), x, **autocast)
    same([value, *found], [other, *expected], tolerance)
