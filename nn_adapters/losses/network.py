"""The loss of any PyTorch network over its samples, as a smooth function of one flat vector of parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from nn_adapters.curvature.networkmetric import FactorSettings, NetworkMetric
from nn_adapters.layers.batching import is_random, shares_nothing, with_parameters
from nn_adapters.layers.parallelmodule import exactly
from pdeopt.core.errors import InputError
from pdeopt.core.settings import read
from pdeopt.functions.decomposition import Decomposition
from pdeopt.functions.smooth import Costs, Metric, Restriction, SampledFunction, SmoothFunction, Tally

#: (outputs of the network, targets) -> their mean loss.
Loss = Callable[[Tensor, Tensor], Tensor]


class NetworkLoss(SampledFunction):
    """f(theta) = mean over samples of loss(network(x; theta), y) + tikhonov/2 |theta|^2.

    The loss of any module as a `SmoothFunction`, for all optimizers of pdeopt. theta, (size,), holds all parameters in
    the order of `network.parameters()`, in double precision and on the CPU. The network is evaluated in `precision`,
    on the device of the samples; its own parameters are neither read nor written but by `parameters` and `assign`.
    Nothing is collective: with data or unknowns on every rank, each evaluates all samples.

    Args:
        network: whose outputs of a sample depend on that sample only: no batch normalization in training mode. Layers
            in parallel are evaluated one after the other: their cycles would give other values than gradients.
        loss: (outputs, targets) -> their mean loss, over the samples that it gets.
        x, y: samples (samples, ...) and targets (samples, ...); floating-point ones are converted to `precision`.
        precision: of the evaluation; single precision is twice as fast, and leaves values about 7 digits.
        tikhonov: factor of the regularization.
        chunk: samples at a time, which bounds the memory.
        free: for each parameter of the network, whether it is differentiated; all are by default. The entries of the
            gradient for the others are those of the regularization alone.
        constant: number added to f.
        factors: settings of `metric`; by default from the options `-metric_*`.
        costs, tally: see `SmoothFunction`.

    Attributes:
        layers: number of parameters of each layer, in order: blocks of `Decomposition.blocks`. A layer is a module that
            has parameters of its own.

    Raises:
        InputError: no samples, or no parameters, or samples and targets of different number, or random numbers, as
            dropout draws them in training mode.

    Example:
        >>> f = NetworkLoss(network, nn.functional.cross_entropy, x, labels, tikhonov=1e-4)
        >>> result = LBFGS(f).minimize(f.parameters())
        >>> f.assign(result.design)
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
        free: Sequence[bool] | None = None,
        constant: float = 0.0,
        factors: FactorSettings | None = None,
        costs: Costs | None = None,
        tally: Tally | None = None,
    ) -> None:
        if len(x) != len(y) or len(x) == 0:
            raise InputError("samples and targets", f"{len(x)} and {len(y)}", "as many of both, and at least one")
        named = list(network.named_parameters())
        noisy = next((part for part in network.modules() if part.training and is_random(part)), None)
        if noisy is not None:
            raise InputError("network", f"{type(noisy).__name__} in training mode", "network.eval(), or p = 0")
        if not named:
            raise InputError("network", type(network).__name__ + " without parameters", "a network with parameters")
        super().__init__(sum(p.numel() for _, p in named), len(x), costs=costs, tally=tally)
        self.network, self.loss, self.precision = network, loss, precision
        self.tikhonov, self.chunk, self.constant, self.factors = tikhonov, chunk, constant, factors
        self.x, self.y = _in_precision(x, precision), _in_precision(y, precision)
        self._shapes = {name: p.shape for name, p in named}
        self._sizes = [p.numel() for _, p in named]
        self._free = [True] * len(named) if free is None else list(free)
        buffers = {n: _in_precision(b, precision).to(x.device) for n, b in network.named_buffers()}
        self._function = with_parameters(network, buffers)
        in_a_row = isinstance(network, nn.Sequential) and shares_nothing(network)
        self._children = _Children(network, x[:1]) if in_a_row else None  # type: ignore[arg-type]
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}  # by child: weights before it, and the features they make
        self.layers = [
            sum(size for _, size in group)
            for _, group in groupby(zip(self._shapes, self._sizes), key=lambda pair: pair[0].rpartition(".")[0])
        ]

    def _like(self, network: nn.Module, x: Tensor, y: Tensor, **words: Any) -> NetworkLoss:
        """Another loss in the same precision, chunks and tally."""
        words = {"tikhonov": self.tikhonov, "tally": self.tally, "factors": self.factors, **words}
        return NetworkLoss(network, self.loss, x, y, precision=self.precision, chunk=self.chunk, **words)

    def parameters(self) -> Tensor:
        """The network's own parameters as one vector, (size,) double precision: where training starts."""
        return torch.cat([p.detach().reshape(-1) for p in self.network.parameters()]).double().cpu()

    def assign(self, theta: Tensor) -> None:
        """Give the network these parameters, (size,)."""
        with torch.no_grad():
            for p, part in zip(self.network.parameters(), theta.split(self._sizes)):
                p.copy_(part.view_as(p))

    def predict(self, theta: Tensor, x: Tensor) -> Tensor:
        """Outputs for other samples, (samples, ...), on the device of the loss's own samples."""
        with torch.no_grad():
            flat = theta.to(self.x.device, self.precision)
            parts = _in_precision(x, self.precision).to(self.x.device).split(self.chunk)
            return torch.cat([self._outputs(flat, part) for part in parts])

    def subset(self, indices: Tensor) -> NetworkLoss:
        """The mean over these samples, with the same tally, and costs by its part of the samples."""
        rows = indices.to(self.x.device)
        costs = self.costs.times(len(indices) / self.samples)
        return self._like(self.network, self.x[rows], self.y[rows], costs=costs)

    def metric(self, kind: str) -> Metric:
        """Of kind "kfac": damped Kronecker factors of the Fisher matrix; see `NetworkMetric`."""
        if kind != "kfac":
            raise InputError("metric of a NetworkLoss", kind, "none | kfac")
        return NetworkMetric(self.network, self.loss, self.x, self.factors or read(FactorSettings))

    def decompose(self, parts: int | None = None, overlap: int = 0, team: Any = None) -> Decomposition:
        """The parameters in parts of neighboring layers."""
        return Decomposition.blocks(self.layers, parts, overlap, team)

    def local(self, decomposition: Decomposition, part: int, x: Tensor) -> SmoothFunction:
        """d -> f(x + R' d): in an `nn.Sequential`, layers before the part are evaluated once, at x.

        Neither they nor the weights after the part are differentiated. The costs say so, from the multiplications of
        the layers; those of a network that is no `nn.Sequential` are the whole function's. What is counted for the
        layers before the part is the way from the part before, as for one rank that takes all parts in order: so counts
        do not depend on who has which part.
        """
        indices, children = decomposition.parts[part], self._children
        first, begin = (0, 0) if children is None else children.start_of(int(indices[0]))
        is_kept = first in self._kept and torch.equal(self._kept[first][0], x[:begin])
        network, samples = (self.network[first:], self._features(first, x[:begin])) if first else (self.network, self.x)  # type: ignore[index]
        if children is not None and first and not is_kept:
            before = children.start_of(int(decomposition.parts[part - 1][0]))[0] if part else 0
            self.tally.work += self.costs.value * children.share(before if before <= first else 0, first)
        free = _touched([p.numel() for p in network.parameters()], indices - begin)
        costs = self.costs if children is None else children.costs(self.costs, first, free)
        constant = 0.5 * self.tikhonov * float(x[:begin] @ x[:begin])
        tail = self._like(network, samples, self.y, free=free, constant=constant, costs=costs)
        return Restriction(tail, indices - begin, x[begin:])

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
            between = self._like(self.network[begin:first], x, self.y, tikhonov=0.0, tally=None)  # type: ignore[index]
            x = between.predict(fixed[len(theta) :], x)
            self._kept[first] = fixed.clone(), x
        return x

    def _outputs(self, flat: Tensor, x: Tensor) -> Tensor:
        parts = [part if free else part.detach() for part, free in zip(flat.split(self._sizes), self._free)]
        with exactly(self.network):  # layers in parallel: a smooth function has one value at a point
            return self._function(x, *(part.view(shape) for part, shape in zip(parts, self._shapes.values())))

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
        return math.fsum(parts) + self.constant + 0.5 * self.tikhonov * float(x @ x)

    def _value_and_gradient(self, x: Tensor) -> tuple[float, Tensor]:
        def one(theta: Tensor, part: Callable[[Tensor], Tensor]) -> tuple[float, Tensor]:
            theta = theta.detach().requires_grad_()
            value = part(theta)
            return float(value.detach()), torch.autograd.grad(value, theta)[0].to("cpu", torch.float64)

        values, gradients = zip(*self._sum(x, one))
        value = math.fsum(values) + self.constant + 0.5 * self.tikhonov * float(x @ x)
        return value, sum(gradients) + self.tikhonov * x

    def _hvp(self, x: Tensor, d: Tensor) -> Tensor:
        direction = d.to(self.x.device, self.precision)

        def one(theta: Tensor, part: Callable[[Tensor], Tensor]) -> Tensor:
            theta = theta.detach().requires_grad_()
            (g,) = torch.autograd.grad(part(theta), theta, create_graph=True)
            (product,) = torch.autograd.grad(g, theta, direction, materialize_grads=True)
            return product.to("cpu", torch.float64)

        product: Tensor = sum(self._sum(x, one)) + self.tikhonov * d
        return product


