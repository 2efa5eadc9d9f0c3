"""Trust regions: which radius. The direction is somebody else's."""

from __future__ import annotations

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
