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


@cache
def _korteweg_de_vries(modes: int = 512, steps: int = 4000) -> PeriodicSolution:
    nodes = -1.0 + 2.0 * np.arange(modes) / modes
    k = np.pi * np.fft.fftfreq(modes, 1.0 / modes)
    k[modes // 2] = 0.0  # of a real function this mode has no derivative

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
