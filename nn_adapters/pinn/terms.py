"""Terms of the loss of a physics-informed network: residuals in mean squares at points, chunk by chunk."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from nn_adapters.pinn.device import HOST, home
from nn_adapters.pinn.features import Features
from nn_adapters.pinn.jets import JetBasis
from nn_adapters.pinn.network import DenseLayer, JetSweep, Network
from pdeopt.core.errors import InputError

#: u, its derivatives and other numbers by name, and x, (points, inputs) -> residual, (points,), or several of these.
#: u is (points,) or, of several fields, (fields, points).
Residual = Callable[[Tensor, dict[str, Tensor], Tensor], Tensor | Sequence[Tensor]]

#: x, (points, inputs) -> (points,), or (points, fields); its rows do not interact.
Field = Callable[[Tensor], Tensor]

#: Entries of a jet times width that go through the layers together: about what a cache holds; on a device, where calls
#: are what takes time, so many that a layer's arrays have a third of a gigabyte.
JETS_IN_CACHE, JETS_ON_DEVICE = 80_000, 2**24


@dataclass(frozen=True)
class Term:
    """weight * mean of residual(u, d, x)^2 over points: equations, values on a boundary, or measurements.

    Args:
        points: x, (n, inputs), double precision; on any device, as all that is given at them.
        residual: (u, d, x) -> (n,), or several of these, one an equation; made of torch operations. u is (n,), and d
            holds by name, (n,) each, the derivatives, `d["x"]` and `d["xx"]`, the unknown coefficients of the PINN, and
            what is `given`. Of several fields u and the derivatives are (fields, n). Rows do not interact.
        derivatives: names of those that the residual takes, such as ("x", "t", "xx"), in the letters of the PINN.
        weight: of the term, or of each point, (n,), >= 0.
        draw: (n, seed) -> new points, (n, inputs), independent and uniform, where a method asks for some; without it
            they are chosen among `points`.
        given: numbers at the points by name, such as measurements, (n,) each.

    Example:
        >>> wave = Term(points, lambda u, d, x: d["tt"] - d["xx"], ("tt", "xx"))
        >>> measured = Term(places, lambda u, d, x: u - d["seen"], given={"seen": values})
    """

    points: Tensor
    residual: Residual
    derivatives: tuple[str, ...] = ()
    weight: float | Tensor = 1.0
    draw: Callable[[int, int], Tensor] | None = None
    given: Mapping[str, Tensor] = field(default_factory=dict)

    def subset(self, indices: Tensor) -> Term:
        """The term at some of its points."""
        weight = self.weight[indices] if isinstance(self.weight, Tensor) else self.weight
        given = {name: values[indices] for name, values in self.given.items()}
        return replace(self, points=self.points[indices], weight=weight, given=given)

    @property
    def at_home(self) -> Term:
        """The term with all its numbers on the host."""
        weight = home(self.weight) if isinstance(self.weight, Tensor) else self.weight
        given = {name: home(values) for name, values in self.given.items()}
        return replace(self, points=home(self.points), weight=weight, given=given)


@dataclass(frozen=True)
class Ansatz:
    """u = lift(x) + factor(x) net(features(x); theta).

    Args:
        network: net.
        names: of the inputs x, a letter each.
        lift, factor: of u; without them u is the network itself.
        features: what the network takes in; without them x itself.
        coefficients: unknown numbers of the equations by name, with their first values.
        device: on which it is evaluated.
    """

    network: Network
    names: str
    lift: Field | None = None
    factor: Field | None = None
    features: Features | None = None
    coefficients: Mapping[str, float] = field(default_factory=dict)
    device: torch.device = HOST


@dataclass(frozen=True)
class Chunk:
    """Points that go through the layers together, with what does not depend on the parameters.

    Attributes:
        x: (k, inputs).
        lift: its jets, (J, fields or 1, k).
        factor: matrices of the product rule, (J, J, fields or 1, k).
        root: of the weight of the term, or of each point, over the points of the whole term: of a row of residuals.
        given: numbers of the term by name, (k,) each.
    """

    x: Tensor
    lift: Tensor | None
    factor: Tensor | None
    root: Tensor
    given: dict[str, Tensor]

    def jets(self, net: Tensor) -> Tensor:
        """Of u from those of the network, (J, fields, k)."""
        u = net.clone() if self.factor is None else (self.factor * net).sum(1)
        return u if self.lift is None else u + self.lift

    def tangent(self, net: Tensor) -> Tensor:
        """The change of the jets of u for that of the network's, (J, fields, k)."""
        return net if self.factor is None else (self.factor * net).sum(1)

    def cotangent(self, u: Tensor) -> Tensor:
        """That of the jets of the network for that of the jets of u, (J, fields, k)."""
        return u if self.factor is None else (self.factor * u[:, None]).sum(0)


