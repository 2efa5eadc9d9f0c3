"""Weights in few bytes: entries that are not zero alone, in few bits; and what a network takes.

The bytes of a network are those of its `state_dict`: nothing is counted that is not stored so.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pdeopt.core.errors import InputError

#: Bits of a code; so many that a byte holds whole ones.
BITS = (2, 4, 8)

#: Largest codes of a row, as shares of its largest entry, among which the one of least error is taken.
CLIPPED = torch.linspace(1.0, 0.3, 15)


class StoredWeight(nn.Module):
    """A parametrization (`torch.nn.utils.parametrize`): a weight is kept in few bytes, and made anew at every call.

    - With a mask, entries outside of it are zero, and a bit for each entry says which: 1/32 of single precision.
    - With bits, an entry is a whole number k, |k| < 2^(bits - 1), times the scale of its row (symmetric, a scale for
      each output: R. Krishnamoorthi, arXiv:1806.08342). Codes are packed, 8 / bits to a byte, and are not trained.

    Args:
        shape: of the weight; its rows are those of the first axis.
        mask: of the entries that are kept, (shape); None: all.
        bits: of an entry, see `BITS`; None: numbers as they are, which can be trained.
        importance: weights of the columns in the error that the scales make small, (1, columns); default 1.

    Raises:
        InputError: another number of bits.
    """

    def __init__(
        self, shape: torch.Size, mask: Tensor | None = None, bits: int | None = None, importance: Tensor | None = None
    ) -> None:
        super().__init__()
        if bits is not None and bits not in BITS:
            raise InputError("bits of a weight", bits, " | ".join(map(str, BITS)))
        self.shape, self.bits, self._importance = shape, bits, importance
        self.kept = shape.numel() if mask is None else int(mask.sum())
        self.register_buffer("places", None if mask is None else _packed(mask.reshape(-1).to(torch.uint8), 1))

    def right_inverse(self, weight: Tensor) -> Any:
        """What is stored: kept entries; or their codes, packed, and the scales of the rows."""
        if self.bits is None:
            return self._entries(weight).clone()
        rows = weight.reshape(len(weight), -1)
        scales = best_scales(rows, self.bits, self._importance)
        self._importance = None
        codes = _codes(rows, scales, self.bits) + 2 ** (self.bits - 1)
        return _packed(self._entries(codes).to(torch.uint8), self.bits), scales

    def forward(self, entries: Tensor, scales: Tensor | None = None) -> Tensor:
        """The weight, (shape)."""
        if scales is None or self.bits is None:
            return self._whole(entries)
        codes = _unpacked(entries, self.bits, self.kept).to(scales.dtype) - 2 ** (self.bits - 1)
        return (self._whole(codes).reshape(len(scales), -1) * scales).reshape(self.shape)

    def _entries(self, matrix: Tensor) -> Tensor:
        return matrix.reshape(-1) if self.places is None else matrix.reshape(-1)[self._mask()]

    def _whole(self, entries: Tensor) -> Tensor:
        if self.places is None:
            return entries.reshape(self.shape)
        zeros = entries.new_zeros(self.shape.numel())
        return zeros.masked_scatter(self._mask(), entries).reshape(self.shape)

    def _mask(self) -> Tensor:
        return _unpacked(self.places, 1, self.shape.numel()).bool()


def stored(
    layer: nn.Module, weight: Tensor, bias: Tensor | None, bits: int | None = None, importance: Tensor | None = None
) -> nn.Module:
    """A copy of a layer with another weight, in the fewest bytes: zeros are left out where that pays.

    Args:
        layer: with `weight` and `bias`; stays as it is.
        weight: (shape of the layer's).
        bias: that of the layer, or None where it has none.
        bits: of an entry of the weight, see `StoredWeight`; None: as it is.
        importance: see `StoredWeight`.
    """
    fresh = plain_copy(layer)
    with torch.no_grad():
        fresh.weight.copy_(weight)
        if bias is not None:
            fresh.bias.copy_(bias)
    each = 8 * weight.itemsize if bits is None else bits
    density = float((weight != 0).double().mean())
    mask = weight != 0 if density * each + 1 < each else None
    if mask is not None or bits is not None:
        fresh.weight.requires_grad_(fresh.weight.requires_grad and bits is None)
        form = StoredWeight(weight.shape, mask, bits, importance)
        parametrize.register_parametrization(fresh, "weight", form)
    return fresh


def plain_copy(layer: nn.Module) -> nn.Module:
    """A copy of a layer whose weight is an ordinary parameter."""
    fresh = copy.deepcopy(layer)
    if parametrize.is_parametrized(fresh, "weight"):
        trains = any(p.requires_grad for p in layer.parametrizations.weight.parameters())  # type: ignore[union-attr]
        weight = fresh.weight.detach().clone()
        kind = parametrize.type_before_parametrizations(fresh)
        del fresh.parametrizations
        fresh.__class__ = kind
        fresh.register_parameter("weight", nn.Parameter(weight, trains))
    return fresh


def best_scales(rows: Tensor, bits: int, importance: Tensor | None = None) -> Tensor:
    """Scales of rows, (rows, 1), with which their codes have the least squared error, of a few; 1 for rows of zeros.

    Args:
        rows: (rows, columns).
        bits: of a code.
        importance: of the columns, (1, columns); default 1.
    """
    most = 2 ** (bits - 1) - 1
    largest = rows.abs().amax(1, keepdim=True)
    largest = torch.where(largest > 0.0, largest, torch.full_like(largest, most))
    weights = torch.ones_like(rows[:1]) if importance is None else importance.to(rows)
    errors = []
    for share in CLIPPED:
        scales = share.to(rows) * largest / most
        errors.append(((_codes(rows, scales, bits) * scales - rows).square() * weights).sum(1))
    best = torch.stack(errors).argmin(0)
    return CLIPPED.to(rows)[best][:, None] * largest / most


def _codes(rows: Tensor, scales: Tensor, bits: int) -> Tensor:
    most = 2 ** (bits - 1) - 1
    return (rows / scales).round().clamp(-most, most)


def _packed(codes: Tensor, bits: int) -> Tensor:
    """Codes 0..2^bits - 1, 8 / bits to a byte."""
    each = 8 // bits
    rows = nn.functional.pad(codes, (0, -len(codes) % each)).reshape(-1, each)
    return (rows << bits * torch.arange(each, dtype=torch.uint8, device=codes.device)).sum(1).to(torch.uint8)


def _unpacked(packed: Tensor, bits: int, count: int) -> Tensor:
    shifts = bits * torch.arange(8 // bits, dtype=torch.uint8, device=packed.device)
    return ((packed[:, None] >> shifts) & (2**bits - 1)).reshape(-1)[:count]


def stored_bytes(network: nn.Module) -> int:
    """Bytes of all parameters and buffers, as `state_dict` has them; what two names share counts once.

    Args:
        network: any module.
    """
    each = {(t.data_ptr(), t.shape, t.dtype): t.numel() * t.itemsize for t in network.state_dict().values()}
    return sum(each.values())


def multiplications(network: nn.Module, x: Tensor) -> int:
    """Multiplications of a sample in Linear and Conv2d layers, zeros in pruned weights with the others.

    Args:
        network: called in evaluation mode.
        x: a batch, of which the first sample is taken.
    """
    total = 0

    def count(layer: Any, arguments: Any, output: Tensor) -> None:
        nonlocal total
        entries = output[0].numel()
        inputs = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels // layer.groups
        total += entries * inputs * (1 if isinstance(layer, nn.Linear) else math.prod(layer.kernel_size))

    handles = [m.register_forward_hook(count) for m in network.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    try:
        with evaluating(network), torch.no_grad():
            network(x[:1])
    finally:
        for handle in handles:
            handle.remove()
    return total


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Inside, all modules are in evaluation mode."""
    training = [module for module in network.modules() if module.training]
    network.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
