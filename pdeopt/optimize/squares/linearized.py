"""Residuals at a point with their linear model, and the seconds that the function's calls take."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from pdeopt.optimize.squares import damping
from pdeopt.squares.residual import ResidualFunction

T = TypeVar("T")


class Linearized:
    """r(x + p) ~ r + J p, with J as a matrix or by products.

    Args:
        linear: one of `damping.LINEAR_SOLVERS`.

    Attributes:
        r, J: residual and Jacobian at the point; J is None where products serve.
        f, g: |r|^2 and its derivative 2 J'r.
        kind: how damped systems are solved here.
        seconds: of the processor, in calls of the function.
    """

    r: Tensor
    f: float
    g: Tensor

    def __init__(self, linear: str) -> None:
        self.linear, self.kind, self.seconds = linear, linear, 0.0
        self.J: Tensor | None = None

    def set(self, function: ResidualFunction, x: Tensor) -> None:
        """Go to this point, (n,), of this function."""
        self.function, self.x = function, x
        self.kind = damping.chosen(self.linear, function.rows, function.size)
        if self.kind == "cg":
            self.J, self.r = None, self.residual(x)
            self.g = 2.0 * self.backward(self.r)
        else:
            earlier = self.J
            self.r, J = self.timed(lambda: function.linearize(x, out=earlier))
            self.g, self.J = 2.0 * (J.T @ self.r), J
        self.f = float(self.r @ self.r)

    @property
    def is_finite(self) -> bool:
        """Whether f has a value and a gradient here."""
        return math.isfinite(self.f) and bool(self.g.isfinite().all())

    def residual(self, x: Tensor) -> Tensor:
        """r at some other point."""
        return self.timed(lambda: self.function.residual(x))

    def forward(self, d: Tensor) -> Tensor:
        """J d, (m,)."""
        return self.timed(lambda: self.function.jvp(self.x, d)) if self.J is None else self.J @ d

    def backward(self, w: Tensor) -> Tensor:
        """J'w, (n,)."""
        return self.timed(lambda: self.function.vjp(self.x, w)) if self.J is None else self.J.T @ w

    def mean_diagonal(self) -> float:
        """Of J'J; without J by |J z|^2 / n with random signs z, whose mean it is. 1 where J is 0."""
        if self.J is not None:
            return float(self.J.square().sum()) / len(self.x) or 1.0
        generator = torch.Generator().manual_seed(0)
        signs = 2.0 * torch.randint(2, self.x.shape, generator=generator).double() - 1.0
        return float(self.forward(signs).square().sum()) / len(self.x) or 1.0

    def timed(self, call: Callable[[], T]) -> T:
        """What a call of the function returns; its seconds are counted."""
        begin = time.process_time()
        found = call()
        self.seconds += time.process_time() - begin
        return found
