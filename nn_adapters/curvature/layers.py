"""Which layers have Kronecker factors, and the rows that their factors are sums over.

A use of a layer in a pass gives inputs a, (samples, positions, n), and derivatives g, (samples, positions, m), of the
loss by what the layer makes of them: for each sample the gradient by its weights is sum_t g_t a_t'. Positions are those
of a convolution, or of a sequence; uses, where a network calls a layer several times, count as further positions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pdeopt.core.errors import InputError


class CurvedLayer(ABC):
    """A layer of a network with a block of curvature of its own.

    Args:
        name: of the module in its network.
        module: the layer; of its parameters, those that require a gradient have a part in the block.

    Attributes:
        parameters: in the order of `matrix`.
        shape: (m, n) of the block's matrices V.
        is_dense: whether the block is a dense matrix, of V's entries; else it is G (x) A.
    """

    is_dense = False
    shape: tuple[int, int]

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name, self.module = name, module
        self.parameters = [p for p in module.parameters(recurse=False) if p.requires_grad]

    def matrix(self, parts: Sequence[Tensor]) -> Tensor:
        """Tensors shaped as the parameters, as one matrix V, (m, n): weights, then the bias as the last column."""
        return torch.cat([part.reshape(self.shape[0], -1) for part in parts], 1)

    def tensors(self, matrix: Tensor) -> list[Tensor]:
        """The inverse of `matrix`."""
        columns = [p.numel() // self.shape[0] for p in self.parameters]
        return [part.reshape(p.shape) for part, p in zip(matrix.split(columns, 1), self.parameters)]

    @abstractmethod
    def inputs(self, x: Tensor) -> Tensor:
        """Rows a, (samples, positions, n), from what the module was called with."""

    @abstractmethod
    def derivatives(self, g: Tensor) -> Tensor:
        """Rows g, (samples, positions, m), from derivatives by what the module returned."""


class LinearCurved(CurvedLayer):
    """`nn.Linear`; axes of its features between the first and the last are positions."""

    module: nn.Linear

    def __init__(self, name: str, module: nn.Linear) -> None:
        super().__init__(name, module)
        _require_weight(self, module.weight)
        self.shape = module.out_features, module.in_features + (len(self.parameters) > 1)

    def inputs(self, x: Tensor) -> Tensor:
        return _with_ones(x.reshape(len(x), -1, x.shape[-1]), self)

    def derivatives(self, g: Tensor) -> Tensor:
        return g.reshape(len(g), -1, g.shape[-1])


class ConvCurved(CurvedLayer):
    """`nn.Conv2d` of one group (R. Grosse, J. Martens, A Kronecker-factored approximate Fisher matrix for convolution
    layers, ICML 2016): a row is the patch that an output pixel sees, whatever stride, padding and dilation."""

    module: nn.Conv2d

    def __init__(self, name: str, module: nn.Conv2d) -> None:
        super().__init__(name, module)
        if module.groups != 1:
            raise InputError(f"layer {name}", f"a convolution of {module.groups} groups", "1 group, or frozen weights")
        _require_weight(self, module.weight)
        self.shape = module.out_channels, module.weight[0].numel() + (len(self.parameters) > 1)

    def inputs(self, x: Tensor) -> Tensor:
        conv = self.module
        around = list(conv._reversed_padding_repeated_twice)
        mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        x = nn.functional.pad(x, around, mode=mode) if any(around) else x
        patches = nn.functional.unfold(x, conv.kernel_size, dilation=conv.dilation, stride=conv.stride)
        return _with_ones(patches.mT, self)

    def derivatives(self, g: Tensor) -> Tensor:
        return g.flatten(2).mT


class NormCurved(CurvedLayer):
    """The scales and shifts of a normalization: a dense Fisher block of at most a few hundred entries.

    The row of a sample is its gradient, sum_t [g_t x_t, g_t] with x the normalized features; of batch normalization,
    that at fixed mean and deviation.
    """

    is_dense = True

    def __init__(self, name: str, module: nn.Module) -> None:
        super().__init__(name, module)
        self.shape = sum(p.numel() for p in self.parameters), 1
        self.normalized = _without_scales(module)

    def matrix(self, parts: Sequence[Tensor]) -> Tensor:
        return torch.cat([part.reshape(-1, 1) for part in parts])

    def tensors(self, matrix: Tensor) -> list[Tensor]:
        sizes = [p.numel() for p in self.parameters]
        return [part.reshape(p.shape) for part, p in zip(matrix.split(sizes), self.parameters)]

    def inputs(self, x: Tensor) -> Tensor:
        return self.normalized(x)

    def derivatives(self, g: Tensor) -> Tensor:
        return g

    def gradients(self, x: Tensor, g: Tensor) -> Tensor:
        """Gradients of the samples, (samples, m), from normalized features and derivatives."""
        scale = self.module.weight
        pairs = [g * x if p is scale else g for p in self.parameters]
        return torch.cat([self._sum(each).flatten(1) for each in pairs], 1)

    def _sum(self, each: Tensor) -> Tensor:
        """Over the positions that share a scale."""
        if isinstance(self.module, nn.LayerNorm):
            axes = range(1, each.dim() - len(self.module.normalized_shape))
        else:
            axes = range(2, each.dim())
        return each.sum(list(axes)) if len(axes) else each


NORMS = (nn.LayerNorm, nn.GroupNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def curved_layers(network: nn.Module) -> list[CurvedLayer]:
    """The layers of a network that have parameters to train, in the order of its modules.

    Args:
        network: of Linear, Conv2d and normalization layers, and of whatever has no parameters of its own.

    Raises:
        InputError: another module with parameters that require a gradient, a parameter in two modules, or none at all.
    """
    layers, owners = [], dict[int, str]()
    for name, module in network.named_modules():
        if not any(p.requires_grad for p in module.parameters(recurse=False)):
            continue
        for p in module.parameters(recurse=False):
            if id(p) in owners:
                legal = "one module that is called several times"
                raise InputError(f"layer {name}", f"a parameter that layer {owners[id(p)]} has, too", legal)
            owners[id(p)] = name
        layers.append(_curved(name, module))
    if not layers:
        raise InputError("network", f"{type(network).__name__} without parameters to train", "at least one layer")
    return layers


def _curved(name: str, module: nn.Module) -> CurvedLayer:
    if isinstance(module, parametrize.ParametrizationList):
        legal = "torch.nn.utils.parametrize.remove_parametrizations: a natural gradient does not depend on it"
        raise InputError(f"layer {name.rsplit('.parametrizations.')[0]}", "a parametrized weight", legal)
    if isinstance(module, nn.Linear):
        return LinearCurved(name, module)
    if isinstance(module, nn.Conv2d) and not isinstance(module, nn.modules.lazy.LazyModuleMixin):
        return ConvCurved(name, module)
    if isinstance(module, NORMS):
        return NormCurved(name, module)
    legal = "Linear | Conv2d | LayerNorm | GroupNorm | BatchNorm; others with parameters.requires_grad_(False)"
    raise InputError(f"layer {name or '(the network itself)'}", type(module).__name__, legal)


def _require_weight(layer: CurvedLayer, weight: Tensor) -> None:
    """The last column of V alone is no block."""
    if not weight.requires_grad:
        raise InputError(
            f"layer {layer.name}", "a bias to train and a frozen weight", "both to train, both frozen, or a frozen bias"
        )


def _with_ones(rows: Tensor, layer: CurvedLayer) -> Tensor:
    return torch.cat([rows, rows.new_ones(*rows.shape[:2], 1)], 2) if len(layer.parameters) > 1 else rows


def _without_scales(module: nn.Module):
    """The function of a normalization without its scales and shifts."""
    plain = nn.functional
    if isinstance(module, nn.LayerNorm):
        return lambda x: plain.layer_norm(x, module.normalized_shape, eps=module.eps)
    if isinstance(module, nn.GroupNorm):
        return lambda x: plain.group_norm(x, module.num_groups, eps=module.eps)

    def batch_norm(x: Tensor) -> Tensor:
        of_batch = module.training or module.running_mean is None
        known = (None, None) if of_batch else (module.running_mean, module.running_var)
        return plain.batch_norm(x, *known, training=of_batch, eps=module.eps)

    return batch_norm
