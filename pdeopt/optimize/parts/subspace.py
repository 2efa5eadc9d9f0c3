"""The space of corrections: f(x + C a) as a function of a, one column of C for each part."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pdeopt.functions.smooth import SmoothFunction


@dataclass(frozen=True)
class Correction:
    """Of one part: the step d, and the decrease of the local function."""

    d: Tensor
    decrease: float

    def without_step(self) -> Correction:
        """On a rank that has none of its unknowns."""
        return Correction(self.d[:0], self.decrease)


class Columns(SmoothFunction):
    """a -> f(x + C a), the columns of C scaled by what is known of their curvature; remembers the best point.

    A. Kopanicakova and others (arXiv 2601.08709) minimize over the corrections of the parts in this way.

    Args:
        function: f; its calls are counted in its tally.
        x, f, g: the point, (size,), with value and gradient.

    Attributes:
        rows: the columns of C, (size,) each.
        best: value, point and gradient of the lowest value met.
    """

    def __init__(self, function: SmoothFunction, x: Tensor, f: float, g: Tensor) -> None:
        super().__init__(0, costs=function.costs, tally=function.tally)
        self.function, self.x, self.g0 = function, x, g
        self.rows: list[Tensor] = []
        self.best = (f, x, g)

    def add(self, column: Tensor, decrease: float) -> None:
        """A direction that goes down; along it, f falls by `decrease` to where it is 1; NaN where that is not known."""
        slope = self.function.dot(self.g0, column)
        if slope > 0 and not math.isfinite(decrease):
            column, slope = -column, -slope
        if not slope < 0:
            return
        curvature = 2.0 * (-decrease - slope)
        if not (math.isfinite(curvature) and curvature > 0):
            curvature = -slope
        self.rows.append(column / math.sqrt(curvature))
        self.size = len(self.rows)

    def start(self) -> tuple[float, Tensor]:
        """Value and gradient at a = 0."""
        return self.best[0], self.function.products(self.rows, self.g0)

    def _value_and_gradient(self, a: Tensor) -> tuple[float, Tensor]:
        C = torch.stack(self.rows)
        x = self.x + a @ C
        f, g = self.function.evaluate(x)
        if f < self.best[0]:
            self.best = (f, x, g)
        return f, self.function.products(C, g)
