"""Kernels of many dimensions by features: phi(x).phi(y) ~ k(x, y), and least squares in them by sums over samples.

Where blocks of a kernel matrix have full rank, as those of images, a hierarchy is no gain, but the whole matrix may be
close to one of rank m << n. Regression then needs n m^2 multiplications and no n x n matrix: the sums of phi phi' and
y phi' over the samples, each rank's own, in one message (`SharedGrams`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pdeopt.core.errors import InputError
from pdeopt.lowrank.kernels import Array, Gaussian, Kernel, Laplace, Matern
from pdeopt.squares.sharedgrams import SharedGrams

#: Samples at a time.
CHUNK = 4096

#: Points a mean of k-means is taken of, on average.
PER_MEAN = 5


class KernelFeatures(ABC):
    """phi(x), (n, size), with phi(x).phi(y) ~ k(x, y).

    Features may be left in raw numbers that are cheap to have, with phi = T raw; sums over samples are of raw ones,
    and T comes to the sums.

    Attributes:
        size: of raw features, and of phi.
        transform: T (size, size); None for the identity.
    """

    size: int
    transform: Tensor | None = None

    @abstractmethod
    def raw(self, x: Tensor) -> Tensor:
        """Raw features (n, size) of points (n, d), in the precision of the points."""


class NystromFeatures(KernelFeatures):
    """phi(x) = T k(c, x), T'T = K_cc^-1, of some points c: k_xc K_cc^-1 k_cy, exact where x or y is one of them.

    C. Williams, M. Seeger, Using the Nystrom method to speed up kernel machines, NIPS 2000. Eigenvalues of K_cc below
    rounding are left out: centers may be equal.

    Args:
        kernel: k.
        centers: (m, d).

    Attributes:
        centers: as given.
    """

    def __init__(self, kernel: Kernel, centers: Array) -> None:
        self.kernel, self.centers, self.size = kernel, torch.from_numpy(centers), len(centers)
        self.transform = _inverse_root(torch.from_numpy(kernel.block(centers, centers)))

    def raw(self, x: Tensor) -> Tensor:
        """k(x, c)."""
        return torch.from_numpy(self.kernel.block(x.numpy(), self.centers.to(x).numpy()))


def k_means(points: Array, count: int, steps: int, seed: int = 0) -> Array:
    """Centers, (count, d), by Lloyd's steps from some of the points: they follow the data closer than points do.

    K. Zhang, I. W. Tsang, J. T. Kwok, Improved Nystrom low-rank approximation, ICML 2008. Five times as many points as
    centers take part; a center to which none is nearest stays.

    Args:
        points: (n, d).
        count: <= n.
        steps: with 0, or for as many centers as points, they are points.
        seed: of the points that are drawn.
    """
    drawn = np.random.default_rng(seed).permutation(len(points))[: PER_MEAN * count]
    if steps == 0 or count == len(points):
        some: Array = points[drawn[:count]]
        return some
    sample = torch.from_numpy(points[drawn]).float()
    centers = sample[:count].clone()
    for _ in range(steps):
        offsets = 0.5 * centers.square().sum(dim=1)
        nearest = torch.cat([(offsets - part @ centers.T).argmin(dim=1) for part in sample.split(CHUNK)])
        number = torch.bincount(nearest, minlength=count)[:, None]
        sums = torch.zeros_like(centers).index_add_(0, nearest, sample)
        centers = torch.where(number > 0, sums / number.clamp(min=1), centers)
    found: Array = centers.double().numpy()
    return found


def _inverse_root(matrix: Tensor) -> Tensor:
    """T with T'T = matrix^-1, or its pseudoinverse without the eigenvalues below rounding."""
    least = len(matrix) * torch.finfo(matrix.dtype).eps
    factor, info = torch.linalg.cholesky_ex(matrix)
    pivots = factor.diagonal().square()
    if int(info) == 0 and bool(pivots.min() > least * pivots.max()):
        inverse: Tensor = torch.linalg.solve_triangular(factor, torch.eye(len(matrix), dtype=matrix.dtype), upper=False)
        return inverse
    values, vectors = torch.linalg.eigh(matrix)
    roots = torch.where(values > least * values[-1], values.clamp(min=least * values[-1]).rsqrt(), 0.0)
    root: Tensor = roots[:, None] * vectors.T
    return root


