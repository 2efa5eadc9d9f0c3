"""Residuals at a point with their linear model, and the seconds that the function's calls take."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from pdeopt.optimize.squares import damping
from pdeopt.optimize.squares.schwarz import FEW_ENTRIES, Schwarz, SchwarzSettings, schwarz
from pdeopt.optimize.squares.sharedjacobian import SharedJacobian
from pdeopt.squares.residual import ResidualFunction
from pdeopt.squares.share import Share
from pdeopt.squares.sharedrows import SharedRows

T = TypeVar("T")


class Linearized:
    """r(x + p) ~ r + J p, with J as a matrix or by products.

    Where a team shares the rows of the function, each rank has its rows of J for the normal equations, its columns for
    the others; all vectors are whole.

    Args:
        linear: one of `damping.LINEAR_SOLVERS`.
        schwarz: how conjugate gradients keep J, and what preconditions them.

    Attributes:
        r, J: residual and Jacobian at the point; J is None where products serve.
        f, g: |r|^2 and its derivative 2 J'r.
        kind: how damped systems are solved here.
        seconds: of the processor, in calls of the function.
    """

    r: Tensor
    f: float
    g: Tensor

    def __init__(self, linear: str, schwarz: SchwarzSettings | None = None) -> None:
        self.linear, self.kind, self.seconds = linear, linear, 0.0
        self.settings = schwarz or SchwarzSettings()
        self.J: SharedJacobian | None = None
        self._earlier: Tensor | None = None
        self._kept: SharedJacobian | None = None

    def set(self, function: ResidualFunction, x: Tensor) -> None:
        """Go to this point, (n,), of this function. Collective."""
        self.function, self.x = function, x
        self.team = function.team if isinstance(function, SharedRows) else None
        self.kind = damping.chosen(self.linear, function.rows, function.size, function.has_products)
        self.J = self._kept = None
        if self.kind == "cg":
            self.r = self.residual(x)
            self.g = 2.0 * self.backward(self.r)
        else:
            self.r, self.J = self.timed(self._linearize)
            self._earlier = self.J.matrix
            self.g = 2.0 * self.J.backward(self.r)
        self.f = self.agreed(float(self.r @ self.r))[0]

    def _linearize(self) -> tuple[Tensor, SharedJacobian]:
        """r, and this rank's part of J."""
        function, all_rows = self.function, Share(None, self.function.rows)
        if isinstance(function, SharedRows) and self.kind == "normal":
            r, matrix = function.own_rows(self.x, self._earlier)
            return r, SharedJacobian(matrix, function.share, Share(None, function.size))
        if isinstance(function, SharedRows) and self.kind == "woodbury":
            return function.residual_beside(self.x), self._columns(torch.float64, 1)
        r, matrix = function.linearize(self.x, out=self._earlier)
        return r, SharedJacobian(matrix, all_rows, Share(None, function.size))

    def _columns(self, dtype: torch.dtype, block: int) -> SharedJacobian:
        """This rank's columns of J, in blocks of neighbors."""
        columns = Share(self.team, self.function.size, block)
        shape = self.function.rows, columns.own.stop - columns.own.start
        earlier = self._earlier
        if earlier is None or earlier.shape != shape or earlier.dtype != dtype or not earlier.is_cpu:
            self._earlier = None  # before there is another one
            earlier = torch.empty(shape, dtype=dtype)
        self.function.columns(self.x, columns.own.start, earlier)
        return SharedJacobian(earlier, Share(None, self.function.rows), columns)

    @property
    def kept(self) -> SharedJacobian | None:
        """J as conjugate gradients keep it, made when it is first asked for; None where it is not kept. Collective."""
        s, function = self.settings, self.function
        whole = function.rows * function.size
        is_single = s.keep == "single" or (s.keep == "auto" and whole > FEW_ENTRIES)
        entries = whole / (1 if self.team is None else self.team.size)
        fits = entries <= damping.MOST_ENTRIES * (2 if is_single else 1)
        if self._kept is None and not function.has_products and s.keep != "none" and fits:
            dtype = torch.float32 if is_single else torch.float64
            self._kept = self.timed(lambda: self._columns(dtype, s.part_size))
            self._earlier = self._kept.matrix
        return self._kept

    def schwarz(self, d: float) -> Schwarz | None:
        """The preconditioner of conjugate gradients here. Collective.

        Args:
            d: mean diagonal of J'J.
        """
        s, J, m, rows = self.settings, self.kept, self.function.rows, None
        if self.function.has_products:
            return None
        if s.coarse == "rows" and m:
            chosen = torch.randperm(m, generator=torch.Generator().manual_seed(0))[: s.coarse_size].sort()[0]
            found = J.matrix[chosen] if J is not None else self.timed(lambda: self.function.jacobian(self.x, chosen))
            rows = found.cpu()
        return schwarz(s, J, rows, m, self.g, d)

    @property
    def is_finite(self) -> bool:
        """Whether f has a value and a gradient here."""
        return math.isfinite(self.f) and bool(self.g.isfinite().all())

    def residual(self, x: Tensor) -> Tensor:
        """r at some other point."""
        return self.timed(lambda: self.function.residual(x))

    def forward(self, d: Tensor) -> Tensor:
        """J d, (m,). Collective."""
        return self.timed(lambda: self.function.jvp(self.x, d)) if self.J is None else self.J.forward(d)

    def backward(self, w: Tensor) -> Tensor:
        """J'w, (n,). Collective."""
        return self.timed(lambda: self.function.vjp(self.x, w)) if self.J is None else self.J.backward(w)

    def agreed(self, *numbers: float) -> list[float]:
        """The first rank's numbers: sums of the same vectors may differ in the last bit. Collective."""
        share = Share(self.team, 1)
        if share.team is None:
            return list(numbers)
        return [float(number) for number in share.agreed(torch.tensor(numbers, dtype=torch.float64))]

    def mean_diagonal(self) -> float:
        """Of J'J; without J by |J z|^2 / n with random signs z, whose mean it is. 1 where J is 0. Collective."""
        J = self.kept if self.kind == "cg" else self.J
        if J is not None:
            return self.agreed(float(J.diagonal().sum()))[0] / len(self.x) or 1.0
        generator = torch.Generator().manual_seed(0)
        signs = 2.0 * torch.randint(2, self.x.shape, generator=generator).double() - 1.0
        return float(self.forward(signs).square().sum()) / len(self.x) or 1.0

    def timed(self, call: Callable[[], T]) -> T:
        """What a call of the function returns; its seconds are counted."""
        begin = time.process_time()
        found = call()
        self.seconds += time.process_time() - begin
        return found
