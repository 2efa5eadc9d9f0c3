"""Dropout whose masks are functions of a seed, the layer, the place in the block and the entry.

Layers are evaluated several times, by whichever rank has them, in any order: a generator would give other masks each
time. Here a mask is a hash of its numbers, found anew wherever it is needed, and the same on any number of ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

#: Multipliers and shifts of the hash: rounds of xorshift and multiplication by odd numbers, modulo 2^64.
ROUNDS = ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15), (31, 0x2545F4914F6CDD1D))

#: Odd numbers that spread layers, places and seeds.
SPREAD = 0x1E3779B97F4A7C15


def mixed(numbers: Tensor) -> Tensor:
    """A hash of whole numbers, int64, entry by entry: neighbors go to unrelated numbers."""
    for shift, factor in ROUNDS:
        low = (1 << (64 - shift)) - 1
        numbers = (numbers ^ ((numbers >> shift) & low)) * factor  # the shift of PyTorch keeps the sign
    return numbers ^ ((numbers >> 32) & 0xFFFFFFFF)


def layer_keys(seed: int | Tensor, numbers: Tensor) -> Tensor:
    """A key for each layer: (layers,), int64.

    Args:
        seed: of the batch, a number of 62 bits, or such a tensor without axes.
        numbers: of the layers, (layers,).
    """
    return mixed(mixed(numbers.long() * SPREAD + seed))


def drop(x: Tensor, p: float, key: Tensor, place: int) -> Tensor:
    """x with a share of its entries set to zero, the others divided by 1 - p.

    Args:
        x: of one layer, (...), with a key of no axes, or of several, (layers, ...), with (layers,) keys.
        p: the share, 0..1.
        key: from `layer_keys`.
        place: of the module in its block; other places have other masks.
    """
    if p == 0.0:
        return x
    shape = x.shape[key.dim() :]
    entries = torch.arange(shape.numel(), device=x.device).reshape(shape)
    bits = mixed(entries * SPREAD + mixed(key + place).reshape(*key.shape, *[1] * len(shape)))
    uniform = (bits >> 11) & ((1 << 53) - 1)
    return x * (uniform >= int(p * 2.0**53)).to(x.dtype) / (1.0 - p) if p < 1.0 else x * 0.0


class SeededDropout(nn.Module):
    """`nn.Dropout` by `drop`: in training where a key is given, else the identity.

    Args:
        p: share of entries.
        place: see `drop`.
    """

    key: Tensor

    def __init__(self, p: float, place: int) -> None:
        super().__init__()
        self.p, self.place = p, place
        self.register_buffer("key", torch.tensor(-1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x, or x with zeros."""
        return drop(x, self.p, self.key, self.place) if self.training else x


def seed_dropout(block: nn.Module) -> None:
    """Replace the modules `nn.Dropout` inside a block by `SeededDropout`, in place; each is a place of its own.

    Those of transformer layers stay, as `attention.encoder_layer` reads their shares alone.

    Args:
        block: any module.
    """
    for part in list(block.modules()):
        for name, child in list(part._modules.items()):
            if type(child) is nn.Dropout and not isinstance(part, nn.TransformerEncoderLayer):
                part.register_module(name, SeededDropout(child.p, 0))
                part._modules[name].train(child.training)  # type: ignore[union-attr]
    places = (part for part in block.modules() if isinstance(part, SeededDropout))
    for place, part in enumerate(places, start=8):
        part.place = place
