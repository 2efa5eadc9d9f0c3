"""Kernels: positive semidefinite functions of two points, evaluated by blocks.

Formulas as in C. E. Rasmussen, C. K. I. Williams, Gaussian Processes for Machine Learning, MIT Press 2006, chapter 4.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pdeopt.core.errors import InputError
from pdeopt.functions.border import number

#: Double precision.
Array = NDArray[np.float64]

#: Dimensions up to which squared distances are summed by coordinate, without cancellation.
FEW = 16


class Kernel(ABC):
    """k(x, y), symmetric and positive semidefinite: the matrix of any points has no negative eigenvalue.

    A subclass writes `block`, and `diagonal` where k(x, x) is not 1.

    Args:
        width: length over which k falls, in the unit of the points.

    Raises:
        InputError: a width that is not positive and finite.

    Example:
        >>> K = Gaussian(0.2).block(x, x)                     # x (n, d), K (n, n)
    """

    def __init__(self, width: float) -> None:
        self.width = require_positive("width of a kernel", width)

    @abstractmethod
    def block(self, x: Array, y: Array) -> Array:
        """k of all pairs: (..., m, d) and (..., n, d) give (..., m, n)."""

    def diagonal(self, x: Array) -> Array:
        """k(x, x) of points (..., d): (...)."""
        return np.ones(x.shape[:-1])


class Gaussian(Kernel):
    """exp(-|x - y|^2 / (2 width^2)): infinitely smooth; scikit-learn's `rbf` with gamma = 1 / (2 width^2)."""

    def block(self, x: Array, y: Array) -> Array:
        """k of all pairs: (..., m, d) and (..., n, d) give (..., m, n)."""
        found = squared_distances(x, y, exact=False)
        found *= -0.5 / self.width**2
        return np.exp(found, out=found)


class Matern(Kernel):
    """Of smoothness nu = 1/2, 3/2 or 5/2 in r = |x - y| / width: samples are nu - 1/2 times differentiable.

    exp(-r), (1 + s) exp(-s) with s = sqrt(3) r, (1 + s + s^2/3) exp(-s) with s = sqrt(5) r.
    With nu = d/2 + 1/2 in few dimensions close to the inverse of a PDE's operator, (1/width^2 - Laplacian)^(nu + d/2).

    Args:
        width: as of a Kernel.
        smoothness: 0.5, 1.5 or 2.5.

    Raises:
        InputError: another smoothness.
    """

    def __init__(self, width: float, smoothness: float = 1.5) -> None:
        super().__init__(width)
        if smoothness not in (0.5, 1.5, 2.5):
            raise InputError("smoothness of a Matern kernel", smoothness, "0.5 | 1.5 | 2.5")
        self.smoothness = smoothness

    def block(self, x: Array, y: Array) -> Array:
        """k of all pairs: (..., m, d) and (..., n, d) give (..., m, n)."""
        squares = squared_distances(x, y)
        squares *= 2.0 * self.smoothness / self.width**2
        s: Array = np.sqrt(squares)
        decay: Array = np.exp(-s)
        if self.smoothness == 0.5:
            return decay
        decay *= 1.0 + s if self.smoothness == 1.5 else 1.0 + s + squares / 3.0
        return decay


class Laplace(Kernel):
    """exp(-|x - y|_1 / width), the product of one-dimensional ones; scikit-learn's `laplacian`, gamma = 1 / width."""

    def block(self, x: Array, y: Array) -> Array:
        """k of all pairs: (..., m, d) and (..., n, d) give (..., m, n)."""
        if x.shape[-1] > FEW:
            found: Array = torch.cdist(torch.from_numpy(x), torch.from_numpy(y), p=1.0).numpy()
        else:
            found = _sum_over_coordinates(np.abs, x, y)
        found *= -1.0 / self.width
        return np.exp(found, out=found)


class Polynomial(Kernel):
    """(x.y / width^2 + offset)^degree: its matrix has at most binomial(d + degree, degree) nonzero eigenvalues.

    Args:
        width: as of a Kernel.
        degree: >= 1.
        offset: >= 0, as a negative one would not be positive semidefinite.

    Raises:
        InputError: degree or offset beyond these.
    """

    def __init__(self, width: float, degree: int = 3, offset: float = 1.0) -> None:
        super().__init__(width)
        if not (isinstance(degree, int) and degree >= 1):
            raise InputError("degree of a polynomial kernel", degree, "an integer >= 1")
        if not (math.isfinite(offset) and offset >= 0.0):
            raise InputError("offset of a polynomial kernel", offset, "a finite number >= 0")
        self.degree, self.offset = degree, offset

    def block(self, x: Array, y: Array) -> Array:
        """k of all pairs: (..., m, d) and (..., n, d) give (..., m, n)."""
        found: Array = (x @ np.swapaxes(y, -1, -2) / self.width**2 + self.offset) ** self.degree
        return found

    def diagonal(self, x: Array) -> Array:
        """k(x, x) of points (..., d): (...)."""
        found: Array = (np.sum(x * x, axis=-1) / self.width**2 + self.offset) ** self.degree
        return found


KERNELS: dict[str, Any] = {"gaussian": Gaussian, "matern": Matern, "laplace": Laplace, "polynomial": Polynomial}


def kernel_of(name: str, width: float, **shape: Any) -> Kernel:
    """A kernel by its name, as options give it.

    Args:
        name: gaussian | matern | laplace | polynomial.
        width: as of a Kernel.
        shape: further arguments of that kernel.

    Raises:
        InputError: another name, or arguments that are not legal.
    """
    if name not in KERNELS:
        raise InputError("kernel", name, " | ".join(KERNELS))
    found: Kernel = KERNELS[name](width, **shape)
    return found


def squared_distances(x: Array, y: Array, exact: bool = True) -> Array:
    """|x - y|^2 of all pairs: (..., m, d) and (..., n, d) give (..., m, n).

    By |x|^2 - 2 x.y + |y|^2 about the mean of y, a product of matrices; where it is to be exact, for a function that is
    not smooth at 0, by coordinate in few dimensions, and 0 below the rounding of that sum in many.
    """
    if x.shape[-1] <= FEW and (exact or 1 in (x.shape[-2], y.shape[-2])):
        return _sum_over_coordinates(np.square, x, y)
    origin = y.sum(axis=-2, keepdims=True) / max(1, y.shape[-2])
    x, y = x - origin, y - origin
    x_squares, y_squares = (np.einsum("...nd,...nd->...n", each, each)[..., None] for each in (x, y))
    left = np.concatenate([x, x_squares, np.ones_like(x_squares)], axis=-1)
    right = np.concatenate([-2.0 * y, np.ones_like(y_squares), y_squares], axis=-1)
    found: Array = left @ np.swapaxes(right, -1, -2)
    if exact:
        found[found < 8.0 * np.finfo(found.dtype).eps * (x_squares + np.swapaxes(y_squares, -1, -2))] = 0.0
    return found


def _sum_over_coordinates(function: np.ufunc, x: Array, y: Array) -> Array:
    """sum_k function(x_k - y_k) of all pairs."""
    total: Array = np.empty(0)
    for k in range(x.shape[-1]):
        each = x[..., :, None, k] - y[..., None, :, k]
        function(each, out=each)
        total = np.add(total, each, out=total) if k else each
    return total


def require_positive(what: str, value: Any) -> float:
    """A positive finite number.

    Args:
        what: it is, for the error.
        value: what was given.

    Raises:
        InputError: anything else.
    """
    found = number(value, what)
    if not (math.isfinite(found) and found > 0.0):
        raise InputError(what, found, "a finite number > 0")
    return found
