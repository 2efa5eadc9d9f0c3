"""Modules of many layers at once: the leading axis of features and of every parameter is the layer.

Linear layers, convolutions and what acts on each entry alone are one batched operation of PyTorch; whatever else
there is goes through `torch.func.vmap`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from threading import RLock
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from nn_adapters.layers.blocks import Direct, SmoothReLU
from nn_adapters.layers.parts.attention import EncoderBlock, encoder_layer, group_norm, is_encoder_layer, layer_norm
from nn_adapters.layers.parts.dropout import SeededDropout, drop
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
    "modules without buffers, random numbers but those of nn.Dropout, and branches on values: LayerNorm instead of "
    "BatchNorm"
)

#: A module's parameters are exchanged for a call, which two threads must not do at once.
_EXCHANGE = RLock()


@dataclass(frozen=True)
class Given:
    """What a call depends on besides features and parameters; the same for all layers but the keys.

    Attributes:
        args: of the block after the features, as masks.
        keys: of the layers, (layers,), for dropout; None where nothing is dropped.
    """

    args: Sequence[Any] = ()
    keys: Tensor | None = None


NOTHING_GIVEN = Given()

#: (features (layers, ...), parameters (layers, ...) in the order of `named_parameters`, `Given`) -> features.
Batched = Callable[[Tensor, Sequence[Tensor], Given], Tensor]


def batched(module: nn.Module, seeded: bool = False) -> Batched:
    """The module as a function of stacked features and parameters.

    Args:
        module: that maps features (batch, ...) to features.
        seeded: whether calls have keys for dropout, whose modules are then `SeededDropout`.

    Returns:
        A function of features (layers, batch, ...), of its parameters (layers, ...), in the order of
        `named_parameters`, and of what else is given, to features (layers, batch, ...).

    Raises:
        InputError: a module with buffers, as BatchNorm has them, or random numbers.
    """
    known = {id(part) for each in _reached(module) if seeded and is_encoder_layer(each) for part in each.modules()}
    for part in module.modules():
        has_buffers = next(part.buffers(recurse=False), None) is not None and not isinstance(part, SeededDropout)
        if has_buffers or (is_random(part) and id(part) not in known):
            raise InputError("block of a layer-parallel network", type(part).__name__, LEGAL_BLOCK)
    return _batched(module)


def _reached(module: nn.Module) -> list[nn.Module]:
    """The parts of a module that are called one by one, rather than inside of another one's `forward`."""
    if type(module) is Direct:
        return _reached(module.block)
    return [each for part in module for each in _reached(part)] if type(module) is nn.Sequential else [module]


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
        return lambda u, theta, given: module(u)
    if kind is SeededDropout:
        return _dropout(module)
    if kind in (nn.TransformerEncoderLayer, EncoderBlock) and is_encoder_layer(module):
        return encoder_layer(module)
    if kind is nn.LayerNorm and is_plain:
        return layer_norm(module)  # type: ignore[arg-type]
    if kind is nn.GroupNorm and is_plain:
        return group_norm(module)  # type: ignore[arg-type]
    if kind is nn.Sequential and is_plain and shares_nothing(module):
        return _sequential(module)  # type: ignore[arg-type]
    if kind is nn.Linear and is_plain:
        return lambda u, theta, given: _linear(u, theta)
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

    def convolve(u: Tensor, theta: Sequence[Tensor], given: Given) -> Tensor:
        if u.dim() == without_batch:
            return convolve(u[:, None], theta, given)[:, 0]
        layers = len(u)
        together = u.transpose(0, 1).flatten(1, 2)  # (batch, layers * channels, ...)
        bias = theta[1].flatten() if len(theta) > 1 else None
        sizes = module.stride, module.padding, module.dilation
        out: Tensor = function(together, theta[0].flatten(0, 1), bias, *sizes, layers)
        return torch.unflatten(out, 1, (layers, -1)).transpose(0, 1)

    return convolve


def _sequential(module: nn.Sequential) -> Batched:
    parts = [(_batched(part), len(list(part.parameters()))) for part in module]

    def compose(u: Tensor, theta: Sequence[Tensor], given: Given) -> Tensor:
        at, inner = 0, Given(keys=given.keys)  # nn.Sequential has one argument
        for part, size in parts:
            u = part(u, theta[at : at + size], inner)
            at += size
        return u

    return compose


def _dropout(module: Any) -> Batched:
    def call(u: Tensor, theta: Sequence[Tensor], given: Given) -> Tensor:
        return u if given.keys is None else drop(u, module.p, given.keys, module.place)

    return call


def _mapped(module: nn.Module) -> Batched:
    one = with_parameters(module)
    seeded = [f"{name}.key" if name else "key" for name, part in module.named_modules() if type(part) is SeededDropout]
    has_dropout = any(isinstance(part, nn.modules.dropout._DropoutNd) for part in module.modules())  # of probability 0

    def keyed(u: Tensor, key: Tensor | None, given: Given, *theta: Tensor) -> Tensor:
        return one(u, *theta, args=given.args, more={} if key is None else dict.fromkeys(seeded, key))

    def many(u: Tensor, theta: Sequence[Tensor], given: Given) -> Tensor:
        keys = given.keys
        if seeded and module.training != (keys is not None):
            module.train(keys is not None)
        if len(u) == 1:
            return keyed(u[0], None if keys is None else keys[0], given, *(t[0] for t in theta))[None]
        try:
            with sdpa_kernel(SDPBackend.MATH):  # of attention, the one that is batched
                axes = (0, None if keys is None else 0, None, *[0] * len(theta))
                randomness = "different" if has_dropout else "error"
                return vmap(keyed, axes, randomness=randomness)(u, keys, given, *theta)
        except RuntimeError as error:
            if not str(error).startswith("vmap:"):
                raise
            raise InputError("block of a layer-parallel network", str(error), LEGAL_BLOCK) from error

    return many


def with_parameters(module: nn.Module, buffers: Mapping[str, Tensor] | None = None) -> Callable[..., Tensor]:
    """A function of features and of the module's parameters, in the order of `named_parameters`, to features.

    Threads may call it at once. The module keeps its own parameters, which count for nothing. Calls may have further
    arguments of the module, `args`, and further buffers, `more`.

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

    def call(u: Tensor, *theta: Tensor, args: Sequence[Any] = (), more: Mapping[str, Tensor] | None = None) -> Tensor:
        with _EXCHANGE:
            given = {name: theta[k] for name, k in places} | dict(buffers or {}) | dict(more or {})
            return functional_call(module, given, (u, *args), tie_weights=False)  # type: ignore[no-any-return]

    return call
