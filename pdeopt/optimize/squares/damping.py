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
from pdeopt.optimize.squares.schwarz import Schwarz
from pdeopt.optimize.squares.sharedjacobian import SharedJacobian
from pdeopt.squares.gram import add_gram, add_row_gram
from pdeopt.squares.share import Share

#: As the option says.
LINEAR_SOLVERS = ("auto", "normal", "woodbury", "svd", "cg")

#: Unknowns up to which singular values serve: one factorization for all lam, and no squared condition.
FEW = 64
#: Rows or columns of J, whichever are fewer, up to which J is made of products where these are what is cheap.
FEW_PRODUCTS = 1000
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


class Factored(DampedSystem):
    """By Cholesky's factor of a matrix plus a multiple of a diagonal, one a lam.

    Args:
        J: (m, n), or what a rank has of it.
        D: diagonal, > 0, (n,).
        single: lam from which matrix and factor are of single precision, which takes half the time; J'q is not.
    """

    def __init__(self, J: Tensor | SharedJacobian, D: Tensor, single: float = math.inf) -> None:
        super().__init__(D)
        self.J = SharedJacobian.alone(J) if isinstance(J, Tensor) else J
        self.D, self.single = D, single
        self.grams: dict[torch.dtype, Tensor] = {}  # lower triangles
        self._lam = math.nan
        self._factor: Tensor | None = None

    @abstractmethod
    def _gram(self, dtype: torch.dtype) -> Tensor:
        """The matrix without its diagonal."""

    @abstractmethod
    def _diagonal(self, dtype: torch.dtype) -> Tensor:
        """What lam multiplies."""

    def factor(self, lam: float) -> Tensor | None:
        """For this lam; None where the matrix is singular to rounding. Collective."""
        if lam != self._lam:
            is_single = lam >= self.single and torch.float64 not in self.grams
            dtype = torch.float32 if is_single else torch.float64
            if dtype not in self.grams:
                self.grams[dtype] = self._gram(dtype)
            matrix = self.grams[dtype].clone()
            matrix.diagonal().add_(self._diagonal(dtype).to(matrix.device), alpha=lam)
            factor, info = torch.linalg.cholesky_ex(matrix)
            self._lam, self._factor = lam, factor if int(info) == 0 else None
            self.factorizations += 1
            self.multiplications += _price(matrix) * len(matrix) ** 3 / 6.0
        return self._factor

    def _solved(self, factor: Tensor, right: Tensor) -> Tensor:
        self.multiplications += len(right) ** 2 + self.J.entries
        return torch.cholesky_solve(right[:, None].to(factor), factor)[:, 0].double().cpu()


class Normal(Factored):
    """J'J + lam D; each rank has some rows of J."""

    def solve(self, lam: float, q: Tensor) -> Tensor | None:
        factor = self.factor(lam)
        return None if factor is None else _finite(-self.J.rows.agreed(self._solved(factor, self.J.backward(q))))

    def _gram(self, dtype: torch.dtype) -> Tensor:
        n, gram = len(self.D), self.J.matrix.new_zeros(len(self.D), len(self.D), dtype=dtype)
        add_gram(gram, self.J.matrix.to(dtype))
        self.multiplications += _price(gram) * 0.5 * n * self.J.entries
        return self.J.rows.total_square(gram)

    def _diagonal(self, dtype: torch.dtype) -> Tensor:
        return self.D.to(dtype)


class Woodbury(Factored):
    """p = -D^-1/2 W'(WW' + lam)^-1 q with W = J D^-1/2: a matrix of as many rows as J, of which a rank has columns."""

    def solve(self, lam: float, q: Tensor) -> Tensor | None:
        factor = self.factor(lam)
        if factor is None:
            return None
        y = self.J.columns.agreed(self._solved(factor, q))
        return _finite(-self.J.backward(y) / self.D)

    def _gram(self, dtype: torch.dtype) -> Tensor:
        m = len(self.J.matrix)
        gram = self.J.matrix.new_zeros(m, m, dtype=dtype)
        add_row_gram(gram, (self.J.matrix / self.root[self.J.columns.own].to(self.J.matrix.device)).to(dtype))
        self.multiplications += _price(gram) * 0.5 * m * self.J.entries
        return self.J.columns.total_square(gram)

    def _diagonal(self, dtype: torch.dtype) -> Tensor:
        return torch.ones(len(self.J.matrix), dtype=dtype)


