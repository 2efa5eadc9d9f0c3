"""Equations that networks are trained on, and what the scripts `problems.pinn_*` share."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

import nn_adapters as nna
from problems.shared import references


@dataclass(frozen=True)
class Form:
    """u = lift(x) + factor(x) net(features(x))."""

    lift: nna.Field
    factor: nna.Field
    features: nna.Features | None = None


@dataclass(frozen=True)
class Equation:
    """An equation on a box with values on its boundary, which u = lift + factor net has by construction.

    Attributes:
        name: of the equation.
        names: of the inputs, a letter each.
        box: (low, high) of each input.
        residual: zero for a solution; takes u, its `derivatives` by name, and the points, (n, 2).
        forms: how u is made of the network, by what the network takes in: "plain", and what has the symmetry of the
            solution where equation and values have one: "periodic" or "even".
        solution: (n, 2) -> (n,), to compare with.
        layers, width, parts: of the published network and its decomposition.
        small: layers and width of a network for least squares.
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
        features: str = "plain",
    ) -> nna.PINN:
        """The loss of a network for this equation; the defaults are the published ones."""
        form = self.forms[features]
        inputs = len(self.box) if form.features is None else form.features.size
        network = nna.Network(
            inputs, (width or self.width,) * (layers or self.layers), body, activation, adaptive, slope_scale
        )
        x = nna.POINT_SAMPLERS[sampler](points, self.box, seed)
        term = nna.Term(x, self.residual, self.derivatives, draw=lambda n, seed: nna.uniform_points(n, self.box, seed))
        return nna.PINN(network, [term], self.names, form.lift, form.factor, features=form.features)

    def grid(self, shape: tuple[int, int] = (256, 101)) -> Tensor:
        """Nodes of a grid on the box, (n, 2)."""
        unit = torch.cartesian_prod(*(torch.linspace(0.0, 1.0, n, dtype=torch.float64) for n in shape))
        return nna.into_box(self.box, unit)

    def relative_error(self, pinn: nna.PINN, theta: Tensor) -> float:
        """|u - u*| / |u*| over the nodes of the grid."""
        x, exact = _solution(self)
        return float((pinn.predict(theta, x) - exact).norm() / exact.norm())


@cache
def _solution(equation: Equation) -> tuple[Tensor, Tensor]:
    """The nodes of the grid, and the solution there."""
    x = equation.grid()
    return x, equation.solution(x)


VISCOSITY = 0.01 / math.pi


def _burgers(u: Tensor, d: dict[str, Tensor], x: Tensor) -> Tensor:
    return d["t"] + u * d["x"] - VISCOSITY * d["xx"]


def _klein_gordon(u: Tensor, d: dict[str, Tensor], x: Tensor) -> Tensor:
    exact = x[:, 0] * torch.cos(x[:, 1])
    return d["tt"] - d["xx"] + u.square() - (exact.square() - exact)


def _diffusion_transport(u: Tensor, d: dict[str, Tensor], x: Tensor) -> Tensor:
    return -1e-2 * (d["xx"] + d["yy"]) + d["x"] + d["y"] - 1.0


def _allen_cahn(u: Tensor, d: dict[str, Tensor], x: Tensor) -> Tensor:
    return d["t"] - 1e-3 * d["xx"] - 5.0 * (u - u**3)


def _bubble(x: Tensor) -> Tensor:
    """1 - x^2 of the first input."""
    return 1.0 - x[:, 0].square()


def _decaying_sine(x: Tensor) -> Tensor:
    """From the initial values, -sin(pi x), to 0; a solution that is odd stays periodic, and zero at both ends."""
    return -torch.sin(math.pi * x[:, 0]) * torch.exp(-3.0 * x[:, 1])


def _wave_lift(x: Tensor) -> Tensor:
    """x (1 - x^2 (1 - cos t)): for x cos t, the plain lift of the boundary values, is the solution itself."""
    return x[:, 0] * (1.0 - x[:, 0].square() * (1.0 - torch.cos(x[:, 1])))


def _phase_lift(x: Tensor) -> Tensor:
    """From the initial values, x^2 cos(pi x), to -x^2."""
    return x[:, 0].square() * (torch.exp(-3.0 * x[:, 1]) * (1.0 + torch.cos(math.pi * x[:, 0])) - 1.0)


#: By name. Much depends on lift and factor: initial values that decay in time leave the network less to take away; a
#: factor that grows over a long time would weigh its end most; one that falls in the width of a boundary layer, 0.01,
#: spares the network the layer.
EQUATIONS: dict[str, Equation] = {
    equation.name: equation
    for equation in (
        Equation(
            "burgers",
            "xt",
            ((-1.0, 1.0), (0.0, 1.0)),
            _burgers,
            ("x", "t", "xx"),
            {
                "plain": Form(_decaying_sine, lambda x: x[:, 1] * _bubble(x)),
                "periodic": Form(_decaying_sine, lambda x: x[:, 1], nna.periodic("xt", {"x": 2.0})),
            },
            lambda x: references.burgers(x, VISCOSITY),
            8,
            20,
            8,
        ),
        Equation(
            "klein_gordon",
            "xt",
            ((-1.0, 1.0), (0.0, 12.0)),
            _klein_gordon,
            ("tt", "xx"),
            {"plain": Form(_wave_lift, lambda x: x[:, 1].square() / (1.0 + x[:, 1].square()) * _bubble(x))},
            references.klein_gordon,
            6,
            50,
            6,
            (3, 20),
        ),
        Equation(
            "diffusion_transport",
            "xy",
            ((0.0, 1.0), (0.0, 1.0)),
            _diffusion_transport,
            ("x", "y", "xx", "yy"),
            {
                "plain": Form(
                    lambda x: torch.zeros_like(x[:, 0]), lambda x: (-x * torch.expm1(100.0 * (x - 1.0))).prod(1)
                )
            },
            references.diffusion_transport,
            10,
            50,
            10,
            (3, 20),
        ),
        Equation(
            "allen_cahn",
            "xt",
            ((-1.0, 1.0), (0.0, 1.0)),
            _allen_cahn,
            ("t", "xx"),
            {
                "plain": Form(_phase_lift, lambda x: x[:, 1] * _bubble(x)),
                "even": Form(
                    _phase_lift,
                    lambda x: x[:, 1] * _bubble(x),
                    nna.Features(lambda x: torch.stack([x[:, 0].square(), x[:, 1]], 1), 2),
                ),
            },
            references.allen_cahn,
            6,
            64,
            6,
        ),
    )
}
