"""Physics-informed networks as smooth functions of their parameters: residuals of equations, in mean squares.

    f(theta) = sum over terms of weight * mean over the term's points of residual(u, derivatives, x)^2

with u = lift(x) + factor(x) net(features(x); theta), one field or several, so that a factor that vanishes there imposes
boundary and initial values exactly; without it they are terms of their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from nn_adapters.pinn.balance import balanced_factors, check_balance
from nn_adapters.pinn.costs import CallTimes
from nn_adapters.pinn.device import home
from nn_adapters.pinn.features import Features
from nn_adapters.pinn.network import Network, absorb_slopes
from nn_adapters.pinn.termrows import TermRows
from nn_adapters.pinn.terms import Ansatz, Field, Term, TermAtPoints
from nn_adapters.pinn.trained import TrainedField
from pdeopt.core.errors import InputError
from pdeopt.core.team import Team, checked_device
from pdeopt.functions import border
from pdeopt.functions.decomposition import Decomposition
from pdeopt.functions.smooth import Costs, Restriction, SmoothFunction, Tally
from pdeopt.squares.rows import density, draw_rows
from pdeopt.squares.share import Share

#: Points at which features, lift and factor are compared.
LOOKED_AT = 16


class PINN(TermRows):
    """The loss of a network that is to satisfy equations, as a `ResidualFunction` for all optimizers of pdeopt.

    f(theta) = sum over terms of weight * mean over the term's points of residual(u, derivatives, x)^2, where
    u = lift(x) + factor(x) net(features(x); theta). It is |r|^2 with rows sqrt(weight / points) residual, one for each
    point and equation, term after term, and the Jacobian of r comes from the sweep of the gradient. A factor that
    vanishes on a boundary imposes the values of the lift there exactly (I. E. Lagaris, A. Likas, D. I. Fotiadis, IEEE
    Trans. Neural Netw. 9, 1998); without it the values are terms of their own (M. Raissi, P. Perdikaris, G. E.
    Karniadakis, J. Comput. Phys. 378, 2019).

    Unknown coefficients of the equations are unknowns as the weights are, and their columns of the Jacobian are exact,
    too: measurements, a term with numbers that are `given`, tell coefficients and solution at once.

    theta is (network.size + coefficients,), double precision, coefficients at the end. Values and
    gradients come from jets that are carried through the layers by hand, without a graph; Hessian products by
    `torch.func`. Nothing is collective.

    On another `device` the parameters, and the methods that find them, stay on the host: a value with its gradient
    sends theta there once and gets both back once; a Jacobian stays there. `terms` are always kept on the host.

    Args:
        network: net.
        terms: the first one is sampled: `subset` and `with_points` change its points.
        names: of the inputs, a letter each, as "xt"; derivatives of the terms are spelled in them.
        lift, factor: functions (points, inputs) -> (points,), or (points, fields), made of torch operations; without
            them u is the network itself.
        features: what the network takes in, as `periodic` ones; without them the inputs themselves.
        tally: where calls are counted.
        costs: by default those of a fixed model of the time; 1 is a gradient of this function.
        coefficients: unknown numbers of the equations, by names under which residuals find them, with first values.
        balance: how the weights of several terms follow their sizes, by `balanced`: "none", "ntk" or "gradients"; see
            `balanced_factors`. `sample` balances, as a method does that draws points anew.
        factors: by which weights are multiplied at first, one a term; 1 by default.
        device: where points are evaluated, such as "cuda" (`checked_device`); by default where those of the first term
            are. Residuals, lift, factor and features are called with points there.

    Attributes:
        layers: number of parameters of each hidden layer, the closing one counted to the last: blocks of
            `Decomposition.blocks`.

    Raises:
        InputError: names or features that do not fit the inputs of the network, no terms, a term with bad points or
            derivatives, a lift or factor that does not have the period of the features, a coefficient with the name of
            a derivative, or a device that is not there.

    Example:
        >>> heat = Term(hammersley(2000, [(0, 1), (0, 1)]), lambda u, d, x: d["t"] - d["xx"], ("t", "xx"))
        >>> f = PINN(Network(2, (20, 20)), [heat], "xt", initial_values, lambda x: x[:, 1] * x[:, 0] * (1 - x[:, 0]))
        >>> u = f.predict(SSBroyden(f).minimize(f.initial()).design, points)
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
        features: Features | None = None,
        coefficients: Mapping[str, float] | None = None,
        balance: str = "none",
        factors: Sequence[float] = (),
        device: str | torch.device | None = None,
    ) -> None:
        check_balance(balance)
        if features is None and len(names) != network.inputs:
            raise InputError("names of the inputs", repr(names), f"{network.inputs} letters, one an input")
        if features is not None and features.size != network.inputs:
            raise InputError("inputs of the network", network.inputs, f"{features.size}, as there are features")
        if not terms:
            raise InputError("terms of a PINN", "none", "at least one")
        there = checked_device(terms[0].points.device if device is None else device)
        self.terms = tuple(term.at_home for term in terms)
        if features is not None:
            x = self.terms[0].points
            some = x[torch.linspace(0, len(x) - 1, min(LOOKED_AT, len(x)), dtype=torch.float64).round().long()]
            features.check(names, some.to(there, torch.float64), {"lift": lift, "factor": factor})
        for name in coefficients or {}:
            if set(name) <= set(names):
                raise InputError("coefficient of a PINN", repr(name), "a name that is no derivative")
        self.names, self.lift, self.factor = names, lift, factor
        self._kept: tuple[int, Tensor, list[list[Tensor]]] = (0, torch.empty(0), [])  # layer, weights below it, jets
        self.balance = balance
        ansatz = Ansatz(network, names, lift, factor, features, coefficients or {}, there)
        super().__init__(ansatz, self.terms, costs, tally, factors)
        sizes = network.sizes
        self.layers = [*sizes[:-2], sizes[-2] + sizes[-1] + len(self.ansatz.coefficients)]

    def initial(self, seed: int = 0) -> Tensor:
        """Where training starts, (size,): Glorot's weights, no biases, coefficients as they are given."""
        first = torch.tensor(list(self.ansatz.coefficients.values()), dtype=torch.float64)
        return torch.cat([self.network.initial(seed), first])

    def coefficients_at(self, theta: Tensor) -> dict[str, float]:
        """The unknown coefficients by name."""
        return dict(zip(self.ansatz.coefficients, theta[self.network.size :].tolist()))

    def predict(self, theta: Tensor, x: Tensor) -> Tensor:
        """u at points x, (points, inputs): (points,), or (fields, points); where the points are."""
        raw, c = self.split(border.vector(theta, self.size, "theta"))
        u = TermAtPoints(self.ansatz, Term(x, lambda u, d, x: u)).jets(absorb_slopes(raw), c)[1][0].to(x.device)
        return u if len(u) > 1 else u[0]

    def field(self, theta: Tensor, at: Mapping[str, float] | None = None) -> TrainedField:
        """u as a function of points, (n, inputs), that may be the lift of another PINN: for a second network, of what
        this one leaves, or, at its last time, for the times that follow.

        Args:
            at: values of the inputs that are fixed, by their letters.
        """
        return TrainedField(self.ansatz, border.vector(theta, self.size, "theta")[: self.network.size], at)

    def residuals(self, theta: Tensor, x: Tensor | None = None) -> Tensor:
        """Of the first term, at its points or at others, (n, inputs): (n,), or (equations, n); counted as work.

        They are where the points are.
        """
        points = self.terms[0].points if x is None else x
        r = _jets(self, border.vector(theta, self.size, "theta"), x)[0].to(points.device)
        return r if len(r) > 1 else r[0]

    def with_points(self, points: Tensor, weight: float | Tensor | None = None) -> PINN:
        """The same loss, its first term at other points, (n, inputs), counted in the same tally.

        Args:
            points: of the first term.
            weight: of that term, or of each point, (n,); that of the term by default.
        """
        weight = self.terms[0].weight if weight is None else weight
        return self._with(_moved(self.terms[0], points, weight))

    def subset(self, indices: Tensor) -> PINN:
        """The loss with the first term at some of its points."""
        return self._with(self.terms[0].subset(indices))

    def balanced(self, theta: Tensor) -> PINN:
        """The same loss with the weights of its terms balanced at these parameters; by `balance`."""
        return self._with(self.terms[0], balanced_factors(self, theta, self.balance))

    def _with(self, term: Term, factors: Sequence[float] = ()) -> PINN:
        found = PINN(
            self.network,
            [term, *self.terms[1:]],
            self.names,
            self.lift,
            self.factor,
            self.tally,
            features=self.ansatz.features,
            coefficients=self.ansatz.coefficients,
            balance=self.balance,
            factors=factors or self.factors,
            device=self.device,
        )
        found.costs = self.costs.times(found.times.whole / self.times.whole)
        return found

    def sample(
        self, x: Tensor, count: int, seed: int, floor: float = 0.5, candidates: int = 0, team: Team | None = None
    ) -> PINN:
        """The first term at new points, more of them where its residual or the first derivatives of u are large.

        They are drawn by the density |r| / mean + |u'| / mean + floor, u' the first derivatives that the residual
        needs, among candidates that the term's `draw` makes, or else among its points.
        """
        term = self.terms[0]
        pool = term.points if term.draw is None else term.draw(candidates or 10 * count, seed)
        share = Share(team, len(pool))
        sizes = list(share.gather(share.call(lambda: _sizes(self, x, pool, share.own)).T).T)
        chosen, weights = draw_rows(density(sizes, floor), count, seed + 1)
        moved = term.subset(chosen) if term.draw is None else _moved(term, pool[chosen], 1.0)
        found = self._with(replace(moved, weight=weights * _weights(term, chosen)))
        return found if self.balance == "none" else found.balanced(x)

    def sample_memory(self) -> dict[str, Tensor]:
        term = self.terms[0]
        weights = torch.as_tensor(term.weight).expand(len(term.points)).clone()
        given = {f"given_{name}": v for name, v in term.given.items()}
        factors = torch.tensor(self.factors, dtype=torch.float64)
        return {"points": term.points, "weights": weights, "factors": factors} | given

    def recalled(self, memory: dict[str, Tensor]) -> PINN:
        given = {name: memory[f"given_{name}"] for name in self.terms[0].given}
        term = replace(self.terms[0], points=memory["points"], weight=memory["weights"], given=given)
        return self._with(term, memory["factors"].tolist())

    def decompose(self, parts: int | None = None, overlap: int = 0, team: Any = None) -> Decomposition:
        """Layers in groups of neighbors."""
        return Decomposition.blocks(self.layers, parts, overlap, team)

    def local(self, decomposition: Decomposition, part: int, x: Tensor) -> SmoothFunction:
        """d -> f(x + R' d). Where the part is some whole layers in a row, only these and those behind are evaluated.

        The jets before the part are found here. What is counted is the way from the part before, as for one rank that
        takes all parts in order: so counts do not depend on who has which part.
        """
        layers = self.network.whole_layers(decomposition.parts[part])
        if layers is None:
            return Restriction(self, decomposition.parts[part], x)
        before = self.network.whole_layers(decomposition.parts[part - 1]) if part else None
        way = self.times.forward(before[0] if before and before[0] <= layers[0] else 0, layers[0])
        self.tally.work += self.costs.gradient * way / self.times.whole
        return LocalPINN(self, *layers, x)


