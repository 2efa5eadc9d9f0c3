"""Trust regions: which radius. The direction comes from a model."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass


@dataclass(frozen=True)
class TrustRegion:
    """Radius rules of Heinkenschloss and Ridzal (SIAM J. Optim. 24, 2014, section 4), as values.

    Attributes:
        radius: Delta.
        accept: ratio of actual to predicted reduction from which a step is taken.
        good, very_good: ratios from which the radius may grow, to 2 or 7 step lengths.
    """

    radius: float
    accept: float = 1e-8
    good: float = 0.8
    very_good: float = 0.9

    def accepts(self, ratio: float) -> bool:
        """Whether a step with this ratio is taken; never for NaN."""
        return ratio >= self.accept

    def after(self, ratio: float, step: float, longest_part: float) -> float:
        """The next radius, from the lengths of the step and of the longer of its two parts."""
        if ratio >= self.very_good:
            return max(7.0 * step, self.radius)
        if ratio >= self.good:
            return max(2.0 * step, self.radius)
        return self.radius if self.accepts(ratio) else 0.5 * longest_part


#: Part of the radius from which a step is one that the radius limits.
NEAR_THE_BOUNDARY = 0.8


@dataclass(frozen=True)
class RatioRule:
    """The common radius rule: shrink after a poor ratio, grow after a good one of a step that the radius limits.

    (A. R. Conn, N. I. M. Gould, P. L. Toint, Trust-Region Methods, 2000, algorithm 6.1.1.)

    Attributes:
        accept: ratio of actual to predicted reduction from which a step is taken.
        poor, good: ratios below and above which the radius changes.
        shrink, grow: factors of the radius.
        smallest, largest: bounds of the radius.
    """

    accept: float = 1e-4
    poor: float = 0.25
    good: float = 0.75
    shrink: float = 0.5
    grow: float = 2.0
    smallest: float = 0.0
    largest: float = math.inf

    def after(self, ratio: float, radius: float, step: float) -> float:
        """The next radius, from the last and the length of the step; NaN counts as poor."""
        if not ratio >= self.poor:
            radius = self.shrink * min(radius, step)
        elif ratio > self.good and step >= NEAR_THE_BOUNDARY * radius:
            radius = self.grow * radius
        return min(max(radius, self.smallest), self.largest)


#: A trust radius below this part of the scale of x is lost in rounding.
SMALLEST_RELATIVE_RADIUS = 1e-15


def has_vanished(radius: float, norm: float, scale: float = 1.0) -> bool:
    """Whether steps within the radius no longer change a point.

    Args:
        radius: of the steps.
        norm: |x| of the point.
        scale: of x, where the point is zero.
    """
    return radius <= SMALLEST_RELATIVE_RADIUS * max(scale, norm)


def reduction_ratio(before: float, after: float, predicted: float) -> float:
    """Actual over predicted reduction; -infinity for values that are not finite, 1 where both are rounding alone.

    Args:
        before, after: values of the function.
        predicted: decrease of the model, >= 0.
    """
    if not math.isfinite(after) or not predicted >= 0:
        return -math.inf
    rounding = 4.0 * sys.float_info.epsilon * abs(before)
    actual = before - after
    if predicted <= rounding and abs(actual) <= rounding:
        return 1.0
    return actual / predicted if predicted > 0 else -math.inf
