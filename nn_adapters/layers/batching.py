"""Modules of many layers at once: the leading axis of features and of every parameter is the layer.

Linear layers, convolutions and what acts on each entry alone are one batched operation of PyTorch; whatever else
there is goes through `torch.func.vmap`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap

from nn_adapters.layers.blocks import Direct, SmoothReLU
from pdeopt.core.errors import InputError

#: Modules without parameters that act on each entry alone.
ENTRYWISE_MODULES = (
    nn.ReLU,
    nn.Tanh,
    nn.Sigmoid,
    nn.SiLU,
    nn.GELU,
    nn.Identity,
    nn.Softplus,
    nn.ELU,
    nn.LeakyReLU,
    nn.Hardtanh,
    nn.Mish,
    nn.LogSigmoid,
    SmoothReLU,
)

#: (features (layers, ...), parameters (layers, ...) in the order of `named_parameters`) -> features.
Batched = Callable[[Tensor, Sequence[Tensor]], Tensor]


def batched(module: nn.Module) -> Batched:
    """The module as a function of stacked features and parameters.

    Args:
        module: that maps features (batch, ...) to features.

    Returns:
        A function of features (layers, batch, ...) and of its parameters (layers, ...), in the order of
        `named_parameters`, to features (layers, batch, ...).

    Raises:
        InputError: a module with buffers or random numbers, as BatchNorm and Dropout have them.
    """
    for part in module.modules():
        if next(part.buffers(recurse=False), None) is not None or isinstance(part, nn.modules.dropout._DropoutNd):
            raise InputError(
                "block of a layer-parallel network",
                type(part).__name__,
                "modules without buffers and random numbers, for instance LayerNorm instead of BatchNorm",
            )
    return _batched(module)


def _batched(module: nn.Module) -> Batched:
    if isinstance(module, Direct):
        return _batched(module.block)
    if isinstance(module, ENTRYWISE_MODULES):
        return lambda u, theta: module(u)
    if type(module) is nn.Sequential:
        return _sequential(module)
    if type(module) is nn.Linear:
        return _linear
    if isinstance(module, (nn.Conv1d, nn.Conv2d)) and module.groups == 1 and module.padding_mode == "zeros":
        return _convolution(module)
    return _mapped(module)


def _linear(u: Tensor, theta: Sequence[Tensor]) -> Tensor:
    """W u + b of features (layers, ..., width)."""
    flat = u.flatten(1, -2) if u.dim() > 3 else u
    W = theta[0].mT
    out = torch.baddbmm(theta[1][:, None], flat, W) if len(theta) > 1 else torch.bmm(flat, W)
    return out.reshape(*u.shape[:-1], out.shape[-1])


def _convolution(module: nn.Conv1d | nn.Conv2d) -> Batched:
    """A grouped convolution whose groups are the layers."""
    function: Any = F.conv2d if isinstance(module, nn.Conv2d) else F.conv1d

    def convolve(u: Tensor, theta: Sequence[Tensor]) -> Tensor:
        layers = len(u)
        together = u.transpose(0, 1).flatten(1, 2)  # (batch, layers * channels, ...)
        bias = theta[1].flatten() if len(theta) > 1 else None
        sizes = module.stride, module.padding, module.dilation
        out: Tensor = function(together, theta[0].flatten(0, 1), bias, *sizes, layers)
        return torch.unflatten(out, 1, (layers, -1)).transpose(0, 1)

    return convolve


def _sequential(module: nn.Sequential) -> Batched:
    parts = [(_batched(part), len(list(part.parameters()))) for part in module]

    def compose(u: Tensor, theta: Sequence[Tensor]) -> Tensor:
        at = 0
        for part, size in parts:
            u = part(u, theta[at : at + size])
            at += size
        return u

    return compose


def _mapped(module: nn.Module) -> Batched:
    names = [name for name, _ in module.named_parameters()]

    def one(u: Tensor, *theta: Tensor) -> Tensor:
        return functional_call(module, dict(zip(names, theta)), (u,))  # type: ignore[no-any-return]

    return lambda u, theta: vmap(one)(u, *theta)
