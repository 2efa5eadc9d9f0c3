"""Sums of squares f = |r|^2, as methods of least squares see them: residuals, Jacobians, products, rows, counted."""

from __future__ import annotations

import math
from abc import abstractmethod
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, jacfwd, jacrev, jvp, vjp

from pdeopt.core.errors import InputError
from pdeopt.core.team import Team
from pdeopt.functions import border
from pdeopt.functions.smooth import Costs, SampledFunction, Tally
from pdeopt.squares.rows import density, draw_rows
from pdeopt.squares.share import Share

#: Entries of J that are made at once where some columns of it are asked for.
ENTRIES_AT_ONCE = 2 * 10**7


class SumOfSquares(SampledFunction):
    """f(x) = |r(x)|^2 by the methods with an underscore, which a subclass writes; see `ResidualFunction`."""

    def __init__(
        self, size: int, rows: int, samples: int | None = None, costs: Costs | None = None, tally: Tally | None = None
    ) -> None:
        if rows < 0 or size < 1:
            raise InputError("sum of squares", f"{rows} rows of {size} unknowns", "rows >= 0, unknowns >= 1")
        costs = costs or Costs(jacobian=float(max(1, min(rows, size))))
        super().__init__(size, rows if samples is None else samples, costs=costs, tally=tally)
        self.rows = rows

    @abstractmethod
    def _residual(self, x: Tensor, rows: Tensor | None = None) -> Tensor:
        """r(x), (m,), or some of its rows, int64."""

    def _linearize(self, x: Tensor, rows: Tensor | None = None, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """r and J, (m,) and (m, n), or some of their rows; `out` is memory that J may be written to."""

        def twice(x: Tensor) -> tuple[Tensor, Tensor]:
            r = self._residual(x, rows)
            return r, r

        along = jacrev if (self.rows if rows is None else len(rows)) <= self.size else jacfwd
        J, r = along(twice, has_aux=True)(x)
        return r.detach(), J.detach()

    def _jvp(self, x: Tensor, d: Tensor, rows: Tensor | None = None) -> Tensor:
        """J d, (m,)."""
        return jvp(partial(self._residual, rows=rows), (x,), (d,))[1]  # type: ignore[no-any-return]

    def _vjp(self, x: Tensor, w: Tensor, rows: Tensor | None = None) -> Tensor:
        """J'w, (n,)."""
        return vjp(partial(self._residual, rows=rows), x)[1](w)[0]  # type: ignore[no-any-return]

    def _columns(self, x: Tensor, begin: int, out: Tensor) -> None:
        """Write the columns of J from `begin` on to `out`, (m, k); some rows at a time, so that J need not fit."""
        step = max(1, ENTRIES_AT_ONCE // self.size)
        for rows in torch.arange(self.rows).split(step):
            J = self._linearize(x, rows)[1]
            out[rows[0] : rows[-1] + 1] = J[:, begin : begin + out.shape[1]]

    def _value(self, x: Tensor) -> float:
        return _square(self._residual(x))

    def _value_and_gradient(self, x: Tensor) -> tuple[float, Tensor]:
        r, back = vjp(self._residual, x)  # type: ignore[misc]
        return _square(r), 2.0 * back(r)[0]

    def _hvp(self, x: Tensor, d: Tensor) -> Tensor:
        def square(x: Tensor) -> Tensor:
            return self._residual(x).square().sum()

        return jvp(grad(square), (x,), (d,))[1]  # type: ignore[no-any-return]


class ResidualFunction(SumOfSquares):
    """f(x) = |r(x)|^2 with r: R^n -> R^m, so f' = 2 J'r, J = r': a smooth function for all optimizers.

    There is no factor 1/2, as there is none in the mean square that a network is trained on: SciPy's `cost` is f / 2.
    A mean over m samples has the rows r_i = sqrt(1/m) times a residual; `subset` scales the rows that it takes by
    sqrt(m / their number).

    A subclass writes `_residual`, of torch operations; all derivatives are then torch's. Where they are known
    otherwise, or cost less, it writes `_linearize`, `_jvp` and `_vjp`, too::

        class Rosenbrock(ResidualFunction):
            def __init__(self):
                super().__init__(size=2, rows=2)

            def _residual(self, x, rows=None):
                r = torch.stack([10 * (x[1] - x[0] ** 2), 1 - x[0]])
                return r if rows is None else r[rows]

        LevenbergMarquardt(Rosenbrock()).minimize([-1.2, 1.0])

    Users call `residual`, `linearize`, `jacobian`, `jvp`, `vjp`, which count in `tally` and weigh by `costs`; calls for
    some rows are weighed by their part of all. Nothing is collective: every rank has all unknowns and rows. Residuals
    may be infinite or NaN: f is then, too, and methods step back.

    Args:
        size: n.
        rows: m, >= 0.
        samples: of which f is a mean; m by default.
        costs: by default a Jacobian costs min(m, n) gradients, as differentiation by rows or columns does.
        tally: where calls are counted.

    Attributes:
        has_products: whether products with J are what is cheap here, not J: a few rows or columns of it cost as many.
    """

    has_products = False

    def residual(self, x: Tensor, rows: Tensor | None = None) -> Tensor:
        """r(x), (m,).

        Args:
            x: (n,).
            rows: those wanted, int64, in this order; all by default.
        """
        self.tally.values += 1
        self.tally.work += self.costs.value * self._share(rows)
        return self._checked(self._residual(border.vector(x, self.size, "x"), rows), self._count(rows))

    def linearize(self, x: Tensor, rows: Tensor | None = None, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """r(x) and J(x), (m,) and (m, n), by one sweep; the caller's to keep. J is where the function computes.

        Args:
            x, rows: as for `residual`.
            out: (m, n), an earlier J that is not needed any more: new memory would cost as much as its numbers.
        """
        self.tally.jacobians += 1
        self.tally.work += self.costs.jacobian * self._share(rows)
        found = self._linearize(border.vector(x, self.size, "x"), rows, out)
        r, J = border.pair(found, f"_linearize of {type(self).__name__}")
        count = self._count(rows)
        J = torch.as_tensor(J, dtype=torch.float64)
        if J.shape != (count, self.size):
            raise InputError(f"Jacobian of {type(self).__name__}", border.described(J), f"({count}, {self.size})")
        return self._checked(r, count), J

    def jacobian(self, x: Tensor, rows: Tensor | None = None) -> Tensor:
        """J(x), (m, n)."""
        return self.linearize(x, rows)[1]

    def columns(self, x: Tensor, begin: int, out: Tensor) -> None:
        """Write the columns of J(x) from number `begin` on to `out`, (m, k), in its precision.

        Counted as their part of a Jacobian.
        """
        if out.shape[0] != self.rows or not 0 <= begin <= begin + out.shape[1] <= self.size:
            got = f"{tuple(out.shape)} from column {begin} on"
            raise InputError(f"columns of {type(self).__name__}", got, f"({self.rows}, k), of {self.size} columns")
        self.tally.jacobians += 1
        self.tally.work += self.costs.jacobian * out.shape[1] / self.size
        self._columns(border.vector(x, self.size, "x"), begin, out)

    def jvp(self, x: Tensor, d: Tensor, rows: Tensor | None = None) -> Tensor:
        """J(x) d, (m,), without J."""
        self._count_product(rows)
        return self._checked(self._jvp(x, border.vector(d, self.size, "direction"), rows), self._count(rows))

    def vjp(self, x: Tensor, w: Tensor, rows: Tensor | None = None) -> Tensor:
        """J(x)'w, (n,), without J; f' is 2 J'r."""
        self._count_product(rows)
        product = self._vjp(x, border.vector(w, self._count(rows), "weights of the rows"), rows)
        return border.vector(product, self.size, f"product of {type(self).__name__}", own=True)

    def sample(
        self, x: Tensor, count: int, seed: int, floor: float = 0.5, candidates: int = 0, team: Team | None = None
    ) -> ResidualFunction:
        """A sum of squares of about the same value, by `count` rows drawn anew: more where they are large at x.

        Args:
            x: (n,).
            count: of rows; for networks of points of the first term.
            seed: of the random numbers.
            floor: of the density; see `rows.density`.
            candidates: among which they are drawn; 0 for all rows, for networks ten times `count`.
            team: of ranks that share the evaluation of the candidates; the sample is the same on any number of them.
        """
        generator = torch.Generator().manual_seed(seed)
        pool = torch.arange(self.rows)
        if 0 < candidates < self.rows:
            pool = torch.randperm(self.rows, generator=generator)[:candidates]
        share = Share(team, len(pool))
        sizes = share.gather(share.call(lambda: self._residual(x, pool[share.own]).detach().abs()))
        self.tally.work += self.costs.value
        chosen, weights = draw_rows(density([sizes], floor), count, seed + 1)
        return RowSample(self, pool[chosen], (weights * (self.rows / len(chosen))).sqrt())

    def sample_memory(self) -> dict[str, Tensor]:
        """What `recalled` makes this sample of the whole from; nothing for the whole."""
        return {}

    def recalled(self, memory: dict[str, Tensor]) -> ResidualFunction:
        """The sample of this function that gave `sample_memory`."""
        return RowSample(self, memory["rows"], memory["factors"]) if memory else self

    def subset(self, indices: Tensor) -> ResidualFunction:
        factor = math.sqrt(self.rows / max(len(indices), 1))
        return RowSample(self, indices, torch.full((len(indices),), factor, dtype=torch.float64))

    def _count(self, rows: Tensor | None) -> int:
        return self.rows if rows is None else len(rows)

    def _share(self, rows: Tensor | None) -> float:
        return 1.0 if rows is None else len(rows) / max(self.rows, 1)

    def _count_product(self, rows: Tensor | None) -> None:
        self.tally.products += 1
        self.tally.work += self.costs.product * self._share(rows)

    def _checked(self, r: Any, count: int) -> Tensor:
        return border.vector(r, count, f"residual of {type(self).__name__}", own=True)


class RowSample(ResidualFunction):
    """Some rows of a sum of squares, each times a factor.

    Args:
        whole: the sum.
        indices: of the rows, int64.
        factors: (rows,).
    """

    def __init__(self, whole: ResidualFunction, indices: Tensor, factors: Tensor) -> None:
        share = len(indices) / max(whole.rows, 1)
        super().__init__(whole.size, len(indices), costs=whole.costs.times(share), tally=whole.tally)
        self.whole, self.indices, self.factors = whole, indices, factors.double()

    def _rows(self, rows: Tensor | None) -> tuple[Tensor, Tensor]:
        return (self.indices, self.factors) if rows is None else (self.indices[rows], self.factors[rows])

    def _residual(self, x: Tensor, rows: Tensor | None = None) -> Tensor:
        indices, factors = self._rows(rows)
        return factors * self.whole._residual(x, indices)

    def _linearize(self, x: Tensor, rows: Tensor | None = None, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        indices, factors = self._rows(rows)
        r, J = self.whole._linearize(x, indices, out)
        return factors * r, factors.to(J.device)[:, None] * J

    def _jvp(self, x: Tensor, d: Tensor, rows: Tensor | None = None) -> Tensor:
        indices, factors = self._rows(rows)
        return factors * self.whole._jvp(x, d, indices)

    def _vjp(self, x: Tensor, w: Tensor, rows: Tensor | None = None) -> Tensor:
        indices, factors = self._rows(rows)
        return self.whole._vjp(x, factors * w, indices)

    def _value_and_gradient(self, x: Tensor) -> tuple[float, Tensor]:
        r = self._residual(x)
        return _square(r), 2.0 * self._vjp(x, r)

    def sample_memory(self) -> dict[str, Tensor]:
        return {"rows": self.indices, "factors": self.factors}


def _square(r: Tensor) -> float:
    return float(torch.dot(r, r))
