"""The whole chain of dense layers as one function of autograd, exact, by the compiled loops of `fusedkernels`.

On one rank it does in three passes what multigrid cycles approximate in three to five, and a pass costs less as long as
layers are narrow. It serves where it is cheaper by its count of operations, `is_cheaper`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from nn_adapters.layers.parts.context import SERIAL, refuse_transforms
from nn_adapters.layers.parts.fusedkernels import BLOCK, TILE, compiled

#: Activations that the loops know, by their modules.
FUSED_ACTIVATIONS: dict[type[nn.Module], str] = {nn.ReLU: "relu", nn.Tanh: "tanh", nn.SiLU: "silu"}

#: Widths up to which the loops were measured, and the time of a multiplication in them over that in a batched step: the
#: larger one of ReLU and tanh, see docs/benchmarks.md.
RATIOS = {8: 0.3, 16: 0.5, 32: 0.8, 48: 0.9, 64: 1.5}

#: Multiplications of a pass below which compiling, or loading what was compiled, does not pay.
LEAST_WORK = 1 << 21

#: Passes through all layers that values and gradients take: states, cotangents, gradients of weights.
PASSES = 3


def fused_kind(block: nn.Module) -> str | None:
    """The name of the activation of a block act(W u + b) that the loops know; None for any other block."""
    if type(block) is not nn.Sequential or len(block) != 2 or type(block[0]) is not nn.Linear or block[0].bias is None:
        return None
    if any(part._forward_hooks or part._forward_pre_hooks for part in block.modules()):
        return None
    return FUSED_ACTIVATIONS.get(type(block[1]))


@lru_cache
def has_compiler() -> bool:
    """Whether Numba is there, the extra `fast`."""
    return find_spec("numba") is not None


def is_cheaper(u: Tensor, controls: Sequence[Tensor], cycles: Sequence[int] | None) -> bool:
    """Whether the loops take these features and weights, and fewer operations than what they stand for.

    Args:
        u: features, (..., width).
        controls: W (layers, width, width) and b (layers, width), all layers.
        cycles: forward and adjoint ones; None for one layer after the other.
    """
    W, b = controls
    width = W.shape[-1]
    if u.device.type != "cpu" or not u.dtype == W.dtype == b.dtype or u.dtype not in (torch.float32, torch.float64):
        return False
    ratio = next((ratio for most, ratio in RATIOS.items() if width <= most), None)
    if ratio is None or W.numel() * (u.numel() // width) < LEAST_WORK or not has_compiler():
        return False
    return PASSES * ratio < PASSES + (0 if cycles is None else sum(cycles))


class FusedChain(torch.autograd.Function):
    """u_N of u_i = u_{i-1} + dt act(W_i u_{i-1} + b_i), samples last.

    `FusedChain.apply(kind, dt, u, W, b)`: the activation's name, a number, u (width, samples), W (layers, width, width)
    and b (layers, width), of one precision, on the CPU. Sums are in another order than PyTorch's.
    """

    @staticmethod
    def forward(ctx: Any, kind: str, dt: float, u: Tensor, W: Tensor, b: Tensor) -> Tensor:
        refuse_transforms()
        loops, scratch = _Loops(kind, dt, W), _scratch(u.dtype)
        width, samples, layers = loops.width, u.shape[1], len(W)
        keep = any(ctx.needs_input_grad)
        shape = (1, -(-samples // TILE), layers, width, TILE) if keep else (1, 1, 1, width, TILE)
        kept, end = u.new_empty(shape), u.new_empty((1, width, samples))
        arrays = map(_array, (loops.widened(u, -2)[None], loops.widened(W, -1, -2), loops.widened(b, -1)))
        loops.forward(*arrays, loops.dt, layers, keep, _array(kept), *scratch, _array(end))
        if keep:
            ctx.save_for_backward(W, end, kept)
            ctx.loops = loops
        return end[0, : u.shape[0]]

    @staticmethod
    def backward(ctx: Any, w: Tensor) -> tuple[Any, ...]:
        refuse_transforms(w)
        if torch.is_grad_enabled():
            raise RuntimeError(f"create_graph=True through parallel layers has no second derivatives; use {SERIAL}")
        W, end, kept = ctx.saved_tensors
        loops, before, layers = ctx.loops, torch.empty_like(end), len(W)
        size, width = W.shape[1], loops.width
        G, g = W.new_zeros((layers, width, width)), W.new_zeros((layers, width))
        arrays = map(_array, (end, loops.widened(w, -2)[None], loops.widened(W, -1, -2)))
        rest = _array(G), _array(g), *_scratch(w.dtype), _array(before)
        loops.backward(*arrays, loops.dt, layers, _array(kept), *rest)
        return None, None, before[0, :size], G[:, :size, :size], g[:, :size]


class _Loops:
    """The loops for layers of one kind; widths that are no multiple of `BLOCK` get neurons that do nothing."""

    def __init__(self, kind: str, dt: float, W: Tensor) -> None:
        precision = str(W.dtype).removeprefix("torch.")
        self.forward, self.backward = compiled(kind, precision)
        self.width = -(-W.shape[-1] // BLOCK) * BLOCK
        self.dt = np.full(len(W), dt, precision)

    def widened(self, tensor: Tensor, *axes: int) -> Tensor:
        """The tensor with zeros for more neurons along its axes of neurons, -1 or -2."""
        sizes = [self.width - tensor.shape[axis] if axis in axes else 0 for axis in (-1, -2)]
        return pad(tensor.detach(), (0, sizes[0], 0, sizes[1])).contiguous() if any(sizes) else tensor.contiguous()


def _array(tensor: Tensor) -> Any:
    return tensor.detach().numpy()


def _scratch(dtype: torch.dtype) -> tuple[Any, Any, Any]:
    """A row of a tile, and another one as whole numbers and as what their bits stand for."""
    whole, real = (np.int32, np.float32) if dtype == torch.float32 else (np.int64, np.float64)
    bits = np.empty(TILE, whole)
    return np.empty(TILE, real), bits, bits.view(real)
