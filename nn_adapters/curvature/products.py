"""Derivatives of a network's outputs along directions, and products with its Fisher matrix; nothing is stored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from nn_adapters.curvature.layers import CurvedLayer
from nn_adapters.curvature.likelihoods import Likelihood


def flat(layers: Sequence[CurvedLayer], parts: Sequence[Sequence[Tensor]]) -> Tensor:
    """Tensors shaped as the parameters of each layer as one vector, in the order of `KroneckerBlocks`."""
    return torch.cat([layer.matrix(each).reshape(-1) for layer, each in zip(layers, parts)])


def by_layer(layers: Sequence[CurvedLayer], vector: Tensor) -> list[list[Tensor]]:
    """The inverse of `flat`."""
    pieces = vector.split([layer.shape[0] * layer.shape[1] for layer in layers])
    return [layer.tensors(piece.reshape(layer.shape)) for layer, piece in zip(layers, pieces)]


class FisherMatrix:
    """F = weight sum_s J_s'H_s J_s of a batch at the present parameters, as products with flat vectors.

    The parameters must stay while it is used.

    Args:
        network, layers, likelihood: see `KroneckerFactors`.
        inputs: arguments of the network, of each part of the batch.

    Attributes:
        outputs: of the parts, once `gram` was called.
    """

    def __init__(
        self,
        network: nn.Module,
        layers: Sequence[CurvedLayer],
        likelihood: Likelihood,
        inputs: Sequence[tuple[Any, ...]],
    ) -> None:
        self.network, self.layers, self.likelihood, self.inputs = network, layers, likelihood, inputs
        names = {id(p): name for name, p in network.named_parameters()}
        self._names = [[names[id(p)] for p in layer.parameters] for layer in layers]
        self._values = dict(network.named_parameters())
        self.outputs: list[Tensor] = []
        self._graphs: list[Tensor] = []  # outputs of the parts, for many backward derivatives at one point

    def gram(self, directions: Sequence[Tensor]) -> Tensor:
        """d_i'F d_j of a few directions, (directions, directions), by forward derivatives alone."""
        total = torch.zeros(len(directions), len(directions), dtype=torch.float64)
        samples, sums = 0, []
        self.outputs = []
        for arguments in self.inputs:
            outputs, tangents = self._forward(arguments, directions)
            self.outputs.append(outputs)
            curved = torch.stack([self.likelihood.times(outputs, each) for each in tangents]).flatten(1)
            sums.append(torch.stack(tangents).flatten(1) @ curved.T)
            samples += len(outputs)
        for each in sums:
            total += each.double()
        return 0.5 * (total + total.T) * self.likelihood.weight(samples)

    def times(self, v: Tensor) -> Tensor:
        """F v, (size,): a forward and a backward derivative."""
        total, samples = torch.zeros_like(v), 0
        if not self._graphs:
            with torch.enable_grad():
                self._graphs = [self._call(dict(self._values), arguments) for arguments in self.inputs]
        parameters = [p for layer in self.layers for p in layer.parameters]
        for arguments, value in zip(self.inputs, self._graphs):
            outputs, (tangent,) = self._forward(arguments, [v])
            cotangent = self.likelihood.times(outputs, tangent)
            found = torch.autograd.grad(value, parameters, cotangent, allow_unused=True, retain_graph=True)
            gradients = iter(torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters))
            total += flat(self.layers, [[next(gradients) for _ in layer.parameters] for layer in self.layers])
            samples += len(outputs)
        return total * self.likelihood.weight(samples)

    @torch.no_grad()
    def _forward(self, arguments: tuple[Any, ...], directions: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Outputs, and their derivatives along the directions."""
        tangents = []
        for direction in directions:
            pieces = by_layer(self.layers, direction)
            with forward_ad.dual_level():
                values = {name: p.detach() for name, p in self._values.items()}
                for names, parts in zip(self._names, pieces):
                    for name, part in zip(names, parts):
                        values[name] = forward_ad.make_dual(values[name], part.contiguous())
                outputs, tangent = forward_ad.unpack_dual(self._call(values, arguments))
                tangents.append(torch.zeros_like(outputs) if tangent is None else tangent)
        return outputs, tangents

    def _call(self, values: dict[str, Tensor], arguments: tuple[Any, ...]) -> Tensor:
        buffers = {name: buffer.clone() for name, buffer in self.network.named_buffers()}
        return torch.func.functional_call(self.network, values | buffers, arguments)  # type: ignore[no-any-return]
