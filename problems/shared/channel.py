"""The flow around a cylinder in a channel of M. Schaefer and S. Turek, and a mesh for it without a mesh generator.

(Benchmark computations of laminar flow around a cylinder, in Flow Simulation with High-Performance Computers II, 1996:
case 2D-1 has Reynolds number 20 and a stationary drag coefficient between 5.57 and 5.59; with spectral accuracy
5.57953523384, G. Nabh, On high order methods for the stationary incompressible Navier-Stokes equations, 1998.)
"""

from __future__ import annotations

import numpy as np

from pdeopt.core.arrays import Array

#: Of the channel and the cylinder in it; mean velocity of the inflow.
LENGTH, HEIGHT, RADIUS, CENTER, SPEED = 2.2, 0.41, 0.05, (0.2, 0.2), 0.2

#: Force to coefficient: 2 / (SPEED^2 diameter), the density is 1.
TO_COEFFICIENT = 1 / (SPEED**2 * RADIUS)


def inflow(x: Array) -> Array:
    """Parabola of mean SPEED: points (3, k) -> (2, k)."""
    return np.stack([6 * SPEED * x[1] * (HEIGHT - x[1]) / HEIGHT**2, 0 * x[0]])


def channel_mesh(n: int) -> tuple[Array, Array]:
    """Triangles around the cylinder in rings, finer toward it, and behind in columns.

    Args:
        n: intervals along each side of the square around the cylinder, whose 4 n are those of the cylinder.

    Returns:
        points (k, 2), and the points of triangles (c, 3).
    """
    side, zero = np.arange(n) / n * HEIGHT, np.zeros(n)
    ends = [(side, zero), (zero + HEIGHT, side), (HEIGHT - side, zero + HEIGHT), (zero, HEIGHT - side)]
    square = np.concatenate([np.stack(each, axis=1) for each in ends])
    angle = np.arctan2(square[:, 1] - CENTER[1], square[:, 0] - CENTER[0])
    circle = np.array(CENTER) + RADIUS * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    outward = np.concatenate([[0.0], np.cumsum((1 + 2 / n) ** np.arange(n))])
    rings = circle + (outward / outward[-1])[:, None, None] * (square - circle)
    number = np.arange(rings[..., 0].size).reshape(n + 1, 4 * n)
    around = np.concatenate([number, number[:, :1]], axis=1)
    columns = max(round((LENGTH - HEIGHT) / HEIGHT * n / 2), 2)
    x, y = np.linspace(HEIGHT, LENGTH, columns + 1)[1:], np.linspace(0, HEIGHT, n + 1)
    behind = np.stack(np.meshgrid(x, y, indexing="ij"), axis=-1)
    later = number.size + np.arange(behind[..., 0].size).reshape(columns, n + 1)
    grids = around, np.concatenate([number[-1:, n : 2 * n + 1], later])
    return np.concatenate([rings.reshape(-1, 2), behind.reshape(-1, 2)]), np.concatenate(list(map(_cut, grids)))


def _cut(grid: Array) -> Array:
    """Two triangles for each cell of a grid of points."""
    corners = np.stack([grid[:-1, :-1], grid[1:, :-1], grid[1:, 1:], grid[:-1, 1:]], axis=-1).reshape(-1, 4)
    return np.concatenate([corners[:, [0, 1, 2]], corners[:, [0, 2, 3]]])
