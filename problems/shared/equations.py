"""Equations that networks are trained on, by name."""

from __future__ import annotations

import math

import torch
from torch import Tensor

import nn_adapters as nna
from problems.shared import references, spectral
from problems.shared.equation import Equation, Form

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


def _inverse_burgers(u: Tensor, d: dict[str, Tensor], x: Tensor) -> Tensor:
    """Of the logarithm of the viscosity: so this is > 0."""
    return d["t"] + u * d["x"] - d["log_nu"].exp() * d["xx"]


def _korteweg_de_vries(u: Tensor, d: dict[str, Tensor], x: Tensor) -> Tensor:
    return d["t"] + u * d["x"] + 0.0025 * d["xxx"]


def _kuramoto_sivashinsky(u: Tensor, d: dict[str, Tensor], x: Tensor) -> Tensor:
    pi = math.pi
    return d["t"] + 5.0 / pi * u * d["x"] + 5.0 / 3.0 / pi**2 * d["xx"] + 5.0 / 27.0 / pi**4 * d["xxxx"]


def _cahn_hilliard(u: Tensor, d: dict[str, Tensor], x: Tensor) -> Tensor:
    """(u^3)_xx = 3 u^2 u_xx + 6 u u_x^2."""
    cubic = (3.0 * u.square() - 1.0) * d["xx"] + 6.0 * u * d["x"].square()
    return d["t"] - 1e-2 * cubic + 1e-5 * d["xxxx"]


