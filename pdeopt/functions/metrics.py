"""Metrics that are the same at all points."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pdeopt.functions.smooth import SmoothFunction


class FixedMetric:
    """What metrics have in common that are the same at all points."""

    def refresh(self, function: SmoothFunction, x: Tensor) -> None:
        """There is nothing to refresh."""

    def memory(self) -> dict[str, Any]:
        return {}

    def recall(self, memory: dict[str, Any]) -> None:
        """There is nothing to recall."""


class DiagonalMetric(FixedMetric):
    """R = diag(scale), positive, (size,)."""

    def __init__(self, scale: Tensor) -> None:
        self.scale = scale

    def root(self, v: Tensor) -> Tensor:
        return self.scale * v

    def root_solve(self, w: Tensor) -> Tensor:
        return w / self.scale

    def adjoint(self, w: Tensor) -> Tensor:
        return self.scale * w

    def adjoint_solve(self, g: Tensor) -> Tensor:
        return g / self.scale

    def local(self, indices: Tensor) -> DiagonalMetric:
        return DiagonalMetric(self.scale[indices])
