"""Burgers' reduced functional by hand, as a SciPy user writes it: no pdeopt, NumPy and LAPACK alone.

    min  sum_{i=0}^N w_i/2 |u_i - d_i|_M^2 + sum_{k=1}^N tau alpha/2 |z_k|_Q^2
    s.t. M (u_k - u_{k-1}) + tau [theta S(u_k) + (1 - theta) S(u_{k-1})] = tau B z_k

with P1 elements on (0, 1), S(u) = nu A u + N(u), u = 0 at both ends and controls at every node.
"""

from __future__ import annotations

import numpy as np
from scipy.linalg import solve_banded
from scipy.linalg.blas import dsbmv
from scipy.linalg.lapack import dgtsv, dgttrf, dgttrs, dpbtrf, dtbtrs

NEWTON_TOL = 1e-7  # on the last update, so that the error left is of order 1e-14
NEWTON_MAXIT = 30


class ReducedBurgers:
    """Hand-written reduced functional J(z): values, gradients, Hessian-vector products.

    Controls z and gradients are flat, nt * (nx + 1); states are stored as (nt + 1, nx + 1)
    with their zero end values.  N is quadratic in u, which shortens every formula below:
    N'(u) u = 2 N(u), and N'(u) is linear in u.  The state, the factorized step Jacobians
    and the adjoint of the last control are kept.
    """

    def __init__(self, nx, nt, nu=0.01, alpha=0.05, theta=1.0, flux=0.5, T=1.0):
        if not 0.0 < theta <= 1.0:
            raise ValueError("theta must lie in (0, 1]")
        self.nx, self.nt, self.nu, self.alpha = nx, nt, nu, alpha
        self.theta, self.flux = theta, flux
        self.h, self.tau, self.size = 1.0 / nx, T / nt, nt * (nx + 1)
        self.weights = np.full(nt + 1, self.tau)
        self.weights[[0, -1]] /= 2
        self.target = (2 * np.arange(nx + 1) <= nx).astype(float)
        self.target[0] = 0.0
        self.c = self.tau * theta * flux / 3
        stiffness = self.tau * theta * nu / self.h
        self.k_diag = 2 * self.h / 3 + 2 * stiffness  # M + tau theta nu A
        self.k_off = self.h / 6 - stiffness
        self.m_band = np.full((2, nx - 1), self.h / 6)  # M, upper band storage
        self.m_band[1] *= 4
        q_band = np.full((2, nx + 1), self.h / 6)  # Q, lower band storage
        q_band[0] *= 4
        q_band[0, [0, -1]] /= 2
        self.q_root, _ = dpbtrf(self.tau * q_band, lower=1)  # tau Q = L L'
        self._z = self._p = None
        self._u = np.tile(self.target, (nt + 1, 1))

    # The discrete operators; x, u, v, p hold all nodes along their last axis.

    def mass(self, x):
        """Q x for x (..., nx + 1); its inner entries are B x."""
        y = 4 * x
        y[..., [0, -1]] /= 2
        y[..., 1:] += x[..., :-1]
        y[..., :-1] += x[..., 1:]
        return self.h / 6 * y

    def flux_difference(self, u):
        """tau theta N(u), (nx - 1,), for u (nx + 1,)."""
        left, right = u[:-1], u[1:]
        total = left + right
        edge = self.c * (total * total - left * right)
        return edge[1:] - edge[:-1]

    def jacobian(self, u):
        """Diagonals (..., nx - 2), (..., nx - 1), (..., nx - 2) of G'(u), u (..., nx + 1)."""
        left, right = u[..., 1:-2], u[..., 2:-1]
        total = left + right
        return (
            self.k_off - self.c * (total + left),
            self.k_diag + self.c * (u[..., 2:] - u[..., :-2]),
            self.k_off + self.c * (total + right),
        )

    def curvature(self, v, q):
        """tau theta N'(v)' q, (..., nx - 1), for v and q (..., nx + 1), q = 0 at the ends."""
        jump = self.c * (q[..., :-1] - q[..., 1:])
        total = v[..., :-1] + v[..., 1:]
        return ((total + v[..., 1:]) * jump)[..., :-1] + ((total + v[..., :-1]) * jump)[..., 1:]

    # The sweeps in time.  With G(u) = M u + tau theta S(u), a step reads G(u_k) = b_k,
    # b_k = tau B z_k + M u_{k-1} / theta - (1 - theta) / theta b_{k-1}; linearized it reads
    # G'(u_k) v_k = b_k alike, and the adjoint step is G'(u_k)' q_k = M p_{k+1} + theta r_k
    # for the average q_k = theta p_k + (1 - theta) p_{k+1} and the load r_k.

    def solve_state(self, z):
        """State (nt + 1, nx + 1) of the control z; kept until the next control.

        Newton's method starts a step from the previous one plus the last state's increment.
        """
        if self._z is None or not np.array_equal(z, self._z):
            z = np.array(z, dtype=float)
            load = self.tau * self.mass(z.reshape(self.nt, -1))[:, 1:-1]
            u = np.zeros((self.nt + 1, self.nx + 1))
            u[0] = self.target
            increments = np.diff(self._u, axis=0)
            ratio = (1 - self.theta) / self.theta
            b = self._apply_step(u[0])
            for k in range(self.nt):
                old = u[k, 1:-1]
                b = dsbmv(1, 1 / self.theta, self.m_band, old, beta=1.0, y=load[k]) - ratio * b
                u[k + 1] = u[k] + increments[k]
                self._newton(u[k + 1], b)
            self._z, self._u, self._p = z, u, None
        return self._u

    def _apply_step(self, u):
        """G(u) = (M + tau theta nu A) u + tau theta N(u), (nx - 1,)."""
        linear = self.k_diag * u[1:-1] + self.k_off * (u[:-2] + u[2:])
        return linear + self.flux_difference(u)

    def _newton(self, u, b):
        """Solve G(u) = b in place: the iterate after u is G'(u)^-1 (b + tau theta N(u))."""
        for _ in range(NEWTON_MAXIT):
            *_, new, _ = dgtsv(*self.jacobian(u), b + self.flux_difference(u))
            change = np.abs(new - u[1:-1]).max()
            u[1:-1] = new
            if change <= NEWTON_TOL:
                return
        raise RuntimeError(f"Newton's method failed in the state equation, change {change:.1e}")

    def solve_adjoint(self, z):
        """Adjoint p (nt, nx + 1) at the control z; kept with the factors of G'(u_k)."""
        u = self.solve_state(z)
        if self._p is None:
            diagonals = self.jacobian(u[1:])
            self._factors = [dgttrf(*bands)[:5] for bands in zip(*diagonals, strict=True)]
            misfit = self.weights[1:, None] * self.mass(self.target - u[1:])[:, 1:-1]
            self._p, self._q = self._backward(misfit)
        return self._p

    def _forward(self, load):
        """Linearized state (nt, nx + 1) for the load (nt, nx - 1)."""
        v = np.zeros((self.nt, self.nx + 1))
        ratio = (1 - self.theta) / self.theta
        b = x = np.zeros(self.nx - 1)
        for k, factors in enumerate(self._factors):
            b = dsbmv(1, 1 / self.theta, self.m_band, x, beta=1.0, y=load[k]) - ratio * b
            v[k, 1:-1] = x = dgttrs(*factors, b)[0]
        return v

    def _backward(self, load):
        """Adjoints p and their averages q, both (nt, nx + 1), for the load (nt, nx - 1)."""
        p, q = np.zeros((2, self.nt, self.nx + 1))
        load, x = self.theta * load, np.zeros(self.nx - 1)
        for k in reversed(range(self.nt)):
            b = dsbmv(1, 1.0, self.m_band, x, beta=1.0, y=load[k])
            q[k, 1:-1] = y = dgttrs(*self._factors[k], b, trans="T")[0]
            p[k, 1:-1] = x = (y - (1 - self.theta) * x) / self.theta
        return p, q

    # The optimizer's view.

    def value(self, z):
        """J(z)."""
        error, z = self.solve_state(z) - self.target, np.reshape(z, (self.nt, -1))
        tracking = self.weights @ np.sum(error * self.mass(error), axis=1)
        return 0.5 * (tracking + self.tau * self.alpha * np.vdot(z, self.mass(z)))

    def gradient(self, z):
        """Derivative of J at z, (nt * (nx + 1),)."""
        p, z = self.solve_adjoint(z), np.reshape(z, (self.nt, -1))
        return self.tau * self.mass(self.alpha * z - p).ravel()

    def hessian_vector(self, z, dz):
        """Second derivative of J at z applied to dz, (nt * (nx + 1),): two linear sweeps."""
        self.solve_adjoint(z)
        dz = np.reshape(dz, (self.nt, -1))
        v = self._forward(self.tau * self.mass(dz)[:, 1:-1])
        load = self.weights[1:, None] * self.mass(v)[:, 1:-1]
        load += self.curvature(v, self._q) / self.theta
        p, _ = self._backward(-load)
        return self.tau * self.mass(self.alpha * dz - p).ravel()

    # Coordinates y = L' z in which the Euclidean norm of the gradient is its Riesz norm.

    def to_control(self, y):
        """z = L^-T y, blockwise, (nt * (nx + 1),)."""
        return dtbtrs(self.q_root, np.reshape(y, (self.nt, -1)).T, uplo="L", trans="T")[0].T.ravel()

    def to_riesz(self, g):
        """L^-1 g, blockwise: the derivative in y, (nt * (nx + 1),)."""
        return dtbtrs(self.q_root, np.reshape(g, (self.nt, -1)).T, uplo="L")[0].T.ravel()

    def optimality(self, z):
        """Riesz norm sqrt(sum_k g_k' (tau Q)^-1 g_k) of the reduced gradient g at z."""
        return float(np.linalg.norm(self.to_riesz(self.gradient(z))))