def _schroedinger(u: Tensor, d: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Real and imaginary part of h_t - i (h_xx / 2 + |h|^2 h), h = v + i w."""
    (v, w), (v_t, w_t), (v_xx, w_xx) = u, d["t"], d["xx"]
    square = v.square() + w.square()
    return v_t + 0.5 * w_xx + square * w, w_t - 0.5 * v_xx - square * v


def _poisson(u: Tensor, d: dict[str, Tensor], x: Tensor) -> Tensor:
    return d["xx"] + d["yy"] + 1.0


def _in_l(x: Tensor) -> Tensor:
    """(-1, 1)^2 without [0, 1)^2."""
    return (x.abs() < 1.0).all(1) & (x < 0.0).any(1)


def _corner(x: Tensor) -> tuple[Tensor, Tensor]:
    """r^(2/3) (cos, sin)(2 theta / 3) at the corner 0, theta the angle from the edge (0, y): the sine is 0 on both."""
    r, angle = x.square().sum(1).pow(1.0 / 3.0), torch.atan2(-x[:, 0], x[:, 1])
    angle = torch.where(angle < 0.0, angle + 2.0 * math.pi, angle) * (2.0 / 3.0)
    return r * torch.cos(angle), r * torch.sin(angle)


def _around_corner(x: Tensor) -> Tensor:
    return torch.stack([x[:, 0], x[:, 1], *_corner(x)], 1)


#: Of |h| at the start, whose periodic continuation has a kink at the ends: sech on a circle, without the kink.
_CIRCLE = tuple(10.0 * turn for turn in range(-3, 4))
#: Modes of what is missing, with the kink.
_KINK_MODES = 80
#: The mean of 2 |h|^2, which does not change in time: short waves pass the soliton often, and turn as in this field.
_MEAN_FIELD = 1.6


def _schroedinger_lift(x: Tensor) -> Tensor:
    """The initial values: 2 sech x on a circle of length 10, and the rest, of size 0.03, as waves in a constant field.

    The rest is -8 sum_j (-1)^j cosh(a x) / (exp(10 a) - 1), a = 2j + 1, as a series of cosines.
    """
    smooth = sum(2.0 / torch.cosh(x[:, 0] + shift) for shift in _CIRCLE)
    n = torch.arange(_KINK_MODES, dtype=torch.float64, device=x.device)
    k, kink = 0.2 * math.pi * n, torch.zeros_like(n)
    for j, a in enumerate((1.0, 3.0, 5.0)):
        kink -= 1.6 * (-1.0) ** (n + j) * a * math.exp(-5.0 * a) / (a * a + k.square())
    kink[0] *= 0.5
    waves, phase = torch.cos(x[:, :1] * k) * kink, x[:, 1:] * (0.5 * k.square() - _MEAN_FIELD)
    return torch.stack([smooth + (waves * torch.cos(phase)).sum(1), -(waves * torch.sin(phase)).sum(1)], 1)


def _cosines(order: int) -> nna.Features:
    """Even functions of period 10, and t."""

    def function(x: Tensor) -> Tensor:
        k = 0.2 * math.pi * torch.arange(1, order + 1, dtype=torch.float64, device=x.device)
        return torch.cat([torch.cos(x[:, :1] * k), x[:, 1:]], 1)

    return nna.Features(function, order + 1, {"x": 10.0}, "x")


#: What networks take in: x and t; sin and cos of pi x, and t; cos of 2 pi x, and t.
_INPUTS = nna.Features(lambda x: x, 2)
_ON_CIRCLE = nna.periodic("xt", {"x": 2.0})
_COSINE = nna.Features(lambda x: torch.stack([torch.cos(2.0 * math.pi * x[:, 0]), x[:, 1]], 1), 2, {"x": 1.0}, "x")


def _stretched_circle(by: float, in_time: float) -> nna.Features:
    """The second of these, larger, around t = 1/2."""
    return nna.stretched(_ON_CIRCLE, (by, by, in_time), (0.0, 0.0, 0.5))


def _time(x: Tensor) -> Tensor:
    return x[:, 1]


def _bubble(x: Tensor) -> Tensor:
    """1 - x^2 of the first input."""
    return 1.0 - x[:, 0].square()


def _decaying_sine(x: Tensor) -> Tensor:
    """From the initial values, -sin(pi x), to 0; a solution that is odd stays periodic, and zero at both ends."""
    return -torch.sin(math.pi * x[:, 0]) * torch.exp(-3.0 * x[:, 1])


def _wave_lift(x: Tensor) -> Tensor:
    """x (1 - x^2 (1 - cos t)): for x cos t, the plain lift of the boundary values, is the solution itself."""
    return x[:, 0] * (1.0 - x[:, 0].square() * (1.0 - torch.cos(x[:, 1])))


def _wave_factor(x: Tensor) -> Tensor:
    """As t^2 at first, and bounded."""
    return x[:, 1].square() / (1.0 + x[:, 1].square()) * _bubble(x)


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
            {
                "plain": Form(_wave_lift, _wave_factor),
                "waves": Form(_wave_lift, _wave_factor, nna.stretched(_INPUTS, (2.0, 2.0), (0.0, 6.0))),
            },
            references.klein_gordon,
            6,
            50,
            6,
            (2, 24),
            "sin",
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
            (3, 16),
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
                    nna.Features(lambda x: torch.stack([x[:, 0].square(), x[:, 1]], 1), 2, even="x"),
                ),
            },
            references.allen_cahn,
            6,
            64,
            6,
        ),
        Equation(
            "inverse_burgers",
            "xt",
            ((-1.0, 1.0), (0.0, 1.0)),
            _inverse_burgers,
            ("x", "t", "xx"),
            {"plain": Form()},
            lambda x: references.burgers(x, VISCOSITY),
            8,
            20,
            8,
            coefficients={"log_nu": (math.log(0.1), math.log(VISCOSITY))},
        ),
        Equation(
            "kdv",
            "xt",
            ((-1.0, 1.0), (0.0, 1.0)),
            _korteweg_de_vries,
            ("x", "t", "xxx"),
            {
                "periodic": Form(lambda x: torch.cos(math.pi * x[:, 0]), _time, _ON_CIRCLE),
                "waves": Form(lambda x: torch.cos(math.pi * x[:, 0]), _time, _stretched_circle(2.0, 4.0)),
            },
            spectral.korteweg_de_vries,
            6,
            50,
            6,
            (3, 24),
            "sin",
        ),
        Equation(
            "kuramoto_sivashinsky",
            "xt",
            ((-1.0, 1.0), (0.0, 1.0)),
            _kuramoto_sivashinsky,
            ("x", "t", "xx", "xxxx"),
            {
                "periodic": Form(lambda x: -torch.sin(math.pi * x[:, 0]), _time, _ON_CIRCLE),
                "waves": Form(lambda x: -torch.sin(math.pi * x[:, 0]), _time, _stretched_circle(2.0, 4.0)),
            },
            spectral.kuramoto_sivashinsky,
            6,
            50,
            6,
            (3, 20),
            "sin",
        ),
        Equation(
            "cahn_hilliard",
            "xt",
            ((-1.0, 1.0), (0.0, 1.0)),
            _cahn_hilliard,
            ("x", "t", "xx", "xxxx"),
            {"even": Form(lambda x: -torch.cos(2.0 * math.pi * x[:, 0]), _time, _COSINE)},
            spectral.cahn_hilliard,
            6,
            50,
            6,
            (3, 20),
        ),
        Equation(
            "schroedinger",
            "xt",
            ((-5.0, 5.0), (0.0, 0.5 * math.pi)),
            _schroedinger,
            ("t", "xx"),
            {"even": Form(_schroedinger_lift, lambda x: x[:, 1], _cosines(4))},
            spectral.schroedinger,
            5,
            100,
            5,
            (4, 20),
            fields=2,
        ),
        Equation(
            "poisson_lshape",
            "xy",
            ((-1.0, 1.0), (-1.0, 1.0)),
            _poisson,
            ("xx", "yy"),
            {
                "corner": Form(
                    None, lambda x: _corner(x)[1] * (1.0 - x.square()).prod(1), nna.Features(_around_corner, 4)
                )
            },
            references.poisson_lshape,
            6,
            50,
            6,
            (3, 20),
            inside=_in_l,
        ),
    )
}
