"""Terms of the loss of a physics-informed network: residuals in mean squares at points, chunk by chunk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

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
        weight: of the term, or of each point, (n,).

    Example:
        >>> wave = Term(points, lambda u, d, x: d["tt"] - d["xx"], ("tt", "xx"))
    """

    points: Tensor
    residual: Residual
    derivatives: tuple[str, ...] = ()
    weight: float | Tensor = 1.0

    def subset(self, indices: Tensor) -> Term:
        """The term at some of its points."""
        weight = self.weight[indices] if isinstance(self.weight, Tensor) else self.weight
        return replace(self, points=self.points[indices], weight=weight)


@dataclass(frozen=True)
class Ansatz:
    """u = lift(x) + factor(x) net(x; theta).

    Args:
        network: net.
        names: of the inputs, a letter each.
        lift, factor: of u; without them u is the network itself.
    """

    network: Network
    names: str
    lift: Field | None = None
    factor: Field | None = None


@dataclass(frozen=True)
class Chunk:
    """Points that go through the layers together, with what does not depend on the parameters.

    Attributes:
        x: (k, inputs).
        lift: its jets, (J, k).
        factor: matrices of the product rule, (J, J, k).
        weight: of the term, or of each point, over the points of the whole term.
    """

    x: Tensor
    lift: Tensor | None
    factor: Tensor | None
    weight: float | Tensor

    def jets(self, net: Tensor) -> Tensor:
        """Of u from those of the network, (J, k)."""
        u = net.clone() if self.factor is None else (self.factor * net).sum(1)
        return u if self.lift is None else u + self.lift


class TermAtPoints:
    """A term, its value and its gradient, chunk by chunk.

    Args:
        ansatz: for u.
        term: the term.

    Attributes:
        inputs: jets of the inputs, (J, inputs, k), one a chunk.
        columns: points times rows of their jets.

    Raises:
        InputError: no points, points of another dimension or not finite, or derivatives that do not exist.
    """

    def __init__(self, ansatz: Ansatz, term: Term) -> None:
        x, network = term.points, ansatz.network
        if x.ndim != 2 or x.shape[1] != network.inputs or not len(x):
            raise InputError("points of a PINN", f"shape {tuple(x.shape)}", f"(n > 0, {network.inputs})")
        if not bool(torch.isfinite(x).all()):
            raise InputError("points of a PINN", "entries that are not finite", "finite numbers")
        self.ansatz, self.term, self.basis = ansatz, term, JetBasis(ansatz.names, tuple(term.derivatives))
        self.columns = len(x) * len(self.basis)
        number = -(-len(x) // max(64, JETS_IN_CACHE // (len(self.basis) * max(network.hidden))))
        self.chunks = [self._chunk(part) for part in torch.arange(len(x)).tensor_split(number)]
        self.inputs = [self.basis.of_inputs(chunk.x) for chunk in self.chunks]
        self._sweeps: dict[int, JetSweep] = {}

    def _chunk(self, indices: Tensor) -> Chunk:
        term, ansatz = self.term.subset(indices), self.ansatz
        x = term.points.to(torch.float64)
        lift = None if ansatz.lift is None else self.basis.of_function(ansatz.lift, x)
        factor = None if ansatz.factor is None else self.basis.of_function(ansatz.factor, x)
        matrices = None if factor is None else self.basis.multiplication(factor)
        return Chunk(x, lift, matrices, term.weight / len(self.term.points))

    def _sweep(self, chunk: Chunk) -> JetSweep:
        """Arrays for as many points as the chunk has."""
        k = len(chunk.x)
        if k not in self._sweeps:
            self._sweeps[k] = JetSweep(self.ansatz.network, self.basis, k)
        return self._sweeps[k]

    def _residual(self, u: Tensor, x: Tensor) -> Tensor:
        return self.term.residual(u[0], {name: u[row] for name, row in self.basis.rows.items()}, x)

    def _sum_of_squares(self, chunk: Chunk, u: Tensor) -> Tensor:
        """A chunk's part of the term from the jets of u, (J, k)."""
        return (chunk.weight * self._residual(u, chunk.x).square()).sum()

    def residuals(self, layers: list[DenseLayer]) -> Tensor:
        """The residual at all points, (points,)."""
        found = []
        for chunk, jets in zip(self.chunks, self.inputs):
            u = chunk.jets(self._sweep(chunk).forward(layers, jets))
            found.append(self._residual(u, chunk.x))
        return torch.cat(found)

    def value(self, layers: list[DenseLayer], inputs: list[Tensor], first: int) -> float:
        """The term from the jets before layer `first`.

        Args:
            layers: from `first` to the closing one, with slopes in W and b.
            inputs: jets, one a chunk.
        """
        total = 0.0
        for chunk, jets in zip(self.chunks, inputs):
            u = chunk.jets(self._sweep(chunk).forward(layers, jets, first))
            total += float(self._sum_of_squares(chunk, u))
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
            u = chunk.jets(sweep.forward(layers, jets, first)).requires_grad_()
            with torch.enable_grad():
                loss = self._sum_of_squares(chunk, u)
            (w,) = torch.autograd.grad(loss, u)
            w = w if chunk.factor is None else (chunk.factor * w[:, None]).sum(0)
            sweep.backward(layers[-1], w, gradients, last)
            total += float(loss.detach())
        return total

    def through(self, layers: list[DenseLayer], inputs: list[Tensor], first: int) -> list[Tensor]:
        """Jets behind some hidden layers, from those before them."""
        return [self._sweep(chunk).through(layers, jets, first).clone() for chunk, jets in zip(self.chunks, inputs)]

    def plain(self, chunk: Chunk, inputs: Tensor, theta: Tensor) -> Tensor:
        """A chunk's part of the term, by operations that `torch.func` differentiates."""
        u = chunk.jets(self.ansatz.network.jets(theta, self.basis, inputs))
        return self._sum_of_squares(chunk, u)
