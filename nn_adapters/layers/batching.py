"""Modules of many layers at once: the leading axis of features and of every parameter is the layer.

Linear layers, convolutions and what acts on each entry alone are one batched operation of PyTorch; whatever else
there is goes through `torch.func.vmap`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from threading import RLock
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

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
    nn.ReLU6,
    nn.SELU,
    nn.CELU,
    nn.Hardswish,
    SmoothReLU,
)

LEGAL_BLOCK = (
    "modules without buffers, random numbers and branches on values: LayerNorm instead of BatchNorm, Dropout(0.0)"
)

#: A module's parameters are exchanged for a call, which two threads must not do at once.
_EXCHANGE = RLock()

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
        if next(part.buffers(recurse=False), None) is not None or is_random(part):
            raise InputError("block of a layer-parallel network", type(part).__name__, LEGAL_BLOCK)
    return _batched(module)


def is_random(part: nn.Module) -> bool:
    """Whether a module draws random numbers in training; without probability, dropout draws none."""
    if isinstance(part, nn.modules.dropout._DropoutNd):
        return part.p > 0
    return isinstance(part, nn.RReLU) or (isinstance(part, nn.MultiheadAttention) and part.dropout > 0)


def _batched(module: nn.Module) -> Batched:
    """By the exact type: a subclass, a hook or a parametrization may do anything, and goes through `vmap`."""
    kind, is_plain = type(module), not (module._forward_hooks or module._forward_pre_hooks)
    if kind is Direct:
        return _batched(module.block)  # type: ignore[arg-type]
    if kind in ENTRYWISE_MODULES and is_plain:
        return lambda u, theta: module(u)
    if kind is nn.Sequential and is_plain and shares_nothing(module):
        return _sequential(module)  # type: ignore[arg-type]
    if kind is nn.Linear and is_plain:
        return _linear
    if kind in (nn.Conv1d, nn.Conv2d) and is_plain and module.groups == 1 and module.padding_mode == "zeros":
        return _convolution(module)  # type: ignore[arg-type]
    return _mapped(module)


def shares_nothing(module: nn.Module) -> bool:
    """Whether no parameter serves two of a module's parts."""
    return len(list(module.parameters())) == sum(len(list(part.parameters())) for part in module._modules.values())


def _linear(u: Tensor, theta: Sequence[Tensor]) -> Tensor:
    """W u + b of features (layers, ..., width)."""
    if u.dim() == 2:  # no batch
        return _linear(u[:, None], theta)[:, 0]
    flat = u.flatten(1, -2) if u.dim() > 3 else u
    W = theta[0].mT
    out = torch.baddbmm(theta[1][:, None], flat, W) if len(theta) > 1 else torch.bmm(flat, W)
    return out.reshape(*u.shape[:-1], out.shape[-1])


def _convolution(module: nn.Conv1d | nn.Conv2d) -> Batched:
    """A grouped convolution whose groups are the layers."""
    function: Any = F.conv2d if isinstance(module, nn.Conv2d) else F.conv1d
    without_batch = 4 if isinstance(module, nn.Conv2d) else 3

    def convolve(u: Tensor, theta: Sequence[Tensor]) -> Tensor:
        if u.dim() == without_batch:
            return convolve(u[:, None], theta)[:, 0]
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
    one = with_parameters(module)
    has_dropout = any(isinstance(part, nn.modules.dropout._DropoutNd) for part in module.modules())  # of probability 0

    def many(u: Tensor, theta: Sequence[Tensor]) -> Tensor:
        if len(u) == 1:
            return one(u[0], *(t[0] for t in theta))[None]
        try:
            with sdpa_kernel(SDPBackend.MATH):  # of attention, the one that is batched
                return vmap(one, randomness="different" if has_dropout else "error")(u, *theta)
        except RuntimeError as error:
            if not str(error).startswith("vmap:"):
                raise
            raise InputError("block of a layer-parallel network", str(error), LEGAL_BLOCK) from error

    return many


def with_parameters(module: nn.Module, buffers: Mapping[str, Tensor] | None = None) -> Callable[..., Tensor]:
    """A function of features and of the module's parameters, in the order of `named_parameters`, to features.

    Threads may call it at once. The module keeps its own parameters, which count for nothing.

    Args:
        module: it may use a parameter, or a part, more than once.
        buffers: by name, those that take the place of the module's.
    """
    at = {id(parameter): index for index, parameter in enumerate(module.parameters())}
    places = [
        (f"{name}.{leaf}" if name else leaf, at[id(parameter)])
        for name, part in module.named_modules()  # each part once: functional_call would not restore it twice
        for leaf, parameter in part.named_parameters(recurse=False, remove_duplicate=False)
    ]

    def call(u: Tensor, *theta: Tensor) -> Tensor:
        with _EXCHANGE:
            given = {name: theta[k] for name, k in places} | dict(buffers or {})
            return functional_call(module, given, (u,), tie_weights=False)  # type: ignore[no-any-return]

    return call
