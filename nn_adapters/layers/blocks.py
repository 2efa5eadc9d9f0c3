"""Blocks whose repetition is a deep network, and the network as PyTorch would run it, layer after layer.

A block F is any `nn.Module` that maps features to features. A layer of step dt is u + dt F(u), an Euler step of
du/dt = F(u; theta(t)) (E. Haber, L. Ruthotto, Stable architectures for deep neural networks, Inverse Problems 34,
2017); a `SteppingBlock` says itself what its layer is.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pdeopt.core.errors import InputError
from pdeopt.core.memory import require_memory


class SmoothReLU(nn.Module):
    """max(x, 0), rounded off by a parabola on |x| < 0.1, so that its derivative is continuous."""

    def forward(self, x: Tensor) -> Tensor:
        width = 0.1
        inside = (x + width).square() / (4.0 * width)
        return torch.where(x.abs() < width, inside, x.clamp(min=0.0))


#: Activations by name.
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "identity": nn.Identity,
    "smooth_relu": SmoothReLU,
}


def activation(name: str) -> nn.Module:
    """The activation of this name.

    Args:
        name: one of `ACTIVATIONS`: relu, tanh, sigmoid, silu, gelu, identity, smooth_relu.

    Raises:
        InputError: another name.
    """
    if name not in ACTIVATIONS:
        raise InputError("activation", name, " | ".join(ACTIVATIONS))
    return ACTIVATIONS[name]()


def dense(width: int, act: str = "tanh") -> nn.Sequential:
    """The block act(W u + b).

    Args:
        width: of the features, whose shape is (batch, ..., width).
        act: name of the activation.
    """
    return nn.Sequential(nn.Linear(width, width), activation(act))


def conv(channels: int, kernel: int = 3, act: str = "tanh", dim: int = 2) -> nn.Sequential:
    """The block act(W * u + b), which keeps the size of images or signals.

    Args:
        channels: of the features, (batch, channels, height, width), or (batch, channels, length) for signals.
        kernel: its odd width.
        act: name of the activation.
        dim: 2 for images, 1 for signals.
    """
    kind = {1: nn.Conv1d, 2: nn.Conv2d}[dim]
    return nn.Sequential(kind(channels, channels, kernel, padding=kernel // 2), activation(act))


class WeightNormalization(nn.Module):
    """W = g v / |v|, a length g and a direction v for each row of W, that is, for each neuron or filter.

    A parametrization of PyTorch as `torch.nn.utils.parametrizations.weight_norm` is, whose kernel `torch.vmap` cannot
    batch over layers. Here g is a vector, as biases and scales are, so that groups of an optimizer find it among them.
    """

    def forward(self, g: Tensor, v: Tensor) -> Tensor:
        return (g / _row_norms(v)).reshape(-1, *[1] * (v.dim() - 1)) * v

    def right_inverse(self, W: Tensor) -> tuple[Tensor, Tensor]:
        """g and v of a given W; a row of zeros has any direction."""
        g = _row_norms(W)
        return g, torch.where((g > 0.0).reshape(-1, *[1] * (W.dim() - 1)), W, 1.0)


def _row_norms(v: Tensor) -> Tensor:
    return torch.linalg.vector_norm(v, dim=tuple(range(1, v.dim())))


def weight_norm(module: nn.Module) -> nn.Module:
    """Parametrize the weights of all dense and convolutional layers of a module by length and direction.

    The function stays the same; gradient steps differ, as the length of a row is learned apart from its direction
    (T. Salimans, D. P. Kingma, Weight normalization, NeurIPS 2016). The way back is
    `torch.nn.utils.parametrize.remove_parametrizations`. K-FAC refuses the layers by name: a natural gradient does not
    depend on how weights are parametrized.

    Args:
        module: is changed, layers inside it, too.

    Returns:
        the same module.

    Raises:
        InputError: no such layer, or one whose weight has a parametrization.

    Example:
        >>> layers = LayerParallel(None, lambda: weight_norm(dense(8)), 64)
    """
    layers = [part for part in module.modules() if isinstance(part, (nn.Linear, nn.modules.conv._ConvNd))]
    if not layers or any(parametrize.is_parametrized(part, "weight") for part in layers):
        got = f"{type(module).__name__} with " + ("a parametrized weight" if layers else "no such layer")
        raise InputError("module of weight_norm", got, "Linear or convolutional layers with weights of their own")
    for part in layers:
        parametrize.register_parametrization(part, "weight", WeightNormalization())
    return module


class SteppingBlock(nn.Module, ABC):
    """A block that says itself what its layer is, by `step`."""

    @abstractmethod
    def step(self, u: Tensor, dt: float, *args: Any) -> Tensor:
        """The features after a layer of length dt, of the shape of u; further arguments are those of the network."""


class Direct(SteppingBlock):
    """A feedforward layer: its step is the block itself, whatever dt.

    Args:
        block: maps features to features of the same shape.
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, u: Tensor, *args: Any) -> Tensor:
        return self.block(u, *args)  # type: ignore[no-any-return]

    def step(self, u: Tensor, dt: float, *args: Any) -> Tensor:
        return self.block(u, *args)  # type: ignore[no-any-return]


