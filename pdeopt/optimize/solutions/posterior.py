"""What data say beside the prior: the posterior of a Bayesian inverse problem, near its most probable point.

J is the negative logarithm of the posterior density: misfit + |d - d_0|_P^2 / 2 of design variables d with a Gaussian
prior of precision P. Around its minimum the posterior is N(d, H^-1) with the reduced Hessian H = H_misfit + P (Laplace;
exact where the equation and the misfit are quadratic in d). Sensors see few directions: with H_misfit v_j = mu_j P v_j,
v_i'P v_j = 1 for i = j, else 0, and the mu_j that are not small,

    H^-1 = P^-1 - sum_j mu_j / (1 + mu_j) v_j v_j',    samples  d + (I - sum_j (1 - (1 + mu_j)^-1/2) v_j v_j'P) x,

x a sample of N(0, P^-1). (T. Bui-Thanh, O. Ghattas, J. Martin, G. Stadler, A computational framework for
infinite-dimensional Bayesian inverse problems, part I, SIAM J. Sci. Comput. 35, 2013.) The pairs are found from random
directions by two products each: A. K. Saibaba, J. Lee, P. K. Kitanidis, Randomized algorithms for generalized Hermitian
eigenvalue problems, Numer. Linear Algebra Appl. 23 (2016), in blocks until the mu_j are small.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from pdeopt.control.metric import RieszMetric
from pdeopt.control.problem import ControlProblem
from pdeopt.control.reduced import reduced_hessian
from pdeopt.core.arrays import Array, copy
from pdeopt.core.autodiff import plainly
from pdeopt.core.errors import InputError
from pdeopt.core.monitor import ControlResult
from pdeopt.optimize.solutions.precision import Precision
from pdeopt.optimize.solutions.sensitivity import require_solution
from pdeopt.steps.timegrid import require_whole_steps

#: Directions of a block.
BLOCK = 20

#: Eigenvalues of H - P below the negative of this, or of rounding, say that P is not in the objective.
NEGATIVE, ROUNDING = 1e-3, 1e-8


class Posterior:
    """N(d, H^-1) for the design variables d = [z | p] of a solution. Calls are collective.

    A product with H_misfit is a sweep forward and one backward over time. On several ranks there are parameters alone,
    no controls, and arrays are the same on all.

    Args:
        problem: with the misfit (`Tracking` with the weight 1 / variance of a measurement) and the prior in its
            objective.
        result: its minimum, without bounds.
        precision: P of the prior, (size, size), scipy or dense; the identity for white noise, as with
            `lowrank.GaussianPrior.field`.
        tol: pairs with |mu| below it are left out: the covariance is then right to tol times that of the prior.
        rank: most pairs; None for as many as the tolerance asks for.
        gauss_newton: leave the equation's curvature out of H, which is then positive, and mu_j >= 0.
        seed: of the random directions.

    Attributes:
        mean: d, (size,).
        eigenvalues: mu_j, falling, (rank,): what data say about a direction, relative to the prior.
        directions: v_j, (size, rank).
        products: with H that were taken.

    Raises:
        InputError: a result that did not converge, or of another problem; a precision that is none, or that the
            objective does not have; controls on several ranks.
        SolveFailure: the state Jacobian is singular.

    Example:
        >>> posterior = Posterior(problem, solve(problem), precision=alpha * stiffness + beta * mass)
        >>> posterior.variance() ** 0.5, posterior.sample(10)
    """

    @plainly
    def __init__(
        self,
        problem: ControlProblem,
        result: ControlResult,
        precision: Any,
        *,
        tol: float = 1e-3,
        rank: int | None = None,
        gauss_newton: bool = True,
        seed: int = 0,
    ) -> None:
        self.problem, self._lin = problem, problem.at(problem.join(result.state, result.design))
        layout, grid = problem.layout, problem.grid
        require_whole_steps(grid, "a posterior")
        if grid.mpi.size > 1 and float(grid.max(torch.tensor(float(layout.control_size)))) > 0:
            raise InputError("ranks of a posterior", f"{grid.mpi.size}, with controls", "1, or parameters alone")
        gradient = self._lin.lagrangian_gradient(result.multiplier)
        require_solution(RieszMetric(problem), self._lin, result, gradient)
        self._lam = None if gauss_newton else layout.rows(result.multiplier)
        self.mean: Array = self._on_all_ranks(copy(result.design))
        self.prior = Precision(precision, len(self.mean))
        self.products = 0
        draw, most = np.random.default_rng(seed), min(rank or len(self.mean), len(self.mean))
        self.eigenvalues, self.directions = self._pairs(draw, most, tol)

    def _on_all_ranks(self, design: Any) -> Array:
        if self.problem.grid.mpi.size == 1:
            return np.array(design)
        return np.array(self.problem.layout.on_all_ranks(design))

    def misfit(self, d: Array) -> Array:
        """H_misfit times the columns of d, (size, k)."""
        size, columns = self.problem.layout.design_size, []
        for each in np.ascontiguousarray(d.T):
            product = reduced_hessian(self.problem, self._lin, self._lam, torch.from_numpy(each)[:size])
            columns.append(self._on_all_ranks(product))
        self.products += len(columns)
        return np.stack(columns, axis=1) - self.prior.multiply(d)

    def _whitened(self, q: Array) -> Array:
        """R^-1 H_misfit R^-T q, with P = R R'."""
        return self.prior.whiten(self.misfit(self.prior.sample(q)))

    def _pairs(self, draw: np.random.Generator, most: int, tol: float) -> tuple[Array, Array]:
        """mu_j and v_j = R^-T q_j: blocks of orthonormal directions Q until one of their eigenvalues is small."""
        n = len(self.mean)
        Q, HQ = np.zeros((n, 0)), np.zeros((n, 0))
        while True:
            Y = self._whitened(draw.standard_normal((n, min(BLOCK, n - Q.shape[1]))))
            for _ in range(2):
                Y, _ = np.linalg.qr(Y - Q @ (Q.T @ Y))
            Q, HQ = np.hstack([Q, Y]), np.hstack([HQ, self._whitened(Y)])
            T = Q.T @ HQ
            mu, S = np.linalg.eigh(0.5 * (T + T.T))
            if mu[0] < -(max(NEGATIVE, ROUNDING * mu[-1]) if self._lam is None else 1.0):
                legal = "that of a prior which is part of the objective; gauss_newton=True"
                raise InputError("precision", f"one with which data have the eigenvalue {mu[0]:.2e}", legal)
            if np.abs(mu).min() < tol or Q.shape[1] >= min(n, most + BLOCK // 2):
                break
        order = np.argsort(-np.abs(mu))
        keep = np.sort(order[np.abs(mu[order]) >= tol][:most])[::-1]
        return mu[keep], self.prior.sample(Q @ S[:, keep])

    # -- what it says ------------------------------------------------------------------------------------------

    def covariance(self, w: Any) -> Array:
        """H^-1 w, for (size,) or (size, k)."""
        w, V, mu = np.asarray(w, dtype=float), self.directions, self.eigenvalues
        found: Array = self.prior.solve(w) - (V * (mu / (1.0 + mu))) @ (V.T @ w)
        return found

    def variance(self) -> Array:
        """The diagonal of H^-1, (size,)."""
        mu = self.eigenvalues
        found: Array = self.prior.variance() - self.directions**2 @ (mu / (1.0 + mu))
        return found

    def sample(self, count: int, seed: int = 0) -> Array:
        """Independent samples, (count, size)."""
        noise = np.random.default_rng(seed).standard_normal((len(self.mean), count))
        x, V = self.prior.sample(noise), self.directions
        x = x - (V * (1.0 - (1.0 + self.eigenvalues) ** -0.5)) @ (V.T @ self.prior.multiply(x))
        found: Array = (self.mean[:, None] + x).T
        return found

    def information(self) -> float:
        """Half the sum of log(1 + mu_j): by how much data reduce the entropy of the prior, in nats."""
        return float(0.5 * np.log1p(self.eigenvalues).sum())
