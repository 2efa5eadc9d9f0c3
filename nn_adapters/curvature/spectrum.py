"""Spectra of curvature without a matrix: Lanczos, the largest eigenvalue, and densities by random probes.

A symmetric matrix A is a function v -> A v. From a start q_1 of length 1, k steps of Lanczos give orthonormal vectors
Q = [q_1 ... q_k] with Q'AQ = T tridiagonal. The eigenvalues of T approximate those of A, the outer ones first. With the
squares of the first entries of T's eigenvectors as weights they are the Gauss quadrature of q_1's distribution over the
eigenvalues of A, exact for polynomials of degree 2k - 1 (G. H. Golub, G. Meurant, Matrices, moments and quadrature,
2010).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nn_adapters.layers.parallelmodule import mgrit_solvers
from pdeopt.core.arrays import Array
from pdeopt.core.errors import InputError
from pdeopt.core.memory import require_memory

#: A v, (size,), from v.
Product = Callable[[Tensor], Tensor]

#: An off-diagonal entry of T below this part of its largest entry: the vectors span an invariant subspace.
INVARIANT = 1e-10


class HessianMatrix:
    """The Hessian of a loss by the parameters of a network, at the present ones, as products with flat vectors.

    The parameters must stay while it is used. Vectors have the order of `network.parameters()`, without frozen ones.
    Buffers, as running means are, stay as they were.

    Args:
        network: any module whose layers go one after the other.
        loss: of outputs and targets, the mean over the samples of a part.
        samples: (inputs, targets) of each part; the loss is the mean over all samples.

    Attributes:
        size: of a vector.

    Raises:
        InputError: layers solved in parallel, which have first derivatives alone.
    """

    def __init__(
        self, network: nn.Module, loss: Callable[[Tensor, Any], Tensor], samples: Sequence[tuple[Tensor, Any]]
    ) -> None:
        if mgrit_solvers(network):
            raise InputError("network", "layers solved in parallel", "serial_network(network)")
        self.parameters = [p for p in network.parameters() if p.requires_grad]
        self.size = sum(p.numel() for p in self.parameters)
        self.network, self.loss, self.samples = network, loss, samples
        self._gradients: list[Tensor] = []  # of the parts, with their graphs, for many products at one point

    def times(self, v: Tensor) -> Tensor:
        """H v, (size,): the derivative of g.v, one backward pass through value and gradient g."""
        if not self._gradients:
            self._gradients = [self._gradient(*part) for part in self.samples]
        total, count = torch.zeros_like(v), sum(len(x) for x, _ in self.samples)
        for (x, _), g in zip(self.samples, self._gradients):
            found = torch.autograd.grad(g, self.parameters, v, retain_graph=True, materialize_grads=True)
            total.add_(torch.cat([each.reshape(-1) for each in found]), alpha=len(x) / count)
        return total

    def _gradient(self, x: Tensor, y: Any) -> Tensor:
        with torch.enable_grad():
            buffers = {name: buffer.clone() for name, buffer in self.network.named_buffers()}
            value = self.loss(torch.func.functional_call(self.network, buffers, (x,)), y)
            found = torch.autograd.grad(value, self.parameters, create_graph=True, materialize_grads=True)
            return torch.cat([each.reshape(-1) for each in found])


@dataclass(frozen=True)
class Tridiagonal:
    """What Lanczos leaves: T, and how far its eigenvectors are from being those of A.

    Attributes:
        diagonal: of T, (k,).
        beside: its off-diagonal entries, (k - 1,).
        rest: the entry that would follow; 0 where the space is invariant.
    """

    diagonal: Array
    beside: Array
    rest: float

    def eigen(self) -> tuple[Array, Array]:
        """Eigenvalues of T, ascending, and its eigenvectors as columns."""
        k = len(self.diagonal)
        T = np.diag(self.diagonal) + np.diag(self.beside, 1) + np.diag(self.beside, -1)
        assert T.shape == (k, k)
        return np.linalg.eigh(T)


def lanczos(
    times: Product, start: Tensor, steps: int, done: Callable[[Tridiagonal], bool] | None = None
) -> Tridiagonal:
    """Steps of Lanczos, with all vectors kept orthogonal by Gram and Schmidt, twice.

    Args:
        times: the matrix.
        start: q_1, of any length but 0, (size,).
        steps: k at most, at least 1; it ends before, where the vectors span an invariant subspace.
        done: ends it after a step; by default nothing does.

    Raises:
        InputError: a start that is zero or not finite, a product that is not finite, or fewer than one step.
    """
    norm = float(start.norm())
    if steps < 1 or not 0.0 < norm < float("inf"):
        raise InputError("start and steps of Lanczos", f"a norm of {norm} and {steps}", "finite, > 0, and at least 1")
    steps = min(steps, len(start))
    require_memory(steps * start.nbytes, "steps of Lanczos", steps, "fewer")
    Q, diagonal, beside = start.new_empty(steps, len(start)), list[float](), list[float]()
    Q[0] = start / norm
    for k in range(steps):
        w = times(Q[k])
        diagonal.append(float(w @ Q[k]))
        for _ in range(2):
            w = w - (Q[: k + 1] @ w) @ Q[: k + 1]
        rest = float(w.norm())
        if not np.isfinite(diagonal[-1] + rest):
            raise InputError("product of Lanczos", f"{diagonal[-1]}, {rest} in step {k + 1}", "finite numbers")
        if rest <= INVARIANT * max(map(abs, [*diagonal, *beside])):
            rest = 0.0
        found = Tridiagonal(np.array(diagonal), np.array(beside), rest)
        if rest == 0.0 or k + 1 == steps or (done is not None and done(found)):
            break
        beside.append(rest)
        Q[k + 1] = w / rest
    return found


@dataclass(frozen=True)
class Eigenvalue:
    """An approximation of the largest eigenvalue.

    Attributes:
        value: of T, never above that of A.
        error: an eigenvalue of A is at most this far from it.
        converged: whether the error is as small as was asked.
        products: with A.
    """

    value: float
    error: float
    converged: bool
    products: int


def largest_eigenvalue(times: Product, start: Tensor, rtol: float = 1e-2, max_products: int = 50) -> Eigenvalue:
    """The largest eigenvalue of a symmetric matrix, by Lanczos: of a Hessian, the sharpness.

    Args:
        times: the matrix.
        start: of Lanczos; one that is orthogonal to the wanted eigenvector would miss it: draw it, as
            `torch.randn(size)`.
        rtol: error by |value|.
        max_products: at most; what is found then says that it has not converged.

    Raises:
        InputError: see `lanczos`.
    """
    found = lanczos(times, start, max_products, lambda T: _largest(T, rtol).converged)
    return _largest(found, rtol)


def _largest(T: Tridiagonal, rtol: float) -> Eigenvalue:
    values, vectors = T.eigen()
    error = T.rest * abs(float(vectors[-1, -1]))
    value = float(values[-1])
    return Eigenvalue(value, error, error <= rtol * abs(value), len(values))


@dataclass(frozen=True)
class Spectrum:
    """A distribution over eigenvalues: points and weights, whose sum is 1.

    Attributes:
        values: (points,), ascending.
        weights: (points,); `size * weights` counts eigenvalues.
        size: of the matrix.
    """

    values: Array
    weights: Array
    size: int

    def moment(self, power: int) -> float:
        """Approximate trace of A^power / size."""
        return float(self.weights @ self.values**power)

    def share_above(self, value: float) -> float:
        """Share of the eigenvalues above a value."""
        return float(self.weights[self.values > value].sum())


def spectral_density(
    times: Product, size: int, steps: int = 40, probes: int = 4, seed: int = 0, like: Tensor | None = None
) -> Spectrum:
    """The distribution of the eigenvalues of a symmetric matrix, by stochastic Lanczos quadrature.

    Each probe is a random vector of signs; the mean over probes of its distribution over the eigenvalues is that of all
    eigenvalues, each with weight 1 / size (L. Lin, Y. Saad, C. Yang, Approximating spectral densities of large
    matrices, SIAM Review 58, 2016; B. Ghorbani, S. Krishnan, Y. Xiao, ICML 2019, for Hessians of networks).

    Args:
        times: the matrix, (size, size).
        steps: of Lanczos for each probe.
        probes: their number, at least 1; an integral over the spectrum is found to O(1 / sqrt(size probes)).
        seed: of the probes.
        like: a tensor of the type of vectors; double precision by default.

    Raises:
        InputError: no probes, and see `lanczos`.
    """
    if probes < 1 or size < 1:
        raise InputError("probes and size of a spectrum", f"{probes} and {size}", "at least 1")
    generator = torch.Generator().manual_seed(seed)
    like = torch.empty(0, dtype=torch.float64) if like is None else like
    values, weights = [], []
    for _ in range(probes):
        start = (2.0 * torch.randint(2, (size,), generator=generator) - 1.0).to(like)
        found, vectors = lanczos(times, start, steps).eigen()
        values.append(found)
        weights.append(vectors[0] ** 2 / probes)
    points, shares = np.concatenate(values), np.concatenate(weights)
    order = np.argsort(points)
    return Spectrum(points[order], shares[order], size)