def _jets(function: PINN, theta: Tensor, x: Tensor | None, counted: int = 0) -> tuple[Tensor, Tensor]:
    """Residual, (equations, points), and jets of u, (J, fields, points), of the first term, at its points or at x.

    Args:
        counted: points that are counted; by default all of these.
    """
    term = function.evaluated[0]
    if x is not None:
        term = TermAtPoints(function.ansatz, _moved(function.terms[0], x, 1.0))
    columns = counted * len(term.basis) if counted else term.columns
    times = CallTimes(function.network, columns)
    function.tally.work += function.costs.gradient * times.value(0) / function.times.whole
    raw, c = function.split(theta)
    return term.jets(absorb_slopes(raw), c)


def _sizes(function: PINN, x: Tensor, pool: Tensor, own: slice) -> Tensor:
    """By what points are drawn, (1 or 2, own points): residual, and first derivatives of u; counted for all."""
    at_all = bool(function.terms[0].given) or own.stop - own.start == len(pool)  # numbers are given for all points
    r, u = _jets(function, x, pool if at_all else pool[own], len(pool))
    firsts = u[1 : 1 + len(function.evaluated[0].basis.first)]
    sizes = [r.norm(dim=0), *([firsts.square().sum((0, 1)).sqrt()] if len(firsts) else [])]
    found = home(torch.stack(sizes))
    return found[:, own] if at_all else found


