"""How much damping: by trials of less and more of it, or by a trust radius."""

from __future__ import annotations

import math
from typing import Any

import torch

from pdeopt.optimize.parts.trustregion import RatioRule
from pdeopt.optimize.squares.dampedsteps import DampedSteps, LevenbergSettings, Trial

#: The damping is divided or multiplied by this; a step that is better than this ratio tells to try a longer one.
FACTOR, GOOD, ACCEPT = 4.0, 0.9, 1e-4
#: After a step below this ratio, or a refused one, less damping is not tried at once.
FAIR = 0.25
#: Trials of an iteration; no damping is below the least.
TRIALS, LEAST_DAMPING = 12, 1e-18
#: How a trust radius follows.
RADIUS_RULE = RatioRule(shrink=0.25)


class DampingSearch:
    """The damping of the last step, and the search for that of the next.

    Args:
        settings: `LevenbergSettings`.

    Attributes:
        damping: lam.
        radius: of the steps, in the norm of D; 0 where it is still to be found.
        met: trials of the last search that led somewhere.
    """

    def __init__(self, settings: LevenbergSettings) -> None:
        self.settings, self.damping, self.radius, self.is_wary = settings, settings.damping, 0.0, False
        self.met = list[Trial]()

    def best(self, steps: DampedSteps) -> Trial | None:
        """The step to take from here; None where none serves, and there will be more damping."""
        self.met = []
        best = self._within_radius(steps) if self.settings.rule == "radius" else self._by_damping(steps)
        self.damping = self.damping * FACTOR**TRIALS if best is None else best.damping
        return best

    def begin_again(self) -> None:
        """Go back to the first damping."""
        self.damping = self.settings.damping

    def _at(self, steps: DampedSteps, damping: float) -> Trial | None:
        trial = steps.trial(damping)
        if trial is None or torch.equal(trial.x, steps.at.x):
            return None
        self.met.append(trial)
        return trial if trial.ratio > ACCEPT else None

    def _by_damping(self, steps: DampedSteps) -> Trial | None:
        """The best of lam/4, lam/16, ..., or the first of lam, 4 lam, ... that serves."""
        damping = max(self.damping if self.is_wary else self.damping / FACTOR, LEAST_DAMPING)
        best = self._at(steps, damping)
        self.is_wary = best is None or best.ratio < FAIR
        if best is None:
            more = (damping * FACTOR**k for k in range(1, TRIALS))
            return next((trial for each in more if (trial := self._at(steps, each)) is not None), None)
        for _ in range(TRIALS):
            damping /= FACTOR
            longer = self._at(steps, damping) if best.ratio > GOOD and damping > LEAST_DAMPING else None
            if longer is None or longer.f >= best.f:
                break
            best = longer
        return best

    def _within_radius(self, steps: DampedSteps) -> Trial | None:
        """The first step that serves as the radius shrinks."""
        self.radius = self.radius or self.settings.radius * (steps.length(steps.at.x) or 1.0)
        for _ in range(TRIALS):
            best = self._at(steps, steps.damping_for(self.radius))
            ratio, length = (best.ratio, best.length) if best else (-math.inf, self.radius)
            self.radius = RADIUS_RULE.after(ratio, self.radius, length)
            if best is not None:
                return best
        return None

    def memory(self) -> dict[str, Any]:
        """What `recall` takes."""
        return {"damping": self.damping, "radius": self.radius, "wary": float(self.is_wary)}

    def recall(self, memory: dict[str, Any]) -> None:
        """Go on from what `memory` gave."""
        self.damping, self.radius = float(memory["damping"]), float(memory["radius"])
        self.is_wary = bool(memory["wary"])
