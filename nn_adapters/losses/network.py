"""The loss of any PyTorch network over its samples, as a smooth function of one flat vector of parameters."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from pdeopt.core.errors import InputError
from pdeopt.functions.decomposition import Decomposition
from pdeopt.functions.smooth import Costs, Restriction, SampledFunction, SmoothFunction, Tally

#: (outputs of the network, targets) -> their mean loss.
Loss = Callable[[Tensor, Tensor], Tensor]


class NetworkLoss(SampledFunction):
    """f(theta) = mean over samples of loss(network(x; theta), y) + tikhonov/2 |theta|^2.

    theta holds all parameters in the order of `network.parameters()`, in double precision and on the CPU. The network
    is evaluated in `precision`, on the device of the samples; its own parameters are neither read nor written but by
    `parameters` and `assign`.

    Args:
        network: whose outputs of a sample depend on that sample only: no batch normalization in training mode.
        loss: the mean over the samples that it gets.
        x, y: samples and targets, of equal leading size.
        precision: of the evaluation; single precision is twice as fast, and leaves values about 7 digits.
        tikhonov: factor of the regularization.
        chunk: samples at a time, which bounds the memory.
        costs, tally: see `SmoothFunction`.

    Attributes:
        layers: parameters of each layer, in order: blocks of `Decomposition.blocks`. A layer is a module that has
            parameters of its own.

    Raises:
        InputError: no samples, or no parameters, or samples and targets of different number.
    """

    def __init__(
        self,
        network: nn.Module,
        loss: Loss,
        x: Tensor,
        y: Tensor,
        *,
        precision: torch.dtype = torch.float64,
        tikhonov: float = 0.0,
        chunk: int = 10_000,
        costs: Costs | None = None,
        tally: Tally | None = None,
    ) -> None:
        if len(x) != len(y) or len(x) == 0:
            raise InputError("samples and targets", f"{len(x)} and {len(y)}", "as many of both, and at least one")
        named = list(network.named_parameters())
        if not named:
            raise InputError("network", type(network).__name__ + " without parameters", "a network with parameters")
        super().__init__(sum(p.numel() for _, p in named), len(x), costs=costs, tally=tally)
        self.network, self.loss, self.precision = network, loss, precision
        self.tikhonov, self.chunk = tikhonov, chunk
        self.x, self.y = _in_precision(x, precision), _in_precision(y, precision)
        self._shapes = {name: p.shape for name, p in named}
        self._sizes = [p.numel() for _, p in named]
        self._free, self._constant = [True] * len(named), 0.0
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}  # by child: weights before it, and the features they make
        self._buffers = {n: _in_precision(b, precision).to(x.device) for n, b in network.named_buffers()}
        self.layers = [
            sum(size for _, size in group)
            for _, group in groupby(zip(self._shapes, self._sizes), key=lambda pair: pair[0].rpartition(".")[0])
        ]

    def parameters(self) -> Tensor:
        """The network's own parameters as one vector, (size,) double precision."""
        return torch.cat([p.detach().reshape(-1) for p in self.network.parameters()]).double().cpu()

    def assign(self, theta: Tensor) -> None:
        """Give the network these parameters."""
        with torch.no_grad():
            for p, part in zip(self.network.parameters(), theta.split(self._sizes)):
                p.copy_(part.view_as(p))

    def predict(self, theta: Tensor, x: Tensor) -> Tensor:
        """Outputs for other samples, on the device of the samples."""
        with torch.no_grad():
            flat = theta.to(self.x.device, self.precision)
            parts = _in_precision(x, self.precision).to(self.x.device).split(self.chunk)
            return torch.cat([self._outputs(flat, part) for part in parts])

    def subset(self, indices: Tensor) -> NetworkLoss:
        """The mean over these samples, with the same tally, and costs by its part of the samples."""
        rows = indices.to(self.x.device)
        costs = self.costs.times(len(indices) / self.samples)
        return type(self)(
            self.network,
            self.loss,
            self.x[rows],
            self.y[rows],
            precision=self.precision,
            tikhonov=self.tikhonov,
            chunk=self.chunk,
            costs=costs,
            tally=self.tally,
        )

    def decompose(self, parts: int, overlap: int = 0, team: Any = None) -> Decomposition:
        """The parameters in parts of neighboring layers."""
        return Decomposition.blocks(self.layers, parts, overlap, team)

    def local(self, decomposition: Decomposition, part: int, x: Tensor) -> SmoothFunction:
        """d -> f(x + R' d): in an `nn.Sequential`, layers before the part are evaluated once, at x.

        Neither they nor the weights after the part are differentiated. The costs say so, from the multiplications of
        the layers; those of a network that is no `nn.Sequential` are the whole function's.
        """
        indices = decomposition.parts[part]
        if isinstance(self.network, nn.Sequential):
            first = _child_of(self.network, int(indices[0]))
            begin = sum(p.numel() for p in self.network[:first].parameters())
            first = first if begin else 0
        else:
            first = begin = 0
        tail = self._tail(first, x[:begin])
        ends = torch.tensor(tail._sizes).cumsum(0)
        touched = torch.bincount(torch.bucketize(indices - begin, ends, right=True), minlength=len(ends)) > 0
        tail._free = touched.tolist()
        tail.costs = self._costs_of_part(first, tail._free)
        return Restriction(tail, indices - begin, x[begin:])

    def _tail(self, first: int, fixed: Tensor) -> NetworkLoss:
        """The loss as a function of the parameters from this child of the network on."""
        network, x = (self.network[first:], self._features(first, fixed)) if first else (self.network, self.x)
        tail = NetworkLoss(
            network,
            self.loss,
            x,
            self.y,
            precision=self.precision,
            tikhonov=self.tikhonov,
            chunk=self.chunk,
            tally=self.tally,
        )
        tail._constant = 0.5 * self.tikhonov * float(fixed @ fixed)
        return tail

    def _features(self, first: int, fixed: Tensor) -> Tensor:
        """What goes into this child of the network; goes on from an earlier child's that is kept for these weights."""
        kept = [
            child
            for child, (theta, _) in self._kept.items()
            if child <= first and torch.equal(theta, fixed[: len(theta)])
        ]
        begin = max(kept, default=0)
        theta, x = self._kept[begin] if kept else (fixed[:0], self.x)
        if begin < first:
            between = NetworkLoss(
                self.network[begin:first], self.loss, x, self.y, precision=self.precision, chunk=self.chunk
            )
            x = between.predict(fixed[len(theta) :], x)
            share = sum(self._multiplications[begin:first]) / sum(self._multiplications)
            self.tally.work += self.costs.value * share
            self._kept[first] = fixed.clone(), x
        return x

    @cached_property
    def _multiplications(self) -> list[int]:
        """Of a sample in each child of the network, about: parameters times the pixels that they serve."""
        found, x = [], self.x[:1].to(next(self.network.parameters()))
        for child in self.network.children():
            with torch.no_grad():
                x = child(x)
            parameters = sum(p.numel() for p in child.parameters())
            found.append(parameters * x[0, 0].numel() if x.dim() > 1 else parameters)
        return found

    def _costs_of_part(self, first: int, free: list[bool]) -> Costs:
        """Values and features from child `first` on, gradients of features after it, and of the free parameters."""
        if not isinstance(self.network, nn.Sequential):
            return self.costs
        p, flags = self._multiplications, iter(free)
        free_children = [sum(next(flags) for _ in child.parameters()) > 0 for child in self.network[first:]]
        tail = p[first:]
        leading = next(number for number, amount in enumerate(p) if amount)
        differentiated = (
            sum(tail) - tail[free_children.index(True)] + sum(q for q, on in zip(tail, free_children) if on)
        )
        share = (sum(tail) + differentiated) / (3 * sum(p) - p[leading])
        return Costs(
            self.costs.value * sum(tail) / sum(p), share * self.costs.gradient, share * self.costs.hessian_product
        )

    def _outputs(self, flat: Tensor, x: Tensor) -> Tensor:
        parts = [part if free else part.detach() for part, free in zip(flat.split(self._sizes), self._free)]
        named = {name: part.view(shape) for (name, shape), part in zip(self._shapes.items(), parts)}
        outputs: Tensor = functional_call(self.network, named | self._buffers, (x,))
        return outputs

    def _sum(self, theta: Tensor, one: Callable[[Tensor, Callable[[Tensor], Tensor]], Any]) -> list[Any]:
        """`one` of the parameters in precision and of the loss's part for each chunk."""
        flat, found = theta.detach().to(self.x.device, self.precision), []
        for x, y in zip(self.x.split(self.chunk), self.y.split(self.chunk)):

            def part(theta: Tensor, x: Tensor = x, y: Tensor = y) -> Tensor:
                return self.loss(self._outputs(theta, x), y) * (len(x) / self.samples)

            found.append(one(flat, part))
        return found

    def _value(self, x: Tensor) -> float:
        with torch.no_grad():
            parts = self._sum(x, lambda theta, part: float(part(theta)))
        return math.fsum(parts) + self._constant + 0.5 * self.tikhonov * float(x @ x)

    def _value_and_gradient(self, x: Tensor) -> tuple[float, Tensor]:
        def one(theta: Tensor, part: Callable[[Tensor], Tensor]) -> tuple[float, Tensor]:
            theta = theta.detach().requires_grad_()
            value = part(theta)
            return float(value.detach()), torch.autograd.grad(value, theta)[0].to("cpu", torch.float64)

        values, gradients = zip(*self._sum(x, one))
        return math.fsum(values) + self._constant + 0.5 * self.tikhonov * float(x @ x), sum(
            gradients
        ) + self.tikhonov * x

    def _hvp(self, x: Tensor, d: Tensor) -> Tensor:
        direction = d.to(self.x.device, self.precision)

        def one(theta: Tensor, part: Callable[[Tensor], Tensor]) -> Tensor:
            theta = theta.detach().requires_grad_()
            (g,) = torch.autograd.grad(part(theta), theta, create_graph=True)
            (product,) = torch.autograd.grad(g, theta, direction, materialize_grads=True)
            return product.to("cpu", torch.float64)

        product: Tensor = sum(self._sum(x, one)) + self.tikhonov * d
        return product


def _child_of(network: nn.Sequential, index: int) -> int:
    """The child that has this parameter of the flat vector."""
    ends = torch.tensor([sum(p.numel() for p in child.parameters()) for child in network]).cumsum(0)
    return int(torch.bucketize(torch.tensor(index), ends, right=True))


def _in_precision(x: Tensor, precision: torch.dtype) -> Tensor:
    return x.to(precision) if x.is_floating_point() else x
