"""Terms of a PINN as rows of one sum of squares: values, gradients, Jacobians and products by sweeps of jets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.func import grad, jvp

from nn_adapters.pinn.costs import CallTimes
from nn_adapters.pinn.network import absorb_slopes
from nn_adapters.pinn.terms import Ansatz, Term, TermAtPoints
from pdeopt.functions.smooth import Costs, Tally
from pdeopt.squares.residual import ResidualFunction


class TermRows(ResidualFunction):
    """f = |r|^2 with a row sqrt(weight / points) residual for each point, term after term.

    Args:
        ansatz: for u.
        terms: of which the first one's points are the samples.
        costs: by default those of a fixed model of the time.
        tally: where calls are counted.

    Attributes:
        network: of the ansatz.
        evaluated: the terms at their points.
        times: model of the time.
    """

    def __init__(self, ansatz: Ansatz, terms: Sequence[Term], costs: Costs | None, tally: Tally | None) -> None:
        self.ansatz, self.network = ansatz, ansatz.network
        self.evaluated = [TermAtPoints(ansatz, term) for term in terms]
        points = [len(term.points) for term in terms]
        self.times = CallTimes(self.network, sum(term.columns for term in self.evaluated), sum(points))
        costs = costs or self.times.costs(0, self.network.depth)
        super().__init__(self.network.size, sum(points), points[0], costs, tally)

    def _value(self, x: Tensor) -> float:
        return self.value_from(0, [term.inputs for term in self.evaluated], x)

    def _value_and_gradient(self, x: Tensor) -> tuple[float, Tensor]:
        return self.gradient_from(0, self.network.depth, [term.inputs for term in self.evaluated], x)

    def value_from(self, first: int, inputs: list[list[Tensor]], theta: Tensor) -> float:
        """f from the jets before layer `first`.

        Args:
            inputs: jets, a list for each term.
            theta: parameters from layer `first` on.
        """
        layers = absorb_slopes(self.network.layers(theta, first))
        rows = [term.rows(layers, jets, first) for term, jets in zip(self.evaluated, inputs)]
        return sum(float(r @ r) for r in rows)

    def gradient_from(self, first: int, last: int, inputs: list[list[Tensor]], theta: Tensor) -> tuple[float, Tensor]:
        """f, and its gradient by the layers `first` to `last`, from the jets before the first.

        Args:
            inputs: jets, a list for each term.
            theta: parameters from layer `first` on.
        """
        raw = self.network.layers(theta, first)
        layers = absorb_slopes(raw)
        sums = [(torch.zeros_like(layer.W), torch.zeros_like(layer.b)) for layer in layers[: last - first + 1]]
        value = sum(t.add_gradient(layers, jets, first, last, sums) for t, jets in zip(self.evaluated, inputs))
        return value, self.network.flat_gradient(raw, sums)

    def _pieces(self, rows: Tensor | None) -> list[tuple[TermAtPoints, Tensor | slice]]:
        """The terms at the points of some rows, or of all, with the places of their rows among them."""
        found: list[tuple[TermAtPoints, Tensor | slice]] = []
        end = 0
        for term in self.evaluated:
            begin, end = end, end + len(term.term.points)
            if rows is None:
                found.append((term, slice(begin, end)))
            elif len(places := ((begin <= rows) & (rows < end)).nonzero()[:, 0]):
                own = term.term.subset(rows[places] - begin)
                own = replace(own, weight=own.weight * (len(places) / (end - begin)))
                found.append((TermAtPoints(self.ansatz, own), places))
        return found

    def _residual(self, x: Tensor, rows: Tensor | None = None) -> Tensor:
        layers, r = absorb_slopes(self.network.layers(x)), x.new_empty(self._count(rows))
        for term, places in self._pieces(rows):
            r[places] = term.rows(layers, term.inputs)
        return r

    def _linearize(self, x: Tensor, rows: Tensor | None = None, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        raw = self.network.layers(x)
        layers, shape = absorb_slopes(raw), (self._count(rows), self.size)
        r, J = x.new_empty(shape[0]), x.new_empty(shape) if out is None or out.shape != shape else out
        for term, places in self._pieces(rows):
            if isinstance(places, slice):
                term.jacobian(raw, layers, r[places], J[places])
            else:
                own = x.new_empty(len(places)), x.new_empty(len(places), self.size)
                term.jacobian(raw, layers, *own)
                r[places], J[places] = own
        return r, J

    def _jvp(self, x: Tensor, d: Tensor, rows: Tensor | None = None) -> Tensor:
        raw, found = self.network.layers(x), x.new_empty(self._count(rows))
        layers, directions = absorb_slopes(raw), self.network.directions(raw, d)
        for term, places in self._pieces(rows):
            found[places] = term.tangent(layers, directions)
        return found

    def _vjp(self, x: Tensor, w: Tensor, rows: Tensor | None = None) -> Tensor:
        raw = self.network.layers(x)
        layers, last = absorb_slopes(raw), self.network.depth
        sums = [(torch.zeros_like(layer.W), torch.zeros_like(layer.b)) for layer in layers]
        for term, places in self._pieces(rows):
            term.add_gradient(layers, term.inputs, 0, last, sums, w[places])
        return self.network.flat_gradient(raw, sums)

    def _hvp(self, x: Tensor, d: Tensor) -> Tensor:
        total = torch.zeros_like(x)
        for term in self.evaluated:
            for chunk, inputs in zip(term.chunks, term.inputs):
                total += jvp(grad(partial(term.plain, chunk, inputs)), (x,), (d,))[1]
        return total
