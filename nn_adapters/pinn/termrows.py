"""Terms of a PINN as rows of one sum of squares: values, gradients, Jacobians and products by sweeps of jets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.func import grad, jvp

from nn_adapters.pinn.costs import CallTimes
from nn_adapters.pinn.device import across, home
from nn_adapters.pinn.network import DenseLayer, absorb_slopes
from nn_adapters.pinn.terms import Ansatz, Term, TermAtPoints
from pdeopt.functions.smooth import Costs, Tally
from pdeopt.squares.residual import ResidualFunction


class TermRows(ResidualFunction):
    """f = |r|^2 with rows sqrt(weight / points) residual, one for each point and equation, term after term.

    Unknowns come from the host, and what is found goes there; all between is on the device of the ansatz. Jacobians
    stay on it: they are large, and methods take products of them.

    Args:
        ansatz: for u.
        terms: of which the first one's points are the samples.
        costs: by default those of a fixed model of the time.
        tally: where calls are counted.
        factors: by which the weights of the terms are multiplied; 1 by default.

    Attributes:
        network: of the ansatz.
        evaluated: the terms at their points.
        times: model of the time.
        device: where terms are evaluated.
    """

    def __init__(
        self,
        ansatz: Ansatz,
        terms: Sequence[Term],
        costs: Costs | None,
        tally: Tally | None,
        factors: Sequence[float] = (),
    ) -> None:
        self.ansatz, self.network = ansatz, ansatz.network
        self.factors = tuple(factors) or (1.0,) * len(terms)
        weighted = [replace(term, weight=by * term.weight) for by, term in zip(self.factors, terms)]
        self.evaluated = [TermAtPoints(ansatz, term) for term in weighted]
        rows = sum(term.count for term in self.evaluated)
        self.times = CallTimes(self.network, sum(term.columns for term in self.evaluated), rows)
        costs = costs or self.times.costs(0, self.network.depth)
        size = self.network.size + len(ansatz.coefficients)
        self.device = ansatz.device
        self._known: tuple[Tensor, list[tuple[TermAtPoints, Tensor | slice, Tensor | None]]] | None = None
        super().__init__(size, rows, len(terms[0].points), costs, tally)

    def split(self, theta: Tensor, first: int = 0) -> tuple[list[DenseLayer], Tensor]:
        """The layers from `first` on, with their slopes, and the coefficients, (number,), in theta, which ends so.

        Here theta goes to the device.
        """
        end, there = len(theta) - len(self.ansatz.coefficients), across(theta, self.device)
        return self.network.layers(theta[:end], first, there[:end]), there[end:]

    def _value(self, x: Tensor) -> float:
        return self.value_from(0, [term.inputs for term in self.evaluated], x)

    def _value_and_gradient(self, x: Tensor) -> tuple[float, Tensor]:
        return self.gradient_from(0, self.network.depth, [term.inputs for term in self.evaluated], x)

    def value_from(self, first: int, inputs: list[list[Tensor]], theta: Tensor) -> float:
        """f from the jets before layer `first`.

        Args:
            inputs: jets, a list for each term.
            theta: parameters from layer `first` on, then the coefficients.
        """
        raw, c = self.split(theta, first)
        layers = absorb_slopes(raw)
        rows = [term.rows(layers, c, jets, first) for term, jets in zip(self.evaluated, inputs)]
        return float(home(sum((r @ r for r in rows), c.new_zeros(()))))

    def gradient_from(self, first: int, last: int, inputs: list[list[Tensor]], theta: Tensor) -> tuple[float, Tensor]:
        """f, and its gradient by the layers `first` to `last`, from the jets before the first; to the last by all.

        Args:
            inputs: jets, a list for each term.
            theta: parameters from layer `first` on, then the coefficients.
        """
        found = home(self.gradient_there((first, last), inputs, *self.split(theta, first)))
        return float(found[-1]), found[:-1]

    def gradient_there(
        self, span: tuple[int, int], inputs: list[list[Tensor]], raw: list[DenseLayer], c: Tensor
    ) -> Tensor:
        """The gradient by some layers, to the last by all, and behind it f, on the device, which is not waited for.

        Args:
            span: first and last of the layers; `inputs` are the jets before the first, a list for each term.
            raw, c: as from `split`.
        """
        (first, last), layers, by_c, value = span, absorb_slopes(raw), torch.zeros_like(c), c.new_zeros(1)
        sums = [(torch.zeros_like(layer.W), torch.zeros_like(layer.b)) for layer in layers[: last - first + 1]]
        for term, jets in zip(self.evaluated, inputs):
            value += term.add_gradient(layers, c, jets, span, sums, by_c)
        own = [by_c] if last == self.network.depth else []
        return torch.cat([self.network.flat_gradient(raw, sums), *own, value])

    def _pieces(self, rows: Tensor | None) -> list[tuple[TermAtPoints, Tensor | slice, Tensor | None]]:
        """The terms at the points of some rows, or of all; the places of their rows among them; which of a point's.

        Those of the rows that were asked for last are kept.
        """
        if rows is not None and self._known is not None and self._known[0] is rows:
            return self._known[1]
        found: list[tuple[TermAtPoints, Tensor | slice, Tensor | None]] = []
        end = 0
        for term in self.evaluated:
            begin, end = end, end + term.count
            if rows is None:
                found.append((term, slice(begin, end), None))
            elif len(places := ((begin <= rows) & (rows < end)).nonzero()[:, 0]):
                wanted, each = rows[places] - begin, term.equations
                own = term.term.subset(wanted // each)
                own = replace(own, weight=own.weight * (len(places) / len(term.term.points)))
                chosen = across(_chosen(wanted, each), self.device)
                found.append((TermAtPoints(self.ansatz, own), across(places, self.device), chosen))
        self._known = self._known if rows is None else (rows, found)
        return found

    def _residual(self, x: Tensor, rows: Tensor | None = None) -> Tensor:
        raw, c = self.split(x)
        layers, r = absorb_slopes(raw), c.new_empty(self._count(rows))
        for term, places, which in self._pieces(rows):
            found = term.rows(layers, c, term.inputs)
            r[places] = found if which is None else found[which]
        return home(r)

    def _linearize(self, x: Tensor, rows: Tensor | None = None, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        shape = (self._count(rows), self.size)
        fits = out is not None and out.shape == shape and out.device == self.device
        J = out if fits else torch.empty(shape, dtype=x.dtype, device=self.device)
        return self._write(x, J, 0, rows), J

    def _columns(self, x: Tensor, begin: int, out: Tensor) -> None:
        J = out if out.device == self.device else torch.empty_like(out, device=self.device)
        self._write(x, J, begin, None)
        if J is not out:
            out.copy_(J)

    def _write(self, x: Tensor, J: Tensor, begin: int, rows: Tensor | None) -> Tensor:
        """r; the columns of J from `begin` on are written."""
        raw, c = self.split(x)
        layers, r = absorb_slopes(raw), c.new_empty(len(J))
        for term, places, which in self._pieces(rows):
            if isinstance(places, slice):
                term.jacobian(raw, layers, c, r[places], J[places], begin)
            else:
                own_r, own_J = c.new_empty(term.count), J.new_empty(term.count, J.shape[1])
                term.jacobian(raw, layers, c, own_r, own_J, begin)
                r[places], J[places] = own_r[which], own_J[which]
        return home(r)

    def _jvp(self, x: Tensor, d: Tensor, rows: Tensor | None = None) -> Tensor:
        (raw, c), there, end = self.split(x), across(d, self.device), self.network.size
        layers, directions = absorb_slopes(raw), self.network.directions(raw, d[:end], there[:end])
        found = c.new_empty(self._count(rows))
        for term, places, which in self._pieces(rows):
            own = term.tangent(layers, c, directions, there[end:])
            found[places] = own if which is None else own[which]
        return home(found)

    def _vjp(self, x: Tensor, w: Tensor, rows: Tensor | None = None) -> Tensor:
        (raw, c), w = self.split(x), across(w, self.device)
        layers, span, by_c = absorb_slopes(raw), (0, self.network.depth), torch.zeros_like(c)
        sums = [(torch.zeros_like(layer.W), torch.zeros_like(layer.b)) for layer in layers]
        for term, places, which in self._pieces(rows):
            own = w[places]
            if which is not None:
                own = w.new_zeros(term.count).index_copy(0, which, own)
            term.add_gradient(layers, c, term.inputs, span, sums, by_c, own)
        return home(torch.cat([self.network.flat_gradient(raw, sums), by_c]))

    def _hvp(self, x: Tensor, d: Tensor) -> Tensor:
        x, d = across(x, self.device), across(d, self.device)
        total = torch.zeros_like(x)
        for term in self.evaluated:
            for chunk, inputs in zip(term.chunks, term.inputs):
                total += jvp(grad(partial(term.plain, chunk, inputs)), (x,), (d,))[1]
        return home(total)


def _chosen(wanted: Tensor, each: int) -> Tensor:
    """Of the rows of as many points as there are wanted rows, `each` a point, the wanted one of each point."""
    return each * torch.arange(len(wanted)) + wanted % each
