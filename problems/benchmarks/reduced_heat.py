"""The reduced functional of heat control by hand, as a SciPy user writes it: scikit-fem's matrices, SuperLU.

    min  sum_{i=0}^N w_i/2 |u_i - d_i|_M^2 + sum_{k=1}^N tau alpha/2 |z_k|_Q^2
    s.t. M (u_k - u_{k-1}) + tau kappa A u_k = tau B z_k,  u_0 = 0

on (0, 3) x (0, 1) with Q1 elements, u = 0 on the boundary and controls at every node.
"""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp
import skfem
from scipy.linalg.lapack import dpbtrf, dtbtrs
from scipy.sparse.linalg import splu
from skfem.models import laplace, mass


class ReducedHeat:
    """J(z) of flat controls z, (size,): quadratic, so one factorization serves all steps and all sweeps."""

    def __init__(self, nx, nt, alpha=1e-3, kappa=0.05, T=1.0):
        self.shape, self.nt, self.alpha, self.tau = (nx + 1, max(2, nx // 3) + 1), nt, alpha, T / nt
        sides = [np.linspace(0, length, n) for length, n in zip((3, 1), self.shape)]
        basis = skfem.Basis(skfem.MeshQuad.init_tensor(*sides), skfem.ElementQuad1())
        M, A = (sp.csc_matrix(form.assemble(basis)) for form in (mass, laplace))
        free = np.setdiff1d(np.arange(M.shape[0]), basis.get_dofs().flatten())
        self.Q, self.B, self.M = M, M[free], M[free][:, free]
        self.step = splu(self.M + self.tau * kappa * A[free][:, free])
        t, (x, y) = self.tau * np.arange(1, nt + 1)[:, None], basis.doflocs[:, free]
        self.target = np.sin(np.pi * t) * np.exp(-8 * ((x - 0.75 - 1.5 * t) ** 2 + (y - 0.5) ** 2))
        self.weights = np.full((nt, 1), self.tau)
        self.weights[-1] /= 2  # the target and the state are zero at t = 0
        self.size = nt * M.shape[0]
        self.roots = [_root_of_mass(n, length / (n - 1)) for length, n in zip((3, 1), self.shape)]

    def state(self, z):
        """u_1, ..., u_N of a control, (nt, n)."""
        load = self.tau * (self.B @ np.reshape(z, (self.nt, -1)).T).T
        u, old = np.empty((self.nt, self.M.shape[0])), 0.0
        for k in range(self.nt):
            u[k] = old = self.step.solve(load[k] + self.M @ old if k else load[k])
        return u

    def adjoint(self, load):
        """The transposed sweep, (nt, n); all matrices are symmetric."""
        p, old = np.empty_like(load), None
        for k in reversed(range(self.nt)):
            p[k] = old = self.step.solve(load[k] if old is None else load[k] + self.M @ old)
        return p

    def _derivative(self, z, misfit):
        p = self.adjoint(self.weights * (self.M @ misfit.T).T)
        price = self.alpha * (self.Q @ np.reshape(z, (self.nt, -1)).T)
        return self.tau * (price + self.B.T @ p.T).T.ravel()

    def value(self, z):
        """J(z)."""
        e, z = self.state(z) - self.target, np.reshape(z, (self.nt, -1))
        tracking = np.vdot(self.weights * e, (self.M @ e.T).T)
        return 0.5 * (tracking + self.tau * self.alpha * np.vdot(z, (self.Q @ z.T).T))

    def gradient(self, z):
        """Derivative of J at z, (size,)."""
        return self._derivative(z, self.state(z) - self.target)

    def hessian_vector(self, z, dz):
        """Second derivative of J applied to dz, (size,): two sweeps."""
        return self._derivative(dz, self.state(dz))

    # Coordinates y = L' z with tau Q = L L', a Kronecker product of two banded factors.

    def to_control(self, y):
        """z = L^-T y, (size,)."""
        return self._substitute(y, "T")

    def to_riesz(self, g):
        """L^-1 g: the derivative in y, (size,)."""
        return self._substitute(g, "N")

    def _substitute(self, x, trans):
        x = np.reshape(x, (self.nt, *self.shape)) / np.sqrt(self.tau)
        for axis, root in zip((1, 2), self.roots):
            moved = np.moveaxis(x, axis, 0)
            solved = dtbtrs(root, moved.reshape(len(moved), -1), uplo="L", trans=trans)[0]
            x = np.moveaxis(solved.reshape(moved.shape), 0, axis)
        return x.ravel()

    def optimality(self, z):
        """Riesz norm of the gradient at z."""
        return float(np.linalg.norm(self.to_riesz(self.gradient(z))))


def _root_of_mass(n, h):
    """The Cholesky factor of the mass matrix of n nodes in a line, lower band storage."""
    band = np.full((2, n), h / 6)
    band[0] *= 4
    band[0, [0, -1]] /= 2
    return dpbtrf(band, lower=1)[0]
