"""32 blocks at cycles 0/0 on one rank, value and gradient: as chosen, and the price of batching, by cycles alone.

python -m problems.benchmarks.batched_blocks
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import nn

import nn_adapters as nna
from nn_adapters.layers import EncoderBlock


class Mixer(nn.Module):
    """A dense network over tokens, then one over features, each after a LayerNorm; the second sees the first's sum."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.over_tokens = nn.Sequential(nn.Linear(tokens, 2 * tokens), nn.GELU(), nn.Linear(2 * tokens, tokens))
        self.over_features = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, u: torch.Tensor) -> torch.Tensor:
        """The sum of what both add to u."""
        v = self.over_tokens(self.norms[0](u).mT).mT
        found: torch.Tensor = v + self.over_features(self.norms[1](u + v))
        return found


class OwnAttention(nn.Module):
    """Attention as a user writes it, after a LayerNorm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm, self.split, self.join = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.heads = heads

    def forward(self, u: torch.Tensor) -> torch.Tensor:
        """What it adds to u."""
        parts = self.split(self.norm(u)).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(-2, -3) for part in parts)
        out = nn.functional.scaled_dot_product_attention(q, k, v).transpose(-2, -3).flatten(-2)
        found: torch.Tensor = self.join(out)
        return found


REPEATS = 9

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
    "convolution, BatchNorm, ReLU": (
        lambda: nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
        (32, 8, 14, 14),
    ),
    "dense layer, BatchNorm, tanh": (
        lambda: nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Tanh()),
        (256, 64),
    ),
    "mixer, by vmap": (lambda: Mixer(32, 64), (16, 32, 64)),
    "attention of one's own, by vmap": (lambda: OwnAttention(64, 4), (16, 32, 64)),
}


def gradients(network: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Of a loss, by all parameters."""
    return torch.autograd.grad(network(x).square().mean(), list(network.parameters()))


def milliseconds(networks: list[nn.Module], x: torch.Tensor) -> list[float]:
    """The least CPU time of a few calls of each network, in turn, so that a loaded machine slows all alike."""
    found = [float("inf")] * len(networks)
    for _ in range(REPEATS):
        for k, network in enumerate(networks):
            begin = time.process_time()
            gradients(network, x)
            found[k] = min(found[k], 1e3 * (time.process_time() - begin))
    return found


def case(block: Callable[[], nn.Module], factor: str = "auto", serial: str = "auto") -> nna.LayerParallel:
    """A network with weights that are always the same, scaled so that no solve diverges and is repeated."""
    torch.manual_seed(0)
    words = {"cycles": 0, "adjoint_cycles": 0, "coarsening": factor, "serial": serial}
    network = nna.LayerParallel(None, block, 32, 1.0, **words)
    network.scale(0.3)
    return network


def main() -> None:
    """Print the table: CPU milliseconds, and their ratios to the serial network's."""
    print(f"{'':32s} {'serial':>7s} {'chosen':>7s} {'by cycles of factor 4':>22s} {'8':>7s} {'16':>7s}")
    for name, (block, shape) in CASES.items():
        chosen = case(block)
        networks = [chosen.serial(), chosen, *(case(block, factor, "never") for factor in ("4", "8", "16"))]
        serial, *others = milliseconds(networks, torch.randn(*shape))
        own, first, *rest = (f"{other / serial:7.2f}" for other in others)
        print(f"{name:32s} {serial:7.1f} {own} {first:>22s} {' '.join(rest)}", flush=True)


if __name__ == "__main__":
    main()
