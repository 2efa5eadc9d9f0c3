"""Nested iteration: train a shallow network, make it deeper, go on (E. C. Cyr, S. Guenther, J. B. Schroder).

Weights are functions of time; those of a deeper network are interpolated, the step is divided. As the optimizer sees
only parameters, any will do.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nn_adapters.layers.layerparallel import LayerParallel
from pdeopt.core.errors import InputError


def refine_weights(stack: Tensor, factor: int = 2, kind: str = "constant") -> Tensor:
    """Weights of `factor` times as many layers, (factor times layers, ...), from those of the layers, axis 0.

    Args:
        kind: "constant", each layer `factor` times; "linear" between the middles of the layers.
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
    """Epochs on each level, shallowest first: each takes the same part of the work of `epochs` at full depth."""
    return [max(round(epochs * factor**k / levels), 1) for k in reversed(range(levels))]


def deepen(shallow: nn.Module, deep: nn.Module, kind: str = "constant") -> None:
    """Give the deep network the weights of a shallow one of the same kind, interpolated in its layer-parallel parts.

    Both hold their layers in the same way over the ranks: a deep layer is on the rank of the shallow one.
    """
    parts = dict(deep.named_modules())
    with torch.no_grad():
        for name, module in shallow.named_modules():
            for at, parameter in module.named_parameters(recurse=False):
                target = dict(parts[name].named_parameters(recurse=False))[at]
                value = parameter
                if isinstance(module, LayerParallel):
                    factor, rest = divmod(len(target), len(parameter))
                    if rest:
                        raise InputError("layers of the deeper network", len(target), f"a multiple of {len(parameter)}")
                    value = refine_weights(parameter, factor, kind)
                target.copy_(value)
