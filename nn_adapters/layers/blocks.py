"""Blocks whose repetition is a deep network, and the network as PyTorch would run it, layer after layer.

A block F is any `nn.Module` that maps features to features. A layer of step dt is u + dt F(u), an Euler step of
du/dt = F(u; theta(t)) (E. Haber, L. Ruthotto, Stable architectures for deep neural networks, 2017); a block with a
method `step(u, dt)` says itself what its layer is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pdeopt.core.errors import InputError

#: Activations by name.
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "identity": nn.Identity,
}


class SmoothReLU(nn.Module):
    """max(x, 0), rounded off by a parabola on |x| < 0.1, so that its derivative is continuous."""

    def forward(self, x: Tensor) -> Tensor:
        width = 0.1
        inside = (x + width).square() / (4.0 * width)
        return torch.where(x.abs() < width, inside, x.clamp(min=0.0))


ACTIVATIONS["smooth_relu"] = SmoothReLU


def activation(name: str) -> nn.Module:
    """The activation of this name."""
    if name not in ACTIVATIONS:
        raise InputError("activation", name, " | ".join(ACTIVATIONS))
    return ACTIVATIONS[name]()


def dense(width: int, act: str = "tanh") -> nn.Sequential:
    """act(W u + b) for features of shape (batch, width)."""
    return nn.Sequential(nn.Linear(width, width), activation(act))


def conv(channels: int, kernel: int = 3, act: str = "tanh", dim: int = 2) -> nn.Sequential:
    """act(W * u + b) for images of shape (batch, channels, height, width), their size kept; dim 1 for signals."""
    kind = {1: nn.Conv1d, 2: nn.Conv2d}[dim]
    return nn.Sequential(kind(channels, channels, kernel, padding=kernel // 2), activation(act))


class Direct(nn.Module):
    """A feedforward layer: its step is the block itself, whatever dt."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, u: Tensor) -> Tensor:
        return self.block(u)  # type: ignore[no-any-return]

    def step(self, u: Tensor, dt: float) -> Tensor:
        return self.block(u)  # type: ignore[no-any-return]


def step(block: nn.Module, u: Tensor, dt: Any) -> Tensor:
    """The layer of a block: its own `step`, or u + dt F(u)."""
    if hasattr(block, "step"):
        return block.step(u, dt)  # type: ignore[no-any-return,operator]
    return torch.add(u, block(u), alpha=dt)


class LayerStack(nn.Module):
    """`num_steps` layers of the block that `block()` makes, over the time Tf, one after the other: the reference.

    Its `state_dict` has the keys `layers.{i}.{name}`, as that of the layer-parallel network has.
    """

    def __init__(self, block: Callable[[], nn.Module], num_steps: int, Tf: float = 1.0) -> None:
        super().__init__()
        if num_steps < 1 or not Tf > 0:
            raise InputError("num_steps, Tf", f"{num_steps}, {Tf}", "num_steps >= 1 and Tf > 0")
        self.layers = nn.ModuleList([block() for _ in range(num_steps)])
        self.dt = Tf / num_steps

    def forward(self, u: Tensor) -> Tensor:
        for block in self.layers:
            u = step(block, u, self.dt)
        return u
