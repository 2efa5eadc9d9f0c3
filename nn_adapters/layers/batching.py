"""Modules of many layers at once: the leading axis of features and of every parameter is the layer.

Linear layers, convolutions and what acts on each entry alone are one batched operation of PyTorch; whatever else
there is goes through `torch.func.vmap`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from threading import RLock
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map

from nn_adapters.layers.blocks import Direct, SmoothReLU
from nn_adapters.layers.parts.attention import EncoderBlock, encoder_layer, group_norm, is_encoder_layer, layer_norm
from nn_adapters.layers.parts.batchnorm import NotingNorm, batch_norm
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

LEGAL_BLOCK = "modules without random numbers but those of nn.Dropout, and without branches on values"

#: Of networks as constraints, which are functions of features and weights alone.
LEGAL_FUNCTION = "modules without random numbers, branches on values, and buffers: LayerNorm instead of BatchNorm"

#: A module's parameters are exchanged for a call, which two threads must not do at once.
_EXCHANGE = RLock()


@dataclass(frozen=True)
class Given:
    """What a call depends on besides features and parameters; the same for all layers but the keys.

    Attributes:
        args: of the block after the features, as masks.
        keys: of the layers, (layers,), for dropout; None where nothing is dropped.
        buffers: of the layers, (layers, ...) each, by their names in the block.
        modes: whether parts of the block are in training; where they do not stand here, they know it themselves.
        note: (a `NotingNorm`, mean, variance, (layers, channels) each): called where one is evaluated in training.
    """

    args: Sequence[Any] = ()
    keys: Tensor | None = None
    buffers: Mapping[str, Tensor] = field(default_factory=dict)
    modes: Mapping[nn.Module, bool] = field(default_factory=dict)
    note: Callable[[NotingNorm, Tensor, Tensor], None] = lambda norm, mean, var: None

    def is_training(self, part: nn.Module) -> bool:
        """Whether a part of the block is in training."""
        return self.modes.get(part, part.training)


NOTHING_GIVEN = Given()

#: (features (layers, ...), parameters (layers, ...) in the order of `named_parameters`, `Given`) -> features.
Batched = Callable[[Tensor, Sequence[Tensor], Given], Tensor]


def batched(module: nn.Module, prepared: bool = False) -> Batched:
    """The module as a function of stacked features and parameters.

    Args:
        module: that maps features (batch, ...) to features.
        prepared: whether calls have keys for dropout, whose modules are then `SeededDropout`, and buffers, those of
            batch norms in a `NotingNorm`.

    Returns:
        A function of features (layers, batch, ...), of its parameters (layers, ...), in the order of
        `named_parameters`, and of what else is given, to features (layers, batch, ...).

    Raises:
        InputError: random numbers, or buffers, in a module that is not prepared for them.
    """
    known = parts_of_encoders(module) if prepared else set()
    for part in module.modules():
        has_buffers = not prepared and next(part.buffers(recurse=False), None) is not None
        if has_buffers or (is_random(part) and id(part) not in known):
            legal = LEGAL_BLOCK if prepared else LEGAL_FUNCTION
            raise InputError("block of a network of layers", type(part).__name__, legal)
    return _batched(module, {id(buffer): name for name, buffer in module.named_buffers()})


def parts_of_encoders(module: nn.Module) -> set[int]:
    """The identities, `id(part)`, of the parts of transformer layers that `encoder_layer` evaluates."""
    return {id(part) for each in _reached(module) if is_encoder_layer(each) for part in each.modules()}


def _reached(module: nn.Module) -> list[nn.Module]:
    """The parts of a module that are called one by one, rather than inside of another one's `forward`."""
    if type(module) is Direct:
        return _reached(module.block)
    return [each for part in module for each in _reached(part)] if type(module) is nn.Sequential else [module]


def is_random(part: nn.Module) -> bool:
    """Whether a module draws random numbers in training; without probability, dropout draws none."""
    return isinstance(part, nn.RReLU) or (type(part) is not SeededDropout and share_dropped(part) > 0.0)


def share_dropped(part: Any) -> float:
    """The share of entries that a module drops in training; 0 of those that drop none."""
    if isinstance(part, (nn.modules.dropout._DropoutNd, SeededDropout)):
        return part.p
    return part.dropout if isinstance(part, nn.MultiheadAttention) else 0.0


def _batched(module: nn.Module, names: Mapping[int, str]) -> Batched:
    """By the exact type: a subclass, a hook or a parametrization may do anything, and goes through `vmap`."""
    kind, is_plain = type(module), not (module._forward_hooks or module._forward_pre_hooks)
    if kind is Direct:
        return _batched(module.block, names)  # type: ignore[arg-type]
    if kind in ENTRYWISE_MODULES and is_plain:
        return lambda u, theta, given: module(u)
    if kind is SeededDropout:
        return _dropout(module)
    if kind is NotingNorm:
        return batch_norm(module)  # type: ignore[arg-type]
    if kind in (nn.TransformerEncoderLayer, EncoderBlock) and is_encoder_layer(module):
        return encoder_layer(module)
    if kind is nn.LayerNorm and is_plain:
        return layer_norm(module)  # type: ignore[arg-type]
    if kind is nn.GroupNorm and is_plain:
        return group_norm(module)  # type: ignore[arg-type]
    if kind is nn.Sequential and is_plain and shares_nothing(module):
        return _sequential(module, names)  # type: ignore[arg-type]
    if kind is nn.Linear and is_plain:
        return lambda u, theta, given: _linear(u, theta)
    if kind in (nn.Conv1d, nn.Conv2d) and is_plain and module.groups == 1 and module.padding_mode == "zeros":
        return _convolution(module)  # type: ignore[arg-type]
    return _mapped(module, names)


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


