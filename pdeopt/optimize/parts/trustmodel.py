"""Models of a trust region: of order one, and of order two from a metric, from secant pairs, from Hessian products."""

from __future__ import annotations

import math
from typing import Any, Protocol

from torch import Tensor

from pdeopt.core.errors import InputError
from pdeopt.functions.smooth import SmoothFunction
from pdeopt.optimize.parts.lsr1 import LSR1, LowRank
from pdeopt.optimize.parts.trustsubproblem import TrustStep, boxed, first_order, length, steihaug

MODELS, NORMS = ("first", "metric", "lsr1", "hvp"), ("2", "inf")


class TrustModel(Protocol):
    """f(x + d) = f(x) + g.d + d.B d / 2, about: what a trust region asks for its steps.

    Attributes:
        function: f; another one takes its place where the batch or the level changes.
    """

    function: SmoothFunction

    def refresh(self, x: Tensor) -> None:
        """Take in that x is the point of another iteration: a metric may follow it."""

    def riesz(self, g: Tensor) -> Tensor:
        """The direction of steepest ascent in the metric of the model, M^-1 g; g itself without one."""

    def size(self, d: Tensor) -> float:
        """sqrt(d.M d)."""

    def length(self, d: Tensor) -> float:
        """What the radius bounds."""

    def step(self, x: Tensor, g: Tensor, radius: float) -> TrustStep:
        """A minimizer of the model, or a good step, within the radius.

        Args:
            x, g: the point and the gradient there, (size,).
            radius: > 0, in the norm of the model.
        """

    def update(self, s: Tensor, y: Tensor) -> None:
        """Take in a pair y = B s."""

    def local(self, function: SmoothFunction, indices: Tensor | None) -> TrustModel:
        """The model of a function of these of the unknowns, or of all, near the same point."""

    def memory(self) -> dict[str, Any]:
        """What `recall` takes."""

    def recall(self, memory: dict[str, Any]) -> None:
        """Go on from what `memory` gave."""


class EuclideanModel:
    """What models have in common whose metric is that of numbers.

    Args:
        function: whose unknowns they are; gives inner products.
        norm: one of `NORMS`, of the radius.
    """

    def __init__(self, function: SmoothFunction, norm: str = "2") -> None:
        self.function, self.norm = function, norm

    def refresh(self, x: Tensor) -> None:
        """There is nothing to refresh."""

    def riesz(self, g: Tensor) -> Tensor:
        return g

    def size(self, d: Tensor) -> float:
        return self.function.norm(d)

    def length(self, d: Tensor) -> float:
        return length(self.function, d, self.norm)

    def update(self, s: Tensor, y: Tensor) -> None:
        """There is nothing to learn."""

    def memory(self) -> dict[str, Any]:
        return {}

    def recall(self, memory: dict[str, Any]) -> None:
        """There is nothing to recall."""


class FirstOrder(EuclideanModel):
    """B = 0: normalized steepest descent, or signs of the gradient in the inf-norm."""

    def step(self, x: Tensor, g: Tensor, radius: float) -> TrustStep:
        return first_order(self.function, g, radius, self.norm)

    def local(self, function: SmoothFunction, indices: Tensor | None) -> FirstOrder:
        return type(self)(function, self.norm)


class MetricAlone(EuclideanModel):
    """B = I, that is, the metric itself is the Hessian: -g, as far as the radius allows."""

    def step(self, x: Tensor, g: Tensor, radius: float) -> TrustStep:
        size = self.length(g)
        t = min(1.0, radius / size) if size > 0.0 else 1.0
        return TrustStep(-t * g, (t - 0.5 * t * t) * self.function.dot(g, g), 0, t < 1.0)

    def local(self, function: SmoothFunction, indices: Tensor | None) -> MetricAlone:
        return type(self)(function, self.norm)


class HessianProducts(EuclideanModel):
    """B = f''(x) by products: conjugate gradients that end at the boundary, to a residual min(rtol, sqrt |g|) |g|.

    Args:
        function: f.
        norm: one of `NORMS`.
        rtol: largest relative residual.
        max_it: products at most.
    """

    def __init__(self, function: SmoothFunction, norm: str = "2", rtol: float = 0.1, max_it: int = 100) -> None:
        super().__init__(function, norm)
        self.rtol, self.max_it = rtol, max_it

    def step(self, x: Tensor, g: Tensor, radius: float) -> TrustStep:
        solve = steihaug if self.norm == "2" else boxed
        forcing = min(self.rtol, math.sqrt(self.function.norm(g)))
        return solve(self.function, lambda d: self.function.hvp(x, d), g, radius, forcing, self.max_it)

    def local(self, function: SmoothFunction, indices: Tensor | None) -> HessianProducts:
        return HessianProducts(function, self.norm, self.rtol, self.max_it)


class Secant(EuclideanModel):
    """B of L-SR1: exact steps in the ball, projected conjugate gradients in the box.

    Args:
        function: whose unknowns they are.
        norm: one of `NORMS`.
        B: learns from the pairs.
    """

    def __init__(self, function: SmoothFunction, norm: str, B: LowRank) -> None:
        super().__init__(function, norm)
        self.B = B

    def step(self, x: Tensor, g: Tensor, radius: float) -> TrustStep:
        return self.B.step(g, radius) if self.norm == "2" else self.B.step_in_box(g, radius)

    def update(self, s: Tensor, y: Tensor) -> None:
        self.B.update(s, y)

    def local(self, function: SmoothFunction, indices: Tensor | None) -> Secant:
        return Secant(function, self.norm, self.B.restricted(function, indices))

    def memory(self) -> dict[str, Any]:
        return self.B.memory() if isinstance(self.B, LSR1) else {}

    def recall(self, memory: dict[str, Any]) -> None:
        if isinstance(self.B, LSR1):
            self.B.recall(memory)


def trust_model(function: SmoothFunction, model: str, norm: str, memory: int, rtol: float, max_it: int) -> TrustModel:
    """The model of this name.

    Args:
        model: one of `MODELS`.
        norm: one of `NORMS`.
        memory: pairs of L-SR1.
        rtol, max_it: of conjugate gradients with Hessian products.
    """
    if model not in MODELS or norm not in NORMS:
        raise InputError("model and norm", f"{model}, {norm}", f"{' | '.join(MODELS)}, {' | '.join(NORMS)}")
    if model == "first":
        return FirstOrder(function, norm)
    if model == "metric":
        return MetricAlone(function, norm)
    if model == "hvp":
        return HessianProducts(function, norm, rtol, max_it)
    return Secant(function, norm, LSR1(function, memory))
