"""Terms of the loss of a physics-informed network: residuals in mean squares at points, chunk by chunk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nn_adapters.pinn.features import Features
from nn_adapters.pinn.jets import JetBasis
from nn_adapters.pinn.network import DenseLayer, JetSweep, Network
from pdeopt.core.errors import InputError

#: u, (points,), its derivatives by name, (points,) each, and x, (points, inputs) -> residual, (points,).
Residual = Callable[[Tensor, dict[str, Tensor], Tensor], Tensor]

#: x, (points, inputs) -> (points,); its rows do not interact.
Field = Callable[[Tensor], Tensor]

#: Entries of a jet times width that go through the layers together: about what a cache holds.
JETS_IN_CACHE = 80_000


@dataclass(frozen=True)
class Term:
    """weight * mean of residual(u, d, x)^2 over points: an equation, or values on a boundary.

    Args:
        points: x, (n, inputs), double precision.
        residual: (u, d, x) -> (n,), made of torch operations. u is (n,); d holds the derivatives by name, (n,) each,
            `d["x"]` and `d["xx"]`; rows do not interact.
        derivatives: names of those that the residual takes, such as ("x", "t", "xx"), in the letters of the PINN.
        weight: of the term, or of each point, (n,), >= 0.
        draw: (n, seed) -> new points, (n, inputs), independent and uniform, where a method asks for some; without it
            they are chosen among `points`.

    Example:
        >>> wave = Term(points, lambda u, d, x: d["tt"] - d["xx"], ("tt", "xx"))
    """

    points: Tensor
    residual: Residual
    derivatives: tuple[str, ...] = ()
    weight: float | Tensor = 1.0
    draw: Callable[[int, int], Tensor] | None = None

    def subset(self, indices: Tensor) -> Term:
        """The term at some of its points."""
        weight = self.weight[indices] if isinstance(self.weight, Tensor) else self.weight
        return replace(self, points=self.points[indices], weight=weight)


@dataclass(frozen=True)
class Ansatz:
    """u = lift(x) + factor(x) net(features(x); theta).

    Args:
        network: net.
        names: of the inputs x, a letter each.
        lift, factor: of u; without them u is the network itself.
        features: what the network takes in; without them x itself.
    """

    network: Network
    names: str
    lift: Field | None = None
    factor: Field | None = None
    features: Features | None = None


@dataclass(frozen=True)
class Chunk:
    """Points that go through the layers together, with what does not depend on the parameters.

    Attributes:
        x: (k, inputs).
        lift: its jets, (J, k).
        factor: matrices of the product rule, (J, J, k).
        root: of the weight of the term, or of each point, over the points of the whole term: of a row of residuals.
    """

    x: Tensor
    lift: Tensor | None
    factor: Tensor | None
    root: Tensor

    def jets(self, net: Tensor) -> Tensor:
        """Of u from those of the network, (J, k)."""
        u = net.clone() if self.factor is None else (self.factor * net).sum(1)
        return u if self.lift is None else u + self.lift

    def tangent(self, net: Tensor) -> Tensor:
        """The change of the jets of u for that of the network's, (J, k)."""
        return net if self.factor is None else (self.factor * net).sum(1)

    def cotangent(self, u: Tensor) -> Tensor:
        """That of the jets of the network for that of the jets of u, (J, k)."""
        return u if self.factor is None else (self.factor * u[:, None]).sum(0)


