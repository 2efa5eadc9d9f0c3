"""Nested iteration: train a shallow network, make it deeper, go on.

Weights are functions of time; those of a deeper network are interpolated, and the step is divided (E. C. Cyr,
S. Guenther, J. B. Schroder, Multilevel initialization for layer-parallel deep neural network training, 2019). The
optimizer sees only parameters, so any one will do.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nn_adapters.layers.parts.stacking import ParameterStack
from pdeopt.core.errors import InputError


def refine_weights(stack: Tensor, factor: int = 2, kind: str = "constant") -> Tensor:
    """Weights of a network with `factor` times as many layers over the same time.

    Args:
        stack: weights, (layers, ...).
        factor: layers that come from one.
        kind: "constant", each layer `factor` times; "linear" between the middles of the layers.

    Returns:
        Weights, (factor * layers, ...).

    Raises:
        InputError: another kind.
    """
    if kind == "constant":
        return stack.repeat_interleave(factor, 0)
    if kind != "linear":
        raise InputError("interpolation of weights", kind, "constant | linear")
    layers = len(stack)
    middle = (torch.arange(factor * layers, dtype=torch.float64) + 0.5) / factor - 0.5  # in layers of the shallow one
    below = middle.floor().clamp(0, max(layers - 2, 0)).long()
    share = (middle - below).clamp(0, 1).to(stack).reshape(-1, *[1] * (stack.dim() - 1))
    above = (below + 1).clamp(max=layers - 1)
    return (1 - share) * stack[below] + share * stack[above]


def nested_epochs(epochs: int, levels: int, factor: int = 2) -> list[int]:
    """Epochs on each level, shallowest first: each level takes the same part of the work of `epochs` at full depth.

    Args:
        epochs: at full depth, that would be as much work as all levels together.
        levels: how many networks.
        factor: layers of each network over those of the shallower one.

    Example:
        >>> nested_epochs(60, levels=3)
        [80, 40, 20]
    """
    return [max(round(epochs * factor**k / levels), 1) for k in reversed(range(levels))]


def deepen(shallow: nn.Module, deep: nn.Module, kind: str = "constant") -> None:
    """Give the deep network the weights of a shallow one of the same kind, in place.

    Layer-parallel parts are interpolated, all else is copied; buffers of a layer go to all that come from it. Both
    networks must have their layers on the same ranks: a deep layer is on the rank of the one that it comes from.

    Args:
        shallow, deep: modules of the same structure; each `LayerParallel` of the deep one has a multiple of the layers.
        kind: of interpolation, "constant" or "linear".

    Raises:
        InputError: numbers of layers that do not divide, or another kind.
    """
    parts = dict(deep.named_modules())
    with torch.no_grad():
        for name, module in shallow.named_modules():
            own = {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}
            for at, value in own.items():
                target = getattr(parts[name], at)
                if isinstance(module, ParameterStack):
                    factor, rest = divmod(len(target), len(value))
                    if rest:
                        raise InputError("layers of the deeper network", len(target), f"a multiple of {len(value)}")
                    value = refine_weights(value, factor, kind if isinstance(value, nn.Parameter) else "constant")
                target.copy_(value)
