"""Line searches: how far. The direction is somebody else's."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Backtracking:
    """Armijo backtracking with quadratic interpolation (Nocedal, Wright 2006, section 3.5).

    Attributes:
        armijo: fraction of the linear decrease that must be reached.
        shortest: step sizes below this end the search.
    """

    armijo: float = 1e-4
    shortest: float = 1e-10

    def sufficient(self, start: float, value: float, slope: float, size: float) -> bool:
        """Whether phi(size) = value decreases enough; differences at rounding level count as equal."""
        rounding = 1e-15 * max(1.0, abs(start)) * 10.0
        return value <= start + self.armijo * size * slope + rounding

    def search(self, phi: Callable[[float], float], start: float, slope: float, size: float = 1.0) -> float | None:
        """A step size with sufficient decrease of `phi` from phi(0) = start; None if there is none.

        `slope` < 0 is phi'(0). A value that is not finite halves the step.
        """
        while size >= self.shortest:
            value = phi(size)
            if math.isfinite(value) and self.sufficient(start, value, slope, size):
                return size
            model = 2.0 * (value - start - slope * size)
            minimiser = -slope * size**2 / model if math.isfinite(model) and model > 0 else 0.5 * size
            size = min(max(minimiser, 0.1 * size), 0.5 * size)
        return None
