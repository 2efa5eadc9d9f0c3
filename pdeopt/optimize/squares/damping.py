"""Damped least squares, min |J p + q|^2 + lam |p|_D^2, for one J and several lam and q: four ways to solve them.

p = -(J'J + lam D)^-1 J'q, D a diagonal. The normal equations serve more rows than unknowns, Woodbury's identity fewer,
singular values few unknowns, and products where no matrix fits.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from pdeopt.core.errors import InputError
from pdeopt.squares.gram import add_gram

#: As the option says.
LINEAR_SOLVERS = ("auto", "normal", "woodbury", "svd", "cg")

#: Unknowns up to which singular values serve: one factorization for all lam, and no squared condition.
FEW = 64
#: The part by which a step may miss its radius.
NEARLY = 0.01
#: Unknowns or rows, whichever are fewer, up to which a matrix is factored, and entries of J that are kept.
MOST_FACTORED, MOST_ENTRIES = 12_000, 5 * 10**8


class DampedSystem(ABC):
    """(J'J + lam D) p = -J'q for one J.

    Attributes:
        factorizations: so far.
        multiplications: of dense matrices so far.
    """

    factorizations: int = 0
    multiplications: float = 0.0

    def __init__(self, D: Tensor) -> None:
        self.root = D.sqrt()

    def length(self, p: Tensor) -> float:
        """|p|_D."""
        return float((self.root * p).norm())

    @abstractmethod
    def solve(self, lam: float, q: Tensor) -> Tensor | None:
        """p, (n,), for q, (m,); None where the system is singular to rounding, as it is for lam too small.

        Args:
            lam: > 0.
            q: (m,).
        """


class Normal(DampedSystem):
    """Cholesky's factor of J'J + lam D, one a lam.

    Args:
        J: (m, n).
        D: diagonal, > 0, (n,).
        single: lam from which J'J and the factor are of single precision, which takes half the time; J'q is not.
    """

    def __init__(self, J: Tensor, D: Tensor, single: float = math.inf) -> None:
        super().__init__(D)
        self.J, self.D, self.single = J, D, single
        self.grams: dict[torch.dtype, Tensor] = {}  # lower triangles
        self._lam = math.nan
        self._factor: Tensor | None = None

    def solve(self, lam: float, q: Tensor) -> Tensor | None:
        if lam != self._lam:
            matrix = self._gram(lam).clone()
            matrix.diagonal().add_(self.D.to(matrix.dtype), alpha=lam)
            factor, info = torch.linalg.cholesky_ex(matrix)
            self._lam, self._factor = lam, factor if int(info) == 0 else None
            self.factorizations += 1
            self.multiplications += _price(matrix) * len(self.D) ** 3 / 6.0
        self.multiplications += len(self.D) ** 2 + self.J.numel()
        if self._factor is None:
            return None
        right = (self.J.T @ q)[:, None].to(self._factor.dtype)
        return _finite(-torch.cholesky_solve(right, self._factor)[:, 0].double())

    def _gram(self, lam: float) -> Tensor:
        """J'J, of double precision where lam needs it or where that is at hand."""
        dtype = torch.float32 if lam >= self.single and torch.float64 not in self.grams else torch.float64
        if dtype not in self.grams:
            (m, n), gram = self.J.shape, torch.zeros(self.J.shape[1], self.J.shape[1], dtype=dtype)
            add_gram(gram, self.J.to(dtype))
            self.grams[dtype] = gram
            self.multiplications += _price(gram) * 0.5 * m * n**2
        return self.grams[dtype]


class Woodbury(DampedSystem):
    """p = -D^-1/2 W'(WW' + lam)^-1 q with W = J D^-1/2: a matrix of as many rows as J has.

    Args:
        J: (m, n).
        D: diagonal, > 0, (n,).
    """

    def __init__(self, J: Tensor, D: Tensor) -> None:
        super().__init__(D)
        self.J, self.D = J, D
        self.gram = (J / D) @ J.T
        self.multiplications = float(J.shape[1] * J.shape[0] ** 2)
        self._lam = math.nan
        self._factor: Tensor | None = None

    def solve(self, lam: float, q: Tensor) -> Tensor | None:
        if lam != self._lam:
            matrix = self.gram.clone()
            matrix.diagonal().add_(lam)
            factor, info = torch.linalg.cholesky_ex(matrix)
            self._lam, self._factor = lam, factor if int(info) == 0 else None
            self.factorizations += 1
            self.multiplications += len(q) ** 3 / 6.0
        self.multiplications += len(q) ** 2 + self.J.numel()
        if self._factor is None:
            return None
        return _finite(-(self.J.T @ torch.cholesky_solve(q[:, None], self._factor)[:, 0]) / self.D)


class Singular(DampedSystem):
    """p = -D^-1/2 V s/(s^2 + lam) U'q with J D^-1/2 = U s V': one factorization for all lam, condition not squared.

    Args:
        J: (m, n).
        D: diagonal, > 0, (n,).
    """

    def __init__(self, J: Tensor, D: Tensor) -> None:
        super().__init__(D)
        W = J / self.root
        self.U, self.s, self.Vh = torch.linalg.svd(W if bool(W.isfinite().all()) else torch.zeros_like(W), False)
        largest = float(self.s[0]) if len(self.s) else 0.0
        self.is_zero = self.s <= max(J.shape) * torch.finfo(J.dtype).eps * largest
        self.factorizations = 1
        self.multiplications = 4.0 * max(J.shape) * min(J.shape) ** 2

    def solve(self, lam: float, q: Tensor) -> Tensor | None:
        self.multiplications += 2.0 * self.U.numel()
        return _finite(-(self.Vh.T @ self._weighted(lam, self.U.T @ q)) / self.root)

    def _weighted(self, lam: float, c: Tensor) -> Tensor:
        """s c / (s^2 + lam), 0 where s is rounding alone: in the directions V, -D^1/2 p."""
        return torch.where(self.is_zero, 0.0, self.s * c / (self.s.square() + lam))

    def damping_for(self, radius: float, q: Tensor) -> float:
        """lam >= 0 with |p|_D = radius nearly, or 0 where the undamped step is no longer.

        Newton's method on 1/|p| (J. J. More, Lecture Notes in Math. 630, 1978, section 5), from the left.

        Args:
            radius: > 0.
            q: (m,).
        """
        c, lam = self.U.T @ q, 0.0
        for _ in range(50):
            v = self._weighted(lam, c)
            length = float(v.norm())
            if length <= (1.0 + NEARLY) * radius:
                break
            slope = float(torch.where(self.is_zero, 0.0, v.square() / (self.s.square() + lam)).sum())
            lam += (length - radius) / radius * length**2 / slope
        return lam


class Products(DampedSystem):
    """Conjugate gradients on the damped system by products with J and J' (CGLS: the residual is that of least squares).

    A. Bjorck, Numerical Methods for Least Squares Problems, SIAM, 1996, section 7.4.

    Args:
        forward, backward: J p, (n,) -> (m,), and J'q.
        D: diagonal, > 0, (n,).
        rtol: residual of the damped system, relative to J'q, at which a solve ends.
        most: steps of a solve.

    Attributes:
        steps: so far.
    """

    def __init__(
        self,
        forward: Callable[[Tensor], Tensor],
        backward: Callable[[Tensor], Tensor],
        D: Tensor,
        rtol: float,
        most: int,
    ) -> None:
        super().__init__(D)
        self.forward, self.backward = forward, backward
        self.rtol, self.most, self.steps = rtol, most, 0

    def solve(self, lam: float, q: Tensor) -> Tensor | None:
        x = torch.zeros_like(self.root)
        left, s = -q, self.backward(-q) / self.root  # q - J p with p = x / root, and the system's residual
        d, square = s.clone(), float(s @ s)
        end = self.rtol**2 * square
        for _ in range(self.most):
            if not square > end:
                break
            self.steps += 1
            t = self.forward(d / self.root)
            length = square / (float(t @ t) + lam * float(d @ d))
            x.add_(d, alpha=length)
            left.sub_(t, alpha=length)
            s = self.backward(left) / self.root - lam * x
            square, before = float(s @ s), square
            d.mul_(square / before).add_(s)
        return _finite(x / self.root)


def chosen(name: str, rows: int, size: int) -> str:
    """The way that `auto` stands for, by the numbers of rows and unknowns; other names are as they are.

    Args:
        name: one of `LINEAR_SOLVERS`.
        rows, size: m and n.

    Raises:
        InputError: a matrix that is asked for and does not fit.
    """
    fits = rows * size <= MOST_ENTRIES and min(rows, size) <= MOST_FACTORED
    if name == "auto":
        return "svd" if size <= FEW and fits else "cg" if not fits else "woodbury" if rows < size else "normal"
    if name != "cg" and rows * size > 4 * MOST_ENTRIES:
        raise InputError("-lm_linear", f"{name}, for {rows} rows of {size} unknowns", "cg | auto")
    return name


def _price(matrix: Tensor) -> float:
    """Of a multiplication, in those of double precision."""
    return 0.5 if matrix.dtype == torch.float32 else 1.0


def _finite(p: Tensor) -> Tensor | None:
    return p if bool(p.isfinite().all()) else None