def _jets_before(function: PINN, layer: int, theta: Tensor) -> list[list[Tensor]]:
    """Jets at the input of a layer, a list for each term, from the last ones asked for as far as they hold."""
    if layer == 0:
        return [term.inputs for term in function.evaluated]
    start, known, jets = function._kept
    if not (0 < start <= layer and torch.equal(known, theta[: len(known)])):
        start, jets = 0, [term.inputs for term in function.evaluated]
    if start < layer:
        between = absorb_slopes(function.split(theta)[0][start:layer])
        jets = [term.through(between, own, start) for term, own in zip(function.evaluated, jets)]
    function._kept = (layer, theta[: sum(function.network.sizes[:layer])].clone(), jets)
    return jets


def _moved(term: Term, points: Tensor, weight: float | Tensor) -> Term:
    """The term at other points."""
    if term.given and points is not term.points:
        raise InputError("points of a term", "new ones, where numbers are given", "`subset`, or no `draw`")
    return replace(term, points=points, weight=weight)


def _weights(term: Term, indices: Tensor) -> Tensor:
    """Of some points of a term; of a term whose points are drawn, the mean, which drawing keeps."""
    weight = torch.as_tensor(term.weight, dtype=torch.float64)
    return weight[indices] if weight.ndim and term.draw is None else weight.mean().expand(len(indices))