class BandedBurgers(ReducedBurgers):
    """The same functional as one writes it first: ``scipy.linalg.solve_banded`` for every solve.

    Newton's method starts each step from the step before and stops at an update of 1e-10.
    """

    def _bands(self, u):
        """The Jacobian of a step as ``solve_banded`` wants it, (3, nx - 1)."""
        lower, diagonal, upper = self.jacobian(u)
        bands = np.zeros((3, self.nx - 1))
        bands[0, 1:], bands[1], bands[2, :-1] = upper, diagonal, lower
        return bands

    def _newton(self, u, b):
        for _ in range(NEWTON_MAXIT):
            residual = self._apply_step(u) - b
            update = solve_banded((1, 1), self._bands(u), residual)
            u[1:-1] -= update
            if np.abs(update).max() <= 1e-10:
                return
        raise RuntimeError("Newton's method failed in the state equation")

    def solve_state(self, z):
        self._u = np.zeros_like(self._u) if self._z is None or np.any(z != self._z) else self._u
        return super().solve_state(z)

    def solve_adjoint(self, z):
        u = self.solve_state(z)
        if self._p is None:
            load = self.theta * self.weights[1:, None] * self.mass(self.target - u[1:])[:, 1:-1]
            self._p, x = np.zeros((self.nt, self.nx + 1)), np.zeros(self.nx - 1)
            for k in reversed(range(self.nt)):
                transposed = self._bands(u[k + 1])
                transposed[0, 1:], transposed[2, :-1] = transposed[2, :-1].copy(), transposed[0, 1:].copy()
                y = solve_banded((1, 1), transposed, dsbmv(1, 1.0, self.m_band, x, beta=1.0, y=load[k]))
                self._p[k, 1:-1] = x = (y - (1 - self.theta) * x) / self.theta
        return self._p
