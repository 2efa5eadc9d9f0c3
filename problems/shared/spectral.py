"""Solutions of periodic equations u_t = L u + N(u) by Fourier modes and exponential Runge-Kutta steps.

S. M. Cox, P. C. Matthews, Exponential time differencing for stiff systems, J. Comput. Phys. 176, 2002: ETDRK4, with the
coefficients as means over a circle (A.-K. Kassam, L. N. Trefethen, SIAM J. Sci. Comput. 26, 2005).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

#: Points of the circle around L dt.
CIRCLE = 64


def exponential_steps(
    linear: Any, nonlinear: Callable[[Any], Any], start: Any, dt: float, steps: int, every: int
) -> list[Any]:
    """Fourier coefficients after 0, every, 2 every, ... steps.

    Args:
        linear: L, a number a mode, (modes,).
        nonlinear: coefficients of N(u) from those of u, (modes,).
        start: coefficients, (modes,).
        dt: of a step.
        steps: how many.
        every: steps between those that are kept.
    """
    z = dt * linear
    circle = z[:, None] + np.exp(2j * np.pi * (np.arange(CIRCLE) + 0.5) / CIRCLE)
    grown = np.exp(circle)

    def mean(values: Any) -> Any:
        return dt * values.mean(1)

    half, whole = np.exp(0.5 * z), np.exp(z)
    q = mean((np.exp(0.5 * circle) - 1.0) / circle)
    first = mean((-4.0 - circle + grown * (4.0 - 3.0 * circle + circle**2)) / circle**3)
    middle = mean((2.0 + circle + grown * (circle - 2.0)) / circle**3)
    last = mean((-4.0 - 3.0 * circle - circle**2 + grown * (4.0 - circle)) / circle**3)
    v, found = start, [start]
    for step in range(1, steps + 1):
        n = nonlinear(v)
        a = half * v + q * n
        n_a = nonlinear(a)
        n_b = nonlinear(half * v + q * n_a)
        n_c = nonlinear(half * a + q * (2.0 * n_b - n))
        v = whole * v + first * n + 2.0 * middle * (n_a + n_b) + last * n_c
        if step % every == 0:
            found.append(v)
    return found


class PeriodicSolution:
    """x -> u(x, t), by Fourier modes at times and, between, the polynomial of exp(-W t) u through six of them.

    Args:
        coefficients: (times, modes), of exp(2 pi i k (x - low) / period) / modes.
        waves: W, (modes,), imaginary: L, where it is what changes the modes most.
        low, period: of x.
        end: the last time; the first is 0.
    """

    def __init__(self, coefficients: Any, waves: Any, low: float, period: float, end: float) -> None:
        self.waves, self.low, self.period, self.end = waves, low, period, end
        times = np.linspace(0.0, end, len(coefficients))
        self.slow = np.exp(-times[:, None] * waves) * np.asarray(coefficients)

    def __call__(self, x: Tensor) -> Any:
        """u at points, (n, 2): (n,), complex."""
        points = x.numpy()
        found = np.empty(len(points), dtype=complex)
        modes = self.slow.shape[1]
        k = np.fft.fftfreq(modes, 1.0 / modes)
        times, which = np.unique(points[:, 1], return_inverse=True)
        for place, t in enumerate(times):
            here = np.flatnonzero(which == place)
            waves = np.exp(2j * np.pi * np.outer(points[here, 0] - self.low, k) / self.period)
            found[here] = waves @ self._at(t) / modes
        return found

    def _at(self, t: float) -> Any:
        """Coefficients at a time, (modes,)."""
        last = len(self.slow) - 1
        place = t / self.end * last
        first = min(max(math.floor(place) - 2, 0), last - 5)
        nodes = np.arange(first, first + 6)
        weights = [np.prod([(place - other) / (node - other) for other in nodes if other != node]) for node in nodes]
        return np.exp(t * self.waves) * (np.array(weights) @ self.slow[first : first + 6])


def korteweg_de_vries(x: Tensor) -> Tensor:
    """u_t + u u_x + 0.0025 u_xxx = 0, u(x, 0) = cos(pi x), of period 2; columns of `x` are x, t <= 1."""
    return torch.from_numpy(_korteweg_de_vries()(x).real.copy())


def schroedinger(x: Tensor) -> Tensor:
    """i h_t + h_xx / 2 + |h|^2 h = 0, h(x, 0) = 2 / cosh x, of period 10; columns of `x` are x, t <= pi/2.

    Returns:
        real and imaginary part, (2, n).
    """
    h = _schroedinger()(x)
    return torch.from_numpy(np.stack([h.real, h.imag]))


def kuramoto_sivashinsky(x: Tensor) -> Tensor:
    """u_t + (5/pi) u u_x + (5/3)/pi^2 u_xx + (5/27)/pi^4 u_xxxx = 0, u(x, 0) = -sin(pi x), of period 2, t <= 1.

    The coefficients are those of a published file of solutions, found from it by least squares: with y = 3 pi x,
    s = 15 t it is u_s + u u_y + u_yy + u_yyyy = 0.
    """
    return torch.from_numpy(_kuramoto_sivashinsky()(x).real.copy())


def cahn_hilliard(x: Tensor) -> Tensor:
    """u_t = (0.01 (u^3 - u) - 1e-5 u_xx)_xx, u(x, 0) = -cos(2 pi x), of period 2; columns of `x` are x, t <= 1."""
    return torch.from_numpy(_cahn_hilliard()(x).real.copy())


@cache
def _kuramoto_sivashinsky(modes: int = 128, steps: int = 4000) -> PeriodicSolution:
    nodes, k = _circle(modes)
    linear = 5.0 / 3.0 / math.pi**2 * k**2 - 5.0 / 27.0 / math.pi**4 * k**4

    def transport(v: Any) -> Any:
        return -2.5j / math.pi * k * np.fft.fft(np.fft.ifft(v).real ** 2)

    found = exponential_steps(linear, transport, np.fft.fft(-np.sin(np.pi * nodes)), 1.0 / steps, steps, 5)
    return PeriodicSolution(found, np.zeros(modes), -1.0, 2.0, 1.0)


@cache
def _cahn_hilliard(modes: int = 256, steps: int = 4000) -> PeriodicSolution:
    """The part of u^3 that is linear at |u| = 1, 3 u, belongs to L: so explicit steps have no stiff part."""
    nodes, k = _circle(modes)

    def reaction(v: Any) -> Any:
        return -1e-2 * k**2 * (np.fft.fft(np.fft.ifft(v).real ** 3) - 3.0 * v)

    linear = -2e-2 * k**2 - 1e-5 * k**4
    found = exponential_steps(linear, reaction, np.fft.fft(-np.cos(2.0 * np.pi * nodes)), 1.0 / steps, steps, 20)
    return PeriodicSolution(found, np.zeros(modes), -1.0, 2.0, 1.0)


def _circle(modes: int) -> tuple[Any, Any]:
    """Nodes of the interval (-1, 1), and wave numbers, without that of a mode whose derivative is not seen."""
    k = np.pi * np.fft.fftfreq(modes, 1.0 / modes)
    k[modes // 2] = 0.0
    return -1.0 + 2.0 * np.arange(modes) / modes, k


@cache
def _korteweg_de_vries(modes: int = 512, steps: int = 4000) -> PeriodicSolution:
    nodes, k = _circle(modes)

    def transport(v: Any) -> Any:
        return -0.5j * k * np.fft.fft(np.fft.ifft(v).real ** 2)

    start = np.fft.fft(np.cos(np.pi * nodes))
    linear = 0.0025j * k**3
    found = exponential_steps(linear, transport, start, 1.0 / steps, steps, 5)
    return PeriodicSolution(found, np.zeros(modes), -1.0, 2.0, 1.0)


@cache
def _schroedinger(modes: int = 512, steps: int = 8000) -> PeriodicSolution:
    nodes = -5.0 + 10.0 * np.arange(modes) / modes
    k = 0.2 * np.pi * np.fft.fftfreq(modes, 1.0 / modes)

    def reaction(v: Any) -> Any:
        h = np.fft.ifft(v)
        return 1j * np.fft.fft(np.abs(h) ** 2 * h)

    start = np.fft.fft(2.0 / np.cosh(nodes)).astype(complex)
    linear, end = -0.5j * k**2, 0.5 * np.pi
    found = exponential_steps(linear, reaction, start, end / steps, steps, 4)
    return PeriodicSolution(found, linear, -5.0, 10.0, end)