def by_position(block: nn.Module, args: tuple[Any, ...], words: Mapping[str, Any]) -> tuple[Any, ...]:
    """What a call gives to all layers, `args` and keywords, in the order of the block's `forward`.

    Args:
        block: of a layer.
        args, words: after the features.

    Raises:
        TypeError: as a call of the block raises it, for a keyword that it does not know.
        InputError: keywords that may not stand by position.
    """
    if not words:
        return args
    while isinstance(block, Direct):
        block = block.block
    call = inspect.signature(block.forward).bind(None, *args, **words)
    call.apply_defaults()
    if call.kwargs:
        raise InputError(
            "arguments of a block", f"{', '.join(call.kwargs)} by keyword alone", "what may stand in order"
        )
    return call.args[1:]


#: Bytes of Python's objects in a module of one or two parameters.
MODULE = 10_000


def make_layers(block: Callable[[], nn.Module], num_steps: int) -> Iterator[nn.Module]:
    """Call the block once a layer; `InputError` for what makes no module, or more than fits into memory."""
    legal = "a function that makes a module: lambda: dense(8)"
    if isinstance(block, nn.Module) or not callable(block):
        raise InputError("block", type(block).__name__, legal)
    for number in range(num_steps):
        layer = block()
        if not isinstance(layer, nn.Module):
            raise InputError("block", f"a function that makes {type(layer).__name__}", legal)
        if number == 0:
            size = MODULE + sum(parameter.nbytes for parameter in layer.parameters())
            require_memory(num_steps * size, "layers", num_steps, "fewer, or smaller ones")
        yield layer


class LayerStack(nn.Module):
    """`num_steps` layers of a block over the time Tf, one after the other: the reference for `LayerParallel`.

    Args:
        block: makes the module F of a layer; called once a layer, in order.
        num_steps: layers.
        Tf: time; a layer is u + dt F(u) with dt = Tf / num_steps, or the block's own `step`.

    Called with features (batch, ...), it returns those after all layers, of the same shape. Its `state_dict` has the
    keys `layers.{i}.{name}`, as that of the layer-parallel network has.

    Raises:
        InputError: fewer than one layer, or a time that is not positive.

    Example:
        >>> network = LayerStack(lambda: dense(8), num_steps=64, Tf=2.0)
        >>> network(torch.zeros(100, 8)).shape
        torch.Size([100, 8])
    """

    def __init__(self, block: Callable[[], nn.Module], num_steps: int, Tf: float = 1.0) -> None:
        super().__init__()
        if num_steps < 1 or not Tf > 0:
            raise InputError("num_steps, Tf", f"{num_steps}, {Tf}", "num_steps >= 1 and Tf > 0")
        self.layers = nn.ModuleList(make_layers(block, num_steps))
        self.dt = Tf / num_steps

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, i: int) -> nn.Module:
        return self.layers[i]

    def forward(self, u: Tensor, *args: Any, **words: Any) -> Tensor:
        for block in self.layers:
            if isinstance(block, SteppingBlock):
                u = block.step(u, self.dt, *by_position(block, args, words))
            else:
                u = torch.add(u, block(u, *args, **words), alpha=self.dt)
        return u
