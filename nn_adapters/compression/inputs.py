"""Layers that can be made smaller, and the first two moments of what they are called with."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from nn_adapters.compression.forms import StoredWeight, evaluating, plain_copy
from nn_adapters.curvature.layers import ConvCurved, CurvedLayer, LinearCurved
from pdeopt.core.errors import InputError, SolveFailure
from pdeopt.core.memory import DOUBLE, require_memory
from pdeopt.squares.gram import GramSum

#: Samples that go through the network at a time.
CHUNK = 500


def compressible(network: nn.Module) -> dict[str, nn.Module]:
    """The Linear layers and the Conv2d layers of one group of a network, by name; all others stay as they are.

    Subclasses are others, and so are layers with parametrizations but `StoredWeight`.

    Args:
        network: any module.

    Raises:
        InputError: no such layer, or a weight that two layers share: copies of it would not be equal any more.
    """
    found = {name: module for name, module in network.named_modules() if _is_compressible(module)}
    if not found:
        raise InputError("network to compress", type(network).__name__, "at least one Linear or Conv2d of one group")
    owners: dict[int, str] = {}
    for name, module in network.named_modules():
        for p in module.parameters(recurse=False):
            other = owners.setdefault(id(p), name)
            if other != name and (name in found or other in found):
                raise InputError(f"layer {name}", f"a parameter that layer {other} has, too", "parameters of its own")
    return found


def _is_compressible(module: nn.Module) -> bool:
    kind = parametrize.type_before_parametrizations(module)
    if kind not in (nn.Linear, nn.Conv2d) or (isinstance(module, nn.Conv2d) and module.groups != 1):
        return False
    if not parametrize.is_parametrized(module):
        return True
    chains = module.parametrizations
    return list(chains) == ["weight"] and all(isinstance(form, StoredWeight) for form in chains["weight"])


@dataclass(frozen=True)
class InputMoments:
    """Of the inputs a of a layer: patches of a convolution.

    Attributes:
        mean: E a, (inputs,); 0 for a layer without a bias, which could not make up for it.
        covariance: E (a - mean)(a - mean)', (inputs, inputs), in double precision; None stands for the identity.
    """

    mean: Tensor
    covariance: Tensor | None = None

    @property
    def importance(self) -> Tensor | None:
        """Variances of the inputs, (1, inputs): weights of the squares of a row of the weight; None for 1."""
        return None if self.covariance is None else self.covariance.diagonal().clamp_min(0.0)[None]

    def gram(self, weight: Tensor) -> Tensor:
        """W C W' of a weight (outputs, inputs): the covariance of its outputs, (outputs, outputs)."""
        W = weight.double()
        return W @ W.T if self.covariance is None else W @ self.covariance @ W.T

    def error(self, change: Tensor, weight: Tensor) -> float:
        """How far a change of the weight moves the outputs: relative root mean square, after the bias is adapted.

        Args:
            change, weight: (outputs, inputs).
        """
        moved, whole = (self._square(each.double()) for each in (change, weight))
        return (max(moved, 0.0) / whole) ** 0.5 if whole > 0.0 else 0.0

    def bias(self, bias: Tensor | None, change: Tensor) -> Tensor | None:
        """The best bias for a weight that is less by `change`: it keeps the mean of the outputs."""
        return None if bias is None else bias.detach() + (change.to(self.mean) @ self.mean).to(bias)

    def _square(self, V: Tensor) -> float:
        return float((V if self.covariance is None else V @ self.covariance).mul(V).sum())

    @classmethod
    def unknown(cls, layer: nn.Module) -> InputMoments:
        """Those of inputs that are independent, of mean 0 and variance 1."""
        return cls(torch.zeros(layer.weight[0].numel(), dtype=torch.float64))  # type: ignore[operator, index, union-attr]


@torch.no_grad()
def input_moments(network: nn.Module, x: Tensor) -> dict[str, InputMoments]:
    """Moments of what the layers are called with, over all samples, positions and calls: the factor A of K-FAC.

    Args:
        network: of which the layers are `compressible`; in evaluation mode.
        x: samples, (samples, ...).

    Raises:
        InputError: no samples.
        SolveFailure: features that are not finite.
    """
    if not len(x):
        raise InputError("samples for the moments of layers", 0, "at least 1")
    sums: dict[str, GramSum] = {}
    layers, handles = compressible(network), []
    for name, layer in layers.items():
        rows = _rows_of(name, layer)
        require_memory(
            2 * DOUBLE * rows.shape[1] ** 2, f"inputs of layer {name}", rows.shape[1], "no samples: plain SVD"
        )
        sums[name] = GramSum(rows.shape[1])

        def add(module: nn.Module, arguments: tuple[Tensor, ...], name: str = name, rows: CurvedLayer = rows) -> None:
            a = rows.inputs(arguments[0]).flatten(0, 1)
            sums[name].add(a, product=a.dtype)

        handles.append(layer.register_forward_pre_hook(add))
    try:
        with evaluating(network):
            for part in x.split(CHUNK):
                network(part)
    finally:
        for handle in handles:
            handle.remove()
    return {name: _moments(name, layer, sums[name]) for name, layer in layers.items() if sums[name].weights[0]}


def _rows_of(name: str, layer: nn.Module) -> CurvedLayer:
    """What makes rows of the inputs of a layer, with a one where it has a bias."""
    trained = plain_copy(layer).requires_grad_(True)
    return LinearCurved(name, trained) if isinstance(trained, nn.Linear) else ConvCurved(name, trained)  # type: ignore[arg-type]


def _moments(name: str, layer: nn.Module, sums: GramSum) -> InputMoments:
    A = sums.gram / sums.weights[0]
    if not bool(A.isfinite().all()):
        raise SolveFailure(f"the inputs of layer {name} are not finite", "a trained network, or other samples")
    if layer.bias is None:
        return InputMoments(torch.zeros(len(A)).double(), A)
    mean = A[:-1, -1]
    return InputMoments(mean, A[:-1, :-1] - torch.outer(mean, mean))


def replaced(network: nn.Module, layers: Mapping[str, nn.Module]) -> nn.Module:
    """A copy of a network with other modules in the places of these; what is called several times still is one.

    Args:
        network: stays as it is.
        layers: by their names in the network.
    """
    fresh = copy.deepcopy(network)
    others = {id(fresh.get_submodule(name)): layer for name, layer in layers.items()}
    if id(fresh) in others:
        return others[id(fresh)]
    for parent in list(fresh.modules()):
        for key, child in list(parent._modules.items()):
            if id(child) in others:
                setattr(parent, key, others[id(child)])
    return fresh
