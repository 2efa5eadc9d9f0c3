"""Smooth functions for tests, and slow, obviously right recursions."""

import torch

from pdeopt.functions.smooth import SmoothFunction


class Quadratic(SmoothFunction):
    """x.A x / 2 - b.x."""

    def __init__(self, A, b, **words):
        super().__init__(len(b), **words)
        self.A, self.b = A, b

    @classmethod
    def random(cls, n, condition=100.0, seed=0):
        g = torch.Generator().manual_seed(seed)
        Q = torch.linalg.qr(torch.randn(n, n, generator=g, dtype=torch.float64)).Q
        return cls(
            Q * torch.logspace(0, torch.log10(torch.tensor(condition)), n, dtype=torch.float64) @ Q.T,
            torch.randn(n, generator=g, dtype=torch.float64),
        )

    def _value_and_gradient(self, x):
        Ax = self.A @ x
        return float(x @ (0.5 * Ax - self.b)), Ax - self.b

    def _hvp(self, x, d):
        return self.A @ d

    @property
    def minimum(self):
        return torch.linalg.solve(self.A, self.b)


class Rosenbrock(SmoothFunction):
    """sum 100 (x_{i+1} - x_i^2)^2 + (1 - x_i)^2."""

    def _value_and_gradient(self, x):
        a, b = x[1:] - x[:-1] ** 2, 1.0 - x[:-1]
        g = torch.zeros_like(x)
        g[:-1] = -400.0 * a * x[:-1] - 2.0 * b
        g[1:] += 200.0 * a
        return float((100.0 * a**2 + b**2).sum()), g


class Hole(SmoothFunction):
    """|x|^2 / 2, but NaN beyond |x| = 3."""

    def _value_and_gradient(self, x):
        value = 0.5 * float(x @ x)
        return (value, x.clone()) if value < 4.5 else (float("nan"), x * float("nan"))


def quadratic(n=8, seed=0):
    """A random convex quadratic function."""
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(n, n, generator=generator, dtype=torch.float64)
    return Quadratic(A @ A.T + torch.eye(n, dtype=torch.float64), torch.randn(n, generator=generator).double())


def hessian(f, x):
    """f''(x), row by row."""
    return torch.stack([f.hvp(x, e) for e in torch.eye(f.size, dtype=torch.float64)])


def zeros(f):
    """The origin."""
    return torch.zeros(f.size, dtype=torch.float64)


def start(n, seed=0):
    """A random point."""
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def bfgs_update(H, s, y):
    """The textbook formula (Nocedal, Wright 2006, equation 6.17)."""
    rho, identity = 1.0 / (y @ s), torch.eye(len(s), dtype=torch.float64)
    V = identity - rho * torch.outer(y, s)
    return V.T @ H @ V + rho * torch.outer(s, s)


def two_loops(pairs, g, initial=None):
    """L-BFGS by its two-loop recursion (Nocedal, Wright 2006, algorithm 7.4)."""
    q, alphas = g.clone(), []
    for s, y in reversed(pairs):
        alphas.append(float(s @ q / (y @ s)))
        q = q - alphas[-1] * y
    s, y = pairs[-1] if pairs else (g, g)
    q = q * float(s @ y / (y @ y)) if initial is None else initial(q)
    for (s, y), alpha in zip(pairs, reversed(alphas)):
        q = q + (alpha - float(y @ q / (y @ s))) * s
    return q