def _sequential(module: nn.Sequential, names: Mapping[int, str]) -> Batched:
    parts = [(_batched(part, names), len(list(part.parameters()))) for part in module]

    def compose(u: Tensor, theta: Sequence[Tensor], given: Given) -> Tensor:
        at, inner = 0, replace(given, args=())  # nn.Sequential has one argument
        for part, size in parts:
            u = part(u, theta[at : at + size], inner)
            at += size
        return u

    return compose


def _dropout(module: Any) -> Batched:
    def call(u: Tensor, theta: Sequence[Tensor], given: Given) -> Tensor:
        is_off = given.keys is None or not given.is_training(module)
        return u if is_off else drop(u, module.p, given.keys, module.place)

    return call


def _mapped(module: nn.Module, names: Mapping[int, str]) -> Batched:
    one, norms = with_parameters(module), [part for part in module.modules() if isinstance(part, NotingNorm)]
    norms = [norm for norm in norms if norm.running_mean is not None]
    places = {name: names[id(buffer)] for name, buffer in each_buffer(module) if id(buffer) in names}
    seeded = [f"{name}.key" if name else "key" for name, part in module.named_modules() if type(part) is SeededDropout]
    has_dropout = any(isinstance(part, nn.modules.dropout._DropoutNd) for part in module.modules())  # of probability 0
    parts = list(module.modules())

    def keyed(u: Tensor, key: Tensor | None, given: Given, *rows: Tensor) -> tuple[Tensor, dict[int, Any]]:
        theta, buffers = rows[: len(rows) - len(places)], dict(zip(places, rows[len(rows) - len(places) :]))
        with _EXCHANGE:
            for part in parts:
                part.training = given.is_training(part)
            for norm in norms:
                norm.seen = None
            out = one(u, *theta, args=given.args, more=buffers if key is None else buffers | dict.fromkeys(seeded, key))
            return out, {k: norm.seen for k, norm in enumerate(norms) if norm.seen is not None}

    def many(u: Tensor, theta: Sequence[Tensor], given: Given) -> Tensor:
        keys, rows = given.keys, [*theta, *(given.buffers[name] for name in places.values())]
        if len(u) == 1:
            value = keyed(u[0], None if keys is None else keys[0], given, *(t[0] for t in rows))
            out, seen = tree_map(lambda t: t[None], value)
        else:
            out, seen = _vmapped(keyed, has_dropout, u, keys, given, rows)
        for k, found in seen.items():
            given.note(norms[k], *found)
        return out

    return many


def _vmapped(function: Callable[..., Any], draws: bool, u: Tensor, keys: Any, given: Given, rows: list[Tensor]) -> Any:
    axes = (0, None if keys is None else 0, None, *[0] * len(rows))
    try:
        with sdpa_kernel(SDPBackend.MATH):  # of attention, the one that is batched
            return vmap(function, axes, randomness="different" if draws else "error")(u, keys, given, *rows)
    except RuntimeError as error:
        if not str(error).startswith("vmap:"):
            raise
        raise InputError("block of a layer-parallel network", str(error), LEGAL_BLOCK) from error


def each_buffer(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Name and value of all buffers but keys of dropout, as often as they are used; those of each part once."""
    for name, part in module.named_modules():
        if type(part) is not SeededDropout:
            for leaf, buffer in part._buffers.items():
                if buffer is not None:
                    yield (f"{name}.{leaf}" if name else leaf), buffer


def with_parameters(module: nn.Module, buffers: Mapping[str, Tensor] | None = None) -> Callable[..., Tensor]:
    """A function of features and of the module's parameters, in the order of `named_parameters`, to features.

    Threads may call it at once. The module keeps its own parameters, which count for nothing. Calls may have further
    arguments of the module, `args`, and further buffers, `more`.

    Args:
        module: it may use a parameter, or a part, more than once.
        buffers: by name, those that take the place of the module's.
    """
    places = parameter_places(module)

    def call(u: Tensor, *theta: Tensor, args: Sequence[Any] = (), more: Mapping[str, Tensor] | None = None) -> Tensor:
        given = {name: theta[k] for name, k in places} | dict(buffers or {}) | dict(more or {})
        return exchanged(module, given, (u, *args))  # type: ignore[no-any-return]

    return call


def parameter_places(module: nn.Module) -> list[tuple[str, int]]:
    """The name of each place of a parameter, and which one it is in the order of `named_parameters`."""
    at = {id(parameter): index for index, parameter in enumerate(module.parameters())}
    return [
        (f"{name}.{leaf}" if name else leaf, at[id(parameter)])
        for name, part in module.named_modules()  # each part once: functional_call would not restore it twice
        for leaf, parameter in part.named_parameters(recurse=False, remove_duplicate=False)
    ]


def exchanged(module: nn.Module, tensors: dict[str, Tensor], args: tuple[Any, ...]) -> Any:
    """What a module returns with these parameters and buffers; a buffer that it replaces is replaced in `tensors`."""
    with _EXCHANGE:
        return functional_call(module, tensors, args, tie_weights=False)
