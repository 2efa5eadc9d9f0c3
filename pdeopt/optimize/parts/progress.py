"""Whether a run gets on: trials that contradict the derivatives, and steps that gain nothing."""

from __future__ import annotations

import math
import sys
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

#: Changes below this part of the values may be rounding errors.
NOISE = 1e-12
#: The part of the decrease promised at both ends that a trial must keep.
LEAST_SHARE = 1e-2
#: Contradictions in a row from which trials go a hundred times closer, and at which nothing will help.
SUSPICIOUS, SETTLED = 2, 5
#: Steps in a row without a gain, and iterations, at which a run has stagnated.
IDLE_STEPS, IDLE_ITERATIONS = 20, 100


@dataclass
class Doubt:
    """Trials in a row at which f does not fall although its slopes say so, where the trial begins and where it ends.

    Between the two f may do anything, once. But trials go closer and closer: where f never does what its slopes say,
    on no scale, the gradient is not that of f.
    """

    count: int = 0

    def judge(self, before: float, after: float, slope: float, slope_there: Callable[[], float]) -> None:
        """Take in a trial.

        Args:
            before, after: values where it begins and ends; one that is not finite says nothing.
            slope, slope_there: g.d at both ends, d the step.
        """
        if not math.isfinite(after):
            return
        if after - before <= LEAST_SHARE * slope:  # the other slope need not be asked for
            self.count = 0
            return
        promised = max(slope, slope_there())
        is_clear = promised < -NOISE * (abs(before) + abs(after))
        self.count = self.count + 1 if is_clear and after - before > LEAST_SHARE * promised else 0

    @property
    def shrink(self) -> float:
        """A factor for the next trial."""
        return 1e-2 if self.count >= SUSPICIOUS else 1.0

    @property
    def is_settled(self) -> bool:
        """Whether the derivatives are wrong."""
        return self.count >= SETTLED


class ValueWindow:
    """The last values of a run, the highest of which a step has to be below: some steps may go up.

    Where the model is poor, or values are those of changing samples, many steps are refused that would have been made
    good by the next ones (L. Grippo, F. Lampariello, S. Lucidi, SIAM J. Numer. Anal. 23, 1986; for trust regions N. Y.
    Deng, Y. Xiao, F. J. Zhou, J. Optim. Theory Appl. 76, 1993).

    Args:
        length: values; with 1 there is but the present one.
        earlier: values before the present one, the last ones last.
    """

    def __init__(self, length: int, earlier: list[float] | None = None) -> None:
        self.earlier = deque(earlier or [], maxlen=length - 1)

    def highest(self, value: float) -> float:
        """Of the present value and those before it, which the next trial will have before it, too."""
        found = max(value, *self.earlier) if self.earlier else value
        self.earlier.append(value)
        return found


@dataclass
class Stagnation:
    """Iterations since a value or a gradient was lower than all before: of methods whose values never rise."""

    value: float = math.inf
    optimality: float = math.inf
    steps: int = 0
    iterations: int = 0
    last: tuple[float, float] = field(default=(math.nan, math.nan))

    def take(self, record: Any) -> bool:
        """Take in the record of an iteration; whether the run has stagnated."""
        f, g = record.objective, record.optimality
        if not f >= self.value - 4.0 * sys.float_info.epsilon * abs(self.value) or g < self.optimality:
            self.steps = self.iterations = 0
        else:
            self.steps, self.iterations = self.steps + ((f, g) != self.last), self.iterations + 1
        self.value, self.optimality, self.last = min(self.value, f), min(self.optimality, g), (f, g)
        return self.steps >= IDLE_STEPS or self.iterations >= IDLE_ITERATIONS