class RandomFeatures(KernelFeatures):
    """sqrt(2 / m) cos(W x + b), W from the spectrum of a kernel of x - y, b uniform: k in the mean over W and b.

    A. Rahimi, B. Recht, Random features for large-scale kernel machines, NIPS 2007. Spectra: Gaussian; Student's t with
    2 nu degrees of freedom, of Matern; Cauchy by coordinate, of Laplace.

    Args:
        kernel: Gaussian, Matern or Laplace.
        dim: of the points.
        size: m; the error falls as m^(-1/2).
        seed: of the random numbers.

    Raises:
        InputError: another kernel.
    """

    def __init__(self, kernel: Kernel, dim: int, size: int, seed: int = 0) -> None:
        generator = np.random.default_rng(seed)
        if isinstance(kernel, Laplace):
            weights = generator.standard_cauchy((dim, size))
        elif isinstance(kernel, (Gaussian, Matern)):
            weights = generator.standard_normal((dim, size))
            if isinstance(kernel, Matern):
                weights /= np.sqrt(generator.chisquare(2.0 * kernel.smoothness, size) / (2.0 * kernel.smoothness))
        else:
            raise InputError("kernel of random features", type(kernel).__name__, "Gaussian | Matern | Laplace")
        self.size = size
        self.weights = torch.from_numpy(weights / kernel.width)
        self.offsets = torch.from_numpy(generator.uniform(0.0, 2.0 * np.pi, size))

    def raw(self, x: Tensor) -> Tensor:
        """sqrt(2 / m) cos(W x + b)."""
        found = x @ self.weights.to(x)
        return found.add_(self.offsets.to(x)).cos_().mul_((2.0 / self.size) ** 0.5)


class FeatureRidge:
    """min over w of sum_s |w.phi(x_s) - y_s|^2 + shift |w|^2: kernel ridge regression with the features' kernel.

    Args:
        features: phi.
        shift: lambda.
        comm: mpi4py communicator whose ranks share the samples; None for one rank.
        dtype: of features and of products over a chunk of samples, whose sums are in double precision.

    Attributes:
        weights: of raw features, (outputs, size), on each rank.
    """

    weights: Tensor

    def __init__(
        self, features: KernelFeatures, shift: float, comm: Any = None, dtype: torch.dtype = torch.float64
    ) -> None:
        self.features, self.shift, self.comm, self.dtype = features, shift, comm, dtype

    def fit(self, x: Array, y: Array) -> None:
        """Sum over this rank's samples, x (n, d) and y (n, outputs), and solve. Collective.

        Raises:
            SolveFailure: sums that are not finite.
        """
        grams = SharedGrams([(self.features.size, y.shape[1])], self.comm)
        for rows in range(0, len(x), CHUNK):
            chunk = slice(rows, rows + CHUNK)
            grams.add(0, self._raw(x[chunk]), torch.from_numpy(y[chunk]), product=self.dtype)
        samples = len(x) if self.comm is None else self.comm.allreduce(len(x))
        grams.reduce()
        for sums in grams.sums.values():
            if self.features.transform is not None:
                sums.transform(self.features.transform)
        (weights,) = grams.solve([self.shift / samples])  # sums are divided by the samples there
        self.weights = weights if self.features.transform is None else weights @ self.features.transform

    def predict(self, x: Array) -> Array:
        """w.phi(x), (n, outputs), at points (n, d)."""
        parts = [self._raw(x[rows : rows + CHUNK]).double() @ self.weights.T for rows in range(0, len(x), CHUNK)]
        found: Array = torch.cat([torch.zeros(0, len(self.weights), dtype=torch.float64), *parts]).numpy()
        return found

    def _raw(self, x: Array) -> Tensor:
        return self.features.raw(torch.from_numpy(x).to(self.dtype))