class Singular(DampedSystem):
    """p = -D^-1/2 V s/(s^2 + lam) U'q with J D^-1/2 = U s V': one factorization for all lam, condition not squared.

    Args:
        J: (m, n).
        D: diagonal, > 0, (n,).
    """

    def __init__(self, J: Tensor, D: Tensor) -> None:
        super().__init__(D)
        W = J.cpu() / self.root
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
        forward, backward: J p, (own,) -> (m,), and J'q, of this rank's unknowns.
        D: diagonal, > 0, (n,).
        rtol: residual of the damped system, relative to J'q, at which a solve ends.
        most: steps of a solve.
        schwarz: preconditioner for a D that is a multiple of the identity; None for D.
        columns: this rank's unknowns; default all.

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
        schwarz: Schwarz | None = None,
        columns: Share | None = None,
    ) -> None:
        super().__init__(D)
        self.forward, self.backward, self.schwarz = forward, backward, schwarz
        self.columns = columns or Share(None, len(D))
        self.rtol, self.most, self.steps = rtol, most, 0

    def solve(self, lam: float, q: Tensor) -> Tensor | None:
        D = self.root[self.columns.own].square()
        if self.schwarz is not None:
            self.schwarz.set_damping(lam)
        x, left, s = torch.zeros_like(D), -q, self.backward(-q)  # q - J x, and the system's residual
        z = self._preconditioned(s, D)
        d, square = z.clone(), self._dot(s, z)
        end = self.rtol**2 * square
        for _ in range(self.most):
            if not square > end:
                break
            self.steps += 1
            t = self.forward(d)
            length = square / (float(t @ t) + lam * self._dot(d, D * d))
            x.add_(d, alpha=length)
            left.sub_(t, alpha=length)
            s = self.backward(left) - lam * D * x
            z = self._preconditioned(s, D)
            square, before = self._dot(s, z), square
            d.mul_(square / before).add_(z)
        if self.schwarz is not None:
            self.multiplications = self.schwarz.multiplications
        return _finite(self.columns.gather(x))

    def _preconditioned(self, s: Tensor, D: Tensor) -> Tensor:
        return s / D if self.schwarz is None else self.schwarz.solve(s)

    def _dot(self, a: Tensor, b: Tensor) -> float:
        return float(self.columns.total(torch.dot(a, b)))


def chosen(name: str, rows: int, size: int, has_products: bool = False) -> str:
    """The way that `auto` stands for, by the numbers of rows and unknowns; other names are as they are.

    Args:
        name: one of `LINEAR_SOLVERS`.
        rows, size: m and n.
        has_products: whether products are cheap, and J is not.

    Raises:
        InputError: a matrix that is asked for and does not fit.
    """
    fits = rows * size <= MOST_ENTRIES and min(rows, size) <= MOST_FACTORED
    if name == "auto":
        fits = fits and not (has_products and min(rows, size) > FEW_PRODUCTS)
        return "svd" if size <= FEW and fits else "cg" if not fits else "woodbury" if rows < size else "normal"
    if name != "cg" and rows * size > 4 * MOST_ENTRIES:
        raise InputError("-lm_linear", f"{name}, for {rows} rows of {size} unknowns", "cg | auto")
    return name


def _price(matrix: Tensor) -> float:
    """Of a multiplication, in those of double precision."""
    return 0.5 if matrix.dtype == torch.float32 else 1.0


def _finite(p: Tensor) -> Tensor | None:
    return p if bool(p.isfinite().all()) else None
