"""Layers of low rank: two layers in the place of one, by a truncated singular value decomposition."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from nn_adapters.compression.forms import plain_copy
from nn_adapters.compression.inputs import InputMoments
from nn_adapters.compression.methods import Compression, Variant
from pdeopt.core.errors import InputError

SPLITS = ("channels", "space", "best")

#: Ranks that are tried of a split in space, whose errors with moments take a product each.
TRIED = 24


class LowRankLayers(Compression):
    """W ~ (W's outputs on r directions) x (r directions): V x r and r x n numbers in the place of V x n.

    The best W_r for inputs of covariance C makes tr (W - W_r) C (W - W_r)' least: W_r = U U'W, U the first r
    eigenvectors of the outputs' covariance W C W'; for C = I the truncated singular value decomposition (C. Eckart,
    G. Young, Psychometrika 1, 1936). The bias makes up for the mean of what is left out.

    Convolutions of c channels to m by k x l are split

    - over channels: r channels by k x l, then 1 x 1: r (c k l + m) numbers; the best of rank r for the patches
      (X. Zhang, J. Zou, K. He, J. Sun, IEEE TPAMI 38, 2016);
    - in space: r channels by k x 1, then 1 x l: r (c k + m l) numbers, by the decomposition of the kernel as a matrix
      (c k) x (m l) (C. Tai, T. Xiao, Y. Zhang, X. Wang, W. E, ICLR 2016), best for independent pixels alone;
    - best: by whichever has less error for its bytes.

    Args:
        moments: as `Compression`.
        split: of convolutions: channels | space | best.

    Raises:
        InputError: another split.
    """

    def __init__(self, moments: bool = True, split: str = "best") -> None:
        super().__init__(moments)
        if split not in SPLITS:
            raise InputError("split of convolutions", split, " | ".join(SPLITS))
        self.split = split

    def candidates(self, layer: nn.Module, moments: InputMoments) -> list[Variant]:
        layer = plain_copy(layer)
        found = []
        if isinstance(layer, nn.Linear) or self.split != "space":
            found += _over_channels(layer, moments)
        if isinstance(layer, nn.Conv2d) and self.split != "channels":
            found += _in_space(layer, moments)
        return found


class FactoredLinear(nn.Sequential):
    """Two Linear layers in the place of one, whose weight and bias are there for those who ask for them."""

    @property
    def weight(self) -> Tensor:
        """The product of the two weights, (outputs, inputs)."""
        return self[1].weight @ self[0].weight  # type: ignore[no-any-return, operator]

    @property
    def bias(self) -> Tensor | None:
        """(outputs,), or None."""
        return self[1].bias  # type: ignore[no-any-return, return-value]


def _over_channels(layer: Any, moments: InputMoments) -> list[Variant]:
    """Of all ranks."""
    W = layer.weight.detach().reshape(len(layer.weight), -1).double()
    m, n = W.shape
    values, vectors = torch.linalg.eigh(moments.gram(W))
    values, vectors = values.flip(0).clamp_min(0.0), vectors.flip(1)
    left = values.flip(0).cumsum(0).flip(0) / values.sum().clamp_min(1e-300)
    errors = [*left[1:].sqrt().tolist(), 0.0]

    def make(rank: int) -> nn.Module:
        U = vectors[:, :rank]
        inner = U.T @ W
        bias = moments.bias(layer.bias, W - U @ inner)
        if isinstance(layer, nn.Linear):
            first, last = skip_init(nn.Linear, n, rank, bias=False), skip_init(nn.Linear, rank, m)
        else:
            words = {name: getattr(layer, name) for name in ("stride", "padding", "dilation", "padding_mode")}
            first = skip_init(nn.Conv2d, layer.in_channels, rank, layer.kernel_size, bias=False, **words)
            last = skip_init(nn.Conv2d, rank, m, 1)
        return _pair(layer, first, inner, last, U, bias)

    ranks = range(1, min(m, n) + 1)
    return [_level(layer, rank, "", errors[rank - 1], rank * (m + n), make) for rank in ranks]


def _in_space(layer: nn.Conv2d, moments: InputMoments) -> list[Variant]:
    """Of some ranks."""
    W = layer.weight.detach().double()
    m, c, k, l = W.shape
    U, s, V = torch.linalg.svd(W.permute(1, 2, 0, 3).reshape(c * k, m * l), full_matrices=False)

    def kernel(rank: int) -> Tensor:
        return ((U[:, :rank] * s[:rank]) @ V[:rank]).reshape(c, k, m, l).permute(2, 0, 1, 3)

    def make(rank: int) -> nn.Module:
        change = (W - kernel(rank)).reshape(m, -1)
        down, across = _along(layer, 0), _along(layer, 1)
        first = skip_init(nn.Conv2d, c, rank, (k, 1), bias=False, padding_mode=layer.padding_mode, **down)
        last = skip_init(nn.Conv2d, rank, m, (1, l), padding_mode=layer.padding_mode, **across)
        inner = (U[:, :rank] * s[:rank].sqrt()).T
        outer = (V[:rank] * s[:rank].sqrt()[:, None]).reshape(rank, m, l).transpose(0, 1)
        return _pair(layer, first, inner, last, outer, moments.bias(layer.bias, change))

    ranks = sorted({round(len(s) ** (step / (TRIED - 1))) for step in range(TRIED)})
    flat = W.reshape(m, -1)
    errors = {rank: moments.error(flat - kernel(rank).reshape(m, -1), flat) for rank in ranks}
    return [_level(layer, rank, " in space", errors[rank], rank * (c * k + m * l), make) for rank in ranks]


def _along(layer: nn.Conv2d, axis: int) -> dict[str, Any]:
    """Stride, padding and dilation of a convolution along one axis alone."""

    def one(pair: tuple[int, ...], other: int) -> tuple[int, ...]:
        return tuple(pair[k] if k == axis else other for k in range(2))

    padding = layer.padding if isinstance(layer.padding, str) else one(layer.padding, 0)
    return {"stride": one(layer.stride, 1), "padding": padding, "dilation": one(layer.dilation, 1)}


def _level(layer: Any, rank: int, how: str, error: float, numbers: int, make: Any) -> Variant:
    bias = 0 if layer.bias is None else len(layer.bias)
    return Variant(f"rank {rank}{how}", error, layer.weight.itemsize * (numbers + bias), lambda: make(rank))


def _pair(layer: Any, first: Any, inner: Tensor, last: Any, outer: Tensor, bias: Tensor | None) -> nn.Sequential:
    """Two layers with these weights, which train as the one that they stand for."""
    if bias is None:
        last.bias = None
    else:
        last.bias.data = bias.to(layer.bias)
        last.bias.requires_grad_(layer.bias.requires_grad)
    for module, weight in ((first, inner), (last, outer)):
        module.weight.data = weight.reshape(module.weight.shape).to(layer.weight).contiguous()
        module.weight.requires_grad_(layer.weight.requires_grad)
    kind = FactoredLinear if isinstance(layer, nn.Linear) else nn.Sequential
    return kind(first, last).train(layer.training)
