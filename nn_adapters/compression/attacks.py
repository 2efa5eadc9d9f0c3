"""Accuracy, and that under small perturbations that are made to lower it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from nn_adapters.compression.forms import evaluating
from nn_adapters.compression.inputs import CHUNK
from pdeopt.core.errors import InputError


@torch.no_grad()
def accuracy(network: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of the samples that a network, in evaluation mode, classifies rightly.

    Args:
        network: samples to scores, (samples, classes).
        x, y: samples and classes, (samples,).

    Raises:
        InputError: no samples.
    """
    if not len(x):
        raise InputError("samples for an accuracy", 0, "at least 1")
    with evaluating(network):
        right = sum(int((network(a).argmax(1) == b).sum()) for a, b in zip(x.split(CHUNK), y.split(CHUNK)))
    return right / len(x)


def fgsm(
    network: nn.Module,
    x: Tensor,
    y: Tensor,
    size: float,
    bounds: tuple[float, float] | None = None,
    loss: Callable[..., Tensor] = nn.functional.cross_entropy,
) -> Tensor:
    """Samples moved by size * sign(gradient of the loss): of all small moves, to first order the worst.

    The fast gradient sign method: I. J. Goodfellow, J. Shlens, C. Szegedy, ICLR 2015. The network is in evaluation
    mode; gradients of its parameters stay as they are.

    Args:
        network: samples to scores.
        x, y: samples and targets.
        size: largest move of an entry, >= 0.
        bounds: of legal entries, into which samples are brought back; None for none.
        loss: (scores, targets) -> the mean over the samples, or the sum.

    Returns:
        Tensor shaped as x.

    Raises:
        InputError: a negative size, bounds that are not in order, a loss that does not depend on the samples.
    """
    if not size >= 0.0:
        raise InputError("size of a perturbation", size, ">= 0")
    if bounds is not None and not bounds[0] <= bounds[1]:
        raise InputError("bounds of samples", bounds, "(lower, upper)")
    parts = []
    with evaluating(network), torch.enable_grad():
        for a, b in zip(x.split(CHUNK), y.split(CHUNK)):
            leaf = a.detach().clone().requires_grad_()
            value = loss(network(leaf), b)
            if not value.requires_grad:
                raise InputError("loss of an attack", "one that does not depend on the samples", "one that does")
            moved = a + size * torch.autograd.grad(value, leaf)[0].sign()
            parts.append((moved if bounds is None else moved.clamp(*bounds)).detach())
    return torch.cat(parts) if parts else x.clone()
