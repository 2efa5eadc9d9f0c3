"""Dense layers by the compiled loops of `fusedkernels`: the whole chain, exact, or all intervals of multigrid cycles.

On one rank the whole chain, as one function of autograd, does in three passes what the cycles approximate in three to
five, and a pass costs less as long as layers are narrow. On several ranks the loop goes through the layers of one after
the other, exact, too, or through the intervals of each inside of cycles. What serves follows counts of operations.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from nn_adapters.layers.parts.context import SERIAL, refuse_transforms
from nn_adapters.layers.parts.costs import chain_cost, mgrit_cost
from nn_adapters.layers.parts.fusedkernels import BLOCK, TILE, compiled

#: Activations that the loops know, by their modules.
FUSED_ACTIVATIONS: dict[type[nn.Module], str] = {nn.ReLU: "relu", nn.Tanh: "tanh", nn.SiLU: "silu"}

#: Widths up to which the loops were measured, and the time of a multiplication in them over that in a batched step: the
#: larger one of ReLU and tanh, see docs/benchmarks.md.
RATIOS = {8: 0.3, 16: 0.5, 32: 0.8, 48: 0.9, 64: 1.5}

#: The same for a whole solve by cycles, with the loops inside of intervals and without, where a batched step does many
#: layers at once: above width 16 batched steps are faster.
RATIOS_INSIDE = {8: 0.8, 16: 0.97, 32: 1.2, 48: 1.5, 64: 1.5}

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


def is_cheaper(u: Tensor, controls: Sequence[Tensor], cycles: Sequence[int] | None, layers: int | None = None) -> bool:
    """Whether the loops take these features and weights, and fewer operations than what they stand for.

    Args:
        u: features, (..., width).
        controls: W (layers, width, width) and b (layers, width).
        cycles: forward and adjoint ones; None for one layer after the other.
        layers: of all ranks; None for those of the controls.
    """
    return PASSES * _ratio(RATIOS, u, controls, layers) < PASSES + (0 if cycles is None else sum(cycles))


def is_cheaper_in_turn(u: Tensor, controls: Sequence[Tensor], mgrit: Any) -> bool:
    """Whether the loop through the layers of one rank after the other has less to do than cycles; alike on all ranks.

    Args:
        u: features, (..., width).
        controls: W (layers, width, width) and b (layers, width), those of this rank.
        mgrit: the `LayerMgrit` of all layers.
    """
    return chain_cost(mgrit, _ratio(RATIOS, u, controls, mgrit.grid.num_steps)) < mgrit_cost(mgrit)


def is_cheaper_inside(u: Tensor, controls: Sequence[Tensor]) -> bool:
    """Whether the loops take these features and weights, and cost less than batched steps inside of intervals.

    Args:
        u: features, (..., width).
        controls: W (layers, width, width) and b (layers, width), those of this rank.
    """
    return _ratio(RATIOS_INSIDE, u, controls) < 1


def _ratio(ratios: Mapping[int, float], u: Tensor, controls: Sequence[Tensor], layers: int | None = None) -> float:
    """The ratio of this width; infinite for what the loops do not take."""
    W, b = controls
    width = W.shape[-1]
    layers = len(W) if layers is None else layers
    if u.device.type != "cpu" or not u.dtype == W.dtype == b.dtype or u.dtype not in (torch.float32, torch.float64):
        return math.inf
    if layers * width**2 * (u.numel() // width) < LEAST_WORK or not has_compiler():
        return math.inf
    return next((ratio for most, ratio in ratios.items() if width <= most), math.inf)


class FusedChain(torch.autograd.Function):
    """u_N of u_i = u_{i-1} + dt act(W_i u_{i-1} + b_i), samples last.

    `FusedChain.apply(kind, dt, u, W, b)` with u (width, samples), W (layers, width, width), b (layers, width); on the
    CPU, in one dtype, single or double precision.
    """

    @staticmethod
    def forward(ctx: Any, kind: str, dt: float, u: Tensor, W: Tensor, b: Tensor) -> Tensor:
        refuse_transforms()
        chains = FusedIntervals(kind, dt, W, b)
        keep = any(ctx.needs_input_grad)
        (end,) = (chains.remember if keep else chains.advance)(u[None], len(W))
        if keep:
            ctx.save_for_backward(W, b, *chains.kept)
            ctx.chains, chains.kept = chains, ()
        return end

    @staticmethod
    def backward(ctx: Any, w: Tensor) -> tuple[Any, ...]:
        refuse_transforms(w)
        if torch.is_grad_enabled():
            raise RuntimeError(f"create_graph=True through parallel layers has no second derivatives; use {SERIAL}")
        W, _, *kept = ctx.saved_tensors
        ctx.chains.kept = tuple(kept)
        (before,), *of_weights = ctx.chains.gradients(w[None], len(W))
        ctx.chains.kept = ()
        return None, None, before, *of_weights


class FusedIntervals:
    """Chains of m layers, each by one loop; m divides the layers, or the last chain is shorter.

    Its verbs are those of `LayerSteps`, for whole chains: from states (chains, width, samples) before them to those
    after them, or from cotangents after them to those before.

    Args:
        kind: of the activation, see `fused_kind`.
        dt: length of the layers, a number or one a layer.
        W, b: (layers, width, width) and (layers, width), on the CPU, in one dtype.

    Attributes:
        kept: what `remember` leaves for derivatives: states after the chains and activations.
    """

    def __init__(self, kind: str, dt: float | Tensor, W: Tensor, b: Tensor) -> None:
        self.size, precision = W.shape[-1], str(W.dtype).removeprefix("torch.")
        self.width = -(-self.size // BLOCK) * BLOCK
        self.loops = compiled(kind, precision)
        self.dt = np.broadcast_to(np.asarray(dt, precision), (len(W),)).copy()
        self.W, self.b = self._widened(W, -1, -2), self._widened(b, -1)
        self.kept: tuple[Tensor, ...] = ()

    def advance(self, starts: Tensor, m: int) -> Tensor:
        """The states after the chains."""
        return self._forward(starts, m, starts.new_empty((1, 1, 1, self.width, TILE)), keep=False)[:, : self.size]

    def remember(self, starts: Tensor, m: int) -> Tensor:
        """As `advance`, and be ready for derivatives there."""
        activations = starts.new_empty((len(starts), -(-starts.shape[2] // TILE), m, self.width, TILE))
        ends = self._forward(starts, m, activations, keep=True)
        self.kept = ends, activations
        return ends[:, : self.size]

    def pullback(self, w: Tensor, m: int) -> Tensor:
        """The cotangents of the states before the chains."""
        return self._backward(w, m, w.new_empty((0, 0, 0)), w.new_empty((0, 0)), of_weights=False)

    def gradients(self, w: Tensor, m: int) -> tuple[Tensor, Tensor, Tensor]:
        """As `pullback`, then the cotangents of W and b."""
        G, g, size = torch.zeros_like(self.W), torch.zeros_like(self.b), self.size
        return self._backward(w, m, G, g, of_weights=True), G[:, :size, :size], g[:, :size]

    def _forward(self, starts: Tensor, m: int, kept: Tensor, keep: bool) -> Tensor:
        starts = self._widened(starts, -2)
        ends = torch.empty_like(starts)
        W, b = _array(self.W), _array(self.b)
        self.loops[0](_array(starts), W, b, self.dt, m, keep, _array(kept), *_scratch(starts.dtype), _array(ends))
        return ends

    def _backward(self, w: Tensor, m: int, G: Tensor, g: Tensor, of_weights: bool) -> Tensor:
        ends, activations = map(_array, self.kept)
        w = self._widened(w, -2)
        before, scratch = torch.empty_like(w), _scratch(w.dtype)
        weights = of_weights, _array(G), _array(g)
        self.loops[1](ends, _array(w), _array(self.W), self.dt, m, activations, *weights, *scratch, _array(before))
        return before[:, : self.size]

    def _widened(self, tensor: Tensor, *axes: int) -> Tensor:
        """The tensor with neurons that do nothing, up to a multiple of `BLOCK`, along its axes of neurons."""
        sizes = [self.width - tensor.shape[axis] if axis in axes else 0 for axis in (-1, -2)]
        return pad(tensor.detach(), (0, sizes[0], 0, sizes[1])).contiguous() if any(sizes) else tensor.contiguous()


def _array(tensor: Tensor) -> Any:
    return tensor.detach().numpy()


def _scratch(dtype: torch.dtype) -> tuple[Any, Any, Any]:
    """A row of a tile, and another one as whole numbers and as what their bits stand for."""
    whole, real = (np.int32, np.float32) if dtype == torch.float32 else (np.int64, np.float64)
    bits = np.empty(TILE, whole)
    return np.empty(TILE, real), bits, bits.view(real)
