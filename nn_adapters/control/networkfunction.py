"""The loss of any network as a function with Gauss-Newton products: forward and backward derivatives of PyTorch.

What a `DenseNetwork` has by hand, any module of PyTorch has by this: convolutions and recurrent networks, whose layers,
or time steps, go one after the other. Kronecker factors precondition where all layers have some; those of a GRU are
the affine maps of its inputs and of its state, whose uses in all steps count as independent (J. Martens, J. Ba, M.
Johnson, Kronecker-factored curvature approximations for recurrent neural networks, ICLR 2018).
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from nn_adapters.curvature.factors import KroneckerFactors
from nn_adapters.curvature.layers import CurvedLayer, curved_layers
from nn_adapters.curvature.likelihoods import Likelihood
from nn_adapters.curvature.products import by_layer, flat
from nn_adapters.layers.batching import is_random, with_parameters
from nn_adapters.layers.parallelmodule import serial_network
from nn_adapters.layers.parts.grugates import GRU_STEPS, hold_where_padded
from nn_adapters.layers.recurrent import GRUStack
from pdeopt.core.errors import InputError
from pdeopt.functions.curved import EMPTY, Curvature, CurvatureFactors, CurvedFunction, CurvedPoint, Tangent
from pdeopt.functions.smooth import Costs, Operator
from pdeopt.lowrank.kronecker import KroneckerBlocks

#: Prices in evaluations with gradient, as those of a `DenseNetwork`.
FORWARD, BACKWARD, PRODUCT, FACTORS = 0.4, 0.6, 1.0, 2.0

#: Samples that go through the network at once where the curvature has no part in it.
CHUNK = 2000


class AffineGRU(nn.Module):
    """A `GRUStack` whose affine maps are modules of their own; its parameters, in the same order.

    Args:
        stack: the stack, whose parameters they are.
    """

    def __init__(self, stack: GRUStack) -> None:
        super().__init__()
        self.hidden_size, self.step = stack.hidden_size, GRU_STEPS[stack.kind]
        self.layers = nn.ModuleList()
        for layer in range(stack.num_layers):
            maps = [nn.Linear(1, 1), nn.Linear(1, 1)]
            for each, name in zip(maps, ("ih", "hh")):
                each.weight, each.bias = (getattr(stack, f"{part}_{name}_l{layer}") for part in ("weight", "bias"))
                each.out_features, each.in_features = each.weight.shape
            self.layers.append(nn.ModuleList(maps))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """As a `GRUStack`; samples are the first axis of what the maps see."""
        for maps in self.layers:
            of_inputs, of_state = maps.children()
            gates = hold_where_padded(of_inputs(x).transpose(0, 1), None if mask is None else mask.T)
            h, states = x.new_zeros((1, len(x), self.hidden_size)), []
            for row in gates.split(1):
                h = self.step(h, (row,), (lambda h, U=of_state: U(h[0])[None],), 1.0)
                states.append(h)
            x = torch.cat(states).transpose(0, 1)
        return x[:, -1]


def with_affine_maps(network: nn.Module) -> nn.Module:
    """The network, changed, with an `AffineGRU` in the place of each `GRUStack`."""
    if isinstance(network, GRUStack):
        return AffineGRU(network)
    for part in list(network.modules()):
        for name, child in part.named_children():
            if isinstance(child, GRUStack):
                setattr(part, name, AffineGRU(child))
    return network


class NetworkFunction(CurvedFunction):
    """f(theta) = the mean loss of a network's outputs + l2/2 |theta|^2, theta its parameters in their order, flat.

    Everything is in double precision, on a copy of the network whose layers go one after the other.

    Args:
        network: of any modules without random numbers.
        likelihood: the loss, a mean over samples.
        x, y: samples and targets, (samples, ...).
        l2: weight of the regularization.

    Attributes:
        module: the copy, whose parameters are those of the last point that was asked for factors.

    Raises:
        InputError: no samples, a loss that is a sum, or random numbers in training mode.
    """

    def __init__(self, network: nn.Module, likelihood: Likelihood, x: Tensor, y: Tensor, l2: float = 0.0) -> None:
        if len(x) != len(y) or len(x) == 0:
            raise InputError("samples and targets", f"{len(x)} and {len(y)}", "as many of both, and at least one")
        if likelihood.reduction != "mean":
            raise InputError("loss of a NetworkFunction", likelihood.reduction, "mean")
        if any(part.training and is_random(part) for part in network.modules()):
            raise InputError("network", "random numbers in training mode", "network.eval(), or p = 0")
        self.module = with_affine_maps(serial_network(network)).double()
        self.parts = list(self.module.parameters())
        prices = Costs(value=FORWARD, gradient=FORWARD + BACKWARD, hessian_product=PRODUCT)
        super().__init__(sum(p.numel() for p in self.parts), costs=prices)
        self.likelihood, self.x, self.y, self.l2, self.samples = likelihood, x.double(), y, l2, len(x)
        self.call = with_parameters(self.module)
        try:
            self.layers: list[CurvedLayer] | None = curved_layers(self.module)
        except InputError:  # a layer without Kronecker factors
            self.layers = None

    def parameters(self) -> Tensor:
        """Those of the network, flat: where training starts."""
        return torch.cat([p.detach().reshape(-1) for p in self.parts])

    def split(self, theta: Tensor) -> list[Tensor]:
        """The parameters, shaped, from a flat vector."""
        return [v.view(p.shape) for v, p in zip(theta.split([p.numel() for p in self.parts]), self.parts)]

    def outputs(self, theta: Tensor, x: Tensor) -> Tensor:
        """Of other samples, (samples, ...)."""
        with torch.no_grad():
            parts = self.split(theta)
            return torch.cat([self.call(part, *parts) for part in x.double().split(CHUNK)])

    def at(self, x: Tensor, state: Tensor | None = None) -> NetworkPoint:
        return NetworkPoint(self, x)

    def recalled(self, memory: dict[str, Any]) -> CurvatureFactors:
        if not memory:
            return super().recalled(memory)
        count = len(memory) // 2
        blocks = KroneckerBlocks(*([memory[f"{name}{k}"] for k in range(count)] for name in "AG"))
        return NetworkFactors(self, blocks)


class NetworkPoint(CurvedPoint):
    """A `NetworkFunction` at its parameters."""

    def __init__(self, function: NetworkFunction, x: Tensor) -> None:
        self.function, self.x, self.state = function, x, EMPTY
        function.tally.values += 1
        function.tally.work += FORWARD
        outputs = function.outputs(x, function.x)
        self.value = float(function.likelihood(outputs, function.y)) + 0.5 * function.l2 * float(x @ x)

    @cached_property
    def gradient(self) -> Tensor:
        f = self.function
        f.tally.gradients += 1
        f.tally.values -= 1  # it was the value of this gradient
        f.tally.work += BACKWARD
        total = f.l2 * self.x
        for x, y in zip(f.x.split(CHUNK), f.y.split(CHUNK)):
            with torch.enable_grad():
                leaves = [part.detach().requires_grad_() for part in f.split(self.x)]
                loss = f.likelihood.each(f.call(x, *leaves), y).sum() / f.samples
            found = torch.autograd.grad(loss, leaves, materialize_grads=True)
            total = total + torch.cat([g.reshape(-1) for g in found])
        return total

    def curvature(self, rows: Tensor | None = None) -> NetworkCurvature:
        return NetworkCurvature(self, rows)

    def ahead(self, d: Tensor, state: Tensor) -> NetworkPoint:
        return NetworkPoint(self.function, self.x + d)


class NetworkCurvature(Curvature):
    """The Gauss-Newton matrix of a `NetworkPoint`, of some samples or of all."""

    def __init__(self, point: NetworkPoint, rows: Tensor | None) -> None:
        f = self.function = point.function
        self.x = point.x
        self.inputs = f.x if rows is None else f.x[rows]
        self.share = len(self.inputs) / f.samples

    @cached_property
    def _graph(self) -> tuple[Tensor, list[Tensor]]:
        """Outputs and the parameters that they are derived from, for many backward derivatives."""
        with torch.enable_grad():
            leaves = [part.detach().requires_grad_() for part in self.function.split(self.x)]
            return self.function.call(self.inputs, *leaves), leaves

    def product(self, d: Tensor) -> Tangent:
        f = self.function
        f.tally.hessian_products += 1
        f.tally.work += PRODUCT * self.share
        with torch.no_grad(), forward_ad.dual_level():
            parts = zip(f.split(self.x), f.split(d))
            moved = f.call(self.inputs, *(forward_ad.make_dual(p.contiguous(), v.contiguous()) for p, v in parts))
            tangent = forward_ad.unpack_dual(moved).tangent
        outputs, leaves = self._graph
        tangent = torch.zeros_like(outputs) if tangent is None else tangent
        cotangent = f.likelihood.times(outputs.detach(), tangent) / len(outputs)
        found = torch.autograd.grad(outputs, leaves, cotangent, retain_graph=True, materialize_grads=True)
        return Tangent(torch.cat([g.reshape(-1) for g in found]).add_(d, alpha=f.l2), EMPTY)

    def factors(self) -> CurvatureFactors:
        f = self.function
        if f.layers is None:
            return super().factors()
        f.tally.work += FACTORS * self.share
        with torch.no_grad():
            for p, part in zip(f.parts, f.split(self.x)):
                p.copy_(part)
        kronecker = KroneckerFactors(f.module, f.layers, f.likelihood)
        kronecker.average([(self.inputs,)])
        return NetworkFactors(f, kronecker.blocks())


class NetworkFactors(CurvatureFactors):
    """Kronecker factors of a network's layers, inverted in eigenvectors."""

    def __init__(self, function: NetworkFunction, blocks: KroneckerBlocks) -> None:
        self.function, self.blocks = function, blocks

    def inverse(self, damping: float) -> Operator:
        f, shift = self.function, damping + self.function.l2
        layers = f.layers or []

        def apply(r: Tensor) -> Tensor:
            parts = iter(f.split(r))
            vector = flat(layers, [[next(parts) for _ in layer.parameters] for layer in layers])
            found = by_layer(layers, self.blocks.solve(vector, shift, exact=True))
            return torch.cat([part.reshape(-1) for each in found for part in each])

        return apply

    def memory(self) -> dict[str, Any]:
        pairs = zip("AG", (self.blocks.A, self.blocks.G))
        return {f"{name}{k}": part.clone() for name, parts in pairs for k, part in enumerate(parts)}
