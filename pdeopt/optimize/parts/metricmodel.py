"""Trust-region models in the metric of a function: those of numbers, in coordinates in which it is Euclidean."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pdeopt.functions.smooth import Metric, SmoothFunction
from pdeopt.optimize.parts.lsr1 import LSR1
from pdeopt.optimize.parts.trustmodel import Secant, TrustModel
from pdeopt.optimize.parts.trustsubproblem import TrustStep

#: Inner products that functions supply: Kronecker factors of a network's curvature, functions in space-time.
METRICS = ("none", "kfac", "riesz")


class InCoordinates(SmoothFunction):
    """w -> f(x + R^-1 w), R'R the metric: its Euclidean inner products are those of the metric.

    Args:
        whole: f.
        metric: of the unknowns.
        x: the origin, (size,).
    """

    def __init__(self, whole: SmoothFunction, metric: Metric, x: Tensor) -> None:
        super().__init__(whole.size, whole.comm, whole.costs, whole.tally)
        self.whole, self.of, self.x = whole, metric, x

    def _value_and_gradient(self, x: Tensor) -> tuple[float, Tensor]:
        value, gradient = self.whole.evaluate(self.x + self.of.root_solve(x))
        return value, self.of.adjoint_solve(gradient)

    def _hvp(self, x: Tensor, d: Tensor) -> Tensor:
        product = self.whole.evaluate_hvp(self.x + self.of.root_solve(x), self.of.root_solve(d))
        return self.of.adjoint_solve(product)


class MetricModel:
    """A model of f(x + R^-1 w) in w, R'R the metric: conjugate gradients are preconditioned by it, secant pairs begin
    with a multiple of it, and the radius is a length in it.

    The metric is refreshed at the first point and then every few iterations, with what the function is there; secant
    pairs stay the same pairs of points and gradients.

    Args:
        function: f; another one takes its place where the batch changes.
        inner: the model, in the norm "2".
        metric: of the unknowns.
        every: iterations from one refresh to the next.
    """

    def __init__(self, function: SmoothFunction, inner: TrustModel, metric: Metric, every: int) -> None:
        self.function, self.inner, self.metric, self.every = function, inner, metric, every
        self._count = 0

    def refresh(self, x: Tensor) -> None:
        is_due = self._count % self.every == 0
        self._count += 1
        if is_due:
            metric, inner = self.metric, self.inner
            B = inner.B if isinstance(inner, Secant) and isinstance(inner.B, LSR1) else None
            pairs = B.pairs_by(metric.root_solve, metric.adjoint) if B else ([], [])
            metric.refresh(self.function, x)
            if B:
                B.learn_again(*pairs, metric.root, metric.adjoint_solve)

    def riesz(self, g: Tensor) -> Tensor:
        return self.metric.root_solve(self.metric.adjoint_solve(g))

    def size(self, d: Tensor) -> float:
        return self.function.norm(self.metric.root(d))

    length = size

    def step(self, x: Tensor, g: Tensor, radius: float) -> TrustStep:
        self.inner.function = InCoordinates(self.function, self.metric, x)
        found = self.inner.step(torch.zeros_like(x), self.metric.adjoint_solve(g), radius)
        return TrustStep(self.metric.root_solve(found.d), found.decrease, found.products, found.on_boundary)

    def update(self, s: Tensor, y: Tensor) -> None:
        self.inner.update(self.metric.root(s), self.metric.adjoint_solve(y))

    def local(self, function: SmoothFunction, indices: Tensor | None) -> TrustModel:
        metric = self.metric if indices is None else self.metric.local(indices)
        return MetricModel(function, self.inner.local(function, indices), metric, self.every)

    def memory(self) -> dict[str, Any]:
        own = {f"metric.{name}": value for name, value in self.metric.memory().items()}
        return own | {"count": self._count} | self.inner.memory()

    def recall(self, memory: dict[str, Any]) -> None:
        own = {name.removeprefix("metric."): value for name, value in memory.items() if name.startswith("metric.")}
        self.metric.recall(own)
        self._count = int(memory["count"])
        self.inner.recall(memory)
