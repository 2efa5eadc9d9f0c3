"""Solutions of the equations that networks are trained on, exact or on a fine grid.

All are functions of points, (n, 2) in double precision, with values (n,).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import skfem
import torch
from scipy.integrate import solve_ivp
from scipy.linalg import solve_sylvester
from scipy.sparse import diags
from scipy.sparse.linalg import splu
from skfem import models
from torch import Tensor


def burgers(x: Tensor, viscosity: float = 0.01 / math.pi, nodes: int = 100) -> Tensor:
    """u_t + u u_x = viscosity u_xx on (-1, 1), u(x, 0) = -sin(pi x), u(+-1, t) = 0; columns of `x` are x, t.

    By the transform of Cole and Hopf, u = -int sin(pi y) e(y) dH / int e(y) dH, with y = x - 2 sqrt(viscosity t) h,
    e(y) = exp(-cos(pi y) / (2 pi viscosity)), and dH by Gauss-Hermite (C. Basdevant et al., Comput. Fluids 14,
    1986). The largest exponent is taken off both integrals, so none is zero over zero.
    """
    h, w = (torch.from_numpy(each) for each in np.polynomial.hermite.hermgauss(nodes))
    found = []
    for part in x.split(10_000):
        y = part[:, :1] - 2.0 * (viscosity * part[:, 1:]).clamp(min=0.0).sqrt() * h
        exponent = -torch.cos(math.pi * y) / (2.0 * math.pi * viscosity) + w.log()
        e = (exponent - exponent.amax(1, keepdim=True)).exp()
        found.append(-(torch.sin(math.pi * y) * e).sum(1) / e.sum(1))
    return torch.cat(found)


def klein_gordon(x: Tensor) -> Tensor:
    """u_tt - u_xx + u^2 = -x cos t + x^2 cos^2 t with the solution x cos t; columns of `x` are x, t."""
    return x[:, 0] * torch.cos(x[:, 1])


def diffusion_transport(x: Tensor) -> Tensor:
    """-0.01 (u_xx + u_yy) + u_x + u_y = 1 on the unit square, u = 0 on its boundary."""
    return _diffusion_transport()(x)


def allen_cahn(x: Tensor) -> Tensor:
    """u_t - 0.001 u_xx - 5 (u - u^3) = 0, u(x, 0) = x^2 cos(pi x), u(+-1, t) = -1; columns of `x` are x, t."""
    return _allen_cahn()(x)


def poisson_lshape(x: Tensor) -> Tensor:
    """-u_xx - u_yy = 1 on (-1, 1)^2 without [0, 1)^2, u = 0 on the boundary."""
    return _poisson_lshape()(x)


#: Convex corners of the L, and the angle of the half-line from each through the middle of the domain.
_CORNERS = {-1 + 1j: -0.25, -1 - 1j: 0.25, 1 - 1j: 0.75, 1j: 1.25, 1.0 + 0j: 1.25}


@cache
def _poisson_lshape(terms: int = 60) -> Callable[[Tensor], Tensor]:
    """-r^2/4 and harmonic functions, fitted to zero on the boundary: their maximum there bounds the error inside.

    They are r^(2k/3) sin(2k theta/3) at the corner 0, odd k, as the solution is symmetric, polynomials, and, for even
    m, z^m log z there and at the convex corners (L. Fox, P. Henrici, C. Moler, SIAM J. Numer. Anal. 4, 1967).

    Args:
        terms: of the series at the corner 0.
    """

    def functions(z: Any) -> Any:
        """(points, functions)."""
        turned = -1j * z  # angles from the edge (0, y), in (0, 3 pi/2)
        turned = np.where(z == 0, 1e-300, turned)
        logs = np.log(turned * np.exp(-0.75j * np.pi)) + 0.75j * np.pi  # cut in the missing quadrant
        series = [np.exp(2.0 * k / 3.0 * (logs - math.log(2.0) / 2.0)).imag for k in range(1, 2 * terms, 2)]
        own = [(z / 1.5) ** m for m in range(terms // 2)] + [(z / 1.5) ** m * logs for m in range(2, 16, 2)]
        near = []
        for corner, angle in _CORNERS.items():
            local = (z - corner) * np.exp(-1j * np.pi * angle)
            logs = np.log(np.where(local == 0, 1e-300, local))
            near += [(local / 2.5) ** m * logs for m in (2, 4, 6, 8, 10)]
        others = [part for value in (*own, *near) for part in (value.real, value.imag)]
        return np.stack([*series, *others], 1)

    edge = lshape_boundary(400)
    A, right = functions(edge), np.abs(edge) ** 2 / 4.0
    scale = np.abs(A).max(0).clip(1e-30)
    weights = np.linalg.lstsq(A / scale, right, rcond=1e-15)[0] / scale

    def u(x: Tensor) -> Tensor:
        z = x.numpy() @ np.array([1.0, 1j])
        return torch.from_numpy(functions(z) @ weights - np.abs(z) ** 2 / 4.0)

    return u


def lshape_boundary(n: int) -> Any:
    """Points of the boundary of the L, complex, n a side, more of them near the corners."""
    s = 0.5 - 0.5 * np.cos(np.pi * (np.arange(n) + 0.5) / n)
    corners = [0, 1j, -1 + 1j, -1 - 1j, 1 - 1j, 1, 0]
    return np.concatenate([before + (after - before) * s for before, after in pairwise(corners)])


@cache
def _diffusion_transport(elements: int = 256) -> Callable[[Tensor], Tensor]:
    """By quadratic elements on a product mesh, half of them in the layers, of width 0.01, at x = 1 and y = 1.

    With C = 0.01 A + B, the stiffness and transport matrices in one direction, and its mass matrix M, the values U at
    the nodes solve C U M + M U C' = f f': a Sylvester equation for M^-1 C.
    """
    half = elements // 2
    nodes = np.concatenate([np.linspace(0.0, 0.9, half + 1), np.linspace(0.9, 1.0, half + 1)[1:]])
    basis = _quadratic(nodes)
    mass = models.mass.assemble(basis)
    C = 1e-2 * models.laplace.assemble(basis) + skfem.BilinearForm(lambda u, v, w: u.grad[0] * v).assemble(basis)
    load = skfem.LinearForm(lambda v, w: v).assemble(basis)
    free = np.flatnonzero((basis.doflocs[0] > 0.0) & (basis.doflocs[0] < 1.0))
    inverse = splu(mass[free][:, free].tocsc())
    operator, right = inverse.solve(C[free][:, free].toarray()), inverse.solve(load[free])
    U = np.zeros((basis.N, basis.N))
    U[np.ix_(free, free)] = solve_sylvester(operator, operator.T, np.outer(right, right))

    def u(x: Tensor) -> Tensor:
        rows, columns = (basis.probes(column.numpy()[None]) for column in x.T)
        return torch.from_numpy(np.asarray(columns.multiply(rows @ U).sum(1)).ravel())

    return u


@cache
def _allen_cahn(elements: int = 1024) -> Callable[[Tensor], Tensor]:
    """By quadratic elements on (0, 1), for the solution is even, with mass and reaction lumped by Simpson's rule, of
    the same order, and Radau IIA in time.
    """
    basis = _quadratic(np.linspace(0.0, 1.0, elements + 1))
    nodes = basis.doflocs[0]
    free, start = np.flatnonzero(nodes < 1.0), nodes**2 * np.cos(np.pi * nodes)
    lumped = np.asarray(models.mass.assemble(basis).sum(1)).ravel()
    A = (1e-3 * diags(1.0 / lumped) @ models.laplace.assemble(basis)).tocsr()[free]

    def whole(u: Any) -> Any:
        values = np.full((basis.N, *u.shape[1:]), -1.0)
        values[free] = u
        return values

    def jacobian(t: float, u: Any) -> Any:
        return (diags(5.0 - 15.0 * u**2) - A[:, free]).tocsc()

    run = solve_ivp(
        lambda t, u: 5.0 * (u - u**3) - A @ whole(u),
        (0.0, 1.0),
        start[free],
        method="Radau",
        jac=jacobian,
        rtol=1e-8,
        atol=1e-8,
        dense_output=True,
    )

    def u(x: Tensor) -> Tensor:
        times, which = np.unique(x[:, 1].numpy(), return_inverse=True)
        found = np.empty(len(x))
        for part in np.array_split(np.arange(len(times)), -(-len(times) // 512)):
            here = np.flatnonzero((which >= part[0]) & (which <= part[-1]))
            if len(here):
                values = whole(run.sol(times[part]))[:, which[here] - part[0]]
                probes = basis.probes(np.abs(x[here, 0].numpy())[None])
                found[here] = np.asarray(probes.multiply(values.T).sum(1)).ravel()
        return torch.from_numpy(found)

    return u


def _quadratic(nodes: Any) -> skfem.Basis:
    return skfem.Basis(skfem.MeshLine(nodes), skfem.ElementLineP2(), intorder=4)