class _Children:
    """The children of an `nn.Sequential`: where their parameters stand in the flat vector, and what they cost.

    Args:
        network: the module.
        sample: one sample, (1, ...).
    """

    def __init__(self, network: nn.Sequential, sample: Tensor) -> None:
        self.network, self.sample = network, sample
        self.sizes = [sum(p.numel() for p in child.parameters()) for child in network]

    @cached_property
    def multiplications(self) -> list[int]:
        """Of a sample in each child, about: parameters times the pixels that they serve."""
        found, x = [], self.sample.to(next(self.network.parameters()))
        for child, size in zip(self.network, self.sizes):
            with torch.no_grad():
                x = child(x)
            found.append(size * x[0, 0].numel() if x.dim() > 1 else size)
        return found

    def start_of(self, index: int) -> tuple[int, int]:
        """The child that has this parameter, and its first parameter; 0, 0 where no earlier child has parameters."""
        ends = torch.tensor(self.sizes).cumsum(0)
        first = int(torch.bucketize(torch.tensor(index), ends, right=True))
        begin = sum(self.sizes[:first])
        return (first, begin) if begin else (0, 0)

    def share(self, begin: int, end: int) -> float:
        """The part of the multiplications that is in some children."""
        return sum(self.multiplications[begin:end]) / sum(self.multiplications)

    def costs(self, whole: Costs, first: int, free: Sequence[bool]) -> Costs:
        """Of the loss from child `first` on, whose parameters are differentiated where they are free.

        A value takes a product for each weight. A gradient takes one more for each free weight, and one for the
        features after the first child with free weights; that of the whole has none for the samples.
        """
        p, flags = self.multiplications, iter(free)
        is_free = [sum(next(flags) for _ in child.parameters()) > 0 for child in self.network[first:].children()]
        tail = p[first:]
        leading = next(amount for amount in p if amount)
        of_features = sum(tail) - tail[is_free.index(True)]
        of_weights = sum(amount for amount, on in zip(tail, is_free) if on)
        share = (sum(tail) + of_features + of_weights) / (3 * sum(p) - leading)
        value = whole.value * sum(tail) / sum(p)
        return Costs(value, share * whole.gradient, share * whole.hessian_product)


def _touched(sizes: Sequence[int], indices: Tensor) -> list[bool]:
    """Whether any of the indices is one of each parameter's, for parameters of these sizes in a row."""
    ends = torch.tensor(sizes).cumsum(0)
    return (torch.bincount(torch.bucketize(indices, ends, right=True), minlength=len(ends)) > 0).tolist()


def _in_precision(x: Tensor, precision: torch.dtype) -> Tensor:
    return x.to(precision) if x.is_floating_point() else x
