"""Regularization of weights that belong to layers: small, and smooth from layer to layer.

    gamma_tik / 2 |theta|^2 + gamma_ddt / 2 sum_i |(theta_{i+1} - theta_i) / dt|^2

(S. Guenther, L. Ruthotto, J. B. Schroder, E. C. Cyr, N. R. Gauger, SIMODS 2, 2020).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nn_adapters.layers.layerparallel import LayerParallel
from pdeopt.steps.timegrid import TimeGrid


class _Before(torch.autograd.Function):
    """The row of each layer's predecessor, over the borders of ranks; the first layer is its own."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, grid: TimeGrid) -> Tensor:
        ctx.grid = grid
        before = grid.neighbors.exchange(rows[-1], toward=+1)
        return torch.cat([(rows[0] if before is None else before)[None], rows[:-1]])

    @staticmethod
    def backward(ctx: Any, w: Tensor) -> tuple[Tensor, None]:
        after = ctx.grid.neighbors.exchange(w[0], toward=-1)
        result = torch.cat([w[1:], (torch.zeros_like(w[0]) if after is None else after)[None]])
        if ctx.grid.is_first:
            result[0] += w[0]
        return result, None


def tikhonov(network: LayerParallel) -> Tensor:
    """|theta|^2 / 2 of the layers of this rank, to be added to the loss.

    Its gradient is that of the sum over all ranks; its value is this rank's part.

    Args:
        network: whose parameters theta.
    """
    return 0.5 * torch.stack([stack.square().sum() for stack in network.stacks]).sum()


def smoothness(network: LayerParallel) -> Tensor:
    """sum_i |(theta_{i+1} - theta_i) / dt|^2 / 2, over the layers of this rank and the one before. Collective.

    Its gradient is that of the sum over all ranks; its value is this rank's part.

    Args:
        network: whose parameters theta_i, layer by layer.
    """
    dt = network.Tf / network.num_steps
    parts = [
        (stack - _Before.apply(stack, network.grid)).square().sum()  # type: ignore[no-untyped-call]
        for stack in network.stacks
    ]
    return 0.5 * torch.stack(parts).sum() / dt**2


def regularized(value: Tensor, network: nn.Module, gamma_tik: float, gamma_ddt: float) -> Tensor:
    """A loss and the regularization of this rank's layers in all `LayerParallel` parts of a network. Collective.

    Args:
        value: of the loss, a scalar.
        network: any module.
        gamma_tik, gamma_ddt: weights, >= 0.
    """
    for part in network.modules():
        if isinstance(part, LayerParallel):
            if gamma_tik:
                value = value + gamma_tik * tikhonov(part)
            if gamma_ddt:
                value = value + gamma_ddt * smoothness(part)
    return value
