"""What an equation brings that networks are trained on: domain, residual, lift and factor, measurements, a solution."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

import nn_adapters as nna
import pdeopt as po


@dataclass(frozen=True)
class NoisyData(po.Settings):
    """Noisy measurements of the solution, for unknown coefficients."""

    measured: int = po.setting(2000, "measurements, at random points", at_least=1)
    noise: float = po.setting(0.01, "standard deviation of their noise, in that of the solution", at_least=0)
    data_weight: float = po.setting(1.0, "weight of their mean square beside that of the equation", above=0)
    balance: str = po.setting(
        "none",
        "ntk, gradients: the weight follows, with each drawing of points, the traces of the tangent kernel or the "
        "norms of the gradients of both",
        choices=nna.BALANCES,
    )


@dataclass(frozen=True)
class Form:
    """u = lift(x) + factor(x) net(features(x))."""

    lift: nna.Field | None = None
    factor: nna.Field | None = None
    features: nna.Features | None = None


@dataclass(frozen=True)
class Equation:
    """Equations on a domain with values on its boundary, which u = lift + factor net has by construction.

    Attributes:
        name: of the equation.
        names: of the inputs, a letter each.
        box: (low, high) of each input.
        residual: zero for a solution; takes u, its `derivatives` and the coefficients by name, and the points, (n, 2).
        forms: how u is made of the network, by what the network takes in: "plain", and what has the symmetry of the
            solution where equation and values have one: "periodic" or "even"; "waves" are larger, for activation sin.
        solution: (n, 2) -> (n,), or (fields, n), to compare with.
        layers, width, parts: of the published network and its decomposition.
        small: layers and width of a network for least squares; `small_activation`: its activation.
        fields: of u.
        inside: which points of the box are in the domain, (n, 2) -> (n,); None for all.
        coefficients: unknown numbers, with first values: (first, true) by name. They are told by noisy measurements of
            the solution at uniformly drawn points.
    """

    name: str
    names: str
    box: nna.Intervals
    residual: nna.Residual
    derivatives: tuple[str, ...]
    forms: dict[str, Form]
    solution: Callable[[Tensor], Tensor]
    layers: int
    width: int
    parts: int
    small: tuple[int, int] = (4, 20)
    small_activation: str = "tanh"
    fields: int = 1
    inside: Callable[[Tensor], Tensor] | None = None
    coefficients: dict[str, tuple[float, float]] = field(default_factory=dict)

    def __hash__(self) -> int:
        return hash(self.name)

    def function(
        self,
        points: int = 10_000,
        layers: int | None = None,
        width: int | None = None,
        body: str = "resnet",
        activation: str = "tanh",
        adaptive: bool = True,
        slope_scale: float = 1.0,
        sampler: str = "hammersley",
        seed: int = 0,
        features: str = "",
        measured: NoisyData | None = None,
        device: str = "cpu",
    ) -> nna.PINN:
        """The loss of a network for this equation; the defaults are the published ones."""
        form = self.forms[features or next(iter(self.forms))]
        inputs = len(self.box) if form.features is None else form.features.size
        network = nna.Network(
            inputs,
            (width or self.width,) * (layers or self.layers),
            body,
            activation,
            adaptive,
            slope_scale,
            self.fields,
        )
        x = self.points(sampler, points, seed)
        terms = [nna.Term(x, self.residual, self.derivatives, draw=lambda n, seed: self.points("uniform", n, seed))]
        if self.coefficients:
            terms.append(self._measurements(measured or NoisyData(), seed))
        first = {name: first for name, (first, _) in self.coefficients.items()}
        return nna.PINN(
            network,
            terms,
            self.names,
            form.lift,
            form.factor,
            features=form.features,
            coefficients=first,
            balance=measured.balance if measured else "none",
            device=device,
        )

    def points(self, sampler: str, n: int, seed: int) -> Tensor:
        """Points of the domain, (n, 2).

        Args:
            sampler: one of `POINT_SAMPLERS`.
        """
        return self.sampler(sampler)(n, self.box, seed)

    def sampler(self, name: str = "uniform") -> nna.Sampler:
        """One of `POINT_SAMPLERS` on the domain."""
        draw = nna.POINT_SAMPLERS[name]
        return draw if self.inside is None else nna.within(self.inside, draw)

    def _measurements(self, settings: NoisyData, seed: int) -> nna.Term:
        """The solution at random points, with noise."""
        x = self.points("uniform", settings.measured, seed + 77)
        u, generator = self.solution(x), torch.Generator().manual_seed(seed + 78)
        noise = settings.noise * u.std() * torch.randn(u.shape, generator=generator, dtype=u.dtype)
        return nna.Term(x, lambda u, d, x: u - d["seen"], weight=settings.data_weight, given={"seen": u + noise})

    def grid(self, shape: tuple[int, int] = (256, 101)) -> Tensor:
        """Nodes of a grid on the box, (n, 2)."""
        unit = torch.cartesian_prod(*(torch.linspace(0.0, 1.0, n, dtype=torch.float64) for n in shape))
        return nna.into_box(self.box, unit)

    def relative_error(self, pinn: nna.PINN, theta: Tensor) -> float:
        """|u - u*| / |u*| over the nodes of the grid in the domain."""
        x, exact = _solution(self)
        return float((pinn.predict(theta, x) - exact).norm() / exact.norm())


@cache
def _solution(equation: Equation) -> tuple[Tensor, Tensor]:
    """The nodes of the grid in the domain, and the solution there."""
    x = equation.grid()
    x = x if equation.inside is None else x[equation.inside(x)]
    return x, equation.solution(x)
