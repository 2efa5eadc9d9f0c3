"""Functions in units: f / unit, where the values and gradients of f itself are too large or too small to be squared.

The unit is a power of two. So all numbers are those of f with another exponent, and what an optimizer does with them
is the same bit for bit.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from pdeopt.functions.border import order
from pdeopt.functions.decomposition import Decomposition
from pdeopt.functions.hierarchy import Hierarchy
from pdeopt.functions.smooth import Metric, Operator, SampledFunction, SmoothFunction
from pdeopt.functions.subsampling import WeightedSamples

#: Between one over it and it, values and gradients are taken as they are.
USUAL = 1e10


def unit_of(value: float, norm: float, usual: float = USUAL) -> float:
    """The unit for a function with this value and norm of the gradient: 1 for usual ones, else the power of two below.

    Near a minimum the gradient is small whatever the unit; so the larger of the two says.

    Args:
        value, norm: of f and |f'| where a run begins.
        usual: numbers between one over this and this are.
    """
    size = max(abs(value), norm)
    if not math.isfinite(size) or size == 0.0 or 1.0 / usual <= size <= usual:
        return 1.0
    return 2.0 ** max(min(order(size), 1000), -1000)


class MetricInUnits:
    """M / unit, that of f / unit where M is that of f."""

    def __init__(self, whole: Metric, unit: float) -> None:
        self.whole, self.unit, self._factor = whole, unit, 1.0 / math.sqrt(unit)

    def refresh(self, function: SmoothFunction, x: Tensor) -> None:
        self.whole.refresh(function.whole, x)  # type: ignore[attr-defined]

    def root(self, v: Tensor) -> Tensor:
        return self._factor * self.whole.root(v)

    def root_solve(self, w: Tensor) -> Tensor:
        return self.whole.root_solve(w / self._factor)

    def adjoint(self, w: Tensor) -> Tensor:
        return self._factor * self.whole.adjoint(w)

    def adjoint_solve(self, g: Tensor) -> Tensor:
        return self.whole.adjoint_solve(g / self._factor)

    def local(self, indices: Tensor) -> MetricInUnits:
        return MetricInUnits(self.whole.local(indices), self.unit)

    def memory(self) -> dict[str, Any]:
        return self.whole.memory()

    def recall(self, memory: dict[str, Any]) -> None:
        self.whole.recall(memory)


class InUnits(SmoothFunction):
    """x -> f(x) / unit, counted as f.

    Args:
        whole: f.
        unit: a power of two.
    """

    def __init__(self, whole: SmoothFunction, unit: float) -> None:
        SmoothFunction.__init__(self, whole.size, whole.comm, whole.costs, whole.tally)
        self.whole, self.unit = whole, unit

    def _value(self, x: Tensor) -> float:
        return self.whole.evaluate_value(x) / self.unit

    def _value_and_gradient(self, x: Tensor) -> tuple[float, Tensor]:
        value, gradient = self.whole.evaluate(x)
        return value / self.unit, gradient / self.unit

    def _hvp(self, x: Tensor, d: Tensor) -> Tensor:
        return self.whole.evaluate_hvp(x, d) / self.unit

    def local(self, decomposition: Decomposition, part: int, x: Tensor) -> SmoothFunction:
        return in_units(self.whole.local(decomposition, part, x), self.unit)

    def decompose(self, parts: int | None = None, overlap: int = 0, team: Any = None) -> Decomposition:
        return self.whole.decompose(parts, overlap, team)

    def preconditioner(self) -> Operator | None:
        inverse, unit = self.whole.preconditioner(), self.unit
        return None if inverse is None else lambda g: inverse(g * unit)

    def metric(self, kind: str) -> Metric:
        return MetricInUnits(self.whole.metric(kind), self.unit)


class SampledInUnits(InUnits, SampledFunction):
    """The same of a mean over samples."""

    whole: SampledFunction

    def __init__(self, whole: SampledFunction, unit: float) -> None:
        super().__init__(whole, unit)
        self.samples = whole.samples

    def subset(self, indices: Tensor) -> SampledFunction:
        return SampledInUnits(self.whole.subset(indices), self.unit)


class WeightedInUnits(SampledInUnits, WeightedSamples):
    """The same of samples that may be drawn by their importance."""

    whole: WeightedSamples

    def importance(self, x: Tensor) -> Tensor:
        return self.whole.importance(x)

    def subset(self, indices: Tensor, factors: Tensor | None = None) -> WeightedSamples:
        return WeightedInUnits(self.whole.subset(indices, factors), self.unit)


def in_units(function: SmoothFunction, unit: float) -> SmoothFunction:
    """f / unit, of the kind of f as far as optimizers know kinds.

    Args:
        function: f.
        unit: a power of two.
    """
    if isinstance(function, Hierarchy):
        return Hierarchy([in_units(each, unit) for each in function.functions], function.transfers)
    if isinstance(function, WeightedSamples):
        return WeightedInUnits(function, unit)
    return SampledInUnits(function, unit) if isinstance(function, SampledFunction) else InUnits(function, unit)