class TermAtPoints:
    """A term at its points: rows of residuals r, with sum r^2 the term, and their derivatives, chunk by chunk.

    Args:
        ansatz: for u.
        term: the term.

    Attributes:
        inputs: jets of what the network takes in, (J, k, points), one a chunk.
        columns: points times rows of their jets.

    Raises:
        InputError: no points, points of another dimension or not finite, weights below 0, or derivatives that do not
            exist.
    """

    def __init__(self, ansatz: Ansatz, term: Term) -> None:
        x, network = term.points, ansatz.network
        if x.ndim != 2 or x.shape[1] != len(ansatz.names) or not len(x):
            raise InputError("points of a PINN", f"shape {tuple(x.shape)}", f"(n > 0, {len(ansatz.names)})")
        if not bool(torch.isfinite(x).all()):
            raise InputError("points of a PINN", "entries that are not finite", "finite numbers")
        if not bool((torch.as_tensor(term.weight) >= 0).all()):
            raise InputError("weight of a term", "one that is not >= 0", "numbers >= 0")
        self.ansatz, self.term, self.basis = ansatz, term, JetBasis(ansatz.names, tuple(term.derivatives))
        self.columns = len(x) * len(self.basis)
        number = -(-len(x) // max(64, JETS_IN_CACHE // (len(self.basis) * max(network.hidden))))
        self.chunks, self.inputs = self._cut(x.to(torch.float64), number)
        self._sweeps: dict[int, JetSweep] = {}

    def _cut(self, x: Tensor, number: int) -> tuple[list[Chunk], list[Tensor]]:
        """What does not depend on the parameters, found at all points at once, in chunks of about equal size."""
        ansatz, basis = self.ansatz, self.basis
        lift = None if ansatz.lift is None else basis.of_function(ansatz.lift, x)
        factor = None if ansatz.factor is None else basis.multiplication(basis.of_function(ansatz.factor, x))
        weight = torch.as_tensor(self.term.weight, dtype=torch.float64)
        root = (weight / len(x)).sqrt().expand(len(x))
        parts = [slice(int(part[0]), int(part[-1]) + 1) for part in torch.arange(len(x)).tensor_split(number)]

        def of(jets: Tensor | None, part: slice) -> Tensor | None:
            return None if jets is None else jets[..., part].contiguous()

        chunks = [Chunk(x[part], of(lift, part), of(factor, part), root[part]) for part in parts]
        inputs = basis.of_inputs(x, ansatz.features)
        return chunks, [inputs[..., part].contiguous() for part in parts]

    def _sweep(self, chunk: Chunk) -> JetSweep:
        """Arrays for as many points as the chunk has."""
        k = len(chunk.x)
        if k not in self._sweeps:
            self._sweeps[k] = JetSweep(self.ansatz.network, self.basis, k)
        return self._sweeps[k]

    def _residual(self, u: Tensor, x: Tensor) -> Tensor:
        return self.term.residual(u[0], {name: u[row] for name, row in self.basis.rows.items()}, x)

    def _rows(self, chunk: Chunk, u: Tensor) -> Tensor:
        """A chunk's rows from the jets of u, (J, k)."""
        return chunk.root * self._residual(u, chunk.x)

    def jets(self, layers: list[DenseLayer]) -> tuple[Tensor, Tensor]:
        """The residual, (points,), and the jets of u, (J, points), at all points."""
        u = [chunk.jets(self._sweep(chunk).forward(layers, jets)) for chunk, jets in zip(self.chunks, self.inputs)]
        return torch.cat([self._residual(own, chunk.x) for own, chunk in zip(u, self.chunks)]), torch.cat(u, 1)

    def residuals(self, layers: list[DenseLayer]) -> Tensor:
        """The residual at all points, (points,)."""
        return self.jets(layers)[0]

    def rows(self, layers: list[DenseLayer], inputs: list[Tensor], first: int = 0) -> Tensor:
        """r, (points,), from the jets before layer `first`.

        Args:
            layers: from `first` to the closing one, with slopes in W and b.
            inputs: jets, one a chunk.
        """
        found = []
        for chunk, jets in zip(self.chunks, inputs):
            u = chunk.jets(self._sweep(chunk).forward(layers, jets, first))
            found.append(self._rows(chunk, u))
        return torch.cat(found)

    def add_gradient(
        self,
        layers: list[DenseLayer],
        inputs: list[Tensor],
        first: int,
        last: int,
        gradients: list[tuple[Tensor, Tensor]],
        weights: Tensor | None = None,
    ) -> float:
        """The sum of r^2, or w.r; its gradients by W and b of the layers `first` to `last` are added to `gradients`.

        Args:
            layers, inputs, first: as for `rows`.
            weights: w, (points,).
        """
        total, place = 0.0, 0
        for chunk, jets in zip(self.chunks, inputs):
            sweep, own = self._sweep(chunk), slice(place, place := place + len(chunk.x))
            u = chunk.jets(sweep.forward(layers, jets, first)).requires_grad_()
            with torch.enable_grad():
                r = self._rows(chunk, u)
                value = r.square().sum() if weights is None else r @ weights[own]
            (w,) = torch.autograd.grad(value, u)
            sweep.backward(layers[-1], chunk.cotangent(w), gradients, last)
            total += float(value.detach())
        return total

    def jacobian(self, raw: list[DenseLayer], layers: list[DenseLayer], r: Tensor, rows: Tensor) -> None:
        """Write r, (points,), and r', (points, network.size).

        Args:
            raw, layers: all, with their slopes, and with slopes in W and b.
        """
        place = 0
        for chunk, jets in zip(self.chunks, self.inputs):
            sweep, own = self._sweep(chunk), slice(place, place := place + len(chunk.x))
            u = chunk.jets(sweep.forward(layers, jets)).requires_grad_()
            with torch.enable_grad():
                values = self._rows(chunk, u)
            (w,) = torch.autograd.grad(values.sum(), u)
            sweep.jacobian(raw, chunk.cotangent(w), rows[own])
            r[own] = values.detach()

    def tangent(self, layers: list[DenseLayer], directions: list[DenseLayer]) -> Tensor:
        """The derivative of r, (points,), along a direction.

        Args:
            layers, directions: as for `JetSweep.tangent`.
        """
        found = []
        for chunk, jets in zip(self.chunks, self.inputs):
            sweep = self._sweep(chunk)
            u = chunk.jets(sweep.forward(layers, jets)).requires_grad_()
            with torch.enable_grad():
                r = self._rows(chunk, u)
            (w,) = torch.autograd.grad(r.sum(), u)
            found.append((w * chunk.tangent(sweep.tangent(layers, directions))).sum(0))
        return torch.cat(found)

    def through(self, layers: list[DenseLayer], inputs: list[Tensor], first: int) -> list[Tensor]:
        """Jets behind some hidden layers, from those before them."""
        return [self._sweep(chunk).through(layers, jets, first).clone() for chunk, jets in zip(self.chunks, inputs)]

    def plain(self, chunk: Chunk, inputs: Tensor, theta: Tensor) -> Tensor:
        """A chunk's part of the term, by operations that `torch.func` differentiates."""
        u = chunk.jets(self.ansatz.network.jets(theta, self.basis, inputs))
        return self._rows(chunk, u).square().sum()
