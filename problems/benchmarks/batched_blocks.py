"""The price of batching: 32 blocks at cycles 0/0 on one rank, value and gradient, against the serial network.

python -m problems.benchmarks.batched_blocks
"""

from __future__ import annotations

import torch
from torch import nn

import nn_adapters as nna
from nn_adapters.layers import EncoderBlock
from problems.benchmarks.fused import milliseconds

#: Blocks, and the shape of their features.
CASES = {
    "pre-LN transformer": (lambda: EncoderBlock(64, 4, 128), (16, 32, 64)),
    "TransformerEncoderLayer": (
        lambda: nna.Direct(nn.TransformerEncoderLayer(64, 4, 128, 0.0, batch_first=True)),
        (16, 32, 64),
    ),
    "convolution, GroupNorm, ReLU": (
        lambda: nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU()),
        (32, 8, 14, 14),
    ),
    "LayerNorm, two dense layers": (
        lambda: nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64)),
        (16, 32, 64),
    ),
}


def gradients(network: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Of a loss, by all parameters."""
    return torch.autograd.grad(network(x).square().mean(), list(network.parameters()))


def main() -> None:
    """Print the table: CPU milliseconds, and their ratio."""
    for name, (block, shape) in CASES.items():
        torch.manual_seed(0)
        network = nna.LayerParallel(None, block, 32, 1.0, cycles=0, adjoint_cycles=0)
        network.scale(0.3)  # so that no solve diverges and is repeated
        x = torch.randn(*shape)
        own, serial = milliseconds(gradients, network, x), milliseconds(gradients, network.serial(), x)
        print(f"{name:32s} serial {serial:7.1f}  parallel {own:7.1f}  ratio {own / serial:.2f}", flush=True)


if __name__ == "__main__":
    main()
