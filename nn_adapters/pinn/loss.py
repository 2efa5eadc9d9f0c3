"""Physics-informed networks as smooth functions of their parameters: residuals of equations, in mean squares.

    f(theta) = sum over terms of weight * mean over the term's points of residual(u, derivatives, x)^2

with u = lift(x) + factor(x) net(x; theta), so that a factor that vanishes there imposes boundary and initial values
exactly; without it they are terms of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, jvp

from nn_adapters.pinn.jets import JetBasis
from nn_adapters.pinn.network import DenseLayer, JetSweep, Network, absorb_slopes
from pdeopt.core.errors import InputError
from pdeopt.functions.decomposition import Decomposition
from pdeopt.functions.smooth import Costs, Restriction, SampledFunction, SmoothFunction, Tally

#: u, (points,), its derivatives by name, (points,) each, and x, (points, inputs) -> residual, (points,).
Residual = Callable[[Tensor, dict[str, Tensor], Tensor], Tensor]

#: x, (points, inputs) -> (points,); its rows do not interact.
Field = Callable[[Tensor], Tensor]

# Entries of a jet times width that go through the layers together: about what a cache holds.
_TOGETHER = 80_000

# Time of the parts of a call, a point and a row of its jets, measured on 4 to 8 layers of 20 to 64: a multiplication
# of a product with W and of one with its adjoint, of a gradient by W, an entry that is activated, and the residual.
_PRODUCT, _WEIGHT, _ENTRY, _RESIDUAL = 1.0, 1.8, 30.0, 400.0

# A Hessian product in gradients.
_HESSIAN = 14.0


@dataclass(frozen=True)
class Term:
    """weight * mean of residual(u, d, x)^2 over points.

    Args:
        points: (n, inputs), double precision.
        residual: made of torch operations; d["x"], d["xx"] are the derivatives.
        derivatives: names of those that the residual takes, such as ("x", "t", "xx").
        weight: of the term, or of each point, (n,).
    """

    points: Tensor
    residual: Residual
    derivatives: tuple[str, ...] = ()
    weight: float | Tensor = 1.0

    def subset(self, indices: Tensor) -> Term:
        """The term at some of its points."""
        weight = self.weight[indices] if isinstance(self.weight, Tensor) else self.weight
        return replace(self, points=self.points[indices], weight=weight)


class PINN(SampledFunction):
    """The loss of a network that is to fulfill equations; see the head of this file.

    Args:
        network: net.
        terms: the first is sampled: `subset` and `with_points` change its points.
        names: of the inputs, a letter each.
        lift, factor: of u; by default u is the network itself.
        tally: where calls are counted.
        costs: by default those of a fixed model of the time; 1 is a gradient of this function.

    Attributes:
        layers: parameters of each hidden layer, the closing one counted to the last: for `Decomposition.blocks`.
    """

    def __init__(
        self,
        network: Network,
        terms: Sequence[Term],
        names: str,
        lift: Field | None = None,
        factor: Field | None = None,
        tally: Tally | None = None,
        costs: Costs | None = None,
    ) -> None:
        if len(names) != network.inputs:
            raise InputError("names of the inputs", repr(names), f"{network.inputs} letters, one an input")
        if not terms:
            raise InputError("terms of a PINN", "none", "at least one")
        self.network, self.terms, self.names, self.lift, self.factor = network, tuple(terms), names, lift, factor
        self._evaluations = [Evaluation(self, term) for term in terms]
        self._input: tuple[int, Tensor, list[list[Tensor]]] = (0, torch.empty(0), [])
        super().__init__(network.size, len(terms[0].points), costs=costs or self._share(0, network.depth), tally=tally)
        sizes = network.sizes
        self.layers = [*sizes[:-2], sizes[-2] + sizes[-1]]

    def initial(self, seed: int = 0) -> Tensor:
        """Where training starts, (size,)."""
        return self.network.initial(seed)

    def predict(self, theta: Tensor, x: Tensor) -> Tensor:
        """u at points x, (points, inputs): (points,)."""
        term = Term(x, lambda u, d, x: u)
        return Evaluation(self, term).residuals(absorb_slopes(self.network.layers(theta)))

    def residuals(self, theta: Tensor, x: Tensor | None = None) -> Tensor:
        """Of the first term, at its points or at others, (points, inputs): (points,); counted as work."""
        term = self.terms[0] if x is None else replace(self.terms[0], points=x, weight=1.0)
        evaluation = self._evaluations[0] if x is None else Evaluation(self, term)
        self.tally.work += self.costs.gradient * evaluation.time(0, self.network.depth)[0] / self.time()
        return evaluation.residuals(absorb_slopes(self.network.layers(theta)))

    def with_points(self, points: Tensor, weight: float | Tensor | None = None) -> PINN:
        """The same loss, its first term at other points, counted in the same tally."""
        weight = self.terms[0].weight if weight is None else weight
        return self._with(replace(self.terms[0], points=points, weight=weight))

    def subset(self, indices: Tensor) -> PINN:
        """The loss with the first term at some of its points."""
        return self._with(self.terms[0].subset(indices))

    def _with(self, term: Term) -> PINN:
        found = PINN(self.network, [term, *self.terms[1:]], self.names, self.lift, self.factor, self.tally)
        found.costs = self.costs.times(found.time() / self.time())
        return found

    def _value(self, x: Tensor) -> float:
        layers = absorb_slopes(self.network.layers(x))
        return sum(evaluation.value(layers, evaluation.inputs, 0) for evaluation in self._evaluations)

    def _value_and_gradient(self, x: Tensor) -> tuple[float, Tensor]:
        return self._from(0, self.network.depth, [e.inputs for e in self._evaluations], x)

    def _from(self, first: int, last: int, inputs: list[list[Tensor]], theta: Tensor) -> tuple[float, Tensor]:
        """f, and f' by the layers `first` to `last`, from the jets before the first.

        Args:
            theta: parameters from layer `first` on.
        """
        raw = self.network.layers(theta, first)
        layers = absorb_slopes(raw)
        sums = [(torch.zeros_like(layer.W), torch.zeros_like(layer.b)) for layer in layers[: last - first + 1]]
        value = sum(e.add_gradient(layers, jets, first, last, sums) for e, jets in zip(self._evaluations, inputs))
        return value, self._flat(raw, sums)

    def _flat(self, layers: list[DenseLayer], sums: list[tuple[Tensor, Tensor]]) -> Tensor:
        """The gradient by W, b and slope of each layer from that by c W and c b."""
        parts = []
        for layer, (W, b) in zip(layers, sums):
            parts += [layer.slope * W.flatten(), layer.slope * b]
            if self.network.adaptive and layer is not layers[-1]:
                parts.append(self.network.slope_scale * ((layer.W * W).sum() + (layer.b * b).sum())[None])
        return torch.cat(parts)

    def _hvp(self, x: Tensor, d: Tensor) -> Tensor:
        total = torch.zeros_like(x)
        for evaluation in self._evaluations:
            for chunk, inputs in zip(evaluation.chunks, evaluation.inputs):
                total += jvp(grad(partial(evaluation.plain, chunk, inputs)), (x,), (d,))[1]
        return total

    def decompose(self, parts: int, overlap: int = 0, team: Any = None) -> Decomposition:
        """Layers in groups of neighbors."""
        return Decomposition.blocks(self.layers, parts, overlap, team)

    def local(self, decomposition: Decomposition, part: int, x: Tensor) -> SmoothFunction:
        """d -> f(x + R' d). Where the part is some whole layers in a row, only these and those behind are evaluated.

        The jets before the part are found here, which is counted as work.
        """
        layers = self._whole_layers(decomposition.parts[part])
        return Restriction(self, decomposition.parts[part], x) if layers is None else LocalPINN(self, *layers, x)

    def _whole_layers(self, indices: Tensor) -> tuple[int, int] | None:
        """First and last layer of a part; None if it is anything else."""
        starts = torch.tensor([0, *self.network.sizes]).cumsum(0).tolist()
        begin, end = int(indices[0]), int(indices[-1]) + 1
        whole = begin in starts and end in starts and end - begin == len(indices)
        return (starts.index(begin), starts.index(end) - 1) if whole else None

    def jets_before(self, layer: int, theta: Tensor) -> list[list[Tensor]]:
        """Jets at the input of a layer, a list for each term, from the last ones asked for as far as they hold."""
        if layer == 0:
            return [e.inputs for e in self._evaluations]
        at, known, jets = self._input
        if not (0 < at <= layer and torch.equal(known, theta[: len(known)])):
            at, jets = 0, [e.inputs for e in self._evaluations]
        if at < layer:
            between = absorb_slopes(self.network.layers(theta)[at:layer])
            jets = [e.through(between, own, at) for e, own in zip(self._evaluations, jets)]
            self.tally.work += self._forward_share(at, layer)
        self._input = (layer, theta[: sum(self.network.sizes[:layer])].clone(), jets)
        return jets

    def time(self) -> float:
        """Of a gradient, in units of the model."""
        return sum(e.time(0, self.network.depth)[1] for e in self._evaluations)

    def _share(self, first: int, last: int) -> Costs:
        """Costs of the gradient by some layers, in those of a gradient by all."""
        times = [e.time(first, last) for e in self._evaluations]
        value, gradient = (sum(column) / self.time() for column in zip(*times))
        return Costs(value, gradient, _HESSIAN * gradient)

    def _forward_share(self, first: int, end: int) -> float:
        """Work of the layers from `first` to before `end`, forward alone."""
        return self.costs.gradient * sum(e.forward_time(first, end) for e in self._evaluations) / self.time()


class LocalPINN(SmoothFunction):
    """d -> f(x + R' d), R the restriction to the layers `first` to `last`; see `PINN.local`."""

    def __init__(self, whole: PINN, first: int, last: int, x: Tensor) -> None:
        sizes = whole.network.sizes
        begin, end = sum(sizes[:first]), sum(sizes[: last + 1])
        share = whole._share(first, last).times(whole.costs.gradient)
        costs = replace(share, hessian_product=whole.costs.hessian_product)  # it goes through the whole network
        super().__init__(end - begin, whole.comm, costs, whole.tally)
        self.whole, self.first, self.last, self.inputs = whole, first, last, whole.jets_before(first, x)
        self._own, self._behind = x[begin:end].clone(), x[end:].clone()
        self._restriction = Restriction(whole, torch.arange(begin, end), x)

    def _parameters(self, d: Tensor) -> Tensor:
        """From the first layer on."""
        return torch.cat([self._own + d, self._behind])

    def _value(self, x: Tensor) -> float:
        whole = self.whole
        layers = absorb_slopes(whole.network.layers(self._parameters(x), self.first))
        return sum(e.value(layers, jets, self.first) for e, jets in zip(whole._evaluations, self.inputs))

    def _value_and_gradient(self, x: Tensor) -> tuple[float, Tensor]:
        return self.whole._from(self.first, self.last, self.inputs, self._parameters(x))

    def _hvp(self, x: Tensor, d: Tensor) -> Tensor:
        return self._restriction._hvp(x, d)


@dataclass(frozen=True)
class _Chunk:
    """Points that go through the layers together, with what does not depend on the parameters."""

    x: Tensor
    lift: Tensor | None  # (J, k)
    factor: Tensor | None  # (J, J, k)
    weight: float | Tensor


class Evaluation:
    """A term of a PINN at its points, chunk by chunk.

    Attributes:
        inputs: jets of the inputs, one a chunk.
    """

    def __init__(self, pinn: PINN, term: Term) -> None:
        x = term.points
        if x.ndim != 2 or x.shape[1] != pinn.network.inputs or not len(x):
            raise InputError("points of a PINN", f"shape {tuple(x.shape)}", f"(n > 0, {pinn.network.inputs})")
        if not bool(torch.isfinite(x).all()):
            raise InputError("points of a PINN", "entries that are not finite", "finite numbers")
        self.pinn, self.term, self.basis = pinn, term, JetBasis(pinn.names, tuple(term.derivatives))
        self.rows, width = len(self.basis), max(pinn.network.hidden)
        number = -(-len(x) // max(64, _TOGETHER // (self.rows * width)))
        self.chunks = [self._chunk(part) for part in torch.arange(len(x)).tensor_split(number)]
        self.inputs = [self.basis.of_inputs(chunk.x) for chunk in self.chunks]
        self._sweeps: dict[int, JetSweep] = {}

    def _chunk(self, indices: Tensor) -> _Chunk:
        term, pinn = self.term.subset(indices), self.pinn
        x = term.points.to(torch.float64)
        lift = None if pinn.lift is None else self.basis.of_function(pinn.lift, x)
        factor = None if pinn.factor is None else self.basis.of_function(pinn.factor, x)
        matrices = None if factor is None else self.basis.multiplication(factor)
        return _Chunk(x, lift, matrices, term.weight / len(self.term.points))

    def _sweep(self, chunk: _Chunk) -> JetSweep:
        """The arrays for so many points."""
        k = len(chunk.x)
        if k not in self._sweeps:
            self._sweeps[k] = JetSweep(self.pinn.network, self.basis, k)
        return self._sweeps[k]

    def _jets(self, chunk: _Chunk, net: Tensor) -> Tensor:
        """Of u from those of the network, (J, points)."""
        u = net.clone() if chunk.factor is None else (chunk.factor * net).sum(1)
        return u if chunk.lift is None else u + chunk.lift

    def _residual(self, u: Tensor, x: Tensor) -> Tensor:
        return self.term.residual(u[0], {name: u[row] for name, row in self.basis.rows.items()}, x)

    def residuals(self, layers: list[DenseLayer]) -> Tensor:
        """(points,)."""
        found = []
        for chunk, jets in zip(self.chunks, self.inputs):
            u = self._jets(chunk, self._sweep(chunk).forward(layers, jets))
            found.append(self._residual(u, chunk.x))
        return torch.cat(found)

    def value(self, layers: list[DenseLayer], inputs: list[Tensor], first: int) -> float:
        """The term from the jets before layer `first`."""
        total = 0.0
        for chunk, jets in zip(self.chunks, inputs):
            u = self._jets(chunk, self._sweep(chunk).forward(layers, jets, first))
            total += float((chunk.weight * self._residual(u, chunk.x).square()).sum())
        return total

    def add_gradient(
        self,
        layers: list[DenseLayer],
        inputs: list[Tensor],
        first: int,
        last: int,
        gradients: list[tuple[Tensor, Tensor]],
    ) -> float:
        """The term; its gradients by W and b of the layers `first` to `last` are added to `gradients`."""
        total = 0.0
        for chunk, jets in zip(self.chunks, inputs):
            sweep = self._sweep(chunk)
            u = self._jets(chunk, sweep.forward(layers, jets, first)).requires_grad_()
            with torch.enable_grad():
                loss = (chunk.weight * self._residual(u, chunk.x).square()).sum()
            (w,) = torch.autograd.grad(loss, u)
            w = w if chunk.factor is None else (chunk.factor * w[:, None]).sum(0)
            sweep.backward(layers[-1], w, gradients, last)
            total += float(loss.detach())
        return total

    def through(self, layers: list[DenseLayer], inputs: list[Tensor], first: int) -> list[Tensor]:
        """Jets behind some hidden layers, from those before them."""
        return [self._sweep(chunk).through(layers, jets, first).clone() for chunk, jets in zip(self.chunks, inputs)]

    def plain(self, chunk: _Chunk, inputs: Tensor, theta: Tensor) -> Tensor:
        """A chunk's part of the term, by operations that `torch.func` differentiates."""
        u = self._jets(chunk, self.pinn.network.jets(theta, self.basis, inputs))
        return (chunk.weight * self._residual(u, chunk.x).square()).sum()

    def forward_time(self, first: int, end: int) -> float:
        """Of some layers, in units of the model."""
        shapes = self.pinn.network.shapes[first:end]
        return len(self.term.points) * self.rows * sum(_PRODUCT * o * i + _ENTRY * o for o, i in shapes)

    def time(self, first: int, last: int) -> tuple[float, float]:
        """Of the value, and of the gradient by the layers `first` to `last`, from the jets before the first."""
        shapes, samples = self.pinn.network.shapes, len(self.term.points) * self.rows
        forward = self.forward_time(first, len(shapes))
        value = forward + 0.5 * samples * _RESIDUAL
        weights = samples * _WEIGHT * sum(o * i for o, i in shapes[first : last + 1])
        spared = samples * _PRODUCT * shapes[first][0] * shapes[first][1]  # no cotangent below the first layer
        return value, value + 0.5 * samples * _RESIDUAL + forward - spared + weights