class LocalPINN(SmoothFunction):
    """d -> f(x + R' d), R the restriction to the layers `first` to `last`; see `PINN.local`.

    Args:
        whole: f.
        first, last: layers of the part, the closing one number `network.depth`.
        x: parameters, (whole.size,).
    """

    def __init__(self, whole: PINN, first: int, last: int, x: Tensor) -> None:
        sizes = whole.network.sizes
        begin, end = sum(sizes[:first]), sum(sizes[: last + 1])
        share = whole.times.costs(first, last).times(whole.costs.gradient)
        costs = replace(share, hessian_product=whole.costs.hessian_product)  # it goes through the whole network
        super().__init__(end - begin, whole.comm, costs, whole.tally)
        self.whole, self.first, self.last, self.inputs = whole, first, last, _jets_before(whole, first, x)
        self._own, self._behind = x[begin:end].clone(), x[end:].clone()
        self._restriction = Restriction(whole, torch.arange(begin, end), x)

    def _parameters(self, d: Tensor) -> Tensor:
        """From the first layer on."""
        return torch.cat([self._own + d, self._behind])

    def _value(self, x: Tensor) -> float:
        return self.whole.value_from(self.first, self.inputs, self._parameters(x))

    def _value_and_gradient(self, x: Tensor) -> tuple[float, Tensor]:
        return self.whole.gradient_from(self.first, self.last, self.inputs, self._parameters(x))

    def _hvp(self, x: Tensor, d: Tensor) -> Tensor:
        return self._restriction._hvp(x, d)