class TermAtPoints:
    """A term at its points: rows of residuals r, with sum r^2 the term, and their derivatives, chunk by chunk.

    All of it is on the device of the ansatz, layers and vectors of its methods too.

    Args:
        ansatz: for u.
        term: the term.

    Attributes:
        inputs: jets of what the network takes in, (J, k, points), one a chunk.
        columns: points times rows of their jets.
        equations: of the residual.
        count: rows, points times equations, point after point.

    Raises:
        InputError: no points, points of another dimension or not finite, weights below 0, derivatives that do not
            exist, numbers for other points, a lift or factor of another shape, or a residual that is not one number a
            point.
    """

    def __init__(self, ansatz: Ansatz, term: Term) -> None:
        x, network = term.points, ansatz.network
        if x.ndim != 2 or x.shape[1] != len(ansatz.names) or not len(x):
            raise InputError("points of a PINN", f"shape {tuple(x.shape)}", f"(n > 0, {len(ansatz.names)})")
        if not bool(torch.isfinite(x).all()):
            raise InputError("points of a PINN", "entries that are not finite", "finite numbers")
        if not bool((torch.as_tensor(term.weight) >= 0).all()):
            raise InputError("weight of a term", "one that is not >= 0", "numbers >= 0")
        for name, values in term.given.items():
            if values.shape != (len(x),):
                raise InputError(f"{name} at the points of a term", f"shape {tuple(values.shape)}", f"({len(x)},)")
        self.ansatz, self.term, self.basis = ansatz, term, JetBasis(ansatz.names, tuple(term.derivatives))
        self.columns = len(x) * len(self.basis)
        together = JETS_IN_CACHE if ansatz.device.type == "cpu" else JETS_ON_DEVICE
        number = -(-len(x) // max(64, together // (len(self.basis) * max(network.hidden))))
        self.chunks, self.inputs = self._cut(x.to(ansatz.device, torch.float64), number)
        self._sweeps: dict[int, JetSweep] = {}
        self.equations = self._count_equations()
        self.count = len(x) * self.equations

    def _count_equations(self) -> int:
        """By a call at the first points."""
        chunk, ansatz = self.chunks[0], self.ansatz
        n = min(2, len(chunk.x))
        u = chunk.x.new_ones(len(self.basis), ansatz.network.outputs, n)
        first = replace(chunk, x=chunk.x[:n], given={name: values[:n] for name, values in chunk.given.items()})
        return len(self._residual(first, u, chunk.x.new_ones(len(ansatz.coefficients), n)))

    def _cut(self, x: Tensor, number: int) -> tuple[list[Chunk], list[Tensor]]:
        """What does not depend on the parameters, found at all points at once, in chunks of about equal size."""
        ansatz, basis = self.ansatz, self.basis
        lift = None if ansatz.lift is None else self._by_fields("lift", ansatz.lift, x)
        factor = None
        if ansatz.factor is not None:
            factor = basis.multiplication(self._by_fields("factor", ansatz.factor, x))
        weight = torch.as_tensor(self.term.weight, dtype=torch.float64)
        root = (weight / len(x)).sqrt().to(ansatz.device).expand(len(x))
        parts = [slice(int(part[0]), int(part[-1]) + 1) for part in torch.arange(len(x)).tensor_split(number)]

        def of(jets: Tensor | None, part: slice) -> Tensor | None:
            return None if jets is None else jets[..., part].contiguous()

        given = {name: values.to(ansatz.device, torch.float64) for name, values in self.term.given.items()}
        chunks = [
            Chunk(x[p], of(lift, p), of(factor, p), root[p], {name: values[p] for name, values in given.items()})
            for p in parts
        ]
        inputs = basis.of_inputs(x, ansatz.features)
        _require_finite("features", inputs, x)
        return chunks, [inputs[..., part].contiguous() for part in parts]

    def _by_fields(self, what: str, function: Field, x: Tensor) -> Tensor:
        """The jets of lift or factor, (J, fields or 1, points)."""
        jets, fields = self.basis.of_function(function, x), self.ansatz.network.outputs
        jets = jets[:, None] if jets.ndim == 2 else jets.transpose(1, 2)
        if jets.shape[1] not in (1, fields) or jets.shape[2] != len(x):
            shape = tuple(jets.transpose(1, 2).shape[1:])
            raise InputError(what, f"shape {shape}", f"({len(x)},) | ({len(x)}, {fields})")
        _require_finite(what, jets, x)
        return jets

    def _sweep(self, chunk: Chunk) -> JetSweep:
        """Arrays for as many points as the chunk has."""
        k = len(chunk.x)
        if k not in self._sweeps:
            self._sweeps[k] = JetSweep(self.ansatz.network, self.basis, k, self.ansatz.device)
        return self._sweeps[k]

    def _residual(self, chunk: Chunk, u: Tensor, c: Tensor) -> Tensor:
        """(equations, k) from the jets of u, (J, fields, k), and the coefficients at each point, (number, k)."""
        named = {name: u[row] if u.shape[1] > 1 else u[row, 0] for name, row in self.basis.rows.items()}
        d = named | dict(zip(self.ansatz.coefficients, c)) | chunk.given
        found = self.term.residual(named[""], d, chunk.x)
        found = found if isinstance(found, Tensor) and found.ndim == 2 else _stacked(found)
        if found.shape[1:] != (len(chunk.x),):
            n = len(chunk.x)
            raise InputError("residual of a term", f"shape {tuple(found.shape)}", f"({n},) at {n} points, or several")
        return found

    def _rows(self, chunk: Chunk, u: Tensor, c: Tensor) -> Tensor:
        """A chunk's rows, (k, equations), from the jets of u and the coefficients, (number,) or (number, k)."""
        c = c if c.ndim == 2 else c[:, None].expand(-1, len(chunk.x))
        return (chunk.root * self._residual(chunk, u, c)).T

    def _recorded(
        self, chunk: Chunk, layers: list[DenseLayer], jets: Tensor, c: Tensor, first: int = 0
    ) -> tuple[Tensor, list[Tensor]]:
        """A chunk's rows, (k, equations), and what autograd knows they come from: jets of u, coefficients."""
        u = chunk.jets(self._sweep(chunk).forward(layers, jets, first)).requires_grad_()
        at_points = c[:, None].repeat(1, len(chunk.x)).requires_grad_()
        with torch.enable_grad():
            return self._rows(chunk, u, at_points), [u, at_points]

    def jets(self, layers: list[DenseLayer], c: Tensor) -> tuple[Tensor, Tensor]:
        """The residual, (equations, points), and the jets of u, (J, fields, points), at all points.

        Args:
            c: coefficients, (number,).
        """
        u = [chunk.jets(self._sweep(chunk).forward(layers, jets)) for chunk, jets in zip(self.chunks, self.inputs)]
        r = [self._residual(chunk, v, c[:, None].expand(-1, len(chunk.x))) for v, chunk in zip(u, self.chunks)]
        return torch.cat(r, 1), torch.cat(u, 2)

    def rows(self, layers: list[DenseLayer], c: Tensor, inputs: list[Tensor], first: int = 0) -> Tensor:
        """r, (count,), from the jets before layer `first`.

        Args:
            layers: from `first` to the closing one, with slopes in W and b.
            c: coefficients, (number,).
            inputs: jets, one a chunk.
        """
        found = []
        for chunk, jets in zip(self.chunks, inputs):
            u = chunk.jets(self._sweep(chunk).forward(layers, jets, first))
            found.append(self._rows(chunk, u, c).flatten())
        return torch.cat(found)

    def add_gradient(
        self,
        layers: list[DenseLayer],
        c: Tensor,
        inputs: list[Tensor],
        span: tuple[int, int],
        gradients: list[tuple[Tensor, Tensor]],
        by_c: Tensor,
        weights: Tensor | None = None,
    ) -> Tensor:
        """The sum of r^2, or w.r, (); its gradients by W and b of some layers, and by c, are added to those given.

        Args:
            layers, c, inputs: as for `rows`.
            span: first and last of the layers; `inputs` are the jets before the first.
            gradients, by_c: to which it is added.
            weights: w, (count,).
        """
        total, place, (first, last) = c.new_zeros(()), 0, span
        for chunk, jets in zip(self.chunks, inputs):
            own = slice(place, place := place + self.equations * len(chunk.x))
            r, known = self._recorded(chunk, layers, jets, c, first)
            with torch.enable_grad():
                value = r.square().sum() if weights is None else r.flatten() @ weights[own]
            w, w_c = _gradients(value, known)
            self._sweep(chunk).backward(layers[-1], chunk.cotangent(w), gradients, last)
            by_c += w_c.sum(1)
            total += value.detach()
        return total

    def jacobian(
        self, raw: list[DenseLayer], layers: list[DenseLayer], c: Tensor, r: Tensor, rows: Tensor, begin: int = 0
    ) -> None:
        """Write r, (count,), and some columns of r', (count, k).

        Args:
            raw, layers: all, with their slopes, and with slopes in W and b.
            c: coefficients, (number,).
            rows: to which the columns are written, in its precision.
            begin: the first of the k columns.
        """
        place, end = 0, begin + rows.shape[1]
        size = min(max(self.ansatz.network.size - begin, 0), rows.shape[1])  # columns of the network's parameters
        of_c = slice(max(begin - self.ansatz.network.size, 0), end - self.ansatz.network.size)
        for chunk, jets in zip(self.chunks, self.inputs):
            own = slice(place, place := place + self.equations * len(chunk.x))
            values, known = self._recorded(chunk, layers, jets, c)
            for equation, by_point in enumerate(values.unbind(1)):
                w, w_c = _gradients(by_point.sum(), known, equation < self.equations - 1)
                there = rows[own][equation :: self.equations]
                if size:
                    self._sweep(chunk).jacobian(raw, chunk.cotangent(w), there[:, :size], begin)
                if size < rows.shape[1]:
                    there[:, size:] = w_c[of_c].T
            r[own] = values.detach().flatten()

    def tangent(self, layers: list[DenseLayer], c: Tensor, directions: list[DenseLayer], along_c: Tensor) -> Tensor:
        """The derivative of r, (count,), along a direction.

        Args:
            layers, directions: as for `JetSweep.tangent`.
            c, along_c: coefficients and their change, (number,).
        """
        found = []
        for chunk, jets in zip(self.chunks, self.inputs):
            r, known = self._recorded(chunk, layers, jets, c)
            du = chunk.tangent(self._sweep(chunk).tangent(layers, directions))
            own = []
            for equation, by_point in enumerate(r.unbind(1)):
                w, w_c = _gradients(by_point.sum(), known, equation < self.equations - 1)
                own.append((w * du).sum((0, 1)) + along_c @ w_c)
            found.append(torch.stack(own, 1).flatten())
        return torch.cat(found)

    def through(self, layers: list[DenseLayer], inputs: list[Tensor], first: int) -> list[Tensor]:
        """Jets behind some hidden layers, from those before them."""
        return [self._sweep(chunk).through(layers, jets, first).clone() for chunk, jets in zip(self.chunks, inputs)]

    def plain(self, chunk: Chunk, inputs: Tensor, theta: Tensor) -> Tensor:
        """A chunk's part of the term, by operations that `torch.func` differentiates; theta with the coefficients."""
        network = self.ansatz.network
        u = chunk.jets(network.jets(theta[: network.size], self.basis, inputs))
        return self._rows(chunk, u, theta[network.size :]).square().sum()


def _require_finite(what: str, jets: Tensor, x: Tensor) -> None:
    """Refuse a function without derivatives at some point, as a root at 0: all residuals would be NaN."""
    if not bool((bad := ~jets.isfinite()).any()):
        return
    where = x[bad.flatten(0, -2).any(0).nonzero()[0, 0]].tolist()
    numbers = ", ".join(f"{value:g}" for value in where)
    raise InputError(what, f"one whose value or derivatives are not finite at ({numbers})", "finite ones at all points")


def _stacked(residual: Tensor | Sequence[Tensor]) -> Tensor:
    """One equation or several, (equations, ...)."""
    return residual[None] if isinstance(residual, Tensor) else torch.stack(tuple(residual))


def _gradients(value: Tensor, known: list[Tensor], again: bool = False) -> tuple[Tensor, ...]:
    """By all that is known; 0 where the value does not depend on it.

    Args:
        again: whether the graph is needed once more.
    """
    return torch.autograd.grad(value, known, retain_graph=again, allow_unused=True, materialize_grads=True)
