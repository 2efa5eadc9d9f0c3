"""The Gaussian approximation of a posterior at its maximum: the directions in which the data say more than the prior.

With the prior's precision R and the Gauss-Newton Hessian H of the misfit, the generalized eigenvalues H v = lam R v say
how many times more the data know of the direction v than the prior did; where lam is below 1, nothing to speak of. The
posterior's covariance is R^-1 - sum_i lam_i / (1 + lam_i) v_i v_i'. (T. Bui-Thanh, O. Ghattas, J. Martin, G. Stadler, A
computational framework for infinite-dimensional Bayesian inverse problems, SIAM J. Sci. Comput. 35, 2013.)
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.linalg import cho_solve, eigh

from pdeopt.core.arrays import Array

#: A matrix times columns, (n, k) -> (n, k).
Product = Callable[[Array], Array]

#: Directions beyond those asked for.
OVERSAMPLING = 10


def leading_eigenpairs(product: Product, prior: Product, solve: Product, rank: int, n: int) -> tuple[Array, Array]:
    """The largest lam of H v = lam R v, by a randomized range of R^-1 H and a Rayleigh-Ritz step.

    (A. K. Saibaba, J. Lee, P. K. Kitanidis, Randomized algorithms for generalized Hermitian eigenvalue problems, Numer.
    Linear Algebra Appl. 23, 2016, algorithm 5: two products with H for each direction.)

    Args:
        product, prior, solve: H x, R x and R^-1 x.
        rank: number of eigenvalues.
        n: number of unknowns.

    Returns:
        (rank,), falling; and eigenvectors, (n, rank), orthonormal in R.
    """
    k = min(rank + OVERSAMPLING, n)
    drawn = np.random.default_rng(0).standard_normal((n, k))
    Q = solve(product(drawn))
    for _ in range(2):  # twice is enough for orthogonality to rounding
        Q, _ = np.linalg.qr(Q)
        Q = _orthonormal(Q, prior)
    values, rotation = eigh(Q.T @ product(Q))
    order = np.argsort(values)[::-1][:rank]
    return values[order], Q @ rotation[:, order]


def _orthonormal(Q: Array, prior: Callable[[Array], Array]) -> Array:
    """The columns made orthonormal in R, by a Cholesky factor of their Gram matrix."""
    factor = np.linalg.cholesky(Q.T @ prior(Q))
    return np.asarray(cho_solve((factor, True), Q.T).T @ factor)
